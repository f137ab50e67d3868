"""What one user and one room may take: questions a minute, runs that wait, and a day's bytes, tokens
and money.

How fast somebody asks, how many of their runs wait and how much they send is settled in the transaction
that takes a question, by one conditional UPDATE of the asker's row: it is exact, however many ask at
once. Tokens and money are set aside before each call of a model, and put right with the outcome:
whoever dies in between leaves its estimate counted. Nothing is asked of the database for what has no
limit.
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
PROGRAMS = "(stream)"  # whoever asks by an event on the stream
# A limit that an admin changes holds from this much later on.
REFRESH_SECONDS = 10.0
# How long somebody whose runs wait is told to wait: some will have ended by then.
WAITING_SECONDS = 5
# In microseconds.
SECOND = 1_000_000
MINUTE = 60 * SECOND
DAY = 24 * 60 * MINUTE
# What an answer is taken to come to where AGENT_MAX_OUTPUT_TOKENS does not say it.
USUAL_OUTPUT_TOKENS = 4096
# A token is four bytes of English and more of most that models read; some languages take less.
BYTES_PER_TOKEN = 3
PACE_MEMORY = timedelta(days=1)
SPENDING_MEMORY = timedelta(days=40)


class Reached(Exception):
    """A limit is reached. The message is safe to show; `retry_after`: seconds until it may be worth
    another try."""

    def __init__(self, message: str, *, code: str, retry_after: float) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = max(1, ceil(retry_after))


@dataclass(frozen=True)
class Limits:
    """0: no limit. `cost` in trillionths."""

    messages: int
    waiting: int
    tokens: int
    cost: int
    bytes: int


NONE = Limits(messages=0, waiting=0, tokens=0, cost=0, bytes=0)


@dataclass(frozen=True)
class Scope:
    """Whom limits hold for."""

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
        return bool(self.limits.messages or self.limits.waiting or self.limits.bytes)

    def runs(self) -> Any:
        of = {"asker": self.name} if self.kind is Kind.USER else {"place": self.name}
        return Run.objects.unfinished().filter(**of)

    def whose(self, mine: str, the_rooms: str) -> str:
        return mine if self.kind is Kind.USER else the_rooms

    def mended(self, name: str) -> str:
        return f"An operator can raise it: LIMIT_{self.kind.name}_{name}, or a limit of its own."


class LimitList:
    """The limits as this process knows them: those of the settings, and what an admin says for some,
    read again every few seconds, not for every question."""

    def __init__(self) -> None:
        self._own = TimedCache(_own_limits, REFRESH_SECONDS)
        self.reset = self._own.reset

    def of(self, kind: Kind, name: str) -> Limits:
        own = self._own.get().get((kind.value, name))
        # The settings are for people. A program's request that has to wait stands in Redis alone.
        return NONE if own is None and name == PROGRAMS else limits_of(kind, own)


def _own_limits() -> dict[tuple[str, str], Limit]:
    return {(limit.kind, limit.name): limit for limit in Limit.objects.all()}


limit_list = process.shared(LimitList())


def limits_of(kind: Kind, own: Limit | None = None) -> Limits:
    def either(value: Any, name: str) -> Any:
        return getattr(settings, f"LIMIT_{kind.name}_{name}") if value is None else value

    return Limits(
        messages=either(own and own.messages_per_minute, "MESSAGES_PER_MINUTE"),
        waiting=either(own and own.runs_waiting, "RUNS_WAITING"),
        tokens=either(own and own.tokens_per_day, "TOKENS_PER_DAY"),
        cost=int(formats.COST_UNITS * Decimal(either(own and own.cost_per_day, "COST_PER_DAY"))),
        bytes=either(own and own.bytes_per_day, "BYTES_PER_DAY"),
    )


def asker_of(user: User | None) -> str:
    """The name that limits have for who asks over HTTP: the same person in a room has it too."""
    if user is None:
        return ANONYMOUS
    return user.matrix_user_id or user.username


def scopes_of(asker: str, place: str) -> list[Scope]:
    """In the order in which their rows are locked."""
    who = [(Kind.USER, asker), (Kind.ROOM, place)]
    return [Scope(kind, name, limit_list.of(kind, name)) for kind, name in who if name]


def admit(asker: str, place: str, size: int) -> None:
    """Count a question of so many bytes, in the transaction that takes it. Raises `Reached`."""
    for scope in scopes_of(asker, place):
        if scope.is_paced:
            _admit(scope, size)


def _admit(scope: Scope, size: int) -> None:
    """In SQL: asked for each question, it would take ten times as long to be put together."""
    limits = scope.limits
    changes, conditions = [], ["scope = %s"]
    values: list[str | int] = [scope.key]
    step = MINUTE // max(1, limits.messages)
    if limits.messages:
        greatest = "MAX" if connection.vendor == "sqlite" else "GREATEST"
        changes.append(f"free_at = {greatest}(free_at, {_now()}) + {step}")
        conditions.append(f"free_at <= {_now()} + {MINUTE - step}")
    if limits.waiting:
        changes.append("waiting = waiting + 1")
        conditions.append("waiting < %s")
        values.append(limits.waiting)
    if limits.bytes:
        today_ = f"{_now()} / {DAY}"
        taken = f"CASE WHEN bytes_on = {today_} THEN bytes ELSE 0 END + {int(size)}"
        changes += [f"bytes = {taken}", f"bytes_on = {today_}"]
        conditions.append(f"{taken} <= {int(limits.bytes)}")
    table = Pace._meta.db_table
    # Nothing but numbers and names of ours stands in it.
    sql = f"UPDATE {table} SET {', '.join(changes)} WHERE {' AND '.join(conditions)}"  # noqa: S608
    with connection.cursor() as cursor:
        cursor.execute(sql, values)
        admitted = cursor.rowcount
    if not admitted:
        _admit_closely(scope, step, size)


def _now() -> str:
    """The database's clock, in microseconds, as SQL."""
    if connection.vendor == "sqlite":
        return "CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)"
    return "CAST(EXTRACT(EPOCH FROM STATEMENT_TIMESTAMP()) * 1000000 AS BIGINT)"


