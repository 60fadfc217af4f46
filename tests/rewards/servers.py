"""Servers of the tests' own, on loopback."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers with functions (server, handler, body), one a request, the last one again and again.

    Attributes:
        asked: what the bodies of requests hold; headers, paths: theirs.
        busy, busiest: requests at this moment, and the most there were.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, read=json.loads):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.read, self.answers = read, []
        self.asked, self.headers, self.paths = [], [], []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # whoever asked has hung up


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = server.read(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            answer = server.answers[min(len(server.asked), len(server.answers) - 1)]
            server.asked.append(body)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        self.counts = True
        try:
            answer(server, self, body)
        finally:
            self.is_answered()

    def is_answered(self):
        """Count the request no more: before the answer is written, as the next one may come at once."""
        with self.server.lock:
            self.server.busy -= self.counts
            self.counts = False

    def log_message(self, *args):
        pass


@contextmanager
def serving(read=json.loads):
    server = Server(read)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def respond(status, content, **headers):
    """An answer with this content: bytes, or what becomes JSON."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()

    def answer(server, handler, body):
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.is_answered()
        handler.end_headers()
        handler.wfile.write(content)

    return answer
