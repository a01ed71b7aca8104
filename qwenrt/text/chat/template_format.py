"""Prompts through a Jinja chat template: rendered, tokenised once, trimmed by exchanges."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenrt.errors import RequestError, shown
from qwenrt.text.chat.efforts import EFFORTS
from qwenrt.text.chat.messages import Message, check_messages, check_tools
from qwenrt.text.chat.outside_text import split_at_control_tokens, untrusted
from qwenrt.text.chat.prompt import Prompt, check_window
from qwenrt.text.chat.template_messages import merged_system, prepared, template_messages
from qwenrt.text.replies.reply_format import ReplyFormat
from qwenrt.text.template.provenance import TemplateText, own_runs, own_text, plain
from qwenrt.text.template.sandbox import JinjaTemplate
from qwenrt.text.tokenizer.overlong import Overlong
from qwenrt.text.tokenizer.vocabulary import IM_END, IM_START

if TYPE_CHECKING:
    from qwenrt.text.tokenizer.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class _Request:
    """What stays the same however much of the history is dropped."""

    tokenizer: Tokenizer
    template: JinjaTemplate
    variables: Mapping[str, Any]  # of the template, without the messages
    answer: bool  # whether an answer is to follow


class TemplateFormat:
    """A checkpoint's chat template. ``reply_format``: how answers to its prompts are read, found in the template.

    ``for_tools``: the template to take where tools are given; ``default``: for everything else.
    ``token_texts``: names such as eos_token and their texts, which the templates of some checkpoints write.
    ``merge_system_messages``: where the template takes no system message after the first, their texts join that one.
    """

    def __init__(
        self,
        default: JinjaTemplate,
        for_tools: JinjaTemplate | None = None,
        token_texts: Mapping[str, str] | None = None,
        merge_system_messages: bool = False,
    ) -> None:
        self._default = default
        self._for_tools = for_tools or default
        self._token_texts = {name: TemplateText(text) for name, text in (token_texts or {}).items()}
        self.reply_format = self._read_reply_format()
        self.has_thinking_switch = "enable_thinking" in default.variables
        self.efforts = tuple(
            word for word in EFFORTS if word in default.words and "reasoning_effort" in default.variables
        )
        self._merges_system_messages = merge_system_messages
        self._one_system_message = self._refuses_a_late_system_message()
        self.takes_tools = "tools" in self._for_tools.variables

    def prompt(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        enable_thinking: bool | None = None,
        reasoning_effort: str | None = None,
        add_generation_prompt: bool = True,
        max_window_size: int | None = None,
        most: int | None = None,
    ) -> Prompt:
        """The prompt for OpenAI-shaped messages.

        Messages that end with the assistant's are continued (with ``add_generation_prompt`` off: closed).
        ``max_window_size``: the oldest exchanges, each a user message with all that answers it, are left out
        until the prompt has at most that many tokens; the last one and system messages stay whatever their size.
        ``reasoning_effort``: one of ``efforts``, for the template. ``most``: as `Tokenizer.encode` has it, of all that
        would be left.
        Raises RequestError for what the model's template does not support: tools, a switch for thinking, a conversation
        in this order.
        """
        window = check_window(max_window_size)
        request, checked = self._request(
            tokenizer, messages, tools, enable_thinking, reasoning_effort, add_generation_prompt
        )
        if window is None:
            return self._prompt(request, checked, most)
        remaining = _truncations(checked)
        dropped = bisect_left(
            range(len(remaining) - 1),
            True,
            key=lambda k: len(self._prompt(request, remaining[k]).token_ids) <= window,
        )
        return self._prompt(request, remaining[dropped])

    def rendered(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of the prompt, a TemplateText: what `prompt` makes ids of. Errors as there."""
        return self._rendered(
            *self._request(tokenizer, messages, tools, enable_thinking, None, add_generation_prompt)
        )

    def _request(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        enable_thinking: bool | None,
        reasoning_effort: str | None,
        add_generation_prompt: bool,
    ) -> tuple[_Request, list[Message]]:
        """What is asked of the template, and the messages, both checked."""
        template = self._for_tools if tools else self._default
        if tools:
            check_tools(tools)
            if "tools" not in template.variables:
                found = "its chat template has no place for them"
                raise RequestError("tools for this model", found, "Describe them in the system message.")
        switch: dict[str, Any] = self._switch(template, enable_thinking)
        if reasoning_effort is not None:
            switch["reasoning_effort"] = TemplateText(reasoning_effort)
        allow_text = re.search(r"arguments\s+is\s+(not\s+)?string", template.source) is not None
        checked = prepared(check_messages(messages), allow_text)
        if not checked:
            raise RequestError("messages", "an empty list", "Add a message with role 'user'.")
        if self._one_system_message:
            checked = merged_system(checked) if self._merges_system_messages else _system_first(checked)
        variables = {
            "documents": None,  # as transformers passes it
            **self._token_texts,
            **switch,
            "tools": untrusted(list(tools), "tools") if tools else None,
        }
        return _Request(tokenizer, template, variables, add_generation_prompt), checked

    def _rendered(self, request: _Request, messages: Sequence[Message]) -> str:
        """The text; where an answer goes on, without the end of its turn."""
        continues = request.answer and messages[-1].role == "assistant"
        variables = {
            **request.variables,
            "messages": template_messages(messages),
            "add_generation_prompt": request.answer and not continues,
        }
        try:
            rendered = request.template.render(variables)
        except RequestError as error:
            if any(message.role == "user" for message in messages):
                raise
            found = f"none of {len(messages)} has role 'user', and the model's chat template asks for one"
            raise RequestError("messages", found, "Add the user's message.") from error
        return _without_end(rendered, end_of_turn(request.tokenizer)) if continues else rendered

    def _prompt(self, request: _Request, messages: Sequence[Message], most: int | None = None) -> Prompt:
        rendered = self._rendered(request, messages)
        ids = encode_rendered(request.tokenizer, rendered, most)
        turn = own_text(rendered).rpartition(IM_START)[2]
        in_thought = request.answer and turn.rfind(OPEN) > turn.rfind(CLOSE)
        continues = request.answer and messages[-1].role == "assistant"
        thought_over = continues or (CLOSE in turn and not turn.rpartition(CLOSE)[2].strip())
        return Prompt(ids, in_thought=in_thought, thought_over=thought_over and not in_thought)

    def _switch(self, template: JinjaTemplate, enable_thinking: bool | None) -> dict[str, bool]:
        """The template's variable that turns thinking on or off, where the caller asks for one of the two."""
        if not isinstance(enable_thinking, bool | None):
            raise RequestError(
                "enable_thinking", f"got {shown(enable_thinking)}", "Pass True, False or None."
            )
        if enable_thinking is None:
            return {}
        if "enable_thinking" in template.variables:
            return {"enable_thinking": enable_thinking}
        thinks = self.reply_format.thinking != "none"
        if enable_thinking is not thinks:
            raise RequestError(
                f"enable_thinking={enable_thinking}",
                f"this model {'always' if thinks else 'never'} thinks: its chat template has no switch",
                "Leave it out.",
            )
        return {}

    def _refuses_a_late_system_message(self) -> bool:
        """Whether a conversation can be written, and no more once it has a system message within."""
        said = [{"role": role, "content": "Hello"} for role in ("system", "user", "assistant", "user")]
        return self._writes(said) and not self._writes([*said[:3], said[0], said[3]])

    def _writes(self, messages: list[dict[str, str]]) -> bool:
        variables = {**self._token_texts, "messages": messages, "tools": None, "add_generation_prompt": True}
        try:
            return bool(self._default.render(variables))
        except RequestError:
            return False

    def _read_reply_format(self) -> ReplyFormat:
        """The format of calls by the tags in the template, thinking by what it writes before an answer."""
        source = self._default.source + self._for_tools.source
        calls = "xml" if "<function=" in source else "hermes" if "<tool_call>" in source else "none"
        thinking = "hybrid" if OPEN in source or CLOSE in source or "enable_thinking" in source else "none"
        probe = {**self._token_texts, "messages": [{"role": "user", "content": "Hello"}], "tools": None}
        try:
            rendered = self._default.render({**probe, "add_generation_prompt": True})
        except RequestError:  # it needs another conversation; the error is raised when one is rendered
            rendered = ""
        if rendered.rstrip().endswith(OPEN):
            thinking = "open"
        return ReplyFormat(calls, thinking)  # type: ignore[arg-type]


