"What happens to a machine in the middle of a run: processes die, disks fill, keys are pressed, files rot. Nothing is lost but what was hit, and a sentence says so."
import ast
import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from mscan import files, runner
from mscan.files import whole_files
from mscan.prepare import cache_study, load_study, load_tables
from mscan.rsna import TableError, read_submission
from mscan.runs import RunError, Stage, listing_hash, read_manifest
from mscan.submission import mscan_predict, predict, write_results
from mscan.training import WeightsError, load_weights, save_weights
from mscan.workers import pooled
from predict_stubs import five_answers, five_studies, install, results, stand_in_grade, stand_in_models, stand_in_run

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context('fork')


@pytest.fixture(scope='module')
def data(small_data, tmp_path_factory):
    return five_studies(small_data, tmp_path_factory.mktemp('faults') / 'data')


@pytest.fixture(scope='module')
def run(tmp_path_factory): return stand_in_run(tmp_path_factory.mktemp('run'))


@pytest.fixture(scope='module')
def undisturbed(data, run, tmp_path_factory):
    "What is answered where nothing happens."
    return five_answers(run, data, tmp_path_factory.mktemp('undisturbed'))


def once(path) -> bool:
    "True at the first call, in whatever process."
    try: os.close(os.open(path, os.O_CREAT | os.O_EXCL)); return True
    except FileExistsError: return False


def of(table, study): return table[table.index.str.startswith(f'{study}_')]
def die(): os.kill(os.getpid(), signal.SIGKILL)


# ---- workers

@pytest.mark.parametrize('workers', [1, 2])
def test_a_study_whose_worker_is_killed_falls_back_alone(data, run, undisturbed, monkeypatch, tmp_path, workers):
    install(monkeypatch, lambda study, models: die() if study.study_id == '3' else stand_in_grade(study, models))
    predict(run, data, tmp_path, 'cpu', progress=False, workers=workers)
    submission, why = results(tmp_path)
    assert list(submission.index) == list(undisturbed[0].index) and np.isfinite(submission.to_numpy()).all()
    mine = submission.index.str.startswith('3_')
    assert submission[~mine].equals(undisturbed[0][~mine]) and why[~mine].equals(undisturbed[1][~mine])
    assert (why[mine]['source'] == 'prior').all() and why[mine].reason.str.contains('killed').sum() == 5


def test_a_study_whose_worker_is_killed_once_is_graded(data, run, undisturbed, monkeypatch, tmp_path):
    def grade(study, models):
        if study.study_id in '24' and once(tmp_path / study.study_id): die()
        return stand_in_grade(study, models)
    install(monkeypatch, grade)
    predict(run, data, tmp_path / 'out', 'cpu', progress=False, workers=2)
    assert (tmp_path / '2').exists() and (tmp_path / '4').exists()
    assert all(a.equals(b) for a, b in zip(results(tmp_path / 'out'), undisturbed, strict=True))


def test_a_study_that_takes_for_ever_is_given_up(data, run, undisturbed, monkeypatch, tmp_path):
    install(monkeypatch, lambda study, models: time.sleep(600) if study.study_id == '2' else stand_in_grade(study, models))
    begun = time.monotonic()
    predict(run, data, tmp_path, 'cpu', progress=False, workers=2, seconds=8)
    submission, why = results(tmp_path)
    assert time.monotonic() - begun < 120 and (of(why, 2)['source'] == 'prior').all() and of(why, 2).reason.str.contains('longer than 8 s').any()
    assert of(submission, 3).equals(of(undisturbed[0], 3)) and len(submission) == 125


class Panic(BaseException): "As a panic in compiled Rust arrives."


def nan_rows(study, models): return stand_in_grade(study, models).assign(moderate=np.nan)
def too_few(study, models): return stand_in_grade(study, models).iloc[:24]
def raising(error):
    def grade(study, models): raise error
    return grade


