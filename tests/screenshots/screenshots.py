"""Photograph the console and the chat page, as `make screenshots` does: a stack of their own, a week of
made-up runs, and the system's Chromium (CHROMIUM names another). The pictures go to docs/images.

    .venv/bin/python -m tests.screenshots.screenshots [NAME ...]
"""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, sync_playwright
from playwright.sync_api import Page as Tab

from tests.chromium import executable
from tests.fakes.llm import FakeLLM, LLMProcess
from tests.screenshots import talk
from tests.system.stack import BASE_DIR, Stack

IMAGES = BASE_DIR / "docs" / "images"
DESKTOP, PHONE = (1280, 900), (390, 844)
# The theme's sidebar scrolls with its window, so a long page is had by a high window.
TALLEST = 1800
MOST_BYTES = 150_000

# What the pictures are of. Run by the stack's own settings, it prints the addresses as JSON.
PICK = """
import json
from django.db.models import F
from django.urls import reverse
from agents.models import Run, Step
from botrunner.models import RoomEvent
from realm.models import BotRegistration

def page(row):
    name = f"admin:{row._meta.app_label}_{row._meta.model_name}_change"
    return reverse(name, args=[row.pk])

runs = Run.objects.select_related("thread").order_by("-created_at")
asked = runs.filter(source="matrix")
failed = asked.filter(status="failed", attempt__gt=2).first() or asked.filter(attempt__gt=2)[0]
talk = asked.filter(thread__turns__range=(3, 5), status="completed")[0]
unanswered = RoomEvent.objects.filter(replies__run__status="failed").order_by("-id")[0]
nothing = RoomEvent.objects.filter(state="ignored").exclude(verdicts=[]).order_by("-id")[0]
print(json.dumps({
    "home": reverse("admin:index") + "?range=7d",
    "runs": reverse("admin:agents_run_changelist") + "?period=7d",
    "run": page(failed),
    "thread": page(talk.thread),
    "registrations": reverse("admin:realm_botregistration_changelist"),
    "registration": page(BotRegistration.objects.order_by("pk")[0]),
    "event-failed": page(unanswered),
    "event": page(nothing),
    "usage": reverse("admin:agents_usage_changelist") + "?by=place&period=yesterday",
    "system": reverse("console_system"),
}))
"""


@dataclass(frozen=True)
class Shot:
    name: str
    of: str
    dark: bool = False
    size: tuple[int, int] = DESKTOP


SHOTS = [
    *(
        Shot(each, each)
        for each in (
            "home",
            "runs",
            "run",
            "thread",
            "registrations",
            "registration",
            "event",
            "event-failed",
            "usage",
            "system",
        )
    ),
    *(Shot(f"{each}-dark", each, dark=True) for each in ("home", "run")),
    *(Shot(f"{each}-phone", each, size=PHONE) for each in ("home", "run")),
]


CHAT_SHOTS = [
    Shot("chat", "answered", size=(1280, 1060)),
    Shot("chat-phone", "answered", size=PHONE),
    Shot("chat-dark", "written", dark=True),
]


def main(names: list[str]) -> None:
    program = executable()
    if program is None:
        sys.exit("There is no Chromium: apt install chromium, or name a browser by CHROMIUM.")
    IMAGES.mkdir(exist_ok=True)
    of_chat = {shot.name for shot in CHAT_SHOTS}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        if not names or of_chat & {*names}:
            of_the_chat_page(browser, names)
        if not names or {*names} - of_chat:
            of_the_console(browser, names)
        browser.close()


def of_the_chat_page(browser: Browser, names: list[str]) -> None:
    models = {"CHAT_ALLOWED_MODELS": "gpt-4o-mini,gpt-4o", "AGENT_TOOLS": "current_time"}
    with FakeLLM(talk.answer) as llm, Stack(llm.url, **models) as stack:
        with opened(browser, stack, Shot("", "")) as tab:
            for question in [*talk.EARLIER, talk.QUESTION]:
                tab.goto(stack.url)
                ask(tab, question)
            ask(tab, talk.NEXT)
            conversation = tab.url
        for shot in CHAT_SHOTS:
            if not names or shot.name in names:
                with opened(browser, stack, shot) as tab:
                    tab.goto(conversation)
                    if shot.of == "written":
                        ask(tab, talk.LAST, until=".draft:has-text('thrown away')")
                    else:
                        tab.locator(".steps summary").last.click()
                    keep(tab, shot.name)


def ask(tab: Tab, question: str, *, until: str = ".turn:last-child[data-status=completed]") -> None:
    tab.fill("#message", question)
    tab.press("#message", "Enter")
    tab.locator(f".turn:last-child:has-text({json.dumps(question[:40])})").wait_for()
    tab.locator(until).wait_for()


