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
import gc
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._functorch._aot_autograd import descriptors as desc
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.traceback import get_current_meta
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

import autopar.decompose_random  # noqa: F401  (fills DECOMPOSITIONS)
from autopar.call import Call, Wrapper, input_key
from autopar.canonical import MODULE_KEY, canonicalise, module_path
from autopar.decompose import DECOMPOSITIONS
from autopar.errors import CaptureError
from autopar.explain import explain
from autopar.graph import Program, Sink, Source, is_op, op_name, resolve, results, set_addresses
from autopar.param_views import separate_parameter_views
from autopar.shared_memory import check_memory, overlaps
from autopar.tree import batched

_PREFIX = "model."
_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    training: bool = True,
) -> Program:
    """Trace one call of `model` into a `Program`.

    Args:
        model: any exportable module; its `training` flag decides on dropout and batch norm. Parameters may be real,
            fake, or on the meta device; they are not changed.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call. Only shapes, dtypes and non-tensor values matter.
        loss: if given, the call takes one more keyword, `target`, and returns `loss(output, target)`.
        training: with the backward. False gives a forward-only graph.

    Returns:
        The program. If the output has a scalar floating-point loss (`loss`, the output itself, or the first element
        of a tuple), gradients start from it alone and all other outputs are cut off (`Sink.cut`); otherwise every
        differentiable output has a tangent.

    Raises:
        CaptureError: the model cannot be traced; names the line of the user's code and what to change.
        BatchError: the arguments do not fit the model's forward.
    """
    call = Call(model, args, kwargs or {}, loss)
    wrapper = Wrapper(model, call, loss, training)
    overlapping = overlaps(_named_tensors(model))
    with _fakes(model, training) as mode:
        shared = _tied(model)
        inputs = [_fake(mode, t, f"input {n!r}") for n, t in zip(call.names, call.tensors)]
        if training and not any(p.requires_grad for p in model.parameters()):
            raise CaptureError(
                "no parameter requires a gradient, so there is nothing to train; unfreeze one, or capture under "
                "torch.no_grad() (training=False)"
            )
        try:
            with _quiet(), torch.set_grad_enabled(training):
                gm = _trace(wrapper, inputs)
        except CaptureError:
            raise
        except Exception as error:  # whatever torch raises, users get one message of ours
            raise CaptureError(explain(error, model)) from None
        program = _assemble(model, call, wrapper, gm, shared, training)
        check_memory(overlapping, program)
        return program


# ---- fake parameters -----------------------------------------------------------------------------------------------


def _fake(mode: FakeTensorMode, tensor: torch.Tensor, what: str) -> torch.Tensor:
    """A contiguous fake twin of a real, fake or meta tensor. Meta tensors are taken to live on the CPU."""
    if tensor.layout is not torch.strided:
        raise CaptureError(f"{what} is {tensor.layout}; only dense tensors are supported: use .to_dense()")
    plain = (torch.Tensor, nn.Parameter, nn.Buffer, FakeTensor)
    if type(tensor) not in plain:
        raise CaptureError(f"{what} is a {type(tensor).__name__}, a tensor subclass; only plain tensors are supported")
    device = "cpu" if tensor.is_meta else tensor.device
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


