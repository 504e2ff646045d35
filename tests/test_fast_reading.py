"Reading fast gives what reading slowly gives, and what has been read is not read again. No test of time: those are `python -m benchmarks.speed_decode` and `speed_prepare`. About 20 seconds."
import builtins
import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

ROOT = Path(__file__).resolve().parents[1]

from benchmarks import fuzz
from mscan import headers, heads, images, pixels, prepare, unchanged
from mscan.dicom import Series
from mscan.files import begun, whole_files
from mscan.headers import DicomError, file_bytes, parse, parse_head, plain_parse, value_of

from test_reading import put, slice_of

BUNDLED = Path(pydicom.__file__).parent / 'data' / 'test_files'


# --- headers -------------------------------------------------------------------------------------------------------

def by_pydicom(data, with_pixels=True):
    "The header without the short walk; None where there is none."
    real, headers.plain_parse = headers.plain_parse, lambda *args: None
    try: return parse(data, with_pixels)
    except DicomError: return None
    finally: headers.plain_parse = real


def by_walk(data, with_pixels=True):
    try: return plain_parse(data, with_pixels, headers.TAGS)
    except Exception: return None


def same(a, b):
    return all(dict(x._dict) == dict(y._dict) for x, y in ((a, b), (a.file_meta, b.file_meta))) and a.original_encoding == b.original_encoding and a.original_character_set == b.original_character_set


@pytest.fixture(scope='module')
def files(small_data): return [f.read_bytes() for s in sorted((small_data / 'test_images').glob('*/*'))[:3] for f in sorted(s.iterdir())[:4]]


def test_the_walk_over_a_plain_header_finds_what_pydicom_finds(files):
    names = [f for f in sorted(BUNDLED.glob('*.dcm')) if f.stat().st_size < 10 ** 6]
    walked = 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for data in [*files, *(f.read_bytes() for f in names)]:
            for with_pixels in (True, False):
                if (found := by_walk(data, with_pixels)) is None: continue
                assert same(found, by_pydicom(data, with_pixels))
                walked += 1
    assert walked > 2 * len(files) + 40 and all(by_walk(f) is not None for f in files)


def test_the_walk_over_a_damaged_header_finds_what_pydicom_finds_or_gives_up(files):
    sources, walked, left = [(str(k), f) for k, f in enumerate(files)] + [(n, (BUNDLED / f'{n}.dcm').read_bytes()) for n in ('MR_small', 'MR_small_RLE', 'MR_small_jp2klossless', 'examples_overlay')], 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for n in range(1200):
            kind, _, data = fuzz.damaged(5, n, sources)
            if kind == 'deflated': continue
            found = by_walk(data)
            walked, left = walked + (found is not None), left + (found is None)
            assert found is None or same(found, by_pydicom(data)), (n, kind)
    assert walked > 300 and left > 200


RAW = st.one_of(st.binary(max_size=8), st.sampled_from([b'1', b'-3 ', b'1.5', b'1.', b'.5', b'+2', b'1e3', b'1E-2 ', b'1\\2', b'0.1\\-.2\\3', b'1\\', b'\\1', b'1  ', b' 1', b'1_0', b'1e400', b'9' * 20, b'T2', b'T1 ', b'A\\B', b'MONOCHROME1', b'MONOCHROME2 ', b'1.2.840.10008\0', b'1.2', b'nan', b'0x1']),
                st.from_regex(r'[+-]?[0-9]{1,6}(\.[0-9]{0,6})?(e[+-]?[0-9])?(\\[0-9]{1,3}(\.[0-9])?){0,5} ?', fullmatch=True).map(str.encode), st.text(st.characters(codec='ascii'), max_size=6).map(str.encode))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(raw=RAW, element=st.sampled_from([('Rows', 'US'), ('InstanceNumber', 'IS'), ('EchoTime', 'DS'), ('ImagePositionPatient', 'DS'), ('PhotometricInterpretation', 'CS'), ('SeriesDescription', 'LO'), ('StudyInstanceUID', 'UI')]))
def test_a_value_read_directly_is_the_value_that_pydicom_gives(raw, element):
    keyword, vr = element
    made = lambda: Dataset({Tag(keyword): RawDataElement(Tag(keyword), vr, len(raw), raw, 0, False, True)})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: slow = made().get(keyword)
        except Exception as e: slow = type(e)
        try: fast = value_of(made(), keyword)
        except Exception as e: fast = type(e)
    plain = lambda v: list(v) if hasattr(v, 'append') else v
    assert plain(fast) == plain(slow) or fast != fast and slow != slow, (raw, fast, slow)
    if type(fast) in (int, float, list, str) and vr != 'UI': assert np.asarray(fast).tolist() == np.asarray(plain(slow)).tolist()


