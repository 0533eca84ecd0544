"""Families of Hugging Face transformers that read images or sound beside text.

Features of an image take the place of tokens that stand for them. Each family is made small by the
names of sizes, as those of the suite of families are, and returns its logits alone: with whatever
else it returns, features among them, hardly anything could change its width.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.coverage.case import Case
from benchmarks.coverage.families_suite import NOT_SETTINGS, small_setting

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

__all__ = ["cases"]

_BATCH, _LENGTH = 2, 16
_WORDS = (3, 90)  # marks for images and sound come behind
_MARKS = {"pad": 0, "bos": 1, "eos": 2}
_ROTARY = {"mrope_section": [2, 3, 3]}  # half of the width of a head in all
_SHORT_ROTARY = {"mrope_section": [1, 1, 2]}
_AT_MOST = {
    "image_size": 32,
    "max_position_embeddings": 256,
    "resampler_head_dim": 16,
    "vocab_size": 160,
    **dict.fromkeys(
        (
            *("projection_dim", "out_hidden_size", "text_hidden_size", "audio_hidden_size"),
            *("cross_attention_hidden_size", "encoder_hidden_size", "model_dim"),
            *("max_source_positions", "max_target_positions", "num_position_embeddings"),
            *("projector_hidden_size", "conv_hidden_size"),
        ),
        64,
    ),
    **dict.fromkeys(("mlp_dim", "projector_intermediate_size", "merger_intermediate_size"), 128),
    **dict.fromkeys(
        (
            *("num_query_tokens", "mm_tokens_per_image", "resampler_n_latents"),
            *("resampler_n_heads", "encoder_num_heads"),
        ),
        4,
    ),
    **dict.fromkeys(("vision_layers", "encoder_num_layers"), 2),
    **dict.fromkeys(("num_global_layers", "resampler_depth"), 1),
}
_ALSO: dict[str, dict[str, Any]] = {
    "florence2": {
        "projection_dim": 64,
        "vision_config": {
            "projection_dim": 64,
            "depths": [1, 1, 1, 1],
            "embed_dim": [32, 32, 64, 64],
            "num_heads": [2, 2, 4, 4],
            "num_groups": [2, 2, 4, 4],
        },
    },
    "mllama": {
        "vision_config": {
            "vision_output_dim": 128,
            "attention_heads": 4,
            "supported_aspect_ratios": [[1, 1], [1, 2]],
            "max_num_tiles": 2,
        }
    },
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "mistral3": {"image_token_index": 101},
    "voxtral": {"audio_token_id": 101},
    "qwen2_audio": {"audio_token_id": 101},
    **{
        name: {"image_grid_pinpoints": [[64, 64]]}
        for name in ("llava_next", "llava_next_video", "llava_onevision")
    },
    **{
        name: {"text_config": {"rope_parameters": _ROTARY}}
        for name in ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "glmga")
    },
    "glm4v_moe": {"text_config": {"rope_parameters": _SHORT_ROTARY}},
}
# Family -> what it takes beside tokens.
_IMAGE, _PATCHES, _FRAMES, _SIZED, _TILES = "image", "patches", "frames", "sized image", "tiles"
_FAMILIES = {
    **dict.fromkeys(
        (
            *("aya_vision", "blip", "cohere2_vision", "deepseek_vl", "gemma3", "git"),
            *("got_ocr2", "internvl", "llava", "ovis2", "paligemma", "pp_chart2table"),
            *("pp_formulanet", "qianfan_ocr", "shieldgemma2", "t5gemma2", "vipllava"),
            *("vision-encoder-decoder", "florence2"),
        ),
        _IMAGE,
    ),
    **dict.fromkeys(
        (
            *("cosmos3_omni", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "lfm3_vl"),
            *("hyperclovax_vision_v2", "minimax_m3_vl", "qwen2_5_vl", "qwen2_vl", "qwen3_5"),
            *("qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"),
        ),
        _PATCHES,
    ),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), _FRAMES),
    **dict.fromkeys(("lighton_ocr", "mistral3"), _SIZED),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), _TILES),
    **{name: name for name in ("idefics", "kosmos-2", "mllama", "pix2struct", "udop")},
    **dict.fromkeys(("qwen2_audio", "voxtral"), "sound"),
}


def _small(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, and those within them, of a small model."""
    small: dict[str, Any] = {}
    for name, value in settings.items():
        if name in NOT_SETTINGS and name != "model_type":
            continue
        if isinstance(value, dict):
            small[name] = _small(value)
            if name == "rope_parameters" and "mrope_section" in value:
                small[name].update(_ROTARY)
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            kept = value <= _WORDS[1]
            # Marks of different names differ.
            mark = 100 + sum(map(ord, name)) % 50
            small[name] = value if kept else _MARKS.get(name.partition("_")[0], mark)
        elif name in ("image_size", "patch_size") and isinstance(value, (list, tuple)):
            small[name] = [min(n, 32 if name == "image_size" else 8) for n in value]
        elif name in _AT_MOST and type(value) is int:
            small[name] = min(value, _AT_MOST[name])
        elif name.endswith("block_indexes") or name in _AT_LAYERS:
            small[name] = [0] if name == "deepstack_visual_indexes" else [1]
        elif name == "head_dim" and value is None:
            continue
        else:
            small[name] = None if value is None else small_setting(name, value)
    if "num_attention_heads" in small and small.get("num_key_value_heads", 0) is None:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


