"""Training of the quality classifier: labelled rows in, a calibrated model with its metrics out. One thread."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash
from scipy.optimize import minimize
from scipy.special import expit

from dataprep import metrics
from dataprep.classifier import HEADS, RATINGS, Classifier, ClassifierConfig
from dataprep.readers import named_records
from dataprep.storage import UserError
from kernels.classifier import FOLDING, train_epoch
from kernels.words import mix, word_hashes

GROUPS = ("language", "source")  # fields by which the metrics are broken down
LABELS = {"good": 1.0, "bad": 0.0}
LEAST_SLOPE = 0.01  # a head that learnt nothing must not be turned upside down by chance
TRAIN, CALIBRATE, TEST = range(3)


@dataclass
class Row:
    """A labelled text: `labels` (head -> 0..1, and perhaps `domain` -> name), `groups` (language, source).

    unit: rows of one unit stay together when some are held out; the text itself where none is given.
    """

    text: bytes
    labels: dict[str, Any]
    groups: dict[str, str]
    unit: str


def read_rows(paths: list[str], config: ClassifierConfig) -> Iterator[Row]:
    """The rows of the files that bear a label; rows without any (a document nobody could rate) are passed over.

    UserError at the first row that cannot be read, or whose label is out of range.
    """
    for path in paths:
        for number, text, fields in named_records("classifier.labels", path):
            if labels := _labels(fields, config.scale, f"{path}, record {number}"):
                groups = {name: str(fields[name]) for name in GROUPS if fields.get(name) is not None}
                yield Row(text[: config.characters].encode(), labels, groups, str(fields.get("group") or ""))


def _labels(fields: dict[str, Any], scale: float, where: str) -> dict[str, Any]:
    labels: dict[str, Any] = {}
    for name in RATINGS:
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= scale:
            raise UserError(f"{where}: {name} is {value!r}; it must be a number from 0 to {scale:g} (classifier.scale)")
        labels[name] = value / scale
    if (value := fields.get("label")) is not None:
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        if not number and not (isinstance(value, str) and value in LABELS):
            raise UserError(f"{where}: label is {value!r}; it must be good or bad, or a number from 0 to 1")
        labels["quality"] = LABELS[value] if isinstance(value, str) else float(value)
    if (value := fields.get("domain")) is not None:
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: domain is {value!r}; it must be a name")
        labels["domain"] = value
    return labels


def train(rows: Iterable[Row], config: ClassifierConfig) -> Classifier:
    """A classifier with every head that has labels. UserError where these are too few, or all the same."""
    rows = sorted(rows, key=lambda row: (row.unit, row.text, sorted(row.labels.items())))  # any order of files will do
    heads = tuple(name for name in HEADS if any(name in row.labels for row in rows))
    domains = tuple(sorted({row.labels["domain"] for row in rows if "domain" in row.labels}))
    domains = domains if len(domains) > 1 else ()
    if not heads and not domains:
        raise UserError(
            "classifier.labels: no row bears a label: knowledge, helpfulness, label, or domain with two or more names"
        )
    targets = _targets(rows, heads, domains)
    part = _parts(rows, config)
    for k, name in enumerate(heads):
        _check_labels("label" if name == "quality" else name, targets[:, k : k + 1], part)
    if domains:
        _check_labels("domain", targets[:, len(heads) :], part)
    offsets = np.concatenate([[0], np.cumsum([len(row.text) for row in rows])]).astype(np.int64)
    words, offsets = word_hashes(np.frombuffer(b"".join(row.text for row in rows), np.uint8), offsets, FOLDING)
    table, bias = _descend(words, offsets, targets, np.flatnonzero(part == TRAIN), len(heads), config)
    raw = Classifier(heads, domains, table, bias).logits(words, offsets)
    if not all(np.isfinite(x).all() for x in (table, bias, raw)):
        raise UserError(f"training diverged: the model holds numbers that are not finite; lower rate ({config.rate:g})")
    for k in range(len(heads)):
        there = (part == CALIBRATE) & ~np.isnan(targets[:, k])
        slope, shift = _platt(raw[there, k].astype(np.float64), targets[there, k])
        table[:, k], bias[k] = table[:, k] * slope, bias[k] * slope + shift
    model = Classifier(heads, domains, table, bias)
    test = part == TEST
    groups = [row.groups for row, tested in zip(rows, test, strict=True) if tested]
    found = _metrics(model, model.logits(words, offsets)[test], targets[test], groups)
    found["rows"] = {"train": int((part == TRAIN).sum()), "calibrate": int((part == CALIBRATE).sum())}
    about = {"config": config.model_dump(mode="json", exclude={"labels"}), "metrics": found}
    return replace(model, about=about)


def _targets(rows: list[Row], heads: tuple[str, ...], domains: tuple[str, ...]) -> np.ndarray:
    """float32[rows, outputs] in 0..1; NaN where a row has no such label."""
    targets = np.full((len(rows), len(heads) + len(domains)), np.nan, np.float32)
    for r, row in enumerate(rows):
        for k, name in enumerate(heads):
            targets[r, k] = row.labels.get(name, np.nan)
        if domains and "domain" in row.labels:
            targets[r, len(heads) :] = [row.labels["domain"] == name for name in domains]
    return targets


def _check_labels(field: str, targets: np.ndarray, part: np.ndarray) -> None:
    """UserError where a field's labels are too few, or tell nothing apart."""
    there = ~np.isnan(targets[:, 0])
    counts = np.bincount(part[there], minlength=3).tolist()
    if min(counts) < 2:
        raise UserError(
            f"{field} has {sum(counts)} labelled rows, {counts[TRAIN]} to train, {counts[CALIBRATE]} to calibrate "
            f"and {counts[TEST]} to test on: too few; label more, or raise classifier.held_out"
        )
    if len(np.unique(targets[there & (part == TRAIN)], axis=0)) < 2:
        raise UserError(
            f"{field}: all {counts[TRAIN]} rows to train on bear the same label, so there is nothing to tell apart; "
            "label texts of the other kind too, or train on rows without it"
        )


