"""What one rendering of a template may use: steps, time and characters. A template is an untrusted program."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import wraps
from itertools import chain
from typing import Any

from jinja2.runtime import Undefined

from qwenrt.errors import RequestError

STEPS = 200_000  # loop rounds, calls, filters, outputs and comparisons; the longest released template needs hundreds
STEPS_PER_VALUE = 200  # more for each value in the data: a template may look at every message many times
MOST_STEPS = 2_000_000  # and at most, however long the conversation
CHARS = 4 * 2**20  # characters that a template may make in all, of which the output is one part
CHARS_PER_CHAR = 64  # more for each character in the data
MOST_CHARS = 64 * 2**20  # and at most: ten times the text of a million tokens, in at most five bytes each
STEPS_PER_SECOND = 200_000  # of processor time: far below what is usual
READ_PER_STEP = 256  # characters
ITEMS_PER_STEP = 16
MAX_DEPTH = 100  # of lists and objects in one another
MAX_INT_BITS = 4096
ITEM = 32  # what an item of a list or object counts as, in characters
CONTAINER = 3 * ITEM  # and what the list or object itself does

current: ContextVar[Budget] = ContextVar("current")
Cost = Callable[..., None]  # (budget, the template's arguments): draws for what is out of proportion to them


class LimitError(RequestError):
    """A template used more than it may. Internal: the renderer adds which template it was."""


class Budget:
    """The account of one rendering. Every operation of a template draws on it; LimitError where it is used up.

    Nothing is ever credited, so what was made and dropped counts too: `chars` bounds memory. An operation that
    can make much out of little reserves its result before it begins. Both grow with the data, up to bounds that
    do not.

    Sizes are those of a value written out, so that lists which share their items cannot grow unseen. They are
    known by identity: containers never change inside the sandbox, and the account keeps those it has measured.
    """

    def __init__(self, data: Any) -> None:
        self.chars = CHARS
        self._steps = STEPS
        self._known: dict[int, tuple[Any, int, int]] = {}  # id -> (the container, its size, its depth)
        self._until_clock = 0
        self._deadline = float("inf")
        self._largest = 2**62
        size, _ = self._measure(data, 0)
        self.chars = min(CHARS + CHARS_PER_CHAR * size, MOST_CHARS)
        self._steps = min(STEPS + STEPS_PER_VALUE * len(self._known) + size // 2, MOST_STEPS)
        self._largest = self.chars
        self._deadline = time.thread_time() + self._steps / STEPS_PER_SECOND

    def step(self, count: int = 1) -> None:
        """Charge for work that is about to be done: one step, or more."""
        self._steps -= count
        self._until_clock -= count
        if self._steps < 0:
            raise LimitError("rendering", "it takes too many steps")
        if self._until_clock < 0:
            self._until_clock = 32
            if time.thread_time() > self._deadline:
                raise LimitError("rendering", "it takes too long")

    def read(self, value: Any, deep: bool = False) -> None:
        """Charge for reading all of a text, or the items of a list (``deep``: and what they contain)."""
        if isinstance(value, str):
            self.step(len(value) // READ_PER_STEP)
        elif isinstance(value, (list, tuple, dict)):
            self.step(len(value) // ITEMS_PER_STEP)
            if deep:
                self.step(self.size(value) // READ_PER_STEP)

    def reserve(self, chars: int) -> None:
        """LimitError, before it is done, for an operation that would make that many characters."""
        self.step(1 + min(chars, 2**40) // 4096)
        if chars > self.chars:
            raise LimitError("rendering", f"it makes more than {self._largest} characters")

    def spend(self, chars: int) -> None:
        """Charge for that many characters."""
        self.reserve(chars)
        self.chars -= chars

    def made(self, value: Any) -> Any:
        """Charge for a value that was made, and return it. An iterator becomes a list."""
        if isinstance(value, Iterator):
            value = self.listed(value)
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self._measure(value, 0)
        elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise LimitError("rendering", f"a number of {value.bit_length()} bits")
        return value

    def listed(self, values: Iterable[Any]) -> list[Any]:
        """What an iterator yields, as a list, each item a step."""
        items: list[Any] = []
        for item in self.counted(values):
            items.append(item)
            if ITEM * len(items) > self.chars:
                self.reserve(ITEM * len(items))
        return items

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.step()
            yield value

    def size(self, value: Any) -> int:
        """The characters that a value has at most when it is written out. LimitError for what cannot be."""
        return self._measure(value, 0)[0]

    def depth(self, value: Any) -> int:
        return self._measure(value, 0)[1]

    def _measure(self, value: Any, level: int) -> tuple[int, int]:
        if isinstance(value, str):
            return len(value) + 4, 0
        if value is None or isinstance(value, (bool, float, Undefined)):
            return 24, 0
        if isinstance(value, int):
            return 4 + value.bit_length() // 3, 0
        if not isinstance(value, (list, tuple, dict)):
            raise LimitError("rendering", f"it uses a {type(value).__name__} as a value")
        known = self._known.get(id(value))
        if known is not None:
            return known[1], known[2]
        if level > MAX_DEPTH:
            raise LimitError("rendering", f"values more than {MAX_DEPTH} deep in one another")
        if self._deadline != float("inf"):  # no data: the template made it
            self.spend(CONTAINER + ITEM * len(value))
        size = depth = 0
        for item in chain(value, value.values()) if isinstance(value, dict) else value:
            item_size, item_depth = self._measure(item, level + 1)
            size += ITEM + item_size
            depth = max(depth, item_depth + 1)
            if size > self._largest or depth > MAX_DEPTH:
                raise LimitError("rendering", "it builds lists that are too large")
        self._known[id(value)] = (value, size, depth)
        return size, depth


def metered(function: Callable[..., Any], cost: Cost | None = None) -> Callable[..., Any]:
    """The operation, charged to the budget: all filters, tests, methods, operators and functions are wrapped in this.

    The arguments are charged as what is read, ``cost`` draws for what is more than that, and the result is charged
    as what was made. What an iterator would yield later it yields at once.
    """

    jinjas = 0 if getattr(function, "jinja_pass_arg", None) is None else 1  # the environment or a context

    @wraps(function)
    def run(*args: Any, **named: Any) -> Any:
        budget = current.get()
        budget.step(2)
        for value in (*args, *named.values()):
            budget.read(value)
        if cost is not None:
            cost(budget, *args[jinjas:], **named)
        return budget.made(function(*args, **named))

    return run
