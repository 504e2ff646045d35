"""How long does stage 10 take beside the bare reading of its files, and how long does it take the second time?

Three things are timed in turn, again and again: `pydicom.dcmread(f).pixel_array` (pylibjpeg) over all files in so many processes that are up and warm and have never imported mscan; `prepare` into an empty
folder with as many processes, and within it the reading alone (headers and pixels, 8 bits, cache, index; not the tables, labels, points and coverage); and the same `prepare` once more. Each repetition gives its
ratios, the report their medians. The files are in the system's cache on both sides. Data: the phantom as it is, and its slices enlarged to --side pixels, which is a common size of real ones."""
import json
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pydicom
from pydicom.uid import RLELossless

from mscan import prepare as stage
from mscan.phantom import make_phantom
from mscan.workers import pooled

from ._common import RUNS, Report, data_of, panels, parser

FIRST, SECOND = 1.3, .05   # at most: a first prepare by the bare reading, a second by the first
KINDS = ('bare reading', 'reading of the first prepare', 'first prepare', 'second prepare')


class Bare:
    "Processes that read lists of files and do nothing else."
    def __init__(self, workers):
        self.all = [subprocess.Popen([sys.executable, Path(__file__).with_name('_plain.py')], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(workers)]

    def read(self, files):
        for k, p in enumerate(self.all): p.stdin.write(json.dumps(files[k::len(self.all)]) + '\n'); p.stdin.flush()   # every other file: as even as can be
        for p in self.all:
            if p.stdout.readline() != 'done\n': raise RuntimeError('a process that reads has ended')

    def close(self):
        for p in self.all: p.stdin.close(); p.wait()


def enlarge(pair, side):
    "One file, its pixels on `side` columns, the millimetres unchanged."
    source, target = pair
    d = pydicom.dcmread(source)
    scale = side / d.Columns
    pixels = cv2.resize(d.pixel_array, (side, round(d.Rows * scale)), interpolation=cv2.INTER_LINEAR)
    d.Rows, d.Columns = pixels.shape
    d.PixelSpacing = [round(float(v) / scale, 6) for v in d.PixelSpacing]
    d.compress(RLELossless, pixels, encoding_plugin='pylibjpeg', generate_instance_uid=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    d.save_as(target)


def enlarged(data, side, workers):
    "The phantom with larger slices; made once."
    out = data.with_name(f'{data.name}_{side}')
    if (out / 'made').exists(): return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for f in data.glob('*.csv'): shutil.copy(f, out)
    files = sorted(data.glob('*_images/*/*/*.dcm'))
    pooled(partial(enlarge, side=side), [(f, out / f.relative_to(data)) for f in files], workers, f'{side} pixels')
    (out / 'made').touch()
    return out


def timed(work, *args):
    "Seconds, and what it returns."
    start = time.perf_counter()
    result = work(*args)
    return time.perf_counter() - start, result


def measure(data, workers, repeats, say=print):
    "(repeats, 4) seconds of KINDS, and how many files and pixels there are."
    files = [str(f) for f in sorted(data.glob('*_images/*/*/*.dcm'))]
    bare, seconds, reading, real = Bare(workers), [], [], stage.read_studies

    def read_timed(*args):
        took, result = timed(real, *args)
        reading.append(took)
        return result
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'out'
        again = lambda: stage.prepare(data, out, validation=.2, test=.2, workers=workers, progress=False)
        stage.read_studies = read_timed
        try:
            bare.read(files); again()                                              # warm: imports, files in the system's cache
            for k in range(repeats):
                shutil.rmtree(out)
                out.mkdir()
                (alone, _), (first, _), (second, tables) = timed(bare.read, files), timed(again), timed(again)
                if tables.read: raise RuntimeError(f'the second prepare has read {tables.read} studies')
                seconds.append((alone, reading[-1], first, second))
                say(f'{k + 1} of {repeats}: ' + ', '.join(f'{n} {s:.2f} s' for n, s in zip(KINDS, seconds[-1], strict=True)))
        finally: stage.read_studies = real
        size = int((tables.slices['rows'] * tables.slices['columns']).sum())
    bare.close()
    return np.array(seconds), len(files), size


def draw(found, path):
    "Seconds of every repetition, one panel a data set."
    with panels(path, len(found), 5, 3.2) as axes:
        for ax, (name, (seconds, files, _)) in zip(axes, found.items(), strict=True):
            for k, kind in enumerate(KINDS):
                ax.bar(k, np.median(seconds[:, k]), color=('tab:gray', 'tab:blue', 'tab:cyan', 'tab:green')[k], alpha=.5)
                ax.plot(np.full(len(seconds), k) + np.linspace(-.2, .2, len(seconds)), seconds[:, k], 'k.', ms=4)
                ax.text(k, np.median(seconds[:, k]), f'{np.median(seconds[:, k]):.2f} s', ha='center', va='bottom', fontsize=8)
            ax.set_xticks(range(4), [k.replace(' of the', '\nof the') for k in KINDS], fontsize=7); ax.set_ylabel(f'seconds for {files} files'); ax.set_title(name, fontsize=9)


def main(argv=None):
    p = parser('speed_prepare', __doc__.split('\n')[0], 24)
    p.add_argument('--repeats', type=int, default=7, help='of the three timings, in turn')
    p.add_argument('--side', type=int, default=512, help='columns of the enlarged slices; 0: only the phantom as it is')
    args = p.parse_args(argv)
    data = RUNS / 'speed_data' / f'{args.size}_{args.seed}_{args.studies}'
    make_phantom(data, studies=args.studies - 4, test_studies=4, seed=args.seed, size=args.size, prevalence=args.prevalence, workers=args.workers)
    sets = {'phantom as it is': data} | ({f'enlarged to {args.side} columns': enlarged(data, args.side, args.workers)} if args.side else {})
    report = Report('speed_prepare', args, f'{data_of(args)}; {args.workers} processes on either side, {args.repeats} repetitions, least and largest in place of an interval')
    found = {}
    for name, folder in sets.items():
        seconds, files, size = found[name] = measure(folder, args.workers, args.repeats, lambda text, name=name: print(f'{name}: {text}', flush=True))
        line = lambda values: (float(np.median(values)), float(values.min()), float(values.max()))
        for what, ratio, limit in (('reading of the first prepare / bare reading', seconds[:, 1] / seconds[:, 0], FIRST), ('first prepare / bare reading', seconds[:, 2] / seconds[:, 0], None), ('second prepare / first', seconds[:, 3] / seconds[:, 2], SECOND)):
            report.add(f'{what}, {name}', line(ratio), f'median <= {limit}' if limit else '', np.median(ratio) <= limit if limit else None)
        for k, kind in enumerate(KINDS): report.add(f'{kind}, s, {name}', line(seconds[:, k]))
        report.add(f'first prepare, slices a second, {name}', line(files / seconds[:, 2]))
        report.notes.append(f'{name}: {files} files, {size / 1e6:.0f} megapixels')
    draw(found, args.out.with_suffix('.png'))
    return report.finish()


if __name__ == '__main__': sys.exit(main())
