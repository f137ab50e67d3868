"""The chat page without a script: what it shows to whom, and its forms."""

import re
from typing import Any

import pytest
from django.core.management import call_command
from django.test import Client
from django.utils import timezone
from redis import Redis

from agents.models import Run, Step, Worker
from agents.runs import actions, execution
from chat.markdown import to_html
from chat.models import Message, Thread
from console.models import AuditEntry
from realm.models import User
from tests.factories import ask, conversation
from tests.fakes.llm import CONTEXT_TOO_LONG, Failure, FakeLLM, Reply, call_tool

pytestmark = pytest.mark.django_db
PASSWORD = "correct horse battery"


@pytest.fixture
def alice() -> User:
    return User.objects.create_user("alice", password=PASSWORD)


@pytest.fixture
def browser(alice: User) -> Client:
    """Alice's."""
    client = Client(enforce_csrf_checks=False)
    client.force_login(alice)
    return client


@pytest.fixture
def stranger() -> Client:
    client = Client()
    client.force_login(User.objects.create_user("charlie"))
    return client


def text_of(page: Any) -> str:
    """The words of it."""
    return " ".join(re.sub(r"<[^>]+>", " ", page.text).split())


def addresses(page: Any, under: str = "/threads/") -> list[str]:
    return [each for each in re.findall(r'href="([^"]+)"', page.text) if each.startswith(under)]


class TestSigningIn:
    @pytest.fixture(autouse=True)
    def _not_for_everybody(self, settings: Any) -> None:
        settings.CHAT_ALLOW_ANONYMOUS = False

    def test_signed_out_user_is_redirected_to_login_and_back(
        self, client: Client, alice: User
    ) -> None:
        thread = ask("Hello", owner=alice).thread_id
        sent = client.get(f"/threads/{thread}")
        assert sent["Location"] == f"/login?next=/threads/{thread}"
        form = client.get(sent["Location"])
        assert form.status_code == 200
        assert "Content-Security-Policy" in form

        data = {"username": "alice", "password": PASSWORD, "next": f"/threads/{thread}"}
        assert client.post("/login", data)["Location"] == f"/threads/{thread}"

        assert client.get(f"/threads/{thread}").status_code == 200
        assert AuditEntry.objects.filter(action="login", name="alice").exists()

    @pytest.mark.parametrize("method", ["get", "post"])
    @pytest.mark.parametrize("path", ["/", "/threads/x", "/runs/x", "/runs/x/retry"])
    def test_every_page_requires_a_sign_in(self, client: Client, method: str, path: str) -> None:
        assert getattr(client, method)(path)["Location"].startswith("/login?next=")

    def test_wrong_password_is_reported(self, client: Client, alice: User) -> None:
        page = client.post("/login", {"username": "alice", "password": "wrong"})
        assert page.status_code == 200
        assert "Please enter a correct" in page.text

    def test_too_many_wrong_passwords_lock_the_name(self, client: Client, alice: User) -> None:
        for _ in range(5):
            client.post("/login", {"username": "alice", "password": "wrong"})
        page = client.post("/login", {"username": "alice", "password": PASSWORD})
        assert page.status_code == 429

    def test_login_redirects_only_to_this_site(self, client: Client, alice: User) -> None:
        data = {"username": "alice", "password": PASSWORD, "next": "https://elsewhere.example/"}
        assert client.post("/login", data)["Location"] == "/"

    def test_login_does_not_redirect_to_itself(self, browser: Client) -> None:
        assert browser.get("/login", {"next": "/login"})["Location"] == "/"

    @pytest.mark.parametrize(
        ("form", "seen"),
        [
            ("/threads/x/change", "/threads/x"),
            ("/threads/x/delete", "/threads/x"),
            ("/runs/x/retry", "/"),
        ],
    )
    def test_late_form_redirects_to_a_page(self, client: Client, form: str, seen: str) -> None:
        assert client.post(form)["Location"] == f"/login?next={seen}"

    def test_sign_out(self, browser: Client) -> None:
        assert browser.get("/").status_code == 200
        assert browser.get("/logout").status_code == 405
        browser.post("/logout")
        assert browser.get("/").status_code == 302


