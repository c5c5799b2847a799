"""The options of `dots1 convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dots1_local.cli._options import (
    CHECKPOINT,
    HUB_PANEL,
    Json,
    Revision,
    Threads,
    argument,
    flag,
    option,
    text_file,
)

__all__ = ["ConvertOptions"]

_TYPES = "Types"
_BUDGET = "Types under a budget, by what dots1 calibrate measured"
_MACHINE = "Types for a machine, by what dots1 calibrate and dots1 hardware measured"
_REFINEMENT = "Refinement"


@dataclass(frozen=True, eq=False, repr=False)
class ConvertOptions:
    checkpoint: str = argument(CHECKPOINT)
    output: Path | None = option("Write this GGUF file. Optional with --dry-run.", "--output", "-o")
    type_: str | None = option(
        "Use DQ2 to DQ6 (dynamic: routed experts in few bits, the rest in more), or a "
        "stock mix of llama-quantize: Q4_K_M, IQ2_XXS, BF16, ...",
        "--type",
        default="DQ4",
        panel=_TYPES,
    )
    tensor_type: list[str] | None = option(
        "Store the tensors whose names match in this type; repeatable.",
        metavar="REGEX=TYPE",
        panel=_TYPES,
    )
    imatrix: Path | None = option(
        "Use this importance file of llama-imatrix (GGUF or .dat).", panel=_TYPES
    )
    pad_experts: Literal["auto", "on", "off"] = option(
        "Zero-pad the width of experts to a multiple of 256, so that every type fits.",
        value="auto",
        panel=_TYPES,
    )
    encoder: Literal["ggml", "fast"] = option(
        "Encode the IQ types with importance by ggml, or by our encoder, which has less "
        "weighted error.",
        value="ggml",
        panel=_TYPES,
    )
    plan: Path | None = option(
        "Take every type from this file, which --dry-run --json wrote.", panel=_TYPES
    )
    calibration: str | None = option(
        "Use this folder, which dots1 calibrate wrote, or organisation/model on the hub, where "
        "such a folder is published. Without a budget, its importance file is used and the KL "
        "divergence is predicted.",
        metavar="DIR",
        panel=_BUDGET,
    )
    size: str | None = option(
        "Choose types for a file of at most SIZE, such as 48GB.", metavar="SIZE", panel=_BUDGET
    )
    bpw: float | None = option(
        "Choose types for at most this many bits per weight.", metavar="BITS", panel=_BUDGET
    )
    max_kld: float | None = option(
        "Choose types for the smallest file whose predicted KL divergence is at most this.",
        metavar="NATS",
        panel=_BUDGET,
    )
    fit_memory: str | None = option(
        "Choose types to fit '24GB gpu + 64GB ram', or a machine that dots1 plan --hardware takes.",
        metavar="MEMORY",
        panel=_BUDGET,
    )
    one_layout: bool = flag(
        "Store each matrix of the experts (gate, up, down) in one type in all layers; llama.cpp's "
        "expert cache is shared by layers of equal types only.",
        "--one-layout",
        panel=_BUDGET,
    )
    for_: str | None = option(
        "Choose types for quality and speed on this machine: 'this', or a description that "
        "dots1 plan --hardware takes. Without a target, take the knee of the front. The "
        "placement is stored beside the file, and chat and serve use it.",
        "--for",
        metavar="MACHINE",
        panel=_MACHINE,
    )
    tok_s: float | None = option(
        "With --for: the least KL divergence that decodes this fast after a long prompt.",
        metavar="TOK_S",
        panel=_MACHINE,
    )
    front: Path | None = option(
        "With --for and no target: draw the front to this SVG file.", metavar="FILE", panel=_MACHINE
    )
    context: str | None = option(
        "With --for or --fit-memory: leave room for this context, such as 32k.",
        metavar="TOKENS",
        default="16k, or what the model was trained for",
        panel=_MACHINE,
    )
    kv_type: str | None = option(
        "With --for or --fit-memory: keep the KV cache in this type.",
        metavar="TYPE",
        default="f16, or what dots1 plan takes",
        panel=_MACHINE,
    )
    refine: bool = flag(
        "Choose codes and scales whose errors cancel for the inputs of a calibration text: the "
        "same bytes have about half the KL divergence, in hours instead of minutes.",
        "--refine",
        panel=_REFINEMENT,
    )
    file: list[Path] | None = option(
        "With --refine: calibrate on this text first, into OUTPUT.calibration; - is what is piped "
        "in; repeatable.",
        "--file",
        "-f",
        parser=text_file,
        metavar="FILE",
        panel=_REFINEMENT,
    )
    chat: list[Path] | None = option(
        "With --refine: calibrate on these conversations, as dots1 calibrate does; repeatable.",
        metavar="FILE.jsonl",
        panel=_REFINEMENT,
    )
    device: str | None = option(
        "With --refine: compute the layers on this torch device.",
        default="a GPU if there is one",
        panel=_REFINEMENT,
    )
    precision: Literal["F32", "BF16"] = option(
        "With --refine: multiply the layers' matrices in this type.",
        value="F32",
        panel=_REFINEMENT,
    )
    split_max_size: str | None = option(
        "Write shards of at most SIZE, such as 48G.", metavar="SIZE"
    )
    revision: Revision = None
    low_disk: bool = flag(
        "Fetch, convert and delete one shard after another: the disk needs room for the "
        "GGUF file and a few shards.",
        "--low-disk",
        panel=HUB_PANEL,
    )
    threads: Threads = None
    dry_run: bool = flag("Print types and sizes, and write nothing.", "--dry-run")
    tensors: bool = flag("With --dry-run: print a row for every tensor.", "--tensors")
    force: bool = flag("Replace an existing file.", "--force")
    json: Json = False
