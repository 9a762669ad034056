"""Chunks in -> alerts out. No bus, no clock, no threads: the same chunks give the same alerts, whoever feeds them.

``submit`` takes chunks as they arrive and cuts them into examples at once; ``run`` takes what gathered through network,
window, classifier and decision, in batches over all streams. The daemon, ``scan`` and ``replay`` all drive this one.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from detector.alert import Alert, AudioRange, ModelIdentity, build
from detector.bus.base import TopicPartition
from detector.chunk import ChunkHead
from detector.decision import DecisionSettings, InterruptReason, ScoredExample, Transition
from detector.embedders.params import EMBEDDING_SIZE
from detector.errors import ChunkError, ConfigError
from detector.examples import Example, hop_samples_of
from detector.onset import LOOKBACK_SAMPLES, ONSET_RULES, SEARCH_BACK_SAMPLES, Onset, find_onsets
from detector.operating_point import choose_threshold
from detector.stream import Arrival, ChunkMark, StreamState

if TYPE_CHECKING:
    from detector import config
    from detector.config import Settings
    from detector.model import Manifest, Model

Float32Array = npt.NDArray[np.float32]
StageTimer = Callable[[str], AbstractContextManager[object]]
_ALL, _NONE = -(2**63), 2**63
Observer = Callable[[str, ScoredExample, float], None]


class Scorer(Protocol):
    """What the pipeline needs of a model."""

    def embed(self, pcm: npt.NDArray[np.int16]) -> Float32Array:
        """``(n, 15600) int16`` -> ``(n, 128)``."""
        ...

    def classify(self, windows: Float32Array, num_frames: npt.NDArray[np.int32]) -> Float32Array:
        """``(n, T, 128)`` and how many rows of each count -> ``(n, V)`` probabilities."""
        ...


@dataclass(slots=True)
class Account:
    """What became of every chunk. ``accepted = analysed + rebuilt + in progress``."""

    accepted: int = 0
    analysed: int = 0
    rebuilt: int = 0
    duplicates: int = 0
    missing: int = 0
    examples: int = 0
    scored: int = 0
    batches: list[int] = field(default_factory=list)
    resets: Counter[str] = field(default_factory=Counter)


class Taken(NamedTuple):
    """What became of a chunk that was handed in.

    Attributes:
        is_duplicate: it had been seen, and was dropped.
        missing: how many chunks of its session never came before it.
    """

    is_duplicate: bool
    missing: int


_DUPLICATE, _NEXT = Taken(True, 0), Taken(False, 0)


@dataclass(frozen=True, slots=True)
class Rebuild:
    """How a partition's state is rebuilt from the log, in silence.

    Attributes:
        until: first offset whose outputs have not been committed yet; what lies before is read in silence.
        since: by ``stream_key``, for each stream whose decision remembered something at ``until``: the first sample of
            the example from which the decision must be fed.
        feed_rest: whether all other streams' decisions are fed as well, from the first chunk read on. False where
            ``since`` is complete: the others remembered nothing.
    """

    until: int
    since: Mapping[bytes, int]
    feed_rest: bool = False


def stream_key(stream_id: str) -> bytes:
    """Six bytes that stand for a stream where room is short."""
    return hashlib.blake2b(stream_id.encode(), digest_size=6).digest()


@dataclass(frozen=True, slots=True)
class Emitted:
    """An alert, and the end of the capture of the chunk that decided it (Unix nanoseconds)."""

    alert: Alert
    capture_end_ns: int


@dataclass(frozen=True, slots=True, eq=False)
class _ChunkWork:
    """An accepted chunk, waiting for the network."""

    stream: StreamState
    mark: ChunkMark
    examples: Sequence[Example]
    silent: bool
    decide_from_sample: int


@dataclass(frozen=True, slots=True, eq=False)
class _RunEnd:
    """Here a run ends: what comes after it is another."""

    stream: StreamState
    reason: InterruptReason
    silent: bool


class Pipeline:
    """The whole walk for any number of streams. Not thread-safe.

    Args:
        labels, model: what the scores mean, and who gives them.
        window_examples: T, how many embeddings the classifier sees.
        max_batch: most examples of one network call.
        max_streams: memory bound; a chunk of one stream more is refused.
        idle_seconds: a stream of which nothing was seen for longer is forgotten and its alert closed.
        stage_timer: called with a stage's name; the context manager it returns spans the stage.
        observer: called with stream id, scored example and family score of each example, in order.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        labels: Sequence[str],
        model: ModelIdentity,
        window_examples: int,
        decision: DecisionSettings,
        hop_seconds: float = 0.96,
        max_batch: int = 64,
        max_streams: int = 10_000,
        idle_seconds: float = 60.0,
        stage_timer: StageTimer | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._scorer = scorer
        self.labels = labels
        self.model = model
        self.window_examples = window_examples
        self.decision = decision
        self.hop_samples = hop_samples_of(hop_seconds)
        self._max_batch = max_batch
        self._max_streams = max_streams
        self._idle_seconds = idle_seconds
        self._stage = stage_timer or (lambda stage: nullcontext())
        self._observer = observer
        self._streams: dict[str, StreamState] = {}
        self._work: deque[_ChunkWork | _RunEnd] = deque()
        self._rebuilds: dict[TopicPartition, Rebuild] = {}
        self.account = Account()

    @property
    def served(self) -> str:
        """What decides here: 16 hex digits that change with the model, with every setting that sways a decision, and
        with the rules for onsets."""
        text = repr((self.model.sha256, self.decision, self.hop_samples, self.window_examples, ONSET_RULES))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    @property
    def open_alert_count(self) -> int:
        return sum(stream.decision.is_open for stream in self._streams.values())

    @property
    def examples_in_progress(self) -> int:
        return self.account.examples - self.account.scored

    def submit(self, arrival: Arrival) -> Taken:
        """Take a chunk into its stream and cut its examples; ``run`` does the rest.

        Raises:
            ChunkError: ``too_many_streams``; nothing else changed.
        """
        chunk = arrival.chunk
        stream = self._stream_of(chunk.stream_id)
        silent, decide_from_sample = self._silence(arrival)
        if stream.is_duplicate(chunk):
            self.account.duplicates += not silent
            return _DUPLICATE
        missing = stream.missing_before(chunk)
        if reason := stream.break_before(chunk):
            self._end_run(stream, reason, silent)
        if not silent:
            self.account.missing += missing
        examples = stream.accept(arrival)
        self.account.accepted += 1
        self.account.examples += len(examples)
        self._work.append(_ChunkWork(stream, ChunkMark.of(arrival), examples, silent, decide_from_sample))
        return Taken(False, missing) if missing else _NEXT

    def _stream_of(self, stream_id: str) -> StreamState:
        """Its state; a fresh one where it is new."""
        stream = self._streams.get(stream_id)
        if stream is None:
            if len(self._streams) >= self._max_streams:
                raise ChunkError(
                    "too_many_streams",
                    f"Stream {stream_id!r} would be one more than max_streams ({self._max_streams}); raise it, "
                    "or give the topic more partitions and start another detector.",
                )
            stream = self._streams[stream_id] = StreamState(
                stream_id,
                hop_samples=self.hop_samples,
                window_examples=self.window_examples,
                decision=self.decision,
            )
        return stream

    def run(self) -> list[Emitted]:
        """Score and decide everything submitted; return what there is to tell, in order."""
        emitted: list[Emitted] = []
        while self._work:
            emitted += self._run_batch(self._next_batch())
        return emitted

    def forget_idle(self, now_seconds: float) -> list[Emitted]:
        """Drop streams of which nothing was seen since ``now_seconds`` less the idle time; close their alerts.

        Nothing may be waiting for ``run``.
        """
        lost = [
            stream.stream_id
            for stream in self._streams.values()
            if stream.newest is not None and now_seconds - stream.newest.seen_seconds > self._idle_seconds
        ]
        return [emitted for stream_id in lost for emitted in self.end_stream(stream_id)]

    def end_stream(self, stream_id: str) -> list[Emitted]:
        """The stream is over: close its alert and forget it. Nothing may be waiting for ``run``."""
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            return []
        self._end_run(stream, "stream_lost", silent=False)
        return self.run()

    def skip(self, partition: TopicPartition) -> list[Emitted]:
        """What comes next of the partition is left out: end its streams' runs there, so that nothing is spliced.

        What is left out goes to ``leave_out``, and where it is not even read ``pass_over`` is told. Nothing may be
        waiting for ``run``.
        """
        for stream in self._streams_of(partition):
            if not stream.skipping:
                self._end_run(stream, "overload", silent=False)
                stream.skipping = True
        return self.run()

    def leave_out(self, head: ChunkHead, partition: TopicPartition, offset: int, seen_seconds: float) -> Taken:
        """Pass over a chunk of a partition for which ``skip`` was called; its stream goes on behind it.

        Raises:
            ChunkError: ``too_many_streams``; nothing changed.
        """
        stream = self._stream_of(head.stream_id)
        if stream.is_duplicate(head):
            self.account.duplicates += 1
            return _DUPLICATE
        missing = stream.missing_before(head)
        self.account.missing += missing
        if stream.newest is not None and not stream.skipping:  # it was in another partition
            self._end_run(stream, "overload", silent=False)
        stream.leave_out(ChunkMark.of_left_out(head, partition, offset, seen_seconds))
        return Taken(False, missing) if missing else _NEXT

    def pass_over(self, partition: TopicPartition) -> None:
        """Records of a partition for which ``skip`` was called were passed over unread: what is missing after them is
        not missing."""
        for stream in self._streams_of(partition):
            stream.unread = True

    def stream_count_of(self, partition: TopicPartition) -> int:
        """How many streams are known to lie in the partition."""
        return len(self._streams_of(partition))

    def _streams_of(self, partition: TopicPartition) -> list[StreamState]:
        return [s for s in self._streams.values() if s.newest and s.newest.topic_partition == partition]

    def rebuild(self, partition: TopicPartition, plan: Rebuild) -> None:
        """Until ``plan.until`` read this partition in silence: state is rebuilt, nothing is emitted."""
        self._rebuilds[partition] = plan

    def drop_partition(self, partition: TopicPartition) -> None:
        """Forget the partition's streams, their waiting work and its rebuild; another member has it now."""
        self._rebuilds.pop(partition, None)
        gone = {s.stream_id for s in self._streams_of(partition)}
        for stream_id in gone:
            del self._streams[stream_id]
        for work in self._work:
            if work.stream.stream_id in gone and isinstance(work, _ChunkWork):
                self.account.examples -= len(work.examples)
                self.account.accepted -= 1
        self._work = deque(w for w in self._work if w.stream.stream_id not in gone)

    def rebuild_plans(self, until: Mapping[TopicPartition, int]) -> dict[TopicPartition, tuple[int, dict[bytes, int]]]:
        """What to keep beside the offsets about to be committed so that ``rebuild`` restores this very state.

        For each partition the offset to read from and ``Rebuild.since``. Nothing may be waiting for ``run``.
        """
        plans: dict[TopicPartition, tuple[int, dict[bytes, int]]] = {tp: (offset, {}) for tp, offset in until.items()}
        for stream in self._streams.values():
            offset = stream.rebuild_offset
            partition = stream.newest.topic_partition if stream.newest else None
            if offset is None or partition is None or partition not in plans:
                continue
            start, since = plans[partition]
            needed = stream.decision.oldest_sample_needed
            if needed is not None:
                since[stream_key(stream.stream_id)] = needed
            if offset < start:
                plans[partition] = (offset, since)
        return plans

    def _silence(self, arrival: Arrival) -> tuple[bool, int]:
        """Whether nothing of this chunk may be emitted, and from which sample on the decision is to be fed."""
        plan = None if arrival.topic_partition is None else self._rebuilds.get(arrival.topic_partition)
        if plan is None or arrival.offset is None or arrival.offset >= plan.until:
            return False, _ALL
        return True, plan.since.get(stream_key(arrival.chunk.stream_id), _ALL if plan.feed_rest else _NONE)

    def _end_run(self, stream: StreamState, reason: InterruptReason, silent: bool) -> None:
        if not silent:
            self.account.resets[reason] += 1
        stream.assembler.reset()
        self._work.append(_RunEnd(stream, reason, silent))

    def _next_batch(self) -> list[_ChunkWork | _RunEnd]:
        """Work in order of arrival, with at most ``max_batch`` examples (or one chunk's)."""
        batch: list[_ChunkWork | _RunEnd] = []
        examples = 0
        while self._work:
            work = self._work[0]
            count = len(work.examples) if isinstance(work, _ChunkWork) else 0
            if examples and examples + count > self._max_batch:
                break
            examples += count
            batch.append(self._work.popleft())
        return batch

    def _run_batch(self, batch: Sequence[_ChunkWork | _RunEnd]) -> list[Emitted]:
        chunks = [w for w in batch if isinstance(w, _ChunkWork)]
        examples = [e for w in chunks for e in w.examples]
        scores: Iterator[Float32Array] = iter(())
        embeddings: Iterator[Float32Array] = iter(())
        windows = np.zeros((len(examples), self.window_examples, EMBEDDING_SIZE), np.float32)
        num_frames = np.zeros(len(examples), np.int32)
        if examples:
            pcm = np.stack([e.pcm for e in examples])
            with self._stage("embed"):
                embeddings = iter(self._scorer.embed(pcm))
        row = 0
        for work in batch:
            if isinstance(work, _RunEnd):
                work.stream.window.reset()
                continue
            for _ in work.examples:
                work.stream.window.push(next(embeddings))
                num_frames[row] = work.stream.window.write(windows[row])
                row += 1
        if examples:
            with self._stage("classify"):
                scores = iter(self._scorer.classify(windows, num_frames))
            self.account.batches.append(len(examples))
        emitted: list[Emitted] = []
        with self._stage("decide"):
            for work in batch:
                if isinstance(work, _RunEnd):
                    emitted += self._end(work)
                else:
                    emitted += self._decide(work, scores)
        return emitted

    def _end(self, work: _RunEnd) -> list[Emitted]:
        stream = work.stream
        transitions = stream.decision.interrupt(work.reason)
        emitted = [] if work.silent else [self._emit(stream, t) for t in transitions]
        stream.forget_decided()
        return emitted

    def _decide(self, work: _ChunkWork, scores: Iterator[Float32Array]) -> list[Emitted]:
        stream = work.stream
        stream.begin_chunk(work.mark)
        emitted: list[Emitted] = []
        for example in work.examples:
            scored = ScoredExample(example.start_sample, example.end_sample, next(scores).tolist())
            self.account.scored += 1
            if scored.start_sample < work.decide_from_sample:
                continue
            transitions = stream.decision.step(scored, partial(_find_onsets, example))
            if work.silent:
                continue
            emitted += [self._emit(stream, t) for t in transitions]
            if self._observer is not None:
                self._observer(stream.stream_id, scored, self.decision.family_score(scored.scores))
        stream.end_chunk()
        if work.silent:
            self.account.rebuilt += 1
        else:
            self.account.analysed += 1
        return emitted

    def _emit(self, stream: StreamState, transition: Transition) -> Emitted:
        newest = stream.marks[-1]
        first_sample = min(transition.first_sample, transition.onset_sample)
        first_offset = stream.offset_of(first_sample)
        audio = None
        if newest.topic_partition is not None and newest.offset is not None and first_offset is not None:
            audio = AudioRange(*newest.topic_partition, first_offset, newest.offset)
        alert = build(
            transition,
            stream=stream.stream_id,
            session=newest.session,
            labels=self.labels,
            settings=self.decision,
            clock=stream,
            model=self.model,
            audio=audio,
            location=newest.location,
            clock_error_seconds=newest.clock_error_seconds,
            canary=stream.canary_in(first_sample, transition.last_sample),
        )
        return Emitted(alert, newest.capture_end_ns)


