"""Of a stack of equal layers a few are traced: the program is that of a whole trace, node by node, or it is one."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)  # fmt: skip

from autopar import capture as capturing
from autopar.depth import KEPT, Recorder, stack_of

WIDTH, LAYERS = 4, 9
SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "max_position_embeddings": 8,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 1, "use_cache": False}


def both(monkeypatch, capture):
    """What `capture` gives with few layers traced where that is possible, and with all; and whether it was."""
    used, deep = [], capturing._deep

    def spied(*args):
        found = deep(*args)
        used.append(found is not None)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(capturing, "_deep", spied)
        got = capture()
        patch.setattr(capturing, "_deep", lambda *args: None)
        return got, capture(), used == [True]


def compared(monkeypatch, model, kwargs, training=True):
    """Whether few layers were traced; checks that the program is that of a whole trace."""
    got, want, used = both(monkeypatch, lambda: capturing.capture(model, (), kwargs, training=training))
    assert got.digest() == want.digest()
    assert got.sources == want.sources and got.sinks == want.sinks and got.notes == want.notes
    for mine, plain in zip(got.gm.graph.nodes, want.gm.graph.nodes, strict=True):
        for key in ("address", "phase", "module"):
            assert mine.meta.get(key) == plain.meta.get(key), mine
        assert str(mine.meta.get("val")) == str(plain.meta.get("val")), mine
    return used


def compared_batches(monkeypatch, model, kwargs):
    """As `compared`, with the batch as a symbol."""
    got, want, used = both(monkeypatch, lambda: capturing.capture_batches(model, (), kwargs))
    for size in (1, 2, 3, 16, 17, 64):
        mine, plain = got.at(size), want.at(size)
        assert (mine and mine.digest()) == (plain and plain.digest()), size
    return used


@pytest.mark.parametrize(
    "made",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL, use_cache=True)),  # an empty constant in every layer
        pytest.param(lambda: MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=2)), marks=pytest.mark.slow),
        pytest.param(lambda: BertForMaskedLM(BertConfig(**SMALL)), marks=pytest.mark.slow),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=LAYERS, n_head=2, use_cache=False)),
    ],
    ids=["llama", "llama with a cache", "mixtral", "bert", "gpt2"],
)
def test_hugging_face_models_are_traced_once_a_layer(monkeypatch, made):
    ids = torch.zeros(2, 6, dtype=torch.long)
    assert compared(monkeypatch, made().train(), {"input_ids": ids, "labels": ids})


@pytest.mark.slow
def test_with_the_batch_as_a_symbol(monkeypatch):
    ids = torch.zeros(4, 6, dtype=torch.long)
    model = LlamaForCausalLM(LlamaConfig(**GROUPED)).train()
    assert compared_batches(monkeypatch, model, {"input_ids": ids, "labels": ids})


def test_layers_that_look_at_the_batch(monkeypatch):
    """All alike: the program holds for sizes that all take so. One of those that are not traced: for sizes it takes."""
    batch = {"x": torch.ones(4, WIDTH)}
    alike = Net(after=lambda layer, x: 2 * x if len(x) > 16 else x)
    assert compared_batches(monkeypatch, alike, batch)
    one = Net(after=lambda layer, x: 2 * x if late(layer) and len(x) > 16 else x)
    assert not compared_batches(monkeypatch, one, batch)


def test_layers_that_take_turns_are_traced_whole(monkeypatch):
    model = Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8)).train()
    ids = torch.zeros(2, 6, dtype=torch.long)
    assert not compared(monkeypatch, model, {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize(
    "after, few",
    [
        (lambda layer, x: torch.cat([torch.tensor([]), x]), True),
        (lambda layer, x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]), False),
        (lambda layer, x: x + torch.tensor([]).sum(), False),
        (lambda layer, x: x + torch.cat([torch.tensor([]), torch.tensor([])]).sum(), False),
        (lambda layer, x: torch.cat([torch.tensor([[], [], []]), x], dim=1), False),
    ],
    ids=["dropped", "values", "read", "with another", "two dims"],
)
def test_constants_of_layers(monkeypatch, after, few):
    """A name says nothing about the values of other layers; those that are dropped hold none."""
    assert compared(monkeypatch, Net(after=after), {"x": torch.ones(3, WIDTH)}) == few


class Double(torch.autograd.Function):
    """x, with a gradient of its own."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class Layer(nn.Module):
    """tanh(x W), and what a test adds: `after` is what is done with the result, in the layer."""

    def __init__(self, number, dropout=0.0, norm=False, after=None):
        super().__init__()
        self.number, self.dropout, self.after = number, dropout, after or (lambda layer, x: x)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()

    def forward(self, x, extra=None):
        x = nn.functional.dropout(self.norm(self.linear(x)).tanh(), self.dropout) + x
        return self.after(self, x if extra is None else x + extra)

    def scale(self, grad):
        """A hook with a number of the layer's own."""
        return grad * (3.0 if late(self) else 2.0)


