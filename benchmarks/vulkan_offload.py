"""Placements on a Vulkan device: bytes as predicted, logits as on the CPU, errors in one sentence.

    benchmarks/vulkan_offload.sh [OUT] [--only NAME]...

The trained example is run in one placement after the other, each in a process of its own, on the
device Vulkan0 and on the CPU. OUT/table.md has a row for each placement: the bytes that were
predicted and that the engine allocated, and how far the logits are from those of the CPU with the
same file. Exit code 1 says that a row broke a bound. `benchmarks/vulkan_offload.sh` makes the
device and the engine that this needs.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import vulkan_case
from dots1_local.convert import convert_checkpoint
from dots1_local.devices import child
from dots1_local.devices.hardware import CPU
from dots1_local.errors import Dots1Error
from dots1_local.placement.llama_args import gpu_weight_overrides
from dots1_local.placement.placement import MIN_BATCH, HostMemory, Placement
from tests.workers import Program, free_port

_EXAMPLE = Path("examples/dots1-tiny")
_BLOCKS, _CONTEXT = 5, 512
_AT_ONCE = 4  # tokens; for more, Vulkan's kernels are larger, and take minutes each to compile
_ONE, _TWO = "Vulkan0", "Vulkan1"
_ALL = {_ONE: _BLOCKS + 1}
_EXPERTS = (("_exps", CPU),)
_NEVER = 1 << 20  # tokens of a ubatch that would fetch weights
# Bounds on the difference to the CPU. The CPU's kernels round activations to 8 bits before they
# multiply quantised weights, and Vulkan's do not; with F16 weights neither does.
_BOUNDS = {"DQ4": 3e-3, "F16": 1e-5}  # mean KL divergence
_COLUMNS = ("placement", "weights, MB", "KV, MB", "compute, MB", "KL divergence", "same token")
_TOO_LITTLE, _TOO_MUCH = 100_000, 2_500_000  # bytes that a prediction may be off by


@dataclass(frozen=True)
class Case:
    """A placement by its decisions, and what else its process gets.

    `at_once` tokens are computed together, whatever the ubatch is that memory is reserved for.
    `fails` is part of the error that is expected. Logits that are not `repeatable` are shown, but
    not held to a bound.
    """

    name: str
    decisions: Mapping[str, Any]
    recipe: str = "DQ4"
    environment: Mapping[str, str] = field(default_factory=dict)
    at_once: int = _AT_ONCE
    worker: str = ""  # "serves": the device is a worker's; "dies": which is killed
    fails: str = ""
    repeatable: bool = True


def cases() -> Iterator[Case]:
    """All cases; the CPU's, with which others are compared, come first."""
    for recipe in _BOUNDS:
        yield Case(f"CPU, {recipe}", {}, recipe)
        yield Case(f"all layers, {recipe}", {"layers": _ALL}, recipe)
    yield Case("all layers, KV in Q8_0", {"layers": _ALL, "kv_type": "Q8_0"})
    plain = {"layers": _ALL, "flash_attention": False}
    yield Case("all layers, no flash attention", plain)
    kinds: tuple[HostMemory, ...] = ("plain", "pinned", "mapped", "repacked")
    decisions: dict[str, Any]
    for kind in kinds:
        decisions = {"layers": _ALL, "overrides": _EXPERTS, "host_memory": kind}
        yield Case(f"routed experts in RAM, {kind}", decisions)
    for name, batch in (("never", _NEVER), ("always", 1)):
        decisions = {"layers": _ALL, "overrides": _EXPERTS, "host_memory": "pinned"}
        decisions = {**decisions, "offload_min_batch": batch}
        yield Case(f"routed experts in RAM, fetched {name}", decisions)
    yield Case("the last 3 layers", {"layers": {_ONE: 3}})
    first = (*((rf"blk\.{n}\.", CPU) for n in range(2, _BLOCKS)), ("output", CPU))
    yield Case("weights of the first 2 layers", {"layers": _ALL, "overrides": first})
    ours = tuple(gpu_weight_overrides(dict.fromkeys(range(_BLOCKS), _ONE)))
    yield Case("KV in RAM", {"overrides": ours})
    single = ((r"blk\.3\.ffn_down_exps", _ONE), (r"blk\.1\.ffn_up", _ONE))
    yield Case("single matrices on it", {"overrides": single})
    yield Case(
        "a single matrix in RAM", {"layers": _ALL, "overrides": ((r"blk\.2\.ffn_gate_exps", CPU),)}
    )
    two = {"GGML_VK_VISIBLE_DEVICES": "0,0"}
    yield Case("two devices", {"layers": {_ONE: 3, _TWO: 3}}, environment=two)
    split = {"layers": _ALL, "overrides": (("_exps", _TWO),)}
    yield Case("routed experts on a second device", split, environment=two)
    remote = {"layers": {"RPC0": _BLOCKS + 1}}
    yield Case("a worker that has the device", remote, worker="serves")
    yield Case("a worker that is killed", remote, worker="dies", fails="worker was lost")
    yield Case("CPU, 92 tokens at once", {}, at_once=92)
    # lavapipe's results of the kernels for many tokens differ from run to run, and are NaN in some.
    yield Case("all layers, 92 tokens at once", {"layers": _ALL}, at_once=92, repeatable=False)
    yield Case(
        "out of memory",
        {"layers": _ALL},
        environment={"GGML_VK_FORCE_MAX_BUFFER_SIZE": "5000000"},  # less than the weights take
        fails=f"{_ONE} ran out of memory",
    )
    yield Case(
        "the device vanished",
        {"layers": _ALL},
        environment={"GGML_VK_VISIBLE_DEVICES": ""},
        fails=f"no device {_ONE}",
    )


