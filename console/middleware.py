"""Middleware of the console: methods and refusals of the admin, the second factor, login throttling."""

from collections.abc import Callable
from functools import partial
from typing import Any

import structlog
from django.conf import settings
from django.contrib import admin
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.functional import SimpleLazyObject

from console import refusals
from console.login import owes_code, unless_owed
from lib.clients import client_ip, network
from lib.ratelimitedlog import RateLimitedLog
from realm import throttles

METHODS = ("GET", "HEAD", "POST")
log_info = RateLimitedLog(structlog.get_logger(__name__).info)


class AdminMethodsMiddleware:
    """Answers 405 to unusual methods on admin pages, and shows noted refusals. Django's admin views
    treat every method except POST as a read: DELETE would return the page of the row, TRACE a form."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.method not in METHODS and request.path.startswith(reverse("admin:index")):
            return HttpResponseNotAllowed(METHODS)
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        return refusals.response(request, exception)


class SecondFactorMiddleware:
    """Requires the code of users who have a second factor, and a second factor in the admin where
    ADMIN_REQUIRE_TOTP is set.

    Checked on each request and not only at login, for sessions that are older than the device. The
    admin asks such a session for its code; elsewhere it counts as anonymous.
    """

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.path.startswith(reverse("admin:index")):
            if self._must_verify(request):
                return redirect("console_totp")
        else:
            # Lazy: queries the device only if the view uses the user.
            user: Any = SimpleLazyObject(partial(unless_owed, request.user))
            request.user = user
        return self.get_response(request)

    def _must_verify(self, request: HttpRequest) -> bool:
        if request.path in {
            reverse("admin:login"),
            reverse("admin:logout"),
            reverse("admin:jsi18n"),
            reverse("console_totp"),
        }:
            return False
        return owes_code(request.user, must_have=settings.ADMIN_REQUIRE_TOTP)


class LoginThrottleMiddleware:
    """Limits login attempts per minute and address (IPv6: per /64), across all user names: django-axes
    counts wrong passwords per name, and each attempt costs a password hash."""

    VIEWS = frozenset({"admin:login", "chat_login"})

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self.get_response(request)

    def process_view(self, request: HttpRequest, *_: Any) -> HttpResponse | None:
        match, limit = request.resolver_match, settings.LOGIN_TRIES_PER_MINUTE
        if request.method != "POST" or match is None or match.view_name not in self.VIEWS:
            return None
        address = network(client_ip(request))
        if not limit or throttles.count_attempt(f"login:{address}") <= limit:
            return None
        log_info("Login attempts refused by a limit", setting="LOGIN_TRIES_PER_MINUTE")
        title = "Too many attempts"
        context = {**admin.site.each_context(request), "title": title, "limit": limit}
        page = render(request, "console/too_many_attempts.html", context, status=429)
        page["Retry-After"] = str(throttles.seconds_until_reset())
        return page
