"""The plots of an evaluation's page: inline SVG whose colours are the page's own, so that they follow light and dark.

Matplotlib draws in stand-in colours; in the SVG each becomes a CSS variable. Text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trainer.evaluate import Evaluation, GunfireReport, LookAlike, Point

_INK, _MUTED, _LINE, _GUNFIRE, _ALIKE, _OTHER, _PAPER = (f"#0102{i:02x}" for i in range(3, 10))
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _LINE: "--line",
    _GUNFIRE: "--gunfire",
    _ALIKE: "--alike",
    _OTHER: "--other",
    _PAPER: "--paper",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gunfire",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}
_SIZE_INCHES = (6.0, 3.9)
_MARKED_RATES = (0.001, 0.01, 0.05)
_MAX_CURVE_POINTS = 1500
_LOG_ODDS_TICKS = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)


@dataclass(frozen=True, slots=True)
class Plot:
    """An inline picture.

    Attributes:
        title, caption: for all readers; ``alt`` for those who can't see it.
        svg: an element, safe to put into a page as it is.
    """

    title: str
    caption: str
    alt: str
    svg: str


def plots(evaluation: Evaluation) -> tuple[Plot, ...]:
    """All that the figures allow: those that need gunfire and something else are left out without either."""
    gunfire = evaluation.gunfire
    drawn: list[Plot] = []
    if gunfire.curve.positives and gunfire.curve.negatives:
        drawn += [_precision_recall(gunfire), _roc(gunfire), _scores(gunfire)]
        known = [alike for alike in gunfire.look_alikes if not np.isnan(alike.auc)]
        if known:
            drawn.append(_look_alike_aucs(gunfire, known))
    if gunfire.calibration is not None:
        drawn.append(_reliability(gunfire))
    if any(figures.positives for figures in evaluation.per_class):
        drawn.append(_all_classes(evaluation))
    return tuple(drawn)


_APART = 0.04  # of recall: nearer marks share their words


def _precision_recall(gunfire: GunfireReport) -> Plot:
    curve = gunfire.curve
    chance = curve.positives / (curve.positives + curve.negatives)

    def draw(figure: Figure, axes: Axes) -> None:
        places = _thinned(len(curve.thresholds))
        recall = np.concatenate([[0.0], curve.recall[places]])
        precision = np.concatenate([curve.precision[:1], curve.precision[places]])
        axes.step(recall, precision, where="post", color=_GUNFIRE)
        axes.fill_between(recall, precision, step="post", color=_GUNFIRE, alpha=0.08, linewidth=0)
        axes.axhline(chance, color=_MUTED, linestyle=(0, (4, 3)), linewidth=1)
        axes.annotate(f"chance {100 * chance:.1f} %", (0.01, chance), (0, 3), color=_MUTED, **_offset("left"))
        for point, rules in _together(gunfire.points):
            _mark(axes, point.recall, point.precision, rules, above=True)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall: share of gunfire clips heard", ylabel="precision")
        _percent_axis(axes.xaxis)
        _percent_axis(axes.yaxis)

    alt = (
        f"Precision falls from {100 * curve.precision[0]:.0f} % as recall rises; average precision "
        f"{curve.average_precision:.3f}, chance {chance:.3f}."
    )
    caption = "Each point of the line is a threshold on the family score. Marked: thresholds by false positives."
    return _plot("precision-recall", "Precision and recall", caption, alt, draw)


def _roc(gunfire: GunfireReport) -> Plot:
    curve = gunfire.curve

    def draw(figure: Figure, axes: Axes) -> None:
        lowest = min(0.5 / curve.negatives, 1e-3)
        places = _thinned(len(curve.thresholds))
        rates = np.concatenate([[lowest], np.maximum(curve.false_positive_rate[places], lowest)])
        recall = np.concatenate([[0.0], curve.recall[places]])
        axes.step(rates, recall, where="post", color=_GUNFIRE)
        even = np.geomspace(lowest, 1, 200)
        axes.plot(even, even, color=_MUTED, linestyle=(0, (4, 3)), linewidth=1)
        for point, rules in _together(gunfire.points):
            _mark(axes, max(point.false_positive_rate, lowest), point.recall, f"{rules}: {100 * point.recall:.0f} %")
        axes.set_xscale("log")
        axes.set(xlim=(lowest, 1), ylim=(0, 1.02), xlabel="false positives: share of other clips let through (log)")
        axes.set_ylabel("recall")
        ticks = [tick for tick in (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0) if tick >= lowest]
        axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        axes.minorticks_off()
        _percent_axis(axes.yaxis)

    marks = "; ".join(
        f"{100 * p.recall:.0f} % at {_short_rule(p)}" for p in _marked(gunfire.points) if np.isfinite(p.threshold)
    )
    alt = f"Receiver operating characteristic, area {curve.auc:.3f}. Recall {marks}."
    caption = "Far left is what counts: a detector that hears everything all day can afford few false positives."
    return _plot("roc", "Recall and false positives", caption, alt, draw)


def _scores(gunfire: GunfireReport) -> Plot:
    other = ~gunfire.positive & ~gunfire.look_alike
    groups = [
        ("gunfire", gunfire.positive, _GUNFIRE, "-"),
        ("look-alikes", gunfire.look_alike, _ALIKE, (0, (5, 2))),
        ("everything else", other, _OTHER, (0, (1.5, 1.5))),
    ]
    z = _log_odds(gunfire.scores)

    def draw(figure: Figure, axes: Axes) -> None:
        low, high = np.floor(z.min()), np.ceil(z.max())
        edges = np.linspace(low, max(high, low + 1), 31)
        for name, chosen, color, line in groups:
            if chosen.any():
                weights = np.full(int(chosen.sum()), 1.0 / chosen.sum())
                kwargs: dict[str, Any] = {"bins": edges, "weights": weights, "color": color}
                axes.hist(z[chosen], histtype="stepfilled", alpha=0.15, linewidth=0, **kwargs)
                label = f"{name} ({int(chosen.sum()):,})"
                axes.hist(z[chosen], histtype="step", linewidth=1.8, linestyle=line, label=label, **kwargs)
        _log_odds_axis(axes)
        axes.set(xlabel="family score (log odds)", ylabel="share of the group's clips", xlim=(edges[0], edges[-1]))
        figure.legend(loc="outside upper left", ncols=3, labelcolor=_INK)
        _percent_axis(axes.yaxis)

    medians = ", ".join(
        f"{name} {np.median(gunfire.scores[chosen]):.3g}" for name, chosen, _, _ in groups if chosen.any()
    )
    return _plot(
        "scores",
        "Scores",
        "Every group's own distribution: where they overlap, no threshold can tell them.",
        f"Histograms of the family score. Medians: {medians}.",
        draw,
    )


def _look_alike_aucs(gunfire: GunfireReport, known: Sequence[LookAlike]) -> Plot:
    ordered = sorted(known, key=lambda alike: alike.auc)
    every = gunfire.curve.auc

    def draw(figure: Figure, axes: Axes) -> None:
        names = [f"{alike.label.name} ({alike.clips})" for alike in ordered] + ["all other clips"]
        values = np.array([alike.auc for alike in ordered] + [every])
        places = np.arange(len(values))
        low = min(0.5, float(values.min()) - 0.02)
        colors = [_ALIKE] * len(ordered) + [_OTHER]
        axes.scatter(values, places, s=64, c=colors, zorder=3)  # no bars: the axis does not begin at nothing
        for place, value in zip(places, values, strict=True):
            axes.annotate(f"{value:.3f}", (value, place), (5, 0), color=_INK, **_offset("left", "center"))
        axes.set(
            yticks=places,
            xlim=(low, 1.045),
            xlabel="AUC of gunfire against the look-alike (0.5: no better than chance)",
        )
        axes.set_yticks(places, names, color=_INK)
        axes.set_xticks([tick for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0) if tick >= low])
        axes.grid(axis="y", visible=False)

    alt = "Area under the curve against each look-alike: " + ", ".join(f"{a.label.name} {a.auc:.3f}" for a in ordered)
    caption = (
        "Chance that a clip with gunfire scores above a clip of the look-alike. In brackets: clips without gunfire."
    )
    height = 1.3 + 0.42 * (len(ordered) + 1)
    return _plot("look-alikes", "Against look-alikes", caption, f"{alt}.", draw, height_inches=height)


def _reliability(gunfire: GunfireReport) -> Plot:
    c = gunfire.calibration
    assert c is not None

    def draw(figure: Figure, axes: Axes) -> None:
        axes.remove()
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        filled = c.counts > 0
        upper.plot([0, 1], [0, 1], color=_MUTED, linestyle=(0, (4, 3)), linewidth=1)
        upper.plot(c.mean_scores[filled], c.positive_rates[filled], color=_GUNFIRE, marker="o", markersize=5)
        upper.set(xlim=(-0.01, 1.01), ylim=(-0.02, 1.03), ylabel="share of gunfire")
        centres, width = (c.edges[:-1] + c.edges[1:]) / 2, c.edges[1] - c.edges[0]
        lower.bar(centres, c.counts, width=0.86 * width, color=_OTHER)
        lower.set_yscale("log")
        lower.set(ylim=(0.8, max(10, 1.6 * int(c.counts.max()))), ylabel="clips (log)", xlabel="family score")
        lower.minorticks_off()
        lower.yaxis.set_major_formatter("{x:,.0f}")
        _percent_axis(upper.yaxis)

    alt = (
        f"Reliability diagram: expected calibration error {c.expected_error:.3f}, Brier score {c.brier:.3f}; "
        "share of gunfire against mean score in 15 bins, with the clips in each below."
    )
    caption = "On the dashed line a score of 0.8 is right four times in five; below it the model is too sure of itself."
    return _plot("reliability", "Calibration", caption, alt, draw)


def _all_classes(evaluation: Evaluation) -> Plot:
    rows = [figures for figures in evaluation.per_class if figures.positives]
    family, alike = set(evaluation.classes.family), set(evaluation.classes.look_alikes)
    groups = [
        ("other classes", [f for f in rows if f.label.index not in family | alike], _OTHER, "o", 18, 0.45),
        ("look-alikes", [f for f in rows if f.label.index in alike], _ALIKE, "s", 38, 1.0),
        ("gunfire", [f for f in rows if f.label.index in family], _GUNFIRE, "o", 52, 1.0),
    ]

    def draw(figure: Figure, axes: Axes) -> None:
        for name, chosen, color, marker, size, alpha in groups:
            if chosen:
                x, y = [f.positives for f in chosen], [f.ap for f in chosen]
                axes.scatter(x, y, s=size, c=color, marker=marker, alpha=alpha, linewidths=0, label=name)
        if not np.isnan(evaluation.map):
            axes.axhline(evaluation.map, color=_MUTED, linestyle=(0, (4, 3)), linewidth=1)
            axes.annotate(
                f"mean {evaluation.map:.3f}",
                (0.995, evaluation.map),
                (0, 3),
                color=_MUTED,
                xycoords=axes.get_yaxis_transform(),
                **_offset("right"),
            )
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set(ylim=(-0.02, 1.02), xlabel="clips of the class (log)", ylabel="average precision")
        figure.legend(loc="outside upper left", ncols=3, labelcolor=_INK)

    best = sorted(rows, key=lambda f: -f.ap)
    alt = (
        f"Average precision of {len(rows)} classes against their number of clips: from {best[0].ap:.2f} "
        f"({best[0].label.name}) to {best[-1].ap:.2f} ({best[-1].label.name}); gunfire classes "
        f"{', '.join(f'{f.ap:.2f}' for f in rows if f.label.index in family) or 'absent'}."
    )
    return _plot("classes", "Where gunfire stands", "Each dot is a class; the table below names them all.", alt, draw)


# --- drawing ------------------------------------------------------------------------------------------------------


def _plot(
    key: str,
    title: str,
    caption: str,
    alt: str,
    draw: Callable[[Figure, Axes], None],
    *,
    height_inches: float = _SIZE_INCHES[1],
) -> Plot:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_SIZE_INCHES[0], height_inches), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, figure.add_subplot())
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Plot(title, caption, alt, _inline(target.getvalue(), key, alt))


def _inline(svg: str, key: str, alt: str) -> str:
    """A file's SVG as an element of a page: its own ids, the page's colours, a text for those who can't see it."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', svg))
    for identifier in set(re.findall(r' id="([^"]+)"', svg)):
        if identifier in used:
            places = rf'( id="|xlink:href="#|url\(#){re.escape(identifier)}(?=[")])'
            svg = re.sub(places, rf"\g<1>{key}-{identifier}", svg)
        else:
            svg = svg.replace(f' id="{identifier}"', "")
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    opening = svg[: svg.index(">") + 1]
    box = re.search(r'viewBox="([^"]+)"', opening)
    assert box is not None
    svg = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(alt)}">' + svg[len(opening) :]
    return svg.replace("xlink:href", "href").strip()


