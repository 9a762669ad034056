"""From blocks to the bus: exact chunks, a bounded spool while the bus is away, and a word on what was lost.

Sources hand their blocks to a ``StreamPublisher`` each; one thread of the ``Publisher`` sends the chunks of all. While
the bus is away each stream keeps its last ``spool_seconds``; beyond that the oldest chunks are dropped, counted, and
named by stream, session and range of ``seq``. ``seq`` counts on, so that the detector sees the gap.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tenacity

from detector.audio import Int16Array
from detector.bus.base import Bus, Producer, TopicSettings
from detector.chunk import CHUNK_SAMPLES, CHUNK_SECONDS, Chunk, Encoding, Location, encode
from detector.errors import BusError, BusUnavailable, GunfireError
from producers.source import Block, samples_to_ns

_log = logging.getLogger(__name__)
_SEND_CHUNKS = 256  # handed to the bus between two flushes, over all streams
_FLUSH_SECONDS = 10.0
_KEPT_RANGES = 1000
_sessions = threading.Lock()
_last_session_ns = 0


def new_session(now_ns: int | None = None) -> str:
    """An id for a session: sorts by time of creation within this process, unique everywhere."""
    global _last_session_ns
    with _sessions:
        _last_session_ns = max(time.time_ns() if now_ns is None else now_ns, _last_session_ns + 1)
        return f"{_last_session_ns:016x}-{secrets.token_hex(6)}"


@dataclass(frozen=True, slots=True)
class Dropped:
    """Chunks ``first_seq`` to ``last_seq`` (inclusive) of one session never reached the bus."""

    stream_id: str
    session: str
    first_seq: int
    last_seq: int

    @property
    def chunks(self) -> int:
        return self.last_seq - self.first_seq + 1

    def __str__(self) -> str:
        return (
            f"stream {self.stream_id}, session {self.session}: seq {self.first_seq} to {self.last_seq} "
            f"({self.chunks} chunks, {self.chunks * CHUNK_SECONDS:.2f} s)"
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What a publisher did. ``ranges`` holds the last 1,000 of the dropped ranges; the log holds all."""

    streams: int
    chunks_published: int
    spooled_max_chunks: int
    chunks_dropped: int
    ranges: tuple[Dropped, ...]
    failure: str | None

    def __str__(self) -> str:
        return (
            f"{self.streams} streams, {self.chunks_published} chunks published, "
            f"at most {self.spooled_max_chunks} spooled, {self.chunks_dropped} dropped"
        )


