"""`detector models fetch vggish`: AudioSet's published files into the store, pinned, converted and smoke-tested.

Downloads resume where they stopped; on a machine without internet access the files come from a folder. What arrives is
pinned by SHA-256 on first use (``store``), converted once to safetensors, and marked verified only if the smoke test
that AudioSet publishes passes.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import tenacity

from detector.checkpoint import read_checkpoint, read_safetensors, write_safetensors
from detector.embedders.log_mel import log_mel_examples
from detector.embedders.params import FRONT_END
from detector.embedders.postprocess import quantise, read_pca
from detector.errors import ModelError
from detector.store import Lock, check_sha256, sha256_of_file

if TYPE_CHECKING:
    import requests
    from rich.progress import Progress

PUBLISHED_BASE_URL = "https://storage.googleapis.com/audioset"
CHECKPOINT_NAME = "vggish_model.ckpt"
PCA_NAME = "vggish_pca_params.npz"
WEIGHTS_NAME = "vggish.safetensors"
_LOCK_FILE = ".fetch.lock"
_BLOCK_BYTES = 1 << 18
_TIMEOUT_SECONDS = (10.0, 60.0)
_ATTEMPTS = 6

# Source: tensorflow/models, research/audioset/vggish/vggish_smoke_test.py, values of 2023-07-25.
_SMOKE_SECONDS = 3
_SMOKE_HZ = 1_000.0
_SMOKE_RELATIVE_ERROR = 0.1
_SMOKE_EXPECTED = (
    ("embedding mean", 0.000657),
    ("embedding standard deviation", 0.343),
    ("postprocessed mean", 126.0),
    ("postprocessed standard deviation", 89.3),
)


@dataclass(frozen=True, slots=True)
class SmokeTest:
    """What AudioSet's smoke test (3 s of a 1 kHz sine) gave with the weights in a store.

    Attributes:
        measured: name -> value, in the order of the published script.
        faults: one sentence for each value more than 10 % off.
    """

    measured: dict[str, float]
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.faults

    @property
    def text(self) -> str:
        """For people: "Looks Good To Me", or what deviates."""
        if self.passed:
            return "Looks Good To Me"
        return (
            "These files read well but don't behave like AudioSet's published VGGish, so they stay marked unverified:\n"
            + "\n".join(f"  {fault}" for fault in self.faults)
        )


def fetch_vggish(
    store: Path, *, mirror: str | None = None, source_dir: Path | None = None, progress: bool = False
) -> SmokeTest:
    """Bring VGGish's checkpoint and PCA parameters into ``store``, convert and smoke-test them.

    Args:
        store: folder, made where absent. What is there and matches its lock is not fetched again.
        mirror: base URL instead of AudioSet's own.
        source_dir: copy from this folder, without any network.
        progress: draw a progress bar.

    Returns the smoke test's outcome; the caller says it and exits with 1 unless ``passed``.
    Raises ModelError where a file can't be had, is damaged, or differs from what was pinned.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"Store folder {store} can't be made: {error.strerror or error}.") from error
    with _alone_in(store):
        lock = Lock(store)
        for name in (CHECKPOINT_NAME, PCA_NAME):
            _bring(name, store, lock, mirror or PUBLISHED_BASE_URL, source_dir, progress)
        _convert(store, lock)
        outcome = smoke_test(store)
        lock.set_verified(dict.fromkeys((CHECKPOINT_NAME, PCA_NAME, WEIGHTS_NAME), outcome.passed))
        lock.save()
    return outcome


def smoke_test(store: Path) -> SmokeTest:
    """AudioSet's published check of embedding and postprocessor statistics, on the files in ``store``."""
    from detector.embedders.vggish import VGGISH_SHAPES, Vggish

    time_seconds = np.arange(0, _SMOKE_SECONDS, 1 / FRONT_END.sample_rate_hz)
    examples = log_mel_examples(np.sin(2 * np.pi * _SMOKE_HZ * time_seconds))  # (3, 96, 64)
    network = Vggish(read_safetensors(store / WEIGHTS_NAME, VGGISH_SHAPES))
    embeddings = network(examples.astype(np.float32)).numpy()
    quantised = quantise(embeddings, read_pca(store / PCA_NAME))
    values = (np.mean(embeddings), np.std(embeddings), np.mean(quantised), np.std(quantised))
    measured = {name: float(value) for (name, _), value in zip(_SMOKE_EXPECTED, values, strict=True)}
    faults = tuple(
        f"{name} is {measured[name]:.6g}, expected {expected:g} within {_SMOKE_RELATIVE_ERROR:.0%}"
        for name, expected in _SMOKE_EXPECTED
        if not abs(measured[name] - expected) <= _SMOKE_RELATIVE_ERROR * abs(expected)
    )
    return SmokeTest(measured, faults)


def _bring(name: str, store: Path, lock: Lock, base_url: str, source_dir: Path | None, progress: bool) -> None:
    """``name`` into the store, its content as pinned; pins it where it is new."""
    path, pinned = store / name, lock.sha256(name)
    if pinned is not None and path.exists():
        check_sha256(path, pinned)
        return
    part = store / f"{name}.part"
    if source_dir is not None:
        source = source_dir / name
        if not source.is_file():
            raise ModelError(f"{source} does not exist; --from needs a folder with {CHECKPOINT_NAME} and {PCA_NAME}.")
        origin = str(source)
        with _disk_errors(part):
            shutil.copyfile(source, part)
    else:
        origin = _checked_url(base_url, name)
        _download(origin, part, progress)
    sha256 = sha256_of_file(part)
    try:
        lock.pin(name, sha256, origin=_without_secrets(origin))
    except ModelError:
        _forget(part)
        raise
    with _disk_errors(path):
        part.replace(path)
    _forget(part)
    lock.save()


