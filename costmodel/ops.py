"""Seconds of computation: roofline at the local shape, max(FLOPs / rate, bytes / traffic) + launch.

FLOPs of matmuls, convolutions and attention come from the formulas of `torch.utils.flop_counter`; every other op is
bound by its traffic. A choice that splits a factor divides the op's loops; a partial sum passing through does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from autopar.costmodel.devices import Machine
from autopar.costmodel.items import Item, Items
from autopar.costmodel.legal import op_specs
from autopar.graph import VIEWS, op_name
from autopar.offload import HOSTED
from autopar.rule import BoundRule, Choice
from autopar.spec import Spec, local_shape

#: Ops that read of an operand only as much as they write.
SPARSE = frozenset({"aten.embedding", "aten.index.Tensor", "aten.gather", "aten.index_select", "aten.index"})


#: Parts of op names -> class of traffic, first match wins; everything else is "elementwise".
_TRAFFIC = (
    (("max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward"), "copy"),
    (("max_pool",), "pool"),
    (("softmax", "nll_loss", "cross_entropy"), "softmax"),
    (("_norm",), "norm"),
    (("clone", "_to_copy", "contiguous", "cat", "copy", "index_put", "constant_pad", "slice_backward"), "copy"),
    (("embedding", "index", "gather", "scatter", "one_hot"), "lookup"),
    (("silu", "gelu", "tanh", "sigmoid", "exp", "log", "sqrt", "sin", "cos", "erf", "pow", "softplus"), "function"),
    (("sum", "mean", "amax", "amin", "max.dim", "any", "all", "prod", "cumsum", "pool"), "reduction"),
)


def traffic_class(name: str) -> str:
    """Class of an op whose time is its traffic, by its name: a key of `costmodel.calibrate.TRAFFIC`."""
    bare = name.removeprefix("aten.")
    return next((kind for parts, kind in _TRAFFIC if any(part in bare for part in parts)), "elementwise")


def _flops_class(name: str) -> str:
    return "attention" if "attention" in name else "convolution" if "convolution" in name else "matmul"


def global_flops(node: fx.Node) -> float:
    """FLOPs of one op at its global shape; 0 for ops that no formula counts.

    The formulas are those of torch. Attention on the CPU has none there and is counted as 4 (forward) and 10 (backward)
    multiply-adds of b h s t d, like the flash kernels.
    """
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return 0.0
    name = op_name(node)
    if "flash_attention_for_cpu" in name:
        query, key = _args(node)[1 if "backward" in name else 0 :][:2]
        b, h, s, d = query.shape
        return (10.0 if "backward" in name else 4.0) * b * h * s * key.shape[-2] * d
    if "grouped_mm" in name:
        left, right = _args(node)[:2]
        out = node.meta["val"]
        if isinstance(out, tuple):  # the backward of both operands: (t k), (g k n)
            return 4.0 * left.numel() * right.shape[-1]
        return 2.0 * out.numel() * left.shape[-1] if out.ndim == 2 else 2.0 * left.numel() * right.shape[-1]
    formula = flop_registry.get(target._overloadpacket)
    if formula is None:
        return 0.0
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    return float(formula(*args, **kwargs, out_val=node.meta["val"]))


def _args(node: fx.Node) -> list[torch.Tensor]:
    return [a.meta["val"] for a in node.args if isinstance(a, fx.Node)]


@dataclass
class Compute:
    """Prices ops on one machine; FLOPs are counted once per signature."""

    items: Items
    machine: Machine
    _flops: dict[int, float] = field(default_factory=dict)
    _seconds: dict[tuple[int, tuple[Choice, ...]], float] = field(default_factory=dict)

    def flops(self, item: Item) -> float:
        found = self._flops.get(item.signature)
        if found is None:
            assert item.node is not None
            found = self._flops[item.signature] = global_flops(item.node)
        return found

    def seconds(self, item: Item, row: tuple[Choice, ...]) -> float:
        """Seconds of the op on one rank under one choice per axis, its own communication included."""
        key = (item.signature, row)
        found = self._seconds.get(key)
        if found is None:
            found = self._seconds[key] = self._priced(item, row)
        return found

    def _priced(self, item: Item, row: tuple[Choice, ...]) -> float:
        assert item.node is not None
        name = op_name(item.node)
        sizes, device = self.machine.mesh.sizes, self.machine.device
        rule = self.items.rule(item)
        seconds = self._inner(item, rule, row)
        if item.node.target in HOSTED and device.host is not None:
            size = sum(_bytes(m, s, sizes) for m, s in zip(item.outs, op_specs(rule, row)[1]) if m is not None)
            return device.host.link.latency + size / device.host.link.bandwidth
        if item.node.target in VIEWS:
            return seconds + (device.measured.view if device.measured else 0.0)
        ins, outs = op_specs(rule, row)
        written = sum(_bytes(m, s, sizes) for m, s in zip(item.outs, outs) if m is not None)
        read = [_bytes(m, s, sizes) for m, s in zip(item.in_meta, ins)]
        if name in SPARSE:
            read = [min(n, written) for n in read]
        split = math.prod(n for c, n in zip(row, sizes) if c.factor)
        dtype = next((m.dtype for m in item.outs if m is not None), torch.float32)
        moved, flops = written + sum(read), self.flops(item) / split
        busy = moved / device.traffic(traffic_class(name), moved)
        if flops:
            busy = max(busy, flops / device.rate(dtype, flops, _flops_class(name)))
        return seconds + device.launch + busy

    def _inner(self, item: Item, rule: BoundRule, row: Sequence[Choice]) -> float:
        """Talk between the shards inside an op: two all-reduces (max, sum) of a row statistic per split inner factor.

        A factor whose loss is a partial sum (masked lookups) needs no talk; nor does one that no operand or no result
        has.
        """
        seconds = 0.0
        sizes = self.machine.mesh.sizes
        for axis, choice in enumerate(row):
            f = choice.factor
            if f not in rule.rule.inner or f in rule.rule.plus or sizes[axis] == 1:
                continue
            having = [(m, o) for m, o in zip(item.in_meta, rule.ins) if rule.position(o, f) is not None]
            if not having or all(rule.position(o, f) is None for o in rule.outs):
                continue
            meta = max((m for m, _ in having), key=lambda m: math.prod(m.shape))
            others = math.prod(n for a, (c, n) in enumerate(zip(row, sizes)) if c.factor and a != axis)
            count = math.prod(meta.shape) / rule.sizes[f] / others
            link, parts = self.machine.links[axis], sizes[axis]
            each = 2 * (parts - 1) / parts * count * meta.itemsize / link.bandwidth
            seconds += 2 * (each + 2 * math.ceil(math.log2(parts)) * link.latency + self.machine.device.launch)
        return seconds


def _bytes(meta: Any, spec: Spec, sizes: Sequence[int]) -> float:
    return math.prod(local_shape(meta.shape, spec, sizes)) * meta.itemsize
