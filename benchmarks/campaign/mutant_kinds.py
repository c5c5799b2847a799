"""The kinds of files that are changed at random, and the verbs that read them."""

import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.campaign.asking import answer_once
from benchmarks.campaign.gguf_mutations import mutate_gguf
from benchmarks.campaign.inputs import (
    TEXT,
    calibrated,
    inputs,
    micro,
    micro_q8,
    mini_q8,
    one_at_a_time,
    split,
    text,
)
from benchmarks.campaign.mutations import (
    mutate_bytes,
    mutate_json,
    mutate_safetensors,
    mutate_template,
)
from benchmarks.campaign.processes import Place, Program
from benchmarks.campaign.trial import Broken
from dots1_local.placement.placement import stored_placement

__all__ = ["KINDS", "Kind"]

_MACHINES = Path(__file__).parents[2] / "dots1_local" / "devices" / "machines"

Mutate = Callable[[Random, bytes], bytes]
Command = Sequence[str]


@dataclass(frozen=True)
class Kind:
    """A kind of file: where a good one comes from, what changes it, and what reads it.

    `prepare` puts the files of a command into the folder; one of those that match `pattern` is
    changed. A command that succeeds may write those that match `saved`.
    """

    prepare: Callable[[Path], None]
    pattern: str
    mutate: Mutate
    commands: Sequence[Command]
    saved: str = ""


def _checkpoint(work: Path) -> None:
    shutil.copytree(micro(), work / "model")


def _model(work: Path) -> None:
    shutil.copyfile(mini_q8(), work / "model.gguf")
    shutil.copyfile(text(), work / "text.txt")
    (work / "short.txt").write_text(TEXT[:500], encoding="utf-8")


def _importance(work: Path) -> None:
    _checkpoint(work)
    shutil.copyfile(calibrated() / "imatrix.gguf", work / "imatrix.gguf")


def _old_importance(work: Path) -> None:
    """Importance in llama-imatrix's old format: names, calls, and that many values."""
    _checkpoint(work)
    matrices = {"blk.0.attn_q.weight": 64, "blk.1.ffn_down_exps.weight": 32}
    with (work / "imatrix.dat").open("wb") as file:
        file.write(struct.pack("<i", len(matrices)))
        for name, columns in matrices.items():
            file.write(struct.pack("<i", len(name)) + name.encode())
            file.write(struct.pack(f"<ii{columns}f", 7, columns, *range(1, columns + 1)))
        file.write(struct.pack("<ii4s", 3, 4, b"text"))


def _calibration(work: Path) -> None:
    _checkpoint(work)
    shutil.copytree(calibrated(), work / "calibration")


def _routed(work: Path) -> None:
    _calibration(work)
    shutil.copyfile(micro_q8(), work / "model.gguf")


def _split(work: Path) -> None:
    for path in split().parent.glob("split-*.gguf"):
        shutil.copyfile(path, work / path.name)


def _machine(work: Path) -> None:
    _model(work)
    _checkpoint(work)
    shutil.copyfile(_MACHINES / "24gb-64gb.json", work / "machine.json")


def _stored(work: Path) -> None:
    """A placement where `dots1 convert --for` stores it, and what runs a model looks for it."""
    _printed("placed.json", "plan", "model.gguf", "--json")(work)
    (work / "placed.json").rename(stored_placement(work / "model.gguf"))


_ready: dict[str, Path] = {}


def _made(name: str, *command: str) -> Path:
    """A folder in which a command ran; `name` is what it writes."""
    with one_at_a_time:
        if name in _ready:
            return _ready[name]
        place = Place(inputs() / "mutants" / name)
        _model(place.work)
        _checkpoint(place.work)
        program = Program(place, command)
        if command[0] == "serve":
            answer_once(place, program, TEXT[:900])
        if program.wait():
            raise Broken(f"{name} cannot be made: {place.said()}")
        _ready[name] = place.work
        return place.work


def _after(name: str, *command: str) -> Callable[[Path], None]:
    """What a command leaves, with what it was given."""

    def prepare(work: Path) -> None:
        shutil.copytree(_made(name, *command), work, dirs_exist_ok=True)

    return prepare


def _printed(name: str, *command: str) -> Callable[[Path], None]:
    """What a command prints, in a file beside what it was given."""

    def prepare(work: Path) -> None:
        folder = _made(name, *command)
        shutil.copytree(folder, work, dirs_exist_ok=True)
        said = (folder.parent / "log").read_text()
        (work / name).write_text(said[said.index("{") : said.rindex("}") + 1])

    return prepare


