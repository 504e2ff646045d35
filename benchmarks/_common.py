"What the benchmarks share: arguments, studies, pools, intervals, and the report that becomes a table and a JSON file."
import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mscan import phantom
from mscan.metrics import Interval

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / 'runs' / 'benchmarks'
Z95 = 1.959964  # 95 %, two-sided, of a normal distribution


def parser(
    name: str,     # of the script
    question: str, # first line of the help
    studies: int,  # default number of studies
) -> argparse.ArgumentParser:
    "The arguments that every benchmark has."
    p = argparse.ArgumentParser(prog=f'python -m benchmarks.{name}', description=question, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--studies', type=int, default=studies, help='phantom studies')
    p.add_argument('--seed', type=int, default=100, help='of the phantom, the folds and the networks')
    p.add_argument('--size', default='demo', help='of the phantom')
    p.add_argument('--prevalence', default='demo', help="of the phantom: 'demo' or 'real'")
    p.add_argument('--workers', type=int, default=2, help='processes, one thread each')
    p.add_argument('--draws', type=int, default=1000, help='of the bootstrap over studies')
    p.add_argument('--out', type=Path, default=RUNS / f'{name}.json', help='JSON report')
    p.add_argument('--check', action='store_true', help='exit with 1 if a limit is not held')
    p.set_defaults(start=time.time())
    return p


def data_of(args, studies=None) -> str:
    "What a figure was measured on."
    return f'phantom, seed {args.seed}, {args.studies if studies is None else studies} studies, size {args.size}, prevalence {args.prevalence}'


def one_thread():
    "Start of every worker: several processes with one thread each beat one process with several."
    import cv2
    import torch
    from threadpoolctl import threadpool_limits
    threadpool_limits(1)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def pooled(
    function,      # a module's function: it is sent to other processes
    jobs: list,
    workers: int,
    label: str='',
) -> list:         # results in the order of the jobs
    "The function over the jobs in `workers` processes; in this one for 1. The results do not depend on the number."
    bar = lambda results: list(tqdm(results, total=len(jobs), desc=label, leave=False))
    if workers < 2 or len(jobs) < 2:
        one_thread()
        return bar(map(function, jobs))
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context('spawn'), initializer=one_thread) as pool: return bar(pool.map(function, jobs))


def delong(
    rating,    # (n,) higher = more likely positive; one row a study
    positive,  # (n,) bool
) -> Interval:
    """AUROC with its 95 % interval, for independent rows; nan bounds with fewer than 2 of either kind. The variance is the larger of DeLong's and of Hanley and
    McNeil's: DeLong's alone is 0 for a rating that never varies."""
    rating, positive = np.asarray(rating, float), np.asarray(positive, bool)
    a, b = rating[positive], rating[~positive]
    wins = (a[:, None] > b[None]) + .5 * (a[:, None] == b[None])     # (positives, negatives)
    if min(wins.shape) < 2: return Interval(float(wins.mean()) if wins.size else float('nan'), float('nan'), float('nan'))
    area, n, m = wins.mean(), len(a), len(b)
    own = wins.mean(1).var(ddof=1) / n + wins.mean(0).var(ddof=1) / m
    hanley = (area * (1 - area) + (n - 1) * (area / (2 - area) - area ** 2) + (m - 1) * (2 * area ** 2 / (1 + area) - area ** 2)) / (n * m)
    half = Z95 * np.sqrt(max(own, hanley))
    return Interval(float(area), float(max(area - half, 0)), float(min(area + half, 1)))


@contextmanager
def panels(
    file: Path,    # of the picture
    count: int=1,  # panels side by side
    width: float=7., height: float=3.,  # of one panel, inches
):                 # list of axes
    "A picture beside a report: made ready, written, closed."
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, count, figsize=(width * count, height), dpi=100, squeeze=False)
    yield list(axes[0])
    fig.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file)
    plt.close(fig)


def plain(value):
    "Numpy, paths and nan as what JSON knows."
    if isinstance(value, dict): return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return [plain(v) for v in value]
    if isinstance(value, np.ndarray): return plain(value.tolist())
    if isinstance(value, np.generic): return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value): return None
    return str(value) if isinstance(value, Path) else value


class Report:
    "Figures with intervals, limits and the data they are of."
    def __init__(self, name: str, args, data: str):
        self.name, self.args, self.data, self.figures, self.notes, self.load = name, args, data, [], [], os.getloadavg()[0]

    def add(self,
        figure: str,     # what was measured
        interval,        # Interval, or a number without one
        limit: str='',   # what it must hold, in words
        ok=None,         # whether it does; None: there is no limit
        data: str='',    # where it is other data than the report's
        **more,          # further facts for the JSON file; quiet=True: a line of the table only where the limit is not held
    ):
        "One line of the table."
        value, low, high = interval if isinstance(interval, tuple) else (interval, None, None)
        self.figures.append(plain(dict(figure=figure, value=value, low=low, high=high, limit=limit, ok=None if ok is None else bool(ok), data=data or self.data, **more)))

    def lines(self) -> list:
        "The table for a terminal."
        number = lambda v: '' if v is None else f'{v:.3f}'
        shown = [f for f in self.figures if not f.get('quiet') or f['ok'] is False]
        width = max([len(f['figure']) for f in shown] + [6])
        rows = [f'{self.name}: {self.data}', f'{"figure":<{width}} {"value":>8} {"95 % interval":>18}  limit']
        for f in shown:
            held = '' if f['ok'] is None else 'held' if f['ok'] else 'NOT HELD'
            between = f'{number(f["low"])} to {number(f["high"])}' if f['low'] is not None else ''
            rows.append(f'{f["figure"]:<{width}} {number(f["value"]):>8} {between:>18}  {f["limit"]:<22} {held}'.rstrip())
        return rows + [f'note: {n}' for n in self.notes]

    def finish(self) -> int:  # exit code
        "Print the table and write the JSON file; 1 if a limit is not held and --check was given."
        seconds = round(time.time() - self.args.start, 1)
        failed = [f['figure'] for f in self.figures if f['ok'] is False]
        if self.name.startswith('speed_'): self.notes.append(f'load of the machine (one minute) before and after: {self.load:.1f}, {os.getloadavg()[0]:.1f}')
        print('\n'.join(self.lines()))
        print(f'{seconds:.0f} s; {"every limit held" if not failed else f"{len(failed)} limits not held"}; {self.args.out}')
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        record = dict(benchmark=self.name, data=self.data, phantom_code=phantom.code_hash(), seconds=seconds, arguments=plain({k: v for k, v in vars(self.args).items() if k != 'start'}), figures=self.figures, notes=self.notes)
        half = self.args.out.with_suffix('.part')
        half.write_text(json.dumps(record, indent=1, allow_nan=False) + '\n', encoding='utf-8')
        os.replace(half, self.args.out)
        return int(bool(failed) and self.args.check)
