"Structured Reports: refused for incomplete headers, and otherwise every grade comes back, through highdicom and through pydicom alone."
import shutil

import numpy as np
import pandas as pd
import pydicom
import pytest
from fakes import complete, fake_models

import mscan.report as report
from mscan.metrics import RISKS
from mscan.rsna import CONDITIONS, GRADES, LEVELS
from mscan.sr import read_report, write_reports


@pytest.fixture(scope='module')
def written(small_data, tmp_path_factory):
    "Two test studies, the first with complete headers; what mscan_sr leaves, and the rows of the report."
    folder = tmp_path_factory.mktemp('sr') / 'data'
    shutil.copytree(small_data, folder, ignore=shutil.ignore_patterns('train_images'))
    good, bare = sorted(p.name for p in (folder / 'test_images').iterdir())
    complete(folder / 'test_images' / good, ReferringPhysicianName='')
    models = fake_models(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(run_manifests=lambda run: [run], load_members=lambda manifests, device: [models]).items(): patch.setattr(report, name, value)
        files, refused = write_reports(folder, folder, folder / 'sr', device='cpu')
        rows = report.write_report(folder, folder, folder / 'report', good, 'cpu', False)
    return folder, good, bare, files, refused, rows


def test_incomplete_headers_are_refused_by_name(written):
    _, good, bare, files, refused, _ = written
    assert [f.name for f in files] == [f'{good}_sr.dcm'] and len(refused) == 1
    assert bare in refused[0] and all(name in refused[0] for name in ('SOPClassUID', 'PatientName', 'PatientBirthDate', 'AccessionNumber', 'StudyDate'))
    assert all(name not in refused[0] for name in ('FrameOfReferenceUID', 'SeriesInstanceUID', 'PatientID'))            # these the competition has


def test_every_grade_comes_back_by_highdicom(written):
    *_, files, _, rows = written
    back, sent = read_report(files[0]).set_index(['condition', 'level']).sort_index(), rows[rows['source'] != 'prior'].set_index(['condition', 'level']).sort_index()
    assert back.index.equals(sent.index) and len(back) == 25
    assert (back.grade == sent.said).all() and (back['source'] == sent['source']).all() and (back.review == sent.review).all()
    assert np.abs(back[list(RISKS)].to_numpy() - sent[list(RISKS)].to_numpy(float)).max() < 1e-6
    assert back.grade.nunique() > 1 or back[list(RISKS)].round(3).nunique().min() > 5                                   # not one answer 25 times


def items(dataset):
    "All content items of a document, by pydicom alone."
    for item in dataset.get('ContentSequence', []):
        yield item
        yield from items(item)


def named(group, value): return next(i for i in group.ContentSequence if i.ConceptNameCodeSequence[0].CodeValue == value)


def test_every_grade_comes_back_by_pydicom(written):
    *_, files, _, rows = written
    document = pydicom.dcmread(files[0])
    assert document.SOPClassUID.name == 'Comprehensive 3D SR Storage' and document.ContentQualification == 'RESEARCH' and document.VerificationFlag == 'UNVERIFIED' and document.Modality == 'SR'
    groups = [i for i in items(document) if i.ConceptNameCodeSequence[0].CodeValue == '125007']                         # Measurement Group
    sent = rows.set_index(['condition', 'level'])
    assert len(groups) == 25
    for g in groups:
        row = sent.loc[tuple(named(g, '112039').TextValue.split(' '))]                                                  # Tracking Identifier
        assert named(g, 'GRADE').ConceptCodeSequence[0].CodeMeaning == GRADES[row.said]
        assert np.allclose([float(named(g, f'P_RISK_{k}').MeasuredValueSequence[0].NumericValue) for k in range(3)], row[list(RISKS)].to_numpy(float), atol=1e-6)


def test_points_lie_in_the_frame_of_their_own_series(written):
    folder, good, *_, files, _, rows = written
    back = read_report(files[0]).set_index(['condition', 'level'])
    truth = pd.read_csv(folder / 'truth.csv', dtype={'study_id': str})
    truth = truth[(truth.study_id == good) & (truth.condition == CONDITIONS[0])].set_index('level').loc[list(LEVELS)]
    xyz = ['x_mm', 'y_mm', 'z_mm']
    assert np.abs(back.loc[CONDITIONS[0]].loc[list(LEVELS), xyz].to_numpy(float) - truth[xyz].to_numpy(float)).max() < 2e-3
    frames = {view: {pydicom.dcmread(next((folder / 'test_images' / good / s).iterdir()), stop_before_pixels=True).FrameOfReferenceUID for s in t.series_id}
              for view, t in pd.read_csv(folder / 'test_series_descriptions.csv', dtype=str).query('study_id == @good').groupby('series_description')}
    for condition, view in ((CONDITIONS[0], 'Sagittal T2/STIR'), (CONDITIONS[1], 'Sagittal T1'), (CONDITIONS[4], 'Axial T2')):
        assert set(back.loc[condition].frame) <= frames[view], condition
    left, right = (back.loc[c].loc[list(LEVELS), 'x_mm'].to_numpy(float) for c in CONDITIONS[1:3])
    assert (left > right).all()                                                                                         # LPS: x grows to the patient's left


def test_the_document_belongs_to_the_patient_and_refers_to_the_pictures(written):
    folder, good, *_, files, _, _ = written
    document = pydicom.dcmread(files[0])
    sources = [pydicom.dcmread(f, stop_before_pixels=True) for f in (folder / 'test_images' / good).glob('*/*.dcm')]
    assert str(document.PatientName) == 'Secret^Person' and document.StudyInstanceUID == sources[0].StudyInstanceUID
    referred = {i.ReferencedSOPInstanceUID for study in document.CurrentRequestedProcedureEvidenceSequence for s in study.ReferencedSeriesSequence for i in s.ReferencedSOPSequence}
    assert referred == {d.SOPInstanceUID for d in sources}
    assert document.SeriesInstanceUID not in {d.SeriesInstanceUID for d in sources}
