"""Files that were changed at random, given to the verbs that read them.

`mutations.py` and `gguf_mutations.py` change them. A verb may take what it was given or refuse it
in a sentence; it may not show a traceback, crash, hang, take much memory, or change a file.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from random import Random

from benchmarks.campaign.gguf_mutations import mutate_gguf
from benchmarks.campaign.inputs import (
    calibrated,
    inputs,
    micro,
    mini_q8,
    one_at_a_time,
    text,
)
from benchmarks.campaign.mutations import (
    mutate_bytes,
    mutate_json,
    mutate_safetensors,
    mutate_template,
)
from benchmarks.campaign.processes import Place, Program
from benchmarks.campaign.trial import Broken, Part, Trial

__all__ = ["PART"]

_SECONDS = 10.0  # of the processor
_MEMORY = 2 << 30  # bytes that no file backs
_CODES = 0, 1, 2

Mutate = Callable[[Random, bytes], bytes]
Command = Sequence[str]


@dataclass(frozen=True)
class _Kind:
    """A kind of file: where a good one comes from, what changes it, and what reads it.

    `prepare` puts the files of a command into the folder; one of those that match `pattern` is
    changed. A command that succeeds may write those that match `saved`.
    """

    prepare: Callable[[Path], None]
    pattern: str
    mutate: Mutate
    commands: Sequence[Command]
    saved: str = ""


def _trial(kind: _Kind) -> Trial:
    def trial(random: Random, folder: Path) -> None:
        place = Place(folder)
        kind.prepare(place.work)
        victim = random.choice(sorted(place.work.glob(kind.pattern)))
        victim.write_bytes(kind.mutate(random, victim.read_bytes()))
        before = _digests(place.work)
        command = random.choice(kind.commands)
        program = Program(place, command, limit=120)
        costs = _Costs(program.pid)
        code = program.wait(costs.are_high)
        if costs.are_high():
            program.kill()
            raise Broken(f"{' '.join(command)}: {costs}")
        said = place.log.read_text(errors="replace")
        if code not in _CODES or "Traceback (most recent" in said or "GGML_ASSERT" in said:
            raise Broken(f"{' '.join(command)}: status {code}, {place.said()}")
        if code == 1 and "dots1: " not in said and command[0] != "verify":  # that one reports
            raise Broken(f"{' '.join(command)}: refused without a sentence, {place.said()}")
        after = _digests(place.work)
        changed = [name for name, digest in before.items() if after.get(name) != digest]
        if code == 0:
            changed = [name for name in changed if not fnmatch(name, kind.saved)]
        if changed:
            raise Broken(f"{' '.join(command)}: {', '.join(changed)} changed")

    return trial


class _Costs:
    """The seconds and the memory of a process, as long as it lives."""

    def __init__(self, pid: int) -> None:
        self._pid, self._seconds, self._memory = pid, 0.0, 0

    def are_high(self) -> bool:
        try:
            fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
            status = Path(f"/proc/{self._pid}/status").read_text()
        except OSError:
            return self._high
        ticks = int(fields[11]) + int(fields[12])
        self._seconds = ticks / os.sysconf("SC_CLK_TCK")
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                self._memory = max(self._memory, int(line.split()[1]) << 10)
        return self._high

    @property
    def _high(self) -> bool:
        return self._seconds > _SECONDS or self._memory > _MEMORY

    def __str__(self) -> str:
        return f"{self._seconds:.1f} s of the processor and {self._memory / 1e6:.0f} MB"


def _digests(folder: Path) -> Mapping[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _checkpoint(work: Path) -> None:
    shutil.copytree(micro(), work / "model")


def _model(work: Path) -> None:
    shutil.copyfile(mini_q8(), work / "model.gguf")
    shutil.copyfile(text(), work / "text.txt")


def _importance(work: Path) -> None:
    _checkpoint(work)
    shutil.copyfile(calibrated() / "imatrix.gguf", work / "imatrix.gguf")


def _calibration(work: Path) -> None:
    _checkpoint(work)
    shutil.copytree(calibrated(), work / "calibration")


_ready: dict[str, Path] = {}


def _made(name: str, *command: str) -> Path:
    """A folder in which a command ran; `name` is what it writes."""
    with one_at_a_time:
        if name in _ready:
            return _ready[name]
        place = Place(inputs() / "mutants" / name)
        _model(place.work)
        _checkpoint(place.work)
        if Program(place, command).wait():
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
_KINDS: Mapping[str, tuple[_Kind, int]] = {
    "config.json": (_Kind(_checkpoint, "model/config.json", mutate_json, _CHECKPOINT), 900),
    "index": (_Kind(_checkpoint, "model/*.index.json", mutate_json, _CHECKPOINT), 700),
    "safetensors": (
        _Kind(_checkpoint, "model/*.safetensors", mutate_safetensors, _CHECKPOINT), 1200,
    ),
    "tokenizer": (_Kind(_checkpoint, "model/*token*.json", mutate_json, _CHECKPOINT[:1]), 1000),
    "chat template": (
        _Kind(_template, "template.jinja", mutate_template,
              [(*_ASK, "--chat-template", "template.jinja")]), 700,
    ),
    "GGUF": (_Kind(_model, "model.gguf", mutate_gguf, _GGUF), 2500),
    "imatrix": (
        _Kind(_importance, "imatrix.gguf", _either(mutate_gguf, mutate_gguf, mutate_bytes),
              [(*_CONVERT[:4], "--type", "IQ4_NL", "--imatrix", "imatrix.gguf")]), 600,
    ),
    "convert plan": (
        _Kind(_printed("plan.json", "convert", "model", "--dry-run", "--json"), "plan.json",
              mutate_json, [(*_CONVERT[:4], "--plan", "plan.json")]), 600,
    ),
    "placement": (
        _Kind(_printed("placed.json", "plan", "model.gguf", "--json"), "placed.json", mutate_json,
              [(*_ASK, "--plan", "placed.json"), ("plan", "model.gguf", "--plan", "placed.json")]),
        500,
    ),
    "calibration": (_Kind(_calibration, "calibration/*", _either(mutate_bytes), _MEASURED), 800),
    "session": (_Kind(_after("session", *_TALK), "talk.json", mutate_json, [_TALK], "talk.*"), 300),
    "KV cache": (_Kind(_after("kv", *_TALK), "talk.kv", mutate_bytes, [_TALK], "talk.*"), 300),
    "logits": (
        _Kind(_after("logits", *_SPEAK, "--save-logits", "base.kld"), "base.kld", mutate_bytes,
              [("perplexity", "model.gguf", "--logits", "base.kld")]), 300,
    ),
}  # fmt: skip

PART = Part(
    "no traceback, no crash, at most 10 s and 2 GiB, no file changed",
    {name: (_trial(kind), count) for name, (kind, count) in _KINDS.items()},
)
