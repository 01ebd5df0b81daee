"""Graph rewriting: from a program and its plan to the two graphs that one rank runs.

lower    program + plan -> local graph with symbolic collectives, the same for every rank    insert, then SYMBOLIC;
                                                    for a compiler cross_entropy; on a GPU causal and to_device
cut      joint local graph -> forward and backward                                           partition
halves   a backward -> gradients of inputs, gradients of weights                             halves
close    what ends an accumulation of gradients                                              reduction
finish   one of them -> this rank's graph of functional collectives                          bind, hosted, then overlap
boxed    that, if it runs op by op -> how the runtime calls it                               box
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import fx

from autopar.compression import BF16
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.offload import COPIES
from autopar.passes.alone import ALONE, alone
from autopar.passes.attention import keep_strides
from autopar.passes.bind import bind
from autopar.passes.box import boxed
from autopar.passes.bucket import bucket
from autopar.passes.cancel import cancel
from autopar.passes.causal import causal
from autopar.passes.compress import compress
from autopar.passes.constants import constants
from autopar.passes.cross_entropy import cross_entropy
from autopar.passes.device import HOST, Target, statistics, to_device
from autopar.passes.direct import direct
from autopar.passes.edit import finished
from autopar.passes.exchange import exchange
from autopar.passes.fuse import fuse
from autopar.passes.halves import Halves, halves
from autopar.passes.hosted import hosted
from autopar.passes.inplace import inplace
from autopar.passes.insert import LocalProgram, RuleOf, insert_collectives
from autopar.passes.overlap import overlap
from autopar.passes.partition import Parts, partition
from autopar.passes.products import products
from autopar.passes.reduction import Reduction, reduction
from autopar.passes.runner import Pass, Report, run
from autopar.plan import Plan

#: Passes over the symbolic local graph, in order.
SYMBOLIC: tuple[Pass, ...] = (
    cancel,  # first: what need not travel is not worth merging
    bucket,  # few large collectives; before the cut, so that forward and backward share what they gather
)

#: Passes over a bound graph that runs op by op, in order.
EAGER: tuple[Pass, ...] = (
    fuse,  # first: it takes functional graphs only
    inplace,  # last: memory is reused in the order of execution
)


def lower(
    program: Program, plan: Plan, rule_of: RuleOf, target: Target = HOST, defer: bool = False, fuses: bool = False
) -> tuple[LocalProgram, Report]:
    """The local graph of `program` under `plan` for `target`, and what each pass did.

    defer: as `insert_collectives`. fuses: a compiler will fuse what it can.

    Raises:
        PlanError: the plan is not legal for the program.
        PassError: a pass broke an invariant (a defect of ours); names the pass and the node.
    """
    local = insert_collectives(program, plan, rule_of, defer)
    # The device last: all others know the program's ops; before the cut, which sees what is saved for the backward.
    steps = (*SYMBOLIC, compress) if plan.compression == BF16 else SYMBOLIC
    steps = (*steps, cross_entropy) if fuses else steps
    if target.device != HOST.device:
        steps = (statistics, *steps, partial(causal, mesh=plan.mesh), partial(to_device, target=target))
    gm, report = run(local.gm, steps, mesh=plan.mesh, title="local")
    return replace(local, gm=gm), report


def cut(local: LocalProgram, fuses: bool = False) -> Parts:
    """Forward and backward halves of a local program; the backward of a forward-only program is empty.

    fuses: as `passes.partition.partition`.
    """
    return partition(local.gm, local.program.sources, local.program.sinks, fuses)


def close(local: LocalProgram, plan: Plan) -> Reduction | None:
    """What is left to do to the sums of gradients of a local program that was made with `defer`, if anything."""
    found = reduction(local, plan)
    if found is None:
        return None
    gm, _ = run(found.gm, (bucket,), mesh=plan.mesh, title="reduction")
    return replace(found, gm=gm)


def finish(
    gm: fx.GraphModule,
    mesh: Mesh,
    coordinates: Sequence[int],
    groups: Mapping[str, str],
    title: str,
    eager: bool = False,
    target: Target = HOST,
    copies: int = COPIES,
) -> tuple[fx.GraphModule, Report]:
    """The graph that the rank at `coordinates` runs. `groups`: axis name -> process group name.

    `eager`: it will run op by op, so fused kernels and memory that is written in place pay; else it stays functional.
    `target`: as `lower` was given. `copies`: as of the plan.

    Raises:
        PassError: as `lower`.
    """
    # Overlap orders what all others have made; what is in place depends on that order.
    home = target.device if target.staged else None
    steps: tuple[Pass, ...] = (
        partial(bind, mesh=mesh, coordinates=coordinates, group_names=groups, staged=home),
        partial(hosted, device=target.device, eager=eager),
        partial(overlap, copies=copies),
        keep_strides,
    )
    if target.device.type == "cpu":  # another device may not be there when the graph is made
        steps = (*steps, constants)
    if eager:
        steps = (*steps, *EAGER)
    if target.linear_from is not None or target.weights_from is not None:
        # After fuse and inplace, which know torch's own products.
        steps = (*steps, partial(products, least=target.linear_from, of_weights=target.weights_from, eager=eager))
    if target.staged or target.device.type == "cpu":  # so that collectives are gloo's
        steps = (*steps, partial(exchange, mesh=mesh, group_names=groups))
    out, report = run(gm, steps, mesh=mesh, title=title)
    if eager:
        out.meta[ALONE] = alone(out)  # before overloads go
        out = direct(out)
    return finished(out), report


__all__ = [
    "ALONE", "HOST", "Halves", "LocalProgram", "Parts", "Reduction", "Report", "Target", "boxed", "close", "cut",
    "finish", "halves", "lower",
]  # fmt: skip
