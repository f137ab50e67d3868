"""Call the WSGI application for one request: its environment and its response."""

import io
import sys
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote_to_bytes

from django.http import StreamingHttpResponse

from config.wsgi import application as wsgi
from lib import lateanswer

CHUNK_BYTES = 256 * 1024


class WSGIResponse:
    """The WSGI application's response to one request. `start`, `next` and `close` run in a thread."""

    status = 500
    headers: list[tuple[bytes, bytes]]
    stream: StreamingHttpResponse | None = None
    waiting: lateanswer.Waiting | None = None
    more = True

    def start(self, environ: dict[str, Any]) -> bytes:
        """Call the application; return the first piece of the body."""
        response = wsgi(environ, self._start_response)
        if isinstance(response, StreamingHttpResponse) and response.is_async:
            self.stream, self.more = response, False
            # Frees what the request has used.
            response.close()
            return b""
        self.waiting = lateanswer.of(response)
        self._response: Any = response
        self._parts: Iterator[bytes] = iter(response)
        return self.next()

    def next(self) -> bytes:
        size, pieces = 0, []
        try:
            for part in self._parts:
                pieces.append(part)
                size += len(part)
                if size >= CHUNK_BYTES:
                    return b"".join(pieces)
        except BaseException:
            self._response.close()
            raise
        self.more = False
        self._response.close()
        return b"".join(pieces)

    def replace(self, answer: lateanswer.LateAnswer) -> None:
        """Replace what `start` has returned, of a response without a further piece."""
        changed = {name.lower(): value for name, value in answer.headers.items()}
        changed["content-length"] = str(len(answer.body))
        self.status = answer.status
        self.headers = [
            *((name, value) for name, value in self.headers if name.decode() not in changed),
            *((name.encode(), value.encode("latin-1")) for name, value in changed.items()),
        ]

    def close(self) -> None:
        """End the response early, in place of `next`."""
        if self.more:
            self.more = False
            self._response.close()

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        self.status = int(status[:3])
        self.headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers
        ]
        return _no_write


def _no_write(data: bytes) -> object:
    raise NotImplementedError("Django returns an iterable.")


def wsgi_environ(scope: dict[str, Any], body: bytes, *, length: int = 0) -> dict[str, Any]:
    """Return the environment of a request as PEP 3333 defines it. `length`: that of a chunked body,
    also of one that is too long to be read."""
    path = scope.get("raw_path") or scope["path"].encode()
    server = scope.get("server") or ("localhost", 80)
    environ: dict[str, Any] = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "SERVER_NAME": server[0],
        "SERVER_PORT": str(server[1] or 0),
        "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
        "REMOTE_ADDR": (scope.get("client") or ("", 0))[0],
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope.get("scheme", "http"),
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    for raw_name, raw_value in scope["headers"]:
        # With an underscore it would pass for another header, one that a proxy vouches for.
        if b"_" in raw_name:
            continue
        name = raw_name.decode("latin-1").upper().replace("-", "_")
        key = name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{name}"
        value = raw_value.decode("latin-1")
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    if environ.pop("HTTP_TRANSFER_ENCODING", None) is not None:
        environ["CONTENT_LENGTH"] = str(length)
    return environ
