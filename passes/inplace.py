"""Write where the result is needed: the last pass over graphs that run op by op.

All other passes see functional graphs. What runs may reuse memory that nobody reads any more, without anybody being
able to tell:

* a sum or product is written over an operand that dies with it, if the result then has the strides that it would have
  had: the layout of what follows (attention's result among it) hangs on them, and with it which reshapes copy;
* an all_reduce works on its operand, if that dies with it, and not on a copy;
* what a bucket packs is written into the bucket where it is computed: a matrix product writes its result there at once
  (`mm.out`), other values are copied there as soon as they exist, not joined by `cat` at the end;
* pieces of a reduced bucket that go to the output are handed out as views of it. They are gradients, which the
  optimizer reads together and frees together;
* what all_gather brings is written into memory of ours. That is for safety, not for speed: the functional form goes
  through gloo's coalesced gathers, which corrupt the heap when several are in flight (seen on torch 2.13).

Placeholders, constants and outputs are never written to: tensors saved for the backward may be read twice. Compilers
do the same themselves, so that their graphs do not pass here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.graph import BACKWARD
from autopar.offload import ARRIVED, FETCH_START, OFFLOAD_START
from autopar.passes import edit
from autopar.passes.bind import GATHER_INTO, IN_PLACE_REDUCE, STARTS, WAIT, functional

aten = torch.ops.aten

#: Op -> its form that writes over the first operand. Commutative, so that either operand may be the first.
_OVERWRITES = {aten.add.Tensor: aten.add_.Tensor, aten.mul.Tensor: aten.mul_.Tensor}
_FLAT = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.contiguous.default)
#: Results are contiguous whatever the operands' strides.
_DENSE = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.cat.default,
        aten.embedding.default,
        aten.embedding_dense_backward.default,
        functional.all_reduce.default,
        functional.all_gather_into_tensor.default,
        functional.reduce_scatter_tensor.default,
        functional.all_to_all_single.default,
    }
)
#: Results have the strides of their operands.
_POINTWISE = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.neg.default,
        aten.silu.default,
        aten.gelu.default,
        aten.gelu_backward.default,
        aten.silu_backward.default,
        aten.add_.Tensor,
        aten.mul_.Tensor,
    }
)


def inplace(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite a bound local graph, in the order in which it will run, as described above. `gm` is changed."""
    _overwrite(gm)
    _hand_out_views(gm)
    _pack_early(gm)
    _reduce_in_place(gm)
    _gather_into(gm)  # last: the others know the functional form
    gm.recompile()
    return gm


class _Memory:
    """Which nodes share memory, and when each piece of memory is last used."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.position = {n: i for i, n in enumerate(gm.graph.nodes)}
        self.root: dict[fx.Node, fx.Node] = {}
        self.dense: set[fx.Node] = set()
        self.strided: set[fx.Node] = set()
        self.joined: dict[fx.Node, fx.Node] = {}
        self.last: dict[fx.Node, int] = {}
        #: Collectives, and copies to and from the host, that read a piece of memory, with the position of their wait:
        #: until then they may still read.
        self.flights: dict[fx.Node, list[tuple[fx.Node, int]]] = {}
        for node in gm.graph.nodes:
            base = aliased(node)
            root = node if base is None else self.root[base]
            self.root[node] = root
            if self._is_dense(node):
                self.dense.add(node)
            if self._is_strided(node):
                self.strided.add(node)
            for used in node.all_input_nodes:
                self.last[self.root[used]] = self.position[node]
            if node.target in (WAIT, ARRIVED):
                start: fx.Node = node.args[0]  # type: ignore[assignment]
                for used in start.all_input_nodes:
                    self.flights.setdefault(self.root[used], []).append((start, self.position[node]))

    def _is_dense(self, node: fx.Node) -> bool:
        """Whether the tensor is known to be contiguous."""
        if node.op != "call_function" or not edit.is_tensor(node):
            return False
        inputs = node.all_input_nodes
        if node.target in _DENSE:
            return True
        if node.target is aten.clone.default:
            return node.kwargs.get("memory_format") is torch.contiguous_format or inputs[0] in self.dense
        if node.target in _FLAT or node.target in (WAIT, ARRIVED, OFFLOAD_START, FETCH_START):
            return inputs[0] in self.dense
        if node.target not in _POINTWISE:
            return False
        whole = [n for n in inputs if edit.shape(n) == edit.shape(node)]
        return bool(whole) and all(n in self.dense for n in whole)

    def _is_strided(self, node: fx.Node) -> bool:
        """Whether the tensor is a view with strides, or has those of one: of the first operand of its size."""
        if node.target in _POINTWISE:
            whole = [n for n in node.all_input_nodes if edit.shape(n) == edit.shape(node)]
            return bool(whole) and whole[0] in self.strided
        return edit.may_have_strides(node)

    def of(self, node: fx.Node) -> fx.Node:
        """The node whose result the memory first was."""
        root = self.root[node]
        while root in self.joined:
            root = self.joined[root]
        return root

    def join(self, node: fx.Node, root: fx.Node) -> None:
        """From now on the result of `node`, and all that shares its memory, lies in that of `root`."""
        old = self.of(node)
        self.last[root] = max(self.last[root], self.last.get(old, 0))
        self.flights.setdefault(root, []).extend(self.flights.get(old, ()))
        self.joined[old] = root

    def dies_at(self, x: fx.Node, reader: fx.Node) -> bool:
        """Whether `x` is contiguous memory of this graph's own, all of it, that nobody needs after `reader`."""
        root = self.of(x)
        if root.op != "call_function" or x not in self.dense or edit.nbytes(root) != edit.nbytes(x):
            return False
        return edit.is_tensor(root) and self.last[root] == self.position[reader] and self.landed(root, reader)

    def landed(self, root: fx.Node, reader: fx.Node) -> bool:
        """Whether no collective but `reader` itself reads memory of `root` at the time when `reader` runs."""
        here = self.position[reader]
        return all(start is reader or wait < here for start, wait in self.flights.get(root, ()))


