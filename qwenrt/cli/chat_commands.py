"""What a line means that somebody typed in a conversation: a command, a message, or a command that there is not."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command: its names, the best one first, what may follow it, and its line in the help."""

    names: tuple[str, ...]
    argument: str
    about: str


COMMANDS = tuple(
    Command(tuple(names.split()), argument, about)
    for names, argument, about in (
        ("help h", "", "show this help"),
        ("exit quit q", "", "leave"),
        ("send", "TEXT", "send a text as it is, if it looks like a command"),
        ("retry", "", "ask the last question again, with another seed"),
        ("undo", "", "take back the last question and its answer"),
        ("clear cl", "", "clear the screen"),
        ("clear-his clh", "", "forget the conversation"),
        ("history his", "", "show the conversation"),
        ("stats", "", "show speed, context used, and what computes"),
        ("seed", "[N]", "show or set the random seed"),
        ("conf", "[k=v ...]", "show or change how tokens are chosen,"),
        ("reset-conf", "", "back to how it was at the start"),
        ("system", "[TEXT]", "show or set the system prompt"),
        ("reset-system", "", "back to the model's own"),
        ("save", "FILE", "save the conversation as JSON"),
        ("load", "FILE", "go on with a saved conversation"),
    )
)
_MORE_ABOUT = {"conf": "e.g. :conf temperature=0 max_tokens=100"}
_NAMES = {name: command.names[0] for command in COMMANDS for name in command.names}
# What other programs call these: Ollama, llama.cpp and chats of their kind.
_ELSEWHERE = {"?": "help", "bye": "exit", "clear": "clear-his", "reset": "clear-his", "new": "clear-his"}
_ELSEWHERE |= {"set": "conf", "show": "conf", "parameters": "conf", "regen": "retry", "regenerate": "retry"}
_ELSEWHERE |= {"redo": "retry", "stop": "exit", "forget": "clear-his"}
_SLASHED = {**_NAMES, **_ELSEWHERE}
_BARE = {"exit": "exit", "quit": "exit", "exit()": "exit", "quit()": "exit"}
# Those of them that can mean nothing else and undo nothing: who types one at a terminal need not type it again.
_PLAIN = {*_BARE, "/exit", "/quit", "/bye", "/help", "/?"}

HELP_END = '''To send a text that looks like a command: ":send TEXT", or a space before it.
Longer messages: end a line with "\\", or start and end with """.
Ctrl-C stops an answer; what there is of it is kept. At the prompt it leaves
if it is pressed twice, and so does Ctrl-D.'''


@dataclass(frozen=True)
class Typed:
    """A line, or several, as typed. ``literal``: a message whatever it looks like."""

    text: str
    literal: bool = False


@dataclass(frozen=True)
class Order:
    """A command by its best name, and what followed it."""

    name: str
    rest: str


@dataclass(frozen=True)
class Question:
    """A message for the model."""

    text: str


@dataclass(frozen=True)
class Mistaken:
    """What looks like a command and is none. ``said``: what its writer is told. ``plainly``: what it asks for at a
    terminal all the same; in a pipe, where nobody would notice, it is a mistake like the others."""

    said: str
    plainly: Order | None = None


def meaning(typed: Typed) -> Order | Question | Mistaken:
    """What a line asks for.

    A command is a single line: a colon, then its name in letters of any case; a full-width colon counts as one. What
    has the form of a command and is none is not sent to the model, and neither are the commands of other programs.
    """
    text = typed.text.strip()
    if typed.literal or "\n" in text:
        return Question(text)
    if re.match("::[A-Za-z]", text):
        return Question(text[1:])
    found = re.match(r"[:：](\s*)([A-Za-z][\w-]*)(?:\s+(.*)|$)", text) or re.match(
        "[:：]()([A-Za-z].*)()", text
    )
    if found is not None:
        space, name, rest = found.groups()
        known = _NAMES.get(name.lower())
        if known is not None:
            return Order(known, (rest or "").strip())
        if not space:
            word = text.split()[0]
            return Mistaken(_not_sent(word, _nearest(name.lower(), {**_NAMES, **_ELSEWHERE}, 0.6)))
    elif text.lower() in _BARE or text.startswith("/"):
        word = text.split()[0]
        meant = _BARE.get(text.lower()) or _nearest(word[1:].lower(), _SLASHED, 0.8)
        if meant is not None:
            return Mistaken(_not_sent(word, meant), Order(meant, "") if text.lower() in _PLAIN else None)
    return Question(text)


def help_text() -> str:
    """All commands, a line each, and how longer messages are typed."""
    lines = ["Commands:"]
    for command in COMMANDS:
        names = ", ".join(f":{name}" for name in command.names)
        lines.append(f"  {f'{names} {command.argument}':<22} {command.about}")
        if command.names[0] in _MORE_ABOUT:
            lines.append(" " * 25 + _MORE_ABOUT[command.names[0]])
    return "\n".join([*lines, HELP_END])


def _nearest(name: str, known: dict[str, str], likeness: float) -> str | None:
    """The command that was meant by a name, or by one like it."""
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, [k for k in known if len(k) > 2], n=1, cutoff=likeness)
    return known[close[0]] if close else None


def _not_sent(word: str, meant: str | None) -> str:
    means = f"Did you mean :{meant}?" if meant else ":help lists the commands."
    return f'"{word}" is no command here, and was not sent. {means} To send it: :send {word}'
