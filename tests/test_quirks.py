"Each quirk does what its name says and nothing else, at its rate, and the readers get through it."
import copy
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import RLELossless

from mscan import dicom, rsna
from mscan.geometry import Plane, corners
from mscan.quirks import (CANAL, LARGEST_NUMBER, LEFT, QUIRKS, RIGHT, draw_quirks, quirk_dataset, quirk_files, quirk_labels, quirk_points, quirk_scans,
                          quirk_table, quirks_of)

DRAWS = 20_000
OF_STUDIES = [n for n, q in QUIRKS.items() if q.place != 'table']
OF_PLACE = lambda place: [n for n, q in QUIRKS.items() if q.place == place]


@dataclass
class Scan:
    view: str
    planes: list
    numbers: np.ndarray
    series_id: str
    thickness: float = 4.
    gap: float = 4.5


def stream(seed=0): return np.random.default_rng([seed, 77])


@pytest.fixture
def scans():
    "T1 and T2 of 15 tilted slices, one numbered from the left, and 30 axial slices numbered from the feet."
    def sagittal(mm, turn, order):
        across, down = np.array([-np.sin(turn), np.cos(turn), 0]), np.array([0, 0, -1.])
        return [Plane([x, -120, 130], np.concatenate([across, down]), [mm, mm], (int(256 / mm), int(240 / mm))) for x in np.arange(-31.5, 32, 4.5)[::order]]
    axial = [Plane([-90, -90, z], [1, 0, 0, 0, 1, 0], [.9, .9], (200, 200)) for z in np.linspace(-80, 80, 30)]
    return [Scan('sagittal_t1', sagittal(.7, .03, 1), np.arange(1, 16), '101'), Scan('sagittal_t2', sagittal(.6, .03, -1), np.arange(1, 16), '102'), Scan('axial_t2', axial, np.arange(1, 31), '103')]


@pytest.fixture
def points(scans):
    "A point a cell, as a careful reader sets it."
    rows = []
    for c, view in enumerate(('sagittal_t2', 'sagittal_t1', 'sagittal_t1', 'axial_t2', 'axial_t2')):
        scan = next(s for s in scans if s.view == view)
        for k in range(5):
            xyz = np.array([(0, 14, -14, 9, -9)[c], 3. * k, 60. - 29 * k])
            i = int(np.argmin([abs(p.distance(xyz)) for p in scan.planes]))
            rows.append((scan.series_id, int(scan.numbers[i]), c, k, *map(float, scan.planes[i].to_pixel(xyz))))
    return rows


def same(a, b): return a.view == b.view and a.series_id == b.series_id and np.array_equal(a.numbers, b.numbers) and all(p is q for p, q in zip(a.planes, b.planes, strict=True))
def xyz_of(point, scans): return next(p for s in scans if s.series_id == point[0] for n, p in zip(s.numbers, s.planes, strict=True) if n == point[1]).to_patient(point[4:])
def cells_changed(before, after):
    a, b = ({p[2:4]: p for p in points} for points in (before, after))
    return {c for c in a if b.get(c) != a[c]} | (set(b) - set(a))


# --- rates ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mode', ['real', 'all'])
def test_rates_are_those_of_the_register(mode):
    rng = stream()
    drawn = [draw_quirks(rng, mode) for _ in range(DRAWS)]
    for name in OF_STUDIES:
        rate, count = QUIRKS[name].rate_under(mode), sum(name in d for d in drawn)
        assert 0 < rate < 1 and abs(count - DRAWS * rate) < 4.5 * (DRAWS * rate * (1 - rate)) ** .5 + .5, (name, count, DRAWS * rate)
    groups = {}
    for name in OF_STUDIES: groups.setdefault(QUIRKS[name].group, set()).add(name)
    assert all(len(d & g) <= 1 for d in drawn for g in groups.values())
    a, b = (np.array([n in d for d in drawn]) for n in ('monochrome1', 'scs_points_missing'))
    assert abs((a & b).mean() - a.mean() * b.mean()) < .006                                            # else independent


