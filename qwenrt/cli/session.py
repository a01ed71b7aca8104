"""The state of one conversation and the commands that change it (those that start with ":")."""

from __future__ import annotations

import ast
import gc
import re
import shutil
from collections.abc import Callable, Generator, Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qwenrt.cli.terminal import Terminal, counted
from qwenrt.errors import QwenrtError
from qwenrt.sampling_params import SamplingParams
from qwenrt.text.chat import conversations

if TYPE_CHECKING:
    from qwenrt.llm import LLM
    from qwenrt.outputs import Delta

HELP = '''Commands:
  :help, :h              show this help
  :exit, :quit, :q       leave
  :clear, :cl            clear the screen
  :clear-his, :clh       forget the conversation
  :history, :his         show the conversation
  :seed                  show the random seed
  :seed N                set the random seed
  :conf                  show how tokens are chosen
  :conf k=v [k=v ...]    change it, e.g. :conf temperature=0 max_tokens=100
  :reset-conf            back to how it was at the start
  :system                show the system prompt
  :system TEXT           set the system prompt
  :reset-system          back to the model's own
  :save FILE             save the conversation as JSON
  :load FILE             go on with a saved conversation
Longer messages: end a line with "\\", or start and end with """.
Ctrl-C stops an answer and forgets the question; at the prompt it leaves.'''

_SPOKEN_LITERALS = {"true": True, "false": False, "none": None, "null": None}


class Leave(Exception):
    """The user ended the conversation."""


class Session:
    """One conversation: the model, the history, and the settings for the next answer."""

    def __init__(
        self,
        llm: LLM,
        terminal: Terminal,
        *,
        params: SamplingParams,
        system: str | None,
        seed: int,
        thinking: dict[str, Any] | None = None,
    ) -> None:
        self.llm, self.terminal, self.thinking = llm, terminal, thinking or {}
        self.params = self._original = params.with_(seed=seed, n=1)
        self.system = system
        self.history: list[tuple[str, str]] = []
        self._commands: dict[str, Callable[[str], None]] = {}
        table: list[tuple[str, Callable[[str], None]]] = [
            ("help h", self._help),
            ("exit quit q", self._leave),
            ("clear cl", self._clear),
            ("clear-his clh", self._clear_history),
            ("history his", self._show_history),
            ("seed", self._seed),
            ("conf", self._conf),
            ("reset-conf", self._reset_conf),
            ("system", self._set_system),
            ("reset-system", self._reset_system),
            ("save", self._save),
            ("load", self._load),
        ]
        for names, action in table:
            self._commands |= dict.fromkeys(names.split(), action)

    def welcome(self) -> None:
        if self.terminal.interactive:
            self.terminal.say(f"This is {self.llm.name}. Type a message, or :help for the commands.", "bold")

    def stream(self, query: str) -> Generator[Delta, None, None]:
        """The answer to ``query``, piece by piece. The seed starts anew, so the same conversation repeats."""
        deltas = self.llm.stream(
            query,
            history=list(self.history),
            system=self.system,
            sampling_params=self.params,
            **self.thinking,
        )
        return cast("Generator[Delta, None, None]", deltas)  # so that it can be closed

    def obey(self, text: str) -> bool:
        """Run ``text`` if its first word is a command; False where it is a message for the model."""
        if not text.startswith(":"):
            return False
        words = text[1:].split(None, 1)
        action = self._commands.get(words[0]) if words else None
        if action is None:
            if self.terminal.interactive and words and re.fullmatch("[A-Za-z-]{2,}", words[0]):
                self.terminal.remark(
                    f'[INFO] ":{words[0]}" is not a command and goes to the model; :help lists them.'
                )
            return False
        action(words[1].strip() if len(words) > 1 else "")
        return True

    # ---- commands

    def _help(self, rest: str) -> None:
        self.terminal.say(HELP)

    def _leave(self, rest: str) -> None:
        raise Leave

    def _clear(self, rest: str) -> None:
        self.terminal.clear()
        self.welcome()
        gc.collect()

    def _clear_history(self, rest: str) -> None:
        count = len(self.history)
        self.history.clear()
        gc.collect()
        self.terminal.say(f"[INFO] Forgot {counted(count, 'turn')}")

    def _show_history(self, rest: str) -> None:
        width = min(shutil.get_terminal_size().columns, 100)
        self.terminal.say(f" History ({len(self.history)}) ".center(width, "="))
        for i, (query, response) in enumerate(self.history):
            self.terminal.say(f"User[{i}]: {query}")
            self.terminal.say(f"Qwen[{i}]: {response}")
        self.terminal.say("=" * width)

    def _seed(self, rest: str) -> None:
        if not rest:
            self.terminal.say(f"[INFO] Current random seed: {self.params.seed}")
            return
        try:
            seed = int(rest.split()[0])
        except ValueError:
            self.terminal.warn(f"The seed must be an integer, not {rest!r}; it stays {self.params.seed}.")
            return
        self.params = self.params.with_(seed=seed)
        self.terminal.say(f"[INFO] Random seed changed to {seed}")

    def _conf(self, rest: str) -> None:
        if rest:
            changes, refused = parse_settings(rest)
            for item in refused:
                self.terminal.warn(f"{item}: left out.")
            if changes.get("n", 1) != 1:
                self.terminal.warn("n is always 1 in a conversation: left out.")
                del changes["n"]
            if not changes:
                return
            try:
                self.params = self.params.with_(**changes)
            except QwenrtError as error:
                self.terminal.error(f"{error} Nothing was changed.")
                return
            self._show_conf(changes)
        else:
            self._show_conf([field.name for field in fields(self.params)])

    def _show_conf(self, names: Iterable[str]) -> None:
        for name in names:
            value, before = getattr(self.params, name), getattr(self._original, name)
            note = "" if value == before else f"    (was {before!r})"
            self.terminal.say(f"  {name} = {value!r}{note}")

    def _reset_conf(self, rest: str) -> None:
        self.params = self._original.with_(seed=self.params.seed)
        self.terminal.say("[INFO] Settings are as they were at the start")

    def _reset_system(self, rest: str) -> None:
        self.system = None
        self._set_system("")

    def _set_system(self, rest: str) -> None:
        if rest:
            self.system = rest
        shown = "the model's own" if self.system is None else self.system
        self.terminal.say(f"[INFO] System prompt: {shown}")

    def _save(self, rest: str) -> None:
        path = self._path(rest, "save")
        if path is None:
            return
        saved = conversations.save(path, self.history, system=self.system)
        self.terminal.say(f"[INFO] Saved {counted(len(self.history), 'turn')} to {saved}")

    def _load(self, rest: str) -> None:
        path = self._path(rest, "load")
        if path is None:
            return
        self.history, self.system = conversations.load(path)
        self.terminal.say(f"[INFO] Loaded {counted(len(self.history), 'turn')} from {path}")

    def _path(self, rest: str, name: str) -> Path | None:
        if not rest:
            self.terminal.warn(f"Which file? For example: :{name} conversation.json")
            return None
        return Path(rest).expanduser()


