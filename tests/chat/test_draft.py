"""Where drafts come from, and when there are none."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dots1_local.chat.draft import MATCH, Draft, Drafter, DraftPolicy, NgramIndex, longest_draft
from dots1_local.errors import UsageError
from tests.helpers import tokens_of

PHRASE = tokens_of("the cat sat.")  # of MATCH tokens


def index_of(*parts: Sequence[int]) -> NgramIndex:
    index = NgramIndex()
    for part in parts:
        index.extend(part)
    return index


def text(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode()


def test_the_phrase_is_just_long_enough() -> None:
    assert len(PHRASE) == MATCH


def test_a_draft_is_what_followed_before() -> None:
    index = index_of(b"Once the cat sat. It slept. And then the cat sat.")
    assert text(index.draft(10)) == " It slept."
    assert text(index.draft(3)) == " It"
    assert index.draft(0) == []
    index.extend(b" ")
    assert text(index.draft(3)) == "It "
    index.extend(b"H")
    assert index.draft(3) == []


def test_a_match_must_be_whole() -> None:
    assert text(index_of(b"the cat sat. Yes. the cat sat.").draft(4)) == " Yes"
    assert index_of(b"The cat sat. Yes. the cat sat.").draft(4) == []
    assert index_of(b"the cat").draft(4) == []
    assert index_of(b"").draft(4) == []


def test_the_last_occurrence_counts() -> None:
    index = index_of(b"the cat sat. One. the cat sat. Two. ", PHRASE)
    assert text(index.draft(5)) == " Two."


def test_a_text_that_repeats_itself_is_continued_beyond_its_end() -> None:
    assert text(index_of(b"ab" * 8).draft(5)) == "ababa"
    assert text(index_of(b"x" + b"la " * 6).draft(7)) == "la la l"


def test_another_text_replaces_the_first() -> None:
    index = index_of(PHRASE, b" One. ")
    index.begin(tokens_of("the cat sat. One. Then the cat sat."))
    assert text(index.draft(5)) == " One."
    index.begin(tokens_of("the cat sat. Two. Then the cat sat."))
    assert text(index.draft(5)) == " Two."
    index.begin(PHRASE)
    assert index.draft(5) == []


def searched(tokens: list[int], limit: int) -> list[int]:
    """The same draft by a search through the whole text."""
    last = tokens[-MATCH:]
    for place in reversed(range(MATCH, len(tokens))):
        if tokens[place - MATCH : place] == last:
            longer = list(tokens)
            for offset in range(limit):
                longer.append(longer[place + offset])
            return longer[len(tokens) :]
    return []


PHRASES = st.lists(st.integers(0, 152_063), min_size=1, max_size=20)


@given(st.lists(PHRASES, min_size=1, max_size=4), st.data())
def test_the_index_finds_what_a_search_finds(phrases: list[list[int]], data: Any) -> None:
    index, tokens = NgramIndex(), list[int]()
    for phrase in data.draw(st.lists(st.sampled_from(phrases), max_size=12)):
        if data.draw(st.booleans()):
            tokens += phrase
            index.extend(phrase)
        elif data.draw(st.booleans()):
            tokens = [*tokens[: data.draw(st.integers(0, len(tokens)))], *phrase]
            index.begin(tokens)
        for token in data.draw(st.lists(st.sampled_from(phrase), max_size=2)):
            tokens.append(token)
            index.extend([token])
        limit = data.draw(st.integers(0, 40))
        assert index.draft(limit) == searched(tokens, limit)
        assert len(index) == len(tokens)


def step(drafter: Drafter, seconds: float, right: int) -> int:
    """A step of which so many drafted tokens turn out right; return the draft's length."""
    draft = drafter.propose(1000)
    drafter.computed(seconds)
    for token in draft[:right]:
        assert drafter.accept(token)
    drafter.end()
    return len(draft)


def repeating(policy: DraftPolicy) -> Drafter:
    drafter = Drafter(policy)
    drafter.begin(b"abcdefghijklmnopqrstuvwxyz" * 40)
    return drafter


def test_auto_drafts_grow_while_they_are_right_and_pay() -> None:
    drafter = repeating(DraftPolicy(30, auto=True))
    assert [step(drafter, 1, 99) for _ in range(6)] == [0, 0, 0, 0, 15, 30]
    assert step(drafter, 8, 12) == 30  # pays, though it was not right to the end
    assert step(drafter, 4, 99) == 15
    assert (drafter.drafted, drafter.accepted) == (90, 72)


def test_auto_stops_for_longer_and_longer_while_drafts_do_not_pay() -> None:
    drafter = repeating(DraftPolicy(30, auto=True))
    lengths = [step(drafter, 16.5 if number > 3 else 1, 99) for number in range(5)]
    assert lengths == [0, 0, 0, 0, 15]  # 16 tokens in 16.5 seconds; one by one they take 16
    for pause in (16, 32, 64):
        assert [step(drafter, 1, 0) for _ in range(pause)] == [0] * pause
        assert step(drafter, 3, 1) > 0
    assert [step(drafter, 1, 0) for _ in range(128)] == [0] * 128
    assert step(drafter, 2, 3) == 15  # pays
    assert step(drafter, 9, 0) == 15
    assert [step(drafter, 1, 0) for _ in range(17)] == [0] * 16 + [15]


def test_one_slow_step_without_a_draft_does_not_count() -> None:
    drafter = repeating(DraftPolicy(30, auto=True))
    for seconds in (100, 1, 1, 1):
        step(drafter, seconds, 0)
    assert step(drafter, 20, 10) == 15
    assert step(drafter, 1, 0) == 0


@pytest.mark.parametrize(("min_batch", "draft", "longest"), [
    (None, "auto", 30), (512, "auto", 30), (16, "auto", 14), (16, 20, 20), (None, 99, 60),
])  # fmt: skip
def test_auto_stays_below_the_ubatches_that_copy_weights(
    min_batch: int | None, draft: Draft, longest: int
) -> None:
    engine: Any = SimpleNamespace(
        params=SimpleNamespace(n_draft=60, n_outputs=61),
        placement=SimpleNamespace(offload_min_batch=min_batch),
    )
    drafter = repeating(DraftPolicy.choose(draft, engine))
    assert max(step(drafter, 1, 99) for _ in range(8)) == longest


def test_a_number_is_always_used() -> None:
    drafter = repeating(DraftPolicy(7, auto=False))
    assert [step(drafter, 99, 0) for _ in range(9)] == [7] * 9
    assert drafter.propose(3) == tokens_of("abc")
    assert drafter.propose(-1) == []


def test_text_that_never_matches_is_never_drafted() -> None:
    drafter = Drafter(DraftPolicy(30, auto=False))
    drafter.begin(range(5000))
    for token in range(5000, 9000):
        assert drafter.propose(30) == []
        assert not drafter.accept(token)
    assert (drafter.drafted, drafter.accepted) == (0, 0)


def test_only_the_next_token_of_the_draft_is_accepted() -> None:
    drafter = repeating(DraftPolicy(5, auto=False))
    assert drafter.propose(5) == tokens_of("abcde")
    assert [drafter.accept(token) for token in tokens_of("abxcd")] == [True, True, *[False] * 3]
    assert drafter.accepted == 2


@pytest.mark.parametrize("draft", [-1, 256, 1 << 40])
def test_refuses_lengths_that_are_not_possible(draft: int) -> None:
    with pytest.raises(UsageError, match=str(draft)):
        longest_draft(draft)
