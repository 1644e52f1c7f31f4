"""What can go wrong with a request, with the codes of gRPC, which TensorFlow and its servers share."""

from __future__ import annotations

from enum import IntEnum

# Bounds what a message may repeat of a request.
_MAX_MESSAGE = 1024


class Code(IntEnum):
    """Codes of gRPC and of TensorFlow's errors."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


# As TF Serving answers over HTTP; what is not here is 500.
HTTP_STATUS = {
    Code.OK: 200,
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.UNAUTHENTICATED: 401,
}


class ServingError(Exception):
    """A request that cannot be answered.

    Args:
        code: what kind of error it is.
        message: one sentence for who sent the request.
    """

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message[:_MAX_MESSAGE])
        self.code = code

    @property
    def http_status(self) -> int:
        """The status that TF Serving's REST API has for the code."""
        return HTTP_STATUS.get(self.code, 500)


def invalid(message: str) -> ServingError:
    """An error of the request itself."""
    return ServingError(Code.INVALID_ARGUMENT, message)
