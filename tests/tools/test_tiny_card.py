"""The example's card says what its training measured, and nothing was edited by hand."""

import json
from pathlib import Path

from tools.tiny_card import card


def test_the_card_is_rendered_from_the_figures(tiny: Path) -> None:
    facts = json.loads((tiny / "training.json").read_text(encoding="utf-8"))
    assert (tiny / "README.md").read_text(encoding="utf-8") == card(facts)
    assert min(min(layer) for layer in facts["expert_load"]) > 0.25
