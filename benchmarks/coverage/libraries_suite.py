"""Networks of libraries that people build on, by library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benchmarks.coverage import graph_networks, super_resolution
from benchmarks.coverage.case import Case, images
from benchmarks.coverage.library_case import library_case

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["cases"]


def cases() -> Iterator[Case]:
    """Small ones with random weights, or the published sizes where a library has no others."""
    for family in (
        _segmentation,
        _ultralytics,
        _diffusers,
        _monai,
        _vit,
        _x_transformers,
        _whisper,
        _open_clip,
        _pytorchcv,
        super_resolution.cases,
        graph_networks.cases,
    ):
        yield from family()


# ---- segmentation_models_pytorch ----------------------------------------------------------------


def _segmentation() -> Iterator[Case]:
    package, none = "segmentation_models_pytorch", {"encoder_weights": None, "classes": 5}
    for kind in (
        *("Unet", "UnetPlusPlus", "FPN", "DeepLabV3", "DeepLabV3Plus", "Linknet", "MAnet"),
        *("PAN", "PSPNet", "UPerNet", "Segformer"),
    ):
        side = 128 if kind == "PAN" else 64
        yield library_case(package, kind, images(2, 3, side, side), "resnet18", **none)
    for encoder in ("mobilenet_v2", "efficientnet-b0", "mit_b0", "densenet121", "vgg11_bn"):
        yield library_case(
            package, "Unet", images(2, 3, 64, 64), encoder, name=f"Unet {encoder}", **none
        )
    yield library_case(
        package,
        "Unet",
        images(2, 3, 64, 64),
        "resnet18",
        name="Unet attention, classes",
        decoder_attention_type="scse",
        aux_params={"classes": 3},
        **none,
    )


# ---- ultralytics --------------------------------------------------------------------------------


def _ultralytics() -> Iterator[Case]:
    kinds = {
        "-seg": "SegmentationModel",
        "-pose": "PoseModel",
        "-cls": "ClassificationModel",
        "-obb": "OBBModel",
        "-rtdetr": "RTDETRDetectionModel",
    }
    for name in (
        *("yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov9t", "yolov10n", "yolo11n"),
        *("yolo12n", "yolo26n", "yolov8n-ghost", "yolov8n-seg", "yolo11n-pose", "yolo11n-obb"),
        *("yolo11n-cls", "yolov8-rtdetr"),
    ):
        kind = next((kind for end, kind in kinds.items() if name.endswith(end)), "DetectionModel")
        yield library_case(
            "ultralytics.nn.tasks",
            kind,
            lambda: torch.rand(2, 3, 64, 64),
            f"{name}.yaml",
            name=name,
            verbose=False,
        )


# ---- diffusers ----------------------------------------------------------------------------------


def _noisy(
    *shape: int, name: str = "sample", **more: tuple[int, ...]
) -> Callable[[], dict[str, Any]]:
    return lambda: {
        name: torch.randn(2, *shape),
        "timestep": torch.tensor([3, 7]),
        **{key: torch.randn(2, *size) for key, size in more.items()},
    }


def _with_text(*shape: int) -> Callable[[], dict[str, Any]]:
    """Latents, and a text both as tokens and pooled."""
    text = {"encoder_hidden_states": (5, 32), "pooled_projections": (32,)}
    return _noisy(*shape, name="hidden_states", **text)


def _diffusers() -> Iterator[Case]:
    blocks: dict[str, Any] = {"block_out_channels": (32, 64), "norm_num_groups": 8}
    crossed: dict[str, Any] = {
        **blocks,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    }
    transformer = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2}
    of_text = {"patch_size": 1, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    yield library_case(
        "diffusers",
        "UNet2DModel",
        _noisy(3, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **blocks,
    )
    yield library_case(
        "diffusers",
        "UNet2DConditionModel",
        _noisy(4, 16, 16, encoder_hidden_states=(5, 24)),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **crossed,
    )
    yield library_case(
        "diffusers",
        "ControlNetModel",
        _noisy(4, 16, 16, encoder_hidden_states=(5, 24), controlnet_cond=(3, 128, 128)),
        **crossed,
    )
    for kind, more in (("AutoencoderKL", {}), ("VQModel", {"num_vq_embeddings": 16})):
        yield library_case(
            "diffusers",
            kind,
            images(2, 3, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **blocks,
            **more,
        )
    yield library_case(
        "diffusers",
        "DiTTransformer2DModel",
        lambda: {**_noisy(4, 8, 8, name="hidden_states")(), "class_labels": torch.tensor([1, 2])},
        in_channels=4,
        sample_size=8,
        norm_num_groups=8,
        num_embeds_ada_norm=10,
        **transformer,
    )
    yield library_case(
        "diffusers",
        "SD3Transformer2DModel",
        _with_text(4, 8, 8),
        sample_size=8,
        in_channels=4,
        out_channels=4,
        caption_projection_dim=32,
        **of_text,
        **transformer,
    )
    yield library_case(
        "diffusers",
        "FluxTransformer2DModel",
        lambda: {
            **_with_text(16, 4)(),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
        },
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=(4, 4, 8),
        **of_text,
    )


# ---- MONAI --------------------------------------------------------------------------------------


def _monai() -> Iterator[Case]:
    nets, flat, deep = "monai.networks.nets", images(2, 1, 32, 32), images(2, 1, 16, 16, 16)
    two: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    three = {**two, "spatial_dims": 3}
    steps: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2)}
    yield library_case(nets, "UNet", flat, **two, **steps, num_res_units=2)
    yield library_case(nets, "UNet", deep, **three, **steps, norm="batch", name="UNet 3D")
    yield library_case(nets, "AttentionUnet", flat, **two, **steps)
    for kind in ("BasicUNet", "BasicUNetPlusPlus"):
        yield library_case(nets, kind, flat, spatial_dims=2)
    for kind in ("SegResNet", "SegResNetDS"):
        yield library_case(nets, kind, flat, spatial_dims=2, init_filters=16)
    yield library_case(
        nets,
        "DynUNet",
        flat,
        **two,
        kernel_size=[3, 3, 3],
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
    )
    yield library_case(nets, "VNet", images(2, 1, 16, 16, 16), **three)
    yield library_case(nets, "HighResNet", deep, **three)
    yield library_case(nets, "DenseNet121", images(2, 1, 64, 64), **two)
    yield library_case(nets, "SEResNet50", images(2, 3, 64, 64), spatial_dims=2, in_channels=3)
    yield library_case(
        nets,
        "UNETR",
        flat,
        **two,
        img_size=(32, 32),
        hidden_size=48,
        mlp_dim=64,
        num_heads=4,
        feature_size=8,
    )
    yield library_case(nets, "SwinUNETR", images(2, 1, 64, 64), **two, feature_size=12)
    yield library_case(nets, "MedNeXt", flat, **two, init_filters=8)


# ---- vit-pytorch --------------------------------------------------------------------------------


def _vit() -> Iterator[Case]:
    picture = images(2, 3, 64, 64)
    plain: dict[str, Any] = {"num_classes": 10, "dim": 48, "depth": 2, "heads": 4}
    usual = {**plain, "image_size": 64, "patch_size": 16, "mlp_dim": 96}
    for module, kind, more in (
        ("vit", "ViT", {}),
        ("deepvit", "DeepViT", {}),
        ("cait", "CaiT", {"cls_depth": 1}),
        ("pit", "PiT", {"depth": (1, 1)}),
        ("xcit", "XCiT", {"cls_depth": 1}),
        ("parallel_vit", "ViT", {}),
        ("vit_for_small_dataset", "ViT", {}),
    ):
        name = f"{module} {kind}"
        yield library_case(f"vit_pytorch.{module}", kind, picture, name=name, **{**usual, **more})
    yield library_case(
        "vit_pytorch.levit",
        "LeViT",
        picture,
        image_size=64,
        num_classes=10,
        dim=(32, 48),
        depth=2,
        heads=(2, 4),
        mlp_mult=2,
        stages=2,
    )
    yield library_case(
        "vit_pytorch.nest",
        "NesT",
        picture,
        image_size=64,
        patch_size=4,
        dim=16,
        heads=2,
        num_hierarchies=3,
        block_repeats=(1, 1, 1),
        num_classes=10,
    )
    yield library_case(
        "vit_pytorch.mobile_vit",
        "MobileViT",
        picture,
        image_size=(64, 64),
        dims=[32, 40, 48],
        channels=[16, 16, 24, 24, 32, 32, 32, 32, 48, 48, 64],
        num_classes=10,
    )
    yield library_case(
        "vit_pytorch.max_vit",
        "MaxViT",
        images(2, 3, 224, 224),
        num_classes=10,
        dim_conv_stem=16,
        dim=16,
        dim_head=8,
        depth=(1, 1),
        window_size=7,
    )
    yield library_case(
        "vit_pytorch.scalable_vit",
        "ScalableViT",
        picture,
        num_classes=10,
        dim=16,
        heads=(1, 2, 4, 4),
        depth=(1, 1, 1, 1),
        ssa_dim_key=8,
        reduction_factor=(8, 4, 2, 1),
        window_size=(8, 4, None, None),
    )


# ---- x-transformers -----------------------------------------------------------------------------


def _x_transformers() -> Iterator[Case]:
    for name, options in {
        "Decoder": {},
        "rotary": {"rotary_pos_emb": True},
        "SwiGLU": {"ff_glu": True, "ff_swish": True, "ff_no_bias": True},
        "RMSNorm": {"use_rmsnorm": True},
        "grouped queries": {"attn_kv_heads": 2},
        "one key": {"attn_one_kv_head": True},
        "T5 positions": {"rel_pos_bias": True},
        "normalised keys": {"attn_qk_norm": True},
        "talking heads": {"attn_pre_talking_heads": True},
        "macaron": {"macaron": True},
        "gated values": {"attn_gate_values": True},
        "memories": {"attn_num_mem_kv": 3},
        "flash": {"attn_flash": True},
        "shifted tokens": {"shift_tokens": 1},
    }.items():
        yield Case(
            f"x_transformers:{name}",
            lambda options=options: _text_model(**options),
            lambda: torch.randint(0, 50, (2, 16)),
            family="x_transformers",
        )


def _text_model(**options: Any) -> torch.nn.Module:
    import x_transformers as library

    layers = library.Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, **options)
    model: torch.nn.Module = library.TransformerWrapper(
        num_tokens=50, max_seq_len=32, attn_layers=layers
    )
    return model


# ---- openai-whisper -----------------------------------------------------------------------------


def _whisper() -> Iterator[Case]:
    def build() -> torch.nn.Module:
        from whisper.model import ModelDimensions, Whisper

        sizes = {"n_mels": 8, "n_vocab": 60, "n_audio_ctx": 20, "n_text_ctx": 16}
        for part in ("audio", "text"):
            sizes |= {f"n_{part}_state": 32, f"n_{part}_head": 4, f"n_{part}_layer": 2}
        model = Whisper(ModelDimensions(**sizes))
        torch.nn.init.normal_(model.decoder.positional_embedding)  # is left as memory was
        return model

    yield Case(
        "whisper:Whisper",
        build,
        lambda: (torch.randn(2, 8, 40), torch.randint(0, 60, (2, 8))),
        family="whisper",
    )


# ---- open_clip ----------------------------------------------------------------------------------


def _open_clip() -> Iterator[Case]:
    width: dict[str, Any] = {"width": 64, "head_width": 16}
    transformer = {**width, "layers": 2, "patch_size": 8, "image_size": 32}
    pooled = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 4}
    for name, vision in {
        "ViT": transformer,
        "ViT attention pool": {**transformer, **pooled},
        "ResNet": {"width": 16, "head_width": 16, "layers": [1, 1, 1, 1], "image_size": 64},
    }.items():
        side = vision["image_size"]
        yield Case(
            f"open_clip:{name}",
            lambda vision=vision: _clip(vision),
            lambda side=side: (torch.randn(2, 3, side, side), torch.randint(1, 60, (2, 12))),
            family="open_clip",
        )


def _clip(vision: dict[str, Any]) -> torch.nn.Module:
    import open_clip

    text = open_clip.CLIPTextCfg(context_length=12, vocab_size=64, width=64, heads=4, layers=2)
    model: torch.nn.Module = open_clip.CLIP(32, open_clip.CLIPVisionCfg(**vision), text)
    return model


# ---- pytorchcv ----------------------------------------------------------------------------------

_SMALL = (
    *("resnet20", "preresnet20", "seresnet20", "densenet40_k12", "wrn16_10", "ror3_56", "rir"),
    *(
        "diaresnet20",
        "nin",
        "shakeshakeresnet20_2x16d",
        "pyramidnet110_a48",
        "xdensenet40_2_k24_bc",
    ),
)
_LARGE = (
    *("sparsenet121", "peleenet", "dpn68", "darknet53", "bagnet9", "dla34", "msdnet22"),
    *("fishnet99", "hrnet_w18_small_v1", "vovnet27s", "selecsls42", "hardnet39ds", "darts"),
    *("shufflenetv2_wd2", "igcv3_w1", "proxylessnas_cpu", "fbnet_cb", "drnc26", "regnety002"),
    *("mixnet_s", "ghostnet", "sknet50", "ibn_resnet50", "bninception", "cbam_resnet18"),
    *("squeezenet_v1_0", "octresnet10_ad2", "scnet50", "resnesta18", "airnet50_1x64d_r2"),
    *("bam_resnet18", "spnasnet", "irevnet301", "espnetv2_wd2"),
)


def _pytorchcv() -> Iterator[Case]:
    from functools import partial

    for name in (*(f"{name}_cifar10" for name in _SMALL), *_LARGE):
        side = 32 if name.endswith("cifar10") else 224
        yield Case(
            f"pytorchcv:{name}", partial(_ptcv, name), images(2, 3, side, side), family="pytorchcv"
        )


def _ptcv(name: str) -> torch.nn.Module:
    from pytorchcv.model_provider import get_model

    model: torch.nn.Module = get_model(name)
    return model
