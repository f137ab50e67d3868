"""The local stack, found by what it has written down."""

import ast
import fcntl
import re
from collections.abc import Iterator
from pathlib import Path

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


def test_the_stack_has_the_same_ports() -> None:
    source = (settings.BASE_DIR / "scripts" / "stack.py").read_text()
    [ports] = re.findall(r"^PORTS = (\[.*\])$", source, re.MULTILINE)
    assert dict(ast.literal_eval(ports)) == local.PORTS
