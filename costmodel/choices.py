"""What every class may do on one mesh axis, given what the other axes do: options, each with the specs it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from autopar.costmodel.fold import Fold
from autopar.costmodel.legal import op_fits, op_specs, storage_places, valid
from autopar.mesh import Mesh
from autopar.plan import DEVICE, Storage
from autopar.rule import WHOLE, Choice
from autopar.spec import Placement, R, S, Spec


class Option(NamedTuple):
    """One thing a class may do on the axis in hand, with the full specs (all axes) that follow.

    value: a Choice of an op, a Placement of a stored parameter or free output, None where there is nothing to decide.
    gather: of a parameter ("once", "twice"), else "".
    """

    value: Choice | Placement | None
    ins: tuple[Spec, ...]
    outs: tuple[Spec, ...]
    gather: str = ""


@dataclass
class Pins:
    """What the user (or the planner itself) has fixed, by class.

    choices[cls, axis]: the choices allowed there. storage[cls, axis]: the placements of a parameter, best first: the
    first that fits is taken. gather[cls], reduce[cls]: fixed for a parameter. why[cls, axis]: who asked for it.
    state[cls]: where the optimizer state of a parameter lies, if not on the device.
    """

    choices: dict[tuple[int, int], frozenset[Choice]] = field(default_factory=dict)
    storage: dict[tuple[int, int], tuple[Placement, ...]] = field(default_factory=dict)
    gather: dict[int, str] = field(default_factory=dict)
    reduce: dict[int, str] = field(default_factory=dict)
    why: dict[tuple[int, int], str] = field(default_factory=dict)
    state: dict[int, str] = field(default_factory=dict)


@dataclass
class State:
    """A decision for every class on every axis: what an axis-by-axis search moves through."""

    rows: dict[int, tuple[Choice, ...]]
    storage: dict[int, Storage]
    outputs: dict[int, Spec]

    def copy(self) -> State:
        return State(dict(self.rows), dict(self.storage), dict(self.outputs))


@dataclass
class Space:
    """Everything that may be decided for one program on one mesh.

    Attributes:
        offered: candidate choices of every op class (`layouts.candidates`).
        inputs: spec of every input by name.
        free_outputs: outputs may be left split where a DTensor can say it.
    """

    fold: Fold
    mesh: Mesh
    offered: list[tuple[Choice, ...]]
    inputs: Mapping[str, Spec]
    pins: Pins
    free_outputs: bool = False
    _cache: dict[tuple[int, int, tuple[Choice, ...]], list[Option]] = field(default_factory=dict)

    def start(self) -> State:
        """Everything whole on every axis."""
        whole: Spec = (R,) * len(self.mesh.sizes)
        state = State({}, {}, {})
        for cls in range(len(self.fold.members)):
            item = self.fold.first(cls)
            if item.kind == "op":
                state.rows[cls] = (WHOLE,) * len(self.mesh.sizes)
            elif item.kind == "param":
                gather, reduce = self.pins.gather.get(cls, "once"), self.pins.reduce.get(cls, "reduce_scatter")
                state.storage[cls] = Storage(whole, gather, reduce, self.pins.state.get(cls, DEVICE))
            elif item.kind == "output":
                state.outputs[cls] = whole
        return state

    def options(self, cls: int, axis: int, state: State, pins: Pins | None = None) -> list[Option]:
        """What class `cls` may do on `axis` with the other axes as in `state`; never empty without pins.

        pins: in place of the space's own.
        """
        if pins is None:
            pins = self.pins
        item = self.fold.first(cls)
        size = self.mesh.sizes[axis]
        whole: Spec = (R,) * len(self.mesh.sizes)
        if item.kind == "op":
            row = state.rows[cls]
            key = (cls, axis, (*row[:axis], WHOLE, *row[axis + 1 :]))
            if key not in self._cache:
                self._cache[key] = self._op_options(cls, axis, row)
            only = pins.choices.get((cls, axis))
            return self._cache[key] if only is None else [o for o in self._cache[key] if o.value in only]
        if item.kind == "param":
            meta = item.outs[0]
            assert meta is not None
            base = state.storage[cls].spec
            allowed = pins.storage.get((cls, axis))
            found = []
            for place in storage_places(meta.shape, size) if allowed is None else allowed:
                spec = _put(base, axis, place)
                if not valid(meta.shape, spec, self.mesh.sizes):
                    continue
                gathers: Sequence[str] = ("once", "twice")
                if cls in pins.gather:
                    gathers = (pins.gather[cls],)
                elif all(p.kind == "R" for p in spec) or not self.fold.items.program.training:
                    gathers = ("once",)
                found += [Option(place, (), (spec,), g) for g in gathers]
                if allowed is not None:
                    break
            return found
        if item.kind == "input":
            return [Option(None, (), (tuple(self.inputs.get(item.name, whole)),))]
        if item.kind == "grad":  # decided by its parameter
            return []
        if item.kind == "output" and self.free_outputs:
            meta = item.in_meta[0]
            places = [R] + [S(p.dim) for p in storage_places(meta.shape, size)[1:]]
            specs = [(p, _put(state.outputs[cls], axis, p)) for p in places]
            return [Option(p, (s,), ()) for p, s in specs if valid(meta.shape, s, self.mesh.sizes)]
        return [Option(None, (whole,) * len(item.ins), (whole,) * len(item.outs))]

    def _op_options(self, cls: int, axis: int, row: tuple[Choice, ...]) -> list[Option]:
        item = self.fold.first(cls)
        rule = self.fold.items.rule(item)
        found = []
        for choice in self.offered[cls]:
            trial = _put(row, axis, choice)
            if self.mesh.sizes[axis] == 1 and choice != WHOLE:
                continue
            if op_fits(item, rule, trial, self.mesh.sizes):
                ins, outs = op_specs(rule, trial)
                found.append(Option(choice, ins, outs))
        return found

    def decide(self, state: State, cls: int, axis: int, option: Option) -> None:
        """Write an option into a state."""
        item = self.fold.first(cls)
        if item.kind == "op":
            assert isinstance(option.value, Choice)
            state.rows[cls] = _put(state.rows[cls], axis, option.value)
        elif item.kind == "param":
            state.storage[cls] = replace(state.storage[cls], spec=option.outs[0], gather=option.gather)
        elif item.kind == "output" and option.value is not None:
            state.outputs[cls] = option.ins[0]


def _put(row: tuple, axis: int, value: object) -> tuple:  # type: ignore[type-arg]
    return (*row[:axis], value, *row[axis + 1 :])
