"""Texts that people, models and services write: made into HTML, split for a room, taken for an answer,
an address or a line of a log, within a time that grows with their length and no faster."""

import gc
import time
from collections.abc import Callable

import pytest
from hypothesis import strategies as st

from agents.llm import completions, errors
from agents.runs import http_commands
from botrunner.outgoing import content as rendering
from botrunner.outgoing.content import MAX_CONTENT_BYTES
from chat.markdown import MAX_LENGTH, PAGE_TAGS, TAGS, to_html
from config.scrub import Scrubber
from lib import outgoing
from tests.fuzz.examples import anything, objects, tried, words
from tests.fuzz.test_model_answers import dumps
from tests.security.hostile import HOSTILE
from tests.security.markup import Parsed, faults

# What Markdown and HTML are made of.
PIECES = [
    *"*_`[]()<>!#|-\\&;:~\"'= \n\t",
    "```",
    "](",
    "<a href=",
    "javascript:",
    "$$",
    "\\(",
    "\\[",
    "\\text{",
    "<sup>",
    "- [x] ",
    "```js\n",
    "http://",
    "&#106;",
    "\u202e",
]
MARKED = st.lists(st.sampled_from([*PIECES, *HOSTILE[:12]]) | words, max_size=25).map("".join)


@tried(150, text=MARKED)
def test_markdown(text: str) -> None:
    html = to_html(completions.storable(text), new_tab=True)
    assert Parsed(html).tags <= PAGE_TAGS
    assert not faults(html)
    html = to_html(completions.storable(text))
    assert Parsed(html).tags <= TAGS
    assert not faults(html, apart=False)


@pytest.mark.parametrize(
    "piece",
    [
        *("*a_", "[", "![a](", "[[a](", "`", "<a ", "&#1;", "> ", "- \n", "a|\n|-\n", "\\", "~~"),
        *("$", "$a", "$a$ ", "$$a\n", "$$", "\\(", "\\[a\n", "\\[\n\n", "$\\$", "a $\\", "<sub>"),
        *("http://", "http://a.b", "http://a.b ", "www.", "www.a.", "www.a.b/", "- [x] a\n"),
        *("![](http://a.b/c)", "```js\n{\n```\n", "```c\n", "$x^2$", "\\(a\\)", "[![a](b)](c)"),
    ],
)
def test_what_repeats_itself_takes_no_longer_for_it(piece: str) -> None:
    assert_grows_with_length(to_html, piece * (MAX_LENGTH // 2 // len(piece)))


def assert_grows_with_length(work: Callable[[str], object], text: str) -> None:
    """However fast the machine is: what is quadratic takes sixteen times as long for four times as
    much, and what takes less than half a second then may."""
    quarter, whole = (spent(work, part) for part in (text[: len(text) // 4], text))
    assert whole < 9 * quarter + 0.5


def spent(work: Callable[[str], object], text: str) -> float:
    """Seconds of this thread's processor time, without the collector: it looks at the whole process."""
    gc.disable()
    try:
        started = time.thread_time()
        work(text)
        return time.thread_time() - started
    finally:
        gc.enable()


@tried(20, pieces=st.lists(MARKED, max_size=4), times=st.integers(1, 400))
def test_an_answer_of_any_length_fits_into_events(pieces: list[str], times: int) -> None:
    text = completions.storable("\n".join(pieces * times))[:100_000]
    for message in rendering._fitting(text, "m.text"):
        assert rendering._size(message) <= MAX_CONTENT_BYTES


@tried(
    100,
    status=st.integers(100, 599),
    body=st.one_of(objects({"reply": words}).map(dumps), anything.map(dumps), st.binary()),
)
def test_what_a_webhook_answers(status: int, body: bytes) -> None:
    try:
        text = http_commands._text(status, body)
    except completions.LLMError as error:
        assert error.code.startswith("webhook_")
        return
    assert text.strip()
    assert not errors.UNSTORABLE.search(text)


URL = st.lists(
    st.sampled_from(
        [*":/@?#[]%.\\ ", "https", "http", "hooks.example.org", "127.0.0.1", "::1", "443", "\r\n"]
    )
    | words,
    max_size=8,
).map("".join)


@tried(150, url=st.one_of(URL, URL.map("https://{}".format)))
def test_an_address_may_be_called_or_may_not(url: str) -> None:
    if outgoing.allowed(url, ["hooks.example.org"]):
        assert outgoing.host_of(url) == "hooks.example.org"
        assert url.startswith(("https://", "HTTPS://"))
    assert "@" not in outgoing.host_of(url)


SECRETS = [
    "password=",
    "Bearer ",
    "access_token",
    "://a:b@",
    "eyJ",
    "sk-",
    "DETAIL:",
    "secret",
    '"',
]


@tried(100, parts=st.lists(st.sampled_from(SECRETS) | words, max_size=12))
def test_a_line_of_a_log_is_scrubbed(parts: list[str]) -> None:
    scrub = Scrubber("the-secret-of-this-server")
    told = scrub("the-secret-of-this-server".join(parts))
    assert "the-secret-of-this-server" not in told


@pytest.mark.parametrize(
    "piece", ["://", "a:", "Bearer ", "eyJ", "password=", "sk-a", "@", "DETAIL:"]
)
def test_a_long_line_takes_no_longer_for_what_is_in_it(piece: str) -> None:
    assert_grows_with_length(Scrubber("the-secret-of-this-server"), (piece * 20_000)[:100_000])
