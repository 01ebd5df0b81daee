"""Questions about a plan: rebuild what it was made for, find what a name means, and ask the cost model.

`open_plan` builds the model of a plan again from its target; `open_program` takes a program that is at hand. Both give
an `Opened`, on which everything else works.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from autopar import decide, targets
from autopar.capture import capture
from autopar.costmodel import planner, profile
from autopar.costmodel.constraints import STRATEGIES
from autopar.costmodel.devices import DEVICES, Device, part
from autopar.costmodel.explain import Bench, Verdict
from autopar.costmodel.formula import Formula, formula
from autopar.costmodel.tally import compute_seconds, movements, update_seconds
from autopar.errors import ConstraintError, InfeasibleError, PlanError
from autopar.given import check_plan
from autopar.graph import FORWARD, Program, pattern
from autopar.pipeline.cut import cut
from autopar.pipeline.plans import inner
from autopar.plan import Pipeline, Plan, Storage
from autopar.plan import fold as fold_choices
from autopar.recompute import original
from autopar.rule import Choice
from autopar.units import UNLIMITED

#: Told what happens, in a few words.
Tell = Callable[[str], None]
_ANEW = "what the backward computes again was chosen anew"
#: Subjects of one explanation, unless all are asked for.
MOST = 6


def silent(text: str) -> None:
    """Tell nobody."""


@dataclass
class Opened:
    """A plan with the program that it is for, laid out for questions."""

    plan: Plan
    program: Program
    device: str | Device
    constraints: Mapping[str, str]
    limit: float | None
    free_outputs: bool
    bench: Bench


def device_of(plan: Plan, device: str | None = None) -> str | Device:
    """The device that a plan was priced for, or the one asked for.

    Raises:
        PlanError: the plan names one that is unknown here.
    """
    name = device or plan.predicted.get("device")
    if name is None:
        raise PlanError("the plan does not say for which device it was made; name one: --device h100")
    if name in DEVICES:
        return str(name)
    if profile.available():
        measured = profile.load()
        if name in (measured.name, "calibrated"):
            return measured
    raise PlanError(
        f"the plan was made for device {name!r}, which is neither a preset ({', '.join(DEVICES)}) nor what `autopar "
        "calibrate` measured here; name another: --device h100"
    )


def open_program(
    program: Program,
    plan: Plan,
    *,
    device: str | Device | None = None,
    constraints: Mapping[str, str] | None = None,
    memory_limit: float | None = None,
) -> Opened:
    """A plan and its program, laid out. What is not given is as the plan says it was made.

    Raises:
        PlanError: the plan was made for another program, or is not legal.
    """
    refuse_stages(plan)
    where = device if isinstance(device, Device) else device_of(plan, device)
    if constraints is None:
        constraints = dict(plan.solver.get("constraints", {}))
    limit = memory_limit if memory_limit is not None else plan.predicted.get("memory_limit")
    free = plan.solver.get("outputs") == "free" or any(p.kind != "R" for s in plan.outputs.values() for p in s)
    check_plan(program, plan)
    bench = Bench.open(program, plan, where, constraints=constraints, memory_limit=limit, free_outputs=free)
    return Opened(plan, program, where, constraints, limit, free, bench)


def rebuild(plan: Plan, tell: Tell = silent) -> Program:
    """The program of a plan that `autopar plan` made.

    Raises:
        PlanError: it was made in Python. TargetError, CaptureError: its model cannot be built any more.
    """
    if not plan.target:
        raise PlanError(
            "the plan does not say how to build its model: it was made in Python; ask in Python, "
            "autopar.explain(plan, NAME, model, example=...), or make it with `autopar plan TARGET -o FILE`"
        )
    target = targets.Target.from_dict(plan.target)
    tell(f"building {target.text} ...")
    built = targets.build(target)
    tell(f"capturing {target.text} ...")
    if plan.pipeline is not None:  # its decisions are about a micro-batch
        micro = plan.pipeline.micro
        return decide.micro_program(built.model, built.args, built.kwargs, built.loss, micro, plan.computes)
    return capture(built.model, built.args, built.kwargs, loss=built.loss, precision=plan.computes)


def refuse_stages(plan: Plan) -> None:
    """Raise PlanError for a plan with pipeline stages."""
    if plan.pipeline is not None:
        raise PlanError(
            f"the plan has pipeline stages along {plan.pipeline.axis}; `autopar explain` says why they are cut so and "
            "explains parameters and ops; what solves or prices whole plans again is for plans without such an axis: "
            "plan again with other options"
        )


def open_plan(plan: Plan, tell: Tell = silent, *, device: str | None = None, stages: bool = False) -> Opened:
    """As `open_program`, with the program built again from the plan's target.

    stages: a plan with pipeline stages is laid out as what it says of the ranks of a stage, for a micro-batch.
    """
    if not stages:
        refuse_stages(plan)
    program = rebuild(plan, tell)
    if plan.pipeline is None:
        return open_program(program, plan, device=device)
    alone = inner(plan)
    seen = part(device_of(plan, device), plan.mesh, alone.mesh)
    return open_program(program, alone, device=seen, memory_limit=UNLIMITED)


def stages_of(opened: Opened, pipeline: Pipeline, about: Subject) -> dict[int, int]:
    """How many of what a subject means are in each stage of a pipeline."""
    found: Counter[int] = Counter()
    for stage in cut(opened.program, pipeline.starts):
        nodes = stage.program.gm.graph.nodes
        names = {n.meta["address"] for n in nodes if "address" in n.meta}
        names |= {s.name for s in stage.program.sources if s.kind in ("param", "buffer", "input")}
        found[stage.index] = sum(about.name in (name, pattern(name)) for name in names)
    return {stage: count for stage, count in found.items() if count}


# ---- one place -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A class of parameters or ops: its name with layer numbers starred, what it is, how many are decided alike."""

    cls: int
    name: str
    kind: str
    count: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Explanation:
    """What was asked, and per subject one verdict for every mesh axis larger than one. more: subjects left out."""

    name: str
    subjects: tuple[tuple[Subject, tuple[Verdict, ...]], ...]
    more: tuple[str, ...] = ()


