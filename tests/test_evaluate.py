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
from mscan.compare import graded_rows, metric_table, to_submission
from mscan.evaluate import (against_constants, calibration_error, check_no_leak, evaluate_run, finished, mscan_evaluate, pick_labels, reliability,
                            report_lines, run_pictures)
from mscan.localisation import MOVED, made_up_run
from mscan.metrics import METRICS, RISKS, grade_metrics, p_risk, prior_table, score, weighted_log_loss
from mscan.rsna import CONDITIONS, LEVELS, PROBS, TableError, write_submission, write_train
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
    pretend(folder, '22_sides', studies_seen=seen)
    pretend(folder, '30_crops', studies_seen=seen, axial_points=made.axial_points)
    pretend(folder, '31_encoders', studies_seen=seen)
    pretend(folder, '40_levels', boxes=made.boxes, studies_seen=seen)
    pretend(folder, '42_grading', predictions=answers.assign(part=answers.study_id.map(PART)), studies_seen=seen)
    write_train(labels[~own], tmp_path/'test_labels.csv')
    made.truth[hidden].assign(part='test', latent=0., grade=0).to_csv(tmp_path/'truth.csv', index=False)
    return SimpleNamespace(dir=folder, seen=seen, labels=labels, answers=answers, made=made, studies=studies,
                           labels_csv=tmp_path/'test_labels.csv', truth_csv=tmp_path/'truth.csv')


def test_no_leak_in_an_honest_run(run):
    found = check_no_leak(run.dir)
    assert set(found.stage) == {'20_keypoints', '22_sides', '30_crops', '31_encoders', '40_levels', '42_grading'}
    assert (found[found.use == 'train'].studies == 20).all() and (found[found.use == 'choose'].studies == 6).all()


@pytest.mark.parametrize('stage', ['20_keypoints', '22_sides', '30_crops', '31_encoders', '40_levels', '42_grading'])
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
    assert r['seconds'] == dict.fromkeys(('10_prepare', '20_keypoints', '21_projection', '22_sides', '30_crops', '31_encoders', '40_levels', '42_grading'), 3.)
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
    assert all(np.isclose(table.value['all', k], whole[k]) for k in METRICS)
    assert all(np.isnan(table.value['l1_l2', k]) for k in ('auroc', 'severe_ap', 'severe_sens90')) and np.isfinite(table.value['l1_l2', 'binary_auroc']) and (table.n['l1_l2'] == 39).all()
    assert table.low[['l1_l2', 'l5_s1']].isna().all() and (table.low['all'] < table.high['all']).all()
    with pytest.raises(TableError, match='no prediction'): graded_rows(answers, labels.assign(grade=pd.NA))


def test_localisation_is_split_and_centres_stand_beside_the_projection(run):
    r = evaluate_run(run.dir, draws=5).report
    split, point = r['localisation'], r['axial_point']
    assert np.isclose(np.hypot(split['in_plane_median_mm'], split['through_median_mm']), split['median_mm'], atol=.6) and split['through_median_mm'] < split['in_plane_median_mm']
    assert set(point) == {'canal'} and point['canal']['slices'] == 300 and point['canal']['centre_median_mm'] < 1.2 < point['canal']['projected_median_mm']  # no recess points in this run
    recess = pd.concat([run.made.truth.assign(condition=c, y_mm=run.made.truth.y_mm - 4, x_mm=run.made.truth.x_mm + side) for c, side in ((CONDITIONS[3], 7), (CONDITIONS[4], -7))])
    hidden = pd.concat([run.made.truth, recess])
    hidden[hidden.study_id.map(PART) == 'submission'].to_csv(run.truth_csv, index=False)
    point = evaluate_run(run.dir, run.labels_csv, run.truth_csv, draws=5).report['axial_point']
    assert point['canal']['slices'] == point['recess_midpoint']['slices'] == 150 and 3 < point['recess_midpoint']['centre_median_mm'] < 5  # made-up centres are at the canal
    run.made.slices[['study_id', 'series_id']].drop_duplicates().assign(**(dict.fromkeys(MOVED, 0.) | {'shift_y_mm': -4.})).to_csv(run.truth_csv.with_name('truth_series.csv'), index=False)
    found = evaluate_run(run.dir, run.labels_csv, run.truth_csv, draws=5)
    moved = found.report['axial_point']
    assert 3 < moved['canal']['centre_median_mm'] < 5 and moved['recess_midpoint']['centre_median_mm'] > 7  # the file beside truth.csv is heard
    lines = '\n'.join(report_lines(found.report))
    assert 'axial point to the recess midpoint, in plane: median' in lines and 'through plane median' in lines


