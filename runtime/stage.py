"""One pipeline stage on this rank: its graphs, what they save between forward and backward, and its gradients.

A stage is a `Work` for the executor. Per micro-batch it runs the forward graph, keeps what the backward reads, and
later the backward graph, or its two halves; gradients of parameters are added up. Parameters are read as they are when
a graph runs: with a schedule that steps the optimizer on the way, a backward sees the current ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.errors import PipelineError, RuntimeUseError
from autopar.graph import BACKWARD, FORWARD
from autopar.pipeline.cut import Stage
from autopar.plan import Plan
from autopar.runtime.step import Compiled, Compiler, local_of
from autopar.runtime.taken import Taken
from autopar.runtime.work import Form, Forms


@dataclass(frozen=True)
class LoweredStage:
    """What the driver hands over: a stage, its plan, and this rank's bound graphs.

    Attributes:
        training: whether there is a backward.
        forward, backward, saved_inputs: as in `autopar.runtime.step.Lowered`, the forward not gated.
        inputs, weights, input_reads, weight_reads: the backward's halves, as in `autopar.passes.halves.Halves`.
            Of backward and halves, those that the schedule has no use for are None.
        reduce: from sums of gradients to gradients, for the parameters `reduced`; None if there is nothing to do.
        receives_forward ... sends_backward: forms of what is received and sent, on this rank.
    """

    stage: Stage
    plan: Plan
    training: bool
    forward: fx.GraphModule
    backward: fx.GraphModule | None
    saved_inputs: tuple[int, ...]
    inputs: fx.GraphModule | None
    weights: fx.GraphModule | None
    input_reads: tuple[int, ...]
    weight_reads: tuple[int, ...]
    reduce: fx.GraphModule | None
    reduced: tuple[str, ...]
    receives_forward: Forms
    sends_forward: Forms
    receives_backward: Forms
    sends_backward: Forms
    compiler: Compiler | None = None


@dataclass
class Batch:
    """What a stage is given for one run of a table.

    Attributes:
        params, buffers: by name, as they are.
        inputs: of every micro-batch, by name: this rank's pieces.
        seeds: of every micro-batch.
        weights: of every micro-batch's loss: its gradient.
        keep: which outputs are to be kept, by name.
        scale: of the gradient with which the backward starts.
    """

    params: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    inputs: Sequence[Mapping[str, torch.Tensor]]
    seeds: Sequence[int]
    weights: Sequence[float]
    keep: frozenset[str] = frozenset()
    scale: float = 1.0


class StageWork:
    """A stage that computes. `start` before, `finish` behind each run of a table."""

    def __init__(self, lowered: LoweredStage, device: torch.device) -> None:
        self.lowered, self.device = lowered, device
        stage, program = lowered.stage, lowered.stage.program
        self.receives_forward, self.sends_forward = lowered.receives_forward, lowered.sends_forward
        self.receives_backward, self.sends_backward = lowered.receives_backward, lowered.sends_backward
        self.graphs: dict[str, Callable[[list[Any]], Sequence[Any]]] = {}  # compiled at most once
        for name in ("forward", "backward", "inputs", "weights", "reduce"):
            gm = getattr(lowered, name)
            if gm is not None:
                self.graphs[name] = gm if lowered.compiler is None else Compiled(gm, lowered.compiler)
        received = {name: i for i, name in enumerate(stage.receives)}
        returned = {name: i for i, name in enumerate(stage.receives_back)}
        self._sources = [s for s in program.sources if s.phase == FORWARD]
        self._received = [received.get(s.name, -1) if s.kind == "input" else -1 for s in self._sources]
        self._late = [(s, returned.get(s.name, -1)) for s in program.sources if s.phase == BACKWARD]
        self._has_loss = any(s.kind == "tangent" for s, _ in self._late)
        self._values = [s for s in program.sinks if s.phase == FORWARD]
        at = {s.name: i for i, s in enumerate(self._values) if s.kind == "output"}
        self._sent = [at[name] for name in stage.sends]
        self._ends = [s for s in program.sinks if s.phase == BACKWARD]
        self._grads = [s.name for s in self._ends if s.kind == "grad"]
        self._replaced = [s.name for s in self._values if s.kind == "buffer" and s.node is not None]
        self._params = [
            (k, self._sources[i].name) for k, i in enumerate(lowered.saved_inputs) if self._sources[i].kind == "param"
        ]
        #: With a schedule that steps the optimizer: what U calls with the gradients, reduced.
        self.on_update: Callable[[dict[str, torch.Tensor]], None] | None = None
        #: Whether a backward reads the weights of its forward, of which copies are then kept.
        self.stash = False
        self._window = 0
        self._moved: dict[str, torch.Tensor] = {}  # what the last update has added to trained parameters
        #: Updates between forward and backward of micro-batches: their sum, number and most.
        self.drift_sum, self.drift_count, self.drift_most = 0, 0, 0
        self._version = 0
        self._seen: dict[int, int] = {}  # micro-batch in flight -> version of its forward
        self._shares: dict[int, float] = {}  # micro-batch in flight -> weight of its loss
        self._first = 0
        self.batch: Batch | None = None
        self.grads: dict[str, torch.Tensor] = {}
        self.outputs: dict[int, dict[str, torch.Tensor]] = {}
        self.losses: dict[int, torch.Tensor] = {}
        self._flights: dict[int, list[Any]] = {}  # what is kept of micro-batches between forward and backward

    # ---- a run of a table --------------------------------------------------------------------------------------

    def start(self, batch: Batch) -> None:
        """What the micro-batches are. Forgets what a run that failed has left."""
        self.feed(batch, 0)
        self.grads, self.outputs, self._flights, self._seen, self._shares = {}, {}, {}, {}, {}

    def count_from(self, updates: int, window: int, before: StageWork | None = None) -> None:
        """So many updates have been made, perhaps by another program of the same parameters; nothing is in flight.

        window: micro-batches to an update, if a forward is to read the weights that its backward will find; else 0.
        before: the work that has made them: its count of drift goes on, and its last update is known here.
        """
        self._version, self._window = updates, window
        if before is not None:
            self.drift_sum, self.drift_count, self.drift_most = before.drift_sum, before.drift_count, before.drift_most
            self._moved = before._moved

    def feed(self, batch: Batch, first: int) -> None:
        """Micro-batches from number `first` on; others may be in flight."""
        self.batch, self._first = batch, first

    def finish(self) -> dict[str, torch.Tensor]:
        """Local gradients by parameter name, reduced; those that stages share hold this stage's part.

        Raises:
            PipelineError: a micro-batch is still to be finished: the table has no backward for it.
        """
        if self._flights:
            raise PipelineError(
                f"stage {self.lowered.stage.index} has micro-batches {sorted(self._flights)} in flight after the last "
                "action; the schedule has no whole backward for them"
            )
        self.reduce()
        grads, self.grads = self.grads, {}
        self.batch = None
        return grads

    def reduce(self) -> None:
        """Reduce what has been added up unreduced. A collective call of the stage's ranks."""
        names = self.lowered.reduced
        if "reduce" in self.graphs and names:
            box: list[Any] = [self.grads.pop(name) for name in names]
            taken = Taken([])
            for name, grad in zip(names, self.graphs["reduce"](box)):
                self.grads[name] = taken.own(grad)

    # ---- what the executor calls -------------------------------------------------------------------------------

    def forward(self, micro: int, received: list[torch.Tensor]) -> list[torch.Tensor]:
        """F: run the forward graph, keep what the backward reads."""
        batch, place = self._given(), micro - self._first
        assert 0 <= place < len(batch.inputs), f"micro-batch {micro} is none of those given, from {self._first} on"
        buffers = batch.buffers
        if self._replaced:
            buffers = {**buffers, **{name: buffers[name].clone() for name in self._replaced}}
        flat: list[Any] = []
        for source, at in zip(self._sources, self._received):
            if at >= 0:
                flat.append(received[at])
            elif source.kind == "param":
                flat.append(self._weight(source.name, micro))
            elif source.kind == "buffer":
                flat.append(buffers[source.name])
            elif source.kind == "seed":
                flat.append(torch.full((), batch.seeds[place], dtype=torch.int64, device=self.device))
            else:
                flat.append(batch.inputs[place][source.name])
        saved = [flat[i] for i in self.lowered.saved_inputs]
        for at, name in self._params if self._moved else ():
            saved[at] = local_of(batch.params[name])
        results = list(self.graphs["forward"](flat))
        count = len(self._values)
        values = results[:count]
        if self.lowered.training:
            self._flights[micro] = saved + results[count:]
            self._seen[micro] = self._version
            self._shares[micro] = batch.weights[place]
        del results
        kept = {}
        for sink, value in zip(self._values, values):
            if sink.kind == "buffer" and sink.node is not None:
                batch.buffers[sink.name].copy_(value)
            elif sink.name in batch.keep and value is not None:
                kept[sink.name] = value
        if kept:
            self.outputs[micro] = kept
        return [values[i] for i in self._sent]

    def backward(self, micro: int, received: list[torch.Tensor]) -> list[torch.Tensor]:
        """B: run the backward graph, add up gradients."""
        self._note_drift(micro)
        share = self._shares.pop(micro)
        if self._idle(share):
            self._flights.pop(micro)
            return self._nothing()
        box = self._backward_box(micro, share, received)
        held = Taken(box)
        results = list(self.graphs["backward"](box))
        grads = [r for s, r in zip(self._ends, results) if s.kind == "grad"]
        sent = [r for s, r in zip(self._ends, results) if s.kind != "grad"]
        del results
        self._add(grads, held.also(sent))
        return sent

    def input_grads(self, micro: int, received: list[torch.Tensor]) -> list[torch.Tensor]:
        """I: gradients that are sent back; what W needs stays."""
        self._note_drift(micro)
        share = self._shares[micro]
        if self._idle(share):
            self._flights[micro] = []
            return self._nothing()
        box = self._backward_box(micro, share, received)
        kept = [box[i] for i in self.lowered.weight_reads]
        mine = [box[i] for i in self.lowered.input_reads]
        del box
        results = list(self.graphs["inputs"](mine))
        sent, handed = results[: len(self.sends_backward)], results[len(self.sends_backward) :]
        taken = Taken(sent)
        self._flights[micro] = kept + [taken.apart(t) for t in handed]
        return sent

    def weight_grads(self, micro: int) -> None:
        """W: the rest of the backward."""
        box = self._flights.pop(micro)
        if self._idle(self._shares.pop(micro)):
            return
        held = Taken(box[: len(self.lowered.weight_reads)])
        self._add(list(self.graphs["weights"](box)), held)

    def update(self, number: int) -> None:
        """U: step the optimizer with what has been added up.

        Raises:
            RuntimeUseError: no optimizer was given.
        """
        if self.on_update is None:
            raise RuntimeUseError(
                f"the schedule steps the optimizer of stage {self.lowered.stage.index} (update {number}), and there is "
                "none; pass optimizer= to autopar.compile and call pm.train_step, or take a synchronous schedule"
            )
        if self.stash:
            self._keep_weights()
        self.reduce()
        grads, self.grads = self.grads, {}
        moved = {name: weight.clone().neg_() for name, weight in self._weights(grads if self._window else ()).items()}
        self.on_update(grads)
        self._version += 1
        self._moved = {name: moved[name].add_(now) for name, now in self._weights(moved).items()}

    def _weights(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        params = self._given().params
        return {name: local_of(params[name]).detach() for name in names}

    def _weight(self, name: str, micro: int) -> torch.Tensor:
        """What the forward of a micro-batch reads: a parameter as it is, or as its backward is to find it."""
        weight = local_of(self._given().params[name])
        if not self._window or name not in self._moved:
            return weight
        more = micro // self._window - self._version  # updates until then: `laws.backward_version`
        return torch.add(weight, self._moved[name], alpha=more) if more > 0 else weight

    def _keep_weights(self) -> None:
        """Give micro-batches in flight copies of the weights that are about to change."""
        copies: dict[str, torch.Tensor] = {}
        for micro, box in self._flights.items():
            if self._seen[micro] == self._version:
                for at, name in self._params:
                    if name not in copies:
                        copies[name] = box[at].clone()
                    box[at] = copies[name]

    # ---- inside ------------------------------------------------------------------------------------------------

    def _given(self) -> Batch:
        assert self.batch is not None, "no batch: start() comes first"
        return self.batch

    def _note_drift(self, micro: int) -> None:
        drift = self._version - self._seen.pop(micro)
        self.drift_sum, self.drift_count = self.drift_sum + drift, self.drift_count + 1
        self.drift_most = max(self.drift_most, drift)

    def _idle(self, share: float) -> bool:
        """Whether the loss of a micro-batch counts for nothing: it has no labels, its mean is 0 / 0, its gradient 0."""
        return self._has_loss and share == 0

    def _nothing(self) -> list[torch.Tensor]:
        return [torch.zeros(shape, dtype=dtype, device=self.device) for dtype, shape in self.sends_backward]

    def _backward_box(self, micro: int, share: float, received: list[torch.Tensor]) -> list[Any]:
        box = self._flights.pop(micro)
        for source, at in self._late:
            if at >= 0:
                box.append(received[at])
                continue
            like = self.lowered.stage.program.node(source.node).meta["val"]
            box.append(torch.full(tuple(like.shape), share * self._given().scale, dtype=like.dtype, device=self.device))
        return box

    def _add(self, grads: list[Any], held: Taken) -> None:
        for i, name in enumerate(self._grads):
            grad, grads[i] = grads[i], None
            if grad is None:
                continue
            if name in self.grads:
                self.grads[name] += grad
            else:
                self.grads[name] = held.own(grad)


def forms(gm: fx.GraphModule, positions: Sequence[int]) -> Forms:
    """Forms of the results at these positions of a graph's output."""
    (results,) = next(n for n in gm.graph.nodes if n.op == "output").args
    return tuple(form(results[i]) for i in positions)  # type: ignore[index, arg-type]


def form(node: fx.Node) -> Form:
    """Form of the tensor of a node."""
    return Form(node.meta["val"].dtype, tuple(node.meta["val"].shape))


__all__ = ["Batch", "LoweredStage", "StageWork", "form", "forms"]
