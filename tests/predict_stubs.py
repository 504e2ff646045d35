"A run whose networks are stand-ins, so that what surrounds grading can be tested in seconds: real files, real reading, real workers."
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from mscan import submission
from mscan.folds import made_up_stage
from mscan.grading import study_rows
from mscan.metrics import prior_table
from mscan.rsna import CONDITIONS, PROBS
from mscan.submission import GRADING

CANAL = CONDITIONS[0]


def stand_in_run(folder) -> Path:
    "Manifests of all stages that grading asks for, and nothing behind them."
    for stage in GRADING: made_up_stage(folder, stage)
    return Path(folder)


def stand_in_models(*_):
    return SimpleNamespace(low=.5, high=99.5, conditions=[CANAL], view_dropout=0., conditional=None, prior=prior_table(pd.DataFrame(columns=['condition', 'level', 'grade'])))


def stand_in_grade(study, models):
    "Canal rows that depend on every pixel of the study; the reader's problems are the reasons, as in `mscan.grading`."
    rows = study_rows(study.study_id, {}, SimpleNamespace(boxes=None, centres=None, reasons=list(study.problems)), None, None, models)
    if not study.of('sagittal_t2'): return rows
    total = sum(int(p.sum(dtype='int64')) for view in ('sagittal_t1', 'sagittal_t2', 'axial_t2') for s in study.of(view) for p in s.pixels)
    p = .2 + .4 * (total % 997) / 997
    canal = rows.condition == CANAL
    rows.loc[canal, list(PROBS)] = [[p, .6 - p / 2, .4 - p / 2]] * 5
    rows.loc[canal, 'source'] = 'model'
    return rows


def install(monkeypatch, grade=stand_in_grade, load=stand_in_models):
    "Put the stand-ins in place; workers inherit them, since they are forked."
    monkeypatch.setattr(submission, 'load_models', load)
    monkeypatch.setattr(submission, 'grade_study', grade)


def stand_in_grader(manifests, device, **asked):
    "In place of `mscan.submission.grader`, for workers that are no forks of this process."
    submission.load_models, submission.grade_study = stand_in_models, stand_in_grade
    return submission.grader(manifests, device, **asked)


def predicted(run, data, out):
    "Both files as they are where nothing happens."
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        submission.predict(run, data, out, 'cpu', progress=False)
    return results(out)


def five_studies(small_data, folder) -> Path:
    "A competition folder with five studies to grade."
    for k, study in enumerate(sorted((Path(small_data) / 'train_images').iterdir())[:5]): shutil.copytree(study, Path(folder) / 'test_images' / str(k + 1))
    return Path(folder)


def five_answers(run, data, out):
    "`predicted` of these five, seen to be worth comparing: each study has canal rows of its own."
    tables = predicted(run, data, out)
    assert len(tables[0]) == 125 and (tables[1]['source'] == 'model').sum() == 25 and tables[0].normal_mild.nunique() >= 5
    return tables


def results(folder, names=('submission', 'provenance')):
    return tuple(pd.read_csv(Path(folder) / f'{n}.csv', keep_default_na=False).set_index('row_id') for n in names)
