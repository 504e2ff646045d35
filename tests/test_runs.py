"Manifests and the runner, on pipelines of three tiny stages: what is made, what is skipped, and what a killed run leaves."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

from mscan import runner, runs
from mscan.runner import find_stages, plan, read_preset, run_stages
from mscan.runs import RunError, Stage, code_hash, find_nbs, listing_hash, read_manifest

CLI = [sys.executable, '-c', 'from mscan.runner import mscan_run; mscan_run()']
BEGIN = 'from mscan.runs import Stage\nstage = Stage.begin({!r}, globals())\n'
SOURCES = {
    '10_prepare': ("data_dir = 'data'\nrun_dir = 'runs/x'\nseed = 0\nnumber = 3",
                   "stage.product('number', 'number.txt').write_text(str(number))\nstage.metric(number=number)"),
    '20_keypoints': ("run_dir = 'runs/x'\nseed = 0\ntimes = 2\nnap = 0.",
                     "made = int(stage.upstream('10_prepare').path('number').read_text())\n"
                     "folder = stage.product('folder'); folder.mkdir(); (folder/'half').write_text('half')\n"
                     "import time; time.sleep(nap)\n"
                     "if times > 9: raise ValueError(f'{times} is too often')\n"
                     "stage.product('result', 'result.txt').write_text(str(made * times))"),
    '30_crops': ("run_dir = 'runs/x'\nseed = 0\nepochs = 1",
                 "text = stage.upstream('20_keypoints').path('result').read_text()\n"
                 "stage.product('text', 'text.txt').write_text(text)")}


def write_notebook(folder, stage, parameters, work, tail='stage.finish()'):
    cell = lambda id, source, *tags: dict(cell_type='code', id=id, metadata=dict(tags=tags), source=source, execution_count=None, outputs=[])
    nb = dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3')),
              cells=[cell('a', parameters, 'parameters'), cell('b', BEGIN.format(stage) + work), cell('c', tail)])
    (folder/f'{stage}.ipynb').write_text(json.dumps(nb))


@pytest.fixture
def place(tmp_path):
    "A folder with data/ and nbs/ of three stages."
    (tmp_path/'nbs').mkdir(); (tmp_path/'data').mkdir()
    (tmp_path/'data'/'train.csv').write_text('study_id\n1\n')
    for stage, (parameters, work) in SOURCES.items(): write_notebook(tmp_path/'nbs', stage, parameters, work)
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    "The notebook's cells run in this process: seconds less a stage."
    def execute(notebook, run_dir, values, bar=None):
        namespace = dict(values)
        with runner.environ(MSCAN_NBS=str(Path(notebook).parent)):
            for source, tags in runs.notebook_cells(notebook):
                if 'parameters' not in tags: exec(source, namespace)
    monkeypatch.setattr(runner, 'execute', execute)


def go(place, *settings, stages=None, run='run'):
    "Runs the pipeline; which stages were made."
    rows = run_stages(place/'data', place/run, plan(find_stages(place/'nbs'), {}, settings, stages), place/'nbs', say=str)
    return [stage for stage, state, _ in rows if state == 'done']


def cli(place, *args):
    return subprocess.run([*CLI, '--data_dir', place/'data', '--run_dir', place/'run', '--nbs', place/'nbs', *args],
                          capture_output=True, text=True, cwd=place)


def edit(place, stage, old, new):
    file = place/'nbs'/f'{stage}.ipynb'
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_second_call_makes_nothing(place, quick):
    assert go(place) == list(SOURCES)
    assert go(place) == []
    assert read_manifest(place/'run', '30_crops').path('text').read_text() == '6'


def test_weights_that_are_not_there_are_told_before_the_first_stage(place, quick):
    write_notebook(place/'nbs', '40_levels', "run_dir = 'runs/x'\npretrained = 'coco'", 'pass')
    with pytest.raises(RunError, match='40_levels.pretrained: there is no file coco; name one'): go(place)
    assert not (place/'run').exists() and go(place, stages=['10_prepare']) == ['10_prepare']
    (place/'yolo.safetensors').write_bytes(b'weights')
    assert go(place, ('40_levels.pretrained', str(place/'yolo.safetensors'))) == ['20_keypoints', '30_crops', '40_levels']
    assert go(place, ('40_levels.pretrained', 'none')) == ['40_levels'] and go(place, ('40_levels.pretrained', 'imagenet')) == ['40_levels']