def star_name(bench: Bench, cls: int) -> str:
    """Name of a class, layer numbers starred where it stands for several."""
    fold = bench.prices.space.fold
    name = fold.first(cls).name
    return _star(name) if len(fold.members[cls]) > 1 else name


def subject(opened: Opened, cls: int) -> Subject:
    """What a class is, for people."""
    fold = opened.bench.prices.space.fold
    item = fold.first(cls)
    meta = next((m for m in (*item.outs, *item.in_meta) if m is not None), None)
    dtype = str(meta.dtype).removeprefix("torch.") if meta else ""
    return Subject(
        cls, star_name(opened.bench, cls), item.kind, len(fold.members[cls]), meta.shape if meta else (), dtype
    )


def find(opened: Opened, name: str, *, all_ops: bool = False) -> list[int]:
    """Classes that a name means: a parameter, op address or module, exact, starred, a glob, or its beginning or end.

    Of a module: its parameters, and the matmuls, convolutions and attentions of its forward (all_ops: every op of
    both phases; also where it has none of these).

    Raises:
        PlanError: it means nothing; says what is near.
    """
    fold = opened.bench.prices.space.fold
    items = opened.bench.items
    params = {n: fold.of[i] for n, i in items.param.items()}
    ops = {i.name: fold.of[i.index] for i in items.items if i.kind == "op" and not i.constant}
    modules: dict[str, list[tuple[str, int]]] = {}
    for address, cls in (*params.items(), *ops.items()):
        path = address.rpartition(".")[0] if address in params else address.partition(":")[2].rpartition("/")[0]
        parts = path.split(".") if path else []
        for depth in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:depth]), []).append((address, cls))
    for means in _MEANS:
        for known in (params, ops):
            direct = [n for n in known if means(name, n)]
            if direct:
                return list(dict.fromkeys(known[n] for n in direct))
        found = [n for n in modules if means(name, n)]
        if found:
            break
    else:
        near = _near(name, [*params, *modules, *ops])
        hint = f"did you mean {', '.join(near)}?" if near else "`autopar show` lists the modules of a plan"
        raise PlanError(f"nothing in the plan is called {name!r}; {hint}")
    inside = [pair for module in found for pair in modules[module]]
    compute = opened.bench.prices.compute
    main = [
        (address, cls)
        for address, cls in inside
        if address in params or (fold.first(cls).phase == FORWARD and compute.flops(fold.first(cls)) > 0)
    ]
    return list(dict.fromkeys(cls for _, cls in (inside if all_ops or not main else main)))


