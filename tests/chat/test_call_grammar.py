"""Where an answer with tools may end, and what may come after a call."""

from collections.abc import Iterator
from typing import Any

import pytest

from dots1_local.chat.tools import CallGrammar, ToolChoice
from dots1_local.engine.engine import Engine
from tests.chat.grammars import accepts
from tests.helpers import write_random_gguf

CITY = {"type": "object", "properties": {"city": {"enum": ["Ulm"]}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": CITY}}]
PET = {"type": "object", "properties": {"tame": {"type": "boolean"}}, "required": ["tame"]}
CALL = '<tool_call>\n{"name": "rain", "arguments": {"city": "Ulm"}}\n</tool_call>'
AUTO, REQUIRED = ToolChoice(), ToolChoice(required=True)
KINDS = pytest.mark.parametrize(
    ("choice", "schema"), [(AUTO, None), (REQUIRED, None), (AUTO, PET)], ids=["text", "call", "pet"]
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = tmp_path_factory.mktemp("calls") / "model.gguf"
    with Engine.open(write_random_gguf(path), n_ctx=32, threads=1) as opened:
        yield opened


@KINDS
@pytest.mark.parametrize("after", ["", "\n", " ", f"\n{CALL}", CALL, f"{CALL}\n"])
def test_an_answer_may_end_after_its_calls(
    engine: Engine, choice: ToolChoice, schema: Any, after: str
) -> None:
    assert accepts(CallGrammar(TOOLS, engine, choice, schema), CALL + after)


@KINDS
def test_no_text_may_follow_a_call(engine: Engine, choice: ToolChoice, schema: Any) -> None:
    """Text there could only end in another call, or be a result that the model makes up."""
    matcher = CallGrammar(TOOLS, engine, choice, schema).matcher()
    assert all(map(matcher.accept, CALL.encode()))
    assert not matcher.accept(ord("D"))


@pytest.mark.parametrize("answer", ["", "Hi.", "1 < 2", f"So: {CALL}", f"So: {CALL}\n{CALL}"])
def test_text_may_precede_calls(engine: Engine, answer: str) -> None:
    assert accepts(CallGrammar(TOOLS, engine, AUTO), answer)


@pytest.mark.parametrize("required", [False, True])
def test_one_call_at_a_time_ends_the_answer(engine: Engine, required: bool) -> None:
    grammar = CallGrammar(TOOLS, engine, ToolChoice(required=required, parallel=False))
    assert accepts(grammar, CALL)
    assert not accepts(grammar, f"{CALL}\n{CALL}")
