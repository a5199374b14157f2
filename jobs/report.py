"""Report job: one page that shows where every document went and what the model learned from it. Builds nothing."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dataprep import storage
from dataprep.storage import UserError, join
from jobs.cli import load_config
from jobs.config import Config
from jobs.progress import say
from jobs.report_data import Outputs
from jobs.report_page import render

PORT = 8000
LOCAL = "127.0.0.1"


def write(config: Config, command: str, path: str | None = None) -> str:
    """Write the page of what lies under `config.root`; returns a link to it. UserError where nothing lies there."""
    if not Outputs(config.root).steps:
        raise UserError(f"there are no outputs under {config.root} yet; run jobs/pipeline.py first, or mend --root")
    path = storage.absolute(path or join(config.root, "report.html"))
    try:
        page = render(config, command)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} went while it was read: a run is at work; try again, or --serve") from None
    storage.write_bytes(path, page.encode())
    return Path(path).as_uri() if storage.is_local(path) else path


class Page:
    """The page as it is now: made again only when something under the root has changed."""

    def __init__(self, config: Config, command: str):
        self.config, self.command = config, command
        self.lock = threading.Lock()
        self.state, self.body = "", b""

    def now(self) -> tuple[str, bytes]:
        """(state, page). While a step is writing, its old page stays."""
        with self.lock:
            try:
                state = Outputs(self.config.root).state()
                if state != self.state:
                    self.state, self.body = state, render(self.config, self.command, live=True).encode()
            except (UserError, OSError) as error:
                if not self.body:
                    raise UserError(f"the outputs cannot be read just now ({error}); try again") from None
            return self.state, self.body


def server(page: Page, port: int) -> ThreadingHTTPServer:
    """A server of this page and nothing else, for this machine alone. UserError where the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in (LOCAL, "localhost"):  # another site's name that points here
                return self.answer(HTTPStatus.FORBIDDEN, b"")
            if self.path != "/":
                return self.answer(HTTPStatus.NOT_FOUND, b"")
            try:
                state, body = page.now()
            except UserError as error:
                return self.answer(HTTPStatus.SERVICE_UNAVAILABLE, str(error).encode(), "text/plain; charset=utf-8")
            if self.headers.get("If-None-Match") == f'"{state}"':
                return self.answer(HTTPStatus.NOT_MODIFIED, b"", tag=state)
            self.answer(HTTPStatus.OK, body, tag=state)

        do_HEAD = do_GET

        def answer(
            self, status: HTTPStatus, body: bytes, kind: str = "text/html; charset=utf-8", tag: str = ""
        ) -> None:
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-cache"}
            headers |= {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
            for name, value in (headers | ({"ETag": f'"{tag}"'} if tag else {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    try:
        return ThreadingHTTPServer((LOCAL, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} cannot be used ({error}); name another: --serve PORT") from None


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FILE", help="where the page is written (default: ROOT/report.html)")
    parser.add_argument(
        "--serve", metavar="PORT", nargs="?", const=PORT, type=int,
        help=f"show the page at http://{LOCAL}:PORT (default {PORT}) while a run goes on, and keep it fresh",
    )  # fmt: skip


def start(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(arguments.config, overrides)
    if arguments.serve is None:
        return say(f"report: {write(config, arguments.command_line, arguments.output)}")
    with server(Page(config, arguments.command_line), arguments.serve) as running:
        say(f"report: http://{LOCAL}:{running.server_address[1]}/ (Ctrl-C ends it)")
        running.serve_forever()


if __name__ == "__main__":
    from jobs.cli import run

    run("report")
