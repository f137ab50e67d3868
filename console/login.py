"""Signing in to the admin: throttled by django-axes, with a second factor (TOTP) by django-otp."""

import io
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import django_otp
from axes.helpers import get_cool_off
from axes.models import AccessAttempt
from django import forms
from django.conf import settings
from django.contrib import admin, messages
from django.contrib.auth import forms as auth_forms
from django.contrib.auth.models import AnonymousUser
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils import timezone
from django.utils.functional import SimpleLazyObject
from django.utils.safestring import mark_safe
from django_otp.plugins.otp_totp.models import TOTPDevice
from unfold.forms import AuthenticationForm
from unfold.widgets import BASE_INPUT_CLASSES

from console import audit
from console.models import AuditEntry
from lib.clients import client_ip, network
from realm import throttles

Action = AuditEntry.Action
# Of those who may look at what others said: after a day's work they sign in again.
STAFF_SESSION = timedelta(hours=8)


class CodeField(forms.CharField):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            max_length=10,
            widget=forms.TextInput(
                attrs={
                    "autocomplete": "one-time-code",
                    "inputmode": "numeric",
                    "class": " ".join(BASE_INPUT_CLASSES),
                }
            ),
            **kwargs,
        )

    def to_python(self, value: Any) -> str:
        # Apps show "123 456".
        return "".join((super().to_python(value) or "").split())


class AsksForCode(forms.Form):
    code = CodeField(required=False, label="Code of your authenticator app, if you use one")

    def confirm_login_allowed(self, user: Any) -> None:
        super().confirm_login_allowed(user)  # type: ignore[misc]
        device = device_of(user)
        if device is None:
            return
        # Fields are cleaned before this is called.
        check(device, self.cleaned_data.get("code", ""))
        user.otp_device = device  # django_otp notes it in the session once it is there


class LoginForm(AsksForCode, AuthenticationForm):
    """To the admin, for staff."""


class ChatLoginForm(AsksForCode, auth_forms.AuthenticationForm):
    """To the chat page, for everybody with a password."""


