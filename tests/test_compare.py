"Variants side by side, ensembles, and pairs of files: each property breaks if the pairing, the average or the reading is wrong."
import numpy as np
import pandas as pd
import pytest

from mscan.compare import (HEAD_1, HEAD_2, KEYS, OTHERS_2, PAIRED, PAPER_1, compare_variants, draw_forest, draw_precision_recall, draw_worst, evaluate_pair,
                           graded_rows, interval_text, mean_predictions, pair_lines, paper_tables, probe_table, read_pair, tables_lines, tables_markdown, to_submission, worst_rows)
from mscan.metrics import FLOOR, METRICS, RISKS, average_precision, grade_metrics, p_risk, prior_rows, prior_table, score, weighted_log_loss
from mscan.rsna import CONDITIONS, LEVELS, PROBS, TableError, row_ids, write_submission, write_train

CANAL = CONDITIONS[0]
IDS = [str(100 + i) for i in range(30)]


@pytest.fixture(scope='module')
def labels():
    rng = np.random.default_rng(0)
    table = pd.DataFrame([(s, CANAL, l) for s in IDS for l in LEVELS], columns=KEYS).astype('str')
    grade = pd.array(rng.choice(3, len(table), p=(.6, .2, .2)), dtype='Int8')
    grade[[3, 77]] = pd.NA
    return table.assign(grade=grade)


def answers(labels, noise, seed, keep=slice(None)):
    "A model that sees the grade through noise; its p_score has the odds times 1, 2, 4."
    rng, share = np.random.default_rng(seed), np.array([.6, .2, .2])
    seen = labels.grade.fillna(0).to_numpy(float) + rng.normal(0, noise, len(labels))
    risk = share * np.exp(-.5 * ((seen[:, None] - np.arange(3)) / noise) ** 2) + 1e-4
    risk /= risk.sum(1, keepdims=True)
    p = risk * (1, 2, 4) / (risk * (1, 2, 4)).sum(1, keepdims=True)
    return labels[KEYS].assign(**dict(zip(PROBS, p.T, strict=True)), **dict(zip(RISKS, risk.T, strict=True)))[keep]


def variant(table, name, seed=0, points='predicted'): return table.assign(variant=name, seed=seed, points=points, part='test')


@pytest.fixture(scope='module')
def variants(labels):
    tables = [variant(answers(labels, noise, 10 * s + k), name, s) for k, (name, noise) in enumerate({'sagittal_gru': .9, 'mscan': .6, 'better': .45}.items()) for s in (0, 1, 2)]
    return pd.concat([*tables, variant(answers(labels, .6, 1), 'mscan', 0, 'labels')], ignore_index=True)


@pytest.fixture(scope='module')
def table(variants, labels): return compare_variants(variants, labels, draws=200)


def test_order_and_counts_are_as_given(table):
    assert list(zip(table.variant, table.points, strict=True)) == [('sagittal_gru', 'predicted'), ('mscan', 'predicted'), ('better', 'predicted'), ('mscan', 'labels')]
    assert table.seeds.tolist() == [3, 3, 3, 1] and (table.studies == 30).all() and (table.n == 148).all()


def test_figures_are_means_over_seeds(variants, labels, table):
    per_seed = []
    for seed in (0, 1, 2):
        t = variants[(variants.variant == 'better') & (variants.seed == seed)].merge(labels.dropna(), on=KEYS)
        per_seed.append(grade_metrics(t[list(PROBS)], t.grade, t[list(RISKS)]))
    row = table.set_index('variant').loc['better']
    for m in METRICS:
        each = [f[m] for f in per_seed]
        assert np.isclose(row[m], np.mean(each)) and np.isclose(row[f'{m}_sd'], np.std(each, ddof=1)) and row[f'{m}_low'] <= row[m] <= row[f'{m}_high']
    assert table[table.points == 'labels'].wce_sd.isna().all()


