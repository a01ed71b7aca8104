"""From what a caller asks to the token ids of a prompt, by what a checkpoint says about texts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwenrt.answering import ReplyReader
from qwenrt.arguments import as_integer, as_list, as_token_ids, flag
from qwenrt.config import GenerationConfig, ModelConfig
from qwenrt.errors import CheckpointError, ConfigError, RequestError, shown
from qwenrt.files import is_there
from qwenrt.sampling_params import SamplingParams
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.chat.chatml import build_chat
from qwenrt.text.chat.efforts import NO_WISH, Thinking, ThoughtWish, resolved
from qwenrt.text.chat.formats import ChatFormat, load_chat_format
from qwenrt.text.chat.prompt import Prompt
from qwenrt.text.chat.react import DEFAULT_SYSTEM
from qwenrt.text.chat.tool_choice import ToolChoice, chosen_tools
from qwenrt.text.replies.call_grammar import bound_calls, call_grammar
from qwenrt.text.replies.reply_format import ReplyFormat
from qwenrt.text.tokenizer.tokenizer import TOKENIZER_FILES

logger = logging.getLogger("qwenrt")

History = list[tuple[str, str]]


@dataclass(frozen=True)
class Prompter:
    """The tokenizer, the chat format and the generation settings of one model, and the prompts they make.

    tokenizer: None where the checkpoint has none: token ids in, token ids out. chat_format: an error where it cannot be
    used, which is raised when somebody chats; completing texts goes on.
    """

    name: str
    config: ModelConfig
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    tokenizer: ChatTokenizer | None = None
    chat_format: ChatFormat | ConfigError | None = None

    @classmethod
    def load(
        cls, name: str, directory: Path, config: ModelConfig, *, merge_system_messages: bool = False
    ) -> Prompter:
        """By the files of a model directory. Raises CheckpointError and ConfigError for a tokenizer that is broken or
        of another model. ``merge_system_messages``: as LoadOptions has it."""
        generation = GenerationConfig.from_dir(directory)
        tokenizer = _tokenizer(directory, config)
        chat_format = None
        if tokenizer is not None:
            chat_format = _chat_format(directory, config, generation, merge_system_messages)
        return cls(name, config, generation, tokenizer, chat_format)

    @property
    def can_chat(self) -> bool:
        """Whether the model knows conversations: a Qwen-1 base model does not. Of later ones all do that have a
        tokenizer and can generate."""
        if self.config.model_type == "qwen":
            return self.generation.chat_format == "chatml"
        return self.tokenizer is not None and self.config.is_causal and self.config.has_head

    @property
    def thinking(self) -> Thinking:
        """Whether answers begin with a thought: "never", "always", or "optional" where the caller may choose."""
        chat_format = self.chat_format
        if chat_format is None or isinstance(chat_format, ConfigError):
            return "never"
        if chat_format.has_thinking_switch:
            return "optional"
        return "never" if chat_format.reply_format.thinking == "none" else "always"

    @property
    def takes_tools(self) -> bool:
        """Whether its conversations may have tools."""
        chat_format = self.chat_format
        return (
            chat_format is not None and not isinstance(chat_format, ConfigError) and chat_format.takes_tools
        )

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text, whichever file names it; a chat model's turns end with <|im_end|> as well."""
        ids = [*self.generation.eos_token_ids, *self.config.eos_token_ids]
        tokenizer = self.tokenizer
        if tokenizer is not None:
            ids.append(tokenizer.eod_id)
            if tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
            if self.generation.chat_format == "chatml":
                ids += [i for i in (tokenizer.im_end_id, tokenizer.im_start_id) if i is not None]
        return tuple(dict.fromkeys(ids))

    def needs_tokenizer(self, asked: str) -> ChatTokenizer:
        """The tokenizer. RequestError, which names what was ``asked`` for, where there is none."""
        if self.tokenizer is None:
            raise RequestError(
                f"{asked} with {self.name}",
                "it has no tokenizer file (tokenizer.json, vocab.json with merges.txt, or qwen.tiktoken)",
                "Pass generate(prompt_token_ids=...), or add the file to the directory.",
            )
        return self.tokenizer

    def chat_prompt(
        self,
        query: str | None,
        history: History,
        system: str | None,
        messages: Sequence[Mapping[str, Any]] | None,
        tools: Sequence[Mapping[str, Any]] | None,
        thought: ThoughtWish = NO_WISH,
        tool_choice: object = None,
        parallel_tool_calls: bool = True,
        most: int | None = None,
    ) -> tuple[Prompt, ReplyReader, int | None]:
        """The prompt of one turn, as LLM.chat takes its parts, how its answers are read, and the budget of their
        thoughts. ``most``: as `Tokenizer.encode` has it."""
        if (query is None) == (messages is None):
            found = "both a query and messages" if messages is not None else "neither a query nor messages"
            raise RequestError("chat", found, "Pass chat(query, history=...) or chat(messages=[...]).")
        if query is not None and not isinstance(query, str):
            remedy = "Pass a str; messages are passed by name: chat(messages=[...])."
            raise RequestError("query", f"got {type(query).__name__}", remedy)
        if thought.enable is not None:
            thought = thought._replace(enable=flag("enable_thinking", thought.enable))
        single_call = not flag("parallel_tool_calls", parallel_tool_calls)
        choice = chosen_tools(None if tools is None else list(tools), tool_choice)
        tools = choice.tools
        tokenizer, chat_format = self.needs_tokenizer("chat"), self._usable_chat_format()
        thought = resolved(thought, self.thinking, chat_format.efforts)
        is_qwen1 = self.config.model_type == "qwen"
        window = self.generation.max_window_size if is_qwen1 else None
        if messages is None:
            assert query is not None
            if is_qwen1 and not tools and not thought.enable:
                system = DEFAULT_SYSTEM if system is None else system
                prompt = Prompt(build_chat(tokenizer, query, history, system, window, most=most))
                return prompt, ReplyReader(), thought.budget
            messages = _as_messages(query, history, system)
        prompt = chat_format.prompt(
            tokenizer,
            messages,
            tools,
            enable_thinking=thought.enable,
            reasoning_effort=thought.effort,
            max_window_size=window,
            most=most,
        )
        return prompt, self._reader(chat_format.reply_format, prompt, choice, single_call), thought.budget

    def _reader(
        self, written: ReplyFormat, prompt: Prompt, choice: ToolChoice, single_call: bool
    ) -> ReplyReader:
        """How answers to a prompt are read, and what they must be. ``written``: the format's own way to write them."""
        thinking, calls, tools = written.thinking, written.calls, choice.tools
        if thinking == "open" and not prompt.in_thought:  # the template can leave the thought to the model
            thinking = "hybrid"
        if tools and calls == "none":  # the template has a place for tools and names no tags: the common form
            calls = "hermes"
        reply_format = ReplyFormat(calls if tools else "none", thinking)
        tags = self.needs_tokenizer("chat").added_tokens
        reader = ReplyReader(
            reply_format, prompt.in_thought, tools, single_call, prompt.thought_over, tags=tags
        )
        if not tools:
            return reader
        if not choice.must:
            bound = bound_calls(reply_format, tools, in_thought=prompt.in_thought, tags=tags)
            return replace(reader, grammar=bound)
        grammar = call_grammar(
            reply_format,
            tools,
            choice.name,
            single=single_call,
            in_thought=prompt.in_thought,
            tags=tags,
        )
        return replace(reader, grammar=grammar)

    def completion_prompts(
        self, prompt: object, prompt_token_ids: object, most: int | None = None
    ) -> tuple[list[list[int]], bool]:
        """Texts, or token ids, to be continued -> the token ids of each, and whether a single one was given. ``most``:
        as `Tokenizer.encode` has it, of each."""
        if (prompt is None) == (prompt_token_ids is None):
            found = "neither" if prompt is None else "both"
            raise RequestError("generate", f"{found} of prompt and prompt_token_ids", "Pass one of the two.")
        if prompt_token_ids is not None:
            listed = as_list("prompt_token_ids", prompt_token_ids)
            if listed and as_integer(listed[0]) is None:
                return [as_token_ids(ids) for ids in listed], False
            return [as_token_ids(listed)], True
        tokenizer = self.needs_tokenizer("generate from text")
        texts = [prompt] if isinstance(prompt, str) else as_list("prompt", prompt)
        for text in texts:
            if not isinstance(text, str):
                raise RequestError(
                    "prompt", f"got {type(text).__name__}", "Pass a string or a list of strings."
                )
        ids = [[*tokenizer.prefix_ids, *tokenizer.encode(text, most=most)] for text in texts]
        return ids, isinstance(prompt, str)

    def seeing_control_tokens(self, params: SamplingParams) -> SamplingParams:
        """``params`` in which a stop string that is a control token, which is left out of every text, ends one by its
        id."""
        hidden = self.tokenizer.special_tokens if self.tokenizer is not None and params.stop else {}
        ids = [hidden[stop] for stop in params.stop if stop in hidden]
        for stop in params.stop:
            inside = next((form for form in hidden if form in stop and stop not in hidden), None)
            if inside is not None:
                logger.warning(
                    "stop %s is never found: %s is left out of texts; it would end one by itself",
                    shown(stop),
                    inside,
                )
        return params.with_(stop_token_ids=(*params.stop_token_ids, *ids)) if ids else params

    def _usable_chat_format(self) -> ChatFormat:
        if self.generation.chat_format == "raw":
            raise RequestError(
                f"chatting with {self.name}",
                "it is a base model (chat_format 'raw'), which continues texts and knows no conversation",
                "Use generate(prompt), or load the -Chat release of the model.",
            )
        if isinstance(self.chat_format, ConfigError):
            raise self.chat_format
        assert self.chat_format is not None
        return self.chat_format


def _as_messages(query: str, history: History, system: str | None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for user, assistant in history:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return [*messages, {"role": "user", "content": query}]


def _tokenizer(directory: Path, config: ModelConfig) -> ChatTokenizer | None:
    """The checkpoint's tokenizer; None where it has none."""
    if not any(is_there(directory / name, CheckpointError) for name in TOKENIZER_FILES):
        logger.warning("%s has no tokenizer file: only token ids can go in and out", directory)
        return None
    tokenizer = ChatTokenizer.from_dir(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"loading {directory}",
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model has {config.vocab_size} rows",
            "The vocabulary is of another model, or tokens were added to it and the model was not resized.",
        )
    return tokenizer


def _chat_format(
    directory: Path, config: ModelConfig, generation: GenerationConfig, merge_system_messages: bool
) -> ChatFormat | ConfigError:
    """How the checkpoint is talked to. A template that cannot be used keeps nobody from completing texts."""
    try:
        return load_chat_format(
            directory,
            config.model_type,
            generation.chat_format,
            merge_system_messages=merge_system_messages,
        )
    except ConfigError as error:
        logger.warning("this model cannot chat: %s", error)
        return error
