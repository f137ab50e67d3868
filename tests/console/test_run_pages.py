"""The pages that look across the apps: a run, its thread, its room, its registration."""

import html
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin.utils import quote
from django.db import connection
from django.db.models.functions import Now
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from agents.inbox import WhenBusy
from agents.models import Attempt, Event, Run, Step
from agents.runs import actions, execution, memory, outcomes
from botrunner.models import Reply, Room, RoomEvent, Session
from botrunner.outgoing import queue
from chat.models import Thread
from console import trace
from console.models import AuditEntry
from realm.models import BotCommand, BotRegistration
from tests import factories
from tests.botrunner import scenes
from tests.fakes import llm
from tests.fakes.llm import FakeLLM

pytestmark = pytest.mark.django_db
SignIn = Callable[..., Client]


@pytest.fixture
def run() -> Run:
    """One that a room has asked for and that was told there."""
    scenes.command()
    account = scenes.session()
    scenes.take_in(account, scenes.event("What is new?"))
    found = Run.objects.get()
    execution.execute(found.pk)
    queue.compose(account)
    outgoing = queue.next_of(Room.objects.get().pk, "DEVICE")
    assert outgoing
    queue.record_part(outgoing.reply, "$answer:localhost")
    return Run.objects.get()


def url(row: Any) -> str:
    return deed_url(row, "change")


def text_of(client: Client, address: str) -> str:
    response: Any = client.get(address)
    assert response.status_code == 200
    return str(response.content.decode())


def queries_of(client: Client, address: str) -> int:
    client.get(address)  # the reading is in the audit trail then
    with CaptureQueriesContext(connection) as captured:
        assert client.get(address).status_code == 200
    return len(captured)


