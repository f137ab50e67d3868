"""Text of models on a terminal."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from hypothesis import given
from hypothesis import strategies as st

from botrunner.management.commands import matrix_demo
from lib.terminal import JOINERS, printable

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ö 中 👍\n\tx", "plain ö 中 👍\n\tx"),
        ("a\u2028b\u2029c", "a\nb\n\nc"),
        ("a\r\nb\rc\x85d\x0be\x0cf", "a\nb\nc\nd\ne\nf"),
        ("\x1b[31mred\x1b[0m", "�[31mred�[0m"),
        ("\x9b31m", "�31m"),
        ("\x1b]0;title\x07", "�]0;title�"),
        ("\x1b]8;;https://x\x1b\\link", "�]8;;https://x�\\link"),
        ("a\x08b\x00\x7f", "a�b��"),
        ("\u202egnp.exe\u2066\u2069\u200e\u061c", "�gnp.exe����"),
        ("\ufeff\u200b\u2060\u00ad", "����"),
        ("👩\u200d💻 नी\u200cवी", "👩\u200d💻 नी\u200cवी"),
        ("\ud800", "�"),
        ("\U000e0041\ue000", "��"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    left = {each for each in printable(text) if unicodedata.category(each).startswith("C")}
    assert left <= set("\n\t" + JOINERS)


class Demo:
    """A person whose bot answers with this."""

    def __init__(self, *_: Any) -> None:
        self.server = "localhost"

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def ask(self, *_: Any) -> str:
        return "a\u2028b\x1b[2J\u202e"


def demo() -> None:
    call_command("matrix_demo", user="a", password="b", bot="@b:c")


def test_a_command_prints_no_control_character_of_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix_demo, "Person", Demo)
    demo()
    assert capsys.readouterr().out.endswith("a\nb�[2J�\n")

    def refuse(*_: Any) -> str:
        raise CommandError("no\x1b[2J")

    monkeypatch.setattr(Demo, "ask", refuse)
    with pytest.raises(CommandError, match=r"^no�"):
        demo()


PRINT = (
    "from lib import terminal\n"
    "with terminal.streams():\n"
    "    for _ in range({times}):\n"
    "        print(terminal.printable('a\\u2028\\u00f6\\u4e2d\\x1b[2J'))\n"
)


@pytest.mark.parametrize(
    "environment",
    [
        {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "cp1252"},
    ],
)
def test_another_encoding_than_utf_8(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINT.format(times=1)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        check=True,
    )
    assert done.stdout.startswith(b"a\n")
    assert b"\\u4e2d" in done.stdout
    assert b"\x1b" not in done.stdout
    assert not done.stderr


def test_the_reader_of_a_pipe_may_leave() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PRINT.format(times=100_000)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as writing:
        assert writing.stdout is not None
        assert writing.stderr is not None
        writing.stdout.readline()
        writing.stdout.close()
        errors = writing.stderr.read()
        assert writing.wait(60) == 1
    assert not errors
