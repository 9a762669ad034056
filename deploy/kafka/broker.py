#!/usr/bin/env python3
"""Real Apache Kafka on this machine, for tests and trials: one or three KRaft nodes, loopback only, no container.

    python deploy/kafka/broker.py start [--nodes 3] [--secure]    fetch what is missing, format, start, wait
    python deploy/kafka/broker.py status
    python deploy/kafka/broker.py stop [--wipe]
    python deploy/kafka/broker.py stop|start|kill|pause|resume --node 2
    python deploy/kafka/broker.py token --user detector           an unsigned token for a cluster started with --oauth

Needs Java 17 or newer, and for the first start Maven and a way to Maven Central (about 45 MB). The jars are kept in
``KAFKA_CACHE_DIR`` (default: ``gunfire-detector/kafka`` in the user's cache folder). Not for production: small memory,
and every node, key and password on one machine.

``Broker`` is one process; ``Cluster`` several with one memory, which survives this program. ``security.py`` makes what
``secure`` takes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

_POM = Path(__file__).with_name("pom.xml")
_MAVEN_GOAL = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
_CLUSTER_ID = "R3VuZmlyZURldGVjdG9yMQ"  # 16 bytes in base64url, the form StorageTool wants; any will do
_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
_HEAP_MB = 512
_HEAP_OF_MANY_MB = 320


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
        heap_mb: memory for the Java heap.
    """

    def __init__(
        self, data: Path, port: int, settings: Mapping[str, str] | None = None, *, heap_mb: int = _HEAP_MB
    ) -> None:
        self.data = data
        self.port = port
        self._settings = dict(settings or {})
        self.heap_mb = heap_mb
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

    def is_running(self) -> bool:
        return self._reaped_pid() is not None

    def start(self) -> None:
        """Start and wait until it answers. Raises BrokerError with the end of its log."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start without waiting (one of three answers only when a second one runs)."""
        if self._reaped_pid() is not None:
            raise BrokerError(f"A broker with data in {self.data} runs already; stop it first.")
        if _is_listening(self.port):
            raise BrokerError(f"Port {self.port} is taken; give another with --port.")
        class_path = f"{fetch()}/*"
        self.data.mkdir(parents=True, exist_ok=True)
        properties = self.data / "server.properties"
        properties.unlink(missing_ok=True)
        with os.fdopen(os.open(properties, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:  # it may hold passwords
            file.writelines(f"{key}={value}\n" for key, value in self._properties().items())
        logging = self.data / "log4j2.properties"
        logging.write_text(
            "rootLogger.level=warn\nrootLogger.appenderRef.out.ref=out\nappender.out.type=Console\nappender.out.name=out\n"
            "appender.out.layout.type=PatternLayout\nappender.out.layout.pattern=%d %p %c{1} %m%n\n"
        )
        java = ["java", f"-Dlog4j2.configurationFile={logging}", "-cp", class_path]
        if not (self.data / "records" / "meta.properties").exists():
            small = ["-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
            tool = ["kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(properties)]
            result = subprocess.run([java[0], *small, *java[1:], *tool], capture_output=True, text=True, check=False)
            if result.returncode:
                raise BrokerError(f"The data folder could not be formatted:\n{result.stdout}{result.stderr}")
        heap = [f"-Xms{self.heap_mb}m", f"-Xmx{self.heap_mb}m", "-XX:+UseSerialGC"]
        with self.log_file.open("ab") as log:
            self._process = process = subprocess.Popen(
                [java[0], *heap, *java[1:], "kafka.Kafka", str(properties)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._pid_file.write_text(f"{process.pid} {_started_at(process.pid)}")

    def wait(self) -> None:
        """Until it answers. Raises BrokerError with the end of its log, and stops it, where it does not."""
        deadline = time.monotonic() + _START_SECONDS
        while not _is_listening(self.port):
            if self._reaped_pid() is None or time.monotonic() > deadline:
                self.stop()
                tail = self.log_file.read_text(errors="replace")[-3000:]
                raise BrokerError(f"The broker did not start. The end of {self.log_file}:\n{tail}")
            time.sleep(0.1)

    def stop(self) -> bool:
        """Ask it to end, then make it. False if it did not run."""
        if not self.ask_to_stop():
            return False
        self.finish()
        return True

    def ask_to_stop(self) -> bool:
        """SIGTERM, and no wait. False if it did not run."""
        return self._signal(signal.SIGTERM) and self._signal(signal.SIGCONT)  # a paused one would never hear

    def finish(self) -> None:
        """After ``ask_to_stop``: wait until it has ended, and after 20 s kill it."""
        if not self._is_gone_within(_STOP_SECONDS):
            self.kill()
        self._forget()

    def kill(self) -> bool:
        """SIGKILL: what a crash or a power cut is to the others. False if it did not run."""
        if not self._signal(signal.SIGKILL):
            return False
        self._is_gone_within(_STOP_SECONDS)
        self._forget()
        return True

    def pause(self) -> bool:
        """SIGSTOP: it keeps its connections and answers nothing, as a machine that hangs."""
        return self._signal(signal.SIGSTOP)

    def resume(self) -> bool:
        return self._signal(signal.SIGCONT)

    def fill_disk(self) -> None:
        """From now on no file of this broker can grow, as on a full disk; ends with ``free_disk`` or its process.

        Writes fail with "File too large" in place of "No space left on device"; Kafka treats both alike. Linux.
        """
        self._limit_files(0)

    def free_disk(self) -> None:
        self._limit_files(None)

    def _limit_files(self, size_bytes: int | None) -> None:
        import resource

        pid = self.pid()
        if pid is None:
            raise BrokerError(f"The broker with data in {self.data} does not run.")
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if size_bytes is None else size_bytes, hard))

    def _signal(self, number: signal.Signals) -> bool:
        pid = self._reaped_pid()
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return True

    def _reaped_pid(self) -> int | None:
        if self._process is not None:
            self._process.poll()
        return self.pid()

    def _is_gone_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._reaped_pid() is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _forget(self) -> None:
        if self._process is not None:
            self._process.wait()
            self._process = None
        self._pid_file.unlink(missing_ok=True)

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


class Listener(NamedTuple):
    """One address of every node. ``settings`` are its own, without the prefix ``listener.name...``."""

    name: str
    protocol: str
    settings: Mapping[str, str]


class Cluster:
    """One or three brokers that are controllers as well. Numbers of nodes count from 1.

    What it is made of is written into ``data / cluster.json``: ports stay the same from start to start, and another
    process finds it with ``Cluster.open``.

    Args:
        data: folder for everything, a subfolder for each node; made where missing, kept after ``stop``.
        nodes: 1 or 3. With three, topics have three copies by default, and a write needs two (``min.insync.replicas``).
        port: for clients of node 1; node i listens 10 * (i - 1) further. None: free ones.
        secure: TLS, user names and passwords, client certificates, ACLs; see ``security.py``.
        oauth: with ``secure``, another listener that takes tokens nobody signed.
        settings: more lines for every node's ``server.properties``; they win.
        listeners: more addresses for tests; see ``addresses_of``.
        heap_mb: Java heap of each node. None: as it was last time.
        capacity_bytes: what each node's folder can hold: a file system of its own in memory (root alone can; it is
            gone with the machine's next start). See ``Broker.fill_disk`` for what needs no root.
    """

    def __init__(
        self,
        data: Path,
        nodes: int = 1,
        *,
        port: int | None = None,
        secure: bool = False,
        oauth: bool = False,
        settings: Mapping[str, str] | None = None,
        listeners: Sequence[Listener] = (),
        heap_mb: int | None = None,
        capacity_bytes: int | None = None,
    ) -> None:
        if nodes not in (1, 3):
            raise BrokerError(f"A cluster has 1 or 3 nodes, not {nodes}.")
        self.data = data.resolve()
        self.secure, self.oauth = secure, oauth
        self._capacity_bytes = capacity_bytes
        memory = self.data / "cluster.json"
        wanted = {"nodes": nodes, "secure": secure, "oauth": oauth, "port": port}
        found = json.loads(memory.read_text()) if memory.exists() else None
        if found is not None and {**found["made"], "port": port} != wanted:
            raise BrokerError(
                f"{self.data} holds another cluster, {found['made']}. Stop it and remove it with `make kafka-down "
                "ARGS=--wipe`, or name another folder with --data."
            )
        self.data.mkdir(parents=True, exist_ok=True)
        self._listeners = [*self._own_listeners(), *listeners]
        names = [one.name for one in self._listeners]
        known = found or {}
        ports = known["ports"] if known and (port is None or known["made"]["port"] == port) else None
        if ports is None or set(ports[0]) != set(names):
            ports = _new_ports(names, nodes, port)
            known = {**known, "made": wanted, "ports": ports}
        self._ports: list[dict[str, int]] = ports
        heap = heap_mb or known.get("heap_mb") or (_HEAP_MB if nodes == 1 else _HEAP_OF_MANY_MB)
        known = {**known, "heap_mb": heap}
        if known != found:
            memory.write_text(json.dumps(known))
        self.nodes = [
            Broker(
                self.data / f"node-{i}",
                self._ports[i - 1][names[0]],
                {**self._node_settings(i), **(settings or {})},
                heap_mb=heap,
            )
            for i in range(1, nodes + 1)
        ]

    @classmethod
    def open(cls, data: Path) -> Cluster:
        """The cluster of a folder. Raises BrokerError where there is none."""
        memory = data / "cluster.json"
        if not memory.exists():
            raise BrokerError(f"{data} holds no cluster; start one with `make kafka-up`.")
        made = json.loads(memory.read_text())["made"]
        return cls(data, made["nodes"], port=made["port"], secure=made["secure"], oauth=made["oauth"])

    @property
    def addresses(self) -> tuple[str, ...]:
        """HOST:PORT of every node, for clients."""
        return tuple(node.address for node in self.nodes)

    def addresses_of(self, listener: str) -> tuple[str, ...]:
        """HOST:PORT of every node's listener of that name."""
        return tuple(f"127.0.0.1:{ports[listener]}" for ports in self._ports)

    def node(self, number: int) -> Broker:
        if not 1 <= number <= len(self.nodes):
            raise BrokerError(f"There is no node {number}; this cluster has {len(self.nodes)}, counted from 1.")
        return self.nodes[number - 1]

    def start(self, number: int | None = None) -> None:
        """Start all that do not run, or one, and wait until they answer. Raises BrokerError."""
        wanted = self.nodes if number is None else [self.node(number)]
        sleeping = [node for node in wanted if not node.is_running()]
        fetch()
        if self.secure:
            self._call_security("make_certificates", self.data)
        for node in sleeping:
            self._limit(node)
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(Broker.launch, sleeping))
        for node in sleeping:
            node.wait()
        if self.secure and all(node.is_running() for node in self.nodes):
            self._call_security("set_up_users", self.data, self.addresses_of("CERTIFIED")[0])

    def stop(self, number: int | None = None) -> bool:
        """Ask all, or one, to end, then make them. False if none ran."""
        wanted = self.nodes if number is None else [self.node(number)]
        asked = [node for node in wanted if node.ask_to_stop()]
        for node in asked:
            node.finish()
        return bool(asked)

    def kill(self, number: int) -> bool:
        """SIGKILL one. False if it did not run."""
        return self.node(number).kill()

    def pause(self, number: int) -> bool:
        """SIGSTOP one: it hangs, with its connections open."""
        return self.node(number).pause()

    def resume(self, number: int) -> bool:
        return self.node(number).resume()

    def fill_disk(self, number: int) -> None:
        """No file of this node can grow until ``free_disk``."""
        self.node(number).fill_disk()

    def free_disk(self, number: int) -> None:
        self.node(number).free_disk()

    def wipe(self) -> None:
        """Stop, and remove the folder with records, certificates and passwords."""
        self.stop()
        for node in self.nodes:
            if os.path.ismount(node.data):
                subprocess.run(["umount", str(node.data)], check=True)
        shutil.rmtree(self.data)

    def _limit(self, node: Broker) -> None:
        if self._capacity_bytes is None or os.path.ismount(node.data):
            return
        node.data.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={self._capacity_bytes}", "none", str(node.data)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BrokerError(f"A folder of limited size takes root: {result.stderr.strip()}. Or use fill_disk().")

    def _own_listeners(self) -> Sequence[Listener]:
        if self.secure:
            security = security_module()
            security.make_passwords(self.data)
            return [Listener(*each) for each in security.listeners(self.data, oauth=self.oauth)]
        if self.oauth:
            raise BrokerError("--oauth goes with --secure.")
        return [Listener("PLAINTEXT", "PLAINTEXT", {}), Listener("CONTROLLER", "PLAINTEXT", {})]

    def _node_settings(self, number: int) -> dict[str, str]:
        ports, copies = self._ports[number - 1], len(self._ports)
        listeners = {one.name: one for one in self._listeners}
        addresses = [f"{name}://127.0.0.1:{ports[name]}" for name in listeners]
        voters = [f"{i}@127.0.0.1:{each['CONTROLLER']}" for i, each in enumerate(self._ports, start=1)]
        settings = {
            "node.id": str(number),
            "controller.quorum.voters": ",".join(voters),
            "listeners": ",".join(addresses),
            "advertised.listeners": ",".join(each for each in addresses if not each.startswith("CONTROLLER:")),
            "listener.security.protocol.map": ",".join(f"{n}:{one.protocol}" for n, one in listeners.items()),
            "inter.broker.listener.name": "PLAINTEXT",
            "default.replication.factor": str(copies),
            "min.insync.replicas": str(max(1, copies - 1)),
            "offsets.topic.replication.factor": str(copies),
            "transaction.state.log.replication.factor": str(copies),
            "transaction.state.log.min.isr": str(max(1, copies - 1)),
        }
        for name, one in listeners.items():
            settings |= {f"listener.name.{name.lower()}.{key}": value for key, value in one.settings.items()}
        return settings | (security_module().properties(self.data) if self.secure else {})

    @staticmethod
    def _call_security(function: str, *arguments: object) -> None:
        security = security_module()
        try:
            getattr(security, function)(*arguments)
        except security.SecurityError as error:
            raise BrokerError(str(error)) from error


def _new_ports(names: Sequence[str], nodes: int, first: int | None) -> list[dict[str, int]]:
    if first is not None:
        return [{name: first + 10 * i + j for j, name in enumerate(names)} for i in range(nodes)]
    with contextlib.ExitStack() as stack:  # held until all are found, so that no two are one
        probes = [stack.enter_context(socket.socket()) for _ in range(nodes * len(names))]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        numbers = iter([int(probe.getsockname()[1]) for probe in probes])
        return [{name: next(numbers) for name in names} for _ in range(nodes)]


def security_module() -> ModuleType:
    """``security.py`` from the same folder, wherever this file was loaded from."""
    name = "deploy_kafka_security"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("security.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _started_at(pid: int) -> str | None:
    """When the process started, in clock ticks since boot: tells it from a later one of the same id. None: no such."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _after_start(cluster: Cluster) -> str:
    """What to do next: settings and commands."""
    lines = [f"{len(cluster.nodes)} node(s) run: {', '.join(cluster.addresses)}. Data and logs: {cluster.data}", ""]
    copies = f"topics:\n  replication_factor: {len(cluster.nodes)}\n"
    if cluster.secure:
        security = security_module()
        for user in security.USERS:
            path = cluster.data / f"{user}.yaml"
            path.write_text(security.client_settings(cluster.data, user, cluster.addresses) + copies)
        lines += [
            "Each user has a certificate, a password file and a configuration of its own. For config.yaml:",
            "",
            (cluster.data / "detector.yaml").read_text(),
        ]
        shown = {user: os.path.relpath(cluster.data / f"{user}.yaml") for user in security.USERS}
    else:
        text = f"bus:\n  kind: kafka\n  kafka:\n    bootstrap_servers: [{', '.join(cluster.addresses)}]\n{copies}"
        path = cluster.data / "config.yaml"
        path.write_text(text)
        lines += ["For config.yaml:", "", text]
        shown = dict.fromkeys(("operator", "producer", "detector", "subscriber"), os.path.relpath(path))
    lines += [
        "Next:",
        f"  .venv/bin/detector topics create --config {shown['operator']}",
        f"  .venv/bin/detector run --config {shown['detector']}",
        f"  .venv/bin/producers scene --config {shown['producer']}",
        f"  .venv/bin/detector watch --config {shown['subscriber']}",
        "Stop with: make kafka-down (ARGS=--wipe removes the data too)",
    ]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kafka brokers on this machine, for tests and trials.")
    parser.add_argument("action", choices=("fetch", "start", "status", "stop", "kill", "pause", "resume", "token"))
    parser.add_argument("--port", type=int, default=9092, help="for clients, on 127.0.0.1 (default 9092)")
    parser.add_argument("--data", type=Path, default=cache_dir() / "data", help="folder for records, log and keys")
    parser.add_argument("--nodes", type=int, choices=(1, 3), default=1)
    parser.add_argument("--secure", action="store_true", help="TLS, users with passwords, ACLs")
    parser.add_argument("--oauth", action="store_true", help="with --secure: a listener that takes unsigned tokens")
    parser.add_argument("--heap-mb", type=int, help="Java heap of a node (first 512, of three 320; then as it was)")
    parser.add_argument("--node", type=int, help="only this one, counted from 1")
    parser.add_argument("--wipe", action="store_true", help="stop: also remove the data folder")
    parser.add_argument("--user", default="detector", help="token: who it names")
    parser.add_argument("--seconds", type=float, default=3600.0, help="token: how long it is valid")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    try:
        return _act(arguments)
    except BrokerError as error:
        print(error, file=sys.stderr)
        return 1


def _act(arguments: argparse.Namespace) -> int:
    action, number = arguments.action, arguments.node
    if action == "token":
        print(security_module().unsecured_token(arguments.user, arguments.seconds))
        return 0
    if action in ("fetch", "start"):
        missing = missing_tools() + (security_module().missing_tools() if arguments.secure else [])
        if missing:
            print(
                f"Not installed: {', '.join(missing)}. Debian: apt install openjdk-17-jre-headless maven openssl",
                file=sys.stderr,
            )
            return 1
    if action == "fetch":
        print(fetch())
        return 0
    if action == "start" and number is None:
        cluster = Cluster(
            arguments.data,
            arguments.nodes,
            port=arguments.port,
            secure=arguments.secure,
            oauth=arguments.oauth,
            heap_mb=arguments.heap_mb,
        )
        cluster.start()
        print(_after_start(cluster))
        return 0
    try:
        cluster = Cluster.open(arguments.data)
    except BrokerError:
        if action not in ("stop", "status"):
            raise
        print("not running")
        return 0 if action == "stop" else 3
    if action == "status":
        running = [node for node in cluster.nodes if node.pid() is not None]
        for i, node in enumerate(cluster.nodes, start=1):
            pid = node.pid()
            print(f"node {i}, {node.address}: {f'running, process {pid}' if pid else 'not running'}")
        return 0 if len(running) == len(cluster.nodes) else 3
    if action == "stop":
        print("stopped" if cluster.stop(number) else "did not run")
        if arguments.wipe and number is None:
            cluster.wipe()
            print(f"removed {cluster.data}")
        return 0
    if number is None:
        raise BrokerError(f"{action} needs --node, counted from 1.")
    if action == "start":
        cluster.start(number)
    elif not getattr(cluster, action)(number):
        raise BrokerError(f"Node {number} does not run.")
    print(f"node {number}: {action} done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
