"Doubted labels: what counts as an answer, what is dropped and from whom, and how the doubts do as a detector of planted noise."
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from sklearn import metrics as sk

import mscan.doubts
import mscan.prepare
from mscan.disease import THRESHOLDS
from mscan.doubts import add_truth, detector_table, doubt_pictures, draw_doubts, mscan_doubts, read_true_grades, write_doubts
from mscan.foramina import lateral_mm, offset_foramina
from mscan.folds import fold_report, load_folds, made_up_folds, mean_of_part, out_of_fold
from mscan.geometry import plane_of
from mscan.images import Preprocess
from mscan.keypoints import canal_points
from mscan.metrics import auroc, prior_table
from mscan.noise import KEYS, drop_doubtful, label_doubts, read_oof
from mscan.phantom import phantom_study
from mscan.prepare import prepare
from mscan.projection import choose_slices
from mscan.recesses import offset_recesses, recess_card
from mscan.rsna import CONDITIONS, LEVELS, PROBS, TableError, read_train, row_ids, write_submission, write_train
from mscan.runs import RunError
from mscan.training import save_weights

CANAL = CONDITIONS[0]


def write_oof(folder, ids, p=(.9, .05, .05), graded=(CANAL,), name='oof', fold=0):
    "An out-of-fold file in which `graded` conditions are the model's, all rows with the same answer."
    ids = row_ids(ids)
    frame = pd.DataFrame({'row_id': ids, **dict(zip(PROBS, p))})
    write_submission(frame, folder/f'{name}.csv')
    source = ['model' if any(c in i for c in graded) else 'prior' for i in ids]
    pd.DataFrame(dict(row_id=ids, fold=fold, source=source, reason='')).to_csv(folder/(f'{name}_provenance.csv' if name != 'submission' else 'provenance.csv'), index=False)
    return folder/f'{name}.csv'


def labels_of(ids, severe=()):
    "Normal/Mild but for the canal at L4/L5 of the studies in `severe`."
    rows = [(s, c, l, 2 if (s in severe and c == CANAL and l == 'l4_l5') else 0) for s in ids for c in CONDITIONS for l in LEVELS]
    return pd.DataFrame(rows, columns=[*KEYS, 'grade']).astype({'grade': 'Int8'})


def test_the_prior_doubts_nothing(tmp_path):
    "A Severe recess that only the prior has answered is no doubted label, however small the prior's chance of it."
    labels = labels_of(['1', '2'])
    labels.loc[labels.condition == CONDITIONS[3], 'grade'] = 2
    found = label_doubts(labels, read_oof(write_oof(tmp_path, ['1', '2'])))
    assert set(found.condition) == {CANAL} and len(found) == 10 and (found.source == 'model').all()
    both = label_doubts(labels, read_oof(write_oof(tmp_path, ['1', '2'], graded=(CANAL, CONDITIONS[3]))))
    assert set(both.condition[:10]) == {CONDITIONS[3]} and (both.doubt[:10] > .9).all() and (both.doubt[10:] < .1).all()


def test_weights_are_divided_out():
    rows = pd.DataFrame([('1', CANAL, 'l1_l2', .2, .2, .6, 'model')], columns=[*KEYS, *PROBS, 'source'])
    for grade, p in ((0, .2 / .45), (1, .1 / .45), (2, .15 / .45)):  # .2 : .2/2 : .6/4
        found = label_doubts(pd.DataFrame([('1', CANAL, 'l1_l2', grade)], columns=[*KEYS, 'grade']), rows)
        assert np.isclose(found.p[0], p) and np.isclose(found.doubt[0], 1 - p)


def test_files_that_do_not_say_who_answered_are_refused(tmp_path):
    path = write_oof(tmp_path, ['1'])
    (tmp_path/'oof_provenance.csv').rename(tmp_path/'away.csv')
    with pytest.raises(TableError, match='oof_provenance.csv is not beside it'): read_oof(path)
    away = pd.read_csv(tmp_path/'away.csv')
    for bad in (away.iloc[1:], away.drop(columns='source'), pd.concat([away, away.iloc[:1]])):
        bad.to_csv(tmp_path/'oof_provenance.csv', index=False)
        with pytest.raises(TableError, match='does not hold the rows of oof.csv'): read_oof(path)
    with pytest.raises(TableError, match='no row was graded by a model'): read_oof(write_oof(tmp_path, ['1'], graded=()))
    assert len(read_oof(write_oof(tmp_path, ['1'], name='submission'))) == 5  # a run's own submission has provenance.csv


