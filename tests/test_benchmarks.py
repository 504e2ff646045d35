"The benchmarks' own checks can fail: each finds what was planted, keeps quiet on noise, and computes what a hand can compute. About 20 seconds."
import itertools
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from benchmarks import _cnn, _common, _crops, difficulty, intersections, localiser, prevalence, scanners, shortcuts, views
from mscan import images, phantom
from mscan.geometry import plane_of
from mscan.metrics import paired_bootstrap


def test_shortcut_checker_keeps_quiet_on_noise_and_finds_links():
    values = []
    for seed in range(4):                                               # 800 rows: noise passes .62 once in a thousand times
        rng = np.random.default_rng(seed)
        table, positive = pd.DataFrame(rng.normal(size=(800, 15))).rename(columns=str), rng.random(800) < .4
        table.iloc[rng.random(800) < .1, 3] = np.nan
        table.iloc[1:, 4] = np.nan                                      # an element that one study alone has
        noise = shortcuts.examine(table, positive, repeats=1)
        assert all(i.high <= shortcuts.LIMIT for i in noise.values()), (seed, noise)
        values += [i.value for i in noise.values()]
    assert .46 < np.mean(values) < .54, values
    straight = table.assign(spacing=.5 + .1 * positive + rng.normal(0, .05, 800))
    assert all(i.value >= shortcuts.FOUND and i.low > .75 for i in shortcuts.examine(straight, positive, repeats=2).values())
    bent = table.assign(spacing=np.where(positive, rng.choice([-1, 1], 800), 0) + rng.normal(0, .2, 800))   # both ends are ill: no straight line sees it
    found = shortcuts.examine(bent, positive, repeats=2)
    assert found['boosting'].value >= shortcuts.FOUND > found['logistic'].value
    constant = shortcuts.examine(pd.DataFrame({'a': np.ones(800)}), positive, repeats=1)
    assert all(i.value == .5 for i in constant.values())
    with pytest.raises(ValueError, match='too few'): shortcuts.examine(table, np.arange(800) < 1)


def test_links_planted_in_files_are_read_back():
    rows = shortcuts.chunk_features((8, 3), 'small', 'demo', 'none', list(shortcuts.PLANTS), .2)
    assert len(rows) == 3 and any(r['worst'] for r in rows)
    for r in rows:
        grow = 1 + .2 * r['worst']
        for view, factor in (('sagittal_t1', grow), ('sagittal_t2', grow), ('axial_t2', 1)):
            name = f'headers:{view}.PixelSpacing[0].mean'
            assert r[f'planted_spacing/{name}'] == pytest.approx(factor * r[name], rel=1e-3)
        name = 'series:sagittal_t2.files.mean'
        assert r[f'planted_series/{name}'] == r[name] - 2 * r['worst']
        name = 'sizes:sagittal_t2.beside_pixels.mean'
        assert r[f'planted_sizes/{name}'] - r[name] == pytest.approx(200 * r['worst'] + (12 if r['worst'] else 0), abs=2)
        corner, white = (f'borders:sagittal_t1.{n}.mean' for n in ('corner_tl.mean', 'white'))
        assert r[f'planted_borders/{corner}'] - r[corner] >= .1 * r['worst'] * r[white]
        ids = {k for k in r if k.startswith('headers:') and ('UID' in k or 'PatientID' in k)}
        assert not ids, ids


@pytest.mark.parametrize('signed', [False, True])
def test_a_frame_is_planted_in_signed_pixels_too(tmp_path, monkeypatch, signed):
    "Three studies in a thousand have signed pixels; the benchmark once stopped at the first of them."
    from pydicom import dcmread
    from pydicom.uid import RLELossless
    from mscan import phantom
    study = phantom.phantom_study(8, 0, 'small', quirks='none')
    out = phantom.make_phantom(tmp_path / 'data', 1, 0, seed=8, size='small', workers=1, quirks='none', progress=False)
    files = sorted((out / 'train_images' / study.study.study_id).glob('*/*.dcm'))
    for file in files if signed else ():
        d = dcmread(file)
        pixels = d.pixel_array.astype('int16')
        d.PixelRepresentation, d.BitsStored, d.HighBit = 1, 16, 15
        d.compress(RLELossless, pixels, encoding_plugin='pylibjpeg', generate_instance_uid=False)
        d.save_as(file)
    before = {f: dcmread(f).pixel_array for f in files}
    monkeypatch.setattr(shortcuts, 'datasets', lambda folder, views, view: [(f, dcmread(f)) for f in files])
    shortcuts.plant_borders(out, None, 2, .2)
    assert all(dcmread(f).PixelRepresentation == int(signed) and (dcmread(f).pixel_array[0] >= before[f][0]).all() and (dcmread(f).pixel_array[0] > before[f][0]).any() for f in files)


