"""Are foramina and recesses found, and better than by an offset from the canal point? Both networks of `mscan.sides`, trained on studies of a run, asked about studies that it holds out.

The run must have come at least as far as 20_keypoints: its tables, cache, split and found canal points are read, nothing is written there. Rivals: the fixed offset of `mscan.sides`, and the median offset of each level in the labels of the training studies.
Every labelled side counts: one without an answer is 999 mm and 99 slices off. A recess is measured on the chosen slice of the label's own series that is nearest to the label, where none was chosen on the first pass's nearest slice.
"Canal astray" moves the canal points of each study by one draw along patient x before they are used: does the network see, or does it know the offset? Phantom foramina all lie 16.5 mm from the canal's middle, real ones 8 to 23 mm."""
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from tqdm import tqdm

from mscan import sides
from mscan.evaluate import read_truth
from mscan.foramina import FORAMEN, RECESS, foramen_card, side_errors
from mscan.images import Preprocess
from mscan.keypoints import load_keypoints
from mscan.metrics import bootstrap_interval, paired_bootstrap
from mscan.prepare import load_study, load_tables, read_tables
from mscan.projection import choose_slices
from mscan.recesses import recess_card
from mscan.rsna import LEVELS
from mscan.runs import read_manifest
from mscan.submission import read_normalised
from mscan.training import save_weights

from ._common import Report, one_thread, parser

WITHIN_ONE, FORAMEN_LIMIT_MM, RECESS_LIMIT_MM = .95, 5., 4.   # issue 5
TITLES = {FORAMEN: 'foramen', RECESS: 'recess'}


def known(run_dir: Path) -> SimpleNamespace:
    "Tables of a run, its found canal points and its labelled points by study."
    tables = load_tables(run_dir / '10_prepare')
    found = pd.read_parquet(run_dir / '20_keypoints' / 'points.parquet')
    xyz = {s: t.set_index('level').reindex(LEVELS)[['x_mm', 'y_mm', 'z_mm']].to_numpy(float) for s, t in found.groupby('study_id')}
    return SimpleNamespace(tables=tables, found=xyz, points=dict(tuple(tables.points.groupby('study_id'))), part=tables.studies.set_index('study_id').part)


def some_of(run, part: str, count: int, seed: int) -> list:
    "Study ids of a part that have canal points and labels, `count` of them at random; all for 0."
    ids = [s for s in run.part.index[run.part == part] if s in run.found and s in run.points]
    return sorted(np.random.default_rng(seed).permutation(ids)[:count or None].tolist())


def trained(run, ids, args) -> tuple:
    "Both networks, trained on these studies by the functions of 22_sides, saved, and read back: (mscan.sides.Sides, what was trained)."
    prepare, folder = Preprocess(.8), args.out.with_suffix('')
    offset = lambda what: sides.measured_offset(run.points, run.found, ids, what)
    net, history, slices = sides.train_foramina(sides.foramen_cases(run.tables, run.points, run.found, ids), [], prepare, args.canvas_px, args.canvas_mm, args.encoder, args.width, epochs=args.foramen_epochs, seed=args.seed)
    save_weights(net, folder / 'foramina', foramen_card(args.encoder, args.width, prepare, args.canvas_px, args.canvas_mm, offset(FORAMEN)))
    seconds = history.table.seconds.sum()
    net, history, windows = sides.train_recesses(sides.recess_cases(run.tables, run.points, run.found, ids, prepare, args.window_px), sides.recess_cases(run.tables, {}, {}, [], prepare, args.window_px), args.window_px, 16, args.recess_epochs, seed=args.seed)
    save_weights(net, folder / 'recesses', recess_card(args.window_px, 16, prepare, offset(RECESS)))
    note = f'trained on {slices} sagittal T1 slices in {seconds:.0f} s and on {windows} axial windows in {history.table.seconds.sum():.0f} s, one thread'
    return sides.load_sides(folder / 'foramina', folder / 'recesses'), note


def held_in_run(run, ids):
    "(study id, study, labelled points, found canal points) of studies of the run."
    for s in ids: yield s, load_study(run.tables, s), run.points[s], run.found[s]


def held_out(run_dir: Path, data_dir: Path, count: int):
    "The same of test_images that the run has never seen: canal points by its U-Net, true points of truth.csv in the labels' place, so that no click's error is in the figures."
    manifests = {s: read_manifest(run_dir.absolute(), s) for s in ('10_prepare', '20_keypoints')}
    find, low_high = load_keypoints(manifests['20_keypoints'].dir / 'keypoints', 'cpu'), [manifests['10_prepare'].parameters[k] for k in ('low', 'high')]
    tables, truth = read_tables(data_dir, 'test'), dict(tuple(read_truth(data_dir / 'truth.csv').groupby('study_id')))
    for s in [s for s in tables.studies if s in truth][:count or None]:
        study = read_normalised(data_dir, s, tables.descriptions, *low_high)
        if study.of('sagittal_t2'): yield s, study, truth[s], find(study.of('sagittal_t2')[0]).set_index('level').reindex(LEVELS)[['x_mm', 'y_mm', 'z_mm']].to_numpy(float)


