"""Stage 40: boxes from points, the data set and back, the detector, the choice of slices."""
import os
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from mscan.geometry import Plane, plane_distances
from mscan.images import Preprocess, apply, invert, normalise
from mscan.keypoints import canal_points, series_canvases
from mscan.levels import (ELSEWHERE, FAR_MM, HERE, NEAR_MM, UNSURE, box_sides, boxes_for, levels_card, load_levels, pick_slices, predict_levels,
                          slice_kinds, with_keypoints, write_yolo_dataset, yolo_lines)
from mscan.rsna import LEVELS
from mscan.training import load_card, save_weights
from mscan.yolo import RECIPE, best_boxes, build_yolo, prime, start_from, train_yolo, usual_side


class Stack:
    "Parallel oblique slices: the geometry of a series, nothing else."
    def __init__(self, n=9, gap=4.5, tilt=.15, spacing=(.6, .7), shape=(300, 260)):
        across, down = np.array([np.sin(tilt), np.cos(tilt), 0]), np.array([0., 0., -1.])
        self.normal = np.cross(across, down)
        corner = -across * spacing[1] * shape[1] / 2 - down * spacing[0] * shape[0] / 2
        self.image_position = np.array([corner + (i - (n - 1) / 2) * gap * self.normal for i in range(n)])
        self.image_orientation = np.tile(np.concatenate([across, down]), (n, 1))
        self.pixel_spacing, self.shape = np.tile(spacing, (n, 1)), np.tile(shape, (n, 1))
    def __len__(self): return len(self.image_position)
    def plane(self, i): return Plane(self.image_position[i], self.image_orientation[i], self.pixel_spacing[i], tuple(self.shape[i]))


def spine(stack, i=4):
    "Five points on slice i, 28 mm apart."
    return stack.plane(i).to_patient(np.stack([np.full(5, 130.), 50 + 28 / .6 * np.arange(5)], 1))


@pytest.fixture(scope='module')
def lesson():
    from mscan.phantom import lesson_study
    study = lesson_study(seed=1)
    return normalise(study.study.of('sagittal_t2')[0]), canal_points(study.truth)


# ---- boxes ----------------------------------------------------------------------------------------------------------------------

def test_a_slice_is_positive_near_its_plane_and_negative_far_from_it():
    stack = Stack()
    centres, sides, state = boxes_for(stack, spine(stack))
    kinds = slice_kinds(state)
    for i, d in enumerate(np.abs(np.arange(9) - 4) * 4.5):
        assert kinds[i] == ('positive' if d <= NEAR_MM else 'negative' if d > FAR_MM else 'left out'), (i, d)
    assert np.allclose(sides, 28)
    assert np.allclose(centres[4], [[130, 50 + 28 / .6 * j] for j in range(5)])


def test_boxes_follow_the_points_straight_onto_every_slice():
    stack = Stack()
    points = spine(stack) + 3. * stack.normal
    centres, _, _ = boxes_for(stack, points)
    for i in range(len(stack)):
        moved = stack.plane(i).to_patient(centres[i]) - points
        assert np.allclose(np.cross(moved, stack.normal), 0, atol=1e-9), 'moved along the normal only'
    shifted, _, _ = boxes_for(stack, points + stack.plane(0).axes[0] * 5)
    assert np.allclose(shifted - centres, [5, 0])


def test_a_bent_spine_keeps_its_slices():
    stack = Stack()
    points = spine(stack) + np.linspace(-6, 6, 5)[:, None] * stack.normal   # L1/L2 and L5/S1 lie 12 mm apart across the slices
    _, _, state = boxes_for(stack, points)
    distance = plane_distances(stack, points)
    used = slice_kinds(state) != 'left out'
    assert (slice_kinds(state) == 'positive').sum() >= 3
    middle = (NEAR_MM + FAR_MM) / 2
    assert (state[used & (distance <= NEAR_MM).any(1)] == np.where(distance <= middle, HERE, ELSEWHERE)[used & (distance <= NEAR_MM).any(1)]).all()
    assert not (state[used] == UNSURE).any()


def test_a_missing_point_is_refused():
    stack = Stack()
    points = spine(stack)
    points[2] = np.nan
    with pytest.raises(ValueError, match='five'): boxes_for(stack, points)


def test_sides_are_mean_gaps():
    assert np.allclose(box_sides([[0, 0, z] for z in (0, 20, 50, 90, 100)]), [20, 25, 35, 25, 10])


def test_lines_are_shares_of_the_image_and_cut_at_its_border():
    lines = yolo_lines(np.array([[0., 50.], [50, 50], [500, 50], [50, 50], [50, 50]]), np.full(5, 20.), np.array([True, True, True, False, False]), 100)
    rows = [line.split() for line in lines.splitlines()]
    assert [r[0] for r in rows] == ['0', '1'], 'a level outside the canvas has no box'
    assert np.allclose([float(v) for v in rows[0][1:]], [.0525, .505, .105, .2]) and np.allclose([float(v) for v in rows[1][1:]], [.505, .505, .2, .2])


