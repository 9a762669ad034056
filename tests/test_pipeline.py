import dataclasses
import itertools
import random

import numpy as np
import pytest

from detector.alert import encode
from detector.bus.base import TopicPartition
from detector.chunk import CHUNK_SAMPLES, MAX_CAPTURED_AT_NS, MAX_SEQ, Chunk, ChunkHead
from detector.config import Settings, load_settings
from detector.decision import DecisionSettings
from detector.errors import ChunkError, ConfigError
from detector.pipeline import Pipeline, Rebuild, Taken, decision_settings
from detector.stream import Arrival
from tests.scorers import IDENTITY, LABELS, CrestScorer

PARTITION = TopicPartition("audio.chunks", 0)
START_NS = 1_700_000_000_000_000_000
CHUNK_NS = 960_000_000
DECISION = DecisionSettings(
    open_threshold=0.6, close_threshold=0.4, family=(0, 1), look_alikes=(2,), hold_seconds=1.5, max_alert_seconds=20
)


def make_pipeline(**options):
    options.setdefault("decision", DECISION)
    scorer = options.pop("scorer", None) or CrestScorer()
    return Pipeline(scorer, labels=LABELS, model=IDENTITY, window_examples=10, **options)


def audio(rng, chunks, shots=()):
    """Noise with impulses at given samples."""
    pcm = rng.normal(0, 200, chunks * CHUNK_SAMPLES)
    for at in shots:
        tail = np.arange(min(4000, len(pcm) - at))
        pcm[at : at + len(tail)] += rng.normal(0, 1, len(tail)) * 12000 * np.exp(-tail / 500)
    return np.clip(pcm, -32768, 32767).astype(np.int16)