def _thinned(count: int) -> Any:
    """Indices of at most so many points of a long curve, both ends and the strict end whole."""
    if count <= _MAX_CURVE_POINTS:
        return np.arange(count)
    return np.unique(np.concatenate([np.arange(200), np.linspace(0, count - 1, _MAX_CURVE_POINTS).astype(np.int64)]))


def _marked(points: Sequence[Point]) -> list[Point]:
    return [p for p in points if np.isnan(p.max_false_positive_rate) or p.max_false_positive_rate in _MARKED_RATES]


def _together(points: Sequence[Point]) -> list[tuple[Point, str]]:
    """Marked points and their rules; one mark where two would overprint each other."""
    found: list[tuple[Point, list[str]]] = []
    for point in _marked(points):
        if not np.isfinite(point.threshold):
            continue
        near = next((rules for other, rules in found if abs(other.recall - point.recall) < _APART), None)
        if near is None:
            found.append((point, [_short_rule(point)]))
        else:
            near.append(_short_rule(point))
    return [(point, ", ".join(rules)) for point, rules in found]


def _short_rule(point: Point) -> str:
    own = np.isnan(point.max_false_positive_rate)
    return "package" if own else f"{100 * point.max_false_positive_rate:g} % FP"


def _mark(axes: Axes, x: float, y: float, text: str, *, above: bool = False) -> None:
    axes.plot([x], [y], marker="o", markersize=7, color=_GUNFIRE, markeredgecolor=_PAPER, markeredgewidth=1.5, zorder=5)
    away = (7, 7) if above else (8, -12)
    axes.annotate(text, (x, y), away, color=_INK, fontsize=9, zorder=6, **_offset("left"))


def _offset(horizontal: str, vertical: str = "bottom") -> dict[str, Any]:
    return {"textcoords": "offset points", "ha": horizontal, "va": vertical}


def _percent_axis(axis: Any) -> None:
    axis.set_major_formatter(lambda share, _: f"{100 * share:.6g} %")


def _log_odds(scores: Any) -> Any:
    p = np.clip(np.asarray(scores, np.float64), 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def _log_odds_axis(axes: Axes) -> None:
    low, high = axes.get_xlim()
    ticks = [(p, float(_log_odds(p))) for p in _LOG_ODDS_TICKS]
    shown = [(p, z) for p, z in ticks if low <= z <= high]
    axes.set_xticks([z for _, z in shown], [f"{p:.5f}".rstrip("0") for p, _ in shown])
