"""``trainer compact``: the whole recipe of the built-in model, step by step.

What was made stays in the work folder and is not made again; its run.json says with which settings, and a step with
other ones is refused.

prepare     recordings of split train -> pool
synthesise  pool -> scenes -> shards of PCM with targets
teach       shards -> log-mel, and what YAMNet and CED-tiny think of the examples
train       shards -> embedder and LSTM head; with --from on from a package's embedder
evaluate    dev recordings through what was trained, or through any package
failures    the loudest false alarms and the shots least heard, as a picture
export      -> package: weights, operating point, curve
all         prepare, synthesise, teach, train, export, evaluate
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from detector.cli import quiet_tensorflow
from detector.errors import ConfigError, DataError, GunfireError
from trainer.progress import shown

if TYPE_CHECKING:
    from trainer.compact.dataset import DataPlan
    from trainer.compact.evaluation import Report, Scorer
    from trainer.compact.training import Trained, TrainingSettings
    from trainer.compact.work import MadeWith

_VERSION = "0.12.0"


@dataclass(frozen=True, slots=True)
class _Run:
    """What all steps share."""

    work: Path
    data_dir: Path
    seed: int
    scenes: int
    close_scenes: int
    steps: int
    rounds: int
    given: frozenset[str]
    """Options that the command line names, spelled so."""
    begun: str = ""
    inherited: tuple[str, ...] = ()

    @property
    def audio_dir(self) -> Path:
        return self.data_dir / "audio"

    @property
    def trained_path(self) -> Path:
        return self.work / "trained.npz"

    @property
    def package(self) -> Path:
        return self.work / "package"

    @property
    def options(self) -> MadeWith:
        from trainer.compact.work import MadeWith

        return MadeWith(
            self.seed,
            self.scenes,
            self.close_scenes,
            self.steps,
            rounds=self.rounds,
            begun=self.begun,
            inherited=self.inherited,
        )

    @property
    def wanted(self) -> MadeWith:
        """The options and what recordings there are."""
        from trainer.compact.work import recordings_hash

        return replace(self.options, recordings=recordings_hash(self.audio_dir))

    def check(self, free: Collection[str] = ()) -> None:
        """Raises ConfigError where the folder has other settings, but for options ``free``."""
        from trainer.compact.work import check

        check(self.work, self.wanted, free)

    def claim(self, free: Collection[str] = (), *, keep_training: bool = False) -> None:
        """``check``, and note the settings: whatever makes something does so once it has what it needs.

        With ``keep_training`` what decides nothing but training may differ, and stays as the folder has it.
        """
        from trainer.compact.work import claim

        claim(self.work, self.wanted, free, keep_training=keep_training)

    def made_with(self) -> MadeWith:
        """For what only reads: the folder's settings, ConfigError where the command line names other ones."""
        from trainer.compact.work import SCENES, check

        free = {*self.options.by_option} - self.given | {"--from", SCENES}
        return check(self.work, self.options, free) or self.options

    def plans(self) -> tuple[DataPlan, ...]:
        """Mixtures; and whole recordings moved elsewhere: as many, and a quarter of the close ones. All each round."""
        from trainer.compact.dataset import DataPlan

        mixed = DataPlan(self.work / "pool", self.work / "data", self.scenes, self.seed, self.close_scenes)
        moved = replace(mixed, mixture="elsewhere", close_scenes=self.close_scenes // 4)
        seed = self.seed
        both = mixed, replace(moved, seed=seed + 4), replace(mixed, seed=seed + 6), replace(moved, seed=seed + 8)
        return both[: 2 * self.rounds]

    def settings(self) -> TrainingSettings:
        from trainer.compact.training import TrainingSettings

        return replace(TrainingSettings(), seed=self.seed).with_steps(self.steps)


@click.group("compact")
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("var/compact"),
    show_default=True,
    help="Work folder.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="DATA_DIR",
    default=Path("../shared/data"),
    show_default=True,
    help="Folder of recordings and teachers (environment: DATA_DIR).",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=1, show_default=True)
