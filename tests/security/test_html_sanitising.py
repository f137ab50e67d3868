"""What a model writes, on its whole way: from its endpoint to the chat page, to the pages of the
console, into the room. Everything that comes out is taken apart again."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.contrib.admin.utils import quote
from django.test import Client
from django.urls import reverse

from agents.models import Run, Step, Summary
from agents.runs import execution
from botrunner.models import Reply, Room, RoomEvent, Session
from botrunner.outgoing import content as rendering
from botrunner.outgoing import queue
from chat.highlighting import CLASSES
from chat.markdown import ATTRIBUTES, PAGE_ATTRIBUTES, PAGE_TAGS, TAGS, to_html
from chat.models import Message
from realm.models import BotCommand, BotRegistration, User
from tests import factories
from tests.botrunner import scenes
from tests.console.conftest import sign_in  # noqa: F401
from tests.console.test_export import exported
from tests.fakes import llm
from tests.fakes.llm import Call, FakeLLM
from tests.security.hostile import HOSTILE
from tests.security.markup import Parsed, faults

ROOT = Path(__file__).resolve().parent.parent.parent
TURNED = "\u202egnp.exe\u202c \u2067a\u2069 &#x202e;b&#8238;"
GROUPS = 8
SCRIPT = "<script>document.title = 'run'</script>"
SignIn = Callable[..., Client]


class TestMarkdown:
    @pytest.mark.parametrize("apart", [True, False], ids=["page", "room"])
    @pytest.mark.parametrize("markdown", HOSTILE)
    def test_what_is_made_of_it_has_harmless_tags_attributes_and_addresses(
        self, markdown: str, apart: bool
    ) -> None:
        html = to_html(markdown, new_tab=apart)
        parsed = Parsed(html)

        assert parsed.tags <= (PAGE_TAGS if apart else TAGS)
        assert not faults(html, apart=apart)
        allowed = {"target", "rel"} if apart else set()
        attributes = PAGE_ATTRIBUTES if apart else ATTRIBUTES
        for each in parsed.elements:
            more = allowed if each.tag == "a" else set()
            assert each.attributes.keys() <= attributes.get(each.tag, set()) | more
            name = each.attributes.get("class", "language-x")
            assert re.fullmatch(r"language-[\w.+#-]+", name) or name in CLASSES
            assert each.tag != "input" or each.attributes["type"] == "checkbox"
            if apart and each.tag == "a":
                assert set(each.attributes["rel"].split()) == {"noopener", "noreferrer", "nofollow"}
            # Nor does a link lead to a place of ours.
            assert not re.match(r"[/.#]|$", each.attributes.get("href", "https:"))

    def test_what_takes_long_to_read_is_shown_as_it_was_written(self) -> None:
        assert "<b>" not in to_html("<b>" + "x" * 50_000)
        assert to_html("*" * 50_001) == f"<pre>{'*' * 50_001}</pre>"
        # Takes minutes where it may nest for as long as it likes.
        assert "[[[" in to_html("[" * 40_000)

    @pytest.mark.parametrize("text", [TURNED, "x" * 50_001 + TURNED.partition("&")[0]])
    def test_words_stand_in_the_order_in_which_they_were_written(self, text: str) -> None:
        assert not re.search("[\u202a-\u202e\u2066-\u2069]", to_html(text))
        # Which languages from right to left need, and which turn nothing.
        assert to_html("\u200f\u05d0\u200e") == "<p>\u200f\u05d0\u200e</p>"


@pytest.fixture
def answers(db: None, model: FakeLLM) -> list[Run]:
    """A room's questions, each hostile, with answers that are."""
    texts = ["\n\n".join(HOSTILE[n::GROUPS]) for n in range(GROUPS)]
    texts += [TURNED, "@room @alice:localhost [Alice](https://matrix.to/#/@alice:localhost)"]

    def answer(call: Call) -> llm.Reply:
        number = re.match(r"question (\d+)", call.last_user)
        return llm.Reply(texts[int(number[1])] if number else SCRIPT)  # else, a summary

    model.reset(answer)
    scenes.command()
    account = scenes.session()
    scenes.let_in(account, scenes.ALICE)
    scenes.take_in(account, *(scenes.event(f"question {n} {text}") for n, text in enumerate(texts)))
    for pk in Run.objects.order_by("position").values_list("pk", flat=True):
        execution.execute(pk)
    queue.compose(account)
    found = list(Run.objects.order_by("position").select_related("thread", "answer"))
    assert [run.answer and run.answer.content for run in found] == [
        text.replace("\0", "") for text in texts
    ]
    return found


def page_of(row: Any) -> str:
    meta = row._meta
    return reverse(f"admin:{meta.app_label}_{meta.model_name}_change", args=[quote(row.pk)])


def looked_at(browser: Client, path: str) -> Parsed:
    """The page, which has the hostile words and no fault."""
    page = browser.get(path)
    assert page.status_code == 200, path
    assert not faults(page.text), path
    return Parsed(page.text)


