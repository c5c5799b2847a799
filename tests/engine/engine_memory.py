"""What the engine allocates on each device for a placement, read from its log."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as llama

from dots1_local.devices import backends
from dots1_local.engine.model_params import model_params
from dots1_local.files.gguf import GGUFFile
from dots1_local.ggml import quant_type
from dots1_local.placement.placement import Placement

__all__ = ["Decisions", "Sizes", "placement_for", "taken"]

Decisions = dict[str, Any]  # fields of a placement, which cannot be sent to a child itself
Sizes = tuple[int, ...]  # of one device: weights, KV cache and compute buffer

_MIB = 2**20


def placement_for(path: Path, decisions: Decisions) -> Placement:
    """A placement with everything in RAM, unless `decisions` say otherwise."""
    gguf = GGUFFile.open(path)
    blocks = gguf.keys["dots1.block_count"]
    assert isinstance(blocks, int)
    chosen = {key: value for key, value in decisions.items() if not key.startswith("n_")}
    chosen["overrides"] = tuple(chosen.get("overrides", ()))
    placement = Placement(
        model=path.name,
        model_bytes=gguf.nbytes,
        blocks=blocks,
        context=512,
        kv_type="F16",
        flash_attention=True,
        ubatch=512,
        threads=1,
        host_memory="plain",
    )
    return replace(placement, **chosen)


def taken(
    workers: Sequence[str], path: Path, decisions: Decisions, no_alloc: bool = True
) -> dict[str, Sizes]:
    """The sizes that the engine logs for each device; without `no_alloc` it loads the file."""
    devices = {
        backends.add_worker(each)[0].description: f"RPC{i}" for i, each in enumerate(workers)
    }
    lines: list[str] = []
    keep = llama.llama_log_callback(lambda _, text, __: lines.append(text.decode()))
    llama.llama_log_set(keep, None)
    params = model_params(placement_for(path, decisions))
    params.no_alloc, params.load_mode = no_alloc, 0
    model = llama.llama_model_load_from_file(bytes(path), params)
    context = llama.llama_init_from_model(model, _context_params(decisions))
    assert context, "".join(lines)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return _sizes("".join(lines), devices)


def _context_params(decisions: Decisions) -> Any:
    params = llama.llama_context_default_params()
    params.kv_unified = "sequences" in decisions  # which share a KV cache then
    sequences = decisions.get("sequences", decisions.get("n_sequences", 1))
    params.n_seq_max, params.n_ctx = sequences, sequences * decisions["context"]
    params.n_batch = params.n_ubatch = decisions.get("ubatch", 512)
    params.n_outputs_max = decisions.get("n_outputs", sequences)
    params.flash_attn_type = decisions.get("flash_attention", True)
    params.type_k = params.type_v = quant_type(decisions.get("kv_type", "F16")).ggml
    params.n_threads = params.n_threads_batch = 1
    return params


def _sizes(log: str, devices: Mapping[str, str]) -> dict[str, Sizes]:
    found = {
        name: dict.fromkeys(("model", "KV", "compute"), 0) for name in ("CPU", *devices.values())
    }
    for buffer, what, size in re.findall(r"(\S+) (model|KV|compute) buffer size = +([\d.]+)", log):
        # As RPC0[HOST:PORT] every worker has its first device.
        endpoint = re.fullmatch(r"RPC0\[(.+)\]", buffer)
        found[devices[endpoint[1]] if endpoint else buffer][what] += round(float(size) * _MIB)
    return {name: tuple(sizes.values()) for name, sizes in found.items()}
