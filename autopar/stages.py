"""From a plan with a pipeline to what one rank runs: the program cut, the rank's stages lowered, the table.

The pipeline's part of the driver.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from autopar import passes
from autopar.capture import compiled
from autopar.costmodel import rules
from autopar.costmodel.rows import Rows, rows_of
from autopar.costmodel.stage_plans import stage_plans
from autopar.errors import BatchError, PlanError
from autopar.graph import BACKWARD, FORWARD, Program, Sink, Value, resolve
from autopar.mesh import Mesh
from autopar.pipeline.cut import Stage, cut
from autopar.pipeline.plans import OWN, inner
from autopar.pipeline.regions import Regions, nbytes, regions_of
from autopar.pipeline.schedules import schedule
from autopar.pipeline.table import homes
from autopar.pipeline.tables import table_of
from autopar.pipeline.weights import divisors
from autopar.plan import Plan
from autopar.runtime.pipeline import Pipelined
from autopar.runtime.stage import LoweredStage, form, forms
from autopar.spec import R, S


@dataclass(frozen=True)
class Place:
    """Where a rank is: its place in the lane, and its coordinates and groups in the mesh of its stage."""

    lane: int
    coordinates: tuple[int, ...]
    group_names: Mapping[str, str]


def lower_pipeline(
    program: Program,
    whole: Program,
    plan: Plan,
    place: Place,
    *,
    full: bool,
    eager: bool = False,
    target: passes.Target = passes.HOST,
    news: str = "",
) -> Pipelined:
    """What the rank at `place` runs of `program`, which is of one micro-batch, under `plan`.

    Args:
        whole: the program of the whole batch, for the weights of micro-batches.
        full: outputs beside the loss are wanted in training.

    Raises:
        PlanError: the plan is not legal for the program. ScheduleError: as `table_of`. BatchError: outputs of
            micro-batches cannot be put together.
    """
    assert plan.pipeline is not None
    pipeline, mine = plan.pipeline, inner(plan)
    ranks = plan.mesh.sizes[plan.mesh.axis(pipeline.axis)]
    table = table_of(pipeline, ranks, program.training)
    stages = cut(program, pipeline.starts)
    home = homes(table)
    if len(stages) != len(home):
        raise PlanError(
            f"the plan cuts the model into {len(stages)} stages, its schedule ({pipeline.schedule}) has {len(home)} on "
            f"{ranks} ranks; give {len(home) - 1} places to cut at"
        )
    plans = stage_plans(program, mine, stages)
    kinds = {s: {a.kind for a in row if a.stage == s} for row in table for s in {a.stage for a in row}}
    lowered = {
        s: _lower(stages[s], plans[s], place, kinds[s], eager, target) for s, at in home.items() if at == place.lane
    }
    loss = loss_of(program)
    wanted = full or loss is None or not program.training
    rows = _rows(program, whole, loss, wanted, pipeline.micro)
    batched, problem = _batched(program, whole, loss, wanted, pipeline.micro, rows)
    if problem:
        raise BatchError(problem)
    if rows.mixing and place.lane == 0 and not any(place.coordinates):
        _tell(rows)
    places = _places(stages, home)
    trained = {k.name for s in stages for k in s.program.sinks if k.kind == "grad" and k.node is not None}
    if pipeline.schedule != OWN and schedule(pipeline.schedule).asynchronous:
        _refuse_shared(stages, home)
    outputs = {k.name: s.index for s in stages for k in s.program.sinks if _is_output(k) and k.name not in s.sends}
    return Pipelined(
        program=_with_constants(program, whole),
        plan=plan,
        table=table,
        stages=lowered,
        micro=pipeline.micro,
        divisors=None
        if loss is None or pipeline.micro == 1
        else divisors(program, whole, loss.name, pipeline.micro, rows.scale),
        loss=loss.name if loss is not None else "",
        at=outputs,
        batched=frozenset(batched),
        full=wanted,
        places=places,
        shared={
            name: tuple(sorted({home[i] for i in at}))
            for s in stages
            for name, at in s.shared.items()
            if len({home[i] for i in at}) > 1 and name in trained
        },
        news=news,
    )


def _refuse_shared(stages: Sequence[Stage], home: Mapping[int, int]) -> None:
    """Stages that step on their own cannot have one parameter: their copies would part."""
    for stage in stages:
        for source in stage.program.of_kind("param"):
            at = stage.shared.get(source.name, ())
            if len({home[s] for s in at}) > 1:
                names = " and ".join((source.name, *source.aliases))
                raise PlanError(
                    f"parameter {names} is used by stages {', '.join(map(str, at))}, which step on their own with this "
                    "schedule; untie it (for Hugging Face models: config.tie_word_embeddings=False), or take a "
                    "synchronous schedule"
                )


def _is_output(sink: Sink) -> bool:
    return sink.kind == "output" and not sink.late


def loss_of(program: Program) -> Sink | None:
    """The loss among the outputs; of a program without a backward the first that can be one, if there is any.

    Raises:
        BatchError: there is none that a backward could start from.
    """
    tangents = program.of_kind("tangent")
    if not program.training:
        outputs = (s for s in program.sinks if s.kind == "output" and s.node is not None)
        return next((s for s in outputs if _scalar(program, s)), None)
    found = next((s for s in program.sinks if s.kind == "output" and tangents and s.name == tangents[0].name), None)
    if len(tangents) != 1 or found is None or not _scalar(program, found):
        raise BatchError(
            f"a pipeline runs the backward by itself, from a loss, and the model's outputs "
            f"({', '.join(t.name for t in tangents)}) are none: return a scalar loss from forward, or pass loss= to "
            "autopar.compile"
        )
    return found


def _scalar(program: Program, sink: Sink) -> bool:
    val = _val(program, sink)
    return isinstance(val, torch.Tensor) and val.dim() == 0 and val.is_floating_point()


def unjoined(program: Program, whole: Program, micro: int, full: bool = False) -> str:
    """Why the outputs of `micro` micro-batches cannot be put together; "" where they can.

    full: outputs beside the loss are wanted in training, too; in evaluation they always are.
    """
    loss = loss_of(program)
    wanted = full or loss is None or not program.training
    return _batched(program, whole, loss, wanted, micro, _rows(program, whole, loss, wanted, micro))[1]


def _with_constants(program: Program, whole: Program) -> Program:
    """The program, with the numbers among its outputs (the length of the batch, say) those of the whole batch."""
    constants = {s.name: s.constant for s in whole.sinks if s.kind == "output" and s.node is None}
    sinks = [
        replace(s, constant=constants.get(s.name, s.constant)) if s.kind == "output" and s.node is None else s
        for s in program.sinks
    ]
    return replace(program, sinks=tuple(sinks))


def _rows(program: Program, whole: Program, loss: Sink | None, wanted: bool, micro: int) -> Rows:
    """What micro-batches have of the values that the outputs need. `wanted`: all outputs, not the loss alone."""
    if micro == 1:
        return Rows({}, ())
    sinks = (s for s in whole.sinks if _is_output(s))
    return rows_of(program, whole, micro, [s for s in sinks if wanted or (loss is not None and s.name == loss.name)])


def _tell(rows: Rows) -> None:
    """Warn of an op that mixes the rows of a batch."""
    first, *others = rows.mixing
    module = first.meta.get("module")
    more = f" (and {len(others)} more)" if others else ""
    warnings.warn(
        f"micro-batches change what the model computes: {first.meta.get('address', first.name)}{more}, in "
        f"{f'module {module}' if module else 'the model itself'}, needs all rows of the batch, and a micro-batch has "
        "only its own: each is computed for itself, and their losses are averaged. Pass micro_batches=1 for the "
        "model as it is; if an argument was cut along a dim that is not the batch, put the batch in its dim 0, or name "
        "it in shared=",
        stacklevel=2,
    )


#: What else helps where outputs cannot be put together.
_REMEDY = "or run the batch whole (micro_batches=1)"


def _batched(
    program: Program, whole: Program, loss: Sink | None, wanted: bool, micro: int, rows: Rows
) -> tuple[list[str], str]:
    """Outputs of which micro-batches have their rows; and why others cannot be put together, where they are wanted."""
    out: list[str] = []
    for one, all_ in zip(program.sinks, whole.sinks):
        if one.kind != "output" or one.node is None or all_.node is None or micro == 1:
            continue
        value = resolve(whole.node(all_.node))
        value = Value(value.node, value.index or all_.index)
        a, b = tuple(_val(program, one).shape), value.shape
        if a and b == (micro * a[0], *a[1:]):
            if wanted and rows.unlike(value, S(0)):
                return out, (
                    f"output {one.name} of {micro} micro-batches cannot be put together: they have its rows in another "
                    f"order, or divided by their own length; return it with the batch as dim 0, undivided, {_REMEDY}"
                )
            out.append(one.name)
        elif not wanted or (loss is not None and one.name == loss.name):
            continue
        elif a != b:
            return out, (
                f"output {one.name} has shape {b} for the whole batch and {a} for one of {micro} micro-batches: they "
                f"are joined along dim 0, which must be {micro} times as long, and all else equal; return a value for "
                f"each row, with the batch as dim 0, {_REMEDY}"
            )
        elif _follows_batch(program, one.node) or rows.unlike(value, R):
            return out, (
                f"output {one.name} depends on the batch and has no row for each of its rows (shape {a}): "
                "from micro-batches it cannot be put together, for they may be to be added, averaged, or neither; "
                f"return a value for each row, and reduce it behind the module, {_REMEDY}"
            )
    return out, ""


def _follows_batch(program: Program, node: str) -> bool:
    """Whether a value is computed from arguments that are divided into micro-batches."""
    divided = {s.node for s in program.of_kind("input") if s.name in program.batch_dims}
    stack, seen = [program.node(node)], set()
    while stack:
        found = stack.pop()
        if found.name in divided:
            return True
        if found not in seen:
            seen.add(found)
            stack.extend(found.all_input_nodes)
    return False


def _val(program: Program, sink: Sink) -> torch.Tensor:
    val = program.node(str(sink.node)).meta["val"]
    return val[sink.index] if isinstance(val, (tuple, list)) else val


def _places(stages: Sequence[Stage], home: Mapping[int, int]) -> dict[str, tuple[int, ...]]:
    """Parameters, and buffers that change, by all their names -> places in the lane that have them."""
    found: dict[str, set[int]] = {}
    for stage in stages:
        changed = {s.name for s in stage.program.sinks if s.kind == "buffer"}
        for source in stage.program.sources:
            if source.kind == "param" or (source.kind == "buffer" and source.name in changed):
                for name in (source.name, *source.aliases):
                    found.setdefault(name, set()).add(home[stage.index])
    return {name: tuple(sorted(at)) for name, at in found.items()}


def stage_of_state(program: Program, starts: Sequence[str]) -> dict[str, int]:
    """Parameters, and buffers that change, that one stage has alone -> that stage."""
    found: dict[str, int] = {}
    for stage in cut(program, starts):
        changed = {s.name for s in stage.program.sinks if s.kind == "buffer" and s.node is not None}
        for source in stage.program.sources:
            if (source.kind == "param" and source.name not in stage.shared) or source.name in changed:
                found[source.name] = stage.index
    return found


def starts_again(program: Program, starts: Sequence[str], stage_of: Mapping[str, int]) -> list[str]:
    """Where stages begin in another program of the same model, so that its state stays where it is (`stage_of_state`).

    The places of the first program where they are there and right, else the gap with the fewest bytes between the last
    op that needs an earlier stage and the first that needs a later one.

    Raises:
        PlanError: the new program reads the parameters in another order.
    """
    regions = regions_of(program)
    at = {n.meta["address"]: i for i, n in enumerate(regions.sequence)}
    buffers = {s.node: s.name for s in program.of_kind("buffer") if s.name in stage_of}
    needs = [
        [
            stage_of[name]
            for name in (*regions.reads(n).params, *(buffers[o.name] for o in n.all_input_nodes if o.name in buffers))
            if name in stage_of
        ]
        for n in regions.sequence
    ]
    out: list[int] = []
    live: list[int] | None = None
    for stage, address in enumerate(starts, 1):
        low = 1 + max((i for i, s in enumerate(needs) if s and min(s) < stage), default=0)
        high = min((i for i, s in enumerate(needs) if s and max(s) >= stage), default=len(needs) - 1)
        low = max(low, out[-1] + 1 if out else 1)
        if low > high:
            raise PlanError(
                f"the model now uses its parameters in another order than in its first call, or others: stage {stage} "
                "cannot keep its own; let the first call (or example=) be one of training, or compile another module "
                "for this kind of call"
            )
        place = at.get(address, -1)
        if not low <= place <= high:
            live = live or _sizes(regions)
            place = min(range(low, high + 1), key=live.__getitem__)
        out.append(place)
    return [regions.sequence[i].meta["address"] for i in out]


def _sizes(regions: Regions) -> list[int]:
    return [nbytes(values) for values in regions.live()]


def _lower(
    stage: Stage, plan: Plan, place: Place, kinds: set[str], eager: bool, target: passes.Target
) -> LoweredStage:
    program, mesh = stage.program, plan.mesh
    local, _ = passes.lower(program, plan, rules.rule_for, target, defer=True, fuses=not eager)
    parts = passes.cut(local, fuses=not eager)
    title = "-".join(map(str, (f"stage{stage.index}", *place.coordinates)))

    def done(gm: torch.fx.GraphModule, what: str) -> torch.fx.GraphModule:
        gm, _ = passes.finish(
            gm, mesh, place.coordinates, place.group_names, f"{what}-{title}", eager, target, plan.copies
        )
        return passes.boxed(gm) if eager else gm

    early = [s for s in program.sources if s.phase == FORWARD]
    late = [s for s in program.sources if s.phase == BACKWARD]
    values = [s for s in program.sinks if s.phase == FORWARD]
    ends = [s for s in program.sinks if s.phase == BACKWARD]
    given = [n for n in parts.forward.graph.nodes if n.op == "placeholder"]
    handed = [n for n in parts.backward.graph.nodes if n.op == "placeholder"]
    handed = handed[len(handed) - len(late) :]
    received = {s.name: form(n) for s, n in zip(early, given)}
    returned = {s.name: form(n) for s, n in zip(late, handed)}
    at = {s.name: i for i, s in enumerate(values) if s.kind == "output"}
    at_end = {s.name: i for i, s in enumerate(ends) if s.kind == "output"}
    halves = passes.halves(parts.backward, [s.kind != "grad" for s in ends]) if "I" in kinds else None
    whole = program.training and "B" in kinds
    reduction = passes.close(local, plan) if program.training else None
    return LoweredStage(
        stage=stage,
        plan=plan,
        training=program.training,
        forward=done(parts.forward, "forward"),
        backward=done(parts.backward, "backward") if whole else None,
        saved_inputs=parts.saved_inputs,
        inputs=done(halves.inputs, "inputs") if halves else None,
        weights=done(halves.weights, "weights") if halves else None,
        input_reads=halves.input_reads if halves else (),
        weight_reads=halves.weight_reads if halves else (),
        reduce=done(reduction.gm, "reduction") if reduction else None,
        reduced=reduction.names if reduction else (),
        receives_forward=tuple(received[name] for name in stage.receives),
        sends_forward=forms(parts.forward, [at[name] for name in stage.sends]),
        receives_backward=tuple(returned[name] for name in stage.receives_back),
        sends_backward=forms(parts.backward, [at_end[name] for name in stage.sends_back]),
        compiler=None if eager else compiled,
    )


def inner_place(mesh: Mesh, rank: int, axis: str, group_names: Mapping[str, str]) -> Place:
    """The place of a rank of `mesh` in the pipeline along `axis`."""
    at, coordinates = mesh.axis(axis), mesh.coordinates(rank)
    rest = tuple(c for a, c in enumerate(coordinates) if a != at)
    return Place(coordinates[at], rest or (0,), {n: g for n, g in group_names.items() if n != axis})


__all__ = [
    "Place", "inner_place", "loss_of", "lower_pipeline", "stage_of_state", "starts_again", "unjoined",
]  # fmt: skip
