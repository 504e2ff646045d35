"What series show, against what is said of them; what points are worth; and that nobody's name leaves a header."
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest

from mscan.contents import PAIR_SURE, SPOT_T1, SURE, axial_spot, coverage, examine, level_doubts, out_of_view, parts_apart, series_plane, t2_log_odds
from mscan.geometry import plane_distances
from mscan.mirror import restored
from mscan.phantom import as_study, paint, phantom_study
from mscan.prepare import read_examined, read_tables
from mscan.rsna import LEVELS

BIN, ROOT = Path(sys.executable).parent, Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def study(): return phantom_study(3, 0, 'small', quirks='none')


def of(study, view): return next(s for s in study.series if s.view == view)
def canal(p): return p.truth[p.truth.condition == 'spinal_canal_stenosis'][['x_mm', 'y_mm', 'z_mm']].to_numpy()


# --- described wrongly ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('wrong', [('Sagittal T2/STIR', 'Sagittal T1', 'Axial T2'), ('Axial T2', 'Sagittal T2/STIR', 'Sagittal T1'), ('Axial T2',) * 3, ('Sagittal T1',) * 3])
def test_a_wrong_table_is_put_right(small_data, tmp_path, wrong):
    "Every exchange of words in the description table leads to the same views, with a sentence for every change; the right table to no finding."
    right = dict(zip(('Sagittal T1', 'Sagittal T2/STIR', 'Axial T2'), wrong, strict=True))
    tables = read_tables(small_data, 'test')
    spoiled = tables.descriptions.assign(view=tables.descriptions['view'].map({'sagittal_t1': 'Sagittal T1', 'sagittal_t2': 'Sagittal T2/STIR', 'axial_t2': 'Axial T2'}).map(right).map(
        {'Sagittal T1': 'sagittal_t1', 'Sagittal T2/STIR': 'sagittal_t2', 'Axial T2': 'axial_t2'}))
    for study_id in tables.studies:
        want = tables.descriptions[tables.descriptions.study_id == study_id].set_index('series_id')['view'].to_dict()
        said = spoiled[spoiled.study_id == study_id].set_index('series_id')['view'].to_dict()
        good, none = read_examined(small_data, 'test', study_id, tables.descriptions)
        mended, findings = read_examined(small_data, 'test', study_id, spoiled)
        assert none == [] and good.problems == [] and {s.series_id: s.view for s in good.series} == want
        assert {s.series_id: s.view for s in mended.series} == want
        changed = {i for i in want if want[i] != said[i]}
        assert {f['series_id'] for f in findings} >= changed and all(any(i in p for p in mended.problems) for i in changed) and not any(p.startswith('no ') for p in mended.problems)


def test_what_is_no_view_is_set_aside(study):
    coronal = of(study.study, 'sagittal_t2')
    turn = np.array([[0., -1, 0], [1, 0, 0], [0, 0, 1]])
    coronal = replace(coronal, series_id='c', image_orientation=(coronal.image_orientation.reshape(-1, 2, 3) @ turn.T).reshape(-1, 6), image_position=coronal.image_position @ turn.T)
    out, findings = examine(replace(study.study, series=[coronal, of(study.study, 'sagittal_t1'), of(study.study, 'axial_t2')]))
    assert series_plane(coronal) == 'coronal' and [s.series_id for s in out.series].count('c') == 0 and 'no sagittal T2 series' in out.problems and findings[0]['done'] == 'set aside'


def test_storage_changes_no_decision(study):
    "Head-down, left to right, numbered the other way: the same evidence, views, parts and levels in view."
    again = replace(study.study, series=[restored(s, True, True) for s in study.study.series])
    for a, b in zip(study.study.series, again.series, strict=True):
        assert series_plane(a) == series_plane(b)
        if 'sagittal' in a.view: assert abs(t2_log_odds(a) - t2_log_odds(b)) < 1e-6
    assert [s.view for s in examine(again, always=True)[0].series] == [s.view for s in study.study.series]
    assert coverage(study.study, canal(study)).equals(coverage(again, canal(study)))


