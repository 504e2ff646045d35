"Left and right come from the patient: properties that a wrong side, a wrong storage or a blind network breaks. No training, about 10 seconds."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from mscan import foramina, recesses, sides
from mscan.dicom import Study
from mscan.foramina import FORAMEN, RECESS, SIDES
from mscan.geometry import plane_distances, plane_of
from mscan.images import Preprocess, normalise
from mscan.keypoints import KeypointNet, canal_points, find_points
from mscan.mirror import conventional, conventional_study, mirror, rearranged, restored
from mscan.phantom import phantom_study
from mscan.projection import choose_slices
from mscan.rsna import LEVELS
from mscan.training import save_weights

XYZ = ['x_mm', 'y_mm', 'z_mm']
PLAIN = Preprocess(.8, 'none')
GREYS = (60, 100, 140, 180, 220)   # of the painted foramina, a level each
CANVAS = (96, 3.)


@pytest.fixture(scope='module')
def body():
    "Geometry of a small phantom study with oblique slices, without its pixels; canal points."
    p = phantom_study(3, 0, 'small', quirks='none', pixels=False)
    return p.study, canal_points(p.truth)


def filled(series, value):
    "The series with `value(xyz)` as its pixels."
    def image(i):
        plane = plane_of(series, i)
        y, x = np.mgrid[:plane.shape[0], :plane.shape[1]]
        return value(plane.to_patient(np.stack([x, y], -1)))
    return replace(series, pixels=[image(i) for i in range(len(series))], normalised=True)


def cut(series, keep): return rearranged(series, keep)


STORED = [dict(), dict(columns=False), dict(order=False), dict(rows=True), dict(columns=False, rows=True, order=False)]


def reflect(xyz, x_mm): return np.asarray(xyz) * [-1, 1, 1] + [2 * x_mm, 0, 0]


def exchanged(table, x_mm):
    "What a table about the mirrored patient says about the patient."
    other = dict(left='right', right='left')
    return table.assign(x_mm=2 * x_mm - table.x_mm, side=table.side.map(other), condition=[f'{other[s]}{c[len(s):]}' for s, c in zip(table.side, table.condition, strict=True)])


def same(a, b, keys=('level', 'side', 'condition')):
    "Whether two tables say the same about the patient, whatever the slices are called."
    a, b = (t.assign(z=t.z_mm.round(1)).sort_values([*keys, 'z']).reset_index(drop=True) for t in (a, b))
    return len(a) == len(b) and (a[list(keys)] == b[list(keys)]).all(axis=None) and np.allclose(a[XYZ], b[XYZ], atol=.05) and np.allclose(a.confidence, b.confidence, atol=.02) and (a.source == b.source).all()


# which side


def test_the_side_of_an_oblique_slice_by_hand(body):
    series = body[0].of('sagittal_t1')[0]
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
    one = cut(replace(series, pixels=[np.zeros((2, 2))] * len(series)), [0])
    one = replace(one, image_position=np.array([[10., 0., 0.]]), image_orientation=np.array([[-sin, cos, 0, 0, 0, -1.]]))
    want = 10 - np.tan(np.pi / 6) * np.array([6., -6.])                        # along x from a point 6 mm behind, and one 6 mm in front
    assert np.allclose(foramina.lateral_mm(one, [[0, 6, 0], [0, -6, 40]]), want)
    for flipped in ([sin, -cos, 0, 0, 0, -1.], [-sin, cos, 0, 0, 0, 1.]): assert np.allclose(foramina.lateral_mm(replace(one, image_orientation=np.array([flipped])), [[0, 6, 0], [0, -6, 40]]), want)
    with pytest.raises(ValueError, match='not sagittal'): foramina.lateral_mm(body[0].of('axial_t2')[0], [[0, 0, 0]])


