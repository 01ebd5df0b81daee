"""Calls for the truth machine: losses, convolutions, pooling, norms, attention, random numbers."""

from __future__ import annotations

from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401

import autopar.ops  # noqa: F401
from tests.truth import Case
from tests.truth_cases import different, num, real, unit, whole

aten = torch.ops.aten


def _labels(high: int, *shape: int) -> torch.Tensor:
    found = whole(high, *shape)
    found.view(-1)[1::3] = -100
    return found


def _losses() -> list[Case]:
    logp, target = torch.log_softmax(real(16, 8), 1), _labels(8, 16)
    image, labels = torch.log_softmax(real(2, 8, 4, 6), 1), _labels(8, 2, 4, 6)
    weight, count = unit(8), torch.tensor(9.0, dtype=torch.float64)
    out = []
    for reduction in (0, 1, 2):
        out += [
            Case(aten.nll_loss_forward.default, (logp, target, None, reduction, -100)),
            Case(aten.nll_loss_forward.default, (logp, whole(8, 16), weight, reduction, 2)),
            Case(aten.nll_loss2d_forward.default, (image, labels, None, reduction, -100)),
            Case(
                aten.nll_loss_backward.default,
                (num(16) if reduction == 0 else num(), logp, target, weight, reduction, -100, count),
            ),
            Case(
                aten.nll_loss2d_backward.default,
                (num(2, 4, 6) if reduction == 0 else num(), image, labels, None, reduction, -100, count),
            ),
        ]
    prediction, truth_, grad = unit(4, 8), unit(4, 8), num(4, 8)
    extra = {"smooth_l1_loss": (1.0,), "huber_loss": (1.0,)}
    for name in ("binary_cross_entropy", "mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"):
        forward, backward = getattr(aten, name).default, getattr(aten, f"{name}_backward").default
        weight = (unit(8),) if name == "binary_cross_entropy" else ()
        for reduction in (0, 1, 2):
            rest = (*weight, reduction, *extra.get(name, ()))
            out.append(Case(forward, (prediction, truth_, *rest)))
            out.append(Case(backward, (grad if reduction == 0 else num(), prediction, truth_, *rest)))
    out.append(Case(aten.nll_loss_forward.default, (torch.log_softmax(real(8), 0), torch.tensor(3), None, 2, -100)))
    out.append(
        Case(
            aten.nll_loss_backward.default,
            (num(), torch.log_softmax(real(8), 0), torch.tensor(3), None, 2, -100, count),
        )
    )
    return out


def _convolutions() -> list[Case]:
    def conv(x: Any, w: Any, b: Any, transposed: bool = False, groups: int = 1, n: int = 2) -> Case:
        return Case(aten.convolution.default, (x, w, b, [2] * n, [1] * n, [1] * n, transposed, [0] * n, groups))

    def back(x: Any, w: Any, y: Any, bias: Any, transposed: bool, groups: int, mask: list[bool]) -> Case:
        return Case(
            aten.convolution_backward.default, (y, x, w, bias, [2, 2], [1, 1], [1, 1], transposed, [0, 0], groups, mask)
        )

    x, w, every = num(4, 8, 5, 5), num(12, 8, 3, 3), [True] * 3
    grouped, depth = num(16, 2, 3, 3), num(8, 1, 3, 3)
    turned, turned_groups = num(8, 12, 3, 3), num(8, 2, 3, 3)
    return [
        conv(x, w, None),
        conv(x, w, num(12)),
        conv(x, grouped, num(16), groups=4),
        conv(x, depth, None, groups=8),
        conv(x, turned, num(12), True),
        conv(x, turned_groups, num(8), True, 4),
        conv(num(4, 8, 7), num(4, 8, 3), num(4), n=1),
        conv(num(2, 4, 3, 3, 3), num(4, 4, 1, 1, 1), None, n=3),
        back(x, w, num(4, 12, 3, 3), [12], False, 1, every),
        back(x, w, num(4, 12, 3, 3), None, False, 1, [True, False, False]),
        back(x, w, num(4, 12, 3, 3), None, False, 1, [False, True, False]),
        back(x, grouped, num(4, 16, 3, 3), [16], False, 4, every),
        back(x, turned, num(4, 12, 9, 9), [12], True, 1, every),
        back(x, turned_groups, num(4, 8, 9, 9), [8], True, 4, every),
    ]


