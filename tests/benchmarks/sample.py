"""A sample history: the rows of a system that has run for some weeks. For trying the admin (demo.py)
and for measuring it (seed.py)."""

import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from django.core.management.color import no_style
from django.db import connection
from django.db.models import Model
from django.utils import timezone

from agents.llm.completions import TokenUsage
from agents.models import Attempt, Event, Price, Run, Step, Summary, new_run_id
from agents.usage import prices
from botrunner import verdicts
from botrunner.incoming.matching import Match, RuleSet
from botrunner.matrix.events import TimelineEvent
from botrunner.models import Conversation, Reply, Room, RoomEvent, Session
from chat.models import Message, Thread, new_thread_id
from realm.models import BotCommand, BotRegistration, User

Write = Callable[[type[Model], list[dict[str, Any]]], None]

PEOPLE = ["alice", "bob", "charlie", "dana", "erik", "fatima"]
MEMBERS = 4  # users with a registration
ROOMS = ["support", "release-train", "data-team", "lunch", "on-call", "onboarding", "legal", "lab"]
MODELS = {"gpt-4o-mini": 70, "gpt-4o": 20, "llama3.2": 10}
PRICES = {"gpt-4o-mini": ("0.15", "0.60", "0.075"), "gpt-4o": ("2.50", "10", "1.25")}
TALK = [
    (
        "Summarize the current state of the release",
        "Two of five tasks are open; nothing blocks it.",
    ),
    ("Who is on call this weekend?", "Dana until Sunday noon, then Erik."),
    ("Draft an answer to the customer about the invoice", "Dear customer, you are right: ..."),
    ("Why did the nightly import fail?", "The file was empty: the supplier's export had stopped."),
    ("Translate the notice into German", "Am Freitag ist das Büro geschlossen."),
    ("What changed since yesterday?", "Three merges, one of them touches the billing."),
    ("Explain this stack trace", "A connection was closed while it was still in use."),
    ("Write a test for the parser", "def test_an_empty_line_is_skipped(): ..."),
]
FAILURES = {
    "timeout": ("The model did not answer in time.", 34),
    "rate_limited": ("The model is overloaded.", 24),
    "unavailable": ("The model is not available.", 14),
    "too_long": ("The message is too long for the model.", 12),
    "broken": ("The model broke off its answer.", 8),
    "key_refused": ("The model refused the server's key.", 5),
    "internal": ("Something went wrong in the server.", 3),
}
# Room messages that trigger nothing.
REMARKS = ["Good morning!", "I am back at two.", "ask the bot?", "Thanks", "Who has the key?"]
REMARK_SHARE = 0.2
FAILING = 0.04
TOOL_SHARE, MATRIX_SHARE, STREAM_SHARE = 0.1, 0.35, 0.08
MEAN_TURNS = 5
BATCH = 5000
# In the order of their foreign keys.
TABLES: list[type[Model]] = [
    Thread,
    Conversation,
    Message,
    Run,
    Attempt,
    Step,
    Event,
    Summary,
    RoomEvent,
    Reply,
]


def create(model: type[Model], rows: list[dict[str, Any]]) -> None:
    model._default_manager.bulk_create([model(**row) for row in rows], batch_size=1000)


