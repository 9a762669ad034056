"""Where fetched weights lie, and the lock that pins what they must hash to.

Google publishes no checksums, so the first fetch of a file pins its SHA-256 in ``lock.json``; from then on another
content is refused. Written by ``fetch``, read by ``model``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detector.errors import ModelError, WeightsMissing

LOCK_NAME = "lock.json"
_LOCK_VERSION = 1
_READ_BYTES = 1 << 20
_HEX = frozenset("0123456789abcdef")


def default_store() -> Path:
    """``$XDG_DATA_HOME`` (or ``~/.local/share``) ``/gunfire-detector/models``."""
    base = os.environ.get("XDG_DATA_HOME", "")
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".local" / "share"
    return root / "gunfire-detector" / "models"


def sha256_of_file(path: Path) -> str:
    """Lower-case hex; ModelError where the file can't be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except FileNotFoundError:
        raise ModelError(f"File {path} does not exist. Get it again.") from None
    except OSError as error:
        raise ModelError(
            f"File {path} can't be read: {error.strerror or error}. Make it readable, or get it again."
        ) from error
    return digest.hexdigest()


class Lock:
    """SHA-256 of every file in a store, and whether the published smoke test passed with it."""

    def __init__(self, store: Path) -> None:
        """Reads ``lock.json``; ModelError where it is damaged. A store without one has an empty lock."""
        self.path = store / LOCK_NAME
        self._files: dict[str, dict[str, Any]] = {}
        try:
            text = self.path.read_text("utf-8")
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"Lock file {self.path} can't be read: {error}.") from error
        try:
            content = json.loads(text)
            if content["version"] != _LOCK_VERSION:
                raise ValueError(f"version {content['version']!r}, expected {_LOCK_VERSION}")
            for name, entry in content["files"].items():
                sha256 = entry["sha256"]
                if not (isinstance(sha256, str) and len(sha256) == 64 and set(sha256) <= _HEX):
                    raise ValueError(f"{name} has no SHA-256")
                self._files[name] = dict(entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"Lock file {self.path} is damaged ({error}). If the files beside it are to be trusted anew, delete it "
                "and fetch again."
            ) from error

    def sha256(self, name: str) -> str | None:
        entry = self._files.get(name)
        return entry["sha256"] if entry else None

    def origin(self, name: str) -> str | None:
        """Where the pinned content came from."""
        entry = self._files.get(name)
        return str(entry.get("origin")) if entry else None

    def unpin(self, name: str) -> None:
        self._files.pop(name, None)

    def verified(self, name: str) -> bool:
        """True once the published smoke test passed with this content."""
        return bool(self._files.get(name, {}).get("verified", False))

    def pin(self, name: str, sha256: str, *, origin: str) -> None:
        """Pin on first use; ModelError where another hash is pinned already."""
        pinned = self.sha256(name)
        if pinned is None:
            self._files[name] = {"sha256": sha256, "origin": origin, "verified": False}
        elif pinned != sha256:
            raise ModelError(
                f"{name} from {origin} has SHA-256 {sha256}, but {pinned} is pinned in {self.path}: its content has "
                f"changed since the first fetch. Find out why; to trust the new content, remove {name} from that file."
            )

    def set_verified(self, verified: Mapping[str, bool]) -> None:
        for name, value in verified.items():
            self._files[name]["verified"] = value

    def save(self) -> None:
        """Whole or not at all; ModelError where the disk refuses."""
        text = json.dumps({"version": _LOCK_VERSION, "files": self._files}, indent=2, sort_keys=True) + "\n"
        partial = self.path.with_name(self.path.name + ".part")
        try:
            partial.write_text(text, "utf-8")
            partial.replace(self.path)
        except OSError as error:
            raise ModelError(f"Lock file {self.path} can't be written: {error.strerror or error}.") from error


def locked_file(store: Path, name: str) -> tuple[Path, str]:
    """``(path, sha256)`` of a fetched file whose content is what the lock pins.

    Raises WeightsMissing where it was never fetched, ModelError where it is damaged.
    """
    pinned = Lock(store).sha256(name)
    path = store / name
    if pinned is None or not path.exists():
        raise WeightsMissing(
            f"{path} is not there. Run `detector models fetch vggish` first, with --from FOLDER on a machine without "
            "internet access."
        )
    check_sha256(path, pinned)
    return path, pinned


def check_sha256(path: Path, expected: str) -> None:
    found = sha256_of_file(path)
    if found != expected:
        raise ModelError(
            f"{path} has SHA-256 {found}, expected {expected}: it is damaged or was replaced. Get it again."
        )
