"""Does it help to leave doubted labels out? Networks trained on all labels of some studies against networks trained without those that out-of-fold answers doubt by more than a threshold; held-out studies, paired.

The doubt of a label is 1 - p_risk of its grade, by networks that have not seen its study (`--inner` folds, sagittal and axial blended), as `mscan_doubts` and `-p drop_noisy` have it. Held-out labels carry the same readers' noise and are all kept: they are what a competition
scores. Where the threshold leaves out right labels beside wrong ones, or hard cases beside noise, this can cost as well as help: there is no limit to hold, the figure is the answer."""
import sys
from functools import partial

import numpy as np

from mscan.metrics import bootstrap_interval, p_risk, paired_bootstrap, weighted_log_loss

from ._cnn import add_arguments, blend, study_folds, trainings
from ._common import Report, data_of, parser
from ._crops import load_crops
from .views import VIEWS


def doubts(crops, train, args):
    "(n,) doubt of each training label, out of fold."
    fold = study_folds(crops.study[train], crops.grade[train], args.inner, args.seed)
    answers, own = iter(trainings([(v, crops, train[fold != f], crops, train[fold == f], args.seed + f) for v in VIEWS for f in range(args.inner)], args)), {}
    for v in VIEWS:
        own[v] = np.zeros((len(train), 3))
        for f in range(args.inner): own[v][fold == f] = next(answers)
    risk = p_risk(blend(*own.values()))
    return 1 - risk[np.arange(len(train)), crops.grade[train]]


def graded(crops, rows: dict, test, args) -> dict:
    "{name: (m, G)} by networks trained on each set of rows, both views and `--repeats` seeds blended."
    pieces = [(v, crops, own, crops, test, args.seed + 100 + r) for own in rows.values() for v in VIEWS for r in range(args.repeats)]
    answers = iter(trainings(pieces, args))
    return {name: blend(*(next(answers) for _ in range(len(VIEWS) * args.repeats))) for name in rows}


def main(argv=None):
    p = add_arguments(parser('noisy', __doc__.split('\n')[0], 280))
    p.add_argument('--held_out', type=int, default=120, help='of the studies, the last ones')
    p.add_argument('--inner', type=int, default=3, help='folds of the doubting networks')
    p.add_argument('--repeats', type=int, default=2, help='seeds that answer together')
    p.add_argument('--thresholds', type=float, nargs='+', default=[.8, .9], help='of doubt, above which a label is left out')
    args = p.parse_args(argv)
    if not 0 < args.held_out < args.studies: raise SystemExit(f'--held_out {args.held_out} must be between 1 and --studies {args.studies} - 1')
    crops = load_crops(args, [(k, None) for k in range(args.studies)])
    held = crops.study >= args.studies - args.held_out
    train, test = np.flatnonzero(~held), np.flatnonzero(held)
    doubt = doubts(crops, train, args)
    rng, rows = np.random.default_rng(args.seed), {'all labels': train}
    for t in args.thresholds:
        kept = doubt <= t
        rows |= {f'without doubt above {t:g}': train[kept], f'without as many at random ({t:g})': train[np.sort(rng.permutation(len(train))[:kept.sum()])]}
    found = graded(crops, rows, test, args)
    grade, study = crops.grade[test], crops.study[test]
    loss = {name: partial(lambda i, q: weighted_log_loss(q[i], grade[i]), q=q) for name, q in found.items()}
    report = Report('noisy', args, f'{data_of(args)}, of which {args.held_out} held out ({len(test)} levels)')
    for name in found:
        report.add(f'WCE, {name}', bootstrap_interval(loss[name], study, args.draws, args.seed), labels=len(rows[name]))
        if name != 'all labels': report.add(f'WCE, {name} - all', paired_bootstrap(loss[name], loss['all labels'], study, args.draws, args.seed))
    report.notes += [f'{(doubt > t).sum()} of {len(train)} labels are doubted by more than {t:g}' for t in args.thresholds]
    return report.finish()


if __name__ == '__main__': sys.exit(main())
