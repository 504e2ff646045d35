"Any folder as mscan_predict meets it: heaps, nests, links, strangers among the files, hostile headers, studies beyond a limit."
import os
import re
import shutil
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, generate_uid

from mscan import folders, headers, heads
from mscan.dicom import DicomError, read_study
from mscan.folders import Found, Limits, Refused, find_studies, group_files, read_found, walk
from mscan.heads import read_head
from mscan.rsna import TableError, read_submission, row_ids
from mscan.submission import mscan_predict, predict
from predict_stubs import install, predicted, results, stand_in_run

NAME, BIRTH = 'Doe^Jane', '19610203'


@pytest.fixture(scope='module')
def run(tmp_path_factory): return stand_in_run(tmp_path_factory.mktemp('run'))


@pytest.fixture(scope='module')
def plain(small_data, tmp_path_factory):
    "Two studies in the competition's layout, with real UIDs, a name and a date of birth in every header."
    folder = tmp_path_factory.mktemp('folders') / 'data'
    for study in sorted((small_data / 'test_images').iterdir()):
        uid = generate_uid(entropy_srcs=[study.name])[:50]
        for file in sorted(study.rglob('*.dcm')):
            d = pydicom.dcmread(file)
            d.StudyInstanceUID, d.SeriesInstanceUID = uid, f'{uid}.{int(file.parent.name) % 1000 + 1}'
            d.PatientName, d.PatientID, d.PatientBirthDate = NAME, f'MRN-{study.name}', BIRTH
            target = folder / 'test_images' / study.name / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            d.save_as(target)
    return folder


def of_study(plain, k=0): return sorted((plain / 'test_images').iterdir())[k]


@pytest.fixture(scope='module')
def expected(plain, run, tmp_path_factory):
    "Answers from the competition's layout, a column a study, in an order that does not depend on ids."
    out = tmp_path_factory.mktemp('expected')
    predicted(run, plain, out)
    return answers_of(out)


def answers_of(out, names=('submission', 'provenance')):
    submission, why = results(out, names)
    studies = list(dict.fromkeys(re.sub('_(left|right|spinal)_.*', '', i) for i in submission.index))
    assert list(submission.index) == row_ids(studies) and np.isfinite(submission.to_numpy()).all() and list(why.index) == list(submission.index)
    return sorted([submission[submission.index.str.startswith(f'{s}_')].round(9).to_numpy().tolist() for s in studies])


def graded(run, data, out, monkeypatch, **options):
    install(monkeypatch)
    predict(run, data, out, 'cpu', progress=False, **options)
    return answers_of(out)


# ---- how files lie

def heap(plain, to):
    "One folder, names without meaning."
    for k, f in enumerate(sorted(plain.rglob('*.dcm'), key=lambda f: hash(str(f)))): shutil.copy(f, to / f'{k:08X}')

def nest(plain, to):
    "Each file in a folder of its own, ever deeper, with names of another alphabet."
    place = to
    for k, f in enumerate(sorted(plain.rglob('*.dcm'))):
        place = place / ('Übung-脊椎' if k % 9 == 0 else f'd{k}') if k < 40 else to / f'd{k}'
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, place / 'снимок')

def strangers(plain, to):
    "A DICOMDIR, a viewer, a PDF, an archiver's leavings, empty and damaged files among the slices."
    heap(plain, to)
    (to / 'AUTORUN.INF').write_text('[autorun]'); (to / 'report.pdf').write_bytes(b'%PDF-1.4' * 500); (to / 'nothing').touch()
    (to / 'half').write_bytes((to / '00000000').read_bytes()[:140]); (to / '.DS_Store').write_bytes(b'x'); (to / '__MACOSX').mkdir(); shutil.copy(to / '00000001', to / '__MACOSX' / '._x')
    d = Dataset(); d.file_meta = FileMetaDataset()
    d.file_meta.MediaStorageSOPClassUID, d.file_meta.MediaStorageSOPInstanceUID, d.file_meta.TransferSyntaxUID = heads.DIRECTORY, '1.2.3', ExplicitVRLittleEndian
    d.FileSetID = 'DISC'
    d.save_as(to / 'DICOMDIR', enforce_file_format=True)

