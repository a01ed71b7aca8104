"""A Problem as the bytes of an answer, in the dialect of the path that was asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwenrt.text.dialects import anthropic, dashscope, ollama, openai_chat
from qwenrt.text.dialects.answers import json_bytes
from qwenrt.text.dialects.problem import Problem
