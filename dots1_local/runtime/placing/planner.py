"""Deciding where a model lives and how it is run, on a machine that may be elsewhere."""

from dots1_local.errors import UsageError
from dots1_local.gguf_file import GGUFFile
from dots1_local.runtime.devices.hardware import Hardware
from dots1_local.runtime.placing.candidates import Search
from dots1_local.runtime.placing.placement import KV_TYPES, MAX_CONTEXT, Placement, check_context
from dots1_local.runtime.placing.room import limited, unattended
from dots1_local.runtime.placing.steps import Graph

__all__ = ["place"]

_USUAL_CONTEXT, _USUAL_SHARE = 16_384, 4096


def place(
    gguf: GGUFFile,
    hardware: Hardware,
    *,
    context: int | None = None,
    sequences: int = 1,
    kv_type: str | None = None,
    vram: int | None = None,
    ram: int | None = None,
    threads: int | None = None,
    margin: int | None = None,
) -> Placement:
    """The placement of a model on a machine; where it does not fit, one that reads the file.

    So many `sequences` of `context` tokens each share the KV cache. That is by default 16,384
    tokens for all of them, but 4,096 for each, or what the model was trained for. `kv_type` is by
    default F16 if all of the KV cache then fits the GPUs, or fits RAM where there are none, and
    Q8_0 else: precision is not lowered to have a few more experts on a GPU. `vram` and `ram` are
    bytes to plan with in place of what is free; `margin` bytes are left free on each GPU.

    Raises:
        GGUFError: no dots1 model, or one that lacks numbers or tensors.
        UsageError: no such KV type, or none that the GPUs can do; a context that is no context, or
            so many that llama.cpp cannot count them.
    """
    if kv_type is not None and kv_type.upper() not in KV_TYPES:
        raise UsageError(f"no KV cache is kept in {kv_type}; there are {', '.join(KV_TYPES)}")
    if context is not None and not 0 < context <= MAX_CONTEXT:
        raise UsageError(f"a context has 1 to {MAX_CONTEXT:,} tokens, not {context:,}")
    check_context(context or 1, sequences)
    graph, machine = Graph.read(gguf), limited(hardware, vram=vram, ram=ram)
    usual = max(_USUAL_CONTEXT // sequences, _USUAL_SHARE)
    tokens = context or min(usual, graph.config.max_position_embeddings)
    search = Search(graph, machine, tokens, threads or machine.cores, margin, sequences)
    if kv_type is not None:
        placement = search.best(kv_type.upper()).placement
        if unable := unattended(machine, placement):
            raise UsageError(unable)
        return placement
    if not search.keeps_kv("F16"):
        return search.best("Q8_0").placement
    precise = search.best("F16")
    return (search.best("Q8_0") if precise.short > 0 else precise).placement
