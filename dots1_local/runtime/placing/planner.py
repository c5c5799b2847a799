"""Deciding where a model lives and how it is run, on a machine that may be elsewhere."""

from dots1_local.errors import UsageError
from dots1_local.gguf_file import GGUFFile
from dots1_local.runtime.devices.hardware import Hardware
from dots1_local.runtime.placing.candidates import Search
from dots1_local.runtime.placing.placement import KV_TYPES, MAX_CONTEXT, Placement
from dots1_local.runtime.placing.room import limited, unattended
from dots1_local.runtime.placing.steps import Graph

__all__ = ["place"]

_USUAL_CONTEXT = 16_384


def place(
    gguf: GGUFFile,
    hardware: Hardware,
    *,
    context: int | None = None,
    kv_type: str | None = None,
    vram: int | None = None,
    ram: int | None = None,
    threads: int | None = None,
    margin: int | None = None,
) -> Placement:
    """The placement of a model on a machine; where it does not fit, one that reads the file.

    `context` is by default 16,384 tokens, or all that the model was trained for. `kv_type` is by
    default F16 if all of the KV cache then fits the GPUs, or fits RAM where there are none, and
    Q8_0 else: precision is not lowered to have a few more experts on a GPU. `vram` and `ram` are
    bytes to plan with in place of what is free; `margin` bytes are left free on each GPU.

    Raises:
        GGUFError: no dots1 model, or one that lacks numbers or tensors.
        UsageError: no such KV type, or none that the GPUs can do; a context that is no context.
    """
    if kv_type is not None and kv_type.upper() not in KV_TYPES:
        raise UsageError(f"no KV cache is kept in {kv_type}; there are {', '.join(KV_TYPES)}")
    if context is not None and not 0 < context <= MAX_CONTEXT:
        raise UsageError(f"a context has 1 to {MAX_CONTEXT:,} tokens, not {context:,}")
    graph, machine = Graph.read(gguf), limited(hardware, vram=vram, ram=ram)
    tokens = context or min(_USUAL_CONTEXT, graph.config.max_position_embeddings)
    search = Search(graph, machine, tokens, threads or machine.cores, margin)
    if kv_type is not None:
        placement = search.best(kv_type.upper()).placement
        if unable := unattended(machine, placement):
            raise UsageError(unable)
        return placement
    if not search.keeps_kv("F16"):
        return search.best("Q8_0").placement
    precise = search.best("F16")
    return (search.best("Q8_0") if precise.short > 0 else precise).placement
