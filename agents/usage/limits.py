"""Rate limits, quotas and budgets of a user and of a room: messages a minute, unfinished runs, and
bytes, tokens and cost a day.

Rate, unfinished runs and bytes are checked in the transaction that accepts a message, by one
conditional UPDATE of the scope's row: exact, however many messages arrive at once. Tokens and cost are
reserved before each call of a model and corrected with the outcome; after a crash in between the
estimate stays counted. A user or room without limits costs no query.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from math import ceil
from typing import Any

from django.conf import settings
from django.db import connection, transaction
from django.db.models import BigIntegerField, Count, F, Q
from django.db.models.expressions import RawSQL
from django.utils import timezone

from agents.llm import completions
from agents.models import Run, today
from agents.models.limits import Kind, Limit, Pace, Spending
from agents.usage import prices
from lib import db, formats, process
from lib.cache import TimedCache
from realm.models import User

ANONYMOUS = "(anonymous)"
PROGRAMS = "(stream)"  # requests of other programs on the stream
# A changed limit takes effect after at most this time.
REFRESH_SECONDS = 10.0
# Retry-After where too many runs are unfinished: some will have ended by then.
WAITING_SECONDS = 5
# In microseconds.
SECOND = 1_000_000
MINUTE = 60 * SECOND
DAY = 24 * 60 * MINUTE
# The estimated length of an answer where AGENT_MAX_OUTPUT_TOKENS is not set.
USUAL_OUTPUT_TOKENS = 4096
# Estimate: English has four bytes a token, most other input more; some languages have less.
BYTES_PER_TOKEN = 3
PACE_MEMORY = timedelta(days=1)
SPENDING_MEMORY = timedelta(days=40)


class LimitExceeded(Exception):
    """A limit is reached. The message is safe to show; a retry makes sense after `retry_after`
    seconds. `setting`: what an operator can change, for the log."""

    def __init__(self, message: str, *, code: str, retry_after: float, setting: str = "") -> None:
        super().__init__(message)
        self.setting = setting
        self.code = code
        self.retry_after = max(1, ceil(retry_after))


@dataclass(frozen=True)
class Limits:
    """0: no limit. `cost` in trillionths."""

    messages: int
    unfinished: int
    tokens: int
    cost: int
    bytes: int


NONE = Limits(messages=0, unfinished=0, tokens=0, cost=0, bytes=0)


@dataclass(frozen=True)
class Scope:
    """A user or a room, with its limits."""

    kind: Kind
    name: str
    limits: Limits

    @property
    def key(self) -> str:
        return f"{self.kind.value}:{self.name}"

    @property
    def has_budget(self) -> bool:
        return bool(self.limits.tokens or self.limits.cost)

    @property
    def is_paced(self) -> bool:
        return bool(self.limits.messages or self.limits.unfinished or self.limits.bytes)

    def runs(self) -> Any:
        column = "requester" if self.kind is Kind.USER else "place"
        return Run.objects.unfinished().filter(**{column: self.name})

    def choose(self, for_user: str, for_room: str) -> str:
        return for_user if self.kind is Kind.USER else for_room

    def setting(self, name: str) -> str:
        return f"LIMIT_{self.kind.name}_{name}"


class LimitList:
    """The limits of the settings and the individual ones, read again every few seconds."""

    def __init__(self) -> None:
        self._individual = TimedCache(_individual_limits, REFRESH_SECONDS)
        self.reset = self._individual.reset

    def of(self, kind: Kind, name: str) -> Limits:
        own = self._individual.get().get((kind.value, name))
        # The settings are for people. A deferred request of a program is in Redis alone.
        return NONE if own is None and name == PROGRAMS else limits_of(kind, own)


def _individual_limits() -> dict[tuple[str, str], Limit]:
    return {(limit.kind, limit.name): limit for limit in Limit.objects.all()}


limit_list = process.shared(LimitList())


def limits_of(kind: Kind, own: Limit | None = None) -> Limits:
    def either(value: Any, name: str) -> Any:
        return getattr(settings, f"LIMIT_{kind.name}_{name}") if value is None else value

    return Limits(
        messages=either(own and own.messages_per_minute, "MESSAGES_PER_MINUTE"),
        unfinished=either(own and own.runs_unfinished, "RUNS_UNFINISHED"),
        tokens=either(own and own.tokens_per_day, "TOKENS_PER_DAY"),
        cost=int(formats.COST_UNITS * Decimal(either(own and own.cost_per_day, "COST_PER_DAY"))),
        bytes=either(own and own.bytes_per_day, "BYTES_PER_DAY"),
    )


def requester_of(user: User | None) -> str:
    """Return the name of a user in limits, the same over HTTP and in rooms."""
    if user is None:
        return ANONYMOUS
    return user.matrix_user_id or user.username


def scopes_of(requester: str, place: str) -> list[Scope]:
    """Return the scopes of a message, in the order in which their rows are locked."""
    names = [(Kind.USER, requester), (Kind.ROOM, place)]
    return [Scope(kind, name, limit_list.of(kind, name)) for kind, name in names if name]


def admit(requester: str, place: str, size: int) -> None:
    """Count a message of `size` bytes, in the transaction that accepts it. Raises `LimitExceeded`."""
    for scope in scopes_of(requester, place):
        if scope.is_paced:
            _admit(scope, size)


def _admit(scope: Scope, size: int) -> None:
    """Run the conditional UPDATE, in SQL: for each message the ORM would take ten times as long."""
    limits = scope.limits
    changes, conditions = [], ["scope = %s"]
    values: list[str | int] = [scope.key]
    step = MINUTE // max(1, limits.messages)
    if limits.messages:
        greatest = "MAX" if connection.vendor == "sqlite" else "GREATEST"
        changes.append(f"free_at = {greatest}(free_at, {_now()}) + {step}")
        conditions.append(f"free_at <= {_now()} + {MINUTE - step}")
    if limits.unfinished:
        changes.append("unfinished = unfinished + 1")
        conditions.append("unfinished < %s")
        values.append(limits.unfinished)
    if limits.bytes:
        today_ = f"{_now()} / {DAY}"
        total = f"CASE WHEN bytes_on = {today_} THEN bytes ELSE 0 END + {int(size)}"
        changes += [f"bytes = {total}", f"bytes_on = {today_}"]
        conditions.append(f"{total} <= {int(limits.bytes)}")
    table = Pace._meta.db_table
    # It contains only numbers and constant names.
    sql = f"UPDATE {table} SET {', '.join(changes)} WHERE {' AND '.join(conditions)}"  # noqa: S608
    with connection.cursor() as cursor:
        cursor.execute(sql, values)
        admitted = cursor.rowcount
    if not admitted:
        _admit_locked(scope, step, size)


def _now() -> str:
    """Return SQL for the database's clock, in microseconds."""
    if connection.vendor == "sqlite":
        return "CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)"
    return "CAST(EXTRACT(EPOCH FROM STATEMENT_TIMESTAMP()) * 1000000 AS BIGINT)"


