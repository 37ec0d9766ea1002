"""Failures as OpenAI clients know them: an HTTP status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import grpc
from google.rpc import error_details_pb2

from shared import rpc

_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 412,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_TYPE = {
    401: "authentication_error",
    403: "permission_error",
    412: "server_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
# OpenAI's own codes where it has one; else the gRPC code in lower case
_CODE = {400: "invalid_value", 404: "model_not_found", 429: "rate_limit_exceeded"}
_RETRY_SAFE = {409, 429, 503, 504}


@dataclass
class OpenAIError(Exception):
    """A failure to answer with. `param` is the request's field at fault, `code` a word for programs."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def bad_request(param: str | None, message: str, code: str = "invalid_value") -> OpenAIError:
    """400 naming the field at fault."""
    return OpenAIError(400, message, param=param, code=code)


def from_rpc(error: rpc.RpcError, field_names: Mapping[str, str] = MappingProxyType({})) -> OpenAIError:
    """The same failure over HTTP.

    field_names: the request's names for fields of GenerateRequest, where they differ; the more specific first.
    """
    status = _STATUS.get(error.code, 500)
    param, message = error.field, error.message
    if param is not None:
        param = _rename(param, field_names)
        message = "; ".join(
            f"{_rename(violation.field, field_names)}: {violation.description}"
            for detail in error.details
            if isinstance(detail, error_details_pb2.BadRequest)
            for violation in detail.field_violations
        )
    elif status == 404:
        param = "model"
    # the official clients retry every 5xx unless this header of theirs tells them what is retry-safe
    headers = {"x-should-retry": "true" if status in _RETRY_SAFE else "false"}
    if (seconds := error.retry_after_s) is not None:
        headers["retry-after"] = str(max(1, math.ceil(seconds)))
        headers["retry-after-ms"] = str(math.ceil(seconds * 1000))
    return OpenAIError(
        status,
        message,
        type=_TYPE.get(status, "invalid_request_error" if status < 500 else "server_error"),
        param=param,
        code=_CODE.get(status, error.code.name.lower()),
        headers=headers,
    )


def _rename(field: str, field_names: Mapping[str, str]) -> str:
    """`sampling.` has no counterpart in OpenAI's flat requests; indices and what follows them stay."""
    field = field.removeprefix("sampling.")
    for ours, theirs in field_names.items():
        if field == ours or field.startswith((f"{ours}.", f"{ours}[")):
            return theirs + field[len(ours) :]
    return field
