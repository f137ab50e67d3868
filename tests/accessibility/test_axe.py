"""Every page of ours in Chromium, by the rules of axe-core for WCAG 2.2 AA, light and dark."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib import admin
from django.test import Client
from django.urls import reverse

from agents.models import Limit, Run
from agents.runs import execution
from agents.usage import rollups
from realm.models import User
from tests import factories, nodepackages
from tests.benchmarks.sample import History
from tests.console.rows import one_of_each
from tests.security.test_in_a_browser import HERE, browsing

pytestmark = pytest.mark.django_db
RULES: dict[Any, list[str]] = {
    "light": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
    # The others are the same in both.
    "dark": ["color-contrast", "link-in-text-block"],
}
SCAN = """async only => {
    const found = await axe.run(document, {runOnly: only, resultTypes: ["violations"]});
    return found.violations.flatMap(rule => rule.nodes.map(node => `${rule.id} ${node.target}`));
}"""


@pytest.fixture(scope="session")
def axe() -> Path:
    return (
        nodepackages.installed(Path(__file__).parent / "axe") / "node_modules/axe-core/axe.min.js"
    )


def paths(root: User) -> Iterator[str]:
    own = factories.ask("# Is *this* read out?", owner=root)
    execution.execute(own.pk)
    rows = one_of_each()
    execution.execute(rows[Run].pk)
    History(runs=40, days=2, failing=0.3).write_all()
    while rollups.fold():
        pass
    failed = Run.objects.filter(status=Run.Status.FAILED)[0]
    yield "/"
    yield reverse("chat_thread", args=[own.thread_id])
    yield reverse("chat_login")
    yield reverse("admin:agents_run_change", args=[failed.pk])
    yield reverse("admin:chat_thread_change", args=[failed.thread_id])
    yield reverse("admin:outbox")
    yield reverse("admin:dead_letters")
    yield reverse("console_totp")
    yield "/admin/"
    yield reverse("console_system")
    for model in admin.site._registry:
        page = f"/admin/{model._meta.label_lower.replace('.', '/')}/"
        yield page
        yield f"{page}add/"
        if model in rows:
            yield f"{page}{rows[model].pk}/change/"
    yield f"/admin/agents/limit/{rows[Limit].pk}/delete/"


def test_pages_have_no_violations(axe: Path, redis: Any) -> None:
    root = User.objects.create_superuser("root", password="x")
    staff, visitor = Client(), Client()
    staff.force_login(root)
    answers = {}
    for path in [*paths(root), "/admin/login/"]:
        client = visitor if path == "/admin/login/" else staff
        response = client.get(path)
        # A page without an add form, or for POST only, is none to look at.
        if response.status_code in (200, 404):
            answers[path] = (response.text, dict(response.headers))
    failures = []
    texts = staff.get("/admin/jsi18n/")
    with browsing(answers | {"/admin/jsi18n/": (texts.text, dict(texts.headers))}) as page:
        for path in answers:
            page.emulate_media(color_scheme="light")
            page.goto(HERE + path)
            page.evaluate("new Promise(resolve => setTimeout(resolve))")
            page.evaluate(axe.read_text())
            for scheme, rules in RULES.items():
                if scheme == "dark" and path.endswith("/add/"):
                    continue  # the fields of the page of a row
                page.emulate_media(color_scheme=scheme)
                # The theme of the console reads the scheme once.
                page.evaluate(
                    "dark => document.documentElement.classList.toggle('dark', dark)",
                    scheme == "dark",
                )
                found = page.evaluate(SCAN, rules)
                failures += [f"{path} {scheme} {violation}" for violation in found]
    assert len(answers) > 45
    assert failures == []
