"""How a captured graph is read: operands, results, names and addresses."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from autopar.graph import Value, is_op, op_name, operands, pattern, resolve, results, set_addresses

pytestmark = pytest.mark.tiny
aten = torch.ops.aten


def tensor(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def example() -> dict[str, fx.Node]:
    """x, w -> mm -> split into two -> cat([second, x, first]) -> sum."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    x.meta["val"], w.meta["val"] = tensor(4, 6), tensor(6, 6)
    mm = graph.call_function(aten.mm.default, (x, w))
    split = graph.call_function(aten.split.Tensor, (mm, 3, 1))
    first, second = (graph.call_function(operator.getitem, (split, i)) for i in (0, 1))
    cat = graph.call_function(aten.cat.default, ([second, x, first], 1))
    total = graph.call_function(aten.sum.default, (cat,), {"dtype": None})
    mm.meta["val"] = tensor(4, 6)
    split.meta["val"] = (tensor(4, 3), tensor(4, 3))
    first.meta["val"], second.meta["val"] = split.meta["val"]
    cat.meta["val"], total.meta["val"] = tensor(4, 12), tensor()
    graph.output((total,))
    for node in graph.nodes:
        node.meta.setdefault("phase", "fwd")
        node.meta["module"] = "model.layers.0.mlp"
    return {"x": x, "w": w, "mm": mm, "split": split, "first": first, "second": second, "cat": cat, "sum": total}


def test_operands_are_flat_and_seen_through_getitem():
    n = example()
    assert operands(n["mm"]) == [Value(n["x"], 0), Value(n["w"], 0)]
    assert operands(n["cat"]) == [Value(n["split"], 1), Value(n["x"], 0), Value(n["split"], 0)]
    assert resolve(n["second"]) == Value(n["split"], 1)
    assert resolve(n["second"]).shape == (4, 3)


def test_results():
    n = example()
    assert [r.shape for r in results(n["split"])] == [(4, 3), (4, 3)]
    n["split"].meta["val"] = (tensor(4, 3), None)
    assert results(n["split"])[1] is None
    assert [r.shape for r in results(n["mm"])] == [(4, 6)]


def test_what_is_an_op():
    n = example()
    assert [name for name, node in n.items() if is_op(node)] == ["mm", "split", "cat", "sum"]


def test_op_names():
    n = example()
    assert [op_name(n[k]) for k in ("mm", "split", "sum")] == ["aten.mm", "aten.split.Tensor", "aten.sum"]
    assert op_name(n["first"]) == "getitem"


def test_addresses_count_ops_of_a_kind_within_module_and_phase():
    n = example()
    graph = n["mm"].graph
    with graph.inserting_after(n["mm"]):
        again = graph.call_function(aten.mm.default, (n["x"], n["w"]))
    again.meta.update(phase="fwd", module="model.layers.0.mlp", val=tensor(4, 6))
    n["sum"].meta["phase"] = "bwd"
    set_addresses(graph)
    assert n["mm"].meta["address"] == "fwd:model.layers.0.mlp/mm#0"
    assert again.meta["address"] == "fwd:model.layers.0.mlp/mm#1"
    assert n["split"].meta["address"] == "fwd:model.layers.0.mlp/split.Tensor#0"
    assert n["sum"].meta["address"] == "bwd:model.layers.0.mlp/sum#0"
    assert "address" not in n["first"].meta


@pytest.mark.parametrize(
    ("address", "star"),
    [
        ("fwd:model.layers.12.mlp/mm#3", "fwd:model.layers.*.mlp/mm#3"),
        ("fwd:h.0.mlp.experts.7.up/mm#0", "fwd:h.*.mlp.experts.*.up/mm#0"),
        ("fwd:layers.12/mm#1", "fwd:layers.*/mm#1"),
        ("fwd:lm_head/mm#0", "fwd:lm_head/mm#0"),
        ("bwd:layer4x2.fc1/mm#0", "bwd:layer4x2.fc1/mm#0"),
    ],
)
def test_pattern_stars_layer_numbers_only(address, star):
    assert pattern(address) == star
