"A hundred of the inputs of `python -m benchmarks.fuzz`, whether its checks can fail, and headers of every kind. About 20 seconds."
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from mscan import dicom, pixels

from test_reading import slice_of


def test_damaged_files_stop_nothing():
    "Eight of each kind of damage; the whole run is 20,000."
    records, peak = fuzz.fuzz_reader(8 * len(fuzz.DAMAGE), seed=1)
    assert [r['n'] for r in records] == list(range(8 * len(fuzz.DAMAGE))) and {r['kind'] for r in records} == {d.__name__ for d in fuzz.DAMAGE}
    assert not [r for r in records if r['fate'] not in ('read', 'left out')] and 0 < peak < 2048
    fates = [r['fate'] for r in records]
    assert fates.count('read') >= 5 and fates.count('left out') >= 50 and len({fuzz.short(r['reason']) for r in records}) > 12       # damage that bites, in many ways


STAND_IN = '''
import sys, json, os, time
from benchmarks import fuzz
folder, seed, cases = json.loads(sys.argv[1])
def check(folder):
    n = next(numbers)
    if n == 2: os.abort()
    if n == 4: time.sleep(60)
    assert n != 5, 'lost'
    if n == 6: raise RuntimeError('escaped')
    if n == 7: bytearray(2 ** 33)
    return dict(read=True, reason='')
numbers = iter(range(*cases))
fuzz.check_case = check
fuzz.child(folder, seed, range(*cases))
'''


def test_the_fuzzer_counts_crashes_hangs_and_losses():
    "A reader that crashes, hangs, loses a file, lets an exception through and asks for 8 GiB: each is found, and the case after it is tried."
    records, _ = fuzz.fuzz_reader(9, seed=1, code=STAND_IN, seconds=5)
    assert [r['fate'] for r in records] == ['read', 'read', 'crash', 'read', 'hang', 'error', 'error', 'error', 'read']
    assert 'lost' in records[5]['reason'] and 'escaped' in records[6]['reason'] and 'MemoryError' in records[7]['reason']


def test_a_case_is_what_its_number_says():
    sources = [('a', fuzz.BUNDLED.joinpath('MR_small.dcm').read_bytes()), ('b', fuzz.BUNDLED.joinpath('MR_small_RLE.dcm').read_bytes())]
    cases = [fuzz.damaged(3, n, sources) for n in range(60)]
    assert cases == [fuzz.damaged(3, n, sources) for n in range(60)] and cases != [fuzz.damaged(4, n, sources) for n in range(60)]
    assert sum(data not in dict(sources).values() for _, _, data in cases) >= 55


NUMBER = st.one_of(st.integers(-2 ** 33, 2 ** 33), st.floats(allow_nan=True, allow_infinity=True), st.sampled_from(['', ' ', '1e5', '1e99999999', '0x10', '1\\2', '\u00fc', '-', '+.e']))
NUMBERS = st.one_of(st.none(), NUMBER, st.lists(st.one_of(NUMBER, st.floats(-300, 300)), max_size=7))
HEADER = st.fixed_dictionaries({}, optional=dict(ImagePositionPatient=NUMBERS, ImageOrientationPatient=NUMBERS, PixelSpacing=NUMBERS, InstanceNumber=NUMBERS, EchoTime=NUMBERS, RescaleSlope=NUMBERS, RescaleIntercept=NUMBERS,
                                                 NumberOfFrames=NUMBERS, SeriesDescription=st.one_of(st.none(), st.text(max_size=20)), PhotometricInterpretation=st.sampled_from(['MONOCHROME1', 'RGB', '', None, 'MONOCHROME2\\RGB']),
                                                 **{k: st.one_of(st.none(), st.integers(0, 65535), st.sampled_from([0, 1, 8, 10, 16]), st.lists(st.integers(0, 65535), max_size=3)) for k in ('Rows', 'Columns', 'BitsAllocated', 'BitsStored', 'PixelRepresentation', 'SamplesPerPixel')}))
VRS = dict(ImagePositionPatient='DS', ImageOrientationPatient='DS', PixelSpacing='DS', InstanceNumber='IS', EchoTime='DS', RescaleSlope='DS', RescaleIntercept='DS', NumberOfFrames='IS', SeriesDescription='LO', PhotometricInterpretation='CS')


