import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.chunk import CHUNK_SAMPLES
from detector.embedders.params import CARRY_SAMPLES, EXAMPLE_SAMPLES
from detector.errors import ConfigError
from detector.examples import ExampleAssembler, hop_samples_of
from detector.onset import LOOKBACK_SAMPLES


def _recording(chunks: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-32768, 32768, chunks * CHUNK_SAMPLES).astype(np.int16)


def _assembled(pcm, hop_samples, first_seq=0):
    assembler = ExampleAssembler(hop_samples)
    found = []
    for k in range(len(pcm) // CHUNK_SAMPLES):
        part = pcm[k * CHUNK_SAMPLES : (k + 1) * CHUNK_SAMPLES]
        found.append(assembler.push(part, (first_seq + k) * CHUNK_SAMPLES))
    return found


@pytest.mark.parametrize("hop_samples", [CHUNK_SAMPLES, CHUNK_SAMPLES // 2])
def test_examples_are_those_of_240_zeros_and_the_whole_recording(hop_samples):
    pcm = _recording(5)
    whole = np.concatenate([np.zeros(CARRY_SAMPLES, np.int16), pcm])
    examples = [e for push in _assembled(pcm, hop_samples) for e in push]
    count = (len(whole) - EXAMPLE_SAMPLES) // hop_samples + 1
    assert [e.start_sample for e in examples] == [k * hop_samples - CARRY_SAMPLES for k in range(count)]
    for k, example in enumerate(examples):
        np.testing.assert_array_equal(example.pcm, whole[k * hop_samples : k * hop_samples + EXAMPLE_SAMPLES])
        assert example.end_sample == example.start_sample + EXAMPLE_SAMPLES


def test_each_chunk_yields_its_examples_at_once():
    assert [len(push) for push in _assembled(_recording(3), CHUNK_SAMPLES)] == [1, 1, 1]
    assert [len(push) for push in _assembled(_recording(3), CHUNK_SAMPLES // 2)] == [1, 2, 2]


@pytest.mark.parametrize("hop_samples", [CHUNK_SAMPLES, CHUNK_SAMPLES // 2])
def test_the_context_is_the_audio_before_the_example(hop_samples):
    pcm = _recording(4)
    padded = np.concatenate([np.zeros(CARRY_SAMPLES + LOOKBACK_SAMPLES, np.int16), pcm])
    for push in _assembled(pcm, hop_samples):
        for example in push:
            at = example.start_sample + CARRY_SAMPLES
            np.testing.assert_array_equal(example.context, padded[at : at + LOOKBACK_SAMPLES + EXAMPLE_SAMPLES])


@given(st.integers(0, 1000), st.sampled_from([CHUNK_SAMPLES, CHUNK_SAMPLES // 2]))
@settings(max_examples=20, deadline=None)
def test_after_a_reset_nothing_of_the_run_before_is_left(seed, hop_samples):
    before, after = _recording(2, seed), _recording(2, seed + 1)
    assembler = ExampleAssembler(hop_samples)
    assembler.push(before[:CHUNK_SAMPLES], 0)
    assembler.reset()
    fresh = ExampleAssembler(hop_samples)
    for k in (7, 8):
        part = after[(k - 7) * CHUNK_SAMPLES : (k - 6) * CHUNK_SAMPLES]
        ours, theirs = assembler.push(part, k * CHUNK_SAMPLES), fresh.push(part, k * CHUNK_SAMPLES)
        assert [e.start_sample for e in ours] == [e.start_sample for e in theirs]
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.context, b.context)


def test_a_hop_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"0\.96.*0\.48"):
        hop_samples_of(0.5)