def test_evidence_needs_pixels_and_slices(study):
    t2 = of(study.study, 'sagittal_t2')
    assert np.isnan(t2_log_odds(replace(t2, pixels=[]))) and np.isnan(axial_spot(replace(of(study.study, 'axial_t2'), pixels=[])))
    flat = replace(t2, pixels=[np.zeros_like(p) for p in t2.pixels])
    assert abs(t2_log_odds(flat)) < 1e3 and not examine(replace(study.study, series=[flat]), always=True)[0].problems[:0]       # no crash on an empty image
    few = replace(t2, **{n: getattr(t2, n)[:2] for n in ('pixels', 'image_position', 'image_orientation', 'pixel_spacing', 'shape', 'instance_number', 'stack', 'files')})
    assert np.isnan(t2_log_odds(few))


@pytest.mark.slow
def test_measured_error_of_the_contrast():
    "Lone series, pairs and axial ones of seeds that the weights have not seen; the figures of docs/inputs_contents.md, each with its 95 % interval."
    from scipy.stats import beta
    from mscan.acquisition import draw_sequence
    odds, spots, n = [], [], int(os.environ.get('MSCAN_CONTRAST_SEEDS', 40))
    for seed in range(5000, 5000 + n):
        p = phantom_study(seed, 0, 'small', quirks='none')
        odds.append({s.view: t2_log_odds(s) for s in p.study.series if 'sagittal' in s.view})
        j = next(i for i, s in enumerate(p.scans) if s.view == 'axial_t2')
        t1 = draw_sequence(np.random.default_rng(seed), p.scanner, 'sagittal_t1')
        p.sequences = tuple(t1 if i == j else q for i, q in enumerate(p.sequences))
        made = paint(p, [(j, i) for i in range(len(p.scans[j].planes))])
        as_t1 = as_study('1', [p.scans[j]], {p.scans[j].series_id: [made[j, i] for i in range(len(p.scans[j].planes))]}).series[0]
        spots.append((axial_spot(of(p.study, 'axial_t2')), axial_spot(as_t1)))
    t1, t2 = (np.array([o[v] for o in odds]) for v in ('sagittal_t1', 'sagittal_t2'))
    good, spots = np.concatenate([t2, -t1]), np.array(spots)
    def show(what, k, n): print(f'{what}: {k} of {n} [{beta.ppf(.025, k, n - k + 1) if k else 0:.3f}, {beta.ppf(.975, k + 1, n - k) if k < n else 1:.3f}]')
    show('lone series told wrong', (good < 0).sum(), len(good))
    show('lone series that are sure', (np.abs(good) > SURE).sum(), len(good)); show('... of them wrong', (good < -SURE).sum(), (np.abs(good) > SURE).sum())
    show('pairs told wrong', (t2 < t1).sum(), n); show('pairs surely told wrong', (t1 - t2 > PAIR_SURE).sum(), n); show('pairs surely told right', (t2 - t1 > PAIR_SURE).sum(), n)
    show('axial T2 that look like T1', (spots[:, 0] < SPOT_T1).sum(), n); show('axial T1 found', (spots[:, 1] < SPOT_T1).sum(), n)
    assert (good < 0).mean() < .3 and (good < -SURE).sum() <= 2 and (t2 < t1).mean() <= .1 and (t1 - t2 > PAIR_SURE).sum() <= 1 and (spots[:, 0] < SPOT_T1).sum() <= 2


# --- where on the spine ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('z', [-190, 165, 220])
def test_a_series_of_another_part_is_set_aside(study, z):
    t2 = of(study.study, 'sagittal_t2')
    far = replace(t2, series_id='far', image_position=t2.image_position + [0, 0, z])
    out, findings = examine(replace(study.study, series=[far, *study.study.series]))
    assert 'far' not in [s.series_id for s in out.series] and len(out.series) == len(study.study.series) and any('another part' in p for p in out.problems)
    only, _ = examine(replace(study.study, series=[far, *(s for s in study.study.series if s.view != 'sagittal_t2')]))
    assert 'no sagittal T2 series' in only.problems                                       # the ladder answers, not a network on a neck
    near = replace(t2, series_id='near', image_position=t2.image_position + [3, -8, 40])
    assert examine(replace(study.study, series=[near, *study.study.series]))[1] == []


