"""Tool calls from the pieces in which servers send them.

By the protocol the first piece of a call has its id and name, and all have its index. Servers leave out
the index or the id, repeat id and name in each piece, or send arguments as an object.
"""

import uuid
from typing import Any

import orjson

from agents.llm.replies import ToolCall, storable

# More than are executed of one reply (agents.llm.loop).
MAX_CALLS = 128


class Call:
    __slots__ = ("arguments", "id", "index", "name")

    def __init__(self, index: int | None, id: str) -> None:
        self.index = index
        self.id = id
        self.name = ""
        self.arguments = ""

    def is_whole(self) -> bool:
        if not self.arguments.endswith("}"):
            return False
        try:
            orjson.loads(self.arguments)
        except ValueError:
            return False
        return True

    def add(self, name: str, arguments: str) -> None:
        if name and name != self.name:
            # Sent in pieces, or growing.
            self.name = name if name.startswith(self.name) else self.name + name
        self.arguments += arguments


class ToolCallCollector:
    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._legacy: Call | None = None
        self.size = 0

    def add(self, fragment: Any) -> None:
        """Add a piece of a tool call."""
        if not isinstance(fragment, dict):
            return
        function = fragment.get("function")
        if not isinstance(function, dict):
            function = fragment if "name" in fragment or "arguments" in fragment else {}
        name, arguments = _name(function.get("name")), _arguments(function.get("arguments"))
        self.size += len(name) + len(arguments)
        call = self._call_of(_index(fragment), _name(fragment.get("id")), name, arguments)
        if arguments.startswith("{") and call.arguments == "{}":
            call.arguments = ""  # a placeholder before the first piece
        call.add(name, arguments)

    def add_legacy(self, function: Any) -> None:
        """Add a piece of a `function_call`, the form before `tool_calls`."""
        if not isinstance(function, dict):
            return
        self._legacy = self._legacy or Call(None, "")
        arguments = _arguments(function.get("arguments"))
        self._legacy.add(_name(function.get("name")), arguments)
        self.size += len(arguments)

    def __bool__(self) -> bool:
        return bool(self._calls or self._legacy)

    def calls(self) -> list[ToolCall]:
        """Return the calls, each with an id of its own."""
        calls = self._calls or ([self._legacy] if self._legacy else [])
        if all(call.index is not None for call in calls):
            calls = sorted(calls, key=lambda call: call.index or 0)
        used: set[str] = set()
        return [
            ToolCall(
                id=unused_id(storable(call.id), used),
                name=storable(call.name)[:100],
                arguments=storable(call.arguments) or "{}",
            )
            for call in calls
            if call.name or call.arguments
        ]

    def _call_of(self, index: int | None, id: str, name: str, arguments: str) -> Call:
        call = self._find(index, id, name)
        begins_again = (
            call is not None
            and name != ""
            and arguments.lstrip().startswith("{")
            and call.arguments != "{}"
            and call.is_whole()
        )
        # Two whole calls without an index or an id may also both have no arguments.
        begins_again = begins_again or (
            call is not None and not id and name != "" and arguments == call.arguments == "{}"
        )
        if call is None or begins_again:
            call = Call(index, id)
            if len(self._calls) < MAX_CALLS:
                self._calls.append(call)
        call.id = call.id or id
        return call

    def _find(self, index: int | None, id: str, name: str) -> Call | None:
        """Return the call that a piece belongs to, None for a new one."""
        if index is not None:
            call = next((call for call in reversed(self._calls) if call.index == index), None)
            return None if call and id and call.id and call.id != id else call
        if id:
            same = next((call for call in reversed(self._calls) if call.id == id), None)
            unnamed = self._calls[-1] if self._calls and not self._calls[-1].id else None
            return same or (unnamed if not name else None)
        last = self._calls[-1] if self._calls else None
        return None if last and name and last.name and name != last.name else last


def unused_id(call_id: str, used: set[str]) -> str:
    """Return `call_id`, or another if it is used or empty, and note it. Some templates and APIs of
    Mistral take nine letters and digits only."""
    if not call_id or call_id in used:
        call_id = uuid.uuid4().hex[:9]
    used.add(call_id)
    return call_id


def _index(fragment: dict[str, Any]) -> int | None:
    try:
        return int(fragment["index"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _name(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _arguments(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    try:
        return orjson.dumps(value).decode()
    except (TypeError, ValueError):
        return ""
