"""What users see when they get it wrong: one clear error of ours, on every rank, and no hang."""

from __future__ import annotations

import json
import random
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import Failure, Ranks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import autopar

X = torch.ones(4, 8)


def mlp(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8))


def compiled(mesh=2, model=None, **options):
    return autopar.compile(model or mlp(), mesh, **{"example": (X,), **options})


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as group:
        yield group


def failures(ranks, function, *args) -> list[str]:
    """`Kind: message` of every rank; each must have failed with an error of ours."""
    texts = []
    for outcome in ranks.outcomes(function, *args, timeout=90):
        assert isinstance(outcome, Failure), f"returned {outcome!r}"
        assert issubclass(getattr(autopar, outcome.kind, int), autopar.AutoparError), str(outcome)
        texts.append(f"{outcome.kind}: {outcome.message}")
    return texts


# ---- meshes --------------------------------------------------------------------------------------------------------


def test_too_big_a_mesh_in_one_process():
    with pytest.raises(autopar.MeshError) as caught:
        compiled("dp=2,tp=4")
    assert str(caught.value) == (
        "mesh dp=2,tp=4 needs 8 processes, 1 is running; start with torchrun --nproc-per-node 8, or use a mesh of 1"
    )


def wrong_size():
    compiled("dp=2,tp=2")


def test_wrong_mesh_size_on_every_rank(ranks):
    assert set(failures(ranks, wrong_size)) == {
        "MeshError: mesh dp=2,tp=2 needs 4 processes, 2 are running; start with torchrun --nproc-per-node 4, "
        "or use a mesh of 2"
    }


