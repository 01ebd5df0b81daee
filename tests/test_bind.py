"""bind and overlap on real processes: every collective, every dtype, against the emulated run."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from graphs import Build, assert_same, random_joint, run
from harness import Ranks

from autopar.errors import PassError
from autopar.mesh import Mesh
from autopar.passes import collectives as c
from autopar.passes import edit
from autopar.passes.bind import bind
from autopar.passes.overlap import overlap
from autopar.passes.partition import partition
from autopar.passes.verify import verify

aten = torch.ops.aten
MESHES = ("a=2,b=2", "a=4", "a=1,b=4", "a=2,b=1,c=2")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DTYPES = (*FLOATS, *INTS, torch.bool, torch.complex64)


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as group:
        yield group


def every_collective(mesh, dtype):
    """One graph with every kind of collective on every dim of a 3-d tensor, a vector and a scalar, on every axis."""
    b = Build(mesh)
    n = 4
    x, v, s = b.put("x0", n, 3, 2 * n, dtype=dtype), b.put("x1", n, dtype=dtype), b.put("x2", dtype=dtype)
    empty = b.put("x3", 0, n, dtype=dtype)
    turned = b(aten.permute.default, x, [2, 1, 0])  # not contiguous
    reduces = ("sum",) if dtype.is_complex else ("sum", "max", "min")
    outs = []
    for axis in b.mesh.names:
        for t in (x, turned, v):
            dims = range(len(edit.shape(t)))
            cuts = [d for d in dims if d != 1]
            outs += [b(c.all_gather, t, axis, d) for d in dims]
            outs += [b(c.local_chunk, t, axis, d) for d in cuts]
            outs += [b(c.reduce_scatter, t, axis, d, r) for d in cuts for r in reduces]
            outs += [b(c.all_to_all, t, axis, split, cat) for split in cuts for cat in dims]
        outs += [b(c.all_reduce, t, axis, r) for t in (x, turned, s) for r in reduces]
        outs += [b(c.all_gather, empty, axis, 1), b(c.all_reduce, empty, axis, "sum")]
    # A chain over several axes, and a result that is used early.
    for axis in b.mesh.names:
        v = b(c.all_gather, v, axis, 0)
    outs.append(b(aten.reshape.default, v, [-1, 2]))
    gm = b.done(outs)
    return b, gm


def index_arithmetic(mesh):
    """Coordinates, numbers made of them, and ops that take those."""
    import operator

    b = Build(mesh)
    x = b.put("x0", 4)
    place = 0
    for axis in b.mesh.names:
        here = b.graph.call_function(c.coordinate, (axis,))
        place = b.graph.call_function(operator.add, (b.graph.call_function(operator.mul, (place, 5)), here))
    node = b.graph.call_function(aten.add.Scalar, (x, place))
    node.meta.update(val=x.meta["val"], phase="fwd")
    return b, b.done([node, b(aten.neg.default, x)])


def groups_of(mesh):
    """Axis name -> name of this process's group."""
    names = {}
    for axis, name in enumerate(mesh.names):
        for members in mesh.groups(axis):
            group = dist.new_group(members)
            if dist.get_rank() in members and len(members) > 1:
                names[name] = group.group_name
    return names


def on_rank(cases):
    """Bound, ordered and run: the outputs of this rank for every (maker, its arguments)."""
    found, rank, groups = [], dist.get_rank(), {}
    for maker, args in cases:
        b, gm = maker(*args)
        if str(b.mesh) not in groups:
            groups[str(b.mesh)] = groups_of(b.mesh)
        bound = bind(gm, b.mesh, b.mesh.coordinates(rank), groups[str(b.mesh)])
        verify(bound)
        late = overlap(bound)
        verify(late)
        row = b.inputs(gm)[rank]
        with torch.no_grad():
            found.append((bound(*row), late(*row)))
    return found


def compare(ranks, cases):
    results = ranks.run(on_rank, cases)
    for i, (maker, args) in enumerate(cases):
        b, gm = maker(*args)
        want = run(gm, b.mesh, b.inputs(gm))
        for which in (0, 1):
            assert_same(want, [row[i][which] for row in results])