def copies(plain, to):
    "Everything twice."
    for name in 'ab': (to / name).mkdir(); heap(plain, to / name)

def links(plain, to):
    "Links to files and folders, up, in a circle and to nowhere; and a pipe, which would be waited for."
    (to / 'x').mkdir()
    for k, study in enumerate(sorted((plain / 'test_images').iterdir())): (to / 'x' / f's{k}').symlink_to(study)
    (to / 'x' / 'again').symlink_to(of_study(plain)); (to / 'x' / 'up').symlink_to(to); (to / 'self').symlink_to(to / 'self'); (to / 'gone').symlink_to(to / 'no')
    os.mkfifo(to / 'pipe')

def without_uids(plain, to):
    "No study, series or slice UID: folders say what belongs together."
    for f in plain.rglob('*.dcm'):
        d = pydicom.dcmread(f)
        del d.StudyInstanceUID, d.SeriesInstanceUID, d.SOPInstanceUID
        target = to / 'export' / f.relative_to(plain / 'test_images').parent / f.stem
        target.parent.mkdir(parents=True, exist_ok=True)
        d.save_as(target)


@pytest.mark.parametrize('arrange', [heap, nest, strangers, copies, links, without_uids], ids=lambda a: a.__name__)
def test_studies_are_found_however_their_files_lie(plain, run, expected, monkeypatch, tmp_path, arrange):
    (tmp_path / 'in').mkdir()
    arrange(plain, tmp_path / 'in')
    assert graded(run, tmp_path / 'in', tmp_path / 'out', monkeypatch) == expected
    assert (results(tmp_path / 'out')[1]['source'] == 'model').sum() == 10


def test_one_study_and_one_series(plain, run, monkeypatch, expected, tmp_path):
    one = graded(run, of_study(plain), tmp_path / 'out', monkeypatch)
    assert len(one) == 1 and one[0] in expected
    series = next(p for p in of_study(plain).iterdir() if pydicom.dcmread(next(p.iterdir())).SeriesDescription == 'T1')
    graded(run, series, tmp_path / 'series', monkeypatch)
    why = results(tmp_path / 'series')[1]
    assert len(why) == 25 and (why['source'] == 'prior').all() and why.reason.str.contains('no sagittal T2 series').any()


def test_a_competition_folder_without_its_table_and_with_a_damaged_one(plain, run, expected, monkeypatch, tmp_path):
    shutil.copytree(plain, tmp_path / 'in')
    assert not (tmp_path / 'in/test_series_descriptions.csv').exists() and graded(run, tmp_path / 'in', tmp_path / 'out', monkeypatch) == expected
    (tmp_path / 'in/test_series_descriptions.csv').write_bytes(b'\xff\xfe\x00garbage')
    assert graded(run, tmp_path / 'in', tmp_path / 'out', monkeypatch) == expected
    assert {i.split('_')[0] for i in results(tmp_path / 'out')[0].index} == {d.name for d in (plain / 'test_images').iterdir()}


def test_the_table_wins_over_the_header(plain, monkeypatch, tmp_path):
    shutil.copytree(plain, tmp_path / 'in')
    study = of_study(plain)
    t1 = next(s for s in read_study(plain, 'test', study.name, pixels=False).series if s.view == 'sagittal_t1')
    (tmp_path / 'in/test_series_descriptions.csv').write_text(f'study_id,series_id,series_description\n{study.name},{t1.series_id},Sagittal T2/STIR\n')
    found = find_studies(tmp_path / 'in', False)
    read = read_found(next(f for f in found.studies if f.study_id == study.name), found.descriptions)
    assert {s.series_id: s.view for s in read.series}[t1.series_id] == 'sagittal_t2' and len(read.series) == len(list(study.iterdir()))   # the other series: by their headers


def test_a_series_of_another_kind_is_left_out_with_its_reason(plain, run, monkeypatch, tmp_path):
    shutil.copytree(of_study(plain), tmp_path / 'in')
    for k, (folder, change) in enumerate(zip(sorted((tmp_path / 'in').iterdir()), (dict(SeriesDescription='LOCALIZER'), dict(Modality='CT'), dict(SeriesDescription='ADC')), strict=False)):
        for f in folder.iterdir():
            d = pydicom.dcmread(f)
            for name, value in change.items(): setattr(d, name, value)
            d.save_as(f)
    graded(run, tmp_path / 'in', tmp_path / 'out', monkeypatch)
    reasons = results(tmp_path / 'out')[1].reason
    assert all(reasons.str.contains(w).any() for w in ('localiser', 'not of MR', 'computed'))


