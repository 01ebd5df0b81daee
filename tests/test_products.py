"""oneDNN in place of the BLAS: for which products, with which values, and only where it was measured to pay."""

from __future__ import annotations

import copy
import itertools
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn

import autopar
from autopar import linear
from autopar.costmodel import calibrate
from autopar.costmodel.devices import DEVICES, Measured
from autopar.passes import edit
from autopar.passes.products import products
from tests.harness import Ranks

aten = torch.ops.aten
pytestmark = pytest.mark.skipif(not linear.available(), reason="this torch is built without oneDNN")
#: The module: its package has the pass under that name.
MODULE = sys.modules["autopar.passes.products"]
TURNS = (aten.permute.default, aten.t.default)
#: A device that says that oneDNN always pays.
ALWAYS = replace(DEVICES["cpu"], measured=Measured(linear_from=1.0))
#: A device that says so of gradients of weights too.
ALL = replace(DEVICES["cpu"], measured=Measured(linear_from=1.0, weights_from=1.0))


def _strided(rows, columns):
    """Matrices that are dense, have gaps, are turned, have gaps both ways, are expanded, overlap."""
    wide = torch.randn(2 * rows, 2 * columns)
    yield from (wide[:rows, :columns].contiguous(), wide[:rows, 1 : columns + 1], wide[::2, ::2])
    yield from (torch.randn(columns, rows).t(), torch.randn(columns, 2 * rows)[:, 1 : rows + 1].t())
    yield from (torch.randn(1, columns).expand(rows, columns), torch.randn(rows, 1).expand(rows, columns))
    yield torch.randn(rows + columns - 1).unfold(0, columns, 1)


@pytest.mark.parametrize("op", [linear.linear, torch.ops.autopar.linear.default])
def test_values_for_all_strides(op):
    table = torch.randn(14, 14)
    biases = (None, table[0, :7], table[0, ::2], table[:7, 0], table.diagonal()[:7], torch.randn(1).expand(7))
    for x in _strided(9, 13):
        for weight in _strided(7, 13):
            for b in biases:
                got = op(x, weight, b)
                torch.testing.assert_close(got, x @ weight.t() + (0 if b is None else b))
                assert got.is_contiguous()
    assert op(torch.empty(9, 13, device="meta"), torch.empty(7, 13, device="meta"), None).shape == (9, 7)


def _graph(dtype=torch.float32):
    """A layer, the gradient of its input and that of its weight."""
    graph = fx.Graph()
    shapes = {"x": (6, 4), "w": (5, 4), "b": (5,), "g": (6, 5)}
    x, w, b, g = (graph.placeholder(name) for name in shapes)
    for node, shape in zip((x, w, b, g), shapes.values()):
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    turned = edit.call(graph, aten.permute.default, w, [1, 0], like=w)
    forward = edit.call(graph, aten.addmm.default, b, x, turned, like=x)
    plain = edit.call(graph, aten.mm.default, x, turned, like=x)
    to_x = edit.call(graph, aten.mm.default, g, w, like=x)
    to_w = edit.call(graph, aten.mm.default, edit.call(graph, aten.permute.default, g, [1, 0], like=g), x, like=x)
    total = edit.call(graph, aten.add_.Tensor, to_x, to_x, like=x)  # nobody reads what it returns
    total.meta["val"] = to_x.meta["val"]
    graph.output((forward, plain, to_x, to_w))
    return fx.GraphModule(nn.Module(), graph), [torch.randn(s, dtype=dtype) for s in shapes.values()]