def _admit_closely(scope: Scope, step: int, size: int) -> None:
    """As above, where the row is missing or says no: now with the row locked, so that nobody else of
    the scope asks while its runs are counted."""
    limits, rows = scope.limits, Pace.objects.filter(pk=scope.key)
    Pace.objects.bulk_create([Pace(pk=scope.key)], ignore_conflicts=True)
    now = RawSQL(_now(), (), output_field=BigIntegerField())  # noqa: S611
    pace = rows.select_for_update().annotate(now=now).get()
    changes: dict[str, Any] = {}
    if limits.messages:
        if (wait := pace.free_at - pace.now - (MINUTE - step)) > 0:
            raise _too_fast(scope, wait / SECOND)
        changes["free_at"] = max(pace.free_at, pace.now) + step
    if limits.waiting:
        waiting = scope.runs().count()
        if waiting >= limits.waiting:
            raise _too_many_waiting(scope)
        changes["waiting"] = waiting + 1
    if limits.bytes:
        day = pace.now // DAY
        taken = pace.bytes if pace.bytes_on == day else 0
        if taken + size > limits.bytes:
            raise _too_much(scope, limits.bytes - taken)
        changes |= {"bytes": taken + size, "bytes_on": day}
    rows.update(**changes)


def _too_fast(scope: Scope, seconds: float) -> Reached:
    may = scope.whose("You may ask", "In this room there may be asked")
    return Reached(
        f"{may} {_questions(scope.limits.messages)} a minute. Try again in {max(1, ceil(seconds))} s. "
        + scope.mended("MESSAGES_PER_MINUTE"),
        code="rate_limited",
        retry_after=seconds,
    )


def _questions(number: int) -> str:
    return f"{number} question{'' if number == 1 else 's'}"


def _too_many_waiting(scope: Scope) -> Reached:
    of = scope.whose("of your questions", "questions of this room")
    return Reached(
        f"{scope.limits.waiting} {of} wait for their answers, and no more may. Wait for some, or "
        "cancel some. " + scope.mended("RUNS_WAITING"),
        code="too_many_waiting",
        retry_after=WAITING_SECONDS,
    )


def _too_much(scope: Scope, rest: int) -> Reached:
    may = scope.whose("You may send", "In this room there may be sent")
    return Reached(
        f"{may} {scope.limits.bytes:,} bytes a day, and this is more than what is left of it "
        f"({max(0, rest):,} bytes). It begins anew at 0:00 UTC. {scope.mended('BYTES_PER_DAY')}",
        code="bytes_exhausted",
        retry_after=_seconds_of_today_left(),
    )


def check_budget(asker: str, place: str, model: str, content: str) -> None:
    """Refuse a question that could not be sent to its model today. What is taken until its turn comes
    is for `Purse.reserve()`. Raises `Reached`."""
    scopes = [scope for scope in scopes_of(asker, place) if scope.has_budget]
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
    """Tokens and cost of a call with so many bytes to read, at the most. Raises `Reached` where money
    is limited and nobody knows what the model costs: it would be no limit."""
    usage = completions.Usage(
        prompt_tokens=size // BYTES_PER_TOKEN + 1,
        completion_tokens=settings.AGENT_MAX_OUTPUT_TOKENS or USUAL_OUTPUT_TOKENS,
    )
    cost = prices.cost(model, usage)
    if cost is None and any(scope.limits.cost for scope in scopes):
        raise Reached(
            f"Money is limited here, and the model {model!r} has no price. Ask for another model; an "
            "operator can add its price.",
            code="budget_exhausted",
            retry_after=prices.REFRESH_SECONDS,
        )
    return usage.prompt_tokens + usage.completion_tokens, cost or 0