def _admit_locked(scope: Scope, step: int, size: int) -> None:
    """Check again with the row locked, if it was missing or a limit may be reached: no other message of
    the scope is accepted while its runs are counted."""
    limits, rows = scope.limits, Pace.objects.filter(pk=scope.key)
    Pace.objects.bulk_create([Pace(pk=scope.key)], ignore_conflicts=True)
    now = RawSQL(_now(), (), output_field=BigIntegerField())  # noqa: S611
    pace = rows.select_for_update().annotate(now=now).get()
    changes: dict[str, Any] = {}
    if limits.messages:
        if (wait := pace.free_at - pace.now - (MINUTE - step)) > 0:
            raise _too_fast(scope, wait / SECOND)
        changes["free_at"] = max(pace.free_at, pace.now) + step
    if limits.unfinished:
        unfinished = scope.runs().count()
        if unfinished >= limits.unfinished:
            raise _too_many_waiting(scope)
        changes["unfinished"] = unfinished + 1
    if limits.bytes:
        day = pace.now // DAY
        used = pace.bytes if pace.bytes_on == day else 0
        if used + size > limits.bytes:
            raise _too_much(scope, limits.bytes - used)
        changes |= {"bytes": used + size, "bytes_on": day}
    rows.update(**changes)


def _too_fast(scope: Scope, seconds: float) -> LimitExceeded:
    subject = scope.choose("You", "This room")
    return LimitExceeded(
        f"{subject} may send {_messages(scope.limits.messages)} a minute. "
        f"Try again in {max(1, ceil(seconds))} s.",
        code="rate_limited",
        retry_after=seconds,
        setting=scope.setting("MESSAGES_PER_MINUTE"),
    )


def _messages(number: int) -> str:
    return f"{number} message{'' if number == 1 else 's'}"


def _too_many_waiting(scope: Scope) -> LimitExceeded:
    owner = scope.choose("You have", "This room has")
    return LimitExceeded(
        f"{owner} {_messages(scope.limits.unfinished)} waiting for an answer, which is the limit. "
        "Wait for one or cancel one.",
        code="too_many_waiting",
        retry_after=WAITING_SECONDS,
        setting=scope.setting("RUNS_UNFINISHED"),
    )