# ---- whom files belong to

def test_files_of_two_patients_under_one_uid_are_refused(plain, run, monkeypatch, tmp_path):
    (tmp_path / 'in').mkdir()
    heap(plain, tmp_path / 'in')
    for f in (tmp_path / 'in').iterdir(): d = pydicom.dcmread(f); d.StudyInstanceUID = '1.2.3'; d.save_as(f)
    graded(run, tmp_path / 'in', tmp_path / 'out', monkeypatch)
    why = results(tmp_path / 'out')[1]
    assert len(why) == 25 and (why['source'] == 'prior').all() and why.reason.str.contains('not graded: it holds files of 2 patients').any()


def test_ids_are_stable_short_and_lead_back_only_by_the_file_asked_for(plain, run, monkeypatch, tmp_path, capfd):
    (tmp_path / 'a').mkdir(); (tmp_path / 'b' / NAME).mkdir(parents=True)
    heap(plain, tmp_path / 'a'); nest(plain, tmp_path / 'b' / NAME)
    ids = [{s.study_id for s in find_studies(tmp_path / n, False).studies} for n in 'ab']
    assert ids[0] == ids[1] and all(re.fullmatch('[0-9a-f]{12}', i) for i in ids[0])
    install(monkeypatch)
    broken = next((tmp_path / 'b').rglob('снимок')); broken.write_bytes(broken.read_bytes()[:-2000])
    predict(run, tmp_path / 'b', tmp_path / 'out', 'cpu', workers=1, progress=False)
    told = ' '.join(p.read_text() for p in (tmp_path / 'out').iterdir()) + ''.join(capfd.readouterr())
    uids = {pydicom.dcmread(f).StudyInstanceUID for f in plain.rglob('*.dcm')}
    assert not [w for w in (NAME, 'Jane', BIRTH, 'MRN', str(tmp_path), *uids) if w in told] and not list(tmp_path.rglob('ids*.csv'))
    predict(run, tmp_path / 'b', tmp_path / 'out', 'cpu', progress=False, ids_csv=str(tmp_path / 'ids.csv'))
    back = pd.read_csv(tmp_path / 'ids.csv', dtype=str)
    assert set(back.study_uid) == uids and set(back.study_id) == ids[0] and (tmp_path / 'ids.csv').stat().st_mode & 0o077 == 0
    with pytest.raises(TableError, match='ids_csv'): predict(run, plain, tmp_path / 'out', 'cpu', progress=False, ids_csv=str(tmp_path / 'x.csv'))


def test_ids_that_would_collide_become_longer(plain, monkeypatch, tmp_path):
    heap(plain, tmp_path)
    short = folders.short_ids
    monkeypatch.setattr(folders, 'short_ids', lambda keys, digits=12: short(keys, 1))
    keys = [f'1.2.{k}' for k in range(40)]
    assert len(set(folders.short_ids(keys).values())) == 40 and len({s.study_id for s in group_files(tmp_path, False).studies}) == 2


def test_uids_that_are_paths_lead_nowhere(plain, run, expected, monkeypatch, tmp_path):
    (tmp_path / 'in').mkdir()
    for k, f in enumerate(sorted(plain.rglob('*.dcm'))):
        d = pydicom.dcmread(f)
        with pytest.warns(UserWarning): d.StudyInstanceUID = f'../../../{f.parents[1].name}/evil'; d.SeriesInstanceUID = f'{tmp_path}/evil/../{f.parent.name}'
        d.save_as(tmp_path / 'in' / str(k))
    before = {p for p in tmp_path.parent.rglob('*')}
    assert graded(run, tmp_path / 'in', tmp_path / 'out', monkeypatch) == expected
    assert not [p for p in set(tmp_path.parent.rglob('*')) - before if 'evil' in str(p)] and 'evil' not in (tmp_path / 'out/provenance.csv').read_text()


