"""Consumer groups of the embedded bus: who reads which partition, kept as rows of the bus file.

Each partition has a *target* (the member that shall have it) and an *owner* (the one that has it). A rebalance sets
targets alone; an owner that is no longer the target lets go at its next poll, after its ``on_revoked``; then the target
takes it. So members keep what stays theirs, and no partition ever has two owners. A commit is refused unless its member
is the owner.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence

from detector.bus.base import Commit, TopicPartition
from detector.bus.sqlite_file import BusFile
from detector.errors import BusDamaged, CommitFenced


def balance(
    partitions: Mapping[int, str], members: Mapping[str, frozenset[str]], current: Mapping[int, str | None]
) -> dict[int, str | None]:
    """Share out partitions so that counts differ by at most one among members of equal topics, moving few.

    Args:
        partitions: log id -> topic.
        members: member id -> its topics; ties go to the earlier one.
        current: log id -> member id of the assignment so far; unknown members count as None.

    Returns:
        log id -> member id; None where no member reads the topic.
    """
    result: dict[int, str | None] = {}
    load = dict.fromkeys(members, 0)
    for log_id, topic in sorted(partitions.items()):
        member = current.get(log_id)
        result[log_id] = None
        if member is not None and topic in members.get(member, ()):
            result[log_id] = member
            load[member] += 1
    readers: dict[str, list[str]] = {}
    for member, topics in members.items():
        for topic in topics:
            readers.setdefault(topic, []).append(member)
    for log_id, topic in sorted(partitions.items()):
        if result[log_id] is None and topic in readers:
            least = min(readers[topic], key=load.__getitem__)
            result[log_id] = least
            load[least] += 1
    moved = True
    while moved:  # each move lowers the sum of squared loads, so this ends
        moved = False
        for log_id, owner in result.items():
            if owner is None:
                continue
            least = min(readers[partitions[log_id]], key=load.__getitem__)
            if load[owner] - load[least] >= 2:
                result[log_id] = least
                load[owner] -= 1
                load[least] += 1
                moved = True
    return result


def rebalance_all(db: sqlite3.Connection) -> None:
    """Share out anew in every group, inside the caller's transaction (a topic was created)."""
    for (group_id,) in db.execute("SELECT group_id FROM groups").fetchall():
        _rebalance(db, group_id)


def _rebalance(db: sqlite3.Connection, group_id: int) -> None:
    members = {
        member_id: frozenset(json.loads(topics))
        for member_id, topics in db.execute(
            "SELECT member_id, topics FROM members WHERE group_id=? ORDER BY rowid", (group_id,)
        )
    }
    partitions = dict(
        db.execute("SELECT log_id, name FROM logs JOIN topics USING(topic_id) ORDER BY name, partition").fetchall()
    )
    current = dict(
        db.execute("SELECT log_id, target_member_id FROM assignments WHERE group_id=?", (group_id,)).fetchall()
    )
    wanted = balance(partitions, members, current)
    changes = [(group_id, log_id, m) for log_id, m in wanted.items() if current.get(log_id) != m]
    db.executemany(
        "INSERT INTO assignments(group_id, log_id, target_member_id) VALUES(?,?,?) "
        "ON CONFLICT(group_id, log_id) DO UPDATE SET target_member_id=excluded.target_member_id",
        changes,
    )
    if changes:
        _next_generation(db, group_id)


def _next_generation(db: sqlite3.Connection, group_id: int) -> None:
    db.execute("UPDATE groups SET generation=generation+1 WHERE group_id=?", (group_id,))


def _clock_seconds() -> float:
    # System-wide and never set back. After a reboot it restarts: old rows then lie in the future, and count as dead.
    return time.monotonic()


