"""What llama-server tells about speed: `timings` of an answer, and `prompt_progress` before it."""

from collections.abc import Sequence
from typing import Any

from dots1_local.serve.generation import Finished, Progress

__all__ = ["prompt_progress", "timings"]


def prompt_progress(progress: Progress) -> dict[str, Any]:
    """How far a prompt is; `processed` includes `cache`, which took no time."""
    return {
        "total": progress.prompt_tokens,
        "cache": progress.cached_tokens,
        "processed": progress.processed_tokens,
        "time_ms": round(1000 * progress.seconds),
    }


def timings(finished: Sequence[Finished]) -> dict[str, Any]:
    """Tokens, milliseconds and speeds; those of several choices are added up.

    The last ubatch of the prompt yields the first token, so only the others count for the speed.
    """
    cached = sum(each.cached_tokens for each in finished)
    computed = sum(each.prompt_tokens for each in finished) - cached
    predicted = sum(each.completion_tokens for each in finished)
    steps = sum(max(0, each.completion_tokens - 1) for each in finished)
    prompt_ms = 1000 * sum(each.prompt_seconds for each in finished)
    predicted_ms = 1000 * sum(each.answer_seconds for each in finished)
    drafted = sum(each.drafted_tokens for each in finished)
    accepted = sum(each.accepted_tokens for each in finished)
    drafts = {"draft_n": drafted, "draft_n_accepted": accepted} if drafted else {}
    return {
        "cache_n": cached,
        "prompt_n": computed,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": _ratio(prompt_ms, computed),
        "prompt_per_second": _ratio(1000 * computed, prompt_ms),
        "predicted_n": predicted,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": _ratio(predicted_ms, steps),
        "predicted_per_second": _ratio(1000 * steps, predicted_ms),
        **drafts,
    }


def _ratio(amount: float, of: float) -> float:
    return amount / of if of else 0.0
