"""partition: what it saves, and that the halves compute what the joint graph does, bit for bit."""

from __future__ import annotations

import operator

import pytest
import torch
from graphs import Build, apply, assert_same, ops, random_joint, run, zero3

from autopar.errors import PassError
from autopar.passes import collectives as c
from autopar.passes.bind import BOUND, bind
from autopar.passes.bucket import bucket
from autopar.passes.cancel import cancel
from autopar.passes.partition import partition
from autopar.passes.runner import describe
from autopar.passes.verify import verify

aten = torch.ops.aten
MESHES = ("a=2,b=2", "a=4", "a=2,b=1,c=2")


def halves(b, gm, fuses=False):
    """Cut, check, and compare forward then backward with the joint graph; the parts."""
    rows = b.inputs(gm)
    parts = partition(gm, b.sources, b.sinks, fuses)
    verify(parts.forward, mesh=b.mesh, deep=True)
    verify(parts.backward, mesh=b.mesh, deep=True)
    given = [[v for v, s in zip(row, b.sources) if s.kind != "tangent"] for row in rows]
    tangents = [[v for v, s in zip(row, b.sources) if s.kind == "tangent"] for row in rows]
    out = run(parts.forward, b.mesh, given)
    kept = [[*(g[i] for i in parts.saved_inputs), *o[parts.num_outputs :]] for g, o in zip(given, out)]
    grads = run(parts.backward, b.mesh, [[*k, *t] for k, t in zip(kept, tangents)])
    found = [(*o[: parts.num_outputs], *g) for o, g in zip(out, grads)]
    assert_same(run(gm, b.mesh, rows), found)
    return parts


@pytest.mark.parametrize("seed", range(12))
def test_partition_of_random_graphs(seed):
    b, gm = random_joint(seed, MESHES[seed % 3])
    before = describe(gm)
    plain = halves(b, gm)
    halves(b, apply(b, gm, cancel, bucket))
    assert halves(b, gm, fuses=True).saved_bytes <= plain.saved_bytes
    assert describe(gm) == before


def test_partition_for_fused_kernels_saves_the_heads_of_chains():
    b = Build()
    x, w, t = b.put("x0", 4, 4), b.put("p0", 4, 4), b.put("t0", 4, 4)
    h = b(aten.mm.default, x, w)
    gate = b(aten.sigmoid.default, h)  # computed again: only element-wise ops read it
    y = b(aten.mul.Tensor, h, gate)  # saved: a product reads it
    out = b(aten.mm.default, y, w)
    grad = b(aten.mul.Tensor, b(aten.mul.Tensor, t, gate), h)
    other = b(aten.mm.default, b(aten.permute.default, y, [1, 0]), t)
    gm = b.done([out], [grad, other])
    assert halves(b, gm).saved == (h.name, gate.name, y.name)
    assert halves(b, gm, fuses=True).saved == (h.name, y.name)


def test_partition_of_zero3_gathers_again_and_saves_nothing():
    b = Build()
    parts = halves(b, zero3(b))
    assert parts.saved == () and parts.saved_bytes == 0
    assert ops(parts.forward) == ["all_gather", "mm"]
    assert describe(parts.backward).splitlines()[:3] == ["p0: f64[2, 6] = placeholder  # fwd",
                                                        "x0: f64[3, 4] = placeholder  # fwd",
                                                        "t0: f64[3, 6] = placeholder  # bwd"]  # fmt: skip
    assert sorted(ops(parts.backward)) == ["all_gather", "mm", "mm", "permute", "permute", "reduce_scatter"]


def test_partition_saves_the_mask_not_its_float_copy():
    b = Build()
    x, t = b.put("x0", 4, 4), b.put("t0", 4, 4)
    h = b(aten.exp.default, x)
    mask = b(aten.gt.Scalar, h, 1.0)
    wide = b(aten._to_copy.default, mask, dtype=torch.float64)
    parts = halves(b, b.done([b(aten.mul.Tensor, h, wide)], [b(aten.mul.Tensor, t, wide)]))
    assert parts.saved == (mask.name,) and parts.saved_bytes == 16


