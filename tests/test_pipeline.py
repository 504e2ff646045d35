"The whole way, once: a small phantom with all that can be wrong with a study, through every stage, and then as a user would use the run."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import ENV, SMOKE, command, view_of
from mscan.ladder import RUNGS
from mscan.rsna import row_ids

BIN = Path(sys.executable).parent
pytestmark = pytest.mark.xdist_group('pipeline')    # meant to keep the one run in one worker, which xdist 3.8 does not heed yet


def submission_of(folder): return pd.read_csv(folder / 'submission.csv').set_index('row_id'), pd.read_csv(folder / 'provenance.csv', keep_default_na=False).set_index('row_id')


def test_every_stage_leaves_its_manifest_and_notebook(run):
    run_dir, _ = run
    stages = ['10_prepare', '20_keypoints', '21_projection', '22_sides', '30_crops', '31_encoders', '40_levels', '42_grading', '45_variants', '50_evaluate', '60_submission']
    for stage in stages:
        manifest = json.loads((run_dir / stage / 'manifest.json').read_text())
        assert (run_dir / stage / f'{stage}.ipynb').exists() and manifest['seconds'] > 0 and manifest['products']
        assert all((run_dir / stage / p['path']).exists() and p['sha256'] for p in manifest['products'].values())
    text = ' '.join(p.read_text() for p in run_dir.glob('*/manifest.json'))
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4


def test_rows_of_the_table_answer_for_the_same_studies(run):
    "Three rows, each on predicted points and on label points; what the run submits is the row of its own settings' kind."
    table = pd.read_parquet(run[0] / '45_variants' / 'variants.parquet')
    assert set(table.variant) == {'sagittal_gru', 'mscan', 'mscan_oof'} and set(table.points) == {'predicted', 'labels'}
    assert not (table.part == 'train').any()
    sizes = table.groupby(['variant', 'points']).study_id.agg(lambda s: tuple(sorted(set(s))))
    assert all(sizes.xs(kind, level='points').nunique() == 1 for kind in ('predicted', 'labels'))
    assert (run[0] / '50_evaluate' / 'variants.md').read_text().count('M-SCAN') or 'mscan' in (run[0] / '50_evaluate' / 'variants.md').read_text()


def test_tables_longer_than_the_images_are_one_line(run):
    notes = json.loads((run[0] / '10_prepare' / 'quality.json').read_text())['notes']
    said = [n for n in notes if 'left out' in n and 'train tables list' in n]
    assert len(said) == 1 and '240 studies, 6 of them have images' in said[0], notes


