"""A real HTTP server with OpenAI's images endpoint, in a thread, that renders as it is told; faults to order."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

Draw = Callable[[dict[str, Any]], Image.Image]
Fault = Callable[[int, dict[str, Any]], tuple[int, bytes] | None]
"""What to answer instead, from the request's number and body; None: the picture."""


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # five, the default, has connections reset when as many come at once


class ImagesServer:
    """`requests` are the bodies it was sent."""

    def __init__(self, draw: Draw, fault: Fault = lambda number, body: None, seconds: float = 0.0):
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    server.requests.append(body)
                    server.keys.add(self.headers.get("Authorization"))
                time.sleep(seconds)
                if self.path != "/v1/images/generations":
                    status, data = 404, b'{"error": {"message": "no such endpoint"}}'
                elif (wrong := fault(number, body)) is not None:
                    status, data = wrong
                else:
                    with lock:
                        image = draw(body)
                    buffer = io.BytesIO()
                    image.save(buffer, "png")
                    encoded = base64.b64encode(buffer.getvalue()).decode()
                    status, data = 200, json.dumps({"created": 0, "data": [{"b64_json": encoded}]}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client may have given up
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def __enter__(self) -> ImagesServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