@pytest.mark.parametrize('grade, said', [(raising(MemoryError('no memory')), 'MemoryError'), (raising(RecursionError('deep')), 'RecursionError'), (raising(Panic('rust')), 'Panic'), (raising(OSError(errno.EIO, 'Input/output error', '/mnt/Jane Doe/1')), 'Input/output error'),
                                         (nan_rows, 'no probability'), (too_few, '24 rows')], ids=['memory', 'recursion', 'panic', 'disk', 'nan', 'few'])
@pytest.mark.parametrize('workers', [0, 1])
def test_whatever_grading_does_a_study_has_25_finite_rows(data, run, monkeypatch, tmp_path, grade, said, workers):
    install(monkeypatch, lambda study, models: grade(study, models) if study.study_id == '1' else stand_in_grade(study, models))
    predict(run, data, tmp_path, 'cpu', progress=False, workers=workers)
    submission, why = results(tmp_path)
    assert len(submission) == 125 and np.isfinite(submission.to_numpy()).all() and (of(why, 2)['source'] == 'model').sum() == 5
    assert (of(why, 1)['source'] == 'prior').all() and of(why, 1).reason.str.contains(said).sum() == 5 and not why.reason.str.contains('Jane').any()
    with pytest.raises(BaseException): predict(run, data, tmp_path / 'strict', 'cpu', True, False, workers)
    assert not (tmp_path / 'strict' / 'submission.csv').exists()


def test_strict_raises_for_a_killed_worker(data, run, monkeypatch, tmp_path):
    install(monkeypatch, lambda study, models: die() if study.study_id == '3' else stand_in_grade(study, models))
    with pytest.raises(RunError, match='study 3.*killed'): predict(run, data, tmp_path, 'cpu', True, False, 2)
    assert not list(tmp_path.iterdir())


def test_networks_that_cannot_be_loaded_are_an_error_and_not_700_fallbacks(data, run, monkeypatch, tmp_path):
    for load, error, word in ((raising(WeightsError('sha256 differs')), WeightsError, 'sha256'), (lambda *_: die(), RuntimeError, 'could not start'), (raising(KeyError('contrast_dropout')), RunError, 'another version')):
        install(monkeypatch, load=load)
        with pytest.raises(error, match=word): predict(run, data, tmp_path, 'cpu', progress=False, workers=2)
    assert not list(tmp_path.iterdir())


def test_a_killed_reader_of_prepare_is_replaced_and_its_study_read(tmp_path):
    def job(k):
        if k == 3 and once(tmp_path / 'once'): die()
        return k * k
    assert pooled(job, list(range(8)), 2, progress=False) == [k * k for k in range(8)] and (tmp_path / 'once').exists()
    with pytest.raises(RuntimeError, match='job 4 of 8 was lost twice.*killed'): pooled(lambda k: die() if k == 3 else k, list(range(8)), 2, progress=False)
    with pytest.raises(ZeroDivisionError): pooled(lambda k: 1 / k, [1, 0, 2], 2, progress=False)


# ---- the parent

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError: return False


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'did not happen'
        time.sleep(.05)


def apart(function):
    "A process of its own session, so that signals can be sent to it and its workers as a terminal does."
    def child():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell's background jobs, and what they start, ignore it
        function()
    process = FORK.Process(target=child)
    process.start()
    return process


@pytest.mark.parametrize('how', ['Ctrl-C', 'kill -9'])
def test_an_interrupted_run_leaves_the_old_files_and_no_process(data, run, monkeypatch, tmp_path, how):
    def grade(study, models):
        if study.study_id == '2': (tmp_path / 'pid').write_text(str(os.getpid())); time.sleep(2 if how == 'kill -9' else 600)
        return stand_in_grade(study, models)
    install(monkeypatch, grade)
    out = tmp_path / 'out'
    out.mkdir()
    for name in ('submission.csv', 'provenance.csv'): (out / name).write_text('old')
    process = apart(lambda: mscan_predict(run_dir=str(run), data_dir=str(data), out=str(out), device='cpu'))
    until(lambda: (tmp_path / 'pid').exists() and (tmp_path / 'pid').read_text())
    if how == 'Ctrl-C': os.killpg(process.pid, signal.SIGINT)
    else: os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == (130 if how == 'Ctrl-C' else -9)
    until(lambda: not alive(int((tmp_path / 'pid').read_text())))
    assert {p.name: p.read_text() for p in out.iterdir()} == {'submission.csv': 'old', 'provenance.csv': 'old'}


