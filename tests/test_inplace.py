"""Graphs that run op by op: fused kernels and reused memory give the same numbers, and write to nothing of others."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from autopar.graph import BACKWARD, FORWARD
from autopar.passes import edit
from autopar.passes.attention import last_dim_dense
from autopar.passes.bind import BOUND, GATHER_INTO, IN_PLACE_REDUCE, WAIT, functional
from autopar.passes.fuse import fuse
from autopar.passes.inplace import inplace
from autopar.passes.verify import verify

aten = torch.ops.aten
F64 = torch.float64


class Builder:
    """A bound local graph, op by op."""

    def __init__(self, phase: str = FORWARD) -> None:
        self.graph, self.phase = fx.Graph(), phase

    def input(self, *shape: int) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        node.meta.update(val=torch.empty(shape, dtype=F64, device="meta"), phase=self.phase)
        return node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        like = next(a for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, fx.Node))
        return edit.call(self.graph, target, *args, like=like, **kwargs)

    def reduce(self, x: fx.Node) -> fx.Node:
        start = self.graph.call_function(functional.all_reduce.default, (x, "sum", "none"))
        wait = self.graph.call_function(WAIT, (start,))
        for node in (start, wait):
            edit.inherit(node, x)
            node.meta["val"] = x.meta["val"]
        return wait

    def done(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        gm = edit.module(fx.GraphModule(torch.nn.Module(), self.graph), self.graph)
        gm.meta[BOUND] = True
        return gm


def run(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs, with collectives of a group of one that doubles what it reduces."""
    env: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    for node in gm.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
        if node.op == "placeholder":
            env[node] = next(feed)
        elif node.op == "output":
            return list(args[0])
        elif node.target is WAIT:
            env[node] = args[0]
        elif node.target is functional.all_reduce.default:
            env[node] = 2 * args[0]
        elif node.target is IN_PLACE_REDUCE:
            env[node] = args[0].mul_(2)
        elif node.target is functional.reduce_scatter_tensor.default:
            env[node] = 2 * args[0].reshape(args[2], -1)[1]
        else:
            env[node] = node.target(*args, **kwargs)
    raise AssertionError("no output")


