"A made-up run through the whole evaluation: leaks, parts, figures, command line, and the notebook's own run cells."
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import mscan
from mscan.evaluate import (PROBS, RISKS, against_constants, calibration_error, check_no_leak, evaluate_run, graded_rows, metric_table,
                            mscan_evaluate, pick_labels, reliability, report_lines)
from mscan.localisation import made_up_run
from mscan.metrics import grade_metrics, prior_table, score, weighted_log_loss
from mscan.rsna import CONDITIONS, LEVELS, TableError, write_train
from mscan.runs import STAGES, RunError

CANAL = CONDITIONS[0]
PART = {str(i): 'train' if i < 20 else 'validation' if i < 26 else 'test' if i < 46 else 'submission' for i in range(56)}


def model(ids, seed=0, noise=.6):
    "Labels, and answers of a model whose p_risk is honest and whose p_score has the odds times 1, 2, 4."
    rng = np.random.default_rng(seed)
    labels = pd.DataFrame([(s, c, l) for s in ids for c in CONDITIONS for l in LEVELS], columns=['study_id', 'condition', 'level']).astype('str')
    share = np.array([.7, .18, .12])
    grade = rng.choice(3, len(labels), p=share)
    risk = share * np.exp(-.5 * ((grade[:, None] + rng.normal(0, noise, (len(grade), 1)) - np.arange(3)) / noise) ** 2)
    risk /= risk.sum(1, keepdims=True)
    p = risk * (1, 2, 4) / (risk * (1, 2, 4)).sum(1, keepdims=True)
    answers = labels.assign(**dict(zip(PROBS, p.T, strict=True)), **dict(zip(RISKS, risk.T, strict=True)), source=np.where(labels.condition == CANAL, 'model', 'prior'))
    return labels.assign(grade=pd.array(grade, dtype='Int8')), answers


def pretend(run, stage, **tables):
    "A finished stage with the given tables as products."
    (run/stage).mkdir(parents=True, exist_ok=True)
    products = {}
    for name, frame in tables.items():
        csv = name in ('studies_seen', 'prior')
        file = f'{name}.{"csv" if csv else "parquet"}'
        frame.to_csv(run/stage/file, index=False) if csv else frame.to_parquet(run/stage/file, index=False)
        products[name] = {'path': file, 'bytes': (run/stage/file).stat().st_size, 'sha256': ''}
    (run/stage/'manifest.json').write_text(json.dumps({'stage': stage, 'products': products, 'seconds': 3., 'parameters': {}, 'metrics': {}, 'inputs': {}}))


@pytest.fixture
def run(tmp_path):
    "A finished run of 56 made-up studies, and beside it what only the examiner has: labels and truth of the submission part."
    studies = pd.DataFrame({'study_id': list(PART), 'split': ['test' if p == 'submission' else 'train' for p in PART.values()], 'part': list(PART.values())})
    labels, answers = model(list(PART))
    own = labels.study_id.map(PART) != 'submission'
    made, folder = made_up_run(list(PART)), tmp_path/'run'
    seen = studies[studies.part.isin(['train', 'validation'])].assign(use=lambda t: t.part.map({'train': 'train', 'validation': 'choose'}))[['study_id', 'use']]
    hidden = made.truth.study_id.map(PART) == 'submission'
    pretend(folder, '10_prepare', studies=studies, slices=made.slices, labels=labels[own], points=made.truth[~hidden],
            prior=prior_table(labels[labels.study_id.map(PART) == 'train']))
    pretend(folder, '20_keypoints', points=made.points, studies_seen=seen)
    pretend(folder, '21_projection', axial_slices=made.axial_slices)
    pretend(folder, '30_crops', studies_seen=seen)
    pretend(folder, '31_encoders', studies_seen=seen)
    pretend(folder, '40_levels', boxes=made.boxes, studies_seen=seen)
    pretend(folder, '42_grading', predictions=answers.assign(part=answers.study_id.map(PART)), studies_seen=seen)
    write_train(labels[~own], tmp_path/'test_labels.csv')
    made.truth[hidden].assign(part='test', latent=0., grade=0).to_csv(tmp_path/'truth.csv', index=False)
    return SimpleNamespace(dir=folder, seen=seen, labels=labels, answers=answers, made=made, studies=studies,
                           labels_csv=tmp_path/'test_labels.csv', truth_csv=tmp_path/'truth.csv')


def test_no_leak_in_an_honest_run(run):
    found = check_no_leak(run.dir)
    assert set(found.stage) == {'20_keypoints', '30_crops', '31_encoders', '40_levels', '42_grading'}
    assert (found[found.use == 'train'].studies == 20).all() and (found[found.use == 'choose'].studies == 6).all()


