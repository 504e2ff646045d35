"The explorer: one place on two slices to the digit, labels where readers pointed, answers that are the commands', widgets that keep together."
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from fakes import fake_models
from fastcore.xml import to_xml
from hypothesis import given, settings
from hypothesis import strategies as st

from mscan.explore import TABS, Desk, answers_table, changes_table, explore, where_text
from mscan.folders import find_studies
from mscan.geometry import contains, plane_of
from mscan.linked import CROSS, XYZ, linked, place_on, places_of
from mscan.mirror import restored
from mscan.prepare import read_tables
from mscan.rsna import PROBS, TableError, read_submission
from mscan.runner import find_stages
from mscan.runs import STAGES
from mscan.studies import KEPT, WAYS, WHOLE, Explorer, changes, label_places, without
from mscan.submission import predict_found


@pytest.fixture(scope='module')
def closed():
    "Sockets that refuse, while everything of this file runs."
    with pytest.MonkeyPatch.context() as patch:
        def refuse(*args): raise OSError('there is no network here')
        patch.setattr(socket.socket, 'connect', refuse)
        patch.setattr(socket, 'getaddrinfo', refuse)
        yield


@pytest.fixture(scope='module')
def folder(small_data, tmp_path_factory):
    "The small phantom with one more test study, whose id is markup and whose files are no DICOM."
    folder = tmp_path_factory.mktemp('explore') / 'data'
    shutil.copytree(small_data, folder)
    shutil.copytree(next((folder / 'test_images').iterdir()), folder / 'test_images' / 'x<b>1')
    for f in (folder / 'test_images' / 'x<b>1').glob('*/*'): f.write_bytes(b'no')
    return folder


@pytest.fixture(scope='module')
def explorer(folder, closed):
    "With networks that have learned nothing in place of a run."
    found = Explorer(folder)
    found.members = [fake_models(folder, True)]
    return found


# a place on two slices ------------------------------------------------------------------------------------------------

def stack(rng, n):
    "Parallel slices somewhere, oblique, with unequal spacings."
    axes, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    position = rng.normal(size=3) * 50 + np.arange(n)[:, None] * rng.uniform(2, 6) * np.cross(axes[0], axes[1])
    return SimpleNamespace(image_position=position, image_orientation=np.tile(axes[:2].ravel(), (n, 1)), pixel_spacing=np.tile(rng.uniform(.3, 2, 2), (n, 1)), shape=np.tile(rng.integers(40, 300, 2), (n, 1)))


class Stack(SimpleNamespace):
    def __len__(self): return len(self.image_position)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_place_is_the_same_on_both_series(seed):
    rng = np.random.default_rng(seed)
    a, b = (Stack(**vars(stack(rng, int(rng.integers(1, 12))))) for _ in range(2))
    i, xy = int(rng.integers(len(a))), rng.uniform(-.5, a.shape[0][::-1] - .5)
    xyz = place_on(a, i, xy)
    own, other = linked(a, xyz), linked(b, xyz)
    assert own.slice_i == i and np.allclose(own.xy_px, xy, atol=1e-7) and abs(own.away_mm) < 1e-7 and own.inside
    plane = plane_of(b, other.slice_i)
    assert np.allclose(plane.to_patient(other.xy_px) + other.away_mm * plane.normal, xyz, atol=1e-7)
    shows = [k for k in range(len(b)) if contains(plane_of(b, k), xyz)]
    assert other.inside == bool(shows)
    if shows: assert abs(other.away_mm) <= min(abs(plane_of(b, k).distance(xyz)) for k in shows) + 1e-9


# what is known of a study ---------------------------------------------------------------------------------------------

def test_every_study_is_there_and_labels_lie_where_readers_pointed(explorer, folder):
    assert [explorer.sources[s].split for s in explorer.studies] == ['train'] * 6 + ['test'] * 3 and 'x<b>1' in explorer.studies
    points = read_tables(folder, 'train').points
    checked = 0
    for s in explorer.studies[:6]:
        o = explorer.open(s)
        series = {k.series_id: k for k in o.study.series}
        for p in points[points.study_id == s].merge(o.marks, on=['condition', 'level']).itertuples():
            own = series[p.series_id]
            plane = plane_of(own, int(np.flatnonzero(own.instance_number == p.instance_number)[0]))
            assert np.abs(plane.to_pixel((p.x_mm, p.y_mm, p.z_mm)) - (p.x, p.y)).max() < 1e-5 and abs(plane.distance((p.x_mm, p.y_mm, p.z_mm))) < 1e-5   # headers have eight digits
            checked += 1
        truth = explorer.truth[s].merge(o.marks, on=['condition', 'level'], suffixes=('_true', ''))
        away = np.linalg.norm(truth[XYZ].to_numpy(float) - truth[[f'{c}_true' for c in XYZ]].to_numpy(float), axis=1)
        assert np.median(away) < 6, 'a label is not at its disc'
    assert checked > 100


