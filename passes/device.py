"""From the CPU, of which every program speaks, to the device that a rank runs on. The last symbolic pass.

* ops that make tensors, and casts that name a device, name this one;
* constant tensors are moved there;
* attention takes the device's own kernels (`passes/attention.py`).

And before all other passes, which go by dtypes: what a kernel gives in another dtype there than on the CPU.

Random numbers need nothing: they are integer arithmetic of a seed (`autopar/ops.py`), which lies on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.passes import attention, edit
from autopar.passes import collectives as c

aten = torch.ops.aten


@dataclass(frozen=True)
class Target:
    """What a rank runs on.

    Attributes:
        device: where its tensors lie.
        kernels: kinds of attention kernels that it has, of those that not all GPUs have: "flash", "cudnn".
        staged: collectives go through host memory, for ranks that share a GPU.
        linear_from: FLOPs of a float32 product from which oneDNN computes it; None: never (`passes/products.py`).
        weights_from: likewise where both operands lie column by column, as of the gradient of a weight.
    """

    device: torch.device
    kernels: frozenset[str] = attention.FLASH_ONLY
    staged: bool = False
    linear_from: float | None = None
    weights_from: float | None = None


#: What programs speak of.
HOST = Target(torch.device("cpu"))


def statistics(gm: fx.GraphModule) -> fx.GraphModule:
    """Say that layer norm keeps the statistics of half precision in float32, as it does on GPUs but not on the CPU.

    `gm`, a symbolic local graph, is changed: `meta["val"]` of the statistics, and of what only moves them.
    """
    wide: set[fx.Node] = set()
    for node in gm.graph.nodes:
        val, inputs = node.meta.get("val"), node.all_input_nodes
        if node.target is aten.native_layer_norm.default and val[0].dtype in (torch.bfloat16, torch.float16):
            node.meta["val"] = (val[0], *(v.to(torch.float32) for v in val[1:]))
            wide.update(u for u in node.users if edit.is_pick(u) and u.args[1] in (1, 2))
        elif len(inputs) == 1 and inputs[0] in wide and "dtype" not in node.kwargs:
            if node.target in edit.MOVES or node.target in c.COLLECTIVES:
                wide.add(node)
        if node in wide:
            node.meta["val"] = node.meta["val"].to(torch.float32)
    return gm


def to_device(gm: fx.GraphModule, target: Target) -> fx.GraphModule:
    """Rewrite a symbolic local graph as described above. `gm` is changed, its constants are replaced by copies."""
    device = target.device
    moved: set[str] = set()
    idle: dict[Any, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.op == "get_attr" and node.target not in moved:
            moved.add(str(node.target))
            _move(gm, str(node.target), device)
        elif node.target in (attention.FORWARD, attention.BACKWARD):
            attention.replace(gm.graph, node, device, target.kernels, idle)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            _rename(node, device)
    gm.recompile()
    return gm


def _move(gm: fx.GraphModule, name: str, device: torch.device) -> None:
    path, _, last = name.rpartition(".")
    holder = gm.get_submodule(path)
    setattr(holder, last, getattr(holder, last).to(device))


def _rename(node: fx.Node, device: torch.device) -> None:
    """Say `device` where the call names one, and where it would be made on the default one."""
    target: torch._ops.OpOverload = node.target  # type: ignore[assignment]
    if not any(a.name == "device" for a in target._schema.arguments):
        return
    if node.kwargs.get("device") is not None or not node.all_input_nodes:
        node.kwargs = {**node.kwargs, "device": device}


__all__ = ["HOST", "Target", "statistics", "to_device"]
