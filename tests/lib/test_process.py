"""Objects of which a process has one, values for some seconds, and bounded counters."""

import os

import pytest

from lib import process
from lib.cache import TimedCache
from lib.limiter import HolderReached, Limiter, TotalReached


class Client:
    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> process.Once[Client]:
    monkeypatch.setattr(process, "_factories", [])
    return process.once(Client)


def test_one_object_until_the_reset_which_closes_it(factory: process.Once[Client]) -> None:
    client = factory()
    assert factory() is client
    process.reset()
    assert client.is_closed
    assert not factory.exists()
    assert factory() is not client


def test_a_child_process_makes_its_own_and_closes_nothing(factory: process.Once[Client]) -> None:
    client = factory()
    child = os.fork()
    if not child:
        os._exit(factory() is client or client.is_closed)
    assert os.waitpid(child, 0)[1] == 0
    assert factory() is client


def test_a_value_is_loaded_again_when_it_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("lib.cache.time.monotonic", lambda: now)
    numbers = iter(range(10))
    cache = TimedCache(lambda: next(numbers), 5)
    assert [cache.get(), cache.get()] == [0, 0]
    now += 5
    assert cache.get() == 1
    cache.reset()
    assert cache.get() == 2


def test_a_limiter_bounds_each_holder_and_all_together() -> None:
    limiter = Limiter()
    limiter.acquire("a", limit=1, total=2)
    with pytest.raises(HolderReached):
        limiter.acquire("a", limit=1, total=2)
    limiter.acquire("b", limit=1, total=2)
    with pytest.raises(TotalReached):
        limiter.acquire("c", limit=1, total=2)
    limiter.release("a")
    limiter.acquire("c", limit=1, total=2)
    assert dict(limiter.taken) == {"b": 1, "c": 1}
