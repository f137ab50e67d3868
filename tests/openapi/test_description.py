"""The description of the HTTP API, and the page that shows it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.contrib.staticfiles import finders
from django.urls import URLPattern, URLResolver, get_resolver
from jsonschema import Draft202012Validator
from rest_framework.test import APIClient

from openapi import __main__ as command

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def described(api: APIClient) -> Any:
    response = api.get("/api/schema")
    assert response.headers["Content-Type"] == "application/yaml; charset=utf-8"
    return yaml.safe_load(response.content)


def served() -> set[str]:
    """The addresses of the APIs, in the form that the description has."""
    found = set()
    waiting: list[tuple[str, URLPattern | URLResolver]] = [("/", get_resolver())]
    while waiting:
        before, pattern = waiting.pop()
        if isinstance(pattern, URLResolver):
            route = "" if pattern.pattern.regex.pattern == "^/" else str(pattern.pattern)
            waiting += [(before + route, each) for each in pattern.url_patterns]
        else:
            found.add(re.sub(r"<\w+:(\w+)>", r"{\1}", f"{before}{pattern.pattern}"))
    return {at for at in found if re.match("/(_|api)", at) and "^" not in at}


def test_every_path_is_described(described: Any) -> None:
    assert set(described["paths"]) == served() - {"/api/schema", "/api/docs"}


def test_each_operation_has_a_summary_and_error_responses(described: Any) -> None:
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            assert operation["tags"], (method, path)
            for code, answer in operation["responses"].items():
                plain = path.startswith("/api/chat")
                if code >= "400":
                    named = f"{'Plain' if plain else 'Document'}{code}"
                    assert answer == {"$ref": f"#/components/responses/{named}"}
                    assert described["components"]["responses"][named]["content"]
                else:
                    assert answer["description"], (method, path, code)
    names = [o["operationId"] for each in described["paths"].values() for o in each.values()]
    assert len(names) == len(set(names))


def test_examples_are_valid(described: Any) -> None:
    checked = 0
    for schema, example in examples(described):
        Draft202012Validator(schema | {"components": described["components"]}).validate(example)
        checked += 1
    assert checked > 30


def examples(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, list):
        for each in node:
            yield from examples(each)
    elif isinstance(node, dict):
        if "text/event-stream" not in node and isinstance(node.get("schema"), dict):
            values = [each["value"] for each in node.get("examples", {}).values()]
            for example in [*values, *([node["example"]] if "example" in node else [])]:
                yield node["schema"], example
        if isinstance(node.get("properties"), dict) and "example" in node:
            yield (
                {name: value for name, value in node.items() if name != "example"},
                node["example"],
            )
        for name, each in node.items():
            if name not in ("example", "examples", "text/event-stream"):
                yield from examples(each)


def test_lists_that_json_api_allows_to_be_empty_are_described_so(described: Any) -> None:
    parameters = [
        parameter
        for operations in described["paths"].values()
        for operation in operations.values()
        for parameter in operation.get("parameters", [])
        if parameter.get("name", "").startswith(("fields[", "include"))
    ]
    assert len(parameters) > 40
    assert all(parameter["allowEmptyValue"] for parameter in parameters)


def test_unknown_members_of_requests_are_described_as_refused(described: Any) -> None:
    documents = described["components"]["schemas"]
    for name in ("MessageRequest", "MessageAttributes", "NewMessageDocument", "NewBotCommand"):
        assert documents[name]["additionalProperties"] is False, name
    assert documents["NewMessageDocument"]["properties"]["meta"] == {}


def test_unchanged_description_is_304(api: APIClient) -> None:
    first = api.get("/api/schema")

    assert api.get("/api/schema", headers={"If-None-Match": first["ETag"]}).status_code == 304


def test_outdated_description_is_detected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "FILE", tmp_path / "openapi.yaml")

    assert command.main(["--check"]) == 1
    assert "make schema" in capsys.readouterr().err

    assert command.main([]) == 0
    assert command.main(["--check"]) == 0
    assert command.FILE.read_text() == (ROOT / "docs/openapi.yaml").read_text()


def test_page_loads_only_own_resources(api: APIClient) -> None:
    response = api.get("/api/docs")

    page = response.content.decode()
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none';")
    assert "unsafe" not in response.headers["Content-Security-Policy"]
    assert not re.search(r"<script>|<style|\son\w+=|style=", page)
    assert "//" not in page
    loaded = re.findall(r'(?:src|href)="/static/([^"]+)"', page)
    assert len(loaded) == 4
    for name in loaded:
        assert finders.find(name), name


@pytest.mark.parametrize("at", ["/api/schema", "/api/docs"])
def test_only_reading_is_allowed(api: APIClient, at: str) -> None:
    assert api.post(at).status_code == 405
    assert api.head(at).status_code == 200
