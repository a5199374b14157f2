"""The file of documents to take down: its lines, and which documents they name."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataprep.storage import UserError, read_bytes

DOC_LINE = re.compile(r"doc:[0-9]{1,20}")
HASH_LINE = re.compile(r"[0-9a-fA-F]{32}")


def load_exclude(path: str | None) -> pa.Table:
    """The lines, sorted, as the owner's `id` and as what else each may mean: `doc`, `content_hash` (null: nothing).

    A line is an owner's id, a content hash (32 hexadecimal digits), or `doc:` and a document's number. Raises UserError
    where the file is missing or no text.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig") if path else ""
    except FileNotFoundError:
        raise UserError(f"mix.exclude: there is no file {path}; mend the path or set it to null") from None
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"mix.exclude: {path} cannot be read as UTF-8 text ({error})") from None
    lines = sorted({stripped for line in text.split("\n") if (stripped := line.strip())})
    docs = [int(x[4:]) if DOC_LINE.fullmatch(x) and int(x[4:]) < 1 << 64 else None for x in lines]
    hashes = [bytes.fromhex(x) if HASH_LINE.fullmatch(x) else None for x in lines]
    meanings = [pa.array(lines, pa.string()), pa.array(docs, pa.uint64()), pa.array(hashes, pa.binary(16))]
    return pa.table(meanings, ["id", "doc", "content_hash"])


def excludes(lines: pa.Table, documents: pa.Table) -> tuple[np.ndarray, list[str]]:
    """Which rows of a table with doc, id and content_hash are named, and the lines that name one."""
    rows, used = np.zeros(len(documents), bool), np.zeros(len(lines), bool)
    for name in lines.column_names:
        column, meant = documents[name].combine_chunks(), lines[name].combine_chunks()
        rows |= pc.is_in(column, meant).to_numpy(zero_copy_only=False)
        used |= pc.and_(pc.is_valid(meant), pc.is_in(meant, column)).to_numpy(zero_copy_only=False)
    return rows, lines["id"].filter(pa.array(used)).to_pylist()