def chunks_of(stream, pcm, session="s1", first_seq=0, **fields):
    return [
        Chunk(
            stream_id=stream,
            session=session,
            seq=first_seq + k,
            captured_at_ns=START_NS + (first_seq + k) * CHUNK_NS,
            pcm=pcm[k * CHUNK_SAMPLES : (k + 1) * CHUNK_SAMPLES],
            **fields,
        )
        for k in range(len(pcm) // CHUNK_SAMPLES)
    ]


def log_of(*streams):
    """Interleave streams into one partition's log."""
    merged = [c for group in itertools.zip_longest(*streams) for c in group if c is not None]
    return [Arrival(c, PARTITION, i, i / 100) for i, c in enumerate(merged)]


def feed(pipeline, log, batch=7):
    emitted = []
    for start in range(0, len(log), batch):
        for arrival in log[start : start + batch]:
            pipeline.submit(arrival)
        emitted += pipeline.run()
    return emitted


def test_a_shot_opens_and_closes_one_alert_with_its_onset_by_the_capture_clock():
    shot = 5 * CHUNK_SAMPLES + 4321
    emitted = feed(make_pipeline(), log_of(chunks_of("a", audio(np.random.default_rng(1), 12, [shot]))))
    alerts = [e.alert for e in emitted]
    assert [a.state for a in alerts] == ["opened", "closed"]
    assert len({a.alert_id for a in alerts}) == 1
    opened = alerts[0]
    assert abs(opened.onset_sample - shot) <= 160
    assert opened.onset_at_ns == START_NS + opened.onset_sample * 62_500
    assert opened.audio.first_offset <= 5 <= opened.audio.last_offset
    assert emitted[0].capture_end_ns == START_NS + 6 * CHUNK_NS
    assert opened.look_alikes == {"Fireworks": 0.25}


@pytest.mark.parametrize("hop_seconds", [0.96, 0.48])
def test_alerts_do_not_depend_on_how_chunks_are_batched(hop_seconds):
    rng = np.random.default_rng(2)
    streams = [chunks_of(f"s{i}", audio(rng, 15, rng.integers(0, 14 * CHUNK_SAMPLES, 2))) for i in range(5)]
    log = log_of(*streams)
    results = []
    for batch, max_batch in ((1, 64), (7, 64), (75, 4), (75, 64)):
        pipeline = make_pipeline(hop_seconds=hop_seconds, max_batch=max_batch)
        results.append([e.alert for e in feed(pipeline, log, batch)])
        assert max(pipeline.account.batches) <= max(max_batch, 2)
    assert len(results[0]) >= 5
    by_stream = [sorted(r, key=lambda a: (a.stream, a.onset_sample, a.revision)) for r in results]
    assert by_stream[0] == by_stream[1] == by_stream[2] == by_stream[3]


@pytest.mark.parametrize("hop_seconds", [0.96, 0.48])
def test_a_shot_at_the_seam_of_two_chunks_is_heard_once(hop_seconds):
    for shift in (-200, -1, 0, 1, 200):
        shot = 6 * CHUNK_SAMPLES + shift
        log = log_of(chunks_of("a", audio(np.random.default_rng(3), 12, [shot])))
        opened = [e.alert for e in feed(make_pipeline(hop_seconds=hop_seconds), log) if e.alert.state == "opened"]
        assert len(opened) == 1
        assert abs(opened[0].onset_sample - shot) <= 160


class HearsQuietImpulses(CrestScorer):
    """Fires at an impulse of a tenth to four tenths of full scale, as a network may that takes an echo for the shot."""

    def classify(self, windows, num_frames):
        out = np.zeros((len(windows), len(LABELS)), np.float32)
        for i, (window, count) in enumerate(zip(windows, num_frames, strict=True)):
            out[i, 0] = 0.9 * (0.1 < window[count - 1].max() < 0.4)
        return out


def with_echo(shot, echo):
    """Noise with a shot and, 16 dB weaker, its echo; at samples."""
    pcm = audio(np.random.default_rng(3), 12, [shot])
    length = min(4000, echo - shot)
    pcm[echo : echo + length] += pcm[shot : shot + length] // 6
    return pcm


def onsets_heard(pcm, scorer):
    alerts = [e.alert for e in feed(make_pipeline(scorer=scorer), log_of(chunks_of("a", pcm)))]
    return [onset for onset in alerts[-1].onsets if onset.certain]


@pytest.mark.parametrize("milliseconds_before", [50, 250, 380])
def test_an_example_that_hears_the_echo_alone_names_the_shot(milliseconds_before):
    example_begins = 6 * CHUNK_SAMPLES - 240
    shot = example_begins - 16 * milliseconds_before
    onsets = onsets_heard(with_echo(shot, example_begins + 2000), HearsQuietImpulses())
    assert [abs(onset.sample - shot) <= 160 for onset in onsets] == [True]


@pytest.mark.parametrize("milliseconds_before", [150, 390])
def test_an_echo_before_the_example_is_no_shot_where_the_shot_came_before_the_search(milliseconds_before):
    """The echo comes 0.55 s after the shot, the search begins 0.4 s before the example."""
    example_begins = 6 * CHUNK_SAMPLES - 240
    echo = example_begins - 16 * milliseconds_before
    pcm = with_echo(echo - 16 * 550, echo)
    pcm[example_begins + 6000] = 8000  # a click, which fires the example
    onsets = onsets_heard(pcm, HearsQuietImpulses())
    assert not [onset for onset in onsets if abs(onset.sample - echo) <= 480]


def test_a_detector_with_other_rules_for_onsets_serves_something_else(monkeypatch):
    before = make_pipeline().served
    assert make_pipeline().served == before
    monkeypatch.setattr("detector.pipeline.ONSET_RULES", 0)
    assert make_pipeline().served != before


def test_state_rebuilt_from_the_log_continues_exactly_at_any_cut():
    rng = np.random.default_rng(4)
    shots = [np.sort(rng.integers(0, 38 * CHUNK_SAMPLES, 5)) for _ in range(3)]
    shots.append(np.arange(3 * CHUNK_SAMPLES, 36 * CHUNK_SAMPLES, 7000))  # fire for longer than an alert may last
    log = log_of(*[chunks_of(f"s{i}", audio(rng, 40, s)) for i, s in enumerate(shots)])
    whole = [e.alert for e in feed(make_pipeline(), log, 1)]
    assert len(whole) > 20
    carried_over = 0
    for cut in random.Random(5).sample(range(1, len(log)), 40):
        before = make_pipeline()
        told = [e.alert for e in feed(before, log[:cut], 1)]
        read_from, since = before.rebuild_plans({PARTITION: cut})[PARTITION]
        assert read_from >= cut - 4 * (40 + 12)
        carried_over += bool(since)
        after = make_pipeline()
        after.rebuild(PARTITION, Rebuild(cut, since))
        told += [e.alert for e in feed(after, log[read_from:], 9)]
        assert sorted(told, key=str) == sorted(whole, key=str)
        assert after.account.analysed == len(log) - cut
        assert after.account.rebuilt == cut - read_from
    assert carried_over > 20


@pytest.mark.parametrize("hop_seconds", [0.96, 0.48])
def test_one_stream_is_rebuilt_from_no_more_than_its_window_and_its_alert(hop_seconds):
    rng = np.random.default_rng(11)
    log = log_of(chunks_of("a", audio(rng, 60, [20 * CHUNK_SAMPLES + 5000, 45 * CHUNK_SAMPLES + 15300])))
    whole = [e.alert for e in feed(make_pipeline(hop_seconds=hop_seconds), log, 1)]
    assert len(whole) == 4
    for cut in range(1, 60):
        before = make_pipeline(hop_seconds=hop_seconds)
        told = [e.alert for e in feed(before, log[:cut], 1)]
        read_from, since = before.rebuild_plans({PARTITION: cut})[PARTITION]
        assert cut - read_from <= 10 + 2 + 5
        after = make_pipeline(hop_seconds=hop_seconds)
        after.rebuild(PARTITION, Rebuild(cut, since))
        assert told + [e.alert for e in feed(after, log[read_from:], 9)] == whole


def test_a_rebuild_that_forgets_an_open_decision_would_be_noticed():
    log = log_of(chunks_of("a", audio(np.random.default_rng(1), 12, [5 * CHUNK_SAMPLES + 4321])))
    before = make_pipeline()
    feed(before, log[:6], 1)
    read_from, since = before.rebuild_plans({PARTITION: 6})[PARTITION]
    assert since
    after = make_pipeline()
    after.rebuild(PARTITION, Rebuild(6, {}))
    assert feed(after, log[read_from:]) == []


@pytest.mark.parametrize(
    ("second", "reason"),
    [({"first_seq": 8}, "gap"), ({"first_seq": 6, "session": "s2"}, "new_session")],
)
def test_a_broken_run_closes_its_alert_and_is_never_spliced(second, reason):
    rng = np.random.default_rng(6)
    first = chunks_of("a", audio(rng, 6, [5 * CHUNK_SAMPLES + 100]))
    rest_pcm = audio(rng, 6, [5 * CHUNK_SAMPLES + 100])
    rest = chunks_of("a", rest_pcm, **second)
    pipeline = make_pipeline()
    alerts = [e.alert for e in feed(pipeline, log_of(first + rest))]
    assert alerts[1].state == "closed"
    assert alerts[1].close_reason == reason
    assert alerts[1].ended_sample == 6 * CHUNK_SAMPLES
    assert pipeline.account.resets == {reason: 1}
    assert pipeline.account.missing == (2 if reason == "gap" else 0)
    alone = [e.alert for e in feed(make_pipeline(), log_of(rest))]
    offset = {"audio": None}
    assert [dataclasses.replace(a, **offset) for a in alerts[2:]] == [dataclasses.replace(a, **offset) for a in alone]


def test_a_chunk_that_comes_twice_is_analysed_once():
    chunks = chunks_of("a", audio(np.random.default_rng(7), 8, [5 * CHUNK_SAMPLES + 100]))
    twice = [c for c in chunks for _ in range(2)]
    pipeline = make_pipeline()
    alerts = [e.alert for e in feed(pipeline, log_of(twice))]
    assert pipeline.account.duplicates == 8
    assert pipeline.account.analysed == 8
    assert [a.onset_sample for a in alerts] == [e.alert.onset_sample for e in feed(make_pipeline(), log_of(chunks))]


def head_of(chunk):
    return ChunkHead(chunk.stream_id, chunk.session, chunk.seq, chunk.captured_at_ns)


def test_what_is_left_out_breaks_the_run_and_is_neither_missing_nor_heard():
    rng = np.random.default_rng(12)
    shots = [3 * CHUNK_SAMPLES + 100, 12 * CHUNK_SAMPLES + 100]
    chunks = chunks_of("a", audio(rng, 16, shots))
    pipeline = make_pipeline()
    told = feed(pipeline, log_of(chunks[:4]))
    told += pipeline.skip(PARTITION)
    left_out = [chunks[4], chunks[5], chunks[5], chunks[8]]
    taken = [pipeline.leave_out(head_of(c), PARTITION, 4 + i, 1.0) for i, c in enumerate(left_out)]
    assert taken == [Taken(False, 0), Taken(False, 0), Taken(True, 0), Taken(False, 2)]
    assert [(e.alert.state, e.alert.close_reason) for e in told] == [("opened", None), ("closed", "overload")]
    assert pipeline.skip(PARTITION) == []
    rest = log_of(chunks[9:])
    heard = feed(pipeline, rest)
    assert [e.alert for e in heard] == [e.alert for e in feed(make_pipeline(), rest)]
    account = pipeline.account
    assert (account.analysed, account.duplicates, account.missing) == (4 + 7, 1, 2)
    assert account.resets == {"overload": 1}


def test_what_was_passed_over_unread_is_not_missing():
    chunks = chunks_of("a", audio(np.random.default_rng(12), 16, []))
    pipeline = make_pipeline()
    feed(pipeline, log_of(chunks[:4]))
    pipeline.skip(PARTITION)
    pipeline.leave_out(head_of(chunks[4]), PARTITION, 4, 1.0)
    pipeline.pass_over(PARTITION)
    feed(pipeline, log_of(chunks[10:12] + chunks[13:]))
    assert pipeline.account.missing == 1


def test_a_stream_that_comes_to_another_partition_while_that_is_left_out_is_not_spliced():
    chunks = chunks_of("a", audio(np.random.default_rng(1), 9, [3 * CHUNK_SAMPLES + 4321]))
    pipeline, other = make_pipeline(), TopicPartition("audio.chunks", 7)
    feed(pipeline, log_of(chunks[:4]))
    pipeline.skip(other)
    pipeline.leave_out(head_of(chunks[4]), other, 0, 1.0)
    assert [e.alert.close_reason for e in pipeline.run()] == ["overload"]
    rest = log_of(chunks[5:])
    assert feed(pipeline, rest) == feed(make_pipeline(), rest)


def test_one_stream_too_many_is_refused_and_the_others_go_on():
    rng = np.random.default_rng(8)
    pipeline = make_pipeline(max_streams=2)
    for stream in ("a", "b"):
        pipeline.submit(Arrival(chunks_of(stream, audio(rng, 1))[0]))
    with pytest.raises(ChunkError, match="max_streams") as refused:
        pipeline.submit(Arrival(chunks_of("c", audio(rng, 1))[0]))
    assert refused.value.reason == "too_many_streams"
    pipeline.run()
    assert pipeline.account.analysed == 2


def test_a_stream_that_fell_silent_is_forgotten_and_its_alert_closed():
    log = log_of(chunks_of("a", audio(np.random.default_rng(1), 6, [5 * CHUNK_SAMPLES + 4321])))
    pipeline = make_pipeline(idle_seconds=60)
    assert [e.alert.state for e in feed(pipeline, log)] == ["opened"]
    assert pipeline.forget_idle(log[-1].seen_seconds + 59.9) == []
    closed = pipeline.forget_idle(log[-1].seen_seconds + 60.1)
    assert [(e.alert.state, e.alert.close_reason) for e in closed] == [("closed", "stream_lost")]
    assert pipeline.stream_count == 0


def test_every_chunk_is_accounted_for():
    rng = np.random.default_rng(9)
    log = log_of(*[chunks_of(f"s{i}", audio(rng, 10)) for i in range(3)])
    pipeline = make_pipeline()
    for arrival in log:
        pipeline.submit(arrival)
    assert pipeline.account.accepted == 30
    assert pipeline.examples_in_progress == 30
    pipeline.run()
    assert pipeline.account.analysed == 30
    assert pipeline.examples_in_progress == 0


def test_a_partition_taken_away_leaves_nothing_behind():
    rng = np.random.default_rng(10)
    log = log_of(*[chunks_of(f"s{i}", audio(rng, 10)) for i in range(3)])
    pipeline = make_pipeline()
    feed(pipeline, log[:20])
    for arrival in log[20:]:
        pipeline.submit(arrival)
    pipeline.drop_partition(PARTITION)
    assert pipeline.run() == []
    assert (pipeline.stream_count, pipeline.examples_in_progress) == (0, 0)
    assert pipeline.account.accepted == pipeline.account.analysed == 20


def test_the_alert_carries_the_canary_of_the_audio_that_raised_it():
    pcm = audio(np.random.default_rng(1), 12, [5 * CHUNK_SAMPLES + 4321])
    chunks = chunks_of("a", pcm)
    chunks[5] = dataclasses.replace(chunks[5], canary="probe-1")
    alerts = [e.alert for e in feed(make_pipeline(), log_of(chunks))]
    assert [a.canary for a in alerts] == ["probe-1", "probe-1"]


class _Manifest:
    name = "crest"
    labels = LABELS
    family = ("Gunshot, gunfire",)
    look_alikes = ("Fireworks",)
    false_alerts = ()

    class decision:
        open_threshold = 0.8
        close_threshold = 0.4


def _decision(**environ):
    settings: Settings = load_settings(None, {f"DETECTOR__DECISION__{k}": v for k, v in environ.items()})
    return decision_settings(_Manifest, settings.decision)


def test_the_models_own_thresholds_serve_where_the_configuration_says_nothing():
    assert (_decision().open_threshold, _decision().close_threshold) == (0.8, 0.4)
    raised = _decision(OPEN_THRESHOLD="0.9")
    assert (raised.open_threshold, raised.close_threshold) == (0.9, pytest.approx(0.45))
    assert _decision(FAMILY='["Machine gun"]').family == (1,)


def test_a_label_the_model_does_not_have_is_named_with_those_it_has():
    with pytest.raises(ConfigError, match=r"decision.family.*'Cannon'.*'Fireworks'"):
        _decision(FAMILY='["Cannon"]')


def test_more_open_decisions_than_can_be_kept_are_rebuilt_from_all_that_is_read():
    log = log_of(chunks_of("a", audio(np.random.default_rng(1), 40, [20 * CHUNK_SAMPLES + 4321])))
    whole = [e.alert for e in feed(make_pipeline(), log, 1)]
    before = make_pipeline()
    told = [e.alert for e in feed(before, log[:22], 1)]
    read_from, _ = before.rebuild_plans({PARTITION: 22})[PARTITION]
    after = make_pipeline()
    after.rebuild(PARTITION, Rebuild(22, {}, feed_rest=True))
    assert told + [e.alert for e in feed(after, log[read_from:])] == whole


@pytest.mark.parametrize("field", ["seq", "captured_at_ns"])
def test_a_shot_at_the_largest_values_a_chunk_may_have_is_told(field):
    largest = {"seq": MAX_SEQ, "captured_at_ns": MAX_CAPTURED_AT_NS}[field]
    chunks = chunks_of("a", audio(np.random.default_rng(1), 6, [3 * CHUNK_SAMPLES + 4321]))
    step = 1 if field == "seq" else CHUNK_NS
    moved = [dataclasses.replace(c, **{field: largest - (5 - k) * step}) for k, c in enumerate(chunks)]
    emitted = feed(make_pipeline(), log_of(moved))
    assert [e.alert.state for e in emitted] == ["opened", "closed"]
    for one in emitted:
        encode(one.alert)


def test_what_serves_is_told_by_model_and_settings():
    names = {
        make_pipeline().served,
        make_pipeline(hop_seconds=0.48).served,
        make_pipeline(decision=dataclasses.replace(DECISION, hold_seconds=3.0)).served,
    }
    assert len(names) == 3
    assert make_pipeline().served in names
