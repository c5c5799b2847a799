"""`dots1 evaluate`, beside lm_eval's own client, transformers and calculations by hand."""

import json
import math
import os
import re
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.tasks._index import TaskIndex
from transformers import AutoTokenizer, Dots1ForCausalLM
from typer.testing import CliRunner, Result

from dots1_local.cli import app
from tests.conftest import Converted
from tests.helpers import write_random_gguf
from tests.serve.served import Served
from tests.workers import start_dots1

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}.jsonl
test_split: test
num_fewshot: {shots}
"""
ENDINGS = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{endings}}"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""
CONTINUED = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{endings[label]}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
"""
GROUP = """
group: both
task: [long, short]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
  - metric: acc_norm
    weight_by_size: false
"""
CONTEXT = 256


def questions(text: str, count: int) -> list[dict[str, Any]]:
    """Beginnings of sentences, whose ends are to be told from the ends of others."""
    sentences = [s.split() for s in re.findall(r"[A-Z][^.\n\"]{25,80}\.", text)]
    pairs = [(" ".join(words[:4]), " ".join(words[4:])) for words in sentences if len(words) > 6]
    rows = []
    for place in range(count):
        endings = [pairs[place + step][1] for step in (0, 7, 13)]
        label = place % 3
        endings[0], endings[label] = endings[label], endings[0]
        rows.append({"question": pairs[place][0], "endings": endings, "label": label})
    return rows


@pytest.fixture(scope="module")
def rows(tiny: Path) -> list[dict[str, Any]]:
    return questions((tiny / "heldout.txt").read_text(encoding="utf-8"), 17)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    """A folder of tasks with their data: a group of two of different sizes, and one that writes."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, part in {"long": rows[:11], "short": rows[11:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name, data, shots, rest in (
        ("long", "long", 0, ENDINGS),
        ("short", "short", 2, ENDINGS),
        ("continued", "short", 0, CONTINUED),
    ):
        config = TASK.format(name=name, data=data, shots=shots) + rest
        if shots:
            config += "fewshot_split: test\nfewshot_config:\n  sampler: first_n\n"
        (folder / f"{name}.yaml").write_text(config)
    (folder / "both.yaml").write_text(GROUP)
    (folder / "hub.yaml").write_text("task: hub\ndataset_path: someone/questions\n" + ENDINGS)
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("random") / "random.gguf")


@pytest.fixture(scope="module")
def run(folder: Path, answers: Path) -> Any:
    def call(model: Path, *options: object) -> Result:
        common = ["--task-folder", folder, "-c", CONTEXT, "-t", 1, "--answers", answers]
        return CliRunner().invoke(app, ["evaluate", *map(str, (model, *common, *options))])

    return call


@pytest.fixture(scope="module")
def theirs(
    converted: Converted, random_model: Path, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of lm_eval's own client with servers of both models."""
    found = []
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    before = Path.cwd()
    for model in (converted("F32"), random_model):
        with Served(model, "-c", str(CONTEXT), "--parallel", "2") as server:
            os.chdir(folder)
            try:
                arguments = {
                    "base_url": f"{server.url}/completions",
                    "model": "dots1",
                    "max_length": CONTEXT,
                    "num_concurrent": 2,
                }
                found.append(
                    lm_eval.simple_evaluate(
                        model="local-completions",
                        model_args=arguments,
                        tasks=["both", "continued"],
                        task_manager=manager,
                    )
                )
            finally:
                os.chdir(before)
    return found[0], found[1]


def by_key(printed: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(each["name"], each["metric"]): each for each in json.loads(printed)["scores"]}


def test_scores_are_those_of_lm_evals_own_client_and_errors_are_paired(
    run: Any, converted: Converted, random_model: Path, theirs: Any
) -> None:
    result = run(
        converted("F32"), "--tasks", "both,continued", "--reference", random_model, "--json"
    )
    found = by_key(result.stdout)
    ours, other = theirs
    assert len(found) == 7
    for (name, metric), each in found.items():
        expected = ours["results"][name]
        assert each["value"] == pytest.approx(expected[f"{metric},none"])
        assert each["error"] == pytest.approx(expected[f"{metric}_stderr,none"])
        assert each["reference"]["reference"] == other["results"][name][f"{metric},none"]

    def errors(metric: str) -> list[float]:
        """By hand, from the samples that lm_eval logged."""
        errors = []
        for name in ("long", "short"):
            a, b = (
                np.array([sample[metric] for sample in side["samples"][name]])
                for side in (ours, other)
            )
            assert (a != b).any()
            errors.append((a - b).std(ddof=1) / math.sqrt(len(a)))
        return errors

    long, short = errors("acc")
    for name, error in {
        "long": long,
        "short": short,
        "both": math.sqrt((11 / 17 * long) ** 2 + (6 / 17 * short) ** 2),
    }.items():
        reference = other["results"][name]["acc,none"]
        compared = found[name, "acc"]["reference"]
        assert compared["error"] == pytest.approx(100 * error / reference)
        assert compared["percent"] == pytest.approx(
            100 * ours["results"][name]["acc,none"] / reference
        )
    long, short = errors("acc_norm")
    reference = other["results"]["both"]["acc_norm,none"]
    assert found["both", "acc_norm"]["reference"]["error"] == pytest.approx(
        100 * math.sqrt(long**2 + short**2) / 2 / reference
    )


