"Folders as they come: in any order, with faults, with what the real headers lack."
import shutil

import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEG2000Lossless

from mscan.dicom import DicomError, guess_view, order_slices, read_series, read_study


@pytest.fixture
def study_dir(small_data, tmp_path):
    "A copy of the first test study, to be broken."
    source = sorted((small_data / 'test_images').iterdir())[0]
    target = tmp_path / 'data' / 'test_images' / source.name
    shutil.copytree(source, target)
    shutil.copy(small_data / 'test_series_descriptions.csv', tmp_path / 'data')
    return target


def series_dir(study_dir, view):
    return next(p for p in sorted(study_dir.iterdir()) if read_series(p, pixels=False).view == view)


def edit(file, change):
    ds = pydicom.dcmread(file); change(ds); ds.save_as(file)


def test_order_is_of_space_not_of_names(study_dir):
    folder = series_dir(study_dir, 'sagittal_t2')
    first = read_series(folder)
    assert (np.diff(first.image_position[:, 0]) > 0).all()                       # from the patient's right to left
    files = sorted(folder.iterdir())
    for k, f in enumerate(files): f.rename(folder / f'renamed_{(k * 7) % 1000:04d}.dcm')
    again = read_series(folder)
    assert (again.instance_number == first.instance_number).all()
    assert all((a == b).all() for a, b in zip(first.pixels, again.pixels, strict=True))


@pytest.mark.parametrize('seed', range(5))
def test_stacks_survive_any_order(seed):
    rng = np.random.default_rng(seed)
    position, orientation = [], []
    for k, tilt in enumerate(np.deg2rad([0, 8, 20])):
        for i in range(5):
            orientation.append([1, 0, 0, 0, np.cos(tilt), -np.sin(tilt)]); position.append([-80, -80, 60 - 40 * k - 4 * i])
    order, stack = order_slices(position, orientation, [[200, 200]] * 15, [[.8, .8]] * 15)
    assert order.tolist() == list(range(15)) and stack.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    shuffle = rng.permutation(15)
    order, stack = order_slices(np.array(position)[shuffle], np.array(orientation)[shuffle], [[200, 200]] * 15, [[.8, .8]] * 15)
    assert shuffle[order].tolist() == list(range(15))


def test_reads_what_real_headers_lack_and_repeat(study_dir):
    "The files hold no SOPClassUID or Modality, and SOPInstanceUIDs repeat between series; nothing may be lost or mixed."
    study = read_study(study_dir.parents[1], 'test', study_dir.name)
    ds = pydicom.dcmread(next(study_dir.glob('*/*')))
    assert not any(k in ds for k in ('SOPClassUID', 'Modality', 'RescaleSlope'))
    frames = {pydicom.dcmread(next(p.iterdir())).FrameOfReferenceUID for p in study_dir.iterdir()}
    assert len(frames) == len(study.series) and sum(map(len, study.series)) == len(list(study_dir.glob('*/*'))) and not study.problems


def cut(f): f.write_bytes(f.read_bytes()[:f.stat().st_size // 2])
def jpeg2000(ds): ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
FAULTS = {
    'empty file': lambda f: f.write_bytes(b''),
    'not readable as DICOM': lambda f: f.write_bytes(b'hello' * 1000),
    'cut off|cannot be decoded': cut,
    'no usable ImagePositionPatient': lambda f: edit(f, lambda ds: ds.__delattr__('ImagePositionPatient')),
    'no usable PixelSpacing': lambda f: edit(f, lambda ds: setattr(ds, 'PixelSpacing', None)),
    'perpendicular': lambda f: edit(f, lambda ds: setattr(ds, 'ImageOrientationPatient', [1, 0, 0, 1, 0, 0])),
    'cannot be decoded': lambda f: edit(f, jpeg2000),
    'no pixel data': lambda f: edit(f, lambda ds: ds.__delattr__('PixelData')),
    'not between 1 and': lambda f: edit(f, lambda ds: setattr(ds, 'Rows', 65535)),
    'no usable NumberOfFrames': lambda f: edit(f, lambda ds: setattr(ds, 'NumberOfFrames', ['1', '2'])),
    'more than one frame': lambda f: edit(f, lambda ds: setattr(ds, 'NumberOfFrames', 5)),
}


@pytest.mark.parametrize('reason', FAULTS)
def test_a_broken_slice_is_left_out_with_its_reason(study_dir, reason):
    import re
    folder = series_dir(study_dir, 'axial_t2')
    whole = read_series(folder)
    victim = sorted(folder.iterdir())[2]
    FAULTS[reason](victim)
    rest = read_series(folder)
    assert len(rest) == len(whole) - 1 and len(rest.left_out) == 1
    name, said = rest.left_out[0]
    assert name == victim.name and re.search(reason, said), said


@pytest.mark.parametrize('byte', [0, 3, 64, 80])
def test_damaged_rle_never_gets_past_the_reader(study_dir, byte):
    "A damaged RLE header makes the decoder panic with a BaseException; it must end as a reason or as pixels of the right shape."
    folder = series_dir(study_dir, 'axial_t2')
    victim = sorted(folder.iterdir())[0]
    def damage(ds):
        data = bytearray(ds.PixelData); data[16 + byte] ^= 0xff; ds.PixelData = bytes(data)
    edit(victim, damage)
    series = read_series(folder)
    assert len(series) + len(series.left_out) == len(list(folder.iterdir())) and all(p.shape == tuple(s) for p, s in zip(series.pixels, series.shape, strict=True))


def test_nothing_usable_is_an_error_with_a_sentence(study_dir):
    folder = series_dir(study_dir, 'axial_t2')
    for f in folder.iterdir(): f.write_bytes(b'')
    with pytest.raises(DicomError, match='no usable slice among'): read_series(folder)
    study = read_study(study_dir.parents[1], 'test', study_dir.name)
    assert 'no axial T2 series' in study.problems and study.of('sagittal_t2') and any('empty file' in p for p in study.problems)


def test_views_without_a_table(study_dir):
    (study_dir.parents[1] / 'test_series_descriptions.csv').unlink()
    study = read_study(study_dir.parents[1], 'test', study_dir.name)
    assert {s.view for s in study.series} == {'sagittal_t1', 'sagittal_t2', 'axial_t2'}
    assert guess_view(np.array([[1, 0, 0, 0, 0, -1.]]), 'T2') is None                  # coronal


def test_grey_value_conventions(study_dir):
    folder = series_dir(study_dir, 'sagittal_t1')
    before = read_series(folder)
    for f in folder.iterdir(): edit(f, lambda ds: (setattr(ds, 'RescaleSlope', 2), setattr(ds, 'RescaleIntercept', -100)))
    after = read_series(folder)
    assert np.allclose(after.pixels[3], before.pixels[3] * 2. - 100)
    for f in folder.iterdir(): edit(f, lambda ds: (setattr(ds, 'RescaleSlope', 1), setattr(ds, 'RescaleIntercept', 0), setattr(ds, 'PhotometricInterpretation', 'MONOCHROME1')))
    inverted = read_series(folder)
    assert len({float(v) for a, b in zip(before.pixels, inverted.pixels, strict=True) for v in np.unique(a.astype(float) + b)}) == 1    # one offset for the series: no flicker


def test_no_folder_is_a_problem_not_a_crash(small_data):
    study = read_study(small_data, 'test', '999999')
    assert not study.series and 'no folder' in study.problems[0]
