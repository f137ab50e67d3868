"""Who talks to the chat server, in whichever form, and what they may see."""

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
from chat.rights import Caller
from lib.clients import client_ip, network
from realm.models import User

READ_ONLY = (
    "The thread belongs to a Matrix room, and over HTTP its members may only read it. Ask, cancel and "
    "delete in the room."
)


def check_may_write(thread: Thread) -> None:
    """Of the threads that are open to the caller. Raises `PermissionDenied`."""
    if thread.room_id:
        raise exceptions.PermissionDenied(READ_ONLY)


def check_may_steer(run: Run, caller: User | None) -> None:
    """Of the runs that are visible to the caller: in a room's thread, what they asked themselves and
    no one else waits for. Raises `PermissionDenied`."""
    if run.thread.room_id and not (_is_asker(run, caller) and not run.answers_others):
        raise exceptions.PermissionDenied(
            "The run belongs to a Matrix room and answers the question of another person. Cancel it in "
            "the room."
        )


def _is_asker(run: Run, caller: User | None) -> bool:
    return bool(caller and caller.matrix_user_id and caller.matrix_user_id == run.asker)


class MayChat(BasePermission):
    """Whoever has proven who they are, and anybody where CHAT_ALLOW_ANONYMOUS is on."""

    def has_permission(self, request: Request, view: APIView) -> bool:
        # The chat page says for whom it was made: what they wrote is not to become somebody else's.
        asker = request.headers.get("X-Asked-By")
        if asker and asker != str(request.user.pk):
            raise exceptions.NotAuthenticated("You are not signed in as before.")
        if request.user.is_authenticated:
            return True
        if settings.CHAT_ALLOW_ANONYMOUS:
            return request.method in SAFE_METHODS or not _from_another_site(request)
        raise exceptions.NotAuthenticated(
            "Sign in, or send a realm-server JWT as 'Authorization: Bearer ...'."
        )


def _from_another_site(request: Request) -> bool:
    """Whether a browser sends this for a page that is not ours. Where nobody has to prove anything,
    any page that somebody looks at could else ask here, at a server that only they can reach."""
    if site := request.headers.get("Sec-Fetch-Site"):
        return site not in ("same-origin", "none")
    origin = request.headers.get("Origin")
    if origin is None or origin in settings.CSRF_TRUSTED_ORIGINS:
        return False
    try:
        return urlsplit(origin).netloc != request.get_host()
    except ValueError:
        return True


def name_of(request: HttpRequest | Request) -> str:
    """The name that a caller's streams are counted by and their idempotency keys belong to. Callers
    without an account are told apart by the network that they ask from."""
    if request.user.is_authenticated:
        return f"user:{request.user.pk}"
    return f"network:{network(client_ip(request))}"


class CallersView(APIView):
    permission_classes = [MayChat]

    @property
    def caller(self) -> User | None:
        return self.request.user if self.request.user.is_authenticated else None

    def threads(self) -> ThreadQuerySet:
        """Those that the caller may read."""
        return Thread.objects.open_to(self.caller)

    def own_threads(self) -> ThreadQuerySet:
        """Those of them that the caller may write to as well."""
        return Thread.objects.owned_by(self.caller)

    def ask(self, **question: Any) -> inbox.Accepted:
        """Raises `inbox.Refused`, `PermissionDenied`."""
        try:
            return inbox.ask(
                **question,
                source=Run.Source.HTTP,
                threads=self.own_threads(),
                owner=self.caller,
                idempotency=self.idempotency(),
            )
        except inbox.UnknownThread:
            if self.threads().filter(pk=question.get("thread_id")).exists():
                raise exceptions.PermissionDenied(READ_ONLY) from None
            raise

    def for_streams(self) -> Caller:
        return Caller.of(self.request)

    def idempotency(self) -> inbox.Idempotency | None:
        """Raises `inbox.Invalid`."""
        key = self.request.headers.get("Idempotency-Key")
        return None if key is None else inbox.Idempotency(name_of(self.request), key)
