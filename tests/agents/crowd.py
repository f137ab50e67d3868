"""Many who do everything at once to a few threads: what tests/agents/test_crowd.py counts."""

import random
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from django.db import connection, transaction
from django.http import QueryDict
from django.test import RequestFactory
from django.utils import timezone
from rest_framework.test import APIClient

from agents import retention
from agents.llm import completions, loop
from agents.models import Event, Run
from agents.runs import actions, execution, leases, outcomes
from agents.usage import rollups
from agents.worker import dispatch
from chat.models import Thread
from console import bulk
from lib import db
from realm.models import User
from webhooks import deliveries

PEOPLE = 3
PLACES = 3  # threads of each person, by ids that they choose

# What a client may be answered, and no more.
EXPECTED = {
    "ask": {202, 401, 404, 409},  # 401: the account was deleted just now
    "ask with a key": {202, 401, 404, 409, 422},
    "cancel": {202, 404, 409},
    "retry": {202, 404, 409},
    "delete": {204, 404},
    "change": {200, 404},
}


@dataclass
class Report:
    done: Counter[str] = field(default_factory=Counter)
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    @property
    def unexpected(self) -> dict[tuple[str, int], int]:
        return {
            (what, status): count
            for (what, status), count in self.answers.items()
            if status not in EXPECTED[what]
        }