def test_real_rates_are_counts_over_the_real_studies():
    counts = dict(second_sagittal_t1=7, no_sagittal_t1=2, no_sagittal_t2=1, cervical_series=1, scs_points_missing=75, scs_point_in_corner=13, scs_points_swapped=12,
                  scs_points_on_t1=1, t1_sides_swapped=30, no_scs_label=1)
    assert {n: round(QUIRKS[n].rate * 1975) for n in counts} == counts
    rest = [q for n, q in QUIRKS.items() if n not in counts and n != 'numbers_mixed']
    assert QUIRKS['numbers_mixed'].rate == .005 and all('chosen' in q.source and q.rate == .002 for q in rest if q.place != 'table')
    assert all(q.rate_under('none') == 0 and q.rate_under('real') == q.rate <= q.rate_under('all') for q in QUIRKS.values()) and QUIRKS['blank_tail_rows'].rate == 0


def test_none_gives_nothing_and_other_words_are_refused():
    rng = stream()
    assert all(draw_quirks(rng, 'none') == set() for _ in range(2000))
    for call in (lambda: draw_quirks(rng, 'some'), lambda: quirk_table('nowhere', 'some')):
        with pytest.raises(ValueError, match='some'): call()
    with pytest.raises(ValueError, match='no_such'): quirk_scans(rng, {'no_such'}, [])


def test_draws_repeat_and_take_as_many_numbers_in_every_mode():
    after = []
    for mode in ('none', 'real', 'all'):
        rng = stream(5)
        first = [draw_quirks(rng, mode) for _ in range(50)]
        after.append(rng.random())
        assert first == [draw_quirks(r, mode) for r in [stream(5)] for _ in range(50)]
    assert len(set(after)) == 1


def test_forty_studies_under_all_hold_nearly_every_quirk_and_keep_their_labels():
    sets = [[draw_quirks(np.random.default_rng([s, k]), 'all') for k in range(40)] for s in range(100)]
    assert np.mean([len(set().union(*studies)) == len(OF_STUDIES) for studies in sets]) > .85
    lost = np.array([[bool(d & {'no_scs_label', 'no_sagittal_t2', 'cervical_series'}) for d in studies] for studies in sets])
    assert lost.mean() < .4 and lost.mean(1).max() < .65                                                # the main of every set can be learned from


# --- scans ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('name', OF_PLACE('scans'))
def test_a_quirk_of_scans_does_its_own_thing_only(name, seed, scans):
    before = copy.deepcopy(scans)
    after = quirk_scans(stream(seed), {name}, scans)
    assert all(a.view == b.view and np.array_equal(a.numbers, b.numbers) and all(np.array_equal(p.position, q.position) for p, q in zip(a.planes, b.planes, strict=True))
               for a, b in zip(before, scans, strict=True)), 'the scans handed in are changed'
    assert len({s.series_id for s in after}) == len(after) and all(s.thickness == 4. and len(s.planes) == len(s.numbers) == len(set(s.numbers.tolist())) for s in after)
    untouched = [a for a in after if any(same(a, b) for b in scans)]
    views = [s.view for s in after]
    if name in ('second_sagittal_t1', 'cervical_series'):
        assert len(untouched) == 3 and len(after) == 4 and after[3].view == ('sagittal_t1' if name == 'second_sagittal_t1' else 'sagittal_t2')
        model = next(s for s in scans if s.view == after[3].view)
        move = np.array([p.position - q.position for p, q in zip(after[3].planes, model.planes, strict=True)])
        assert np.allclose(move, move[0]) and all(np.array_equal(p.orientation, q.orientation) for p, q in zip(after[3].planes, model.planes, strict=True))
        assert (160 <= move[0, 2] <= 200 and not move[0, :2].any()) if name == 'cervical_series' else 0 < np.linalg.norm(move[0]) < 6
    elif name.startswith('no_sagittal'):
        assert len(untouched) == len(after) == 2 and f'sagittal_{name[-2:]}' not in views and 'axial_t2' in views
    elif name == 'number_gaps':
        assert len(untouched) == 2 and len(after) == 3
        new, old = next((a, b) for a, b in zip(after, scans, strict=True) if not same(a, b))
        assert (np.diff(new.numbers) >= 1).all() and (np.diff(new.numbers) > 1).any() and 1 <= new.numbers.min() and new.numbers.max() <= LARGEST_NUMBER and all(p is q for p, q in zip(new.planes, old.planes, strict=True))
    elif name == 'numbers_mixed':
        assert len(untouched) == 2 and sorted(after[2].numbers) == sorted(scans[2].numbers) and len(set(np.sign(np.diff(after[2].numbers)))) == 2
    else:
        assert name == 'mixed_shapes' and len(untouched) == 2
        new, old = next((a, b) for a, b in zip(after, scans, strict=True) if not same(a, b))
        changed = [p.shape != q.shape for p, q in zip(new.planes, old.planes, strict=True)]
        assert 0 < sum(changed) < len(changed) / 2 and len({p.shape for p in new.planes}) == 2
        assert all(np.allclose(corners(p), corners(q), atol=1e-9) for p, q in zip(new.planes, old.planes, strict=True)) and np.array_equal(new.numbers, old.numbers)


