"Folds: who answers for which study, what the guard across runs finds, how answers are averaged, and mscan_predict on a folder of folds."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mscan import folds as module, runner, runs, submission
from mscan.compare import KEYS
from mscan.dicom import Study
from mscan.evaluate import TRAINED
from mscan.folds import (GRADING, RESULTS, check_folds, combine, load_folds, made_up_folds, made_up_stage, mean_of_part, mscan_folds, out_of_fold,
                         plans_of, folds_parser, run_folds)
from mscan.folders import Found
from mscan.metrics import RISKS, prior_rows, prior_table, score, score_of, study_losses
from mscan.rsna import CONDITIONS, LEVELS, PROBS, TableError, read_submission, row_ids
from mscan.runs import RunError, read_manifest
from mscan.submission import MEAN_PROVENANCE, PROVENANCE, average_runs, member_runs, predict, predict_study

CANAL = CONDITIONS[0]
P = [*PROBS, *RISKS]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Three made-up runs of 24 labelled studies and 2 hidden ones; not to be changed."
    folder = tmp_path_factory.mktemp('folds') / 'runs'
    return SimpleNamespace(dir=folder, labels=made_up_folds(folder))


@pytest.fixture
def own(made, tmp_path):
    "A copy to spoil."
    shutil.copytree(made.dir, tmp_path / 'runs')
    return tmp_path / 'runs'


def rewrite(run_dir, stage, name, change):
    "Change a product of a made-up stage, and leave the manifest in step."
    path = read_manifest(run_dir, stage).path(name)
    csv = path.suffix == '.csv'
    table = change(pd.read_csv(path, dtype=dict(study_id=str)) if csv else pd.read_parquet(path))
    table.to_csv(path, index=False) if csv else table.to_parquet(path, index=False)


def of_fold(folds, f): return folds[0].studies.index[folds[0].studies.fold == f]


# ---- out of fold

def test_each_study_is_answered_by_the_run_that_held_it_out(made):
    folds = load_folds(made.dir)
    oof = out_of_fold(folds)
    assert sorted(set(oof.study_id)) == sorted(folds[0].studies.index[folds[0].studies.fold >= 0]) and len(oof) == 25 * oof.study_id.nunique()
    for f, one in enumerate(folds):
        mine = oof[oof.study_id.isin(of_fold(folds, f))]
        right = one.predictions.set_index(KEYS).loc[pd.MultiIndex.from_frame(mine[KEYS]), P].to_numpy()
        assert (mine[P].to_numpy() == right).all() and (mine.fold == f).all() and len(mine)
        wrong = folds[f - 1].predictions.set_index(KEYS).loc[pd.MultiIndex.from_frame(mine[KEYS]), P].to_numpy()
        assert not np.isclose(mine[P].to_numpy(), wrong)[mine.condition == CANAL].all(1).any()  # another run would have said something else


def test_the_files_and_the_report(own, made):
    report = combine(own, draws=40)
    folds = load_folds(own)
    given, why = read_submission(own / 'oof.csv'), pd.read_csv(own / 'oof_provenance.csv', dtype=str, keep_default_na=False)
    studies = sorted(folds[0].studies.index[folds[0].studies.fold >= 0], key=lambda s: (len(s), s))
    assert given.row_id.tolist() == row_ids(studies) == why.row_id.tolist() and list(why) == ['row_id', 'fold', 'source', 'reason']
    assert (why.fold.astype(int).to_numpy() == given.study_id.map(folds[0].studies.fold).to_numpy()).all()
    labels = folds[0].labels[folds[0].labels.study_id.isin(studies)]
    direct = score(labels, given)
    assert all(np.isclose(report['out_of_fold']['model'][k][0], v, atol=1e-6) for k, v in direct.items())
    assert report == combine(own, draws=40)  # seeded
    on_disk = json.loads((own / 'report.json').read_text())
    assert on_disk['out_of_fold']['model']['score'][0] == report['out_of_fold']['model']['score'][0] and {r['fold'] for r in on_disk['studies_seen']} == {0, 1, 2}
    assert all(low <= value <= high for r in (report['out_of_fold'], *report['folds'], report['test']) for who in ('model', 'prior', 'difference') for value, low, high in r[who].values())
    for name, part, ids in (('test', 'test', of_fold(folds, -1)), ('submission', 'submission', of_fold(folds, -1))):
        ids = [s for s in ids if folds[0].studies.part[s] == part]
        rows = read_submission(own / f'{name}.csv')
        told = pd.read_csv(own / ('provenance.csv' if name == 'submission' else 'test_provenance.csv'), keep_default_na=False)
        assert set(rows.study_id) == set(ids) and list(told) == list(MEAN_PROVENANCE) and len(ids) == (5 if part == 'test' else 2)
        mean = np.mean([one.predictions.set_index(KEYS).loc[pd.MultiIndex.from_frame(rows[KEYS]), list(PROBS)].to_numpy() for one in folds], 0)
        assert np.allclose(rows[list(PROBS)], mean, atol=1e-9)
        assert set(told.models[told['source'] == 'model']) == {'3 of 3'} and set(told.models[told['source'] == 'prior']) == {'0 of 3'}


