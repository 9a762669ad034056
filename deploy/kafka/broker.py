#!/usr/bin/env python3
"""A real Apache Kafka broker on this machine, for tests and trials: one KRaft node, loopback only, no container.

    python deploy/kafka/broker.py start [--port 9092] [--data DIR]    fetch what is missing, format, start, wait
    python deploy/kafka/broker.py status [--data DIR]
    python deploy/kafka/broker.py stop [--data DIR]

Needs Java 17 or newer, and for the first start Maven and a way to Maven Central (about 45 MB). The jars are kept in
``KAFKA_CACHE_DIR`` (default: ``gunfire-detector/kafka`` in the user's cache folder). Not for production: no
encryption, no replication, small memory.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_POM = Path(__file__).with_name("pom.xml")
_MAVEN_GOAL = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
_CLUSTER_ID = "R3VuZmlyZURldGVjdG9yMQ"  # 16 bytes in base64url, the form StorageTool wants; any will do
_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
_HEAP = "512m"


class BrokerError(Exception):
    """What failed and what to do about it."""


def cache_dir() -> Path:
    """Where the jars are: ``KAFKA_CACHE_DIR``, else in the user's cache folder."""
    if "KAFKA_CACHE_DIR" in os.environ:
        return Path(os.environ["KAFKA_CACHE_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gunfire-detector" / "kafka"


def missing_tools() -> list[str]:
    """Names of programs that a start would need and this machine lacks."""
    needed = ["java"] if _jars_dir().is_dir() else ["java", "mvn"]
    return [name for name in needed if shutil.which(name) is None]


def _jars_dir() -> Path:
    # Named by the pom's content: another version gets another folder.
    return cache_dir() / f"jars-{hashlib.sha256(_POM.read_bytes()).hexdigest()[:12]}"


def fetch() -> Path:
    """The folder of the broker's jars; filled by Maven if it is not there."""
    jars = _jars_dir()
    if jars.is_dir():
        return jars
    jars.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=jars.parent) as part:
        target = Path(part) / "jars"
        command = [
            "mvn",
            "-q",
            "-B",
            "-f",
            str(_POM),
            _MAVEN_GOAL,
            "-DincludeScope=runtime",
            f"-DoutputDirectory={target}",
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode or not list(target.glob("kafka_*.jar")):
            raise BrokerError(f"Maven could not fetch Kafka:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
        with contextlib.suppress(FileExistsError, OSError):  # another process was first
            target.rename(jars)
    return jars


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Broker:
    """One broker process and its data folder.

    Args:
        data: folder for records, log and process id; made where missing, kept after ``stop``.
        port: for clients, on 127.0.0.1.
        settings: more lines for ``server.properties``; they win over the ones given here.
    """

    def __init__(self, data: Path, port: int, settings: dict[str, str] | None = None) -> None:
        self.data = data
        self.port = port
        self._settings = settings or {}
        self._pid_file = data / "broker.pid"
        self.log_file = data / "broker.log"
        self._process: subprocess.Popen[bytes] | None = None  # where this object started it

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def pid(self) -> int | None:
        """The process id, if the broker of this folder runs."""
        try:
            pid, started = self._pid_file.read_text().split()
        except (OSError, ValueError):
            return None
        return int(pid) if _started_at(int(pid)) == started else None

    def start(self) -> None:
        """Start and wait until it answers. Raises BrokerError with the end of its log."""
        if self.pid() is not None:
            raise BrokerError(f"A broker with data in {self.data} runs already; stop it first.")
        if _is_listening(self.port):
            raise BrokerError(f"Port {self.port} is taken; give another with --port.")
        class_path = f"{fetch()}/*"
        self.data.mkdir(parents=True, exist_ok=True)
        properties = self.data / "server.properties"
        properties.write_text("".join(f"{key}={value}\n" for key, value in self._properties().items()))
        logging = self.data / "log4j2.properties"
        logging.write_text(
            "rootLogger.level=warn\nrootLogger.appenderRef.out.ref=out\nappender.out.type=Console\nappender.out.name=out\n"
            "appender.out.layout.type=PatternLayout\nappender.out.layout.pattern=%d %p %c{1} %m%n\n"
        )
        java = ["java", f"-Dlog4j2.configurationFile={logging}", "-cp", class_path]
        if not (self.data / "records" / "meta.properties").exists():
            small = ["-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
            result = subprocess.run(
                [
                    java[0],
                    *small,
                    *java[1:],
                    "kafka.tools.StorageTool",
                    "format",
                    "-t",
                    _CLUSTER_ID,
                    "-c",
                    str(properties),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            if result.returncode:
                raise BrokerError(f"The data folder could not be formatted:\n{result.stdout}{result.stderr}")
        heap = [f"-Xms{_HEAP}", f"-Xmx{_HEAP}", "-XX:+UseSerialGC"]
        with self.log_file.open("ab") as log:
            self._process = process = subprocess.Popen(
                [java[0], *heap, *java[1:], "kafka.Kafka", str(properties)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._pid_file.write_text(f"{process.pid} {_started_at(process.pid)}")
        deadline = time.monotonic() + _START_SECONDS
        while not _is_listening(self.port):
            if process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = self.log_file.read_text(errors="replace")[-3000:]
                raise BrokerError(f"The broker did not start. The end of {self.log_file}:\n{tail}")
            time.sleep(0.1)

    def stop(self) -> bool:
        """Ask it to end, then make it. False if it did not run."""
        pid = self.pid()
        if pid is None:
            return False
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + _STOP_SECONDS
            while self.pid() is not None and time.monotonic() < deadline:
                if self._process is not None:
                    self._process.poll()
                time.sleep(0.05)
            if self.pid() is None:
                break
        if self._process is not None:
            self._process.wait()
            self._process = None
        self._pid_file.unlink(missing_ok=True)
        return True

    def _properties(self) -> dict[str, str]:
        controller = free_port()
        return {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": f"PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self.port}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(self.data / "records"),
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "1",
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            "num.network.threads": "2",
            "num.io.threads": "2",
            "log.cleaner.dedupe.buffer.size": str(4 * 1024 * 1024),
            **self._settings,
        }


def _started_at(pid: int) -> str | None:
    """When the process started, in clock ticks since boot: tells it from a later one of the same id. None: no such."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def main() -> int:
    parser = argparse.ArgumentParser(description="A Kafka broker on this machine, for tests and trials.")
    parser.add_argument("action", choices=("fetch", "start", "status", "stop"))
    parser.add_argument("--port", type=int, default=9092, help="for clients, on 127.0.0.1 (default 9092)")
    parser.add_argument("--data", type=Path, default=cache_dir() / "data", help="folder for records and log")
    arguments = parser.parse_args()
    broker = Broker(arguments.data, arguments.port)
    if arguments.action == "status":
        pid = broker.pid()
        print(f"running, process {pid}" if pid else "not running")
        return 0 if pid else 3
    if arguments.action == "stop":
        print("stopped" if broker.stop() else "did not run")
        return 0
    missing = missing_tools()
    if missing:
        print(
            f"Not installed: {', '.join(missing)}. Debian: apt install openjdk-17-jre-headless maven", file=sys.stderr
        )
        return 1
    try:
        if arguments.action == "fetch":
            print(fetch())
        else:
            broker.start()
            print(f"listens on {broker.address}, log in {broker.log_file}")
    except BrokerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