# ---- disks

@pytest.fixture
def rows(): return pd.concat([stand_in_grade(SimpleNamespace(study_id=s, problems=[], of=lambda view: []), stand_in_models()) for s in '12'])


def test_a_full_disk_keeps_the_old_pair(rows, monkeypatch, tmp_path):
    "The second file meets a full disk; and, with no stand-in, a limit of the system on the size of files."
    write_results(rows, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    to_csv, changed = pd.DataFrame.to_csv, rows.assign(normal_mild=1., moderate=0., severe=0.)

    def full(self, path, *args, **kwargs):
        to_csv(self.iloc[:3], path, *args, **kwargs)
        if 'provenance' in str(path): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch, pytest.raises(OSError, match='No space left.*submission.csv and provenance.csv.*stays as it was'):
        patch.setattr(pd.DataFrame, 'to_csv', full)
        write_results(changed, tmp_path)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        try: write_results(changed, tmp_path)
        except OSError as e: os._exit(3 if 'stays as it was' in str(e) else 4)
    process = apart(limited); process.join(60)
    assert process.exitcode == 3 and before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write_results(changed, tmp_path)
    assert (read_submission(tmp_path / 'submission.csv').normal_mild == 1).all() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('moment', ['to_csv', 'forced'])
def test_a_writer_that_is_killed_leaves_no_half_file(rows, monkeypatch, tmp_path, moment):
    write_results(rows, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    changed = rows.assign(normal_mild=1., moderate=0., severe=0.)
    if moment == 'to_csv': monkeypatch.setattr(pd.DataFrame, 'to_csv', lambda self, path, *a, **k: (Path(path).write_text('row_id,nor'), die()))
    else: monkeypatch.setattr(files, 'forced', lambda path: die())
    process = apart(lambda: write_results(changed, tmp_path)); process.join(60)
    assert process.exitcode == -9 and before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if not p.name.startswith('.')}
    monkeypatch.undo()
    write_results(changed, tmp_path)                                            # what was left behind is in nobody's way
    assert (read_submission(tmp_path / 'submission.csv').normal_mild == 1).all()


def test_a_place_that_cannot_be_written_is_told_before_the_first_study(data, run, monkeypatch, tmp_path):
    install(monkeypatch, raising(AssertionError('was graded')))
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(OSError): predict(run, data, tmp_path / 'file', 'cpu', True, False)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(OSError, match='9 KiB are free'): predict(run, data, tmp_path / 'out', 'cpu', True, False)


def test_a_full_disk_is_one_sentence_on_the_command_line(data, run, monkeypatch, tmp_path, capsys):
    install(monkeypatch)
    def full(self, path, *args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    monkeypatch.setattr(pd.DataFrame, 'to_csv', full)
    with pytest.raises(SystemExit) as end: mscan_predict(run_dir=str(run), data_dir=str(data), out=str(tmp_path), device='cpu', workers=0)
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 1 and 'No space left' in said[-1] and not list(tmp_path.iterdir())


def test_data_is_only_read(data, run, monkeypatch, tmp_path):
    "Folders without the right to write (root does not feel that, so the listing with its times is compared as well)."
    install(monkeypatch)
    before = listing_hash(data, times=True)
    for p in (data, *data.rglob('*')): p.chmod(0o555 if p.is_dir() else 0o444)
    predict(run, data, tmp_path, 'cpu', progress=False, workers=1)
    assert listing_hash(data, times=True) == before and (results(tmp_path)[1]['source'] == 'model').sum() == 25
    for p in (data, *data.rglob('*')): p.chmod(0o755 if p.is_dir() else 0o644)


def test_whole_files_keep_an_ending_and_clean_up(tmp_path):
    with whole_files(tmp_path / 'a.npy') as (half,): np.save(half, np.arange(3))
    with pytest.raises(KeyboardInterrupt), whole_files(tmp_path / 'a.npy') as (half,): np.save(half, np.arange(9)); raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ['a.npy'] and len(np.load(tmp_path / 'a.npy')) == 3


# ---- what rots: caches, tables, manifests, weights

@pytest.fixture
def cached(data, tmp_path):
    (tmp_path / 'cache').mkdir()
    rows, _ = cache_study((str(data), 'test', '1', None, str(tmp_path / 'cache'), .5, 99.5))
    return SimpleNamespace(dir=tmp_path, problems={}, by_study={'1': rows})


class Runs:
    "Pickled, it would make a file where it is read."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def garbage(f): f.write_bytes(b'garbage' * 99)
def empty(f): f.write_bytes(b'')
def cut(f): f.write_bytes(f.read_bytes()[:-999])
def gone(f): f.unlink()
def other_bytes(f): np.save(f, np.load(f)[:-1])
def other_type(f): np.save(f, np.load(f).astype(np.float32))
def pickled(f): np.save(f, np.array([Runs(f.parents[1] / 'smuggled')], dtype=object), allow_pickle=True)


@pytest.mark.parametrize('harm', [garbage, empty, cut, gone, other_bytes, other_type, pickled], ids=lambda h: h.__name__)
def test_a_pixel_cache_that_rots_says_what_to_do(cached, harm):
    assert len(load_study(cached, '1').series) == 3
    harm(cached.dir / 'cache' / '1.npy')
    with pytest.raises(TableError, match='study 1.*run 10_prepare again'): load_study(cached, '1')
    assert not (cached.dir / 'smuggled').exists()


def test_a_product_that_rots_makes_its_stage_run_again(tmp_path):
    made = Stage(tmp_path, '10_prepare', dict(stage='10_prepare', parameters={}, inputs={}, products={}, metrics={}, code=''), time.perf_counter())
    (made.dir / 'cache').mkdir(parents=True)
    for name in ('cache/1.npy', 'features.npz'): (made.dir / name).write_bytes(b'x' * 100)
    for name in ('cache', 'features.npz'): made.product(name)
    made.finish()
    assert read_manifest(tmp_path, '10_prepare').changed() == []
    cut_ = made.dir / 'features.npz'; cut_.write_bytes(b'x' * 50)
    assert read_manifest(tmp_path, '10_prepare').changed() == ['features.npz']
    cut_.write_bytes(b'x' * 100); (made.dir / 'cache/1.npy').unlink()
    assert read_manifest(tmp_path, '10_prepare').changed() == ['cache']


@pytest.mark.parametrize('text', ['', '{"parameters": {', '[]', '{}', '"text"', '{"parameters": 3, "inputs": {}, "products": {}, "metrics": {}}'])
def test_a_manifest_that_rots_says_what_to_do_and_its_stage_runs_again(run, data, tmp_path, text):
    shutil.copytree(run, tmp_path / 'run')
    (tmp_path / 'run/30_crops/manifest.json').write_text(text)
    with pytest.raises(RunError, match='manifest .*30_crops.*run stage 30_crops again'): predict(tmp_path / 'run', data, tmp_path / 'out', 'cpu', progress=False)
    assert runner.why_run(tmp_path / 'run', '30_crops', {}, None) == 'its manifest cannot be read'


def test_tables_that_rot_say_what_to_do(tmp_path):
    table = pd.DataFrame(dict(study_id=['1']))
    for n in ('studies', 'series', 'slices', 'labels', 'points'): table.to_parquet(tmp_path / f'{n}.parquet')
    table.to_csv(tmp_path / 'prior.csv')
    (tmp_path / 'quality.json').write_text(json.dumps(dict(notes=[], studies=[])))
    assert load_tables(tmp_path).notes == []
    for name in ('slices.parquet', 'quality.json'):
        whole = (tmp_path / name).read_bytes()
        for harm in (cut, empty, garbage):
            (tmp_path / name).write_bytes(whole); harm(tmp_path / name)
            with pytest.raises(TableError, match='run 10_prepare again'): load_tables(tmp_path)
        (tmp_path / name).write_bytes(whole)


CARD = dict(architecture={}, preprocessing={}, classes=[], intended_use='test')


def pickle_file(f, into): f.write_bytes(pickle.dumps({'weight': Runs(into)}))
def torch_file(f, into): torch.save({'weight': torch.ones(2, 2), 'extra': Runs(into)}, f)


@pytest.mark.parametrize('smuggle', [pickle_file, torch_file], ids=lambda s: s.__name__)
def test_a_pickle_in_the_place_of_weights_is_refused(tmp_path, smuggle):
    "With a card that vouches for it: the sum of its bytes is right, the form is not."
    net = torch.nn.Linear(2, 2)
    tensors, card = save_weights(net, tmp_path / 'net', CARD)
    smuggle(tensors, tmp_path / 'smuggled')
    with pytest.raises(WeightsError, match='sha256'): load_weights(net, tmp_path / 'net')
    card.write_text(json.dumps(CARD | dict(sha256=hashlib.sha256(tensors.read_bytes()).hexdigest())))
    with pytest.raises(WeightsError, match='no safetensors'): load_weights(net, tmp_path / 'net')
    assert not (tmp_path / 'smuggled').exists()


@pytest.mark.parametrize('smuggle', [pickle_file, torch_file], ids=lambda s: s.__name__)
def test_pretrained_weights_that_are_a_pickle_run_nothing(tmp_path, smuggle):
    "Every way in for weights of others: timm's encoders, YOLO, and mscan_weights without --trust."
    from mscan.keypoints import load_encoder_weights
    from mscan.weights import convert
    from mscan.yolo import start_from
    file = tmp_path / 'net.pth'
    smuggle(file, tmp_path / 'smuggled')
    for way in (lambda: convert(file, tmp_path / 'out'), lambda: start_from(torch.nn.Linear(2, 2), str(file)), lambda: load_encoder_weights(torch.nn.Linear(2, 2), 'resnet18', str(file))):
        with pytest.raises(Exception): way()
        assert not (tmp_path / 'smuggled').exists()


def test_weights_cut_short_are_refused(tmp_path):
    net = torch.nn.Linear(2, 2)
    tensors, card = save_weights(net, tmp_path / 'net', CARD)
    cut_bytes = tensors.read_bytes()[:-3]
    tensors.write_bytes(cut_bytes)
    with pytest.raises(WeightsError, match='sha256'): load_weights(net, tmp_path / 'net')
    card.write_text(json.dumps(CARD | dict(sha256=hashlib.sha256(cut_bytes).hexdigest())))
    with pytest.raises(WeightsError, match='no safetensors'): load_weights(net, tmp_path / 'net')
    save_file({'other': torch.ones(1)}, tensors)
    card.write_text(json.dumps(CARD | dict(sha256=hashlib.sha256(tensors.read_bytes()).hexdigest())))
    with pytest.raises(WeightsError, match='does not fit'): load_weights(net, tmp_path / 'net')


# ---- no pickle in the code

FORBIDDEN = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal'}


def unsafe(code: str) -> list:
    "Lines that could run what a file holds."
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): found += [(node.lineno, a.name) for a in node.names if a.name.split('.')[0] in FORBIDDEN]
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] in FORBIDDEN: found.append((node.lineno, node.module))
        if not isinstance(node, ast.Call): continue
        name, given = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        if name in ('torch.load', 'torch.jit.load', 'torch.hub.load') and (name != 'torch.load' or getattr(given.get('weights_only'), 'value', None) is not True): found.append((node.lineno, name))
        if 'allow_pickle' in given and getattr(given['allow_pickle'], 'value', None) is not False: found.append((node.lineno, 'allow_pickle'))
        if name.endswith('read_pickle') or name in ('eval', 'exec', 'yaml.load', 'yaml.unsafe_load', 'yaml.full_load', 'os.system') or 'shell' in given: found.append((node.lineno, name))
    return found


