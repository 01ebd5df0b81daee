"""Capture: an unmodified `nn.Module` and one call of it -> `Program`, the joint forward and backward graph.

The model is run under fake tensors (no arithmetic, nothing allocated) by AOTAutograd, which records forward and
backward, with the decompositions of `autopar/decompose.py`; the result is cleaned up by `autopar/canonical.py`. This is
the only file that uses private torch interfaces.

Weights are neither read nor copied: for the time of the capture the model's parameters and buffers are swapped for fake
ones, also those on the meta device (from which torch would export a graph without its backward, silently).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import sympy
import torch
from torch import _inductor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import GmWrapper
from torch._functorch._aot_autograd import descriptors as desc
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.traceback import get_current_meta
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

import autopar.decompose_random  # noqa: F401  (fills DECOMPOSITIONS)
from autopar import depth, repeat
from autopar.assemble import ROLE, Role, Traced, assemble
from autopar.call import SYMBOLIC, Call, Wrapper
from autopar.canonical import MODULE_KEY, set_modules
from autopar.casting import casting, in_fp32, routers, settled
from autopar.collector import resting_collector
from autopar.decompose import DECOMPOSITIONS
from autopar.errors import CaptureError
from autopar.explain import explain
from autopar.graph import Program
from autopar.modes import HOST, ExplicitAttention, OnHost, check_host, quiet, setting, sizes_as_text
from autopar.precision import AS_IS, Precision
from autopar.shared_memory import check_memory, overlaps
from autopar.symbolic import Batches
from autopar.tree import batched

_PREFIX = "model."


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    training: bool = True,
    precision: Precision = AS_IS,
) -> Program:
    """Trace one call of `model` into a `Program`.

    Args:
        model: any exportable module; its `training` flag decides on dropout and batch norm. Parameters may be real,
            fake, or on the meta device; they are not changed.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call. Only shapes, dtypes and non-tensor values matter.
        loss: if given, the call takes one more keyword, `target`, and returns `loss(output, target)`.
        training: with the backward. False gives a forward-only graph.
        precision: in which it computes (`autopar.casting`).

    Returns:
        The program. If the output has a scalar floating-point loss (`loss`, the output itself, or the first element
        of a tuple), gradients start from it alone and all other outputs are cut off (`Sink.cut`); otherwise every
        differentiable output has a tangent.

    Raises:
        CaptureError: the model cannot be traced; names the line of the user's code and what to change.
        BatchError: the arguments do not fit the model's forward.
    """
    traced, check, _ = _traced(model, args, kwargs or {}, loss, training, precision, symbolic=False)
    program = assemble(traced)
    check(program)
    return program


def capture_batches(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *,
    loss: Callable[[Any, Any], torch.Tensor] | None = None, training: bool = True, precision: Precision = AS_IS,
) -> Batches:  # fmt: skip
    """As `capture`, with the batch as a symbol: one trace whose `at(size)` gives the program of any batch size.

    The batch is dim 0 of the tensor arguments of the most common leading length; their length in the example is the
    first the trace tries, and it must be 2 or more (1 broadcasts, and is another program).

    Raises:
        CaptureError: as `capture`, or there is no batch of 2 or more.
        BatchError: as `capture`.
    """
    traced, check, batch = _traced(model, args, kwargs or {}, loss, training, precision, symbolic=True)
    assert batch is not None
    shapes, symbol = batch.node.shape_env, batch.node._expr  # .expr would be the number it turned out to be

    def number(value: Any, size: int) -> int | float | bool:
        kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]
        return kind(value.node.expr.xreplace({symbol: sympy.Integer(size)}))

    def allowed(size: int) -> bool:
        # A symbol with a replacement was found to have one value only; the bounds hold what torch has assumed.
        if symbol in shapes.replacements:
            return bool(shapes.replacements[symbol] == size)
        bounds = shapes.var_to_range[symbol]
        if not bool(bounds.lower <= size) or not bool(size <= bounds.upper):
            return False
        facts = [guard.expr for guard in shapes.guards]
        facts += [later.expr for found in shapes.deferred_runtime_asserts.values() for later in found]
        return all(fact.xreplace({symbol: sympy.Integer(size)}) == sympy.true for fact in facts)

    return Batches(traced, number, allowed, check)


def _traced(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Callable[[Any, Any], torch.Tensor] | None,
    training: bool, precision: Precision, symbolic: bool,
) -> tuple[Traced, Callable[[Program], None], torch.SymInt | None]:  # fmt: skip
    """The traced call, the last check of its program, and the symbol of the batch."""
    call = Call(model, args, kwargs, loss)
    wrapper = Wrapper(model, call, loss, training)
    overlapping = overlaps(_named_tensors(model))
    names = batched({name: tuple(t.shape) for name, t in zip(call.names, call.tensors)})
    with _fakes(model, training) as mode:
        tied = _tied(model)
        batch = None
        if symbolic:
            batch = _symbol(mode, _size_of([t for n, t in zip(call.names, call.tensors) if n in names]))
        inputs = [
            _fake(mode, t, f"input {n!r}", batch if n in names else None) for n, t in zip(call.names, call.tensors)
        ]
        if training and not any(p.requires_grad for p in model.parameters()):
            raise CaptureError(
                "no parameter requires a gradient, so there is nothing to train; unfreeze one, or capture under "
                "torch.no_grad() (training=False)"
            )
        try:
            with quiet(), torch.set_grad_enabled(training), sizes_as_text(), casting(precision, model):
                gm = _deep(wrapper, inputs, mode) or _trace(wrapper, inputs)
                if precision.dtype is not None and (routing := routers(gm.graph)):
                    with in_fp32(model, routing):
                        gm = _deep(wrapper, inputs, mode) or _trace(wrapper, inputs)
        except CaptureError:
            raise
        except Exception as error:  # whatever torch raises, users get one message of ours
            raise CaptureError(explain(error, model)) from None
        traced = Traced(
            gm=gm,
            inputs=list(call.names),
            flatten=call.flatten,
            batch_dims={name: 0 for name in call.names if name in names},
            returned=wrapper.returned,
            tied=tied,
            params={n: t for n, t in model.named_parameters(remove_duplicate=False) if tied[n] == n},
            buffers={n: t for n, t in model.named_buffers(remove_duplicate=False) if tied[n] == n},
            training=training,
            module=_unwritten,
        )
    return traced, lambda program: check_memory(overlapping, settled(program, precision)), batch


def _size_of(examples: list[torch.Tensor]) -> int:
    """The length of the batch that `examples` have; raises CaptureError if the trace would take it for special."""
    if not examples:
        raise CaptureError("no argument is a tensor with a dim 0 that could be the batch")
    size = int(examples[0].shape[0])
    if size < 2:
        raise CaptureError(f"a batch of {size} cannot stand for others: tensors of one row broadcast; pass 2 or more")
    return size


def _sizes() -> ShapeEnv:
    """Without numbers read out of tensors: the line that asks for one raises, rather than something after it."""
    return ShapeEnv(tracked_fakes=[], allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)


def _symbol(mode: FakeTensorMode, size: int) -> torch.SymInt:
    """A symbol for the batch, which torch first takes for `size`."""
    source, shapes = ConstantSource("batch"), mode.shape_env
    assert shapes is not None
    symbol = shapes.create_symbol(size, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    found = shapes.create_symintnode(symbol, hint=size, source=source)
    assert isinstance(found, torch.SymInt)
    return found


# ---- fake parameters -----------------------------------------------------------------------------------------------


def _fake(mode: FakeTensorMode, tensor: torch.Tensor, what: str, batch: torch.SymInt | None = None) -> torch.Tensor:
    """A contiguous fake twin of a real, fake or meta tensor, dim 0 as long as `batch`, if given.

    Meta tensors and those on an accelerator are taken to live on the CPU, so that a program is the same everywhere.
    """
    if tensor.layout is not torch.strided:
        raise CaptureError(f"{what} is {tensor.layout}; only dense tensors are supported: use .to_dense()")
    plain = (torch.Tensor, nn.Parameter, nn.Buffer, FakeTensor)
    if type(tensor) not in plain:
        raise CaptureError(f"{what} is a {type(tensor).__name__}, a tensor subclass; only plain tensors are supported")
    with mode:
        shape = tensor.shape if batch is None else (batch, *tensor.shape[1:])
        return torch.empty(shape, dtype=tensor.dtype, device=HOST)


@contextlib.contextmanager
def _fakes(model: nn.Module, training: bool) -> Iterator[FakeTensorMode]:
    """Within, `model` has fake parameters and buffers; afterwards it is exactly as before, attributes included."""
    mode = FakeTensorMode(shape_env=_sizes(), allow_non_fake_inputs=True)
    saved: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
    twins: dict[int, torch.Tensor] = {}

    def twin(tensor: torch.Tensor, what: str) -> torch.Tensor:
        if id(tensor) not in twins:
            fake = _fake(mode, tensor, what)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=training and tensor.requires_grad)
            twins[id(tensor)] = fake
        return twins[id(tensor)]

    for module in model.modules():
        state = dict(module.__dict__)
        # tables too, hooks among them: libraries install hooks in the first forward, and a flag that they have
        tables = {k: copy.copy(v) for k, v in state.items() if isinstance(v, (dict, list, set))}
        saved.append((module, state, tables))
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused inference kernels would hide the ops
    try:
        for path, module in model.named_modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in list(table.items()):
                    if tensor is not None:
                        table[name] = twin(tensor, f"{path}.{name}".lstrip("."))  # type: ignore[assignment]
            for name, value in list(module.__dict__.items()):
                if isinstance(value, torch.Tensor) and (value.is_meta or isinstance(value, FakeTensor)):
                    module.__dict__[name] = twin(value, f"{path}.{name}".lstrip("."))
                elif isinstance(value, torch.Tensor) and value.device.type != "cpu":  # it becomes a constant
                    module.__dict__[name] = value.detach().to(HOST)
        yield mode
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, state, tables in saved:
            module.__dict__.clear()
            module.__dict__.update(state)
            for name, content in tables.items():
                table = module.__dict__[name]
                table.clear()
                (table.extend if isinstance(table, list) else table.update)(content)


def _tied(model: nn.Module) -> dict[str, str]:
    """Every parameter and buffer name -> the first name of the same memory. Called while the model is fake."""
    first: dict[Any, str] = {}
    names: dict[str, str] = {}
    for name, tensor in _named_tensors(model):
        names[name] = first.setdefault(id(tensor), name)
    return names


def _named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


# ---- tracing -------------------------------------------------------------------------------------------------------


def _trace(wrapper: Wrapper, inputs: list[torch.Tensor]) -> fx.GraphModule:
    """The joint graph (the forward alone if nothing requires a gradient), `desc` on placeholders and output.

    Not through torch.export: it differentiates the exported forward, so that the backward of a custom
    `autograd.Function` and the hooks of tensors are lost without a word. Here autograd itself runs under the trace.
    """
    # The stack keeps a FakeTensorMode active until it is closed: close it at once, or the user's next op breaks.
    with contextlib.ExitStack() as stack:
        stack.enter_context(_marked_modules(wrapper.model))
        stack.enter_context(_use_lazy_graph_module(True))  # no code is written for graphs that nobody calls
        stack.enter_context(_traceable())
        # Casts of autocast are the forward's, as where torch runs a backward.
        stack.enter_context(torch._functorch.config.patch(backward_pass_autocast="off"))
        joint = aot_export_joint_with_descriptors(stack, wrapper, tuple(inputs), decompositions=DECOMPOSITIONS)
        gm = joint.graph_module
    check_host(gm.graph)
    _set_roles(gm.graph)
    set_modules(gm.graph)
    return gm


@contextlib.contextmanager
def _traceable() -> Iterator[None]:
    """Within, user's code takes the paths that can be traced."""
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type == "cuda":
            stack.enter_context(HOST)  # what is made without naming a device
        stack.enter_context(ExplicitAttention())
        stack.enter_context(OnHost())
        stack.enter_context(setting(FunctionalTensor, "cuda", lambda x, *_, **__: x))  # its own asks for a GPU
        # The check for singular matrices would be traced as a token, which a graph that is cut up cannot pass on.
        check = torch._library.simple_registry.singleton.find("aten::_linalg_check_errors").effect
        stack.enter_context(setting(check, "_effect", None))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # torch.compile inside the model steps aside
        for flag in ("_is_compiling_flag", "_is_exporting_flag"):  # libraries take their traceable paths
            stack.enter_context(setting(torch.compiler, flag, True))
        yield


