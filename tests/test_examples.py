"""The model card's examples run, on the example model."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Converted

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(script: str, model: Path) -> str:
    command = [sys.executable, str(EXAMPLES / script), str(model)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.slow
def test_text_is_completed_by_both(tiny: Path, converted: Converted) -> None:
    ours = output_of("text_completion.py", converted("BF16"))
    theirs = output_of("text_completion_transformers.py", tiny)
    for completed in (ours, theirs):
        text, _, rest = completed.partition("The output is")
        assert text.startswith("An attention function")
        assert len(rest.split()) > 20


@pytest.mark.slow
def test_a_chat_is_answered_alike_by_both(tiny: Path, converted: Converted) -> None:
    ours = output_of("chat_completion.py", converted("BF16"))
    theirs = output_of("chat_completion_transformers.py", tiny)
    # The likeliest tokens, until rounding (bf16 there) tips the first near tie between two.
    assert len(ours) > 200
    assert ours[:200] == theirs[:200]
