"""From the command to a detector that is ready: imports, model verified by hash and self-test, every batch size warm.

python tests/benchmarks/bench_start.py [--runs 5]
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from detector.demo import free_port, wait_ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    ready, stopped = [], []
    for _ in range(options.runs + 1):
        with tempfile.TemporaryDirectory() as name:
            folder, port = Path(name), free_port()
            environ = {**os.environ, "DETECTOR__CONSOLE__PORT": str(port)}
            command = [sys.executable, "-m", "detector", "run", "--bus-path", str(folder / "bus.sqlite3")]
            start = time.perf_counter()
            with (folder / "detector.log").open("wb") as log:
                daemon = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
            wait_ready(daemon, port, folder)
            ready.append(time.perf_counter() - start)
            daemon.send_signal(signal.SIGTERM)
            start = time.perf_counter()
            if daemon.wait(30) != 0:
                raise SystemExit(f"The daemon ended with exit code {daemon.returncode}.")
            stopped.append(time.perf_counter() - start)
    cold, *warm = ready
    print(
        f"command to ready: median {statistics.median(warm):.1f} s ({min(warm):.1f}-{max(warm):.1f}); first {cold:.1f}"
    )
    print(f"SIGTERM to exit:  median {statistics.median(stopped):.2f} s, worst {max(stopped):.2f} s")


if __name__ == "__main__":
    main()