@pytest.mark.parametrize('stage', ['20_keypoints', '30_crops', '31_encoders', '40_levels', '42_grading'])
@pytest.mark.parametrize('study, use', [('30', 'train'), ('50', 'choose')])
def test_a_planted_leak_is_found_in_every_stage(run, stage, study, use):
    planted = pd.concat([run.seen, pd.DataFrame({'study_id': [study], 'use': [use]})])
    planted.to_csv(run.dir/stage/'studies_seen.csv', index=False)
    with pytest.raises(RunError, match=f'leak: {stage} saw 1 studies of part {PART[study]}, the first {study}'): check_no_leak(run.dir)
    with pytest.raises(RunError, match='leak'): evaluate_run(run.dir, draws=5)


def test_a_stage_that_does_not_say_what_it_saw_fails(run):
    pretend(run.dir, '31_encoders')
    with pytest.raises(RunError, match='31_encoders trained, but has no product studies_seen'): check_no_leak(run.dir)
    (run.dir/'10_prepare/manifest.json').unlink()
    with pytest.raises(RunError, match='10_prepare has not run'): check_no_leak(run.dir)


def test_which_studies_are_examined(run):
    notes = []
    mine, part = pick_labels(run.studies, run.labels[run.labels.study_id.map(PART) != 'submission'], notes)
    assert part == 'test' and set(mine.study_id) == {str(i) for i in range(26, 46)} and not notes
    mine, part = pick_labels(run.studies[run.studies.part != 'test'], run.labels[run.labels.study_id.map(PART) != 'submission'], notes)
    assert part == 'validation' and set(mine.study_id) == {str(i) for i in range(20, 26)} and any('flatter' in n for n in notes) and any('20 labelled' in n for n in notes)
    with pytest.raises(TableError, match='held out'): pick_labels(run.studies, run.labels[run.labels.study_id.map(PART) == 'train'], notes)


def test_own_test_part(run):
    found = evaluate_run(run.dir, draws=50)
    r = found.report
    assert r['part'] == 'test' and r['studies'] == 20 and r['localisation']['levels'] == 100 and r['localisation']['shifted'] == 0
    assert r['axial']['hit'] > .95 and r['sagittal']['exact'] == 1 and r['from_model'] == 1 and not r['notes']
    assert r['seconds'] == dict.fromkeys(('10_prepare', '20_keypoints', '21_projection', '30_crops', '31_encoders', '40_levels', '42_grading'), 3.)
    canal = run.labels[(run.labels.study_id.map(PART) == 'test') & (run.labels.condition == CANAL)].merge(run.answers, on=['study_id', 'condition', 'level'])
    assert np.isclose(r['grading']['wce'][0], weighted_log_loss(canal[list(PROBS)], canal.grade))  # of p_score
    assert np.isclose(r['grading']['accuracy'][0], (canal[list(RISKS)].to_numpy().argmax(1) == canal.grade).mean())  # of p_risk
    assert np.isclose(r['grading']['wce'][0], r['competition']['model']['spinal'])
    assert r['gain_over_prior']['spinal'][2] < 0 and all(low <= value <= high for value, low, high in r['grading'].values())
    json.dumps(mscan.runs.plain(r), allow_nan=False)


def test_held_out_studies_with_truth(run):
    r = evaluate_run(run.dir, run.labels_csv, run.truth_csv, draws=20).report
    assert r['part'] == 'submission' and r['studies'] == 10 and r['localisation']['levels'] == 50 and r['localisation']['missing'] == 0
    labels = run.labels[run.labels.study_id.map(PART) == 'submission']
    rows = run.answers[run.answers.study_id.isin(labels.study_id)]
    direct = score(labels, rows.assign(row_id=rows.study_id + '_' + rows.condition + '_' + rows.level))
    assert np.isclose(r['competition']['model']['score'], direct['score'])
    without = evaluate_run(run.dir, run.labels_csv, draws=20).report  # the run has no label points of hidden studies
    assert 'localisation' not in without and any('no true points' in n for n in without['notes'])


def test_stages_that_have_not_run_are_named(run):
    for stage in ('21_projection', '40_levels'): (run.dir/stage/'manifest.json').unlink()
    r = evaluate_run(run.dir, draws=20).report
    assert 'axial' not in r and 'sagittal' not in r and 'localisation' in r and len(r['notes']) == 2
    assert any('21_projection has not run' in line for line in report_lines(r))
    (run.dir/'42_grading/manifest.json').unlink()
    with pytest.raises(RunError, match='42_grading has not run'): evaluate_run(run.dir, draws=20)


def test_a_fallback_row_is_not_counted_as_the_models(run):
    answers = run.answers.copy()
    answers.loc[(answers.study_id == '30') & (answers.condition == CANAL), 'source'] = 'prior'
    pretend(run.dir, '42_grading', predictions=answers, studies_seen=run.seen)
    assert np.isclose(evaluate_run(run.dir, draws=20).report['from_model'], 95 / 100)
    pretend(run.dir, '42_grading', predictions=answers[answers.study_id != '30'], studies_seen=run.seen)
    with pytest.raises(TableError, match='lacks 25'): evaluate_run(run.dir, draws=20)