def test_a_variant_against_itself_is_exactly_nothing(variants, labels, table):
    own = table[table.variant == 'mscan']
    for m in PAIRED: assert (own[[f'{m}_diff', f'{m}_diff_low', f'{m}_diff_high']] == 0).all(axis=None)
    twin = pd.concat([variants, variants[(variants.variant == 'mscan') & (variants.points == 'predicted')].sample(frac=1, random_state=0).assign(variant='twin')])
    twin = compare_variants(twin, labels, draws=50).set_index('variant').loc['twin']  # in another order of rows
    assert all(abs(twin[f'{m}_diff{end}']) < 1e-12 for m in PAIRED for end in ('', '_low', '_high'))


def test_better_is_negative_in_loss_and_positive_in_area(table):
    t = table[table.points == 'predicted'].set_index('variant')
    assert t.wce_diff_high['better'] < 0 < t.wce_diff_low['sagittal_gru'] and t.binary_auroc_diff['better'] > 0 > t.binary_auroc_diff['sagittal_gru']
    assert all(np.isclose(t.wce_diff[v], t.wce[v] - t.wce['mscan']) for v in t.index)


def test_differences_are_paired(labels):
    "A constant loss above the reference on every row: the difference has no width, though each row alone has plenty."
    base = answers(labels, .8, 5)
    worse = base.copy()
    worse[list(PROBS)] = base[list(PROBS)] * .9  # log .9 on every row; the rest of the probability is nobody's
    both = pd.concat([variant(base, 'mscan'), variant(worse, 'worse')], ignore_index=True)
    row = compare_variants(both, labels, draws=200).set_index('variant').loc['worse']
    assert np.allclose([row.wce_diff, row.wce_diff_low, row.wce_diff_high], -np.log(.9)) and row.wce_high - row.wce_low > .1
    two = pd.concat([variant(base, 'mscan'), variant(base, 'two', 0), variant(worse, 'two', 1)], ignore_index=True)  # on each draw the mean over seeds, half the loss
    row = compare_variants(two, labels, draws=50).set_index('variant').loc['two']
    assert np.allclose([row.wce_diff, row.wce_diff_low, row.wce_diff_high], -np.log(.9) / 2)


def test_other_draws_other_reference(variants, labels, table):
    again, other = compare_variants(variants, labels, draws=200), compare_variants(variants, labels, 'better', draws=50, seed=1)
    pd.testing.assert_frame_equal(again, table)
    assert np.isclose(other.wce_diff[1], -table.wce_diff[2]) and other.wce_low[0] != table.wce_low[0]
    with pytest.raises(TableError, match="no variant 'deepspine' to compare with; there are sagittal_gru, mscan, better"): compare_variants(variants, labels, 'deepspine')
    assert other[other.points == 'labels'].wce_diff.isna().all()  # the reference is not there on label points


def test_rows_that_do_not_fit_are_refused_by_name(variants, labels):
    at = (variants.variant == 'better') & (variants.seed == 1) & (variants.study_id == '117')
    with pytest.raises(TableError, match='variant better, seed 1, on predicted points: lacks 5 of 148 graded rows, the first: 117_spinal_canal_stenosis_l1_l2'):
        compare_variants(variants[~at], labels, draws=5)
    with pytest.raises(TableError, match='the row 117_spinal_canal_stenosis_l1_l2 is there twice'): compare_variants(pd.concat([variants, variants[at]]), labels, draws=5)
    gone = variants[~((variants.study_id == '117') & (variants.level == 'l1_l2'))]  # nobody answers it: on predicted points that is no excuse
    with pytest.raises(TableError, match='lacks 1 of 148'): compare_variants(gone, labels, draws=5)
    with pytest.raises(TableError, match='no variant answers'): compare_variants(variants, labels.assign(grade=pd.NA), draws=5)
    ungraded = variants[~((variants.study_id == '100') & (variants.level == 'l4_l5'))]  # row 3 has no grade, so nobody misses it
    assert (compare_variants(ungraded, labels, draws=5).n == 148).all()


