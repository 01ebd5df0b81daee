"""Fused attention on a device: the CPU's kernel, of which programs speak, replaced by the device's own.

One of four forms, chosen from dtypes, shapes and mask alone:

* cudnn, flash: half precision without a mask, which is what their kernels are made for; cudnn's where torch itself
  prefers them, and lengths are multiples of its tiles;
* efficient: float32, or with a mask. Its row statistics are padded to a multiple of 32 rows, its mask must be expanded
  and its rows aligned, and its backward wants the output in the order of memory that the forward gave it;
* math: products, exponentials and sums. Exact in every dtype, and in memory quadratic in the length; float64 above all,
  and what the kernels do not take.

Between forward and backward goes what the CPU's kernel hands over, whatever the forms are: the output, and the
logarithm of the sum of exponentials of every row, [batch, heads, queries]. A backward may hold other queries or keys
than its forward (their gradients are sums then), so that it takes the statistics of whole rows from there.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.graph import named_arguments
from autopar.passes import edit

aten = torch.ops.aten

FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
FLASH = aten._scaled_dot_product_flash_attention.default
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward.default
EFFICIENT = aten._scaled_dot_product_efficient_attention.default
EFFICIENT_BACKWARD = aten._scaled_dot_product_efficient_attention_backward.default

_HALF = (torch.bfloat16, torch.float16)
CUDNN = aten._scaled_dot_product_cudnn_attention.default
CUDNN_BACKWARD = aten._scaled_dot_product_cudnn_attention_backward.default
FUSED = (FLASH, FLASH_BACKWARD, EFFICIENT, EFFICIENT_BACKWARD, CUDNN, CUDNN_BACKWARD)
#: Kernels that not every GPU has. The efficient ones are on all.
FLASH_ONLY = frozenset({"flash"})

#: Rows to a multiple of which the efficient kernel pads its statistics.
_STATISTICS = 32
#: Queries and keys to a multiple of which cudnn's kernels have been right in all their versions.
_TILE = 128
#: Elements to a multiple of which it wants the rows of a mask (8; 16 in older versions).
_MASK = 16
#: Elements at a multiple of which rows of operands start, so that the kernels may load 16 bytes at a time.
_ROWS = 8


def form(query: Any, key: Any, mask: Any, causal: bool, kernels: frozenset[str] = FLASH_ONLY) -> str:
    """The name of the form for tensors (of the meta device, say); `kernels`: of "flash" and "cudnn", what there is."""
    *_, rows, width = query.shape
    length = key.shape[2]
    half = query.dtype in _HALF
    if 0 in query.shape or 0 in key.shape:
        return "math"
    if mask is None and half and width % 8 == 0 and (not causal or rows == length):
        if "cudnn" in kernels and width <= 128 and rows % _TILE == length % _TILE == 0:
            return "cudnn"
        if "flash" in kernels and width <= 256:
            return "flash"
    known = half or query.dtype is torch.float32
    if known and width % (8 if half else 4) == 0 and (mask is None or (not causal and mask.dtype is query.dtype)):
        return "efficient"
    return "math"


def replace(
    graph: fx.Graph, node: fx.Node, device: torch.device, kernels: frozenset[str], idle: dict[Any, fx.Node]
) -> None:
    """Put the form for `device` in the place of `node`, a call of the CPU's kernel or of its backward.

    idle: tensors that kernels take and do not read, made so far; one dict for all calls of a graph, in order.
    """
    given = named_arguments(node.target, node.args, node.kwargs)
    assert not given["dropout_p"], f"{node.name} has dropout inside, which capture writes out"
    with graph.inserting_before(node):
        at = _Emitter(graph, node, device, idle)
        call = _Call(at, given["query"], given["key"], given["value"], given["attn_mask"], given["is_causal"],
                     given["scale"])  # fmt: skip
        mask = None if call.mask is None else call.mask.meta["val"]
        name = form(call.query.meta["val"], call.key.meta["val"], mask, call.causal, kernels)
        if node.target is FORWARD:
            made = _FORWARD[name](call, bool(_picked(node, 1)))
        else:
            made = _BACKWARD[name](call, given["grad_out"], given["out"], given["logsumexp"])
    for index, value in enumerate(made):
        for pick in _picked(node, index):
            pick.replace_all_uses_with(value)
            graph.erase_node(pick)
    graph.erase_node(node)


def _picked(node: fx.Node, index: int) -> list[fx.Node]:
    return [u for u in node.users if u.target is operator.getitem and u.args[1] == index]


@dataclass
class _Emitter:
    """Appends nodes that stand for `node`."""

    graph: fx.Graph
    node: fx.Node
    device: torch.device
    idle: dict[Any, fx.Node]

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return edit.call(self.graph, target, *args, like=self.node, **kwargs)

    def several(self, target: Any, *args: Any, count: int, **kwargs: Any) -> list[fx.Node]:
        """The first `count` results of an op that has more."""
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        found = target(*values[0], **values[1])
        node.meta["val"] = tuple(
            torch.empty(v.shape, dtype=v.dtype, device="meta") if isinstance(v, torch.Tensor) else v for v in found
        )
        edit.inherit(node, self.node)
        picks = []
        for index in range(count):
            pick = self.graph.call_function(operator.getitem, (node, index))
            pick.meta["val"] = node.meta["val"][index]
            edit.inherit(pick, self.node)
            picks.append(pick)
        return picks

    def unused(self, like: torch.Tensor) -> fx.Node:
        """A tensor that a kernel takes and does not read."""
        key = (self.node.meta["phase"], like.dtype, tuple(like.shape))
        if key in self.idle:
            return self.idle[key]
        kwargs: dict[str, Any] = {"dtype": like.dtype, "device": self.device, "pin_memory": False}
        node = self.graph.call_function(aten.empty.memory_format, (list(like.shape),), kwargs)
        node.meta["val"] = torch.empty(like.shape, dtype=like.dtype, device="meta")
        edit.inherit(node, self.node)
        self.idle[key] = node
        return node


@dataclass
class _Call:
    """What forward and backward share. Keys and values may have fewer heads than queries: each serves a group."""

    at: _Emitter
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float | None

    def __post_init__(self) -> None:
        self.batch, self.heads, self.rows, self.width = edit.shape(self.query)
        self.groups, self.length = edit.shape(self.key)[1:3]

    def per_head(self, x: fx.Node) -> fx.Node:
        """Keys or values, repeated for every head of queries."""
        if self.groups == self.heads:
            return x
        shape = [self.batch, self.groups, self.heads // self.groups, self.length, edit.shape(x)[-1]]
        wide = self.at(aten.expand.default, self.at(aten.unsqueeze.default, x, 2), shape)
        return self.at(aten.reshape.default, wide, [self.batch, self.heads, self.length, shape[-1]])

    def per_group(self, grad: fx.Node) -> fx.Node:
        """The gradient of `per_head`."""
        if self.groups == self.heads:
            return grad
        shape = [self.batch, self.groups, self.heads // self.groups, self.length, edit.shape(grad)[-1]]
        return self.at(aten.sum.dim_IntList, self.at(aten.reshape.default, grad, shape), [2])

    def operands(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Queries, keys, values, all with the heads of queries."""
        return self.query, self.per_head(self.key), self.per_head(self.value)


