"""What depends on shapes only is computed once: the same values, nothing handed out, nothing random, nothing large."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import autopar
from autopar.passes import edit
from autopar.passes.constants import constants

aten = torch.ops.aten


def _graph(last):
    """x + (a triangle made of positions); `last` makes the outputs from both and the triangle."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta.update(val=torch.empty(4, 4, device="meta"), phase="forward")

    def call(target, *args, **kwargs):
        node = graph.call_function(target, args, kwargs)
        value = target(
            *fx.map_arg(args, lambda n: torch.zeros(n.meta["val"].shape, dtype=n.meta["val"].dtype)), **kwargs
        )
        node.meta.update(val=value.to("meta"), phase="forward")
        return node

    at = call(aten.arange.default, 4, dtype=torch.int64, device=torch.device("cpu"))
    row, column = call(aten.unsqueeze.default, at, 0), call(aten.unsqueeze.default, at, 1)
    triangle = call(aten._to_copy.default, call(aten.le.Tensor, row, column), dtype=torch.float32)
    graph.output(tuple(last(call, x, triangle)))
    return fx.GraphModule(nn.Module(), graph)


def _ops(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def _check(gm, *ops, **options):
    x = torch.randn(4, 4)
    want, out = gm(x), constants(edit.copy(gm), **options)
    assert _ops(out) == list(ops)
    for _ in range(2):
        for got, expected in zip(out(x), want, strict=True):
            assert torch.equal(got, expected)
            got.add_(1)  # whoever gets it may write to it
        want = gm(x)


def test_masks_are_made_once():
    _check(_graph(lambda call, x, mask: [call(aten.mul.Tensor, x, mask)]), "aten.mul.Tensor")


def test_what_is_handed_out_is_made_every_time():
    _check(
        _graph(lambda call, x, mask: [mask, call(aten.mul.Tensor, x, mask)]), "aten._to_copy.default", "aten.mul.Tensor"
    )
    views = _graph(lambda call, x, mask: [call(aten.view.default, mask, [16]), call(aten.mul.Tensor, x, mask)])
    _check(views, "aten._to_copy.default", "aten.view.default", "aten.mul.Tensor")


def test_large_ones_are_made_every_time():
    gm = _graph(lambda call, x, mask: [call(aten.mul.Tensor, x, mask)])
    _check(gm, "aten._to_copy.default", "aten.mul.Tensor", largest=32)  # the mask is of 64 bytes, positions of 32


def test_random_and_unset_memory_are_not_kept():
    def last(call, x, mask):
        drawn = call(aten.rand.default, [4, 4], device=torch.device("cpu"))
        unset = call(aten.empty.memory_format, [4, 4], device=torch.device("cpu"))
        return [call(aten.mul.Tensor, x, drawn), call(aten.mul.Tensor, x, call(aten.zeros_like.default, unset))]

    out = constants(_graph(last))
    assert {"aten.rand.default", "aten.empty.memory_format"} <= set(_ops(out))


class Positions(nn.Module):
    """Adds embeddings of positions, and gives the positions back."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 3), nn.Linear(3, 1)

    def forward(self, x):
        """x: [batch, 6, 3]."""
        at = torch.arange(6)
        return self.head(x + self.table(at)).sum(), at


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_outputs_of_a_module_are_the_users_own(backend):
    torch.manual_seed(0)
    model, x = Positions(), torch.randn(2, 6, 3)
    pm = autopar.compile(model, "dp=1", example=(x,), backend=backend)
    for _ in range(3):
        (loss, at), (want, _) = pm(x), model(x)
        torch.testing.assert_close(loss, want)
        assert torch.equal(at, torch.arange(6))
        at.add_(7)
