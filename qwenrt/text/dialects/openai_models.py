"""What a client asks before it asks the model: which models there are, and what a prompt is in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from qwenrt.text.dialects import decoding
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.decoding import bad, said
from qwenrt.text.dialects.openai_bodies import error_body as error_body
from qwenrt.text.dialects.openai_chat import ChatFields, ChatMessage, read_with
from qwenrt.text.dialects.openai_fields import Flag, Text

OWNER = "qwenrt"


def model_body(
    name: str, created: int, max_model_len: int, root: str, parent: str | None = None
) -> dict[str, Any]:
    """One model as OpenAI, vLLM and Anthropic tell it. root: the checkpoint's name; created: seconds of the epoch;
    parent: of an adapter, the model that it changes."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "context_length": max_model_len,
        "type": "model",
        "display_name": name,
        "created_at": _time(created),
    }


def models_body(
    names: Sequence[str], created: int, max_model_len: int, root: str, adapters: Sequence[str] = ()
) -> dict[str, Any]:
    """GET /v1/models: what `model_body` has of each name and each adapter, and beside it the lists of Anthropic's and
    Ollama's shape."""
    models = [model_body(name, created, max_model_len, root) for name in names]
    models += [model_body(name, created, max_model_len, root, names[0]) for name in adapters]
    names = [*names, *adapters]
    return {
        "object": "list",
        "data": models,
        "first_id": names[0] if names else None,
        "last_id": names[-1] if names else None,
        "has_more": False,
        "models": [{"name": name, "model": name, "modified_at": _time(created)} for name in names],
    }


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class TokenizeRequest(ChatFields, kw_only=True):
    """The body of POST /tokenize: a prompt, or the messages of a chat with all of its fields."""

    model: Text = UNSET
    prompt: Text = UNSET
    messages: list[ChatMessage] | UnsetType | None = UNSET
    add_special_tokens: Flag = UNSET
    return_token_strs: Flag = UNSET


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of POST /detokenize."""

    tokens: list[int]
    model: Text = UNSET


@dataclass(frozen=True)
class TokenizeAsk:
    """prompt: a text; None where ``chat`` is what is to be tokenised. prefix: what the tokenizer puts before a text is
    wanted. texts: each token's text is wanted."""

    prompt: str | None
    chat: Ask | None
    prefix: bool = True
    texts: bool = False


def decode_tokenize(body: bytes) -> TokenizeRequest:
    """The request in a body. Raises Problem."""
    return decoding.decode(body, TokenizeRequest)


def read_tokenize(request: TokenizeRequest) -> TokenizeAsk:
    """Raises Problem."""
    prompt, messages = said(request.prompt), said(request.messages)
    if (prompt is None) == (messages is None):
        found = "neither it nor messages" if prompt is None else "messages are there too"
        raise bad("prompt", found, "Send one of the two.")
    return TokenizeAsk(
        prompt,
        None if messages is None else read_with(request, said(request.model) or "", messages),
        request.add_special_tokens is not False,
        request.return_token_strs is True,
    )


def tokenize_body(
    ask: TokenizeAsk, tokens: Sequence[int], max_model_len: int, texts: Sequence[str] = ()
) -> dict[str, Any]:
    """texts: of each token, where the request wants them."""
    return {
        "count": len(tokens),
        "max_model_len": max_model_len,
        "tokens": tokens,
        "token_strs": texts if ask.texts else None,
    }


def decode_detokenize(body: bytes) -> DetokenizeRequest:
    """The request in a body. Raises Problem for what is no JSON, and for numbers that are no token ids."""
    request = decoding.decode(body, DetokenizeRequest)
    for i, token in enumerate(request.tokens):
        if not 0 <= token < 2**31:
            raise bad(f"tokens[{i}]", "it is no token id", "Token ids are integers from 0.")
    return request


def detokenize_body(text: str) -> dict[str, Any]:
    """The answer to /detokenize."""
    return {"prompt": text}


def render_body(text: str, tokens: Sequence[int], max_model_len: int) -> dict[str, Any]:
    """The answer to /v1/chat/completions/render: the prompt of a chat as text and ids. Its request is a ChatRequest."""
    return {
        "object": "render",
        "prompt": text,
        "prompt_token_ids": tokens,
        "count": len(tokens),
        "max_model_len": max_model_len,
    }
