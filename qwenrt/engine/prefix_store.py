"""Beginnings that several requests had, kept on disk: the next process answers them without computing them again.

Blocks are copied out of the cache when a second request finds them there, a few between two steps and the rest while
nothing is computed; a thread writes them. When a prompt is admitted whose beginning is in the store and not in the
cache, its blocks are read, a few a step, in place of being computed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from qwenrt.engine.block_files import BlockFiles, Label
from qwenrt.engine.block_manager import BlockManager
from qwenrt.engine.kv_cache import KVCache
from qwenrt.engine.sequence import Sequence, Status
from qwenrt.loader.packed_cache.file import digest_of
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import LayerKV
from qwenrt.ops.types import Packed

FORMAT = 1
_ON_THE_WAY = 4  # copies that wait to be written
_SHARE = 20  # of the time between two copies while steps are computed, one part may be a copy
_BESIDE = 0.03  # seconds of a step that reading may take while others are served
_ALONE = 0.25  # and while nobody is: a request that is cancelled meanwhile waits as long
_FLUSH = 1.5  # seconds that closing spends on what was not yet written
logger = logging.getLogger("qwenrt")


class Collects(Protocol):
    """What is told of blocks that were read: the scheduler's way to offer them for sharing."""

    def collect(self, seq: Sequence, num_stored: int, epoch: int) -> None: ...


_Item = tuple[Label, torch.Tensor, int]  # a block, its bytes, when it was used


@dataclass(frozen=True)
class _Wanted:
    """A block that is to be written, if it still is what it was (its uid); its text was used at ``used_ns``."""

    label: Label
    block: int
    uid: int
    used_ns: int


@dataclass
class _Reading:
    """A sequence whose beginning is being read, the cache that it is read into (its epoch), and what is to come."""

    seq: Sequence
    epoch: int
    labels: deque[Label]
    first: bool  # whether it counts as cached: not where the sequence is computed anew


