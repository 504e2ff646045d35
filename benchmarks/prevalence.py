"""Does `--prevalence real` give the grades of the real tables: counts of each cell, worst canal grade of a study, and how the grades hang together?

Labels only. A count is within sampling error if its exact binomial p-value against the real share is at least .05 over the number of counts (Bonferroni); a kappa if it is within .08."""
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
from scipy.stats import binomtest

from mscan import disease, phantom
from mscan.metrics import auroc, bootstrap_draws, percentile_interval, quadratic_kappa
from mscan.rsna import CONDITIONS, GRADES, LEVELS

from ._common import Report, data_of, parser, pooled

KAPPAS = {  # name -> real value; read off the public tables
    'left / right NFN': .44, 'left / right SS': .58, 'SCS / left SS': .51, 'SCS / left NFN': .27,
    **{f'SCS {a} / {b}': v for a, b, v in zip(LEVELS, LEVELS[1:], (.33, .43, .37, .10), strict=False)}}
WITHIN = .08
LEVEL_AUROC = .71            # of level alone, for SCS >= Moderate
WORST = (1263, 346, 365)     # real studies by their worst SCS grade
SHORT = dict(zip(CONDITIONS, ('SCS', 'left NFN', 'right NFN', 'left SS', 'right SS'), strict=True))


def labels_of(k, seed, size, prevalence):
    "(5 conditions, 5 levels) grades of one study, nan where there is no label."
    t = phantom.phantom_study(seed, k, size, prevalence, quirks='real', pixels=False).labels
    return t.pivot(index='condition', columns='level', values='grade').loc[list(CONDITIONS), list(LEVELS)].to_numpy(float, na_value=np.nan)


def direct_labels(studies, seed, prevalence):
    "(n, 5, 5) from `mscan.disease` alone: seconds, but not what a data set holds."
    rng = np.random.default_rng(seed)
    grade = disease.read_grades(rng, disease.draw_disease(rng, prevalence, studies)).astype(float)
    for g in grade: g[disease.draw_missing(rng)] = np.nan
    return grade


def kappas(grade) -> list:
    "The kappas of KAPPAS, in that order, of grades (n, 5, 5)."
    def kappa(a, b):
        both = np.isfinite(a) & np.isfinite(b)
        return quadratic_kappa(a[both], b[both])
    pairs = [(1, 2), (3, 4), (0, 3), (0, 1)]
    return [kappa(grade[:, a], grade[:, b]) for a, b in pairs] + [kappa(grade[:, 0, j], grade[:, 0, j + 1]) for j in range(4)]


def level_area(grade):
    "AUROC of the level's own share for SCS >= Moderate."
    canal = grade[:, 0]
    known = np.isfinite(canal)
    share = np.array([(c[k] > 0).mean() for c, k in zip(canal.T, known.T, strict=True)])
    return auroc(np.broadcast_to(share, canal.shape)[known], canal[known] > 0)


def count_rows(grade) -> list:  # of namespaces: name, got, of, wanted (share), p
    "Every count of the real table against the phantom's: Moderate and Severe among the labelled, and the missing labels."
    rows = []
    for c, condition in enumerate(CONDITIONS):
        for j, level in enumerate(LEVELS):
            cell, real = grade[:, c, j], disease.COUNTS[c, j]
            n = int(np.isfinite(cell).sum())
            wanted = [(GRADES[g], int((cell == g).sum()), n, real[g] / real.sum()) for g in (1, 2)] + [('missing', len(cell) - n, len(cell), 1 - real.sum() / disease.STUDIES)]
            rows += [SimpleNamespace(name=f'{SHORT[condition]} {level} {what}', got=got, of=of, wanted=share, p=binomtest(got, of, share).pvalue if of else 1.) for what, got, of, share in wanted]
    return rows


def main(argv=None):
    p = parser('prevalence', __doc__.split('\n')[0], 1500)
    p.set_defaults(prevalence='real')
    p.add_argument('--direct', action='store_true', help='draw from mscan.disease alone, without anatomy')
    args = p.parse_args(argv)
    if args.direct: grade = direct_labels(args.studies, args.seed, args.prevalence)
    else: grade = np.stack(pooled(partial(labels_of, seed=args.seed, size=args.size, prevalence=args.prevalence), list(range(args.studies)), args.workers, 'studies'))

    report = Report('prevalence', args, f'{data_of(args)}, labels only{", from mscan.disease alone" if args.direct else ""}')
    rows, studies = count_rows(grade), np.arange(len(grade))
    for r in rows:
        got = binomtest(r.got, max(r.of, 1)).proportion_ci(.95)
        report.add(r.name, (r.got / max(r.of, 1), got.low, got.high), f'real {r.wanted:.4f}, p >= {.05 / len(rows):.4f}', r.p >= .05 / len(rows), quiet=True, got=r.got, of=r.of, wanted=r.wanted, p=r.p)
    report.add('counts within sampling error', sum(r.p >= .05 / len(rows) for r in rows) / len(rows), 'all')
    report.add('smallest p of a count', min(r.p for r in rows), f'>= .05 / {len(rows)}')
    worst = np.nanmax(np.where(np.isfinite(grade[:, 0]), grade[:, 0], -1), 1)
    for g, real in enumerate(WORST):
        got, of = int((worst == g).sum()), int((worst >= 0).sum())
        ci = binomtest(got, of).proportion_ci(.95)
        report.add(f'worst SCS {GRADES[g]}', (got / of, ci.low, ci.high), f'real {real / sum(WORST):.3f}, p >= .0167', binomtest(got, of, real / sum(WORST)).pvalue >= .05 / 3, wanted=real / sum(WORST))
    values = [*kappas(grade), level_area(grade)]
    drawn = bootstrap_draws(lambda i: [*kappas(grade[i]), level_area(grade[i])], studies, args.draws, args.seed)
    for i, (name, real) in enumerate([*KAPPAS.items(), ('level alone, AUROC of SCS', LEVEL_AUROC)]):
        kappa = i < len(KAPPAS)
        report.add(f'kappa {name}' if kappa else name, percentile_interval(values[i], drawn[:, i]), f'real {real:.2f}' + (f', within {WITHIN}' if kappa else ''), abs(values[i] - real) <= WITHIN if kappa else None, wanted=real)
    return report.finish()


if __name__ == '__main__': sys.exit(main())
