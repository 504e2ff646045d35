"The score against numbers worked out by hand, against the published constants, and against scikit-learn."
import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from mscan.metrics import (CLIP, FLOOR, METRICS, Interval, auroc, average_precision, bootstrap_interval, floor_probabilities, grade_metrics,
                           p_risk, paired_bootstrap, prior_rows, prior_table, quadratic_kappa, score, score_of, sensitivity_at,
                           study_losses, threshold_counts, uniform_rows, weighted_log_loss)
from mscan.rsna import CONDITIONS, LEVELS, PROBS, TableError, row_ids

LOG = np.log
# Counts N / M / S of train.csv per condition and level; the rest of 1,975 studies is missing (shared/design/rsna-2024.md, section 3)
COUNTS = {
    'spinal_canal_stenosis': [(1886, 67, 21), (1770, 151, 53), (1622, 230, 122), (1482, 237, 255), (1904, 51, 19)],
    'left_neural_foraminal_narrowing': [(1908, 63, 2), (1791, 171, 11), (1522, 411, 40), (1204, 629, 140), (1247, 520, 206)],
    'right_neural_foraminal_narrowing': [(1891, 63, 13), (1793, 168, 6), (1512, 414, 41), (1208, 629, 130), (1281, 496, 190)],
    'left_subarticular_stenosis': [(1690, 93, 28), (1555, 255, 83), (1324, 454, 194), (887, 624, 461), (1408, 409, 147)],
    'right_subarticular_stenosis': [(1680, 110, 24), (1577, 243, 73), (1322, 454, 197), (891, 622, 460), (1399, 396, 173)]}
STUDIES, GRADED, SEVERE, MODERATE = 1975, 1974, 365, 711  # studies; with canal grades; worst is Severe; Moderate or worse


def labels_of(grades, others=0):
    "Labels of studies whose five canal grades are given; the other 20 cells are `others` (None = missing)."
    rows = [(s, c, l, g[i] if c == CONDITIONS[0] else others) for s, g in grades.items() for c in CONDITIONS for i, l in enumerate(LEVELS)]
    frame = pd.DataFrame(rows, columns=['study_id', 'condition', 'level', 'grade'])
    return frame.astype({'study_id': 'str', 'condition': 'str', 'level': 'str'}).assign(grade=pd.array([r[3] for r in rows], dtype='Int8'))


def answer(studies, p): return pd.DataFrame({'row_id': row_ids(studies), **dict(zip(PROBS, p))})


def perfect(labels):
    frame = pd.DataFrame(np.eye(3)[labels.grade.fillna(0).astype(int)], columns=list(PROBS))
    return frame.assign(row_id=labels.study_id + '_' + labels.condition + '_' + labels.level)


def published_table():
    "1,975 studies with the published counts of every cell, and of the worst canal grade."
    grade = np.full((STUDIES, 25), np.nan)
    for c, condition in enumerate(CONDITIONS[1:], 1):
        for l, n in enumerate(COUNTS[condition]): grade[:sum(n), 5 * c + l] = np.repeat([0, 1, 2], n)
    canal = np.zeros((GRADED, 5))
    severe, moderate = np.arange(SEVERE), np.arange(SEVERE, MODERATE)  # which studies have which worst grade
    turn = 0
    for l, (_, _, n) in enumerate(COUNTS[CONDITIONS[0]]):  # round robin over the severe studies: 470 places cover 365
        canal[severe[(turn + np.arange(n)) % SEVERE], l] = 2
        turn += n
    turn = 0
    for l, (_, n, _) in enumerate(COUNTS[CONDITIONS[0]]):
        canal[moderate[(turn + np.arange(n)) % len(moderate)], l] = 1
        turn += n
    grade[:GRADED, :5] = canal  # the last study has no canal grade at all
    rows = pd.MultiIndex.from_product([[str(i) for i in range(STUDIES)], CONDITIONS, LEVELS], names=['study_id', 'condition', 'level'])
    return rows.to_frame(index=False).astype('str').assign(grade=pd.array(grade.ravel(), dtype='Float64').astype('Int8'))


