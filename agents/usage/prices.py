"""Compute the cost of tokens by the price of their model on the day, in trillionths of the currency."""

from collections.abc import Iterable

from agents.llm.completions import TokenUsage
from agents.models import Price, today
from lib import process
from lib.cache import TimedCache
from lib.formats import COST_UNITS

# A changed price takes effect after at most this time.
REFRESH_SECONDS = 30.0


class PriceList:
    """The prices as this process knows them: read again every half minute, not for every call."""

    def __init__(self) -> None:
        self._prices = TimedCache(_by_model, REFRESH_SECONDS)
        self.reset = self._prices.reset

    def of(self, model: str) -> Price | None:
        """Return the price that is valid today."""
        day = today()
        prices = self._prices.get().get(model, ())
        return next((price for price in prices if price.valid_from <= day), None)


def _by_model() -> dict[str, list[Price]]:
    prices: dict[str, list[Price]] = {}
    for price in Price.objects.order_by("-valid_from"):
        prices.setdefault(price.model, []).append(price)
    return prices


price_list = process.shared(PriceList())


def cost(model: str, usage: TokenUsage) -> int | None:
    """Return the cost of a call; None if its model has no price."""
    if not usage.prompt_tokens and not usage.completion_tokens:
        return 0
    price = price_list.of(model)
    if price is None:
        return None
    cached = price.prompt if price.cached is None else price.cached
    return int(
        COST_UNITS
        // 10**6
        * (
            (usage.prompt_tokens - usage.cached_tokens) * price.prompt
            + usage.cached_tokens * cached
            + usage.completion_tokens * price.completion
        )
    )


def total(costs: Iterable[int | None]) -> int | None:
    """Return the sum; None if one of them is unknown, as a part would pass for the whole."""
    costs = list(costs)
    return None if None in costs else sum(each or 0 for each in costs)


def currency() -> str:
    return Price.objects.values_list("currency", flat=True).first() or "USD"
