"What must hold for planes whatever their angle, and what the paper's rule cannot hold."
import numpy as np
import pytest
from highdicom.spatial import PixelToReferenceTransformer, ReferenceToPixelTransformer

from mscan.geometry import Plane, centre, contains, corners, crossing_line, plane_distances


def random_plane(rng, shape=(90, 120)):
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return Plane(rng.normal(size=3) * 150, turn.T[:2].ravel(), rng.uniform(.2, 2.5, 2), shape)


@pytest.mark.parametrize('seed', range(20))
def test_agrees_with_highdicom_both_ways(seed):
    rng = np.random.default_rng(seed)
    plane = random_plane(rng)
    facts = dict(image_position=plane.position.tolist(), image_orientation=plane.orientation.tolist(), pixel_spacing=plane.spacing.tolist())
    xy = rng.integers(0, 90, (50, 2))
    xyz = PixelToReferenceTransformer(**facts)(xy)
    assert np.abs(plane.to_patient(xy) - xyz).max() < 1e-6
    away = xyz + rng.normal(size=(50, 1)) * 20 * plane.normal
    judged = ReferenceToPixelTransformer(**facts, spacing_between_slices=1., round_output=False)(away)
    assert np.abs(plane.to_pixel(away) - judged[:, :2]).max() < 1e-6
    assert np.abs(plane.distance(away) - judged[:, 2]).max() < 1e-6


@pytest.mark.parametrize('seed', range(10))
def test_flipped_storage_is_the_same_patient(seed):
    "Columns stored the other way round with matching geometry: the same place in the patient."
    rng = np.random.default_rng(seed)
    plane = random_plane(rng)
    columns = plane.shape[1]
    flipped = Plane(plane.to_patient([columns - 1, 0]), np.concatenate([-plane.orientation[:3], plane.orientation[3:]]), plane.spacing, plane.shape)
    xy = rng.uniform(0, 80, (20, 2))
    assert np.allclose(plane.to_patient(xy), flipped.to_patient(np.c_[columns - 1 - xy[:, 0], xy[:, 1]]))
    assert np.allclose(np.abs(plane.distance(plane.position + 5)), np.abs(flipped.distance(plane.position + 5)))


def test_turning_the_patient_turns_the_answers():
    rng = np.random.default_rng(1)
    plane, points = random_plane(rng), rng.normal(size=(30, 3)) * 80
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    moved = Plane(turn @ plane.position + 7, (plane.orientation.reshape(2, 3) @ turn.T).ravel(), plane.spacing, plane.shape)
    assert np.allclose(plane.to_pixel(points), moved.to_pixel(points @ turn.T + 7))
    assert np.allclose(np.abs(plane.distance(points)), np.abs(moved.distance(points @ turn.T + 7)))


def test_spacing_order_is_rows_then_columns():
    plane = Plane([0, 0, 0], [1, 0, 0, 0, 1, 0], [3, .5], (10, 10))
    assert np.allclose(plane.to_patient([4, 2]), [2, 6, 0])


@pytest.mark.parametrize('broken, word', [
    (dict(orientation=[1, 0, 0, 1, 0, 0]), 'perpendicular'), (dict(orientation=[2, 0, 0, 0, 1, 0]), 'unit'), (dict(spacing=[0, 1]), 'positive'),
    (dict(position=[0, np.nan, 0]), 'finite'), (dict(position=[0, 0]), '3 finite numbers')])
def test_a_plane_that_is_none_is_refused(broken, word):
    good = dict(position=[0, 0, 0], orientation=[1, 0, 0, 0, 1, 0], spacing=[1, 1], shape=(5, 5))
    with pytest.raises(ValueError, match=word): Plane(**(good | broken))


def test_contains_and_corners():
    plane = random_plane(np.random.default_rng(3))
    inner = centre(plane) + (corners(plane) - centre(plane)) * .999
    outer = centre(plane) + (corners(plane) - centre(plane)) * 1.001
    assert contains(plane, inner).all() and not contains(plane, outer).any()
    assert not contains(plane, inner, margin_mm=5).any()


@pytest.mark.parametrize('seed', range(10))
def test_crossing_line_lies_on_both_and_ends_at_a_border(seed):
    rng = np.random.default_rng(seed)
    a, b = random_plane(rng), random_plane(rng)
    b = Plane(b.position + centre(a) - centre(b), b.orientation, b.spacing, b.shape)      # b through the middle of a
    line = crossing_line(a, b)
    ends = a.to_patient(line)
    assert np.abs(b.distance(ends)).max() < 1e-6
    for end in ends:
        beyond = end + (end - ends.mean(0)) * .01
        assert contains(a, end, -1e-6) and contains(b, end, -1e-6) and not (contains(a, beyond) and contains(b, beyond))


def test_parallel_planes_do_not_cross():
    plane = random_plane(np.random.default_rng(0))
    assert crossing_line(plane, Plane(plane.position + 5 * plane.normal, plane.orientation, plane.spacing, plane.shape)) is None


def test_distances_of_a_series_are_those_of_its_planes():
    rng = np.random.default_rng(0)
    planes = [random_plane(rng) for _ in range(7)]
    class Series:
        image_position = np.stack([p.position for p in planes]); image_orientation = np.stack([p.orientation for p in planes])
    points = rng.normal(size=(4, 3)) * 50
    assert np.allclose(plane_distances(Series, points), np.abs([p.distance(points) for p in planes]))
