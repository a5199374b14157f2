"""The rules for documents and the `quality:` section of the configuration: which apply where, and what makes a tier.

A *rule* is the interval that a signal must lie in; its name, `SET.SIGNAL`, is the reason it gives. A *rule set* is a
published list of rules and the languages it was made for; it judges documents in those, and those whose language cannot
be told. Each source has its own sets: rules made for English web pages fail code, other languages and long books for no
good reason.
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from dataprep.config import Section
from dataprep.decontaminate import DecontaminateConfig
from dataprep.language import UNKNOWN, codes

TIERS = ("low", "medium", "high")
Interval = tuple[float | None, float | None]


class RuleSet(NamedTuple):
    """Signal -> interval, and the languages that the rules were made for (null: all), less some."""

    rules: dict[str, Interval]
    languages: tuple[str, ...] | None
    but: tuple[str, ...] = ()


RuleSetName = Literal["gopher-quality", "gopher-repetition", "c4", "fineweb"]
UNSPACED = ("zh", "ja", "th", "lo", "km", "my", "bo", "dz")
RULE_SETS: dict[RuleSetName, RuleSet] = {
    # Rae et al., arXiv 2112.11446, table A1; published with at most 100,000 words, but books are what a long-context
    # curriculum lives on.
    "gopher-quality": RuleSet(
        {
            "words": (50, None),
            "mean_word_length": (3, 10),
            "hash_ratio": (None, 0.1),
            "ellipsis_ratio": (None, 0.1),
            "bullet_lines": (None, 0.9),
            "ellipsis_lines": (None, 0.3),
            "letter_words": (0.8, None),
            "stop_words": (2, None),
        },
        ("en",),
    ),
    # The same table; where letters stand for words, short runs of them repeat in any text.
    "gopher-repetition": RuleSet(
        {
            "duplicate_paragraphs": (None, 0.3),
            "duplicate_paragraph_characters": (None, 0.2),
            "duplicate_lines": (None, 0.3),
            "duplicate_line_characters": (None, 0.2),
            "top_2gram": (None, 0.2),
            "top_3gram": (None, 0.18),
            "top_4gram": (None, 0.16),
            "duplicate_5gram": (None, 0.15),
            "duplicate_6gram": (None, 0.14),
            "duplicate_7gram": (None, 0.13),
            "duplicate_8gram": (None, 0.12),
            "duplicate_9gram": (None, 0.11),
            "duplicate_10gram": (None, 0.1),
        },
        None,
        UNSPACED,
    ),
    # Raffel et al., JMLR 2020, section 2.2. C4 removes lines; here a document must have what C4 asks of what is left.
    "c4": RuleSet(
        {"c4_sentences": (3, None), "curly_brackets": (None, 0), "lorem_ipsum": (None, 0)},
        ("en",),
    ),
    # Penedo et al., arXiv 2406.17557, section 3.6.
    "fineweb": RuleSet(
        {
            "terminal_lines": (0.12, None),
            "short_lines": (None, 0.67),
            "duplicate_line_characters": (None, 0.01),
            "newline_ratio": (None, 0.3),
        },
        ("en",),
    ),
}
RULES = {f"{name}.{signal}": limits for name, group in RULE_SETS.items() for signal, limits in group.rules.items()}


def _known(code: str) -> str:
    if code not in codes():
        raise ValueError("take an ISO 639-1 code, such as en or zh")
    return code


Language = Annotated[str, AfterValidator(_known)]


class TierConfig(Section):
    """What score makes a tier, for the documents of a source and language."""

    source: str | None = Field(None, description="for documents of this source; null: any")
    language: Language | None = Field(None, description="for documents in this language (ISO 639-1); null: any")
    by: Literal["score", "quantile"] = Field(
        "score", description="whether low and high are scores, or shares of the documents of each source and language"
    )
    low: float = Field(0.7, ge=0, le=1, description="a document with a score under this is low")
    high: float = Field(0.9, ge=0, le=1, description="a document that fails no rule is high from this score on")

    @model_validator(mode="after")
    def _check(self) -> "TierConfig":
        if self.low > self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}: low must not be above high")
        return self


class QualityConfig(Section):
    """What is measured of every document, which rules each source must meet, and what score makes a tier."""

    rules: tuple[RuleSetName, ...] = Field(
        default=("gopher-quality", "gopher-repetition"),
        description="rule sets of the sources that by_source does not name: " + ", ".join(RULE_SETS),
    )
    by_source: dict[str, tuple[RuleSetName, ...]] = Field(
        default_factory=dict, description="source -> its rule sets; [] = no rules, right for code"
    )
    languages: dict[RuleSetName, tuple[Language, ...]] = Field(
        default_factory=dict, description="rule set -> the languages it judges, in place of those it was made for"
    )
    thresholds: dict[str, Interval] = Field(
        default_factory=dict, description="SET.SIGNAL -> [min, max] in place of the published ones; null = no limit"
    )
    classifier: str | None = Field(None, description="model file of a trained classifier; its scores are recorded")
    score: str = Field(
        "signals", description="what the score is: signals, or a head of the classifier, whose values lie in 0..1"
    )
    tiers: tuple[TierConfig, ...] = Field(
        (TierConfig(),),
        description="what score makes a tier: the first entry that fits a document's source and language",
    )
    decontaminate: DecontaminateConfig = Field(
        default_factory=DecontaminateConfig, description="evaluation sets that must not be trained on"
    )

    @model_validator(mode="after")
    def _check(self) -> "QualityConfig":
        for rule, (low, high) in self.thresholds.items():
            if rule not in RULES:
                raise ValueError(f"thresholds names the rule {rule!r}; there are {', '.join(RULES)}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"thresholds.{rule} is [{low}, {high}]: no value can meet it; put the smaller first")
        if self.score != "signals" and not self.classifier:
            raise ValueError(f"score is {self.score!r}, a classifier's head; name the model in `classifier`")
        return self

    def judges(self, source: str, language: str) -> set[RuleSetName]:
        """The rule sets that a document of this source and language must meet."""
        return {name for name in self.by_source.get(source, self.rules) if self._covers(name, language)}

    def _covers(self, name: RuleSetName, language: str) -> bool:
        languages = self.languages.get(name, RULE_SETS[name].languages)
        if language == UNKNOWN:
            return True
        return language not in RULE_SETS[name].but if languages is None else language in languages

    def tier_of(self, source: str, language: str) -> TierConfig:
        """The entry that fits a document of this source and language."""
        fits = (t for t in self.tiers if t.source in (None, source) and t.language in (None, language))
        return next(fits, TierConfig())
