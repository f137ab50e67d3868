"""A reply of a model, in plain values."""

from dataclasses import dataclass, field

from agents.llm.errors import UNSTORABLE

FINISH_REASONS = ("stop", "length", "content_filter", "tool_calls")
# Where no tokenizer is at hand. English text has about four bytes a token.
BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class TokenUsage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt tokens
    is_estimated: bool = False

    def __add__(self, other: "TokenUsage") -> "TokenUsage":
        return TokenUsage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.is_estimated or other.is_estimated,
        )


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: str  # JSON as the model wrote it: not to be trusted


@dataclass
class ModelReply:
    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    usage: TokenUsage = TokenUsage()
    reasoning: str = ""  # never a part of the answer, and not sent to a model again
    finish_reason: str = ""  # of FINISH_REASONS, or empty
    is_refusal: bool = False  # the text is the model's refusal


def storable(text: str) -> str:
    """Remove characters that databases cannot store: NUL and unpaired surrogates."""
    return UNSTORABLE.sub("", text)