def test_gaps_keep_a_falling_order_and_fit_under_the_largest_number(scans):
    falling = [Scan('axial_t2', scans[2].planes * 7, np.arange(210, 0, -1), '1')]
    for seed in range(200):
        numbers = quirk_scans(stream(seed), {'number_gaps'}, falling)[0].numbers
        assert (np.diff(numbers) < 0).all() and numbers.max() <= LARGEST_NUMBER and numbers.min() >= 1


def test_the_reader_sorts_mixed_numbers_and_shapes_by_space(scans):
    after = quirk_scans(stream(2), {'numbers_mixed', 'number_gaps', 'mixed_shapes'}, scans)
    for scan in after:
        facts = [np.array([getattr(p, n) for p in scan.planes]) for n in ('position', 'orientation', 'shape', 'spacing')]
        order, stack = dicom.order_slices(*facts)
        way = facts[0][order] @ scan.planes[0].normal
        assert set(stack) == {0} and len(set(np.sign(np.diff(way)))) == 1


# --- points --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(12))
@pytest.mark.parametrize('name', OF_PLACE('points'))
def test_a_quirk_of_points_touches_what_it_says(name, seed, points, scans):
    before, old = list(points), {p[2:4]: p for p in points}
    after, touched = quirk_points(stream(seed), {name}, points, scans)
    new = {p[2:4]: p for p in after}
    assert points == before and len(new) == len(after) and list(touched) == [name]
    cells = touched[name]
    assert cells and len(set(cells)) == len(cells) and cells_changed(points, after) == set(cells)
    assert {c for c, _ in cells} <= ({LEFT, RIGHT} if name == 't1_sides_swapped' else {CANAL})
    if name == 'scs_points_missing': assert len(cells) in (1, 2) and not set(cells) & set(new) and len(after) == 25 - len(cells)
    else: assert [p[2:4] for p in after] == [p[2:4] for p in points]                     # same cells, same order
    if name == 'scs_point_in_corner': assert len(cells) == 1 and all(4 <= v <= 6 for v in new[cells[0]][4:]) and new[cells[0]][:2] == old[cells[0]][:2]
    if name == 'scs_points_swapped':
        (_, a), (_, b) = cells
        assert b == a + 1 and new[CANAL, a][4:] == old[CANAL, b][4:] and new[CANAL, b][:2] == old[CANAL, a][:2]
        assert not (np.diff([new[CANAL, k][5] for k in range(5)]) > 0).all()
    if name == 'scs_points_on_t1':
        assert len(cells) == 5 and {new[c][0] for c in cells} == {'101'}
        assert all(np.linalg.norm(xyz_of(new[c], scans) - xyz_of(old[c], scans)) <= 4.5 / 2 + 1e-6 for c in cells)          # the same place up to half a gap
    if name == 't1_sides_swapped':
        assert all(new[c][4:] == old[c][4:] for c in cells)
        for k in {k for _, k in cells}:
            left, right = xyz_of(new[LEFT, k], scans)[0], xyz_of(new[RIGHT, k], scans)[0]
            assert left - right < 1 and new[RIGHT, k][:2] == old[LEFT, k][:2] and ((LEFT, k) in cells) == (left < right - 1)