def _find_onsets(example: Example) -> list[Onset]:
    first_sample = example.start_sample - LOOKBACK_SAMPLES
    return find_onsets(example.context, first_sample, search_from=example.start_sample - SEARCH_BACK_SAMPLES)


def pipeline_for(
    model: Model,
    settings: Settings,
    *,
    stage_timer: StageTimer | None = None,
    observer: Observer | None = None,
) -> Pipeline:
    """The pipeline that serves ``model`` as the configuration says.

    Raises:
        ConfigError: the configuration names labels that the model does not have.
    """
    return Pipeline(
        model,
        labels=model.labels,
        model=ModelIdentity(model.name, model.version, model.sha256),
        window_examples=model.window_examples,
        decision=decision_settings(model.manifest, settings.decision, settings.batch.hop_seconds),
        hop_seconds=settings.batch.hop_seconds,
        max_batch=settings.batch.max_batch,
        max_streams=settings.daemon.max_streams,
        idle_seconds=settings.daemon.stream_idle_seconds,
        stage_timer=stage_timer,
        observer=observer,
    )


def decision_settings(
    manifest: Manifest, configured: config.DecisionSettings, hop_seconds: float = 0.96
) -> DecisionSettings:
    """What the configuration says, and the model's own values where it says nothing.

    A close threshold that is not configured keeps the model's ratio to the open threshold.
    """

    def indices(key: str, names: Sequence[str]) -> tuple[int, ...]:
        unknown = [name for name in names if name not in manifest.labels]
        if unknown:
            raise ConfigError(
                f"decision.{key}: model {manifest.name} has no label {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(map(repr, manifest.labels))}."
            )
        return tuple(manifest.labels.index(name) for name in names)

    family = configured.family or manifest.family
    look_alikes = manifest.look_alikes if configured.look_alikes is None else configured.look_alikes
    point = choose_threshold(manifest, configured, hop_seconds)
    return DecisionSettings(
        open_threshold=point.open_threshold,
        close_threshold=point.close_threshold,
        family=indices("family", family),
        look_alikes=indices("look_alikes", [name for name in look_alikes if name not in family]),
        min_support=configured.min_support,
        support_window_examples=configured.support_window_examples,
        hold_seconds=configured.hold_seconds,
        cooldown_seconds=configured.cooldown_seconds,
        max_alert_seconds=configured.max_alert_seconds,
    )
