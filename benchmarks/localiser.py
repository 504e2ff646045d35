"""Does the level localiser of a run find the levels outside its own data set? Canal points on studies of a seed that no run has trained on, by kind of image and by scanner.

`--data_dir` takes another data set instead, with test_images and a truth.csv of study_id, condition, level, x_mm, y_mm, z_mm: a phantom that is not this one, or marked real studies. Every study counts: one without points counts as 999 mm off at all levels."""
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from mscan import dicom, images, phantom
from mscan.keypoints import load_keypoints
from mscan.localisation import level_shifts, localise
from mscan.metrics import bootstrap_interval
from mscan.rsna import LEVELS

from ._common import Report, data_of, parser, pooled

CANAL = 'spinal_canal_stenosis'
MEDIAN_MM, NEAR_MM, NEAR_SHARE, LOST_MM = 6., 12., .90, 999.


def find_all(find, study):
    "Table of the found points of a study with raw pixels; nan where there is no sagittal T2."
    series = study.of('sagittal_t2')
    if not series: return pd.DataFrame(dict(level=LEVELS, x_mm=np.nan, y_mm=np.nan, z_mm=np.nan)).assign(study_id=study.study_id)
    return find(images.normalise(series[0])).assign(study_id=study.study_id)


def made_study(k, seed, size, prevalence, weights):
    "Errors of one phantom study; only its sagittal T2 series is painted."
    p = phantom.phantom_study(seed, k, size, prevalence, pixels=False)
    j = next(j for j, s in enumerate(p.scans) if s.view == 'sagittal_t2')
    made = phantom.paint(p, [(j, i) for i in range(len(p.scans[j].planes))])
    pixels = {s.series_id: [] for s in p.scans} | {p.scans[j].series_id: [made[j, i] for i in range(len(p.scans[j].planes))]}
    study = phantom.as_study(p.study.study_id, p.scans, pixels)
    table = localise(find_all(load_keypoints(weights), study), p.truth[p.truth.condition == CANAL])
    return table.assign(kind=p.sequences[j].kind, scanner=p.scanner, transitional=p.anatomy.build.transitional or 'no')


def read_study(study_id, data_dir, truth, weights):
    "Errors of one study on disk."
    study = dicom.read_study(data_dir, 'test', study_id)
    return localise(find_all(load_keypoints(weights), study), truth[truth.study_id == study_id]).assign(kind='unknown', scanner='unknown', transitional='unknown')


def main(argv=None):
    p = parser('localiser', __doc__.split('\n')[0], 60)
    p.add_argument('--run_dir', type=Path, default=Path('runs/demo'), help='finished run, at least as far as 20_keypoints')
    p.add_argument('--data_dir', type=Path, help='another data set instead of a fresh phantom')
    args = p.parse_args(argv)
    weights = args.run_dir / '20_keypoints' / 'keypoints'
    if args.data_dir:
        truth = pd.read_csv(args.data_dir / 'truth.csv', dtype={'study_id': str})
        truth = truth[truth.condition == CANAL]
        ids = [i for i in truth.study_id.unique() if (args.data_dir / 'test_images' / i).is_dir()]
        tables = pooled(partial(read_study, data_dir=args.data_dir, truth=truth, weights=weights), ids, args.workers, 'studies')
        name = f'{args.data_dir.name}, {len(ids)} studies'
    else:
        tables = pooled(partial(made_study, seed=args.seed, size=args.size, prevalence=args.prevalence, weights=weights), range(args.studies), args.workers, 'studies')
        name = data_of(args)
    table = pd.concat(tables, ignore_index=True)
    error, study = table.error_mm.fillna(LOST_MM).to_numpy(), pd.factorize(table.study_id)[0]
    report = Report('localiser', args, f'{name}; localiser of {args.run_dir.name}')
    middle = bootstrap_interval(lambda rows: float(np.median(error[rows])), study, args.draws, args.seed)
    near = bootstrap_interval(lambda rows: float((error[rows] <= NEAR_MM).mean()), study, args.draws, args.seed)
    report.add('median distance, mm', middle, f'<= {MEDIAN_MM:g}', middle.value <= MEDIAN_MM)
    report.add(f'within {NEAR_MM:g} mm', near, f'>= {NEAR_SHARE:g}', near.value >= NEAR_SHARE)
    shifts = level_shifts(table)
    report.add('studies shifted by a level', float(shifts.shifted.sum()), '0', not shifts.shifted.any())
    for column in ('kind', 'scanner', 'transitional'):
        if table[column].nunique() < 2: continue
        for value, t in table.groupby(column):
            moved = shifts[shifts.study_id.isin(t.study_id)].shifted.sum()
            report.add(f'{column} {value}: within {NEAR_MM:g} mm', float((t.error_mm.fillna(LOST_MM) <= NEAR_MM).mean()), studies=int(t.study_id.nunique()), shifted=int(moved), median_mm=float(t.error_mm.median()))
    return report.finish()


if __name__ == '__main__': sys.exit(main())
