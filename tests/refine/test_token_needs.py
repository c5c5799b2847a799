"""Texts that are too short or short, by the arithmetic of dots.llm1."""

import pytest

from dots1_local.architecture import Dots1Config
from dots1_local.errors import UsageError
from dots1_local.refine.token_needs import advice, require_tokens
from tools.make_wide import published_config

CONFIG = Dots1Config.from_json(published_config())
# 6 of 128 experts get a token, and gate and up have 4,096 columns.
ONE_A_COLUMN = 87_382


def test_fewer_tokens_than_columns_are_refused_with_what_is_needed() -> None:
    require_tokens(CONFIG, 4096)
    with pytest.raises(UsageError, match=r"4,095.*at least 4,096.*349,528"):
        require_tokens(CONFIG, 4095)


def test_a_short_text_gets_a_warning() -> None:
    assert advice(CONFIG, ONE_A_COLUMN) is None
    sentence = advice(CONFIG, ONE_A_COLUMN // 2)
    assert sentence is not None
    assert "0.50" in sentence
    assert "349,528" in sentence
