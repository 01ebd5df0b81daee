"""What a class of optimizer keeps and needs, measured: it steps small tensors on the CPU, and a law is fitted.

Every tensor of state, of parameters of one, two and four dims, small and large, in three dtypes, must have as many
elements as a quantity of `costmodel.optimizers` says, and one shape is held out to check that. State that differs
between small and large parameters (8-bit classes keep that of small ones whole) gets two laws, the border between
them found by bisection. Temporaries are those of the second step, of one large parameter and of two.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer as Torch

from autopar.costmodel.live import Live, leaves
from autopar.costmodel.optimizers import AMOUNTS, OPTIMIZERS, Law, Optimizer, Term, quantity
from autopar.errors import ConstraintError
from autopar.spec import Shape

#: Makes the optimizer, or several, of parameters.
Recipe = Callable[[Any], Any]
#: Of parameters, by what an element has in bytes.
DTYPES = {4: torch.float32, 2: torch.bfloat16, 8: torch.float64}
#: Classes of torch that, on a GPU, update all parameters at once where neither foreach nor fused is said.
FOREACH: frozenset[type[Torch]] = frozenset(
    {
        torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.Adamax, torch.optim.AdamW,
        torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
    }
)  # fmt: skip

#: Shapes by number of dims; the last is held out.
_SHAPES: dict[int, tuple[Shape, ...]] = {
    1: ((5,), (24,), (1000,), (65536,), (4099,)),
    2: ((6, 10), (24, 16), (130, 70), (256, 260), (77, 123)),
    4: ((2, 3, 5, 7), (4, 6, 3, 3), (64, 32, 8, 8), (3, 1, 20, 30), (5, 9, 16, 20)),
}
#: A parameter has every number of dims that some model's have; not all classes take all.
_TOGETHER = ((1, 2, 4), (1, 2), (2, 4), (1,), (2,), (4,))
_BIG = 65536
#: Bytes per element of a large parameter that the small ones beside it, and numbers, may make.
_NOISE = 0.03


def measure(recipe: Recipe) -> Optimizer:
    """What the optimizer, or all of them, that `recipe` makes of parameters keep and need.

    Args:
        recipe: a class, or a function of a list of parameters. It is called, and what it makes is stepped, some dozens
            of times, on parameters that are nobody's.

    Raises:
        ConstraintError: it makes no optimizer, that cannot be stepped so, or no law says what it keeps.
    """
    name = getattr(recipe, "__name__", type(recipe).__name__)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        found: dict[int, dict[int, list[Law]]] = {}  # by dims, by itemsize
        failure: Exception | None = None
        groups: dict[int, tuple[int, ...]] = {}
        for dims in _TOGETHER:
            if set(dims) <= set(found):
                continue
            try:
                sizes = {p: _laws(recipe, dims, p) for p in DTYPES if p == 4 or _takes(recipe, dims, p)}
            except _NoLawError as error:
                raise ConstraintError(f"what {name} keeps follows no law that is known: {error}; {_REMEDY}") from None
            except Exception as error:  # of the user's class: whatever it says, others may take fewer dims
                failure = failure or error
                continue
            for d in dims:
                if d not in found:
                    found[d], groups[d] = {p: laws[d] for p, laws in sizes.items()}, dims
        if not found:
            said = f"{type(failure).__name__}: {failure}"
            raise ConstraintError(f"{name} cannot be stepped on small tensors to see what it keeps ({said}); {_REMEDY}")
        scratch, gpu = _scratches(recipe, groups)
        classes = dict.fromkeys(
            type(o).__name__ for d, dims in groups.items() for o in _made(recipe, _params(_few(dims), 4))
        )
    made = Optimizer("+".join(classes), tuple(_merged(found)), scratch, None if gpu == scratch else gpu)
    for known, its in OPTIMIZERS.items():
        alias = known.partition("_")[0] if known != "amsgrad" else "adam"
        if replace(made, name=known) == its and made.name.lower() in (alias, f"{alias}w" if known == "amsgrad" else ""):
            return its
    return made


_REMEDY = "say it yourself, in bytes per element of a parameter: optimizer_class='NAME: BYTES*n'"


def optimizer_text(given: Any) -> str | None:
    """What a plan holds of `given`: a name or a text as it is, a class or a function measured.

    Raises:
        ConstraintError: as `measure`, or it is none of these.
    """
    if given is None or isinstance(given, str):
        return given
    if not callable(given):
        raise ConstraintError(
            f"optimizer_class={given!r} is neither a name nor a class nor a function of the parameters that makes it"
        )
    found = measure(given)
    return found.name if OPTIMIZERS.get(found.name) == found else str(found)


def recipe_text(given: Any) -> str | None:
    """What a plan holds of a function that makes the optimizers of `train_step`; None, with a warning, if that is
    nothing: it need not be measured to be stepped.
    """
    try:
        return optimizer_text(given)
    except ConstraintError as error:
        warnings.warn(f"memory is planned as for AdamW, for the optimizer cannot be measured: {error}", stacklevel=3)
        return None


# ---- stepping ------------------------------------------------------------------------------------------------------


def _few(dims: Iterable[int]) -> list[Shape]:
    return [_SHAPES[d][0] for d in dims]


def _params(shapes: Iterable[Shape], itemsize: int) -> list[torch.nn.Parameter]:
    """Parameters with gradients, the same every time, and nowhere zero."""
    out = []
    for shape in shapes:
        n = math.prod(shape)
        param = torch.nn.Parameter(torch.linspace(0.1, 1.0, n).reshape(shape).to(DTYPES[itemsize]))
        param.grad = torch.linspace(-1.0, -0.1, n).reshape(shape).to(DTYPES[itemsize])
        out.append(param)
    return out


def _made(recipe: Recipe, params: Sequence[torch.nn.Parameter]) -> list[Torch]:
    made = recipe(list(params))
    found = list(made) if isinstance(made, (list, tuple)) else [made]
    if not found or not all(isinstance(o, Torch) for o in found):
        raise TypeError(f"it has made {made!r}, which is no torch.optim.Optimizer")
    return found


def _step(optimizers: Iterable[Torch]) -> None:
    with torch.enable_grad():
        for optimizer in optimizers:
            optimizer.step()


def _takes(recipe: Recipe, dims: Sequence[int], itemsize: int) -> bool:
    """Whether it steps parameters of a dtype at all."""
    try:
        _step(_made(recipe, _params(_few(dims), itemsize)))
    except Exception:  # of the user's class: a dtype that it does not take is left out of the law
        return False
    return True


# ---- state ---------------------------------------------------------------------------------------------------------


class _NoLawError(Exception):
    """State that is nothing of what is tried."""


@dataclass(frozen=True)
class _Kept:
    """One tensor of state, by where it is in the state and its dtype; its elements."""

    key: tuple[str, torch.dtype]
    numel: int


def _states(
    recipe: Recipe, dims: Sequence[int], shapes: Sequence[Shape], itemsize: int
) -> list[tuple[Shape, list[_Kept]]]:
    """What is kept after two steps of parameters of these shapes, some of every number of dims beside them."""
    params = _params([*shapes, *_few(dims)], itemsize)
    optimizers = _made(recipe, params)
    for _ in range(2):
        _step(optimizers)
    out = []
    for shape, param in zip(shapes, params):
        kept = []
        for optimizer in optimizers:
            for where, tensor in _paths(optimizer.state.get(param, {})):
                kept.append(_Kept((where, tensor.dtype), tensor.numel()))
        out.append((shape, kept))
    return out


def _paths(state: Mapping[Any, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in state.items():
        for at, tensor in enumerate(leaves(value)):
            yield f"{key}.{at}", tensor


def _laws(recipe: Recipe, dims: Sequence[int], itemsize: int) -> dict[int, list[Law]]:
    """Laws by number of dims, for parameters of so many bytes an element; terms are in bytes."""
    _step(_made(recipe, _params(_few(dims), itemsize)))  # an error is about the class, not about shapes
    out = {}
    for d in dims:

        def keys(n: int, d: int = d) -> frozenset[tuple[str, torch.dtype]]:
            ((_, kept),) = _states(recipe, dims, [(n,) + (1,) * (d - 1)], itemsize)
            return frozenset(k.key for k in kept)

        found = _states(recipe, dims, _SHAPES[d], itemsize)
        if len({frozenset(k.key for k in kept) for _, kept in found}) == 1:
            out[d] = [Law(_fit(found), itemsize=itemsize)]
            continue
        least, multiple = _border(keys)
        regime = Law((), least=least, multiple=multiple)
        large = _states(recipe, dims, _large(d, least, multiple), itemsize)
        small = [(s, kept) for s, kept in found if not regime.holds(s, itemsize)]
        if len(small) < 2:
            raise _NoLawError(f"state differs from size to size below {least} elements")
        out[d] = [
            Law(_fit(large), least=least, multiple=multiple, itemsize=itemsize), Law(_fit(small), itemsize=itemsize),
        ]  # fmt: skip
    return out


def _border(keys: Callable[[int], object]) -> tuple[int, int]:
    """Least number of elements, and what must divide it, of parameters whose state is as that of large ones."""
    large = keys(_BIG)
    multiple = next(2**k for k in range(17) if keys(_BIG + 2**k) == large)
    high = next(2**k for k in range(multiple.bit_length() - 1, 17) if keys(2**k) == large)
    low = high // 2 // multiple
    high //= multiple
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keys(middle * multiple) == large else (middle, high)
    return high * multiple, multiple


def _large(dims: int, least: int, multiple: int) -> list[Shape]:
    """Shapes of so many dims beyond a border; the last is held out."""
    if dims == 1:
        first = -(-least // multiple)
        return [(multiple * (k * first + k - 1),) for k in (1, 2, 3, 5)]
    side = math.isqrt(least) + 1
    a, b = (multiple, -(-least // multiple)) if multiple > 1 else (side, side + 3)
    pairs = [(a, b), (2 * a, b + 1), (3 * a, 2 * b + 3), (a, 3 * b + 2)]
    return [pair + (2, 3) * (dims == 4) for pair in pairs]


def _fit(found: Sequence[tuple[Shape, list[_Kept]]]) -> tuple[Term, ...]:
    """Bytes of state as a sum of quantities of the shape.

    Raises:
        _NoLawError: a tensor is none of them, or the shape that was held out has something else.
    """
    totals: dict[str, float] = {}
    *fitted, (held_out, told) = found
    for first in fitted[0][1]:
        sizes = []
        for shape, kept in fitted:
            same = [k.numel for k in kept if k.key == first.key]
            if len(kept) != len(fitted[0][1]) or len(same) != 1:
                raise _NoLawError(f"a parameter of shape {shape} has other state than one of {fitted[0][0]}")
            sizes.append((shape, same[0]))
        of = next((q for q in _candidates(sizes) if all(quantity(q, s) == n for s, n in sizes)), None)
        if of is None and len({n for _, n in sizes}) == 1:
            totals["1"] = totals.get("1", 0.0) + sizes[0][1] * first.key[1].itemsize
        elif of is None:
            said = ", ".join(f"{n} for {s}" for s, n in sizes)
            raise _NoLawError(f"elements of its {first.key[0].rpartition('.')[0]}: {said}")
        else:
            totals[of] = totals.get(of, 0.0) + first.key[1].itemsize
    terms = tuple(Term(totals[q], False, q) for q in sorted(totals, key=_order))
    bytes_told = sum(k.numel * k.key[1].itemsize for k in told)
    if Law(terms).bytes(held_out, 1) != bytes_told:
        raise _NoLawError(f"{Law(terms)} would be {Law(terms).bytes(held_out, 1):g} bytes of a parameter of shape "
                          f"{held_out}, and it keeps {bytes_told}")  # fmt: skip
    return terms


def _candidates(sizes: Sequence[tuple[Shape, int]]) -> Iterator[str]:
    yield from ("n", *(["rows", "cols"] if len(sizes[0][0]) > 1 else []))
    shape, count = max(sizes, key=lambda s: math.prod(s[0]))
    n = math.prod(shape)
    if 1 < count < n:  # blocks of which n fill so many: powers of two first
        blocks = range(-(-n // count), (n - 1) // (count - 1) + 1)
        for block in itertools.chain(sorted(b for b in blocks if b & (b - 1) == 0), blocks[:1000]):
            yield f"n/{block}"


def _order(of: str) -> tuple[int, str]:
    names = ("n", "rows", "cols")
    return (names.index(of) if of in names else 4 if of == "1" else 3), of


def _merged(found: Mapping[int, Mapping[int, Sequence[Law]]]) -> list[Law]:
    """Laws by dims and itemsize as few as say the same, most dims first."""
    by_dims: dict[int, list[Law]] = {d: _over_sizes(found[d]) for d in sorted(found, reverse=True)}
    out: list[Law] = []
    order = list(by_dims)
    for number, d in enumerate(order):
        after = order[number + 1] if number + 1 < len(order) else None
        if after is not None and by_dims[after] == by_dims[d]:
            continue
        least = 0 if d == min(order) and d == 1 else {1: 1, 2: 2, 4: 3}[d]
        out += [replace(law, dims=least) for law in by_dims[d]]
    return out


def _over_sizes(laws: Mapping[int, Sequence[Law]]) -> list[Law]:
    """One list for all itemsizes if every term is in proportion to them, or not at all; else all with conditions."""
    lists = {p: list(found) for p, found in laws.items()}
    first = next(iter(lists.values()))
    shapes = [(law.least, law.multiple) for law in first]
    same = all([(law.least, law.multiple) for law in found] == shapes for found in lists.values())
    if not same or len(lists) < 2:
        return [law for p in sorted(lists) for law in lists[p]]
    out = []
    for at, law in enumerate(first):
        terms = _over({p: {t.of: t.count for t in found[at].terms} for p, found in lists.items()})
        if terms is None:
            return [law for p in sorted(lists) for law in lists[p]]
        out.append(replace(law, terms=terms, itemsize=0))
    return out


def _over(counts: Mapping[int, Mapping[str, float]]) -> tuple[Term, ...] | None:
    """Bytes by quantity and itemsize as terms that scale with the itemsize and terms that do not; None: neither."""
    (p, one), (q, two) = list(counts.items())[:2]
    terms = []
    for of in sorted({of for found in counts.values() for of in found}, key=_order):
        slope = (one.get(of, 0.0) - two.get(of, 0.0)) / (p - q)
        rest = one.get(of, 0.0) - slope * p
        if slope < 0 or rest < 0 or any(found.get(of, 0.0) != slope * size + rest for size, found in counts.items()):
            return None
        terms += [Term(slope, True, of)] * (slope > 0) + [Term(rest, False, of)] * (rest > 0)
    return tuple(terms)


# ---- temporaries ---------------------------------------------------------------------------------------------------


def _scratches(recipe: Recipe, groups: Mapping[int, Sequence[int]]) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Temporaries of an update as the class does it here, and as it does it on a GPU."""
    out = []
    for gpu in (False, True):
        most: dict[tuple[str, bool], float] = {}
        for d, dims in groups.items():
            sizes = {p: _scratch(recipe, d, dims, p, gpu) for p in (4, 2) if p == 4 or _takes(recipe, dims, p)}
            for of in AMOUNTS:
                slope = sizes[4][of] / 4
                if 2 in sizes:
                    slope = (sizes[4][of] - sizes[2][of]) / 2
                slope = max(0.0, slope)
                rest = max(0.0, sizes[4][of] - 4 * slope)
                for scaled, count in ((True, slope), (False, rest)):
                    most[of, scaled] = max(most.get((of, scaled), 0.0), count)
        rounded = {key: round(count, 2) for key, count in most.items()}
        out.append(tuple(Term(n, scaled, of) for (of, scaled), n in rounded.items() if n > _NOISE))
    return out[0], out[1]