def test_an_offset_is_named_by_patient_x(body):
    t1, canal = body[0].of('sagittal_t1')[0], body[1]
    table = foramina.offset_foramina(t1, canal)
    assert len(table) == 10 and (table.source == 'offset').all()
    for r in table.itertuples():
        x, target = canal[LEVELS.index(r.level)], foramina.aside(canal[LEVELS.index(r.level)], r.side, foramina.FORAMEN_OFFSET_MM)
        assert (r.x_mm > x[0]) == (r.side == 'left') and r.condition == f'{r.side}_{FORAMEN}' and target[0] - x[0] == pytest.approx(16.8 * SIDES[r.side])
        assert r.slice_i == plane_distances(t1, target[None])[:, 0].argmin()
        assert np.allclose(plane_of(t1, r.slice_i).to_patient((r.x_px, r.y_px)), [r.x_mm, r.y_mm, r.z_mm])
    lateral = foramina.lateral_mm(t1, canal)
    for r in foramina.offset_foramina(t1, canal, (1., 0, 0)).itertuples(): assert lateral[r.slice_i, LEVELS.index(r.level)] * SIDES[r.side] > 0   # the slice of the other side may be nearer


def test_what_a_series_does_not_show_has_no_row(body):
    t1, canal = replace(body[0].of('sagittal_t1')[0], pixels=[None] * 99), body[1]
    lateral = foramina.lateral_mm(t1, canal)
    assert set(foramina.offset_foramina(cut(t1, np.flatnonzero((lateral > 0).all(1))), canal).side) == {'left'}
    assert not len(foramina.offset_foramina(cut(t1, np.flatnonzero((np.abs(lateral) < 5).all(1))), canal))       # the middle alone: 16.8 mm is out of reach
    some = canal.copy()
    some[2] = np.nan
    assert set(foramina.offset_foramina(t1, some).level) == set(LEVELS) - {'l3_l4'}


@pytest.mark.parametrize('how', STORED, ids=str)
def test_the_offset_does_not_depend_on_storage(body, how):
    study, canal = body
    t1 = filled(study.of('sagittal_t1')[0], lambda xyz: xyz[..., 0])
    axial = [filled(s, lambda xyz: xyz[..., 0]) for s in study.of('axial_t2')]
    assert same(foramina.offset_foramina(restored(t1, **how), canal), foramina.offset_foramina(t1, canal))
    other = Study('1', [restored(s, **how) for s in axial])
    assert same(*(recesses.offset_recesses(s, c, canal) for s in (Study('1', axial), other) for c in [choose_slices(s.series, canal)]))


def test_the_measured_offset_by_hand():
    canal = np.zeros((5, 3))
    points = np.full((2, 5, 3), np.nan)
    points[0, 0], points[1, 0], points[0, 1] = (10, -2, 1), (-14, -4, 3), (8, 0, 0)
    found = foramina.measure_offset([points, points + [1, 0, 0]], [canal, canal + [1, 0, 0]], (16.8, 0, 0))
    assert found.tolist() == [[12, -3, 2], [8, 0, 0]] + [[16.8, 0, 0]] * 3


# storage and mirror


def wave(xyz): return (128 + 60 * np.sin(xyz @ [.11, .05, .02]) + 60 * np.cos(xyz @ [-.03, .09, .06])).astype(np.float32)   # a body without symmetry


@pytest.mark.parametrize('how', STORED, ids=str)
def test_storage_by_convention_moves_no_tissue(body, how):
    for series in body[0].series:
        usual = filled(series, wave)
        assert conventional(usual) is usual                              # the phantom stores by convention
        back = conventional(restored(usual, **how))
        assert all(np.allclose(a, b, atol=1e-3) for a, b in zip(back.pixels, filled(back, wave).pixels, strict=True))
        order = np.arange(len(usual))[::-1 if how.get('order', True) else 1]
        assert np.allclose(back.image_position, usual.image_position[order]) and np.allclose(back.image_orientation, usual.image_orientation[order])


def test_the_mirrored_patient_is_reflected_everywhere_and_sorted_as_ever(body):
    study, c = Study('1', [filled(s, wave) for s in body[0].series]), 3.7
    there = mirror(study, c)
    for old, new in zip(study.series, there.series, strict=True):
        assert all(np.allclose(a, b, atol=1e-3) for a, b in zip(new.pixels, filled(new, lambda xyz: wave(reflect(xyz, c))).pixels, strict=True))
        assert conventional(new) is new and len(new) == len(old)
        x = new.image_position[:, 0]
        if new.view.startswith('sagittal'): assert (np.diff(x) > 0).all() and all((a == b).all() for a, b in zip(new.pixels, old.pixels[::-1], strict=True))   # pictures as they were, at mirrored places
        else: assert all((a == b[:, ::-1]).all() for a, b in zip(new.pixels, old.pixels, strict=True))
    again = mirror(there, c)
    assert all(np.allclose(a.image_position, b.image_position) and np.allclose(a.image_orientation, b.image_orientation) for a, b in zip(again.series, study.series, strict=True))


