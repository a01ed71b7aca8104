"""The answers to one request while they are written: all choices of all its prompts as one sequence of Deltas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from qwenrt.answering import joined_by_index
from qwenrt.engine.requests import Progress
from qwenrt.outputs import Delta, Generation

if TYPE_CHECKING:
    from qwenrt.answering import Prepared
    from qwenrt.engine.answers import AsyncAnswer
    from qwenrt.llm import LLM


_MANY = 4096  # pieces; joining more takes long enough to be done beside the event loop


class Running:
    """Deltas of one request, a batch a step; ``Delta.index`` counts over the choices of all prompts.

    ``caller``: whose it is. ``seen`` gets each batch as it comes; ``ended`` is called once, with an error where one
    ended it, when nothing of it is in the engine any more. For one event loop. `begin` comes first.
    """

    def __init__(
        self,
        caller: object,
        seen: Callable[[Sequence[Delta]], None],
        ended: Callable[[Exception | None], None],
    ) -> None:
        self._seen, self._ended, self.caller = seen, ended, caller
        self._open = True
        self.prompt_tokens = 0
        self._error: Exception | None = None
        self._early: list[Delta] = []  # that came and were not read
        self._answers: list[AsyncAnswer] = []
        self._merged: _Merged | None = None

    async def begin(self, llm: LLM, prepared: Sequence[Prepared]) -> None:
        """Submit all of it; with many prompts, others have their turns between. Raises what is wrong with one, and the
        others are ended."""
        self.prompt_tokens = sum(len(one.prompt_token_ids) for one in prepared)
        try:
            for one in prepared:
                if self._answers:
                    await asyncio.sleep(0)
                self._answers.append(llm.asubmit(one))
        except BaseException as error:
            self._error = error if isinstance(error, Exception) else None
            self.close()
            raise
        self._source: AsyncAnswer | _Merged = self._answers[0]
        if len(self._answers) > 1:
            self._source = self._merged = _Merged(self._answers, [one.params.n for one in prepared])

    def progress(self) -> Progress | None:
        """How far the prompts are, together; None where none is in the engine."""
        told = [one for one in (answer.progress for answer in self._answers) if one is not None]
        if not told:
            return None
        return Progress(sum(one.cached for one in told), sum(one.done for one in told))

    async def begins(self, within: float) -> bool:
        """Whether the first piece comes, or it ends, within so many seconds. Nothing is read by this."""
        if not self._early:
            try:
                self._early = await self._source.batch(within)
            except TimeoutError:
                return False
            except Exception as error:
                self._error = error
        return True

    async def batch(self) -> list[Delta]:
        """What came since the last call, waiting for something; [] when all has ended. Raises what made it fail."""
        if self._error is not None:
            raise self._error
        deltas, self._early = self._early, []
        try:
            deltas = deltas or await self._source.batch()
        except Exception as error:
            self._error = error
            raise
        if deltas:
            self._seen(deltas)
        return deltas

    async def whole(self) -> list[Generation]:
        """All choices, finished."""
        deltas: list[Delta] = []
        try:
            while batch := await self.batch():
                deltas += batch
        finally:
            self.close()
        if len(deltas) > _MANY:
            return await asyncio.to_thread(joined_by_index, deltas)
        return joined_by_index(deltas)

    def end_thought(self) -> None:
        """Let what is being thought end here, so that the answer begins."""
        for answer in self._answers:
            answer.end_thought()

    def cancel(self) -> None:
        """End it in the engine; what was written so far, and the ends, can still be read."""
        for answer in self._answers:
            answer.cancel()

    def close(self) -> None:
        """Nothing more is read, and its turn is over. Harmless when it has ended."""
        if not self._open:
            return
        self._open = False
        self.cancel()
        if self._merged is not None:
            self._merged.close()
        self._ended(self._error)


class _Merged:
    """Several answers as one: a task for each puts what it gets into one list."""

    def __init__(self, answers: Sequence[AsyncAnswer], choices: Sequence[int]) -> None:
        self._deltas: list[Delta] = []
        self._error: BaseException | None = None
        self._came = asyncio.Event()
        self._open = len(answers)
        self._tasks = []
        first = 0
        for answer, count in zip(answers, choices, strict=True):
            self._tasks.append(asyncio.ensure_future(self._read(answer, first)))
            first += count

    async def _read(self, answer: AsyncAnswer, first: int) -> None:
        try:
            while batch := await answer.batch():
                self._deltas += [replace(delta, index=first + delta.index) for delta in batch]
                self._came.set()
        except Exception as error:
            self._error = error
        finally:
            self._open -= 1
            self._came.set()

    async def batch(self, within: float | None = None) -> list[Delta]:
        while not self._deltas and self._open and self._error is None:
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), within)
            except asyncio.TimeoutError:
                raise TimeoutError(f"nothing within {within} s") from None
        if self._error is not None:
            raise self._error
        deltas, self._deltas = self._deltas, []
        return deltas

    def close(self) -> None:
        for task in self._tasks:
            with suppress(RuntimeError):  # the loop may be closed
                task.cancel()
