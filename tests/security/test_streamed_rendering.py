"""An answer while it is written, in a browser: chat/page.js with what the server would tell it."""

import json
import mimetypes
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from django.contrib.staticfiles import finders
from django.test import Client
from playwright.sync_api import Page, Route, sync_playwright

from tests import factories
from tests.chromium import executable
from tests.security.hostile import HOSTILE

HERE = "http://chat.test"
END = "That is all."
# A conversation's words, one event to a text: as they come, and each as the answer of another step.
TOLD = [*HOSTILE, "\u202egnp.exe\u202c \u2067a\u2069"]


def frame(number: int, event: str, /, **data: object) -> str:
    return f"id: 1-{number}\nevent: {event}\ndata: {json.dumps(data)}\n\n"


def told() -> str:
    frames = [frame(0, "run.status", status="processing", attempt=1)]
    for number, text in enumerate([*TOLD, END], start=1):
        frames.append(frame(number, "message.delta", step=1, text=text + "\n"))
    named = {"kind": TOLD[0], "name": TOLD[2], "durationMs": 1}
    frames.append(frame(99, "step.finished", step=1, error=TOLD[4], **named))
    return "".join(frames)


@pytest.mark.django_db
def test_what_streams_in_is_text_and_nothing_else() -> None:
    program = executable()
    if program is None:
        missing = "There is no Chromium: apt install chromium, or name a browser by CHROMIUM."
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    run = factories.ask(TOLD[0])
    path = f"/threads/{run.thread_id}"
    page = Client().get(path)
    answers = {
        path: (page.text, dict(page.headers)),
        f"/api/chat/runs/{run.pk}/events": (told(), {"Content-Type": "text/event-stream"}),
    }
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
            route.fulfill(body=body, headers=headers)
        else:
            route.fulfill(status=204)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--disable-gpu"])
        window = browser.new_page()
        window.set_default_timeout(60_000)
        window.route("**/*", answer)
        _look(window, path)
        browser.close()
    assert not elsewhere


def _look(window: Page, path: str) -> None:
    window.add_init_script(
        "window.refused = [];"
        "document.addEventListener('securitypolicyviolation', e => refused.push(e.blockedURI))"
    )
    window.goto(HERE + path)
    draft = window.locator(".draft")
    draft.get_by_text(END).wait_for()
    window.locator(".steps .name").wait_for(state="attached")

    assert window.title() != "run"
    assert window.evaluate("refused") == []
    assert draft.locator("*").count() == 0
    for told_of in (".steps li *", ".question p *"):
        assert window.locator(f"{told_of}:is(script, img, a, style, iframe)").count() == 0
    shown = draft.text_content() or ""
    for text in TOLD[:-1]:
        assert re.sub("[\u202a-\u202e\u2066-\u2069\0]", "", text) in shown.replace("\0", "")
    assert "gnp.exe a" in shown