def _exhausted(scope: Scope, spent: Spending) -> Reached:
    limits = scope.limits
    if limits.tokens and not limits.cost:
        what, name = f"{limits.tokens:,} tokens", "TOKENS_PER_DAY"
        rest = f"{max(0, limits.tokens - spent.tokens):,} tokens"
    else:
        what, name = f"{formats.amount(limits.cost):.2f} {prices.currency()}", "COST_PER_DAY"
        rest = f"{max(Decimal(), formats.amount(limits.cost - spent.cost)):.4f}"
    if limits.tokens and limits.cost:
        what = f"{limits.tokens:,} tokens and {what}"
        rest = f"{max(0, limits.tokens - spent.tokens):,} tokens and {rest}"
    may = scope.whose("You may", "This room may")
    return Reached(
        f"{may} take {what} a day, and what is left of it ({rest}) is too little for this. It begins "
        f"anew at 0:00 UTC. {scope.mended(name)}",
        code="budget_exhausted",
        retry_after=_seconds_of_today_left(),
    )


def _seconds_of_today_left() -> float:
    now = datetime.now(UTC)
    midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
    return (midnight - now).total_seconds()


@dataclass
class Call:
    """A call of a model for which something was set aside: what, and what it came to."""

    model: str
    prompt_tokens: int
    tokens: int
    cost: int


class Purse:
    """What an attempt sets aside and spends, of those who have a budget. Not for two threads."""

    def __init__(self, asker: str, place: str) -> None:
        self._who = (asker, place)
        self._scopes: list[Scope] = []
        self._day: date | None = None
        # What is to be added to what stands in the database.
        self._tokens = self._cost = 0
        self._call: Call | None = None

    def reserve(self, model: str, size: int) -> None:
        """Set aside what a call with so many bytes to read may take. Raises `llm.LLMError` where that
        is not there, and `lib.db.TRANSIENT_ERRORS`."""
        scopes = [scope for scope in scopes_of(*self._who) if scope.has_budget]
        if not scopes:
            self._call = None
            return
        self.settle()
        self._scopes, self._day = scopes, today()
        try:
            tokens, cost = _estimate(scopes, model, size)
            with transaction.atomic():
                for scope in scopes:
                    _set_aside(scope, self._day, tokens, cost)
        except Reached as reached:
            raise completions.LLMError(
                str(reached), code="budget_exhausted", permanent=True
            ) from None
        finally:
            db.release_connection()
        self._call = Call(model, size // BYTES_PER_TOKEN + 1, tokens, cost)

    def note(self, reply: completions.Reply, *, refused: bool) -> None:
        """What became of the call: what it told of its use, or as much as can be known. `refused`: it
        was turned away, and cost nothing."""
        call, usage = self._call, reply.usage
        self._call = None
        if call is None:
            return
        if refused:
            usage = completions.Usage()
        elif not usage.prompt_tokens:
            if not reply.text:
                return  # it may have taken all that was set aside
            told = max(usage.completion_tokens, len(reply.text.encode()) // BYTES_PER_TOKEN)
            usage = completions.Usage(call.prompt_tokens, told)
        self._tokens += usage.prompt_tokens + usage.completion_tokens - call.tokens
        self._cost += (prices.cost(call.model, usage) or 0) - call.cost

    def settle(self) -> None:
        """Put right what was set aside; once, as soon as the transaction is committed."""
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


def _set_aside(scope: Scope, day: date, tokens: int, cost: int) -> None:
    """Raises `Reached`."""
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
class Use:
    """What somebody takes just now and took today, beside what they may."""

    scope: Scope
    waiting: int = 0
    tokens: int = 0
    cost: int = 0

    @property
    def share(self) -> float:
        """Of the limit that is nearest; 1: it is reached."""
        limits = self.scope.limits
        pairs = (
            (self.waiting, limits.waiting),
            (self.tokens, limits.tokens),
            (self.cost, limits.cost),
        )
        return max((taken / most for taken, most in pairs if most), default=0.0)


def nearest(count: int) -> list[Use]:
    """Who is nearest to their limits, of those who take most."""
    most = 10 * count
    taken: dict[tuple[str, str], dict[str, int]] = {}
    for kind, column in ((Kind.USER, "asker"), (Kind.ROOM, "place")):
        unfinished = Run.objects.unfinished().exclude(**{column: ""}).order_by()
        numbers = unfinished.values_list(column).annotate(waiting=Count("pk"))
        for name, waiting in numbers.order_by("-waiting")[:most]:
            taken[kind.value, name] = {"waiting": waiting}
    for row in Spending.objects.filter(day=today()).order_by("-tokens")[:most]:
        whose, _, name = row.scope.partition(":")
        taken.setdefault((whose, name), {}).update(tokens=row.tokens, cost=row.cost)
    uses = [
        Use(Scope(Kind(whose), name, limit_list.of(Kind(whose), name)), **numbers)
        for (whose, name), numbers in taken.items()
    ]
    near = [use for use in uses if use.share]
    return sorted(near, key=lambda use: -use.share)[:count]


def forget() -> None:
    """Let go of who has not asked for long, and of what was spent on days that nobody looks at."""
    long_ago = int((timezone.now() - PACE_MEMORY).timestamp() * SECOND)
    with transaction.atomic():
        # Where the rate has no limit, only the day tells who has asked lately.
        left = Pace.objects.filter(free_at__lt=long_ago, bytes_on__lt=long_ago // DAY)
        db.in_order(left).delete()
        Spending.objects.filter(day__lt=today() - SPENDING_MEMORY).delete()
