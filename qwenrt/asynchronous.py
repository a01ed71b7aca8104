"""What a loaded model does for asyncio: prompts are made in a thread, and a task that is cancelled ends its request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from asyncio import to_thread
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from qwenrt.answering import (
    COMPLETION,
    Messages,
    Pairs,
    Past,
    Prepared,
    ReplyReader,
    TurnOptions,
    generation_of,
)
from qwenrt.outputs import Delta, Generation
from qwenrt.sampling_params import SamplingChanges, SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from qwenrt.engine.answers import AsyncAnswer


class Asynchronous(ABC):
    """The part of an `LLM` that coroutines use: `chat`, `stream` and `generate` under the names achat, astream and
    agenerate."""

    @abstractmethod
    def prepare(self, *args: Any, **asked: Any) -> Prepared:
        """What is asked of the engine, as `LLM.prepare`."""

    @abstractmethod
    def asubmit(self, prepared: Prepared) -> AsyncAnswer:
        """Begin to compute what was prepared, as `LLM.asubmit`."""

    @abstractmethod
    def _turn(self, *asked: Any, **options: Any) -> tuple[Prepared, Callable[[Generation], Any]]:
        """One turn of a chat, and what its caller gets of the answer."""

    @abstractmethod
    def _completions(
        self,
        prompt: object,
        sampling_params: object,
        prompt_token_ids: object,
        adapter: str | None,
        sampling: Mapping[str, Any],
    ) -> tuple[list[Prepared], bool]:
        """Each of the prompts that `agenerate` was given, and whether it was a single one."""

    @overload
    async def achat(
        self, query: str, history: Past = None, system: str | None = None, **options: Unpack[TurnOptions]
    ) -> tuple[str, Pairs]: ...

    @overload
    async def achat(
        self,
        query: str,
        history: Past = None,
        system: str | None = None,
        *,
        tools: Messages,
        **options: Unpack[TurnOptions],
    ) -> Generation: ...

    @overload
    async def achat(
        self, *, messages: Messages, tools: Messages | None = None, **options: Unpack[TurnOptions]
    ) -> Generation: ...

    async def achat(
        self,
        query: str | None = None,
        history: Any = None,
        system: str | None = None,
        *,
        messages: Messages | None = None,
        tools: Messages | None = None,
        **asked: Any,
    ) -> Any:
        """`chat`, with the same arguments and results."""
        prepared, result = await to_thread(self._turn, query, history, system, messages, tools, **asked)
        return result(await self._whole(self.asubmit(prepared), prepared.reader))

    async def astream(
        self,
        query: str | None = None,
        history: Past = None,
        system: str | None = None,
        *,
        messages: Messages | None = None,
        tools: Messages | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        **options: Unpack[TurnOptions],
    ) -> AsyncIterator[Delta]:
        """`stream`, with the same arguments: an asynchronous generator. Closing it cancels the request."""
        prepared = await to_thread(
            self.prepare,
            query,
            history,
            system,
            messages=messages,
            tools=tools,
            prompt_token_ids=prompt_token_ids,
            **options,
        )
        answer = self.asubmit(prepared)
        try:
            async for delta in answer:
                yield delta
        finally:
            answer.cancel()

    @overload
    async def agenerate(
        self,
        prompt: str,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **sampling: Unpack[SamplingChanges],
    ) -> Generation: ...

    @overload
    async def agenerate(
        self,
        prompt: list[str] | tuple[str, ...],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        **sampling: Unpack[SamplingChanges],
    ) -> list[Generation]: ...

    @overload
    async def agenerate(
        self,
        prompt: None = None,
        sampling_params: SamplingParams | None = None,
        *,
        prompt_token_ids: Sequence[int],
        adapter: str | None = None,
        **sampling: Unpack[SamplingChanges],
    ) -> Generation: ...

    @overload
    async def agenerate(
        self,
        prompt: None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_token_ids: Sequence[Sequence[int]],
        adapter: str | None = None,
        **sampling: Unpack[SamplingChanges],
    ) -> list[Generation]: ...

    async def agenerate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Any:
        """`generate`, with the same arguments and results."""
        asked = prompt, sampling_params, prompt_token_ids, adapter, sampling
        each, single = await to_thread(self._completions, *asked)
        answers: list[AsyncAnswer] = []
        try:
            for prepared in each:
                answers.append(self.asubmit(prepared))
            done = [await self._whole(answer) for answer in answers]
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        return done[0] if single else done

    async def _whole(self, answer: AsyncAnswer, reader: ReplyReader = COMPLETION) -> Generation:
        deltas = [delta async for delta in answer]
        return generation_of(deltas, reader, answer.replies)
