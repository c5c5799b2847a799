"""Conversations with a server: requests, answers, and connections that break."""

from threading import Event
from typing import Any

import pytest

from dots1_local.chat.conversation import load_conversation, save_conversation
from dots1_local.chat.message import Message
from dots1_local.chat.remote.address import Key
from dots1_local.chat.sampling import Sampling
from dots1_local.errors import Dots1Error, UsageError
from tests.chat.remote.conftest import Talk, say, texts
from tests.openai_server import Played, answer, as_json, chunk, refused, sse, usage

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def test_turns_go_back_and_forth(talk: Talk) -> None:
    session, server = talk(answer("Hel", "lo"), answer("a 🐈"), answer("again"))
    assert list(session.ask("hi")) == ["", "Hel", "lo", "", ""]
    assert say(session, "and?") == "a 🐈"
    assert "".join(session.regenerate()) == "again"
    assert [each.path for each in server.asked] == ["/v1/models", *["/v1/chat/completions"] * 3]
    hello = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello"}]
    asked = [SYSTEM, *hello, {"role": "user", "content": "and?"}]
    assert [body["messages"] for body in server.bodies] == [asked[:2], asked, asked]
    assert texts(session)[1:] == ["hi", "Hello", "and?", "again"]
    assert session.undo() == Message("user", "and?")
    session.clear()
    assert texts(session) == [SYSTEM["content"]]