@click.option(
    "--scenes",
    type=click.IntRange(1),
    default=5_000,
    show_default=True,
    help="Scenes of ten examples, twice in each round: mixed, and moved elsewhere.",
)
@click.option(
    "--close-scenes",
    type=click.IntRange(0),
    default=4_000,
    show_default=True,
    help="Scenes besides, among them what cameras and phones keep of close fire.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=4_000,
    show_default=True,
    help="Steps of the embedder's first stage; half as many follow. With `train --from` each stage takes 75 % of it.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 2),
    default=2,
    show_default=True,
    help="How often both sorts of scenes are made, each time others.",
)
@click.pass_context
def compact(context: click.Context, /, **options: Any) -> None:
    """Make the built-in model: prepare, synthesise, teach, train, evaluate, export (or all)."""
    given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    context.obj = _Run(**options, given=frozenset(f"--{name.replace('_', '-')}" for name in given))


@compact.command()
@click.pass_obj
def prepare(run: _Run) -> None:
    """Read, resample and sort every recording that may be trained on."""
    _prepare(run)


@compact.command()
@click.option("--processes", type=click.IntRange(1, 64), default=None, help="Default: one a core.")
@click.pass_obj
def synthesise(run: _Run, processes: int | None) -> None:
    """Compose and record scenes; what was made already is kept."""
    _synthesise(run, processes)


@compact.command()
@click.pass_obj
def teach(run: _Run) -> None:
    """Ask the teachers about the examples; what they heard already is kept."""
    quiet_tensorflow()
    _teach(run)


@compact.command()
@click.option(
    "--again", is_flag=True, help="Train although something is trained already; --steps and --from may be others."
)
@click.option(
    "--from",
    "begun",
    default=None,
    help="Go on from this package's embedder (name or folder), not from random weights, twice with 75 % of --steps; "
    "a mean of both ends and of what it was is kept.",
)
@click.pass_obj
def train(run: _Run, again: bool, begun: str | None) -> None:
    """Train the embedder, then the LSTM head; stopped, the embedder goes on from its last checkpoint."""
    quiet_tensorflow()
    if begun is None:
        _train(run, again)
        return
    from detector.model import load_classifier
    from trainer.export import embedder_parts

    packaged = load_classifier(_name_or_path(begun))
    manifest, embedder = packaged.manifest, packaged.manifest.embedder
    if embedder.kind != "compact" or embedder.sha256 is None:
        raise ConfigError(f"--from {begun}: its embedder is {embedder.kind!r}; only a compact one can go on here.")
    weights = embedder_parts(str(packaged.folder.absolute())).weights
    origin = f"{manifest.name} {manifest.version}, embedder {embedder.sha256[:12]}"
    _train(replace(run, begun=origin, inherited=manifest.training.data), again, weights)


@compact.command()
@click.option(
    "--model", "model_name", default=None, help="A package (name or folder) instead of what was trained here."
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Write all figures there.",
)
@click.pass_obj
def evaluate(run: _Run, model_name: str | None, json_path: Path | None) -> None:
    """Dev recordings, streamed: recall by set, false alarms by class, robustness; hop 0.48 s and 0.96 s."""
    if json_path is not None:
        _make_room(json_path)
    quiet_tensorflow()
    _evaluate(run, model_name, json_path)


