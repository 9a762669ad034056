"""False alerts a day against recall, as a picture: one line a model, what is extrapolated dashed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.evaluate_audio import AudioReport, Examination

_COLOURS = ("#0b6e4f", "#b3541e", "#3f5e9d", "#7a3b69", "#555555")


def plot_curves(found: Sequence[Examination], path: Path) -> None:
    """Write the curves to ``path``, for which ``check_picture`` passed. Raises DataError where the disk refuses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from trainer.run import write_whole

    figure = Figure(figsize=(9.0, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharex=True)
    for colour, one in zip(_COLOURS, found, strict=False):
        for axes, recall in ((left, _recordings), (right, _shots)):
            points = [(p.rate, recall(p)) for p in one.curve]
            drawn = [(r.per_day, y, r.extrapolation > 1.005) for r, y in points if r is not None and y is not None]
            counted = [(x, y) for x, y, beyond in drawn if not beyond]
            joined = counted[-1:] + [(x, y) for x, y, beyond in drawn if beyond]
            if counted:
                axes.plot(*zip(*counted, strict=True), "o-", color=colour, label=one.subject, markersize=4)
            if len(joined) > len(counted[-1:]):
                axes.plot(
                    *zip(*joined, strict=True), "o--", color=colour, markersize=4, markerfacecolor="white",
                    label=None if counted else one.subject,
                )  # fmt: skip
    for axes, title in ((left, "Recordings with gunfire heard"), (right, "Tagged shots, onset within tolerance")):
        axes.set_xscale("log")
        axes.set_ylim(0.0, 1.0)
        axes.set_xlabel("false alerts a day and stream (dashed: extrapolated)")
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(True, which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("recall")
    curves = any(one.curve for one in found)
    for axes, what in ((left, "recordings with gunfire"), (right, "tagged shots")):
        if not axes.lines:
            why = f"no {what}" if curves else "too few false alerts for a curve"
            axes.text(0.5, 0.5, why, ha="center", transform=axes.transAxes)
    if left.lines:
        left.legend(frameon=False, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower())
    write_whole(path, picture.getvalue())


def _recordings(point: AudioReport) -> float | None:
    heard = sum(share.part for share in point.recall.values())
    whole = sum(share.whole for share in point.recall.values())
    return heard / whole if whole else None


def _shots(point: AudioReport) -> float | None:
    return point.shots.value if point.shots.whole else None
