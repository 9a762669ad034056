"""The table of faults: real broker, real producer, real detector processes, one fault after the other, an account each.

    python -m tests.faults.table [--long] [--only NAME ...] [--delivery MODE ...] [--markdown FILE]

The short form takes under 5 minutes on two cores. Exit code 1 when an account does not balance. ``--long`` kills the
detector a hundred times in each delivery mode and keeps the broker away for as long as people fear.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from detector.bus import open_bus
from detector.bus.base import Record, TopicPartition
from detector.errors import BusError
from producers.publish import Report
from tests.faults.account import (
    REPOSITORY,
    Balance,
    Counted,
    Detector,
    Load,
    Reference,
    Trial,
    chunks_by_stream,
    missing,
    until,
)
from tests.faults.crest_daemon import POINTS

RECOVERY_SECONDS = 150.0
DELIVERIES = ("at_least_once", "exactly_once")


def broker_module() -> ModuleType:
    """``deploy/kafka/broker.py``, which is no package."""
    name = "deploy_kafka_broker"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / "deploy" / "kafka" / "broker.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def bus_environ(cluster: Any, copies: int = 1) -> dict[str, str]:
    """Environment of detectors and producers that use the cluster."""
    return {
        "DETECTOR__BUS__KIND": "kafka",
        "DETECTOR__BUS__KAFKA__BOOTSTRAP_SERVERS": ",".join(cluster.addresses),
        "DETECTOR__BUS__KAFKA__SESSION_TIMEOUT_SECONDS": "6",
        "DETECTOR__TOPICS__REPLICATION_FACTOR": str(copies),
    }


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one fault came to. ``recoveries_seconds``: for each blow, until every partition was committed further."""

    balance: Balance
    recoveries_seconds: tuple[float, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    fault: str
    delivery: str
    seconds: float
    outcome: Outcome | None
    problems: tuple[str, ...]


class Progress:
    """The group's positions, seen from outside."""

    def __init__(self, trial: Trial) -> None:
        self._settings = trial.settings
        kafka = trial.settings.bus.kafka.model_copy(update={"request_timeout_seconds": 2.0})
        self._bus_settings = trial.settings.bus.model_copy(update={"kafka": kafka})
        self._bus: Any = None
        self._consumer: Any = None

    def positions(self) -> dict[int, int] | None:
        """Committed offset by partition; None while the bus does not answer."""
        topics = self._settings.topics
        try:
            if self._consumer is None:
                self._bus = open_bus(self._bus_settings)
                self._consumer = self._bus.consumer([topics.chunks], self._settings.daemon.group)
            found = {}
            for number in range(topics.partitions):
                committed = self._consumer.committed(TopicPartition(topics.chunks, number))
                found[number] = 0 if committed is None else committed.offset
            return found
        except BusError:
            self.close()
            return None

    def moved_from(self, before: dict[int, int]) -> bool:
        """Every partition with records after ``before`` is committed further than that, and there is one."""
        now = self.positions()
        if now is None:
            return False
        topic = self._settings.topics.chunks
        try:
            ends = self._consumer.end_offsets([TopicPartition(topic, number) for number in before])
        except BusError:
            self.close()
            return False
        live = [n for n in before if ends[TopicPartition(topic, n)] > before[n]]
        return bool(live) and all(now[n] > before[n] for n in live)

    def now(self) -> dict[int, int]:
        found: dict[int, int] | None = None

        def got() -> bool:
            nonlocal found
            found = self.positions()
            return found is not None

        until(got, "the group's positions", RECOVERY_SECONDS)
        assert found is not None
        return found

    def recovery_seconds(self, since_seconds: float, before: dict[int, int]) -> float:
        """Wait until each partition has been committed further; how long that took since ``since_seconds``."""
        until(lambda: self.moved_from(before), "every partition committed further", RECOVERY_SECONDS, 0.02)
        return time.monotonic() - since_seconds

    def close(self) -> None:
        if self._bus is not None:
            with contextlib.suppress(BusError):
                self._bus.close()
        self._bus = self._consumer = None


class Case:
    """One fault in one delivery mode: trial, load, progress and what is random about it."""

    def __init__(self, trial: Trial, cluster: Any, long: bool, seed: int) -> None:
        self.trial, self.cluster, self.long = trial, cluster, long
        self.rng = random.Random(seed)
        self.progress = Progress(trial)
        self.recoveries: list[float] = []

    def blow(self, since_seconds: float, before: dict[int, int]) -> None:
        self.recoveries.append(self.progress.recovery_seconds(since_seconds, before))

    def settle(self, load: Load, note: str = "") -> Outcome:
        """End the load, let everything be read, stop the detectors in order, and balance."""
        report = load.finish()
        self.trial.drain(RECOVERY_SECONDS)
        self.trial.stop_detectors()
        return Outcome(self.trial.balance(load), tuple(self.recoveries), note or _of(report))


def _of(report: Report) -> str:
    return f"{report.chunks_dropped} dropped by the producer" if report.chunks_dropped else ""


def kill_detector(case: Case, kills: int, members: Sequence[str | None]) -> Outcome:
    """``kill -9`` at random moments, a fifth of them while it starts; another one starts at once."""
    load = case.trial.load(rate=20.0 if kills > 5 else 60.0)  # each dead detector leaves a backlog to the next
    detectors = [case.trial.detector(member=member) for member in members]
    case.progress.recovery_seconds(0.0, dict.fromkeys(range(case.trial.settings.topics.partitions), 0))
    for _ in range(kills):
        victim = case.rng.randrange(len(detectors))
        time.sleep(case.rng.uniform(0.0, 1.0))
        before, killed = case.progress.now(), time.monotonic()
        detectors[victim].kill()
        detectors[victim] = case.trial.detector(member=members[victim])
        while case.rng.random() < 0.2:
            time.sleep(case.rng.uniform(0.1, 1.0))
            detectors[victim].kill()
            detectors[victim] = case.trial.detector(member=members[victim])
        case.blow(killed, before)
    return case.settle(load, f"{kills} kills")


def kill_in_commit(case: Case, turns: int = 1, member: str | None = "one") -> Outcome:
    """``kill -9`` at each point of a commit, ``turns`` times each: when what is stored and what is committed differ.
    A kill at random seldom meets those moments."""
    turns = 10 if case.long else turns
    load = case.trial.load(rate=30.0)
    for _ in range(turns):
        for point in POINTS:
            dying = case.trial.detector(
                member=member,
                FAULTS_DIE_AT=f"{point}:{case.rng.randint(1, 4)}",
                # nothing goes out of itself: what is not flushed when it dies is gone
                DETECTOR__BUS__KAFKA__LINGER_SECONDS="5",
            )
            until(lambda dying=dying: dying.process.poll() is not None, f"a death when {point}", RECOVERY_SECONDS)
            assert dying.process.returncode == -signal.SIGKILL, f"it ended otherwise; see {dying.log_file}"
    before, died = case.progress.now(), time.monotonic()
    case.trial.detector(member=member)
    case.blow(died, before)
    outcome = case.settle(load, f"{turns * len(POINTS)} kills: when {', '.join(POINTS)}")
    balance = outcome.balance
    again = balance.doubled + balance.letters_doubled
    if case.trial.delivery == "at_least_once" and again < turns:  # each death between flush and positions shows
        missed = f"{turns} deaths between flush and positions, and only {again} outputs twice: the aim is off"
        outcome = replace(outcome, balance=replace(balance, problems=(*balance.problems, missed)))
    return outcome


def kill_static(case: Case) -> Outcome:
    return kill_detector(case, 100 if case.long else 2, ["one"])


def kill_dynamic(case: Case) -> Outcome:
    return kill_detector(case, 20 if case.long else 1, [None, None])


def detector_hangs(case: Case) -> Outcome:
    """One of two detectors is stopped (SIGSTOP) for longer than the session timeout, in whatever it was doing; the
    other takes its partitions over; then it wakes and believes that they are still its own."""
    case.trial.may_resend = True
    load = case.trial.load()
    detectors = [case.trial.detector(), case.trial.detector()]
    case.progress.recovery_seconds(0.0, dict.fromkeys(range(case.trial.settings.topics.partitions), 0))
    until(lambda: all(d.works() for d in detectors), "both work", RECOVERY_SECONDS)
    for turn in range(8 if case.long else 1):
        time.sleep(case.rng.uniform(0.0, 2.0))
        before, hung = case.progress.now(), time.monotonic()
        detectors[turn % 2].process.send_signal(signal.SIGSTOP)
        try:
            case.blow(hung, before)
            time.sleep(case.rng.uniform(0.0, 2.0))
        finally:
            detectors[turn % 2].process.send_signal(signal.SIGCONT)
        woken = detectors[turn % 2]
        until(lambda woken=woken: woken.works(), "it works again", RECOVERY_SECONDS)
    return case.settle(load)


def overloaded(case: Case, times: int = 2) -> Outcome:
    """A detector a third as fast as the load, told to leave out what is over 5 s late.

    What it says it left out, by offsets, is the only thing taken from it. What it must have heard follows from the
    topic: the alerts, the dead letters, its counters, and what of which stream was left out.
    """
    detector = case.trial.detector(
        FAULTS_SECONDS_PER_EXAMPLE="0.05",
        DETECTOR__DAEMON__MAX_LAG_SECONDS="5",
        DETECTOR__DAEMON__OVERLOAD="skip_to_latest",
        DETECTOR__DAEMON__POLL_MAX_RECORDS="64",
    )
    until(lambda: detector.metrics().get("gunfire_ready") == 1.0, "the detector is ready", RECOVERY_SECONDS)
    load = case.trial.load()
    began = time.monotonic()
    wanted = 5 if case.long else times
    skips = 0
    seen = 0.0
    while skips < wanted:
        assert time.monotonic() - began < RECOVERY_SECONDS, "nothing is left out"
        skipped = detector.metric("gunfire_records_skipped_total")
        skips += skipped > seen
        seen = max(seen, skipped)
        time.sleep(0.2)
    load.finish()
    case.trial.drain(RECOVERY_SECONDS)
    case.trial.stop_detectors()
    return overload_account(case, load, detector)


def overload_account(case: Case, load: Load, detector: Detector) -> Outcome:
    records = case.trial.records(case.trial.settings.topics.chunks)
    told = LeftOut.told_in(detector.log_file.read_text())
    reference, left_out = what_was_heard(records, told)
    problems = case.trial.told_problems(reference) + missing(records, load)
    metrics = detector.last_metrics
    heard = len(records) - len(left_out)
    counted = Counted.of(metrics)
    true = Counted(heard, reference.analysed, reference.duplicates, len(reference.rejected))
    if counted != true:
        problems.append(f"the detector counted {counted}; by the topic and the offsets it left out it is {true}")
    if not left_out:
        problems.append("nothing was left out: nothing was tried")
    for name in ("gunfire_records_skipped_total", "gunfire_chunks_skipped_total"):
        if metrics[name] != len(left_out):
            problems.append(f"{name} is {metrics[name]:.0f}; {len(left_out)} chunks are left out by their offsets")
    if unread := int(metrics["gunfire_records_skipped_unread_total"]):
        problems.append(f"{unread} records were passed over without a look at whose they are, though there was time")
    by_stream = chunks_by_stream(left_out)
    if told.by_stream != by_stream:
        problems.append(f"left out by stream: {dict(told.by_stream)} are told, {dict(by_stream)} are in the topic")
    overload = sum(event.close_reason == "overload" for event in reference.events.values())
    return Outcome(
        case.trial.balance_of(reference, produced=len(records), skipped=len(left_out), problems=problems),
        tuple(case.recoveries),
        f"{len(left_out)} of {len(records)} records left out, of {len(by_stream)} streams, {overload} alerts closed so",
    )


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What a detector's log says it left out for being late.

    Attributes:
        begins: by partition, the offsets from which on audio was left out.
        stretches: by partition, the offsets in which it was.
        by_stream: how many chunks.
    """

    begins: dict[int, set[int]]
    stretches: dict[int, list[range]]
    by_stream: Counter[str]

    @staticmethod
    def told_in(log: str) -> LeftOut:
        told = LeftOut({}, {}, Counter())
        for number, first in re.findall(r"\[(\d+)\]: .* from record (\d+) on is left out", log):
            told.begins.setdefault(int(number), set()).add(int(first))
        for number, first, last in re.findall(r"\[(\d+)\]: records (\d+) to (\d+) .* are left out", log):
            told.stretches.setdefault(int(number), []).append(range(int(first), int(last) + 1))
        for line in re.findall(r"Lost coverage, .*?: (.*)", log):
            for stream, chunks in re.findall(r"(\S+) (\d+) chunks", line):
                told.by_stream[stream] += int(chunks)
        return told


def what_was_heard(records: Sequence[Record], told: LeftOut) -> tuple[Reference, list[Record]]:
    """What should have come of the records but the chunks that are told as left out; and those."""
    left_out: list[Record] = []
    logs: dict[int, list[Record | TopicPartition]] = {}
    for record in records:
        log = logs.setdefault(record.partition, [])
        if record.offset in told.begins.get(record.partition, ()):
            log.append(record.topic_partition)
        is_left_out = any(record.offset in stretch for stretch in told.stretches.get(record.partition, ()))
        if is_left_out and chunks_by_stream([record]):  # what is no chunk is refused there as everywhere
            left_out.append(record)
        else:
            log.append(record)
    reference = Reference()
    for log in logs.values():
        reference.read(log)
    return reference, left_out


def restart_broker(case: Case, away_seconds: float) -> Outcome:
    """``kill -9`` of the only broker, and a start after a while."""
    case.trial.may_resend = True
    load = case.trial.load()
    case.trial.detector(member="one")
    case.progress.recovery_seconds(0.0, dict.fromkeys(range(case.trial.settings.topics.partitions), 0))
    before = case.progress.now()
    case.cluster.kill(1)
    time.sleep(away_seconds)
    case.cluster.start(1)
    case.blow(time.monotonic(), before)
    return case.settle(load)


def broker_killed(case: Case) -> Outcome:
    return restart_broker(case, 0.0)


def broker_away(case: Case) -> Outcome:
    return restart_broker(case, 30.0 if case.long else 8.0)


def broker_slow(case: Case) -> Outcome:
    """Stopped and let go again (SIGSTOP, SIGCONT), for random short whiles and once for longer."""
    case.trial.may_resend = True
    load = case.trial.load()
    case.trial.detector(member="one")
    case.progress.recovery_seconds(0.0, dict.fromkeys(range(case.trial.settings.topics.partitions), 0))
    for pulse in range(15 if case.long else 4):
        before = case.progress.now()
        case.cluster.pause(1)
        time.sleep(15.0 if case.long and pulse == 7 else case.rng.uniform(0.3, 2.5))
        case.cluster.resume(1)
        case.blow(time.monotonic(), before)
        time.sleep(case.rng.uniform(0.1, 1.0))
    return case.settle(load)


def one_of_three(case: Case) -> Outcome:
    """``kill -9`` of one of three brokers; the others take over; it comes back; in the long form each in turn."""
    case.trial.may_resend = True
    load = case.trial.load()
    case.trial.detector(member="one")
    case.progress.recovery_seconds(0.0, dict.fromkeys(range(case.trial.settings.topics.partitions), 0))
    for number in (1, 2, 3) if case.long else (2,):
        before, killed = case.progress.now(), time.monotonic()
        case.cluster.kill(number)
        case.blow(killed, before)
        case.cluster.start(number)
        time.sleep(5.0 if case.long else 1.0)  # until its copies are in step again
    return case.settle(load)


def full_disk(case: Case) -> Outcome:
    """Every write of the broker that makes a file grow fails; Kafka gives up; it is started again with room."""
    case.trial.may_resend = True
    load = case.trial.load()
    case.trial.detector(member="one")
    case.progress.recovery_seconds(0.0, dict.fromkeys(range(case.trial.settings.topics.partitions), 0))
    before = case.progress.now()
    case.cluster.fill_disk(1)
    node = case.cluster.node(1)
    until(lambda: node.pid() is None, "the broker gave up", 60.0)
    time.sleep(10.0 if case.long else 2.0)
    case.cluster.start(1)  # the limit was its process's
    case.blow(time.monotonic(), before)
    return case.settle(load)


def members_come_and_go(case: Case, static: bool) -> Outcome:
    """One to three detectors; every few seconds one joins, leaves or is killed."""
    load = case.trial.load()
    names = ["one", "two", "three"] if static else [None, None, None]
    running: dict[int, Detector] = {0: case.trial.detector(member=names[0])}
    case.progress.recovery_seconds(0.0, dict.fromkeys(range(case.trial.settings.topics.partitions), 0))
    for _ in range(20 if case.long else 4):
        before, began = case.progress.now(), time.monotonic()
        slot = case.rng.randrange(3)
        if slot not in running:
            running[slot] = case.trial.detector(member=names[slot])
        elif len(running) > 1:
            leaving = running.pop(slot)
            if case.rng.random() < 0.7:
                leaving.stop()
            else:
                leaving.kill()
        case.blow(began, before)
        time.sleep(case.rng.uniform(0.5, 2.5))
    return case.settle(load)


def rebalances_dynamic(case: Case) -> Outcome:
    return members_come_and_go(case, static=False)


def rebalances_static(case: Case) -> Outcome:
    return members_come_and_go(case, static=True)


def producer_spools(case: Case, away_seconds: float, spool_seconds: float) -> Outcome:
    """No broker for a while: nothing is lost within the spool; beyond it what was dropped is told exactly."""
    case.trial.may_resend = True
    # in real time, as a spool counts seconds of audio
    load = case.trial.load(spool_seconds=spool_seconds, rate=12 / 0.96)
    case.trial.detector(member="one")
    case.progress.recovery_seconds(0.0, dict.fromkeys(range(case.trial.settings.topics.partitions), 0))
    before = case.progress.now()
    case.cluster.kill(1)
    time.sleep(away_seconds)
    case.cluster.start(1)
    case.blow(time.monotonic(), before)
    outcome = case.settle(load)
    assert load.report is not None
    dropped = load.report.chunks_dropped
    wrong: tuple[str, ...] = ()
    if away_seconds < spool_seconds and dropped:
        wrong = (f"{dropped} chunks dropped within the spool",)
    if away_seconds > spool_seconds + 5 and not dropped:
        wrong = ("nothing was dropped: the spool was never full",)
    ranges = len(load.report.ranges)
    note = f"{away_seconds:g} s away, spool {spool_seconds:g} s: {dropped} chunks dropped, told in {ranges} ranges"
    return replace(outcome, balance=replace(outcome.balance, problems=(*outcome.balance.problems, *wrong)), note=note)


def producer_within_spool(case: Case) -> Outcome:
    return producer_spools(case, *((60.0, 90.0) if case.long else (8.0, 60.0)))


def producer_beyond_spool(case: Case) -> Outcome:
    return producer_spools(case, *((60.0, 20.0) if case.long else (12.0, 4.0)))


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    run: Callable[[Case], Outcome]
    short: tuple[str, ...] = ("exactly_once",)  # delivery modes of the short form
    long: tuple[str, ...] = DELIVERIES
    nodes: int = 1
    own_cluster: bool = False


FAULTS = (
    Fault("detector killed, static name", kill_static, short=DELIVERIES),
    Fault("detector killed in a commit", kill_in_commit, short=DELIVERIES),
    Fault("detector killed, one of two, no name", kill_dynamic),
    Fault("detector hangs, another takes over", detector_hangs, short=()),
    Fault("overload, skip_to_latest", overloaded),
    Fault("broker killed and restarted", broker_killed, short=()),
    Fault("no broker for a while", broker_away),
    Fault("broker slow", broker_slow),
    Fault("members come and go, no names", rebalances_dynamic),
    Fault("members come and go, static names", rebalances_static, short=()),
    Fault("producer, broker away within the spool", producer_within_spool, short=(), long=("at_least_once",)),
    Fault("producer, broker away beyond the spool", producer_beyond_spool, ("at_least_once",), ("at_least_once",)),
    Fault("full disk", full_disk, own_cluster=True),
    Fault("one of three brokers killed", one_of_three, nodes=3, own_cluster=True),
)


@contextlib.contextmanager
def cluster_of(folder: Path, nodes: int) -> Iterator[Any]:
    cluster = broker_module().Cluster(folder, nodes)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def run_fault(fault: Fault, delivery: str, cluster: Any, folder: Path, long: bool, seed: int) -> Row:
    """One row; whatever goes wrong in it becomes its problem."""
    began = time.monotonic()
    outcome: Outcome | None = None
    try:
        trial = Trial(folder, bus_environ(cluster, fault.nodes), delivery=delivery)
        with trial:
            trial.create_topics()
            outcome = fault.run(Case(trial, cluster, long, seed))
        problems = outcome.balance.problems
    except (AssertionError, BusError) as error:
        problems = (f"{type(error).__name__}: {error}",)
    return Row(fault.name, delivery, time.monotonic() - began, outcome, problems)


def run_table(
    folder: Path, long: bool, only: Sequence[str], deliveries: Sequence[str], seed: int, told: Callable[[Row], None]
) -> list[Row]:
    """All faults, or those whose names hold one of ``only``; brokers are shared where the fault leaves them whole."""
    chosen = [f for f in FAULTS if not only or any(word in f.name for word in only)]
    rows: list[Row] = []

    def run(fault: Fault, cluster: Any) -> None:
        for delivery in fault.long if long or only else fault.short:
            if delivery not in deliveries:
                continue
            row = run_fault(fault, delivery, cluster, folder / f"trial-{len(rows)}", long, seed + len(rows))
            rows.append(row)
            told(row)

    shared = [f for f in chosen if not f.own_cluster and (long or only or f.short)]
    if shared:
        with cluster_of(folder / "shared", 1) as cluster:
            for fault in shared:
                run(fault, cluster)
    for number, fault in enumerate(f for f in chosen if f.own_cluster):
        with cluster_of(folder / f"own-{number}", fault.nodes) as cluster:
            run(fault, cluster)
    return rows


HEADINGS = ("fault", "delivery", "chunks", "rejected", "alert events", "lost", "doubled", "recovery", "account")


def _doubled(balance: Balance) -> str:
    letters = f" and {balance.letters_doubled} dead letters" if balance.letters_doubled else ""
    return f"{balance.doubled}{letters}"


def cells_of(row: Row) -> tuple[str, ...]:
    account = "balances" if not row.problems else "; ".join(row.problems)
    if row.outcome is None:
        return (row.fault, row.delivery, "", "", "", "", "", "", account)
    balance, recoveries = row.outcome.balance, row.outcome.recoveries_seconds
    recovery = f"{statistics.median(recoveries):.1f} s" if recoveries else ""
    if len(recoveries) > 1:
        recovery += f", worst {max(recoveries):.1f} s"
    name = f"{row.fault} ({row.outcome.note})" if row.outcome.note else row.fault
    return (
        name, row.delivery, str(balance.analysed), str(balance.rejected), str(balance.alerts), str(balance.lost),
        _doubled(balance), recovery, account,
    )  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    return "\n".join([*lines, *("| " + " | ".join(cells_of(row)) + " |" for row in rows)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="100 kills a mode, longer absences, every mode (an hour)")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="faults whose name holds this")
    parser.add_argument("--delivery", nargs="+", choices=DELIVERIES, default=DELIVERIES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    parser.add_argument("--keep", type=Path, help="folder for logs; kept")
    options = parser.parse_args()
    console = Console(width=160)
    missing = broker_module().missing_tools()
    if missing:
        console.print(f"Needs {' and '.join(missing)} (Debian: apt install openjdk-17-jre-headless maven).")
        return 1

    def told(row: Row) -> None:
        state = "balances" if not row.problems else "DOES NOT BALANCE: " + "; ".join(row.problems)
        console.print(f"{row.fault}, {row.delivery}: {state} ({row.seconds:.0f} s)", soft_wrap=True)

    with contextlib.ExitStack() as stack:
        if options.keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gunfire-faults-")))
        else:
            folder = options.keep
            folder.mkdir(parents=True, exist_ok=True)
        rows = run_table(folder, options.long, options.only, options.delivery, options.seed, told)
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*cells_of(row))
    console.print(table)
    if options.markdown is not None:
        options.markdown.write_text(markdown(rows))
    return int(any(row.problems for row in rows) or not rows)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else brokers and detectors would be left behind
    sys.exit(main())