# ---- data set -------------------------------------------------------------------------------------------------------------------

def test_the_set_leads_back_to_the_patient(lesson, tmp_path):
    series, points = lesson
    prepare = Preprocess()
    table = write_yolo_dataset(tmp_path / 'set', [('train', series, points)], prepare, 128, 2.4, negatives=1)
    centres, sides, state = boxes_for(series, points)
    images, matrices, scales = series_canvases(series, prepare, 128, 2.4)
    written = table[table.boxes >= 0]
    assert {'positive', 'negative'} == set(written.kind) and (written.kind == 'negative').sum() == 1
    for i in written.slice_i:
        image = cv2.imread(str(tmp_path / 'set' / 'images' / 'train' / f'{series.study_id}_{i}.png'), cv2.IMREAD_GRAYSCALE)
        assert (image == images[i]).all()
        lines = (tmp_path / 'set' / 'labels' / 'train' / f'{series.study_id}_{i}.txt').read_text().splitlines()
        rows = np.array([line.split() for line in lines], float).reshape(-1, 5)
        assert (rows[:, 0] == np.flatnonzero(state[i] == HERE)).all()
        for j, *box in rows:
            assert np.linalg.norm(apply(invert(matrices[i]), np.array(box[:2]) * 128 - .5) - centres[i, int(j)]) < .01
            assert abs(box[2] * 128 * scales[i] - sides[int(j)]) < .01


def test_the_set_is_bounded_repeatable_and_leaves_out_incomplete_studies(lesson, tmp_path):
    series, points = lesson
    broken = points.copy()
    broken[0] = np.nan
    with pytest.raises(ValueError, match='five'): write_yolo_dataset(tmp_path / 'a', [('train', series, broken)], Preprocess(), 64, 4.8)
    studies = [('train', series, points), ('train', series, broken)] + [('train', replace(series, study_id=str(k)), points) for k in range(4)]
    a, b = (write_yolo_dataset(tmp_path / n, studies, Preprocess(), 64, 4.8, negatives=3, max_images=8, seed=5) for n in 'bc')
    per_study = a[a.boxes >= 0].groupby('study_id').size()
    assert a.equals(b) and per_study.nunique() == 1, 'the bound falls between studies, never inside one'
    assert per_study.sum() >= 8 > per_study.sum() - per_study.iloc[0] and len(per_study) < 5
    assert 'images/train' in (tmp_path / 'b' / 'data.yaml').read_text() and str(tmp_path) not in (tmp_path / 'b' / 'data.yaml').read_text()


def test_augmentation_keeps_the_identity_of_a_level():
    assert RECIPE['mosaic'] == 0 and RECIPE['fliplr'] == 0 and RECIPE['scale'] <= .1 and RECIPE.get('flipud', 0) == 0 and RECIPE['amp'] is False


# ---- detector -------------------------------------------------------------------------------------------------------------------