def _deep(wrapper: Wrapper, inputs: list[torch.Tensor], mode: FakeTensorMode) -> fx.GraphModule | None:
    """As `_trace`, from a trace of a few layers of a stack; None without one, or if they are not proved to be alike."""
    stack = depth.stack_of(wrapper.model) if wrapper.with_grad else None  # else ops do not know their modules
    if stack is None or (whole := _recorded(wrapper, inputs, mode, stack)) is None:
        return None
    with stack.short(wrapper.model):
        short = _recorded(wrapper, inputs, mode, stack)
        if short is None or short[1:] != whole[1:] or not depth.equal(whole[0], short[0]):
            return None
        gm = _trace(wrapper, inputs)
    graph = repeat.unroll(gm.graph, stack, _text)
    if graph is None:
        return None
    wrapper.returned.reached = stack.names(wrapper.returned.reached)
    return _unwritten(gm, graph)


def _unwritten(root: Any, graph: fx.Graph) -> fx.GraphModule:
    """A graph module whose code is written at its first call: nobody calls what is planned only."""
    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph)


def _recorded(wrapper: Wrapper, inputs: list[torch.Tensor], mode: FakeTensorMode, stack: depth.Stack) -> Any:
    """What a forward does and returns besides tensors. None if it fails: the whole trace tells why, or gets through."""
    returned, sizes = wrapper.returned, _sizes()  # of its own: what is asked of sizes here is no condition of the trace
    with setting(mode, "shape_env", sizes):
        lengths: list[Any] = [t.shape[0] if t.ndim else None for t in inputs]
        size = next((n.node.hint for n in lengths if isinstance(n, SYMBOLIC)), None)
        batch = None if size is None else _symbol(mode, size)
        inputs = [_fake(mode, t, "", batch) if isinstance(n, SYMBOLIC) else t for t, n in zip(inputs, lengths)]
        recorder = depth.Recorder(wrapper.model, stack, inputs, _surroundings, _text)
        try:
            with mode, _traceable(), recorder:
                wrapper(*inputs)
        except Exception:
            return None
    asked = [str(guard.expr) for guard in sizes.guards], str(sizes.replacements), str(sizes.deferred_runtime_asserts)
    leaves = [(path, _text(v) if isinstance(v, SYMBOLIC) else v) for path, v in returned.leaves]
    return recorder, leaves, returned.is_tensor, returned.cut, list(returned.notes), asked


