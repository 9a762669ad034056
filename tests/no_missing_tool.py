"""pytest plugin for CI (``-p tests.no_missing_tool``): a test skipped for want of a tool fails.

Only the data that a checkout can't bring (the folders GOLDEN_DIR and DATA_DIR name) may be absent.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

_MAY_BE_ABSENT = ("GOLDEN_DIR", "DATA_DIR")


def _fail_if_skipped(report: Any) -> None:
    if report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if any(name in reason for name in _MAY_BE_ABSENT):
        return
    report.outcome = "failed"
    report.longrepr = f"In CI nothing is skipped, but {report.nodeid} was: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    report = yield
    _fail_if_skipped(report)
    return report
