"""The smallest checkpoints that still have every kind of tensor, and ways to break them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.make_wide import published_config, write_checkpoint

__all__ = ["edit_header", "edit_json", "micro_checkpoint", "micro_config"]


def micro_config(**changes: Any) -> dict[str, Any]:
    """A published config.json with 1 dense and 1 MoE layer of a few thousand weights."""
    return published_config(
        **{
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "vocab_size": 288,
        }
        | changes
    )


def micro_checkpoint(folder: Path, shards: int = 1, seed: int = 0, **changes: Any) -> Path:
    """Write one into `folder`."""
    return write_checkpoint(folder, micro_config(**changes), shards, seed=seed)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Let `edit` change the object in a JSON file."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Let `edit` change a safetensors header; the data stays as it is."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
