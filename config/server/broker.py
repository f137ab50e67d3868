"""kombu's Redis transport with the connections of lib.redis, which survives the loss of Redis.

- Address and verification come from the settings alone: kombu turns TLS on by the name of a transport.
- A channel has one client. kombu makes one for every message and every acknowledgement, for each of
  which redis-py fills a table of some hundred callbacks: a tenth of a worker's time.
- An invalid entry of the queue becomes a dead letter; it would end the worker.

It can go when kombu rejects invalid messages (celery/celery#4308, celery/kombu#2421), reuses a client
and takes its connections from the application; none of this is in kombu 5.7.
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

# Parameters of kombu that a Unix socket does not take.
OF_TCP = ("host", "port", "socket_connect_timeout", "socket_keepalive", "socket_keepalive_options")


# Routing key, pattern and queue.
BINDING_PARTS = 3

# The errors of Celery and kombu for an invalid message. Those for a lost connection are others.
INVALID_MESSAGE = (
    messages.InvalidMessage,
    SerializationError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


def dead_letter(raw: bytes, source: str, reason: str) -> None:
    """Add an invalid message to the dead letters, and log it in one line."""
    # Late: this module is loaded before the apps.
    from agents.events import stream

    try:
        stream.dead_letter_message(raw, source, reason)
    except exceptions.RedisError as error:
        logger.warning("Invalid message was not kept: %s", type(error).__name__)


class QoS(redis.QoS):
    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Requeue a message that was not acknowledged; dead-letter an invalid one."""
        with self.channel.conn_or_acquire(client) as client:
            raw = client.hget(self.unacked_key, tag)
            try:
                if raw is not None:
                    messages.unacknowledged(raw)
                super().restore_by_tag(tag, client, leftmost)
            except messages.InvalidMessage as error:
                self._remove_from_indices(tag).execute()
                dead_letter(raw, self.unacked_key, str(error))
            except exceptions.ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                self._remove_from_indices(tag).execute()
                dead_letter(raw, self.unacked_key, "its destination is not a queue")


class Channel(redis.Channel):
    QoS = QoS
    _shared: Any = None
    connection_class: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raise `ConnectionError` if Redis refuses writes because it is full, a replica or unable to
        save: a worker then backs off, as for an unavailable one."""
        self.connection_class = server().connection_class
        super().__init__(*args, **kwargs)
        try:
            self.client.set("_kombu.probe", b"", px=1)
        except exceptions.ResponseError as error:
            self.close()
            raise exceptions.ConnectionError(f"Redis refuses to write: {error}") from error

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:  # it subscribes or blocks on its own connection
            return super()._create_client(asynchronous=True)
        if self._shared is None or self._shared.connection_pool is not self.pool:
            self._shared = super()._create_client()
        return self._shared

    def _brpop_read(self, **options: Any) -> bool:
        """Take a message from the queues as kombu does; an invalid one raises only `Empty`."""
        try:
            try:
                entry = self.client.parse_response(self.client.connection, "BRPOP", **options)
            except self.connection_errors:
                # The next turn connects again.
                self.client.connection.disconnect()
                raise
            if not entry:
                raise Empty
            key, raw = entry
            queue = bytes_to_str(key).rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            if not self._try_deliver(raw, queue):
                raise Empty
            return True
        finally:
            self._in_poll: Any = None
            self._flush_brpop_reauth()

    def _try_deliver(self, raw: bytes, queue: str) -> bool:
        message: dict[str, Any] = {}
        try:
            message = self._checked(raw, queue)
            self.connection._deliver(message, queue)
        except INVALID_MESSAGE as error:
            reason = (
                str(error) if isinstance(error, messages.InvalidMessage) else type(error).__name__
            )
            dead_letter(raw, queue, reason)
            if message:
                # It may count as delivered already.
                with suppress(LookupError):
                    self.basic_reject(message["properties"]["delivery_tag"])
            return False
        return True

    def _checked(self, raw: bytes, queue: str) -> dict[str, Any]:
        if queue == settings.CELERY_TASK_DEFAULT_QUEUE:
            return messages.task(raw)
        return messages.message(raw)

    def get_table(self, exchange: str) -> list[tuple[str, ...]]:
        """Return the queues that are bound to an exchange; skip invalid entries."""
        bindings = super().get_table(exchange)
        return [binding for binding in bindings if len(binding) == BINDING_PARTS]

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        with self.conn_or_acquire() as client:
            for priority in self.priority_steps:
                while raw := client.rpop(self._q_for_pri(queue, priority)):
                    try:
                        return self._checked(raw, queue)
                    except messages.InvalidMessage as error:
                        dead_letter(raw, queue, str(error))
        raise Empty

    def _handle_message(self, client: Any, response: Any) -> dict[str, Any]:
        """Empty an invalid command, or event of another worker, so that kombu skips it. All workers
        receive it, so it is logged and not kept."""
        received: dict[str, Any] = super()._handle_message(client, response)
        if received["data"] and bytes_to_str(received["type"]).endswith("message"):
            channel = bytes_to_str(received["channel"])
            is_command = ".pidbox" in channel
            try:
                (messages.command if is_command else messages.message)(received["data"])
            except messages.InvalidMessage as error:
                kind = "command" if is_command else "message"
                logger.warning("Invalid %s on %s: %s", kind, channel, error)
                received["data"] = b""
        return received

    def _deliver_fanout_message(self, message: dict[str, Any], exchange: str) -> bool:
        try:
            return bool(super()._deliver_fanout_message(message, exchange))
        except INVALID_MESSAGE as error:
            logger.warning("Invalid command ignored: %s", type(error).__name__)
            return False

    def _connparams(self, asynchronous: bool = False) -> Any:
        # If Redis dies at a bad moment, a channel is closed after its connection. It would requeue its
        # unacknowledged messages, and an AttributeError would end the worker.
        if getattr(self.connection, "client", None) is None:
            raise exceptions.ConnectionError("The connection to Redis is closed.")
        connection = super()._connparams(asynchronous)
        if server().path:
            for name in OF_TCP:
                connection.pop(name, None)
        return {**connection, **server().parameters()}


class Transport(redis.Transport):
    Channel = Channel
    can_parse_url = True  # kombu needs nothing of the URL

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        return str(server())