@dataclass
class History:
    """`runs` runs over the last `days` days, written by `write` in batches; `failing` is the share of
    failed runs outside the outage."""

    runs: int
    days: int = 7
    write: Write = create
    seed: int = 4711
    failing: float = FAILING
    users: list[User] = field(default_factory=list)
    rooms: list[Room] = field(default_factory=list)
    registrations: dict[int, BotRegistration] = field(default_factory=dict)  # by their users

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.now = timezone.now()
        self.end = self.now - timedelta(minutes=2)
        self.begin = self.end - timedelta(days=self.days)
        # A bad evening two days ago, as every system has one.
        self.outage = self.end - timedelta(days=min(2, self.days / 2))
        self._rows: dict[type[Model], list[dict[str, Any]]] = {}
        self._event_id = 0
        self._questions: list[dict[str, Any]] = []

    def write_all(self) -> int:
        """Write the whole history. Return the number of runs."""
        self._create_users_and_rooms()
        count = 0
        for runs in self._threads():
            count += runs
            if sum(map(len, self._rows.values())) >= BATCH:
                self._flush()
        self._flush()
        # Room events got explicit ids, as replies refer to them.
        with connection.cursor() as cursor:
            for statement in connection.ops.sequence_reset_sql(no_style(), [RoomEvent]):
                cursor.execute(statement)
        return count

    def _create_users_and_rooms(self) -> None:
        for name in PEOPLE:
            self.users.append(User.objects.of_matrix_id(f"@{name}:demo.localhost"))
        session, _ = Session.objects.get_or_create(
            homeserver="https://demo.localhost",
            username="bot",
            defaults={"user_id": "@bot:demo.localhost", "last_sync_at": self.end},
        )
        for number, name in enumerate(ROOMS):
            room, _ = Room.objects.get_or_create(
                session=session,
                room_id=f"!{name}:demo.localhost",
                defaults={
                    "membership": Room.Membership.JOINED,
                    "inviter": self.users[number % len(self.users)].username,
                },
            )
            self.rooms.append(room)
        for user in self.users[:MEMBERS]:
            registration = BotRegistration.objects.create(
                user=user, username=user.matrix_user_id or "", created_at=self.begin
            )
            self.registrations[user.pk] = registration
            for prefix in ("!ask ", "!sum "):
                BotCommand.objects.create(
                    registration=registration,
                    command="chat.reply",
                    filter={
                        "type": "matrix-event",
                        "event_type": "m.room.message",
                        "content_type": "m.text",
                        "prefix": prefix,
                    },
                    created_at=self.begin,
                )
        for model, (prompt, completion, cached) in PRICES.items():
            Price.objects.get_or_create(
                model=model,
                valid_from=self.begin.date() - timedelta(days=1),
                defaults={"prompt": prompt, "completion": completion, "cached": cached},
            )
        prices.price_list.reset()
        members = [user.matrix_user_id or "" for user in self.users]
        self._rules = RuleSet(members, session.user_id)
        last = RoomEvent.objects.order_by("-pk").values_list("pk", flat=True).first()
        self._event_id = last or 0

    def _threads(self) -> Iterator[int]:
        """Write the threads; yield the number of runs of each."""
        remaining = self.runs
        while remaining > 0:
            turns = min(remaining, 1 + int(self.random.expovariate(1 / (MEAN_TURNS - 1))))
            # The first thread is slow, as an example to investigate.
            self._thread(turns, slow=remaining == self.runs)
            remaining -= turns
            yield turns

    def _thread(self, turns: int, *, slow: bool) -> None:
        chance = self.random.random()
        matrix = chance < MATRIX_SHARE
        stream = not matrix and chance < MATRIX_SHARE + STREAM_SHARE
        asking = self.users[:MEMBERS] if matrix else self.users
        owner = None if stream else self.random.choice(asking)
        # Some rooms are busier than others.
        room = self.rooms[min(int(self.random.expovariate(0.5)), len(self.rooms) - 1)]
        source = Run.Source.MATRIX if matrix else Run.Source.STREAM if stream else Run.Source.HTTP
        thread_id, at = new_thread_id(), self._moment()
        answered = 0
        for turn in range(turns):
            question, answer = self.random.choice(TALK)
            where = room if matrix else None
            run = self._run(thread_id, turn, at, source, where, question, answer, slow=slow)
            answered += run["status"] == Run.Status.COMPLETED
            if matrix and owner:
                self._asked_in_room(run, question, room, owner)
            at = min(
                run["finished_at"] + timedelta(seconds=self.random.expovariate(1 / 90)), self.end
            )
        summarised = self._summary(thread_id, answered, at) if answered > 4 else {}
        if matrix:
            self._add(
                Conversation, room_id=room.pk, root=f"${uuid.uuid4().hex}", thread_id=thread_id
            )
        self._add(
            Thread,
            id=thread_id,
            owner_id=owner.pk if owner and not matrix else None,
            room_id=room.room_id if matrix else "",
            turns=turns,
            created_at=self._rows[Run][-turns]["created_at"],
            updated_at=at,
            **summarised,
        )

    def _moment(self) -> datetime:
        """More in working hours than at night."""
        while True:
            at = self.begin + (self.end - self.begin) * self.random.random()
            if 8 <= at.hour < 18 or self.random.random() < 0.3:
                return at

    def _run(
        self,
        thread_id: str,
        turn: int,
        at: datetime,
        source: str,
        room: Room | None,
        question: str,
        answer: str,
        *,
        slow: bool,
    ) -> dict[str, Any]:
        model = "gpt-4o" if slow else self._one_of(MODELS)
        began = min(at + self._seconds(0.08, most=60), self.now)
        status, code = self._ending(at)
        run: dict[str, Any] = {
            "id": new_run_id(),
            "thread_id": thread_id,
            "message_id": uuid.uuid4(),
            "answer_id": uuid.uuid4() if status == Run.Status.COMPLETED else None,
            "position": 2 * turn,
            "correlation_id": str(uuid.uuid4()),
            "request_event_id": uuid.uuid4(),
            "source": source,
            "place": room.room_id if room else "",
            "model": model,
            "status": status,
            "error_code": code,
            "safe_error": FAILURES[code][0] if code else "",
            "created_at": at,
            "started_at": began,
            "due_at": None,
            "dispatched_at": at,
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "cost": 0,
            "attempt": 0,
        }
        ended = began
        retries = self.random.choice([1, 2, 3]) if self.random.random() < 0.03 else 0
        for number in range(1, retries + 2):
            last = number == retries + 1
            result = Attempt.Result(status.value) if last else Attempt.Result.RETRIED
            why = code if last else self.random.choice(["timeout", "rate_limited", "unavailable"])
            if number > 1:
                ended = min(ended + self._seconds(2**number, most=60), self.now)
            ended = self._attempt(run, number, ended, result, why, answer, slow=slow)
        run |= {"finished_at": ended, "updated_at": ended, "claimed_at": began}
        self._message(run["message_id"], run, 0, Message.Role.USER, question, at)
        if run["answer_id"]:
            self._message(run["answer_id"], run, 1, Message.Role.ASSISTANT, answer, ended)
        self._events(run, question, answer)
        self._add(Run, **run)
        return run

    def _ending(self, at: datetime) -> tuple[Run.Status, str]:
        bad = abs(at - self.outage) < timedelta(hours=2)
        chance = self.random.random()
        if chance < (max(0.4, self.failing) if bad else self.failing):
            weights = {code: weight for code, (_, weight) in FAILURES.items()}
            return Run.Status.FAILED, "rate_limited" if bad else self._one_of(weights)
        if chance > 0.985:
            return Run.Status.CANCELLED, ""
        return Run.Status.COMPLETED, ""

    def _attempt(
        self,
        run: dict[str, Any],
        number: int,
        began: datetime,
        result: Attempt.Result,
        code: str,
        answer: str,
        *,
        slow: bool,
    ) -> datetime:
        """Write an attempt and its steps, add its usage to the run and return its end."""
        error = FAILURES[code][0] if code else ""
        took = self._seconds(20 if slow else 60 if code == "timeout" else 1.4, most=300)
        took = min(took, self.now - began)
        used = result != Attempt.Result.CANCELLED
        tool = used and self.random.random() < TOOL_SHARE
        usage = TokenUsage()
        if used and code not in ("timeout", "rate_limited", "unavailable", "key_refused"):
            prompt = int(self.random.lognormvariate(6, 0.8))
            usage = TokenUsage(prompt, int(self.random.lognormvariate(4.5, 0.7)), prompt // 3)
        cost = prices.cost(run["model"], usage)
        duration = int(took.total_seconds() * 1000)
        common = {"run_id": run["id"], "attempt": number, "created_at": began + took}
        if tool:
            self._add(
                Step,
                **common,
                kind=Step.Kind.TOOL,
                name="calendar.lookup",
                input={"arguments": '{"week": 12}'},
                output="Nothing planned.",
                duration_ms=40,
            )
        if used:
            self._add(
                Step,
                **common,
                kind=Step.Kind.MODEL,
                name=run["model"],
                input={"summaryUpTo": None, "messages": [str(run["message_id"])]},
                output="" if error else answer,
                error=error,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens,
                cost=cost,
                duration_ms=duration,
            )
        self._add(
            Attempt,
            run_id=run["id"],
            number=number,
            worker=f"demo-{1 + number % 3}:17:ab12cd",
            result=result,
            error=error,
            error_code=code,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cost=cost,
            model_ms=duration if used else 0,
            started_at=began,
            ended_at=began + took,
        )
        run["attempt"], run["worker"] = number, f"demo-{1 + number % 3}:17:ab12cd"
        run["prompt_tokens"] += usage.prompt_tokens
        run["completion_tokens"] += usage.completion_tokens
        run["cost"] = prices.total([run["cost"], cost])
        return began + took

    def _message(
        self, pk: uuid.UUID, run: dict[str, Any], offset: int, role: str, text: str, at: datetime
    ) -> None:
        self._add(
            Message,
            id=pk,
            thread_id=run["thread_id"],
            position=run["position"] + offset,
            role=role,
            content=text,
            correlation_id=run["correlation_id"],
            created_at=at,
        )

    def _events(self, run: dict[str, Any], question: str, answer: str) -> None:
        ids = {"runId": run["id"], "threadId": run["thread_id"]}
        outcome = {"requestEventId": str(run["request_event_id"]), **ids}
        payloads = {
            Run.Status.COMPLETED: {"output": answer},
            Run.Status.FAILED: {"error": run["safe_error"]},
            Run.Status.CANCELLED: {},
        }
        for pk, kind, at, payload in (
            (
                run["request_event_id"],
                Event.Type.REQUESTED,
                run["created_at"],
                {**ids, "prompt": question, "model": run["model"]},
            ),
            (
                uuid.uuid4(),
                Event.Type(f"agent.run.{run['status'].value}"),
                run["finished_at"],
                {**outcome, **payloads[run["status"]]},
            ),
        ):
            self._add(
                Event,
                id=pk,
                type=kind,
                run_id=run["id"],
                correlation_id=run["correlation_id"],
                payload=payload,
                created_at=at,
                published_at=at + timedelta(milliseconds=9),
            )

    def _asked_in_room(self, run: dict[str, Any], question: str, room: Room, owner: User) -> None:
        if self.random.random() < REMARK_SHARE:
            earlier = run["created_at"] - self._seconds(20, most=300)
            self._said(room, self.random.choice(self.users), self.random.choice(REMARKS), earlier)
        match = self._said(room, owner, f"!ask {question}", run["created_at"])
        dropped = self.random.random() < 0.01
        self._add(
            Reply,
            message_id=self._event_id,
            room_id=room.pk,
            run_id=run["id"],
            registration_id=self.registrations[owner.pk].pk,
            bot_command_id=match.fired[0][0].command_id,
            key=run["id"],
            status=Reply.Status.DROPPED if dropped else Reply.Status.SENT,
            error="The bot may not write in the room." if dropped else "",
            attempts=1,
            created_at=run["created_at"],
            ready_at=run["finished_at"],
            sent_at=None if dropped else run["finished_at"] + timedelta(milliseconds=80),
        )

    def _said(self, room: Room, sender: User, words: str, at: datetime) -> Match:
        """Write an event of a room, with its matches by the commands."""
        self._event_id += 1
        source: dict[str, Any] = {
            "type": "m.room.message",
            "event_id": f"${uuid.uuid4().hex}",
            "sender": sender.matrix_user_id or "",
            "origin_server_ts": int(at.timestamp() * 1000),
            "content": {"msgtype": "m.text", "body": words},
        }
        event = TimelineEvent(
            source["event_id"], source["sender"], at, source["type"], source["content"], source
        )
        match = self._rules.match(event)
        self._add(
            RoomEvent,
            id=self._event_id,
            room_id=room.pk,
            event_id=event.event_id,
            kind=RoomEvent.Kind.MESSAGE if match.fired else RoomEvent.Kind.OTHER,
            state=RoomEvent.State.HANDLED if match.fired else RoomEvent.State.IGNORED,
            sender=event.sender,
            type=event.type,
            content_type=event.content_type,
            sent_at=at,
            source=event.source if match.fired else None,
            note=match.reason,
            verdicts=verdicts.stored(match.verdicts),
            created_at=at,
        )
        return match

    def _summary(self, thread_id: str, answered: int, at: datetime) -> dict[str, Any]:
        usage = TokenUsage(900, 120)
        text = "They spoke about the release, and who is on call."
        self._add(
            Summary,
            thread_id=thread_id,
            covers_from=0,
            covers_to=answered,
            text=text,
            model="gpt-4o-mini",
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cost=prices.cost("gpt-4o-mini", usage),
            created_at=at,
        )
        return {"summary": text, "summary_reach": answered}

    def _one_of(self, weights: dict[str, int]) -> str:
        return self.random.choices(list(weights), list(weights.values()))[0]

    def _seconds(self, median: float, *, most: float) -> timedelta:
        return timedelta(seconds=min(most, median * self.random.lognormvariate(0, 0.7)))

    def _add(self, model: type[Model], /, **row: Any) -> None:
        self._rows.setdefault(model, []).append(row)

    def _flush(self) -> None:
        for model in TABLES:
            if rows := self._rows.pop(model, None):
                self.write(model, rows)
