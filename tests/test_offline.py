"""Ultralytics makes no network attempt: proven in a child process whose sockets are closed and counted.

The child does what stage 40 does: import, build from YAML, train, predict. It has a platform key in its environment and looks like
nothing that would make the library shy (no pytest, no CI variable). The control imports the library bare, and is caught.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

CLOSED = '''
import json, os, socket, sys
attempts = []
def closed(name):
    def call(*args, **kw):
        attempts.append(f'{name}{args[-1:] if name.startswith("socket.") else args[:2]}')
        raise OSError(f'{name}: sockets are closed in this test')
    return call
for name in ('getaddrinfo', 'gethostbyname', 'gethostbyname_ex', 'create_connection'): setattr(socket, name, closed(name))
for name in ('connect', 'connect_ex', 'sendto'): setattr(socket.socket, name, closed('socket.' + name))
'''

STAGE = '''
import numpy as np, cv2
from pathlib import Path
from mscan.yolo import best_boxes, build_yolo, train_yolo, ultralytics_folder
root, rng = Path('set'), np.random.default_rng(0)
for part in ('train', 'validation'):
    for kind in ('images', 'labels'): (root / kind / part).mkdir(parents=True)
    for i in range(4):
        cv2.imwrite(str(root / 'images' / part / f'{i}.png'), rng.integers(0, 255, (64, 64)).astype(np.uint8))
        (root / 'labels' / part / f'{i}.txt').write_text('0 .5 .3 .3 .3')
(root / 'data.yaml').write_text('train: images/train\\nval: images/validation\\nnames: {0: l1_l2, 1: l2_l3}\\n')
build_yolo('yolov8n.yaml', ('l1_l2', 'l2_l3'))
network, history = train_yolo(root / 'data.yaml', epochs=1, size_px=64, batch=4, progress=False)
p, boxes = best_boxes(network, np.zeros((3, 64, 64), np.uint8))
assert p.shape == (3, 2) and len(history) == 1
from ultralytics.utils import SETTINGS, events
assert not SETTINGS['sync'] and not events.events.enabled and not events.events.events
folder = str(ultralytics_folder())
'''

BARE = '''
from ultralytics import YOLO
folder = ''
'''

REPORT = '''
import threading
for thread in threading.enumerate():
    if thread is not threading.current_thread() and not thread.daemon: thread.join(20)
print('REPORT ' + json.dumps(dict(attempts=attempts, folder=folder, key=os.environ.get('ULTRALYTICS_API_KEY'))))
'''


def child(tmp_path, script, **env):
    "Run a script with closed sockets in an empty folder; its report."
    keep = {k: v for k, v in os.environ.items() if not k.startswith(('YOLO_', 'PYTEST_', 'GITHUB_', 'ULTRALYTICS_')) and k != 'CI'}
    root = str(Path(__file__).parents[1])
    keep |= dict(HOME=str(tmp_path / 'home'), PYTHONPATH=root, OMP_NUM_THREADS='1') | env
    (tmp_path / 'home').mkdir(); (tmp_path / 'work').mkdir()
    done = subprocess.run([sys.executable, '-c', CLOSED + script + REPORT], cwd=tmp_path / 'work', env=keep, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('REPORT '))[7:])


def test_training_and_predicting_attempt_no_network(tmp_path):
    key = 'ul_' + '0' * 40
    report = child(tmp_path, STAGE, ULTRALYTICS_API_KEY=key)
    assert report['attempts'] == []
    assert report['key'] == key, 'the user keeps what was in the environment'
    assert not Path(report['folder']).exists(), 'the settings folder goes with the process'
    left = [p for p in (tmp_path / 'home').rglob('*') if p.is_file() and 'ltralytics' in str(p)]
    assert not left and {p.name for p in (tmp_path / 'work').iterdir()} == {'set'}, 'nothing is left at home or in the working folder'
    assert not [p for p in tmp_path.rglob('*') if p.suffix in ('.pt', '.pth', '.pkl')]


def test_the_detector_of_attempts_detects(tmp_path):
    "The control: imported bare, the library looks for the network, and the closed sockets see it."
    assert child(tmp_path, BARE)['attempts']


def test_an_earlier_import_is_refused(tmp_path):
    script = '''
import ultralytics
from mscan.yolo import ultralytics_offline
try:
    with ultralytics_offline(): pass
except RuntimeError as error: assert 'before mscan' in str(error)
else: raise AssertionError('an ultralytics with its own settings was used')
folder = ''
'''
    child(tmp_path, script, YOLO_OFFLINE='1')
