"""What goes out of a log line, and that nothing that is written into one takes long to look at."""

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from config import scrub
from config.scrub import FIELD, REMOVED, Scrubber, cleaned, shortened

SECRET = "the-secret-of-this-server"
clean = Scrubber(SECRET)

AUTHORIZATION = [
    ("Authorization: Basic dXNlcjpwYXNz== rest", "dXNlc"),
    ("Authorization: Token canary rest", "canary"),
    ("authorization: Custom canary rest", "canary"),
    ("Authorization: canary", "canary"),
    ("Proxy-Authorization: NTLM canary+/=", "canary"),
    ('Authorization: Digest username="canary", response="a canary"', "canary"),
    ("""{'Authorization': 'Digest username="canary", response="a canary"'}""", "canary"),
    ('{"authorization": "Token canary of two"}', "canary"),
    ("[(b'authorization', b'Custom canary')]", "canary"),
    ("{'HTTP_AUTHORIZATION': 'Custom canary'}", "canary"),
]
PASSWORDS = [
    ('password="two canary words" next', "canary"),
    ("{'password': 'it\\'s a canary', 'x': 1}", "canary"),
    ('{"password": "a \\"canary\\" b", "x": 1}', "canary"),
    ('{\\"new_password\\": \\"a canary\\", \\"x\\": 1}', "canary"),
    ("('password', 'a canary')", "canary"),
    ("password=a,canary", "canary"),
    ("password1=a@canary&password2=canary", "canary"),
    ("PGPASSWORD=canary psql", "canary"),
    ("client_secret: canary", "canary"),
    ("sessionid=canary; csrftoken=canary", "canary"),
]
ADDRESSES = [
    ("postgres://user:ca/nary@host/db", "nary"),
    ("postgres://user:canary@canary@host/db", "canary"),
    ("redis://:canary:canary@host:6379/0", "canary"),
    ("see http://a.b/x,redis://u:canary@host", "canary"),
    ("https://canary@sentry.example.org/1", "canary"),
]


@pytest.mark.parametrize(("text", "secret"), [*AUTHORIZATION, *PASSWORDS, *ADDRESSES])
def test_it_goes(text: str, secret: str) -> None:
    result = clean(text)
    assert secret not in result
    assert REMOVED in result


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("{'password': 'a b', 'x': 1}", "{'password': '[removed]', 'x': 1}"),
        ('"authorization": "Basic abc", "x": 1', '"authorization": "Basic [removed]", "x": 1'),
        ("postgres://user:p/w@host/db failed", "postgres://user:[removed]@host/db failed"),
    ],
)
def test_what_stands_beside_it_stays(text: str, result: str) -> None:
    assert clean(text) == result


@pytest.mark.parametrize(
    "text",
    [
        "https://host/path?email=a@b.c",
        "https://host:8448/path",
        "Request refused: csrf: CSRF token missing.",
        "The token was refused",
        "eyj is no JWT",
    ],
)
def test_the_rest_stays(text: str) -> None:
    assert clean(text) == text


class TestLength:
    def test_a_long_text_is_cut_with_a_note(self) -> None:
        result = shortened("a" * 10_000 + "the end", clean)
        assert len(result) < FIELD + 100
        assert f"[{10_007 - FIELD} characters cut]" in result
        assert result.endswith("the end")

    @pytest.mark.parametrize("place", range(FIELD * 3 // 4 - len(SECRET), FIELD * 3 // 4 + 1, 4))
    def test_no_half_of_a_secret_is_left_at_the_cut(self, place: int) -> None:
        for secret in (SECRET, "redis://u:canary-canary@host", "sk-canary-canary"):
            result = shortened("a " * (place // 2) + secret + " b" * 10_000, clean)
            assert SECRET[:8] not in result
            assert "canary" not in result

    def test_of_what_is_longer_than_is_looked_at_the_end_is_not_shown(self) -> None:
        assert "canary" not in shortened("a" * 200_000 + "canary", clean)

    def test_it_goes_by_names_too(self) -> None:
        result = cleaned(
            {"headers": {"Cookie": "a", "x": ["b" * 20_000]}, "api_key": "a", "n": 1}, clean
        )
        assert result["headers"]["Cookie"] == result["api_key"] == REMOVED
        assert len(result["headers"]["x"][0]) < FIELD + 100
        assert result["n"] == 1


OPENERS = [
    "://",
    "://a:",
    "eyJ",
    "eyJ-",
    "eyJaaaaaaaa.",
    "Bearer ",
    "authorization: ",
    "authorization: Digest a=",
    '"authorization"',
    'password="',
    'password=\\"',
    "password",
    "sk-aaaaaaaa",
    "DETAIL:",
    "?key=",
]
FILLERS = ["", "a", 'a="', "-", "\\", '\\"', " ", "@", "."]
NEAR_MATCHES = [(opener, filler) for opener in OPENERS for filler in FILLERS]
READERS: dict[str, Callable[[str], Any]] = {
    **{
        name: re.compile(pattern, re.VERBOSE | re.IGNORECASE).findall
        for name, pattern in scrub.PATTERNS.items()
    },
    "addresses": lambda text: scrub.ADDRESSES.sub(scrub._without_password, text),
    "names": scrub.PRIVATE_NAMES.findall,
    "all": clean,
}
SMALL, LARGE = 1_000, 16_000


def took(read: Callable[[str], Any], text: str) -> float:
    """In seconds of this thread's own."""
    started = time.thread_time()
    read(text)
    return time.thread_time() - started


def best(read: Callable[[str], Any], text: str) -> float:
    return min(took(read, text) for _ in range(5))


@pytest.mark.parametrize("name", READERS)
def test_sixteen_times_the_text_takes_no_more_than_its_share(name: str) -> None:
    read = READERS[name]
    for opener, filler in NEAR_MATCHES:
        for text in ((opener + filler) * LARGE, opener + (filler or "b") * LARGE):
            # 0.6 µs a character is no matter.
            if took(read, text[:LARGE]) > 0.01:
                share = 16 * 4 * best(read, text[:SMALL])
                assert best(read, text[:LARGE]) < share, (opener, filler)
