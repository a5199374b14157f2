"""Train on several processes, several roots in one go; also what each of those processes executes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist

from trainer.config import TrainConfig
from trainer.loop import train


def run(size: int, config: TrainConfig, roots: list[Path]) -> None:
    """Train "base" and "longer" under every root on `size` processes."""
    spawn(size, __name__, json.dumps([config.model_dump(mode="json"), [str(root) for root in roots]]))


def spawn(size: int, module: str, *words: str) -> None:
    """Run a module on `size` processes, which `join` one group; they meet at a file, for no port can be kept free."""
    with tempfile.TemporaryDirectory() as meeting:
        world = {"WORLD_SIZE": str(size), "MEETING": f"file://{meeting}/store", "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([sys.executable, "-m", module, *words], env=os.environ | world | {"RANK": str(rank)})
            for rank in range(size)
        ]
        try:
            assert [p.wait(timeout=300) for p in processes] == [0] * size
        finally:
            for p in processes:
                p.kill()


def join() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["MEETING"], rank=rank, world_size=size)


if __name__ == "__main__":
    join()
    values, roots = json.loads(sys.argv[1])
    for root in roots:
        train(TrainConfig(**values), root, ["base", "longer"])
    dist.destroy_process_group()
