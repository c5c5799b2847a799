"""The campaign: trials that are drawn from seeds, counted, resumed and repeated."""

import json
from pathlib import Path
from random import Random

import pytest

from benchmarks.campaign import __main__ as campaign
from benchmarks.campaign.trial import Broken, Part

DRAWN: list[int] = []


def _draw(random: Random, folder: Path) -> None:
    assert list(folder.iterdir()) == []
    (folder / "scrap").touch()
    DRAWN.append(random.randrange(1 << 30))
    if len(DRAWN) == 2:
        raise Broken("the second one broke")


@pytest.fixture(autouse=True)
def _one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    DRAWN.clear()
    monkeypatch.setattr(campaign, "PARTS", {"kills": Part("nothing is lost", {"chat": (_draw, 3)})})


def _run(monkeypatch: pytest.MonkeyPatch, work: Path, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["campaign", "--work", str(work), *words])
    with pytest.raises(SystemExit) as end:
        campaign.main()
    return int(end.value.code or 0)


def test_a_failure_is_counted_and_named_and_its_folder_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, tmp_path) == 1
    printed = capsys.readouterr()
    assert printed.err == "kills/chat/0/1: the second one broke\n"
    row = printed.out.splitlines()[-1].split("|")
    assert [cell.strip() for cell in row[1:5]] == ["kills", "all", "3", "1"]
    assert [file.parent.name for file in tmp_path.rglob("scrap")] == ["1"]


def test_a_campaign_goes_on_after_the_trials_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _run(monkeypatch, tmp_path, "--count", "1")
    results = tmp_path / "results.jsonl"
    results.write_text(results.read_text() + '\n{"part": "kil')  # stopped within a line
    _run(monkeypatch, tmp_path)
    whole = [line for line in results.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["seed"] for line in whole] == [f"kills/chat/0/{n}" for n in range(3)]
    assert len(DRAWN) == 3


def test_a_trial_is_repeated_by_its_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _run(monkeypatch, tmp_path, "--seed", "7")
    drawn = DRAWN[2]
    assert _run(monkeypatch, tmp_path, "--again", "kills/chat/7/2") == 0
    assert DRAWN[3] == drawn
    assert len(set(DRAWN)) == 3
