"""An OpenAI-compatible server: the models it has, and requests to one of them."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self
from urllib.request import Request

from dots1_local.chat.remote.address import Address, Key
from dots1_local.chat.remote.events import events
from dots1_local.chat.remote.exchange import Exchange, Head, Wake
from dots1_local.chat.remote.models import ServedModel, find_model, models_in, name_list
from dots1_local.chat.remote.refusals import Refusal, complaint, refusal_of
from dots1_local.errors import Dots1Error, UsageError

__all__ = ["Server"]

Tell = Callable[[str], None]

_LARGEST = 1 << 22  # bytes of an answer that is not streamed
_PATIENCE = 30  # seconds for answers without computing
_LOADING_STEPS, _STEP_SECONDS = 10, 0.1  # between looks at a model that loads


class Server:
    """A server at `address` and its `model`; `n_ctx` is its context in tokens, None if unknown.

    `tell` is called with what the user should know: that the model is loading, or which parameters
    are left out because the server refuses them.
    """

    def __init__(self, address: Address, model: str, key: Key | None, tell: Tell) -> None:
        self.address, self.model = address, model
        self.n_ctx: int | None = None
        self._key, self._tell = key, tell
        self._models: list[str] = []
        self._left_out: set[str] = set()

    @classmethod
    def open(
        cls, url: str, model: str | None = None, key: Key | None = None, tell: Tell = lambda _: None
    ) -> Self:
        """Find the server and its model, which `model` has to name if there are several.

        Raises:
            UsageError: the address is malformed, or there are several models and none is named.
            Dots1Error: no OpenAI-compatible server answers there.
        """
        address = Address.parse(url)
        if key and address.exposed:
            tell(
                f"the key in {key.variable} goes to {address.host} unencrypted; use https if it can"
            )
        server = cls(address, model or "", key, tell)
        server._look_around(given=model)
        return server

    def stream(
        self,
        path: str,
        body: Mapping[str, Any],
        wake: Wake,
        optional: Iterable[tuple[str, ...]] = (),
    ) -> Iterator[dict[str, Any]]:
        """The chunks of an answer; closing the iterator closes the connection.

        Of `optional` parameters, a group is left out as soon as the server refuses one in it.

        Raises:
            Refusal: the server's error.
            Dots1Error: the connection breaks, or what comes is no answer.
        """
        while True:
            sent = {name: value for name, value in body.items() if name not in self._left_out}
            try:
                yield from self._chunks(path, {"model": self.model, **sent}, wake)
                return
            except Refusal as refusal:
                groups = [group for group in optional if refusal.knows_not(group)]
                unknown = {name for group in groups for name in group} & sent.keys()
                if not unknown:
                    raise
                self._left_out |= unknown
                names = ", ".join(sorted(unknown))
                self._tell(f"the server refuses {names}, which is left out now: {refusal.said}")

    def _look_around(self, given: str | None) -> None:
        found = self._listed_by_version() or self._listed()
        if not found and given is None:
            raise Dots1Error(
                f"what answers at {self.address.url} tells of no models, as OpenAI-compatible "
                "servers do; check --url, or name the model with --model"
            )
        self._models = [model.names[0] for model in found]
        chosen = find_model(found, given)
        if chosen is not None:
            self.model, self.n_ctx = given or chosen.names[0], chosen.n_ctx
        elif given is None:
            names = name_list(self._models)
            raise UsageError(f"choose one of the server's models with --model: {names}")

    def _listed(self) -> list[ServedModel]:
        """The models that the server lists; none where there is no such endpoint."""
        try:
            return models_in(self._object("models"))
        except Refusal as refusal:
            if refusal.status not in (404, 405):
                raise
            return []

    def _listed_by_version(self) -> list[ServedModel]:
        """The same under /v1, where the address does not end in it.

        This is tried first: llama.cpp's server lists its models without /v1 too, but completes
        texts there in a format of its own.
        """
        before, self.address = self.address, self.address.versioned
        if before != self.address and (found := self._listed()):
            self._tell(f"using {self.address.url}")
            return found
        self.address = before
        return []

    def _chunks(self, path: str, body: Mapping[str, Any], wake: Wake) -> Iterator[dict[str, Any]]:
        with self._answered(path, wake, body=body) as (exchange, head):
            if head.kind == "text/event-stream":
                yield from map(self._parsed, events(exchange.pieces()))
            else:  # it does not stream
                yield self._parsed(exchange.body(_LARGEST).decode("utf-8", errors="replace"))

    def _object(self, path: str) -> dict[str, Any]:
        """The JSON object at a path, an empty one for anything else."""
        with self._answered(path, lambda: None, patience=_PATIENCE) as (exchange, _):
            try:
                found = json.loads(exchange.body(_LARGEST))
            except (ValueError, RecursionError):
                return {}
        return found if isinstance(found, dict) else {}

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            chunk = json.loads(text)
        except (ValueError, RecursionError):
            chunk = None
        if not isinstance(chunk, dict):
            raise Dots1Error(f"what {self.address.url} sends as an answer is none")
        if chunk.get("error") or chunk.get("object") == "error":
            said, detail = complaint(chunk, self._key)
            code = detail.get("code")
            status = code if type(code) is int else 500
            because = f": {said}" if said else ""
            raise Refusal(f"{self.address.url} reports an error{because}", status, said, detail)
        return chunk

    @contextmanager
    def _answered(
        self,
        path: str,
        wake: Wake,
        *,
        body: Mapping[str, Any] | None = None,
        patience: float | None = None,
    ) -> Iterator[tuple[Exchange, Head]]:
        """An answer with status 200, its body still to come; waits for a model that is loading."""
        told = False
        while True:
            request = self._request(path, body)
            url = self.address.url
            far = not self.address.is_loopback  # to a proxy, localhost is the proxy itself
            with Exchange(request, wake, patience, url=url, proxies=far) as exchange:
                head = exchange.head()
                if head.status == 200:
                    yield exchange, head
                    return
                refusal = refusal_of(
                    head,
                    exchange.body(_LARGEST),
                    url=url,
                    key=self._key,
                    model=self.model,
                    models=self._models,
                )
            if not refusal.loading:
                raise refusal
            if not told:
                self._tell("the server is loading its model; Ctrl-C ends the waiting")
                told = True
            for _ in range(_LOADING_STEPS):
                wake()
                time.sleep(_STEP_SECONDS)

    def _request(self, path: str, body: Mapping[str, Any] | None) -> Request:
        headers = {"User-Agent": "dots1-local", "Accept": "application/json, text/event-stream"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.text}"
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body, ensure_ascii=False).encode("utf-8", errors="replace")
        return Request(f"{self.address.url}/{path}", data, headers)
