"""Random operands for an op node of a captured graph: never its recorded values, which are too often zero or alike.

Indices stay within what they index, statistics are positive, the rest is small integers; floats become float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.costmodel.rules_call import Operand, numbered
from autopar.graph import named_arguments, operands
from tests.truth import Case
from tests.truth_cases import flag, num, real, unit, whole

aten = torch.ops.aten

#: Op name -> {index operand: the operand and dim (an argument's name, or a number) it indexes}.
_INDEX: dict[str, dict[str, tuple[str, Any]]] = {
    "gather": {"index": ("self", "dim")},
    "scatter": {"index": ("self", "dim")},
    "scatter_add": {"index": ("self", "dim")},
    "scatter_reduce": {"index": ("self", "dim")},
    "index_select": {"index": ("self", "dim")},
    "index_add": {"index": ("self", "dim")},
    "embedding": {"indices": ("weight", 0)},
    "nll_loss_forward": {"target": ("self", 1)},
    "nll_loss_backward": {"target": ("self", 1)},
    "nll_loss2d_forward": {"target": ("self", 1)},
    "nll_loss2d_backward": {"target": ("self", 1)},
}
_POSITIVE = ("log", "rsqrt", "sqrt", "pow", "reciprocal", "log1p", "log2")
_SMOOTH = ("softmax", "scaled_dot_product", "exp", "gelu", "silu", "tanh", "sigmoid", "softplus", "erf", "sin", "cos")


def case_of(node: fx.Node) -> Case:
    """A case of the node's op, shapes, dtypes and arguments, with operands of our own."""
    values = [v.val for v in operands(node)]
    args, kwargs = numbered(node)
    named = named_arguments(node.target, args, kwargs)
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    limits: dict[int, int] = {}
    for index, (table, dim) in _INDEX.get(name, {}).items():
        source = values[named[table].number]
        limits[named[index].number] = source.shape[named[dim] if isinstance(dim, str) else dim]
    if name == "embedding_dense_backward":
        limits[named["indices"].number] = named["num_weights"]
    if name in ("index", "_unsafe_index", "index_put", "_unsafe_index_put"):
        for d, entry in enumerate(named["indices"]):
            if isinstance(entry, Operand):
                limits[entry.number] = values[named["self"].number].shape[d]
    tensors = [_values(name, v, limits.get(i)) for i, v in enumerate(values)]
    if name == "scatter" and isinstance(named.get("src"), Operand):
        # Positions must not repeat: which of two values wins is undefined.
        at, d = named["index"].number, named["dim"]
        tensors[at] = torch.rand(values[named["self"].number].shape).argsort(d).narrow(d, 0, values[at].shape[d])
        tensors[at] = tensors[at][tuple(slice(0, n) for n in values[at].shape)]
    if name.startswith("max_pool2d_with_indices_backward"):
        rest = [named[k] for k in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")]
        tensors[named["indices"].number] = aten.max_pool2d_with_indices(tensors[named["self"].number], *rest)[1]

    def back(arg: Any) -> Any:
        if isinstance(arg, Operand):
            return tensors[arg.number]
        if isinstance(arg, list):
            return [back(a) for a in arg]
        return torch.float64 if arg in (torch.float32, torch.float16, torch.bfloat16) else arg

    return Case(node.target, tuple(back(a) for a in args), {k: back(v) for k, v in kwargs.items()})


def _values(name: str, like: torch.Tensor, limit: int | None) -> torch.Tensor:
    shape = tuple(like.shape)
    if like.dtype == torch.bool:
        return flag(*shape)
    if not (like.dtype.is_floating_point or like.dtype.is_complex):
        found = whole(limit or 7, *shape).to(like.dtype)
        if name.startswith("nll_loss") and shape:
            found.view(-1)[1::3] = -100
        return found
    if like.dtype.is_complex:
        return torch.complex(num(*shape), num(*shape))
    if name in _POSITIVE or "norm" in name:
        return unit(*shape)
    return real(*shape) if any(s in name for s in _SMOOTH) else num(*shape)
