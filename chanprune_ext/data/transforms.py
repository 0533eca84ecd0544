"""From decoded to what a network sees: random changes for training, resize and crop for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["Augmentation", "Preset", "evaluation_transform", "training_transform"]

AUTO_AUGMENTS = ("randaugment", "trivialaugment")
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
CROP_MODES = ("center", "squash")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, by torchvision's v2 transforms.

    Attributes:
        auto (str, optional): ``"randaugment"`` (Cubuk et al. 2020) or ``"trivialaugment"`` (Müller
            and Hutter 2021): colour, contrast, shear and so on. Default: None.
        operations (int): of RandAugment, on each image. Default: 2.
        magnitude (int): of RandAugment, 0 to 30. Default: 9.
        erasing (float): share of the images of which a random rectangle is replaced by the mean
            colour (random erasing, Zhong et al. 2020). Default: 0.
        scale (tuple[float, float]): share of the image's area that a random crop covers, for
            images over 64 pixels. Default: (0.08, 1).
        mirror (bool): mirror every second image left to right. Default: True.
        repeats (int): repeated augmentation (Hoffer et al. 2020): a batch holds every image so many
            times, each changed in its own way, and an epoch so many times fewer images.
            Default: 1.

    Raises:
        InvalidArgumentError: a setting is outside its range.
    """

    auto: str | None = None
    operations: int = 2
    magnitude: int = 9
    erasing: float = 0.0
    scale: tuple[float, float] = (0.08, 1.0)
    mirror: bool = True
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.auto is not None and self.auto not in AUTO_AUGMENTS:
            raise InvalidArgumentError(
                f"auto: expected one of {', '.join(AUTO_AUGMENTS)} or None, got {self.auto!r}"
            )
        for name, low, high in (("operations", 1, 14), ("magnitude", 0, 30), ("repeats", 1, 64)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidArgumentError(f"{name}: expected {low} to {high}, got {value}")
        if not 0 <= self.erasing <= 1:
            raise InvalidArgumentError(f"erasing: expected a share, 0 to 1, got {self.erasing}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InvalidArgumentError(
                f"scale: expected two shares, the smaller one first, got {self.scale}"
            )


@dataclass(frozen=True)
class Preset:
    """What trained weights expect of an image.

    Attributes:
        size (int): edge of the square that the network sees, in pixels. Default: 224.
        resize (int, optional): shorter side before the centre is cut out. Default: ``size * 256 /
            224``.
        mean, std (Sequence[float]): of each channel on the scale 0 to 1. Default: ImageNet's.
        interpolation (str): ``"bilinear"``, ``"bicubic"`` or ``"nearest"``. Default:
            ``"bilinear"``.
        crop_mode (str): ``"center"`` keeps the proportions of an image and loses what is beside its
            centre; ``"squash"`` scales the longer side to ``resize`` as well (timm's names).
            Default: ``"center"``.

    Raises:
        InvalidArgumentError: an interpolation or a crop mode is none of these.
    """

    size: int = 224
    resize: int | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if getattr(self, name) not in known:
                raise InvalidArgumentError(
                    f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}"
                )

    @classmethod
    def of(cls, name: str) -> Preset:
        """The preset of published weights, from the library that publishes them.

        Args:
            name (str): a torchvision weight such as ``"ResNet50_Weights.IMAGENET1K_V2"``, or
                ``"timm:"`` and a timm model such as ``"timm:vit_base_patch16_224.augreg_in21k"``.

        Raises:
            InvalidArgumentError: there are no such weights, or timm is not installed.
        """
        return _timm_preset(name) if name.startswith("timm:") else _torchvision_preset(name)


def _torchvision_preset(name: str) -> Preset:
    from torchvision.models import get_weight

    try:
        found = get_weight(name).transforms()
        return Preset(
            size=found.crop_size[0],
            resize=found.resize_size[0],
            mean=tuple(found.mean),
            std=tuple(found.std),
            interpolation=found.interpolation.value,
        )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InvalidArgumentError(
            f"preset: expected the weights of a torchvision classifier, such as "
            f"ResNet50_Weights.IMAGENET1K_V2, or timm:<model>, got {name!r} ({error})"
        ) from error


def _timm_preset(name: str) -> Preset:
    try:
        import timm
    except ImportError as error:
        raise InvalidArgumentError(
            f"preset: {name} needs timm; pip install 'chanprune_ext[models]'"
        ) from error
    try:
        config = timm.get_pretrained_cfg(name.removeprefix("timm:"), allow_unregistered=False)
    except RuntimeError as error:
        raise InvalidArgumentError(f"preset: {name}: {error} See timm.list_pretrained()") from error
    assert config is not None, "an unregistered model is an error"
    size = (config.test_input_size or config.input_size)[-1]
    return Preset(
        size=size,
        resize=int(size / (config.test_crop_pct or config.crop_pct)),
        mean=tuple(config.mean),
        std=tuple(config.std),
        interpolation=config.interpolation,
        crop_mode=config.crop_mode,
    )


def training_transform(
    size: int | None,
    augmentation: Augmentation = Augmentation(),
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    interpolation: str = "bilinear",
) -> Callable[[Tensor], Tensor]:
    """The random changes of one image.

    Args:
        size (int, optional): edge of the result in pixels; None: neither cropped nor mirrored,
            for small images, where that is done a batch at a time.
        augmentation (Augmentation): what to do. Default: crop and mirror.
        mean (Sequence[float]): what an erased rectangle is filled with, on the scale 0 to 1.
        interpolation (str): as for :class:`Preset`. Default: ``"bilinear"``.

    Returns:
        Callable: uint8 ``[C, H, W]`` -> uint8 ``[C, size, size]``; a torchvision transform. It
        draws from torch's global generator. Cropped and mirrored only, floats may be normalised.
    """
    from torchvision.transforms import v2

    mode = v2.InterpolationMode(interpolation)
    steps: list[Any] = []
    if size is not None:
        steps.append(
            v2.RandomResizedCrop(size, scale=augmentation.scale, interpolation=mode, antialias=True)
        )
        if augmentation.mirror:
            steps.append(v2.RandomHorizontalFlip())
    if augmentation.auto == "randaugment":
        steps.append(v2.RandAugment(augmentation.operations, augmentation.magnitude))
    elif augmentation.auto == "trivialaugment":
        steps.append(v2.TrivialAugmentWide())
    if augmentation.erasing:
        fill = [round(255 * value) for value in mean]
        steps.append(v2.RandomErasing(augmentation.erasing, value=fill))
    return v2.Compose(steps) if steps else v2.Identity()


def evaluation_transform(
    size: int, resize: int, *, interpolation: str = "bilinear", crop_mode: str = "center"
) -> Callable[[Tensor], Tensor]:
    """Scales the shorter side to ``resize`` and cuts the centre ``size`` x ``size`` out.

    Args:
        size (int): edge of the result in pixels.
        resize (int): shorter side before the cut, at least ``size``.
        interpolation (str): as for :class:`Preset`. Default: ``"bilinear"``.
        crop_mode (str): as for :class:`Preset`. Default: ``"center"``.

    Returns:
        Callable: uint8 ``[C, H, W]`` -> uint8 ``[C, size, size]``; a torchvision transform.
    """
    from torchvision.transforms import v2

    mode = v2.InterpolationMode(interpolation)
    scaled = [resize, resize] if crop_mode == "squash" else [resize]
    return v2.Compose([v2.Resize(scaled, interpolation=mode, antialias=True), v2.CenterCrop(size)])
