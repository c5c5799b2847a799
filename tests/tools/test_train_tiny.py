"""The trainer of the example model: resuming, and the layout of what it writes."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from dots1_local.architecture import inventory
from dots1_local.files.checkpoint import Checkpoint
from tools import tiny_model, train_tiny
from tools.tiny_export import export
from tools.train_tiny import GEOMETRY, Data, Plan, heldout_losses, train

MICRO = replace(
    GEOMETRY, hidden_size=32, num_hidden_layers=2, head_dim=8, intermediate_size=64,
    moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, vocab_size=512,
)  # fmt: skip
PLAN = Plan(tokens=400, length=64, batch=2, epochs=0.2, chat_epochs=0.05, warmup=2,
            heldout_share=0.1, evaluate_every=4, save_seconds=0)  # fmt: skip
STORY = (
    "Once upon a time there was a {0} named Ben. Ben loved the big {1}.\n"
    'One day the {1} said, "Let us play!" They played all day. In the end the {0} went home.\n'
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    work = tmp_path_factory.mktemp("text")
    animals = [f"{size} {animal}" for size in ("little", "old") for animal in ("dog", "cat", "ox")]
    stories = [STORY.format(a, b) for a in animals for b in animals]
    (work / "stories.txt").write_text("<|endoftext|>\n".join(stories))
    (work / "english.txt").write_text("\r\n\r\n".join(f"Line {n} of a book." for n in range(200)))
    (work / "chinese.txt").write_text("\n\n".join(f"第{n}回 话说天下大势" for n in range(200)))
    files = {kind: [work / f"{kind}.txt"] for kind in ("english", "chinese", "stories")}
    return Data.read(files, PLAN, work)


class Killed(BaseException):
    """Stands for a signal."""


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, chat = data.steps(PLAN)
    assert plain >= 4
    assert chat >= 1
    whole = train(data, MICRO, PLAN, tmp_path / "whole.pt")
    assert whole.at == plain + chat

    steps = iter(range(3))

    def step_until_killed(*arguments: Any) -> float:
        if next(steps, None) is None:
            raise Killed
        return real_step(*arguments)

    real_step = tiny_model.step
    with monkeypatch.context() as patch:
        patch.setattr(train_tiny, "step", step_until_killed)
        with pytest.raises(Killed):
            train(data, MICRO, PLAN, tmp_path / "killed.pt")
    resumed = train(data, MICRO, PLAN, tmp_path / "killed.pt")

    assert resumed.curve == whole.curve
    for name, tensor in whole.model.tensors.items():
        assert torch.equal(tensor, resumed.model.tensors[name]), name


def test_nothing_held_out_is_trained_on(data: Data) -> None:
    for kind, text in data.corpus.heldout.items():
        heldout = set(filter(None, text.splitlines()))
        trained = set("\n".join(data.corpus.train[kind]).splitlines())
        assert heldout
        assert not heldout & trained
        assert "\r" not in text


def test_the_export_is_laid_out_as_published(data: Data, tmp_path: Path) -> None:
    state = train(data, MICRO, PLAN, tmp_path / "state.pt", stop_at=4)
    folder = tmp_path / "model"
    losses, counts = heldout_losses(state.model, data, PLAN)
    files = {"english": ["a.txt"]}
    run = {"name": "micro", "files": files, "plan": asdict(PLAN), "curve": state.curve}
    export(folder, state.model, data.tokenizer, data.corpus, run, losses, counts, "A text.")

    checkpoint = Checkpoint.open(folder)
    checkpoint.check(inventory(MICRO))
    assert [path.name for path in checkpoint.shards] == [
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(checkpoint.locate(n).nbytes for n in checkpoint)
    kinds = {name: checkpoint.locate(name).dtype for name in checkpoint}
    assert {name for name, kind in kinds.items() if kind != "BF16"} == {
        "model.layers.1.mlp.gate.e_score_correction_bias"
    }
    expected = state.model.tensors["model.layers.1.mlp.experts.up_proj"][3].bfloat16().float()
    ours = torch.from_numpy(checkpoint.read("model.layers.1.mlp.experts.3.up_proj.weight"))
    assert torch.equal(ours, expected)

    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "| layers | 2, the first with a dense FFN 64 wide |" in card
    assert (folder / "calibration.txt").read_text() == "A text."
    assert "| 4 | 0.00 |" in card

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in ("endofresponse", "endoftext")]
    assert checkpoint.generation_config["eos_token_id"] == ends
    assert checkpoint.raw_config["eos_token_id"] == ends[0]
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == (
        "<|system|>S<|endofsystem|><|userprompt|>U<|endofuserprompt|><|response|>"
    )