def test_a_request_has_the_parameters_of_vllm_sglang_and_llama_cpp(talk: Talk) -> None:
    sampling = Sampling(
        0.5, 0, 0.9, 0.1, 1.1, (1 << 64) + 7, presence_penalty=0.5, logit_bias=((3, -100),)
    )
    session, server = talk(answer("a"), sampling=sampling, stop=("END",), max_tokens=9)
    say(session, "hi")
    assert server.bodies == [
        {
            "model": "dots1",
            "messages": [SYSTEM, {"role": "user", "content": "hi"}],
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "repeat_penalty": 1.1,
            "seed": 7,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.5,
            "logit_bias": {"3": -100},
            "max_tokens": 9,
            "stop": ["END"],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_raw_completes_one_document(talk: Talk) -> None:
    pieces = [
        {"object": "text_completion", "choices": [{"index": 0, "text": each}]} for each in "xy"
    ]
    end = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
    played = Played([sse(*pieces, end)])
    session, server = talk(played, played, raw=True)
    with pytest.raises(UsageError, match="nothing to complete"):
        session.ask("")
    assert say(session, "ab") == "xy"
    say(session, "cd")
    assert [each["prompt"] for each in server.bodies] == ["ab", "abxycd"]
    assert server.asked[-1].path == "/v1/completions"


def test_an_empty_system_prompt_is_sent_if_there_is_none(talk: Talk) -> None:
    session, server = talk(answer("a"), system="")
    say(session, "hi")
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": ""}
    assert session.system == ""


LLAMA_TIMINGS = {
    "cache_n": 12, "prompt_n": 10, "prompt_ms": 20.0, "prompt_per_second": 500.0,
    "predicted_n": 3, "predicted_ms": 30.0, "predicted_per_second": 100.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "prompt", "reused", "generated"),
    [
        (usage(22, 3), 22, None, 3),  # vLLM
        (usage(22, 3, 12), 22, 12, 3),  # vLLM and SGLang, if they report the cache
        (usage(22, 3, timings=LLAMA_TIMINGS), 22, 12, 3),
        (usage(22, 3, 99), 22, None, 3),  # more cached tokens than tokens
        ({"choices": [], "usage": {"prompt_tokens": -1, "completion_tokens": True}}, None, None, 1),
        ({"choices": [], "usage": None}, None, None, 1),
    ],
)
def test_figures_come_from_the_server_or_are_unknown(
    talk: Talk, counts: Any, prompt: int | None, reused: int | None, generated: int
) -> None:
    session, _ = talk(Played([sse(chunk("abc"), chunk(finish="stop"), counts)]))
    say(session, "hi")
    stats = session.stats
    assert stats is not None
    assert (stats.prompt_tokens, stats.reused_tokens) == (prompt, reused)
    assert (stats.generated_tokens, stats.estimate) == (generated, prompt is None)
    assert (stats.prompt_speed is None) == (reused is None)
    assert session.context_used == (None if prompt is None else 25)
    session.undo()
    assert session.context_used is None


def test_the_times_of_llama_cpps_server_are_used(talk: Talk) -> None:
    counts = usage(22, 3, timings=LLAMA_TIMINGS)
    session, _ = talk(Played([sse(chunk("abc"), chunk(finish="stop"), counts)]))
    say(session, "hi")
    assert session.stats is not None
    assert session.stats.prompt_speed == pytest.approx(500)
    assert session.stats.generation_speed == pytest.approx(100)


@pytest.mark.parametrize(
    ("end", "limit", "prompt", "stop"),
    [
        (chunk(finish="stop"), None, 20, "end"),
        (chunk(finish="stop", stop_reason=None), None, 20, "end"),
        (chunk(finish="stop", stop_reason="END"), None, 20, "stop"),  # vLLM
        (chunk(finish="stop", stop_reason=151645), None, 20, "end"),  # a token
        (chunk(finish="stop", matched_stop="END"), None, 20, "stop"),  # SGLang
        (chunk(finish="length"), 2, 20, "length"),
        (chunk(finish="length"), 9, 2046, "context"),
        (chunk(finish="length"), None, 2040, "context"),
        (chunk(finish="length"), None, 20, "length"),  # a limit of the server's own
        (chunk(finish="tool_calls"), None, 20, "end"),
    ],
)
def test_why_an_answer_ended(
    talk: Talk, end: Any, limit: int | None, prompt: int, stop: str
) -> None:
    session, _ = talk(Played([sse(chunk("a"), chunk("b"), end, usage(prompt, 2))]))
    list(session.ask("hi", limit))
    assert session.stats is not None
    assert session.stats.stop == stop


def test_reasoning_and_malformed_fields_are_ignored(talk: Talk) -> None:
    other = chunk()
    other["choices"][0]["delta"] = {"reasoning_content": "hm", "content": None, "tool_calls": [{}]}
    strange = [{"choices": "x"}, {"choices": [7]}, {"choices": [{"delta": 7}]}, {}]
    stream = sse(other, *strange, chunk("a"), chunk(finish="stop"))
    session, _ = talk(Played([b": ping\n\n", stream]))
    assert say(session, "hi") == "a"


def test_the_answer_is_the_choice_with_index_0(talk: Talk) -> None:
    both = {"choices": [{"index": 1, "delta": {"content": "B"}}, *chunk("A")["choices"]]}
    other = {"choices": [{"index": 1, "delta": {"content": "B"}, "finish_reason": "stop"}]}
    session, _ = talk(Played([sse(both, other, chunk("a"), chunk(finish="stop"))]))
    assert say(session, "hi") == "Aa"


def test_text_that_is_not_unicode_is_sent_as_unicode(talk: Talk) -> None:
    session, server = talk(answer("a"))
    say(session, "caf\udce9 中")  # as the command line gives a byte that is not UTF-8
    assert server.bodies[0]["messages"][1]["content"] == "caf? 中"


def test_an_error_of_null_is_ignored(talk: Talk) -> None:
    session, _ = talk(Played([sse({**chunk("a"), "error": None}, chunk(finish="stop"))]))
    assert say(session, "hi") == "a"


def test_a_key_is_not_shown_by_an_error_in_mid_answer(talk: Talk) -> None:
    key = Key("s3cret", "DOTS1_API_KEY")
    session, _ = talk(Played([sse(chunk("a"), {"error": "s3cret is no key"})]), key=key)
    with pytest.raises(Dots1Error, match=r"\(the key\) is no key") as caught:
        say(session, "hi")
    assert "s3cret" not in str(caught.value)


def test_an_answer_may_lack_done_or_come_in_one_piece(talk: Talk) -> None:
    whole = {"choices": [{"message": {"role": "assistant", "content": "all"},
                          "finish_reason": "stop"}], **{"usage": usage(5, 1)["usage"]}}  # fmt: skip
    session, _ = talk(Played([sse(chunk("a"), chunk(finish="stop"), done=False)]), as_json(whole))
    assert say(session, "one") == "a"
    assert say(session, "two") == "all"
    assert session.context_used == 6
    assert session.stats is not None  # one piece has no pace, so the whole time counts
    assert session.stats.generation_seconds >= session.stats.prompt_seconds


@pytest.mark.parametrize(
    ("played", "words"),
    [
        (Played([sse(chunk("par"), done=False)], cut=True), "cut"),
        (Played([sse(chunk("par"), done=False)]), "middle of the answer"),
        (Played([sse(chunk("par"), chunk(finish="abort"))]), "middle of the answer"),
        (Played([sse(chunk("par"), {"error": {"message": "EngineDead", "code": 500}})]),
         "EngineDead"),
        (Played([sse(chunk("par"), {"object": "error", "message": "out of memory"})]),
         "out of memory"),
        (Played([sse(chunk("par"), done=False), b"data: {\n\n"]), "not JSON"),
        (Played([sse(chunk("par"), done=False), b'data: {"a": 1, "a": 1}\n\n']), "'a' twice"),
        (Played([sse(chunk("par"), done=False), b'data: {"a": "\\ud83d"}\n\n']), "surrogate"),
    ],
)  # fmt: skip
def test_an_answer_that_breaks_off_is_kept(talk: Talk, played: Played, words: str) -> None:
    session, server = talk(played)
    with pytest.raises(Dots1Error, match=words) as caught:
        say(session, "hi")
    assert server.url in str(caught.value)
    assert texts(session)[1:] == ["hi", "par"]
    assert session.stats is not None
    assert (session.stats.stop, session.stats.estimate) == ("interrupted", True)


@pytest.mark.parametrize(
    ("played", "words"),
    [
        (Played([], cut=True), "cut"),
        (Played([sse()]), "middle of the answer"),
        (Played([b"<html>"], kind="text/html"), "not JSON"),
        (Played([b"\xff\xfe\x00"], kind="application/octet-stream"), "not UTF-8"),
        (Played([b"[]"], kind="application/json"), "array"),
        (Played([sse({"error": {"message": "no"}})]), ": no$"),
        (Played([sse({"error": {"code": 500}})]), "error$"),
        (refused("EngineCore encountered an issue.", 500), "500: EngineCore"),
        (Played([], headers={f"X{n}": "y" * 99 for n in range(2000)}), "HTTP"),
        (Played([], headers={"X": "y" * 200_000}), "HTTP"),
    ],
)  # fmt: skip
def test_a_failed_question_leaves_the_conversation_as_it_was(
    talk: Talk, played: Played, words: str
) -> None:
    session, server = talk(answer("a"), played)
    say(session, "one")
    before = session.messages
    with pytest.raises(Dots1Error, match=words) as caught:
        say(session, "two")
    assert server.url in str(caught.value)
    assert session.messages is before


def test_characters_arrive_whole_however_the_network_cuts_them(talk: Talk) -> None:
    stream = sse(chunk("中"), chunk("文"), chunk(finish="stop"), done=False)
    session, _ = talk(Played([stream[n : n + 1] for n in range(len(stream))]))
    assert [piece for piece in session.ask("hi") if piece] == ["中", "文"]


class Leaving(Exception):
    """The caller stops waiting for the answer."""


def test_waiting_for_the_first_word_can_be_stopped(talk: Talk) -> None:
    held = Event()
    session, server = talk(Played([sse(chunk(""), done=False), held, b"x" * 10_000_000]))
    before = session.messages
    waited = []

    def leave(done: int, total: int, unit: str, what: str) -> None:
        waited.append(total)
        if len(waited) > 3:
            raise Leaving

    with pytest.raises(Leaving):
        list(session.ask("hi", progress=leave))
    assert session.messages is before
    held.set()
    assert server.left.wait(30)  # so that the server's slot is free


def test_an_answer_that_is_closed_stays_as_far_as_it_arrived(talk: Talk) -> None:
    held = Event()
    started = sse(chunk("one"), chunk("two"), done=False)
    session, server = talk(Played([started, held, b"x" * 10_000_000]), answer("next"))
    stream = session.ask("hi")
    assert next(stream) == "one"
    assert session.so_far[-1] == Message("assistant", "one")
    stream.close()
    assert texts(session)[1:] == ["hi", "one"]
    assert session.stats is not None
    assert session.stats.stop == "interrupted"
    held.set()
    assert server.left.wait(30)
    assert say(session, "go on") == "next"


def test_a_conversation_can_be_saved(talk: Talk, tmp_path: Any) -> None:
    session, _ = talk(answer("a"))
    say(session, "hi")
    path = tmp_path / "talk.json"
    save_conversation(path, session)
    assert session.save_state(tmp_path / "talk.kv") == 0
    assert session.load_state(tmp_path / "talk.kv") == 0
    assert sorted(tmp_path.iterdir()) == [path]
    found = load_conversation(path)
    assert (found.model, found.messages) == ("dots1", tuple(session.messages))