# foramina


class SeesGreys(nn.Module):
    "Level j where the picture has the j-th grey; says none where nothing has. Stands in for a trained network: it looks at pixels alone."
    def __init__(self, any_level=False): super().__init__(); self.any_level = any_level
    def forward(self, image):
        maps = torch.stack([12 * torch.exp(-((image[:, 0] * 255 - g) / 6) ** 2) for g in GREYS], 1)
        if self.any_level: maps = maps.max(1, keepdim=True).values.expand(-1, 5, -1, -1)
        return torch.cat([maps.flatten(2), torch.full((*maps.shape[:2], 1), 11.)], -1)


class SeesNothing(SeesGreys):
    def forward(self, image): return super().forward(0 * image)


def painted(body, places):
    "A sagittal T1 series that is black but for a square of 10 mm at each place {(side, level): xyz}, on the slice nearest to it."
    series = body[0].of('sagittal_t1')[0]
    pixels = [np.zeros(s, np.uint8) for s in series.shape]
    for (_, level), xyz in places.items():
        i = int(plane_distances(series, xyz[None])[:, 0].argmin())
        x, y = plane_of(series, i).to_pixel(xyz)
        ry, rx = 5 / series.pixel_spacing[i]
        pixels[i][round(y - ry):round(y + ry) + 1, round(x - rx):round(x + rx) + 1] = GREYS[LEVELS.index(level)]
    return replace(series, pixels=pixels, normalised=True)


@pytest.fixture(scope='module')
def uneven(body):
    "Foramina where no fixed offset would look: 11 mm to the left, 20 mm to the right, and each level elsewhere in the slice."
    return {(side, level): body[1][j] + [mm, -4 + 2 * j, 5 - 2 * j] for side, mm in (('left', 11.), ('right', -20.)) for j, level in enumerate(LEVELS)}


def find(series, canal, net=None): return foramina.find_foramina(net or SeesGreys(), series, canal, PLAIN, *CANVAS)


def test_foramina_are_found_where_they_are_and_not_where_the_offset_looks(body, uneven):
    series = painted(body, uneven)
    found, free = find(series, body[1]), foramina.offset_foramina(series, body[1])
    assert len(found) == 10 and (found.source == 'network').all() and found.confidence.min() > .5
    for r, o in zip(found.itertuples(), free.itertuples(), strict=True):
        xyz = uneven[r.side, r.level]
        assert r.slice_i == plane_distances(series, xyz[None])[:, 0].argmin() and r.side == o.side and r.level == o.level
        assert np.linalg.norm(np.subtract(plane_of(series, r.slice_i).to_pixel(xyz), (r.x_px, r.y_px)) * series.pixel_spacing[0][::-1]) < 2
    assert (found.slice_i != free.slice_i).mean() > .5


@pytest.mark.parametrize('how', STORED, ids=str)
def test_foramina_do_not_depend_on_storage(body, uneven, how):
    series = painted(body, uneven)
    other = restored(series, **how)
    here, there = find(series, body[1]), find(other, body[1])
    assert same(here, there)
    if how.get('order', True): assert (here.slice_i + there.slice_i == len(series) - 1).all()
    assert same(find(replace(series, instance_number=np.random.default_rng(0).permutation(series.instance_number)), body[1]), here)


def test_foramina_of_the_mirrored_patient_change_names(body, uneven):
    series, c = painted(body, uneven), 2.
    there = mirror(Study('1', [series]), c).series[0]
    here, mirrored = find(series, body[1]), find(there, reflect(body[1], c))
    assert same(exchanged(mirrored, c), here) and not same(mirrored.assign(x_mm=2 * c - mirrored.x_mm), here)


def test_each_side_is_read_on_its_own_slices(body, uneven):
    series = painted(body, {k: v for k, v in uneven.items() if k[0] == 'left'})
    found = find(series, body[1])
    left, right = found[found.side == 'left'], found[found.side == 'right']
    free = foramina.offset_foramina(series, body[1])
    assert (left.source == 'network').all() and (right.source == 'offset').all()
    assert np.allclose(right[XYZ], free[free.side == 'right'][XYZ]) and (right.confidence < foramina.MIN_CONFIDENCE).all()


