"Reports: self-contained, nothing of the person, the numbers of mscan_predict, a page whatever happened."
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from fakes import complete, fake_models

import mscan.report as report
from mscan.folders import find_studies
from mscan.review import mark
from mscan.rsna import CONDITIONS, LEVELS, PROBS, TableError
from mscan.submission import predict_found


@pytest.fixture(scope='module')
def data(small_data, tmp_path_factory):
    "Three test studies: one with a patient in its headers, one whose id is markup and that has no T1, one with nothing readable."
    folder = tmp_path_factory.mktemp('report') / 'data'
    shutil.copytree(small_data, folder, ignore=shutil.ignore_patterns('train_images'))
    good, other = sorted(p.name for p in (folder / 'test_images').iterdir())
    complete(folder / 'test_images' / good)
    described = pd.read_csv(folder / 'test_series_descriptions.csv', dtype=str)
    t1 = described[(described.study_id == other) & (described.series_description == 'Sagittal T1')].series_id.iloc[0]
    shutil.rmtree(folder / 'test_images' / other / t1)
    shutil.copytree(folder / 'test_images' / other, folder / 'test_images' / 'x<b>1')
    for f in (folder / 'test_images' / 'x<b>1').glob('*/*'): f.write_bytes(b'no')
    pd.concat([described, described[described.study_id == other].assign(study_id='x<b>1')]).to_csv(folder / 'test_series_descriptions.csv', index=False)
    return folder, good, other


@pytest.fixture(scope='module', params=[True, False], ids=['bilateral', 'mscan'])
def pages(request, data, tmp_path_factory):
    models, out = fake_models(data[0], request.param), tmp_path_factory.mktemp('pages')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, 'run_manifests', lambda run: [run])
        patch.setattr(report, 'load_members', lambda manifests, device: [models])
        rows = report.write_report(out / 'a_run', data[0], out, device='cpu', progress=False)
    return models, rows, out


def text_of(pages, study): return (pages[2] / f'study_{study}.html').read_text(encoding='utf-8')


def test_every_page_is_whole_and_says_what_it_is(pages, data):
    files = sorted(p.name for p in pages[2].glob('*.html'))
    assert files == sorted(['index.html', *(f'study_{s}.html' for s in (data[1], data[2], 'x<b>1'))])
    for name in files:
        text = (pages[2] / name).read_text(encoding='utf-8')
        assert 'For research, not for diagnosis' in text and '<script' not in text and "default-src 'none'" in text.replace('&#39;', "'").replace('&#x27;', "'")
        addresses = re.findall(r'https?:|//', re.sub(r'base64,[A-Za-z0-9+/=]+', '', text))
        assert not addresses
        assert all(ref.startswith('data:image/') or ref.endswith('.html') for ref in re.findall(r'(?:href|src)=["\']([^"\']*)', text))


def test_nothing_of_the_person_is_on_a_page(pages, data):
    text = re.sub(r'base64,[A-Za-z0-9+/=]+', '', text_of(pages, data[1]))
    there = [word for word in ('Secret', 'Person', '19570401', 'A77', 'S88', '20211213', '20240507', f'{data[1]}.7.', f'{data[1]}.9.') if word in text]
    assert not there


def test_an_id_that_is_markup_stays_text(pages):
    for text in (text_of(pages, 'x<b>1'), (pages[2] / 'index.html').read_text(encoding='utf-8')): assert '<b>' not in text and 'x&lt;b&gt;1' in text


def test_the_numbers_are_those_of_predict(pages, data):
    models, rows, out = pages
    found = find_studies(data[0])
    by_id = {f.study_id: f for f in found.studies}
    table = pd.read_csv(out / 'rows.csv', dtype={'study_id': str}, keep_default_na=False)
    assert len(table) == 75 and set(table.columns) == set(report.COLUMNS)
    for s in (data[1], data[2]):
        said = predict_found(by_id[s], found.descriptions, [models]).set_index(['condition', 'level'])
        mine = table[table.study_id == s].set_index(['condition', 'level'])
        assert np.abs(said[list(PROBS)].to_numpy(float) - mine.loc[said.index, list(PROBS)].to_numpy(float)).max() < 1e-9 and (mine.loc[said.index, 'source'] == said['source']).all()
        text = text_of(pages, s)
        for r in said.itertuples(): assert f'{r.risk_normal_mild:.3f} {r.risk_moderate:.3f} {r.risk_severe:.3f}' in text