def test_unknown_studies_are_refused(tmp_path):
    with pytest.raises(TableError, match='1 studies of the predictions are not among the labels, the first: 77'): label_doubts(labels_of(['1', '2']), read_oof(write_oof(tmp_path, ['1', '77'])))


def test_dropped_in_the_training_part_only_and_above_the_limit(tmp_path):
    ids, notes = [str(i) for i in range(6)], []
    part = pd.Series(['train', 'train', 'train', 'validation', 'test', 'submission'], ids)
    labels = labels_of(ids, severe='0345')
    path = write_oof(tmp_path, ids)
    kept, dropped = drop_doubtful(labels, part, path, .8, notes)
    assert dropped[KEYS].to_numpy().tolist() == [['0', CANAL, 'l4_l5']] and '1 of 15 labels' in notes[0] and '1 of 1 Severe' in notes[0] and '1 studies of the test part' in notes[1]
    same = kept.grade.fillna(9).eq(labels.grade.fillna(9))
    assert (~same).sum() == 1 and kept.index.equals(labels.index) and str(kept.grade.dtype) == 'Int8'
    doubt = dropped.doubt.iloc[0]
    assert len(drop_doubtful(labels, part, path, doubt, [])[1]) == 0 and len(drop_doubtful(labels, part, path, doubt - 1e-6, [])[1]) == 1
    assert len(drop_doubtful(labels, part, path, 1e-6, [])[1]) == 15                # every answered label of the training part, no other
    notes = []
    off, none = drop_doubtful(labels, part, 'nowhere.csv', 0, notes)                 # off: the file is not even read
    assert off is labels and not len(none) and not notes
    for limit, oof, said in ((1., path, 'not 1.0'), (-.1, path, 'not -0.1'), (.8, '', 'needs oof_csv'), (.8, tmp_path/'none.csv', 'none.csv')):
        with pytest.raises((TableError, FileNotFoundError), match=said): drop_doubtful(labels, part, oof, limit, [])


def test_prepare_drops_them_before_the_prior_is_counted(small_data, tmp_path):
    grades = read_train(small_data/'train.csv')
    ids = sorted(grades.study_id.unique())
    path = write_oof(tmp_path, ids, p=(.98, .01, .01))
    plain = prepare(small_data, tmp_path/'plain', .2, 0., workers=1, progress=False)
    clean = prepare(small_data, tmp_path/'clean', .2, 0., workers=1, progress=False, oof_csv=str(path), drop_noisy=.8)
    assert not (tmp_path/'plain/doubtful_labels.csv').exists() and plain.studies.equals(clean.studies)   # the split is drawn before
    listed = pd.read_csv(tmp_path/'clean/doubtful_labels.csv', dtype={'study_id': str})
    part = clean.studies.set_index('study_id').part
    bad = plain.labels[(plain.labels.condition == CANAL) & (plain.labels.grade > 0)]
    mine = bad[bad.study_id.map(part) == 'train']
    assert 0 < len(mine) < len(bad) and set(map(tuple, listed[KEYS].to_numpy())) == set(map(tuple, mine[KEYS].to_numpy()))
    lost = clean.labels.grade.isna() & plain.labels.grade.notna()
    assert lost.sum() == len(mine) and set(clean.labels.study_id[lost].map(part)) == {'train'} and any('left out' in n and f'{len(mine)} of' in n for n in clean.notes)
    canal = clean.labels[clean.labels.study_id.map(part) == 'train']
    assert np.allclose(clean.prior[list(PROBS)], prior_table(canal)[list(PROBS)])
    changed = (clean.prior[list(PROBS)] - plain.prior[list(PROBS)]).abs().max(axis=1) > 1e-9
    assert set(clean.prior.condition[changed]) == {CANAL}
    again = prepare(small_data, tmp_path/'clean', .2, 0., workers=1, progress=False)      # off again in the same folder: no list of before
    assert again.labels.grade.notna().sum() == plain.labels.grade.notna().sum() and not (tmp_path/'clean/doubtful_labels.csv').exists()


