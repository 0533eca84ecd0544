"""A pruned model in the formats that other programs run, checked before it is handed over.

Each format is written to a temporary place, run there, and compared with what torch computes; only
a file that agrees is put where it was asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from chanprune_ext.analysis.calls import run_model, tensors_in
from chanprune_ext.analysis.stand_ins import fake_tensors_silent, substitute, tensors_of
from chanprune_ext.atomic_files import is_special, written_to
from chanprune_ext.errors import ExportError, InvalidArgumentError, OutputError
from chanprune_ext.module_modes import evaluating, without_cache
from chanprune_ext.module_tree import modules_of, plain_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["FORMATS", "Exported", "export", "format_of", "onnx_session"]

FORMATS = ("onnx", "torch-export", "torchscript")
_SUFFIXES = {".onnx": "onnx", ".pt2": "torch-export", ".pt": "torchscript", ".ts": "torchscript"}
# Protocol buffers end at 2 GiB; beyond that the weights go into a file of their own.
_LARGEST_PROTOBUF = 2**31 - 2**26


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        format: One of :data:`FORMATS`.
        dynamic_batch: The file takes batches of any size; otherwise that of the example alone.
        error: Largest difference to torch over the largest absolute value of each output tensor
            (at least 1), the worst of all of them.
        bytes: Size of the file, with that of the weights where they are beside it.
        note: Why something asked for is not so; empty where all is.
    """

    path: Path
    format: str
    dynamic_batch: bool
    error: float
    bytes: int
    note: str = ""


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - the word everyone uses
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> Exported:
    """Writes a model, pruned or not, for other programs, whole or not at all.

    The model runs in eval mode and is left as it was. The file is run on the example, and on a
    batch of another size where it takes any, and must agree with torch.

    Args:
        model: Any model that ``torch.export`` takes, on the device of the inputs. Of one that
            DataParallel, DistributedDataParallel or torch.compile has wrapped, the one inside is
            written.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        path: The file; an existing one is replaced, or of a link what it leads to. ONNX models
            of 2 GB and more keep their weights in ``<path>.data``.
        format: ``"onnx"`` (torch's exporter by ``torch.export``; needs onnx, onnxscript and
            onnxruntime), ``"torch-export"`` (an ``ExportedProgram``, ``.pt2``) or
            ``"torchscript"``. Default: by the suffix of ``path``.
        dynamic_batch: Let dimension 0 of the inputs vary, where the model allows it; what was
            possible is in the result.
        tolerance: Largest difference to torch, relative to the largest absolute value of an output
            (at least 1).

    Raises:
        InvalidArgumentError: The format is unknown, a package it needs is missing, or the model
            does not run on the inputs.
        ExportError: The model can't be exported, or the file computes something else.
        OutputError: The file can't be written; one that was there is as it was.
    """
    if not isinstance(path, str | os.PathLike):
        raise InvalidArgumentError(
            f"path: expected the path of a file, got {type(path).__name__}; call "
            "export(model, example_inputs, path)"
        )
    path, model = Path(path), plain_module(model)
    kind = format_of(path) if format is None else format
    if kind not in FORMATS:
        raise InvalidArgumentError(f"format must be one of {FORMATS}, got {kind!r}")
    if any(t.is_meta for t in (*tensors_of(model).values(), *tensors_in(example_inputs))):
        raise InvalidArgumentError("model and example_inputs must have values, got meta tensors")
    if not 0 <= tolerance < float("inf"):
        raise InvalidArgumentError(f"tolerance: expected a finite number >= 0, got {tolerance!r}")
    write, run = _writer(kind)
    note = ""
    target = written_to(path)
    with _ready(model), _folder_beside(target) as name:
        _first_call(model, example_inputs)
        written = Path(name) / (target.name if target.suffix else f"{target.name}.bin")
        dynamic = dynamic_batch and _batch_of(example_inputs) is not None
        try:
            write(model, example_inputs, written, dynamic)
        except Exception as error:
            if isinstance(error, OSError):
                raise _unwritable(path, error) from error
            if not dynamic:
                raise _failed(kind, error) from error
            dynamic, note = False, f"the batch size is fixed: {_first_line(error)}"
            try:
                write(model, example_inputs, written, dynamic)
            except OSError as second:
                raise _unwritable(path, second) from second
            except Exception as second:
                raise _failed(kind, second) from second
        worst = _check(model, run, written, example_inputs, kind, tolerance)
        if dynamic:
            try:
                more = _repeated(example_inputs, 3)
                worst = max(worst, _check(model, run, written, more, kind, tolerance))
            except ExportError as failure:
                dynamic, note = False, f"only the example's batch size works: {failure}"
        size = _move_all(Path(name), written, target)
    return Exported(path, kind, dynamic, worst, size, note)


