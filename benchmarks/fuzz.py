"""Does any file stop the reader? Files are damaged in every way that is known and read in a child process, under a limit of time and of memory.

Sources: slices of a phantom study and pydicom's bundled test files (every transfer syntax it ships). Each damaged file lies in a folder beside two sound slices and is read as a series: what must hold is
that the series comes back, that every file is either used or left out with a reason, and that the sound ones are used. `--predict N` damages whole studies and grades them with a run (`--run_dir`, else a
smoke run is made): 25 finite rows a study must come back. Case n depends on the seed and on n alone: `--only n` repeats it."""
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit

from mscan.dicom import MAX_BYTES, read_series
from mscan.pixels import PLUGINS, stop_apart

from ._common import ROOT, Report, parser

BUNDLED = Path(pydicom.__file__).parent / 'data' / 'test_files'
START_SECONDS = 300    # for the child to come up on a busy machine
CASE_SECONDS = 90      # for one damaged file; the reader itself gives a decoder 20
STUDY_SECONDS = 60     # for one damaged study
MEMORY = 2 ** 32       # bytes of address space of the child
SOUND = ('1.dcm', '2.dcm')
HEADER = 2 ** 16      # bytes within which elements are looked for
NUMBERS = [b'', b' ', b'0', b'-1', b'1e99999999', b'9' * 40, b'nan', b'inf', b'-inf', b'1e400', b'1e-300', b'65535', b'2147483648', b'\\\\\\\\', b'1\\2\\3\\4\\5\\6\\7', b'\xff\xfe', b'Z\xc3\xbcrich', b'../../etc', b'<b>x</b>', b'\x00' * 64, b'7' * 5000]
TAGS = [(0x0008, 0x0005), (0x0018, 0x0081), (0x0020, 0x0013), (0x0020, 0x0032), (0x0020, 0x0037), (0x0028, 0x0002), (0x0028, 0x0004), (0x0028, 0x0008), (0x0028, 0x0010), (0x0028, 0x0011), (0x0028, 0x0030),
        (0x0028, 0x0100), (0x0028, 0x0101), (0x0028, 0x0102), (0x0028, 0x0103), (0x0028, 0x1052), (0x0028, 0x1053), (0x7FE0, 0x0010), (0x0002, 0x0010), (0x0002, 0x0000)]


# --- damage --------------------------------------------------------------------------------------------------------

def flip_bits(rng, data, low=0, high=None):
    "One to 64 bits anywhere."
    data, high = bytearray(data), min(high or len(data), len(data))
    for at in rng.integers(low, max(high, low + 1), 2 ** int(rng.integers(0, 7))):
        if at < len(data): data[at] ^= 1 << int(rng.integers(8))
    return bytes(data)


def flip_header(rng, data):
    "Bits of the first two kilobytes."
    return flip_bits(rng, data, 128, 2048)


def flip_pixels(rng, data):
    "Bits of the pixel data, the first kilobyte of them most: that is where encodings keep their structure."
    at = max(data.find(b'\xe0\x7f\x10\x00'), 0)
    return flip_bits(rng, data, at, at + 1024 if rng.random() < .6 else None)


def truncate(rng, data):
    "Only the first part is there."
    return data[:int(rng.integers(0, len(data)))]


def overwrite(rng, data):
    "A run of bytes is random, zero or 255."
    n, at = 2 ** int(rng.integers(0, 10)), int(rng.integers(len(data)))
    run = rng.integers(0, 256, n, dtype=np.uint8).tobytes() if rng.random() < .5 else bytes([int(rng.choice([0, 255]))]) * n
    return data[:at] + run + data[at + n:]


def cut_out(rng, data):
    "A piece is missing, or stands twice."
    a, n = int(rng.integers(len(data))), int(rng.integers(1, 600))
    return data[:a] + data[a + n:] if rng.random() < .5 else data[:a + n] + data[a:]


