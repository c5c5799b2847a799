"""Models, checkpoints and calibrations that trials share; they are made when they are asked for."""

import tempfile
from functools import cache
from pathlib import Path
from threading import RLock

from benchmarks.campaign.processes import Place, Program
from benchmarks.campaign.trial import Broken
from tests.micro import micro_checkpoint
from tests.verify.patch import rewrite

__all__ = [
    "TEXT", "TINY", "calibrated", "inputs", "micro", "micro_q8", "mini", "mini_q8", "one_at_a_time",
    "q8", "split", "text", "wrong",
]  # fmt: skip

TINY = Path(__file__).parents[2] / "examples" / "dots1-tiny"
TEXT = (TINY / "heldout.txt").read_text(encoding="utf-8")[:6000]
one_at_a_time = RLock()


@cache
def inputs() -> Path:
    """A folder of inputs that trials share; it is removed in the end."""
    _kept.append(tempfile.TemporaryDirectory(prefix="dots1-kills-"))
    return Path(_kept[0].name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _made(name: str, *arguments: str) -> Path:
    """A file or folder of the shared inputs that `dots1` makes."""
    with one_at_a_time:
        path, place = inputs() / "made" / "work" / name, Place(inputs() / "made")
        if not path.exists() and Program(place, arguments).wait():
            raise Broken(f"{name} cannot be made: {place.said()}")
        return path


def q8() -> Path:
    """The example in Q8_0."""
    return _made("q8.gguf", "convert", str(TINY), "-o", "q8.gguf", "--type", "Q8_0")


def split() -> Path:
    """`mini` in Q8_0, in shards: the first one."""
    options = ("--type", "Q8_0", "--split-max-size", "1M")
    name = "split-00001-of-00004.gguf"
    return _made(name, "convert", str(mini()), "-o", "split.gguf", *options)


def micro() -> Path:
    """A random checkpoint of two tiny layers, in two shards."""
    with one_at_a_time:
        path = inputs() / "micro"
        if not path.exists():
            micro_checkpoint(path, shards=2)
        return path


def mini() -> Path:
    """A random checkpoint of three layers and 7 MB, in three shards."""
    with one_at_a_time:
        path = inputs() / "mini"
        if not path.exists():
            micro_checkpoint(
                path, shards=3, hidden_size=256, num_hidden_layers=3, intermediate_size=512,
                moe_intermediate_size=128, n_routed_experts=8,
            )  # fmt: skip
        return path


def mini_q8() -> Path:
    """`mini` in Q8_0."""
    return _made("mini.gguf", "convert", str(mini()), "-o", "mini.gguf", "--type", "Q8_0")


def micro_q8() -> Path:
    """`micro` in Q8_0."""
    return _made("micro.gguf", "convert", str(micro()), "-o", "micro.gguf", "--type", "Q8_0")


def calibrated() -> Path:
    """The calibration of `micro`, for refinement."""
    options = ("-f", str(text()), "-c", "64", "--chunks", "4", "--refine", "-t", "1")
    made = ("calibrate", str(micro()), "-o", "calibrated", *options)
    return _made("calibrated/calibration.json", *made).parent


def text() -> Path:
    """A text of the example's domain, of 6,000 characters."""
    path = inputs() / "text.txt"
    if not path.exists():
        path.write_text(TEXT, encoding="utf-8")
    return path


def wrong(source: Path) -> Path:
    """A copy of a GGUF that `verify --fix` has something to do with."""
    with one_at_a_time:
        path = inputs() / f"wrong-{source.name}"
        if not path.exists():
            rewrite(source, path, remove=["dots1.expert_gating_func"])
        return path
