"""The front end: the reference reproduces AudioSet's code, the graph follows it, however the audio comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from detector.audio import int16_to_float, resample_reference, to_mono
from detector.embedders.log_mel import log_mel, log_mel_examples, log_mel_frames
from detector.embedders.params import (
    CARRY_SAMPLES,
    EXAMPLE_HOP_SAMPLES,
    EXAMPLE_SAMPLES,
    FRONT_END,
)
from detector.errors import AudioError

FLOAT32_ROUNDING = 2.0**-24


def cut(pcm: np.ndarray) -> np.ndarray:
    """Whole-file PCM -> (E, 15600)."""
    count = max(0, (len(pcm) - CARRY_SAMPLES) // EXAMPLE_HOP_SAMPLES)
    starts = [j * EXAMPLE_HOP_SAMPLES for j in range(count)]
    return (
        np.stack([pcm[s : s + EXAMPLE_SAMPLES] for s in starts]) if starts else np.zeros((0, EXAMPLE_SAMPLES), np.int16)
    )


def assert_rounds_to(found: np.ndarray, golden_float32: np.ndarray, atol: float = 1e-9) -> None:
    assert found.shape == golden_float32.shape
    error = np.abs(found - golden_float32.astype(np.float64))
    assert np.all(error <= atol + 1.001 * FLOAT32_ROUNDING * np.abs(golden_float32)), error.max()


@pytest.fixture(scope="session")
def golden(golden_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "vggish_frontend.npz"))


@pytest.fixture(scope="session")
def streaming(golden_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "vggish_streaming.npz"))


@pytest.fixture(scope="session")
def graph() -> Callable[[np.ndarray], np.ndarray]:
    function = tf.function(log_mel, input_signature=[tf.TensorSpec([None, EXAMPLE_SAMPLES], tf.int16)])
    return lambda pcm: function(tf.constant(pcm)).numpy()


def signals(golden: dict[str, np.ndarray]) -> list[str]:
    names = [key.removeprefix("pcm_") for key in golden if key.startswith("pcm_")]
    assert names
    return names


@pytest.mark.golden
def test_tables_are_the_originals(golden: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(FRONT_END.hann(), golden["hann400"], atol=1e-15)
    np.testing.assert_allclose(FRONT_END.mel_matrix(), golden["mel_matrix"], atol=1e-13)


@pytest.mark.golden
def test_reference_reproduces_every_signal_at_its_own_rate_and_channels(golden: dict[str, np.ndarray]) -> None:
    for name in signals(golden):
        x = resample_reference(to_mono(int16_to_float(golden[f"pcm_{name}"])), int(golden[f"fs_{name}"]))
        assert_rounds_to(log_mel_examples(x), golden[f"logmel_{name}"])


@pytest.mark.golden
def test_reference_reproduces_float64_frames(golden: dict[str, np.ndarray]) -> None:
    names = [k.removeprefix("logmel_frames_").removesuffix("_f64") for k in golden if k.startswith("logmel_frames_")]
    assert names
    for name in names:
        found = log_mel_frames(int16_to_float(golden[f"pcm_{name}"]))
        np.testing.assert_allclose(found, golden[f"logmel_frames_{name}_f64"], rtol=0, atol=1e-9)


@pytest.mark.golden
def test_reference_reproduces_unquantised_and_long_signals(golden: dict[str, np.ndarray]) -> None:
    t = np.arange(0, 3, 1 / 16000)
    assert_rounds_to(log_mel_examples(np.sin(2 * np.pi * 1000 * t)), golden["logmel_sine_smoke_16k"])
    noise = np.random.RandomState(int(golden["long_seed"])).standard_normal(int(golden["long_n"]))
    examples = log_mel_examples(float(golden["long_amp"]) * noise)
    assert len(examples) == int(golden["long_num_examples"])
    np.testing.assert_allclose(examples.mean(axis=(1, 2)), golden["long_per_example_mean"], atol=1e-6)
    np.testing.assert_allclose(examples.std(axis=(1, 2)), golden["long_per_example_std"], atol=1e-6)
    rows = golden["long_rows"] if golden["long_rows"].ndim == 1 else golden["long_rows"].ravel()
    assert_rounds_to(examples[rows.astype(int)], golden["long_logmel_rows"])


@pytest.mark.golden
def test_graph_follows_every_16_khz_signal(
    golden: dict[str, np.ndarray], graph: Callable[[np.ndarray], np.ndarray]
) -> None:
    tried = 0
    for name in signals(golden):
        pcm = golden[f"pcm_{name}"]
        if int(golden[f"fs_{name}"]) == 16_000 and pcm.ndim == 1 and len(pcm) >= EXAMPLE_SAMPLES:
            np.testing.assert_allclose(graph(cut(pcm)), golden[f"logmel_{name}"], rtol=0, atol=7e-4, err_msg=name)
            tried += 1
    assert tried


@pytest.mark.golden
def test_looking_back_240_samples_is_the_reference_on_240_zeros_and_the_file(
    streaming: dict[str, np.ndarray], graph: Callable[[np.ndarray], np.ndarray]
) -> None:
    pcm = streaming["pcm"]
    assert_rounds_to(log_mel_examples(int16_to_float(pcm)), streaming["logmel_whole"])
    looking_back = np.concatenate([np.zeros(CARRY_SAMPLES, np.int16), pcm])
    assert_rounds_to(log_mel_examples(int16_to_float(looking_back)), streaming["logmel_prepend240"])
    np.testing.assert_allclose(graph(cut(looking_back)), streaming["logmel_prepend240"], rtol=0, atol=7e-4)
    np.testing.assert_allclose(graph(cut(pcm)), streaming["logmel_whole"], rtol=0, atol=7e-4)


@pytest.mark.golden
def test_examples_complete_after_each_chunk(streaming: dict[str, np.ndarray]) -> None:
    total = len(streaming["pcm"])
    sizes = [k for k in streaming if k.startswith("cum_examples_chunk")]
    assert sizes
    for key in sizes:
        chunk = int(key.removeprefix("cum_examples_chunk"))
        received = np.minimum(np.arange(chunk, total + chunk, chunk), total)
        found = [len(log_mel_examples(np.zeros(n))) for n in received if n >= CARRY_SAMPLES]
        np.testing.assert_array_equal(found, streaming[key][-len(found) :])


@pytest.mark.parametrize(
    ("samples", "frames", "examples"),
    [
        (240, 0, 0),
        (399, 0, 0),
        (400, 1, 0),
        (15_360, 94, 0),
        (15_599, 95, 0),
        (15_600, 96, 1),
        (30_720, 190, 1),
        (30_959, 191, 1),
        (30_960, 192, 2),
        (48_000, 298, 3),
        (160_000, 998, 10),
    ],
)
def test_lengths(samples: int, frames: int, examples: int) -> None:
    assert log_mel_frames(np.zeros(samples)).shape == (frames, 64)
    assert log_mel_examples(np.zeros(samples)).shape == (examples, 96, 64)


@pytest.mark.parametrize("samples", [0, 1, 239])
def test_too_short_raises_as_the_original_does(samples: int) -> None:
    with pytest.raises(AudioError, match=rf"^{samples} samples are too short"):
        log_mel_examples(np.zeros(samples))


def test_channels_are_refused() -> None:
    with pytest.raises(AudioError, match="make it mono"):
        log_mel_frames(np.zeros((16_000, 2)))


@given(st.integers(240, 60_000))
def test_example_count_formula(samples: int) -> None:
    assert len(log_mel_examples(np.zeros(samples))) == (samples - 240) // 15_360


@settings(deadline=None, max_examples=25)
@given(hnp.arrays(np.int16, (2, 200), elements=st.integers(-32768, 32767)), st.integers(0, 2**32 - 1))
def test_graph_follows_the_reference_on_anything(seed_pcm: np.ndarray, seed: int) -> None:
    random = np.random.default_rng(seed)
    pcm = np.tile(seed_pcm, (1, EXAMPLE_SAMPLES // 200))
    pcm[1] = np.clip(random.standard_normal(EXAMPLE_SAMPLES) * 10 ** random.uniform(0, 4.5), -32768, 32767)
    expected = np.concatenate([log_mel_examples(int16_to_float(row)) for row in pcm])
    np.testing.assert_allclose(log_mel(tf.constant(pcm)).numpy(), expected, rtol=0, atol=1e-3)


def test_graph_gives_an_example_the_same_bits_in_every_batch(graph: Callable[[np.ndarray], np.ndarray]) -> None:
    pcm = np.random.default_rng(5).integers(-9000, 9000, (33, EXAMPLE_SAMPLES), np.int16)
    together = graph(pcm)
    alone = np.concatenate([graph(pcm[i : i + 1]) for i in range(len(pcm))])
    np.testing.assert_array_equal(together, alone)
