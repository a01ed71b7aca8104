"""What Ollama's clients ask: /api/chat, /api/generate, /api/embed, /api/embeddings and /api/show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from qwenrt.errors import shown
from qwenrt.structure import Grammar
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.decoding import (
    at_most,
    bad,
    between,
    blamed_on,
    checked_effort,
    checked_sampling,
    checked_tools,
    decode,
    tool_name,
)
from qwenrt.text.dialects.problem import Problem

ROLES = ("system", "user", "assistant", "tool")
MAX_TOP_LOGPROBS = 20
MAX_EMBEDDED = 2048  # texts of one request
NOT_SERVED = ("pull", "push", "create", "copy", "delete", "blobs")

Number = int | float  # clients write whole numbers as 40.0 too


class Options(msgspec.Struct):
    """``options``: what may be asked of the sampling; the many that are about loading a model are passed over."""

    num_ctx: Number | None = None
    num_predict: Number | None = None
    seed: Number | None = None
    top_k: Number | None = None
    top_p: float | None = None
    min_p: float | None = None
    temperature: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | list[str] | None = None


class Request(msgspec.Struct):
    """What chat and generate have in common. ``stream`` is on unless it is false; ``keep_alive`` has no effect."""

    model: str = ""
    options: Options | None = None
    format: str | dict[str, Any] | None = None
    think: bool | str | None = None
    stream: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Number | None = None


class CalledFunction(msgspec.Struct):
    """A function that was called; its arguments are an object, or the text of one."""

    name: str
    arguments: dict[str, Any] | str | None = None


class ToolCall(msgspec.Struct):
    """A call in an assistant's message."""

    function: CalledFunction
    id: str | None = None


class Message(msgspec.Struct):
    """One message. A tool's result says whose it is by ``tool_call_id``, ``tool_name`` (``name``), or its place."""

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    name: str | None = None
    tool_call_id: str | None = None


class ToolFunction(msgspec.Struct):
    """A function that may be called."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct):
    """A tool; only functions are known."""

    function: ToolFunction
    type: str | None = None


class ChatRequest(Request):
    """POST /api/chat."""

    messages: list[Message] | None = None
    tools: list[Tool] | None = None


class GenerateRequest(Request):
    """POST /api/generate."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[Any] | None = None


class EmbedRequest(msgspec.Struct):
    """POST /api/embed."""

    model: str = ""
    input: str | list[str] | None = None
    truncate: bool | None = None
    dimensions: int | None = None


class EmbeddingsRequest(msgspec.Struct):
    """POST /api/embeddings, which is older."""

    model: str = ""
    prompt: str | None = None


class ShowRequest(msgspec.Struct):
    """POST /api/show. ``name`` is the older ``model``; ``verbose`` changes nothing."""

    model: str = ""
    name: str = ""
    verbose: bool | None = None


@dataclass(frozen=True)
class Embedding:
    """Texts to embed. ``dimensions``: how many of a vector's first values are wanted, None for all; ``truncate``:
    whether a text that is too long is cut rather than refused."""

    model: str
    texts: Sequence[str]
    dimensions: int | None = None
    truncate: bool = True


def decode_chat(body: bytes) -> ChatRequest:
    """The body of /api/chat. Raises Problem."""
    return decode(body, ChatRequest)


def decode_generate(body: bytes) -> GenerateRequest:
    """The body of /api/generate. Raises Problem."""
    return decode(body, GenerateRequest)


def decode_show(body: bytes) -> ShowRequest:
    """The body of /api/show. Raises Problem."""
    return decode(body, ShowRequest)


def decode_embed(body: bytes) -> EmbedRequest:
    """The body of /api/embed. Raises Problem."""
    return decode(body, EmbedRequest)


def decode_embeddings(body: bytes) -> EmbeddingsRequest:
    """The body of /api/embeddings. Raises Problem."""
    return decode(body, EmbeddingsRequest)


