"""The one table from exceptions to gRPC status. Must not import the handlers.

Upstream answers nearly everything with UNKNOWN and the plain text of its error, and its tools act on that: UNKNOWN from
ReadVolumeFileStatus means "does not hold the volume", UNAVAILABLE means "this server is down". So an error raised on
purpose is UNKNOWN with its text, a bug is INTERNAL and never UNKNOWN, and no local failure is UNAVAILABLE.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from pyvolume.errors import PyvolumeError, VolumeClosed
from pyvolume.server.rpc import RpcFailure


class Refusal(PyvolumeError):
    """A failure whose code matters. Everything else should be a plain PyvolumeError."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class CallEnded(PyvolumeError):
    """The client has gone or its deadline is over; a handler that notices stops by raising this."""


@dataclass(frozen=True, slots=True)
class Status:
    """What the client gets. is_bug: nobody meant to raise this, log the stack."""

    code: grpc.StatusCode
    text: str
    is_bug: bool = False


def status_of(exc: BaseException) -> Status:
    """The status for what a handler raised. Never fails."""
    match exc:
        case Refusal() | RpcFailure():  # a remote's failure that nobody wrapped: its code and its text
            return Status(exc.code, exc.details if type(exc) is RpcFailure else _text(exc))
        case CallEnded():
            return Status(grpc.StatusCode.CANCELLED, _text(exc))
        case VolumeClosed():  # departure A4: upstream's process dies of these
            return Status(grpc.StatusCode.FAILED_PRECONDITION, _text(exc))
        case PyvolumeError():
            return Status(grpc.StatusCode.UNKNOWN, _text(exc))
        case _:
            return Status(grpc.StatusCode.INTERNAL, f"internal error: {type(exc).__name__}", is_bug=True)


def _text(exc: BaseException) -> str:
    """str(exc), with bytes that are no UTF-8 (file names) replaced: the wire takes only UTF-8."""
    return str(exc).encode("utf-8", "replace").decode("utf-8")
