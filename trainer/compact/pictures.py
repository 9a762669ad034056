"""What a model gets wrong, to look at: log-mel pictures of its loudest false alarms and of shots it doesn't hear."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detector.audio import int16_to_float
from detector.chunk import RATE_HZ
from detector.embedders.log_mel import log_mel_frames
from detector.embedders.params import FRONT_END
from detector.errors import DataError
from trainer.compact.evaluation import Scored

_SECONDS = 1.92
_COLUMNS = 5
_NAME_LENGTH = 34  # characters: what a column has room for


def failures(scored: Sequence[Scored], threshold: float) -> list[Scored]:
    """The loudest negatives, then of each set of positives the quietest that ``threshold`` leaves out."""
    negatives = sorted((s for s in scored if not s.recording.positive), key=lambda s: -s.peak)
    found = negatives[:_COLUMNS]
    missed = sorted((s for s in scored if s.recording.positive and s.peak <= threshold), key=lambda s: s.peak)
    for name in sorted({s.recording.set for s in missed}):
        found.append(next(s for s in missed if s.recording.set == name))
    return found[: 2 * _COLUMNS]


def draw(found: Sequence[Scored], path: Path) -> None:
    """Two seconds around each one's loudest score, as the network sees them; ``path`` ends in .png or .svg.

    Raises DataError where the disk refuses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(found) // _COLUMNS)
    figure = Figure(figsize=(11.0, 2.3 * rows), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, s in zip(figure.subplots(rows, _COLUMNS, squeeze=False).flat, found, strict=False):
        at = int(np.argmax(s.scores)) * s.hop_samples
        begin = max(0, at - RATE_HZ // 2)
        pcm = s.recording.pcm[begin : begin + round(_SECONDS * RATE_HZ)]
        pcm = np.pad(pcm, (0, max(0, FRONT_END.window_samples - len(pcm))))
        frames = log_mel_frames(int16_to_float(pcm))
        axes.imshow(frames.T, origin="lower", aspect="auto", vmin=-4.6, vmax=3.5, extent=(0, len(frames) / 100, 0, 64))
        kind = "missed" if s.recording.positive else "false"
        name = Path(s.recording.path).stem
        name = name if len(name) <= _NAME_LENGTH else f"…{name[1 - _NAME_LENGTH :]}"
        axes.set_title(f"{kind}: {s.recording.set}/{s.recording.label}, {s.peak:.3f}\n{name}", fontsize=7)
        axes.tick_params(labelsize=6)
    for axes in list(figure.axes)[len(found) :]:
        axes.set_visible(False)
    figure.supxlabel("seconds", fontsize=7)
    figure.supylabel("mel band (125 to 7,500 Hz)", fontsize=7)
    try:
        figure.savefig(path)
    except OSError as error:
        raise DataError(f"{path} can't be written: {error.strerror or error}.") from error
