"""The captured program: what capture hands to planner and passes, and how all of them read its graph.

A `Program` holds one fx graph of ATen ops. With `training` it is the joint graph (forward and backward in one), else
forward only. Every placeholder is a `Source`, every element of the output a `Sink`. The graph is flat and functional,
every node has `meta["val"]` (a fake tensor, or a tuple of them, None where a result is absent) and

* `meta["phase"]`: "fwd" or "bwd" (bwd: depends on a tangent, or serves the backward only);
* `meta["module"]`: path of the user's module, "" for the root ("model.layers.3.mlp");
* `meta["address"]`: unique and readable, "fwd:model.layers.3.mlp/mm#1" (the k-th op of that kind in that module and
  phase). Plans are keyed by it.

Operands: the tensor arguments of a node in order of args, then kwargs, lists flattened, None skipped, `getitem`
resolved to (producer, output index). Rules, planner and passes all use this order.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import fx

FORWARD, BACKWARD = "fwd", "bwd"

aten = torch.ops.aten
#: Ops whose results share the operand's memory, or pieces of it: no kernel runs, and computing them again is free.
VIEWS: frozenset[Any] = frozenset(
    {
        aten.view.default,
        aten.view.dtype,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.expand.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.narrow.default,
        aten.diagonal.default,
        aten.unfold.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.alias.default,
        aten.detach.default,
        aten.view_as_real.default,
        aten.view_as_complex.default,
    }
)
#: Ops through which a parameter is still seen as itself: in another way, or in another precision.
LOOKS: frozenset[Any] = VIEWS | {aten._to_copy.default, aten.clone.default}
#: Ops that rearrange elements, perhaps into new memory or another dtype, and compute nothing.
COPIES: frozenset[Any] = frozenset(
    {
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.clone.default,
        aten.contiguous.default,
        aten._to_copy.default,
        aten.cat.default,
    }
)
#: Both: ops that rearrange and compute nothing.
MOVES: frozenset[Any] = VIEWS | COPIES


class Value(NamedTuple):
    """One tensor of the graph: result `index` of `node`."""

    node: fx.Node
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls

    @property
    def val(self) -> torch.Tensor:
        """The fake tensor."""
        out = self.node.meta["val"]
        return out[self.index] if isinstance(out, (tuple, list)) else out

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.val.shape)


@dataclass(frozen=True)
class Source:
    """A placeholder.

    kind: param, buffer, input, tangent (gradient of output `name`), seed (int64 RNG key), constant.
    `late`: an input that is there when the backward starts only: a gradient that the next pipeline stage sends.
    """

    kind: str
    name: str
    node: str
    trainable: bool = False
    aliases: tuple[str, ...] = ()  # other names of a tied parameter
    late: bool = False

    @property
    def phase(self) -> str:
        """When it is there."""
        return BACKWARD if self.late or self.kind == "tangent" else FORWARD


@dataclass(frozen=True)
class Sink:
    """An element of the output. kind: output, buffer (its new value), grad (of parameter `name`).

    With node None the value is `constant`. `cut`: it depends on parameters, but gradients start from the loss alone.
    `late`: an output of the backward: a gradient that is sent to the pipeline stage before.
    """

    kind: str
    name: str
    node: str | None
    index: int = 0
    constant: Any = None
    cut: bool = False
    late: bool = False

    @property
    def phase(self) -> str:
        """What computes it."""
        return BACKWARD if self.late or self.kind == "grad" else FORWARD


class Draft(fx.GraphModule):
    """A GraphModule that writes its code when it is first called.

    Most graphs between capture and runtime never run, and writing the code of each was a third of the time of lowering.
    """

    def recompile(self) -> Any:
        """Forget the code that was written; the next call writes it anew."""
        for name in ("forward", "__call__"):
            if name in vars(type(self)):
                delattr(type(self), name)

    def forward(self, *args: Any) -> Any:
        """Write the code, then run it."""
        super().recompile()
        return self(*args)


@dataclass
class Program:
    """A captured model for one set of input shapes.

    Attributes:
        gm: the graph; its output is one flat tuple, in the order of `sinks`.
        training: whether the backward is in it.
        pack: flat list of the user's outputs (order of the output sinks) -> what the model returns.
        flatten: (args, kwargs) of a call -> the tensors for the input sources, in order.
        fingerprint: hash of the model (parameter names, shapes, dtypes, ops), not of weights or device.
        batch_dims: for each input name, the dim that is the batch, where there is one.
        precision: what computes in low precision (`autopar.precision.Precision.record`); empty: all as the model is.
    """

    gm: fx.GraphModule
    sources: tuple[Source, ...]
    sinks: tuple[Sink, ...]
    training: bool
    fingerprint: str
    pack: Callable[[list[Any]], Any]
    flatten: Callable[[tuple[Any, ...], dict[str, Any]], list[torch.Tensor]]
    batch_dims: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    precision: dict[str, str] = field(default_factory=dict)
    _by_name: dict[str, fx.Node] = field(default_factory=dict, repr=False, compare=False)
    #: What `autopar.recompute` has made of it.
    derived: dict[frozenset[tuple[str, str]], Program] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    def node(self, name: str) -> fx.Node:
        """Node by name (placeholders and results of `sources` and `sinks`)."""
        if name not in self._by_name:
            self._by_name.update((n.name, n) for n in self.gm.graph.nodes)
        return self._by_name[name]

    def digest(self) -> str:
        """Hash of all that it computes: also how the ops are wired, their numbers, and constant tensors."""
        digest = hashlib.sha256()
        for node in self.gm.graph.nodes:
            what = op_name(node) if node.op == "call_function" else node.target
            digest.update(f"{node.name} {what} {node.args} {node.kwargs}\n".encode())
            if node.op == "get_attr" and not (constant := getattr(self.gm, str(node.target))).is_meta:
                digest.update(constant.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update(repr([(s.kind, s.name, s.node, s.index) for s in self.sinks]).encode())
        return f"{self.fingerprint[:12]}-{digest.hexdigest()[:12]}"

    @property
    def has_loss(self) -> bool:
        """Whether a scalar floating-point output, a loss, is among the outputs."""
        for sink in self.sinks:
            if sink.kind == "output" and sink.node is not None:
                value = self.node(sink.node).meta["val"]
                if isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point():
                    return True
        return False

    def of_kind(self, kind: str) -> list[Source]:
        """Sources of one kind, in order."""
        return [s for s in self.sources if s.kind == kind]


def is_op(node: fx.Node) -> bool:
    """A call that computes (getitem only picks a result)."""
    return node.op == "call_function" and node.target is not operator.getitem


def resolve(node: fx.Node) -> Value:
    """The tensor a node stands for, seen through getitem."""
    index = 0
    while node.op == "call_function" and node.target is operator.getitem:
        node, index = node.args[0], node.args[1]  # type: ignore[assignment]
    return Value(node, index)


def operands(node: fx.Node) -> list[Value]:
    """Tensor operands in rule order. Scalars (SymInt and the like) are not operands."""
    found: list[Value] = []

    def visit(arg: fx.Node) -> fx.Node:
        value = resolve(arg)
        if isinstance(value.val, torch.Tensor):
            found.append(value)
        return arg

    fx.map_arg((node.args, node.kwargs), visit)
    return found


def results(node: fx.Node) -> list[torch.Tensor | None]:
    """Fake tensors of every result; None where absent."""
    val = node.meta["val"]
    vals = list(val) if isinstance(val, (tuple, list)) else [val]
    return [v if isinstance(v, torch.Tensor) else None for v in vals]


def named_arguments(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an op by schema name, defaults filled in, in schema order."""
    named: dict[str, Any] = {}
    for i, spec in enumerate(target._schema.arguments):
        if i < len(args) and not spec.kwarg_only:
            named[spec.name] = args[i]
        elif spec.name in kwargs:
            named[spec.name] = kwargs[spec.name]
        elif spec.has_default_value():
            named[spec.name] = spec.default_value
    return named


def op_name(node: fx.Node) -> str:
    """Short printable name of the op: "aten.mm", "autopar.rand"."""
    return _target_name(node.target)


@lru_cache(maxsize=4096)
def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}.{target._schema.name.split('::')[1]}"
        return name if target._overloadname == "default" else f"{name}.{target._overloadname}"
    return getattr(target, "__name__", str(target))


_DIGITS = re.compile(r"(?<=[.])\d+(?=[./])")


def pattern(address: str) -> str:
    """The address with layer numbers starred: what repeated layers share."""
    return _DIGITS.sub("*", address)


def set_addresses(graph: fx.Graph) -> None:
    """Give every op its address; call once the graph has its final form for planning."""
    count: dict[str, int] = {}
    for node in graph.nodes:
        if is_op(node):
            stem = f"{node.meta['phase']}:{node.meta.get('module', '')}/{op_name(node).removeprefix('aten.')}"
            k = count.get(stem, 0)
            count[stem] = k + 1
            node.meta["address"] = f"{stem}#{k}"
