"The score taken apart, against numbers worked out by hand and against the score itself; and the command that prints it."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mscan.breakdown import PART_OF, SIDE_OF, breakdown, breakdown_tables, mscan_score, paired_parts, read_prior, score_breakdown, score_report
from mscan.compare import evaluate_pair, tables_markdown
from mscan.metrics import grade_metrics, p_risk, prior_rows, prior_table, score, study_losses, uniform_rows
from mscan.rsna import CONDITIONS, LEVELS, PROBS, TableError, row_ids, write_submission, write_train

KEYS = ['study_id', 'condition', 'level']


def labels_of(grades, others=0):
    "Labels of studies whose five canal grades are given; the other 20 cells are `others` (None = missing)."
    rows = [(s, c, l, g[i] if c == CONDITIONS[0] else others) for s, g in grades.items() for c in CONDITIONS for i, l in enumerate(LEVELS)]
    return pd.DataFrame(rows, columns=[*KEYS, 'grade']).assign(grade=pd.array([r[3] for r in rows], dtype='Int8'))


def answer(studies, p): return pd.DataFrame({'row_id': row_ids(studies), **dict(zip(PROBS, p))})


@pytest.fixture
def drawn():
    "40 studies with holes, and answers that know something: labels, answers (with row_id)."
    rng = np.random.default_rng(3)
    labels = labels_of({str(i): [0] * 5 for i in range(40)})
    labels['grade'] = pd.array(rng.choice(3, len(labels), p=(.6, .25, .15)), dtype='Int8')
    p = rng.dirichlet((1, 1, 1), len(labels)) + np.eye(3)[labels.grade.astype(int)]
    labels.loc[rng.random(len(labels)) < .1, 'grade'] = pd.NA
    return labels, labels[KEYS].assign(row_id=labels.study_id + '_' + labels.condition + '_' + labels.level, **dict(zip(PROBS, (p / p.sum(1, keepdims=True)).T)))


def test_cells_and_margins_by_hand():
    rows = pd.DataFrame([('left_subarticular_stenosis', 'l4_l5', 2, .2, .3, .5), ('left_subarticular_stenosis', 'l4_l5', 0, .5, .25, .25), ('right_subarticular_stenosis', 'l4_l5', 1, .1, .8, .1),
                         ('spinal_canal_stenosis', 'l1_l2', 0, .9, .05, .05), ('spinal_canal_stenosis', 'l1_l2', pd.NA, .0, .0, 1.)], columns=['condition', 'level', 'grade', *PROBS])
    at = breakdown(rows).set_index(['part', 'side', 'level'])
    ln = np.log
    expected = {('subarticular', 'left', 'l4_l5'): (2, (-4 * ln(.5) - ln(.5)) / 5), ('subarticular', 'right', 'l4_l5'): (1, -ln(.8)), ('subarticular', 'all', 'all'): (3, (-5 * ln(.5) - 2 * ln(.8)) / 7),
                ('all', 'left', 'all'): (2, -ln(.5)), ('spinal', 'all', 'l1_l2'): (1, -ln(.9)), ('all', 'all', 'all'): (4, (-5 * ln(.5) - 2 * ln(.8) - ln(.9)) / 8)}
    for key, (n, wce) in expected.items(): assert at.n[key] == n and np.isclose(at.wce[key], wce), key
    assert at.n['foraminal', 'all', 'all'] == 0 and np.isnan(at.wce['foraminal', 'all', 'all']) and at.prior.isna().all() and at.from_model.isna().all()
    assert np.isclose(at.binary_auroc['subarticular', 'all', 'all'], 1)  # the one Normal/Mild has the largest p_risk of Normal/Mild
    assert np.isnan(at.binary_auroc['subarticular', 'all', 'l4_l5'])     # one case of it at a level is too few
    assert at.n.sum() == 2 * 2 * at.n['all', 'all', 'all'] + 2 * 2 * (2 + 1)  # (all + its part) x (all + its level), and for rows with a side the same again


