"""Fourier transforms and complex views: the transformed dims stay, channels pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.rules.pointwise import pointwise
from chanprune_ext.analysis.rules.registry import rule
from chanprune_ext.analysis.tracer import anonymous

if TYPE_CHECKING:
    from torch import Tensor

    from chanprune_ext.analysis.tracer import Tracer


@rule("aten::_fft_r2c", "aten::_fft_c2c", "aten::_fft_c2r")
def transform(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    dims = list(tracer.dims(args[0]))
    for d in args[1]:
        tracer.freeze(dims[d], "a Fourier transform runs along these positions")
        dims[d] = anonymous(output.shape[d])
    tracer.set(output, dims)


@rule("aten::view_as_complex")
def as_complex(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """(.., 2) -> (..)."""
    *dims, pair = tracer.dims(args[0])
    tracer.freeze(pair, "real and imaginary parts")
    tracer.set(output, dims)


@rule("aten::view_as_real")
def as_real(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """(..) -> (.., 2)."""
    tracer.set(output, [*tracer.dims(args[0]), anonymous(2)])


@rule("aten::_conj", "aten::_conj_physical", "aten::resolve_conj", "aten::real", "aten::imag")
def part(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    tracer.set(output, tracer.dims(args[0]))


# Made of two real tensors, index by index.
rule("aten::complex", "aten::polar")(pointwise)
