"""Do memory and time a study stay as they are when there are more of them? `mscan_predict` on 10, 30, 100 and 300 studies, each count by a process of its own.

The studies of `--data_dir` are linked again and again under new ids until there are enough: every one is read from its files and graded in full. Memory is the largest that the command's process and its largest child ever held;
time is the command's, less that of the same command for one study, so that loading networks does not pass for growth.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from ._common import ROOT, Report, panels, parser

COUNTS = 10, 30, 100, 300
FLAT = 1.15          # largest time and memory at the largest count, times those at the smallest
COMMAND = '''
import json, resource, sys
from mscan.submission import predict
run, data, out, workers = sys.argv[1:]
predict(run, data, out, 'cpu', progress=False, workers=int(workers))
print(json.dumps([resource.getrusage(w).ru_maxrss / 2**10 for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]))
'''


def linked(data_dir: Path, folder: Path, count: int) -> Path:
    "A competition folder of so many studies, by links to those that are there."
    known = sorted((data_dir / 'test_images').iterdir())
    names = pd.read_csv(data_dir / 'test_series_descriptions.csv', dtype=str)
    (folder / 'test_images').mkdir(parents=True)
    tables = []
    for k in range(count):
        source = known[k % len(known)]
        (folder / 'test_images' / str(10_000 + k)).symlink_to(source.resolve())
        tables.append(names[names.study_id == source.name].assign(study_id=str(10_000 + k)))
    pd.concat(tables).to_csv(folder / 'test_series_descriptions.csv', index=False)
    return folder


def predicted(run_dir: Path, data: Path, out: Path, workers: int) -> tuple:
    "Seconds, MiB of the process, MiB of its largest child."
    start = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', COMMAND, run_dir, data, out, str(workers)], check=True, capture_output=True, text=True, cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    return time.perf_counter() - start, *json.loads(done.stdout.splitlines()[-1])


def plot(file: Path, table: pd.DataFrame):
    with panels(file, 2, 4) as axes:
        for ax, names, unit in ((axes[0], ['seconds a study'], 's'), (axes[1], ['MiB, process', 'MiB, worker'], 'MiB')):
            for n in names: ax.plot(table.studies, table[n], 'o-', label=n)
            ax.set(xscale='log', xlabel='studies', ylabel=unit, ylim=(0, None), xticks=table.studies, xticklabels=table.studies); ax.legend(); ax.minorticks_off()


def main(argv=None) -> int:
    p = parser('speed_growth', 'Do memory and time a study stay as they are when there are more of them?', COUNTS[-1])
    p.add_argument('--run_dir', type=Path, default=Path('runs/demo'), help='a finished run')
    p.add_argument('--data_dir', type=Path, default=Path('data/demo'), help='folder with test_images and their description table')
    args = p.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        place, run = Path(place), args.run_dir.resolve()
        load_s = predicted(run, linked(args.data_dir, place / '1', 1), place / 'out', 1)[0]
        for count in [c for c in COUNTS if c <= args.studies]:
            seconds, own, child = predicted(run, linked(args.data_dir, place / str(count), count), place / 'out', 1)
            rows.append({'studies': count, 'seconds a study': (seconds - load_s) / (count - 1), 'MiB, process': own, 'MiB, worker': child})
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    report = Report('speed_growth', args, f'phantom studies of {args.data_dir.name}, linked; networks of {args.run_dir.name}; one worker on the CPU')
    for name in table.columns[1:]:
        growth = table[name].iloc[-1] / table[name].iloc[0]
        report.add(f'{name}: {table.studies.iloc[-1]} studies / {table.studies.iloc[0]}', growth, f'<= {FLAT}', growth <= FLAT, values=table[name].tolist())
        report.add(f'{name} at {table.studies.iloc[-1]}', float(np.round(table[name].iloc[-1], 3)))
    plot(args.out.with_suffix('.png'), table)
    return report.finish()


if __name__ == '__main__': sys.exit(main())
