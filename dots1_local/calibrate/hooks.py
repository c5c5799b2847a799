"""What is told about a layer while it is computed: which matrices have seen all their rows, and
which experts the rows chose."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from dots1_local.reference.layers import Observer, ffn_hidden
from dots1_local.reference.model import Compute

__all__ = ["NO_HOOKS", "Expert", "Hooks", "observe_all"]

_ROWS = 2048  # rows in one matrix product


@dataclass(frozen=True)
class Expert:
    """A routed expert that was applied to its rows.

    `inputs` [all rows of x, hidden] are the inputs of the layer's FFN, of which the expert got
    those numbered `rows`, ascending. `stored` are the expert's matrices as the checkpoint has them,
    by their names relative to the layer.
    """

    number: int
    inputs: Tensor
    rows: Tensor
    stored: Mapping[str, Tensor]
    compute: Compute

    def hidden(self, rows: Tensor, observe: Observer) -> None:
        """Call `observe` with the inputs that the down projection has for any `rows`."""
        prefix = f"mlp.experts.{self.number}"
        matrices = {name: self.compute.prepare(name, each) for name, each in self.stored.items()}
        for part in rows.split(_ROWS):
            gathered = self.inputs[part].to(self.compute.device)
            observe(f"{prefix}.down_proj.weight", ffn_hidden(gathered, matrices, prefix))


def _ignore(*args: object) -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """Functions that are called within a layer, when matrices have seen all their rows.

    `common` is called after attention, shared experts and a dense layer's FFN, `routed` with the
    experts that all rows of x chose, [rows, experts per token], and `expert` after each routed
    expert.
    """

    common: Callable[[], None] = _ignore
    expert: Callable[[Expert], None] = _ignore
    routed: Callable[[Tensor], None] = _ignore


NO_HOOKS = Hooks()


def observe_all(*observers: Observer) -> Observer:
    """An observer that calls several ones."""

    def observe(name: str, rows: Tensor) -> None:
        for each in observers:
            each(name, rows)

    return observe
