"""How many tokens of calibration refinement needs.

A second moment over fewer tokens than columns is mostly noise. All tokens pass attention and shared
experts, but only a share of them passes a routed expert. The moment of an expert with few tokens is
shrunk towards that of its layer, which helps from about 0.7 tokens a column on.
"""

from dots1_local.architecture import Dots1Config
from dots1_local.errors import UsageError

__all__ = ["advice", "require_tokens"]

_ADVISED = 4  # tokens a column of an expert


def require_tokens(config: Dots1Config, tokens: int) -> None:
    """Refuse fewer tokens than the columns of the matrices that all tokens pass.

    Raises:
        UsageError: says how many are needed.
    """
    if tokens < config.hidden_size:
        raise UsageError(
            f"the calibration text has {tokens:,} tokens; refinement needs at least "
            f"{config.hidden_size:,}, and {_advised(config):,} to refine routed experts well"
        )


def advice(config: Dots1Config, tokens: int) -> str | None:
    """Return a warning if routed experts get fewer tokens than columns, and else None."""
    a_column = tokens / _a_column(config)
    if a_column >= 1:
        return None
    return (
        f"{tokens:,} tokens of calibration are {a_column:.2f} for each column of a routed expert, "
        f"which refines it little; {_advised(config):,} would be {_ADVISED}"
    )


def _a_column(config: Dots1Config) -> int:
    """The tokens of which an expert gets one for each of its columns."""
    return -(-config.hidden_size * config.n_routed_experts // config.num_experts_per_tok)


def _advised(config: Dots1Config) -> int:
    return _ADVISED * _a_column(config)
