"""Options that several verbs share, and the values that they are read as.

A verb with many options declares them as the fields of a frozen dataclass, so that its helpers
take one argument. `verb` turns the fields into the parameters that Typer reads. The dataclasses
leave out comparison and repr, because generating them would delay the start of every verb.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer

from dots1_local.cli._output import notice
from dots1_local.errors import UsageError

if TYPE_CHECKING:
    from dots1_local.chat.draft import Draft

__all__ = [
    "CHECKPOINT", "HUB_PANEL", "MODEL", "MODEL_HELP", "ChatTemplate", "Context", "DraftTokens",
    "Json", "KVType", "Model", "Plan", "Ram", "Revision", "Threads", "Vram",
    "Workers", "argument", "exit_on_interrupt", "flag", "memory_limits", "named_files", "option",
    "parse_draft", "text_file", "verb",
]  # fmt: skip


def _typer_option(
    text: str, *names: str, default: str | bool = True, panel: str | None = None, **settings: Any
) -> Any:
    return typer.Option(*names, help=text, show_default=default, rich_help_panel=panel, **settings)


def option(text: str, *names: str, value: Any = None, **settings: Any) -> Any:
    """Declare an option as a field of a dataclass; by default its name is that of the field.

    Without the option, the field has `value`. Of the `settings`, `default` says in words what
    happens then, `panel` is a heading in the help, and others are those of `typer.Option`.
    """
    return field(default=value, metadata={"typer": _typer_option(text, *names, **settings)})


def flag(text: str, *names: str, **settings: Any) -> Any:
    """Declare an option that takes no value; without the option, the field is False."""
    return option(text, *names, value=False, **settings)


def argument(text: str, *, value: Any = MISSING, **settings: Any) -> Any:
    """Declare a positional argument as a field of a dataclass; it is required without `value`."""
    return field(default=value, metadata={"typer": typer.Argument(help=text, **settings)})


MODEL = "MODEL"  # the metavar of an argument
MODEL_HELP = "A dots1 GGUF file (any shard), or ORG/NAME[:TYPE] on the Hugging Face hub."
Model = Annotated[Path, typer.Argument(help=MODEL_HELP, metavar=MODEL)]
Json = Annotated[bool, _typer_option("Print the result as JSON for scripts.", "--json")]
Threads = Annotated[
    int | None,
    _typer_option("Use this many CPU threads.", "--threads", "-t", min=1, default="one per core"),
]
CHECKPOINT = (  # the help of an argument
    "A folder with config.json and safetensors, or organisation/model on the Hugging Face hub."
)
HUB_PANEL = "A checkpoint on the hub"
Revision = Annotated[
    str | None,
    _typer_option(
        "Take this branch, tag or commit.", metavar="REVISION", default="main", panel=HUB_PANEL
    ),
]
Context = Annotated[
    str | None,
    _typer_option(
        "Let a conversation or request have this many tokens, such as 8k; 0 is as many as the "
        "model was trained for.",
        "--context",
        "-c",
        default="16k",
    ),
]
DraftTokens = Annotated[
    str | None,
    _typer_option(
        "Where an answer repeats earlier text, check up to this many of the tokens that followed "
        "there at once, or none (off). auto does so while it saves time.",
        "--draft",
        metavar="auto|off|N",
        default="auto",
    ),
]
Plan = Annotated[
    Path | None,
    _typer_option(
        "Run the model as this file of dots1 plan --json says.",
        default="a plan made now if there is a GPU or a worker",
    ),
]
Workers = Annotated[
    list[str] | None,
    _typer_option(
        "Use the dots1 worker at this address; repeatable.", "--worker", metavar="HOST:PORT"
    ),
]
KVType = Annotated[
    str | None,
    _typer_option(
        "Keep the KV cache in this type.", "--kv", default="f16, or q8_0 if only that fits"
    ),
]
ChatTemplate = Annotated[
    Path | None,
    _typer_option(
        "Use the chat template in this file, in Jinja.", metavar="FILE", default="the model's own"
    ),
]
Vram = Annotated[
    str | None,
    _typer_option(
        "Plan with this much memory of each GPU, such as 20GB; 0 uses no GPU.",
        default="what is free",
    ),
]
Ram = Annotated[
    str | None,
    _typer_option("Plan with this much RAM, such as 60GB.", default="what is free"),
]


def verb(run: Callable[[Any], None]) -> Callable[..., None]:
    """Turn a function of one dataclass into a function with a parameter for each field."""
    options = get_type_hints(run)["options"]
    hints = get_type_hints(options, include_extras=True)
    for each in fields(options):
        if "typer" in each.metadata:
            hints[each.name] = Annotated[hints[each.name], each.metadata["typer"]]

    def call(**values: Any) -> None:
        run(options(**values))

    call.__name__, call.__doc__, call.__annotations__ = run.__name__, run.__doc__, hints
    parameters = inspect.signature(options).parameters.values()
    cast("Any", call).__signature__ = inspect.Signature(
        [each.replace(annotation=hints[each.name]) for each in parameters]
    )
    return call


@contextmanager
def exit_on_interrupt(message: str | Callable[[], str] = "") -> Iterator[None]:
    """Exit with 130 at Ctrl-C, as shells do, after the message."""
    try:
        yield
    except KeyboardInterrupt:
        if message:
            notice(message if isinstance(message, str) else message())
        raise typer.Exit(130) from None


def text_file(name: str) -> Path:
    """Return the file of a text that is read from front to back; "-" is what is piped in."""
    return Path("/dev/stdin" if name == "-" else name)


def memory_limits(vram: str | None, ram: str | None) -> dict[str, int | None]:
    """Return the bytes to plan with, as `limited` takes them; 0 leaves a device unused."""
    from dots1_local.sizes import parse_size

    return {
        name: size if size is None else parse_size(size, minimum=0)
        for name, size in (("vram", vram), ("ram", ram))
    }


def named_files(values: Sequence[str], option: str) -> dict[str, Path]:
    """Return the files by name from NAME=FILE or FILE, whose name is that of the file.

    Raises:
        UsageError: two have the same name, a name is empty, or one of several is "all".
    """
    files: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or Path(value).exists():
            name, path = Path(value).stem, value
        if not name.strip() or not path:
            raise UsageError(f"{option} {value!r} must be NAME=FILE or FILE")
        if name in files:
            raise UsageError(
                f"two texts of {option} are called {name!r}; tell them apart with NAME=FILE"
            )
        files[name] = text_file(path)
    if "all" in files and len(files) > 1:
        raise UsageError(f'{option}: "all" is the name of all texts together; name one otherwise')
    return files


def parse_draft(text: str | None) -> "Draft":
    """Return the value of --draft, by default "auto".

    Raises:
        UsageError: it is neither auto, off nor a possible number.
    """
    from dots1_local.chat.draft import longest_draft

    draft: Draft = "auto"
    if text == "off":
        draft = 0
    elif text not in (None, "auto"):
        try:
            draft = int(text)
        except ValueError:
            raise UsageError(f"--draft is {text!r}; it must be auto, off or a number") from None
    longest_draft(draft)
    return draft
