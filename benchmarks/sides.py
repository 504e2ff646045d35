"""Are foramina and recesses found, and better than by a fixed offset from the canal point? Both networks of `mscan.sides`, trained on studies of a run, asked about studies that it holds out.

The run must have come at least as far as 20_keypoints: its tables, cache and split are read, and its canal points, nothing is written there. Points of training studies come from labels, where there are any; those of the studies that are measured from the run's U-Net.
Every labelled side counts: one without an answer is 999 mm and 99 slices off. A recess is measured on the chosen slice of the label's own series that is nearest to the label, or where none was chosen on the first pass's nearest slice."""
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from torch.utils.data import DataLoader
from tqdm import tqdm

from mscan import sides
from mscan.images import Preprocess
from mscan.keypoints import KeypointNet, canal_points
from mscan.metrics import bootstrap_interval, paired_bootstrap
from mscan.prepare import load_study, load_tables
from mscan.projection import choose_slices
from mscan.rsna import LEVELS
from mscan.training import fit, save_weights, seed_everything

from ._common import Report, one_thread, parser

LOST_MM, LOST_SLICES = 999., 99
WITHIN_ONE, FORAMEN_LIMIT_MM, RECESS_LIMIT_MM = .95, 5., 4.   # issue 5
SIGMA_MM = 5.                                                 # of the foramen's target Gaussian, as of the canal point's


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


def labelled_canal(run, study_id):
    "(5, 3) mm: the labelled canal points, the found ones where there is no label."
    xyz = canal_points(run.points[study_id])
    return np.where(np.isfinite(xyz), xyz, run.found[study_id])


def foramen_network(run, ids, args):
    "Trained on the sagittal T1 series of these studies."
    seed_everything(args.seed)
    prepare, studies = Preprocess(.8), []
    for s in ids:
        points, t1 = run.points[s], load_study(run.tables, s).of('sagittal_t1')
        if t1: studies.append((t1[0], sides.side_points(points[points.series_id == t1[0].series_id], sides.FORAMEN), labelled_canal(run, s)))
    data = sides.ForamenSet(studies, prepare, args.canvas_px, args.canvas_mm, augment=True, seed=args.seed)
    net = KeypointNet(args.encoder, width=args.width)
    history = fit(net, sides.foramen_loss(SIGMA_MM / args.canvas_mm, args.canvas_px), DataLoader(data, 8, shuffle=True, drop_last=True), epochs=args.foramen_epochs, lr=2e-3, device='cpu', seed=args.seed, label='foramina')
    save_weights(net, args.out.with_suffix('') / 'foramina', sides.foramen_card(args.encoder, args.width, prepare, args.canvas_px, args.canvas_mm))
    return sides.load_foramina(args.out.with_suffix('') / 'foramina'), len(data), history.table.seconds.sum()


def recess_network(run, ids, args):
    "Trained on the axial slices chosen for these studies."
    seed_everything(args.seed)
    prepare, parts = Preprocess(.8), []
    for s in tqdm(ids, desc='windows', leave=False):
        study, xyz = load_study(run.tables, s), labelled_canal(run, s)
        parts.append(sides.recess_windows(study, run.points[s], choose_slices(study.of('axial_t2'), xyz), xyz, sides.Windows(study, prepare, args.window_px)))
    images, offsets = (np.concatenate(a) for a in zip(*parts, strict=True))
    net = sides.RecessNet(args.window_px, 16)
    history = fit(net, sides.recess_loss, DataLoader(sides.RecessSet(images, offsets, augment=True, seed=args.seed), 32, shuffle=True, drop_last=True), epochs=args.recess_epochs, lr=2e-3, device='cpu', seed=args.seed, label='recesses')
    save_weights(net, args.out.with_suffix('') / 'recesses', sides.recess_card(args.window_px, 16, prepare))
    return sides.load_recesses(args.out.with_suffix('') / 'recesses'), len(images), history.table.seconds.sum()


def measured(errors: pd.DataFrame, points: pd.DataFrame, what: str, study_id: str) -> pd.DataFrame:
    "A row for every labelled side of a study, with an answer or without."
    labels = points[points.condition.str.endswith(what)].drop_duplicates(['condition', 'level'])[['condition', 'level']]
    best = errors.assign(other=~errors.same_series, later=errors.get('pass_i', 0), far=np.where(errors.same_series, errors.through_mm, errors.get('distance_mm', 0.)))
    best = best.sort_values(['other', 'far', 'later'], kind='stable').drop_duplicates(['condition', 'level'])
    rows = labels.merge(best, on=['condition', 'level'], how='left').assign(study_id=study_id)
    return rows.fillna(dict(in_plane_mm=LOST_MM, slices_off=LOST_SLICES, source='none'))


