"""The real processes below a path of a proxy: behind an nginx as in docs/how-to/deploy.md, which passes
the path on, and behind one that removes it."""

import http.cookiejar
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.fakes.llm import FakeLLM
from tests.nginx import nginx
from tests.system.stack import Stack

pytestmark = pytest.mark.system

# Of the pages: what a browser requests by itself or for a click.
ADDRESS = re.compile(r'(?:href|src|action|data-api|hx-get)="(/[^"#]*)')


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with FakeLLM() as llm, Stack(llm.url, FORCE_SCRIPT_NAME="/bots", TRUSTED_PROXIES="1") as stack:
        yield stack


@pytest.fixture(scope="module", params=["passed on", "removed"])
def browser(request: pytest.FixtureRequest, stack: Stack) -> Iterator["Browser"]:
    if request.param == "removed":
        yield Browser(stack.url, removed="/bots")
        return
    with nginx(stack.port) as port:
        yield Browser(f"http://127.0.0.1:{port}")


class Browser:
    def __init__(self, origin: str, *, removed: str = "") -> None:
        self.origin, self.removed = origin, removed
        self.cookies = http.cookiejar.CookieJar()

    def open(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, str]:
        """Request a public path, and follow no redirect."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        if isinstance(body, dict):
            headers["Content-Type"] = "application/json"
        url = self.origin + path.removeprefix(self.removed)
        request = urllib.request.Request(url, data, headers)
        opener = urllib.request.build_opener(
            NoRedirect, urllib.request.HTTPCookieProcessor(BelowPath(self.cookies, path))
        )
        try:
            with opener.open(request, timeout=60) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


class BelowPath(http.cookiejar.CookieJar):
    """The cookies of another jar, as a browser sends and keeps them for a public path."""

    def __init__(self, jar: http.cookiejar.CookieJar, path: str) -> None:
        super().__init__()
        self.jar, self.path = jar, path

    def add_cookie_header(self, request: Any) -> None:
        sent = [each for each in self.jar if self.path.startswith(each.path)]
        if sent:
            pairs = (f"{each.name}={each.value}" for each in sent)
            request.add_unredirected_header("Cookie", "; ".join(pairs))

    def extract_cookies(self, response: Any, request: Any) -> None:
        for cookie in self.make_cookies(response, request):
            self.jar.set_cookie(cookie)


def addresses(page: str) -> set[str]:
    found = {address.replace("&amp;", "&") for address in ADDRESS.findall(page)}
    assert found
    assert {each for each in found if not each.startswith("/bots/")} == set()
    return found


def test_the_chat_page_and_all_that_it_names(browser: Browser) -> None:
    status, _, page = browser.open("/bots/")

    assert status == 200
    assert 'data-base="/bots/"' in page
    for address in addresses(page):
        if not address.endswith("/logout"):
            assert browser.open(address)[0] == 200, address


def test_a_message_its_location_its_stream_and_its_links(browser: Browser) -> None:
    status, headers, text = browser.open("/bots/api/chat/messages", {"content": "Hello"})
    accepted = json.loads(text)

    assert status == 202
    assert headers["Location"] == f"/bots/api/chat/runs/{accepted['runId']}"
    stream = browser.open(f"{headers['Location']}/events", Accept="text/event-stream")
    assert stream[0] == 200
    assert "event: run.completed" in stream[2]
    assert json.loads(browser.open(headers["Location"])[2])["run"]["status"] == "completed"
    page = browser.open(f"/bots/threads/{accepted['threadId']}")
    assert page[0] in (200, 302, 404)


def test_resources_link_below_the_path(browser: Browser) -> None:
    kind = "application/vnd.api+json"
    message = {"data": {"type": "messages", "attributes": {"content": "Hello"}}}
    status, headers, text = browser.open(
        "/bots/api/messages", json.dumps(message).encode(), **{"Content-Type": kind, "Accept": kind}
    )
    links = set(re.findall(r'"(/[^"]*)"', text))

    assert status == 201, text
    assert headers["Location"] in links
    assert all(link.startswith("/bots/api/") for link in links)
    error = browser.open("/bots/api/threads/nowhere/x/y", Accept=kind)
    assert error[0] == 404
    assert "errors" in json.loads(error[2])


def test_errors_and_the_description_of_the_api(browser: Browser) -> None:
    status, _, text = browser.open("/bots/api/nowhere")
    assert (status, json.loads(text)["ok"]) == (404, False)

    description = yaml.safe_load(browser.open("/bots/api/schema")[2])
    assert description["servers"] == [{"url": "/bots"}]
    assert browser.open("/bots/api/docs")[0] == 200


def test_the_admin_signs_in_and_its_cookies_stay_below_the_path(
    browser: Browser, stack: Stack
) -> None:
    status, headers, _ = browser.open("/bots/admin/")
    assert (status, headers["Location"]) == (302, "/bots/admin/login/?next=/bots/admin/")
    _, _, page = browser.open(headers["Location"])
    [token] = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
    form = {
        "csrfmiddlewaretoken": token,
        "username": "admin",
        "password": (stack.directory / "admin-password").read_text().strip(),
        "next": "/bots/admin/",
    }

    status, headers, page = browser.open(
        "/bots/admin/login/",
        urllib.parse.urlencode(form).encode(),
        **{"Content-Type": "application/x-www-form-urlencoded"},
    )

    assert (status, headers["Location"]) == (302, "/bots/admin/")
    assert {cookie.path for cookie in browser.cookies} == {"/bots"}
    status, _, page = browser.open("/bots/admin/")
    assert status == 200
    for address in sorted(addresses(page)):
        if "logout" not in address:
            assert browser.open(address)[0] in (200, 302), address


def test_another_path_is_not_cut(stack: Stack) -> None:
    assert Browser(stack.url).open("/botsy")[0] == 404
    assert Browser(stack.url).open("/healthz")[0] == 200


def test_the_examples_keep_the_probes_inside(stack: Stack) -> None:
    with nginx(stack.port) as port:
        for path in ("metrics", "healthz/deep", "readyz"):
            assert Browser(f"http://127.0.0.1:{port}").open(f"/bots/{path}")[0] == 404
        status, headers, _ = Browser(f"http://127.0.0.1:{port}").open("/bots")
        assert (status, headers["Location"].rpartition(str(port))[2]) == (301, "/bots/")
