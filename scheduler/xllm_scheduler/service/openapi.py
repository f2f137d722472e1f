"""The router's OpenAPI document: FastAPI's own routes, and those that the gateway answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_TEXT, _FLAG, _OBJECT = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
_COUNT = {"type": "integer", "minimum": 1}
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"role": _TEXT, "content": _TEXT},
        "required": ["role", "content"],
    },
}
_COMMON = {
    "model": _TEXT,
    "stream": _FLAG,
    "service_tier": {"type": "string", "enum": ["auto", "default", "flex", "priority"]},
    "vllm_xargs": _OBJECT,
}
_GENERATES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "/v1/chat/completions": ("messages", {"messages": _MESSAGES, "max_completion_tokens": _COUNT}),
    "/v1/completions": ("prompt", {"prompt": _TEXT, "max_tokens": _COUNT}),
    "/v1/responses": ("input", {"input": _TEXT, "max_output_tokens": _COUNT}),
    "/v1/messages": ("messages", {"messages": _MESSAGES, "max_tokens": _COUNT}),
    "/v1/embeddings": ("input", {"input": _TEXT}),
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"anyOf": [_TEXT, {"type": "null"}]},
                "code": {"anyOf": [_TEXT, {"type": "integer"}, {"type": "null"}]},
            },
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}
_FAILS = {
    "description": "An error, in OpenAI's form",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}


def json_body(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    """What a route says of the body that it reads itself, as ``openapi_extra``."""
    schema = {"type": "object", "properties": dict(properties), "required": list(required)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def document(app: FastAPI) -> dict[str, Any]:
    """All of it. Fields of bodies that are not named here are passed on to the instances."""
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = made.setdefault("components", {})
    # FastAPI's own form of what is wrong with a request, which nothing here answers with.
    schemas = {
        name: schema
        for name, schema in components.get("schemas", {}).items()
        if name not in ("HTTPValidationError", "ValidationError")
    }
    components["schemas"] = {**schemas, "Error": _ERROR}
    for path, (content, fields) in _GENERATES.items():
        answers = {"application/json": {"schema": _OBJECT}, "text/event-stream": {"schema": {}}}
        made["paths"][path] = {
            "post": {
                "summary": "Passed on to an instance",
                "responses": {"200": {"description": "Its answer", "content": answers}},
                **json_body({**_COMMON, **fields}, "model", content),
            }
        }
    for operations in made["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = _FAILS
    return made
