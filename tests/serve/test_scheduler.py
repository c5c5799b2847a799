from collections.abc import Iterator
from pathlib import Path

import pytest

from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.serve.generation import Event, Finished, Piece, QueueFull
from dots1_local.serve.scheduler import Scheduler, State
from tests.helpers import EOS, TOKENS, scripted_tensors, tokens_of, write_random_gguf
from tests.serve.scheduling import Alone, Listener, Served, open_engine, order, serving

ASK = [TOKENS.index("<|response|>")]
ENDLESS = "abcdefghijklmnopqrstuvwxyza"


def scripted(folder: Path, answer: str, *, ends: bool = True) -> Path:
    tokens = [*tokens_of(answer), *([EOS] if ends else [])]
    return write_random_gguf(folder / "scripted.gguf", tensors=scripted_tensors(tokens))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After each letter it writes the next one, and never ends."""
    return scripted(tmp_path_factory.mktemp("endless"), ENDLESS, ends=False)


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: what it writes depends on all that came before."""
    return write_random_gguf(tmp_path_factory.mktemp("wild") / "model.gguf")


@pytest.fixture
def served(endless: Path) -> Iterator[Served]:
    with serving(endless) as served:
        yield served


def test_tells_the_text_and_then_how_it_ended(tmp_path: Path) -> None:
    with serving(scripted(tmp_path, "yes")) as served:
        listener = served.ask(order([*b"hi", *ASK])).wait()
    *pieces, finished = listener.events
    assert pieces == [Piece(0, "y"), Piece(0, "e"), Piece(0, "s")]
    # As others count, the end token is one of those that were written.
    assert finished == Finished(0, "stop", prompt_tokens=3, cached_tokens=0, completion_tokens=4)


@pytest.mark.parametrize(
    ("options", "text", "reason", "written"),
    [
        ({"max_tokens": 3}, "bcd", "length", 3),
        ({"stop": ("ef",)}, "bcd", "stop", 5),
        ({"stop": ("efX", "h")}, "bcdefg", "stop", 7),
        ({"stop": ("de",), "max_tokens": 4}, "bc", "stop", 4),
        ({"stop": ("de",), "max_tokens": 3}, "bcd", "length", 3),
    ],
)
def test_ends_where_it_is_told_to(
    served: Served, options: dict[str, object], text: str, reason: str, written: int
) -> None:
    listener = served.ask(order("a", **options)).wait()
    assert listener.text() == text
    assert listener.finished().reason == reason
    assert listener.finished().completion_tokens == written


@pytest.mark.parametrize("wanted", [None, 1000])
def test_ends_where_the_context_does(endless: Path, wanted: int | None) -> None:
    with serving(endless, n_ctx=64) as served:
        listener = served.ask(order("a" * 60, max_tokens=wanted)).wait()
        assert (listener.text(), listener.finished().reason) == ("bcde", "length")
        served.ask(order("a" * 63)).wait()
        for length in (64, 65):
            with pytest.raises(Dots1Error, match=f"is {length} tokens long and .* holds 64"):
                served.ask(order("a" * length))


def test_parallel_answers_are_those_given_alone(wild: Path) -> None:
    prompts = [bytes(range(i, i + 3 + 11 * (i % 9))) for i in range(24)]
    with serving(wild, slots=5, n_ubatch=48) as served:
        listeners = [served.ask(order(p, max_tokens=30, top_logprobs=0)) for p in prompts]
        for listener in listeners:
            listener.wait()
        widest = max(len({entry.seq_id for entry in ubatch}) for ubatch in served.ubatches)
    assert widest == 5
    alone = Alone(wild)
    for prompt, listener in zip(prompts, listeners, strict=True):
        alone.check(prompt, listener.logprobs())
    with pytest.raises(AssertionError):  # it would have told them apart
        alone.check(prompts[-2], listeners[-1].logprobs())


def test_who_writes_gets_a_token_in_every_ubatch(endless: Path) -> None:
    with serving(endless, n_ctx=1024, n_ubatch=512) as served:
        served.hold()
        writer = served.ask(order("a", max_tokens=40))
        served.next_ubatch()
        served.ask(order("x" * 1000, max_tokens=1))
        served.release()
        writer.wait()
        alone, *beside = served.ubatches[:41]
    assert len(alone) == 1
    assert all(ubatch[0].seq_id == alone[0].seq_id for ubatch in beside[:39])
    assert sum(len(ubatch) > 1 for ubatch in beside) >= 2
    assert len(beside[0]) == 1 + 32  # as long as nobody knows how long that takes


def test_prompts_alone_are_read_in_whole_ubatches(endless: Path) -> None:
    with serving(endless, n_ctx=512, n_ubatch=128) as served:
        served.hold()
        listeners = [served.ask(order(text * 200, max_tokens=1)) for text in ("x", "y")]
        served.release()
        for listener in listeners:
            listener.wait()
    assert [len(ubatch) for ubatch in served.ubatches] == [128, 128, 128, 16]