#: (what was asked, a name) -> whether it is meant; the strictest first.
_MEANS: tuple[Callable[[str, str], bool], ...] = (
    lambda asked, n: n == asked,
    lambda asked, n: _star(n) == asked,
    lambda asked, n: any(c in asked for c in "*?[") and fnmatchcase(n, asked),
    lambda asked, n: any(known.endswith(tuple(s + asked for s in "./:")) for known in (n, _star(n))),
    lambda asked, n: n.startswith(tuple(asked + s for s in "./#")),
)


def _star(name: str) -> str:
    return pattern(name) if "/" in name else pattern(name + ".")[:-1]


def _near(name: str, known: Sequence[str]) -> list[str]:
    stars = list(dict.fromkeys(_star(n) for n in known))
    near = difflib.get_close_matches(name, stars, n=3, cutoff=0.5)
    return near or [n for n in stars if name.lower() in n.lower()][:3]


def ask(
    opened: Opened, name: str, *, solved: bool = True, everything: bool = False, tell: Tell = silent
) -> Explanation:
    """What was chosen at `name` on every axis, what comes next, what it would cost and what decided.

    solved: also solve round each other decision. everything: all subjects, every op of a module.
    """
    classes, alike = _distinct(opened, find(opened, name, all_ops=everything))
    taken = classes if everything else classes[:MOST]
    found = []
    for number, cls in enumerate(taken):
        about = subject(opened, cls)
        about = replace(about, count=alike[cls])
        verdicts = []
        for axis, size in enumerate(opened.plan.mesh.sizes):
            if size > 1 and cls in opened.bench.lowered(axis).classes:
                tell(f"{number + 1} of {len(taken)}: {about.name} on {opened.plan.mesh.names[axis]} ...")
                verdicts.append(opened.bench.ask(cls, axis, solved=solved))
        found.append((about, tuple(verdicts)))
    return Explanation(name, tuple(found), tuple(subject(opened, c).name for c in classes[len(taken) :]))


def _distinct(opened: Opened, classes: Sequence[int]) -> tuple[list[int], dict[int, int]]:
    """One class for all that have the same name but for the layer and are decided alike, and how many items it is for.

    The first and the last layer are classes of their own, as they have other neighbours; mostly they say the same.
    """
    fold, state = opened.bench.prices.space.fold, opened.bench.state
    groups: dict[tuple[object, ...], list[int]] = {}
    for cls in classes:
        decided = state.rows.get(cls) or state.storage.get(cls) or state.outputs.get(cls)
        groups.setdefault((_star(fold.first(cls).name), decided), []).append(cls)
    best = {max(group, key=lambda c: len(fold.members[c])): group for group in groups.values()}
    return list(best), {c: sum(len(fold.members[m]) for m in group) for c, group in best.items()}


# ---- whole plans ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bill:
    """Where the time of a plan goes, one thing after the other.

    hidden_s: what runs beside something else. step_s: the simulated step, the sum of all but that.
    moved: (kind of collective, axis, what travels) -> seconds; number: how many of them a step has; sent: bytes.
    """

    compute_s: float
    update_s: float
    hidden_s: float
    step_s: float
    peak_bytes: float
    memory: Mapping[str, float]
    moved: Mapping[tuple[str, str, str], float] = field(default_factory=dict)
    number: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    sent: Mapping[tuple[str, str, str], float] = field(default_factory=dict)