def _parts(rows: list[Row], config: ClassifierConfig) -> np.ndarray:
    """TRAIN, CALIBRATE or TEST for each row, by the hash of its unit."""
    keys = (row.unit.encode() or row.text for row in rows)
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(key, config.seed % 2**64) for key in keys), np.uint64, len(rows))
    place = mix(hashes) / 2.0**64
    return np.where(place >= config.held_out, TRAIN, np.where(place >= config.held_out / 2, CALIBRATE, TEST))


def _descend(
    words: np.ndarray, offsets: np.ndarray, targets: np.ndarray, chosen: np.ndarray, singles: int, config: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(table, bias) after all epochs: embeddings and the weights of the heads, multiplied out.

    Embeddings begin at zero, so that an n-gram never seen adds nothing; what tells the dimensions apart are the
    weights, normal by hash.
    """
    outputs = targets.shape[1]
    places = np.arange(2 * config.dimensions * outputs, dtype=np.uint64)
    uniform = (mix(places + np.uint64(config.seed % 2**32 << 20) + np.uint64(1)) + 0.5) / 2.0**64
    radius, angle = np.sqrt(-2 * np.log(uniform[::2])), 2 * np.pi * uniform[1::2]  # Box and Muller
    weights = (radius * np.cos(angle) / np.sqrt(config.dimensions)).reshape(-1, outputs).astype(np.float32)
    embeddings = np.zeros((config.buckets, config.dimensions), np.float32)
    squares, bias = np.zeros(config.buckets, np.float32), np.zeros(outputs, np.float32)
    for epoch in range(config.epochs):
        rate = np.float32(config.rate * (1 - epoch / config.epochs))
        order = chosen[np.argsort(mix(mix(chosen.astype(np.uint64)) + np.uint64(epoch)), kind="stable")]
        train_epoch(words, offsets, order, targets, singles, embeddings, weights, bias, squares, rate)
    # Column by column: a BLAS product may depend on the number of threads.
    table = np.zeros((config.buckets, outputs), np.float32)
    for j, row in enumerate(weights):
        table += embeddings[:, j, None] * row
    return table, bias


def _platt(z: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """slope and shift of the logistic of z that fits y in 0..1 best (Platt 1999; drawn lightly to slope 1, shift 0).

    They keep the order of the scores, so that quantiles mean something, and fold into weights and bias.
    """

    def loss(fitted: np.ndarray) -> tuple[float, np.ndarray]:
        logits, drift = fitted[0] * z + fitted[1], fitted - (1, 0)
        error = expit(logits) - y
        value = (np.logaddexp(0, logits) - y * logits).sum() + drift @ drift / 2
        return value, np.array([(error * z).sum(), error.sum()]) + drift

    slope, shift = minimize(loss, (1, 0), jac=True, bounds=[(LEAST_SLOPE, None), (None, None)]).x
    return float(slope), float(shift)


def _metrics(
    model: Classifier, logits: np.ndarray, targets: np.ndarray, groups: list[dict[str, str]]
) -> dict[str, Any]:
    """head -> `all`, `language` -> name and `source` -> name -> rows, auc, spearman, ece (accuracy for domains)."""
    result: dict[str, Any] = {}
    for k, head in enumerate([*model.heads, "domain"] if model.domains else model.heads):
        there = ~np.isnan(targets[:, k])
        result[head] = {"all": _agreement(logits[there], targets[there], len(model.heads), k)}
        for kind in GROUPS:
            names = np.array([g.get(kind, "") for g in groups])
            rows = {name: there & (names == name) for name in sorted(set(names[there].tolist()) - {""})}
            result[head][kind] = {
                name: _agreement(logits[here], targets[here], len(model.heads), k) for name, here in rows.items()
            }
    return result


def _agreement(logits: np.ndarray, targets: np.ndarray, singles: int, k: int) -> dict[str, Any]:
    """How output k agrees with its labels; behind the `singles`, how often the likeliest domain is the right one."""
    if k < singles:
        return metrics.agreement(expit(logits[:, k].astype(np.float64)), targets[:, k])
    right = logits[:, singles:].argmax(1) == targets[:, singles:].argmax(1)
    return {"rows": len(right), "accuracy": round(float(right.mean()), 4)}
