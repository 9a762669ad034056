"""``trainer embed``: the published form, the same bytes whatever happens on the way, and a word for all that failed."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detector.audio import clip_16k
from detector.embedders.log_mel import log_mel_examples
from detector.embedders.postprocess import dequantise
from detector.errors import ConfigError, DataError, ModelError, WeightsMissing
from trainer.embed import EmbedReport, PackageClips, Progress, _clips_of, _Reading, embed_recordings, names_of
from trainer.labels import LabelSet
from trainer.recordings import Recording, Stretch, gather, read_list
from trainer.records import find_files, read_clips, read_records

RATE_HZ = 16_000
LABELS = LabelSet.of_names(["Speech", "Gunshot, gunfire", "Thunder"])


class Bands:
    """A network without TensorFlow: bytes that follow from an example's log-mel."""

    identity = "bands"

    def __init__(self) -> None:
        self.clips = 0

    def prepare(self, x: np.ndarray) -> np.ndarray:
        return log_mel_examples(x).astype(np.float32)

    def embed(self, prepared: np.ndarray) -> np.ndarray:
        self.clips += 1
        summed = np.concatenate([prepared.mean(axis=1), prepared.std(axis=1)], axis=1)  # (E, 128)
        return np.asarray(np.abs(summed) * 1000 % 256, np.uint8)


def sound(path: Path, seconds: float, seed: int = 0, rate_hz: int = RATE_HZ) -> Path:
    x = np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate_hz))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, x, rate_hz, subtype="PCM_16", format="WAV")
    return path


def embed(recordings: Sequence[Recording], output: Path, network: Bands | None = None, **more: Any) -> EmbedReport:
    return embed_recordings(recordings, network or Bands(), output, **more)


def written(output: Path) -> bytes:
    return b"".join(path.read_bytes() for path in find_files(output))


def contents(output: Path) -> list[dict[str, Any]]:
    """Every record as TensorFlow's own protobuf reads it."""
    import tensorflow as tf

    found = []
    for path in find_files(output):
        with path.open("rb") as stream:
            for item in read_records(stream, path):
                assert isinstance(item, tuple), item
                example = tf.train.SequenceExample.FromString(item[1])
                context = example.context.feature
                frames = example.feature_lists.feature_list["audio_embedding"].feature
                found.append(
                    {
                        "video_id": context["video_id"].bytes_list.value[0].decode(),
                        "start": context["start_time_seconds"].float_list.value[0],
                        "end": context["end_time_seconds"].float_list.value[0],
                        "labels": list(context["labels"].int64_list.value),
                        "frames": np.array([np.frombuffer(f.bytes_list.value[0], np.uint8) for f in frames]),
                        "form": sorted(
                            [(key, value.WhichOneof("kind")) for key, value in context.items()]
                            + [(key, "list") for key in example.feature_lists.feature_list]
                        ),
                    }
                )
    return found


@pytest.fixture
def run() -> Callable[..., Result]:
    from trainer.__main__ import main

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, ["embed", *map(str, arguments)])

    return run


# --- the published form -------------------------------------------------------------------------------------------


@pytest.mark.golden
def test_the_demos_flags_give_the_golden_bytes(
    tmp_path: Path, golden_dir: Path, vggish_tensors: dict[str, np.ndarray], run: Callable[..., Result]
) -> None:
    from detector.checkpoint import write_safetensors

    signals, net = np.load(golden_dir / "vggish_frontend.npz"), np.load(golden_dir / "vggish_net.npz")
    names = [k.removeprefix("pcm_") for k in signals.files if k.startswith("pcm_") and f"post_{k[4:]}" in net.files]
    names = [name for name in names if len(net[f"post_{name}"])]
    assert names
    for name in names:
        soundfile.write(tmp_path / f"{name}.wav", signals[f"pcm_{name}"], int(signals[f"fs_{name}"]), subtype="PCM_16")
    write_safetensors(tmp_path / "vggish.safetensors", vggish_tensors)
    wavs = [part for name in names for part in ("--wav_file", tmp_path / f"{name}.wav")]
    weights = ("--checkpoint", tmp_path / "vggish.safetensors", "--pca_params", golden_dir / "vggish_pca_params.npz")
    result = run(*wavs, *weights, "--tfrecord_file", tmp_path / "out.tfrecord")
    assert result.exit_code == 0, result.output
    found = {content["video_id"]: content["frames"].astype(int) for content in contents(tmp_path / "out.tfrecord")}
    assert sorted(found) == sorted(names)
    off = {name: np.abs(found[name] - net[f"post_{name}"]) for name in names}
    assert max(int(values.max()) for values in off.values()) <= 1
    assert sum(np.count_nonzero(v) for v in off.values()) <= 0.01 * sum(v.size for v in off.values())