def test_partition_saves_a_tensor_once_and_computes_its_views_again():
    b = Build()
    x, t = b.put("x0", 4, 4), b.put("t0", 4, 4)
    h = b(aten.neg.default, x)
    turned, flat = b(aten.permute.default, h, [1, 0]), b(aten.view.default, h, [16])
    part = b(aten.slice.Tensor, flat, 0, 0, 4)
    y = b(aten.mm.default, turned, h)
    grads = [
        b(aten.mm.default, t, turned),
        b(aten.mm.default, t, h),
        b(aten.add.Tensor, b(aten.view.default, t, [16]), flat),
        b(aten.add.Tensor, b(aten.select.int, t, 0, 0), part),
    ]
    parts = halves(b, b.done([y], grads))
    assert parts.saved == (h.name,)


def test_partition_saves_the_smaller_of_cast_and_origin():
    b = Build()
    x, t = b.put("x0", 4, 4), b.put("t0", 4, 4, dtype=torch.float32)
    h = b(aten.neg.default, x)
    narrow = b(aten._to_copy.default, h, dtype=torch.float32)
    y = b(aten.neg.default, narrow)
    parts = halves(b, b.done([y], [b(aten.mul.Tensor, t, narrow)]))
    assert parts.saved == (narrow.name,)


def test_partition_saves_once_what_several_copies_start_from():
    b = Build()
    x, t = b.put("x0", 4, 4), b.put("t0", 4, 4)
    h = b(aten.neg.default, x)
    turned = b(aten.clone.default, b(aten.permute.default, h, [1, 0]), memory_format=torch.contiguous_format)
    flat = b(aten.reshape.default, h, [16])
    mixed = b(aten.reshape.default, b(aten.permute.default, h, [1, 0]), [16])
    grads = [b(aten.mm.default, t, turned)]
    grads += [b(aten.mul.Tensor, b(aten.view.default, t, [16]), other) for other in (flat, mixed)]
    parts = halves(b, b.done([b(aten.exp.default, h)], grads))
    assert parts.saved == (h.name,)


def test_partition_saves_the_copy_that_is_needed_alone():
    b = Build()
    x, t = b.put("x0", 4, 4), b.put("t0", 4, 4)
    h = b(aten.neg.default, x)
    part = b(aten.clone.default, b(aten.slice.Tensor, h, 1, 0, 2), memory_format=torch.contiguous_format)
    parts = halves(b, b.done([b(aten.exp.default, h)], [b(aten.mm.default, t, part)]))
    assert parts.saved == (part.name,) and parts.saved_bytes == 64


def gathered(b, *others):
    """A product of a gathered activation, whose backward wants a piece of it cut otherwise; (joint, piece, whole)."""
    h = b(aten.neg.default, b.put("x0", 2, 4))
    whole = b(c.all_gather, h, "dp", 0)
    y = b(aten.mm.default, whole, b.put("p0", 4, 4))
    out = b(aten.exp.default, y)
    t = b.put("t0", 4, 4)
    piece = b(c.local_chunk, whole, "dp", 1, bwd=True)
    grads = [b(aten.mm.default, b(aten.permute.default, piece, [1, 0]), t)]
    grads += [b(other, t, whole) for other in others]
    return b.done([out], grads), piece, whole


def test_partition_saves_the_piece_that_the_backward_cuts():
    b = Build()
    gm, piece, whole = gathered(b)
    parts = halves(b, gm)
    assert parts.saved == (piece.name,) and parts.saved_bytes == 4 * 2 * 8
    names = [n.name for n in parts.forward.graph.nodes]
    assert names.index(piece.name) == names.index(whole.name) + 1


def test_partition_cuts_in_the_backward_what_is_kept_whole():
    b = Build()
    gm, _, whole = gathered(b, aten.mul.Tensor)
    parts = halves(b, gm)
    assert parts.saved == (whole.name,)
    assert ops(parts.backward) == ["local_chunk", "permute", "mm", "mul"]


def test_what_is_computed_again_stands_before_its_reader():
    b = Build()
    x, t = b.put("x0", 4, 4), b.put("t0", 4, 4)
    one, two = (b(aten._to_copy.default, x, dtype=dtype) for dtype in (torch.float32, torch.int64))
    y = b(aten.mul.Tensor, b(aten.exp.default, one), two)
    g = b(aten.mul.Tensor, b(aten.neg.default, t), two)
    parts = halves(b, b.done([y], [g, b(aten.mul.Tensor, g, one)]))
    assert parts.saved == ()
    assert [n.name for n in parts.backward.graph.nodes if n.op == "call_function"] == [
        "neg_default", two.name, g.name, one.name, "mul_tensor_2",
    ]  # fmt: skip