def test_the_prior_is_that_of_each_folds_own_training_part(made):
    "A prior that has counted the held-out studies would be a rival that has seen the answers."
    folds = load_folds(made.dir)
    oof = out_of_fold(folds)
    report = module.fold_report(folds, oof, mean_of_part(folds, 'test'), draws=5)
    for f, one in enumerate(folds):
        labels = one.labels[one.labels.study_id.isin(of_fold(folds, f))]
        trained = one.labels[one.labels.study_id.map(one.studies.part) == 'train']
        assert np.isclose(report['folds'][f]['prior']['spinal'][0], score_of(study_losses(labels, prior_rows(prior_table(trained), labels.study_id.unique())))['spinal'])
        leaky = score_of(study_losses(labels, prior_rows(prior_table(labels), labels.study_id.unique())))['spinal']
        assert leaky < report['folds'][f]['prior']['spinal'][0] - .01
    pooled = [study_losses(one.labels[one.labels.study_id.isin(of_fold(folds, f))], prior_rows(one.prior, of_fold(folds, f))) for f, one in enumerate(folds)]
    assert np.isclose(report['out_of_fold']['prior']['score'][0], score_of(pd.concat(pooled))['score'])
    assert report['out_of_fold']['difference']['foraminal'] == (0, 0, 0)  # those rows are the prior of the same run


def test_a_fallback_row_out_of_fold_is_counted(own):
    s = of_fold(load_folds(own), 1)[0]
    rewrite(own / 'fold_1', '42_grading', 'predictions', lambda t: t.assign(source=t['source'].where((t.study_id != s) | (t.level != 'l1_l2'), 'prior')))
    report = combine(own, draws=5)
    n = report['folds'][1]['studies']
    assert np.isclose(report['folds'][1]['from_model'][CANAL], 1 - 1 / (5 * n)) and report['folds'][0]['from_model'][CANAL] == 1
    why = pd.read_csv(own / 'oof_provenance.csv').set_index('row_id')
    assert why['source'][f'{s}_{CANAL}_l1_l2'] == 'prior' and why['source'][f'{s}_{CANAL}_l2_l3'] == 'model'


def test_without_test_part_and_hidden_studies_there_are_no_such_files(tmp_path):
    made_up_folds(tmp_path / 'runs', k=2, studies=14, hidden=0, test=0.)
    report = combine(tmp_path / 'runs', draws=5)
    assert 'test' not in report and report['out_of_fold']['studies'] == 14
    assert sorted(p.name for p in (tmp_path / 'runs').iterdir() if p.is_file()) == ['oof.csv', 'oof_provenance.csv', 'report.json']


# ---- the guard

def test_honest_runs_pass(made):
    seen = check_folds(load_folds(made.dir))
    assert set(seen.fold) == {0, 1, 2} and set(seen.stage) == set(TRAINED) - {'45_variants'} and set(seen.use) == {'train', 'choose'}


@pytest.mark.parametrize('stage', [s for s in TRAINED if s != '45_variants'])
@pytest.mark.parametrize('who, use', [('own fold', 'train'), ('own fold', 'choose'), ('test part', 'train'), ('submission', 'choose')])
def test_a_planted_leak_is_found(own, stage, who, use):
    folds = load_folds(own)
    outside = of_fold(folds, -1)
    planted = of_fold(folds, 1)[0] if who == 'own fold' else next(s for s in outside if (folds[0].studies.part[s] == 'submission') == (who == 'submission'))
    (own / 'oof.csv').write_text('of an earlier call')
    rewrite(own / 'fold_1', stage, 'studies_seen', lambda t: pd.concat([t, pd.DataFrame(dict(study_id=[planted], use=[use]))]))
    with pytest.raises(RunError, match=f'fold 1: leak: {stage} saw .* {planted} '): combine(own, draws=5)
    assert not [n for n in RESULTS if (own / n).exists()]  # nothing lies there that looks like a result


