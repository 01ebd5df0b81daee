"""The local version of one op: same op on the pieces, with every size argument recomputed from local shapes.

Most ops run on pieces as they are. The tables here hold the others: sizes among the arguments, indices that are global,
constants that depend on the place of the piece. Ops whose shards talk to each other are in `localise_inner`, ops that
index in `localise_index`.

Views are left as views. Some kernels read memory by pointer and take contiguity for granted; those of `RAW_POINTER` get
contiguous operands (`aten.contiguous` copies only where it must).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from autopar.errors import PassError
from autopar.graph import op_name
from autopar.passes import localise_index, localise_inner
from autopar.passes.local_call import Emitter, LocalCall, Localiser

aten = torch.ops.aten


def _ops(names: str) -> list[Any]:
    found = []
    for name in names.split():
        packet, _, overload = name.partition(".")
        if hasattr(aten, packet):
            found.append(getattr(getattr(aten, packet), overload or "default"))
    return found


#: Kernels that read their operands by raw pointer, or refuse strides. `native_layer_norm_backward` (CPU) gives silent
#: garbage on strided statistics.
RAW_POINTER = frozenset(
    _ops(
        "native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward _fused_rms_norm "
        "_fused_rms_norm_backward embedding_dense_backward _softmax_backward_data _log_softmax_backward_data "
        "nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward view_as_complex "
        "max_pool2d_with_indices max_pool2d_with_indices_backward max_pool3d_with_indices "
        "max_pool3d_with_indices_backward avg_pool2d avg_pool2d_backward avg_pool3d avg_pool3d_backward "
        "_adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d _adaptive_avg_pool3d_backward "
        "adaptive_max_pool2d adaptive_max_pool2d_backward adaptive_max_pool3d adaptive_max_pool3d_backward "
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward "
        "_weight_norm_interface _weight_norm_interface_backward "
        "_fft_r2c _fft_c2r _fft_c2c _grouped_mm grid_sampler_2d im2col col2im upsample_nearest1d "
        "upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d "
        "upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d "
        "upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward "
        "upsample_linear1d_backward upsample_bilinear2d_backward upsample_bicubic2d_backward "
        "upsample_trilinear3d_backward _upsample_nearest_exact2d_backward topk sort sort.stable"
    )
)


def emit(graph: fx.Graph, node: fx.Node, operands: list[fx.Node], call: LocalCall) -> list[fx.Node | None]:
    """Append the local version of global `node` to `graph`.

    Args:
        graph: the local graph being built.
        node: the op in the global graph.
        operands: its local operands in rule order, each with `meta["val"]` of its local shape.
        call: its rule, choices and specs.

    Returns:
        One local node per result, None where the op gives none; each with val, phase, module and address in its meta.

    Raises:
        PassError: a symbolic size is among the arguments, or operands and choices do not fit the op.
    """
    if len(operands) != len(call.in_specs):
        raise PassError(f"{op_name(node)} takes {len(call.in_specs)} tensor operands, got {len(operands)}")
    if not call.bound.fits(call.choices, call.mesh.sizes):
        raise PassError(
            f"{op_name(node)} cannot run with choices {' '.join(map(str, call.choices))} on mesh {call.mesh}: they cut "
            f"its factors into more pieces than they have; rule '{call.bound.rule}', sizes {dict(call.bound.sizes)}"
        )
    out = Emitter(graph, node, operands, call)
    if node.target in RAW_POINTER:
        operands = [out.add(aten.contiguous.default, x) for x in operands]
        out = Emitter(graph, node, operands, call)
    localise = LOCALISERS.get(node.target) or NAMED.get(_qualified(node.target))
    return localise(out) if localise else out.same()


def _qualified(target: Any) -> str:
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


# ---- sizes among the arguments ------------------------------------------------------------------------------


def _reshape(e: Emitter) -> list[fx.Node | None]:
    # Local strides differ from global ones, and a local size of one must not be squeezed by accident.
    return e.final(aten.reshape.default, e.operands[0], list(e.shape))


def _shaped(name: str) -> Localiser:
    """The argument `name` is the shape of the result."""

    def localise(e: Emitter) -> list[fx.Node | None]:
        return e.same(**{name: list(e.shape)})

    return localise


def _repeat(e: Emitter) -> list[fx.Node | None]:
    old = e.operands[0].meta["val"].shape
    lead = len(e.shape) - len(old)
    return e.same(repeats=[n // (old[i - lead] or 1) if i >= lead else n for i, n in enumerate(e.shape)])


def _scaled(value: int, local: int, total: int) -> int:
    """A place or length along a dim of which this rank holds `local` of `total`."""
    return value * local // total if total else value


def _slice(e: Emitter) -> list[fx.Node | None]:
    backward = e.node.target is aten.slice_backward.default
    local = e.shape if backward else tuple(e.operands[0].meta["val"].shape)
    d = e.named["dim"] % len(local)
    out = e.globals[0]
    assert out is not None
    total = out.shape[d] if backward else e.global_shape(0)[d]
    start, end, _ = slice(e.named["start"], e.named["end"], e.named["step"]).indices(total)
    # Step 1 may be cut: start and end are multiples of the block that is. Others see the whole dim.
    changes: dict[str, Any] = {
        "start": _scaled(start, local[d], total),
        "end": _scaled(max(end, start), local[d], total),
    }
    if backward:
        changes["input_sizes"] = list(local)
    return e.same(**changes)


def _pad(e: Emitter) -> list[fx.Node | None]:
    local = e.operands[0].meta["val"].shape
    pads = list(e.named["pad"])
    for i in range(len(pads)):
        d = len(local) - 1 - i // 2
        out = e.globals[0]
        assert out is not None
        pads[i] = _scaled(pads[i], e.shape[d], out.shape[d])
    return e.same(pad=pads)


def _split(e: Emitter) -> list[fx.Node | None]:
    d = e.named["dim"] % len(e.shape)
    if e.node.target is aten.split_with_sizes.default:
        return e.same(split_sizes=[s[d] for s in e.shapes if s is not None])
    return e.same(split_size=e.shape[d])


def _select_backward(e: Emitter) -> list[fx.Node | None]:
    return e.same(input_sizes=list(e.shape))


def _upsample_backward(e: Emitter) -> list[fx.Node | None]:
    return e.same(input_size=list(e.shape))


# ---- layers -------------------------------------------------------------------------------------------------


def _share(e: Emitter, x: fx.Node, *factors: str) -> fx.Node:
    """`x` divided among the shards that will all add it."""
    parts = e.parts(*factors)
    return x if parts == 1 else e.add(aten.mul.Scalar, x, 1.0 / parts)


def _convolution(e: Emitter) -> list[fx.Node | None]:
    changes: dict[str, Any] = {"groups": e.named["groups"] // e.parts("g")}
    if e.named["bias"] is not None:
        changes["bias"] = _share(e, e.named["bias"], "c")
    return e.same(**changes)


def _convolution_backward(e: Emitter) -> list[fx.Node | None]:
    sizes = e.named["bias_sizes"]
    channels = e.named["grad_output"].meta["val"].shape[1]
    return e.same(groups=e.named["groups"] // e.parts("g"), bias_sizes=None if sizes is None else [channels])


def _addmm(e: Emitter) -> list[fx.Node | None]:
    parts = e.parts("k")
    return e.same() if parts == 1 else e.same(beta=e.named["beta"] / parts)


def _group_norm(e: Emitter) -> list[fx.Node | None]:
    n, channels, *space = e.named["input"].meta["val"].shape
    return e.same(N=n, C=channels, HxW=math.prod(space), group=e.named["group"] // e.parts("g"))


def _attention_backward(e: Emitter) -> list[fx.Node | None]:
    # Longest sequences: results of the forward, as numbers.
    if "max_q" not in e.named:
        return e.same()
    return e.same(max_q=e.named["query"].meta["val"].shape[2], max_k=e.named["key"].meta["val"].shape[2])


def _random(e: Emitter) -> list[fx.Node | None]:
    """The numbers of this piece, by the global index of every element."""
    if not any(e.axes(f) for f in e.call.bound.rule.factors):
        return e.same()
    name = _qualified(e.node.target).partition("::")[2]
    target = getattr(torch.ops.autopar, f"{name}_at").default
    index = [localise_index.global_index(e, e.named["seed"], e.out_digits(d)) for d in range(len(e.shape))]
    return e.final(target, e.named["seed"], e.named["stream"], index, list(e.named["shape"]))


def _loss(e: Emitter) -> list[fx.Node | None]:
    """Mean losses divide by the local count: scaled to the global one."""
    parts = e.parts(*e.call.bound.rule.factors)
    if e.named["reduction"] != 1 or parts == 1:
        return e.same()
    if "grad_output" in e.named:
        return e.same(grad_output=e.add(aten.mul.Scalar, e.named["grad_output"], 1.0 / parts))
    return e.final(aten.mul.Scalar, e.add(e.node.target, *e.args, **e.kwargs), 1.0 / parts)


def _each(names: str, localise: Localiser) -> dict[Any, Localiser]:
    return dict.fromkeys(_ops(names), localise)


LOCALISERS: dict[Any, Localiser] = {
    **_each("view reshape _unsafe_view squeeze squeeze.dim squeeze.dims unsqueeze", _reshape),
    **_each("expand full zeros ones empty.memory_format new_zeros new_ones new_full new_empty", _shaped("size")),
    **_each("repeat", _repeat),
    **_each("slice.Tensor slice_backward slice_scatter", _slice),
    **_each("binary_cross_entropy mse_loss smooth_l1_loss huber_loss soft_margin_loss", _loss),
    **_each(
        "binary_cross_entropy_backward mse_loss_backward smooth_l1_loss_backward huber_loss_backward "
        "soft_margin_loss_backward",
        _loss,
    ),
    **_each("select_backward", _select_backward),
    **_each("constant_pad_nd", _pad),
    **_each("split.Tensor split_with_sizes", _split),
    **_each("convolution", _convolution),
    **_each("convolution_backward", _convolution_backward),
    **_each("addmm baddbmm", _addmm),
    **_each("native_group_norm native_group_norm_backward", _group_norm),
    **_each(
        "_scaled_dot_product_flash_attention_backward _scaled_dot_product_cudnn_attention_backward",
        _attention_backward,
    ),
    **_each(
        "upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward "
        "upsample_linear1d_backward upsample_bilinear2d_backward upsample_bicubic2d_backward "
        "upsample_trilinear3d_backward _upsample_nearest_exact2d_backward",
        _upsample_backward,
    ),
    **localise_inner.LOCALISERS,
    **localise_index.LOCALISERS,
}
#: Ops of our own, by name.
NAMED: dict[str, Localiser] = {"autopar::uniform": _random, "autopar::normal": _random}

__all__ = ["LOCALISERS", "RAW_POINTER", "Emitter", "LocalCall", "emit"]
