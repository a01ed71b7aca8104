"""Steps that decode, over memory that does not move: a body that a device can capture once and replay."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from qwenrt.backends.stack import Device, Outcome, SeamStack, StackParts, copy_states, token_ids
from qwenrt.ops import reference
from qwenrt.ops.steps import FROM_BEFORE, DecodePlan, DrawTensors, RotaryRows, Step

logger = logging.getLogger("qwenrt")

_FEW = 1024  # of a row's largest logits, which suffice for most draws
_BLOCKS = 64  # of a sequence's table in the smallest graph


class Graph(Protocol):
    """What was captured."""

    def replay(self, step: Step) -> None:
        """Begin to compute the body again, over what its memory holds now. ``step``: for devices that want lengths."""


class Graphs(Protocol):
    """How a device captures. ``sizes``: the numbers of rows for which it does, rising."""

    sizes: tuple[int, ...]

    def capture(self, body: Callable[[], None]) -> Graph:
        """Take down what ``body`` asks of the device. It may be run before, any number of times."""

    def note(self) -> str:
        """What became of the bodies, in few words: "captured in 3 graphs that take 12.5 MiB"."""


class _Eager:
    def __init__(self, body: Callable[[], None]) -> None:
        self._body = body

    def replay(self, step: Step) -> None:
        self._body()


class EagerGraphs:
    """For a device that captures nothing: the body is run each time. It still waits for nothing."""

    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)

    def capture(self, body: Callable[[], None]) -> Graph:
        body()  # what the device lacks, memory above all, is found here and not in the middle of an answer
        return _Eager(body)

    def note(self) -> str:
        return "run as they are, as nothing is captured on this device"


class StepTensors:
    """A step of up to R rows as the captured body reads it: device memory that is allocated once and never moves.

    ``ids`` int64 [R]: each row's input token, ``position`` int64 [R], ``rope`` int64 [R]: the first row of its NTK
    factor in the rotary table; ``states`` int64 [R]: slots of linear attention's states; ``table`` int64 [R, W]: block
    ids; the draws; then what the body gives: ``tokens`` int64 [R] and ``logits`` float32 [R, V].
    """

    def __init__(self, parts: StackParts, device: torch.device) -> None:
        rows, blocks = parts.max_rows, -(-parts.max_model_len // parts.block_size)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.ids, self.position, self.rope, self.states = (zeros(rows) for _ in range(4))
        self.table = zeros(rows, blocks)
        floats = (zeros(rows, dtype=torch.float32) for _ in range(3))
        temperature, top_p, min_p = floats
        self.draw = DrawTensors(temperature, zeros(rows), top_p, min_p, zeros(rows, dtype=torch.float64))
        self.tokens, self.logits = zeros(rows), zeros(rows, parts.network.vocab_size, dtype=torch.float32)

    @property
    def all(self) -> list[torch.Tensor]:
        """Every tensor."""
        own = [self.ids, self.position, self.rope, self.states, self.table]
        return [*own, *self.draw.columns, self.tokens, self.logits]


class RowTable:
    """What the rows of StepTensors hold, as the host knows it, so that only what changed is sent.

    A row is a sequence's place in the step. ``spare``: a block for each row that no sequence owns, which rows without a
    sequence write to; they share one state, ``spare_state``, as states are large. ``first``: the first row of each NTK
    factor in the rotary table.
    """

    def __init__(
        self,
        backend: Device,
        tensors: StepTensors,
        spare: list[int],
        first: dict[int, int],
        spare_state: int = 0,
    ) -> None:
        self._backend, self._tensors, self._first = backend, tensors, first
        self._spare_state = spare_state
        draw = tensors.draw
        self._sent = {
            "position": tensors.position,
            "rope": tensors.rope,
            "states": tensors.states,
            "temperature": draw.temperature,
            "top_k": draw.top_k,
            "top_p": draw.top_p,
            "min_p": draw.min_p,
            "uniform": draw.uniform,
        }
        self._held = {name: tensor.cpu().numpy().copy() for name, tensor in self._sent.items()}
        self._idle_until = min(_BLOCKS, tensors.table.shape[1])  # positions that every graph's table has
        self._spare_tables = [[block] * tensors.table.shape[1] for block in spare]
        self._tables: list[list[int]] = [[] for _ in range(tensors.table.shape[0])]  # as each row was sent

    def fill(self, step: Step, before: Outcome | None, rows: int, fed_already: bool) -> None:
        """Bring the first ``rows`` rows to what a step needs: its sequences, then rows without one. ``fed_already``:
        whether ``ids`` hold what the step before chose, row by row."""
        count = len(step.q_lens)
        padding = [0] * (rows - count)
        # Rows without a sequence may be anywhere: they are left alone until they would leave the smallest table.
        idle = [at if 0 <= at < self._idle_until else 0 for at in self._held["position"][count:rows].tolist()]
        self._send("position", [n - 1 for n in step.kv_lens] + idle)
        self._send("rope", [self._first[alpha] for alpha in step.ntk_alphas] + padding)
        states = step.state_slots or [self._spare_state] * count
        self._send("states", states + [self._spare_state] * len(padding))
        self._send_tables([*step.tables, *(self._spare_table(row) for row in range(count, rows))])
        for name in ("temperature", "top_k", "top_p", "min_p", "uniform"):
            own = [0 if draw is None else getattr(draw, name) for draw in step.draws]
            self._send(name, own + padding)
        steady = fed_already and step.fed == list(range(count)) and set(step.token_ids) == {FROM_BEFORE}
        if not steady:
            self._tensors.ids[:count].copy_(token_ids(self._backend, step, before))

    def _spare_table(self, row: int) -> list[int]:
        """The same block everywhere: wherever the row's position is, it writes there."""
        return self._spare_tables[row]

    def clear(self, rows: int) -> None:
        """Leave the first ``rows`` rows without sequences."""
        self.lose(rows)  # so that they begin at 0: a capture may run the body several times
        self.fill(Step([], [], [], [], []), None, rows, True)

    def advance(self, rows: int) -> None:
        """The body has moved the first ``rows`` positions on by one."""
        self._held["position"][:rows] += 1

    def lose(self, rows: int) -> None:
        """The body has run an unknown number of times: where the first ``rows`` positions are is to be sent again."""
        self._held["position"][:rows] = -1

    def _send(self, name: str, values: list[int]) -> None:
        held, new = self._held[name][: len(values)], np.array(values, self._held[name].dtype)
        if not np.array_equal(held, new):
            self._sent[name][: len(values)].copy_(self._backend.send(new))
            held[:] = new  # only now: a send may fail

    def _send_tables(self, tables: list[list[int]]) -> None:
        for row, table in enumerate(tables):
            old = self._tables[row]
            if old == table:
                continue
            grown = len(table) > len(old) > 0 and table[: len(old)] == old
            first = len(old) if grown else 0
            self._tensors.table[row, first : len(table)].copy_(self._backend.send(table[first:]))
            self._tables[row] = list(table)