# ---- flash -----------------------------------------------------------------------------------------------------------


def _flash(call: _Call, statistics: bool) -> list[fx.Node]:
    return call.at.several(FLASH, *call.operands(), 0.0, call.causal, False, scale=call.scale, count=2)


def _flash_backward(call: _Call, grad: fx.Node, out: fx.Node, sums: fx.Node) -> list[fx.Node]:
    at, operands = call.at, call.operands()
    values = [n.meta["val"] for n in operands]
    kept = FLASH(*values, 0.0, call.causal, False, scale=call.scale)  # what this torch keeps for dropout
    grads = at.several(
        FLASH_BACKWARD, grad, *operands, out, sums, None, None, call.rows, call.length, 0.0, call.causal,
        at.unused(kept[6]), at.unused(kept[7]), scale=call.scale, count=3,
    )  # fmt: skip
    return [grads[0], *map(call.per_group, grads[1:])]


# ---- cudnn -----------------------------------------------------------------------------------------------------------


def _cudnn(call: _Call, statistics: bool) -> list[fx.Node]:
    out, sums = call.at.several(
        CUDNN, *call.operands(), None, statistics, 0.0, call.causal, False, scale=call.scale, count=2
    )
    if statistics:  # which in some versions have one more dim, of one
        sums = call.at(aten.reshape.default, sums, [call.batch, call.heads, call.rows])
    return [out, sums]


def _cudnn_backward(call: _Call, grad: fx.Node, out: fx.Node, sums: fx.Node) -> list[fx.Node]:
    at, operands = call.at, call.operands()
    kept = CUDNN(*(n.meta["val"] for n in operands), None, True, 0.0, call.causal, False, scale=call.scale)
    sums = at(aten.reshape.default, sums, list(kept[1].shape))
    grads = at.several(
        CUDNN_BACKWARD, grad, *operands, out, sums, at.unused(kept[6]), at.unused(kept[7]), None, None, None, call.rows,
        call.length, 0.0, call.causal, scale=call.scale, count=3,
    )  # fmt: skip
    return [grads[0], *map(call.per_group, grads[1:])]


