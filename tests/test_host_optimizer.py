"""Gradients and optimizer state on the host: it trains as one device does, and the device holds what is predicted."""

from __future__ import annotations

import copy
import functools
import io
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

import autopar
from autopar.capture import capture
from autopar.costmodel import planner
from autopar.errors import PlanError, RuntimeUseError
from autopar.mesh import Mesh
from autopar.offload import on_host
from autopar.plan import HOST, Plan
from tests.live_bytes import LiveBytes
from tests.widen import widen_to_float64
from tests.zoo import ZOO

STEPS = 3
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "groups": lambda params: torch.optim.AdamW(
        [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
    ),
    "adafactor": lambda params: torch.optim.Adafactor(params),
}


def halved(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def hosted(plan: Plan, part: str) -> Plan:
    """The plan with the state of all parameters, of every second, or of none on the host."""
    names = {"all": list(plan.storage), "some": list(plan.storage)[::2], "none": []}[part]
    return replace(plan, storage={n: replace(s, state=HOST) if n in names else s for n, s in plan.storage.items()})


def example(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model, batch = ZOO[name](seed=0)
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def batches(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Another batch for every step: the same rows, in other orders."""
    return [{k: v.roll(n, 0) for k, v in batch.items()} for n in range(STEPS)]


@functools.cache
def planned(name: str, mesh: str, strategies: str = "") -> str:
    """A plan, as text: of one process, which all ranks then run."""
    constraints = dict(text.split(":") for text in strategies.split())
    with widen_to_float64():
        model, batch = example(name)
        program = capture(model, (), batch)
    return planner.plan(program, Mesh.parse(mesh), constraints=constraints, output_specs="free").to_json()


def compiled(name: str, plan: Plan, optimizer: str, **options: Any) -> autopar.ParallelModule:
    model, batch = example(name)
    return autopar.compile(
        model, plan.mesh, example=batch, plan=plan, optimizer=OPTIMIZERS[optimizer], device="cpu", **options
    )


def plain(
    name: str, optimizer: str, clip: float | None, scheduled: bool
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What one device comes to."""
    model, batch = example(name)
    steps = OPTIMIZERS[optimizer](list(model.parameters()))
    scheduler = halved(steps) if scheduled else None
    losses = []
    for given in batches(batch):
        loss = model(**given).loss
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        steps.step()
        steps.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return {k: v.detach() for k, v in model.state_dict().items()}, losses


def differences(pm: autopar.ParallelModule, losses: list[float], want: Any) -> float:
    """The largest between two trainings, of parameters relative to the largest element, and of losses."""
    state = pm.full_state_dict()
    found = [float((state[k] - v).abs().max() / v.abs().max().clamp(min=1e-3)) for k, v in want[0].items()]
    return max([*found, *(abs(a - b) for a, b in zip(losses, want[1], strict=True))])


def trains(name: str, text: str, part: str, optimizer: str, clip: float | None) -> float:
    """How far training under this plan, with a part of it on the host, is from one device."""
    with widen_to_float64():
        plan = hosted(Plan.from_json(text), part)
        pm = compiled(name, plan, optimizer, clip=clip, lr_scheduler=halved)
        losses = [pm.train_step(**given).item() for given in batches(example(name)[1])]
        trainer = pm._state.trainer
        assert set(trainer.host.params) == set(plan.on_host)
        assert all(p.grad is None for p in pm.parameters())
        assert len(pm.optimizers) == (1 if part == "all" else 2)
        return differences(pm, losses, plain(name, optimizer, clip, True))


@pytest.mark.parametrize(
    ("part", "optimizer", "clip"),
    [
        ("all", "adamw", None),
        ("all", "sgd", 0.1),
        ("some", "adamw", 0.1),
        ("some", "sgd", None),
        ("some", "groups", 0.1),
    ],
)
def test_one_process(part, optimizer, clip):
    assert trains("llama", planned("llama", "dp=1"), part, optimizer, clip) < 1e-12


@pytest.mark.parametrize(
    ("strategy", "part", "optimizer"),
    [("dp:ddp", "all", "adamw"), ("dp:zero3", "all", "adamw"), ("dp:zero3", "some", "sgd"), ("tp:tp", "some", "adamw")],
)
def test_two_processes(two, strategy, part, optimizer):
    plan = planned("llama", f"{strategy[:2]}=2", strategy)
    for error in two.run(trains, "llama", plan, part, optimizer, 0.1):
        assert error < 1e-11


def test_two_axes_and_tied_embeddings(four):
    for error in four.run(trains, "gpt2", planned("gpt2", "dp=2,tp=2", "dp:zero3 tp:tp"), "some", "adamw", 0.1):
        assert error < 1e-11


# ---- state ---------------------------------------------------------------------------------------------------------


def goes_on(text: str) -> None:
    """What is saved, loaded or copied goes on as if nothing had been."""
    with widen_to_float64():
        plan = hosted(Plan.from_json(text), "some")
        given = batches(example("llama")[1])
        pm = compiled("llama", plan, "adamw", clip=0.1)
        for batch in given[:2]:
            pm.train_step(**batch)
        saved = io.BytesIO()
        torch.save([o.state_dict() for o in pm.optimizers], saved)
        weights, twin = copy.deepcopy(pm.state_dict()), copy.deepcopy(pm)
        assert not set(map(id, twin._state.trainer.host.masters.values())) & set(
            map(id, pm._state.trainer.host.masters.values())
        )
        fresh = compiled("llama", plan, "adamw", clip=0.1)
        fresh.train_step(**given[0])  # its masters are others by now, which must follow
        fresh.load_state_dict(weights)
        saved.seek(0)
        for optimizer, state in zip(fresh.optimizers, torch.load(saved, weights_only=False)):
            optimizer.load_state_dict(state)
        ends = []
        for module in (pm, twin, fresh):
            for batch in given[2:]:
                module.train_step(**batch)
            ends.append(module.full_state_dict())
        for other in ends[1:]:
            assert all(torch.equal(ends[0][k], other[k]) for k in ends[0])
        assert differences(pm, [], (plain("llama", "adamw", 0.1, False)[0], [])) < 1e-11
        row = pm.memory_per_rank()[0]
        local = [p.to_local() if isinstance(p, DTensor) else p for p in pm._state.trainer.host.params.values()]
        numbers = 8 * len(local)  # of steps made
        assert row["host"] == 4 * sum(p.nbytes for p in local) + numbers


def test_save_load_and_copy():
    goes_on(planned("llama", "dp=1"))


def test_save_load_and_copy_of_pieces(two):
    two.run(goes_on, planned("llama", "dp=2", "dp:zero3"))


def test_weights_written_between_steps_are_taken_over():
    with widen_to_float64():
        plan = hosted(Plan.from_json(planned("llama", "dp=1")), "all")
        pm, given = compiled("llama", plan, "sgd"), batches(example("llama")[1])
        model, _ = example("llama")
        steps = OPTIMIZERS["sgd"](list(model.parameters()))
        for batch in given:
            pm.train_step(**batch)
            model(**batch).loss.backward()
            steps.step()
            steps.zero_grad()
            with torch.no_grad():
                for p in (*pm.parameters(), *model.parameters()):
                    p.mul_(0.9)
        assert differences(pm, [], (model.state_dict(), [])) < 1e-12


def test_the_host_waits_only_for_what_it_reads_and_writes(monkeypatch):
    """Not for parameters that are on their way up when the next step begins, unless somebody has written to one."""
    pm = net(optimizer=OPTIMIZERS["sgd"])
    x = torch.randn(4, 4)
    pm.train_step(x, target=x)
    host, waits = pm._state.trainer.host, []
    monkeypatch.setattr(host, "wait", lambda: waits.append(1))
    host.forget()
    host.follow()
    assert not waits
    with torch.no_grad():
        pm.weight.mul_(0.5)
    host.follow()
    assert waits and torch.equal(host.masters["weight"], pm.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_is_as_torch_gives_it(dtype):
    x, found = torch.randn(4, 4, dtype=dtype), []
    model = nn.Linear(4, 4, dtype=dtype)
    nn.functional.mse_loss(model(x), x).backward()
    want = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    for part in ("all", "some"):
        given: dict[str, Any] = {"example": {"input": x, "target": x}, "loss": nn.functional.mse_loss, "device": "cpu"}
        plan = hosted(autopar.compile(model, "dp=1", **given).plan, part)
        pm = autopar.compile(model, "dp=1", **given, plan=plan, optimizer=OPTIMIZERS["sgd"])
        pm.optimizers[0].register_step_pre_hook(lambda *_, pm=pm: found.append(pm.clip_grad_norm_(0.1)))
        pm.train_step(x, target=x)
    for norm in found:
        torch.testing.assert_close(norm, want)  # dtype and device too
    assert len(found) == 2


def test_evaluation_between_steps():
    plan = hosted(Plan.from_json(planned("llama", "dp=1")), "all")
    with widen_to_float64():
        pm, (_, batch) = compiled("llama", plan, "adamw"), example("llama")
        first = pm.train_step(**batch)
        pm.eval()
        with_grad = pm(**batch).loss
        assert not with_grad.requires_grad
        pm.train()
        assert pm.train_step(**batch) == pytest.approx(with_grad.item(), abs=1e-12) != first


def sees_all_gradients(text: str) -> None:
    """An optimizer's hook finds every gradient of the plain model, wherever it lies."""
    with widen_to_float64():
        model, batch = example("llama")
        model(**batch).loss.backward()
        pm = compiled("llama", hosted(Plan.from_json(text), "some"), "adamw")
        found: dict[str, torch.Tensor] = {}

        def look(*_: Any) -> None:
            found.update(
                {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in pm.gradients().items()}
            )

        pm.optimizers[0].register_step_pre_hook(look)
        pm.train_step(**batch)
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12)
        assert len(found) == len(list(model.named_parameters()))


def test_hooks_see_all_gradients(two):
    two.run(sees_all_gradients, planned("llama", "dp=2", "dp:zero3"))


def test_compiled_graphs_hand_over_too():
    """Inductor's backward returns all gradients; those on the host are taken behind it."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    x, y = torch.randn(4, 8), torch.randn(4, 4)
    found = []
    for backend in ("eager", "inductor"):
        first = autopar.compile(model, "dp=1", example={"input": x, "target": y}, loss=nn.functional.mse_loss)
        pm = autopar.compile(
            model, "dp=1", example={"input": x, "target": y}, loss=nn.functional.mse_loss, backend=backend,
            plan=hosted(first.plan, "some"), optimizer=OPTIMIZERS["adamw"],
        )  # fmt: skip
        for _ in range(3):
            pm.train_step(x, target=y)
        found.append(pm.full_state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


# ---- memory --------------------------------------------------------------------------------------------------------


class OnDevice(LiveBytes):
    """Live bytes of the device alone, on a machine where the host's memory is the same.

    Masters and memory of gradients say so themselves; of them, and of the state that optimizers have made of them
    before, ops make more that lies there. An op that reads both could not run on a GPU, unless it copies or the host's
    is one number.
    """

    def __init__(self, device: Any, state: Any) -> None:
        super().__init__(device)
        self.made: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in state)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [on_host(t) or t.untyped_storage() in self.made for t in given]
        if given and all(there):
            out = func(*args, **(kwargs or {}))
            self.made.update(t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out
        large = any(t.numel() > 1 for t, host in zip(given, there) if host)
        assert not large or func is torch.ops.aten.copy_.default, f"{func} reads device and host"
        return super().__torch_dispatch__(func, types, args, kwargs)


def state_of(optimizers: Any) -> list[torch.Tensor]:
    return [v for o in optimizers for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)]


def peaks(text: str) -> tuple[int, int]:
    """The peak of a step on the device, the lowest of three (a thread may let go late), and what the host holds."""
    plan, (_, batch) = Plan.from_json(text), ZOO["llama"](seed=0)
    pm = autopar.compile(
        ZOO["llama"](seed=0)[0], plan.mesh, example=batch, plan=plan, optimizer=OPTIMIZERS["adamw"], device="cpu",
        check=False,
    )  # fmt: skip
    found = []
    for _ in range(3):
        pm.train_step(**batch)
        host = pm._state.trainer.host
        mine = state_of([o for o in pm.optimizers if o not in host.optimizers])
        with OnDevice([*pm.parameters(), *pm.buffers(), *batch.values(), *mine], state_of(host.optimizers)) as live:
            pm.train_step(**batch)
        found.append(live.peak)
    return min(found), host.nbytes


def predicted(mesh: str, strategies: str, part: str) -> Plan:
    model, batch = ZOO["llama"](seed=0)
    program = capture(model, (), batch)
    constraints = dict(text.split(":") for text in strategies.split())
    plan = planner.plan(program, Mesh.parse(mesh), constraints=constraints, output_specs="free")
    plan = hosted(plan, part)
    cost = planner.price(program, plan)
    return replace(plan, predicted={**plan.predicted, **cost.as_dict()})


@pytest.mark.parametrize("part", ["all", "some"])
def test_the_device_holds_what_is_predicted(part):
    plan = predicted("dp=1", "", part)
    device, host = peaks(plan.to_json())
    assert plan.predicted["peak_bytes"] == pytest.approx(device, rel=0.02)
    assert sum(plan.predicted["host"].values()) == host
    alone = predicted("dp=1", "", "none").predicted
    assert "host" not in alone
    assert plan.predicted["peak_bytes"] < alone["peak_bytes"] - 0.9 * plan.predicted["host"]["optimizer"]


@pytest.mark.parametrize("strategy", ["dp:ddp", "dp:zero3", "tp:tp"])
def test_every_rank_holds_what_is_predicted(two, strategy):
    plan = predicted(f"{strategy[:2]}=2", strategy, "all")
    for device, host in two.run(peaks, plan.to_json()):
        assert plan.predicted["peak_bytes"] == pytest.approx(device, rel=0.05)
        assert sum(plan.predicted["host"].values()) == host


def test_what_waits_on_the_host_is_told_apart():
    """Of what the forward has saved, and from what the optimizer has there."""
    plan, (_, batch) = Plan.from_json(planned("llama", "dp=1")), example("llama")
    with widen_to_float64():
        program = capture(example("llama")[0], (), batch)
        saved = {a: "offload" for a in plan.choices if a.startswith("fwd:") and "/mm#" in a}
        away = hosted(replace(plan, saved=saved), "some")
        rows = []
        for text in (plan, away):
            pm = compiled("llama", text, "adamw")
            pm.train_step(**batch)
            rows.append(pm.memory_per_rank()[0])
    plain, row = rows
    waits = planner.price(program, replace(away, storage=plan.storage)).host["activations"]
    host = pm._state.trainer.host
    assert plain["host"] == 0 < waits
    assert row["host"] == host.nbytes + waits
    assert row["activations"] <= plain["activations"] - 0.9 * waits
    assert all(on_host(t) for t in (*host.masters.values(), *host._grads.values()))
    assert not any(on_host(p) for p in host.params.values())


# ---- what is refused -----------------------------------------------------------------------------------------------


def net(state: str = HOST, **options: Any) -> autopar.ParallelModule:
    """One linear layer whose weight is on the host."""
    model = nn.Linear(4, 4)
    given = {"input": torch.randn(4, 4), "target": torch.randn(4, 4)}
    loss = nn.functional.mse_loss
    plan = autopar.compile(model, "dp=1", example=given, loss=loss).plan
    plan = replace(plan, storage={**plan.storage, "weight": replace(plan.stored("weight"), state=state)})
    return autopar.compile(model, "dp=1", example=given, loss=loss, plan=plan, **options)


def test_a_plain_loop_is_refused():
    pm, x = net(), torch.randn(4, 4)
    with pytest.raises(RuntimeUseError, match=r"state of weight .* on the host.*call pm.train_step\(batch\)"):
        pm(x, target=x)
    with torch.no_grad():
        assert pm(x, target=x) > 0
    with pytest.raises(RuntimeUseError, match="the module has no optimizer"):
        pm.train_step(x, target=x)


def test_pipelines_are_refused():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(4, 4)
    options: dict[str, Any] = {"example": {"input": x, "target": x}, "loss": nn.functional.mse_loss, "device": "cpu"}
    plan = hosted(autopar.plan(model, "pp=1", **options, micro_batches=2), "all")
    with pytest.raises(PlanError, match='on the host, which pipelines cannot do yet; take "host" out of its storage'):
        autopar.compile(model, "pp=1", **options, plan=plan, optimizer=OPTIMIZERS["sgd"])


def test_an_optimizer_of_other_tensors_is_refused():
    x = torch.randn(4, 4)
    modules: list[autopar.ParallelModule] = []
    modules.append(net(optimizer=lambda params: torch.optim.SGD(modules[0].parameters(), lr=0.1)))
    with pytest.raises(RuntimeUseError, match="make it of its argument alone"):
        modules[0].train_step(x, target=x)


@pytest.mark.parametrize(("made", "words"), [([], "has made nothing of 1 parameters"), ([3], "has made \\[3\\]")])
def test_what_is_no_optimizer_of_the_host_is_refused(made, words):
    pm, x = net(optimizer=lambda params: torch.optim.SGD(params) if len(list(params)) > 1 else made), torch.randn(4, 4)
    pm.bias.requires_grad_(False)
    with pytest.raises(RuntimeUseError, match=words):
        pm.train_step(x, target=x)


def test_a_plan_says_no_other_state():
    with pytest.raises(PlanError, match="'moon' is not one of"):
        net("moon")


def by_norms(text: str) -> None:
    with widen_to_float64():
        pm = compiled("llama", hosted(Plan.from_json(text), "all"), "adafactor")
        pm.train_step(**example("llama")[1])


def test_pieces_are_stepped_by_element_wise_optimizers_only(two):
    for failure in two.failures(by_norms, planned("llama", "dp=2", "dp:zero3")):
        assert "Adafactor would step this rank's piece of" in failure and "as if it were the whole" in failure