def test_seeing_a_study_of_another_fold_is_no_leak(own):
    folds = load_folds(own)
    rewrite(own / 'fold_1', '31_encoders', 'studies_seen', lambda t: pd.concat([t, pd.DataFrame(dict(study_id=list(of_fold(folds, 2)), use='train'))]))
    check_folds(load_folds(own))


def test_a_variant_stage_is_looked_at_too(own):
    folds = load_folds(own)
    made_up_stage(own / 'fold_2', '45_variants', studies_seen=pd.DataFrame(dict(study_id=[of_fold(folds, 2)[0]], use=['train'])))
    with pytest.raises(RunError, match='fold 2: leak: 45_variants'): check_folds(load_folds(own))


@pytest.mark.parametrize('change, said', [
    (lambda t, s: t.assign(part=t.part.where(t.study_id != s, 'train')), 'fold 1: its run does not hold out study {s}, which is of fold 1'),
    (lambda t, s: t.assign(fold=t.fold.where(t.study_id != s, 0)), 'study {s} has fold 0 in the run of fold 1 and 1 in that of fold 0'),
    (lambda t, s: t[t.study_id != s], 'study {s} is known to the run of only one of fold 0 and fold 1')])
def test_a_study_that_is_dealt_otherwise_in_one_run_is_named(own, change, said):
    s = of_fold(load_folds(own), 1)[2]
    rewrite(own / 'fold_1', '10_prepare', 'studies', lambda t: change(t, s))
    with pytest.raises(RunError) as stopped: combine(own, draws=5)
    assert said.format(s=s) in str(stopped.value)


def test_a_study_of_the_test_part_may_be_trained_on_by_no_run(own):
    s = next(s for s, part in load_folds(own)[0].studies.part.items() if part == 'test' and load_folds(own)[0].studies.fold[s] < 0)
    rewrite(own / 'fold_2', '10_prepare', 'studies', lambda t: t.assign(part=t.part.where(t.study_id != s, 'validation')))
    with pytest.raises(RunError, match=f'fold 2: study {s} is in no fold'): combine(own, draws=5)


def test_a_study_in_a_fold_that_nobody_holds_out(own):
    "The same in all runs, so that no two of them differ."
    s = of_fold(load_folds(own), 1)[0]
    for f in range(3): rewrite(own / f'fold_{f}', '10_prepare', 'studies', lambda t: t.assign(fold=t.fold.where(t.study_id != s, 3), part=t.part.where(t.study_id != s, 'train')))
    with pytest.raises(RunError, match='lacks fold 3'): combine(own, draws=5)
    with pytest.raises(RunError, match=f'study {s} is held out 0 times'): check_folds([one_of(own, f) for f in range(3)])


def one_of(folder, f):
    "One run as `load_folds` reads it, whatever the others are."
    run = folder / f'fold_{f}'
    manifests = {s: read_manifest(run, s) for s in GRADING}
    return SimpleNamespace(dir=run, manifests=manifests, studies=pd.read_parquet(manifests['10_prepare'].path('studies')).set_index('study_id'), predictions=pd.read_parquet(manifests['42_grading'].path('predictions')))


def test_runs_in_each_others_folders(own):
    for a, b in (('fold_0', 'x'), ('fold_2', 'fold_0'), ('x', 'fold_2')): (own / a).rename(own / b)
    with pytest.raises(RunError, match='fold 0: its run holds out study .*, which is of fold 2'): combine(own, draws=5)


def test_runs_of_other_parameters_or_dealing(own, tmp_path):
    made_up_folds(tmp_path / 'other', seed=1)
    shutil.rmtree(own / 'fold_1')
    shutil.copytree(tmp_path / 'other/fold_1', own / 'fold_1')
    with pytest.raises(RunError, match='study .* has fold|10_prepare.seed is 1 in fold 1 and 0 in fold 0'): combine(own, draws=5)
    record = json.loads((own / 'fold_0/31_encoders/manifest.json').read_text()) | dict(parameters=dict(seed=0, epochs=3))
    (own / 'fold_2/31_encoders/manifest.json').write_text(json.dumps(record))
    shutil.rmtree(own / 'fold_1')
    made_up_folds(tmp_path / 'again')
    shutil.copytree(tmp_path / 'again/fold_1', own / 'fold_1')
    with pytest.raises(RunError, match='31_encoders.epochs is 3 in fold 2 and None in fold 0'): combine(own, draws=5)


