"""Small local joint graphs made by hand or at random, and how to run them on every rank of a mesh."""

from __future__ import annotations

import random

import torch
from torch import fx

from autopar.graph import Sink, Source
from autopar.mesh import Mesh
from autopar.passes import collectives as c
from autopar.passes import edit, lockstep
from autopar.passes.runner import run as run_passes

aten = torch.ops.aten
MAKE = {"p": ("param", "fwd"), "x": ("input", "fwd"), "t": ("tangent", "bwd")}


class Build:
    """Writes a local graph: `b.put("p0", 4, 6)`, `b(aten.mm.default, x, w)`, `b.done(outputs, grads)`."""

    def __init__(self, mesh: str = "dp=2"):
        self.mesh, self.graph, self.sources, self.same = Mesh.parse(mesh), fx.Graph(), [], {}

    def put(self, name, *shape, dtype=torch.float64, same=False):
        """A placeholder: p* a parameter, x* an input, t* a tangent. `same`: equal on every rank."""
        kind, phase = MAKE[name[0]]
        node = self.graph.placeholder(name)
        node.meta.update(val=torch.empty(shape, dtype=dtype, device="meta"), phase=phase)
        self.sources.append(Source(kind, name, name, trainable=kind == "param"))
        self.same[name] = same
        return node

    def __call__(self, target, *args, bwd=False, like=None, marks=(), **kwargs):
        nodes = [a for a in args if isinstance(a, fx.Node)]
        if args and isinstance(args[0], (list, tuple)):
            nodes += [a for a in args[0] if isinstance(a, fx.Node)]
        if target in c.COLLECTIVES or target is c.local_chunk:
            args = (args[0], args[1], self.mesh.sizes[self.mesh.axis(args[1])], *args[2:])
        node = edit.call(self.graph, target, *args, like=like or nodes[0], **kwargs)
        late = bwd or any(n.meta["phase"] == "bwd" for n in node.all_input_nodes)
        for key in ("regather", "keep"):
            node.meta.pop(key, None)
        node.meta.update(phase="bwd" if late else "fwd", **dict.fromkeys(marks, True))
        return node

    def done(self, outputs, grads=()):
        """The module; `self.sinks` has what partition asks for."""
        self.graph.output((*outputs, *grads))
        self.sinks = [Sink("output", f"o{i}", str(n)) for i, n in enumerate(outputs)]
        self.sinks += [Sink("grad", f"g{i}", str(n)) for i, n in enumerate(grads)]
        return fx.GraphModule({}, self.graph)

    def inputs(self, gm, seed=0):
        """Random placeholders of every rank: integers, so that sums are exact in any order."""
        rows = []
        for rank in range(self.mesh.num_devices):
            row = []
            for i, node in enumerate(edit.placeholders(gm)):
                made = torch.Generator().manual_seed(
                    1000 * seed + 10 * i + (0 if self.same.get(node.target) else rank + 1)
                )
                val = node.meta["val"]
                data = torch.randint(-3, 4, val.shape, generator=made)
                row.append((data > 0) if val.dtype is torch.bool else data.to(val.dtype))
            rows.append(row)
        return rows


def run(gm, mesh, rows):
    """Outputs of every rank, by emulated collectives."""
    return lockstep.run(gm, mesh, rows)


def assert_same(a, b):
    """Bit for bit, every output of every rank."""
    assert len(a) == len(b)
    for rank, (left, right) in enumerate(zip(a, b)):
        assert len(left) == len(right)
        for i, (x, y) in enumerate(zip(left, right)):
            if isinstance(x, torch.Tensor):
                assert x.shape == y.shape and x.dtype == y.dtype, f"rank {rank} output {i}: {x.shape} and {y.shape}"
                assert torch.equal(x, y), f"rank {rank} output {i} differs by {(x != y).sum()} elements"
            else:
                assert x == y


def apply(b, gm, *passes):
    """Run passes with all checks, compare every rank's outputs with those of the graph as it was; the new graph."""
    rows = b.inputs(gm)
    out, _ = run_passes(gm, passes, mesh=b.mesh, deep=True, dump="")
    assert_same(run(gm, b.mesh, rows), run(out, b.mesh, rows))
    return out


def ops(gm):
    return [n.target.__name__.split(".")[0] for n in gm.graph.nodes if n.op == "call_function"]


def zero3(b):
    """A layer whose weight is gathered for the forward and again for the backward."""
    p, x, t = b.put("p0", 2, 6), b.put("x0", 3, 4), b.put("t0", 3, 6)
    w = b(c.all_gather, p, "dp", 0)
    y = b(aten.mm.default, x, w)
    again = b(c.all_gather, p, "dp", 0, bwd=True, marks=("regather",))
    gx = b(aten.mm.default, t, b(aten.permute.default, again, [1, 0]))
    gw = b(c.reduce_scatter, b(aten.mm.default, b(aten.permute.default, x, [1, 0]), t), "dp", 0, "sum")
    return b.done([y], [gw, gx])


