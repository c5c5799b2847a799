"""One forward pass of the example for all tests of the way back."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.reference.passes import Passed, forward


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Where others keep the cores busy, threads wait for each other at every small product."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def passed(tiny: Path) -> Passed:
    return forward(tiny)
