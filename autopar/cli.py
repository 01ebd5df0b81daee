"""The command `autopar`: plan a model, read a plan, ask about it, prove it.

Exit codes: 0 done; 1 the plan is not equal to one device, or no plan fits; 2 bad usage or an error of ours (on stderr).
With `--json` stdout carries JSON only; tables, progress and errors never mix with it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from autopar import (
    cli_calibrate,
    cli_explain,
    cli_memory,
    cli_simulate,
    driver,
    options,
    report,
    report_pipeline,
    targets,
    verify,
)
from autopar.cli_tools import emit, positive
from autopar.errors import AutoparError, ConstraintError, InfeasibleError, PlanError
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.precision import FULL, LOW, PRECISIONS

EXAMPLES = """\
examples:
  autopar plan hf:llama --set num_hidden_layers=4 --mesh dp=2,tp=4 --device h100 --batch 16 --seq 2048 -o plan.json
  autopar plan hf:path/to/config.json --mesh dp=8 --memory 40GB --constraint dp=zero3 -o plan.json
  autopar plan train.py:build --mesh tp=4 --batch 32
  autopar show plan.json
  autopar explain plan.json mlp.down_proj.weight
  autopar verify plan.json
"""


def parse_constraints(pairs: Sequence[str]) -> dict[str, str]:
    """`["tp=tp", "*.weight=shard(0, dp)"]` -> a dict; the first `=` parts key and value.

    Raises:
        ConstraintError: an entry has no `=`.
    """
    out = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise ConstraintError(
                f"cannot read constraint {pair!r}; write AXIS=STRATEGY (dp=zero3) or 'PATTERN=shard(0, tp)'"
            )
        out[key.strip()] = value.strip()
    return out


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="autopar",
        description="Plans unmodified PyTorch models on many devices, and proves that a plan equals one device.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    plan = commands.add_parser(
        "plan",
        help="choose where everything lies, and write it to a plan file",
        description="Captures a model without allocating its weights, chooses where everything lies on the mesh,\n"
        "predicts time and memory, and writes a plan: a small JSON file that can be read, edited and run.",
        epilog="TARGET is one of\n"
        "  hf:CONFIG.json    a Hugging Face configuration (or a folder that holds one)\n"
        "  hf:TYPE           a Hugging Face model type, e.g. hf:llama, changed with --set\n"
        "  file.py:function  a function that returns (model, example) or (model, example, loss);\n"
        "                    it is given batch= and seq= if it has such parameters\n\n" + EXAMPLES,
        formatter_class=raw,
    )
    plan.add_argument("target", metavar="TARGET", help="what to plan, see below")
    plan.add_argument(
        "--mesh", required=True, metavar="AXES", help="named axes with sizes, e.g. dp=2,tp=4, or a number"
    )
    plan.add_argument("--device", default="cpu", metavar="NAME", help="device preset, e.g. h100, a100 (default: cpu)")
    plan.add_argument("--batch", type=positive, default=8, metavar="N", help="global batch size (default: 8)")
    plan.add_argument("--seq", type=positive, default=512, metavar="N", help="sequence length in tokens (default: 512)")
    plan.add_argument("--dtype", choices=list(targets.DTYPES), default="fp32", help="of the weights (default: fp32)")
    plan.add_argument("--memory", metavar="BYTES", help="limit per device, e.g. 80GB (default: the device's)")
    plan.add_argument("--no-recompute", action="store_true", help="compute nothing twice")
    plan.add_argument("--no-offload", action="store_true", help="let nothing wait on the host")
    plan.add_argument(
        "--no-host-state", action="store_true",
        help="keep gradients and optimizer state on the devices, as gradients that are added up over several batches, "
        "and loops of your own, need it",
    )  # fmt: skip
    plan.add_argument(
        "--precision", choices=PRECISIONS, metavar="NAME",
        help="compute in bf16 or fp16 what is quicker so, weights staying as they are; auto: bf16 if its step is "
        "shorter (default: fp32, all as --dtype says)",
    )  # fmt: skip
    plan.add_argument(
        "--reduce-dtype", choices=(FULL, *LOW), metavar="NAME",
        help="with --precision: in which gradients are added up between ranks (default: fp32)",
    )  # fmt: skip
    plan.add_argument(
        "--optimizer", default=options.ADAMW, metavar="NAME",
        help="what steps the parameters, for its memory: adamw, sgd, sgd_momentum, lion, muon, ... (default: adamw), "
        "or bytes of its state by a parameter's elements n: 'mine: 2*n + 8*n/256'",
    )  # fmt: skip
    plan.add_argument(
        "--compression", metavar="HOW", help="of gradients that are reduced: bf16, or powersgd:RANK (default: none)"
    )
    plan.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="change an entry of the Hugging Face configuration; may be repeated",
    )  # fmt: skip
    plan.add_argument(
        "--constraint", action="append", default=[], metavar="KEY=VALUE", dest="constraints",
        help="pin an axis to a strategy (dp=zero3, tp=tp) or a parameter to a placement "
        "('*.down_proj.weight=shard(0, tp)'); may be repeated",
    )  # fmt: skip
    plan.add_argument(
        "--micro-batches", type=positive, metavar="N",
        help="with an axis pp: pieces of a batch that follow each other through the stages (default: the quickest)",
    )  # fmt: skip
    plan.add_argument(
        "--schedule", metavar="NAME", help="with an axis pp: 1f1b, zb-h1, ... or a CSV file (default: the quickest)"
    )
    cli_memory.add_what_if(plan)
    plan.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan here")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON and nothing else on stdout")
    plan.set_defaults(run=_plan)

    show = commands.add_parser(
        "show",
        help="a plan by layer, in words",
        description="Prints a plan by layer: what each axis splits, where parameters are stored,\n"
        "and the predicted time and memory.",
        formatter_class=raw,
    )
    show.add_argument("plan", type=Path, metavar="PLAN.json", help="a file written by `autopar plan`")
    show.add_argument("--json", action="store_true", help="print the same as JSON")
    show.set_defaults(run=_show)

    check = commands.add_parser(
        "verify",
        help="prove on local processes that a plan equals one device",
        description="Builds a scaled-down model of the same kind, runs it under the same plan on local processes\n"
        "and on one device, and compares loss, gradients, and parameters after three optimizer steps in\n"
        "float64. Exit code 0 if they are equal, 1 if not.",
        formatter_class=raw,
    )
    check.add_argument("plan", type=Path, metavar="PLAN.json", help="a file written by `autopar plan`")
    check.add_argument(
        "--procs", type=positive, metavar="N", help="local processes at most (default: 4; 8 for a mesh of three axes)"
    )
    check.add_argument("--json", action="store_true", help="print the certificate as JSON")
    check.set_defaults(run=_verify)
    cli_explain.add(commands)
    cli_simulate.add(commands)
    cli_calibrate.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except InfeasibleError as error:
        print(f"autopar: {error}", file=sys.stderr)
        return 1
    except AutoparError as error:
        print(f"autopar: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("autopar: interrupted", file=sys.stderr)
        return 130


def _plan(args: argparse.Namespace) -> int:
    mesh = int(args.mesh) if args.mesh.isdecimal() else Mesh.parse(args.mesh)
    constraints = parse_constraints(args.constraints)
    target = targets.Target(args.target, args.batch, args.seq, args.dtype, targets.parse_settings(args.settings))
    if args.what_if and args.output is not None:
        raise PlanError("--what-if makes many plans and writes none: leave out -o, and plan with the --memory you like")
    if args.svg is not None and not args.what_if:
        raise PlanError("--svg draws what --what-if finds: add that; `autopar simulate` draws a plan")
    if args.output is not None and not args.output.parent.is_dir():
        raise PlanError(f"cannot write {args.output}: the folder {args.output.parent} does not exist")
    status = Console(stderr=True)
    with status.status(f"building {target.text} ...") as spinner:
        built = targets.build(target)
        spinner.update(f"capturing and planning {target.text} on {mesh} ...")
        asked: dict[str, Any] = {
            "example": built.example,
            "loss": built.loss,
            "device": args.device,
            "memory_limit": options.parse_bytes(args.memory),
            "constraints": constraints,
            "target": target.to_dict(),
            "micro_batches": args.micro_batches,
            "schedule": args.schedule,
            "optimizer_class": args.optimizer,
            "recompute": not args.no_recompute,
            "offload": not args.no_offload,
            "host_state": False if args.no_host_state else None,
            "compression": args.compression,
            "precision": args.precision,
            "reduce_dtype": args.reduce_dtype,
        }
        if args.what_if:
            return cli_memory.what_if(args, built.model, mesh, spinner.update, **asked)
        plan = driver.plan_model(built.model, mesh, **asked)
    if args.output is not None:
        plan.save(args.output)
    if args.json:
        sys.stdout.write(plan.to_json())
        return 0
    emit([*report.show(plan), *report_pipeline.stages(plan)])
    if args.output is not None:
        print(f"written to {args.output}; read it with `autopar show`, prove it with `autopar verify`")
    return 0


def _show(args: argparse.Namespace) -> int:
    plan = Plan.load(args.plan)
    if args.json:
        data: dict[str, Any] = {
            "mesh": str(plan.mesh),
            "target": dict(plan.target),
            **({"precision": dict(plan.precision)} if plan.precision else {}),
            **({"pipeline": asdict(plan.pipeline)} if plan.pipeline is not None else {}),
            "optimizer": plan.optimizer,
            "compression": plan.compression,
            "saved": dict(plan.saved),
            "copies": plan.copies,
            "layers": [asdict(layer) for layer in report.layers(plan)],
            "predicted": dict(plan.predicted),
            "solver": dict(plan.solver),
            "notes": list(plan.notes),
        }
        print(json.dumps(data, indent=2))
    else:
        emit([*report.show(plan), *report_pipeline.stages(plan)])
    return 0


def _verify(args: argparse.Namespace) -> int:
    plan = Plan.load(args.plan)
    with Console(stderr=True).status("comparing with one device ...") as spinner:
        certificate = verify.verify(plan, procs=args.procs, progress=spinner.update)
    if args.json:
        print(json.dumps(asdict(certificate) | {"equal": certificate.equal}, indent=2))
    else:
        emit(verify.table(certificate))
    return 0 if certificate.equal else 1
