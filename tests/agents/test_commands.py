"""What a run carries out: the table of commands, and webhooks."""

import hashlib
import hmac
import json
from typing import Any

import pytest

from agents import inbox
from agents.llm import completions
from agents.models import Run
from agents.runs import execution, http_commands
from realm import commands
from tests.factories import ask, conversation
from tests.fakes.receiver import Receiver

SECRET = "a-secret-of-at-least-thirty-two-characters"
HOOK = "https://hooks.example.org/run"


def test_known_commands() -> None:
    assert {"chat.reply", "chat.summarize", "ping"} <= set(commands.known())
    for name in commands.known():
        commands.check(name)


@pytest.mark.parametrize("name", ["", "nope", "http://hooks.example.org/", HOOK, "https://"])
def test_unknown_commands_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(commands.UnknownCommand, match=r"chat\.reply, chat\.summarize, ping"):
        commands.check(name)


def test_an_allowed_host_may_be_called(settings: Any) -> None:
    settings.AGENT_WEBHOOK_HOSTS = ["hooks.example.org", "*.example.com"]
    for url in (HOOK, "https://HOOKS.example.org:443/x?y=1", "https://a.example.com/"):
        commands.check(url)
    assert "https://*.example.com/..." in commands.known()
    for url in (
        "https://example.com/",
        "https://hooks.example.org.evil.example/",
        "https://hooks.example.org@evil.example/",
        "https://user:password@hooks.example.org/",
        "https://hooks.example.org\\@evil.example/",
        "https://hooks.example.org:99999/",
        "https://hooks.example.org:8443/",
        "https://hooks.example.org /",
        "ftp://hooks.example.org/",
    ):
        with pytest.raises(commands.UnknownCommand):
            commands.check(url)


@pytest.mark.django_db
def test_ping_needs_no_model() -> None:
    run = ask("anything", command="ping")
    execution.execute(run.pk)
    run.refresh_from_db()
    assert run.answer is not None
    assert run.answer.content == "pong"


@pytest.mark.django_db
def test_a_summary_is_of_what_was_said_before(model: Any) -> None:
    thread = conversation(2)
    run = ask("summarise", thread_id=thread.pk, command="chat.summarize")
    execution.execute(run.pk)
    prompt = model.requests[0].last_user
    assert "question 1" in prompt
    assert "answer 0" in prompt
    assert Run.objects.get(pk=run.pk).status == Run.Status.COMPLETED


@pytest.mark.django_db
def test_a_summary_of_nothing_asks_no_model(model: Any) -> None:
    run = ask("summarise", command="chat.summarize")
    execution.execute(run.pk)
    assert Run.objects.get(pk=run.pk).answer.content == "There are no messages here yet."
    assert not model.requests


@pytest.mark.django_db
def test_a_command_that_was_taken_away_fails_its_runs() -> None:
    run = ask("x", command="gone")
    execution.execute(run.pk)
    run.refresh_from_db()
    assert (run.status, run.error_code) == (Run.Status.FAILED, "unknown_command")


@pytest.mark.django_db
def test_an_edit_before_the_run_starts_is_what_it_answers_and_a_later_one_is_kept() -> None:
    run = ask("first")
    assert inbox.edit(run.pk, content="second")
    run.message.refresh_from_db()
    assert run.message.content == "second"
    execution.execute(run.pk)
    assert Run.objects.get(pk=run.pk).answer.content == "Handled prompt: second"
    assert inbox.edit(run.pk, content="third")
    run.message.refresh_from_db()
    assert run.message.content == "third"


@pytest.fixture
def receiver(https_receiver: type[Receiver], settings: Any) -> type[Receiver]:
    settings.AGENT_WEBHOOK_HOSTS = ["hooks.example.org"]
    settings.AGENT_WEBHOOK_SECRET = SECRET
    return https_receiver


def post(**options: Any) -> str:
    return http_commands.post(
        HOOK, {"input": 1}, key="run_1", options=completions.CallOptions(**options)
    )


def test_the_event_is_posted_signed_and_its_answer_is_the_reply(receiver: type[Receiver]) -> None:
    assert post() == "done"
    [(headers, body)] = receiver.seen
    assert json.loads(body) == {"input": 1}
    assert headers["Host"].startswith("hooks.example.org")
    assert headers["Idempotency-Key"] == "run_1"
    seconds, signature = (
        part[2:].lstrip("=") for part in headers["X-Botrealm-Signature"].split(",")
    )
    message = seconds.encode() + b"." + body
    assert signature == hmac.new(SECRET.encode(), message, hashlib.sha256).hexdigest()


@pytest.mark.parametrize(
    ("answer", "code", "permanent"),
    [
        ((503, b""), "webhook_failed", False),
        ((429, b""), "webhook_failed", False),
        ((403, b""), "webhook_refused", True),
        ((302, b""), "webhook_refused", True),
        ((200, b"not json"), "webhook_unreadable", True),
        ((200, b'{"reply": 1}'), "webhook_unreadable", True),
        ((200, b'"' + b"x" * 300_000 + b'"'), "webhook_too_long", True),
    ],
)
def test_other_answers_are_failures(
    receiver: type[Receiver], answer: Any, code: str, permanent: bool
) -> None:
    receiver.answer = answer
    with pytest.raises(completions.LLMError) as caught:
        post()
    assert (caught.value.code, caught.value.permanent) == (code, permanent)
    assert len(receiver.seen) == 1  # no redirect is followed


@pytest.mark.parametrize("trickles_head", [False, True])
def test_a_webhook_that_trickles_is_given_up(
    receiver: type[Receiver], settings: Any, trickles_head: bool
) -> None:
    receiver.pause, receiver.trickles_head = 0.05, trickles_head
    settings.AGENT_WEBHOOK_TIMEOUT_SECONDS = 0.3
    with pytest.raises(completions.LLMError, match="did not answer"):
        post()


def test_a_certificate_for_another_name_is_refused(receiver: type[Receiver], settings: Any) -> None:
    settings.AGENT_WEBHOOK_HOSTS = ["*"]
    with pytest.raises(completions.LLMError, match="did not answer"):
        http_commands.post(
            "https://other.example.org/", {}, key="x", options=completions.CallOptions()
        )
    assert not receiver.seen


@pytest.mark.django_db
def test_a_run_may_fire_a_webhook(receiver: type[Receiver]) -> None:
    run = ask("go", command=HOOK, input={"sender": "@alice:localhost"})
    execution.execute(run.pk)
    run.refresh_from_db()
    assert run.answer is not None
    assert run.answer.content == "done"
    assert json.loads(receiver.seen[0][1])["input"] == {"sender": "@alice:localhost"}
    assert run.steps.get().name == HOOK