def test_a_run_without_axial_points_or_variants_says_nothing_of_them(run):
    pretend(run.dir, '30_crops', studies_seen=run.seen)
    found = evaluate_run(run.dir, draws=5)
    assert 'axial_point' not in found.report and 'variants' not in found.report and found.variants is None and not found.report['notes']


@pytest.fixture
def with_variants(run, monkeypatch):
    "The run with a finished stage 45_variants: mscan as 42_grading answered, and a noisier rival with three seeds."
    known = STAGES if '45_variants' in STAGES else (*STAGES[:STAGES.index('50_evaluate')], '45_variants', *STAGES[STAGES.index('50_evaluate'):])
    for module in (mscan.runs, mscan.evaluate): monkeypatch.setattr(module, 'STAGES', known)
    own = run.answers[run.answers.condition == CANAL]
    tables = [own.assign(variant='mscan', seed=0, points='predicted')]
    for seed in range(3):
        rival, p = own.assign(variant='sagittal_gru', seed=seed, points='predicted'), .6 * own[list(PROBS)] + .4 * np.random.default_rng(seed).dirichlet((1, 1, 1), len(own))
        rival[list(PROBS)], rival[list(RISKS)] = p, p_risk(p)
        tables.insert(0, rival)
    run.variants = pd.concat(tables, ignore_index=True).assign(part=lambda t: t.study_id.map(PART))
    probes = pd.concat([run.variants[(run.variants.variant == v) & (run.variants.seed == 0)].assign(variant=name) for v, name in (('mscan', 'as trained'), ('sagittal_gru', 'uniform'))])
    pretend(run.dir, '45_variants', variants=run.variants, probes=probes, studies_seen=run.seen)
    return run


def test_variants_of_a_run(with_variants):
    found = evaluate_run(with_variants.dir, draws=100)
    table = found.variants.set_index('variant')
    assert list(table.index) == ['sagittal_gru', 'mscan'] and table.studies.tolist() == [20, 20] and table.seeds.tolist() == [3, 1]
    assert np.isclose(table.wce['mscan'], found.report['grading']['wce'][0]) and table.wce_diff['mscan'] == 0 and table.wce_diff_low['sagittal_gru'] > 0
    lines = '\n'.join(report_lines(found.report))
    assert all(word in lines for word in ('Table I', 'Table II', 'M-SCAN', 'published*', 'real RSNA 2024 data')) and found.report['variants'][1]['variant'] == 'mscan'
    json.dumps(mscan.runs.plain(found.report), allow_nan=False)
    assert found.probes.variant.tolist() == ['as trained', 'uniform'] and found.probes.wce_diff[0] == 0 < found.probes.wce_diff_low[1] and 'attention replaced' in lines
    for rest in (with_variants.variants[with_variants.variants.part != 'test'], with_variants.variants[with_variants.variants.variant != 'mscan']):
        pretend(with_variants.dir, '45_variants', variants=rest, studies_seen=with_variants.seen)
        without = evaluate_run(with_variants.dir, draws=5)
        assert without.variants is None and any('variants holds no answer of mscan' in n for n in without.report['notes'])
    pretend(with_variants.dir, '45_variants', variants=with_variants.variants.iloc[:0], probes=with_variants.variants.iloc[:0], studies_seen=with_variants.seen.iloc[:0])
    none = evaluate_run(with_variants.dir, draws=5)  # the stage ran and was told to train nothing
    assert none.variants is None and not none.report['notes'] and 'variants' not in none.report


def test_a_leak_in_the_variants_is_found(with_variants):
    assert '45_variants' in set(check_no_leak(with_variants.dir).stage)
    pd.concat([with_variants.seen, pd.DataFrame({'study_id': ['31'], 'use': ['choose']})]).to_csv(with_variants.dir/'45_variants/studies_seen.csv', index=False)
    with pytest.raises(RunError, match='leak: 45_variants saw 1 studies of part test, the first 31'): evaluate_run(with_variants.dir, draws=5)
    pretend(with_variants.dir, '45_variants', variants=with_variants.variants)
    with pytest.raises(RunError, match='45_variants trained, but has no product studies_seen'): check_no_leak(with_variants.dir)


