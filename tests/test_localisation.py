"Planted faults in made-up runs: shifts, strays, missing points, wrong slices."
import numpy as np
import pandas as pd
import pytest

from mscan.localisation import (MOVED, XYZ, axial_centres, axial_choice, centre_summary, level_shifts, localisation_summary, localise, made_up_run,
                                recess_midpoints, sagittal_choice, slice_summary)
from mscan.rsna import CONDITIONS, LEVELS


@pytest.fixture
def run(): return made_up_run([str(i) for i in range(12)], seed=3)


def turned(table, turn, move):
    out = table.copy()
    out[XYZ] = table[XYZ].to_numpy() @ turn.T + move
    return out


def rotation(seed):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def test_by_hand():
    truth = pd.DataFrame({'study_id': '1', 'level': LEVELS, 'x_mm': 0., 'y_mm': 0., 'z_mm': [0., -30., -60., -90., -120.]})
    points = truth.assign(x_mm=3., z_mm=truth.z_mm - 4)  # 3 mm to the left, 4 mm towards the feet
    found = localise(points, truth)
    assert np.allclose(found.error_mm, 5) and np.allclose(found.along_mm, 4) and np.allclose(found.across_mm, 3) and np.allclose(found.spacing_mm, 30)
    assert not found.nearer.any() and np.isclose(level_shifts(found).offset[0], 4 / 30)
    assert localisation_summary(found) == {'studies': 1, 'levels': 5, 'missing': 0, 'median_mm': 5., 'p95_mm': 5., 'within_10mm': 1., 'shifted': 0, 'shifted_share': 0.}


def test_the_patient_may_lie_anyhow(run):
    turn, move = rotation(0), [10, -20, 300]
    here, there = localise(run.points, run.truth), localise(turned(run.points, turn, move), turned(run.truth, turn, move))
    for column in ('error_mm', 'along_mm', 'spacing_mm'): assert np.allclose(here[column], there[column])
    assert np.isclose(here.error_mm.median(), 1.8, atol=.4)


@pytest.mark.parametrize('steps, shifted', [(1, True), (-1, True), (2, True), (.6, True), (.4, False), (-.4, False), (0, False)])
def test_a_shift_is_counted_from_half_a_level(run, steps, shifted):
    points = run.points.copy()
    moved = points.study_id == '5'
    points.loc[moved, 'z_mm'] -= 28 * steps
    found = level_shifts(localise(points, run.truth)).set_index('study_id')
    assert found.shifted['5'] == shifted and not found.shifted.drop('5').any() and np.isclose(found.offset['5'], steps, atol=.15)


def test_names_moved_by_one_level_are_a_shift(run):
    points = run.points.copy()
    at = points.study_id == '4'
    xyz = points.loc[at, XYZ].to_numpy()
    points.loc[at, XYZ] = np.vstack([xyz[1:], 2 * xyz[-1:] - xyz[-2:-1]])  # each level answered with the next one's place
    found = level_shifts(localise(points, run.truth)).set_index('study_id')
    assert found.shifted['4'] and found.nearer['4'] == 5 and np.isclose(found.offset['4'], 1, atol=.15)
    points.loc[points.index[at][-1], XYZ] = run.truth.loc[points.index[at][-1], XYZ]  # the last level held in place: still a shift
    assert level_shifts(localise(points, run.truth)).set_index('study_id').shifted['4']


def test_two_strays_are_no_shift_and_sideways_is_none(run):
    points = run.points.copy()
    points.loc[(points.study_id == '2') & points.level.isin(['l1_l2', 'l5_s1']), 'z_mm'] -= 28
    points.loc[points.study_id == '3', 'x_mm'] += 40
    found = localise(points, run.truth)
    assert not level_shifts(found).shifted.any()
    assert np.isclose(localisation_summary(found)['within_10mm'], (60 - 7) / 60)


def test_missing_points_are_misses(run):
    points = run.points[run.points.study_id != '7']
    points = points.drop(points.index[(points.study_id == '8') & (points.level == 'l1_l2')])
    found = localise(points, run.truth)
    summary = localisation_summary(found)
    assert summary['missing'] == 6 and np.isclose(summary['within_10mm'], 54 / 60) and np.isfinite(summary['p95_mm']) and summary['studies'] == 12
    nothing = localise(points.iloc[:0], run.truth)
    assert nothing.error_mm.isna().all() and localisation_summary(nothing)['within_10mm'] == 0 and not len(level_shifts(nothing))


