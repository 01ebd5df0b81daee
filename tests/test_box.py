"""Graphs that own their arguments: when a tensor dies, when the gate is called, and what a second backward finds."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from graphs import Build
from torch import fx, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import autopar
from autopar.passes import collectives as c
from autopar.passes import edit
from autopar.passes.bind import GATHER_INTO, IN_PLACE_REDUCE, STARTS, WAIT, bind
from autopar.passes.box import boxed
from autopar.passes.inplace import inplace

aten = torch.ops.aten
COLLECTIVES = (*STARTS, GATHER_INTO, IN_PLACE_REDUCE)
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "none")


class Log(TorchDispatchMode):
    """Writes down which ops run. Collectives are of a group of two whose other rank brings the same."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        if func is GATHER_INTO:
            return kwargs["out"].copy_(torch.cat([args[0]] * args[1]))
        if func is IN_PLACE_REDUCE:
            return args[0].mul_(2)
        if func is WAIT:
            return args[0]
        if func in STARTS:
            doubled = 2 * args[0] if "reduce" in str(func) else args[0].clone()
            return doubled.chunk(2)[0] if "scatter" in str(func) else doubled
        return func(*args, **(kwargs or {}))


def around(kind):
    """Computation, a collective of this kind (or none), and computation behind it: bound, op by op; and its inputs."""
    b = Build("dp=2")
    x, w = b.put("x0", 4, 6), b.put("p0", 6, 4)
    y = b(aten.mm.default, x, w)
    if kind == "all_reduce":
        y = b(c.all_reduce, y, "dp", "sum")
    elif kind == "all_gather":
        y = b(c.all_gather, y, "dp", 0)
    elif kind == "reduce_scatter":
        y = b(c.reduce_scatter, y, "dp", 0, "sum")
    elif kind == "all_to_all":
        y = b(c.all_to_all, y, "dp", 0, 1)
    gm = b.done([b(aten.neg.default, y), b(aten.exp.default, w)])
    return edit.finished(inplace(bind(gm, b.mesh, (0,), {"dp": "dp"}))), b.inputs(gm)[0]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_boxed_graph_gives_the_same_and_leaves_its_list_empty(kind, gated):
    gm, row = around(kind)
    with Log():
        want = gm(*row)
        box = [lambda: None, *row] if gated else list(row)
        got = boxed(gm, gated)(box)
    assert box == []
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want))