def test_folds_are_examined_on_all_labels(tmp_path):
    "A run of folds that drops labels from its training parts still answers for them where they are held out."
    made_up_folds(tmp_path)
    folds = load_folds(tmp_path)
    before = fold_report(folds, out_of_fold(folds), mean_of_part(folds, 'test'), 5)
    for one in folds:
        training = one.labels.study_id.map(one.studies.part) == 'train'
        assert training.any()
        one.labels = one.labels.assign(grade=one.labels.grade.mask(training))
    after = fold_report(folds, out_of_fold(folds), mean_of_part(folds, 'test'), 5)
    assert before['out_of_fold']['model'] == after['out_of_fold']['model'] and before['test'] == after['test']


@pytest.fixture
def planted():
    "40 studies: doubts, and a truth that differs from some of the labels, more often where the doubt is large."
    rng = np.random.default_rng(0)
    labels = labels_of([str(i) for i in range(40)])
    doubt = rng.random(len(labels))
    labels['grade'] = (rng.random(len(labels)) < doubt * .5).astype(int)
    return labels.assign(doubt=doubt, p=1 - doubt), labels[KEYS].assign(true_grade=0)


def test_detector_against_scikit_learn(planted):
    rows = add_truth(*planted)
    table = detector_table(rows).set_index('limit')
    for limit in (.5, .8, .95):
        said = rows.doubt > limit
        assert np.isclose(table.precision[limit], sk.precision_score(rows.noisy, said)) and np.isclose(table.recall[limit], sk.recall_score(rows.noisy, said))
    assert np.isclose(table.base_rate.iloc[0], rows.noisy.mean()) and table.lift[.8] > 1.3 and auroc(rows.doubt, rows.noisy) > .6
    none = detector_table(rows.assign(noisy=False))
    assert none.recall.isna().all() and (none.precision.dropna() == 0).all()
    with pytest.raises(TableError, match='the truth lacks 1 of 1000 labels, the first: 0_spinal_canal_stenosis_l1_l2'): add_truth(planted[0], planted[1].iloc[1:])


def test_true_grades_are_the_degree_at_the_cuts(tmp_path):
    a, b = THRESHOLDS
    pd.DataFrame([('1', CANAL, l, v, g) for l, v, g in zip(LEVELS, (a - .01, a, b - .01, b, .99), (2, 0, 0, 0, 0))], columns=[*KEYS, 'latent', 'grade']).to_csv(tmp_path/'truth.csv', index=False)
    assert read_true_grades(tmp_path/'truth.csv').true_grade.tolist() == [0, 1, 1, 2, 2]  # of the degree, not of what the reader said
    pd.DataFrame({'study_id': ['1'], 'condition': [CANAL], 'level': ['l1_l2'], 'grade': [0]}).to_csv(tmp_path/'short.csv', index=False)
    with pytest.raises(TableError, match='lacks the columns latent'): read_true_grades(tmp_path/'short.csv')


def test_the_phantom_holds_reader_noise(small_data):
    grades, truth = read_train(small_data/'train.csv').dropna(subset='grade'), read_true_grades(small_data/'truth.csv')
    rows = grades.merge(truth, on=KEYS, validate='one_to_one')
    wrong = rows.grade.astype(int) != rows.true_grade
    assert len(rows) == len(grades) and .03 < wrong.mean() < .35 and ((rows.grade.astype(int) - rows.true_grade).abs()[wrong] == 1).mean() > .8


def test_pictures_come_from_the_run_that_held_the_study_out(tmp_path, monkeypatch):
    for f, ids in ((0, '12'), (1, '34')):
        (tmp_path/f'folds/fold_{f}').mkdir(parents=True)
        pd.DataFrame({'study_id': list(ids)}).to_parquet(tmp_path/f'folds/fold_{f}/studies.parquet')
    monkeypatch.setattr(mscan.doubts, 'finished', lambda run: {'10_prepare': SimpleNamespace(path=lambda name: run/f'{name}.parquet'), 'run': run})
    monkeypatch.setattr(mscan.doubts, 'run_pictures', lambda manifests: lambda study_id, row: [np.full((8, 8), int(manifests['run'].name[-1]))] * 4)
    pictures = doubt_pictures(tmp_path/'folds')
    for study, fold in (('1', 0), ('3', 1), ('2', 0)): assert pictures(study, pd.Series({'fold': fold, 'condition': CANAL}))[0][0, 0] == fold
    with pytest.raises(RunError, match='does not know study 3'): pictures('3', pd.Series({'fold': 0, 'condition': CANAL}))
    with pytest.raises(RunError, match='22_sides has not run'): pictures('1', pd.Series({'fold': 0, 'condition': CONDITIONS[1]}))
    with pytest.raises(RunError, match='does not say which'): pictures('1', pd.Series({'level': 'l1_l2'}))


