"""Promises of deploy/kafka: a cluster of three goes on without any one of its nodes, remembers what it is made of, and
is stopped, refused and wiped as said."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from detector.bus.base import TopicSettings
from detector.bus.kafka import KafkaBus
from detector.config import KafkaSettings
from detector.errors import BusUnavailable
from tests.kafka_broker import BROKER, broker_module

pytestmark = pytest.mark.kafka
DEADLINE_SECONDS = 60.0
TOPIC = "t"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return broker_module()


@pytest.fixture(scope="module")
def cluster(module: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    cluster = module.Cluster(tmp_path_factory.mktemp("three"), 3, heap_mb=256)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def bus(cluster: Any) -> Iterator[KafkaBus]:
    bus = KafkaBus(KafkaSettings(bootstrap_servers=cluster.addresses, request_timeout_seconds=8.0))
    bus.create_topics({TOPIC: TopicSettings(partitions=3, replication_factor=3)})
    yield bus
    bus.close()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_SECONDS} s: {what}"
        time.sleep(0.1)


def in_sync(bus: KafkaBus) -> int:
    try:
        facts = bus.topic_facts([TOPIC])[TOPIC]
    except BusUnavailable:  # for as long as a new leader is not known
        return 0
    return 0 if facts is None else facts.in_sync


def send(bus: KafkaBus, count: int, size_bytes: int = 100) -> None:
    producer = bus.producer()
    for n in range(count):
        producer.send(TOPIC, None, bytes(size_bytes), partition=n % 3)
    producer.flush(DEADLINE_SECONDS)
    producer.close()


def can_send(bus: KafkaBus, count: int) -> bool:
    try:
        send(bus, count)
    except BusUnavailable:  # it asked the one that hangs
        return False
    return True


def ends(bus: KafkaBus) -> int:
    consumer = bus.consumer([TOPIC], None)
    try:
        return sum(consumer.end_offset(partition) for partition in consumer.assignment())
    finally:
        consumer.close()


def test_three_nodes_lose_nothing_when_one_is_killed_and_take_it_back(cluster: Any, bus: KafkaBus) -> None:
    until(lambda: in_sync(bus) == 3, "three copies")
    before = ends(bus)
    send(bus, 30)
    assert cluster.kill(2)
    assert not cluster.kill(2)
    assert [node.pid() is not None for node in cluster.nodes] == [True, False, True]
    send(bus, 30)
    assert ends(bus) == before + 60
    cluster.start(2)
    until(lambda: in_sync(bus) == 3, "the third copy back in sync")


def test_a_node_whose_disk_is_full_leaves_and_the_others_go_on(cluster: Any, bus: KafkaBus) -> None:
    until(lambda: in_sync(bus) == 3, "three copies")
    before = ends(bus)
    cluster.fill_disk(3)
    send(bus, 30, 10_000)
    until(lambda: not cluster.nodes[2].is_running(), "node 3 ends")
    send(bus, 30)
    assert ends(bus) == before + 60
    cluster.start(3)
    until(lambda: in_sync(bus) == 3, "the third copy back in sync")


def test_a_node_that_hangs_is_left_out_and_comes_back(cluster: Any, bus: KafkaBus) -> None:
    until(lambda: in_sync(bus) == 3, "three copies")
    before = ends(bus)
    assert cluster.pause(1)
    try:
        until(lambda: in_sync(bus) == 2, "the others notice, and lead")
        until(lambda: can_send(bus, 30), "a producer finds those that answer")
    finally:
        assert cluster.resume(1)
    until(lambda: in_sync(bus) == 3, "the third copy back in sync")
    assert ends(bus) >= before + 30


def test_another_process_finds_the_cluster_by_its_folder(cluster: Any, module: ModuleType) -> None:
    again = module.Cluster.open(cluster.data)
    assert again.addresses == cluster.addresses
    assert [node.pid() for node in again.nodes] == [node.pid() for node in cluster.nodes]
    status = run("status", "--data", str(cluster.data))
    assert status.returncode == 0
    assert [line.split(", ")[1] for line in status.stdout.splitlines()] == [f"{a}: running" for a in cluster.addresses]
    with pytest.raises(module.BrokerError, match=r"holds another cluster.*--wipe"):
        module.Cluster(cluster.data, 1)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BROKER), *arguments], capture_output=True, text=True, check=False)


def test_a_folder_without_a_cluster_is_not_running(tmp_path: Path) -> None:
    assert run("status", "--data", str(tmp_path)).returncode == 3
    assert run("stop", "--data", str(tmp_path)).stdout == "not running\n"
    refused = run("kill", "--node", "1", "--data", str(tmp_path))
    assert refused.returncode == 1
    assert "holds no cluster" in refused.stderr


def test_numbers_of_nodes_that_make_no_sense_are_refused(module: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(module.BrokerError, match="1 or 3 nodes, not 2"):
        module.Cluster(tmp_path, 2)
    with pytest.raises(module.BrokerError, match="no node 4; this cluster has 3"):
        module.Cluster(tmp_path, 3).kill(4)


def test_a_folder_keeps_the_heap_its_nodes_were_given(module: ModuleType, tmp_path: Path) -> None:
    def heaps(cluster: Any) -> set[int]:
        return {node.heap_mb for node in cluster.nodes}

    made = module.Cluster(tmp_path, 3, heap_mb=200)
    assert heaps(made) == heaps(module.Cluster.open(tmp_path)) == heaps(module.Cluster(tmp_path, 3)) == {200}
    assert heaps(module.Cluster(tmp_path, 3, heap_mb=256)) == heaps(module.Cluster.open(tmp_path)) == {256}
    assert module.Cluster.open(tmp_path).addresses == made.addresses


def test_wiping_removes_records_keys_and_passwords(module: ModuleType, tmp_path: Path) -> None:
    cluster = module.Cluster(tmp_path / "c", secure=True)
    assert list((tmp_path / "c" / "secrets").iterdir())
    cluster.wipe()
    assert not (tmp_path / "c").exists()
