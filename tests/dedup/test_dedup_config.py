"""The configuration's checks, and the layout chosen for a threshold."""

import pytest
from pydantic import ValidationError

from dedup.config import DedupConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bands": 20}, r"20 \* 8 = 160, more than permutations \(112\)"),
        ({"bands": None}, "bands is None and rows is 8"),
        ({"keeper": ["oldest", "length"]}, "put it last"),
        ({"keeper": ["length", "length"]}, "length more than once"),
        ({"source_priority": ["web", "books", "web"]}, "source_priority names web more than once"),
        ({"threshold": 0}, "greater than 0"),
        ({"thresold": 0.8}, "Extra inputs"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ValidationError, match=message):
        DedupConfig(**values)


def test_layout_is_as_given_or_fits_the_threshold():
    assert DedupConfig().layout == (14, 8)
    for threshold in (0.5, 0.8, 0.9):
        bands, rows = DedupConfig(threshold=threshold, bands=None, rows=None).layout
        assert bands * rows <= 112
        assert (1 / bands) ** (1 / rows) == pytest.approx(threshold, abs=0.1)  # where the S-curve is steepest


def test_every_field_says_what_it_is_for():
    assert all(field.description for field in DedupConfig.model_fields.values())
