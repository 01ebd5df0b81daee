"""Answers in Python: what `autopar explain` prints, for a model at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autopar import options, questions, report, words
from autopar.capture import capture
from autopar.errors import BatchError
from autopar.memory_picture import memory_timeline
from autopar.plan import Plan
from autopar.tradeoff import frontier


def explain(
    plan: Plan,
    name: str,
    model: nn.Module | None = None,
    *,
    example: options.Example | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    quick: bool = False,
    everything: bool = False,
) -> str:
    """Why `plan` splits what `name` means as it does: chosen, next best, its cost, and what decided.

    Args:
        name: a parameter, module or op address; exact, with `*` for the layer number, a glob, or its beginning or end.
        model, example, loss: what the plan was made for; may be left out for plans made by `autopar plan`.
        quick: only with everything else as it is; nothing is solved.
        everything: all parameters and ops that `name` means, the backward too.

    Raises:
        PlanError: the plan is for another model, or nothing has that name. BatchError: a model without an example.
    """
    if model is None:
        opened = questions.open_plan(plan, stages=True)
    else:
        call = options.arguments(example)
        if call is None:
            raise BatchError("explain needs example= with a model: the arguments of one call, for their shapes")
        opened = questions.open_program(capture(model, *call, loss=loss, precision=plan.computes), plan)
    found = questions.ask(opened, name, solved=not quick, everything=everything)
    return report.text(words.explanation(opened, found), width=120)


__all__ = ["explain", "frontier", "memory_timeline"]
