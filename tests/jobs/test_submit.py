"""`ray job submit` to a real Ray head: the job runs in a copy of the checkout and gives the bytes of a local run."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.jobs import small
from tests.jobs.test_data_jobs import CHECKOUT, run
from tests.tree import tree

BIN = str(Path(sys.executable).parent)
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
    "PATH": BIN + os.pathsep + os.environ["PATH"],
    "RAY_AUTH_MODE": "token",  # nobody else on this machine may use the head
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The address of a Ray head that this module starts, and alone stops."""
    dashboard = free_port()
    # A short path: Ray's sockets lie in it, and their names may have 107 bytes.
    folder = Path("/tmp") / f"ray-{os.getpid()}"
    process = subprocess.Popen(
        [
            *(f"{BIN}/ray", "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=100000000"),
            *(f"--port={free_port()}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
            *(f"--temp-dir={folder}", "--disable-usage-stats", "--include-dashboard=true"),
            *(f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"),
        ],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(f"{address}/api/version", process)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)  # it takes its own daemons along
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(120):
        assert process.poll() is None, "the Ray head ended"
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except urllib.error.HTTPError:  # it asks for its token, which `ray job submit` knows: it is up
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(url)


def submit(head: str, *command: str) -> subprocess.CompletedProcess:
    words = [f"{BIN}/ray", "job", "submit", "--address", head, "--working-dir", ".", "--", "python", *command]
    return subprocess.run(
        words, cwd=CHECKOUT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_submitted_job_gives_the_bytes_of_a_local_run(head, tmp_path):
    from jobs import dedup

    small.write_corpus(tmp_path / "in")
    run(tmp_path, dedup)
    config = small.write_config(tmp_path, workers=2)
    done = submit(head, "jobs/dedup.py", config, "--root", str(tmp_path / "submitted"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 clusters of duplicates" in done.stdout
    assert tree(tmp_path / "submitted") == tree(tmp_path / "root")


def test_a_submitted_job_with_a_relative_root_stops_with_one_line(head, tmp_path):
    small.write_corpus(tmp_path / "in", files=1)
    done = submit(head, "jobs/corpus.py", small.write_config(tmp_path), "--root", "runs/here")
    assert done.returncode != 0
    errors = {line for line in done.stdout.splitlines() if line.startswith("error:")}  # Ray repeats a job's last words
    assert len(errors) == 1 and "root" in min(errors) and "absolute" in min(errors) and "Traceback" not in done.stdout
