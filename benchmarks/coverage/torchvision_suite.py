"""Every model of torchvision but the quantised ones, at small image sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torchvision

from benchmarks.coverage.case import Case, images

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["cases"]

_CLASSES = 10
# Smallest side each classifier takes without losing a stage; 64 is enough for most.
_SIDES = {
    "inception_v3": 299,  # its auxiliary classifier pools 17 positions
    "maxvit_t": 224,
    "vit_b_32": 64,
    "vit_l_32": 64,
    "vit_h_14": 56,
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False, "aux_logits": True},
    "inception_v3": {"init_weights": False, "aux_logits": True},
    **{f"vit_{v}": {"image_size": _SIDES.get(f"vit_{v}", 64)} for v in ("b_16", "b_32", "l_16")},
    "vit_l_32": {"image_size": 64},
    "vit_h_14": {"image_size": 56},
}
_HUGE = {"vit_h_14", "regnet_y_128gf"}
_EXTRA = ("regnet_y_128gf",)


def _builder(make: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: make(**options)


def _classifiers() -> list[Case]:
    names = torchvision.models.list_models(module=torchvision.models)
    found = []
    for name in dict.fromkeys((*names, *_EXTRA)):
        options = {"weights": None, "num_classes": _CLASSES, **_OPTIONS.get(name, {})}
        if name.startswith("vgg"):
            options["init_weights"] = False
        side = _SIDES.get(name, 64)
        found.append(
            Case(
                name,
                _builder(getattr(torchvision.models, name), **options),
                images(2, 3, side, side),
                huge=name in _HUGE,
                family="classification",
            )
        )
    return found


def _segmentation() -> list[Case]:
    module = torchvision.models.segmentation
    found = []
    for name in torchvision.models.list_models(module=module):
        for aux in (False, True) if not name.startswith("lraspp") else (False,):
            options: dict[str, Any] = {
                "weights": None,
                "weights_backbone": None,
                "num_classes": _CLASSES,
            }
            if aux:
                options["aux_loss"] = True
            found.append(
                Case(
                    f"{name}{'+aux' if aux else ''}",
                    _builder(getattr(module, name), **options),
                    images(2, 3, 64, 64),
                    family="segmentation",
                )
            )
    return found


_CLIPS = {
    "mvit_v1_b": (16, 224),
    "mvit_v2_s": (16, 224),
    "s3d": (16, 224),
    "swin3d_t": (8, 64),
    "swin3d_s": (8, 64),
    "swin3d_b": (8, 64),
}


def _video() -> list[Case]:
    module = torchvision.models.video
    found = []
    for name in torchvision.models.list_models(module=module):
        frames, side = _CLIPS.get(name, (8, 48))
        found.append(
            Case(
                name,
                _builder(getattr(module, name), weights=None, num_classes=_CLASSES),
                images(2, 3, frames, side, side),
                family="video",
            )
        )
    return found


def _flow() -> list[Case]:
    module = torchvision.models.optical_flow

    def pair() -> dict[str, Any]:
        first, second = torch.rand(2, 2, 3, 128, 128).mul(2).sub(1).unbind(0)
        return {"image1": first, "image2": second, "num_flow_updates": 3}

    return [
        Case(name, _builder(getattr(module, name), weights=None), pair, family="optical flow")
        for name in torchvision.models.list_models(module=module)
    ]


def _targets(masks: bool, keypoints: bool) -> list[dict[str, torch.Tensor]]:
    boxes = torch.tensor([[4.0, 6.0, 60.0, 70.0], [20.0, 16.0, 90.0, 88.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    if masks:
        target["masks"] = torch.ones(2, 96, 96, dtype=torch.uint8)
    if keypoints:
        target["labels"] = torch.ones(2, dtype=torch.int64)
        points = torch.rand(2, 17, 3) * 60 + 6
        points[..., 2] = 1
        target["keypoints"] = points
    return [target, {k: v.clone() for k, v in target.items()}]


def _detection() -> list[Case]:
    module = torchvision.models.detection
    found = []
    for name in torchvision.models.list_models(module=module):
        # The models resize what they get; the SSD family is made for one size.
        options: dict[str, Any] = {"weights": None, "weights_backbone": None}
        options["num_classes"] = 2 if name.startswith("keypoint") else 5
        if name.startswith("ssdlite"):
            # Random weights give many equal scores; which box suppresses which is then chance.
            options["nms_thresh"] = 1.0
        if not name.startswith("ssd"):
            options |= {"min_size": 96, "max_size": 128}

        # Targets are for training mode, where these models return losses; eval mode ignores them.
        def labelled(_name: str = name) -> tuple[Any, ...]:
            targets = _targets(_name.startswith("mask"), _name.startswith("keypoint"))
            return ([torch.rand(3, 96, 96), torch.rand(3, 96, 96)], targets)

        found.append(
            Case(
                name,
                _builder(getattr(module, name), **options),
                labelled,
                dynamic=True,
                family="detection",
            )
        )
    return found


def cases() -> list[Case]:
    """All of them, classifiers first."""
    return [*_classifiers(), *_segmentation(), *_video(), *_flow(), *_detection()]