class CodeForm(forms.Form):
    code = CodeField(label="Code that the app shows")

    def __init__(self, *args: Any, device: TOTPDevice, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.device = device

    def clean_code(self) -> str:
        code: str = self.cleaned_data["code"]
        check(self.device, code)
        return code


def device_of(user: Any) -> TOTPDevice | None:
    device: TOTPDevice | None = TOTPDevice.objects.filter(user=user, confirmed=True).first()
    return device


def check(device: TOTPDevice, code: str) -> None:
    """Raises `ValidationError` unless the code is the one of now, and has not been used. After a
    wrong one the device takes none for a while, each time for longer."""
    if not code:
        raise ValidationError("Enter the code that your authenticator app shows.")
    if not device.verify_is_allowed()[0]:
        raise ValidationError("Too many wrong codes: wait a little, then try again.")
    if not device.verify_token(code):
        raise ValidationError("This is not the code of now. Each code is taken once.")


class SecondFactor:
    """Nobody gets in with a password alone who has a second factor, nor to the admin who must have one.

    At each request and not only at the login: for the sessions that were there before the device. In
    the admin such a one is asked for a code; elsewhere it is nobody's, who is asked to sign in.
    """

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.path_info.startswith(reverse("admin:index")):
            if self._stops(request):
                return redirect("console_totp")
        else:
            # Looked up only where somebody asks who it is.
            user: Any = SimpleLazyObject(partial(_unless_owed, request.user))
            request.user = user
        return self.get_response(request)

    def _stops(self, request: HttpRequest) -> bool:
        if request.path_info in {
            reverse("admin:login"),
            reverse("admin:logout"),
            reverse("admin:jsi18n"),
            reverse("console_totp"),
        }:
            return False
        return _owes_code(request.user, must_have=settings.ADMIN_REQUIRE_TOTP)


class LoginTries:
    """So many tries to sign in a minute from one address, whatever the names: django-axes counts the
    wrong ones of each name, and each try costs a password's hash. With IPv6, of one /64."""

    VIEWS = frozenset({"admin:login", "chat_login"})

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self.get_response(request)

    def process_view(self, request: HttpRequest, *_: Any) -> HttpResponse | None:
        match, most = request.resolver_match, settings.LOGIN_TRIES_PER_MINUTE
        if request.method != "POST" or match is None or match.view_name not in self.VIEWS:
            return None
        address = network(client_ip(request))
        if not most or throttles.count_attempt(f"login:{address}") <= most:
            return None
        context = {**admin.site.each_context(request), "title": "Too many tries", "most": most}
        page = render(request, "console/too_many_tries.html", context, status=429)
        page["Retry-After"] = str(throttles.seconds_until_reset())
        return page


def _owes_code(user: Any, *, must_have: bool = False) -> bool:
    """Whether whoever has signed in has yet to show that they have their second factor."""
    if not user.is_authenticated or user.is_verified():
        return False
    return must_have or device_of(user) is not None


def _unless_owed(user: Any) -> Any:
    return AnonymousUser() if _owes_code(user) else user


def totp(request: HttpRequest) -> HttpResponse:
    """One's own second factor: set it up, show one's code, take it away."""
    user: Any = request.user
    device = device_of(user)
    setting_up = device is None
    if device is None:
        device, _ = TOTPDevice.objects.get_or_create(
            user=user, confirmed=False, defaults={"name": "Authenticator app"}
        )
    form = CodeForm(request.POST or None, device=device)
    if request.method == "POST" and form.is_valid():
        return _done(request, device, setting_up=setting_up)
    context = {
        **admin.site.each_context(request),
        "title": "Second factor",
        "form": form,
        "setting_up": setting_up,
        "verified": user.is_verified(),
        "required": settings.ADMIN_REQUIRE_TOTP,
    }
    if setting_up:
        context |= {"qr": _qr_code(device.config_url), "secret": _secret(device)}
    return render(request, "console/totp.html", context)


def _done(request: HttpRequest, device: TOTPDevice, *, setting_up: bool) -> HttpResponse:
    """A code was right."""
    user: Any = request.user
    if setting_up:
        TOTPDevice.objects.filter(pk=device.pk).update(confirmed=True)
        audit.note(request, Action.CHANGE, user, result="Second factor set up.")
        messages.success(request, "From now on you are asked for a code when you log in.")
    elif user.is_verified() and "remove" in request.POST:
        device.delete()
        audit.note(request, Action.CHANGE, user, result="Second factor taken away.")
        messages.success(request, "You log in with your password alone now.")
        return redirect("admin:index")
    django_otp.login(request, device)
    return redirect("admin:index")


def _qr_code(text: str) -> str:
    # Here, because every process loads this module, and these bring 8 MB that none but this needs.
    import qrcode
    from qrcode.image.svg import SvgPathFillImage

    out = io.BytesIO()
    qrcode.make(text, image_factory=SvgPathFillImage, box_size=8).save(out)
    svg = out.getvalue().decode()
    return mark_safe(svg[svg.index("<svg") :])  # noqa: S308  (made here, of a URL that is in no markup)


def _secret(device: TOTPDevice) -> str:
    """To be typed where no camera is at hand."""
    from base64 import b32encode

    text = b32encode(device.bin_key).decode()
    return " ".join(text[at : at + 4] for at in range(0, len(text), 4))


def locked_out(request: HttpRequest, *_: Any) -> HttpResponse:
    """Says for how long; django-axes calls it."""
    cool_off = get_cool_off(request) or timedelta()
    attempt = AccessAttempt.objects.filter(
        username=request.POST.get("username", ""), ip_address=client_ip(request)
    ).first()
    left = cool_off
    if attempt is not None:
        left = max(attempt.attempt_time + cool_off - timezone.now(), timedelta())
    seconds = int(left.total_seconds()) + 1
    page = render(
        request,
        "console/locked_out.html",
        {**admin.site.each_context(request), "title": "Locked", "minutes": -(-seconds // 60)},
        status=429,
    )
    page["Retry-After"] = str(seconds)
    return page


def note_login(sender: Any, request: HttpRequest | None, user: Any, **_: Any) -> None:
    if request is not None:
        if user.is_staff:
            request.session.set_expiry(int(STAFF_SESSION.total_seconds()))
        audit.entry_of(user, Action.LOGIN, user, ip=client_ip(request)).save()


def note_lockout(
    sender: Any, request: HttpRequest, username: str, ip_address: str | None, **_: Any
) -> None:
    entry = audit.entry_of(None, Action.LOCKOUT, result="Too many wrong passwords.", ip=ip_address)
    entry.name = username[:255]
    # Each attempt while it is locked is told as a new lock.
    told = AuditEntry.objects.filter(
        action=Action.LOCKOUT,
        name=entry.name,
        ip=ip_address,
        at__gt=entry.at - (get_cool_off(request) or timedelta()),
    )
    if not told.exists():
        entry.save()
