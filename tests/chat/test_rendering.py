"""What it takes to render Markdown that takes much: bounded, for a text and for a page."""

import time
from collections.abc import Callable

import pytest
from django.http import HttpRequest
from django.test import Client

from agents.models import Run
from agents.runs import execution
from chat import rendering
from chat.markdown import MAX_CELLS, MAX_STEPS, Steps, to_html
from chat.models import Message
from chat.rendering import HtmlCache, RenderBudget, budget_of
from realm.models import User
from tests import factories


def repeated(piece: str) -> Callable[[int], str]:
    return lambda size: (piece * (size // len(piece) + 1))[:size]


def table(columns: int, rows: int) -> str:
    return "|a" * columns + "|\n" + "|-" * columns + "|\n" + "|\n" * rows


def references(size: int) -> str:
    return f"[a]: https://example.org/{'x' * (size // 2)}\n\n" + "[a] " * (size // 8)


# By how long they are. None is longer than what is taken for Markdown at all.
TEXTS: dict[str, Callable[[int], str]] = {
    "a wide table of short rows": lambda size: table(size // 8, size // 4),
    "a long table of short rows": lambda size: table(100, (size - 400) // 2),
    "many tables of short rows": lambda size: (table(40, 40) + "\n") * (size // 240),
    "a quoted table": lambda size: "> " + table(100, size // 4).replace("\n", "\n> "),
    "heads of tables": repeated("|-|-|\n"),
    "a full table": lambda size: "|a|b|\n|-|-|\n" + "|x|y|\n" * (size // 6 - 2),
    "references to a long address": references,
    "definitions": lambda size: "".join(f"[{n}]: /u\n" for n in range(size // 11)),
    "nested lists": lambda size: "".join("  " * (n % 9) + "- a\n" for n in range(size // 13)),
    "a list": repeated("- a\n"),
    "a list of lists": repeated("- - - - a\n"),
    "quotes in quotes": lambda size: "".join(
        ">" * (n % 19 + 1) + "a\n\n" for n in range(size // 13)
    ),
    "a quote": repeated("> a\n"),
    "quoted lists": repeated("> - > - a\n\n"),
    "opening emphasis": repeated("*a "),
    "stars": repeated("*"),
    "stars between": repeated("a**b"),
    "stars and underscores": repeated("*_a_* **b"),
    "strokes": repeated("~~a"),
    "opening brackets": repeated("["),
    "brackets": lambda size: "[" * (size // 2) + "]" * (size // 2),
    "links that do not end": repeated("[a]("),
    "addresses that do not end": repeated("[a](<b"),
    "pictures": repeated("!["),
    "stars and brackets": repeated("*["),
    "ticks": lambda size: "".join("`" * (n % 150 + 1) + "a" for n in range(size // 77)),
    "ticks and brackets": repeated("[`"),
    "entities": repeated("&amp;"),
    "ampersands": repeated("&"),
    "less than": repeated("<"),
    "short addresses": repeated("<a@b>"),
    "links": repeated("[a](ftp:b)"),
    "backslashes": repeated("\\"),
    "lines": repeated("a\n"),
    "headings": repeated("#\n"),
    "underlined": repeated("a\n-\n"),
    "fences": repeated("```\n"),
    "a label of many lines": lambda size: "[" + "a\n" * (size // 2 - 1),
    "a title of many lines": lambda size: '[a]: b "' + "x\n" * (size // 2 - 5),
    "one long line": repeated("word "),
    "quotation marks": repeated('"'),
}
SIZES = (6_000, 12_000, 24_000, 48_000)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_rendering_time_grows_linearly(
    text: Callable[[int], str],
) -> None:
    """A quadratic one takes 64 times as long for 8 times the length."""

    def seconds(size: int) -> float:
        written = text(size)
        assert len(written) <= 50_000
        best = float("inf")
        for _ in range(2):
            began = time.process_time()
            to_html(written, new_tab=True)
            best = min(best, time.process_time() - began)
        return best

    to_html("warm")
    first, *_, last = map(seconds, SIZES)
    assert last < 24 * first + 0.1
    # Whatever it is, on a machine that is ten times as slow as any.
    assert last < 3


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_html_is_not_many_times_longer_than_its_text(text: Callable[[int], str]) -> None:
    for size in SIZES:
        written = text(size)
        assert len(to_html(written, new_tab=True)) <= 10 * len(written) + 1_000


def test_oversized_table_is_shown_as_text() -> None:
    shown = to_html(f"**before**\n\n{table(60, 200)}\n*after*")
    assert "<td>" not in shown
    assert "|a|a|" in shown
    assert "<strong>before</strong>" in shown
    assert "<em>after</em>" in shown


@pytest.mark.parametrize(("columns", "rows"), [(1, 3), (3, 20), (10, 100), (4, 450)])
def test_full_table_is_rendered(columns: int, rows: int) -> None:
    row = "| word " * columns + "|\n"
    shown = to_html(row + "|---" * columns + "|\n" + row * rows + "\n*after*")
    assert shown.count("<td>") == columns * rows <= MAX_CELLS
    assert "<em>after</em>" in shown


def test_short_rows_are_padded_within_limits() -> None:
    assert to_html("|a|b|c|\n|-|-|-|\n|1|\n").count("<td>") == 3


def test_link_definition_can_be_reused() -> None:
    shown = to_html("[one][a], [two][a] and [three][a]\n\n[a]: https://example.org/page")
    assert shown.count('href="https://example.org/page"') == 3


@pytest.fixture
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_cache", HtmlCache())


@pytest.mark.usefixtures("_empty")
class TestPages:
    def test_text_beyond_the_budget_is_shown_as_plain_text(self) -> None:
        long = "*a* " * 3_000
        page = RenderBudget(Steps(MAX_STEPS))
        shown = [page.html(f"{number} {long}") for number in range(3)]
        assert ["<em>" in each for each in shown] == [True, False, False]
        assert page.steps.remaining >= 0

        # What was rendered takes no steps any more.
        page = RenderBudget(Steps(MAX_STEPS))
        assert ["<em>" in page.html(f"{n} {long}") for n in range(3)] == [True, True, False]

    def test_prepared_texts_are_rendered_first(self) -> None:
        texts = [f"{number} " + "*a* " * 3_000 for number in range(3)]
        page = RenderBudget(Steps(MAX_STEPS))
        page.prepare(reversed(texts))
        assert ["<em>" in page.html(text) for text in texts] == [False, False, True]

    def test_html_of_a_page_is_limited(self) -> None:
        page = RenderBudget(characters=100)
        assert [page.html(f"**{n}**")[:3] for n in range(6)] == ["<p>"] * 4 + ["<pr"] * 2

    def test_cache_is_limited_by_size(self) -> None:
        cache = HtmlCache(100)
        for number in range(20):
            cache.put(bytes([number]), "x" * 10)
            cache.get(b"\0")
        kept = [number for number in range(20) if cache.get(bytes([number]))]
        assert kept == [0, *range(11, 20)]
        cache.put(b"long", "x" * 11)
        assert cache.get(b"long") is None

    def test_each_request_has_its_own_budget(self) -> None:
        one, other = HttpRequest(), HttpRequest()
        assert budget_of(one) is budget_of(one)
        assert budget_of(one) is not budget_of(other)


@pytest.fixture
def long_thread(db: None, _empty: None) -> Run:
    """Twenty answers, each of which takes as long as it may."""
    owner = factories.user("alice")
    first = factories.ask("ping", command="ping", owner=owner)
    for number in range(19):
        factories.ask(f"{number}", command="ping", owner=owner, thread_id=first.thread_id)
    for run in Run.objects.order_by("position"):
        execution.execute(run.pk)
    for answer in Message.objects.filter(role=Message.Role.ASSISTANT):
        answer.content = f"{answer.position} " + TEXTS["opening emphasis"](40_000)
        answer.save()
    return first


def test_page_of_hostile_answers_is_fast(long_thread: Run) -> None:
    client = Client()
    client.force_login(User.objects.get(username="@alice:localhost"))
    began = time.process_time()
    page = client.get(f"/threads/{long_thread.thread_id}")
    assert page.status_code == 200
    assert page.content.count(b"*a *a") > 10
    # 20 of them took 10 seconds and more.
    assert time.process_time() - began < 5
