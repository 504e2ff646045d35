"The rules of the house that a machine can keep."
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
BIN = Path(sys.executable).parent
MAX_CELL_LINES = 45


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])
def code(path): return [c for c in cells(path) if c['cell_type'] == 'code']
def is_run(cell): return '#| eval: false' in source(cell)
def exported(cell): return re.search(r'^#\|\s*export', source(cell), re.M) is not None
def module_of(path): return next((m[1] for c in code(path) if (m := re.search(r'^#\|\s*default_exp\s+(\w+)', source(c), re.M))), None)


PLACE = {module_of(p): k for k, p in enumerate(NOTEBOOKS)}    # the order of the notebooks is the order of imports


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_exported_cells_are_short(path):
    long = [source(c).split('\n')[1] for c in code(path) if exported(c) and len(source(c).strip().split('\n')) > MAX_CELL_LINES + 1]
    assert not long, f'exported cells over {MAX_CELL_LINES} lines: {long}'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_module_imports_only_what_stands_before_it(path):
    own = PLACE[module_of(path)]
    for cell in filter(exported, code(path)):
        for node in ast.walk(ast.parse(source(cell))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.startswith('mscan.') and name.split('.')[1] in PLACE: assert PLACE[name.split('.')[1]] < own, f'{path.name} imports {name}, which comes later'


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if any(is_run(c) for c in code(p))], ids=lambda p: p.stem)
def test_a_run_part_has_parameters_and_no_definitions(path):
    run = [c for c in code(path) if is_run(c)]
    assert sum('parameters' in c['metadata'].get('tags', []) for c in run) == 1 and 'parameters' in run[0]['metadata']['tags']
    assert len(run) <= 11, f'{len(run)} cells: parameters and at most ten'
    for c in run:
        assert not any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in ast.walk(ast.parse(source(c)))), source(c)[:80]
        assert not exported(c) and not c['outputs']
    after = code(path)[code(path).index(run[0]):]
    assert all(is_run(c) for c in after), 'the run part comes last and every cell of it is marked'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_opens_with_its_title_and_sentence(path):
    first = next(c for c in cells(path) if c['cell_type'] == 'markdown')
    assert re.match(r'# \S.*\n\n> \S', source(first)) and first in cells(path)[:2], source(first)[:60]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_lessons_assert_and_code_is_explained(path):
    all_cells = cells(path)
    assert any('assert ' in source(c) for c in code(path) if not exported(c) and not is_run(c)), 'no lesson asserts anything'
    assert sum(c['cell_type'] == 'markdown' for c in all_cells) >= sum(map(exported, code(path))) * .6, 'too little prose for the code'


def test_notebooks_and_modules_are_in_step(tmp_path):
    "nbdev_export and nbdev_clean change nothing: what is committed is what the notebooks say."
    clone = tmp_path / 'copy'
    for name in ('nbs', 'mscan'): shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'setup.py'): shutil.copy(ROOT / name, clone)
    before = {p.relative_to(clone): p.read_bytes() for d in ('nbs', 'mscan') for p in (clone / d).glob('*.*') if p.suffix in ('.py', '.ipynb')}
    for tool in ('nbdev_export', 'nbdev_clean'):
        done = subprocess.run([BIN / tool], cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    changed = [str(p) for p, old in before.items() if (clone / p).read_bytes() != old] + [str(p.relative_to(clone)) for p in (clone / 'mscan').glob('*.py') if p.relative_to(clone) not in before]
    assert not changed, f'run nbdev_export and nbdev_clean, then commit: {changed}'


def test_importing_mscan_is_cheap():
    "No model zoo, and for the readers of tables and geometry not even torch."
    probe = "import sys, mscan, mscan.rsna, mscan.geometry, mscan.metrics, mscan.runs; print([m for m in ('torch', 'timm', 'ultralytics', 'segmentation_models_pytorch', 'cv2') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', probe], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    probe = "import sys, mscan.keypoints, mscan.encoders, mscan.levels, mscan.grading, mscan.submission; print([m for m in ('timm', 'ultralytics', 'segmentation_models_pytorch') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', probe], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_geometry_needs_numpy_alone_and_crossattention_torch_alone():
    for name, allowed in (('geometry', {'numpy', 'dataclasses'}), ('crossattention', {'torch', 'contextlib', 'functools'})):
        tree = ast.parse((ROOT / 'mscan' / f'{name}.py').read_text(encoding='utf-8'))
        found = {(n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split('.')[0] for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))}
        assert found <= allowed, found - allowed


def test_ruff_finds_no_errors():
    done = subprocess.run([BIN / 'ruff', 'check', '--select', 'E9,F63,F7,F82,F401,F811,F841,B006,B023', '--isolated', '--no-cache', '--exclude', 'mscan/_modidx.py', 'mscan', 'tests', 'benchmarks', 'submission', 'docs', 'setup.py'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_paths_of_a_machine_in_what_is_committed():
    # written in pieces, so that this file does not find itself
    words = ['/' + w + '/' for w in ('work', 'root', 'home/[a-z]+')] + ['https?://[a-z0-9.-]+/' + 'simple/']
    for path in [*NOTEBOOKS, *(ROOT / 'mscan').glob('*.py'), *(ROOT / 'tests').glob('*.py'), *(ROOT / 'benchmarks').glob('*.*'), *(ROOT / 'submission').glob('*.*'), *(ROOT / 'docs').glob('*.*'), ROOT / 'README.md', ROOT / 'Makefile', ROOT / 'requirements.lock']:
        hits = re.findall('|'.join(words), path.read_bytes().decode('latin-1'))     # pictures too
        assert not hits, (path.name, hits[:3])


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_few_and_small(path):
    size = sum(len(json.dumps(c['outputs'])) for c in code(path))
    assert size < 700_000, f'{size} bytes of outputs'
