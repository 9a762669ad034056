"""Both TensorFlow checkpoint formats read exactly; a file that is wrong in any way gives an error that says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from detector.checkpoint import read_all_variables, read_checkpoint, read_safetensors, write_safetensors
from detector.embedders.vggish import VGGISH_SHAPES
from detector.errors import ModelError

VALUES = {"scope/a": np.arange(600, dtype=np.float32).reshape(20, 30), "b": np.float32([1.5, -2.0])}
SHAPES = {name: value.shape for name, value in VALUES.items()}


@pytest.fixture(params=["V1", "V2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return saved_checkpoint(tmp_path, request.param)


def saved_checkpoint(folder: Path, version: str) -> Path:
    """With an optimiser slot and a step beside the model's variables, as the published ones have."""
    path = folder / "model.ckpt"
    extra = {"b/Adam": np.zeros(2, np.float32), "global_step": np.int64(7)}
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variables = [
            tf.compat.v1.get_variable(k, initializer=v, use_resource=False) for k, v in {**VALUES, **extra}.items()
        ]
        session.run(tf.compat.v1.variables_initializer(variables))
        saver = tf.compat.v1.train.Saver(variables, write_version=getattr(tf.compat.v1.train.SaverDef, version))
        saver.save(session, str(path), write_meta_graph=False, write_state=False)
    return path


def data_file(path: Path) -> Path:
    return path if path.exists() else next(path.parent.glob(path.name + ".data-*"))


@pytest.mark.golden
def test_golden_checkpoints_of_both_formats(golden_dir: Path) -> None:
    values = np.load(golden_dir / "tiny_ckpt_values.npz")
    for folder in ("tiny_ckpt_v1", "tiny_ckpt_v2"):
        found = read_all_variables(golden_dir / folder / "model.ckpt")
        shapes = {name: value.shape for name, value in found.items() if value.dtype == np.float32}
        assert set(read_checkpoint(golden_dir / folder / "model.ckpt", shapes)) == set(shapes)
        assert set(found) == set(values.files)
        for name, value in found.items():
            assert value.dtype == values[name].dtype
            np.testing.assert_array_equal(value, values[name], err_msg=f"{folder} {name}")


def test_exact_values_and_extra_variables_left_alone(checkpoint: Path) -> None:
    found = read_checkpoint(checkpoint, SHAPES)
    assert set(found) == set(VALUES)
    assert all(np.array_equal(found[name], VALUES[name]) for name in VALUES)


def test_v2_by_index_data_and_folder(tmp_path: Path) -> None:
    checkpoint = saved_checkpoint(tmp_path, "V2")
    index = checkpoint.with_name(checkpoint.name + ".index")
    for path in (index, data_file(checkpoint), checkpoint.parent):
        assert np.array_equal(read_checkpoint(path, SHAPES)["b"], VALUES["b"])


def test_missing_variables_wrong_shapes_and_types_are_named(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match=r"vggish/conv1/weights is missing.*more.*such as b,") as caught:
        read_checkpoint(checkpoint, VGGISH_SHAPES)
    assert str(checkpoint) in str(caught.value)
    with pytest.raises(ModelError, match=r"scope/a has shape \(20, 30\), expected \(30, 20\)"):
        read_checkpoint(checkpoint, SHAPES | {"scope/a": (30, 20)})
    assert read_checkpoint(checkpoint, {"scope/a": (-1, 30)})["scope/a"].shape == (20, 30)
    with pytest.raises(ModelError, match=r"global_step .* int64; float32"):
        read_checkpoint(checkpoint, {"global_step": ()})


def test_truncated_files(checkpoint: Path) -> None:
    path = data_file(checkpoint)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model\.ckpt.*(damaged|cut short)"):
            read_checkpoint(checkpoint, SHAPES)


def test_flipped_bytes_never_pass_as_values(checkpoint: Path) -> None:
    path = data_file(checkpoint)
    whole = bytearray(path.read_bytes())
    for position in range(50, len(whole), max(1, len(whole) // 12)):
        damaged = whole.copy()
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            found = read_checkpoint(checkpoint, SHAPES)
        except ModelError:
            continue
        assert all(np.array_equal(found[name], VALUES[name]) for name in VALUES), f"byte {position}"


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04" + b"\0" * 500, b"\x80\x04" * 900])
def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vggish_model.ckpt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"vggish_model\.ckpt can't be read as a TensorFlow checkpoint"):
        read_checkpoint(path, VGGISH_SHAPES)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        read_checkpoint(tmp_path / "none.ckpt", SHAPES)
    with pytest.raises(ModelError, match="holds 0 V2 checkpoints"):
        read_checkpoint(tmp_path, SHAPES)
    (tmp_path / "a[1]").write_bytes(b"x")
    with pytest.raises(ModelError, match="rename"):
        read_checkpoint(tmp_path / "a[1]", SHAPES)


def test_v2_index_without_its_data(tmp_path: Path) -> None:
    checkpoint = saved_checkpoint(tmp_path, "V2")
    data_file(checkpoint).unlink()
    with pytest.raises(ModelError, match=r"model\.ckpt"):
        read_checkpoint(checkpoint, SHAPES)


def test_safetensors_round_trip_and_faults(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, VALUES)
    assert all(np.array_equal(read_safetensors(path, SHAPES)[name], VALUES[name]) for name in VALUES)
    whole = path.read_bytes()
    for content in (b"", b"\xff" * 40, whole[:30], whole[:-1], whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"w\.safetensors"):
            read_safetensors(path, SHAPES)
    write_safetensors(path, VALUES | {"c": np.zeros(1, np.float32)})
    with pytest.raises(ModelError, match="c is not expected"):
        read_safetensors(path, SHAPES)
    with pytest.raises(ModelError, match="does not exist"):
        read_safetensors(tmp_path / "none", SHAPES)
    write_safetensors(path, VALUES | {"b": np.float32([np.nan, 1])})
    with pytest.raises(ModelError, match=r"b of .* NaN"):
        read_safetensors(path, SHAPES)


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    path = tmp_path / "w.safetensors"
    write_safetensors(path, VALUES)
    (tmp_path / "w.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(ModelError, match="can't be written"):
        write_safetensors(path, VALUES)
    assert np.array_equal(read_safetensors(path, SHAPES)["b"], VALUES["b"])
