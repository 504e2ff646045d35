"What the pages say is so: links lead somewhere, commands and their options exist, short commands run word for word, generated tables are current, quoted messages are said."
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from functools import cache

import pytest
import yaml
from conftest import BIN, ENV, ROOT
from fakes import complete

from mscan.runner import find_stages, plan, read_preset
from mscan.runs import declared_parameters

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')), ROOT / 'benchmarks/README.md', ROOT / 'submission/README.md']
INI = ConfigParser(delimiters=['='], interpolation=None)
INI.read(ROOT / 'settings.ini', encoding='utf-8')
SCRIPTS = dict(line.split('=') for line in INI['DEFAULT']['console_scripts'].split())
MAKEFILE = (ROOT / 'Makefile').read_text(encoding='utf-8')
FOREIGN = ('accelerate', 'torchrun', 'pip', 'kaggle', 'docker', 'git', 'export', '.', '.venv/bin/uv', 'cd', 'pytest', 'nbdev_docs')   # other programs, which no test here can answer for
name = lambda path: str(path.relative_to(ROOT))


# Reading a page

def blocks(path) -> list:
    "(language, text) of the fenced blocks of a page."
    return re.findall(r'^ *```(\w*)\n(.*?)^ *```', path.read_text(encoding='utf-8'), re.M | re.S)


def prose(path) -> str: return re.sub(r'^ *```.*?^ *```', '', path.read_text(encoding='utf-8'), flags=re.M | re.S)


def spans(path) -> list: return re.findall(r'(?<!`)`([^`\n]+)`(?!`)', prose(path))


