"""How one checkpoint is talked to: from messages to a prompt, and how its answers are to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qwenrt.config import not_the_file, read_json
from qwenrt.errors import ConfigError, RequestError
from qwenrt.text.builtin_templates import TEMPLATES, family
from qwenrt.text.chat_template import Prompt, build_messages
from qwenrt.text.reply_style import ReplyStyle

if TYPE_CHECKING:
    from qwenrt.text.tokenizer import Tokenizer

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_FETCH_AGAIN = "Fetch the file again."


class ChatFormat(Protocol):
    """Builds prompts, and says in which form the answers to them come."""

    @property
    def style(self) -> ReplyStyle: ...

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
        """The prompt for OpenAI-shaped messages; RequestError for those that it cannot be built from."""
        ...


class ReactFormat:
    """Qwen-1: ChatML without a template, tools in the ReAct form (see chat_template.build_messages)."""

    style = ReplyStyle(calls="react", thinking="none")

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
        """The prompt; what only a template or a thinking model knows is refused."""
        if template_kwargs:
            raise RequestError(
                "template_kwargs",
                f"got {len(template_kwargs)}; Qwen-1 has no chat template",
                "Leave them out.",
            )
        if enable_thinking:
            raise RequestError("enable_thinking=True", "Qwen-1 does not think", "Leave it out.")
        return build_messages(tokenizer, messages, tools, max_window_size, add_generation_prompt)


class RawFormat:
    """A base model (chat_format "raw"), which continues texts and knows no conversation."""

    style = ReplyStyle(calls="none", thinking="none")

    def prompt(
        self, tokenizer: Tokenizer, messages: object, tools: object = None, **options: object
    ) -> Prompt:
        raise RequestError(
            "building a chat prompt",
            "this is a base model (chat_format 'raw'), which continues texts and knows no conversation",
            "Use generate(prompt), or load the -Chat release of the model.",
        )


def load_chat_format(directory: str | Path, model_type: str, chat_format: str | None = None) -> ChatFormat:
    """The chat format of a model directory.

    ``chat_format``: as generation_config.json names it; "raw" has no conversations. ``model_type``: "qwen" is
    Qwen-1. All others are talked to through the template of the directory: chat_template.jinja, else
    chat_template of tokenizer_config.json (one, or several of which "tool_use" is taken where there are tools),
    else a built-in one (see builtin_templates.family). Raises ConfigError for a template that cannot be used.
    """
    if chat_format == "raw":
        return RawFormat()
    if model_type == "qwen":
        return ReactFormat()
    return _template_format(Path(directory).expanduser(), model_type)


def _template_format(directory: Path, model_type: str) -> ChatFormat:
    # Here, because Jinja is slow to import and Qwen-1 has no template.
    from qwenrt.text.jinja_template import JinjaTemplate
    from qwenrt.text.template_format import TemplateFormat

    file, config_file = directory / TEMPLATE_FILE, directory / CONFIG_FILE
    config = read_json(config_file) if config_file.exists() else {}
    tokens = {name: _token_text(config.get(name)) for name in _TOKEN_NAMES}
    token_texts = {name: text for name, text in tokens.items() if text is not None}
    if file.exists():
        return TemplateFormat(JinjaTemplate(_source(file), str(file)), None, token_texts)
    named = _named(config.get("chat_template"), f"{config_file}, chat_template")
    if not named:
        name = family(directory, model_type)
        return TemplateFormat(JinjaTemplate(TEMPLATES[name], f"the built-in chat template of {name}"))
    templates = {
        name: JinjaTemplate(source, f"{config_file}, chat_template {name!r:.40}")
        for name, source in named.items()
        if name in ("default", "tool_use")
    }
    if "default" not in templates:
        raise ConfigError(
            f"reading {config_file}, chat_template",
            f"none of {len(named)} templates is named 'default'",
            "Name the one for plain conversations so.",
        )
    return TemplateFormat(templates["default"], templates.get("tool_use"), token_texts)


def _named(given: object, where: str) -> dict[str, str]:
    """name -> source; empty where none is given."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    named = {}
    for entry in given if isinstance(given, list) else [given]:
        name, source = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(source, str):
            raise ConfigError(
                f"reading {where}",
                f"{entry!r:.80}",
                "It is a template, or a list of {'name': ..., 'template': ...}.",
            )
        named[name] = source
    return named


def _source(path: Path) -> str:
    from qwenrt.text.jinja_template import MAX_SOURCE_CHARS

    asked = f"reading {path}"
    try:
        with path.open("rb") as file:
            raw = file.read(4 * MAX_SOURCE_CHARS + 1)
    except OSError as error:
        found = f"{type(error).__name__}: {error.strerror}"
        raise ConfigError(asked, found, "Check the file and its permissions.") from error
    unlike = not_the_file(raw)
    if unlike:
        raise ConfigError(asked, *unlike)
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(asked, f"byte {error.start} is not UTF-8", _FETCH_AGAIN) from error


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
