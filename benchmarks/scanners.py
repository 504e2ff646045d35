"""What does it cost to meet a scanner that was never trained on? One profile is left out by name.

Two trainings on the same patients: with all profiles as they come, and with the patients of the held-out profile scanned by another one instead. Both are tested on the same further patients,
all scanned by the held-out profile. The difference of the weighted cross entropy is the price of the unknown scanner, paired by study."""
import sys
from functools import partial

import numpy as np

from mscan.acquisition import SCANNERS
from mscan.metrics import auroc, bootstrap_interval, paired_bootstrap, weighted_log_loss

from ._cnn import add_arguments, blend, trainings
from ._common import Report, data_of, parser
from ._crops import joined, load_crops

LIMIT = .05
FIRST_TEST = 100_000  # number of the first test study
VIEWS = ('sagittal', 'axial')


def others_for(crops, studies, name, names) -> list:
    "Jobs for `load_crops`: every study as it comes, those of the named profile on one of the other profiles in turn."
    others, own = [n for n in names if n != name], {int(k): str(s) for k, s in zip(crops.study, crops.scanner, strict=True)}
    return [(k, others[k % len(others)] if own.get(k) == name else None) for k in range(studies)]


def compare(report, args, name, test, found, replaced):
    "Figures of one held-out profile; found: {'all profiles': (n, G), 'without it': (n, G)}."
    data = f'{data_of(args)}, {replaced} of them on {name}; tested on {args.held_out} further studies on {name}'
    loss = {k: partial(lambda rows, q: weighted_log_loss(q[rows], test.grade[rows]), q=q) for k, q in found.items()}
    area = {k: partial(lambda rows, q: auroc(1 - q[rows, 0], test.grade[rows] > 0), q=q) for k, q in found.items()}
    for k in found: report.add(f'{name}: WCE, {k}', bootstrap_interval(loss[k], test.study, args.draws, args.seed), data=data)
    cost = paired_bootstrap(loss['without it'], loss['all profiles'], test.study, args.draws, args.seed)
    report.add(f'{name}: cost in WCE', cost, f'<= {LIMIT}', cost.value <= LIMIT, data=data)
    report.add(f'{name}: change of AUROC', paired_bootstrap(area['without it'], area['all profiles'], test.study, args.draws, args.seed), data=data)
    if not replaced: report.notes.append(f'no training study was on {name}: both trainings are the same')


def main(argv=None):
    names = sorted(SCANNERS)
    p = add_arguments(parser('scanners', __doc__.split('\n')[0], 160))
    p.add_argument('--hold', nargs='+', default=['Cedar'], choices=[*names, 'all'], help="profiles to hold out, one after the other; 'all': every one")
    p.add_argument('--held_out', type=int, default=80, help='test studies a profile')
    p.add_argument('--repeats', type=int, default=3, help='networks a view and training, answering together')
    args = p.parse_args(argv)
    held = names if 'all' in args.hold else list(dict.fromkeys(args.hold))
    everyone = load_crops(args, [(k, None) for k in range(args.studies)])
    tests = {n: load_crops(args, [(FIRST_TEST + k, n) for k in range(args.held_out)]) for n in held}
    jobs = {n: others_for(everyone, args.studies, n, names) for n in held}
    trained = {'': everyone} | {n: load_crops(args, jobs[n]) for n in held}

    together = joined(list(tests.values()))                      # the training with all profiles answers for every test at once
    pieces = [(v, c, np.arange(len(c.grade)), t, np.arange(len(t.grade)), args.seed + r) for n, c in trained.items() for t in [tests.get(n, together)] for v in VIEWS for r in range(args.repeats)]
    answers, size = trainings(pieces, args), len(VIEWS) * args.repeats
    blended = [blend(*answers[i:i + size]) for i in range(0, len(answers), size)]
    report, start = Report('scanners', args, f'{data_of(args)}, profiles {", ".join(names)}'), 0
    for name, without in zip(held, blended[1:], strict=True):
        stop = start + len(without)
        compare(report, args, name, tests[name], {'all profiles': blended[0][start:stop], 'without it': without}, sum(s is not None for _, s in jobs[name]))
        start = stop
    return report.finish()


if __name__ == '__main__': sys.exit(main())
