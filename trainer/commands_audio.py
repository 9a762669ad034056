"""``trainer evaluate-audio``: models and peers on recordings and continuous audio, through the detector's pipeline."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from detector.cli import config_option, quiet_tensorflow, settings_of
from detector.errors import ConfigError, DataError
from detector.operating_point import plain
from trainer.audio_plot import plot_curves
from trainer.commands_evaluate import check_outputs, check_picture
from trainer.progress import shown

if TYPE_CHECKING:
    from detector.config import Settings
    from trainer.compact.evaluation import Recording
    from trainer.evaluate_audio import AudioReport, Examination, Share, Subject


@click.command("evaluate-audio")
@click.option(
    "--model",
    "models",
    multiple=True,
    help="Shipped model or package folder; may be repeated. Default: compact-gunfire.",
)
@click.option("--peers/--no-peers", default=True, show_default=True, help="YAMNet and CED-tiny beside it.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="DATA_DIR",
    default=Path("../shared/data"),
    show_default=True,
    help="Folder with audio/index.csv, and the peers (environment: DATA_DIR).",
)
@click.option("--set", "sets", multiple=True, help="Only these sets (first folder of the path); may be repeated.")
@click.option(
    "--hop-seconds",
    type=click.Choice(["0.96", "0.48"]),
    default=None,
    help="Between examples. Default: batch.hop_seconds of the configuration.",
)
@click.option("--tolerance-seconds", type=click.FloatRange(0.001, 2.0), default=0.1, show_default=True)
@click.option("--format", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Instead of standard output.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="The curves as a picture (.png or .svg).")
@click.option("--cache", type=click.Path(path_type=Path, dir_okay=False), help="Keeps the resampled audio (.npz).")
@config_option
def evaluate_audio_command(
    models: tuple[str, ...],
    peers: bool,
    data_dir: Path,
    sets: tuple[str, ...],
    hop_seconds: str | None,
    tolerance_seconds: float,
    output_format: str,
    output: Path | None,
    plot: Path | None,
    cache: Path | None,
    config_path: Path | None,
) -> None:
    """Recall by set, distance and SNR; onset errors; false alerts an hour; false alerts a day against recall.

    Split `dev` of audio/index.csv is heard through the pipeline that serves. Recordings labelled `gunshot` hold
    gunfire, all others none; set `ambient` is continuous audio, in which false alerts are counted by the hour. What
    is not there (tagged shots, peers, continuous audio) is left out, and said.
    """
    settings = settings_of(config_path)
    check_outputs(output, plot)
    if plot is not None:
        check_picture(plot)
    audio_dir = data_dir / "audio"
    if not (audio_dir / "index.csv").is_file():
        raise ConfigError(f"--data-dir {data_dir} (environment: DATA_DIR) holds no audio/index.csv; name another.")
    quiet_tensorflow()
    from trainer.compact.evaluation import is_continuous, load_recordings
    from trainer.compact.pools import onsets_file
    from trainer.evaluate_audio import examine, read_shots
    from trainer.run import write_whole

    hop = float(hop_seconds) if hop_seconds is not None else settings.batch.hop_seconds
    subjects, left_out = _subjects(models or ("compact-gunfire",), settings, data_dir if peers else None)
    if not onsets_file(audio_dir).is_file():
        left_out.append(f"Tagged shots and set shotspotter: {onsets_file(audio_dir)} is missing.")
    for line in left_out:
        click.echo(f"Left out. {line}", err=True)
    click.echo("Reading and resampling the recordings ...", err=True)
    recordings = _chosen(load_recordings(audio_dir, cache, tags_needed=False), sets, audio_dir)
    shots = read_shots(audio_dir)
    if not any(is_continuous(recording) for recording in recordings):
        left_out.append("False alerts an hour and a day: no continuous audio (set `ambient`) is among the recordings.")
        click.echo(f"Left out. {left_out[-1]}", err=True)
    found: list[Examination] = []
    with shown(stay=True, lines=True) as tell:
        for subject in subjects:

            def told(what: str, done: int, whole: int, name: str = subject.name) -> None:
                tell(f"{name}: {what}", done, whole, "")

            found.append(
                examine(subject, recordings, shots, hop_seconds=hop, tolerance_seconds=tolerance_seconds, told=told)
            )
    if plot is not None:
        plot_curves(found, plot)
        click.echo(f"Curves: {plot}", err=True)
    if output_format == "json":
        content = {"left_out": left_out, "subjects": [one.as_json() for one in found]}
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        if output is None:
            click.echo(text, nl=False)
            return
    elif output is None:
        console = Console()
        console.width = max(console.width, 132)
        show(found, left_out, console)
        return
    else:
        written = io.StringIO()
        show(found, left_out, Console(file=written, width=130))
        text = written.getvalue()
    write_whole(output, text.encode())


def _subjects(models: Sequence[str], settings: Settings, peers_dir: Path | None) -> tuple[list[Subject], list[str]]:
    """Who is examined, and why whom is not."""
    from detector.alert import ModelIdentity
    from detector.model import load_model
    from detector.pipeline import decision_settings
    from trainer.evaluate_audio import Subject
    from trainer.peers import peers_in

    subjects: list[Subject] = []
    own = settings.decision.model_copy(
        update={"open_threshold": None, "close_threshold": None, "false_alerts_per_day": None}
    )
    for name in models:
        model = load_model(Path(name) if os.sep in name else name, store=settings.model.store)
        decision = decision_settings(model.manifest, own)
        subjects.append(
            Subject(
                f"{model.name} {model.version}",
                model,
                model.labels,
                ModelIdentity(model.name, model.version, model.sha256),
                model.window_examples,
                decision,
                decision.open_threshold,
            )
        )
    if peers_dir is None:
        return subjects, []
    peers, left_out = peers_in(peers_dir)
    for peer in peers:
        family = tuple(peer.labels.index(label) for label in peer.family if label in peer.labels)
        decision = dataclasses.replace(
            subjects[0].decision, family=family, look_alikes=(), open_threshold=0.5, close_threshold=0.3
        )
        subjects.append(
            Subject(peer.identity.name, peer, peer.labels, peer.identity, peer.window_examples, decision, None)
        )
    return subjects, left_out


def _chosen(recordings: list[Recording], sets: tuple[str, ...], audio_dir: Path) -> list[Recording]:
    known = sorted({r.set for r in recordings})
    if unknown := sorted(set(sets) - set(known)):
        raise ConfigError(f"--set {', '.join(unknown)} is unknown; there are {', '.join(known) or 'none'}.")
    chosen = [r for r in recordings if not sets or r.set in sets]
    if all(r.positive for r in chosen):
        where = f"--set {', '.join(sets)}" if sets else f"{audio_dir / 'index.csv'}, split dev"
        raise DataError(f"{where}: no recording without gunfire is left, so no threshold can be compared. Add some.")
    return chosen


def show(found: Sequence[Examination], left_out: Sequence[str], console: Console) -> None:
    """Tables for people; where there is nothing to fill one with, a line that says so."""
    from rich.table import Table

    compared = [one.at_clip_threshold for one in found]
    columns = [(report.subject, report) for report in compared]
    columns[1:1] = [
        (f"{one.subject}, its own threshold", one.at_own_threshold) for one in found if one.at_own_threshold is not None
    ]

    def table(title: str, rows: dict[str, Callable[[AudioReport], str]]) -> None:
        if not rows:
            console.print(f"{title}: none.")
            return
        made = Table(title=title, title_justify="left", title_style="bold")
        made.add_column("")
        for name, _ in columns:
            made.add_column(name, justify="right")
        for name, cell in rows.items():
            made.add_row(name, *(cell(report) for _, report in columns))
        console.print(made)

    def shares(pick: Callable[[AudioReport], dict[str, Share]]) -> dict[str, Callable[[AudioReport], str]]:
        names = dict.fromkeys(name for _, report in columns for name in pick(report))
        return {name: lambda r, name=name: _percent(pick(r).get(name)) for name in names}  # type: ignore[misc]

    first = compared[0]
    console.print(
        f"Compared at the threshold that 1 % of {first.negatives.whole} negative recordings reach; examples "
        f"{first.hop_seconds:g} s apart. In brackets: the 95 % interval."
    )
    table(
        "Threshold",
        {"opens at": lambda r: f"{r.threshold:.5f}", "negative recordings": lambda r: _percent(r.negatives)},
    )
    table("Recordings with gunfire that were heard (tagged ones: at the right time)", shares(lambda r: dict(r.recall)))
    tagged: dict[str, Callable[[AudioReport], str]] = {"all": lambda r: _percent(r.shots)} if first.shots.whole else {}
    table(
        "Tagged shots with an onset within the tolerance",
        tagged
        | {f"{k} m": v for k, v in shares(lambda r: dict(r.by_distance)).items()}
        | {f"SNR {k} dB": v for k, v in shares(lambda r: dict(r.by_snr)).items()},
    )
    if tagged:
        table(
            "Times",
            {
                "onset error, median": lambda r: _milliseconds(_absolute(r.onset_errors_seconds), 0.5),
                "onset error, 90 %": lambda r: _milliseconds(_absolute(r.onset_errors_seconds), 0.9),
                "onset to alert, median": lambda r: _milliseconds(r.latencies_seconds, 0.5),
                "onset to alert, 90 %": lambda r: _milliseconds(r.latencies_seconds, 0.9),
            },
        )
    table(
        "Recordings without gunfire that have an alert",
        shares(lambda r: {k: s for k, s in r.by_label.items() if s.part}),
    )
    if first.audio_hours:
        table(
            f"Continuous audio without gunfire: {first.audio_hours:.2f} h",
            {
                "false alerts": lambda r: str(r.false_alerts),
                "an hour": lambda r: "{:.2f} [{:.2f}, {:.2f}]".format(*r.per_hour()),
            },
        )
        for one in found:
            _show_curve(one, console)
    for line in left_out:
        console.print(f"Left out. {line}", highlight=False, markup=False, soft_wrap=True)


def _show_curve(one: Examination, console: Console) -> None:
    from rich.table import Table

    if not one.curve:
        console.print(f"{one.subject}: too few false alerts in continuous audio for a curve.")
        return
    made = Table(title=f"{one.subject}: false alerts a day and stream", title_justify="left", title_style="bold")
    for name in ("a day", "", "threshold", "recordings heard", "tagged shots", "onset to alert, median"):
        made.add_column(name, justify="right")
    for point in one.curve:
        assert point.rate is not None  # a curve is made of rates
        parts = [(share.part, share.whole) for share in point.recall.values()]
        heard, whole = sum(p for p, _ in parts), sum(w for _, w in parts)
        made.add_row(
            plain(point.rate.per_day),
            f"extrapolated {plain(point.rate.extrapolation)} times" if point.rate.extrapolation > 1.005 else "counted",
            f"{point.threshold:.6f}",
            f"{100 * heard / whole:.1f} %" if whole else "",
            _percent(point.shots),
            _milliseconds(point.latencies_seconds, 0.5),
        )
    console.print(made)
    hours = one.curve[0].audio_hours
    console.print(
        f"{hours:.2f} h of audio can show {24 / hours:.0f} false alerts a day and more; what is rarer continues the "
        "tail of the scores and is a guess, better checked on the sensors' own audio."
    )


def _percent(share: Share | None) -> str:
    if share is None or not share.whole:
        return ""
    low, high = share.interval()
    return f"{100 * share.value:.1f} % of {share.whole} [{100 * low:.0f}, {100 * high:.0f}]"


def _absolute(values: Sequence[float]) -> list[float]:
    return [abs(value) for value in values]


def _milliseconds(values: Sequence[float], quantile: float) -> str:
    import numpy as np

    return f"{1000 * float(np.quantile(np.asarray(values), quantile)):.0f} ms" if len(values) else ""
