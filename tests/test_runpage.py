"The page of a run: it says what the files say, whatever they say, and cannot harm the run."
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pandas as pd
import pytest
import test_runs
from fastcore.xml import to_xml
from test_runs import SOURCES, cli, go

from mscan import runpage
from mscan.executed import explained, output_pieces, table_cells
from mscan.pageparts import OWN, curves, number, table
from mscan.runpage import history_of, read_stages, run_page, stage_state, write_run_page
from mscan.runs import MANIFEST, STAGES, UNFINISHED, RunError, read_manifest

place, quick = test_runs.place, test_runs.quick      # fixtures: a pipeline of three toy stages
COMMAND = [sys.executable, '-c', "import sys\nfrom mscan.runpage import mscan_runreport\nmscan_runreport(*sys.argv[1:])"]


class Seen(HTMLParser):
    "Tags, attributes and text of a page."
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs): self.tags.add(tag); self.attributes += [(tag, *a) for a in attrs]
    def handle_data(self, data): self.words.append(data)
    @property
    def text(self): return ' '.join(' '.join(self.words).split())
    def targets(self): return [v for _, k, v in self.attributes if k in ('href', 'src')]


def page_of(run): return (run / 'report.html').read_text(encoding='utf-8')


# at the end of a run --------------------------------------------------------------------------------------------------

def test_a_run_ends_with_its_page(place, quick):
    go(place)
    seen = Seen(page_of(place / 'run'))
    assert all(s in seen.text for s in SOURCES) and 'number' in seen.text and 'where the answers are' not in seen.text.lower()
    first = page_of(place / 'run')
    go(place, ('30_crops.epochs', '7'))
    assert page_of(place / 'run') != first and '>7<' in page_of(place / 'run')


def test_a_failed_stage_is_told_and_the_run_ends_as_it_did(place):
    done = cli(place, '-p', 'times', '10')
    assert done.returncode == 1 and 'stage 20_keypoints failed' in done.stderr and 'report.html' in done.stdout + done.stderr
    stages = {s.name: s for s in read_stages(place / 'run')}
    assert stages['10_prepare'].state == 'finished' and stages['20_keypoints'].state == 'failed' and stages['30_crops'].state == 'not run'
    assert 'ended with: ValueError: 10 is too often' in Seen(page_of(place / 'run')).text
    assert cli(place).returncode == 0 and 'too often' not in Seen(page_of(place / 'run')).text
    cli(place, '-p', 'times', '10')
    text = Seen(page_of(place / 'run')).text
    assert '20_keypoints: failed. Scores and figures on this page, and 30_crops, are from before that.' in text and 'papermill' not in text


@pytest.mark.parametrize('error', [MemoryError('x'), KeyError('x'), OSError('disk full'), RecursionError('x')])
def test_a_page_that_cannot_be_made_costs_nothing_but_the_page(place, quick, monkeypatch, error):
    def broken(run_dir): raise error
    monkeypatch.setattr(runpage, 'run_page', broken)
    assert go(place) == list(SOURCES) and go(place) == [] and not (place / 'run' / 'report.html').exists()


def test_that_it_could_not_be_written_is_said(place):
    (place / 'run' / 'report.html').mkdir(parents=True)
    done = cli(place)
    assert done.returncode == 0 and re.search(r'report +not written: ', done.stdout + done.stderr)
    assert read_manifest(place / 'run', '30_crops').path('text').read_text() == '6'
    assert not [p.name for p in (place / 'run').iterdir() if 'report.html' in p.name and p.name != 'report.html'], 'half a page is left behind'


# what the files say ---------------------------------------------------------------------------------------------------

def make_stage(run, name='20_keypoints', record=(), notebook=None, **files):
    folder = run / name
    folder.mkdir(parents=True)
    plain = dict(stage=name, parameters={}, inputs={}, products={}, metrics={}, seconds=1., finished='2026-01-01T10:00:00.000+00:00', versions=dict(python='3'), device='cpu', cpus=2, peak_memory_mib=100)
    (folder / MANIFEST).write_text(json.dumps(plain | dict(record)))
    if notebook is not None: (folder / f'{name}.ipynb').write_text(json.dumps(dict(cells=notebook)))
    for file, text in files.items(): (folder / file.replace('__', '.')).write_text(text)
    return folder


def cell(kind, source, outputs=(), *tags): return dict(cell_type=kind, source=source, metadata=dict(tags=list(tags)), outputs=list(outputs))


BAD = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


