"""The credential of a request, and the reasons for which it is no longer valid.

A response that stays open outlives the authentication of its caller. `Access` keeps the credential, and
`look_up` finds, for many at once, those that would be refused now.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Any

from django.conf import settings
from django.contrib.auth import HASH_SESSION_KEY
from django.contrib.sessions.models import Session
from django.utils import timezone
from django.utils.crypto import constant_time_compare
from django_otp import DEVICE_ID_SESSION_KEY
from django_otp.plugins.otp_totp.models import TOTPDevice

from realm import tokens
from realm.models import User


class Reason(StrEnum):
    """A stable name, for programs; `sentence` is for people."""

    sentence: str

    def __new__(cls, value: str, sentence: str) -> "Reason":
        reason = str.__new__(cls, value)
        reason._value_ = value
        reason.sentence = sentence
        return reason

    ANONYMOUS = "anonymous_not_allowed", "Anonymous requests are no longer allowed."
    DELETED = "account_deleted", "The account was deleted."
    DEACTIVATED = "account_deactivated", "The account was deactivated."
    TOKEN_EXPIRED = (
        "token_expired",
        "The token has expired. Get a new one: POST /_server-session.",
    )
    TOKEN_REVOKED = (
        "token_revoked",
        "The token has been revoked. Get a new one: POST /_server-session.",
    )
    SIGNED_OUT = "signed_out", "The session has ended. Sign in again."
    PASSWORD_CHANGED = "password_changed", "The password was changed. Sign in again."
    SECOND_FACTOR = "second_factor_required", "The account has a second factor. Sign in again."
    THREAD_DELETED = "thread_deleted", "The thread was deleted."
    THREAD_NOT_OPEN = "thread_not_open", "You no longer have access to the thread."


@dataclass(frozen=True)
class Access:
    """A credential. Two requests with an equal one have the same rights; no two users share one."""

    user_id: int | None = None
    # Of a token
    matrix_user_id: str = ""
    issued: float = 0.0
    expires: float = inf  # in seconds since 1970, the leeway included
    # Of a session
    session: str = ""
    session_hash: str = ""
    device: str = ""

    @classmethod
    def of(cls, request: Any) -> "Access":
        """Return the credential of an authenticated request of Django or REST framework."""
        if not request.user.is_authenticated:
            return cls()
        claims = getattr(request, "auth", None)
        if isinstance(claims, tokens.Claims):
            return cls(
                request.user.pk,
                matrix_user_id=claims.user,
                issued=claims.issued,
                expires=claims.expires + tokens.LEEWAY_SECONDS,
            )
        session = request.session
        return cls(
            request.user.pk,
            session=session.session_key or "",
            session_hash=session.get(HASH_SESSION_KEY, ""),
            device=session.get(DEVICE_ID_SESSION_KEY, ""),
        )

    def reason_lost(self) -> Reason | None:
        return look_up([self]).lost.get(self)


@dataclass(frozen=True)
class AccessStatus:
    lost: dict[Access, Reason]
    users: dict[int, User]


def look_up(accesses: Collection[Access]) -> AccessStatus:
    """Find the credentials that would be refused now, and the users of the others: with at most three
    queries, none for anonymous callers."""
    of_users = [access for access in accesses if access.user_id is not None]
    of_sessions = [access for access in of_users if access.session]
    users = User.objects.in_bulk({access.user_id for access in of_users}) if of_users else {}
    sessions = _open_sessions(of_sessions)
    devices = _devices(of_sessions)
    lost: dict[Access, Reason] = {}
    for access in accesses:
        reason: Reason | None
        if access.user_id is None:
            reason = None if settings.CHAT_ALLOW_ANONYMOUS else Reason.ANONYMOUS
        else:
            user = users.get(access.user_id)
            reason = _of_account(user)
            if user is not None and reason is None:
                reason = (
                    _of_session(access, user, sessions, devices.get(user.pk, set()))
                    if access.session
                    else _of_token(access, user)
                )
        if reason is not None:
            lost[access] = reason
    return AccessStatus(lost, users)


def _open_sessions(accesses: Collection[Access]) -> set[str]:
    if not accesses:
        return set()
    keys = {access.session for access in accesses}
    unexpired = Session.objects.filter(session_key__in=keys, expire_date__gt=timezone.now())
    return set(unexpired.values_list("session_key", flat=True))


def _devices(accesses: Collection[Access]) -> dict[int, set[str]]:
    devices: dict[int, set[str]] = {}
    if accesses:
        users = {access.user_id for access in accesses}
        for device in TOTPDevice.objects.filter(user__in=users, confirmed=True):
            devices.setdefault(device.user_id, set()).add(device.persistent_id)
    return devices


def _of_account(user: User | None) -> Reason | None:
    if user is None:
        return Reason.DELETED
    return None if user.is_active else Reason.DEACTIVATED


def _of_token(access: Access, user: User) -> Reason | None:
    if time.time() >= access.expires:
        return Reason.TOKEN_EXPIRED
    if not access.matrix_user_id:
        return None
    since = user.tokens_valid_from
    if access.matrix_user_id != user.matrix_user_id or (
        since and access.issued < since.timestamp()
    ):
        return Reason.TOKEN_REVOKED
    return None


def _of_session(access: Access, user: User, sessions: set[str], devices: set[str]) -> Reason | None:
    if access.session not in sessions:
        return Reason.SIGNED_OUT
    valid = [user.get_session_auth_hash(), *user.get_session_auth_fallback_hash()]
    if not any(constant_time_compare(access.session_hash, each) for each in valid):
        return Reason.PASSWORD_CHANGED
    if devices and access.device not in devices:
        return Reason.SECOND_FACTOR
    return None