def test_folds_that_are_missing_or_not_finished(own):
    shutil.copytree(own / 'fold_1', own / 'fold_3')
    with pytest.raises(RunError, match='holds fold_3, but its studies are in 3 folds'): combine(own)
    shutil.rmtree(own / 'fold_3')
    (own / 'fold_1/31_encoders/manifest.json').unlink()
    with pytest.raises(RunError, match='31_encoders has not run in .*fold_1'): combine(own)
    shutil.rmtree(own / 'fold_0')
    with pytest.raises(RunError, match='lacks fold 0 of 3: mscan_folds --only 0'): combine(own)


def test_a_held_out_study_without_prediction(own):
    s = of_fold(load_folds(own), 0)[0]
    rewrite(own / 'fold_0', '42_grading', 'predictions', lambda t: t[t.study_id != s])
    with pytest.raises(RunError, match=f'fold 0: its run has no prediction for study {s}'): combine(own, draws=5)
    rewrite(own / 'fold_1', '42_grading', 'predictions', lambda t: t[(t.study_id != of_fold(load_folds(own), 1)[0]) | (t.level != 'l1_l2')])
    rewrite(own / 'fold_0', '42_grading', 'predictions', lambda t: pd.concat([t, one_of(own, 1).predictions.loc[lambda p: p.study_id == s]]))
    with pytest.raises(TableError, match='lacks 5 of'): combine(own, draws=5)


# ---- averaging

def answers(seed, studies=('1', '2'), fallen=(), reason='the level is on no slice'):
    "Rows of one run; `fallen` (study, level) pairs are the prior's."
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame([(s, c, l) for s in studies for c in CONDITIONS for l in LEVELS], columns=KEYS)
    model = (rows.condition == CANAL) & ~pd.MultiIndex.from_frame(rows[['study_id', 'level']]).isin(list(fallen))
    rows[[*PROBS, *RISKS]] = np.hstack([rng.dirichlet((1, 1, 1), len(rows)) for _ in range(2)])
    return rows.assign(source=np.where(model, 'model', 'prior'), slices=np.where(model, f'30{seed}/7 9/1', ''), reason=np.where(model, '', reason))


def test_one_run_is_its_own_mean():
    one = answers(0, fallen=[('1', 'l4_l5')])
    mean = average_runs([one])
    assert mean[list(one)].equals(one) and set(mean.models) == {'1 of 1', '0 of 1'}


def test_only_models_count_where_one_has_answered():
    runs = [answers(0), answers(1, fallen=[('1', 'l4_l5'), ('2', 'l1_l2')]), answers(2, fallen=[('2', 'l1_l2')], reason='no axial T2 series'), answers(3, fallen=[('2', 'l1_l2')])]
    mean, by = average_runs(runs).set_index(KEYS), [r.set_index(KEYS) for r in runs]
    at = lambda row, who: np.mean([by[k].loc[row, P].to_numpy(float) for k in who], 0)
    for row, who in ((('1', CANAL, 'l3_l4'), (0, 1, 2, 3)), (('1', CANAL, 'l4_l5'), (0, 2, 3)), (('2', CANAL, 'l1_l2'), (0,)), (('1', CONDITIONS[1], 'l1_l2'), (0, 1, 2, 3))):
        assert np.allclose(mean.loc[row, P].to_numpy(float), at(row, who)), row
        assert mean.models[row] == f'{len(who) if row[1] == CANAL else 0} of 4' and mean['source'][row] == ('model' if row[1] == CANAL else 'prior')
    assert mean.slices['1', CANAL, 'l4_l5'] == '300/7 9/1 302/7 303/7' and mean.slices['2', CANAL, 'l1_l2'] == '300/7 9/1'
    assert mean.reason['2', CANAL, 'l1_l2'] == 'fold 1, 3: the level is on no slice; fold 2: no axial T2 series'
    assert mean.reason['1', CONDITIONS[1], 'l1_l2'] == 'fold 0, 1, 3: the level is on no slice; fold 2: no axial T2 series'
    assert np.allclose(mean[list(PROBS)].sum(axis=1), 1)


