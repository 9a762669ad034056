"""deploy/kafka/broker.py as a module, for the tests that start brokers of their own."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

BROKER = Path(__file__).parents[1] / "deploy" / "kafka" / "broker.py"


def broker_module() -> ModuleType:
    """Skips the test where Java, Maven or openssl is missing, but fails it in CI."""
    name = "deploy_kafka_broker"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BROKER)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    module = sys.modules[name]
    missing = [*module.missing_tools(), *security_module(module).missing_tools()]
    if missing:
        text = f"needs {' and '.join(missing)} (Debian: apt install openjdk-17-jre-headless maven openssl)"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    return module


def security_module(module: ModuleType) -> ModuleType:
    """deploy/kafka/security.py, as ``broker.py`` loads it."""
    return module.security_module()  # type: ignore[no-any-return]
