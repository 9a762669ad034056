"""The bus: topics of byte records. ``base`` says what a bus is; ``embedded`` and ``kafka`` are the two there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detector.errors import BusMissing

if TYPE_CHECKING:
    from detector.bus.base import Bus
    from detector.config import BusSettings


def open_bus(settings: BusSettings, *, create: bool = True) -> Bus:
    """Open the bus that the settings name.

    Args:
        create: whether a bus file that is not there is made; what only reads has no use for an empty one.

    Raises:
        BusMissing: there is no bus file, and none is to be made.
        BusUnavailable: it can't be reached, opened or created.
        BusDamaged: the bus file is broken or none.
    """
    if settings.kind == "kafka":
        from detector.bus.kafka import KafkaBus

        return KafkaBus(settings.kafka)
    from detector.bus.embedded import EmbeddedBus

    if not create and not settings.embedded.path.exists():
        raise BusMissing(
            f"There is no bus file {settings.embedded.path}. Name the detector's with --bus-path or bus.embedded.path, "
            "or start the detector, which makes it."
        )
    return EmbeddedBus(
        settings.embedded.path,
        retention_seconds=settings.embedded.retention_seconds,
        retention_bytes=settings.embedded.retention_bytes,
        session_timeout_seconds=settings.embedded.session_timeout_seconds,
        poll_interval_seconds=settings.embedded.poll_interval_seconds,
    )
