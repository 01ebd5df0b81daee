"""One lowered program on this rank, as a differentiable function of its parameters.

The two local graphs. What they take they take in one list, which they empty, so that every tensor dies behind its last
reader:

    forward([gate, source, ...])        a function to be called before the first collective, then every source but the
                                        tangents, in the program's order
        -> (value, ..., saved, ...)     every sink but the gradients, in order, then what the backward reads
    backward([input, ..., saved, ..., tangent, ...])
                                        the forward's arguments at `saved_inputs`, what it saved, and the tangents
        -> (grad, ...)                  the grad sinks, in the program's order; None where there is none

The backward thus eats what the forward saved. If it is called again (`retain_graph=True`), the forward is run again
first, from the same inputs, parameters and buffers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from autopar.buffers import read_besides
from autopar.errors import PlanError, RuntimeUseError
from autopar.graph import Program, Sink
from autopar.offload import abandon, on_host
from autopar.plan import Plan
from autopar.runtime.groups import Grid
from autopar.runtime.handshake import answered
from autopar.runtime.powersgd import PowerSgd, rank_of
from autopar.runtime.scaler import LossScaler
from autopar.runtime.storage import as_dtensor, rewrap, whole
from autopar.runtime.taken import Taken, memory_of
from autopar.spec import R, Spec, shard

BACKENDS = ("eager", "inductor")
#: Makes, of a graph and the arguments of one call, what takes such arguments in one list, which it empties.
Compiler = Callable[[fx.GraphModule, Sequence[torch.Tensor]], Callable[[list[Any]], Sequence[Any]]]
#: dtype, shape and strides of an argument.
_Form = tuple[torch.dtype, torch.Size, tuple[int, ...]]
#: What gradients that lie on the host are handed to: (name of the parameter, this rank's piece).
Take = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True)
class Lowered:
    """What the driver hands over: a program, the plan it is lowered under, and this rank's bound graphs.

    The graphs are as the backend takes them: "eager" those that `passes.boxed` makes (the forward gated), "inductor"
    those that take their arguments one by one, and `compiler` for them. `backward` is None for a forward-only program;
    `saved_inputs` are positions among the sources. `news` is what to tell a user who waited for it, `{changes}`
    standing for the arguments that made it necessary; or nothing. `left`: gradients that are still sums over some axes
    when the backward is done, for PowerSGD. `hosted`: parameters whose gradients the backward hands over as they are
    made (`boxed(taken=)`; a compiled one returns them). `alone`: of both graphs, positions of results that are known to
    lie in memory of their own.
    """

    program: Program
    plan: Plan
    forward: fx.GraphModule
    backward: fx.GraphModule | None
    saved_inputs: tuple[int, ...] = ()
    compiler: Compiler | None = None
    news: str = ""
    left: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hosted: frozenset[str] = frozenset()
    alone: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())


class Step:
    """Runs one `Lowered`. Outputs are plain tensors where the plan holds them whole, else DTensors."""

    def __init__(
        self, lowered: Lowered, grid: Grid, data_axes: Sequence[str] = (), powersgd: PowerSgd | None = None
    ) -> None:
        """`data_axes`: mesh axes over which the inputs come in pieces already (local batches).

        `powersgd`: what the module keeps of compressed gradients.
        """
        program = lowered.program
        self.left, self.powersgd = lowered.left, powersgd or PowerSgd()
        self.program, self.plan, self.grid = program, lowered.plan, grid
        self.forward: Any = lowered.forward
        self.backward: Any = lowered.backward
        if lowered.compiler is not None:
            self.forward = Compiled(lowered.forward, lowered.compiler, gated=True)
            if lowered.backward is not None:
                self.backward = Compiled(lowered.backward, lowered.compiler)
        self.saved_inputs, self.hosted = lowered.saved_inputs, lowered.hosted
        self.hands_over = bool(lowered.hosted) and lowered.compiler is None
        self.sources = [s for s in program.sources if s.kind != "tangent"]
        self.tangents = program.of_kind("tangent")
        self.values = [s for s in program.sinks if s.kind != "grad"]
        self.grads = [s.name for s in program.sinks if s.kind == "grad"]
        self.uses_seed = bool(program.of_kind("seed"))
        self.saved_bytes = self.waiting_bytes = 0  # of what the last forward has saved: on the device, on the host
        self.wraps: dict[str, Callable[[torch.Tensor], DTensor]] = {}  # gradients of parameters that are DTensors
        places = {s.node: s for s in program.sources}
        names = _result_names(lowered.forward)
        self._handed_back = [name in places for name in names]
        # Of what the backward needs of the forward, and of gradients, those of which it must be looked up who else has
        # their memory.
        before, first = len(lowered.saved_inputs), len(self.values)
        forward, backward = lowered.alone
        self.unsure = [before + i - first for i in range(first, len(names)) if i not in forward]
        self.grads_apart = [i in backward for i in range(len(self.grads))]
        self.renewed = [(i, s.name) for i, s in enumerate(self.values) if s.kind == "buffer" and s.node is not None]
        self.replaced = [name for _, name in self.renewed]
        # Of those, what the backward reads, or the forward if it is run again, must be kept as it was.
        self.copied = read_besides(program)
        self._whole: Spec = (R,) * len(grid.mesh.sizes)
        self._cuts = [self._cut(s.name, data_axes) for s in program.of_kind("input")]

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
        """The user's outputs, flat, in the order of the output sinks. New buffer values are written in place.

        `gate` is called before the first collective; what it raises ends the step. `take` gets the gradients that lie
        on the host, which autograd never sees. `scaler` scales the loss, and takes that out of the gradients again.
        """
        feed = _Feed(params, buffers, list(inputs), seed, gate or _open, take, scaler)
        if self.backward is not None:
            trainable = [s.name for s in self.sources if s.kind == "param" and params[s.name].requires_grad]
            tensors = _Run.apply(self, feed, trainable, *(params[n] for n in trainable))
        else:
            with torch.no_grad():
                values = self.run_forward(feed.with_copies(self.copied)).values
                self.replace_buffers(feed, values)
                tensors = self.outputs(values)
        at = iter(tensors)
        return [s.constant if s.node is None else next(at) for s in self.values if s.kind == "output"]

    def pieces(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inputs as the graph takes them: this rank's pieces, on its device."""
        mesh, out = self.grid.mesh, []
        for tensor, cut in zip(inputs, self._cuts):
            if cut != self._whole:
                tensor = shard(tensor, cut, mesh.sizes, mesh.coordinates(self.grid.rank))
            tensor = tensor.to(self.grid.device).resolve_conj().resolve_neg()  # kernels read memory
            out.append(tensor.contiguous())
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

    def run_forward(self, feed: _Feed) -> _Done:
        """The forward's results; changes nothing."""
        flat: list[Any] = [feed.gate]
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
        saved = [flat[1 + i] for i in self.saved_inputs]
        foreign = {memory_of(t) for t in flat[1:]} if self.unsure else set()
        results = list(self._run(self.forward, flat))
        count = len(self.values)
        values, shared = results[:count], list(range(len(saved)))
        saved += results[count:]
        if self.unsure:
            foreign.update(memory_of(t) for t in values if t is not None)
            shared += [i for i in self.unsure if memory_of(saved[i]) in foreign]
        return _Done(values, saved, shared)

    def replace_buffers(self, feed: _Feed, values: Sequence[torch.Tensor]) -> None:
        """Write the new values of buffers."""
        for at, name in self.renewed:
            feed.buffers[name].copy_(values[at])

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

    def run_backward(
        self,
        saved: list[Any],
        held: Sequence[torch.Tensor],
        grads: Mapping[str, torch.Tensor | None],
        take: Take | None = None,
        scaler: LossScaler | None = None,
    ) -> dict[str, Any]:
        """Local gradient by parameter name, from the gradients of the outputs by name (None: zero).

        Empties `saved`; of that, `held` belongs to others too. What lies on the host goes to `take`.
        """
        assert not self.hosted or take is not None  # the module sees to that
        tangents, factor = [], 1.0 if scaler is None else scaler.factor
        for source in self.tangents:
            given, want = grads.get(source.name), self.program.node(source.node).meta["val"]
            if given is None:
                given = torch.zeros(tuple(want.shape), dtype=want.dtype, device=self.grid.device)
            elif isinstance(given, DTensor):
                given = whole(given, self.grid)
            given = given.to(want.dtype).contiguous()
            tangents.append(given if factor == 1.0 else given * factor)
        taken = Taken([] if all(self.grads_apart) else [*held, *tangents])
        saved += tangents
        if self.hands_over:
            saved.insert(0, take)
        results = self._run(self.backward, saved)
        local = {}
        for name, apart, grad in zip(self.grads, self.grads_apart, results):
            if grad is not None and take is not None and name in self.hosted:
                take(name, grad)
            elif grad is not None:
                local[name] = grad.contiguous() if apart else taken.own(grad)
        if self.left:
            with answered(self.grid):
                self.powersgd.reduce(local, self.left, rank_of(self.plan), self.grid)
        if scaler is not None:
            scaler.settle(local, factor, self.grid)
        return local

    def _run(self, graph: Any, box: list[Any]) -> Any:
        """The graph says itself where it casts: autocast is off. A rank that is gone is told from a bad value."""
        kind = self.grid.device.type
        off = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        try:
            with off, answered(self.grid):
                return graph(box)
        except BaseException:
            abandon()  # copies to and from the host whose end will not come
            raise

    def _shape(self, sink: Sink) -> tuple[int, ...]:
        value = self.program.node(str(sink.node)).meta["val"]
        return tuple((value[sink.index] if isinstance(value, (tuple, list)) else value).shape)