def encoded(keyword, value):
    "A raw element with that value, written as a careless program writes it; None: absent."
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag
    if keyword not in VRS: raw, vr = np.array(value if isinstance(value, list) else [value], '<u2').tobytes(), 'US'
    else: raw, vr = '\\'.join(map(str, value if isinstance(value, list) else [value])).encode('utf-8', 'replace'), VRS[keyword]
    return RawDataElement(Tag(keyword), vr, len(raw), raw, 0, False, True)


@settings(max_examples=200, deadline=2000, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(header=HEADER)
def test_any_header_is_a_slice_or_a_reason(header):
    "Values of any kind in the elements that are read: facts within their limits, or DicomError; never another exception, never a warning's worth of silence."
    from pydicom.dataset import Dataset
    from pydicom.tag import Tag
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter('ignore')
        elements = {e.tag: e for e in slice_of([0, 0, 0])}
        for keyword, value in header.items():
            if value is None: elements.pop(Tag(keyword), None)
            else: elements[Tag(keyword)] = encoded(keyword, value)
        data = Dataset({t: elements[t] for t in sorted(elements)})
        data.file_meta = slice_of([0, 0, 0]).file_meta
        dataset, real = data, pixels.parse
        (Path(folder) / 'x7.dcm').write_bytes(b'x')
        dicom.parse = lambda data, with_pixels=True: dataset
        try: found, left_out = dicom.read_slices([Path(folder) / 'x7.dcm'])
        finally: dicom.parse = real
    assert len(found) + len(left_out) == 1
    assert all('unusable header' not in r for _, r in left_out), left_out                                                       # every fault is foreseen
    for f in found:
        number, image = f['instance_number'], f['image']
        assert image.shape == f['shape'] and np.isfinite(image).all() and (number is None or abs(number) <= dicom.MAX_NUMBER)
        assert np.abs(f['position']).max() <= dicom.MAX_AWAY_MM and f['spacing'].min() >= .05 and f['spacing'].max() <= 10
        assert np.allclose(f['orientation'].reshape(2, 3) @ f['orientation'].reshape(2, 3).T, np.eye(2), atol=2e-3) and np.isfinite(f['echo'])


@pytest.mark.parametrize('seed', [0])
def test_damaged_studies_are_read_to_the_last(small_data, tmp_path, seed):
    "What `mscan_predict` reads: twenty studies with damaged, foreign, renamed and missing files and folders come back normalised; whatever is left is finite and has its geometry."
    from mscan.submission import read_normalised
    bundled = [(f.name, f.read_bytes()) for f in sorted(fuzz.BUNDLED.glob('MR_small*.dcm'))]
    done = fuzz.damaged_studies(tmp_path, small_data, range(20), seed, bundled)
    read = 0
    for study_id in done:
        study = read_normalised(tmp_path, study_id, None, .5, 99.5)
        for s in study.series:
            assert len(s) == len(s.pixels) == len(s.files) == len(s.stack) and all(p.dtype == np.uint8 and p.shape == tuple(n) for p, n in zip(s.pixels, s.shape, strict=True))
            read += len(s)
        assert study.series or study.problems
    assert read > 150 and len({a for acts in done.values() for a in acts}) >= 8
    pixels.stop_apart()


@pytest.mark.slow
def test_damaged_studies_lose_no_row(tmp_path):
    "A hundred damaged studies graded by a run of the smallest size: 25 finite rows each, and no exit but 0."
    run, data = fuzz.smoke_run(tmp_path)
    count, records = fuzz.fuzz_predict(100, run, data, seed=2, batch=50)
    assert count['studies'] == 100 and not count['crashes'] and not count['hangs'] and not count['lost'], records
    assert all(not r['wrong'] for r in records) and count['rows by model'] >= 25


@pytest.mark.xdist_group('pipeline')
def test_a_hundred_damaged_studies_are_graded_by_mscan_predict(run, small_data):
    "The whole command on networks of the smoke run, in processes of its own; the whole figure is 200, `python -m benchmarks.fuzz --predict 200`."
    count, records = fuzz.fuzz_predict(100, run[0], small_data, seed=2, batch=50)
    assert count['studies'] == 100 and not (count['crashes'] or count['hangs'] or count['lost']), records
    assert not [r for r in records if r['wrong']] and count['rows by model'] > 100 and count['rows by prior'] > 100      # damage that costs rows, and studies that survive it
