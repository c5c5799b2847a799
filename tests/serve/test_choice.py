import math

import numpy as np
import pytest

from dots1_local.serve.choice import PieceBuilder, token_logprob
from dots1_local.serve.generation import Piece, QueueEta, TokenLogprob
from dots1_local.serve.scheduler import PrefillBudget


def settled(tokens_a_second: float, overhead: float, n_ubatch: int = 512) -> int:
    """What goes beside writers after many steps on a machine of such speed."""
    budget = PrefillBudget(n_ubatch)
    for _ in range(50):
        budget.record(budget.tokens, overhead + budget.tokens / tokens_a_second)
    return budget.tokens


@pytest.mark.parametrize(
    ("tokens_a_second", "overhead", "beside"),
    [
        (5000, 0.02, 512),  # a GPU: whole ubatches
        (100, 0.2, 80),  # 0.2 s and 80 tokens are a second
        (10, 0.2, 32),  # never less
    ],
)
def test_a_step_beside_writers_takes_about_a_second(
    tokens_a_second: float, overhead: float, beside: int
) -> None:
    assert settled(tokens_a_second, overhead) == pytest.approx(beside, abs=2)


def test_one_slow_step_and_the_rest_of_a_prompt_say_little() -> None:
    budget = PrefillBudget(512)
    for _ in range(10):
        budget.record(512, 0.1)
    budget.record(512, 60)
    assert budget.tokens == 256
    budget.record(3, 60)
    assert budget.tokens == 256
    budget.record(256, 0)
    assert budget.tokens == 512


def test_a_small_ubatch_stays_one() -> None:
    assert settled(5000, 0, n_ubatch=16) == settled(1, 0, n_ubatch=16) == 16


def test_come_again_when_so_many_will_have_ended() -> None:
    eta = QueueEta()
    assert eta.seconds(1, 4) == 1
    for seconds in (1000.0, *[8.0] * 16):
        eta.record(seconds)
    assert eta.seconds(1, 4) == 2
    assert eta.seconds(5, 4) == 10
    assert eta.seconds(1, 32) == 1


def said(text: bytes, *stop: str, cut: int = 1) -> list[tuple[str, bytes]]:
    """Pieces of an answer whose tokens are `cut` bytes long, with their logprobs' bytes."""
    answer = PieceBuilder(0, stop)
    pieces: list[Piece | None] = []
    for start in range(0, len(text), cut):
        if answer.stopped:
            break
        part = text[start : start + cut]
        pieces.append(answer.add(start, part, TokenLogprob(start, part, -1.0)))
    pieces.append(answer.finish())
    return [(p.text, b"".join(each.piece for each in p.logprobs)) for p in pieces if p]


def test_a_character_comes_with_the_logprobs_of_all_its_tokens() -> None:
    assert said("中文".encode()) == [("中", "中".encode()), ("文", "文".encode())]


def test_half_a_character_is_not_text_but_its_tokens_were_chosen() -> None:
    assert said("中".encode()[:2]) == [("", "中".encode()[:2])]


def test_nothing_is_said_of_tokens_after_the_stop_string() -> None:
    assert said(b"abcdef", "cd") == [("a", b"a"), ("b", b"b")]
    assert said(b"abcdef", "ce", "cdx") == [("a", b"a"), ("b", b"b"), ("cde", b"cde"), ("f", b"f")]
    assert said(b"abcd", "cdx") == [("a", b"a"), ("b", b"b"), ("cd", b"cd")]
    assert said(b"abc", "c", "bcd") == [("a", b"a"), ("b", b"b")]


def test_a_token_that_the_stop_string_begins_in_is_told_whole() -> None:
    assert said(b"abcdefgh", "d", cut=3) == [("abc", b"abc")]
    assert said(b"abcdefgh", "f", cut=3) == [("abc", b"abc"), ("de", b"def")]


@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_logprobs_are_the_log_softmax_of_the_row(top: int) -> None:
    rng = np.random.default_rng(top)
    row = rng.normal(0, 5, 152_064).astype(np.float32) + 80  # exp of that would overflow
    logs = [float(x) for x in row]
    total = math.fsum(math.exp(x - 80) for x in logs)
    best = sorted(range(len(logs)), key=lambda i: -logs[i])[:top]
    found = token_logprob(row, 7, top, lambda token: b"%d" % token)
    assert (found.token, found.piece) == (7, b"7")
    assert found.logprob == pytest.approx(logs[7] - 80 - math.log(total), abs=1e-5)
    assert [each[:2] for each in found.top] == [(i, b"%d" % i) for i in best]
    for i, (_, _, value) in zip(best, found.top, strict=True):
        assert value == pytest.approx(logs[i] - 80 - math.log(total), abs=1e-5)


def test_a_sure_token_has_logprob_zero_and_tokens_that_cannot_come_are_no_trouble() -> None:
    row = np.array([-np.inf, 100, -np.inf], np.float32)
    found = token_logprob(row, 1, 20, lambda token: b"")
    assert found.logprob == 0
    assert [each[0] for each in found.top] == [1, 0, 2]
    assert found.top[2][2] == -math.inf
