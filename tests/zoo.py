"""Tiny models of every family, with a batch each: `model, batch = ZOO["llama"](seed=0, dropout=0.0)`.

Batch 8, sequence 8, 4 heads, hidden 32, feed-forward 64, vocabulary 64: all divisible by 4, so that meshes of 2 and 4
split everything. Parameters are random throughout (biases and norm weights too), some labels are ignored (-100), and
one row is ignored wholly. Models come in training mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from tests.zoo_common import (
    BATCH,
    CLASSES,
    FFN,
    HEADS,
    HIDDEN,
    SEQ,
    VOCAB,
    Batch,
    image_batch,
    labels_for,
    llama_like,
    lm_batch,
    randomise,
    tokens,
)
from tests.zoo_hf import HF_ARCHITECTURES, UNSUPPORTED

__all__ = ["HF_ARCHITECTURES", "UNSUPPORTED", "ZOO"]


def _gpt2(dropout: float) -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            n_layer=2, n_head=HEADS, n_embd=HIDDEN, n_inner=FFN, vocab_size=VOCAB, n_positions=32, resid_pdrop=dropout,
            embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def _llama(dropout: float) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**llama_like(attention_dropout=dropout)))


def _bert(dropout: float) -> nn.Module:
    return hf.BertForMaskedLM(
        hf.BertConfig(
            num_hidden_layers=2, hidden_size=HIDDEN, intermediate_size=FFN, num_attention_heads=HEADS, vocab_size=VOCAB,
            max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )
    )  # fmt: skip


def _t5(dropout: float) -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            num_layers=1, num_decoder_layers=1, d_model=HIDDEN, d_ff=FFN, num_heads=HEADS, d_kv=8, vocab_size=VOCAB,
            dropout_rate=dropout, decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def _vit(dropout: float) -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            num_hidden_layers=1, hidden_size=HIDDEN, intermediate_size=FFN, num_attention_heads=HEADS, image_size=16,
            patch_size=4, num_labels=CLASSES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )
    )  # fmt: skip


def _resnet(dropout: float) -> nn.Module:
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=CLASSES)
    )


def _experts(config: Any, implementation: str) -> Any:
    config._experts_implementation = implementation
    return config


def _qwen3_moe(dropout: float, experts: str) -> nn.Module:
    config = hf.Qwen3MoeConfig(
        **llama_like(
            num_hidden_layers=1, moe_intermediate_size=16, head_dim=8, num_experts=4, num_experts_per_tok=2,
            attention_dropout=dropout, output_router_logits=True,
        )
    )  # fmt: skip
    return hf.Qwen3MoeForCausalLM(_experts(config, experts))


def _mixtral(dropout: float, experts: str) -> nn.Module:
    config = hf.MixtralConfig(
        **llama_like(num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2, attention_dropout=dropout)
    )
    return hf.MixtralForCausalLM(_experts(config, experts))


class Encoder(nn.Module):
    """A plain `nn.TransformerEncoder` with a classifier on every token and its loss."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, FFN, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and logits; x [batch, seq, hidden], labels [batch, seq]."""
        logits = self.head(self.encoder(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class MLP(nn.Module):
    """Two layers with a dropout between them and a mean squared error."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss; x and y [batch, hidden]."""
        return nn.functional.mse_loss(self.down(self.dropout(torch.relu(self.up(x)))), y)


def _encoder_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed + 4)
    labels = torch.randint(0, CLASSES, (BATCH, SEQ), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.25] = -100
    return {"x": torch.randn(BATCH, SEQ, HIDDEN, generator=generator), "labels": labels}


def _bert_batch(seed: int) -> Batch:
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[2:4, 6:] = 0
    return {**lm_batch(seed), "attention_mask": mask}


def _t5_batch(seed: int) -> Batch:
    return {"input_ids": tokens(seed), "labels": labels_for(tokens(seed), seed)}


def _mlp_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed + 5)
    return {"x": torch.randn(BATCH, HIDDEN, generator=generator), "y": torch.randn(BATCH, HIDDEN, generator=generator)}


Builder = Callable[..., tuple[nn.Module, Batch]]


def _entry(model: Callable[..., nn.Module], batch: Callable[[int], Batch], **fixed: Any) -> Builder:
    def build(seed: int = 0, dropout: float = 0.0, **options: Any) -> tuple[nn.Module, Batch]:
        torch.manual_seed(seed)
        return randomise(model(dropout, **{**fixed, **options}), seed), batch(seed)

    return build


#: name -> builder(seed=0, dropout=0.0) -> (model, batch). `experts` ("batched_mm", "grouped_mm") is an option of MoE.
ZOO: dict[str, Builder] = {
    "gpt2": _entry(_gpt2, lm_batch),
    "llama": _entry(_llama, lm_batch),
    "bert": _entry(_bert, _bert_batch),
    "t5": _entry(_t5, _t5_batch),
    "vit": _entry(_vit, lambda seed: image_batch(seed, 16)),
    "resnet": _entry(_resnet, lambda seed: image_batch(seed, 32)),
    "qwen3_moe": _entry(_qwen3_moe, lm_batch, experts="batched_mm"),
    "mixtral": _entry(_mixtral, lm_batch, experts="batched_mm"),
    "encoder": _entry(Encoder, _encoder_batch),
    "mlp_dropout": _entry(MLP, _mlp_batch),
}
