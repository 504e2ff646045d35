"mscan_check: the page says what the report says, once, escaped, without a network; what has been read is not read again; what is interrupted loses nothing."
import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pydicom
import pytest

import mscan.check
from mscan.check import VERSION, check, mscan_check, sequence_words, study_record, text_lines
from mscan.dicom import read_study
from mscan.flags import SEVERITIES, discreet, flags_of, urgency, worst
from mscan.geometry import centre, plane_of
from mscan.mirror import conventional, restored
from mscan.page import page_of
from mscan.thumbnails import axial_slice, pictures_of, sagittal_slice

VOID = {'meta', 'input', 'br', 'image', 'path', 'img', 'link', 'hr'}
ENV = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg')


class Page(HTMLParser):
    "A page as lists: tags, links, and of every study its attributes, flags, series and pictures. Every tag must be closed."
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.studies, self.item, self.script = [], [], [], [], None, ''
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.tags.append(tag)
        self.links += [a[k] for k in ('href', 'src', 'action', 'srcset', 'poster') if k in a]
        if tag not in VOID: self.open.append(tag)
        if tag == 'article': self.studies.append(dict(a, found=[], series=[], pictures=[]))
        if tag == 'li' and 'data-code' in a: self.item = [a['data-code'], '']
        if tag == 'td' and a.get('class') == 'id': self.studies[-1]['series'].append('')
        if tag == 'svg': self.studies[-1]['pictures'].append(dict(a, paths={}))
        if tag == 'path': self.studies[-1]['pictures'][-1]['paths'].setdefault(a['class'], []).append(a['d'])

    def handle_startendtag(self, tag, attrs): self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag in VOID: return
        assert self.open.pop() == tag
        if tag == 'li' and self.item: self.studies[-1]['found'].append(tuple(self.item)); self.item = None

    def handle_data(self, data):
        if self.open[-1:] == ['script']: self.script += data
        elif self.item and self.open[-1] == 'li': self.item[1] += data
        elif self.open[-1:] == ['td'] and self.studies and self.studies[-1]['series'][-1:] == ['']: self.studies[-1]['series'][-1] = data


def lines_of(paths): return [np.array([e.split() for e in line.split('L')], float) for d in paths for line in d.split('M')[1:]]


@pytest.fixture(scope='module')
def data(small_data, tmp_path_factory):
    "The small phantom with a study of which nothing is readable, one without axial slices, one with an empty file, and a hostile one."
    folder = tmp_path_factory.mktemp('check') / 'data'
    shutil.copytree(small_data, folder)
    tables = pd.read_csv(folder / 'test_series_descriptions.csv', dtype=str).dropna()
    good = sorted((folder / 'test_images').iterdir())[0]
    mine, rows = tables[tables.study_id == good.name], []
    view = dict(zip(mine.series_id, mine.series_description, strict=True))

    def unreadable(to): [f.write_bytes(b'no') for f in to.glob('*/*')]
    def no_axial(to): [shutil.rmtree(to / s) for s, v in view.items() if 'Axial' in v]
    def one_empty(to): next(f for s, v in view.items() if 'Axial' in v for f in sorted((to / s).iterdir())).write_bytes(b'')
    def hostile(to):
        for f in to.glob('*/*'):
            d = pydicom.dcmread(f)
            d.SeriesDescription = f'{d.SeriesDescription} <script>alert(1)</script>'
            d.save_as(f)
        (to / '<img src=x onerror=alert(2)>').mkdir()
        (to / '<img src=x onerror=alert(2)>' / '<b>').write_bytes(b'<u>')
    for k, change in enumerate((unreadable, no_axial, one_empty, hostile)):
        to = folder / 'test_images' / str(900 + k)
        shutil.copytree(good, to)
        change(to)
        rows.append(mine.assign(study_id=to.name))
    bad = rows[-1].iloc[:1].assign(series_id='7', series_description='<i>T9</i>')
    pd.concat([tables, *rows, bad]).to_csv(folder / 'test_series_descriptions.csv', index=False)
    return folder


