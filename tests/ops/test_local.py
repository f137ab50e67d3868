"""The local stack, found by what it has written down."""

import ast
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings

from ops import local


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STACK_DIR", str(tmp_path))
    (tmp_path / "lock").touch()
    (tmp_path / local.SETTINGS_FILE).write_text(
        "REDIS_URL=redis://127.0.0.1:20001\nDATABASE_URL=''\nMATRIX_URL=\nSECRET_KEY='it'\"'\"'s = a'\n"
    )
    return tmp_path


@pytest.fixture
def stack(folder: Path) -> Iterator[local.Stack]:
    with (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = local.running()
        assert found
        yield found


def test_one_that_runs_tells_its_settings(stack: local.Stack, folder: Path) -> None:
    assert stack.folder == folder
    assert stack.environment["REDIS_URL"] == "redis://127.0.0.1:20001"
    assert stack.environment["SECRET_KEY"] == "it's = a"


def test_one_that_was_killed_does_not_run(folder: Path) -> None:
    assert local.running() is None


def test_there_may_be_none(folder: Path) -> None:
    (folder / local.SETTINGS_FILE).unlink()

    assert local.running() is None


@pytest.mark.parametrize(
    ("environment", "is_meant"),
    [
        ({}, True),
        ({"REDIS_URL": " ", "OPENAI_API_KEY": "sk-another"}, True),
        ({"REDIS_URL": "redis://127.0.0.1:20001"}, True),
        ({"REDIS_URL": "redis://redis:6379"}, False),
        ({"DATABASE_URL": "postgres://db/botrealm"}, False),
        ({"MATRIX_URL": "https://matrix.example.org"}, False),
    ],
)
def test_it_is_meant_unless_another_system_is_named(
    stack: local.Stack, environment: dict[str, str], is_meant: bool
) -> None:
    assert stack.is_meant_by(environment) is is_meant


class TestAdopt:
    def test_a_command_gets_the_settings_and_the_folder(self, stack: local.Stack) -> None:
        environment = {"STACK_DIR": str(stack.folder), "REDIS_URL": ""}

        assert local.adopt(environment) == stack
        assert environment["REDIS_URL"] == "redis://127.0.0.1:20001"
        assert environment["SECRET_KEY"] == "it's = a"
        assert environment[local.FOUND] == str(stack.folder)

    def test_what_the_environment_has_wins(self, stack: local.Stack) -> None:
        environment = {"STACK_DIR": str(stack.folder), "SECRET_KEY": "mine"}

        assert local.adopt(environment)
        assert environment["SECRET_KEY"] == "mine"

    def test_another_system_gets_nothing(self, stack: local.Stack) -> None:
        environment = {
            "STACK_DIR": str(stack.folder),
            "DATABASE_URL": "postgres://db/x",
            local.FOUND: "/of/another/command",
        }

        assert local.adopt(environment) is None
        assert environment == {"STACK_DIR": str(stack.folder), "DATABASE_URL": "postgres://db/x"}

    def test_a_relative_folder_starts_at_the_repository(
        self, stack: local.Stack, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
    ) -> None:
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
        monkeypatch.setattr(local, "REPO", stack.folder.parent)

        assert local.adopt({"STACK_DIR": stack.folder.name}) == stack

    @pytest.mark.parametrize("is_newer", [False, True])
    def test_the_stack_overrides_an_older_env_file_only(
        self, stack: local.Stack, monkeypatch: pytest.MonkeyPatch, is_newer: bool
    ) -> None:
        file = stack.folder / ".env"
        file.write_text(f"STACK_DIR={stack.folder}\nREDIS_URL=redis://127.0.0.1:7\n")
        changed = (stack.folder / local.SETTINGS_FILE).stat().st_mtime + (9 if is_newer else -9)
        os.utime(file, (changed, changed))
        monkeypatch.setattr(local, "REPO", stack.folder)

        assert (local.adopt({}) is None) is is_newer


def test_the_stack_has_the_same_ports() -> None:
    source = (settings.BASE_DIR / "scripts" / "stack.py").read_text()
    [ports] = re.findall(r"^PORTS = (\[.*\])$", source, re.MULTILINE)
    assert dict(ast.literal_eval(ports)) == local.PORTS
