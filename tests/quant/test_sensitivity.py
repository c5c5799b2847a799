"""Sensitivity files: their predictions, and the files that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dots1_local.architecture import Dots1Config
from dots1_local.errors import Dots1Error
from dots1_local.quant.sensitivity import load_sensitivity
from tests.micro import micro_config
from tests.quant.made_up import made_up

CONFIG = Dots1Config.from_json(micro_config())
HEAD = "output.weight"
EFFECT = {"error": 0, "damage": 0, "flips": 0}

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "sensitivity.json").write_text(made_up(CONFIG).to_json())
    return tmp_path / "sensitivity.json"


def edit(path: Path, change: Edit) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_written_file_is_read_back(path: Path) -> None:
    found = load_sensitivity(path)
    assert found == made_up(CONFIG)
    found.check(CONFIG)


def test_predicts_damage_and_the_root_of_flips(path: Path) -> None:
    edit(
        path,
        lambda c: c.update(
            tensors={
                "a": {"Q8_0": {"error": 0, "damage": 0.25, "flips": 9}},
                "b": {"Q6_K": {"error": 0, "damage": 0.5, "flips": 16}},
            }
        ),
    )
    sensitivity = load_sensitivity(path)
    assert sensitivity.predict({"a": "Q8_0", "b": "Q6_K", "norm": "F32"}) == 5.75
    assert sensitivity.predict({"a": "BF16", "b": "Q6_K"}) == 4.5
    with pytest.raises(Dots1Error, match="Q2_K on a was not measured"):
        sensitivity.predict({"a": "Q2_K"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format=2), "format"),
        (lambda c: c.pop("format"), "format"),
        (lambda c: c.pop("imatrix"), "imatrix"),
        (lambda c: c.update(tensors=[]), "tensors"),
        (lambda c: c.update(geometry={"hidden_size": float("inf")}), "Infinity"),
        (lambda c: c["tensors"].update({HEAD: 3}), "tensors"),
        (lambda c: c["tensors"][HEAD].update({"Q9_X": EFFECT}), f"{HEAD} .* 'Q9_X'"),
        (lambda c: c["tensors"][HEAD]["Q8_0"].pop("flips"), "flips"),
        (lambda c: c["tensors"][HEAD]["Q8_0"].update(damage=float("nan")), "NaN"),
        (lambda c: c["tensors"][HEAD]["Q8_0"].update(damage=1e300), "damage"),
        (lambda c: c["tensors"][HEAD]["Q8_0"].update(flips=-1), "flips"),
        (lambda c: c["tensors"][HEAD]["Q8_0"].update(error=None), "error"),
    ],
)
def test_a_wrong_field_is_refused_by_name(path: Path, change: Edit, says: str) -> None:
    edit(path, change)
    with pytest.raises(Dots1Error, match=rf"sensitivity\.json.*{says}") as error:
        load_sensitivity(path)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_file_that_is_cut_or_not_json_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(Dots1Error, match=r"sensitivity\.json is not a sensitivity file"):
        load_sensitivity(path)
    path.write_text(made_up(CONFIG).to_json()[:-3])
    with pytest.raises(Dots1Error, match=r"sensitivity\.json is not a sensitivity file"):
        load_sensitivity(path)


def test_huge_and_missing_files_are_refused(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(Dots1Error, match="too large"):
        load_sensitivity(path)
    path.unlink()
    with pytest.raises(Dots1Error, match=r"cannot read .*: No such file"):
        load_sensitivity(path)


def test_a_file_of_another_model_is_refused(path: Path) -> None:
    other = Dots1Config.from_json(micro_config(moe_intermediate_size=64))
    with pytest.raises(Dots1Error, match="moe_intermediate_size is 32, this model's 64"):
        load_sensitivity(path).check(other)