@pytest.mark.parametrize('name', ['a\nb', ' x ', 'caf\udce9', '\u202e7'], ids=['newline', 'blanks', 'no unicode', 'turned'])
def test_a_folder_name_that_no_table_can_hold_is_replaced(plain, run, expected, monkeypatch, tmp_path, name):
    shutil.copytree(plain, tmp_path / 'in')
    study = of_study(tmp_path / 'in')
    os.rename(study, study.parent / name)
    assert graded(run, tmp_path / 'in', tmp_path / 'out', monkeypatch) == expected and len(read_submission(tmp_path / 'out/submission.csv')) == 50


# ---- limits

@pytest.mark.parametrize('limits, said', [('files=5', 'files'), ('mib=0', 'MiB'), ('slices=3', 'slices in one series'), ('megapixels=0', 'megapixels')])
@pytest.mark.parametrize('layout', ['names', 'heap'])
def test_a_study_beyond_a_limit_is_refused_before_its_pixels(plain, run, monkeypatch, tmp_path, limits, said, layout):
    if layout == 'heap': (tmp_path / 'in').mkdir(); heap(plain, tmp_path / 'in')
    def no(*_): raise AssertionError('was read')
    monkeypatch.setattr(folders, 'read_study', no)
    graded(run, plain if layout == 'names' else tmp_path / 'in', tmp_path / 'out', monkeypatch, limits=Limits.of(limits))
    why = results(tmp_path / 'out')[1]
    assert len(why) == 50 and (why['source'] == 'prior').all() and why.reason.str.contains(f'not graded: it has [0-9]+ {said}').sum() == 10, why.reason.unique()
    with pytest.raises((Refused, Exception), match=said): predict(run, plain, tmp_path / 'strict', 'cpu', True, False, limits=Limits.of(limits))


def test_one_study_beyond_a_limit_costs_no_other(plain, run, expected, monkeypatch, tmp_path):
    shutil.copytree(plain, tmp_path / 'in')
    big = next(of_study(tmp_path / 'in').iterdir())
    for k in range(300): (big / f'more{k}.dcm').symlink_to(next(big.glob('1.dcm')))
    rows = graded(run, tmp_path / 'in', tmp_path / 'out', monkeypatch, limits=Limits(files=200))
    assert len(rows) == 2 and sum(r in expected for r in rows) == 1


def deflated(path, payload: bytes):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = '1.2.840.10008.5.1.4.1.1.4', '1.2.3', DeflatedExplicitVRLittleEndian
    d = Dataset(); d.file_meta = meta
    d.save_as(path, enforce_file_format=True)
    head = path.read_bytes()
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path.write_bytes(head[:144 + int.from_bytes(head[140:144], 'little')] + squeeze.compress(payload) + squeeze.flush())    # group 2 says how long it is


def test_a_head_that_unpacks_to_gigabytes_is_read_to_a_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(headers, 'MAX_FILE', 2 ** 22)
    described = b'\x08\x00\x3e\x10LO\x04\x00SAG '
    deflated(tmp_path / 'small', described)
    assert read_head(tmp_path / 'small').description == 'SAG'
    huge = b'\x09\x00\x01\x00UN\x00\x00\xff\xff\xff\x7f'                                    # an element that claims 2 GiB
    deflated(tmp_path / 'bomb', described + huge + bytes(2 ** 27))
    (tmp_path / 'plain').write_bytes((tmp_path / 'small').read_bytes()[:132] + b'\x02' + huge[1:] + bytes(99))
    for name in ('bomb', 'plain'):
        tracemalloc.start()
        try: read_head(tmp_path / name)
        except DicomError: pass
        peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        assert (tmp_path / name).stat().st_size < 2 ** 18 and peak < 2 ** 25, (name, peak)


def test_a_file_too_large_is_not_opened_further(monkeypatch, plain):
    monkeypatch.setattr(headers, 'MAX_FILE', 2000)
    with pytest.raises(DicomError, match='at most'): read_head(next(plain.rglob('*.dcm')))