def parse_settings(text: str) -> tuple[dict[str, Any], list[str]]:
    """'top_p=0.5 stop=["a b"] x' -> ({"top_p": 0.5, "stop": ["a b"]}, ['"x" has no "="']).

    Values are Python literals (true, false, none and null in small letters too) and never evaluated.
    """
    changes: dict[str, Any] = {}
    refused: list[str] = []
    for item in re.split(r"\s+(?=\w+=)", text.strip()):
        name, equals, value = item.partition("=")
        if not equals:
            refused += [f'"{word}" has no "="' for word in item.split()]
            continue
        known, parsed = _literal(value)
        if not known:  # the value may end at the first space
            value, *words = value.split() or [""]
            known, parsed = _literal(value)
            refused += [f'"{word}" has no "="' for word in words]
        if known:
            _rename(changes, name, parsed)
        else:
            refused.append(f"{name}={value} is not a number, True, False, None, a quoted string or a list")
    return changes, refused


def _literal(value: str) -> tuple[bool, Any]:
    if value.lower() in _SPOKEN_LITERALS:
        return True, _SPOKEN_LITERALS[value.lower()]
    try:
        return True, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return False, None


def _rename(changes: dict[str, Any], name: str, value: Any) -> None:
    """The names of generation_config.json are understood as well."""
    if name == "max_new_tokens":
        changes["max_tokens"] = value
    elif name == "do_sample":
        if value is False:
            changes["temperature"] = 0.0
    else:
        changes[name] = value
