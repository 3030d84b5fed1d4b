"""Everything a client can get wrong, in the shape OpenAI's clients understand."""

from __future__ import annotations

from typing import Any


class ApiError(ValueError):
    """A refused request: HTTP status, OpenAI's ``type``/``code``, and the field to blame."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param

    @property
    def kind(self) -> str:
        """OpenAI's coarse error class for this status."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        """The JSON that goes over the wire."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }
