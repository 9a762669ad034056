"""The embedded bus's one file: opening, checking, transactions, and SQLite's errors in this project's words.

Used by ``embedded`` and ``membership`` alone. A ``BusFile`` is one connection, for one thread at a time.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from detector.errors import BusDamaged, BusError, BusReplaced, BusUnavailable

APPLICATION_ID = 0x47554E42  # "GUNB"
SCHEMA_VERSION = 1
OFFSET_BITS = 40  # records.id = log_id << 40 | offset: one B-tree, every partition's records side by side and in order

# A chunk (30,720 bytes and its headers) fills one page of this size; smaller pages cost a chain of overflow pages.
_PAGE_BYTES = 32_768
_CHECKPOINT_PAGES = 512  # 16 MiB of write-ahead log, then it is copied into the file
_LOG_LIMIT_BYTES = 64 * 1024 * 1024  # readers in step can keep the log from starting over; past this size they wait
_CACHE_KIB = 16_384

_SCHEMA = (
    """CREATE TABLE topics(
        topic_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, partitions INTEGER NOT NULL,
        retention_seconds REAL, retention_bytes INTEGER, max_message_bytes INTEGER)""",
    """CREATE TABLE logs(
        log_id INTEGER PRIMARY KEY, topic_id INTEGER NOT NULL REFERENCES topics, partition INTEGER NOT NULL,
        oldest_offset INTEGER NOT NULL DEFAULT 0, next_offset INTEGER NOT NULL DEFAULT 0,
        bytes INTEGER NOT NULL DEFAULT 0, UNIQUE(topic_id, partition))""",
    """CREATE TABLE records(
        id INTEGER PRIMARY KEY, timestamp_ms INTEGER NOT NULL, key BLOB, headers BLOB NOT NULL, value BLOB NOT NULL)""",
    "CREATE TABLE groups(group_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, generation INTEGER NOT NULL)",
    """CREATE TABLE members(
        group_id INTEGER NOT NULL, member_id TEXT NOT NULL, instance TEXT NOT NULL, topics TEXT NOT NULL,
        session_timeout_seconds REAL NOT NULL, heartbeat_seconds REAL NOT NULL, PRIMARY KEY(group_id, member_id))""",
    """CREATE TABLE assignments(
        group_id INTEGER NOT NULL, log_id INTEGER NOT NULL, target_member_id TEXT, owner_instance TEXT,
        PRIMARY KEY(group_id, log_id))""",
    """CREATE TABLE positions(
        group_id INTEGER NOT NULL, log_id INTEGER NOT NULL, offset INTEGER NOT NULL, metadata TEXT NOT NULL,
        PRIMARY KEY(group_id, log_id))""",
    "CREATE TABLE transactional_ids(name TEXT PRIMARY KEY, epoch INTEGER NOT NULL)",
)

Row = tuple[Any, ...]
_T = TypeVar("_T")


class BusFile:
    """One connection to a bus file; creates folder, file and tables where they are missing.

    Args:
        path: the file. Beside it SQLite keeps ``-wal`` and ``-shm``, which belong to it.
        busy_timeout_seconds: how long to wait for another process's write to end.
        durable: wait for the disk at each commit, so that even a crash of the operating system loses nothing.

    Raises:
        BusUnavailable: can't be opened or created, or is locked for longer than the timeout.
        BusDamaged: is no bus file, one of another version, or broken.
    """

    def __init__(self, path: Path, *, busy_timeout_seconds: float, durable: bool) -> None:
        self.path = path
        self._busy_timeout_seconds = busy_timeout_seconds
        self._wal_path = path.with_name(path.name + "-wal")
        if path.is_dir():
            raise BusUnavailable(f"Bus file {path} is a folder. Set bus.embedded.path to a file in it.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BusUnavailable(
                f"The folder {path.parent} of the bus file can't be created: {error.strerror}. "
                "Make it writable or set bus.embedded.path elsewhere."
            ) from error
        try:
            # check_same_thread: a producer's writer thread and its caller take turns, under a lock.
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise self.translated(error) from error
        try:
            self._retrying(lambda: self._set_up(durable))
            self._identity = self._identity_now()
        except BaseException:
            self._db.close()
            raise

    def _set_up(self, durable: bool) -> None:
        db = self._db
        db.execute(f"PRAGMA page_size={_PAGE_BYTES}")  # takes effect on a new file only
        self._check_is_ours_or_empty()
        (mode,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise BusUnavailable(
                f"The file system of bus file {self.path} has no shared memory (a network share?). "
                "Set bus.embedded.path to a local disk."
            )
        db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        db.execute("PRAGMA secure_delete=OFF")  # some builds overwrite deleted pages, which doubles the writing
        db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        db.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
        db.execute(f"PRAGMA journal_size_limit={_LOG_LIMIT_BYTES}")
        if self._check_is_ours_or_empty():
            return
        db.execute("BEGIN IMMEDIATE")
        try:
            if not self._check_is_ours_or_empty():  # another process may have been first
                for statement in _SCHEMA:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id={APPLICATION_ID}")
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            db.execute("COMMIT")
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")

    def _check_is_ours_or_empty(self) -> bool:
        """True: a bus file of this version. False: empty. Raises BusDamaged for anything else."""
        db = self._db
        alone = not db.in_transaction
        if alone:
            db.execute("BEGIN")  # one snapshot: another process may be laying the file out just now
        try:
            (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            (application_id,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
        finally:
            if alone:
                db.execute("ROLLBACK")
        if application_id == APPLICATION_ID and version == SCHEMA_VERSION:
            return True
        if application_id == APPLICATION_ID:
            raise BusDamaged(
                f"Bus file {self.path} has layout version {version}, this program reads {SCHEMA_VERSION}. "
                "Run the version that wrote it, or move the file away (what it holds is lost to this program)."
            )
        if application_id or version or tables:
            raise BusDamaged(
                f"{self.path} is an SQLite file of another program, not a bus. Set bus.embedded.path to another file."
            )
        return False

    def _identity_now(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def check_still_there(self) -> None:
        """Raise BusReplaced where the path leads to another file by now, or to none.

        SQLite goes on with a deleted file, which nobody else would ever read or write.
        """
        if self._identity_now() != self._identity:
            raise BusReplaced(
                f"Bus file {self.path} was removed or replaced while in use. Restart every process that uses it."
            )

    def _retrying(self, call: Callable[[], _T], timeout_seconds: float | None = None) -> _T:
        """Run ``call`` until the file is not locked. SQLite's own waiting backs off to 100 ms, which starves readers
        beside a busy writer; this asks every 1 to 3 ms."""
        timeout_seconds = self._busy_timeout_seconds if timeout_seconds is None else timeout_seconds
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                return call()
            except sqlite3.Error as error:
                if not _is_locked(error) or time.monotonic() >= deadline:
                    raise self.translated(error, timeout_seconds) from error
            time.sleep(random.uniform(0.001, 0.003))

    def translated(self, error: sqlite3.Error, timeout_seconds: float | None = None) -> BusError:
        """The same in this project's words. By SQLite's fixed texts: Python 3.10 doesn't expose its error codes."""
        text = str(error)
        if _is_locked(error):
            waited = self._busy_timeout_seconds if timeout_seconds is None else timeout_seconds
            return BusUnavailable(
                f"Bus file {self.path} stayed locked for {waited:g} s. Another program holds it (a backup, an sqlite3 "
                "shell with an open transaction, a stopped process): end that, then try again."
            )
        if any(
            sign in text for sign in ("malformed", "not a database", "unsupported file", "no such", "has no column")
        ):
            return BusDamaged(
                f"Bus file {self.path} is damaged or no bus file ({text}). Stop every process that uses it, move it "
                f"and its -wal and -shm files away and start again; "
                f"`sqlite3 {self.path} .recover` may save what it held."
            )
        if "full" in text or "disk I/O error" in text:
            return BusUnavailable(
                f"Bus file {self.path} can't be written: the disk is full or failing ({text}). Free space on it or "
                "lower bus.embedded.retention_bytes; nothing was half written."
            )
        if "unable to open" in text or "readonly" in text or "read-only" in text:
            return BusUnavailable(
                f"Bus file {self.path} can't be opened for writing ({text}). Give this user write permission on it, "
                "its -wal and -shm files and their folder, or set bus.embedded.path elsewhere."
            )
        return BusUnavailable(f"Bus file {self.path}: {text}.")

    def rows(self, sql: str, parameters: Sequence[object] = ()) -> list[Row]:
        """Read in one snapshot."""
        return self._retrying(lambda: self._db.execute(sql, parameters).fetchall())

    def rows_within(self, sql: str, parameters: Sequence[object], budget: Callable[[Row], bool]) -> list[Row]:
        """Like ``rows``, but ends after the first row for which ``budget`` says False."""

        def read() -> list[Row]:
            cursor = self._db.execute(sql, parameters)
            try:
                found = []
                for row in cursor:
                    found.append(row)
                    if not budget(row):
                        break
                return found
            finally:
                cursor.close()  # an open cursor would hold its snapshot

        return self._retrying(read)

    @contextmanager
    def transaction(self, timeout_seconds: float | None = None) -> Iterator[sqlite3.Connection]:
        """Write: all that is done inside takes effect at the end, or nothing."""
        self.check_still_there()
        self._retrying(lambda: self._db.execute("BEGIN IMMEDIATE"), timeout_seconds)
        try:
            yield self._db
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise self.translated(error) from error
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def data_version(self) -> int:
        """A number that changes when another connection has committed. Costs microseconds."""
        (version,) = self._retrying(lambda: self._db.execute("PRAGMA data_version").fetchone())
        return int(version)

    def limit_log(self) -> None:
        """Start the write-ahead log over if readers in step have let it grow past its limit."""
        try:
            too_large = self._wal_path.stat().st_size > _LOG_LIMIT_BYTES
        except FileNotFoundError:
            return
        if too_large:
            # Waits for nobody (timeout 0): if a reader is in the way now, the next call tries again.
            self.rows("PRAGMA wal_checkpoint(RESTART)")

    def close(self) -> None:
        self._db.close()


def _is_locked(error: sqlite3.Error) -> bool:
    text = str(error)
    return "locked" in text or "locking protocol" in text or "busy" in text
