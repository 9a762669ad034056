"""Both buses keep the contract."""

from __future__ import annotations

from contract import BusContract


class TestBusContract(BusContract):
    """Parametrised over the buses by ``bus_settings``."""