class GraphStack:
    """Steps in which every sequence decodes one token, as a body over StepTensors that the device captured.

    One graph for each number of rows (the next of ``Graphs.sizes``), width of the table and way to draw; captured when
    it is first needed. Where a capture fails, the seams serve from then on.
    """

    name = "graphs"

    def __init__(self, backend: Device, parts: StackParts, graphs: Graphs, seams: SeamStack) -> None:
        self._backend, self._parts, self._graphs, self._seams = backend, parts, graphs, seams
        most = min(parts.max_rows, graphs.sizes[-1])
        self._sizes = (*(size for size in graphs.sizes if size < most), most)
        self._captured: dict[tuple[int, int, int | None], Graph] = {}
        self._failed = parts.network.bind_decode()  # why decoding is not captured, if so
        self._layers = backend.decode_layers(parts.network)
        self._rows: RowTable | None = None
        self._last: Outcome | None = None
        self.tensors: StepTensors | None = None

    def why_not(self, step: Step) -> str | None:
        if self._failed is not None:
            return self._failed
        if not step.is_decode:
            return "a prompt is computed"
        if step.adapters:
            return "a sequence has an adapter"
        if len(step.q_lens) > self._sizes[-1]:
            return f"{len(step.q_lens)} sequences, more than {self._sizes[-1]}"
        return None

    def note(self) -> str:
        if self._failed is not None:
            return f"steps that decode go op by op: {self._failed}"
        if not self._captured:
            return "no step that decodes was asked for yet"
        rows = ", ".join(map(str, sorted({rows for rows, _, _ in self._captured})))
        return f"steps that decode, of up to {rows} sequences: {self._graphs.note()}"

    def run(self, step: Step, before: Outcome | None = None) -> Outcome:
        rows = next(size for size in self._sizes if size >= len(step.q_lens))
        try:
            table, tensors = self._memory()
            graph = self._graph(table, rows, self._blocks(step), self._width(step))
        except Exception as error:  # of the device: its driver, its memory, an op that cannot be captured
            self._failed = f"a capture failed: {type(error).__name__}: {str(error)[:200]}"
            logger.warning("steps are not captured on %s: %s", self._backend.device, self._failed)
            return self._seams.run(step, before)
        copy_states(self._parts.cache, step.state_copies)
        table.fill(step, before, rows, before is not None and before is self._last)
        try:
            graph.replay(step)
        except Exception:  # some of the body may have run
            table.lose(rows)
            raise
        copy_states(self._parts.cache, step.states_kept)
        table.advance(rows)
        count = len(step.q_lens)
        chosen = tensors.tokens[:count].clone()  # the next replay comes before the host has read these
        self._last = Outcome(chosen, self._backend.fetch(chosen), tensors.logits[:count], self)
        return self._last

    def _memory(self) -> tuple[RowTable, StepTensors]:
        if self._rows is None or self.tensors is None:
            parts = self._parts
            self.tensors = StepTensors(parts, self._backend.device)
            self._rotary = parts.network.rotary_table(parts.max_model_len)
            self._unused = parts.vocabulary.unused_on(self._backend.device)
            spare = parts.spare_blocks, self._rotary.first, parts.spare_state
            self._rows = RowTable(self._backend, self.tensors, *spare)
        return self._rows, self.tensors

    def _blocks(self, step: Step) -> int:
        """How many columns of the table the body looks at: a power of two, so that few graphs serve."""
        assert self.tensors is not None
        wanted, most = max(map(len, step.tables)), self.tensors.table.shape[1]
        return min(most, max(_BLOCKS, 1 << (wanted - 1).bit_length()))

    def _width(self, step: Step) -> int | None:
        """As reference.choose: how many logits of a row are sorted; None where all rows are greedy or the host's."""
        draws = [draw for draw in step.draws if draw is not None and not draw.greedy]
        if not draws:
            return None
        size = self._parts.vocabulary.size
        widest = max(draw.width(size) for draw in draws)
        return widest and (min(_FEW, size) if widest <= _FEW else size)

    def _graph(self, table: RowTable, rows: int, blocks: int, width: int | None) -> Graph:
        key = rows, blocks, width
        if key not in self._captured:
            table.clear(rows)  # capturing may run the body, which stores keys and chooses tokens
            self._last = None
            self._captured[key] = self._graphs.capture(lambda: self.body(*key))
            table.lose(rows)
        return self._captured[key]

    def body(self, rows: int, blocks: int, width: int | None) -> None:
        """One token of each of the first ``rows`` rows: reads StepTensors, weights and the cache, and nothing else."""
        t, network, cache = self.tensors, self._parts.network, self._parts.cache
        assert t is not None
        ids, position, table = t.ids[:rows], t.position[:rows], t.table[:rows, :blocks]
        slots = reference.decode_slots(table, position, self._parts.block_size)
        at, every = t.rope[:rows] + position, self._rotary.rows
        q_scale = None if every.q_scale is None else every.q_scale.index_select(0, position)
        rotary = RotaryRows(every.cos.index_select(0, at), every.sin.index_select(0, at), q_scale)
        x, plan = network.embed(ids), DecodePlan(position, table, slots, t.states[:rows])
        if self._layers is not None and rows <= self._layers.most:
            logits = self._layers.logits(x, rotary, plan, cache)
        else:
            logits = network.logits(network.final_norm(network.run_layers(x, rotary, plan, cache)))
        t.logits[:rows].copy_(logits)
        chosen = self._backend.choose_rows(
            logits[:, : self._parts.vocabulary.size],
            None if width is None else t.draw.first(rows),
            width or 0,
            self._unused,
        )
        t.tokens[:rows].copy_(chosen)
        reference.advance(ids, position, chosen)
