"Everything that is wrong with real studies, planted often: each is found by mscan_check's report or harms no answer, and studies without it answer as if it were nowhere."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mscan.check import check
from mscan.phantom import make_phantom, phantom_study
from mscan.points import clean_points, slice_rows
from mscan.mirror import conventional, stored_reversed
from mscan.quirks import QUIRKS
from mscan.rsna import row_ids

BIN = Path(sys.executable).parent
ENV = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg')
KIND = dict(seed=42, size='small', workers=2, progress=False, transitional=0.)
STAGES = '10_prepare,20_keypoints,21_projection,22_sides,30_crops,31_encoders,40_levels,42_grading'
SMOKE = ['--preset', 'smoke', '--stages', STAGES, '-p', 'view_dropout', '0.1', '-p', '31_encoders.sides', 'true', '-p', '42_grading.model', 'bilateral']
HARMLESS = {'number_gaps', 'numbers_mixed', 'monochrome1', 'signed_pixels', 'rescale_slope', 'no_thickness'}   # the same patient, stored otherwise
IMAGES = {n for n, q in QUIRKS.items() if q.place in ('scans', 'dataset', 'files')}
SIGNS = dict(second_sagittal_t1='2 sagittal t1 series', no_sagittal_t1='no sagittal T1 series', no_sagittal_t2='no sagittal T2 series', cervical_series='another part of the spine',
             number_gaps=' gaps', numbers_mixed='in no order', mixed_shapes='of 2 sizes', zero_byte_file='0 bytes', no_scs_label='no grade of spinal canal stenosis')
WRONG = dict(scs_points_missing='without a point', scs_point_in_corner='canal point', scs_points_swapped='canal point', scs_points_on_t1='sagittal t1 series', t1_sides_swapped='left ')


