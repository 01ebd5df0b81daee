"""Sharding rules in factor notation, and what one mesh axis may do at one op.

A rule names the loops of an op, its *factors*, by the dims they run over:

    "i k+, k+ j -> i j ; linear 0 | 1"

* every operand and result is a list of dims separated by spaces; operands by commas. A dim is a factor, `1` for a
  dim of size one that is broadcast or inserted, or a compound `(a b)`, a outermost. `...` stands for the leading dims.
  A scalar is an empty list. `~` is an operand or result that is absent (None).
* `k+`: splitting k leaves results that do not have k as partial values, to be reduced (`reduce max` if not a sum).
* `n^`: n is never split.
* `v*`: n may be split, but the shards must then talk inside the op, or the op be changed (masks, offsets): a localiser
  written for the op does it.
  A factor without mark that a result lacks leaves that result equal on all shards.
* `linear 0 1 | 2`: the op is linear in operands 0 and 1 together, and in operand 2: partial sums may pass through.
* `sizes z=3`: the size of a factor that no operand and no other dim tells.

One axis does one `Choice` at an op: nothing (`-`), split a factor (`k`, or `k@3` for the strided split of k seen as
(3, k/3)), or let a partial sum through a linear group (`+0`).

>>> str(Rule.parse("i k+, k+ j -> i j ; linear 0 | 1"))
'i k+, k+ j -> i j ; linear 0 | 1'
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

from autopar.errors import RuleError, SpecError
from autopar.spec import P, Placement, R, S, dim_layout

Dim = tuple[str, ...]
Operand = tuple[Dim, ...] | None  # None: absent

_TOKEN = re.compile(r"\(([^()]*)\)|(\.\.\.)|(1)|([A-Za-z][A-Za-z0-9_]*)([+^*]?)")
_FACTOR = re.compile(r"^([A-Za-z][A-Za-z0-9_]*)([+^*]?)$")


class Choice(NamedTuple):
    """What one mesh axis does at one op.

    Split `factor` (strided: `outer`), let linear group `through` pass, or nothing.
    """

    factor: str = ""
    outer: int = 1
    through: int = -1

    def __str__(self) -> str:
        if self.through >= 0:
            return f"+{self.through}"
        if not self.factor:
            return "-"
        return self.factor if self.outer == 1 else f"{self.factor}@{self.outer}"

    @classmethod
    def parse(cls, text: str) -> Choice:
        if text == "-":
            return WHOLE
        if re.fullmatch(r"\+\d+", text):
            return cls(through=int(text[1:]))
        match = re.fullmatch(r"([A-Za-z][A-Za-z0-9_]*)(?:@([1-9]\d*))?", text)
        if not match:
            raise RuleError(f"cannot read choice {text!r}; write -, FACTOR, FACTOR@OUTER or +GROUP")
        return cls(match[1], int(match[2] or 1))


WHOLE = Choice()


@dataclass(frozen=True)
class Rule:
    """A parsed rule. `Rule.parse(str(rule)) == rule`."""

    ins: tuple[Operand, ...]
    outs: tuple[Operand, ...]
    plus: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()
    inner: frozenset[str] = frozenset()
    linear: tuple[tuple[int, ...], ...] = ()
    reduce: str = "sum"
    sizes: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Parse the text form.

        Raises:
            RuleError: with the offending part of the text.
        """
        return _parse(text)

    def __str__(self) -> str:
        head = f"{_side(self, self.ins)} -> {_side(self, self.outs)}"
        tail = []
        if self.linear:
            tail.append("linear " + " | ".join(" ".join(map(str, g)) for g in self.linear))
        if self.reduce != "sum":
            tail.append(f"reduce {self.reduce}")
        if self.sizes:
            tail.append("sizes " + " ".join(f"{k}={v}" for k, v in self.sizes))
        return " ; ".join([head.strip(), *tail])

    @property
    def factors(self) -> tuple[str, ...]:
        """Every factor, in order of appearance."""
        seen: dict[str, None] = {}
        for operand in self.ins + self.outs:
            for dim in operand or ():
                for name in dim:
                    seen.setdefault(name)
        return tuple(seen)


