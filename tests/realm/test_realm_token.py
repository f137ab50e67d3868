import io
import time
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from console.models import AuditEntry
from realm import tokens
from realm.models import User
from tests.realm.conftest import Client

pytestmark = pytest.mark.django_db


def printed(*arguments: str) -> str:
    out = io.StringIO()
    call_command("realm_token", *arguments, stdout=out)
    return out.getvalue()


def test_it_prints_a_token_and_nothing_else(alice: User) -> None:
    line = printed("@alice:localhost")
    assert line.count("\n") == 1
    claims = tokens.verify(line.strip())
    assert claims.user == "@alice:localhost"
    assert abs(claims.expires - time.time() - tokens.MAX_AGE_SECONDS) < 60
    client = Client()
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {line.strip()}")
    assert client.get("/_bot-registrations").status_code == 200


def test_it_prints_one_for_a_few_hours(alice: User) -> None:
    claims = tokens.verify(printed("@alice:localhost", "--hours", "2").strip())
    assert abs(claims.expires - time.time() - 7200) < 60


def test_it_creates_the_user_when_told_to() -> None:
    assert tokens.verify(printed("@dora:localhost", "--create").strip()).user == "@dora:localhost"
    user = User.objects.get(matrix_user_id="@dora:localhost")
    assert not user.has_usable_password()
    assert not user.is_staff
    printed("@dora:localhost", "--create")
    assert User.objects.filter(matrix_user_id="@dora:localhost").count() == 1


def good(token: str) -> bool:
    client = Client()
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {token.strip()}")
    return client.get("/_bot-registrations").status_code == 200


def test_it_revokes_all_tokens_of_a_user_and_prints_none(alice: User) -> None:
    old = [printed("@alice:localhost"), printed("@alice:localhost", "--hours", "1")]
    assert all(map(good, old))

    output = printed("@alice:localhost", "--revoke")

    assert output.startswith("All tokens of @alice:localhost are revoked.")
    assert "ey" + "J" not in output
    assert not any(map(good, old))
    entry = AuditEntry.objects.get()
    assert (entry.name, entry.action, entry.object_id, entry.result) == (
        "manage.py realm_token",
        "change",
        str(alice.pk),
        "All API tokens revoked.",
    )
    # In the same second, as a script does it.
    assert good(printed("@alice:localhost"))


def test_it_does_not_revoke_and_create_at_once() -> None:
    with pytest.raises(CommandError, match="not allowed with"):
        printed("@dora:localhost", "--create", "--revoke")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["@dora:localhost"], "is unknown"),
        (["@dora:localhost", "--revoke"], "no token of theirs is valid"),
        (["dora"], "not a Matrix id"),
        (["@dora"], "not a Matrix id"),
        (["@" + "d" * 300 + ":localhost", "--create"], "not a Matrix id"),
        (["@dora:localhost", "--hours", "0"], "from 1 to 168"),
        (["@dora:localhost", "--hours", "169"], "from 1 to 168"),
    ],
)
def test_it_says_what_is_wrong(arguments: list[str], says: str) -> None:
    with pytest.raises(CommandError, match=says):
        printed(*arguments)
    assert not User.objects.exists()


def test_it_does_not_take_over_an_account_by_its_name(django_user_model: Any) -> None:
    django_user_model.objects.create_superuser("@dora:localhost", password="secret")
    with pytest.raises(CommandError, match="without this Matrix id"):
        printed("@dora:localhost", "--create")


def test_it_prints_none_where_the_secret_is_not_known(alice: User, settings: Any) -> None:
    settings.UNUSED_SECRETS = ["REALM_SECRET_SEED"]
    with pytest.raises(CommandError, match="where the web server runs"):
        printed("@alice:localhost")


def test_a_token_of_a_deleted_account_is_not_good_for_a_later_one_of_the_same_matrix_id() -> None:
    """Else all that was revoked would be good again, once the person has signed in anew."""
    account = User.objects.of_matrix_id("@dora:localhost")
    account.tokens_valid_from = None
    account.save()
    long_ago = tokens.issue("@dora:localhost")
    time_of_issue = tokens.verify(long_ago).issued
    assert good(long_ago)
    account.revoke_tokens()
    account.delete()
    while time.time() < time_of_issue + 1:
        time.sleep(0.05)
    again = User.objects.of_matrix_id("@dora:localhost")
    assert not good(long_ago)
    assert good(tokens.issue("@dora:localhost", valid_from=again.tokens_valid_from))
