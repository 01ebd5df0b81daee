"""Sizes, random parameters and batches that the models of the zoo share."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

logging.getLogger("transformers").setLevel(logging.ERROR)

Batch = dict[str, torch.Tensor]
BATCH, SEQ, HIDDEN, FFN, VOCAB, HEADS, CLASSES = 8, 8, 32, 64, 64, 4, 8


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter and every floating buffer of statistics gets random values, none of them trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.dim() < 2:  # biases near 0, norm weights near 1
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * (0.5 / max(parameter.shape[-1], 1) ** 0.5))
        for name, buffer in model.named_buffers():
            noise = torch.randn(buffer.shape, generator=generator, dtype=torch.float32)
            if name.endswith("running_mean"):
                buffer.add_(0.1 * noise)
            elif name.endswith("running_var"):
                buffer.mul_(1.0 + 0.3 * noise.tanh())
    return model.train()


def tokens(seed: int, batch: int = BATCH, seq: int = SEQ, vocab: int = VOCAB) -> torch.Tensor:
    """Random token ids, 0 and 1 avoided: models take them for padding."""
    return torch.randint(2, vocab, (batch, seq), generator=torch.Generator().manual_seed(seed + 1))


def labels_for(ids: torch.Tensor, seed: int) -> torch.Tensor:
    """Random labels: a quarter ignored, and row 1 wholly (if there is one)."""
    generator = torch.Generator().manual_seed(seed + 2)
    labels = torch.randint(2, VOCAB, ids.shape, generator=generator)
    labels[torch.rand(ids.shape, generator=generator) < 0.25] = -100
    if len(labels) > 1:
        labels[1] = -100
    return labels


def lm_batch(seed: int) -> Batch:
    """Token ids and labels of a language model."""
    ids = tokens(seed)
    return {"input_ids": ids, "labels": labels_for(ids, seed)}


def image_batch(seed: int, size: int, channels: int = 3) -> Batch:
    """Pixels and a class each."""
    generator = torch.Generator().manual_seed(seed + 3)
    return {
        "pixel_values": torch.randn(BATCH, channels, size, size, generator=generator),
        "labels": torch.randint(0, CLASSES, (BATCH,), generator=generator),
    }


def llama_like(**more: Any) -> dict[str, Any]:
    """Configuration fields shared by Llama's descendants."""
    return {
        "num_hidden_layers": 2, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 0, "eos_token_id": 1, **more,
    }  # fmt: skip