def test_records_have_the_form_of_audiosets_own(tmp_path: Path, data_dir: Path) -> None:
    published = next((data_dir / "audioset" / "features").rglob("bal_train/*.tfrecord"))
    clips = gather([sound(tmp_path / "shot.wav", 10)], clip_seconds=10, path_labels=(427, 428))
    embed(clips, tmp_path / "out.tfrecord")
    (ours,) = contents(tmp_path / "out.tfrecord")
    theirs = contents(published)[0]
    assert ours["form"] == theirs["form"]
    assert ours["frames"].shape == theirs["frames"].shape == (10, 128)
    assert (ours["video_id"], ours["start"], ours["end"], ours["labels"]) == ("shot", 0.0, 10.0, [427, 428])


def test_the_trainers_reader_takes_what_was_written(tmp_path: Path) -> None:
    paths = [sound(tmp_path / "in" / f"{i}.wav", 2 + i, i) for i in range(3)]
    report = embed(gather(paths, clip_seconds=10, path_labels=(1,)), tmp_path / "out", shards=2)
    clips = read_clips(find_files(tmp_path / "out"), classes=3, stop_on_damage=True)
    assert len(report.outputs) == 2
    assert [clips.video_id(i) for i in range(len(clips))] == ["0", "1", "2"]
    assert clips.num_frames.tolist() == [2, 3, 4]
    assert report.examples == 9
    for i, path in enumerate(paths):
        network = Bands()
        np.testing.assert_array_equal(clips.frames_of(i), network.embed(network.prepare(clip_16k(path))))


# --- the same bytes, whatever happens -----------------------------------------------------------------------------

_KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from detector.embedders.log_mel import log_mel_examples
from trainer import embed, records
from trainer.recordings import gather

left = {"embed": int(sys.argv[1]), "write": int(sys.argv[2])}

def mortal(kind, function):
    def call(*arguments):
        left[kind] -= 1
        if left[kind] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call