def test_a_pair_of_files_says_what_the_run_says(run, tmp_path, capsys):
    rows = run.answers[run.answers.study_id.map(PART) == 'submission']
    write_submission(to_submission(rows), tmp_path/'s.csv')
    whole = evaluate_run(run.dir, run.labels_csv, draws=50).report
    mscan_evaluate(train_csv=str(run.labels_csv), submission=str(tmp_path/'s.csv'), json=str(tmp_path/'pair.json'), draws=50)
    said, pair = capsys.readouterr().out, json.loads((tmp_path/'pair.json').read_text())
    assert set(pair['grading']) == set(CONDITIONS) and all(c in said for c in CONDITIONS) and 'competition score' in said
    for m in METRICS: assert np.allclose(pair['grading'][CANAL][m], whole['grading'][m], atol=.01), m  # up to the floor of submitted probabilities, intervals included
    assert np.allclose([pair['competition'][k][0] for k in ('score', 'spinal', 'any_severe')], [whole['competition']['model'][k] for k in ('score', 'spinal', 'any_severe')], atol=1e-3)
    for args, why in ((dict(submission='s.csv'), '--submission needs --train_csv'), (dict(submission='s.csv', run_dir='r'), 'one at a time'),
                      (dict(submission='s.csv', train_csv='t.csv', truth_csv='u.csv'), '--truth_csv goes with --run_dir'), (dict(submission='s.csv', train_csv='none.csv'), 'no such file')):
        with pytest.raises(SystemExit, match='mscan_evaluate: ') as stopped: mscan_evaluate(**args)
        assert why in stopped.value.code and '\n' not in stopped.value.code


