"""Each way to confuse left and right is made on purpose, and a named check notices it. From DICOM files on disk; networks with random weights; no training.

A check passes on the code as it is (`test_check`) and fails under its mutants (`test_mutant_fails`). A mutant changes what a function takes or gives back at the place where the chain calls it."""
import copy
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from mscan import bilateral, dicom, encoders, foramina, mirror, points, prepare, recesses, sidecrops, sidegrading, submission
from mscan.crops import AxialPointNet
from mscan.geometry import plane_distances
from mscan.grading import grade_study
from mscan.images import Preprocess
from mscan.levels import pick_slices, with_keypoints
from mscan.phantom import make_phantom
from mscan.rsna import CONDITIONS, LEVELS, PROBS, read_descriptions
from mscan.sides import Sides
from test_mirror import restore_folder
from test_pipeline import store_mirrored

XYZ = ['x_mm', 'y_mm', 'z_mm']
PLAIN, DIM, SIZE = Preprocess(.8, 'none'), 32, 32
MIRROR_MM = 11.                                  # off the patient's middle: any sagittal plane will do
CLOSE = 1e-3                                     # of issue 5
LEFT, RIGHT = [1, 3], [2, 4]                     # of CONDITIONS


# ---- one patient on disk, and networks that have learned nothing ----------------------------------------------------------------

class Tiny(nn.Module):
    "An encoder that sees where in a crop something lies."
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.see, self.project = nn.Conv2d(1, 8, 7, stride=3), nn.Sequential(nn.Linear(8 * 16, DIM))

    def features(self, image): return nn.functional.layer_norm(self.project(nn.functional.adaptive_avg_pool2d(self.see(image).relu(), 4).flatten(1)), (DIM,))


class Spots(nn.Module):
    "In the place of the foramen network: it says where, and never that there is none."
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.see = nn.Conv2d(1, len(LEVELS), 9, padding=4)

    def forward(self, image): return torch.cat([20 * self.see(image).flatten(2), torch.full((len(image), len(LEVELS), 1), -20.)], -1)


def random_nets():
    torch.manual_seed(0)
    recess, centre, grader = recesses.RecessNet(64, 4), AxialPointNet(64, 4), bilateral.Bilateral(DIM)
    with torch.no_grad():
        recess.head[-1].bias.copy_(torch.tensor([.13, -.05, -.17, -.08]))          # beside the canal, not alike left and right
        for p in grader.heads.parameters(): p.mul_(3)                              # an untrained head says the same of everything
    return SimpleNamespace(foramen=Spots().eval(), recess=recess.eval(), centre=centre.eval(), grader=grader.eval(), encoders={v: Tiny(k).eval() for k, v in enumerate(sidegrading.VIEWS)})


NETS = random_nets()


def make_models(folder):
    "What `mscan.grading.load_models` gives, with random weights; canal points are the true ones of the folder that is read."
    def find_points(series):
        away = plane_distances(series, folder.canal)                              # (n, 5)
        rows = [foramina.row(series, away[:, j].argmin(), xyz, level, 'left', foramina.FORAMEN, 1., 'truth') for j, (level, xyz) in enumerate(zip(LEVELS, folder.canal, strict=True))]
        return pd.DataFrame(rows).assign(flag='', **dict(zip(XYZ, folder.canal.T, strict=True)))
    nothing = pick_slices(np.zeros((1, 5)), np.zeros((1, 5, 3)))
    sides = Sides(lambda *a: foramina.find_foramina(NETS.foramen, *a, PLAIN, 64, 4.5), lambda *a: recesses.find_recesses(NETS.recess, *a, PLAIN, 64))
    prior = pd.DataFrame([(c, l, 1 / 3, 1 / 3, 1 / 3) for c in CONDITIONS for l in LEVELS], columns=['condition', 'level', *PROBS])
    return SimpleNamespace(sides=sides, find_points=find_points, find_boxes=lambda series, points: with_keypoints(nothing, series.series_id, points), centre_net=NETS.centre, window_px=64, prepare=PLAIN,
                           encoders=[NETS.encoders], nets=[[NETS.grader]], low=.5, high=99.5, rule='plane', passes=3, size_px=SIZE,
                           conditions=list(CONDITIONS), view_dropout=.1, contrasts=('network', 'offset'), conditional=None, device='cpu', prior=prior)


