"Shared by all tests: one small phantom folder, made once a session, and a bound on threads."
import os
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('YOLO_OFFLINE', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def small_data(tmp_path_factory):
    "A small phantom in the competition's format: 6 studies to train on, 2 to test on. Not to be changed; copy it first."
    from mscan.phantom import make_phantom
    folder = tmp_path_factory.mktemp('phantom') / 'data'
    make_phantom(folder, studies=6, test_studies=2, seed=11, size='small', workers=1, progress=False)
    return folder