def _template(work: Path) -> None:
    _model(work)
    (work / "template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


def _either(*mutate: Mutate) -> Mutate:
    return lambda random, content: random.choice(mutate)(random, content)


_CONVERT: Command = "convert", "model", "-o", "out.gguf", "--type", "Q8_0"
_ASK: Command = "chat", "model.gguf", "-p", "Hello", "-n", "4", "--temp", "0"
_CHECKPOINT: Sequence[Command] = (_CONVERT, ("convert", "model", "--dry-run"), ("inspect", "model"))
_SPEAK = ("perplexity", "model.gguf", "-f", "text.txt", "-c", "64", "--chunks", "2")
_GGUF: Sequence[Command] = (
    ("inspect", "model.gguf"), ("inspect", "model.gguf", "--json"), ("plan", "model.gguf"),
    ("plan", "model.gguf", "--hardware", "24gb-64gb"), ("verify", "model.gguf"),
    ("verify", "model.gguf", "--fix", "fixed.gguf"), _ASK, _ASK, _SPEAK,
    ("export", "model.gguf", "-o", "exported"),
)  # fmt: skip
_TALK: Command = (*_ASK, "--session", "talk.json")
_MEASURED: Sequence[Command] = (
    (*_CONVERT[:4], "--calibration", "calibration", "--bpw", "5"),
    ("convert", "model", "--dry-run", "--calibration", "calibration", "--max-kld", "0.1"),
    ("inspect", "calibration"),
)
_FROM_SPLIT: Sequence[Command] = tuple(
    tuple("split-00001-of-00004.gguf" if word == "model.gguf" else word for word in command)
    for command in _GGUF
)
_SERVE: Command = "serve", "model.gguf", "--port", "0", "-c", "1k", "-t", "1"
_CACHING: Command = (*_SERVE, "--prompt-cache", "prompts", "--prompt-cache-ram", "0")
_ANSWER: Command = (
    "evaluate", "model.gguf", "--text", "story=short.txt", "--answers", "answers", "-c", "256",
)  # fmt: skip
_ROUTED: Command = (
    "plan", "model.gguf", "--hardware", "24gb-64gb", "--routing", "calibration",
)  # fmt: skip
KINDS: Mapping[str, tuple[Kind, int]] = {
    "config.json": (Kind(_checkpoint, "model/config.json", mutate_json, _CHECKPOINT), 900),
    "index": (Kind(_checkpoint, "model/*.index.json", mutate_json, _CHECKPOINT), 700),
    "safetensors": (
        Kind(_checkpoint, "model/*.safetensors", mutate_safetensors, _CHECKPOINT), 1000,
    ),
    "tokenizer": (Kind(_checkpoint, "model/*token*.json", mutate_json, _CHECKPOINT[:1]), 900),
    "chat template": (
        Kind(_template, "template.jinja", mutate_template,
              [(*_ASK, "--chat-template", "template.jinja")]), 700,
    ),
    "GGUF": (Kind(_model, "model.gguf", mutate_gguf, _GGUF), 2000),
    "GGUF in shards": (Kind(_split, "split-*.gguf", mutate_gguf, _FROM_SPLIT), 400),
    "GGUF, served": (Kind(_model, "model.gguf", mutate_gguf, [_SERVE]), 200),
    "imatrix": (
        Kind(_importance, "imatrix.gguf", _either(mutate_gguf, mutate_gguf, mutate_bytes),
              [(*_CONVERT[:4], "--type", "IQ4_NL", "--imatrix", "imatrix.gguf")]), 600,
    ),
    "imatrix.dat": (
        Kind(_old_importance, "imatrix.dat", mutate_bytes,
              [(*_CONVERT[:4], "--type", "IQ4_NL", "--imatrix", "imatrix.dat")]), 200,
    ),
    "convert plan": (
        Kind(_printed("plan.json", "convert", "model", "--dry-run", "--json"), "plan.json",
              mutate_json, [(*_CONVERT[:4], "--plan", "plan.json")]), 600,
    ),
    "placement": (
        Kind(_printed("placed.json", "plan", "model.gguf", "--json"), "placed.json", mutate_json,
              [(*_ASK, "--plan", "placed.json"), ("plan", "model.gguf", "--plan", "placed.json")]),
        500,
    ),
    "stored placement": (Kind(_stored, "*.placement.json", mutate_json, [_ASK]), 200),
    "machine": (
        Kind(_machine, "machine.json", mutate_json,
              [("plan", "model.gguf", "--hardware", "machine.json"),
               ("convert", "model", "--dry-run", "--for", "machine.json")]), 400,
    ),
    "calibration": (Kind(_calibration, "calibration/*", _either(mutate_bytes), _MEASURED), 800),
    "routing": (
        Kind(_routed, "calibration/routing.safetensors", _either(mutate_safetensors, mutate_bytes),
             [_ROUTED, ("inspect", "calibration")]), 200,
    ),
    "session": (Kind(_after("session", *_TALK), "talk.json", mutate_json, [_TALK], "talk.*"), 300),
    "KV cache": (Kind(_after("kv", *_TALK), "talk.kv", mutate_bytes, [_TALK], "talk.*"), 300),
    "prompt cache": (
        Kind(_after("prompts", *_CACHING), "prompts/*/*.kv", mutate_bytes, [_CACHING],
              "prompts/*"), 200,
    ),
    "answers": (
        Kind(_after("answers", *_ANSWER), "answers/*", mutate_bytes, [_ANSWER], "answers/*"), 60,
    ),
    "logits": (
        Kind(_after("logits", *_SPEAK, "--save-logits", "base.kld"), "base.kld", mutate_bytes,
              [("perplexity", "model.gguf", "--logits", "base.kld")]), 300,
    ),
}  # fmt: skip