def measure(cases, ask, astray_mm: float=0., seed: int=0) -> dict:
    "{(what, way): a row a labelled side}; with canal points moved along patient x by one draw a study."
    out, rng = {}, np.random.default_rng(seed)
    for s, study, points, canal in tqdm(cases, desc='measure', leave=False):
        xyz = canal + [rng.normal(0, astray_mm), 0, 0]
        for key, table in sides.answers(ask, study, choose_slices(study.of('axial_t2'), xyz), xyz).items():
            out.setdefault(key, []).append(sides.measured(side_errors(table, points, study), points, key[0], s))
    return {k: pd.concat(v, ignore_index=True) for k, v in out.items()}


def share_near(rows, off, most): return float((off[rows] <= most).mean())
def quantile(rows, mm, q): return float(np.quantile(mm[rows], q))


def add_figures(report, found: dict, what: str, args, title: str, limits: bool):
    "Lines for one kind of point: each way, then the network against each rival, paired."
    short, tables = title, {w: found[what, w] for w in sides.WAYS}
    study = pd.factorize(tables['network'].study_id)[0]
    interval = partial(bootstrap_interval, study_ids=study, n=args.draws, seed=args.seed)
    most = FORAMEN_LIMIT_MM if what == FORAMEN else RECESS_LIMIT_MM
    for way, t in tables.items():
        mm, off, held = t.in_plane_mm.to_numpy(float), t.slices_off.to_numpy(float), limits and way == 'network'
        if what == FORAMEN:
            one = interval(partial(share_near, off=off, most=1))
            report.add(f'{short}, {way}: within one slice', one, f'>= {WITHIN_ONE:g}' if held else '', one.value >= WITHIN_ONE if held else None)
            report.add(f'{short}, {way}: exact slice', interval(partial(share_near, off=off, most=0)))
        middle = interval(partial(quantile, mm=mm, q=.5))
        report.add(f'{short}, {way}: median in plane, mm', middle, f'<= {most:g}' if held else '', middle.value <= most if held else None)
        report.add(f'{short}, {way}: p95 in plane, mm', interval(partial(quantile, mm=mm, q=.95)))
    for way in sides.WAYS[1:]:
        gain = paired_bootstrap(*(partial(quantile, mm=tables[w].in_plane_mm.to_numpy(float), q=.5) for w in ('network', way)), study, args.draws, args.seed)
        held = limits and way == 'offset'
        report.add(f'{short}: median, network - {way}, mm', gain, 'interval < 0' if held else '', gain.high < 0 if held else None)
    net = tables['network']
    report.add(f'{short}: answered by the network', float((net.source == 'network').mean()), rows=len(net), lost=int((net.source == 'none').sum()), on_the_labels_series=float(net.same_series.fillna(False).astype(bool).mean()))


def main(argv=None):
    p = parser('sides', __doc__.split('\n')[0], 60)
    p.add_argument('--run_dir', type=Path, default=Path('runs/science'), help='run with a test part, at least as far as 20_keypoints')
    p.add_argument('--part', default='test', help='part that is measured')
    p.add_argument('--data_dir', type=Path, default=None, help="measure the run's own networks on this folder's test_images and truth.csv instead; nothing is trained")
    p.add_argument('--train', type=int, default=120, help='training studies; 0: all')
    p.add_argument('--astray_mm', type=float, default=4., help='standard deviation of the move of "canal astray"; 0: without')
    p.add_argument('--foramen_epochs', type=int, default=3)
    p.add_argument('--recess_epochs', type=int, default=24)
    p.add_argument('--encoder', default='resnet18')
    p.add_argument('--width', type=int, default=8, help="channels of the U-Net's last block")
    p.add_argument('--canvas_px', type=int, default=96)
    p.add_argument('--canvas_mm', type=float, default=3., help='mm a pixel of the canvas')
    p.add_argument('--window_px', type=int, default=64)
    args = p.parse_args(argv)
    one_thread()
    if args.data_dir:
        upstream = read_manifest(args.run_dir.absolute(), '22_sides')
        ask, cases = sides.load_sides(upstream.dir / 'foramina', upstream.dir / 'recesses', upstream.parameters['sides']), list(held_out(args.run_dir, args.data_dir, args.studies))
        report, note = Report('sides', args, f'{len(cases)} held-out studies of {args.data_dir.name}, true points; networks of {args.run_dir.name}'), 'nothing was trained'
    else:
        run = known(args.run_dir)
        ids, own = some_of(run, args.part, args.studies, args.seed), some_of(run, 'train', args.train, args.seed)
        if not ids or not own: raise SystemExit(f'{args.run_dir} has no labelled studies in its train or {args.part} part')
        (ask, note), cases = trained(run, own, args), list(held_in_run(run, ids))
        report = Report('sides', args, f'{args.run_dir.name}, {len(ids)} studies of its {args.part} part; networks trained on {len(own)} others')
    found = measure(cases, ask)
    for what, title in TITLES.items(): add_figures(report, found, what, args, title, limits=True)
    if args.astray_mm:
        found = measure(cases, ask, args.astray_mm, args.seed)
        for what, title in TITLES.items(): add_figures(report, found, what, args, f'{title}, canal astray', limits=False)
    report.notes.append(note)
    return report.finish()


if __name__ == '__main__': sys.exit(main())
