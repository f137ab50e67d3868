"""The import graph: no circle of modules or packages. pyproject.toml has the layers."""

from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

APPS = (
    "lib",
    "config",
    "realm",
    "chat",
    "agents",
    "botrunner",
    "webhooks",
    "console",
    "ops",
    "openapi",
)
# The records of threads stand below agents, the HTTP edge of chat above: two packages in one app.
RECORDS = {"chat.models", "chat.membership"}
Graph = dict[str, set[str]]


@cache
def imports() -> Graph:
    graph = grimp.build_graph(*APPS, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def between(depth: int) -> Graph:
    """Imports between packages: of apps (`depth` 1), or of the packages inside them (2)."""
    modules = imports()
    packages = {module for module in modules if any(m.startswith(f"{module}.") for m in modules)}

    def package(module: str) -> str:
        if depth == 1 and module in RECORDS:
            return "chat.models"
        parts = module.split(".")
        while len(parts) > 1 and (len(parts) > depth or ".".join(parts) not in packages):
            parts.pop()
        return ".".join(parts)

    graph: Graph = defaultdict(set)
    for module, imported in modules.items():
        graph[package(module)] |= {package(name) for name in imported} - {package(module)}
    return graph


def cycle(graph: Graph) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other() -> None:
    # config/__init__ imports the Celery app, as Celery's documentation has it.
    assert not cycle({name: to for name, to in imports().items() if name != "config"})


@pytest.mark.parametrize("app", APPS)
def test_no_packages_of_an_app_import_each_other(app: str) -> None:
    inside = {name: to for name, to in between(2).items() if name.startswith(f"{app}.")}
    assert not cycle({name: {to for to in seen if to in inside} for name, seen in inside.items()})


def test_no_apps_import_each_other() -> None:
    assert not cycle(between(1))
