"""What the benchmarks share: command line, corpora, clocks, what a job takes, and how figures are printed and saved."""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataprep.config import SourceConfig
from dataprep.readers import Record, read_records
from dataprep.storage import UserError, array_buffers
from jobs import corpus
from jobs.config import Config
from jobs.engine import Engine

os.environ.setdefault("RAY_worker_niceness", "0")  # our workers and the peers' at the same priority


def parser(description: str | None, reads_corpus: bool = True) -> argparse.ArgumentParser:
    """--quick and --json FILE; --corpus DIR where a benchmark reads one."""
    parser = argparse.ArgumentParser(description=description)
    if reads_corpus:
        parser.add_argument("--corpus", required=True, help="directory of .jsonl.zst files, their labels in labels/")
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--json", help="write the figures there, as one flat object")
    return parser


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


def about(*packages: str) -> str:
    """The machine's cores and the versions that figures depend on."""
    versions = [f"{name} {metadata.version(name)}" for name in ("numba", "numpy", "pyarrow", "ray", *packages)]
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(versions)}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table in Markdown, as the documents have it: the first column to the left, numbers to the right."""
    lines = [columns, ("---", *["--:"] * (len(columns) - 1)), *rows]
    print(f"{title}\n", *(f"| {' | '.join(map(str, line))} |" for line in lines), sep="\n", end="\n\n")


@contextlib.contextmanager
def figure(path: Path, width: float, height: float, **labels: str) -> Iterator[Any]:
    """Axes to draw on, sizes in inches; then an SVG file, the same bytes for the same figure. Needs matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams |= {"svg.hashsalt": "", "svg.fonttype": "none", "font.size": 9}
    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.add_subplot(**labels)
    yield axes
    axes.legend()
    made.savefig(path, metadata={"Date": None})


def report(path: str | None, figures: Mapping[str, float]) -> None:
    """Print the figures, and write them where --json says."""
    for name, value in figures.items():
        print(f"{name:36} {value:14,.4f}")
    if path:
        Path(path).write_text(json.dumps(figures, indent=1) + "\n")


def sources(directory: str, most: int | None = None) -> dict[str, Path]:
    """Name -> file of so many sources, smallest first."""
    files = sorted(Path(directory).glob("*.jsonl.zst"), key=lambda f: (f.stat().st_size, f.name))
    if not files:
        raise UserError(f"{directory} holds no .jsonl.zst files")
    return {f.name.removesuffix(".jsonl.zst"): f for f in files[:most]}


def documents(path: Path, megabytes: float = float("inf")) -> Iterator[tuple[str, str]]:
    """(id, text) of a file's first documents, up to the one that passes so many megabytes."""
    left = megabytes * 1e6
    for record in read_records(str(path), SourceConfig(name="x", paths=(str(path),))):
        if isinstance(record, Record):
            yield record.id or "", record.text.decode()
            left -= len(record.text)
        if left < 0:
            return


def column(texts: Iterable[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(texts, pa.large_string())])


def megabytes(texts: pa.ChunkedArray | pa.Table) -> float:
    """Of a column of texts, or of a table's."""
    offsets = array_buffers(texts["text"] if isinstance(texts, pa.Table) else texts)[1]
    return float(offsets[-1] - offsets[0]) / 1e6


def configuration(root: str, files: dict[str, Path], workers: int, **sections: dict[str, Any]) -> Config:
    """A pipeline over these sources in which no loss stops the job: benchmarks measure what would be lost."""
    return Config(
        root=root,
        workers=workers,
        corpus={
            "sources": [{"name": name, "paths": [str(path)]} for name, path in files.items()],
            **sections.pop("corpus", {}),
        },
        dedup={"max_source_loss": 1.0},
        mix={"stages": [{"name": "none", "context": 128, "tokens": 1}]},
        **sections,
    )


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds of this thread, what the action returned)."""
    began = time.thread_time()
    result = action()
    return time.thread_time() - began, result


def cpu_seconds(action: Callable[[], object], runs: int = 1) -> float:
    """CPU seconds of this thread, the least of some runs."""
    return min(timed(action)[0] for _ in range(runs))


def medians(actions: Mapping[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Wall seconds of each, interleaved, after one run each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(runs + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def speeds(title: str, texts: Mapping[str, Any], action: Callable, runs: int = 2) -> tuple[float, float]:
    """MB per CPU second of `action(text)`: of all sources together, and of the slowest. Prints each."""
    first = next(iter(texts.values()))
    action(first.slice(0, 1))  # compile, fill tables
    seconds = {name: cpu_seconds(lambda text=text: action(text), runs) for name, text in texts.items()}
    rates = {name: megabytes(text) / seconds[name] for name, text in texts.items()}
    rows = [
        (name, f"{rate:.1f}", f"{seconds[name] / len(texts[name]) * 1e6:.0f}")
        for name, rate in sorted(rates.items(), key=lambda item: item[1])
    ]
    table(title, ("source", "MB/s per core", "us per document"), rows)
    return sum(map(megabytes, texts.values())) / sum(seconds.values()), min(rates.values())


class Usage:
    """Of this process and all below it: peak resident memory without mapped files (sampled), CPU seconds."""

    def __enter__(self) -> "Usage":
        self.peak, self.cpu, self.done = 0, -_cpu_seconds(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.25):
            self.peak = max(self.peak, sum(map(_resident, _processes())))

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.cpu += _cpu_seconds()


def _processes(process: str = "self") -> Iterator[Path]:
    """/proc/PID of a process and all below it."""
    yield Path("/proc") / process
    with contextlib.suppress(OSError):  # it may have ended meanwhile
        for task in (Path("/proc") / process / "task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _processes(child)


def _resident(process: Path) -> int:
    with contextlib.suppress(OSError):
        lines = (process / "status").read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssShmem")))
    return 0


def _cpu_seconds() -> float:
    total = 0
    for process in _processes():
        with contextlib.suppress(OSError):
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15]))  # user and system, its own and of children that have ended
    return total / os.sysconf("SC_CLK_TCK")


def job(
    config: Config, workers: int, build: Callable[[Engine, Config], object], warm: Callable[[], object]
) -> tuple[float, float]:
    """(wall seconds, peak MB) of a job's steps, named like its module, on a corpus that is committed already.

    Every worker has run `warm` before: imports, kernels and tables are not counted."""
    name = build.__module__.rpartition(".")[2]
    for path in [*Path(config.root).glob(f"{name}*"), *Path(config.root, "latest").glob(f"{name}*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with Engine(config.root, workers) as engine:
        corpus.partitions(engine, config)
        ray = engine.ray()
        ray.get([ray.remote(warm).remote() for _ in range(4 * workers)])
        with Usage() as usage:
            began = time.perf_counter()
            build(engine, config)
            seconds = time.perf_counter() - began
    return seconds, usage.peak / 1e6


def two_worker_speedup(run: Callable[[int], float], pairs: int) -> float:
    """How much faster two workers are than one: the median over pairs of runs, wall seconds."""
    found = [(run(1), run(2)) for _ in range(pairs)]
    print("  one against two workers:", ", ".join(f"{one:.1f} s / {two:.1f} s" for one, two in found))
    return statistics.median(one / two for one, two in found)