def test_labels_of_a_study_that_is_stored_reversed_are_at_the_same_place(explorer):
    "Columns and rows the other way round in every file, and the table's pixels with them."
    s = explorer.studies[0]
    raw, _ = explorer.sources[s].raw()
    other = replace(raw, series=[restored(k, True, True, False) for k in raw.series])
    size = {k.series_id: dict(zip(k.instance_number.tolist(), k.shape, strict=True)) for k in raw.series}
    source = explorer.sources[s]
    turned = source.points.assign(x=[size[p.series_id][p.instance_number][1] - 1 - p.x for p in source.points.itertuples()], y=[size[p.series_id][p.instance_number][0] - 1 - p.y for p in source.points.itertuples()])
    mine, _ = label_places(raw, source)
    same, _ = label_places(other, SimpleNamespace(**vars(source) | dict(points=turned)))
    both = mine.merge(same, on=['condition', 'level'], suffixes=('', '_other'))
    assert len(both) == len(mine) == len(same) > 10 and np.abs(both[XYZ].to_numpy(float) - both[[f'{c}_other' for c in XYZ]].to_numpy(float)).max() < 1e-6


def test_test_studies_of_a_phantom_have_labels_and_true_points(explorer):
    o = explorer.open(next(s for s in explorer.studies[6:] if s != 'x<b>1'))
    assert o.kind == 'truth' and len(o.marks) == 25 and o.labels.grade.notna().any()


def test_no_more_than_a_few_studies_are_kept_open(folder, closed):
    found = Explorer(folder)
    for s in found.studies[:KEPT + 2]: found.open(s)
    assert list(found.opened) == found.studies[2:KEPT + 2]
    with pytest.raises(TableError, match='no study 12'): found.open('12')


def test_any_folder_of_dicom_files_will_do(small_data, tmp_path, closed):
    for k, f in enumerate((small_data / 'test_images').glob('*/*/*.dcm')): shutil.copy(f, tmp_path / f'IM{k:04d}')
    found = Explorer(tmp_path)
    assert len(found.studies) == 2
    o = found.graded(found.studies[0])
    assert {s.view for s in o.study.series} == {'sagittal_t1', 'sagittal_t2', 'axial_t2'} and o.found is None and o.labels is None and not len(o.marks)
    desk = Desk(found)
    assert desk.pair.sagittal.look.inside and 'no label' in desk.pages[0].value


def test_a_folder_without_test_images(small_data, tmp_path, closed):
    shutil.copytree(small_data, tmp_path / 'd', ignore=shutil.ignore_patterns('test_*', 'truth*'))
    assert len(Explorer(tmp_path / 'd').studies) == 6
    with pytest.raises(TableError): Explorer(tmp_path / 'nowhere')


# answers --------------------------------------------------------------------------------------------------------------

def test_answers_are_those_of_predict(explorer, folder):
    found = find_studies(folder, progress=False)
    for f in found.studies:
        mine, theirs = (t.set_index(['condition', 'level']).sort_index() for t in (explorer.graded(f.study_id).found.rows, predict_found(f, found.descriptions, explorer.members)))
        assert np.abs(mine[list(PROBS)].to_numpy(float) - theirs[list(PROBS)].to_numpy(float)).max() < 1e-9 and (mine['source'] == theirs['source']).all() and (mine.reason == theirs.reason).all()


