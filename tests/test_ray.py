"Engine ray: a cluster of two workers on this machine answers as local processes do, also where a worker is killed in the middle of a study."
import os
import re
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from conftest import command
from mscan import submission
from mscan.check import check
from mscan.engines import cluster, scattered
from mscan.prepare import prepare
from mscan.rsna import TableError
from mscan.submission import mscan_predict, predict
from mscan.workers import Lost, Same, pooled
from predict_stubs import five_answers, five_studies, results, stand_in_grader, stand_in_run

pytestmark = [pytest.mark.xdist_group('ray'), pytest.mark.slow]     # three minutes, and Ray gives up where a busy machine starts it too slowly; `make test` runs the chapter's own cluster (006_engines)
HERE = Path(__file__).parent


@pytest.fixture(scope='module')
def two():
    "A cluster of two workers, whose processes know the stand-ins."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get('PYTHONPATH')])]))
        with cluster(cpus=2) as ray: yield ray


@pytest.fixture(scope='module')
def five(small_data, tmp_path_factory):
    return five_studies(small_data, tmp_path_factory.mktemp('ray') / 'data')


@pytest.fixture(scope='module')
def stand_in(tmp_path_factory): return stand_in_run(tmp_path_factory.mktemp('run'))


@pytest.fixture(scope='module')
def local(five, stand_in, tmp_path_factory):
    "What this process answers, with nothing between."
    return five_answers(stand_in, five, tmp_path_factory.mktemp('local'))


def grader_that_waits(manifests, device, notes, fatal='', **asked):
    "Study 3, when it is first begun, says which process has it and waits to be killed; study `fatal` kills its process."
    grade = stand_in_grader(manifests, device, **asked)

    def one(found):
        Path(notes, f'{found.study_id} in {os.getpid()}').touch()
        if found.study_id == fatal and not found.refused: os.kill(os.getpid(), signal.SIGKILL)
        if found.study_id == '3' and not Path(notes, 'victim').exists():
            Path(notes, 'half').write_text(str(os.getpid()))
            Path(notes, 'half').rename(Path(notes, 'victim'))
            time.sleep(300)
        return grade(found)
    return one


def kill_the_victim(notes):
    while not (notes / 'victim').exists(): time.sleep(.05)
    os.kill(int((notes / 'victim').read_text()), signal.SIGKILL)


def test_a_worker_killed_in_the_middle_of_a_study_costs_nothing_and_one_lost_twice_its_own_study(two, five, stand_in, local, monkeypatch, tmp_path):
    notes = tmp_path / 'notes'
    notes.mkdir()
    monkeypatch.setattr(submission, 'grader', partial(grader_that_waits, notes=str(notes), fatal='2'))
    killer = threading.Thread(target=kill_the_victim, args=[notes], daemon=True)
    killer.start()
    predict(stand_in, five, tmp_path / 'out', 'cpu', progress=False, workers=2, engine='ray')
    killer.join(1)
    began = {k: {int(p.name.split()[-1]) for p in notes.glob(f'{k} in *')} for k in '12345'}
    victim = int((notes / 'victim').read_text())
    assert not killer.is_alive() and victim in began['3'] and len(began['3']) == 2 and os.getpid() not in set.union(*began.values())
    table, why = results(tmp_path / 'out')
    lost = table.index.str.startswith('2_')
    assert table[~lost].equals(local[0][~lost]) and why[~lost].equals(local[1][~lost]) and (why[~lost]['source'] == 'model').sum() == 20      # study 3 among them
    assert (why[lost]['source'] == 'prior').all() and why[lost].reason.str.contains('not graded: its worker on Ray was lost').sum() == 5 and np.isfinite(table.to_numpy()).all()


def test_preparing_and_checking_on_ray_is_as_local(two, small_data, tmp_path):
    one, other = tmp_path / 'local', tmp_path / 'ray'
    prepare(small_data, one, test=.2, workers=1, progress=False)
    prepare(small_data, other, test=.2, workers=2, progress=False, engine='ray')
    files = sorted(p.relative_to(one) for p in one.rglob('*') if p.is_file())
    assert len([f for f in files if f.suffix == '.npy']) == 8 and files == sorted(p.relative_to(other) for p in other.rglob('*') if p.is_file())
    different = [f for f in files if f.name not in ('index.json', 'settled.json') and (one / f).read_bytes() != (other / f).read_bytes()]      # these two note the times of files
    assert not different, different
    assert check(small_data, workers=2, progress=False) == check(small_data, workers=0, progress=False, engine='ray')


def late(job):
    if job == 'late': time.sleep(600)
    return job


class Failing:
    def __call__(self): raise TableError('no networks here')


def test_errors_arrive_as_they_were_and_time_is_limited(two):
    with pytest.raises(ZeroDivisionError, match='by zero'): pooled(partial(divmod, 1), [1, 0, 2], 2, progress=False, engine=scattered)
    with pytest.raises(TableError, match='no networks here'): list(scattered(Failing(), [1, 2], 2))
    begun, answers = time.monotonic(), dict(scattered(Same(late), ['late', 'a', 'b'], 2, seconds=1))
    assert answers[0] == Lost('it took longer than 1 s') and (answers[1], answers[2]) == ('a', 'b') and time.monotonic() - begun < 300
    assert list(scattered(Same(late), [])) == []


@pytest.mark.slow
def test_real_networks_answer_alike_and_the_cluster_of_a_command_is_its_own(run, data, tmp_path):
    "The smoke run's networks on two good studies and two damaged ones, by the command, which starts a cluster and ends it."
    (folder, broken), (trained, _) = data, run
    keep = [p.name for p in (folder / 'test_images').iterdir() if broken.get(p.name) in (None, 'truncated', 'nothing_readable')]
    for s in keep: shutil.copytree(folder / 'test_images' / s, tmp_path / 'in' / 'test_images' / s)
    shutil.copy(folder / 'test_series_descriptions.csv', tmp_path / 'in')
    for engine in ('local', 'ray'): command('mscan_predict', '--run_dir', trained, '--data_dir', tmp_path / 'in', '--out', tmp_path / engine, '--device', 'cpu', '--workers', 2, '--engine', engine)
    one, other = results(tmp_path / 'local'), results(tmp_path / 'ray')
    assert len(one[0]) == 25 * len(keep) and (one[1]['source'] == 'model').any() and all(a.equals(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize('options, said', [
    (dict(engine='ray'), r'pip install "mscan\[ray\]"'), (dict(engine='spark'), "'local' or 'ray', not 'spark'"),
    (dict(ray_address='auto'), 'say engine ray'), (dict(engine='ray', budget_hours=1.), 'not both')])
def test_what_cannot_be_is_one_sentence(five, stand_in, monkeypatch, tmp_path, capsys, options, said):
    monkeypatch.setitem(sys.modules, 'ray', None)       # as where it is not installed
    with pytest.raises(SystemExit) as ended: mscan_predict(str(stand_in), str(five), str(tmp_path), **options)
    told = capsys.readouterr().err.strip().split('\n')
    assert ended.value.code == 1 and len(told) == 1 and re.search(said, told[0]), told
    assert not list(tmp_path.iterdir())