@contextlib.contextmanager
def _fakes(model: nn.Module, training: bool) -> Iterator[FakeTensorMode]:
    """Within, `model` has fake parameters and buffers; afterwards it is exactly as before, attributes included."""
    # Without numbers read out of tensors: the line that asks for one raises, rather than something after it.
    shapes = ShapeEnv(tracked_fakes=[], allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings and log lines from inside torch's tracing say nothing that `explain` does not say better.

    The garbage collector rests too: a trace makes millions of objects that live on, and walking them again and again
    costs a third of the time for 80 layers.
    """
    collecting = gc.isenabled()
    gc.disable()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if collecting:
            gc.enable()


# ---- tracing -------------------------------------------------------------------------------------------------------


def _trace(wrapper: Wrapper, inputs: list[torch.Tensor]) -> fx.GraphModule:
    """The joint graph (the forward alone if nothing requires a gradient), `desc` on placeholders and output.

    Not through torch.export: it differentiates the exported forward, so that the backward of a custom
    `autograd.Function` and the hooks of tensors are lost without a word. Here autograd itself runs under the trace.
    """
    # The stack keeps a FakeTensorMode active until it is closed: close it at once, or the user's next op breaks.
    with contextlib.ExitStack() as stack:
        stack.enter_context(_marked_modules(wrapper.model))
        stack.enter_context(_ExplicitAttention())
        # The check for singular matrices would be traced as a token, which a graph that is cut up cannot pass on.
        check = torch._library.simple_registry.singleton.find("aten::_linalg_check_errors").effect
        stack.enter_context(_set(check, "_effect", None))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # torch.compile inside the model steps aside
        for flag in ("_is_compiling_flag", "_is_exporting_flag"):  # libraries take their traceable paths
            stack.enter_context(_set(torch.compiler, flag, True))
        joint = aot_export_joint_with_descriptors(stack, wrapper, tuple(inputs), decompositions=DECOMPOSITIONS)
    return joint.graph_module


@contextlib.contextmanager
def _set(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


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


class _ExplicitAttention(TorchFunctionMode):
    """Attention with dropout as plain ops: the fused kernels of GPUs draw their masks where nobody can split them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            if args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0):
                with sdpa_kernel(SDPBackend.MATH):
                    return func(*args, **kwargs)
        if func is nn.functional.multilabel_margin_loss:
            raise CaptureError(
                "multilabel_margin_loss: torch traces it as another function than it runs; use "
                "multilabel_soft_margin_loss, or write the margins out with clamp"
            )
        return func(*args, **kwargs)


# ---- from the joint graph to a Program -----------------------------------------------------------------------------


