"""Answers of random models that are constrained by grammars."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType, TokenType
from jsonschema import Draft202012Validator

from dots1_local.chat.grammar import Grammar
from dots1_local.chat.sampler import Sampler
from dots1_local.chat.sampling import Sampling
from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error
from tests.chat.grammars import thing
from tests.helpers import EOS, EOT, TOKENS, TYPES, scripted_tensors, write_random_gguf
from tests.verify.patch import rewrite

PROMPT = list(b"say:")
# So that texts of random bytes come to an end.
BRIEF = tuple((token, 4.0) for token in (*b'"]}0,', EOS))


def written(
    engine: Engine, grammar: Grammar, sampling: Sampling, sampler: Sampler | None = None
) -> bytes | None:
    """Return an answer up to its end token; None if 900 tokens have no end token."""
    made = sampler or Sampler(sampling, engine, grammar)
    try:
        made.begin(PROMPT)
        engine.forget()
        engine.decode(PROMPT, 0)
        answer = b""
        for position in count(len(PROMPT)):
            token = made.next(engine)
            if engine.is_end(token):
                return answer
            if position == 900:
                return None
            answer += engine.piece(token)
            engine.decode([token], position)
    finally:
        if sampler is None:
            made.close()
    return None


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
     "required": ["a"], "additionalProperties": {"type": "boolean"}},
    {"type": "array", "items": {"enum": ["中", "中文", 1.5, None, {"k": []}]}, "maxItems": 9},
    {"type": "string", "minLength": 2, "maxLength": 6},
    {"type": "string", "pattern": "^[^a-z]{3,5}[é中]$"},
    {"type": "number", "minimum": -2.5, "exclusiveMaximum": 17},
    {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("options", [{}, {"top_k": 0, "top_p": 1, "min_p": 0}, {"min_p": 0.5}])
def test_every_answer_is_valid(
    engine: Engine, schema: dict[str, Any], options: dict[str, Any]
) -> None:
    grammar, ended = Grammar(schema, engine), 0
    for seed in range(6):
        sampling = Sampling(1.5, seed=seed, logit_bias=BRIEF, **options)
        answer = written(engine, grammar, sampling)
        if answer is not None:
            Draft202012Validator(schema).validate(json.loads(answer.decode("utf-8")))
            ended += 1
    assert ended


def test_any_object(engine: Engine) -> None:
    grammar = Grammar({"type": "object"}, engine)
    answers = [
        written(engine, grammar, Sampling(1.5, seed=seed, logit_bias=BRIEF)) for seed in range(8)
    ]
    assert all(isinstance(json.loads(answer), dict) for answer in answers if answer is not None)
    assert any(answers)


def test_an_answer_may_be_greedy_and_repeated(engine: Engine) -> None:
    grammar = Grammar({"type": "array", "items": {"const": "中"}, "maxItems": 3}, engine)
    with Sampler(Sampling(0), engine, grammar) as sampler:
        first = written(engine, grammar, Sampling(0), sampler)
        assert first == written(engine, grammar, Sampling(0), sampler)
    assert first is not None
    assert set(json.loads(first)) <= {"中"}


def test_an_allowed_token_is_the_one_sampled_without_a_grammar(engine: Engine) -> None:
    grammar = Grammar({"type": "string"}, engine)
    for seed in range(20):
        sampling = Sampling(1.0, seed=seed)
        engine.forget()
        engine.decode(list(b'x: "'), 0)
        with Sampler(sampling, engine) as free, Sampler(sampling, engine, grammar) as bound:
            free.begin([])
            bound.begin([])
            token = free.next(engine)
            if token == ord('"'):
                assert bound.next(engine) == token
            else:
                assert bound.next(engine) == ord('"')


def test_after_a_whole_document_only_the_end_is_left(engine: Engine) -> None:
    grammar = Grammar({"const": {"a": [1]}}, engine)
    ends = {EOS, EOT}
    answer = written(engine, grammar, Sampling(5, logit_bias=tuple((end, -100.0) for end in ends)))
    assert answer is not None
    assert json.loads(answer) == {"a": [1]}


def test_control_tokens_are_not_text_of_an_answer(tmp_path: Path) -> None:
    # This model wants to say "<|system|>"; as a token that is no part of an answer.
    marker = TYPES.index(TokenType.CONTROL) + 1
    tensors = scripted_tensors([marker])
    path = write_random_gguf(tmp_path / "model.gguf", tensors=tensors)
    with Engine.open(path, n_ctx=64, threads=1) as engine:
        grammar = Grammar({"const": "<|system|>"}, engine)
        answer = written(engine, grammar, Sampling(0, logit_bias=((marker, 100.0),)))
    assert answer == b'"<|system|>"'


def test_characters_split_over_tokens_are_completed(engine: Engine) -> None:
    split = Grammar({"enum": ["中文", "中国", "é"]}, engine)
    answers = {written(engine, split, Sampling(9, top_k=0, seed=seed)) for seed in range(12)}
    assert {json.loads(each) for each in answers if each} == {"中文", "中国", "é"}


def test_overlong_utf8_is_refused(engine: Engine) -> None:
    # E0 82 80 would be U+0080 in more bytes than UTF-8 allows.
    grammar = Grammar({"type": "string", "minLength": 1, "maxLength": 1}, engine)
    wish = ((0xE0, 60.0), *((byte, 40.0) for byte in range(0x82, 0xA0)))
    for seed in range(4):
        answer = written(engine, grammar, Sampling(1, seed=seed, logit_bias=wish))
        assert answer is not None
        assert len(json.loads(answer.decode("utf-8"))) == 1


def test_deep_nesting_is_closed_again(engine: Engine) -> None:
    grammar = Grammar({"type": "array", "items": {"$ref": "#"}}, engine)
    matcher, depth = grammar.matcher(), 20_000
    assert all(matcher.accept(ord("[")) for _ in range(depth))
    assert all(matcher.accept(ord("]")) for _ in range(depth))
    assert matcher.accept(EOS)


def test_an_answer_that_exceeds_llguidances_limits_fails_alone(engine: Engine) -> None:
    large = thing(**{f"p{n}": {"type": "integer"} for n in range(3000)})
    grammar = Grammar(thing(a={"type": "null"}, b=large), engine)
    matcher = grammar.matcher()
    with pytest.raises(Dots1Error, match="schema"):
        assert all(map(matcher.accept, b'{"b":{"p0":0}}'))
    small = Grammar({"const": 7}, engine)
    assert written(engine, small, Sampling(0)) == b"7"


def test_an_answer_without_an_allowed_token_is_an_error(engine: Engine) -> None:
    with Sampler(Sampling(0), engine, Grammar({"const": 7}, engine)) as sampler:
        engine.forget()
        logits = engine.decode(PROMPT, 0)  # llama.cpp's own, so that it reads what is written here
        logits[ord("7")] = -np.inf
        with pytest.raises(Dots1Error, match="no token"):
            sampler.next(engine)


@pytest.mark.parametrize("beyond", [False, True])
def test_a_file_that_does_not_say_where_answers_end_is_refused(
    tmp_path: Path, beyond: bool
) -> None:
    unknown = [token.replace("<|endof", "<|finof") for token in TOKENS]
    path = write_random_gguf(tmp_path / "a.gguf", without=["eos_token_id"], tokens=unknown)
    if beyond:
        key = "tokenizer.ggml.eos_token_id"
        path = rewrite(path, tmp_path / "b.gguf", {key: 9999}, types={key: GGUFValueType.UINT32})
    with (
        Engine.open(path, n_ctx=64, threads=1) as engine,
        pytest.raises(Dots1Error, match=r"[ab]\.gguf"),
    ):
        Grammar({"type": "object"}, engine)
