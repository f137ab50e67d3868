"""A homeserver as far as OpenID tokens go: real HTTP, and as ill-behaved as a test wants it."""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

USERINFO = "/_matrix/federation/v1/openid/userinfo"


class Homeserver:
    def __init__(self) -> None:
        self.users: dict[str, str] = {}  # by token
        self.asked: list[str] = []  # the request lines' targets
        self.behave: Callable[[BaseHTTPRequestHandler], None] = self.userinfo
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                outer.behave(self)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Homeserver":
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def userinfo(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        token = parse_qs(parts.query).get("access_token", [""])[0]
        if not parts.path.endswith(USERINFO):
            answer(handler, 404, {"errcode": "M_UNRECOGNIZED"})
        elif token in self.users:
            answer(handler, 200, {"sub": self.users[token]})
        else:
            answer(handler, 401, {"errcode": "M_UNKNOWN_TOKEN"})

    def answers(self, body: Any, status: int = 200, **headers: str) -> None:
        """From now on, whatever is asked; `body` is bytes or what becomes JSON."""
        self.behave = lambda handler: answer(handler, status, body, **headers)


def answer(handler: BaseHTTPRequestHandler, status: int, body: Any, **headers: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    with suppress(OSError):  # hung up on
        handler.wfile.write(data)
