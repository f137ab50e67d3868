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
