"""What does a missing series cost? Held-out studies of a data set are graded by a finished run as they are, and again with a series taken away; the score of both, paired.

`--data_dir` holds test_images and test_labels.csv that the run has not trained on. Taken away: sagittal T1, sagittal T2, the axial series, and, of studies that have several axial series, all but the one that covers most levels.
Beside each loss stands what the ladder is worth there: the same rows with the prior in place of `graded rows`, and foramina without T1 with `graded rows` in place of `other contrast`.
"""
import sys
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from mscan.grading import fall_back, grade_study, load_models
from mscan.ladder import RUNGS
from mscan.metrics import PARTS, bootstrap_interval, paired_bootstrap, score_of, study_losses
from mscan.prepare import read_tables
from mscan.rsna import LEVELS, PROBS, read_train
from mscan.runs import read_manifest
from mscan.sidecrops import OWN_CONTRAST
from mscan.studies import WAYS, without
from mscan.submission import GRADING, read_normalised

from ._common import Report, parser

ONE_SERIES, WHOLE = 'one of several axial series', 'whole'


def with_one_axial(study, slices: dict):
    "The study with only that axial series on which most levels were graded; None where it has but one."
    axial = study.of('axial_t2')
    if len(axial) < 2: return None
    kept = max(axial, key=lambda s: (slices.get(s.series_id, 0), len(s)))
    return replace(study, series=[s for s in study.series if s.view != 'axial_t2' or s is kept])


def graded(data_dir: Path, study_id: str, descriptions, models) -> dict:
    "{way: 25 rows} of one study."
    study = read_normalised(data_dir, study_id, descriptions, models.low, models.high)
    ask = partial(grade_study, models=models)
    rows = {WHOLE: ask(study)} | {way: ask(without(study, view)) for way, view in WAYS.items() if study.of(view)}
    own = copy(models)
    own.contrasts = OWN_CONTRAST
    if study.of('sagittal_t1'): rows['no sagittal T1, T2 not asked'] = grade_study(without(study, 'sagittal_t1'), own)
    named = pd.Series([n.split('/')[0] for r in rows[WHOLE].slices for n in r.split()]).value_counts().to_dict()
    if (one := with_one_axial(study, named)) is not None: rows[ONE_SERIES] = ask(one)
    return rows


def prior_instead(rows: pd.DataFrame, prior: pd.DataFrame) -> pd.DataFrame:
    "The same rows, of which those answered from graded rows have the prior's answer."
    rows = rows.assign(source=rows['source'].where(rows['source'].isin(RUNGS[:2]), ''))
    return pd.concat([fall_back(t, prior) for _, t in rows.groupby('study_id', sort=False)])


def losses_of(rows: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    "`study_losses` of the rows' studies."
    return study_losses(labels[labels.study_id.isin(rows.study_id)], rows.assign(row_id=rows.study_id + '_' + rows.condition + '_' + rows.level))


def add_way(report, name: str, rows: pd.DataFrame, rival: pd.DataFrame, labels: pd.DataFrame, args, against: str, limit=None):
    "Lines of one way: its score, and each part less the rival's on the same studies, paired."
    ids = rows.study_id.unique()
    mine, other = (losses_of(t[t.study_id.isin(ids)], labels).loc[ids] for t in (rows, rival))
    score = lambda losses, part, i: score_of(losses.iloc[i])[part]
    counts = rows['source'].value_counts().reindex(RUNGS, fill_value=0)
    report.add(f'{name}: score', bootstrap_interval(partial(score, mine, 'score'), np.arange(len(ids)), n=args.draws, seed=args.seed), studies=len(ids), rungs=counts.to_dict())
    for part in ('score', *PARTS):
        gain = paired_bootstrap(partial(score, mine, part), partial(score, other, part), np.arange(len(ids)), args.draws, args.seed)
        held = limit == part
        report.add(f'{name} - {against}: {part}', gain, 'interval < 0' if held else '', gain.high < 0 if held else None)
    report.notes.append(f"{name}, {len(ids)} studies: " + ', '.join(f'{n} {rung}' for rung, n in counts.items() if n))


def main(argv=None):
    p = parser('missing', __doc__.split('\n')[0], 0)
    p.add_argument('--run_dir', type=Path, default=Path('runs/demo'), help='finished run')
    p.add_argument('--data_dir', type=Path, default=Path('data/proof'), help='folder with test_images and test_labels.csv')
    args = p.parse_args(argv)
    torch.set_num_threads(args.workers)
    manifests = {s: read_manifest(args.run_dir.absolute(), s) for s in GRADING}
    models, tables, labels = load_models(manifests), read_tables(args.data_dir, 'test'), read_train(args.data_dir / 'test_labels.csv')
    ids = [s for s in tables.studies if s in set(labels.study_id)][:args.studies or None]
    found = [graded(args.data_dir, s, tables.descriptions, models) for s in tqdm(ids, desc='grade', leave=False)]
    rows = {way: pd.concat([f[way] for f in found if way in f], ignore_index=True) for way in dict.fromkeys(w for f in found for w in f)}
    report = Report('missing', args, f'{len(ids)} held-out studies of {args.data_dir.name}, graded by {args.run_dir.name}')
    whole = rows.pop(WHOLE)
    report.add('whole: score', bootstrap_interval(lambda i, t=losses_of(whole, labels): score_of(t.iloc[i])['score'], np.arange(len(ids)), n=args.draws, seed=args.seed))
    assert all(len(t) == len(LEVELS) * 5 * t.study_id.nunique() and np.isfinite(t[list(PROBS)].to_numpy()).all() for t in rows.values())
    for way, t in rows.items():
        if way.endswith('not asked'): continue
        add_way(report, way, t, whole, labels, args, 'whole')
        if (t['source'] == RUNGS[2]).any(): add_way(report, f'{way}, ladder', t, prior_instead(t, models.prior), labels, args, 'prior in its place')
    if (asked := rows.get('no sagittal T1')) is not None and (asked['source'] == RUNGS[1]).any():
        add_way(report, 'no sagittal T1, on T2', asked, rows['no sagittal T1, T2 not asked'], labels, args, 'graded rows in its place')
    return report.finish()


if __name__ == '__main__': sys.exit(main())