def not_served(what: str) -> Problem:
    """The answer to one of NOT_SERVED: models are chosen when the server starts."""
    return Problem(
        "not_implemented",
        f"/api/{what} is not served: this server has the one model that it was started with. "
        "Start it with another one: `qwenrt serve MODEL`; `qwenrt pull MODEL` downloads.",
    )


def is_load(request: ChatRequest | GenerateRequest) -> bool:
    """Whether nothing is asked: with such requests clients load a model ahead of time, which here is loaded already.
    Their answer is `ollama_answers.loaded`."""
    if isinstance(request, ChatRequest):
        return not request.messages
    return not request.prompt


def read_chat(request: ChatRequest, context: int) -> Ask:
    """What a body of /api/chat asks for. context: tokens that fit into this server's model. Raises Problem."""
    tools = [_tool(tool) for tool in request.tools or ()]
    messages = _messages(request.messages or [])
    return _ask(
        request,
        context,
        chat=True,
        messages=messages,
        tools=checked_tools(tools),
    )


def read_generate(request: GenerateRequest, context: int) -> Ask:
    """What a body of /api/generate asks for: one turn of a chat, or with ``raw`` a text to continue as it is. context:
    tokens that fit into this server's model. Raises Problem."""
    if request.images:
        raise _no_images("images")
    if request.suffix:
        raise bad(
            "suffix", "text between two texts cannot be asked for", "Leave it out, or write a raw prompt."
        )
    if request.template:
        raise bad("template", "no template is taken from a request", "Leave it out: the model has its own.")
    if any(token < 0 for token in request.context or ()):
        raise bad("context", "token ids are never negative", "Send what an earlier answer gave, or nothing.")
    if request.raw:
        for name in ("system", "context"):
            if getattr(request, name):
                raise bad(name, "a raw prompt is taken as it is", "Leave it out, or raw.")
        return _ask(request, context, prompts=(request.prompt or "",))
    messages = [{"role": "system", "content": request.system}] if request.system else []
    messages.append({"role": "user", "content": request.prompt or ""})
    return _ask(request, context, messages=messages, before=tuple(request.context or ()))


def read_embed(request: EmbedRequest | EmbeddingsRequest) -> Embedding:
    """What a body of /api/embed or /api/embeddings asks for. Raises Problem."""
    if isinstance(request, EmbeddingsRequest):
        return Embedding(request.model, [request.prompt or ""])
    texts = [request.input] if isinstance(request.input, str) else request.input or []
    at_most("input", texts, MAX_EMBEDDED)
    return Embedding(request.model, texts, request.dimensions or None, request.truncate is not False)


def error_body(problem: Problem) -> dict[str, str]:
    """The body of an answer that is a problem."""
    return {"error": problem.message}


def _ask(request: Request, context: int, *, chat: bool = False, **of_kind: Any) -> Ask:
    """What chat and generate ask for in the same words. Ask.extra says to the writer whether it is a chat."""
    think = request.think
    return Ask(
        model=request.model,
        sampling=_sampling(request, context),
        enable_thinking=None if isinstance(think, str) else think,
        reasoning_effort=checked_effort(think, "think") if isinstance(think, str) else None,
        stream=request.stream is not False,
        extra="chat" if chat else "generate",
        **of_kind,
    )


