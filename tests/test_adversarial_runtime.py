"""Uses that once gave wrong numbers without a word, or an error from inside: each is right, or refused clearly."""

from __future__ import annotations

import copy
import json
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from torch import nn
from torch.distributed.tensor import DTensor

import autopar
from autopar import cli, targets
from autopar.given import check_plan
from autopar.options import parse_bytes
from autopar.plan import Plan

F = nn.functional
ZERO3, DDP = {"constraints": {"dp": "zero3"}}, {"constraints": {"dp": "ddp"}}


class Net(nn.Module):
    """Ids to classes; a loss, a second one, and logits."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 16)

    def forward(self, ids, labels=None):
        hidden = self.norm(self.embed(ids))
        logits = self.head(torch.tanh(hidden))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "aux": hidden.abs().mean(), "logits": logits}


class Scaled(nn.Module):
    """Two tensors of which one may be no batch."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.linear, self.factor = nn.Linear(4, 4).double(), factor

    def forward(self, x, w, extra=None):
        y = self.linear(x) * w.sum() * self.factor
        return (y if extra is None else y * self.linear(extra[0])).pow(2).mean()


def net():
    torch.manual_seed(1)
    return Net().double()


def scaled(factor=1.0):
    torch.manual_seed(1)
    return Scaled(factor)


def batch(step=0):
    g = torch.Generator().manual_seed(step)
    return {"ids": torch.randint(0, 16, (8,), generator=g), "labels": torch.randint(0, 16, (8,), generator=g)}


def compiled(mesh=2, **options):
    return autopar.compile(net(), mesh, **{"example": batch(), **options})


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).double()


def grads(module):
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def assert_grads(ours, plain):
    got, want = grads(ours), grads(plain)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as group:
        yield group


# ---- one process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aux", "logits"])
def test_gradient_of_what_stands_beside_a_loss_is_refused(name):
    out = compiled(1)(**batch())
    (out["loss"] + out[name].detach().mean()).backward()
    out = compiled(1)(**batch())
    with pytest.raises(autopar.RuntimeUseError, match=f"a gradient arrives at output '{name}'.* only that loss"):
        (out["loss"] + out[name].mean()).backward()


def test_autocast_is_part_of_the_program():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    pm = autopar.compile(copy.deepcopy(model), 1, example=(x,))
    for module in (pm, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(x)
            assert out.dtype is torch.bfloat16
        out.float().sum().backward()
    torch.testing.assert_close(pm.get_parameter("0.weight").grad, model[0].weight.grad, rtol=0.05, atol=0.05)
    torch.testing.assert_close(pm(x), model(x), rtol=1e-6, atol=1e-6)


def test_first_call_in_inference_mode():
    model = net()
    pm = autopar.compile(copy.deepcopy(model), 1)
    for module in (pm, model):
        module.eval()
        with torch.inference_mode():
            module(batch()["ids"])
        module.train()
        module(**batch())["loss"].backward()
    assert_grads(pm, model)


def test_a_module_cannot_be_pickled_and_says_what_to_save():
    with pytest.raises(autopar.RuntimeUseError, match=r"cannot be pickled.*save pm\.state_dict"):
        pickle.dumps(compiled(1))


def test_model_changed_before_the_first_call():
    model = net()
    pm = autopar.compile(model, 1)
    model.head = nn.Linear(8, 5).double()
    with pytest.raises(autopar.RuntimeUseError, match=r"has changed between .* head.weight \(16, 8\)"):
        pm(**batch())


@pytest.mark.parametrize("text", ["0.5.5GB", ".", float("inf"), float("nan"), [1], b"1", True])
def test_memory_limits_that_cannot_be_read(text):
    with pytest.raises(autopar.ConstraintError, match="cannot read memory limit"):
        parse_bytes(text)


@pytest.mark.parametrize("constraints", ["dp=zero3", ["dp"], {3: "zero3"}, {"dp": None}])
def test_constraints_that_are_no_texts(constraints):
    with pytest.raises(autopar.ConstraintError, match="pass a dict of texts"):
        autopar.plan(net(), 2, example=batch(), constraints=constraints)


@pytest.mark.parametrize("x", [numbers(4, 4).to_sparse(), numbers(4, 4).to("meta")])
def test_tensors_without_plain_values(x):
    pm = autopar.compile(nn.Linear(4, 4).double(), 1, example=(numbers(4, 4),))
    with pytest.raises(autopar.BatchError, match="pass dense tensors that hold values"):
        pm(x)


# ---- plans and targets ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    return autopar.plan(net(), 2, example=batch())


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("outputs", "logitz", "[dp]", "names the output 'logitz'; the program has aux, logits, loss"),
        ("choices", "fwd:head/mm#0", "i@0", "cannot read choice 'i@0'"),
        ("predicted", "step_s", "fast", "damaged at predicted step_s: cannot read 'fast'"),
        ("predicted", "memory", 3, "damaged at predicted memory"),
    ],
)
def test_edited_plans(plan, section, key, value, message):
    data = json.loads(plan.to_json())
    data[section][key] = value
    with pytest.raises(autopar.PlanError, match=message):
        check_plan(autopar.capture.capture(net(), (), batch()), Plan.from_json(json.dumps(data)))