def command(name, *args):
    done = subprocess.run([BIN / name, *map(str, args)], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def planted(truth):
    "study -> quirk -> cells (condition, level) that it touched."
    cells = {}
    for r in truth.fillna({'quirks': ''}).itertuples():
        for q in filter(None, r.quirks.split(';')): cells.setdefault(r.study_id, {}).setdefault(q, set()).add((r.condition, r.level))
    return cells


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "The same patients with every quirk and with none, a run trained on the former, and its answers for the test studies of both."
    root = tmp_path_factory.mktemp('quirks')
    make_phantom(root / 'all', 10, 16, quirks='all', **KIND)
    make_phantom(root / 'none', 0, 16, quirks='none', **KIND)
    command('mscan_run', '--data_dir', root / 'all', '--run_dir', root / 'run', *SMOKE)
    answers = {}
    for name in ('all', 'none'):
        command('mscan_predict', '--run_dir', root / 'run', '--data_dir', root / name, '--out', root / f'out_{name}', '--device', 'cpu')
        answers[name] = pd.read_csv(root / f'out_{name}' / 'submission.csv').set_index('row_id')
    truth = pd.read_csv(root / 'all' / 'truth.csv', dtype=dict(study_id=str))
    return root, answers, truth, check(root / 'all', progress=False)


def by_study(answers): return {s: t.to_numpy() for s, t in answers.groupby(answers.index.str.split('_').str[0])}


@pytest.mark.slow
def test_25_finite_rows_for_every_study(world):
    root, answers, _, _ = world
    studies = sorted((p.name for p in (root / 'all' / 'test_images').iterdir()), key=lambda s: (len(s), s))
    assert len(studies) == 16 and list(answers['all'].index) == row_ids(studies)
    p = answers['all'].to_numpy()
    assert np.isfinite(p).all() and np.allclose(p.sum(1), 1, atol=1e-6)


@pytest.mark.slow
def test_studies_without_a_quirk_answer_as_if_there_were_none_anywhere(world):
    root, answers, truth, _ = world
    cells, spoiled, clean = planted(truth), by_study(answers['all']), by_study(answers['none'])
    assert set(spoiled) == set(clean)
    free = [s for s in spoiled if not IMAGES & set(cells.get(s, {}))]
    stored = [s for s in spoiled if 0 < len(IMAGES & set(cells.get(s, {}))) and IMAGES & set(cells[s]) <= HARMLESS]
    worst = {s: np.abs(spoiled[s] - clean[s]).max() for s in free + stored}
    print(f'{len(free)} unaffected studies, largest difference {max(worst[s] for s in free):.1e}; {len(stored)} stored otherwise, largest {max(worst[s] for s in stored):.1e}')
    assert len(free) >= 3 and max(worst[s] for s in free) <= 1e-6
    assert len(stored) >= 3 and max(worst[s] for s in stored) <= 1e-3, {s: (worst[s], sorted(cells[s])) for s in stored}
    harmed = [s for s in spoiled if s not in worst]
    assert any(np.abs(spoiled[s] - clean[s]).max() > 1e-6 for s in harmed)               # else the quirks were not there at all


@pytest.mark.slow
def test_every_planted_quirk_is_found_or_harmless(world):
    root, answers, truth, report = world
    cells, said = planted(truth), {r['study_id']: ' | '.join(r['problems'] + r['remarks']) for part in ('train', 'test') for r in report[part]}
    split = dict(zip(truth.study_id, truth.part, strict=True))
    fixes, counts = pd.read_csv(root / 'run' / '10_prepare' / 'corrections.csv', dtype=dict(study_id=str)), {}
    spoiled, clean = by_study(answers['all']), by_study(answers['none'])
    for study, quirks in cells.items():
        for q, touched in quirks.items():
            if q in WRONG:
                if split[study] == 'test': continue                                       # test studies have no table of points
                mine = fixes[(fixes.study_id == study) & fixes.wrong.str.contains(WRONG[q])]
                found = bool({*zip(mine.condition, mine.level, strict=True)} & touched) or 'no slice of its own kind' in ' '.join(fixes[fixes.study_id == study].done)
            elif q in SIGNS: found = SIGNS[q] in said[study] or q == 'no_scs_label' and split[study] == 'test'
            else: found = split[study] == 'train' or not IMAGES & set(quirks) <= HARMLESS or np.abs(spoiled[study] - clean[study]).max() <= 1e-3
            counts.setdefault(q, [0, 0, []])
            counts[q][0] += 1; counts[q][1] += found
            if not found: counts[q][2].append((study, sorted(quirks)))
    print('\n'.join(f'{q}: {n} planted, {k} found or harmless' for q, (n, k, _) in sorted(counts.items())))
    assert {q: c[2] for q, c in counts.items() if c[2]} == {}
    assert 'blank rows left out' in ' '.join(report['notes']) and len(counts) >= 15


@pytest.mark.slow
def test_point_quirks_of_many_studies_are_all_listed_and_clean_studies_lose_nothing():
    "60 studies without pixels: every quirk of points and labels, and no correction where none was planted."
    counts, false, pristine = {}, 0, 0
    for k in range(60):
        p = phantom_study(31, k, 'small', quirks='all', transitional=0., pixels=False)
        for s in p.study.series: s.pixels = []
        slices = pd.concat([slice_rows(conventional(s), 0, stored_reversed(s)) for s in p.study.series], ignore_index=True)
        fixes = clean_points(p.points, slices, p.labels, [])[1]
        touched = planted(p.truth).get(p.study.study_id, {})
        for q in set(touched) & set(WRONG):
            mine = fixes[fixes.wrong.str.contains(WRONG[q])]
            found = bool({*zip(mine.condition, mine.level, strict=True)} & touched[q])
            counts.setdefault(q, [0, 0])
            counts[q][0] += 1; counts[q][1] += found
        views = {s.view for s in p.study.series}
        if not set(touched) & set(WRONG) and len(views) == 3: pristine += 1; false += len(fixes) > 0
    print(counts, f'{false} of {pristine} studies without such quirks have a correction')
    assert set(counts) == set(WRONG) and all(k == n for n, k in counts.values()), counts
    assert pristine >= 10 and false == 0