class TestTrace:
    def test_it_shows_why_the_model_stopped_its_reasoning_and_estimates(
        self, admin_client: Client, model: FakeLLM
    ) -> None:
        body = (
            b'data: {"choices":[{"delta":{"reasoning":"Depots rarely sleep.","content":"It is"},'
            b'"finish_reason":"length"}]}\n\n'
        )
        model.script(llm.Raw(body))
        run = factories.ask()
        execution.execute(run.pk)
        page = text_of(admin_client, url(run))
        assert "<dt>Finish reason</dt><dd>length</dd>" in page
        assert "Depots rarely sleep." in page
        assert "out (estimated)" in page

    def test_it_leads_from_the_registration_to_the_room(
        self, admin_client: Client, run: Run
    ) -> None:
        page = text_of(admin_client, url(run))
        reply = Reply.objects.get()
        for row in (
            run.thread,
            run.message,
            reply.registration,
            BotCommand.objects.get(),
            reply.room,
            reply.message,
            reply,
            *Event.objects.all(),
        ):
            assert f'href="{url(row)}"' in page, row
        assert "https://matrix.to/#/!room/$answer:localhost" in page

    def test_the_first_question_is_turn_1_and_a_reply_delivered_at_once_never_failed(
        self, admin_client: Client, run: Run
    ) -> None:
        page = text_of(admin_client, url(run))

        assert run.turn == 0
        assert "</a>, turn 1<" in page
        assert "<th>Failed attempts</th>" in page

    def test_what_the_model_was_sent_is_what_the_memory_sent(
        self, admin_client: Client, model: FakeLLM
    ) -> None:
        thread = factories.conversation(6)
        Thread.objects.update(summary_due_at=thread.created_at)
        summary = memory.summarise(thread.pk)
        assert summary
        asked = factories.ask("And now?", thread_id=thread.pk)
        execution.execute(asked.pk)

        [sent] = trace.of(Run.objects.get(pk=asked.pk)).inputs
        assert sent.summary == summary
        said = [message.content for message in sent.messages]
        contents = [m["content"] for m in model.requests[-1].messages]
        assert [words.rpartition("</summary>\n\n")[2] for words in contents] == said
        assert ["</summary>" in words for words in contents].count(True) == 1
        assert url(summary) in text_of(admin_client, url(asked))

    def test_attempts_with_the_same_input_share_one_list(
        self, admin_client: Client, model: FakeLLM
    ) -> None:
        model.script(llm.Failure(503), llm.Failure(503), llm.Reply("Here."))
        asked = factories.ask("Where?")
        for _ in range(3):
            Run.objects.update(due_at=Now())
            execution.execute(asked.pk)

        [sent] = trace.of(Run.objects.get(pk=asked.pk)).inputs
        assert sent.attempts == [1, 2, 3]
        page = text_of(admin_client, url(asked))
        assert "Attempts 1, 2, 3: no summary" in page
        assert page.count(">Turn 1, user</a>") == 1

    def test_a_call_of_no_time_has_a_duration(self, admin_client: Client, run: Run) -> None:
        Step.objects.update(kind="tool", name="current_time", duration_ms=0)

        page = text_of(admin_client, url(run))

        assert re.search(r"Tool current_time</span>.*?<span class=\"cn-long\">0 ms<", page, re.S)

    def test_the_time_line_tells_waits_attempts_and_calls(self, model: FakeLLM) -> None:
        asked = factories.ask()
        taken = execution.claim(asked.pk)
        assert taken
        overloaded = execution.completions.LLMError("Busy.", code="overloaded", permanent=False)
        outcomes.fail_or_retry(taken, overloaded, outcomes.EMPTY)
        Run.objects.update(due_at=Now())
        execution.execute(asked.pk)

        found = trace.of(Run.objects.select_related("thread", "message").get())
        [cycle] = found.cycles
        kinds = [span.kind for span in cycle.spans]
        assert kinds.count("wait") == 2
        assert {"retried", "completed", "model"} <= set(kinds)
        assert all(0 <= s.left <= 100 and s.left + s.width <= 100.5 for s in cycle.spans)
        call = next(span for span in cycle.spans if span.kind == "model")
        last = next(span for span in cycle.spans if span.kind == "completed")
        assert call.start >= last.start
        assert call.tokens > 0

    def test_each_time_that_it_was_asked_for_has_a_time_line(self, run: Run) -> None:
        other = factories.ask()
        actions.cancel(other)
        Run.objects.filter(pk=other.pk).update(finished_at=timezone.now())
        actions.retry(other)
        execution.execute(other.pk)
        found = trace.of(Run.objects.select_related("thread", "message", "answer").get(pk=other.pk))
        assert [cycle.number for cycle in found.cycles] == [0, 1]
        assert found.took < 60

    def test_it_says_whom_it_waits_for(self, admin_client: Client) -> None:
        first = factories.ask("one")
        second = factories.ask("two", thread_id=first.thread_id)
        page = text_of(admin_client, url(second))
        assert "Queued behind" in page
        assert first.pk in page

    def test_it_tells_its_deadline_and_which_run_answers_instead(
        self, admin_client: Client
    ) -> None:
        first = factories.ask("one", deadline_seconds=60)
        assert "<dt>Deadline</dt>" in text_of(admin_client, url(first))
        second = factories.ask("two", thread_id=first.thread_id, when_busy=WhenBusy.MERGE)
        page = text_of(admin_client, url(first))
        assert second.pk in page
        assert "a later run that answers its message too" in page
        assert "<dt>Deadline</dt>" not in text_of(admin_client, url(second))

    def test_it_asks_for_news_until_it_is_over(self, admin_client: Client) -> None:
        asked = factories.ask()
        assert "every 2s [!document.hidden]" in text_of(admin_client, url(asked))
        fragment = text_of(admin_client, f"{url(asked)}?live=1")
        assert fragment.lstrip().startswith('<div id="live"')
        assert "<html" not in fragment
        execution.execute(asked.pk)
        asked.events.update(published_at=None)
        assert "every 2s" in text_of(admin_client, f"{url(asked)}?live=1")
        asked.events.update(published_at=timezone.now())
        assert "every 2s" not in text_of(admin_client, f"{url(asked)}?live=1")

    def test_it_costs_the_same_however_much_happened(self, admin_client: Client, run: Run) -> None:
        few = queries_of(admin_client, url(run))
        now = timezone.now()
        for number in range(2, 32):
            Attempt.objects.create(
                run=run, number=number, worker="w", result="retried", started_at=now
            )
            Step.objects.create(
                run=run,
                attempt=number,
                kind="model",
                name="m",
                input={"messages": [str(run.message_id)], "summaryUpTo": number},
                duration_ms=1,
            )
            Event.objects.create(
                run=run, type="agent.run.failed", correlation_id="c", payload={"error": "e"}
            )
            Reply.objects.create(
                run=run,
                cycle=number,
                key=f"k{number}",
                message=RoomEvent.objects.get(),
                room=Room.objects.get(),
            )
        assert queries_of(admin_client, url(run)) <= few + 1  # the summaries
        assert few <= 16

    def test_a_run_of_which_little_is_kept_is_shown(self, admin_client: Client) -> None:
        asked = factories.conversation(1).runs.get()
        assert "completed" in text_of(admin_client, url(asked))

    @pytest.mark.parametrize("run_id", ["run_none", "%00", "_00"])
    def test_an_unknown_run_leads_back(self, admin_client: Client, run_id: str) -> None:
        response: Any = admin_client.get(f"/admin/agents/run/{run_id}/change/")
        assert response.status_code == 302


