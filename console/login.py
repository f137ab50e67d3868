"""Login to the admin: lockout by django-axes, second factor (TOTP) by django-otp."""

import io
from datetime import timedelta
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
from django.utils import timezone
from django.utils.safestring import mark_safe
from django_otp.plugins.otp_totp.models import TOTPDevice
from unfold.forms import AuthenticationForm
from unfold.widgets import BASE_INPUT_CLASSES

from console import audit
from console.models import AuditEntry
from lib.clients import client_ip

Action = AuditEntry.Action
# Staff may read other users' messages: they sign in again after a working day.
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
        # Authenticator apps show "123 456".
        return "".join((super().to_python(value) or "").split())


class CodeLoginForm(forms.Form):
    code = CodeField(required=False, label="Authenticator code, if you use one")

    def confirm_login_allowed(self, user: Any) -> None:
        super().confirm_login_allowed(user)  # type: ignore[misc]
        device = device_of(user)
        if device is None:
            return
        # Fields are cleaned before Django calls this.
        check(device, self.cleaned_data.get("code", ""))
        user.otp_device = device  # django_otp stores it in the session after login


class LoginForm(CodeLoginForm, AuthenticationForm):
    """The admin's login form, for staff."""


class ChatLoginForm(CodeLoginForm, auth_forms.AuthenticationForm):
    """The chat page's login form, for every user with a password."""


class CodeForm(forms.Form):
    code = CodeField(label="Code")

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
    """Raise `ValidationError` unless the code is current and unused. After a wrong code the device
    refuses all codes for a while, longer each time."""
    if not code:
        raise ValidationError("Enter the code from your authenticator app.")
    if not device.verify_is_allowed()[0]:
        raise ValidationError("Too many wrong codes. Wait a moment, then try again.")
    if not device.verify_token(code):
        raise ValidationError("Invalid code. Each code works once, for about 30 seconds.")


def owes_code(user: Any, *, must_have: bool = False) -> bool:
    """Return whether a signed-in user still has to enter the code of their second factor."""
    if not user.is_authenticated or user.is_verified():
        return False
    return must_have or device_of(user) is not None


def unless_owed(user: Any) -> Any:
    """Return the user, or an anonymous one while a code is owed."""
    return AnonymousUser() if owes_code(user) else user


def totp(request: HttpRequest) -> HttpResponse:
    """Set up, verify or remove the caller's second factor."""
    user: Any = request.user
    device = device_of(user)
    setting_up = device is None
    if device is None:
        device, _ = TOTPDevice.objects.get_or_create(
            user=user, confirmed=False, defaults={"name": "Authenticator app"}
        )
    form = CodeForm(request.POST or None, device=device)
    if request.method == "POST" and form.is_valid():
        return _accept(request, device, setting_up=setting_up)
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


def _accept(request: HttpRequest, device: TOTPDevice, *, setting_up: bool) -> HttpResponse:
    """Apply the action of a form whose code was right."""
    user: Any = request.user
    if setting_up:
        TOTPDevice.objects.filter(pk=device.pk).update(confirmed=True)
        audit.record(request, Action.CHANGE, user, result="Second factor set up.")
        messages.success(
            request, "Second factor set up. You need a code from now on when you log in."
        )
    elif user.is_verified() and "remove" in request.POST:
        device.delete()
        audit.record(request, Action.CHANGE, user, result="Second factor removed.")
        messages.success(request, "Second factor removed. You log in with your password only.")
        return redirect("admin:index")
    django_otp.login(request, device)
    return redirect("admin:index")


def _qr_code(text: str) -> str:
    # Imported here: every process loads this module, and only this page needs these 8 MB.
    import qrcode
    from qrcode.image.svg import SvgPathFillImage

    out = io.BytesIO()
    qrcode.make(text, image_factory=SvgPathFillImage, box_size=8).save(out)
    svg = out.getvalue().decode()
    return mark_safe(svg[svg.index("<svg") :])  # noqa: S308  (generated above; the markup contains no text)


def _secret(device: TOTPDevice) -> str:
    """Return the key to type without a camera."""
    from base64 import b32encode

    text = b32encode(device.bin_key).decode()
    return " ".join(text[at : at + 4] for at in range(0, len(text), 4))


def locked_out(request: HttpRequest, *_: Any) -> HttpResponse:
    """Show how long the lockout lasts. Called by django-axes."""
    cool_off = get_cool_off(request) or timedelta()
    attempt = AccessAttempt.objects.filter(
        username=request.POST.get("username", ""), ip_address=client_ip(request)
    ).first()
    remaining = cool_off
    if attempt is not None:
        remaining = max(attempt.attempt_time + cool_off - timezone.now(), timedelta())
    seconds = int(remaining.total_seconds()) + 1
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
        audit.new_entry(user, Action.LOGIN, user, ip=client_ip(request)).save()


def note_lockout(
    sender: Any, request: HttpRequest, username: str, ip_address: str | None, **_: Any
) -> None:
    entry = audit.new_entry(None, Action.LOCKOUT, result="Too many wrong passwords.", ip=ip_address)
    entry.name = username[:255]
    # django-axes signals a lockout again on each attempt while the account is locked.
    entries = AuditEntry.objects.filter(
        action=Action.LOCKOUT,
        name=entry.name,
        ip=ip_address,
        at__gt=entry.at - (get_cool_off(request) or timedelta()),
    )
    if not entries.exists():
        entry.save()
