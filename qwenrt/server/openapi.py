"""The server's description of itself in OpenAPI 3.1, from the types that its requests are read as."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import msgspec

import qwenrt
from qwenrt.server import bodies


@cache
def document(administrators: bool = False) -> dict[str, Any]:
    """/openapi.json. Bodies are described as they are read; what else they may hold is passed over.
    ``administrators``: whether their routes are there."""
    posts = bodies.POSTS | (bodies.ADMINISTRATORS if administrators else {})
    types = list(dict.fromkeys(body for _, body in posts.values()))
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    by_type = dict(zip(types, schemas, strict=True))
    paths: dict[str, Any] = {}
    for path, (about, body) in posts.items():
        content = {"application/json": {"schema": by_type[body]}}
        paths[path] = {
            "post": {
                "summary": about,
                "requestBody": {"required": True, "content": content},
                "responses": _RESPONSES,
            }
        }
    for path, about in bodies.GETS.items():
        responses = {"200": {"description": "As asked"}}
        get = {"summary": about, "responses": responses, "parameters": _parameters(path)}
        paths.setdefault(path, {})["get"] = get
    return {
        "openapi": "3.1.0",
        "info": {"title": "qwenrt", "version": qwenrt.__version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _parameters(path: str) -> list[dict[str, Any]]:
    """What a GET is told in its path, and in its query."""
    text = {"type": "string"}
    given = [
        {"name": name, "in": "path", "required": True, "schema": text}
        for name in re.findall(r"\{(\w+)\}", path)
    ]
    if path == "/v1/stream":
        given.append({"name": "conv_id", "in": "query", "required": True, "schema": text})
        offset = {"type": "integer", "minimum": 0, "default": 0}
        given.append({"name": "from", "in": "query", "schema": offset})
    return given


_RESPONSES = {
    "200": {"description": "The answer, or a stream of its events"},
    "400": {"description": "The request is wrong, or its prompt does not fit"},
    "401": {"description": "No key, or another one"},
    "413": {"description": "The body is too large"},
    "429": {"description": "The queue is full; Retry-After says when to come again"},
    "503": {"description": "Waited too long, or the server is being stopped"},
}