def main() -> None:
    """Run the cases that the command line asks for, and print the table."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [each for each in cases() if not each.decisions or _wanted(each, args.only)]
    results: dict[str, Any] = {}
    for case in chosen:
        print(case.name, file=sys.stderr)
        results[case.name] = _run(case, args.out)
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "table.md").write_text(_table(results))
    print((args.out / "table.md").read_text())
    if broken := [name for name, each in results.items() if each["wrong"]]:
        sys.exit(f"wrong: {', '.join(broken)}")


def _wanted(case: Case, only: list[str]) -> bool:
    return not only or any(text in case.name for text in only)


def _run(case: Case, out: Path) -> dict[str, Any]:
    """What a case comes to: `bytes` of devices, distances of logits, the error, what is `wrong`."""
    model = out / f"{case.recipe}.gguf"
    if not model.exists():
        convert_checkpoint(_EXAMPLE, model, case.recipe)
    logits = _logits_file(out, case)
    result: dict[str, Any] = {"bytes": [], "error": "", "wrong": []}
    with _Worker(case.worker) as worker:
        request = {
            "plan": _placement(model, case, worker.endpoints).to_json(),
            "model": str(model),
            "text": str(_EXAMPLE / "heldout.txt"),
            "logits": str(logits),
            "at_once": case.at_once,
            "kills": worker.process.pid if worker.process and case.worker == "dies" else None,
        }
        environment = dict(case.environment)
        if batch := case.decisions.get("offload_min_batch"):
            environment[MIN_BATCH] = str(batch)
        devices = tuple(case.decisions.get("layers", ()))
        try:
            result |= child.ask(
                vulkan_case.__name__,
                request,
                f"running {case.name}",
                devices=devices,
                timeout=300,
                environment=environment,
            )
        except Dots1Error as error:
            result["error"] = str(error)
    if case.fails not in result["error"] or bool(case.fails) != bool(result["error"]):
        result["wrong"].append("error")
    result["wrong"] += [
        f"{each['what']} of {each['device']}"
        for each in result["bytes"]
        if not -_TOO_LITTLE <= each["predicted"] - each["real"] <= _TOO_MUCH
    ]
    if not result["error"]:
        base = _logits_file(out, next(each for each in cases() if _is_base(each, case)))
        result |= _distance(np.load(logits), np.load(base))
        if case.repeatable and not result["kld"] <= _BOUNDS[case.recipe]:
            result["wrong"].append("logits")
    return result


def _logits_file(out: Path, case: Case) -> Path:
    return out / f"{case.name.replace(' ', '_')}.npy"


def _is_base(base: Case, case: Case) -> bool:
    """Whether `base` computes the tokens of `case` on the CPU."""
    same = (base.recipe, base.at_once) == (case.recipe, case.at_once)
    return same and not base.decisions


def _placement(model: Path, case: Case, workers: tuple[str, ...]) -> Placement:
    return replace(
        Placement(
            model=model.name,
            model_bytes=model.stat().st_size,
            blocks=_BLOCKS,
            context=_CONTEXT,
            kv_type="F16",
            flash_attention=True,
            ubatch=512,
            threads=os.cpu_count() or 1,
            host_memory="plain",
            workers=workers,
        ),
        **case.decisions,
    )


class _Worker:
    """A worker that serves the device, if a case wants one, as long as the block lasts."""

    def __init__(self, wanted: str) -> None:
        self.endpoints: tuple[str, ...] = ()
        self._program: Program | None = None
        if wanted:
            self.endpoints = (f"127.0.0.1:{free_port()}",)
            request = {
                "endpoint": self.endpoints[0],
                "threads": 1,
                "devices": [_ONE],
                "cache": None,
            }
            self._program = Program("-m", "dots1_local.devices.worker", json.dumps(request))
            self._program.wait_for("listening")

    @property
    def process(self) -> Any:
        return self._program and self._program.process

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._program:
            self._program.__exit__()


def _distance(found: NDArray[np.float32], base: NDArray[np.float32]) -> dict[str, float]:
    """Mean KL divergence, the largest difference of a logit, and the share of equal choices."""
    p, q = (_log_softmax(each.astype(np.float64)) for each in (base, found))
    return {
        "kld": float((np.exp(p) * (p - q)).sum(1).mean()),
        "largest": float(np.abs(found - base).max()),
        "equal": float((found.argmax(1) == base.argmax(1)).mean()),
    }


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = x - x.max(1, keepdims=True)
    logs: NDArray[np.float64] = x - np.log(np.exp(x).sum(1, keepdims=True))
    return logs


def _table(results: Mapping[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for name, result in results.items():
        if name.startswith(CPU):
            continue
        if result["error"]:
            rows.append((name, result["error"].replace("|", r"\|"), "", "", "", ""))
            continue
        sizes = (_sizes(result, what) for what in ("weights", "kv", "compute"))
        rows.append((name, *sizes, f"{result['kld']:.1e}", f"{result['equal']:.1%}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _sizes(result: Mapping[str, Any], what: str) -> str:
    """Predicted → allocated bytes of each device but the CPU, in its order."""
    found = [each for each in result["bytes"] if each["what"] == what and each["device"] != CPU]
    return ", ".join(f"{each['predicted'] / 1e6:.2f} → {each['real'] / 1e6:.2f}" for each in found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path("build/vulkan_offload/results")
    parser.add_argument("out", type=Path, nargs="?", default=default, help="folder for the results")
    parser.add_argument(
        "--only", action="append", default=[], help="run the cases whose names contain this"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
