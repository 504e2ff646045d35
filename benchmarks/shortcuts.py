"""Can the worst canal grade of a study be told without looking at the spine: from headers, file sizes, series and slices, or image borders?

A phantom is written in the competition's format, a few studies at a time, read back as any participant would, and deleted. One row a study, repeated stratified
cross-validation; target: worst labelled SCS grade >= Moderate. Then the check of the check: a link is planted in the written files and must be found."""
import hashlib
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
from pydicom.uid import RLELossless
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mscan import dicom, phantom, rsna

from ._common import RUNS, Z95, Report, data_of, delong, parser, pooled

LIMIT, FOUND = .62, .8   # no shortcut: upper 95 % bound at most; a planted link: AUROC at least
RING = 8                 # pixels of the image's border
FAMILIES = ('headers', 'sizes', 'series', 'borders')
CHUNK = 4                # studies on disk at a time, a worker


# ---- what is on disk, as numbers

def summary(name, values) -> dict:
    "min, mean, max, spread and count of numbers."
    v = np.asarray(values, float)
    v = v[np.isfinite(v)]
    facts = dict(min=v.min(), mean=v.mean(), max=v.max(), sd=v.std()) if len(v) else {}
    return {f'{name}.{k}': float(x) for k, x in facts.items()} | {f'{name}.n': float(len(v))}


def numbers(dataset) -> dict:
    "Every element of a header as numbers: values where there are any, else the length of the text. Unique identifiers: see `series_facts`."
    found = {}
    for element in [*getattr(dataset, 'file_meta', []), *dataset]:
        if element.VR in ('UI', 'SQ', 'OB', 'OW', 'UN') or element.keyword in ('PixelData', 'PatientID'): continue
        value = element.value
        values = list(value) if isinstance(value, (list, tuple, pydicom.multival.MultiValue)) else [value]
        if len(values) != 1: found[f'{element.keyword}.values'] = len(values)
        for i, v in enumerate(values):
            try: found[f'{element.keyword}[{i}]'] = float(v)
            except (TypeError, ValueError): found[f'{element.keyword}[{i}].length'] = len(str(v))
    return found


def ring(pixels) -> dict:
    "Mean and spread of the sides and corners of one image, grey values as stored."
    r, p = RING, pixels.astype(np.float32)
    parts = dict(top=p[:r], bottom=p[-r:], left=p[:, :r], right=p[:, -r:], corner_tl=p[:r, :r], corner_tr=p[:r, -r:], corner_bl=p[-r:, :r], corner_br=p[-r:, -r:])
    return {f'{k}.{n}': float(f(v)) for k, v in parts.items() for n, f in (('mean', np.mean), ('sd', np.std))}


def series_facts(study_id, found) -> dict:
    "Counts, directions, stacks, ids: found is a list of (view, series_id, slices read, files, facts of the slices)."
    facts = dict(study_id=float(study_id), series=len(found), files=sum(n for *_, n, _ in found), unread=sum(n - len(s) for *_, n, s in found))
    order = sorted(range(len(found)), key=lambda i: int(found[i][1]))
    for place, i in enumerate(order): facts[f'rank.{found[i][0]}'] = place
    for view in sorted(set(rsna.VIEWS.values())):
        mine = [f for f in found if f[0] == view]
        facts[f'{view}.series'] = len(mine)
        facts |= summary(f'{view}.files', [n for *_, n, _ in mine]) | summary(f'{view}.id', [float(i) for _, i, *_ in mine])
        up, stacks, stack_size, numbers_ = [], [], [], []
        for *_, slices in mine:
            if not slices: continue
            facts_of = [np.array([s[k] for s in slices]) for k in ('position', 'orientation', 'shape', 'spacing')]
            at, stack = dicom.order_slices(*facts_of)
            n = np.array([s['instance_number'] for s in slices])[at]
            numbers_ += n.tolist()
            for s in np.unique(stack): up.append(np.sign(np.diff(n[stack == s])).sum()); stack_size.append((stack == s).sum())
            stacks.append(len(np.unique(stack)))
        facts |= summary(f'{view}.order', up) | summary(f'{view}.stacks', stacks) | summary(f'{view}.stack_size', stack_size) | summary(f'{view}.number', numbers_)
    return facts