def test_dump_folder_that_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOPAR_DUMP", str(tmp_path / "file"))
    with pytest.raises(autopar.PassError, match=r"cannot write the stages to .*; set AUTOPAR_DUMP"):
        compiled(1)


def test_plans_that_are_no_plans(plan, tmp_path):
    with pytest.raises(autopar.PlanError, match="is not JSON"):
        Plan.from_json("[" * 100_000)
    with pytest.raises(autopar.PlanError, match=r"plan is a dict; pass an autopar\.Plan"):
        compiled(1, plan=json.loads(plan.to_json()))
    with pytest.raises(autopar.PlanError, match="cannot write plan"):
        plan.save(tmp_path)


CONFIG = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.mark.parametrize(("setting", "message"), [("big", "expected int, got str"), (33, "not a multiple")])
def test_settings_that_a_configuration_refuses(tmp_path, setting, message):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    target = targets.Target(f"hf:{tmp_path}", settings={"hidden_size": setting})
    with pytest.raises(targets.TargetError, match=message):
        targets.build(target)


SOURCE = """
import torch
from torch import nn
def build(batch):
    return nn.Linear(8, 8), {"input": torch.ones(batch, 8), "target": torch.ones(batch, 8)}, nn.functional.mse_loss
def leave():
    raise SystemExit(7)
"""


def test_verify_refuses_what_it_would_have_to_change(tmp_path, capsys):
    (tmp_path / "t.py").write_text(SOURCE)
    path = tmp_path / "plan.json"
    assert cli.main(["plan", f"{tmp_path}/t.py:build", "--mesh", "dp=2", "-o", str(path)]) == 0
    data = json.loads(path.read_text())
    data["choices"][next(c for c in data["choices"] if "/mm#0" in c)] = "zz"
    path.write_text(json.dumps(data))
    assert cli.main(["verify", str(path)]) == 2
    assert "cannot split 'zz'" in capsys.readouterr().err


def test_functions_take_no_settings_and_may_not_leave(tmp_path, capsys):
    (tmp_path / "t.py").write_text(SOURCE)
    assert cli.main(["plan", f"{tmp_path}/t.py:build", "--mesh", "2", "--set", "a=1"]) == 2
    assert "--set changes Hugging Face configurations" in capsys.readouterr().err
    assert cli.main(["plan", f"{tmp_path}/t.py:leave", "--mesh", "2"]) == 2
    assert cli.main(["plan", "hf:", "--mesh", "2"]) == 2


# ---- two ranks: values ---------------------------------------------------------------------------------------------


def local_batches():
    """(kind, ours, the model's) where tensors are named, nested, or no pieces of the batch."""
    rank, x, y, w = dist.get_rank(), numbers(4, 4), numbers(4, 4) + 1, numbers(6)
    mine, out = slice(2 * rank, 2 * rank + 2), []
    first = autopar.compile(scaled(), "dp=2", example={"w": w, "x": x[:2]}, batch="local")
    out.append(("named in another order", first(w=w, x=x[mine]), scaled()(x, w)))
    nested = autopar.compile(scaled(), "dp=2", example=(x[:2], w, [y[:2]]), batch="local")
    out.append(("nested", nested(x[mine], w, [y[mine]]), scaled()(x, w, [y])))
    global_size = autopar.compile(scaled(), "dp=2", example=(x[:2], w[:4], [y[:2]]), batch="local")
    out.append(("as long as the global batch", global_size(x[mine], w[:4], [y[mine]]), scaled()(x, w[:4], [y])))
    return [(what, ours.item(), plain.item()) for what, ours, plain in out]