@pytest.fixture(scope='module')
def train(): return published_table()


def test_the_synthetic_table_has_the_published_counts(train):
    count = train.dropna().groupby(['condition', 'level', 'grade']).size().unstack(fill_value=0)
    assert all(tuple(count.loc[(c, l)]) == COUNTS[c][i] for c in CONDITIONS for i, l in enumerate(LEVELS))
    worst = train[train.condition == CONDITIONS[0]].dropna().groupby('study_id').grade.max()
    assert len(worst) == GRADED and (worst == 2).sum() == SEVERE and (worst >= 1).sum() == MODERATE
    assert train.grade.notna().sum() == 48803


def pooled(labels, weighted):
    "The prior per condition, sides and levels pooled."
    part = labels.condition.str.replace('left_|right_', '', regex=True)
    count = labels.groupby([part, 'grade']).size().unstack() * np.array((1, 2, 4) if weighted else (1, 1, 1))
    p = count.div(count.sum(axis=1), axis=0)
    return pd.DataFrame([(c, l, *p.loc[c.replace('left_', '').replace('right_', '')]) for c in CONDITIONS for l in LEVELS], columns=['condition', 'level', *PROBS])


@pytest.mark.parametrize('name, expected', [
    ('uniform', (1.09861, 1.09861, 1.09861, .70180, .999410)),
    ('frequency', (.88833, 1.01861, 1.19817, 1.32954, 1.108663)),
    ('frequency by level', (.80184, .89006, 1.07675, .95414, .930697)),
    ('weighted', (.78326, .91890, 1.05071, .89045, .910831)),
    ('weighted by level', (.70625, .80371, .95084, .69804, .789711)),
])
def test_constants_of_the_public_table(train, name, expected):
    studies = train.study_id.unique()
    graded = train.dropna()
    frame = {'uniform': lambda: uniform_rows(studies),
             'frequency': lambda: prior_rows(pooled(graded, False), studies),
             'frequency by level': lambda: prior_rows(prior_table(train, smoothing=0, weighted=False), studies),
             'weighted': lambda: prior_rows(pooled(graded, True), studies),
             'weighted by level': lambda: prior_rows(prior_table(train, smoothing=0), studies)}[name]()
    found = score(train, frame)
    assert np.allclose([found[k] for k in ('spinal', 'foraminal', 'subarticular', 'any_severe')], expected[:4], atol=6e-6)
    assert np.isclose(found['score'], expected[4], atol=6e-7)


def test_uniform_by_hand():
    labels = labels_of({'1': [0, 0, 0, 0, 0], '2': [0, 1, 2, 0, 0], '3': [0, 0, 1, 0, 0]})
    found = score(labels, uniform_rows(['1', '2', '3']))
    any_severe = (1 * LOG(3 / 2) + 4 * LOG(3) + 2 * LOG(3 / 2)) / 7
    assert np.allclose([found[k] for k in ('spinal', 'foraminal', 'subarticular')], LOG(3)) and np.isclose(found['any_severe'], any_severe)
    assert np.isclose(found['score'], (3 * LOG(3) + any_severe) / 4)


def test_perfect_is_zero_and_all_wrong_is_the_clip():
    labels = labels_of({'1': [0, 0, 0, 0, 0], '2': [0, 1, 2, 0, 0]})
    assert 0 <= score(labels, perfect(labels))['score'] < 1e-15
    wrong = perfect(labels).assign(normal_mild=0., moderate=0., severe=1.)
    wrong.loc[labels.grade == 2, list(PROBS)] = [1., 0., 0.]
    found = score(labels, wrong)
    assert all(np.isclose(found[k], 36.0436534) for k in ('spinal', 'foraminal', 'subarticular')) and np.isfinite(found['score'])
    assert np.isclose(-LOG(CLIP), 36.0436534)


