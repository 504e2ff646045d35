"""Kaggle, rehearsed: a bare environment with no more than the packages that its image has, sockets closed, inputs read-only, one visible study, then hidden ones.

The environment is a fresh venv whose site-packages holds links to the assumed packages and to what those need; `unshare` takes the
network away and mounts the inputs read-only where the system lets us. Where it does not, Python's own sockets are closed all the
same and every attempt is written down, and the inputs are compared before and after.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from conftest import ROOT, command
from mscan.kaggle import CONTENTS, list_contents
from mscan.rsna import PROBS, row_ids
from mscan.runs import RunError, Stage, listing_hash
from mscan.submission import GRADING
from submission import build
from submission.build import copy_weights, locked, main, read_image

pytestmark = pytest.mark.xdist_group('pipeline')
KNOWN = read_image()
PYTHON = f'{sys.version_info[0]}.{sys.version_info[1]}'
norm = lambda name: re.sub(r'[-_.]+', '-', name).lower()


# the bare environment -------------------------------------------------------------------------------------------------

def needed_by(names) -> dict:
    "Distributions of this environment that some packages need, through each other; name -> distribution."
    found, todo = {}, list(names)
    while todo:
        name = norm(todo.pop())
        if name in found: continue
        try: found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError: continue             # another name of OpenCV, or for another system
        todo += [r.name for r in map(Requirement, found[name].requires or []) if r.marker is None or r.marker.evaluate({'extra': ''})]
    return found


def image_packages() -> dict: return needed_by([n for names in KNOWN.image for n in names.split('|')] + ['pip'])


CLOSED = '''
import os, socket
def _refuse(name, args):
    with open(os.environ['ATTEMPTS'], 'a') as f: f.write(f'{name} {args[:2]}\\n')
    raise OSError(f'{name}: there is no internet here')
def _closed(name): return lambda *args, **kw: _refuse(name, args)
for _n in ('getaddrinfo', 'gethostbyname', 'gethostbyname_ex', 'create_connection'): setattr(socket, _n, _closed(_n))
def _only_unix(name, real): return lambda self, *args: real(self, *args) if self.family == socket.AF_UNIX else _refuse(name, args)
for _n in ('connect', 'connect_ex', 'sendto'): setattr(socket.socket, _n, _only_unix(_n, getattr(socket.socket, _n)))
'''
START = '''#!/bin/sh
{mount}
exec env -i PATH=/usr/bin:/bin HOME={home} ATTEMPTS={attempts} LANG=C.UTF-8 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MPLBACKEND=Agg PIP_CONFIG_FILE=/dev/null PYTHONNOUSERSITE=1 IPYTHONDIR={home}/.ipython JPY_PARENT_PID="$JPY_PARENT_PID" JUPYTER_RUNTIME_DIR={home} {python} "$@"
'''


def unshared(*command): return subprocess.run(['unshare', *command], capture_output=True).returncode == 0


class Bare:
    "A bare environment, with its own inputs below `input` and outputs below `working`."
    def __init__(self, folder):
        self.folder, self.input, self.working, self.home, self.attempts = folder, folder / 'input', folder / 'working', folder / 'home', folder / 'attempts'
        for p in (self.input, self.working, self.home): p.mkdir(parents=True)
        subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder / 'venv'], check=True)
        self.site = folder / 'venv' / 'lib' / f'python{PYTHON}' / 'site-packages'
        for dist in image_packages().values():
            for top in {Path(f).parts[0] for f in dist.files if Path(f).parts[0] not in ('..', '__pycache__') and not str(f).endswith('.pth')}:
                if not (self.site / top).exists(): (self.site / top).symlink_to(Path(dist.locate_file(top)).resolve())
        (self.site / 'closed.py').write_text(CLOSED)
        (self.site / 'closed.pth').write_text('import closed\n')
        root = ['-n', '-m'] if os.geteuid() == 0 else ['-r', '-n', '-m']
        self.private = ['unshare', *root] if shutil.which('unshare') and unshared(*root, 'true') else []
        mount = f'mount --bind {self.input} {self.input} && mount -o remount,ro,bind {self.input} || exit 9' if self.private else ''
        self.start = folder / 'start.sh'
        self.start.write_text(START.format(mount=mount, home=self.home, attempts=self.attempts, python=folder / 'venv' / 'bin' / 'python'))
        self.start.chmod(0o755)
        spec = folder / 'kernels' / 'kaggle'
        spec.mkdir(parents=True)
        (spec / 'kernel.json').write_text(json.dumps(dict(argv=[*self.private, str(self.start), '-m', 'ipykernel_launcher', '-f', '{connection_file}'], display_name='kaggle', language='python')))

    def python(self, code):
        return subprocess.run([*self.private, self.start, '-c', code], capture_output=True, text=True, cwd=self.working)

    def execute(self, notebook, monkeypatch, **parameters):
        "Run a notebook as Kaggle would; its cells, and what they printed."
        import papermill
        from traitlets.config import Config
        monkeypatch.setenv('JUPYTER_PATH', str(self.folder))
        before = listing_hash(self.input, times=True)
        with tempfile.TemporaryDirectory(prefix='k') as sockets:
            nb = papermill.execute_notebook(str(notebook), str(self.folder / 'executed.ipynb'), dict(input_dir=str(self.input), work_dir=str(self.working)) | parameters, kernel_name='kaggle',
                                            progress_bar=False, cwd=str(self.working), config=Config(KernelManager=dict(transport='ipc', ip=f'{sockets}/kernel')))
        assert listing_hash(self.input, times=True) == before, 'an input was changed'
        assert not self.attempts.exists(), self.attempts.read_text()
        return ''.join(o.get('text', '') for c in nb.cells if c.cell_type == 'code' for o in c.outputs if o.output_type == 'stream')


@pytest.fixture
def bare(tmp_path): return Bare(tmp_path / 'bare')


@pytest.fixture(scope='module')
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheels')
    build.fetch_wheels(folder, KNOWN.brought, [PYTHON])
    return folder


@pytest.fixture(scope='module')
def packed(run, wheels, tmp_path_factory):
    "What the command makes of the run."
    out = tmp_path_factory.mktemp('packed') / 'dist'
    main(['--run_dir', str(run[0]), '--out', str(out), '--user', 'somebody', '--wheels', str(wheels), '--sessions', '2', '--preset', 'smoke'])
    return out


def mounted(source, target): shutil.copytree(source, target, copy_function=os.link)    # hundreds of MB, never written to


def competition(folder, data_dir, studies: dict):
    "A competition's folder with test studies under other numbers: {number: study of data_dir}; sample_submission.csv has them in an order of its own."
    (folder / 'test_images').mkdir(parents=True)
    described = pd.read_csv(data_dir / 'test_series_descriptions.csv', dtype=str)
    for number, source in studies.items(): mounted(data_dir / 'test_images' / source, folder / 'test_images' / number)
    pd.concat([described[described.study_id == s].assign(study_id=n) for n, s in studies.items()]).to_csv(folder / 'test_series_descriptions.csv', index=False)
    pd.DataFrame(dict(row_id=row_ids(sorted(studies)))).assign(**dict.fromkeys(PROBS, 1 / 3)).to_csv(folder / 'sample_submission.csv', index=False)
    return folder


def check(working, data_dir):
    "Provenance, after the file was looked at with pandas alone."
    table, sample = (pd.read_csv(p, dtype=dict(row_id=str)) for p in (working / 'submission.csv', data_dir / 'sample_submission.csv'))
    provenance = pd.read_csv(working / 'provenance.csv', keep_default_na=False)
    assert list(table.columns) == ['row_id', 'normal_mild', 'moderate', 'severe'] and table.row_id.tolist() == sample.row_id.tolist() == provenance.row_id.tolist()
    assert table.row_id.str.split('_').str[0].value_counts().eq(25).all() and table.row_id.is_unique
    p = table[list(PROBS)].to_numpy()
    assert np.isfinite(p).all() and (p > 0).all() and np.allclose(p.sum(1), 1, atol=1e-6)
    return table.set_index('row_id'), provenance.set_index('row_id')


def good_study(data): return sorted(p.name for p in (data[0] / 'test_images').iterdir() if p.name not in data[1])[0]


# the rehearsal --------------------------------------------------------------------------------------------------------

def test_the_image_lacks_what_is_brought(bare):
    "The control: before the data set is installed, none of it is there, nor anything else of this environment; and the net is closed."
    assert not {norm(n) for n in KNOWN.brought} & set(image_packages())
    modules = ['mscan', 'pydicom', 'pylibjpeg', 'rle', 'segmentation_models_pytorch', 'ultralytics', 'thop', 'nbdev', 'pytest', 'highdicom']
    done = bare.python(f"import importlib.util; print([m for m in {modules} if importlib.util.find_spec(m)], all(map(importlib.util.find_spec, ('torch', 'timm', 'cv2', 'pandas'))))")
    assert done.stdout.strip() == '[] True', done.stdout + done.stderr
    done = bare.python("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')")
    assert done.returncode and 'no internet' in done.stderr and bare.attempts.read_text()
    if bare.private: assert bare.python(f"open('{bare.input}/x', 'w')").stderr.strip().endswith(f"Read-only file system: '{bare.input}/x'")


def test_one_hidden_study(bare, packed, data, monkeypatch):
    mounted(packed / 'dataset', bare.input / 'mscan-lumbar')
    hidden = competition(bare.input / 'rsna-2024', data[0], {'4003253': good_study(data)})
    said = bare.execute(packed / 'inference' / 'inference.ipynb', monkeypatch)
    _, provenance = check(bare.working, hidden)
    assert (provenance['source'] == 'model').any() and '1 studies, 25 rows' in said
    print(said)


@pytest.mark.slow
def test_one_visible_study_then_thirty_hidden_ones(tmp_path, packed, data, run, monkeypatch):
    "Two sessions, each in a fresh environment, mounted as Kaggle does now; answers are those that the run gives in this environment."
    sources, seconds = sorted(p.name for p in (data[0] / 'test_images').iterdir()), {}
    command('mscan_predict', '--run_dir', run[0], '--data_dir', data[0], '--out', tmp_path / 'here', '--device', 'cpu')
    theirs, sources_here = (pd.read_csv(tmp_path / 'here' / f'{name}.csv', keep_default_na=False).set_index('row_id') for name in ('submission', 'provenance'))
    sessions = {'visible': {'44036939': good_study(data)}, 'hidden': {str(700001 + 37 * k): sources[k % len(sources)] for k in range(30)}}
    for name, studies in sessions.items():
        bare = Bare(tmp_path / name)
        mounted(packed / 'dataset', bare.input / 'datasets' / 'somebody' / 'mscan-lumbar')
        place = competition(bare.input / 'competitions' / 'rsna-2024', data[0], studies)
        start = time.monotonic()
        said = bare.execute(packed / 'inference' / 'inference.ipynb', monkeypatch)
        seconds[name] = time.monotonic() - start
        print(f'{name}: {seconds[name]:.0f} s; {said.strip().splitlines()[-1]}')
        table, provenance = check(bare.working, place)
        for number, source in studies.items():
            rows, here = [i for i in table.index if i.startswith(f'{number}_')], [i for i in theirs.index if i.startswith(f'{source}_')]
            assert np.abs(table.loc[rows].to_numpy() - theirs.loc[here].to_numpy()).max() < 2e-3 and (provenance.loc[rows, 'source'].to_numpy() == sources_here.loc[here, 'source'].to_numpy()).all()


@pytest.mark.slow
def test_a_budget_that_is_used_up_still_submits(bare, packed, data, monkeypatch):
    "Installing alone takes longer than this budget: every row is the fallback, says so, and the file is whole."
    mounted(packed / 'dataset', bare.input / 'mscan-lumbar')
    hidden = competition(bare.input / 'rsna-2024', data[0], {str(n): good_study(data) for n in (5, 40, 300)})
    bare.execute(packed / 'inference' / 'inference.ipynb', monkeypatch, budget_hours=1e-6)
    _, provenance = check(bare.working, hidden)
    assert (provenance['source'] == 'prior').all() and provenance.reason.str.contains('hours ended before this study').all()


# training in sessions ----------------------------------------------------------------------------------------------------

def toy_stages(folder, mark=os.devnull):
    "Three stages that take no time. Told to nap, the second notes its process in `mark`, makes a file of 2 GB (of holes) and sleeps: so the cap on the disk ends it, on a slow machine as on a fast one."
    from test_runs import SOURCES, write_notebook
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    greedy = f"import os\nif nap: print(os.getpid(), file=open('{mark}', 'w')); os.truncate(os.open(stage.dir/'big', os.O_CREAT | os.O_RDWR), 2 * 10**9)\n"
    for stage, (parameters, work) in SOURCES.items(): write_notebook(folder, stage, parameters, (greedy if stage == '20_keypoints' else '') + work)


@pytest.mark.slow
def test_training_goes_on_from_session_to_session(tmp_path, wheels, monkeypatch):
    "The first session ends in the second stage; the second takes the first stage over and finishes; the data's times differ between the two."
    out = tmp_path / 'dist'
    main(['--out', str(out), '--user', 'somebody', '--wheels', str(wheels), '--sessions', '2', '--preset', 'smoke'])
    toy_stages(out / 'dataset' / 'nbs')
    contents = json.loads((out / 'dataset' / CONTENTS).read_text())
    list_contents(out / 'dataset', **{k: v for k, v in contents.items() if k != 'files'})
    (tmp_path / 'data' / 'train_images').mkdir(parents=True)
    (tmp_path / 'data' / 'train.csv').write_text('study_id\n1\n')
    runs, said = [], []
    for k, parameters in ((1, dict(settings='20_keypoints.nap 600', disk_gb=1.)), (2, {})):
        bare = Bare(tmp_path / 'session')                     # the same path each time, as on Kaggle
        mounted(out / 'dataset', bare.input / 'mscan-lumbar')
        shutil.copytree(tmp_path / 'data', bare.input / 'rsna-2024')
        os.utime(bare.input / 'rsna-2024' / 'train.csv', (k, k))
        for j, earlier in enumerate(runs, 1): shutil.copytree(earlier, bare.input / f'mscan-lumbar-training-{j}' / 'run', symlinks=True)
        said.append(bare.execute(out / f'training-{k}' / 'training.ipynb', monkeypatch, **parameters))
        runs.append(Path(shutil.move(bare.working / 'run', tmp_path / f'output-{k}')))
        shutil.rmtree(bare.folder)
    assert 'beyond 1 GB' in said[0] and "missing: ['20_keypoints', '30_crops']" in said[0], said[0]
    assert [sorted(p.name for p in r.iterdir()) for r in runs] == [['10_prepare'], ['20_keypoints', '30_crops', 'report.html']], said[1]     # a session that was cut off leaves no page
    assert "taken over: ['10_prepare']; missing: none" in said[1] and '10_prepare           skipped' in said[1]
    meta = [json.loads((out / f'training-{k}' / 'kernel-metadata.json').read_text()) for k in (1, 2)]
    assert [m['kernel_sources'] for m in meta] == [[], [meta[0]['id']]]


CLI = [sys.executable, '-c', 'from mscan.runner import mscan_run; mscan_run()']


def test_a_session_that_ends_keeps_finished_stages_and_no_kernel(tmp_path):
    "A stage's kernel is stopped by a limit: exit code 2, the stage before it is kept, no process stays behind; another session links it, and makes it anew where it must."
    (tmp_path / 'data').mkdir()
    toy_stages(tmp_path / 'nbs', tmp_path / 'pid')

    def run(place, *more): return subprocess.run([*CLI, '--data_dir', tmp_path / 'data', '--run_dir', tmp_path / place, '--nbs', tmp_path / 'nbs', *more], capture_output=True, text=True, cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    done = run('one', '-p', 'nap', '600', '--budget_hours', '1', '--disk_gb', '1')
    assert done.returncode == 2 and 'beyond 1 GB' in done.stderr.strip().splitlines()[-1] and 'runner.py' not in done.stderr, done.stderr     # the dying kernel may have its say before
    assert sorted(p.parent.name for p in (tmp_path / 'one').glob('*/manifest.json')) == ['10_prepare']
    for _ in range(100):
        if not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists(): break
        time.sleep(.1)
    else: raise AssertionError('the kernel of the stopped stage is still there')
    before = (tmp_path / 'one' / '10_prepare' / 'manifest.json').stat().st_mtime_ns
    done = run('two', '--resume_from', tmp_path / 'one', '--plan')
    assert done.returncode == 0 and 'taken from' in done.stdout and '10_prepare: nothing changed' in done.stdout and (tmp_path / 'two' / '10_prepare').is_symlink(), done.stderr
    done = run('two', '--stages', '10_prepare', '-p', 'number', '5')          # another parameter: made anew here, not there
    assert done.returncode == 0 and not (tmp_path / 'two' / '10_prepare').is_symlink() and (tmp_path / 'one' / '10_prepare' / 'manifest.json').stat().st_mtime_ns == before


# what is packed -------------------------------------------------------------------------------------------------------

def test_the_list_of_packages_agrees_with_settings():
    "Every requirement is assumed, brought or unused; floors are the same; what Kaggle's list says is above them; what is brought is locked."
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT / 'settings.ini')
    image = {norm(n): floor for names, floor in KNOWN.image.items() for n in names.split('|')}
    for r in map(Requirement, config['DEFAULT']['requirements'].split()):
        name = norm(r.name)
        assert (name in image) + (name in {norm(b) for b in KNOWN.brought}) + (name in KNOWN.unused) == 1, name
        if name in image and name != 'ipykernel': assert Version(next(s.version for s in r.specifier if s.operator == '>=')) == Version(str(image[name])), name
    assert all(Version(KNOWN.seen[n]) >= Version(str(floor)) for n, floor in KNOWN.image.items())
    assert all(re.match(r'[\w.-]+==\S+', text) and text.count('--hash=sha256:') >= 1 for text in locked(KNOWN.brought).values())
    with pytest.raises(RunError, match='no-such'): locked(['no-such'])


def test_the_data_set_holds_weights_and_wheels_and_nothing_else(packed, run, wheels):
    folder = packed / 'dataset'
    files = {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()}
    assert {Path(f).suffix for f in files if f.startswith('run/')} == {'.json', '.safetensors', '.csv'}
    assert {Path(f).name for f in files if f.startswith('run/') and f.endswith('.csv')} == {'prior.csv', 'conditional.csv'}
    assert not [f for f in files if Path(f).suffix in ('.pt', '.pth', '.pkl', '.npy', '.npz', '.parquet', '.dcm')]
    assert {Path(f).name.split('-')[0] for f in files if f.startswith('wheels/')} == {'mscan', *(n.replace('-', '_') for n in KNOWN.brought)}
    contents = json.loads((folder / CONTENTS).read_text())
    assert set(contents['files']) == files - {CONTENTS, 'dataset-metadata.json'}
    text = (packed / 'inference' / 'inference.ipynb').read_text()
    assert not re.search(r'import (torch|timm|ultralytics|pydicom)|class |def ', ' '.join(''.join(c['source']) for c in json.loads(text)['cells'])), 'the notebook holds no model code'


def test_metadata_is_what_the_client_takes(packed):
    "The rules of Kaggle's client (2.2): titles, slugs, lengths, known fields, booleans spelt as it writes them."
    fields = {'id', 'title', 'code_file', 'language', 'kernel_type', 'is_private', 'enable_gpu', 'enable_tpu', 'enable_internet', 'machine_shape', 'dataset_sources', 'competition_sources', 'kernel_sources', 'model_sources'}
    data = json.loads((packed / 'dataset' / 'dataset-metadata.json').read_text())
    slug = data['id'].split('/')[1]
    assert 6 <= len(slug) <= 50 and 6 <= len(data['title']) <= 50 and 20 <= len(data['subtitle']) <= 80 and len(data['licenses']) == 1 and data['description']
    for path in packed.glob('*/kernel-metadata.json'):
        meta = json.loads(path.read_text())
        assert set(meta) == fields and (path.parent / meta['code_file']).is_file() and meta['language'] == 'python' and meta['kernel_type'] == 'notebook'
        assert meta['id'] == f"somebody/{re.sub(r'[^a-z0-9]+', '-', meta['title'].lower())}" and 5 <= len(meta['title']) <= 50
        assert meta['enable_internet'] == 'false' and meta['is_private'] == 'true' and meta['dataset_sources'] == [data['id']] and meta['competition_sources'] == [build.COMPETITION]
        assert all('=' not in line.split('#')[1] for line in ''.join(json.loads((path.parent / meta['code_file']).read_text())['cells'][1]['source']).splitlines() if '#' in line), 'papermill reads no = in a comment'


def finished_run(folder):
    "A run whose networks are a few bytes."
    for stage in GRADING:
        made = Stage(folder, stage, dict(stage=stage, parameters={}, inputs={}, products={}, metrics={}), time.perf_counter())
        for name in {'10_prepare': ['prior.csv', 'cache.npy'], '31_encoders': ['encoder_oof_0.safetensors', 'encoder_oof_0.json', 'encoder_in_fold_0.safetensors', 'encoder_in_fold_0.json'],
                     '42_grading': ['grader_0.safetensors', 'grader_0.json', 'conditional.csv', 'features.npz']}.get(stage, ['net.safetensors', 'net.json', 'history.csv']):
            made.dir.mkdir(parents=True, exist_ok=True)
            made.product(name.removesuffix('.csv'), name).write_text('{"features": "oof"}')
        made.finish()
    return folder


@pytest.mark.parametrize('break_it, word', [
    (lambda r: (r / '42_grading' / 'grader_0.safetensors').write_bytes(b'no'), 'hash differs'),
    (lambda r: (r / '31_encoders' / 'manifest.json').unlink(), '31_encoders'),
    (lambda r: (r / '20_keypoints' / 'net.json').unlink(), 'gone')])
def test_a_run_that_is_not_what_its_manifests_say_is_refused(tmp_path, break_it, word):
    run_dir = finished_run(tmp_path / 'run')
    copy_weights(run_dir, tmp_path / 'whole')
    kept = {p.name for p in (tmp_path / 'whole').rglob('*') if p.is_file()}
    assert kept == {'manifest.json', 'prior.csv', 'conditional.csv', 'net.safetensors', 'net.json', 'grader_0.safetensors', 'grader_0.json', 'encoder_oof_0.safetensors', 'encoder_oof_0.json'}
    break_it(run_dir)
    with pytest.raises(RunError, match=word): copy_weights(run_dir, tmp_path / 'broken')


def test_folds_are_packed_as_folds(tmp_path):
    "Each fold's own networks and prior, and the one table that tells how many folds there are."
    from mscan.folds import made_up_folds
    from mscan.submission import member_runs
    made_up_folds(tmp_path / 'cv', k=3)
    copy_weights(tmp_path / 'cv', tmp_path / 'packed')
    assert [r.name for r in member_runs(tmp_path / 'packed')] == ['fold_0', 'fold_1', 'fold_2']
    assert len(list((tmp_path / 'packed').rglob('prior.csv'))) == 3 and [p.relative_to(tmp_path / 'packed').parts[0] for p in (tmp_path / 'packed').rglob('studies.parquet')] == ['fold_0']


def test_a_folder_of_ones_own_is_not_replaced(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('years of work')
    with pytest.raises(SystemExit, match='not made by this command'): main(['--out', str(tmp_path / 'mine')])
    assert (tmp_path / 'mine' / 'thesis.txt').exists()