@pytest.mark.parametrize("mesh", MESHES)
def test_every_collective(ranks, mesh):
    compare(ranks, [(every_collective, (mesh, dtype)) for dtype in (DTYPES if mesh == "a=2,b=2" else DTYPES[:1])])


def test_index_arithmetic(ranks):
    compare(ranks, [(index_arithmetic, (mesh,)) for mesh in MESHES])


def test_random_graphs(ranks):
    compare(ranks, [(random_joint, (seed, MESHES[seed % 4], 20)) for seed in range(12)])


def two_halves(seed, mesh):
    """Forward and backward cut, bound, ordered and run apart."""
    b, gm = random_joint(seed, mesh, 20)
    parts = partition(gm, b.sources, b.sinks)
    names, rank = groups_of(b.mesh), dist.get_rank()
    forward, backward = (
        overlap(bind(half, b.mesh, b.mesh.coordinates(rank), names)) for half in (parts.forward, parts.backward)
    )
    row = b.inputs(gm)[rank]
    given = [v for v, s in zip(row, b.sources) if s.kind != "tangent"]
    tangents = [v for v, s in zip(row, b.sources) if s.kind == "tangent"]
    out = forward(*given)
    kept = [*(given[i] for i in parts.saved_inputs), *out[parts.num_outputs :]]
    return (*out[: parts.num_outputs], *backward(*kept, *tangents))


@pytest.mark.parametrize("seed", range(3))
def test_two_halves(ranks, seed):
    found = ranks.run(two_halves, seed, "a=2,b=2")
    b, gm = random_joint(seed, "a=2,b=2", 20)
    assert_same(run(gm, b.mesh, b.inputs(gm)), found)


# ---- without processes ---------------------------------------------------------------------------------------------


def test_every_rank_gets_the_same_order():
    for maker, args in ((every_collective, ("a=2,b=2", torch.float64)), (random_joint, (3, "a=2,b=2"))):
        b, gm = maker(*args)
        texts = set()
        for rank in range(4):
            out = overlap(bind(gm, b.mesh, b.mesh.coordinates(rank), {"a": "A", "b": "B"}))
            texts.add(tuple(f"{n.name} {n.target}" for n in out.graph.nodes))
        assert len(texts) == 1


def test_mesh_of_one_needs_no_group():
    b, gm = every_collective("a=1,b=1", torch.float64)
    row = b.inputs(gm)[0]
    bound = bind(gm, b.mesh, (0, 0), {})
    assert not any("c10d" in str(n.target) for n in bound.graph.nodes)
    assert_same(run(gm, b.mesh, [row]), [bound(*row)])


@pytest.mark.parametrize(
    ("coordinates", "names", "message"),
    [
        ((0,), {"a": "A"}, r"coordinates \(0,\) are not on mesh a=2,b=2"),
        ((0, 2), {"a": "A"}, r"coordinates \(0, 2\) are not on mesh a=2,b=2"),
        ((0, 0), {"a": "A"}, "communicates on axis b; process groups are given for: a"),
    ],
)
def test_bind_refuses(coordinates, names, message):
    b, gm = every_collective("a=2,b=2", torch.float64)
    with pytest.raises(PassError, match=message):
        bind(gm, b.mesh, coordinates, names)


def test_bind_refuses_another_mesh():
    _, gm = every_collective("a=2,b=2", torch.float64)
    with pytest.raises(PassError, match="says axis a has 2 parts; mesh a=4,b=2 has 4"):
        bind(gm, Mesh.parse("a=4,b=2"), (0, 0), {"a": "A", "b": "B"})


def test_bind_refuses_what_cannot_be_reduced():
    b = Build("a=2")
    x = b.put("x0", 4, dtype=torch.complex64)
    gm = b.done([b(c.all_reduce, x, "a", "max")])
    with pytest.raises(PassError, match=r"reduces torch.complex64 by max; no backend can"):
        bind(gm, b.mesh, (0,), {"a": "A"})


def test_bind_keeps_its_argument():
    b, gm = every_collective("a=2,b=2", torch.float64)
    before = str(gm.graph)
    bind(gm, b.mesh, (1, 0), {"a": "A", "b": "B"})
    assert str(gm.graph) == before
