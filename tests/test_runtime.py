"""The compiled module as an ordinary nn.Module: one process, and two ranks. The planner itself is tested elsewhere."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import Ranks
from torch import nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.capture import capture
from autopar.costmodel.planner import random_plan
from autopar.runtime.groups import as_mesh


class Net(nn.Module):
    """Tied, frozen and unused parameters, a mutated buffer, a non-persistent one, and a child called `plan`."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.plan = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(dropout)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, ids, labels=None):
        x = self.embed(ids) * self.scale
        x = self.norm(torch.relu(self.plan(x)))
        logits = self.head(self.drop(x) + self.frozen(x))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def net(dropout: float = 0.0) -> Net:
    torch.manual_seed(1)
    return Net(dropout).double()


def batch(step: int = 0, size: int = 8) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return {"ids": torch.randint(0, 16, (size,), generator=g), "labels": torch.randint(0, 16, (size,), generator=g)}


def compiled(model, mesh, seed=None, **options):
    """Compile under a random legal plan (seed), or the planner's own (None)."""
    plan = None
    if seed is not None:
        plan = random_plan(capture(model, (), batch()), as_mesh(mesh), seed)
    return autopar.compile(model, mesh, example=batch(), plan=plan, **options)


def train(module, steps=3, **optimiser):
    """Losses and final state of a few AdamW steps with clipping and a schedule."""
    params = [p for p in module.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=1e-2, **optimiser)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    losses, norms = [], []
    for step in range(steps):
        out = module(**batch(step))
        out["loss"].backward()
        norm = nn.utils.clip_grad_norm_(params, 0.5)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        opt.step()
        schedule.step()
        opt.zero_grad()
        losses.append(out["loss"].item())
    return losses, norms, full(module)


def full(module):
    """State as plain tensors."""
    state = module.full_state_dict() if isinstance(module, autopar.ParallelModule) else module.state_dict()
    return {k: v.detach().clone() for k, v in state.items()}


