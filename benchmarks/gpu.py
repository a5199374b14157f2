"""GPU kernels and the trainer on one GPU, beside their peers: `python -m benchmarks.gpu --json FILE`.

Under ten minutes. Sections, each of which runs alone with --section:

    correctness  every kernel in bfloat16 against float64, and twice the same bits; a wrong one ends the run
    lightning    beside flash-linear-attention's `chunk_simple_gla` and the memory floor; packed beside one document
    variants     lightning attention with other chunks, segments, widths and warps
    layer        every other kernel beside plain PyTorch, beside torch.compile of that, and the memory floor
    attention    ways to compute the softmax layers' packed attention
    model        tokens/s and MFU of the `h100` preset, beside the same model with other parts (needs pydantic)

Figures merge into the one JSON file, and a table of all in it is written beside it, as .md. A peer that is not
installed is left out.
"""

import argparse
import importlib.util
import json
import shlex
import sys
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import gpu_kernels, gpu_layer
from benchmarks.gpu_kernels import Machine
from kernels import fused


def correctness(machine: Machine) -> dict[str, float]:
    errors = {"lightning": gpu_kernels.lightning_error(machine)} | gpu_layer.errors(machine)
    for name, error in errors.items():
        print(f"  {name}: largest relative error {error:.1e}")
    wrong = [name for name, error in errors.items() if not error <= machine.bound]
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}; no timing would mean anything")
    return {f"{name}_error": error for name, error in errors.items()}


def model(machine: Machine) -> dict[str, float]:
    if not importlib.util.find_spec("pydantic"):
        print("  left out: pydantic is not installed (docs/kernels.md says how to bring it)")
        return {}
    from benchmarks import gpu_model

    return gpu_model.measure(machine)


SECTIONS = {
    "correctness": correctness,
    "lightning": gpu_kernels.lightning,
    "variants": gpu_kernels.variants,
    "layer": gpu_layer.times,
    "attention": gpu_layer.attention,
    "model": model,
}


def about(machine: Machine) -> dict[str, str]:
    packages = ("torch", "triton", "flash-linear-attention", "transformers")
    there = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "device": torch.cuda.get_device_name() if machine.real else "CPU, interpreted: no figure means anything",
        "versions": ", ".join(f"{name} {there[name]}" for name in packages if name in there),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
    }  # fmt: skip


def merge(path: Path, figures: dict[str, float | str]) -> None:
    """Into the JSON file, and all that it holds then into the table beside it."""
    merged = (json.loads(path.read_text()) if path.exists() else {}) | figures
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged, indent=1) + "\n")
    said = [f"{merged['device']}; {merged['versions']}.", f"Last command: `{merged['command']}`"]
    rows = [f"| `{name}` | {value:.4g} |" for name, value in merged.items() if not isinstance(value, str)]
    path.with_suffix(".md").write_text("\n".join(["# GPU figures", "", *said, "", "| | |", "|---|---|", *rows]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=SECTIONS, action="append", help="only this one; may be given repeatedly")
    parser.add_argument("--json", type=Path, help="merge the figures into this file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=argparse.SUPPRESS)  # cpu: a rehearsal
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a GPU, and torch finds none here")
    if arguments.device == "cpu":
        fused.on_gpu = lambda x: x.dtype != torch.float64
    machine = Machine(arguments.device)
    described = about(machine)
    print(f"{described['device']}; {described['versions']}; takes under ten minutes")
    for name in arguments.section or SECTIONS:
        print(name, flush=True)
        figures = SECTIONS[name](machine)
        if arguments.json:
            merge(arguments.json, {**described, **figures})


if __name__ == "__main__":
    main()