@pytest.fixture(scope='module')
def disk(tmp_path_factory):
    "Folders of one patient who lies 12 degrees oblique: as he is, mirrored, stored otherwise, and without the right half of his T1."
    top = tmp_path_factory.mktemp('mutants')
    plain = top / 'plain'
    make_phantom(plain, studies=1, test_studies=0, seed=4, size='small', quirks='none', workers=1, progress=False)
    described = pd.read_csv(plain / 'train_series_descriptions.csv', dtype=str)
    own, t1 = described.study_id[0], described.series_id[described.series_description == 'Sagittal T1'].item()
    restore_folder(plain, top / 'again', 1, 0)
    for how in ('plain', 'again'):                                                 # the same patient once to train on, once to grade
        shutil.copytree(top / how / 'train_images' / own, top / how / 'test_images' / '1')
        described.assign(study_id='1').to_csv(top / how / 'test_series_descriptions.csv', index=False)
    for how in ('mirrored', 'half'): shutil.copytree(plain, top / how)
    for f in (top / 'mirrored' / 'test_images').glob('*/*/*.dcm'): store_mirrored(f, f, MIRROR_MM)
    truth = pd.read_csv(plain / 'truth.csv', dtype=str)
    canal = truth[truth.condition == CONDITIONS[0]].set_index('level').loc[list(LEVELS), XYZ].to_numpy(float)
    series = dicom.read_series(plain / 'test_images' / '1' / t1, pixels=False)
    for f, mm in zip(series.files, foramina.lateral_mm(series, canal).min(1), strict=True):
        if mm < -2: (top / 'half' / 'test_images' / '1' / t1 / f).unlink()
    folders = {how: SimpleNamespace(dir=top / how, canal=canal) for how in ('plain', 'again', 'half')} | dict(mirrored=SimpleNamespace(dir=top / 'mirrored', canal=mirror.reflected_points(canal, MIRROR_MM)))
    return SimpleNamespace(**folders)


def read(folder): return submission.read_normalised(folder.dir, '1', read_descriptions(folder.dir / 'test_series_descriptions.csv'), .5, 99.5)


def answers(folder):
    "p (condition, level, grade) of a folder's patient, and which rows the model has answered."
    rows = grade_study(read(folder), make_models(folder)).set_index(['condition', 'level'])
    rows = rows.loc[[(c, l) for c in CONDITIONS for l in LEVELS]]
    return rows[list(PROBS)].to_numpy(float).reshape(5, 5, 3), (rows['source'] == 'model').to_numpy().reshape(5, 5)


# ---- checks ---------------------------------------------------------------------------------------------------------------------

def check_a_mirrored_patient_has_the_sides_exchanged(disk):
    (p, graded), (q, graded_too) = answers(disk.plain), answers(disk.mirrored)
    assert graded.any(1).all() and (graded[LEFT] == graded_too[RIGHT]).all() and (graded[RIGHT] == graded_too[LEFT]).all()
    assert np.abs(p[LEFT] - q[RIGHT]).max() <= CLOSE and np.abs(p[RIGHT] - q[LEFT]).max() <= CLOSE
    assert np.median(np.abs(p[LEFT] - p[RIGHT]).max(-1)[graded[LEFT] & graded[RIGHT]]) > 10 * CLOSE     # the sides differ


def check_the_canal_of_a_mirrored_patient_is_unchanged(disk):
    (p, graded), (q, graded_too) = answers(disk.plain), answers(disk.mirrored)
    assert graded[0].all() and graded_too[0].all() and np.abs(p[0] - q[0]).max() <= CLOSE


def check_a_patient_stored_otherwise_has_the_same_answers(disk):
    (p, graded), (q, graded_too) = answers(disk.plain), answers(disk.again)
    assert graded.any(1).all() and (graded == graded_too).all() and np.abs(p - q).max() <= CLOSE


def check_the_mirrored_study_is_what_its_files_hold(disk):
    here, there = mirror.mirror(read(disk.plain), MIRROR_MM), read(disk.mirrored)
    for a, b in zip(here.series, there.series, strict=True):
        assert np.abs(a.image_position - b.image_position).max() < CLOSE and np.abs(a.image_orientation - b.image_orientation).max() < 1e-6, a.view
        assert all((p == q).all() for p, q in zip(a.pixels, b.pixels, strict=True)), a.view