class TestWhoSeesWhat:
    def test_the_words_of_others_are_hidden_without_the_permission(
        self, sign_in: SignIn, run: Run
    ) -> None:
        client = sign_in("Viewer")
        for address in (url(run), f"{url(run)}?tab=json", f"{url(run)}?live=1", url(run.thread)):
            page = text_of(client, address)
            assert "What is new?" not in page
            assert "••••" in html.unescape(page) or "u2022" in page
        event = RoomEvent.objects.get()
        assert "What is new?" not in text_of(client, url(event))

    def test_reading_them_is_written_down(self, admin_client: Client, run: Run) -> None:
        assert "What is new?" in text_of(admin_client, url(run))
        entry = AuditEntry.objects.get(action="read")
        assert entry.object_id == run.thread_id


class TestActions:
    @pytest.mark.parametrize(
        ("deed", "before", "after"),
        [
            ("cancel", "queued", "cancelled"),
            ("requeue", "processing", "queued"),
            ("retry", "failed", "queued"),
        ],
    )
    def test_an_operator_steers_a_run_and_says_why(
        self, sign_in: SignIn, deed: str, before: str, after: str
    ) -> None:
        asked = factories.ask()
        if before != "queued":
            taken = execution.claim(asked.pk)
            assert taken
            if before == "failed":
                error = execution.completions.LLMError("No.", code="refused", permanent=True)
                outcomes.fail_or_retry(taken, error, outcomes.EMPTY)
        client = sign_in("Operator")
        address = deed_url(asked, deed)
        assert deed.capitalize() in text_of(client, url(asked))

        response: Any = post(client, address, "It is stuck.")

        assert response.headers["HX-Redirect"].endswith("/change/")
        assert Run.objects.get().status == after
        entry = AuditEntry.objects.get(action=deed)
        assert (entry.object_id, entry.reason, entry.result) == (asked.pk, "It is stuck.", "done")

    def test_not_without_a_reason(self, sign_in: SignIn) -> None:
        asked = factories.ask()
        response: Any = post(sign_in("Operator"), deed_url(asked, "cancel"), "")
        assert "required" in response.content.decode()
        assert Run.objects.get().status == "queued"

    def test_looking_at_the_dialog_does_nothing(self, sign_in: SignIn) -> None:
        asked = factories.ask()
        page = text_of(sign_in("Operator"), deed_url(asked, "cancel"))
        assert "Cancel this run?" in page
        assert Run.objects.get().status == "queued"

    @pytest.mark.parametrize("deed", ["cancel", "retry", "requeue"])
    def test_a_viewer_may_not(self, sign_in: SignIn, deed: str) -> None:
        asked = factories.ask()
        client = sign_in("Viewer")
        assert post(client, deed_url(asked, deed)).status_code == 403
        assert "cn-button" not in text_of(client, url(asked))
        assert Run.objects.get().status == "queued"

    def test_what_came_too_late_says_so(self, sign_in: SignIn) -> None:
        asked = factories.ask()
        execution.execute(asked.pk)
        post(sign_in("Operator"), deed_url(asked, "cancel"))
        assert Run.objects.get().status == "completed"
        assert AuditEntry.objects.get(action="cancel").result == "there was nothing to do"

    def test_an_event_is_told_again(self, sign_in: SignIn) -> None:
        factories.ask()
        Event.objects.update(published_at=timezone.now())
        post(sign_in("Operator"), deed_url(Event.objects.get(), "replay"))
        assert Event.objects.unpublished().count() == 1
        assert AuditEntry.objects.filter(action="replay").exists()

    def test_a_registration_is_disabled_and_enabled(self, sign_in: SignIn) -> None:
        registration = scenes.command().registration
        client = sign_in("Operator")
        post(client, deed_url(registration, "disable"), "It is too loud.")
        registration.refresh_from_db()
        assert (registration.enabled, registration.disabled_reason) == (False, "It is too loud.")
        assert "It is too loud." in text_of(client, url(registration))
        post(client, deed_url(registration, "enable"))
        registration.refresh_from_db()
        assert registration.enabled
        assert set(AuditEntry.objects.values_list("action", flat=True)) >= {"enable", "disable"}

    def test_an_admin_deletes_the_conversation_of_a_room(self, sign_in: SignIn) -> None:
        asked = factories.ask(room_id="!room", place="!room")
        address = deed_url(asked.thread, "forget")
        assert post(sign_in("Operator"), address).status_code == 403
        client = sign_in("Admin")
        assert "the room" in text_of(client, url(asked.thread))
        answer = post(client, address, "They asked for it.")
        assert answer.headers["HX-Redirect"] == reverse("admin:chat_thread_changelist")
        assert not Thread.objects.exists()
        entry = AuditEntry.objects.get(action="delete")
        assert (entry.object_id, entry.reason) == (asked.thread_id, "They asked for it.")

    def test_the_bot_tries_at_once_what_waits(self, sign_in: SignIn, run: Run) -> None:
        Reply.objects.update(status="ready", due_at=timezone.now() + timedelta(hours=1))
        post(sign_in("Operator"), deed_url(Session.objects.get(), "try-now"))
        assert Reply.objects.get().due_at is None


