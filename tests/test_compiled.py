"""What inductor makes of a bound graph: equal results, and no argument outlives its last reader."""

from __future__ import annotations

import weakref

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import autopar
from autopar.capture import compiled

aten = torch.ops.aten
_watched: list[weakref.ref] = []
_alive: list[list[bool]] = []


@torch.library.custom_op("autopar_test::look", mutates_args=())
def look(x: torch.Tensor) -> torch.Tensor:
    """A copy; notes which of the watched tensors live."""
    _alive.append([ref() is not None for ref in _watched])
    return x.clone()


@look.register_fake
def _(x):
    return torch.empty_like(x)


def test_arguments_die_and_results_are_those_of_the_graph():
    graph, root = fx.Graph(), torch.nn.Module()
    root.register_buffer("k", torch.full((4, 6), 2.0))
    a, b, c = (graph.placeholder(name) for name in "abc")
    x = graph.call_function(aten.sin.default, (a,))
    x = graph.call_function(torch.ops.autopar_test.look.default, (x,))
    x = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.mul.Tensor, (x, b)), graph.get_attr("k")))
    turned = graph.call_function(aten.t.default, (c,))
    graph.output((x, None, 3, 2.5, c, turned, graph.call_function(aten.cos.default, (turned,))))
    gm, run = fx.GraphModule(root, graph), None
    for _ in range(2):
        box = [torch.randn(4, 6) for _ in range(3)]
        last, want = box[2], gm(*box)
        run = run or compiled(gm, box)
        _watched[:], _alive[:] = [weakref.ref(t) for t in box], []
        got = run(box)
        assert box == [] and _alive == [[False, True, True]]
        assert got[4] is last and got[5].data_ptr() == last.data_ptr()
        for mine, plain in zip(got, want, strict=True):
            torch.testing.assert_close(mine, plain)
            assert not isinstance(plain, torch.Tensor) or mine.stride() == plain.stride()


def test_one_tensor_twice_is_two_at_the_next_call():
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    graph.output((graph.call_function(aten.sub.Tensor, (a, b)),))
    one, two = torch.randn(5), torch.randn(5)
    run = compiled(fx.GraphModule(torch.nn.Module(), graph), [one, one])
    assert torch.equal(run([one, one])[0], one - one)
    assert torch.equal(run([one, two])[0], one - two)


class Products(TorchDispatchMode):
    """Shapes of the products of matrices that ran, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is aten.mm:
            self.shapes.append(tuple(out.shape))
        return out


class Block(nn.Module):
    """x + down(gelu(up(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


def test_gradients_of_weights_are_not_all_left_to_the_end():
    """There what they read has left the caches."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block() for _ in range(3)), nn.Linear(64, 16)), torch.randn(32, 64)
    batch = {"input": x, "target": x[:, :16]}
    module = autopar.compile(model, 1, example=batch, loss=nn.functional.mse_loss, backend="inductor")
    for _ in range(2):  # the first one compiles
        loss = module(**batch)
        with Products() as seen:
            loss.backward()
    weights = [shape[0] != 32 for shape in seen.shapes]  # the others have a row for every row of the batch
    assert sum(weights) == 7 and True in weights[:3]
