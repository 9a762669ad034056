"""The bus: topics of byte records. ``base`` says what a bus is; ``embedded`` and ``kafka`` are the two there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detector.bus.base import Bus
    from detector.config import BusSettings


def open_bus(settings: BusSettings) -> Bus:
    """Open the bus that the settings name.

    Raises:
        BusUnavailable: it can't be reached, opened or created.
        BusDamaged: the bus file is broken or none.
    """
    if settings.kind == "kafka":
        from detector.bus.kafka import KafkaBus

        return KafkaBus(settings.kafka)
    from detector.bus.embedded import EmbeddedBus

    return EmbeddedBus(
        settings.embedded.path,
        retention_seconds=settings.embedded.retention_seconds,
        retention_bytes=settings.embedded.retention_bytes,
        session_timeout_seconds=settings.embedded.session_timeout_seconds,
        poll_interval_seconds=settings.embedded.poll_interval_seconds,
    )