class TestWhoseThreads:
    def test_own_threads_are_listed_most_recent_first(
        self, browser: Client, alice: User, stranger: Client
    ) -> None:
        first = ask("What is **first**?", owner=alice).thread_id
        second = ask("And second?", owner=alice).thread_id
        ask("Nobody's")
        assert addresses(browser.get("/")) == [f"/threads/{second}", f"/threads/{first}"]
        ask("Again", owner=alice, thread_id=first)
        page = browser.get("/")
        assert addresses(page) == [f"/threads/{first}", f"/threads/{second}"]
        assert "What is **first**?" in text_of(page)
        assert not addresses(stranger.get("/"))

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("get", "/threads/{thread}"),
            ("post", "/threads/{thread}"),
            ("post", "/threads/{thread}/change"),
            ("post", "/threads/{thread}/delete"),
            ("get", "/runs/{run}"),
            ("post", "/runs/{run}/cancel"),
            ("post", "/runs/{run}/retry"),
        ],
    )
    def test_threads_of_others_are_hidden(
        self, stranger: Client, client: Client, alice: User, method: str, path: str
    ) -> None:
        run = ask("A secret", owner=alice)
        path = path.format(thread=run.thread_id, run=run.pk)
        for other in (stranger, client):
            page = getattr(other, method)(path, {"content": "Hi", "title": "Mine"})
            assert page.status_code == 404
            assert "secret" not in page.text
        run.refresh_from_db()
        assert (run.status, run.thread.turns, run.thread.title) == ("queued", 1, "")

    def test_list_does_not_start_at_a_thread_of_another(
        self, stranger: Client, alice: User
    ) -> None:
        thread = ask("A secret", owner=alice).thread_id
        assert stranger.get("/", {"older": thread}).status_code == 404

    def test_list_is_paginated(self, browser: Client, alice: User) -> None:
        threads = [ask(f"Question {n}", owner=alice).thread_id for n in range(65)][::-1]
        seen: list[str] = []
        path: str | None = "/"
        while path:
            page = browser.get(path)
            seen += addresses(page)
            more = re.search(r'id="older"[^>]* href="([^"]+)"', page.text)
            path = "/" + more[1].replace("&amp;", "&") if more else None
        assert seen == [f"/threads/{each}" for each in threads]