class Net(nn.Module):
    """Layers one after the other; `run` calls one of them."""

    def __init__(self, run=None, end=None, count=LAYERS, **options):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(i, **options) for i in range(count))
        self.run, self.end = run or (lambda net, layer, x, seen: layer(x)), end

    def forward(self, x):
        x, seen = self.first(x), []
        for layer in self.layers:
            seen.append(x)
            x = self.run(self, layer, x, seen)
        loss = x.square().mean()
        return loss if self.end is None else self.end(self, loss, seen)


class Chain(nn.Module):
    """An nn.Sequential within."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS)))

    def forward(self, x):
        return self.body(x).sum()


@pytest.mark.parametrize(
    "made",
    [
        Net, Chain, lambda: Net(dropout=0.5), lambda: Net(norm=True), lambda: Net(count=40),
        lambda: Net(end=lambda net, loss, seen: (loss, seen[0], len(seen))[:2]),
    ],
    ids=["plain", "sequential", "dropout", "batchnorm", "deep", "output"],
)  # fmt: skip
def test_what_is_repeated_is_what_a_whole_trace_has(monkeypatch, made):
    assert compared(monkeypatch, made(), {"x": torch.randn(3, WIDTH)})


def test_forwards_are_traced_whole(monkeypatch):
    assert not compared(monkeypatch, Net(), {"x": torch.randn(3, WIDTH)}, training=False)


def late(layer):
    return layer.number >= KEPT + 1


def without_gradient(net, layer, x, seen):
    with torch.set_grad_enabled(torch.is_grad_enabled() and not late(layer)):
        y = layer(x)
    return y + x


@pytest.mark.parametrize(
    "run",
    [
        lambda net, layer, x, seen: layer(x) * (layer.number + 1),
        lambda net, layer, x, seen: layer(x) / len(net.layers),
        lambda net, layer, x, seen: layer(x).relu() if late(layer) else layer(x),
        lambda net, layer, x, seen: layer(x, x * 2) if late(layer) else layer(x, x * 3),
        lambda net, layer, x, seen: layer(x, seen[-2] if late(layer) else x),
        lambda net, layer, x, seen: layer(x, seen[layer.number // 2]),
        lambda net, layer, x, seen: layer(x, seen[0]),
        lambda net, layer, x, seen: Double.apply(layer(x), 2.0),
        lambda net, layer, x, seen: checkpoint(layer, x, use_reentrant=False) if late(layer) else layer(x),
        lambda net, layer, x, seen: layer(x.detach() + x) if late(layer) else layer(x + x),
        lambda net, layer, x, seen: layer(net.layers[-1].linear(x)),
        lambda net, layer, x, seen: x if layer.number == 7 else layer(x),
        without_gradient,
    ],
    ids=[
        "number", "count", "another op", "another number", "another input", "skip", "embedding", "function outside",
        "checkpoint", "detached", "another layer's weight", "left out", "without gradient",
    ],
)  # fmt: skip
def test_layers_that_differ_or_are_not_alone_are_traced_whole(monkeypatch, run):
    assert not compared(monkeypatch, Net(run), {"x": torch.randn(3, WIDTH)})


def hooked(layer, x):
    if late(layer):
        x.register_hook(lambda grad: grad * 2)
    return x


def hooked_node(layer, x):
    if late(layer):
        x.grad_fn.register_prehook(lambda grads: (grads[0] * 2,))
    return x


def hooked_method(layer, x):
    x.register_hook(layer.scale)
    return x


@pytest.mark.parametrize(
    "after",
    [lambda layer, x: Double.apply(x, 3.0 if late(layer) else 2.0), hooked, hooked_node, hooked_method],
    ids=["function", "hook", "node", "method"],
)
def test_a_backward_that_no_forward_shows_is_traced(monkeypatch, after):
    assert not compared(monkeypatch, Net(after=after), {"x": torch.randn(3, WIDTH)})


double = Double.apply  # as many bind it; no patch of `apply` sees it


class OfObject(torch.autograd.Function):
    """x, its gradient times a number of an object."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (3.0 if late(ctx.layer) else 2.0), None


def halved(net, layer, x, seen):
    """A buffer that all layers read is changed between two of them."""
    x = layer(x, net.mask)
    if layer.number == 4:
        net.mask.mul_(0.5)
    return x