def test_the_cost_of_automation_is_taken_on_the_rows_that_both_have(labels):
    seen, found = answers(labels, .5, 3), answers(labels, .7, 4)
    short = seen[~((seen.study_id == '105') & (seen.level != 'l5_s1')) & (seen.study_id != '120')]
    both = pd.concat([variant(found, 'mscan'), variant(short, 'mscan', points='labels')], ignore_index=True)
    t = compare_variants(both, labels, draws=100).set_index('points')
    grade = labels.merge(short[KEYS], on=KEYS).dropna()
    loss = lambda table: weighted_log_loss(*(lambda m: (m[list(PROBS)], m.grade))(grade.merge(table, on=KEYS)))
    assert t.n['labels'] == len(grade) == 139 and t.n['predicted'] == 148 and np.isclose(t.wce_auto['predicted'], loss(found) - loss(seen))
    assert t.wce_auto_low['predicted'] < t.wce_auto['predicted'] < t.wce_auto_high['predicted'] and np.isnan(t.wce_auto['labels'])
    same = pd.concat([variant(found, 'mscan'), variant(found, 'mscan', points='labels')], ignore_index=True)
    assert compare_variants(same, labels, draws=20)[['wce_auto', 'wce_auto_low', 'wce_auto_high']].iloc[0].eq(0).all()


def test_published_numbers_stand_apart(table):
    tables = paper_tables(table)
    one, two = tables['Table I'].set_index(['Model', 'Points']), tables['Table II'].set_index(['Model', 'Points'])
    assert one[HEAD_1]['M-SCAN', 'predicted'] == '93.80%; 0.282; 0.971' and one[HEAD_1]['CNN (Sagittal only) + GRU', 'predicted'] == '91.37%; 0.336; 0.863'
    assert one[HEAD_1]['M-SCAN', 'labels'] == one[HEAD_1]['better', 'predicted'] == '' and 'real RSNA 2024 data' in HEAD_1 and 'real data' in HEAD_2
    assert two[HEAD_2]['M-SCAN', 'predicted'] == '0.98; 95.60%' and two[HEAD_2]['SpineNetV2', ''] == '-; 93.20%' and two[HEAD_2]['Tumko et al.', ''] == '0.963; -'
    ours = [c for t in tables.values() for c in t if not c.startswith('published')]
    text = ' '.join(str(v) for t in tables.values() for c in ours if c in t for v in t[c])
    assert not any(number in text for number in ('93.80', '0.282', '95.60')) and set(two.loc[[(m, '') for m in OTHERS_2], 'Binary AUROC']) == {''}
    assert set(PAPER_1) == {'sagittal_concat', 'sagittal_gru', 'multiview_gru', 'mscan'}
    note = tables_markdown(tables, 'Twenty phantoms.')
    assert note.startswith('Twenty phantoms.\n\n### Table I\n\n| Model | Points |') and all(line.count('|') == 11 for line in note.split('\n')[4:10] if line)
    assert probe_table(table)['WCE less that as trained, paired'][1] == '+0.000 [+0.000, +0.000]'
    lines = tables_lines(tables)
    assert f'* {HEAD_1}' in lines and max(map(len, lines)) < 260


def test_interval_text():
    row = {'wce': .98149, 'wce_low': .85, 'wce_high': 1.1174, 'wce_diff': -.05, 'wce_diff_low': -.1, 'wce_diff_high': .004, 'accuracy': .7125, 'accuracy_low': np.nan, 'accuracy_high': np.nan,
           'kappa': np.nan, 'kappa_low': np.nan, 'kappa_high': np.nan, 'binary_sens90': .5, 'binary_sens90_low': .25, 'binary_sens90_high': 1.}
    said = [interval_text(row, k) for k in ('wce', 'wce_diff', 'accuracy', 'kappa', 'binary_sens90')]
    assert said == ['0.981 [0.850, 1.117]', '-0.050 [-0.100, +0.004]', '71.2%', '-', '50.0% [25.0, 100.0]']


