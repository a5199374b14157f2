"""Learning rate and batch size as functions of tokens: the paper's recipe, and properties of every schedule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataprep.storage import UserError
from trainer.config import Phase, TrainConfig
from trainer.schedule import learning_rate, phase_ends

PAPER = (
    Phase(tokens=8_000_000_000, lr=2e-4),
    Phase(lr=2e-4, shape="constant"),
    Phase(tokens=3_200_000_000_000, lr=1.3e-4, shape="constant"),
    Phase(tokens=1_000_000_000_000, lr=3e-5, shape="exponential"),
)
SHAPES = st.sampled_from(["linear", "cosine", "exponential", "constant"])
rates = st.floats(1e-6, 1e-2)


@st.composite
def schedules(draw):
    """Phases of 1 to 100 tokens each, the first linear; perhaps one of them takes the rest."""
    phases = [Phase(tokens=draw(st.integers(1, 100)), lr=draw(rates))]
    for _ in range(draw(st.integers(0, 4))):
        phases.append(Phase(tokens=draw(st.integers(1, 100)), lr=draw(rates), shape=draw(SHAPES)))
    if draw(st.booleans()):
        phases.insert(draw(st.integers(1, len(phases))), Phase(lr=draw(rates), shape=draw(SHAPES)))
    return TrainConfig(schedule=phases).schedule


def test_the_papers_schedule():
    """Warm-up to 2e-4, 7.2 T tokens up to there, 3.2 T at 1.3e-4, then 1 T down to 3e-5 exponentially."""
    planned = 11_400_000_000_000
    assert phase_ends(PAPER, planned) == [8e9, 7.2e12, 10.4e12, 11.4e12]
    points = {4e9: 1e-4, 8e9: 2e-4, 5e12: 2e-4, 7.3e12: 1.3e-4, 10.3e12: 1.3e-4, 11.4e12: 3e-5, 12e12: 3e-5}
    points[10.9e12] = (1.3e-4 * 3e-5) ** 0.5  # halfway down, the geometric mean
    for at, expected in points.items():
        assert learning_rate(PAPER, int(at), planned) == pytest.approx(expected, rel=1e-6)


@given(schedules(), st.integers(500, 1000))
def test_rates_stay_between_their_phases_ends(schedule, planned):
    ends = phase_ends(schedule, planned)
    start, before = 0.0, 0.0
    for phase, end in zip(schedule, ends, strict=True):
        assert learning_rate(schedule, end, planned) == pytest.approx(phase.lr)
        inside = [learning_rate(schedule, start + (end - start) * x, planned) for x in (0.1, 0.4, 0.7, 1)]
        if phase.shape == "constant":
            assert set(inside) == {phase.lr}
        else:
            assert inside == sorted(inside, reverse=phase.lr < before)
            assert min(before, phase.lr) * 0.999 <= min(inside) <= max(inside) <= max(before, phase.lr) * 1.001
            assert learning_rate(schedule, start + (end - start) * 1e-6, planned) == pytest.approx(
                before, rel=1e-3, abs=1e-6
            )
        start, before = end, phase.lr
    assert learning_rate(schedule, planned * 2, planned) == schedule[-1].lr
    if any(p.tokens is None for p in schedule):
        assert ends[-1] == pytest.approx(planned)


def test_shares_are_tokens_too():
    by_share = TrainConfig(schedule=[Phase(share=0.25, lr=1e-3), Phase(share=0.75, lr=1e-4, shape="cosine")]).schedule
    by_tokens = (Phase(tokens=250, lr=1e-3), Phase(tokens=750, lr=1e-4, shape="cosine"))
    for seen in range(0, 1001, 50):
        assert learning_rate(by_share, seen, 1000) == pytest.approx(learning_rate(by_tokens, seen, 1000))


def test_phases_longer_than_the_stage_are_refused():
    with pytest.raises(UserError, match="last 4,208,000,000,000 tokens and one takes the rest, but"):
        learning_rate(PAPER, 0, 4_000_000_000_000)
