from django.db import connection


def give_back() -> None:
    """Return this thread's connection to its pool, where it has one, before a long wait."""
    if not connection.in_atomic_block:
        connection.close_if_unusable_or_obsolete()
