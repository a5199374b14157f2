"""Label job: a language model rates a sample of the documents; `jobs/classifier.py` learns from what it says."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
import asyncio
from collections import Counter
from typing import Any

import pyarrow as pa

from dataprep import labels, storage
from dataprep.labels import LabelsConfig, Rubric
from dataprep.storage import Attempt, Commit, UserError, read_table
from jobs import corpus, quality
from jobs.chat import NO_ANSWER, Budget, Chat, Failed, OutOfBudget, Usage, worst_case
from jobs.config import Config
from jobs.engine import DryRunEnd, Engine, Step, Task
from jobs.progress import Progress, say

VERSION = 1
SAMPLE_VERSION = 1
MOST_UNRATED = 16  # documents in a row, before the job stops
STOPPED = f"{NO_ANSWER}stopped"
BYTES_PER_TOKEN = 4  # for the estimate only
ANSWER_TOKENS = 40  # likewise
ROWS = pa.schema(
    [
        ("doc", pa.uint64()),
        *((name, pa.string()) for name in labels.STRATUM),
        ("text", pa.large_string()),
        ("knowledge", pa.uint8()),
        ("helpfulness", pa.uint8()),
        ("domain", pa.string()),
        ("failed", pa.string()),
        ("attempts", pa.uint16()),
        ("prompt_tokens", pa.uint64()),
        ("completion_tokens", pa.uint64()),
        ("model", pa.string()),
        ("rubric", pa.string()),
        ("rubric_hash", pa.string()),
    ]
)


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", metavar="AMOUNT", help="same as --labels.budget: `12.50` or `2000000tokens`")


def build_sample(engine: Engine, config: Config) -> pa.Table:
    """The documents to ask about, in the order of asking, as `labels.sample` makes them.

    A dry run draws them too, in this process: what they cost is what it is asked for.
    """
    about = config.labels.model_dump(mode="json", include={"per_stratum", "characters", "seed"})
    tasks = [
        p.task(q.path("quality"), config.labels, quality=q.fingerprint)
        for p, q in zip(corpus.partitions(engine, config), quality.build(engine, config), strict=True)
    ]
    step = Step("label-sample", SAMPLE_VERSION, about)
    if engine.dry_run:
        parts = (draw(*task.args) for task in tasks)
    else:
        parts = (read_table(c.path("sample")) for c in engine.map(step, sample_partition, tasks))
    sample = next(parts)
    for part in parts:  # one by one: all candidates' texts could be too many
        sample = pa.concat_tables([sample, part])
        sample = sample.take(labels.choose(sample, config.labels.per_stratum))
    return sample


def sample_partition(out: Attempt, path: str, quality_path: str, config: LabelsConfig) -> dict:
    table = draw(path, quality_path, config)
    out.table("sample", table)
    return {"documents": len(table)}


def draw(path: str, quality_path: str, config: LabelsConfig) -> pa.Table:
    return labels.sample(read_table(path, ["doc", "source", "text", "content_hash"]), read_table(quality_path), config)


def step(config: LabelsConfig) -> Step:
    """Labels belong together that were given by one model, under one rubric, to as much of each text."""
    about = config.model_dump(mode="json", include={"model", "characters", "request"})
    return Step("labels", VERSION, about | {"rubric": Rubric(config).hash})


def committed(directory: str) -> list[Commit]:
    """All partitions of labels in a directory whose files are there, in the order of their names."""
    there = storage.sizes(directory)
    names = sorted(name.removesuffix(storage.COMMIT) for name in there if name.endswith(storage.COMMIT))
    found = [commit for name in names if (commit := Commit.load(directory, name))]
    return [c for c in found if all(there.get(f["name"]) == f["bytes"] for f in c.files.values())]


def settled(commits: list[Commit]) -> set[int]:
    """The documents that need not be asked about: rated, or refused for good. Where the endpoint failed, ask again."""
    done: set[int] = set()
    for commit in commits:
        table = read_table(commit.path("labels"), ["doc", "failed"])
        for doc, failed in zip(table["doc"].to_pylist(), table["failed"].to_pylist(), strict=True):
            if failed is None or not failed.startswith(NO_ANSWER):
                done.add(doc)
    return done


def spent(commits: list[Commit]) -> Usage:
    usage = Usage()
    for c in commits:
        usage.add(Usage(c.aggregates["prompt_tokens"], c.aggregates["completion_tokens"]))
    return usage


class Labeller:
    """Asks about documents, a partition of rows after the other, several under way, and commits each when complete."""

    def __init__(self, config: LabelsConfig, directory: str, chat: Chat, keys: set[str]):
        self.config, self.directory, self.chat, self.keys = config, directory, chat, keys
        self.rubric = Rubric(config)
        self.stop: BaseException | None = None  # why no further question is asked
        self.unrated = 0  # documents in a row without a rating, whatever the reason
        self.places = asyncio.Semaphore(config.concurrency)
        self.partitions = asyncio.Semaphore(2 + config.concurrency // config.partition_rows)

    async def run(self, rows: list[dict[str, Any]], progress: Progress) -> None:
        """Raises what stopped it, once all that was answered is committed."""
        size = self.config.partition_rows
        async with self.chat, asyncio.TaskGroup() as group:
            for start in range(0, len(rows), size):
                group.create_task(self._partition(rows[start : start + size], progress))
        if self.stop:
            raise self.stop

    async def _partition(self, rows: list[dict[str, Any]], progress: Progress) -> None:
        async with self.partitions:
            found = [row for row in await asyncio.gather(*map(self._rate, rows)) if row]
        try:
            if found:
                self._commit(found)
                progress.advance(sum(len(row["text"].encode()) for row in found))
        except OSError as error:
            self.stop = self.stop or storage.explain_os_error(error) or error

    async def _rate(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The row with its ratings or the reason why it has none; None if it cost nothing and was not asked about."""
        async with self.places:
            if self.stop:
                return None
            usage, attempt = Usage(), 0
            failed: str | None = STOPPED
            rated: dict[str, Any] = {}
            question = labels.messages(self.rubric, row["text"])
            while failed is not None and not self.stop and attempt <= self.config.malformed_retries:
                attempt += 1
                try:
                    answer = await self.chat.ask(question, attempt, usage)
                    rated = labels.parse(answer, self.config.domains)
                    failed = None
                except ValueError as error:
                    failed = f"malformed answer: {error}"
                except Failed as error:
                    failed = str(error)
                    break
                except UserError as error:
                    self.stop, failed = self.stop or error, STOPPED
            self._watch(failed)
            if failed == STOPPED and not usage.prompt:
                return None
            about = {"model": self.config.model, "rubric": self.rubric.version, "rubric_hash": self.rubric.hash}
            tokens = {"prompt_tokens": usage.prompt, "completion_tokens": usage.completion}
            return row | rated | {"failed": failed, "attempts": attempt} | tokens | about

    def _watch(self, failed: str | None) -> None:
        """An endpoint that fails everybody is down, a model that never keeps to the form is the wrong one: stop, rather
        than go through all documents and the whole budget."""
        self.unrated = self.unrated + 1 if failed else 0
        if self.unrated >= MOST_UNRATED:
            self.stop = self.stop or UserError(
                f"{self.config.model} at {self.config.endpoint} has rated none of {self.unrated} documents in a row "
                f"(the last: {failed}); mend the endpoint, or try another model or rubric: the same command goes on "
                "from here"
            )

    def _commit(self, rows: list[dict[str, Any]]) -> None:
        key = storage.fingerprint([row["doc"] for row in rows])[:16]
        while key in self.keys:  # the same documents, which an earlier run asked about in vain
            key += "-again"
        out = Attempt(self.directory, key, {})
        out.table("labels", pa.Table.from_pylist(rows, ROWS))
        reasons = Counter(str(row["failed"]).partition(":")[0] for row in rows if row["failed"])
        tokens = {name: sum(row[name] for row in rows) for name in ("prompt_tokens", "completion_tokens")}
        out.commit({"rows": len(rows), "failed": dict(sorted(reasons.items())), **tokens})


