"""Answers with drafts are the answers without, and leave the same KV cache."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import llama_cpp as llama
from numpy.typing import NDArray

from dots1_local.chat.dialogue import Overflow
from dots1_local.chat.message import Message, Stats
from dots1_local.chat.prompt import Prompter
from dots1_local.chat.sampling import Sampling
from dots1_local.chat.session import Session
from dots1_local.engine.engine import Engine
from tests.chat.conftest import GREEDY, Talk
from tests.conftest import Converted
from tests.helpers import all_logits, tokens_of

TALE = (
    " Once upon a time, there was a little girl named Lily. She loved to play outside in the sun. "
    "One day, she saw a big, red ball under a tree. She wanted to play with the ball, but it was "
    "too high. Her mom helped her to get the ball, and Lily was very happy."
)
N_DRAFT = 15
ALPHABET = [*range(65, 91), 65]  # an answer without an end: it begins again after the Z


@pytest.fixture(scope="module")
def plain(converted: Converted) -> Iterator[Engine]:
    yield from opened(converted, 0, all_logits=True)


@pytest.fixture(scope="module")
def drafting(converted: Converted) -> Iterator[Engine]:
    yield from opened(converted, N_DRAFT)


def opened(converted: Converted, n_draft: int, **options: Any) -> Iterator[Engine]:
    path = converted("F32")
    with Engine.open(
        path,
        n_ctx=1024,
        threads=1,
        kv_type="F32",
        flash_attention=False,
        n_draft=n_draft,
        **options,
    ) as engine:
        yield engine


def stats(session: Session) -> Stats:
    assert session.stats is not None
    return session.stats


def say(session: Session, text: str, **options: Any) -> str:
    return "".join(session.ask(text, **options))


def completion(engine: Engine, prompt: str, sampling: Sampling) -> tuple[Message, Stats]:
    with Session(engine, sampling=sampling, draft=N_DRAFT, raw=True) as session:
        say(session, prompt, max_tokens=150)
        return session.messages[-1], stats(session)


def cached(engine: Engine) -> int:
    """The tokens that llama.cpp holds."""
    last: int = llama.llama_memory_seq_pos_max(llama.llama_get_memory(engine.context), 0)
    return last + 1


def margins(engine: Engine, prompt: str, answer: Message) -> NDArray[np.float32]:
    """How far the likeliest token was above the next one, for each token of an answer."""
    assert answer.tokens
    asked = engine.tokenize(prompt, special=False)
    engine.forget()
    rows = all_logits(engine, [*asked, *answer.tokens])[len(asked) - 1 :]
    best = np.sort(rows, axis=1)[:, -2:]
    return best[:, 1] - best[:, 0]


@pytest.mark.parametrize("prompt", [(TALE * 2)[:-60], TALE[:-30], " Tom had a dog."])
@pytest.mark.usefixtures("short_matches")
def test_greedy_text_is_the_same(plain: Engine, drafting: Engine, prompt: str) -> None:
    expected, _ = completion(plain, prompt, GREEDY)
    assert margins(plain, prompt, expected).min() > 1e-3  # else rounding decides
    written, figures = completion(drafting, prompt, GREEDY)
    assert written == expected
    assert 10 < figures.accepted_tokens < figures.drafted_tokens


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.usefixtures("short_matches")
def test_a_sampled_answer_is_the_same(plain: Engine, drafting: Engine, seed: int) -> None:
    sampling = Sampling(0.5, seed=seed, repeat_penalty=1.05, presence_penalty=0.1)
    expected, _ = completion(plain, TALE * 2, sampling)
    written, figures = completion(drafting, TALE * 2, sampling)
    assert written == expected
    assert 0 < figures.accepted_tokens < figures.drafted_tokens


def test_auto_does_not_change_the_text(plain: Engine, drafting: Engine) -> None:
    prompt = (TALE * 2)[:-60]
    expected, _ = completion(plain, prompt, GREEDY)
    with Session(drafting, sampling=GREEDY, raw=True) as session:
        assert say(session, prompt, max_tokens=150) == expected.text


@pytest.mark.usefixtures("short_matches")
def test_rejected_drafts_leave_the_cache_of_a_fresh_computation(
    plain: Engine, drafting: Engine
) -> None:
    with Session(drafting, sampling=GREEDY, draft=N_DRAFT) as session:
        for question in ("Tell me a story about a cat.", "Tell me a story about a dog."):
            say(session, question, max_tokens=100)
            assert stats(session).drafted_tokens > stats(session).accepted_tokens
        count = session.context_used
        tokens = Prompter(drafting).tokens(session.messages)
    assert cached(drafting) == count
    continued = drafting.decode(tokens[count : count + 1], count)

    def difference(fresh: list[int]) -> float:
        plain.forget()
        return float(np.abs(continued - plain.decode(fresh, 0)).max())

    assert difference(tokens[: count + 1]) < 1e-3
    assert difference(tokens[1 : count + 1]) > 0.01  # one token less shows


def test_drafts_save_ubatches(talk: Talk, submitted: list[int]) -> None:
    session = talk(ALPHABET, n_draft=7)
    text = bytes(ALPHABET[:26] * 4).decode()
    assert say(session, "hi", max_tokens=104) == text
    # After the first 26 letters and 12 more they are drafted, 7 at a time and then the last one.
    assert submitted[1:] == [1] * 37 + [8] * 8 + [2]
    assert stats(session).drafted_tokens == stats(session).accepted_tokens == 57


@pytest.mark.parametrize("cut", [*range(36, 50), 104])
def test_an_answer_can_be_cut_inside_a_draft(talk: Talk, cut: int) -> None:
    session, fresh = talk(ALPHABET, n_draft=7), talk(ALPHABET)
    text = bytes(ALPHABET[:26] * 4).decode()
    assert say(session, "hi", max_tokens=cut) == text[:cut]
    assert stats(session).stop == "length"
    assert session.messages[-1].tokens == tuple(tokens_of(text[:cut]))
    say(fresh, "hi", max_tokens=cut)
    assert session.context_used == fresh.context_used


def test_a_stop_string_ends_an_answer_inside_a_draft(talk: Talk) -> None:
    session = talk(ALPHABET, n_draft=7, stop=("OPQRSTUVWXYZABCDEFGHIJKLMNOPQR",))
    assert say(session, "hi") == bytes(ALPHABET[:14]).decode()
    assert (stats(session).stop, stats(session).generated_tokens) == ("stop", 44)
    assert stats(session).accepted_tokens > 0


@pytest.mark.parametrize("pieces", range(1, 60, 4))
@pytest.mark.usefixtures("short_matches")
def test_a_cancelled_answer_leaves_the_state_of_one_without_drafts(
    plain: Engine, drafting: Engine, pieces: int
) -> None:
    found = []
    for engine in (plain, drafting):
        with Session(engine, sampling=GREEDY, draft=N_DRAFT, raw=True) as session:
            stream = session.ask((TALE * 2)[:-60])
            list(islice(stream, pieces))
            stream.close()
            assert stats(session).stop == "interrupted"
            assert cached(engine) == session.context_used
            answer = say(session, "And then?", max_tokens=30)
            found.append((session.messages, answer, session.context_used))
    assert found[0] == found[1]


@pytest.mark.parametrize("overflow", ["drop", "stop"])
def test_a_full_context_is_handled_as_without_drafts(talk: Talk, overflow: Overflow) -> None:
    sessions = [talk(ALPHABET, n_draft=n, n_ctx=128, overflow=overflow) for n in (0, 7)]
    for number in range(4):
        results = []
        for session in sessions:
            if overflow == "stop":
                session.clear()
            say(session, f"q{number}", max_tokens=200)
            figures = stats(session)
            results.append(
                (session.messages, figures.stop, figures.dropped_turns, session.context_used)
            )
        assert results[0] == results[1]
    assert stats(sessions[1]).accepted_tokens > 20


@pytest.mark.usefixtures("short_matches")
def test_a_saved_cache_has_no_draft(drafting: Engine, tmp_path: Path) -> None:
    path = tmp_path / "saved.kv"
    with Session(drafting, sampling=GREEDY, draft=N_DRAFT) as session:
        stream = session.ask("Tell me a story about a cat.")
        list(islice(stream, 40))
        stream.close()
        messages, used = session.messages, session.context_used
        assert session.save_state(path)
        expected = say(session, "And then?", max_tokens=30)
    with Session(drafting, sampling=GREEDY, draft=N_DRAFT) as resumed:
        resumed.messages = messages
        assert resumed.load_state(path) == used
        assert say(resumed, "And then?", max_tokens=30) == expected


def test_drafts_are_as_long_as_the_engine_has_room_for(talk: Talk, submitted: list[int]) -> None:
    for options, size in (({"draft": 9}, 5), ({"draft": 2}, 3), ({"draft": 0}, 1)):
        session = talk(ALPHABET, n_draft=4, **options)
        say(session, "hi", max_tokens=80)
        assert max(submitted[1:]) == size
        submitted.clear()
    session = talk(ALPHABET, n_draft=30, n_ubatch=4)
    say(session, "hi", max_tokens=80)
    assert max(submitted) == 4
