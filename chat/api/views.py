"""Views of the chat API, `/api/chat/...`, in plain JSON."""

import uuid
from typing import Any

from django.conf import settings
from django.http import HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404
from rest_framework import exceptions
from rest_framework.request import Request
from rest_framework.response import Response

from agents import inbox, retention
from agents.llm import completions
from agents.models import Run
from agents.runs import actions
from chat.api import streams, waiting
from chat.api.serializers import MessageRequestSerializer, ThreadChangeSerializer
from chat.api.stream_access import StreamCaller
from chat.models import Message, Thread, page_of
from chat.permissions import CallerScopedView, caller_key, check_may_control, check_may_write
from chat.representation import (
    accepted_json,
    finished_json,
    message_json,
    run_json,
    run_state_json,
    thread_json,
)
from lib import lateanswer, paths
from lib.httperrors import Conflict
from lib.plainjson import PlainAPIView

MAX_PAGE = 200


class ChatView(CallerScopedView, PlainAPIView):
    statuses = {
        inbox.Invalid: 400,
        inbox.UnknownUser: 401,
        inbox.UnknownThread: 404,
        inbox.KeyReused: 422,
        inbox.Busy: 409,
        inbox.Deleted: 409,
        Run.DoesNotExist: 404,  # deleted by another request just now
        inbox.Limited: 429,
        streams.CallerStreamsExceeded: 429,
        streams.ProcessStreamsExceeded: 503,
    }

    def thread(self, thread_id: str) -> Thread:
        return get_object_or_404(self.threads().with_preview(), pk=thread_id)

    def run(self, run_id: str) -> Run:
        visible = Run.objects.visible_to(self.caller)
        return get_object_or_404(visible.select_related("answer"), pk=run_id)

    def controllable_run(self, run_id: str) -> Run:
        visible = Run.objects.visible_to(self.caller).select_related("thread", "message")
        run = get_object_or_404(visible.defer("thread__summary"), pk=run_id)
        check_may_control(run, self.caller)
        return run


class ApiRootView(PlainAPIView):
    authentication_classes = []

    def get(self, request: Request) -> Response:
        return Response({"ok": True, "message": "API is running"})


class MessagesView(ChatView):
    methods_with_fields = frozenset({"POST"})

    def post(self, request: Request) -> HttpResponseBase:
        """Submit a message: 202; 200 with the outcome if the run finishes within `Prefer: wait=N`, or
        with the stream of the run if the client accepts one."""
        message = MessageRequestSerializer(data=request.data)
        message.is_valid(raise_exception=True)
        # Before the message is recorded.
        slot = streams.StreamSlot(caller_key(request)) if streams.wants_stream(request) else None
        accepted = self.submit(**message.validated_data)
        headers = {"Location": paths.public(f"/api/chat/runs/{accepted.run_id}")}
        if accepted.repeated:
            headers["Idempotency-Replayed"] = "true"
        if slot:
            return self._stream(accepted, slot, headers)
        seconds = _seconds_to_wait(request)
        if seconds:
            return self._waiting(accepted, seconds, headers)
        return Response(accepted_json(accepted), status=202, headers=headers)

    def _stream(
        self, accepted: inbox.Accepted, slot: streams.StreamSlot, headers: dict[str, str]
    ) -> HttpResponseBase:
        # The run of a repeat may have been deleted.
        run = self.run(accepted.run_id)
        frames = streams.run_events(
            run, None, StreamCaller.of(self.request), accepted_json(accepted)
        )
        return streams.EventStream(frames, slot, **headers)

    def _waiting(
        self, accepted: inbox.Accepted, seconds: int, headers: dict[str, str]
    ) -> HttpResponseBase:
        """Return the outcome, if the run has finished, or a response that waits for it. Without a free
        slot the answer is 202 at once, as RFC 7240 allows."""
        caller = StreamCaller.of(self.request)
        # Only of a repeat: a new run has just been recorded.
        if accepted.repeated and (run := waiting.finished_run(accepted.run_id, caller)):
            headers["Preference-Applied"] = f"wait={seconds}"
            return Response(finished_json(accepted, run), headers=headers)
        response = Response(accepted_json(accepted), status=202, headers=headers)
        if slot := waiting.slot_for(caller_key(self.request)):
            pending = waiting.PendingOutcome(accepted, caller, seconds, slot)
            lateanswer.set_on(response, pending)
        else:
            response["Preference-Applied"] = "wait=0"
        return response