def test_pictures_of_a_run_are_the_crops_that_were_graded(tmp_path):
    "From the pixel cache, through the tables, the same crops as straight from the study."
    from mscan.crops import Pictures, find_centres, study_crops
    from mscan.geometry import plane_of
    from mscan.images import Preprocess, normalise
    from mscan.phantom import lesson_study
    from mscan.prepare import slice_rows
    from mscan.projection import choose_slices
    lesson, prepare = lesson_study(seed=5), Preprocess(mm_per_px=.9)
    study, offset, rows = lesson.study, 0, []
    study.series = [normalise(s) for s in study.series]
    for s in study.series:
        rows.append(slice_rows(s, offset))
        offset += int(s.shape.prod(1).sum())
    xyz = lesson.truth[lesson.truth.condition == CANAL].set_index('level').loc[list(LEVELS), ['x_mm', 'y_mm', 'z_mm']].to_numpy()
    centres, t2 = find_centres(None, study, choose_slices(study.of('axial_t2'), xyz), xyz, Pictures(study, prepare)), study.of('sagittal_t2')[0]
    centres.loc[(centres.level == 'l2_l3') & (centres['rank'] == 2), 'used'] = False
    middle = plane_of(t2, len(t2) // 2).to_pixel(xyz)
    boxes = pd.DataFrame({'study_id': study.study_id, 'series_id': t2.series_id, 'slice_i': len(t2) // 2, 'level': LEVELS, 'x_px': middle[:, 0], 'y_px': middle[:, 1]})
    pretend(tmp_path, '10_prepare', slices=pd.concat(rows), **{n: pd.DataFrame({'study_id': [study.study_id]}) for n in ('studies', 'series', 'labels', 'points', 'prior')})
    (tmp_path/'10_prepare/cache').mkdir()
    np.save(tmp_path/f'10_prepare/cache/{study.study_id}.npy', np.concatenate([p.ravel() for s in study.series for p in s.pixels]))
    (tmp_path/'10_prepare/quality.json').write_text(json.dumps({'notes': [], 'studies': []}))
    pretend(tmp_path, '30_crops', axial_points=centres.assign(study_id=study.study_id))
    card = dict.fromkeys((*mscan.training.CARD_KEYS, 'sha256'), '') | {'preprocessing': prepare.to_dict()}
    (tmp_path/'30_crops/axial_point.json').write_text(json.dumps(card))
    manifest = tmp_path/'30_crops/manifest.json'
    record = json.loads(manifest.read_text())
    record['products']['axial_point.json'] = {'path': 'axial_point.json', 'bytes': 0, 'sha256': ''}
    manifest.write_text(json.dumps(record))
    with pytest.raises(RunError, match='40_levels has not run'): run_pictures(finished(tmp_path))
    pretend(tmp_path, '40_levels', boxes=boxes[boxes.level != 'l5_s1'])
    pictures, direct = run_pictures(finished(tmp_path), 64), study_crops(Pictures(study, prepare), boxes, centres, 64)
    for j, level in enumerate(LEVELS):
        sagittal, *axial = pictures(study.study_id, SimpleNamespace(level=level))
        assert (sagittal is None) if level == 'l5_s1' else np.array_equal(sagittal, direct.sagittal[j])
        for k, image in enumerate(axial): assert np.array_equal(image, direct.axial[0, j, k]) if direct.axial_mask[0, j, k] else image is None
    assert pictures(study.study_id, SimpleNamespace(level='l2_l3'))[3] is None and direct.axial_mask[0, 1, 1]


def test_gain_over_the_prior_is_paired():
    ids = [str(i) for i in range(30)]
    labels, answers = model(ids)
    prior = prior_table(labels)
    table, parts = against_constants(labels, answers, prior, draws=100)
    gain = parts['difference']
    assert np.isclose(gain['score'].value, table.score['model'] - table.score['prior']) and np.isclose(gain['spinal'].value, table.spinal['model'] - table.spinal['prior'])
    assert gain['spinal'].high < 0
    _, worse = against_constants(labels, model(ids, seed=9)[1], prior, draws=100)  # another model's answers: confident and wrong
    assert worse['difference']['spinal'].low > 0


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
    assert all(word in done.stdout for word in ('level shift 0 of 10', 'wce', 'uniform', 'model - prior, spinal', '20_keypoints 3', 'together 24'))
    assert json.loads((run.dir/'report.json').read_text())['localisation']['levels'] == 50
    for args, said in (({}, '--run_dir is needed'), (dict(run_dir=run.dir/'none'), '10_prepare has not run'), (dict(run_dir=run.dir, train_csv='none.csv'), 'no such file'),
                       (dict(run_dir=run.dir, truth_csv='none.csv'), 'no such file'), (dict(run_dir=run.dir, truth_csv=run.labels_csv), 'lacks the columns')):
        with pytest.raises(SystemExit, match='mscan_evaluate: ') as stopped: mscan_evaluate(**args) if args else mscan_evaluate(run_dir=None)
        assert said in stopped.value.code and '\n' not in stopped.value.code


@pytest.mark.parametrize('variants', [False, True])
def test_the_run_cells_of_the_notebook(variants, request, monkeypatch):
    "The notebook's third part, cell by cell, on the made-up run."
    run = request.getfixturevalue('with_variants' if variants else 'run')
    matplotlib = pytest.importorskip('matplotlib')
    monkeypatch.setattr(matplotlib, 'rcParams', matplotlib.rcParams.copy())
    matplotlib.use('Agg')
    import mscan.evaluate
    cells = json.loads((Path(mscan.evaluate.__file__).parents[1]/'nbs/50_evaluate.ipynb').read_text())['cells']
    cells = [''.join(c['source']) for c in cells if c['cell_type'] == 'code' and re.match(r'#\| eval: false', ''.join(c['source']))]
    assert 2 < len(cells) <= 11 and not any(re.search(r'^(def|class) ', c, re.M) for c in cells)
    names, asked = dict(vars(mscan.evaluate)), []
    names['run_pictures'] = lambda manifests: lambda study_id, row: asked.append((study_id, row.level)) or [np.zeros((8, 8), np.uint8), None]  # a made-up run has no pixels
    for i, cell in enumerate(cells):
        exec(cell, names)
        if i == 0: names |= {'run_dir': str(run.dir), 'draws': 20}
    manifest = json.loads((run.dir/'50_evaluate/manifest.json').read_text())
    assert set(manifest['inputs']) | {'45_variants'} == {*STAGES[:STAGES.index('50_evaluate')], '45_variants'} and ('45_variants' in manifest['inputs']) == variants
    assert manifest['metrics']['localisation']['levels'] == 100 and len(set(asked)) == 8
    assert {'report', 'figures', 'metrics', 'graded_rows', 'worst', 'axial_point_canal'} <= set(manifest['products']) and (run.dir/'50_evaluate/figures.png').stat().st_size > 10_000
    assert ({'variants', 'probes', 'variants_md', 'forest'} <= set(manifest['products'])) == variants
    if variants: assert '| M-SCAN | predicted | 20 (100) | 1 |' in (run.dir/'50_evaluate/variants.md').read_text() and len(pd.read_csv(run.dir/'50_evaluate/variants.csv')) == 2