def study_features(folder, views, families=FAMILIES) -> dict:  # 'family:name' -> number
    "All families of one study's folder."
    found, elements, sizes, borders = [], {}, {}, {}
    for place in sorted(p for p in Path(folder).iterdir() if p.is_dir()):
        view, slices, files, rings = views.get(place.name, 'none'), [], sorted(place.iterdir()), []
        for file in files:
            sizes.setdefault((view, 'bytes'), []).append(file.stat().st_size)
            try: facts = dicom.read_header(file, 'borders' in families or 'sizes' in families)
            except dicom.DicomError: continue
            dataset = facts.pop('dataset')
            slices.append(facts)
            for k, v in numbers(dataset).items(): elements.setdefault((view, k), []).append(v)
            if 'sizes' in families:
                sizes.setdefault((view, 'beside_pixels'), []).append(file.stat().st_size - len(dataset.PixelData))
                sizes.setdefault((view, 'a_pixel'), []).append(file.stat().st_size / np.prod(facts['shape']))
            if 'borders' in families:
                try: pixels = dicom.read_pixels(dataset)
                except dicom.DicomError: continue
                rings.append(ring(pixels) | dict(whole=float(pixels.mean()), white=float(np.percentile(pixels[::4, ::4], 99))))
        found.append((view, place.name, len(files), slices))
        if rings:
            white = np.mean([r['white'] for r in rings])
            for k in rings[0]:
                borders.setdefault((view, k), []).extend(r[k] for r in rings)
                borders.setdefault((view, f'{k}/white'), []).extend(r[k] / max(white, 1e-6) for r in rings)
    out = {'series': series_facts(Path(folder).name, found)}
    for family, table in (('headers', elements), ('sizes', sizes), ('borders', borders)): out[family] = {k: v for (view, n), values in table.items() for k, v in summary(f'{view}.{n}', values).items()}
    return {f'{family}:{k}': v for family in families for k, v in out[family].items()}


# ---- links that are planted in written files

def datasets(folder, views, view):
    "(file, dataset) of the readable slices of a view, by instance number."
    for place in sorted(Path(folder).iterdir()):
        if views.get(place.name) != view: continue
        for file in sorted(place.iterdir(), key=lambda f: f.stem.zfill(12)):
            try: dicom.read_header(file)
            except dicom.DicomError: continue
            yield file, pydicom.dcmread(file)                             # as a file, to be written again


def plant_spacing(folder, views, worst, strength):
    "PixelSpacing of the sagittal series grows by `strength` a grade of the worst level."
    for view in ('sagittal_t1', 'sagittal_t2'):
        for file, d in datasets(folder, views, view):
            d.PixelSpacing = [round(float(v) * (1 + strength * worst), 4) for v in d.PixelSpacing]
            d.save_as(file)


def plant_sizes(folder, views, worst, strength):
    "Padding behind the pixels, 1000 * `strength` bytes a grade."
    for file, d in datasets(folder, views, 'sagittal_t2'):
        if worst: d.add_new(0xFFFCFFFC, 'OB', bytes(int(500 * strength) * 2 * worst))
        d.save_as(file)


def plant_series(folder, views, worst, strength):
    "The last slices of the sagittal T2 series are lost, 10 * `strength` a grade."
    lost = int(10 * strength * worst)
    for file, _ in list(datasets(folder, views, 'sagittal_t2'))[::-1][:lost]: file.unlink()


def plant_borders(folder, views, worst, strength):
    "The sagittal T1 images get a brighter frame, `strength` of white a grade."
    for file, d in datasets(folder, views, 'sagittal_t1'):
        try: pixels = dicom.read_pixels(d).astype(np.int64)
        except dicom.DicomError: continue
        inner = pixels[RING:-RING, RING:-RING].copy()
        pixels += int(strength * worst * np.percentile(pixels, 99))
        pixels[RING:-RING, RING:-RING] = inner
        signed = bool(d.PixelRepresentation)
        top = min(4095, 2 ** (d.BitsStored - signed) - 1)
        d.compress(RLELossless, np.clip(pixels, 0, top).astype(np.int16 if signed else np.uint16), encoding_plugin='pylibjpeg', generate_instance_uid=False)
        d.save_as(file)


PLANTS = {'spacing': ('headers', plant_spacing), 'sizes': ('sizes', plant_sizes), 'series': ('series', plant_series), 'borders': ('borders', plant_borders)}


# ---- studies -> table

def chunk_features(job, size, prevalence, quirks, plants, strength) -> list:
    "Rows of a few studies that are made, read, planted, read again and deleted: dict(study_id, worst, features, 'planted_<name>/...')."
    seed, count = job
    rows = []
    with tempfile.TemporaryDirectory(prefix='mscan_shortcuts_') as place, warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)                    # blank rows and the like, planted in the tables of every chunk
        out = phantom.make_phantom(Path(place) / 'd', count, 0, seed=seed, workers=1, progress=False, size=size, prevalence=prevalence, quirks=quirks)
        labels, described = rsna.read_train(out / 'train.csv'), rsna.read_descriptions(out / 'train_series_descriptions.csv')
        canal = labels[(labels.condition == rsna.CONDITIONS[0]) & labels.grade.notna()].groupby('study_id').grade.max()
        for study_id, worst in canal.items():
            folder, mine = out / 'train_images' / study_id, described[described.study_id == study_id]
            if not folder.is_dir(): continue
            views = dict(zip(mine.series_id, mine['view'], strict=True))
            row = dict(study_id=study_id, worst=int(worst)) | study_features(folder, views)
            for name in plants:
                family, plant = PLANTS[name]
                plant(folder, views, int(worst), strength)
                row |= {f'planted_{name}/{k}': v for k, v in study_features(folder, views, (family,)).items()}
            rows.append(row)
    return rows