def elements(data):
    "Where known elements stand: list of (tag's place, place of the value, length) in a little-endian file with explicit types; others as far as they look like it."
    found = []
    for group, element in TAGS:
        tag = group.to_bytes(2, 'little') + element.to_bytes(2, 'little')
        at = next((m.start() for m in re.finditer(re.escape(tag) + b'[A-Z][A-Z]', data[:HEADER])), data.find(tag, 128, HEADER))
        if at < 0 or at + 12 > len(data): continue
        long = data[at + 4:at + 6] in (b'OB', b'OW', b'SQ', b'UN', b'UT')
        value = at + (12 if long else 8)
        found.append((at, value, int.from_bytes(data[at + (8 if long else 6):value], 'little')))
    return found


def pick(rng, data):
    places = elements(data)
    return places[int(rng.integers(len(places)))] if places else None


def absurd_value(rng, data):
    "The value of a known element becomes something that a program may choke on, of the right length field."
    if (place := pick(rng, data)) is None: return flip_bits(rng, data)
    at, value, n = place
    if rng.random() < .4: new = rng.choice(np.array([0, 1, 2, 3, 4096, 4097, 32768, 65535], np.uint16), max(1, min(n // 2, 6))).astype('<u2').tobytes()
    else: new = NUMBERS[int(rng.integers(len(NUMBERS)))]
    new += b' ' * (len(new) % 2)
    if value - at == 8: return data[:at + 6] + len(new).to_bytes(2, 'little') + new + data[value + n:]
    return data[:at + 8] + len(new).to_bytes(4, 'little') + new + data[value + min(n, len(data)):]


def absurd_length(rng, data):
    "The length of a known element is wrong, or undefined."
    if (place := pick(rng, data)) is None: return flip_bits(rng, data)
    at, value, _ = place
    size = 4 if value - at == 12 else 2
    n = [0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size) - 2, 2 ** (8 * size - 1), int(rng.integers(2 ** (8 * size)))][int(rng.integers(6))]
    return data[:value - size] + n.to_bytes(size, 'little') + data[value:]


def absurd_type(rng, data):
    "A known element says that it is of another type."
    if (place := pick(rng, data)) is None: return flip_bits(rng, data)
    kinds = [b'IS', b'DS', b'SQ', b'UN', b'OB', b'OW', b'UT', b'AT', b'US', b'FD', b'UL', b'PN', b'XX', b'SV', b'\x00\x00']
    return data[:place[0] + 4] + kinds[int(rng.integers(len(kinds)))] + data[place[0] + 6:]


def swap_tags(rng, data):
    "Two known elements have changed their tags."
    places = elements(data)
    if len(places) < 2: return flip_bits(rng, data)
    a, b = (places[int(i)][0] for i in rng.choice(len(places), 2, replace=False))
    data = bytearray(data)
    data[a:a + 4], data[b:b + 4] = data[b:b + 4], data[a:a + 4]
    return bytes(data)


def other_syntax(rng, data):
    "The file says that its pixels are encoded in another way."
    places = [p for p in elements(data) if data[p[0]:p[0] + 4] == b'\x02\x00\x10\x00']
    if not places: return flip_bits(rng, data)
    at, value, n = places[0]
    uids = [*PLUGINS, '1.2.840.10008.1.2.4.51', '1.2.840.10008.1.2.4.201', '1.2.840.10008.1.2.4.100', '1.2.3', '']
    new = str(uids[int(rng.integers(len(uids)))]).encode()
    new += b'\x00' * (len(new) % 2)
    return data[:at + 6] + len(new).to_bytes(2, 'little') + new + data[value + n:]


def deflated(rng, data):
    "What follows the meta group is deflated, sometimes after a megabyte of zeros and more, and then damaged."
    places = [p for p in elements(data) if data[p[0]:p[0] + 4] == b'\x02\x00\x10\x00']
    if not places: return flip_bits(rng, data)
    at, value, n = places[0]
    uid = DeflatedExplicitVRLittleEndian.encode()
    rest = data[value + n + ((found := re.search(rb'\x08\x00.\x00[A-Z][A-Z]', data[value + n:], re.S)) is not None and found.start()):] + bytes(int(rng.choice([0, 10 ** 6, 2 * 10 ** 8], p=[.6, .39, .01])))
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = packer.compress(rest) + packer.flush()
    data = data[:at + 6] + len(uid).to_bytes(2, 'little') + uid + packed
    return data if rng.random() < .5 else flip_bits(rng, data, value)


def splice(rng, data, other=b''):
    "The header of one file, the pixels of another."
    a, b = data.find(b'\xe0\x7f\x10\x00'), other.find(b'\xe0\x7f\x10\x00')
    return data[:a] + other[b:] if a > 0 and b > 0 else data + other


DAMAGE = [flip_bits, flip_header, flip_pixels, truncate, overwrite, cut_out, absurd_value, absurd_length, absurd_type, swap_tags, other_syntax, deflated, splice]


def damaged(
    seed: int, n: int, sources,  # (name, bytes) of whole files
):                               # name of the damage, name of the source, bytes
    "Case n: a file damaged in one way, or in two."
    rng = np.random.default_rng([seed, n])
    name, data = sources[int(rng.integers(len(sources)))]
    act = DAMAGE[n % len(DAMAGE)]
    extra = dict(other=sources[int(rng.integers(len(sources)))][1]) if act is splice else {}
    data = act(rng, data, **extra)
    if len(data) and rng.random() < .25: data = DAMAGE[int(rng.integers(len(DAMAGE) - 1))](rng, data)
    return act.__name__, name, data


# --- the reader ----------------------------------------------------------------------------------------------------

def phantom_files(folder, seed):
    "A small phantom study on disk: list of series' folders."
    from mscan.phantom import make_phantom
    make_phantom(folder, studies=0, test_studies=1, seed=seed, size='small', workers=1, progress=False)
    return sorted((folder / 'test_images').glob('*/*'))


def placed(dataset, syntax=None, frames=None) -> bytes:
    "A grey picture as a slice among the sound ones: with a place and a plane of its own, so that its pixels are decoded."
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient, dataset.PixelSpacing = [0, 0, -500], [1, 0, 0, 0, 1, 0], [1, 1]
    if frames: dataset.file_meta.TransferSyntaxUID, dataset.PixelData = syntax, encapsulate(frames)
    dataset['PixelData'].VR = 'OW' if not dataset.file_meta.TransferSyntaxUID.is_compressed or dataset.file_meta.TransferSyntaxUID.is_deflated else 'OB'
    dataset.save_as(out := BytesIO())
    return out.getvalue()


def jpeg_baseline() -> bytes:
    "A slice of 8 bits in JPEG baseline, by OpenCV."
    import cv2
    d = pydicom.dcmread(BUNDLED / 'MR_small.dcm')
    grey = (d.pixel_array // 9).astype(np.uint8)
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 8, 8, 7, 0
    return placed(d, JPEGBaseline8Bit, [cv2.imencode('.jpg', grey, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()])


def jpeg_lossless(kind='JPEGLosslessProcess14_1') -> bytes:
    "A slice of 16 bits in lossless JPEG, by GDCM."
    import gdcm
    with tempfile.TemporaryDirectory() as folder:
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(BUNDLED / 'MR_small.dcm')); reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, kind)))
        change.SetInput(reader.GetImage()); change.Change()
        writer.SetFileName(str(Path(folder) / 'x.dcm')); writer.SetFile(reader.GetFile()); writer.SetImage(change.GetOutput()); writer.Write()
        return placed(pydicom.dcmread(Path(folder) / 'x.dcm'))