def format_of(path: Path) -> str:
    """The format a suffix stands for.

    Raises:
        InvalidArgumentError: It stands for none.
    """
    if path.suffix not in _SUFFIXES:
        raise InvalidArgumentError(
            f"format: can't be told from {path.name!r}; give one of {FORMATS}, or a name that ends "
            f"in {', '.join(_SUFFIXES)}"
        )
    return _SUFFIXES[path.suffix]


# -- formats -------------------------------------------------------------------------------------


def _writer(
    kind: str,
) -> tuple[Callable[[nn.Module, Any, Path, bool], None], Callable[[Path, Any], list[Tensor]]]:
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise InvalidArgumentError(
                    f"format 'onnx' needs the package {package} ({error}); install it with: "
                    "pip install 'chanprune_ext[export]'"
                ) from error
        return _write_onnx, _run_onnx
    if kind == "torch-export":
        return _write_program, _run_program
    return _write_script, _run_script


def _write_onnx(model: nn.Module, inputs: Any, path: Path, dynamic: bool) -> None:
    program = torch.onnx.export(
        _program(model, inputs, dynamic), dynamo=True, verbose=False, optimize=True
    )
    assert program is not None
    large = sum(t.nbytes for t in tensors_of(model).values()) > _LARGEST_PROTOBUF
    program.save(path, external_data=large)


def _run_onnx(path: Path, inputs: Any) -> list[Tensor]:
    session, feeds = onnx_session(path, inputs)
    return [torch.from_numpy(array) for array in session.run(None, feeds)]