@dataclass
class _Feed:
    params: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    inputs: list[torch.Tensor]
    seed: int
    gate: Callable[[], object]
    take: Take | None = None
    scaler: LossScaler | None = None

    def with_copies(self, names: Sequence[str]) -> _Feed:
        """The same with copies of these buffers."""
        copies = {name: self.buffers[name].clone() for name in names}
        return replace(self, buffers={**self.buffers, **copies})


@dataclass(frozen=True)
class _Done:
    """What a forward has made: values of the output and buffer sinks, and what the backward needs.

    `shared`: which of `saved` lie in memory that the forward was given, or that a value lies in.
    """

    values: list[torch.Tensor]
    saved: list[torch.Tensor]
    shared: list[int]


def _open() -> None:
    """A gate that is open."""


class Compiled:
    """A compiled graph, called as those that run op by op are. It is made for one form of every argument."""

    def __init__(self, gm: fx.GraphModule, compiler: Compiler, gated: bool = False) -> None:
        self.gm, self.compiler, self.gated = gm, compiler, gated
        self.names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
        self.forms: list[_Form] = []
        self.run: Callable[[list[Any]], Sequence[Any]] | None = None

    def __call__(self, box: list[Any]) -> Any:
        if self.gated:
            box.pop(0)()
        forms = [(t.dtype, t.shape, t.stride()) for t in box]
        if self.run is None:  # as late as that: now strides are known
            self.run, self.forms = self.compiler(self.gm, box), forms
        if forms != self.forms:
            self._compare(forms)
        return self.run(box)

    def _compare(self, forms: Sequence[_Form]) -> None:
        for name, was, now in zip(self.names, self.forms, forms):
            if _plain(was) != _plain(now):
                before, after = (
                    f"{dtype} {tuple(shape)} with strides {strides}" for dtype, shape, strides in (was, now)
                )
                raise RuntimeUseError(
                    f"the graph is compiled for {name} as {before}, and gets {after}: write values into parameters and "
                    "buffers with copy_(), which keeps their form, or compile the module again (autopar.compile)"
                )