# ---- efficient -------------------------------------------------------------------------------------------------------


def _bias(call: _Call) -> fx.Node | None:
    """The mask [batch, heads, queries, keys], expanded, rows aligned as torch's own composite aligns them."""
    at, mask = call.at, call.mask
    if mask is None:
        return None
    if edit.shape(mask)[-1] != call.length:
        shape = [*edit.shape(mask)[:-1], call.length]
        mask = edit.contiguous(call.at.graph, at(aten.expand.default, mask, shape))
    if extra := -call.length % _MASK:
        wide = at(aten.constant_pad_nd.default, mask, [0, extra], 0.0)
        mask = at(aten.slice.Tensor, wide, len(edit.shape(mask)) - 1, 0, call.length)
    elif mask.target is not aten.contiguous.default:
        mask = at(aten.contiguous.default, mask)
    return at(aten.expand.default, mask, [call.batch, call.heads, call.rows, call.length])


def _efficient(call: _Call, statistics: bool) -> list[fx.Node]:
    out, sums = call.at.several(
        EFFICIENT, *call.operands(), _bias(call), statistics, 0.0, call.causal, scale=call.scale, count=2
    )
    if statistics and call.rows % _STATISTICS:
        sums = call.at(aten.slice.Tensor, sums, 2, 0, call.rows)
    return [out, sums]


def _efficient_backward(call: _Call, grad: fx.Node, out: fx.Node, sums: fx.Node) -> list[fx.Node]:
    at = call.at
    if extra := -call.rows % _STATISTICS:
        sums = at(aten.constant_pad_nd.default, sums, [0, extra], math.inf)  # as the forward pads: exp(x - inf) is 0
    seed = torch.empty((), dtype=torch.int64, device="meta")
    # In memory [batch, queries, heads, width], as it comes from the forward: the kernel assumes it without a look.
    while out.target is aten.contiguous.default:
        out = out.args[0]  # type: ignore[assignment]
    turn = [0, 2, 1, 3]
    out = at(aten.permute.default, at(aten.contiguous.default, at(aten.permute.default, out, turn)), turn)
    grads = at.several(
        EFFICIENT_BACKWARD, grad, *call.operands(), _bias(call), out, sums, at.unused(seed), at.unused(seed), 0.0,
        [True, True, True, False], call.causal, scale=call.scale, count=3,
    )  # fmt: skip
    return [grads[0], *map(call.per_group, grads[1:])]


# ---- math ------------------------------------------------------------------------------------------------------------


