"""Requests to addresses that others have chosen.

tests/security/test_prompt_injection.py has the URLs that are refused as text.
"""

import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lib import outgoing

# One address of each block of the IANA registries of special-purpose addresses, whatever version of
# Python runs: `ipaddress.is_global` of older patch levels takes some of them for public.
SPECIAL_V4 = [
    *("0.1.2.3", "10.1.2.3", "100.64.1.1", "127.1.2.3", "169.254.1.1", "172.31.255.1"),
    *("192.0.0.1", "192.0.0.9", "192.0.0.10", "192.0.0.170", "192.0.2.1", "192.31.196.1"),
    *("192.52.193.1", "192.88.99.1", "192.168.255.1", "192.175.48.1", "198.19.255.1"),
    *("198.51.100.1", "203.0.113.1", "224.0.0.251", "239.255.255.250", "240.0.0.1"),
]
SPECIAL_V6 = [
    *("::", "::1", "::7f00:1", "::ffff:0:127.0.0.1", "64:ff9b:1::1", "100::1", "100:0:0:1::1"),
    *("2001::1", "2001:1::1", "2001:2::1", "2001:3::1", "2001:4:112::1", "2001:10::1"),
    *("2001:20::1", "2001:30::1", "2001:db8::1", "2002:5db8:d70e::1", "2620:4f:8000::1"),
    *("3fff::1", "3fff:fff::1", "5f00::1", "fc00::1", "fd12::1", "fe80::1", "fec0::1", "ff0e::1"),
]
PUBLIC = [
    *("1.1.1.1", "93.184.215.14", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1"),
    *("192.0.1.1", "198.17.255.255", "198.20.0.1", "223.255.255.254"),
    *("2606:4700::1", "2001:200::1", "2a00:1450::1", "2620:4f:8001::1", "3ffe:ffff::1"),
    *("::ffff:93.184.215.14", "64:ff9b::5db8:d70e"),
]


class TestPublicAddresses:
    @pytest.mark.parametrize("address", SPECIAL_V4 + SPECIAL_V6)
    def test_a_special_purpose_address_is_not_public(self, address: str) -> None:
        assert not outgoing.is_public(address)

    @pytest.mark.parametrize("address", SPECIAL_V4)
    @pytest.mark.parametrize("prefix", ["::ffff:0:0", "64:ff9b::"])
    def test_an_ipv4_address_in_ipv6_notation_counts_as_itself(
        self, address: str, prefix: str
    ) -> None:
        number = int(ipaddress.IPv6Address(prefix)) + int(ipaddress.IPv4Address(address))
        assert not outgoing.is_public(str(ipaddress.IPv6Address(number)))

    @pytest.mark.parametrize("address", PUBLIC)
    def test_others_are(self, address: str) -> None:
        assert outgoing.is_public(address)


class TestPorts:
    HOSTS = ("hooks.example.org",)

    @pytest.mark.parametrize("port", ["", ":443"])
    def test_the_port_of_https_may_be_called(self, port: str) -> None:
        assert outgoing.allowed(f"https://hooks.example.org{port}/", self.HOSTS)

    @pytest.mark.parametrize("port", [22, 80, 6379, 8443])
    def test_another_may_only_if_the_setting_names_it(self, port: int, settings: Any) -> None:
        url = f"https://hooks.example.org:{port}/"
        assert not outgoing.allowed(url, self.HOSTS)
        settings.OUTGOING_PORTS = frozenset({443, port})
        assert outgoing.allowed(url, self.HOSTS)


class TestConnecting:
    @pytest.fixture
    def port(self) -> Iterator[int]:
        """A port that accepts connections on 127.0.0.2 alone."""
        with socket.create_server(("127.0.0.2", 0)) as server:
            stop = threading.Event()
            server.settimeout(0.05)

            def accept() -> None:
                while not stop.is_set():
                    try:
                        server.accept()[0].close()
                    except TimeoutError:
                        continue

            thread = threading.Thread(target=accept)
            thread.start()
            yield server.getsockname()[1]
            stop.set()
            thread.join(10)

    def connection(self, port: int, seconds: float = 10) -> Any:
        return outgoing._Connection("hooks.example.org", port, deadline=time.monotonic() + seconds)

    def test_every_address_of_a_name_is_tried(self, port: int) -> None:
        connected = self.connection(port)._connect_to_one(["127.0.0.1", "127.0.0.2"])
        assert connected.getpeername() == ("127.0.0.2", port)
        connected.close()

    def test_a_name_none_of_whose_addresses_answers_fails(self, port: int) -> None:
        with pytest.raises(ConnectionRefusedError):
            self.connection(port)._connect_to_one(["127.0.0.1", "127.0.0.3"])

    def test_an_address_that_is_silent_takes_its_share_of_the_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: list[float] = []

        def silent(address: Any, timeout: float) -> None:
            given.append(timeout)
            raise TimeoutError

        monkeypatch.setattr(socket, "create_connection", silent)
        with pytest.raises(TimeoutError):
            self.connection(443, 9)._connect_to_one(["192.0.2.1", "192.0.2.2", "192.0.2.3"])
        assert given == [
            pytest.approx(3, abs=0.5),
            pytest.approx(4.5, abs=0.5),
            pytest.approx(9, abs=0.5),
        ]