def assert_same(a, b, rtol=1e-9):
    assert a[0] == pytest.approx(b[0], rel=rtol)
    assert a[1] == pytest.approx(b[1], rel=rtol)
    assert a[2].keys() == b[2].keys()
    for name in a[2]:
        torch.testing.assert_close(a[2][name], b[2][name], rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as group:
        yield group


# ---- one process ---------------------------------------------------------------------------------------------------


@pytest.mark.tiny
def test_mesh_of_one_trains_like_the_model():
    model = net()
    pm = compiled(copy.deepcopy(model), 1)
    assert [n for n, _ in pm.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert pm.state_dict().keys() == model.state_dict().keys()
    assert pm.get_parameter("head.weight") is pm.get_parameter("embed.weight")
    assert_same(train(pm), train(model))


def test_frozen_and_unused_have_no_gradient_and_the_model_is_untouched():
    model = net()
    before = full(model)
    pm = compiled(model, 1)
    pm(**batch())["loss"].backward()
    assert {n for n, p in pm.named_parameters() if p.grad is None} == {
        "frozen.weight", "frozen.bias", "unused.weight", "unused.bias"
    }  # fmt: skip
    assert all(torch.equal(before[k], v) for k, v in full(model).items())
    assert all(p.grad is None for p in model.parameters())


def test_lazy_module_says_so_and_captures_at_the_first_call():
    pm = autopar.compile(net(), 1)
    with pytest.raises(autopar.RuntimeUseError, match="compiled without example="):
        pm.parameters().__next__()
    pm(**batch())["loss"].backward()
    assert pm.get_parameter("plan.weight").grad is not None


def test_gradients_accumulate_and_backward_twice_raises():
    pm = compiled(net().eval(), 1)
    pm(**batch(0))["loss"].backward()
    one = pm.get_parameter("embed.weight").grad.clone()
    out = pm(**batch(0))
    out["loss"].backward(retain_graph=True)
    torch.testing.assert_close(pm.get_parameter("embed.weight").grad, 2 * one)
    out["loss"].backward()
    torch.testing.assert_close(pm.get_parameter("embed.weight").grad, 3 * one)
    with pytest.raises(RuntimeError, match="second time"):
        out["loss"].backward()


def test_new_shape_warns_by_name_and_old_ones_are_kept():
    pm = compiled(net(), 1)
    with pytest.warns(UserWarning, match=r"argument 'ids' has int64 \(6,\), before int64 \(8,\)"):
        pm(**batch(0, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pm(**batch(0, 8))
        pm(**batch(0, 6))


def test_evaluation_changes_no_buffer_and_needs_no_gradient():
    model = net()
    pm = compiled(copy.deepcopy(model), 1)
    pm.eval()
    model.eval()
    before = pm.get_buffer("norm.running_mean").clone()
    with torch.no_grad():
        out = pm(**batch())
        torch.testing.assert_close(out["logits"], model(**batch())["logits"], rtol=1e-12, atol=1e-12)
    assert not out["loss"].requires_grad and torch.equal(before, pm.get_buffer("norm.running_mean"))


def test_call_by_position_and_freezing_after_compile():
    pm = compiled(net(), 1)
    pm.get_parameter("plan.weight").requires_grad_(False)
    pm.get_parameter("frozen.weight").requires_grad_(True)
    pm(*batch().values())["loss"].backward()
    assert pm.get_parameter("plan.weight").grad is None
    assert pm.get_parameter("frozen.weight").grad is not None


def test_dropout_follows_manual_seed():
    pm = compiled(net(0.5), 1)
    losses = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(pm(**batch())["loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_outputs_without_a_loss_take_any_gradient():
    model = nn.Linear(4, 3).double()
    pm = autopar.compile(model, 1, example=(torch.zeros(2, 4).double(),))
    x, weights = torch.randn(2, 4).double(), torch.randn(2, 3).double()
    (pm(x) * weights).sum().backward()
    (model(x) * weights).sum().backward()
    torch.testing.assert_close(pm.get_parameter("weight").grad, model.weight.grad)


def test_loss_given_apart():
    model = nn.Linear(4, 3)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    pm = autopar.compile(model, 1, example={"input": x, "target": y}, loss=nn.functional.cross_entropy)
    torch.testing.assert_close(pm(x, target=y), nn.functional.cross_entropy(model(x), y))


def test_state_dict_round_trip():
    pm, other = compiled(net(), 1), net()
    for p in other.parameters():
        p.data.add_(1)
    pm.load_state_dict(other.state_dict())
    assert_same(([], [], full(pm)), ([], [], full(other)))
    other.load_state_dict(pm.full_state_dict())
    with pytest.raises(autopar.RuntimeUseError, match="assign=True"):
        pm.load_state_dict(other.state_dict(), assign=True)


def test_meta_model_needs_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    pm = autopar.compile(model, 1, example=(torch.zeros(3, 4),))
    with pytest.raises(autopar.RuntimeUseError, match="4 parameters or buffers have no values"):
        pm(torch.zeros(3, 4))
    real = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    pm.load_state_dict(real.state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(pm(x), real(x))
    values = real.state_dict()
    pm = autopar.compile(model, 1, example=(x,), init=lambda name, shape, dtype: values[name])
    torch.testing.assert_close(pm(x), real(x))


def test_moving_or_casting_is_refused():
    with pytest.raises(autopar.RuntimeUseError, match="cannot be moved or cast"):
        compiled(net(), 1).float()


# ---- two ranks -----------------------------------------------------------------------------------------------------


def on_two(seed, mesh="dp=2"):
    model = net()
    pm = compiled(model, mesh, seed)
    assert all(isinstance(p, DTensor) for p in pm.parameters())
    assert [n for n, _ in pm.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert pm.get_parameter("head.weight") is pm.get_parameter("embed.weight")
    return train(pm)


@pytest.mark.tiny
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_two_ranks_train_like_one(ranks, seed):
    reference = train(net())
    for result in ranks.run(on_two, seed):
        assert_same(result, reference)


def optimisers_two(names):
    out = {}
    for name in names:
        for module in (compiled(net(), "tp=2", 1), net()):
            params = [p for p in module.parameters() if p.requires_grad]
            opt = getattr(torch.optim, name)(params, lr=1e-2)
            for step in range(2):
                module(**batch(step))["loss"].backward()
                opt.step()
                opt.zero_grad()
            out.setdefault(name, []).append(full(module))
    return out


def on_device_mesh():
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    return [train(compiled(net(), m, 3)) for m in (mesh, "dp=2,tp=1")]


def test_device_mesh_is_the_same_as_its_text(ranks):
    reference = train(net())
    for by_mesh, by_text in ranks.run(on_device_mesh):
        assert_same(by_mesh, reference)
        assert_same(by_text, reference)


def in_one_program(model, backend):
    return train(autopar.compile(model, 2, example=batch(), backend=backend), steps=2)


class Times(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.weight, self.values = nn.Parameter(torch.ones(4)), values

    def forward(self, x):
        return (x * self.weight * torch.tensor(self.values)).sum()


def test_compiled_graphs_of_one_text_keep_their_constants():
    """No guard tells them apart, so that they must not share what dynamo has compiled."""
    models, x = [Times([1.0, 2.0, 3.0, 4.0]), Times([5.0, 6.0, 7.0, 8.0])], torch.ones(2, 4)
    modules = [autopar.compile(m, "dp=1", example=(x,), backend="inductor") for m in models]
    for _ in range(2):
        assert [module(x).item() for module in modules] == [20.0, 52.0]


def test_a_compiled_graph_refuses_a_parameter_of_another_form():
    """Its kernels would read the memory as what it was."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.ones(1, 4)
    module = autopar.compile(model, "dp=1", example=(x,), backend="inductor")
    weight = module.get_parameter("0.weight")
    was, expected = weight.data, module(x)
    torch.testing.assert_close(expected, model(x))
    weight.data = was.to(torch.bfloat16)
    with pytest.raises(autopar.RuntimeUseError, match=r"weight as torch.float32 .* and gets torch.bfloat16 \(4, 4\)"):
        module(x)
    weight.data = was.t().contiguous().t()
    with pytest.raises(autopar.RuntimeUseError, match=r"with strides \(4, 1\), and gets .* with strides \(1, 4\)"):
        module(x)
    weight.data = was
    torch.testing.assert_close(module(torch.ones(1, 9)[:, :4]), expected)  # contiguous, with a stride of its own


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_inputs_whose_sign_is_yet_to_be_taken(backend):
    """Torch puts off the minus of a conjugate; kernels that read memory do not know."""
    x = torch.randn(3, 4, dtype=torch.complex64)
    model = nn.Sequential(nn.Linear(4, 2))
    module = autopar.compile(model, "dp=1", example=(x.imag,), backend=backend)
    torch.testing.assert_close(module(x.conj().imag), model(-x.imag))


@pytest.mark.slow
def test_inductor(ranks):
    reference = train(net(), steps=2)
    for result in ranks.run(in_one_program, net(), "inductor", timeout=300):
        assert_same(result, reference)


@pytest.mark.slow
def test_optimisers(ranks):
    for result in ranks.run(optimisers_two, ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax"]):
        for ours, plain in result.values():
            assert_same(([], [], ours), ([], [], plain), rtol=1e-8)


def rank_zero_decides():
    torch.manual_seed(dist.get_rank())
    model = Net().double()
    pm = compiled(model, 2, 1)
    return full(pm), full(model)


def test_values_of_rank_zero_are_used(ranks):
    (ours0, plain0), (ours1, plain1) = ranks.run(rank_zero_decides)
    for name in plain0:
        assert torch.equal(ours0[name], plain0[name]) and torch.equal(ours1[name], plain0[name])
    assert any(not torch.equal(plain0[n], plain1[n]) for n in plain0)


def dropout_two(mesh):
    pm = autopar.compile(net(0.5), mesh, example=batch())
    torch.manual_seed(5 + dist.get_rank())  # rank 0's seed decides
    return [pm(**batch(i))["loss"].item() for i in range(3)]


def test_dropout_masks_do_not_depend_on_the_mesh(ranks):
    pm = autopar.compile(net(0.5), 1, example=batch())
    torch.manual_seed(5)
    reference = [pm(**batch(i))["loss"].item() for i in range(3)]
    for losses in ranks.run(dropout_two, "dp=2"):
        assert losses == pytest.approx(reference, rel=1e-12)


def local_batches():
    pm = autopar.compile(net(), "dp=2", example={k: v[:4] for k, v in batch().items()}, batch="local")
    rank = dist.get_rank()
    assert pm.sampler_args == {"num_replicas": 2, "rank": rank}
    params = [p for p in pm.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=1e-2)
    losses = []
    for step in range(2):
        out = pm(**{k: v[4 * rank : 4 * rank + 4] for k, v in batch(step).items()})
        out["loss"].backward()
        opt.step()
        opt.zero_grad()
        losses.append(out["loss"].item())
    return losses


def test_local_batches_equal_the_global_one(ranks):
    model = net()
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    reference = []
    for step in range(2):
        loss = model(**batch(step))["loss"]
        loss.backward()
        opt.step()
        opt.zero_grad()
        reference.append(loss.item())
    for losses in ranks.run(local_batches):
        assert losses == pytest.approx(reference, rel=1e-9)


def checkpoint_round_trip(folder):
    pm = compiled(net(), "dp=2", 1)
    opt = torch.optim.AdamW([p for p in pm.parameters() if p.requires_grad], lr=1e-2)
    pm(**batch())["loss"].backward()
    opt.step()
    saved = full(pm)
    dcp.save({"model": pm.state_dict()}, checkpoint_id=folder)
    torch.manual_seed(99)
    other = compiled(Net().double(), "tp=2", 2)  # stored differently
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state["model"])
    loaded = full(other)
    other.load_state_dict(net().state_dict())
    return saved, loaded, full(other)


def test_distributed_checkpoint_between_plans(ranks, tmp_path):
    plain = full(net())
    for saved, loaded, again in ranks.run(checkpoint_round_trip, str(tmp_path)):
        assert_same(([], [], loaded), ([], [], saved))
        assert_same(([], [], again), ([], [], plain))


def memory_two():
    pm = compiled(net(), "dp=2", 1)
    pm(**batch())["loss"].backward()
    return pm.memory_per_rank()


def test_memory_per_rank(ranks):
    first, second = ranks.run(memory_two)
    assert first == second and len(first) == 2
    assert all(row["parameters"] > 0 and row["gradients"] > 0 and row["activations"] > 0 for row in first)