def check_labels_lie_on_the_same_anatomy_however_stored(disk):
    a, b = (prepare.clean_points(table.points, rows, table.labels, []) for table, rows in map(slices_and_labels, (disk.plain, disk.again)))
    a, b = (t[0].sort_values(['condition', 'level', 'series_id']).reset_index(drop=True) for t in (a, b))
    assert len(a) == len(b) >= 20 and (a[['condition', 'level', 'slice_i']] == b[['condition', 'level', 'slice_i']]).all(axis=None) and np.abs(a[XYZ] - b[XYZ]).max(axis=None) < CLOSE


def slices_and_labels(folder):
    "The tables of the training folder, and the rows of its slices as `mscan.prepare.prepare` makes them."
    table = prepare.read_tables(folder.dir, 'train')
    (folder.dir / 'cache').mkdir(exist_ok=True)
    return table, prepare.cache_study((str(folder.dir), 'train', table.studies[0], table.descriptions, str(folder.dir / 'cache'), .5, 99.5))[0]


def check_sides_are_beside_the_canal_and_not_beside_the_middle_of_the_images(disk):
    find = Sides(partial(foramina.offset_foramina, offset_mm=(8., 0., 0.)))
    whole, half = (find.foramina(read(f), f.canal).query('side == "left"') for f in (disk.plain, disk.half))
    assert len(whole) == len(half) == 5 and (half.slice_i.to_numpy() < whole.slice_i.to_numpy()).all()      # slices are missing before them
    assert np.abs(whole[XYZ].to_numpy() - half[XYZ].to_numpy()).max() < CLOSE and (half.x_mm > disk.half.canal[:, 0]).all()


def check_mirrored_windows_keep_the_patients_left_to_the_right(disk):
    half, image, left = 31.5, np.zeros((1, 64, 64), np.uint8), []
    image[0, 30:34, 42:46], image[0, 36:40, 14:18] = 255, 120                                  # left bright, right dim
    data = recesses.RecessSet(image, (np.array([[[43.5, 31.5], [15.5, 37.5]]]) - half) / half, augment=True, seed=0)
    for _ in range(40):
        item = data[0]
        (a, b), picture = item['offset'].numpy() * half + half, item['image'][0].numpy()
        left.append(picture[int(round(a[1])), int(round(a[0]))] > picture[int(round(b[1])), int(round(b[0]))])
        assert a[0] > b[0]
    assert 8 < sum(left) < 32                                                                  # some were mirrored, some not


def check_mirrored_crops_have_the_grades_of_the_other_side(disk):
    conditions = [CONDITIONS[0], CONDITIONS[3], CONDITIONS[4]]
    image = np.zeros((1, 86, 86), np.uint8)
    image[0, 36:50, 54:68], image[0, 36:50, 18:32] = 250, 90                                   # left: bright and severe; right: dim and normal
    data, seen = encoders.CropSet(image, np.array([[1, 2, 0]]), 64, augment=True, seed=0, mirror=encoders.other_side(conditions)), []
    for _ in range(40):
        item = data[0]
        canal, left, right = item['grade'].tolist()
        mean = [float(half.mean()) for half in item['image'][0].chunk(2, -1)]                  # the patient's right, his left
        seen.append(left > right)
        assert canal == 1 and {left, right} == {0, 2} and (mean[1] > mean[0]) == (left > right)
    assert 8 < sum(seen) < 32


def made_up_study(seed=0):
    "Features and masks as of `mscan.sidegrading.all_features`, grades (T, 5); one pass."
    rng = np.random.default_rng(seed)
    shapes = dict(sagittal=(5,), axial=(2, 1, 5, 3), foramen=(2, 5, 3), recess=(2, 1, 5, 3))
    return ({v: rng.normal(size=(1, *s, DIM)).astype(np.float32) for v, s in shapes.items()}, {v: np.ones(s, bool) for v, s in shapes.items()}), np.tile([0, 1, 2, 2, 0], (5, 1))


def check_the_right_example_is_the_left_one_of_the_mirrored_patient(disk):
    study, grades = made_up_study()
    turned = {v: f if v == 'sagittal' else f[:, ::-1].copy() for v, f in study[0].items()}
    here, there = sidegrading.SideSet([study], grades[None]), sidegrading.SideSet([(turned, study[1])], grades[None][..., [0, 2, 1, 4, 3]])
    for i in (0, 1):
        a, b = here[i], there[1 - i]
        assert a['grade'].tolist() == b['grade'].tolist() and all(torch.equal(f, b['features'][r]) for r, f in a['features'].items())
    assert here[0]['grade'].tolist() != here[1]['grade'].tolist() and not torch.equal(here[0]['features']['foramen'], here[1]['features']['foramen'])


