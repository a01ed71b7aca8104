"""How much of its work a program of a kernel does at once, as data: for each kernel by what it is compiled for."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tile:
    """``outputs`` of ``inputs`` at a time, by so many warps; a pair of gate and up counts for two outputs."""

    outputs: int
    inputs: int
    warps: int = 4


@dataclass(frozen=True)
class Warps:
    """Of a program of stream.py: so many with other ``rows``, 16 each, and so many with other ``inputs``."""

    rows: int
    inputs: int


@dataclass(frozen=True)
class Tiles:
    """Of each kernel. ``rows``: elements that a program of an op between the linears computes; ``keys``: of a sequence
    that attention looks at at once, ``per_split``: that a program of it looks at before another one is started.

    ``matrix_units``: whether small matrices are multiplied by units for them, without which such a kernel has far too
    few registers: then sums serve, and torch's product.

    ``experts``: of products of many tokens with all experts, by bits: what unpacks 4 has no registers left for more.

    Of linears in Gluon ``wide`` and ``narrow``: with at least, and with less than ``wide_from`` outputs; ``own``: of
    single ones, by bits, outputs and inputs. ``dense_tokens``: up to which they multiply dense weights; torch does
    beyond. ``pdl``: whether they begin before the launch before them has ended.

    All are a first guess from how many bytes each thread loads at once, and were measured on no device. Four warps are
    as many threads as a kernel may have where 64 go in step.
    """

    dense: Tile = Tile(4, 1024)
    codes: dict[int, Tile] = field(default_factory=lambda: {4: Tile(8, 1024), 8: Tile(8, 1024)})
    product: dict[int, Tile] = field(
        default_factory=lambda: {16: Tile(64, 128), 32: Tile(64, 128), 64: Tile(64, 64)}
    )
    matrix: Tile = Tile(32, 128)
    experts: dict[int, Tile] = field(
        default_factory=lambda: {16: Tile(64, 64), 8: Tile(64, 64), 4: Tile(32, 64)}
    )
    grouped_from: int = 8  # tokens from which those of an expert are multiplied together
    rows: int = 1024
    keys: int = 32
    per_split: int = 256
    heads: int = 1  # whose splits a program merges
    state_warps: int = 8  # of a program that holds a matrix of a delta net
    vocabulary: int = 4096  # logits that a program looks at
    matrix_units: bool = True
    wide: Warps = Warps(4, 1)
    narrow: Warps = Warps(1, 8)
    wide_from: int = 8192
    own: dict[tuple[int, int, int], Warps] = field(default_factory=dict)
    dense_tokens: int = 8
    pdl: bool = False

    def warps(self, bits: int, outputs: int, inputs: int) -> Warps:
        """Of one linear in Gluon."""
        usual = self.wide if outputs >= self.wide_from else self.narrow
        return self.own.get((bits, outputs, inputs), usual)


TILES = Tiles()
