"""The table of who may do what, `access.txt`, and what an answer means in its words."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.security.world import ROLES

TABLE = Path(__file__).with_suffix(".txt")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
LOGINS = ("/login", "/admin/login/")
REFUSALS = ("login", "401", "403", "404", "405")

# By role, in the order of ROLES.
Outcomes = tuple[str, ...]


def outcome(response: Any) -> str:
    """`yes` means let through, whatever comes then: 200, a redirect elsewhere, 400."""
    code = response.status_code
    if 300 <= code < 400 and response["Location"].partition("?")[0] in LOGINS:
        return "login"
    if str(code) in REFUSALS:
        return str(code)
    return "yes" if code < 500 else f"broken: {code}"


def table() -> dict[str, dict[str, Outcomes]]:
    """By route and method."""
    found: dict[str, dict[str, Outcomes]] = {}
    for block in TABLE.read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        rows = [line for line in lines if line.startswith("    ")]
        for route in lines:
            if route not in rows:
                assert route not in found, f"{route} stands twice in {TABLE.name}"
                found[route] = _row_by_method(rows)
    return found


def _row_by_method(rows: list[str]) -> dict[str, Outcomes]:
    found: dict[str, Outcomes] = {}
    for row in rows:
        methods = [word for word in row.split() if word.isupper()]
        cells = row.split()[len(methods) :]
        assert len(cells) in (1, len(ROLES)), f"{TABLE.name}: {row}"
        found |= dict.fromkeys(methods, tuple(cells if len(cells) > 1 else cells * len(ROLES)))
    return found


def as_lines(route: str, came: Mapping[str, Outcomes]) -> str:
    """What to add to the table for a route; `came` has the outcomes by method."""
    alike: dict[Outcomes, list[str]] = defaultdict(list)
    for method, cells in came.items():
        alike[cells].append(method)
    rows = [
        f"    {' '.join(methods):<50} {' '.join(cells if len(set(cells)) > 1 else cells[:1])}"
        for cells, methods in alike.items()
    ]
    return "\n".join([route or '""', *rows])