def test_prior_by_hand():
    labels = labels_of({'1': [0, 0, 0, 0, 0], '2': [2, 0, 0, 0, 0], '3': [1, 0, 0, 0, 0]})
    prior = prior_table(labels).set_index(['condition', 'level'])
    first = np.array([1.5, 3, 6]) / 10.5  # (1, 1, 1) + .5, times 1, 2, 4
    plain = np.array([3.5, 1, 2]) / 6.5  # (3, 0, 0) + .5, times 1, 2, 4
    assert np.allclose(prior.loc[(CONDITIONS[0], 'l1_l2')], first)
    assert np.allclose(prior.drop(index=(CONDITIONS[0], 'l1_l2')), plain)
    found = score(labels, prior_rows(prior_table(labels), ['1', '2', '3']))
    spinal = (1 * -LOG(first[0]) + 2 * -LOG(first[1]) + 4 * -LOG(first[2]) + 12 * -LOG(plain[0])) / 19
    top = max(first[2], plain[2])
    assert np.isclose(found['spinal'], spinal) and np.isclose(found['foraminal'], -LOG(plain[0])) and np.isclose(found['subarticular'], -LOG(plain[0]))
    assert np.isclose(found['any_severe'], (3 * -LOG(1 - top) + 4 * -LOG(top)) / 7)


def test_a_moderate_only_study_weighs_two_with_label_zero():
    labels = labels_of({'1': [0, 0, 1, 0, 0], '2': [0, 2, 1, 0, 0]})
    frame = answer(['1', '2'], (.7, .2, .1))
    frame.loc[frame.row_id == '1_spinal_canal_stenosis_l5_s1', list(PROBS)] = [.5, .2, .3]  # the largest severe of study 1
    found = score(labels, frame)
    assert np.isclose(found['any_severe'], (2 * -LOG(1 - .3) + 4 * -LOG(.1)) / 6)
    spinal = (3 * -LOG(.7) + 1 * -LOG(.5) + 2 * -LOG(.2) + 3 * -LOG(.7) + 2 * -LOG(.2) + 4 * -LOG(.1)) / 15
    assert np.isclose(found['spinal'], spinal)


@pytest.mark.parametrize('grade', [0, 1, 2])
def test_one_class_alone_gives_a_finite_value(grade):
    labels = labels_of({'1': [grade] * 5, '2': [grade] * 5}, others=grade)
    found = score(labels, answer(['1', '2'], (.5, .3, .2)))
    p = (.5, .3, .2)[grade]
    assert np.isclose(found['spinal'], -LOG(p)) and np.isclose(found['any_severe'], -LOG(.2) if grade == 2 else -LOG(.8)) and np.isfinite(found['score'])


def test_ungraded_cells_are_not_scored_and_not_seen_by_any_severe():
    labels = labels_of({'1': [0, None, 0, 0, 0], '2': [None] * 5})
    frame = answer(['1', '2'], (.9, .06, .04))
    before = score(labels, frame)
    frame.loc[frame.row_id == '1_spinal_canal_stenosis_l2_l3', list(PROBS)] = [0, 0, 1]
    frame.loc[frame.row_id.str.startswith('2_spinal'), list(PROBS)] = [0, 1, 0]
    assert score(labels, frame) == before and np.isclose(before['any_severe'], -LOG(.96))


def test_row_order_does_not_matter():
    rng = np.random.default_rng(0)
    labels = labels_of({str(i): rng.integers(0, 3, 5) for i in range(6)}, others=1)
    frame = uniform_rows(labels.study_id.unique())
    frame[list(PROBS)] = rng.dirichlet((1, 1, 1), len(frame))
    shuffled = score(labels.sample(frac=1, random_state=1), frame.sample(frac=1, random_state=2))
    assert np.allclose(list(shuffled.values()), list(score(labels, frame).values()), atol=1e-12)