class Publisher:
    """Sends chunks of many streams from one thread. Thread-safe; close it, or use it as a context manager."""

    def __init__(
        self,
        open_bus: Callable[[], Bus],
        *,
        topic: str,
        topic_settings: TopicSettings | None = None,
        encoding: Encoding = "pcm_s16le",
        spool_seconds: float = 60.0,
        first_retry_seconds: float = 0.1,
        last_retry_seconds: float = 15.0,
        stop: threading.Event | None = None,
    ) -> None:
        """Start the sending thread.

        Args:
            open_bus: called in that thread; raising BusUnavailable it is called again later.
            spool_seconds: what is kept of each stream while the bus is away.
            stop: once it is set, no ``write`` waits any longer for a bus that is away.
        """
        self._stop = stop or threading.Event()
        self._open_bus = open_bus
        self._topic = topic
        self._topic_settings = topic_settings or TopicSettings()
        self._encoding: Encoding = encoding
        self._spool_chunks = max(1, int(spool_seconds / CHUNK_SECONDS))
        self._wait = tenacity.wait_random_exponential(multiplier=first_retry_seconds, max=last_retry_seconds)
        self._bus: Bus | None = None
        self._producer: Producer | None = None
        self._changed = threading.Condition()
        self._streams: list[StreamPublisher] = []
        self._ready: dict[StreamPublisher, None] = {}  # those with spooled chunks, in the order of sending
        self._spooled = 0
        self._sending = 0
        self._spooled_max = 0
        self._published = 0
        self._dropped = 0
        self._ranges: deque[Dropped] = deque(maxlen=_KEPT_RANGES)
        self._closing = False
        self._deadline = float("inf")
        self._failure: str | None = None
        self._away = False
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def stream(
        self,
        stream_id: str,
        *,
        location: Location | None = None,
        clock_error_seconds: float | None = None,
        canary: str | None = None,
        waits: bool = False,
    ) -> StreamPublisher:
        """Open a stream. ``waits``: ``write`` waits for room instead of dropping (for sources that can wait).

        Raises ChunkError where the stream id or another header would not be accepted.
        """
        # A chunk checks its headers: what is wrong shows here, not in the middle of a stream.
        silence = np.zeros(CHUNK_SAMPLES, np.int16)
        pattern = Chunk(stream_id, new_session(), 0, 0, silence, location, clock_error_seconds, canary)
        opened = StreamPublisher(self, pattern, waits)
        with self._changed:
            self._streams.append(opened)
        return opened

    def report(self) -> Report:
        with self._changed:
            ranges = [*self._ranges, *(s._dropping for s in self._streams if s._dropping is not None)]
            return Report(
                len(self._streams),
                self._published,
                self._spooled_max,
                self._dropped,
                tuple(ranges[-_KEPT_RANGES:]),
                self._failure,
            )

    @property
    def failed(self) -> bool:
        """The bus is damaged for good; nothing more will be sent."""
        return self._failure is not None

    def close(self, deadline_seconds: float = 10.0) -> Report:
        """Send what is spooled, for at most so long; what then is left is lost and reported."""
        with self._changed:
            self._closing = True
            self._deadline = min(self._deadline, time.monotonic() + deadline_seconds)
            self._changed.notify_all()
        self._thread.join(deadline_seconds + _FLUSH_SECONDS)
        with self._changed:
            if self._thread.is_alive():
                self._failure = f"The bus did not answer in time; the fate of {self._sending} chunks is not known."
                _log.error("%s", self._failure)
            for stream in self._streams:
                stream._drop_all()
                stream._settle_dropped()
        return self.report()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # The streams' side; all with the lock held by the caller's `with`.

    def _add(self, stream: StreamPublisher, chunk: Chunk) -> None:
        with self._changed:
            while stream._waits and len(stream._spool) >= self._spool_chunks and not self._ended():
                self._changed.wait(0.2)
                if self._stop.is_set() and self._away:
                    break
            if self._ended():
                stream._drop(chunk)
                return
            if len(stream._spool) >= self._spool_chunks:
                stream._drop(stream._spool.popleft())
                self._spooled -= 1
            stream._spool.append(chunk)
            self._spooled += 1
            self._spooled_max = max(self._spooled_max, self._spooled + self._sending)
            self._ready.setdefault(stream)
            self._changed.notify_all()

    def _ended(self) -> bool:
        return self._failure is not None or (self._closing and not self._thread.is_alive())

    # The sending thread.

    def _run(self) -> None:
        try:
            while batch := self._take():
                self._deliver(batch)
        except tenacity.RetryError:
            pass  # close() ran out of time, and reports what is left
        except GunfireError as e:
            self._fail(str(e))
        except Exception as e:  # noqa: BLE001 - the thread's boundary: the streams must learn of it, whatever it was
            _log.exception("The publisher failed.")
            self._fail(f"{type(e).__name__}: {e}")
        finally:
            self._disconnect()

    def _fail(self, why: str) -> None:
        _log.error("Nothing more can be published: %s", why)
        with self._changed:
            self._failure = why
            self._changed.notify_all()

    def _take(self) -> list[tuple[StreamPublisher, Chunk]]:
        """Wait for chunks; take the oldest of each stream in turn. Empty: closing, and nothing is left."""
        with self._changed:
            while not self._ready and not self._closing:
                self._changed.wait()
            if time.monotonic() >= self._deadline:
                return []
            batch: list[tuple[StreamPublisher, Chunk]] = []
            while self._ready and len(batch) < _SEND_CHUNKS:
                stream = next(iter(self._ready))
                del self._ready[stream]
                batch.append((stream, stream._spool.popleft()))
                if stream._spool:
                    self._ready[stream] = None
            self._spooled -= len(batch)
            self._sending = len(batch)
            self._changed.notify_all()
            return batch

    def _deliver(self, batch: Sequence[tuple[StreamPublisher, Chunk]]) -> None:
        """Send and flush, again and again until it is done. What the bus has taken is never sent twice."""
        left = deque(batch)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(BusUnavailable),
            wait=self._wait,
            stop=self._out_of_time,
            sleep=self._sleep,
            before_sleep=self._say_away,
        )
        try:
            retrying(self._send, left)
        except Exception:
            # What was sent but not flushed may or may not arrive; it is reported as lost.
            with self._changed:
                for stream, chunk in batch:
                    stream._drop(chunk)
                self._sending = 0
            raise
        with self._changed:
            self._published += len(batch)
            self._sending = 0
            if self._away:
                self._away = False
                _log.info("The bus is back; %d chunks are waiting.", self._spooled)
                for stream in self._streams:
                    stream._settle_dropped()

    def _send(self, left: deque[tuple[StreamPublisher, Chunk]]) -> None:
        producer = self._connected()
        while left:
            key, value, headers = encode(left[0][1], self._encoding)
            producer.send(self._topic, key, value, headers)
            left.popleft()
        producer.flush(max(0.05, min(_FLUSH_SECONDS, self._deadline - time.monotonic())))

    def _connected(self) -> Producer:
        if self._producer is None:
            try:
                self._bus = self._open_bus()
                self._bus.create_topics({self._topic: self._topic_settings})
                self._producer = self._bus.producer()
            except BusError:
                self._disconnect()
                raise
        return self._producer

    def _disconnect(self) -> None:
        for part in (self._producer, self._bus):
            try:
                if part is not None:
                    part.close()
            except BusError as e:
                _log.warning("While closing the bus: %s", e)
        self._producer = self._bus = None

    def _out_of_time(self, _: tenacity.RetryCallState) -> bool:
        return time.monotonic() >= self._deadline

    def _sleep(self, seconds: float) -> None:
        """Wait before the next try; less where close() asks to hurry."""
        end = time.monotonic() + seconds
        with self._changed:
            hurried = self._closing
            while (rest := min(end, self._deadline) - time.monotonic()) > 0:
                self._changed.wait(rest)
                if self._closing and not hurried:
                    return

    def _say_away(self, state: tenacity.RetryCallState) -> None:
        if not self._away and state.outcome is not None:
            self._away = True
            _log.warning(
                "The bus is away, keeping up to %d chunks a stream: %s", self._spool_chunks, state.outcome.exception()
            )