def test_the_order_of_rows_and_runs_does_not_matter():
    runs = [answers(0), answers(1, fallen=[('1', 'l4_l5')]), answers(2)]
    mean = average_runs(runs).set_index(KEYS)
    other = average_runs([r.sample(frac=1, random_state=5) for r in runs[::-1]]).set_index(KEYS).loc[mean.index]
    assert np.allclose(mean[P].to_numpy(float), other[P].to_numpy(float)) and mean.models.equals(other.models)
    with pytest.raises(TableError, match='lacks'): average_runs([runs[0], runs[1].iloc[1:]])
    with pytest.raises(TableError, match='twice'): average_runs([runs[0], pd.concat([runs[1], runs[1].iloc[:1]])])


# ---- mscan_predict

def stub(seed, low=.5, high=99.5, fails=(), fallen=()):
    "Models of a run that need no network."
    return SimpleNamespace(seed=seed, low=low, high=high, fails=fails, fallen=fallen, conditions=[CANAL], view_dropout=0., conditional=None, prior=prior_table(pd.DataFrame(columns=['condition', 'level', 'grade'])))


@pytest.fixture
def stubs(monkeypatch, tmp_path):
    "A place with test studies 1 and 2, where reading and grading are stubs; what was read, normalised and graded is noted."
    note = SimpleNamespace(read=[], normalised=[], graded=[], members={}, unreadable=())

    def read_any(found, descriptions, limits):
        note.read.append(found.study_id)
        if found.study_id in note.unreadable: raise OSError('disk is gone')
        return Study(found.study_id, [SimpleNamespace(series_id=f'series of {found.study_id}')]), []

    def normalise(series, low, high):
        note.normalised.append((low, high))
        return series, low, high

    def grade_study(study, models):
        note.graded.append((study.study_id, models.seed, *study.series[0][1:]))
        if study.study_id in models.fails: raise ValueError('a bad day')
        return answers(models.seed, [study.study_id], [(study.study_id, l) for l in models.fallen])

    for name, stand_in in dict(read_any=read_any, normalise=normalise, conventional=lambda series: series, grade_study=grade_study, load_models=lambda manifests, device: note.members[Path(manifests['10_prepare'].run_dir).name],
                               find_studies=lambda data_dir, progress: SimpleNamespace(studies=[Found('1'), Found('2')], notes=[], descriptions=None, ids=None)).items(): monkeypatch.setattr(submission, name, stand_in)
    return note


def test_predict_on_folds_is_the_mean_of_its_runs(stubs, made, tmp_path):
    stubs.members = {f'fold_{f}': stub(f) for f in range(3)}
    rows = predict(made.dir, 'data', tmp_path / 'out', 'cpu', progress=False)
    expected = pd.concat([average_runs([answers(f, [s]) for f in range(3)]) for s in ('1', '2')], ignore_index=True)
    assert rows[[*KEYS, 'models', 'source']].equals(expected[[*KEYS, 'models', 'source']]) and np.allclose(rows[P].to_numpy(float), expected[P].to_numpy(float))
    assert stubs.read == ['1', '2'] and stubs.normalised == [(.5, 99.5)] * 2 and [g[:2] for g in stubs.graded] == [(s, f) for s in ('1', '2') for f in range(3)]  # read once, graded by each
    told = pd.read_csv(tmp_path / 'out/provenance.csv', keep_default_na=False)
    assert list(told) == list(MEAN_PROVENANCE) and set(told.models[told['source'] == 'model']) == {'3 of 3'}
    assert read_submission(tmp_path / 'out/submission.csv').row_id.tolist() == told.row_id.tolist() == row_ids(['1', '2'])


def test_predict_normalises_anew_only_where_grey_scales_differ(stubs, made, tmp_path):
    stubs.members = {'fold_0': stub(0), 'fold_1': stub(1, low=1.), 'fold_2': stub(2)}
    predict(made.dir, 'data', tmp_path / 'out', 'cpu', progress=False)
    assert sorted(stubs.normalised) == [(.5, 99.5)] * 2 + [(1., 99.5)] * 2   # twice a study; their order is that of reading ahead
    assert [g[1:] for g in stubs.graded[:3]] == [(0, .5, 99.5), (1, 1., 99.5), (2, .5, 99.5)]


