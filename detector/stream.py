"""StreamState: ALL mutable state of one stream, with one ``reset()``.

A stream is a run of chunks of one session with consecutive sequence numbers. Whatever breaks the run (a gap, a new
session) ends it: its open alert closes, and everything begins anew. Audio is never spliced.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from detector.bus.base import TopicPartition
from detector.chunk import CHUNK_SAMPLES, RATE_HZ, Chunk, ChunkHead, Location
from detector.decision import Decision, DecisionSettings, InterruptReason
from detector.embedders.params import EMBEDDING_SIZE
from detector.examples import Example, ExampleAssembler

_NS = 1_000_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """A chunk and where it was read; ``topic_partition`` and ``offset`` are None offline.

    ``seen_seconds`` is the reader's own clock. It serves only to notice streams that went silent: clocks of producers
    and records are not to be trusted for that, as one that is wrong would end its neighbours' streams.
    """

    chunk: Chunk
    topic_partition: TopicPartition | None = None
    offset: int | None = None
    seen_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ChunkMark:
    """What stays known of a chunk after its audio is gone."""

    session: str
    seq: int
    captured_at_ns: int
    location: Location | None
    clock_error_seconds: float | None
    canary: str | None
    topic_partition: TopicPartition | None
    offset: int | None
    seen_seconds: float

    @staticmethod
    def of(arrival: Arrival) -> ChunkMark:
        chunk = arrival.chunk
        return ChunkMark(
            session=chunk.session,
            seq=chunk.seq,
            captured_at_ns=chunk.captured_at_ns,
            location=chunk.location,
            clock_error_seconds=chunk.clock_error_seconds,
            canary=chunk.canary,
            topic_partition=arrival.topic_partition,
            offset=arrival.offset,
            seen_seconds=arrival.seen_seconds,
        )

    @staticmethod
    def of_left_out(head: ChunkHead, partition: TopicPartition, offset: int, seen_seconds: float) -> ChunkMark:
        return ChunkMark(
            head.session, head.seq, head.captured_at_ns, None, None, None, partition, offset, seen_seconds
        )  # fmt: skip

    @property
    def first_sample(self) -> int:
        return self.seq * CHUNK_SAMPLES

    @property
    def end_sample(self) -> int:
        return self.first_sample + CHUNK_SAMPLES

    @property
    def capture_end_ns(self) -> int:
        return self.captured_at_ns + CHUNK_SAMPLES * _NS // RATE_HZ


class Window:
    """The last ``examples`` embeddings of a run, ``stride`` apart (2 where examples overlap by half: the classifiers
    learnt 0.96 s steps)."""

    def __init__(self, examples: int, stride: int) -> None:
        self._examples = examples
        self._stride = stride
        self._ring = np.zeros((examples * stride, EMBEDDING_SIZE), np.float32)
        self._count = 0

    @property
    def span_chunks(self) -> int:
        return self._examples

    def push(self, embedding: npt.NDArray[np.float32]) -> None:
        self._ring[self._count % len(self._ring)] = embedding
        self._count += 1

    def write(self, out: npt.NDArray[np.float32]) -> int:
        """Write the window that ends at the newest embedding, oldest first, to ``out`` ``(examples, 128)``; the rest of
        ``out`` is left as it is. Return how many rows were written."""
        steps = min(self._examples, -(-self._count // self._stride))
        newest = self._count - 1
        for row in range(steps):
            out[row] = self._ring[(newest - (steps - 1 - row) * self._stride) % len(self._ring)]
        return steps

    def reset(self) -> None:
        self._count = 0


class StreamState:
    """One sensor's run. Memory is bounded: window, look-back, and one mark a chunk for as long as an alert may last.

    Chunks are accepted ahead of being embedded, and embedded ahead of being decided. Each of the three steps has its
    own part of the state, and is told on its own where a run ends: ``assembler`` and ``newest``; ``window``;
    ``decision`` and ``marks``. ``reset`` is all of them.
    """

    def __init__(self, stream_id: str, *, hop_samples: int, window_examples: int, decision: DecisionSettings) -> None:
        self.stream_id = stream_id
        self.assembler = ExampleAssembler(hop_samples)
        self.newest: ChunkMark | None = None
        self.skipping = False  # the run has ended, audio is left out up to the next chunk accepted
        self.unread = False  # records were passed over unread since ``newest``
        self.window = Window(window_examples, CHUNK_SAMPLES // hop_samples)
        self.decision = Decision(decision)
        self.marks: deque[ChunkMark] = deque()

    def reset(self) -> None:
        """Forget all; the next chunk begins a new run."""
        self.newest = None
        self.skipping = self.unread = False
        self.assembler.reset()
        self.window.reset()
        self.forget_decided()

    def is_duplicate(self, chunk: Chunk | ChunkHead) -> bool:
        """The run has been past this chunk: it was sent or read twice."""
        return self.newest is not None and chunk.session == self.newest.session and chunk.seq <= self.newest.seq

    def missing_before(self, chunk: Chunk | ChunkHead) -> int:
        """How many chunks of the session never came; 0 where that can't be told."""
        if self.newest is None or self.unread or chunk.session != self.newest.session:
            return 0
        return chunk.seq - self.newest.seq - 1

    def break_before(self, chunk: Chunk) -> InterruptReason | None:
        """Why ``chunk`` does not continue the run; None where it does, or where there is nothing to continue."""
        if self.newest is None or self.skipping:
            return None
        if chunk.session != self.newest.session:
            return "new_session"
        return "gap" if self.missing_before(chunk) else None

    def accept(self, arrival: Arrival) -> list[Example]:
        """Add the run's next chunk; return the examples it completes."""
        self.newest = ChunkMark.of(arrival)
        self.skipping = self.unread = False
        return self.assembler.push(arrival.chunk.pcm, arrival.chunk.first_sample)

    def leave_out(self, mark: ChunkMark) -> None:
        """Pass over the next chunk. The run must have ended."""
        self.newest = mark
        self.skipping, self.unread = True, False

    def forget_decided(self) -> None:
        """What is decided next is not contiguous with what was decided before."""
        self.decision.reset()
        self.marks.clear()

    def begin_chunk(self, mark: ChunkMark) -> None:
        """The chunk's examples are about to be decided."""
        self.marks.append(mark)

    def end_chunk(self) -> None:
        """The newest chunk is decided: forget the marks that nothing can need any more."""
        oldest = self._oldest_sample_needed()
        while len(self.marks) > 1 and self.marks[0].end_sample <= oldest:
            self.marks.popleft()

    def at_ns(self, sample: int) -> int:
        """Capture time of a sample of the run, by the clock of the chunk that holds it."""
        mark = self._mark_of(sample)
        return max(0, mark.captured_at_ns + (sample - mark.first_sample) * _NS // RATE_HZ)

    def offset_of(self, sample: int) -> int | None:
        """Offset of the chunk that holds the sample."""
        return self._mark_of(sample).offset

    def canary_in(self, first_sample: int, end_sample: int) -> str | None:
        """The canary of the first chunk with one that overlaps the samples."""
        for mark in self.marks:
            if mark.canary and mark.first_sample < end_sample and mark.end_sample > first_sample:
                return mark.canary
        return None

    @property
    def rebuild_offset(self) -> int | None:
        """From where the log must be read again to rebuild window and decision exactly; None if nothing was scored."""
        return self.marks[0].offset if self.marks else None

    def _mark_of(self, sample: int) -> ChunkMark:
        for mark in reversed(self.marks):
            if mark.first_sample <= sample:
                return mark
        return self.marks[0]  # before the run: by the clock of its first chunk

    def _oldest_sample_needed(self) -> int:
        next_sample = self.marks[-1].end_sample
        since = self.decision.oldest_sample_needed
        oldest = next_sample if since is None else min(since, next_sample)
        # before that example its window, and before the window's oldest the carry-over and the look-back
        return oldest - (self.window.span_chunks + 2) * CHUNK_SAMPLES
