"""``detector demo``: the real detector and the synthetic city, two processes and an embedded bus, then the reckoning.

Nothing is staged: the daemon and ``producers scene`` run as their own commands, the alerts are read from the topic as
any subscriber would, and the summary holds them against the scene's ground truth.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.live import Live

from detector.alert import Alert
from detector.bus.base import Bus
from detector.bus.embedded import EmbeddedBus
from detector.chunk import RATE_HZ
from detector.errors import GunfireError
from detector.watch import AlertTable, one_line, read_alerts

START_SECONDS = 90.0  # longest wait for the detector to be ready
FINISH_SECONDS = 30.0  # longest wait for the last chunk to be analysed
MATCH_SECONDS = 0.5  # an alert's onset this near to a sound's arrival at its sensor is that sound's
MIN_HEARD = 0.8  # of the gunfire that at least one sensor could hear
MAX_P99_SECONDS = 1.0
# Low houses, sensors close together: farther off, or among high facades, the built-in model hears fewer single shots.
_SUBURB = ("--spacing", "60", "--decay", "0.3")
_SAMPLE_NS = 1_000_000_000 // RATE_HZ


@dataclass(slots=True)
class Heard:
    """The alerts of a demo: the last event of each, and how long its first took to a subscriber."""

    alerts: dict[str, Alert] = field(default_factory=dict)
    latencies_seconds: list[float] = field(default_factory=list)

    def add(self, alert: Alert, now_ns: int) -> None:
        if alert.state == "opened" and alert.alert_id not in self.alerts:
            capture_end_ns = alert.onset_at_ns + (alert.decided_sample - alert.onset_sample) * _SAMPLE_NS
            self.latencies_seconds.append((now_ns - capture_end_ns) / 1e9)
        known = self.alerts.get(alert.alert_id)
        if known is None or known.revision < alert.revision:
            self.alerts[alert.alert_id] = alert


@dataclass(frozen=True, slots=True)
class Summary:
    """What the ground truth says of the alerts.

    Attributes:
        events: gunfire events (a shot, a burst, automatic fire) that at least one sensor could hear.
        heard: of these, how many raised an alert at one sensor or more.
        arrivals, arrivals_heard: the same, counted for each sensor that could hear the event.
        rounds: single shots fired in these events.
        other_events: fireworks, thunder and the like.
        false_alerts: alerts in which no onset is that of gunfire.
    """

    events: int
    heard: int
    missed: tuple[str, ...]
    arrivals: int
    arrivals_heard: int
    rounds: int
    other_events: int
    false_alerts: tuple[str, ...]
    p50_seconds: float
    p99_seconds: float

    def faults(self) -> list[str]:
        """Why the detector did not do its job; empty when it did."""
        found = []
        if self.events == 0:
            found.append("the scene held no gunfire that a sensor could hear")
        elif self.heard < MIN_HEARD * self.events:
            found.append(f"{self.heard} of {self.events} gunfire events heard; at least {MIN_HEARD:.0%} are expected")
        if len(self.false_alerts) > max(1, self.heard // 4):
            found.append(f"{len(self.false_alerts)} false alerts")
        if self.heard and self.p99_seconds > MAX_P99_SECONDS:
            found.append(f"latency p99 is {self.p99_seconds:.2f} s; {MAX_P99_SECONDS:g} s are promised")
        return found


def summarise(truth: Sequence[dict[str, Any]], heard: Heard) -> Summary:
    """Hold alerts against the lines of a scene's truth file (see ``producers/scene.py``)."""
    events = [line for line in truth if line["record"] == "event"]
    gunfire = [e for e in events if e["gunfire"] and any(s["audible"] for s in e["sensors"])]
    onsets: dict[str, list[float]] = {}
    for alert in heard.alerts.values():
        onsets.setdefault(alert.stream, []).extend(o.at_ns / 1e9 for o in alert.onsets)

    def arrivals(event: dict[str, Any], sensor: dict[str, Any]) -> list[float]:
        start = sensor["arrival_ns"] / 1e9 - sensor["arrival_seconds"]
        return [start + at for at in (sensor["arrival_seconds"], *sensor["arrivals_seconds"])]

    def heard_at(event: dict[str, Any], sensor: dict[str, Any]) -> bool:
        near = arrivals(event, sensor)
        return any(abs(o - at) <= MATCH_SECONDS for o in onsets.get(sensor["stream_id"], ()) for at in near)

    gunfire_arrivals: dict[str, list[float]] = {}
    for event in events:
        if event["gunfire"]:
            for sensor in event["sensors"]:
                gunfire_arrivals.setdefault(sensor["stream_id"], []).extend(arrivals(event, sensor))

    def is_gunfire(alert: Alert) -> bool:
        near = gunfire_arrivals.get(alert.stream, ())
        return any(abs(o.at_ns / 1e9 - at) <= MATCH_SECONDS for o in alert.onsets for at in near)

    could = [(e, s) for e in gunfire for s in e["sensors"] if s["audible"]]
    heard_events = [e for e in gunfire if any(heard_at(e, s) for s in e["sensors"])]
    latencies = sorted(heard.latencies_seconds)
    return Summary(
        events=len(gunfire),
        heard=len(heard_events),
        missed=tuple(f"{e['kind']} at {e['at_seconds']:.1f} s" for e in gunfire if e not in heard_events),
        arrivals=len(could),
        arrivals_heard=sum(heard_at(e, s) for e, s in could),
        rounds=sum(e["shots"] for e in gunfire),
        other_events=sum(not e["gunfire"] for e in events),
        false_alerts=tuple(
            f"{a.stream} at {a.onset_at[11:23]}, score {a.peak_score:.2f}"
            for a in heard.alerts.values()
            if not is_gunfire(a)
        ),
        p50_seconds=statistics.median(latencies) if latencies else float("nan"),
        p99_seconds=latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))] if latencies else float("nan"),
    )


