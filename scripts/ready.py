"""Wait until the local stack answers, then say what to do with it.

Run by the stack itself, once per start. What is missing after a minute is named; the processes go on
being restarted meanwhile, so the wait goes on as well.
"""

import http
import http.client
import json
import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import homeserver
from redis import Redis
from redis.exceptions import RedisError

from lib import redis as connections

PATIENCE_SECONDS = 60

PORT, REALM_PORT = os.environ["PORT"], os.environ["REALM_SERVER_PORT"]
URL = f"http://localhost:{PORT}"
DEMO = Path(os.environ["STACK_DIR"]) / "demo.json"
BOT_GROUP = os.environ.get("BOT_RUNNER_CONSUMER_GROUP", "").strip() or "bot_runner"
STREAM = os.environ.get("REDIS_STREAM_KEY", "").strip() or "agent_events"


def web_problem(port: str) -> str | None:
    """What keeps the web server from being used, if anything. Probes leave no line in the log."""
    # Neither by name, which may lead to ::1 and somebody else, nor through a proxy, as urllib would.
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


def worker_problem(redis: Redis) -> str | None:
    """What keeps runs from being carried out, if anything."""
    try:
        # The key of the leading worker (agents.events.stream.acquire_leadership). The group's consumers
        # are no proof: before version 7, Redis lists one only once it was given something to do.
        if redis.exists(f"{STREAM}:keeper"):
            return None
    except RedisError as error:
        return f"Redis does not answer ({error})"
    return f"no worker reads the stream {STREAM}"


def problems(redis: Redis) -> list[str]:
    found = (web_problem(PORT), web_problem(REALM_PORT), worker_problem(redis))
    return [problem for problem in found if problem]


def wait(redis: Redis) -> None:
    patience_ends: float | None = time.monotonic() + PATIENCE_SECONDS
    while missing := problems(redis):
        if patience_ends is not None and time.monotonic() > patience_ends:
            patience_ends = None
            print(f"Not ready after {PATIENCE_SECONDS} s: {'; '.join(missing)}.")
            print("The lines above say why. Whatever dies is started again, so it may still come.")
            sys.stdout.flush()
        time.sleep(0.2 if patience_ends else 1)


def account() -> str:
    password = Path(os.environ["STACK_DIR"]) / "admin-password"
    if password.exists():
        return f"user admin, password {password.read_text().strip()}"
    return "with the account that you made (or: .venv/bin/python manage.py createsuperuser)"


def default_model() -> str:
    """The model of a message that names none, as config.settings has it."""
    default = os.environ.get("CHAT_DEFAULT_MODEL", "").strip() or "gpt-4o-mini"
    names = os.environ.get("CHAT_ALLOWED_MODELS", "").split(",")
    allowed = [name.strip() for name in names if name.strip()]
    return default if not allowed or default in allowed else allowed[0]


def model() -> str:
    """Who answers the questions, in one line or two."""
    if any(os.environ.get(name, "").strip() for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL")):
        return f"{default_model()}, where a message names none"
    return (
        "none: every answer is an echo of its question. For a real one set OPENAI_API_KEY, or\n"
        "         OPENAI_BASE_URL for another compatible endpoint, here or in .env, and start again."
    )


def matrix() -> str:
    """Where the rooms are, and how to get in."""
    if not DEMO.exists():
        return "left out"
    told = json.loads(DEMO.read_text())
    if "user" not in told:
        return f"{told['matrix_url']}, as {told['bot']}"
    login = f"{told['matrix_url']}  user {told['user']}, password {told['password']}"
    if told["matrix_url"].endswith(f":{homeserver.PORT}"):
        return login
    return f"{login}\n         (port {homeserver.PORT} was taken by another program)"


def bot_listens(redis: Redis) -> bool:
    """Whether the bot runner has logged in: then it has a group on the stream, which it drops when
    it ends."""
    try:
        groups = redis.xinfo_groups(STREAM)
    except RedisError:
        return False
    return any(group["name"] == BOT_GROUP.encode() for group in groups)


def tell_of_bot(redis: Redis) -> None:
    patience_ends: float | None = time.monotonic() + PATIENCE_SECONDS
    while not bot_listens(redis):
        if patience_ends is not None and time.monotonic() > patience_ends:
            patience_ends = None
            print("The bot is not in its Matrix rooms yet; its lines above say why.", flush=True)
        time.sleep(0.2 if patience_ends else 1)
    print("""The bot listens in its Matrix rooms. To see it asked and answering:

.venv/bin/python manage.py matrix_demo
""")


def main() -> None:
    redis = connections.from_environment(os.environ).client(timeout=2)
    wait(redis)
    print(f"""
Botrealm is ready.

  Chat   {URL}/
  Admin  {URL}/admin/  {account()}
  API    {URL}/api
  Realm  http://localhost:{REALM_PORT}/
  Matrix {matrix()}
  Model  {model()}

Ask something:

curl -X POST {URL}/api/chat/messages \\
  -H "content-type: application/json" \\
  -d '{{"content":"Summarize current state", "model":"{default_model()}"}}'

Read the answer, with the runId that came back:

curl {URL}/api/chat/runs/RUN_ID

Ctrl-C stops everything.
""")
    sys.stdout.flush()
    if DEMO.exists():
        tell_of_bot(redis)


if __name__ == "__main__":
    main()
