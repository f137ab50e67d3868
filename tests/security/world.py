"""Who may come, and what there is for them to come for."""

from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from typing import Any

from django.contrib.auth.models import Group
from django.contrib.contenttypes.models import ContentType

from agents.models import Run
from agents.runs import execution
from console import roles
from realm import tokens
from realm.models import BotCommand, BotRegistration, User
from tests import factories
from tests.console.rows import one_of_each
from tests.realm.conftest import Client, a_filter
from webhooks.models import Subscription

ROLES = ("nobody", "token", "user", "viewer", "operator", "admin", "superuser")
GROUPS = {"viewer": roles.VIEWER, "operator": roles.OPERATOR, "admin": roles.ADMIN}
AFAR = "203.0.113.7"


@dataclass
class Visitor:
    """Somebody of a role, with a client that is as it was at each request, and what is theirs."""

    role: str
    user: User | None
    # Beginnings of routes, and the ids that stand in them: see `routes.address`.
    ids: dict[str, Any] = field(default_factory=dict)
    client: Client = field(default_factory=Client)
    cookies: str = ""

    def send(self, method: str, path: str, body: bytes = b"", **extra: Any) -> Any:
        # An answer may have signed them out.
        self.client.cookies = SimpleCookie(self.cookies)
        self.client.exc_info = None
        return self.client.raw(method, path, body, **{"REMOTE_ADDR": AFAR} | extra)


def visitor(role: str, *, enforce_csrf_checks: bool = False) -> Visitor:
    user = _account(role)
    found = Visitor(role, user, client=Client(enforce_csrf_checks=enforce_csrf_checks))
    found.client.raise_request_exception = False
    if role == "token":
        assert user is not None
        token = tokens.issue(str(user.matrix_user_id))
        found.client.credentials(HTTP_AUTHORIZATION=f"Bearer {token}")
    elif user is not None:
        found.client.force_login(user)
        found.cookies = found.client.cookies.output(header="", sep=";")
    found.ids = owned_by(user)
    return found


def _account(role: str) -> User | None:
    if role == "nobody":
        return None
    user = factories.user(role)
    user.is_staff = role in GROUPS or role == "superuser"
    user.is_superuser = role == "superuser"
    user.save()
    if role in GROUPS:
        user.groups.add(Group.objects.get(name=GROUPS[role]))
    return user


def owned_by(user: User | None) -> dict[str, Any]:
    """What there is to be asked for in the API and on the chat page: a thread with a run that has
    ended, and where there is a user, a bot with a command and a webhook."""
    run = talk(user)
    ids: dict[str, Any] = {
        "threads/": run.thread_id,
        "runs/": run.pk,
        "api/threads/": run.thread_id,
        "api/messages/": run.message_id,
        "api/runs/": run.pk,
        "api/chat/threads/": run.thread_id,
        "api/chat/runs/": run.pk,
    }
    # Which ones cannot be told from the address where there is nobody: any will do.
    bot = webhook = command = "00000000-0000-4000-8000-000000000000"
    if user is not None:
        registration = BotRegistration.objects.create(user=user, username=user.matrix_user_id)
        bot = str(registration.pk)
        command = str(
            BotCommand.objects.create(
                registration=registration, command="ping", filter=a_filter()
            ).pk
        )
        # Each time another: an owner has a webhook to a URL once.
        url = f"https://hooks.example.org/secret/{bot}"
        webhook = str(Subscription.objects.create(owner=user, url=url).pk)
    return ids | {
        "_bot-registration/": bot,
        "_bot-commands/": command,
        "_webhook-subscription/": webhook,
    }


def talk(owner: User | None, **extra: Any) -> Run:
    """A question with its answer."""
    run = factories.ask(**{"content": "Hello", "owner": owner} | extra)
    execution.execute(run.pk)
    return Run.objects.select_related("thread", "message", "answer").get(pk=run.pk)


def of_admin() -> dict[str, Any]:
    """A row for each page of the admin."""
    ids: dict[str, Any] = {
        f"admin/{model._meta.label_lower.replace('.', '/')}/": row.pk
        for model, row in one_of_each().items()
    }
    return ids | {
        "admin/agents/event/dead/": "1-1",
        "admin/agents/usage/": 1,
        "admin/r/": ContentType.objects.get_for_model(User).pk,
    }