def random_joint(seed, mesh="a=2,b=2", size=30):
    """A random legal joint graph of moves, collectives and arithmetic; (Build, module)."""
    rng, b = random.Random(seed), Build(mesh)
    whole = frozenset(b.mesh.names)  # axes on which a value is equal on all ranks
    pool: list[tuple[fx.Node, frozenset[str]]] = []

    def shape():
        return [rng.choice((1, 2, 3, 4, 8)) for _ in range(rng.choice((1, 2, 2, 3)))]

    def step(bwd):
        node, same = rng.choice(pool if rng.random() < 0.4 else pool[-6:])
        dims, axis = edit.shape(node), rng.choice(b.mesh.names)
        parts = b.mesh.sizes[b.mesh.axis(axis)]
        cuts = [d for d, n in enumerate(dims) if n % parts == 0 and n >= parts]
        small = node.meta["val"].numel() < 500
        kinds = ["neg", "view", "permute", "clone", "add", "all_reduce", "sum"]
        kinds += ["all_gather"] * 2 * small * bool(dims) + ["local_chunk"] * 2 * (bool(cuts) and axis in same)
        kinds += ["reduce_scatter", "all_to_all"] * bool(cuts) + ["gather_chunk"] * 2 * (bool(cuts) and axis in same)
        kind = rng.choice(kinds)
        if kind == "neg":
            return b(aten.neg.default, node, bwd=bwd), same
        if kind == "view":
            to = rng.choice(([node.meta["val"].numel()], list(dims), [1, *dims]))
            return b(aten.reshape.default, node, to, bwd=bwd), same
        if kind == "permute":
            order = rng.sample(range(len(dims)), len(dims))
            return b(aten.permute.default, node, order, bwd=bwd), same
        if kind == "clone":
            return b(aten.clone.default, node, bwd=bwd, memory_format=torch.contiguous_format), same
        if kind == "sum":
            return (b(aten.sum.dim_IntList, node, [rng.randrange(len(dims))], bwd=bwd), same) if dims else (node, same)
        if kind == "add":
            others = [(n, s) for n, s in pool if edit.shape(n) == dims]
            other, also = rng.choice(others)
            return b(aten.add.Tensor, node, other, bwd=bwd), same & also
        if kind == "all_reduce":
            scaled = b(aten.clamp.default, node, -4, 4, bwd=bwd)
            return b(c.all_reduce, scaled, axis, rng.choice(("sum", "max", "min")), bwd=bwd), same | {axis}
        if kind == "all_gather":
            return b(c.all_gather, node, axis, rng.randrange(len(dims)), bwd=bwd), same | {axis}
        dim = rng.choice(cuts)
        if kind == "reduce_scatter":
            scaled = b(aten.clamp.default, node, -4, 4, bwd=bwd)
            return b(c.reduce_scatter, scaled, axis, dim, "sum", bwd=bwd), same - {axis}
        if kind == "all_to_all":
            return b(c.all_to_all, node, axis, dim, rng.randrange(len(dims)), bwd=bwd), same - {axis}
        cut = b(c.local_chunk, node, axis, dim, bwd=bwd)
        if kind == "local_chunk":
            return cut, same - {axis}
        return b(c.all_gather, cut, axis, dim, bwd=bwd), same

    params = []
    for i in range(6):
        same = rng.random() < 0.3
        params.append(b.put(f"p{i}", *shape(), same=same))
        pool.append((params[-1], whole if same else frozenset()))
    tangents = [b.put(f"t{i}", *shape(), same=True) for i in range(2)]
    for p in params[:4]:
        axis = rng.choice(b.mesh.names)
        if p.meta["val"].numel() < 100:
            pool.append((b(c.all_gather, p, axis, rng.randrange(len(edit.shape(p)))), frozenset({axis})))
    for _ in range(size):
        pool.append(step(False))
    outputs = [n for n, _ in rng.sample(pool[-8:], 3)]
    pool += [(t, whole) for t in tangents]
    first = len(pool)
    for p in params[:3]:
        again = b(c.all_gather, p, b.mesh.names[0], 0, bwd=True, marks=("regather",))
        pool.append((again, frozenset({b.mesh.names[0]})))
    for _ in range(size):
        pool.append(step(True))
    grads = []
    for node, _ in rng.sample(pool[first:], 6):
        node = b(aten.clamp.default, node, -4, 4, bwd=True)
        axis = rng.choice(b.mesh.names)
        parts, dims = b.mesh.sizes[b.mesh.axis(axis)], edit.shape(node)
        cuts = [d for d, n in enumerate(dims) if n % parts == 0]
        if cuts and rng.random() < 0.6:
            grads.append(b(c.reduce_scatter, node, axis, rng.choice(cuts), "sum"))
        else:
            grads.append(b(c.all_reduce, node, axis, "sum"))
    return b, b.done(outputs, grads)
