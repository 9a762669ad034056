"""A recording of any rate and channels goes to AudioSet's bytes through one call, as the reference does it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from detector.embedders import build_network
from detector.embedders.clip import ClipEmbedder
from detector.embedders.postprocess import read_pca
from detector.errors import AudioError, ModelError


@pytest.mark.golden
def test_wav_files_of_every_golden_signal(
    tmp_path: Path, golden_dir: Path, vggish_tensors: dict[str, np.ndarray]
) -> None:
    signals, net = np.load(golden_dir / "vggish_frontend.npz"), np.load(golden_dir / "vggish_net.npz")
    embedder = ClipEmbedder(build_network("vggish", vggish_tensors), read_pca(golden_dir / "vggish_pca_params.npz"))
    names = [k.removeprefix("pcm_") for k in signals.files if k.startswith("pcm_") and f"emb_{k[4:]}" in net.files]
    assert names
    different, total = 0, 0
    for name in names:
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, signals[f"pcm_{name}"], int(signals[f"fs_{name}"]), subtype="PCM_16")
        clip = embedder.embed_file(path)
        np.testing.assert_allclose(clip.log_mel, signals[f"logmel_{name}"], rtol=0, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(clip.embeddings, net[f"emb_{name}"], rtol=1e-4, atol=1e-4, err_msg=name)
        assert clip.quantised is not None
        off = np.abs(clip.quantised.astype(int) - net[f"post_{name}"])
        assert off.max() <= 1
        different, total = different + np.count_nonzero(off), total + off.size
    assert different <= 0.01 * total


def test_clips_without_an_example_and_without_a_frame() -> None:
    from detector.embedders.compact import CompactNetwork

    embedder = ClipEmbedder(CompactNetwork(folded=True))
    clip = embedder.embed(np.zeros(15_599))
    assert clip.log_mel.shape == (0, 96, 64)
    assert clip.embeddings.shape == (0, 128)
    assert clip.quantised is None
    assert embedder.embed(np.zeros(15_360 * 40 + 240)).embeddings.shape == (40, 128)
    with pytest.raises(AudioError, match="too short"):
        embedder.embed(np.zeros(200))


def test_unknown_kind() -> None:
    with pytest.raises(ModelError, match="'resnet' is unknown"):
        build_network("resnet", {})