@pytest.mark.parametrize('change, made', [
    (lambda p: edit(p, '20_keypoints', 'made * times', 'made + times'), ['20_keypoints', '30_crops']),
    (lambda p: edit(p, '20_keypoints', 'stage.finish()', 'stage.finish()  # the end'), []),
    (lambda p: edit(p, '30_crops', 'epochs = 1', 'epochs = 2'), ['30_crops']),
    (lambda p: (p/'data'/'train.csv').write_text('study_id\n12\n'), list(SOURCES)),
    (lambda p: (p/'data'/'new.dcm').write_text(''), list(SOURCES)),
    (lambda p: (p/'run'/'20_keypoints'/'result.txt').unlink(), ['20_keypoints', '30_crops']),
    (lambda p: (p/'run'/'20_keypoints'/'folder'/'half').unlink(), ['20_keypoints', '30_crops']),
    (lambda p: shutil.rmtree(p/'run'/'10_prepare'), list(SOURCES)),
    (lambda p: (p/'run'/'30_crops'/runs.UNFINISHED).write_text('{}'), ['30_crops']),
], ids=['code', 'comment', 'default', 'data', 'new file', 'product', 'part of a product', 'stage', 'killed while emptying'])
def test_what_a_change_makes_anew(place, quick, change, made):
    go(place); change(place)
    assert go(place) == made
    assert go(place) == []


def test_parameter_reaches_one_stage_or_all(place, quick):
    go(place)
    assert go(place, ('30_crops.epochs', '3')) == ['30_crops']
    assert go(place, ('30_crops.epochs', '3'), ('20_keypoints.seed', '3')) == ['20_keypoints', '30_crops']
    assert go(place, ('seed', '3')) == list(SOURCES)
    record = read_manifest(place/'run', '20_keypoints').record
    assert record['seeds'] == {'seed': 3} and record['parameters'] == dict(seed=3, times=2, nap=0.)


def test_stage_selection_and_stale_upstream(place, quick):
    go(place)
    assert go(place, ('number', '5'), stages=['10_prepare']) == ['10_prepare']
    assert go(place, ('number', '5')) == ['20_keypoints', '30_crops']
    assert read_manifest(place/'run', '30_crops').path('text').read_text() == '10'


def test_a_file_named_by_a_parameter_counts_by_its_content(place, quick):
    edit(place, '30_crops', 'epochs = 1', "epochs = 1\\ncoords_csv = ''")
    go(place)
    table = place/'fixed.csv'; table.write_text('a')
    setting = ('coords_csv', str(table))
    assert go(place, setting) == ['30_crops'] and go(place, setting) == []
    table.write_text('b')
    assert go(place, setting) == ['30_crops']
    assert read_manifest(place/'run', '30_crops').parameters['coords_csv'] == str(table)
    table.unlink()
    assert go(place, setting) == ['30_crops']


def test_a_moved_run_still_works(place, quick):
    go(place)
    (place/'run').rename(place/'elsewhere')
    assert go(place, run='elsewhere') == []
    text = (place/'elsewhere'/'20_keypoints'/'manifest.json').read_text()
    assert read_manifest(place/'elsewhere', '20_keypoints').path('result').read_text() == '6'
    assert str(place) not in text and os.uname().nodename not in text


def test_half_written_stage_is_emptied(place, quick):
    with pytest.raises(ValueError): go(place, ('times', '10'))
    assert (place/'run'/'20_keypoints'/'folder'/'half').exists()
    with pytest.raises(RunError, match='not finished'): read_manifest(place/'run', '20_keypoints')
    assert go(place) == ['20_keypoints', '30_crops']


def test_foreign_folder_is_left_alone(place, quick):
    (place/'run'/'10_prepare').mkdir(parents=True); precious = place/'run'/'10_prepare'/'thesis.doc'; precious.write_text('x')
    with pytest.raises(RunError, match='no stage made it'): go(place)
    assert precious.exists()
    with pytest.raises(RunError, match='inside data_dir'): run_stages(place/'data', place/'data'/'run', {}, place/'nbs')


