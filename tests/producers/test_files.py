"""Recordings become streams; a bad one is reported and harms no other."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
from memory_bus import MemoryBus

from detector.audio import clip_16k, float_to_int16
from detector.chunk import CHUNK_SAMPLES, Chunk
from detector.errors import ConfigError
from producers.files import FilePlayer, FileStream, find_files, name_streams
from producers.publish import Publisher

START_NS = 1_700_000_000_000_000_000


def write(path: Path, samples: int, rate_hz: int = 16_000, seed: int = 0) -> np.ndarray:
    pcm = np.random.default_rng(seed).integers(-20_000, 20_000, samples).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, pcm, rate_hz, subtype="PCM_16")
    return pcm


def by_stream(chunks: list[Chunk]) -> dict[str, list[Chunk]]:
    streams: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        streams.setdefault(chunk.stream_id, []).append(chunk)
    return streams


def play(bus: MemoryBus, files: list[FileStream], **how: object) -> dict[Path, str]:
    with Publisher(bus.open, topic="audio.chunks") as publisher:
        player = FilePlayer(files, publisher, **{"realtime": False, **how})  # type: ignore[arg-type]
        return player.run(threading.Event()).failures


def test_each_file_is_a_stream_padded_at_its_end_and_timed_by_position(tmp_path: Path) -> None:
    pcm = {name: write(tmp_path / f"{name}.wav", n, seed=n) for name, n in (("a", 40_000), ("b", 15_360), ("c", 1))}
    bus = MemoryBus()
    assert play(bus, name_streams(find_files([tmp_path])), start_ns=START_NS) == {}
    streams = by_stream(bus.chunks())
    assert {name: len(chunks) for name, chunks in streams.items()} == {"a": 3, "b": 1, "c": 1}
    for name, chunks in streams.items():
        joined = np.concatenate([c.pcm for c in chunks])
        assert np.array_equal(joined[: len(pcm[name])], pcm[name])
        assert not joined[len(pcm[name]) :].any()
        assert [c.captured_at_ns for c in chunks] == [START_NS + k * 960_000_000 for k in range(len(chunks))]


def test_a_file_at_another_rate_is_resampled_the_reference_way(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", 50_000, 12_000)
    bus = MemoryBus()
    play(bus, name_streams([tmp_path / "a.wav"]))
    expected = float_to_int16(clip_16k(tmp_path / "a.wav"))
    joined = np.concatenate([c.pcm for c in bus.chunks()])[: len(expected)]
    assert np.abs(joined.astype(int) - expected).max() <= 1


def test_bad_files_are_reported_and_the_others_go_on(tmp_path: Path) -> None:
    good = write(tmp_path / "good.wav", 30_000)
    nan = np.zeros(40_000)
    nan[35_000] = np.nan
    soundfile.write(tmp_path / "nan.wav", nan, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "fast.wav", np.zeros(100), 768_000)
    soundfile.write(tmp_path / "slow.wav", np.zeros(100), 1)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "noise.wav").write_bytes(np.random.default_rng(0).bytes(999))
    missing = tmp_path / "missing.wav"
    bus = MemoryBus()
    failures = play(
        bus, [*name_streams([*find_files([tmp_path]), missing]), FileStream(tmp_path / "good.wav", "x" * 256)]
    )
    assert {p.name for p in failures} == {
        "nan.wav",
        "fast.wav",
        "slow.wav",
        "empty.wav",
        "noise.wav",
        "missing.wav",
        "good.wav",
    }
    assert all(str(path) in why for path, why in failures.items())
    streams = by_stream(bus.chunks())
    assert np.array_equal(np.concatenate([c.pcm for c in streams["good"]])[:30_000], good)
    assert len(streams["nan"]) == 3  # what came before the NaN was sent


def test_more_files_than_are_open_at_once_are_all_played(tmp_path: Path) -> None:
    for k in range(30):
        write(tmp_path / f"{k:02}.wav", 20_000, seed=k)
    bus = MemoryBus()
    play(bus, name_streams(find_files([tmp_path])), open_files=4)
    assert [len(c) for c in by_stream(bus.chunks()).values()] == [2] * 30


class Clock:
    """Time that passes only while someone waits for it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wall_ns(self) -> int:
        return START_NS

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return False