@pytest.mark.parametrize("eager", [False, True])
def test_products_of_a_layer(eager):
    gm, arguments = _graph()
    want = gm(*arguments)
    out = products(gm, 1.0, None, eager)
    out.graph.lint()
    op = linear.linear if eager else torch.ops.autopar.linear.default
    targets = [n.target for n in out.graph.nodes]
    assert targets.count(op) == 3 and targets.count(aten.mm.default) == 1 and aten.addmm.default not in targets
    assert aten.add_.Tensor in targets and targets.count(aten.permute.default) == 1
    for got, expected in zip(out(*arguments), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("eager", [False, True])
def test_gradients_of_weights(eager, monkeypatch):
    """Alone, and where a bucket wants them; not thin ones."""
    gm, arguments = _graph()
    assert str(products(_graph()[0], None, 1.0, eager).graph) == str(gm.graph)
    monkeypatch.setattr(MODULE, "THIN", 4)
    product = next(n for n in gm.graph.nodes if n.target is aten.mm.default and n.args[0].target in TURNS)
    with gm.graph.inserting_before(product):
        place = edit.call(gm.graph, aten.new_empty.default, product.args[0], list(edit.shape(product)), like=product)
        written = gm.graph.call_function(aten.mm.out, product.args, {"out": place})
        written.meta.update(product.meta)
    gm.graph.output_node().args = ((*gm.graph.output_node().args[0], place),)
    gm.recompile()
    want = gm(*arguments)
    out = products(gm, None, 1.0, eager)
    out.graph.lint()
    op = linear.linear if eager else torch.ops.autopar.linear.default
    targets = [n.target for n in out.graph.nodes]
    assert targets.count(op) == 2 and targets.count(aten.mm.default) == 2 and targets.count(aten.copy_.default) == 1
    assert aten.mm.out not in targets
    for got, expected in zip(out(*arguments), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_small_ones_and_other_dtypes_stay(monkeypatch):
    monkeypatch.setattr(MODULE, "THIN", 4)
    for gm, least in ((_graph()[0], 241.0), (_graph(torch.float64)[0], 1.0), (_graph(torch.bfloat16)[0], 1.0)):
        before = str(gm.graph)
        assert str(products(gm, least, least, True).graph) == before
    for leasts in ((240.0, None), (None, 240.0)):
        assert str(products(_graph()[0], *leasts, True).graph) != str(_graph()[0].graph)


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts calls of oneDNN."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is linear.KERNEL
        return func(*args, **(kwargs or {}))


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def _batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 8, generator=generator), torch.randn(8, 4, generator=generator)


def _train(module, steps=3):
    optimizer, losses = torch.optim.SGD(module.parameters(), lr=0.1), []
    x, y = _batch()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(x, target=y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


EXAMPLE = dict(zip(("input", "target"), _batch()))


class WithLoss(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, target):
        return nn.functional.mse_loss(self.net(x), target)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_training_is_the_same(backend, monkeypatch):
    monkeypatch.setattr(MODULE, "THIN", 4)
    reference = _train(WithLoss(_net()))
    call = {"example": EXAMPLE, "loss": nn.functional.mse_loss, "backend": backend}
    # Three layers, the gradients that go through two of them, and those of three weights.
    for device, products_of_a_step in (("cpu", 0), (ALWAYS, 5), (ALL, 8)):
        module = autopar.compile(_net(), "dp=1", device=device, **call)
        assert _train(module) == pytest.approx(reference, rel=1e-6)
        if backend == "eager":
            with Seen() as seen:
                _train(module, 1)
            assert seen.count == products_of_a_step


def _ranks_with_other_profiles():
    """Rank 0's is used: what ranks compute alike must stay alike to the last bit."""
    device = ALL if dist.get_rank() == 0 else replace(ALL, measured=Measured())
    pm = autopar.compile(_net(), "dp=2", example=EXAMPLE, loss=nn.functional.mse_loss, device=device)
    with Seen() as seen:
        losses = _train(pm)
    assert seen.count > 0
    return losses, {k: v.clone() for k, v in pm.full_state_dict().items()}


def test_ranks_choose_alike():
    with Ranks(2) as ranks:
        (losses, state), (losses1, state1) = ranks.run(_ranks_with_other_profiles)
    reference = copy.deepcopy(WithLoss(_net()))
    assert losses == losses1 == pytest.approx(_train(reference), rel=1e-6)
    for name, value in state.items():
        assert torch.equal(value, state1[name])


def test_crowds_compute_with_the_library_of_the_graphs():
    cube = 2.0 * calibrate.SIDE**3
    for least, function in ((0.0, torch.mm), (2 * cube, torch.mm), (cube, linear.linear), (1.0, linear.linear)):
        assert calibrate._product(least).func is function


def test_calibration_takes_it_from_where_it_is_quicker():
    sides = {n: 2.0 * n**3 for n in calibrate.SIDES}
    blas = [(flops, 100.0) for flops in sides.values()]

    def net(quicker, of_weights, work):
        side, turned = len(work.args[0]), not work.args[0].is_contiguous()
        if work.func is not linear.linear:
            return sides[side] / 100
        return sides[side] / 100 * (0.8 if turned == of_weights and side in quicker else 1.1)

    first, second, third, fourth, last = calibrate.SIDES
    cases = {(): None, (first,): None, (last,): last, (second, third, fourth, last): second}
    cases[(third, last)] = third  # noise in between does not decide
    for (quicker, expected), of_weights in itertools.product(cases.items(), (False, True)):
        points, *least = calibrate._with_onednn(partial(net, quicker, of_weights), blas)
        found = None if expected is None else sides[expected]
        assert least == ([None, found] if of_weights else [found, None])
        for (flops, rate), side in zip(points, calibrate.SIDES, strict=True):
            seconds = 1.0 if expected is None or side < expected else 0.8 if side in quicker else 1.1
            taken = 2 + seconds if of_weights else 2 * seconds + 1
            assert flops == sides[side] and rate == pytest.approx(300 / taken)
