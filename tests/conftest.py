"""The example model, and conversions of it that the whole run shares."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from dots1_local.chat import draft
from dots1_local.convert import convert_checkpoint

Converted = Callable[..., Path]

# No time limit on an example: ggml builds a type's tables when it is first used, for seconds.
settings.register_profile("dots1", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dots1")


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The trained example checkpoint."""
    return Path(__file__).parent.parent / "examples" / "dots1-tiny"


@pytest.fixture(scope="session")
def converted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Convert the example once for each recipe and options: `converted("Q4_K_M")`."""
    folder = tmp_path_factory.mktemp("gguf")

    def make(recipe: str, **options: Any) -> Path:
        label = "-".join([recipe, *(f"{k}={Path(str(v)).name}" for k, v in options.items())])
        path = folder / f"{label}.gguf"
        if not path.exists():
            convert_checkpoint(tiny, path, recipe, **options)
        return path

    return make


@pytest.fixture
def short_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft after a match of two tokens, so that there are many drafts and most are wrong."""
    monkeypatch.setattr(draft, "MATCH", 2)
