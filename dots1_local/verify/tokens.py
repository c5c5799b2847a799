"""Do the tokenizer's keys and the chat template serve a chat?

A chat needs no BOS, the right end tokens, markers that are control tokens, and a template that
writes what was said in tokens the model has. Ids are found by the tokens' text. llama.cpp's
`llama_vocab::impl::load` tells what llama.cpp does.
"""

import re
from collections import Counter
from collections.abc import Iterator
from reprlib import repr as brief
from typing import TYPE_CHECKING

from dots1_local.errors import GGUFError
from dots1_local.files.chat_template import ChatTemplate
from dots1_local.files.gguf import GGUFFile, Value
from dots1_local.verify.findings import (
    ABORTS,
    KIND_IDS,
    REFUSES,
    Change,
    Finding,
    Kind,
    Severity,
    names,
    remedy,
)

if TYPE_CHECKING:
    from dots1_local.convert.tokenizer import Tokenizer

__all__ = ["QWEN2_NAMES", "lint_template", "lint_tokenizer"]

_PREFIX = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4  # enum llama_token_type
_END_OF_RESPONSE, _END_OF_TEXT = "<|endofresponse|>", "<|endoftext|>"
_RESPONSE = "<|response|>"
_MARKER = re.compile(r"<\|[^<>|\s]+\|>")
# llama.cpp's names of Qwen2's way to split text.
QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez")
_FROM_CHECKPOINT = "--fix takes the checkpoint's"


def lint_template(gguf: GGUFFile, right: str | None, *, compared: bool) -> Iterator[Finding]:
    """What is wrong with the chat template; `right` is the checkpoint's, if `compared`."""
    key = "tokenizer.chat_template"
    source = gguf.keys.get(key)
    changes = (Change(key, "string", right),) if right else ()
    way_out = _FROM_CHECKPOINT if right else "compare with --against the checkpoint"
    if not isinstance(source, str):
        if right or not compared:
            message = f"there is no {key}: it is a base model, or its template was lost"
            yield Finding("template", "warning", f"{message}; {way_out}", changes)
        return
    if right is not None and source != right:
        message = f"{key} is not the checkpoint's"
        yield Finding("template", "warning", f"{message}; {way_out}", changes)
    known = set(gguf.keys.strings(_PREFIX + "tokens"))
    for severity, problem in _template_problems(source, str(gguf.files[0]), known):
        yield Finding("template", severity, f"{problem}; {way_out}", changes)


def _template_problems(source: str, file: str, known: set[str]) -> Iterator[tuple[Severity, str]]:
    """What rendering a system prompt, a question, a response and another question shows."""
    said = {"system": "first marked", "user": "second marked", "assistant": "third marked"}
    messages = [{"role": role, "content": text} for role, text in said.items()]
    messages.append({"role": "user", "content": "fourth marked"})
    try:
        template = ChatTemplate(source, file)
        alone, rendered = template.render(messages[1:2]), template.render(messages)
    except GGUFError as error:
        yield "error", str(error)
        return
    if "second marked" not in alone or "fourth marked" not in rendered:
        yield "error", "the chat template leaves out the user's message"
    lost = [role for role in ("system", "assistant") if said[role] not in rendered]
    if lost:
        yield "warning", f"the chat template leaves out the {names(lost)} message"
    strange = [marker for marker in _MARKER.findall(rendered) if marker not in known]
    if strange and known:
        listed = names(dict.fromkeys(strange))
        yield "error", f"the chat template writes {listed}, but the model has no such token"
    elif _RESPONSE in known and not rendered.endswith(_RESPONSE):
        yield "warning", f"the chat template does not end a prompt with {_RESPONSE}"


def lint_tokenizer(gguf: GGUFFile, checkpoint: "Tokenizer | None") -> Iterator[Finding]:
    """What is wrong with the tokenizer's keys; the checkpoint's tokenizer is the right one."""
    yield from _stored(gguf)
    tokens = gguf.keys.strings(_PREFIX + "tokens")
    replaced = _replacement(gguf, checkpoint)
    wrong = list(_vocabulary(gguf, tokens)) if tokens else [f"there is no tokenizer: {REFUSES}"]
    if checkpoint and not wrong and not _agrees(gguf, tokens, checkpoint):
        wrong = ["the tokenizer is not the checkpoint's"]
    way_out = remedy(replaced, _FROM_CHECKPOINT)
    for problem in wrong:
        yield Finding("tokenizer", "error", f"{problem}; {way_out}", replaced)
    if tokens:
        yield from _pre(gguf)
        yield from _bos(gguf, len(tokens))
        yield from _ends(gguf, tokens, checkpoint)
    if not wrong:
        yield from _markers(gguf, tokens)


