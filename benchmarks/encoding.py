"""Encoding speed, one thread, cold cache, against other libraries. `python -m benchmarks.encoding --corpus DIR ...`."""

import argparse
import importlib.metadata
import io
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
import zstandard

from dataprep.byte_level import ByteLevelBPE, byte_alphabet
from dataprep.storage import UserError, array_buffers

BATCH = 8 << 20  # bytes of text

Encode = Callable[[list[str]], list[Any]]


def batches(path: Path, limit: float) -> Iterator[list[str]]:
    """The texts of a file, up to `limit` bytes of them, in lists of about BATCH bytes."""
    texts: list[str] = []
    size = taken = 0
    with open(path, "rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), "utf-8"):
            texts.append(json.loads(line)["text"].encode("utf-8", "replace").decode())
            size += len(texts[-1].encode())
            if size >= BATCH or taken + size >= limit:
                yield texts
                texts, taken, size = [], taken + size, 0
            if taken >= limit:
                return
    if texts:
        yield texts


def tiktoken_encoder(description: dict[str, Any]) -> Encode | None:
    """tiktoken with the same vocabulary, where it is installed and the pre-tokeniser is one pattern."""
    try:
        import tiktoken
    except ImportError:
        return None
    splits = [p for p in description["pre_tokenizer"].get("pretokenizers", []) if p["type"] == "Split"]
    if len(splits) != 1 or description["normalizer"]:
        return None
    table = {ord(char): byte for char, byte in byte_alphabet().items()}
    ranks = {
        token.translate(table).encode("latin-1"): number
        for token, number in description["model"]["vocab"].items()
        if set(token) <= set(byte_alphabet())
    }
    encoding = tiktoken.Encoding(
        "same", pat_str=splits[0]["pattern"]["Regex"], mergeable_ranks=ranks, special_tokens={}
    )
    return lambda texts: [encoding.encode_ordinary(text) for text in texts]


def measure(files: list[Path], tokenizer: str, limit: float) -> dict[str, dict[str, float]]:
    """Per source: bytes, documents, mismatched, and the seconds of this thread that each library took."""
    description = json.loads(Path(tokenizer).read_bytes())
    rows = {}
    for path in files:
        # A new one for each source: both libraries have a cache of words.
        library = tokenizers.Tokenizer.from_file(tokenizer)
        library.encode_special_tokens = True
        ours = ByteLevelBPE(description, library.get_added_tokens_decoder())
        ours.encode(np.frombuffer(b"warm up", np.uint8), np.array([0, 7]))
        ours.forget()
        peer = tiktoken_encoder(description)
        row: dict[str, float] = dict.fromkeys(("bytes", "documents", "mismatched", "ours", "hf"), 0)
        for texts in batches(path, limit):
            data, offsets = array_buffers(pa.array(texts, pa.large_string()))
            times = [time.thread_time()]
            ids, ends = ours.encode(data, offsets)
            times.append(time.thread_time())
            expected = library.encode_batch_fast(texts, add_special_tokens=False)
            times.append(time.thread_time())
            row["ours"] += times[1] - times[0]
            row["hf"] += times[2] - times[1]
            if peer:
                peer(texts)
                row["tiktoken"] = row.get("tiktoken", 0) + time.thread_time() - times[2]
            row["bytes"] += int(offsets[-1] - offsets[0])
            row["documents"] += len(texts)
            spans = zip(expected, itertools.pairwise(ends), strict=True)
            row["mismatched"] += sum(one.ids != ids[a:b].tolist() for one, (a, b) in spans)
        rows[path.name.removesuffix(".jsonl.zst")] = row
        print(line(path.name.removesuffix(".jsonl.zst"), row), flush=True)
    return rows


def line(name: str, row: dict[str, float]) -> str:
    speed = {k: row["bytes"] / 1e6 / row[k] for k in ("ours", "hf", "tiktoken") if row.get(k)}
    peer = f"  tiktoken {speed['tiktoken']:6.1f}" if "tiktoken" in speed else ""
    return (
        f"{name:34} {row['bytes'] / 1e6:7.1f} MB  ours {speed['ours']:6.1f} MB/s  hf {speed['hf']:5.2f}{peer}"
        f"  {speed['ours'] / speed['hf']:5.1f}x  mismatched {row['mismatched']:.0f} of {row['documents']:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True, help="directory of .jsonl.zst files with a `text` each")
    parser.add_argument("--tokenizer", required=True, help="path of a tokenizer.json")
    parser.add_argument("--quick", action="store_true", help="the four smallest files")
    parser.add_argument("--megabytes", type=float, default=float("inf"), help="of text from the start of each file")
    parser.add_argument("--json", help="write the figures there")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    files = sorted(Path(arguments.corpus).glob("*.jsonl.zst"), key=lambda f: f.stat().st_size)
    if not files:
        raise UserError(f"{arguments.corpus} holds no .jsonl.zst files")
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tokenizers", "numba"))
    print(f"one thread, its CPU time, cold caches; {platform.machine()}, {os.cpu_count()} cores; {versions}")
    rows = measure(files[:4] if arguments.quick else files, arguments.tokenizer, arguments.megabytes * 1e6)
    total = {key: sum(row.get(key, 0) for row in rows.values()) for key in rows[files[0].name[: -len(".jsonl.zst")]]}
    print(line("total", total))
    ratios = {name: row["hf"] / row["ours"] for name, row in rows.items()}
    slowest = min(ratios, key=lambda name: ratios[name])
    print(f"slowest against hf: {slowest}, {ratios[slowest]:.1f}x")
    if arguments.json:
        figures = {
            "mb_s_core": total["bytes"] / 1e6 / total["ours"],
            "vs_hf": total["hf"] / total["ours"],
            "vs_hf_slowest_source": ratios[slowest],
            "mismatched_documents": int(total["mismatched"]),
        }
        Path(arguments.json).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
