"""What the tests of checkpoints on the hub share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dots1_local.convert import Conversion
from dots1_local.errors import CheckpointError, Dots1Error
from dots1_local.hub import open_hub
from tests.hub_server import NAME, HubServer

__all__ = ["SECOND", "prepare", "refusal", "sizes"]

SECOND = "model-00002-of-00003.safetensors"  # of the example


def prepare(hub: HubServer, revision: str | None = None) -> Conversion:
    """Prepare a conversion of the hub's checkpoint that is quick to encode."""
    return Conversion.prepare(open_hub(NAME, revision, endpoint=hub.endpoint), "Q8_0")


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every shard."""
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def refusal(action: Callable[[], object], kind: type[Dots1Error] = CheckpointError) -> str:
    """The sentence that an action ends with."""
    with pytest.raises(kind) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence
