"""Inputs that would silently become a wrong file."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dots1_local.convert import Conversion
from dots1_local.errors import Dots1Error
from dots1_local.evaluate.texts import open_vocabulary
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.quant.plan import QuantPlan
from tests.micro import edit_json, micro_checkpoint

SHARD = "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return micro_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize("recipe", ["Q8_0", "Q4_0", "F16"])
def test_weights_too_large_for_the_type(checkpoint: Path, tmp_path: Path, recipe: str) -> None:
    weights = load_file(checkpoint / SHARD)
    weights["model.layers.0.self_attn.q_proj.weight"][3, 5] = 1e30
    save_file(weights, checkpoint / SHARD)
    with pytest.raises(Dots1Error, match=rf"layers\.0\.self_attn\.q_proj\.weight .*{recipe}"):
        Conversion.prepare(checkpoint, recipe).run(tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_tensors_that_the_model_has_no_place_for(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(Dots1Error, match=r"model\.layers\.1\."):
        Conversion.prepare(checkpoint)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("config.json", {"norm_topk_prob": "false"}, "norm_topk_prob"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id 'x'"),
        ("generation_config.json", {"eos_token_id": [99999]}, "token 99999"),
    ],
)
def test_configs_with_values_of_another_type(
    checkpoint: Path, file: str, changes: dict[str, object], says: str
) -> None:
    edit_json(checkpoint / file, lambda config: config.update(changes))
    with pytest.raises(Dots1Error, match=says):
        Conversion.prepare(checkpoint)


def test_merges_that_join_no_token(checkpoint: Path) -> None:
    edit_json(checkpoint / "tokenizer.json", lambda t: t["model"].update(merges=["a"]))
    with pytest.raises(Dots1Error, match=r"tokenizer\.json.*model\.merges"):
        Conversion.prepare(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["types"].update({"output_norm.weight": "Q8_0"}),
        lambda plan: plan["types"].update({"blk.1.ffn_gate_inp.weight": "Q8_0"}),
        lambda plan: plan.update(expert_width=1_000_000),
        lambda plan: plan.update(expert_width=-64),
        lambda plan: plan.update(file_type=-5),
    ],
)
def test_plans_that_no_engine_could_load(checkpoint: Path, change) -> None:  # type: ignore[no-untyped-def]
    plan = json.loads(Conversion.prepare(checkpoint, "Q8_0").plan.to_json())
    change(plan)
    with pytest.raises(Dots1Error):
        Conversion.prepare(checkpoint, QuantPlan.from_json(json.dumps(plan)))


def test_links_and_devices_are_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    link, target = tmp_path / "link.gguf", tmp_path / "target.gguf"
    link.symlink_to(target)
    Conversion.prepare(checkpoint, "Q8_0").run(link)
    assert link.is_symlink()
    assert target.is_file()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Dots1Error, match="regular file"):
        Conversion.prepare(checkpoint, "Q8_0").run(tmp_path / "pipe", force=True)
    for name in ("", "x" * 300):
        with pytest.raises(Dots1Error):
            Conversion.prepare(checkpoint, "Q8_0").run(name, force=True)


def test_working_files_of_another_split_are_cleared(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    weights = load_file(checkpoint / SHARD)
    damaged = {name: value.clone() for name, value in weights.items()}
    damaged["lm_head.weight"][0, 0] = np.nan
    save_file(damaged, checkpoint / SHARD)
    with pytest.raises(Dots1Error, match="NaN"):
        Conversion.prepare(checkpoint, "Q8_0").run(output)
    assert (tmp_path / "out.gguf.partial").exists()
    save_file(weights, checkpoint / SHARD)
    result = Conversion.prepare(checkpoint, "Q8_0").run(output, split_max_size=20_000)
    assert sorted(tmp_path.glob("out*")) == sorted(result.paths)


def test_shards_of_a_run_killed_while_publishing_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    conversion = Conversion.prepare(checkpoint, "Q8_0")
    whole = conversion.run(tmp_path / "whole.gguf", split_max_size=20_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pathlib.Path.unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            conversion.run(output, split_max_size=20_000)
    unpublish_last(tmp_path, len(whole.paths))
    result = conversion.run(output, split_max_size=20_000)
    assert result.resumed_tensors == len(conversion.tensors)
    assert [p.read_bytes() for p in result.paths] == [p.read_bytes() for p in whole.paths]
    assert sorted(tmp_path.glob("out*")) == sorted(result.paths)


def test_a_file_of_somebody_else_is_not_taken_for_that_of_a_killed_run(
    checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.gguf"
    conversion = Conversion.prepare(checkpoint, "Q8_0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pathlib.Path.unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            conversion.run(output)
    output.write_bytes(b"precious")
    with pytest.raises(Dots1Error, match="--force"):
        conversion.run(output)
    assert output.read_bytes() == b"precious"


def test_no_temporary_folder_is_needed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill would leave there what a conversion keeps there."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    Conversion.prepare(checkpoint, "Q8_0").run(tmp_path / "out.gguf")
    with open_vocabulary(Checkpoint.open(checkpoint)) as vocabulary:
        assert vocabulary.tokenize("a", special=False)


def unpublish_last(folder: Path, count: int) -> None:
    """Undo the renaming of the last shard, as if the kill had come before it."""
    last = folder / f"out-{count:05}-of-{count:05}.gguf"
    last.rename(last.with_name(last.name + ".partial"))


def test_a_plan_leaves_nothing_to_choose(checkpoint: Path, tmp_path: Path) -> None:
    from dots1_local.cli import app

    (tmp_path / "plan.json").write_text(Conversion.prepare(checkpoint, "Q8_0").plan.to_json())
    arguments = ["convert", str(checkpoint), "--dry-run", "--plan", str(tmp_path / "plan.json")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert CliRunner().invoke(app, [*arguments, "--type", "Q2_K"]).exit_code == 2


def test_overrides_without_effect_are_told(checkpoint: Path) -> None:
    from dots1_local.cli import app

    arguments = ["convert", str(checkpoint), "--dry-run", "--tensor-type", "ffn_norm=F16"]
    assert "changes nothing" in CliRunner().invoke(app, arguments).stderr