def _too_much(scope: Scope, remaining: int) -> LimitExceeded:
    subject = scope.choose("You", "This room")
    return LimitExceeded(
        f"{subject} may send {scope.limits.bytes:,} bytes a day, and this message exceeds the "
        f"{max(0, remaining):,} bytes left. Try again after 00:00 UTC.",
        code="bytes_exhausted",
        retry_after=_seconds_of_today_left(),
        setting=scope.setting("BYTES_PER_DAY"),
    )


def check_budget(requester: str, place: str, model: str, content: str) -> None:
    """Refuse a message that exceeds today's budget already. `BudgetReservation.reserve()` checks again
    when its run starts. Raises `LimitExceeded`."""
    scopes = [scope for scope in scopes_of(requester, place) if scope.has_budget]
    if not scopes or not completions.configured():
        return
    tokens, cost = _estimate(scopes, model, len(content.encode()))
    rows = Spending.objects.filter(day=today(), scope__in=[scope.key for scope in scopes])
    spent = {row.scope: row for row in rows}
    for scope in scopes:
        row = spent.get(scope.key) or Spending()
        if not _fits(scope, row.tokens + tokens, row.cost + cost):
            raise _exhausted(scope, row)


def _fits(scope: Scope, tokens: int, cost: int) -> bool:
    limits = scope.limits
    return not (limits.tokens and tokens > limits.tokens) and not (
        limits.cost and cost > limits.cost
    )


def _estimate(scopes: Iterable[Scope], model: str, size: int) -> tuple[int, int]:
    """Return the largest tokens and cost of a call with `size` bytes of input. Raises `LimitExceeded`
    if cost is limited and the model has no price: it would be no limit."""
    usage = completions.TokenUsage(
        prompt_tokens=size // BYTES_PER_TOKEN + 1,
        completion_tokens=settings.AGENT_MAX_OUTPUT_TOKENS or USUAL_OUTPUT_TOKENS,
    )
    cost = prices.cost(model, usage)
    if cost is None and any(scope.limits.cost for scope in scopes):
        raise LimitExceeded(
            f"Cost is limited here, and the model {model!r} has no price. Choose another model; an "
            "operator can add its price.",
            code="budget_exhausted",
            retry_after=prices.REFRESH_SECONDS,
        )
    return usage.prompt_tokens + usage.completion_tokens, cost or 0


def _exhausted(scope: Scope, spent: Spending) -> LimitExceeded:
    limits = scope.limits
    if limits.tokens and not limits.cost:
        budget = f"{limits.tokens:,} tokens"
        remaining = f"{max(0, limits.tokens - spent.tokens):,}"
    else:
        budget = f"{formats.amount(limits.cost):.2f} {prices.currency()}"
        remaining = f"{max(Decimal(), formats.amount(limits.cost - spent.cost)):.4f}"
    if limits.tokens and limits.cost:
        budget = f"{limits.tokens:,} tokens and {budget}"
        remaining = f"{max(0, limits.tokens - spent.tokens):,} tokens and {remaining}"
    owner = scope.choose("Your", "This room's")
    return LimitExceeded(
        f"{owner} daily budget of {budget} does not cover this message ({remaining} left). "
        "Try again after 00:00 UTC.",
        code="budget_exhausted",
        retry_after=_seconds_of_today_left(),
        setting=scope.setting("COST_PER_DAY" if limits.cost else "TOKENS_PER_DAY"),
    )


def _seconds_of_today_left() -> float:
    now = datetime.now(UTC)
    midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
    return (midnight - now).total_seconds()


@dataclass
class ReservedCall:
    """A call of a model, and the tokens and cost reserved for it."""

    model: str
    prompt_tokens: int
    tokens: int
    cost: int


