"""The examples' model cards say what their training files hold."""

import json
from pathlib import Path

import pytest

from tools.tiny_card import card

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["dots1-tiny", "dots1-deep"])
def test_the_card_is_rendered_from_the_training_file(name: str) -> None:
    facts = json.loads((EXAMPLES / name / "training.json").read_text(encoding="utf-8"))
    assert (EXAMPLES / name / "README.md").read_text(encoding="utf-8") == card(facts)
    assert facts["name"] == name
