"""Writing a stage's shard log: `stage.json`, shards, `end.json` and the packer's heartbeat."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from dataprep.storage import Attempt, UserError, ensure_json, join, read_json, write_json

BATCH_TOKENS = 1 << 17
SHARD = "shard"  # the logical name of a shard's one file in its commit
HEARTBEAT = "heartbeat.json"  # beside the shards: changes while the packer works
QUARANTINE = "quarantine.json"  # beside the shards: batches found damaged

# One document, or a piece of one, in a packed sequence. `sequence` and `start` say where it lies; they are not
# stored, because the order and the lengths of a row's segments give them.
SEGMENT = np.dtype(
    [
        ("sequence", np.int64),  # row
        ("start", np.int64),  # first token's place in the row
        ("length", np.int64),
        ("doc", np.uint64),
        ("offset", np.uint64),  # first token's place in the document
        ("copy", np.uint16),
        ("source", np.uint16),
        ("tier", np.uint8),
        ("length_class", np.uint8),
    ]
)

STORED = {
    "doc": pa.uint64(),
    "offset": pa.uint64(),
    "length": pa.uint32(),
    "copy": pa.uint16(),
    "source": pa.uint16(),
    "tier": pa.uint8(),
    "length_class": pa.uint8(),
}


@dataclass(frozen=True)
class StageInfo:
    """What `stage.json` says: all a reader must know about a stage before its first shard appears.

    tokens: planned. source, tier and length_class of a segment are indices into sources, tiers and classes.
    tokenizer, plan: fingerprints. shards: how many there will be. compression: of the shards, "zstd" or "none".
    """

    stage: str
    index: int
    context: int
    rope_base: float
    tokens: int
    vocab_size: int
    eos: int
    token_dtype: str
    sources: tuple[str, ...]
    tiers: tuple[str, ...]
    classes: tuple[str, ...]
    tokenizer: str
    plan: str
    shards: int
    compression: str = "zstd"

    def save(self, directory: str) -> None:
        ensure_json(join(directory, "stage.json"), asdict(self))

    @classmethod
    def load(cls, directory: str) -> "StageInfo":
        """Raises UserError where the directory holds no stage, or one written by another version of the format."""
        path = join(directory, "stage.json")
        value = read_json(path, stage=str)
        if value is None:
            raise UserError(f"no stage at {directory}: {path} does not exist; plan the mixture first or mend the path")
        if set(value) != {f.name for f in fields(cls)}:
            odd = ", ".join(sorted(set(value) ^ {f.name for f in fields(cls)}))
            raise UserError(f"{path} is not of this version's format (differs in: {odd}); pack the stage again")
        return cls(**value | {name: tuple(value[name]) for name in ("sources", "tiers", "classes")})

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.token_dtype)

    @property
    def batch_rows(self) -> int:
        """Sequences in a record batch: as many as 128K tokens hold, but at least one."""
        return max(1, BATCH_TOKENS // self.context)

    def schema(self) -> pa.Schema:
        repeated = {"stage": self.stage, "plan": self.plan, "tokenizer": self.tokenizer, "eos": str(self.eos)}
        return pa.schema(
            [
                ("tokens", pa.list_(pa.from_numpy_dtype(self.dtype), self.context)),
                ("segments", pa.list_(pa.struct(list(STORED.items())))),
            ],
            metadata=repeated,
        )


def shard_key(shard: int) -> str:
    return f"{shard:05d}"


def write_shard(out: Attempt, tokens: np.ndarray, segments: np.ndarray, info: StageInfo) -> None:
    """Write one shard's file; the caller commits it with at least the aggregate `sequences`.

    tokens: (n, context) of the stage's dtype, padded with EOS. segments: SEGMENT, in row order.
    """
    if tokens.ndim != 2 or tokens.shape[1] != info.context or tokens.dtype != info.dtype:
        raise ValueError(f"need ({info.context},) rows of {info.dtype}, not {tokens.shape} of {tokens.dtype}")
    schema = info.schema()
    options = pa.ipc.IpcWriteOptions(compression=None if info.compression == "none" else info.compression)
    row_starts = np.searchsorted(segments["sequence"], np.arange(len(tokens) + 1))
    with out.file(SHARD, ".arrow") as path, pa.ipc.new_file(path, schema, options=options) as writer:
        for first in range(0, len(tokens), info.batch_rows):
            rows = np.ascontiguousarray(tokens[first : first + info.batch_rows])
            starts = row_starts[first : first + len(rows) + 1]
            part = segments[starts[0] : starts[-1]]
            batch = pa.record_batch(
                [_token_column(rows), _segment_column(part, starts - starts[0])],
                schema=schema,
            )
            writer.write_batch(batch, custom_metadata=checksums(rows, part))


def checksums(tokens: np.ndarray, segments: np.ndarray) -> dict[str, str]:
    """A batch's custom metadata: xxh3-64 over the token bytes, and over the stored segment columns one by one."""
    digest = xxhash.xxh3_64()
    for name, stored in STORED.items():
        digest.update(segments[name].astype(str(stored)).tobytes())
    digest.update(segments["start"].tobytes())  # says which segment begins a row
    return {"xxh3": xxhash.xxh3_64_hexdigest(np.ascontiguousarray(tokens).data), "xxh3_segments": digest.hexdigest()}


def write_end(directory: str, sequences: Iterable[int], totals: dict[str, Any]) -> dict[str, Any]:
    """Write `end.json`: the stage is complete. sequences: of each shard, in order. totals: the stage's, for people."""
    counts = [int(n) for n in sequences]
    value = {"shards": len(counts), "sequences": sum(counts), "shard_sequences": counts, "totals": totals}
    ensure_json(join(directory, "end.json"), value)
    return value


def read_end(directory: str) -> dict[str, Any] | None:
    """What `end.json` says, as from `write_end`; None while the stage is not complete."""
    return read_json(join(directory, "end.json"), shards=int, sequences=int, shard_sequences=list, totals=dict)


def beat(directory: str, failed: str | None = None) -> None:
    """Tell readers that the packer is alive; or that it has given up, and why."""
    write_json(join(directory, HEARTBEAT), {"time": time.time()} | ({"failed": failed} if failed else {}))


def _token_column(rows: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def _segment_column(segments: np.ndarray, offsets: np.ndarray) -> pa.Array:
    columns = [pa.array(segments[name].astype(str(stored))) for name, stored in STORED.items()]
    structs = pa.StructArray.from_arrays(columns, fields=[pa.field(n, t) for n, t in STORED.items()])
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), structs)