def test_truth_of_some_levels_only(run):
    truth = run.truth[run.truth.level.isin(['l3_l4', 'l4_l5', 'l5_s1'])]
    found = localise(run.points, truth)
    assert len(found) == 36 and found.error_mm.notna().all()
    assert found[found.level == 'l4_l5'].along_mm.notna().all()  # both neighbours are known
    assert not level_shifts(found).shifted.any()


def test_axial_choice_within_the_chosen_stack(run):
    lower = run.slices[run.slices.series_id == 'ax'].assign(stack=1)  # a second stack of the same series, tilted by 20 degrees
    a = np.deg2rad(20)
    lower = lower.assign(slice_i=lower.slice_i + 45, col_y=np.cos(a), col_z=np.sin(a), row_x=1.)
    slices = pd.concat([run.slices, lower], ignore_index=True)
    assert axial_choice(run.axial_slices, slices, run.truth).hit.mean() > .95  # the other stack's slices do not count
    tilted = []
    for t in run.truth.itertuples():
        mine = lower[lower.study_id == t.study_id]
        normal = np.array([0, -np.sin(a), np.cos(a)])  # row x column
        mm = np.abs((mine[['ipp_x', 'ipp_y', 'ipp_z']].to_numpy() - [t.x_mm, t.y_mm, t.z_mm]) @ normal)
        tilted += [(t.study_id, t.level, 0, 'ax', 1, int(i), True) for i in mine.slice_i.to_numpy()[np.argsort(mm)[:3]]]
    tilted = pd.DataFrame(tilted, columns=['study_id', 'level', 'pass_i', 'series_id', 'stack', 'slice_i', 'used'])
    found = axial_choice(tilted, slices, run.truth)
    assert found.hit.all() and found.nearest_mm.median() < 2


def test_axial_choice_counts_what_is_not_reached_or_not_used(run):
    chosen = run.axial_slices[~((run.axial_slices.study_id == '0') & (run.axial_slices.level == 'l5_s1'))]
    found = axial_choice(chosen, run.slices, run.truth)
    assert slice_summary(axial=found)['axial']['not_reached'] == 1 and not found.hit[(found.study_id == '0') & (found.level == 'l5_s1')].any()
    assert not axial_choice(chosen.assign(used=False), run.slices, run.truth).reached.any()
    second = axial_choice(pd.concat([chosen, chosen.assign(pass_i=1, slice_i=0)]), run.slices, run.truth)
    assert second.equals(found)  # only pass 0 is examined


@pytest.mark.parametrize('step', [0, 1, -3])
def test_sagittal_choice(run, step):
    boxes = run.boxes.assign(slice_i=run.boxes.slice_i + step)
    found = sagittal_choice(boxes, run.slices, run.truth)
    assert (found.off == abs(step)).all() and np.allclose(found.mm, (run.truth.x_mm - 4.5 * (boxes.slice_i - 7)).abs())
    summary = slice_summary(sagittal=found)['sagittal']
    assert summary['exact'] == (step == 0) and summary['within_1'] == (abs(step) <= 1) and summary['from_yolo'] == 1
    assert len(sagittal_choice(boxes[boxes.study_id != '0'], run.slices, run.truth)) == 55


def tilted(seed):
    "The slices of one study, all with the same oblique plane, and its axes: row, col, normal."
    turn = rotation(seed)
    table = pd.DataFrame({'study_id': '1', 'series_id': 's', 'slice_i': range(5), 'stack': 0, 'row_mm': .4, 'column_mm': .8})
    for name, axis in (('row', turn[0]), ('col', turn[1])): table[[f'{name}_{a}' for a in 'xyz']] = axis
    table[['ipp_x', 'ipp_y', 'ipp_z']] = np.arange(5)[:, None] * 4 * turn[2] + [7, -3, 20]
    return table, turn