def _spatial() -> list[Case]:
    x, cube, line = different(2, 4, 8, 8) / 8, different(2, 4, 4, 4, 4) / 8, different(2, 4, 8) / 8
    pool = ([2, 2], [2, 2], [0, 0], [1, 1], False)
    pool3 = ([2] * 3, [2] * 3, [0] * 3, [1] * 3, False)
    mean = ([2, 2], [2, 2], [0, 0], False, True, None)
    mean3 = ([2] * 3, [2] * 3, [0] * 3, False, True, None)
    where2 = aten.max_pool2d_with_indices(x, *pool)[1]
    where3 = aten.max_pool3d_with_indices(cube, *pool3)[1]
    some2 = aten.adaptive_max_pool2d(x, [4, 4])[1]
    out = [
        Case(aten.max_pool2d_with_indices.default, (x, *pool)),
        Case(aten.max_pool3d_with_indices.default, (cube, *pool3)),
        Case(aten.adaptive_max_pool2d.default, (x, [4, 4])),
        Case(aten.adaptive_max_pool3d.default, (cube, [2, 2, 2])),
        Case(aten.max_pool2d_with_indices_backward.default, (num(2, 4, 4, 4), x, *pool, where2)),
        Case(aten.max_pool3d_with_indices_backward.default, (num(2, 4, 2, 2, 2), cube, *pool3, where3)),
        Case(aten.adaptive_max_pool2d_backward.default, (num(2, 4, 4, 4), x, some2)),
        Case(aten.avg_pool2d.default, (x, *mean)),
        Case(aten.avg_pool2d_backward.default, (num(2, 4, 4, 4), x, *mean)),
        Case(aten.avg_pool3d.default, (cube, *mean3)),
        Case(aten.avg_pool3d_backward.default, (num(2, 4, 2, 2, 2), cube, *mean3)),
        Case(aten._adaptive_avg_pool2d.default, (x, [4, 4])),
        Case(aten._adaptive_avg_pool2d_backward.default, (num(2, 4, 4, 4), x)),
        Case(aten._adaptive_avg_pool3d.default, (cube, [2, 2, 2])),
        Case(aten._adaptive_avg_pool3d_backward.default, (num(2, 4, 2, 2, 2), cube)),
        Case(aten.grid_sampler_2d.default, (x, real(2, 4, 6, 2) / 2, 0, 0, False)),
        Case(aten.im2col.default, (x, [2, 2], [1, 1], [0, 0], [2, 2])),
        Case(aten.col2im.default, (num(2, 16, 16), [8, 8], [2, 2], [1, 1], [0, 0], [2, 2])),
    ]
    for name in ("reflection_pad", "replication_pad"):
        for n, t in ((1, line), (2, x)):
            grown = [*t.shape[:2], *(s + 2 for s in t.shape[2:])]
            out.append(Case(getattr(aten, f"{name}{n}d").default, (t, [1, 1] * n)))
            out.append(Case(getattr(aten, f"{name}{n}d_backward").default, (num(*grown), t, [1, 1] * n)))
    plain = {"upsample_nearest": (1, 2, 3), "_upsample_nearest_exact": (2,)}
    corner = {
        "upsample_linear1d": 1,
        "upsample_bilinear2d": 2,
        "upsample_bicubic2d": 2,
        "upsample_trilinear3d": 3,
        "_upsample_bilinear2d_aa": 2,
        "_upsample_bicubic2d_aa": 2,
    }
    inputs = {1: line, 2: x, 3: cube}
    for stem, ranks in plain.items():
        for n in ranks:
            size = [s * 2 for s in inputs[n].shape[2:]]
            out.append(Case(getattr(aten, f"{stem}{n}d").default, (inputs[n], size)))
            out.append(
                Case(getattr(aten, f"{stem}{n}d_backward").default, (num(2, 4, *size), size, list(inputs[n].shape)))
            )
    for name, n in corner.items():
        size = [s * 2 for s in inputs[n].shape[2:]]
        out.append(Case(getattr(aten, name).default, (inputs[n], size, False)))
        if not name.endswith("_aa"):
            out.append(
                Case(getattr(aten, f"{name}_backward").default, (num(2, 4, *size), size, list(inputs[n].shape), False))
            )
    return out