def test_local_batches_know_their_pieces(ranks):
    for results in ranks.run(local_batches):
        for what, ours, plain in results:
            assert ours == pytest.approx(plain, rel=1e-12), what


def other_scale():
    rank, x = dist.get_rank(), numbers(4, 4)
    pm = autopar.compile(scaled(), "dp=2", example=(x[:2], numbers(6)), batch="local")
    pm(x[2 * rank : 2 * rank + 2], numbers(6) + rank)


def test_what_is_no_piece_must_be_the_same(ranks):
    for text in ranks.failures(other_scale):
        assert text.startswith("BatchError: argument 'w'") and "no piece of the batch" in text


def global_plan():
    x = numbers(4, 4)
    plan = autopar.plan(scaled(), "dp=2", example=(x, x), constraints={"dp": "replicate"})
    same = autopar.compile(scaled(), "dp=2", example=(x, x), plan=plan)(x, x).item()  # made by every rank itself
    assert same == pytest.approx(scaled()(x, x).item(), rel=1e-12)
    autopar.compile(scaled(), "dp=2", example=(x[:2], x[:2]), plan=plan, batch="local")


def test_plan_of_global_batches_takes_no_local_ones(ranks):
    for text in ranks.failures(global_plan):
        assert text.startswith("PlanError: local batches bring input x as [dp], the plan takes it as [-]")


def wrong_id(kind, value):
    constraints = {"fwd:embed/embedding#0": "tp:v", "fwd:/nll_loss_forward#0": "tp:k"}
    pm = autopar.compile(net(), "tp=2", example=batch(), constraints=constraints)
    assert {"v", "k"} <= {str(c) for row in pm.plan.choices.values() for c in row}
    assert pm(**batch())["loss"].item() == pytest.approx(net()(**batch())["loss"].item(), rel=1e-12)
    wrong = batch()
    wrong[kind][1] = value
    pm(**wrong)


@pytest.mark.parametrize(("kind", "value"), [("ids", 16), ("ids", -1), ("labels", 99), ("labels", -3)])
def test_ids_out_of_range_are_no_zeros(ranks, kind, value):
    for text in ranks.failures(wrong_id, kind, value):
        assert text.startswith("IndexError: ") and "out of" in text


def changed_before_backward():
    pm = compiled(**ZERO3)
    loss = pm(**batch())["loss"]
    with torch.no_grad():
        for parameter in pm.parameters():
            parameter.add_(1)
    loss.backward()


def test_parameters_changed_between_forward_and_backward(ranks):
    for text in ranks.failures(changed_before_backward):
        assert "modified by an inplace operation" in text


def other_factor():
    autopar.compile(scaled(1.0 + dist.get_rank()), 2, example=(numbers(4, 4), numbers(6)))


def test_ranks_whose_models_differ_in_a_number(ranks):
    for text in ranks.failures(other_factor):
        assert text.startswith("RankMismatchError: the ranks disagree on the captured program")


class Holder(nn.Module):
    """A module around a compiled one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def copies_and_states():
    one, plain = compiled("dp=2", **ZERO3), net()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(1)
    twin = copy.deepcopy(one)
    Holder(one).load_state_dict(Holder(plain).state_dict())
    other = compiled("tp=2", constraints={"tp": "tp"})
    other.load_state_dict(one.state_dict())  # from another mesh
    for module in (one, other, plain):
        module(**batch())["loss"].backward()
    assert_grads(one, plain)
    assert_grads(other, plain)
    plain = net()
    for module in (twin, plain):
        module(**batch())["loss"].backward()
    assert_grads(twin, plain)
    torch.optim.swa_utils.AveragedModel(one).update_parameters(one)


def test_copies_and_states(ranks):
    ranks.run(copies_and_states)


class Sums(nn.Module):
    """Two sums over the batch beside the loss, which one bucket brings."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x):
        y = self.layer(x)
        return y.sum(0), (y * y).sum(0)


