"""A broker of the session's own for the faults; skips where Java or Maven is missing, but fails so in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.table import broker_module, cluster_of


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    missing = broker_module().missing_tools()
    if missing:
        text = f"needs {' and '.join(missing)} (Debian: apt install openjdk-17-jre-headless maven)"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    with cluster_of(tmp_path_factory.mktemp("faults") / "kafka", 1) as cluster:
        yield cluster
