"""Prompts through a Jinja chat template: rendered, tokenised once, trimmed by exchanges."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qwenrt.errors import RequestError, shown
from qwenrt.text.chat_template import Prompt, check_window
from qwenrt.text.jinja_template import JinjaTemplate
from qwenrt.text.message_checks import Message, check_messages, check_tools
from qwenrt.text.outside_text import outside, segments
from qwenrt.text.reply_style import ReplyStyle
from qwenrt.text.template_library import FUNCTIONS
from qwenrt.text.template_messages import prepared, template_messages
from qwenrt.text.template_text import TemplateText, own_view, plain
from qwenrt.text.vocabulary import IM_END, IM_START

if TYPE_CHECKING:
    from qwenrt.text.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
_RESERVED = frozenset(("messages", "tools", "add_generation_prompt", *FUNCTIONS))
# Not inside a path, a tag or a word; Chinese text may stand right in front.
_SWITCH = re.compile(r"(?<![\w<./-])/(no_)?think(?![\w/-])", re.ASCII)


@dataclass(frozen=True)
class _Request:
    """What stays the same however much of the history is dropped."""

    tokenizer: Tokenizer
    template: JinjaTemplate
    variables: Mapping[str, Any]  # for the template, but for the messages
    answer: bool  # whether an answer is to follow


class TemplateFormat:
    """A checkpoint's chat template. ``style``: how answers to its prompts are read, found in the template.

    ``for_tools``: the template to take where tools are given; ``default``: for everything else.
    ``token_texts``: names such as eos_token and their texts, which the templates of some checkpoints write.
    """

    def __init__(
        self,
        default: JinjaTemplate,
        for_tools: JinjaTemplate | None = None,
        token_texts: Mapping[str, str] | None = None,
    ) -> None:
        self._default = default
        self._for_tools = for_tools or default
        self._token_texts = {name: TemplateText(text) for name, text in (token_texts or {}).items()}
        self.style = self._read_style()

    def prompt(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        max_window_size: int | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt for OpenAI-shaped messages.

        Messages that end with the assistant's are continued (with ``add_generation_prompt`` off: closed).
        ``max_window_size``: the oldest exchanges, each a user message with all that answers it, are left out
        until the prompt has at most so many tokens; the last one and system messages stay whatever their size.
        ``template_kwargs``: more variables of the template. Raises RequestError for what the model's template
        does not know: tools, a switch for thinking, a variable, a conversation in this order.
        """
        window = check_window(max_window_size)
        template = self._for_tools if tools else self._default
        if tools:
            check_tools(tools)
            if "tools" not in template.variables:
                found = "its chat template has no place for them"
                raise RequestError("tools for this model", found, "Describe them in the system message.")
        extra = self._extra(template, template_kwargs, enable_thinking)
        allow_text = re.search(r"arguments\s+is\s+(not\s+)?string", template.source) is not None
        checked = prepared(check_messages(messages), allow_text)
        if not checked:
            raise RequestError("messages", "an empty list", "Add a message with role 'user'.")
        variables = {
            "documents": None,  # as transformers passes it
            **self._token_texts,
            **{name: outside(value, f"template_kwargs: {name}") for name, value in extra.items()},
            "tools": outside(list(tools), "tools") if tools else None,
        }
        request = _Request(tokenizer, template, variables, add_generation_prompt)
        if window is None:
            return self._prompt(request, checked)
        remaining = _trimmings(checked)
        dropped = bisect_left(
            range(len(remaining) - 1),
            True,
            key=lambda k: len(self._prompt(request, remaining[k]).token_ids) <= window,
        )
        return replace(self._prompt(request, remaining[dropped]), dropped_turns=dropped)

    def _prompt(self, request: _Request, messages: Sequence[Message]) -> Prompt:
        tokenizer = request.tokenizer
        continues = request.answer and messages[-1].role == "assistant"
        rendered = request.template.render(
            {
                **request.variables,
                "messages": template_messages(messages),
                "add_generation_prompt": request.answer and not continues,
            }
        )
        if continues:
            rendered = _without_end(rendered, _end_of_turn(tokenizer))
        ids: list[int] = []
        for text, token_id in segments(rendered, tokenizer.control_tokens):
            ids += tokenizer.encode(text)
            if token_id is not None:
                ids.append(token_id)
        turn = own_view(rendered).rpartition(IM_START)[2]
        in_thought = request.answer and turn.rfind(OPEN) > turn.rfind(CLOSE)
        begun = continues and bool(messages[-1].text or messages[-1].calls)
        may_think = request.answer and self.style.thinking == "hybrid" and CLOSE not in turn and not begun
        return Prompt(
            ids,
            is_continuation=continues,
            thinking=in_thought or (may_think and not _switched_off(messages)),
            in_thought=in_thought,
        )

    def _extra(
        self, template: JinjaTemplate, given: Mapping[str, Any] | None, enable_thinking: object
    ) -> dict[str, Any]:
        """The caller's own variables, checked, with the switch among them where the template has one."""
        extra = dict(given or {})
        if enable_thinking is None:
            enable_thinking = extra.get("enable_thinking")
        extra.pop("enable_thinking", None)
        if not isinstance(enable_thinking, bool | None):
            raise RequestError(
                "enable_thinking", f"got {shown(enable_thinking)}", "Pass True, False or None."
            )
        known = template.variables - _RESERVED - set(self._token_texts)
        unknown = [name for name in extra if name not in known]
        if unknown:
            raise RequestError(
                "template_kwargs",
                f"{unknown[0]!r:.80} is no variable of this chat template",
                f"It has: {', '.join(sorted(known)) or 'none'}.",
            )
        if enable_thinking is None:
            return extra
        if "enable_thinking" in known:
            return {**extra, "enable_thinking": enable_thinking}
        if enable_thinking is not (self.style.thinking != "none"):
            found = "this model always thinks" if self.style.thinking != "none" else "this model never thinks"
            raise RequestError(
                f"enable_thinking={enable_thinking}",
                f"{found}: its chat template has no switch",
                "Leave it out.",
            )
        return extra

    def _read_style(self) -> ReplyStyle:
        """Calls by the tags that the template writes, thinking by what it writes in front of an answer."""
        source = self._default.source + self._for_tools.source
        calls = "xml" if "<function=" in source else "hermes" if "<tool_call>" in source else "none"
        thinking = "hybrid" if OPEN in source or CLOSE in source or "enable_thinking" in source else "none"
        probe = {**self._token_texts, "messages": [{"role": "user", "content": "Hello"}], "tools": None}
        try:
            rendered = self._default.render({**probe, "add_generation_prompt": True})
        except (
            RequestError
        ):  # it wants something else in a conversation; then it will say so to who holds one
            rendered = ""
        if rendered.rstrip().endswith(OPEN):
            thinking = "open"
        return ReplyStyle(calls, thinking)  # type: ignore[arg-type]


def _end_of_turn(tokenizer: Tokenizer) -> str:
    """The token that ends turns: <|im_end|>, or the end of text of a model with other control tokens."""
    if tokenizer.im_end_id is not None:
        return IM_END
    return tokenizer.decode([tokenizer.eod_id])


def _without_end(rendered: str, end: str) -> str:
    """A conversation without the end of its last turn, so that the answer goes on from there."""
    at = own_view(rendered).rfind(end)
    rest = plain(rendered[at + len(end) :] if at >= 0 else rendered)
    if at <= 0 or rest.strip():
        raise RequestError(
            "continuing the last assistant message",
            f"the chat template ends it with {rest!r:.60}, not with {end}",
            "Send a conversation that ends with a user message.",
        )
    return rendered[:at]


def _trimmings(messages: Sequence[Message]) -> list[list[Message]]:
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


def _switched_off(messages: Sequence[Message]) -> bool:
    """Whether the latest soft switch in user or system text is /no_think."""
    switches = [
        found[1] for m in messages if m.role in ("user", "system") for found in _SWITCH.finditer(m.text)
    ]
    return bool(switches) and switches[-1] is not None
