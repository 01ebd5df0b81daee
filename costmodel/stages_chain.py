"""What a pipeline is cut from: a chain of pieces, what a stage of some of them costs, and all such stages as arrays.

Seconds are of one micro-batch (an update: of one step), bytes of one rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Columns of `Edges.numbers`: an Option's seconds, its bytes, and the seconds of the sends over the gap before it.
COLUMNS = (
    "forward", "input_grad", "weight_grad", "update", "static_bytes", "saved_bytes", "pending_bytes",
    "transient_bytes", "send_forward", "send_backward",
)  # fmt: skip
FORWARD, INPUT, WEIGHT, UPDATE, STATIC, SAVED, PENDING, TRANSIENT, SEND_F, SEND_B = range(len(COLUMNS))
#: How many of them an Option has itself.
OWN = 8
#: Prices of a byte closer than this are one.
_SAME = 1 + 1e-9
#: And numbers closer than this differ by rounding only.
_ROUNDED = 1 + 1e-12


@dataclass(frozen=True)
class Option:
    """One way of running some pieces as a stage: a point of time against memory of the plan inside the stage.

    Attributes:
        forward, input_grad, weight_grad: seconds of one micro-batch. update: seconds of the optimizer, once a step.
        static_bytes: parameters, gradients, optimizer state. saved_bytes: held for every micro-batch between its
            forward and its backward. pending_bytes: held for every micro-batch whose input gradients are done and
            whose weight gradients are still to come. transient_bytes: held while an action runs.
        name: what the plan is called in explanations.
    """

    forward: float
    input_grad: float
    weight_grad: float
    update: float
    static_bytes: float
    saved_bytes: float
    pending_bytes: float
    transient_bytes: float
    name: str = ""

    @property
    def work(self) -> float:
        """Seconds of one micro-batch, forward and backward."""
        return self.forward + self.input_grad + self.weight_grad

    def numbers(self) -> tuple[float, ...]:
        """The first `OWN` of `COLUMNS`."""
        return (
            self.forward, self.input_grad, self.weight_grad, self.update, self.static_bytes, self.saved_bytes,
            self.pending_bytes, self.transient_bytes,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins neighbouring ranks: seconds per message, bytes per second and direction."""

    latency: float
    bandwidth: float

    def seconds(self, size: float) -> float:
        """Of one message of `size` bytes; nothing is sent where there is nothing to send."""
        return self.latency + size / self.bandwidth if size > 0 else 0.0


class Chain(Protocol):
    """Pieces in a row, as they are for one size of micro-batch; `pieces` of them, with a gap between neighbours."""

    @property
    def pieces(self) -> int:
        """How many pieces."""

    def options(self, first: int, last: int) -> Sequence[Option]:
        """Ways of running pieces `first` to `last` (not included) as one stage; empty: they cannot be one."""

    def gap_bytes(self, at: int) -> tuple[float, float]:
        """Bytes over the gap before piece `at`, forward and backward; what is relayed included. 1 <= at < pieces."""


@runtime_checkable
class Blocks(Protocol):
    """A Chain that has the numbers of all its stages at once, as `Additive.stages`."""

    def stages(self) -> Iterator[tuple[int, Floats]]:
        """For every first piece: [last - first - 1, option, OWN]."""


@dataclass(frozen=True)
class Twice:
    """What two pieces both have, and a stage of both has once: `more` is counted with either."""

    early: int
    late: int
    more: Option


