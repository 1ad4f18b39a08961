"""What a client is told when its request cannot be met."""

from typing import Any


class Refusal(Exception):
    """A request that is answered with an error object.

    Attributes:
        message: one sentence: what is wrong and what to do.
        status: the HTTP status.
        param: the field at fault, where there is one.
        code: OpenAI's error code, where it has one that programs look for.
        retry_after: seconds to wait before trying again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message, self.status = message, status
        self.param, self.code, self.retry_after = param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer: when to try again, where that is known."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def openai(self) -> dict[str, Any]:
        """The error object of OpenAI's APIs."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic(self) -> dict[str, Any]:
        """The error object of Anthropic's API."""
        kind = _ANTHROPIC.get(self.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    503: "overloaded_error",
}


def failed() -> Refusal:
    """What is said of an error that is ours; the log has the rest."""
    return Refusal("The server could not finish this answer; its log says why.", status=500)
