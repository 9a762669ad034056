"""The short table of faults as tests: real processes, a real broker. The long one is ``make faults ARGS=--long``."""

import re

import pytest

from tests.faults.account import Trial
from tests.faults.table import (
    Case,
    bus_environ,
    kill_in_commit,
    overload_account,
    overloaded,
    restart_broker,
)

DELIVERIES = ["at_least_once", "exactly_once"]


def holds(outcome):
    assert outcome.balance.problems == ()
    assert outcome.balance.lost == 0
    assert outcome.balance.alerts > 20
    assert outcome.balance.rejected > 0


def embedded(folder):
    return {
        "DETECTOR__BUS__EMBEDDED__PATH": str(folder / "bus.sqlite3"),
        "DETECTOR__BUS__EMBEDDED__SESSION_TIMEOUT_SECONDS": "0.5",
    }


@pytest.mark.kafka
@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_detector_killed_at_each_point_of_a_commit_loses_and_doubles_nothing(cluster, tmp_path, delivery):
    with Trial(tmp_path, bus_environ(cluster), delivery=delivery) as trial:
        trial.create_topics()
        holds(kill_in_commit(Case(trial, cluster, False, seed=1)))


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_the_same_account_balances_on_the_embedded_bus(tmp_path, delivery):
    with Trial(tmp_path, embedded(tmp_path), delivery=delivery) as trial:
        trial.create_topics()
        holds(kill_in_commit(Case(trial, None, False, seed=2), member=None))


def test_what_overload_leaves_out_is_told_to_the_chunk(tmp_path):
    with Trial(tmp_path, embedded(tmp_path), delivery="exactly_once") as trial:
        trial.create_topics()
        case = Case(trial, None, False, seed=4)
        outcome = overloaded(case, times=1)
        assert outcome.balance.problems == ()
        assert outcome.balance.skipped > 50
        (load,), (detector,) = trial.loads, trial.detectors
        log = detector.log_file.read_text()

        def problems_of(text):
            detector.log_file.write_text(text)
            return " ".join(overload_account(case, load, detector).balance.problems)

        assert "left out by stream" in problems_of(log.replace(" sensor-01 ", " sensor-02 "))
        told = problems_of(re.sub(r"records (\d+) to \d+ \(", r"records \1 to \1 (", log))
        assert "alert events lost" in told
        assert "chunks are left out by their offsets" in told


@pytest.mark.kafka
def test_a_broker_that_dies_and_comes_back_costs_nothing(cluster, tmp_path):
    with Trial(tmp_path, bus_environ(cluster), delivery="exactly_once") as trial:
        trial.create_topics()
        holds(restart_broker(Case(trial, cluster, False, seed=3), 1.0))


def test_an_account_that_is_wrong_does_not_balance(tmp_path):
    """One alert twice, one lost, one chunk nobody heard, one dead letter for nothing: each is noticed."""
    with Trial(tmp_path, embedded(tmp_path), delivery="exactly_once") as trial:
        trial.create_topics()
        load = trial.load(rate=400.0, chunks=120, streams=4)
        trial.detector()
        load.wait()
        load.finish()
        trial.drain()
        trial.stop_detectors()
        assert trial.balance(load).problems == ()
        topics = trial.settings.topics
        one = trial.records(topics.alerts)[0]
        chunk = trial.records(topics.chunks)[0]
        letter = trial.records(topics.deadletter)[0]
        with trial.bus() as bus:
            producer = bus.producer()
            producer.send(topics.alerts, one.key, one.value, one.headers)
            producer.flush()
            assert trial.balance(load).problems == ("1 alert events published twice under exactly_once",)
            trial.delivery = "at_least_once"
            assert trial.balance(load).problems == ("1 alert events published twice by the same detector",)
            trial.delivery = "exactly_once"
            load.made_of["sensor-00"] += 1
            assert "1 of 120 chunks are missing in the topic" in " ".join(trial.balance(load).problems)
            load.made_of["sensor-00"] -= 1
            headers = tuple((n, b"999999" if n == "deadletter_offset" else v) for n, v in letter.headers)
            producer.send(topics.deadletter, letter.key, letter.value, headers)
            producer.send(topics.chunks, chunk.key, chunk.value, chunk.headers)
            later = tuple((n, b"30" if n == "seq" else v) for n, v in chunk.headers)
            producer.send(topics.chunks, chunk.key, chunk.value, later)
            producer.flush()
        told = " ".join(trial.balance(load).problems)
        assert "0 dead letters lost, 1 that should not be" in told
        assert "2 records not committed" in told
        assert "chunks are in the topic" in told
        assert "1 chunks in the topic hold other audio than was made" in told
        assert "the detector counted Counted(received=123, " in told
