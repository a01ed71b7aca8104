"""What requests for chats and completions in OpenAI's dialect have in common: sampling, structure, thought, choices.

The names are OpenAI's where it has one, else vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from qwenrt.errors import shown
from qwenrt.sampling_params import MAX_N
from qwenrt.structure import Grammar
from qwenrt.text.dialects.decoding import (
    at_most,
    bad,
    between,
    blamed_on,
    checked_effort,
    checked_sampling,
    said,
)

MAX_PROMPTS = 1024  # of one request
LONGEST_THOUGHT = 2**31
PRIORITIES = (0, 9)

Text = str | None | UnsetType
Whole = int | None | UnsetType
Number = float | None | UnsetType
Flag = bool | None | UnsetType
Schema = str | bool | dict[str, Any] | None | UnsetType


class TemplateKwargs(msgspec.Struct):
    """What may be said to the chat template. Other keys are ignored."""

    enable_thinking: Flag = UNSET
    thinking_budget: Whole = UNSET
    reasoning_effort: Text = UNSET
    chat_template: Any = UNSET


class JsonSchemaFormat(msgspec.Struct):
    schema: Schema = UNSET
    name: Text = UNSET
    strict: Flag = UNSET


class ResponseFormat(msgspec.Struct):
    """ "text", "json_object", or "json_schema" with the schema."""

    type: str
    json_schema: JsonSchemaFormat | UnsetType | None = UNSET
    schema: Schema = UNSET


class StructuredOutputs(msgspec.Struct):
    """vLLM's way to say what an answer must be: one of these."""

    json: Schema = UNSET
    regex: Text = UNSET
    choice: list[str] | UnsetType | None = UNSET
    grammar: Text = UNSET
    json_object: Flag = UNSET
    structural_tag: Any = UNSET


class StreamOptions(msgspec.Struct):
    include_usage: Flag = UNSET
    continuous_usage_stats: Flag = UNSET


class Fields(msgspec.Struct, kw_only=True):
    """The fields of a request to write. Absent and null are the checkpoint's own settings."""

    stream: Flag = UNSET
    stream_options: StreamOptions | UnsetType | None = UNSET
    n: Whole = UNSET
    best_of: Whole = UNSET
    max_tokens: Whole = UNSET
    min_tokens: Whole = UNSET
    temperature: Number = UNSET
    top_p: Number = UNSET
    top_k: Whole = UNSET
    min_p: Number = UNSET
    repetition_penalty: Number = UNSET
    presence_penalty: Number = UNSET
    frequency_penalty: Number = UNSET
    logit_bias: dict[str, float] | UnsetType | None = UNSET
    seed: Whole = UNSET
    stop: str | list[str] | UnsetType | None = UNSET
    stop_token_ids: list[int] | UnsetType | None = UNSET
    ignore_eos: Flag = UNSET
    priority: Whole = UNSET
    cache_salt: Text = UNSET
    timeout: Number = UNSET
    draft: Text = UNSET
    response_format: ResponseFormat | UnsetType | None = UNSET
    structured_outputs: StructuredOutputs | UnsetType | None = UNSET
    guided_json: Schema = UNSET
    guided_regex: Text = UNSET
    guided_choice: list[str] | UnsetType | None = UNSET
    guided_grammar: Text = UNSET
    return_progress: Flag = UNSET


# The fields whose values are those of SamplingParams, under the same names.
_SAME = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "stop", "stop_token_ids", "ignore_eos"),
    *("cache_salt", "timeout", "draft"),
)


@dataclass(frozen=True)
class Wishes:
    """What a writer of this dialect needs of a request.

    choices: how many a client gets per prompt, the likeliest of ``drawn``. logprobs: None where they were not asked
    for. usage: a stream ends with one chunk of usage; usage_always: every chunk has one. echo: the prompt is repeated
    before its continuation. old_calls: the request has functions, and gets a function_call.
    """

    choices: int = 1
    drawn: int = 1
    logprobs: int | None = None
    usage: bool = False
    usage_always: bool = False
    echo: bool = False
    old_calls: bool = False


def wishes_of(
    fields: Fields, logprobs: int | None, *, prompts: int = 1, echo: bool = False, old_calls: bool = False
) -> Wishes:
    """Raises Problem for choices that cannot be given."""
    choices, drawn = said(fields.n), said(fields.best_of)
    if drawn is not None:
        between("best_of", drawn, 1, MAX_N)
        if (choices or 1) > drawn:
            raise bad(
                "best_of", f"got {drawn} with n={shown(choices)}", "It is the number that n are chosen from."
            )
        if fields.stream is True and drawn > (choices or 1):
            raise bad("best_of", "got it in a stream", "The best are known at the end: leave out stream.")
    between("n", 1 if choices is None else choices, 1, MAX_N)
    drawn = drawn or choices or 1
    if drawn > 1 and drawn * prompts > MAX_N:
        found = f"{drawn} answers to each of {prompts} prompts"
        raise bad("n" if fields.best_of in (None, UNSET) else "best_of", found, f"At most {MAX_N} are given.")
    options = said(fields.stream_options) or StreamOptions()
    return Wishes(
        choices or 1,
        drawn,
        logprobs,
        options.include_usage is True,
        options.include_usage is True and options.continuous_usage_stats is True,
        echo,
        old_calls,
    )


