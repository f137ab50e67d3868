"""The file `.env`: an error names the file, the line and the variable, and no value."""

from pathlib import Path

import pytest

from lib import dotenv


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / ".env"


def test_the_environment_wins_over_the_file(file: Path) -> None:
    file.write_text("A=1\nexport B='two words'\n\n  # a note\n  C=\"x\\ny\"\nD=a=b#c\n")
    environment = {"A": "mine"}

    dotenv.load(file, environment)

    assert environment == {"A": "mine", "B": "two words", "C": "x\\ny", "D": "a=b#c"}
    assert dotenv.place("A") == ""
    assert dotenv.place("D") == " (.env, line 6)"


@pytest.mark.parametrize(
    "data", [b"\xef\xbb\xbfA=1\nB=2\n", b"A=1\r\nB=2\r\n", b"A=1\nB=2", b"A=1 \n\tB=2\n"]
)
def test_files_of_other_editors(data: bytes, file: Path) -> None:
    file.write_bytes(data)

    assert dotenv.read(file) == {"A": ("1", 1), "B": ("2", 2)}


def test_there_may_be_none(file: Path) -> None:
    assert dotenv.read(file) == {}


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"A=1\nOPENAI_API_KEY sk-canary-123\n", ".env, line 2 (OPENAI_API_KEY)"),
        (b"OPENAI_API_KEY: sk-canary-123\n", ".env, line 1 (OPENAI_API_KEY)"),
        (b"OPENAI_API_KEY = sk-canary-123\n", ".env, line 1 (OPENAI_API_KEY)"),
        (b"export OPENAI_API_KEY\n", ".env, line 1 (OPENAI_API_KEY)"),
        (b"A=1\r\n\r\nsk-canary-123\r\n", ".env, line 3:"),
        (b"CANARY\n", ".env, line 1:"),
        (b"8=canary\n", ".env, line 1:"),
        (b"=canary\n", ".env, line 1:"),
        (b"A=canary\rB=canary", ".env, line 1 (A)"),
        (b"A=1\nB=canary\xff\n", ".env, line 2: the file is not encoded as UTF-8"),
        ("A=canary\n".encode("utf-16"), ".env, line 1: the file is not encoded as UTF-8"),
        ("A=canary\n".encode("utf-16-le"), ".env, line 1: the file is not encoded as UTF-8"),
        (b"A=1\nB=canary\0\n", ".env, line 2: the file is not encoded as UTF-8"),
    ],
)
def test_a_bad_line_is_named_and_not_shown(data: bytes, place: str, file: Path) -> None:
    file.write_bytes(data)

    with pytest.raises(dotenv.InvalidFile) as found:
        dotenv.read(file)

    assert str(found.value).startswith(place)
    assert "canary" not in str(found.value).lower()


def test_a_folder_is_no_file(file: Path) -> None:
    file.mkdir()

    with pytest.raises(dotenv.InvalidFile, match=r"^\.env cannot be read: Is a directory\.$"):
        dotenv.read(file)
