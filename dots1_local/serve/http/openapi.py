"""GET /openapi.json: every endpoint with its body, answers and errors, from what reads the bodies.

A body is described by the fields' types and ranges. Some fields contradict each other, and the
server refuses such bodies although they match the description.
"""

import json
import re
from collections.abc import Sequence, Set
from typing import Any

import msgspec
from starlette.routing import Route

from dots1_local import __version__
from dots1_local.serve.http.chat_request import ChatFields
from dots1_local.serve.http.completions import CompletionFields
from dots1_local.serve.http.messages import CountFields, MessagesFields
from dots1_local.serve.http.request import Unsupported
from dots1_local.serve.http.responses import ResponsesFields
from dots1_local.serve.http.tokens import DetokenizeFields, TokenizeFields

__all__ = ["openapi"]

_Json = dict[str, Any]
_COMPONENTS = "#/components/schemas/{name}"
_PACKAGE = "dots1_local.serve.http."  # msgspec's prefix of names that two modules use
_GENERATING: dict[str, type] = {
    "/v1/chat/completions": ChatFields,
    "/v1/completions": CompletionFields,
    "/v1/responses": ResponsesFields,
    "/v1/messages": MessagesFields,
}
_BODIES: dict[str, type] = {
    **_GENERATING,
    "/v1/messages/count_tokens": CountFields,
    "/tokenize": TokenizeFields,
    "/detokenize": DetokenizeFields,
}
# Fields that an answer always has.
_ANSWERS: dict[str, tuple[str, ...]] = {
    "/health": ("status",),
    "/openapi.json": ("openapi", "info", "paths", "components"),
    "/props": ("default_generation_settings", "total_slots", "model_path", "chat_template"),
    "/v1/models": ("object", "data"),
    "/v1/models/{name}": ("id", "object", "max_model_len", "meta"),
    "/v1/chat/completions": ("id", "object", "created", "model", "choices", "usage", "timings"),
    "/v1/completions": ("id", "object", "created", "model", "choices", "usage", "timings"),
    "/v1/responses": ("id", "object", "created_at", "model", "status", "output", "usage"),
    "/v1/messages": ("id", "type", "role", "model", "content", "stop_reason", "usage"),
    "/v1/messages/count_tokens": ("input_tokens",),
    "/tokenize": ("tokens",),
    "/detokenize": ("prompt", "content"),
}
_LOADING = {503: "The server is loading the model or shutting down."}
_STATUSES = {
    "/health": _LOADING,
    "/metrics": {},
    "/openapi.json": {},
    "/v1/models/{name}": {**_LOADING, 404: "There is no such model."},
    "/v1/placement": {**_LOADING, 404: "The devices could not be asked."},
}
_OF_BODIES = {
    **_LOADING,
    400: "The body is malformed, or a parameter is wrong or unsupported.",
    404: "There is no such model.",
    408: "The body arrives too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON.",
}
_OF_GENERATION = {429: "The queue is full.", 500: "The engine failed during the answer."}
_TEXT = {"type": "string"}
_OPTIONAL = {"type": ["string", "null"]}
_ERRORS: _Json = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": _OPTIONAL,
                    "code": _OPTIONAL,
                },
            }
        },
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": _TEXT, "message": _TEXT},
            },
        },
    },
}


def openapi(routes: Sequence[Route], *, keyless: Set[str] | None = None) -> _Json:
    """Describe the routes; all but the `keyless` paths need a key, or none if that is None."""
    _, schemas = msgspec.json.schema_components(_BODIES.values(), ref_template=_COMPONENTS)
    for kind in _BODIES.values():
        unsupported: Unsupported = getattr(kind, "unsupported", {})
        schemas[kind.__name__]["properties"] |= _refused(unsupported)
    paths: _Json = {}
    for route in routes:
        path = re.sub(r":\w+}", "}", route.path)
        needs_key = keyless is not None and path not in keyless
        paths[path] = {
            method.lower(): _operation(route, path, needs_key)
            for method in sorted((route.methods or set()) - {"HEAD"})
        }
    document = {
        "openapi": "3.1.0",
        "info": {"title": "dots1-local", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**schemas, **_ERRORS},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }
    renamed: _Json = json.loads(json.dumps(document).replace(_PACKAGE, ""))
    return renamed


def _refused(unsupported: Unsupported) -> _Json:
    """Return the fields that are refused, with the values that have no effect."""
    return {name: {"enum": [None, *harmless]} for name, harmless in unsupported.items()}


def _operation(route: Route, path: str, needs_key: bool) -> _Json:
    body = _BODIES.get(path)
    statuses = {**_OF_BODIES} if body else {**_STATUSES.get(path, _LOADING)}
    if path in _GENERATING:
        statuses |= _OF_GENERATION
    if needs_key:
        statuses[401] = "The API key is missing or wrong."
    operation: _Json = {
        "summary": (route.endpoint.__doc__ or "").strip(),
        "responses": {
            "200": {"description": "The answer.", "content": _answer(path)},
            **{str(status): _refusal(path, statuses[status]) for status in sorted(statuses)},
        },
    }
    if "{name}" in path:
        named = {"name": "name", "in": "path", "required": True, "schema": _TEXT}
        operation["parameters"] = [named]
    if body:
        content = {"application/json": {"schema": {"$ref": _COMPONENTS.format(name=body.__name__)}}}
        operation["requestBody"] = {"required": True, "content": content}
    if needs_key:
        operation["security"] = [{"bearer": []}, {"x-api-key": []}]
    return operation


def _answer(path: str) -> _Json:
    if path == "/metrics":
        return {"text/plain": {}}
    if path == "/slots":
        return {"application/json": {"schema": {"type": "array", "items": {"type": "object"}}}}
    schema = {"type": "object", "required": list(_ANSWERS.get(path, ()))}
    stream: _Json = {"text/event-stream": {}} if path in _GENERATING else {}
    return {"application/json": {"schema": schema}, **stream}


def _refusal(path: str, description: str) -> _Json:
    """Describe an error; while the model is loading, /health has its usual answer."""
    name = "AnthropicError" if path.startswith("/v1/messages") else "Error"
    content = {"application/json": {"schema": {"$ref": _COMPONENTS.format(name=name)}}}
    return {"description": description, "content": _answer(path) if path == "/health" else content}