def test_nothing_that_a_file_says_becomes_markup(tmp_path):
    run = tmp_path / f'r{BAD[:10]}'.replace('/', '')
    shows = [dict(output_type='execute_result', data={'text/html': f'<table onclick="x()"><tr><th>{BAD}</th></tr><tr><td style="x" onload=y>{BAD}</td></tr></table>{BAD}'}),
             dict(output_type='display_data', data={'image/png': f'iVBO{BAD}'}), dict(output_type='display_data', data={'image/svg+xml': '<svg onload=x>', 'text/plain': BAD}),
             dict(output_type='stream', name='stdout', text=BAD), dict(output_type='error', ename=BAD, evalue=BAD)]
    notebook = [cell('markdown', f'# {BAD}\n\n> {BAD}'), cell('code', f'a = 1  # {BAD}', (), 'parameters'), cell('markdown', f'[{BAD}](javascript:alert(1)) {BAD}'), cell('code', 'x', shows)]
    make_stage(run, record=dict(parameters={'a': BAD, BAD: 1}, metrics={BAD: {BAD: BAD}}, products=dict(history=dict(path='history.csv', bytes=1, sha256=BAD), x=dict(path=f'javascript:{BAD}', bytes=2)), versions={BAD: BAD}, device=BAD, commit=BAD, finished=BAD), notebook=notebook,
               history__csv=f'epoch,train_loss,who\n1,2,{BAD[:14]}\n')
    seen = Seen(write_run_page(run).read_text(encoding='utf-8'))
    assert not seen.tags & {'script', 'iframe', 'object', 'embed', 'link', 'base', 'form'} and 'alert(1)' in seen.text
    assert not [a for a in seen.attributes if a[1].startswith('on')]
    assert all(t.startswith(('#', 'data:image/png;base64,', '20_keypoints/')) for t in seen.targets()), seen.targets()
    assert "default-src 'none'" in dict((k, v) for t, k, v in seen.attributes if t == 'meta').get('content', '') or any("default-src 'none'" in (v or '') for _, _, v in seen.attributes)
    assert not re.findall(r'url\(|@import|https?://', write_run_page(run).read_text(encoding='utf-8'))


def test_a_value_beside_its_default_and_meaning(tmp_path):
    make_stage(tmp_path, record=dict(parameters=dict(epochs=7, lr=.1)), notebook=[cell('markdown', '# Points\n\n> Finds them.'), cell('code', 'epochs = 2  # how often\nlr = .1', (), 'parameters'), cell('code', 'epochs = 7', (), 'injected-parameters')])
    text = run_page(tmp_path)
    assert re.search(r'<tr class="set">\s*<td>epochs</td>\s*<td>7</td>\s*<td>2</td>\s*<td>how often</td>', text) and not re.search(r'class="set">\s*<td>lr', text) and 'Finds them.' in text


def test_what_is_damaged_is_said_and_the_rest_is_shown(tmp_path):
    make_stage(tmp_path, '10_prepare')
    (make_stage(tmp_path, '20_keypoints') / MANIFEST).write_text('{"stage": ')
    folder = make_stage(tmp_path, '21_projection', history__csv='epoch,train_loss\n1,\n', record=dict(products=dict(history=dict(path='history.csv', bytes=1))))
    (folder / '21_projection.ipynb').write_text('not a notebook')
    folder = make_stage(tmp_path, '22_sides', record=dict(products=dict(history=dict(path='history.csv', bytes=1))))
    (tmp_path / '30_crops').mkdir(); (tmp_path / '30_crops' / UNFINISHED).write_text('{}')
    make_stage(tmp_path, '50_evaluate', report__json='[]', record=dict(products=dict(report=dict(path='report.json', bytes=1), figures=dict(path='none.png', bytes=1))))
    text = Seen(write_run_page(tmp_path).read_text()).text
    assert [stage_state(tmp_path / s).state for s in ('10_prepare', '20_keypoints', '22_sides', '30_crops', '31_encoders')] == ['finished', 'manifest unreadable', 'finished', 'unfinished', 'not run']
    assert 'manifest unreadable' in text and 'unfinished' in text and '4 of 11 stages finished' in text and 'no loss' in text and history_of(stage_state(tmp_path / '22_sides')) is None


