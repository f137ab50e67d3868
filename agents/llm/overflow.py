"""The messages of a run's calls, which are shortened once a call exceeds the context of the model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from agents.llm.completions import LLMError

CODE = "too_long"
# Of everything but the question this part remains, and at most so many characters. Few endpoints name
# their limit, and there is one more try.
REMAINING_PART = 4
REMAINING_CHARACTERS = 4000
# Where an endpoint names its limit: tokens differ in length, and the answer needs some too.
MARGIN = 0.5
# Of each result of a tool at least so much remains.
SMALLEST_RESULT = 200
LEFT_OUT = "\n[The rest of this result is left out.]"


class CallInput(Protocol):
    """The messages of a first call."""

    @property
    def messages(self) -> list[dict[str, Any]]: ...

    @property
    def sent(self) -> dict[str, Any]:
        """The description of the messages in the step."""

    @property
    def context_characters(self) -> int:
        """The length of everything but the question."""


# Returns a prompt with the question whole and about so many characters besides.
Shorten = Callable[[int], CallInput]


@dataclass
class CallMessages:
    """The messages of a first call, and the tool rounds since then."""

    prompt: CallInput
    shorten_prompt: Shorten | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    sent: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.sent = self.prompt.sent

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [*self.prompt.messages, *self.rounds]

    def add_round(self, messages: list[dict[str, Any]]) -> None:
        """Add a message with tool calls and the results."""
        self.rounds += messages
        self.sent = {"toolResults": [each["tool_call_id"] for each in messages[1:]]}

    def shorten(self, error: LLMError) -> bool:
        """Leave out earlier messages and cut results of tools. Return False if nothing is left to leave
        out."""
        context, results = self.prompt.context_characters, self._results()
        size = context + results
        remaining = self._remaining_context(error.acceptable_part)
        if self.shorten_prompt and context:
            self.prompt = self.shorten_prompt(remaining)
        if self.rounds:
            # A call with `context` characters more was accepted before the results came.
            self._cut_results(max(context - remaining, _remaining(results)))
        if self.prompt.context_characters + self._results() >= size:
            return False
        rounds = {name: self.sent[name] for name in ("toolResults",) if name in self.sent}
        self.sent = {**self.prompt.sent, **rounds, "shortened": True}
        return True

    def _remaining_context(self, acceptable_part: float | None) -> int:
        context = self.prompt.context_characters
        if acceptable_part is None or self.rounds:
            return _remaining(context)
        whole = sum(len(each["content"]) for each in self.prompt.messages)
        fitting = int(whole * acceptable_part * MARGIN) - (whole - context)
        return max(fitting, _remaining(context))

    def too_long(self) -> LLMError:
        """Return the error of a conversation that cannot be shortened further."""
        if self.prompt.context_characters or self.rounds:
            message = (
                "The conversation is too long for the model, although its earlier messages were left "
                "out. Send a shorter message, or begin a new conversation."
            )
        else:
            message = "The message is too long for the model."
        return LLMError(message, code=CODE, permanent=True)

    def _results(self) -> int:
        return sum(len(each["content"]) for each in self.rounds if each["role"] == "tool")

    def _cut_results(self, characters: int) -> None:
        """Cut the results of tools. Each call keeps its result, as endpoints require."""
        count = sum(each["role"] == "tool" for each in self.rounds)
        share = max(SMALLEST_RESULT, characters // count)
        self.rounds = [
            {**each, "content": each["content"][:share] + LEFT_OUT}
            if each["role"] == "tool" and len(each["content"]) > share + len(LEFT_OUT)
            else each
            for each in self.rounds
        ]


def _remaining(characters: int) -> int:
    return min(characters // REMAINING_PART, REMAINING_CHARACTERS)
