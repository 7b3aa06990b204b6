"""What is decided when the head of a request has arrived, before a byte of its body is read (contract http.md 1, 5.4).

Runs on the loop thread of the HTTP server: nothing here blocks. Uploads are counted and wait for their turn here,
refusals that need no body are given here, and requests that will wait for other servers get one of a bounded number of
slots. May import ops; must not import http_app.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyvolume._native import http as native
from pyvolume.ops import write
from pyvolume.ops.context import Ops
from pyvolume.ops.gourl import redirect_for
from pyvolume.ops.message import Query, Request, Response, Unanswered, empty, json_error
from pyvolume.ops.throttle import ByteGate, Slots, Waiter
from pyvolume.server.waitress_ext import Hold, Refusal, RequestHead

if TYPE_CHECKING:
    from pyvolume.server.waitress_ext import VolumeHTTPServer

log = logging.getLogger(__name__)

URL_KEY = "pyvolume.url"
"""environ key of the parsed path."""
REDIRECT_KEY = "pyvolume.redirect"
"""environ key of the cleaned path that an unclean one is redirected to, or None."""
ADMITTED_KEY = "pyvolume.admitted"
"""environ key: the download limit was looked at already."""
EARLY_CHECK_BYTES = 64 << 10
"""Bodies from this size on are not asked for when the head alone suffices for a refusal."""
FORM_OVERHEAD_BYTES = 1 << 20
"""Of a multipart body besides its file: heads of parts, and fields before the file."""
SLOT_WAIT_S = 60.0

Finish = Callable[[Request, Response], Refusal]
"""Adds the common headers to an early answer, and counts the request."""


class Ticket:
    """The bytes of one upload in flight; given back once, when the request is over."""

    __slots__ = ("_gate_remove", "_open", "count")

    def __init__(self, remove: Callable[[int], None], count: int) -> None:
        self._gate_remove = remove
        self._open = True
        self.count = count

    def release(self) -> None:
        if self._open:
            self._open = False
            self._gate_remove(self.count)


class AdminAdmission:
    """Admission of the admin port. `bind` it to its server before the first request."""

    def __init__(
        self,
        ops: Ops,
        slots: Slots,
        tier_slots: Slots,
        picture_slots: Slots,
        is_page: Callable[[bytes], bool],
        finish: Finish,
    ) -> None:
        self._ops = ops
        self.slots = slots
        self.tier_slots = tier_slots
        self.picture_slots = picture_slots
        self._is_page = is_page
        self._finish = finish
        self._server: VolumeHTTPServer | None = None

    def bind(self, server: VolumeHTTPServer) -> None:
        self._server = server

    def on_head(self, head: RequestHead) -> Refusal | Hold | None:
        """Loop thread. None: go on at once."""
        try:
            url = native.parse_url(head.path)
        except native.BadEscape:
            head.read_body = False
            return None
        head.environ[URL_KEY] = url
        method = head.method
        target = redirect_for(head.path, url.path, url.unclean) if method != b"CONNECT" else None
        head.environ[REDIRECT_KEY] = target
        if target is not None or self._is_page(head.path):
            head.read_body = False
            return None
        if method in (b"POST", b"PUT"):
            return self._upload(head, url)
        if head.has_body:
            head.read_body = _is_multipart(head)
            head.keep_bytes = write.MAX_FORM_BYTES
        if method in (b"GET", b"HEAD"):
            return self._download(head, url)
        if method == b"DELETE":
            if self._is_tiered(url):  # its cookie is there, too
                return self._with_slot(head, url, None, self.tier_slots)
            if self._asks_elsewhere(head, url):
                return self._with_slot(head, url, None)
        return None

    # -- uploads --------------------------------------------------------------------------------------------------

    def _upload(self, head: RequestHead, url: native.UrlPath) -> Refusal | Hold | None:
        ops = self._ops
        _limit_body(ops, head)
        exempt = b"type=replicate" in head.query and Query(head.query).get(b"type") == b"replicate"
        count = head.content_length or 0
        if ops.uploads.limit_bytes and not exempt:
            ops.events.uploads_seen(ops.uploads.in_flight)
        if ops.uploads.enter(count, exempt=exempt):
            return self._counted(head, url, count, None)
        ops.events.handler("uploadLimitCondition")
        hold = Hold()

        def go_on() -> None:
            verdict = self._counted(head, url, count, hold)
            if isinstance(verdict, Refusal):
                hold.refuse(verdict)
            elif verdict is None:
                hold.admit()

        def refusal_text(in_flight: int) -> str:
            return f"reject because inflight upload data {in_flight} > {ops.uploads.limit_bytes}, and wait timeout"

        self._wait_in(ops.uploads, head, url, hold, count, go_on, refusal_text)
        return hold

    def _counted(self, head: RequestHead, url: native.UrlPath, count: int, hold: Hold | None) -> Refusal | Hold | None:
        """The upload is counted in: gives it a ticket, and refuses it where its body need not be seen for that."""
        ops = self._ops
        ticket = Ticket(ops.uploads.remove, count)
        head.on_end.append(ticket.release)
        if head.chunked:

            def arrived(size: int) -> None:
                ops.uploads.add(size)
                ticket.count += size

            head.on_body = arrived
        if head.expect_continue or head.chunked or count >= EARLY_CHECK_BYTES:
            request = _request_of(head, url)
            try:
                response = write.refuse_early(ops, request)
            except Unanswered:
                head.read_body = False
                return None
            if response is not None:
                return self._finish(request, response)
        return self._with_slot(head, url, hold) if self._asks_elsewhere(head, url) else None

    # -- downloads ------------------------------------------------------------------------------------------------

    def _download(self, head: RequestHead, url: native.UrlPath) -> Hold | None:
        """Lets a read in, or holds it while too many bytes are on their way out. Who may go to a replica instead is
        left to the worker, as is a read that is answered without the volume."""
        ops = self._ops
        ops.events.downloads_seen(ops.downloads.in_flight)
        if not ops.downloads.over_limit():
            head.environ[ADMITTED_KEY] = True
            try:
                vid = native.parse_vid(url.vid)
            except native.IdError:
                return None
            volume = ops.store.find_volume(vid)
            if volume is not None:
                if volume.is_remote:
                    return self._with_slot(head, url, None, self.tier_slots)
                return self._with_slot(head, url, None, self.picture_slots) if _asks_for_picture(head) else None
            if ops.config.read_mode == "proxy" or ops.store.ec.find(vid) is not None:
                return self._with_slot(head, url, None)
            return None
        if Query(head.query).get(b"proxied") != b"true":
            try:
                volume = ops.store.find_volume(native.parse_vid(url.vid))
            except native.IdError:
                return None
            if volume is not None and volume.replica_placement.copy_count > 1:
                return self._with_slot(head, url, None)
        ops.events.handler("downloadLimitCondition")
        head.environ[ADMITTED_KEY] = True
        hold = Hold()
        path = url.path.decode("utf-8", "surrogateescape")

        def refusal_text(in_flight: int) -> str:
            limit = ops.downloads.limit_bytes
            return f"request {path} because inflight download data {in_flight} > {limit}, and wait timeout"

        self._wait_in(ops.downloads, head, url, hold, 0, hold.admit, refusal_text)
        return hold

    # -- waiting for a gate ---------------------------------------------------------------------------------------

    def _wait_in(
        self,
        gate: ByteGate,
        head: RequestHead,
        url: native.UrlPath,
        hold: Hold,
        count: int,
        go_on: Callable[[], None],
        refusal_text: Callable[[int], str],
    ) -> None:
        """Queues a held request; `go_on` runs on the loop once it is counted in, else it is refused after the gate's
        time-out."""
        server = self._server
        assert server is not None
        over: list[bool] = []  # becomes true when the request has ended, that is, when the connection was lost

        def on_loop() -> None:
            if over or hold.gone:
                gate.remove(count)
                self._client_left(head, url, hold)
            else:
                go_on()

        def ended() -> None:
            over.append(True)
            gate.leave(waiter)

        def turn_came() -> None:
            if not server.call_soon(on_loop):
                gate.remove(count)

        def time_is_up() -> None:
            if not gate.leave(waiter):
                return
            if hold.gone:
                self._client_left(head, url, hold)
                return
            text = refusal_text(gate.in_flight)
            log.info("too many requests: %s", text)
            hold.refuse(self._refusal(head, url, lambda request: json_error(request, 429, text)))

        waiter = Waiter(count, turn_came)
        head.on_end.append(ended)
        if gate.queue(waiter):
            server.call_soon(on_loop)
        else:
            server.call_later(gate.timeout_s, time_is_up)

    def _client_left(self, head: RequestHead, url: native.UrlPath, hold: Hold) -> None:
        """Half-closed while it waited: what upstream answers when the request was cancelled."""
        if head.method in (b"POST", b"PUT"):
            hold.refuse(self._refusal(head, url, lambda request: json_error(request, 499, "context canceled")))
        else:
            hold.refuse(self._refusal(head, url, lambda _: empty(499)))

    def _refusal(self, head: RequestHead, url: native.UrlPath, answer: Callable[[Request], Response]) -> Refusal:
        request = _request_of(head, url)
        return self._finish(request, answer(request))

    # -- requests that wait for other servers ---------------------------------------------------------------------

    def _asks_elsewhere(self, head: RequestHead, url: native.UrlPath) -> bool:
        """Whether a write or delete will mean waiting for another server, as far as the head tells."""
        if b"type=replicate" in head.query:
            return False
        try:
            vid = native.parse_vid(url.vid)
        except native.IdError:
            return False
        volume = self._ops.store.find_volume(vid)
        if volume is None:
            return head.method != b"DELETE" or self._ops.store.ec.find(vid) is not None
        return volume.replica_placement.copy_count > 1

    def _is_tiered(self, url: native.UrlPath) -> bool:
        try:
            volume = self._ops.store.find_volume(native.parse_vid(url.vid))
        except native.IdError:
            return False
        return volume is not None and volume.is_remote

    def _with_slot(
        self, head: RequestHead, url: native.UrlPath, hold: Hold | None, slots: Slots | None = None
    ) -> Hold | None:
        """None: it has a slot. Else the request is held (in `hold`, where it is held already) until it gets one."""
        slots = slots if slots is not None else self.slots
        server = self._server
        assert server is not None
        waiting = hold if hold is not None else Hold()
        over: list[bool] = []

        def got_one() -> None:
            if over:
                slots.give()
                return
            head.on_end.append(slots.give)
            waiting.admit()

        def ended() -> None:
            over.append(True)
            slots.leave(waiter)

        def turn_came() -> None:
            if not server.call_soon(got_one):
                slots.give()

        waiter = Waiter(1, turn_came)
        if slots.take(waiter):
            head.on_end.append(slots.give)
            return None

        def give_up() -> None:
            if slots.leave(waiter):
                others = {id(self.tier_slots): "remote stores", id(self.picture_slots): "pictures"}
                text = f"{slots.limit} requests wait for {others.get(id(slots), 'other servers')} already"
                waiting.refuse(self._refusal(head, url, lambda request: json_error(request, 500, text)))

        head.on_end.append(ended)
        server.call_later(SLOT_WAIT_S, give_up)
        return waiting


class PublicAdmission:
    """Admission of the public port: no body is of use there."""

    def __init__(self, admin: AdminAdmission) -> None:
        self._admin = admin

    def bind(self, server: VolumeHTTPServer) -> None:
        self._admin.bind(server)

    def on_head(self, head: RequestHead) -> Refusal | Hold | None:
        if head.method in (b"GET", b"HEAD"):
            return self._admin.on_head(head)
        head.read_body = False
        return None


def _asks_for_picture(head: RequestHead) -> bool:
    """Whether the query may ask for a picture to be cut or resized, which few workers do at a time."""
    query = head.query
    return bool(query) and (b"width" in query or b"height" in query or b"crop_" in query)


def _is_multipart(head: RequestHead) -> bool:
    return (head.get(b"content-type") or b"").lower().startswith(b"multipart/form-data")


def _limit_body(ops: Ops, head: RequestHead) -> None:
    """No more of a body is kept than what it takes to see that it is too large."""
    content_type = (head.get(b"content-type") or b"").lower()
    limit = ops.config.file_size_limit_bytes
    if b"form-data" in content_type:
        head.keep_bytes = 2 * limit + FORM_OVERHEAD_BYTES
    elif b"urlencoded" in content_type:
        head.keep_bytes = max(limit, write.MAX_FORM_BYTES) + 1
    else:
        head.keep_bytes = limit + 1


def _request_of(head: RequestHead, url: native.UrlPath) -> Request:
    """What the early checks need to know of a request."""
    return Request(
        method=head.method.decode("latin-1"),
        target_path=head.path,
        raw_query=head.query,
        headers={name.lower(): value for name, value in reversed(head.headers)},
        url=url,
        raw_headers=head.headers,
        peer_ip=head.peer[0],
    )