def _convert(store: Path, lock: Lock) -> None:
    """Checkpoint -> safetensors, once for each checkpoint content."""
    from detector.embedders.vggish import VGGISH_SHAPES

    weights, origin = store / WEIGHTS_NAME, f"{CHECKPOINT_NAME} {lock.sha256(CHECKPOINT_NAME)}"
    pinned = lock.sha256(WEIGHTS_NAME)
    if pinned is not None and lock.origin(WEIGHTS_NAME) == origin and weights.exists():
        check_sha256(weights, pinned)
        return
    write_safetensors(weights, read_checkpoint(store / CHECKPOINT_NAME, VGGISH_SHAPES))
    lock.unpin(WEIGHTS_NAME)  # derived from a pinned file, by this code: nothing foreign to guard against
    lock.pin(WEIGHTS_NAME, sha256_of_file(weights), origin=origin)
    lock.save()


# --- download -----------------------------------------------------------------------------------------------------


class _Interrupted(Exception):
    """The transfer stopped; what came is kept and a further try goes on from there."""


def _download(url: str, part: Path, progress: bool) -> None:
    """Into ``part``, going on where an earlier try stopped; ModelError where it can't be had."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Interrupted),
            stop=tenacity.stop_after_attempt(_ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=10),
            reraise=True,
        )
        try:
            retrying(_download_once, url, part, bar)
        except _Interrupted as error:
            raise ModelError(
                f"{_without_secrets(url)} can't be fetched: {error}. What came is kept in {part}; run the same command "
                "again to go on, or give --from FOLDER."
            ) from error


def _download_once(url: str, part: Path, bar: Progress) -> None:
    import requests

    validator = _read_validator(part)
    offset = part.stat().st_size if part.exists() and validator else 0
    headers = {"Accept-Encoding": "identity"}
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_SECONDS) as response:
            if response.status_code == 416:  # nothing beyond what is here, or other content by now: start over
                _forget(part)
                raise _Interrupted("the server has no more than what was fetched before")
            _check_status(response, url)
            resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(
                f"bytes {offset}-"
            )
            if response.status_code == 206 and not resumed:
                _forget(part)
                raise _Interrupted(
                    f"the server sent {response.headers.get('Content-Range')!r}, not the range asked for"
                )
            offset = offset if resumed else 0
            length = response.headers.get("Content-Length")
            total = offset + int(length) if length and length.isdigit() else None
            _write_validator(part, response)
            task = bar.add_task(part.stem, total=total, completed=offset)
            with _disk_errors(part), part.open("ab" if resumed else "wb") as file:
                for block in response.iter_content(_BLOCK_BYTES):
                    file.write(block)
                    bar.advance(task, len(block))
            found = part.stat().st_size
            if total is not None and found != total:
                raise _Interrupted(f"{found} of {total} bytes came")
            _check_md5(part, response.headers.get("x-goog-hash", ""))
    except requests.RequestException as error:
        raise _Interrupted(f"{type(error).__name__}: {error}") from error


def _check_status(response: requests.Response, url: str) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status == 429 or status >= 500:
        raise _Interrupted(f"the server answered {status}")
    raise ModelError(
        f"{_without_secrets(url)} answered {status} {response.reason}; check address and mirror, or give --from FOLDER."
    )


def _check_md5(part: Path, header: str) -> None:
    """Google's storage sends an MD5 of the whole object; a mirror may not."""
    for item in header.replace(" ", "").split(","):
        name, _, value = item.partition("=")
        if name != "md5":
            continue
        digest = hashlib.md5(usedforsecurity=False)
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if base64.b64encode(digest.digest()).decode() != value:
            _forget(part)
            raise _Interrupted("what came does not match the MD5 the server sent")


def _validator_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_validator(part: Path) -> str:
    """The ETag (or date) of the content that ``part`` began with; empty where unknown: then start over."""
    try:
        content = json.loads(_validator_path(part).read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    validator = content.get("validator") if isinstance(content, dict) else None
    return validator if isinstance(validator, str) and validator.isprintable() else ""


def _write_validator(part: Path, response: requests.Response) -> None:
    etag = response.headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
    with _disk_errors(part):
        _validator_path(part).write_text(json.dumps({"validator": validator}), "utf-8")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_path(part).unlink(missing_ok=True)


def _checked_url(base_url: str, name: str) -> str:
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ModelError(f"Mirror {base_url!r} is no address; give a base URL such as {PUBLISHED_BASE_URL}.")
    return f"{base_url.rstrip('/')}/{name}"


def _without_secrets(text: str) -> str:
    """A URL without user name, password and query; other text as it is."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https"):
        return text
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        import requests

        if isinstance(error, requests.RequestException):  # these are OSErrors too, but of the network
            raise
        raise ModelError(
            f"{path} can't be written: {error.strerror or error}. VGGish needs about 600 MB in {path.parent}."
        ) from error


@contextmanager
def _alone_in(store: Path) -> Iterator[None]:
    """Only one fetch at a time in a store."""
    with _disk_errors(store / _LOCK_FILE), (store / _LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelError(f"Another fetch is running in {store}; wait for it to end.") from None
        yield
