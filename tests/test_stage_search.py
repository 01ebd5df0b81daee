"""What planning a pipeline promises: the limit holds, prices are the machine's, and what is asked for is done."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import autopar
from autopar import report
from autopar.capture import capture
from autopar.costmodel.curve import Curve
from autopar.costmodel.devices import DEVICES, Crowd, Link, Measured, machine, part
from autopar.costmodel.items import items_of
from autopar.costmodel.legal import plan_specs
from autopar.costmodel.liveness import moving
from autopar.costmodel.planner import plan
from autopar.costmodel.stages import Additive, Option, choose
from autopar.costmodel.stages import Link as Between
from autopar.costmodel.stages_chain import Twice
from autopar.errors import ConstraintError, InfeasibleError, PlanError, ScheduleError
from autopar.mesh import Mesh
from autopar.options import ask
from autopar.pipeline.plans import inner_mesh
from autopar.pipeline.schedules import one_f_one_b
from autopar.pipeline.table import to_csv
from autopar.plan import Plan
from autopar.report_pipeline import stages as told
from autopar.report_pipeline import step_of, timeline_of
from autopar.spec import S
from autopar.stage_search import micro_choices, more_choices

pytestmark = pytest.mark.tiny


class Net(nn.Module):
    """A chain of matrices; `shared`: of one matrix again and again."""

    def __init__(self, width: int = 64, layers: int = 8, shared: bool = False) -> None:
        super().__init__()
        one = nn.Linear(width, width)
        self.layers = nn.ModuleList(one if shared else nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.square().mean()


def planned(mesh, rows: int, *, width: int = 64, layers: int = 8, shared: bool = False, **options) -> Plan:
    with torch.device("meta"):
        model, batch = Net(width, layers, shared), torch.zeros(rows, width)
    return autopar.plan(model, mesh, example=(batch,), **{"device": "cpu", **options})


@pytest.mark.parametrize("name", ["zb-v", "interleaved", "1f1b"])
def test_a_limit_holds_for_schedules_with_several_stages_a_rank(name):
    """Also where bytes are ten thousand million times as many as seconds."""
    heavy = [0.1e9, 0.1e9, 0.1e9, 6e9, 6e9, 0.1e9, 0.1e9, 0.1e9]
    chain = Additive([[Option(1e-6, 1e-6, 1e-6, 0.0, b, 1.0, 1.0, 0.0)] for b in heavy], [(1.0, 1.0)] * 7, micro=4)
    found = choose({4: chain}, ranks=2, link=Between(latency=0.0, bandwidth=1e30), limit=10e9, schedules=[name])
    assert max(found.best.peak_bytes) <= 10e9 * (1 + 1e-9)
    free = choose({4: chain}, ranks=2, link=Between(latency=0.0, bandwidth=1e30), schedules=[name])
    assert free.best.seconds <= found.best.seconds


# ---- the machine ---------------------------------------------------------------------------------------------------


def test_links_of_a_stage_are_those_of_the_whole_mesh():
    whole = Mesh.parse("dp=2,pp=8")  # neighbours along dp are eight ranks apart: in two nodes
    seen = part("h100", whole, inner_mesh(whole, "pp"))
    assert machine(seen, inner_mesh(whole, "pp")).links == machine("h100", whole).links[:1] == (seen.slow,)
    near = Mesh.parse("pp=2,dp=8")
    assert machine(part("h100", near, inner_mesh(near, "pp")), inner_mesh(near, "pp")).links == (seen.fast,)


def test_stages_share_a_measured_machine_with_all_ranks():
    curve = Curve(((1.0, 1.0), (2.0, 2.0)))
    own = Measured(
        crowds=(Crowd(1, 1.0, 1.0, 1.0), Crowd(4, 3.0, 3.0, 3.0, 3.0, 0.5)), collectives={"all_reduce/2/4": curve}
    )
    device = dataclasses.replace(DEVICES["cpu"], measured=own)
    whole = Mesh.parse("pp=2,dp=2")
    seen = machine(part(device, whole, inner_mesh(whole, "pp")), inner_mesh(whole, "pp")).device
    assert seen.flops["float32"] == pytest.approx(device.flops["float32"] / 3) and seen.beside == 0.5
    assert seen.collective("all_reduce", 2, 2, 1.5) == curve(1.5)
    crowded = planned("pp=4", 16, device=device, micro_batches=4, schedule="1f1b")
    alone = planned("pp=4", 16, micro_batches=4, schedule="1f1b")
    assert crowded.predicted["step_s"] > 1.5 * alone.predicted["step_s"]  # messages take what they take


# ---- bytes ---------------------------------------------------------------------------------------------------------


def test_a_parameter_that_several_pieces_read_is_there_once():
    found = planned("pp=2", 8, width=256, layers=12, shared=True, schedule="1f1b", micro_batches=4)
    one = (256 * 256 + 256) * 4
    held = found.solver["stage_costs"]["static_bytes"]
    assert max(held) <= 5 * one + 1024  # it, its gradient and that of a micro-batch, two moments


def test_pairs_are_subtracted_from_stages_that_hold_both():
    each = Option(1.0, 1.0, 1.0, 1.0, 10.0, 5.0, 0.0, 0.0)
    more = Option(0.0, 0.0, 0.0, 0.0, 4.0, 1.0, 0.0, 0.0)
    chain = Additive([[each]] * 4, [(1.0, 1.0)] * 3, twice=[Twice(0, 2, more), Twice(2, 3, more)])
    assert [chain.options(0, n)[0].static_bytes for n in (1, 2, 3, 4)] == [10.0, 20.0, 26.0, 32.0]
    assert [chain.options(a, 4)[0].saved_bytes for a in (1, 2, 3)] == [14.0, 9.0, 5.0]
    for first, block in chain.stages():
        for at, numbers in enumerate(block):
            assert tuple(numbers[0]) == pytest.approx(chain.options(first, first + at + 1)[0].numbers())


def test_peaks_count_what_comes_and_goes():
    """One stage of everything, one micro-batch: no less than what the planner says of the plan without stages."""
    flat = planned("dp=2", 64, width=128, layers=4, constraints={"dp": "zero3"})
    more = {"micro_batches": 1, "schedule": "gpipe", "constraints": {"dp": "zero3"}}
    staged = planned("pp=2,dp=2", 64, width=128, layers=4, **more)
    costs = staged.solver["stage_costs"]
    assert min(costs["transient_bytes"]) > 0
    whole = sum(costs["static_bytes"]) + sum(costs["saved_bytes"]) + max(costs["transient_bytes"])
    assert flat.predicted["peak_bytes"] <= whole <= 1.5 * flat.predicted["peak_bytes"]


def test_weights_that_are_kept_are_counted():
    plans = {
        weights: planned("pp=4", 16, schedule="paci", micro_batches=2, weights=weights)
        for weights in ("current", "predicted", "stashed")
    }
    held = {weights: sum(plan.solver["stage_costs"]["static_bytes"]) for weights, plan in plans.items()}
    parameters = 8 * (64 * 64 + 64) * 4
    assert held["predicted"] - held["current"] == pytest.approx(parameters)
    assert held["stashed"] - held["current"] == pytest.approx(2 * parameters)  # two updates while one is in flight


def test_what_is_under_way_belongs_to_its_piece():
    program = capture(Net(32, 4), (torch.zeros(8, 32),), {})
    items, found = items_of(program), plan(program, Mesh.parse("dp=2"), constraints={"dp": "zero3"})
    ops = [i for i in items.items if i.kind == "op"]
    pieces = {i.index: int(i.phase == "bwd") for i in ops}
    (early, late), _ = moving(items, found, plan_specs(items, found), pieces, 2)
    assert early > 0 and late > 0


# ---- micro-batches -------------------------------------------------------------------------------------------------


def options(mesh: str = "pp=4", **more):
    return ask(Mesh.parse(mesh), "cpu", None, None, "auto", "global", None, (), **more)


@pytest.mark.parametrize(
    ("rows", "ranks", "counts"),
    [(12, 4, [4, 6, 12]), (64, 4, [4, 8, 16, 32]), (7, 4, [1, 7]), (2, 4, [2]), (30, 4, [3, 6, 15, 30])],
)
def test_numbers_of_micro_batches_divide_the_batch(rows, ranks, counts):
    assert micro_choices(rows, ranks, options()) == counts


@pytest.mark.slow
def test_more_micro_batches_are_tried_where_nothing_fits():
    assert more_choices(256, [4, 8, 16, 32], options()) == [64, 128, 256]
    assert more_choices(256, [8], options(micro_batches=8)) == []
    many = planned("pp=2", 4096, micro_batches=64, schedule="1f1b")
    found = planned("pp=2", 4096, memory_limit=many.predicted["peak_bytes"] * 1.05)
    assert found.pipeline.micro > 16 and found.predicted["peak_bytes"] <= found.predicted["memory_limit"]


# ---- what is asked for ---------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text(to_csv(one_f_one_b(2, 4)))
    return path


def test_a_table_of_ones_own_is_priced_as_the_schedule_it_is(own):
    table = planned("pp=2", 8, schedule=own)
    named = planned("pp=2", 8, schedule="1f1b", micro_batches=4)
    assert table.predicted["step_s"] == pytest.approx(named.predicted["step_s"])
    assert table.predicted["device"] == "cpu"
    with pytest.raises(InfeasibleError, match="more than the limit"):
        planned("pp=2", 8, schedule=own, memory_limit=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0F0,0F1\n1F0,1F1\n", "no backwards"),
        ("0F0,0B0,0U0\n1F0,1B0,1U0\n", 'leave the U out.*schedule="paci"'),
        ("0F0,0B0\n", "rows for 1 ranks, axis pp of mesh pp=2 has 2"),
    ],
)
def test_tables_that_cannot_train_are_refused_when_read(tmp_path, text, words):
    path = tmp_path / "own.csv"
    path.write_text(text)
    with pytest.raises(ScheduleError, match=words):
        planned("pp=2", 8, schedule=path)
    path.write_bytes(b"\xff\xfe0F0")
    with pytest.raises(ScheduleError, match="neither a file that can be read"):
        planned("pp=2", 8, schedule=path)


def test_a_number_of_devices_with_a_schedule_means_a_pipeline(own):
    found = planned(4, 16, schedule="1f1b", micro_batches=8)
    assert found.pipeline.schedule == "1f1b" and found.pipeline.micro == 8
    assert planned(4, 16, schedule=own).mesh.sizes[0] == 2  # as many ranks in a lane as the table has rows
    with pytest.raises(ScheduleError, match=r"no pipeline of 4 devices goes with .*micro_batches=7"):
        planned(4, 16, micro_batches=7)


def test_a_prime_number_of_devices_may_be_a_pipeline():
    found = planned(2, 16, width=512)
    assert {row["mesh"] for row in found.solver["meshes"]} == {"dp=2", "pp=2"}


# ---- pictures and files --------------------------------------------------------------------------------------------


def test_an_asynchronous_step_is_one_of_many():
    found = planned("pp=2", 16, schedule="paci", micro_batches=8)
    assert step_of(found)[0] == pytest.approx(found.predicted["step_s"])


def test_a_schedule_that_cannot_run_is_not_drawn_as_another():
    found = planned("pp=4", 8, layers=12, schedule="zb-v", micro_batches=4)
    with pytest.raises(ScheduleError, match="dualpipe-v"):
        timeline_of(found, dataclasses.replace(found.pipeline, schedule="dualpipe-v"))


def test_edited_stages_have_no_figures():
    found = planned("pp=2", 8, schedule="1f1b", micro_batches=4)
    for starts in ((), (*found.pipeline.starts, "fwd:layers.7/addmm#0"), ("fwd:layers.1/addmm#0",)):
        edited = dataclasses.replace(found, pipeline=dataclasses.replace(found.pipeline, starts=starts))
        assert "edited after the plan was priced" in str(told(edited)[-1])
        with pytest.raises(PlanError, match="edited after the plan was priced"):
            timeline_of(edited)


def test_nothing_is_split_along_the_stages():
    found = planned("pp=2,dp=2", 8, schedule="1f1b", micro_batches=4)
    name, stored = next(iter(found.storage.items()))
    text = found.to_json()
    assert Plan.from_json(text).to_json() == text
    split = dataclasses.replace(stored, spec=(S(0), stored.spec[1]))
    wrong = dataclasses.replace(found, storage={**found.storage, name: split})
    with pytest.raises(PlanError, match="splits along pp, the axis of the pipeline's stages"):
        Plan.from_json(wrong.to_json())


def test_links_by_name_win_over_those_of_the_whole_mesh():
    seen = part("h100", Mesh.parse("pp=2,dp=2"), Mesh.parse("dp=2"))
    assert machine(seen, Mesh.parse("dp=2"), {"dp": Link(1.0, 1.0)}).links == (Link(1.0, 1.0),)


@pytest.mark.parametrize("mesh", ["dp=2", "pp=2", "pp=2,dp=2", 4])
def test_the_optimizer_is_the_users(mesh):
    """Its state and its update are those of the class that is named; a plan file says which, and is priced so."""
    plans = {name: planned(mesh, 64, optimizer_class=name) for name in ("sgd", "sgd_momentum", "amsgrad")}
    peaks = [plans[name].predicted["peak_bytes"] for name in plans]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1]
    for name, found in plans.items():
        assert Plan.from_json(found.to_json()).optimizer == found.optimizer == name
        assert f"optimizer: {name}" in str(report.heading(found))
        if found.pipeline is None:
            kinds = found.predicted["memory"]
            state = {"sgd": 0, "sgd_momentum": 1, "amsgrad": 3}[name] * kinds["parameters"]
            assert kinds["optimizer"] == pytest.approx(state, rel=1e-3)  # and how many steps there were


def test_an_optimizer_that_nobody_knows():
    with pytest.raises(ConstraintError, match="no optimizer 'adamx' is known; choose one of adamw"):
        planned("dp=2", 64, optimizer_class="adamx")


def test_a_given_plan_says_the_optimizer():
    """Of plans to come for other batches too, unless the user says another: then one of them is wrong."""
    model, batch = Net(), torch.zeros(8, 64)
    plan = autopar.plan(model, "dp=1", example=(batch,), optimizer_class="sgd")
    module = autopar.compile(model, "dp=1", example=(batch,), plan=plan)
    module(torch.zeros(8, 64)).backward()
    with pytest.warns(UserWarning, match="captured"):
        module(torch.zeros(12, 64)).backward()
    assert module.plan.optimizer == "sgd" and module.plan.predicted["memory"]["optimizer"] == 0
    autopar.compile(model, "dp=1", example=(batch,), plan=plan, optimizer_class="sgd")
    with pytest.raises(PlanError, match="the plan is for optimizer 'adamx'; those known are adamw, "):
        autopar.compile(model, "dp=1", example=(batch,), plan=dataclasses.replace(plan, optimizer="adamx"))
    with pytest.raises(PlanError, match="optimizer_class=lion is asked for, and the plan was made for sgd; leave it"):
        autopar.compile(model, "dp=1", example=(batch,), plan=plan, optimizer_class="lion")