def test_how_often_points_go_missing_and_sides_are_equal(points, scans):
    rng = stream()
    lost = [len(quirk_points(rng, {'scs_points_missing'}, points, scans)[1]['scs_points_missing']) for _ in range(1000)]
    assert abs(np.mean(lost) - 117 / 75) < .06
    equal = [all(c == RIGHT for c, _ in quirk_points(rng, {'t1_sides_swapped'}, points, scans)[1]['t1_sides_swapped']) for _ in range(400)]
    assert abs(np.mean(equal) - .5) < .1


def test_where_there_is_nothing_to_spoil_nothing_is_touched(points, scans):
    every = set(OF_PLACE('points'))
    foramina = [p for p in points if p[2] >= 3]
    assert quirk_points(stream(), every, foramina, scans) == (foramina, {}) and quirk_points(stream(), every, [], scans) == ([], {})
    bare = quirk_scans(stream(), {'no_sagittal_t1'}, scans)
    after, touched = quirk_points(stream(), {'scs_points_on_t1', 't1_sides_swapped'}, points, bare)
    assert touched == {} and after == [p for p in points if p[0] != '101']               # points on a series that is gone are gone
    assert quirk_points(stream(), set(), points, scans) == (points, {})


@pytest.mark.parametrize('seed', range(10))
def test_points_follow_the_slices_they_were_set_on(seed, points, scans):
    "Numbers and matrix change under the points; the places in the patient do not, and points on untouched slices keep every digit."
    names = {'number_gaps', 'numbers_mixed', 'mixed_shapes'}
    taken = quirk_scans(stream(seed), names, scans)
    after, touched = quirk_points(stream(seed), set(), points, taken, scans)
    assert touched == {} and [p[2:4] for p in after] == [p[2:4] for p in points]
    assert all(np.allclose(xyz_of(a, taken), xyz_of(b, scans), atol=1e-9) for a, b in zip(after, points, strict=True))
    assert {p[1] for p in after if p[2] >= 3} != {p[1] for p in points if p[2] >= 3}                     # the axial numbers are others
    assert quirk_points(stream(), set(), points, scans, scans) == (points, {})
    bare = quirk_scans(stream(), {'no_sagittal_t2'}, scans)
    assert quirk_points(stream(), {'scs_points_missing'}, points, bare, scans) == ([p for p in points if p[0] != '102'], {})


def test_a_point_on_an_instance_that_is_not_there_is_refused(points, scans):
    gaps = next(s for s in (quirk_scans(stream(k), {'number_gaps'}, scans) for k in range(99)) if s[1].numbers.min() > 20)
    with pytest.raises(ValueError, match='no instance'): quirk_points(stream(), set(), points, gaps)


def test_points_of_all_quirks_repeat(points, scans):
    every = set(OF_PLACE('points'))
    assert quirk_points(stream(3), every, points, scans) == quirk_points(stream(3), every, points, scans) != quirk_points(stream(4), every, points, scans)


# --- labels, truth -------------------------------------------------------------------------------------------------

def test_labels_of_the_canal_go_and_no_others():
    missing = np.random.default_rng(0).random((5, 5)) < .2
    before = missing.copy()
    after = quirk_labels({'no_scs_label', 'monochrome1'}, missing)
    assert after[CANAL].all() and np.array_equal(after[1:], before[1:]) and np.array_equal(missing, before)
    assert np.array_equal(quirk_labels(set(OF_STUDIES) - {'no_scs_label'}, missing), before)


def test_truth_names_every_quirk_where_it_is():
    column = quirks_of({'second_sagittal_t1', 'zero_byte_file', 'scs_points_missing', 'no_scs_label'}, {'scs_points_missing': [(0, 2)]})
    assert column.shape == (5, 5) and set(column[0, 2].split(';')) == {'second_sagittal_t1', 'zero_byte_file', 'scs_points_missing', 'no_scs_label'}
    assert set(column[0, 0].split(';')) == {'second_sagittal_t1', 'zero_byte_file', 'no_scs_label'} and set(column[1:].ravel()) == {'second_sagittal_t1;zero_byte_file'}
    assert set(quirks_of(set(), {}).ravel()) == {''} and set(quirks_of({'scs_points_on_t1'}, {}).ravel()) == {''}      # drawn, but touched nothing


