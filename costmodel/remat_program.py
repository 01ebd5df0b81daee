"""What the forward does not keep, for one plan: an integer program over the classes of a folded program.

For an op c of the forward: r[c] = 1 if the backward has a copy of it, h[c] = 1 if what it makes waits on the host
(`autopar.recompute`). For a value v that an op makes, or that has been brought to another spec: need[v] = 1 if the
backward reads it, k[v] = 1 if the forward keeps it for that. With n members in a class, s seconds of an op, d of
bringing a value to a spec, w of a way to or from the host, and F and B seconds of computation in the two halves:

    (1)  need[v] = 1                                                  of what an op of the backward reads
    (2)  need[v] >= r[c]                                              of what a copied op reads
    (3)  k[v] >= need[v] - r[c] - h[c]                                of what c makes: kept, made again, or fetched
    (4)  m[v] >= need[v] + r[c] + h[c] - 1                            and brought to its spec again, if it was moved
    (5)  fixed(t) + sum_v size (a0(t) + (a1(t) - a0(t)) k + (a2(t) - a0(t)) (need - k)) <= limit    at every moment t
    (6)  r[c] + h[c] <= 1
    (7)  e >= sum_c n w h - u F,  f >= sum_c n w h - u (B + sum_c n s r)    what is waited for
    (8)  sum_c n b h <= host                                          b: bytes that wait there, of each member
    min  sum_c n s r + sum_v n d m + e + f

Moves (views, casts) cost nothing: they are made again from what they read, or kept where that takes less. The moments
of (5) are those of a step that keeps everything. Of the members of v, a1(t) are alive at t if it is kept, a2(t) if it
is made again or fetched, a0(t) if the backward needs it in no way; fixed(t) is the rest. That is exact but for tensors
on their way, and for where copies run: right before their first reader, which depends on what else is copied; it is
taken from the last answer. So the program is solved a few times, and `costmodel.remat_search` measures each answer on
the program that it makes.

Sources: Jain et al., "Checkmate" (2020), for rematerialisation as an integer program; here the backward runs once, in
order, so that a copy has one place, and the program does not grow with the square of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from autopar.costmodel.ilp import solve_linear
from autopar.costmodel.model import Linear, Terms
from autopar.costmodel.remat import Chosen, Remat, Spans

#: Relative gap of a solve, and its seconds.
GAP, SECONDS = 1e-3, 10.0
#: Seconds of all ops are 1000: what a byte costs of as many as there are, where time is the same, and where only
#: bytes count.
TIE, LEAST = 1e-2, 1e6
#: Of the members of a class, whose moments have a row.
ENDS = (0.0, 0.5, 1.0)


def solve(
    remat: Remat, limit: float | None, copied: Collection[int], copies: bool, hosts: bool
) -> tuple[Chosen, float] | None:
    """What not to keep so that at most `limit` bytes come and go, and how many then do; None if there is no way.

    limit: None: so that as few as possible do. copied: the classes by which it is judged where copies run. copies,
    hosts: whether anything may be copied, and wait on the host.
    """
    if limit is None:  # as few as possible, and of those that are about as few the quickest
        program = _Within(remat, copied, None, copies, hosts)
        values = solve_linear(program.linear, SECONDS, GAP)
        assert values is not None  # everything may be kept
        limit = program.most(values) * (1 + GAP)
    program = _Within(remat, copied, limit, copies, hosts)
    values = solve_linear(program.linear, SECONDS, GAP)
    if values is None:
        return None
    return program.chosen(values), program.most(values)


class Columns:
    """Columns and rows (1) to (4), and (6) to (8); the rest is the caller's.

    Attributes:
        copy, away: columns of classes, of copies and of what waits on the host. keep: of values.
    """

    def __init__(self, remat: Remat, copies: Collection[int], hosts: bool, tie: float) -> None:
        """copies: classes that may be copied. hosts: whether anything may wait there. tie: the price of a byte kept."""
        self.remat = remat
        self.linear = Linear()
        self.scale = 1e3 / max(sum(map(remat.total, remat.classes)), 1e-12)
        self.copy = {c: self.linear.column(remat.total(c) * self.scale, binary=True) for c in remat.classes}
        self.away: dict[int, int] = {}
        self.decided = self.copy, self.away
        if hosts and remat.hosts:
            self._hosted()
        for cls, column in self.copy.items():
            if cls not in copies:
                self.linear.row({column: 1.0}, 0.0, 0.0)
        self.free = {c: self.linear.column() for c in remat.reads if c not in self.copy}
        self.need = {v: self.linear.column() for v in remat.members}
        self.sizes = {v: remat.size(m[0]) * len(m) for v, m in remat.members.items()}
        self.keep = {v: self.linear.column(tie * size) for v, size in self.sizes.items()}
        self._needs()
        self._kept()

    def chosen(self, values: Sequence[float]) -> Chosen:
        """What an answer says."""
        return Chosen(*(frozenset(c for c, col in cols.items() if values[col] > 0.5) for cols in self.decided))

    def _hosted(self) -> None:
        """(6), (7) and (8)."""
        remat, row = self.remat, self.linear.row
        ways: dict[int, float] = {}
        bytes_: dict[int, float] = {}
        for cls, copy in self.copy.items():
            seconds = remat.sent(cls) * len(remat.fold.members[cls]) * self.scale
            if seconds:
                away = self.away[cls] = self.linear.column(TIE * seconds, binary=True)
                ways[away] = seconds
                bytes_[away] = sum(remat.waiting(cls)) * len(remat.fold.members[cls])
                row({copy: 1.0, away: 1.0}, -math.inf, 1.0)
        forward, backward = (remat.usable * seconds * self.scale for seconds in remat.halves())
        again = {column: -remat.usable * remat.total(c) * self.scale for c, column in self.copy.items()}
        for hidden, terms in ((forward, ways), (backward, {**ways, **again})):
            exposed = self.linear.column(1.0, high=math.inf)
            row({**terms, exposed: -1.0}, -math.inf, hidden)
        if sum(bytes_.values()) > remat.room:
            row({column: size / max(remat.room, 1.0) for column, size in bytes_.items()}, -math.inf, 1.0)

    def _needs(self) -> None:
        """(1) and (2)."""
        for version, members in self.remat.members.items():
            if any(self.remat.lives[m].last >= 0 for m in members):
                self.linear.row({self.need[version]: 1.0}, 1.0, 1.0)
        for cls, reads in self.remat.reads.items():
            for version in reads:
                again = self.copy.get(cls, self.free.get(cls))
                assert again is not None
                self.linear.row({self.need[version]: 1.0, again: -1.0}, 0.0, math.inf)

    def _kept(self) -> None:
        """(3) and (4)."""
        remat, row = self.remat, self.linear.row
        for version, members in remat.members.items():
            need, keep, cls = self.need[version], self.keep[version], version.tensor.item
            seconds = remat.moved(members[0])
            if seconds is None:
                again = self.copy.get(cls, self.free.get(cls))
                terms: Terms = {keep: 1.0, need: -1.0}
                if again is not None:
                    terms[again] = 1.0
                if cls in self.away:
                    terms[self.away[cls]] = 1.0
                row(terms, 0.0, math.inf)
                continue
            # Copied is what one of its sources is a copy of, or comes from the host.
            made = remat.sources(members[0].tensor)
            sources = sorted({columns[c] for columns in self.decided for c in made if c in columns})
            row({keep: 1.0, need: -1.0, **dict.fromkeys(sources, 1.0)}, 0.0, math.inf)
            moved = self.linear.column(seconds * len(members) * self.scale)
            for source in sources:
                row({moved: 1.0, need: -1.0, source: -1.0}, -1.0, math.inf)


class _Within(Columns):
    """With (5)."""

    def __init__(
        self, remat: Remat, copied: Collection[int], limit: float | None, copies: bool, hosts: bool
    ) -> None:  # fmt: skip
        unit = self.unit = max(max(remat.totals), 1.0)
        # Of what takes as long, the least bytes.
        super().__init__(remat, remat.classes if copies else (), hosts, TIE / unit)
        self.limit = limit
        self.top = None if limit is not None else self.linear.column(LEAST, high=math.inf)  # the limit, in units
        self.moments: list[tuple[Terms, float]] = []
        self._moments(remat.spans(copied), remat.likely)

    def _moments(self, spans: Spans, all_: Spans) -> None:
        """(5)."""
        remat, split = self.remat, self.remat.split
        when = np.array(sorted(self._chosen()))
        late = when >= split
        fixed = np.array([remat.totals[t] for t in when])
        rows: list[Terms] = [{} for _ in when]
        for version, members in remat.members.items():
            lives = [remat.lives[m] for m in members]
            made = np.array([x.made for x in lives])
            read = np.array([max(x.read, x.made) for x in lives])
            taken = [spans[m] if spans[m][0] < math.inf else all_[m] for m in members]
            first = np.array([a for a, _ in taken])
            last = np.array([max(b, x.last) for (_, b), x in zip(taken, lives)])
            begin, end = (np.array(x) for x in zip(*map(remat.span_held, members)))
            out = np.array([remat.buffer(m) in remat.outputs for m in members])
            t = when[:, None]
            early = ~late
            none = ((made <= t) & ((t <= read) & early[:, None] | out)).sum(1)  # outputs are always there
            kept = np.where(late, ((t <= last) | out).sum(1), (made <= t).sum(1))
            again = np.where(late, ((first <= t) & (t <= last) | out).sum(1), none)
            handed = begin == 0  # to the backward, by a step that keeps everything
            held = np.where(
                late, ((begin <= t) & (t <= end)).sum(1), ((made <= t) & ((t <= read) | handed)).sum(1)
            )  # fmt: skip
            size = remat.size(members[0])
            fixed -= size * (held - none)
            keep, need = self.keep[version], self.need[version]
            for at in np.nonzero((kept != none) | (again != none))[0]:
                terms = rows[at]
                up = size * float(again[at] - none[at])
                terms[keep] = terms.get(keep, 0.0) + size * float(kept[at] - none[at]) - up
                if up:
                    terms[need] = terms.get(need, 0.0) + up
        for terms, rest in zip(rows, fixed):
            self.moments.append((terms, float(rest)))
            scaled = {c: v / self.unit for c, v in terms.items() if v}
            if self.top is not None:
                scaled[self.top] = -1.0
            self.linear.row(scaled, -math.inf, ((self.limit or 0.0) - float(rest)) / self.unit)

    def most(self, values: list[float]) -> float:
        """Bytes that come and go at most."""
        return max(rest + sum(values[c] * v for c, v in terms.items()) for terms, rest in self.moments)

    def _chosen(self) -> Iterable[int]:
        """Moments that have a row: of every class those of its first members, its last ones, and between."""
        remat = self.remat
        for members in remat.fold.members:
            times = sorted(remat.at[i] for i in members if i in remat.at)
            if times:
                yield from {times[round(part * (len(times) - 1))] for part in ENDS}


__all__ = ["GAP", "SECONDS", "TIE", "Columns", "solve"]
