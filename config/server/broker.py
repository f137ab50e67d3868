"""kombu's Redis transport, with the connections of lib.redis and one client for each channel, that
outlives the death of Redis.

kombu turns TLS on by the name of a transport, and this one has another: where a connection leads, and
how it is verified, comes from the settings alone, whatever kombu made of the URL.

kombu makes a client for every message that it takes and for every acknowledgement. redis-py fills a
table of some hundred callbacks for each, which cost a tenth of a worker's time.

What stands in the queue and is no message is set aside, as the event stream does: Celery would end the
worker.
"""

import logging
from contextlib import suppress
from queue import Empty
from typing import Any

from django.conf import settings
from kombu.exceptions import SerializationError
from kombu.transport import redis
from kombu.utils.encoding import bytes_to_str
from redis import exceptions

from config.server import messages
from lib.redis import server

logger = logging.getLogger(__name__)

# Of kombu's parameters those that do not go with a Unix socket, and those that lib.redis has.
OF_TCP = ("host", "port", "socket_connect_timeout", "socket_keepalive", "socket_keepalive_options")


# Routing key, pattern and queue.
BINDING_PARTS = 3

# What Celery and kombu raise for a message that they cannot use. What they raise for a lost connection
# is none of these.
NO_MESSAGE = (
    messages.Unusable,
    SerializationError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


def set_aside(raw: bytes, place: str, reason: str) -> None:
    """Keep what is no message with the dead letters, and log it in one line."""
    # Late: it belongs to an app, and this module is loaded before those.
    from agents.events import stream

    try:
        stream.dead_letter_message(raw, place, reason)
    except exceptions.RedisError as error:
        logger.warning("It could not be kept (%s)", type(error).__name__)


class QoS(redis.QoS):
    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Give a message back that no worker has done; set aside what is none."""
        with self.channel.conn_or_acquire(client) as client:
            raw = client.hget(self.unacked_key, tag)
            try:
                if raw is not None:
                    messages.unacknowledged(raw)
                super().restore_by_tag(tag, client, leftmost)
            except messages.Unusable as error:
                self._remove_from_indices(tag).execute()
                set_aside(raw, self.unacked_key, str(error))
            except exceptions.ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                self._remove_from_indices(tag).execute()
                set_aside(raw, self.unacked_key, "it was sent to what is no queue")


class Channel(redis.Channel):
    QoS = QoS
    _kept: Any = None
    connection_class: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raises `ConnectionError` where Redis takes nothing, being full, a replica or unable to
        save: a worker then waits longer and longer, as for one that is away."""
        self.connection_class = server().connection_class
        super().__init__(*args, **kwargs)
        try:
            self.client.set("_kombu.probe", b"", px=1)
        except exceptions.ResponseError as error:
            self.close()
            raise exceptions.ConnectionError(f"Redis refuses to write: {error}") from error

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:  # subscribes or blocks on a connection of its own
            return super()._create_client(asynchronous=True)
        if self._kept is None or self._kept.connection_pool is not self.pool:
            self._kept = super()._create_client()
        return self._kept

    def _brpop_read(self, **options: Any) -> bool:
        """Take what the queues have, as kombu does; nothing that stands there raises but `Empty`."""
        try:
            try:
                found = self.client.parse_response(self.client.connection, "BRPOP", **options)
            except self.connection_errors:
                # The next turn connects again.
                self.client.connection.disconnect()
                raise
            if not found:
                raise Empty
            key, raw = found
            queue = bytes_to_str(key).rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            if not self._handed_on(raw, queue):
                raise Empty
            return True
        finally:
            self._in_poll: Any = None
            self._flush_brpop_reauth()

    def _handed_on(self, raw: bytes, queue: str) -> bool:
        message: dict[str, Any] = {}
        try:
            message = self._checked(raw, queue)
            self.connection._deliver(message, queue)
        except NO_MESSAGE as error:
            reason = str(error) if isinstance(error, messages.Unusable) else type(error).__name__
            set_aside(raw, queue, reason)
            if message:
                # It may count as taken already.
                with suppress(LookupError):
                    self.basic_reject(message["properties"]["delivery_tag"])
            return False
        return True

    def _checked(self, raw: bytes, queue: str) -> dict[str, Any]:
        if queue == settings.CELERY_TASK_DEFAULT_QUEUE:
            return messages.task(raw)
        return messages.message(raw)

    def get_table(self, exchange: str) -> list[tuple[str, ...]]:
        """Of what stands in Redis the queues that are bound to an exchange, and nothing else."""
        found = super().get_table(exchange)
        return [each for each in found if len(each) == BINDING_PARTS]

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        with self.conn_or_acquire() as client:
            for priority in self.priority_steps:
                while raw := client.rpop(self._q_for_pri(queue, priority)):
                    try:
                        return self._checked(raw, queue)
                    except messages.Unusable as error:
                        set_aside(raw, queue, str(error))
        raise Empty

    def _handle_message(self, client: Any, response: Any) -> dict[str, Any]:
        """Empty what came over a channel and is no command, or no event of another worker: kombu skips
        that. It was meant for all workers, so it is logged and kept nowhere."""
        told: dict[str, Any] = super()._handle_message(client, response)
        if told["data"] and bytes_to_str(told["type"]).endswith("message"):
            channel = bytes_to_str(told["channel"])
            is_command = ".pidbox" in channel
            try:
                (messages.command if is_command else messages.message)(told["data"])
            except messages.Unusable as error:
                kind = "command" if is_command else "message"
                logger.warning("What came over %s is no %s: %s", channel, kind, error)
                told["data"] = b""
        return told

    def _deliver_fanout_message(self, message: dict[str, Any], exchange: str) -> bool:
        try:
            return bool(super()._deliver_fanout_message(message, exchange))
        except NO_MESSAGE as error:
            logger.warning("A command could not be used (%s)", type(error).__name__)
            return False

    def _connparams(self, asynchronous: bool = False) -> Any:
        # When Redis dies at a bad moment, a channel is closed after its connection. What it has not
        # acknowledged it would give back, by an AttributeError that ends the worker.
        if getattr(self.connection, "client", None) is None:
            raise exceptions.ConnectionError("The connection to Redis is closed.")
        connection = super()._connparams(asynchronous)
        if server().path:
            for name in OF_TCP:
                connection.pop(name, None)
        return {**connection, **server().parameters()}


class Transport(redis.Transport):
    Channel = Channel
    can_parse_url = True  # nothing of the URL is for kombu

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        return str(server())
