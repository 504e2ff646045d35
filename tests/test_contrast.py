"A study without sagittal T1 is graded on T2 only by a model that has met foramina there: crops, features, rungs. About 5 seconds."
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import missing
from mscan.foramina import offset_foramina
from mscan.grading import fall_back, foramen_contrasts, places_of, seen_on
from mscan.images import Preprocess, normalise
from mscan.keypoints import canal_points
from mscan.ladder import RUNGS, conditional_table
from mscan.metrics import RISKS, p_risk, prior_table
from mscan.phantom import lesson_study
from mscan.rsna import CONDITIONS, LEVELS, PROBS
from mscan.sidecrops import Frames, on_other_contrast, side_crops
from mscan.sidegrading import VIEWS, all_features
from mscan.sides import OTHER_CONTRAST, Sides


@pytest.fixture(scope='module')
def lesson():
    made = lesson_study(seed=3)
    made.study.series = [normalise(s) for s in made.study.series]
    return made


class Greys(torch.nn.Module):
    "An encoder whose features are the mean grey."
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Sequential(torch.nn.Linear(1, 2))
    def features(self, image): return image.mean((1, 2, 3))[:, None].repeat(1, 2)


@pytest.fixture
def crops():
    "Grey crops: T1 dark, T2 bright, one foramen out of T2's reach, one on neither."
    made = SimpleNamespace(sagittal=np.full((5, 16, 16), 100, np.uint8), axial=np.full((2, 1, 5, 3, 16, 16), 100, np.uint8), foramen=np.full((2, 5, 3, 16, 16), 0, np.uint8), recess=np.full((2, 1, 5, 3, 16, 16), 100, np.uint8))
    for v in VIEWS: setattr(made, f'{v}_mask', np.ones(getattr(made, v).shape[:-2], bool))
    made.foramen_mask[1, 4] = False
    made.foramen_other, made.foramen_other_mask = np.full_like(made.foramen, 220), made.foramen_mask.copy()
    made.foramen_other_mask[0, 0, 0] = False
    return made


def test_augmented_views_have_foramina_from_t2_and_the_plain_one_never(crops):
    nets = dict.fromkeys(VIEWS, Greys())
    never, always, some = (all_features(crops, nets, views=12, seed=4, contrast_dropout=d) for d in (0., 1., .5))
    bright = lambda found: found[0]['foramen'][..., 0] > .2                                        # (views, 2, T, F)
    there = crops.foramen_other_mask
    assert not bright(never).any() and not bright(always)[0].any() and bright(always)[1:, there].all() and not bright(always)[:, ~there].any()
    turned = bright(some)[1:, there]
    assert set(turned.mean(1)) == {0., 1.} and .2 < turned.mean() < .8                          # a view has all its foramina from one series
    assert (always[0]['foramen'][:, ~crops.foramen_mask] == 0).all() and all((always[1][v] == never[1][v]).all() for v in VIEWS)
    assert all(np.array_equal(always[0][v], never[0][v]) for v in VIEWS if v != 'foramen'), 'no other view is touched'


def test_foramina_on_t2_are_cropped_only_where_that_is_wanted(lesson):
    canal = canal_points(lesson.truth)
    study = replace(lesson.study, series=[s for s in lesson.study.series if s.view != 'sagittal_t1'])
    table = Sides(find_foramina=lambda *_: pytest.fail('there is no T1 to be asked'), foramen_mm=(15., -3., 4.)).foramina(study, canal)
    frames = Frames(study, Preprocess())
    plain, turned = (side_crops(frames, table, pd.DataFrame(), 1, 32, foramen_contrasts(d)) for d in (0., .25))
    assert (table.source == OTHER_CONTRAST).all() and not plain.foramen_mask.any() and turned.foramen_mask.all()
    assert seen_on(places_of(SimpleNamespace(foramina=table)), CONDITIONS[1], 'l3_l4') == 'other contrast' and seen_on(places_of(SimpleNamespace(foramina=table)), CONDITIONS[3], 'l3_l4') == 'model'


def test_the_same_place_on_t2_whatever_its_slices_are(lesson):
    from mscan.geometry import plane_of
    from mscan.mirror import rearranged
    canal, t2 = canal_points(lesson.truth), lesson.study.of('sagittal_t2')[0]
    places = offset_foramina(lesson.study.of('sagittal_t1')[0], canal)
    few = rearranged(t2, list(range(len(t2)))[::2])
    with_few = replace(lesson.study, series=[few if s is t2 else s for s in lesson.study.series])
    for study, series in ((lesson.study, t2), (with_few, few)):
        found = on_other_contrast(study, places)
        assert len(found) and (found.series_id == series.series_id).all()
        for r in found.itertuples(): assert abs(plane_of(series, r.slice_i).distance((r.x_mm, r.y_mm, r.z_mm))) == min(abs(plane_of(series, i).distance((r.x_mm, r.y_mm, r.z_mm))) for i in range(len(series)))
    assert not len(on_other_contrast(replace(lesson.study, series=[s for s in lesson.study.series if s is not t2]), places))
    assert not len(on_other_contrast(lesson.study, places.assign(x_mm=places.x_mm + 300))), 'a place beyond the last slice is on none'


# ---- the ladder

@pytest.fixture(scope='module')
def tables():
    rng = np.random.default_rng(0)
    grade = rng.integers(0, 3, (60, 5))
    rows = [(str(i), c, l, min(2, max(0, grade[i, j] + (k > 0) * rng.integers(-1, 2)))) for i in range(60) for j, l in enumerate(LEVELS) for k, c in enumerate(CONDITIONS)]
    labels = pd.DataFrame(rows, columns=['study_id', 'condition', 'level', 'grade']).astype({'grade': 'Int8'})
    return prior_table(labels), conditional_table(labels)


