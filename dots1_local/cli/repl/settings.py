"""What /set changes: each setting's name, the values it takes, and where it lives."""

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dots1_local.errors import UsageError

if TYPE_CHECKING:
    from dots1_local.cli.repl.loop import Repl

__all__ = ["SETTINGS", "change", "find_setting", "values"]


@dataclass(frozen=True)
class Setting:
    """`parse` raises ValueError for what is none of `takes`."""

    name: str
    takes: str
    parse: Callable[[str], Any]
    of: Literal["sampling", "session", "repl"] = "sampling"


def _whole_or_none(text: str) -> int | None:
    return None if text in ("off", "none", "random") else int(text)


def _count_or_none(text: str) -> int | None:
    count = _whole_or_none(text)
    if count is not None and count < 1:
        raise ValueError
    return count


def _strings(text: str) -> tuple[str, ...]:
    """Words, or quoted strings, in which \\n is a new line."""
    if text in ("off", "none"):
        return ()
    words = shlex.shlex(text, posix=True)
    words.whitespace_split, words.escape, words.commenters = True, "", ""
    strings = tuple(word.replace("\\n", "\n") for word in words)
    if not all(strings):
        raise ValueError
    return strings


def _one_of(choices: dict[str, Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if text not in choices:
            raise ValueError
        return choices[text]

    return parse


SETTINGS = (
    Setting("temperature", "a number from 0 up", float),
    Setting("top_k", "a whole number, 0 for off", int),
    Setting("top_p", "a share of 1", float),
    Setting("min_p", "a share of 1", float),
    Setting("repeat_penalty", "a number above 0, 1 for off", float),
    Setting("seed", "a whole number or random", _whole_or_none),
    Setting("max_tokens", "a whole number from 1 up or off", _count_or_none, "session"),
    Setting("stop", "strings, quoted where they have spaces, or none", _strings, "session"),
    Setting("overflow", "drop or stop", _one_of({"drop": "drop", "stop": "stop"}), "session"),
    Setting("markdown", "on or off", _one_of({"on": True, "off": False}), "repl"),
)


def change(repl: "Repl", name: str, text: str) -> None:
    """Set one of them.

    Raises:
        UsageError: there is no such setting, or it does not take this value.
    """
    setting = find_setting(name)
    try:
        value = setting.parse(text)
    except (ValueError, OverflowError):
        raise UsageError(f"{setting.name} is {setting.takes}, not {text!r}") from None
    if setting.of == "sampling":
        repl.session.sampling = replace(repl.session.sampling, **{setting.name: value})
    else:
        setattr(_home(repl, setting), setting.name, value)


def find_setting(name: str) -> Setting:
    """By its name, or the beginning of just one name."""
    wanted = name.replace("-", "_")
    found = [each for each in SETTINGS if each.name.startswith(wanted)]
    if len(found) != 1:
        known = ", ".join(each.name for each in found or SETTINGS)
        raise UsageError(f"there is no setting {name!r}; choose from {known}")
    return found[0]


def values(repl: "Repl") -> Iterator[tuple[str, str]]:
    """Name and present value of each setting."""
    for setting in SETTINGS:
        yield setting.name, _shown(setting, getattr(_home(repl, setting), setting.name))


def _home(repl: "Repl", setting: Setting) -> Any:
    homes = {"sampling": repl.session.sampling, "session": repl.session, "repl": repl}
    return homes[setting.of]


def _shown(setting: Setting, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if setting.name == "stop":
        return " ".join(json.dumps(each, ensure_ascii=False) for each in value) or "none"
    if value is None:
        return "random" if setting.name == "seed" else "off"
    return str(value)
