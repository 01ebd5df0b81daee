"""Rules of layers: convolution, pooling, resampling, normalisation, losses, attention."""

from __future__ import annotations

from typing import Any

import torch

from autopar.costmodel.rules_call import Call, Dims, Maker, names, replicated, text, whole, wrap

aten = torch.ops.aten

_IN, _KERNEL, _OUT = ("h^", "w^", "d^"), ("p^", "q^", "r^"), ("y^", "x^", "u^")


def _conv_dims(call: Call, weight: tuple[int, ...]) -> tuple[Dims, Dims, Dims, dict[str, int]]:
    # Channels are (group, channel of the group). The weight holds (g o) c, transposed (g c) o.
    spatial = len(weight) - 2
    groups, transposed = call.arg("groups"), call.arg("transposed")
    c, o = "c", "o"

    def grouped(name: str) -> str:
        return f"(g {name})" if groups > 1 else name

    x = ["n", grouped(c), *_IN[:spatial]]
    w = [grouped(c), o] if transposed else [grouped(o), c]
    y = ["n", grouped(o), *_OUT[:spatial]]
    return x, [*w, *_KERNEL[:spatial]], y, {"g": groups} if groups > 1 else {}


def _mark(dims: Dims, **marks: str) -> Dims:
    out = []
    for dim in dims:
        inner = dim.strip("()").split()
        new = [n + marks.get(n, "") for n in inner]
        out.append(f"({' '.join(new)})" if dim.startswith("(") else new[0])
    return out


def convolution(call: Call) -> str:
    """convolution of any number of spatial dims, grouped, transposed. Spatial dims would need halos: whole.

    Where input channels are split, the local op adds its share of the bias.
    """
    bias = call.at("bias")
    if len(call.ins[0]) != len(call.ins[1]):
        return replicated(call)
    x, w, y, sizes = _conv_dims(call, call.ins[1])
    x, w = _mark(x, c="+"), _mark(w, c="+")
    b = [[y[1]]] if bias is not None else []
    linear = call.linear((0, bias), (1, bias)) if bias is not None else call.linear((0,), (1,))
    return text([x, w, *b], [y], linear, sizes=sizes)


def convolution_backward(call: Call) -> str:
    """Gradients of input, weight and bias, those that the mask asks for."""
    if len(call.ins[1]) != len(call.ins[2]):
        return replicated(call)
    x, w, y, sizes = _conv_dims(call, call.ins[2])
    outs = [dims if shape is not None else None for dims, shape in zip((x, w, [y[1]]), call.outs)]
    asked = [shape is not None for shape in call.outs]
    groups: list[tuple[int]] = [(0,)]
    if asked == [True, False, False]:
        groups.append((2,))
    if asked == [False, True, False]:
        groups.append((1,))
    return text([_mark(y, n="+", o="+"), x, w], outs, call.linear(*groups), sizes=sizes)


def spatial(count: int, linear: bool) -> Maker:
    """Pooling and resampling, forward and backward: the last `count` dims are whole, the leading ones loops."""

    def maker(call: Call) -> str:
        rank = len(call.ins[0])
        lead = names(rank - count)

        def dims(shape: tuple[int, ...], stem: str) -> Dims:
            return lead + [f"{stem}{i}^" for i in range(count)] if len(shape) == rank else whole(shape, f"{stem}_")

        ins = [dims(s, f"h{i}") for i, s in enumerate(call.ins)]
        outs = [None if s is None else dims(s, f"y{i}") for i, s in enumerate(call.outs)]
        return text(ins, outs, call.linear((0,)) if linear else [])

    return maker


def grid_sampler(call: Call) -> str:
    """grid_sampler_2d: batch, channels, and the points that are sampled."""
    return text([["n", "c", "h^", "w^"], ["n", "y", "x", "q^"]], [["n", "c", "y", "x"]], call.linear((0,)))


def columns(call: Call) -> str:
    """im2col, col2im: channels are mixed with the kernel; the batch splits."""
    if len(call.ins[0]) == len(call.out) and call.ins[0][0] == call.out[0] and len(call.out) in (3, 4):
        rest_in, rest_out = whole(call.ins[0][1:], "x"), whole(call.out[1:], "y")
        return text([["n", *rest_in]], [["n", *rest_out]], call.linear((0,)))
    rank = len(call.ins[0])
    if {rank, len(call.out)} == {3, 4}:
        return text([["n", *whole(call.ins[0][1:], "x")]], [["n", *whole(call.out[1:], "y")]], call.linear((0,)))
    return replicated(call)


def layer_norm(call: Call) -> str:
    """native_layer_norm: normalised dims whole; statistics keep the leading dims."""
    rank, inner = len(call.ins[0]), len(call.arg("normalized_shape"))
    lead = names(rank - inner)
    norm = [n + "^" for n in names(inner, rank - inner)]
    stat = [*lead, *["1"] * inner]
    return text([[*lead, *norm], *[norm] * (len(call.ins) - 1)], [[*lead, *norm], stat, stat])


