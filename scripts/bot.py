"""The bot runner of the local stack. Where the homeserver is the stack's own, it sees to the accounts
first, so that there is one to log in to; then it turns into `manage.py runbot`.
"""

import os
import sys
from pathlib import Path

import homeserver


def main() -> None:
    if os.environ["STACK_HOMESERVER"] == "true":
        try:
            homeserver.make_accounts(Path(os.environ["STACK_DIR"]) / "homeserver")
        except (homeserver.CallFailed, OSError) as error:
            sys.exit(f"The accounts of the homeserver could not be made: {error}")
    os.execv(sys.executable, [sys.executable, "manage.py", "runbot"])  # noqa: S606


if __name__ == "__main__":
    main()