@pytest.mark.parametrize('code', ['import pickle', 'from joblib import load', 'torch.load(f)', 'torch.load(f, weights_only=False)', 'torch.load(f, weights_only=not trust)', 'np.load(f, allow_pickle=True)', 'np.load(f, None, allow_pickle=x)',
                                  'pd.read_pickle(f)', 'eval(text)', 'yaml.load(text)', 'subprocess.run(text, shell=True)'])
def test_the_scan_finds_each_of_them(code): assert unsafe(code)


def test_no_code_reads_a_pickle():
    "Two exceptions: mscan_weights convert --trust, which says what it is, and what passes between the processes of one Ray cluster, as Ray itself sends it."
    assert not unsafe('torch.load(f, weights_only=True); np.load(f); np.load(f, allow_pickle=False); net.eval(); yaml.safe_load(t)')
    found = {p.name: unsafe(p.read_text(encoding='utf-8')) for p in (ROOT / 'mscan').glob('*.py')}
    assert len(found) > 40 and {n: [w for _, w in f] for n, f in found.items() if f} == {'weights.py': ['torch.load'], 'engines.py': ['pickle']}
    assert 'weights_only=not trust' in (ROOT / 'mscan/weights.py').read_text(encoding='utf-8')
    for notebook in (ROOT / 'nbs').glob('*.ipynb'):
        run = [''.join(c['source']) for c in json.loads(notebook.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code' and '#| eval: false' in ''.join(c['source'])]
        for code in run: assert not unsafe(code), (notebook.name, unsafe(code))


# ---- memory

def anonymous_mib() -> int:
    "Memory of this process that is its own (the peak that getrusage tells starts, in a forked process, with the libraries of the parent)."
    return int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1]) >> 10


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_studies(data, run, monkeypatch, tmp_path):
    "MiB of the worker, at most, and of its parent at the end, for 5 and for 25 studies that weigh 8 MiB more than they do; and a worker that keeps its studies, which shows."
    kept = []

    def heavy(study, models):
        study.series[0].pixels.append(np.ones(8 << 20, np.uint8))
        rows = stand_in_grade(study, models)
        if keep: kept.append(study)
        with open(tmp_path / 'peak', 'a') as f: f.write(f'{anonymous_mib()}\n')
        return rows

    def measured():
        predict(run, tmp_path / str(count), tmp_path / 'out', 'cpu', progress=False, workers=1)
        (tmp_path / 'parent').write_text(str(anonymous_mib()))
    install(monkeypatch, heavy)
    peaks = {}
    for count, keep in ((5, False), (25, False), (12, True)):
        folder = tmp_path / str(count) / 'test_images'
        folder.mkdir(parents=True)
        for k in range(count): (folder / str(k)).symlink_to(data / 'test_images' / str(k % 5 + 1))
        (tmp_path / 'peak').unlink(missing_ok=True)
        process = apart(measured); process.join(300)
        assert process.exitcode == 0 and len(results(tmp_path / 'out')[0]) == 25 * count
        peaks[count] = max(map(int, (tmp_path / 'peak').read_text().split())), int((tmp_path / 'parent').read_text())
    print('MiB of worker and parent:', peaks)
    assert all(more - few < 24 for few, more in zip(peaks[5], peaks[25], strict=True)) and peaks[12][0] - peaks[5][0] > 40, peaks
