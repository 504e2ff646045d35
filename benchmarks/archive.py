"""How many studies an hour are prepared and graded, by local processes and on Ray, and what would a million take? Figures for docs/devices.md.

The same phantom studies are read and graded twice as often as needed to tell what a study costs from what a start costs: a few of them, then all. The files lie in the system's cache of pages, so that reading costs what decoding costs and no disk is measured.
"""
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from mscan.phantom import make_phantom
from mscan.prepare import prepare
from mscan.submission import predict

from ._common import Report, data_of, parser

MILLION = 1_000_000
REAL = dict(studies=1975, files=147_218, gb=35.)  # the competition's training images, as unpacked


def part_of(data: Path, out: Path, studies: int) -> Path:
    "The data set with so many of its test studies; the files are links."
    shutil.copytree(data, out, copy_function=os.link)
    for folder in sorted((out / 'test_images').iterdir())[studies:]: shutil.rmtree(folder)
    return out


def seconds(work, *given, **how) -> float:
    begun = time.perf_counter()
    work(*given, **how)
    return time.perf_counter() - begun


def bytes_of(*folders) -> int: return sum(f.stat().st_size for folder in folders for f in Path(folder).rglob('*') if f.is_file())


def main(argv=None):
    p = parser('archive', __doc__.split('\n')[0], 24)
    p.add_argument('--run_dir', type=Path, default=Path('runs/demo'), help='finished run')
    p.add_argument('--engines', default='local,ray', help='what is timed')
    args = p.parse_args(argv)
    run, few = args.run_dir.absolute(), max(1, args.studies // 4)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = make_phantom(folder / 'data', studies=4, test_studies=args.studies, seed=args.seed, size=args.size, prevalence=args.prevalence, workers=args.workers)
        parts = {n: part_of(data, folder / f'part_{n}', n) for n in (few, args.studies)}
        report = Report('archive', args, f'{data_of(args)}; networks of {run.name}; {args.workers} processes of one thread; {os.cpu_count()} cores')
        dicom = bytes_of(data / 'test_images') / args.studies
        for engine in args.engines.split(','):
            how = dict(workers=args.workers, progress=False, engine=engine)
            read = {n: seconds(prepare, d, folder / f'{engine}_{n}', **how) for n, d in parts.items()}
            grade = {n: seconds(predict, run, d, folder / f'{engine}_out_{n}', 'cpu', **how) for n, d in parts.items()}
            for what, took in (('prepare', read), ('predict', grade)):
                study = (took[args.studies] - took[few]) / (args.studies - few)
                report.add(f'{what}, {engine}: studies an hour', 3600 / study, seconds=took)
                report.add(f'{what}, {engine}: seconds before and after', took[few] - study * (few + 4 * (what == 'prepare')))
                if what == 'prepare': report.add(f'{what}, {engine}: MB of DICOM a second and core', dicom / 1e6 / study / args.workers)
                report.add(f'{what}, {engine}: core hours for a million studies like these', study * args.workers * MILLION / 3600)
        cache = bytes_of(folder / f'{engine}_{args.studies}' / 'cache') / (args.studies + 4)
        rows = bytes_of(folder / f'{engine}_out_{args.studies}') / args.studies
    report.add('MB of DICOM a study', dicom / 1e6, quiet=False)
    report.add('MB of cache a study', cache / 1e6)
    report.add('kB of submission.csv and provenance.csv a study', rows / 1e3)
    report.notes.append(f"a study of the competition has {REAL['gb'] * 1e3 / REAL['studies']:.1f} MB in {REAL['files'] / REAL['studies']:.0f} files")
    return report.finish()


if __name__ == '__main__': sys.exit(main())
