"""What README.md and .env.example say of the environment is what the settings read."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Read by the local stack, not by the settings.
ELSEWHERE = {"PORT", "REALM_SERVER_PORT", "STACK_DIR", "STACK_MATRIX", "STACK_WORKERS"}


def read_by_settings() -> set[str]:
    source = (ROOT / "config/settings.py").read_text()
    return set(re.findall(r'env\.\w+\(\s*"([A-Z_]+)"', source))


def test_the_readme_tells_about_every_variable() -> None:
    table = set(re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "README.md").read_text(), re.M))

    assert table == read_by_settings() | ELSEWHERE


def test_the_template_has_every_variable() -> None:
    template = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.M))

    assert template == read_by_settings() | ELSEWHERE - {"STACK_DIR"}


def test_the_security_promises_name_files_that_are_there() -> None:
    named = re.findall(r"`([a-z_]+/[a-z_/]*(?:\.py)?)`", (ROOT / "SECURITY.md").read_text())

    assert len(named) > 25
    assert [path for path in named if not (ROOT / path).exists()] == []