def _norms() -> list[Case]:
    x, gain, shift = num(4, 8, 6), num(6), num(6)
    _, mean, rstd = aten.native_layer_norm(x, [6], gain, shift, 1e-5)
    square = num(4, 8, 3, 2)
    image, scale = num(4, 8, 3, 3), num(8)
    picture, spread = num(4, 8, 2, 4), num(8).abs() + 0.5
    _, gmean, grstd = aten.native_group_norm(image, scale, scale, 4, 8, 9, 4, 1e-5)
    _, imean, irstd = aten.native_group_norm(image, None, None, 4, 8, 9, 8, 1e-5)
    every = [True] * 3
    wide = aten._weight_norm_interface(num(8, 4, 3), num(8, 1, 1), 0)[1]
    return [
        Case(aten._weight_norm_interface.default, (num(8, 4, 3), num(8, 1, 1), 0)),
        Case(aten._weight_norm_interface.default, (num(4, 3, 8), num(1, 1, 8), 2)),
        Case(
            aten._weight_norm_interface_backward.default,
            (num(8, 4, 3), num(8, 4, 3), num(8, 1, 1), wide, 0),
        ),
        Case(aten.native_layer_norm.default, (x, [6], gain, shift, 1e-5)),
        Case(aten.native_layer_norm.default, (square, [3, 2], None, None, 1e-5)),
        Case(aten.native_layer_norm_backward.default, (num(4, 8, 6), x, [6], mean, rstd, gain, shift, every)),
        Case(
            aten.native_layer_norm_backward.default, (num(4, 8, 6), x, [6], mean, rstd, gain, None, [True, True, False])
        ),
        Case(aten._fused_rms_norm.default, (x, [6], gain, 1e-5)),
        Case(aten._native_batch_norm_legit_no_training.default, (picture, scale, num(8), num(8), spread, 0.0, 1e-5)),
        Case(aten._native_batch_norm_legit_no_training.default, (num(4, 8), None, None, num(8), spread, 0.0, 1e-5)),
        Case(
            aten.native_batch_norm_backward.default,
            (num(4, 8, 2, 4), picture, scale, num(8), spread, num(8), spread.rsqrt(), False, 1e-5, every),
        ),
        Case(
            aten.native_batch_norm_backward.default,
            (num(4, 8, 2, 4), picture, None, num(8), spread, None, None, False, 1e-5, [False, True, True]),
        ),
        Case(
            aten.native_batch_norm_backward.default,
            (num(4, 8, 2, 4), picture, scale, None, None, num(8), spread, True, 1e-5, every),
        ),
        Case(aten.native_group_norm.default, (image, scale, num(8), 4, 8, 9, 4, 1e-5)),
        Case(aten.native_group_norm.default, (image, None, None, 4, 8, 9, 8, 1e-5)),
        Case(aten.native_group_norm.default, (image, scale, num(8), 4, 8, 9, 1, 1e-5)),
        Case(aten.native_group_norm_backward.default, (num(4, 8, 3, 3), image, gmean, grstd, scale, 4, 8, 9, 4, every)),
        Case(
            aten.native_group_norm_backward.default,
            (num(4, 8, 3, 3), image, imean, irstd, None, 4, 8, 9, 8, [True, False, False]),
        ),
    ]