@pytest.fixture(scope='module')
def made(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('page')
    report = check(data, out, workers=2, progress=False)
    return report, out, Page((out / 'check.html').read_text(encoding='utf-8'))


def test_every_study_is_on_the_page_once_the_most_urgent_first(made, data):
    report, out, page = made
    on_disk = {p.name for s in ('train', 'test') for p in (data / f'{s}_images').iterdir()}
    shown = [s['data-study'] for s in page.studies]
    assert len(shown) == len(on_disk) and set(shown) == on_disk
    assert shown[:2] == ['900', '901'], 'nothing readable, then no axial series'
    ranks = [list(SEVERITIES).index(s['data-severity']) if s['data-severity'] in SEVERITIES else 9 for s in page.studies]
    assert ranks == sorted(ranks) and [int(s['data-rank']) for s in page.studies] == list(range(len(shown)))
    first = re.findall(r'href="#(s\d+)"><b>([^<]*)', (out / 'check.html').read_text(encoding='utf-8'))
    assert first[:2] == [('s0', '900'), ('s1', '901')] and page.studies[0]['id'] == 's0'


def test_the_json_beside_it_says_the_same(made):
    report, out, page = made
    data = json.loads((out / 'check.json').read_text(encoding='utf-8'))
    assert data == json.loads(json.dumps({k: v for k, v in report.items() if k != 'read'})) and data['version'] == VERSION
    records = {r['study_id']: r for r in data['train'] + data['test']}
    for s in page.studies:
        r = records[s['data-study']]
        assert s['data-severity'] == r['severity'] and int(s['data-rank']) == r['rank']
        assert [(c, t.strip()) for c, t in s['found']] == [(f['code'], f['sentence']) for f in r['flags']]
        assert s['series'] == [x['series_id'] for x in r['series']]
    for f in data['summary']['flags']: assert f['studies'] == sum(any((g['code'], g['severity']) == (f['code'], f['severity']) for g in r['flags']) for r in records.values())
    assert sum(data['summary']['severities'].values()) == len(records)
    written = set().union(*(set(r) for r in records.values()), *(set(x) for r in records.values() for x in r['series'] + r['flags']))
    undocumented = {k for k in written if not re.search(rf'\b{k}\b', ' '.join([*data['keys'], *data['keys'].values()]))}
    assert set(data) <= set(data['keys']) | {'keys'} and not undocumented, undocumented


def test_whatever_headers_folders_and_tables_say_is_text(made):
    report, out, page = made
    text = (out / 'check.html').read_text(encoding='utf-8')
    assert page.tags.count('script') == 1 and not {'img', 'i', 'u'} & set(page.tags)
    assert '&lt;img src=x onerror=alert(2)&gt;' in text and 'alert(1)' not in text
    record = next(r for r in report['test'] if r['study_id'] == '903')
    assert any('·' in s['said'] for s in record['series']) and any('<img' in s['series_id'] and s['use'] == 'left out' for s in record['series'])


def test_nothing_is_loaded_from_anywhere(made):
    page, text = made[2], (made[1] / 'check.html').read_text(encoding='utf-8')
    assert page.links and all(re.match(r'#s\d+$|data:image/webp;base64,[A-Za-z0-9+/=]+$', link) for link in page.links)
    assert not re.search(r'https?:|url\(|@import|//[a-z]', re.sub(r'base64,[^"]*', '', text)) and not {'link', 'iframe', 'object', 'embed', 'form', 'base'} & set(page.tags)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)', text)[1].replace('&#x27;', "'")
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"'sha256-{digest}'" in policy, 'the one script is the one that may run'
    assert not re.search(r'\son[a-z]+=', re.sub(r'&lt;.*?&gt;', '', text[text.index('<body>'):text.index('<script>')]))


def carried(plane, axial, w, h):
    "The middle of an axial slice, moved within that slice onto the sagittal plane, in pixels of a picture of w x h."
    middle, along = centre(axial), plane.normal - plane.normal @ axial.normal * axial.normal
    middle = middle - along * plane.distance(middle) / (along @ plane.normal)
    return (plane.to_pixel(middle) + .5) * [w / plane.shape[1], h / plane.shape[0]] - .5


def beside(line, xy): return abs(np.linalg.det([line[1] - line[0], xy - line[0]])) / np.linalg.norm(line[1] - line[0])


