"""lm_eval's client of OpenAI's completions, whose prompts are tokenised here.

It makes the requests that lm_eval's own `local-completions` makes, with its code, and hands them to
`send`, which counts them or lets a server answer. The tokeniser is that of the GGUF file, as at
/tokenize, so that requests can be counted before the model is loaded.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dots1_local.chat.prompt import Prompter, RawPrompter
from dots1_local.engine.engine import Vocabulary
from dots1_local.errors import UsageError
from dots1_local.evaluate.tasks.answers import Answer

__all__ = ["NAME", "Harness", "Request", "Send"]

NAME = "dots1"  # what requests call the model


@dataclass(frozen=True)
class Request:
    """A body for /v1/completions with one prompt of tokens, of which the first `cut` were left out.

    `context` counts the tokens before those that are scored; None lets the model write.
    """

    body: dict[str, Any]
    context: int | None
    cut: int = 0

    @property
    def tokens(self) -> list[int]:
        """The prompt."""
        tokens: list[int] = self.body["prompt"][0]
        return tokens

    @property
    def max_tokens(self) -> int:
        """Tokens that the model may write; one that is scored writes none that counts."""
        return 0 if self.context is not None else int(self.body["max_tokens"])

    def answer(self, reply: Any) -> Answer:
        """Read the server's reply with lm_eval's own code."""
        if self.context is None:
            [text] = LocalCompletionsAPI.parse_generations(outputs=reply)
            return str(text)
        [(total, greedy)] = LocalCompletionsAPI.parse_logprobs(reply, ctxlens=[self.context])
        return float(total), bool(greedy)


Send = Callable[[Sequence[Request]], Sequence[Answer]]


class Harness(LocalCompletionsAPI):
    """A model for lm_eval, with the tokeniser of `vocabulary` and a context of `n_ctx` tokens."""

    MULTIMODAL = False

    def __init__(self, vocabulary: Vocabulary, n_ctx: int, send: Send) -> None:
        super().__init__(model=NAME, tokenizer_backend="none", max_length=n_ctx, base_url="")
        self._send, self._vocabulary = send, vocabulary
        self._keys = vocabulary.gguf.keys
        self._file = str(vocabulary.gguf.files[0])
        prompter = RawPrompter(vocabulary)
        # The endings of a question share its tokens.
        self._tokens = lru_cache(8)(lambda text, bos: tuple(prompter.marked(text, bos=bos)))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text, in which the names of special tokens become these."""
        return list(self._tokens(string, add_special_tokens is not False))

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self._special("eos")

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that nothing precedes: BOS, or else the token that ends texts."""
        for number in (self._special("bos"), self._special("eos"), self._special("eot")):
            if number is not None:
                return number
        raise UsageError(f"{self._file} names no token that begins or ends a text")

    def _special(self, name: str) -> int | None:
        number = self._keys.get(f"tokenizer.ggml.{name}_token_id")
        return number if isinstance(number, int) else None

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval calls the tokeniser."""
        return NAME

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The file's own template."""
        source = self._keys.get("tokenizer.chat_template")
        return source if isinstance(source, str) else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render messages in the file's template; without the prompt, the last one goes on.

        Raises:
            GGUFError: the file has no template, or it fails.
        """
        prompter = Prompter(self._vocabulary)
        if add_generation_prompt:
            return prompter.render(chat_history)
        return prompter.render(chat_history[:-1]) + chat_history[-1]["content"]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Any]:
        """Score the second text of each request after the first."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihoods of whole texts, each in windows of the context."""
        windows = [
            (number, *make_disjoint_window(window))
            for number, request in enumerate(requests)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
        ]
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens([(None, *tokens) for _, *tokens in windows])
        for (number, *_), (total, _) in zip(windows, scores, strict=True):
            totals[number] += total
        return totals

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[Any]:
        """Score the second tokens of each (key, before, tokens)."""
        return list(self._send([self._scored(before, after) for _, before, after in requests]))

    def _scored(self, before: Sequence[int], after: Sequence[int]) -> Request:
        tokens = [*before, *after]
        kept = tokens[-self.max_length :]  # one token is left for the answer
        cut = len(tokens) - len(kept)
        if cut >= len(before):
            raise UsageError(
                f"a text of {len(after):,} tokens is scored as a whole, which does not fit a "
                f"context of {self.max_length + 1:,}; give a larger --context"
            )
        return Request(self._create_payload([kept], seed=self._seed), len(before) - cut, cut)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue texts; one that is asked for again with a temperature gets another seed."""
        times: Counter[str] = Counter()
        asked = []
        for request in requests:
            text, options = request.args
            asked.append(self._generated(text, options, times[text]))
            times[text] += 1
        return [str(answer) for answer in self._send(asked)]

    def _generated(self, text: str, given: Mapping[str, Any], time: int) -> Request:
        options = copy.deepcopy(dict(given))
        until = options.get("until") or []
        options["until"] = [each for each in ([until] if isinstance(until, str) else until) if each]
        tokens = self.tok_encode(text)
        wanted = int(options.get("max_tokens") or options.get("max_gen_toks") or self._max_gen_toks)
        room = max(1, self.max_length - wanted)
        kept = tokens[-room:]
        seed = self._seed + (time if options.get("temperature") else 0)
        body = self._create_payload([kept], generate=True, gen_kwargs=options, seed=seed)
        body["max_tokens"] = min(wanted, self.max_length - len(kept))
        return Request(body, None, len(tokens) - len(kept))
