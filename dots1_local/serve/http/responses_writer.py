"""Responses of OpenAI's Responses API, written as output items, whole or event by event."""

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dots1_local.serve.generation import Finished, Piece
from dots1_local.serve.http.request import ApiError
from dots1_local.serve.http.response import Document, Writer
from dots1_local.serve.http.shared_fields import Options
from dots1_local.serve.tool_calls import CallPart, Part, ToolCallParser

__all__ = ["ResponsesWriter"]


class ResponsesWriter(Writer):
    """Writes one response, whose items are messages and calls of functions."""

    def __init__(
        self, model: str, options: Options, raw: Mapping[str, Any], *, tools: bool
    ) -> None:
        super().__init__(options, 1)
        self._parser = ToolCallParser(tools)
        sampling = options.choice.sampling
        self._head = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": raw.get("instructions"),
            "max_output_tokens": raw.get("max_output_tokens"),
            "metadata": raw.get("metadata") or {},
            "parallel_tool_calls": raw.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": raw.get("text") or {"format": {"type": "text"}},
            "tool_choice": raw.get("tool_choice") or "auto",
            "tools": raw.get("tools") or [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
        }
        self._items: list[Document] = []
        self._is_open = False  # the last item
        self._events_sent = 0

    def begin(self) -> list[Document]:
        """Return the events that begin the response."""
        response = self._response("in_progress")
        return self._numbered(
            {"type": f"response.{name}", "response": response}
            for name in ("created", "in_progress")
        )

    def piece(self, piece: Piece) -> list[Document]:
        return self._numbered(self._events(self._parser.add(piece.text)))

    def finish(self, finished: Finished) -> list[Document]:
        events = [*self._events(self._parser.finish())]
        return self._numbered([*events, *self._close(_status(finished))])

    def end(self, finished: Sequence[Finished]) -> list[Document]:
        """Return the event that ends the response."""
        status = _status(finished[0])
        response = self._response(status, finished[0])
        return self._numbered([{"type": f"response.{status}", "response": response}])

    def whole(self, choices: Sequence[tuple[Piece, Finished]]) -> Document:
        [(piece, finished)] = choices
        for _ in self._events([*self._parser.add(piece.text), *self._parser.finish()]):
            pass  # they fill the items
        for _ in self._close(_status(finished)):
            pass
        return self._response(_status(finished), finished)

    def failure(self, error: ApiError) -> Document:
        document = {"type": "error", "code": error.code, "message": error.detail, "param": None}
        return self._numbered([document])[0]

    def frame(self, document: Document) -> str:
        return f"event: {document['type']}\n{super().frame(document)}"

    def _response(self, status: str, finished: Finished | None = None) -> Document:
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "output": self._items if finished else [],
            "usage": _usage(finished) if finished else None,
        }

    def _numbered(self, events: Iterable[Document]) -> list[Document]:
        """Give events their numbers in the stream."""
        first = self._events_sent
        numbered = [{**event, "sequence_number": n} for n, event in enumerate(events, first)]
        self._events_sent += len(numbered)
        return numbered

    def _events(self, parts: Sequence[Part]) -> Iterator[Document]:
        """Add parts to the items, and yield what tells of it."""
        for part in parts:
            if isinstance(part, CallPart):
                yield from self._call_part(part)
            else:
                yield from self._text_part(part)

    def _call_part(self, part: CallPart) -> Iterator[Document]:
        if part.name is not None:
            yield from self._close("completed")
            yield self._open(
                {
                    "type": "function_call",
                    "id": f"fc_{secrets.token_hex(12)}",
                    "call_id": f"call_{secrets.token_hex(12)}",
                    "name": part.name,
                    "arguments": "",
                    "status": "in_progress",
                }
            )
        if part.arguments:
            self._items[-1]["arguments"] += part.arguments
            yield self._of_item("response.function_call_arguments.delta", delta=part.arguments)

    def _text_part(self, text: str) -> Iterator[Document]:
        if not (self._is_open and self._items[-1]["type"] == "message"):
            yield from self._close("completed")
            item = {"type": "message", "id": f"msg_{secrets.token_hex(12)}", "role": "assistant"}
            yield self._open({**item, "status": "in_progress", "content": []})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._items[-1]["content"] = [part]
            yield self._of_item("response.content_part.added", content_index=0, part={**part})
        self._items[-1]["content"][0]["text"] += text
        yield self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=[])

    def _open(self, item: Document) -> Document:
        self._items.append(item)
        self._is_open = True
        number = len(self._items) - 1
        return {"type": "response.output_item.added", "output_index": number, "item": {**item}}

    def _close(self, status: str) -> Iterator[Document]:
        """End the open item, if there is one."""
        if not self._is_open:
            return
        self._is_open = False
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **done)
        else:
            [part] = item["content"]
            done = {"content_index": 0, "text": part["text"], "logprobs": []}
            yield self._of_item("response.output_text.done", **done)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        number = len(self._items) - 1
        yield {"type": "response.output_item.done", "output_index": number, "item": item}

    def _of_item(self, kind: str, **fields: Any) -> Document:
        number = len(self._items) - 1
        return {"type": kind, "item_id": self._items[-1]["id"], "output_index": number, **fields}


def _status(finished: Finished) -> str:
    return "incomplete" if finished.reason == "length" else "completed"


def _usage(finished: Finished) -> Document:
    return {
        "input_tokens": finished.prompt_tokens,
        "input_tokens_details": {"cached_tokens": finished.cached_tokens},
        "output_tokens": finished.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }
