from typing import Any

import pytest

from tests.fakes.receiver import HOST, Receiver


@pytest.fixture(autouse=True)
def _allowed(settings: Any) -> None:
    settings.HOOKS_ALLOWED_HOSTS = [HOST]


@pytest.fixture
def receiver(https_receiver: type[Receiver]) -> type[Receiver]:
    return https_receiver
