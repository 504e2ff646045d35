"A run that a launcher starts twice: one run comes out, trained by both. The processes are started by hand, with the variables that torchrun sets, and once by torchrun."
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mscan.ranks import free_port
from mscan.runs import read_manifest
from mscan.training import load_weights
from test_runs import CLI, write_notebook
from test_training import distance, network

HERE = Path(__file__).parent
TRAIN = '''
import os, torch
from mscan.training import fit, save_weights
from test_training import CARD, DataLoader, loss, network, problem
model = network()
history = fit(model, loss, DataLoader(problem(24), batch_size=batch, shuffle=True), DataLoader(problem(30, seed=7), batch_size=30), epochs=3, lr=.02, accumulation=accumulation, device='cpu', progress=False)
number = int(stage.upstream('10_prepare').path('number').read_text())
save_weights(model, stage.dir/'net', CARD | dict(number=number, losses=history.table[['train_loss', 'validation_loss']].values.tolist()))
for name in ('net.safetensors', 'net.json'): stage.product(name)
'''
ALONE = '''
import os
assert 'RANK' not in os.environ and 'WORLD_SIZE' not in os.environ
if fail: raise ValueError('prepared for nothing')
with open(stage.run_dir/'times', 'a') as f: f.write('once ')
stage.product('number', 'number.txt').write_text('3')
'''


@pytest.fixture
def place(tmp_path):
    (tmp_path/'nbs').mkdir(); (tmp_path/'data').mkdir()
    write_notebook(tmp_path/'nbs', '10_prepare', "run_dir = 'runs/x'\nfail = False", ALONE)
    write_notebook(tmp_path/'nbs', '20_keypoints', "run_dir = 'runs/x'\nbatch = 4\naccumulation = 1", TRAIN)
    write_notebook(tmp_path/'nbs', '21_projection', "run_dir = 'runs/x'", "stage.upstream('20_keypoints')" + ALONE.replace('if fail', 'if 0'))
    return tmp_path


def together(n, args):
    "The command in n processes: of each its exit code, stdout, stderr."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    own = dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get('PYTHONPATH')])]))
    launched = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n)) if n > 1 else {}
    processes = [subprocess.Popen([*CLI, *map(str, args)], env=os.environ | own | launched | (dict(RANK=str(i), LOCAL_RANK=str(i)) if n > 1 else {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(n)]
    said = [p.communicate(timeout=600) for p in processes]
    return [(p.returncode, *s) for p, s in zip(processes, said, strict=True)]


def test_two_processes_make_one_run_that_equals_one_process_with_twice_the_batch(place):
    args = lambda run, *more: ['--data_dir', place/'data', '--run_dir', place/run, '--nbs', place/'nbs', *more]
    (code, said, error), (other_code, other_said, other_error) = together(2, args('two'))
    assert (code, other_code) == (0, 0), error[-2000:] + other_error[-2000:]
    assert [line.split()[:2] for line in said.strip().split('\n')] == [*([s, 'done'] for s in ('10_prepare', '20_keypoints', '21_projection')), ['report', 'report.html']] and other_said == ''     # the first process alone speaks
    assert (place/'two'/'times').read_text() == 'once once ' and sorted(p.name for p in (place/'two').iterdir()) == ['.lock', '10_prepare', '20_keypoints', '21_projection', 'report.html', 'times']
    assert [read_manifest(place/'two', s).record['processes'] for s in ('10_prepare', '20_keypoints', '21_projection')] == [1, 2, 1]
    ((code, said, error),) = together(1, args('two'))
    assert code == 0 and said.count('skipped') == 3                                         # nothing of it depends on how it was made
    assert together(1, args('one', '-p', 'accumulation', '2'))[0][0] == 0
    nets, cards = [network(), network()], []
    for run, net in zip(('one', 'two'), nets, strict=True): cards.append(load_weights(net, read_manifest(place/run, '20_keypoints').path('net.safetensors')))
    assert distance(*nets) < 1e-6 and np.abs(np.array(cards[0]['losses']) - cards[1]['losses']).max() < 1e-6 and cards[1]['number'] == 3


def test_where_one_process_fails_all_end(place):
    (code, _, error), (other_code, _, other_error) = together(2, ['--data_dir', place/'data', '--run_dir', place/'run', '--nbs', place/'nbs', '-p', 'fail', 'true'])
    assert (code, other_code) == (1, 1) and 'ValueError: prepared for nothing' in error and 'another process of this run has ended' in other_error, other_error[-1000:]


@pytest.mark.slow
def test_a_real_stage_on_two_processes(run, data, tmp_path):
    "Encoders and grader of the smoke run once more, by the two processes that torchrun starts; what comes after goes on with them."
    told = json.loads((run[0]/'42_grading'/'manifest.json').read_text())['parameters'], json.loads((run[0]/'31_encoders'/'manifest.json').read_text())['parameters']
    settings = [w for stage, p in zip(('42_grading', '31_encoders'), told, strict=True) for k, v in p.items() if k != 'run_dir' for w in ('-p', f'{stage}.{k}', str(v))]
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', str(free_port()), '--no-python', *CLI]
    args = ['--data_dir', data[0], '--run_dir', tmp_path/'run', '--resume_from', run[0], '--stages', '31_encoders,42_grading', *settings, '-p', 'seed', '1']
    done = subprocess.run([*torchrun, *map(str, args)], env=os.environ | dict(OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    for stage, table in (('31_encoders', 'history'), ('42_grading', 'history')):
        made, old = read_manifest(tmp_path/'run', stage), read_manifest(run[0], stage)
        assert made.record['processes'] == 2 and set(made.products) == set(old.products) and not made.changed()
        history = pd.read_csv(made.path(table))
        assert len(history) == len(pd.read_csv(old.path(table))) and np.isfinite(history.train_loss).all()
    assert not (tmp_path/'run'/'42_grading').is_symlink() and (tmp_path/'run'/'10_prepare').is_symlink() and not list((tmp_path/'run').glob('.process*'))
    rows = pd.read_parquet(read_manifest(tmp_path/'run', '42_grading').path('predictions'))
    assert (rows['source'] == 'model').any() and np.isfinite(rows[['normal_mild', 'moderate', 'severe']].to_numpy()).all()