def _scratch(recipe: Recipe, d: int, dims: Sequence[int], itemsize: int, gpu: bool) -> dict[str, float]:
    """Bytes per element at the peak of a step, by what `Optimizer.temporaries` counts.

    With one parameter, the temporaries of one; with a second there is what the first has left behind (a name in a loop
    keeps it until it is given again); and with every further one, what there is of all at once.
    """
    big = {1: (_BIG,), 2: (256, 256), 4: (16, 16, 16, 16)}[d]
    one, two, four = (_temporaries(recipe, dims, [big] * k, itemsize, gpu) / _BIG for k in (1, 2, 4))
    every = (four - two) / 2
    return {"largest": one - every, "before": two - one - every, "all": every}


def _temporaries(recipe: Recipe, dims: Sequence[int], shapes: Sequence[Shape], itemsize: int, gpu: bool) -> int:
    """The peak of what the second step makes."""
    params = _params([*shapes, *_few(dims)], itemsize)
    optimizers = _made(recipe, params)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            said = group.get("foreach") is not None or group.get("fused") or group.get("differentiable")
            if gpu and type(optimizer) in FOREACH and not said:
                group["foreach"] = True
    _step(optimizers)
    states = [s for o in optimizers for s in o.state.values()]
    with Live([params, [p.grad for p in params], states]) as live:
        _step(optimizers)
    return live.peak


__all__ = ["FOREACH", "Recipe", "measure", "optimizer_text", "recipe_text"]
