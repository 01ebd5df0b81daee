"""A step of a model that is cut into stages: all micro-batches through the table, then the gradients.

What `Step` is for a program in one piece. The user's loop stays: calling the module in training runs the whole
schedule, backwards too, with a gradient of one for the loss; `loss.backward()` hands the gradients over, times the
gradient that arrives. What is returned is the same on every rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from autopar.errors import RuntimeUseError
from autopar.graph import Program, Sink
from autopar.pipeline.table import Row, Table, homes
from autopar.pipeline.weights import Divisor
from autopar.pipeline.weights import weights as micro_weights
from autopar.plan import Plan
from autopar.runtime.executor import Executor
from autopar.runtime.handshake import answered
from autopar.runtime.lane import Lane
from autopar.runtime.scaler import LossScaler
from autopar.runtime.stage import Batch, LoweredStage, StageWork
from autopar.runtime.step import Take
from autopar.runtime.storage import rewrap
from autopar.spec import R, shard

#: How much longer ranks wait for each other where graphs are compiled when they first run, one behind the other.
COMPILING = 4
#: Between seeds of micro-batches.
_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Pipelined:
    """What the driver hands over for a pipeline.

    Attributes:
        program: of one micro-batch, whole. plan: of it, with its pipeline.
        table: with sends and receives. stages: those of this rank, by number.
        micro: number of micro-batches.
        divisors: of the loss of a micro-batch and of the whole batch; None: it is a mean of the micro-batches'.
        loss: name of the output that is the loss; "" if there is none.
        at: output -> the stage that makes it. batched: outputs whose dim 0 is the batch.
        full: whether outputs beside the loss are wanted.
        places: parameter (any of its names), or buffer that changes -> the places in the lane that have it. What is not
            named is everywhere.
        shared: of the parameters that several stages have, one name each -> as `places`.
        news: as of `autopar.runtime.step.Lowered`.
    """

    program: Program
    plan: Plan
    table: Table
    stages: Mapping[int, LoweredStage]
    micro: int
    divisors: tuple[Divisor, Divisor] | None
    loss: str
    at: Mapping[str, int]
    batched: frozenset[str]
    full: bool
    places: Mapping[str, tuple[int, ...]]
    shared: Mapping[str, tuple[int, ...]]
    news: str = ""


class PipelineStep:
    """Runs one `Pipelined`; called as a `Step` is."""

    def __init__(self, lowered: Pipelined, lane: Lane) -> None:
        self.lowered, self.grid, self.lane = lowered, lane.inner, lane
        self.program, self.plan = lowered.program, lowered.plan
        self.uses_seed = bool(self.program.of_kind("seed"))
        self.saved_bytes = 0
        self._told = False
        self.wraps: dict[str, Callable[[torch.Tensor], DTensor]] = {}
        self.training = any(s.training for s in lowered.stages.values())
        self.works = {number: StageWork(stage, self.grid.device) for number, stage in lowered.stages.items()}
        self.home = homes(lowered.table)
        compiles = any(s.compiler is not None for s in lowered.stages.values())
        self.executor = Executor(
            lowered.table, lane.rank, self.works, lane.transport, record=lane.record,
            timeout=self.grid.timeout * (COMPILING if compiles else 1),
        )  # fmt: skip
        self.outputs = [s for s in self.program.sinks if s.kind == "output"]
        self.wanted = [s for s in self.outputs if s.node is not None and (lowered.full or s.name == lowered.loss)]
        names = self.program.of_kind("input")
        self._batched = {s.name: self.program.batch_dims[s.name] for s in names if s.name in self.program.batch_dims}

    def __call__(
        self,
        params: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        inputs: Sequence[torch.Tensor],
        seed: int,
        gate: Callable[[], object] | None = None,
        take: Take | None = None,
        scaler: LossScaler | None = None,
    ) -> list[Any]:
        """The user's outputs, flat, in the order of the output sinks; None for those that are not wanted.

        take: as of a `Step`; nothing of a pipeline lies on the host.
        """
        if gate is not None:
            gate()
        batch = self.batch(params, buffers, inputs, seed)
        if self.training:
            batch.scale = 1.0 if scaler is None else scaler.factor
            names = [n for n, p in params.items() if p.requires_grad and n in self._trained()]
            anchor = torch.zeros((), device=self.grid.device, requires_grad=True)
            found = iter(_Run.apply(self, batch, scaler, names, anchor, *(params[n] for n in names)))
        else:
            with torch.no_grad():
                self.run(batch)
                found = iter(self.collect(batch))
        wanted = {s.name for s in self.wanted}
        return [
            s.constant if s.node is None else next(found) if s.name in wanted else None for s in self.outputs
        ]

    def pieces(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inputs on this rank's device, whole: micro-batches are cut from them first."""
        return [t.to(self.grid.device).resolve_conj().resolve_neg() for t in inputs]

    def _trained(self) -> set[str]:
        return {s.name for work in self.works.values() for s in work.lowered.stage.program.sinks if s.kind == "grad"}

    def batch(
        self,
        params: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        inputs: Sequence[torch.Tensor],
        seed: int,
    ) -> Batch:
        """A batch, as the stages of this rank take it."""
        count, mesh = self.lowered.micro, self.grid.mesh
        given = dict(zip((s.name for s in self.program.of_kind("input")), inputs))
        rows = [
            {n: t.chunk(count, self._batched[n])[k] if n in self._batched else t for n, t in given.items()}
            for k in range(count)
        ]
        weights = [1.0 / count] * count
        if self.lowered.divisors is not None:
            found = micro_weights(self.lowered.divisors, rows, given, buffers)
            weights = found.values
            if found.inexact and not self._told:
                self._told = True
                if self.lane.grid.rank == 0:
                    warnings.warn(found.inexact, stacklevel=2)
        whole_spec = (R,) * len(mesh.sizes)
        specs = {name: spec for work in self.works.values() for name, spec in work.lowered.plan.inputs.items()}
        at = mesh.coordinates(self.grid.rank)
        mine = [
            {n: shard(t, specs.get(n, whole_spec), mesh.sizes, at).contiguous() for n, t in row.items()} for row in rows
        ]
        seeds = [_signed(seed + k * _STRIDE) for k in range(count)]
        return Batch(params, buffers, mine, seeds, weights, frozenset(s.name for s in self.wanted))

    def twin(self) -> PipelineStep:
        """The same step for other parameters: with a state of its own, and nothing in flight."""
        twin = PipelineStep(self.lowered, self.lane)
        twin._told = self._told
        for number, work in twin.works.items():
            work.graphs = self.works[number].graphs
        return twin

    # ---- without autograd --------------------------------------------------------------------------------------

    def run(self, batch: Batch) -> None:
        """All micro-batches through the table."""
        for work in self.works.values():
            work.start(batch)
        with torch.autocast(self.grid.device.type, enabled=False):
            self.executor.run()

    def go(self, row: Row, last: bool) -> None:
        """More of a row that has no end, as `Executor.resume`."""
        with torch.autocast(self.grid.device.type, enabled=False):
            self.executor.resume(row, last)

    @property
    def loss_stage(self) -> int:
        """The stage that computes the loss."""
        return self.lowered.at[self.lowered.loss]

    def loss(self, batch: Batch, first: int) -> torch.Tensor | None:
        """The loss of the micro-batches from `first` on, where this rank has it."""
        if self.home[self.loss_stage] != self.lane.rank:
            return None
        sink = next(s for s in self.wanted if s.name == self.lowered.loss)
        found = self._joined(sink, batch, first)
        self.works[self.loss_stage].outputs.clear()
        return found

    def gradients(self) -> dict[str, torch.Tensor]:
        """Local gradients by name, after `run`; what several stages have is added up between them."""
        out: dict[str, torch.Tensor] = {}
        for work in self.works.values():
            for name, grad in work.finish().items():
                out[name] = out[name] + grad if name in out else grad
        for name in self.lowered.shared:
            group = self.lane.shared.get(name)
            if group is not None:
                with answered(self.lane.grid):
                    self._reduce(out, name, group)
        return out

    def _reduce(self, grads: dict[str, torch.Tensor], name: str, group: dist.ProcessGroup) -> None:
        grad = grads.get(name)
        if grad is None:  # another stage's share is all there is
            work = next(w for w in self.works.values() if name in w.lowered.stage.shared)
            program = work.lowered.stage.program
            source = next(s for s in program.of_kind("param") if s.name == name)
            val = program.node(source.node).meta["val"]
            like = shard(torch.empty(tuple(val.shape), device="meta"), work.lowered.plan.stored(name).spec,
                         self.grid.mesh.sizes, self.grid.mesh.coordinates(self.grid.rank))  # fmt: skip
            grad = torch.zeros(like.shape, dtype=val.dtype, device=self.grid.device)
        grad = grad.contiguous()
        there = grad.cpu() if self.grid.staged else grad
        dist.all_reduce(there, group=group)
        grads[name] = there.to(grad.device)

    def collect(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The wanted outputs, put together of the micro-batches', on every rank."""
        out = []
        for sink in self.wanted:
            owner = self.home[self.lowered.at[sink.name]]
            value = self._joined(sink, batch) if owner == self.lane.rank else self._empty(sink)
            with answered(self.lane.grid):
                out.append(self.lane.broadcast(value, owner))
        for work in self.works.values():
            work.outputs.clear()
            if not self.training:
                work.batch = None
        return tuple(out)

    def _joined(self, sink: Sink, batch: Batch, first: int = 0) -> torch.Tensor:
        work = self.works[self.lowered.at[sink.name]]
        parts = [work.outputs[first + k][sink.name] for k in range(self.lowered.micro)]
        if sink.name in self.lowered.batched:
            return torch.cat(parts)
        if not parts[0].is_floating_point() or parts[0].dim():
            return parts[0]
        weights = batch.weights if sink.name == self.lowered.loss else [1.0 / len(parts)] * len(parts)
        total = torch.zeros_like(parts[0])
        for part, weight in zip(parts, weights):
            if weight:  # without labels a part is 0 / 0, and no part of the sum
                total += part * weight
        return total

    def _empty(self, sink: Sink) -> torch.Tensor:
        val = self.program.node(str(sink.node)).meta["val"]
        val = val[sink.index] if isinstance(val, (tuple, list)) else val
        shape = list(val.shape)
        if sink.name in self.lowered.batched:
            shape[0] *= self.lowered.micro
        return torch.empty(shape, dtype=val.dtype, device=self.grid.device)


class _Run(torch.autograd.Function):
    """The schedule as autograd sees it: parameters in, outputs out; the backward has been run by then.

    `anchor` stands for what other stages train: the loss needs a gradient on every rank, or on none.
    """

    @staticmethod
    def forward(
        ctx: Any, step: PipelineStep, batch: Batch, scaler: LossScaler | None, names: list[str], anchor: torch.Tensor,
        *params: torch.Tensor,
    ) -> Any:  # fmt: skip
        step.run(batch)
        outputs = step.collect(batch)
        ctx.step, ctx.names, ctx.grads = step, names, step.gradients()
        if scaler is not None:
            scaler.settle(ctx.grads, batch.scale, step.lane.grid)
        for name, param in zip(names, params):
            if name not in step.wraps and isinstance(param, DTensor):
                step.wraps[name] = rewrap(param)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for s, o in zip(step.wanted, outputs) if s.name != step.lowered.loss))
        ctx.at = [s.name for s in step.wanted].index(step.lowered.loss)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        step, found, ctx.grads = ctx.step, ctx.grads, None
        if found is None:
            raise RuntimeUseError(
                "backward is called again on the output of a pipeline, whose gradients have been handed over; call the "
                "module again, or add the losses and call backward once"
            )
        scale = grads[ctx.at]
        out: list[Any] = []
        for name in ctx.names:
            grad = found.pop(name, None)
            if grad is not None and scale is not None and not (scale.device.type == "cpu" and scale.item() == 1.0):
                grad = grad * scale.to(grad.dtype)
            out.append(grad if grad is None or name not in step.wraps else step.wraps[name](grad))
        return (None, None, None, None, None, *(out if scale is not None else [None] * len(out)))


def _signed(x: int) -> int:
    x &= (1 << 63) - 1
    return x


__all__ = ["PipelineStep", "Pipelined"]