def _system_first(messages: Sequence[Message]) -> list[Message]:
    """The messages, for a template that takes a system message nowhere else."""
    for index, message in enumerate(messages):
        if message.role == "system" and index > 0:
            raise RequestError(
                f"messages[{index}]",
                f"a system message behind {index} other{'s' * (index > 1)}, and the model's chat template takes one "
                "alone, in the first place",
                "Put its text into the first system message, or load the model with merge_system_messages=True "
                "(--merge-system-messages), which does so.",
            )
    return list(messages)


def encode_rendered(tokenizer: Tokenizer, rendered: str, most: int | None = None) -> list[int]:
    """Ids of a rendered text: control tokens are those that the template wrote. ``most``: see `Tokenizer.encode`."""
    ids, read = list[int](), 0
    for text, token_id in split_at_control_tokens(rendered, tokenizer.control_tokens):
        try:
            ids += tokenizer.encode(text, most=None if most is None else most - len(ids))
        except Overlong as error:
            raise error.within(len(rendered), len(ids), read) from None
        if token_id is not None:
            ids.append(token_id)
        read += len(text)
    return ids


def end_of_turn(tokenizer: Tokenizer) -> str:
    """The token that ends turns: <|im_end|>, or the end of text of a model with other control tokens."""
    if tokenizer.im_end_id is not None:
        return IM_END
    return tokenizer.decode([tokenizer.eod_id])


def _without_end(rendered: str, end: str) -> str:
    """A conversation without the end of its last turn, so that the answer goes on from there."""
    places = (plain(rendered).rfind(end, *run) for run in reversed([*own_runs(rendered)]))
    at = next((at for at in places if at >= 0), -1)
    rest = plain(rendered[at + len(end) :] if at >= 0 else rendered)
    if at <= 0 or rest.strip():
        raise RequestError(
            "continuing the last assistant message",
            f"the chat template ends it with {rest!r:.60}, not with {end}",
            "Send a conversation that ends with a user message.",
        )
    return rendered[:at]


def _truncations(messages: Sequence[Message]) -> list[list[Message]]:
    """The conversation with its oldest 0, 1, 2, ... exchanges left out, down to the last one."""
    kept_first = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    later = [
        i
        for i in range(kept_first + 1, len(messages))
        if messages[i].role == "user" and messages[i - 1].role not in ("user", "system")
    ]
    return [
        [m for m in messages[:start] if m.role == "system"] + list(messages[start:])
        for start in (kept_first, *later)
    ]