@pytest.mark.parametrize('way', WAYS)
def test_a_view_left_out_is_a_series_that_is_not_in_the_folder(explorer, folder, tmp_path, way):
    s = next(s for s in explorer.studies[6:] if s != 'x<b>1')
    shutil.copy(folder / 'test_series_descriptions.csv', tmp_path)
    shutil.copytree(folder / 'test_images' / s, tmp_path / 'test_images' / s)
    described = pd.read_csv(tmp_path / 'test_series_descriptions.csv', dtype=str)
    word = {'sagittal_t1': 'Sagittal T1', 'sagittal_t2': 'Sagittal T2/STIR', 'axial_t2': 'Axial T2'}[WAYS[way]]
    gone = described[(described.study_id == s) & (described.series_description == word)].series_id
    for g in gone: shutil.rmtree(tmp_path / 'test_images' / s / g)
    described[~described.series_id.isin(gone)].to_csv(tmp_path / 'test_series_descriptions.csv', index=False)
    found = find_studies(tmp_path, progress=False)
    theirs = predict_found(next(f for f in found.studies if f.study_id == s), found.descriptions, explorer.members).set_index(['condition', 'level']).sort_index()
    mine = explorer.left_out(s)[way].set_index(['condition', 'level']).sort_index()
    assert len(gone) and np.abs(mine[list(PROBS)].to_numpy(float) - theirs[list(PROBS)].to_numpy(float)).max() < 1e-9
    assert (mine['source'] == theirs['source']).all()
    assert not np.allclose(mine[list(PROBS)].to_numpy(float), explorer.graded(s).found.rows.set_index(['condition', 'level']).sort_index()[list(PROBS)].to_numpy(float)), 'leaving it out changes nothing'


def test_changes_hold_what_each_way_answers(explorer):
    s = explorer.studies[0]
    tables = explorer.left_out(s)
    table = changes(tables, explorer.open(s).labels)
    assert list(dict.fromkeys(table.way)) == [WHOLE, *WAYS] and len(table) == 25 * 4 and (table.moved[table.way == WHOLE] == 0).all()
    for way, rows in tables.items():
        mine = table[table.way == way]
        p, q = (t[['risk_normal_mild', 'risk_moderate', 'risk_severe']].to_numpy(float) for t in (rows, tables[WHOLE]))
        assert np.allclose(mine.moved, np.abs(p - q).sum(1) / 2) and (mine['source'].to_numpy() == rows['source'].to_numpy()).all()
    labels = explorer.open(s).labels.dropna(subset='grade')
    shown = table[(table.way == WHOLE) & (table.label != '')]
    assert len(shown) == len(labels)
    text = to_xml(changes_table(table))
    assert text.count('<tr') == 26 and text.count('moved ') == 75 and all(w in text for w in WAYS)


def test_a_study_that_cannot_be_read_opens_and_says_why(explorer):
    o = explorer.graded('x<b>1')
    assert not o.study.series and (o.found.rows['source'] != 'model').all() and (o.notes or o.study.problems)
    assert set(explorer.left_out('x<b>1')) == {WHOLE}
    assert without(o.study, 'axial_t2').problems[-1] == 'no axial T2 series'


# widgets --------------------------------------------------------------------------------------------------------------

def together(pair):
    "Both panels show the one place, and the sliders say so as far as they can."
    for p in (pair.sagittal, pair.axial):
        look = linked(p.by_id[p.series.value], pair.xyz)
        assert look.slice_i == p.look.slice_i and np.allclose(look.xy_px, p.look.xy_px) and p.slice.value == look.slice_i + 1 and p.slice.max == len(look.series)
        inside = np.clip(look.xy_px, 0, look.series.shape[look.slice_i][::-1] - 1)
        assert np.abs(np.array([p.x.value, p.y.value]) - inside).max() <= .5 and f'slice {look.slice_i + 1} of' in p.picture.value


def test_whatever_is_moved_both_panels_show_one_place(explorer):
    desk, rng = Desk(explorer), np.random.default_rng(0)
    pair = desk.pair
    together(pair)
    for _ in range(60):
        panel, other = [(pair.sagittal, pair.axial), (pair.axial, pair.sagittal)][rng.integers(2)]
        before, kind = panel.look, rng.integers(4)
        if kind == 0: panel.slice.value = int(rng.integers(1, panel.slice.max + 1))
        elif kind == 1: panel.x.value = int(rng.integers(0, panel.x.max + 1))
        elif kind == 2: panel.y.value = int(rng.integers(0, panel.y.max + 1))
        else:
            place = pair.xyz.copy()
            panel.series.value = panel.series.options[rng.integers(len(panel.series.options))][1]
            assert np.array_equal(pair.xyz, place)
        together(pair)
        k = {1: 0, 2: 1}.get(kind)
        if k is not None: assert abs(panel.look.xy_px[k] - (panel.x.value, panel.y.value)[k]) <= .5 and np.isclose(panel.look.xy_px[1 - k], before.xy_px[1 - k])
    assert {'sagittal_t1', 'sagittal_t2'} == {s.view for s in pair.sagittal.by_id.values()}