def test_a_header_longer_than_the_beginning_is_read_whole(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(headers, 'file_bytes', lambda file, most=0: read.append(most) or file_bytes(file, most))
    put(tmp_path, 'short.dcm', [0, 0, 0], number=4, shape=(200, 200))
    d = slice_of([0, 0, 0], number=5, shape=(200, 200))
    d.add_new(0x00091001, 'OB', bytes(2 * headers.BEGINNING))
    d.save_as(tmp_path / 'long.dcm', enforce_file_format=True)
    d = slice_of([0, 0, 0], number=6)
    d.save_as(tmp_path / 'cut.dcm', enforce_file_format=True)
    whole = (tmp_path / 'cut.dcm').read_bytes()
    (tmp_path / 'cut.dcm').write_bytes(whole[:whole.index(b'\x28\x00\x10\x00')])             # ends between two elements
    for name, number, times in (('short', 4, 1), ('long', 5, 2), ('cut', 6, 2)):
        read.clear()
        head = parse_head(tmp_path / f'{name}.dcm')
        assert same(head, parse((tmp_path / f'{name}.dcm').read_bytes(), False)) and head.InstanceNumber == number
        assert read == [headers.BEGINNING, 0][:times], name
    for name in ('short', 'long'): assert heads.read_head(tmp_path / f'{name}.dcm').rows == (200.,)
    assert 'Rows' in parse_head(tmp_path / 'long.dcm') and 'Rows' not in parse_head(tmp_path / 'cut.dcm')


# --- pixels --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype, stored', [('uint8', 8), ('int8', 8), ('uint16', 16), ('int16', 16), ('uint16', 12), ('int16', 12), ('uint8', 7)])
def test_rle_is_decoded_as_pydicom_decodes_it(dtype, stored):
    "Bits above those stored hold noise, rows are odd in number, one frame is cut into three fragments."
    from pydicom.encaps import encapsulate, generate_frames
    value = np.random.default_rng(1).integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, (31, 17)).astype(dtype)
    value[8:20] = value[8]
    d = slice_of([0, 0, 0], value=value, syntax=ExplicitVRLittleEndian)
    d.compress(RLELossless, encoding_plugin='pylibjpeg')
    facts = dict(rows=31, columns=17, number_of_frames=1, samples_per_pixel=1, bits_allocated=value.dtype.itemsize * 8, bits_stored=stored, pixel_representation=int(dtype[0] == 'i'), photometric_interpretation='MONOCHROME2', pixel_vr='OB')
    frame = next(generate_frames(d.PixelData, number_of_frames=1))
    for data in (d.PixelData, encapsulate([frame], fragments_per_frame=3)):
        slow, _ = get_decoder(RLELossless).as_array(data, decoding_plugin='pylibjpeg', allow_excess_frames=False, pixel_keyword='PixelData', **facts)
        fast = pixels.decode(RLELossless, data, facts)
        assert np.array_equal(fast, slow) and fast.dtype == slow.dtype == dtype and fast.flags.writeable
    if stored == value.dtype.itemsize * 8: assert np.array_equal(fast, value)


def slow_normalise(pixels_, low=.5, high=99.5):
    "The definition: sorted values, arithmetic on every pixel."
    together = np.sort(np.concatenate([p.ravel() for p in pixels_]))
    if together.dtype.kind == 'f': black, white = np.percentile(together, (low, high))
    else: black, white = (np.float64(together[min(int(np.floor(q / 100 * (len(together) - 1))), len(together) - 1)]) for q in (low, high))
    return [np.clip((p.astype(np.float32) - black) * (255 / max(white - black, 1e-6)) + .5, 0, 255).astype(np.uint8) for p in pixels_]


RANGES = dict(eight=('uint8', 0, 256), signed_eight=('int8', -128, 128), twelve=('uint16', 0, 4096), all_of_sixteen=('uint16', 0, 65536), far_from_zero=('uint16', 60000, 60100), signed=('int16', -32768, 32768), below_zero=('int16', -900, -100), white_is_low=('int32', -65535, 1), beyond=('int32', -2 ** 20, 2 ** 20), rescaled=('float32', -10, 10), flat=('uint16', 7, 8))