class ThreadsView(ChatView):
    query_parameters = frozenset({"limit", "before", "archived"})

    def get(self, request: Request) -> Response:
        """List the caller's threads, most recent first. `next` is the `before` of the next page, or
        null."""
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
    methods_with_fields = frozenset({"PATCH"})

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
        """Delete the thread and its messages, and cancel its runs."""
        thread = self.thread(thread_id)
        check_may_write(thread)
        retention.delete_thread(thread)
        return Response(status=204)


class ThreadMessagesView(ChatView):
    query_parameters = frozenset({"limit", "before"})

    def get(self, request: Request, thread_id: str) -> Response:
        """List the newest messages in chronological order, fewer than `limit` if they are long. Pass
        `next` as `before` to get older messages; it is null on the last page."""
        thread = get_object_or_404(self.threads(), pk=thread_id)
        # Members of a room see the messages since they joined.
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
        return Response({"ok": True, "run": run_state_json(self.run(run_id))})


class RunEventsView(ChatView):
    query_parameters = frozenset({"after"})

    def get(self, request: Request, run_id: str) -> HttpResponseBase:
        """Stream the events of a run. 204 if the client has received the outcome, which stops a browser
        from reconnecting."""
        run, after = self.run(run_id), streams.requested_event_id(request)
        if after and after.attempt > run.attempt:
            raise exceptions.NotFound("The run has no such event.")
        if after == (run.attempt, streams.END) and run.is_finished:
            return HttpResponse(status=204)
        slot = streams.StreamSlot(caller_key(request))
        return streams.EventStream(
            streams.run_events(run, after, StreamCaller.of(self.request)), slot
        )


class RunCancelView(ChatView):
    def post(self, request: Request, run_id: str) -> Response:
        """Cancel a run: 202, or 409 if it has finished."""
        run = self.controllable_run(run_id)
        if not actions.cancel(run):
            raise Conflict(f"The run has already finished: it is {self.run(run_id).status}.")
        return Response({"ok": True, "run": run_json(self.run(run_id))}, status=202)


class RunRetryView(ChatView):
    def post(self, request: Request, run_id: str) -> Response:
        """Retry a failed or cancelled run: 202, or 409 for any other."""
        if not inbox.retry(self.controllable_run(run_id)):
            raise Conflict(
                self.run(run_id).why_not_retried or "The run was retried by another request."
            )
        return Response({"ok": True, "run": run_json(self.run(run_id))}, status=202)


class ThreadEventsView(ChatView):
    query_parameters = frozenset({"after"})

    def get(self, request: Request, thread_id: str) -> HttpResponseBase:
        """Stream the events of a thread until the client disconnects."""
        thread = get_object_or_404(self.threads(), pk=thread_id)
        number = streams.requested_number(request)
        slot = streams.StreamSlot(caller_key(request))
        frames = streams.thread_events(thread.pk, number, StreamCaller.of(self.request))
        return streams.EventStream(frames, slot)


class ModelsView(ChatView):
    def get(self, request: Request) -> Response:
        """List the allowed models. `anyModel`: CHAT_ALLOWED_MODELS is empty, so every model is
        allowed."""
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
    """Any other path under /api, with any method."""

    authentication_classes = []

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        raise exceptions.NotFound("There is nothing at this URL.")


def _seconds_to_wait(request: Request) -> int:
    """Return N of `Prefer: wait=N` (RFC 7240), at most CHAT_MAX_WAIT_SECONDS. 0 for anything else, as
    invalid preferences are ignored."""
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
