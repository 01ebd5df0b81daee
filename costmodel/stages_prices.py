"""Prices of the rows: a bound on the least of the largest row, and mixtures of ways that show which rows are missing.

Equation (6) of `costmodel.stages`. Its best value is that of a game: one side picks a row, the other a way, and what
the row comes to on that way is paid. Only ways met so far are played with; the best answer to the prices that come out
is a shortest way, which joins them and proves a bound (Dantzig and Wolfe 1960; for the rows, Kelley 1960).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from autopar.costmodel.stages_chain import Floats
from autopar.costmodel.stages_layers import EQUAL, Layers, Rows, Way

#: Rounds of a game; what is kept of the last game's regrets; the part of the best prices in new ones.
_PLAYS, _KEPT, _SMOOTH = 50, 0.5, 0.5
#: After so many ways the rows of the mixture are learnt.
_LEARN = 2
#: What a limit exceeded by all of itself costs in the game, in units of the value looked for.
_STIFF = 2.0
#: Ways without gaining this part of the gap end it.
_PATIENCE, _GAIN = 18, 0.02


class Judge(Protocol):
    """What a way is really worth, in the unit of the rows."""

    def values(self, ways: Sequence[Way]) -> Floats:
        """Of ways that keep the limits."""

    def rows(self, numbers: Floats) -> Rows:
        """Rows that hold for all ways, and are met with equality at numbers [candidates, stages, COLUMNS]."""


@dataclass
class Priced:
    """What `price` found.

    Attributes:
        bound: no way is below. row: the one row that proves it. rows: all, with those learnt. ways: all that were met.
        cuts: [stages + 1], where the mixture of ways of the last game is cut, on average.
    """

    bound: float
    row: Rows
    rows: Rows
    ways: list[Way]
    cuts: Floats


def price(layers: Layers, rows: Rows, judge: Judge, target: float, turns: int, met: Sequence[Way]) -> Priced:
    """Prices of the rows that bound the value best; stops where they reach `target`, or hardly gain.

    Args:
        turns: shortest ways to look for. met: ways to begin with.
    """
    game = _Game(layers, rows, target)
    for way in met:
        game.add(way)
    bound, last, stale = -np.inf, -np.inf, 0
    best, row = np.full(len(rows), 1 / len(rows)), rows
    for turn in range(turns):
        weights = game.play()
        new = False
        for trial in ((1 - _SMOOTH) * weights + _SMOOTH * best, weights):
            summed = game.summed(trial)
            value, way = layers.shortest(summed.coefficients[0])
            here = float(summed.least(np.array([value])))
            if here > bound:
                bound, best, row = here, trial, summed
            new = game.add(way)
            if new:
                break
        if bound >= target * (1 - EQUAL):
            break
        if not new or turn % _LEARN == _LEARN - 1:
            learnt = game.learn(judge.rows(game.mixture()[None]))
            if not new and not learnt:
                break
            best = np.append(best, np.zeros(learnt))
        stale += 1
        if bound > last + _GAIN * (target - last):
            last, stale = bound, 0
        if stale >= _PATIENCE:
            break
    return Priced(bound, row, game.rows, game.ways, game.cuts())


class _Game:
    """Rows against ways. The side of the rows wants much.

    Both sides play by what they regret (regret matching plus: Tammelin 2014; Zinkevich et al. 2007), and the average of
    what they play, later rounds weighing more, comes near the solution.
    """

    def __init__(self, layers: Layers, rows: Rows, target: float):
        self.numbers, self.first, self.last = layers.edges.numbers, layers.edges.first, layers.edges.last
        self.rows, self.target = rows, target
        self.ways: list[Way] = []
        self.known: set[Way] = set()
        self.pays = np.zeros((len(rows), 0))
        self.regret_rows, self.regret_ways = np.zeros(len(rows)), np.zeros(0)
        self.mix = np.zeros(0)

    def add(self, way: Way) -> bool:
        """Whether it is a new one."""
        if way in self.known:
            return False
        self.known.add(way)
        self.ways.append(way)
        self.pays = np.concatenate([self.pays, self._pays(self.rows, [way])], 1)
        self.regret_ways, self.mix = np.append(self.regret_ways, 0.0), np.append(self.mix, 0.0)
        return True

    def learn(self, rows: Rows) -> int:
        """Put rows in; how many were new."""
        before = len(self.rows)
        self.rows = self.rows.joined(rows)
        new = self.rows.part(before)
        self.pays = np.concatenate([self.pays, self._pays(new, self.ways)])
        self.regret_rows = np.append(self.regret_rows, np.zeros(len(new)))
        return len(new)

    def _pays(self, rows: Rows, ways: Sequence[Way]) -> Floats:
        """[rows, ways]"""
        if not ways:
            return np.zeros((len(rows), 0))
        sums = np.tensordot(rows.coefficients, self.numbers[np.array(ways)], ((1, 2), (1, 2)))
        over = self.target * (1 + _STIFF * (sums - rows.fixed[:, None]))
        return np.where((rows.share > 0)[:, None], sums, over)

    def summed(self, weights: Floats) -> Rows:
        """The one row of some weights of the game."""
        return self.rows.summed(np.where(self.rows.share > 0, weights, weights * self.target * _STIFF))

    def play(self) -> Floats:
        """The weights of the rows; those of the ways are kept as `mix`."""
        rows, ways, pays = self.regret_rows * _KEPT, self.regret_ways * _KEPT, self.pays
        weights, mix = np.zeros(len(rows)), np.zeros(len(ways))
        y = _shares(ways)
        for turn in range(1, _PLAYS + 1):
            x = _shares(rows)
            paid = x @ pays
            ways += paid @ y - paid
            np.maximum(ways, 0.0, out=ways)
            y = _shares(ways)
            paid = pays @ y
            rows += paid - x @ paid
            np.maximum(rows, 0.0, out=rows)
            weights += turn * x
            mix += turn * y
        self.regret_rows, self.regret_ways, self.mix = rows, ways, _shares(mix)
        return _shares(weights)

    def mixture(self) -> Floats:
        """[stages, COLUMNS]: the mean numbers of the ways, as mixed."""
        return np.tensordot(self.mix, self.numbers[np.array(self.ways)], 1)

    def cuts(self) -> Floats:
        """Where the mixture is cut, on average."""
        ways, mix = np.array(self.ways), _shares(self.mix)
        return mix @ np.concatenate([self.first[ways], self.last[ways[:, -1:]]], 1)


def _shares(numbers: Floats) -> Floats:
    total = np.add.reduce(numbers)
    return numbers / total if total > 0 else np.full(len(numbers), 1 / max(len(numbers), 1))


__all__ = ["Judge", "Priced", "price"]
