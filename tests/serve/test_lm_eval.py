"""The real lm-evaluation-harness on a real server, beside transformers on the checkpoint."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Dots1ForCausalLM
from typer.testing import CliRunner

from dots1_local.cli import app
from dots1_local.evaluate.perplexity import perplexity
from tests.conftest import Converted
from tests.serve.served import Served
from tests.serve.transformers_scores import log_likelihood

# Questions whose endings differ in length, with special tokens and other scripts.
QUESTIONS = [
    ("The little cat sat on the", ["mat.", "moon and sang a song.", "xyzzy", "tree"]),
    ("Once upon a time there was a", ["girl named Lily.", "potato", "dog", "boy who liked to run"]),
    ("<|userprompt|>Hello<|endofuserprompt|><|response|>Hi,", ["there!", "猫がいます。", "no"]),
    ("Tom was sad. He", ["was not happy.", "ate the sun", "cried."]),
]
STORIES = [
    "One day, a little girl named Lily went to the park. She saw a big dog.",
    "Tom had a red ball. 他很高兴。 He threw it to his friend.\n\nThey played all day.",
]


def task(folder: Path, name: str, rows: Sequence[Any], **config: Any) -> dict[str, Any]:
    """A task whose documents are in a local file."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        **config,
    }


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tasks")
    questions = [{"question": q, "endings": e, "label": 0} for q, e in QUESTIONS]
    stories = [{"text": text} for text in STORIES]
    return [
        task(
            folder,
            "endings",
            questions,
            output_type="multiple_choice",
            doc_to_text="{{question}}",
            doc_to_choice="{{endings}}",
            doc_to_target="label",
            metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        ),
        task(
            folder,
            "stories",
            stories,
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "word_perplexity"}],
        ),
        task(
            folder,
            "continued",
            questions[:2],
            output_type="generate_until",
            doc_to_text="{{question}}",
            doc_to_target="{{endings[0]}}",
            generation_kwargs={"until": ["\\n\\n"], "max_gen_toks": 12},
            metric_list=[{"metric": "exact_match"}],
        ),
    ]


@pytest.fixture(scope="module")
def exact(converted: Converted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan whose attention is as exact as transformers': flash attention computes in F16."""
    plan = tmp_path_factory.mktemp("plan") / "plan.json"
    options = ["--kv", "F32", "--parallel", "3", "--context", "512", "--json"]
    found = CliRunner().invoke(app, ["plan", str(converted("F32")), *options]).stdout
    plan.write_text(json.dumps(json.loads(found) | {"flash_attention": False}))
    return plan


@pytest.fixture(scope="module")
def served(converted: Converted, exact: Path) -> Iterator[Served]:
    with Served(converted("F32"), "--plan", str(exact)) as server:
        yield server


@pytest.fixture(scope="module")
def model(tiny: Path) -> Dots1ForCausalLM:
    return Dots1ForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def run(served: Served, tasks: list[dict[str, Any]], **options: Any) -> Any:
    arguments = {
        "base_url": f"{served.url}/completions",
        "model": "dots1",
        "max_length": 512,
        "num_concurrent": 2,
        **options,
    }
    return lm_eval.simple_evaluate(
        model="local-completions", model_args=arguments, tasks=tasks, bootstrap_iters=0
    )


def ask(served: Served, path: str, **body: Any) -> Any:
    connection = served.connect()
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return json.loads(connection.getresponse().read())


@pytest.fixture(scope="module")
def found(served: Served, tasks: list[dict[str, Any]]) -> Any:
    return run(served, tasks)


def totals(found: Any) -> list[float]:
    """The log-likelihoods of all endings."""
    samples = found["samples"]["endings"]
    return [float(total) for sample in samples for [(total, _)] in sample["resps"]]


def test_scores_equal_those_of_transformers(
    found: Any, model: Dots1ForCausalLM, tokenize: Callable[[str], list[int]]
) -> None:
    right = []
    for sample, (question, endings) in zip(found["samples"]["endings"], QUESTIONS, strict=True):
        sums = []
        before = tokenize(question)
        for ending, [(total, greedy)] in zip(endings, sample["resps"], strict=True):
            after = tokenize(f"{question} {ending}")[len(before) :]
            expected, is_greedy = log_likelihood(model, before, after)
            assert float(total) == pytest.approx(expected, abs=1e-3)
            assert (str(greedy) == "True") == is_greedy
            sums.append(expected)
        right.append(int(np.argmax(sums)) == 0)
    assert found["results"]["endings"]["acc,none"] == np.mean(right)

    start = tokenize("<|endofresponse|>")
    assert len(start) == 1
    for sample, story in zip(found["samples"]["stories"], STORIES, strict=True):
        expected, _ = log_likelihood(model, start, tokenize(story))
        assert float(sample["resps"][0][0]) == pytest.approx(expected, abs=1e-3)

    for sample, (question, _) in zip(found["samples"]["continued"], QUESTIONS, strict=False):
        tokens = torch.tensor([tokenize(question)])
        with torch.inference_mode():
            answer = model.generate(tokens, max_new_tokens=12, do_sample=False)[
                0, tokens.shape[1] :
            ]
        written = AutoTokenizer.from_pretrained(model.name_or_path).decode(answer)
        assert sample["resps"][0][0] == written.partition("\n\n")[0]


@pytest.mark.parametrize(
    "options", [{"num_concurrent": 1, "batch_size": 3}, {"tokenized_requests": False}]
)
def test_batches_and_texts_score_the_same(
    served: Served, tasks: list[dict[str, Any]], found: Any, options: dict[str, Any]
) -> None:
    assert totals(run(served, tasks[:1], **options)) == pytest.approx(totals(found), abs=1e-3)


def test_the_harness_for_gguf_servers_scores_too(
    served: Served, tasks: list[dict[str, Any]], found: Any
) -> None:
    arguments = {"base_url": served.url.removesuffix("/v1")}
    other = lm_eval.simple_evaluate(
        model="gguf", model_args=arguments, tasks=tasks[:1], bootstrap_iters=0
    )
    assert totals(other) == pytest.approx(totals(found), abs=1e-3)


def test_a_text_has_the_perplexity_of_dots1_perplexity(
    served: Served, converted: Converted, exact: Path, tiny: Path
) -> None:
    text = (tiny / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    path = converted("F32")
    expected = perplexity(path, text, n_ctx=256, n_chunks=2, placement=exact)
    reply = ask(served, "/tokenize", prompt=text)
    chunks = [reply["tokens"][:256], reply["tokens"][256:512]]
    answer = ask(served, "/v1/completions", prompt=chunks, max_tokens=0, echo=True, logprobs=0)
    scores = [choice["logprobs"]["token_logprobs"][129:] for choice in answer["choices"]]
    mean = -np.mean(scores)
    assert mean == pytest.approx(math.log(expected.value), abs=1e-5)
