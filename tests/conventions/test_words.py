"""Words of the source: standard terms, verbs or nouns that begin docstrings, unique class names."""

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = re.compile(
    r"(?<![A-Za-z])(?:told|tells?|untold|sa(?:id|y)|whoever|whatever|nobody|somebody)(?![a-z])",
    re.I,
)
PER_1000_LINES = 2
RELATIVE = re.compile(r"(?:What|Who|Whose|How|Whether|Which|Where|Why)\b")

# Lines that need one of the words: (file, a part of the line) -> the reason.
ALLOWED_LINES: dict[tuple[str, str], str] = {}

# Classes of one name that are two views of one thing, in two APIs.
ALLOWED_NAMES: dict[str, str] = {
    "DatabaseWrapper": "Django's name for a backend's connection",
    "Command": "Django's name for a management command",
    "MessagesView": "the messages of a thread, in plain JSON and in JSON:API",
    "UnknownPathView": "the answer to an unknown path, in plain JSON and in JSON:API",
}


@cache
def source() -> dict[str, str]:
    """The text of each Python file of the product by its path, without tests and migrations."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return {
        path: (ROOT / path).read_text()
        for path in listed
        if not path.startswith("tests/") and "/migrations/" not in path and (ROOT / path).exists()
    }


def nodes(*kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    for path, text in source().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, kinds):
                yield path, node


def test_the_words_of_the_field_are_used() -> None:
    lines = [(path, line) for path, text in source().items() for line in text.splitlines()]
    found = [
        f"{path}: {line.strip()}"
        for path, line in lines
        if WORDS.search(line)
        and not any(path == where and part in line for where, part in ALLOWED_LINES)
    ]
    assert len(found) * 1000 <= PER_1000_LINES * len(lines), "\n".join(found)


def test_a_docstring_begins_with_a_verb_or_a_noun() -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        f"{path}: {docstring.splitlines()[0]}"
        for path, node in nodes(*kinds)
        if RELATIVE.match(docstring := ast.get_docstring(node) or "")  # type: ignore[arg-type]
    ]
    assert not found, "\n".join(found)


def test_a_class_name_stands_for_one_thing() -> None:
    """Classes inside a class bear the name of that one too, as `Run.Status` does."""
    places = defaultdict(list)
    for path, text in source().items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path}:{node.lineno}")
    found = {name: at for name, at in places.items() if len(at) > 1 and name not in ALLOWED_NAMES}
    assert not found, "\n".join(f"{name}: {', '.join(at)}" for name, at in sorted(found.items()))


def test_the_lists_of_exceptions_are_short_and_true() -> None:
    assert len(ALLOWED_LINES) <= 10
    for (path, part), reason in ALLOWED_LINES.items():
        assert part in source()[path], (path, part)
        assert reason