def test_products_are_checked(place, monkeypatch):
    monkeypatch.setenv('MSCAN_NBS', str(place/'nbs'))
    values = dict(run_dir=str(place/'run'), data_dir=str(place/'data'), seed=0, number=1)
    stage = Stage.begin('10_prepare', values)
    with pytest.raises(RunError, match='outside'): stage.product('x', '../x')
    stage.product('x')
    with pytest.raises(RunError, match='not written'): stage.finish()
    (stage.dir/'x').write_text('x')
    assert stage.finish().products['x']['bytes'] == 1
    with pytest.raises(RunError, match="it has x"): read_manifest(place/'run', '10_prepare').path('y')
    with pytest.raises(RunError, match='parameters cell first'): Stage.begin('10_prepare', {k: v for k, v in values.items() if k != 'number'})


@pytest.mark.parametrize('args, words', [
    (['-p', 'epoch', '3'], 'did you mean epochs?'),
    (['-p', '20_keypoints.epochs', '3'], 'Known: nap, seed, times'),
    (['-p', '20_keypoint.times', '3'], 'did you mean 20_keypoints?'),
    (['-p', 'times', 'two'], 'must be a whole number'),
    (['-p', 'run_dir', 'x'], '--run_dir'),
    (['--stages', '20_keypoints,30_crop'], 'did you mean 30_crops?'),
    (['--stages', '20_keypoints', '-p', '30_crops.epochs', '3'], 'not among the --stages'),
    (['--stages', '20_keypoints', '-p', 'epochs', '3'], "unknown parameter of 20_keypoints 'epochs'"),
    (['--preset', 'dmeo'], 'did you mean demo?'),
    (['--data_dir', 'nowhere'], 'not a folder'),
    (['--nbs', 'data'], 'no stage notebooks'),
    (['--presets', 'demo'], 'unrecognized arguments'),
])
def test_bad_input_is_one_sentence_before_anything_runs(place, args, words, capsys, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as e:
        runner.mscan_run(['--data_dir', 'data', '--run_dir', 'run', '--nbs', 'nbs', *args])
    said = str(e.value.code) if e.value.code != 1 else capsys.readouterr().err
    assert words in said and len(said.strip().split('\n')) == 1
    assert not (place/'run').exists() or not any((place/'run').iterdir())


def test_values_take_the_type_of_the_default():
    declared = {'s': dict(run_dir='', lr=.1, n=1, flag=False, text='a', free=None)}
    texts = [('lr', '1e-3'), ('n', '1e3'), ('flag', 'true'), ('text', '7'), ('free', '2e-4')]
    got = plan(declared, {}, texts)['s']
    assert got == dict(run_dir='', lr=1e-3, n=1000, flag=True, text='7', free=2e-4)
    assert {k: type(v) for k, v in got.items()} == dict(run_dir=str, lr=float, n=int, flag=bool, text=str, free=float)
    for name, value in [('n', '1.5'), ('n', True), ('text', False), ('flag', 'maybe'), ('lr', None), ('n', 'inf')]:
        with pytest.raises(RunError): plan(declared, {'all': {name: value}})


def test_presets_fit_the_notebooks():
    "Every name in a preset is one that its stage declares."
    names = sorted(p.stem for p in (Path(runs.__file__).parent / 'presets').glob('*.yaml'))
    assert {'smoke', 'demo', 'paper', 'rsna'} <= set(names)
    for name in names:
        preset = read_preset(name)
        try: declared = find_stages()
        except RunError: continue  # none written yet
        assert set(preset) <= {*runs.STAGES, 'all'}
        plan(declared, preset)


def test_code_hash_follows_imports(tmp_path):
    package = tmp_path/'mscan'; package.mkdir()
    (package/'a.py').write_text('from .b import x\n'); (package/'b.py').write_text('x = 1\n'); (package/'c.py').write_text('y = 1\n')
    write_notebook(tmp_path, '10_x', "run_dir = 'r'", 'from mscan.a import x\n%matplotlib inline')
    nb = tmp_path/'10_x.ipynb'
    first = code_hash(nb, package)
    (package/'c.py').write_text('y = 2\n'); (package/'b.py').write_text('x = 1  # one\n')
    assert code_hash(nb, package) == first
    (package/'b.py').write_text('x = 2\n')
    assert code_hash(nb, package) != first


def test_a_wheel_has_no_notebooks(monkeypatch, tmp_path):
    monkeypatch.setattr(runs.mscan, '__path__', [str(tmp_path/'site-packages'/'mscan')])
    monkeypatch.delenv('MSCAN_NBS', raising=False)
    with pytest.raises(RunError, match='not with the wheel'): find_nbs()


def test_import_is_cheap():
    heavy = {'torch', 'pandas', 'papermill', 'cv2', 'matplotlib', 'timm', 'ultralytics', 'segmentation_models_pytorch'}
    code = f'import sys, mscan, mscan.runs, mscan.runner; print({heavy} & set(sys.modules))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == 'set()'


def test_failure_is_shown_and_the_run_stops(place):
    done = cli(place, '-p', 'times', '10')
    assert done.returncode == 1
    assert 'stage 20_keypoints failed in cell [3]: ValueError: 10 is too often' in done.stderr
    assert 'executed notebook: run/20_keypoints/20_keypoints.ipynb' in done.stderr.replace(str(place) + '/', '')
    assert 'too often' in (place/'run'/'20_keypoints'/'20_keypoints.ipynb').read_text()
    assert (place/'run'/'10_prepare'/'manifest.json').exists() and not (place/'run'/'30_crops').exists()


def test_killed_run_goes_on_at_the_stage_that_was_cut_off(place):
    half = place/'run'/'20_keypoints'/'folder'/'half'
    with subprocess.Popen([*CLI, '--data_dir', place/'data', '--run_dir', place/'run', '--nbs', place/'nbs', '-p', 'nap', '60'],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(600):
            if half.exists() or process.poll() is not None: break
            time.sleep(.1)
        assert half.exists()
        with pytest.raises(RunError, match='another mscan_run'): go(place)
        first = (place/'run'/'10_prepare'/'manifest.json').read_bytes()
        process.send_signal(signal.SIGKILL)
    assert not (place/'run'/'20_keypoints'/'manifest.json').exists()
    again = cli(place)
    assert again.returncode == 0, again.stderr
    assert (place/'run'/'10_prepare'/'manifest.json').read_bytes() == first
    assert 'was not finished' in again.stderr + again.stdout and 'skipped' in again.stderr + again.stdout
    assert read_manifest(place/'run', '30_crops').path('text').read_text() == '6'


def test_plain_papermill_works_without_the_runner(place):
    for stage, extra in (('10_prepare', ['-p', 'data_dir', str(place/'data')]), ('20_keypoints', ['-p', 'times', '4'])):
        out = place/f'{stage}.out.ipynb'
        done = subprocess.run([sys.executable, '-m', 'papermill', place/'nbs'/f'{stage}.ipynb', out, '-p', 'run_dir', str(place/'run'), *extra],
                              capture_output=True, text=True, env=dict(os.environ, MSCAN_NBS=str(place/'nbs')))
        assert done.returncode == 0, done.stderr
    assert read_manifest(place/'run', '20_keypoints').path('result').read_text() == '12'


def test_links_in_circles_and_to_nowhere_do_not_stop_a_run(tmp_path):
    "A data folder as a hospital exports it: its hash is found, changes with a file behind a link, and is what it was without the odd links' files."
    (tmp_path / 'data' / 'a').mkdir(parents=True)
    (tmp_path / 'far').write_text('1')
    (tmp_path / 'data' / 'a' / 'x').write_text('22')
    plain = listing_hash(tmp_path / 'data')
    (tmp_path / 'data' / 'a' / 'round').symlink_to(tmp_path / 'data')
    (tmp_path / 'data' / 'nowhere').symlink_to(tmp_path / 'none')
    (tmp_path / 'data' / 'link').symlink_to(tmp_path / 'far')
    first = listing_hash(tmp_path / 'data')
    (tmp_path / 'far').write_text('333')
    assert plain[1] == 2 and first[0] != plain[0] and listing_hash(tmp_path / 'data')[0] != first[0]
