"""What an optimizer keeps of every parameter and needs for an update: a law with a text form, which a plan holds.

    AdamW8bit: n>=4096 -> 2*n + 8*n/256 + 4; 2*p*n + 4; scratch 2*p*largest; gpu 1*p*all

Clauses, of which the first whose conditions hold says the bytes of state of one piece: `n` its elements, `p` bytes of
one of them as the parameter has them, `rows` and `cols` the elements of its mean along the last and the last but one
dim (Shazeer and Stern, Adafactor, 2018, section 3), `n/256` its blocks of 256 elements, the last perhaps shorter.
`scratch`: bytes of temporaries at the peak of an update, the most over pieces of what `largest`, its elements, and
`before`, those of the piece before it, make, and for `all` pieces together; `gpu`: the same where the class, on a GPU,
updates all parameters at once unless it is told otherwise. Bytes of optimizers that nobody has measured can be written
by hand: "mine: 12*n".
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from autopar.errors import ConstraintError
from autopar.spec import Shape

#: Quantities of a piece by name; "n/256" besides.
QUANTITIES: dict[str, Callable[[Shape], int]] = {
    "n": lambda shape: math.prod(shape),
    "rows": lambda shape: math.prod(shape[:-1]),
    "cols": lambda shape: math.prod(shape[:-2]) * math.prod(shape[-1:]),
}


def quantity(name: str, shape: Shape) -> int:
    """One of `QUANTITIES`, "n/BLOCK", or "1"."""
    if name == "1":
        return 1
    if name.startswith("n/"):
        return -(-math.prod(shape) // int(name[2:]))
    return QUANTITIES[name](shape)


@dataclass(frozen=True)
class Term:
    """`count` bytes, or (`scaled`) times those of an element of the parameter, for each of what `of` counts."""

    count: float
    scaled: bool
    of: str

    def __str__(self) -> str:
        parts = [f"{self.count:g}", *(["p"] if self.scaled else []), *([self.of] if self.of != "1" else [])]
        return "*".join(parts)

    def bytes(self, amount: float, itemsize: int) -> float:
        """Bytes of so much of it."""
        return self.count * (itemsize if self.scaled else 1) * amount


@dataclass(frozen=True)
class Law:
    """Bytes of state of one piece: the sum of `terms`, for pieces of at least `dims` dims and `least` elements that
    `multiple` divides, of parameters of `itemsize` bytes an element (0: of any)."""

    terms: tuple[Term, ...]
    dims: int = 0
    least: int = 0
    multiple: int = 1
    itemsize: int = 0

    def __str__(self) -> str:
        conditions = [
            *([f"p={self.itemsize}"] if self.itemsize else []),
            *([f"dims>={self.dims}"] if self.dims else []),
            *([f"n>={self.least}"] if self.least else []),
            *([f"n%{self.multiple}"] if self.multiple > 1 else []),
        ]
        total = " + ".join(map(str, self.terms)) or "0"
        return f"{' '.join(conditions)} -> {total}" if conditions else total

    def holds(self, shape: Shape, itemsize: int) -> bool:
        """Whether it is for such a piece."""
        n = math.prod(shape)
        own = self.itemsize in (0, itemsize) and len(shape) >= self.dims
        return own and n >= self.least and n % self.multiple == 0

    def bytes(self, shape: Shape, itemsize: int) -> float:
        """Bytes of state of a piece."""
        return sum(t.bytes(quantity(t.of, shape), itemsize) for t in self.terms)


@dataclass(frozen=True)
class Optimizer:
    """What a class of optimizer keeps and needs, as the text form says it.

    Attributes:
        name: of the class.
        laws: of state; the first that holds is the piece's.
        scratch: temporaries at the peak of an update, by `AMOUNTS`.
        gpu: the same on a GPU, where that differs.
    """

    name: str
    laws: tuple[Law, ...]
    scratch: tuple[Term, ...] = ()
    gpu: tuple[Term, ...] | None = None

    def __str__(self) -> str:
        clauses = [str(law) for law in self.laws]
        clauses += [f"scratch {' + '.join(map(str, self.scratch))}"] if self.scratch else []
        if self.gpu is not None:
            clauses.append(f"gpu {' + '.join(map(str, self.gpu)) or '0'}")
        return f"{self.name}: {'; '.join(clauses)}"

    @classmethod
    def parse(cls, text: str) -> Optimizer:
        """Inverse of `str`.

        Raises:
            ConstraintError: it cannot be read; says at what.
        """
        name, colon, rest = text.partition(":")
        if not colon or not re.fullmatch(r"\s*[\w.+\- ]+", name):
            raise ConstraintError(f"cannot read optimizer {text!r}; write a name, a colon and bytes: 'mine: 12*n'")
        laws: list[Law] = []
        scratch: tuple[Term, ...] = ()
        gpu: tuple[Term, ...] | None = None
        try:
            for clause in rest.split(";"):
                word, _, amounts = clause.strip().partition(" ")
                if word == "scratch":
                    scratch = _sum(amounts, _AMOUNTS)
                elif word == "gpu":
                    gpu = _sum(amounts, _AMOUNTS)
                else:
                    laws.append(_law(clause))
        except ValueError as error:
            raise ConstraintError(
                f"cannot read optimizer {text!r}: {error}; write bytes of state per parameter, as in 'mine: 12*n' or "
                "'mine: dims>=2 -> p*rows + p*cols + 4; p*n + 4' (n: elements, p: bytes of one)"
            ) from None
        return cls(name.strip(), tuple(laws), scratch, gpu)

    def state(self, shape: Shape, itemsize: int) -> float:
        """Bytes of state of a piece.

        Raises:
            ConstraintError: no law is for such a piece.
        """
        for law in self.laws:
            if law.holds(shape, itemsize):
                return law.bytes(shape, itemsize)
        raise ConstraintError(
            f"optimizer {self.name} says nothing of a parameter piece of shape {tuple(shape)} and {itemsize} bytes an "
            f"element ({self}); give as optimizer_class a function of the parameters that makes all the optimizers of "
            "your training, or the bytes: optimizer_class='NAME: BYTES*n'"
        )

    def temporaries(self, pieces: Iterable[tuple[int, int]], gpu: bool) -> float:
        """Bytes at the peak of an update of pieces, given as (elements, bytes of one)."""
        terms = self.gpu if gpu and self.gpu is not None else self.scratch
        together, most, before = 0.0, 0.0, (0, 0)
        for piece in pieces:
            at = {"largest": piece, "before": before, "all": (0, 0)}
            most = max(most, sum(t.bytes(*at[t.of]) for t in terms))
            together += sum(t.bytes(*piece) for t in terms if t.of == "all")
            before = piece
        return together + most


#: What temporaries are counted by.
AMOUNTS = ("largest", "before", "all")
_AMOUNTS = "|".join(AMOUNTS)
_STATE = r"n/\d+|n|rows|cols"


def _sum(text: str, amounts: str) -> tuple[Term, ...]:
    if text.strip() == "0":
        return ()
    found = []
    for part in text.split("+"):
        match = re.fullmatch(rf"\s*(?:(\d+(?:\.\d+)?)(?:\*|$))?(?:(p)\*)?({amounts})?\s*", part.rstrip())
        if match is None or not part.strip() or (match[3] is None and (match[2] or amounts == _AMOUNTS)):
            raise ValueError(f"{part.strip()!r} is no number of bytes")
        of = match[3] or "1"
        if of.startswith("n/") and int(of[2:]) < 1:
            raise ValueError(f"{of!r} has blocks of nothing")
        found.append(Term(float(match[1] or 1), match[2] is not None, of))
    return tuple(found)


def _law(text: str) -> Law:
    before, arrow, after = text.rpartition("->")
    conditions: dict[str, int] = {}
    for word in before.split():
        match = re.fullmatch(r"(p=|dims>=|n>=|n%)(\d+)", word)
        if match is None or int(match[2]) < 1:
            raise ValueError(f"{word!r} is no condition")
        conditions[match[1]] = int(match[2])
    if arrow and not conditions:
        raise ValueError("there is no condition before ->")
    return Law(
        _sum(after, _STATE), conditions.get("dims>=", 0), conditions.get("n>=", 0), conditions.get("n%", 1),
        conditions.get("p=", 0),
    )  # fmt: skip


def _known(**texts: str) -> dict[str, Optimizer]:
    return {name: Optimizer.parse(f"{name}: {text}") for name, text in texts.items()}


#: Classes by the name that `optimizer_class=` takes: as torch.optim keeps it (tests measure them), with its defaults.
#: Lion: Chen et al., 2023, algorithm 2 (one moment). Muon: of matrices; vectors are counted as if it stepped them.
OPTIMIZERS: Mapping[str, Optimizer] = _known(
    adamw="2*p*n + 4; scratch 2*p*largest + 1*p*before; gpu 1*p*all",
    adam="2*p*n + 4; scratch 2*p*largest + 1*p*before; gpu 1*p*all",
    nadam="2*p*n + 8; scratch 2*p*largest + 1*p*before; gpu 1*p*all",
    radam="2*p*n + 4; scratch 2*p*largest; gpu 1*p*all",
    adamax="2*p*n + 4; scratch 1*p*largest; gpu 1*p*all",
    amsgrad="3*p*n + 4; scratch 2*p*largest + 1*p*before; gpu 1*p*all",
    sgd="0",
    sgd_momentum="1*p*n",
    rmsprop="1*p*n + 4; scratch 1*p*largest + 1*p*before; gpu 1*p*all",
    adagrad="1*p*n + 4; scratch 1*p*largest + 1*p*before; gpu 2*p*all",
    lion="1*p*n; scratch 1*p*largest",
    muon="1*p*n; scratch 1*p*largest + 8*largest",
    adafactor="dims>=2 -> 1*p*rows + 1*p*cols + 4; 1*p*n + 4; scratch 2*p*largest + 1*p*before",
)


@functools.lru_cache(maxsize=256)
def optimizer_of(text: str) -> Optimizer:
    """What `Plan.optimizer` stands for: the name of one that is known, or the text of a law.

    Raises:
        ConstraintError: neither.
    """
    if text in OPTIMIZERS:
        return OPTIMIZERS[text]
    if ":" in text:
        return Optimizer.parse(text)
    raise ConstraintError(
        f"no optimizer {text!r} is known; choose one of {', '.join(OPTIMIZERS)}, give the class itself or a function "
        "of the parameters that makes it, which is measured, or bytes of state per element: 'mine: 12*n'"
    )


#: Names of those that update every element by itself, so that pieces can be stepped apart.
ELEMENT_WISE = frozenset({*OPTIMIZERS, "adadelta", "asgd", "rprop"} - {"muon", "adafactor"})

__all__ = [
    "AMOUNTS", "ELEMENT_WISE", "OPTIMIZERS", "QUANTITIES", "Law", "Optimizer", "Term", "optimizer_of", "quantity",
]  # fmt: skip
