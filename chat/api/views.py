"""The chat server's HTTP: `/api/chat/...` in plain JSON."""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.conf import settings
from django.http import HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404
from rest_framework import exceptions
from rest_framework.request import Request
from rest_framework.response import Response

from agents import inbox, retention
from agents.events import stream
from agents.llm import completions
from agents.models import Run
from agents.runs import actions
from chat.api import streams
from chat.api.serializers import MessageRequestSerializer, ThreadChangeSerializer
from chat.models import Message, Thread, page_of
from chat.permissions import CallersView, check_may_steer, check_may_write, name_of
from chat.representation import (
    accepted_json,
    finished_json,
    message_json,
    run_json,
    thread_json,
)
from lib.httperrors import Conflict
from lib.plainjson import PlainAPIView
from realm.access import Access

MAX_PAGE = 200
# A waiting request holds one of the few threads of its process; half of them stay free. Whoever finds
# no seat is answered at once, as RFC 7240 allows.
WAITING_SEATS = threading.BoundedSemaphore(4)


class ChatView(CallersView, PlainAPIView):
    statuses = {
        inbox.Invalid: 400,
        inbox.UnknownAsker: 401,
        inbox.UnknownThread: 404,
        inbox.KeyReused: 422,
        inbox.Busy: 409,
        inbox.Deleted: 409,
        Run.DoesNotExist: 404,  # deleted by another request just now
        inbox.Limited: 429,
        streams.TooManyOfOne: 429,
        streams.Full: 503,
    }

    def thread(self, thread_id: str) -> Thread:
        return get_object_or_404(self.threads().with_preview(), pk=thread_id)

    def run(self, run_id: str) -> Run:
        visible = Run.objects.visible_to(self.caller)
        return get_object_or_404(visible.select_related("answer"), pk=run_id)

    def run_to_steer(self, run_id: str) -> Run:
        visible = Run.objects.visible_to(self.caller).select_related("thread", "message")
        run = get_object_or_404(visible.defer("thread__summary"), pk=run_id)
        check_may_steer(run, self.caller)
        return run


class ApiRootView(PlainAPIView):
    authentication_classes = []

    def get(self, request: Request) -> Response:
        return Response({"ok": True, "message": "API is running"})


class MessagesView(ChatView):
    def post(self, request: Request) -> HttpResponseBase:
        """Accept a question: 202, or 200 with its outcome when `Prefer: wait=N` brings it in time, or
        with its stream where that is what the client accepts."""
        question = MessageRequestSerializer(data=request.data)
        question.is_valid(raise_exception=True)
        # Before anything is accepted.
        seat = streams.Seat(name_of(request)) if streams.wants_stream(request) else None
        accepted = self.ask(**question.validated_data)
        headers = {"Location": f"/api/chat/runs/{accepted.run_id}"}
        if accepted.repeated:
            headers["Idempotency-Replayed"] = "true"
        if seat:
            return self._stream(accepted, seat, headers)
        seconds = _seconds_to_wait(request)
        run = self._outcome(accepted.run_id, seconds) if seconds else None
        if run:
            headers["Preference-Applied"] = f"wait={seconds}"
            return Response(finished_json(accepted, run), headers=headers)
        return Response(accepted_json(accepted), status=202, headers=headers)

    def _stream(
        self, accepted: inbox.Accepted, seat: streams.Seat, headers: dict[str, str]
    ) -> HttpResponseBase:
        # A repeat may be of a run that is long gone.
        run = self.run(accepted.run_id)
        frames = streams.run_events(run, None, self.for_streams(), accepted_json(accepted))
        return streams.EventStream(frames, seat, **headers)

    def _outcome(self, run_id: str, seconds: int) -> Run | None:
        """The run, if it has ended within `seconds` and the caller still has the right to it then.
        Raises `AuthenticationFailed`."""
        access, waited = Access.of(self.request), False
        with _seat() as seated, stream.outcome_of(run_id) as outcome:
            until = time.monotonic() + seconds
            visible = Run.objects.visible_to(self.caller)
            asked = visible.select_related("answer").filter(pk=run_id)
            run = asked.first()
            while seated and run and not run.is_finished and outcome.wait(until):
                waited, run = True, asked.all().first()
        if waited and (reason := access.reason_lost()):
            raise exceptions.AuthenticationFailed(reason.sentence, str(reason))
        return run if run and run.is_finished else None


class ThreadsView(ChatView):
    def get(self, request: Request) -> Response:
        """The caller's threads, the last asked in first. `next` is the id to give as `before` for
        more, null when there are none."""
        threads = Thread.objects.listed_for(self.caller).with_preview()
        if not _flag(request, "archived"):
            threads = threads.active()
        if (before := request.query_params.get("before")) is not None:
            threads = threads.before(self.thread(before))
        limit = _limit(request.query_params.get("limit"))
        page = list(threads[: limit + 1])
        shown = page[:limit]
        return Response(
            {
                "ok": True,
                "threads": [thread_json(thread) for thread in shown],
                "next": shown[-1].pk if len(page) > limit else None,
            }
        )


class ThreadView(ChatView):
    def get(self, request: Request, thread_id: str) -> Response:
        return Response({"ok": True, "thread": thread_json(self.thread(thread_id))})

    def patch(self, request: Request, thread_id: str) -> Response:
        thread = self.thread(thread_id)
        check_may_write(thread)
        change = ThreadChangeSerializer(data=request.data)
        change.is_valid(raise_exception=True)
        thread.change(**change.validated_data)
        return self.get(request, thread_id)

    def delete(self, request: Request, thread_id: str) -> Response:
        """Delete the thread with all that was said in it; what goes on in it is cancelled."""
        thread = self.thread(thread_id)
        check_may_write(thread)
        retention.delete_thread(thread)
        return Response(status=204)