def owned_outputs():
    """What a forward hands out may be written to, copied and saved."""
    pm = autopar.compile(Sums(), "dp=2", example=(numbers(8, 4),), constraints={"dp": "ddp"})
    first, second = pm(numbers(8, 4))
    before = second.detach().clone()
    copy.deepcopy(first.detach())
    first.mul_(2)
    assert torch.equal(second, before) and first.untyped_storage().nbytes() == first.nbytes
    (first.sum() + second.sum()).backward()


def test_outputs_are_the_users_own(ranks):
    ranks.run(owned_outputs)


def elsewhere():
    """A default device of the user's is not where ranks agree."""
    one, given = compiled("dp=2", **ZERO3), batch()
    torch.set_default_device("meta")
    try:
        one(**given)["loss"].backward()
    finally:
        torch.set_default_device(None)
    plain = net()
    plain(**given)["loss"].backward()
    assert_grads(one, plain)


def test_a_default_device_stays_out_of_it(ranks):
    ranks.run(elsewhere)


def training(options):
    """Accumulation, scaled losses, evaluation between forward and backward."""
    ours, plain = compiled(**options), net()
    for module in (ours, plain):
        total = sum(module(**batch(i))["loss"] for i in range(2))
        with torch.no_grad():
            module(**batch(3))
        (total * 512).backward()
        module.eval()
        loss = module(**batch(4))["loss"]
        loss.backward(retain_graph=True)
        loss.backward()
        module.train()
    assert_grads(ours, plain)


@pytest.mark.parametrize("options", [ZERO3, DDP])
def test_training_of_unusual_shape(ranks, options):
    ranks.run(training, options)


def unread():
    """Rank 1 alone fails while it takes its arguments apart, on a step that is known."""
    module = compiled(**DDP)
    module(**batch())["loss"].backward()
    (step,) = module._state.steps.values()
    own = step.program.flatten

    def refuse(args, kwargs):
        raise ValueError("cannot be read")

    rank = torch.distributed.get_rank()
    step.program.flatten = refuse if rank == 1 else own
    error, words = (ValueError, "cannot be read") if rank == 1 else (autopar.RankMismatchError, "rank 1: ValueError")
    with pytest.raises(error, match=words):
        module(**batch(1))
    step.program.flatten = own
    module(**batch(2))["loss"].backward()


def test_a_rank_that_cannot_read_its_arguments_is_heard_of(ranks):
    ranks.run(unread)


def caught():
    """Rank 1 alone brings another batch, which cannot be looked up; whoever catches the error goes on."""
    module = compiled(**DDP)
    for step in range(2):
        module(**batch(step))["loss"].backward()
    wrong = batch(5)
    if torch.distributed.get_rank() == 1:
        wrong["ids"][5] = 99
    with pytest.raises(autopar.BatchError, match="other values on rank 1 than on rank 0"):
        module(**wrong)
    plain = net()
    for m in (module, plain):
        m.zero_grad()
        m(**batch(6))["loss"].backward()
    assert_grads(module, plain)


def test_a_rank_that_fails_on_its_own_batch_hears_and_tells_how_it_differs(ranks):
    ranks.run(caught)


# ---- two ranks: one is lost ----------------------------------------------------------------------------------------


def lost(stage):
    """Rank 1 leaves at a stage."""
    if stage == "compile" and dist.get_rank():
        os._exit(3)
    pm = compiled(timeout=4, **ZERO3)
    loss = pm(**batch())["loss"]
    if stage == "backward" and dist.get_rank():
        os._exit(3)
    loss.backward()


@pytest.mark.parametrize(
    ("stage", "message"),
    [("compile", "MeshError: the processes of mesh dp=2"), ("backward", "RankMismatchError: rank 0: not every rank")],
)
def test_a_rank_that_leaves(ranks, stage, message):
    first, _ = ranks.outcomes(lost, stage, timeout=60)
    assert f"{first.kind}: {first.message}".startswith(message)