def test_ensembling(labels):
    one = labels[KEYS].assign(normal_mild=.8, moderate=.15, severe=.05, source='model', fold=1)
    two = labels[KEYS].assign(normal_mild=.2, moderate=.25, severe=.55, source='model', fold=2)
    mean = mean_predictions([one, two.sample(frac=1, random_state=3)])
    assert np.allclose(mean[list(PROBS)], [.5, .2, .3]) and mean[KEYS].equals(one[KEYS]) and 'fold' not in mean and (mean.source == 'model').all()
    mixed = two.assign(**dict(zip(PROBS, np.random.default_rng(0).dirichlet((1, 1, 1), len(two)).T, strict=True)))
    shuffled = mean_predictions([one, mixed.sample(frac=1, random_state=1)])
    assert np.allclose(shuffled[list(PROBS)], (one[list(PROBS)] + mixed[list(PROBS)]) / 2)  # row meets its own row, whatever the order
    assert np.allclose(mean_predictions([one] * 3)[list(PROBS)], one[list(PROBS)]) and list(RISKS)[0] in mean_predictions([answers(labels, .5, 0)] * 2)
    for tables, said in (([one, two.iloc[1:]], 'table 2 lacks 1 rows of table 1, the first: 100_spinal_canal_stenosis_l1_l2'), ([one.iloc[2:], two], 'table 1 lacks 2 rows of table 2'),
                         ([one, pd.concat([two, two.iloc[:1]])], 'table 2 of 2: the row 100_spinal_canal_stenosis_l1_l2 is there twice'), ([], 'no table')):
        with pytest.raises(TableError, match=said): mean_predictions(tables)


def test_submission_form(labels):
    p = answers(labels, .3, 0).sample(frac=1, random_state=0)
    bare = to_submission(p)
    assert list(bare) == ['row_id', *PROBS] and len(bare) == 150 and bare[list(PROBS)].min(axis=None) >= FLOOR and np.allclose(bare[list(PROBS)].sum(axis=1), 1)
    assert bare.row_id.tolist() == [i for i in row_ids(p.study_id.unique()) if CANAL in i]
    kept = bare.set_index('row_id')[list(PROBS)].loc[(p.study_id + '_' + p.condition + '_' + p.level).tolist()].to_numpy()
    assert np.abs(kept - p[list(PROBS)]).max(axis=None) < 3 * FLOOR
    prior = prior_table(labels)
    full = to_submission(p, prior).set_index('row_id')
    assert full.index.tolist() == row_ids(p.study_id.unique()) and np.allclose(full.loc[bare.row_id], bare[list(PROBS)])
    rest = full[~full.index.isin(bare.row_id)]
    assert np.allclose(rest, prior_rows(prior, IDS).set_index('row_id').loc[rest.index, list(PROBS)])
    with pytest.raises(TableError, match='is there twice'): to_submission(pd.concat([p, p.iloc[:1]]))


@pytest.fixture
def pair(labels, tmp_path):
    write_train(labels, tmp_path/'labels.csv')
    write_submission(to_submission(answers(labels, .6, 7), prior_table(labels)), tmp_path/'answers.csv')
    return tmp_path/'labels.csv', tmp_path/'answers.csv'


def test_a_pair_gives_what_the_tables_gave(labels, pair):
    rows, direct = read_pair(*pair), graded_rows(answers(labels, .6, 7), labels)
    joined = direct.merge(rows, on=KEYS, suffixes=('', '_read'))
    assert len(rows) == len(direct) == len(joined) == 148 and (joined.grade == joined.grade_read).all()
    assert np.abs(joined[list(PROBS)].to_numpy() - joined[[f'{c}_read' for c in PROBS]].to_numpy()).max() < 3 * FLOOR
    assert np.abs(joined[list(RISKS)].to_numpy() - joined[[f'{c}_read' for c in RISKS]].to_numpy()).max() < 2e-3  # the weights divided out, as our own p_risk
    found = evaluate_pair(*pair, draws=50)
    assert set(found.report['grading']) == {CANAL} and set(found.report['grading'][CANAL]) == set(METRICS)
    expected = grade_metrics(direct[list(PROBS)], direct.grade, direct[list(RISKS)])
    assert all(np.isclose(found.report['grading'][CANAL][m][0], expected[m], atol=2e-3) for m in METRICS)
    answered = to_submission(answers(labels, .6, 7), prior_table(labels))
    assert np.isclose(found.report['competition']['spinal'][0], score(labels, answered)['spinal']) and np.isclose(found.report['constants']['uniform']['spinal'], np.log(3))
    low, high = found.report['competition']['spinal'][1:]
    assert low < found.report['grading'][CANAL]['wce'][0] < high and any('competition score' in line for line in pair_lines(found.report))


def test_a_pair_of_one_condition_has_no_competition_score(labels, pair):
    write_submission(to_submission(answers(labels, .6, 7)), pair[1])
    report = evaluate_pair(*pair, draws=5).report
    assert 'competition' not in report and 'no competition score' in pair_lines(report)[-1] and CANAL in report['grading']