class _Math:
    """Tensors of one call as [batch * heads, rows, columns], in the precision that kernels add up in."""

    def __init__(self, call: _Call) -> None:
        self.call, self.at = call, call.at
        self.dtype = call.query.meta["val"].dtype
        self.query, self.key, self.value = (self.flat(x) for x in call.operands())
        self.scale = 1.0 / math.sqrt(call.width) if call.scale is None else call.scale

    def flat(self, x: fx.Node) -> fx.Node:
        """[batch, heads, rows, columns] as one batch of matrices, in float32 at least."""
        shape = edit.shape(x)
        if self.dtype in _HALF:
            x = self.at(aten._to_copy.default, x, dtype=torch.float32)
        return self.at(aten.reshape.default, x, [self.call.batch * self.call.heads, *shape[2:]])

    def home(self, x: fx.Node) -> fx.Node:
        """The way back of `flat`."""
        x = self.at(aten.reshape.default, x, [self.call.batch, self.call.heads, *edit.shape(x)[1:]])
        return self.at(aten._to_copy.default, x, dtype=self.dtype) if self.dtype in _HALF else x

    def turned(self, x: fx.Node) -> fx.Node:
        return self.at(aten.permute.default, x, [0, 2, 1])

    def product(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self.at(aten.bmm.default, a, b)

    def scores(self) -> fx.Node:
        """What goes into the exponential, [batch * heads, queries, keys]."""
        at, call = self.at, self.call
        full = [call.batch, call.heads, call.rows, call.length]
        x = at(aten.mul.Scalar, self.product(self.query, self.turned(self.key)), self.scale)
        if call.mask is not None:
            mask, dtype = call.mask, x.meta["val"].dtype
            mask = mask if mask.meta["val"].dtype is dtype else at(aten._to_copy.default, mask, dtype=dtype)
            x = at(aten.reshape.default, at(aten.add.Tensor, at(aten.reshape.default, x, full), mask), edit.shape(x))
        if call.causal:
            ones = at(aten.new_ones.default, x, [call.rows, call.length], dtype=torch.bool)
            x = at(aten.masked_fill.Scalar, x, at(aten.triu.default, ones, 1), -math.inf)
        return x

    def weights(self, scores: fx.Node, sums: fx.Node) -> fx.Node:
        """exp(scores - sums), rows of which add up to one where all keys are here."""
        return self.at(aten.exp.default, self.at(aten.sub.Tensor, scores, self.at(aten.unsqueeze.default, sums, 2)))


def _math(call: _Call, statistics: bool) -> list[fx.Node]:
    m, at = _Math(call), call.at
    scores = m.scores()
    if call.length:
        sums = at(aten.logsumexp.default, scores, [2])
        # Rows that are masked out altogether give zeros, and the CPU's kernel says 0 of them.
        closed = at(aten.eq.Scalar, sums, -math.inf)
        sums = at(aten.masked_fill.Scalar, sums, closed, 0.0)
        # Not exp(scores - sums): of a row that is masked by a large finite number, sums has lost the count of columns.
        weights = at(aten._softmax.default, scores, 2, False)
        weights = at(aten.masked_fill.Scalar, weights, at(aten.unsqueeze.default, closed, 2), 0.0)
    else:
        sums = at(aten.sum.dim_IntList, scores, [2])
        weights = m.weights(scores, sums)
    out = m.product(weights, m.value)
    return [m.home(out), at(aten.reshape.default, sums, [call.batch, call.heads, call.rows])]


def _math_backward(call: _Call, grad: fx.Node, out: fx.Node, sums: fx.Node) -> list[fx.Node]:
    m, at = _Math(call), call.at
    grad, out = m.flat(grad), m.flat(out)
    sums = at(aten.reshape.default, sums, [call.batch * call.heads, call.rows])
    weights = m.weights(m.scores(), sums)
    own = at(aten.sum.dim_IntList, at(aten.mul.Tensor, grad, out), [2], True)
    change = at(aten.sub.Tensor, m.product(grad, m.turned(m.value)), own)
    change = at(aten.mul.Scalar, at(aten.mul.Tensor, weights, change), m.scale)
    of_value = m.product(m.turned(weights), grad)
    of_query, of_key = m.product(change, m.key), m.product(m.turned(change), m.query)
    return [m.home(of_query), *(call.per_group(m.home(x)) for x in (of_key, of_value))]


_FORWARD = {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient, "math": _math}
_BACKWARD = {
    "cudnn": _cudnn_backward,
    "flash": _flash_backward,
    "efficient": _efficient_backward,
    "math": _math_backward,
}


# ---- strides ---------------------------------------------------------------------------------------------------------


def keep_strides(gm: fx.GraphModule) -> fx.GraphModule:
    """Operands of attention are copied to be contiguous only if its kernel does not take the strides they have.

    `gm` is changed. The mask of a GPU's kernel is left alone: what becomes of it was settled when it was padded.
    """
    for node in list(gm.graph.nodes):
        names: tuple[str, ...] = ("query", "key", "value", "out", "grad_out", "grad_out_")
        if node.target in FUSED:
            enough = rows_aligned
        elif node.target in (FORWARD, BACKWARD):
            enough, names = last_dim_dense, (*names, "attn_mask")
        else:
            continue
        given = named_arguments(node.target, node.args, node.kwargs)
        for x in dict.fromkeys(given.get(n) for n in names):
            if x is not None and x.target is aten.contiguous.default and len(x.args) == 1 and not x.kwargs:
                with gm.graph.inserting_before(node):
                    kept = gm.graph.call_function(enough, (x.args[0],))
                edit.inherit(kept, x)
                kept.meta["val"] = x.meta["val"]
                node.replace_input_with(x, kept)
    edit.remove_dead(gm)
    gm.recompile()
    return gm


def last_dim_dense(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if neighbours along its last dim are not neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rows_aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if its last dim is not dense, or other dims step by what breaks the alignment of rows."""
    start = 0 if torch.compiler.is_compiling() else x.storage_offset()  # which a compiler does not tell
    steps = (start, *x.stride()[:-1])
    return x if x.stride(-1) == 1 and all(n % _ROWS == 0 for n in steps) else x.contiguous()


__all__ = ["BACKWARD", "FLASH_ONLY", "FORWARD", "form", "keep_strides", "last_dim_dense", "replace", "rows_aligned"]
