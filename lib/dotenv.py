"""Read the file `.env` into the environment, which wins over it.

django-environ parses the values. It logs a line that it cannot parse, and a line may hold a key: here
such a line is an error that names the file, the line and the variable, and no value.
"""

import io
import os
import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import environ

NAME = r"[A-Za-z_][A-Za-z_0-9]*"
ASSIGNMENT = re.compile(rf"\A(?:export\s+)?({NAME})=(.*)", re.DOTALL)
# A name that is not followed by `=`: upper case, with `_`, so that it cannot be a part of a secret.
INTENDED = re.compile(r"(?:export\s+)?([A-Z]+(?:_[A-Z]+)+)(?=[\s:]|\Z)")

_lines: dict[str, int] = {}


class InvalidFile(Exception):
    """The message names the file and the line."""


def load(path: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Add the variables of the file that the environment lacks. Raises `InvalidFile`."""
    found = read(path)
    _lines.clear()
    for name, (value, line) in found.items():
        if environment.setdefault(name, value) == value:
            _lines[name] = line


def read(path: Path) -> dict[str, tuple[str, int]]:
    """Return the variables of the file with their values and lines; empty without a file. Raises
    `InvalidFile`."""
    found = {}
    for number, line in enumerate(_text(path).replace("\r\n", "\n").split("\n"), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = ASSIGNMENT.fullmatch(line)
        if match is None or len(line.splitlines()) > 1:
            intended = match or INTENDED.match(line)
            name = f" ({intended[1]})" if intended else ""
            raise InvalidFile(
                f"{path.name}, line {number}{name}: this is not NAME=value in one line. "
                "Correct it, or start it with # to ignore it."
            )
        found[match[1]] = _value(match[1], match[2]), number
    return found


def place(name: str) -> str:
    """Return where the file sets the variable, as a note after its name; empty if it does not."""
    return f" (.env, line {_lines[name]})" if name in _lines else ""


def names() -> set[str]:
    """Return the variables that the file has set."""
    return set(_lines)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise InvalidFile(f"{path.name} cannot be read: {error.strerror}.") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidFile(f"{path.name}, line {line}: the file is not encoded as UTF-8.") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InvalidFile(f"{path.name}, line {line}: the file is not encoded as UTF-8.")
    return text


def _value(name: str, text: str) -> str:
    """Return the value without quotes and escapes."""
    values: dict[str, str] = {}
    file: Any = type("File", (environ.Env,), {"ENVIRON": values})
    file.read_env(io.StringIO(f"{name}={text}"))
    return values[name]