class TestAConversation:
    def test_answer_is_shown_with_its_steps(
        self, browser: Client, alice: User, model: FakeLLM, settings: Any
    ) -> None:
        settings.AGENT_TOOLS = ["current_time"]
        model.script(call_tool("current_time"), Reply("It is **late**.\n\n```python\nx < 1\n```"))
        run = ask("How late is it?\n<b>Tell</b> me", owner=alice)
        execution.execute(run.pk)
        for path in (f"/threads/{run.thread_id}", f"/runs/{run.pk}"):
            page = browser.get(path)
            assert "How late is it?\n&lt;b&gt;Tell&lt;/b&gt; me" in page.text
            assert "<p>It is <strong>late</strong>.</p>" in page.text
            assert '<pre data-language="python"><code class="language-python">' in page.text
            assert '<span class="o">&lt;</span>' in page.text
            kinds = re.findall(r'class="kind">(\w*)<', page.text)
            assert [kind for kind in kinds if kind] == ["model", "tool", "model"]
            run.refresh_from_db()
            assert f"{run.prompt_tokens + run.completion_tokens} tokens" in text_of(page)

    def test_long_thread_is_paginated(self, browser: Client, alice: User) -> None:
        thread = conversation(50, thread=Thread.objects.create(owner=alice))
        seen: list[str] = []
        path: str | None = f"/threads/{thread.pk}"
        while path:
            page = browser.get(path)
            seen = re.findall(r"<p>(question \d+)</p>", page.text) + seen
            more = re.search(r'id="earlier"[^>]* href="([^"]+)"', page.text)
            path = f"/threads/{thread.pk}{more[1]}" if more else None
        assert seen == [f"question {n}" for n in range(50)]

    def test_reasoning_is_folded_and_a_cut_answer_is_marked(
        self, browser: Client, alice: User, model: FakeLLM
    ) -> None:
        thinking = "<think>Depots <b>rarely</b> sleep." + " and" * 3000 + "</think>It is"
        model.script(Reply(thinking, finish_reason="length"))
        run = ask("Is it open?", owner=alice)
        execution.execute(run.pk)
        page = browser.get(f"/threads/{run.thread_id}").text

        folded = page[page.index('<details class="reasoning">') : page.index('<div class="prose">')]
        assert "Depots &lt;b&gt;rarely&lt;/b&gt; sleep. and" in folded
        assert "and …" in folded
        assert len(folded) < 5000
        assert "The answer was cut off at the output limit." in page
        assert Message.objects.get(role="assistant").content == "It is"

        Message.objects.filter(role="assistant").update(redacted_at=timezone.now())
        assert "Depots" not in browser.get(f"/threads/{run.thread_id}").text

    def test_long_thread_takes_no_more_queries(
        self, browser: Client, alice: User, django_assert_max_num_queries: Any
    ) -> None:
        thread = conversation(40, thread=Thread.objects.create(owner=alice))
        for run in Run.objects.all():
            Step.objects.create(run=run, attempt=1, kind="model", name="m", duration_ms=1)
        with django_assert_max_num_queries(9):
            browser.get(f"/threads/{thread.pk}")

    @pytest.mark.parametrize("cancelled", [False, True])
    def test_page_of_long_turns_is_shorter_and_loses_none(
        self, browser: Client, alice: User, cancelled: bool
    ) -> None:
        thread = conversation(5, thread=Thread.objects.create(owner=alice))
        Message.objects.filter(thread=thread, role="assistant").update(content="x " * 800_000)
        if cancelled:  # what they had said by then is shown
            for run in Run.objects.all():
                step = {
                    "kind": "model",
                    "name": "m",
                    "duration_ms": 1,
                    "output": run.answer.content,
                }
                Step.objects.create(run=run, attempt=run.attempt, **step)
            Run.objects.update(status="cancelled", answer=None)
            Message.objects.filter(thread=thread, role="assistant").delete()
        path: str | None = f"/threads/{thread.pk}"
        seen: list[list[str]] = []
        while path:
            page = browser.get(path)
            seen.insert(0, re.findall(r"<p>(question \d)</p>", page.text))
            more = re.search(r'id="earlier"[^>]* href="([^"]+)"', page.text)
            path = f"/threads/{thread.pk}{more[1]}" if more else None
            assert page.text.count("x x x ") // 266_000 == len(seen[0])
        assert [len(page) for page in seen] == [1, 2, 2]

    @pytest.mark.parametrize("value", ["x", "-1", "1.5", "²", "9" * 20])
    def test_invalid_turn_is_not_found(self, browser: Client, alice: User, value: str) -> None:
        run = ask("Hello", owner=alice)
        assert browser.get(f"/threads/{run.thread_id}", {"before": value}).status_code == 404

    @pytest.mark.parametrize("edge", ["\0", "a/b", "x" * 65])
    def test_invalid_start_of_the_list_is_not_found(self, browser: Client, edge: str) -> None:
        assert browser.get("/", {"older": edge}).status_code == 404

    def test_failure_is_shown_safely_and_can_be_retried(
        self, browser: Client, alice: User, model: FakeLLM
    ) -> None:
        model.script(CONTEXT_TOO_LONG)
        run = ask("Hello", owner=alice)
        execution.execute(run.pk)
        run.refresh_from_db()
        page = browser.get(f"/threads/{run.thread_id}")
        assert run.safe_error in text_of(page)
        assert "Traceback" not in page.text

        done = browser.post(f"/runs/{run.pk}/retry")

        assert done["Location"] == f"/threads/{run.thread_id}#{run.pk}"
        run.refresh_from_db()
        assert run.status == "queued"

    def test_run_can_be_stopped(self, browser: Client, alice: User) -> None:
        run = ask("Hello", owner=alice)
        assert browser.post(f"/runs/{run.pk}/cancel")["Location"].endswith(f"#{run.pk}")
        page = browser.get(f"/runs/{run.pk}")
        assert "Stopped." in text_of(page)
        assert "Retry" in text_of(page)
        assert browser.post(f"/runs/{run.pk}/cancel").status_code == 302

    def test_partial_answer_of_a_stopped_run_is_shown(self, browser: Client, alice: User) -> None:
        run = ask("Hello", owner=alice)
        execution.claim(run.pk)
        actions.cancel(run)
        run.refresh_from_db()
        Step.objects.create(
            run=run, attempt=run.attempt, kind="model", name="m", output="So *far*", duration_ms=1
        )
        assert "<p>So <em>far</em></p>" in browser.get(f"/runs/{run.pk}").text