def test_a_boxed_graph_lets_go_of_a_tensor_behind_its_last_reader():
    refs, alive = [], []

    def look(x):
        """Which of the arguments are alive; `x` itself, so that the graph has something to compute with."""
        alive.append([ref() is not None for ref in refs])
        return x

    graph = fx.Graph()
    first, second = graph.placeholder("first"), graph.placeholder("second")
    here = graph.call_function(look, (graph.call_function(aten.neg.default, (first,)),))
    total = graph.call_function(aten.add.Tensor, (here, second))
    graph.output((graph.call_function(look, (total,)),))
    gm = fx.GraphModule({}, graph)
    for run in (boxed(gm), lambda box: gm(*box)):
        box = [torch.ones(3), torch.ones(3)]
        refs[:] = [weakref.ref(t) for t in box]
        (out,) = run(box)
        assert torch.equal(out, torch.zeros(3))
    # Not so where the caller keeps the arguments: what is looked at is real.
    assert alive == [[False, True], [False, False], [True, True], [True, True]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_is_called_once_right_before_the_first_collective(kind):
    gm, row = around(kind)
    with Log() as log:
        boxed(gm, gated=True)([lambda: log.ops.append("gate"), *row])
    assert log.ops.count("gate") == 1
    at = log.ops.index("gate")
    assert aten.mm.default in log.ops[:at] and not set(log.ops[:at]) & set(COLLECTIVES)
    if kind == "none":
        assert at == len(log.ops) - 1
    else:
        assert log.ops[at + 1] in COLLECTIVES


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_gate_raises_comes_out_and_no_collective_is_started(kind):
    def refuse():
        log.ops.append("gate")
        raise autopar.RankMismatchError("another rank has failed")

    gm, row = around(kind)
    with Log() as log, pytest.raises(autopar.RankMismatchError, match="another rank has failed"):
        boxed(gm, gated=True)([refuse, *row])
    assert log.ops[-1] == "gate" and not set(log.ops) & set(COLLECTIVES)


# ---- the step: backward twice --------------------------------------------------------------------------------------


class Smoothed(nn.Module):
    """Divides by a running size, which it moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("size", torch.ones(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        """x over the size so far."""
        out = x / self.size.clone()
        self.size.lerp_(x.detach().abs().mean(0) + 0.1, 0.5)
        self.calls.add_(1)
        return out


MODELS = {
    "one layer": lambda: [nn.Linear(4, 1)],
    "layers": lambda: [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)],
    "batch norm": lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)],
    "smoothed": lambda: [nn.Linear(4, 6), Smoothed(), nn.Tanh(), nn.Linear(6, 1)],
    "dropout": lambda: [nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1)],
}
X = torch.linspace(-1, 2, 32, dtype=torch.float64).reshape(8, 4)


def model_of(name):
    """The model and the same compiled for one device."""
    torch.manual_seed(3)
    model = nn.Sequential(*MODELS[name]()).double()
    return model, autopar.compile(copy.deepcopy(model), 1, example=(X.clone(),))


def grads(module):
    """Copies of all gradients, whole."""
    found = {name: p.grad for name, p in module.named_parameters()}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_second_backward_gives_the_same_gradients_once_more(name):
    model, pm = model_of(name)
    loss = pm(X).square().mean()
    loss.backward(retain_graph=True)
    once = grads(pm)
    loss.backward(retain_graph=True)
    twice = grads(pm)
    assert all(once[n].abs().sum() > 0 and torch.equal(twice[n], 2 * once[n]) for n in once if n != "0.bias")
    loss.backward()
    if name == "dropout":
        return  # other masks than torch's own
    plain = model(X).square().mean()
    for keep in (True, True, False):
        plain.backward(retain_graph=keep)
    for n, want in grads(model).items():
        torch.testing.assert_close(grads(pm)[n], want, rtol=1e-9, atol=1e-12)
    ours, theirs = pm.full_state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for n in theirs:  # running statistics too: of one forward, as torch's
        torch.testing.assert_close(ours[n], theirs[n], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "buffer"), [("batch norm", "running_var"), ("smoothed", "size")])
def test_a_second_backward_runs_on_the_buffers_of_its_own_forward(name, buffer):
    results = []
    for module in model_of(name):
        first = module(X).square().mean()
        first.backward(retain_graph=True)
        module(3 * X).sum()  # replaces them
        first.backward()
        results.append((grads(module), module.get_buffer(f"1.{buffer}").clone()))
    (plain, want), (ours, got) = results
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


class Turned(nn.Module):
    """Turns a square buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("turned", torch.arange(36.0).reshape(6, 6))

    def forward(self, x):
        """x itself."""
        self.turned.copy_(self.turned.t().clone())
        return x


def test_a_buffer_may_become_a_view_of_itself():
    model = nn.Sequential(nn.Linear(4, 6), Turned()).double()
    pm = autopar.compile(copy.deepcopy(model), 1, example=(X.clone(),))
    for module in (model, pm):
        module(X).sum().backward()
    assert torch.equal(pm.get_buffer("1.turned"), model[1].turned)


def test_only_buffers_that_are_read_besides_are_kept_as_they_were():
    for name, copied in (("batch norm", []), ("smoothed", ["1.size"])):
        _, pm = model_of(name)
        pm(X)
        assert pm._state.last.copied == copied and len(pm._state.last.replaced) > len(copied)


def test_the_step_has_let_go_of_saved_activations_behind_the_backward():
    _, pm = model_of("layers")
    out = pm(X)
    held = [weakref.ref(t) for t in out.grad_fn.box if t is not None]
    assert held and all(ref() is not None for ref in held)
    out.square().mean().backward(retain_graph=True)
    assert not [ref for ref in held if ref() is not None]


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("one layer", "parameters", "changed in between .* call the module again"),  # the backward reads none of them
        ("layers", "parameters", "modified by an inplace operation"),
        ("layers", "input", "modified by an inplace operation"),
        ("batch norm", "buffer", "changed in between .* call the module again|modified by an inplace operation"),
    ],
)
def test_a_second_backward_behind_a_change_says_so(name, changed, message):
    _, pm = model_of(name)
    pm.train(changed != "buffer")  # in training a step replaces them itself
    x = X.clone()
    loss = pm(x).square().mean()
    loss.backward(retain_graph=True)
    before = grads(pm)
    if changed == "parameters":
        torch.optim.SGD(pm.parameters(), lr=0.1).step()
    elif changed == "input":
        x.add_(1)
    else:
        pm.get_buffer("1.running_mean").add_(1)
    with pytest.raises(RuntimeError, match=message):
        loss.backward()
    assert all(torch.equal(g, before[n]) for n, g in grads(pm).items())


def test_a_second_backward_that_was_not_announced_is_refused_as_by_torch():
    _, pm = model_of("layers")
    out = pm(X)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_inputs_are_let_go_of_with_the_graph_though_the_output_is_held():
    _, pm = model_of("one layer")
    x = X.clone()
    held = weakref.ref(x.untyped_storage())
    out = pm(x)
    loss = out.sum()
    loss.backward()
    del x, loss
    assert held() is None and out.grad_fn is not None


class Swap(nn.Module):
    """Swaps two buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("a", torch.zeros(3))
        self.register_buffer("b", torch.ones(3))
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        """x: [n, 3] -> [n, 3]."""
        old = self.a.clone()
        self.a.copy_(self.b)
        self.b.copy_(old)
        return self.layer(x)


@pytest.mark.parametrize("gradients", [True, False])
def test_buffers_that_are_swapped_arrive_swapped(gradients):
    with torch.set_grad_enabled(gradients):
        pm = autopar.compile(Swap(), 1, example=(torch.ones(2, 3),))
        pm(torch.ones(2, 3))
    assert pm.get_buffer("a").tolist() == [1, 1, 1] and pm.get_buffer("b").tolist() == [0, 0, 0]