def _plain(form: _Form) -> _Form:
    """The form with strides of 0 where there is no second element to stride to."""
    dtype, shape, strides = form
    return dtype, shape, tuple(s if n > 1 else 0 for n, s in zip(shape, strides)) if 0 not in shape else ()


class _Run(torch.autograd.Function):
    """The step as autograd sees it: parameters in, outputs out.

    Memory that is the graph's own is kept in `ctx.box`, from which the backward takes it. What others hold anyway
    (parameters, inputs, what was handed out) is saved with autograd, which sees if it was changed meanwhile. Hooks on
    saved tensors (`torch.autograd.graph.save_on_cpu`, checkpointing round the module) thus do not see the former.
    """

    @staticmethod
    def forward(ctx: Any, step: Step, feed: _Feed, names: list[str], *params: torch.Tensor) -> Any:
        before = feed.with_copies(step.copied)
        done = step.run_forward(before)
        step.replace_buffers(feed, done.values)
        outputs = step.outputs(done.values)
        ctx.step, ctx.names, ctx.take, ctx.scaler = step, names, feed.take, feed.scaler
        for name, param in zip(names, params):
            if name not in step.wraps and isinstance(param, DTensor):
                step.wraps[name] = rewrap(param)
        ctx.set_materialize_grads(False)
        ctx.box, others = _divide(done)
        ctx.num_others = len(others)
        ctx.again = _Again(step, before)
        # DTensors too, which know that they were changed since, as an optimizer step before the backward does.
        read = [feed.params[s.name] for s in (step.sources[i] for i in step.saved_inputs) if s.kind == "param"]
        ctx.save_for_backward(*others, *read, *ctx.again.take())
        if not step.saved_bytes + step.waiting_bytes:  # of every call the same
            step.waiting_bytes = _distinct(t for t in done.saved if on_host(t))
            step.saved_bytes = _distinct(t for t in done.saved if not on_host(t))
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
        kept = ctx.saved_tensors  # raises if autograd has let go of them, or they were changed
        held = list(kept[: ctx.num_others])
        box, ctx.box = ctx.box, None
        if box is None:
            box, held = _divide(ctx.again(kept))
        others = iter(held)
        saved = [next(others) if t is None else t for t in box]
        del box
        local = step.run_backward(saved, held, dict(zip((s.name for s in ctx.sinks), grads)), ctx.take, ctx.scaler)
        out: list[Any] = []
        for name in ctx.names:
            # Not kept in `local`: autograd takes over what nobody else holds, and copies the rest.
            grad = local.pop(name, None)
            out.append(grad if grad is None or name not in step.wraps else step.wraps[name](grad))
        return (None, None, None, *out)