def bill(opened: Opened) -> Bill:
    """The bill of an opened plan."""
    bench, names = opened.bench, opened.plan.mesh.names
    moved: dict[tuple[str, str, str], float] = {}
    number: dict[tuple[str, str, str], int] = {}
    sent: dict[tuple[str, str, str], float] = {}
    for m in movements(bench.prices, bench.state):
        for s in m.sent:
            key = (s.kind, names[s.axis], m.what)
            moved[key] = moved.get(key, 0.0) + s.seconds * m.edge.count
            number[key] = number.get(key, 0) + m.edge.count
            sent[key] = sent.get(key, 0.0) + s.bytes * m.edge.count
    return Bill(
        sum(compute_seconds(bench.prices, bench.state).values()),
        sum(update_seconds(bench.prices, bench.state).values()),
        bench.price.step_s - bench.step.step_s,
        bench.step.step_s,
        bench.price.peak_bytes,
        dict(bench.price.memory),
        dict(sorted(moved.items(), key=lambda kv: -kv[1])),
        number,
        sent,
    )


@dataclass(frozen=True)
class Rival:
    """Another whole plan. label: what was asked of it. over: bytes by which it misses the limit. error: why none is."""

    label: str
    plan: Plan | None
    bill: Bill | None
    over: float = 0.0
    same: bool = False
    error: str = ""


def solve_again(opened: Opened, *, constraints: Mapping[str, str], limit: float | None, **kept: Any) -> Plan:
    """The best plan for the same program, mesh and device under other constraints.

    kept: `storage` and `choices` of `planner.plan`. Raises as that does.
    """
    plan = opened.plan
    return planner.plan(
        opened.program,
        plan.mesh,
        device=opened.device,
        memory_limit=limit,  # type: ignore[arg-type]
        constraints=constraints,
        input_specs=plan.inputs,
        output_specs="free" if opened.free_outputs else "replicated",
        optimizer=plan.optimizer,
        **{name: plan.solver.get(name, True) for name in ("recompute", "offload")},
        host_state=plan.solver.get("host_state", False),
        compression=plan.compression,
        **kept,
    )


def rivals(opened: Opened, strategies: Sequence[str] = STRATEGIES, tell: Tell = silent) -> list[Rival]:
    """The best plan under each classic strategy on each axis, the other axes free; fitting ones first, by time."""
    found = []
    mesh = opened.plan.mesh
    asked = [(a, s) for a, n in zip(mesh.names, mesh.sizes) if n > 1 for s in strategies]
    for number, (axis, strategy) in enumerate(asked):
        tell(f"{number + 1} of {len(asked)}: {axis}={strategy} ...")
        found.append(_rival(opened, f"{axis}={strategy}", {**opened.constraints, axis: strategy}))
    return sorted(found, key=lambda r: (r.bill is None, r.over > 0, r.bill.step_s if r.bill else 0.0))


def _rival(opened: Opened, label: str, constraints: Mapping[str, str]) -> Rival:
    try:
        try:
            plan = solve_again(opened, constraints=constraints, limit=opened.limit)
        except InfeasibleError:  # then how far off it is says more than that it is
            plan = solve_again(opened, constraints=constraints, limit=UNLIMITED)
    except ConstraintError as error:
        return Rival(label, None, None, error=str(error))
    other = open_program(opened.program, plan, device=opened.device, constraints=constraints, memory_limit=opened.limit)
    cost = bill(other)
    over = max(0.0, cost.peak_bytes - opened.limit) if opened.limit is not None else 0.0
    state, bench = other.bench.to_plan(other.bench.state), opened.bench
    mine = bench.to_plan(bench.state)
    same = state.choices == mine.choices and state.storage == mine.storage
    return Rival(label, plan, cost, over, same)


