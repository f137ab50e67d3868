"""Secrets in the database and in the bot's store: without the key, a backup opens none of them."""

import asyncio
import io
import json
import logging
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from django.core import serializers
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client
from nio.crypto import OlmAccount, OutboundGroupSession

from botrunner.matrix import cross_signing, login, seeds
from botrunner.matrix.client import Homeserver
from botrunner.matrix.cross_signing import Identity
from botrunner.models import Session
from config.checks import secrets_at_rest
from lib import secrets
from lib.secrets import Sealed, Unreadable
from ops import doctor
from realm.models import User
from tests.config.starting import Start
from tests.webhooks import scenes
from webhooks import sender, signatures
from webhooks.models import Delivery, Subscription

pytestmark = pytest.mark.django_db
OLD, NEW = "old-" + "0123456789" * 4, "new-" + "9876543210" * 4
TOKEN, BOT, DEVICE = "syt_canary_0123456789", "@bot:localhost", "DEVICE"


@pytest.fixture(autouse=True)
def _place(settings: Any, tmp_path: Path) -> None:
    settings.SECRETS_KEY = [OLD]
    settings.BOT_RUNNER_STORE = tmp_path / "store"
    settings.BOT_RUNNER_STORE.mkdir()
    settings.HOOKS_ALLOWED_HOSTS = ["hooks.example.org"]


@pytest.fixture
def session() -> Session:
    made = Session.objects.create(homeserver="http://hs", username="bot")
    made.set_login(BOT, DEVICE, TOKEN)
    made.get_or_create_store_key()
    return made


@pytest.fixture
def webhook() -> Subscription:
    made = scenes.subscribe()
    made.rotate()
    return made


def identity(settings: Any) -> Identity:
    return Identity.stored(settings.BOT_RUNNER_STORE, BOT)


def column(row: Any, name: str) -> str:
    """The value as a backup has it."""
    with connection.cursor() as cursor:
        table, pk = row._meta.db_table, row._meta.pk.get_db_prep_value(row.pk, connection)
        cursor.execute(f"SELECT {name} FROM {table} WHERE {row._meta.pk.column} = %s", [pk])
        return str(cursor.fetchone()[0])


def rotated(**options: Any) -> dict[str, int]:
    out = io.StringIO()
    call_command("rotate_secrets", json=True, stdout=out, **options)
    found: dict[str, int] = json.loads(out.getvalue())
    return found


class TestABackup:
    """Of the database and the store, without the key."""

    def test_has_none_of_them(self, session: Session, webhook: Subscription, settings: Any) -> None:
        known = identity(settings)
        [file] = seeds.files(settings.BOT_RUNNER_STORE)
        clear = {
            "token": session.access_token,
            "store": session.get_or_create_store_key(),
            "new": webhook.secret,
            "old": webhook.old_secret,
        }
        stored = {
            "token": column(session, "access_token"),
            "store": column(session, "store_key"),
            "new": column(webhook, "secret"),
            "old": column(webhook, "old_secret"),
            "seeds": file.read_text(),
        }
        assert all(each.startswith(secrets.PREFIX) for each in stored.values())
        assert not any(value in each for value in clear.values() for each in stored.values())
        assert "master" not in stored["seeds"]
        assert file.stat().st_mode & 0o077 == 0

        settings.SECRETS_KEY = [NEW]
        for read in (
            lambda: Session.objects.get().access_token,
            lambda: Session.objects.get().get_or_create_store_key(),
            lambda: Subscription.objects.get().secret,
            lambda: Subscription.objects.get().secrets,
            lambda: identity(settings),
        ):
            with pytest.raises(Unreadable, match="SECRETS_KEY") as caught:
                read()
            assert not any(value in str(caught.value) for value in clear.values())

        settings.SECRETS_KEY = [NEW, OLD]
        again = Session.objects.get()
        assert (again.access_token, again.get_or_create_store_key()) == (
            clear["token"],
            clear["store"],
        )
        assert Subscription.objects.get().secrets == [clear["new"], clear["old"]]
        assert identity(settings).public_keys() == known.public_keys()

    def test_opens_no_pickle_of_the_bots_store(self, session: Session, settings: Any) -> None:
        """nio's own default passphrase is in its source."""
        path = settings.BOT_RUNNER_STORE / f"{BOT}_{DEVICE}.db"

        async def scene() -> Any:
            homeserver = Homeserver("http://127.0.0.1:1", "bot", settings.BOT_RUNNER_STORE)
            homeserver.unlock_store(session.get_or_create_store_key())
            homeserver.restore(session)
            keys = homeserver.nio.olm.account.identity_keys
            own = OutboundGroupSession()
            homeserver.nio.olm.create_group_session(
                keys["curve25519"], keys["ed25519"], "!room", own.id, own.session_key
            )
            await homeserver.close()
            return keys

        keys = asyncio.run(scene())
        with sqlite3.connect(path) as database:
            [account] = database.execute("SELECT account FROM accounts").fetchone()
        for passphrase in ("", "DEFAULT_KEY", OLD):
            with pytest.raises(Exception, match=r"(?i)mac|decrypt|decod|pickle"):
                OlmAccount.from_pickle(account, passphrase)
        opened = OlmAccount.from_pickle(account, session.get_or_create_store_key())
        assert opened.identity_keys == keys

    def test_has_them_in_no_session_of_a_browser(self, admin_client: Client) -> None:
        """The page that shows a webhook's secret once reads it from the webhook."""
        form = {"url": scenes.URL, "on_completed": "on"}
        page = admin_client.post("/admin/webhooks/subscription/add/", form)
        made = Subscription.objects.get()
        assert made.secret not in str(dict(admin_client.session.items()))
        assert made.secret in admin_client.get(page["Location"]).text
        assert made.secret not in admin_client.get(page["Location"]).text, "shown once"