def _divide(done: _Done) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
    """What the backward needs, None standing for what others hold too; and that, in order."""
    own: list[torch.Tensor | None] = list(done.saved)
    for at in done.shared:
        own[at] = None
    return own, [done.saved[at] for at in done.shared]


def _distinct(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, those at one address once."""
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


class _Again:
    """The forward once more, for another backward on the same output.

    Inputs, and copies of replaced buffers, are saved with autograd, which lets go of them when there can be no other
    backward. As other heads of the same memory: who changes an input after the forward must not hear of it unless the
    forward does run again.
    """

    def __init__(self, step: Step, before: _Feed) -> None:
        self.step, self.feed = step, replace(before, gate=_open)
        self.held = [*before.params.values(), *(b for n, b in before.buffers.items() if n not in step.replaced)]
        self.versions = [_version(t) for t in self.held]
        self.seen = [(weakref.ref(t), _version(t)) for t in before.inputs]

    def take(self) -> list[torch.Tensor]:
        """What is to be saved; not held here any more."""
        copies = [self.feed.buffers[name] for name in self.step.copied]
        kept = [t.clone() if t.is_inference() else t.data for t in self.feed.inputs]
        rest = {n: b for n, b in self.feed.buffers.items() if n not in self.step.copied}
        self.feed = replace(self.feed, inputs=[], buffers=rest)
        return [*kept, *copies]

    def __call__(self, kept: Sequence[torch.Tensor]) -> _Done:
        """Run it, given the tensors that autograd has kept: what `take` gave is the last of them.

        Raises:
            RuntimeUseError: a parameter, buffer or input was changed since.
        """
        inputs = [(ref(), version) for ref, version in self.seen]
        changed = any(t is not None and _version(t) != version for t, version in inputs)
        if changed or [_version(t) for t in self.held] != self.versions:
            raise RuntimeUseError(
                "backward is called again on the same output, but a parameter, buffer or input was changed in between "
                "(by optimizer.step(), perhaps): call the module again, or add the losses and call backward once"
            )
        names = self.step.copied
        mine = kept[len(kept) - len(self.seen) - len(names) :]
        copies = dict(zip(names, mine[len(self.seen) :]))
        feed = replace(self.feed, inputs=list(mine[: len(self.seen)]), buffers={**self.feed.buffers, **copies})
        with torch.no_grad():
            return self.step.run_forward(feed)


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor has been changed, where torch counts that."""
    return 0 if tensor.is_inference() else tensor._version


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