def test_first_in_first_out(endless: Path) -> None:
    finished: list[str] = []
    with serving(endless, slots=1) as served:
        last = Listener()
        for name in "abc":

            def note(event: Event, name: str = name) -> None:
                if isinstance(event, Finished):
                    finished.append(name)

            served.submit([order(name * 10, max_tokens=3)], note)
        served.submit([order("z", max_tokens=1)], last)
        last.wait()
    assert finished == ["a", "b", "c"]


def test_more_choices_than_slots_take_turns(served: Served) -> None:
    listener = served.ask(*(order(letter, max_tokens=4) for letter in "abcdefg")).wait()
    texts = [listener.text(index) for index in range(7)]
    assert texts == ["bcde", "cdef", "defg", "efgh", "fghi", "ghij", "hijk"]


def test_a_full_queue_refuses_whole_requests(endless: Path) -> None:
    with serving(endless, slots=1, queue_size=2) as served:
        served.hold()
        first = served.ask(*[order("a", max_tokens=2)] * 9)  # nothing is before it
        served.next_ubatch()
        assert served.state == State(running=1, waiting=8, slots=1)
        with pytest.raises(QueueFull, match="8 answers are waiting") as refused:
            served.ask(order("b"))
        assert refused.value.retry_after >= 1
        served.release()
        first.wait()

        served.hold()
        running = Listener()
        served.submit([order("a", max_tokens=2)], running)
        ticket = served.submit([order("b")], Listener())
        with pytest.raises(QueueFull):
            served.ask(order("c"), order("d"))
        served.ask(order("c", max_tokens=1))
        ticket.cancel()
        last = served.ask(order("d", max_tokens=1))
        with pytest.raises(QueueFull):
            served.ask(order("e"))
        served.release()
        assert last.wait().text() == "e"


def test_who_leaves_frees_the_sequence_before_the_next_ubatch(endless: Path) -> None:
    with serving(endless, slots=1) as served:
        served.hold()
        leaving = Listener()
        ticket = served.submit([order("a"), order("q")], leaving)
        served.next_ubatch()
        next_one = served.ask(order("xy", max_tokens=1))
        ticket.cancel()
        ticket.cancel()
        assert served.state == State(running=0, waiting=1, slots=1)
        served.go_on()
        assert [entry.token for entry in served.next_ubatch()] == [*b"xy"]
        served.release()
        next_one.wait()
        assert leaving.events == []


def test_a_listener_may_leave_from_within(served: Served) -> None:
    heard: list[Event] = []

    def listen(event: Event) -> None:
        heard.append(event)
        if len(heard) == 3:
            ticket.cancel()

    served.hold()
    ticket = served.submit([order("a")], listen)
    served.release()
    assert served.ask(order("b" * 50, max_tokens=50)).wait().finished().reason == "length"
    assert heard == [Piece(0, "b"), Piece(0, "c"), Piece(0, "d")]


def test_logprobs_come_with_the_text_of_their_tokens(endless: Path, wild: Path) -> None:
    with serving(endless) as served:
        listener = served.ask(order("a", top_logprobs=2, stop=("dex", "gh"))).wait()
    pieces = [event for event in listener.events if isinstance(event, Piece)]
    spoken = [(p.text, b"".join(each.piece for each in p.logprobs)) for p in pieces]
    assert spoken == [("b", b"b"), ("c", b"c"), ("def", b"def")]
    with serving(wild) as served:
        listener = served.ask(order("hello", top_logprobs=3, max_tokens=20)).wait()
    for each in listener.logprobs():
        assert each.top[0] == (each.token, each.piece, each.logprob)
        assert [likely[2] for likely in each.top] == sorted((t[2] for t in each.top), reverse=True)
        assert len(each.top) == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": ""}, "nothing to complete"),
        ({"prompt": [len(TOKENS)]}, f"from 0 to {len(TOKENS) - 1}"),
        ({"prompt": [-1]}, "are numbers from 0"),
        ({"prompt": "a", "max_tokens": 0}, "at most 0 tokens"),
        ({"prompt": "a", "stop": ("b", "")}, "stop string is empty"),
    ],
)
def test_refuses_orders_that_would_fail_later(
    served: Served, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        served.ask(order("fine"), order(**options))  # type: ignore[arg-type]
    assert served.state == State(running=0, waiting=0, slots=2)


def test_refuses_engines_that_would_abort(wild: Path) -> None:
    with (
        open_engine(wild, 64, 64, n_sequences=2) as engine,
        pytest.raises(UsageError, match="shared_cache"),
    ):
        Scheduler(engine)
    with (
        open_engine(wild, 64, 2, n_sequences=3, shared_cache=True) as engine,
        pytest.raises(UsageError, match="no room for one of each of 3"),
    ):
        Scheduler(engine)


def test_one_sequence_needs_no_shared_cache(endless: Path) -> None:
    with Engine.open(endless, n_ctx=64, threads=1) as engine:
        scheduler = Scheduler(engine)
        listener = Listener()
        scheduler.submit([order("a", max_tokens=2)], listener)
        assert listener.wait().text() == "bc"
        scheduler.close(0)
