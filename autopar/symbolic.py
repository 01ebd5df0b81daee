"""One trace for every batch size: a joint graph in which the batch is a symbol, and its program at a given size.

Planner and passes work on numbers, so the symbol does not leave this file: `Batches.at(n)` puts a number in its place
everywhere, which costs a walk over the graph where a trace runs the model. The trace has noted on which sizes its path
depends (`if batch > 16:` in the model, a kernel that differs, sizes 0 and 1, which broadcast); for a size that would
have gone another way there is no program here, and the caller traces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from autopar.assemble import Traced, assemble
from autopar.call import SYMBOLIC, Returned
from autopar.graph import Program
from autopar.tree import Leaf


@dataclass(frozen=True)
class Batches:
    """A model captured for every batch size.

    Attributes:
        traced: the joint graph, sizes in terms of the batch.
        number: (symbolic value, batch size) -> its plain value.
        allowed: batch size -> whether the trace would have gone the same way.
        finish: the last check of a program.
    """

    traced: Traced
    number: Callable[[Any, int], int | float | bool]
    allowed: Callable[[int], bool]
    finish: Callable[[Program], None]

    def at(self, size: int) -> Program | None:
        """The program for batches of `size`; None if the model takes another path there.

        Raises:
            CaptureError: as `autopar.capture.capture`.
        """
        if not self.allowed(size):
            return None
        old = self.traced
        graph = _substituted(old.gm.graph, lambda value: self.number(value, size))
        program = assemble(replace(old, gm=old.module(old.gm, graph), returned=self._returned(size)))
        self.finish(program)
        return program

    def _returned(self, size: int) -> Returned:
        """What the forward returned; numbers among it may be sizes."""
        old, new = self.traced.returned, Returned()
        new.__dict__.update(old.__dict__)
        new.leaves = [
            Leaf(path, self.number(value, size) if isinstance(value, SYMBOLIC) else value) for path, value in old.leaves
        ]
        return new


def _substituted(graph: fx.Graph, number: Callable[[Any], int | float | bool]) -> fx.Graph:
    """A copy of the graph without symbols: nodes that compute sizes are gone, fake tensors have numbers as shapes."""
    new = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, SYMBOLIC):
            env[node] = number(val)
            continue
        args, kwargs = (_mapped(a, env, number) for a in (node.args, node.kwargs))
        made = new.create_node(node.op, node.target, args, kwargs, name=node.name)
        made.meta = dict(node.meta)
        if "val" in made.meta:
            made.meta["val"] = _mapped(val, env, number)
        env[node] = made
    return new


def _mapped(value: Any, env: dict[fx.Node, Any], number: Callable[[Any], int | float | bool]) -> Any:
    """Arguments or values with nodes, sizes and fake tensors replaced, containers kept."""
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, SYMBOLIC):
        return number(value)
    if isinstance(value, torch.Tensor):
        return _fixed(value, number)
    if isinstance(value, slice):
        return slice(*(_mapped(v, env, number) for v in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {k: _mapped(v, env, number) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_mapped(v, env, number) for v in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _fixed(tensor: torch.Tensor, number: Callable[[Any], int | float | bool]) -> torch.Tensor:
    """The fake tensor with numbers as sizes and strides; itself if it has no others."""
    if not any(isinstance(n, torch.SymInt) for n in (*tensor.shape, *tensor.stride())):
        return tensor
    shape, stride = (
        [int(number(n)) if isinstance(n, torch.SymInt) else n for n in dims] for dims in (tensor.shape, tensor.stride())
    )
    with tensor.fake_mode:  # type: ignore[attr-defined]  # every value of a trace is fake
        return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