def deed_url(row: Any, deed: str) -> str:
    meta = row._meta
    name = deed.replace("-", "_")
    return reverse(f"admin:{meta.app_label}_{meta.model_name}_{name}", args=[quote(row.pk)])


def post(client: Client, address: str, reason: str = "Because.") -> Any:
    given = {"reason": reason, "_form_submitted": "on"}
    return client.post(address, given, headers={"HX-Request": "true"})


class TestThread:
    def test_a_page_of_a_long_one_costs_what_a_short_one_does(self, admin_client: Client) -> None:
        short, long = factories.conversation(3), factories.conversation(300)
        assert queries_of(admin_client, url(short)) == queries_of(admin_client, url(long)) <= 14
        middle = queries_of(admin_client, f"{url(long)}?start=150")
        assert middle == queries_of(admin_client, url(long))

    def test_it_begins_with_the_latest_and_leads_to_the_earlier(self, admin_client: Client) -> None:
        thread = factories.conversation(50)
        latest = text_of(admin_client, url(thread))
        assert "question 49" in latest
        assert "question 29" not in latest
        assert "?upto=29" in latest
        assert "question 29" in text_of(admin_client, f"{url(thread)}?upto=29")
        around = text_of(admin_client, f"{url(thread)}?at=20")
        assert "question 10" in around
        for nonsense in ("?upto=x", "?start=99999999999999", "?start=900", "?at=-1"):
            assert admin_client.get(f"{url(thread)}{nonsense}").status_code == 200

    def test_each_answer_says_where_it_went(self, admin_client: Client, run: Run) -> None:
        page = text_of(admin_client, url(run.thread))
        assert "sent" in page
        assert "$answer" in page

    def test_who_waits_for_whom(self, admin_client: Client) -> None:
        first = factories.ask("one")
        factories.ask("two", thread_id=first.thread_id)
        page = text_of(admin_client, url(first.thread))
        assert page.count("Queued behind") == 1

    def test_its_title_is_shown_to_who_may_read_what_was_said(
        self, admin_client: Client, sign_in: SignIn
    ) -> None:
        thread = factories.ask().thread
        thread.change(title="Secret plans", archived=True)
        viewer = sign_in("Viewer")
        for address in (url(thread), "/admin/chat/thread/"):
            assert "Secret plans" in text_of(admin_client, address)
            assert "Secret plans" not in text_of(viewer, address)
        assert "Archived" in text_of(admin_client, url(thread))


