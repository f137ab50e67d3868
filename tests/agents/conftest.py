import base64
import json

import pytest
from redis import Redis

from agents.events import stream
from agents.worker.consumer import Consumer


class Broker:
    def __init__(self, redis: Redis) -> None:
        self.redis = redis

    def handed(self) -> list[str]:
        """The runs in Celery's queue, which is emptied."""
        key = "agent_events:celery"
        messages = self.redis.lrange(key, 0, -1)
        self.redis.delete(key)
        bodies = [json.loads(base64.b64decode(json.loads(m)["body"])) for m in reversed(messages)]
        return [body[0][0] for body in bodies]


@pytest.fixture(scope="session")
def _celery(redis_server: str) -> None:
    from config.celery import app

    app.conf.broker_url = redis_server
    app.set_current()


@pytest.fixture
def broker(redis: Redis, _celery: None) -> Broker:
    return Broker(redis)


@pytest.fixture
def consumer(redis: Redis, broker: Broker) -> Consumer:
    stream.ensure_group()
    return Consumer("worker-1")
