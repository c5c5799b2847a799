"""Random dots1 GGUFs of any geometry and recipe, at the speed of the disk.

    python -m tools.make_gguf build/four.gguf --layers 4       DQ4 at the real widths: 5.6 GB
    python -m tools.make_gguf build/full.gguf --headers-only            all 62 layers, sparse
    python -m tools.make_gguf build/small.gguf --layers 8 --hidden 1024 --heads 8 \
        --dense-width 2816 --experts 32 --width 512 --vocab 4096

Use them to measure speed and memory, which do not depend on the weights' values. A few million
weights are drawn and encoded for each kind of tensor, and repeated in every layer and expert.
Routers and their biases are different in each layer, so that tokens spread evenly over experts.
`--headers-only` writes a true header and a sparse file.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gguf import GGUFWriter

from dots1_local.convert.metadata import end_tokens, write_metadata
from dots1_local.convert.output import Output, lay_out
from dots1_local.convert.tokenizer import read_tokenizer
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.partial_file import check_space, write_all
from dots1_local.quant.encode import encode
from dots1_local.quant.plan import PlannedTensor, QuantPlan
from dots1_local.quant.recipes import make_plan, recipe_names
from tools.make_tokenizer import write_tokenizer
from tools.make_wide import published_config

__all__ = ["write_gguf"]

_SLICE = 4 << 20  # weights drawn for a tensor, which the rest repeats
_DEVIATION = 0.02
# With these, a token's residual stream stays near its embedding, and biases are small compared with
# scores, so that tokens spread evenly over experts.
_DEVIATIONS = {
    "token_embd": 1.0,
    **dict.fromkeys(("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp"), 0.002),
    "exp_probs_b": 0.002,
}

_OPTIONS = {
    "layers": ("num_hidden_layers", "layers, the dense ones among them"),
    "dense": ("first_k_dense_replace", "layers with a plain FFN"),
    "hidden": ("hidden_size", "hidden size"),
    "heads": ("num_attention_heads", "attention heads; hidden / heads is the head dimension"),
    "dense-width": ("intermediate_size", "width of a plain FFN"),
    "experts": ("n_routed_experts", "routed experts of a layer"),
    "width": ("moe_intermediate_size", "width of a routed expert"),
    "top": ("num_experts_per_tok", "experts a token is routed to"),
    "shared": ("n_shared_experts", "shared experts"),
    "vocab": ("vocab_size", "vocabulary rows, 272 or more"),
}


def write_gguf(
    path: str | Path,
    config: dict[str, Any],
    recipe: str | QuantPlan = "DQ4",
    *,
    importance: bool = True,
    headers_only: bool = False,
    seed: int = 0,
) -> Path:
    """Write a model of `config` (the contents of a config.json) in the types of a recipe or plan.

    Types that need importance get the same for every column; without `importance` the recipe falls
    back to types that need none, as `dots1 convert` does without `--imatrix`.

    Raises:
        Dots1Error: the recipe or the configuration is not valid, or the disk is too small.
    """
    path, rng = Path(path), np.random.default_rng(seed)
    with TemporaryDirectory() as folder:
        output = _lay_out(path, Path(folder) / path.stem, config, recipe, importance)
    if not headers_only:
        check_space(path, output.total_bytes, [path])
    with open(path, "wb") as file:
        file.write(output.headers[0])
        file.truncate(output.total_bytes)
        if not headers_only:
            file.flush()
            _write_weights(file.fileno(), output, rng)
    return path


def _lay_out(
    path: Path, folder: Path, config: dict[str, Any], recipe: str | QuantPlan, importance: bool
) -> Output:
    """The header and the tensors' offsets; `folder` becomes a checkpoint without weights."""
    folder.mkdir()
    write_tokenizer(folder, config["vocab_size"])
    checkpoint = Checkpoint(folder, config, {})
    plan = recipe
    if not isinstance(plan, QuantPlan):
        plan = make_plan(checkpoint.config, plan, has_importance=importance)
    writer = GGUFWriter(None, "dots1")
    write_metadata(writer, checkpoint, plan, None)
    vocab_size = checkpoint.config.vocab_size
    read_tokenizer(folder, vocab_size, end_tokens(checkpoint)).write(writer)
    return lay_out(path, writer, plan.tensors(checkpoint.config), None)


def _write_weights(fd: int, output: Output, rng: np.random.Generator) -> None:
    made: dict[tuple[Any, ...], memoryview] = {}
    for slot in output.slots:
        tensor = slot.tensor
        if tensor.spec.role == "router":
            data = _encoded(tensor, rng)
        else:
            kind = (tensor.spec.part, tensor.kind.name, tensor.spec.shape)
            data = made[kind] = made.get(kind) or _encoded(tensor, rng)
        for offset, piece in _repeated(data, tensor.nbytes):
            write_all(fd, piece, slot.offset + offset)


def _encoded(tensor: PlannedTensor, rng: np.random.Generator) -> memoryview:
    """The first rows of a tensor, encoded; all rows of a small one."""
    spec = tensor.spec
    rows = min(spec.rows, max(1, _SLICE // spec.columns))
    values = rng.standard_normal((rows, spec.columns), np.float32)
    values *= _DEVIATIONS.get(spec.part, _DEVIATION)
    if spec.role == "norm":
        values += 1
    data = encode(values, tensor.kind, np.ones(spec.columns, np.float32))
    return data.reshape(-1).data


def _repeated(data: memoryview, nbytes: int) -> Iterator[tuple[int, memoryview]]:
    """Pieces that fill `nbytes`, each with its offset."""
    for offset, piece in zip(range(0, nbytes, len(data)), repeat(data), strict=False):
        yield offset, piece[: nbytes - offset]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="file to write")
    parser.add_argument("--recipe", default="DQ4", help=f"one of {', '.join(recipe_names())} [DQ4]")
    published = published_config()
    for option, (key, meaning) in _OPTIONS.items():
        default = published[key]
        what = f"{meaning} [{default}]"
        parser.add_argument(f"--{option}", type=int, default=default, dest=key, help=what)
    parser.add_argument("--seed", type=int, default=0, help="of the random weights [0]")
    parser.add_argument("--headers-only", action="store_true", help="a sparse file, no weights")
    return parser.parse_args()


def main() -> None:
    """Write the model that the command line describes."""
    args = _arguments()
    sizes = {key: getattr(args, key) for key, _ in _OPTIONS.values()}
    sizes["num_key_value_heads"] = heads = args.num_attention_heads
    if heads > 0 and args.hidden_size % (2 * heads):
        sys.exit(f"--heads {heads} leaves no even head dimension of --hidden {args.hidden_size}")
    try:
        config = published_config(**sizes)
        write_gguf(args.path, config, args.recipe, headers_only=args.headers_only, seed=args.seed)
    except (Dots1Error, ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"{args.path}: {os.path.getsize(args.path) / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