@pytest.mark.parametrize('opencv', (cv2.__version__, '4.10.0'))      # before 5 it looks up bytes alone
@pytest.mark.parametrize('kind', RANGES)
def test_greys_from_a_table_are_the_greys_of_the_arithmetic(kind, opencv, monkeypatch):
    dtype, low, high = RANGES[kind]
    monkeypatch.setattr(cv2, '__version__', opencv)
    if opencv.startswith('4'): monkeypatch.delattr(cv2, 'LUT')
    rng = np.random.default_rng(2)
    raw = [(rng.uniform(low, high, s) if dtype == 'float32' else rng.integers(low, high, s)).astype(dtype) for s in ((40, 50), (33, 21), (1, 1))]
    raw[1] = np.asfortranarray(raw[1])
    series = Series('1', '2', 'axial_t2', raw, *(np.zeros((3, n)) for n in (3, 6, 2)), np.array([p.shape for p in raw]), np.arange(3), np.zeros(3, int))
    for percentages in ((.5, 99.5), (0, 100), (2., 61.)):
        grey = images.normalise(series, *percentages)
        for a, b in zip(grey.pixels, slow_normalise(raw, *percentages), strict=True):
            if kind == 'beyond': assert np.abs(a.astype(int) - b).max() <= 1                  # too many values to count: percentiles between two of them
            else: assert np.array_equal(a, b) and a.dtype == np.uint8 and a.shape == b.shape


# --- not read again ------------------------------------------------------------------------------------------------

@pytest.fixture
def data(small_data, tmp_path): return shutil.copytree(small_data, tmp_path / 'data')


def prepared(data, out, **more):
    return prepare.prepare(data, out, **dict(validation=.2, test=.2, workers=1, progress=False) | more)


def products(out):
    "sha256 of each product; what notes times is left out."
    out, found = Path(out), {}
    for f in sorted(p for p in out.rglob('*') if p.is_file() and p.name not in ('index.json', 'settled.json')): found[f.relative_to(out).as_posix()] = hashlib.sha256(f.read_bytes()).hexdigest()
    return found


@pytest.fixture
def opened(monkeypatch):
    "The DICOM files that are opened from now on."
    real, seen = builtins.open, []
    def noting(file, *args, **kwargs):
        if str(file).endswith('.dcm'): seen.append(str(file))
        return real(file, *args, **kwargs)
    monkeypatch.setattr(builtins, 'open', noting)
    return seen


def test_a_second_run_opens_no_dicom_file_and_gives_the_same(data, tmp_path, opened):
    first = prepared(data, tmp_path / 'out')
    before = products(tmp_path / 'out')
    assert first.read == len(first.studies) == 8 and len(opened) >= len(first.slices)
    opened.clear()
    second = prepared(data, tmp_path / 'out')
    assert second.read == 0 and not opened and products(tmp_path / 'out') == before
    elsewhere = prepared(data, tmp_path / 'elsewhere')
    assert elsewhere.read == 8 and products(tmp_path / 'elsewhere') == before                     # from nothing
    opened.clear()
    other = prepared(data, tmp_path / 'out', seed=3, coords_csv=str(data / 'train_label_coordinates.csv'))
    assert other.read == 0 and not opened and not other.studies.part.equals(first.studies.part)


def test_only_what_changed_is_read_again(data, tmp_path, opened):
    first = prepared(data, tmp_path / 'out')
    a, b, c, d, e, *_ = first.studies.study_id
    folder = lambda s: next((data / f'{split}_images' / s) for split in ('train', 'test') if (data / f'{split}_images' / s).is_dir())
    file = next(folder(a).rglob('*.dcm'))
    file.write_bytes(file.read_bytes()[:500])                                                    # damaged
    next(folder(b).rglob('*.dcm')).unlink()                                                      # gone
    file = next(folder(c).rglob('*.dcm'))
    os.utime(file, ns=(0, os.stat(file).st_mtime_ns + 10 ** 9))                                  # written anew, perhaps
    table = pd.read_csv(data / 'train_series_descriptions.csv', dtype=str)
    table.loc[(table.study_id == d) & (table.series_description == 'Sagittal T1'), 'series_description'] = 'Sagittal T2/STIR'
    table.to_csv(data / 'train_series_descriptions.csv', index=False)                            # described otherwise
    (tmp_path / 'out' / 'cache' / f'{e}.npy').unlink()                                           # lost from the cache
    opened.clear()
    second = prepared(data, tmp_path / 'out')
    assert second.read == 5 and {Path(f).parents[1].name for f in opened} == {a, b, c, d, e}
    assert products(tmp_path / 'out') == products(prepared(data, tmp_path / 'fresh').dir)
    shutil.rmtree(folder(b))
    third = prepared(data, tmp_path / 'out')
    assert third.read == 0 and not (tmp_path / 'out' / 'cache' / f'{b}.npy').exists() and b not in set(third.studies.study_id)
    assert prepared(data, tmp_path / 'out', low=1.).read == 7