class TestWaiting:
    def state(self, browser: Client, run: Run) -> str:
        found = re.search(r'<p class="state">([^<]*)</p>', browser.get(f"/runs/{run.pk}").text)
        assert found
        return found[1]

    def worker(self) -> None:
        now = timezone.now()
        columns = {"concurrency": 1, "started_at": now, "beat_at": now, "read_at": now}
        Worker.objects.create(worker="w", name="w", host="h", pid=1, version="v", **columns)

    def test_state_without_redis(self, browser: Client, alice: User) -> None:
        assert self.state(browser, ask("Hi", owner=alice)).startswith("The queue is unavailable.")

    def test_state_without_workers(self, browser: Client, alice: User, redis: Redis) -> None:
        assert self.state(browser, ask("Hi", owner=alice)).startswith("No worker is running.")

    def test_state_with_a_worker(self, browser: Client, alice: User, redis: Redis) -> None:
        self.worker()
        first = ask("Hi", owner=alice)
        second = ask("And?", owner=alice, thread_id=first.thread_id)
        assert self.state(browser, first) == "Waiting for a worker."
        assert self.state(browser, second) == "Queued behind the previous message."
        execution.claim(first.pk)
        assert self.state(browser, first) == "Answering."

    def test_state_without_model(
        self, browser: Client, alice: User, redis: Redis, model: FakeLLM
    ) -> None:
        self.worker()
        model.script(Failure(429, retry_after=30))
        run = ask("Hi", owner=alice)
        execution.execute(run.pk)
        state = self.state(browser, run)
        assert re.fullmatch(
            r"The model is overloaded\. Retrying in \d+ s \(attempt 2 of 5\)\.", state
        )