def of_the_console(browser: Browser, names: list[str]) -> None:
    with LLMProcess() as llm, Stack(llm.url, CHAT_DEFAULT_MODEL="gpt-4o-mini") as stack:
        llm.configure(latency=0.2)
        run_python(stack, "-m", "tests.benchmarks.demo", "--failing", "0.1")
        pages = json.loads(
            run_python(stack, "manage.py", "shell", "--verbosity", "0", "--command", PICK)
        )
        for shot in SHOTS:
            if not names or shot.name in names:
                with opened(browser, stack, shot) as tab:
                    tab.goto(stack.url + pages[shot.of])
                    photograph(tab, shot.name)
        if not names or "bulk-job" in names:
            with opened(browser, stack, Shot("bulk-job", "runs")) as tab:
                retry_failed(tab, stack)
                photograph(tab, "bulk-job")
        if not names or "cancelled" in names:
            llm.configure(latency=60)
            with opened(browser, stack, Shot("cancelled", "runs")) as tab:
                cancel_running(tab, stack)
                photograph(tab, "cancelled")


def run_python(stack: Stack, *arguments: str) -> str:
    """Run Python with the settings of the stack. Return its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=BASE_DIR,
        # Sample runs require DEBUG.
        env=stack.env | {"REDIS_URL": stack.redis_url, "DEBUG": "true", "LOG_LEVELS": "*=none"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


@contextmanager
def opened(browser: Browser, stack: Stack, shot: Shot) -> Iterator[Tab]:
    """Open a window of a signed-in user."""
    width, height = shot.size
    scheme = "dark" if shot.dark else "light"
    with browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        locale="en-GB",
        timezone_id="UTC",
    ) as context:
        # What the theme's switch writes.
        context.add_init_script(f"localStorage.setItem('adminTheme', '\"{scheme}\"')")
        sign_in(context, stack)
        yield context.pages[0]


def sign_in(context: BrowserContext, stack: Stack) -> None:
    tab = context.new_page()
    tab.goto(f"{stack.url}/admin/")
    tab.fill("[name=username]", "admin")
    tab.fill("[name=password]", (stack.directory / "admin-password").read_text().strip())
    tab.click("#login-form [type=submit]")
    tab.wait_for_url("**/admin/")


def retry_failed(tab: Tab, stack: Stack) -> None:
    """Have all failed runs tried again, and wait until some of them were."""
    tab.goto(f"{stack.url}/admin/agents/run/?status__exact=failed&period=7d")
    tab.check("#action-toggle")
    tab.get_by_role("link", name="Select all").click()
    tab.select_option("select[name=action]", label="Retry")
    tab.click("button[name=index]:visible")
    tab.fill("#reason", "The model was down: ask it again.")
    tab.get_by_role("button", name="Retry").click()
    tab.wait_for_function("document.querySelector('[role=progressbar]').ariaValueNow > 20")


def cancel_running(tab: Tab, stack: Stack) -> None:
    """Ask something that takes long, and end it."""
    asked = {"content": "Count to a million, slowly", "model": "gpt-4o-mini"}
    # Not from the window, whose session would have to prove that it means it.
    answer = httpx2.post(f"{stack.url}/api/chat/messages", json=asked)
    tab.goto(f"{stack.url}/admin/agents/run/{answer.json()['runId']}/change/")
    state = tab.locator("#live .cn-head .cn-state")
    state.get_by_text("processing").wait_for()
    tab.locator(".cn-actions").get_by_text("Cancel").click()
    tab.fill("[name=reason]", "It counts for too long.")
    tab.get_by_role("button", name="Cancel the run").click()
    state.get_by_text("cancelled").wait_for()


def photograph(tab: Tab, name: str) -> None:
    """Photograph a whole page."""
    tab.wait_for_load_state("networkidle")
    tab.evaluate("document.fonts.ready")
    width, height = (tab.evaluate(f"window.inner{side}") for side in ("Width", "Height"))
    # The theme scrolls a part of the page and not the window.
    tall = tab.evaluate(
        "Math.max(...[...document.querySelectorAll('#content, #main, body')]"
        ".map(each => each.getBoundingClientRect().top + each.scrollHeight))"
    )
    tab.set_viewport_size({"width": width, "height": min(max(math.ceil(tall), height), TALLEST)})
    keep(tab, name)


def keep(tab: Tab, name: str) -> None:
    """Photograph the visible part."""
    wide, width = tab.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    if wide > width:
        print(f"{name} is {wide} wide, and its window {width}.", file=sys.stderr)
    path = IMAGES / f"{name}.webp"
    image = Image.open(io.BytesIO(tab.screenshot(animations="disabled"))).convert("RGB")
    image.save(path, lossless=True, method=6)
    if path.stat().st_size > MOST_BYTES:
        sys.exit(f"{path} is larger than {MOST_BYTES} bytes: photograph less of the page.")
    print(f"{path.relative_to(BASE_DIR)}  {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