def test_other_code_reads_again(data, tmp_path, monkeypatch):
    prepared(data, tmp_path / 'out')
    monkeypatch.setattr(prepare, 'package_code', lambda: 'tables made otherwise')
    assert prepared(data, tmp_path / 'out').read == 0
    monkeypatch.setattr(prepare, 'package_code', lambda: 'a decoder of another version')
    monkeypatch.setattr(prepare, 'reading_code', lambda: 'a decoder of another version')
    assert prepared(data, tmp_path / 'out').read == 8


def test_what_reads_is_all_that_is_compared():
    "Every module that the reading of a study goes through is among READERS."
    import ast
    def imports(name):
        tree = ast.parse((ROOT / 'mscan' / f'{name}.py').read_text(encoding='utf-8'))
        return {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module}
    need, todo = set(), ['headers', 'pixels', 'dicom', 'contents', 'images', 'mirror', 'points', 'unchanged']
    while todo: need.add(name := todo.pop()); todo += imports(name) - need
    assert need | {'prepare'} == set(unchanged.READERS)


def test_a_study_that_could_not_be_read_for_a_passing_reason_is_read_again(data, tmp_path, monkeypatch):
    real, away = builtins.open, []
    def refusing(file, *args, **kwargs):
        if str(file).endswith('.dcm') and not away: away.append(str(file)); raise OSError(5, 'Input/output error', str(file))
        return real(file, *args, **kwargs)
    monkeypatch.setattr(builtins, 'open', refusing)
    first = prepared(data, tmp_path / 'out')
    assert any('Input/output error' in p for ps in first.problems.values() for p in ps)
    second = prepared(data, tmp_path / 'out')
    assert second.read == 1 and not any(second.problems.values()) and len(second.slices) == len(first.slices) + 1


@pytest.mark.parametrize('harm', ['index.json', 'index.parquet'])
def test_an_index_that_is_damaged_costs_a_reading_and_nothing_else(data, tmp_path, harm):
    prepared(data, tmp_path / 'out')
    before, file = products(tmp_path / 'out'), tmp_path / 'out' / 'cache' / harm
    file.write_bytes(file.read_bytes()[:-30])
    (tmp_path / 'out' / 'cache' / 'settled.json').write_text('{"key": ')
    assert prepared(data, tmp_path / 'out').read == 8 and products(tmp_path / 'out') == before


def test_with_nothing_to_do_nothing_is_done_and_a_missing_product_is_made_again(data, tmp_path, monkeypatch):
    prepared(data, tmp_path / 'out')
    before, real, calls = products(tmp_path / 'out'), prepare.write_tables, []
    monkeypatch.setattr(prepare, 'write_tables', lambda *args: calls.append(1) or real(*args))
    assert prepared(data, tmp_path / 'out').read == 0 and not calls
    table = (data / 'train.csv').read_bytes()
    for spoil in (lambda: (tmp_path / 'out' / 'points.parquet').unlink(), lambda: (tmp_path / 'out' / 'prior.csv').write_text('condition,level'), lambda: (data / 'train.csv').write_bytes(table + b'\n')):
        spoil()
        assert prepared(data, tmp_path / 'out').read == 0 and calls.pop() == 1
        assert products(tmp_path / 'out') == before or (data / 'train.csv').read_bytes() != table


def test_an_interrupted_reading_leaves_nothing_half(data, tmp_path, monkeypatch):
    "Killed at the fifth study, under other percentiles: what was overwritten is read again, whichever percentiles come next."
    prepared(data, tmp_path / 'out')
    before, real, n = products(tmp_path / 'out'), prepare.cache_study, [0]
    def dies(job):
        n[0] += 1
        if n[0] == 5: raise KeyboardInterrupt
        return real(job)
    monkeypatch.setattr(prepare, 'cache_study', dies)
    with pytest.raises(KeyboardInterrupt): prepared(data, tmp_path / 'out', high=98.)
    monkeypatch.setattr(prepare, 'cache_study', real)
    assert prepared(data, tmp_path / 'out').read == 4 and products(tmp_path / 'out') == before


def test_the_largest_studies_are_read_first_and_stand_in_their_order(data, tmp_path, monkeypatch):
    real, seen = prepare.cache_study, []
    monkeypatch.setattr(prepare, 'cache_study', lambda job: seen.append(job[2]) or real(job))
    tables = prepared(data, tmp_path / 'out')
    sizes = {p.name: sum(f.stat().st_size for f in p.rglob('*.dcm')) for p in (*data.glob('train_images/*'), *data.glob('test_images/*'))}
    assert len(set(sizes.values())) > 3 and seen == sorted(seen, key=lambda s: -sizes[s]) and len(seen) == len(sizes) == 8
    assert list(tables.studies.study_id) != seen and list(tables.slices.study_id.drop_duplicates()) == list(tables.studies.study_id)