def _stored(gguf: GGUFFile) -> Iterator[Finding]:
    """Ids and switches whose type is not the one llama.cpp reads; it stops at the first."""
    for name in gguf.keys:
        ending = re.fullmatch(r"tokenizer\.ggml\.(?:\w+_(token_id)|add_\w+_token)", name)
        wanted: Kind = "u32" if ending and ending[1] else "bool"
        if ending and gguf.keys.kind(name) != KIND_IDS[wanted]:
            value = gguf.keys[name]
            usable = isinstance(value, int) and 0 <= value < (1 << 32 if wanted == "u32" else 2)
            change = Change(name, wanted, value) if usable else Change(name)
            message = f"{name} is not stored as {wanted}: {REFUSES}"
            way_out = "--fix stores it so" if usable else "--fix removes it"
            yield Finding("tokenizer", "error", f"{message}; {way_out}", (change,))


def _replacement(gguf: GGUFFile, checkpoint: "Tokenizer | None") -> tuple[Change, ...]:
    """The changes that replace the tokenizer by the checkpoint's."""
    if checkpoint is None:
        return ()
    changes = (
        Change(_PREFIX + "model", "string", "gpt2"),
        Change(_PREFIX + "tokens", "string[]", list(checkpoint.tokens)),
        Change(_PREFIX + "token_type", "i32[]", list(checkpoint.types)),
        Change(_PREFIX + "merges", "string[]", list(checkpoint.merges)),
        Change(_PREFIX + "scores"),
    )
    return tuple(change for change in changes if gguf.keys.get(change.key) != change.value)


def _agrees(gguf: GGUFFile, tokens: list[str], checkpoint: "Tokenizer") -> bool:
    """Whether the tokenizer is the checkpoint's; a user-defined token may be a control token."""
    types, merges = (gguf.keys.get(_PREFIX + key) for key in ("token_type", "merges"))
    if tokens != list(checkpoint.tokens) or merges != list(checkpoint.merges):
        return False
    return isinstance(types, list) and all(
        found == right or (found, right) == (_CONTROL, _USER_DEFINED)
        for found, right in zip(types, checkpoint.types, strict=True)
    )


def _vocabulary(gguf: GGUFFile, tokens: list[str]) -> Iterator[str]:
    model, types = (gguf.keys.get(_PREFIX + key) for key in ("model", "token_type"))
    if model is None:
        yield f"{_PREFIX}model is missing: {REFUSES}"
    elif model != "gpt2":
        yield f"{_PREFIX}model is {brief(model)} where dots1 models have 'gpt2'"
    for tensor in gguf.tensors:
        embeds = tensor.name in ("token_embd.weight", "output.weight")
        if embeds and tensor.shape[:1] != (len(tokens),):
            shape = list(tensor.shape)
            yield f"there are {len(tokens)} tokens for {tensor.name} of {shape}: {REFUSES}"
    named = filter(None, tokens)  # llama.cpp gives empty ones a name
    for token, count in Counter(named).most_common(1):
        if count > 1:
            yield f"the token {brief(token)} occurs {count} times: {ABORTS}"
    if not isinstance(types, list):
        yield f"{_PREFIX}token_type is missing: a prompt would spell out its markers as text"
    elif len(types) != len(tokens):
        yield f"there are {len(types)} token types for {len(tokens)} tokens"
    if not gguf.keys.strings(_PREFIX + "merges"):
        yield f"{_PREFIX}merges is missing: {REFUSES}"


def _pre(gguf: GGUFFile) -> Iterator[Finding]:
    pre = gguf.keys.get(_PREFIX + "pre")
    if pre not in QWEN2_NAMES:
        found, unknown = "missing", ""
        if pre is not None:  # perhaps another version of llama.cpp knows this name
            found, unknown = brief(pre), ", or refuses to load the file"
        yield Finding(
            "pre", "error",
            f"{_PREFIX}pre is {found}: llama.cpp splits text in another way than in training"
            f"{unknown}; --fix sets 'qwen2'", (Change(_PREFIX + "pre", "string", "qwen2"),),
        )  # fmt: skip


def _bos(gguf: GGUFFile, n_tokens: int) -> Iterator[Finding]:
    """dots1 has no token that begins a text, but llama.cpp assumes one for every model."""
    bos, adds = (gguf.keys.get(_PREFIX + key) for key in ("bos_token_id", "add_bos_token"))
    key = _PREFIX + "add_bos_token"
    remove = (Change(_PREFIX + "bos_token_id"),) if bos is not None else ()
    no_bos = (Change(key, "bool", False), *remove)
    if adds is None:
        message = f"{key} is missing: some programs begin every prompt with token 11, a comma"
        yield Finding("bos", "warning", f"{message}; --fix sets False", no_bos)
    elif adds:
        found = bos if isinstance(bos, int) and 0 <= bos < n_tokens else 11
        message = f"{key} is {brief(adds)}: every prompt begins with token {found}"
        yield Finding("bos", "error", f"{message}; --fix sets False", no_bos)
    elif bos is not None:
        message = f"{_PREFIX}bos_token_id is {brief(bos)}, but dots1 models have no such token"
        yield Finding("bos", "warning", f"{message}; --fix removes it", remove)
    if gguf.keys.get(_PREFIX + "add_eos_token"):
        key = _PREFIX + "add_eos_token"
        message = f"{key} is set: every prompt ends with an end token"
        yield Finding("eos", "error", f"{message}; --fix removes it", (Change(key),))