GREY = ('MR_small', 'MR_small_RLE', 'MR_small_bigendian', 'MR_small_implicit', 'MR_small_jp2klossless', 'MR_small_jpeg_ls_lossless', 'JPEG2000', 'JPEGLSNearLossless_08', 'JPEGLSNearLossless_16', 'image_dfl')


def sources_of(series, seed):
    "(name, bytes): slices of the phantom's series, grey pictures in every encoding that is read, and pydicom's files as they are."
    rng = np.random.default_rng(seed)
    slices = [f for s in series for f in sorted(s.iterdir())]
    chosen = [slices[int(i)] for i in rng.choice(len(slices), min(8, len(slices)), replace=False)]
    encoded = [(f'{n}, placed', placed(pydicom.dcmread(BUNDLED / f'{n}.dcm'))) for n in GREY] + [('JPEG baseline', jpeg_baseline()), ('JPEG lossless', jpeg_lossless())]
    bundled = sorted(f for f in BUNDLED.glob('*.dcm') if f.stat().st_size < 60_000)
    return [(f'phantom {f.parent.name}/{f.name}', f.read_bytes()) for f in chosen for _ in range(8)] + encoded * 6 + [(f.name, f.read_bytes()) for f in bundled]


def check_case(folder):
    "Read one series with a damaged file in it; what happened, or an AssertionError where something was lost."
    series = read_series(folder, '1', '2', 'axial_t2')
    reasons = dict(series.left_out)
    files = {p.name for p in folder.iterdir()}
    assert set(series.files) | set(reasons) == files and len(series) + len(reasons) == len(files), f'{files - set(series.files) - set(reasons)} vanished'
    for name in SOUND: assert name in series.files or reasons[name] == 'lies where x.dcm lies', f'{name} was sound: {reasons.get(name)}'
    assert len(series.pixels) == len(series) and all(p.shape == tuple(s) and p.ndim == 2 and np.isfinite(p).all() for p, s in zip(series.pixels, series.shape, strict=True)), 'pixels and shapes differ'
    assert all(np.isfinite(a).all() for a in (series.image_position, series.image_orientation, series.pixel_spacing)) and series.instance_number.dtype.kind == 'i', 'geometry is not finite'
    return dict(read='x.dcm' in series.files, reason=reasons.get('x.dcm', ''))


