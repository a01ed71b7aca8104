"""A model's tokenizer together with its chat format: what `qwenrt.load_tokenizer` and `LLM.tokenizer` give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from qwenrt.arguments import flag
from qwenrt.config import GenerationConfig, read_json
from qwenrt.config.families import text_model_type
from qwenrt.errors import CheckpointError
from qwenrt.files import is_there
from qwenrt.text.chat.formats import ChatFormat, ReactFormat, load_chat_format
from qwenrt.text.chat.messages import given_tools
from qwenrt.text.tokenizer.tokenizer import Tokenizer, is_qwen1


class ChatTokenizer(Tokenizer):
    """A tokenizer that passes conversations on to the chat format of its directory; without a directory, Qwen-1's."""

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_window_size: int | None = None,
    ) -> list[int]:
        """The prompt for OpenAI-shaped messages. RequestError for messages that no prompt can be built from, and where
        the directory is of a base model, which knows no conversation."""
        prompt = self.chat_format.prompt(
            self,
            messages,
            given_tools(tools),
            max_window_size=max_window_size,
            add_generation_prompt=flag("add_generation_prompt", add_generation_prompt),
        )
        return prompt.token_ids

    @cached_property
    def chat_format(self) -> ChatFormat:
        """The chat format of the directory. Read on first use: Jinja is slow to import."""
        directory = self.directory
        if directory is None:
            return ReactFormat()
        named = GenerationConfig.from_dir(directory).chat_format
        if is_qwen1(directory):
            return load_chat_format(directory, "qwen", named)
        config = directory / "config.json"
        model_type = text_model_type(read_json(config)) if is_there(config, CheckpointError) else "qwen2"
        return load_chat_format(directory, model_type, named)
