"""What docs/how-to/receive-webhooks.md says to receivers holds."""

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from webhooks import signatures

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/how-to/receive-webhooks.md").read_text()
BODY = '{"type":"run.completed","data":{"output":"Grüße"}}'.encode()
ID = "3901cc45-3424-47b8-aecd-a9be5a6ab1ec"


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.S)[number]


@pytest.fixture
def secret() -> str:
    return signatures.new_secret()


def test_the_python_that_verifies(secret: str) -> None:
    namespace: dict[str, Any] = {}
    exec(block("python", 1), namespace)
    verified = namespace["verified"]
    headers = signatures.headers(ID, BODY, [signatures.new_secret(), secret])

    assert verified(secret, headers, BODY)
    assert not verified(secret, headers, BODY + b" ")
    assert not verified(signatures.new_secret(), headers, BODY)
    old = headers | {"webhook-timestamp": str(int(time.time()) - 301)}
    assert not verified(secret, old, BODY)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
def test_the_shell_that_verifies(secret: str, tmp_path: Path) -> None:
    headers = signatures.headers(ID, BODY, [secret])
    (tmp_path / "body").write_bytes(BODY)
    given = {"SECRET": secret, "ID": ID, "TIMESTAMP": headers["webhook-timestamp"]}
    told = subprocess.run(
        ["sh", "-c", block("sh", 1)],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"} | given,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout

    assert f"v1,{told.strip()}" == headers["webhook-signature"]