def constraint_costs(opened: Opened, tell: Tell = silent) -> list[Rival]:
    """The best plan without each of the user's constraints in turn, and without all of them."""
    given = opened.constraints
    left_out = [(f"{k}={v}", {q: w for q, w in given.items() if q != k}) for k, v in given.items()]
    if len(given) > 1:
        left_out.append(("all of them", {}))
    found = []
    for number, (label, rest) in enumerate(left_out):
        tell(f"{number + 1} of {len(left_out)}: without {label} ...")
        found.append(_rival(opened, label, rest))
    return found


def resolve(opened: Opened, keep: Sequence[str], tell: Tell = silent) -> tuple[Plan, int]:
    """The best plan that keeps what the plan decides at the names in `keep`, and how many decisions that are.

    Raises:
        PlanError: a name means nothing. ConstraintError, InfeasibleError: as `planner.plan`.
    """
    fold, items = opened.bench.prices.space.fold, opened.bench.items.items
    classes = {c for name in keep for c in find(opened, name, all_ops=True)}
    state = opened.bench.state
    storage: dict[str, Storage] = {}
    choices: dict[str, tuple[Choice, ...]] = {}
    for cls in classes:
        for member in fold.members[cls]:
            if cls in state.storage:
                storage[items[member].name] = state.storage[cls]
            elif cls in state.rows and original(items[member].name) is None:
                choices[items[member].name] = state.rows[cls]
    tell(f"solving round {len(storage) + len(choices)} decisions ...")
    # Names that are kept and constrained are as they are kept; a strategy holds for the rest of its axis.
    plan = solve_again(opened, constraints=opened.constraints, limit=opened.limit, storage=storage, choices=choices)
    notes = (*plan.notes, _ANEW) if opened.plan.saved else plan.notes
    return replace(plan, target=dict(opened.plan.target), notes=notes), len(storage) + len(choices)


def reprice(opened: Opened) -> Plan:
    """The plan with predicted figures of what it says now."""
    was = opened.plan.predicted
    kept = {k: v for k, v in was.items() if k in ("device", "memory_limit")}
    plan = opened.plan
    return replace(
        plan,
        choices=fold_choices(dict(opened.bench.to_plan(opened.bench.state).choices)),
        predicted={**planner.figures(opened.bench.price, opened.bench.step), **kept},
    )


def sizes_of(text: str) -> dict[str, int]:
    """`batch=32,dp=16` -> a dict.

    Raises:
        PlanError: it cannot be read.
    """
    out = {}
    for word in text.split(","):
        name, _, number = word.strip().partition("=")
        if not name.isidentifier() or not number.isdecimal() or int(number) < 1:
            raise PlanError(f"cannot read sizes {text!r}: write e.g. batch=32,seq=4096,dp=16")
        out[name] = int(number)
    return out


def formula_of(plan: Plan, device: str | None = None, tell: Tell = silent) -> Formula:
    """The formula of a plan that `autopar plan` made.

    Raises:
        PlanError: as `costmodel.formula.formula`, or the plan was made in Python.
    """
    refuse_stages(plan)
    first = rebuild(plan, tell)
    check_plan(first, plan)
    target = targets.Target.from_dict(plan.target)
    built: dict[tuple[int, int], Program] = {(target.batch, target.seq): first}

    def at(batch: int, seq: int) -> Program:
        if (batch, seq) not in built:
            made = targets.build(replace(target, batch=batch, seq=seq))
            built[batch, seq] = capture(made.model, made.args, made.kwargs, loss=made.loss, precision=plan.computes)
        return built[batch, seq]

    tell("does it depend on the sequence? ...")
    shorter = at(target.batch, max(1, target.seq // 2))
    varies = shorter.fingerprint != first.fingerprint or shorter.digest() != first.digest()
    return formula(at, plan, target.batch, target.seq, device_of(plan, device), varies=varies, progress=tell)
