"""One lowered program on this rank, as a differentiable function of its parameters.

The two local graphs, both flat:

    forward(source, ...)                every source but the tangents, in the program's order
        -> (value, ..., saved, ...)     every sink but the gradients, in order, then what the backward reads
    backward(input, ..., saved, ..., tangent, ...)
                                        the forward's arguments at `saved_inputs`, what it saved, and the tangents
        -> (grad, ...)                  the grad sinks, in the program's order; None where there is none
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from autopar.errors import PlanError, RuntimeUseError
from autopar.graph import Program, Sink
from autopar.plan import Plan
from autopar.runtime.groups import Grid
from autopar.runtime.handshake import answered
from autopar.runtime.storage import as_dtensor, rewrap, whole
from autopar.spec import R, Spec, shard

BACKENDS = ("eager", "inductor")


@dataclass(frozen=True)
class Lowered:
    """What the driver hands over: a program, the plan it is lowered under, and this rank's bound graphs.

    `backward` is None for a forward-only program; `saved_inputs` are positions among the forward's arguments. `news` is
    what to tell a user who waited for it, `{changes}` standing for the arguments that made it necessary; or nothing.
    """

    program: Program
    plan: Plan
    forward: fx.GraphModule
    backward: fx.GraphModule | None
    saved_inputs: tuple[int, ...] = ()
    news: str = ""


class Step:
    """Runs one `Lowered`. Outputs are plain tensors where the plan holds them whole, else DTensors."""

    def __init__(self, lowered: Lowered, grid: Grid, backend: str = "eager", data_axes: Sequence[str] = ()) -> None:
        """`data_axes`: mesh axes over which the inputs come in pieces already (local batches)."""
        program = lowered.program
        self.program, self.plan, self.grid = program, lowered.plan, grid
        self.forward: Any = lowered.forward
        self.backward: Any = lowered.backward
        if backend == "inductor":
            self.forward = torch.compile(lowered.forward, fullgraph=True, dynamic=False)
            if lowered.backward is not None:
                self.backward = torch.compile(lowered.backward, fullgraph=True, dynamic=False)
        self.saved_inputs = lowered.saved_inputs
        self.sources = [s for s in program.sources if s.kind != "tangent"]
        self.tangents = program.of_kind("tangent")
        self.values = [s for s in program.sinks if s.kind != "grad"]
        self.grads = [s.name for s in program.sinks if s.kind == "grad"]
        self.uses_seed = bool(program.of_kind("seed"))
        self.saved_bytes = 0
        self.wraps: dict[str, Callable[[torch.Tensor], DTensor]] = {}  # gradients of parameters that are DTensors
        places = {s.node: s for s in program.sources}
        names = _result_names(lowered.forward)
        self._handed_back = [name in places for name in names]
        # A buffer that the backward reads and the forward replaces must be kept as it was.
        replaced = {s.name for s in program.sinks if s.kind == "buffer"}
        self._keep = [s.kind == "buffer" and s.name in replaced for s in self.sources]
        self._whole: Spec = (R,) * len(grid.mesh.sizes)
        self._cuts = [self._cut(s.name, data_axes) for s in program.of_kind("input")]

    def __call__(
        self,
        params: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        inputs: Sequence[torch.Tensor],
        seed: int,
    ) -> list[Any]:
        """The user's outputs, flat, in the order of the output sinks. New buffer values are written in place."""
        feed = _Feed(params, buffers, list(inputs), seed)
        if self.backward is not None:
            trainable = [s.name for s in self.sources if s.kind == "param" and params[s.name].requires_grad]
            tensors = _Run.apply(self, feed, trainable, *(params[n] for n in trainable))
        else:
            with torch.no_grad():
                values, _ = self.run_forward(feed)
                tensors = self.outputs(values)
        at = iter(tensors)
        return [s.constant if s.node is None else next(at) for s in self.values if s.kind == "output"]

    def pieces(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inputs as the graph takes them: this rank's pieces, on its device."""
        mesh, out = self.grid.mesh, []
        for tensor, cut in zip(inputs, self._cuts):
            if cut != self._whole:
                tensor = shard(tensor, cut, mesh.sizes, mesh.coordinates(self.grid.rank))
            out.append(tensor.to(self.grid.device).contiguous())
        return out

    def _cut(self, name: str, data_axes: Sequence[str]) -> Spec:
        """What is still to be cut from the tensor that the user passes."""
        names = self.grid.mesh.names
        spec = self.plan.inputs.get(name, (R,) * len(names))
        for place, axis in zip(spec, names):
            if place.kind == "S" and axis not in data_axes and data_axes:
                raise PlanError(
                    f"the plan takes input {name} split as {place} on axis {axis}; local batches are split over "
                    f"{', '.join(data_axes)} only"
                )
        return tuple(R if a in data_axes else p for p, a in zip(spec, names))

    # ---- the two halves, without autograd ----------------------------------------------------------------------

    def run_forward(self, feed: _Feed) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Values of the output and buffer sinks, and what the backward needs; buffers are updated."""
        flat: list[Any] = []
        inputs = iter(feed.inputs)
        for source in self.sources:
            if source.kind == "param":
                flat.append(local_of(feed.params[source.name]))
            elif source.kind == "buffer":
                flat.append(feed.buffers[source.name])
            elif source.kind == "seed":
                # Filled there: a copy from the host would wait for the device.
                flat.append(torch.full((), feed.seed, dtype=torch.int64, device=self.grid.device))
            else:
                flat.append(next(inputs))
        saved = [flat[i].clone() if self._keep[i] else flat[i] for i in self.saved_inputs]
        results = list(self._run(self.forward, flat))
        count = len(self.values)
        for sink, value in zip(self.values, results):
            if sink.kind == "buffer" and sink.node is not None:
                feed.buffers[sink.name].copy_(value)
        return results[:count], saved + results[count:]

    def outputs(self, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The user's tensors out of the values of the sinks."""
        out, seen = [], set()
        for i, (sink, value) in enumerate(zip(self.values, values)):
            if sink.kind != "output" or sink.node is None:
                continue
            part = value.untyped_storage().nbytes() != value.nbytes
            if self._handed_back[i] or part or id(value) in seen:
                value = value.clone()  # of a parameter or input, of something larger, or one tensor under two names
            seen.add(id(value))
            spec = self.plan.outputs.get(sink.name, self._whole)
            out.append(value if spec == self._whole else as_dtensor(value, self._shape(sink), spec, self.grid))
        return tuple(out)

    def run_backward(self, saved: Sequence[torch.Tensor], grads: Mapping[str, torch.Tensor | None]) -> dict[str, Any]:
        """Local gradient by parameter name, from the gradients of the outputs by name (None: zero)."""
        tangents = []
        for source in self.tangents:
            given, want = grads.get(source.name), self.program.node(source.node).meta["val"]
            if given is None:
                given = torch.zeros(tuple(want.shape), dtype=want.dtype, device=self.grid.device)
            elif isinstance(given, DTensor):
                given = whole(given, self.grid)
            tangents.append(given.to(want.dtype).contiguous())
        results = self._run(self.backward, [*saved, *tangents])
        taken = _Taken([*saved, *tangents])
        return {name: taken.own(grad) for name, grad in zip(self.grads, results) if grad is not None}

    def _run(self, graph: Any, flat: Sequence[Any]) -> Any:
        """The graph says itself where it casts: autocast is off. A rank that is gone is told from a bad value."""
        with torch.autocast(self.grid.device.type, enabled=False), answered(self.grid):
            return graph(*flat)

    def _shape(self, sink: Sink) -> tuple[int, ...]:
        value = self.program.node(str(sink.node)).meta["val"]
        return tuple((value[sink.index] if isinstance(value, (tuple, list)) else value).shape)


@dataclass
class _Feed:
    params: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    inputs: list[torch.Tensor]
    seed: int


class _Run(torch.autograd.Function):
    """The step as autograd sees it: parameters in, outputs out."""

    @staticmethod
    def forward(ctx: Any, step: Step, feed: _Feed, names: list[str], *params: torch.Tensor) -> Any:
        values, saved = step.run_forward(feed)
        outputs = step.outputs(values)
        ctx.step, ctx.names = step, names
        for name, param in zip(names, params):
            if name not in step.wraps and isinstance(param, DTensor):
                step.wraps[name] = rewrap(param)
        ctx.set_materialize_grads(False)
        # DTensors too, which know that they were changed since, as an optimizer step before the backward does.
        read = [feed.params[s.name] for s in (step.sources[i] for i in step.saved_inputs) if s.kind == "param"]
        ctx.num_saved = len(saved)
        ctx.save_for_backward(*saved, *read)
        step.saved_bytes = sum({t.data_ptr(): t.nbytes for t in saved}.values())
        wanted = {s.name for s in step.tangents}
        ctx.sinks = [s for s in step.values if s.kind == "output" and s.node is not None]
        ctx.mark_non_differentiable(*(o for s, o in zip(ctx.sinks, outputs) if s.name not in wanted and not s.cut))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        step: Step = ctx.step
        for sink, grad in zip(ctx.sinks, grads):
            if sink.cut and grad is not None:
                raise RuntimeUseError(
                    f"a gradient arrives at output {sink.name!r}, but beside a loss in the output only that loss is "
                    f"differentiated: put everything that is to be minimised in it (inside the model, or with loss= of "
                    f"autopar.compile), or use {sink.name}.detach()"
                )
        local = step.run_backward(ctx.saved_tensors[: ctx.num_saved], dict(zip((s.name for s in ctx.sinks), grads)))
        out: list[Any] = []
        for name in ctx.names:
            # Not kept in `local`: autograd takes over what nobody else holds, and copies the rest.
            grad = local.pop(name, None)
            out.append(grad if grad is None or name not in step.wraps else step.wraps[name](grad))
        return (None, None, None, *out)


class _Taken:
    """Memory that belongs to others: a gradient is added to in place later, so that it must not share any."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.foreign = {t.untyped_storage().data_ptr() for t in tensors}
        self.spans: dict[int, list[tuple[int, int]]] = {}

    def own(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient, copied if it overlaps memory handed out before; disjoint pieces of a bucket are not."""
        grad = grad.contiguous()
        store, start = grad.untyped_storage().data_ptr(), grad.data_ptr()
        end = start + grad.nbytes
        spans = self.spans.setdefault(store, [])
        if store in self.foreign or any(start < b and a < end for a, b in spans):
            return grad.clone()
        spans.append((start, end))
        return grad


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's piece of a DTensor; a plain tensor is its own piece. Never records a gradient."""
    if not torch.is_grad_enabled():  # as in a step, which asks for all parameters
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _result_names(gm: fx.GraphModule) -> list[str]:
    (results,) = next(n for n in gm.graph.nodes if n.op == "output").args
    return [n.name if isinstance(n, fx.Node) else "" for n in results]


def check_backend(backend: str) -> None:
    """Raise RuntimeUseError for a backend that does not exist."""
    if backend not in BACKENDS:
        raise RuntimeUseError(f"backend {backend!r} does not exist; choose one of {', '.join(BACKENDS)}")
