"Shared by all tests: a small phantom folder and a run of all stages, made once a session, and a bound on threads."
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('YOLO_OFFLINE', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')   # expected figures are a CPU's, and a GPU's convolutions round otherwise; CUDA_VISIBLE_DEVICES=0 runs the tests on it

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def small_data(tmp_path_factory):
    "A small phantom in the competition's format: 6 studies to train on, 2 to test on. Not to be changed; copy it first."
    from mscan.phantom import make_phantom
    folder = tmp_path_factory.mktemp('phantom') / 'data'
    make_phantom(folder, studies=6, test_studies=2, seed=11, size='small', workers=1, progress=False)
    return folder


BIN = Path(sys.executable).parent
ENV = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg')   # two threads a process on two busy cores wait for each other for minutes
SMOKE = ['--preset', 'smoke', '-p', 'view_dropout', '0.1',      # smoke's U-Net has learned nothing: most of its points meet no axial slice
         '-p', '31_encoders.features', 'in_fold,oof', '-p', '31_encoders.parts', '2', '-p', '42_grading.features', 'oof', '-p', 'variants', 'sagittal_gru,mscan,mscan_oof',
         '-p', '31_encoders.sides', 'true', '-p', '42_grading.model', 'bilateral', '-p', 'contrast_dropout', '0.5', '-p', '42_grading.views', '1']


def command(name, *args, ok=True):
    done = subprocess.run([BIN / name, *map(str, args)], capture_output=True, text=True, env=ENV)
    assert (done.returncode == 0) == ok, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def made_once(factory, name, make):
    "What `make(folder)` fills and returns (as JSON holds it), once for all workers of a session; a folder of its own in $MSCAN_TEST_KEEP outlasts it."
    root = Path(os.environ.get('MSCAN_TEST_KEEP') or (factory.getbasetemp().parent if os.environ.get('PYTEST_XDIST_WORKER') else factory.getbasetemp()))
    folder, note = root / name, root / f'{name}.json'
    with open(root / f'{name}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not note.exists():
            shutil.rmtree(folder, ignore_errors=True)
            note.write_text(json.dumps(make(folder)))
    return folder, json.loads(note.read_text())


def view_of(folder):
    from mscan.dicom import read_series
    return read_series(folder, pixels=False).view


@pytest.fixture(scope='session')
def data(request, tmp_path_factory):
    "The small phantom, with tables that list far more studies than there are images, and test studies broken in seven ways; {study: how}."
    return made_once(tmp_path_factory, 'pipeline', lambda folder: break_studies(request.getfixturevalue('small_data'), folder))


def break_studies(small_data, folder):
    shutil.copytree(small_data, folder)
    test = folder / 'test_images'
    good = sorted(p.name for p in test.iterdir())[0]
    descriptions = pd.read_csv(folder / 'test_series_descriptions.csv', dtype=str)
    mine, broken = descriptions[descriptions.study_id == good], {}

    def copy(number, change):
        target = test / str(number)
        shutil.copytree(test / good, target)
        change(target)
        broken[str(number)] = change.__name__
        return mine.assign(study_id=str(number))

    def without(view): return lambda d: [shutil.rmtree(p) for p in d.iterdir() if view_of(p) == view]
    def no_sagittal_t2(d): without('sagittal_t2')(d)
    def no_sagittal_t1(d): without('sagittal_t1')(d)
    def no_axial(d): without('axial_t2')(d)
    def zero_byte(d): next((p for p in d.iterdir() if view_of(p) == 'axial_t2')).joinpath('1.dcm').write_bytes(b'')
    def truncated(d): f = sorted(next(p for p in d.iterdir() if view_of(p) == 'sagittal_t2').iterdir())[0]; f.write_bytes(f.read_bytes()[:-900])
    def nothing_readable(d): [f.write_bytes(b'no') for f in d.glob('*/*')]
    def empty_folder(d): shutil.rmtree(d); d.mkdir()
    rows = [copy(101 + k, c) for k, c in enumerate((no_sagittal_t2, no_sagittal_t1, no_axial, zero_byte, truncated, nothing_readable, empty_folder))]
    pd.concat([descriptions, *rows]).to_csv(folder / 'test_series_descriptions.csv', index=False)
    train = pd.read_csv(folder / 'train.csv')
    many = pd.concat([train, *[train.assign(study_id=train.study_id + k) for k in range(1, 40)]])
    many.to_csv(folder / 'train.csv', index=False)
    return broken


@pytest.fixture(scope='session')
def run(data, tmp_path_factory):
    "A run of all stages on it."
    return made_once(tmp_path_factory, 'smoke', lambda folder: command('mscan_run', '--data_dir', data[0], '--run_dir', folder, *SMOKE).stdout)
