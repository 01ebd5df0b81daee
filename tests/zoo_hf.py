"""Hugging Face architectures, each in a tiny configuration: `model, batch = HF_ARCHITECTURES["mistral"](seed=0)`.

Those that cannot be captured are in `UNSUPPORTED`, with the reason; a test holds each to it.
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
    VOCAB,
    Batch,
    image_batch,
    labels_for,
    llama_like,
    lm_batch,
    randomise,
    tokens,
)

Builder = Callable[..., tuple[nn.Module, Batch]]


def _entry(model: str, config: str, batch: Callable[[int], Batch], fields: dict[str, Any]) -> Builder:
    def build(seed: int = 0) -> tuple[nn.Module, Batch]:
        torch.manual_seed(seed)
        made = getattr(hf, config)(**fields)
        if hasattr(made, "num_experts") or hasattr(made, "num_local_experts"):
            made._experts_implementation = "batched_mm"
        return randomise(getattr(hf, model)(made), seed), batch(seed)

    return build


def _causal(name: str, model: str = "ForCausalLM", **fields: Any) -> Builder:
    return _entry(f"{name}{model}", f"{name}Config", lm_batch, llama_like(**fields))


def _old_causal(name: str, model: str, **fields: Any) -> Builder:
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return _entry(model, f"{name}Config", lm_batch, {"vocab_size": VOCAB, **ends, **fields})


def _encoder(name: str, model: str = "ForMaskedLM", **fields: Any) -> Builder:
    common = {
        "num_hidden_layers": 2, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS,
        "vocab_size": VOCAB, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
    }  # fmt: skip
    return _entry(f"{name}{model}", f"{name}Config", lm_batch, {**common, **fields})


def _no_empty_row(seed: int) -> Batch:
    """For models that look for the last real label of every row."""
    batch = lm_batch(seed)
    batch["labels"][:, 0] = 5
    return batch


def _bart_like(
    name: str, model: str = "ForConditionalGeneration", batch: Callable[[int], Batch] = lm_batch, **fields: Any
) -> Builder:
    common = {
        "vocab_size": VOCAB, "d_model": HIDDEN, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": FFN,
        "decoder_ffn_dim": FFN, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "dropout": 0.0,
        "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
        "decoder_start_token_id": 0, "forced_eos_token_id": None,
    }  # fmt: skip
    return _entry(f"{name}{model}", f"{name}Config", batch, {**common, **fields})


def _vision(name: str, size: int = 16, model: str = "ForImageClassification", **fields: Any) -> Builder:
    return _entry(f"{name}{model}", f"{name}Config", lambda s: image_batch(s, size), {"num_labels": CLASSES, **fields})


def _patches(name: str, **fields: Any) -> Builder:
    common = {
        "num_hidden_layers": 1, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS,
        "image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return _vision(name, **{**common, **fields})


def _pairs_batch(seed: int) -> Batch:
    return {"input_ids": tokens(seed), "pixel_values": image_batch(seed, 16)["pixel_values"]}


def _clip_like(name: str, **fields: Any) -> Builder:
    tower = {"num_hidden_layers": 1, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS}
    text = {**tower, "vocab_size": VOCAB, "max_position_embeddings": 32, "eos_token_id": 1, "bos_token_id": 0,
            "pad_token_id": 0, "projection_size": HIDDEN}  # fmt: skip
    vision = {**tower, "image_size": 16, "patch_size": 4}
    common = {"text_config": text, "vision_config": vision, "projection_dim": HIDDEN, **fields}
    build = _entry(f"{name}Model", f"{name}Config", _pairs_batch, common)

    def with_loss(seed: int = 0) -> tuple[nn.Module, Batch]:
        model, batch = build(seed)
        return model, {**batch, "return_loss": True}  # type: ignore[dict-item]

    return with_loss


def _whisper_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed + 6)
    ids = tokens(seed)
    return {"input_features": torch.randn(BATCH, 8, 16, generator=generator), "labels": labels_for(ids, seed)}


def _wave_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed + 7)
    wave = torch.randn(BATCH, 256, generator=generator)
    return {"input_values": wave, "labels": torch.randint(0, CLASSES, (BATCH,), generator=generator)}


def _wave(name: str, **fields: Any) -> Builder:
    common = {
        "num_hidden_layers": 1, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS,
        "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
        "final_dropout": 0.0, "num_labels": CLASSES, "classifier_proj_size": 16, "vocab_size": VOCAB,
    }  # fmt: skip
    return _entry(f"{name}ForSequenceClassification", f"{name}Config", _wave_batch, {**common, **fields})


def _spectrogram_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed + 8)
    return {
        "input_values": torch.randn(BATCH, 16, 16, generator=generator),
        "labels": torch.randint(0, CLASSES, (BATCH,), generator=generator),
    }


#: name -> builder(seed=0) -> (model, batch)
HF_ARCHITECTURES: dict[str, Builder] = {
    # decoders
    "mistral": _causal("Mistral"),
    "qwen2": _causal("Qwen2"),
    "qwen3": _causal("Qwen3", head_dim=8),
    "gemma": _causal("Gemma", head_dim=8),
    "gemma2": _causal("Gemma2", head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3_text": _entry(
        "Gemma3ForCausalLM", "Gemma3TextConfig", lm_batch,
        llama_like(head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    ),
    "phi": _causal("Phi", resid_pdrop=0.0, embd_pdrop=0.0),
    "phi3": _causal("Phi3", resid_pdrop=0.0, embd_pdrop=0.0),
    "olmo": _causal("Olmo"),
    "olmo2": _causal("Olmo2"),
    "stablelm": _causal("StableLm"),
    "starcoder2": _causal("Starcoder2", residual_dropout=0.0, embedding_dropout=0.0),
    "cohere": _causal("Cohere"),
    "granite": _causal("Granite"),
    "glm": _causal("Glm", head_dim=8, attention_bias=True),
    "nemotron": _causal("Nemotron", hidden_act="relu2"),
    "smollm3": _causal("SmolLM3"),
    "falcon": _old_causal(
        "Falcon", "FalconForCausalLM", hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
        hidden_dropout=0.0, attention_dropout=0.0,
    ),
    "gpt_neox": _old_causal(
        "GPTNeoX", "GPTNeoXForCausalLM", hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=FFN, max_position_embeddings=32, hidden_dropout=0.0, attention_dropout=0.0,
    ),
    "gptj": _old_causal(
        "GPTJ", "GPTJForCausalLM", n_embd=HIDDEN, n_layer=2, n_head=HEADS, n_inner=FFN, rotary_dim=4, n_positions=32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "gpt_neo": _old_causal(
        "GPTNeo", "GPTNeoForCausalLM", hidden_size=HIDDEN, num_layers=2, attention_types=[[["global", "local"], 1]],
        num_heads=HEADS, intermediate_size=FFN, window_size=4, max_position_embeddings=32, resid_dropout=0.0,
        embed_dropout=0.0, attention_dropout=0.0,
    ),
    "gpt_bigcode": _old_causal(
        "GPTBigCode", "GPTBigCodeForCausalLM", n_embd=HIDDEN, n_layer=2, n_head=HEADS, n_inner=FFN, n_positions=32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "bloom": _old_causal(
        "Bloom", "BloomForCausalLM", hidden_size=HIDDEN, n_layer=2, n_head=HEADS, hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    "opt": _old_causal(
        "OPT", "OPTForCausalLM", hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS, ffn_dim=FFN,
        max_position_embeddings=32, word_embed_proj_dim=HIDDEN, dropout=0.0, pad_token_id=0,
    ),
    "mpt": _old_causal("Mpt", "MptForCausalLM", d_model=HIDDEN, n_heads=HEADS, n_layers=2, max_seq_len=32),
    # experts
    "qwen2_moe": _causal(
        "Qwen2Moe", num_hidden_layers=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2,
    ),
    "olmoe": _causal("Olmoe", num_hidden_layers=1, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _causal(
        "DeepseekV3", first_k_dense_replace=1, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        num_key_value_heads=4, n_shared_experts=1,
    ),
    "gpt_oss": _causal("GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "jamba": _causal(
        "Jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4,
        use_mamba_kernels=False, mamba_d_state=4,
    ),
    # state space
    "mamba": _old_causal(
        "Mamba", "MambaForCausalLM", hidden_size=HIDDEN, num_hidden_layers=1, state_size=4, pad_token_id=0,
    ),
    "mamba2": _old_causal(
        "Mamba2", "Mamba2ForCausalLM", hidden_size=HIDDEN, num_hidden_layers=1, state_size=4, num_heads=8, head_dim=8,
        n_groups=2, chunk_size=4, pad_token_id=0,
    ),
    "recurrent_gemma": _causal("RecurrentGemma", num_hidden_layers=3, lru_width=HIDDEN, attention_window_size=8),
    # encoders
    "roberta": _encoder("Roberta"),
    "xlm_roberta": _encoder("XLMRoberta"),
    "electra": _encoder("Electra", embedding_size=HIDDEN),
    "albert": _encoder("Albert", embedding_size=16),
    "mpnet": _encoder("MPNet"),
    "deberta_v2": _encoder("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4),
    "distilbert": _entry(
        "DistilBertForMaskedLM", "DistilBertConfig", lm_batch,
        {"vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": FFN, "n_layers": 2, "n_heads": HEADS, "dropout": 0.0,
         "attention_dropout": 0.0, "max_position_embeddings": 32},
    ),
    "modernbert": _encoder("ModernBert", global_attn_every_n_layers=2, local_attention=4),
    "fnet": _encoder("FNet"),
    "yoso": _encoder("Yoso"),
    "xlnet": _entry(
        "XLNetLMHeadModel", "XLNetConfig", lm_batch,
        {"vocab_size": VOCAB, "d_model": HIDDEN, "n_layer": 1, "n_head": HEADS, "d_inner": FFN, "dropout": 0.0},
    ),
    # encoder-decoders
    "mt5": _entry(
        "MT5ForConditionalGeneration", "MT5Config", lm_batch,
        {"num_layers": 1, "num_decoder_layers": 1, "d_model": HIDDEN, "d_ff": FFN, "num_heads": HEADS, "d_kv": 8,
         "vocab_size": VOCAB, "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0},
    ),
    "bart": _bart_like("Bart"),
    "mbart": _bart_like("MBart", batch=_no_empty_row),
    "pegasus": _bart_like("Pegasus"),
    "marian": _bart_like("Marian", model="MTModel"),
    # audio
    "whisper": _entry(
        "WhisperForConditionalGeneration", "WhisperConfig", _whisper_batch,
        {"vocab_size": VOCAB, "num_mel_bins": 8, "d_model": HIDDEN, "encoder_layers": 1, "decoder_layers": 1,
         "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": FFN,
         "decoder_ffn_dim": FFN, "max_source_positions": 8, "max_target_positions": 16, "pad_token_id": 0,
         "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout": 0.0},
    ),
    "wav2vec2": _wave("Wav2Vec2"),
    "hubert": _wave("Hubert"),
    "ast": _entry(
        "ASTForAudioClassification", "ASTConfig", _spectrogram_batch,
        {"num_hidden_layers": 1, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS,
         "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 16,
         "num_labels": CLASSES},
    ),
    # vision
    "deit": _patches("DeiT"),
    "beit": _patches("Beit", drop_path_rate=0.0),
    "dinov2": _patches("Dinov2", mlp_ratio=2),
    "swin": _vision("Swin", image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 4], window_size=4,
                    drop_path_rate=0.0),
    "convnext": _vision("ConvNext", size=32, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, drop_path_rate=0.0),
    "convnext_v2": _vision("ConvNextV2", size=32, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2,
                           drop_path_rate=0.0),
    "regnet": _vision("RegNet", size=32, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4),
    "mobilenet_v2": _vision("MobileNetV2", size=32, depth_multiplier=0.25, depth_divisible_by=4),
    "segformer": _vision("Segformer", size=32, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
                         hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
                         mlp_ratios=[2, 2], drop_path_rate=0.0, hidden_dropout_prob=0.0,
                         attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0),
    "poolformer": _vision("PoolFormer", size=32, num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 16],
                          patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1], drop_path_rate=0.0),
    "vit_mae": _entry(
        "ViTMAEForPreTraining", "ViTMAEConfig", lambda s: {"pixel_values": image_batch(s, 16)["pixel_values"]},
        {"num_hidden_layers": 1, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS,
         "image_size": 16, "patch_size": 4, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
         "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0},
    ),
    # text and vision
    "clip": _clip_like("CLIP"),
    "siglip": _clip_like("Siglip"),
}  # fmt: skip

#: name -> the reason that the error gives for what cannot be captured.
UNSUPPORTED: dict[str, str] = {
    "longformer": "reads it as a Python number",
    "ibert": "branches on the value of a tensor",
    "bart with layerdrop": "branches on the value of a tensor",
    "wav2vec2 with time masks": "the shape of a result depends on the values",
}

#: Their builders.
REFUSED: dict[str, Builder] = {
    "longformer": _encoder("Longformer", attention_window=[4, 4]),
    "ibert": _encoder("IBert"),
    "bart with layerdrop": _bart_like("Bart", encoder_layerdrop=0.5),
    "wav2vec2 with time masks": _wave("Wav2Vec2", mask_time_prob=0.5, mask_time_length=2),
}
