import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.faults.proxy import Proxy


def serve(listener: socket.socket, heard: list[bytes]) -> None:
    """Echoes, a connection after the other."""
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                while data := connection.recv(1000):
                    heard.append(data)
                    connection.sendall(b"re:" + data)


@pytest.fixture
def heard() -> list[bytes]:
    """Return the data that the server received."""
    return []


@pytest.fixture
def line(heard: list[bytes]) -> Iterator[Proxy]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve, args=(listener, heard))
        server.start()
        with Proxy(listener.getsockname()[1]) as proxy:
            yield proxy
        listener.shutdown(socket.SHUT_RDWR)
        server.join(5)


@pytest.fixture
def client(line: Proxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", line.port), 5) as client:
        yield client


def told(client: socket.socket, data: bytes, seconds: float = 5) -> bytes:
    client.settimeout(seconds)
    client.sendall(data)
    return client.recv(1000)


def test_it_passes_on_what_both_say(client: socket.socket) -> None:
    assert told(client, b"a") == b"re:a"
    assert told(client, b"b") == b"re:b"


def test_a_black_hole_swallows_and_gives_back(line: Proxy, client: socket.socket) -> None:
    assert told(client, b"a") == b"re:a"
    line.blackhole()
    with pytest.raises(TimeoutError):
        told(client, b"b", 0.2)
    other = socket.create_connection(("127.0.0.1", line.port), 5)
    with other, pytest.raises(TimeoutError):
        told(other, b"c", 0.2)
    client.settimeout(5)
    line.restore()
    assert client.recv(1000) == b"re:b"


def test_a_reset_ends_connections_and_a_refusal_keeps_new_ones_out(
    line: Proxy, client: socket.socket
) -> None:
    assert told(client, b"a") == b"re:a"
    line.refuse()
    with pytest.raises(ConnectionResetError):
        client.recv(1000)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", line.port), 5)
    line.restore()
    with socket.create_connection(("127.0.0.1", line.port), 5) as other:
        assert told(other, b"b") == b"re:b"


def test_the_chosen_reply_is_lost_after_the_server_has_heard(
    line: Proxy, client: socket.socket, heard: list[bytes]
) -> None:
    line.lose_reply(b"ADD", nth=2)
    assert told(client, b"ADD 1") == b"re:ADD 1"
    assert told(client, b"GET") == b"re:GET"
    with pytest.raises(ConnectionResetError):
        told(client, b"ADD 2")
    assert (heard[-1], line.lost) == (b"ADD 2", 1)
    with socket.create_connection(("127.0.0.1", line.port), 5) as other:
        assert told(other, b"ADD 3") == b"re:ADD 3"


def test_dropped_replies_leave_the_connection_open(
    line: Proxy, client: socket.socket, heard: list[bytes]
) -> None:
    line.drop_replies()
    with pytest.raises(TimeoutError):
        told(client, b"a", 0.3)
    assert heard == [b"a"]
    line.restore()
    assert told(client, b"b") == b"re:b"
