"""Named float32 tensors from files: TensorFlow checkpoints (V1 single file, V2 index + data) and safetensors.

Every fault of such a file becomes a ModelError that names file, variable, what was found, what was expected and a
way out. Nothing here unpickles or runs what it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from detector.errors import ModelError

if TYPE_CHECKING:
    import tensorflow as tf

Tensors = dict[str, npt.NDArray[np.float32]]
Shapes = Mapping[str, tuple[int, ...]]

_DATA_MARK = ".data-"


def read_checkpoint(path: Path, shapes: Shapes) -> Tensors:
    """The float32 variables named by ``shapes`` from a TensorFlow checkpoint; others (Adam slots) are left alone.

    Args:
        path: the V1 file, or for V2 its prefix, its ``.index`` or ``.data-*`` file, or a folder that holds one V2
            checkpoint.
        shapes: name -> shape of every variable needed; ``-1`` stands for any length.

    Raises ModelError for a file that is missing, damaged or no checkpoint, and for variables missing or unfit.
    """
    reader = _open_checkpoint(path)
    found: Mapping[str, list[int]] = reader.get_variable_to_shape_map()
    dtypes = reader.get_variable_to_dtype_map()
    check_names_and_shapes(
        {name: tuple(shape) for name, shape in found.items()}, shapes, f"checkpoint {path}", allow_extra=True
    )
    for name in shapes:
        if dtypes[name].name != "float32":
            raise ModelError(
                f"Variable {name} of checkpoint {path} is {dtypes[name].name}; float32 is expected. Get another file."
            )
    tensors = {name: _tensor(reader, name, path) for name in shapes}
    check_finite(tensors, f"checkpoint {path}")
    return tensors


def read_all_variables(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    """Every variable of a TensorFlow checkpoint as stored, of any type: optimiser slots and steps too."""
    reader = _open_checkpoint(path)
    return {name: _tensor(reader, name, path) for name in sorted(reader.get_variable_to_shape_map())}


def read_safetensors(path: Path, shapes: Shapes) -> Tensors:
    """Exactly the tensors named by ``shapes`` from a safetensors file, float32; ModelError as for checkpoints."""
    import safetensors
    import safetensors.numpy

    try:
        loaded: Tensors = safetensors.numpy.load_file(path)
    except FileNotFoundError:
        raise ModelError(f"Weights file {path} does not exist. Get or make it again.") from None
    except OSError as error:
        raise ModelError(
            f"Weights file {path} can't be read: {error.strerror or error}. Make it readable, or get it again."
        ) from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ModelError(
            f"Weights file {path} is no safetensors file or is damaged: {_first_line(error)}. Get or make it again."
        ) from error
    check_tensors(loaded, shapes, f"weights file {path}")
    return loaded


def write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Written whole or not at all; ModelError where the disk refuses."""
    import safetensors
    import safetensors.numpy

    partial = path.with_name(path.name + ".part")
    try:
        partial.write_bytes(
            safetensors.numpy.save({k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items()})
        )
        partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ModelError(f"Weights file {path} can't be written: {_first_line(error)}.") from error


def check_tensors(
    tensors: Mapping[str, npt.NDArray[np.generic]], shapes: Shapes, source: str, *, allow_extra: bool = False
) -> None:
    """ModelError unless ``tensors`` are float32, finite and of the names and shapes expected."""
    check_names_and_shapes({name: value.shape for name, value in tensors.items()}, shapes, source, allow_extra)
    for name in shapes:
        if tensors[name].dtype != np.float32:
            raise ModelError(
                f"Variable {name} of {source} is {tensors[name].dtype}; float32 is expected. Get or make it again."
            )
    check_finite({name: tensors[name] for name in shapes}, source)


def check_names_and_shapes(found: Shapes, expected: Shapes, source: str, allow_extra: bool = False) -> None:
    """ModelError that lists every variable missing, of another shape or (unless allowed) not expected."""
    faults = [
        f"{name} is missing"
        if name not in found
        else f"{name} has shape {tuple(found[name])}, expected {_shape_text(shape)}"
        for name, shape in expected.items()
        if name not in found or not _fits(found[name], shape)
    ]
    extra = sorted(set(found) - set(expected))
    if not faults and (allow_extra or not extra):
        return
    if not allow_extra:
        faults += [f"{name} is not expected" for name in extra]
    shown = "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")
    raise ModelError(
        f"The {source} holds another model than the one expected: {shown}. It has {len(found)} variables"
        f"{' such as ' + ', '.join(sorted(found)[:3]) if found else ''}. Give the file of the model that is configured."
    )


def check_finite(tensors: Mapping[str, npt.NDArray[np.generic]], source: str) -> None:
    for name, value in tensors.items():
        if not np.isfinite(np.sum(value, dtype=np.float64)):
            raise ModelError(
                f"Variable {name} of {source} holds NaN or infinite values: it is damaged. Get or make it again."
            )


def _open_checkpoint(path: Path) -> tf.train.CheckpointReader:
    import tensorflow as tf

    prefix = _checkpoint_prefix(path)
    if not prefix.exists() and not prefix.with_name(prefix.name + ".index").exists():
        raise ModelError(
            f"Checkpoint {path} does not exist: neither that file nor {prefix.name}.index is in {prefix.parent}."
        )
    if any(c in str(prefix) for c in "*?["):
        raise ModelError(f"Checkpoint path {path} holds one of * ? [, which TensorFlow takes for a pattern; rename it.")
    try:
        return tf.train.load_checkpoint(str(prefix))
    except Exception as error:
        raise ModelError(
            f"{path} can't be read as a TensorFlow checkpoint: {_first_line(error)}. It is another kind of file, or "
            "damaged or cut short; get it again."
        ) from error


def _tensor(reader: tf.train.CheckpointReader, name: str, path: Path) -> npt.NDArray[np.float32]:
    try:
        return np.asarray(reader.get_tensor(name))
    except Exception as error:
        raise ModelError(
            f"Variable {name} of checkpoint {path} can't be read: {_first_line(error)}. The file is damaged or cut "
            "short; get it again."
        ) from error


def _checkpoint_prefix(path: Path) -> Path:
    if path.is_dir():
        indices = sorted(path.glob("*.index"))
        if len(indices) != 1:
            raise ModelError(
                f"Folder {path} holds {len(indices)} V2 checkpoints (*.index); name the one file to read instead."
            )
        return indices[0].with_suffix("")
    if path.suffix == ".index":
        return path.with_suffix("")
    if _DATA_MARK in path.name:
        return path.with_name(path.name[: path.name.index(_DATA_MARK)])
    return path


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(found) == len(expected) and all(e in (-1, f) for f, e in zip(found, expected, strict=True))


def _shape_text(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join("any" if n == -1 else str(n) for n in shape) + ")"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