def test_a_slider_that_the_browser_sends_back_moves_nothing(explorer):
    "A browser answers each value that it is given with the same value; rounding must not pull the place away."
    pair = Desk(explorer).pair
    place = pair.xyz.copy()
    for panel in (pair.sagittal, pair.axial):
        for control in (panel.slice, panel.x, panel.y):
            control.notify_change(dict(name='value', old=None, new=control.value, owner=control, type='change'))
            control.set_state(dict(value=control.value))
    assert np.array_equal(pair.xyz, place)
    pair.axial.x.value += 1
    assert not np.array_equal(pair.xyz, place)


def test_going_to_a_named_place_goes_there(explorer):
    desk = Desk(explorer)
    named = places_of(desk.o.marks, desk.o.kind, desk.o.found.located)
    assert {'label', 'found'} == set(named.kind) and desk.goto.options[desk.goto.value][0].startswith('L4/L5 canal, label')
    for k in range(0, len(named), 7):
        desk.goto.value = k
        assert np.array_equal(desk.pair.xyz, named.loc[k, XYZ].to_numpy(float))
        together(desk.pair)
        assert ' 0.0 mm away' in desk.pair.where.value


def test_nothing_lies_at_minus_zero(explorer):
    none = places_of(explorer.open(explorer.studies[0]).marks.iloc[:0], 'label')
    assert where_text(np.array([-.04, 3, -7]), none).startswith('x 0.0 mm (to the left), y 3.0 mm (back), z -7.0 mm (down)')


def test_names_lie_above_the_cross(explorer):
    picture = Desk(explorer).pair.sagittal.picture.value
    assert picture.rindex(CROSS) < picture.index('>L4/L5</text>')


def test_each_study_and_each_page_can_be_shown(explorer):
    desk = Desk(explorer)
    for s in explorer.studies[4:]:
        desk.study.value = s
        for k in range(len(TABS)): desk.tab.selected_index = k
        assert all(p.value for p in desk.pages) and '<b>1' not in ''.join(p.value for p in desk.pages) + desk.pair.where.value
        answers, crops, missing = (p.value for p in desk.pages)
        assert answers == f'<div class="mscan">{answers[19:]}' and answers.count('<tr') >= 6
        if s == 'x<b>1': assert 'no slice that can be shown' in desk.pair.where.value and 'no such series' in desk.pair.axial.picture.value
        else: assert crops.count('<img') >= 2 + 5 and missing.count('moved ') == 75
    assert desk.box.children[1].children[0] is desk.study


def test_crops_follow_the_cross(explorer):
    desk = Desk(explorer)
    desk.tab.selected_index = TABS.index('crops')
    before = desk.pages[1].value
    desk.pair.axial.x.value += 20
    assert desk.pages[1].value != before


def test_without_a_run_labels_stand_alone(folder, closed):
    box = explore('', folder)
    tab = box.children[3]
    assert 'This needs a run' not in tab.children[0].value and to_xml(answers_table(Explorer(folder).open(read_tables(folder, 'train').studies[0]))).count('<td') == 25
    tab.selected_index = 2
    assert 'This needs a run' in tab.children[2].value


@pytest.mark.xdist_group('pipeline')
def test_a_finished_run_is_shown_with_the_answers_that_it_submits(run, data, closed):
    found = Explorer(data[0], run[0], device='cpu')
    submitted = read_submission(run[0] / '60_submission' / 'submission.csv').set_index(['study_id', 'condition', 'level'])
    for s in (next(s for s in found.studies if found.sources[s].split == 'test' and s not in data[1]), '102'):
        rows = found.graded(s).found.rows.set_index(['study_id', 'condition', 'level'])
        assert np.abs(rows[list(PROBS)].to_numpy(float) - submitted.loc[rows.index, list(PROBS)].to_numpy(float)).max() < 1e-5
    assert explore(run[0], data[0], device='cpu').children


# where it stands ------------------------------------------------------------------------------------------------------

def test_the_notebook_is_no_stage(): assert list(find_stages()) == list(STAGES)


def test_importing_it_needs_no_widgets():
    done = subprocess.run([sys.executable, '-c', "import sys, mscan.explore, mscan.studies; print('ipywidgets' in sys.modules)"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'False'
