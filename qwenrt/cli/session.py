"""The state of one conversation, and what the commands do that change it."""

from __future__ import annotations

import ast
import gc
import re
import shutil
import textwrap
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qwenrt.cli.chat_commands import Order, help_text
from qwenrt.cli.keeping import Kept
from qwenrt.cli.terminal import Terminal, counted
from qwenrt.demo import CAN_ANSWER
from qwenrt.errors import QwenrtError
from qwenrt.sampling_params import SamplingParams
from qwenrt.text.chat import conversations
from qwenrt.text.chat.conversations import Conversation

if TYPE_CHECKING:
    from qwenrt.llm import LLM
    from qwenrt.outputs import Delta

_SPOKEN_LITERALS = {"true": True, "false": False, "none": None, "null": None}


class Leave(Exception):
    """The user ended the conversation. ``status``: what the command exits with, unless a question failed."""

    def __init__(self, status: int = 0) -> None:
        self.status = status


@dataclass(frozen=True)
class Turn:
    """A question and its answer. ``stopped``: the answer is as far as it had come when it was stopped."""

    query: str
    answer: str
    stopped: bool = False


@dataclass(frozen=True)
class Asking:
    """A question that is to be asked now. ``attempt``: how often it was asked before; each has a seed of its own.
    ``instead``: its answer takes the place of the last turn."""

    query: str
    attempt: int = 0
    instead: bool = False