class Crowd:
    """Threads of this process, each with a connection of its own."""

    def __init__(self, staff: User, seed: int = 1) -> None:
        self.staff = staff
        self.seed = seed
        self.report = Report()
        self._lock = threading.Lock()
        self._left = 0
        self.people = [self._person(number) for number in range(PEOPLE)]

    def _person(self, number: int) -> User:
        user, _ = User.objects.get_or_create(
            username=f"person{number}", defaults={"matrix_user_id": f"@person{number}:localhost"}
        )
        return user

    def run(self, operations: int, *, side_by_side: int = 8) -> Report:
        self._left = operations
        members = [
            threading.Thread(target=self._member, args=(number,), name=f"member-{number}")
            for number in range(side_by_side)
        ]
        for member in members:
            member.start()
        for member in members:
            member.join()
        return self.report

    def _member(self, number: int) -> None:
        member = Member(self, random.Random(f"{self.seed}-{number}"))
        try:
            while self._take():
                self._one(member)
        finally:
            connection.close()

    def _take(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0

    def _one(self, member: "Member") -> None:
        name, deed = member.choose()
        try:
            status = deed()
        except Exception as error:
            short = str(error).partition("\n")[0]
            with self._lock:
                self.report.kinds[f"{name}: {type(error).__name__}: {short}"] += 1
                self.report.errors.append(f"{name}: {traceback.format_exc()}")
            connection.close()
        else:
            with self._lock:
                if status:
                    self.report.answers[name, status] += 1
        finally:
            with self._lock:
                self.report.done[name] += 1


class Member:
    def __init__(self, crowd: Crowd, luck: random.Random) -> None:
        self.crowd = crowd
        self.luck = luck
        self.api = APIClient(raise_request_exception=True)
        self.deeds: list[tuple[str, int, Callable[[], int | None]]] = [
            ("ask", 20, self.ask),
            ("ask with a key", 6, self.ask_with_key),
            ("cancel", 10, self.cancel),
            ("retry", 8, self.retry),
            ("delete", 8, self.delete),
            ("change", 6, self.change),
            ("work", 20, self.work),
            ("bulk", 3, self.bulk),
            ("prune", 3, self.prune),
            ("delete a user", 1, self.delete_user),
            ("keep", 6, self.keep),
        ]

    def choose(self) -> tuple[str, Callable[[], int | None]]:
        weights = [weight for _, weight, _ in self.deeds]
        name, _, deed = self.luck.choices(self.deeds, weights)[0]
        return name, deed

    def someone(self) -> User:
        user = self.luck.choice(self.crowd.people)
        self.api.force_authenticate(user)
        return user

    def thread_id(self, user: User) -> str:
        return f"{user.username}-{self.luck.randrange(PLACES)}"

    def run_id(self, user: User) -> str:
        # Of the latest ones, which others are at too.
        mine = Run.objects.filter(thread__owner=user).order_by("-created_at")
        ids = list(mine.values_list("pk", flat=True)[:12])
        return self.luck.choice(ids) if ids else "none"

    def ask(self, **headers: str) -> int:
        user = self.someone()
        question = {"content": "Hello", "threadId": self.thread_id(user)}
        question["whenBusy"] = self.luck.choice(["enqueue", "merge", "interrupt", "reject"])
        return self.api.post(
            "/api/chat/messages", question, format="json", headers=headers
        ).status_code

    def ask_with_key(self) -> int:
        return self.ask(**{"Idempotency-Key": f"key-{self.luck.randrange(30)}"})

    def cancel(self) -> int:
        user = self.someone()
        return self.api.post(f"/api/chat/runs/{self.run_id(user)}/cancel").status_code

    def retry(self) -> int:
        user = self.someone()
        return self.api.post(f"/api/chat/runs/{self.run_id(user)}/retry").status_code

    def delete(self) -> int:
        user = self.someone()
        return self.api.delete(f"/api/chat/threads/{self.thread_id(user)}").status_code

    def change(self) -> int:
        user = self.someone()
        change = self.luck.choice([{"title": "Name"}, {"archived": True}, {"archived": False}])
        where = f"/api/chat/threads/{self.thread_id(user)}"
        return self.api.patch(where, change, format="json").status_code

    def work(self) -> None:
        """What a worker does with a run: claim it, and bring something back."""
        ids = list(Run.objects.claimable().order_by("?").values_list("pk", flat=True)[:1])
        run = execution.claim(ids[0]) if ids else None
        if run is None:
            return
        transcript = loop.Transcript()
        what = self.luck.randrange(5)
        if what == 0:
            error = completions.LLMError("It failed.", code="server_error", permanent=True)
            outcomes.with_database_retry(lambda: outcomes.fail_or_retry(run, error, transcript))
        elif what == 1:
            error = completions.LLMError("It failed.", code="server_error", permanent=False)
            outcomes.with_database_retry(lambda: outcomes.fail_or_retry(run, error, transcript))
        elif what == 2:
            outcomes.with_database_retry(lambda: outcomes.record_partial(run, transcript))
        else:
            outcomes.with_database_retry(lambda: outcomes.complete(run, "Hello too", transcript))

    def bulk(self) -> None:
        request = RequestFactory().get("/")
        request.user, request.GET = self.crowd.staff, QueryDict()
        name = self.luck.choice(["cancel_run", "requeue_run", "retry_run"])
        newest = Run.objects.order_by("-created_at").values("pk")[:6]
        chosen = Run.objects.filter(pk__in=list(newest.values_list("pk", flat=True)))
        job = bulk.start(request, bulk.ACTIONS[f"agents.{name}"], chosen, reason="Test")
        bulk.run(job.pk)
        failed = job.items.filter(outcome="failed").values_list("error", flat=True)
        assert not failed, list(failed)

    def prune(self) -> None:
        old = timezone.now() - timedelta(days=400)
        user = self.luck.choice(self.crowd.people)
        quiet = Thread.objects.filter(pk=self.thread_id(user))
        quiet.exclude(runs__in=Run.objects.unfinished()).update(updated_at=old)
        told = db.in_order(Event.objects.filter(run__thread__in=quiet))
        with transaction.atomic():
            told.update(published_at=old)
        retention.prune()

    def keep(self) -> None:
        what = self.luck.randrange(5)
        if what == 0:
            rollups.fold()
        elif what == 1:
            actions.expire_overdue()
        elif what == 2:
            leases.heartbeat().renew()
        elif what == 3:
            dispatch._mark_and_enqueue(
                list(Run.objects.claimable().values_list("pk", flat=True)[:20])
            )
        else:
            deliveries.fan_out()

    def delete_user(self) -> None:
        user = self.luck.choice(self.crowd.people)
        User.objects.filter(pk=user.pk).delete()
        number = int(user.username.removeprefix("person"))
        self.crowd.people[number] = self.crowd._person(number)