def test_the_margins_are_the_parts_of_the_score(drawn):
    labels, answers = drawn
    prior = prior_table(labels)
    at = breakdown(labels.merge(answers, on=KEYS), prior).set_index(['part', 'side', 'level'])
    mine, rival = score(labels, answers), score(labels, prior_rows(prior, labels.study_id.unique()))
    for part in ('spinal', 'foraminal', 'subarticular'): assert np.isclose(at.wce[part, 'all', 'all'], mine[part]) and np.isclose(at.prior[part, 'all', 'all'], rival[part])
    for condition in CONDITIONS[1:]:
        rows = labels[labels.condition == condition].merge(answers, on=KEYS).dropna(subset='grade')
        direct = grade_metrics(rows[list(PROBS)], rows.grade.astype(int), p_risk(rows[list(PROBS)]))
        cell = at.loc[(PART_OF[condition], SIDE_OF[condition], 'all')]
        assert cell.n == direct['n'] and all(np.isclose(cell[k], direct[k]) for k in ('wce', 'auroc', 'binary_auroc'))


def test_paired_parts_compare_on_the_same_draws(drawn):
    labels, answers = drawn
    prior = study_losses(labels, prior_rows(prior_table(labels), labels.study_id.unique()))
    mine = study_losses(labels, answers)
    found, same = paired_parts(mine, prior, draws=100), paired_parts(mine, mine, draws=20)
    for part, value in score(labels, answers).items():
        assert np.isclose(found['model'][part].value, value) and np.isclose(found['difference'][part].value, value - found['prior'][part].value)
        assert found['difference'][part].high < 0 and same['difference'][part] == (0, 0, 0)
    alone = found['model']['spinal'].high - found['model']['spinal'].low + found['prior']['spinal'].high - found['prior']['spinal'].low
    assert found['difference']['spinal'].high - found['difference']['spinal'].low < alone
    with pytest.raises(ValueError, match='same studies'): paired_parts(mine, prior.iloc[::-1])


def test_the_tables_hold_what_was_computed(drawn):
    labels, answers = drawn
    prior = prior_table(labels)
    table = breakdown(labels.merge(answers, on=KEYS).assign(source=np.where(labels.level == 'l1_l2', 'prior', 'model')), prior)
    gain = paired_parts(study_losses(labels, answers), study_losses(labels, uniform_rows(labels.study_id.unique())), draws=50)
    one, two, three = breakdown_tables(table, gain, 'thirds').values()
    at = table.set_index(['part', 'side', 'level'])
    assert one.set_index('condition').loc['recess, right', 'L5/S1'] == f'{at.wce["subarticular", "right", "l5_s1"]:.3f} / {at.prior["subarticular", "right", "l5_s1"]:.3f}'
    assert two.set_index('condition').loc['canal', 'from the model'] == f'{at.from_model["spinal", "all", "all"]:.0%}' and at.from_model['spinal', 'all', 'l1_l2'] == 0
    assert three['thirds'].iloc[0] == '1.099' and list(three['part of the score']) == ['canal', 'foramina', 'recesses', 'any severe', 'score']
    assert '| foramen, both |' in tables_markdown(breakdown_tables(table, gain, 'thirds'))
    alone = breakdown_tables(breakdown(labels.merge(answers, on=KEYS)))
    assert len(alone) == 2 and '/' not in ''.join(next(iter(alone.values()))['all levels'])  # no prior, no stroke


def test_a_prior_is_read_or_refused(tmp_path):
    prior = prior_table(labels_of({'1': [0, 1, 2, 0, 0]}))
    prior.to_csv(tmp_path/'prior.csv', index=False)
    assert np.allclose(read_prior(tmp_path/'prior.csv')[list(PROBS)], prior[list(PROBS)])
    prior.iloc[1:].to_csv(tmp_path/'short.csv', index=False), prior.drop(columns='severe').to_csv(tmp_path/'narrow.csv', index=False)
    for name, said in (('short.csv', 'short.csv: the prior lacks'), ('narrow.csv', 'lacks the columns severe'), ('none.csv', 'no such file')):
        with pytest.raises(TableError, match=said): read_prior(tmp_path/name)
    with pytest.raises(TableError, match='the prior lacks'): breakdown(labels_of({'1': [0] * 5}).merge(answer(['1'], (.7, .2, .1)).assign(study_id='1'), on='study_id'), prior.iloc[1:])