class WaitingStop(threading.Event):
    def __init__(self, clock: Clock, until_seconds: float) -> None:
        super().__init__()
        self._clock, self._until = clock, until_seconds

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self._clock.now += timeout
        if self._clock.now >= self._until:
            self.set()
        return self.is_set()


def realtime(bus: MemoryBus, files: list[FileStream], seconds: float, **how: object) -> list[tuple[str, int, float]]:
    """Play in a time of its own; return (stream, capture end in ns, seconds of publication)."""
    clock = Clock()
    written: list[tuple[str, int, float]] = []
    with Publisher(bus.open, topic="audio.chunks") as publisher:
        add = publisher._add

        def noted(stream: object, chunk: Chunk) -> None:
            written.append((chunk.stream_id, chunk.capture_end_ns, clock.now - 100.0))
            add(stream, chunk)  # type: ignore[arg-type]

        publisher._add = noted  # type: ignore[assignment]
        player = FilePlayer(
            files,
            publisher,
            realtime=True,
            wall_ns=clock.wall_ns,
            monotonic=clock.monotonic,
            **how,  # type: ignore[arg-type]
        )
        player.run(WaitingStop(clock, 100.0 + seconds))
    return written


def test_in_real_time_a_chunk_is_published_when_its_last_sample_is_captured(tmp_path: Path) -> None:
    for k in range(3):
        write(tmp_path / f"{k}.wav", 4 * CHUNK_SAMPLES, seed=k)
    written = realtime(MemoryBus(), name_streams(find_files([tmp_path])), 60, spread=True)
    assert len(written) == 12
    assert written[0][2] != written[1][2]  # spread over a chunk
    for _, capture_end_ns, at_seconds in written:
        assert (capture_end_ns - START_NS) / 1e9 == pytest.approx(at_seconds, abs=1e-6)


def test_a_loop_starts_a_new_session_each_round_until_it_is_stopped(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", 20_000)
    bus = MemoryBus()
    realtime(bus, name_streams([tmp_path / "a.wav"]), 6.0, loop=True)
    chunks = bus.chunks()
    assert [c.seq for c in chunks[:6]] == [0, 1, 0, 1, 0, 1]
    assert len({c.session for c in chunks}) == -(-len(chunks) // 2)
    assert [c.captured_at_ns for c in chunks] == sorted(c.captured_at_ns for c in chunks)


def test_streams_are_named_by_stem_or_what_makes_them_unique(tmp_path: Path) -> None:
    a, b, c = Path("x/a.wav"), Path("x/b.wav"), Path("y/a.wav")
    assert [s.stream_id for s in name_streams([a, b])] == ["a", "b"]
    assert [s.stream_id for s in name_streams([a, c])] == ["x/a", "y/a"]
    assert [s.stream_id for s in name_streams([a, b], "roof-{index}")] == ["roof-0", "roof-1"]
    with pytest.raises(ConfigError, match="both become stream 'one'"):
        name_streams([a, b], "one")
    for wrong in ("{nothing}", "{", "{stem.x}", "{0}"):
        with pytest.raises(ConfigError, match=r"there are \{stem\}"):
            name_streams([a], wrong)


def test_a_folder_gives_its_audio_files_and_an_empty_one_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "in" / "deep" / "B.WAV", 10)
    (tmp_path / "in" / "notes.txt").write_text("no audio")
    assert find_files([tmp_path / "in"]) == [tmp_path / "in" / "deep" / "B.WAV"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no audio files"):
        find_files([tmp_path / "empty"])