def test_planes_are_drawn_where_geometry_says(made, data):
    "The line of an axial slice passes through the middle of that slice, put onto the sagittal slice through patient space."
    checked = 0
    for shown in made[2].studies:
        split = 'test' if (data / 'test_images' / shown['data-study']).is_dir() else 'train'
        study = read_study(data, split, shown['data-study'])
        for view, picture in zip([v for v in ('sagittal_t2', 'sagittal_t1') if study.of(v)], shown['pictures']):
            axial, sagittal = [conventional(s) for s in study.of('axial_t2')], conventional(study.of(view)[0])
            if not axial: assert not picture['paths']; continue
            i = sagittal_slice(sagittal, axial)
            plane, (w, h) = plane_of(sagittal, i), map(float, picture['viewbox'].split()[2:])
            lines = lines_of(picture['paths'].get('inner', []) + picture['paths']['ends'])
            for s in axial:
                for k in range(len(s)):
                    away = [beside(line, carried(plane, plane_of(s, k), w, h)) for line in lines]
                    assert min(away) < .3, (shown['data-study'], view, k)
                    checked += 1
            assert len(lines) == sum(map(len, axial))
            bold = lines_of(picture['paths']['shown'])[0]
            assert beside(bold, carried(plane, plane_of(axial[0], axial_slice(axial[0])), w, h)) < .3, 'the bold line is the slice that is shown'
    assert checked > 200


def test_pictures_do_not_depend_on_how_slices_are_stored(data):
    study = read_study(data, 'train', sorted(p.name for p in (data / 'train_images').iterdir())[0])
    stored = replace(study, series=[restored(s, columns=True, rows=k % 2 == 0, order=False) for k, s in enumerate(study.series)])
    a, b = pictures_of(study), pictures_of(stored)
    assert [p['uri'] for p in a] == [p['uri'] for p in b]
    for p, q in zip(a, b, strict=True):
        for s, t in zip(p['stacks'], q['stacks'], strict=True): np.testing.assert_allclose(np.sort(lines_of([s['ends']]), 1), np.sort(lines_of([t['ends']]), 1), atol=.11)


def test_a_second_call_reads_nothing_and_a_third_what_is_new(data, made, tmp_path):
    folder, out = tmp_path / 'data', tmp_path / 'out'
    shutil.copytree(data, folder)
    shutil.copytree(made[1], out)
    n = len(made[2].studies)
    assert made[0]['read'] == n
    before = (out / 'check.html').read_bytes()
    assert check(folder, out, 2, progress=False)['read'] == 0 and (out / 'check.html').read_bytes() == before
    shutil.copytree(folder / 'test_images' / '902', folder / 'test_images' / '950')
    assert check(folder, out, 2, progress=False)['read'] == 1
    next((folder / 'test_images' / '902').glob('*/*')).touch()
    assert check(folder, out, 2, progress=False)['read'] == 1, 'a time of change'
    table = folder / 'test_series_descriptions.csv'
    table.write_text(''.join(line for line in table.read_text().splitlines(True) if not (line.startswith('902,') and 'Axial' in line)))
    assert check(folder, out, 2, progress=False)['read'] == 1, 'a line of a table'
    shutil.rmtree(folder / 'test_images' / '950')
    report = check(folder, out, 2, progress=False)
    assert report['read'] == 0 and len(list((out / 'cache').glob('*.json'))) == n and not any(r['study_id'] == '950' for r in report['test']), 'gone from page and cache'
    cached = sorted((out / 'cache').glob('*.json'))
    cached[0].write_text('{"key": 3'); cached[1].write_text('[]')
    assert check(folder, out, 2, progress=False)['read'] == 2, 'damaged records are read again'


def test_a_kill_midway_loses_nothing(data, made, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'check.html').write_text('the old page')
    call = subprocess.Popen([sys.executable, '-c', 'import sys, mscan.check as c; c.check(sys.argv[1], sys.argv[2], 1, progress=False)', data, out], env=ENV, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list((out / 'cache').glob('[0-9a-f]*.json'))) < 3 and call.poll() is None and time.monotonic() < deadline: time.sleep(.01)
    os.killpg(call.pid, signal.SIGKILL)
    call.wait()
    kept = list((out / 'cache').glob('[0-9a-f]*.json'))
    assert 3 <= len(kept) < len(made[2].studies) and all(json.loads(f.read_text())['record']['study_id'] for f in kept)
    assert (out / 'check.html').read_text() == 'the old page' and not (out / 'check.json').exists()
    report = check(data, out, 2, progress=False)
    assert report['read'] == len(made[2].studies) - len(kept)
    assert report | dict(read=0) == made[0] | dict(read=0) and (out / 'check.html').read_bytes() == (made[1] / 'check.html').read_bytes()


