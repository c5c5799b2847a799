"""A server on this machine that answers as the Hugging Face hub does."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest
from huggingface_hub import constants

from dots1_local.hub import client
from tests.hub_server import HubServer

CHUNK = 1 << 16  # bytes that a cut connection loses at most


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty; and retries do not wait."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(client, "_PAUSES", (0.0, 0.0, 0.0))
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
