"""What an operator does after an outage of the model: ask again for all that failed, and watch."""

import re
import subprocess
import sys
import time

import httpx2
import pytest

from tests.system.stack import BASE_DIR, Stack

pytestmark = pytest.mark.system
RUNS = 250  # so many that there is time to kill in the middle
SEED = f"""
from django.contrib.auth import get_user_model
from agents.models import Run
from chat.models import Message, Thread
get_user_model().objects.create_superuser("root", password="correct horse battery")
threads = Thread.objects.bulk_create([Thread(turns=1) for _ in range({RUNS})])
messages = Message.objects.bulk_create(
    [Message(thread=t, position=0, role="user", content="Hello") for t in threads]
)
Run.objects.bulk_create([
    Run(thread=m.thread, message=m, position=0, source="http", model="m", status="failed", due_at=None)
    for m in messages
])
"""


def test_hundreds_of_failed_runs_are_asked_for_again_though_the_worker_is_killed() -> None:
    with Stack(DEBUG="true") as stack:
        subprocess.run(
            [sys.executable, "manage.py", "shell", "-v", "0", "-c", SEED],
            cwd=BASE_DIR,
            env=stack.env,
            check=True,
            timeout=180,
        )
        with httpx2.Client(base_url=stack.url, follow_redirects=True, timeout=90) as browser:
            _log_in(browser)
            job = _ask_for_all(browser)
            killed = False
            started, seen = time.monotonic(), set()
            while True:
                text = browser.get(f"/admin/console/bulkjob/{job}/progress/").text
                done = int(re.search(rf": (\d+) of {RUNS}", text).group(1))  # type: ignore[union-attr]
                seen.add(done)
                if "hx-get" not in text:
                    break
                if done >= RUNS // 20 and not killed:
                    old = stack.kill("worker")
                    killed = True
                    stack.wait_restarted("worker", old)
                assert time.monotonic() - started < 300, text
                time.sleep(0.1)
            print(f"{RUNS} in {time.monotonic() - started:.1f} s, seen: {sorted(seen)}")  # noqa: T201
            assert killed
            assert seen - {0, RUNS}, "the progress can be watched"
            assert f"{RUNS} done, 0 skipped" in text
            stack.wait("all runs to be answered", lambda: _completed(browser) == RUNS, 300)


def _log_in(browser: httpx2.Client) -> None:
    browser.get("/admin/login/")
    form = {"username": "root", "password": "correct horse battery", "next": "/admin/"}
    page = browser.post("/admin/login/", data=form | _token(browser))
    assert page.status_code == 200
    assert "Log out" in page.text


def _ask_for_all(browser: httpx2.Client) -> str:
    """Return the id of the bulk job."""
    page = browser.get("/admin/agents/run/?status__exact=failed").text
    first = re.search(r'name="_selected_action" value="(\w+)"', page)
    assert first
    form = {
        "action": "retry_run",
        "select_across": "1",
        "index": "0",
        "_selected_action": first.group(1),
        "reason": "the model was away",
    }
    page = browser.post("/admin/agents/run/?status__exact=failed", data=form | _token(browser))
    found = re.search(r"bulkjob/(\d+)/", str(page.url))
    assert found, page.text[-2000:]
    return found.group(1)


def _token(browser: httpx2.Client) -> dict[str, str]:
    return {"csrfmiddlewaretoken": browser.cookies["csrftoken"]}


def _completed(browser: httpx2.Client) -> int:
    page = browser.get("/admin/agents/run/?status__exact=completed").text
    found = re.search(r"(\d+) runs?\b", page)
    return int(found.group(1)) if found else 0
