"""Sound from an address: RTSP, HTTP, anything FFmpeg opens (through PyAV). Comes back by itself.

Messages never hold what may be secret in an address: user, password and query are left out.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from detector.audio import AvReader, to_mono
from detector.errors import AudioError, ConfigError, SourceError
from producers.source import Block, LiveConverter, WallClock, connect

_log = logging.getLogger(__name__)
AHEAD_SECONDS = 10.0  # servers send what they have buffered at once; what is more than this ahead of time is paced


def public_url(url: str) -> str:
    """The address without user, password, query and fragment."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(an address that is none)"
    host = f"[{host}]" if ":" in host else host
    hidden = "?..." if parts.query else ""
    return f"{parts.scheme}://{host}{port}{parts.path}{hidden}" if parts.scheme else f"{parts.path}{hidden}"


def name_urls(urls: Sequence[str], pattern: str | None = None) -> list[str]:
    """A stream id for each address, by ``{host}`` and ``{index}``; None: the host, numbered where it is not unique.

    Raises ConfigError for an address without a scheme, an unknown placeholder, and ids that are not unique.
    """
    hosts = []
    for url in urls:
        try:
            parts = urlsplit(url)
            host = parts.hostname or parts.path.rsplit("/", 1)[-1]
        except ValueError:
            parts, host = urlsplit(""), ""
        if not parts.scheme or not host:
            raise ConfigError(f"{public_url(url)} is no address; one looks like rtsp://HOST/PATH or http://HOST/PATH.")
        hosts.append(host)
    if pattern is None:
        pattern = "{host}" if len(set(hosts)) == len(hosts) else "{host}-{index}"
    try:
        names = [pattern.format(host=host, index=index) for index, host in enumerate(hosts)]
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ConfigError(f"Stream id pattern {pattern!r} is not understood; there are {{host}} {{index}}.") from None
    if len(set(names)) != len(names):
        raise ConfigError(f"Stream id pattern {pattern!r} gives two addresses the same id; use {{index}}.")
    return names


class NetworkSource:
    """One address. Reconnects when it ends, fails or falls silent; each connection starts a session.

    Args:
        timeout_seconds: to connect, and of silence.
        retries: attempts in a row without any sound before giving up; None: without end; 0: never reconnect, and end
            with the sound.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 10.0,
        retries: int | None = None,
        first_retry_seconds: float = 0.5,
        ahead_seconds: float = AHEAD_SECONDS,
        now_ns: WallClock = time.time_ns,
    ) -> None:
        self._url = url
        self._timeout_seconds = timeout_seconds
        self._retries = retries
        self._first_retry_seconds = first_retry_seconds
        self._ahead_seconds = ahead_seconds
        self._now_ns = now_ns

    @property
    def name(self) -> str:
        return public_url(self._url)

    def blocks(self, stop: threading.Event) -> Iterator[Block]:
        """Yield what comes. Raises SourceError once all retries are used up, or PyAV is not installed."""
        while not stop.is_set():
            reader = connect(
                self._open, stop, self.name, retries=self._retries, first_retry_seconds=self._first_retry_seconds
            )
            if reader is None:
                return
            with contextlib.closing(reader):
                yield from self._listen(reader, stop)
            if self._retries == 0:
                return
            # A server that drops each connection at once must not be hammered.
            stop.wait(self._first_retry_seconds)

    def _open(self) -> AvReader:
        try:
            import av
            import av.error
        except ImportError:
            raise SourceError("PyAV is not installed: pip install 'gunfire-detector[producers]'.") from None
        options = {"rtsp_transport": "tcp"} if self._url.lower().startswith("rtsp") else {}
        try:
            container = av.open(self._url, options=options, timeout=(self._timeout_seconds, self._timeout_seconds))
        except (av.error.FFmpegError, ValueError, OSError) as e:
            # Not str(e): it names the address as it was given.
            why = getattr(e, "strerror", None) or type(e).__name__
            raise SourceError(f"{self.name}: can't be opened: {why}.") from None
        try:
            return AvReader(self.name, container, live=True)
        except AudioError as e:
            container.close()
            raise SourceError(str(e)) from None

    def _listen(self, reader: AvReader, stop: threading.Event) -> Iterator[Block]:
        converter = LiveConverter(reader.rate_hz, self._now_ns)
        began = time.monotonic()
        heard_seconds = 0.0
        why = "the sound has ended"
        try:
            for x in reader.blocks():
                yield from converter.convert(to_mono(x))
                heard_seconds += len(x) / reader.rate_hz
                ahead = heard_seconds - (time.monotonic() - began) - self._ahead_seconds
                if stop.is_set() or (ahead > 0 and stop.wait(ahead)):
                    return
        except AudioError as e:
            why = str(e)
        finally:
            counted = (("NaN or infinite", reader.replaced_samples), ("clipped", reader.clipped_samples))
            for what, count in counted:
                if count:
                    _log.warning("%s: %d samples were %s.", self.name, count, what)
        yield from converter.interrupt()
        if self._retries != 0:
            _log.warning("%s: connection lost after %.1f s: %s. Reconnecting.", self.name, heard_seconds, why)

    def close(self) -> None:
        """Nothing is open outside ``blocks``."""
