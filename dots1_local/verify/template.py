"""Does the chat template say what was said, in tokens the model has, and leave it to answer?"""

import re
from collections.abc import Iterator

from dots1_local.chat_template import ChatTemplate
from dots1_local.errors import GGUFError
from dots1_local.gguf_file import GGUFFile
from dots1_local.verify.findings import Change, Finding, Severity, names

__all__ = ["MARKER", "lint_template"]

MARKER = re.compile(r"<\|[^<>|\s]+\|>")
_RESPONSE = "<|response|>"


def lint_template(gguf: GGUFFile, right: str | None, *, compared: bool) -> Iterator[Finding]:
    """What is wrong with the chat template; `right` is that of the checkpoint, if `compared`."""
    key = "tokenizer.chat_template"
    source = gguf.keys.get(key)
    changes = (Change(key, "string", right),) if right else ()
    remedy = "--fix takes the checkpoint's" if right else "compare with --against the checkpoint"
    if not isinstance(source, str):
        if right or not compared:
            message = f"there is no {key}: it is a base model, or its template was lost"
            yield Finding("template", "warning", f"{message}; {remedy}", changes)
        return
    if right is not None and source != right:
        message = f"{key} is not the checkpoint's"
        yield Finding("template", "warning", f"{message}; {remedy}", changes)
    tokens = gguf.keys.get("tokenizer.ggml.tokens")
    known = set(map(str, tokens)) if isinstance(tokens, list) else set()
    for severity, problem in _problems(source, str(gguf.files[0]), known):
        yield Finding("template", severity, f"{problem}; {remedy}", changes)


def _problems(source: str, file: str, known: set[str]) -> Iterator[tuple[Severity, str]]:
    """Severity and sentence, of what a system prompt, a question and one more show."""
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
    strange = [marker for marker in MARKER.findall(rendered) if marker not in known]
    if strange and known:
        listed = names(dict.fromkeys(strange))
        yield "error", f"the chat template writes {listed}, of which there is no such token"
    elif _RESPONSE in known and not rendered.endswith(_RESPONSE):
        yield "warning", f"the chat template does not end a prompt with {_RESPONSE}"
