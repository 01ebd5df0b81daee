"""Every way from one spec to another gives the right pieces on every rank: meshes of one, two and three axes."""

import itertools
import random

import pytest
import torch
from torch import fx

from autopar.errors import SpecError
from autopar.mesh import Mesh
from autopar.passes import lockstep
from autopar.passes.redistribute import redistribute
from autopar.reshard import steps
from autopar.spec import P, R, S, is_valid, shard, unshard


def places(shape):
    out = [R]
    for dim, n in enumerate(shape):
        out += [S(dim, o) for o in (1, 2, 3, 4, 6) if n % o == 0]
    return out


def specs(shape, sizes, partial):
    options = places(shape) + ([P()] if partial else [])
    return [s for s in itertools.product(options, repeat=len(sizes)) if is_valid(shape, s, sizes)]


def pieces(x, spec, sizes, mesh):
    out = [shard(x, spec, sizes, mesh.coordinates(r)) for r in range(mesh.num_devices)]
    if any(p.kind == "P" for p in spec):  # a real decomposition instead of (value, zero)
        noise = [torch.randn_like(p) for p in out]
        for axis, place in enumerate(spec):
            if place.kind == "P":
                for group in mesh.groups(axis):
                    shift = noise[group[0]]
                    out[group[0]] = out[group[0]] + shift
                    out[group[-1]] = out[group[-1]] - shift
    return out


def check(x, src, dst, mesh):
    graph = fx.Graph()
    node = graph.placeholder("x")
    local = pieces(x, src, mesh.sizes, mesh)
    node.meta["val"] = torch.empty(local[0].shape, dtype=x.dtype, device="meta")
    node.meta["phase"] = "fwd"
    graph.output((redistribute(graph, node, x.shape, src, dst, mesh),))
    got = [row[0] for row in lockstep.run(fx.GraphModule({}, graph), mesh, [[p] for p in local])]
    if any(p.kind == "P" for p in dst):
        torch.testing.assert_close(unshard(got, x.shape, dst, mesh.sizes), x, rtol=1e-12, atol=1e-12)
        return
    for r, piece in enumerate(got):
        torch.testing.assert_close(piece, shard(x, dst, mesh.sizes, mesh.coordinates(r)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mesh", ["a=2", "a=3", "a=2,b=2", "a=2,b=3", "a=1,b=2"])
def test_all_pairs(mesh):
    mesh = Mesh.parse(mesh)
    torch.manual_seed(0)
    x = torch.randn(12, 6, dtype=torch.float64)
    rng = random.Random(0)
    pairs = [(s, d) for s in specs(x.shape, mesh.sizes, True) for d in specs(x.shape, mesh.sizes, False)]
    for src, dst in rng.sample(pairs, min(400, len(pairs))):
        check(x, src, dst, mesh)


def test_three_axes():
    mesh = Mesh.parse("a=2,b=2,c=2")
    x = torch.randn(16, 8, dtype=torch.float64)
    rng = random.Random(1)
    sources, targets = specs(x.shape, mesh.sizes, True), specs(x.shape, mesh.sizes, False)
    for _ in range(150):
        check(x, rng.choice(sources), rng.choice(targets), mesh)


def kinds(shape, src, dst, sizes):
    return [s.kind for s in steps(shape, src, dst, sizes)]


def test_the_expected_collective_is_chosen():
    assert kinds((8, 8), (P(),), (R,), (2,)) == ["all_reduce"]
    assert kinds((8, 8), (P(),), (S(1),), (2,)) == ["reduce_scatter"]
    assert kinds((8, 8), (S(0),), (S(1),), (2,)) == ["all_to_all"]
    assert kinds((8, 8), (S(0),), (S(0, 2),), (2,)) == ["all_gather", "local_chunk"]
    assert kinds((8, 8), (R,), (S(0),), (2,)) == ["local_chunk"]
    assert kinds((8, 8), (S(0), R), (R, S(0)), (2, 2)) == ["all_gather", "local_chunk"]
    assert kinds((8, 8), (P(), R), (P(), S(0)), (2, 2)) == ["local_chunk"]
    # dp outside tp on one dim: freeing dp leaves tp strided, so both close and tp opens again
    assert kinds((8,), (S(0), S(0)), (R, S(0)), (2, 2)) == ["all_gather", "all_gather", "local_chunk"]
    # tp outside dp (a strided dp shard): freeing dp is one gather
    assert kinds((8,), (S(0, 2), S(0)), (R, S(0)), (2, 2)) == ["all_gather"]
    assert kinds((8,), (S(0, 2), S(0)), (S(0, 2), S(0)), (2, 2)) == []


def test_large_sums_over_several_axes_go_in_levels():
    big, small = (512, 256), (8, 8)
    assert kinds(big, (P(), P()), (R, R), (2, 4)) == ["reduce_scatter", "all_reduce", "all_gather"]
    assert kinds(small, (P(), P()), (R, R), (2, 4)) == ["all_reduce", "all_reduce"]
    three = steps((512, 512), (P(), P(), P()), (R, R, R), (2, 2, 4))
    assert [(s.kind, s.axis) for s in three] == [
        ("reduce_scatter", 2), ("reduce_scatter", 1), ("all_reduce", 0), ("all_gather", 1), ("all_gather", 2)
    ]  # fmt: skip
    slow = next(s for s in three if s.kind == "all_reduce")
    assert slow.before == (512 // 8, 512)
    assert kinds((65537, 3), (P(), P()), (R, R), (2, 4)) == ["all_reduce", "all_reduce"]  # no dim divides


def test_of_several_axes_the_outer_one_carries_the_piece():
    reduce = steps((8, 8), (P(), P()), (S(0), S(0)), (2, 2))
    assert [(s.kind, s.axis) for s in reduce] == [("reduce_scatter", 1), ("reduce_scatter", 0)]
    gather = steps((8, 8), (S(0), S(0)), (R, R), (2, 2))
    assert [(s.kind, s.axis) for s in gather] == [("all_gather", 0), ("all_gather", 1)]


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("mesh", ["a=2,b=2", "a=2,b=2,c=2"])
def test_levels_give_the_same_pieces(mesh, reduce):
    mesh = Mesh.parse(mesh)
    torch.manual_seed(0)
    x = torch.randn(256, 512, dtype=torch.float64)
    whole = (R,) * len(mesh.sizes)
    if reduce == "sum":
        check(x, (P(),) * len(mesh.sizes), whole, mesh)
        check(x, (*(P() for _ in mesh.sizes[1:]), S(1)), whole, mesh)
        check(x, (S(0), *(P() for _ in mesh.sizes[1:])), whole, mesh)
    else:
        assert {s.reduce for s in steps((256, 512), (P("max"),) * len(mesh.sizes), whole, mesh.sizes)} == {"max", ""}


def test_the_same_layout_under_two_names_moves_nothing():
    assert kinds((8,), (S(0), S(0)), (S(0), S(0, 2)), (2, 2)) == []


def test_nothing_becomes_partial():
    with pytest.raises(SpecError, match="would have to make a partial value"):
        steps((4,), (R,), (P(),), (2,))
