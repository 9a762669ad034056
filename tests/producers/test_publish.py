"""Blocks become exact chunks; while the bus is away the spool keeps its promise, and what is lost is named."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_bus import MemoryBus

from detector.chunk import CHUNK_SAMPLES, Location
from detector.errors import BusDamaged, ChunkError
from producers.publish import Publisher, new_session
from producers.source import Block, samples_to_ns

START_NS = 1_700_000_000_000_000_000


def publisher(bus: MemoryBus, spool_chunks: int = 10, **more: object) -> Publisher:
    return Publisher(
        bus.open,
        topic="audio.chunks",
        spool_seconds=0.96 * spool_chunks,
        first_retry_seconds=0.005,
        last_retry_seconds=0.02,
        **more,  # type: ignore[arg-type]
    )


def one_chunk(number: int) -> Block:
    return Block(np.full(CHUNK_SAMPLES, number, np.int16), START_NS + samples_to_ns(number * CHUNK_SAMPLES))


def wait_away(bus: MemoryBus) -> None:
    """Until the sender holds one batch and has failed with it at least once."""
    bus.wait_refused(bus.refused + 2)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 3 * CHUNK_SAMPLES), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_blocks_of_any_size_give_the_same_chunks(sizes: list[int], seed: int) -> None:
    pcm = np.random.default_rng(seed).integers(-32768, 32768, sum(sizes)).astype(np.int16)
    bus = MemoryBus()
    with publisher(bus, 100) as p:
        stream = p.stream("roof")
        start = 0
        for size in sizes:
            stream.write(Block(pcm[start : start + size], START_NS + samples_to_ns(start), start == 0))
            start += size
        stream.end_session()
    chunks = bus.chunks()
    count = -(-len(pcm) // CHUNK_SAMPLES)
    assert [c.seq for c in chunks] == list(range(count))
    assert len({c.session for c in chunks}) <= 1
    assert [c.captured_at_ns for c in chunks] == [START_NS + samples_to_ns(k * CHUNK_SAMPLES) for k in range(count)]
    padded = np.zeros(count * CHUNK_SAMPLES, np.int16)
    padded[: len(pcm)] = pcm
    assert np.array_equal(np.concatenate([c.pcm for c in chunks] or [padded]), padded)


def test_a_chunk_carries_what_is_known_of_its_stream() -> None:
    bus = MemoryBus()
    with publisher(bus, encoding="flac") as p:
        stream = p.stream("roof", location=Location.wgs84(40, -80, 230), clock_error_seconds=0.01, canary="t-1")
        stream.write(one_chunk(0))
    chunk = bus.chunks()[0]
    assert (chunk.stream_id, chunk.location) == ("roof", Location.wgs84(40, -80, 230))
    assert (chunk.clock_error_seconds, chunk.canary) == (0.01, "t-1")
    assert dict(bus.stored[0][2])["enc"] == b"flac"


def test_a_stream_id_that_no_chunk_could_have_is_refused_at_the_start() -> None:
    with publisher(MemoryBus()) as p, pytest.raises(ChunkError):
        p.stream("a\nb")


def test_a_new_session_pads_the_old_one_and_counts_from_zero() -> None:
    bus = MemoryBus()
    with publisher(bus) as p:
        stream = p.stream("roof")
        stream.write(Block(np.full(CHUNK_SAMPLES + 100, 1, np.int16), START_NS, True))
        stream.write(Block(np.full(50, 2, np.int16), START_NS + 10**10, True))
        stream.end_session()
    chunks = bus.chunks()
    assert [c.seq for c in chunks] == [0, 1, 0]
    assert chunks[0].session == chunks[1].session < chunks[2].session
    assert chunks[1].pcm[:101].tolist() == [1] * 100 + [0]
    assert (chunks[2].captured_at_ns, chunks[2].pcm[49], chunks[2].pcm[50]) == (START_NS + 10**10, 2, 0)


def test_what_a_source_does_to_its_buffer_later_does_not_reach_the_chunk() -> None:
    bus = MemoryBus()
    buffer = np.full(CHUNK_SAMPLES, 5, np.int16)
    bus.away.set()
    with publisher(bus) as p:
        p.stream("roof").write(Block(buffer, START_NS))
        buffer[:] = 6
        bus.away.clear()
    assert set(bus.chunks()[0].pcm.tolist()) == {5}


def test_sessions_sort_by_time_and_are_unique_even_when_the_clock_stands() -> None:
    sessions = [new_session(5) for _ in range(1000)]
    assert sorted(set(sessions)) == sessions


@pytest.mark.parametrize("how", ["away", "fail_flush"])
def test_within_the_bound_of_the_spool_nothing_is_lost_and_nothing_comes_twice(how: str) -> None:
    bus = MemoryBus()
    gone: threading.Event = getattr(bus, how)
    with publisher(bus, spool_chunks=8) as p:
        streams = [p.stream(f"s{k}") for k in range(3)]
        for stream in streams:
            stream.write(one_chunk(0))
        bus.wait_stored(3)
        gone.set()
        for number in range(1, 9):
            for stream in streams:
                stream.write(one_chunk(number))
        wait_away(bus)
        gone.clear()
        bus.wait_stored(27)
        report = p.close()
    assert (report.chunks_published, report.chunks_dropped, report.ranges, report.failure) == (27, 0, (), None)
    for stream in streams:
        mine = [c for c in bus.chunks() if c.stream_id == stream.stream_id]
        assert [c.seq for c in mine] == list(range(9))
        assert [int(c.pcm[0]) for c in mine] == list(range(9))


def test_beyond_the_bound_the_oldest_go_and_exactly_they_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bus = MemoryBus()
    bus.away.set()
    with publisher(bus, spool_chunks=5) as p:
        stream = p.stream("roof")
        stream.write(one_chunk(0))
        wait_away(bus)  # chunk 0 is being sent, and stays so
        for number in range(1, 20):
            stream.write(one_chunk(number))
        report = p.report()
        assert [(r.stream_id, r.session, r.first_seq, r.last_seq) for r in report.ranges] == [
            ("roof", stream.session, 1, 14)
        ]
        assert (report.chunks_dropped, report.spooled_max_chunks) == (14, 6)
        bus.away.clear()
        bus.wait_stored(6)
        stream.write(one_chunk(20))
        report = p.close()
    assert [c.seq for c in bus.chunks()] == [0, 15, 16, 17, 18, 19, 20]
    assert report.chunks_published + report.chunks_dropped == 21
    lost = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Lost: ")]
    assert lost == [f"Lost: stream roof, session {stream.session}: seq 1 to 14 (14 chunks, 13.44 s)."]


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=12))
def test_each_chunk_is_published_once_or_reported_lost(steps: list[tuple[bool, int, int]]) -> None:
    bus = MemoryBus()
    p = publisher(bus, spool_chunks=4)
    streams = [p.stream(f"s{k}") for k in range(3)]
    written = dict.fromkeys((s.stream_id for s in streams), 0)
    for away, which, count in steps:
        (bus.away.set if away else bus.away.clear)()
        for _ in range(count):
            streams[which].write(one_chunk(written[f"s{which}"]))
            written[f"s{which}"] += 1
    bus.away.clear()
    report = p.close()
    for stream in streams:
        name = stream.stream_id
        came = [c.seq for c in bus.chunks() if c.stream_id == name]
        lost = [n for r in report.ranges if r.stream_id == name for n in range(r.first_seq, r.last_seq + 1)]
        assert came == sorted(came)
        assert sorted(came + lost) == list(range(written[name]))


def test_a_stream_that_can_wait_loses_nothing() -> None:
    bus = MemoryBus()
    bus.away.set()
    p = publisher(bus, spool_chunks=3)
    stream = p.stream("file", waits=True)
    done = threading.Event()

    def write() -> None:
        for number in range(30):
            stream.write(one_chunk(number))
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    wait_away(bus)
    assert not done.is_set()
    bus.away.clear()
    thread.join(10)
    report = p.close()
    assert (report.chunks_published, report.chunks_dropped) == (30, 0)
    assert report.spooled_max_chunks <= 7


def test_once_stopped_nobody_waits_for_a_bus_that_is_away() -> None:
    bus, stop = MemoryBus(), threading.Event()
    bus.away.set()
    p = publisher(bus, spool_chunks=1, stop=stop)
    stream = p.stream("file", waits=True)
    thread = threading.Thread(target=lambda: [stream.write(one_chunk(n)) for n in range(5)])
    thread.start()
    wait_away(bus)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    report = p.close(0.1)
    assert (report.chunks_published, report.chunks_dropped) == (0, 5)


def test_closing_while_the_bus_is_away_ends_in_time_and_reports_what_is_lost() -> None:
    bus = MemoryBus()
    bus.away.set()
    p = publisher(bus)
    stream = p.stream("roof")
    for number in range(4):
        stream.write(one_chunk(number))
    wait_away(bus)
    report = p.close(deadline_seconds=0.2)
    assert (report.chunks_published, report.chunks_dropped) == (0, 4)
    assert sorted(n for r in report.ranges for n in range(r.first_seq, r.last_seq + 1)) == [0, 1, 2, 3]


def test_a_bus_that_is_damaged_ends_it_and_says_so() -> None:
    bus = MemoryBus()
    bus.damage = BusDamaged("bus.sqlite3 is no database.")
    p = publisher(bus)
    stream = p.stream("roof")
    stream.write(one_chunk(0))
    report = p.close()
    assert report.failure == "bus.sqlite3 is no database."
    assert report.chunks_dropped == 1


def test_memory_is_bounded_by_the_spool() -> None:
    bus = MemoryBus()
    bus.away.set()
    p = publisher(bus, spool_chunks=4)
    stream = p.stream("roof")
    for number in range(500):
        stream.write(one_chunk(number % 1000))
        assert len(stream._spool) <= 4
    p.close(0.0)
