"""docs/reference/http.md is run as it stands, and what it shows is what is answered."""

import asyncio
import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from agents.models import Run
from agents.runs import execution
from realm import tokens
from realm.models import User
from tests.chat.asgi_client import go
from tests.chat.serving import output_of, serving

ROOT = Path(__file__).resolve().parent.parent.parent
BLOCK = re.compile(r"^```(sh|json)\n(.*?)^```$", re.M | re.S)
USER = "@you:localhost"


def commands() -> Iterator[tuple[str, Any]]:
    """Each block of commands, and the answer that is shown right after it."""
    blocks = [*BLOCK.findall((ROOT / "docs/reference/http.md").read_text()), ("sh", "")]
    for (kind, text), (next_kind, next_text) in pairwise(blocks):
        if kind == "sh":
            yield text, json.loads(next_text) if next_kind == "json" else None


def script(folder: Path) -> str:
    """All of them, one after the other in one shell; what each says goes to a file of its own."""
    lines = [
        "set -euo pipefail",
        'curl() { command curl --silent --show-error --max-time 30 "$@"; }',
    ]
    for number, (text, _) in enumerate(commands()):
        place = shlex.quote(str(folder / str(number)))
        lines += [f"echo {number}", f"{{\n{text}\n}} > {place}"]
    return "\n".join(lines).replace("/tmp/answer.json", str(folder / "answer.json"))


def shape(value: Any) -> Any:
    """What there is, without what it says: of a list, what its members are."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value[:1]]
    return type(value).__name__


def errors(document: dict[str, Any]) -> list[str]:
    """Return the error texts of an answer, in plain JSON or JSON:API."""
    plain = [document["error"]] if "error" in document else []
    return plain + [error["detail"] for error in document.get("errors", [])]


async def work() -> None:
    """What a worker does."""
    while True:
        for run in await asyncio.to_thread(
            list, Run.objects.unfinished().values_list("pk", flat=True)
        ):
            await asyncio.to_thread(execution.execute, run)
        await asyncio.sleep(0.05)


@pytest.mark.django_db(transaction=True)
def test_every_command_works_as_documented(redis: Any, settings: Any, tmp_path: Path) -> None:
    settings.CHAT_ALLOW_ANONYMOUS = False
    User.objects.create_matrix_user(USER)
    ended: list[Any] = []

    async def scene() -> None:
        async with serving() as url:
            worker = asyncio.create_task(work())
            try:
                ended[:] = await output_of(
                    "bash",
                    "-c",
                    script(tmp_path),
                    seconds=600,
                    folder=tmp_path,
                    URL=url,
                    TOKEN=tokens.issue(USER),
                )
            finally:
                worker.cancel()

    go(scene())

    code, output = ended
    assert code == 0, output
    for number, (text, shown) in enumerate(commands()):
        answer = (tmp_path / str(number)).read_text()
        if shown is None:
            assert '"ok":false' not in answer, text
            assert '"errors"' not in answer, text
        else:
            assert shape(json.loads(answer)) == shape(shown), text
            assert errors(json.loads(answer)) == errors(shown), text
