"""cancel, bucket, overlap: what they write, and that every rank computes the same, bit for bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from graphs import Build, apply, ops, random_joint, zero3

from autopar.errors import PassError
from autopar.passes import collectives as c
from autopar.passes import edit
from autopar.passes.bind import STARTS, WAIT, bind, functional
from autopar.passes.bucket import bucket
from autopar.passes.cancel import cancel
from autopar.passes.overlap import overlap
from autopar.passes.verify import verify

aten = torch.ops.aten
MESHES = ("a=2,b=2", "a=4", "a=2,b=1,c=2")


# ---- cancel --------------------------------------------------------------------------------------------------------


def gather_of_chunk(b, x, y):
    return b(c.all_gather, b(c.local_chunk, x, "dp", 1), "dp", 1)


def chunk_of_gather(b, x, y):
    return b(c.local_chunk, b(c.all_gather, y, "dp", 0), "dp", 0)


def exchange_and_back(b, x, y):
    return b(c.all_to_all, b(c.all_to_all, y, "dp", 0, 1), "dp", 1, 0)


def reduce_then_chunk(b, x, y):
    return b(c.local_chunk, b(c.all_reduce, y, "dp", "max"), "dp", 1)


def reshapes(b, x, y):
    one = b(aten.view.default, y, [24])
    return b(aten.reshape.default, b(aten.view.default, one, [2, 12]), [4, 6])


def permutes(b, x, y):
    return b(aten.permute.default, b(aten.permute.default, y, [1, 0]), [-1, 0])


def copies(b, x, y):
    one = b(aten.clone.default, y, memory_format=torch.contiguous_format)
    two = b(aten.clone.default, b(aten.contiguous.default, one))
    return b(aten.neg.default, two)


def contiguous_as_it_is(b, x, y):
    whole = b(aten.view.default, b(c.all_gather, y, "dp", 1), [48])
    return b(aten.neg.default, b(aten.contiguous.default, whole))


def nothing_moved(b, x, y):
    y = b(aten.slice.Tensor, b(aten.expand.default, y, [4, 6]), 1, 0, 9223372036854775807)
    return b(aten.neg.default, b(aten._to_copy.default, y, dtype=torch.float64))


def alone(b, x, y):
    return b(c.all_reduce, b(c.all_gather, y, "one", 1), "one", "sum")


def same_twice(b, x, y):
    return b(aten.add.Tensor, b(c.all_gather, y, "dp", 0), b(c.all_gather, y, "dp", 0))


def dead(b, x, y):
    b(c.all_reduce, b(aten.neg.default, x), "dp", "sum")
    return b(aten.neg.default, y)


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (gather_of_chunk, []),
        (chunk_of_gather, []),
        (exchange_and_back, []),
        (reduce_then_chunk, ["reduce_scatter"]),
        (reshapes, []),
        (permutes, []),
        (copies, ["clone", "neg"]),
        (contiguous_as_it_is, ["all_gather", "view", "neg"]),
        (nothing_moved, ["neg"]),
        (alone, []),
        (same_twice, ["all_gather", "add"]),
        (dead, ["neg"]),
    ],
)
def test_cancel_drops(make, left):
    b = Build("dp=2,one=1")
    gm = b.done([make(b, b.put("x0", 4, 6, same=True), b.put("x1", 4, 6))])
    assert ops(apply(b, gm, cancel)) == left


def other_dim(b, x, y):
    return b(c.all_gather, b(c.local_chunk, x, "dp", 1), "dp", 0)


def other_axis(b, x, y):
    return b(c.all_gather, b(c.local_chunk, x, "tp", 1), "dp", 1)


def exchange_twice(b, x, y):
    return b(c.all_to_all, b(c.all_to_all, y, "dp", 0, 1), "dp", 0, 1)


def kept_reduce(b, x, y):
    return b(c.local_chunk, b(c.all_reduce, y, "dp", "sum", marks=("keep",)), "dp", 1)


def chunk_on_another_axis(b, x, y):
    return b(c.local_chunk, b(c.all_reduce, y, "dp", "sum"), "tp", 1)


def two_readers(b, x, y):
    whole = b(c.all_reduce, y, "dp", "sum")
    return b(aten.add.Tensor, b(c.all_gather, b(c.local_chunk, whole, "dp", 1), "tp", 1), whole)


def different_numbers(b, x, y):
    return b(aten.add.Tensor, b(aten.slice.Tensor, y, 0, 0, 2), b(aten.slice.Tensor, y, 0, 2, 4))


def copy_of_unknown_strides(b, x, y):
    turned = b(aten.permute.default, y, [1, 0])
    return b(aten.neg.default, b(aten.clone.default, turned, memory_format=torch.contiguous_format))


@pytest.mark.parametrize(
    "make",
    [
        other_dim,
        other_axis,
        exchange_twice,
        kept_reduce,
        chunk_on_another_axis,
        two_readers,
        different_numbers,
        copy_of_unknown_strides,
    ],
)
def test_cancel_keeps(make):
    b = Build("dp=2,tp=2")
    gm = b.done([make(b, b.put("x0", 4, 6, same=True), b.put("x1", 4, 6))])
    assert ops(apply(b, gm, cancel)) == ops(gm)


def test_cancel_and_bucket_never_merge_a_regather_with_the_forward():
    b = Build()
    gm = zero3(b)
    out = apply(b, gm, cancel, bucket)
    gathers = [n for n in out.graph.nodes if n.target is c.all_gather]
    assert [(n.meta["phase"], n.meta.get("regather", False)) for n in gathers] == [("fwd", False), ("bwd", True)]


def test_a_duplicate_that_the_backward_reads_first_becomes_forward():
    b = Build()
    p, t = b.put("p0", 2, 2), b.put("t0", 4, 2)
    early = b(c.all_gather, p, "dp", 0, bwd=True)
    grad = b(aten.mul.Tensor, t, early)
    gm = b.done([b(aten.neg.default, b(c.all_gather, p, "dp", 0))], [grad])
    out = apply(b, gm, cancel)
    assert [n.meta["phase"] for n in out.graph.nodes if n.target is c.all_gather] == ["fwd"]


# ---- bucket --------------------------------------------------------------------------------------------------------


def many_params(b, dtypes=(torch.float64,)):
    """Weights of many shapes gathered on every dim and used; gradients reduced on every dim, or all-reduced."""
    shapes = ((4, 6), (2,), (3, 1, 4), (1, 5), (7, 3))
    weights = [b.put(f"p{i}{j}", *s, dtype=d) for j, d in enumerate(dtypes) for i, s in enumerate(shapes)]
    t = b.put("t0", 2, 2)
    outs, grads = [], []
    for w in weights:
        for dim in range(len(edit.shape(w))):
            outs.append(b(aten.neg.default, b(c.all_gather, w, "dp", dim)))
    scale = b(aten.sum.default, t)
    for w in weights:
        grad = b(
            aten.mul.Tensor, b(c.all_gather, w, "dp", 0), b(aten._to_copy.default, scale, dtype=w.meta["val"].dtype)
        )
        grads.append(b(c.reduce_scatter, grad, "dp", 0, "sum"))
        grads.append(b(aten.view.default, b(c.all_reduce, grad, "dp", "sum"), [grad.meta["val"].numel()]))
        grads.append(b(c.all_reduce, grad, "dp", "max"))
    return b.done(outs, grads)


def test_bucket_merges_by_kind_and_dtype():
    b = Build("dp=2,tp=2")
    gm = many_params(b, (torch.float64, torch.float32))
    assert sorted(set(ops(gm)) & {"all_gather", "reduce_scatter"}) == ["all_gather", "reduce_scatter"]
    out = apply(b, gm, cancel, bucket)
    left = ops(out)
    # One gather per dtype; one reduce_scatter, one sum and one max per dtype.
    assert (left.count("all_gather"), left.count("reduce_scatter"), left.count("all_reduce")) == (2, 2, 4)


@pytest.mark.parametrize("limit", [1, 300, 1000, 5000])
def test_bucket_keeps_within_its_bytes(limit):
    b = Build("dp=4")
    gm = many_params(b)
    out = apply(b, gm, partial(bucket, bucket_bytes=limit))
    sizes = [edit.nbytes(n) for n in out.graph.nodes if n.target is c.all_gather]
    alone = max(edit.nbytes(n) for n in gm.graph.nodes if n.target is c.all_gather)
    assert max(sizes) <= max(limit, alone)
    assert len(sizes) <= ops(gm).count("all_gather")
    if limit == 1:
        assert ops(out) == ops(gm)


def test_bucket_takes_gathers_in_order_of_first_use():
    b = Build()
    p = [b.put(f"p{i}", 8) for i in range(4)]
    w = [b(c.all_gather, x, "dp", 0) for x in p]
    x = b.put("x0", 16, same=True)
    for i in (2, 0, 3, 1):
        x = b(aten.mul.Tensor, x, w[i])
    out = apply(b, b.done([x]), partial(bucket, bucket_bytes=256))
    packs = [[n.args[0].name for n in cat.args[0]] for cat in out.graph.nodes if cat.target is aten.cat.default]
    assert packs == [["p2", "p0"], ["p3", "p1"]]


def test_bucket_goes_level_by_level():
    """Weights gathered on two axes, gradients reduced on two: each level is merged, none with the other."""
    b = Build("dp=2,tp=2")
    p = [b.put(f"p{i}", 2, 3) for i in range(3)]
    t = b.put("t0", 4, 6)
    w = [b(c.all_gather, b(c.all_gather, x, "dp", 0), "tp", 1) for x in p]
    y = [b(aten.neg.default, x) for x in w]
    g = [b(aten.mul.Tensor, t, x) for x in w]
    grads = [b(c.reduce_scatter, b(c.reduce_scatter, x, "dp", 0, "sum"), "tp", 1, "sum") for x in g]
    out = apply(b, b.done(y, grads), bucket)
    assert (ops(out).count("all_gather"), ops(out).count("reduce_scatter")) == (2, 2)


def test_bucket_keeps_chains_apart():
    """A weight that goes on to a second gather does not travel with those that do not: it would wait for them."""
    b = Build("dp=2,tp=2")
    p = [b.put(f"p{i}", 4, 4) for i in range(4)]
    x = b.put("x0", 8, 8)
    for i, w in enumerate(p):
        whole = b(c.all_gather, w, "dp", 0)
        if i % 2:
            whole = b(c.all_gather, whole, "tp", 1)
            x = b(aten.mm.default, x, whole)
        else:
            x = b(aten.mm.default, x, b(aten.cat.default, [whole, whole], 1))
    gm = apply(b, b.done([x]), bucket)
    sent = [n.args[0].meta["val"].numel() for n in gm.graph.nodes if n.target is c.all_gather]
    assert sorted(sent) == [2 * 16, 2 * 16, 2 * 32]  # two of one gather; two of a first, and their second


def test_a_reduction_of_the_output_is_no_neighbour_of_one_that_is_waited_for():
    b = Build("dp=2,tp=2")
    x, t = b.put("x0", 4, 4), b.put("t0", 4, 4)
    h, k = b(aten.mm.default, x, t), b(aten.neg.default, t)
    first = b(c.all_reduce, b(c.reduce_scatter, h, "dp", 0, "sum"), "tp", "sum")
    waited = b(c.all_reduce, k, "tp", "sum")
    second = b(c.reduce_scatter, b(aten.mm.default, x, waited), "dp", 0, "sum")
    # The scatters share a bucket; were the all_reduces one too, each would wait for the other.
    out = apply(b, b.done([], [first, b(c.all_gather, second, "tp", 0)]), bucket)
    assert sorted(n for n in ops(out) if n in ("all_reduce", "reduce_scatter")) == ["all_reduce"] * 2 + [
        "reduce_scatter"
    ]


def test_nodes_that_wait_for_each_other_are_an_error():
    b = Build("dp=2")
    x = b.put("x0", 4, 4)
    one = b(aten.neg.default, x)
    two = b(aten.neg.default, one)
    gm = b.done([], [two])
    one.args = (two,)
    with pytest.raises(PassError, match="wait for each other"):
        edit.stable_sort(gm)


def test_bucket_leaves_what_computation_reads():
    b = Build()
    x, p = b.put("x0", 4), b.put("p0", 4)
    h = b(aten.neg.default, x)
    left, right = b(c.all_reduce, h, "dp", "sum"), b(c.all_reduce, b(aten.exp.default, p), "dp", "sum")
    moved = b(c.all_gather, h, "dp", 0), b(c.all_gather, b(aten.exp.default, h), "dp", 0)
    gm = b.done([b(aten.add.Tensor, left, right), b(aten.add.Tensor, *moved)])
    assert ops(apply(b, gm, bucket)) == ops(gm)


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs(seed):
    b, gm = random_joint(seed, MESHES[seed % 3])
    for limit in (400, 25 << 20):
        apply(b, gm, cancel, partial(bucket, bucket_bytes=limit), cancel)


# ---- overlap -------------------------------------------------------------------------------------------------------


def ordered(b, gm, **options):
    bound = bind(gm, b.mesh, b.mesh.coordinates(0), {name: name for name in b.mesh.names})
    out = overlap(bound, **options)
    verify(out, deep=True)
    assert sorted(ops(out)) == sorted(ops(bound))
    return list(out.graph.nodes)


def layers(b, num=4, width=8):
    """Layers whose weights are gathered just before their use and again in the backward; gradients reduced."""
    p = [b.put(f"p{i}", width // 2, width) for i in range(num)]
    h, t = b.put("x0", width, width), b.put("t0", width, width)
    kept = []
    for w in p:
        kept.append(h)
        h = b(aten.mm.default, h, b(c.all_gather, w, "dp", 0))
    g, grads = t, []
    for w, before in zip(reversed(p), reversed(kept)):
        again = b(c.all_gather, w, "dp", 0, bwd=True, marks=("regather",))
        gw = b(aten.mm.default, b(aten.permute.default, before, [1, 0]), g)
        grads.append(b(aten.div.Scalar, b(c.reduce_scatter, gw, "dp", 0, "sum"), 2.0))
        g = b(aten.mm.default, g, b(aten.permute.default, again, [1, 0]))
    return b.done([h], grads)


def in_flight(nodes):
    """Largest number of bytes of gathers that have been started and not waited for."""
    now = most = 0
    for n in nodes:
        if n.target is functional.all_gather_into_tensor.default:
            now += edit.nbytes(n)
            most = max(most, now)
        elif n.target is WAIT and n.args[0].target is functional.all_gather_into_tensor.default:
            now -= edit.nbytes(n)
    return most


@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
def test_overlap_gathers_ahead_within_its_bytes(ahead):
    b = Build()
    one = 8 * 8 * 8
    nodes = ordered(b, layers(b), ahead_bytes=ahead * one)
    assert in_flight(nodes) == max(ahead, 2) * one  # one to be used, and one to come


def test_overlap_starts_early_and_waits_late():
    b = Build()
    nodes = ordered(b, layers(b, 3), ahead_bytes=8 * 8 * 8 * 2)
    short = {functional.all_gather_into_tensor.default: "gather", functional.reduce_scatter_tensor.default: "reduce"}
    short |= {WAIT: "wait", aten.mm.default: "mm"}
    text = [short[n.target] for n in nodes if n.target in short]
    forward = ["gather", "gather", "wait", "mm", "gather", "wait", "mm", "wait", "mm"]
    # The first layer's weight is not needed again: nobody asks for the gradient of the input.
    backward = ["gather", "gather", "mm", "reduce", "wait", "mm", "mm", "reduce", "wait", "mm", "mm", "reduce"]
    backward += ["wait", "wait", "wait"]
    assert text == forward + backward


def test_overlap_cuts_a_saved_piece_as_soon_as_the_whole_is_there():
    b = Build()
    x, p = b.put("x0", 4, 8), b.put("p0", 8, 8)
    whole = b(c.all_gather, x, "dp", 0)
    h = b(aten.mm.default, whole, p)
    for _ in range(3):
        h = b(aten.mm.default, h, p)
    piece = b(c.local_chunk, whole, "dp", 1)
    nodes = ordered(b, b.done([h, piece]))
    at = {n.target: i for i, n in reversed(list(enumerate(nodes)))}
    assert at[WAIT] < at[aten.slice.Tensor] < at[aten.clone.default] < at[aten.mm.default]


def test_overlap_waits_for_old_reductions_when_many_are_pending():
    b = Build()
    nodes = ordered(b, layers(b, 4), pending_bytes=8 * 8 * 8)
    pending = 0
    for n in nodes:
        if n.target is functional.reduce_scatter_tensor.default:
            pending += 1
            assert pending <= 2
        elif n.target is WAIT and n.args[0].target is functional.reduce_scatter_tensor.default:
            pending -= 1


def test_overlap_gives_a_second_gather_time():
    """A weight gathered on two axes: the second gather starts after a computation, not right behind the first."""
    b = Build("dp=2,tp=2")
    p, x = b.put("p0", 4, 4), b.put("x0", 8, 8)
    w = b(c.all_gather, b(c.all_gather, p, "dp", 0), "tp", 1)
    h = b(aten.mm.default, x, x)
    h = b(aten.mm.default, h, x)
    nodes = ordered(b, b.done([b(aten.mm.default, h, w)]))
    text = [n.target for n in nodes if n.target in (*STARTS, WAIT, aten.mm.default)]
    start = functional.all_gather_into_tensor.default
    assert text == [start, aten.mm.default, WAIT, start, aten.mm.default, WAIT, aten.mm.default]


def chain(b, n=6):
    """Gradients that are reduced over two axes, one after the other, each between computations."""
    x = b.put("t0", 8, 8)
    grads = []
    for _ in range(n):
        x = b(aten.mm.default, x, x)
        grads.append(b(c.reduce_scatter, b(c.reduce_scatter, x, "dp", 0, "sum"), "tp", 1, "sum"))
    return b.done([b(aten.exp.default, b.put("x0", 4))], grads)


def test_overlap_starts_a_second_reduction_when_the_next_first_one_does():
    """Sooner, computation would wait for the first to end."""
    b = Build("dp=2,tp=2")
    nodes = [n for n in ordered(b, chain(b)) if n.target in (*STARTS, aten.mm.default)]
    text = ["mm" if n.target is aten.mm.default else n.args[-1] for n in nodes]
    assert text[:8] == ["mm", "dp", "mm", "dp", "tp", "mm", "dp", "tp"]
    assert text.count("dp") == text.count("tp") == 6


def test_overlap_starts_a_second_gather_half_way_to_its_use():
    b = Build("dp=2,tp=2")
    p, h = b.put("p0", 4, 4), b.put("x0", 8, 8)
    w = b(c.all_gather, b(c.all_gather, p, "dp", 0), "tp", 1)
    for _ in range(8):
        h = b(aten.mm.default, h, h)
    nodes = ordered(b, b.done([b(aten.mm.default, h, w)]))
    text = [n.target for n in nodes if n.target in (*STARTS, aten.mm.default)]
    start = functional.all_gather_into_tensor.default
    assert [i for i, t in enumerate(text) if t is start] == [0, 5]


def test_overlap_puts_the_forward_first():
    b = Build()
    x, t = b.put("x0", 4), b.put("t0", 4)
    grad = b(c.all_reduce, b(aten.neg.default, t), "dp", "sum")
    gm = b.done([b(aten.exp.default, x)], [grad])
    phases = [n.meta["phase"] for n in ordered(b, gm) if n.op == "call_function"]
    assert phases == sorted(phases, reverse=True)


@pytest.mark.parametrize("seed", range(8))
def test_overlap_keeps_the_computation_in_order(seed):
    b, gm = random_joint(seed, "a=2,b=2")
    still = [n.name for n in gm.graph.nodes if n.target in (aten.add.Tensor, aten.sum.dim_IntList) and n.users]
    now = {n.name: i for i, n in enumerate(ordered(b, gm))}
    still = [n for n in still if n in now]
    assert [now[n] for n in still] == sorted(now[n] for n in still)
