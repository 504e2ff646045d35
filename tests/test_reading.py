"""Files and folders from anywhere: each line of the table `Reading` in docs/inputs.md is a test here, or in the file that it names. Most series are written by hand, slice by slice, so that what must come out can
be computed by hand."""
import os
import re
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from pathlib import Path

import cv2
import dcm2niix
import numpy as np
import pydicom
import pytest
from highdicom.spatial import PixelToReferenceTransformer, get_volume_positions
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from mscan import dicom, pixels
from mscan.dicom import DicomError, Series, Study, read_series, read_study
from mscan.geometry import plane_of
from mscan.pixels import file_bytes, parse, picture

ROOT = Path(__file__).resolve().parents[1]

from benchmarks import fuzz

BUNDLED = Path(pydicom.__file__).parent / 'data' / 'test_files'
SAGITTAL, AXIAL, CORONAL = [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1]


def slice_of(position, orientation=AXIAL, number=1, shape=(8, 10), syntax=ExplicitVRLittleEndian, value=None, **elements):
    "One slice; its pixels are its number, or an array."
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID, d.file_meta.MediaStorageSOPClassUID = syntax, '1.2.840.10008.5.1.4.1.1.4'
    d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = f'1.2.{abs(int(number)) if number is not None else 0}'
    stored = np.full(shape, (number or 0) % 1000, np.uint16) if value is None else np.asarray(value)
    d.Rows, d.Columns = stored.shape
    d.SamplesPerPixel, d.PhotometricInterpretation, d.BitsAllocated = 1, 'MONOCHROME2', 8 * stored.dtype.itemsize
    d.BitsStored, d.HighBit, d.PixelRepresentation = d.BitsAllocated, d.BitsAllocated - 1, int(stored.dtype.kind == 'i')
    d.ImagePositionPatient, d.ImageOrientationPatient, d.PixelSpacing = list(map(float, position)), list(map(float, orientation)), [2, 1]
    if number is not None: d.InstanceNumber = int(number)
    d.PixelData = (stored.astype(stored.dtype.newbyteorder('>')) if syntax == ExplicitVRBigEndian else stored).tobytes()
    d['PixelData'].VR = 'OW'
    for name, v in elements.items():
        if v is None: delattr(d, name)
        else: setattr(d, name, v)
    return d


def stack_of(folder, n=5, first=1, origin=(0, 0, 0), orientation=AXIAL, step=-4., name='{}.dcm', **elements):
    "n parallel slices, `step` mm apart along x (sagittal) or z, numbered from `first`."
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        away = np.cross(orientation[:3], orientation[3:]) * step * i
        slice_of(np.array(origin, float) + away, orientation, first + i, **elements).save_as(folder / name.format(first + i), enforce_file_format=True)
    return folder


@pytest.fixture
def axial(tmp_path): return stack_of(tmp_path / '7' / '42')


def put(folder, name, *args, **kwargs): slice_of(*args, **kwargs).save_as(folder / name, enforce_file_format=True)


def reason(series, name): return dict(series.left_out)[name]


# --- one file ------------------------------------------------------------------------------------------------------

def large(f): os.truncate(f, pixels.MAX_FILE + 1)
def huge(f): put(f.parent, f.name, [0, 0, -8], number=3, Rows=65535, Columns=65535, NumberOfFrames=1000)
def nowhere(f): f.unlink(); f.symlink_to(f.parent / 'nothing')
def pipe(f): f.unlink(); os.mkfifo(f)
def header_only(f): f.write_bytes(f.read_bytes()[:400])
def cut(f): f.write_bytes(f.read_bytes()[:-20])
def with_(**elements): return lambda f: put(f.parent, f.name, elements.pop('position', [0, 0, -8]), number=3, **elements)