def test_a_page_that_cannot_be_finished_leaves_the_old_one(data, made, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    shutil.copytree(made[1], out)
    before = {f: f.read_bytes() for f in out.iterdir() if f.is_file()}

    def full(*_):
        yield 'half a page'
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(mscan.check, 'page_of', full)
    with pytest.raises(OSError, match='stays as it was'): check(data, out, 1, progress=False)
    assert {f: f.read_bytes() for f in out.iterdir() if f.is_file()} == before


def test_a_study_that_ends_its_worker_costs_itself_alone(data, made, tmp_path, monkeypatch):
    whole = study_record

    def deadly(job):
        if job.study_id == '902': os._exit(9)
        if job.study_id == '901': raise MemoryError
        return whole(job)
    monkeypatch.setattr(mscan.check, 'study_record', deadly)
    shutil.copytree(made[1] / 'cache', tmp_path / 'cache')
    for f in (tmp_path / 'cache').glob('*.json'):
        if json.loads(f.read_text())['record']['study_id'] in ('901', '902'): f.unlink()
    report = check(data, tmp_path, 2, progress=False)
    records = {r['study_id']: r for r in report['test'] + report['train']}
    lost = {s: r['flags'][0] for s, r in records.items() if r['flags'] and r['flags'][0]['code'] == 'check_failed'}
    assert set(lost) == {'901', '902'} and all(f['severity'] == 'ungraded' for f in lost.values()) and 'MemoryError' in lost['901']['sentence'] and 'exit code 9' in lost['902']['sentence']
    same = {r['study_id']: r for r in made[0]['test'] + made[0]['train']}
    assert all(r['flags'] == same[s]['flags'] for s, r in records.items() if s not in lost)
    assert {s['data-study'] for s in Page((tmp_path / 'check.html').read_text()).studies} == set(records)


NAMES = ('Zwickmueller', 'Quendoline', '19371103', '20110929', 'ACC77123', '9876543', '1.2.826.0.424242')


def test_any_folder_and_no_name_of_anyone(data, tmp_path):
    "Files of any name, nested, named after a patient: grouped by header; nothing of headers or names is written or printed, the cache included."
    folder, out, n = tmp_path / 'export', tmp_path / 'out', 0
    for k, study in enumerate(sorted((data / 'train_images').iterdir())[:2]):
        for series in study.iterdir():
            for f in sorted(series.iterdir()):
                d, n = pydicom.dcmread(f), n + 1
                d.PatientName, d.PatientBirthDate, d.StudyDate, d.AccessionNumber, d.PatientID = 'Zwickmueller^Quendoline', '19371103', '20110929', 'ACC77123', '9876543'
                d.SeriesDescription, d.StudyInstanceUID = f'{d.SeriesDescription} sag Zwickmueller', f'1.2.826.0.424242.{k}'
                d.SeriesInstanceUID = f'1.2.826.0.424242.{k}.{series.name}'
                to = folder / 'Zwickmueller' / f'{k}' / series.name[-1] / f'Quendoline 19371103 {n}'
                to.parent.mkdir(parents=True, exist_ok=True)
                d.save_as(to)
        to.write_bytes(to.read_bytes()[:-600])
    (folder / 'Zwickmueller' / 'Quendoline.txt').write_text('not DICOM')
    script = tmp_path / 'mscan_check'
    script.write_text('from mscan.check import mscan_check\nif __name__ == "__main__": mscan_check()\n')
    done = subprocess.run([sys.executable, script, '--data_dir', folder, '--out', out, '--json_file', tmp_path / 'too.json'], capture_output=True, text=True, env=ENV | dict(PYTHONWARNINGS='default'))
    assert done.returncode == 0, done.stderr
    page = Page((out / 'check.html').read_text(encoding='utf-8'))
    assert len(page.studies) == 2 and all(len(s['pictures']) == 3 for s in page.studies)
    said = dict(out=done.stdout, err=done.stderr, **{f.name: f.read_text(encoding='utf-8') for f in [*out.rglob('*.*'), tmp_path / 'too.json'] if f.is_file()})
    leaks = {(w, n) for w, text in said.items() for n in NAMES if n in re.sub(r'base64,[A-Za-z0-9+/=]*', '', text)}
    assert not leaks and len(said) == 7, leaks
    assert 'sag' in said['check.html'] and (tmp_path / 'too.json').read_text() == said['check.json']


def test_pictures_are_of_so_many_studies_and_the_page_says_so(data, made, tmp_path):
    for n in (0, 3):
        shutil.copytree(made[1], tmp_path / str(n))
        assert check(data, tmp_path / str(n), 2, thumbnails=n, progress=False)['read'] == 0
        text = (tmp_path / str(n) / 'check.html').read_text(encoding='utf-8')
        shown = Page(text).studies
        assert [bool(s['pictures']) for s in shown] == [bool(s['pictures']) and k < n for k, s in enumerate(made[2].studies)]
        assert f'--thumbnails{" 0" if not n else ""}</code>' in text
    assert '--thumbnails' not in (made[1] / 'check.html').read_text(encoding='utf-8'), 'all of them have theirs'


def test_two_thousand_studies_are_a_page_of_bounded_size_made_in_bounded_memory():
    flags = flags_of((['no axial T2 series', 'series 5: 2 of 17 files left out (empty file (0 bytes))'], 'look'))
    series = [dict(series_id=str(k), view='sagittal_t2', use='used', why='the best of 2', said='sag t2', slices=17, stacks=1, shapes=['320x320'], pixel_spacing_mm=[.9, .9], left_out=[]) for k in range(4)]
    records = [dict(study_id=str(k), split='test', severity='ungraded', flags=flags, series=series, rank=k) for k in range(2000)]
    report, calls = dict(title='x', version=1, notes=[], summary=dict(flags=[]), train=[], test=records), []
    picture = dict(view='sagittal_t2', series_id='1', caption='slice 1', uri='data:,' + 'x' * 5000, size=[208, 208], stacks=[], shown='')
    tracemalloc.start()
    size = sum(len(piece) for piece in page_of(report, lambda r: calls.append(r['rank']) or [picture] * 3, 300))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert calls == list(range(300)) and size < 300 * 17_000 + 2000 * 2_500 + 20_000 and peak < 3e6, (size, peak)


def test_flags_are_an_open_list():
    "A sentence that no rule knows is shown, with the severity of its list; urgency is a total order by the worst first."
    flags = flags_of((['a new thing'], 'look'), (['another new thing', 'a new thing'], 'info'))
    assert [(f['code'], f['severity']) for f in flags] == [('other', 'look'), ('other', 'info'), ('other', 'info')][:len(flags)] and {f['sentence'] for f in flags} == {'a new thing', 'another new thing'}
    some = ['no series can be read', 'no axial T2 series', 'series 1: 3 of 9 files left out (x)', 'series 1: something new', 'no grade of x']
    studies = [flags_of(([s for k, s in enumerate(some) if m >> k & 1], 'look')) for m in range(32)]
    order = sorted(range(32), key=lambda m: urgency(studies[m]))
    names = [*SEVERITIES, 'fine']
    places = [names.index(worst(studies[m])) for m in order]
    assert places == sorted(places) and order[-1] == 0 and all(order.index(m | 1) < order.index(m) for m in range(0, 32, 2))


def test_sentences_without_names():
    assert discreet('lies where X Y.dcm lies', ['X Y.dcm', 'Y.dcm']) == 'lies where a file lies'
    assert discreet('study 1.2.3.4.5.6 and 1.2.3.4.5.7', ids=['1.2.3.4.5.6']) == 'study 1.2.3.4.5.6 and a UID'
    assert discreet('L4/L5, 156x156/208x208, .8 mm, 3.10.2') == 'L4/L5, 156x156/208x208, .8 mm, 3.10.2'
    assert sequence_words('T2 SAG Doe 1961') == 't2 sag ·' and '\n' not in discreet('a\nb')


def test_the_terminal_says_what_needs_a_look(made, tmp_path, capsys, monkeypatch):
    lines = text_lines(made[0])
    assert any('no axial T2 series' in line for line in lines) and any('empty file (0 bytes)' in line for line in lines)
    monkeypatch.setattr(sys, 'argv', ['mscan_check'])
    for where in (tmp_path / 'nowhere', tmp_path):
        with pytest.raises(SystemExit) as stop: mscan_check(data_dir=str(where))
        said = capsys.readouterr()
        assert stop.value.code == 1 and said.err.count('\n') == 1 and str(where) in said.err
