"""Tools that a model may call. `AGENT_TOOLS` names the ones that are offered to it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
from django.conf import settings


class ToolError(Exception):
    """The call cannot be executed; the message goes back to the model."""


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    parameters: dict[str, Any]  # JSON Schema of an object
    function: Callable[..., str]

    def offer(self) -> dict[str, Any]:
        """Return the description of the tool for `/chat/completions`."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": self.parameters,
            },
        }


TOOLS: dict[str, Tool] = {}


def tool(**properties: dict[str, Any]) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register a function as a tool: its name, its docstring and, for each argument, a JSON Schema.
    Arguments without a default are required."""

    def register(function: Callable[..., str]) -> Callable[..., str]:
        required = [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.default is parameter.empty
        ]
        TOOLS[function.__name__] = Tool(
            name=function.__name__,
            description=inspect.getdoc(function) or "",
            parameters={"type": "object", "properties": properties, "required": required},
            function=function,
        )
        return function

    return register


def offered() -> list[dict[str, Any]]:
    return [TOOLS[name].offer() for name in settings.AGENT_TOOLS if name in TOOLS]


def call(name: str, arguments: str) -> str:
    """Execute a call as the model wrote it. Raises `ToolError`."""
    if name not in settings.AGENT_TOOLS or name not in TOOLS:
        raise ToolError(f"There is no tool {name!r}.")
    tool = TOOLS[name]
    try:
        values = orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        raise ToolError("The arguments are not JSON.") from None
    if not isinstance(values, dict) or not values.keys() <= tool.parameters["properties"].keys():
        allowed = ", ".join(tool.parameters["properties"]) or "none"
        raise ToolError(f"The arguments must be an object with these keys: {allowed}.")
    if missing := [key for key in tool.parameters["required"] if key not in values]:
        raise ToolError(f"Arguments are missing: {', '.join(missing)}.")
    return tool.function(**values)


@tool()
def current_time() -> str:
    """Return the current date and time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
