"""Train on several processes, several roots in one go; also what each of those processes executes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from trainer.config import TrainConfig
from trainer.loop import train


def run(size: int, config: TrainConfig, roots: list[Path]) -> None:
    """Train "base" and "longer" under every root on `size` processes."""
    spawn(size, __name__, json.dumps([config.model_dump(mode="json"), [str(root) for root in roots]]))


def spawn(size: int, module: str, *words: str) -> None:
    """Run a module on `size` processes of one group."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-m", module, *words], env=os.environ | world | {"RANK": str(rank)})
        for rank in range(size)
    ]
    try:
        assert [p.wait(timeout=300) for p in processes] == [0] * size
    finally:
        for p in processes:
            p.kill()


if __name__ == "__main__":
    import torch.distributed as dist

    dist.init_process_group("gloo")
    values, roots = json.loads(sys.argv[1])
    for root in roots:
        train(TrainConfig(**values), root, ["base", "longer"])
    dist.destroy_process_group()