class BudgetReservation:
    """The reservations of an attempt against the budgets of its user and room. Not thread-safe."""

    def __init__(self, requester: str, place: str) -> None:
        self._owners = (requester, place)
        self._scopes: list[Scope] = []
        self._day: date | None = None
        # To be added to the database.
        self._tokens = self._cost = 0
        self._call: ReservedCall | None = None

    def reserve(self, model: str, size: int) -> None:
        """Reserve the largest use of a call with `size` bytes of input. Raises
        `lib.db.TRANSIENT_ERRORS`, and `completions.LLMError` if the budget does not cover it."""
        scopes = [scope for scope in scopes_of(*self._owners) if scope.has_budget]
        if not scopes:
            self._call = None
            return
        self.settle()
        self._scopes, self._day = scopes, today()
        try:
            tokens, cost = _estimate(scopes, model, size)
            with transaction.atomic():
                for scope in scopes:
                    _reserve(scope, self._day, tokens, cost)
        except LimitExceeded as reached:
            raise completions.LLMError(
                str(reached), code="budget_exhausted", permanent=True
            ) from None
        finally:
            db.release_connection()
        self._call = ReservedCall(model, size // BYTES_PER_TOKEN + 1, tokens, cost)

    def note(self, reply: completions.ModelReply, *, refused: bool) -> None:
        """Correct the reservation of a call to the usage in `reply`. `refused`: it cost
        nothing."""
        call, usage = self._call, reply.usage
        self._call = None
        if call is None:
            return
        if refused:
            usage = completions.TokenUsage()
        elif not usage.prompt_tokens:
            return  # nothing has come: it may have used the whole reservation
        self._tokens += usage.prompt_tokens + usage.completion_tokens - call.tokens
        self._cost += (prices.cost(call.model, usage) or 0) - call.cost

    def settle(self) -> None:
        """Write the corrections; they count as written once the transaction is committed."""
        if not self._day or not (self._tokens or self._cost):
            return
        changes = {"tokens": F("tokens") + self._tokens, "cost": F("cost") + self._cost}
        with transaction.atomic():
            for scope in self._scopes:
                Spending.objects.filter(day=self._day, scope=scope.key).update(**changes)
            transaction.on_commit(partial(self._settled, self._tokens, self._cost))

    def _settled(self, tokens: int, cost: int) -> None:
        self._tokens -= tokens
        self._cost -= cost


def _reserve(scope: Scope, day: date, tokens: int, cost: int) -> None:
    """Reserve in one scope. Raises `LimitExceeded`."""
    rows = Spending.objects.filter(day=day, scope=scope.key)
    room = Q()
    if scope.limits.tokens:
        room &= Q(tokens__lte=scope.limits.tokens - tokens)
    if scope.limits.cost:
        room &= Q(cost__lte=scope.limits.cost - cost)
    changes = {"tokens": F("tokens") + tokens, "cost": F("cost") + cost}
    if rows.filter(room).update(**changes):
        return
    Spending.objects.bulk_create([Spending(day=day, scope=scope.key)], ignore_conflicts=True)
    if not rows.filter(room).update(**changes):
        raise _exhausted(scope, rows.get())


@dataclass(frozen=True)
class LimitUse:
    """The present use of a scope, beside its limits."""

    scope: Scope
    unfinished: int = 0
    tokens: int = 0
    cost: int = 0

    @property
    def share(self) -> float:
        """The used share of the nearest limit; 1: it is reached."""
        limits = self.scope.limits
        pairs = (
            (self.unfinished, limits.unfinished),
            (self.tokens, limits.tokens),
            (self.cost, limits.cost),
        )
        return max((used / limit for used, limit in pairs if limit), default=0.0)


def nearest(count: int) -> list[LimitUse]:
    """Return the scopes nearest to their limits, among those with the highest use."""
    candidates = 10 * count
    use: dict[tuple[str, str], dict[str, int]] = {}
    for kind, column in ((Kind.USER, "requester"), (Kind.ROOM, "place")):
        unfinished = Run.objects.unfinished().exclude(**{column: ""}).order_by()
        numbers = unfinished.values_list(column).annotate(unfinished=Count("pk"))
        for name, number in numbers.order_by("-unfinished")[:candidates]:
            use[kind.value, name] = {"unfinished": number}
    for row in Spending.objects.filter(day=today()).order_by("-tokens")[:candidates]:
        kind_value, _, name = row.scope.partition(":")
        use.setdefault((kind_value, name), {}).update(tokens=row.tokens, cost=row.cost)
    uses = [
        LimitUse(Scope(Kind(kind), name, limit_list.of(Kind(kind), name)), **numbers)
        for (kind, name), numbers in use.items()
    ]
    near = [each for each in uses if each.share]
    return sorted(near, key=lambda each: -each.share)[:count]


def forget() -> None:
    """Delete the rates of scopes idle for a day, and old daily totals."""
    long_ago = int((timezone.now() - PACE_MEMORY).timestamp() * SECOND)
    with transaction.atomic():
        # Where the rate has no limit, only the day shows recent use.
        idle = Pace.objects.filter(free_at__lt=long_ago, bytes_on__lt=long_ago // DAY)
        db.in_order(idle).delete()
        Spending.objects.filter(day__lt=today() - SPENDING_MEMORY).delete()