def layer_norm_backward(call: Call) -> str:
    """native_layer_norm_backward: gradients of weight and bias are partial in the leading dims."""
    rank, inner = len(call.ins[0]), len(call.arg("normalized_shape"))
    lead = [n + "+" for n in names(rank - inner)]
    norm = [n + "^" for n in names(inner, rank - inner)]
    stat = [*lead, *["1"] * inner]
    full = [*lead, *norm]
    outs = [None if s is None else d for s, d in zip(call.outs, (full, norm, norm))]
    return text([full, full, stat, stat, *[norm] * (len(call.ins) - 4)], outs, call.linear((0,)))


def rms_norm(call: Call) -> str:
    """_fused_rms_norm(input, shape, weight, eps) -> (out, rstd)."""
    rank, inner = len(call.ins[0]), len(call.arg("normalized_shape"))
    lead = names(rank - inner)
    norm = [n + "^" for n in names(inner, rank - inner)]
    return text([[*lead, *norm], *[norm] * (len(call.ins) - 1)], [[*lead, *norm], [*lead, *["1"] * inner]])


def rms_norm_backward(call: Call) -> str:
    """_fused_rms_norm_backward(grad, input, shape, rstd, weight, mask) -> (grad input, grad weight)."""
    rank, inner = len(call.ins[0]), len(call.arg("normalized_shape"))
    lead = [n + "+" for n in names(rank - inner)]
    norm = [n + "^" for n in names(inner, rank - inner)]
    full = [*lead, *norm]
    outs = [None if s is None else d for s, d in zip(call.outs, (full, norm))]
    return text([full, full, [*lead, *["1"] * inner], *[norm] * (len(call.ins) - 3)], outs, call.linear((0,)))


def weight_norm(call: Call) -> str:
    """_weight_norm_interface and its backward: each slice of one dim is normalised by itself."""
    rank, backward = len(call.ins[0]), len(call.ins) == 4
    d = wrap(call.arg("dim"), rank)
    full = [n + "^" * (i != d) for i, n in enumerate(names(rank))]
    gain = [n if i == d else "1" for i, n in enumerate(full)]
    if backward:
        return text([full, full, gain, gain], [full, gain], call.linear((0,)))
    return text([full, gain], [full, gain])


def _group_channels(call: Call) -> tuple[str, Dims]:
    groups = call.arg("group")
    x = call.ins[call.at("input") or 0]
    channels = "c^" if groups == 1 else "g" if x[1] == groups else "(g c^)"
    return channels, [f"s{i}^" for i in range(len(x) - 2)]


def group_norm(call: Call) -> str:
    """native_group_norm: batch and groups split; the local op gets its own counts."""
    channels, space = _group_channels(call)
    groups = call.arg("group")
    x, stat = ["n", channels, *space], ["n", "g" if groups > 1 else "1"]
    params = [[channels]] * (len(call.ins) - 1)
    return text([x, *params], [x, stat, stat], sizes={"g": groups} if groups > 1 else None)


def group_norm_backward(call: Call) -> str:
    """native_group_norm_backward: gradients of weight and bias are partial in the batch."""
    channels, space = _group_channels(call)
    groups = call.arg("group")
    x, stat = ["n+", channels, *space], ["n+", "g" if groups > 1 else "1"]
    outs = [None if s is None else d for s, d in zip(call.outs, (x, [channels], [channels]))]
    ins = [x, x, stat, stat, *[[channels]] * (len(call.ins) - 4)]
    return text(ins, outs, call.linear((0,)), sizes={"g": groups} if groups > 1 else None)


def batch_norm(call: Call) -> str:
    """_native_batch_norm_legit_no_training: of given statistics, so that every element is by itself."""
    x = names(len(call.ins[0]))
    rest = [None if s is None else whole(s, f"e{i}") for i, s in enumerate(call.outs[1:])]
    return text([x, *[[x[1]]] * (len(call.ins) - 1)], [x, *rest])


def batch_norm_backward(call: Call) -> str:
    """native_batch_norm_backward with given statistics: gradients of weight and bias are partial in all but channels.

    Statistics of the input itself need sums over all of it: whole but for the channels (capture leaves no such op).
    """
    x = names(len(call.ins[0]))
    channels, given = x[1], not call.arg("train")
    full = [n if n == channels else n + ("+" if given else "^") for n in x]
    outs = [None if s is None else d for s, d in zip(call.outs, (full, [channels], [channels]))]
    # Statistics that there are none of are empty.
    vectors = [[channels] if s == call.ins[0][1:2] else whole(s, f"e{i}") for i, s in enumerate(call.ins[2:])]
    return text([full, full, *vectors], outs, call.linear((0,)))


