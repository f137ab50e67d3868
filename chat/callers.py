"""Who talks to the chat server, in whichever form, and what they may see."""

from urllib.parse import urlsplit

from django.conf import settings
from django.http import HttpRequest
from rest_framework import exceptions
from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.request import Request
from rest_framework.views import APIView

from agents import inbox
from chat.models import Thread, ThreadQuerySet
from chat.rights import Caller
from console.audit import client_ip
from realm.models import User
from realm.throttles import network


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
        return Thread.objects.open_to(self.caller)

    def for_streams(self) -> Caller:
        return Caller.of(self.request)

    def idempotency(self) -> inbox.Idempotency | None:
        """Raises `inbox.Invalid`."""
        key = self.request.headers.get("Idempotency-Key")
        return None if key is None else inbox.Idempotency(name_of(self.request), key)
