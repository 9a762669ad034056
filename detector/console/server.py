"""A small HTTP server beside the daemon; loopback unless told otherwise."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from detector.errors import ConfigError

Check = Callable[[], dict[str, Any]]


class ConsoleServer:
    """Serves until ``close``.

    Args:
        live, ready: return a JSON object with a boolean ``ok`` and what there is to say; not ``ok`` is HTTP 503.

    Raises:
        ConfigError: the address can't be bound.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, *, live: Check, ready: Check) -> None:
        class Handler(BaseHTTPRequestHandler):
            server_version = "gunfire-detector"
            sys_version = ""
            protocol_version = "HTTP/1.1"
            timeout = 10  # a client that says nothing must not hold a thread

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    encoder, content_type = choose_encoder(self.headers.get("Accept", ""))
                    self._reply(200, encoder(registry), content_type)
                elif path in ("/livez", "/readyz"):
                    state = (live if path == "/livez" else ready)()
                    body = json.dumps(state, sort_keys=True).encode() + b"\n"
                    self._reply(200 if state["ok"] else 503, body, "application/json")
                elif path == "/":
                    self._reply(200, b"gunfire detector: /metrics /livez /readyz\n", "text/plain; charset=utf-8")
                else:
                    self._reply(404, b"Not here. There are /metrics /livez /readyz\n", "text/plain; charset=utf-8")

            do_HEAD = do_GET

            def _reply(self, status: int, body: bytes, content_type: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass  # a scrape every few seconds is no news

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except (OSError, OverflowError) as e:
            raise ConfigError(
                f"console.host, console.port: can't listen on {host}:{port} ({e}); choose a free port, or stop what "
                "holds it."
            ) from None
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="console", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port really bound; with ``port=0`` the one the system chose."""
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