def peak_mib() -> int:
    "The most memory that this program has held. `ru_maxrss` would be no less than what the process was before it became this program: a test's process of 2 GiB, say."
    return int(re.search(r'VmHWM:\s*(\d+) kB', Path('/proc/self/status').read_text())[1]) // 1024


def child(folder, seed, cases: range):
    "In the child: read the cases one after the other and say a line before and after each."
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    folder = Path(folder)
    sources = [(name, (folder / 'sources' / file).read_bytes()) for name, file in json.loads((folder / 'sources.json').read_text())]
    say = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    say.write(json.dumps(dict(peak_mib=0)) + '\n'); say.flush()
    for n in cases:
        kind, source, data = damaged(seed, n, sources)
        (folder / 'series' / 'x.dcm').write_bytes(data)
        say.write(json.dumps(dict(begin=n, kind=kind, source=source)) + '\n'); say.flush()
        start = time.perf_counter()
        try: found = check_case(folder / 'series')
        except BaseException as e: found = dict(error=f'{type(e).__name__}: {e}'[:300])
        say.write(json.dumps(dict(end=n, seconds=round(time.perf_counter() - start, 3), **found)) + '\n'); say.flush()
    say.write(json.dumps(dict(peak_mib=peak_mib())) + '\n'); say.flush()
    stop_apart()


def lines_of(process, seconds):
    "Lines that a process says; ends at its end, raises TimeoutError after `seconds` of silence, the time before its first word apart."
    pending, wait = b'', START_SECONDS
    while True:
        if not select.select([process.stdout], [], [], wait)[0]: raise TimeoutError
        wait = seconds
        if not (piece := os.read(process.stdout.fileno(), 65536)): return
        *whole, pending = (pending + piece).split(b'\n')
        yield from map(json.loads, whole)


CHILD = 'import sys, json; from benchmarks.fuzz import child; folder, seed, cases = json.loads(sys.argv[1]); child(folder, seed, range(*cases))'


