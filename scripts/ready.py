"""Wait until the local stack answers, then print how to use it.

Run by the stack itself, once per start. What is missing after a minute is named; the processes are
restarted meanwhile, so the wait continues.
"""

import http
import http.client
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import homeserver
from redis import Redis
from redis.exceptions import RedisError

from lib import redis as connections

PATIENCE_SECONDS = 60

PORT, REALM_PORT = os.environ["PORT"], os.environ["REALM_SERVER_PORT"]
URL = f"http://localhost:{PORT}"
FOLDER = Path(os.environ["STACK_DIR"])
DEMO = FOLDER / "demo.json"


def settings() -> dict[str, Any]:
    """Return the settings that scripts/database.py has written for this start."""
    return dict(json.loads((FOLDER / "settings.json").read_text()))


def web_problem(port: str) -> str | None:
    """Return why the web server cannot be used, if so. Probes leave no line in the log."""
    # By address: the name may lead to ::1 and another program. Without a proxy, which urllib would use.
    web = http.client.HTTPConnection("127.0.0.1", int(port), timeout=5)
    try:
        web.request("GET", "/healthz")
        status = web.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"GET http://localhost:{port}/healthz does not answer ({error})"
    finally:
        web.close()
    if status == http.HTTPStatus.OK:
        return None
    return f"GET http://localhost:{port}/healthz answers {status}"


def worker_problem(redis: Redis, stream: str) -> str | None:
    """Return why runs are not executed, if so."""
    try:
        # The key of the leading worker (agents.events.stream.acquire_leadership). The group's consumers
        # are no proof: before version 7, Redis lists one only once it has received an entry.
        if redis.exists(f"{stream}:keeper"):
            return None
    except RedisError as error:
        return f"Redis does not answer ({error})"
    return f"no worker reads the stream {stream}"


def problems(redis: Redis, stream: str) -> list[str]:
    checks = (web_problem(PORT), web_problem(REALM_PORT), worker_problem(redis, stream))
    return [problem for problem in checks if problem]


def wait(redis: Redis, stream: str) -> None:
    patience_ends: float | None = time.monotonic() + PATIENCE_SECONDS
    while missing := problems(redis, stream):
        if patience_ends is not None and time.monotonic() > patience_ends:
            patience_ends = None
            print(f"Not ready after {PATIENCE_SECONDS} s: {'; '.join(missing)}.")
            print("The lines above show why. Processes that die are restarted; still waiting.")
            sys.stdout.flush()
        time.sleep(0.2 if patience_ends else 1)


def account() -> str:
    password = FOLDER / "admin-password"
    if password.exists():
        return f"user admin, password {password.read_text().strip()}"
    return "with your own account (or: .venv/bin/python manage.py createsuperuser)"


def model(default: str, *, configured: bool) -> str:
    """Return the model that answers, in one line or two."""
    if configured:
        return f"{default}, unless a message names another"
    return (
        "none: every answer is an echo of its message. For a real one set OPENAI_API_KEY, or\n"
        "         OPENAI_BASE_URL for another compatible endpoint, here or in .env, and restart."
    )


def matrix() -> str:
    """Return the address of the rooms and how to log in."""
    if not DEMO.exists():
        return "off"
    demo = json.loads(DEMO.read_text())
    if "user" not in demo:
        return f"{demo['matrix_url']}, as {demo['bot']}"
    login = f"{demo['matrix_url']}  user {demo['user']}, password {demo['password']} (starting)"
    if demo["matrix_url"].endswith(f":{homeserver.PORT}"):
        return login
    return f"{login}\n         (port {homeserver.PORT} is taken by another program)"


def main() -> None:
    known = settings()
    wait(connections.from_environment(os.environ).client(timeout=2), known["stream"])
    print(f"""
Botrealm is ready.

  Chat   {URL}/
  Admin  {URL}/admin/  {account()}
  API    {URL}/api
  Realm  http://localhost:{REALM_PORT}/
  Matrix {matrix()}
  Model  {model(known["model"], configured=known["model_configured"])}

Send a message:

curl -X POST {URL}/api/chat/messages \\
  -H "content-type: application/json" \\
  -d '{{"content":"Summarize current state", "model":"{known["model"]}"}}'

Read the answer, with the runId of the response:

curl {URL}/api/chat/runs/RUN_ID

Ctrl-C stops everything.
""")


if __name__ == "__main__":
    main()
