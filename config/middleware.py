"""What a browser is told with every answer, beside what Django's own middleware tells it."""

from collections.abc import Callable

from django.http import HttpRequest, HttpResponse


class PermissionsPolicy:
    """No page of ours asks for these; whatever finds its way into one shall not either."""

    VALUE = "camera=(), geolocation=(), microphone=(), payment=(), usb=()"

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        response.headers.setdefault("Permissions-Policy", self.VALUE)
        return response


class CachePolicy:
    """Nothing that may belong to a caller is stored, by a browser or on the way to it. What a view
    or the server of static files says itself stays; documents that are the same for everybody may be
    kept."""

    PUBLIC = frozenset({"api", "api/schema", "api/docs"})

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        match = request.resolver_match
        if match is None or match.route not in self.PUBLIC or response.status_code >= 400:
            response.headers.setdefault("Cache-Control", "no-store")
        return response


class ContentPolicy:
    """For pages that have no policy of their own, which are those of the admin. Its theme is made of
    inline scripts and of expressions, so these cannot be forbidden; but whatever finds its way into a
    page loads nothing from elsewhere, sends nothing there, and is shown in no frame."""

    VALUE = (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        if response.get("Content-Type", "").startswith("text/html"):
            response.headers.setdefault("Content-Security-Policy", self.VALUE)
        return response
