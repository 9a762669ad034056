"""The HTTP side of the daemon: ``/metrics``, ``/livez``, ``/readyz``."""