def build(engine: Engine, config: Config) -> list[Commit]:
    """Ask about what is not labelled yet. Returns all partitions of labels under this model and rubric."""
    if not config.labels.model:
        raise UserError("labels.model is empty: name the model that the endpoint serves")
    what = step(config.labels)
    directory = what.directory(engine.root)
    before = committed(directory)
    sample, done = build_sample(engine, config), settled(before)
    rows = [row for row in sample.drop_columns(["place"]).to_pylist() if row["doc"] not in done]
    budget = Budget(config.labels, spent(before))
    estimate(rows, len(sample), budget)
    if engine.dry_run:
        raise DryRunEnd("labels")
    engine.publish(what)  # before the first answer: what a stopped run has collected can be used
    if rows:
        labeller = Labeller(config.labels, directory, Chat(config.labels, budget), {c.key for c in before})
        size = sum(len(row["text"].encode()) for row in rows)
        try:
            with Progress("labels", -(-len(rows) // config.labels.partition_rows), 0, size) as progress:
                asyncio.run(labeller.run(rows, progress))
        except OutOfBudget as stop:
            say(str(stop))
    commits = committed(directory)
    # Nothing is left to run: this clears away what a killed run may have left.
    return engine.map(what, sample_partition, [Task(c.key, c.inputs) for c in commits])


def estimate(rows: list[dict[str, Any]], sampled: int, budget: Budget) -> None:
    """Say what the questions will cost, before the first."""
    config, rubric = budget.config, Rubric(budget.config)
    likely, most = Usage(), Usage()
    for row in rows:
        worst = worst_case(config, labels.messages(rubric, row["text"]))
        likely.add(Usage(worst.prompt // BYTES_PER_TOKEN, ANSWER_TOKENS))
        for _ in range(1 + config.malformed_retries):
            most.add(worst)
    priced = not budget.in_tokens and config.price_input + config.price_output
    likely_cost, most_cost = (f" costing {budget.cost(u):,.4g}" if priced else "" for u in (likely, most))
    say(
        f"labels: {sampled:,} documents sampled, {len(rows):,} of them to ask {config.model} about, under rubric "
        f"{rubric.version} ({rubric.hash[:8]})"
    )
    say(f"estimate: {likely.prompt + likely.completion:,} tokens{likely_cost}")
    say(f"at most: {most.prompt + most.completion:,} tokens{most_cost}, not counting calls that fail")
    say(f"budget: {config.budget or 'none'}; spent of it before: {budget.cost(budget.spent):,.6g}")


def main(engine: Engine, config: Config, arguments: argparse.Namespace) -> None:
    if arguments.budget:
        values = config.labels.model_dump() | {"budget": arguments.budget}
        config = config.model_copy(update={"labels": check_budget(values)})
    commits = build(engine, config)
    usage, failed = spent(commits), Counter[str]()
    for commit in commits:
        failed.update(commit.aggregates["failed"])
    rows = sum(c.aggregates["rows"] for c in commits)
    say(
        f"labels: {rows - sum(failed.values()):,} documents rated, {sum(failed.values()):,} failed "
        f"({', '.join(f'{n} {reason}' for reason, n in sorted(failed.items())) or 'none'}); "
        f"{usage.prompt:,} tokens read, {usage.completion:,} written"
    )


def check_budget(values: dict[str, Any]) -> LabelsConfig:
    try:
        return LabelsConfig(**values)
    except ValueError:
        raise UserError(f"--budget {values['budget']}: must be money, `12.50`, or tokens, `2000000tokens`") from None


if __name__ == "__main__":
    from jobs.cli import run

    run("label")
