"""How well onsets are found in the live-fire recordings: ``python tests/benchmarks/bench_onset.py [DATA_DIR]``.

For each tagged onset: search the example that ends with the 0.96 s chunk holding it, with a second of look-back,
as the pipeline does. Tuned on FP1-FP4; FP5-FP6 are the figures to quote. A false extra is a certain onset further than
100 ms from every tag of the file: echoes, untagged shots and other impulses of the city all count.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detector.audio import Int16Array, float_to_int16, resample_reference
from detector.chunk import CHUNK_SAMPLES, RATE_HZ
from detector.embedders.params import CARRY_SAMPLES
from detector.onset import LOOKBACK_SAMPLES, SEARCH_BACK_SAMPLES, Onset, find_onsets

Tagged = dict[str, list[float]]  # path below audio/ -> onset seconds


@dataclass(frozen=True, slots=True)
class Figures:
    """Outcome over one set of files. Errors are found minus tagged, of the nearest onset within 100 ms."""

    tags: int
    within_50_ms: float
    within_100_ms: float
    median_error_ms: float
    median_absolute_error_ms: float
    p90_absolute_error_ms: float
    examples: int
    false_extras_per_example: float
    uncertain: float
    search_ms: float

    def __str__(self) -> str:
        return (
            f"{self.tags} tags: {self.within_50_ms:.1%} found within 50 ms, {self.within_100_ms:.1%} within 100 ms; "
            f"error median {self.median_error_ms:+.1f} ms, absolute median {self.median_absolute_error_ms:.1f} ms, "
            f"p90 {self.p90_absolute_error_ms:.1f} ms; {self.false_extras_per_example:.2f} false extras an example of "
            f"{self.examples}, {self.uncertain:.1%} of them without a certain onset; {self.search_ms:.2f} ms a search"
        )


def read_tags(data_dir: Path, positions: tuple[str, ...]) -> Tagged:
    """Onset seconds by file, of the given firing positions (``FP1`` ...)."""
    tagged: Tagged = defaultdict(list)
    with (data_dir / "audio/shotspotter/onsets.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["file"].split("/")[1] in positions:
                tagged[row["file"]].append(float(row["onset_seconds"]))
    return dict(tagged)


def read_pcm(path: Path) -> Int16Array:
    """A recording as 16 kHz int16, resampled the reference way."""
    import soundfile

    x, rate_hz = soundfile.read(path, dtype="float64")
    return float_to_int16(resample_reference(x, rate_hz))


def search_chunk(pcm: Int16Array, chunk: int) -> list[Onset]:
    """The onsets of the example that ends with chunk number ``chunk`` of a recording."""
    start = chunk * CHUNK_SAMPLES - CARRY_SAMPLES
    first, end = start - LOOKBACK_SAMPLES, (chunk + 1) * CHUNK_SAMPLES
    context = np.zeros(end - first, np.int16)
    part = pcm[max(0, first) : end]
    context[max(0, -first) : max(0, -first) + len(part)] = part
    return find_onsets(context, first, search_from=start - SEARCH_BACK_SAMPLES)


def measure(recordings: dict[str, Int16Array], tagged: Tagged) -> Figures:
    errors, tags, examples, extras, uncertain, seconds = [], 0, 0, 0, 0, 0.0
    for path, onset_seconds in tagged.items():
        onset_samples = np.array(onset_seconds) * RATE_HZ
        for chunk in sorted({int(sample) // CHUNK_SAMPLES for sample in onset_samples}):
            began = time.perf_counter()
            onsets = search_chunk(recordings[path], chunk)
            seconds += time.perf_counter() - began
            found = np.array([onset.sample for onset in onsets], np.float64)
            examples += 1
            uncertain += not onsets[0].certain
            mine = onset_samples[(onset_samples // CHUNK_SAMPLES).astype(int) == chunk]
            tags += len(mine)
            for sample in mine:
                errors.append(float((found - sample)[np.argmin(np.abs(found - sample))]) * 1000 / RATE_HZ)
            certain = found[[onset.certain for onset in onsets]]
            extras += sum(float(np.min(np.abs(onset_samples - f))) > 0.1 * RATE_HZ for f in certain)
    error = np.array(errors)
    near = error[np.abs(error) <= 100]
    return Figures(
        tags=tags,
        within_50_ms=float(np.mean(np.abs(error) <= 50)),
        within_100_ms=float(np.mean(np.abs(error) <= 100)),
        median_error_ms=float(np.median(near)),
        median_absolute_error_ms=float(np.median(np.abs(near))),
        p90_absolute_error_ms=float(np.percentile(np.abs(near), 90)),
        examples=examples,
        false_extras_per_example=extras / examples,
        uncertain=uncertain / examples,
        search_ms=seconds * 1000 / examples,
    )


def main() -> None:
    data_dir = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DATA_DIR", "../shared/data"))
    for positions in (("FP1", "FP2", "FP3", "FP4"), ("FP5", "FP6")):
        tagged = read_tags(data_dir, positions)
        recordings = {path: read_pcm(data_dir / "audio" / path) for path in tagged}
        print(f"{positions[0]}-{positions[-1]}: {measure(recordings, tagged)}")


if __name__ == "__main__":
    main()
