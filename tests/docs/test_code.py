"""Code that the documents show and name exists. It needs the settings; test_documents.py does not."""

import importlib
import re
from types import ModuleType

import pytest

from agents.tools import TOOLS
from realm.commands import COMMANDS
from tests.docs.test_documents import CODE, current, prose, text

PACKAGES = "agents|botrunner|chat|config|console|lib|openapi|ops|realm|webhooks|tests"
MODULE = re.compile(rf"(?:{PACKAGES})(?:\.\w+)+(?:\(\))?")
# Parts of the documents that look like a module and are something else.
OTHER_NAMES = re.compile(r"chat\.(?:reply|summarize|read_messages)|console\.see_system")


@pytest.mark.parametrize("path", current())
def test_named_modules_exist(path: str) -> None:
    named = {
        code.removesuffix("()")
        for code in CODE.findall(prose(path))
        if MODULE.fullmatch(code) and not OTHER_NAMES.fullmatch(code) and not code.endswith(".py")
    }

    assert [name for name in sorted(named) if not importable(name)] == []


def importable(name: str) -> bool:
    """Whether `name` is a module, or names in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: ModuleType | object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize(
    "path", ["docs/how-to/connect-a-model.md", "docs/how-to/bots-and-commands.md"]
)
def test_the_python_of_the_guides_runs(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Undone afterwards: both names are new.
    monkeypatch.setitem(TOOLS, "weather", None)
    monkeypatch.setitem(COMMANDS, "orders.status", None)
    (block,) = re.findall(r"^```python\n(.*?)^```$", text(path), re.MULTILINE | re.DOTALL)

    exec(block, {})

    assert TOOLS["weather"] or COMMANDS["orders.status"]
