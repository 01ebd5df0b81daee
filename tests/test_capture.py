"""Capture: the program computes what the model computes, and says plainly what it cannot capture."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

from autopar.call import input_key
from autopar.capture import capture
from autopar.errors import BatchError
from autopar.graph import is_op, op_name, results
from tests import parity
from tests.widen import double, widen_to_float64
from tests.zoo import ZOO

TOLERANCE = 1e-9


def _outputs(model: nn.Module, args: tuple, kwargs: dict) -> dict[tuple[str, str], Any]:
    """Loss, gradients and buffers of the eager model, keyed as the sinks of its program."""
    loss = model(*args, **kwargs)
    loss = loss if isinstance(loss, torch.Tensor) else loss[0]
    loss.backward()
    found: dict[tuple[str, str], Any] = {("grad", n): p.grad for n, p in model.named_parameters() if p.requires_grad}
    found |= {("buffer", n): b for n, b in model.named_buffers()}
    return {**found, ("output", "loss"): loss.detach()}


def check(model: nn.Module, args: tuple = (), kwargs: dict | None = None, tolerance: float = TOLERANCE) -> Any:
    """Capture `model`, run the graph on its parameters, compare with the eager model; returns the program."""
    kwargs = kwargs or {}
    with widen_to_float64():
        program = capture(model, args, kwargs)
    got = parity.run_global(program, parity.feeds(program, model, args, kwargs))
    first = next(s.name for s in program.sinks if s.kind == "output")
    with widen_to_float64():
        want = _outputs(model, args, kwargs)
    want["output", first] = want.pop(("output", "loss"))
    want = {k: v for k, v in want.items() if k in got}
    assert {k for k in got if k[0] == "grad"} == {k for k in want if k[0] == "grad"}
    error, where = parity.max_error(got, want)
    assert error < tolerance, f"{where} is off by {error}"
    return program


def ops_of(program: Any) -> set[str]:
    return {op_name(n) for n in program.gm.graph.nodes if is_op(n)}


# ---- the zoo -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(ZOO))
def zoo_program(request):
    """A model of the zoo, checked against eager in float64 (module scope: several tests look at its graph)."""
    model, batch = double(*ZOO[request.param](seed=3))
    return check(model, (), batch)


def test_zoo_equals_eager(zoo_program):
    """Loss, every gradient and every buffer agree (checked while the fixture is made)."""
    assert any(s.kind == "grad" for s in zoo_program.sinks)


FORBIDDEN = (
    "addmm baddbmm mean mean.dim t transpose.int _unsafe_view reshape detach alias clone lift_fresh_copy "
    "native_dropout rand randn bernoulli.p native_batch_norm _native_batch_norm_legit_functional "
    "_assert_tensor_metadata var.correction copy_ add_.Tensor as_strided"
)


def test_zoo_graph_is_canonical(zoo_program):
    graph = zoo_program.gm.graph
    assert not {f"aten.{name}" for name in FORBIDDEN.split()} & ops_of(zoo_program)
    addresses = [n.meta["address"] for n in graph.nodes if is_op(n)]
    assert len(set(addresses)) == len(addresses)
    late = False
    for node in graph.nodes:
        if node.op == "output":
            continue
        assert all(isinstance(v, torch.Tensor) or v is None for v in results(node)), node
        if node.op == "call_function":
            late = late or node.meta["phase"] == "bwd"
            assert late == (node.meta["phase"] == "bwd"), "a forward op after a backward op"
            assert not node.meta["module"].startswith("model.model.model"), node.meta["module"]
            for operand in node.all_input_nodes:
                assert node.meta["phase"] == "bwd" or operand.meta["phase"] == "fwd"
        if node.target is torch.ops.aten.nll_loss_forward.default:
            assert node.args[3] != 1, "a mean over the labels"


def test_zoo_wide_graph_has_no_float32(zoo_program):
    """`widen_to_float64` reaches every cast in the captured graph."""
    narrow = [
        n.name for n in zoo_program.gm.graph.nodes
        if n.op != "output" and any(v is not None and v.dtype == torch.float32 for v in results(n))
    ]  # fmt: skip
    assert narrow == []


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "encoder", "mlp_dropout"])
def test_dropout_is_seeded(name):
    model, batch = ZOO[name](dropout=0.3)
    program = capture(model, (), batch)
    random = [n for n in program.gm.graph.nodes if op_name(n) == "autopar.uniform"]
    assert random and [n.args[1] for n in random] == list(range(len(random)))
    assert all(n.meta["phase"] == "fwd" for n in random), "the backward must use the masks of the forward"
    assert program.sources[-1].kind == "seed"

    def run(seed):
        return parity.run_global(program, parity.feeds(program, model, (), batch, seed))

    first = next(k for k in run(0) if k[0] == "output")
    assert torch.equal(run(1)[first], run(1)[first])
    assert not torch.equal(run(1)[first], run(2)[first])


def test_checkpointed_dropout_has_one_mask():
    """Checkpointing is left to the planner: nothing is computed, or drawn, twice."""

    class Checkpointed(nn.Linear):
        def forward(self, x):
            run = torch.utils.checkpoint.checkpoint
            return run(lambda v: torch.dropout(super(Checkpointed, self).forward(v), 0.5, True), x, use_reentrant=False)

    program = capture(Checkpointed(4, 4), (torch.randn(8, 4),))
    assert sum(op_name(n) == "autopar.uniform" for n in program.gm.graph.nodes) == 1


def test_dropout_statistics():
    """A fraction p is dropped, the rest scaled by 1/(1-p), and the gradient sees the same mask."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Dropout(0.25)).double()
    x = torch.ones(64, 512, 1, dtype=torch.float64)
    nn.init.ones_(model[0].weight)
    program = capture(model, (x,))
    got = parity.run_global(program, parity.feeds(program, model, (x,), {}))
    out = got["output", "output"].detach()
    assert abs(float((out == 0).double().mean()) - 0.25) < 0.01
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / 0.75))
    torch.testing.assert_close(got["grad", "0.weight"].sum(), out.sum())