def _surroundings() -> Any:
    """What a call depends on besides its arguments (`_top_saved_tensors_default_hooks`: in 2.11 and 2.13)."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    kernels = torch.backends.cuda
    return (
        hooks is None, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
        kernels.flash_sdp_enabled(), kernels.math_sdp_enabled(), kernels.mem_efficient_sdp_enabled(),
    )  # fmt: skip


def _text(value: Any) -> str | None:
    """An argument of a torch function that is no plain value, if its text tells all of it.

    Of a size that depends on the batch, what it is in terms of that: compared as it is, the batch would take a value.
    """
    if isinstance(value, SYMBOLIC):
        return str(value.node.expr)
    return repr(value) if isinstance(value, torch._C.DispatchKeySet) else None


@contextlib.contextmanager
def _marked_modules(model: nn.Module) -> Iterator[None]:
    """Within, every traced op carries the path of the module whose forward it is in; AOTAutograd tells the backward."""
    paths = {id(m): n for n, m in model.named_modules()}
    entered: list[str] = []

    def mark() -> None:
        meta = get_current_meta()
        meta.pop(MODULE_KEY, None)
        if entered:
            meta[MODULE_KEY] = {"": (entered[-1], "")}

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in paths:
            entered.append(paths[id(module)])
            mark()

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if id(module) in paths and entered:
            entered.pop()
            mark()

    hooks = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---- compiling -----------------------------------------------------------------------------------------------------


def compiled(gm: fx.GraphModule, arguments: Sequence[torch.Tensor]) -> Callable[[list[Any]], Sequence[Any]]:
    """`gm`, a bound graph, as inductor compiles it for arguments of this form; not to be differentiated.

    What is returned takes its arguments in one list, which it empties: every tensor dies behind its last reader. What
    torch.compile returns holds all of them until it is done.
    """
    graph = fx.Graph()
    results = graph.graph_copy(gm.graph, {})
    assert isinstance(results, (tuple, list))
    constants = {i: r for i, r in enumerate(results) if not isinstance(r, fx.Node)}  # inductor takes integers only
    graph.output(tuple(r for r in results if isinstance(r, fx.Node)))
    # Without a ShapeEnv, which has nothing to do here, torch caches nothing.
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: list[Any]
    with torch.inference_mode(False), torch.no_grad(), resting_collector():
        with mode:  # each in memory of its own: that two are one, or share memory, may be so this time only
            fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in arguments]
        # For a `GmWrapper` AOTAutograd gives back what takes a list (in 2.11, read there, and 2.13, run).
        # Taking it for an inference graph, inductor would move every op to its first reader: gradients of weights to
        # the end of the backward, far from what they read.
        wrapped = cast(fx.GraphModule, GmWrapper(fx.GraphModule(gm, graph), list))
        run = _inductor.compile(wrapped, fakes, options={"reorder_for_locality": False})
    count = len(results)

    def filled(box: list[Any]) -> Sequence[Any]:
        found = iter(run(box))
        return [constants[i] if i in constants else next(found) for i in range(count)]

    return filled if constants else run


# ---- what torch calls the parts of a joint graph -------------------------------------------------------------------


def _set_roles(graph: fx.Graph) -> None:
    """A `Role` on every placeholder, and the list of them on the output, from torch's descriptors."""
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta[ROLE] = _role_in(node.meta["desc"])
    output = graph.output_node()
    output.meta[ROLE] = [_role_out(what) for what in output.meta["desc"]]