def run_demo(folder: Path, *, sensors: int, seconds: float, seed: int, serve: bool = False, console: Console) -> int:
    """Run the demo in ``folder`` and return the exit code: 0 only if the detector did its job.

    Raises:
        GunfireError: a process could not be started or did not come up.
    """
    stop = threading.Event()
    port = free_port()
    bus_path, truth_path = folder / "bus.sqlite3", folder / "truth.jsonl"
    environ = os.environ | {"DETECTOR__CONSOLE__PORT": str(port), "TF_CPP_MIN_LOG_LEVEL": "2"}
    console.print(f"Starting the detector (log: {folder / 'detector.log'}) ...")
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        detector = stack.enter_context(
            _process(
                [sys.executable, "-m", "detector", "run", "--bus-path", str(bus_path)], folder / "detector.log", environ
            )
        )
        wait_ready(detector, port, folder)
        console.print(f"Ready after {time.monotonic() - started:.1f} s: http://127.0.0.1:{port}/metrics and /readyz")
        bus = EmbeddedBus(bus_path)
        stack.callback(bus.close)
        scene = [sys.executable, "-m", "producers", "scene", "--bus-path", str(bus_path), *_SUBURB]
        scene += ["--sensors", str(sensors)]
        once = [*scene, "--seconds", str(seconds), "--seed", str(seed), "--truth", str(truth_path)]
        console.print(f"A synthetic suburb with {sensors} sensors, {seconds:g} s in real time, seed {seed}.\n")
        with _process(once, folder / "scene.log", environ) as city:
            heard = _listen(bus, city, detector, port, sensors, truth_path, console, stop)
            if city.wait() != 0:
                raise GunfireError(f"The scene ended with exit code {city.returncode}; see {folder / 'scene.log'}.")
        truth = _read_truth(truth_path)
        summary = summarise(truth, heard)
        _print_summary(summary, console)
        faults = summary.faults()
        expected = _expected_chunks(truth, sensors)
        analysed = int(_metric(port, "gunfire_chunks_analysed_total"))
        if analysed != expected:
            faults.append(f"{analysed} chunks analysed of {expected} published")
        else:
            console.print(f"  chunks       {expected} published, {analysed} analysed, 0 lost")
        if serve:
            _serve_on(scene, seed, bus, folder, port, environ, console)
        detector.send_signal(signal.SIGTERM)
        if detector.wait(30) != 0:
            faults.append(f"the detector ended with exit code {detector.returncode}; see {folder / 'detector.log'}")
    if faults:
        console.print(f"\n[bold red]The detector did not do its job:[/] {'; '.join(faults)}.")
        return 1
    console.print("\n[bold green]The detector did its job.[/]")
    return 0