_AT_LAYERS = ("cross_attention_layers", "intermediate_layers_indices", "deepstack_visual_indexes")


def _merged(settings: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in others.items():
        if isinstance(value, dict):
            _merged(settings.setdefault(name, {}), value)
        else:
            settings[name] = value
    return settings


@functools.lru_cache
def _config(family: str) -> Any:
    import transformers

    kind = transformers.CONFIG_MAPPING[family]
    return kind.from_dict(_merged(_small(kind().to_dict()), _ALSO.get(family, {})))


class _Logits(nn.Module):
    """A model that returns nothing else."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs: Any) -> Tensor:
        logits: Tensor = self.net(**inputs, return_dict=True).logits
        return logits


def _build(family: str, architecture: str) -> nn.Module:
    import transformers

    return _Logits(getattr(transformers, architecture)(_config(family)))


def _vision(family: str, name: str, otherwise: int) -> int:
    found = getattr(getattr(_config(family), "vision_config", None), name, otherwise)
    return int(found[0] if isinstance(found, (list, tuple)) else found)


def _seen(family: str) -> dict[str, Any]:
    """What a batch of two shows the model."""
    side = _vision(family, "image_size", 32)
    side = 64 if family == "florence2" else side
    image = torch.randn(_BATCH, 3, side, side)
    kind = _FAMILIES[family]
    if kind == _PATCHES:
        rows = 2 * _vision(family, "spatial_merge_size", 2)
        frames = _vision(family, "temporal_patch_size", 2)
        size = 3 * frames * _vision(family, "patch_size", 8) ** 2
        patches = torch.randn(_BATCH * rows * rows, size)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, rows, rows]] * _BATCH)}
    if kind == _FRAMES:
        return {"pixel_values": image[:, None]}
    if kind == _SIZED:
        return {"pixel_values": image, "image_sizes": torch.tensor([[side, side]] * _BATCH)}
    if kind == _TILES:
        tiles = torch.randn(_BATCH, 5, 3, side, side)
        return {"pixel_values": tiles, "image_sizes": torch.tensor([[2 * side] * 2] * _BATCH)}
    return {"pixel_values": image}


def _inputs(family: str, architecture: str) -> dict[str, Any]:
    config = _config(family)
    ids = torch.randint(*_WORDS, (_BATCH, _LENGTH))
    if _FAMILIES[family] in _OTHERS:
        inputs = _OTHERS[_FAMILIES[family]](config, ids)
    else:
        inputs = _seen(family)
        mark = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        count = _places(family, architecture)
        if count and mark is not None:
            ids = torch.cat([ids[:, :4], torch.full((_BATCH, count), mark), ids[:, 4:]], 1)
        inputs["input_ids"] = ids
        if family in _TYPED:
            inputs["mm_token_type_ids"] = (ids == mark).int()
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :6]
    if family not in _NO_CACHE:
        inputs["use_cache"] = False
    return inputs


@functools.lru_cache
def _places(family: str, architecture: str) -> int:
    """Tokens that the features of one image take the place of; 0 where they stand beside them."""
    net: Any = _build(family, architecture).eval()
    net = net.net
    features = getattr(net, "get_image_features", None)
    features = features or getattr(getattr(net, "model", None), "get_image_features", None)
    if features is None:
        return 0
    with torch.random.fork_rng(), torch.no_grad():
        found = features(**_seen(family))
    found = getattr(found, "pooler_output", found)
    tensors = found if isinstance(found, (list, tuple)) else [found]
    return sum(t.numel() // t.shape[-1] for t in tensors) // _BATCH


def _cross_attended(_: Any, ids: Tensor) -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(_BATCH, 1, 2, 3, 32, 32),
        "aspect_ratio_ids": torch.ones(_BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(_BATCH, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(*ids.shape, 1, 2, dtype=torch.long),
        "input_ids": ids,
    }


def _interleaved(_: Any, ids: Tensor) -> dict[str, Any]:
    mask = torch.ones(*ids.shape, 1)
    image = torch.randn(_BATCH, 1, 3, 32, 32)
    return {"pixel_values": image, "image_attention_mask": mask, "input_ids": ids}


def _marked_by_mask(config: Any, ids: Tensor) -> dict[str, Any]:
    count = config.latent_query_num
    places = torch.full((_BATCH, count), 7)
    mask = torch.zeros(_BATCH, count + _LENGTH, dtype=torch.long)
    mask[:, 2 : 2 + count] = 1
    return {
        "pixel_values": torch.randn(_BATCH, 3, 32, 32),
        "input_ids": torch.cat([ids[:, :2], places, ids[:, 2:]], 1),
        "image_embeds_position_mask": mask,
    }


def _flat_patches(config: Any, ids: Tensor) -> dict[str, Any]:
    size = config.vision_config.patch_embed_hidden_size
    return {"flattened_patches": torch.rand(_BATCH, 8, size + 2), "decoder_input_ids": ids}


def _page(config: Any, ids: Tensor) -> dict[str, Any]:
    image = torch.randn(_BATCH, 3, config.image_size, config.image_size)
    return {"pixel_values": image, "bbox": torch.rand(*ids.shape, 4), "input_ids": ids}


def _heard(config: Any, ids: Tensor) -> dict[str, Any]:
    places = torch.full((_BATCH, 32), config.audio_token_id)
    sound = torch.randn(_BATCH, config.audio_config.num_mel_bins, 128)
    inputs = {"input_features": sound, "input_ids": torch.cat([ids[:, :4], places, ids[:, 4:]], 1)}
    if config.model_type == "qwen2_audio":
        inputs["feature_attention_mask"] = torch.ones(_BATCH, 128, dtype=torch.long)
    return inputs


_OTHERS = {
    "idefics": _interleaved,
    "kosmos-2": _marked_by_mask,
    "mllama": _cross_attended,
    "pix2struct": _flat_patches,
    "sound": _heard,
    "udop": _page,
}
# Those that are told which tokens stand for images, and those that take no ``use_cache``.
_TYPED = frozenset(
    (
        *("cosmos3_omni", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "qwen2_5_vl"),
        *("qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"),
    )
)
_NO_CACHE = frozenset(("blip",))


def cases() -> Iterator[Case]:
    """One model a family."""
    import transformers
    from transformers.models.auto import modeling_auto

    transformers.logging.set_verbosity_error()
    architectures = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    for family, kind in _FAMILIES.items():
        names = architectures[family]
        architecture = names if isinstance(names, str) else names[0]
        made = partial(_build, family, architecture), partial(_inputs, family, architecture)
        yield Case(family, *made, family="sound" if kind == "sound" else "images")