def test_against_scikit_learn(train):
    rng = np.random.default_rng(1)
    labels = train[train.study_id.isin([str(i) for i in range(0, 1975, 20)])].reset_index(drop=True)
    frame = prior_rows(prior_table(train), labels.study_id.unique())
    frame[list(PROBS)] = rng.dirichlet((2, 1, 1), len(frame))
    found = score(labels, frame)
    rows = labels.dropna().merge(frame, on=['study_id', 'condition', 'level'])
    w = rows.grade.map({0: 1, 1: 2, 2: 4}).astype(float)
    for part, word in (('spinal', 'spinal'), ('foraminal', 'foraminal'), ('subarticular', 'subarticular')):
        mine = rows.condition.str.contains(word)
        expected = sk.log_loss(rows.grade[mine].astype(int), rows.loc[mine, list(PROBS)], sample_weight=w[mine], labels=[0, 1, 2])
        assert np.isclose(found[part], expected, atol=1e-12)
    canal = rows.assign(w=w)[rows.condition == CONDITIONS[0]].groupby('study_id').agg(grade=('grade', 'max'), severe=('severe', 'max'), w=('w', 'max'))
    assert np.isclose(found['any_severe'], sk.log_loss(canal.grade == 2, canal.severe, sample_weight=canal.w, labels=[False, True]), atol=1e-12)


def test_per_study_sums_give_the_score_of_any_draw():
    rng = np.random.default_rng(2)
    labels = labels_of({str(i): rng.integers(0, 3, 5) for i in range(8)}, others=1)
    frame = uniform_rows(labels.study_id.unique())
    frame[list(PROBS)] = rng.dirichlet((1, 1, 1), len(frame))
    losses, drawn = study_losses(labels, frame), rng.integers(0, 8, 8)
    parts = [labels[labels.study_id == str(s)].assign(study_id=f'{k}x{s}') for k, s in enumerate(drawn)]
    rows = [frame[frame.study_id == str(s)].assign(row_id=lambda f, k=k: f'{k}x' + f.row_id) for k, s in enumerate(drawn)]
    direct = score(pd.concat(parts, ignore_index=True), pd.concat(rows, ignore_index=True))
    assert np.allclose(list(score_of(losses.iloc[drawn]).values()), list(direct.values()))


def test_refuses_what_cannot_be_scored():
    labels = labels_of({'1': [0] * 5, '2': [1] * 5})
    good = uniform_rows(['1', '2'])
    for bad, said in ((good.iloc[:-1], 'lacks 1 of 50 rows, the first: 2_spinal_canal_stenosis_l5_s1'), (good[good.study_id == '1'], 'lacks 25'),
                      (pd.concat([good, good.iloc[:1]]), 'twice'), (uniform_rows(['1', '2', '3']), '25 rows of studies without grades'),
                      (good.assign(severe=.5), 'do not sum to 1'), (good.assign(severe=np.nan), 'not finite'),
                      (good.assign(normal_mild=1.1, moderate=-.1, severe=0), r'outside \[0, 1\]')):
        with pytest.raises(TableError, match=said): score(labels, bad)
    unlabelled = labels_of({'1': [0, 0, 0, 0, None]})
    hole = uniform_rows(['1'])
    hole.loc[24, 'severe'] = np.nan  # an ungraded cell, and yet it must be finite
    with pytest.raises(TableError, match='finite'): score(unlabelled, hole)


def test_a_part_without_grades_is_nan_not_zero():
    found = score(labels_of({'1': [0] * 5}, others=None), uniform_rows(['1']))
    assert np.isclose(found['spinal'], LOG(3)) and np.isnan(found['foraminal']) and np.isnan(found['score'])


def test_weighted_log_loss_masks_every_way_of_missing():
    p = np.array([[.5, .3, .2]] * 5)
    for missing in (None, np.nan, -1, pd.NA): assert np.isclose(weighted_log_loss(p, [0, 2, missing, missing, 1]), (-LOG(.5) - 4 * LOG(.2) - 2 * LOG(.3)) / 7)
    assert np.isclose(weighted_log_loss(p[:2], pd.array([0, pd.NA], dtype='Int8')), -LOG(.5))
    assert np.isnan(weighted_log_loss(p, [None] * 5))


def test_floor():
    rng = np.random.default_rng(3)
    p = rng.dirichlet((.05, .05, .05), 2000)
    raised = floor_probabilities(p)
    assert np.allclose(raised.sum(1), 1, atol=1e-12) and (raised >= FLOOR).all() and np.abs(raised - p).max() < 3 * FLOOR
    assert np.allclose(floor_probabilities([1, 0, 0]), [1 - 2 * FLOOR, FLOOR, FLOOR], atol=1e-15)
    assert np.allclose(floor_probabilities([2, 1, 1]), [.5, .25, .25])
    assert (floor_probabilities([[1 - 1e-4 - 1e-8, 1e-4 + 1e-8, 0]]) >= FLOOR).all()


