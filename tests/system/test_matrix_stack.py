"""The local stack with its Matrix side: a real homeserver, and the bot runner in its rooms."""

import json
import os
import re
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress

import pytest

from scripts import homeserver
from tests import synapse
from tests.system.stack import BASE_DIR, Stack

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not synapse.installed(), reason="matrix-synapse is not installed"),
]


@pytest.fixture(scope="module")
def stack(database: dict[str, str]) -> Iterator[Stack]:
    with Stack(STACK_MATRIX="true", DEBUG="true", **database) as stack:
        stack.wait("the bot to listen", lambda: "Matrix rooms ready" in stack.log(), 180)
        yield stack  # whatever is left running afterwards is an error


def run(stack: Stack, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=BASE_DIR,
        env=stack.env | env,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def manage(stack: Stack, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run(stack, sys.executable, "manage.py", *arguments, **env)


def test_both_ports_lead_to_the_server(stack: Stack) -> None:
    for port in (stack.port, stack.realm_port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=60) as answer:
            assert json.load(answer) == {"ok": True, "message": "API is running"}


def test_the_last_lines_tell_how_to_log_in_and_nobody_else_may_read_it(stack: Stack) -> None:
    told = stack.directory / "demo.json"
    password = json.loads(told.read_text())["password"]

    assert f"user demo, password {password}" in stack.log()
    for path in (
        told,
        stack.directory / "homeserver/homeserver.yaml",
        stack.directory / "homeserver/demo-password",
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_metrics_are_none_of_the_homeservers(stack: Stack) -> None:
    with urllib.request.urlopen(f"{stack.url}/metrics", timeout=60) as answer:
        told = answer.read().decode()

    assert "botrealm_" in told
    assert "synapse_" not in told


def test_what_the_processes_write_is_for_their_owner_alone(stack: Stack) -> None:
    written = {}
    for path in stack.directory.rglob("*"):
        with suppress(FileNotFoundError):  # as journals come and go
            mode = path.stat().st_mode
            if stat.S_ISREG(mode) and path.name != "output.log":  # of the tests
                written[path.relative_to(stack.directory).as_posix()] = stat.S_IMODE(mode)

    assert "homeserver/homeserver.db" in written
    assert [name for name, mode in written.items() if mode & 0o077] == []


def test_the_demo_works_and_works_again(stack: Stack) -> None:
    for question in ("Is it Monday?", "And tomorrow?"):
        done = manage(stack, "matrix_demo", "--message", question)

        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"Handled prompt: {question}"
    assert "Found the bot registration" in done.stdout


def test_the_demo_says_what_is_wrong(stack: Stack) -> None:
    wrong_password = manage(stack, "matrix_demo", "--password", "wrong")
    no_homeserver = manage(stack, "matrix_demo", "--matrix-url", "http://127.0.0.1:1")

    assert wrong_password.returncode == no_homeserver.returncode == 1
    assert "The homeserver returned 403" in wrong_password.stderr
    assert "The homeserver at http://127.0.0.1:1" in no_homeserver.stderr
    assert "Traceback" not in wrong_password.stderr + no_homeserver.stderr


def test_the_bot_runner_is_registered_and_unregistered_as_the_document_types_it(
    stack: Stack,
) -> None:
    token = manage(stack, "realm_token", "@bot-runner:localhost", "--create").stdout.strip()
    registered = run(
        stack,
        "scripts/register-bot.sh",
        REALM_SERVER_URL=f"http://localhost:{stack.realm_port}",
        REALM_SERVER_JWT=token,
        USERNAME="@bot-runner:localhost",
    )
    assert registered.returncode == 0, registered.stderr
    bot_id = json.loads(registered.stdout)["data"]["id"]

    assert bot_id in _realm(stack, token, "GET", "/_bot-registrations")
    body = {"data": {"type": "bot-registration", "id": bot_id}}
    assert _realm(stack, token, "DELETE", "/_bot-registration", body) == ""
    assert bot_id not in _realm(stack, token, "GET", "/_bot-registrations")


def test_a_dead_homeserver_and_a_dead_bot_come_back(stack: Stack) -> None:
    stack.wait_restarted("homeserver", stack.kill("homeserver"))
    url = json.loads((stack.directory / "demo.json").read_text())["matrix_url"]
    stack.wait("the homeserver to answer", lambda: homeserver.is_healthy(url), 180)
    # The demonstration has less patience with the bot than a busy machine may ask for.
    connected = stack.log().count("Connected")
    stack.wait_restarted("bot", stack.kill("bot"))
    stack.wait("the bot", lambda: stack.log().count("Connected") > connected, 180)
    done = manage(stack, "matrix_demo")

    assert done.returncode == 0, f"{done.stderr}\n{stack.log()[-5000:]}"
    users = re.findall(r"Logged in as (\S+), device (\S+)", stack.log())
    assert len(users) == 1  # the bot went on with its device


def test_a_homeserver_that_is_given_is_used_and_none_is_started(stack: Stack) -> None:
    given = json.loads((stack.directory / "demo.json").read_text())["matrix_url"]
    with Stack(STACK_MATRIX="true", MATRIX_URL=given, BOT_RUNNER_PASSWORD="wrong") as other:
        refusal = "refused BOT_RUNNER_USERNAME and BOT_RUNNER_PASSWORD"
        other.wait("the refusal", lambda: refusal in other.log(), 180)
        other.wait("the last block", lambda: f"Matrix {given}, as bot-runner" in other.log(), 180)
        assert other.pid("homeserver") == 0
        assert other.pid("web")
        assert not os.path.exists(other.directory / "homeserver")


def _realm(stack: Stack, token: str, method: str, path: str, body: object = None) -> str:
    request = urllib.request.Request(
        f"http://localhost:{stack.realm_port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        method=method,
        headers={
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/vnd.api+json",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())