def _listen(
    bus: Bus,
    city: subprocess.Popen[bytes],
    detector: subprocess.Popen[bytes],
    port: int,
    sensors: int,
    truth_path: Path,
    console: Console,
    stop: threading.Event,
) -> Heard:
    """Show alerts until the scene has ended and its last chunk is analysed."""
    heard, table = Heard(), AlertTable()
    deadline: float | None = None
    live = Live(table.render(), console=console, auto_refresh=False) if console.is_terminal else None
    with live or contextlib.nullcontext():
        for alert in read_alerts(bus, "gunfire.alerts", stop, start="earliest", on_bad=_raise):
            if alert is not None:
                heard.add(alert, time.time_ns())
                table.add(alert)
                if live is not None:
                    live.update(table.render(width=console.width), refresh=True)
                elif alert.state == "opened":
                    console.print(one_line(alert), highlight=False, markup=False)
                continue
            if detector.poll() is not None:
                raise GunfireError(f"The detector ended by itself with exit code {detector.returncode}.")
            if city.poll() is None:
                continue
            if deadline is None:
                deadline = time.monotonic() + FINISH_SECONDS
            done = _metric(port, "gunfire_chunks_analysed_total") >= _expected_chunks(_read_truth(truth_path), sensors)
            if done or time.monotonic() > deadline:
                break
        for alert in _rest(bus):
            heard.add(alert, time.time_ns())
    return heard


def _rest(bus: Bus) -> Iterator[Alert]:
    """Everything on the alert topic by now: what came between the last look and the end of the scene."""
    stop = threading.Event()
    for alert in read_alerts(bus, "gunfire.alerts", stop, start="earliest", on_bad=_raise):
        if alert is None:
            return
        yield alert


def _serve_on(
    scene: list[str], seed: int, bus: Bus, folder: Path, port: int, environ: dict[str, str], console: Console
) -> None:
    stop = threading.Event()
    console.print(f"\nThe city goes on until Ctrl-C; http://127.0.0.1:{port}/metrics\n")
    with _process([*scene, "--seed", str(seed + 1)], folder / "scene.log", environ):
        try:
            for alert in read_alerts(bus, "gunfire.alerts", stop, on_bad=_raise):
                if alert is not None and alert.state == "opened":
                    console.print(one_line(alert), highlight=False, markup=False)
        except KeyboardInterrupt:
            console.print("Stopping.")


def _print_summary(summary: Summary, console: Console) -> None:
    console.print("\n[bold]What the ground truth says[/]")
    console.print(
        f"  fired        {summary.events} gunfire events ({summary.rounds} shots), {summary.other_events} others"
    )
    console.print(f"  heard        {summary.heard} of {summary.events} events; {summary.arrivals_heard} of "
                  f"{summary.arrivals} arrivals at single sensors")  # fmt: skip
    console.print(f"  missed       {len(summary.missed)}" + "".join(f"\n               {m}" for m in summary.missed))
    console.print(
        f"  false        {len(summary.false_alerts)}" + "".join(f"\n               {f}" for f in summary.false_alerts)
    )
    console.print(
        f"  latency      p50 {summary.p50_seconds * 1000:.0f} ms, p99 {summary.p99_seconds * 1000:.0f} ms "
        "from the end of capture to the subscriber"
    )


def _expected_chunks(truth: Sequence[dict[str, Any]], sensors: int) -> int:
    ends = [line for line in truth if line["record"] == "end"]
    return round(ends[-1]["seconds"] / 0.96) * sensors if ends else 2**62


def _read_truth(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as e:
        raise GunfireError(f"The ground truth {path} can't be read: {e}") from None


def _metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    for metric in text_string_to_metric_families(text):
        for sample in metric.samples:
            if sample.name == name:
                return sample.value
    return 0.0


def wait_ready(detector: subprocess.Popen[bytes], port: int, folder: Path) -> None:
    """Return once the detector with its console on ``port`` says that it is ready.

    Raises:
        GunfireError: it ended, or took longer than START_SECONDS; with the end of ``folder``/detector.log.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
            return
        try:
            code = detector.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        log = (folder / "detector.log").read_text("utf-8", "replace")[-2000:]
        raise GunfireError(f"The detector ended with exit code {code} before it was ready:\n{log}")
    raise GunfireError(f"The detector was not ready within {START_SECONDS:g} s; see {folder / 'detector.log'}.")


@contextlib.contextmanager
def _process(command: list[str], log: Path, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a process group of its own (Ctrl-C is ours to pass on), ended at the latest on leaving."""
    with log.open("ab") as out:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environ, start_new_session=True
        )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _raise(_record: object, error: GunfireError) -> None:
    raise error