def test_a_good_study_shows_all_that_was_asked_for(pages, data):
    models, rows, _ = pages
    text, both = text_of(pages, data[1]), models.sides is not None
    assert text.count('data:image/jpeg') + text.count('data:image/png') >= 5 * (8 if both else 7)
    for level in ('L1/L2', 'L2/L3', 'L3/L4', 'L4/L5', 'L5/S1'): assert f'>{level}</text>' in text                                   # each point has its level written beside it
    assert 'axial levels (rows) ask sagittal levels (columns)' in text and 'What it does not show' in text and 'Grad-CAM' in text
    assert ('right recess, nearest axial slice' in text) == both
    maps = text.count(': map"')
    assert maps >= 5 * (3 + 3 * both)                                           # a level has one sagittal and two or three axial crops, and four of the sides
    assert text.index('right foramen') < text.index('>canal<') < text.index('left foramen')


def test_fallbacks_are_told_apart_and_marked(pages, data):
    models, rows, _ = pages
    for s in (data[2], 'x<b>1'):
        mine, text = rows[rows.study_id == s], text_of(pages, s)
        fallen = mine[mine.condition.isin(models.conditions) & (mine['source'] != 'model')]
        assert (mine.review[fallen.index]).all() and fallen.why.str.contains('fallback').all()
        assert len(fallen) or models.sides is None
        assert all(f'source: {source}' in text for source in set(mine['source']) - {'model'})
    nothing = rows[rows.study_id == 'x<b>1']
    assert (nothing['source'] != 'model').all() and 'No level was located' in text_of(pages, 'x<b>1')
    ungraded = rows[~rows.condition.isin(models.conditions)]
    assert not ungraded.review.any()


def test_the_signals_of_a_row_are_its_own(pages):
    "A model that hesitates about one answer marks that one."
    rows = pages[1].assign(lost='', scatter=0., view_gap=0., sure=.9)
    rows.loc[7, 'sure'] = .5
    rows = rows.assign(source='model')
    assert np.flatnonzero(mark(rows, list(CONDITIONS)).review).tolist() == [7]


def test_one_study_alone_and_one_that_is_not_there(data, tmp_path, monkeypatch):
    models = fake_models(data[0], False, 1)
    for name, value in dict(run_manifests=lambda run: [run], load_members=lambda manifests, device: [models]).items(): monkeypatch.setattr(report, name, value)
    rows = report.write_report(tmp_path, data[0], tmp_path / 'out', data[1], 'cpu', False)
    assert set(rows.study_id) == {data[1]} and sorted(p.name for p in (tmp_path / 'out').glob('*.html')) == ['index.html', f'study_{data[1]}.html']
    with pytest.raises(TableError, match='has no study 12; it has'): report.write_report(tmp_path, data[0], tmp_path / 'out', '12', 'cpu', False)


def test_the_table_of_marks_by_one_call(data, tmp_path, monkeypatch):
    models = fake_models(data[0], True, 2)
    for name, value in dict(run_manifests=lambda run: [run], load_members=lambda manifests, device: [models]).items(): monkeypatch.setattr(report, name, value)
    lines = report.write_review(tmp_path, data[0], data[0] / 'test_labels.csv', data[0] / 'truth.csv', tmp_path / 'out', 'cpu', False, 50)
    assert (tmp_path / 'out' / 'review.md').read_text().strip().split('\n') == lines and sum(line.startswith('| canal |') for line in lines) == 2
    counted = next(line for line in lines if line.startswith('| levels found over'))
    assert counted.split('|')[2].strip() == str(2 * len(LEVELS)) and counted.split('|')[3].strip() == '0'        # true points are nowhere wrong
