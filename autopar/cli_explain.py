"""The commands that answer questions about a plan: explain, top, diff, price, resolve, formula."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from autopar import questions, report, report_pipeline, words
from autopar.cli_tools import emit, emit_json, positive
from autopar.errors import PlanError
from autopar.plan import DEVICE, Plan, Storage
from autopar.questions import Bill, Explanation, Opened, Rival


def add(commands: Any) -> None:
    """Add the commands to the command line."""
    raw = argparse.RawDescriptionHelpFormatter

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str, text: str, epilog: str) -> Any:
        made = commands.add_parser(name, help=help, description=text, epilog=epilog, formatter_class=raw)
        made.set_defaults(run=run)
        return made

    def plan_argument(made: Any, also: str = "") -> None:
        made.add_argument("plan", type=Path, metavar="PLAN.json", help=f"a file written by `autopar plan`{also}")
        made.add_argument("--device", metavar="NAME", help="price for another device than the plan's")
        made.add_argument("--json", action="store_true", help="print JSON and nothing else on stdout")

    made = command(
        "explain", _explain, "why a parameter, module or op is split as it is",
        "Says for every mesh axis what was chosen at NAME, the next best choice, what it would cost in time and\n"
        "memory, and what decided: a communication that would appear, the memory limit, or a constraint of yours.\n"
        "The model is captured again from the plan's target; no weights are allocated.",
        "NAME is a parameter, a module or an op address: exact, with * for the layer number, a glob, or its beginning\n"
        "or end. The answer holds for all layers that the plan treats alike.\n\n"
        "  chosen   what the plan does there on this axis\n"
        "  next     the best plan that does something else there, everything else free to follow on this axis\n"
        "  barred   what would be faster still, but does not fit in memory\n"
        "  alone    other choices with everything else as it is\n"
        "  decided  what tipped it\n\n"
        "examples:\n"
        "  autopar explain plan.json mlp.down_proj.weight\n"
        "  autopar explain plan.json 'model.layers.*.self_attn'\n"
        "  autopar explain plan.json 'fwd:model.layers.*.mlp.up_proj/mm#0' --json",
    )  # fmt: skip
    plan_argument(made, ", perhaps edited")
    made.add_argument(
        "name", metavar="NAME", nargs="?",
        help="parameter, module or op address, or a part or glob of it; without it: why the pipeline is cut so",
    )  # fmt: skip
    made.add_argument("--all", action="store_true", help="every parameter and op that NAME means, backward too")
    made.add_argument(
        "--quick", action="store_true", help="with everything else as it is only: no solving, no `next`, a second"
    )

    made = command(
        "top", _top, "the best plan under each classic strategy, and why it lost",
        "Solves again with each classic strategy pinned on each axis, the other axes free, and shows the best of\n"
        "these plans with the reason why the chosen one is preferred.",
        "examples:\n  autopar top plan.json\n  autopar top plan.json --most 20 --json",
    )  # fmt: skip
    plan_argument(made)
    made.add_argument("--most", type=positive, default=5, metavar="N", help="plans to show (default: 5)")
    made.add_argument(
        "--cost-of-constraints", action="store_true",
        help="instead, solve without each constraint the plan was made with, and show what each one costs",
    )  # fmt: skip

    made = command(
        "diff", _diff, "what two plans do differently, module by module",
        "Shows the modules that two plans split or store differently, and the difference in time by kind of\n"
        "collective and in memory by kind.",
        "examples:\n  autopar diff plan.json edited.json\n  autopar diff a.json b.json --no-model",
    )  # fmt: skip
    made.add_argument("plan", type=Path, metavar="A.json", help="a plan")
    made.add_argument("other", type=Path, metavar="B.json", help="another plan")
    made.add_argument("--device", metavar="NAME", help="price for another device than the plans'")
    made.add_argument("--json", action="store_true", help="print JSON and nothing else on stdout")
    made.add_argument(
        "--no-model", action="store_true", help="from the files alone: decisions, and the figures written in them"
    )

    made = command(
        "price", _price, "check an edited plan and price it again",
        "Checks that a plan, edited by hand, is legal, prices what it says now, and shows the change to the figures\n"
        "in the file. Exit code 1 if it does not fit the memory limit that it was made with.",
        "example:\n  autopar price edited.json -o edited.json",
    )  # fmt: skip
    plan_argument(made, ", perhaps edited")
    made.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan with its new figures here")

    made = command(
        "resolve", _resolve, "solve again round what an edited plan says",
        "Keeps what the plan decides at every name that a --keep matches, and chooses everything else anew.",
        "example:\n  autopar resolve edited.json --keep 'model.layers.*.mlp' --keep lm_head.weight -o plan.json",
    )  # fmt: skip
    plan_argument(made, ", perhaps edited")
    made.add_argument(
        "--keep", action="append", required=True, metavar="NAME",
        help="what to keep, as NAME of `autopar explain`; of a module all its ops and parameters; may be repeated",
    )  # fmt: skip
    made.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the new plan here")

    made = command(
        "formula", _formula, "the plan's cost as a formula in batch, sequence and axis sizes",
        "Prints the serial price of the plan by part as a formula in B (batch), S (sequence) and the mesh axes, and\n"
        "its value at other sizes with the same decisions. The model is captured at seven sizes.",
        "example:\n  autopar formula plan.json --at batch=32,seq=4096 --at dp=16",
    )  # fmt: skip
    plan_argument(made)
    made.add_argument(
        "--at", action="append", default=[], metavar="SIZES",
        help="also its value at, e.g., batch=32,seq=4096,dp=16; what is not said is as in the plan; may be repeated",
    )  # fmt: skip
    made.add_argument("--exact", action="store_true", help="every maximum and link symbol, not only what holds here")


def _open(args: argparse.Namespace, tell: questions.Tell) -> Opened:
    return questions.open_plan(Plan.load(args.plan), tell, device=args.device)


def _explain(args: argparse.Namespace) -> int:
    plan = Plan.load(args.plan)
    if args.name is None:
        return _explain_stages(plan, args.json)
    with Console(stderr=True).status("reading the plan ...") as spinner:
        opened = questions.open_plan(plan, spinner.update, device=args.device, stages=True)
        found = questions.ask(opened, args.name, solved=not args.quick, everything=args.all, tell=spinner.update)
    if args.json:
        emit_json(explanation_data(opened, found))
        return 0
    if plan.pipeline is not None:
        for about, _ in found.subjects:
            at = questions.stages_of(opened, plan.pipeline, about)
            emit([Text(f"{about.name}: in stage " + ", ".join(f"{s} ({n})" for s, n in at.items()))])
    emit(words.explanation(opened, found))
    return 0


def _explain_stages(plan: Plan, json: bool) -> int:
    """Why a pipeline has these stages and this schedule, with what else was found."""
    if plan.pipeline is None:
        raise PlanError("name what to explain: a parameter, a module or an op; the plan has no pipeline stages")
    if json:
        emit_json({"pipeline": asdict(plan.pipeline), "found": plan.solver.get("stages", [])})
    else:
        emit(report_pipeline.stages(plan))
    return 0


def _top(args: argparse.Namespace) -> int:
    with Console(stderr=True).status("reading the plan ...") as spinner:
        opened = _open(args, spinner.update)
        if args.cost_of_constraints and not opened.constraints:
            raise PlanError("the plan was made without constraints, so none of them costs anything")
        mine = questions.bill(opened)
        if args.cost_of_constraints:
            found = questions.constraint_costs(opened, spinner.update)
        else:
            found = questions.rivals(opened, tell=spinner.update)
    if args.json:
        emit_json({"chosen": bill_data(mine), "others": [rival_data(opened, mine, r) for r in found]})
    elif args.cost_of_constraints:
        emit(words.constraints_table(mine, found))
    else:
        emit(words.top_table(opened, mine, found, args.most))
    return 0


def _precision(plan: Plan) -> str:
    return f"; precision {plan.computes}" if plan.precision else ""


def _diff(args: argparse.Namespace) -> int:
    a, b = Plan.load(args.plan), Plan.load(args.other)
    names = (args.plan.name, args.other.name) if args.plan.name != args.other.name else ("A", "B")
    bills: tuple[Bill, Bill] | None = None
    if not args.no_model:
        with Console(stderr=True).status("reading the plans ...") as spinner:
            for plan in (a, b):
                questions.refuse_stages(plan)
            program = questions.rebuild(a, spinner.update)
            again = program if b.fingerprint == a.fingerprint else questions.rebuild(b, spinner.update)
            device = (args.device and questions.device_of(a, args.device)) or None
            opened = [questions.open_program(p, plan, device=device) for p, plan in ((program, a), (again, b))]
            bills = (questions.bill(opened[0]), questions.bill(opened[1]))
    if args.json:
        data: dict[str, Any] = {
            "modules": diff_data(a, b),
            "plan": {name: {"a": x, "b": y} for name, x, y in words.plan_changes(a, b)},
        }
        if bills is not None:
            data |= {"a": bill_data(bills[0]), "b": bill_data(bills[1])}
        else:
            data |= {"a": dict(a.predicted), "b": dict(b.predicted)}
        emit_json(data)
        return 0
    parts: list[Any] = [Text(f"{n}: {p.mesh}; {report.strategy(p)}{_precision(p)}") for n, p in zip(names, (a, b))]
    parts += [Text(""), *words.diff_table(a, b, names), Text("")]
    if bills is not None:
        parts += words.bills_table(*bills, names)
    else:
        parts += [Text(f"{n}\n{report.predicted_text(p.predicted)}") for n, p in zip(names, (a, b))]
    emit(parts)
    return 0


def _price(args: argparse.Namespace) -> int:
    with Console(stderr=True).status("reading the plan ...") as spinner:
        opened = _open(args, spinner.update)
        plan = questions.reprice(opened)
    over = plan.predicted["peak_bytes"] - opened.limit if opened.limit is not None else 0.0
    if args.output is not None:
        plan.save(args.output)
    if args.json:
        emit_json({"was": dict(opened.plan.predicted), "now": dict(plan.predicted), "over": max(0.0, over)})
    else:
        verdict = "legal" if over <= 0 else f"legal, but {report.bytes_(over)} over its limit"
        parts = words.figures_table(opened.plan.predicted, plan.predicted)
        emit([*parts, Text(f"the plan is {verdict}" + (f"; written to {args.output}" if args.output else ""))])
    return 1 if over > 0 else 0


def _resolve(args: argparse.Namespace) -> int:
    with Console(stderr=True).status("reading the plan ...") as spinner:
        opened = _open(args, spinner.update)
        plan, kept = questions.resolve(opened, args.keep, spinner.update)
        after = questions.bill(questions.open_program(opened.program, plan, device=opened.device))
    if args.output is not None:
        plan.save(args.output)
    if args.json:
        emit_json({"kept": kept, "before": bill_data(questions.bill(opened)), "after": bill_data(after)})
        return 0
    names = (args.plan.name, "solved again")
    parts: list[Any] = [Text(f"{kept} decisions kept, the others chosen anew"), Text("")]
    parts += [*words.diff_table(opened.plan, plan, names), Text("")]
    emit([*parts, *words.bills_table(questions.bill(opened), after, names)])
    if args.output is not None:
        print(f"written to {args.output}")
    return 0


def _formula(args: argparse.Namespace) -> int:
    plan = Plan.load(args.plan)
    asked = [questions.sizes_of(text) for text in args.at]
    with Console(stderr=True).status("reading the plan ...") as spinner:
        made = questions.formula_of(plan, args.device, spinner.update)
        values = [made.at(), *(made.at(**sizes) for sizes in asked)]
    if args.json:
        data = {k: {n: str(e) for n, e in part.items()} for k, part in
                (("seconds", made.seconds), ("memory", made.memory))}  # fmt: skip
        emit_json({**data, "checked": made.checked, "notes": list(made.notes), "at": values})
    else:
        emit(words.formula_text(made, values, args.exact))
    return 0


# ---- JSON ----------------------------------------------------------------------------------------------------------


def explanation_data(opened: Opened, found: Explanation) -> dict[str, Any]:
    """`questions.ask` as JSON data: the same as the text, with numbers in seconds and bytes."""
    out = []
    for about, verdicts in found.subjects:
        rows = {}
        for v in verdicts:
            rows[opened.plan.mesh.names[v.axis]] = {
                "chosen": words.value_words(opened, v.cls, v.axis, v.value),
                "value": value_data(v.value),
                "asked": v.why,
                "next": v.free and other_data(opened, v.cls, v.axis, v.free),
                "barred": v.barred and other_data(opened, v.cls, v.axis, v.barred),
                "alone": [other_data(opened, v.cls, v.axis, o) for o in v.fixed],
                "decided": words.decided(opened, v),
            }
        out.append({**asdict(about), "shape": list(about.shape), "axes": rows})
    return {"name": found.name, "subjects": out, "more": list(found.more)}


def value_data(value: Any) -> Any:
    """A decision as a plan file writes it."""
    if isinstance(value, Storage):
        state = [value.state] if value.state != DEVICE else []
        return [[str(p) for p in value.spec], value.gather, value.reduce, *state]
    return [str(p) for p in value] if isinstance(value, tuple) and not hasattr(value, "factor") else str(value)


def other_data(opened: Opened, cls: int, axis: int, other: Any) -> dict[str, Any]:
    """Another decision with its differences."""
    c = other.change
    return {
        "what": words.value_words(opened, cls, axis, other.value),
        "value": value_data(other.value),
        "step_s": c.step_s,
        "compute_s": c.compute_s,
        "comm_s": c.comm_s,
        "update_s": c.update_s,
        "peak_bytes": c.peak_bytes,
        "over_bytes": c.over,
        "memory": dict(c.memory),
        "followers": len(other.followers),
        "because": words.causes(opened, c),
    }


def bill_data(found: Bill) -> dict[str, Any]:
    """A bill, collectives as a list."""
    moved = [
        {"kind": k, "axis": a, "what": w, "seconds": s, "number": found.number[k, a, w], "bytes": found.sent[k, a, w]}
        for (k, a, w), s in found.moved.items()
    ]
    return {
        "step_s": found.step_s,
        "compute_s": found.compute_s,
        "update_s": found.update_s,
        "hidden_s": found.hidden_s,
        "collectives": moved,
        "peak_bytes": found.peak_bytes,
        "memory": dict(found.memory),
    }


def rival_data(opened: Opened, mine: Bill, rival: Rival) -> dict[str, Any]:
    """A rival, with why it lost."""
    out: dict[str, Any] = {"asked": rival.label, "same": rival.same, "over_bytes": rival.over, "error": rival.error}
    if rival.bill is not None:
        out |= {**bill_data(rival.bill), "why": words.lost(opened, mine, rival)}
    return out


def diff_data(a: Plan, b: Plan) -> list[dict[str, Any]]:
    """What two plans do differently, by module."""
    left, right = ({row.module: row for row in words.flat_layers(plan)} for plan in (a, b))
    out = []
    for module in dict.fromkeys((*left, *right)):
        lines: Sequence[tuple[str, str, str]] = list(words.module_changes(left.get(module), right.get(module), a, b))
        if lines:
            out.append({"module": module, "changes": [{"what": w, "a": x, "b": y} for w, x, y in lines]})
    return out