def test_a_slice_just_beyond_the_canal_is_the_other_sides(body, uneven):
    t1 = body[0].of('sagittal_t1')[0]
    i = len(t1) // 2
    canal = np.array([plane_of(t1, i).to_patient(plane_of(t1, i).to_pixel(x)) for x in body[1]]) + [1., 0, 0]                # 1 mm to the left of a slice
    series = painted(body, {('right', level): x - [1., 0, 0] for level, x in zip(LEVELS, canal, strict=True)})                # the foramina of that slice are on the right
    found = find(series, canal).set_index(['side', 'level'])
    assert series.pixels[i].max() and (found.loc['left'].source == 'offset').all() and (found.loc['left'].confidence < .01).all()
    assert (found.loc['right'].slice_i == i).any()


def test_without_an_answer_the_offset_stays(body, uneven):
    series, own = painted(body, uneven), (12., -5., 4.)
    found, free = find(series, body[1], SeesNothing()), foramina.offset_foramina(series, body[1])
    assert (found.source == 'offset').all() and np.allclose(found[XYZ], free[XYZ]) and (found.slice_i == free.slice_i).all()
    assert same(foramina.find_foramina(None, series, body[1], PLAIN, *CANVAS), free)
    mine = foramina.find_foramina(SeesNothing(), series, body[1], PLAIN, *CANVAS, offset_mm=own)
    assert np.allclose(mine[XYZ], foramina.offset_foramina(series, body[1], own)[XYZ]) and not np.allclose(mine[XYZ], free[XYZ])


def test_another_vertebras_foramen_has_no_say(body, uneven):
    away = {k: v - [0, 0, 24.] for k, v in uneven.items() if k[1] == 'l5_s1'}                 # nothing within 15 mm of where L5/S1's should be
    found = find(painted(body, away), body[1], SeesGreys(any_level=True)).set_index(['level', 'side'])
    assert (found.loc['l5_s1'].source == 'offset').all()


@pytest.mark.parametrize('known', [(0,), (1,), (0, 1)])
def test_a_slice_is_asked_for_the_label_of_its_own_side(body, uneven, known):
    series = painted(body, uneven)
    labels = np.array([[uneven[s, l] for l in LEVELS] for s in SIDES])
    labels[[k for k in (0, 1) if k not in known]] = np.nan
    labels[:, 4] = np.nan
    data = foramina.ForamenSet([(series, labels, body[1])], PLAIN, *CANVAS, empty=99)
    points, presence, asked = foramina.foramen_targets(series, np.tile(np.eye(2, 3), (len(series), 1, 1)), labels, body[1])
    left = foramina.lateral_mm(series, body[1]) > 0
    assert (asked == np.where(left, 0 in known, 1 in known) & (np.arange(5) < 4)).all() and len(data) == asked.any(1).sum()
    for k in known:
        for j in range(4):
            i = int(plane_distances(series, labels[k, j][None])[:, 0].argmin())
            assert presence[i, j] == presence[left[:, j] == (k == 0), j].max() > .5 and np.allclose(points[i, j], plane_of(series, i).to_pixel(labels[k, j]), atol=1e-3)


def test_the_foramen_loss_wants_the_mass_divided():
    batch = dict(image=torch.zeros(1, 1, 32, 32), points=torch.full((1, 5, 2), 10.), presence=torch.full((1, 5), .7), asked=torch.tensor([[True, True, True, False, False]]))
    def value(on, none):
        logits = torch.full((1, 5, 32 * 32 + 1), -30.)
        logits[0, :, 10 * 32 + 10], logits[0, :, -1] = np.log(on + 1e-12), np.log(none + 1e-12)
        return foramina.foramen_loss(.2, 32)(lambda _: logits, batch)
    best = value(.7, .3)[0]
    assert value(.7, .3)[1] == 3 and best < value(.9, .1)[0] and best < value(.4, .6)[0] < value(1., 0.)[0]
    logits = torch.zeros(1, 5, 32 * 32 + 1, requires_grad=True)
    foramina.foramen_loss(1., 32)(lambda _: logits, batch)[0].backward()
    assert logits.grad[0, 3:].abs().max() == 0 and (logits.grad[0, :3].abs().amax(1) > 0).all()


# recesses


