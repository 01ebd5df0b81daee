"""From a program and its plan to the graphs of one rank, for the device that it has."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autopar import linear, passes
from autopar.capture import compiled
from autopar.costmodel import rules
from autopar.costmodel.devices import Device
from autopar.graph import Program
from autopar.plan import HOST, Plan
from autopar.runtime.groups import Grid
from autopar.runtime.powersgd import left_of
from autopar.runtime.step import Lowered


def lower(
    program: Program,
    plan: Plan,
    coordinates: tuple[int, ...],
    group_names: Mapping[str, str],
    eager: bool = False,
    target: passes.Target = passes.HOST,
) -> Lowered:
    """This rank's forward and backward graphs of `program` under `plan`, for `target`.

    eager: they will run op by op, and take their arguments in a list: `passes.boxed`, the forward gated.

    Raises:
        PlanError: the plan is not legal for the program; names the op.
    """
    local, _ = passes.lower(program, plan, rules.rule_for, target, fuses=not eager)
    parts = passes.cut(local, fuses=not eager)
    title = "-".join(map(str, coordinates))
    place = (plan.mesh, coordinates, group_names)
    forward, _ = passes.finish(parts.forward, *place, f"forward-{title}", eager, target, plan.copies)
    of_forward = forward.meta.get(passes.ALONE, frozenset())
    forward = passes.boxed(forward, gated=True) if eager else forward
    compiler = None if eager else compiled
    if not program.training:
        return Lowered(program, plan, forward, None, compiler=compiler, alone=(of_forward, frozenset()))
    backward, _ = passes.finish(parts.backward, *place, f"backward-{title}", eager, target, plan.copies)
    of_backward = backward.meta.get(passes.ALONE, frozenset())
    hosted = {s.name for s in program.sinks if s.kind == "grad" and plan.stored(s.name).state == HOST}
    if eager:
        names = [s.name for s in program.sinks if s.kind == "grad"]
        backward = passes.boxed(backward, taken={i: name for i, name in enumerate(names) if name in hosted})
    homes = {s.name: spec for s, spec in zip(local.program.sinks, local.sink_specs) if s.kind == "grad" and s.node}
    left = left_of(plan, homes)
    return Lowered(
        program, plan, forward, backward, parts.saved_inputs, compiler, left=left, hosted=frozenset(hosted),
        alone=(of_forward, of_backward),
    )  # fmt: skip


def quicker(device: str | Device) -> tuple[float | None, float | None]:
    """`Measured.linear_from` and `weights_from` of a calibrated device, where oneDNN is there."""
    own = None if isinstance(device, str) else device.measured
    return (own.linear_from, own.weights_from) if own is not None and linear.available() else (None, None)


def target_of(grid: Grid, onednn: tuple[float | None, float | None] = (None, None)) -> passes.Target:
    """What this rank's graphs are made for.

    onednn: `quicker` of the device that was measured, if it is a CPU.
    """
    if grid.device.type != "cuda":
        return passes.Target(grid.device, staged=grid.staged, linear_from=onednn[0], weights_from=onednn[1])
    power, kernels = torch.cuda.get_device_capability(grid.device), set()
    if power >= (8, 0) and torch.backends.cuda.flash_sdp_enabled():
        kernels.add("flash")
    # As torch itself prefers them: on H100 and B200 and their kin, from the version that is right at every length.
    if power in ((9, 0), (10, 0)) and torch.backends.cuda.cudnn_sdp_enabled():
        if (torch.backends.cudnn.version() or 0) > 91500:
            kernels.add("cudnn")
    return passes.Target(grid.device, frozenset(kernels), grid.staged)


__all__ = ["lower", "quicker", "target_of"]
