"Every lesson of every notebook runs and its assertions hold: one subprocess a notebook, so that no kernel state leaks."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize('path', sorted((ROOT / 'nbs').glob('*.ipynb')), ids=lambda p: p.stem)
def test_lessons(path):
    done = subprocess.run([Path(sys.executable).parent / 'nbdev_test', '--path', str(path), '--n_workers', '0', '--do_print'], cwd=ROOT,
                          capture_output=True, text=True, timeout=600, env=os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg'))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
