"""Labels from a language model: whom to ask about, the question under a versioned rubric, and how answers are read."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import Field, field_validator

from dataprep import storage
from dataprep.config import Section
from dataprep.quality import groups
from dataprep.storage import UserError
from kernels.words import mix

RUBRIC = Path(__file__).with_name("rubric.txt")
HIGHEST = 5
STRATUM = ("source", "language", "tier")
ANSWER = {"knowledge", "helpfulness", "domain"}
DOMAINS = (
    "science and mathematics", "technology and programming", "medicine and health", "law and government",
    "business and finance", "history and society", "arts and literature", "news", "education", "everyday life",
    "entertainment and sports", "other",
)  # fmt: skip


class LabelsConfig(Section):
    """Which documents a language model rates, where it answers, and what that may cost."""

    endpoint: str = Field(
        "http://127.0.0.1:8000/v1", description="base URL of an OpenAI-compatible server; /chat/completions is added"
    )
    model: str = Field("", description="name of the model, as the endpoint knows it")
    key_variable: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable that holds the API key; null: no key is sent",
    )
    rubric: str | None = Field(
        None, description="file with a rubric of your own: `version: NAME`, then the text; null: dataprep/rubric.txt"
    )
    domains: tuple[str, ...] = Field(DOMAINS, min_length=2, description="names that `domain` may take")
    per_stratum: int = Field(100, gt=0, description="documents of each source x language x tier, chosen by hash")
    characters: int = Field(8000, gt=0, description="of a document, so many are sent")
    seed: int = Field(0, description="other seed, other sample")
    max_tokens: int = Field(200, gt=0, description="longest answer")
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what the endpoint calls that limit"
    )
    request: dict[str, Any] = Field(
        default_factory=lambda: {"temperature": 0, "response_format": {"type": "json_object"}},
        description="further fields of the request",
    )
    concurrency: int = Field(16, gt=0, le=1024, description="questions under way at once")
    timeout_s: float = Field(120, gt=0, description="an answer must be complete after so many seconds")
    retries: int = Field(5, ge=0, description="times a call is repeated that failed (HTTP 429, 5xx, lost connection)")
    backoff_s: float = Field(1, gt=0, description="wait before the first repetition; doubled each time, up to 60 s")
    malformed_retries: int = Field(2, ge=0, description="times a question is repeated whose answer was malformed")
    partition_rows: int = Field(32, gt=0, description="rows committed together; a kill loses those under way")
    price_input: float = Field(0, ge=0, description="price of a million tokens read")
    price_output: float = Field(0, ge=0, description="price of a million tokens written")
    budget: str | None = Field(
        None,
        pattern=r"^\d+(\.\d+)?( ?tokens)?$",
        description="`12.50`: money, in the prices' currency; `2000000 tokens`: tokens; null: no limit",
    )

    @field_validator("endpoint")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        if "@" in value or "?" in value:
            raise ValueError("must not hold a user, password or query: keys come from the environment (key_variable)")
        return value.rstrip("/")

    @field_validator("request")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        ours = {"model", "messages", "max_tokens", "max_completion_tokens", "stream", "n"} & set(value)
        if ours:
            raise ValueError(f"sets {', '.join(sorted(ours))}, which the job sets itself")
        return value


class Rubric:
    """The question: `version` and `text` as it is sent, and the `hash` of that text."""

    def __init__(self, config: LabelsConfig):
        path = config.rubric or str(RUBRIC)
        try:
            first, _, text = storage.read_bytes(path).decode().partition("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"labels.rubric: {path} cannot be read ({error})") from None
        if not first.startswith("version:") or "{domains}" not in text:
            raise UserError(f"labels.rubric: {path} must begin with `version: NAME` and contain {{domains}}")
        self.version = first.removeprefix("version:").strip()
        self.text = text.replace("{domains}", "; ".join(config.domains)).strip()
        self.hash = xxhash.xxh3_128_hexdigest(self.text.encode())


def sample(documents: pa.Table, quality: pa.Table, config: LabelsConfig) -> pa.Table:
    """The documents of one partition that may be asked about: of each stratum the `per_stratum` first by hash.

    documents: doc, source, text, content_hash. quality: the same rows. Returns doc, place (uint64, equal for equal
    contents), source, language, tier (string), text.
    """
    salt = np.uint64(xxhash.xxh3_64_intdigest(b"labels", config.seed % 2**64))
    place = mix(storage.hash_halves(documents["content_hash"])[:, 0] ^ salt)
    strings = {name: t[name].cast(pa.string()) for name, t in zip(STRATUM, (documents, quality, quality), strict=True)}
    table = pa.table({"doc": documents["doc"], "place": place} | strings)
    chosen = choose(table, config.per_stratum)
    text = pc.utf8_slice_codeunits(documents["text"].take(chosen), 0, config.characters)
    return table.take(chosen).append_column("text", text)


def choose(table: pa.Table, count: int) -> pa.Array:
    """Rows of a table as `sample` makes them: of each stratum the `count` first contents by place; first of all strata
    first, then second, so that whoever stops early has asked about all of them alike."""
    place, doc = table["place"].to_numpy(), table["doc"].to_numpy()
    stratum, _ = groups(*(table[name] for name in STRATUM))
    order = np.lexsort((doc, place, stratum))
    same = (np.diff(stratum[order]) == 0) & (place[order][1:] == place[order][:-1])
    order = order[np.append(True, ~same)[: len(order)]]
    rank = np.arange(len(order)) - np.searchsorted(stratum[order], stratum[order])
    order, rank = order[rank < count], rank[rank < count]
    return pa.array(order[np.lexsort((doc[order], place[order], rank))], pa.int64())


def messages(rubric: Rubric, text: str) -> list[dict[str, str]]:
    """The question about a text. The marker around it is none that the text itself contains."""
    number = 0
    while (marker := f"=== {xxhash.xxh3_64_hexdigest(f'{number} {text}'.encode())} ===") in text:
        number += 1
    question = f"{marker}\n{text}\n{marker}\nRate the document between the markers. Answer with the JSON object only."
    return [{"role": "system", "content": rubric.text}, {"role": "user", "content": question}]


def parse(answer: str, domains: tuple[str, ...]) -> dict[str, Any]:
    """The ratings in an answer. ValueError, with a short reason, for anything but one object of just the right form."""
    try:
        value = json.loads(answer, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {str(error)[:80]}") from None
    if not isinstance(value, dict) or set(value) != ANSWER:
        raise ValueError("not an object with exactly the keys knowledge, helpfulness and domain")
    for name in ("knowledge", "helpfulness"):
        rating = value[name]
        if type(rating) is not int or not 0 <= rating <= HIGHEST:
            raise ValueError(f"{name} is {str(rating)[:20]!r}, not a whole number from 0 to {HIGHEST}")
    if value["domain"] not in domains:
        raise ValueError(f"domain is {str(value['domain'])[:40]!r}, not one of the names")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)
