"""The yardstick of the WSGI lane: a bare Werkzeug application on stock waitress that answers the same bytes.

It stores nothing: GET answers one fixed body with a needle's headers, PUT and POST read the body and answer a reply
like a write's. `python bare_app.py PORT BODY_BYTES`
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import waitress
from werkzeug.wrappers import Request, Response

HEADERS = {
    "Accept-Ranges": "bytes",
    "Content-Disposition": 'inline; filename="1,0123456789"',
    "Etag": '"c99465aa"',
    "Last-Modified": "Mon, 23 Nov 2026 08:52:28 GMT",
    "X-Amz-Request-Id": "18EAA0962621E28D00000000",
}


def make_app(body_bytes: int) -> Any:
    body = bytes(range(256)) * (body_bytes // 256 + 1)
    body = body[:body_bytes]

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        request = Request(environ)
        if request.method == "GET":
            if request.path == "/healthz":
                response = Response(b"", mimetype="text/plain")
            else:
                response = Response(body, headers=HEADERS, content_type="application/octet-stream")
        else:
            size = len(request.get_data(cache=False))
            reply = b'{"name":"1,0123456789","size":%d,"eTag":"c99465aa","mime":"application/octet-stream"}' % size
            response = Response(reply, status=201, headers={"Etag": '"c99465aa"'}, content_type="application/json")
        return response(environ, start_response)

    return app


if __name__ == "__main__":
    waitress.serve(
        make_app(int(sys.argv[2])),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        threads=16,
        connection_limit=4096,
        asyncore_use_poll=True,
        ident="SeaweedFS Volume 30GB 4.44",
        # as a server that knows its bodies would set it: no temporary files
        inbuf_overflow=64 << 20,
        outbuf_overflow=64 << 20,
    )