def aliased(node: fx.Node) -> fx.Node | None:
    """The operand whose memory the result may share."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    if edit.is_pick(node) or node.target in (aten._unsafe_view.default, WAIT, IN_PLACE_REDUCE):
        return node.all_input_nodes[0]
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes[0]
    schema = node.target._schema
    if not schema.returns or schema.returns[0].alias_info is None:
        return None
    named = {a.name: v for a, v in zip(schema.arguments, node.args)} | dict(node.kwargs)
    shared = [named.get(a.name) for a in schema.arguments if a.alias_info is not None]
    return next(v for v in shared if isinstance(v, fx.Node))


def _overwrite(gm: fx.GraphModule) -> None:
    """add and mul over an operand that dies."""
    memory = _Memory(gm)
    for node in gm.graph.nodes:
        if node.target not in _OVERWRITES or len(node.args) != 2 or node.kwargs:
            continue
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or memory.of(a) is memory.of(b):
            continue
        for x, other in ((a, b), (b, a)):
            if x is b and a in memory.strided and edit.shape(a) == edit.shape(node):
                break
            fits = edit.shape(x) == edit.shape(node) and x.meta["val"].dtype is node.meta["val"].dtype
            if fits and memory.dies_at(x, node):
                node.target, node.args = _OVERWRITES[node.target], (x, other)
                # From here on the result lives in the operand's memory.
                memory.join(node, memory.of(x))
                break


def _hand_out_views(gm: fx.GraphModule) -> None:
    """Leave out the copies of pieces of a reduced bucket that only the output reads, where they are gradients.

    What a forward hands out belongs to the user, who may write to it or save it: that gets memory of its own.
    """
    for node in list(gm.graph.nodes):
        if node.meta.get("phase") != BACKWARD:
            continue
        piece = node.args[0] if node.target is aten.clone.default else None
        if not isinstance(piece, fx.Node) or piece.target is not aten.slice.Tensor or len(edit.shape(piece)) != 1:
            continue
        base: fx.Node = piece.args[0]  # type: ignore[assignment]
        while base.target in _FLAT:
            base = base.args[0]  # type: ignore[assignment]
        if (base.target is WAIT or _cast_back(base)) and _only_output(base):
            node.replace_all_uses_with(piece)
            gm.graph.erase_node(node)


def _is_cast(node: fx.Node) -> bool:
    """Whether it makes another dtype of its operand, on the same device."""
    return node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}


def _cast_back(node: fx.Node) -> bool:
    """Whether it is what a collective has brought, cast (`passes/compress.py`)."""
    if not _is_cast(node):
        return False
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    while x.target in _FLAT:
        x = x.args[0]  # type: ignore[assignment]
    return x.target is WAIT


def _only_output(node: fx.Node) -> bool:
    """Whether nothing computes with the node: only views and copies of it are read, and the output."""
    return all(
        u.op == "output"
        or (u.target in (*_FLAT, aten.slice.Tensor, aten.clone.default, aten.permute.default) and _only_output(u))
        for u in node.users
    )


# ---- buckets ---------------------------------------------------------------------------------------------------------

_REDUCTIONS = (functional.all_reduce.default, functional.reduce_scatter_tensor.default)


def _pack_early(gm: fx.GraphModule) -> None:
    """In place of `cat` before a reduction: one buffer, into which every piece is written when it is computed."""
    for node in list(gm.graph.nodes):
        if node.target is aten.cat.default and _start_of(node) is not None:
            _pack(gm, node)


def _start_of(node: fx.Node) -> fx.Node | None:
    """The reduction that alone reads the node."""
    while len(node.users) == 1:
        (node,) = node.users
        if node.target in _REDUCTIONS:
            return node
        if node.target not in _FLAT and not _is_cast(node):
            return None
    return None


def _pack(gm: fx.GraphModule, cat: fx.Node) -> None:
    graph, memory = gm.graph, _Memory(gm)
    rows: list[fx.Node] = list(cat.args[0])  # type: ignore[arg-type]
    dim = cat.args[1] if len(cat.args) > 1 else 0
    if len(set(rows)) != len(rows) or any(r.meta["val"].dtype is not cat.meta["val"].dtype for r in rows):
        return
    start = _start_of(cat)
    assert start is not None
    sources = [_source(row, cat, dim) for row in rows]
    products = [_product(source, memory) for source in sources]
    # The buffer is there before the first that is written to it.
    first = min((*sources, *(p for p in products if p is not None)), key=memory.position.__getitem__)
    own = first.op == "call_function"
    # On the device of something that is there already: not of what a collective has yet to bring.
    beside = first
    while not edit.is_tensor(beside) or (own and beside is first) or beside.target in STARTS:
        beside = beside.all_input_nodes[0]
    with graph.inserting_before(first if own else _first_call(graph)):
        shape, dtype = list(edit.shape(cat)), cat.meta["val"].dtype
        buffer = edit.call(graph, aten.new_empty.default, beside, shape, like=cat, dtype=dtype)
        places = []
        at = 0
        for row, source in zip(rows, sources):
            size = edit.shape(row)[dim]  # type: ignore[index]
            place = edit.call(graph, aten.slice.Tensor, buffer, dim, at, at + size, like=cat)
            if edit.shape(place) != edit.shape(source):
                place = edit.call(graph, aten.view.default, place, list(edit.shape(source)), like=cat)
            places.append(place)
            at += size
    for source, place, product in zip(sources, places, products):
        alone = product is not None and memory.last[product] <= memory.position[start] and memory.landed(product, start)
        if product is not None and alone and dim == 0:
            with graph.inserting_before(product):
                if edit.shape(place) != edit.shape(product):
                    place = edit.call(graph, aten.view.default, place, list(edit.shape(product)), like=cat)
            product.target, product.kwargs = aten.mm.out, {"out": place}
            continue
        with graph.inserting_after(source if source.op == "call_function" else places[-1]):
            write = graph.call_function(aten.copy_.default, (place, source))
        edit.inherit(write, cat)
        write.meta["val"] = place.meta["val"]
    cat.replace_all_uses_with(buffer)
    for node in (cat, *rows):
        if not node.users:
            graph.erase_node(node)


def _source(row: fx.Node, cat: fx.Node, dim: Any) -> fx.Node:
    """What a flat row is made from, if it can be copied into the row's place as it stands."""
    if row.target not in (aten.view.default, aten.reshape.default) or len(row.users) > 1:
        return row
    inner: fx.Node = row.args[0]  # type: ignore[assignment]
    # A row of a buffer with several rows can only be seen in the inner shape if that keeps its first dim.
    return inner if dim == 0 or edit.shape(inner)[:1] == edit.shape(row)[:1] else row