def headings(path) -> list:
    "The anchors of a page or a notebook."
    if path.suffix == '.ipynb': text = '\n\n'.join(''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown')
    else: text = prose(path)
    words = [re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', h) for h in re.findall(r'^#+ +(.*?)\s*$', text, re.M)]
    return [re.sub(r'[^\w\- ]', '', w.lower()).replace(' ', '-') for w in words]


def shown_lines(text: str) -> list:
    "The command lines of a block, continued lines joined."
    return [line.strip() for line in re.sub(r'\\\n\s*', ' ', text).split('\n') if line.strip() and not line.strip().startswith('#')]


def commands(line: str) -> list:
    "The words of each command of a line; a <placeholder> is one word, a comment none."
    words, out = shlex.split(re.sub(r'<([^<>]*)>', lambda m: f'"<{m[1]}>"', line).replace('""', '"'), comments=True), [[]]
    for w in words:
        if w in ('&&', ';', '|'): out.append([])
        else: out[-1].append(w)
    for c in out:
        while c and re.fullmatch(r'[A-Z_]+=.*', c[0]): c.pop(0)
    return [c for c in out if c]


LINES = [(p, line) for p in PAGES for language, text in blocks(p) if language in ('sh', 'bash') for line in shown_lines(text)]
SPANS = [(p, s) for p in PAGES for s in spans(p) if re.match(r'(mscan_\w+|make|papermill|python -m|python docs|-p) \S', s) and '...' not in s]


# Links

@pytest.mark.parametrize('path', PAGES, ids=name)
def test_links_lead_somewhere(path):
    wrong = []
    for target in re.findall(r'\[[^][]*(?:\[[^]]*\][^][]*)*\]\(([^)\s]+)\)', prose(path)):
        if re.match(r'https?://', target): continue
        file, _, anchor = target.partition('#')
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or anchor and anchor not in headings(there): wrong.append(target)
    assert not wrong


def test_every_page_can_be_reached_from_the_index_and_the_index_from_readme():
    index = (ROOT / 'docs/README.md').read_text(encoding='utf-8')
    assert [p.name for p in (ROOT / 'docs').glob('*.md') if p.name != 'README.md' and f']({p.name})' not in index] == []
    assert '](docs/README.md)' in (ROOT / 'README.md').read_text(encoding='utf-8')


# Commands and their options

def test_commands_stand_in_blocks_that_are_looked_at():
    bare = [(name(p), line) for p in PAGES for language, text in blocks(p) if language not in ('sh', 'bash') for line in shown_lines(text) if re.match(r'(mscan_\w+|make|python\d?|papermill|kaggle|pip) ', line)]
    assert not bare and len(LINES) > 40 and len(SPANS) > 20


@cache
def help_of(script: str, *first) -> str:
    "What --help of a console script says; asked in this process."
    module, function = SCRIPTS[script].split(':')
    function = getattr(importlib.import_module(module), function)
    if hasattr(function, '__wrapped__'):
        from fastcore.script import anno_parser
        return anno_parser(function.__wrapped__).format_help()
    return printed(function, [*first, '--help'])


@cache
def help_of_module(module: str) -> str: return printed(importlib.import_module(module).main, ['--help'])


def printed(function, argv) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as end: function(argv)
    assert not end.value.code
    return said.getvalue()


def options(help_text: str) -> set: return set(re.findall(r'(?<![\w-])--?[a-zA-Z_]\w*', help_text))


def check_settings(words: list, preset: str=''):
    "Every `-p NAME VALUE` is a parameter of a stage, and of its kind."
    pairs = [(words[i + 1], words[i + 2]) for i, w in enumerate(words) if w == '-p' and i + 2 < len(words)]
    plan(find_stages(), read_preset(preset) if preset else {}, pairs)


def check_command(words: list):
    "Fails with what is wrong about a command."
    if words[0] in ('accelerate', 'torchrun'): words = words[next((i for i, w in enumerate(words) if w in SCRIPTS), 0):]   # what is launched
    head, *rest = words
    head = head.removeprefix('.venv/bin/') if head not in FOREIGN else head
    asked = {w.partition('=')[0] for w in rest if re.match(r'--?[a-zA-Z]', w)}
    if head in SCRIPTS:
        text = help_of(head, *(rest[:1] if head == 'mscan_weights' and rest and not rest[0].startswith('-') else ()))
        assert asked <= options(text), f'{head} has no {asked - options(text)}'
        preset = rest[rest.index('--preset') + 1] if '--preset' in rest else ''
        if head in ('mscan_run', 'mscan_folds'): check_settings(rest, preset if not preset.endswith('.yaml') else '')
    elif head == 'make':
        for w in rest:
            variable = w.partition('=')[0]
            assert f'$({variable})' in MAKEFILE if '=' in w else re.search(rf'^{re.escape(w)}:', MAKEFILE, re.M), f'Makefile has no {w}'
    elif head in ('python', 'python3') and rest[0] == '-m':
        if not rest[1].isupper() and not rest[1].endswith('.NAME'): assert asked - {'-m'} <= options(help_of_module(rest[1])), f'{rest[1]} has no {asked}'
    elif head in ('python', 'python3'): assert (ROOT / rest[0]).is_file(), rest[0]
    elif head == 'papermill':
        known = declared_parameters(ROOT / rest[0])
        assert all(rest[i + 1] in known for i, w in enumerate(rest) if w == '-p')
    elif head == '-p': check_settings(words)
    elif head.startswith('nbdev_') and head not in FOREIGN: assert (BIN / head).exists()
    else: assert head in FOREIGN, f'{head}: say in tests/test_docs.py how it is checked'


@pytest.mark.parametrize('path', PAGES, ids=name)
def test_commands_and_options_exist(path):
    for where, line in [*LINES, *SPANS]:
        if where != path: continue
        for words in commands(line):
            try: check_command(words)
            except Exception as e: pytest.fail(f'{line}\n{type(e).__name__}: {e}')


@pytest.mark.parametrize('line', ['mscan_check --data_dri x', 'mscan_score --train_csv x --verbose', 'mscan_weights convert a b --trsut', 'mscan_runn --plan', 'make demmo', 'make kaggle RUNN=x', 'python -m benchmarks.noisy --slice 1', 'python docs/nothing.py',
                                  'mscan_run --data_dir x --run_dir y --preset demmo', 'mscan_run --data_dir x --run_dir y -p epohcs 3', 'mscan_folds --data_dir x --run_dir y --preset rsna -p 30_crops.size_px large', '-p 22_sides.side network', 'papermill nbs/21_projection.ipynb out.ipynb -p rules plane'])
def test_a_wrong_command_is_noticed(line):
    with pytest.raises((AssertionError, ValueError)): [check_command(words) for words in commands(line)]


# Commands that are short enough are carried out, word for word, on a desk with a small phantom and a run of preset smoke

STANDS_FOR = {                              # what the pages leave to the reader, and what it is on the desk
    'competition folder, as unpacked': 'data/mine', 'competition folder': 'data/mine', 'competition folder, or any folder of DICOM files': 'data/mine', 'the same': 'data/mine',
    'test_images, or any folder of DICOM files': 'data/mine/test_images', 'any folder of DICOM files': 'data/mine/test_images', 'folder with test_images': 'data/mine', 'your folder': 'data/mine',
    'held-out studies': 'data/mine', 'labelled, not trained on': 'data/mine', 'labels': 'data/mine/test_labels.csv', 'its labels': 'data/mine/test_labels.csv',
    'complete headers': 'data/complete', 'headers complete': 'data/complete', 'a folder whose headers are complete': 'data/complete', 'any submission.csv': 'out/submission.csv'}
GRADES = ('mscan_predict', 'mscan_report', 'mscan_review', 'mscan_sr')


def is_short(words: list) -> bool:
    "Whether a command takes seconds on the desk."
    if words[0] == 'mscan_run': return '--plan' in words
    if words[0] == 'mscan_phantom': return 'small' in words
    return words[0] in ('mscan_check', 'mscan_score', 'mscan_evaluate', *GRADES) and 'data/proof' not in words


def spread(folder, small_data, run):
    "A fresh desk: a project folder of its own, data/mine, data/complete, and a run under the names that pages use."
    folder.mkdir()
    shutil.copy(ROOT / 'settings.ini', folder)                # relative paths start at the project
    for at in ('mine', 'demo'): shutil.copytree(small_data, folder / 'data' / at)
    shutil.copytree(small_data / 'test_images', folder / 'data/complete/test_images')
    shutil.copy(small_data / 'test_series_descriptions.csv', folder / 'data/complete')
    for study in (folder / 'data/complete/test_images').iterdir(): complete(study)
    (folder / 'runs').mkdir()
    for at in ('mine', 'demo'): (folder / 'runs' / at).symlink_to(run)
    (folder / 'out').mkdir()
    mine = tuple(f'{p.name}_' for p in (folder / 'data/mine/test_images').iterdir())
    rows = (run / '60_submission/submission.csv').read_text().splitlines(True)
    (folder / 'out/submission.csv').write_text(''.join(r for r in rows if r.startswith(('row_id', *mine))))
    return folder


def carried_out(line: str, desk):
    "Runs a line as it stands, placeholders replaced; fails with what it said."
    unknown = [w for w in re.findall(r'<([^<>]*)>', line) if w not in STANDS_FOR]
    assert not unknown, f'{line}\nsay in STANDS_FOR what {unknown} is on the desk'
    line = re.sub(r'<([^<>]*)>', lambda m: STANDS_FOR[m[1]], line).replace('1187247764', sorted(p.name for p in (desk / 'data/mine/test_images').iterdir())[0])
    done = subprocess.run(['bash', '-ec', line], cwd=desk, capture_output=True, text=True, env=ENV | dict(PATH=f'{BIN}{os.pathsep}{os.environ["PATH"]}'))
    assert done.returncode == 0, f'{line}\n{(done.stdout + done.stderr)[-2500:]}'


def short_lines(path, grading: bool) -> list:
    "The short lines of a page; without those that make a phantom or load networks."
    return [line for p, line in LINES if p == path for words in commands(line)[:1] if is_short(words) and (grading or words[0] not in ('mscan_phantom', *GRADES))]


@pytest.fixture
def desk(tmp_path, small_data, run): return spread(tmp_path / 'desk', small_data, run[0])


@pytest.mark.parametrize('page', ['README.md', 'docs/check.md', 'docs/presets.md'])
def test_short_commands_run(page, desk):
    shutil.copytree(desk / 'data/mine', desk / 'data/quick')
    for language, text in blocks(ROOT / page):
        if language == 'yaml': (desk / re.match(r'# (\w+\.yaml)', text)[1]).write_text(text)
    lines = short_lines(ROOT / page, grading=False)
    for line in lines: carried_out(line, desk)
    assert lines


@pytest.mark.slow
@pytest.mark.parametrize('page', ['README.md', 'docs/your-data.md', 'docs/report.md'])
def test_a_page_followed_word_for_word(page, desk):
    lines = short_lines(ROOT / page, grading=True)
    for line in lines: carried_out(line, desk)
    for language, text in blocks(ROOT / page):
        if language == 'python': carried_out(f'{shlex.quote(sys.executable)} -c {shlex.quote(text)}', desk)
    assert len(lines) > 3


@pytest.mark.parametrize('path', PAGES, ids=name)
def test_python_blocks_are_python(path):
    for language, text in blocks(path):
        if language == 'python': compile(text, name(path), 'exec')


# What is copied from elsewhere

def test_generated_tables_are_current():
    import parameters
    for page, write in parameters.WRITERS.items(): assert write(page.read_text(encoding='utf-8')) == page.read_text(encoding='utf-8'), f'{page.name} is not current: python docs/parameters.py'


def test_every_parameter_has_a_meaning():
    import parameters
    lines = [line for line in parameters.tables() if line.startswith('| `')]
    assert len(lines) > 100 and not [line for line in lines if line.endswith('|  |')], 'a comment behind it in the parameters cell'


# Results

TABLE = """7 studies.

### weighted log loss / that of the given prior, per condition, side and level

| condition | L1/L2 | L2/L3 | L3/L4 | L4/L5 | L5/S1 | all levels |
| --- | --- | --- | --- | --- | --- | --- |
| canal | .1 / .2 | .3 / .4 | .5 / .6 | .7 / .8 | .9 / .11 | .12 / .13 |
| recess, left | .2 / .2 | .3 / .4 | .5 / .6 | .7 / .8 | .9 / .11 | .14 / .15 |

### labelled rows and areas, all levels

| condition | labelled rows | AUROC, macro | AUROC, binary |
| --- | --- | --- | --- |
| canal | 520 | .91 | .92 |
| recess, left | 499 | .93 | .94 |

### parts of the score, with 95 % intervals over studies

| part of the score | model | given prior | model - given prior, paired |
| --- | --- | --- | --- |
| canal | .31 [.30, .32] | 1 | -.5 [-.6, -.4] |
"""


def test_results_reach_readme_from_the_files_of_a_run(tmp_path):
    import results
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    (tmp_path / 'proof').mkdir()
    (tmp_path / 'proof/table.md').write_text(TABLE)
    with pytest.raises(FileNotFoundError, match='sides.json is absent; `make proof` makes it'): results.filled(readme, tmp_path, tmp_path)
    figure = lambda name, k, **more: dict(figure=name, value=k + .1234, low=k + .1, high=k + .2) | more
    sides = [figure(f'{what}, {way}: {which}', k) for k, (what, way, which) in enumerate((what, way, which) for what in ('foramen', 'recess', 'recess, canal astray') for way in ('network', 'offset') for which in ('within one slice', 'exact slice', 'median in plane, mm'))]
    lost = [f for k, (_, way, *_) in enumerate(results.WAYS) for f in (figure(f'{way}: score', k, studies=5), figure(f'{way} - whole: score', k))] + [figure(name, -9) for name in results.RUNGS.values()]
    for name, figures in (('sides', sides), ('missing', lost)): (tmp_path / f'{name}.json').write_text(json.dumps(dict(figures=figures)))
    made = results.filled(readme, tmp_path, tmp_path)
    for line in ('| on 7 held-out phantom studies | M-SCAN, both sides | prior | less the prior, paired |', '| canal | .31 [.30, .32] | 1 | -.5 [-.6, -.4] |', '| recess, left | .2 / .2 | .3 / .4 | .5 / .6 | .7 / .8 | .9 / .11 | .14 / .15 | .94 |',
                 '| foramen, in the slice, median mm | 2.1 [2.1, 2.2] | 5.1 [5.1, 5.2] |', '| the same where the canal point is 4 mm astray | 14.1 [14.1, 14.2] | 17.1 [17.1, 17.2] |',
                 '| axial T2 | 1.12 [1.10, 1.20] | +1.123 [+1.100, +1.200] | graded rows | recesses -8.88 [-8.90, -8.80] |', '| all but one of several axial series (5 studies) | 3.12 [3.10, 3.20] | +3.123 [+3.100, +3.200] | model |  |'):
        assert made.count(line) == 1 and line not in readme, line
    outside = lambda text: re.sub(r'(<!-- (proof|places|missing) -->).*?(<!-- /)', r'\1\3', text, flags=re.S)
    assert outside(made) == outside(readme) and results.filled(made, tmp_path, tmp_path) == made     # nothing else is touched, and once is enough


@cache
def said() -> str:
    "All code that can say something, sentences that are written in pieces joined."
    files = [*(ROOT / 'mscan').glob('*.py'), *(ROOT / 'submission').glob('*.py')]
    text = [p.read_text(encoding='utf-8') for p in files]
    for p in (ROOT / 'nbs').glob('*.ipynb'): text += [''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    return re.sub(r"""['"]\s*\n\s*f?['"]""", '', '\n'.join(text))


def test_quoted_messages_are_said():
    quoted = [line for language, text in blocks(ROOT / 'docs/troubleshooting.md') if language == 'text' for line in text.strip().split('\n')]
    parts = {line: [part.strip() for part in line.split('…') if len(part.strip()) > 4] for line in quoted}
    wrong = [line for line, found in parts.items() if not found or any(part not in said() for part in found)]
    assert len(quoted) > 40 and not wrong


# How it is cited, and the site

def test_the_citation_names_what_it_must():
    cited = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    assert {'cff-version', 'message', 'title', 'authors'} <= set(cited) and str(cited['version']) == INI['DEFAULT']['version'] and cited['license'] == 'Apache-2.0'
    assert all({'type', 'title', 'authors'} <= set(r) for r in cited['references'])
    assert all(f'{a["family-names"]}' in (ROOT / 'docs/cite.md').read_text(encoding='utf-8') for r in cited['references'] for a in r['authors'])


def test_the_site_is_ready_for_quarto(tmp_path):
    "What nbdev_docs does up to the point where Quarto is needed, in a copy; README stays as it is written by hand."
    for folder in ('nbs', 'mscan'): shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for file in ('settings.ini', 'README.md'): shutil.copy(ROOT / file, tmp_path)
    code = 'from nbdev.quarto import *; refresh_quarto_yml(); nbdev_sidebar.__wrapped__(file_glob=None, file_re=r"\\.(?:ipynb|qmd|html)$"); nbdev_readme.__wrapped__(chk_time=True)'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in ('_quarto.yml', 'nbdev.yml'): assert (tmp_path / 'nbs' / file).read_text() == (ROOT / 'nbs' / file).read_text(), f'{file} is not what settings.ini says'
    site, own = (yaml.safe_load((ROOT / 'nbs' / f).read_text()) for f in ('_quarto.yml', 'nbdev.yml'))
    assert site['metadata-files'] == ['nbdev.yml', 'sidebar.yml'] and (ROOT / 'nbs' / site['format']['html']['css']).is_file() and own['website']['title'] == 'mscan'
    listed = yaml.safe_load((tmp_path / 'nbs/sidebar.yml').read_text())['website']['sidebar']['contents']
    assert listed[0] == 'index.qmd' and sorted(listed[1:]) == sorted(p.name for p in (ROOT / 'nbs').glob('*.ipynb'))
    assert (tmp_path / 'README.md').read_text() == (ROOT / 'README.md').read_text()
