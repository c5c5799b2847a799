"""A hub of this machine, and what a conversion from a folder gives."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from dots1_local.hub import client, download
from tests.hub_server import HubServer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty; and nothing waits before it tries again."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("NO_PROXY", "*")
    for module in (client, download):
        monkeypatch.setattr(module, "_PAUSE", 0.0)
    return folder


@pytest.fixture
def hub(tiny: Path, cache: Path) -> Iterator[HubServer]:
    """The example on a hub, whose connections are closed afterwards."""
    with HubServer(tiny) as server:
        yield server
        huggingface_hub.close_session()
