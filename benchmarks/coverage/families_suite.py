"""Every further family of Hugging Face transformers that can be made small by the names of sizes.

The ``transformers`` suite has the families that were set up by hand. Here are all others of the
tasks below, each once, for the first task that has it. Left out are composites, whose parts are
families of their own, and those whose settings depend on each other in ways that names don't tell.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.coverage.case import Case
from benchmarks.coverage.transformers_suite import cases as cases_by_hand
from benchmarks.coverage.transformers_suite import keep_all_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

__all__ = ["NOT_SETTINGS", "cases", "small_setting"]

_VOCABULARY, _LENGTH, _SIDE = 128, 12, 32
_END = 2

# What sizes are called, and what they may be at most.
_AT_MOST = {
    **dict.fromkeys(
        (
            *("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "width"),
            *("hidden_dim", "decoder_hidden_size", "lm_head_dim", "d_latents"),
            *("moe_intermediate_size", "shared_expert_intermediate_size", "n_positions"),
            *("max_position_embeddings", "expert_ffn_hidden_size"),
        ),
        64,
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"),
            *("n_inner", "ffn_hidden_size", "vocab_size", "entity_vocab_size"),
            *("vocab_size_per_layer_input", "unpadded_vocab_size"),
        ),
        128,
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "image_size", "projection_dim"), _SIDE),
    **dict.fromkeys(
        (
            *("d_kv", "d_head", "head_dim", "attention_head_size", "qk_nope_head_dim"),
            *("qk_rope_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim"),
            *("state_size", "mamba_d_state", "num_mel_bins", "hidden_size_per_layer_input"),
            "num_latents",
        ),
        16,
    ),
    **dict.fromkeys(("num_labels",), 10),
    **dict.fromkeys(("patch_size", "sliding_window", "rotary_dim"), 8),
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
            *("decoder_attention_heads", "linear_num_value_heads", "linear_num_heads"),
            *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
            "zero_expert_num",
        ),
        4,
    ),
    **dict.fromkeys(
        (
            *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depth"),
            *("decoder_layers", "num_decoder_layers", "num_encoder_layers"),
            *("num_key_value_heads", "linear_num_key_heads", "num_experts_per_tok", "moe_topk"),
            *("num_experts_per_token", "moe_k"),
        ),
        2,
    ),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
}
# One entry a layer: those of the first and the last.
_OF_LAYERS = frozenset(
    (
        *("mlp_layer_types", "num_attention_heads_per_layer", "activation_sparsity_pattern"),
        *("sparse_attention_layers", "intermediate_size"),
    )
)
# What follows from the sizes, or names layers that are no longer there.
NOT_SETTINGS = frozenset(
    (
        *("transformers_version", "model_type", "_name_or_path", "architectures", "id2label"),
        *("label2id", "out_features", "out_indices", "_out_features", "_out_indices"),
        *("stage_names", "layers_block_type", "layer_type_list", "qk_head_dim"),
        "per_layer_config",
    )
)
# What a configuration must name where it doesn't by default.
_NAMED = {"head_dim": 16, "vocab_size": _VOCABULARY, "num_experts_per_tok": 2}
# As many heads as inner channels divided by their width.
_STATES = {"mamba_n_heads": 8, "mamba_d_head": 16}
_ALSO: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8},
    "bamba": _STATES,
    "granitemoehybrid": _STATES,
}
# Families whose sizes depend on each other, or that need other inputs or packages.
_OTHERS = frozenset(
    (
        *("bailing_hybrid", "cohere_compass_text", "dory", "dots1", "gemma3n_text", "lfm2_moe"),
        *("qwen4_exp_text", "reformer", "xlstm", "xmod", "zamba", "zamba2", "layoutlmv2"),
        *("layoutlmv3", "lilt", "mistral4", "dinat", "donut-swin", "efficientnet", "imagegpt"),
        *("levit", "mobilevitv2", "wav2vec2-bert", "lw_detr_vit", "maskformer-swin"),
        *("timm_backbone", "vitpose_backbone"),
    )
)


def small_setting(name: str, value: Any) -> Any:
    """A setting's value in a small model."""
    if isinstance(value, bool):
        return value
    if name.endswith(("token_id", "token_index")) and isinstance(value, int):
        marks = {"pad": 0, "bos": 1, "eos": _END}
        return value if value < _VOCABULARY else marks.get(name.partition("_")[0], 3)
    if name in _AT_MOST and isinstance(value, int):
        return min(value, _AT_MOST[name])
    if value is None:
        return _NAMED.get(name)
    if isinstance(value, list) and name in _OF_LAYERS:
        ends = value[:1] + value[-1:]
        return [min(n, _AT_MOST[name]) for n in ends] if name in _AT_MOST else ends
    if isinstance(value, list) and name == "layer_types":
        kinds = list(dict.fromkeys(value))
        return (kinds + kinds)[:2]
    # For inputs as short as these BigBird turns to plain attention, and changes itself for good.
    return "original_full" if name == "attention_type" and value == "block_sparse" else value