def check(gm: fx.GraphModule, *shapes: tuple[int, ...]) -> list[str]:
    """Run before and after both passes: equal outputs, untouched inputs. The ops afterwards."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=F64) for shape in shapes]
    want = [t.clone() for t in run(gm, [t.clone() for t in inputs])]
    after = inplace(fuse(edit.copy(gm)))
    verify(after)
    kept = [t.clone() for t in inputs]
    got = run(after, kept)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(kept, inputs):
        assert torch.equal(a, b), "an input was written to"
    return [str(n.target) for n in after.graph.nodes if n.op == "call_function"]


def test_a_sum_is_written_over_what_dies_with_it():
    b = Builder()
    x, w = b.input(4, 4), b.input(4, 4)
    y = b(aten.mm.default, x, w)
    ops = check(b.done(b(aten.add.Tensor, y, x)), (4, 4), (4, 4))
    assert ops == ["aten.mm.default", "aten.add_.Tensor"]


@pytest.mark.parametrize("why", ["input", "read later", "output", "view read later", "expanded"])
def test_what_somebody_reads_is_not_written_over(why):
    b = Builder()
    x, w = b.input(4, 4), b.input(4, 4)
    y = b(aten.mm.default, x, w)
    if why == "input":
        outs = [b(aten.add.Tensor, x, w)]
    elif why == "read later":
        total = b(aten.add.Tensor, y, x)
        outs = [b(aten.sub.Tensor, total, y)]
    elif why == "output":
        outs = [b(aten.add.Tensor, y, x), y]
    elif why == "view read later":
        view = b(aten.view.default, y, [2, 8])
        total = b(aten.add.Tensor, y, x)
        outs = [b(aten.sub.Tensor, b(aten.view.default, total, [2, 8]), view)]
    else:
        row = b(aten.sum.dim_IntList, y, [0], True)
        outs = [b(aten.add.Tensor, b(aten.expand.default, row, [4, 4]), x)]
    ops = check(b.done(*outs), (4, 4), (4, 4))
    assert "aten.add_.Tensor" not in ops


@pytest.mark.parametrize("first", [True, False])
def test_a_result_keeps_the_strides_it_would_have_had(first):
    """Attention lays its result out as its query is, and a reshape of the result copies or does not."""
    b = Builder()
    x, w = b.input(4, 6), b.input(6, 4)
    turned = b(aten.mul.Tensor, b(aten.permute.default, x, [1, 0]), w)  # with the strides of the view
    y = b(aten.mm.default, w, b(aten.mm.default, x, w))
    gm = b.done(b(aten.add.Tensor, *((turned, y) if first else (y, turned))))
    inputs = [torch.randn(4, 6, dtype=F64), torch.randn(6, 4, dtype=F64)]
    want = run(gm, inputs)[0]
    after = inplace(edit.copy(gm))
    assert run(after, inputs)[0].stride() == want.stride() == ((1, 6) if first else (4, 1))
    assert any(n.target is aten.add_.Tensor for n in after.graph.nodes) is not first


def test_a_chain_of_sums_keeps_track_of_its_memory():
    b = Builder()
    x, w = b.input(4, 4), b.input(4, 4)
    y = b(aten.mm.default, x, w)
    first = b(aten.add.Tensor, y, x)  # may be written over y
    second = b(aten.add.Tensor, first, w)  # must not be: first is read again
    ops = check(b.done(b(aten.mul.Tensor, second, first)), (4, 4), (4, 4))
    # The product is not written over `second` either: an input may have strides, and so may a sum with it.
    assert ops == ["aten.mm.default", "aten.add_.Tensor", "aten.add.Tensor", "aten.mul.Tensor"]


@pytest.mark.parametrize("phase", [FORWARD, BACKWARD])
def test_a_bucket_is_written_where_it_is_computed(phase):
    b = Builder(phase)
    x, w = b.input(4, 6), b.input(6, 4)
    first = b(aten.mm.default, x, w)
    second = b(aten.sum.dim_IntList, x, [0], True)
    third = b(aten.permute.default, b(aten.mm.default, w, x), [1, 0])
    rows = [b(aten.reshape.default, n, [n.meta["val"].numel()]) for n in (first, second, third)]
    whole = b.reduce(b(aten.contiguous.default, b(aten.cat.default, rows, 0)))
    outs, at = [], 0
    for shape in ((4, 4), (1, 6), (6, 6)):
        end = at + shape[0] * shape[1]
        piece = b(aten.clone.default, b(aten.slice.Tensor, whole, 0, at, end), memory_format=torch.contiguous_format)
        outs.append(b(aten.view.default, piece, list(shape)))
        at = end
    ops = check(b.done(*outs), (4, 6), (6, 4))
    assert "aten.cat.default" not in ops
    assert ops.count("aten.clone.default") == (3 if phase == FORWARD else 0)  # the user may write to an output
    assert ops.count("aten.mm.out") == 1 and ops.count("aten.copy_.default") == 2
    assert "_c10d_functional.all_reduce_.default" in ops


def test_a_product_that_is_read_after_the_reduction_is_copied():
    b = Builder()
    x, w = b.input(4, 4), b.input(4, 4)
    y = b(aten.mm.default, x, w)
    rows = [b(aten.reshape.default, n, [16]) for n in (y, x)]
    whole = b.reduce(b(aten.cat.default, rows, 0))
    ops = check(b.done(whole, b(aten.neg.default, y)), (4, 4), (4, 4))
    assert "aten.mm.out" not in ops and ops.count("aten.copy_.default") == 2


def test_rows_of_a_scatter_bucket():
    b = Builder()
    x, w = b.input(4, 6), b.input(6, 4)
    first, second = b(aten.mm.default, x, w), b(aten.sum.dim_IntList, w, [0], False)
    rows = [b(aten.reshape.default, first, [2, 8]), b(aten.reshape.default, second, [2, 2])]
    flat = b(aten.view.default, b(aten.cat.default, rows, 1), [20])
    start = b.graph.call_function(functional.reduce_scatter_tensor.default, (flat, "sum", 2, "none"))
    wait = b.graph.call_function(WAIT, (start,))
    for node in (start, wait):
        edit.inherit(node, flat)
        node.meta["val"] = torch.empty(10, dtype=F64, device="meta")
    ops = check(b.done(wait), (4, 6), (6, 4))
    assert "aten.cat.default" not in ops and ops.count("aten.copy_.default") == 2


def test_activations_are_reduced_in_place_and_inputs_are_not():
    b = Builder()
    x, w = b.input(4, 4), b.input(4, 4)
    inner = b.reduce(b(aten.contiguous.default, b(aten.mm.default, x, w)))
    ops = check(b.done(inner, b.reduce(x)), (4, 4), (4, 4))
    assert ops.count("_c10d_functional.all_reduce_.default") == 1
    assert ops.count("_c10d_functional.all_reduce.default") == 1


@pytest.mark.parametrize("swapped", [False, True])
def test_a_bias_joins_its_product(swapped):
    b = Builder()
    x, w, bias = b.input(6, 4), b.input(4, 5), b.input(5)
    y = b(aten.view.default, b(aten.mm.default, x, w), [2, 3, 5])
    args = (bias, y) if swapped else (y, bias)
    ops = check(b.done(b(aten.add.Tensor, *args)), (6, 4), (4, 5), (5,))
    assert ops == ["aten.addmm.default", "aten.view.default"]


@pytest.mark.parametrize("why", ["product read twice", "last dim changed"])
def test_a_bias_stays_where_it_cannot_join(why):
    b = Builder()
    x, w = b.input(6, 4), b.input(4, 6)
    y = b(aten.mm.default, x, w)
    if why == "product read twice":
        outs = [b(aten.add.Tensor, y, b.input(6)), b(aten.neg.default, y)]
        shapes = [(6, 4), (4, 6), (6,)]
    else:
        outs = [b(aten.add.Tensor, b(aten.view.default, y, [12, 3]), b.input(3))]
        shapes = [(6, 4), (4, 6), (3,)]
    assert "aten.addmm.default" not in check(b.done(*outs), *shapes)


def _rotated(b: Builder, edges, sizes=(3, 8), dim=1):
    """Gradients of pieces of a tensor, added."""
    parts = [
        b(aten.slice_backward.default, b.input(3, end - start), list(sizes), dim, start, end, 1) for start, end in edges
    ]
    return b.done(b(aten.neg.default, b(aten.add.Tensor, *parts)))


def batch_norm_backward(b: Builder, elsewhere: bool = False, count: int = 40) -> fx.GraphModule:
    """What the capture makes of the gradients of batch norm over [2, 3, 4, 5]; `elsewhere`: sums over two ranks."""
    grad, x = b.input(2, 3, 4, 5), b.input(2, 3, 4, 5)
    mean, rstd, weight = b.input(3), b.input(3), b.input(3)
    var = b(aten.pow.Tensor_Scalar, rstd, -2)
    kernel = aten.native_batch_norm_backward.default
    sums = b.graph.call_function(kernel, (grad, x, weight, mean, var, mean, rstd, False, 0.0, [False, True, True]))
    sums.meta.update(phase=BACKWARD, val=(None, mean.meta["val"], mean.meta["val"]))
    parts = [b.graph.call_function(operator.getitem, (sums, i)) for i in (1, 2)]
    for part in parts:
        part.meta.update(phase=BACKWARD, val=mean.meta["val"])
    if elsewhere:
        parts = [b.reduce(p) for p in parts]
    normal = aten._native_batch_norm_legit_no_training.default
    norm = b.graph.call_function(normal, (x, *parts, mean, var, 0.0, 0.0))
    norm.meta.update(phase=BACKWARD, val=(x.meta["val"], *[torch.empty(0, dtype=F64, device="meta")] * 2))
    correction = b.graph.call_function(operator.getitem, (norm, 0))
    correction.meta.update(phase=BACKWARD, val=x.meta["val"])
    scale = b(aten.mul.Tensor, rstd, weight)
    difference = b(aten.sub.Tensor, grad, correction, alpha=1 / count)
    return b.done(b(aten.mul.Tensor, difference, b(aten.view.default, scale, [1, -1, 1, 1])), *parts)


@pytest.mark.parametrize(("changes", "fused"), [({}, True), ({"elsewhere": True}, False), ({"count": 80}, False)])
def test_the_backward_of_batch_norm_is_one_kernel_where_its_sums_are_our_own(changes, fused):
    gm = batch_norm_backward(Builder(BACKWARD), **changes)
    torch.manual_seed(0)
    inputs = [torch.randn(n.meta["val"].shape, dtype=F64).abs() + 0.1 for n in edit.placeholders(gm)]
    inputs[0] -= 1
    inputs[2] = inputs[1].mean((0, 2, 3))
    inputs[3] = (inputs[1].var((0, 2, 3), correction=0) + 0.1).rsqrt()
    want = run(gm, inputs)
    after = inplace(fuse(edit.copy(gm)))
    verify(after)
    for a, b in zip(run(after, inputs), want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    ops = [n.target for n in after.graph.nodes if n.op == "call_function"]
    assert (aten._native_batch_norm_legit_no_training.default not in ops) is fused
    assert ops.count(aten.native_batch_norm_backward.default) == 1


@pytest.mark.parametrize("edges", [((0, 3), (3, 8)), ((3, 8), (0, 3))])
def test_gradients_of_two_halves_are_joined(edges):
    ops = check(_rotated(Builder(), edges), *((3, end - start) for start, end in edges))
    assert ops == ["aten.cat.default", "aten.neg.default"]


@pytest.mark.parametrize("edges", [((0, 3), (4, 8)), ((0, 4), (3, 8)), ((1, 3), (3, 8)), ((0, 3), (3, 7))])
def test_gradients_of_pieces_that_do_not_tile_are_added(edges):
    assert "aten.cat.default" not in check(_rotated(Builder(), edges), *((3, end - start) for start, end in edges))


def test_a_half_that_somebody_else_reads_is_not_joined():
    b = Builder()
    first, second = (b(aten.slice_backward.default, b.input(3, 4), [3, 8], 1, at, at + 4, 1) for at in (0, 4))
    gm = b.done(b(aten.add.Tensor, first, second), b(aten.neg.default, first))
    assert "aten.cat.default" not in check(gm, (3, 4), (3, 4))


def test_a_bucket_is_there_before_a_product_behind_several_views():
    b = Builder()
    x, w, y = b.input(4, 6), b.input(6, 8), b.input(32)
    product = b(aten.view.default, b(aten.view.default, b(aten.mm.default, x, w), [2, 2, 8]), [32])
    ops = check(b.done(b.reduce(b(aten.cat.default, [product, b(aten.neg.default, y)], 0))), (4, 6), (6, 8), (32,))
    assert "aten.mm.out" in ops


def test_attention_copies_only_what_its_kernel_cannot_step_through():
    x = torch.randn(2, 3, 4, 5)
    swapped = x.transpose(1, 2)
    assert last_dim_dense(swapped) is swapped
    turned = x.transpose(2, 3)
    assert last_dim_dense(turned).is_contiguous() and torch.equal(last_dim_dense(turned), turned)


def test_what_a_collective_may_still_read_is_not_written_over():
    b = Builder()
    x, w = b.input(4, 4), b.input(4, 4)
    y = b(aten.mm.default, x, w)
    start = b.graph.call_function(functional.reduce_scatter_tensor.default, (y, "sum", 2, "none"))
    total = b(aten.add.Tensor, y, x)  # runs while the pieces of y travel
    wait = b.graph.call_function(WAIT, (start,))
    for node in (start, wait):
        edit.inherit(node, y)
        node.meta["val"] = torch.empty(2, 4, dtype=F64, device="meta")
    ops = check(b.done(total, wait), (4, 4), (4, 4))
    assert "aten.add_.Tensor" not in ops


def test_a_bucket_beside_an_op_of_several_results():
    b = Builder()
    x, w = b.input(4, 4), b.input(4)
    norm = b.graph.call_function(aten.native_layer_norm.default, (x, [4], w, w, 1e-5))
    parts = [b.graph.call_function(operator.getitem, (norm, i)) for i in range(2)]
    shapes = [(4, 4), (4, 1)]
    for node, shape in zip(parts, shapes):
        edit.inherit(node, x)
        node.meta["val"] = torch.empty(shape, dtype=F64, device="meta")
    edit.inherit(norm, x)
    norm.meta["val"] = (*(n.meta["val"] for n in parts), parts[1].meta["val"])
    rows = [b(aten.view.default, part, [part.meta["val"].numel()]) for part in parts]
    ops = check(b.done(b.reduce(b(aten.cat.default, rows, 0))), (4, 4), (4,))
    assert "aten.cat.default" not in ops


def test_a_bucket_of_what_a_collective_brings():
    """Its memory cannot be made like that of a result that is still under way."""
    b = Builder()
    x = b.input(4, 4)
    twice = b.reduce(b(aten.mm.default, x, x))
    rows = [b(aten.reshape.default, n, [16]) for n in (twice, b(aten.mm.default, twice, x))]
    ops = check(b.done(b.reduce(b(aten.cat.default, rows, 0))), (4, 4))
    assert "aten.cat.default" not in ops


def test_gathers_fill_memory_of_ours():
    """Several functional gathers in flight corrupt the heap on gloo; the form that is given its memory does not."""
    b = Builder()
    x = b.input(2, 3)
    start = b(functional.all_gather_into_tensor.default, x, 2, "none")
    start.meta["val"] = torch.empty(4, 3, dtype=F64, device="meta")
    wait = b(WAIT, start)
    wait.meta["val"] = start.meta["val"]
    after = inplace(b.done(b(aten.neg.default, wait)))
    verify(after)
    targets = [n.target for n in after.graph.nodes if n.op == "call_function"]
    assert targets == [aten.new_empty.default, GATHER_INTO, WAIT, aten.neg.default]