@pytest.fixture
def found_sides(tmp_path, monkeypatch):
    "A finished run of one study whose grey values say where they are: T1 brighter to the patient's left, by 3 a mm from the canal, T2 black, axial slices bright to his left and dark to his right."
    p = phantom_study(4, 0, 'small', quirks='none', pixels=False)
    canal = canal_points(p.truth)
    middle = canal[:, 0].mean()

    def painted(series):
        def image(i):
            plane = plane_of(series, i)
            y, x = np.mgrid[:plane.shape[0], :plane.shape[1]]
            xyz = plane.to_patient(np.stack([x, y], -1))
            if series.view == 'axial_t2': return np.where(xyz[..., 0] > middle, 230, 30).astype(np.uint8)
            return np.full(xyz.shape[:2], 128 + 3 * lateral_mm(series, canal).mean(1)[i] if series.view == 'sagittal_t1' else 0, np.uint8)
        return replace(series, pixels=[image(i) for i in range(len(series))], normalised=True)
    study = replace(p.study, study_id='1', series=[painted(s) for s in p.study.series])
    foramina = offset_foramina(study.of('sagittal_t1')[0], canal)
    recesses = offset_recesses(study, choose_slices(study.of('axial_t2'), canal), canal)
    other = foramina.assign(study_id='2', slice_i=0)                                    # another study, on another slice
    pd.concat([other, foramina.assign(study_id='1')]).to_parquet(tmp_path/'foramina.parquet')
    recesses[recesses.level != 'l1_l2'].assign(study_id='1').to_parquet(tmp_path/'recesses.parquet')
    pd.DataFrame({'study_id': ['1']}).to_parquet(tmp_path/'studies.parquet')
    save_weights({}, tmp_path/'axial_point', recess_card(64, 0, Preprocess(.8, 'none')))
    stage = SimpleNamespace(dir=tmp_path, path=lambda name: tmp_path/(name if '.' in name else f'{name}.parquet'))
    monkeypatch.setattr(mscan.doubts, 'finished', lambda run: {s: stage for s in ('10_prepare', '22_sides', '30_crops')})
    monkeypatch.setattr(mscan.prepare, 'load_tables', lambda folder: None)
    monkeypatch.setattr(mscan.prepare, 'load_study', lambda tables, study_id: study)
    monkeypatch.setattr(mscan.doubts, 'run_pictures', lambda manifests: lambda study_id, row: ['canal'])
    return doubt_pictures(tmp_path), foramina, recesses, lambda series_id, i: next(s for s in study.series if s.series_id == series_id).pixels[i]


def asked(condition, level='l4_l5'): return pd.Series({'condition': condition, 'level': level})


def test_a_foramen_is_shown_on_t1_on_its_own_side_from_the_middle_outwards(found_sides):
    pictures, foramina, _, pixels = found_sides
    for side, sign in (('left', 1), ('right', -1)):
        crops = pictures('1', asked(f'{side}_neural_foraminal_narrowing'))
        grey = [float(c[54:74, 54:74].mean()) - 128 for c in crops if c is not None]
        own = foramina[(foramina.side == side) & (foramina.level == 'l4_l5')].iloc[0]
        assert crops[1] is not None and abs(crops[1][60:68, 60:68].mean() - pixels(own.series_id, own.slice_i).mean()) < 1      # its own slice in the middle; T2 is black
        assert len(crops) == 3 and len(grey) >= 2 and all(sign * g > 0 for g in grey) and (np.diff(grey) * sign > 6).all(), (side, grey)


