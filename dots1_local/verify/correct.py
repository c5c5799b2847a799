"""Correct a file's keys in memory, so that it runs as it is, without a copy.

llama.cpp takes other values for keys that hold one value (its key overrides). Token types and the
chat template are read by this package alone, which tokenises markers itself where llama.cpp would
spell them out. Only what the file itself makes certain is corrected; `verify --fix` writes the same
changes to a copy.
"""

from collections.abc import Iterator, Mapping, Sequence
from reprlib import repr as brief
from typing import cast

from dots1_local.files.gguf import GGUFFile
from dots1_local.files.gguf_keys import Change
from dots1_local.verify import lint_header
from dots1_local.verify.findings import Finding

__all__ = [
    "TEMPLATE",
    "TOKEN_TYPES",
    "Override",
    "corrected",
    "corrections",
    "key_overrides",
    "remaining",
]

Override = bool | int | float | str

TOKEN_TYPES, TEMPLATE = "tokenizer.ggml.token_type", "tokenizer.chat_template"
_OURS = (TOKEN_TYPES, TEMPLATE)  # keys whose changes llama.cpp need not know
_USER_DEFINED = 4  # of enum llama_token_type
_LONGEST = 127  # bytes of a key, and of a text
_NO_TOKEN = (1 << 32) - 1  # llama.cpp takes its default for an id beyond the vocabulary
# llama.cpp looks for these in the file before it looks at the overrides.
_LOOKED_UP = tuple(f"dots1.{name}" for name in (
    "attention.head_count", "attention.head_count_kv", "expert_feed_forward_length",
    "expert_used_count", "feed_forward_length",
))  # fmt: skip


def corrected(gguf: GGUFFile) -> GGUFFile:
    """Return the model with its keys corrected as far as that is certain and possible in memory."""
    found = (change for finding in lint_header(gguf) for change in finding.changes)
    changes = {change.key: _without_user_defined(change, gguf) for change in found}
    possible = tuple(change for change in changes.values() if _possible(change, gguf))
    return gguf.corrected(possible) if possible else gguf


def corrections(gguf: GGUFFile) -> Iterator[str]:
    """One sentence on what `corrected` did, or none."""
    made = [change for change in gguf.changes if change.key != TEMPLATE]  # a person gave that one
    if made:
        done = ", ".join(map(_described, made))
        yield (
            f"corrected in memory, the file is untouched: {done}; dots1 verify --quick "
            f"{gguf.files[0]} says why"
        )


def remaining(gguf: GGUFFile) -> list[Finding]:
    """What is still wrong after `corrected`, for chats with this package.

    A base model needs no template, and messages here cannot forge user-defined markers.
    """
    return [
        finding
        for finding in lint_header(gguf)
        if finding.severity != "note"
        and not (finding.check == "template" and TEMPLATE not in gguf.keys)
        and (finding.check, finding.severity) != ("markers", "warning")
    ]


def key_overrides(changes: Sequence[Change]) -> Mapping[str, Override]:
    """Return the values that llama.cpp has to take, by key; for a removal, one without effect."""
    values: dict[str, Override] = {}
    for change in changes:
        if change.key in _OURS:
            continue
        value = _without_effect(change.key) if change.value is None else change.value
        if not isinstance(value, list):
            as_read = {"u32": int, "f32": float, "bool": bool}.get(change.kind, str)
            values[change.key] = value if change.value is None else as_read(value)
    return values


def _without_user_defined(change: Change, gguf: GGUFFile) -> Change:
    """Let user-defined tokens be: llama.cpp finds them in any text, and this package expects it."""
    if change.key != TOKEN_TYPES or not isinstance(change.value, list):
        return change
    stored = gguf.keys[TOKEN_TYPES]
    assert isinstance(stored, list)
    pairs = zip(cast("list[int]", stored), cast("list[int]", change.value), strict=True)
    kinds = [old if old == _USER_DEFINED else new for old, new in pairs]
    return Change(change.key, change.kind, kinds)


def _possible(change: Change, gguf: GGUFFile) -> bool:
    key, value = change.key, change.value
    if key in _OURS:
        return value != gguf.keys.get(key)
    if key in _LOOKED_UP:
        return key in gguf.keys and not isinstance(gguf.keys[key], list)
    fits = len(key.encode()) <= _LONGEST and not isinstance(value, list)
    return fits and (not isinstance(value, str) or len(value.encode()) <= _LONGEST)


def _without_effect(key: str) -> Override:
    """The value that makes llama.cpp behave as if the key were missing."""
    if key.endswith("_token_id"):
        return _NO_TOKEN
    return False if key.startswith("tokenizer.") else 0


def _described(change: Change) -> str:
    name = change.key.removeprefix("tokenizer.ggml.").removeprefix("dots1.")
    if change.value is None:
        return f"no {name}"
    return name if isinstance(change.value, list) else f"{name} {brief(change.value)}"
