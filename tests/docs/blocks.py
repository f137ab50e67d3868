"""The fenced shell blocks of a document."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^(?:<!-- not run: (.+?) -->\n)?```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    script: str
    reason: str  # not to execute it; empty for one that is executed


def shell_blocks(path: str) -> list[Block]:
    text = (ROOT / path).read_text()
    return [Block(script, reason) for reason, script in BLOCK.findall(text)]
