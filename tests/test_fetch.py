"""Fetching VGGish over a real (loopback) server: resumes, pins, refuses what changed, says honestly what it got."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from detector import fetch
from detector.errors import ModelError
from detector.fetch import CHECKPOINT_NAME, PCA_NAME, WEIGHTS_NAME, fetch_vggish
from detector.store import Lock, default_store, locked_file

CONTENT = np.random.default_rng(0).bytes(1_500_000)  # no checkpoint: fetching works, converting must say so


class Site:
    """What the server holds and how it misbehaves."""

    def __init__(self) -> None:
        self.files = {CHECKPOINT_NAME: CONTENT, PCA_NAME: b"pca"}
        self.etag = '"one"'
        self.ranges = True
        self.cut_after: list[int] = []  # bytes to send before dropping the connection, one entry a request
        self.statuses: list[int] = []  # answered instead, one a request
        self.wrong_md5 = False
        self.requests: list[tuple[str, str | None]] = []
        self.url = ""


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            name, asked = self.path.rsplit("/", 1)[-1], self.headers.get("Range")
            site.requests.append((name, asked))
            body = site.files.get(name)
            status = site.statuses.pop(0) if site.statuses else (200 if body is not None else 404)
            if status != 200 or body is None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = 0
            if asked and site.ranges and self.headers.get("If-Range") == site.etag:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                if start >= len(body):
                    self.send_response(416)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            md5 = hashlib.md5(b"other" if site.wrong_md5 else body).digest()
            self.send_header("ETag", site.etag)
            self.send_header("x-goog-hash", f"crc32c=AAAAAA==, md5={base64.b64encode(md5).decode()}")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            cut = site.cut_after.pop(0) if site.cut_after else len(body)
            self.wfile.write(body[start : start + cut])
            if cut < len(body) - start:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}/audioset"
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def fetch_bytes(store: Path, site: Site) -> None:
    """The content is no checkpoint, so a fetch that brings every byte ends with exactly this error."""
    with pytest.raises(ModelError, match="can't be read as a TensorFlow checkpoint"):
        fetch_vggish(store, mirror=site.url)


def test_download_pins_what_it_brought(tmp_path: Path, site: Site) -> None:
    fetch_bytes(tmp_path / "store", site)
    store = tmp_path / "store"
    assert (store / CHECKPOINT_NAME).read_bytes() == CONTENT
    assert Lock(store).sha256(CHECKPOINT_NAME) == hashlib.sha256(CONTENT).hexdigest()
    assert not Lock(store).verified(CHECKPOINT_NAME)
    assert locked_file(store, PCA_NAME)[0].read_bytes() == b"pca"
    assert not list(store.glob("*.part*"))
    before = len(site.requests)
    fetch_bytes(store, site)
    assert len(site.requests) == before, "what is there is not fetched again"


def test_interrupted_download_resumes_where_it_stopped(tmp_path: Path, site: Site) -> None:
    site.cut_after = [600_000, 300_000]
    fetch_bytes(tmp_path, site)
    asked = [r for name, r in site.requests if name == CHECKPOINT_NAME]
    assert asked[0] is None
    offsets = [int(r.removeprefix("bytes=").removesuffix("-")) for r in asked[1:] if r]
    assert len(offsets) == 2
    assert 0 < offsets[0] < offsets[1] <= 900_000
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == CONTENT


def test_a_later_run_goes_on_from_the_part_file(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_ATTEMPTS", 1)
    site.cut_after = [700_000]
    with pytest.raises(ModelError, match=r"run the same command again to go on") as caught:
        fetch_vggish(tmp_path, mirror=site.url)
    assert "vggish_model.ckpt.part" in str(caught.value).replace("\n", "")
    kept = (tmp_path / f"{CHECKPOINT_NAME}.part").stat().st_size
    assert kept > 0
    fetch_bytes(tmp_path, site)
    assert site.requests[1] == (CHECKPOINT_NAME, f"bytes={kept}-")
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == CONTENT


def test_server_that_ignores_ranges_is_read_from_the_start(tmp_path: Path, site: Site) -> None:
    site.ranges, site.cut_after = False, [600_000]
    fetch_bytes(tmp_path, site)
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == CONTENT


def test_content_that_changed_between_two_tries_is_not_spliced(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_ATTEMPTS", 1)
    site.cut_after = [600_000]
    with pytest.raises(ModelError, match="can't be fetched"):
        fetch_vggish(tmp_path, mirror=site.url)
    site.files[CHECKPOINT_NAME], site.etag = CONTENT[::-1], '"two"'
    fetch_bytes(tmp_path, site)
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == CONTENT[::-1]


def test_part_file_that_is_complete_or_longer_starts_over(tmp_path: Path, site: Site) -> None:
    (tmp_path / f"{CHECKPOINT_NAME}.part").write_bytes(CONTENT + b"more")
    (tmp_path / f"{CHECKPOINT_NAME}.part.json").write_text(json.dumps({"validator": site.etag}))
    fetch_bytes(tmp_path, site)
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == CONTENT


def test_busy_server_is_tried_again_and_a_missing_file_is_not(tmp_path: Path, site: Site) -> None:
    site.statuses = [503, 429]
    fetch_bytes(tmp_path / "a", site)
    del site.files[CHECKPOINT_NAME]
    site.requests.clear()
    with pytest.raises(ModelError, match="answered 404"):
        fetch_vggish(tmp_path / "b", mirror=site.url.replace("http://", "http://user:secret@"))
    assert len(site.requests) == 1


def test_secrets_of_a_mirror_are_not_told(tmp_path: Path, site: Site) -> None:
    site.files.clear()
    with pytest.raises(ModelError) as caught:
        fetch_vggish(tmp_path, mirror=site.url.replace("http://", "http://user:secret@"))
    assert "secret" not in str(caught.value)


def test_wrong_md5_of_the_server_is_noticed(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_ATTEMPTS", 2)
    site.wrong_md5 = True
    with pytest.raises(ModelError, match="does not match the MD5"):
        fetch_vggish(tmp_path, mirror=site.url)
    assert not (tmp_path / CHECKPOINT_NAME).exists()


def test_other_content_than_pinned_is_refused(tmp_path: Path, site: Site) -> None:
    fetch_bytes(tmp_path, site)
    (tmp_path / CHECKPOINT_NAME).unlink()
    site.files[CHECKPOINT_NAME], site.etag = b"forged", '"two"'
    with pytest.raises(ModelError, match=r"content has changed since the first fetch"):
        fetch_vggish(tmp_path, mirror=site.url)
    assert not (tmp_path / CHECKPOINT_NAME).exists()
    (tmp_path / CHECKPOINT_NAME).write_bytes(b"tampered")
    with pytest.raises(ModelError, match="damaged or was replaced"):
        fetch_vggish(tmp_path, mirror=site.url)


def test_unreachable_and_impossible_addresses(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_ATTEMPTS", 2)
    with pytest.raises(ModelError, match="can't be fetched: ConnectionError"):
        fetch_vggish(tmp_path, mirror="http://127.0.0.1:1/x")
    for mirror in ("ftp://host/x", "audioset", "file:///etc"):
        with pytest.raises(ModelError, match="is no address"):
            fetch_vggish(tmp_path, mirror=mirror)


def test_full_disk(tmp_path: Path, site: Site) -> None:
    (tmp_path / f"{CHECKPOINT_NAME}.part").symlink_to("/dev/full")
    with pytest.raises(ModelError, match=r"No space left on device.*about 600 MB"):
        fetch_vggish(tmp_path, mirror=site.url)


def test_store_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="can't be made"):
        fetch_vggish(tmp_path / "file" / "store")


def test_folder_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"vggish_model\.ckpt does not exist; --from needs"):
        fetch_vggish(tmp_path / "store", source_dir=tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 9, "files": {}}', '{"version":1,"files":{"a":{"sha256":"z"}}}']
)
def test_damaged_lock(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock.json").write_text(text)
    with pytest.raises(ModelError, match=r"lock\.json is damaged"):
        fetch_vggish(tmp_path, source_dir=tmp_path)


def test_default_store_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_store() == tmp_path / "gunfire-detector" / "models"
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", value)
        assert default_store() == Path.home() / ".local" / "share" / "gunfire-detector" / "models"


@pytest.mark.golden
def test_original_format_converts_and_synthetic_weights_do_not_look_good(
    tmp_path: Path, golden_dir: Path, vggish_tensors: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store = tmp_path / "source", tmp_path / "store"
    source.mkdir()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        placeholders = {
            name: tf.compat.v1.placeholder(tf.float32, value.shape) for name, value in vggish_tensors.items()
        }
        variables = {
            n: tf.compat.v1.get_variable(n, initializer=p, use_resource=False) for n, p in placeholders.items()
        }
        session.run(
            [v.initializer for v in variables.values()], {placeholders[n]: v for n, v in vggish_tensors.items()}
        )
        saver = tf.compat.v1.train.Saver(variables, write_version=tf.compat.v1.train.SaverDef.V1)
        saver.save(session, str(source / CHECKPOINT_NAME), write_meta_graph=False, write_state=False)
    (source / PCA_NAME).write_bytes((golden_dir / "vggish_pca_params.npz").read_bytes())

    outcome = fetch_vggish(store, source_dir=source)

    assert not outcome.passed
    assert "Looks Good To Me" not in outcome.text
    assert "embedding standard deviation is" in outcome.text
    assert not any(Lock(store).verified(name) for name in (CHECKPOINT_NAME, PCA_NAME, WEIGHTS_NAME))
    assert locked_file(store, WEIGHTS_NAME)[1] == Lock(store).sha256(WEIGHTS_NAME)
    golden = np.load(golden_dir / "vggish_net.npz")
    np.testing.assert_allclose(outcome.measured["embedding mean"], golden["emb_sine_smoke_16k"].mean(), rtol=1e-3)
    np.testing.assert_allclose(outcome.measured["postprocessed mean"], golden["post_sine_smoke_16k"].mean(), rtol=1e-3)

    # Were these the published statistics, it would say so and mark the files.
    published = tuple(outcome.measured.items())
    monkeypatch.setattr(fetch, "_SMOKE_EXPECTED", published)
    again = fetch_vggish(store, source_dir=source)
    assert again.text == "Looks Good To Me"
    assert all(Lock(store).verified(name) for name in (CHECKPOINT_NAME, PCA_NAME, WEIGHTS_NAME))
