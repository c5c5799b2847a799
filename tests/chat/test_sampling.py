from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dots1_local.chat.prompt import Prompter
from dots1_local.chat.sampler import Sampler
from dots1_local.chat.sampling import Sampling
from dots1_local.engine.engine import Engine, Entry
from dots1_local.errors import UsageError
from tests.chat.conftest import Talk
from tests.helpers import write_random_gguf

OFF: dict[str, Any] = {"top_k": 0, "top_p": 1, "min_p": 0}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = write_random_gguf(tmp_path_factory.mktemp("sampling") / "model.gguf")
    with Engine.open(path, n_ctx=256, threads=1, kv_type="F32", flash_attention=False) as engine:
        yield engine


def drawn(engine: Engine, chosen: Sampling, count: int = 3000) -> set[int]:
    """Return the tokens that `count` draws after the same text give."""
    engine.forget()
    engine.decode(list(b"the quick brown fox"), 0)
    with Sampler(chosen, engine) as sampler:
        sampler.begin([])
        return {sampler.next(engine) for _ in range(count)}


def candidates(
    logits: NDArray[np.float32], top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> set[int]:
    """Return the tokens that the three cuts leave, one after another, at temperature 1."""
    order = np.argsort(-logits)[: top_k or None]
    shares = np.exp(logits[order] - logits[order[0]])
    before = np.cumsum(shares) - shares
    order, shares = order[before < top_p * shares.sum()], shares[before < top_p * shares.sum()]
    return set(order[shares >= min_p].tolist())


@pytest.mark.parametrize(
    "cut",
    [
        {"top_k": 5},
        {"top_p": 0.3},
        {"min_p": 0.3},
        {"top_k": 30, "top_p": 0.5},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.25},
    ],
)
def test_candidates_are_cut_before_temperature(engine: Engine, cut: dict[str, Any]) -> None:
    engine.forget()
    logits = engine.decode(list(b"the quick brown fox"), 0).copy()
    hot = Sampling(**{**OFF, **cut}, temperature=20, seed=1)
    assert drawn(engine, hot) == candidates(logits, **cut)


def test_low_temperature_is_greedy(engine: Engine) -> None:
    engine.forget()
    likeliest = int(engine.decode(list(b"the quick brown fox"), 0).argmax())
    for chosen in (Sampling(0), Sampling(1e-30), Sampling(1.5, top_k=1), Sampling(9, min_p=1)):
        assert drawn(engine, chosen, 20) == {likeliest}


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_a_repeat_penalty_weakens_the_last_64_tokens_of_prompt_and_answer(
    talk: Talk, engine: Engine, penalty: float
) -> None:
    session = talk(sampling=Sampling(0, repeat_penalty=penalty))
    list(session.ask("tell me all about it", max_tokens=100))
    answer = session.messages[-1].tokens
    assert answer is not None
    tokens = Prompter(engine).tokens(session.messages[:-1])
    engine.forget()
    logits = engine.decode(tokens, 0)
    for token in answer:
        weighed = logits.copy()
        for said in set(tokens[-64:]):
            if weighed[said] > 0:
                weighed[said] /= penalty
            else:
                weighed[said] *= penalty
        assert token == weighed.argmax()
        tokens.append(token)
        logits = engine.decode([token], len(tokens) - 1)


def test_a_repeat_penalty_looks_back_on_64_tokens_of_one_answer(engine: Engine) -> None:
    engine.forget()
    logits = engine.decode(list(b"the quick brown fox"), 0).copy()
    likeliest, worst = int(logits.argmax()), int(logits.argmin())
    assert logits[likeliest] > 0
    with Sampler(Sampling(0, repeat_penalty=10), engine) as sampler:
        for before in (63, 64):
            sampler.begin([likeliest, *[worst] * before])
            assert (sampler.next(engine) == likeliest) == (before == 64)
        sampler.begin([likeliest])
        sampler.begin([])
        assert sampler.next(engine) == likeliest


