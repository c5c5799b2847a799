"""An OpenAI-compatible server: the models it has, and requests to one of them."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from dots1_local.chat.remote.address import Key, is_exposed, parse_address
from dots1_local.chat.remote.reply import (
    Refusal,
    count_in,
    object_in,
    server_error,
    status_error,
)
from dots1_local.chat.remote.streaming import StreamingRequest, Wake
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.json_file import JsonError, convert_json, parse_json

__all__ = ["Server"]

_TIMEOUT = 30  # seconds for answers that need no computing
_LOADING_STEPS, _STEP_SECONDS = 10, 0.1  # between two looks at a model that loads
_LONGEST_NAME = 200  # characters
_SHOWN = 20  # names

# Parameters that a server may not know; each group may be left out as a whole.
_OPTIONAL = (
    ("top_k", "min_p", "repetition_penalty", "repeat_penalty"),
    ("stream_options",),
)


@dataclass(frozen=True)
class _ServedModel:
    """A model with all its names; `n_ctx` is in tokens, None if the server does not tell."""

    names: tuple[str, ...]
    n_ctx: int | None


class Server:
    """A server at `url` and its `model`; `n_ctx` is its context in tokens, None if unknown.

    If the server has several models, `model` has to name one. `notify` is called with what the user
    should know: the model is loading, or a parameter is left out because the server rejects it.

    Raises:
        UsageError: the address is malformed, or there are several models and none is named.
        Dots1Error: no OpenAI-compatible server answers there.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        key: Key | None = None,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.url, self.model = parse_address(url), model or ""
        self.n_ctx: int | None = None
        self._key, self._notify = key, notify
        self._models: list[str] = []
        self._left_out: set[str] = set()
        if key and is_exposed(self.url):
            notify(
                f"the key in {key.variable} goes to {self.url.host} unencrypted; use https if the "
                "server supports it"
            )
        self._find_model(model)

    def stream(self, path: str, body: Mapping[str, Any], wake: Wake) -> Iterator[dict[str, Any]]:
        """Yield the chunks of an answer; closing the iterator closes the connection.

        If the server rejects an optional parameter, its whole group is left out from then on.

        Raises:
            Refusal: the server's error.
            Dots1Error: the connection breaks, or the answer is not JSON.
        """
        while True:
            sent = {name: value for name, value in body.items() if name not in self._left_out}
            try:
                with self._answered(path, wake, body={"model": self.model, **sent}) as request:
                    yield from map(self._parsed, request.parts())
                return
            except Refusal as refusal:
                groups = [group for group in _OPTIONAL if refusal.rejects_parameter(group)]
                unknown = {name for group in groups for name in group} & sent.keys()
                if not unknown:
                    raise
                self._left_out |= unknown
                names = ", ".join(sorted(unknown))
                self._notify(
                    f"requests no longer contain {names}, which the server rejects: {refusal.said}"
                )

    def _find_model(self, wanted: str | None) -> None:
        found = self._list_models()
        if not found and wanted is None:
            raise Dots1Error(
                f"{self.url} lists no models, as OpenAI-compatible servers do; check --url, or "
                "name the model with --model"
            )
        self._models = [model.names[0] for model in found]
        chosen = [model for model in found if wanted in model.names]
        if len(found) == 1:
            chosen = found  # many servers accept any name for their only model
        if chosen:
            self.model, self.n_ctx = wanted or chosen[0].names[0], chosen[0].n_ctx
        elif wanted is None:
            names = _name_list(self._models)
            raise UsageError(f"choose one of the server's models with --model: {names}")

    def _list_models(self) -> list[_ServedModel]:
        """Return the models that the server lists, under /v1 if the address does not end in it.

        /v1 is tried first: llama.cpp's server lists its models without it too, but completes texts
        there in a format of its own.
        """
        given = self.url
        if not given.path.endswith("/v1"):
            self.url = given.copy_with(raw_path=given.raw_path.rstrip(b"/") + b"/v1")
            if found := self._models_here():
                self._notify(f"using {self.url}")
                return found
            self.url = given
        return self._models_here()

    def _models_here(self) -> list[_ServedModel]:
        try:
            with self._answered("models", lambda: None, timeout=_TIMEOUT) as request:
                answer = parse_json(b"".join(request.parts()))
        except JsonError:
            return []
        except Refusal as refusal:
            if refusal.status not in (404, 405):
                raise
            return []
        entries = answer.get("data") if isinstance(answer, dict) else None
        return list(_models(entries)) if isinstance(entries, list) else []

    def _parsed(self, part: bytes) -> dict[str, Any]:
        try:
            chunk = convert_json(parse_json(part), dict[str, Any])
        except JsonError as error:
            raise Dots1Error(f"{self.url} sends a broken answer: {error}") from None
        if chunk.get("error") or chunk.get("object") == "error":
            said, detail = server_error(chunk, self._key)
            code = detail.get("code")
            status = code if type(code) is int else 500
            because = f": {said}" if said else ""
            raise Refusal(f"{self.url} reports an error{because}", status, said, detail)
        return chunk

    @contextmanager
    def _answered(
        self,
        path: str,
        wake: Wake,
        *,
        body: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Iterator[StreamingRequest]:
        """Open an answer with status 200 to read; wait for a model that is loading."""
        notified = False
        while True:
            with StreamingRequest(
                self._request(path, body),
                wake,
                timeout,
                server=str(self.url),
            ) as request:
                head = request.head()
                if head.status_code == 200:
                    yield request
                    return
                refusal = status_error(
                    head,
                    b"".join(request.parts()),
                    url=str(self.url),
                    key=self._key,
                    model=self.model,
                    models=_name_list(self._models),
                )
            if not refusal.loading:
                raise refusal
            if not notified:
                self._notify("the server is loading its model; press Ctrl-C to stop waiting")
                notified = True
            for _ in range(_LOADING_STEPS):
                wake()
                time.sleep(_STEP_SECONDS)

    def _request(self, path: str, body: Mapping[str, Any] | None) -> httpx2.Request:
        url = f"{self.url}/{path}"
        headers = {"User-Agent": "dots1-local", "Accept": "application/json, text/event-stream"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.text}"
        if body is None:
            return httpx2.Request("GET", url, headers=headers)
        headers["Content-Type"] = "application/json"
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", errors="replace")
        return httpx2.Request("POST", url, headers=headers, content=data)


def _models(entries: Sequence[Any]) -> Iterator[_ServedModel]:
    for entry in entries:
        if isinstance(entry, dict):
            aliases = entry.get("aliases")
            others = aliases if isinstance(aliases, list) else []
            names = [name for name in (entry.get("id"), *others) if _is_name(name)]
            if names:
                # vLLM and SGLang give max_model_len, llama.cpp's server meta.n_ctx.
                meta = object_in(entry, "meta")
                n_ctx = count_in(entry, "max_model_len") or count_in(meta, "n_ctx")
                yield _ServedModel(tuple(names), n_ctx or None)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= _LONGEST_NAME


def _name_list(names: Sequence[str]) -> str:
    """List names for a sentence, but not all: some servers have hundreds of models."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