@pytest.mark.parametrize("name", ["llama", "resnet", "encoder"])
def test_eval_is_forward_only(name):
    model, batch = double(*ZOO[name]())
    model.eval()
    with widen_to_float64():
        program = capture(model, (), batch, training=False)
        with torch.no_grad():
            want = model(**batch)
    assert {s.kind for s in program.sinks} == {"output"} and not program.of_kind("tangent")
    assert all(n.meta["phase"] == "fwd" for n in program.gm.graph.nodes if is_op(n))
    got = parity.run_global(program, parity.feeds(program, model, (), batch))
    packed = program.pack([got["output", s.name] for s in program.sinks])
    assert type(packed) is type(want)
    torch.testing.assert_close(packed[0], want[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(packed[1], want[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "resnet", "bert"])
def test_meta_device_gives_the_same_program(name):
    """A model left on the meta device would be exported without its backward."""
    model, batch = ZOO[name]()
    real = capture(model, (), batch)
    meta = capture(model.to("meta"), (), batch)
    assert {n for n in ops_of(real)} == ops_of(meta)
    assert all(p.is_meta for p in model.parameters())


def test_model_is_left_as_it_was():
    model, batch = ZOO["gpt2"]()
    before = {n: (id(p), p.clone()) for n, p in model.named_parameters()}
    attributes = {n: dict(m.__dict__) for n, m in model.named_modules()}
    capture(model, (), batch)
    assert all(id(p) == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    assert {n: m.__dict__.keys() for n, m in model.named_modules()} == {n: a.keys() for n, a in attributes.items()}
    assert type(torch.ones(2) + 1) is torch.Tensor, "a fake tensor mode is still active"
    capture(model, (), batch)


def test_fake_model():
    """Built under FakeTensorMode (a public way to have a model too big for the machine), captured outside."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(1 << 20, 1 << 16), nn.ReLU(), nn.Linear(1 << 16, 4))
    program = capture(model, (torch.empty(8, 1 << 20, device="meta"),))
    assert sum(s.kind == "grad" and s.node is not None for s in program.sinks) == 4


# ---- parameters and buffers ----------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One weight under two names, a frozen one, an unused one, and a counter."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.a.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.full((8,), 2.0))

    def forward(self, x):
        """The loss."""
        self.calls += 1
        return (self.b(torch.tanh(self.a(x)) * self.scale) ** 2).sum()


def test_tied_frozen_unused_and_buffers():
    model, x = Tied().double(), torch.randn(4, 8, dtype=torch.float64)
    program = check(model, (x,))
    by_name = {s.name: s for s in program.sources}
    assert by_name["a.weight"].aliases == ("b.weight",) and "b.weight" not in by_name
    assert not by_name["a.bias"].trainable and by_name["unused.weight"].trainable
    sinks = {(s.kind, s.name): s for s in program.sinks}
    assert sinks["grad", "unused.weight"].node is None and ("grad", "a.bias") not in sinks
    assert ("buffer", "calls") in sinks and ("buffer", "scale") not in sinks


class Assigned(nn.Module):
    """A buffer that forward replaces, in a submodule, and an attribute it sets."""

    class Inner(nn.Linear):
        """Moving average of its input."""

        def __init__(self):
            super().__init__(8, 8)
            self.register_buffer("average", torch.ones(8))
            self.seen = None
            self.calls = 0

        def forward(self, x):
            """A linear layer."""
            self.average = 0.9 * self.average + 0.1 * x.mean(0)
            self.seen = x
            self.calls += 1
            return super().forward(x - self.average)

    def __init__(self):
        super().__init__()
        self.inner = Assigned.Inner()

    def forward(self, x):
        """The loss: the submodule is called twice."""
        return self.inner(torch.tanh(self.inner(x))).sum()


def test_assigned_buffer_is_a_new_value():
    model = Assigned().double()
    program = check(model, (torch.randn(4, 8, dtype=torch.float64),))
    assert ("buffer", "inner.average") in {(s.kind, s.name) for s in program.sinks}
    assert program.notes == [
        "forward sets attribute 'inner.seen'; the compiled module does not",
        "forward changes attribute 'inner.calls'; its value while capturing is fixed in the graph",
    ]


class StraightThrough(torch.autograd.Function):
    """Rounds forward, passes three times the gradient."""

    @staticmethod
    def forward(ctx, x):
        """Round."""
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        """Not the derivative of rounding."""
        return 3 * grad


class OwnBackward(nn.Module):
    """What only autograd itself knows: a custom function, a hook, a checkpoint, a part without gradients."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.compiled = torch.compile(F.gelu, backend="eager")

    def forward(self, x):
        """The loss."""
        x = StraightThrough.apply(self.layers[0](x) * 4)
        x = self.layers[1](x)
        x.register_hook(lambda grad: grad * 5)
        x = torch.utils.checkpoint.checkpoint(self.layers[2], x.tanh(), use_reentrant=False)
        with torch.no_grad():
            scale = self.layers[3](x)
        return (self.compiled(self.layers[3](x)) * scale).sum()


def test_backward_is_what_autograd_says():
    """torch.export would differentiate the forward instead, and lose all of these silently."""
    torch.manual_seed(2)
    check(OwnBackward().double(), (torch.randn(4, 8, dtype=torch.float64),))


class Norms(nn.Module):
    """Every kind of batch norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList([
            nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, momentum=0.3),
            nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4),
        ])  # fmt: skip
        self.frozen = nn.BatchNorm2d(4)

    def forward(self, x):
        """The loss; the last norm is in eval mode inside a training model."""
        x = self.conv(x)
        for norm in self.norms:
            x = torch.relu(norm(x) + 0.1)
        return (self.frozen.eval()(x) ** 2).mean()


def test_batch_norm_is_sums():
    torch.manual_seed(0)
    model = Norms().double()
    program = check(model, (torch.randn(4, 3, 5, 5, dtype=torch.float64),))
    norms = [n for n in program.gm.graph.nodes if n.op == "call_function" and "batch_norm" in op_name(n)]
    assert {op_name(n) for n in norms} == {
        "aten._native_batch_norm_legit_no_training", "aten.native_batch_norm_backward"
    }  # fmt: skip
    assert not any(n.args[7] for n in norms if "backward" in op_name(n))  # of given statistics only
    convolution = next(n for n in program.gm.graph.nodes if op_name(n) == "aten.convolution")
    assert convolution.args[2] is None


LOSSES = {
    "cross_entropy": lambda x, y: F.cross_entropy(x, (y[:, 0] * 100).long().abs() % 6),
    "cross_entropy_weighted": lambda x, y: F.cross_entropy(
        x, (y[:, 0] * 100).long().abs() % 6, weight=torch.arange(1.0, 7.0, dtype=x.dtype), ignore_index=2
    ),
    "cross_entropy_smooth": lambda x, y: F.cross_entropy(x, (y[:, 0] * 100).long().abs() % 6, label_smoothing=0.1),
    "cross_entropy_soft": lambda x, y: F.cross_entropy(x, y.softmax(-1)),
    "nll_2d": lambda x, y: F.cross_entropy(x.view(2, 6, 2, 2), (y[:, 0] * 100).long().abs().view(2, 2, 2) % 6),
    "mse": F.mse_loss,
    "mse_sum": lambda x, y: F.mse_loss(x, y, reduction="sum"),
    "mse_none": lambda x, y: F.mse_loss(x, y, reduction="none").max(),
    "l1": F.l1_loss,
    "smooth_l1": lambda x, y: F.smooth_l1_loss(x, y, beta=0.3),
    "huber": lambda x, y: F.huber_loss(x, y, delta=0.4),
    "bce": lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), weight=y.abs()),
    "bce_logits": lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid(), pos_weight=y[0].abs()),
    "soft_margin": lambda x, y: F.soft_margin_loss(x, y.sign()),
    "kl": lambda x, y: F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
    "std": lambda x, y: x.std(0).sum() + x.var() + torch.var_mean(x, 1, correction=0)[0].sum(),
    "addmm": lambda x, y: torch.addmm(y[:, :1], x, x.t() @ y, beta=0.5, alpha=2.0).tanh().sum(),
    "baddbmm": lambda x, y: torch.baddbmm(y.view(2, 4, 6), x.view(2, 4, 6), y.view(2, 4, 6).mT @ x.view(2, 4, 6)).sum(),
    "addcmul": lambda x, y: (torch.addcmul(x, x, y, value=0.3) + torch.addcdiv(x, x, y.abs() + 1, value=2.0)).sum(),
    "unsafe_split": lambda x, y: (torch.unsafe_chunk(x, 2)[1] * y[:4]).sum() + torch.unsafe_split(x, 4, 1)[0].max(),
    "unsafe_split_with_sizes": lambda x, y: (torch.unsafe_split_with_sizes(x, [2, 4], 1)[1] * y[:, 2:]).sum(),
    "mv": lambda x, y: (x @ y[0]).tanh().sum() + torch.dot(x[0], y[1]) + torch.outer(x[0], y[0]).sum(),
}


class WithLoss(nn.Module):
    """A linear layer and a loss."""

    def __init__(self, loss):
        super().__init__()
        self.linear, self.loss = nn.Linear(6, 6), loss

    def forward(self, x, y):
        """The loss."""
        return self.loss(self.linear(x), y)


@pytest.mark.parametrize("name", LOSSES)
def test_decompositions_equal_the_ops(name):
    torch.manual_seed(1)
    x, y = torch.randn(2, 8, 6, dtype=torch.float64)
    program = check(WithLoss(LOSSES[name]).double(), (x, y))
    assert not {f"aten.{name}" for name in FORBIDDEN.split()} & ops_of(program)


# ---- arguments and outputs -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pair:
    """A dataclass argument."""

    x: torch.Tensor
    scale: float


class Nested(nn.Module):
    """Arguments and outputs of every shape."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, first, *rest, pair, batch, flag=False, **others):
        """A nested output without a loss."""
        hidden = self.linear(first) + sum(rest) + pair.x * pair.scale + batch["x"] + others["extra"]
        return {"hidden": hidden, "parts": [hidden.sum(), (hidden > 0, "text", None)], "same": hidden, "flag": flag}


def _nested_call() -> tuple[tuple, dict]:
    x = torch.randn(3, 4)
    return (x, x + 1, x + 2), {"pair": Pair(x, 0.5), "batch": {"x": x}, "flag": True, "extra": x}


def test_nested_arguments_and_outputs():
    args, kwargs = _nested_call()
    model = Nested()
    program = capture(model, args, kwargs)
    assert [s.name for s in program.of_kind("input")] == ["first", "rest[0]", "rest[1]", "pair.x", "batch.x", "extra"]
    assert set(program.batch_dims) == {s.name for s in program.of_kind("input")}
    names = [s.name for s in program.sinks if s.kind == "output"]
    assert names == ["hidden", "parts[0]", "parts[1][0]", "parts[1][1]", "parts[1][2]", "same", "flag"]
    assert [s.name for s in program.of_kind("tangent")] == ["hidden", "parts[0]", "same"]
    got = parity.run_global(program, parity.feeds(program, model, args, kwargs))
    packed = program.pack(
        [got["output", s.name] if s.node else s.constant for s in program.sinks if s.kind == "output"]
    )
    want = model(*args, **kwargs)
    assert packed.keys() == want.keys() and packed["flag"] is True and packed["parts"][1][1] == "text"
    torch.testing.assert_close(packed["hidden"], want["hidden"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, k: k.pop("extra"), "argument 'extra' is missing"),
        (lambda a, k: k.update(more=1), "argument 'more' is new"),
        (lambda a, k: k.update(flag=False), "argument 'flag' is False; the model was captured with True"),
        (lambda a, k: k["batch"].update(x=1.0), "argument 'batch.x' is a float; the model was captured with a tensor"),
        (lambda a, k: k["batch"].update(x=torch.ones(3, 4).long()), "argument 'batch.x' has torch.int64"),
        (lambda a, k: a.pop(), "argument 'rest[1]' is missing"),
        (lambda a, k: k.pop("pair"), "the call does not fit Nested.forward: missing a required argument: 'pair'"),
    ],
)
def test_calls_of_another_form_are_refused(change, message):
    args, kwargs = _nested_call()
    program = capture(Nested(), args, kwargs)
    changed = list(args)
    change(changed, kwargs)
    with pytest.raises(BatchError, match=re.escape(message)):
        program.flatten(tuple(changed), kwargs)


def test_positional_and_keyword_calls_are_one():
    x, y = torch.randn(2, 8, 6)
    model = WithLoss(F.mse_loss)
    program = capture(model, (x,), {"y": y})
    assert [s.name for s in program.sources if s.kind == "input"] == ["x", "y"]
    assert all(a is b for a, b in zip(program.flatten((), {"y": y, "x": x}), (x, y)))
    assert input_key(model, (x, y), {}) == input_key(model, (), {"y": y, "x": x})
    assert input_key(model, (x, y), {}) != input_key(model, (x[:4], y[:4]), {})


def test_loss_argument():
    model, x, y = nn.Linear(4, 4), torch.randn(3, 4), torch.randn(3, 4)
    program = capture(model, (x,), {"target": y}, loss=F.mse_loss)
    assert [s.name for s in program.of_kind("input")] == ["input", "target"]
    assert [s.name for s in program.of_kind("tangent")] == ["output"]
    with pytest.raises(BatchError, match="'target' is missing"):
        program.flatten((x,), {})


def test_hugging_face_output_and_cache():
    model, batch = ZOO["llama"]()
    program = capture(model, (), batch)
    assert program.notes == ["output 'past_key_values' (DynamicCache) is None: it serves generation only"]
    assert [s.name for s in program.of_kind("tangent")] == ["loss"]
    loss, logits = torch.ones(()), torch.ones(8, 8, 64)
    packed = program.pack([loss, logits, None])
    assert type(packed).__name__ == "CausalLMOutputWithPast" and packed.loss is loss and packed.logits is logits


def test_fingerprint_knows_the_model_but_not_its_weights():
    one, batch = ZOO["mlp_dropout"](seed=0)
    two, _ = ZOO["mlp_dropout"](seed=1)
    assert capture(one, (), batch).fingerprint == capture(two, (), batch).fingerprint
    dropped, _ = ZOO["mlp_dropout"](seed=0, dropout=0.5)
    assert capture(dropped, (), batch).fingerprint != capture(one, (), batch).fingerprint
