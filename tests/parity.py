"""Run a program under a plan on every rank of a mesh in one process, and put the global results together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autopar.costmodel.rules import rule_for
from autopar.graph import Program
from autopar.passes import lockstep
from autopar.passes.insert import LocalProgram, insert_collectives
from autopar.plan import Plan
from autopar.spec import shard, unshard

Key = tuple[str, str]  # (kind, name)


def feeds(program: Program, model: torch.nn.Module, args: tuple, kwargs: dict, seed: int = 0) -> list[torch.Tensor]:
    """Global tensors for the placeholders of the program, in order; tangents are ones."""
    state: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    state.update(model.named_buffers(remove_duplicate=False))
    inputs = iter(program.flatten(args, kwargs))
    out = []
    for source in program.sources:
        if source.kind in ("param", "buffer"):
            out.append(state[source.name].detach().clone())
        elif source.kind == "input":
            out.append(next(inputs))
        elif source.kind == "seed":
            out.append(torch.tensor(seed, dtype=torch.int64))
        else:
            val = program.node(source.node).meta["val"]
            out.append(torch.ones(tuple(val.shape), dtype=val.dtype))
    return out


class _Global(torch.fx.Interpreter):
    """The graph is functional and speaks of shapes, not of strides: a view may have to copy."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.view.default:
            target = torch.ops.aten.reshape.default
        return super().call_function(target, args, kwargs)


def run_global(program: Program, values: list[torch.Tensor]) -> dict[Key, Any]:
    """The unsharded graph."""
    flat = _Global(program.gm).run(*[v.clone() for v in values])
    return {(s.kind, s.name): v for s, v in zip(program.sinks, flat)}


def run_local(local: LocalProgram, values: list[torch.Tensor]) -> dict[Key, Any]:
    """The local graph on every rank in lock step; global results, with all replicas compared."""
    mesh = local.mesh
    ranks = range(mesh.num_devices)
    rows = [[shard(v, s, mesh.sizes, mesh.coordinates(r)) for v, s in zip(values, local.source_specs)] for r in ranks]
    got = lockstep.run(local.gm, mesh, rows)
    out: dict[Key, Any] = {}
    for i, (sink, spec) in enumerate(zip(local.program.sinks, local.sink_specs)):
        pieces = [row[i] for row in got]
        if not isinstance(pieces[0], torch.Tensor):
            out[sink.kind, sink.name] = pieces[0]
            continue
        shape = local.program.node(sink.node).meta["val"]  # type: ignore[arg-type]
        shape = shape[sink.index].shape if isinstance(shape, (tuple, list)) else shape.shape
        whole = unshard(pieces, shape, spec, mesh.sizes)
        for r in ranks:
            want = shard(whole, spec, mesh.sizes, mesh.coordinates(r))
            note = f"replicas of {sink.kind} {sink.name} differ on rank {r}"
            torch.testing.assert_close(pieces[r], want, rtol=1e-12, atol=1e-12, equal_nan=True, msg=note)
        out[sink.kind, sink.name] = whole
    return out


def max_error(got: Mapping[Key, Any], want: Mapping[Key, Any]) -> tuple[float, Key | None]:
    """Largest error relative to the largest magnitude of each tensor, and where.

    A tensor that is zero up to rounding (the gradient of a key bias, say) is measured against 1e-6 of the largest.
    """
    worst, where = 0.0, None
    floats = [b for b in want.values() if isinstance(b, torch.Tensor) and b.is_floating_point() and b.numel()]
    floor = 1e-6 * max((float(b.double().abs().max()) for b in floats), default=1.0)
    for key, b in want.items():
        a = got[key]
        if not isinstance(b, torch.Tensor):
            assert a is None or a == b, key
            continue
        if not b.is_floating_point():
            err = float((a != b).any())
        else:
            scale = float(b.double().abs().max()) if b.numel() else 0.0
            diff = float((a.double() - b.double()).abs().max()) if b.numel() else 0.0
            err = diff / max(scale, floor)
        if not err <= worst:
            worst, where = err, key
    return worst, where


def lower(program: Program, plan: Plan) -> LocalProgram:
    """The symbolic local program."""
    return insert_collectives(program, plan, rule_for)