def check_a_side_is_answered_as_it_was_trained(disk):
    study, grades = made_up_study()
    net, data = NETS.grader, sidegrading.SideSet([study], grades[None])
    p = sidegrading.grade_sides(net, *study)                                                    # (T, 5, G)
    for side, own in enumerate((LEFT, RIGHT)):
        item = data[side]
        with torch.no_grad(): q = net({r: f[None] for r, f in item['features'].items()}, {r: m[None] for r, m in item['masks'].items()}).softmax(-1)[0].numpy()
        assert np.abs(q[:, 1:] - p[:, own]).max() < 1e-5 and (grades[:, own] == item['grade'][:, 1:].numpy()).all()
    assert np.abs(p[:, LEFT] - p[:, RIGHT]).max() > CLOSE


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith('check_')}


@pytest.mark.parametrize('check', CHECKS)
def test_check(check, disk): CHECKS[check](disk)


# ---- mutants --------------------------------------------------------------------------------------------------------------------

def unswapped_window(real, self, i):
    "The window is mirrored, its two labels keep their sides."
    twin = copy.deepcopy(self)                                                                  # draws the same numbers
    twin.offsets[i, 1] = np.nan
    item, mirrored = dict(real(self, i)), real(twin, i)['offset'][0].isnan().any()
    return item | dict(offset=item['offset'].flip(0)) if mirrored else item


def unswapped_example(real, self, i): return real(self, i) | dict(grade=real(self, i - i % 2)['grade'])


def numbered(real, series, xyz_mm):
    "Slices lie to the left of the middle one if they have larger numbers."
    rank = np.argsort(np.argsort(series.instance_number))
    return np.repeat((rank - (len(rank) - 1) / 2)[:, None] * 4., len(xyz_mm), 1)


def sorted_by_number(real, *args, **kw):
    series = real(*args, **kw)
    return mirror.rearranged(series, np.argsort(series.instance_number))


def beside_the_middle(real, series, xyz_mm):
    "Sides are those of the middle of the images, not of the canal."
    middle = dicom.slice_middles(series.image_position, series.image_orientation, series.shape, series.pixel_spacing).mean(0)
    return real(series, np.where(np.isfinite(xyz_mm), middle, np.nan))


def sagittal_columns_flipped(real, series, x_mm):
    out = real(series, x_mm)
    return replace(out, pixels=[p[:, ::-1] for p in out.pixels]) if out.view.startswith('sagittal') else out


def foramina_flipped(real, *args):
    "The right foramina are flipped as if they were axial."
    out = real(*args)
    out.foramen = np.stack([out.foramen[0], out.foramen[1][..., ::-1]])
    return out


def pixels_alone(real, series, which):
    out = real(series, which)
    return replace(out, image_position=series.image_position, image_orientation=series.image_orientation)


def in_its_own_plane(real, series, x_mm):
    "An oblique slice is flipped about its own middle column: right only where it is not oblique."
    out = real(series, x_mm)
    if series.view.startswith('sagittal'): return out
    half = (out.shape[:, ::-1] - 1) / 2 * out.pixel_spacing[:, ::-1]
    middle = dicom.slice_middles(out.image_position, out.image_orientation, out.shape, out.pixel_spacing)
    return replace(out, image_orientation=series.image_orientation, image_position=middle - half[:, :1] * series.image_orientation[:, :3] - half[:, 1:] * series.image_orientation[:, 3:])


def one_pass_only(real, left, right):
    out = real(left, right).clone()
    out[..., 0, :] = left[..., 0, :]
    return out