def onnx_session(path: Path, inputs: Any) -> tuple[Any, dict[str, Any]]:
    """An ``onnxruntime.InferenceSession`` on the CPU, and inputs under the names it has for them.

    It uses as many threads as torch does.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [found.name for found in session.get_inputs()]
    feeds = dict(zip(names, (t.cpu().numpy() for t in tensors_in(inputs)), strict=True))
    return session, feeds


def _write_program(model: nn.Module, inputs: Any, path: Path, dynamic: bool) -> None:
    # Into memory first: on a full disk torch's own writer ends the process.
    content = io.BytesIO()
    torch.export.save(_program(model, inputs, dynamic), content)
    path.write_bytes(content.getbuffer())


def _run_program(path: Path, inputs: Any) -> list[Tensor]:
    with path.open("rb") as file:
        program = torch.export.load(file)
    return tensors_in(run_model(program.module(), inputs))


def _write_script(model: nn.Module, inputs: Any, path: Path, dynamic: bool) -> None:
    del dynamic  # a script takes any batch; a recorded trace is tried on another one later
    try:
        script = torch.jit.script(model)
    except Exception:  # noqa: BLE001 - what can't be compiled may still be recorded
        args, kwargs = _split(inputs)
        given = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
        script = torch.jit.trace(model, strict=False, **given)  # type: ignore[no-untyped-call]
    content = io.BytesIO()  # as for a program
    torch.jit.save(script, content)
    path.write_bytes(content.getbuffer())


def _run_script(path: Path, inputs: Any) -> list[Tensor]:
    script = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return tensors_in(run_model(script, inputs))


def _program(model: nn.Module, inputs: Any, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = None
    if dynamic:
        batch = _batch_of(inputs)
        # A batch of one would be taken for a size that is always one.
        inputs = _repeated(inputs, 2) if batch == 1 else inputs
        varying = _batch_of(inputs)

        def dims(tensor: Tensor) -> dict[int, Any] | None:
            same = tensor.dim() > 0 and tensor.shape[0] == varying
            return {0: Dim.DYNAMIC} if same else None

        args, kwargs = substitute(_split(inputs), dims)
        shapes = kwargs if kwargs else args
    # The exporter leaves marks on its inputs, which a second try must not see.
    args, kwargs = substitute(_split(inputs), Tensor.clone)
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


# -- inputs, checks, files -----------------------------------------------------------------------


def _split(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _batch_of(inputs: Any) -> int | None:
    """Dimension 0 of the first tensor; None where it has none."""
    tensors = tensors_in(inputs)
    return tensors[0].shape[0] if tensors and tensors[0].dim() else None


def _repeated(inputs: Any, times: int) -> Any:
    """A batch that many times as large."""
    batch = _batch_of(inputs)

    def repeat(tensor: Tensor) -> Tensor:
        same = tensor.dim() > 0 and tensor.shape[0] == batch
        return torch.cat([tensor] * times) if same else tensor

    return substitute(inputs, repeat)


def _first_call(model: nn.Module, inputs: Any) -> None:
    try:
        run_model(model, substitute(inputs, Tensor.clone))
    except Exception as error:
        raise InvalidArgumentError(
            f"example_inputs: the model can't run on them ({_first_line(error)}); give inputs of "
            "its shape, dtype and device"
        ) from error


def _check(
    model: nn.Module,
    run: Callable[[Path, Any], list[Tensor]],
    path: Path,
    inputs: Any,
    kind: str,
    tolerance: float,
) -> float:
    try:
        expected = tensors_in(run_model(model, substitute(inputs, Tensor.clone)))
    except Exception as error:
        raise ExportError(f"torch itself does not run: {_first_line(error)}") from error
    try:
        found = run(path, inputs)
    except Exception as error:
        raise ExportError(f"the {kind} file does not run: {_first_line(error)}") from error
    if len(found) != len(expected):
        raise ExportError(f"the {kind} file returns {len(found)} tensors, torch {len(expected)}")
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            raise ExportError(
                f"the {kind} file returns a tensor of shape {tuple(ours.shape)}, torch one of "
                f"{tuple(theirs.shape)}"
            )
        if theirs.numel():
            reference = theirs.double().cpu()
            values = ours.double().cpu()
            # What masks logits with -inf agrees where both have it.
            difference = torch.where(values == reference, 0.0, (values - reference).abs()).max()
            largest = reference.where(reference.isfinite(), 0.0).abs().max()
            worst = max(worst, float(difference / largest.clamp(min=1.0)))
            if not bool(torch.isfinite(difference)):
                worst = float("inf")
    if worst > tolerance:
        raise ExportError(
            f"the {kind} file computes something else: relative difference {worst:.1e} to torch, "
            f"allowed {tolerance:.0e}"
        )
    return worst


def _move_all(folder: Path, written: Path, path: Path) -> int:
    """Puts the files into place, the one that names the others last; returns their bytes."""
    others = sorted(file for file in folder.iterdir() if file != written)
    total = 0
    for file in (*others, written):
        target = path if file == written else path.with_name(file.name)
        total += file.stat().st_size
        try:
            if is_special(target):
                target.write_bytes(file.read_bytes())
            else:
                file.replace(target)
        except OSError as error:
            raise _unwritable(target, error) from error
    return total


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[str]:
    """A temporary folder on the disk of ``path``, so that moving from it is all or nothing.

    Beside a pipe or a device there is no place for one.
    """
    if path.is_dir():
        raise OutputError(f"{path}: can't be written, it is a folder; give a file name")
    try:
        place = None if is_special(path) else path.parent
        folder = tempfile.TemporaryDirectory(prefix=".chanprune-", dir=place)
    except OSError as error:
        raise _unwritable(path, error) from error
    with folder as name:
        yield name


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path}: can't be written ({error}); check that the folder exists, may be written to and "
        "has room"
    )


@contextlib.contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no cache among the outputs, and exporters kept quiet."""
    with (
        evaluating(model),
        without_cache(model),
        torch.no_grad(),
        _buffers_kept(model),
        fake_tensors_silent(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undoes what forwards do to buffers, which may count calls."""
    kept = [
        (module._buffers, dict(module._buffers))  # noqa: SLF001 - in their order, None too
        for _, module in modules_of(model)
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    values = {id(b): b.clone() for _, own in kept for b in own.values() if b is not None}
    try:
        yield
    finally:
        for buffers, own in kept:
            buffers.clear()
            buffers.update(own)
            for buffer in own.values():
                if buffer is not None and not torch.equal(buffer, values[id(buffer)]):
                    buffer.copy_(values[id(buffer)])


def _failed(kind: str, error: Exception) -> ExportError:
    return ExportError(f"the model can't be exported as {kind}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