def squares(folder, n=12, size=64, side=20):
    "A bright square above a dark one, on noise."
    rng = np.random.default_rng(0)
    for kind in ('images', 'labels'): (folder / kind / 'train').mkdir(parents=True)
    for i in range(n):
        image, lines = rng.integers(90, 160, (size, size)).astype(np.uint8), []
        for c, grey in enumerate((255, 0)):
            x, y = rng.integers(0, size // 2 - side, 2) + (rng.integers(0, size // 2), c * size // 2)
            image[y:y + side, x:x + side] = grey
            lines.append(f'{c} {(x + side / 2) / size} {(y + side / 2) / size} {side / size} {side / size}')
        cv2.imwrite(str(folder / 'images' / 'train' / f'{i}.png'), image)
        (folder / 'labels' / 'train' / f'{i}.txt').write_text('\n'.join(lines))
    (folder / 'data.yaml').write_text('train: images/train\nval: images/train\nnames: {0: bright, 1: dark}\n')
    return folder / 'data.yaml'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('yolo')
    state = torch.get_num_threads(), cv2.getNumThreads(), torch.save, np.get_printoptions(), dict(os.environ), os.getcwd()
    data = squares(folder / 'set')
    network, history = train_yolo(data, epochs=2, size_px=64, batch=4, progress=False)
    return dict(data=data, folder=folder, network=network, history=history, before=state)


def test_training_leaves_the_process_and_the_disk_as_they_were(trained):
    threads, cv2_threads, save, printing, environment, cwd = trained['before']
    assert (torch.get_num_threads(), cv2.getNumThreads(), torch.save, os.getcwd()) == (threads, cv2_threads, save, cwd)
    assert np.get_printoptions() == printing and not torch.are_deterministic_algorithms_enabled()
    changed = {k for k in environment.keys() | os.environ.keys() if environment.get(k) != os.environ.get(k)} - {'PYTEST_CURRENT_TEST'}
    assert all(k.startswith('YOLO_') for k in changed), changed
    assert not [p for p in trained['folder'].rglob('*') if p.suffix in ('.pt', '.pth')]


def test_a_primed_head_is_taught_from_the_first_batch(trained):
    assert abs(usual_side(trained['data'], 64) - 20) < .01
    assert (trained['history'].box_loss > 0).all(), 'no box was assigned: nothing would be learned'
    network = build_yolo(classes=('a', 'b'))
    prime(network, 64, 20.)
    with torch.no_grad(): out = network(torch.zeros(1, 3, 64, 64))[0][0]
    assert abs(out[2:4, :64].mean() - 20) < 3 and .5 / 64 < out[4:, :64].mean() < 2 / 64


def test_weights_are_rebuilt_from_their_card(trained, lesson, tmp_path):
    series, _ = lesson
    network = build_yolo(classes=LEVELS)
    save_weights(network, tmp_path / 'levels', levels_card(network, Preprocess(.9, 'none'), 96, 3.))
    card = load_card(tmp_path / 'levels')
    assert card['classes'] == list(LEVELS) and card['preprocessing']['clahe'] == 'none' and 'diagnosis' in card['intended_use']
    find = load_levels(tmp_path / 'levels', conf=0.)
    for a, b in zip(find.probabilities(series), predict_levels(network, series, Preprocess(.9, 'none'), 96, 3., conf=0.), strict=True): assert np.allclose(a, b)


def test_pretrained_weights_are_taken_or_refused_never_ignored(trained, tmp_path):
    from safetensors.torch import save_file
    given = {'model.' + k: v.contiguous() for k, v in build_yolo(classes=[str(k) for k in range(80)]).state_dict().items()}   # as in a COCO checkpoint
    save_file(given, tmp_path / 'coco.safetensors')
    network = build_yolo(classes=LEVELS)
    assert start_from(network, str(tmp_path / 'coco.safetensors')) < len(given)
    assert torch.equal(network.state_dict()['model.0.conv.weight'], given['model.model.0.conv.weight'])
    with pytest.raises(FileNotFoundError, match='pretrained none'): train_yolo(trained['data'], pretrained=str(tmp_path / 'no.safetensors'), epochs=1, size_px=64, progress=False)
    save_file({'a': torch.zeros(1)}, tmp_path / 'other.safetensors')
    with pytest.raises(ValueError, match='another architecture'): start_from(network, str(tmp_path / 'other.safetensors'))


def test_a_batch_of_slices_is_its_slices_one_by_one(trained):
    images = np.random.default_rng(0).integers(0, 255, (3, 64, 64)).astype(np.uint8)
    p, boxes = best_boxes(trained['network'], images)
    for i in range(3):
        q, _ = best_boxes(trained['network'], images[i:i + 1])
        assert np.allclose(p[i], q[0], rtol=1e-4)
    assert p.shape == (3, 2) and boxes.shape == (3, 2, 4)


@pytest.mark.slow
def test_it_learns_and_finds_what_it_learned(tmp_path):
    data = squares(tmp_path / 'set', n=48)
    network, _ = train_yolo(data, epochs=15, size_px=64, batch=8, progress=False)
    files = sorted((tmp_path / 'set').rglob('*.png'))
    p, boxes = best_boxes(network, np.stack([cv2.imread(str(f), cv2.IMREAD_GRAYSCALE) for f in files]))
    truth = np.stack([np.loadtxt(str(f).replace('images', 'labels').replace('.png', '.txt'))[:, 1:3] * 64 - .5 for f in files])
    assert np.median(np.linalg.norm(boxes[..., :2] - truth, axis=-1)) < 4


# ---- slices ---------------------------------------------------------------------------------------------------------------------

def test_the_slice_of_a_level_is_the_argmax():
    rng = np.random.default_rng(0)
    p, boxes = rng.random((15, 5)), rng.random((15, 5, 3)) * 100
    table = pick_slices(p, boxes)
    assert table.level.tolist() == list(LEVELS) and (table.slice_i == p.argmax(0)).all() and np.allclose(table.confidence, p.max(0))
    order = rng.permutation(15)
    again = pick_slices(p[order], boxes[order])
    assert (order[again.slice_i] == table.slice_i).all() and np.allclose(again[['x_px', 'y_px', 'width_mm']], table[['x_px', 'y_px', 'width_mm']])


@pytest.mark.parametrize('found', [0, 2, 5])
@pytest.mark.parametrize('known', [0, 3, 5])
def test_a_level_without_a_box_falls_back_to_its_keypoint(found, known):
    p, boxes = np.zeros((6, 5)), np.full((6, 5, 3), np.nan)
    p[2, :found], boxes[2, :found] = .8, 30.
    points = pd.DataFrame(dict(series_id='9', level=list(LEVELS)[:known], slice_i=4, x_px=7., y_px=8., confidence=.5))
    table = with_keypoints(pick_slices(p, boxes), '1', points)
    assert table.level.tolist() == list(LEVELS)[:max(found, known)] and table.level.is_unique
    assert table.source.tolist() == ['yolo'] * found + ['keypoints'] * max(0, known - found)
    fallback = table[table.source == 'keypoints']
    assert (fallback.slice_i == 4).all() and (fallback.series_id == '9').all() and fallback.width_mm.isna().all()
    assert (table[table.source == 'yolo'].series_id == '1').all()