class StreamPublisher:
    """One stream: cuts blocks of any size into chunks. For one thread at a time."""

    def __init__(self, publisher: Publisher, pattern: Chunk, waits: bool) -> None:
        self._publisher = publisher
        self._pattern = pattern
        self._waits = waits
        self._spool: deque[Chunk] = deque()
        self._dropping: Dropped | None = None
        self._session = pattern.session
        self._seq = 0
        self._parts: list[tuple[Int16Array, int]] = []  # (samples, capture time) of the unfinished chunk
        self._samples = 0

    @property
    def stream_id(self) -> str:
        return self._pattern.stream_id

    @property
    def next_seq(self) -> int:
        """Number the next chunk of the session will get."""
        return self._seq

    @property
    def session(self) -> str:
        """Id of the running session."""
        return self._session

    def write(self, block: Block) -> None:
        """Take the next block of ``(n,) int16``; spool each chunk it completes.

        A chunk's capture time is that of its first sample, by the block this sample came with.
        """
        if block.starts_session:
            self.end_session()
        pcm, at_ns, taken = block.pcm, block.captured_at_ns, 0
        while taken < len(pcm):
            part = pcm[taken : taken + CHUNK_SAMPLES - self._samples]
            self._parts.append((part, at_ns + samples_to_ns(taken)))
            self._samples += len(part)
            taken += len(part)
            if self._samples == CHUNK_SAMPLES:
                self._finish_chunk()

    def end_session(self) -> None:
        """Send an unfinished chunk, zeros behind it; the next block starts a new session with ``seq`` 0."""
        if self._samples:
            self._parts.append((np.zeros(CHUNK_SAMPLES - self._samples, np.int16), 0))
            self._finish_chunk()
        if self._seq:
            self._session, self._seq = new_session(), 0

    def _finish_chunk(self) -> None:
        # Always a copy: what a source hands over may be a view of a buffer it uses again.
        pcm = np.concatenate([part for part, _ in self._parts])
        chunk = replace(self._pattern, session=self._session, seq=self._seq, captured_at_ns=self._parts[0][1], pcm=pcm)
        self._parts, self._samples = [], 0
        self._seq += 1
        self._publisher._add(self, chunk)

    # With the publisher's lock held.

    def _drop(self, chunk: Chunk) -> None:
        self._publisher._dropped += 1
        run = self._dropping
        if run is not None and (run.session, run.last_seq + 1) == (chunk.session, chunk.seq):
            self._dropping = replace(run, last_seq=chunk.seq)
            return
        if run is None:
            _log.warning("Stream %s: dropping from seq %d on: the spool is full.", self.stream_id, chunk.seq)
        self._settle_dropped()
        self._dropping = Dropped(self.stream_id, chunk.session, chunk.seq, chunk.seq)

    def _drop_all(self) -> None:
        while self._spool:
            self._drop(self._spool.popleft())
            self._publisher._spooled -= 1
        self._publisher._ready.pop(self, None)

    def _settle_dropped(self) -> None:
        if self._dropping is not None:
            _log.error("Lost: %s.", self._dropping)
            self._publisher._ranges.append(self._dropping)
            self._dropping = None
