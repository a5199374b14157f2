"""A server, in a thread, that speaks the chat completions protocol and misbehaves as told, for the label job."""

import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = {"knowledge": 3, "helpfulness": 4, "domain": "other"}


class Endpoint:
    """`behave(text, times)` -> what to do with the times-th question (from 1) about a text: an answer (str), a dict
    {status, headers, body}, "reset", a number of seconds to hang, or None for a good answer."""

    def __init__(self, behave=lambda text, times: None):
        self.behave, self.lock = behave, threading.Lock()
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.asked: Counter[str] = Counter()
        self.open = self.most_open = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"endpoint": self}))
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    endpoint: Endpoint

    def log_message(self, *_):
        pass

    def do_POST(self):
        end = self.endpoint
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = re.search(r"^(=== \w+ ===)\n(.*)\n\1", request["messages"][1]["content"], re.S)[2]
        with end.lock:
            end.requests.append({"path": self.path, **request})
            end.headers.append(dict(self.headers))
            end.asked[text] += 1
            times = end.asked[text]
            end.open += 1
            end.most_open = max(end.most_open, end.open)
        try:
            with contextlib.suppress(ConnectionError):  # whoever asked may have given up
                self.act(end.behave(text, times))
        finally:
            with end.lock:
                end.open -= 1

    def act(self, what):
        if what == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if isinstance(what, float):
            time.sleep(what)
            what = None
        if not isinstance(what, dict):
            content = json.dumps(GOOD) if what is None else what
            usage = {"prompt_tokens": 1000, "completion_tokens": 20}
            what = {"body": {"choices": [{"message": {"role": "assistant", "content": content}}], "usage": usage}}
        body = what.get("body", {})
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(what.get("status", 200))
        for name, value in what.get("headers", {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
