"""The page on 127.0.0.1, following the runs."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Sequence
from typing import Any

from mezzo.errors import RunError, require
from mezzo.report.data import Reader
from mezzo.report.page import EXTRA, plotly_js, render

HOST = "127.0.0.1"


class Source:
    """The runs' data as JSON, read again only when a file has changed."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = readers
        self._lock = threading.Lock()
        self._version, self._data = "", b""

    def version(self) -> str:
        text = repr([reader.version() for reader in self.readers])
        return '"' + hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16] + '"'

    def runs(self) -> list[dict[str, Any]]:
        return [reader.read() for reader in self.readers]

    def json(self) -> tuple[str, bytes]:
        """Version and data; the version is that of before the reading, so that nothing is missed."""
        with self._lock:
            version = self.version()
            if version != self._version:
                self._data = json.dumps({"runs": self.runs()}, allow_nan=False, separators=(",", ":")).encode()
                self._version = version
            return self._version, self._data


def application(readers: Sequence[Reader], lang: str) -> Any:
    """The server's three pages: /, /data.json and /plotly.min.js.

    Only requests that name this machine are answered, so that a page elsewhere, whose name is made to point here,
    cannot read the runs (DNS rebinding).
    """
    option = "mezzo report --live"
    require("starlette", extra=EXTRA, option=option)
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    source = Source(readers)
    script = plotly_js()
    safe = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin", "X-Frame-Options": "DENY"}  # fmt: skip

    def page(request: Request) -> Response:
        version, data = source.json()
        return Response(render(json.loads(data)["runs"], lang, version), media_type="text/html", headers=safe)

    def data(request: Request) -> Response:
        if request.headers.get("if-none-match") == source.version():
            return Response(status_code=304, headers=safe)
        version, data = source.json()
        return Response(data, media_type="application/json", headers={**safe, "ETag": version})

    def plotly(request: Request) -> Response:
        return Response(
            script, media_type="text/javascript", headers={**safe, "Cache-Control": "max-age=31536000, immutable"}
        )

    return Starlette(
        routes=[Route("/", page), Route("/data.json", data), Route("/plotly.min.js", plotly)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)],
    )


def listen(port: int) -> socket.socket:
    """A socket on this machine only; port 0 is a free one.

    raises    RunError if the port is taken
    """
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise RunError(
            f"cannot listen on {HOST}:{port}: {error}; leave --port out for a free port, or choose another"
        ) from error


def server(readers: Sequence[Reader], lang: str = "auto") -> Any:
    """A `uvicorn.Server`: `run(sockets=[…])` serves until Ctrl-C or until its `should_exit` is set.

    raises    MissingExtraError if starlette or uvicorn is not installed
    """
    uvicorn = require("uvicorn", extra=EXTRA, option="mezzo report --live")
    config = uvicorn.Config(
        application(readers, lang), log_level="warning", access_log=False, lifespan="off", server_header=False,
        timeout_graceful_shutdown=1, ws="none",
    )  # fmt: skip
    return uvicorn.Server(config)
