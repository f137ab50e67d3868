from collections.abc import Callable

from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.urls import reverse

from console import refused

KNOWN = ("GET", "HEAD", "POST")


class AdminMethods:
    """The admin's pages are functions that take whatever is no POST for a reading: a DELETE would be
    answered with the page that it was to delete, and TRACE with a form."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.method not in KNOWN and request.path_info.startswith(reverse("admin:index")):
            return HttpResponseNotAllowed(KNOWN)
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        return refused.answer(request, exception)
