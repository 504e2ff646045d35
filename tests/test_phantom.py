"Properties of the phantom that a wrong implementation breaks: determinism, header facts, where the points lie."
import hashlib

import numpy as np
import pandas as pd
import pydicom
import pytest

from mscan import acquisition, anatomy, dicom, physics, phantom, rsna
from mscan.anatomy import FIRST, Anatomy, landmarks
from mscan.geometry import contains, plane_of
from mscan.tissues import sac_area


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return phantom.make_phantom(tmp_path_factory.mktemp('phantom') / 'data', 3, 2, seed=5, size='small', workers=2, quirks='none', progress=False)


def digest(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*')) if p.is_file() and p.name != 'phantom.json'}


def test_same_files_whatever_the_workers_and_the_count(data, tmp_path):
    one = phantom.make_phantom(tmp_path / 'one', 2, 2, seed=5, size='small', workers=1, quirks='none', progress=False)
    a, b = digest(data), digest(one)
    images = [k for k in b if k.endswith('.dcm')]
    assert len(images) > 100 and all(a[k] == b[k] for k in images)
    assert a['test_labels.csv'] == b['test_labels.csv'] and a['train.csv'] != b['train.csv']


def test_second_call_does_nothing_and_foreign_folders_are_refused(data, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in data.rglob('*.dcm')}
    phantom.make_phantom(data, 3, 2, seed=5, size='small', quirks='none', progress=False)
    assert 'already there' in capsys.readouterr().out and before == {p: p.stat().st_mtime_ns for p in data.rglob('*.dcm')}
    (tmp_path / 'mine.txt').write_text('x')
    with pytest.raises(ValueError, match='no phantom run'): phantom.make_phantom(tmp_path, 1, 0)
    for wrong in (dict(studies=0, test_studies=0), dict(seed=-1), dict(size='huge'), dict(workers=0), dict(prevalence='rael'), dict(quirks='some'), dict(scanner='Oak'), dict(transitional=2)):
        with pytest.raises(ValueError): phantom.make_phantom(tmp_path / 'new', **wrong)


def test_an_unfinished_set_is_made_anew(tmp_path):
    out = phantom.make_phantom(tmp_path / 'd', 1, 0, size='small', workers=1, progress=False)
    whole = digest(out)
    (out / 'phantom.json').write_text((out / 'phantom.json').read_text().replace('true', 'false'))
    next(out.rglob('*.dcm')).unlink()
    phantom.make_phantom(out, 1, 0, size='small', workers=1, progress=False)
    assert digest(out) == whole


def test_tables_are_the_competitions(data):
    labels, points = rsna.read_train(data / 'train.csv'), rsna.read_coordinates(data / 'train_label_coordinates.csv')
    described = rsna.read_descriptions(data / 'train_series_descriptions.csv')
    sample = rsna.read_submission(data / 'sample_submission.csv')
    found = rsna.discover_images(data, 'train')
    assert set(map(tuple, found[['study_id', 'series_id']].to_numpy())) == set(map(tuple, described[['study_id', 'series_id']].to_numpy()))
    assert list(sample.row_id) == rsna.row_ids(list(rsna.read_train(data / 'test_labels.csv').study_id.unique()))
    views = points.merge(described, on=['study_id', 'series_id'])['view']
    wanted = points.condition.map(lambda c: {'spin': 'sagittal_t2', 'fora': 'sagittal_t1', 'suba': 'axial_t2'}[c.replace('left_', '').replace('right_', '').replace('neural_', '')[:4]])
    assert (views.to_numpy() == wanted.to_numpy()).all()
    labelled = labels.dropna(subset='grade')
    assert len(points) == len(labelled) and len(points.merge(labelled, on=['study_id', 'condition', 'level'])) == len(points)


def test_headers_are_the_competitions(data):
    frames, instances = {}, {}
    for file in data.rglob('*.dcm'):
        d = pydicom.dcmread(file)
        study, series = file.parts[-3:-1]
        assert len(d) == 27 and d.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless and d.file_meta.MediaStorageSOPClassUID.name == 'Enhanced MR Image Storage'
        assert not [k for k in ('SOPClassUID', 'Modality', 'Manufacturer', 'RescaleSlope', 'NumberOfFrames', 'StudyDate', 'BodyPartExamined') if k in d]
        assert (d.StudyInstanceUID, d.SeriesInstanceUID, d.PatientID) == (study, f'{study}.{series}', study)
        assert d.SeriesDescription in ('T1', 'T2') and str(d.InstanceNumber) == file.stem and (d.BitsAllocated, d.BitsStored, d.PixelRepresentation) == (16, 12, 0)
        frames.setdefault(study, set()).add(d.FrameOfReferenceUID); instances.setdefault(study, []).append(d.SOPInstanceUID)
    assert all(len(f) >= 3 for f in frames.values()) and all(len(set(i)) < len(i) for i in instances.values())


@pytest.mark.parametrize('k', range(3))
def test_points_and_truth_agree_in_the_patient(k):
    p = phantom.phantom_study(11, k, 'small', pixels=False)
    truth = p.truth.set_index(['condition', 'level'])[['x_mm', 'y_mm', 'z_mm']]
    series = {s.series_id: s for s in p.study.series}
    off = []
    for r in p.points.itertuples():
        s = series[r.series_id]
        plane, moved = plane_of(s, list(s.instance_number).index(r.instance_number)), next(c.shift_mm for c in p.scans if c.series_id == r.series_id)
        assert abs(plane.distance(truth.loc[r.condition, r.level].to_numpy() + moved)) < 2.3 * next(c.gap for c in p.scans if c.series_id == r.series_id)
        off.append(np.linalg.norm(plane.to_pixel(truth.loc[r.condition, r.level].to_numpy() + moved) - (r.x, r.y)) * plane.spacing[0])
    assert np.median(off) < 3 * phantom.POINT_NOISE and max(off) < 6 * phantom.POINT_NOISE
    for name in ('neural_foraminal_narrowing', 'subarticular_stenosis'):   # LPS: x grows to the patient's left
        assert (truth.loc[f'left_{name}'].x_mm > truth.loc[f'right_{name}'].x_mm + 10).all()
    z = truth.loc['spinal_canal_stenosis'].z_mm.to_numpy()
    assert (np.diff(z) < -15).all() and (np.diff(z) > -42).all()


@pytest.mark.parametrize('k', range(8))
def test_every_level_is_seen_in_every_view(k):
    p = phantom.phantom_study(3, k, pixels=False)
    canal = p.truth[p.truth.condition == 'spinal_canal_stenosis'][['x_mm', 'y_mm', 'z_mm']].to_numpy()
    for view in ('sagittal_t1', 'sagittal_t2', 'axial_t2'):
        series = p.study.of(view)[0]
        planes = [plane_of(series, i) for i in range(len(series))]
        away = np.abs([plane.distance(canal) for plane in planes])
        inside = np.array([contains(plane, canal) for plane in planes])
        assert (np.where(inside, away, np.inf).min(0) < 4).all()
        assert len(np.unique(series.stack)) <= 6


def test_a_worse_canal_is_narrower_and_darker():
    sizes, light = [], []
    signal = physics.signals(physics.TISSUES, acquisition.draw_sequence(np.random.default_rng(0), 'Alder', 'axial_t2'))
    for d in (.1, .5, .9):
        a = Anatomy(np.random.default_rng(4), np.full((5, 5), .1) + np.eye(5)[0][:, None] * np.array([0, 0, d - .1, 0, 0]), np.full(5, .4), transitional=0)
        plane = acquisition.stack_of([landmarks(a)[0, 2]], np.array([1., 0, 0]), np.array([0, 1., 0]), .5, (61, 61))[0]
        bright = physics.expose(a, plane, [signal], 4.)[0].sum(0) > .75 * sum(signal['csf'])
        sizes.append(sac_area(a, a.disc_s[2])); light.append(bright[12:49, 8:53].mean())
    assert sizes[0] > 1.25 * sizes[1] > 1.6 * sizes[2] and light[0] > 1.15 * light[1] > 1.3 * light[2]


def test_every_pixel_effect_of_a_degree_stays_where_it_belongs():
    "One degree changed: the pictures of other levels stay as they were, those of its own level do not."
    one, two = (np.full((5, 5), .2) for _ in range(2))
    two[:, 2] = .7
    bodies = [Anatomy(np.random.default_rng(8), d, np.full(5, .4), transitional=0) for d in (one, two)]
    signal = physics.signals(physics.TISSUES, acquisition.draw_sequence(np.random.default_rng(0), 'Alder', 'axial_t2'))
    changed = []
    for k in (0, 2, 4):
        plane = acquisition.stack_of([bodies[0].place(0, 8, bodies[0].disc_s[k])], np.array([1., 0, 0]), np.array([0, 1., 0]), .8, (80, 80))[0]
        a, b = (physics.expose(body, plane, [signal], 4.)[0].sum(0) for body in bodies)
        changed.append(np.abs(a - b).mean())
    assert changed[1] > 10 * max(changed[0], changed[2])


@pytest.mark.parametrize('kind, bands', [('lumbarised S1', 6), ('sacralised L5', 4)])
def test_transitional_vertebrae(kind, bands):
    "A lumbarised S1 has a sixth well-formed disc, a sacralised L5 a rudiment in place of the fifth; the five labelled discs stay five."
    found = [a for a in (Anatomy(np.random.default_rng(i), np.full((5, 5), .1), np.full(5, .1), transitional=1) for i in range(12)) if a.build.transitional == kind]
    assert found
    for a in found:
        heights = np.append(a.ends[2:, 1] - a.ends[2:, 0], a.build.edges[2 * FIRST + 12] - a.build.edges[2 * FIRST + 11])
        assert (heights > 3.5).sum() == bands and len(a.disc_s) == 5
    assert all(Anatomy(np.random.default_rng(i), np.full((5, 5), .1), np.full(5, .1), transitional=0).build.transitional == '' for i in range(30))


def test_one_slice_alone_is_the_same_slice():
    p = phantom.phantom_study(3, 2, 'small')
    for j, i in ((0, 3), (1, 5), (2, 0)):
        assert (phantom.paint(p, [(j, i)])[j, i] == p.images[p.scans[j].series_id][i]).all()


def test_the_disease_is_the_same_whatever_looks_at_it():
    "Scanner, quirks and size change pictures, never grades, anatomy or the true places."
    base = phantom.phantom_study(9, 1, 'small', pixels=False)
    for other in (dict(scanner='Rowan'), dict(quirks='all'), dict(size='demo')):
        p = phantom.phantom_study(9, 1, **{'size': 'small'} | other, pixels=False)
        same = ['condition', 'level', 'x_mm', 'y_mm', 'z_mm', 'latent', 'grade', 'sac_mm2']
        assert p.truth[same].equals(base.truth[same])


def test_chemical_shift_and_zero_filling_keep_the_place_of_water():
    point = np.zeros((64, 48), np.float32); point[21, 30] = 1
    chain = physics.draw_chain(np.random.default_rng(0), acquisition.SCANNERS['Alder'] | dict(noise=(0, 0), motion=0, keep=(1, 1), keep_phase=(1, 1), filter=(0, 0)), False)
    chain.full = 2000.
    for shape in ((64, 48), (96, 72), (128, 96)):
        water = physics.reconstruct(physics.acquire(np.random.default_rng(0), point, 0 * point, chain), shape, chain)
        assert np.allclose(np.unravel_index(water.argmax(), shape), np.array([21, 30]) * shape[0] / 64, atol=.51)
    fat = physics.reconstruct(physics.acquire(np.random.default_rng(0), 0 * point, point, chain), (256, 192), chain)
    away = np.array(np.unravel_index(fat.argmax(), fat.shape)) / 4 - [21, 30]
    assert abs(away[1 - chain.phase_axis] - chain.shift_sign * chain.shift_px) < .3 and abs(away[chain.phase_axis]) < .3


def test_acquisition_knows_nothing_of_the_grades():
    plans = []
    for d in (.05, .95):
        a = Anatomy(np.random.default_rng(2), np.full((5, 5), d), np.full(5, .5), transitional=0)
        plans.append(acquisition.plan_study(np.random.default_rng(3), a, 'demo', 'Birch'))
    for one, two in zip(*plans, strict=True):
        assert (one.view, one.gap, one.thickness, list(one.numbers)[0], one.planes[0].shape, one.planes[0].spacing[0], len(one.planes)) == (two.view, two.gap, two.thickness, list(two.numbers)[0], two.planes[0].shape, two.planes[0].spacing[0], len(two.planes))


def test_memory_and_disk_hold_the_same_study(data):
    number = phantom.study_number(5, 0)
    read, made = dicom.read_study(data, 'train', number), phantom.phantom_study(5, 0, 'small').study
    assert not read.problems
    for view in rsna.VIEWS.values():
        for a, b in zip(read.of(view), made.of(view), strict=True):
            assert (a.instance_number == b.instance_number).all() and (a.stack == b.stack).all() and all((x == y).all() for x, y in zip(a.pixels, b.pixels, strict=True))
            assert np.abs(a.image_position - b.image_position).max() < 1e-4


def test_a_data_set_with_every_oddity_is_read_and_prepared(tmp_path):
    "Twelve studies under --quirks all: each is read, damage has its reason, labels stay, and what is not damaged is what was made."
    from mscan.prepare import prepare
    out = phantom.make_phantom(tmp_path / 'data', 12, 1, seed=2, size='small', workers=2, quirks='all', progress=False)
    truth = rsna.read_train(out / 'train.csv')
    planted = set()
    for k in range(12):
        p = phantom.phantom_study(2, k, 'small', quirks='all')
        planted |= p.quirks
        read = dicom.read_study(out, 'train', p.study.study_id)
        if 'zero_byte_file' in p.quirks: assert any('byte' in s or 'empty' in s for s in read.problems), read.problems
        if p.quirks & {'zero_byte_file', 'monochrome1', 'signed_pixels', 'rescale_slope'}: continue
        for a in read.series:
            b = next(s for s in p.study.series if s.series_id == a.series_id)
            assert (a.instance_number == b.instance_number).all() and all((x == y).all() for x, y in zip(a.pixels, b.pixels, strict=True))
    assert len(planted) >= 8 and len(truth) == 12 * 25
    tables = prepare(out, tmp_path / 'prepared', validation=.2, test=0., workers=2, progress=False)
    known = pd.read_csv(out / 'truth.csv', dtype={'study_id': str}).merge(tables.points, on=['study_id', 'condition', 'level'], suffixes=('', '_found'))
    moved = pd.read_csv(out / 'truth_series.csv', dtype={'study_id': str, 'series_id': str}).set_index('series_id')[['shift_x_mm', 'shift_y_mm', 'shift_z_mm']]
    canal = known[(known.condition == 'spinal_canal_stenosis') & (known['view'] == 'sagittal_t2')]
    off = np.linalg.norm(canal[['x_mm_found', 'y_mm_found', 'z_mm_found']].to_numpy() - canal[['x_mm', 'y_mm', 'z_mm']].to_numpy() - moved.loc[canal.series_id].to_numpy(), axis=1)
    assert len(canal) > 35 and off.max() < 15  # no spoiled point is left


def test_same_files_from_another_interpreter(tmp_path):
    import os
    import subprocess
    import sys
    sets = []
    for n in (1, 2):
        out = tmp_path / str(n)
        code = f"from mscan.phantom import make_phantom; make_phantom({str(out)!r}, 2, 0, seed=4, size='small', workers={n}, quirks='all', progress=False)"
        subprocess.run([sys.executable, '-c', code], check=True, env=os.environ | {'PYTHONHASHSEED': str(n)})
        sets.append(digest(out))
    assert sets[0] == sets[1] and len(sets[0]) > 60


def test_foramina_are_marked_where_the_foramen_is():
    "The foramen's own coordinate drops at each pedicle: an interpolation across the drop once put a third of the L5/S1 foramina into the pedicle above."
    for k in range(40):
        rng = np.random.default_rng([5, k])
        a = anatomy.Anatomy(rng, rng.uniform(0, 1, (5, 5)), rng.uniform(0, 1, 5))
        along = np.array([[a.spine(*xyz)[2] for xyz in side] for side in anatomy.landmarks(a)[1:3]])      # (2 sides, 5 levels) mm
        assert np.abs(a.profile['foramen'][a.row(along)]).max() < .5
        assert ((along - a.disc_s > -7) & (along < a.disc_s)).all()                                         # just above the disc
