"""Console grants: what a member of staff may do to whom, by actor, target and action."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import Group, Permission
from django.test import Client
from django.utils import timezone

from console import roles
from console.models import AuditEntry
from realm.models import BotCommand, BotRegistration, User
from tests.realm.conftest import a_filter

pytestmark = pytest.mark.django_db
PASSWORD = "correct horse battery"
PAGE = "/admin/realm/user/"
GROUPS = "/admin/auth/group/"
# What a manager of people has, and nothing else.
MANAGES = [
    *("view_user", "change_user", "add_user", "delete_user"),
    *("view_group", "add_group", "change_group", "delete_group"),
]
ACTORS = ("manager", "admin", "superuser")
TARGETS = ("user", "peer", "lesser", "odd", "admin2", "gone admin", "superuser2", "gone superuser")


def permissions(*names: str) -> list[Permission]:
    return list(Permission.objects.filter(codename__in=names))


def person(name: str) -> User:
    """The account of that name, made at first sight."""
    if found := User.objects.filter(username=name).first():
        return found
    user = User.objects.create_user(
        name,
        email=f"{name.replace(' ', '')}@example.org",
        password=PASSWORD,
        is_staff=name != "user",
        is_active="gone" not in name,
        is_superuser="superuser" in name,
    )
    if name in ("manager", "peer"):
        user.user_permissions.set(permissions(*MANAGES))
    elif name == "lesser":
        user.user_permissions.set(permissions("view_user"))
    elif name == "odd":
        # One that neither the manager nor a member of Admin has.
        user.user_permissions.set(permissions("view_user", "delete_logentry"))
    elif "admin" in name:
        user.groups.add(Group.objects.get(name=roles.ADMIN))
    return user


def browser_of(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def form_of(user: User, **changes: Any) -> dict[str, Any]:
    """The form of a user as it stands, and what is changed in it."""
    joined = user.date_joined
    form: dict[str, Any] = {
        "username": user.username,
        "email": user.email,
        "matrix_user_id": user.matrix_user_id or "",
        "groups": list(user.groups.values_list("pk", flat=True)),
        "date_joined_0": f"{joined:%Y-%m-%d}",
        "date_joined_1": f"{joined:%H:%M:%S}",
        **({"is_active": "on"} if user.is_active else {}),
        **({"is_staff": "on"} if user.is_staff else {}),
    } | changes
    return {name: value for name, value in form.items() if value is not None}


def change(browser: Client, user: User, **changes: Any) -> Any:
    return browser.post(f"{PAGE}{user.pk}/change/", form_of(user, **changes))


def do_action(browser: Client, page: str, name: str, *pks: int) -> Any:
    form = {"action": name, "_selected_action": list(pks), "index": "0", "post": "yes"}
    return browser.post(page, form)


def id_of(name: str) -> int:
    return Group.objects.get(name=name).pk


# How each is tried, and how it shows that it was done.
Try = Callable[[Client, User], Any]
ACTIONS: dict[str, tuple[Try, Callable[[User], bool]]] = {
    "e-mail": (
        lambda browser, user: change(browser, user, email="new@example.org"),
        lambda user: user.email == "new@example.org",
    ),
    "matrix id": (
        lambda browser, user: change(browser, user, matrix_user_id=f"@new{user.pk}:localhost"),
        lambda user: user.matrix_user_id == f"@new{user.pk}:localhost",
    ),
    "active flag": (
        lambda browser, user: change(browser, user, is_active=None if user.is_active else "on"),
        lambda user: user.is_active == ("gone" in user.username),
    ),
    "groups": (
        lambda browser, user: change(browser, user, groups=[id_of("empty")]),
        lambda user: list(user.groups.values_list("name", flat=True)) == ["empty"],
    ),
    "password page": (
        lambda browser, user: browser.get(f"{PAGE}{user.pk}/password/"),
        lambda user: True,
    ),
    "password": (
        lambda browser, user: browser.post(
            f"{PAGE}{user.pk}/password/",
            {
                "usable_password": "true",
                "set-password": "yes",
                "password1": "another one, please",
                "password2": "another one, please",
            },
        ),
        lambda user: user.check_password("another one, please"),
    ),
    "no password": (
        lambda browser, user: browser.post(
            f"{PAGE}{user.pk}/password/",
            {"usable_password": "false", "unset-password": "yes"},
        ),
        lambda user: not user.has_usable_password(),
    ),
    "tokens": (
        lambda browser, user: browser.post(
            f"{PAGE}{user.pk}/revoke-tokens/", {"reason": "x", "_form_submitted": "on"}
        ),
        lambda user: user.tokens_valid_from is not None,
    ),
    "delete": (
        lambda browser, user: browser.post(f"{PAGE}{user.pk}/delete/", {"post": "yes"}),
        lambda user: not User.objects.filter(pk=user.pk).exists(),
    ),
    "delete of several": (
        lambda browser, user: do_action(
            browser, PAGE, "delete_selected", user.pk, person("user").pk
        ),
        lambda user: not User.objects.filter(pk=user.pk).exists(),
    ),
}
ALLOWED = {
    "manager": {"user", "peer", "lesser"},
    "admin": {"user", "peer", "lesser", "admin2", "gone admin"},
    "superuser": set(TARGETS),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("actor", ACTORS)
def test_of_actor_by_target_by_action(actor: str, action: str) -> None:
    Group.objects.create(name="empty")
    attempt, is_done = ACTIONS[action]
    browser, came = browser_of(person(actor)), {}
    for name in TARGETS:
        target = person(name)
        before = User.objects.filter(pk=target.pk).values().get()
        groups = list(target.groups.all())
        AuditEntry.objects.all().delete()

        response = attempt(browser, target)

        found = User.objects.filter(pk=target.pk).first()
        if name in ALLOWED[actor]:
            assert response.status_code in (200, 302), name
            came[name] = is_done(found or target)
            continue
        came[name] = False
        assert response.status_code == 403, name
        assert f"{name} has rights that you do not have" in response.text
        assert User.objects.filter(pk=target.pk).values().get() == before
        assert list(target.groups.all()) == groups
        entry = AuditEntry.objects.get()
        assert (entry.action, entry.name, entry.object_id) == ("refuse", actor, str(target.pk))
        assert "has rights that you do not have" in entry.result
    # With a Matrix id comes what that person may read: their rooms.
    done = ALLOWED[actor] if actor == "superuser" or action != "matrix id" else set()
    assert {name for name, is_so in came.items() if is_so} == done


@pytest.mark.parametrize("target", ["manager", "user", "peer", "lesser"])
@pytest.mark.parametrize("group", [roles.ADMIN, roles.OPERATOR, roles.VIEWER, "odd ones"])
def test_groups_are_granted_as_far_as_ones_own_rights_go(target: str, group: str) -> None:
    """The fault that was found: staff who may change users put themselves into the group Admin."""
    Group.objects.create(name="odd ones").permissions.set(permissions("delete_logentry"))
    browser, user = browser_of(person("manager")), person(target)
    page = browser.get(f"{PAGE}{user.pk}/change/").text
    assert f'<option value="{id_of(group)}"' not in page

    response = change(browser, user, groups=[id_of(group)], email="new@example.org")

    assert response.status_code == 403
    assert "You can only grant permissions that you hold yourself." in response.text
    user.refresh_from_db()
    assert not user.groups.exists()
    assert user.email != "new@example.org"
    entry = AuditEntry.objects.get(action="refuse")
    assert (entry.name, entry.object_id) == ("manager", str(user.pk))


@pytest.mark.parametrize("target", ["manager", "user"])
def test_a_group_within_ones_own_rights_is_granted_and_taken(target: str) -> None:
    own = Group.objects.create(name="lookers")
    own.permissions.set(permissions("view_user", "view_group"))
    browser, user = browser_of(person("manager")), person(target)
    assert f'<option value="{own.pk}"' in browser.get(f"{PAGE}{user.pk}/change/").text
    assert change(browser, user, groups=[own.pk]).status_code == 302
    assert list(user.groups.all()) == [own]
    assert change(browser, user, groups=[]).status_code == 302
    assert not user.groups.exists()


@pytest.mark.parametrize("actor", ["manager", "admin"])
@pytest.mark.parametrize("target", ["self", "user"])
def test_more_fields_than_the_form_has_change_nothing(actor: str, target: str) -> None:
    me = person(actor)
    user = me if target == "self" else person(target)
    every = list(Permission.objects.values_list("pk", flat=True))
    before = set(user.user_permissions.values_list("pk", flat=True))
    change(
        browser_of(me),
        user,
        is_superuser="on",
        user_permissions=every,
        password="plain",
        tokens_valid_from_0="2020-01-01",
    )
    user.refresh_from_db()
    assert not user.is_superuser
    assert set(user.user_permissions.values_list("pk", flat=True)) == before
    assert user.check_password(PASSWORD)


def test_a_new_account_comes_without_rights() -> None:
    browser = browser_of(person("manager"))
    form = {
        "username": "new",
        "usable_password": "true",
        "password1": "another one, please",
        "password2": "another one, please",
        "is_staff": "on",
        "is_superuser": "on",
        "user_permissions": [each.pk for each in permissions("delete_logentry")],
    }
    refused = browser.post(f"{PAGE}add/", form | {"groups": [id_of(roles.ADMIN)]})
    assert refused.status_code == 403
    assert not User.objects.filter(username="new").exists()

    assert browser.post(f"{PAGE}add/", form).status_code == 302
    new = User.objects.get(username="new")
    assert (new.is_superuser, new.is_staff, new.groups.count()) == (False, False, 0)
    assert not new.user_permissions.exists()


def test_a_locked_page_can_be_seen_but_offers_nothing() -> None:
    browser, boss = browser_of(person("manager")), person("superuser2")
    page = browser.get(f"{PAGE}{boss.pk}/change/")
    assert page.status_code == 200
    assert 'name="_save"' not in page.text
    assert f"{PAGE}{boss.pk}/password/" not in page.text
    assert not AuditEntry.objects.filter(action="refuse").exists(), "to look is no attempt"


class TestGroups:
    def save(self, browser: Client, group: Group, *names: str) -> Any:
        form = {"name": group.name, "permissions": [each.pk for each in permissions(*names)]}
        return browser.post(f"{GROUPS}{group.pk}/change/", form)

    def held(self, group: Group) -> set[str]:
        return set(group.permissions.values_list("codename", flat=True))

    def test_get_permissions_that_whoever_gives_them_holds(self) -> None:
        group = Group.objects.create(name="lookers")
        browser = browser_of(person("manager"))
        assert self.save(browser, group, "view_user").status_code == 302
        assert self.held(group) == {"view_user"}
        refused = self.save(browser, group, "view_user", "read_messages")
        assert refused.status_code == 403
        assert "that you hold yourself" in refused.text
        assert self.held(group) == {"view_user"}
        form = {"name": "new", "permissions": [permissions("read_messages")[0].pk]}
        assert browser.post(f"{GROUPS}add/", form).status_code == 403
        assert not Group.objects.filter(name="new").exists()
        page = browser.get(f"{GROUPS}add/").text
        offered = set(Permission.objects.filter(codename__in=MANAGES).values_list("pk", flat=True))
        shown = {each for each in Permission.objects.all() if f'<option value="{each.pk}"' in page}
        assert {each.pk for each in shown} == offered

    @pytest.mark.parametrize(
        ("kind", "says"),
        [
            ("more", "has permissions that you do not hold"),
            ("of an admin", "A member of the group"),
            ("of a superuser", "A member of the group"),
            ("of a deactivated superuser", "A member of the group"),
        ],
    )
    @pytest.mark.parametrize("way", ["change", "delete", "delete of several"])
    def test_of_more_rights_stay_as_they_are(self, kind: str, says: str, way: str) -> None:
        group = Group.objects.create(name="some")
        group.permissions.set(permissions("read_messages" if kind == "more" else "view_user"))
        before = self.held(group)
        members = {
            "of an admin": "admin2",
            "of a superuser": "superuser2",
            "of a deactivated superuser": "gone superuser",
        }
        if kind in members:
            person(members[kind]).groups.add(group)
        browser = browser_of(person("manager"))

        if way == "change":
            response = self.save(browser, group, "view_user", "change_user")
        elif way == "delete":
            response = browser.post(f"{GROUPS}{group.pk}/delete/", {"post": "yes"})
        else:
            other = Group.objects.create(name="other")
            response = do_action(browser, GROUPS, "delete_selected", other.pk, group.pk)

        assert response.status_code == 403
        assert says in response.text
        assert self.held(group) == before
        entry = AuditEntry.objects.get(action="refuse")
        assert (entry.kind, entry.object_id) == ("auth.group", str(group.pk))

    def test_are_changed_by_whoever_has_all_that_is_in_them(self) -> None:
        viewers = Group.objects.get(name=roles.VIEWER)
        person("user").groups.add(viewers)
        browser = browser_of(person("admin"))
        assert self.save(browser, viewers, "view_run").status_code == 302
        assert self.held(viewers) == {"view_run"}
        admins = Group.objects.get(name=roles.ADMIN)
        # Their own too: no right is gained by it.
        assert self.save(browser, admins, "view_run", "delete_logentry").status_code == 403
        assert self.save(browser, admins, "view_run").status_code == 302
        assert self.held(admins) == {"view_run"}


def test_the_list_of_people_costs_no_more_for_it(django_assert_max_num_queries: Any) -> None:
    browser = browser_of(person("manager"))
    for number in range(20):
        User.objects.create_user(f"someone {number}", date_joined=timezone.now())
    with django_assert_max_num_queries(12):
        assert browser.get(PAGE).status_code == 200


def test_who_may_not_read_what_others_said_sends_it_to_no_url(settings: Any) -> None:
    """As with the URL of a webhook: by a new command, by an old one, and by one with another filter."""
    settings.AGENT_WEBHOOK_HOSTS = ["hooks.example.org"]
    url, names = "https://hooks.example.org/words", ["botregistration", "botcommand"]
    user = User.objects.of_matrix_id("@someone:localhost")
    registration = BotRegistration.objects.create(user=user, username="@someone:localhost")
    old, ping = (
        BotCommand.objects.create(registration=registration, command=each, filter=a_filter())
        for each in (url, "ping")
    )
    actor = person("lesser")
    browser = browser_of(actor)

    def form(command: str, **filter_: str) -> dict[str, str]:
        wanted = json.dumps(a_filter(**filter_))
        return {"registration": str(registration.pk), "command": command, "filter": wanted}

    def inline(command: str) -> dict[str, str]:
        fields = {f"commands-0-{name}": value for name, value in form(command).items()}
        return {"commands-TOTAL_FORMS": "1", "commands-INITIAL_FORMS": "0"} | fields

    def tried() -> list[Any]:
        pages = "/admin/realm/botcommand/"
        browser.post(f"{pages}add/", form(url))
        browser.post(f"{pages}{ping.pk}/change/", form(url))
        browser.post(f"{pages}{old.pk}/change/", form(url, content_type="other"))
        page = f"/admin/realm/botregistration/{registration.pk}/change/"
        browser.post(page, inline(url))
        rows = BotCommand.objects.order_by("command", "filter__content_type")
        return list(rows.values_list("command", "filter__content_type"))

    for name in names:
        actor.user_permissions.add(*permissions(*(f"{do}_{name}" for do in ("add", "change"))))
    kind = a_filter()["content_type"]
    assert tried() == [(url, kind), ("ping", kind)]
    browser.post("/admin/realm/botcommand/add/", form("chat.reply"))
    assert BotCommand.objects.filter(command="chat.reply").exists()
    actor.user_permissions.add(*permissions("read_messages"))
    assert len([each for each in tried() if each[0] == url]) == 4
