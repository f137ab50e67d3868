from datetime import timedelta
from typing import Any

from django.utils import timezone

from agents.models import Run
from agents.runs import actions
from botrunner.models import Session
from realm.models import BotCommand, User
from tests.botrunner import scenes as matrix
from tests.factories import ask
from tests.fakes.receiver import HOST
from webhooks.deliveries import fan_out
from webhooks.models import Delivery, Outcome, Subscription

URL = f"https://{HOST}/outcomes"


def admin(name: str = "root") -> User:
    user: User = User.objects.filter(username=name).first() or User.objects.create_superuser(name)
    return user


def subscribe(owner: User | None = None, **columns: Any) -> Subscription:
    """To a URL of its own, where none is given."""
    owner = owner or admin()
    others = Subscription.objects.of(owner).count()
    url = f"{URL}?{others}" if others else URL
    made = Subscription(**{"owner": owner, "url": url} | columns)
    made.full_clean()
    made.save()
    return made


def cancelled(**asked: Any) -> Run:
    """A run that has ended."""
    run = ask(**asked)
    assert actions.cancel(run)
    return run


def delivery(subscription: Subscription | None = None, **asked: Any) -> Delivery:
    """One that is due."""
    run = cancelled(**asked)
    subscription = subscription or subscribe()
    outcome = Outcome.objects.create(pk=run.events.last().pk, run=run, body="{}", size=2)
    Delivery.objects.bulk_create([Delivery(subscription=subscription, event=outcome, run=run)])
    return Delivery.objects.select_related("subscription").get(run=run)


def fired(command: BotCommand, session: Session) -> Run:
    """A run that a bot fired in a room, ended."""
    matrix.take_in(session, matrix.event("Hello", sender=command.registration.username))
    run: Run = Run.objects.filter(replies__bot_command=command).latest("position")
    actions.cancel(run)
    return run


def told() -> set[tuple[str, str]]:
    """Who is told of which run, after all outcomes have been looked at."""
    while fan_out():
        pass
    rows = Delivery.objects.values_list("subscription__owner__username", "run_id")
    return set(rows)


def make_due() -> None:
    """As time would."""
    past = timezone.now() - timedelta(seconds=1)
    Delivery.objects.filter(next_try_at__isnull=False).update(next_try_at=past)
