import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from botrunner.loops import breaker
from tests import synapse as homeservers
from tests.botrunner.world import World
from tests.synapse import Account, Synapse

_numbers = itertools.count()


@pytest.fixture(scope="session")
def synapse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Synapse]:
    if not homeservers.installed():
        pytest.skip("matrix-synapse is not installed (SYNAPSE_PYTHON)")
    with Synapse(tmp_path_factory.mktemp("synapse")) as homeserver:
        yield homeserver


@pytest.fixture
def account(synapse: Synapse) -> Callable[[str], Account]:
    """A new account whose name begins as given."""
    return lambda name: synapse.register(f"{name}-{next(_numbers)}")


@pytest.fixture
def alice(account: Callable[[str], Account]) -> Account:
    return account("alice")


@pytest.fixture
def world(
    transactional_db: None,
    synapse: Synapse,
    account: Callable[[str], Account],
    redis: Any,
    redis_server: str,
    tmp_path: Path,
) -> Iterator[World]:
    """Nothing of it is started yet. Each test has a bot account of its own."""
    with World(synapse, redis_server, tmp_path, account("bot-runner")) as world:
        yield world


@pytest.fixture(autouse=True)
def _no_loops() -> Iterator[None]:
    """Rooms and people have the same names in all tests."""
    breaker.clear()
    yield
    breaker.clear()