def _attention() -> list[Case]:
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    out = []
    masks = ((False, None, 4), (True, None, 4), (False, real(2, 1, 4, 6), 4), (False, real(4, 6), 4))
    for causal, mask, heads in (*masks, (True, None, 2), (False, None, 2)):  # fewer key heads: grouped
        q = real(2, 4, 4, 8)
        t = 4 if causal else 6
        k, v = real(2, heads, t, 8), real(2, heads, t, 8)
        extra = {} if mask is None else {"attn_mask": mask}
        result, stat = forward(q, k, v, 0.0, causal, **extra)
        out.append(Case(forward.default, (q, k, v, 0.0, causal), extra))
        out.append(Case(backward.default, (num(2, 4, 4, 8), q, k, v, result, stat, 0.0, causal), extra))
    return out


def _random() -> list[Case]:
    seed = torch.tensor(7)
    return [
        Case(torch.ops.autopar.uniform.default, (seed, 1, [4, 12])),
        Case(torch.ops.autopar.normal.default, (seed, 2, [8, 2, 6])),
        Case(torch.ops.autopar.offload.default, (num(4, 8),)),
        Case(torch.ops.autopar.fetch.default, (num(4, 8),)),
    ]


def _experts() -> list[Case]:
    x, w, grad, offs = num(16, 8), num(2, 8, 12), num(16, 12), torch.tensor([5, 16])
    return [
        Case(torch.ops.transformers.grouped_mm_fallback.default, (x, w, offs)),
        Case(torch.ops.transformers.grouped_mm_fallback_backward.default, (x, w, offs, grad)),
    ]


def gpu_only() -> list[Case]:
    """Calls of the kernels that only GPUs have, on tensors of the meta device (shapes without values)."""

    def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v, out = on_meta(2, 4, 8, 16), on_meta(2, 4, 6, 16), on_meta(2, 4, 6, 16), on_meta(2, 4, 8, 16)
    stat, seed, offset = on_meta(2, 4, 8, dtype=torch.float32), on_meta(dtype=torch.int64), on_meta(dtype=torch.int64)
    bias = on_meta(2, 1, 8, 6)
    cases = []
    for causal in (False, True):
        cases += [
            Case(aten._scaled_dot_product_flash_attention.default, (q, k, v, 0.0, causal)),
            Case(
                aten._scaled_dot_product_flash_attention_backward.default,
                (out, q, k, v, out, stat, None, None, 8, 6, 0.0, causal, seed, offset),
            ),
            Case(aten._scaled_dot_product_efficient_attention.default, (q, k, v, bias, True, 0.0, causal)),
            Case(
                aten._scaled_dot_product_efficient_attention_backward.default,
                (
                    out,
                    q,
                    k,
                    v,
                    bias,
                    out,
                    on_meta(2, 4, 32, dtype=torch.float32),
                    seed,
                    offset,
                    0.0,
                    [True, True, True, False],
                    causal,
                ),
            ),
            Case(aten._scaled_dot_product_cudnn_attention.default, (q, k, v, bias, True, 0.0, causal)),
            Case(
                aten._scaled_dot_product_cudnn_attention_backward.default,
                (
                    out,
                    q,
                    k,
                    v,
                    out,
                    on_meta(2, 4, 8, 1, dtype=torch.float32),
                    seed,
                    offset,
                    bias,
                    None,
                    None,
                    8,
                    6,
                    0.0,
                    causal,
                ),
            ),
        ]
    x = on_meta(4, 8, 6)
    root = on_meta(4, 8, 1, dtype=torch.float32)
    cases.append(Case(aten._fused_rms_norm_backward.default, (x, x, [6], root, on_meta(6), [True, True])))
    return cases


HAND: list[Case] = [*_losses(), *_convolutions(), *_spatial(), *_norms(), *_attention(), *_random(), *_experts()]
