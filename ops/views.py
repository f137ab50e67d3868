"""Probes and metrics: plain functions, called before all other middleware (ops.middleware)."""

import ipaddress
import secrets

from django.conf import settings
from django.http import HttpRequest, HttpResponse, JsonResponse

from ops import health, metrics

# Headers that a proxy adds. The peer address is then the proxy's and proves nothing; clients can forge
# the headers too, so they never provide the client's address.
PROXIED = ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via")


def process(request: HttpRequest) -> HttpResponse:
    """Report liveness. It checks nothing else, so that no process is killed because of its database."""
    return _json({"ok": True, "service": "botrealm", "version": settings.RELEASE})


def ready(request: HttpRequest) -> HttpResponse:
    """Report readiness for requests; for operators, with the reasons of failures."""
    return _report(health.readiness(), with_reasons=_forbidden(request) is None)


def deep(request: HttpRequest) -> HttpResponse:
    """Report the progress of runs, with figures: for operators only."""
    return _forbidden(request) or _report(health.progress(), with_reasons=True)


def metrics_page(request: HttpRequest) -> HttpResponse:
    return _forbidden(request) or HttpResponse(
        metrics.exposition(),
        content_type=metrics.CONTENT_TYPE,
        headers={"Cache-Control": "no-store"},
    )


def _report(checks: dict[str, health.Check], *, with_reasons: bool) -> JsonResponse:
    ok = all(check.ok for check in checks.values())
    results = {name: {"ok": check.ok, **check.details} for name, check in checks.items()}
    if with_reasons:
        for name, check in checks.items():
            if check.reason not in ("", check.details.get("error")):
                results[name]["reason"] = check.reason
    return _json({"ok": ok, "checks": results}, status=200 if ok else 503)


def _json(data: dict[str, object], status: int = 200) -> JsonResponse:
    return JsonResponse(data, status=status, headers={"Cache-Control": "no-store"})


def _forbidden(request: HttpRequest) -> HttpResponse | None:
    if _has_token(request) or _is_near(request):
        return None
    return JsonResponse(
        {"ok": False, "error": "For operators only: see METRICS_TOKEN and OPS_ALLOWED_NETWORKS."},
        status=401 if settings.METRICS_TOKEN else 403,
        headers={"WWW-Authenticate": "Bearer"} if settings.METRICS_TOKEN else {},
    )


def _has_token(request: HttpRequest) -> bool:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return (
        bool(settings.METRICS_TOKEN)
        and scheme.lower() == "bearer"
        and secrets.compare_digest(token.strip().encode(), settings.METRICS_TOKEN.encode())
    )


def _is_near(request: HttpRequest) -> bool:
    if any(header in request.headers for header in PROXIED):
        return False
    try:
        address = ipaddress.ip_address(request.META.get("REMOTE_ADDR", ""))
    except ValueError:  # a Unix socket
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return any((mapped or address) in network for network in settings.OPS_ALLOWED_NETWORKS)