def _config(family: str) -> Any:
    import transformers

    kind = transformers.CONFIG_MAPPING[family]
    given = kind().to_dict()
    settings = {k: small_setting(k, v) for k, v in given.items() if k not in NOT_SETTINGS}
    if given.get("num_key_value_heads", 0) in (None, given.get("num_attention_heads")):
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    config = kind.from_dict({**settings, **_ALSO.get(family, {})})
    keep_all_layers(config)
    for name, value in (("pad_token_id", 0), ("eos_token_id", _END)):
        if getattr(config, name, value) is None:
            setattr(config, name, value)
    return config


def _build(family: str, architecture: str) -> nn.Module:
    import transformers

    config = _config(family)
    kind = getattr(transformers, architecture)
    try:
        model: nn.Module = kind(config)
    except ValueError:  # no other implementation of attention
        config._attn_implementation = "eager"  # noqa: SLF001 - settable nowhere else once made
        model = kind(config)
    return model


def _ids(family: str) -> torch.Tensor:
    config = _config(family)
    # The last ones of a vocabulary may be masks and other marks.
    ids = torch.randint(3, getattr(config, "vocab_size", _VOCABULARY) - 20, (2, _LENGTH))
    end = getattr(config, "eos_token_id", _END)
    ids[:, -1] = end if isinstance(end, int) else _END
    return ids


def _text(family: str, **more: Any) -> dict[str, Any]:
    ids = _ids(family)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_dict": True, **more}


def _pair(family: str) -> dict[str, Any]:
    return _text(family, use_cache=False, decoder_input_ids=_ids(family))


def _sound(_: str) -> dict[str, Any]:
    return {"input_values": torch.randn(2, 4000), "return_dict": True}


def _pixels(family: str) -> dict[str, Any]:
    config = _config(family)
    side = getattr(config, "image_size", 2 * _SIDE)
    side = side[0] if isinstance(side, (list, tuple)) else side
    channels = getattr(config, "num_channels", 3)
    return {"pixel_values": torch.randn(2, channels, side, side), "return_dict": True}


_TASKS: dict[str, Callable[[str], dict[str, Any]]] = {
    "CAUSAL_LM": partial(_text, use_cache=False),
    "MASKED_LM": _text,
    "SEQ_TO_SEQ_CAUSAL_LM": _pair,
    "SEQUENCE_CLASSIFICATION": _text,
    "IMAGE_CLASSIFICATION": _pixels,
    "CTC": _sound,
    "AUDIO_CLASSIFICATION": _sound,
    "SEMANTIC_SEGMENTATION": _pixels,
    "OBJECT_DETECTION": _pixels,
    "BACKBONE": _pixels,
    "MASKED_IMAGE_MODELING": _pixels,
}


def cases() -> Iterator[Case]:
    """One model a family."""
    import transformers
    from transformers.models.auto import modeling_auto

    transformers.logging.set_verbosity_error()
    seen = {case.name for case in cases_by_hand()} | _OTHERS
    for task, inputs in _TASKS.items():
        mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        for family, names in mapping.items():
            architecture = names if isinstance(names, str) else names[0]
            if family in seen or not hasattr(transformers, architecture):
                continue
            if transformers.CONFIG_MAPPING[family].sub_configs:
                continue
            seen.add(family)
            heading = task.replace("_", " ").lower()
            build = partial(_build, family, architecture)
            yield Case(family, build, partial(inputs, family), family=heading)