def run_child(folder, seed, cases, code=CHILD, seconds=CASE_SECONDS, progress=lambda n: None):
    "Read all cases, with a new child after each that crashed or hung: list of records, peak memory in MiB."
    records, left, peak = [], cases, 0
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]), OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')
    while left:
        process, now, fate = subprocess.Popen([sys.executable, '-c', code, json.dumps([str(folder), seed, [left.start, left.stop, left.step]])], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=env), None, 'crash'
        try:
            for line in lines_of(process, seconds):
                if 'begin' in line: now = line
                elif 'end' in line:
                    records.append(dict(n=now['begin'], kind=now['kind'], source=now['source'], fate='error' if 'error' in line else 'read' if line['read'] else 'left out', reason=line.get('error', line.get('reason')), seconds=line['seconds']))
                    left, now = left[1:], None
                    progress(len(records))
                else: peak = max(peak, line['peak_mib'])
        except TimeoutError: fate = 'hang'
        process.kill()
        process.wait()
        process.stdout.close()
        if left:
            now = now or dict(begin=left[0], kind='', source='')
            records.append(dict(n=now['begin'], kind=now['kind'], source=now['source'], fate=fate, reason=f'exit {process.returncode}', seconds=0))
            left = left[1:]
    return records, peak


def prepare_folder(folder, seed):
    "Sources, and a series of two sound slices that the damaged file joins."
    series = phantom_files(folder / 'data', seed)
    axial = next(s for s in series if read_series(s, pixels=False).view == 'axial_t2')
    (folder / 'series').mkdir(); (folder / 'sources').mkdir()
    for file, name in zip(sorted(axial.iterdir()), SOUND): shutil.copy(file, folder / 'series' / name)
    names = []
    for k, (name, data) in enumerate(sources_of(series, seed)):
        (folder / 'sources' / str(k)).write_bytes(data)
        names.append((name, str(k)))
    (folder / 'sources.json').write_text(json.dumps(names))


def fuzz_reader(inputs, seed=0, first=0, workers=1, **more):
    "Damage and read: list of records in order, peak memory in MiB."
    from concurrent.futures import ThreadPoolExecutor
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare_folder(folder, seed)
        def part(k):
            mine = folder if k == 0 else folder / f'w{k}'
            if k:
                for name in ('sources', 'series'): shutil.copytree(folder / name, mine / name, ignore=shutil.ignore_patterns('x.dcm'))
                shutil.copy(folder / 'sources.json', mine)
            return run_child(mine, seed, range(first + k, first + inputs, workers), **more)
        with ThreadPoolExecutor(workers) as pool: parts = list(pool.map(part, range(workers)))
    return sorted((r for records, _ in parts for r in records), key=lambda r: r['n']), max(p for _, p in parts)


# --- studies -------------------------------------------------------------------------------------------------------

def damage_study(rng, folder, sources):
    "Spoil a study of the competition's layout in one to three ways; what was done."
    def files(): return [f for f in sorted(folder.rglob('*')) if f.is_file()]
    def some(k): return [files()[int(i)] for i in rng.choice(len(files()), min(k, len(files())), replace=False)] if files() else []
    def bytes_of_some():
        for f in some(int(rng.choice([1, 3, 10, 1000]))):
            if len(data := f.read_bytes()): f.write_bytes(DAMAGE[int(rng.integers(len(DAMAGE) - 1))](rng, data))
    def strangers():
        for f in some(3): f.with_name(f'stranger{f.stem}').write_bytes(sources[int(rng.integers(len(sources)))][1])
    def no_series(): shutil.rmtree(sorted(folder.iterdir())[int(rng.integers(len(list(folder.iterdir()))))])
    def swapped_files():
        two = some(2)
        if len(two) == 2: a, b = (f.read_bytes() for f in two); two[0].write_bytes(b); two[1].write_bytes(a)
    def renamed():
        for k, f in enumerate(files()): f.rename(f.with_name(f'Schicht \u00fc {(k * 7919) % 100003}'))
    def nested():
        for s in list(folder.iterdir()): (folder / 'deeper').mkdir(exist_ok=True); s.rename(folder / 'deeper' / s.name)
    def twice():
        for f in some(5): shutil.copy(f, f.with_name(f'copy_{f.name}'))
    def links():
        for k, f in enumerate(some(4)): f.with_name(f'link{k}').symlink_to(f if k % 2 else 'nowhere')
    def emptied():
        for f in some(int(rng.choice([1, 5, 1000]))): f.write_bytes(b'')
    acts = [bytes_of_some, bytes_of_some, bytes_of_some, strangers, no_series, swapped_files, renamed, nested, twice, links, emptied]
    done = []
    for i in rng.choice(len(acts), int(rng.integers(1, 4)), replace=False):
        if any(folder.iterdir()): acts[int(i)](); done.append(acts[int(i)].__name__)
    return done


