"""Answers of real model servers, made anew for the tests: one file per server, with named cases.

    llm.script(answer("llamacpp", "overflow"))

A file starts with comments: the server, its version, and whether it was run or only its documentation
read. Each case is a line `=== name`, the status and the content type, more headers, an empty line and
the body. `make providers` runs the servers themselves.

The names mean the same in each file:

    ok          a short answer with its usage
    length      cut by the output limit, with text
    thinking    reasoning, then the answer
    exhausted   the output limit was used up by reasoning
    tool        one call of `current_time`
    tools       two calls in one reply
    overflow    the context is too long
    unknown     the model does not exist
    path        the base URL is wrong
    roles       the roles do not alternate
    filter      the provider's filter stopped the answer
    refusal     the model refused, with a text for it
    quota       no credit is left
    key         the key is wrong
    error       an error within a stream
"""

from __future__ import annotations

import functools
from pathlib import Path

from tests.fakes.llm import Raw

FOLDER = Path(__file__).parent
ANSWER = "The depot is open."
REASONING = "Depots rarely sleep."


@functools.cache
def servers() -> list[str]:
    """Return the names of the servers."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


@functools.cache
def answers(server: str) -> dict[str, Raw]:
    """Return the answers of a server by case."""
    _, *cases = (FOLDER / f"{server}.txt").read_text().split("\n=== ")
    return dict(_parse(case) for case in cases)


def answer(server: str, case: str) -> Raw:
    return answers(server)[case]


def _parse(case: str) -> tuple[str, Raw]:
    head, _, body = case.partition("\n\n")
    name, status, *headers = head.split("\n")
    number, _, content_type = status.partition(" ")
    pairs = (header.partition(": ") for header in headers)
    # A body that is no stream ends without a line's end.
    body = body.rstrip("\n") + ("\n\n" if "event-stream" in content_type and body.strip() else "")
    return name, Raw(
        body.encode(),
        int(number),
        content_type,
        {key.lower(): value for key, _, value in pairs},
    )