@pytest.mark.parametrize('history, trainings', [
    ('epoch,train_loss,validation_loss\n1,2,3\n2,1,2\n', ['validation loss 2 at epoch 2 of 2']),
    ('epoch,train_loss,validation_loss,grader\n1,2,3,0\n1,2,4,1\n2,1,5,1\n', ['validation loss 3 at epoch 1 of 1', 'validation loss 4 at epoch 1 of 2']),
    ('epoch,box_loss,train_loss,mAP50\n0,1,9,\n1,1,8,.5\n', ['training loss 8 at epoch 1 of 1']),
    ('epoch,train_loss,validation_loss\n1,inf,\n', ['training loss inf at epoch 1 of 1'])])
def test_a_curve_for_each_training(tmp_path, history, trainings):
    (tmp_path / 'h.csv').write_text(history)
    shown = [to_xml(f) for f in curves(pd.read_csv(tmp_path / 'h.csv'))]
    assert len(shown) == len(trainings) and all(words in text for words, text in zip(trainings, shown, strict=True)) and 'nan' not in ''.join(shown)


def test_a_sentence_among_numbers_may_wrap():
    text = to_xml(table([['studies', '71'], ['notes', 'a word ' * 20]], numbers=(1,)))
    assert text.count('class="n"') == 1 and re.search(r'class="n"[^>]*>71<', text)


def test_the_account_of_a_notebook():
    assert explained('a = 1  # "x" # y\nb: int = 2\nc = "#no"') == dict(a=(1, '"x" # y'), c=('#no', ''))
    assert output_pieces(dict(output_type='execute_result', data={'text/plain': 'x' * 9000}))[0][1] == 'x' * 4000
    assert table_cells('<p>no table</p>') == [] and table_cells('<table></table>') == [] and [[c.text for c in r] for t in table_cells('<table><tr><td>1<td>2</table>') for r in t] == [['1', '2']]
    assert number(float('nan')) == '-' and number(-3) == '-3' and number(1.23456e-7) == '1.235e-07'


def test_the_command(tmp_path):
    for f in (0, 1): make_stage(tmp_path / 'cv' / f'fold_{f}')
    done = subprocess.run([*COMMAND, tmp_path / 'cv'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / 'cv' / f'fold_{f}' / 'report.html').is_file() for f in (0, 1))
    done = subprocess.run([*COMMAND, tmp_path / 'cv' / 'fold_0', tmp_path / 'x.html'], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / 'x.html').read_text() == page_of(tmp_path / 'cv' / 'fold_0')
    done = subprocess.run([*COMMAND, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().startswith('mscan_runreport: no stage has run in') and len(done.stderr.strip().split('\n')) == 1
    with pytest.raises(RunError, match='no stage has run'): read_stages(tmp_path / 'nowhere')


# a real one -----------------------------------------------------------------------------------------------------------

@pytest.mark.xdist_group('pipeline')
def test_the_page_of_a_run_says_what_its_files_say(run, tmp_path):
    folder = run[0]
    text = write_run_page(folder, tmp_path / 'page.html').read_text(encoding='utf-8')
    seen, manifests = Seen(text), {s: read_manifest(folder, s) for s in STAGES}
    assert '11 of 11 stages finished' in seen.text and not seen.tags & {'script', 'link', 'iframe'}
    trainings = sum(len(t.groupby(keys)) if (keys := [c for c in t if not OWN.fullmatch(c)]) else 1 for s in STAGES if (t := history_of(stage_state(folder / s))) is not None)
    assert trainings >= 15 and text.count('<div class="curves">') >= 5 and text.count('0 0 268 150"') == trainings
    report = json.loads(manifests['50_evaluate'].path('report').read_text())
    assert f"{report['competition']['model']['score']:.3f}" in seen.text and 'these figures flatter' in seen.text and f"{report['gain_over_prior']['score'][0]:+.3f}" in seen.text
    for s, m in manifests.items():
        section = Seen(text[text.index(f'id="{s}"'):]).text
        assert all(f' {name} {json.dumps(value, ensure_ascii=False)} ' in f' {section} ' for name, value in m.record['parameters'].items()), s
        for p in m.products.values(): assert p['path'] in seen.text
    files = [unquote(t) for t in seen.targets() if not t.startswith(('#', 'data:'))]
    assert len(files) > 60 and all((folder / f).exists() for f in files)
    assert {f'data:image/png;base64,{part}' for part in ('iVBORw0KGgo',)} <= {t[:33] for t in seen.targets()}, '50_evaluate\'s pictures are not shown'
    assert not re.findall(r'https?://', re.sub(r'base64,[A-Za-z0-9+/=]+', '', text)) and len(text) < 5e6