def _assemble(
    model: nn.Module,
    call: Call,
    wrapper: Wrapper,
    gm: fx.GraphModule,
    shared: dict[str, str],
    training: bool,
) -> Program:
    graph = gm.graph
    _set_modules(graph)
    attributes = {n.target: getattr(gm, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    places = _Places(graph, shared)
    params, buffers = _own(model, shared)
    aliases = {name: tuple(n for n, first in shared.items() if first == name and n != name) for name in shared}

    outputs, mutated, grads = _results(graph, shared)
    if training:
        _check_gradients(wrapper.returned.reached, shared, places, grads)
    sources: list[tuple[Source, fx.Node]] = []
    for kind, names in (("param", params), ("buffer", buffers)):
        for name, tensor in names.items():
            node = places.tensors.get(name) or places.add(graph, tensor)
            trainable = kind == "param" and training and tensor.requires_grad
            sources.append((Source(kind, name, "", trainable, aliases[name]), node))
    sources += [(Source("input", n, ""), places.inputs[i]) for i, n in enumerate(call.names)]

    returned = wrapper.returned
    paths = [_output_name(leaf.path) for leaf, is_tensor in zip(returned.leaves, returned.is_tensor) if is_tensor]
    sources += [(Source("tangent", paths[i], ""), node) for i, node in places.tangents.items()]
    sinks: list[tuple[Sink, fx.Node | None]] = []
    remaining = iter(outputs)
    for leaf, is_tensor, cut in zip(returned.leaves, returned.is_tensor, returned.cut):
        sink = Sink("output", _output_name(leaf.path), None, 0, leaf.value, cut)
        sinks.append((sink, next(remaining) if is_tensor else None))
    sinks += [(Sink("buffer", name, None), node) for name, node in mutated.items()]
    num_forward = len(sinks)
    sinks += [(Sink("grad", s.name, None), grads.get(s.name)) for s, _ in sources if s.trainable]

    clean = canonicalise(
        graph,
        [(node, f"{source.kind}_{source.name}") for source, node in sources],
        [node for _, node in sinks],
        num_forward,
    )
    parameters = {n for (s, _), n in zip(sources, clean.placeholders) if s.kind == "param"}
    if separate_parameter_views(clean.graph, parameters):
        set_addresses(clean.graph)
    final_sources = [replace(s, node=n.name) for (s, _), n in zip(sources, clean.placeholders)]
    if clean.seed is not None:
        final_sources.append(Source("seed", "seed", clean.seed.name))
    final_sinks = [
        sink if node is None else replace(sink, node=resolve(node).node.name, index=resolve(node).index)
        for (sink, _), node in zip(sinks, clean.results)
    ]
    used = {n.target for n in clean.graph.nodes if n.op == "get_attr"}
    program = Program(
        gm=fx.GraphModule({str(k): v for k, v in attributes.items() if k in used}, clean.graph),
        sources=tuple(final_sources),
        sinks=tuple(final_sinks),
        training=training,
        fingerprint="",
        pack=returned.pack,
        flatten=call.flatten,
        batch_dims=_batch_dims(call),
        notes=list(returned.notes),
    )
    program.fingerprint = _fingerprint(program)
    return program


def _set_modules(graph: fx.Graph) -> None:
    """`meta["module"]`, as the user's path, on every op that carries one."""
    for node in graph.nodes:
        path = module_path(node)
        if path is not None:
            node.meta["module"] = path


def _output_name(path: str) -> str:
    """ "loss", "logits[0]"; of an output without names: "output", "output[0]"."""
    return path if path and not path.startswith("[") else f"output{path}"


def _own(model: nn.Module, shared: dict[str, str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters and buffers by name, each memory once."""
    return (
        {n: t for n, t in model.named_parameters(remove_duplicate=False) if shared[n] == n},
        {n: t for n, t in model.named_buffers(remove_duplicate=False) if shared[n] == n},
    )


class _Places:
    """The placeholders of the joint graph by what they stand for.

    Attributes:
        tensors: parameter or buffer name -> its placeholder; those of tied names have been merged.
        inputs: position in the call -> placeholder.
        tangents: position in the outputs -> placeholder.
    """

    def __init__(self, graph: fx.Graph, shared: dict[str, str]) -> None:
        self.tensors: dict[str, fx.Node] = {}
        self.inputs: dict[int, fx.Node] = {}
        self.tangents: dict[int, fx.Node] = {}
        for node in [n for n in graph.nodes if n.op == "placeholder"]:
            what = node.meta["desc"]
            if isinstance(what, (desc.ParamAOTInput, desc.BufferAOTInput)):
                name = what.target.removeprefix(_PREFIX)
                if shared[name] in self.tensors:
                    node.replace_all_uses_with(self.tensors[shared[name]])
                else:
                    self.tensors[shared[name]] = node
            elif isinstance(what, desc.PlainAOTInput):
                self.inputs[what.idx] = node
            elif isinstance(what, desc.TangentAOTInput) and isinstance(what.output, desc.PlainAOTOutput):
                self.tangents[what.output.idx] = node
            elif isinstance(what, desc.TangentAOTInput) and isinstance(what.output, desc.InputMutationAOTOutput):
                buffer = what.output.mutated_input
                if not isinstance(buffer, desc.BufferAOTInput):
                    raise CaptureError(_unexpected(what.output))
                name = buffer.target.removeprefix(_PREFIX)
                raise CaptureError(
                    f"forward writes a value that depends on parameters into buffer {name!r}, through which gradients "
                    f"would flow into the next step; write it under torch.no_grad(), or detached"
                )
            else:
                raise CaptureError(_unexpected(what))

    @staticmethod
    def add(graph: fx.Graph, tensor: torch.Tensor) -> fx.Node:
        """A placeholder for a tensor the graph does not use."""
        with graph.inserting_before(next(iter(graph.nodes))):
            node = graph.placeholder("unused")
        node.meta["val"] = tensor.detach()
        return node


def _unexpected(what: Any) -> str:
    if isinstance(what, desc.InputMutationAOTOutput):
        inner = what.mutated_input
        if isinstance(inner, desc.ParamAOTInput):
            name = inner.target.removeprefix(_PREFIX)
            return f"forward changes parameter {name!r} in place; make it a buffer, or write it after the step"
        return "forward changes one of its arguments in place; work on a copy: x = x.clone()"
    return f"the traced graph has a part of an unknown kind, {what.expr()}; report the model that gives it"


def _results(graph: fx.Graph, shared: dict[str, str]) -> tuple[list[fx.Node], dict[str, fx.Node], dict[str, fx.Node]]:
    """Nodes of the outputs, of new buffer values by buffer, of gradients by parameter (those of tied names added)."""
    output = graph.output_node()
    outputs: dict[int, fx.Node] = {}
    mutated: dict[str, fx.Node] = {}
    grads: dict[str, fx.Node] = {}
    for node, what in zip(output.args[0], output.meta["desc"]):  # type: ignore[arg-type]
        if node is None:  # the gradient of something that has none
            continue
        if isinstance(what, desc.PlainAOTOutput):
            outputs[what.idx] = node
        elif isinstance(what, desc.InputMutationAOTOutput) and isinstance(what.mutated_input, desc.BufferAOTInput):
            mutated[shared[what.mutated_input.target.removeprefix(_PREFIX)]] = node
        elif isinstance(what, desc.GradAOTOutput):
            if not isinstance(what.grad_of, desc.ParamAOTInput):
                continue
            name = shared[what.grad_of.target.removeprefix(_PREFIX)]
            if name in grads:
                with graph.inserting_before(output):
                    total = graph.call_function(torch.ops.aten.add.Tensor, (grads[name], node))
                total.meta["val"] = node.meta["val"]
                grads[name] = total
            else:
                grads[name] = node
        else:
            raise CaptureError(_unexpected(what))
    return [outputs[i] for i in sorted(outputs)], mutated, grads


def _check_gradients(reached: set[str], shared: dict[str, str], places: _Places, grads: dict[str, fx.Node]) -> None:
    """Torch drops a backward without a word in some situations (the meta device): refuse rather than not train.

    `reached`: the parameters that autograd reaches from the outputs.
    """
    if not places.tangents:
        raise CaptureError(
            "no output depends on a trainable parameter in a differentiable way, so there is nothing to train; return "
            "a loss computed from the parameters, or capture under torch.no_grad()"
        )
    lost = sorted({shared[name] for name in reached} - set(grads))
    if lost:
        raise CaptureError(
            f"{len(lost)} of {len(reached)} parameters that the loss depends on get no gradient, the first is "
            f"{lost[0]!r}; if that is meant, set requires_grad=False on them"
        )


def _batch_dims(call: Call) -> dict[str, int]:
    """Dim 0 of every input that has the most common leading size."""
    names = batched({name: tuple(t.shape) for name, t in zip(call.names, call.tensors)})
    return {name: 0 for name in call.names if name in names}


def _fingerprint(program: Program) -> str:
    """Names, shapes and dtypes of what goes in, and the ops in order; neither weights nor device."""
    digest = hashlib.sha256()
    vals = {n.name: n.meta["val"] for n in program.gm.graph.nodes if n.op == "placeholder"}
    for source in program.sources:
        val = vals[source.node]
        digest.update(f"{source.kind} {source.name} {tuple(val.shape)} {val.dtype} {source.trainable}\n".encode())
    for node in program.gm.graph.nodes:
        if is_op(node):
            digest.update(f"{op_name(node)} {[tuple(r.shape) for r in results(node) if r is not None]}\n".encode())
    return digest.hexdigest()


__all__ = ["capture", "input_key"]
