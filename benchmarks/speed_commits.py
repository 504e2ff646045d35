"""Is this commit faster than an earlier one, and does it answer the same? The whole demo by both, at the same time, a core and a thread each, with the same preset on the same phantom.

Both run as clones of their commit. Networks that train along another path of rounding end elsewhere, so the answers of two trainings cannot be compared; what can: what stage 10 prepares, byte for byte, and the answers that both
give with the same networks, those of the earlier commit. A `--preset` of another form than the earlier commit knows fails there."""
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

import mscan
from mscan.rsna import PROBS

from ._common import ROOT, Report, parser

BEFORE = '19b5f3f'     # the last commit before work on speed began
SAME = 1e-6            # largest difference of a probability, with the same networks
PREPARED = ('labels.parquet', 'points.parquet', 'prior.csv', 'slices.parquet', 'studies.parquet', 'cache')
RUN = 'from mscan.runner import mscan_run\nif __name__ == "__main__": mscan_run()\n'
PREDICT = 'from mscan.submission import mscan_predict\nif __name__ == "__main__": mscan_predict()\n'


def tree(folder: Path, commit: str, preset: str) -> Path:
    "A clone at a commit, with today's preset."
    subprocess.run(['git', 'clone', '-q', ROOT, folder], check=True)
    subprocess.run(['git', '-C', folder, 'checkout', '-q', commit], check=True)
    shutil.copy(Path(mscan.__file__).parent / 'presets' / f'{preset}.yaml', folder / 'mscan/presets')
    (folder / 'run.py').write_text(RUN)
    (folder / 'predict.py').write_text(PREDICT)
    return folder


def started(where: Path, core: int, script: str, *args) -> subprocess.Popen:
    "A command of a clone on one core, its log beside it."
    own = dict(PYTHONPATH=str(where), OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', YOLO_OFFLINE='1', YOLO_AUTOINSTALL='0', MPLBACKEND='Agg')
    with open(where.parent / f'{where.name}.log', 'a') as log:
        return subprocess.Popen([sys.executable, where / script, *map(str, args)], cwd=where, env=os.environ | own, stdout=log, stderr=log, preexec_fn=lambda: os.sched_setaffinity(0, {core}))


def both(trees: dict, script: str, args) -> dict:
    "Name -> seconds of a command that all clones carry out at the same time; raises RuntimeError with the log's end where one fails."
    cores, start, took = sorted(os.sched_getaffinity(0)), time.perf_counter(), {}
    if len(cores) < len(trees): raise RuntimeError(f'{len(trees)} runs want {len(trees)} cores, there are {len(cores)}')
    running = {name: started(where, cores[k], script, *args(name)) for k, (name, where) in enumerate(trees.items())}
    while len(took) < len(trees):
        for name, p in running.items():
            if name in took or p.poll() is None: continue
            took[name] = time.perf_counter() - start
            if p.returncode:
                for other in running.values(): other.kill()
                raise RuntimeError(f'{name}: {script} ended with {p.returncode}\n{(trees[name].parent / f"{trees[name].name}.log").read_text()[-2000:]}')
        time.sleep(.2)
    return took


def equal(a: Path, b: Path) -> bool:
    "Whether two files, or the files of two folders, are the same byte for byte. Records of what was read when are no part of a cache."
    if not a.is_dir(): return filecmp.cmp(a, b, shallow=False)
    names = sorted(p.name for p in a.glob('*.npy'))
    return bool(names) and names == sorted(p.name for p in b.glob('*.npy')) and all(filecmp.cmp(a / n, b / n, shallow=False) for n in names)


def stage_seconds(run: Path) -> dict:
    "Stage -> seconds, as the manifests have it."
    return {p.parent.name: json.loads(p.read_text())['seconds'] for p in sorted(run.glob('*/manifest.json'))}


def main(argv=None) -> int:
    p = parser('speed_commits', __doc__.split('\n')[0], 0)
    p.add_argument('--before', default=BEFORE, help='the earlier commit')
    p.add_argument('--data_dir', type=Path, default=Path('data/demo'), help='a phantom')
    p.add_argument('--preset', default='demo')
    args = p.parse_args(argv)
    data = args.data_dir.resolve()
    with tempfile.TemporaryDirectory() as place:
        trees = {name: tree(Path(place) / name, commit, args.preset) for name, commit in (('before', args.before), ('after', 'HEAD'))}
        runs = {name: Path(place) / f'run_{name}' for name in trees}
        took = both(trees, 'run.py', lambda name: ('--data_dir', data, '--run_dir', runs[name], '--preset', args.preset))
        both(trees, 'predict.py', lambda name: ('--run_dir', runs['before'], '--data_dir', data, '--out', Path(place) / f'out_{name}', '--device', 'cpu'))
        a, b = (pd.read_csv(Path(place) / f'out_{name}/submission.csv') for name in trees)
        stages = {name: stage_seconds(run) for name, run in runs.items()}
        prepared = {name: equal(*(runs[n] / '10_prepare' / name for n in trees)) for name in PREPARED}
    report = Report('speed_commits', args, f'preset {args.preset}, phantom {data.name}; {args.before} and HEAD at the same time, a core and a thread each')
    ratio = took['after'] / took['before']
    report.add('seconds after / before, the whole run', ratio, '< 1', ratio < 1, **took)
    for stage in stages['after']:
        if stage in stages['before']: report.add(f'{stage}: after / before', stages['after'][stage] / stages['before'][stage], before=stages['before'][stage], after=stages['after'][stage])
    report.add(f'of {len(PREPARED)} products of stage 10, the same byte for byte', sum(prepared.values()), str(len(PREPARED)), all(prepared.values()), which=prepared)
    rows = list(a.row_id) == list(b.row_id)
    apart = float(np.abs(a[list(PROBS)].to_numpy() - b[list(PROBS)].to_numpy()).max()) if rows else float('nan')
    report.add('largest difference of a probability, same networks', apart, f'<= {SAME}', rows and apart <= SAME, rows=len(a))
    return report.finish()


if __name__ == '__main__': sys.exit(main())
