"""docs/reference/settings.md and .env.example have every variable that the code reads."""

import re

from tests.docs.blocks import ROOT

# Read by the local stack, not by the settings.
STACK = {"PORT", "REALM_SERVER_PORT", "STACK_DIR", "STACK_MATRIX", "STACK_WORKERS"}


def names(pattern: str, path: str) -> set[str]:
    return set(re.findall(pattern, (ROOT / path).read_text(), re.MULTILINE))


def read_by_settings() -> set[str]:
    return names(r'env\.\w+\(\s*"([A-Z_]+)"', "config/settings.py")


def test_the_reference_has_every_variable() -> None:
    table = names(r"^\| `([A-Z_]+)` \|", "docs/reference/settings.md")

    assert table == read_by_settings() | STACK


def test_the_template_has_every_variable() -> None:
    template = names(r"^#?([A-Z_]+)=", ".env.example")

    assert template == read_by_settings() | STACK - {"STACK_DIR"}