class TestRooms:
    def test_why_an_event_fired_nothing(self, admin_client: Client) -> None:
        scenes.command(prefix="!bot")
        scenes.take_in(scenes.session(), scenes.event("Hello"))
        event = RoomEvent.objects.get()
        page = html.unescape(text_of(admin_client, url(event)))
        assert "Why no command matched" in page
        assert "does not begin with '!bot'" in page
        assert url(BotCommand.objects.get()) in page

    def test_a_registration_tells_what_its_commands_said(self, admin_client: Client) -> None:
        registration = scenes.command(prefix="!bot").registration
        scenes.take_in(scenes.session(), scenes.event("Hello"))
        page = html.unescape(text_of(admin_client, url(registration)))
        assert "does not begin with '!bot'" in page
        assert "a message of type 'm.text' that begins with '!bot'" in page

    def test_the_list_of_registrations_tells_of_the_last_day(
        self, admin_client: Client, run: Run
    ) -> None:
        Reply.objects.create(
            run=run,
            cycle=1,
            key="again",
            message=RoomEvent.objects.get(),
            room=Room.objects.get(),
            registration=BotRegistration.objects.get(),
        )
        [row] = admin_client.get("/admin/realm/botregistration/").context["cl"].result_list
        assert (row.rooms_lately, row.runs_lately, row.failures_lately) == (1, 1, 0)

    @pytest.mark.parametrize("page", ["list", "registration", "event", "room", "bot", "events"])
    def test_a_page_costs_the_same_with_three_rows_and_with_thirty(
        self, admin_client: Client, page: str
    ) -> None:
        account = scenes.session()
        scenes.command()
        counts = []
        for rows in (3, 15):
            for number in range(rows):
                scenes.command(f"@user{rows}-{number}:localhost")
                scenes.command(prefix=f"!{rows}{number}")
                scenes.take_in(account, scenes.event(f"Hello {number}"))
            for asked in Run.objects.unfinished().order_by("position"):
                execution.execute(asked.pk)
            queue.compose(account)
            alice = BotRegistration.objects.get(username=scenes.ALICE)
            address = {
                "list": "/admin/realm/botregistration/",
                "registration": url(alice),
                "event": url(RoomEvent.objects.latest("id")),
                "room": url(Room.objects.get()),
                "bot": url(account),
                "events": "/admin/agents/event/",
            }[page]
            counts.append(queries_of(admin_client, address))
        assert counts[0] == counts[1] <= 14

    def test_the_bots_page_says_that_nobody_works(self, admin_client: Client) -> None:
        account = scenes.session()
        assert "no process" not in text_of(admin_client, url(account))
        Session.objects.update(lease_expires_at=Now() - timedelta(seconds=1))
        assert "manage.py runbot" in text_of(admin_client, url(account))