def features(args) -> pd.DataFrame:
    "The table of all studies; kept, since it is what takes the minutes."
    own = hashlib.sha256(Path(__file__).read_bytes() + phantom.code_hash().encode()).hexdigest()[:12]
    path = RUNS / f'shortcuts_{own}_{args.seed}_{args.studies}_{args.size}_{args.prevalence}_{args.quirks}_{"-".join(args.plant) or "none"}_{args.strength}.parquet'
    if path.exists(): return pd.read_parquet(path)
    jobs = [(args.seed * 100_003 + i, min(CHUNK, args.studies - CHUNK * i)) for i in range(-(-args.studies // CHUNK))]
    one = partial(chunk_features, size=args.size, prevalence=args.prevalence, quirks=args.quirks, plants=args.plant, strength=args.strength)
    table = pd.DataFrame([r for rows in pooled(one, jobs, args.workers, f'{CHUNK} studies') for r in rows])
    counts = [c for c in table if c.endswith('.n')]
    table[counts] = table[counts].fillna(0)                             # what a study does not have, it has zero times
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)
    return table


# ---- the checker

def models(seed) -> dict:
    "Two learners that fail in different ways: straight lines, and steps."
    return {'logistic': make_pipeline(SimpleImputer(strategy='median', keep_empty_features=True), StandardScaler(), LogisticRegression(C=.03, max_iter=2000)),
            'boosting': make_pipeline(SimpleImputer(strategy='constant', fill_value=-1e6, keep_empty_features=True), HistGradientBoostingClassifier(max_iter=40, max_leaf_nodes=5, min_samples_leaf=15, max_bins=48, l2_regularization=1., random_state=seed))}


def cross_ratings(
    table: pd.DataFrame,  # (n studies, features), nan = not there
    positive,             # (n,) bool
    model,
    folds: int=5, repeats: int=5, seed: int=0,
) -> np.ndarray:          # (n,) mean rank 0..1 among the studies of the same test fold
    "Held-out ratings, one a study. Ranks within a fold: no fold's offset, which is tied to its own share of positives, can count."
    rating = np.zeros(len(table))
    for r in range(repeats):
        for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed + r).split(table, positive):
            p = model.fit(table.iloc[train], positive[train]).predict_proba(table.iloc[test])[:, 1]
            rating[test] += (pd.Series(p).rank().to_numpy() - .5) / len(test) / repeats
    return rating


def examine(
    table: pd.DataFrame,  # numbers; columns that never vary or repeat another are dropped
    positive,             # (n,) bool
    folds: int=5, repeats: int=5, seed: int=0,
) -> dict:                # model -> Interval of AUROC (DeLong)
    "How well the target can be told from one family of features."
    positive = np.asarray(positive, bool)
    table = table.loc[:, table.nunique(dropna=False) > 1].astype(float).T.drop_duplicates().T
    folds = min(folds, positive.sum(), (~positive).sum())
    if folds < 2: raise ValueError(f'{positive.sum()} positive of {len(positive)} studies: too few of one kind to cross-validate')
    if not table.shape[1]: return {name: delong(np.zeros(len(positive)), positive) for name in models(seed)}
    return {name: delong(cross_ratings(table, positive, model, folds, repeats, seed), positive) for name, model in models(seed).items()}


def main(argv=None):
    p = parser('shortcuts', __doc__.split('\n')[0], 480)
    p.set_defaults(prevalence='real')   # a third of the studies positive: noise alone stays below the limit more surely than with the three quarters of 'demo'
    p.add_argument('--plant', nargs='*', default=list(PLANTS), choices=list(PLANTS), help='links to plant; nothing after --plant: only the plain check')
    p.add_argument('--strength', type=float, default=.2, help='of a planted link, a grade')
    p.add_argument('--quirks', default='real', help="of the phantom: 'none', 'real' or 'all'")
    p.add_argument('--repeats', type=int, default=5, help='of the 5-fold cross-validation')
    args = p.parse_args(argv)
    table = features(args)
    positive = (table.worst > 0).to_numpy()
    if not 1 < positive.sum() < len(table) - 1: raise SystemExit(f'{positive.sum()} of {len(table)} studies are Moderate or worse: too few of one kind, take more --studies')
    report = Report('shortcuts', args, data_of(args, len(table)) + f', quirks {args.quirks}')
    report.add('share of studies Moderate or worse', float(positive.mean()))
    report.add('upper bound of a fair coin, expected', .5 + Z95 * np.sqrt((len(table) + 1) / 12 / max(positive.sum() * (~positive).sum(), 1)), 'well below ' + str(LIMIT))
    sections = [(f, f'{f}:', f, False) for f in FAMILIES] + [(f'planted {n}', f'planted_{n}/', PLANTS[n][0], True) for n in args.plant]
    for title, prefix, family, planted in sections:
        columns = [c for c in table if c.startswith(prefix)]
        found = examine(table[columns], positive, repeats=args.repeats, seed=args.seed)
        best = max(found.values()).value
        for name, interval in found.items():
            if planted: limit, ok = f'best of both >= {FOUND}', best >= FOUND
            else: limit, ok = f'upper bound <= {LIMIT}', interval.high <= LIMIT
            report.add(f'{title}, {name}', interval, limit, ok, family=family, features=len(columns), planted=planted)
    return report.finish()


if __name__ == '__main__': sys.exit(main())