class Membership:
    """One consumer's place in its group.

    ``instance`` is new for each consumer object, so that a member's successor under the same ``member_id`` (static
    membership) fences it.
    """

    def __init__(
        self,
        file: BusFile,
        group: str,
        topics: Sequence[str],
        member_id: str | None,
        session_timeout_seconds: float,
    ) -> None:
        self._file = file
        self.group = group
        self._topics = sorted(set(topics))
        self._instance = uuid.uuid4().hex
        self.member_id = member_id or f"member-{self._instance}"
        self._is_static = member_id is not None
        self._session_timeout_seconds = session_timeout_seconds
        self._heartbeat_interval_seconds = session_timeout_seconds / 4
        self.next_heartbeat_seconds = 0.0
        self._group_id: int | None = None
        self._generation = -1

    @property
    def is_joined(self) -> bool:
        return self._group_id is not None

    def join(self) -> None:
        """Enter the group; a member of the same ``member_id`` is replaced, and its partitions taken over at once."""
        with self._file.transaction() as db:
            db.execute("INSERT OR IGNORE INTO groups(name, generation) VALUES(?, 0)", (self.group,))
            (group_id,) = db.execute("SELECT group_id FROM groups WHERE name=?", (self.group,)).fetchone()
            row = db.execute(
                "SELECT instance FROM members WHERE group_id=? AND member_id=?", (group_id, self.member_id)
            ).fetchone()
            if row is not None:
                db.execute(
                    "UPDATE assignments SET owner_instance=NULL WHERE group_id=? AND owner_instance=?",
                    (group_id, row[0]),
                )
            db.execute(
                "INSERT INTO members VALUES(?,?,?,?,?,?) ON CONFLICT(group_id, member_id) DO UPDATE SET "
                "instance=excluded.instance, topics=excluded.topics, heartbeat_seconds=excluded.heartbeat_seconds, "
                "session_timeout_seconds=excluded.session_timeout_seconds",
                (
                    group_id,
                    self.member_id,
                    self._instance,
                    json.dumps(self._topics),
                    self._session_timeout_seconds,
                    _clock_seconds(),
                ),
            )
            self._expire_dead(db, group_id)
            _rebalance(db, group_id)
            _next_generation(db, group_id)
        self._group_id = group_id
        self._generation = -1
        self._schedule_heartbeat()

    def heartbeat(self) -> bool:
        """Say that this member lives and remove those that don't. False: this member itself was removed."""
        with self._file.transaction() as db:
            alive = db.execute(
                "UPDATE members SET heartbeat_seconds=? WHERE group_id=? AND member_id=? AND instance=?",
                (_clock_seconds(), self._group_id, self.member_id, self._instance),
            ).rowcount
            if alive and self._expire_dead(db, self._group_id):
                _rebalance(db, self._require_group())
        self._schedule_heartbeat()
        return bool(alive)

    def _schedule_heartbeat(self) -> None:
        self.next_heartbeat_seconds = time.monotonic() + self._heartbeat_interval_seconds

    def _expire_dead(self, db: sqlite3.Connection, group_id: int | None) -> bool:
        now = _clock_seconds()
        dead = db.execute(
            "SELECT member_id, instance FROM members WHERE group_id=? AND instance!=? "
            "AND (heartbeat_seconds > ? OR heartbeat_seconds + session_timeout_seconds < ?)",
            (group_id, self._instance, now, now),
        ).fetchall()
        for member_id, instance in dead:
            db.execute("DELETE FROM members WHERE group_id=? AND member_id=?", (group_id, member_id))
            db.execute(
                "UPDATE assignments SET owner_instance=NULL WHERE group_id=? AND owner_instance=?", (group_id, instance)
            )
        if dead:
            _next_generation(db, self._require_group(group_id))
        return bool(dead)

    def _require_group(self, group_id: int | None = None) -> int:
        group_id = self._group_id if group_id is None else group_id
        assert group_id is not None
        return group_id

    def has_news(self) -> bool:
        """Whether anything about the group changed since ``shares`` was last called."""
        rows = self._file.rows("SELECT generation FROM groups WHERE group_id=?", (self._group_id,))
        return not rows or rows[0][0] != self._generation

    def is_fenced(self) -> bool:
        """Whether another consumer took this one's static name."""
        return self._is_static and bool(
            self._file.rows(
                "SELECT 1 FROM members WHERE group_id=? AND member_id=? AND instance!=?",
                (self._group_id, self.member_id, self._instance),
            )
        )

    def shares(self) -> tuple[bool, frozenset[int], frozenset[int], frozenset[int]]:
        """(whether still a member; log ids owned and to keep; owned but to let go; free to take)."""
        rows = self._file.rows(
            "SELECT generation, log_id, target_member_id=?, owner_instance, "
            "EXISTS(SELECT 1 FROM members m WHERE m.group_id=g.group_id AND m.member_id=? AND m.instance=?) "
            "FROM groups g LEFT JOIN assignments a USING(group_id) WHERE g.group_id=?",
            (self.member_id, self.member_id, self._instance, self._group_id),
        )
        if not rows:
            raise BusDamaged(f"Group {self.group!r} vanished from bus file {self._file.path}. Restart this process.")
        self._generation = rows[0][0]
        keep: set[int] = set()
        let_go: set[int] = set()
        free: set[int] = set()
        for _, log_id, is_target, owner, _ in rows:
            if owner == self._instance:
                (keep if is_target else let_go).add(log_id)
            elif is_target and owner is None:
                free.add(log_id)
        return bool(rows[0][4]), frozenset(keep), frozenset(let_go), frozenset(free)

    def let_go(self, log_ids: Iterable[int]) -> None:
        with self._file.transaction() as db:
            db.executemany(
                "UPDATE assignments SET owner_instance=NULL WHERE group_id=? AND log_id=? AND owner_instance=?",
                [(self._group_id, log_id, self._instance) for log_id in log_ids],
            )
            _next_generation(db, self._require_group())

    def take(self, log_ids: Iterable[int]) -> frozenset[int]:
        """Own those of ``log_ids`` that are still free and meant for this member."""
        taken = set()
        with self._file.transaction() as db:
            for log_id in log_ids:
                if db.execute(
                    "UPDATE assignments SET owner_instance=? WHERE group_id=? AND log_id=? AND owner_instance IS NULL "
                    "AND target_member_id=? AND EXISTS(SELECT 1 FROM members WHERE group_id=? AND instance=?)",
                    (self._instance, self._group_id, log_id, self.member_id, self._group_id, self._instance),
                ).rowcount:
                    taken.add(log_id)
        return frozenset(taken)

    def store_positions(
        self, db: sqlite3.Connection, commits: Mapping[TopicPartition, Commit], log_ids: Mapping[TopicPartition, int]
    ) -> None:
        """Inside the caller's transaction. Raises CommitFenced if one of the partitions has another owner."""
        for partition, commit in commits.items():
            log_id = log_ids.get(partition)
            owner = db.execute(
                "SELECT owner_instance FROM assignments WHERE group_id=? AND log_id=?", (self._group_id, log_id)
            ).fetchone()
            if owner is None or owner[0] != self._instance:
                raise CommitFenced(
                    f"Partition {partition.partition} of {partition.topic} no longer belongs to member "
                    f"{self.member_id} of group {self.group!r}; nothing was committed. Its new owner goes on from the "
                    "last commit."
                )
            db.execute(
                "INSERT INTO positions VALUES(?,?,?,?) ON CONFLICT(group_id, log_id) DO UPDATE SET "
                "offset=excluded.offset, metadata=excluded.metadata",
                (self._group_id, log_id, commit.offset, commit.metadata),
            )
        db.execute(
            "UPDATE members SET heartbeat_seconds=? WHERE group_id=? AND instance=?",
            (_clock_seconds(), self._group_id, self._instance),
        )

    def leave(self) -> None:
        """Give everything back, so that the others can take it at their next poll."""
        if self._group_id is None:
            return
        with self._file.transaction() as db:
            db.execute("DELETE FROM members WHERE group_id=? AND instance=?", (self._group_id, self._instance))
            db.execute(
                "UPDATE assignments SET owner_instance=NULL WHERE group_id=? AND owner_instance=?",
                (self._group_id, self._instance),
            )
            _rebalance(db, self._group_id)
            _next_generation(db, self._group_id)
        self._group_id = None
