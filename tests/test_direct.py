"""Torch's own functions in place of overloads: the same op is dispatched, with the same result."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.passes.direct import _FUNCTIONS, direct

aten = torch.ops.aten
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
B = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ARGUMENTS = {
    aten.mm.default: [(X, X.t())],
    aten.bmm.default: [(B, B.transpose(1, 2))],
    aten.addmm.default: [(X[:, 0], X, X.t())],
    aten.add.Tensor: [(X, X), (X, 2), (X, B)],
    aten.sub.Tensor: [(X, X), (X, 0.5)],
    aten.mul.Tensor: [(X, X), (X, 2.0)],
    aten.div.Tensor: [(X, X), (X, 4)],
    aten.mul.Scalar: [(X, 2), (X, 0.5), (X.float(), 0.1), (X > 0, 3)],
    aten.div.Scalar: [(X, 7), (X, 0.5), (X.float(), 3), (X.bfloat16(), 3), (X > 0, 3)],
    aten.pow.Tensor_Scalar: [(X, 2)],
    aten.where.self: [(X > 0, X, -X)],
    aten.lerp.Scalar: [(X, 2 * X, 0.1)],
    aten.embedding.default: [(X, torch.tensor([0, 2])), (X, torch.tensor([1]), 1)],
    aten.convolution.default: [
        (X[None], X.t()[:, :, None], None, [1], [0], [1], False, [0], 1),
        (B[:, None], B[:, None, :2, :2], B[:, 0, 0], [1, 2], [1, 0], [1, 1], False, [0, 0], 1),
    ],
    aten.native_layer_norm.default: [(X, [4], X[0], X[1], 1e-5), (B, [3, 4], None, None, 1e-5)],
    aten.cat.default: [([X, X],), ([X, X], 1)],
    aten.sum.dim_IntList: [(X, [0]), (X, [0, 1], True), (X, [])],
    aten.mean.dim: [(X, [1]), (X, [0, 1], True)],
    aten.permute.default: [(B, [2, 0, 1])],
    aten.transpose.int: [(B, 0, 2)],
    aten.reshape.default: [(B.transpose(0, 1), [6, 4])],
    aten.unsqueeze.default: [(X, 1)],
    aten.squeeze.dim: [(X[:1], 0)],
    aten.select.int: [(B, 1, 2)],
    aten.view.default: [(X, [2, 6])],
    aten.expand.default: [(X[:1], [3, 4])],
    aten.add_.Tensor: [(X, X)],
    aten.mul_.Tensor: [(X, X)],
    aten.copy_.default: [(X, X + 1)],
}


#: What a function calls in the place of an overload that does nothing but call it.
SAME = {aten.mul.Scalar: aten.mul.Tensor, aten.div.Scalar: aten.div.Tensor}


class Seen(TorchDispatchMode):
    """The ops that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("overload", _FUNCTIONS, ids=str)
def test_the_same_op_is_called(overload):
    for args in ARGUMENTS.get(overload, [(X,)]):
        found = []
        for function in (overload, _FUNCTIONS[overload]):
            mine = torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, args)
            with torch.no_grad(), Seen() as seen:
                out = function(*mine)
            found.append((seen.ops, out))
        assert [SAME.get(op, op) for op in found[0][0]] == found[1][0], args
        torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0, equal_nan=True, check_stride=True)


def test_calls_that_name_a_dtype_stay():
    graph = fx.Graph()
    x = graph.placeholder("x")
    wide = graph.call_function(aten.sum.dim_IntList, (x, [0]), {"dtype": torch.float64})
    graph.output(graph.call_function(aten.mul.Tensor, (wide, wide)))
    targets = [n.target for n in direct(fx.GraphModule({}, graph)).graph.nodes if n.op == "call_function"]
    assert targets == [aten.sum.dim_IntList, torch.mul]