@pytest.mark.parametrize("mesh", ["dp=two", "dp=2,,", "=2", "dp=0", "dp=1,dp=1", 2.5, None, True])
def test_meshes_that_cannot_be_read(mesh):
    with pytest.raises(autopar.MeshError):
        compiled(mesh)


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "tvm"}, autopar.RuntimeUseError, "backend 'tvm' does not exist; choose one of eager, inductor"),
        ({"outputs": "some"}, autopar.RuntimeUseError, "outputs='some' does not exist"),
        ({"batch": "mine"}, autopar.RuntimeUseError, "batch='mine' does not exist"),
        ({"batch": "local:tp"}, autopar.MeshError, "mesh dp=1 has no axis 'tp'"),
        ({"device": "h1000"}, autopar.ConstraintError, "no device preset 'h1000'; choose one of a100"),
        ({"memory_limit": "lots"}, autopar.ConstraintError, "cannot read memory limit 'lots'"),
        ({"example": 3}, autopar.BatchError, "example is a int; pass a tuple"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        compiled(1, **options)


def test_local_batches_need_an_axis():
    with pytest.raises(autopar.ConstraintError, match='name the axes that split the batch: batch="local:tp"'):
        compiled("tp=1", batch="local")


# ---- the model -----------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    """Goes where its data says."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        if y.sum() > 0:
            return y
        return -y


def branching():
    compiled(2, Branch())


def test_control_flow_on_data_names_the_line(ranks):
    for text in failures(ranks, branching):
        assert text.startswith("CaptureError: ")
        assert "if y.sum() > 0" in text and "test_bad_input.py" in text


class Moody(nn.Module):
    """Raises on one rank only."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        if dist.get_rank() == 1:
            raise ValueError("not on this rank")
        return self.linear(x)


def moody():
    compiled(2, Moody())


def test_one_rank_raising_alone_stops_all(ranks):
    first, second = failures(ranks, moody)
    assert first.startswith("RankMismatchError: capture failed on 1 of 2 ranks: rank 1: CaptureError: ")
    assert "not on this rank" in first
    assert second.startswith("CaptureError: ") and "not on this rank" in second


def other_model():
    compiled(2, mlp(8 + 8 * dist.get_rank()))


def test_ranks_with_different_models(ranks):
    expected = (
        "RankMismatchError: the ranks disagree on the model: rank 1 differs from rank 0 "
        "(parameter 0.weight (8, 8) torch.float32 there, parameter 0.weight (16, 8) torch.float32 here); "
        "build the same model on every rank (same configuration, same freezing)"
    )
    assert set(failures(ranks, other_model)) == {expected}


class Sided(nn.Module):
    """Same parameters, another path on rank 1."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) if dist.get_rank() == 0 else torch.relu(self.linear(x))


def sided():
    compiled(2, Sided())


def test_ranks_with_different_code(ranks):
    for text in failures(ranks, sided):
        assert text.startswith(
            "RankMismatchError: the ranks disagree on the captured program: rank 1 differs from rank 0"
        )


def other_options():
    compiled(2, outputs="full" if dist.get_rank() else "auto")


def test_ranks_with_different_options(ranks):
    for text in failures(ranks, other_options):
        assert text.startswith("RankMismatchError: the ranks disagree on the options of compile: rank 1 differs")
        assert "outputs auto" in text and "outputs full" in text


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_old_norms_name_the_new_ones(norm):
    model = nn.Sequential(nn.Linear(8, 8), getattr(nn.utils, norm)(nn.Linear(8, 8)))
    expected = rf"module '1' has the old torch\.nn\.utils\.{norm}, .* use torch\.nn\.utils\.parametrizations\.{norm} "
    for make in (autopar.compile, autopar.plan):
        with pytest.raises(autopar.CaptureError, match=expected):
            make(model, 1, example=(X,))
    model = nn.Sequential(nn.Linear(8, 8), getattr(nn.utils.parametrizations, norm)(nn.Linear(8, 8)))
    assert compiled(1, model)(X).shape == (4, 8)


class Noisy(nn.Module):
    """Draws a number outside torch."""

    def __init__(self, draw):
        super().__init__()
        self.linear, self.draw = nn.Linear(8, 8), draw

    def forward(self, x):
        return self.linear(x) * self.draw()


@pytest.mark.parametrize(
    ("draw", "name"), [(random.random, "Python's random"), (lambda: float(np.random.rand()), "numpy.random")]
)
def test_numbers_drawn_outside_torch_are_said(draw, name):
    with pytest.warns(UserWarning, match=f"forward draws from {name}: its values .* are fixed in the graph") as caught:
        autopar.plan(Noisy(draw), 1, example=(X,))
    assert len([w for w in caught if "forward draws" in str(w.message)]) == 1


def test_numbers_drawn_by_torch_are_normal():
    states = random.getstate(), np.random.get_state()[1].tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled(1, Noisy(lambda: torch.rand(())))(X)
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == states


# ---- batches -------------------------------------------------------------------------------------------------------


def rank_shapes():
    compiled()(torch.ones(4 + 2 * dist.get_rank(), 8))


def rank_values():
    compiled()(X + dist.get_rank())


def rank_raises():
    pm = compiled()
    if dist.get_rank() == 1:
        pm(X, X)
    pm(X)


def rank_modes():
    pm = compiled()
    pm.train(dist.get_rank() == 0)
    pm(X)


def rank_dtensor():
    pm = compiled()
    pm(pm.get_parameter("0.weight").detach())


def local_shapes():
    pm = compiled("dp=2", batch="local")
    pm(torch.ones(4 - dist.get_rank(), 8))


@pytest.mark.parametrize(
    ("function", "both"),
    [
        (
            rank_shapes,
            "BatchError: argument 'input' differs between ranks: float32 (4, 8) on rank 0; float32 (6, 8) on rank 1",
        ),
        (rank_values, "BatchError: argument 'input' (float32 (4, 8)) holds other values on rank 1 than on rank 0"),
        (rank_modes, "RankMismatchError: the ranks run different steps: training with gradients on rank 0; evaluation"),
        (rank_dtensor, "BatchError: argument 'input' is a DTensor; pass plain tensors"),
        (
            local_shapes,
            "BatchError: argument 'input' differs between ranks: float32 (4, 8) on rank 0; float32 (3, 8) on",
        ),
    ],
)
def test_batches_that_differ(ranks, function, both):
    for text in failures(ranks, function):
        assert text.startswith(both)


def test_a_call_that_fails_on_one_rank(ranks):
    first, second = failures(ranks, rank_raises)
    assert first.startswith("RankMismatchError: ") and "rank 1" in first
    assert second.startswith("BatchError: ")


def test_input_that_requires_a_gradient():
    with pytest.raises(autopar.BatchError, match=r"gradients of inputs are not computed: pass input.detach\(\)"):
        compiled(1)(X.clone().requires_grad_())


WORDS = {torch.float64: "torch.float64", torch.float16: "torch.float16", torch.int64: "torch.int64"}


@pytest.mark.parametrize("dtype", WORDS)
def test_example_of_another_dtype(dtype):
    expected = rf"fwd:0/mm#0 gets .*: argument 'input' is {WORDS[dtype]}\. Change: pass input\.to\(torch\.float32\)"
    with pytest.raises(autopar.CaptureError, match=expected):
        compiled(1, example=(X.to(dtype),))


def test_norm_of_another_dtype():
    with pytest.raises(autopar.CaptureError, match=r"native_layer_norm#0 gets .*: argument 'input' is torch\.float64"):
        compiled(1, nn.LayerNorm(8), example=(X.double(),))
    assert compiled(1, nn.LayerNorm(8), example=(X.bfloat16(),))(X.bfloat16()).dtype is torch.bfloat16


def double():
    compiled()(X.double())


def ids_as_floats():
    pm = compiled(2, nn.Embedding(4, 8), example=(torch.zeros(4, dtype=torch.int64),))
    pm(torch.zeros(4))


@pytest.mark.parametrize(
    ("function", "dtypes"), [(double, "float64 (4, 8), before float32"), (ids_as_floats, "float32")]
)
def test_call_of_another_dtype(ranks, function, dtypes):
    for text in failures(ranks, function):
        assert text.startswith("CaptureError: cannot capture ")
        assert f"It was captured again because argument 'input' has {dtypes}" in text


def test_tensor_on_another_device():
    with FakeTensorMode(allow_non_fake_inputs=True):
        elsewhere = torch.empty(4, 8, device="xpu")
    with pytest.raises(autopar.BatchError, match=r"argument 'input' is on xpu:0, the module runs on cpu; pass input\."):
        compiled(1)(elsewhere)


def test_call_that_does_not_fit_forward():
    with pytest.raises(
        autopar.BatchError, match=r"Sequential\.forward takes at most 1 positional argument, 2 were given"
    ):
        compiled(1)(X, X)
    with pytest.raises(autopar.BatchError, match="unexpected keyword argument 'mask'"):
        compiled(1)(X, mask=X)


def odd_batch():
    return compiled("dp=2", example=(torch.ones(3, 8),), constraints={"dp": "ddp"})


def test_odd_batch_under_ddp(ranks):
    for text in failures(ranks, odd_batch):
        assert text.startswith("ConstraintError: ") and "3" in text and "dp" in text


def missing_rank():
    """Rank 1 stays away: rank 0 does not wait for ever."""
    pm = compiled(2, timeout=3)
    if dist.get_rank() == 0:
        pm(X)
    raise autopar.RuntimeUseError("stayed away")


def test_a_rank_that_stays_away():
    with Ranks(2) as group:
        first, _ = failures(group, missing_rank)
    assert first.startswith("RankMismatchError: rank 0: not every rank of mesh dp=2 answered within 3 s")


# ---- plans ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    return autopar.plan(mlp(), 2, example=(X,))


def run_plan(path, width=8, mesh=2):
    return compiled(mesh, mlp(width), plan=path)


def test_a_plan_file_runs(ranks, plan, tmp_path):
    plan.save(tmp_path / "plan.json")

    assert len(ranks.run(run_plan_forward, str(tmp_path / "plan.json"))) == 2


def run_plan_forward(path):
    return run_plan(path)(X).sum().item()


def test_plan_file_that_is_not_there(ranks, tmp_path):
    for text in failures(ranks, run_plan, str(tmp_path / "none.json")):
        assert text.startswith("PlanError: cannot read plan")


def test_damaged_plan(ranks, plan, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json()[:-40])
    for text in failures(ranks, run_plan, str(path)):
        assert text.startswith(f"PlanError: {path} is not JSON")
    data = json.loads(plan.to_json())
    data["storage"]["0.weight"][0] = "[dp, dp]"
    path.write_text(json.dumps(data))
    for text in failures(ranks, run_plan, str(path)):
        assert text.startswith(
            f"PlanError: {path} is damaged at storage of 0.weight: placement '[dp, dp]' uses axis 'dp' twice"
        )


def test_plan_of_another_model(ranks, plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    for text in failures(ranks, run_plan, str(tmp_path / "plan.json"), 16):
        assert text.startswith("PlanError: the plan is for another model (fingerprint ")


def test_plan_of_another_mesh(ranks, plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    for text in failures(ranks, run_plan, str(tmp_path / "plan.json"), 8, "tp=2"):
        assert text.startswith("PlanError: the plan is for mesh dp=2, the module is compiled for tp=2")


def two_plans(folder):
    return run_plan(f"{folder}/plan{dist.get_rank()}.json")


def test_ranks_with_different_plans(ranks, plan, tmp_path):
    plan.save(tmp_path / "plan0.json")
    data = json.loads(plan.to_json())
    data["storage"]["0.weight"][1] = {"once": "twice", "twice": "once"}[data["storage"]["0.weight"][1]]
    (tmp_path / "plan1.json").write_text(json.dumps(data))
    for text in failures(ranks, two_plans, str(tmp_path)):
        assert text.startswith("RankMismatchError: the ranks disagree on the plan: rank 1 differs from rank 0")


def half_a_plan(folder):
    return run_plan(f"{folder}/plan{dist.get_rank()}.json")


def test_plan_missing_on_one_rank(ranks, plan, tmp_path):
    plan.save(tmp_path / "plan0.json")
    first, second = failures(ranks, half_a_plan, str(tmp_path))
    assert first.startswith(
        "RankMismatchError: reading the options failed on 1 of 2 ranks: rank 1: PlanError: cannot read plan"
    )
    assert second.startswith("PlanError: cannot read plan")
