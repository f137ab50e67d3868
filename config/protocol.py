"""uvicorn's HTTP protocol, with a bound on what its parser holds back: it keeps the head of a request,
its trailers and the extensions of its chunks until they have ended, however long they are.

uvicorn is told of it by `--http config.protocol:BoundedProtocol`.
"""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from config.asgi import CHUNK_BYTES, HEAD_TOO_LONG, MAX_HEAD_BYTES


class BoundedProtocol(HttpToolsProtocol):
    # Bytes since the parser last told of something that it does not keep.
    _held = 0

    def data_received(self, data: bytes) -> None:
        self._held += len(data)
        super().data_received(data)
        # One read may bring the end of a body and the beginning of the next head.
        if self._held > MAX_HEAD_BYTES + CHUNK_BYTES and not self.transport.is_closing():
            self._refuse()

    def on_headers_complete(self) -> None:
        self._held = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._held = 0
        super().on_message_complete()

    def _refuse(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            head = (
                "HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(HEAD_TOO_LONG)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + HEAD_TOO_LONG)
        self.transport.close()
