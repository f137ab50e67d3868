"""kombu's Redis transport, with one client for each channel.

kombu makes a client for every message that it takes and for every acknowledgement. redis-py fills a
table of some hundred callbacks for each, which cost a tenth of a worker's time.
"""

from typing import Any

from kombu.transport import redis


class Channel(redis.Channel):
    _kept: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:  # subscribes or blocks on a connection of its own
            return super()._create_client(asynchronous=True)
        if self._kept is None or self._kept.connection_pool is not self.pool:
            self._kept = super()._create_client()
        return self._kept


class Transport(redis.Transport):
    Channel = Channel