def measure(run, ids, foramina, recesses) -> dict:
    "{(what, 'network' or 'offset'): a row a labelled side}."
    out = {(w, n): [] for w in (sides.FORAMEN, sides.RECESS) for n in ('network', 'offset')}
    for s in tqdm(ids, desc='measure', leave=False):
        study, points, xyz = load_study(run.tables, s), run.points[s], run.found[s]
        t1, chosen = study.of('sagittal_t1'), choose_slices(study.of('axial_t2'), xyz)
        chosen = chosen[chosen.used]
        add = lambda what, name, table: out[what, name].append(measured(sides.side_errors(table, points, study), points, what, s))  # noqa: B023
        if t1:
            add(sides.FORAMEN, 'network', foramina(t1[0], xyz)); add(sides.FORAMEN, 'offset', sides.offset_foramina(t1[0], xyz))
        add(sides.RECESS, 'network', recesses(study, chosen, xyz)); add(sides.RECESS, 'offset', sides.offset_recesses(study, chosen, xyz))
    return {k: pd.concat(v, ignore_index=True) for k, v in out.items()}


def main(argv=None):
    p = parser('sides', __doc__.split('\n')[0], 60)
    p.add_argument('--run_dir', type=Path, default=Path('runs/science'), help='run with a test part, at least as far as 20_keypoints')
    p.add_argument('--part', default='test', help='part that is measured')
    p.add_argument('--train', type=int, default=120, help='training studies; 0: all')
    p.add_argument('--foramen_epochs', type=int, default=3)
    p.add_argument('--recess_epochs', type=int, default=12)
    p.add_argument('--encoder', default='resnet18')
    p.add_argument('--width', type=int, default=8, help="channels of the U-Net's last block")
    p.add_argument('--canvas_px', type=int, default=128)
    p.add_argument('--canvas_mm', type=float, default=2.25, help='mm a pixel of the canvas')
    p.add_argument('--window_px', type=int, default=64)
    args = p.parse_args(argv)
    one_thread()
    run = known(args.run_dir)
    ids = some_of(run, args.part, args.studies, args.seed)
    own = some_of(run, 'train', args.train, args.seed)
    foramina, slices, seconds = foramen_network(run, own, args)
    recesses, windows, more = recess_network(run, own, args)
    found = measure(run, ids, foramina, recesses)
    report = Report('sides', args, f'{args.run_dir.name}, {len(ids)} studies of its {args.part} part; networks trained on {len(own)} others ({slices} sagittal T1 slices, {windows} axial windows)')
    report.notes.append(f'trained in {seconds:.0f} and {more:.0f} s')
    for what, short in ((sides.FORAMEN, 'foramen'), (sides.RECESS, 'recess')):
        both = {n: found[what, n] for n in ('network', 'offset')}
        study = pd.factorize(both['network'].study_id)[0]
        for name, limit in (('network', True), ('offset', None)):
            t = both[name]
            mm, off = t.in_plane_mm.to_numpy(float), t.slices_off.to_numpy(float)
            interval = lambda f: bootstrap_interval(f, study, args.draws, args.seed)  # noqa: B023
            if what == sides.FORAMEN:
                one = interval(lambda rows: float((off[rows] <= 1).mean()))  # noqa: B023
                report.add(f'foramen, {name}: within one slice', one, f'>= {WITHIN_ONE:g}' if limit else '', one.value >= WITHIN_ONE if limit else None)
                report.add(f'foramen, {name}: exact slice', interval(lambda rows: float((off[rows] == 0).mean())))  # noqa: B023
            most = FORAMEN_LIMIT_MM if what == sides.FORAMEN else RECESS_LIMIT_MM
            middle = interval(lambda rows: float(np.median(mm[rows])))  # noqa: B023
            report.add(f'{short}, {name}: median in plane, mm', middle, f'<= {most:g}' if limit else '', middle.value <= most if limit else None)
            report.add(f'{short}, {name}: p95 in plane, mm', interval(lambda rows: float(np.quantile(mm[rows], .95))))  # noqa: B023
        gain = paired_bootstrap(*(partial(lambda rows, mm: float(np.median(mm[rows])), mm=both[n].in_plane_mm.to_numpy(float)) for n in ('network', 'offset')), study, args.draws, args.seed)
        report.add(f'{short}: median, network - offset, mm', gain, 'interval < 0', gain.high < 0)
        report.add(f'{short}: answered by the network', float((both['network'].source == 'network').mean()), lost=int((both['network'].source == 'none').sum()))
    return report.finish()


if __name__ == '__main__': sys.exit(main())
