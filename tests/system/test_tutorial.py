"""The commands of README.md and docs/tutorial.md work as they are written there, on one local stack."""

import subprocess
from collections.abc import Iterator

import pytest

from tests import synapse
from tests.docs.blocks import shell_blocks
from tests.system.stack import BASE_DIR, Stack

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not synapse.installed(), reason="matrix-synapse is not installed"),
]

# Errors of a block end it, and curl fails on an error status.
PRELUDE = """set -euo pipefail
curl() { command curl --fail-with-body --silent --show-error --max-time 90 "$@"; }
"""


@pytest.fixture(scope="module")
def stack(database: dict[str, str]) -> Iterator[Stack]:
    with Stack(STACK_MATRIX="true", DEBUG="true", **database) as stack:
        stack.wait("the bot to listen", lambda: "Matrix rooms ready" in stack.log(), 180)
        yield stack


def execute(stack: Stack, script: str) -> None:
    """Execute a block with the addresses and the folder of this stack."""
    for default, actual in (
        ("localhost:3000", f"localhost:{stack.port}"),
        (".local/", f"{stack.directory}/"),
        ("/tmp/answer.json", f"{stack.directory}/answer.json"),
    ):
        script = script.replace(default, actual)
    ended = subprocess.run(
        ["bash", "-c", PRELUDE + script],
        cwd=BASE_DIR,
        env=stack.env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, f"{script}\n{ended.stdout}\n{ended.stderr}"


@pytest.mark.parametrize(
    "script", [block.script for block in shell_blocks("README.md") if not block.reason]
)
def test_the_commands_of_the_readme(stack: Stack, script: str) -> None:
    execute(stack, script)


def test_the_commands_of_the_tutorial(stack: Stack) -> None:
    blocks = shell_blocks("docs/tutorial.md")
    execute(stack, "\n".join(block.script for block in blocks if not block.reason))