SIDES_FAIL, CANAL_FAILS, STORED_FAILS = 'check_a_mirrored_patient_has_the_sides_exchanged', 'check_the_canal_of_a_mirrored_patient_is_unchanged', 'check_a_patient_stored_otherwise_has_the_same_answers'
FILES_FAIL, LABELS_FAIL = 'check_the_mirrored_study_is_what_its_files_hold', 'check_labels_lie_on_the_same_anatomy_however_stored'
MUTANTS = {  # name: (seams, each (owner, function, what it does instead), the check that must fail)
    'labels of a flipped window unswapped': ([(recesses.RecessSet, '__getitem__', unswapped_window)], 'check_mirrored_windows_keep_the_patients_left_to_the_right'),
    'labels of a flipped crop unswapped': ([(encoders, 'other_side', lambda real, conditions: list(range(len(conditions))))], 'check_mirrored_crops_have_the_grades_of_the_other_side'),
    'labels of the right side unswapped': ([(sidegrading.SideSet, '__getitem__', unswapped_example)], 'check_the_right_example_is_the_left_one_of_the_mirrored_patient'),
    'labels left in the columns they were stored in': ([(points, 'locate_points', lambda real, points, slices: real(points, slices.assign(x_reversed=False)))], LABELS_FAIL),
    'label numbers taken as places': ([(points, 'locate_points', lambda real, points, slices: real(points, slices.assign(instance_number=slices.slice_i + 1)))], LABELS_FAIL),
    'side from instance order': ([(foramina, 'lateral_mm', numbered)], STORED_FAILS),
    'slices in instance order': ([(dicom, 'read_series', sorted_by_number)], STORED_FAILS),
    'stored columns flipped without their geometry': ([(mirror, 'turned', pixels_alone)], STORED_FAILS),
    'sagittal columns flipped': ([(mirror, 'reflected', sagittal_columns_flipped)], FILES_FAIL),
    'sagittal columns of the right foramina flipped': ([(sidegrading, 'side_crops', foramina_flipped)], SIDES_FAIL),
    'mirrored sagittal slices keep their order': ([(mirror, 'order_slices', lambda real, *a: (np.arange(len(a[0])), real(*a)[1]))], FILES_FAIL),
    'slices beside a foramen counted from the right': ([(sidecrops, 'outwards', lambda real, series, i, side: real(series, i, 'left'))], SIDES_FAIL),
    'oblique axial flipped in its own plane': ([(sidecrops, 'reflected', in_its_own_plane)], SIDES_FAIL),
    'oblique axial flipped in its own plane, to find recesses': ([(recesses, 'reflected', in_its_own_plane)], SIDES_FAIL),
    'oblique axial flipped in its own plane, by mirror': ([(mirror, 'reflected', in_its_own_plane)], FILES_FAIL),
    'midline of the image instead of the canal point': ([(foramina, 'lateral_mm', beside_the_middle)], 'check_sides_are_beside_the_canal_and_not_beside_the_middle_of_the_images'),
    'right side not run on the mirrored patient': ([(sidecrops, 'reflected', lambda real, series, x_mm: series), (sidecrops, 'reflected_points', lambda real, xyz, x_mm: np.asarray(xyz, float))], SIDES_FAIL),
    'places not mirrored with the patient': ([(sidecrops, 'reflected_points', lambda real, xyz, x_mm: np.asarray(xyz, float))], SIDES_FAIL),
    'right side reads the crops of the left': ([(sidegrading, 'seen_from', lambda real, features, side: real(features, 0))], SIDES_FAIL),
    'canal answer taken from one pass only': ([(sidegrading, 'both_sides', one_pass_only)], CANAL_FAILS),
    'answers of the sides exchanged': ([(sidegrading, 'both_sides', lambda real, left, right: real(right, left))], 'check_a_side_is_answered_as_it_was_trained'),
}


def leaves(x):
    "All numbers and words of a result, in order."
    if isinstance(x, pd.DataFrame): return leaves([x[c].to_numpy() for c in x])
    if isinstance(x, (np.ndarray, torch.Tensor)): return x.tolist()
    if isinstance(x, dict): return leaves(list(x.values()))
    if isinstance(x, (list, tuple)): return [leaves(v) for v in x]
    return leaves(vars(x)) if hasattr(x, '__dict__') else x


def install(monkeypatch, owner, name, change):
    "Put a mutant at its seam. The list that is given back is no longer empty once a result has been another one than it would have been."
    original, differs = getattr(owner, name), []

    def mutant(*args, **kw):
        would = None if differs else repr(leaves(original(*copy.deepcopy(args), **kw)))         # copied: a data set draws the same numbers
        new = change(original, *args, **kw)
        if not differs and repr(leaves(new)) != would: differs.append(True)
        return new
    monkeypatch.setattr(owner, name, mutant)
    return differs


@pytest.mark.parametrize('mutant', MUTANTS)
def test_mutant_fails(mutant, disk, monkeypatch):
    seams, check = MUTANTS[mutant]
    heard = [install(monkeypatch, *seam) for seam in seams]
    with pytest.raises(AssertionError): CHECKS[check](disk)
    assert all(heard), f'{mutant}: the chain does not pass here, or nothing was changed'


def test_every_check_has_its_mutant(): assert {check for _, check in MUTANTS.values()} == set(CHECKS)