def damaged_studies(
    folder, source,   # folder to make, folder of a phantom with test studies
    numbers, seed: int, sources,
) -> dict:            # study id -> what was done to it
    "A competition folder of damaged studies."
    whole, done = sorted((source / 'test_images').iterdir()), {}
    for n in numbers:
        rng = np.random.default_rng([seed, n])
        target = folder / 'test_images' / str(9000 + n)
        shutil.copytree(whole[n % len(whole)], target)
        done[target.name] = damage_study(rng, target, sources)
    return done


PREDICT = "import sys; from mscan.submission import predict; predict(*sys.argv[1:4], device='cpu', progress=False)"


def rows_of(out, studies):
    "Problems of a submission: list of sentences."
    import pandas as pd

    from mscan.rsna import row_ids
    if not (Path(out) / 'submission.csv').exists(): return ['no submission.csv']
    table = pd.read_csv(Path(out) / 'submission.csv').set_index('row_id')
    lost = set(row_ids(sorted(studies))) - set(table.index)
    p = table.to_numpy(float)
    return ([f'{len(lost)} rows lost'] if lost else []) + ([] if np.isfinite(p).all() and np.allclose(p.sum(1), 1, atol=1e-6) else ['rows that are no probabilities'])


def fuzz_predict(studies, run_dir, source, seed=0, batch=20):
    "Grade damaged studies by `mscan.submission.predict` in a child, `batch` at a time: counts, and a record a batch."
    bundled = [(f.name, f.read_bytes()) for f in sorted(BUNDLED.glob('*.dcm')) if f.stat().st_size < 60_000]
    count, records = Counter(), []
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]), OMP_NUM_THREADS='1')
    for start in range(0, studies, batch):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            done = damaged_studies(folder / 'data', source, range(start, min(start + batch, studies)), seed, bundled)
            try: code, said = (r := subprocess.run([sys.executable, '-c', PREDICT, str(run_dir), str(folder / 'data'), str(folder / 'out')], capture_output=True, text=True, env=env, timeout=60 + STUDY_SECONDS * len(done))).returncode, r.stderr[-400:]
            except subprocess.TimeoutExpired: code, said = 'hang', ''
            wrong = rows_of(folder / 'out', done)
            source_of = Counter()
            if not wrong:
                import pandas as pd
                source_of = Counter(pd.read_csv(folder / 'out' / 'provenance.csv', keep_default_na=False)['source'])
        count.update(studies=len(done), hangs=code == 'hang', crashes=code not in (0, 'hang'), lost=sum('lost' in w or 'no sub' in w for w in wrong), **{f'rows by {k}': v for k, v in source_of.items()})
        records.append(dict(first=start, code=code, wrong=wrong, said=said if code else '', acts=dict(Counter(a for d in done.values() for a in d))))
        print(f'{count["studies"]} studies: {dict(count)}', file=sys.stderr, flush=True)
    return count, records


def smoke_run(folder):
    "A run of the smallest size and the phantom it was trained on, for who has none."
    from mscan.phantom import make_phantom
    make_phantom(folder / 'data', studies=6, test_studies=4, seed=11, size='small', workers=2, progress=False)
    subprocess.run([sys.executable, '-c', 'from mscan.runner import mscan_run; mscan_run()', '--data_dir', str(folder / 'data'), '--run_dir', str(folder / 'run'), '--preset', 'smoke'], check=True, cwd=ROOT,
                   env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path])))
    return folder / 'run', folder / 'data'