def test_a_bad_pair_is_refused_by_row(labels, pair):
    good = to_submission(answers(labels, .6, 7), prior_table(labels))
    write_submission(good[good.row_id != '104_spinal_canal_stenosis_l3_l4'], pair[1])
    with pytest.raises(TableError, match='lacks 1 of 148 graded rows, the first: 104_spinal_canal_stenosis_l3_l4'): read_pair(*pair)
    write_submission(good[good.row_id != '100_spinal_canal_stenosis_l4_l5'], pair[1])  # ungraded: not missed
    assert len(read_pair(*pair)) == 148
    write_submission(pd.concat([good, good.iloc[:1].assign(row_id='999_spinal_canal_stenosis_l1_l2')]), pair[1])
    with pytest.raises(TableError, match=r'row 751 \(999_spinal_canal_stenosis_l1_l2\): .* has no such study'): read_pair(*pair)
    write_submission(good, pair[1])
    lines = pair[1].read_text().splitlines()
    for bad, said in ((','.join([lines[2].split(',')[0], '.9', '.9', '.9']), r'row 2 \(.*\): the probabilities do not sum to 1'), (lines[2].split(',')[0] + ',x,.1,.1', 'normal_mild is not a number'),
                      ('elsewhere,.2,.3,.5', "row 2: row_id 'elsewhere' is not"), (lines[1], 'row_id is there twice')):
        pair[1].write_text('\n'.join([*lines[:2], bad, *lines[3:]]) + '\n')
        with pytest.raises(TableError, match=said): read_pair(*pair)
    with pytest.raises(TableError, match='no such file'): read_pair(pair[0], 'none.csv')
    write_submission(good, pair[1])
    pair[0].write_text(pair[0].read_text().replace('Moderate', 'Middling', 1))
    with pytest.raises(TableError, match='unknown grade'): read_pair(*pair)


def test_worst_rows(labels):
    rows = graded_rows(answers(labels, .6, 2), labels)
    rows.loc[5, ['grade', *PROBS]] = [2, .98, .01, .01]
    rows.loc[9, ['grade', *PROBS]] = [0, .005, .005, .99]  # farther off, but Normal/Mild weighs a quarter
    worst = worst_rows(rows.astype({'grade': int}), 20)
    assert worst.index[0] == 5 and np.isclose(worst.loss[5], -4 * np.log(.01)) and worst.loss.is_monotonic_decreasing and len(worst) == 20
    assert 9 not in worst.index or np.isclose(worst.loss[9], -np.log(.005))


def test_figures(labels, table):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    rows = graded_rows(answers(labels, .6, 2), labels)
    fig, axes = plt.subplots(1, 2)
    draw_precision_recall(axes[0], rows), draw_forest(axes[1], table)
    curve = axes[0].lines[0].get_xydata()
    assert np.isclose((np.diff(curve[:, 0]) * curve[1:, 1]).sum(), average_precision(rows[RISKS[2]], rows.grade == 2))  # the area that is drawn is the figure in the legend
    assert [t.get_text() for t in axes[1].get_yticklabels()] == ['sagittal_gru (predicted)', 'mscan (predicted)', 'better (predicted)', 'mscan (labels)']
    assert len(axes[1].texts) == 2  # a difference for each but the reference
    draw_precision_recall(axes[0], rows[rows.grade == 0])  # one class: nothing to draw, no error
    page, asked = plt.figure(), []
    draw_worst(page, worst_rows(rows, 3), lambda study_id, row: asked.append((study_id, row.level)) or [np.zeros((4, 4), np.uint8), None, np.full((4, 4), 255, np.uint8)])
    assert asked == [(r.study_id, r.level) for r in worst_rows(rows, 3).itertuples()]
    assert sum(bool(ax.images) for ax in page.axes) == 6
    plt.close('all')


def test_risk_of_a_pair_is_divided_once(labels, pair):
    rows = read_pair(*pair)
    assert np.allclose(rows[list(RISKS)], p_risk(rows[list(PROBS)])) and np.allclose(rows[list(RISKS)].sum(axis=1), 1)
