"""The OpenAPI description of the HTTP API, and a page that shows it."""

import functools
import hashlib

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.http import condition, require_safe

# Its icons are in its style sheet.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@functools.cache
def _description() -> bytes:
    text = (settings.BASE_DIR / "docs/openapi.yaml").read_bytes()
    if settings.FORCE_SCRIPT_NAME:
        servers = f"\nservers:\n- url: {settings.FORCE_SCRIPT_NAME}\npaths:\n"
        text = text.replace(b"\npaths:\n", servers.encode(), 1)
    return text


def _tag(request: HttpRequest) -> str:
    return f'"{hashlib.sha256(_description()).hexdigest()[:32]}"'


@require_safe
@condition(etag_func=_tag)
def schema(request: HttpRequest) -> HttpResponse:
    return HttpResponse(_description(), content_type="application/yaml; charset=utf-8")


@require_safe
def page(request: HttpRequest) -> HttpResponse:
    response = render(request, "description.html")
    response["Content-Security-Policy"] = POLICY
    return response
