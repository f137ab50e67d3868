"""Permissions and scoping shared by the chat views."""

from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.http import HttpRequest
from rest_framework import exceptions
from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.request import Request
from rest_framework.views import APIView

from agents import inbox
from agents.models import Run
from chat.models import Thread, ThreadQuerySet
from lib.clients import client_ip, network
from realm.models import User

READ_ONLY = (
    "The thread belongs to a Matrix room; over HTTP it is read-only. Send, cancel and delete in the "
    "room."
)


def check_may_write(thread: Thread) -> None:
    """Check write access to a thread that the caller may read. Raises `PermissionDenied`."""
    if thread.room_id:
        raise exceptions.PermissionDenied(READ_ONLY)


def check_may_control(run: Run, caller: User | None) -> None:
    """Check that the caller may cancel or retry a visible run: in a room's thread, only a run of the
    caller's own messages. Raises `PermissionDenied`."""
    if run.thread.room_id and not (_is_sender(run, caller) and not run.answers_others):
        raise exceptions.PermissionDenied(
            "The run belongs to a Matrix room and answers another person's message. Only that person "
            "may cancel or retry it."
        )


def _is_sender(run: Run, caller: User | None) -> bool:
    return bool(caller and caller.matrix_user_id and caller.matrix_user_id == run.requester)


class MayChat(BasePermission):
    """Allows authenticated users, and everyone if CHAT_ALLOW_ANONYMOUS is set."""

    def has_permission(self, request: Request, view: APIView) -> bool:
        # The chat page sends its user, so that a draft is not sent as another user after a new login.
        expected = request.headers.get("X-Chat-User")
        if expected and expected != str(request.user.pk):
            raise exceptions.NotAuthenticated("You are signed in as another user now.")
        if request.user.is_authenticated:
            return True
        if settings.CHAT_ALLOW_ANONYMOUS:
            return request.method in SAFE_METHODS or not _is_cross_site(request)
        raise exceptions.NotAuthenticated(
            "Sign in, or send a realm-server JWT as 'Authorization: Bearer ...'."
        )


def _is_cross_site(request: Request) -> bool:
    """Return True for a cross-site request of a browser. Without authentication, any web page could
    otherwise send messages to a server that only its visitors can reach."""
    if site := request.headers.get("Sec-Fetch-Site"):
        return site not in ("same-origin", "none")
    origin = request.headers.get("Origin")
    if origin is None or origin in settings.CSRF_TRUSTED_ORIGINS:
        return False
    try:
        return urlsplit(origin).netloc != request.get_host()
    except ValueError:
        return True


def caller_key(request: HttpRequest | Request) -> str:
    """Return the key of a caller for limits and idempotency keys: the account, or the client's
    network."""
    if request.user.is_authenticated:
        return f"user:{request.user.pk}"
    return f"network:{network(client_ip(request))}"


class CallerScopedView(APIView):
    permission_classes = [MayChat]

    @property
    def caller(self) -> User | None:
        return self.request.user if self.request.user.is_authenticated else None

    def threads(self) -> ThreadQuerySet:
        """Return the threads that the caller may read."""
        return Thread.objects.open_to(self.caller)

    def own_threads(self) -> ThreadQuerySet:
        """Return the threads that the caller may write to."""
        return Thread.objects.owned_by(self.caller)

    def submit(self, **fields: Any) -> inbox.Accepted:
        """Submit a message of the caller. Raises `inbox.Refused`, `PermissionDenied`."""
        submission = inbox.Submission(
            **fields,
            source=Run.Source.HTTP,
            threads=self.own_threads(),
            owner=self.caller,
            idempotency=self.idempotency(),
        )
        try:
            return inbox.submit(submission)
        except inbox.UnknownThread:
            if self.threads().filter(pk=submission.thread_id).exists():
                raise exceptions.PermissionDenied(READ_ONLY) from None
            raise

    def idempotency(self) -> inbox.Idempotency | None:
        """Return the idempotency key of the request. Raises `inbox.Invalid`."""
        key = self.request.headers.get("Idempotency-Key")
        return None if key is None else inbox.Idempotency(caller_key(self.request), key)
