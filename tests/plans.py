from typing import Any

from django.db import connection


def explain(query: Any) -> str:
    """The plan of a query."""
    if connection.vendor == "postgresql":
        # The tables of a test are small enough for any plan to do; the question is what can be used.
        with connection.cursor() as cursor:
            for plan in ("seqscan", "bitmapscan", "sort"):
                cursor.execute(f"SET LOCAL enable_{plan} = off")
    return str(query.explain())
