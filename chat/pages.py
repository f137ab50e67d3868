"""The chat page: HTML that works without JavaScript, and the fragments its script fetches."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.conf import settings
from django.contrib.auth import views as auth
from django.contrib.auth.views import redirect_to_login
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils.cache import add_never_cache_headers
from django.views import View
from rest_framework import exceptions

from agents import inbox, retention
from agents.llm import completions
from agents.models import Run
from agents.runs import actions
from chat import conversation, rendering
from chat.models import CHOSEN_ID, MAX_TITLE_LENGTH, Thread, ThreadQuerySet
from chat.permissions import caller_key, check_may_control, check_may_write
from realm.models import User

THREADS = 30
HEADERS = {
    # A page shows model output; nothing in it may run or load anything.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    # No DNS look-up of a link before a user follows it.
    "X-DNS-Prefetch-Control": "off",
}


class SecureView(View):
    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        response = super().dispatch(request, *args, **kwargs)
        for name, value in HEADERS.items():
            response.headers[name] = value
        add_never_cache_headers(response)
        return response


class LoginPage(SecureView, auth.LoginView):
    template_name = "chat/login.html"
    redirect_authenticated_user = True
    next_page = "chat"

    def get_redirect_url(self) -> str:  # type: ignore[override]
        # Redirecting to the login page itself would raise an exception in Django.
        url = super().get_redirect_url()
        return "" if url == self.request.path else url


class ChatPage(SecureView):
    """A page for signed-in users, and for everyone if CHAT_ALLOW_ANONYMOUS is set."""

    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        if settings.CHAT_ALLOW_ANONYMOUS or request.user.is_authenticated:
            return super().dispatch(request, *args, **kwargs)
        url = request.get_full_path()
        if not hasattr(self, "get"):  # the URL of a form accepts no GET
            thread = kwargs.get("thread_id")
            url = reverse("chat_thread", args=[thread]) if thread else reverse("chat")
        return redirect_to_login(url, reverse("chat_login"))

    @property
    def caller(self) -> User | None:
        return self.request.user if self.request.user.is_authenticated else None

    def threads(self) -> ThreadQuerySet:
        return Thread.objects.open_to(self.caller)

    def thread(self, thread_id: str) -> Thread:
        return get_object_or_404(self.threads().with_preview(), pk=thread_id)

    def writable_thread(self, thread_id: str) -> Thread:
        thread = self.thread(thread_id)
        with _as_django_error():
            check_may_write(thread)
        return thread

    def run(self, run_id: str) -> Run:
        visible = Run.objects.visible_to(self.caller)
        return get_object_or_404(visible.select_related("thread"), pk=run_id)

    def controllable_run(self, run_id: str) -> Run:
        run = self.run(run_id)
        with _as_django_error():
            check_may_control(run, self.caller)
        return run

    def page(
        self, thread: Thread | None = None, *, status: int = 200, **context: Any
    ) -> HttpResponse:
        before = self._turn("before")
        shown = conversation.load_page(thread, self.caller, before=before) if thread else None
        if shown:
            rendering.budget_of(self.request).prepare(shown.prose)
        data = {
            **self._thread_list(),
            **self._models(shown.last_model if shown else ""),
            "thread": thread,
            "page": shown,
            "key": secrets.token_hex(16),
            **context,
        }
        return render(self.request, "chat/page.html", data, status=status)

    def submit(self, thread: Thread | None) -> HttpResponse:
        """Submit the message of a form: once, and only for the user who loaded the form."""
        user, key = self.request.POST.get("user"), self.request.POST.get("key")
        try:
            if user and user != str(self.request.user.pk):
                raise inbox.Refused(
                    "You are signed in as another user now. Send the message again to use this account."
                )
            accepted = inbox.submit(
                inbox.Submission(
                    content=self.request.POST.get("content", ""),
                    model=self.request.POST.get("model") or None,
                    thread_id=thread.pk if thread else None,
                    source=Run.Source.HTTP,
                    threads=Thread.objects.owned_by(self.caller),
                    owner=self.caller,
                    idempotency=inbox.Idempotency(caller_key(self.request), key) if key else None,
                )
            )
        except inbox.Refused as error:
            draft = self.request.POST.get("content", "")
            if isinstance(error, inbox.Limited):
                return self.rate_limited(thread, error, draft=draft)
            return self.page(thread, status=400, error=str(error), draft=draft)
        return _redirect_to(accepted.thread_id, accepted.run_id)

    def rate_limited(
        self, thread: Thread | None, error: inbox.Limited, **context: Any
    ) -> HttpResponse:
        page = self.page(thread, status=429, error=str(error), **context)
        page["Retry-After"] = str(error.retry_after)
        return page

    def _thread_list(self) -> dict[str, Any]:
        archived = "archived" in self.request.GET
        threads = Thread.objects.listed_for(self.caller).with_preview()
        threads = threads.exclude(archived_at=None) if archived else threads.active()
        if edge := self.request.GET.get("older"):
            if not CHOSEN_ID.match(edge):
                raise Http404
            threads = threads.before(self.thread(edge))
        page = list(threads[: THREADS + 1])
        return {
            "threads": page[:THREADS],
            "older": page[THREADS - 1].pk if len(page) > THREADS else None,
            "archived": archived,
        }

    def _models(self, last: str) -> dict[str, Any]:
        allowed = settings.CHAT_ALLOWED_MODELS
        default = settings.CHAT_DEFAULT_MODEL
        return {
            "models": allowed,
            "chosen": last if last and (not allowed or last in allowed) else default,
            "echo": not completions.configured(),
            "development": settings.DEBUG,
        }

    def _turn(self, name: str) -> int | None:
        value = self.request.GET.get(name, "")
        if not value:
            return None
        if not (value.isascii() and value.isdigit() and len(value) <= 9):
            raise Http404
        return int(value)


class HomePage(ChatPage):
    def get(self, request: HttpRequest) -> HttpResponse:
        return self.page()

    def post(self, request: HttpRequest) -> HttpResponse:
        return self.submit(None)


class ThreadPage(ChatPage):
    def get(self, request: HttpRequest, thread_id: str) -> HttpResponse:
        return self.page(self.thread(thread_id))

    def post(self, request: HttpRequest, thread_id: str) -> HttpResponse:
        return self.submit(self.writable_thread(thread_id))


class ChangeForm(ChatPage):
    def post(self, request: HttpRequest, thread_id: str) -> HttpResponse:
        """Rename, archive or unarchive the thread."""
        title, archived = request.POST.get("title"), request.POST.get("archived")
        self.writable_thread(thread_id).change(
            title=None if title is None else _clean_title(title),
            archived=None if archived is None else archived == "true",
        )
        return redirect("chat_thread", thread_id)


class DeleteForm(ChatPage):
    def post(self, request: HttpRequest, thread_id: str) -> HttpResponse:
        retention.delete_thread(self.writable_thread(thread_id))
        return redirect("chat")


class TurnFragment(ChatPage):
    def get(self, request: HttpRequest, run_id: str) -> HttpResponse:
        """Return the turn of a run as the page of its thread shows it."""
        run = self.run(run_id)
        context = {"turn": conversation.load_turn(run), "thread": run.thread}
        return render(request, "chat/turn.html", context)


class CancelForm(ChatPage):
    def post(self, request: HttpRequest, run_id: str) -> HttpResponse:
        run = self.controllable_run(run_id)
        actions.cancel(run)
        return _redirect_to(run.thread_id, run.pk)


class RetryForm(ChatPage):
    def post(self, request: HttpRequest, run_id: str) -> HttpResponse:
        run = self.controllable_run(run_id)
        try:
            inbox.retry(run)
        except inbox.Limited as error:
            return self.rate_limited(self.thread(run.thread_id), error)
        return _redirect_to(run.thread_id, run.pk)


@contextmanager
def _as_django_error() -> Iterator[None]:
    try:
        yield
    except exceptions.PermissionDenied as error:
        raise PermissionDenied(str(error.detail)) from None


def _redirect_to(thread_id: str, run_id: str) -> HttpResponse:
    return redirect(f"{reverse('chat_thread', args=[thread_id])}#{run_id}")


def _clean_title(title: str) -> str:
    return inbox.UNSTORABLE.sub("", title).strip()[:MAX_TITLE_LENGTH]