def test_a_pair_of_files_is_held_against_the_prior_that_is_given(drawn, tmp_path):
    labels, answers = drawn
    write_train(labels, tmp_path/'t.csv'), write_submission(answers, tmp_path/'s.csv')
    other = prior_table(labels_of({str(i): [i % 3] * 5 for i in range(9)}, others=1))
    other.to_csv(tmp_path/'prior.csv', index=False)
    own, given = evaluate_pair(tmp_path/'t.csv', tmp_path/'s.csv', 20), evaluate_pair(tmp_path/'t.csv', tmp_path/'s.csv', 20, prior_csv=tmp_path/'prior.csv')
    table, gain, rival = score_breakdown(tmp_path/'t.csv', tmp_path/'s.csv', tmp_path/'prior.csv', 20)
    assert rival == given.report['prior'] == 'given prior' and own.report['prior'].startswith('weighted prior of these')
    assert np.allclose(given.breakdown.prior, table.prior, equal_nan=True) and given.report['gain_over_prior'] == {k: tuple(v) for k, v in gain['difference'].items()}
    assert given.report['gain_over_prior']['foraminal'][0] < own.report['gain_over_prior']['foraminal'][0]  # a prior of other labels is easier to beat


def run(*args):
    "The console script, as installed beside this Python."
    return subprocess.run([str(Path(sys.executable).with_name('mscan_score')), *map(str, args)], capture_output=True, text=True)


def test_command_line(tmp_path):
    labels = labels_of({'1': [0, 1, 0, 0, 0], '2': [0, 2, 1, 0, 0]})
    write_train(labels, tmp_path/'t.csv')
    write_submission(answer(['1', '2'], (.7, .2, .1)), tmp_path/'s.csv')
    done = run('--train_csv', tmp_path/'t.csv', '--submission', tmp_path/'s.csv', '--json', tmp_path/'out/s.json')
    assert done.returncode == 0 and all(w in done.stdout for w in ('any_severe', 'uniform', 'weighted prior')), done.stderr
    saved = json.loads((tmp_path/'out/s.json').read_text())
    assert list(saved) == ['score', 'spinal', 'foraminal', 'subarticular', 'any_severe']
    assert saved == score(labels, answer(['1', '2'], (.7, .2, .1))) == score_report(tmp_path/'t.csv', tmp_path/'s.csv').loc['submission'].to_dict()

    lines = (tmp_path/'s.csv').read_text().splitlines()
    (tmp_path/'bad.csv').write_text('\n'.join([*lines[:3], lines[3].replace('0.7', '0.9'), *lines[4:]]) + '\n')
    for args, said in ((dict(submission=tmp_path/'s.csv'), '--train_csv is needed'),
                       (dict(train_csv=tmp_path/'t.csv', submission=tmp_path/'bad.csv'), 'row 3 (1_left_neural_foraminal_narrowing_l3_l4): the probabilities do not sum to 1'),
                       (dict(train_csv=tmp_path/'none.csv', submission=tmp_path/'s.csv'), 'no such file')):
        with pytest.raises(SystemExit, match='mscan_score: ') as stopped: mscan_score(**args)
        assert said in stopped.value.code and '\n' not in stopped.value.code
    done = run('--train_csv', tmp_path/'t.csv', '--submission', tmp_path/'bad.csv')
    assert done.returncode == 1 and done.stderr.startswith('mscan_score: bad.csv, row 3') and len(done.stderr.splitlines()) == 1 and not done.stdout