class Session:
    """One conversation: the model, the turns so far, and the settings for the next answer.

    ``kept``: where it is saved after each turn, None for nowhere; ``model``: the name it is saved with.
    """

    def __init__(
        self,
        llm: LLM,
        terminal: Terminal,
        *,
        params: SamplingParams,
        system: str | None,
        seed: int,
        thinking: dict[str, Any] | None = None,
        kept: Kept | None = None,
        model: str | None = None,
    ) -> None:
        self.llm, self.terminal, self.thinking = llm, terminal, thinking or {}
        self.params = self._original = params.with_(seed=seed, n=1)
        self.system, self.model, self.kept = system, model, kept
        self.turns: list[Turn] = []
        self._attempt = 0  # of the last turn
        self._unanswered: Asking | None = None  # what was asked last, where no turn came of it
        self._last: Delta | None = None  # the end of the last answer
        self._commands: dict[str, Callable[[str], Asking | None]] = {
            "help": self._help,
            "exit": self._leave,
            "send": self._send,
            "retry": self._retry,
            "undo": self._undo,
            "clear": self._clear,
            "clear-his": self._clear_history,
            "history": self._show_history,
            "stats": self._stats,
            "seed": self._seed,
            "conf": self._conf,
            "reset-conf": self._reset_conf,
            "system": self._set_system,
            "reset-system": self._reset_system,
            "save": self._save,
            "load": self._load,
        }

    def welcome(self) -> None:
        if not self.terminal.interactive:
            return
        name = tidy(self.llm.name)
        self.terminal.say(f"This is {name}. Type a message, or :help for the commands.", "bold")
        if name == "demo":
            self.terminal.say(f"It is a toy of 4 million parameters. Ask it: {' · '.join(CAN_ANSWER)}", "dim")

    def reopen(self, conversation: Conversation) -> None:
        """Go on with a conversation that was saved."""
        self.system = conversation.system
        self.turns = [
            Turn(query, answer, place in conversation.stopped)
            for place, (query, answer) in enumerate(conversation.history)
        ]
        self._start_anew()

    def stream(self, asking: Asking) -> Generator[Delta, None, None]:
        """The answer to a question, piece by piece. The seed starts anew, so the same conversation repeats."""
        self._unanswered, self._last = asking, None
        params = self.params
        if params.seed is not None and asking.attempt:
            params = params.with_(seed=params.seed + asking.attempt)
        deltas = self.llm.stream(
            asking.query,
            history=[(turn.query, turn.answer) for turn in self.turns[: -1 if asking.instead else None]],
            system=self.system,
            sampling_params=params,
            **self.thinking,
        )
        return cast("Generator[Delta, None, None]", deltas)  # so that it can be closed

    def remember(self, asking: Asking, answer: str, last: Delta | None) -> None:
        """A question was answered. ``last``: the end of the answer, with its figures; None where it was stopped."""
        self.turns[len(self.turns) - asking.instead :] = [Turn(asking.query, answer, stopped=last is None)]
        self._start_anew()
        self._attempt, self._last = asking.attempt, last
        self.keep()

    def keep(self) -> None:
        """Save the conversation where such are kept; where that fails it is said once."""
        if self.kept is None:
            return
        try:
            self.kept.save(self._conversation(self.model))
        except QwenrtError as error:
            self.terminal.warn(str(error))
            self.kept = None

    def obey(self, order: Order) -> Asking | None:
        """Run a command -> the question that it asks, if it asks one."""
        return self._commands[order.name](order.rest)

    # ---- commands

    def _help(self, rest: str) -> None:
        self.terminal.say(help_text())

    def _leave(self, rest: str) -> None:
        raise Leave

    def _send(self, rest: str) -> Asking | None:
        if rest:
            return Asking(rest)
        self.terminal.warn("What? For example: :send :help")
        return None

    def _retry(self, rest: str) -> Asking | None:
        again = self._unanswered
        if again is None and self.turns:
            again = Asking(self.turns[-1].query, self._attempt + 1, instead=True)
        if again is None:
            self.terminal.warn("No question was asked yet.")
        elif again.instead and self.params.greedy:
            self.terminal.remark(
                "[INFO] The most probable answer comes again; :conf temperature=0.7 allows others."
            )
        return again

    def _undo(self, rest: str) -> None:
        if not self.turns:
            self.terminal.warn("There is no turn to take back.")
            return
        turn = self.turns.pop()
        self._start_anew()
        self.keep()
        self.terminal.say(f"[INFO] Took back: {shortened(turn.query)}")

    def _clear(self, rest: str) -> None:
        self.terminal.clear()
        self.welcome()
        gc.collect()

    def _clear_history(self, rest: str) -> None:
        count = len(self.turns)
        self.turns.clear()
        self._start_anew()
        if self.kept is not None:
            self.kept.forget()
        gc.collect()
        self.terminal.say(f"[INFO] Forgot {counted(count, 'turn')}")

    def _show_history(self, rest: str) -> None:
        width = min(shutil.get_terminal_size().columns, 100)
        self.terminal.say(f" History ({len(self.turns)}) ".center(width, "="))
        for i, turn in enumerate(self.turns):
            self.terminal.say(f"User[{i}]: {turn.query}")
            self.terminal.say(f"Qwen[{i}]: {turn.answer}{' [stopped]' if turn.stopped else ''}")
        self.terminal.say("=" * width)

    def _stats(self, rest: str) -> None:
        rows: list[tuple[str, str]] = []
        usage, timing = (self._last.usage, self._last.timing) if self._last else (None, None)
        longest = self.llm.stats()["max_model_len"]
        if usage is None:
            rows.append(("last answer", "stopped" if self.turns and self.turns[-1].stopped else "none yet"))
        else:
            written = counted(usage.completion_tokens, "token")
            if timing is not None:
                written += f" in {timing.total_s:.2f} s, the first after {timing.first_token_s:.2f} s"
                written += f", then {timing.tokens_per_s:.1f} a second" if timing.tokens_per_s else ""
            rows.append(("last answer", written))
            cached = f", {usage.cached_tokens} of them from the cache" if usage.cached_tokens else ""
            rows.append(("its prompt", f"{counted(usage.prompt_tokens, 'token')}{cached}"))
            rows.append(("context", f"{usage.total_tokens} of {longest} tokens used"))
        rows.append(("conversation", counted(len(self.turns), "turn")))
        rows.append(("model", self.llm.summary))
        width = max(shutil.get_terminal_size().columns - 1, 40)
        for name, value in rows:
            self.terminal.say(
                textwrap.fill(
                    value,
                    width,
                    initial_indent=f"  {name:<14}",
                    subsequent_indent=" " * 16,
                    break_on_hyphens=False,
                )
            )

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
        now = self._conversation(None)
        saved = conversations.save(path, now.history, system=now.system, stopped=now.stopped)
        self.terminal.say(f"[INFO] Saved {counted(len(self.turns), 'turn')} to {saved}")

    def _load(self, rest: str) -> None:
        path = self._path(rest, "load")
        if path is None:
            return
        self.reopen(conversations.read(path))
        self.keep()
        self.terminal.say(f"[INFO] Loaded {counted(len(self.turns), 'turn')} from {path}")

    def _start_anew(self) -> None:
        """The last turn is another now."""
        self._attempt, self._unanswered, self._last = 0, None, None

    def _conversation(self, model: str | None) -> Conversation:
        return Conversation(
            [(turn.query, turn.answer) for turn in self.turns],
            self.system,
            frozenset(place for place, turn in enumerate(self.turns) if turn.stopped),
            model,
        )

    def _path(self, rest: str, name: str) -> Path | None:
        if not rest:
            self.terminal.warn(f"Which file? For example: :{name} conversation.json")
            return None
        return Path(rest)


def tidy(name: str) -> str:
    """A model's name without the directories or the owner before it: "/models/Qwen3-4B" -> "Qwen3-4B"."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name


def shortened(text: str, most: int = 60) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


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
    """The two names of generation_config.json that everybody types are understood as well."""
    if name == "max_new_tokens":
        changes["max_tokens"] = value
    elif name == "do_sample":
        if value is False:
            changes["temperature"] = 0.0
    else:
        changes[name] = value