def test_prior_table_of_nothing_is_still_a_prior():
    empty = labels_of({'1': [None] * 5}, others=None)
    assert np.allclose(prior_table(empty)[list(PROBS)], np.array([1, 2, 4]) / 7) and len(prior_table(empty)) == 25
    assert np.allclose(prior_table(empty, smoothing=0, weighted=False)[list(PROBS)], 1 / 3)
    with pytest.raises(TableError): prior_rows(prior_table(empty).iloc[:24], ['1'])


@pytest.mark.parametrize('seed', range(5))
def test_metrics_against_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    g = rng.integers(0, 3, 80)
    p = np.round(rng.dirichlet((1, 1, 1), 80) * .6 + .4 * np.eye(3)[g] * rng.random((80, 1)), 1) + .05
    p /= p.sum(1, keepdims=True)
    found = grade_metrics(p, g)
    assert np.isclose(found['auroc'], sk.roc_auc_score(g, p, multi_class='ovr')) and np.isclose(found['binary_auroc'], sk.roc_auc_score(g > 0, -p[:, 0]))
    assert np.isclose(found['kappa'], sk.cohen_kappa_score(g, p.argmax(1), weights='quadratic')) and np.isclose(found['accuracy'], sk.accuracy_score(g, p.argmax(1)))
    assert np.isclose(found['wce'], sk.log_loss(g, p, sample_weight=np.take((1, 2, 4), g))) and found['n'] == 80
    assert np.isclose(found['severe_ap'], sk.average_precision_score(g == 2, p[:, 2]))
    for key, rating, positive in (('binary_sens90', -p[:, 0], g > 0), ('severe_sens90', p[:, 2], g == 2)):
        away, hit, _ = sk.roc_curve(positive, rating, drop_intermediate=False)
        assert np.isclose(found[key], hit[away <= .1 + 1e-12].max())


def test_metrics_where_they_are_undefined():
    p = np.array([[.8, .1, .1], [.2, .7, .1], [.6, .3, .1]])
    found = grade_metrics(p, [0, 1, 0])
    assert np.isnan(found['auroc']) and found['binary_auroc'] == 1 and found['accuracy'] == 1 and found['n'] == 3
    assert np.isnan(grade_metrics(p, [0, 1, 0], min_cases=2)['binary_auroc'])
    assert np.isnan(quadratic_kappa([0, 0], [0, 0])) and quadratic_kappa([0, 1, 2], [0, 1, 2]) == 1
    assert grade_metrics(p, [None] * 3)['n'] == 0 and np.isnan(auroc([1, 2], [True, True]))


def test_average_precision_and_sensitivity_by_hand():
    sick = np.array([True, False, True, False, False])
    assert np.isclose(average_precision([5, 4, 3, 2, 1], sick), (1 + 2 / 3) / 2)  # precision 1 at the first, 2/3 at the second
    assert np.isclose(average_precision([5, 3, 3, 2, 1], sick), (1 + 2 / 3) / 2)  # the tie is one step: 2 of 3
    assert np.isclose(average_precision([1, 1, 1, 1, 1], sick), 2 / 5) and average_precision([5, 1, 4, 2, 3], sick) == 1  # chance; perfect
    assert np.array_equal(threshold_counts([5, 3, 3, 2, 1], sick), [[1, 2, 2, 2], [0, 1, 2, 3]])
    assert sensitivity_at([5, 4, 3, 2, 1], sick, 1.) == .5 and sensitivity_at([5, 4, 3, 2, 1], sick, 2 / 3) == 1 and sensitivity_at([5, 4, 3, 2, 1], sick, .7) == .5
    assert sensitivity_at([5, 5, 3, 2, 1], sick, .9) == 0  # the only threshold above the other positive calls a negative too
    assert sensitivity_at(np.arange(20.), np.arange(20) >= 10) == 1
    many = np.arange(20) % 2 == 0  # ten positives, ten negatives, in turn, from the top a negative: one false call buys one right call ...
    assert np.isclose(sensitivity_at(np.arange(20.), many), .1) and np.isclose(sensitivity_at(np.arange(20.), many, .8), .2)