def asked(severe: dict):
    "25 rows of one study: severe p_score of the graded ones by (condition, level)."
    rows = pd.DataFrame([(c, l) for c in CONDITIONS for l in LEVELS], columns=['condition', 'level'])
    known = [severe.get((c, l)) for c, l in zip(rows.condition, rows.level, strict=True)]
    p = [[np.nan] * 3 if s is None else [(1 - s) / 2, (1 - s) / 2, s] for s in known]
    return rows.assign(**dict(zip(PROBS, np.array(p, float).T, strict=True)), source=['' if s is None else 'model' for s in known])


def test_every_row_takes_the_first_rung_that_bears_it(tables):
    prior, conditional = tables
    rows = asked({(CONDITIONS[0], 'l1_l2'): .9, (CONDITIONS[0], 'l3_l4'): .1, (CONDITIONS[3], 'l3_l4'): .1})
    told, alone = fall_back(rows, prior, conditional), fall_back(rows, prior)
    assert told.groupby('level').source.apply(lambda s: s.value_counts().to_dict()).unstack().fillna(0).to_dict('index') == {
        'l1_l2': {'graded rows': 4, 'model': 1, 'prior': 0}, 'l3_l4': {'graded rows': 3, 'model': 2, 'prior': 0}, **{l: {'graded rows': 0, 'model': 0, 'prior': 5} for l in ('l2_l3', 'l4_l5', 'l5_s1')}}
    assert set(alone['source']) == {'model', 'prior'} and set(told['source']) <= set(RUNGS)
    model, at = rows['source'] == 'model', lambda t, l: t[(t.level == l) & (t.condition == CONDITIONS[4])].severe.item()
    assert told[model][list(PROBS)].equals(rows[model][list(PROBS)]), 'a graded row is not touched'
    assert at(told, 'l1_l2') > at(alone, 'l1_l2') and at(told, 'l3_l4') < at(alone, 'l3_l4') and at(told, 'l2_l3') == at(alone, 'l2_l3')
    for t in (told, alone): assert np.isfinite(t[list(PROBS)].to_numpy()).all() and np.allclose(t[list(PROBS)].sum(axis=1), 1) and (t[list(PROBS)] >= 1e-4 - 1e-12).all(axis=None)
    assert np.isfinite(p_risk(told[list(PROBS)].to_numpy())).all()


def test_the_best_rung_of_several_runs_answers(tables):
    from mscan.submission import average_runs
    prior, conditional = tables
    full = lambda severe: fall_back(asked(severe), prior, conditional).assign(study_id='1', slices='', reason='', **dict.fromkeys(RISKS, 1 / 3))
    one, two = full({(CONDITIONS[0], 'l1_l2'): .9}), full({(CONDITIONS[3], 'l1_l2'): .2, (CONDITIONS[0], 'l2_l3'): .5})
    mean = average_runs([one, two]).set_index(['condition', 'level'])
    first, second = (t.set_index(['condition', 'level']) for t in (one, two))
    assert mean.loc[(CONDITIONS[0], 'l1_l2'), 'source'] == 'model' and mean.loc[(CONDITIONS[0], 'l1_l2'), 'severe'] == first.loc[(CONDITIONS[0], 'l1_l2'), 'severe'], 'a guess has no say beside one who has looked'
    row = (CONDITIONS[1], 'l2_l3')                                       # the first run knows the prior only, the second has graded a row of the level
    assert mean.loc[row, 'source'] == 'graded rows' and mean.loc[row, 'severe'] == second.loc[row, 'severe'] and mean.loc[row, 'models'] == '0 of 2'
    row = (CONDITIONS[1], 'l1_l2')                                       # both guess from what they have graded
    assert np.isclose(mean.loc[row, 'severe'], (first.loc[row, 'severe'] + second.loc[row, 'severe']) / 2)


# ---- the benchmark of missing series

def test_what_is_taken_away_is_gone_and_said(lesson):
    for way, view in missing.WAYS.items():
        study = missing.without(lesson.study, view)
        assert not study.of(view) and study.problems[-1] == f'{way} series' and len(study.series) == len(lesson.study.series) - len(lesson.study.of(view))
    axial = lesson.study.of('axial_t2')[0]
    two = replace(lesson.study, series=[*lesson.study.series, replace(axial, series_id='second')])
    assert [s.series_id for s in missing.with_one_axial(two, {'second': 5, axial.series_id: 2}).of('axial_t2')] == ['second'] and missing.with_one_axial(replace(two, series=lesson.study.series), {}) is None


def test_prior_in_place_of_graded_rows(tables):
    prior, conditional = tables
    told = fall_back(asked({(CONDITIONS[0], 'l1_l2'): .9}), prior, conditional).assign(study_id='1')
    plain = missing.prior_instead(told, prior)
    assert set(told['source']) == {'model', 'graded rows', 'prior'} and set(plain['source']) == {'model', 'prior'} and len(plain) == 25
    guessed = told['source'] == 'graded rows'
    known = prior.set_index(['condition', 'level']).loc[pd.MultiIndex.from_frame(plain[guessed][['condition', 'level']]), list(PROBS)].to_numpy()
    assert np.allclose(plain[guessed][list(PROBS)], known) and not np.allclose(told[guessed][list(PROBS)], known) and plain[~guessed][list(PROBS)].equals(told[~guessed][list(PROBS)])