@pytest.mark.filterwarnings('ignore')
def test_damaged_heads_raise_nothing_else(plain):
    "Bytes of a head changed at random, 400 times."
    rng, whole = np.random.default_rng(0), next(plain.rglob('*.dcm')).read_bytes()
    place = Path(os.environ.get('TMPDIR', '/tmp')) / f'head-{os.getpid()}'
    outcomes = set()
    for _ in range(400):
        data = bytearray(whole)
        for at in rng.integers(128, 1500, rng.integers(1, 12)): data[at] = rng.integers(256)
        place.write_bytes(bytes(data[:rng.integers(100, len(data))] if rng.random() < .3 else data))
        try: read_head(place); outcomes.add('read')
        except DicomError: outcomes.add('refused')
    place.unlink()
    assert outcomes == {'read', 'refused'}


# ---- the folder itself and the command

def test_nothing_to_grade_is_a_sentence(run, monkeypatch, tmp_path, capsys):
    install(monkeypatch)
    (tmp_path / 'in').mkdir(); (tmp_path / 'in/letter.txt').write_text('Dear colleague')
    for data, word in ((tmp_path / 'in', '1 files left out: not a DICOM file'), (tmp_path / 'none', 'no folder')):
        with pytest.raises(SystemExit) as end: mscan_predict(run_dir=str(run), data_dir=str(data), out=str(tmp_path / 'out'), device='cpu')
        said = capsys.readouterr().err
        assert end.value.code == 1 and word in said and 'Traceback' not in said and not (tmp_path / 'out').exists()
    with pytest.raises(SystemExit): mscan_predict(run_dir=str(run), data_dir=str(tmp_path), out=str(tmp_path / 'out'), limits='file=3')
    assert "'file=3'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_listed_is_told_and_passed_over(plain, monkeypatch, tmp_path):
    shutil.copytree(plain, tmp_path / 'in')
    closed, scandir = of_study(tmp_path / 'in'), os.scandir
    def denied(path):
        if Path(path) == closed: raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)
    monkeypatch.setattr(folders.os, 'scandir', denied)
    problems = []
    assert len(list(walk(tmp_path / 'in', problems))) == len(list(of_study(plain, 1).rglob('*.dcm'))) and problems == ['a folder could not be listed (Permission denied): left out']


def test_the_name_of_the_submission_may_be_chosen(plain, run, expected, monkeypatch, tmp_path):
    install(monkeypatch)
    mscan_predict(run_dir=str(run), data_dir=str(plain), out=str(tmp_path / 'a/submission.csv'), device='cpu', workers=0)
    mscan_predict(run_dir=str(run), data_dir=str(plain), out=str(tmp_path / 'a/mine.csv'), device='cpu', workers=0)
    assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == ['mine.csv', 'mine_provenance.csv', 'provenance.csv', 'submission.csv'] and answers_of(tmp_path / 'a', ('mine', 'mine_provenance')) == expected


def test_a_study_without_files_and_a_found_one_that_is_gone(run, monkeypatch, tmp_path):
    for name in ('1', '2/20', '3'): (tmp_path / 'in/test_images' / name).mkdir(parents=True)
    install(monkeypatch)
    found = find_studies(tmp_path / 'in', False)
    assert [f.study_id for f in found.studies] == ['1', '2', '3']
    rows = graded(run, tmp_path / 'in', tmp_path / 'out', monkeypatch)
    assert len(rows) == 3 and results(tmp_path / 'out')[1].reason.str.contains('none of its files is readable').any()
    with pytest.raises(OSError): read_found(Found('9', str(tmp_path / 'in/test_images/9')))


ROOT = Path(__file__).resolve().parents[1]


def test_every_line_of_the_table_of_inputs_names_tests_that_are_there():
    text = (ROOT / 'docs/inputs_predict.md').read_text(encoding='utf-8')
    lines = [row.split('|') for row in text.splitlines() if row.startswith('| ') and not row.startswith('| input')]
    assert len(lines) >= 35
    known = {p.name: set(re.findall(r'^def (test_\w+)', p.read_text(encoding='utf-8'), re.M)) for p in (ROOT / 'tests').glob('test_*.py')}
    for _, what, done, where, _ in lines:
        named = re.findall(r'`(test_\w+\.py)::(test_\w+)`', where)
        assert what.strip() and done.strip() and named, what
        for file, test in named: assert test in known[file], (what, test)
