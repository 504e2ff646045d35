"""Crops of the canal as the pipeline cuts them, round the true points, with grade, latent degree and scanner: rendered once, kept under runs/benchmarks/crops.

Convention: crops have a margin (`mscan.crops.MARGIN`) for augmentation; the crop that is graded is the middle `size_px`."""
import hashlib
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from mscan import crops, geometry, images, phantom, projection
from mscan.rsna import LEVELS

from ._common import RUNS, pooled

CANAL = 'spinal_canal_stenosis'
SLICES = 2                            # kept of each view and level, nearest first
SIDE_MM = (crops.SAGITTAL_MM, crops.AXIAL_MM)
SIZE_PX = 64                          # of the demo preset


def nearest_slices(study, xyz_mm):
    "(view, level index, rank, series_id, slice_i) of the slices nearest to the canal points (5, 3)."
    sagittal = study.of('sagittal_t2')[0]
    away = geometry.plane_distances(sagittal, xyz_mm)                                        # (n, 5)
    rows = [('sagittal', j, rank, sagittal.series_id, int(i)) for j in range(len(LEVELS)) for rank, i in enumerate(np.argsort(away[:, j], kind='stable')[:SLICES])]
    chosen = projection.choose_slices(study.of('axial_t2'), xyz_mm, passes=1)
    for level, t in chosen[chosen.used].groupby('level'):
        t = t.sort_values('distance_mm', kind='stable').head(SLICES)
        rows += [('axial', LEVELS.index(level), rank, r.series_id, r.slice_i) for rank, r in enumerate(t.itertuples())]
    return rows


def rendered(
    known,   # PhantomStudy without pixels
    wanted,  # {series_id: sorted slice_i}
):           # {series_id: Series of these slices alone, 8 bits}
    "The wanted slices alone, the very pixels of the whole study; the grey scale of a series comes from its slices that are there."
    scans = {s.series_id: (j, s) for j, s in enumerate(known.scans)}
    place = {(s.series_id, i): (j, int(np.flatnonzero(scan.numbers == s.instance_number[i])[0]))       # slices are sorted in a series, numbered in a scan
             for s in known.study.series if s.series_id in wanted for j, scan in [scans[s.series_id]] for i in wanted[s.series_id]}
    made, found = phantom.paint(known, sorted(place.values())), {}
    for series in known.study.series:
        some = wanted.get(series.series_id)
        if not some: continue
        cut = {f: getattr(series, f)[some] for f in ('image_position', 'image_orientation', 'pixel_spacing', 'shape', 'instance_number', 'stack')}
        found[series.series_id] = images.normalise(replace(series, pixels=[made[place[series.series_id, i]] for i in some], **cut))
    return found


def canal_crops(
    seed: int, k: int,
    size: str='demo',
    side_mm=SIDE_MM,         # of the sagittal and the axial crop that is graded
    size_px: int=SIZE_PX,    # the same in pixels
    prevalence: str='demo',
    scanner=None,            # a profile's name; None: the study's own
) -> dict:                   # sagittal, axial (5, SLICES, M, M) uint8; sagittal_there, axial_there (5, SLICES) bool; level, grade, latent (5,); scanner, study_id
    "Sagittal T2 and axial crops round the true canal points of one study."
    known = phantom.phantom_study(seed, k, size, prevalence, quirks='none', scanner=scanner, pixels=False)
    truth = known.truth[known.truth.condition == CANAL].set_index('level').loc[list(LEVELS)]
    xyz, moved = truth[['x_mm', 'y_mm', 'z_mm']].to_numpy(), {s.series_id: s.shift_mm for s in known.scans}
    rows = nearest_slices(known.study, xyz)
    wanted = {i: sorted({r[4] for r in rows if r[3] == i}) for i in {r[3] for r in rows}}
    series = rendered(known, wanted)
    pictures = crops.Pictures(SimpleNamespace(series=series.values()), images.Preprocess())
    big, sides = round(size_px * crops.MARGIN), dict(zip(('sagittal', 'axial'), side_mm, strict=True))
    out = {v: np.zeros((len(LEVELS), SLICES, big, big), np.uint8) for v in sides} | {f'{v}_there': np.zeros((len(LEVELS), SLICES), bool) for v in sides}
    for view, j, rank, i, slice_i in rows:
        at = wanted[i].index(slice_i)
        xy = geometry.plane_of(series[i], at).to_pixel(xyz[j] + moved[i])
        out[view][j, rank], _, inside = pictures.crop(i, at, xy, sides[view] * big / size_px, big)
        out[f'{view}_there'][j, rank] = inside >= crops.MIN_INSIDE
    return out | dict(level=np.arange(len(LEVELS)), grade=truth.grade.to_numpy(int), latent=truth.latent.to_numpy(float), scanner=known.scanner, study_id=known.study.study_id)


def crop_code() -> str:
    "Names the code that makes the crops: 12 digits."
    files = [Path(__file__), *(Path(m.__file__) for m in (crops, images, projection, geometry))]
    return hashlib.sha256(b''.join([phantom.code_hash().encode(), *(f.read_bytes() for f in files)])).hexdigest()[:12]


def kept(job, folder, size, size_px, prevalence, seed):
    "The file of one study's crops, made where it is not there."
    k, scanner = job
    path = Path(folder) / f'{seed}_{k}_{scanner or "own"}.npz'
    if not path.exists():
        half = path.with_suffix(f'.{os.getpid()}.part')
        with open(half, 'wb') as f: np.savez_compressed(f, **canal_crops(seed, k, size, SIDE_MM, size_px, prevalence, scanner))
        os.replace(half, path)
    return path


def load_crops(
    args,       # seed, size, prevalence, workers of a benchmark
    jobs,       # [(k, scanner or None)]
    size_px: int=SIZE_PX,
) -> SimpleNamespace:  # sagittal, axial (n, SLICES, M, M); *_there; study (n,) 0-based place in jobs; level, grade, latent (n,); scanner (n,)
    "The canal crops of studies, five rows a study, without the levels that one of the views does not reach."
    folder = RUNS / 'crops' / f'{crop_code()}_{args.size}_{args.prevalence}_{size_px}'
    folder.mkdir(parents=True, exist_ok=True)
    paths = pooled(partial(kept, folder=folder, size=args.size, size_px=size_px, prevalence=args.prevalence, seed=args.seed), list(jobs), args.workers, 'crops')
    made = [dict(np.load(p)) for p in paths]
    all_of = {n: np.concatenate([m[n] for m in made]) for n in ('sagittal', 'axial', 'sagittal_there', 'axial_there', 'level', 'grade', 'latent')}
    all_of |= dict(study=np.repeat(np.arange(len(made)), len(LEVELS)), scanner=np.repeat([str(m['scanner']) for m in made], len(LEVELS)))
    both = all_of['sagittal_there'][:, 0] & all_of['axial_there'][:, 0]
    return SimpleNamespace(**{n: v[both] for n, v in all_of.items()}, left_out=int((~both).sum()))


def joined(loads: list) -> SimpleNamespace:
    "Several loads as one; the studies stay apart."
    out, studies = {n: np.concatenate([getattr(c, n) for c in loads]) for n in vars(loads[0]) if n not in ('study', 'left_out')}, []
    for c in loads: studies.append(c.study + (studies[-1].max() + 1 if studies else 0))
    return SimpleNamespace(**out, study=np.concatenate(studies), left_out=sum(c.left_out for c in loads))
