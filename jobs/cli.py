"""The command line every job shares: `jobs/X.py CONFIG.yaml [--dry-run] [--section.key value ...]`."""

import argparse
import importlib
import os
import select
import shlex
import sys
from collections.abc import Callable
from typing import Any

from dataprep import storage
from dataprep.storage import UserError
from jobs import progress
from jobs.config import Config, load
from jobs.engine import DryRunEnd, Engine


def run(name: str) -> None:
    """Run the job in module `jobs.NAME` and exit: 0 done, 1 a mistake or failure, 2 wrong usage."""
    try:
        code = main(importlib.import_module(f"jobs.{name}"), sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        (poll := select.poll()).register(sys.stdout, 0)
        if not poll.poll(0):
            raise  # it was another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read it, `head`, has seen enough
        code = 1
    sys.exit(code)


def main(job: Any, argv: list[str]) -> int:
    """`job` is a module with `main(engine, config, arguments)` and, if it has flags of its own, `flags(parser)`.

    A job that builds nothing has `start(arguments, overrides)` instead of `main`."""
    prog = f"jobs/{job.__name__.removeprefix('jobs.')}.py"
    parser = argparse.ArgumentParser(prog=prog, description=job.__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="the pipeline's configuration")
    parser.add_argument("--dry-run", action="store_true", help="print the steps, what is there and what would run")
    parser.add_argument("-h", "--help", action="store_true", help="show this, and every key of the configuration")
    getattr(job, "flags", lambda parser: None)(parser)
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.help:
        parser.print_help()
        print("\nEvery key of CONFIG.yaml can be set here, as --section.key value:\n")
        return print_keys()
    if not arguments.config:
        parser.error("CONFIG.yaml is missing")
    arguments.command_line = shlex.join([arguments.config, *overrides])
    if hasattr(job, "start"):  # it builds nothing
        return guard(lambda: job.start(arguments, overrides))
    return guard(lambda: start(job, arguments, overrides))


def start(job: Any, arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(arguments.config, overrides)
    with Engine(config.root, config.workers, arguments.dry_run) as engine:
        try:
            job.main(engine, config, arguments)
        except DryRunEnd as end:
            progress.say(f"(dry run: steps after {end} depend on its result)")


def load_config(path: str, overrides: list[str]) -> Config:
    """The configuration, its root absolute."""
    config = load(path, overrides)
    root = storage.absolute(config.root)
    relative = storage.is_local(root) and not config.root.startswith(("/", "~", "file://"))
    if relative and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UserError(
            f"root = {config.root!r}: a submitted job runs in a temporary copy of the checkout, which is deleted; "
            "give --root an absolute path or a URL"
        )
    return config.model_copy(update={"root": root})


def guard(action: Callable[[], None]) -> int:
    """Run an action; a user's mistake becomes one line and exit code 1, a bug keeps its stack trace."""
    try:
        action()
    except UserError as error:
        progress.fail(f"error: {error}")
        return 1
    except OSError as error:
        if mistake := storage.explain_os_error(error):
            progress.fail(f"error: {mistake}")
            return 1
        raise
    except KeyboardInterrupt:
        progress.fail("stopped; the same command goes on from here")
        return 130
    return 0


def print_keys(model: Any = Config, prefix: str = "") -> int:
    """Every key with its type, default and meaning, from the models."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((k for k in kinds if hasattr(k, "model_fields")), None)
        kind = getattr(field.annotation, "__name__", str(field.annotation)) if inner is None else ""
        default = "" if inner or field.is_required() else f" (default {field.get_default(call_default_factory=True)!r})"
        print(f"  --{prefix}{name} {kind}{default}  {field.description or ''}".rstrip())
        if inner is not None and inner is field.annotation:
            print_keys(inner, f"{prefix}{name}.")
        elif inner is not None:
            print_keys(inner, f"{prefix}{name}[].")
    return 0
