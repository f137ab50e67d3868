"""What is ours of the way from Redis to a worker."""

import logging
from typing import Any

from kombu import Connection


def test_a_channel_that_outlives_its_connection_can_be_closed(
    redis: Any, redis_server: str
) -> None:
    """So it is when Redis dies while the worker has tasks that it has not acknowledged."""
    with Connection(redis_server, transport="config.broker:Transport") as connection:
        queue = connection.SimpleQueue("tasks")
        queue.put({"run": 1})
        message = queue.get(timeout=5)
        channel = connection.default_channel
        connection._do_close_transport()
        channel._disconnect_pools()
        connection.maybe_close_channel(channel)
        message.ack_log_error(logging.getLogger(), connection.connection_errors)