class ThreadMessagesView(ChatView):
    def get(self, request: Request, thread_id: str) -> Response:
        """The newest messages in the order asked, fewer than asked for where they are long. `next` is
        the id to give as `before` for older ones, null when there are none."""
        thread = get_object_or_404(self.threads(), pk=thread_id)
        # Of a room, what is visible to one member is hidden from another.
        visible = Message.objects.visible_to(self.caller) if thread.room_id else Message.objects
        messages = visible.filter(thread=thread).order_by("-position")
        if (before := request.query_params.get("before")) is not None:
            edge = get_object_or_404(messages, pk=_uuid(before, "before"))
            messages = messages.filter(position__lt=edge.position)
        limit = _limit(request.query_params.get("limit"))
        newest_first, has_more = page_of(messages, limit)
        shown = newest_first[::-1]
        return Response(
            {
                "ok": True,
                "messages": [message_json(message) for message in shown],
                "next": shown[0].pk if has_more else None,
            }
        )


class RunView(ChatView):
    def get(self, request: Request, run_id: str) -> Response:
        return Response({"ok": True, "run": run_json(self.run(run_id))})


class RunEventsView(ChatView):
    def get(self, request: Request, run_id: str) -> HttpResponseBase:
        """What the run tells, as server-sent events. To whoever has had the outcome there is nothing
        to tell: 204, at which a browser stops asking."""
        run, after = self.run(run_id), streams.place_asked(request)
        if after and after.attempt > run.attempt:
            raise exceptions.NotFound("The run has no such event.")
        if after == (run.attempt, streams.END) and run.is_finished:
            return HttpResponse(status=204)
        seat = streams.Seat(name_of(request))
        return streams.EventStream(streams.run_events(run, after, self.for_streams()), seat)


class RunCancelView(ChatView):
    def post(self, request: Request, run_id: str) -> Response:
        """End a run: 202; 409 when it has ended already."""
        run = self.run_to_steer(run_id)
        if not actions.cancel(run):
            # 404 where it is gone
            raise Conflict(f"The run has ended already: it is {self.run(run_id).status}.")
        return Response({"ok": True, "run": run_json(self.run(run_id))}, status=202)


class RunRetryView(ChatView):
    def post(self, request: Request, run_id: str) -> Response:
        """Have a run begun anew that failed or was cancelled: 202; 409 for any other."""
        if not inbox.ask_again(self.run_to_steer(run_id)):
            raise Conflict(self.run(run_id).why_not_retried or "Somebody else was first.")
        return Response({"ok": True, "run": run_json(self.run(run_id))}, status=202)


class ThreadEventsView(ChatView):
    def get(self, request: Request, thread_id: str) -> HttpResponseBase:
        """What happens in the thread, as server-sent events, for as long as the client stays."""
        thread = get_object_or_404(self.threads(), pk=thread_id)
        number = streams.number_asked(request)
        seat = streams.Seat(name_of(request))
        frames = streams.thread_events(thread.pk, number, self.for_streams())
        return streams.EventStream(frames, seat)


class ModelsView(ChatView):
    def get(self, request: Request) -> Response:
        """The catalogue. Where no list is set, any model may be asked for: `anyModel`."""
        allowed = settings.CHAT_ALLOWED_MODELS
        return Response(
            {
                "ok": True,
                "models": allowed or [settings.CHAT_DEFAULT_MODEL],
                "default": settings.CHAT_DEFAULT_MODEL,
                "anyModel": not allowed,
                "echo": not completions.configured(),
            }
        )


class UnknownPathView(PlainAPIView):
    """Whatever else is asked for under /api, with any method."""

    authentication_classes = []

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        raise exceptions.NotFound("There is nothing at this URL.")


@contextmanager
def _seat() -> Iterator[bool]:
    seated = WAITING_SEATS.acquire(blocking=False)
    try:
        yield seated
    finally:
        if seated:
            WAITING_SEATS.release()


def _seconds_to_wait(request: Request) -> int:
    """N of `Prefer: wait=N` (RFC 7240), at most CHAT_MAX_WAIT_SECONDS. 0 for anything else: a
    preference that makes no sense is ignored."""
    for preference in request.headers.get("Prefer", "").replace(";", ",").split(","):
        name, _, value = preference.strip().partition("=")
        value = value.strip().strip('"')
        if name.strip().lower() == "wait" and value.isascii() and value.isdigit():
            return min(int(value[:9]), settings.CHAT_MAX_WAIT_SECONDS)
    return 0


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false")
    if value not in ("true", "false"):
        raise exceptions.ParseError(f"{name} must be true or false.")
    return value == "true"


def _limit(value: str | None) -> int:
    if value is None:
        return MAX_PAGE
    if not (
        value.isascii() and value.isdigit() and len(value) <= 3 and 1 <= int(value) <= MAX_PAGE
    ):
        raise exceptions.ParseError(f"limit must be a whole number from 1 to {MAX_PAGE}.")
    return int(value)


def _uuid(value: str, name: str) -> uuid.UUID:
    try:
        return uuid.UUID(value)
    except ValueError:
        raise exceptions.ParseError(f"{name} must be the id of a message.") from None
