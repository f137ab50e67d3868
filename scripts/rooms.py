"""Start the Matrix side of the local stack once its pages answer: a homeserver and the bot runner.

Run by the stack itself, once per start. Synapse is installed first where it is missing. A failure is
reported in one line; the rest of the stack does not depend on it.
"""

import configparser
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
import xmlrpc.client
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import homeserver
import ready
from redis import Redis
from redis.exceptions import RedisError
from supervisor.xmlrpc import SupervisorTransport

from lib import redis as connections

PATIENCE_SECONDS = 60
CONFIG = Path(os.environ["STACK_DIR"]) / "supervisord.conf"
# The command of `make run` that installs Synapse, or only checks that it is up to date.
INSTALL = shlex.split(os.environ.get("STACK_INSTALL_HOMESERVER", ""))


def main() -> None:
    # By an exception, so that the installation ends as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    wait_for_pages()
    if os.environ["STACK_HOMESERVER"] == "true":
        install()
        print("Starting the homeserver", flush=True)
        start("homeserver")
        wait_for_homeserver(os.environ["MATRIX_URL"])
        print("Logging the bot in", flush=True)
    start("bot")
    known = ready.settings()
    redis = connections.from_environment(os.environ).client(timeout=2)
    wait_for_bot(redis, known["stream"], known["bot_group"])
    print("Matrix rooms ready. To see the bot answer: .venv/bin/python manage.py matrix_demo")


def wait_for_pages() -> None:
    """Wait until the web server answers, for a minute at most: the rooms must not delay it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while ready.web_problem(ready.PORT) and time.monotonic() < deadline:
        time.sleep(0.2)


def install() -> None:
    """Run the command that installs Synapse. Exits where there is none afterwards."""
    if INSTALL:
        subprocess.run(INSTALL, check=False, env=environment())
    importlib.invalidate_caches()
    if not importlib.util.find_spec("synapse"):
        print("No Matrix rooms, as Synapse is not installed. The next start tries again.")
        sys.exit()


def environment() -> dict[str, str]:
    """Return this environment without the variables of the `make` that started the stack."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


def start(program: str) -> None:
    config = configparser.RawConfigParser()
    config.read(CONFIG)
    url = config.get("supervisorctl", "serverurl").replace("%(here)s", str(CONFIG.parent))
    transport: Any = SupervisorTransport(None, None, url)
    with xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport) as proxy:
        proxy.supervisor.startProcess(program, False)


def wait_for_homeserver(url: str) -> None:
    while not homeserver.is_healthy(url):
        time.sleep(0.2)


def wait_for_bot(redis: Redis, stream: str, group: str) -> None:
    """Wait until the bot has logged in; mention it once if that takes long."""
    patience_ends: float | None = time.monotonic() + PATIENCE_SECONDS
    while not bot_listens(redis, stream, group):
        if patience_ends is not None and time.monotonic() > patience_ends:
            patience_ends = None
            print("The bot is not in its Matrix rooms yet; its lines above show why.", flush=True)
        time.sleep(0.2 if patience_ends else 1)


def bot_listens(redis: Redis, stream: str, group: str) -> bool:
    """Return whether the bot runner has logged in: its group on the stream lasts as long as it runs."""
    try:
        groups = redis.xinfo_groups(stream)
    except RedisError:
        return False
    return any(each["name"] == group.encode() for each in groups)


if __name__ == "__main__":
    main()
