"""The front against the definition, word for word."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slug_lightning.methods.slug.candidates import pareto_front

few = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
points = st.lists(st.tuples(few, few) | st.tuples(st.floats(0, 1e6), st.floats(0, 1)), max_size=14)


def beats(one, other) -> bool:
    return one[0] >= other[0] and one[1] <= other[1] and (one[0] > other[0] or one[1] < other[1])


@given(points)
def test_it_is_what_the_definition_says(given_points):
    assert pareto_front(given_points) == [not any(beats(q, p) for q in given_points) for p in given_points]


@given(points.flatmap(lambda p: st.tuples(st.just(p), st.permutations(range(len(p))))))
def test_the_order_of_the_points_does_not_matter(points_and_order):
    given_points, order = points_and_order
    front = pareto_front(given_points)
    assert pareto_front([given_points[i] for i in order]) == [front[i] for i in order]


@given(points, st.data())
def test_equal_points_stand_or_fall_together(given_points, data):
    doubled = given_points + data.draw(st.lists(st.sampled_from(given_points), max_size=5) if given_points else st.just([]))
    by_point = {}
    for point, on_front in zip(doubled, pareto_front(doubled), strict=True):
        assert by_point.setdefault(point, on_front) == on_front


@given(points.filter(len))
def test_some_point_is_always_on_the_front(given_points):
    assert any(pareto_front(given_points))


@given(points.filter(len))
def test_what_is_off_the_front_is_beaten_by_something_on_it(given_points):
    front = pareto_front(given_points)
    best = [p for p, on in zip(given_points, front, strict=True) if on]
    assert all(on or any(beats(q, p) for q in best) for p, on in zip(given_points, front, strict=True))


def test_no_points_have_no_front():
    assert pareto_front([]) == []


def test_a_tie_in_one_value_is_decided_by_the_other():
    assert pareto_front([(1.0, 0.2), (1.0, 0.1)]) == [False, True]
    assert pareto_front([(1.0, 0.1), (2.0, 0.1)]) == [False, True]
