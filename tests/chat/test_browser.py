"""The chat page in a real browser, on the real processes."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from tests.chromium import executable
from tests.fakes.llm import Failure, FakeLLM, Hang, Reply, call_tool, held
from tests.security.hostile import HOSTILE
from tests.system.stack import Stack

pytestmark = pytest.mark.system

PATIENCE = 90_000  # milliseconds, on a busy machine
GROUPS = 5
SLOW = Reply(tuple(f"*word{number}* " for number in range(40)), delta_latency=0.1)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = executable()
    if program is None:
        missing = "There is no Chromium: apt install chromium, or name a browser by CHROMIUM."
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=program,
            args=["--disable-gpu", "--disable-background-networking"],
            timeout=PATIENCE,
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def llm() -> Iterator[FakeLLM]:
    with FakeLLM() as server:
        yield server


@pytest.fixture(scope="module")
def stack(browser: Browser, llm: FakeLLM) -> Iterator[Stack]:
    env = {"CHAT_ALLOW_ANONYMOUS": "false", "AGENT_TOOLS": "current_time"}
    with Stack(llm.url, CHAT_ALLOWED_MODELS="gpt-4o-mini,gpt-4o", **env) as running:
        yield running


@pytest.fixture(scope="module")
def session(browser: Browser, stack: Stack) -> Any:
    """That of somebody who has signed in."""
    with window(browser) as page:
        sign_in(page, stack)
        return page.context.storage_state()


def sign_in(page: Page, stack: Stack) -> None:
    page.goto(stack.url)
    page.fill("[name=username]", "admin")
    page.fill("[name=password]", (stack.directory / "admin-password").read_text().strip())
    page.press("[name=password]", "Enter")
    page.wait_for_url(f"{stack.url}/")


@pytest.fixture
def page(browser: Browser, stack: Stack, session: Any, llm: FakeLLM) -> Iterator[Page]:
    """A window at the beginning of a conversation, in which no script fails."""
    llm.reset()
    with window(browser, storage_state=session) as opened:
        problems: list[Any] = []
        opened.on("pageerror", lambda problem: problems.append(problem))
        opened.goto(stack.url)
        yield opened
        assert not problems


@contextmanager
def window(browser: Browser, **options: Any) -> Iterator[Page]:
    with browser.new_context(**options) as context:
        context.set_default_timeout(PATIENCE)
        yield context.new_page()


def ask(page: Page, content: str) -> None:
    page.fill("#message", content)
    page.press("#message", "Enter")


def turn(page: Page, status: str) -> Any:
    """The last question, once its run is in this state."""
    last = page.locator("#turns .turn").last
    expect(last).to_have_attribute("data-status", status)
    return last


def test_answer_streams_as_text_and_ends_as_html(page: Page, llm: FakeLLM) -> None:
    may_end = threading.Event()
    llm.script(call_tool("current_time"), held(SLOW, may_end, 21))
    ask(page, "How late is it?")
    draft = page.locator(".draft")
    expect(draft).to_contain_text("*word1*")
    assert "word39" not in draft.inner_text()
    may_end.set()
    expect(page.locator("h1")).to_have_text("How late is it?")
    expect(page.locator("#thread-list [aria-current=page]")).to_have_text("How late is it?")
    page.locator(".steps summary").click()
    expect(page.locator(".steps li")).to_have_count(3)

    answered = turn(page, "completed")

    expect(answered.locator(".prose em")).to_have_count(40)
    expect(answered.locator(".steps .kind")).to_have_text(["model", "tool", "model"])
    expect(answered.locator(".steps .tokens").last).to_contain_text("out")
    expect(answered).not_to_have_attribute("aria-busy", "true")
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#message")).to_be_focused()


def test_the_keyboard_is_enough(page: Page, llm: FakeLLM) -> None:
    words = ("So far,", " so", " good,", " and more")
    llm.script(Hang(3, Reply(words)), Reply("Done now."))
    page.fill("#message", "One")
    page.press("#message", "Shift+Enter")
    page.keyboard.type("Two")
    page.keyboard.press("Enter")
    expect(page.locator(".prompt p")).to_have_text(re.compile("^One\nTwo$"))
    partial = "So far, so good,"
    expect(page.locator(".draft")).to_have_text(partial)

    page.keyboard.press("Escape")

    stopped = turn(page, "cancelled")
    expect(stopped.locator(".prose")).to_have_text(partial)
    expect(stopped.locator(".state")).to_have_text("Stopped.")
    stopped.get_by_role("button", name="Retry").press("Enter")
    expect(turn(page, "completed").locator(".prose")).to_have_text("Done now.")


def test_failure_is_shown_and_can_be_retried(page: Page, llm: FakeLLM) -> None:
    llm.script(Failure(400, message="internal detail"), Reply("Better."))
    ask(page, "Hello")
    failed = turn(page, "failed")
    expect(failed.locator(".state")).to_have_text("The model refused the request.")
    assert "internal detail" not in page.content()
    failed.get_by_role("button", name="Retry").click()
    expect(turn(page, "completed").locator(".prose")).to_have_text("Better.")


def test_retry_is_shown_with_its_cause_at_once(page: Page, llm: FakeLLM) -> None:
    llm.script(Failure(503, retry_after=3), Reply("Better."))
    ask(page, "Hello")
    # The page fetches the state after five seconds without an event, which is later.
    expect(page.locator(".state")).to_have_text(
        re.compile(r"The model is not available\. Retrying in \d s \(attempt 2 of 5\)\."),
        timeout=4500,
    )
    expect(turn(page, "completed").locator(".prose")).to_have_text("Better.")


def test_model_can_be_chosen(page: Page, llm: FakeLLM) -> None:
    page.select_option("#model", "gpt-4o")
    ask(page, "Hello")
    turn(page, "completed")
    assert llm.requests[0].model == "gpt-4o"
    expect(page.locator("#model")).to_have_value("gpt-4o")


def test_queued_messages_are_answered_in_order(page: Page, llm: FakeLLM) -> None:
    may_end = threading.Event()
    llm.script(held(SLOW, may_end, 21))
    ask(page, "First")
    expect(page.locator(".draft")).not_to_be_empty()
    ask(page, "Second")
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator(".turn .state").last).to_have_text("Queued behind the previous message.")
    may_end.set()
    turn(page, "completed")
    expect(page.locator(".turn[data-status=completed]")).to_have_count(2)


def test_page_reconnects(page: Page, llm: FakeLLM, stack: Stack) -> None:
    llm.script(SLOW)
    ask(page, "Hello")
    expect(page.locator(".draft")).to_contain_text("word3")
    with stack.without("web"):
        expect(page.locator("#notice")).to_have_text("Reconnecting…")
        page.fill("#message", "Meanwhile")
        page.press("#message", "Enter")
        expect(page.locator("#message")).to_have_value("Meanwhile")
    stack.wait_ready()

    expect(page.locator(".turn").first.locator(".prose em")).to_have_count(40)
    expect(page.locator("#notice")).to_have_text("")
    page.press("#message", "Enter")
    expect(page.locator(".turn")).to_have_count(2)
    turn(page, "completed")


def test_unavailable_queue_is_shown(page: Page, llm: FakeLLM, stack: Stack) -> None:
    redis = stack.kill("redis", signal.SIGSTOP)
    try:
        ask(page, "Hello")
        expect(page.locator(".turn .state")).to_contain_text("The queue is unavailable.")
    finally:
        os.kill(redis, signal.SIGCONT)
    turn(page, "completed")


def test_message_of_another_window_appears(
    page: Page, browser: Browser, session: Any, stack: Stack
) -> None:
    ask(page, "Hello")
    turn(page, "completed")
    with window(browser, storage_state=session) as other:
        other.goto(page.url)
        ask(other, "From elsewhere")
        turn(other, "completed")
    expect(turn(page, "completed").locator(".prompt")).to_contain_text("From elsewhere")


def test_draft_survives_a_sign_out(page: Page, stack: Stack) -> None:
    ask(page, "Hello")
    turn(page, "completed")
    page.context.clear_cookies()
    ask(page, "And?")
    expect(page.locator("#notice")).to_contain_text("signed out")
    expect(page.locator("#message")).to_have_value("And?")

    sign_in(page.context.new_page(), stack)

    page.press("#message", "Enter")
    expect(page.locator(".turn")).to_have_count(2)
    turn(page, "completed")
    expect(page.locator("#notice")).to_have_text("")


def test_streaming_page_notices_a_sign_out_in_another_tab(
    browser: Browser, stack: Stack, llm: FakeLLM
) -> None:
    """It says so by itself, and asks no more until it is used again."""
    llm.reset()
    with window(browser) as page:
        sign_in(page, stack)
        with page.expect_response(re.compile(r"/threads/[^/]+/events")):
            ask(page, "Hello")
            turn(page, "completed")
        other = page.context.new_page()
        other.goto(stack.url)

        other.get_by_role("button", name="Sign out").click()

        expect(page.locator("#notice")).to_contain_text("signed out")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_timeout(3000)  # nothing is to happen
        assert asked == []
        sign_in(other, stack)
        ask(page, "And?")
        expect(page.locator(".turn")).to_have_count(2)
        turn(page, "completed")


def test_model_output_runs_and_loads_nothing(page: Page, llm: FakeLLM, stack: Stack) -> None:
    elsewhere: list[str] = []
    ours = urlsplit(stack.url).netloc

    def note(request: Request) -> None:
        if urlsplit(request.url).netloc != ours or request.resource_type == "image":
            elsewhere.append(request.url)

    parts = [HOSTILE[n::GROUPS] for n in range(GROUPS)]
    # By the question, because summaries are asked for as well.
    answers = {
        f"Part {n}": Reply("\n\n".join([*part, f"The end of {n}"])) for n, part in enumerate(parts)
    }
    llm.reset(lambda call: answers.get(call.last_user, Reply("Hello.")))
    ask(page, "Hello")
    turn(page, "completed")
    page.on("request", note)
    page.on("dialog", lambda dialog: elsewhere.append("a dialog"))
    page.evaluate(
        "window.refused = [];"
        "document.addEventListener('securitypolicyviolation', e => refused.push(e.blockedURI))"
    )
    for number in range(GROUPS):
        ask(page, f"Part {number}")
        expect(page.locator(".turn")).to_have_count(number + 2)
        expect(turn(page, "completed").locator(".prose")).to_contain_text(f"The end of {number}")
    # Not only what the page puts in when it comes: also what it is made with.
    refused = page.evaluate("refused")
    page.reload()
    expect(page.locator(".turn").last).to_contain_text(f"The end of {GROUPS - 1}")
    page.evaluate(
        """for (const each of document.querySelectorAll('.prose *')) {
            for (const kind of ['mouseover', 'focus', 'toggle', 'error', 'load']) {
                each.dispatchEvent(new Event(kind, { bubbles: true }));
            }
        }"""
    )

    assert page.title() != "run"
    assert not [url for url in elsewhere if not url.endswith("/icon.svg")]
    assert not refused, "It is the sanitiser that holds, and not the policy alone."
    for kind in ("script", "img", "iframe", "style", "form", "svg", "[id]", "[name]", "[onerror]"):
        assert not page.locator(f".prose {kind}").count()
    assert page.evaluate("document.getElementById('composer').tagName") == "FORM"


def test_content_policy_stops_what_passes_the_sanitiser(page: Page) -> None:
    failures: list[str | None] = []
    page.on("requestfailed", lambda request: failures.append(request.failure))
    arrived: list[str] = []
    page.on("response", lambda response: arrived.append(response.url))
    refused = page.evaluate(
        """async () => {
            const refused = [];
            const note = (event) => refused.push(event.effectiveDirective);
            document.addEventListener('securitypolicyviolation', note);
            const box = document.body.appendChild(document.createElement('div'));
            box.innerHTML = `<img src="http://evil.example/a.png" onerror="document.title='run'">
                <p style="color: red">red</p><iframe src="http://evil.example"></iframe>
                <form action="http://evil.example"><button id="out">out</button></form>`;
            const script = document.createElement('script');
            script.textContent = "document.title = 'run'";
            box.append(script);
            fetch('http://evil.example').catch(() => {});
            document.getElementById('out').click();
            const expected = ['img', 'frame', 'script', 'connect', 'form'];
            const isMissing = kind => !refused.some(each => each.startsWith(kind));
            for (let n = 0; n < 600 && expected.some(isMissing); n++) {
                await new Promise(done => setTimeout(done, 100));
            }
            await new Promise(done => setTimeout(done, 500));
            return refused;
        }"""
    )
    assert set(refused) >= {"img-src", "frame-src", "script-src-elem", "connect-src", "form-action"}
    assert page.title() != "run"
    assert set(failures) <= {"csp"}
    assert not [url for url in arrived if "evil" in url]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(
    browser: Browser, stack: Stack, session: Any, llm: FakeLLM, scheme: Any
) -> None:
    llm.reset()
    wide = "word" * 100
    llm.script(Reply(f"{wide}\n\n```\n{wide}\n```\n\n| {wide} | b |\n| - | - |\n| c | {wide} |"))
    phone = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
    with window(browser, storage_state=session, color_scheme=scheme, **phone) as page:
        page.goto(stack.url)
        page.fill("#message", wide)
        page.press("#message", "Enter")  # begins a line
        page.get_by_role("button", name="Send").tap()
        turn(page, "completed")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor")
            == {"light": "rgb(255, 255, 255)", "dark": "rgb(23, 23, 28)"}[scheme]
        )

        expect(page.locator("#threads")).to_be_hidden()
        page.get_by_role("button", name="Conversations").tap()
        page.locator("#threads").get_by_role("link", name="New conversation").tap()
        page.wait_for_url(f"{stack.url}/")


def test_page_works_without_javascript(
    browser: Browser, stack: Stack, session: Any, llm: FakeLLM
) -> None:
    llm.reset()
    llm.script(Reply("It is **so**.", latency=1))
    with window(browser, storage_state=session, java_script_enabled=False) as page:
        page.goto(stack.url)
        page.fill("#message", "Is it?")
        page.get_by_role("button", name="Send").click()
        page.wait_for_url(f"{stack.url}/threads/**")
        looks = 0
        while page.locator(".turn").get_attribute("data-status") != "completed":
            page.get_by_role("link", name="Refresh").click()
            looks += 1
            assert looks < 1000
        expect(page.locator(".prose strong")).to_have_text("so")

        page.locator("[popovertarget=menu]").click()
        page.fill("#title", "Of being so")
        page.get_by_role("button", name="Rename", exact=True).click()
        expect(page.locator("h1")).to_have_text("Of being so")
        page.locator("[popovertarget=menu]").click()
        page.get_by_text("Delete…").click()
        page.get_by_role("button", name="Delete permanently").click()
        page.wait_for_url(f"{stack.url}/")
        expect(page.locator("#thread-list")).not_to_contain_text("Of being so")


def test_accessibility_tree(page: Page, llm: FakeLLM) -> None:
    """The tree that it reads, with names and roles."""
    llm.script(Reply("Fine."))
    ask(page, "How are you?")
    turn(page, "completed")
    expect(page.locator("body")).to_match_aria_snapshot(
        """
        - navigation "Conversations":
          - link "New conversation"
          - list
        - main:
          - heading "How are you?" [level=1]
          - button "Rename, archive or delete this conversation"
          - log "Messages and answers":
            - article:
              - heading "Message" [level=2]
              - paragraph: How are you?
              - heading "Answer" [level=2]
              - paragraph: Fine.
          - status
          - textbox "Your message"
          - combobox "Model"
          - button "Send"
        """
    )
