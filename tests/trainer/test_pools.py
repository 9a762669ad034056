"""What can be wrong with recordings and pools is said in one sentence that names the place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from detector.errors import AudioError, ConfigError
from trainer.compact.pools import build_pool, load_pool, read_index, read_onsets

_INDEX = "path,label,split,licence,group\n"
_ONSETS = "file,num_rounds,onset_seconds\n"


def _audio_dir(folder: Path, index: str = _INDEX, onsets: str = _ONSETS) -> Path:
    (folder / "shotspotter").mkdir(parents=True)
    (folder / "index.csv").write_text(index)
    (folder / "shotspotter" / "onsets.csv").write_text(onsets)
    return folder


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("path,label,split,group\n", r"index\.csv has no column licence"),
        ("", r"index\.csv has no column path, label"),
        (_INDEX + "a.flac,rain,train,CC0,g\na.flac,rain\n", r"index\.csv, line 3"),
        (_INDEX + "\0", r"index\.csv"),
    ],
)
def test_a_bad_index_is_named(tmp_path: Path, index: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_index(_audio_dir(tmp_path / "audio", index))


@pytest.mark.parametrize("row", ["a.flac,,1.0", "a.flac,3,", "a.flac,3,soon", "a.flac,3.5,1.0", "a.flac,3,nan"])
def test_a_bad_onset_is_named_with_its_line(tmp_path: Path, row: str) -> None:
    folder = _audio_dir(tmp_path / "audio", onsets=f"{_ONSETS}a.flac,3,0.5\n{row}\n")
    with pytest.raises(ConfigError, match=r"onsets\.csv, line 3"):
        read_onsets(folder)


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    folder = _audio_dir(tmp_path / "audio", _INDEX + "a.flac,rain,train,CC BY-NC,g\n")
    with pytest.raises(ConfigError, match=r"lists nothing to train on.*CC0.*MIT"):
        build_pool(folder, tmp_path / "pool")


def test_a_sound_without_samples_is_named(tmp_path: Path) -> None:
    folder = _audio_dir(tmp_path / "audio", _INDEX + "empty.wav,rain,train,CC0,g\n")
    soundfile.write(folder / "empty.wav", np.zeros(0), 16_000)
    with pytest.raises(AudioError, match=r"empty\.wav holds no sample"):
        build_pool(folder, tmp_path / "pool")


@pytest.mark.parametrize("name", ["pool.json", "pool.npy"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_damaged_pool_says_how_to_make_it_anew(tmp_path: Path, name: str, kept: float) -> None:
    folder = _audio_dir(tmp_path / "audio", _INDEX + "rain.wav,rain,train,CC0,g\n")
    soundfile.write(folder / "rain.wav", np.full(16_000, 0.1), 16_000)
    assert len(build_pool(folder, tmp_path / "pool").pcm) == 16_000
    path = tmp_path / "pool" / name
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ConfigError, match=r"delete the folder and run `trainer compact prepare`"):
        load_pool(tmp_path / "pool")
