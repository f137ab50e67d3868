"""Connections to Redis: where they lead, as whom, and how they are verified."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import current_app
from django.core.cache import caches
from django_redis.pool import ConnectionFactory
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError

from agents.events import publisher, stream, subscriber
from lib import process
from lib import redis as connections
from ops import doctor
from realm import throttles
from tests.config.starting import Start
from tests.tls import (
    ENCODED,
    PASSWORD,
    USER,
    Authority,
    plain_listener,
    redis_with_users,
    tls_front,
)

CANARY = "canary-0123456789"


def control() -> None:
    """As `celery inspect` does: a broadcast, and a queue for the answers."""
    with current_app.connection_for_write() as connection:
        # One attempt: by default it connects for four seconds.
        connection.transport_options.update(max_retries=1, interval_start=0)
        current_app.control.inspect(connection=connection, timeout=0.2).ping()


def broker() -> None:
    with current_app.connection_for_read() as connection:
        connection.connect()


def heard() -> None:
    """As the web process hears what runs do."""

    async def ping() -> None:
        hub = subscriber.Subscriber(lambda _: asyncio.sleep(0, []))
        try:
            await hub._redis.ping()
        finally:
            await hub.close()

    asyncio.run(ping())


KINDS: dict[str, Callable[[], Any]] = {
    "publisher": lambda: stream._publisher().ping(),
    "consumer": lambda: stream.consumer().ping(),
    "observer": lambda: stream.check_writable(),
    "tokens": lambda: publisher._publish_client().ping(),
    "calls": lambda: publisher._control_client().ping(),
    "listeners": heard,
    "cache": lambda: caches["default"].client.get_client().ping(),
    "throttles": lambda: throttles.redis().ping(),
    "broker": broker,
    "control": control,
}


def forget_clients() -> None:
    process.reset()
    for pool in ConnectionFactory._pools.values():
        pool.disconnect()
    ConnectionFactory._pools.clear()
    if hasattr(caches["default"], "_client"):
        caches["default"]._client = None


@pytest.fixture
def use(settings: Any) -> Iterator[Callable[..., None]]:
    """Has the code under test use a Redis."""

    def choose(url: str, **files: object) -> None:
        forget_clients()
        settings.REDIS_URL = url
        for name, path in files.items():
            setattr(settings, f"REDIS_{name.upper()}", str(path))

    forget_clients()
    yield choose
    forget_clients()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    folder = tmp_path_factory.mktemp("users")
    with redis_with_users(folder) as port:
        yield folder, port


@pytest.fixture(scope="module")
def secured(users: tuple[Path, int], authority: Authority) -> Iterator[int]:
    """The port of TLS before that Redis, with a certificate for `localhost`."""
    certificate, key = authority.issue("server", "localhost")
    with tls_front(users[1], certificate, key) as port:
        yield port


@pytest.mark.parametrize("kind", KINDS)
def test_each_connection_goes_over_tls(
    kind: str, secured: int, authority: Authority, use: Any
) -> None:
    use(f"rediss://{USER}:{ENCODED}@localhost:{secured}/3", ca_file=authority.file)

    KINDS[kind]()


@pytest.mark.parametrize("kind", KINDS)
def test_a_certificate_for_another_host_is_refused(
    kind: str, secured: int, authority: Authority, use: Any
) -> None:
    use(f"rediss://{USER}:{ENCODED}@127.0.0.1:{secured}/0", ca_file=authority.file)

    with pytest.raises(Exception, match=r"REDIS_URL: .* not valid for this host name") as refused:
        KINDS[kind]()
    assert PASSWORD not in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_authority_is_refused(kind: str, secured: int, use: Any, tmp_path: Path) -> None:
    use(f"rediss://{USER}:{ENCODED}@localhost:{secured}/0", ca_file=Authority(tmp_path).file)

    with pytest.raises(Exception, match=r"REDIS_URL: .* was rejected .* REDIS_CA_FILE"):
        KINDS[kind]()


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_without_tls_is_not_sent_the_password(kind: str, use: Any) -> None:
    with plain_listener() as listener:
        use(f"rediss://{USER}:{ENCODED}@localhost:{listener.port}/0")
        with pytest.raises(Exception, match="REDIS_URL: the TLS handshake"):
            KINDS[kind]()

    assert listener.connections
    assert listener.nothing_of(PASSWORD, ENCODED, USER, "AUTH")


def test_the_doctor_tells_what_is_wrong_with_tls(
    secured: int, authority: Authority, use: Any
) -> None:
    use(f"rediss://{USER}:{ENCODED}@localhost:{secured}/0", ca_file=authority.file)
    sound = [*doctor._redis(), *doctor._broker()]
    use(f"rediss://{USER}:{ENCODED}@127.0.0.1:{secured}/0", ca_file=authority.file)
    broken = [*doctor._redis(), *doctor._broker()]

    assert {level for level, _, _ in sound} == {doctor.OK}
    assert f"rediss://localhost:{secured}/0" in str(sound)
    assert [level for level, _, _ in broken] == [doctor.BROKEN, doctor.BROKEN]
    assert all("not valid for this host name" in text for _, text, _ in broken)
    assert PASSWORD not in f"{sound}{broken}"
    assert ENCODED not in f"{sound}{broken}"


def test_a_wrong_password_is_told_by_the_variable(
    secured: int, authority: Authority, use: Any
) -> None:
    use(f"rediss://{USER}:{CANARY}@localhost:{secured}/0", ca_file=authority.file)
    found = [*doctor._redis(), *doctor._broker()]

    assert [level for level, _, _ in found] == [doctor.BROKEN, doctor.BROKEN]
    assert all("REDIS_URL: Redis rejects the user or the password" in text for _, text, _ in found)
    assert CANARY not in str(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_may_want_a_certificate(
    kind: str, users: tuple[Path, int], authority: Authority, use: Any
) -> None:
    certificate, key = authority.issue("wanting", "localhost")
    mine, my_key = authority.issue("client")
    with tls_front(users[1], certificate, key, clients=authority.file) as port:
        url = f"rediss://{USER}:{ENCODED}@localhost:{port}/0"
        use(url, ca_file=authority.file, client_cert_file=mine, client_key_file=my_key)
        KINDS[kind]()
        use(url, ca_file=authority.file, client_cert_file="", client_key_file="")
        with pytest.raises((RedisConnectionError, OperationalError)):
            KINDS[kind]()


@pytest.mark.parametrize("kind", KINDS)
def test_each_connection_goes_by_a_unix_socket(
    kind: str, users: tuple[Path, int], use: Any
) -> None:
    use(f"unix://{USER}:{ENCODED}@{users[0]}/redis.sock?db=2")

    KINDS[kind]()


def test_the_database_is_the_one_of_the_url(users: tuple[Path, int], use: Any) -> None:
    folder, port = users
    for number, url in enumerate(
        (
            f"unix://{USER}:{ENCODED}@{folder}/redis.sock?db=5",
            f"redis://{USER}:{ENCODED}@127.0.0.1:{port}/6",
            f"redis://{USER}:{ENCODED}@127.0.0.1:{port}?db=7",
        ),
        start=5,
    ):
        use(url)
        with current_app.connection_for_write() as connection:
            connection.SimpleQueue("numbered").put({})
        assert stream.consumer().llen("numbered") == 1
        assert stream.consumer().client_info()["db"] == number
        stream.consumer().flushdb()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://a", connections.RedisServer("a")),
        ("redis://a:1/2", connections.RedisServer("a", 1, database=2)),
        ("redis://:p@a", connections.RedisServer("a", password="p")),
        ("redis://u@a", connections.RedisServer("a", username="u")),
        (
            "redis://u:a%3Ab%2Fc%40d%25@a",
            connections.RedisServer("a", username="u", password="a:b/c@d%"),
        ),
        ("redis://[::1]:7/0", connections.RedisServer("::1", 7)),
        ("rediss://a/1", connections.RedisServer("a", database=1, tls=connections.TLS())),
        ("unix:///a/b.sock", connections.RedisServer(path="/a/b.sock")),
        (
            "unix://u:p@/a%20b?db=3",
            connections.RedisServer(path="/a b", username="u", password="p", database=3),
        ),
    ],
)
def test_what_a_url_means(url: str, expected: connections.RedisServer) -> None:
    found = connections.parse(url)

    assert (found.host, found.port, found.path) == (expected.host, expected.port, expected.path)
    assert (found.username, found.password) == (expected.username, expected.password)
    assert (found.database, found.tls) == (expected.database, expected.tls)


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("http://a", "starts with redis://"),
        ("redis://", "names a host"),
        (f"redis://:{CANARY}", "names a host"),
        (f"redis://:{CANARY}/x@a", "names a host"),
        (f"redis://u:1?{CANARY}@a/0", "a parameter"),
        (f"redis://u:1#{CANARY}@a/0", "percent-encode"),
        (f"redis://:{CANARY}@a:0", "names a host"),
        (f"redis://:{CANARY}@a:70000", "names a host"),
        (f"redis://:{CANARY}@a/first", "one whole number"),
        (f"redis://:{CANARY}@a/1?db=1", "one whole number"),
        (f"redis://:{CANARY}%ff@a/1", "not UTF-8"),
        (f"rediss://:{CANARY}@a?ssl_cert_reqs=none", "'ssl_cert_reqs'. Certificate and host name"),
        (f"rediss://:{CANARY}@a?ssl_check_hostname=false", "always verified"),
        (f"rediss://:{CANARY}@a?ssl_ca_certs=/x", "REDIS_CA_FILE"),
        (f"redis://:{CANARY}@a?socket_timeout=3", "'socket_timeout' that is not supported"),
        (f"redis://a?password={CANARY}", "'password' that is not supported"),
        (f"unix://:{CANARY}@host/a", "unix:///absolute/path"),
        ("unix://", "unix:///absolute/path"),
    ],
)
def test_what_is_no_address_is_refused_without_its_password(url: str, hint: str) -> None:
    with pytest.raises(connections.InvalidConfiguration, match="REDIS_URL") as refused:
        connections.parse(url)

    assert hint in str(refused.value)
    assert CANARY not in str(refused.value)


def test_a_server_is_shown_without_its_password() -> None:
    server = connections.parse(f"rediss://user:{CANARY}@host/1")

    assert str(server) == "rediss://host:6379/1"
    assert CANARY not in f"{server!r} {server.client(timeout=1)!r}"


class TestStart:
    """Each process stops at its start where the settings are wrong, and names the variable."""

    @pytest.fixture(autouse=True)
    def _start(self, start: Start) -> None:
        self.start = start

    def refused(self, **environment: object) -> str:
        process = self.start(
            "settings.DEBUG", **{name: str(each) for name, each in environment.items()}
        )
        assert process.returncode != 0
        assert CANARY not in process.stderr
        last = process.stderr.strip().splitlines()[-1]
        assert "ImproperlyConfigured" in last
        return last

    def test_a_parameter_that_would_weaken_tls(self) -> None:
        url = f"rediss://:{CANARY}@localhost?ssl_cert_reqs=none"

        assert "REDIS_URL has the parameter 'ssl_cert_reqs'" in self.refused(REDIS_URL=url)

    def test_a_file_that_is_not_there(self) -> None:
        for name in ("REDIS_CA_FILE", "REDIS_CLIENT_CERT_FILE", "REDIS_CLIENT_KEY_FILE"):
            result = self.refused(REDIS_URL="rediss://a", **{name: "/nowhere.pem"})
            assert f"{name} names a file that cannot be read: No such file" in result

    def test_a_file_that_is_none(self, authority: Authority, tmp_path: Path) -> None:
        empty = tmp_path / "empty.pem"
        empty.write_text("")
        mine, _ = authority.issue("mine")
        other = authority.issue("other")[1]

        assert "REDIS_CA_FILE" in self.refused(REDIS_URL="rediss://a", REDIS_CA_FILE=empty)
        result = self.refused(
            REDIS_URL="rediss://a", REDIS_CLIENT_CERT_FILE=mine, REDIS_CLIENT_KEY_FILE=other
        )
        assert "REDIS_CLIENT_KEY_FILE" in result

    def test_certificates_without_tls(self, authority: Authority) -> None:
        result = self.refused(REDIS_URL="redis://a", REDIS_CA_FILE=authority.file)

        assert "need TLS" in result


def test_celery_shows_no_password() -> None:
    """`celery report` prints what the settings and the connection are."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "config", "report"],
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        | {
            "REDIS_URL": f"redis://user:{CANARY}@localhost:1/0",
            "DATABASE_URL": "sqlite:///:memory:",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )

    assert "transport:" in done.stdout
    assert CANARY not in done.stdout + done.stderr
