"""A real server on this machine that fails on demand."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from email.message import Message
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """One received request."""

    path: str
    body: Mapping[str, Any]
    headers: Message
    at: float


class Trouble(NamedTuple):
    """An error instead of a reply: an HTTP status, or a dropped connection if it is 0."""

    status: int
    headers: Mapping[str, str] = {"retry-after-ms": "10"}
    error: Mapping[str, Any] | None = None


class Served:
    """The requests received, and the errors to come.

    Attributes:
        asked: requests in order of arrival.
        troubles: errors for the next requests, in order; None is a reply.
        trouble_of: function from a request's body to its error, or to None.
        slow_s: function from a request's body to the duration of its reply.
        raw_of: function from a request's body to the bytes of a reply, headers included, which are
            sent piece by piece; or to None.
        most_at_once: most concurrent requests.
    """

    def __init__(self, reply: Callable[[str, Mapping[str, Any]], Mapping[str, Any]]) -> None:
        self.reply = reply
        self.asked: list[Asked] = []
        self.troubles: list[Trouble | None] = []
        self.trouble_of: Callable[[Mapping[str, Any]], Trouble | None] = lambda body: None
        self.slow_s: Callable[[Mapping[str, Any]], float] = lambda body: 0.0
        self.raw_of: Callable[[Mapping[str, Any]], Iterable[bytes] | None] = lambda body: None
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self.base_url = ""

    def handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self._lock:
            self.asked.append(Asked(handler.path, body, handler.headers, time.monotonic()))
            trouble = self.troubles.pop(0) if self.troubles else None
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            trouble = trouble or self.trouble_of(body)
            time.sleep(self.slow_s(body))
        finally:
            with self._lock:
                self._at_once -= 1
        if (raw := self.raw_of(body)) is not None:
            handler.close_connection = True
            with contextlib.suppress(OSError):  # the client left
                for piece in raw:
                    handler.wfile.write(piece)
                    handler.wfile.flush()
        elif trouble is None:
            self.send(handler, 200, {}, self.reply(handler.path, body))
        elif trouble.status == 0:
            handler.close_connection = True
        else:
            content = {"error": trouble.error or {"message": "trouble"}}
            self.send(handler, trouble.status, trouble.headers, content)

    @staticmethod
    def send(
        handler: http.server.BaseHTTPRequestHandler,
        status: int,
        headers: Mapping[str, str],
        content: Any,
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {**headers, "content-type": "application/json"}.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


def said(text: str, ids: Sequence[int] | None = None, finish: str = "stop") -> dict[str, Any]:
    """Return a reply in the format of both kinds of completion."""
    choice: dict[str, Any] = {
        "index": 0,
        "text": text,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
    }
    if ids is not None:
        choice["token_ids"] = list(ids)
    return {"id": "1", "object": "completion", "created": 0, "model": "m", "choices": [choice]}


@contextlib.contextmanager
def serving(reply: Callable[[str, Mapping[str, Any]], Mapping[str, Any]]) -> Iterator[Served]:
    """Run a server whose replies are `reply(path, body)`."""
    served = Served(reply)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet: a second one would wait for an answer

        def do_POST(self) -> None:
            served.handle(self)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        served.base_url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