ONE_FILE = {
    'zero-byte': (lambda f: f.write_bytes(b''), 'empty file'), 'text': (lambda f: f.write_bytes(b'study,level\n' * 50), 'not readable as DICOM'),
    'wrong magic': (lambda f: f.write_bytes(b'\0' * 128 + b'DICN' + f.read_bytes()[132:]), 'not readable as DICOM'), 'cut in the header': (header_only, 'cut off|not readable|no usable'),
    'cut in the pixels': (cut, 'cannot be decoded'), 'no pixels': (with_(PixelData=None), 'no pixel data'), 'larger than 128 MiB': (large, 'at most 128 are read'),
    'link that leads nowhere': (nowhere, 'a link that leads nowhere'), 'pipe': (pipe, 'not a file'), '65535 x 65535 x 1000': (huge, '65535 x 65535 is not between'),
    'several frames': (with_(NumberOfFrames=2), 'more than one frame'), 'colour': (with_(SamplesPerPixel=3, PhotometricInterpretation='RGB'), 'colour'),
    'palette': (with_(PhotometricInterpretation='PALETTE COLOR'), 'colour'), '1 bit': (with_(BitsAllocated=1, BitsStored=1), '8 or 16 bits'), '32 bits': (with_(BitsAllocated=32, BitsStored=32), '8 or 16 bits'),
    'no spacing': (with_(PixelSpacing=None), 'no usable PixelSpacing'), 'spacing 0': (with_(PixelSpacing=[0, 1]), 'PixelSpacing'), 'spacing 1000 mm': (with_(PixelSpacing=[1000, 1000]), 'PixelSpacing'),
    'no position': (with_(ImagePositionPatient=None), 'no usable ImagePositionPatient'), 'position 1e9 mm away': (with_(position=[0, 0, -1e9]), 'farther than 10 m'),
    'orientation not perpendicular': (with_(orientation=[1, 0, 0, .1, .995, 0]), 'perpendicular'), 'orientation not of length 1': (with_(orientation=[2, 0, 0, 0, 1, 0]), 'perpendicular'),
    'rescale slope 1e300': (with_(RescaleSlope=1e300), 'leave no grey values'), 'rescale slope nan': (with_(RescaleSlope='nan'), 'leave no grey values'),
}


@pytest.mark.parametrize('kind', ONE_FILE)
def test_one_file_is_left_out_with_a_reason(axial, kind):
    spoil, said = ONE_FILE[kind]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        spoil(axial / '3.dcm')
    series = read_series(axial, view='axial_t2')
    assert series.instance_number.tolist() == [1, 2, 4, 5] and series.image_position[:, 2].tolist() == [0, -4, -12, -16]
    assert [f for f, _ in series.left_out] == ['3.dcm'] and re.search(said, reason(series, '3.dcm')), series.left_out


def test_a_file_that_may_not_be_opened_says_so_without_its_path(axial, monkeypatch):
    "Also where everything runs as root, which may open anything."
    import builtins
    real = builtins.open
    def refusing(file, *args, **kwargs):
        if str(file).endswith('3.dcm'): raise PermissionError(13, 'Permission denied', str(file))
        return real(file, *args, **kwargs)
    monkeypatch.setattr(builtins, 'open', refusing)
    series = read_series(axial, view='axial_t2')
    assert len(series) == 4 and reason(series, '3.dcm') == 'cannot be opened (Permission denied)'


def test_a_read_only_folder_is_read(axial):
    for f in axial.iterdir(): f.chmod(0o400)
    axial.chmod(0o500)
    try: assert len(read_series(axial, view='axial_t2')) == 5
    finally: axial.chmod(0o700)


# --- encodings -----------------------------------------------------------------------------------------------------

def small(name): return (BUNDLED / f'{name}.dcm').read_bytes()


LOSSLESS = {**{n: lambda n=n: small(n) for n in ('MR_small', 'MR_small_implicit', 'MR_small_bigendian', 'MR_small_expb', 'MR_small_padded', 'MR_small_RLE', 'MR_small_jpeg_ls_lossless', 'MR_small_jp2klossless')},
            'JPEG lossless': fuzz.jpeg_lossless, 'JPEG lossless, process 14': lambda: fuzz.jpeg_lossless('JPEGLosslessProcess14')}


@pytest.mark.parametrize('name', LOSSLESS)
def test_an_encoding_without_loss_gives_the_same_values(name):
    read = picture(parse(LOSSLESS[name]()))
    assert read.dtype == np.int16 and read.dtype.isnative and np.array_equal(read, pydicom.dcmread(BUNDLED / 'MR_small.dcm').pixel_array)