def test_25_rows_a_study_whatever_happened(run, data):
    folder, broken = data
    submission, provenance = submission_of(run[0] / '60_submission')
    studies = sorted((p.name for p in (folder / 'test_images').iterdir()), key=lambda s: (len(s), s))
    assert list(submission.index) == row_ids(studies) == list(provenance.index) and len(studies) == 2 + len(broken)
    p = submission.to_numpy()
    assert np.isfinite(p).all() and (p >= 1e-4 - 1e-12).all() and np.allclose(p.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize('change, source, word', [
    ('no_sagittal_t2', 'prior', 'no sagittal T2 series'), ('no_sagittal_t1', 'model', 'no sagittal T1 series'), ('no_axial', 'model', 'no axial T2 series'), ('zero_byte', 'model', 'empty file'),
    ('truncated', 'model', 'left out'), ('nothing_readable', 'prior', 'no usable slice'), ('empty_folder', 'prior', 'no sagittal T2 series')])
def test_the_provenance_says_why(run, data, change, source, word):
    number = next(n for n, c in data[1].items() if c == change)
    _, provenance = submission_of(run[0] / '60_submission')
    canal = provenance.loc[[f'{number}_spinal_canal_stenosis_{level}' for level in ('l1_l2', 'l3_l4', 'l5_s1')]]
    # two epochs of smoke put some points outside the image, and such a level falls back too: one row of the model's is enough
    assert ((canal['source'] == source).all() if source == 'prior' else (canal['source'] == source).any()) and canal.reason.str.contains(word).all(), canal.reason.tolist()


def test_slices_name_files_that_are_there(run, data):
    _, provenance = submission_of(run[0] / '60_submission')
    looked = provenance['source'].isin(['model', 'other contrast'])
    graded = provenance[looked]
    assert len(graded) and (provenance[~looked].slices == '').all()
    for row_id, row in graded.iterrows():
        names = row.slices.split()
        assert 1 <= len(names) <= 10 and all((data[0] / 'test_images' / row_id.split('_')[0] / f'{n}.dcm').exists() for n in names), names


def test_good_studies_are_graded_by_the_model_and_others_say_prior(run, data):
    _, provenance = submission_of(run[0] / '60_submission')
    good = provenance[~provenance.index.str.split('_').str[0].isin(list(data[1]))]
    canal = good.index.str.contains('spinal_canal')
    assert (good[canal]['source'] == 'model').mean() >= .5
    for condition in ('left_neural', 'right_neural', 'left_subarticular', 'right_subarticular'): assert (good[good.index.str.contains(condition)]['source'] == 'model').any(), condition
    assert set(good['source']) <= set(RUNGS) and (good[good['source'] != 'model'].reason != '').all() and not good.reason.str.contains('not graded by the model').any()


def test_a_study_without_t1_or_axial_takes_the_next_rung(run, data):
    "Foramina without T1 are graded on T2, by a model trained with contrast dropout; recesses without axial slices from the graded rows of their level; what is seen stays the model's."
    _, provenance = submission_of(run[0] / '60_submission')
    for change, gone, rungs in (('no_sagittal_t1', 'neural_foraminal', ('other contrast', 'graded rows', 'prior')), ('no_axial', 'subarticular', ('graded rows', 'prior'))):
        number = next(n for n, c in data[1].items() if c == change)
        mine = provenance[provenance.index.str.startswith(f'{number}_')]
        lost, level = mine.index.str.contains(gone), mine.index.str[-5:]
        assert set(mine[lost]['source']) <= set(rungs) and (mine[lost]['source'] == rungs[0]).any(), mine[lost]['source'].tolist()
        assert mine[lost].reason.str.contains('series').all() and (mine[~lost]['source'] == 'model').any()
        known = {l for l, s in zip(level, mine['source'], strict=True) if s in RUNGS[:2]}
        assert all((s == 'prior') == (l not in known) for l, s in zip(level, mine['source'], strict=True) if s not in RUNGS[:2])      # the prior only where nothing of the level was graded
    views = {d.name: view_of(d) for d in (data[0] / 'test_images' / next(n for n, c in data[1].items() if c == 'no_sagittal_t1')).iterdir()}
    on_t2 = provenance[provenance['source'] == 'other contrast']
    assert {views[s.split('/')[0]] for row in on_t2.slices for s in row.split()} == {'sagittal_t2'} and on_t2.index.str.contains('neural_foraminal').all()


def test_predict_repeats_the_run_without_train_csv(run, data, tmp_path):
    "The same networks on the same studies by the other way, from a moved run and a folder without train.csv."
    moved, bare = tmp_path / 'moved', tmp_path / 'bare'
    shutil.copytree(run[0], moved)
    bare.mkdir()
    shutil.copytree(data[0] / 'test_images', bare / 'test_images')
    shutil.copy(data[0] / 'test_series_descriptions.csv', bare)
    command('mscan_predict', '--run_dir', moved, '--data_dir', bare, '--out', tmp_path / 'out', '--device', 'cpu')
    (first, why), (second, why_again) = submission_of(run[0] / '60_submission'), submission_of(tmp_path / 'out')
    assert list(first.index) == list(second.index) and np.abs(first - second).to_numpy().max() < 2e-3
    assert (why['source'] == why_again['source']).all() and (why.slices == why_again.slices).all()


def test_a_heap_of_files_is_graded_as_the_competition_folder_is(run, data, tmp_path):
    "The good studies, thrown into one folder under names without meaning, each with its own answers again."
    heap, good = tmp_path / 'heap', sorted(p for p in (data[0] / 'test_images').iterdir() if p.name not in data[1])
    heap.mkdir()
    for k, file in enumerate(f for study in good for f in sorted(study.rglob('*.dcm'))): shutil.copy(file, heap / f'{(k * 7919) % 10007:08X}')
    command('mscan_predict', '--run_dir', run[0], '--data_dir', heap, '--out', tmp_path / 'out', '--device', 'cpu', '--ids_csv', tmp_path / 'ids.csv')
    (first, why), (second, why_again) = submission_of(run[0] / '60_submission'), submission_of(tmp_path / 'out')
    back = pd.read_csv(tmp_path / 'ids.csv', dtype=str).drop_duplicates('study_id').set_index('study_id').study_uid     # the phantom's study UID is its id
    names = [f"{back[i.split('_')[0]]}_{i.partition('_')[2]}" for i in second.index]
    assert sorted(back) == [p.name for p in good] and len(second) == 25 * len(good)
    assert np.abs(first.loc[names].to_numpy() - second.to_numpy()).max() < 2e-3 and (why['source'].loc[names].to_numpy() == why_again['source'].to_numpy()).all() and (why_again['source'] == 'model').any()


def test_report_and_structured_report_of_the_run(run, data, tmp_path):
    "A good study, one without axial slices and one with nothing readable, by the networks of the run: pages and rows for all, and a refusal for headers as the competition has them."
    from mscan.report import write_report
    from mscan.sr import write_reports
    number = {change: n for n, change in data[1].items()}
    good = sorted(p.name for p in (data[0] / 'test_images').iterdir() if p.name not in data[1])[0]
    few, chosen = tmp_path / 'few', [good, number['no_axial'], number['nothing_readable']]
    for s in chosen: shutil.copytree(data[0] / 'test_images' / s, few / 'test_images' / s)
    shutil.copy(data[0] / 'test_series_descriptions.csv', few)
    rows = write_report(run[0], few, tmp_path / 'out', device='cpu', progress=False)
    submission, provenance = submission_of(run[0] / '60_submission')
    mine = rows.set_index(rows.study_id + '_' + rows.condition + '_' + rows.level)
    assert len(mine) == 75 and np.abs(submission.loc[mine.index].to_numpy() - mine[['normal_mild', 'moderate', 'severe']].to_numpy(float)).max() < 2e-3
    assert (mine['source'] == provenance.loc[mine.index, 'source']).all() and mine[mine['source'] != 'model'].review.all()
    text = {s: (tmp_path / 'out' / f'study_{s}.html').read_text() for s in chosen}
    assert 'no axial T2 series' in text[number['no_axial']] and 'No axial slice reaches this level' in text[number['no_axial']] and 'No level was located' in text[number['nothing_readable']]
    assert text[good].count('data:image/') > 20 and 'could be shown' not in text[good] and 'views (rows) ask views (columns)' in text[good]
    written, refused = write_reports(run[0], few, tmp_path / 'sr', good, 'cpu')
    assert not written and 'SOPClassUID' in refused[0] and 'PatientName' in refused[0]


def test_a_second_call_does_nothing_again(run, data):
    before = {p: p.stat().st_mtime_ns for p in run[0].glob('*/manifest.json')}
    command('mscan_run', '--data_dir', data[0], '--run_dir', run[0], *SMOKE)
    assert before == {p: p.stat().st_mtime_ns for p in run[0].glob('*/manifest.json')}


@pytest.mark.parametrize('arguments, word', [
    (['--preset', 'nosuch'], 'nosuch'), (['--preset', 'smoke', '-p', 'epoch', '3'], 'epochs'), (['--preset', 'smoke', '--stages', '20_keypoint'], '20_keypoints')])
def test_a_misspelt_word_is_an_error(run, data, arguments, word):
    done = command('mscan_run', '--data_dir', data[0], '--run_dir', run[0], *arguments, ok=False)
    assert done.returncode in (1, 2) and word in done.stderr + done.stdout and 'Traceback' not in done.stderr


def test_score_and_check_speak(run, data, tmp_path):
    labels = pd.read_csv(data[0] / 'test_labels.csv')
    submission = pd.read_csv(run[0] / '60_submission' / 'submission.csv')
    mine = submission[submission.row_id.str.split('_').str[0].astype(int).isin(labels.study_id)]
    mine.to_csv(tmp_path / 'mine.csv', index=False)
    command('mscan_score', '--train_csv', data[0] / 'test_labels.csv', '--submission', tmp_path / 'mine.csv', '--json', tmp_path / 'score.json')
    assert set(json.loads((tmp_path / 'score.json').read_text())) == {'score', 'spinal', 'foraminal', 'subarticular', 'any_severe'}
    mine.iloc[3:].to_csv(tmp_path / 'short.csv', index=False)
    done = command('mscan_score', '--train_csv', data[0] / 'test_labels.csv', '--submission', tmp_path / 'short.csv', ok=False)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    said = command('mscan_check', '--data_dir', data[0], '--json', tmp_path / 'check.json').stdout
    assert 'no axial T2 series' in said and 'empty file' in said and len(json.loads((tmp_path / 'check.json').read_text())['test']) == 9


@pytest.mark.parametrize('tool, arguments', [('mscan_check', ['--data_dir', 'nowhere']), ('mscan_predict', ['--run_dir', 'nowhere', '--data_dir', 'nowhere', '--out', 'nowhere']),
                                             ('mscan_predict', ['--run_dir', 'nowhere', '--data_dir', 'nowhere', '--out', 'nowhere', '--device', 'nonsense']), ('mscan_run', ['--data_dir', 'nowhere', '--run_dir', 'x', '--preset', 'smoke']), ('mscan_score', ['--train_csv', 'nowhere', '--submission', 'nowhere'])])
def test_bad_input_is_one_sentence_and_exit_code_1(tool, arguments, tmp_path):
    done = subprocess.run([BIN / tool, *arguments], capture_output=True, text=True, cwd=tmp_path, env=ENV)
    assert done.returncode == 1 and 'Traceback' not in done.stderr and len(done.stderr.strip().splitlines()) <= 2 and 'nowhere' in done.stderr, done.stderr


def test_missing_views_are_graded_by_a_model_that_has_met_them():
    "With view dropout in training the rows of a study without axial slices are the model's; without it they are the prior's."
    from types import SimpleNamespace
    from mscan.grading import study_rows
    from mscan.metrics import prior_table
    from mscan.phantom import lesson_study
    lesson = lesson_study(0)
    series = {s.series_id: s for s in lesson.study.series}
    t2 = lesson.study.of('sagittal_t2')[0]
    boxes = pd.DataFrame([dict(series_id=t2.series_id, slice_i=2, level=level, source='yolo') for level in ('l1_l2', 'l2_l3', 'l3_l4', 'l4_l5', 'l5_s1')])
    centres = pd.DataFrame(columns=['pass_i', 'level', 'rank', 'series_id', 'slice_i'])
    crops = SimpleNamespace(sagittal_mask=np.ones(5, bool), axial_mask=np.zeros((1, 5, 3), bool))
    for dropout, source in ((0., 'prior'), (.1, 'model')):
        rows = study_rows('5', series, SimpleNamespace(boxes=boxes, centres=centres, reasons=['no axial T2 series']), crops, np.full((5, 1, 3), 1 / 3),
                          SimpleNamespace(conditions=['spinal_canal_stenosis'], prior=prior_table(lesson.labels), conditional=None, view_dropout=dropout))
        canal = rows[rows.condition == 'spinal_canal_stenosis']
        assert (canal['source'] == source).all() and canal.reason.str.contains('no axial').all()


def store_mirrored(file, out, c):
    "One DICOM file of the patient mirrored at x = c, stored in conventional raster order: sagittal pixels as they are, axial columns reversed."
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian
    d = pydicom.dcmread(file)
    pixels, position, axes = d.pixel_array, np.array(d.ImagePositionPatient, float), np.array(d.ImageOrientationPatient, float).reshape(2, 3)
    position, axes = position * [-1, 1, 1] + [2 * c, 0, 0], axes * [-1, 1, 1]
    if axes[0, 0] < -.5: position, axes, pixels = position + (pixels.shape[1] - 1) * float(d.PixelSpacing[1]) * axes[0], axes * [[-1], [1]], pixels[:, ::-1]
    d.ImagePositionPatient, d.ImageOrientationPatient = ([f'{v:.10f}'[:16] for v in a.ravel()] for a in (position, axes))
    d.PixelData, d.file_meta.TransferSyntaxUID = np.ascontiguousarray(pixels).tobytes(), ExplicitVRLittleEndian
    d['PixelData'].is_undefined_length = False
    d.save_as(out, enforce_file_format=True)


@pytest.fixture(scope='module')
def patients(run, data, tmp_path_factory):
    "p (condition x level x grade) of three patients, through mscan_predict: as he is, mirrored, and re-stored (columns reversed, slices and numbers the other way)."
    from test_mirror import store_again
    folder, out = tmp_path_factory.mktemp('patients'), {}
    good = sorted(p.name for p in (data[0] / 'test_images').iterdir() if p.name not in data[1])[0]
    described = pd.read_csv(data[0] / 'test_series_descriptions.csv', dtype=str)
    for number, how in ((1, 'plain'), (2, 'mirrored'), (3, 'again')):
        for series in sorted((data[0] / 'test_images' / good).iterdir()):
            target, numbers = folder / 'test_images' / str(number) / series.name, sorted(int(f.stem) for f in series.iterdir())
            target.mkdir(parents=True)
            for a, b in zip(numbers, numbers[::-1], strict=True):
                if how == 'again': store_again(series / f'{a}.dcm', target, b, 1, 0)
                elif how == 'mirrored': store_mirrored(series / f'{a}.dcm', target / f'{a}.dcm', 11.)
                else: shutil.copy(series / f'{a}.dcm', target)
    pd.concat([described[described.study_id == good].assign(study_id=str(n)) for n in (1, 2, 3)]).to_csv(folder / 'test_series_descriptions.csv', index=False)
    command('mscan_predict', '--run_dir', run[0], '--data_dir', folder, '--out', folder / 'out', '--device', 'cpu')
    submission, provenance = submission_of(folder / 'out')
    for number, how in ((1, 'plain'), (2, 'mirrored'), (3, 'again')): out[how] = submission[submission.index.str.startswith(f'{number}_')].to_numpy().reshape(5, 5, 3), (provenance[provenance.index.str.startswith(f'{number}_')]['source'] == 'model').to_numpy().reshape(5, 5)
    return out


def test_a_mirrored_patient_has_the_sides_exchanged(patients):
    (p, graded), (q, graded_too) = patients['plain'], patients['mirrored']
    conditions = list(dict.fromkeys(n[2:-6] for n in row_ids(['1'])))      # ids end in a level of five letters, as `_l1_l2`
    order = [conditions.index(c.replace('left', '#').replace('right', 'left').replace('#', 'right')) for c in conditions]
    assert graded.any(1).all() and (graded == graded_too[order]).all()
    assert np.abs(p - q[order])[graded].max() <= 1e-3             # the prior of a side is its own, so rows that fall back are not compared
    sides, both = [k for k in range(5) if order[k] != k], graded & graded_too
    assert np.abs(p - q)[sides][both[sides]].max() > 1e-3         # the sides differ: answers that had not changed places would fail


def test_the_same_patient_stored_otherwise_has_the_same_answers(patients):
    assert np.abs(patients['plain'][0] - patients['again'][0]).max() <= 1e-3 and (patients['plain'][1] == patients['again'][1]).all()
