"""The step engine: runs maps, exchanges and global steps over partitions, on Ray, and resumes where it was stopped.

A step's directory is named by its name, code version and configuration; every partition in it has a commit that names
the fingerprints of its inputs. A partition whose commit still fits costs one look; any other is made anew. Kill
anything at any time: the next run goes on, and the bytes are those of an undisturbed run.
"""

import contextlib
import fcntl
import functools
import logging
import math
import os
import re
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataprep import storage
from dataprep.storage import Attempt, Commit, UserError
from jobs.progress import Progress, say

CHECKOUT = str(Path(__file__).resolve().parent.parent)
CALL_BYTES = 4 << 20  # of input for which tasks share a call
AHEAD = 2  # tasks handed to Ray beyond those that run
OURS = re.compile(rf"\.commit\.json$|^\.tmp-|{storage.NAMED.pattern}")


class DryRunEnd(Exception):
    """A dry run met work that is not done; what depends on it cannot be foretold."""


def once_per_run(build: Callable[["Engine", Any], Any]) -> Callable[["Engine", Any], Any]:
    """For a job's `build(engine, config)`: whoever needs the job's output calls it; only the first call looks."""

    @functools.wraps(build)
    def remembered(engine: "Engine", config: Any) -> Any:
        name = f"{build.__module__}.{build.__qualname__}"
        if name not in engine.results:
            engine.results[name] = build(engine, config)
        return engine.results[name]

    return remembered


@dataclass(frozen=True)
class Step:
    """What decides the content of an output besides its inputs. Raise `version` when the code's results change."""

    name: str
    version: int
    config: dict[str, Any] = field(default_factory=dict)

    def directory(self, root: str) -> str:
        return storage.join(root, f"{self.name}-{storage.fingerprint([self.name, self.version, self.config])[:12]}")


@dataclass(frozen=True)
class Task:
    """A partition to make: its key, the fingerprints of what it reads, its function's arguments, its input's bytes."""

    key: str
    inputs: dict[str, str]
    args: tuple[Any, ...] = ()
    bytes: int = 0


