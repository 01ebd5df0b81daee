"""The captured programs of one model: each form of call is traced at most twice, whatever batch sizes come.

The first call is traced with its sizes as they are, which is the fastest. When the same form of call comes with another
batch size, it is traced once more with the batch as a symbol (`autopar/symbolic.py`), and every further size comes from
that. Where the model cannot be traced so, or takes another path at a size, that size is traced by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autopar.call import input_key
from autopar.capture import capture, capture_batches
from autopar.errors import CaptureError
from autopar.graph import Program
from autopar.precision import AS_IS, Precision
from autopar.symbolic import Batches
from autopar.tree import batched

#: How a program came about: a trace of its own, the trace with the batch as a symbol, or without any trace.
TRACED, TRACED_BATCHES, KNOWN = "traced", "traced for every batch size", "known"


@dataclass(frozen=True)
class Captured:
    """A program, the form of its call (equal for calls that differ in batch size only), and how it came about."""

    program: Program
    form: Hashable
    how: str


class Programs:
    """Captures calls of one model, which must stay the same but for its training and requires_grad flags."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[int, Program]] = {}  # form -> size of the batch, and its first program
        self._batches: dict[Hashable, Batches | None] = {}

    def capture(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
        training: bool = True,
        precision: Precision = AS_IS,
    ) -> Captured:
        """As `autopar.capture.capture`."""
        key = input_key(model, args, kwargs, loss=loss)
        shapes = {path: value[0] for path, value in key if isinstance(value, tuple)}
        names = batched(shapes)
        size = next((shapes[name][0] for name in shapes if name in names), 0)
        form = (
            tuple((path, (value[0][1:], value[1]) if path in names else value) for path, value in key),
            training,
            tuple(m.training for m in model.modules()),
            tuple(p.requires_grad for p in model.parameters()),
            torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
            precision,
        )
        options: dict[str, Any] = {"loss": loss, "training": training, "precision": precision}
        if form in self._seen and size > 1 and form not in self._batches:
            self._batches[form] = self._symbolic(model, args, kwargs, options, size, *self._seen[form])
            how = TRACED_BATCHES
        else:
            how = KNOWN
        batches = self._batches.get(form)
        program = batches.at(size) if batches is not None else None
        if program is None:
            program, how = capture(model, args, kwargs, **options), TRACED
        if form not in self._seen:
            self._seen[form] = (size, program)
        return Captured(program, form, how)

    @property
    def used(self) -> bool:
        """Whether anything has been captured."""
        return bool(self._seen)

    @staticmethod
    def _symbolic(
        model: nn.Module, args: Any, kwargs: Any, options: dict[str, Any], size: int, first: int, known: Program
    ) -> Batches | None:
        """None where the batch must be a number: the trace by itself then says what is wrong, if anything is.

        What Python does with a symbol may differ from what it does with a number without a trace of it (a symbol is no
        `int`), so the symbolic program is compared with a traced one at one size.
        """
        try:
            batches = capture_batches(model, args, kwargs, **options)
        except CaptureError:
            return None
        same = batches.at(first)
        if same is None:  # the first size was one row, say
            known = capture(model, args, kwargs, **options)
            same = batches.at(size)
        return batches if same is not None and same.digest() == known.digest() else None


class Kept(Programs):
    """As Programs, with every call's program kept: for questions that ask about the same call again and again."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Hashable, Captured] = {}

    def capture(self, model: nn.Module, args: Any, kwargs: Any, *, loss: Any = None, **options: Any) -> Captured:
        """As `autopar.capture.capture`; of a call that has come before, the program of then."""
        key = (input_key(model, args, kwargs, loss=loss), *sorted(options.items()))
        if key not in self._known:
            self._known[key] = super().capture(model, args, kwargs, loss=loss, **options)
        return self._known[key]

    @property
    def first(self) -> Program:
        """The program of the first call."""
        return next(iter(self._known.values())).program
