"""Request ids, the request log and metrics; and the probes, which are answered before any other
middleware."""

import functools
import time
from collections.abc import Callable

import structlog
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.utils.functional import SimpleLazyObject

from lib import tracing
from ops import metrics, views

requests = structlog.get_logger(__name__)

HEADER = "X-Request-ID"
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
# Probes address a process directly, with any Host header, many times a minute: no log line, no session,
# no check of ALLOWED_HOSTS. No response depends on the Host.
PROBES: dict[str, Callable[[HttpRequest], HttpResponse]] = {
    "/healthz": views.process,
    "/healthz/deep": views.deep,
    "/readyz": views.ready,
    "/metrics": views.metrics_page,
}


class RequestMiddleware:
    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        if probe := PROBES.get(request.path_info):
            return probe(request)
        started = time.perf_counter()
        request_id = tracing.choose(request.META.get("HTTP_X_REQUEST_ID"))
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            response = self.get_response(request)
            response[HEADER] = request_id
            _note(request, response, time.perf_counter() - started)
        return response


def _note(request: HttpRequest, response: HttpResponseBase, seconds: float) -> None:
    method = request.method if request.method in METHODS else "other"
    route, status = route_of(request), response.status_code
    metrics.observe_request(str(method), route, status, seconds)
    log = requests.warning if status >= 500 else requests.info
    log(
        "Request",
        method=method,
        route=route,
        status=status,
        ms=round(seconds * 1000, 1),
        user=_user_id(request),
    )


def route_of(request: HttpRequest) -> str:
    """Return the URL pattern, not the path: ids and user input stay out of logs and labels."""
    if request.resolver_match is not None:
        return _named(request.resolver_match.route)
    return "static" if request.path.startswith(settings.STATIC_URL) else "unknown"


@functools.cache  # there are as many as patterns
def _named(route: str) -> str:
    return "/" + route.removeprefix("^").removesuffix("$").removesuffix("\\Z")


def _user_id(request: HttpRequest) -> int | None:
    """Return the id of an authenticated user, without a query for the log."""
    user = getattr(request, "_cached_user", None) or getattr(request, "user", None)
    return None if user is None or isinstance(user, SimpleLazyObject) else user.pk