def _sampling(request: Request, context: int) -> dict[str, Any]:
    """The fields of SamplingParams that a request sets, checked."""
    options = request.options or Options()
    window = _whole(options.num_ctx, "options.num_ctx")
    if window is not None and window > context:
        found = f"{shown(window)} tokens are asked for, and this server's context has {context}"
        remedy = "Ask for less, leave it out, or start the server with a larger --max-model-len."
        raise bad("options.num_ctx", found, remedy)
    most = _whole(options.num_predict, "options.num_predict")
    seed = _whole(options.seed, "options.seed")
    wishes: dict[str, tuple[str, Any]] = {
        "temperature": ("temperature", options.temperature),
        "top_k": ("top_k", _whole(options.top_k, "options.top_k")),
        "top_p": ("top_p", options.top_p),
        "min_p": ("min_p", options.min_p),
        "seed": ("seed", None if seed == -1 else seed),
        "repeat_penalty": ("repetition_penalty", options.repeat_penalty),
        "presence_penalty": ("presence_penalty", options.presence_penalty),
        "frequency_penalty": ("frequency_penalty", options.frequency_penalty),
        "stop": ("stop", options.stop),
    }
    if options.top_p == 0:  # the smallest set that reaches no probability at all: the likeliest token
        wishes |= {"top_p": ("top_p", None), "top_k": ("top_k", 1)}
    sampling = {field: value for field, value in wishes.values() if value is not None}
    sampling["max_tokens"] = most if most is not None and most > 0 else None  # 0, -1 and -2 are no limit
    checked_sampling(sampling, {field: f"options.{name}" for name, (field, _) in wishes.items()})
    grammar = _grammar(request.format)
    if grammar is not None:
        sampling["grammar"] = grammar
    alternatives = _whole(request.top_logprobs, "top_logprobs") or 0
    between("top_logprobs", alternatives, 0, MAX_TOP_LOGPROBS)
    if request.logprobs:
        sampling["logprobs"] = alternatives
    return sampling


def _whole(value: Number | None, param: str) -> int | None:
    """A whole number, which may be written as 40.0."""
    if value is None or isinstance(value, int):
        return value
    if not value.is_integer():
        raise bad(param, f"got {shown(value)}", "It must be a whole number.")
    return int(value)


def _grammar(wanted: str | dict[str, Any] | None) -> Grammar | None:
    if wanted is None or wanted == "":
        return None
    if isinstance(wanted, str):
        if wanted != "json":
            raise bad(
                "format", f"got {shown(wanted)}", 'It must be "json" or a JSON schema, which is an object.'
            )
        return Grammar.json_object()
    with blamed_on("format"):
        return Grammar.json_schema(wanted)


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    if tool.function.parameters is not None:
        function["parameters"] = tool.function.parameters
    return {"type": "function", "function": function}


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """In OpenAI's shape. A tool's results follow the calls they answer, in the order of these; a result that answers
    none is what a user says."""
    given: list[dict[str, Any]] = []
    waiting: list[ToolCall] = []  # calls whose results may come now
    results: dict[int, dict[str, Any]] = {}
    for index, message in enumerate(messages):
        role = message.role.lower()
        if role not in ROLES:
            found = f"got {shown(message.role)}"
            raise bad(f"messages[{index}].role", found, f"Known are: {', '.join(ROLES)}.")
        if message.images:
            raise _no_images(f"messages[{index}].images")
        if role == "tool" and (place := _answered(message, waiting, results)) is not None:
            results[place] = {"role": "tool", "content": message.content or ""}
            continue
        given += [results[place] for place in sorted(results)]
        waiting, results = list(message.tool_calls or ()) if role == "assistant" else [], {}
        given.append(_message("user" if role == "tool" else role, message, f"messages[{index}]"))
    return given + [results[place] for place in sorted(results)]


def _answered(result: Message, calls: Sequence[ToolCall], done: dict[int, Any]) -> int | None:
    """Which of the calls a result answers: that with its id, the first open one of its name, or the first open one;
    None where all are answered."""
    free = [place for place in range(len(calls)) if place not in done]
    for place in free:
        if result.tool_call_id is not None and calls[place].id == result.tool_call_id:
            return place
    name = result.tool_name or result.name
    for place in free:
        if name is not None and calls[place].function.name == name:
            return place
    return free[0] if free else None


def _message(role: str, message: Message, where: str) -> dict[str, Any]:
    written: dict[str, Any] = {"role": role, "content": message.content or ""}
    if role != "assistant":
        return written
    if message.thinking:
        written["reasoning_content"] = message.thinking
    if message.tool_calls:
        written["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": tool_name(call.function.name, f"{where}.tool_calls[{i}].function.name"),
                    "arguments": {} if call.function.arguments is None else call.function.arguments,
                },
            }
            for i, call in enumerate(message.tool_calls)
        ]
    return written


def _no_images(param: str) -> Problem:
    return bad(param, "this model reads text only", "Leave images out.")
