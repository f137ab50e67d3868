"""The entry point for an ASGI server: all HTTP goes through `config.server.bridge`."""

from config.server.bridge import application

__all__ = ["application"]
