"""Nested arguments and outputs as flat lists of named leaves, and back.

A leaf is anything that is not a mapping, sequence or dataclass; its path is readable ("labels", "batch.x", "args[0]").
`flatten` gives the leaves and a function that rebuilds the same containers from new leaves; a Hugging Face
`ModelOutput` comes back as its own class.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class Leaf(NamedTuple):
    """One value of a nested structure. `path` is "" if the structure is the value itself."""

    path: str
    value: Any


Rebuild = Callable[[list[Any]], Any]


def batched(shapes: Mapping[str, Sequence[int]], shared: Sequence[str] = ()) -> frozenset[str]:
    """Names of the tensors that have the batch as dim 0: those with the most common length there, the first's at a tie.

    `shared`: patterns of names that are known to have none; see `named`.

    >>> sorted(batched({"x": (4, 8), "scale": (), "mask": (8, 8), "y": (4,)}))
    ['x', 'y']
    >>> sorted(batched({"x": (4, 8), "m": (4, 4)}, ["m"]))
    ['x']
    """
    shapes = {name: shape for name, shape in shapes.items() if not named(name, shared)}
    lengths = Counter(shape[0] for shape in shapes.values() if len(shape))
    if not lengths:
        return frozenset()
    batch = lengths.most_common(1)[0][0]
    return frozenset(name for name, shape in shapes.items() if len(shape) and shape[0] == batch)


def named(path: str, patterns: Sequence[str]) -> bool:
    """Whether `path` is, matches as a glob, or lies inside the container called, one of `patterns`.

    >>> [named("masks[0]", [p]) for p in ("masks[0]", "masks", "m*", "mask")]
    [True, True, True, False]
    """
    return any(path == p or path.startswith((f"{p}.", f"{p}[")) or fnmatchcase(path, p) for p in patterns)


def flatten(value: Any, path: str = "") -> tuple[list[Leaf], Rebuild]:
    """Leaves of `value` in order, and the function that puts a list of as many values back into the same containers."""
    leaves: list[Leaf] = []
    build = _visit(value, path, leaves)

    def rebuild(values: list[Any]) -> Any:
        assert len(values) == len(leaves), f"{len(values)} values for {len(leaves)} leaves"
        return build(iter(values))

    return leaves, rebuild


def _visit(value: Any, path: str, leaves: list[Leaf]) -> Callable[[Any], Any]:
    children: list[tuple[str, Any]]
    if isinstance(value, Mapping) and len(value):
        keys = list(value.keys())
        children = [(f"{path}.{k}" if path else str(k), value[k]) for k in keys]
        return _container(children, leaves, _mapping(value, keys))
    if isinstance(value, (list, tuple)) and len(value):
        names = getattr(value, "_fields", None)
        children = (
            [(f"{path}.{n}" if path else n, v) for n, v in zip(names, value)]
            if names
            else [(f"{path}[{i}]", v) for i, v in enumerate(value)]
        )
        cls = type(value)
        if names:
            return _container(children, leaves, lambda values: cls(*values))
        return _container(children, leaves, cls)
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
        fields = [f.name for f in dataclasses.fields(value)]
        children = [(f"{path}.{n}" if path else n, getattr(value, n)) for n in fields]
        return _container(children, leaves, _dataclass(value, fields))
    leaves.append(Leaf(path, value))
    return next


def _container(
    children: list[tuple[str, Any]], leaves: list[Leaf], make: Callable[[list[Any]], Any]
) -> Callable[[Any], Any]:
    parts = [_visit(child, path, leaves) for path, child in children]
    return lambda values: make([part(values) for part in parts])


def _mapping(value: Mapping[Any, Any], keys: list[Any]) -> Callable[[list[Any]], Any]:
    cls: Any = type(value)
    if dataclasses.is_dataclass(value):  # a Hugging Face ModelOutput: a mapping and a dataclass
        return lambda values: cls(**dict(zip(keys, values)))
    if cls is dict:
        return lambda values: dict(zip(keys, values))
    empty = copy.copy(value)  # keeps a default factory and the like

    def make(values: list[Any]) -> Any:
        new: Any = copy.copy(empty)
        for key, item in zip(keys, values):
            new[key] = item
        return new

    return make


def _dataclass(value: Any, fields: list[str]) -> Callable[[list[Any]], Any]:
    def make(values: list[Any]) -> Any:
        new: Any = copy.copy(value)
        for name, item in zip(fields, values):
            object.__setattr__(new, name, item)
        return new

    return make
