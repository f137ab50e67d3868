"""The documents hold together: links resolve, and the code that they name exists."""

import re
import subprocess
from collections.abc import Iterator
from functools import cache

import pytest

from tests.docs.blocks import ROOT, shell_blocks

LINES_OF_THE_README = 160
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = r"agents|botrunner|chat|config|console|deploy|docs|findings|lib|openapi|ops|realm"
MORE_FOLDERS = r"scripts|templates|tests|webhooks|\.ci|\.github"
PATH = re.compile(rf"(?:{FOLDERS}|{MORE_FOLDERS})/[\w./@-]*")
OLD_WORDS = re.compile(
    r"\b(?:told|tells?|untold|whoever|whatever|nobody|somebody)\b", re.IGNORECASE
)
MAKE = re.compile(r"`make ([a-z][a-z-]*)")


def documents() -> list[str]:
    top = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
    return [*top, *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]


@cache
def text(path: str) -> str:
    return (ROOT / path).read_text()


@cache
def prose(path: str) -> str:
    return FENCE.sub("", text(path))


@cache
def anchors(path: str) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    titles = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", title) for title in HEADING.findall(prose(path)))
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def links(path: str) -> Iterator[tuple[str, str]]:
    """File and anchor of each relative link; an empty anchor for none."""
    for target in LINK.findall(prose(path)):
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            file = (ROOT / path).parent / name if name else ROOT / path
            yield str(file.resolve().relative_to(ROOT)), anchor


@pytest.mark.parametrize("path", documents())
def test_links_resolve(path: str) -> None:
    broken = [
        f"{file}#{anchor}"
        for file, anchor in links(path)
        if not (ROOT / file).exists() or (anchor and anchor not in anchors(file))
    ]

    assert broken == []


def test_every_document_is_linked() -> None:
    linked = {file for path in documents() for file, _ in links(path)}

    assert [
        path for path in documents() if path not in linked | {"README.md", "CHANGELOG.md"}
    ] == []


def test_the_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= LINES_OF_THE_README


@pytest.mark.parametrize("path", ["README.md", "docs/tutorial.md"])
def test_every_command_is_a_block_that_a_test_executes(path: str) -> None:
    """tests/system/test_tutorial.py executes the blocks that give no reason against it."""
    fences = re.findall(r"^ *```([a-z]*)\n", text(path), re.MULTILINE)

    assert set(fences) - {""} <= {"sh", "json"}
    assert fences.count("sh") == len(shell_blocks(path))
    assert len([block for block in shell_blocks(path) if block.reason]) <= 3


def current() -> list[str]:
    """Documents about the code as it is; the changelog names what was."""
    return [path for path in documents() if path != "CHANGELOG.md"]


@pytest.mark.parametrize("path", current())
def test_named_files_exist(path: str) -> None:
    named = {
        code.partition("::")[0].partition(":")[0]
        for code in CODE.findall(prose(path))
        if PATH.fullmatch(code.partition(":")[0])
    }

    assert [name for name in sorted(named) if not exists(name)] == []


def exists(path: str) -> bool:
    return (ROOT / path).exists() or bool(list(ROOT.glob(path)))


@pytest.mark.parametrize("path", current())
def test_named_functions_exist(path: str) -> None:
    """`path/to/file.py:name` and `path/to/test.py::name`."""
    named = re.findall(r"`([\w/]+\.py)::?([\w.]+)`", prose(path))

    assert [f"{file}:{name}" for file, name in named if not defines(file, name)] == []


def defines(file: str, name: str) -> bool:
    """Whether the file defines the function, class or method, or assigns the constant."""
    source = text(file)
    return all(
        re.search(rf"^ *(?:(?:async )?def|class) {part}\b|^{part}\b.*=", source, re.MULTILINE)
        for part in name.split(".")
    )


def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    named = {name for path in current() for name in MAKE.findall(prose(path))}

    assert named - targets == set()


@pytest.mark.parametrize("path", documents())
def test_the_words_of_the_field_are_used(path: str) -> None:
    assert OLD_WORDS.findall(prose(path).replace("tell (publish", "")) == []


def test_no_machine_paths() -> None:
    """What is tracked names no folder of a developer's machine."""
    tracked = subprocess.run(
        ["git", "grep", "-lE", "/(work|home)/[a-z]+/"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()

    assert [name for name in tracked if name.endswith(".md")] == []
