"""Do both views together beat either alone? Sagittal, axial and both, trained on some studies, measured on others, paired by study.

Per view `--inner` networks are trained, each without one part of the training studies. Their held-out answers fit a stacker (multinomial logistic regression) for one view and for
both: each answer is recalibrated in the same way, so that the gain is not one of calibration. On the held-out studies the networks of a view answer together."""
import sys
from functools import partial

import numpy as np

from mscan.metrics import auroc, bootstrap_interval, paired_bootstrap, weighted_log_loss

from ._cnn import add_arguments, blend, stacker, study_folds, trainings
from ._common import Report, data_of, parser
from ._crops import load_crops

VIEWS = ('sagittal', 'axial')


def both_views(crops, train, test, args):
    "Stacked answers for the test rows: dict with sagittal, axial, both (m, G), and blended, the plain mean of log-probabilities."
    fold = study_folds(crops.study[train], crops.grade[train], args.inner, args.seed)
    pieces = [(v, crops, train[fold != f], crops, np.concatenate([train[fold == f], test]), args.seed + f) for v in VIEWS for f in range(args.inner)]
    answers = iter(trainings(pieces, args))
    own, there = {}, {}
    for v in VIEWS:
        own[v], votes = np.zeros((len(train), 3)), []
        for f in range(args.inner):
            p, n = next(answers), (fold == f).sum()
            own[v][fold == f] = p[:n]
            votes.append(p[n:])
        there[v] = blend(*votes)
    found = {v: stacker([own[v]], crops.grade[train])([there[v]]) for v in VIEWS}
    found['both'] = stacker([own[v] for v in VIEWS], crops.grade[train])([there[v] for v in VIEWS])
    return found | {'blended': blend(*(there[v] for v in VIEWS))}


def main(argv=None):
    p = add_arguments(parser('views', __doc__.split('\n')[0], 400))
    p.add_argument('--held_out', type=int, default=160, help='of the studies, the last ones')
    p.add_argument('--inner', type=int, default=3, help='networks a view')
    args = p.parse_args(argv)
    if not 0 < args.held_out < args.studies: raise SystemExit(f'--held_out {args.held_out} must be between 1 and --studies {args.studies} - 1')
    crops = load_crops(args, [(k, None) for k in range(args.studies)])
    held = crops.study >= args.studies - args.held_out
    test = np.flatnonzero(held)
    found = both_views(crops, np.flatnonzero(~held), test, args)
    grade, study = crops.grade[test], crops.study[test]

    report = Report('views', args, f'{data_of(args)}, of which {args.held_out} held out ({len(test)} levels)')
    loss = {v: partial(lambda rows, q: weighted_log_loss(q[rows], grade[rows]), q=q) for v, q in found.items()}
    area = {v: partial(lambda rows, q: auroc(1 - q[rows, 0], grade[rows] > 0), q=q) for v, q in found.items()}
    for name, figure in (('WCE', loss), ('AUROC', area)):
        for v in found: report.add(f'{name}, {v}', bootstrap_interval(figure[v], study, args.draws, args.seed))
    for v in VIEWS:
        gain = paired_bootstrap(loss['both'], loss[v], study, args.draws, args.seed)
        report.add(f'WCE, both - {v}', gain, 'interval < 0', gain.high < 0)
        report.add(f'AUROC, both - {v}', paired_bootstrap(area['both'], area[v], study, args.draws, args.seed))
    if crops.left_out: report.notes.append(f'{crops.left_out} levels left out: one of the views does not reach them')
    return report.finish()


if __name__ == '__main__': sys.exit(main())