# --- files ---------------------------------------------------------------------------------------------------------

def slice_of(pixels):
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID, d.SliceThickness, d.SpacingBetweenSlices, d.WindowCenter, d.WindowWidth = RLELossless, 4., 4.5, 1200., 1500.
    d.Rows, d.Columns = pixels.shape
    d.SamplesPerPixel, d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation, d.PhotometricInterpretation = 1, 16, 12, 11, 0, 'MONOCHROME2'
    return d


def stored(names, pixels):
    "The dataset as it is written, and what the reader makes of it."
    d = slice_of(pixels)
    d.compress(RLELossless, quirk_dataset(names, d, pixels), encoding_plugin='pylibjpeg', generate_instance_uid=False)
    return d, dicom.read_pixels(d)


GREY = ('monochrome1', 'signed_pixels', 'rescale_slope')
CONSTANT = {'monochrome1': -4095, 'signed_pixels': -1024}                                # what the reader's picture is shifted by


@pytest.mark.parametrize('names', [[n for k, n in enumerate(GREY) if i >> k & 1] for i in range(8)], ids='+'.join)
def test_the_reader_sees_the_same_picture(names):
    pixels = np.random.default_rng(1).integers(0, 4096, (2, 40, 50)).astype(np.uint16)
    pixels[0, 0, :2], pixels[1] = (0, 4095), pixels[1] // 3                              # two slices of one series, one of them dark
    shifts = set()
    for image in pixels:
        d, read = stored(names, image)
        shifts |= set(np.unique(read.astype(float) - image))
        assert d.BitsStored == (12 if set(names) <= {'monochrome1'} else 16) and d.HighBit == d.BitsStored - 1
        # the window shows the same pixels half grey: it is set in values after the rescale, before the inversion
        value = -read.astype(float) if 'monochrome1' in names else read.astype(float)
        assert np.array_equal(value > d.WindowCenter, image < 1200 if 'monochrome1' in names else image > 1200)
    expected = 0 if not names else CONSTANT.get(names[0], 0) if len(names) == 1 else None
    assert len(shifts) == 1 and (expected is None or shifts == {float(expected)}), shifts


@pytest.mark.parametrize('names', [('monochrome1',), ('signed_pixels',), ('rescale_slope',), GREY], ids='+'.join)
def test_the_picture_in_eight_bits_is_the_same(names):
    "Exactly for whole numbers; a rescale makes floats, whose percentiles are interpolated: within one grey level."
    from mscan.images import normalise
    images = list(np.random.default_rng(4).gamma(2, 200, (3, 32, 32)).clip(0, 4095).astype(np.uint16))
    def eight(pixels):
        n = len(pixels)
        return np.array(normalise(dicom.Series('7', '1', 'sagittal_t2', pixels, np.zeros((n, 3)), np.zeros((n, 6)), np.ones((n, 2)), np.full((n, 2), 32), np.arange(n), np.zeros(n, int))).pixels, int)
    away = np.abs(eight([stored(names, p)[1] for p in images]) - eight(images)).max()
    assert away <= (1 if 'rescale_slope' in names else 0)


@pytest.mark.parametrize('name', OF_PLACE('dataset'))
def test_a_quirk_of_headers_changes_its_own_elements(name):
    pixels = np.random.default_rng(2).integers(0, 4096, (30, 30)).astype(np.uint16)
    (clean, _), (spoiled, _) = stored((), pixels), stored((name,), pixels)
    differ = {e.keyword for e in clean if e.keyword not in spoiled or spoiled[e.keyword].value != e.value} | {e.keyword for e in spoiled if e.keyword not in clean}
    assert differ == dict(monochrome1={'PhotometricInterpretation', 'WindowCenter', 'PixelData'}, signed_pixels={'PixelRepresentation', 'BitsStored', 'HighBit', 'WindowCenter', 'PixelData'},
                          rescale_slope={'BitsStored', 'HighBit', 'RescaleSlope', 'RescaleIntercept', 'PixelData'}, no_thickness={'SliceThickness', 'SpacingBetweenSlices'})[name]


