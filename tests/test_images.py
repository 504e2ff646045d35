"Millimetres stay millimetres, and a scanner's gain changes nothing."
import numpy as np
import pytest

from mscan.images import Preprocess, apply, canvas, compose, crop, invert, normalise, percentiles, random_warp, warp
from mscan.dicom import Series


def spot(shape, xy):
    "A dark image with a soft bright spot."
    ys, xs = np.mgrid[:shape[0], :shape[1]]
    return (np.exp(-((xs - xy[0]) ** 2 + (ys - xy[1]) ** 2) / 18) * 255).astype(np.uint8)


def middle_of(image):
    ys, xs = np.mgrid[:image.shape[0], :image.shape[1]]
    w = image.astype(float)
    return np.array([(w * xs).sum(), (w * ys).sum()]) / w.sum()


@pytest.mark.parametrize('spacing', [(.5, .5), (.9, .6), (1.2, 1.2)])
def test_points_follow_through_every_map(spacing):
    prepare, xy = Preprocess(mm_per_px=.8, clahe='none'), np.array([90., 60.])
    picture, matrix = prepare.slice(spot((160, 200), xy), spacing)
    assert np.abs(middle_of(picture) - apply(matrix, xy)).max() < .3
    square, to_crop, inside = crop(picture, matrix, spacing, xy + 5, 40, 80, prepare)
    assert np.abs(middle_of(square) - apply(to_crop, xy)).max() < .6
    whole, to_canvas, mm = canvas(picture, matrix, .8, 128, 1.6)
    assert np.abs(middle_of(whole) - apply(to_canvas, xy)).max() < .6
    assert np.allclose(apply(invert(to_canvas), apply(to_canvas, xy)), xy)


@pytest.mark.parametrize('spacing', [(.4, .4), (1., .5)])
def test_crop_has_its_size_in_mm_whatever_the_matrix(spacing):
    _, to_crop, _ = crop(np.zeros((100, 100), np.uint8), np.eye(2, 3), spacing, (50, 50), 50, 100, Preprocess())
    step = apply(to_crop, [[0, 0], [10 / spacing[1], 0], [0, 10 / spacing[0]]])
    assert np.allclose(step[1] - step[0], [20, 0]) and np.allclose(step[2] - step[0], [0, 20])


def test_series_wise_scale_ignores_gain_and_keeps_slices_comparable():
    rng = np.random.default_rng(0)
    def series(pixels): return Series('1', '2', 'axial_t2', pixels, *[np.zeros((len(pixels), k)) for k in (3, 6, 2, 2)], np.arange(len(pixels)), np.zeros(len(pixels), int))
    pixels = [rng.integers(0, 900, (40, 50)).astype(np.uint16) // (i + 1) for i in range(3)]
    a, b = normalise(series(pixels)), normalise(series([p * 4 + 100 for p in pixels]))
    assert all((p == q).all() for p, q in zip(a.pixels, b.pixels, strict=True)) and a.pixels[0].dtype == np.uint8
    assert a.pixels[0].mean() > a.pixels[1].mean() > a.pixels[2].mean()         # a darker slice stays darker
    assert normalise(a) is a
    floats = normalise(series([p.astype(np.float32) for p in pixels]))
    assert np.abs(floats.pixels[1].astype(int) - a.pixels[1]).max() <= 1
    assert normalise(series([np.full((5, 5), 7, np.uint16)])).pixels[0].max() == 0   # a flat series is black, not noise


def test_percentiles_by_counting_are_percentiles():
    rng = np.random.default_rng(1)
    pixels = [rng.integers(-300, 4000, (64, 64)).astype(np.int16) for _ in range(4)]
    assert np.allclose(percentiles(pixels, (.5, 10, 50, 99.5)), np.percentile(np.concatenate([p.ravel() for p in pixels]), (.5, 10, 50, 99.5)), atol=2)


def test_outside_is_said():
    picture = np.full((100, 100), 200, np.uint8)
    for centre, share in (((50, 50), 1), ((-.5, 50), .5), ((-.5, -.5), .25), ((-200, 50), 0)):
        square, _, inside = crop(picture, np.eye(2, 3), (1, 1), centre, 40, 40, Preprocess(clahe='none'))
        assert abs(inside - share) < .02 and abs((square > 100).mean() - share) < .06


def test_a_slice_that_is_too_large_is_shrunk_not_cut():
    whole, matrix, mm = canvas(np.full((600, 300), 9, np.uint8), np.eye(2, 3), 1., 128, 1.5)
    assert np.isclose(mm, 600 / 128) and (apply(matrix, [[-.5, -.5], [299.5, 599.5]]) >= -.6).all() and (apply(matrix, [[299.5, 599.5]]) <= 127.6).all()


def test_random_warp_carries_points():
    rng = np.random.default_rng(2)
    for _ in range(5):
        matrix = random_warp(rng, 128)
        assert np.abs(middle_of(warp(spot((128, 128), (70, 50)), matrix)) - apply(matrix, (70, 50))).max() < 1
    first, second = np.array([[2., 0, 1], [0, 2, 1]]), np.array([[1., 0, -3], [0, 1, 4]])
    assert np.allclose(apply(compose(second, first), (5, 6)), apply(second, apply(first, (5, 6))))


def test_clahe_options():
    image = (np.random.default_rng(0).random((90, 90)) * 255).astype(np.uint8)
    assert not np.array_equal(Preprocess(mm_per_px=1.).slice(image, (1, 1))[0], image)
    assert np.array_equal(Preprocess(mm_per_px=1., clahe='none').slice(image, (1, 1))[0], image)
    with pytest.raises(ValueError, match='clahe must be'): Preprocess(clahe='maybe')
    with pytest.raises(ValueError, match='normalise the series first'): Preprocess().slice(image.astype(np.uint16), (1, 1))
