"""What a run carries out: the table of commands, and webhooks."""

import hashlib
import hmac
import http.server
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agents import commands, inbox, llm, runs, webhooks
from agents.models import Run
from agents.webhooks import public_address
from tests.factories import ask, conversation

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
    for url in (HOOK, "https://HOOKS.example.org:8443/x?y=1", "https://a.example.com/"):
        commands.check(url)
    assert "https://*.example.com/..." in commands.known()
    for url in (
        "https://example.com/",
        "https://hooks.example.org.evil.example/",
        "https://hooks.example.org@evil.example/",
        "https://user:password@hooks.example.org/",
        "https://hooks.example.org\\@evil.example/",
        "https://hooks.example.org:99999/",
        "https://hooks.example.org /",
        "ftp://hooks.example.org/",
    ):
        with pytest.raises(commands.UnknownCommand):
            commands.check(url)


@pytest.mark.django_db
def test_ping_needs_no_model() -> None:
    run = ask("anything", command="ping")
    runs.execute(run.pk)
    run.refresh_from_db()
    assert run.answer is not None
    assert run.answer.content == "pong"


@pytest.mark.django_db
def test_a_summary_is_of_what_was_said_before(model: Any) -> None:
    thread = conversation(2)
    run = ask("summarise", thread_id=thread.pk, command="chat.summarize")
    runs.execute(run.pk)
    prompt = model.requests[0].last_user
    assert "question 1" in prompt
    assert "answer 0" in prompt
    assert Run.objects.get(pk=run.pk).status == Run.Status.COMPLETED


@pytest.mark.django_db
def test_a_summary_of_nothing_asks_no_model(model: Any) -> None:
    run = ask("summarise", command="chat.summarize")
    runs.execute(run.pk)
    assert Run.objects.get(pk=run.pk).answer.content == "Nothing has been said here yet."
    assert not model.requests


@pytest.mark.django_db
def test_a_command_that_was_taken_away_fails_its_runs() -> None:
    run = ask("x", command="gone")
    runs.execute(run.pk)
    run.refresh_from_db()
    assert (run.status, run.error_code) == (Run.Status.FAILED, "unknown_command")


@pytest.mark.django_db
def test_amending_is_for_runs_that_wait() -> None:
    run = ask("first")
    assert inbox.amend(run.pk, content="second")
    run.message.refresh_from_db()
    assert run.message.content == "second"
    runs.execute(run.pk)
    assert not inbox.amend(run.pk, content="third")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "172.16.3.4",
        "192.168.1.1",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)
def test_private_addresses_are_never_called(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, "93.184.215.14", address)
    with pytest.raises(llm.LLMError, match="not on the public network"):
        public_address("hooks.example.org", 443)


def test_public_addresses_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c")
    assert public_address("hooks.example.org", 443) == "93.184.215.14"


def resolve(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    found = [(0, 0, 0, "", (address, 443)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)


class Receiver(http.server.BaseHTTPRequestHandler):
    answer: tuple[int, bytes] = (200, b'{"reply": "done"}')
    pause = 0.0
    seen: list[tuple[dict[str, str], bytes]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((dict(self.headers), body))
        status, answer = self.answer
        self.send_response(status)
        self.send_header("Location", "https://hooks.example.org/elsewhere")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        for piece in [bytes([byte]) for byte in answer] if self.pause else [answer]:
            time.sleep(self.pause)
            self.wfile.write(piece)

    def log_message(self, *args: Any) -> None: ...


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.context = context

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            with self.context.wrap_socket(request, server_side=True) as wrapped:
                super().finish_request(wrapped, client_address)
        except OSError:  # the client did not like the certificate, or the answer
            return


@pytest.fixture
def receiver(
    tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[Receiver]]:
    """A webhook at hooks.example.org, which is this machine for the test."""
    certificate = _certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    Receiver.answer, Receiver.pause, Receiver.seen = (200, b'{"reply": "done"}'), 0.0, []
    server = Server(context)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    settings.AGENT_WEBHOOK_HOSTS = ["hooks.example.org"]
    settings.AGENT_WEBHOOK_SECRET = SECRET
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    monkeypatch.setattr(webhooks, "public_address", lambda host, port: "127.0.0.1")
    monkeypatch.setattr(webhooks, "DEFAULT_PORT", server.server_address[1])
    yield Receiver
    server.shutdown()
    server.server_close()


def _certificate(folder: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hooks.example.org")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("hooks.example.org")]), False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


def post(**control: Any) -> str:
    return webhooks.post(HOOK, {"input": 1}, key="run_1", control=llm.Control(**control))


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
    with pytest.raises(llm.LLMError) as caught:
        post()
    assert (caught.value.code, caught.value.permanent) == (code, permanent)
    assert len(receiver.seen) == 1  # no redirect is followed


def test_a_webhook_that_trickles_is_given_up(receiver: type[Receiver], settings: Any) -> None:
    receiver.pause = 0.05
    settings.AGENT_WEBHOOK_TIMEOUT_SECONDS = 0.3
    with pytest.raises(llm.LLMError, match="did not answer"):
        post()


def test_a_certificate_for_another_name_is_refused(receiver: type[Receiver], settings: Any) -> None:
    settings.AGENT_WEBHOOK_HOSTS = ["*"]
    with pytest.raises(llm.LLMError, match="did not answer"):
        webhooks.post("https://other.example.org/", {}, key="x", control=llm.Control())
    assert not receiver.seen


@pytest.mark.django_db
def test_a_run_may_fire_a_webhook(receiver: type[Receiver]) -> None:
    run = ask("go", command=HOOK, input={"sender": "@alice:localhost"})
    runs.execute(run.pk)
    run.refresh_from_db()
    assert run.answer is not None
    assert run.answer.content == "done"
    assert json.loads(receiver.seen[0][1])["input"] == {"sender": "@alice:localhost"}
    assert run.steps.get().name == HOOK
