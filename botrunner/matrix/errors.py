"""Errors of calls to the homeserver."""


class MatrixError(Exception):
    """The homeserver refused a request or is unreachable. `retry_after`: the seconds it asks for."""

    def __init__(
        self,
        code: str,
        message: str = "",
        *,
        status: int = 0,
        retry_after: float | None = None,
        session: str = "",  # of a call that needs the password as well
    ) -> None:
        super().__init__(f"{code}: {message}" if message else code)
        self.session = session
        self.code = code
        self.status = status
        self.retry_after = retry_after

    @property
    def permanent(self) -> bool:
        """Return whether a retry cannot succeed."""
        return 400 <= self.status < 500 and self.status not in (401, 408, 429)


class MatrixTimeout(MatrixError):
    """The homeserver accepted the request and did not answer in time."""


class TokenRefused(MatrixError):
    """The access token is no longer valid: log in again."""


class AnswerTooLong(MatrixError):
    """The answer is longer than `limit` bytes. The rest was not read; a retry would return it again."""

    @property
    def permanent(self) -> bool:
        return True

    def __init__(self, path: str, status: int, limit: int) -> None:
        message = f"The homeserver's answer to {path} is longer than {limit // 1024**2} MiB."
        super().__init__("TOO_LONG", message, status=status)


class LoginRefused(MatrixError):
    """The name or password is wrong, or the account is closed."""


class KeysOutdated(Exception):
    """The homeserver has later keys of the device than the store."""
