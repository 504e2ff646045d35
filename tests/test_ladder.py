"What the graded rows of a level say of the others: counts and answers worked out by hand, symmetry, and what is refused."
import numpy as np
import pandas as pd
import pytest

from mscan.ladder import MIRROR, RUNGS, combine, conditional_counts, conditional_table, from_graded, read_conditional
from mscan.metrics import FLOOR, p_risk, prior_table
from mscan.rsna import CONDITIONS, LEVELS, PROBS, TableError

CANAL, LEFT_F, RIGHT_F, LEFT_R, RIGHT_R = CONDITIONS


@pytest.fixture
def labels():
    "300 studies in which each level's conditions follow one hidden number; some labels missing."
    rng = np.random.default_rng(0)
    rows = pd.DataFrame([(str(i), c, l) for i in range(300) for l in LEVELS for c in CONDITIONS], columns=['study_id', 'condition', 'level'])
    hidden = np.repeat(rng.normal(size=1500), 5)
    grade = np.digitize(hidden + rng.normal(0, .7, len(rows)), (.5, 1.3))
    return rows.assign(grade=pd.array(np.where(rng.random(len(rows)) < .05, np.nan, grade), dtype='Float64').astype('Int8'))


def test_counts_by_hand():
    table = conditional_table(pd.DataFrame([('1', LEFT_F, 'l1_l2', 1), ('1', CANAL, 'l1_l2', 2), ('1', CANAL, 'l5_s1', 0), ('2', RIGHT_F, 'l5_s1', 1), ('2', CANAL, 'l5_s1', 2), ('2', LEFT_F, 'l5_s1', None)],
                                           columns=['study_id', 'condition', 'level', 'grade']), smoothing=1)
    at = table.set_index(['condition', 'source', 'grade', 'source_grade'])
    for foramen in (LEFT_F, RIGHT_F):  # both see both cases: each is the other's mirror image; levels are pooled
        assert at.n[foramen, CANAL, 1, 2] == at.n[CANAL, foramen, 2, 1] == 3 and at.n[foramen, CANAL].sum() == 9 + 2
        assert np.isclose(at.p[foramen, CANAL, 1, 2], 3 / 5) and np.isclose(at.p[foramen, CANAL, 1, 0], 1 / 3)
    assert at.n[LEFT_R, CANAL].sum() == 9 and at.n[LEFT_F, RIGHT_F].sum() == 9  # the left foramen beside the right one has no label
    assert np.allclose(table.groupby(['condition', 'source', 'source_grade']).p.sum(), 1)


def test_a_pair_of_sides_is_not_counted_twice_as_its_own_mirror(labels):
    counts = conditional_counts(conditional_table(labels, smoothing=0.001))
    left, right = CONDITIONS.index(LEFT_F), CONDITIONS.index(RIGHT_F)
    wide = labels.pivot(index=['study_id', 'level'], columns='condition', values='grade')
    both = wide[[LEFT_F, RIGHT_F]].dropna()
    assert np.isclose(counts[left, right].sum(), 2 * len(both), atol=.1) and np.array_equal(counts[left, right], counts[right, left])
    assert np.allclose(counts[left, right], counts[left, right].T) and MIRROR[MIRROR[LEFT_R]] == LEFT_R and MIRROR[CANAL] == CANAL


def test_bayes_by_hand(labels):
    table, prior = conditional_table(labels), prior_table(labels)
    at = prior[prior.level == 'l4_l5'].set_index('condition')[list(PROBS)]
    risk = p_risk(at.loc[list(CONDITIONS)])
    n = conditional_counts(table)[CONDITIONS.index(LEFT_R), 0]
    likelihood = (n / n.sum(1, keepdims=True)) @ (np.array([0, 0, 1]) / risk[0])
    q = risk[3] * likelihood * (1, 2, 4)
    found = from_graded(table, prior, 'l4_l5', {CANAL: [0, 0, 1]})
    assert np.allclose(found[LEFT_R], q / q.sum()) and list(found) == list(CONDITIONS[1:])
    two = combine(conditional_counts(table), risk, {CANAL: np.array([0, 0, 1.]), RIGHT_R: np.array([0, 1., 0])}, LEFT_R)
    m = conditional_counts(table)[3, 4]
    by_hand = risk[3] * (likelihood * ((m / m.sum(1, keepdims=True)) @ (np.array([0, 1, 0]) / risk[4]))) ** .5 ** .5
    assert np.allclose(two, by_hand / by_hand.sum())


