"""Models that people can download, heard through the detector's own pipeline: YAMNet and CED-tiny.

Each hears one example of 0.975 s at a time, as the built-in model does. Their score vector takes the embedding's
place, so that everything after the network (window, decision, onsets) is the same for all.
"""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detector.alert import ModelIdentity
from detector.cli import startup_lines_left_out
from detector.embedders.params import EMBEDDING_SIZE, EXAMPLE_SAMPLES
from detector.errors import ConfigError, ModelError

Float32Array = npt.NDArray[np.float32]
PEER_LABELS = (
    "Gunshot, gunfire",
    "Machine gun",
    "Fusillade",
    "Artillery fire",
    "Cap gun",
    "Explosion",
    "Fireworks",
    "Firecracker",
    "Burst, pop",
    "Boom",
    "Thunder",
)
PEER_FAMILY = PEER_LABELS[:4]
_CED_SAMPLES = 16_000  # it takes 1 s at least


class Peer:
    """A peer as the pipeline's scorer: ``embed`` holds its scores of ``labels`` in the first columns.

    Attributes:
        labels: AudioSet display names.
        family: those that mean gunfire.
    """

    window_examples = 1
    labels: tuple[str, ...]
    family = PEER_FAMILY

    def __init__(self, name: str, path: Path, class_map: Path) -> None:
        if not path.is_file():
            raise ConfigError(f"Peer {name}: {path} is missing; set DATA_DIR, or give --no-peers.")
        indices = _indices(class_map)
        self.labels = tuple(label for label in PEER_LABELS if label in indices)
        self._columns = [indices[label] for label in self.labels]
        self.identity = ModelIdentity(name, "peer", hashlib.sha256(path.read_bytes()).hexdigest())

    def embed(self, pcm: npt.NDArray[np.int16]) -> Float32Array:
        """``(n, 15600)`` int16 -> ``(n, 128)``: the scores of ``labels``, then zeros."""
        out = np.zeros((len(pcm), EMBEDDING_SIZE), np.float32)
        scores = self.scores(pcm.astype(np.float32) / np.float32(32768))
        out[:, : len(self._columns)] = np.clip(scores[:, self._columns], 0.0, 1.0)
        return out

    def classify(self, windows: Float32Array, num_frames: npt.NDArray[np.int32]) -> Float32Array:
        """``(n, T, 128)`` -> ``(n, labels)``: what was heard in the newest example."""
        newest = windows[np.arange(len(windows)), num_frames - 1]
        return np.ascontiguousarray(newest[:, : len(self.labels)])

    def scores(self, waveforms: Float32Array) -> Float32Array:
        """``(n, 15600)`` float32 in [-1, 1) -> probabilities of every class of its own, ``(n, classes)``."""
        raise NotImplementedError


class YamnetPeer(Peer):
    """The published quantised YAMNet (``yamnet.tflite``, 521 classes). Source: tensorflow/models, research/audioset."""

    def __init__(self, path: Path, class_map: Path) -> None:
        super().__init__("yamnet", path, class_map)
        with startup_lines_left_out():
            try:
                from ai_edge_litert.interpreter import Interpreter
            except ImportError as error:
                raise ConfigError("Peer yamnet needs ai-edge-litert: install the extra `peers`.") from error
            self._interpreter: Any = Interpreter(model_path=str(path), num_threads=2)
            self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._output = self._interpreter.get_output_details()[0]["index"]

    def scores(self, waveforms: Float32Array) -> Float32Array:
        found = []
        for waveform in waveforms:
            self._interpreter.set_tensor(self._input, waveform)
            self._interpreter.invoke()
            found.append(np.array(self._interpreter.get_tensor(self._output)).reshape(-1))
        return np.asarray(found, np.float32)


class CedPeer(Peer):
    """CED-tiny (``ced_tiny.onnx``, 527 classes), its input filled up to 1 s. Source: mispeech/ced-tiny."""

    def __init__(self, path: Path, class_map: Path) -> None:
        super().__init__("ced-tiny", path, class_map)
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError("Peer ced-tiny needs onnxruntime: install the extra `peers`.") from error
        self._session: Any = onnxruntime.InferenceSession(str(path))

    def scores(self, waveforms: Float32Array) -> Float32Array:
        padded = np.zeros((len(waveforms), _CED_SAMPLES), np.float32)
        padded[:, :EXAMPLE_SAMPLES] = waveforms
        return np.asarray(self._session.run(None, {"waveform": padded})[0], np.float32)


def peers_in(data_dir: Path) -> tuple[list[Peer], list[str]]:
    """The peers that can be heard with what lies in the data folder, and why the others can't."""
    found: list[Peer] = []
    left_out: list[str] = []
    for kind, path, class_map in (
        (YamnetPeer, "yamnet/yamnet.tflite", "yamnet/yamnet_class_map.csv"),
        (CedPeer, "ced/ced_tiny.onnx", "audioset/class_labels_indices.csv"),
    ):
        try:
            found.append(kind(data_dir / path, data_dir / class_map))
        except ConfigError as error:
            left_out.append(str(error))
    return found, left_out


def _indices(class_map: Path) -> dict[str, int]:
    try:
        with class_map.open(newline="", encoding="utf-8") as file:
            return {row["display_name"]: int(row["index"]) for row in csv.DictReader(file)}
    except OSError as error:
        raise ConfigError(f"Class map {class_map} of a peer can't be read: {error.strerror}; set DATA_DIR.") from error
    except (KeyError, ValueError) as error:
        raise ModelError(f"Class map {class_map} needs the columns index and display_name: {error}.") from error