def _role_in(what: Any) -> Role:
    if isinstance(what, (desc.ParamAOTInput, desc.BufferAOTInput)):
        return Role("state", what.target.removeprefix(_PREFIX))
    if isinstance(what, desc.PlainAOTInput):
        return Role("input", index=what.idx)
    if isinstance(what, desc.TangentAOTInput) and isinstance(what.output, desc.PlainAOTOutput):
        return Role("tangent", index=what.output.idx)
    if isinstance(what, desc.TangentAOTInput) and isinstance(what.output, desc.InputMutationAOTOutput):
        buffer = what.output.mutated_input
        if not isinstance(buffer, desc.BufferAOTInput):
            raise CaptureError(_unexpected(what.output))
        name = buffer.target.removeprefix(_PREFIX)
        raise CaptureError(
            f"forward writes a value that depends on parameters into buffer {name!r}, through which gradients "
            f"would flow into the next step; write it under torch.no_grad(), or detached"
        )
    raise CaptureError(_unexpected(what))


def _role_out(what: Any) -> Role | None:
    if isinstance(what, desc.PlainAOTOutput):
        return Role("output", index=what.idx)
    if isinstance(what, desc.InputMutationAOTOutput) and isinstance(what.mutated_input, desc.BufferAOTInput):
        return Role("buffer", what.mutated_input.target.removeprefix(_PREFIX))
    if isinstance(what, desc.GradAOTOutput):
        of = what.grad_of
        return Role("grad", of.target.removeprefix(_PREFIX)) if isinstance(of, desc.ParamAOTInput) else None
    if what is None:
        return None
    raise CaptureError(_unexpected(what))


def _unexpected(what: Any) -> str:
    if isinstance(what, desc.InputMutationAOTOutput):
        inner = what.mutated_input
        if isinstance(inner, desc.ParamAOTInput):
            name = inner.target.removeprefix(_PREFIX)
            return f"forward changes parameter {name!r} in place; make it a buffer, or write it after the step"
        return "forward changes one of its arguments in place; work on a copy: x = x.clone()"
    return f"the traced graph has a part of an unknown kind, {what.expr()}; report the model that gives it"
