"""How many clips a second training can be fed with, beside the starter code's reader on the same files.

    python tests/benchmarks/bench_records.py [--pattern FILES] [--batch-size 1024] [--seconds 20]

The starter code's reader is built here anew as it was: TensorFlow's queues, eight readers that parse one record at a
time, dequantise it, pad it to 300 frames and shuffle it into batches. Ours gives what training takes (uint8 frames, no
more rows than the longest clip has; exit code 1 below ten times), and the starter code's very batches (300 float32
frames, 154 kB a clip: memory bandwidth is the limit there).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.records import MAX_FRAMES, ClipSet, find_files, read_clips

TARGET_RATIO = 10
CLASSES = 527
READERS = 8
_ROOT = Path(__file__).parents[2]
_DATA_DIR = Path(os.environ.get("DATA_DIR") or _ROOT / ".." / "shared" / "data")
_BALANCED = _DATA_DIR / "audioset" / "features" / "audioset_v1_embeddings" / "bal_train"


def starter_batch(files: list[str], batch_size: int) -> tuple[list[Any], Any]:
    """In the present graph: tensors of a batch (ids, ``(B, 300, 128)`` values, labels, lengths), and the file queue.

    Source: google/youtube-8m, ``readers.py`` and ``get_input_data_tensors`` of ``train.py``.
    """
    import tensorflow as tf

    v1 = tf.compat.v1
    queue = v1.train.string_input_producer(files, shuffle=True)

    def reader() -> list[tf.Tensor]:
        _, record = v1.TFRecordReader().read(queue)
        context, lists = tf.io.parse_single_sequence_example(
            record,
            {"video_id": tf.io.FixedLenFeature([], tf.string), "labels": tf.io.VarLenFeature(tf.int64)},
            {"audio_embedding": tf.io.FixedLenSequenceFeature([], tf.string)},
        )
        labels = v1.sparse_to_dense(context["labels"].values, (CLASSES,), 1, validate_indices=False)
        decoded = tf.reshape(tf.cast(tf.io.decode_raw(lists["audio_embedding"], tf.uint8), tf.float32), [-1, 128])
        frames = tf.minimum(tf.shape(decoded)[0], MAX_FRAMES)
        values = (decoded * (4 / 255) + (4 / 512 - 2))[:MAX_FRAMES]
        values = tf.pad(values, [[0, MAX_FRAMES - frames], [0, 0]])
        values.set_shape([MAX_FRAMES, 128])
        return [each[None] for each in (context["video_id"], values, tf.cast(labels, tf.bool), frames)]

    batch = v1.train.shuffle_batch_join(
        [reader() for _ in range(READERS)],
        batch_size=batch_size,
        capacity=batch_size * 5,
        min_after_dequeue=batch_size,
        allow_smaller_final_batch=True,
        enqueue_many=True,
    )
    return batch, queue


def starter_code(files: list[str], batch_size: int, seconds: float) -> float:
    """Clips a second of the starter code's reader."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default():
        batch, queue = starter_batch(files, batch_size)
        with v1.Session() as session:
            fetched = [each.op for each in batch]  # made, not copied out to Python
            return timed_session(session, queue, lambda: session.run(fetched), batch_size, seconds)[0]


def timed_session(
    session: Any, queue: Any, step: Callable[[], object], batch_size: int, seconds: float
) -> tuple[float, float]:
    """Clips a second of ``step``, which takes what readers put into queues meanwhile, and processor seconds a clip."""
    import tensorflow as tf

    coordinator = tf.compat.v1.train.Coordinator()
    threads = tf.compat.v1.train.start_queue_runners(session, coordinator)
    step()
    started, busy, clips = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        step()
        clips += batch_size
    rate, cost = clips / (time.perf_counter() - started), (time.process_time() - busy) / clips
    coordinator.request_stop()
    session.run(queue.close(cancel_pending_enqueues=True))
    coordinator.join(threads, stop_grace_period_secs=30, ignore_live_threads=True)
    return rate, cost


def rate_of(clips: ClipSet, take: Callable[[int], object], seconds: float) -> float:
    """Clips a second of whole epochs, for at least this long."""
    started, epochs = time.perf_counter(), 0
    while time.perf_counter() - started < seconds or not epochs:
        take(epochs)
        epochs += 1
    return epochs * len(clips) / (time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description="Clips a second from records to batches.")
    parser.add_argument(
        "--pattern", default=str(_BALANCED), help="files or folder (default: AudioSet's balanced train)"
    )
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each figure")
    arguments = parser.parse_args()
    size, seconds = arguments.batch_size, arguments.seconds
    files = find_files(arguments.pattern)

    started = time.perf_counter()
    clips = read_clips(files, classes=CLASSES)
    first = len(clips) / (time.perf_counter() - started)

    def as_trained(epoch: int) -> None:
        for _ in clips.batches(size, seed=1, epoch=epoch):
            pass

    def as_the_starter_code(epoch: int) -> None:
        for batch in clips.batches(size, seed=1, epoch=epoch, frames=MAX_FRAMES):
            assert batch.values.shape[1] == MAX_FRAMES

    as_trained_name = "later epochs, as trained (uint8)"
    figures = {
        "first epoch: files read and parsed": first,
        as_trained_name: rate_of(clips, as_trained, seconds),
        f"later epochs, {MAX_FRAMES} float32 frames": rate_of(clips, as_the_starter_code, seconds),
    }
    baseline = starter_code([str(path) for path in files], size, seconds)
    print(clips.report)
    print(f"{'starter code, every epoch':40}{baseline:12,.0f} clips/s")
    for name, rate in figures.items():
        print(f"{name:40}{rate:12,.0f} clips/s {rate / baseline:8.1f} x")
    return 0 if figures[as_trained_name] >= TARGET_RATIO * baseline else 1


if __name__ == "__main__":
    sys.exit(main())
