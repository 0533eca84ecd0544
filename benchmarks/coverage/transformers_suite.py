"""Families of Hugging Face transformers, built small from their configurations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benchmarks.coverage.case import Case

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["cases", "keep_all_layers"]

_VOCABULARY = 128
_LENGTH = 12
_TEXT: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_TEXT, "num_key_value_heads": 2}
_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}
_STAGES: dict[str, Any] = {"num_labels": 10}


def _tokens(**more: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    """Token ids, and whatever else the model wants."""

    def make() -> dict[str, Any]:
        ids = torch.randint(3, _VOCABULARY, (2, _LENGTH))
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "return_dict": True,
            **{name: value() for name, value in more.items()},
        }

    return make


def _no_cache(make: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    return lambda: {**make(), "use_cache": False}


def _pixels(side: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(2, 3, side, side), "return_dict": True}


def _decoder_ids() -> Any:
    return torch.randint(3, _VOCABULARY, (2, _LENGTH))


_BOTH = _no_cache(_tokens(decoder_input_ids=_decoder_ids))
_CAUSAL = "AutoModelForCausalLM"
_CLASSIFY = "AutoModelForSequenceClassification"
_IMAGE = "AutoModelForImageClassification"
_MASKED = "AutoModelForMaskedLM"
_SEQ2SEQ = "AutoModelForSeq2SeqLM"

_GPT = {
    "vocab_size": _VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {**_GQA, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
_BART: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_T5: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_SPEECH: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
    "classifier_proj_size": 32,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
_CLIP = {
    "text_config": {**_TEXT, "projection_dim": 32},
    "vision_config": {**_VISION, "projection_dim": 32},
    "projection_dim": 32,
}


def _sound() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 1600), "return_dict": True}


def _whisper() -> dict[str, Any]:
    return {
        "input_features": torch.randn(2, 16, 64),
        "decoder_input_ids": _decoder_ids(),
        "use_cache": False,
        "return_dict": True,
    }


def _image_and_text() -> dict[str, Any]:
    return {**_tokens()(), **_pixels()()}


# Model type -> (auto class, settings, inputs).
_FAMILIES: dict[str, tuple[str, dict[str, Any], Any]] = {
    # Decoders.
    "llama": (_CAUSAL, _GQA, _no_cache(_tokens())),
    "mistral": (_CAUSAL, _GQA, _no_cache(_tokens())),
    "qwen2": (_CAUSAL, _GQA, _no_cache(_tokens())),
    "qwen3": (_CAUSAL, {**_GQA, "head_dim": 16}, _no_cache(_tokens())),
    "gemma": (_CAUSAL, {**_GQA, "head_dim": 16}, _no_cache(_tokens())),
    "gemma2": (_CAUSAL, {**_GQA, "head_dim": 16}, _no_cache(_tokens())),
    "gemma3_text": (_CAUSAL, {**_GQA, "head_dim": 16}, _no_cache(_tokens())),
    "phi": (_CAUSAL, _GQA, _no_cache(_tokens())),
    "phi3": (_CAUSAL, _GQA, _no_cache(_tokens())),
    "cohere": (_CAUSAL, _GQA, _no_cache(_tokens())),
    "granite": (_CAUSAL, _GQA, _no_cache(_tokens())),
    "olmo2": (_CAUSAL, _GQA, _no_cache(_tokens())),
    "glm": (_CAUSAL, {**_GQA, "head_dim": 16}, _no_cache(_tokens())),
    "starcoder2": (_CAUSAL, _GQA, _no_cache(_tokens())),
    "stablelm": (_CAUSAL, _GQA, _no_cache(_tokens())),
    "smollm3": (_CAUSAL, _GQA, _no_cache(_tokens())),
    "falcon": (_CAUSAL, {**_TEXT, "num_kv_heads": 2}, _no_cache(_tokens())),
    "gpt_neox": (_CAUSAL, _TEXT, _no_cache(_tokens())),
    "gpt_neo": (
        _CAUSAL,
        {**_TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        _no_cache(_tokens()),
    ),
    "gpt2": (_CAUSAL, _GPT, _no_cache(_tokens())),
    "gptj": (_CAUSAL, {**_GPT, "rotary_dim": 8}, _no_cache(_tokens())),
    "gpt_bigcode": (_CAUSAL, _GPT, _no_cache(_tokens())),
    "opt": (
        _CAUSAL,
        {**_TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64},
        _no_cache(_tokens()),
    ),
    "bloom": (_CAUSAL, {**_TEXT, "n_layer": 2, "n_head": 4}, _no_cache(_tokens())),
    "mpt": (
        _CAUSAL,
        {"vocab_size": _VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        _no_cache(_tokens()),
    ),
    "mamba": (
        _CAUSAL,
        {"vocab_size": _VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        _no_cache(_tokens()),
    ),
    "mixtral": (_CAUSAL, {**_GQA, "num_local_experts": 4}, _no_cache(_tokens())),
    "qwen2_moe": (
        _CAUSAL,
        {**_MOE, "shared_expert_intermediate_size": 64},
        _no_cache(_tokens()),
    ),
    "deepseek_v3": (
        _CAUSAL,
        {
            **_TEXT,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
        _no_cache(_tokens()),
    ),
    # Encoders.
    "bert": (_CLASSIFY, _TEXT, _tokens()),
    "roberta": (_CLASSIFY, _TEXT, _tokens()),
    "distilbert": (
        _CLASSIFY,
        {"vocab_size": _VOCABULARY, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
        _tokens(),
    ),
    "electra": (_CLASSIFY, {**_TEXT, "embedding_size": 32}, _tokens()),
    "albert": (_CLASSIFY, {**_TEXT, "embedding_size": 32}, _tokens()),
    "deberta": (
        _CLASSIFY,
        {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        _tokens(),
    ),
    "deberta-v2": (
        _CLASSIFY,
        {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        _tokens(),
    ),
    "mpnet": (_CLASSIFY, _TEXT, _tokens()),
    "modernbert": (_MASKED, _TEXT, _tokens()),
    "xlnet": (
        _CLASSIFY,
        {
            "vocab_size": _VOCABULARY,
            "d_model": 64,
            "n_layer": 2,
            "n_head": 4,
            "d_inner": 128,
            "use_mems_eval": False,  # or every hidden state is an output
        },
        _tokens(),
    ),
    "fnet": (_CLASSIFY, _TEXT, lambda: {"input_ids": _decoder_ids(), "return_dict": True}),
    # Encoder and decoder.
    "bart": (_SEQ2SEQ, _BART, _BOTH),
    "pegasus": (_SEQ2SEQ, _BART, _BOTH),
    "t5": (_SEQ2SEQ, _T5, _BOTH),
    "mt5": (_SEQ2SEQ, _T5, _BOTH),
    # Images.
    "vit": (_IMAGE, _VISION, _pixels()),
    "deit": ("DeiTForImageClassification", _VISION, _pixels()),
    "beit": (_IMAGE, _VISION, _pixels()),
    "dinov2": (_IMAGE, _VISION, _pixels()),
    "swin": (
        _IMAGE,
        {
            **_STAGES,
            "image_size": 64,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        _pixels(64),
    ),
    "swinv2": (
        _IMAGE,
        {
            **_STAGES,
            "image_size": 64,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        _pixels(64),
    ),
    "convnext": (
        _IMAGE,
        {**_STAGES, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
        _pixels(64),
    ),
    "convnextv2": (
        _IMAGE,
        {**_STAGES, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
        _pixels(64),
    ),
    "resnet": (
        _IMAGE,
        {
            **_STAGES,
            "embedding_size": 16,
            "hidden_sizes": [32, 48, 64, 96],
            "depths": [1, 1, 2, 1],
        },
        _pixels(64),
    ),
    "segformer": (
        "AutoModelForSemanticSegmentation",
        {
            **_STAGES,
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "decoder_hidden_size": 32,
            "num_attention_heads": [1, 2, 4, 8],
        },
        _pixels(64),
    ),
    "mobilevit": (
        _IMAGE,
        {
            **_STAGES,
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [16, 16, 24, 32, 40, 48, 96],
            "image_size": 64,
        },
        _pixels(64),
    ),
    "mobilenet_v2": (_IMAGE, {**_STAGES, "image_size": 64}, _pixels(64)),
    "detr": (
        "AutoModelForObjectDetection",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 16,
                "hidden_sizes": [32, 48, 64, 96],
                "depths": [1, 1, 1, 1],
                "out_features": ["stage4"],
            },
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_queries": 10,
            "num_labels": 5,
        },
        _pixels(64),
    ),
    # Several kinds of input.
    "clip": ("AutoModel", _CLIP, _image_and_text),
    "siglip": ("AutoModel", _CLIP, _image_and_text),
    # Sound.
    "wav2vec2": ("AutoModelForCTC", _SPEECH, _sound),
    "hubert": ("AutoModelForCTC", _SPEECH, _sound),
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        {
            **_BART,
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 32,
        },
        _whisper,
    ),
    "audio-spectrogram-transformer": (
        "AutoModelForAudioClassification",
        {**_VISION, "max_length": 64, "num_mel_bins": 32, "patch_size": 16},
        lambda: {"input_values": torch.randn(2, 64, 32), "return_dict": True},
    ),
}


def keep_all_layers(config: Any) -> None:
    """No draws that make two forwards in training mode differ in what they reach."""
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)


def _builder(family: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        kind, settings, _ = _FAMILIES[family]
        config = transformers.AutoConfig.for_model(family, **settings)
        keep_all_layers(config)
        if kind.startswith("Auto"):
            return getattr(transformers, kind).from_config(config)
        return getattr(transformers, kind)(config)

    return build


_HEADINGS = {
    _CAUSAL: "decoders",
    _CLASSIFY: "encoders",
    _MASKED: "encoders",
    _SEQ2SEQ: "encoder-decoders",
    _IMAGE: "images",
}


def cases() -> list[Case]:
    """One model a family."""
    import transformers

    transformers.logging.set_verbosity_error()
    return [
        Case(name, _builder(name), inputs, family=_HEADINGS.get(kind, "others"))
        for name, (kind, _, inputs) in _FAMILIES.items()
    ]