class TestPlaces:
    def test_a_value_moved_to_another_row_or_field_is_unreadable(
        self, webhook: Subscription, session: Session
    ) -> None:
        other = scenes.subscribe(scenes.admin("other"))
        for name, value in (
            ("secret", column(webhook, "secret")),
            ("secret", column(other, "secret")[:-8] + "AAAAAAA="),
            ("secret", f"{secrets.PREFIX}{secrets.key_id(OLD)}:no base64!"),
            ("old_secret", column(other, "secret")),
        ):
            Subscription.objects.filter(pk=other.pk).update(**{name: Sealed(value)})
            with pytest.raises(Unreadable, match="cannot be decrypted"):
                getattr(Subscription.objects.get(pk=other.pk), name)
        Session.objects.update(store_key=Sealed(column(session, "access_token")))
        with pytest.raises(Unreadable):
            Session.objects.get().get_or_create_store_key()

    def test_each_encryption_is_another_one(self) -> None:
        one, two = (secrets.seal("x", "purpose", 1) for _ in range(2))
        assert one != two
        assert secrets.unseal(one, "purpose", 1) == secrets.unseal(two, "purpose", 1) == "x"
        for purpose, place in (("purpose", 2), ("other", 1), ("purpose", '1", "')):
            with pytest.raises(Unreadable):
                secrets.unseal(one, purpose, place)

    def test_rows_are_not_looked_up_or_updated_by_a_secret(self, webhook: Subscription) -> None:
        for use in (
            lambda: Subscription.objects.filter(secret=webhook.secret + "x").count(),
            lambda: Subscription.objects.update(secret="plain"),
        ):
            with pytest.raises(TypeError, match="is encrypted"):
                use()

    @pytest.mark.parametrize("how", ["startswith", "contains", "regex", "gt"])
    def test_nor_by_a_part_of_it_in_the_console(
        self, admin_client: Client, session: Session, webhook: Subscription, how: str
    ) -> None:
        """Or it could be read letter by letter."""
        for page, names in (
            ("botrunner/session", ("access_token", "store_key")),
            ("webhooks/subscription", ("secret", "old_secret")),
        ):
            for name in names:
                response = admin_client.get(f"/admin/{page}/", {f"{name}__{how}": "enc"})
                assert response.status_code in (302, 400), name

    def test_what_is_not_read_is_saved_without_the_key(
        self, webhook: Subscription, settings: Any
    ) -> None:
        before = column(webhook, "secret")
        settings.SECRETS_KEY = [NEW]
        row = Subscription.objects.get()
        row.on_failed = False
        row.save()
        assert column(row, "secret") == before

    def test_a_dump_has_them_encrypted_and_can_be_loaded(self, webhook: Subscription) -> None:
        secret = webhook.secret
        dump = serializers.serialize("json", Subscription.objects.all())
        assert secret not in dump
        assert secrets.PREFIX in dump
        Subscription.objects.all().delete()
        for loaded in serializers.deserialize("json", dump):
            loaded.save()
        assert Subscription.objects.get().secret == secret


