"""The models a server lists: their names, and how much their context holds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ServedModel", "find_model", "models_in", "name_list"]

_LONGEST_NAME = 200  # characters
_SHOWN = 20  # names


@dataclass(frozen=True)
class ServedModel:
    """A model with all its names; `n_ctx` is in tokens, None where the server does not say."""

    names: tuple[str, ...]
    n_ctx: int | None


def models_in(answer: Mapping[str, Any]) -> list[ServedModel]:
    """The models that the answer to GET /models lists; none where it has another shape."""
    entries = answer.get("data")
    return list(_models(entries)) if isinstance(entries, list) else []


def name_list(names: Sequence[str]) -> str:
    """Names for a sentence, cut short: resellers serve hundreds of models."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def find_model(models: Sequence[ServedModel], name: str | None) -> ServedModel | None:
    """The model of this name, or else the only one, as many servers accept any name for it."""
    for model in models:
        if name in model.names:
            return model
    return models[0] if len(models) == 1 else None


def _models(entries: Sequence[Any]) -> Iterator[ServedModel]:
    for entry in entries:
        if isinstance(entry, dict):
            aliases = entry.get("aliases")
            others = aliases if isinstance(aliases, list) else []
            names = [name for name in (entry.get("id"), *others) if _is_name(name)]
            if names:
                yield ServedModel(tuple(names), _context(entry))


def _context(entry: dict[str, Any]) -> int | None:
    """The context as vLLM and SGLang give it, or as llama.cpp's server does."""
    meta = entry.get("meta")
    for value in (
        entry.get("max_model_len"),
        meta.get("n_ctx") if isinstance(meta, dict) else None,
    ):
        if type(value) is int and 0 < value < 1 << 40:
            return value
    return None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= _LONGEST_NAME