def test_predict_with_a_run_that_fails_or_falls_back(stubs, made, tmp_path, capsys):
    stubs.members = {'fold_0': stub(0), 'fold_1': stub(1, fails=['1']), 'fold_2': stub(2, fallen=['l4_l5'])}
    rows = predict(made.dir, 'data', tmp_path / 'out', 'cpu', progress=False).set_index(KEYS)
    assert rows.models['1', CANAL, 'l3_l4'] == '2 of 3' and rows.models['1', CANAL, 'l4_l5'] == '1 of 3' and rows.models['2', CANAL, 'l3_l4'] == '3 of 3'
    assert np.allclose(rows.loc[('1', CANAL, 'l4_l5'), P].to_numpy(float), answers(0, ['1']).set_index(KEYS).loc[('1', CANAL, 'l4_l5'), P].to_numpy(float))
    assert 'fold 1: grading failed: ValueError: a bad day' in rows.reason['1', CANAL, 'l4_l5'] and 'fold 2: the level is on no slice' in rows.reason['1', CANAL, 'l4_l5']
    assert 'study 1 falls back' in capsys.readouterr().err
    with pytest.raises(ValueError, match='a bad day'): predict(made.dir, 'data', tmp_path / 'out', 'cpu', strict=True, progress=False)
    stubs.members['fold_1'] = stub(1)
    with pytest.raises(RunError, match='study 1: the level is on no slice'): predict(made.dir, 'data', tmp_path / 'out', 'cpu', strict=True, progress=False)


def test_predict_of_a_study_that_cannot_be_read(stubs, made, tmp_path):
    stubs.members, stubs.unreadable = {f'fold_{f}': stub(f) for f in range(3)}, ('2',)
    rows = predict(made.dir, 'data', tmp_path / 'out', 'cpu', progress=False)
    lost = rows[rows.study_id == '2']
    assert len(rows) == 50 and (lost['source'] == 'prior').all() and (lost.models == '0 of 3').all() and (lost[lost.condition == CANAL].reason == 'grading failed: OSError: disk is gone').all()


def test_a_single_run_is_graded_as_before(stubs, made, tmp_path):
    run = tmp_path / 'single'
    shutil.copytree(made.dir / 'fold_1', run)
    stubs.members = {'single': stub(5)}
    rows = predict(run, 'data', tmp_path / 'out', 'cpu', progress=False)
    alone = pd.concat([predict_study(Found(s), None, stub(5)) for s in ('1', '2')], ignore_index=True)
    assert rows.equals(alone) and 'models' not in rows and list(pd.read_csv(tmp_path / 'out/provenance.csv')) == list(PROVENANCE)


def test_which_runs_a_folder_stands_for(made, tmp_path):
    assert member_runs(made.dir) == [made.dir / f'fold_{f}' for f in range(3)] and member_runs(made.dir / 'fold_1') == [made.dir / 'fold_1']
    both = tmp_path / 'both'
    shutil.copytree(made.dir / 'fold_0', both)
    shutil.copytree(made.dir / 'fold_0', both / 'fold_0')
    assert member_runs(both) == [both] and member_runs(tmp_path / 'none') == [tmp_path / 'none']
    shutil.copytree(made.dir / 'fold_2', tmp_path / 'part/fold_2')
    with pytest.raises(RunError, match='lacks fold 0 of 3'): member_runs(tmp_path / 'part')


# ---- the command

TOY = {'10_prepare': ("data_dir = 'data'\nrun_dir = 'runs/x'\nfolds = 0\nfold = -1\nfolds_csv = ''\nseed = 0", "stage.product('said', 'said.txt').write_text(f'{fold} of {folds}')"),
       '42_grading': ("run_dir = 'runs/x'\nbad = -1\nepochs = 1", "said = stage.upstream('10_prepare').path('said').read_text()\nif said.startswith(str(bad)): raise ValueError('a bad day')\nstage.product('said', 'said.txt').write_text(said)")}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A folder with data/ and nbs/ of two stages, whose cells run in this process."
    (tmp_path / 'nbs').mkdir(), (tmp_path / 'data').mkdir()
    (tmp_path / 'data/train.csv').write_text('study_id\n1\n')
    cell = lambda id, source, *tags: dict(cell_type='code', id=id, metadata=dict(tags=tags), source=source, execution_count=None, outputs=[])
    for stage, (parameters, work) in TOY.items():
        cells = [cell('a', parameters, 'parameters'), cell('b', f'from mscan.runs import Stage\nstage = Stage.begin({stage!r}, globals())\n{work}\nstage.finish()')]
        (tmp_path / f'nbs/{stage}.ipynb').write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=cells)))

    def execute(notebook, run_dir, values, bar=None):
        namespace = dict(values)
        with runner.environ(MSCAN_NBS=str(Path(notebook).parent)):
            try:
                for source, tags in runs.notebook_cells(notebook):
                    if 'parameters' not in tags: exec(source, namespace)
            except Exception as e: raise runner.StageFailed(f'stage {Path(notebook).stem} failed: {e}') from e
    monkeypatch.setattr(runner, 'execute', execute)
    return tmp_path


