"""Errors that only HTTP has: each is a BadRequest with its own status."""

from __future__ import annotations

from tinkerbell_core.errors import BadRequest


class HttpError(BadRequest):
    """A BadRequest with an HTTP status other than 422, such as 408 or 415. Clients raise it as BadRequest."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.http_status = status

    @property
    def kind(self) -> str:
        return "BadRequest"