def test_the_table_shows_groups_before_their_tasks(run: Any, converted: Converted) -> None:
    result = run(converted("F32"), "--tasks", "both")
    lines = [re.split(r" {2,}", line.strip()) for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == ["task", "both", "both", *["long"] * 2, *["short"] * 2]
    assert lines[1][1:4] == ["acc", "17", lines[1][3]]
    assert [line[2] for line in lines[3:]] == ["0", "0", "2", "2"]


def test_another_files_answers_are_not_taken(run: Any, converted: Converted, answers: Path) -> None:
    assert "are answered" not in run(converted("Q4_K_M"), "--tasks", "short", "--limit", 2).stderr
    again = run(converted("Q4_K_M"), "--tasks", "short", "--limit", 2)
    assert "6 requests, of which 6 are answered" in again.stderr
    more = run(converted("Q4_K_M"), "--tasks", "short", "--limit", 3, "--dry-run",
               "--hardware", "24gb-64gb")  # fmt: skip
    assert "9 requests, of which 6 are answered" in more.stderr


def stored(folder: Path) -> int:
    """The number of answers in the only file there."""
    try:
        [path] = folder.glob("*.answers")
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            return int(database.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
    except (ValueError, sqlite3.Error):
        return 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_ended_run_loses_only_running_requests(
    converted: Converted, folder: Path, tmp_path: Path, theirs: Any, number: signal.Signals
) -> None:
    command = ["evaluate", str(converted("F32")), "--tasks", "both", "--task-folder", str(folder),
               "-c", str(CONTEXT), "-t", "1", "--parallel", "1", "--answers", str(tmp_path),
               "--json"]  # fmt: skip
    with start_dots1(*command) as program:
        while stored(tmp_path) < 10:
            assert program.poll() is None
            time.sleep(0.01)
        program.send_signal(number)
        printed, notices = program.communicate(timeout=30)
    kept = stored(tmp_path)
    assert 10 <= kept < 51
    assert printed == ""
    if number == signal.SIGINT:
        assert program.returncode == 130
        assert notices.endswith("stopped; the same command goes on from here\n")
    result = CliRunner().invoke(app, command)
    assert f"51 requests, of which {kept} are answered" in result.stderr
    found = by_key(result.stdout)["both", "acc"]
    assert found["value"] == pytest.approx(theirs[0]["results"]["both"]["acc,none"])
    assert stored(tmp_path) == 51


def test_a_dry_run_counts_requests_and_tokens(
    run: Any, tiny: Path, converted: Converted, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    options = ["--dry-run", "--hardware", "24gb-64gb", "--json", "--answers", tmp_path]
    result = run(converted("F32"), "--tasks", "long,continued", *options)
    [model] = json.loads(result.stdout)["models"]
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    prompts = [tokens(f"{r['question']} {end}") for r in rows[:11] for end in r["endings"]]
    tree = {tuple(prompt[:length]) for prompt in prompts for length in range(1, len(prompt) + 1)}
    assert model["tasks"]["long"] == {
        "requests": 33,
        "prompt_tokens": sum(map(len, prompts)),
        "computed": len(tree),  # every beginning once
        "answer_tokens": 0,
        "cut": 0,
    }
    written = model["tasks"]["continued"]
    assert written["prompt_tokens"] == sum(len(tokens(r["question"])) for r in rows[11:])
    assert written["answer_tokens"] == 6 * 6
    assert model["remaining"]["requests"] == 39
    assert model["seconds"]["reading"] > 0 < model["seconds"]["writing_at_most"]
    assert not list(tmp_path.glob("*.answers")) or stored(tmp_path) == 0


def test_questions_are_put_into_the_models_template(
    run: Any, tiny: Path, converted: Converted, rows: list[dict[str, Any]]
) -> None:
    options = ["--dry-run", "--hardware", "24gb-64gb", "--json", "--chat-template"]
    result = run(converted("F32"), "--tasks", "continued", "--system", "Be brief.", *options)
    [model] = json.loads(result.stdout)["models"]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    expected = 0
    for row in rows[11:]:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": row["question"]},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected += len(tokenizer(text, add_special_tokens=False).input_ids)
    assert model["total"]["prompt_tokens"] == expected


def test_texts_have_bits_per_byte(
    run: Any, tiny: Path, converted: Converted, tmp_path: Path
) -> None:
    heldout = (tiny / "heldout.txt").read_text(encoding="utf-8")
    texts = {"story": heldout[:300], "other": heldout[2000:2600]}
    given = []
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
        given += ["--text", f"{name}={tmp_path}/{name}.txt"]
    found = by_key(run(converted("F32"), *given, "--json").stdout)
    tokenizer, total = AutoTokenizer.from_pretrained(tiny), {}
    model = Dots1ForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    start = tokenizer.convert_tokens_to_ids("<|endofresponse|>")
    for name, text in texts.items():
        ids = torch.tensor([[start, *tokenizer(text, add_special_tokens=False).input_ids]])
        assert ids.shape[1] < CONTEXT  # one window
        with torch.inference_mode():
            rows = model(ids).logits[0, :-1].double().log_softmax(-1)
        total[name] = -float(rows.gather(1, ids[0, 1:, None]).sum()) / math.log(2)
        expected = total[name] / len(text.encode())
        assert found[name, "bits_per_byte"]["value"] == pytest.approx(expected, rel=1e-3)
    size = sum(len(text.encode()) for text in texts.values())
    assert found["all", "bits_per_byte"]["value"] == pytest.approx(
        sum(total.values()) / size, rel=1e-3
    )


def test_a_long_text_is_scored_in_windows_and_a_long_prompt_is_cut(
    run: Any, tiny: Path, converted: Converted, tmp_path: Path
) -> None:
    text = tmp_path / "long.txt"
    text.write_text((tiny / "heldout.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    options = ["--dry-run", "--hardware", "24gb-64gb", "--json", "--tasks", "short"]
    result = run(converted("F32"), *options, "-c", 48, "--text", f"windows={text}")
    [model] = json.loads(result.stdout)["models"]
    tokens = len(AutoTokenizer.from_pretrained(tiny)(text.read_text()).input_ids)
    windows = -(-tokens // 46)  # of 47 tokens, because one is left for the answer
    assert model["tasks"]["windows"]["requests"] == windows
    assert model["tasks"]["windows"]["prompt_tokens"] == windows * 47
    assert model["tasks"]["short"]["cut"] > 0
    assert "prompts will lose the beginning, because the context is 48 tokens" in result.stderr
    result = run(converted("F32"), *options, "-c", 8)
    assert "give a larger --context" in str(result.exception)


def evaluate_offline(model: Path, folder: Path, cache: Path, *options: str) -> tuple[int, str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    command = ["evaluate", str(model), "--task-folder", str(folder), "-t", "1", *options]
    with start_dots1(*command, env=env) as program:
        _, notices = program.communicate(timeout=60)
    return program.returncode, notices


def test_what_the_network_is_needed_for_is_said_first(
    random_model: Path, folder: Path, tmp_path: Path
) -> None:
    code, notices = evaluate_offline(random_model, folder, tmp_path, "--tasks", "hub")
    first, second = notices.splitlines()
    assert first == "someone/questions: it must be fetched from the Hugging Face hub"
    assert second.startswith("dots1: the tasks' data is not in the local cache")
    assert code == 1
    (tmp_path / "someone___questions" / "default" / "0.0.0").mkdir(parents=True)
    _, notices = evaluate_offline(random_model, folder, tmp_path, "--tasks", "hub")
    assert notices.splitlines()[0] == "someone/questions is in the local cache"


def test_local_tasks_work_offline(random_model: Path, folder: Path, tmp_path: Path) -> None:
    options = ["--tasks", "continued", "--limit", "1", "--answers", str(tmp_path)]
    code, notices = evaluate_offline(random_model, folder, tmp_path / "cache", *options)
    assert code == 0
    assert len(notices.splitlines()) == 1  # what is ahead, and no library's own words
    assert notices.startswith("random.gguf: 1 request, ")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, "name tasks of lm_eval, or a --text"),
        (["--tasks", "long", "--hardware", "24gb-64gb"], 2, "goes with --dry-run"),
        (["--tasks", "lnog"], 2, "no task 'lnog'; did you mean long"),
        (["--tasks", "long", "--text", "long=pyproject.toml"], 2, "a text and a task are called"),
        (["--tasks", "long", "--chat-template", "-c", "4"], 2, "--context"),
        (["--tasks", "long", "--task-folder", "nowhere"], 2, "nowhere is not a folder"),
        (["--text", "none.txt"], 2, "cannot read none.txt"),
    ],
)
def test_mistakes_are_one_sentence(
    run: Any, random_model: Path, monkeypatch: pytest.MonkeyPatch,
    options: list[str], code: int, words: str,
) -> None:  # fmt: skip
    files = TaskIndex._iter_yaml_files
    ours = staticmethod(lambda root: files(root) if "lm_eval" not in str(root) else ())
    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", ours)  # its own tasks take ten seconds
    result = run(random_model, *options)
    error = result.exception
    text = str(error) if not isinstance(error, SystemExit) else result.stderr
    assert words in " ".join(text.replace("│", " ").split())
    assert getattr(error, "exit_code", result.exit_code) == code


def test_a_missing_extra_is_named(
    run: Any, random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "dots1-local[eval]" in str(run(random_model, "--tasks", "long").exception)


def test_a_damaged_file_of_answers_is_one_sentence(
    run: Any, random_model: Path, tmp_path: Path
) -> None:
    options = ["--tasks", "continued", "--limit", 1, "--answers", tmp_path]
    assert run(random_model, *options).exit_code == 0
    [path] = tmp_path.glob("*.answers")
    path.write_bytes(b"not a database" * 100)
    assert path.name in str(run(random_model, *options).exception)