_MEAN = 1


def _loss_dims(call: Call, rank: int) -> tuple[Dims, Dims]:
    # self is (c), (n c) or (n c h w); target lacks c.
    lead = names(rank)
    at = 0 if rank == 1 else 1
    return lead[:at] + ["k"] + lead[at + 1 :], lead[:at] + lead[at + 1 :]


def nll_forward(call: Call) -> str:
    """nll_loss_forward, nll_loss2d_forward: partial in everything; a shard of the classes ignores foreign targets.

    The mean divides by a global count: whole (capture turns it into sum and division).
    """
    x, target = _loss_dims(call, len(call.ins[0]))
    reduction = call.arg("reduction")
    weighted = len(call.ins) == 3
    outs: list[Dims | None] = [[], []]
    if reduction == 0:
        # One loss per target: total_weight is zero.
        return text([_mark(x, k="+"), target, *[["k+"]] * weighted], [target, []], call.linear((0,), (2,)))
    mark = "^" if reduction == _MEAN else "+"
    x, target = [d + mark for d in x], [d + mark for d in target]
    linear = call.linear((2,)) if reduction != _MEAN else []
    return text([x, target, *[["k" + mark]] * weighted], outs, linear)


def nll_backward(call: Call) -> str:
    """nll_loss_backward, nll_loss2d_backward: a shard of the classes writes where its own targets lie."""
    x, target = _loss_dims(call, len(call.ins[1]))
    weight = call.at("weight")
    grad = target if call.arg("reduction") == 0 else []
    return text([grad, x, target, *[["k"]] * (weight is not None), []], [x], call.linear((0,), (weight,)))


def _heads(call: Call) -> str:
    """Heads of the query: fewer key heads make them (group, heads of the group)."""
    query, key = (call.ins[call.at(n) or 0] for n in ("query", "key"))
    return "(h g)" if key[1] != query[1] else "h"


def _bias(call: Call, s: str, t: str) -> tuple[int, Dims] | None:
    """Operand number and dims of the additive mask, where there is one."""
    for name in ("attn_mask", "attn_bias", "bias"):
        at = call.at(name)
        if at is not None:
            dims = ["b", _heads(call), s, t][4 - len(call.ins[at]) :]
            return at, ["1" if n == 1 else d for d, n in zip(dims, call.ins[at])]
    return None


def _statistics(call: Call, shape: tuple[int, ...] | None, s: str) -> Dims | None:
    # Backends differ: [b h s], [b h s 1], rows padded to some block, or nothing in inference.
    if shape is None:
        return None
    rows = call.ins[call.at("query") or 0][:3]
    if shape == rows:
        return ["b", _heads(call), s]
    if shape == (*rows, 1):
        return ["b", _heads(call), s, "1"]
    return ["b", _heads(call), "pad^"] if shape[:2] == rows[:2] else whole(shape, "l")


def _loops(call: Call, stat: tuple[int, ...] | None, mark: str) -> tuple[str, str]:
    """Query and key positions: whole where a causal mask counts them, or the row statistics are padded."""
    rows = call.ins[call.at("query") or 0][:3]
    if call.arg("is_causal") or (stat is not None and stat[:3] != rows):
        return "s^", "t^"
    return f"s{mark}", f"t{mark or '^'}"


def attention(call: Call) -> str:
    """Fused attention, forward, every backend: batch and heads split, query positions too unless causal.

    Operands q [b h s d], k [b h t d], v [b h t e], optional mask; results the output, the row statistics, and what the
    backend keeps for itself (seeds, offsets, debug masks), which stays whole. With dropout inside, nothing splits.
    """
    if call.arg("dropout_p"):
        return replicated(call)
    head, (s, t) = _heads(call), _loops(call, call.outs[1], "")
    ins: list[Dims] = [["b", head, s, "d^"], ["b", "h", t, "d^"], ["b", "h", t, "e^"]]
    bias = _bias(call, s, t)
    if bias is not None:
        ins.append(bias[1])
    outs = [["b", head, s, "e^"], _statistics(call, call.outs[1], s)]
    outs += [None if shape is None else whole(shape, f"r{i}_") for i, shape in enumerate(call.outs[2:])]
    return text(ins, outs)