def test_of_a_series_that_is_set_aside_only_that_is_said(study):
    t1 = of(study.study, 'sagittal_t1')
    both = lambda z: examine(replace(study.study, series=[replace(t1, series_id='odd', view='sagittal_t2', image_position=t1.image_position + [0, 0, z]), *study.study.series]), always=True)
    (near, seen), (far, findings) = both(0), both(180)
    assert [f['kind'] for f in seen if f['series_id'] == 'odd'] and not near.aside        # its contrast is doubted where it counts
    assert [f['kind'] for f in findings if f['series_id'] == 'odd'] == ['elsewhere'] and [s.series_id for s in far.aside] == ['odd'] and [p for p in far.problems if ' odd' in p] == ['series odd: it shows another part of the spine than the other series: set aside']


def test_who_is_apart_without_axial_slices_needs_a_majority(study):
    t1, t2 = of(study.study, 'sagittal_t1'), of(study.study, 'sagittal_t2')
    far = replace(t2, image_position=t2.image_position + [0, 0, 180])
    assert parts_apart([t1, far], []) == [None, None] and parts_apart([t1, t2, far], []) == [False, False, True] and parts_apart([], []) == [] and examine(replace(study.study, series=[]))[0].problems == ['no sagittal T1 series', 'no sagittal T2 series', 'no axial T2 series'] and parts_apart([t1], []) == [False]


@pytest.mark.parametrize('first, last', [(0, 2), (1, 4), (3, 3)])
def test_levels_that_no_axial_slice_shows_are_named(study, first, last):
    xyz, axial = canal(study), of(study.study, 'axial_t2')
    keep = plane_distances(axial, xyz[first:last + 1]).min(1) < 5                        # slices near these levels only
    short = replace(axial, **{n: getattr(axial, n)[keep] for n in ('image_position', 'image_orientation', 'pixel_spacing', 'shape', 'instance_number', 'stack')})
    table = coverage(replace(study.study, series=[of(study.study, 'sagittal_t2'), short]), xyz)
    assert table.sagittal_t2.all() and table.axial_t2.iloc[first:last + 1].all() and not table.axial_t2.iloc[[k for k in range(5) if not first <= k <= last]].any()
    said = out_of_view(replace(study.study, series=[short]), xyz)
    assert len(said) == 1 and all((LEVELS[k] in said[0]) == (not table.axial_t2.iloc[k]) for k in range(5))
    assert out_of_view(replace(study.study, series=[short]), np.full((5, 3), np.nan)) == []


@pytest.mark.parametrize('change, word', [(lambda x: x, ''), (lambda x: x[[1, 0, 2, 3, 4]], 'descend'), (lambda x: x[::-1], 'descend'), (lambda x: x[2] + (x - x[2]) * .6, 'another part'),
                                          (lambda x: x[0] + (x - x[0]) * 2.2, 'apart'), (lambda x: x + [0, 0, 75], 'border'), (lambda x: x - [0, 0, 75], 'border')])
def test_points_that_cannot_be_the_five_levels_are_doubted(study, change, word):
    t2 = of(study.study, 'sagittal_t2')
    middle = canal(study)[2, 2] - (t2.image_position[0, 2] - t2.shape[0, 0] * t2.pixel_spacing[0, 0] / 2)
    centred = replace(t2, image_position=t2.image_position + [0, 0, middle])              # L3/L4 in the middle of the image
    doubts = level_doubts(centred, change(canal(study)))
    assert bool(doubts) == bool(word) and word in ' '.join(doubts)


# --- nobody's name --------------------------------------------------------------------------------------------------

NAMES = ('Zwickmueller', 'Quendoline', '19371103', 'Hinterwald', '20110929', 'ACC77123', '9876543', '424242.1937')