@pytest.mark.parametrize('system', ('as it is', 'refuses', 'has no such call'))
def test_a_file_that_the_disk_has_begun_with_is_as_whole_as_before(tmp_path, monkeypatch, system):
    def refuses(*args): raise OSError(22, 'Invalid argument')
    if system == 'refuses': monkeypatch.setattr(os, 'posix_fadvise', refuses, raising=False)
    if system == 'has no such call': monkeypatch.delattr(os, 'posix_fadvise', raising=False)
    content = os.urandom(3_000_001)
    with whole_files(tmp_path / 'x', lasting=False) as (half,): half.write_bytes(content)
    begun(tmp_path / 'x')
    assert (tmp_path / 'x').read_bytes() == content and os.listdir(tmp_path) == ['x']


def test_without_times_of_change_names_and_sizes_decide(data, monkeypatch):
    folder = next((data / 'train_images').iterdir())
    file, before = next(folder.rglob('*.dcm')), unchanged.listing(folder)
    os.utime(file, ns=(0, 0))
    assert unchanged.listing(folder) != before
    monkeypatch.setenv('MSCAN_DATA_TIMES', '0')
    assert unchanged.listing(folder) == [(n, kind, size, 0) for n, kind, size, _ in before]


def test_the_listing_follows_what_the_reader_follows_and_ends(tmp_path):
    (tmp_path / '1' / 'a' / 'b').mkdir(parents=True)
    (tmp_path / '1' / 'a' / 'b' / 'x').write_bytes(b'1')
    (tmp_path / '1' / 'round').symlink_to(tmp_path / '1')
    (tmp_path / '1' / 'nowhere').symlink_to(tmp_path / 'none')
    (tmp_path / 'far').mkdir(); (tmp_path / 'far' / 'y').write_bytes(b'22')
    (tmp_path / '1' / 'link').symlink_to(tmp_path / 'far')
    rows = {r[0]: r for r in unchanged.listing(tmp_path / '1')}
    assert rows[os.path.join('a', 'b', 'x')][2] == 1 and rows[os.path.join('link', 'y')][2] == 2 and rows['nowhere'][1] == -1 and len(rows) < 10
    (tmp_path / 'far' / 'y').write_bytes(b'333')
    assert {r[0]: r for r in unchanged.listing(tmp_path / '1')} != rows


def test_the_stage_keeps_its_cache_and_nothing_else(data, tmp_path):
    "The run part of 10_prepare as papermill runs it, twice: with another seed no study is read, and what the first left besides its cache is gone."
    from mscan.runs import notebook_cells, read_manifest
    cells = [(text, tags) for text, tags in notebook_cells(ROOT / 'nbs' / '10_prepare.ipynb') if text.startswith('#| eval: false')]
    assert 'parameters' in cells[0][1]
    def run(seed):
        space = {k: getattr(prepare, k) for k in dir(prepare)} | dict(plt=__import__('matplotlib.pyplot').pyplot)
        exec(cells[0][0], space)
        space |= dict(data_dir=str(data), run_dir=str(tmp_path / 'run'), seed=seed, workers=1)
        for text, _ in cells[1:]: exec(text, space)
        return read_manifest(tmp_path / 'run', '10_prepare')
    first = run(0)
    (first.dir / 'left').write_text('behind')
    second = run(1)
    assert first.metrics['studies_read'] == 8 and second.metrics['studies_read'] == 0 and not (first.dir / 'left').exists() and not second.changed()
    assert json.loads((second.dir / 'quality.json').read_text())['studies']


def test_many_studies_need_no_more_memory_than_one(data, tmp_path):
    "One worker's peak after all studies once and after all of them five times more."
    code = f"""import resource, sys
from pathlib import Path
from mscan import prepare
tables = prepare.read_tables({str(data)!r})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def all_of_them():
    for s in tables.studies: prepare.cache_study(({str(data)!r}, 'train', s, tables.descriptions, {str(tmp_path)!r}, .5, 99.5))
start = peak(); all_of_them(); once = peak()
for _ in range(5): all_of_them()
print(start, once, peak())"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)))
    start, once, often = map(float, done.stdout.split())
    assert often - once < 10 and once - start < 100, (done.stdout, done.stderr[-300:])