def attention_backward(call: Call) -> str:
    """Backward of fused attention: gradients of key and value are partial in the query positions, that of the query in
    the key positions (the row statistics are given). A causal mask counts positions: then both stay whole."""
    stat = call.at("logsumexp")
    if call.arg("dropout_p") or stat is None:
        return replicated(call)
    s, t = _loops(call, call.ins[stat], "+")
    head = _heads(call).replace("g", "g+")  # the query heads of a group add up in its key head
    q, k, v, o = ["b", head, s, "d^"], ["b", "h", t, "d^"], ["b", "h", t, "e^"], ["b", head, s, "e^"]
    ins: list[Dims] = [whole(shape, f"r{i}_") for i, shape in enumerate(call.ins)]
    known = {"query": q, "key": k, "value": v} | dict.fromkeys(("out", "output", *_GRADIENTS), o)
    for name, own in known.items():
        at = call.at(name)
        if at is not None:
            ins[at] = own
    ins[stat] = _statistics(call, call.ins[stat], s) or []
    outs: list[Dims | None] = [q, k, v, *[None] * (len(call.outs) - 3)]
    bias = _bias(call, s, t)
    if bias is not None:
        ins[bias[0]] = bias[1]
        if len(call.outs) > 3 and call.outs[3] is not None:
            # The gradient of a mask that is shared by batch or heads adds up over them.
            outs[3] = [_SHARED.get(d, d) for d in bias[1]]
            ins[0] = [_SHARED.get(d, d) for d in ins[0]]
    grad = next(call.at(n) for n in _GRADIENTS if call.at(n) is not None)
    return text(ins, outs, call.linear((grad,)))


_SHARED = {"b": "b+", "h": "h+", "(h g)": "(h+ g+)", "(h g+)": "(h+ g+)"}
_GRADIENTS = ("grad_out", "grad_out_", "grad_output")


def random_values(call: Call) -> str:
    """autopar::uniform, normal: a number depends on its global place only, so every dim splits."""
    return text([[]], [names(len(call.out))])


def _each(names_: str, maker: Maker | str) -> dict[Any, Maker | str]:
    found = {}
    for name in names_.split():
        packet, _, overload = name.partition(".")
        if hasattr(aten, packet):
            found[getattr(getattr(aten, packet), overload or "default")] = maker
    return found


TABLE: dict[Any, Maker | str] = {
    **_each("convolution", convolution),
    **_each("convolution_backward", convolution_backward),
    **_each("max_pool2d_with_indices adaptive_max_pool2d", spatial(2, False)),
    **_each("max_pool3d_with_indices adaptive_max_pool3d", spatial(3, False)),
    **_each(
        "max_pool2d_with_indices_backward adaptive_max_pool2d_backward avg_pool2d avg_pool2d_backward "
        "_adaptive_avg_pool2d _adaptive_avg_pool2d_backward reflection_pad2d replication_pad2d "
        "reflection_pad2d_backward replication_pad2d_backward upsample_nearest2d upsample_bilinear2d "
        "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d "
        "upsample_nearest2d_backward upsample_bilinear2d_backward upsample_bicubic2d_backward "
        "_upsample_nearest_exact2d_backward",
        spatial(2, True),
    ),
    **_each(
        "avg_pool3d avg_pool3d_backward _adaptive_avg_pool3d _adaptive_avg_pool3d_backward upsample_nearest3d "
        "upsample_trilinear3d upsample_nearest3d_backward upsample_trilinear3d_backward "
        "max_pool3d_with_indices_backward",
        spatial(3, True),
    ),
    **_each(
        "upsample_nearest1d upsample_linear1d upsample_nearest1d_backward upsample_linear1d_backward "
        "reflection_pad1d replication_pad1d reflection_pad1d_backward replication_pad1d_backward",
        spatial(1, True),
    ),
    **_each("grid_sampler_2d", grid_sampler),
    **_each("im2col col2im", columns),
    **_each("_weight_norm_interface _weight_norm_interface_backward", weight_norm),
    **_each("native_layer_norm", layer_norm),
    **_each("native_layer_norm_backward", layer_norm_backward),
    **_each("_fused_rms_norm", rms_norm),
    **_each("_fused_rms_norm_backward", rms_norm_backward),
    **_each("_native_batch_norm_legit_no_training", batch_norm),
    **_each("native_batch_norm_backward", batch_norm_backward),
    **_each("native_group_norm", group_norm),
    **_each("native_group_norm_backward", group_norm_backward),
    **_each("nll_loss_forward nll_loss2d_forward", nll_forward),
    **_each("nll_loss_backward nll_loss2d_backward", nll_backward),
    **_each(
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention",
        attention,
    ),
    **_each(
        "_scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_flash_attention_backward "
        "_scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward",
        attention_backward,
    ),
}

#: Ops of our own and of Transformers, by name: defined elsewhere, and not loaded for the table to be read.
NAMED: dict[str, Maker | str] = {
    "autopar::uniform": random_values,
    "autopar::normal": random_values,
    # input (t k), expert weights (g k n), offsets (g): tokens are cut at run-time offsets, so they and the experts stay
    "transformers::grouped_mm_fallback": "t^ k+, g^ k n, g^ -> t^ n ; linear 0 | 1",
    "transformers::grouped_mm_fallback_backward": "t^ k, g^ k n+, g^, t^ n+ -> t^ k, g^ k n ; linear 3",
}