def test_a_reader_that_honours_nothing_is_wrong():
    "The check can fail: each of the three spoils the picture for who reads only the stored values."
    pixels = np.random.default_rng(3).integers(0, 4096, (30, 30)).astype(np.uint16)
    for name, tag in (('monochrome1', 'PhotometricInterpretation'), ('rescale_slope', 'RescaleSlope'), ('signed_pixels', 'PixelRepresentation')):
        d, _ = stored((name,), pixels)
        setattr(d, tag, {'PhotometricInterpretation': 'MONOCHROME2', 'RescaleSlope': 1., 'PixelRepresentation': 0}[tag])
        assert len(np.unique(dicom.read_pixels(d).astype(float) - pixels)) > 1, name


def written(folder, scans):
    "Small pixels of the scans as files of study 7."
    rng = stream(6)
    for scan in scans:
        (folder / scan.series_id).mkdir(parents=True)
        for plane, n in zip(scan.planes, scan.numbers, strict=True):
            d, pixels = slice_of(rng.integers(0, 900, (8, 8)).astype(np.uint16)), rng.integers(0, 900, (8, 8)).astype(np.uint16)
            d.ImagePositionPatient, d.ImageOrientationPatient, d.PixelSpacing, d.InstanceNumber = plane.position.tolist(), plane.orientation.tolist(), plane.spacing.tolist(), int(n)
            d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = f'7.1.{n}'
            d.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.4.1'
            d.compress(RLELossless, pixels, encoding_plugin='pylibjpeg', generate_instance_uid=False)
            d.save_as(folder / scan.series_id / f'{n}.dcm', enforce_file_format=True)


def test_one_file_becomes_empty_and_the_reader_leaves_it_out(scans, tmp_path):
    sizes = []
    for k in range(2):
        folder = tmp_path / str(k) / 'test_images' / '7'
        written(folder, scans)
        quirk_files(stream(1), {'monochrome1'}, folder)
        assert min(p.stat().st_size for p in folder.glob('*/*')) > 0
        quirk_files(stream(1), {'zero_byte_file'}, folder)
        sizes.append({str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.glob('*/*'))})
    assert sizes[0] == sizes[1] and sum(v == 0 for v in sizes[0].values()) == 1
    quirk_files(stream(), {'zero_byte_file'}, tmp_path / 'nowhere')
    study = dicom.read_study(tmp_path / '1', 'test', '7')
    assert sum(len(s.left_out) for s in study.series) == 1 and any('empty file' in p for p in study.problems) and sum(map(len, study.series)) == 59


TABLES = {'train.csv': (rsna.read_train, ','.join(('study_id', *rsna.CELLS)), ['7' + ',Normal/Mild' * 24 + ',', '8' + ',Severe' * 25]),
          'train_label_coordinates.csv': (rsna.read_coordinates, 'study_id,series_id,instance_number,condition,level,x,y', ['7,11,3,Spinal Canal Stenosis,L1/L2,10.5,20.25']),
          'train_series_descriptions.csv': (rsna.read_descriptions, 'study_id,series_id,series_description', ['7,11,Sagittal T1', '7,12,Axial T2'])}


@pytest.mark.parametrize('name', TABLES)
def test_blank_tail_rows_are_left_out_and_said(tmp_path, name):
    path, (read, header, lines) = tmp_path / name, TABLES[name]
    text = '\n'.join([header, *lines, ''])
    path.write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        before = read(path)
    for mode in ('none', 'real'): quirk_table(path, mode)
    assert path.read_text() == text
    quirk_table(path, 'all')
    assert path.read_text().startswith(text) and path.read_text().endswith(',\n\n') and len(path.read_text().split('\n')) == len(text.split('\n')) + 3
    with pytest.warns(UserWarning, match='3 blank rows left out'): after = read(path)
    assert after.equals(before)
