"""Shares over a stage: transitions, late blends, and densities that make the stage's even flow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixer.config import Blend
from mixer.planner import make_plan
from mixer.shares import Course, courses, densities
from tests.mixer.corpus import config
from tests.mixer.recipes import inventory

SOURCES = ["books", "qa", "web"]


def course_of(natural=(0.25, 0.25, 0.5), **stage) -> Course:
    first = {"tokens": 100, "source_weights": {"books": 0.2, "qa": 0.0, "web": 0.8}}
    mix = config(first, {"tokens": 100} | stage)
    return courses(mix, SOURCES, np.array([natural, natural]))[1]


def at(course: Course, x: float) -> list[float]:
    return [float(np.interp(x, course.x, course.shares[:, j])) for j in range(len(SOURCES))]


def test_weights_move_linearly_from_the_stage_before():
    course = course_of(source_weights={"books": 0.6, "qa": 0.1, "web": 0.3}, transition=0.5)
    assert at(course, 0) == pytest.approx([0.2, 0, 0.8])
    assert at(course, 0.25) == pytest.approx([0.4, 0.05, 0.55])
    assert at(course, 0.5) == at(course, 0.9) == pytest.approx([0.6, 0.1, 0.3])
    assert course.mean == pytest.approx([0.5, 0.075, 0.425])


def test_a_late_blend_comes_in_the_last_part_only_and_the_others_make_room():
    course = course_of(blend={"sources": {"qa": 0.1}, "last": 0.2})
    assert at(course, 0.79) == pytest.approx([1 / 3, 0, 2 / 3])
    assert at(course, 0.81) == pytest.approx([0.3, 0.1, 0.6])
    assert course.mean[1] == pytest.approx(0.02)


def test_sources_that_are_not_named_share_the_rest_as_they_come():
    assert course_of(source_weights={"qa": 0.4}).mean == pytest.approx([0.2, 0.4, 0.4])
    assert course_of(source_weights={"qa": 0.4, "books": 0.6}).mean == pytest.approx([0.6, 0.4, 0])


@given(st.floats(0, 1), st.none() | st.floats(0.01, 1), st.lists(st.floats(0.9, 1.1), min_size=3, max_size=3))
def test_densities_have_integral_one_and_flow_evenly(transition, last, planned):
    blend = {"sources": {"qa": 0.1}, "last": last} if last else None
    course = course_of(transition=transition, source_weights={"books": 0.3, "qa": 0.2, "web": 0.5}, blend=blend)
    assert course.x[0] == 0 and course.x[-1] == 1 and (np.diff(course.x) >= 0).all()
    assert course.shares.sum(axis=1) == pytest.approx(1)
    tokens = 1e6 * course.mean * np.array(planned)  # near to what was asked, as it is where caps allow
    found = densities(course, tokens)
    assert (found >= 0).all() and course.widths @ found == pytest.approx(1)
    wide = course.widths > 1e-3
    assert (found @ tokens)[wide] == pytest.approx(tokens.sum(), rel=0.02)


def test_a_plan_says_when_its_sources_come():
    sums = inventory([("books", "low", "short", 5000), ("qa", "low", "short", 5000), ("web", "low", "short", 5000)], 2)
    mix = config(
        {"tokens": 1000, "source_weights": {"books": 0.5, "web": 0.5}},
        {"tokens": 1000, "transition": 0.4, "source_weights": {"web": 1.0}, "blend": {"sources": {"qa": 0.1}}},
    )
    first, second = make_plan(sums, mix).stages
    assert first.densities == {} and first.asked == {"books": 0.5, "qa": 0.0, "web": 0.5}
    assert second.asked == pytest.approx({"books": 0.1, "qa": 0.02, "web": 0.88})
    assert {c.source: c.planned for c in second.cells} == {"books": 100, "qa": 20, "web": 880}
    assert second.densities["qa"] == [
        pytest.approx(knot, abs=1e-6) for knot in [(0, 0), (0.4, 0), (0.8, 0), (0.8, 5), (1, 5)]
    ]
    assert second.densities["books"][0] == pytest.approx((0, 5)) and second.densities["books"][1] == (0.4, 0)
    assert [x for x, _ in second.densities["web"]] == pytest.approx([0, 0.4, 0.8, 0.8, 1])


def test_a_blend_with_nothing_in_it_is_refused():
    with pytest.raises(ValueError, match=r"blend\.sources sum to 0"):
        Blend(sources={"qa": 0})