def plant(folder):
    "Names, dates, institutions and UIDs in every header of a data set, in the right places and in wrong ones."
    for k, f in enumerate(sorted(Path(folder).glob('*_images/*/*/*.dcm'))):
        d = pydicom.dcmread(f)
        d.PatientName, d.PatientBirthDate, d.InstitutionName, d.StudyDate, d.ReferringPhysicianName = 'Zwickmueller^Quendoline', '19371103', 'Spital Hinterwald', '20110929', 'Hinterwald^Dr'
        d.AccessionNumber, d.PatientID, d.PatientComments, d.ProtocolName = 'ACC77123', '9876543', 'Quendoline, born 19371103', 'Zwickmueller'
        d.StudyInstanceUID, d.SeriesInstanceUID, d.SOPInstanceUID, d.FrameOfReferenceUID = (f'1.2.826.0.424242.1937.{k}.{j}' for j in range(4))
        d.SeriesDescription = f"{d.get('SeriesDescription', '')} Zwickmueller"
        d.save_as(f)
    broken = sorted(Path(folder).glob('*_images/*/*/*.dcm'))[:8]
    for k, (word, value) in enumerate((('ImagePositionPatient', 'Zwickmueller'), ('PixelSpacing', 'Quendoline'), ('InstanceNumber', 'ACC77123'), ('Columns', 'Quendoline'), ('RescaleSlope', 'Zwickmueller'), ('ImageOrientationPatient', '19371103'))):
        d = pydicom.dcmread(broken[k])
        tag = pydicom.datadict.tag_for_keyword(word)
        d.pop(tag, None)
        with pydicom.config.disable_value_validation(): d.add(pydicom.DataElement(tag, 'LO', value))
        d.save_as(broken[k])
    broken[6].write_bytes(b'Zwickmueller^Quendoline 19371103\n' * 9)
    broken[7].write_bytes(broken[7].read_bytes()[:-700])


def texts(folder):
    "Everything that stands in the files of a folder, tables unpacked."
    for f in Path(folder).rglob('*'):
        if f.is_file() and f.suffix == '.parquet': yield f, pd.read_parquet(f).to_csv()
        elif f.is_file() and f.suffix != '.npy': yield f, f.read_bytes().decode('utf-8', 'replace')


def test_no_name_leaves_a_header(small_data, tmp_path):
    "Nothing that identifies a person is in what mscan_check and stage 0 write or print, warnings included."
    folder, out = tmp_path / 'data', tmp_path / 'out'
    out.mkdir()
    shutil.copytree(small_data, folder)
    plant(folder)
    env = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg', PYTHONWARNINGS='default')
    runs = [subprocess.run([BIN / 'mscan_check', '--data_dir', folder, '--json_file', out / 'check.json'], capture_output=True, text=True, env=env),
            subprocess.run([BIN / 'mscan_run', '--data_dir', folder, '--run_dir', out / 'run', '--preset', 'smoke', '--stages', '10_prepare'], capture_output=True, text=True, env=env)]
    assert [r.returncode for r in runs] == [0, 0], runs[-1].stderr[-2000:]
    said = [('stdout and stderr', r.stdout + r.stderr) for r in runs] + list(texts(out))
    assert len(said) > 10 and json.loads((out / 'check.json').read_text())['train']
    leaks = {(str(where).replace(str(tmp_path), ''), name) for where, text in said for name in NAMES if name in text}
    assert not leaks, leaks


# --- the note is a table of tests -----------------------------------------------------------------------------------

def test_every_line_of_the_note_names_a_test_that_is_there():
    lines = [line for line in (ROOT / 'docs' / 'inputs_contents.md').read_text().splitlines() if line.startswith('| ') and 'test_' in line]
    assert len(lines) >= 25
    for line in lines:
        for name in line.split('|')[3].replace('`', '').replace(',', ' ').split():
            file, _, test = name.partition('::')
            assert (ROOT / 'tests' / file).is_file() and (not test or f'def {test}(' in (ROOT / 'tests' / file).read_text()), name