class PrefixStore:
    """The store of one engine. ``model``: the fingerprint of all that blocks depend on. Its methods are for the
    engine's thread; what goes wrong on the disk costs time, and no request fails by it."""

    def __init__(
        self,
        files: BlockFiles,
        model: bytes,
        cache: KVCache,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._files, self._model, self._cache, self._clock = files, model, cache, clock
        self._wanted: OrderedDict[bytes, _Wanted] = OrderedDict()
        self._reading: list[_Reading] = []
        self._next_copy = 0.0
        self._writer = _Writer(files)
        self.num_read = self.num_written = 0

    def admitted(self, seq: Sequence, blocks: BlockManager) -> None:
        """A sequence got its blocks, the first of them shared: note what is to be written, and what can be read. Not of
        one with an adapter, whose number means nothing to the next process."""
        if seq.adapter:
            return
        size, found = blocks.block_size, seq.num_computed // blocks.block_size
        now = time.time_ns()
        used: list[Label] = []
        ahead: deque[Label] = deque()
        for label in self._labels(seq, size):
            held = self._files.holds(label)
            if label.depth < found:
                block = seq.block_table[label.depth]
                if held:
                    used.append(label)
                elif blocks.num_uses(block) > 1 and not self._writer.failed:
                    self._wanted[label.name] = _Wanted(label, block, blocks.uid_of(block), now)
            elif held:
                ahead.append(label)
            else:
                break
        self._files.touch([*used, *ahead])
        if ahead:
            seq.is_read = True
            self._reading.append(_Reading(seq, seq.epoch, ahead, seq.num_cached is None))

    def read(self, scheduler: Collects, others_wait: bool) -> None:
        """Read blocks for a while, in the order of admission."""
        until = self._clock() + (_BESIDE if others_wait else _ALONE)
        while self._reading and self._clock() < until:
            reading = self._reading[0]
            seq = reading.seq
            going = seq.status is Status.RUNNING and seq.epoch == reading.epoch
            if going and reading.labels and self._read_one(reading.labels.popleft(), seq):
                if reading.first:
                    seq.num_cached = seq.num_computed
                scheduler.collect(seq, seq.num_computed, seq.epoch)
                self.num_read += 1
                continue
            if going:
                seq.is_read = False
            self._reading.pop(0)

    def tend(self, blocks: BlockManager, idle: bool) -> bool:
        """Copy one block that is to be written, if the writer has room -> whether there is more to do. Not ``idle``:
        rarely enough that steps lose little by it."""
        if self._writer.failed:
            self._wanted.clear()
        if not self._wanted or self._writer.is_full or (not idle and self._clock() < self._next_copy):
            return bool(self._wanted) and not self._writer.failed
        began = self._clock()
        _, wanted = self._wanted.popitem(last=False)
        if blocks.uid_of(wanted.block) == wanted.uid:
            data = torch.cat(list(_bytes_of(self._cache, wanted.block))).cpu()
            self._writer.put((wanted.label, data, wanted.used_ns))
            self.num_written += 1
        self._next_copy = self._clock() + _SHARE * (self._clock() - began)
        return bool(self._wanted)

    def close(self, blocks: BlockManager) -> None:
        """Write what was to be written, for a short while, and let go of the files."""
        until = time.monotonic() + _FLUSH
        while time.monotonic() < until and self.tend(blocks, idle=True):
            if self._writer.is_full:
                time.sleep(0.002)
        if self._writer.close(max(0.0, until - time.monotonic())):
            self._files.close()

    def _labels(self, seq: Sequence, size: int) -> Iterator[Label]:
        """Those of the full blocks of a text, but for its last token, which is always computed."""
        before = hashlib.blake2b(self._model + repr(seq.root[:2]).encode(), digest_size=32).digest()
        for depth in range((len(seq.token_ids) - 1) // size):
            ids = tuple(seq.token_ids[depth * size : (depth + 1) * size])
            label = Label(self._model, before, ids, depth)
            yield label
            before = label.name

    def _read_one(self, label: Label, seq: Sequence) -> bool:
        block = seq.block_table[label.depth]
        parts = self._cache.parts(block)
        data = torch.empty(sum(part.nbytes for part in parts), dtype=torch.uint8)
        if not self._files.read(label, data):
            return False
        place = 0
        for part in parts:
            part.view(-1).view(torch.uint8).copy_(data[place : place + part.nbytes])
            place += part.nbytes
        seq.num_computed += len(label.token_ids)
        return True


class _Writer:
    """A thread that writes copies of blocks. After a failure nothing more is written."""

    def __init__(self, files: BlockFiles) -> None:
        self._files, self.failed = files, False
        self._queue: queue.Queue[_Item | None] = queue.Queue(_ON_THE_WAY)
        self._thread: threading.Thread | None = None

    @property
    def is_full(self) -> bool:
        return self._queue.full()

    def put(self, item: _Item) -> None:
        """Called where it is not full."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="qwenrt-prefixes", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter ends
                self.failed = True
                return
            self._thread = thread
        self._queue.put(item)

    def close(self, timeout: float) -> bool:
        """End the thread; False where it is still at a file, on a disk that does not answer."""
        if self._thread is None:
            return True
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            self.failed = True  # the file at hand is its last
        self._thread.join(timeout + 1)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self.failed:
                continue
            try:
                if not self._files.holds(item[0]):
                    self._files.write(*item)
            except OSError as error:
                self.failed = True
                logger.warning("prefixes are no longer kept in %s: %s", self._files.path, error)


def _bytes_of(cache: KVCache, block: int) -> Iterator[torch.Tensor]:
    for part in cache.parts(block):
        yield part.reshape(-1).view(torch.uint8)


def fingerprint(model: Qwen, cache: KVCache, **settings: Any) -> bytes:
    """32 bytes of all that a block's content depends on beside its tokens: the model's configuration and every byte of
    its packed weights, how they are computed (``settings`` among it), and how the cache lies."""
    backend = model.backend
    digest = hashlib.blake2b(digest_size=32)
    layers = [[(str(t.dtype), tuple(t.shape[1:])) for t in layer.tensors] for layer in cache.layers]
    version = str(sys.modules["qwenrt"].__version__)
    facts = [FORMAT, version, torch.__version__, repr(model.config), str(model.dtype), backend.packing_id()]
    digest.update(json.dumps([*facts, layers, sorted(settings.items())]).encode())
    for name in (*sorted(model.tensor_specs), *sorted(model.linear_specs)):
        digest.update(name.encode())
        for tensor in _tensors(model.get(name)):
            digest.update(_identity(tensor))
    for layer in cache.layers:
        assert isinstance(layer, LayerKV)  # states are not kept on disk
        for fitted in (layer.k_offset, layer.k_factor):
            digest.update(b"none" if fitted is None else _identity(fitted))
    return digest.digest()


def _tensors(value: Packed | torch.Tensor) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    for key in sorted(value.data):
        each = value.data[key]
        for item in each if isinstance(each, list) else [each]:
            if isinstance(item, (torch.Tensor, Packed)):
                yield from _tensors(item)
    if value.bias is not None:
        yield value.bias


def _identity(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest_of(flat)}".encode()


def open_store(path: Path, limit: int, model: Qwen, cache: KVCache, **settings: Any) -> PrefixStore:
    """The store in a directory, at most ``limit`` bytes of it. Raises ConfigError where the directory cannot serve."""
    return PrefixStore(BlockFiles(path, limit), fingerprint(model, cache, **settings), cache)
