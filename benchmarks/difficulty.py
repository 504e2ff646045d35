"""Is the canal hard enough, and not too hard? Logistic regression on 16 x 16 pixels of the pipeline's crops, a CNN, level alone, and what the noisy reader allows.

Binary AUROC of SCS >= Moderate per level, grouped 5-fold cross-validation, intervals over studies. Crops are cut round the true point with the pipeline's fields in mm."""
import sys
from functools import partial

import numpy as np
from scipy.special import ndtri
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mscan import disease
from mscan.metrics import auroc, bootstrap_interval, paired_bootstrap
from mscan.rsna import LEVELS

from ._cnn import add_arguments, blend, study_folds, trainings
from ._common import Report, data_of, parser, pooled
from ._crops import SIZE_PX, load_crops

SMALL_PX, LIMIT, FOLDS = 16, .85, 5


def small(images):
    "(n, M, M) uint8 with margin -> (n, 256): the graded middle at 16 x 16, each crop scaled to mean 0, variance 1."
    start, step = (images.shape[1] - SIZE_PX) // 2, SIZE_PX // SMALL_PX
    x = images[:, start:start + SIZE_PX, start:start + SIZE_PX].astype(float)
    x = x.reshape(-1, SMALL_PX, step, SMALL_PX, step).mean((2, 4)).reshape(len(x), -1)          # (n, 16, 4, 16, 4) -> (n, 256)
    return (x - x.mean(1, keepdims=True)) / np.maximum(x.std(1, keepdims=True), 1e-6)


def regress(job):
    "Held-out scores of one fold: the L2 strength comes from a grouped cross-validation inside the training part."
    x, positive, study, train, test, seed = job
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000))
    inner = StratifiedGroupKFold(3, shuffle=True, random_state=seed)
    search = GridSearchCV(model, {'logisticregression__C': np.logspace(-5, 0, 6)}, scoring='roc_auc', cv=inner)
    search.fit(x[train], positive[train], groups=study[train])
    return search.predict_proba(x[test])[:, 1]


def level_alone(level, positive, fold):
    "Held-out share of positives of the level."
    rating = np.zeros(len(level))
    for f in np.unique(fold):
        share = np.array([positive[(level == j) & (fold != f)].mean() if ((level == j) & (fold != f)).any() else 0 for j in range(len(LEVELS))])
        rating[fold == f] = share[level[fold == f]]
    return rating


def reader_chance(latent, level, prevalence):
    "(n,) chance that a noisy reader calls it Moderate or worse, of one who knows the true degree: the best rating there can be."
    moderate, severe = disease.shares_of(prevalence)[0, level].T
    a, b = disease.THRESHOLDS
    low = 1 - moderate - severe
    rank = np.where(latent < a, latent / a * low, np.where(latent < b, low + (latent - a) / (b - a) * moderate, 1 - severe + (latent - b) / (1 - b) * severe))
    return 1 - disease.grade_probabilities(ndtri(np.clip(rank, 1e-6, 1 - 1e-6)), disease.shares_of(prevalence)[0, level])[:, 0]


def main(argv=None):
    args = add_arguments(parser('difficulty', __doc__.split('\n')[0], 240)).parse_args(argv)
    crops = load_crops(args, [(k, None) for k in range(args.studies)])
    positive, study = crops.grade > 0, crops.study
    folds = min(FOLDS, args.studies)
    fold = study_folds(study, crops.grade, folds, args.seed)
    parts = [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in range(folds)]

    x = {v: small(getattr(crops, v)[:, 0]) for v in ('sagittal', 'axial')}
    x['both views'] = np.concatenate([x['sagittal'], x['axial']], 1)
    ratings = {'level alone': level_alone(crops.level, positive, fold)}
    jobs = [(x[v], positive, study, *part, args.seed) for v in x for part in parts]
    answers = iter(pooled(regress, jobs, args.workers, 'regressions'))
    for v in x:
        ratings[f'regression, {v}'] = rating = np.zeros(len(study))
        for _, test in parts: rating[test] = next(answers)

    pieces = [(v, crops, train, crops, test, args.seed + i) for v in ('sagittal', 'axial') for i, (train, test) in enumerate(parts)]
    answers, p = iter(trainings(pieces, args)), {}
    for v in ('sagittal', 'axial'):
        p[v] = np.zeros((len(study), 3))
        for _, test in parts: p[v][test] = next(answers)
    p['both views'] = blend(p['sagittal'], p['axial'])
    for v in p: ratings[f'CNN, {v}'] = 1 - p[v][:, 0]
    best = reader_chance(crops.latent, crops.level, args.prevalence)

    report = Report('difficulty', args, f'{data_of(args)}, {len(study)} levels, {positive.mean():.0%} Moderate or worse')
    area = lambda rating: partial(lambda rows, rating: auroc(rating[rows], positive[rows]), rating=rating)
    interval = lambda rating: bootstrap_interval(area(rating), study, args.draws, args.seed)
    paired = lambda a, b: paired_bootstrap(area(a), area(b), study, args.draws, args.seed)
    for name, rating in ratings.items():
        found = interval(rating)
        regression = name.startswith('regression') and 'both' not in name  # the limit is for one crop; two beside each other are shown
        report.add(name, found, f'<= {LIMIT}' if regression else '', found.value <= LIMIT if regression else None)
    report.add('reader bound, these studies', interval(best))
    report.add('reader bound, expected', disease.reader_bound(args.prevalence, 4000, args.seed)['spinal']['auroc'], data=f'4000 latents of prevalence {args.prevalence}, seed {args.seed}')
    for v in x:
        gain = paired(ratings[f'CNN, {v}'], ratings[f'regression, {v}'])
        report.add(f'CNN - regression, {v}', gain, 'interval > 0', gain.low > 0)
    for name, rating in ratings.items():
        over = paired(rating, best)
        report.add(f'{name} - bound', over, 'interval not > 0', not over.low > 0)
    if crops.left_out: report.notes.append(f'{crops.left_out} levels left out: one of the views does not reach them')
    return report.finish()


if __name__ == '__main__': sys.exit(main())
