"""One call as the rules see it, and the text of a rule from lists of dims.

A rule maker is a function `Call -> str | Rule`. Dims are written as in rule texts: `"a"`, `"k+"`, `"n^"`, `"(a
b)"`, `"1"`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from autopar.graph import named_arguments, operands, resolve, results
from autopar.rule import Rule

Maker = Callable[["Call"], "str | Rule"]
Dims = list[str]

#: Names of the dims of an operand, in order.
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


class Call:
    """Shapes, dtypes and arguments of one op node.

    Attributes:
        ins, outs: shapes of the tensor operands (rule order) and of the results (None: absent).
        dtypes, out_dtypes: their dtypes.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.target: Any = node.target
        values = [v.val for v in operands(node)]
        self.ins: list[tuple[int, ...]] = [tuple(v.shape) for v in values]
        self.dtypes: list[torch.dtype] = [v.dtype for v in values]
        found = results(node)
        self.outs: list[tuple[int, ...] | None] = [None if v is None else tuple(v.shape) for v in found]
        self.out_dtypes: list[torch.dtype | None] = [None if v is None else v.dtype for v in found]
        self._named: dict[str, Any] | None = None

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the first result."""
        shape = self.outs[0]
        assert shape is not None
        return shape

    @property
    def named(self) -> dict[str, Any]:
        """Every argument by its schema name, defaults filled in, tensors as operand numbers wrapped in `Operand`."""
        if self._named is None:
            self._named = named_arguments(self.target, *numbered(self.node))
        return self._named

    def arg(self, name: str) -> Any:
        """A non-tensor argument by its schema name."""
        return self.named[name]

    def at(self, name: str) -> int | None:
        """Operand number of a tensor argument, None if it is not given (or is a Python scalar)."""
        value = self.named.get(name)
        return value.number if isinstance(value, Operand) else None

    def dim(self, name: str = "dim", ndim: int | None = None) -> int:
        """An argument that names one dim, made non-negative. `ndim` defaults to that of operand 0."""
        return wrap(self.arg(name), len(self.ins[0]) if ndim is None else ndim)

    def dims(self, name: str = "dim") -> set[int]:
        """An argument that names one dim, several, or (None or empty) all of operand 0, made non-negative."""
        ndim = len(self.ins[0])
        value = self.named.get(name)
        if value is None or value == []:
            return set(range(ndim))
        return {wrap(d, ndim) for d in ([value] if isinstance(value, int) else value)}

    def linear(self, *groups: Sequence[int | None]) -> list[tuple[int, ...]]:
        """The groups whose members are all there, and floating like every result: others cannot carry a partial sum."""
        if not all(d is None or floats(d) for d in self.out_dtypes):
            return []
        kept = []
        for group in groups:
            members = [i for i in group if i is not None]
            if len(members) == len(group) and all(i < len(self.ins) and floats(self.dtypes[i]) for i in members):
                kept.append(tuple(sorted(members)))
        return kept


class Operand:
    """Stands for the tensor operand of that number among the named arguments of a call."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def numbered(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """args and kwargs with each tensor replaced by its `Operand`; numbers that are nodes by their value."""
    count = 0

    def visit(arg: Any) -> Any:
        nonlocal count
        if isinstance(arg, fx.Node):
            value = resolve(arg).val
            if isinstance(value, torch.Tensor):
                count += 1
                return Operand(count - 1)
            return value
        if isinstance(arg, (list, tuple)):
            return [visit(a) for a in arg]
        return arg

    args = tuple(visit(a) for a in node.args)
    return args, {k: visit(v) for k, v in node.kwargs.items()}


def floats(dtype: torch.dtype) -> bool:
    """Whether a tensor of that dtype can be a partial sum of others: real or complex."""
    return dtype.is_floating_point or dtype.is_complex


def wrap(dim: int, ndim: int) -> int:
    """A dim counted from the front."""
    return dim + ndim if dim < 0 else dim


def names(count: int, start: int = 0) -> Dims:
    """`count` letters."""
    return list(LETTERS[start : start + count])


def whole(shape: Sequence[int], stem: str) -> Dims:
    """Dims of an operand no dim of which is ever split."""
    return [f"{stem}{i}^" for i in range(len(shape))]


def text(
    ins: Iterable[Dims | None],
    outs: Iterable[Dims | None],
    linear: Iterable[Sequence[int]] = (),
    *,
    reduce: str = "sum",
    sizes: Mapping[str, int] | None = None,
) -> str:
    """The rule text of lists of dims.

    >>> text([["a", "k+"], ["k+"]], [["a"]], [(0,), (1,)])
    'a k+, k+ -> a ; linear 0 | 1'
    """

    def side(operands: Iterable[Dims | None]) -> str:
        return ", ".join("~" if dims is None else " ".join(dims) for dims in operands)

    out = f"{side(ins)} -> {side(outs)}"
    groups = list(dict.fromkeys(tuple(g) for g in linear))
    if groups:
        out += " ; linear " + " | ".join(" ".join(map(str, g)) for g in groups)
    if reduce != "sum":
        out += f" ; reduce {reduce}"
    if sizes:
        out += " ; sizes " + " ".join(f"{k}={v}" for k, v in sizes.items())
    return out


def replicated(call: Call) -> str:
    """The rule that splits nothing: right for every op."""
    outs = [None if s is None else whole(s, f"y{i}_") for i, s in enumerate(call.outs)]
    return text([whole(s, f"x{i}_") for i, s in enumerate(call.ins)], outs)
