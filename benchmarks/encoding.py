"""Encoding speed beside `tokenizers` and tiktoken, the same ids: `python -m benchmarks.encoding --corpus DIR ...`.

Speed: the first megabytes of every source, one thread, its CPU time, caches cold; `--megabytes 10000` compares the ids
of every document. Two workers: the tokens job on the whole corpus. tiktoken is left out where it is not installed, or
cannot express the tokeniser.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers

from benchmarks import common
from benchmarks.common import timed
from dataprep.byte_level import ByteLevelBPE, byte_alphabet
from dataprep.storage import array_buffers, read_groups
from jobs import corpus, tokens
from jobs.corpus import Partition
from jobs.engine import Engine

os.environ["TOKENIZERS_PARALLELISM"] = "false"
Row = dict[str, float]


def tiktoken_encoder(description: dict[str, Any]) -> Callable[[str], list[int]] | None:
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
    pattern = splits[0]["pattern"]["Regex"]
    return tiktoken.Encoding("same", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary


def columns(partitions: list[Partition], limit: float) -> Iterator[pa.Array]:
    """The texts of the first `limit` bytes, a row group at a time."""
    groups = (group["text"] for p in partitions for group in read_groups(p.documents, ["text"]))
    for text in groups:
        offsets = array_buffers(text)[1]
        yield text[: max(1, int(np.searchsorted(offsets - offsets[0], limit)))]
        limit -= offsets[-1] - offsets[0]
        if limit <= 0:
            return


def speed(partitions: list[Partition], tokenizer: str, limit: float) -> Row:
    """bytes, documents and mismatched of a source, and the seconds of this thread that each library took."""
    description, library = json.loads(Path(tokenizer).read_bytes()), tokenizers.Tokenizer.from_file(tokenizer)
    library.encode_special_tokens = True
    ours = ByteLevelBPE(description, library.get_added_tokens_decoder())
    ours.encode(np.frombuffer(b"warm up", np.uint8), np.array([0, 7]))
    ours.forget()
    peer = tiktoken_encoder(description)
    row: Row = dict.fromkeys(("bytes", "documents", "mismatched", "ours", "hf", *(["tiktoken"] if peer else [])), 0)
    for column in columns(partitions, limit):
        texts = column.to_pylist()
        data, offsets = array_buffers(column)
        seconds, (ids, ends) = timed(lambda data=data, offsets=offsets: ours.encode(data, offsets))
        row["ours"] += seconds
        seconds, expected = timed(lambda texts=texts: library.encode_batch_fast(texts, add_special_tokens=False))
        row["hf"] += seconds
        if peer:
            row["tiktoken"] += timed(lambda texts=texts: list(map(peer, texts)))[0]
        row["bytes"] += int(offsets[-1] - offsets[0])
        row["documents"] += len(texts)
        spans = zip(expected, itertools.pairwise(ends), strict=True)
        row["mismatched"] += sum(one.ids != ids[a:b].tolist() for one, (a, b) in spans)
    return row


def line(name: str, row: Row) -> tuple[str, ...]:
    speeds = (f"{row['bytes'] / 1e6 / row[k]:.2f}" if k in row else "" for k in ("ours", "hf", "tiktoken"))
    faster = f"{row['hf'] / row['ours']:.1f}x"
    return name, f"{row['bytes'] / 1e6:.1f}", *speeds, faster, f"{row['mismatched']:.0f} of {row['documents']:.0f}"


def warm(coder: tokens.Coder) -> None:
    tokens.load(*coder).encode(pa.array(["warm up"], pa.large_string()))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tokenizer", required=True, help="path of a tokenizer.json")
    parser.add_argument("--megabytes", type=float, default=6, help="of every source, for the speed")
    arguments = parser.parse_args()
    files = common.sources(arguments.corpus, 4 if arguments.quick else None)
    print(f"{len(files)} sources, {common.about('tokenizers')}; takes about 5 minutes (--quick: less than one)")
    with tempfile.TemporaryDirectory() as root:
        sections = {"tokens": {"tokenizer": os.path.abspath(arguments.tokenizer)}, "corpus": {"partition_mb": 32}}
        config = common.configuration(root, files, 2, **sections)
        with Engine(root, 2) as engine:
            partitions, coder = corpus.partitions(engine, config), tokens.coder(engine, config)
        limit = 1e6 if arguments.quick else arguments.megabytes * 1e6
        grouped = itertools.groupby(partitions, lambda p: p.source)
        rows = {source: speed(list(group), arguments.tokenizer, limit) for source, group in grouped}
        total = {key: sum(row[key] for row in rows.values()) for key in next(iter(rows.values()))}
        names = ("source", "MB", "MB/s: ours", "tokenizers", "tiktoken", "against tokenizers", "other ids")
        common.table("encoding, one core", names, [line(*item) for item in [*rows.items(), ("all", total)]])
        figures = {
            "mb_s_core": total["bytes"] / 1e6 / total["ours"],
            "vs_hf": total["hf"] / total["ours"],
            "vs_hf_slowest_source": min(row["hf"] / row["ours"] for row in rows.values()),
            "compared_documents": total["documents"],
            "mismatched_documents": total["mismatched"],
        }
        if "tiktoken" in total:
            figures["vs_tiktoken"] = total["tiktoken"] / total["ours"]
        if not arguments.quick:
            run = partial(common.job, config, build=tokens.build, warm=partial(warm, coder))
            figures["two_worker_speedup"] = common.two_worker_speedup(lambda workers: run(workers)[0], 3)
    common.report(arguments.json, figures)


if __name__ == "__main__":
    main()