def test_delong_by_hand():
    found = _common.delong([.8, .4, .6, .2], [True, True, False, False])      # pairs won: 1, 1, 0, 1
    assert found.value == .75 and found.low == pytest.approx(.75 - _common.Z95 * np.sqrt(.125 / 2 + .125 / 2)) and found.high == 1
    assert np.isnan(_common.delong([1, 2], [True, False]).low)
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        found = _common.delong(rng.normal(size=80), rng.random(80) < .4)
        hits += found.low <= .5 <= found.high
    assert hits >= 178  # 95 % nominal; 178 of 200 is four standard errors off


def test_paired_bootstrap_by_hand():
    "Four studies of two rows: the interval is that of all 256 equally likely draws of studies; what both sides share drops out."
    gain, study = np.array([1., 1, 2, 2, 3, 3, 10, 10]), np.repeat(np.arange(4), 2)
    common = np.random.default_rng(0).normal(0, 100, 8)
    mean = lambda rows, x: x[rows].mean()
    found = paired_bootstrap(partial(mean, x=common + gain), partial(mean, x=common), study, 4000, 0)
    exact = [np.mean([gain[2 * i] for i in draw]) for draw in itertools.product(range(4), repeat=4)]
    low, high = np.percentile(exact, [2.5, 97.5])
    assert found.value == 4 and abs(found.low - low) <= .25 and abs(found.high - high) <= .25      # a step of the draws' means is .25


@pytest.fixture(scope='module')
def whole(): return phantom.phantom_study(9, 0, 'small', quirks='none')


def filled(study, value, moved_mm=0.):
    "The study with `value(xyz)` as its pixels; the sagittal ones moved towards the head."
    for s in study.series:
        s.pixels = []
        for i in range(len(s)):
            plane = plane_of(s, i)
            y, x = np.mgrid[:plane.shape[0], :plane.shape[1]]
            shift = moved_mm * plane.orientation[3:] if s.view == 'sagittal_t2' else 0
            s.pixels.append(value(plane.to_patient(np.stack([x, y], -1)) + shift))
    return study


def test_intersections_of_one_volume_agree_and_of_a_moved_one_do_not():
    study = phantom.phantom_study(9, 1, 'small', quirks='none', pixels=False).study
    slope = lambda xyz: 5 + xyz @ [.2, 1., .7]
    r, pairs = intersections.study_correlations(filled(study, slope))
    assert pairs > 20 and r == pytest.approx([1, 1], abs=1e-9)                 # a moved slope is the same but for a constant
    axes = plane_of(study.of('sagittal_t2')[0], 0).orientation
    wave = lambda xyz: np.sin(xyz @ (axes[:3] + axes[3:]) * np.pi / 2 / intersections.SHIFT_MM)   # 10 mm down the image are a quarter of a wave
    here, moved = intersections.study_correlations(filled(study, wave))[0]
    assert here > .98 and moved < .3
    here, moved = intersections.study_correlations(filled(study, wave, intersections.SHIFT_MM))[0]
    assert here < .3 and moved > .98                                           # what lies 10 mm too high is found by reading 10 mm higher


def test_crops_are_cut_from_the_pixels_of_the_whole_study(whole):
    known = phantom.phantom_study(9, 0, 'small', quirks='none', pixels=False)
    wanted = {s.series_id: [1, len(s) - 2] for s in known.study.series if s.view != 'sagittal_t1'}
    made = _crops.rendered(known, wanted)
    assert set(made) == set(wanted)
    for s in whole.study.series:
        if s.series_id not in wanted: continue
        raw = [s.pixels[i] for i in wanted[s.series_id]]
        black, white = images.percentiles(raw, (.5, 99.5))
        for got, want in zip(made[s.series_id].pixels, raw, strict=True):
            assert np.abs(got - np.clip((want - black) * 255. / (white - black), 0, 255)).max() <= 1
        assert (made[s.series_id].image_position == s.image_position[wanted[s.series_id]]).all()


def test_crops_of_a_study_hold_both_views():
    c = _crops.canal_crops(9, 0, 'small', size_px=32)
    assert c['sagittal'].shape == c['axial'].shape == (5, _crops.SLICES, 43, 43) and c['sagittal_there'].all() and c['axial_there'][:, 0].all()
    assert set(c['grade']) <= {0, 1, 2} and ((0 <= c['latent']) & (c['latent'] <= 1)).all()
    other = _crops.canal_crops(9, 0, 'small', size_px=32, scanner='Rowan' if c['scanner'] != 'Rowan' else 'Alder')
    assert (other['grade'] == c['grade']).all() and other['scanner'] != c['scanner'] and (other['sagittal'] != c['sagittal']).any()