@pytest.mark.parametrize('seed', range(4))
def test_the_error_is_split_at_the_plane_of_the_slice(seed):
    slices, (row, col, normal) = tilted(seed)
    truth = pd.DataFrame({'study_id': '1', 'level': LEVELS, 'x_mm': 0., 'y_mm': 0., 'z_mm': [0., -30., -60., -90., -120.]})
    points = truth.assign(series_id='s', slice_i=2)
    points[XYZ] += 3 * row + 4 * col - 12 * normal
    found = localise(points, truth, slices)
    assert np.allclose(found.error_mm, 13) and np.allclose(found.in_plane_mm, 5) and np.allclose(found.through_mm, 12)
    summary = localisation_summary(found)
    assert np.isclose(summary['in_plane_median_mm'], 5) and np.isclose(summary['through_p95_mm'], 12)
    points.loc[0, 'slice_i'] = 99  # a slice that is not in the table: the plane is unknown, the error is not
    some = localise(points, truth, slices)
    assert some.through_mm.isna().tolist() == [True, False, False, False, False] and np.allclose(some.error_mm, 13)
    for blind in (localise(points, truth), localise(points.drop(columns='slice_i'), truth, slices)):
        assert blind.through_mm.isna().all() and np.allclose(blind.error_mm, 13) and 'through_median_mm' not in localisation_summary(blind)


@pytest.mark.parametrize('seed', range(3))
def test_axial_centres_by_hand(seed):
    slices, (row, col, normal) = tilted(seed)
    truth = pd.DataFrame([('1', 'l3_l4', *(slices[['ipp_x', 'ipp_y', 'ipp_z']].to_numpy()[2] + 40 * row + 60 * col + 2 * normal))], columns=['study_id', 'level', *XYZ])
    points = truth.copy()
    points[XYZ] += 6 * row - 8 * col + 50 * normal  # 10 mm in the plane, and far off it, which is not asked here
    centres = pd.DataFrame({'study_id': '1', 'level': 'l3_l4', 'pass_i': 0, 'series_id': 's', 'slice_i': [2, 3], 'used': True, 'centre_source': ['cnn', 'projected'],
                            'x_px': [43 / .8, 40 / .8], 'y_px': [64 / .4, 60 / .4]})  # 3 and 4 mm away; exact
    found = axial_centres(centres, points, slices, truth)
    assert np.allclose(found.centre_mm, [5, 0]) and np.allclose(found.projected_mm, 10)
    assert centre_summary(found) == pytest.approx({'slices': 2, 'from_cnn': .5, 'centre_median_mm': 2.5, 'centre_p95_mm': 4.75, 'projected_median_mm': 10, 'projected_p95_mm': 10})
    moved = pd.DataFrame([('1', 's', *(3 * row + 4 * col))], columns=['study_id', 'series_id', *MOVED])  # the patient went where the first centre is
    there = axial_centres(centres, points, slices, truth, moved)
    assert np.allclose(there.centre_mm, [0, 5]) and np.allclose(there.projected_mm, np.hypot(3, 12))
    assert len(axial_centres(pd.concat([centres, centres.assign(pass_i=1)]), points, slices, truth)) == 2  # a second pass over the same slice says nothing new
    assert not len(axial_centres(centres.assign(used=False), points, slices, truth)) and not len(axial_centres(centres, points, slices, truth.assign(level='l1_l2')))


def test_made_up_centres_are_a_millimetre_off(run):
    found = axial_centres(run.axial_points, run.points, run.slices, run.truth)
    assert len(found) == 180 and np.isclose(np.sqrt((found.centre_mm ** 2).mean()), 1, atol=.15) and np.isclose(np.sqrt((found.projected_mm ** 2).mean()), 2 * (2 / 3) ** .5, atol=.25)


def test_recess_midpoints_need_both_sides_in_one_series():
    left, right = CONDITIONS[3:]
    points = pd.DataFrame([('1', left, 'l1_l2', 'a', 10., 0., 0.), ('1', right, 'l1_l2', 'a', -14., 2., 4.), ('1', left, 'l2_l3', 'a', 10., 0., 0.), ('1', right, 'l2_l3', 'b', -10., 0., 0.),
                           ('1', left, 'l3_l4', 'a', 10., 0., 0.), ('2', right, 'l3_l4', 'a', -10., 0., 0.), ('1', CONDITIONS[0], 'l1_l2', 'a', 90., 90., 90.)],
                          columns=['study_id', 'condition', 'level', 'series_id', *XYZ])
    found = recess_midpoints(points)
    assert found.to_numpy().tolist() == [['1', 'l1_l2', -2., 1., 2.]]
    assert recess_midpoints(points.drop(columns='series_id')).level.tolist() == ['l1_l2', 'l2_l3']  # truth.csv names no series
