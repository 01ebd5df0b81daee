"""Capture: an unmodified `nn.Module` and one call of it -> `Program`, the joint forward and backward graph.

The model is run once under fake tensors (no arithmetic, nothing allocated), through `torch.export` and AOTAutograd, with
the decompositions of `autopar/decompose.py`; the result is cleaned up by `autopar/canonical.py`. This is the only file
that uses private torch interfaces.

Weights are neither read nor copied: for the time of the capture the model's parameters and buffers are swapped for fake
ones, also those on the meta device (from which torch would export a graph without its backward, silently).
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._functorch._aot_autograd import descriptors as desc
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import autopar.decompose_random  # noqa: F401  (fills DECOMPOSITIONS)
from autopar.call import Call, Wrapper, input_key
from autopar.canonical import canonicalise, module_path
from autopar.decompose import DECOMPOSITIONS
from autopar.errors import CaptureError
from autopar.explain import explain
from autopar.graph import Program, Sink, Source, is_op, op_name

_PREFIX = "model."


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
        of a tuple), gradients start from it alone and all other outputs are detached; otherwise every differentiable
        output has a tangent.

    Raises:
        CaptureError: the model cannot be traced; names the line of the user's code and what to change.
        BatchError: the arguments do not fit the model's forward.
    """
    call = Call(model, args, kwargs or {}, loss)
    wrapper = Wrapper(model, call, loss, training)
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
                gm, constants = _trace(wrapper, inputs)
        except CaptureError:
            raise
        except Exception as error:  # whatever torch raises, users get one message of ours
            raise CaptureError(explain(error, model)) from None
        return _assemble(model, call, wrapper, gm, constants, shared, training)


# ---- fake parameters -----------------------------------------------------------------------------------------------


def _fake(mode: FakeTensorMode, tensor: torch.Tensor, what: str) -> torch.Tensor:
    """A fake twin of a real, fake or meta tensor. Meta tensors are taken to live on the CPU."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        device = tensor.fake_device if isinstance(tensor, FakeTensor) else torch.device("cpu")
        with mode:
            return torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu" if device.type == "meta" else device
            )
    if tensor.layout is not torch.strided:
        raise CaptureError(f"{what} is {tensor.layout}; only dense tensors are supported: use .to_dense()")
    if type(tensor) not in (torch.Tensor, nn.Parameter) and not isinstance(tensor, nn.parameter.Buffer):
        raise CaptureError(f"{what} is a {type(tensor).__name__}, a tensor subclass; only plain tensors are supported")
    return mode.from_tensor(tensor.detach(), static_shapes=True)


@contextlib.contextmanager
def _fakes(model: nn.Module, training: bool) -> Iterator[FakeTensorMode]:
    """Within, `model` has fake parameters and buffers; afterwards it is exactly as before, attributes included."""
    mode = FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True)
    saved: list[tuple[nn.Module, dict[str, Any]]] = []
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
        for table in ("_parameters", "_buffers", "_modules"):
            state[table] = dict(state[table])
        saved.append((module, state))
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
        for module, state in saved:
            module.__dict__.clear()
            module.__dict__.update(state)


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
    """Warnings from inside torch's tracing say nothing about the user's code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- tracing -------------------------------------------------------------------------------------------------------


def _trace(wrapper: Wrapper, inputs: list[torch.Tensor]) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The joint graph, `desc` on placeholders and output, and tensor constants by the name torch gave them."""
    exported = torch.export.export(wrapper, tuple(inputs), strict=False)
    module = exported.module(check_guards=False)
    # The stack keeps a FakeTensorMode active until it is closed: close it at once, or the user's next op breaks.
    with contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, module, tuple(inputs), decompositions=DECOMPOSITIONS)
    return joint.graph_module, dict(exported.constants)


# ---- from the joint graph to a Program -----------------------------------------------------------------------------


def _assemble(
    model: nn.Module,
    call: Call,
    wrapper: Wrapper,
    gm: fx.GraphModule,
    constants: dict[str, Any],
    shared: dict[str, str],
    training: bool,
) -> Program:
    graph = gm.graph
    for node in graph.nodes:
        if node.op == "call_function":
            path = module_path(node)
            if path is not None:
                node.meta["module"] = path.removeprefix("model").removeprefix(".")
    attributes = _constants(gm, constants)
    found = _label(graph, call.names, wrapper)
    outputs, mutated, grads = _results(graph, shared, wrapper)
    raise NotImplementedError


def _plain_name(target: str) -> str:
    return target.removeprefix(_PREFIX)