class TestRotation:
    def test_encrypts_all_anew_once(
        self, session: Session, webhook: Subscription, settings: Any
    ) -> None:
        clear = [TOKEN, session.get_or_create_store_key(), *webhook.secrets]
        known = identity(settings).public_keys()
        settings.SECRETS_KEY = [NEW, OLD]
        nothing_done = {"total": 5, "outdated": 5, "unreadable": 0, "rotated": 0}
        assert rotated(dry_run=True) == nothing_done
        assert rotated() == nothing_done | {"rotated": 5}
        assert rotated() == nothing_done | {"outdated": 0}

        settings.SECRETS_KEY = [NEW]
        again, hook = Session.objects.get(), Subscription.objects.get()
        assert [again.access_token, again.get_or_create_store_key(), *hook.secrets] == clear
        assert identity(settings).public_keys() == known
        settings.SECRETS_KEY = [OLD]
        with pytest.raises(Unreadable):
            _ = Subscription.objects.get().secret

    def test_goes_on_where_it_was_ended(
        self, settings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(5):
            scenes.subscribe(scenes.admin(f"owner{number}"))
        settings.SECRETS_KEY = [NEW, OLD]
        seal, calls = secrets.seal, iter([True, True, False])

        def interrupted(*args: Any) -> Any:
            if not next(calls):
                raise KeyboardInterrupt
            return seal(*args)

        with monkeypatch.context() as patch:
            patch.setattr(secrets, "seal", interrupted)
            with pytest.raises(KeyboardInterrupt):
                rotated()
        assert rotated()["rotated"] == 3
        assert rotated()["outdated"] == 0

    def test_leaves_alone_what_changes_meanwhile(
        self, webhook: Subscription, settings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings.SECRETS_KEY = [NEW, OLD]
        seal = secrets.seal

        def late(plain: str, purpose: str, *place: object) -> Sealed:
            if purpose == "webhooks.subscription.secret":
                monkeypatch.setattr(secrets, "seal", seal)
                Subscription.objects.get().rotate()
            return seal(plain, purpose, *place)

        monkeypatch.setattr(secrets, "seal", late)
        before = webhook.secret
        rotated()
        after = Subscription.objects.get()
        assert after.secret != before
        assert after.old_secret == before
        assert rotated()["outdated"] == 0

    def test_encrypts_what_is_from_before_there_was_encryption(
        self, session: Session, settings: Any
    ) -> None:
        with connection.cursor() as cursor:
            cursor.execute("UPDATE botrunner_session SET access_token = %s", [TOKEN])
        assert Session.objects.get().access_token == TOKEN
        assert rotated()["rotated"] == 1
        assert column(session, "access_token").startswith(secrets.PREFIX)
        assert Session.objects.get().access_token == TOKEN

    def test_says_what_it_cannot_read_and_leaves_it(
        self, webhook: Subscription, settings: Any
    ) -> None:
        before = column(webhook, "secret")
        settings.SECRETS_KEY = [NEW]
        with pytest.raises(CommandError, match=r"2 secrets cannot be decrypted with SECRETS_KEY"):
            call_command("rotate_secrets", stdout=io.StringIO())
        assert column(webhook, "secret") == before


class TestWithoutTheKey:
    @pytest.mark.django_db(transaction=True)
    def test_the_bot_stops_and_keeps_its_device(self, settings: Any) -> None:
        settings.MATRIX_URL, settings.BOT_RUNNER_USERNAME = "http://127.0.0.1:1", "bot"
        session = login.session()
        session.set_login(BOT, DEVICE, TOKEN)
        kept = ("device_id", "access_token", "store_key", "user_id")
        for column_of in ("access_token", "store_key"):
            settings.SECRETS_KEY = [OLD]
            if column_of == "store_key":
                session.get_or_create_store_key()
            before = Session.objects.values(*kept).get()
            settings.SECRETS_KEY = [NEW]
            with pytest.raises(CommandError, match=r"cannot start: .* SECRETS_KEY does not have"):
                call_command("runbot")
            found = Session.objects.values(*kept).get()
            assert found == before

    def test_a_store_of_another_database_is_no_reason_for_a_new_device(
        self, session: Session, settings: Any, tmp_path: Path
    ) -> None:
        async def scene(store: Path, key: str) -> None:
            homeserver = Homeserver("http://127.0.0.1:1", "bot", store)
            homeserver.unlock_store(key)
            try:
                homeserver.restore(session)
            finally:
                await homeserver.close()

        asyncio.run(scene(settings.BOT_RUNNER_STORE, "the key of another database"))
        shutil.copytree(settings.BOT_RUNNER_STORE, tmp_path / "copy")
        with pytest.raises(Unreadable, match="Restore both from the same backup"):
            asyncio.run(scene(tmp_path / "copy", session.get_or_create_store_key()))

    def test_no_webhook_is_sent_unsigned(
        self, settings: Any, https_receiver: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        delivery = scenes.delivery()
        settings.SECRETS_KEY = [NEW]
        sender.send_due(delivery.subscription_id)
        assert not https_receiver.seen
        found = Delivery.objects.get()
        assert found.status == Delivery.Status.FAILED
        assert "SECRETS_KEY" in found.error
        assert not [each for each in caplog.records if each.exc_info]

        settings.SECRETS_KEY = [OLD]
        Delivery.objects.update(next_try_at=found.created_at)
        assert sender.send_due(delivery.subscription_id) == 1

    def test_a_webhook_gets_another_secret(self, webhook: Subscription, settings: Any) -> None:
        settings.SECRETS_KEY = [NEW]
        row = Subscription.objects.get()
        row.rotate()
        assert len(Subscription.objects.get().secrets) == 1

    @pytest.mark.django_db(transaction=True)
    def test_doctor_says_so(self, webhook: Subscription, settings: Any) -> None:
        def found() -> list[tuple[str, str]]:
            return [
                (each.level, each.message) for each in doctor.examine() if each.check == "secrets"
            ]

        assert found() == [("ok", "2 encrypted with the newest key.")]
        settings.SECRETS_KEY = [NEW, OLD]
        assert found()[0][0] == "warn"
        settings.SECRETS_KEY = [NEW]
        assert found() == [
            ("broken", "2 of 2 stored secrets cannot be decrypted with SECRETS_KEY.")
        ]
        settings.SECRETS_KEY = [settings.DEVELOPMENT_SECRET, OLD]
        level, output = found()[0]
        assert level == "warn"
        assert "protects nothing" in output


class TestTheSetting:
    def test_the_built_in_key_is_refused_in_production(self, start: Start) -> None:
        production = {
            "DEBUG": "false",
            "SECRET_KEY": "a" * 50,
            "REALM_SECRET_SEED": "b" * 50,
        }
        built_in = start("settings.DEVELOPMENT_SECRET").stdout.strip()
        for value in (built_in, "short", f"{NEW},short"):
            process = start("settings.SECRETS_KEY", SECRETS_KEY=value, **production)
            assert process.returncode != 0
            assert "ImproperlyConfigured: SECRETS_KEY is the built-in value" in process.stderr
            assert value not in process.stderr
        two = start("settings.SECRETS_KEY", SECRETS_KEY=f"{NEW}, {OLD}", **production)
        assert two.stdout.strip() == str([NEW, OLD])
        none = start("settings.SECRETS_KEY", **production)
        assert none.stdout.strip() == str(["a" * 50])

    def test_check_deploy_tells_what_protects_nothing(self, settings: Any) -> None:
        assert secrets_at_rest() == []
        settings.SECRETS_KEY = [settings.DEVELOPMENT_SECRET]
        [found] = secrets_at_rest()
        assert found.id == "botrealm.W005"
        assert "practically unencrypted" in found.msg


def test_nothing_shows_them(
    session: Session,
    webhook: Subscription,
    settings: Any,
    admin_client: Client,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not the pages of the console, nor names of rows, exports, the audit trail or the log."""
    caplog.set_level(logging.DEBUG)
    identity(settings)
    kept = [session.access_token, session.get_or_create_store_key(), *webhook.secrets]
    shown = [repr(session), str(session), repr(webhook), str(webhook)]
    pages = (f"botrunner/session/{session.pk}/change", f"webhooks/subscription/{webhook.pk}/change")
    pages += ("botrunner/session", "webhooks/subscription", "console/auditentry", "system")
    shown += [admin_client.get(f"/admin/{path}/").text for path in pages]
    settings.SECRETS_KEY = [NEW, OLD]
    rotated()
    shown += [record.getMessage() for record in caplog.records]
    for secret in (*kept, OLD, NEW):
        assert not [text for text in shown if secret in text]


def test_crosssigning_keeps_its_keys(settings: Any) -> None:
    """A file from before there was encryption is read, and encrypted."""
    known = identity(settings).public_keys()
    [path] = seeds.files(settings.BOT_RUNNER_STORE)
    clear = secrets.unseal(path.read_text(), seeds.PURPOSE, BOT)
    path.write_text(clear)
    settings.SECRETS_KEY = [NEW, OLD]
    assert identity(settings).public_keys() == known
    assert secrets.is_current(path.read_text())
    assert set(json.loads(clear)) == set(cross_signing.USAGES)


def test_a_new_secret_is_one_of_standard_webhooks(admin_user: User) -> None:
    made = scenes.subscribe(admin_user)
    assert made.secret.startswith(signatures.PREFIX)
    assert signatures.headers("id", b"{}", Subscription.objects.get().secrets)