def test_a_recess_is_shown_on_the_axial_slices_of_its_level_round_its_own_side(found_sides):
    pictures, _, recesses, _ = found_sides
    for side, lighter in (('left', True), ('right', False)):
        crops = pictures('1', asked(f'{side}_subarticular_stenosis'))
        rows = recesses[(recesses.side == side) & (recesses.level == 'l4_l5') & (recesses.pass_i == 0) & recesses.used]
        assert len(crops) == len(rows) >= 1
        for c in crops: assert (c[60:68, 60:68].mean() > 128) == lighter and c[64, -8:].mean() > 200 > 60 > c[64, :8].mean()      # as the patient is: his left to the right
    assert pictures('1', asked('left_subarticular_stenosis', 'l1_l2')) == []                                                     # on no slice


def test_each_condition_has_crops_of_its_own(found_sides):
    pictures = found_sides[0]
    assert pictures('1', asked(CANAL)) == ['canal']
    four = [pictures('1', asked(c))[1] for c in CONDITIONS[1:]]
    assert all((a != b).any() for k, a in enumerate(four) for b in four[:k])
    with pytest.raises(RunError, match='does not know study 2'): pictures('2', asked(CONDITIONS[1]))


def test_the_page_says_what_is_shown(planted):
    rows = add_truth(*planted).head(3).assign(normal_mild=.6, moderate=.2, severe=.2)
    rows.loc[1, 'condition'] = CONDITIONS[4]
    figure = Figure(figsize=(10, 4))
    draw_doubts(figure, rows, lambda study_id, row: [np.zeros((4, 4)), None, None, None])
    titles = [b._suptitle.get_text() for b in figure.subfigs if b._suptitle]
    assert len(titles) == 3 and 'right subarticular stenosis' in titles[1] and all(f'doubt {d:.2f}, truly Normal/Mild' in t for d, t in zip(rows.doubt, titles))
    assert sum(len(ax.images) for b in figure.subfigs for ax in b.axes) == 3 and not any('on no slice' in t for t in titles)
    empty = Figure(figsize=(10, 4))
    draw_doubts(empty, rows, lambda study_id, row: [None] * 3 if row.condition == CONDITIONS[4] else [np.zeros((4, 4))])
    assert ['the run found it on no slice' in b._suptitle.get_text() for b in empty.subfigs if b._suptitle] == [c == CONDITIONS[4] for c in rows.condition]


def test_command_line(tmp_path, capsys):
    ids = [str(i) for i in range(8)]
    labels = labels_of(ids, severe='03')
    write_train(labels, tmp_path/'train.csv')
    labels[KEYS].assign(latent=.1).to_csv(tmp_path/'truth.csv', index=False)
    path = write_oof(tmp_path, ids)
    mscan_doubts(oof_csv=str(path), train_csv=str(tmp_path/'train.csv'), out=str(tmp_path/'out'), truth_csv=str(tmp_path/'truth.csv'), top=3)
    said = capsys.readouterr().out
    assert '40 labels of 8 studies' in said and 'planted noise: 2 of 40' in said and (tmp_path/'out/doubts.csv').exists() and not (tmp_path/'out/doubts.png').exists()
    table = pd.read_csv(tmp_path/'out/doubts.csv', dtype={'study_id': str})
    assert table.noisy.tolist()[:3] == [True, True, False] and list(table.columns[:6]) == [*KEYS, 'grade', 'p', 'doubt']
    for args, why in ((dict(), '--oof_csv is needed'), (dict(oof_csv=str(path)), '--train_csv is needed'), (dict(oof_csv='none.csv', train_csv=str(tmp_path/'train.csv')), 'no such file'),
                      (dict(oof_csv=str(path), train_csv=str(tmp_path/'train.csv'), run_dir=str(tmp_path), out=str(tmp_path/'out')), 'mscan_doubts: '), (dict(oof_csv=str(path), train_csv=str(tmp_path/'train.csv'), top=0), '--top 0')):
        with pytest.raises(SystemExit, match='mscan_doubts: ') as stopped: mscan_doubts(**args)
        assert why in stopped.value.code
    done = subprocess.run([str(Path(sys.executable).with_name('mscan_doubts')), '--oof_csv', 'none.csv', '--train_csv', 'none.csv'], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith('mscan_doubts: ') and len(done.stderr.splitlines()) == 1


def test_nothing_to_doubt_is_no_failure(tmp_path):
    write_train(labels_of(['1']).assign(grade=pd.NA), tmp_path/'train.csv')
    assert len(write_doubts(write_oof(tmp_path, ['1']), tmp_path/'train.csv', tmp_path/'out')) == 0
