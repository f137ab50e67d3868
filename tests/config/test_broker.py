"""What is ours of the way from Redis to a worker."""

import logging
from typing import Any

import pytest
from kombu import Connection


def test_a_channel_that_outlives_its_connection_can_be_closed(
    redis: Any, redis_server: str
) -> None:
    """So it is when Redis dies while the worker has tasks that it has not acknowledged."""
    with Connection(redis_server, transport="config.server.broker:Transport") as connection:
        queue = connection.SimpleQueue("tasks")
        queue.put({"run": 1})
        message = queue.get(timeout=60)
        channel = connection.default_channel
        connection._do_close_transport()
        channel._disconnect_pools()
        connection.maybe_close_channel(channel)
        message.ack_log_error(logging.getLogger(), connection.connection_errors)


def test_what_is_no_binding_keeps_no_message_from_its_queue(redis: Any, redis_server: str) -> None:
    """Any program may have written there; kombu reads it whenever an answer is sent."""
    with Connection(redis_server, transport="config.server.broker:Transport") as connection:
        queue = connection.SimpleQueue("answers")
        redis.sadd("_kombu.binding.answers", b"garbage", b"\xff", b"a\x06\x16b\x06\x16c\x06\x16d")
        queue.put({"run": 1})
        assert queue.get(timeout=60).payload == {"run": 1}


@pytest.mark.parametrize(
    ("setting", "refusing", "usual"), [("maxmemory", "1", "0"), ("min-replicas-to-write", "1", "0")]
)
def test_a_redis_that_takes_nothing_counts_as_one_that_is_away(
    redis: Any, redis_server: str, setting: str, refusing: str, usual: str
) -> None:
    """So that a worker waits for it, longer and longer."""
    redis.config_set(setting, refusing)
    try:
        connection = Connection(redis_server, transport="config.server.broker:Transport")
        away = connection.recoverable_connection_errors
        with connection, pytest.raises(away, match="refuses to write"):
            connection.transport.establish_connection()
    finally:
        redis.config_set(setting, usual)
    with Connection(redis_server, transport="config.server.broker:Transport") as connection:
        assert connection.connect()