@dataclass(frozen=True)
class BoundRule:
    """A rule with the sizes of its factors at one op: everything downstream works on this.

    `ins` and `outs` follow the order of the op's tensor operands and results. `...` has been expanded.
    """

    rule: Rule
    sizes: Mapping[str, int] = field(hash=False, compare=True)
    _placed: dict[Choice, tuple[tuple[Placement, ...], tuple[Placement, ...]]] = field(
        default_factory=dict, init=False, repr=False, hash=False, compare=False
    )

    @property
    def ins(self) -> tuple[Operand, ...]:
        return self.rule.ins

    @property
    def outs(self) -> tuple[Operand, ...]:
        return self.rule.outs

    def splittable(self) -> tuple[str, ...]:
        """Factors that may be split (size above one, not marked never)."""
        return tuple(f for f in self.rule.factors if f not in self.rule.never and self.sizes[f] > 1)

    def placements(self, choice: Choice) -> tuple[tuple[Placement, ...], tuple[Placement, ...]]:
        """What `choice` asks of every operand and gives for every result, on its axis.

        Raises:
            RuleError: the choice names a factor or group the rule does not have, or a factor never to be split.
        """
        found = self._placed.get(choice)
        if found is None:
            found = self._placed[choice] = self._place(choice)
        return found

    def _place(self, choice: Choice) -> tuple[tuple[Placement, ...], tuple[Placement, ...]]:
        if choice.through >= 0:
            if choice.through >= len(self.rule.linear):
                raise RuleError(f"rule '{self.rule}' has no linear group {choice.through}")
            group = self.rule.linear[choice.through]
            return (
                tuple(P() if i in group else R for i in range(len(self.ins))),
                tuple(P() if o is not None else R for o in self.outs),
            )
        if not choice.factor:
            return (R,) * len(self.ins), (R,) * len(self.outs)
        name = choice.factor
        if name not in self.sizes or name in self.rule.never:
            raise RuleError(f"rule '{self.rule}' cannot split {name!r}")

        def place(operand: Operand, missing: Placement) -> Placement:
            at = self.position(operand, name)
            return missing if at is None else S(at[0], at[1] * choice.outer)

        lost = P(self.rule.reduce) if name in self.rule.plus else R
        return (
            tuple(place(o, R) for o in self.ins),
            tuple(R if o is None else place(o, lost) for o in self.outs),
        )

    def fits(self, choices: Sequence[Choice], parts: Sequence[int]) -> bool:
        """Whether every factor divides among the axes (of `parts` devices) that split it.

        Dims that divide are not enough: with channels `(g c)`, more shards than g has groups would cut into c.
        """
        cuts: dict[str, list[tuple[int, int, int]]] = {}
        for axis, (choice, n) in enumerate(zip(choices, parts)):
            if choice.factor and n > 1:
                cuts.setdefault(choice.factor, []).append((choice.outer, axis, n))
        try:
            for name, own in cuts.items():
                dim_layout(self.sizes[name], tuple(own))
        except SpecError:
            return False
        return True

    def position(self, operand: Operand, factor: str) -> tuple[int, int] | None:
        """(dim, size of what lies outside the factor in that dim), or None where the operand lacks the factor."""
        for d, dim in enumerate(operand or ()):
            outer = 1
            for name in dim:
                if name == factor:
                    return d, outer
                outer *= self.sizes[name]
        return None

    def factor_at(self, operand: Operand, dim: int, outer: int) -> Choice | None:
        """The choice that would place `S(dim, outer)` on the operand, or None if no factor lies there."""
        if operand is None or dim >= len(operand):
            return None
        before = 1
        for name in operand[dim]:
            size = self.sizes[name]
            if outer >= before and outer % before == 0 and size % (outer // before) == 0 and outer // before < size:
                if name in self.rule.never:
                    return None
                return Choice(name, outer // before)
            before *= size
        return None


def following(bound: BoundRule, spec: Sequence[Placement]) -> tuple[Choice, ...]:
    """The choices of an op of one operand, element by element, that take it as it lies; whole where it cannot be so."""
    found = []
    for place in spec:
        choice: Choice | None = WHOLE
        if place.kind == "P" and place.reduce == "sum" and bound.rule.linear:
            choice = Choice(through=0)
        elif place.kind == "S":
            choice = bound.factor_at(bound.ins[0], place.dim, place.outer)
        found.append(choice or WHOLE)
    return tuple(found)


def bind(
    rule: Rule, in_shapes: Sequence[Sequence[int] | None], out_shapes: Sequence[Sequence[int] | None]
) -> BoundRule:
    """Fit a rule to the shapes of one call: expand `...`, solve for the factor sizes.

    Raises:
        RuleError: number of operands, number of dims or sizes do not fit; says which.
    """
    if not rule.ins and len(in_shapes) == 1 and in_shapes[0] is not None and not len(in_shapes[0]):
        rule = replace(rule, ins=((),))  # a single scalar operand is written as nothing, like no operand at all
    if len(rule.ins) != len(in_shapes) or len(rule.outs) != len(out_shapes):
        raise RuleError(
            f"rule '{rule}' is for {len(rule.ins)} operands and {len(rule.outs)} results; "
            f"the op has {len(in_shapes)} and {len(out_shapes)}"
        )
    ins = tuple(_expand(o, s, rule) for o, s in zip(rule.ins, in_shapes))
    outs = tuple(_expand(o, s, rule) for o, s in zip(rule.outs, out_shapes))
    sizes = dict(rule.sizes)
    pending: list[tuple[Dim, int]] = []
    for operand, shape in zip(ins + outs, list(in_shapes) + list(out_shapes)):
        if operand is None or shape is None:
            continue
        pending += [(dim, int(n)) for dim, n in zip(operand, shape)]
    while pending:
        later = []
        for dim, n in pending:
            unknown = [f for f in dim if f not in sizes]
            known = math.prod(sizes[f] for f in dim if f in sizes)
            if len(unknown) > 1:
                later.append((dim, n))
            elif unknown:
                if known == 0 or n % known:
                    raise RuleError(f"rule '{rule}': dim ({' '.join(dim)}) has {n} elements, not a multiple of {known}")
                sizes[unknown[0]] = n // known
            elif known != n:
                raise RuleError(f"rule '{rule}': dim ({' '.join(dim) or '1'}) is {known} here and {n} there")
        if len(later) == len(pending):
            unknown = sorted({f for d, _ in later for f in d if f not in sizes})
            raise RuleError(f"rule '{rule}': the sizes of {unknown} are not known")
        pending = later
    bound = rule if (ins, outs) == (rule.ins, rule.outs) else replace(rule, ins=ins, outs=outs)
    return BoundRule(bound, sizes)


def _expand(operand: Operand, shape: Sequence[int] | None, rule: Rule) -> Operand:
    if operand is None or shape is None:
        if (operand is None) != (shape is None):
            raise RuleError(f"rule '{rule}': an operand or result is absent in one of rule and op")
        return None
    if ("...",) in operand:
        at = operand.index(("...",))
        extra = len(shape) - (len(operand) - 1)
        if extra < 0:
            raise RuleError(f"rule '{rule}' needs at least {len(operand) - 1} dims, got {len(shape)}")
        # Numbered from the right, so that operands of different rank broadcast like tensors do.
        operand = operand[:at] + tuple((f"lead{extra - i}",) for i in range(extra)) + operand[at + 1 :]
    if len(operand) != len(shape):
        raise RuleError(f"rule '{rule}': {len(operand)} dims in the rule, {len(shape)} in the tensor {tuple(shape)}")
    return operand


def _side(rule: Rule, operands: tuple[Operand, ...]) -> str:
    def name(f: str) -> str:
        return f + ("+" if f in rule.plus else "^" if f in rule.never else "*" if f in rule.inner else "")

    def dim(d: Dim) -> str:
        if d == ():
            return "1"
        if len(d) == 1:
            return name(d[0])
        return f"({' '.join(name(f) for f in d)})"

    return ", ".join("~" if o is None else " ".join(dim(d) for d in o) for o in operands)


@lru_cache(maxsize=16384)
def _parse(text: str) -> Rule:
    head, *clauses = [part.strip() for part in text.split(";")]
    if head.count("->") != 1:
        raise RuleError(f"rule {text!r} must have exactly one '->'")
    marks: dict[str, set[str]] = {"+": set(), "^": set(), "*": set()}

    def factor(token: str) -> str:
        match = _FACTOR.match(token)
        if not match:
            raise RuleError(f"rule {text!r}: {token!r} is not a factor")
        if match[2]:
            marks[match[2]].add(match[1])
        return match[1]

    def operand(part: str) -> Operand:
        part = part.strip()
        if part == "~":
            return None
        dims: list[Dim] = []
        pos = 0
        while pos < len(part):
            if part[pos] == " ":
                pos += 1
                continue
            match = _TOKEN.match(part, pos)
            if not match:
                raise RuleError(f"rule {text!r}: cannot read {part[pos:]!r}")
            if match[1] is not None:
                dims.append(tuple(factor(t) for t in match[1].split()))
            elif match[2]:
                dims.append(("...",))
            elif match[3]:
                dims.append(())
            else:
                dims.append((factor(match[4] + match[5]),))
            pos = match.end()
        return tuple(dims)

    left, right = head.split("->")
    ins = tuple(operand(p) for p in left.split(",")) if left.strip() else ()
    outs = tuple(operand(p) for p in right.split(","))
    linear: tuple[tuple[int, ...], ...] = ()
    reduce = "sum"
    sizes: tuple[tuple[str, int], ...] = ()
    for clause in clauses:
        word, _, rest = clause.partition(" ")
        if word == "linear":
            if not re.fullmatch(r"[\d\s|]+", rest) or not all(g.strip() for g in rest.split("|")):
                raise RuleError(
                    f"rule {text!r}: cannot read {clause!r}; write numbers of operands, e.g. linear 0 1 | 2"
                )
            linear = tuple(tuple(int(i) for i in g.split()) for g in rest.split("|"))
        elif word == "reduce" and rest in ("sum", "max", "min"):
            reduce = rest
        elif word == "sizes":
            if not all(re.fullmatch(r"\w+=\d+", item) for item in rest.split()):
                raise RuleError(f"rule {text!r}: cannot read {clause!r}; write FACTOR=SIZE, e.g. sizes z=3")
            sizes = tuple((k, int(v)) for k, v in (item.split("=") for item in rest.split()))
        else:
            raise RuleError(f"rule {text!r}: unknown clause {clause!r}; use linear, reduce or sizes")
    if linear and not ins:
        ins = ((),)  # a single scalar operand is written as nothing
    for group in linear:
        if any(not 0 <= i < len(ins) for i in group):
            raise RuleError(f"rule {text!r}: linear group {group} names an operand that is not there")
    return Rule(
        ins, outs, frozenset(marks["+"]), frozenset(marks["^"]), frozenset(marks["*"]), linear, reduce, tuple(sizes)
    )