def test_small_pixels_are_scaled_and_from_the_middle():
    x = np.random.default_rng(0).integers(0, 100, (3, 86, 86)).astype(np.uint8)
    small = difficulty.small(x)
    assert small.shape == (3, 256) and np.allclose(small.mean(1), 0) and np.allclose(small.std(1), 1)
    assert np.allclose(difficulty.small(2 * x + 9), small)
    edge = x.copy()
    edge[:, :11] = 255
    assert np.allclose(difficulty.small(edge), small)


def test_knowing_the_true_degree_is_the_readers_bound():
    rng = np.random.default_rng(0)
    people = difficulty.disease.draw_disease(rng, 'demo', 3000)
    grade, level = difficulty.disease.read_grades(rng, people)[:, 0], np.tile(np.arange(5), 3000)
    rating = difficulty.reader_chance(people.degree[:, 0].ravel(), level, 'demo')
    assert difficulty.auroc(rating, grade.ravel() > 0) == pytest.approx(difficulty.disease.reader_bound('demo', 3000)['spinal']['auroc'], abs=.01)


def test_folds_keep_studies_together_and_answers_blend():
    study = np.repeat(np.arange(20), 5)
    fold = _cnn.study_folds(study, np.random.default_rng(0).integers(0, 3, 100), 5, 0)
    assert all(len(set(fold[study == k])) == 1 for k in range(20)) and set(fold) == set(range(5))
    p = _cnn.blend(np.array([[.8, .1, .1]]), np.array([[.2, .4, .4]]))
    assert p == pytest.approx(np.array([[.4, .2, .2]]) / .8)
    rng = np.random.default_rng(1)
    grade = rng.integers(0, 3, 300)
    telling, vague = (_cnn.floor_probabilities(np.exp(k * np.eye(3)[grade] + rng.normal(0, 1, (300, 3)))) for k in (2, .5))
    found = [_cnn.stacker(v, grade[:200])([x[200:] for x in w]) for v, w in (([telling[:200]], [telling]), ([telling[:200], vague[:200]], [telling, vague]))]
    assert all(np.allclose(f.sum(1), 1) and (f.argmax(1) == grade[200:]).mean() > .6 for f in found)


def test_scanner_swap_changes_the_held_out_profile_only():
    crops = scanners.joined([_fake(['a', 'b', 'b']), _fake(['c', 'a'])])
    assert crops.study.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5
    jobs = scanners.others_for(crops, 5, 'b', ['a', 'b', 'c'])
    assert [s for _, s in jobs] == [None, 'c', 'a', None, None] and [k for k, _ in jobs] == list(range(5))


def _fake(names):
    n = 5 * len(names)
    return _crops.SimpleNamespace(study=np.repeat(np.arange(len(names)), 5), scanner=np.repeat(names, 5), grade=np.zeros(n, int), left_out=0)


def test_prevalence_is_held_by_the_real_one_and_missed_by_another():
    bound = lambda rows: .05 / len(rows)
    real = prevalence.count_rows(prevalence.direct_labels(1500, 3, 'real'))
    assert len(real) == 75 and all(r.p >= bound(real) for r in real)
    rich = prevalence.count_rows(prevalence.direct_labels(1500, 3, 'demo'))
    assert sum(r.p < bound(rich) for r in rich) > 25
    same = np.full((50, 5, 5), 1.)
    same[::2] = 0
    assert prevalence.kappas(same) == pytest.approx([1] * 8) and prevalence.level_area(same) == .5


def test_a_report_says_what_is_not_held(tmp_path, capsys):
    args = _common.parser('x', 'Is it?', 3).parse_args(['--out', str(tmp_path / 'x.json'), '--check'])
    report = _common.Report('x', args, _common.data_of(args))
    report.add('good', _common.delong([3, 4, 1, 2], [True, True, False, False]), '>= .8', True)
    report.add('hidden', .1, 'any', True, quiet=True)
    assert report.finish() == 0 and 'every limit held' in capsys.readouterr().out
    report.add('bad', (.3, .2, float('nan')), '>= .8', False)
    assert report.finish() == 1
    said, saved = capsys.readouterr().out, _common.json.loads((tmp_path / 'x.json').read_text())
    assert 'NOT HELD' in said and 'hidden' not in said and [f['ok'] for f in saved['figures']] == [True, True, False] and saved['figures'][2]['high'] is None
    assert saved['data'] == 'phantom, seed 100, 3 studies, size demo, prevalence demo' and saved['arguments']['studies'] == 3