# --- the report ----------------------------------------------------------------------------------------------------

def summary(records):
    "Lines of a table: damage, inputs, read, left out, errors, crashes, hangs."
    fates = ('read', 'left out', 'error', 'crash', 'hang')
    count = {k: Counter(r['fate'] for r in records if r['kind'] == k) for k in sorted({r['kind'] for r in records})}
    return [f'{"damage":<14}' + ''.join(f'{f:>10}' for f in ('inputs', *fates))] + [f'{k:<14}{sum(c.values()):>10}' + ''.join(f'{c[f]:>10}' for f in fates) for k, c in count.items()]


def main(argv=None):
    p = parser('fuzz', __doc__.split('\n')[0], 4)
    p.add_argument('--inputs', type=int, default=20000, help='damaged files for the reader')
    p.add_argument('--predict', type=int, default=0, help='damaged studies to grade')
    p.add_argument('--run_dir', type=Path, help='a finished run for --predict; default: a smoke run is made')
    p.add_argument('--only', type=int, help='read this one case and print it')
    args = p.parse_args(argv)
    if args.only is not None:
        print(json.dumps(fuzz_reader(1, args.seed, args.only)[0], indent=1))
        return 0
    step = max(1, args.inputs // 20)
    records, peak = fuzz_reader(args.inputs, args.seed, workers=args.workers, progress=lambda n: n % step or print(f'{n} read', file=sys.stderr, flush=True)) if args.inputs else ([], 0)
    report = Report('fuzz', args, f'{args.inputs} damaged files: a small phantom study and {len(list(BUNDLED.glob("*.dcm")))} files of pydicom {pydicom.__version__}, seed {args.seed}')
    fate = Counter(r['fate'] for r in records)
    for name, value in (('crash', 'crashes'), ('hang', 'hangs'), ('error', 'errors (a file lost, or an exception)')):
        if args.inputs: report.add(f'reader: {value}', fate[name], '0', fate[name] == 0)
    for name in ('read', 'left out'):
        if args.inputs: report.add(f'reader: {name}', fate[name])
    if records: report.add('reader: seconds, slowest', max(r['seconds'] for r in records)); report.add('reader: memory, peak, MiB', peak, f'<= {MAX_BYTES // 2 ** 20}', peak <= MAX_BYTES // 2 ** 20)
    died = [r for r in records if (r['reason'] or '').startswith('the decoder')]
    report.notes += summary(records) + [f'decoder crashed or was too slow, kept from the reader: {len(died)}'] + [f'{n} x {reason}' for reason, n in Counter(short(r['reason']) for r in records if r['fate'] == 'left out').most_common(25)]
    report.notes += [f'case {r["n"]} ({r["kind"]} of {r["source"]}): {r["fate"]}, {r["reason"]}' for r in records if r['fate'] in ('crash', 'hang', 'error')][:20]
    if args.predict:
        with tempfile.TemporaryDirectory() as folder:
            if args.run_dir: run_dir, source = args.run_dir.absolute(), Path(folder) / 'data'; phantom_studies(source, args)
            else: run_dir, source = smoke_run(Path(folder))
            count, batches = fuzz_predict(args.predict, run_dir, source, args.seed)
        for name in ('crashes', 'hangs', 'lost'): report.add(f'predict: {name}', count[name], '0', count[name] == 0, data=f'{args.predict} damaged studies', batches=batches if name == 'lost' else None)
        report.notes += [f'{k}: {v}' for k, v in sorted(count.items()) if k.startswith('rows by')]
    return report.finish()


def phantom_studies(folder, args):
    from mscan.phantom import make_phantom
    make_phantom(folder, studies=0, test_studies=args.studies, seed=args.seed, size=args.size, workers=args.workers, progress=False)


def short(reason):
    "A reason without its figures, to be counted."
    return re.sub(r'[-+]?[0-9][0-9.e+-]*', '#', reason)[:90]


if __name__ == '__main__': sys.exit(main())
