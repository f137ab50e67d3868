"""The bot runner of the local stack: create its accounts on the stack's own homeserver, then become
`manage.py runbot`.
"""

import os
import sys
from pathlib import Path

import homeserver


def main() -> None:
    if os.environ["STACK_HOMESERVER"] == "true":
        try:
            homeserver.create_accounts(Path(os.environ["STACK_DIR"]) / "homeserver")
        except (homeserver.CallFailed, OSError) as error:
            sys.exit(f"The homeserver's accounts could not be created: {error}")
    os.execv(sys.executable, [sys.executable, "manage.py", "runbot"])  # noqa: S606


if __name__ == "__main__":
    main()
