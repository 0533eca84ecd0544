"""Windows laid out as channels and back, and regions cut out of images: channels pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.rules.registry import rule
from chanprune_ext.analysis.rules.reshape import merge, split
from chanprune_ext.analysis.tracer import anonymous

if TYPE_CHECKING:
    from torch import Tensor

    from chanprune_ext.analysis.tracer import Tracer

_SLIDES = "a window slides over these positions"


@rule("aten::im2col")
def im2col(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """(.., C, H, W) -> (.., C * kh * kw, L): a channel takes its windows along."""
    *batch, channels, height, width = tracer.dims(args[0])
    for slots in (height, width):
        tracer.freeze(slots, _SLIDES)
    window = anonymous(output.shape[-2] // channels.shape[1])
    tracer.set(output, [*batch, merge(tracer, (channels, window)), anonymous(output.shape[-1])])


@rule("aten::col2im")
def col2im(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """(.., C * kh * kw, L) -> (.., C, H, W)."""
    *batch, columns, positions = tracer.dims(args[0])
    tracer.freeze(positions, _SLIDES)
    count = output.shape[-3]
    channels, window = split(tracer, columns, (count, columns.shape[1] // count))
    tracer.freeze(window, _SLIDES)
    tracer.set(output, [*batch, channels, anonymous(output.shape[-2]), anonymous(output.shape[-1])])


@rule("aten::unfold")
def unfold(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """``x.unfold(dim, size, step)``: that dim becomes windows, their content a last dim."""
    source, dim = args[:2]
    dims = list(tracer.dims(source))
    dim %= source.dim()
    tracer.freeze(dims[dim], _SLIDES)
    dims[dim] = anonymous(output.shape[dim])
    tracer.set(output, [*dims, anonymous(output.shape[-1])])


@rule("torchvision::roi_align", "torchvision::roi_pool")
def regions(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """(N, C, H, W) and K boxes -> (K, C, h, w)."""
    image, boxes = args[:2]
    batch, channels, *space = tracer.dims(image)
    for slots in (batch, *space):
        tracer.freeze(slots, "boxes are cut out of these positions")
    tracer.freeze_tensor(boxes, "boxes say where to look")
    results = output if isinstance(output, (tuple, list)) else (output,)
    for result in results:
        first, *rest = (anonymous(n) for n in result.shape)
        tracer.set(result, [first, channels, *rest[1:]])