@pytest.mark.parametrize(("frequency", "presence"), [(0.3, 0), (0, 1.5), (-0.2, 2), (1, -0.5)])
def test_openais_penalties_weaken_tokens_of_the_answer(
    engine: Engine, frequency: float, presence: float
) -> None:
    prompt = list(b"the quick brown fox")
    engine.forget()
    logits = engine.decode(prompt, 0)
    counts = np.zeros(engine.n_vocab)
    sampling = Sampling(0, frequency_penalty=frequency, presence_penalty=presence)
    with Sampler(sampling, engine) as sampler:
        sampler.begin([*prompt, int(logits.argmax())])  # a prompt does not count
        for position in range(len(prompt), 120):
            token = int((logits - frequency * counts - presence * (counts > 0)).argmax())
            assert sampler.next(engine) == token
            counts[token] += 1
            logits = engine.decode([token], position)
        sampler.begin([])
        assert sampler.next(engine) == logits.argmax()


def test_a_bias_is_added_before_penalties(engine: Engine) -> None:
    engine.forget()
    logits = engine.decode(list(b"the quick brown fox"), 0).copy()
    best, second = (int(token) for token in np.argsort(-logits)[:2])
    gap = float(logits[best] - logits[second])
    lifted, lowered = ((second, 1.01 * gap),), ((best, -1.01 * gap), (1 << 30, 5.0))
    for bias, token in (((), best), (lifted, second), (lowered, second)):
        assert drawn(engine, Sampling(0, logit_bias=bias), 3) == {token}
    # A repeat penalty of 10 divides what the bias has made of it.
    with Sampler(Sampling(0, repeat_penalty=10, logit_bias=((second, 99),)), engine) as sampler:
        sampler.begin([second])
        assert logits[best] < (logits[second] + 99) / 10
        assert sampler.next(engine) == second


def test_any_token_of_a_ubatch_can_be_sampled_from(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "model.gguf")
    with (
        Engine.open(path, n_ctx=64, n_sequences=2, threads=1) as engine,
        Sampler(Sampling(0), engine) as sampler,
    ):
        prompts = [*enumerate(b"quick")], [*enumerate(b"fox")]
        rows = engine.submit(
            [
                Entry(token, place, sequence, place == len(prompt) - 1)
                for sequence, prompt in enumerate(prompts)
                for place, token in prompt
            ]
        ).copy()
        assert [sampler.next(engine, 4), sampler.next(engine, 7)] == rows.argmax(axis=1).tolist()


def test_a_seed_repeats_answers_and_the_second_answer_differs(talk: Talk) -> None:
    def answers(seed: int) -> list[str]:
        session = talk(sampling=Sampling(1.5, seed=seed))
        first = "".join(session.ask("hi", max_tokens=16))
        return [first, "".join(session.regenerate())]

    (first, again), other = answers(1), answers(2)
    assert [first, again] == answers(1)
    assert len({first, again, *other}) == 4


def test_setting_the_sampling_frees_the_old_chain(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = talk(sampling=Sampling(5, seed=1))
    freed: list[object] = []
    monkeypatch.setattr("llama_cpp.llama_cpp.llama_sampler_free", freed.append)
    session.sampling = Sampling(0)
    assert len(freed) == 1
    assert session.sampling == Sampling(0)
    session.max_tokens = 8
    first = "".join(session.ask("hi"))
    assert "".join(session.regenerate()) == first


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"min_p": 1.5},
        {"top_k": -1}, {"top_k": 1 << 31}, {"top_k": 0.5}, {"repeat_penalty": 0},
        {"repeat_penalty": float("inf")}, {"seed": 1.5}, {"frequency_penalty": 2.1},
        {"presence_penalty": float("nan")}, {"logit_bias": ((1.5, 0),)},
        {"logit_bias": ((-1, 0),)}, {"logit_bias": ((1, 101),)},
    ],
)  # fmt: skip
def test_refuses_values_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Sampling(**values)


def test_any_whole_number_is_a_seed(engine: Engine) -> None:
    for seed in (-1, 1 << 40):
        assert drawn(engine, Sampling(seed=seed), 3)
