"""A small packed root for the trainer's tests: learnable documents, written with the real shard writer."""

from pathlib import Path

import numpy as np

from dataprep.storage import Attempt, write_json
from mixer.shards import SEGMENT, StageInfo, shard_key, write_end, write_shard

VOCABULARY, EOS = 61, 0


def documents(seed: int, tokens: int, longest: int) -> list[np.ndarray]:
    """Counting sequences with a step of their own, each ending with EOS: `tokens` of them or a little more."""
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while sum(map(len, found)) < tokens:
        start, stride, length = rng.integers([1, 1, 2], [VOCABULARY, 4, longest])
        found.append(np.append((start + stride * np.arange(length)) % (VOCABULARY - 1) + 1, EOS))
    return found


def pack(docs: list[np.ndarray], context: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole documents into rows (a long one is cut), what is left of a row is padding; sources take turns."""
    rows: list[np.ndarray] = []
    segments = []
    used = context
    for number, doc in enumerate(docs):
        for offset in range(0, len(doc), context):
            piece = doc[offset : offset + context]
            if used + len(piece) > context:
                rows.append(np.full(context, EOS))
                used = 0
            rows[-1][used : used + len(piece)] = piece
            segments.append((len(rows) - 1, used, len(piece), number, offset, 0, number % 2, 0, 0))
            used += len(piece)
    return np.array(rows, np.uint16), np.array(segments, SEGMENT)


def write_stage(root: Path, stage: str, index: int, context: int, tokens: int, rope_base: float = 1e4) -> None:
    """A whole stage of two shards under `root`, published in `latest/`."""
    directory = root / f"pack-{stage}"
    rows, segments = pack(documents(index, tokens, longest=3 * context // 4), context)
    info = StageInfo(
        stage=stage, index=index, context=context, rope_base=rope_base, tokens=int(segments["length"].sum()),
        vocab_size=VOCABULARY, eos=EOS, token_dtype="uint16", sources=("web", "books"), tiers=("high",),
        classes=("short",), tokenizer="t", plan="p", shards=2,
    )  # fmt: skip
    info.save(str(directory))
    half = len(rows) // 2
    for shard, (a, b) in enumerate([(0, half), (half, len(rows))]):
        inside = segments[(segments["sequence"] >= a) & (segments["sequence"] < b)].copy()
        inside["sequence"] -= a
        out = Attempt(str(directory), shard_key(shard), {})
        write_shard(out, rows[a:b], inside, info)
        out.commit({"sequences": b - a})
    write_end(str(directory), [half, len(rows) - half], {})
    write_json(str(root / "latest" / f"pack-{stage}.json"), {"directory": directory.name})


def write_root(root: Path) -> None:
    write_stage(root, "held-out", 99, 48, 600)
    write_stage(root, "base", 0, 48, 6000)
    write_stage(root, "longer", 1, 96, 3000, rope_base=1e6)
