"""kombu's Redis transport, with the connections of lib.redis and one client for each channel, that
outlives the death of Redis.

kombu turns TLS on by the name of a transport, and this one has another: where a connection leads, and
how it is verified, comes from the settings alone, whatever kombu made of the URL.

kombu makes a client for every message that it takes and for every acknowledgement. redis-py fills a
table of some hundred callbacks for each, which cost a tenth of a worker's time.
"""

from typing import Any

from kombu.transport import redis
from redis import exceptions

from lib.redis import server

# Of kombu's parameters those that do not go with a Unix socket, and those that lib.redis has.
OF_TCP = ("host", "port", "socket_connect_timeout", "socket_keepalive", "socket_keepalive_options")


class Channel(redis.Channel):
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
