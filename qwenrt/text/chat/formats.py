"""The chat format of a checkpoint: how messages become a prompt, and in which format it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qwenrt.config import read_json
from qwenrt.errors import ConfigError, RequestError
from qwenrt.files import expanded, is_there
from qwenrt.text.chat.builtin_templates import TEMPLATES, family
from qwenrt.text.chat.chatml import build_messages
from qwenrt.text.chat.prompt import Prompt
from qwenrt.text.replies.reply_format import ReplyFormat
from qwenrt.text.template.sources import CONFIG_FILE, template_sources
from qwenrt.text.tokenizer.added_tokens import NAMED_TOKENS, token_content

if TYPE_CHECKING:
    from qwenrt.text.tokenizer.tokenizer import Tokenizer


class ChatFormat(Protocol):
    """Builds prompts, and says in which format the answers to them come."""

    @property
    def reply_format(self) -> ReplyFormat: ...

    @property
    def has_thinking_switch(self) -> bool:
        """Whether enable_thinking may be both True and False."""
        ...

    @property
    def efforts(self) -> tuple[str, ...]:
        """The words for reasoning_effort that its prompts can say, least first; none in most formats."""
        ...

    @property
    def takes_tools(self) -> bool:
        """Whether a prompt has a place for tools."""
        ...

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
        """The prompt for OpenAI-shaped messages; RequestError for those that it cannot be built from, among them
        Overlong (see Tokenizer.encode)."""
        ...


class ReactFormat:
    """Qwen-1: ChatML without a template, tools in the ReAct form (see chatml.build_messages)."""

    reply_format = ReplyFormat(calls="react", thinking="none")
    has_thinking_switch, takes_tools = False, True
    efforts: tuple[str, ...] = ()

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
        """The prompt. RequestError for thinking, which Qwen-1 was not trained for."""
        if enable_thinking:
            raise RequestError("enable_thinking=True", "Qwen-1 does not think", "Leave it out.")
        return build_messages(tokenizer, messages, tools, max_window_size, add_generation_prompt, most)


class RawFormat:
    """A base model (chat_format "raw"), which continues texts and has no chat format."""

    reply_format = ReplyFormat(calls="none", thinking="none")
    has_thinking_switch = takes_tools = False
    efforts: tuple[str, ...] = ()

    def prompt(
        self, tokenizer: Tokenizer, messages: object, tools: object = None, **options: object
    ) -> Prompt:
        raise RequestError(
            "building a chat prompt",
            "this is a base model (chat_format 'raw'), which continues texts and knows no conversation",
            "Use generate(prompt), or load the -Chat release of the model.",
        )


def load_chat_format(
    directory: str | Path,
    model_type: str,
    chat_format: str | None = None,
    *,
    merge_system_messages: bool = False,
) -> ChatFormat:
    """The chat format of a model directory.

    ``chat_format``: as generation_config.json names it; "raw" has no conversations. ``model_type``: "qwen" is
    Qwen-1. All others use a template of the directory (see template.sources; of several, "tool_use" is taken where
    there are tools), else a built-in one (see builtin_templates.family). ``merge_system_messages``: as TemplateFormat
    has it. Raises ConfigError for a template that cannot be used.
    """
    if chat_format == "raw":
        return RawFormat()
    if model_type == "qwen":
        return ReactFormat()
    return _template_format(expanded(directory, ConfigError), model_type, merge_system_messages)


def _template_format(directory: Path, model_type: str, merge_system_messages: bool) -> ChatFormat:
    # Here, because Jinja is slow to import and Qwen-1 has no template.
    from qwenrt.text.chat.template_format import TemplateFormat
    from qwenrt.text.template.sandbox import JinjaTemplate

    config_file = directory / CONFIG_FILE
    config = read_json(config_file) if is_there(config_file, ConfigError) else {}
    tokens = {name: token_content(config.get(name)) for name in NAMED_TOKENS}
    token_texts = {name: text for name, text in tokens.items() if text is not None}
    templates = {name: JinjaTemplate(*source) for name, source in template_sources(directory, config).items()}
    if not templates:
        name = family(directory, model_type)
        return TemplateFormat(JinjaTemplate(TEMPLATES[name], f"the built-in chat template of {name}"))
    return TemplateFormat(templates["default"], templates.get("tool_use"), token_texts, merge_system_messages)