@dataclass(frozen=True)
class Additive:
    """A Chain from numbers per piece: a stage costs the sum of its pieces, its transient bytes are its largest piece's.

    The pieces of a stage choose among their own options by one common price of a byte (as many prices as make a
    difference, at most `most`), so a stage has few options, all on the lower hull of time against memory.

    Attributes:
        parts: the options of every piece. gaps: bytes forward and backward over the gap before piece 1, 2, ...
        micro: micro-batches in a step; an update's seconds weigh 1 / micro in the price.
        twice: what pairs of pieces have in common; of what many have, a pair for each and the next.
        held: numbers of micro-batches in flight at which saved bytes are weighed against static ones.
        most: how many options a stage may have.
    """

    parts: Sequence[Sequence[Option]]
    gaps: Sequence[tuple[float, float]]
    micro: int = 1
    twice: Sequence[Twice] = ()
    held: tuple[float, ...] = (1.0, 8.0)
    most: int = 6
    _memo: dict[tuple[int, int], tuple[Option, ...]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.parts or not all(self.parts):
            raise ValueError(f"every piece needs an option; of {len(self.parts)} pieces some have none")
        if len(self.gaps) != len(self.parts) - 1:
            raise ValueError(f"{len(self.parts)} pieces have one gap less between them, not {len(self.gaps)}")

    @property
    def pieces(self) -> int:
        return len(self.parts)

    def gap_bytes(self, at: int) -> tuple[float, float]:
        return self.gaps[at - 1]

    def options(self, first: int, last: int) -> Sequence[Option]:
        found = self._memo.get((first, last))
        if found is None:
            found = tuple(self._option(k, first, last) for k in range(len(self.policies)))
            self._memo[first, last] = found
        return found

    def _option(self, k: int, first: int, last: int) -> Option:
        sums = (self._prefix[k, last] - self._prefix[k, first] - self._common(first)[last - first - 1]).tolist()
        names = Counter(self.parts[i][self.policies[k][i]].name for i in range(first, last))
        name = next(iter(names)) if len(names) == 1 else ", ".join(f"{n or 'plain'} x{c}" for n, c in names.items())
        f, i, w, u, static, saved, pending = sums[:TRANSIENT]
        return Option(f, i, w, u, static, saved, pending, float(self._transient[k, first:last].max()), name)

    @cached_property
    def policies(self) -> tuple[tuple[int, ...], ...]:
        """What every piece chooses, at every price that makes a difference; the quickest first, `most` at most."""
        found: dict[tuple[int, ...], None] = {}
        smallest = []
        for held in self.held:
            points = [[(o.work + o.update / self.micro, self._bytes(o, held)) for o in part] for part in self.parts]
            for price in (0.0, *self._prices(points)):
                found[tuple(int(min(_dearness(line, price))[-1]) for line in points)] = None
            smallest.append(tuple(int(min(_dearness(line, np.inf))[-1]) for line in points))
        ranked = sorted(
            {**found, **dict.fromkeys(smallest)}, key=lambda c: sum(p[j].work for p, j in zip(self.parts, c))
        )
        ends = [ranked[0], *dict.fromkeys(smallest)]
        between = [c for c in ranked if c not in ends]
        kept = {*ends, *_spread(between, max(self.most - len(set(ends)), 0))}
        return tuple(c for c in ranked if c in kept)

    def _bytes(self, option: Option, held: float) -> float:
        return option.static_bytes + held * option.saved_bytes + option.pending_bytes

    def _prices(self, points: Sequence[Sequence[tuple[float, float]]]) -> list[float]:
        """Prices just behind which some piece changes its mind, a few times as many as there is room for."""
        slopes = sorted({s for line in points for s in _slopes(line)})
        distinct = [s for s, before in zip(slopes, [0.0, *slopes]) if s > before * _SAME]
        return [s * _SAME for s in _spread(distinct, 4 * self.most)]

    @cached_property
    def _prefix(self) -> Floats:
        """[policy, pieces + 1, TRANSIENT]: sums of the columns that add up."""
        table = np.array([[self.parts[i][j].numbers()[:TRANSIENT] for i, j in enumerate(c)] for c in self.policies])
        return np.concatenate([np.zeros_like(table[:, :1]), np.cumsum(table, axis=1)], axis=1)

    @cached_property
    def _transient(self) -> Floats:
        """[policy, pieces]"""
        return np.array([[self.parts[i][j].transient_bytes for i, j in enumerate(c)] for c in self.policies])

    def _common(self, first: int) -> Floats:
        """[pieces - first, TRANSIENT]: what is counted too often in stages from a piece, by their last."""
        out = np.zeros((self.pieces - first, TRANSIENT))
        early, late, more = self._pairs
        inside = early >= first
        np.add.at(out, late[inside] - first, more[inside])
        return out.cumsum(0)

    @cached_property
    def _pairs(self) -> tuple[Ints, Ints, Floats]:
        """`twice` as arrays: [pairs], [pairs], [pairs, TRANSIENT]."""
        places = np.array([(t.early, t.late) for t in self.twice], dtype=np.int64).reshape(-1, 2)
        more = np.array([t.more.numbers()[:TRANSIENT] for t in self.twice], dtype=np.float64).reshape(-1, TRANSIENT)
        return places[:, 0], places[:, 1], more

    def stages(self) -> Iterator[tuple[int, Floats]]:
        """For every first piece: numbers of all stages from it, [last - first - 1, option, OWN]; as `options` says,
        but all at once."""
        for first in range(self.pieces):
            sums = self._prefix[:, first + 1 :] - self._prefix[:, first : first + 1] - self._common(first)
            most = np.maximum.accumulate(self._transient[:, first:], axis=1)[..., None]
            yield first, np.concatenate([sums, most], axis=2).transpose(1, 0, 2)


@dataclass(frozen=True)
class Alternatives:
    """A Chain whose stages run one of several plans of the whole, whose pieces begin at the same places.

    Attributes:
        chains: of every plan, the first of which says what crosses gaps. Of each only the first option is taken.
    """

    chains: Sequence[Additive]

    @property
    def pieces(self) -> int:
        return self.chains[0].pieces

    def options(self, first: int, last: int) -> Sequence[Option]:
        return [chain.options(first, last)[0] for chain in self.chains]

    def gap_bytes(self, at: int) -> tuple[float, float]:
        return self.chains[0].gap_bytes(at)

    def stages(self) -> Iterator[tuple[int, Floats]]:
        """As of `Additive`."""
        for blocks in zip(*(chain.stages() for chain in self.chains)):
            yield blocks[0][0], np.concatenate([block[:, :1] for _, block in blocks], axis=1)


def _spread(items: Sequence[Any], room: int) -> Sequence[Any]:
    """So many of the items, evenly."""
    if len(items) <= room:
        return items
    return [items[(2 * i + 1) * len(items) // (2 * room)] for i in range(room)]


def _dearness(line: Sequence[tuple[float, float]], price: float) -> list[tuple[float, ...]]:
    """Of every point (seconds, bytes): what it comes to at a price of a byte, and its number; ties: fewer bytes."""
    if price == np.inf:
        return [(size, seconds, j) for j, (seconds, size) in enumerate(line)]
    return [(seconds + price * size, size, j) for j, (seconds, size) in enumerate(line)]


def _slopes(line: Sequence[tuple[float, float]]) -> list[float]:
    """Prices at which the choice among points (seconds, bytes) changes: slopes of their lower hull."""
    hull: list[tuple[float, float]] = []
    for seconds, size in sorted(line):
        if hull and size >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (s0, b0), (s1, b1) = hull[-2:]
            if (s1 - s0) * (b1 - size) < (seconds - s1) * (b0 - b1):
                break
            hull.pop()
        hull.append((seconds, size))
    return [(s1 - s0) / (b0 - b1) for (s0, b0), (s1, b1) in pairwise(hull)]


@dataclass(frozen=True)
class Edges:
    """Every stage that a chain could have, in every option that no other beats, sorted by first and last piece.

    Attributes:
        pieces: of the chain. first, last, option: [edges], option as in `Chain.options`. numbers: [edges, COLUMNS].
    """

    pieces: int
    first: Ints
    last: Ints
    option: Ints
    numbers: Floats

    def __len__(self) -> int:
        return len(self.first)

    @cached_property
    def start(self) -> Ints:
        """[pieces + 1]: where the edges of every first piece begin."""
        return np.searchsorted(self.first, np.arange(self.pieces + 1))

    @cached_property
    def work(self) -> Floats:
        """[edges]: seconds of one micro-batch."""
        return self.numbers[:, [FORWARD, INPUT, WEIGHT]].sum(1)

    @cached_property
    def least_work(self) -> float:
        """Seconds of one micro-batch through all pieces, however they are cut and run; infinite if they cannot be."""
        best = np.full(self.pieces + 1, np.inf)
        best[-1] = 0.0
        for first in reversed(range(self.pieces)):
            span = slice(self.start[first], self.start[first + 1])
            best[first] = (self.work[span] + best[self.last[span]]).min(initial=np.inf)
        return float(best[0])

    def of(self, first: int, last: int) -> Ints:
        """Numbers of the edges of one stage."""
        span = np.arange(self.start[first], self.start[first + 1])
        return span[self.last[span] == last]


def edges(chain: Chain, link: Link, stages: int) -> Edges:
    """All stages of a chain that is cut in `stages` or more: the others have at least one piece each."""
    longest = chain.pieces - stages + 1
    firsts, lasts, options, numbers = [], [], [], []
    for first, block in chain.stages() if isinstance(chain, Blocks) else _asked(chain, longest):
        for_stage = block[:longest]
        kept = _undominated(for_stage)
        at, option = np.nonzero(kept)
        firsts.append(np.full(len(at), first))
        lasts.append(first + 1 + at)
        options.append(option)
        numbers.append(for_stage[at, option])
    first_of = np.concatenate(firsts).astype(np.int64)
    sends = np.zeros((chain.pieces, 2))
    for gap in range(1, chain.pieces):
        sends[gap] = [link.seconds(size) for size in chain.gap_bytes(gap)]
    table = np.concatenate([np.concatenate(numbers), sends[first_of]], axis=1)
    return Edges(chain.pieces, first_of, np.concatenate(lasts).astype(np.int64), np.concatenate(options), table)


def _asked(chain: Chain, longest: int) -> Iterator[tuple[int, Floats]]:
    """As `Additive.stages`, by asking; options that are not there have infinite numbers."""
    for first in range(chain.pieces):
        rows: list[list[tuple[float, ...]]] = []
        for last in range(first + 1, min(first + longest, chain.pieces) + 1):
            rows.append([option.numbers() for option in chain.options(first, last)])
        block = np.full((len(rows), max(map(len, rows)), OWN), np.inf)
        for at, row in enumerate(rows):
            if row:
                block[at, : len(row)] = row
        yield first, block


def _undominated(block: Floats) -> NDArray[np.bool_]:
    """[stages, options]: those that are there, and that no other of the same stage equals or beats in every number."""
    kept = np.isfinite(block[..., FORWARD])
    above = block * _ROUNDED  # sums of the same numbers in another order are equal
    for o in range(block.shape[1]):
        for p in range(block.shape[1]):
            if o != p:
                no_worse = kept[:, p] & (block[:, p] <= above[:, o]).all(-1)
                better = (above[:, p] < block[:, o]).any(-1) | (p < o)
                kept[:, o] &= ~(no_worse & better)
    return kept