BANDS
Bands.embed = mortal("embed", Bands.embed)
records.RecordWriter.write = mortal("write", records.RecordWriter.write)
embed.embed_recordings(gather([Path(sys.argv[3])], clip_seconds=2.0), Bands(), Path(sys.argv[4]), shards=3)
"""


def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(tmp_path: Path) -> None:
    for i in range(8):
        sound(tmp_path / "in" / f"{i}.wav", 2.5 + i % 3, i, (16_000, 8_000)[i % 2])
    embed(gather([tmp_path / "in"], clip_seconds=2.0), tmp_path / "undisturbed", shards=3)
    script = tmp_path / "killed.py"
    script.write_text(_KILLED.replace("BANDS", inspect.getsource(Bands)))
    output = tmp_path / "out"
    for embeds, writes in ((0, 99), (7, 99), (99, 5)):
        arguments = [str(embeds), str(writes), str(tmp_path / "in"), str(output)]
        died = subprocess.run([sys.executable, script, *arguments], capture_output=True, timeout=60, check=False)
        assert died.returncode == -signal.SIGKILL, died.stderr.decode()
        assert list(output.glob("*.journal"))
    network = Bands()
    report = embed(gather([tmp_path / "in"], clip_seconds=2.0), output, network, shards=3)
    assert (report.done_before, network.clips) == (8, 0)
    assert written(output) == written(tmp_path / "undisturbed")
    assert not list(output.glob("*.partial"))


def test_the_number_of_workers_does_not_show(tmp_path: Path) -> None:
    for i in range(12):
        sound(tmp_path / "in" / f"{i}.wav", 1 + i % 4, i, (16_000, 11_025)[i % 2])
    recordings = gather([tmp_path / "in"], clip_seconds=1.5)
    for workers in (1, 2, 7):
        embed(recordings, tmp_path / str(workers), workers=workers)
    assert written(tmp_path / "1") == written(tmp_path / "2") == written(tmp_path / "7")


def test_only_what_is_new_or_changed_is_embedded_again(tmp_path: Path) -> None:
    paths = [sound(tmp_path / f"{i}.wav", 3, i) for i in range(3)]
    output, network = tmp_path / "out.tfrecord", Bands()
    embed(gather(paths[:2], clip_seconds=10), output, network)
    assert network.clips == 2
    sound(paths[0], 4, 9)
    report = embed(gather(paths, clip_seconds=10, path_labels=(1,)), output, network)
    assert (report.done_before, report.changed, network.clips) == (1, 1, 4)
    embed(gather(paths, clip_seconds=10, path_labels=(1,)), tmp_path / "fresh.tfrecord")
    assert output.read_bytes() == (tmp_path / "fresh.tfrecord").read_bytes()
    network.identity = "others"
    assert embed(gather(paths, clip_seconds=10), output, network).done_before == 0
    assert network.clips == 7


def test_fewer_shards_leave_none_of_the_earlier_ones(tmp_path: Path) -> None:
    for i in range(5):
        sound(tmp_path / "in" / f"{i}.wav", 2, i)
    recordings = gather([tmp_path / "in"], clip_seconds=10)
    assert len(embed(recordings, tmp_path / "out", shards=50).outputs) == 5
    embed(recordings, tmp_path / "out", shards=2)
    assert [path.name for path in find_files(tmp_path / "out")] == [
        "embeddings-00000-of-00002.tfrecord",
        "embeddings-00001-of-00002.tfrecord",
    ]
    assert len(contents(tmp_path / "out")) == 5


# --- clips and names ----------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seconds=st.floats(1.0, 40.0),
    cut=st.sampled_from([None, 1.0, 7.3, 10.0]),
    spans=st.lists(st.tuples(st.floats(0, 36), st.floats(0.98, 30)), max_size=4, unique=True),
    rate_hz=st.sampled_from([16_000, 8_000]),
)
def test_clips_are_cuts_of_the_whole_recording(
    tmp_path: Path, seconds: float, cut: float | None, spans: list[tuple[float, float]], rate_hz: int
) -> None:
    path = sound(tmp_path / "a.wav", seconds, 3, rate_hz)
    whole = clip_16k(path)
    stretches = (Stretch(), *(Stretch(start, start + length) for start, length in spans))
    reading = _Reading()
    found = sorted(
        _clips_of(Recording(path, stretches, cut), reading), key=lambda c: (c[0].stretch, c[0].start_seconds)
    )
    covered = 0
    for span, x in found:
        start, end = round(span.start_seconds * RATE_HZ), round(span.end_seconds * RATE_HZ)
        np.testing.assert_allclose(x, whole[start:end], rtol=0, atol=1e-9)
        if span.stretch == 0:
            assert start == covered  # one follows the other
            covered = end
        else:
            assert start == round(stretches[span.stretch].start_seconds * RATE_HZ)
    assert covered + reading.left_out_samples == len(whole)
    beyond = {i for i, s in enumerate(stretches) if (s.end_seconds or 0) * RATE_HZ > len(whole) + RATE_HZ // 10 + 1}
    assert {i for i, _ in reading.failures} >= beyond
    assert {span.stretch for span, _ in found}.isdisjoint(i for i, _ in reading.failures)


def test_one_name_in_two_folders_gives_two_ids_and_is_reported(tmp_path: Path) -> None:
    sound(tmp_path / "park" / "rec.wav", 2, 1)
    sound(tmp_path / "street" / "rec.wav", 5, 2)  # its last second is an example of its own
    sound(tmp_path / "street" / "other.wav", 2, 3)
    report = embed(gather([tmp_path / "street", tmp_path / "park"], clip_seconds=2.0), tmp_path / "out.tfrecord")
    ids = [content["video_id"] for content in contents(tmp_path / "out.tfrecord")]
    assert ids == ["other", "street/rec_0", "street/rec_2000", "street/rec_4000", "park/rec"]
    assert sorted(report.renamed.values()) == ["park/rec", "street/rec"]
    assert report.left_out_seconds == 0.0


NAMES = st.lists(
    st.tuples(
        st.sampled_from(["/a", "/b", "/a/b", "/b/b"]), st.sampled_from(["x.wav", "x.flac", "y.wav", "x.wav.mp3"])
    ).map(lambda parts: Path(*parts)),
    unique=True,
    max_size=12,
)


@given(NAMES, st.randoms())
def test_names_tell_files_apart_whatever_their_order(paths: list[Path], random: Any) -> None:
    names = names_of(paths)
    shuffled = list(paths)
    random.shuffle(shuffled)
    assert names_of(shuffled) == names
    for stem in {path.stem for path in paths}:
        group = [names[path] for path in paths if path.stem == stem]
        assert len(set(group)) == len(group)
        if len(group) == 1:
            assert group == [stem]


def test_ids_are_unique_even_where_a_name_looks_like_a_cut(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav", 4, 1)
    sound(tmp_path / "a_2000.wav", 2, 2)
    embed(gather([tmp_path / "a.wav", tmp_path / "a_2000.wav"], clip_seconds=2.0), tmp_path / "out.tfrecord")
    assert [c["video_id"] for c in contents(tmp_path / "out.tfrecord")] == ["a_0", "a_2000", "a_2000#2"]


def test_a_list_names_stretches_and_labels(tmp_path: Path) -> None:
    sound(tmp_path / "audio" / "long.wav", 25, 1)
    sound(tmp_path / "audio" / "short.wav", 2, 2)
    (tmp_path / "list.csv").write_text(
        '# made by hand\nlabels,path,end,comment,start\n"Gunshot, gunfire, Thunder",audio/long.wav,7.5,near,2.5\n'
        "Speech,audio/long.wav,25.04,,20\n,audio/short.wav,,,\n"
    )
    recordings = gather([tmp_path / "list.csv", tmp_path / "audio"], clip_seconds=10, labels=LABELS)
    embed(recordings, tmp_path / "out.tfrecord")
    found = [(c["video_id"], c["start"], c["end"], c["labels"]) for c in contents(tmp_path / "out.tfrecord")]
    assert found == [
        ("long_2500", 2.5, 7.5, [1, 2]),
        ("long_20000", 20.0, 25.0, [0]),
        ("short", 0.0, 2.0, []),
    ]


def test_a_package_gives_the_bytes_that_stand_for_what_its_classifier_sees() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(1)[:, None].repeat(128, axis=1)[:5]
    model = SimpleNamespace(
        name="own",
        sha256="0" * 64,
        manifest=SimpleNamespace(postprocess=SimpleNamespace(kind="pca_quantise")),
        embed=lambda pcm: dequantise(levels[: len(pcm)] * np.uint8(50)),
    )
    network = PackageClips(model)  # type: ignore[arg-type]
    x = np.random.default_rng(0).normal(0, 0.1, 5 * 15_360 + 240)
    prepared = network.prepare(x)
    assert prepared.shape == (5, 15_600)
    np.testing.assert_array_equal(network.embed(prepared), levels * np.uint8(50))


# --- bad input ----------------------------------------------------------------------------------------------------


def test_what_can_not_be_read_is_named_and_the_rest_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    sound(folder / "good.wav", 2)
    sound(folder / "short.wav", 0.97)
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("no sound")
    (tmp_path / "list.csv").write_text("in/good.wav,1\nin/good.wav,1,1,9\nin/gone.wav,2\nin/good.wav,,30,40\n")
    recordings = gather([tmp_path / "list.csv", folder], clip_seconds=10)
    report = embed(recordings, tmp_path / "out.tfrecord")
    assert report.clips == 1
    errors = {(Path(f.path).name, f.where.rpartition(" ")[2]): f.error for f in report.failures}
    assert set(errors) == {
        ("good.wav", "2"), ("good.wav", "4"), ("gone.wav", "3"), ("short.wav", ""), ("empty.wav", ""), ("text.wav", "")
    }  # fmt: skip
    assert "ends at 9 s" in errors["good.wav", "2"]
    assert "has only 2 s" in errors["good.wav", "2"]
    assert "starts at 30 s" in errors["good.wav", "4"]
    assert "0.970 s are shorter than one example" in errors["short.wav", ""]
    again = embed(recordings, tmp_path / "out.tfrecord")  # the same account, though good.wav is not read again
    assert again.failures == report.failures
    padded = gather([folder / "short.wav"], clip_seconds=10, pad_short=True)
    assert embed(padded, tmp_path / "padded.tfrecord").examples == 1


def test_nothing_but_failures_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    report = embed(gather([tmp_path / "a.wav"], clip_seconds=10), tmp_path / "out.tfrecord")
    assert (report.clips, report.outputs, len(report.failures)) == (0, [], 1)
    assert not (tmp_path / "out.tfrecord").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a.wav,Gunfire", "line 3: 'Gunfire' is no class of .* Nearest: Gunshot, gunfire"),
        ("a.wav,3", "line 3: There is no class 3"),
        ("a.wav,1,5,5", "line 3: a stretch from 5 to 5 seconds has no length"),
        ("a.wav,1,-1,5", "line 3: start '-1' is no number of seconds"),
        ("a.wav,1,0,soon", "line 3: end 'soon' is no number"),
        ("a.wav,1,nan,5", "line 3: start 'nan'"),
        (",1,0,5", "line 3: there is no path"),
        ("b.wav,2,1,2", "line 3: the same stretch of .*b.wav is in .*line 2 already"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(f"path,labels,start,end\nb.wav,1,1,2\n{line}\n")
    with pytest.raises(DataError, match=f"(?s)list.csv, {said}"):
        gather([path], clip_seconds=10, labels=LABELS)


def test_lists_without_a_line_a_class_list_or_a_file_say_so(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("path,labels\n")
    with pytest.raises(DataError, match="names no recording"):
        list(read_list(path))
    path.write_text("a.wav,Thunder\n")
    with pytest.raises(DataError, match="'Thunder' are no class indices; for names give the list of classes"):
        list(read_list(path))
    path.write_text("path,labels,path\n")
    with pytest.raises(DataError, match="line 1: the header names path twice"):
        list(read_list(path))
    with pytest.raises(DataError, match=r"nowhere\.csv can't be read: No such file"):
        list(read_list(tmp_path / "nowhere.csv"))
    with pytest.raises(ConfigError, match="Nothing to embed"):
        gather([], clip_seconds=10)
    with pytest.raises(ConfigError, match="holds no audio file"):
        gather([tmp_path], clip_seconds=10)


def test_outputs_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    recordings = gather([sound(tmp_path / "a.wav", 2)], clip_seconds=10)
    output, network = tmp_path / "features.tfrecord", Bands()
    output.write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"features\.tfrecord exists, and it is not from a run"):
        embed(recordings, output, network)
    assert output.read_bytes() == b"precious"
    assert network.clips == 0  # said before hours of work, not after
    with pytest.raises(ConfigError, match="neither a folder nor named"):
        embed(recordings, tmp_path / "a.wav")
    with pytest.raises(ConfigError, match="--shards 2 needs a folder"):
        embed(recordings, output, shards=2)


def test_two_runs_on_one_output_and_a_damaged_journal_are_refused(tmp_path: Path) -> None:
    recordings = gather([sound(tmp_path / "a.wav", 2)], clip_seconds=10)

    def second(progress: Progress) -> None:
        with pytest.raises(ConfigError, match="Another run writes to the same output"):
            embed(recordings, tmp_path / "out")

    embed(recordings, tmp_path / "out", on_progress=second)
    journal = tmp_path / "out" / "embed.journal"
    with sqlite3.connect(journal) as database:
        database.execute("PRAGMA user_version=9")
    database.close()
    with pytest.raises(DataError, match=r"has version 9; 1 is expected\. Remove it"):
        embed(recordings, tmp_path / "out")
    journal.write_bytes(b"no database" * 500)
    with pytest.raises(DataError, match=r"embed\.journal is damaged"):
        embed(recordings, tmp_path / "out")


def test_a_fault_of_the_program_ends_the_run_and_is_not_swallowed(tmp_path: Path) -> None:
    class Broken(Bands):
        def prepare(self, x: np.ndarray) -> np.ndarray:
            raise ZeroDivisionError("a fault")

    paths = [sound(tmp_path / f"{i}.wav", 2) for i in range(20)]
    with pytest.raises(ZeroDivisionError, match="a fault"):
        embed(gather(paths, clip_seconds=1.0), tmp_path / "out", Broken(), workers=3)


def test_the_command_reports_and_exits_by_what_happened(
    tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.embed.open_network", lambda *_, **__: Bands())
    sound(tmp_path / "in" / "a.wav", 3)
    (tmp_path / "in" / "b.wav").write_text("no sound")
    out = ("--output", tmp_path / "out.tfrecord")
    text = run(tmp_path / "in", *out)
    assert text.exit_code == 0
    assert "1 clips (3 examples, 3.0 s of audio) of 2 recordings." in text.output
    assert "times real time" in text.output
    assert "b.wav: is no audio file" in text.output
    result = run(tmp_path / "in", *out, "--strict", "--format", "json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["recordings"], report["done_before"], report["realtime_factor"]) == (2, 1, None)
    assert run(tmp_path / "in" / "b.wav", "--output", tmp_path / "none.tfrecord").exit_code == 1
    assert run(*out).exit_code == ConfigError.exit_code
    assert run(tmp_path / "in", *out, "--clip-seconds", 0.5).exit_code == ConfigError.exit_code


def test_embeddings_without_quantisation_are_refused_with_the_reason(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    out = ("--output", tmp_path / "out.tfrecord", sound(tmp_path / "a.wav", 2))
    result = run(*out, "--embedder", "compact-gunfire")
    assert result.exit_code == 1
    assert "not quantised" in result.output
    assert "--embedder vggish" in result.output
    result = run(*out, "--store", tmp_path)
    assert result.exit_code == WeightsMissing.exit_code
    assert "detector models fetch vggish" in result.output
    assert run(*out, "--embedder", "x", "--checkpoint", "y").exit_code == ConfigError.exit_code


def test_names_that_are_no_text_become_ids(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))
    try:
        sound(tmp_path / "a.wav", 2).rename(path)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    embed(gather([path], clip_seconds=10), tmp_path / "out.tfrecord")
    assert contents(tmp_path / "out.tfrecord")[0]["video_id"] == "caf\\xe9"


def test_model_errors_are_of_the_tree() -> None:
    model = SimpleNamespace(name="m", manifest=SimpleNamespace(postprocess=SimpleNamespace(kind="none")))
    with pytest.raises(ModelError, match="Model m makes embeddings that are not quantised"):
        PackageClips(model)  # type: ignore[arg-type]