def sampling_of(
    fields: Fields,
    wishes: Wishes,
    logprobs_param: str,
    *,
    limit_param: str = "max_tokens",
    limit: int | None = None,
) -> dict[str, Any]:
    """Ask.sampling. limit: of tokens, where it stands in another field than max_tokens. Raises Problem."""
    sampling = {name: value for name in _SAME if (value := said(getattr(fields, name))) is not None}
    if limit is not None:
        sampling["max_tokens"] = limit
    if sampling.get("top_k") == -1:
        sampling["top_k"] = 0
    if wishes.drawn > 1:
        sampling["n"] = wishes.drawn
    if wishes.logprobs is not None or wishes.drawn > wishes.choices:
        sampling["logprobs"] = wishes.logprobs or 0
    bias = said(fields.logit_bias)
    if bias:
        sampling["logit_bias"] = {_token_id(key): value for key, value in bias.items()}
    grammar = grammar_of(fields)
    if grammar is not None:
        sampling["grammar"] = grammar
    checked_sampling(sampling, {"logprobs": logprobs_param, "max_tokens": limit_param})
    return sampling


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 20):
        raise bad("logit_bias", "a key that is no token id", 'Keys are token ids, such as "151643".')
    return int(key)


def priority_of(fields: Fields) -> int:
    """Ask.priority: 0 to 9, what is beyond is the nearest of them."""
    priority = said(fields.priority)
    low, high = PRIORITIES
    return 5 if priority is None else min(max(priority, low), high)


def grammar_of(fields: Fields) -> Grammar | None:
    """What the answer must be, however the request says it. Raises Problem for two ways at once, and for what no
    grammar can be made of."""
    asked: list[tuple[str, Callable[[], Grammar]]] = []
    if response_format := said(fields.response_format):
        asked += _of_response_format(response_format)
    if structured := said(fields.structured_outputs):
        if said(structured.structural_tag) is not None:
            raise bad("structured_outputs.structural_tag", "it is not served", "Use tools, json or grammar.")
        asked += _each("structured_outputs.", *_values(structured, ""))
        if structured.json_object is True:
            asked.append(("structured_outputs.json_object", Grammar.json_object))
    asked += _each("guided_", *_values(fields, "guided_"))
    if not asked:
        return None
    if len(asked) > 1:
        raise bad(asked[1][0], f"{asked[0][0]} is there too", "Say in one way what the answer must be.")
    param, make = asked[0]
    with blamed_on(param):
        return make()


def _values(struct: Any, prefix: str) -> list[Any]:
    return [said(getattr(struct, prefix + name)) for name in ("json", "regex", "choice", "grammar")]


def _each(
    prefix: str, schema: Any, regex: str | None, choice: Sequence[str] | None, grammar: str | None
) -> list[tuple[str, Callable[[], Grammar]]]:
    asked: list[tuple[str, Callable[[], Grammar]]] = []
    if schema is not None:
        asked.append((f"{prefix}json", partial(Grammar.json_schema, schema)))
    if regex is not None:
        asked.append((f"{prefix}regex", partial(Grammar.regex, regex)))
    if choice is not None:
        at_most(f"{prefix}choice", choice, MAX_PROMPTS)
        asked.append((f"{prefix}choice", partial(Grammar.choice, choice)))
    if grammar is not None:
        asked.append((f"{prefix}grammar", partial(Grammar.lark, grammar)))
    return asked


def _of_response_format(asked: ResponseFormat) -> list[tuple[str, Callable[[], Grammar]]]:
    if asked.type == "text":
        return []
    if asked.type == "json_schema":
        named = said(asked.json_schema)
        param = "response_format.json_schema.schema" if named else "response_format.schema"
        schema = named.schema if named else asked.schema
        if schema is None or isinstance(schema, UnsetType):
            raise bad("response_format.json_schema.schema", "it is missing", "Send the schema.")
        return [(param, partial(Grammar.json_schema, schema))]
    if asked.type == "json_object":
        schema = asked.schema
        if schema is not None and not isinstance(schema, UnsetType):
            return [("response_format.schema", partial(Grammar.json_schema, schema))]
        return [("response_format", Grammar.json_object)]
    raise bad(
        "response_format.type",
        f"got {asked.type[:80]!r}",
        "Known are text, json_object and json_schema; structured_outputs has regex, choice and grammar.",
    )


def thought_of(
    effort: str | None, kwargs: TemplateKwargs, enable: bool | None, budget: int | None
) -> dict[str, Any]:
    """Ask's enable_thinking, thinking_budget and reasoning_effort. What is said to the template counts most, then the
    two fields of their own names. A budget of 0 is no thought. Raises Problem."""
    effort = checked_effort(effort, "reasoning_effort")
    told = checked_effort(said(kwargs.reasoning_effort), "chat_template_kwargs.reasoning_effort")
    inner, param = said(kwargs.thinking_budget), "chat_template_kwargs.thinking_budget"
    if inner is None:
        inner, param = budget, "thinking_budget"
    enabled: bool | None = None
    if inner is not None:
        between(param, inner, 0, LONGEST_THOUGHT)
        enabled = inner > 0
    said_so = said(kwargs.enable_thinking)
    said_so = enable if said_so is None else said_so
    if said_so is not None:
        enabled = said_so and inner != 0
    return {
        "enable_thinking": enabled,
        "thinking_budget": None if enabled is False else inner or None,
        "reasoning_effort": effort if told is None else told,
    }
