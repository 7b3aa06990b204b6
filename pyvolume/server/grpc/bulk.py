"""Many messages of a response stream, sent without a change of threads for each of them.

Must not import the handlers. The library sends a message, has its handler's thread wait, and wakes it from the thread
that polls for what has gone out: tens of microseconds each. Here that polling thread sends the next message of a batch
itself, and tells the core that it may keep all but the last of a batch for one write. The messages are the same.

Reaches into what grpcio keeps to itself (`grpc._server`, docs/decisions/0120-batches-of-messages.md). Where a release
has it no more, SUPPORTED is false and messages go out one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Final

import grpc

log = logging.getLogger(__name__)

SUPPORTED: bool
try:
    from grpc import _server
    from grpc._cython import cygrpc

    _Context: Any = _server._Context
    _is_active: Any = _server._is_rpc_state_active
    _finish: Any = _server._possibly_finish_call
    _initial_metadata: Any = _server._get_initial_metadata_operation
    _Send: Any = cygrpc.SendMessageOperation
    _MAY_WAIT: Any = cygrpc.WriteFlag.buffer_hint
    SUPPORTED = True
except (ImportError, AttributeError):  # pragma: no cover - another release of grpcio
    SUPPORTED = False

_BATCH: Final = "pyvolume: a batch"
_AT_ONCE: Final = 0
_NOT_ENDED: Final[tuple[None, tuple[()]]] = (None, ())


class _Sender:
    """Sends the batches of one call. All methods but `_sent` are for the handler's thread."""

    def __init__(self, context: Any) -> None:
        self._state = context._state
        self._call = context._rpc_event.call
        self._messages: Sequence[bytes] = ()
        self._next = 0
        self._failed = False

    def send(self, messages: Sequence[bytes]) -> None:
        """Waits until the batch before has gone out, then begins with this one. Does nothing once the call has ended.

        Raises RuntimeError when a message of the batch before could not be given to the library.
        """
        state = self._state
        with state.condition:
            if not self._wait() or not messages:
                return
            self._messages, self._next = messages, 0
            self._start((_initial_metadata(state, None),) if state.initial_metadata_allowed else ())
            state.initial_metadata_allowed = False
            state.due.add(_BATCH)

    def flush(self) -> None:
        """Waits until all has gone out or the call has ended. Raises RuntimeError as `send` does."""
        with self._state.condition:
            self._wait()

    def abandon(self) -> None:
        """Sends no more than what the library has been given. Does not wait."""
        with self._state.condition:
            self._messages, self._next = (), 0

    def _wait(self) -> bool:
        state = self._state
        while _BATCH in state.due:
            state.condition.wait()
        if self._failed:
            raise RuntimeError("grpcio did not take a message")
        return bool(_is_active(state))

    def _start(self, headers: tuple[Any, ...] = ()) -> None:
        """Gives the next message to the library. The state's condition is held."""
        at = self._next
        self._next = at + 1
        # the core does not send headers either before what comes with them goes out
        flags = _MAY_WAIT if self._next < len(self._messages) and not headers else _AT_ONCE
        if self._call.start_server_batch((*headers, _Send(self._messages[at], flags)), self._sent):
            raise RuntimeError("grpcio refuses a message")

    def _sent(self, event: Any) -> Any:
        """A message has gone out, or will not: called by the library's polling thread, which an exception would end."""
        state = self._state
        with state.condition:
            if self._next < len(self._messages) and event.success and _is_active(state):
                try:
                    self._start()
                    return _NOT_ENDED
                except Exception:
                    log.exception("a message of a batch is lost")
                    self._failed = True
            state.condition.notify_all()
            return _finish(state, _BATCH)


def spread(context: grpc.ServicerContext, made: Iterator[Any]) -> Iterator[Any]:
    """What a handler makes, for the library to send: messages. Lists of serialised messages are sent on the way.

    A list is on its way when the handler goes on with the next; an empty one waits for those before it.
    """
    if not (SUPPORTED and isinstance(context, _Context)):
        for item in made:
            if type(item) is list:
                yield from item
            else:
                yield item
        return
    sender: _Sender | None = None
    try:
        try:
            for item in made:
                if type(item) is list:
                    if sender is None:
                        sender = _Sender(context)
                    sender.send(item)
                    continue
                if sender is not None:
                    sender.flush()
                yield item
        except Exception:
            if sender is not None:
                sender.flush()  # what was made before goes out before the failure is told
            raise
        if sender is not None:
            sender.flush()
    finally:
        if sender is not None:
            sender.abandon()
