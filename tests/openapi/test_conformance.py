"""What docs/openapi.yaml says is what the server does: schemathesis makes up requests, good and bad
ones, and checks the answers."""

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from agents.runs import execution
from openapi.parts import RUN_ID, THREAD_ID
from openapi.realm import ACCESS_TOKEN, BOT_ID, USER
from realm import tokens
from realm.models import BotRegistration, User
from tests import factories
from tests.chat.asgi_client import go
from tests.chat.serving import output_of, serving
from tests.realm.homeserver import Homeserver

HERE = Path(__file__).resolve().parent
SCHEMATHESIS = Path(sys.executable).parent / "schemathesis"


def test_operations_of_the_configuration_exist() -> None:
    """Otherwise an exception would silently be none: a stream without an end would be waited for."""
    config = tomllib.loads((HERE / "schemathesis.toml").read_text())
    ids = [operation.get("include-operation-id", []) for operation in config["operations"]]
    named = {name for each in ids for name in ([each] if isinstance(each, str) else each)}
    description = (HERE.parent.parent / "docs/openapi.yaml").read_text()
    assert named
    assert {name for name in named if f"operationId: {name}\n" not in description} == set()


@pytest.mark.django_db(transaction=True)
def test_server_conforms_to_the_description(redis: Any, settings: Any, tmp_path: Path) -> None:
    settings.CHAT_ALLOW_ANONYMOUS = False
    settings.HOOKS_ALLOWED_HOSTS = ["hooks.example.org"]
    # Named as the examples are.
    user = User.objects.create_matrix_user(USER)
    BotRegistration.objects.create(id=BOT_ID, user=user, username=USER)
    factories.ask(owner=user, thread_id=THREAD_ID, run_id=RUN_ID)
    execution.execute(RUN_ID)
    ended: list[Any] = []

    async def scene() -> None:
        async with serving() as url:
            ended[:] = await output_of(
                str(SCHEMATHESIS),
                f"--config-file={HERE / 'schemathesis.toml'}",
                "run",
                "--checks=all",
                str(HERE.parent.parent / "docs/openapi.yaml"),
                f"--url={url}",
                f"--header=Authorization: Bearer {tokens.issue(USER)}",
                seconds=600,
                folder=tmp_path,
            )

    with Homeserver() as homeserver:
        settings.MATRIX_URL = homeserver.url
        homeserver.users[ACCESS_TOKEN] = USER
        go(scene())

    code, output = ended
    assert code == 0, output
