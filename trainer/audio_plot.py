"""False alerts a day against recall, as a picture: one line a model, what is extrapolated dashed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detector.errors import ConfigError

if TYPE_CHECKING:
    from trainer.evaluate_audio import AudioReport, Examination

_COLOURS = ("#0b6e4f", "#b3541e", "#3f5e9d", "#7a3b69", "#555555")


def plot_curves(found: Sequence[Examination], path: Path) -> None:
    """Write the curves to ``path`` (.png or .svg). Raises ConfigError for another suffix or without matplotlib."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--plot {path}: the name must end in .png or .svg.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: install the extra `trainer`.") from error
    figure = Figure(figsize=(9.0, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharex=True)
    for colour, one in zip(_COLOURS, found, strict=False):
        if not one.curve:
            continue
        for axes, recall in ((left, _recordings), (right, _shots)):
            counted = [p for p in one.curve if p.extrapolation <= 1.005]
            beyond = [p for p in one.curve if p.extrapolation > 1.005]
            if counted:
                axes.plot(
                    [p.false_alerts_per_day for p in counted], [recall(p) for p in counted], "o-", color=colour,
                    label=one.subject, markersize=4,
                )  # fmt: skip
            if beyond:
                joined = counted[-1:] + beyond
                axes.plot(
                    [p.false_alerts_per_day for p in joined], [recall(p) for p in joined], "o--", color=colour,
                    markersize=4, markerfacecolor="white", label=None if counted else one.subject,
                )  # fmt: skip
    for axes, title in ((left, "Recordings with gunfire heard"), (right, "Tagged shots, onset within tolerance")):
        axes.set_xscale("log")
        axes.set_ylim(0.0, 1.0)
        axes.set_xlabel("false alerts a day and stream (dashed: extrapolated)")
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(True, which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("recall")
    if left.get_legend_handles_labels()[0]:
        left.legend(frameon=False, fontsize=9)
    else:
        left.text(0.5, 0.5, "too few false alerts for a curve", ha="center", transform=left.transAxes)
    figure.savefig(path)


def _recordings(point: AudioReport) -> float:
    heard = sum(share.part for share in point.recall.values())
    whole = sum(share.whole for share in point.recall.values())
    return heard / whole if whole else 0.0


def _shots(point: AudioReport) -> float:
    return point.shots.value if point.shots.whole else 0.0
