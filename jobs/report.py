"""Report job: one page that shows where every document went and what the model learned from it. Builds nothing."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
import time
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
FRESH = 20  # seconds after which a browser asks for the page again; ten times as long as it takes, if that is more


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


def server(config: Config, command: str, port: int) -> ThreadingHTTPServer:
    """A server of the page as it is now, and of nothing else, for this machine alone. UserError for a taken port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rpartition(":")[0] not in (LOCAL, "localhost"):  # a name that points here
                return self.send_error(HTTPStatus.FORBIDDEN)
            if self.path != "/":
                return self.send_error(HTTPStatus.NOT_FOUND)
            started = time.monotonic()
            try:
                status, kind, body = HTTPStatus.OK, "html", render(config, command)
            except (UserError, OSError) as error:  # a step is just writing
                status, kind, body = HTTPStatus.SERVICE_UNAVAILABLE, "plain", f"not readable just now: {error}"
            self.send_response(status)
            self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Refresh", str(max(FRESH, round(10 * (time.monotonic() - started)))))
            self.end_headers()
            self.wfile.write(body.encode())

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
    with server(config, arguments.command_line, arguments.serve) as running:
        say(f"report: http://{LOCAL}:{running.server_address[1]}/ (Ctrl-C ends it)")
        running.serve_forever()


if __name__ == "__main__":
    from jobs.cli import run

    run("report")
