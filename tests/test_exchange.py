"""What small and reduced tensors travel in: exchanges on gloo, shared buckets, and the checksums of the handshake."""

from __future__ import annotations

import pytest
import torch
from graphs import Build, apply, assert_same, ops, run
from harness import Ranks
from test_bind import every_collective, groups_of

from autopar import passes
from autopar.passes import collectives as c
from autopar.passes import edit
from autopar.passes.bind import IN_PLACE_REDUCE, bind, functional
from autopar.passes.bucket import SMALL_BYTES, bucket
from autopar.passes.exchange import exchange
from autopar.reshard import SMALL_EXCHANGE
from autopar.runtime.handshake import SHORT, WORDS, checksum

aten = torch.ops.aten
FLOATS = (torch.float64, torch.float32, torch.bfloat16)
REDUCES = ("sum", "max", "min")
LEAVES = (functional.reduce_scatter_tensor.default, functional.all_reduce.default, IN_PLACE_REDUCE)


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as group:
        yield group


def values(gm, rank):
    """Placeholders of one rank, of which a sum is rounded; integers that overflow."""
    made = torch.Generator().manual_seed(7 + rank)
    row = []
    for node in edit.placeholders(gm):
        val = node.meta["val"]
        if val.dtype.is_floating_point:
            row.append(torch.randn(val.shape, generator=made).to(val.dtype))
        else:
            row.append(torch.randint(-(2**31), 2**31, val.shape, generator=made).to(val.dtype))
    return row


def reduced(rows, reduce):
    """The tensors of all ranks reduced in their order; half precision in float32."""
    if reduce != "sum":
        return torch.stack(rows).amax(0) if reduce == "max" else torch.stack(rows).amin(0)
    wide = torch.float32 if rows[0].dtype is torch.bfloat16 else rows[0].dtype
    total = rows[0].to(wide)
    for row in rows[1:]:
        total = total + row.to(wide)
    return total.to(rows[0].dtype)


def scatters(dtype):
    """Every reduction, scattered on both dims of a matrix, and of what was computed from one."""
    b = Build("a=4")
    x = b.put("x0", 8, 12, dtype=dtype)
    y = b(aten.neg.default, x)
    return b, b.done([b(c.reduce_scatter, t, "a", d, how) for t in (x, y) for d in (0, 1) for how in REDUCES])


def small_and_large(dtype):
    """All_reduces of a scalar, of the largest tensor that is exchanged, and of the smallest that is not."""
    b = Build("a=4")
    limit = SMALL_EXCHANGE // 4 // dtype.itemsize
    inputs = [b.put("x0", dtype=dtype), b.put("x1", limit, dtype=dtype), b.put("x2", limit + 1, dtype=dtype)]
    return b, b.done([b(c.all_reduce, b(aten.neg.default, x), "a", how) for how in REDUCES for x in inputs])


def on_rank(maker, args, integers=False):
    """Results as bound, with exchanges, and finished for a run op by op; and the ops of the last two."""
    b, gm = maker(*args)
    rank = torch.distributed.get_rank()
    here, names = b.mesh.coordinates(rank), groups_of(b.mesh)
    plain = bind(gm, b.mesh, here, names)
    exchanged = exchange(bind(gm, b.mesh, here, names), b.mesh, names)
    eager, _ = passes.finish(gm, b.mesh, here, names, "test", eager=True)
    row = b.inputs(gm)[rank] if integers else values(gm, rank)
    with torch.no_grad():
        results = [half(*(t.clone() for t in row)) for half in (plain, exchanged, eager)]
    return results, [[str(n.target) for n in half.graph.nodes] for half in (exchanged, eager)]


def left(texts):
    """How many of the ops are reductions of the backend's, and how many are exchanges."""
    return sum(texts.count(str(t)) for t in LEAVES), texts.count(str(functional.all_to_all_single.default))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32])
def test_a_reduce_scatter_is_an_exchange_with_the_same_result(ranks, dtype):
    _, gm = scatters(dtype)
    rows = [values(gm, rank)[0] for rank in range(4)]
    for rank, ((plain, *ours), texts) in enumerate(ranks.run(on_rank, scatters, (dtype,))):
        assert [left(text) for text in texts] == [(0, 12), (0, 12)]
        wants = []
        for given in (rows, [-row for row in rows]):
            wants += [reduced(given, how).chunk(4, dim)[rank] for dim in (0, 1) for how in REDUCES]
        for got in ours:
            assert_same([got], [wants])
        exact = [i for i in range(12) if REDUCES[i % 3] != "sum" or not dtype.is_floating_point]
        assert_same([[plain[i] for i in exact]], [[wants[i] for i in exact]])
        for got, want in zip(plain, wants):
            torch.testing.assert_close(got, want, rtol=0.05 if dtype is torch.bfloat16 else 1e-5, atol=0.05)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32])
def test_small_all_reduces_are_exchanges_alike_on_all_ranks_and_large_ones_are_not(ranks, dtype):
    _, gm = small_and_large(dtype)
    rows = [values(gm, rank) for rank in range(4)]
    wants = [reduced([-row[i] for row in rows], how) for how in REDUCES for i in range(3)]
    results = ranks.run(on_rank, small_and_large, (dtype,))
    for (_, *ours), texts in results:
        assert [left(text) for text in texts] == [(3, 6), (3, 6)]
        for got in ours:
            small = [i for i in range(9) if i % 3 != 2]
            assert_same([[got[i] for i in small]], [[wants[i] for i in small]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bool, torch.int16])
