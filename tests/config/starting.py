"""Processes that read the settings, without a start of Python for each: one imports what the settings
need of other projects, and forks a child for every environment that is tried."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

Start = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parent.parent.parent
# The modules of the project are imported anew by each child, as the settings are among them.
SERVER = """
import importlib, json, os, sys, traceback
from pathlib import Path

root = Path(sys.argv[1])
before = set(sys.modules)
importlib.import_module("config.settings")
for name in set(sys.modules) - before:
    file = getattr(sys.modules[name], "__file__", None)
    if file and root in Path(file).parents and ".venv" not in file:
        del sys.modules[name]
print("ready", flush=True)
for line in sys.stdin:
    case = json.loads(line)
    pid = os.fork()
    if not pid:
        os.dup2(os.open(case["stdout"], os.O_WRONLY), 1)
        os.dup2(os.open(case["stderr"], os.O_WRONLY), 2)
        os.environ.clear()
        os.environ.update(case["env"])
        status = 0
        try:
            from django.conf import settings
            print(eval(case["expression"]))
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def inherited() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}


class Starter:
    """Evaluates expressions over the settings, each in a process with an environment of its own."""

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(ROOT)],
            env=self._environment({"DEBUG": "true"}),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout
        assert self._server.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.communicate(timeout=60)
        assert self._server.returncode == 0

    def start(self, expression: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """As a Python would do that is started with this environment."""
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / name for name in ("stdout", "stderr")}
            for file in files.values():
                file.touch()
            case: dict[str, Any] = {name: str(file) for name, file in files.items()}
            case |= {"expression": expression, "env": self._environment(environment)}
            assert self._server.stdin
            assert self._server.stdout
            self._server.stdin.write(json.dumps(case) + "\n")
            self._server.stdin.flush()
            status = int(self._server.stdout.readline())
            result = {name: file.read_text() for name, file in files.items()}
        return subprocess.CompletedProcess([expression], status, **result)

    @staticmethod
    def _environment(own: dict[str, str]) -> dict[str, str]:
        ours = {"DJANGO_SETTINGS_MODULE": "config.settings", "PYTHONPATH": str(ROOT)}
        return inherited() | ours | own
