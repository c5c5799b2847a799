"""A server on this machine that answers as the Hugging Face hub does."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest
from huggingface_hub import constants

from dots1_local.convert import Conversion
from dots1_local.errors import CheckpointError, Dots1Error
from dots1_local.hub import open_hub, retries
from tests.hub_server import NAME, HubServer

CHUNK = 1 << 16  # bytes that a cut connection loses at most
SECOND = "model-00002-of-00003.safetensors"  # of the example


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty; and retries do not wait."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(retries, "_PAUSES", (0.0, 0.0, 0.0))
    impatient = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    for module in (huggingface_hub.file_download, huggingface_hub.utils._http):
        monkeypatch.setattr(module, "time", impatient)
    return folder


@pytest.fixture
def hub(tiny: Path, cache: Path) -> Iterator[HubServer]:
    """The example on a hub; its connections are closed afterwards."""
    with HubServer(tiny) as server:
        yield server
        huggingface_hub.close_session()


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