class TestForms:
    def test_message_creates_a_thread(self, browser: Client, alice: User) -> None:
        done = browser.post("/", {"content": " What? ", "model": "gpt-4o"})
        run = Run.objects.get()
        assert done["Location"] == f"/threads/{run.thread_id}#{run.pk}"
        assert (run.model, run.message.content) == ("gpt-4o", "What?")
        assert run.thread.owner == alice

    def test_form_sent_twice_submits_once(self, browser: Client) -> None:
        found = re.search(r'name="key" value="(\w+)"', browser.get("/").text)
        assert found
        data = {"content": "What?", "key": found[1]}
        assert browser.post("/", data)["Location"] == browser.post("/", data)["Location"]
        assert Run.objects.count() == 1

    def test_form_of_another_user_is_rejected(
        self, browser: Client, stranger: Client, client: Client, alice: User
    ) -> None:
        assert f'name="user" value="{alice.pk}"' in browser.get("/").text
        for other in (stranger, client):
            page = other.post("/", {"content": "What?", "user": alice.pk})
            assert page.status_code == 400
            assert "What?</textarea>" in page.text
            sent = {"X-Chat-User": str(alice.pk)}
            answer = other.post(
                "/api/chat/messages", b'{"content": "?"}', "text/plain", headers=sent
            )
            assert answer.status_code == 401
        assert not Run.objects.exists()

    def test_message_continues_a_thread(self, browser: Client, alice: User) -> None:
        first = ask("Hello", owner=alice, model="gpt-4o")
        page = browser.get(f"/threads/{first.thread_id}")
        assert re.search(r'name="model" value="gpt-4o"', page.text), "the model of last time"

        browser.post(f"/threads/{first.thread_id}", {"content": "And?", "model": ""})

        first.thread.refresh_from_db()
        assert first.thread.turns == 2

    def test_rejected_message_stays_as_draft(
        self, browser: Client, alice: User, settings: Any
    ) -> None:
        settings.CHAT_ALLOWED_MODELS = ["gpt-4o-mini"]
        page = browser.post("/", {"content": "A <long> question", "model": "other"})
        assert page.status_code == 400
        assert "not allowed" in page.text
        assert "A &lt;long&gt; question</textarea>" in page.text
        assert not Run.objects.exists()

    def test_allowed_models_are_offered(self, browser: Client, settings: Any) -> None:
        settings.CHAT_ALLOWED_MODELS = ["one", "two"]
        settings.CHAT_DEFAULT_MODEL = "two"
        options = re.findall(r"<option( selected)?>(\w+)</option>", browser.get("/").text)
        assert options == [("", "one"), (" selected", "two")]

    def test_echo_is_announced(self, browser: Client, model: FakeLLM, settings: Any) -> None:
        assert "echo" not in browser.get("/").text
        settings.OPENAI_API_KEY = settings.OPENAI_BASE_URL = ""
        page = browser.get("/").text
        assert "every answer echoes your message" in page
        assert "OPENAI_API_KEY" not in page  # visitors cannot set it
        settings.DEBUG = True
        assert "OPENAI_API_KEY" in browser.get("/").text

    def test_thread_is_renamed_archived_and_unarchived(self, browser: Client, alice: User) -> None:
        thread = ask("Hello", owner=alice).thread
        path = f"/threads/{thread.pk}"
        browser.post(f"{path}/change", {"title": "Of <greetings>"})
        assert "Of &lt;greetings&gt;" in browser.get("/").text

        browser.post(f"{path}/change", {"archived": "true"})
        assert not addresses(browser.get("/"))
        assert addresses(browser.get("/?archived")) == [f"{path}?archived"]
        assert "Archived" in text_of(browser.get(path))

        browser.post(f"{path}/change", {"archived": "false"})
        assert addresses(browser.get("/")) == [path]
        thread.refresh_from_db()
        assert thread.title == "Of <greetings>"

    @pytest.mark.parametrize(
        ("title", "shown"), [("  ", "Hello"), (" a\x00b ", "ab"), ("x" * 300, "x" * 99 + "…")]
    )
    def test_any_title_can_be_shown(
        self, browser: Client, alice: User, title: str, shown: str
    ) -> None:
        path = f"/threads/{ask('Hello', owner=alice).thread_id}"
        assert browser.post(f"{path}/change", {"title": title})["Location"] == path
        assert f"<h1>{shown}</h1>" in browser.get(path).text

    def test_a_thread_is_deleted(self, browser: Client, alice: User) -> None:
        thread = ask("Hello", owner=alice).thread_id
        assert browser.post(f"/threads/{thread}/delete")["Location"] == "/"
        assert not Thread.objects.exists()

    @pytest.mark.parametrize("path", ["/", "/login", "/logout", "/threads/{0}", "/runs/{1}/cancel"])
    def test_cross_site_forms_are_rejected(self, alice: User, path: str) -> None:
        run = ask("Hello", owner=alice)
        client = Client(enforce_csrf_checks=True)
        client.force_login(alice)
        page = client.post(path.format(run.thread_id, run.pk), {"content": "Hi"})
        assert page.status_code == 403
        assert Run.objects.get().status == "queued"

    def test_anonymous_users_may_chat_if_allowed(self, client: Client) -> None:
        client.post("/", {"content": "Hi"})
        thread = Thread.objects.get()
        assert thread.owner is None
        assert addresses(client.get("/")) == [f"/threads/{thread.pk}"]
        assert "Sign in" in text_of(client.get("/"))


class TestSafety:
    @pytest.mark.parametrize("path", ["/", "/threads/{0}", "/runs/{1}", "/login"])
    def test_pages_load_only_own_resources(
        self, client: Client, browser: Client, alice: User, path: str
    ) -> None:
        run = ask("Hello", owner=alice)
        visitor = client if path == "/login" else browser
        page = visitor.get(path.format(run.thread_id, run.pk))
        assert page.status_code == 200
        assert page["Content-Security-Policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
            "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        )
        assert "no-store" in page["Cache-Control"]
        # Which the policy would keep from working.
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src)", page.text)

    def test_links_open_in_a_new_tab(self) -> None:
        html = to_html("[x](https://e.org)", new_tab=True)
        assert 'target="_blank"' in html
        assert 'rel="noopener noreferrer nofollow"' in html

    def test_static_files_exist(self, browser: Client) -> None:
        call_command("findstatic", "chat/page.css", "chat/page.js", "chat/icon.svg", verbosity=0)