def test_jpeg_baseline_is_read():
    grey = (pydicom.dcmread(BUNDLED / 'MR_small.dcm').pixel_array // 9).astype(np.uint8)
    read = picture(parse(fuzz.jpeg_baseline()))
    assert read.dtype == np.uint8 and np.abs(read.astype(int) - grey).mean() < 2 and np.abs(read.astype(int) - cv2.imdecode(cv2.imencode('.jpg', grey, [cv2.IMWRITE_JPEG_QUALITY, 95])[1], 0)).max() <= 2


OPENJPEG = {'693_J2KI': (-2971, 2836, -8.3, 1158.7), 'J2K_pixelrep_mismatch': (-2000, 1896, -658.4, 876.1), 'JPEG2000': (-30, 245, 13.5, 21.1)}  # by pylibjpeg-openjpeg 2.6.0, which is not installed with us


@pytest.mark.parametrize('name', [*OPENJPEG, 'JPEGLSNearLossless_08', 'JPEGLSNearLossless_16', 'image_dfl', 'examples_overlay', 'CT_small'])
def test_other_bundled_files_agree_with_another_decoder(name):
    "Least, largest value, mean and deviation by another JPEG 2000 decoder; CharLS for JPEG-LS; pydicom itself where nothing is compressed."
    d, read = pydicom.dcmread(BUNDLED / f'{name}.dcm'), picture(parse(small(name)))
    if name in OPENJPEG: assert (read.min(), read.max(), round(float(read.mean()), 1), round(float(read.std()), 1)) == OPENJPEG[name]
    else:
        if 'JPEG-LS' in d.file_meta.TransferSyntaxUID.name: d.pixel_array_options(decoding_plugin='pyjpegls')
        assert np.array_equal(read, d.pixel_array)


def test_every_bundled_file_is_a_picture_or_a_sentence():
    "pydicom's own corpus, whole: what is grey and of 8 or 16 bits in an encoding that we name is read, everything else is refused, nothing crashes."
    grey, odd = set(), []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for f in sorted(BUNDLED.glob('*.dcm')):
            try: assert picture(parse(file_bytes(f))).ndim == 2; grey.add(f.stem)
            except DicomError as e: assert len(str(e)) < 300 and str(e).isprintable(), f.name
            except Exception as e: odd.append((f.name, repr(e)))
    assert not odd and len(list(BUNDLED.glob('*.dcm'))) > 60
    assert grey == {'693_J2KI', 'CT_small', 'J2K_pixelrep_mismatch', 'JPEG2000', 'JPEGLSNearLossless_08', 'JPEGLSNearLossless_16', 'MR_small', 'MR_small_RLE', 'MR_small_bigendian', 'MR_small_expb',
                    'MR_small_implicit', 'MR_small_jp2klossless', 'MR_small_jpeg_ls_lossless', 'MR_small_padded', 'examples_overlay', 'image_dfl'}, grey


@pytest.mark.parametrize('syntax', [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless], ids=lambda s: s.name)
@pytest.mark.parametrize('dtype', ['uint8', 'int8', 'uint16', 'int16'])
def test_8_and_16_bits_with_and_without_sign(tmp_path, dtype, syntax):
    info = np.iinfo(dtype)
    value = np.random.default_rng(0).integers(info.min, info.max + 1, (7, 9)).astype(dtype)
    d = slice_of([0, 0, 0], syntax=ExplicitVRLittleEndian if syntax == RLELossless else syntax, value=value)
    if syntax == RLELossless: d.compress(RLELossless, encoding_plugin='pylibjpeg')
    elif dtype.endswith('int8') and syntax == ExplicitVRBigEndian: d.PixelData = np.frombuffer(value.tobytes() + b'\0', '<u2').astype('>u2').tobytes()   # bytes as words
    d.save_as(tmp_path / 'x.dcm', enforce_file_format=True)
    assert np.array_equal(dicom.read_pixels(parse(file_bytes(tmp_path / 'x.dcm'))), value)


def test_bits_that_are_not_stored_are_not_read(tmp_path):
    "Old files keep overlays above the 12 stored bits."
    value = np.random.default_rng(0).integers(0, 4096, (8, 10)).astype(np.uint16)
    put(tmp_path, 'x.dcm', [0, 0, 0], value=value | 0x5000, BitsStored=12, HighBit=11)
    assert np.array_equal(dicom.read_pixels(parse(file_bytes(tmp_path / 'x.dcm'))), value)


def test_monochrome1_and_a_rescale_are_honoured(tmp_path):
    value = np.arange(80, dtype=np.uint16).reshape(8, 10)
    put(tmp_path, 'x.dcm', [0, 0, 0], value=value, RescaleSlope=.5, RescaleIntercept=-10, PhotometricInterpretation='MONOCHROME1')
    assert np.array_equal(dicom.read_pixels(parse(file_bytes(tmp_path / 'x.dcm'))), 10 - value / 2)


# --- hostile files -------------------------------------------------------------------------------------------------

def test_deflated_data_unpack_to_a_limit(tmp_path):
    put(tmp_path, 'x.dcm', [0, 0, 0], syntax=DeflatedExplicitVRLittleEndian)
    data = (tmp_path / 'x.dcm').read_bytes()
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = data[:data.index(b'\x02\x00\x10\x00UI') + 8 + 22]
    bomb = head + b''.join(packer.compress(bytes(2 ** 22)) for _ in range(128)) + packer.flush()        # 500 kB for 512 MiB
    assert len(bomb) < 2 ** 20
    tracemalloc.start()
    try:
        with pytest.raises(DicomError, match='unpack to more than 128 MiB'): parse(bomb)
        assert 2 ** 27 <= tracemalloc.get_traced_memory()[1] < 2.5 * 2 ** 27          # of this call, whatever the tests before it have held
    finally: tracemalloc.stop()


def test_declared_sizes_cost_nothing(tmp_path):
    "65,535 x 65,535 pixels and a thousand frames are 8 TiB; they are refused in a process that may have one GiB."
    put(tmp_path, 'x.dcm', [0, 0, 0], Rows=65535, Columns=65535, NumberOfFrames=1000)
    code = f'''import resource
from mscan.dicom import read_series
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
try: read_series({str(tmp_path)!r}, view='axial_t2')
except ValueError as e: print(e)'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1'))
    assert 'no usable slice among 1 files' in done.stdout and '65535' in done.stdout, done.stderr[-300:]


@pytest.mark.parametrize('text', [b'1e99999999', b'9' * 5000])
def test_a_number_that_takes_for_ever_is_not_read(tmp_path, text):
    "Eleven bytes that pydicom would turn into an integer of a hundred million digits; the slice is used, under another number."
    put(tmp_path, '17.dcm', [0, 0, 0], number=3)
    data = (tmp_path / '17.dcm').read_bytes()
    at = data.index(b'\x20\x00\x13\x00IS')
    text += b' ' * (len(text) % 2)
    (tmp_path / '17.dcm').write_bytes(data[:at + 6] + len(text).to_bytes(2, 'little') + text + data[at + 8 + int.from_bytes(data[at + 6:at + 8], 'little'):])
    assert read_series(tmp_path, view='axial_t2').instance_number.tolist() == [17]


def test_encoded_data_longer_than_any_picture_are_refused():
    d = parse(small('MR_small_RLE'))
    d.PixelData = d.PixelData + bytes(10 ** 6)
    with pytest.raises(DicomError, match='bytes of encoded pixels'): picture(d)


class Crashes(pixels.Apart): command = "import os, sys; os.write(1, b'ready'); sys.stdin.buffer.read(16); os.abort()"
class Hangs(pixels.Apart): command = "import os, time; os.write(1, b'ready'); time.sleep(1000)"
class Lies(pixels.Apart): command = "import os, sys, struct; os.write(1, b'ready'); sys.stdin.buffer.read(16); os.write(1, struct.pack('<QQ', 2, 2**60))"


@pytest.mark.parametrize('stand_in, said', [(Crashes, 'the decoder crashed'), (Hangs, 'the decoder took more than'), (Lies, 'the decoder crashed')])
def test_a_decoder_that_fails_costs_its_slice(tmp_path, monkeypatch, stand_in, said):
    "It crashes, hangs or answers with exabytes: the slices that need it are left out, after three the others are not even tried, and the one that does not need it is read."
    for k in range(6): (tmp_path / f'{k}.dcm').write_bytes(fuzz.placed(pydicom.dcmread(BUNDLED / 'MR_small_jp2klossless.dcm')))
    put(tmp_path, '9.dcm', [0, 0, 0], number=9)
    pixels.stop_apart()
    monkeypatch.setattr(pixels, 'Apart', stand_in)
    monkeypatch.setattr(pixels, 'SECONDS', .3)
    try: series = read_series(tmp_path, view='axial_t2')
    finally: pixels.stop_apart()
    reasons = [r for _, r in series.left_out]
    assert series.files == ['9.dcm'] and [said in r for r in reasons] == [True] * 3 + [False] * 3 and all('not tried' in r for r in reasons[3:]), reasons


def test_the_decoder_s_process_is_bounded_and_ends_with_its_parent():
    pixels.stop_apart()
    picture(parse(small('MR_small_jp2klossless')))
    other = pixels._apart[os.getpid()].process
    limits = Path(f'/proc/{other.pid}/limits').read_text()
    assert re.search(rf'Max address space\s+{pixels.MEMORY}', limits)
    pixels.stop_apart()
    assert other.poll() is not None and os.getpid() not in pixels._apart
    code = "from mscan import pixels; pixels.picture(pixels.parse(open(__import__('sys').argv[1], 'rb').read())); print(pixels._apart.popitem()[1].process.pid, flush=True); __import__('os')._exit(0)"
    child = int(subprocess.run([sys.executable, '-c', code, BUNDLED / 'MR_small_jp2klossless.dcm'], capture_output=True, text=True, check=True).stdout)
    for _ in range(100):
        stat = Path(f'/proc/{child}/stat')
        if not stat.exists() or stat.read_text().split(')')[1].split()[0] == 'Z': break
        __import__('time').sleep(.1)
    else: raise AssertionError('the process outlives its parent')


def read_in_worker(_): return picture(parse(small('MR_small_jp2klossless'))).sum().item()


def test_workers_have_decoders_of_their_own():
    from mscan.workers import pooled
    expected = read_in_worker(0)                                                                        # the parent's is running when they fork
    assert pooled(read_in_worker, list(range(6)), 2, progress=False) == [expected] * 6 == [read_in_worker(0)] * 6
    pixels.stop_apart()


def test_a_hundred_thousand_elements_are_too_many():
    meta = small('MR_small_implicit')
    head = meta[:144 + int.from_bytes(meta[140:144], 'little')]                                                        # the meta group says its length
    with pytest.raises(DicomError, match='more than 50000 steps'): parse(head + bytes(8 * 10 ** 5))                     # elements of length zero
    nested = b'\x08\x00\x40\x11\xff\xff\xff\xff' + b'\xfe\xff\x00\xe0\x00\x00\x00\x00' * 10 ** 5                                # items of a sequence
    with pytest.raises(DicomError, match='more than 50000 steps'): parse(head + nested)
    deep = (b'\x08\x00\x40\x11\xff\xff\xff\xff' + b'\xfe\xff\x00\xe0\xff\xff\xff\xff') * 5000                                  # sequences in sequences
    with pytest.raises(DicomError, match='not readable|steps'): parse(head + deep)


def test_what_a_stranger_wrote_is_quoted_short_and_printable(axial):
    put(axial, '3.dcm', [0, 0, -8], number=3, PhotometricInterpretation='\x1b[31m<b>' + 'A' * 8)
    said = reason(read_series(axial, view='axial_t2'), '3.dcm')
    assert said.isprintable() and len(said) < 200


def test_no_name_of_a_person_comes_with_a_slice(axial):
    put(axial, '3.dcm', [0, 0, -8], number=3, PatientName='Muster^Maria', PatientBirthDate='19700101', InstitutionName='Hospital')
    header = dicom.read_header(axial / '3.dcm')['dataset']
    assert not {'PatientName', 'PatientBirthDate', 'InstitutionName'} & {e.keyword for e in header}


# --- one series ----------------------------------------------------------------------------------------------------

def test_slices_at_one_place_are_one_slice(axial):
    "The longer echo is kept, else the lower number; two slices of neighbouring places stay."
    put(axial, 'again.dcm', [0, 0, -8], number=77)
    series = read_series(axial, view='axial_t2')
    assert series.instance_number.tolist() == [1, 2, 3, 4, 5] and reason(series, 'again.dcm') == 'lies where 3.dcm lies' and [p[0, 0] for p in series.pixels] == [1, 2, 3, 4, 5]
    for k in (1, 2): put(axial, f'echo{k}.dcm', [0, 0, -8.02], number=90 + k, EchoTime=k * 50.)
    series = read_series(axial, view='axial_t2')
    assert series.instance_number.tolist() == [1, 2, 92, 4, 5] and {f for f, _ in series.left_out} == {'again.dcm', '3.dcm', 'echo1.dcm'}
    put(axial, 'close.dcm', [0, 0, -9], number=50)
    assert read_series(axial, view='axial_t2').instance_number.tolist() == [1, 2, 92, 50, 4, 5]


def test_the_same_slices_are_used_whether_pixels_are_read_or_not(axial):
    put(axial, 'again.dcm', [0, 0, -8], number=77)
    put(axial, 'localiser.dcm', [0, 0, 0], SAGITTAL, number=78)
    put(axial, 'frames.dcm', [0, 0, -99], number=79, NumberOfFrames=3)
    a, b = (read_series(axial, view='axial_t2', pixels=p) for p in (True, False))
    assert a.files == b.files and sorted(a.left_out) == sorted(b.left_out) and len(a.left_out) == 3


def test_numbers_that_stand_twice_or_not_at_all_lose_no_slice(tmp_path):
    folder = stack_of(tmp_path / 'a', 3)
    put(folder, 'twice.dcm', [0, 0, -40], number=2)
    put(folder, 'none.dcm', [0, 0, -50], number=None)
    put(folder, 'IM-0099.dcm', [0, 0, -60], number=None)
    put(folder, '2147483648.dcm', [0, 0, -70], number=None)
    series = read_series(folder, view='axial_t2')
    assert series.instance_number.tolist() == [1, 2, 3, 2, 100, 99, 101][:4] + series.instance_number.tolist()[4:] and series.instance_number[5] == 99
    assert sorted(series.instance_number.tolist()) == [1, 2, 2, 3, 99, 100, 101] and series.instance_number.dtype.kind == 'i' and not series.left_out
    assert len(series.notes) == 2 and '2 of 7 slices have no usable' in series.notes[0] and '1 of 7 slices have the InstanceNumber' in series.notes[1]
    study = tmp_path / 'test_images' / '7'
    study.mkdir(parents=True); folder.rename(study / '42')
    assert sum('InstanceNumber' in p for p in read_study(tmp_path, 'test', '7').problems) == 2


@pytest.mark.parametrize('number', [5046, -3, 2 ** 31 - 1])
def test_numbers_may_be_odd(axial, number):
    put(axial, '3.dcm', [0, 0, -8], number=number)
    assert read_series(axial, view='axial_t2').instance_number.tolist() == [1, 2, number, 4, 5]


def test_gaps_leave_every_slice_in_its_place(axial):
    for n in (2, 3): (axial / f'{n}.dcm').unlink()
    series = read_series(axial, view='axial_t2')
    assert series.image_position[:, 2].tolist() == [0, -12, -16] and series.stack.tolist() == [0, 0, 0]


def test_other_matrices_stay_with_their_own_geometry(axial):
    put(axial, '3.dcm', [.5, .5, -8], number=3, shape=(4, 5), PixelSpacing=[4, 2])
    series = read_series(axial, view='axial_t2')
    assert series.shape.tolist() == [[8, 10], [8, 10], [4, 5], [8, 10], [8, 10]] and series.pixel_spacing[2].tolist() == [4, 2] and series.pixels[2].shape == (4, 5) and not series.left_out


def test_a_localiser_among_the_slices_is_left_out(axial):
    put(axial, 'a.dcm', [0, 0, 0], SAGITTAL, number=70)
    put(axial, 'b.dcm', [0, 0, 0], CORONAL, number=71)
    series = read_series(axial, view='axial_t2')
    assert series.instance_number.tolist() == [1, 2, 3, 4, 5] and series.stack.max() == 0
    assert 'another plane (sagittal)' in reason(series, 'a.dcm') and 'another plane (coronal)' in reason(series, 'b.dcm')


def test_two_blocks_of_a_sagittal_series_are_two_stacks(tmp_path):
    "Lumbar and thoracic, their slices interleaved in x: sorted into one they would alternate; and two that are turned against each other."
    folder = stack_of(tmp_path / 's', 5, 1, (-8, -100, 100), SAGITTAL, -4, shape=(100, 100))
    stack_of(folder, 5, 11, (-6, -100, 400), SAGITTAL, -4, shape=(100, 100))
    series = read_series(folder, view='sagittal_t2')
    assert series.stack.tolist() == [0] * 5 + [1] * 5 and set(series.instance_number[:5].tolist()) == {1, 2, 3, 4, 5} and all((np.diff(series.image_position[k:k + 5, 0]) > 0).all() for k in (0, 5))   # right to left
    assert any('2 stacks of parallel slices (5, 5) in a sagittal series' in n for n in series.notes)
    turned = stack_of(tmp_path / 't', 5, 1, (-8, -100, 100), SAGITTAL, -4)
    a = np.deg2rad(7)
    stack_of(turned, 4, 11, (-6, -100, 100), [-np.sin(a), np.cos(a), 0, 0, 0, -1], -4)
    assert sorted(np.bincount(read_series(turned, view='sagittal_t2').stack)) == [4, 5]


def test_a_stack_that_follows_the_spine_stays_one(tmp_path):
    "Each slice moved in its plane by 5 mm against the last: 40 mm over nine slices of a field of 100 mm."
    for i in range(9): (tmp_path / 'a').mkdir(exist_ok=True); put(tmp_path / 'a', f'{i}.dcm', [0, 5 * i, -4 * i], number=i, shape=(50, 100))
    assert read_series(tmp_path / 'a', view='axial_t2').stack.max() == 0


@pytest.mark.parametrize('seed', range(3))
def test_stacks_and_their_order_do_not_depend_on_file_names(tmp_path, seed):
    rng, said = np.random.default_rng(seed), []
    for k in range(2):
        folder = stack_of(tmp_path / str(k), 5, 1, (-8, -100, 100), SAGITTAL, -4, shape=(100, 100), name=f'{k}x' + '{}')
        stack_of(folder, 4, 11, (-8, -100, 400), SAGITTAL, -4, shape=(100, 100), name=f'{k}x' + '{}')
        if k:
            files = sorted(folder.iterdir())
            for f, j in zip(files, rng.permutation(len(files)), strict=True): f.rename(folder / f'r{j:03}')
        series = read_series(folder, view='sagittal_t2')
        said.append((series.instance_number.tolist(), series.stack.tolist()))
    assert said[0] == said[1]


def test_the_middle_of_a_study_s_series_is_a_middle_of_a_stack():
    "A sagittal series of the lumbar spine with a small stack elsewhere, which holds the series' middle slice by number, still shows the axial slices and comes before a longer one of the neck."
    def series(name, view, parts, orientation):
        position = np.concatenate([np.array(p, float) for p, _ in parts])
        n = len(position)
        return Series('7', name, view, [], position, np.tile(orientation, (n, 1)).astype(float), np.ones((n, 2)), np.full((n, 2), 200), np.arange(n), np.repeat(range(len(parts)), [len(p) for p, _ in parts]))
    def sagittal(x, z, n): return ([[x + 4 * i, -100, z] for i in range(n)], None)
    axial = series('1', 'axial_t2', [([[-100, -100, -4 * i] for i in range(10)], None)], AXIAL)
    lumbar = series('2', 'sagittal_t2', [sagittal(-20, 90, 5), sagittal(-20, 500, 6)], SAGITTAL)
    neck = series('3', 'sagittal_t2', [sagittal(-20, 500, 13)], SAGITTAL)
    assert [s.series_id for s in Study('7', [axial, neck, lumbar]).of('sagittal_t2')] == ['2', '3']


@pytest.mark.parametrize('name', ['{}', 'Schicht \u00fc\u4e2d {}', '{}.IMA', 'a{}b\udce9.dcm'])
def test_file_names_do_not_matter(tmp_path, name):
    "No ending, other alphabets, and bytes that are no UTF-8, which could not be written into any table."
    series = read_series(stack_of(tmp_path / 'Ordner \u00e4\u4e2d' / '42', name=name), view='axial_t2')
    assert series.instance_number.tolist() == [1, 2, 3, 4, 5] and series.study_id == 'Ordner \u00e4\u4e2d'
    for f in series.files: f.encode('utf-8')


def test_links_to_files_and_folders_are_followed(tmp_path):
    real = stack_of(tmp_path / 'elsewhere')
    (tmp_path / '7' / '42').mkdir(parents=True)
    for f in real.iterdir(): (tmp_path / '7' / '42' / f.name).symlink_to(f)
    (tmp_path / '7' / '43').symlink_to(real)
    assert all(len(read_series(tmp_path / '7' / s, view='axial_t2')) == 5 for s in ('42', '43'))


def test_a_folder_in_a_folder_is_followed_and_a_circle_ends(tmp_path):
    real = stack_of(tmp_path / '42' / 'DICOM' / 'S0001')
    assert len(read_series(tmp_path / '42', view='axial_t2')) == 5
    (real / 'more').mkdir()
    series = read_series(tmp_path / '42', view='axial_t2')
    assert len(series) == 5 and reason(series, 'more') == 'a folder inside the folder of a series'
    (tmp_path / 'circle').mkdir(); (tmp_path / 'circle' / 'again').symlink_to(tmp_path / 'circle')
    with pytest.raises(DicomError, match='lies too deep'): read_series(tmp_path / 'circle')


def test_a_series_has_limits(tmp_path, monkeypatch):
    folder = stack_of(tmp_path / '42')
    monkeypatch.setattr(dicom, 'MAX_BYTES', 3 * 160)
    series = read_series(folder, view='axial_t2')
    assert len(series) == 3 and all('holds more than' in r for _, r in series.left_out)
    monkeypatch.setattr(dicom, 'MAX_FILES', 4)
    with pytest.raises(DicomError, match='holds 5 files; at most 4'): read_series(folder)


def test_files_beside_the_folders_of_series_are_said(tmp_path):
    stack_of(tmp_path / 'test_images' / '7' / '42')
    put(tmp_path / 'test_images' / '7', 'loose.dcm', [0, 0, 0])
    assert '1 files lie beside the folders of series and are not read' in read_study(tmp_path, 'test', '7').problems


# --- other readers -------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def quirky(tmp_path_factory):
    "Four phantom studies with everything that the phantom can plant, as files: list of series' folders."
    from mscan.phantom import make_phantom
    folder = tmp_path_factory.mktemp('quirky')
    make_phantom(folder, studies=0, test_studies=4, seed=21, size='small', quirks='all', workers=1, progress=False)
    return sorted((folder / 'test_images').glob('*/*'))


def test_geometry_of_every_stack_agrees_with_highdicom(quirky):
    "Where pixels lie, and how a stack is sorted and spaced: highdicom is given the headers as they are in the files."
    stacks = views = 0
    for folder in quirky:
        series = read_series(folder)
        headers = {f.name: pydicom.dcmread(f, stop_before_pixels=True) for f in folder.iterdir() if f.stat().st_size}
        for k in np.unique(series.stack):
            members = np.flatnonzero(series.stack == k)
            for i in members:
                d, xy = headers[series.files[i]], np.array([[0, 0], [5, 0], [0, 9], [int(series.shape[i, 1]) - 1, int(series.shape[i, 0]) - 1]])
                judged = PixelToReferenceTransformer(d.ImagePositionPatient, d.ImageOrientationPatient, d.PixelSpacing)(xy)
                assert np.abs(plane_of(series, i).to_patient(xy) - judged).max() < 1e-6
            if len(members) < 2 or len(np.unique(series.shape[members], axis=0)) > 1: continue             # a corner moves with the matrix
            spacing, place = get_volume_positions([list(headers[series.files[i]].ImagePositionPatient) for i in members], list(headers[series.files[members[0]]].ImageOrientationPatient), allow_missing_positions=True, rtol=.05)
            assert spacing is not None and (np.diff(place) > 0).all() or (np.diff(place) < 0).all(), (folder, place)
            step = np.linalg.norm(np.diff(series.image_position[members], axis=0), axis=1)
            assert np.allclose(step, spacing * np.abs(np.diff(place)), rtol=.05)
            stacks += 1
        views += series.view == 'axial_t2'
    assert stacks > 15 and views >= 4


def test_stacks_are_those_into_which_dcm2niix_splits(quirky, tmp_path):
    "Its volumes hold as many slices of the same matrix as our stacks do."
    several = 0
    for k, folder in enumerate(quirky):
        series, out = read_series(folder), tmp_path / str(k)
        out.mkdir()
        done = subprocess.run([dcm2niix.bin, '-z', 'n', '-b', 'n', '-f', '%s_%i', '-o', out, folder], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-500:]
        volumes = []
        for f in out.glob('*.nii'):
            if f.stem.endswith('_Eq'): continue                                                          # the same volume once more, its gaps filled
            dims, columns, rows, n, *_ = np.frombuffer(f.read_bytes()[40:56], '<i2')
            volumes.append((int(rows), int(columns), int(n) if dims > 2 else 1))
        shapes, counts = np.unique(np.c_[series.shape, series.stack], axis=0, return_counts=True)
        assert sorted(volumes) == sorted((int(r), int(c), int(n)) for (r, c, _), n in zip(shapes, counts, strict=True)), (folder.name, series.view)
        several += series.stack.max() > 0
    assert several >= 3


# --- the table -----------------------------------------------------------------------------------------------------

def test_every_line_of_the_table_names_a_test_that_exists():
    text = (ROOT / 'docs' / 'inputs.md').read_text(encoding='utf-8')
    lines = [l for l in text.split('## Reading')[1].split('\n## ')[0].split('\n') if l.startswith('|')][2:]
    assert len(lines) > 30
    for line in lines:
        named = re.findall(r'`(test_\w+)\.py::(test_\w+)', line)
        assert named and line.count('|') == 4, line
        for file, test in named: assert f'def {test}(' in (ROOT / 'tests' / f'{file}.py').read_text(encoding='utf-8'), line
