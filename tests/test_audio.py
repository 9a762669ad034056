"""Any file becomes the same mono 16 kHz; what can't be read says which file and why."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.audio import (
    AudioReader,
    LiveResampler,
    ReferenceResampler,
    clip_16k,
    float_to_int16,
    int16_to_float,
    open_16k,
    open_audio,
    read_clip,
    resample_reference,
    stream_16k,
)
from detector.errors import AudioError

RATE_HZ = 16_000


def tone(rate_hz: int, seconds: float = 0.5, channels: int = 1) -> np.ndarray:
    t = np.arange(int(rate_hz * seconds)) / rate_hz
    x = 0.4 * np.sin(2 * np.pi * 440 * t)
    return x if channels == 1 else np.stack([x * (k + 1) / channels for k in range(channels)], axis=1)


def streamed(path: Path) -> np.ndarray:
    with open_16k(path) as blocks:
        return np.concatenate(list(blocks))


@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=200))
def test_int16_survives_the_way_through_float(values: list[int]) -> None:
    pcm = np.array(values, np.int16)
    assert np.array_equal(float_to_int16(int16_to_float(pcm)), pcm)


def test_a_16_bit_mono_16_khz_file_comes_through_bit_exact(tmp_path: Path) -> None:
    pcm = np.random.default_rng(1).integers(-32768, 32768, 40_001).astype(np.int16)
    pcm[:2] = [-32768, 32767]
    for name in ("a.wav", "a.flac", "a.aiff", "a.au", "a.w64", "a.caf"):
        soundfile.write(tmp_path / name, pcm, RATE_HZ, subtype="PCM_16")
        assert np.array_equal(streamed(tmp_path / name), pcm), name
        assert np.array_equal(float_to_int16(clip_16k(tmp_path / name)), pcm), name


# Format, subtype, greatest error at the given depth.
LIBSNDFILE = [
    ("WAV", "PCM_U8", 2**-7),
    ("WAV", "PCM_16", 2**-14),
    ("WAV", "PCM_24", 2**-22),
    ("WAV", "PCM_32", 2**-30),
    ("WAV", "FLOAT", 2**-22),
    ("WAV", "DOUBLE", 0),
    ("WAV", "ULAW", 0.05),
    ("WAV", "IMA_ADPCM", 0.1),
    ("AIFF", "PCM_S8", 2**-6),
    ("AIFF", "PCM_24", 2**-22),
    ("AU", "PCM_16", 2**-14),
    ("FLAC", "PCM_24", 2**-22),
    ("OGG", "VORBIS", 0.1),
    ("OGG", "OPUS", 0.3),
    ("MP3", "MPEG_LAYER_III", 0.3),
    ("RF64", "PCM_16", 2**-14),
]


@pytest.mark.parametrize(("kind", "subtype", "error"), LIBSNDFILE)
@pytest.mark.parametrize("channels", [1, 2])
def test_libsndfile_formats_are_read_by_content_whatever_their_name(
    tmp_path: Path, kind: str, subtype: str, error: float, channels: int
) -> None:
    rate_hz = 48_000
    x = tone(rate_hz, channels=channels)
    path = tmp_path / "sound.raw"  # a name that says nothing, and would mean headerless to libsndfile
    with path.open("wb") as file:
        soundfile.write(file, x, rate_hz, format=kind, subtype=subtype)
    clip = read_clip(path)
    assert (clip.rate_hz, clip.samples.shape[1], clip.notes) == (rate_hz, channels, ())
    lossy = subtype in ("OPUS", "MPEG_LAYER_III", "VORBIS")
    assert abs(len(clip.samples) - len(x)) <= (4000 if lossy else 600 if subtype == "IMA_ADPCM" else 0)
    n = min(len(x), len(clip.samples))
    assert np.max(np.abs(clip.samples[:n] - x.reshape(len(x), channels)[:n])[2000:-2000]) <= error


AV = [
    ("a.m4a", "aac", None, 44_100, "stereo"),
    ("a.m4a", "alac", "s16p", 44_100, "mono"),
    ("a.mp4", "aac", None, 48_000, "mono"),
    ("a.mka", "libopus", None, 48_000, "stereo"),
    ("a.ac3", "ac3", None, 48_000, "stereo"),
    ("a.avi", "pcm_s16le", None, 22_050, "mono"),
    ("a.mkv", "pcm_s24le", "s32", 48_000, "5.1"),
    ("a.mkv", "pcm_u8", "u8", 8_000, "mono"),
    ("a.mkv", "pcm_f64le", "dbl", 16_000, "stereo"),
]


def write_with_ffmpeg(path: Path, codec: str, sample_format: str | None, rate_hz: int, layout: str) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate_hz)
        stream.layout = layout
        if sample_format:
            stream.format = sample_format
        x = tone(rate_hz, 1.0).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(np.stack([x] * len(stream.layout.channels)), format="fltp", layout=layout)
        frame.sample_rate = rate_hz
        size = stream.codec_context.frame_size or 1024
        shaped = av.AudioResampler(format=stream.format, layout=layout, rate=rate_hz, frame_size=size)
        for part in [*shaped.resample(frame), *shaped.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(("name", "codec", "sample_format", "rate_hz", "layout"), AV)
def test_what_libsndfile_does_not_read_ffmpeg_does(
    tmp_path: Path, name: str, codec: str, sample_format: str | None, rate_hz: int, layout: str
) -> None:
    import av

    path = tmp_path / name
    try:
        write_with_ffmpeg(path, codec, sample_format, rate_hz, layout)
    except av.error.EncoderNotFoundError:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    mono = clip_16k(path)
    assert abs(len(mono) - RATE_HZ) < 2000
    middle = mono[4000:12_000]
    assert np.max(np.abs(np.fft.rfft(middle * np.hanning(8000)))) == pytest.approx(0.4 * 2000, rel=0.1)
    assert np.argmax(np.abs(np.fft.rfft(middle * np.hanning(8000)))) == 220  # 440 Hz in bins of 2 Hz


@pytest.mark.parametrize("channels", [1, 2, 6, 32, 64])
def test_mono_is_the_mean_over_up_to_64_channels(tmp_path: Path, channels: int) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (3000, channels))
    soundfile.write(tmp_path / "a.wav", x, RATE_HZ, subtype="DOUBLE")
    assert np.allclose(clip_16k(tmp_path / "a.wav"), x.mean(axis=1), atol=1e-12)


def test_more_than_64_channels_are_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((100, 65)), RATE_HZ)
    with pytest.raises(AudioError, match=r"a\.wav: 65 channels are not within 1 to 64"):
        open_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("rate_hz", [1, 999, 384_001, 768_000])
def test_rates_outside_the_limits_name_the_limits(tmp_path: Path, rate_hz: int) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(1000), rate_hz)
    with pytest.raises(AudioError, match=rf"a\.wav: Sample rate {rate_hz} Hz is not within 1000 to 384000 Hz"):
        open_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("rate_hz", [1000, 8000, 11_025, 12_000, 22_050, 44_100, 44_101, 48_000, 96_000, 384_000])
def test_a_file_read_in_blocks_equals_the_file_read_whole(tmp_path: Path, rate_hz: int) -> None:
    x = np.random.default_rng(0).uniform(-0.8, 0.8, (int(rate_hz * 1.3), 2))
    path = tmp_path / "a.wav"
    soundfile.write(path, x, rate_hz, subtype="PCM_24")
    whole = clip_16k(path)
    assert len(whole) == len(x) * 16_000 // rate_hz
    difference = np.abs(float_to_int16(whole).astype(int) - streamed(path))
    assert difference.max() <= 1
    assert np.mean(difference) < 1e-3  # a sample in a thousand may lie on a rounding edge


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([8000, 12_000, 44_100, 48_000, 15_999]),
    st.lists(st.integers(0, 40_000), min_size=1, max_size=12),
    st.integers(0, 2**32 - 1),
)
def test_pieces_of_any_size_resample_to_the_whole(rate_hz: int, sizes: list[int], seed: int) -> None:
    x = np.random.default_rng(seed).uniform(-1, 1, sum(sizes))
    resampler = ReferenceResampler(rate_hz)
    pieces = [resampler.process(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    joined = np.concatenate([*pieces, resampler.finish()])
    if len(x) * 16_000 // rate_hz < 1:
        assert len(joined) == 0
        return
    assert np.allclose(joined, resample_reference(x, rate_hz), atol=1e-9)


def test_the_reference_resampler_holds_no_more_than_context_and_piece() -> None:
    resampler = ReferenceResampler(44_100)
    for _ in range(50):
        resampler.process(np.zeros(44_100))
        assert len(resampler._held) < 3 * 44_100 + 2 * 441 + 400


def test_the_live_resampler_keeps_pitch_level_and_length() -> None:
    resampler = LiveResampler(48_000)
    x = tone(48_000, 2.0)
    y = np.concatenate([*(resampler.process(p) for p in np.array_split(x, 37)), resampler.finish()])
    assert len(y) == 32_000
    assert np.max(np.abs(y - tone(16_000, 2.0))[500:-500]) < 1e-3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_names_file_sample_and_channel(tmp_path: Path, value: float) -> None:
    x = np.zeros((30_000, 2))
    x[20_123, 1] = value
    x[20_124, 0] = value
    soundfile.write(tmp_path / "a.wav", x, 48_000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"a\.wav: sample 20123 of channel 1 is (nan|-?inf)"):
        read_clip(tmp_path / "a.wav")


def test_floats_beyond_full_scale_are_clipped_and_said(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.array([0.5, 3.0, -7.0, 1.0]), RATE_HZ, subtype="DOUBLE")
    clip = read_clip(tmp_path / "a.wav")
    assert clip.samples[:, 0].tolist() == [0.5, 1.0, -1.0, 1.0]
    assert clip.notes == ("2 values beyond ±1 were clipped",)


class _Live(AudioReader):
    def __init__(self, x: np.ndarray) -> None:
        super().__init__("live", RATE_HZ, 1, live=True)
        self._x = x

    def _decoded(self, block_samples: int) -> Iterator[np.ndarray]:
        yield self._x[:, None]


def test_live_values_that_are_no_numbers_become_zero_and_are_counted() -> None:
    reader = _Live(np.array([0.25, math.nan, math.inf, 2.0, -0.25]))
    assert np.concatenate(list(stream_16k(reader))).tolist() == [8192, 0, 0, 32767, -8192]
    assert (reader.replaced_samples, reader.clipped_samples) == (2, 1)


def bad_files(folder: Path) -> dict[str, str]:
    """File name -> what its message says."""
    (folder / "empty.wav").write_bytes(b"")
    (folder / "noise.wav").write_bytes(np.random.default_rng(3).bytes(5000))
    (folder / "text.mp3").write_text("this is no music\n" * 50)
    (folder / "header.wav").write_bytes(b"RIFF\x00\x00\x00\x00WAVE")
    soundfile.write(folder / "no_samples.wav", np.zeros(0), RATE_HZ)
    soundfile.write(folder / "short.wav", np.zeros(2), 48_000)
    (folder / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile://{folder}/good.wav\n")
    soundfile.write(folder / "good.wav", tone(RATE_HZ), RATE_HZ)
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "fifo.wav")
    return {
        "empty.wav": "is empty",
        "noise.wav": "no audio file",
        "text.mp3": "no audio file|no sound|holds no audio",
        "header.wav": "no audio file|no audio",
        "no_samples.wav": "holds no audio",
        "short.wav": "less than one sample",
        "list.m3u8": "no audio file|no sound|holds no audio",
        "folder.wav": "no regular file",
        "fifo.wav": "no regular file",
        "missing.wav": "can't be opened: No such file",
    }


def test_each_bad_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    for name, words in bad_files(tmp_path).items():
        with pytest.raises(AudioError, match=words) as caught:
            clip_16k(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.aiff"])
def test_what_is_there_of_a_truncated_file_is_read_and_the_cut_is_said(tmp_path: Path, name: str) -> None:
    pcm = np.random.default_rng(0).integers(-20_000, 20_000, 50_000).astype(np.int16)
    soundfile.write(tmp_path / name, pcm, RATE_HZ)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
    clip = read_clip(tmp_path / name)
    assert 20_000 < len(clip.samples) < 34_000
    assert np.array_equal(float_to_int16(clip.samples[:, 0]), pcm[: len(clip.samples)])
    assert "truncated" in clip.notes[0]


def test_a_header_that_promises_more_than_any_file_is_a_stream_not_a_cut(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(RATE_HZ), RATE_HZ)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    struct.pack_into("<I", data, 40, 0xFFFFFFFF)  # what a writer to a pipe leaves
    (tmp_path / "a.wav").write_bytes(data)
    clip = read_clip(tmp_path / "a.wav")
    assert (len(clip.samples), clip.notes) == (8000, ())


def test_damage_at_any_byte_is_an_audio_error_or_a_sound(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", tone(RATE_HZ, 0.2), RATE_HZ)
    whole = (tmp_path / "a.flac").read_bytes()
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(60):
        data = bytearray(whole[: int(rng.integers(1, len(whole) + 1))])
        for at in rng.integers(0, len(data), 5):
            data[at] = int(rng.integers(256))
        (tmp_path / "b.flac").write_bytes(data)
        try:
            assert np.isfinite(clip_16k(tmp_path / "b.flac")).all()
        except AudioError as e:
            messages.append(str(e))
    assert messages
    assert all("b.flac" in message for message in messages)


def test_reading_leaves_no_file_open(tmp_path: Path) -> None:
    names = [*bad_files(tmp_path), "good.wav"]
    write_with_ffmpeg(tmp_path / "a.mkv", "pcm_s16le", None, 16_000, "mono")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in [*names, "a.mkv"]:
        try:
            clip_16k(tmp_path / name)
        except AudioError:
            continue
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.golden
def test_whole_files_follow_the_reference_at_any_rate_and_channel_count(golden_dir: Path, tmp_path: Path) -> None:
    """The front end's golden signals through a file are what the conversions alone give."""
    golden = np.load(golden_dir / "vggish_frontend.npz", allow_pickle=False)
    names = [key.removeprefix("pcm_") for key in golden.files if key.startswith("pcm_")]
    assert names
    for name in names:
        pcm, rate_hz = golden[f"pcm_{name}"], int(golden[f"fs_{name}"])
        soundfile.write(tmp_path / "a.wav", pcm, rate_hz, subtype="PCM_16")
        mono = pcm / 32768.0 if pcm.ndim == 1 else np.mean(pcm / 32768.0, axis=1)
        assert np.array_equal(clip_16k(tmp_path / "a.wav"), resample_reference(mono, rate_hz)), name


def test_samples_that_no_reader_hands_out_are_the_files_error(tmp_path: Path) -> None:
    data = (np.sin(np.arange(32_000) * 0.05) * 2**62).astype("<i8").tobytes()
    form = struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 16_000 * 8, 8, 64)
    path = tmp_path / "s64.wav"
    path.write_bytes(
        b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + form + b"data" + struct.pack("<I", len(data)) + data
    )
    with pytest.raises(AudioError, match="s64"), open_audio(path) as reader:
        list(stream_16k(reader))
