"""Do sagittal and axial T2 show the same patient? Correlation of their intensities along the lines where their slices cross.

Pearson for each pair of a sagittal slice within two of the middle and an axial slice, with at least 40 samples; median over the pairs of a study, then over studies. Then the
sagittal image is moved by 10 mm head to foot and the same pairs are read again. Real studies: .57 and .74."""
import sys
from functools import partial

import numpy as np
from scipy.ndimage import map_coordinates

from mscan import phantom
from mscan.geometry import crossing_line, plane_of
from mscan.metrics import bootstrap_interval

from ._common import Report, data_of, parser, pooled

STEP_MM = 1.          # between samples on a line
MIN_SAMPLES = 40
SHIFT_MM = 10.
LOW, HIGH, FALL = .5, .85, .1


def line_samples(
    sagittal, image,  # Plane and pixels (rows, columns)
    axial, other,     # the same of the slice that crosses it
    shift_mm=SHIFT_MM,
):                    # (3, n): axial, sagittal, sagittal moved towards the feet; None where they meet in too few samples
    "Grey values along the line where two slices cross, each read bilinearly."
    ends = crossing_line(sagittal, axial)
    if ends is None: return None
    xyz = sagittal.to_patient(ends)                                                     # (2, 3)
    n = int(np.linalg.norm(xyz[1] - xyz[0]) / STEP_MM) + 1
    places = xyz[0] + np.linspace(0, 1, max(n, 2))[:, None] * (xyz[1] - xyz[0])         # (n, 3)
    moved = places - shift_mm * sagittal.orientation[3:] * np.sign(-sagittal.orientation[5])  # rows run head to foot or foot to head; the reading point goes up
    xy = [axial.to_pixel(places), sagittal.to_pixel(places), sagittal.to_pixel(moved)]
    inside = np.all([(p >= 0).all(1) & (p <= np.array(shape[::-1]) - 1).all(1) for p, shape in zip(xy, (other.shape, image.shape, image.shape), strict=True)], 0)
    if inside.sum() < MIN_SAMPLES: return None
    return np.stack([map_coordinates(np.asarray(i, float), p[inside].T[::-1], order=1) for i, p in zip((other, image, image), xy, strict=True)])


def study_correlations(
    study,             # with pixels
    shift_mm=SHIFT_MM,
):                     # (2,) median Pearson in place, median with the sagittal image moved; number of pairs
    "Agreement of the first sagittal T2 series with all axial series of a study."
    series, found = study.of('sagittal_t2')[0], []
    middle = len(series) // 2
    for i in range(max(middle - 2, 0), min(middle + 3, len(series))):
        plane, image = plane_of(series, i), series.pixels[i]
        for other in study.of('axial_t2'):
            for j in range(len(other)):
                samples = line_samples(plane, image, plane_of(other, j), other.pixels[j], shift_mm)
                if samples is None or (samples.std(1) == 0).any(): continue
                found.append([np.corrcoef(samples[0], s)[0, 1] for s in samples[1:]])
    return (np.median(found, 0) if found else np.full(2, np.nan)), len(found)


def one_study(k, seed, size, prevalence):
    "Medians, number of pairs and the kind of the sagittal series: 'T2' or 'STIR'."
    made = phantom.phantom_study(seed, k, size, prevalence, quirks='none')
    first = made.study.of('sagittal_t2')[0].series_id
    kind = next(q.kind for s, q in zip(made.scans, made.sequences, strict=True) if s.series_id == first)
    return *study_correlations(made.study), kind


def main(argv=None):
    args = parser('intersections', __doc__.split('\n')[0], 40).parse_args(argv)
    answers = pooled(partial(one_study, seed=args.seed, size=args.size, prevalence=args.prevalence), list(range(args.studies)), args.workers, 'studies')
    stir = np.array([a[0] for a in answers if a[2] == 'STIR']).reshape(-1, 2)
    t2 = [a for a in answers if a[2] == 'T2' and np.isfinite(a[0]).all()]
    r, pairs = np.array([a[0] for a in t2]).reshape(-1, 2), sum(a[1] for a in t2)
    if not len(r): raise SystemExit(f'none of {args.studies} studies has a sagittal T2 series that crosses an axial one in {MIN_SAMPLES} samples')
    report = Report('intersections', args, f'{data_of(args, len(r))} with sagittal T2, {pairs} pairs of slices')
    interval = lambda values: bootstrap_interval(lambda rows: np.median(values[rows]), np.arange(len(r)), args.draws, args.seed)
    here, fall = interval(r[:, 0]), bootstrap_interval(lambda rows: np.median(r[rows, 0]) - np.median(r[rows, 1]), np.arange(len(r)), args.draws, args.seed)
    report.add('correlation, median over studies', here, f'{LOW} to {HIGH}', LOW <= here.value <= HIGH)
    report.add(f'the same, sagittal moved {SHIFT_MM:.0f} mm', interval(r[:, 1]))
    report.add('fall', fall, f'>= {FALL}', fall.value >= FALL)
    for q in (0, 100): report.add(f'{"lowest" if q == 0 else "highest"} study', float(np.percentile(r[:, 0], q)))
    if len(stir): report.add('studies with STIR instead: median', float(np.nanmedian(stir[:, 0])), 'fat is dark there', data=data_of(args, len(stir)) + ' with STIR')
    if len(r) + len(stir) < args.studies: report.notes.append(f'{args.studies - len(r) - len(stir)} studies have no pair with {MIN_SAMPLES} samples')
    return report.finish()


if __name__ == '__main__': sys.exit(main())