def test_partition_computes_casts_of_parameters_again():
    b = Build()
    p, t = b.put("p0", 4, 4), b.put("t0", 4, 4, dtype=torch.float32)
    narrow = b(aten._to_copy.default, b(c.local_chunk, p, "dp", 0), dtype=torch.float32)
    wide = b(c.all_gather, narrow, "dp", 0)
    grad = b(aten.mul.Tensor, b(c.local_chunk, t, "dp", 0), narrow)
    parts = halves(b, b.done([wide], [grad]))
    assert parts.saved == () and parts.saved_inputs == (0,)


def test_partition_hands_numbers_and_constants_over_by_computing_them_again():
    b = Build("dp=2")
    x, t = b.put("x0", 4), b.put("t0", 4)
    rank = b.graph.call_function(c.coordinate, ("dp",))
    shift = b.graph.call_function(aten.add.Scalar, (x, rank))
    shift.meta.update(x.meta)
    ones = b.graph.call_function(aten.full.default, ([4], 2.0), {"dtype": torch.float64})
    ones.meta.update(x.meta)
    again = b.graph.call_function(aten.mul.Scalar, (t, rank))
    again.meta.update(t.meta)
    gm = b.done([b(aten.mul.Tensor, shift, ones)], [again, b(aten.mul.Tensor, t, ones)])
    parts = halves(b, gm)
    assert parts.saved == () and parts.saved_inputs == ()


def test_partition_picks_results_of_forward_ops_in_the_forward():
    b = Build()
    x, t = b.put("x0", 4, 4), b.put("t0", 4, 4)
    both = b.graph.call_function(aten.max.dim, (x, 1))
    meta = torch.empty(4, dtype=torch.float64, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    both.meta.update(val=meta, phase="fwd")
    picks = [b.graph.call_function(operator.getitem, (both, i)) for i in (0, 1)]
    for i, pick in enumerate(picks):
        pick.meta.update(val=meta[i], phase=("fwd", "bwd")[i])
    grad = b(aten.index_select.default, t, 0, picks[1])
    parts = halves(b, b.done([b(aten.neg.default, picks[0])], [grad]))
    assert parts.saved == (picks[1].name,)


def test_partition_of_constants_outputs_that_are_saved_and_gradients_that_are_none():
    b = Build()
    x, t = b.put("x0", 4), b.put("t0", 4)
    y = b(aten.neg.default, x)
    gm = b.done([y, 3, x], [b(aten.mul.Tensor, t, y), None, t, y])
    parts = halves(b, gm)
    assert parts.num_outputs == 3 and parts.saved == (y.name,)


def test_partition_without_gradients():
    b = Build()
    x = b.put("x0", 4)
    parts = halves(b, b.done([b(aten.neg.default, x)]))
    assert parts.saved == () and ops(parts.backward) == []


def test_partition_works_on_bound_graphs():
    b = Build("dp=2,one=1")
    x, p, t = b.put("x0", 4, 4), b.put("p0", 4, 4), b.put("t0", 4, 4)
    w = b(c.all_gather, p, "one", 0)
    gm = b.done([b(aten.mm.default, x, w)], [b(c.local_chunk, b(aten.mm.default, x, t), "dp", 0)])
    bound = bind(gm, b.mesh, (0, 0), {})
    parts = halves(b, bound)
    assert parts.forward.meta[BOUND] and ops(parts.forward) == ["mm"]
    assert ops(parts.backward) == ["mm", "slice", "clone"]


def test_partition_refuses():
    b = Build()
    x, t = b.put("x0", 4), b.put("t0", 4)
    gm = b.done([b(aten.mul.Tensor, x, t)])
    with pytest.raises(PassError, match="output o0 is computed by backward node mul_tensor"):
        partition(gm, b.sources, b.sinks)
    with pytest.raises(PassError, match="2 placeholders and 1 outputs; the program has 1 sources and 1 sinks"):
        partition(gm, b.sources[:1], b.sinks)
    next(n for n in gm.graph.nodes if n.op == "call_function").meta["phase"] = "fwd"
    with pytest.raises(PassError, match="forward node mul_tensor reads backward node t0"):
        partition(gm, b.sources, b.sinks)