def asked(toy, *more): return folds_parser().parse_args(['--data_dir', str(toy / 'data'), '--run_dir', str(toy / 'runs'), '--nbs', str(toy / 'nbs'), *more])


def go(toy, *more, only=None):
    lines = []
    missing = run_folds(toy / 'data', toy / 'runs', plans_of(asked(toy, *more)), only, toy / 'nbs', lines.append)
    return missing, [line for line in lines if 'done' in line]


def said(toy, f): return (toy / f'runs/fold_{f}/42_grading/said.txt').read_text()


def test_each_fold_is_run_once_and_a_second_call_does_nothing(toy):
    missing, done = go(toy, '--folds', '3')
    assert missing == [] and len(done) == 6 and [said(toy, f) for f in range(3)] == ['0 of 3', '1 of 3', '2 of 3']
    assert go(toy, '--folds', '3') == ([], [])
    (toy / 'runs/oof.csv').write_text('old')
    missing, done = go(toy, '--folds', '3', '-p', 'epochs', '2', only=[1])
    assert missing == [] and len(done) == 1 and not (toy / 'runs/oof.csv').exists()  # what fold 1 said before is no result any more


def test_some_folds_only(toy):
    missing, done = go(toy, '--folds', '3', only=[0, 2])
    assert missing == [1] and len(done) == 4 and not (toy / 'runs/fold_1').exists()
    assert go(toy, '--folds', '3')[0] == []
    with pytest.raises(RunError, match='there is no fold 3'): go(toy, '--folds', '3', only=[3])
    with pytest.raises(RunError, match='holds fold_2, but there are 2 folds'): go(toy, '--folds', '2')


def test_the_first_failure_stops_and_names_the_fold(toy):
    with pytest.raises(RunError, match='^fold 1: stage 42_grading failed: a bad day'): go(toy, '--folds', '3', '-p', 'bad', '1')
    assert said(toy, 0) == '0 of 3' and not (toy / 'runs/fold_2').exists()
    with pytest.raises(SystemExit, match='^mscan_folds: fold 1: stage 42_grading failed') as stopped:
        mscan_folds(['--data_dir', str(toy / 'data'), '--run_dir', str(toy / 'runs'), '--nbs', str(toy / 'nbs'), '--folds', '3', '-p', 'bad', '1'])
    assert 'Traceback' not in stopped.value.code
    missing, done = go(toy, '--folds', '3', '-p', 'bad', '-1')
    assert missing == [] and not any('10_prepare' in line for line in done[:2])  # what fold 0 and fold 1 had finished is kept


def test_what_does_not_fit_is_said_before_anything_runs(toy):
    csv = toy / 'folds.csv'
    csv.write_text('study_id,fold\n' + ''.join(f'{i},{i % 4 - 1}\n' for i in range(12)))
    assert len(plans_of(asked(toy, '--folds_csv', str(csv)))) == 3 and len(plans_of(asked(toy))) == 5
    assert all(p['10_prepare']['folds_csv'] == str(csv) for p in plans_of(asked(toy, '--folds_csv', str(csv))))
    for more, said in ((('--folds', '4', '--folds_csv', str(csv)), '--folds 4, but'), (('--folds', '1'), 'at least 2'), (('-p', 'fold', '2'), '-p fold: mscan_folds sets it'), (('-p', '10_prepare.folds', '2'), 'mscan_folds sets it'),
                       (('-p', 'epoch', '2'), 'did you mean epochs'), (('--preset', 'nosuch'), 'unknown preset')):
        with pytest.raises(RunError, match=said): plans_of(asked(toy, *more))
    with pytest.raises(TableError, match='no such file'): plans_of(asked(toy, '--folds_csv', 'nowhere.csv'))
    shutil.copytree(toy / 'nbs', toy / 'runs/10_prepare')
    with pytest.raises(RunError, match='holds a run of its own'): go(toy)


