"""A model of the same kind, small enough to train on this machine in seconds: for `autopar verify`.

A Hugging Face configuration is scaled down entry by entry, by the role its name tells. What matters to a plan is kept:
which sizes the mesh divides, and which it does not; that key-value heads are fewer than heads; that layers repeat.
"""

from __future__ import annotations

import math
from typing import Any

from autopar.mesh import Mesh

LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
HEAD_DIM = ("head_dim", "d_kv")
HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
WIDE = (
    "intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim",
    "moe_intermediate_size", "shared_expert_intermediate_size", "d_inner",
)  # fmt: skip
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")
SMALL_HEAD_DIM = 8


def shrink_mesh(mesh: Mesh, procs: int | None = None) -> Mesh:
    """The same axes on at most `procs` processes (default 4; 8 where three axes have more than one device).

    Every axis keeps a divisor of its size; axes above one keep at least two if there are processes enough.
    """
    most = procs or (8 if sum(n > 1 for n in mesh.sizes) == 3 else 4)
    sizes = [1] * len(mesh.sizes)
    grew = True
    while grew:
        grew = False
        for axis, full in enumerate(mesh.sizes):
            for step in range(2, full // sizes[axis] + 1):
                if full % (sizes[axis] * step) == 0:
                    if math.prod(sizes) * step <= most:
                        sizes[axis] *= step
                        grew = True
                    break
    return Mesh(mesh.names, tuple(sizes))


def near(value: int, least: int, devices: int) -> int:
    """The smallest number from `least` on that shares with `devices` what `value` does; never above `value`.

    >>> near(11008, 32, 4), near(50257, 96, 4)
    (32, 97)
    """
    want = math.gcd(value, devices)
    return min(value, next(n for n in range(least, least + 2 * devices + 1) if math.gcd(n, devices) == want))


def shrink_config(data: dict[str, Any], mesh: Mesh, seq: int, layers: int = 2) -> None:
    """Scale a configuration (as a dict) down in place, for a mesh, sequences of `seq` tokens, and `layers` layers."""
    devices = mesh.num_devices
    for sub in data.values():
        if isinstance(sub, dict) and any(k in sub for k in HIDDEN):
            shrink_config(sub, mesh, seq, layers)
    depths = {data[k] for k in LAYERS if isinstance(data.get(k), int)}
    for key in LAYERS:
        if isinstance(data.get(key), int) and "depths" not in data:  # there it counts stages
            data[key] = min(layers, data[key])
    for key, value in data.items():
        if isinstance(value, list) and len(value) in depths and len(value) > layers and "token" not in key:
            data[key] = value[:layers]
    heads = _heads(data, devices)
    old_hidden = {k: data[k] for k in HIDDEN if isinstance(data.get(k), int)}
    for key in HEAD_DIM:
        if isinstance(data.get(key), int) and "qk_rope_head_dim" not in data:  # there it follows from others
            data[key] = min(SMALL_HEAD_DIM, data[key])
    for key in old_hidden:
        data[key] = heads * SMALL_HEAD_DIM if heads else near(data[key], 32, devices)
    for key in WIDE:
        if isinstance(data.get(key), int):
            data[key] = near(data[key], 32, devices)
    for key in EXPERTS:
        if isinstance(data.get(key), int):
            data[key] = near(data[key], 4, devices)
            for top in ("num_experts_per_tok", "top_k"):
                if isinstance(data.get(top), int):
                    data[top] = min(data[top], data[key])
    for key in POSITIONS:
        if isinstance(data.get(key), int):
            data[key] = min(data[key], max(64, seq))
    if isinstance(data.get("vocab_size"), int):
        data["vocab_size"] = near(data["vocab_size"], 96, devices)
        for key, value in data.items():
            if key.endswith("_token_id"):
                data[key] = _token(value, data["vocab_size"])
    _shrink_images(data, devices)


def _heads(data: dict[str, Any], devices: int) -> int:
    """Scale the numbers of heads; returns that of the first kind (0 if the model has none)."""
    first = 0
    kv_keys = [k for k in KV_HEADS if isinstance(data.get(k), int)]
    for key in HEADS:
        full = data.get(key)
        if not isinstance(full, int):
            continue
        small = near(full, 2, devices)
        for kv_key in kv_keys:
            groups = full // data[kv_key]
            kv = near(data[kv_key], 1, devices)
            small = kv * min(groups, 2)
            data[kv_key] = kv
        data[key] = small
        first = first or small
    return first


def _token(value: Any, vocab: int) -> Any:
    if isinstance(value, list):
        return [_token(v, vocab) for v in value]
    return value % vocab if isinstance(value, int) else value


def _shrink_images(data: dict[str, Any], devices: int) -> None:
    patch = data.get("patch_size")
    if isinstance(data.get("image_size"), int):
        data["image_size"] = min(data["image_size"], 2 * patch if isinstance(patch, int) else 32)
    if isinstance(data.get("hidden_sizes"), list):
        data["hidden_sizes"] = [near(n, 16 * (i + 1), devices) for i, n in enumerate(data["hidden_sizes"])]
    if isinstance(data.get("depths"), list):
        data["depths"] = [1 for _ in data["depths"]]
    if isinstance(data.get("embedding_size"), int):
        data["embedding_size"] = near(data["embedding_size"], 16, devices)