def attended(net, layer, x, seen):
    backend = SDPBackend.MATH if late(layer) else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(backend):
        q = layer(x).view(1, 1, 3, WIDTH)
        return nn.functional.scaled_dot_product_attention(q, q, q).view(3, WIDTH)


@pytest.mark.parametrize(
    "run",
    [
        lambda net, layer, x, seen: double(layer(x), 3.0 if late(layer) else 2.0),
        lambda net, layer, x, seen: OfObject.apply(layer(x), layer),
        lambda net, layer, x, seen: layer(x) * torch.from_numpy(np.full(WIDTH, layer.number, dtype=np.float32)),
        lambda net, layer, x, seen: layer(x) if layer.number else layer(x) * torch.FloatTensor([len(net.layers)]),
        lambda net, layer, x, seen: net.layers[KEPT - layer.number if 0 < layer.number < KEPT else layer.number](x),
        halved, attended,
    ],
    ids=["bound function", "object", "numpy", "outside constant", "order", "between", "kernel"],
)  # fmt: skip
def test_what_no_argument_shows_is_not_taken_for_equal(monkeypatch, run):
    net = Net(run)
    net.register_buffer("mask", torch.ones(WIDTH))
    assert not compared(monkeypatch, net, {"x": torch.randn(3, WIDTH)})


class Body(nn.Module):
    """`body` on x, and the mean of its squares."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x).square().mean()


class Counting(Body):
    """Calls layers by number, as many as there were at first."""

    def __init__(self, layers):
        super().__init__(nn.ModuleList(layers))
        self.count = len(self.body)

    def forward(self, x):
        for number in range(self.count):
            x = self.body[number](x)
        return x.square().mean()


def test_layers_that_change_the_shape_are_traced_whole(monkeypatch):
    layers = (nn.Sequential(nn.Conv1d(2, 2, 3), nn.Tanh()) for _ in range(LAYERS))
    assert not compared(monkeypatch, Body(nn.Sequential(*layers)), {"x": torch.randn(2, 2, 40)})


@pytest.mark.parametrize(
    "made",
    [
        lambda: Counting(Layer(i) for i in range(LAYERS)),
        lambda: Body(nn.Sequential(OrderedDict((f"{i:02d}", Layer(i)) for i in range(LAYERS)))),
    ],
    ids=["counting", "names"],
)
def test_models_that_cannot_be_shortened_are_traced_whole(monkeypatch, made):
    assert not compared(monkeypatch, made(), {"x": torch.randn(3, WIDTH)})


def test_a_list_with_gaps_does_no_harm(monkeypatch):
    net = Net()
    net.more = nn.ModuleList([None] * LAYERS + [nn.Linear(WIDTH, WIDTH)])
    assert compared(monkeypatch, net, {"x": torch.randn(3, WIDTH)})


def test_what_is_seen_of_layers_must_be_equal(monkeypatch):
    for change in (
        lambda net: net.layers[7].requires_grad_(False),
        lambda net: net.layers[7].norm.eval(),
        lambda net: net.layers[7].register_full_backward_hook(lambda *_: None),
        lambda net: setattr(net.layers[7], "linear", net.layers[6].linear),
        lambda net: setattr(net.layers[7].linear, "weight", net.first.weight),
    ):
        net = Net(norm=True)
        change(net)
        assert stack_of(net) is None
        compared(monkeypatch, net, {"x": torch.randn(3, WIDTH)})


def test_what_the_rest_has_of_layers_must_be_equal(monkeypatch):
    for end in (
        lambda net, loss, seen: (loss, *seen),
        lambda net, loss, seen: loss + sum(layer.linear.weight.square().sum() for layer in net.layers),
        lambda net, loss, seen: loss + seen[4].sum(),
        lambda net, loss, seen: (loss, seen[4]),
        lambda net, loss, seen: (loss, len(seen)),
    ):
        assert not compared(monkeypatch, Net(end=end), {"x": torch.randn(3, WIDTH)})


def test_nothing_is_left_behind():
    apply, net = torch.autograd.Function.__dict__["apply"], Net()
    hooks = [len(m._forward_hooks) for m in net.modules()]
    capturing.capture(net, (torch.randn(3, WIDTH),))
    assert torch.autograd.Function.__dict__["apply"] is apply
    assert len(net.layers) == LAYERS and [len(m._forward_hooks) for m in net.modules()] == hooks
    with pytest.raises(ValueError, match="stop"), Recorder(net, stack_of(net), [], lambda: None, repr):
        raise ValueError("stop")
    assert torch.autograd.Function.__dict__["apply"] is apply
