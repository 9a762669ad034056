"""``detector replay``: an alert, or what one stream heard, once more, and what differs from what was published."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from detector.cli import bus_path_option, config_option, configure_logging, quiet_tensorflow, settings_of, time_option

if TYPE_CHECKING:
    from rich.console import Console

    from detector.alert import Alert
    from detector.config import Settings
    from detector.replay import Outcome, Scored, Served

_ID = re.compile(r"[0-9a-f-]{8,36}(\.\d+)?", re.IGNORECASE)
_BAR_CHARACTERS = 20
_CONTEXT_EXAMPLES = 3


@click.command("replay")
@click.option("--alert", metavar="ID", help="This alert: its id, the first 8 characters of it or more, or an event id.")
@click.option("--from", "from_ns", type=time_option, metavar="TIME", help="Captured at this time or later.")
@click.option("--to", "to_ns", type=time_option, metavar="TIME", help="Captured before this time.")
@click.option("--stream", help="Of this stream; with --from and --to.")
@click.option("--explain", is_flag=True, help="Print the score of each example, onsets and the decision's state.")
@click.option("--format", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the audio here, as WAV.")
@click.option(
    "--model", "model_name", help="A shipped model's name or a package folder, instead of the configured one."
)
@click.option(
    "--back",
    "back_seconds",
    type=click.FloatRange(0, 86_400),
    help="How far to read back for what the decision may remember. Default: daemon.rebuild_max_seconds, at least 600.",
)
@config_option
@bus_path_option
def replay_command(
    alert: str | None,
    from_ns: int | None,
    to_ns: int | None,
    stream: str | None,
    explain: bool,
    output_format: str,
    output: Path | None,
    model_name: str | None,
    back_seconds: float | None,
    config_path: Path | None,
    bus_path: Path | None,
) -> None:
    """Read the audio of an alert again and say whether the same alert comes out, bit for bit, or what differs.

    Times are ISO 8601 (UTC where no zone is given) or Unix times. Exit code: 0 reproduced, 1 something differs,
    2 a command line that can't be meant, 78 a configuration that can't be used.
    """
    in_time = (from_ns, to_ns, stream)
    if (alert is None) == all(given is None for given in in_time):
        raise click.UsageError("Give either --alert, or --from, --to and --stream.")
    if alert is None and any(given is None for given in in_time):
        raise click.UsageError("--from, --to and --stream belong together.")
    if alert is not None and not _ID.fullmatch(alert):
        raise click.UsageError(f"--alert {alert!r} is no alert id; at least 8 characters of one are needed.")
    if from_ns is not None and to_ns is not None and from_ns >= to_ns:
        raise click.UsageError("--to must be later than --from.")
    settings = settings_of(config_path, bus_path)
    configure_logging(settings.log.model_copy(update={"level": "WARNING"}))
    from detector.bus import open_bus

    back_seconds = max(600.0, settings.daemon.rebuild_max_seconds) if back_seconds is None else back_seconds
    topics = settings.topics
    bus = open_bus(settings.bus, create=False)
    quiet_tensorflow()
    from detector.replay import replay_alert, replay_time, write_wav

    try:
        served = _served(settings, model_name)
        if alert is not None:
            outcome = replay_alert(
                bus,
                alerts_topic=topics.alerts,
                chunks_topic=topics.chunks,
                alert=alert,
                served=served,
                back_seconds=back_seconds,
            )
        else:
            assert from_ns is not None
            assert to_ns is not None
            assert stream is not None
            outcome = replay_time(
                bus,
                alerts_topic=topics.alerts,
                chunks_topic=topics.chunks,
                stream=stream,
                from_ns=from_ns,
                to_ns=to_ns,
                served=served,
                back_seconds=back_seconds,
            )
    finally:
        bus.close()
    if output is not None and outcome.audio:
        seconds = write_wav(output, outcome.audio)
        click.echo(f"{output}: {seconds:.2f} s of audio.", err=True)
    if output_format == "json":
        click.echo(json.dumps(report(outcome, served), ensure_ascii=False))
    else:
        _print(outcome, served, explain)
    if not outcome.reproduced:
        raise SystemExit(1)


def _served(settings: Settings, model_name: str | None) -> Served:
    from detector.model import load_model
    from detector.pipeline import pipeline_for

    model = load_model(model_name or settings.model.name, store=settings.model.store, threads=settings.model.threads)
    model.self_test()
    return served_with(
        lambda observer: pipeline_for(model, settings, observer=observer),
        idle_seconds=settings.daemon.stream_idle_seconds,
        package_of=lambda sha256: _shipped_package(sha256, settings.model.store),
    )


def served_with(
    make_pipeline: Callable[..., Any], *, idle_seconds: float, package_of: Callable[[str], str | None] = lambda _: None
) -> Served:
    """What a replay runs with, as the pipelines of ``make_pipeline`` say it."""
    from detector.replay import Served

    pipeline = make_pipeline(None)
    return Served(
        make_pipeline=make_pipeline,
        served=pipeline.served,
        model_name=pipeline.model.name,
        model_sha256=pipeline.model.sha256,
        labels=tuple(pipeline.labels),
        window_examples=pipeline.window_examples,
        hop_samples=pipeline.hop_samples,
        decision=pipeline.decision,
        idle_seconds=idle_seconds,
        package_of=package_of,
    )


def _shipped_package(sha256: str, store: Path | None) -> str | None:
    from detector.errors import ModelError
    from detector.model import load_model, shipped_models

    for manifest in shipped_models():
        with suppress(ModelError):  # one whose weights were never fetched can't be told apart
            if load_model(manifest.name, store=store).sha256 == sha256:
                return manifest.name
    return None


def report(outcome: Outcome, served: Served) -> dict[str, Any]:
    """The outcome as JSON: everything but the audio."""
    return {
        "reproduced": outcome.reproduced,
        "differences": [asdict(d) for d in outcome.differences],
        "notes": outcome.notes,
        "same": outcome.same,
        "missing": outcome.missing,
        "extra": outcome.extra,
        "model": {"name": served.model_name, "sha256": served.model_sha256},
        "served": served.served,
        "history": None if outcome.history is None else asdict(outcome.history),
        "published": [asdict(a) for a in outcome.published],
        "replayed": [asdict(a) for a in outcome.replayed],
        "timeline": [
            {**asdict(e), "scores": dict(zip(served.labels, e.scores, strict=True))} for e in outcome.timeline
        ],
    }


def _print(outcome: Outcome, served: Served, explain: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for alert in outcome.published:
        console.print(_line("published", alert), markup=False)
    for alert in outcome.replayed:
        console.print(_line("replayed", alert), markup=False)
    if explain:
        _print_timeline(outcome, served, console)
    if outcome.history is not None:
        h = outcome.history
        exact = "exact" if h.exact else "not sure to be exact"
        console.print(f"Read {h.chunks} chunks back, to offset {h.first_offset}: {exact}, as {h.why}.", markup=False)
    for note in outcome.notes:
        console.print(f"Note: {note}", markup=False)
    for difference in outcome.differences:
        console.print(f"Differs ({difference.kind}): {difference.text}", markup=False)
    if outcome.reproduced:
        events = f"{len(outcome.published)} event{'s' if len(outcome.published) != 1 else ''}"
        console.print(
            f"Reproduced: {len(outcome.same)} alert{'s' if len(outcome.same) != 1 else ''} with {events}, "
            f"{len(outcome.timeline)} examples scored again; every published score is the same to its last digit.",
            markup=False,
        )
    else:
        console.print(
            f"Not reproduced: {len(outcome.same)} same, {len(outcome.missing)} missing, {len(outcome.extra)} extra.",
            markup=False,
        )


def _line(word: str, alert: Alert) -> str:
    from detector.watch import one_line

    where = "" if alert.audio is None else f" offsets {alert.audio.first_offset}-{alert.audio.last_offset}"
    return f"{word:9} {one_line(alert)} id {alert.event_id}{where}"


def _print_timeline(outcome: Outcome, served: Served, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console as WideConsole
    from rich.table import Table
    from rich.text import Text

    from detector.alert import rfc3339

    events = outcome.replayed or outcome.published
    states = states_of(outcome.timeline, events, served)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("captured (UTC)", "score"):
        table.add_column(name, no_wrap=True)
    table.add_column(f"0 to 1, open at {served.decision.open_threshold:.3g}", no_wrap=True)
    for name in ("look-alike", "onsets (UTC)", "decision"):
        table.add_column(name)
    for example, state in zip(outcome.timeline, states, strict=True):
        likes = [(example.scores[i], served.labels[i]) for i in served.decision.look_alikes]
        best = max(likes, default=None)
        table.add_row(
            rfc3339(max(0, example.at_ns))[11:23],
            f"{example.score:.6f}",
            Text(bar(example.score, served.decision.open_threshold)),
            Text("" if best is None else f"{best[1]} {best[0]:.3f}"),
            " ".join(onsets_of(example, events)),
            Text(state, style="bold" if state else ""),
        )
    wide = console if sys.stdout.isatty() else WideConsole(width=140, highlight=False)
    wide.print(table)


def bar(score: float, threshold: float) -> str:
    """A score from 0 to 1 in 20 characters, with a mark at the threshold."""
    filled = min(_BAR_CHARACTERS, max(0, round(score * _BAR_CHARACTERS)))
    mark = min(_BAR_CHARACTERS - 1, int(threshold * _BAR_CHARACTERS))
    characters = ["#" if i < filled else "." for i in range(_BAR_CHARACTERS)]
    characters[mark] = "+" if mark < filled else "|"
    return "".join(characters)


def onsets_of(example: Scored, events: Sequence[Alert]) -> list[str]:
    """Times of the shots that lie in the part of the example which is new, ``?`` behind one that is not certain."""
    from detector.decision import OVERLAP_SAMPLES

    found: dict[int, str] = {}
    for alert in events:
        if alert.session != example.session:
            continue
        for onset in alert.onsets:
            if example.start_sample + OVERLAP_SAMPLES <= onset.sample < example.end_sample:
                found[onset.sample] = onset.at[17:23] + ("" if onset.certain else "?")
    return [found[sample] for sample in sorted(found)]


def states_of(timeline: Sequence[Scored], events: Sequence[Alert], served: Served) -> list[str]:
    """What the decision did at each example: told something, held an alert open, waited, or nothing."""
    from detector.chunk import RATE_HZ

    cooldown_samples = round(served.decision.cooldown_seconds * RATE_HZ)
    ordered = sorted(events, key=lambda a: (a.decided_sample, a.onset_sample, a.revision))
    states = []
    session, told, is_open, cold_until = None, 0, False, -1
    for example in timeline:
        if example.session != session:
            session, told, is_open, cold_until = example.session, 0, False, -1
        mine = [a for a in ordered if a.session == session]
        words = []
        while told < len(mine) and mine[told].decided_sample <= example.end_sample:
            alert = mine[told]
            told += 1
            words.append(alert.state if alert.close_reason is None else f"closed ({alert.close_reason})")
            is_open = alert.state != "closed"
            if alert.close_reason == "quiet":
                cold_until = alert.decided_sample + cooldown_samples
        if not words and is_open:
            words.append("open")
        elif not words and example.end_sample <= cold_until:
            words.append("cooldown")
        elif not words and example.score >= served.decision.open_threshold:
            words.append("support")
        states.append(", ".join(words))
    return states
