"""The verbs of `dots1`, each as a command with its inputs, for faults and for limits of memory."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.campaign.inputs import (
    TINY,
    calibrated,
    micro,
    mini_q8,
    q8,
    text,
    wrong,
)
from tests.hub_server import NAME

__all__ = ["CASES", "Case"]

_TURNS = [
    {"role": "user", "text": "Who is Tom?"},
    {"role": "assistant", "text": "A boy."},
]


@dataclass(frozen=True)
class Case:
    """A command, and the inputs that it names.

    What it writes has the `same` bytes each time, or not. `earlier` puts what an earlier run left
    into its folder. The file `grows` must keep what it had, of which `holds` tells. It `serves`
    until it is asked to end, and before that it may be asked for answers. The argument PORT stands
    for a free port.
    """

    arguments: tuple[str, ...]
    inputs: tuple[Callable[[], Path], ...] = ()
    hub: bool = False
    same: bool = True
    earlier: Callable[[Path], None] = lambda work: None
    grows: str = ""
    holds: Callable[[Path], bool] = Path.exists
    serves: Literal["", "answers", "listens"] = ""


def _earlier_file(work: Path) -> None:
    shutil.copy(mini_q8(), work / "out.gguf")


def _earlier_turns(work: Path) -> None:
    document = {
        "format": "dots1-conversation", "version": 1, "model": "q8", "settings": {},
        "messages": _TURNS,
    }  # fmt: skip
    (work / "talk.json").write_text(json.dumps(document), encoding="utf-8")


def _has_earlier_turns(file: Path) -> bool:
    messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
    found = [{key: turn.get(key) for key in ("role", "text")} for turn in messages[:2]]
    return found == _TURNS


def _tiny() -> Path:
    return TINY


def _wrong() -> Path:
    return wrong(q8())


_Q8 = "../inputs/q8.gguf"
_TO_Q8 = ("convert", "../inputs/dots1-tiny", "-o", "out.gguf", "--type", "Q8_0", "-t", "1")
_BUDGET = ("convert", "../inputs/micro", "-o", "out.gguf", "--bpw", "6", "-t", "1",
           "--calibration", "../inputs/calibrated")  # fmt: skip
_REST = ("-t", "1", "-c", "512")
_ASK = ("chat", _Q8, "-p", "Who is Tim?", "--session", "talk.json", "-n", "8", "--temp", "0",
        "--draft", "off", *_REST)  # fmt: skip
CASES: dict[str, Case] = {
    "convert": Case(_TO_Q8, (_tiny,)),
    "convert --force": Case((*_TO_Q8, "--force"), (_tiny,), earlier=_earlier_file),
    "convert --split-max-size": Case((*_TO_Q8, "--split-max-size", "5M"), (_tiny,)),
    "convert --bpw": Case(_BUDGET, (micro, calibrated)),
    "convert --refine": Case((*_BUDGET, "--refine"), (micro, calibrated)),
    "convert from a hub": Case(("convert", NAME, "-o", "out.gguf", "--type", "Q8_0", "-t", "1"),
                               hub=True),
    "calibrate": Case(("calibrate", "../inputs/micro", "-o", "cal", "-f", "../inputs/text.txt",
                       "-c", "64", "--chunks", "4", "-t", "1"), (micro, text)),
    "export": Case(("export", _Q8, "-o", "out", "--shard-size", "8MB"), (q8,)),
    "inspect": Case(("inspect", _Q8), (q8,)),
    "plan": Case(("plan", _Q8), (q8,), same=False),
    "verify --fix": Case(("verify", "../inputs/wrong-q8.gguf", "--quick", "--fix",
                          "fixed.gguf"), (_wrong,)),
    "perplexity": Case(("perplexity", _Q8, "-f", "../inputs/text.txt", "-c", "128", "-t", "1",
                        "--save-logits", "base.kld"), (q8, text)),
    "evaluate": Case(("evaluate", _Q8, "--text", "stories=../inputs/text.txt", *_REST),
                     (q8, text), same=False),
    "chat --session": Case(_ASK, (q8,), same=False, earlier=_earlier_turns,
                           grows="work/talk.json", holds=_has_earlier_turns),
    "serve --prompt-cache": Case(
        ("serve", _Q8, "--port", "0", "--draft", "off", "--prompt-cache", "prompts",
         "--prompt-cache-ram", "0", *_REST), (q8,), same=False, serves="answers"),
    "bench": Case(("bench", _Q8, "-t", "1", "-c", "16"), (q8,), same=False),
    "hardware": Case(("hardware",), same=False),
    "worker": Case(("worker", "--port", "PORT"), same=False, serves="listens"),
}  # fmt: skip