def execute(function: Callable[..., dict], directory: str, key: str, inputs: dict[str, str], args: tuple) -> Commit:
    """Make and commit one partition (in a worker). `function(attempt, *args)` writes files, returns aggregates."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pa.set_cpu_count(1)  # one task, one core: the engine does the spreading
    attempt = Attempt(directory, key, inputs)
    try:
        return attempt.commit(function(attempt, *args))
    except OSError as error:
        if mistake := storage.explain_os_error(error):
            raise mistake from error
        raise


def execute_batch(function: Callable[..., dict], directory: str, tasks: Sequence[Task]) -> list[Commit]:
    return [execute(function, directory, task.key, task.inputs, task.args) for task in tasks]


def batches(tasks: Sequence[Task], workers: int) -> list[list[Task]]:
    """Tasks to call together, largest first so that no giant comes last, alone: small ones in groups that still leave
    each worker several, for a call costs as much as a small task."""
    most = math.ceil(len(tasks) / (4 * workers))
    found: list[list[Task]] = []
    size = 0
    for task in sorted(tasks, key=lambda task: -task.bytes):
        if not found or len(found[-1]) >= most or size + task.bytes > CALL_BYTES:
            found.append([])
            size = 0
        found[-1].append(task)
        size += task.bytes
    return found


class Engine:
    """Runs steps under one root.

    workers: tasks at once; None = all CPUs of the Ray cluster; 0 = in this process, without Ray.
    """

    def __init__(self, root: str, workers: int | None = None, dry_run: bool = False):
        self.root, self.workers, self.dry_run = root.rstrip("/"), workers, dry_run
        self.results: dict[str, Any] = {}  # of the jobs that this run has brought up to date
        self._ray_lock = threading.Lock()
        self._started_ray = self._own_cluster = False
        if not storage.is_local(root):
            self._try_root()
        self._lock_file = None if dry_run or not storage.is_local(root) else self._take_lock()

    def _try_root(self) -> None:
        """Clients of object stores raise what they like for an unknown scheme, host, bucket or credentials."""
        try:
            storage.exists(self.root)
        except UserError:
            raise
        except Exception as error:
            why = str(error) or type(error).__name__
            raise UserError(
                f"cannot use root {self.root} ({why}); check the URL, the credentials and the connection"
            ) from error

    def _take_lock(self) -> Any:
        """One run at a time may write under a local root; the lock ends with the process, however it ends."""
        path = Path(self.root.removeprefix("file://"))
        try:
            path.mkdir(parents=True, exist_ok=True)
            file = open(path / ".lock", "a+")  # noqa: SIM115 (held for as long as the engine lives)
        except ValueError as error:
            raise UserError(f"cannot use root {self.root!r}: {error}") from None
        except OSError as error:
            raise storage.explain_os_error(error) or UserError(f"cannot use root {self.root}: {error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UserError(
                f"another run is writing under {self.root}; wait for it, or choose another --root"
            ) from None
        for half_written in (path / "latest").glob(".tmp-*"):  # by a run that was killed
            half_written.unlink()
        return file

    def close(self) -> None:
        if self._lock_file:
            self._lock_file.close()
        if self._started_ray:
            import ray

            ray.shutdown()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the three kinds of step ------------------------------------------------------------------------------------

    def map(self, step: Step, function: Callable[..., dict], tasks: Sequence[Task]) -> list[Commit]:
        """One partition in, one out. Returns the commits in the order of the tasks."""
        commits = self.complete(step.name, step.directory(self.root), function, tasks)
        self.publish(step)
        return commits

    def once(self, step: Step, function: Callable[..., dict], task: Task, frozen: bool = False) -> Commit:
        """A global step: one task. `frozen`: once made, it stays, whatever its inputs become (a trained tokeniser)."""
        directory = step.directory(self.root)
        if frozen and (commit := Commit.load(directory, task.key)) and self._whole(commit, storage.sizes(directory)):
            task = Task(task.key, commit.inputs, task.args, task.bytes)
        return self.map(step, function, [task])[0]

    def exchange(
        self,
        step: Step,
        cut: Callable[..., Any],
        tasks: Sequence[Task],
        ranges: int,
        reduce: Callable[..., dict],
        reduce_args: Callable[[int], tuple] = lambda r: (),
        weights: Sequence[int] | None = None,
    ) -> list[Commit]:
        """Regroup rows by range: `cut(*args)` -> (table, range of each row); `reduce(attempt, table, range, *args)`.

        weights: bytes that each reduction reads, where that is not an equal share of what is cut.
        Slices lie beside the output until every range is committed. See `jobs/exchange.py`.
        """
        from jobs.exchange import regroup

        whole = storage.fingerprint([ranges, [[t.key, t.inputs] for t in tasks]])
        directory = step.directory(self.root)
        weights = weights or [sum(t.bytes for t in tasks) // max(1, ranges)] * ranges
        outputs = [Task(f"{r:05d}", {"all": whole}, (r, *reduce_args(r)), weights[r]) for r in range(ranges)]
        if not self.dry_run and len(self.committed(directory, outputs)) < len(outputs):
            regroup(self, step.name, directory, cut, tasks, ranges, reduce, outputs)
        commits = self.complete(step.name, directory, reduce, outputs)
        if not self.dry_run:
            storage.remove(storage.join(directory, "slices"))  # a kill may have come after the last range
        self.publish(step)
        return commits

    # -- partitions -------------------------------------------------------------------------------------------------

    def complete(
        self, name: str, directory: str, function: Callable[..., dict], tasks: Sequence[Task], sweep: bool = True
    ) -> list[Commit]:
        """Bring every task's partition up to date and remove what no longer belongs. Commits in the tasks' order."""
        have = self.committed(directory, tasks)
        pending = [t for t in tasks if t.key not in have]
        if self.dry_run and pending:
            say(f"{name}: {len(have)} of {len(tasks)} partitions there, {len(pending)} would run")
            raise DryRunEnd(name)
        if self.dry_run:
            say(f"{name}: all {len(tasks)} partitions there")
        elif pending:
            with Progress(name, len(tasks), len(have), sum(t.bytes for t in pending)) as progress:
                for task, commit in self._run(function, directory, pending):
                    have[task.key] = commit
                    progress.advance(task.bytes)
        if sweep and not self.dry_run:
            self._sweep(directory, have)
        return [have[t.key] for t in tasks]

    def committed(self, directory: str, tasks: Sequence[Task]) -> dict[str, Commit]:
        """The commits that fit these tasks: same inputs, every file there with its size."""
        there = storage.sizes(directory)
        present = [t for t in tasks if t.key + storage.COMMIT in there]
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda t: Commit.load(directory, t.key), present))
        return {
            t.key: c
            for t, c in zip(present, found, strict=True)
            if c and c.inputs == t.inputs and self._whole(c, there)
        }

    @staticmethod
    def _whole(commit: Commit, there: dict[str, int]) -> bool:
        return all(there.get(f["name"]) == f["bytes"] for f in commit.files.values())

    def _sweep(self, directory: str, commits: dict[str, Commit]) -> None:
        """Remove files of killed attempts, of older inputs and of partitions that are no more."""
        keep = {f["name"] for c in commits.values() for f in c.files.values()} | {k + storage.COMMIT for k in commits}
        there = storage.sizes(directory)
        stale = {name for name in there if name not in keep and OURS.search(name)}
        for name in [n for n in stale if n.endswith(storage.COMMIT)]:
            if commit := Commit.load(directory, name.removesuffix(storage.COMMIT)):
                stale |= {f["name"] for f in commit.files.values() if f["name"] in there} - keep
        for name in sorted(stale, reverse=True):
            storage.remove(storage.join(directory, name))

    def publish(self, step: Step) -> None:
        """Say where the step's newest output lies (`latest/NAME.json`) and what it was made with (`step.json`)."""
        if self.dry_run:
            return
        directory = step.directory(self.root)
        about = {"name": step.name, "version": step.version, "config": step.config}
        pointer = {"directory": directory.removeprefix(self.root + "/")}
        storage.ensure_json(storage.join(directory, "step.json"), about)
        storage.ensure_json(storage.join(self.root, "latest", f"{step.name}.json"), pointer)

    # -- running ----------------------------------------------------------------------------------------------------

    def _run(self, function: Callable, directory: str, tasks: Sequence[Task]) -> Iterator[tuple[Task, Commit]]:
        """Run the tasks, a bounded number at once; yield each as it ends. After a failure, let the running ones end."""
        if self.workers == 0:
            for task in tasks:
                yield task, execute(function, directory, task.key, task.inputs, task.args)
            return
        ray = self.ray()
        remote = ray.remote(execute_batch).options(
            num_cpus=1,
            max_retries=3,
            retry_exceptions=[ConnectionError, TimeoutError],
            scheduling_strategy="SPREAD",
            name=Path(directory).name,
        )
        limit = self.workers or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        queue, failure = iter(batches(tasks, limit)), None
        limit += AHEAD * self._own_cluster  # it has as many CPUs as workers: these wait in it, and no worker for us
        running: dict[Any, list[Task]] = {}
        while True:
            while failure is None and len(running) < limit and (new := next(queue, None)):
                running[remote.remote(function, directory, new)] = new
            if not running:
                break
            for ref in ray.wait(list(running), num_returns=1)[0]:
                batch = running.pop(ref)
                try:
                    yield from zip(batch, ray.get(ref), strict=True)
                except ray.exceptions.RayTaskError as error:
                    failure = failure or error.cause
                except ray.exceptions.RayError as error:
                    failure = failure or UserError(
                        f"a worker died again and again at {directory}, partition {batch[0].key} "
                        f"({type(error).__name__}); often it lacks memory: use fewer workers or smaller partitions"
                    )
        if failure is not None:
            raise failure

    def ray(self) -> Any:
        """Ray, started here or joined (RAY_ADDRESS, or a submitted job's cluster)."""
        with self._ray_lock:
            joins = bool(os.environ.get("RAY_ADDRESS") or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ)
            if not joins and "RAY_AUTH_MODE" not in os.environ:
                # A cluster of our own gets a token of its own: Ray would leave one in the home directory, where it
                # changes how every later `ray start` and `ray job submit` behave.
                os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            import ray

            if ray.is_initialized():
                return ray
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a task that asks no GPU sees what it saw
            if joins:
                submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # the job brings its own working directory
                env = None if submitted else {"env_vars": {"PYTHONPATH": CHECKOUT}}
                ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env=env)
            else:
                self._own_cluster = True
                paths = [CHECKOUT, *filter(None, [os.environ.get("PYTHONPATH")])]
                with _environment("PYTHONPATH", os.pathsep.join(paths)):
                    ray.init(
                        address="local",
                        num_cpus=self.workers,
                        object_store_memory=150_000_000,  # bulk data goes through storage
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                    )
            self._started_ray = True
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own prints a stack trace
        return ray


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