def test_the_chat_page_shows_it_and_does_none_of_it(answers: list[Run]) -> None:
    browser = Client()
    browser.force_login(User.objects.get(matrix_user_id=scenes.ALICE))
    thread = f"/threads/{answers[0].thread_id}"
    page = looked_at(browser, thread)
    scripts = [each for each in page.elements if each.tag == "script"]
    assert [each.attributes["src"] for each in scripts] == ["/static/chat/page.js"]
    prose = page.within("prose")
    assert {each.tag for each in prose} <= PAGE_TAGS
    assert len([each for each in prose if each.tag == "a"]) > 3

    part = looked_at(browser, f"/runs/{answers[0].pk}")
    assert part.within("prompt")


def test_pages_of_the_console_show_it_and_do_none_of_it(
    answers: list[Run], admin_client: Client
) -> None:
    # What others than the model decide on, too.
    Room.objects.update(room_id=f"!{SCRIPT}")
    RoomEvent.objects.update(note=SCRIPT)
    Run.objects.update(model=SCRIPT, correlation_id=SCRIPT, worker=SCRIPT, safe_error=SCRIPT)
    Step.objects.update(name=SCRIPT, error=SCRIPT)
    Reply.objects.update(error=SCRIPT)
    thread = answers[0].thread
    thread.title = SCRIPT[:200]
    thread.summary, thread.summary_reach = HOSTILE[0], 1
    thread.save()
    summary = Summary.objects.create(
        thread=thread, covers_from=0, covers_to=1, text=HOSTILE[2], model=SCRIPT
    )
    run = answers[3]
    rows: list[Any] = [run, thread, run.message, run.answer, summary, Reply.objects.all()[0]]
    rows += [RoomEvent.objects.latest("pk"), Room.objects.get(), Session.objects.get()]
    rows += [BotRegistration.objects.get(), BotCommand.objects.get()]
    lists = [re.sub(r"[^/]+/change/$", "", page_of(row)) for row in rows[:6]]
    shown = set()
    for path in [*map(page_of, rows), *lists, "/admin/"]:
        page = looked_at(admin_client, path)
        for each in page.within("cn-assistant"):
            shown.add(each.tag)
            assert each.tag != "a" or "nofollow" in each.attributes["rel"]

    assert {"p", "a", "code", "table"} < shown <= PAGE_TAGS


def test_what_a_room_is_told_is_harmless_and_calls_nobody(answers: list[Run]) -> None:
    parts = [part for reply in Reply.objects.order_by("pk") for part in reply.parts]
    assert len(parts) == len(answers)
    for part in [*parts, *(rendering.edit_of("$1", part) for part in parts)]:
        new = part.get("m.new_content", part)
        for content in (part, new):
            parsed = Parsed(content["formatted_body"])
            assert parsed.tags <= TAGS
            assert not faults(content["formatted_body"], apart=False)
            assert parsed.attributes <= {"href", "start", "class", "data-mx-maths"}
            assert content["m.mentions"] == {}
            assert not re.search("[\u202a-\u202e\u2066-\u2069]", content["body"])
    assert "@room" in parts[-1]["body"]


@pytest.mark.django_db
def test_the_api_tells_it_as_data_that_no_browser_takes_for_a_page(model: FakeLLM) -> None:
    model.script(llm.Reply(SCRIPT))
    run = factories.ask("Hello")
    execution.execute(run.pk)
    browser = Client()
    for path in (
        f"/api/chat/runs/{run.pk}",
        f"/api/chat/threads/{run.thread_id}/messages",
        f"/api/runs/{run.pk}?include=answer",
    ):
        response = browser.get(path, headers={"Accept": "text/html,application/json"})
        assert SCRIPT in response.text
        assert response["Content-Type"] in ("application/json", "application/vnd.api+json")
        assert response["X-Content-Type-Options"] == "nosniff"


@pytest.mark.django_db
def test_a_spreadsheet_finds_no_formula(sign_in: SignIn) -> None:  # noqa: F811
    texts = [
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "  =1",
        "＝1",  # noqa: RUF001
        'a "quoted", text\nline',
    ]
    for text in texts:
        Message.objects.filter(pk=factories.ask().message_id).update(content=text)

    rows = exported(sign_in("Operator"), "/admin/chat/message/")

    shown = {row["preview"] for row in rows}
    assert shown == {f"'{text}" for text in texts[:-1]} | {texts[-1]}


def ours(pattern: str) -> list[Path]:
    found = [
        path
        for path in ROOT.rglob(pattern)
        if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks", "scripts")
        and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]
    assert found
    return found


def test_nothing_is_marked_safe_but_what_was_sanitised() -> None:
    marked = {
        (str(path.relative_to(ROOT)), ast.unparse(call.args[0]))
        for path in ours("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and getattr(call.func, "id", getattr(call.func, "attr", "")) in ("mark_safe", "SafeString")
    }

    assert marked == {
        ("chat/templatetags/chat.py", "budget_of(context['request']).html(text)"),
        ("console/templatetags/pages.py", "rendering.budget_of(context['request']).html(text)"),
        # The picture of a second factor's address.
        ("console/login.py", "svg[svg.index('<svg'):]"),
    }


def test_no_template_and_no_script_takes_text_for_markup() -> None:
    escapes = re.compile(r"\|\s*safe\b|\|\s*safeseq|autoescape\s+off")
    assert not [path for path in ours("*.html") if escapes.search(path.read_text())]
    writes = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|\beval\("
    )
    assert not [path for path in ours("*.js") if writes.search(path.read_text())]