def test_the_localisers_errors_are_those_that_were_planted(tmp_path, monkeypatch):
    "A localiser that is off by a known way: the figures say that distance, a lost study counts as lost, and a shift by a level is seen."
    def plant(k, seed, size, prevalence, weights):
        p = phantom.phantom_study(seed, k, size, prevalence, pixels=False)
        canal = p.truth[p.truth.condition == localiser.CANAL]
        found = canal.assign(x_mm=canal.x_mm + weights['mm'])
        if k in weights['shifted']: found = found.assign(**{c: np.r_[canal[c].to_numpy()[1:], 2 * canal[c].iloc[-1] - canal[c].iloc[-2]] for c in ('x_mm', 'y_mm', 'z_mm')})   # L2/L3's place is called L1/L2, and so on
        if k in weights['lost']: found = localiser.find_all(None, SimpleNamespace(study_id=p.study.study_id, of=lambda view: []))
        return localiser.localise(found, canal).assign(kind='unknown', scanner=p.scanner, transitional='no')

    def figures(**weights):
        monkeypatch.setattr(localiser, 'partial', lambda f, **kw: lambda k: plant(k, kw['seed'], kw['size'], kw['prevalence'], weights))
        code = localiser.main(['--studies', '4', '--size', 'small', '--workers', '1', '--draws', '50', '--check', '--out', str(tmp_path / 'x.json')])
        return code, {f['figure']: f for f in _common.json.loads((tmp_path / 'x.json').read_text())['figures']}
    code, near = figures(mm=3., shifted=(), lost=())
    assert code == 0 and near['median distance, mm']['value'] == pytest.approx(3) and near['within 12 mm']['value'] == 1 and near['studies shifted by a level']['value'] == 0
    code, far = figures(mm=7., shifted=(), lost=())
    assert code == 1 and far['median distance, mm']['value'] == pytest.approx(7) and far['median distance, mm']['ok'] is False
    code, lost = figures(mm=3., shifted=(), lost=(2,))
    assert code == 1 and lost['within 12 mm']['value'] == pytest.approx(.75) and lost['studies shifted by a level']['value'] == 0      # nothing found is no shift
    code, shifted = figures(mm=3., shifted=(1,), lost=())
    assert code == 1 and shifted['studies shifted by a level']['value'] == 1


class Told:
    "Crops that are nothing but names: their place in the data set."
    def __init__(self, studies):
        n = 5 * studies
        rng = np.random.default_rng(0)
        self.study, self.grade, self.left_out = np.repeat(np.arange(studies), 5), rng.integers(0, 3, n), 2
        self.sagittal = self.axial = np.arange(n)


def views_figures(tmp_path, monkeypatch, know, studies=60):
    "The report of `views` where the networks of a view are replaced by what `know(view, grades)` says of a level; asserts that none answers for a study that it was trained on."
    crops = Told(studies)

    def answers(pieces, args):
        out = []
        for view, train, rows, test, asked, seed in pieces:
            assert not set(crops.study[rows]) & set(crops.study[asked]), 'a network answers for its own training studies'
            out.append(_cnn.floor_probabilities(know(view, crops.grade[asked], np.random.default_rng(asked))))
        return out
    monkeypatch.setattr(views, 'load_crops', lambda args, jobs: crops)
    monkeypatch.setattr(views, 'trainings', answers)
    views.main(['--studies', str(studies), '--held_out', '30', '--draws', '200', '--out', str(tmp_path / 'v.json')])
    saved = _common.json.loads((tmp_path / 'v.json').read_text())
    assert any('2 levels left out' in n for n in saved['notes'])
    return {f['figure']: f for f in saved['figures']}


def says(p, grade, what): return np.where(np.isin(grade, what)[:, None], np.eye(3)[grade] * p + (1 - p) / 3, 1 / 3)


def test_two_views_gain_where_each_knows_half_and_hardly_where_they_say_the_same(tmp_path, monkeypatch):
    half = dict(sagittal=[0], axial=[2])                                       # one view tells the healthy, the other the severe
    found = views_figures(tmp_path, monkeypatch, lambda view, grade, rng: says(.8, grade, half[view]))
    assert all(found[f'WCE, both - {v}']['ok'] and found[f'WCE, both - {v}']['high'] < 0 for v in views.VIEWS)
    same = views_figures(tmp_path, monkeypatch, lambda view, grade, rng: says(.8, grade, [0]))
    assert all(abs(same[f'WCE, both - {v}']['value']) < .02 < .2 < abs(found[f'WCE, both - {v}']['value']) for v in views.VIEWS)     # not 0: the stacker's penalty weighs less on a view that is there twice
    with pytest.raises(SystemExit, match='--held_out 60'): views.main(['--studies', '60', '--held_out', '60'])