class SeesSpots(nn.Module):
    "The middle of what is bright in the right half of a window, and in its left half: stored by convention, the patient's left and right."
    def forward(self, window):
        x, half = window[:, 0] * (window[:, 0] > .3), (window.shape[-1] - 1) / 2
        grid = torch.arange(window.shape[-1]) - half
        out = []
        for keep in (grid > 0, grid < 0):
            mass = x * keep
            total = mass.sum((1, 2)).clamp_min(1e-6)
            out.append(torch.stack([(mass * grid).sum((1, 2)), (mass * grid[:, None]).sum((1, 2))], 1) / total[:, None] / half)
        return torch.stack(out, 1)


class Says(nn.Module):
    "Always the same four numbers."
    def __init__(self, left, right): super().__init__(); self.answer = torch.tensor([left, right], dtype=torch.float32)
    def forward(self, window): return self.answer.expand(len(window), 2, 2)


@pytest.fixture(scope='module')
def spotted(body):
    "Axial series with a spot at each recess, of different size left and right, on all slices."
    study, canal = body
    places = {(side, level): foramina.aside(canal[j], side, (7. if side == 'left' else 13., -2. - j, 0)) for side in SIDES for j, level in enumerate(LEVELS)}
    spot = lambda xyz, at, mm: np.linalg.norm((xyz - at)[..., :2], axis=-1) < mm
    def value(xyz):
        j = np.abs(canal[:, 2] - xyz[xyz.shape[0] // 2, xyz.shape[1] // 2, 2]).argmin()       # the level of this slice
        image = np.zeros(xyz.shape[:2], np.uint8)
        for side, mm in (('left', 3.), ('right', 4.)): image[spot(xyz, places[side, LEVELS[j]], mm)] = 250
        return image
    return Study('1', [filled(s, value) for s in study.of('axial_t2')]), places


def ask_recesses(study, canal, net=None):
    chosen = choose_slices(study.of('axial_t2'), canal)
    return recesses.find_recesses(net or SeesSpots(), study, chosen[chosen.used], canal, PLAIN, 96)


def test_recesses_are_found_and_named_by_patient_x(body, spotted):
    study, places = spotted
    found = ask_recesses(study, body[1])
    assert (found.source == 'network').all() and set(found.side) == set(SIDES) and len(found) >= 20
    off = [np.hypot(*(np.array([r.x_mm, r.y_mm]) - places[r.side, r.level][:2])) for r in found[found.distance_mm < 3].itertuples()]
    assert np.median(off) < 1.5 and max(off) < 4
    chosen = choose_slices(study.of('axial_t2'), body[1])
    assert (found.groupby(['pass_i', 'level', 'rank']).size() == 2).all() and len(found) == 2 * chosen.used.sum()


@pytest.mark.parametrize('how', STORED, ids=str)
def test_recesses_do_not_depend_on_storage(body, spotted, how):
    study = spotted[0]
    assert same(ask_recesses(Study('1', [restored(s, **how) for s in study.series]), body[1]), ask_recesses(study, body[1]), ('pass_i', 'level', 'side', 'condition'))


def test_recesses_of_the_mirrored_patient_change_names_whatever_the_network_has_learned(body, spotted):
    study, c = spotted[0], 2.
    torch.manual_seed(0)
    for net in (SeesSpots(), Says((.12, -.05), (-.2, -.1)), recesses.RecessNet(96, 4)):         # the last two know nothing of symmetry
        here, there = ask_recesses(study, body[1], net), ask_recesses(mirror(study, c), reflect(body[1], c), net)
        assert same(exchanged(there, c), here, ('pass_i', 'level', 'side', 'condition'))


def test_absurd_recesses_are_replaced_by_the_offset(body, spotted):
    study, canal = spotted[0], body[1]
    free = recesses.offset_recesses(study, choose_slices(study.of('axial_t2'), canal).query('used'), canal)
    sane = ask_recesses(study, canal, Says((.2, -.1), (-.2, -.1)))
    assert (sane.source == 'network').all() and sane.confidence.min() > .9
    for net in (Says((-.2, -.1), (.2, -.1)), Says((-.03, -.06), (.03, -.06)), Says((.9, 0), (-.9, 0)), Says((.05, -.1), (-.45, -.1))):   # sides exchanged, twice; far out; not what it says of the mirrored patient
        lost = ask_recesses(study, canal, net)
        assert (lost.source == 'offset').all() and np.allclose(lost[XYZ], free[XYZ])
    assert same(recesses.find_recesses(None, study, choose_slices(study.of('axial_t2'), canal).query('used'), canal, PLAIN, 96), free, ('pass_i', 'level', 'side', 'condition'))


def test_a_label_counts_on_its_own_stack_and_its_neighbours(body, spotted):
    study, places = spotted
    chosen = choose_slices(study.of('axial_t2'), body[1]).query('used and pass_i == 0')
    r = chosen[chosen.level == 'l3_l4'].sort_values('distance_mm').iloc[0]
    series = next(s for s in study.series if s.series_id == r.series_id)
    plane = plane_of(series, r.slice_i)
    on = lambda side: plane.to_patient(plane.to_pixel(places[side, 'l3_l4']))
    points = pd.DataFrame([dict(condition=f'{side}_{RECESS}', level='l3_l4', series_id=i, slice_i=r.slice_i, **dict(zip(XYZ, on(side), strict=True))) for side, i in (('left', r.series_id), ('right', 'another'))])
    windows = recesses.Windows(study, PLAIN, 96)
    images, offsets = recesses.recess_windows(study, points, chosen, body[1], windows)
    assert 1 <= len(images) <= 3 and np.isfinite(offsets[:, 0]).all() and np.isnan(offsets[:, 1]).all()      # the right one lies in another series: not asked
    image, plane, matrix = windows.cut(r.series_id, r.slice_i, body[1][2])
    assert np.allclose(windows.place(plane, matrix, windows.offset(plane, matrix, on('left'))), on('left'), atol=1e-6)
    far = points.assign(z_mm=points.z_mm + 40)
    assert not len(recesses.recess_windows(study, far, chosen, body[1], windows)[0])


def test_mirrored_windows_keep_the_patients_left_to_the_right():
    image = np.zeros((1, 64, 64), np.uint8)
    image[0, 30:34, 42:46], image[0, 36:40, 14:18] = 255, 120                                  # left bright, right dim
    half = 31.5
    offset = (np.array([[[43.5, 31.5], [15.5, 37.5]]]) - half) / half
    data, bright_left = recesses.RecessSet(image, offset, augment=True, seed=0), []
    for _ in range(40):
        item = data[0]
        picture, at = item['image'][0].numpy(), item['offset'].numpy() * half + half
        assert at[0, 0] > at[1, 0]                                                              # left lies to the right, mirrored or not
        grey = [picture[int(round(y)), int(round(x))] for x, y in at]
        assert min(grey) > .2                                                                   # each number sits on its spot
        bright_left.append(grey[0] > grey[1])
    assert 8 < sum(bright_left) < 32
    plain = recesses.RecessSet(image, offset)[0]
    assert np.allclose(plain['offset'], offset[0]) and (plain['image'][0].numpy() * 255 == image[0]).all()


def test_a_side_without_a_label_gives_no_gradient():
    offset = torch.tensor([[[.2, 0.], [float('nan')] * 2]])
    answer = torch.zeros(1, 2, 2, requires_grad=True)
    loss, count = recesses.recess_loss(lambda _: answer, dict(image=None, offset=offset))
    loss.backward()
    assert count == 1 and torch.isfinite(loss) and answer.grad[0, 1].abs().max() == 0 and answer.grad[0, 0, 0] != 0


# figures


def test_errors_by_hand(body):
    series = body[0].of('sagittal_t1')[0]
    plane, canal = plane_of(series, 3), body[1][0]
    found = pd.DataFrame([foramina.row(series, 3, canal, 'l1_l2', 'left', FORAMEN, .5, 'network')])
    r = found.iloc[0]
    xyz = np.array([r.x_mm, r.y_mm, r.z_mm]) + 3 * plane.orientation[:3] - 4 * plane.orientation[3:] + 1.5 * plane.normal
    points = pd.DataFrame([dict(condition=f'left_{FORAMEN}', level='l1_l2', series_id=series.series_id, slice_i=5, **dict(zip(XYZ, xyz, strict=True)))])
    e = foramina.side_errors(found, points, body[0]).iloc[0]
    assert e.same_series and e.slices_off == 2 and e.in_plane_mm == pytest.approx(5) and e.through_mm == pytest.approx(1.5)
    elsewhere = foramina.side_errors(found, points.assign(series_id='other'), body[0]).iloc[0]
    assert not elsewhere.same_series and elsewhere.slices_off == 0                              # its number says nothing here: nearest slice
    assert not len(foramina.side_errors(found, points.assign(level='l2_l3'), body[0]))
    rows = sides.measured(foramina.side_errors(found, points, body[0]), pd.concat([points, points.assign(level='l5_s1')]), FORAMEN, '1').set_index('level')
    assert rows.in_plane_mm['l1_l2'] == pytest.approx(5) and rows.in_plane_mm['l5_s1'] == sides.LOST_MM and rows.source['l5_s1'] == 'none'


# the stage


@pytest.fixture(scope='module')
def random_sides(tmp_path_factory):
    "Weights of two networks that have learned nothing but to answer, with offsets of their own."
    folder = tmp_path_factory.mktemp('sides')
    torch.manual_seed(1)
    net, recess = KeypointNet('resnet18', width=4), recesses.RecessNet(64, 4)
    with torch.no_grad():
        net.none.bias.fill_(-20.)                                              # never "none"
        recess.head[-1].bias.copy_(torch.tensor([.13, -.05, -.17, -.08]))      # beside the canal, not alike left and right
    save_weights(net, folder / 'foramina', foramina.foramen_card('resnet18', 4, PLAIN, 64, 4.5, (15., -3., 4.)))
    save_weights(recess, folder / 'recesses', recesses.recess_card(64, 4, PLAIN, (8., -2., 0.)))
    return folder / 'foramina', folder / 'recesses'


@pytest.fixture(scope='module', params=[(3, 'small', 'none'), (11, 'small', 'all'), (12, 'small', 'all'), (14, 'small', 'all')], ids=str)
def pictured(request):
    "A small phantom study with its pixels, 8 bits and stored by convention; that of seed 11 has no T1."
    seed, size, quirks = request.param
    p = phantom_study(seed, 2, size, quirks=quirks)
    return conventional_study(replace(p.study, series=[normalise(s) for s in p.study.series])), canal_points(p.truth)


def places(table, c=None):
    "What a table says, sorted by place; of a table about the mirrored patient, what it says about the patient."
    if c is not None: table = exchanged(table, c)
    keys = [k for k in ('pass_i', 'level', 'side', 'condition') if k in table]
    t = table.assign(z=table.z_mm.round(1)).sort_values([*keys, 'z', 'x_mm'])
    return t[[*keys, 'source', *(['used'] if 'used' in t else [])]].to_numpy().tolist(), t[[*XYZ, 'confidence']].to_numpy(float)


@pytest.mark.parametrize('mode', ['network', 'offset'])
def test_the_mirrored_patient_has_the_same_sides_exchanged(pictured, random_sides, mode, monkeypatch):
    study, canal = pictured
    monkeypatch.setattr(foramina, 'MIN_CONFIDENCE', 0.)                        # what it says counts, though it is sure of nothing
    ask, c = sides.load_sides(*random_sides, mode), 3.3
    there, mirrored = mirror(study, c), reflect(canal, c)
    tables = [(ask.foramina(study, canal), ask.foramina(there, mirrored)), tuple(ask.recesses(s, choose_slices(s.of('axial_t2'), xyz), xyz) for s, xyz in ((study, canal), (there, mirrored)))]
    for here, other in tables:
        (what, where), (what_there, where_there) = places(here), places(other, c)
        if 'rank' in here or study.of('sagittal_t1'): assert (here.source == mode).mean() > .3, here.source.value_counts()
        assert len(here) and what == what_there and np.abs(where - where_there).max() < 1e-3
    assert list(tables[0][0]) == foramina.COLUMNS and list(tables[1][0]) == sides.RECESS_COLUMNS and tables[1][0].used.any()


def test_the_whole_of_stage_one_mirrors(pictured, random_sides, monkeypatch):
    "From pixels: the canal points of a network that has learned nothing, the slices chosen by them, both sides."
    monkeypatch.setattr(foramina, 'MIN_CONFIDENCE', 0.)
    study, c = pictured[0], 3.3
    torch.manual_seed(2)
    net, found = KeypointNet('resnet18', width=4).eval(), []
    for s in (study, mirror(study, c)):
        points = find_points(net, s.of('sagittal_t2')[0], PLAIN, 64, 4.5)
        xyz = points[XYZ].to_numpy(float)
        found.append((xyz, choose_slices(s.of('axial_t2'), xyz), sides.load_sides(*random_sides), s))
    assert np.abs(reflect(found[1][0], c) - found[0][0]).max() < 1e-3
    (here, there) = ((ask.foramina(s, xyz), ask.recesses(s, chosen, xyz)) for xyz, chosen, ask, s in found)
    for a, b in zip(here, there, strict=True):
        (what, where), (what_there, where_there) = places(a), places(b, c)
        assert what == what_there and np.allclose(where, where_there, atol=2e-3)


def test_without_t1_the_offset_looks_on_t2_and_says_so(body, random_sides):
    study, canal = Study('1', [filled(s, lambda xyz: np.zeros(xyz.shape[:2], np.uint8)) for s in body[0].series]), body[1]
    ask = sides.load_sides(*random_sides)
    t1, t2, axial = (study.of(v)[0] for v in ('sagittal_t1', 'sagittal_t2', 'axial_t2'))
    for series in ([t2, axial], [replace(axial, view='sagittal_t1', series_id='wrong'), t2]):                    # absent; called T1 but axial
        table = ask.foramina(Study('1', series), canal)
        assert (table.source == 'other contrast').all() and np.allclose(table[XYZ], foramina.offset_foramina(t2, canal, (15., -3., 4.))[XYZ]) and len(table) == 10
    assert set(ask.foramina(Study('1', [t1, t2]), canal).source) <= {'network', 'offset'}
    assert not len(ask.foramina(Study('1', [axial]), canal)) and not len(ask.recesses(Study('1', [t1]), choose_slices([], canal), canal))


def test_the_mode_says_who_answers(body, random_sides):
    study, canal = Study('1', [filled(s, lambda xyz: np.zeros(xyz.shape[:2], np.uint8)) for s in body[0].series]), body[1]
    chosen = choose_slices(study.of('axial_t2'), canal)
    none = sides.load_sides('', '', 'none')
    assert not len(none.foramina(study, canal)) and list(none.foramina(study, canal)) == foramina.COLUMNS and list(none.recesses(study, chosen, canal)) == sides.RECESS_COLUMNS
    free = sides.load_sides(*random_sides, 'offset')
    assert (free.foramina(study, canal).source == 'offset').all() and np.allclose(free.recesses(study, chosen, canal)[XYZ], recesses.offset_recesses(study, chosen, canal, (8., -2., 0.))[XYZ])
    assert len(free.recesses(study, chosen.assign(study_id='1'), canal)) == 2 * len(chosen)
    with pytest.raises(ValueError, match="'network', 'offset', 'none', not 'both'"): sides.load_sides(*random_sides, 'both')


def test_labelled_canal_points_come_before_found_ones(body):
    labels = pd.DataFrame([dict(condition='spinal_canal_stenosis', level=l, **dict(zip(XYZ, x, strict=True))) for l, x in zip(LEVELS[:3], body[1][:3], strict=True)])
    xyz = sides.labelled_canal(labels, body[1] + 5)
    assert np.allclose(xyz[:3], body[1][:3]) and np.allclose(xyz[3:], body[1][3:] + 5) and np.isnan(sides.labelled_canal(labels)[3:]).all()
    points = {'1': pd.DataFrame([dict(condition=f'left_{RECESS}', level='l1_l2', **dict(zip(XYZ, body[1][0] + [7, -1, 0], strict=True)))])}
    found = sides.measured_offset(points, {'1': body[1] + [1, 0, 0]}, ['1', 'unknown'], RECESS)
    assert np.allclose(found[0], (6, -1, 0)) and np.allclose(found[1:], recesses.RECESS_OFFSET_MM)                # from the found point; no label, the fixed one
    assert np.allclose(sides.measured_offset({}, {}, [], FORAMEN), foramina.FORAMEN_OFFSET_MM)


def test_nothing_to_train_on_is_said():
    with pytest.raises(ValueError, match='-p sides offset'): sides.train_foramina([], [], PLAIN, 64, 4.5)
    nothing = (np.zeros((0, 64, 64), np.uint8), np.zeros((0, 2, 2)))
    with pytest.raises(ValueError, match='-p sides offset'): sides.train_recesses(nothing, nothing, 64)