@compact.command()
@click.argument("picture", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--model", "model_name", default=None, help="A package instead of what was trained here.")
@click.pass_obj
def failures(run: _Run, picture: Path, model_name: str | None) -> None:
    """Draw the loudest false alarms and the shots least heard into PICTURE (.png or .svg)."""
    quiet_tensorflow()
    from trainer.commands_evaluate import check_picture
    from trainer.compact import evaluation, pictures

    check_picture(picture)
    _make_room(picture)
    evaluation.check_recordings(run.audio_dir)
    recordings = evaluation.load_recordings(run.audio_dir, run.work / "dev.npz")
    scored = evaluation.score_recordings(_scorer(run, model_name), recordings, half_hop=True)
    pictures.draw(pictures.failures(scored, evaluation.clip_threshold(scored)), picture)


def _package_options(command: Callable[..., None]) -> Callable[..., None]:
    """Of both commands that write a package."""
    for option in (
        click.option("--date", type=click.DateTime(["%Y-%m-%d"]), help="For the manifest. Default: today, UTC."),
        click.option("--version", default=_VERSION, show_default=True),
        click.option("--name", default="compact-gunfire", show_default=True),
        click.option(
            "--out",
            type=click.Path(path_type=Path, file_okay=False),
            default=None,
            help="Package folder; default: in the work folder.",
        ),
    ):
        command = option(command)
    return command


@compact.command()
@_package_options
@click.option("--after", default="", help="Commands that came before, for the manifest.")
@click.pass_obj
def export(run: _Run, out: Path | None, name: str, version: str, date: datetime.datetime | None, after: str) -> None:
    """Write the package: folded weights, thresholds from dev, operating curve, self-test."""
    day = _day(date)
    quiet_tensorflow()
    _export(run, _Named.checked(out or run.package, name, version, day), after)


@compact.command("all")
@click.option("--processes", type=click.IntRange(1, 64), default=None, help="Default: one a core.")
@_package_options
@click.pass_obj
def everything(
    run: _Run,
    processes: int | None,
    out: Path | None,
    name: str,
    version: str,
    date: datetime.datetime | None,
) -> None:
    """Prepare, synthesise, teach, train, export, and evaluate the package."""
    from trainer.compact.evaluation import check_recordings

    day = _day(date)
    quiet_tensorflow()
    named = _Named.checked(out or run.package, name, version, day)
    run.check()
    check_recordings(run.audio_dir)
    _prepare(run)
    _synthesise(run, processes)
    _teach(run)
    _train(run, again=False)
    _export(run, named)
    _evaluate(run, str(named.folder.absolute()), None)


@dataclass(frozen=True, slots=True)
class _Named:
    """Where a package goes, and what it is called."""

    folder: Path
    name: str
    version: str
    date: str

    @classmethod
    def checked(cls, folder: Path, name: str, version: str, date: str) -> _Named:
        """Raises ConfigError where a manifest can't hold them: before the work."""
        from trainer.export import check_name

        check_name(name, version)
        return cls(folder, name, version, date)


def _day(date: datetime.datetime | None) -> str:
    """``date``, else what SOURCE_DATE_EPOCH says (reproducible-builds.org/specs/source-date-epoch), else today, UTC.

    Asked for before anything is imported: NumPy reads the variable too, and ends in a traceback for a bad one.
    """
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        if date is None and seconds is not None:
            date = datetime.datetime.fromtimestamp(int(seconds), datetime.timezone.utc)
        return (date or datetime.datetime.now(datetime.timezone.utc)).date().isoformat()
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(f"SOURCE_DATE_EPOCH is {seconds!r}, not a number of seconds since 1970.") from error


def _make_room(path: Path) -> None:
    """For a file that is written when the work is done: ConfigError now where it can't be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder of {path} can't be made: {error.strerror or error}.") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} can't be written: give a file in a folder that you may write to.")


def _prepare(run: _Run) -> None:
    from trainer.compact.pools import build_pool, read_index

    folder = run.work / "pool"
    if (folder / "pool.json").is_file():
        run.claim(keep_training=True)
        click.echo(f"{folder} is prepared already.")
        return
    started = time.monotonic()
    rows = read_index(run.audio_dir)  # before a folder is made for data that is not there
    run.claim(keep_training=True)
    pool = build_pool(run.audio_dir, folder, rows)
    hours = len(pool.pcm) / 16_000 / 3600
    click.echo(f"{len(pool.clips)} clips, {hours:.1f} h, in {time.monotonic() - started:.0f} s.")


def _synthesise(run: _Run, processes: int | None) -> None:
    from trainer.compact.dataset import make_shards
    from trainer.compact.pools import load_pool
    from trainer.compact.work import TRAINING

    run.check(TRAINING)
    load_pool(run.work / "pool")
    run.claim(keep_training=True)
    _shard_by_shard(run, "Scenes", lambda plan: make_shards(plan, processes or os.cpu_count() or 1))


def _teach(run: _Run) -> None:
    from trainer.compact.dataset import present, teach_shards
    from trainer.compact.teachers import Teachers
    from trainer.compact.work import TRAINING

    run.check(TRAINING)
    try:
        teachers = Teachers(run.data_dir)
    except GunfireError:
        raise
    except Exception as error:  # each library has its own for a file that is no network
        raise ConfigError(
            f"yamnet/yamnet.tflite or ced/ced_tiny.onnx in {run.data_dir} is no network that can be read: {error}"
        ) from error
    present(run.plans()[0].shards()[0].path)
    run.claim(keep_training=True)
    _shard_by_shard(run, "Teachers", lambda plan: teach_shards(plan, teachers))


def _shard_by_shard(run: _Run, what: str, step: Callable[[DataPlan], Iterator[int]]) -> None:
    """``step`` of all scenes."""
    plans = run.plans()
    with shown(stay=True, lines=True) as tell:
        for number, plan in enumerate(plans, start=1):
            name = f"{what} ({number} of {len(plans)})"
            for done in step(plan):
                tell(name, done, len(plan), "")


def _train(run: _Run, again: bool, begun: Mapping[str, Any] | None = None) -> None:
    """Each part is kept in the work folder; an embedder that was stopped goes on from its last checkpoint."""
    from trainer.compact.work import TRAINING

    settings = run.settings()
    paths = {name: run.work / f"{name}.npz" for name in ("begun", *settings.stages)}
    kept = {name: run.work / f"{name}.checkpoint.npz" for name in settings.stages}
    stages = ("first", "second") if begun is None else ("onward", "abreast")
    made = [path for path in (run.trained_path, *paths.values(), *kept.values()) if path.is_file()]
    free = TRAINING if again else () if made else ("--from",)
    run.check(free)
    if run.trained_path.is_file() and not again:
        click.echo(f"{run.trained_path} is trained already (--again to train anew).")
        return
    from detector.embedders.compact import CompactNetwork
    from trainer.compact.dataset import load_data
    from trainer.compact.training import Trained, begin_from, quick_in_bfloat16, train_embedder, train_head

    data = load_data(*run.plans())
    run.claim(free)
    if again:
        for path in made:
            path.unlink(missing_ok=True)
    if not all(paths[name].is_file() for name in stages) and not quick_in_bfloat16():
        click.echo("Products in float32, as bfloat16 is no quicker on this machine.")
    with shown(stay=True, lines=True) as tell:
        ends: list[Trained] = []
        if begun is not None:
            if not paths["begun"].is_file():
                served = CompactNetwork()
                served.load(begun)
                begin_from(served, data, settings, partial(tell, "Example head")).save(paths["begun"])
            ends.append(Trained.load(paths["begun"]))
        for name in stages:
            if not paths[name].is_file():
                said, origin = partial(tell, f"Embedder ({name})"), ends[0] if ends else None
                train_embedder(data, settings, settings.stages[name], said, kept[name], origin)[0].save(paths[name])
            ends.append(Trained.load(paths[name]))
        share = settings.onward_share
        trained = Trained.mean(ends, None if begun is None else (1.0 - 2.0 * share, share, share))
        steady = settings.stages[stages[-1]].steady
        lstm, _ = train_head(data, trained, settings, partial(tell, "LSTM head"), steady)
    head = {name: variable.numpy() for name, variable in lstm.named_variables().items()}
    Trained(trained.embedder, trained.example_head, head).save(run.trained_path)


def _evaluate(run: _Run, model_name: str | None, json_path: Path | None) -> None:
    from trainer.compact import evaluation
    from trainer.compact.packaging import report_as_json

    scorer = _scorer(run, model_name)
    evaluation.check_recordings(run.audio_dir)
    recordings = evaluation.load_recordings(run.audio_dir, run.work / "dev.npz")
    scored = {0.48: evaluation.score_recordings(scorer, recordings, half_hop=True)}
    scored[0.96] = evaluation.score_recordings(scorer, recordings)
    results = {
        f"1 % of negative clips, hop {hop} s": evaluation.report(each, evaluation.clip_threshold(each))
        for hop, each in scored.items()
    }
    limits = {"threshold of the first row": evaluation.clip_threshold(scored[0.48])}
    if model_name is not None:
        from detector.model import load_manifest

        opened = load_manifest(_name_or_path(model_name)).decision.open_threshold
        results |= {f"shipped default, hop {hop} s": evaluation.report(each, opened) for hop, each in scored.items()}
        limits["shipped default"] = opened
    for treatment in evaluation.treatments():
        changed = evaluation.score_recordings(scorer, evaluation.altered(recordings, treatment), half_hop=True)
        results |= {f"{treatment}, {name}": evaluation.report(changed, limit) for name, limit in limits.items()}
    _show(results)
    for edge in (*evaluation.edges(), evaluation.OVERDRIVEN):
        negatives = evaluation.edged(recordings, edge, evaluation.REPORTED_DRAWS)
        changed = evaluation.score_recordings(scorer, negatives, half_hop=True)
        shares = []
        for name, limit in limits.items():
            found = results[f"{edge}, {name}"] = evaluation.report(changed, limit)
            shares.append(f"{100 * found.clip_false_alarms:.2f} % of the clips above {limit:.4f}")
        ambient = evaluation.ambient_threshold(changed)
        click.echo(f"Negatives with {edge}: {', '.join(shares)}; ambient audio up to {ambient:.4f}.")
    if json_path is not None:
        try:
            json_path.write_text(report_as_json(results) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{json_path} can't be written: {error.strerror or error}.") from error


def _export(run: _Run, named: _Named, after: str = "") -> None:
    from detector.chunk import RATE_HZ
    from detector.config import DecisionSettings
    from trainer.compact import evaluation, packaging
    from trainer.compact.pools import load_pool
    from trainer.compact.training import scorer_of

    made = run.made_with()
    trained = _trained(run)
    data = packaging.data_names(load_pool(run.work / "pool").clips)
    data += [name for name in made.inherited if name not in data]
    if made.begun.startswith(f"{named.name} {named.version},"):
        raise ConfigError(f"This went on from {made.begun}: give it another --name or --version.")
    evaluation.check_recordings(run.audio_dir)
    recordings = evaluation.load_recordings(run.audio_dir, run.work / "dev.npz")
    scorer = scorer_of(trained)
    scored = evaluation.score_recordings(scorer, recordings)
    dense = evaluation.score_recordings(scorer, recordings, half_hop=True)
    negatives = [recording for recording in recordings if not recording.positive]
    otherwise = [evaluation.altered(negatives, treatment) for treatment in evaluation.treatments()]
    otherwise += [evaluation.edged(negatives, edge, evaluation.CHOOSING_DRAWS) for edge in evaluation.edges()]
    treated = [evaluation.score_recordings(scorer, each, half_hop=True) for each in otherwise]
    hold_seconds = DecisionSettings().hold_seconds
    model = packaging.export(
        trained,
        named.folder,
        name=named.name,
        version=named.version,
        command=f"{after}; trainer compact export" if after else made.command,
        date=named.date,
        data=data,
        thresholds=packaging.choose_thresholds(dense, treated),
        curve=packaging.operating_curve(dense),
        false_alerts=[
            evaluation.false_alerts_section(each, each[0].hop_samples / RATE_HZ, hold_seconds)
            for each in (scored, dense)
        ],
    )
    click.echo(f"{named.folder}: opens at {model.manifest.decision.open_threshold}, self-test passed.")


def _trained(run: _Run) -> Trained:
    from trainer.compact.training import Trained

    run.made_with()
    return Trained.load(run.trained_path)


def _name_or_path(text: str) -> str | Path:
    return Path(text) if os.sep in text else text


def _scorer(run: _Run, model_name: str | None) -> Scorer:
    if model_name is not None:
        from detector.model import load_model

        return load_model(_name_or_path(model_name))
    from trainer.compact.training import scorer_of

    return scorer_of(_trained(run))


def _show(results: dict[str, Report]) -> None:
    console = Console()
    console.width = max(console.width, 150)  # eleven columns, also where no terminal says how wide it is
    sets = sorted(next(iter(results.values())).recall)
    table = Table("", "threshold", *sets, "tagged shots", "negative clips", "ambient alerts")
    for name, found in results.items():
        table.add_row(
            name,
            f"{found.threshold:.4f}",
            *(f"{found.recall[s]:.3f}" for s in sets),
            f"{found.tagged_shots_heard:.3f}",
            f"{100 * found.clip_false_alarms:.2f} %",
            f"{found.ambient_alerts} in {found.ambient_hours:.2f} h",
        )
    console.print(table)
    first = next(iter(results.values()))
    for name, (above, count) in sorted(first.false_alarms.items()):
        if above:
            console.print(f"  {name}: {above} of {count} clips above {first.threshold:.4f}")