def test_no_figure_without_both_classes():
    for figure in (average_precision, sensitivity_at):
        for positive in ([True] * 3, [False] * 3, []): assert np.isnan(figure([.1, .2, .3][:len(positive)], positive))
        assert np.isnan(figure([.1, .2, .3], [True, False, False], min_cases=2)) and np.isfinite(figure([.1, .2, .3], [True, False, False]))
    p = np.array([[.8, .1, .1], [.2, .7, .1], [.6, .3, .1]])
    found = grade_metrics(p, [0, 1, 0])  # nobody is Severe
    assert np.isnan(found['severe_ap']) and np.isnan(found['severe_sens90']) and found['binary_sens90'] == 1
    assert tuple(found) == (*METRICS, 'n') == tuple(grade_metrics(p, [None] * 3)) and all(np.isnan(grade_metrics(p, [None] * 3)[m]) for m in METRICS)


def test_new_figures_read_p_risk():
    p = np.array([[.3, .3, .4], [.5, .1, .4], [.1, .8, .1]])
    risk = np.array([[.2, .2, .6], [.9, .05, .05], [.5, .4, .1]])
    found = grade_metrics(p, [2, 0, 1], risk)
    assert found['severe_ap'] == 1 and found['severe_sens90'] == 1 and found['binary_sens90'] == 1
    assert grade_metrics(p, [2, 0, 1])['severe_ap'] == .5  # p alone ties the first two
    assert np.allclose(p_risk(np.full((2, 3), 1 / 3)), np.array([4, 2, 1]) / 7)


def test_risk_decides_the_grade_and_score_the_loss():
    p = np.array([[.2, .3, .5]])
    risk = p / (1, 2, 4) / (p / (1, 2, 4)).sum()
    found = grade_metrics(p, [0], risk=risk)
    assert found['accuracy'] == 1 and np.isclose(found['wce'], -LOG(.2)) and grade_metrics(p, [0])['accuracy'] == 0


def test_bootstrap_draws_whole_studies():
    study = np.repeat(['a', 'b', 'c'], (1, 4, 2))
    seen = []
    bootstrap_interval(lambda rows: seen.append(np.sort(rows)) or 0., study, 200)
    assert all(tuple(np.unique(np.bincount(r, minlength=7)[np.flatnonzero(study == s)])) for r in seen for s in 'abc')
    assert all(len(np.unique(np.bincount(r, minlength=7)[study == s])) == 1 for r in seen for s in 'abc')
    assert {len(r) for r in seen} > {3, 12}  # a three times, b three times


def test_bootstrap_is_seeded_and_covers():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        x = rng.normal(0, 1, 40)
        interval = bootstrap_interval(lambda rows, x=x: x[rows].mean(), np.arange(40), 200)
        assert interval.value == pytest.approx(x.mean()) and interval.low < interval.value < interval.high
        hits += interval.low <= 0 <= interval.high
    assert 51 <= hits  # 95 % nominal; 51 of 60 is four standard errors off
    again = bootstrap_interval(lambda rows, x=x: x[rows].mean(), np.arange(40), 200)
    assert again == interval and again != bootstrap_interval(lambda rows, x=x: x[rows].mean(), np.arange(40), 200, seed=1)
    assert f'{Interval(.5, .25, .75):.2f}' == '0.50 (0.25 to 0.75)'


def test_paired_bootstrap_of_a_constant_gain_has_no_width():
    x = np.random.default_rng(0).normal(0, 5, 50)
    gain = paired_bootstrap(lambda rows: x[rows].mean() - .1, lambda rows: x[rows].mean(), np.arange(50), 200)
    assert np.allclose(gain, -.1)
    undefined = bootstrap_interval(lambda rows: np.nan, np.arange(5), 20)
    assert np.isnan(undefined.low) and np.isnan(undefined.high)
