"""What is said of a model around its capture: things that torch would say late, in its own words, or not at all."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import fx, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from autopar.errors import CaptureError
from autopar.graph import Program

aten = torch.ops.aten

#: Ops whose floating-point operands must have one dtype when they run; a trace does not look.
_ONE_DTYPE = frozenset(
    {
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.convolution.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten.native_layer_norm.default,
        aten.native_group_norm.default,
    }
)
#: Norms take a half-precision input with float32 weights.
_NORMS = frozenset({aten.native_layer_norm.default, aten.native_group_norm.default})
_HALF = frozenset({torch.bfloat16, torch.float16})


def refuse_old_norms(model: nn.Module) -> None:
    """Raise for weights that a hook sets anew before each forward, which neither a copy nor a graph can hold.

    Raises:
        CaptureError: `torch.nn.utils.weight_norm` or `spectral_norm` is on a module; names it and what to use instead.
    """
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                norm = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
                raise CaptureError(
                    f"module {path or type(model).__name__!r} has the old torch.nn.utils.{norm}, whose hook assigns "
                    f"{hook.name!r} anew before each forward; use torch.nn.utils.parametrizations.{norm} instead"
                )


def check_dtypes(program: Program, model: nn.Module) -> None:
    """Raise where a matmul, convolution, attention or norm would get operands of several dtypes.

    Raises:
        CaptureError: names the op and the arguments that bring the dtype.
    """
    inputs = {s.node: s.name for s in program.of_kind("input")}
    for node in program.gm.graph.nodes:
        if node.op != "call_function" or node.target not in _ONE_DTYPE:
            continue
        operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        dtypes = {n: n.meta["val"].dtype for n in operands}
        if len(set(dtypes.values())) < 2:
            continue
        weights = set(dtypes.values()) - {dtypes[operands[0]]}
        if node.target in _NORMS and dtypes[operands[0]] in _HALF and weights == {torch.float32}:
            continue
        found = {n: _reached(n, inputs) for n in operands}
        guilty = {name: dtypes[n] for n, names in found.items() for name in names if names[name] == dtypes[n]}
        other = [dtype for n, dtype in dtypes.items() if not found[n]]
        place = f"cannot capture {type(model).__name__}: {node.meta.get('address', node.name)} gets " + " and ".join(
            dict.fromkeys(str(d) for d in dtypes.values())
        )
        if not guilty:
            raise CaptureError(f"{place}. Change: cast one of the two in the model, x.to(weight.dtype)")
        names = ", ".join(f"argument {name!r} is {dtype}" for name, dtype in guilty.items())
        name = next(iter(guilty))
        wanted = other[0] if other else next(d for d in dtypes.values() if d != guilty[name])
        raise CaptureError(
            f"{place}: {names}. Change: pass {name}.to({wanted}), or cast the model before autopar.compile"
        )


def _reached(node: fx.Node, inputs: dict[str, str]) -> dict[str, torch.dtype]:
    """The inputs that `node` is computed from, with their dtypes."""
    seen, stack, found = {node}, [node], {}
    while stack:
        at = stack.pop()
        if at.name in inputs:
            found[inputs[at.name]] = at.meta["val"].dtype
        for before in at.all_input_nodes:
            if before not in seen:
                seen.add(before)
                stack.append(before)
    return found


@contextmanager
def watched_generators(notes: list[str]) -> Iterator[None]:
    """Warn, and add to `notes`, if the block draws from Python's or numpy's global generator; their states are left.

    A trace sees the numbers they give, not that they are drawn. Generators that the model owns are not watched.
    """
    before = _states()
    yield
    for name, state in _states().items():
        if state != before[name]:
            notes.append(
                f"forward draws from {name}: its values while capturing are fixed in the graph, the same in every "
                "step; draw with torch (torch.rand, torch.randint) instead"
            )
            warnings.warn(notes[-1], stacklevel=2)


def _states() -> dict[str, object]:
    kind, keys, *rest = np.random.get_state()
    return {"Python's random": random.getstate(), "numpy.random": (kind, keys.tobytes(), *rest)}  # type: ignore[attr-defined]