def test_mirrored_evidence_gives_the_mirrored_answer(labels):
    table = conditional_table(labels)
    prior = prior_table(labels)
    even = prior.assign(**dict(zip(PROBS, np.tile([.4, .3, .3], (25, 1)).T)))
    p, q = [.1, .2, .7], [.6, .3, .1]
    here, there = (from_graded(table, even, 'l3_l4', g) for g in ({LEFT_F: p, RIGHT_R: q, CANAL: p}, {RIGHT_F: p, LEFT_R: q, CANAL: p}))
    assert np.allclose(here[LEFT_R], there[RIGHT_R]) and np.allclose(here[RIGHT_F], there[LEFT_F]) and not np.allclose(here[LEFT_R], here[RIGHT_F])


def test_what_says_nothing_changes_nothing(labels):
    table, prior = conditional_table(labels), prior_table(labels)
    for level in LEVELS:
        at = prior[prior.level == level].set_index('condition')[list(PROBS)]
        own = {c: p_risk(at.loc[c]) for c in (CANAL, LEFT_F)}
        assert all(np.allclose(p, at.loc[c]) for c, p in from_graded(table, prior, level, own).items())
        assert all(np.array_equal(p, at.loc[c]) for c, p in from_graded(table, prior, level, {}).items())
    assert from_graded(table, prior, 'l1_l2', {c: [1, 0, 0] for c in CONDITIONS}) == {}


def test_answers_are_probabilities_and_follow_the_evidence(labels):
    table, prior = conditional_table(labels), prior_table(labels)
    ill, well = (from_graded(table, prior, 'l5_s1', {c: p for c in CONDITIONS[1:]}) for p in ([0, 0, 1], [1, 0, 0]))
    for p in (ill[CANAL], well[CANAL]): assert np.isclose(p.sum(), 1) and (p >= FLOOR - 1e-12).all()
    assert ill[CANAL][2] > prior.query('level == "l5_s1"').severe.iloc[0] > well[CANAL][2]
    no_evidence = pd.DataFrame(dict(study_id=['1'], condition=[CANAL], level=['l1_l2'], grade=pd.array([0], dtype='Int8')))
    flat = from_graded(conditional_table(no_evidence), prior, 'l5_s1', {CANAL: [0, 0, 1]})
    assert all(np.allclose(p, prior.query('level == "l5_s1" and condition == @c')[list(PROBS)].iloc[0]) for c, p in flat.items())


def test_the_file_comes_back_in_any_order(labels, tmp_path):
    table, prior = conditional_table(labels), prior_table(labels)
    table.sample(frac=1, random_state=0).to_csv(tmp_path/'conditional.csv', index=False)
    again = read_conditional(tmp_path/'conditional.csv')
    a, b = (from_graded(t, prior, 'l2_l3', {CANAL: [.2, .3, .5]}) for t in (table, again))
    assert all(np.allclose(a[c], b[c]) for c in a)
    for bad, said in ((table.iloc[1:], 'once'), (table.assign(n=0.), 'above 0'), (table.drop(columns='n'), 'has the columns')):
        bad.to_csv(tmp_path/'bad.csv', index=False)
        with pytest.raises(TableError, match=said): read_conditional(tmp_path/'bad.csv')


def test_what_is_no_evidence_is_refused(labels):
    table, prior = conditional_table(labels), prior_table(labels)
    for level, graded, said in (('l4_l5', {'canal': [1, 0, 0]}, 'unknown condition or level: canal'), ('l6', {}, 'l6'), ('l4_l5', {CANAL: [.5, .5, .5]}, 'not three probabilities'),
                                ('l4_l5', {CANAL: [np.nan, .5, .5]}, 'not three'), ('l4_l5', {CANAL: [.5, .5]}, 'not three')):
        with pytest.raises(ValueError, match=said): from_graded(table, prior, level, graded)
    with pytest.raises(TableError, match='lacks a condition at l4_l5'): from_graded(table, prior[prior.condition != CANAL], 'l4_l5', {LEFT_F: [1, 0, 0]})
    assert RUNGS == ('model', 'other contrast', 'graded rows', 'prior')
