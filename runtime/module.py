"""ParallelModule: the compiled model as an ordinary nn.Module with the user's names and sharded parameters."""

from __future__ import annotations

import inspect
import resource
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from autopar import tree
from autopar.errors import BatchError, CaptureError, RuntimeUseError
from autopar.mesh import Mesh
from autopar.pipeline.plans import inner
from autopar.plan import Plan
from autopar.runtime.groups import Grid
from autopar.runtime.handshake import Argument, Call, Control, answered, checksum, tensor_form
from autopar.runtime.lane import lane_of
from autopar.runtime.optimizers import watch
from autopar.runtime.pipeline import Pipelined, PipelineStep
from autopar.runtime.state import Build, Options, State
from autopar.runtime.step import Step, local_of
from autopar.runtime.storage import (
    Loader,
    build_tree,
    fill_tree,
    first_difference,
    placements,
    same_fields,
    scatter,
    whole,
)
from autopar.runtime.training import Trainable, missing_text


class ParallelModule(Trainable):
    """A compiled model. Made by `autopar.compile`; used like the model it was made from.

    Parameters are DTensors under the model's own names, buffers are whole on every rank. The first call (or
    `example=`) fixes where the parameters lie; other input shapes are captured and planned when they first come,
    with a warning, and keep that storage. The model itself is not changed and may be deleted.
    """

    def __init__(
        self, model: nn.Module, skeleton: nn.Module, grid: Grid, control: Control, build: Build, options: Options
    ) -> None:
        super().__init__()
        shells = build_tree(self, skeleton)
        signature = inspect.signature(skeleton.forward).parameters
        parameters = signature.values()
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names += [f"*{p.name}" for p in parameters if p.kind is p.VAR_POSITIONAL]
        parts = tuple(_part(grid.mesh, r, options.data_axes)[0] for r in range(grid.size))
        state = State(grid, control, build, options, skeleton, shells, model, list(signature), names, parts=parts)
        self.__dict__["_autopar"] = state

    # ---- what the user asks ------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan of the first program: where the parameters lie.

        Raises:
            RuntimeUseError: nothing has been planned yet.
        """
        state = self._state
        if state.plan is None:
            raise RuntimeUseError(
                "this module has no plan yet: it was compiled without example=; pass example= to autopar.compile, or "
                "call the module once before asking for its parameters (so also before making the optimizer)"
            )
        return state.plan

    @property
    def predicted(self) -> Mapping[str, Any]:
        """Seconds and bytes that the planner expects."""
        return self.plan.predicted

    @property
    def mesh(self) -> Mesh:
        """The mesh it runs on."""
        return self._state.grid.mesh

    @property
    def sampler_args(self) -> dict[str, int]:
        """`num_replicas` and `rank` for `DistributedSampler(dataset, **pm.sampler_args)` with local batches.

        With global batches every rank reads the same data: one replica.
        """
        state = self._state
        part, count = _part(state.grid.mesh, state.grid.rank, state.options.data_axes)
        return {"num_replicas": count, "rank": part}

    def memory_per_rank(self) -> list[dict[str, int]]:
        """Bytes held on every rank, by kind; a collective call.

        `parameters`, `gradients`, `buffers` as they lie now; `activations` saved there for backward by the last
        step; `peak` of the process (device memory on CUDA, resident on CPU); `host`: optimizer and activations there.
        """
        state, last = self._state, self._state.last
        grads = [local_of(p.grad) for p in self.parameters() if p.grad is not None]
        if state.grid.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(state.grid.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row = {
            "parameters": sum(local_of(p).nbytes for p in self.parameters()),
            "gradients": sum(t.nbytes for t in grads),
            "buffers": sum(t.nbytes for t in self.buffers()),
            "activations": last.saved_bytes if last else 0,
            "host": state.host_bytes + (last.waiting_bytes if isinstance(last, Step) else 0),
            "peak": peak,
        }
        return [dict(zip(row, values)) for values in state.control.rows(list(row.values()))]

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The state dict as plain whole tensors on the host, on every rank; a collective call, one tensor at a time.

        It is what a plain model loads: `model.load_state_dict(pm.full_state_dict())`.
        """
        state, own = self._state, self.state_dict()
        out = {}
        for name, like in state.skeleton.state_dict().items():
            with answered(state.grid):
                value = own.get(name)
                full = whole(value, state.local) if isinstance(value, DTensor) else value
                full = state.from_owner(name, full, like)
            out[name] = full.detach().cpu().clone()
        return out

    # ---- nn.Module ---------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, under an asynchronous schedule without gradients; see `autopar.compile`.

        Raises:
            BatchError: the arguments cannot be taken, or differ between ranks.
            RankMismatchError: another rank failed, or runs another step.
            RuntimeUseError: parameters without values.
        """
        self.settle()
        state = self._state
        if self._only_evaluates():
            return torch.no_grad()(self.forward)(*args, **kwargs)
        call: Call | None = None
        failure: Exception | None = None
        step: Step | PipelineStep | None = None
        inputs: list[torch.Tensor] = []
        try:
            if state.missing:
                raise RuntimeUseError(missing_text(state.missing))
            call, key = self._describe(args, kwargs)
            step = state.steps.get(key)
            inputs = step.program.flatten(args, kwargs) if step is not None else []
        except Exception as error:  # told to the other ranks before it is raised here
            failure = error
        check = state.options.check and state.grid.size > 1
        if failure is not None and not check:
            raise failure
        seed, gate = 0, None
        known = failure is None and call is not None and step is not None and not step.uses_seed
        if check and known and call is not None and not self._unseen(call):
            gate = state.control.ask(call)
        elif check or step is None or step.uses_seed:
            if step is not None and step.uses_seed:
                call = _with_seed(call)
            seed = state.control.agree(call, failure, check=check)
        assert call is not None
        if gate is None and check:
            self._warn_unvaried(call, args, kwargs)
        if step is None:
            step = state.steps[key] = self._build(args, kwargs, call)
            if self._only_evaluates():  # the first plan has said so
                return self.forward(*args, **kwargs)
            if step.uses_seed:
                seed = state.control.agree(_with_seed(call), check=False)
            if state.missing:
                raise RuntimeUseError(missing_text(state.missing))
            inputs = step.program.flatten(args, kwargs)
        state.last = step
        params, buffers = state.tensors()
        try:
            return step.program.pack(step(params, buffers, step.pieces(inputs), seed, gate, state.take, state.scaler))
        except Exception:
            if gate is not None:
                gate()  # the others may wait to hear how the ranks differ, which is then what is to be told
            raise

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Capture, plan and shard for these arguments without running; `autopar.compile(example=...)` calls it."""
        state = self._state
        call: Call | None = None
        failure: Exception | None = None
        try:
            call, key = self._describe(args, kwargs)
        except Exception as error:  # told to the other ranks before it is raised here
            failure = error
        state.control.agree(call, failure)
        assert call is not None
        if key not in state.steps:
            state.steps[key] = self._build(args, kwargs, call)

    def get_submodule(self, target: str) -> nn.Module:
        """As in nn.Module, and also where a child is called like an attribute of ours ("plan")."""
        head, _, rest = target.partition(".")
        child = self._modules.get(head)
        return super().get_submodule(target) if child is None else child.get_submodule(rest)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As in nn.Module. Raises RuntimeUseError before the first plan."""
        self.plan  # noqa: B018  (raises if there is none)
        return super().named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """As in nn.Module. Raises RuntimeUseError before the first plan."""
        self.plan  # noqa: B018
        return super().named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Under the model's own names; parameters as DTensors, for distributed checkpoints and compiled modules.

        A plain model cannot take DTensors: `model.load_state_dict(pm.state_dict())` ends in torch's error "got mixed
        torch.Tensor and DTensor". For a plain model use `pm.full_state_dict()`.

        Raises:
            RuntimeUseError: before the first plan.
        """
        self.plan  # noqa: B018
        self.settle()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load DTensors (of any placement) or whole plain tensors, for example a checkpoint of the plain model.

        Raises:
            RuntimeUseError: with assign=True, which would replace the sharded parameters.
        """
        if assign:
            raise RuntimeUseError(
                "assign=True would replace the sharded parameters; use load_state_dict(..., assign=False)"
            )
        elsewhere, like = self._state.elsewhere(), self._state.skeleton.state_dict()
        entire = any(k in state_dict for k in elsewhere)  # not what this rank's own state_dict() gives
        lost = sorted(k for k in elsewhere if k in like and k not in state_dict) if strict and entire else []
        wrong = sorted(k for k in elsewhere if k in like and k in state_dict and state_dict[k].shape != like[k].shape)
        if lost or wrong:  # of other stages, whose ranks say so too: none of them goes on alone
            raise RuntimeError(f"Error(s) in loading state_dict: missing keys {lost}, sizes differ for {wrong}")
        return super().load_state_dict(state_dict, strict=strict)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Bring every value into our placements; nn.Module calls it also for a module that holds this one."""
        own, state, loaded = self.state_dict(keep_vars=True), self._state, set()
        for name in state.elsewhere():  # other stages load them
            state_dict.pop(prefix + name, None)
        for name, mine in own.items():
            value = state_dict.get(prefix + name)
            if not isinstance(value, torch.Tensor) or value.shape != mine.shape:
                continue  # nn.Module says so
            loaded.add(id(mine))
            with torch.no_grad():
                if isinstance(mine, DTensor) and isinstance(value, DTensor) and value.device_mesh == mine.device_mesh:
                    value = value.redistribute(mine.device_mesh, mine.placements)
                elif isinstance(value, DTensor):
                    value = value.full_tensor()
                if isinstance(mine, DTensor) and not isinstance(value, DTensor):
                    value = scatter(value.detach(), mine, state.local)
            state_dict[prefix + name] = value
        super()._load_from_state_dict(state_dict, prefix, *rest)
        state.missing = {name for name in state.missing if name not in own or id(own[name]) not in loaded}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise RuntimeUseError(
            "a compiled module cannot be moved or cast (its graphs are made for one device and dtype); "
            "call .to(...) on the model before autopar.compile"
        )

    def extra_repr(self) -> str:
        """Mesh and state, for print."""
        return f"mesh={self.mesh}" + ("" if self._state.plan else ", not planned yet")

    # ---- inside ------------------------------------------------------------------------------------------------

    @property
    def _state(self) -> State:
        return self.__dict__["_autopar"]

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tree.Leaf]:
        """The arguments by the names of forward's parameters, in their order."""
        state = self._state
        names, order = list(state.names), state.order
        at: dict[str, Any] = {}
        if names and names[-1].startswith("*"):
            rest = names.pop()[1:]
            names += [f"{rest}[{i}]" for i in range(len(args) - len(names))]
        if len(args) > len(names):
            raise BatchError(
                f"{type(state.skeleton).__name__}.forward takes at most {len(names)} positional argument"
                f"{'s' * (len(names) != 1)}, {len(args)} were given"
            )
        at.update(zip(names, args))
        for name in kwargs:
            if name in at:
                raise BatchError(f"argument {name!r} is given twice, by position and by name")
        at.update(kwargs)
        at = dict(sorted(at.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
        if all(isinstance(value, torch.Tensor) for value in at.values()):
            return [tree.Leaf(name, value) for name, value in at.items()]
        return tree.flatten(at)[0]

    def _describe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Any]:
        """The call as the ranks compare it, and the key of its program."""
        state, leaves = self._state, self._leaves(args, kwargs)
        shapes = {leaf.path: tuple(leaf.value.shape) for leaf in leaves if isinstance(leaf.value, torch.Tensor)}
        pieces = tree.batched(shapes, state.options.shared) if state.options.data_axes else frozenset()
        found = (self._argument(leaf.path, leaf.value, leaf.path in pieces) for leaf in leaves)
        arguments = tuple(sorted(found, key=lambda a: a.name))
        if state.lane is not None:
            self._check_frozen()
        flags = tuple(m.training for m in state.shells.values())
        trainable = tuple(p.requires_grad for p in self._any_parameters())
        grads = torch.is_grad_enabled() and any(trainable)
        # Programs are captured on the CPU, so that it is the CPU's autocast they follow.
        if state.grid.device.type != "cpu" and torch.is_autocast_enabled(state.grid.device.type):
            raise RuntimeUseError(
                f"autocast for {state.grid.device.type} is on, and its casts cannot be captured; cast the model before "
                "autopar.compile (model.to(torch.bfloat16)), or compile with precision='bf16', outside autocast"
            )
        cast = f"autocast to {torch.get_autocast_dtype('cpu')}, " if torch.is_autocast_enabled("cpu") else ""
        mode = f"{cast}{'training' if self.training else 'evaluation'} {'with' if grads else 'without'} gradients"
        parts = state.parts
        forms = tuple((a.name, a.form) for a in arguments)
        key = (grads, forms, flags, trainable, cast)
        return Call(arguments, mode, part=parts[state.grid.rank], parts=parts), key

    def _argument(self, name: str, value: Any, piece: bool) -> Argument:
        if isinstance(value, DTensor):
            raise BatchError(f"argument {name!r} is a DTensor; pass plain tensors")
        if isinstance(value, torch.Tensor):
            if value.requires_grad and torch.is_grad_enabled():
                raise BatchError(
                    f"argument {name!r} requires a gradient; gradients of inputs are not computed: pass {name}.detach()"
                )
            if value.is_meta or value.layout is not torch.strided:
                what = "on the meta device" if value.is_meta else f"of layout {value.layout}"
                raise BatchError(f"argument {name!r} is {what}; pass dense tensors that hold values")
            home = self._state.grid.device.type
            if value.device.type not in ("cpu", home):
                raise BatchError(
                    f"argument {name!r} is on {value.device}, the module runs on {home}; pass {name}.cpu()"
                )
            form = tensor_form(value.dtype, value.shape)
            compared = self._state.options.check and self._state.grid.size > 1
            return Argument(name, form, checksum(value) if compared else 0, piece)
        text = repr(value)
        return Argument(name, type(value).__name__ if " at 0x" in text else text)

    def _check_frozen(self) -> None:
        first = dict(self._state.skeleton.named_parameters())
        for name, p in self._state.tensors()[0].items():
            if name in first and p.requires_grad != first[name].requires_grad:
                raise RuntimeUseError(
                    f"requires_grad of {name} has changed since autopar.compile, which other stages cannot see; "
                    "freeze parameters of the model before compiling it"
                )

    def _any_parameters(self) -> Iterator[nn.Parameter]:
        """Ours, or the skeleton's where we have none (before the first plan; those of other stages); tied ones once."""
        state = self._state
        if state.plan is None:
            return state.skeleton.parameters()
        ours = state.tensors()[0]
        if state.lane is None:
            return iter({id(p): p for p in ours.values()}.values())
        return (ours.get(name, p) for name, p in state.skeleton.named_parameters())

    @torch.inference_mode(False)
    def _build(self, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call) -> Step | PipelineStep:
        state = self._state
        for module, shell in zip(state.skeleton.modules(), state.shells.values()):
            module.training = shell.training
        if state.plan is not None and state.lane is None:
            have = state.tensors()[0]
            for name, parameter in state.skeleton.named_parameters(remove_duplicate=False):
                if name in have:
                    parameter.requires_grad_(have[name].requires_grad)
        grads = call.mode.endswith("with gradients")
        try:
            lowered = state.build(state.skeleton, args, kwargs, grads, state.plan)
        except CaptureError as error:
            if changed := self._changed(call):
                raise CaptureError(f"{error}. It was captured again because {'; '.join(changed)}") from error
            raise
        plan = lowered.plan
        if isinstance(lowered, Pipelined):
            assert plan.pipeline is not None
            state.lane, plan = state.lane or lane_of(state.grid, plan.pipeline.axis), inner(plan)
            state.lane.share(lowered.shared)
        step: Step | PipelineStep
        with state.control.together("lowering"):
            if isinstance(lowered, Pipelined):
                assert state.lane is not None
                step = PipelineStep(lowered, state.lane)
            else:
                step = Step(lowered, state.grid, state.options.data_axes, state.powersgd)
        if state.plan is None:
            with state.control.together("reading the plan"):
                for storage in plan.storage.values():
                    placements(storage.spec)
            loader = Loader(state.grid, state.control, state.options.init, state.local)
            assert state.model is not None
            with state.control.together("taking the values"):
                _check_unchanged(state.skeleton, state.model)
            if isinstance(lowered, Pipelined):
                state.places = lowered.places
            fill_tree(state.shells, state.skeleton, state.model, plan, loader, state.elsewhere())
            watch(state.local.device_mesh)
            state.missing, state.model, state.plan = loader.missing, None, lowered.plan
        elif isinstance(lowered, Pipelined):
            state.adopt(lowered.places)
        self._warn_again(call, lowered.news)
        state.forms.append((grads, call.arguments))
        return step

    def _unseen(self, call: Call) -> bool:
        """Whether it is still to be looked whether the pieces of such a batch vary between ranks."""
        state = self._state
        return bool(state.options.data_axes) and _form(call) not in state.compared

    def _warn_unvaried(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Once for each form of a call: say which pieces of the batch look like one tensor for all ranks."""
        state = self._state
        if not self._unseen(call):
            return
        state.compared.add(_form(call))
        values = {leaf.path: leaf.value for leaf in self._leaves(args, kwargs)}
        for name in state.control.unvaried(call):
            # Equal rows are normal: masks without padding, position ids.
            if state.grid.rank == 0 and (values[name] != values[name][:1]).any():
                warnings.warn(
                    f'argument {name!r} is the same on every rank, though batch="local" takes it for a piece of the '
                    f"batch: if it is one tensor for all, name it in shared=({name!r},); if it is data, give each rank "
                    "its own piece (DistributedSampler(dataset, **pm.sampler_args))",
                    stacklevel=5,
                )

    def _warn_again(self, call: Call, news: str) -> None:
        """Say which argument made a new program necessary; the first evaluation after training is no news."""
        changed = self._changed(call)
        if changed and news:
            warnings.warn(news.format(changes="; ".join(changed)), stacklevel=6)

    def _changed(self, call: Call) -> list[str]:
        """In words: how the arguments differ from those of the last program of the same kind."""
        grads = call.mode.endswith("with gradients")
        before = [arguments for g, arguments in self._state.forms if g == grads]
        if not before:
            return []
        if len(call.arguments) != len(before[-1]):
            return [f"the arguments are {', '.join(a.name for a in call.arguments)}"]
        return [
            f"argument {new.name!r} has {new.form}, before {old.form}"
            for new, old in zip(call.arguments, before[-1])
            if (new.name, new.form) != (old.name, old.form)
        ]


def _part(mesh: Mesh, rank: int, axes: tuple[str, ...]) -> tuple[int, int]:
    """Index of the piece of the batch that `rank` brings, and the number of pieces."""
    part, count = 0, 1
    for name, size, at in zip(mesh.names, mesh.sizes, mesh.coordinates(rank)):
        if name in axes:
            part, count = part * size + at, count * size
    return part, count


def _form(call: Call) -> tuple[tuple[str, str], ...]:
    """Names, shapes and dtypes of the arguments."""
    return tuple((a.name, a.form) for a in call.arguments)


def _check_unchanged(skeleton: nn.Module, model: nn.Module) -> None:
    """Between compile and the first call the values of the model may change, not its parameters."""
    was, now = ([f[:4] + (True,) for f in same_fields(m)] for m in (skeleton, model))
    if was != now:
        raise RuntimeUseError(
            f"the model has changed between autopar.compile and the first call ({first_difference(was, now)}; there: "
            f"when it was compiled); compile it again"
        )


def _with_seed(call: Call | None) -> Call | None:
    """The call with a seed from torch's default generator: `torch.manual_seed` decides, rank 0's is used."""
    if call is None:
        return None
    seed = int(torch.randint(0, 2**62, (), dtype=torch.int64, device="cpu"))
    return Call(call.arguments, call.mode, seed, call.part, call.parts)