def test_metric_table():
    labels, answers = model([str(i) for i in range(40)])
    labels.loc[(labels.level == 'l1_l2') & (labels.grade == 2), 'grade'] = 1  # no Severe at L1/L2
    labels.loc[labels.study_id == '0', 'grade'] = pd.NA
    rows = graded_rows(answers, labels)
    assert len(rows) == 195
    table = metric_table(rows, draws=100).set_index(['level', 'metric'])
    whole = grade_metrics(rows[list(PROBS)], rows.grade, rows[list(RISKS)])
    assert all(np.isclose(table.value['all', k], whole[k]) for k in ('accuracy', 'wce', 'auroc', 'binary_auroc', 'binary_accuracy', 'kappa'))
    assert np.isnan(table.value['l1_l2', 'auroc']) and np.isfinite(table.value['l1_l2', 'binary_auroc']) and (table.n['l1_l2'] == 39).all()
    assert table.low[['l1_l2', 'l5_s1']].isna().all() and (table.low['all'] < table.high['all']).all()
    with pytest.raises(TableError, match='no prediction'): graded_rows(answers, labels.assign(grade=pd.NA))


def test_gain_over_the_prior_is_paired():
    ids = [str(i) for i in range(30)]
    labels, answers = model(ids)
    prior = prior_table(labels)
    table, gain = against_constants(labels, answers, prior, draws=100)
    assert np.isclose(gain['score'].value, table.score['model'] - table.score['prior']) and np.isclose(gain['spinal'].value, table.spinal['model'] - table.spinal['prior'])
    assert gain['spinal'].high < 0
    _, worse = against_constants(labels, model(ids, seed=9)[1], prior, draws=100)  # another model's answers: confident and wrong
    assert worse['spinal'].low > 0


def test_reliability():
    rng = np.random.default_rng(0)
    p = rng.random(4000)
    honest, over = reliability(p, rng.random(4000) < p), reliability(p, rng.random(4000) < p / 2)
    assert honest.n.sum() == 4000 and calibration_error(honest) < .03 and np.isclose(calibration_error(over), .25, atol=.03)
    assert len(reliability([.1, .2], [True, False])) == 2 and np.isnan(calibration_error(reliability([], [])))


def test_command_line(run):
    script = str(Path(sys.executable).with_name('mscan_evaluate'))
    done = subprocess.run([script, '--run_dir', run.dir, '--train_csv', run.labels_csv, '--truth_csv', run.truth_csv, '--json', run.dir/'report.json', '--draws', '20'],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ('level shift 0 of 10', 'wce', 'uniform', 'model - prior, spinal', '20_keypoints 3', 'together 21'))
    assert json.loads((run.dir/'report.json').read_text())['localisation']['levels'] == 50
    for args, said in (({}, '--run_dir is needed'), (dict(run_dir=run.dir/'none'), '10_prepare has not run'), (dict(run_dir=run.dir, train_csv='none.csv'), 'no such file'),
                       (dict(run_dir=run.dir, truth_csv='none.csv'), 'no such file'), (dict(run_dir=run.dir, truth_csv=run.labels_csv), 'lacks the columns')):
        with pytest.raises(SystemExit, match='mscan_evaluate: ') as stopped: mscan_evaluate(**args) if args else mscan_evaluate(run_dir=None)
        assert said in stopped.value.code and '\n' not in stopped.value.code


def test_the_run_cells_of_the_notebook(run, monkeypatch):
    "The notebook's third part, cell by cell, on the made-up run."
    matplotlib = pytest.importorskip('matplotlib')
    monkeypatch.setattr(matplotlib, 'rcParams', matplotlib.rcParams.copy())
    matplotlib.use('Agg')
    import mscan.evaluate
    cells = json.loads((Path(mscan.evaluate.__file__).parents[1]/'nbs/50_evaluate.ipynb').read_text())['cells']
    cells = [''.join(c['source']) for c in cells if c['cell_type'] == 'code' and re.match(r'#\| eval: false', ''.join(c['source']))]
    assert 2 < len(cells) <= 11 and not any(re.search(r'^(def|class) ', c, re.M) for c in cells)
    names = dict(vars(mscan.evaluate))
    for i, cell in enumerate(cells):
        exec(cell, names)
        if i == 0: names |= {'run_dir': str(run.dir), 'draws': 20}
    manifest = json.loads((run.dir/'50_evaluate/manifest.json').read_text())
    assert set(manifest['inputs']) == set(STAGES[:STAGES.index('50_evaluate')]) and manifest['metrics']['localisation']['levels'] == 100
    assert {'report', 'figures', 'metrics', 'graded_rows'} <= set(manifest['products']) and (run.dir/'50_evaluate/figures.png').stat().st_size > 10_000