def test_every_collective_is_the_same_with_exchanges(ranks, dtype):
    b, gm = every_collective("a=2,b=2", dtype)
    want = run(gm, b.mesh, b.inputs(gm))
    found = ranks.run(on_rank, every_collective, ("a=2,b=2", dtype), True)
    for which in (1, 2):
        assert_same(want, [results[which] for results, _ in found])


# ---- buckets -------------------------------------------------------------------------------------------------------


def two(b, size=4, between="nothing", reduces=("sum", "sum"), axes=("dp", "dp")):
    """Two all_reduces whose results are computed with, and what is done between them."""
    x, y = b(aten.neg.default, b.put("x0", size)), b(aten.abs.default, b.put("x1", size))
    first = b(c.all_reduce, x, axes[0], reduces[0])
    if between == "a move":
        y = b(aten.reshape.default, b(aten.view.default, y, [2, size // 2]), [size])
    elif between == "computation":
        y = b(aten.exp.default, y)
    elif between == "its result":
        y = b(aten.view.default, b(aten.view.default, first, [2, size // 2]), [size])
    second = b(c.all_reduce, y, axes[1], reduces[1])
    return b.done([b(aten.sub.Tensor, first, second)])


@pytest.mark.parametrize("options", [{}, {"between": "a move"}, {"size": SMALL_BYTES // 16}], ids=str)
def test_two_small_all_reduces_with_nothing_computed_between_become_one(options):
    b = Build("dp=2,tp=2")
    assert ops(apply(b, two(b, **options), bucket)).count("all_reduce") == 1


@pytest.mark.parametrize(
    "options",
    [
        {"between": "computation"},
        {"between": "its result"},
        {"size": SMALL_BYTES // 16 + 1},
        {"reduces": ("sum", "max")},
        {"axes": ("dp", "tp")},
    ],
    ids=str,
)
def test_other_all_reduces_whose_results_are_waited_for_stay_two(options):
    b = Build("dp=2,tp=2")
    gm = two(b, **options)
    assert ops(apply(b, gm, bucket)) == ops(gm)


def test_gradients_that_are_gathered_behind_their_reduction_share_a_bucket():
    b = Build("dp=2,tp=2")
    t = b.put("t0", 8, 8)
    gathered, whole = [], []
    for i in range(6):
        t = b(aten.clamp.default, b(aten.mm.default, t, t), -3, 3)
        total = b(c.all_reduce, t, "dp", "sum")
        if i % 2:
            whole.append(total)
        else:
            gathered.append(b(c.all_gather, total, "tp", 0))
    out = apply(b, b.done([b(aten.neg.default, b.put("x0", 2))], [*gathered, *whole]), bucket)
    # One bucket of those that go on to a gather, and one of those that are done.
    assert [edit.nbytes(n) for n in out.graph.nodes if n.target is c.all_reduce] == [3 * 64 * 8] * 2


# ---- checksums of the handshake ------------------------------------------------------------------------------------

SIZES = (5, 4095, SHORT, SHORT + 1, SHORT + 3 * WORDS + 17)


def data(dtype, words):
    """So many words; of bytes one more, which no word holds."""
    made = torch.Generator().manual_seed(words)
    if dtype is torch.uint8:
        return torch.randint(0, 256, (words | 1,), dtype=dtype, generator=made)
    return torch.randn(words, generator=made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("words", SIZES)
def test_a_checksum_sees_changed_moved_and_swapped_elements(words, dtype):
    x = data(dtype, words)
    found = {checksum(x)}
    count = 1
    for at in {0, 1, words // 2, words - 1}:
        y = x.clone()
        y[at] += 1
        found.add(checksum(y))
        count += 1
    for by in (1, 2, -1):
        found.add(checksum(x.roll(by)))
        count += 1
    # In one row of the matrix, in one column of it, and across.
    for i, j in ((0, 1), (1, 1 + WORDS), (3, words - 1)):
        if j < words and x[i] != x[j]:
            y = x.clone()
            y[i], y[j] = x[j], x[i]
            found.add(checksum(y))
            count += 1
    assert len(found) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("rows", [7, 1024])
def test_equal_tensors_of_other_strides_have_one_checksum(rows, dtype):
    x = (torch.arange(rows * 133) % 251).to(dtype).reshape(rows, 133)
    turned = x.t().contiguous().t()
    assert not turned.is_contiguous() and checksum(turned) == checksum(x)
    assert checksum(torch.cat([x, x], 1)[:, :133]) == checksum(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [8, 2 * SHORT, 8 * SHORT])
def test_equal_tensors_have_one_checksum_wherever_they_lie(size, dtype):
    x = (torch.arange(size) % 251).to(dtype)
    for start in (1, 2, 4):
        piece = torch.cat([x.new_zeros(start), x])[start:]
        assert piece.storage_offset() == start and checksum(piece) == checksum(x), f"behind {start} elements"
