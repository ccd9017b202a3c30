"""A real HTTP server that speaks the OpenAI chat API, well or badly. Not a test file."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[["Handler"], None]


class ChatServer:
    """Answers request N by `faults[N]` if there is one (from 0, by arrival), else with a text that depends on
    the request alone. `bodies` and `headers` are those of all requests so far."""

    def __init__(self, faults: dict[int, Fault]) -> None:
        self.faults = faults
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.most_at_once = self._now = 0
        self.lock = threading.Lock()
        self.release = threading.Event()  # lets requests go that hang
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"chat": self}))
        server.daemon_threads = True
        self._server = server

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def note(self, handler: Handler, body: dict[str, Any]) -> int:
        with self.lock:
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            return len(self.bodies) - 1

    def busy(self, change: int) -> None:
        with self.lock:
            self._now += change
            self.most_at_once = max(self.most_at_once, self._now)

    def texts(self) -> list[str]:
        """Each request as one string."""
        return [json.dumps(body, sort_keys=True) for body in self.bodies]

    @contextmanager
    def running(self) -> Iterator[ChatServer]:
        thread = threading.Thread(target=lambda: self._server.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.release.set()
            self._server.shutdown()
            self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    chat: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = self.chat.note(self, body)
        self.chat.busy(1)
        try:
            fault = self.chat.faults.get(number)
            if fault is None:
                time.sleep(0.002)
                self.send(200, completion(usual_text(body)))
            else:
                fault(self)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the caller has gone
        finally:
            self.chat.busy(-1)

    def send(
        self, status: int, content: Any, headers: dict[str, str] | None = None, *, more: int = 0
    ) -> None:
        """`content` as JSON, or bytes as they are; `more` bytes are promised that never come."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data) + more), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def usual_text(body: dict[str, Any]) -> str:
    told = hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).hexdigest()[:12]
    return f"A caption with the mark {told}, long enough to be longer than what was asked for."


def completion(text: Any, finish_reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}


# ---- faults


def status(number: int, message: str = "no", *, wait: str | None = None, **about: str) -> Fault:
    headers = {"Retry-After": wait} if wait else {}
    return lambda handler: handler.send(number, {"error": {"message": message, **about}}, headers)


def answer(content: Any) -> Fault:
    return lambda handler: handler.send(200, content)


def cut_off(handler: Handler) -> None:
    handler.send(200, completion("half"), more=100)


def reset(handler: Handler) -> None:
    """The connection ends with RST."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.wfile = handler.rfile  # nothing is left to be flushed


def hang(handler: Handler) -> None:
    handler.chat.release.wait(30)


def drip(handler: Handler) -> None:
    """Never silent for long, and never done."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.chat.release.wait(0.05):
        handler.wfile.write(b" ")
        handler.wfile.flush()
