from django.db import InterfaceError, InternalError, OperationalError, connection

# What passes: the database is away, or this connection to it is. PostgreSQL calls a transaction that
# it has ended, because nobody went on with it, an internal error.
AWAY = (OperationalError, InterfaceError, InternalError)


def give_back() -> None:
    """Return this thread's connection to its pool, where it has one, before a long wait."""
    if not connection.in_atomic_block:
        connection.close_if_unusable_or_obsolete()