def _product(node: fx.Node, memory: _Memory) -> fx.Node | None:
    """The matrix product that `node` is, seen through changes of shape."""
    while node.target in _FLAT:
        node = node.args[0]  # type: ignore[assignment]
    return node if node.target is aten.mm.default and memory.root[node] is node else None


def _first_call(graph: fx.Graph) -> fx.Node:
    return next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))


def _reduce_in_place(gm: fx.GraphModule) -> None:
    """all_reduce over an operand that dies, or over a bucket of ours, which nobody reads but through the reduction."""
    memory = _Memory(gm)
    for node in gm.graph.nodes:
        if node.target is functional.all_reduce.default:
            x: fx.Node = node.args[0]
            if memory.root[x].target is aten.new_empty.default or memory.dies_at(x, node):
                node.target = IN_PLACE_REDUCE


def _gather_into(gm: fx.GraphModule) -> None:
    """all_gather into a buffer that is there."""
    for node in gm.graph.nodes:
        if node.target is functional.all_gather_into_tensor.default:
            with gm.graph.inserting_before(node):
                out = edit.call(gm.graph, aten.new_empty.default, node.args[0], list(edit.shape(node)), like=node)
            node.target, node.kwargs = GATHER_INTO, {"out": out}


__all__ = ["aliased", "inplace"]
