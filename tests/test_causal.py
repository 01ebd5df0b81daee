"""Masks that are constants of a graph: those that say "causal", or nothing, become a flag of attention."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import fx

from autopar.mesh import Mesh
from autopar.passes import attention, edit
from autopar.passes.causal import CAUSAL, NOTHING, OTHER, causal
from tests.test_device_pass import F64, INF, attend, numbers, some

aten = torch.ops.aten


def masked(make, rows=6, columns=6):
    """The graph of `attend` with a mask that `make(emit)` computes in it."""
    gm, _ = attend(*some(rows, columns), mask=numbers(rows, columns))
    old = next(n for n in gm.graph.nodes if n.target == "mask")
    like = next(n for n in gm.graph.nodes if n.target == "q")
    with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op == "call_function")):
        mask = make(lambda target, *args, **kwargs: edit.call(gm.graph, target, *args, like=like, **kwargs), like)
    old.replace_all_uses_with(mask)
    gm.graph.erase_node(old)
    gm.recompile()
    return gm


def triangle(emit, x, fill=-INF, diagonal=1):
    ones = emit(aten.new_ones.default, emit(aten.new_zeros.default, x, []), [6, 6])
    closed = emit(aten._to_copy.default, emit(aten.triu.default, ones, diagonal), dtype=torch.bool)
    return emit(aten.masked_fill.Scalar, emit(aten.new_zeros.default, ones, [6, 6]), closed, fill)


def constant(emit, x, **options):
    """`triangle` from a constant, not from the operand x."""
    graph = x.graph
    zero = graph.call_function(aten.zeros.default, ([],), {"dtype": F64, "device": torch.device("cpu")})
    zero.meta.update(val=torch.empty([], dtype=F64, device="meta"), phase="fwd")
    return triangle(emit, zero, **options)


@pytest.mark.parametrize(
    "make, flag",
    [
        (constant, True),
        (lambda e, x: constant(e, x, fill=torch.finfo(F64).min), True),
        (lambda e, x: constant(e, x, diagonal=6), False),  # nothing is closed
        (lambda e, x: e(aten.contiguous.default, e(aten.expand.default, constant(e, x), [2, 1, 6, 6])), True),
        (lambda e, x: constant(e, x, diagonal=2), None),
        (lambda e, x: constant(e, x, fill=-1.0), None),
        (triangle, None),  # of a tensor that is given: what it holds is not asked
    ],
)
def test_constant_masks_are_told_as_a_flag(make, flag):
    gm = masked(make)
    inputs = list(some(6, 6))
    want = gm(*inputs)
    out = causal(edit.copy(gm), Mesh.parse("dp=2"))
    calls = [n for n in out.graph.nodes if n.target in (attention.FORWARD, attention.BACKWARD)]
    assert len(calls) == 2
    for node in calls:
        assert (node.kwargs.get("attn_mask") is None) == (flag is not None)
        assert node.args[-1] is bool(flag)
    for got, wanted in zip(out(*inputs), want):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_mask_of_few_of_the_queries_is_not_causal():
    def make(emit, x):
        return emit(aten.slice.Tensor, constant(emit, x), 0, 0, 4)

    gm = causal(masked(make, 4, 6), Mesh.parse(1))
    assert all(n.kwargs["attn_mask"] is not None for n in gm.graph.nodes if n.target is attention.FORWARD)


def traced(emit, rows=7, window=None, packed=None, ahead=0):
    """A mask as transformers writes it while it is traced, for a batch of three."""
    place = emit(aten.expand.default, emit(aten.unsqueeze.default, emit(aten.arange.default, rows), 0), [3, rows])
    query = emit(aten.reshape.default, place, [3, 1, rows, 1])
    key = emit(aten.reshape.default, place, [3, 1, 1, rows])
    open_ = emit(aten.le.Tensor, key, emit(aten.add.Tensor, query, ahead))
    if window is not None:
        near = emit(aten.gt.Tensor, key, emit(aten.sub.Tensor, query, window))
        open_ = emit(aten.bitwise_and.Tensor, open_, near)
    if packed is not None:
        late = emit(aten.ge.Scalar, place, packed)
        pair = [emit(aten.reshape.default, late, shape) for shape in ([3, 1, rows, 1], [3, 1, 1, rows])]
        open_ = emit(aten.bitwise_and.Tensor, open_, emit(aten.eq.Tensor, *pair))
    return emit(aten.where.self, open_, *(emit(aten.scalar_tensor.default, v) for v in (0.0, -INF)))


def third(emit):
    """Causal, but for the third of the batch."""
    batch = emit(aten.reshape.default, emit(aten.eq.Scalar, emit(aten.arange.default, 3), 2), [3, 1, 1, 1])
    return emit(aten.masked_fill.Scalar, traced(emit), batch, 0.0)


def spread(shape):
    """Nothing closed, said of one row or column only."""
    return lambda emit: emit(aten.expand.default, emit(aten.zeros.default, shape), [2, 1, 7, 7])


@pytest.mark.parametrize(
    "make, want",
    [
        (traced, CAUSAL),
        (lambda e: traced(e, window=3), OTHER),
        (lambda e: traced(e, window=8), CAUSAL),
        (lambda e: traced(e, packed=4), OTHER),
        (lambda e: traced(e, packed=0), CAUSAL),
        (lambda e: traced(e, ahead=1), OTHER),
        (lambda e: traced(e, ahead=9), NOTHING),
        (third, OTHER),
        (spread([1, 7]), NOTHING),
        (spread([7, 1]), NOTHING),
        (lambda e: e(aten.slice.Tensor, traced(e), 2, 0, 4), OTHER),
        (lambda e: e(aten.slice.Tensor, traced(e), 2, 3, 7), OTHER),
    ],
)
def test_masks_are_read_block_by_block(make, want, monkeypatch):
    graph = fx.Graph()

    def emit(target, *args, **kwargs):
        node = graph.call_function(target, args, kwargs)
        values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*values, **named)
        return node

    mask = make(emit)
    module = sys.modules["autopar.passes.causal"]
    for size in (1, 3, 1024):
        monkeypatch.setattr(module, "BLOCK", size)
        assert module._Values(fx.GraphModule({}, graph), {}).meaning(mask) == want