def test_without_test_images_there_is_no_submission_stage(toy):
    shutil.copy(toy / 'nbs/42_grading.ipynb', toy / 'nbs/60_submission.ipynb')
    assert '60_submission' not in plans_of(asked(toy))[0]
    (toy / 'data/test_images/7').mkdir(parents=True)
    assert '60_submission' in plans_of(asked(toy))[0]


def test_the_command_combines_when_all_folds_are_there(made, toy, monkeypatch, capsys):
    def run_stages(data_dir, run_dir, planned, nbs, say): shutil.copytree(made.dir / Path(run_dir).name, run_dir, dirs_exist_ok=True)
    monkeypatch.setattr(module, 'run_stages', run_stages)
    command = ['--data_dir', str(toy / 'data'), '--run_dir', str(toy / 'runs'), '--nbs', str(toy / 'nbs'), '--folds', '3', '--draws', '5']
    mscan_folds([*command, '--only', '0,2'])
    assert 'nothing is combined yet: fold 1 not finished' in capsys.readouterr().out and not (toy / 'runs/oof.csv').exists()
    mscan_folds([*command, '--only', '1'])
    said = capsys.readouterr().out
    assert all((toy / 'runs' / n).exists() for n in RESULTS) and all(w in said for w in ('out of fold', 'fold 2', 'test, mean of 3', 'weighted cross entropy', 'competition score', 'oof.csv'))


# ---- the whole way

@pytest.mark.slow
def test_two_real_folds(small_data, tmp_path):
    "Six studies in two folds through every stage, twice; then mscan_predict with both: its answers are those of R/submission.csv."
    bin, env = Path(sys.executable).parent, os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg')

    def command(name, *args):
        done = subprocess.run([bin / name, *map(str, args)], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout
    runs_dir = tmp_path / 'runs'
    told = command('mscan_folds', '--data_dir', small_data, '--run_dir', runs_dir, '--folds', 2, '--preset', 'smoke', '-p', 'view_dropout', .1, '--draws', 50)
    assert 'out of fold' in told and 'fold 1' in told
    folds, report = load_folds(runs_dir), json.loads((runs_dir / 'report.json').read_text())
    assert sorted(of_fold(folds, 0).append(of_fold(folds, 1))) == sorted(folds[0].labels.study_id.unique()) and report['out_of_fold']['studies'] == 6
    assert {r['stage'] for r in report['studies_seen']} >= {'20_keypoints', '30_crops', '31_encoders', '40_levels', '42_grading'}
    oof = read_submission(runs_dir / 'oof.csv')
    for f in (0, 1):
        own = folds[f].predictions.set_index(KEYS).loc[pd.MultiIndex.from_frame(oof[oof.study_id.isin(of_fold(folds, f))][KEYS]), list(PROBS)]
        assert np.allclose(own.to_numpy(), oof[oof.study_id.isin(of_fold(folds, f))][list(PROBS)], atol=1e-9)
    before = {p: p.stat().st_mtime_ns for p in runs_dir.glob('*/*/manifest.json')}
    command('mscan_folds', '--data_dir', small_data, '--run_dir', runs_dir, '--folds', 2, '--preset', 'smoke', '-p', 'view_dropout', .1, '--draws', 50)
    assert before == {p: p.stat().st_mtime_ns for p in runs_dir.glob('*/*/manifest.json')}
    command('mscan_predict', '--run_dir', runs_dir, '--data_dir', small_data, '--out', tmp_path / 'out', '--device', 'cpu')
    first, second = (pd.read_csv(d / 'submission.csv').set_index('row_id') for d in (runs_dir, tmp_path / 'out'))
    why, why_again = (pd.read_csv(d / 'provenance.csv', keep_default_na=False) for d in (runs_dir, tmp_path / 'out'))
    assert list(first.index) == list(second.index) and np.abs(first - second).to_numpy().max() < 2e-3
    assert why[['row_id', 'models', 'source', 'slices']].equals(why_again[['row_id', 'models', 'source', 'slices']]) and (why.models != '0 of 2').any()