def _ends(gguf: GGUFFile, tokens: list[str], checkpoint: "Tokenizer | None") -> Iterator[Finding]:
    """Keys must name both ends: by name, llama.cpp knows `<|endoftext|>` only."""
    eos, eot = _stored_ends(gguf, tokens)
    wanted = _right_ends(tokens, checkpoint)
    said = [value for value in (eos, eot) if value is not None]
    if eos is not None and all(v in wanted for v in said) and all(v in said for v in wanted):
        return
    if not wanted:
        if not (isinstance(eos, int) and 0 <= eos < len(tokens)):
            message = f"{_PREFIX}eos_token_id {_says(eos, tokens)}: every response ends there"
            yield Finding("eos", "error", f"{message}; compare with --against the checkpoint")
        return
    severity, message = _wrong_ends(gguf, tokens, wanted)
    changes = tuple(
        Change(f"{_PREFIX}{end}_token_id", "u32", index)
        for end, index in zip(("eos", "eot"), (wanted * 2)[:2], strict=True)
        if gguf.keys.get(f"{_PREFIX}{end}_token_id") != index
    )
    right = " and ".join(f"{index} ({brief(tokens[index])})" for index in dict.fromkeys(wanted))
    yield Finding("eos", severity, f"{message}; --fix ends them at {right}", changes)


def _stored_ends(gguf: GGUFFile, tokens: list[str]) -> tuple[Value | None, Value | None]:
    """The ids that the keys give EOS and EOT; an EOT beyond the vocabulary is ignored."""
    eos, eot = (gguf.keys.get(f"{_PREFIX}{end}_token_id") for end in ("eos", "eot"))
    return eos, eot if isinstance(eot, int) and 0 <= eot < len(tokens) else None


def _right_ends(tokens: list[str], checkpoint: "Tokenizer | None") -> list[int]:
    if checkpoint and checkpoint.eos < len(tokens) > checkpoint.eot:
        return [checkpoint.eos, checkpoint.eot]
    ids = {token: index for index, token in enumerate(tokens)}
    return [ids[name] for name in (_END_OF_RESPONSE, _END_OF_TEXT) if name in ids]


def _wrong_ends(gguf: GGUFFile, tokens: list[str], wanted: list[int]) -> tuple[Severity, str]:
    said = _stored_ends(gguf, tokens)
    for end, value in zip(("eos", "eot"), said, strict=True):
        if value not in wanted and (end == "eos" or value is not None):
            wrong = f"{_PREFIX}{end}_token_id {_says(value, tokens)}"
            return "error", f"{wrong}: responses end at that token"
    lost = next(index for index in wanted if index not in said)
    wrong = f"no key says that responses end at {lost} ({brief(tokens[lost])})"
    if tokens[lost] == _END_OF_TEXT:
        return "warning", f"{wrong}: only some programs know it by name"
    if "tokenizer.chat_template" in gguf.keys:
        return "error", f"{wrong}: a chat never stops"
    return "warning", f"{wrong}: a chat would never stop"


def _says(value: Value | None, tokens: list[str]) -> str:
    if value is None:
        return "is missing, and llama.cpp takes 11, a comma"
    if isinstance(value, int) and 0 <= value < len(tokens):
        return f"is {value} ({brief(tokens[value])})"
    return f"is {brief(value)}, which is not a token, and llama.cpp takes 11, a comma"


def _markers(gguf: GGUFFile, tokens: list[str]) -> Iterator[Finding]:
    """A marker in a prompt is one token, and in a message text, only if it is a control token."""
    raw = gguf.keys.get(_PREFIX + "token_type")
    source = gguf.keys.get("tokenizer.chat_template")
    types = [kind for kind in raw if isinstance(kind, int)] if isinstance(raw, list) else []
    if len(types) != len(tokens):
        return
    written = set(_MARKER.findall(source)) if isinstance(source, str) else set()
    written |= {_END_OF_RESPONSE, _END_OF_TEXT}
    markers = {token: index for index, token in enumerate(tokens) if token in written}
    wrong = {token: index for token, index in markers.items() if types[index] != _CONTROL}
    if not wrong:
        return
    fixed = [_CONTROL if index in wrong.values() else kind for index, kind in enumerate(types)]
    changes = (Change(_PREFIX + "token_type", "i32[]", fixed),)
    text = {token: index for token, index in wrong.items() if types[index] != _USER_DEFINED}
    if text:
        message = f"{names(text)} is not a control token: a prompt would spell it out as text"
        yield Finding("markers", "error", f"{message}; --fix makes it one", changes)
    else:
        message = f"{names(wrong)} is not a control token: in some programs a message can forge it"
        yield Finding("markers", "warning", f"{message}; --fix makes it one", changes)
