"""How fast is a file's picture read, encoding by encoding, beside pydicom's own way?

The same phantom slices are written in every encoding that `mscan.pixels` reads. A file's bytes are in memory; timed is the way from bytes to pixels: `picture(parse(data))` here, `dcmread(data).pixel_array` there, in turn,
slice by slice. pydicom decodes RLE with pylibjpeg, and once with its own decoder in Python; JPEG with GDCM, in this process, where `mscan.pixels` keeps GDCM in a process of its own."""
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pydicom
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGBaseline8Bit

from mscan.phantom import phantom_study, write_study
from mscan.pixels import parse, picture, stop_apart

from ._common import Report, panels, parser

RLE_AT_MOST, RLE_GAIN = 1., 5.   # ours by pydicom's with the same decoder; ours by pydicom's own decoder
BY_GDCM = dict(jpeg_lossless='JPEGLosslessProcess14_1', jpeg_ls='JPEGLSLossless', jpeg_2000='JPEG2000Lossless')


def written(dataset) -> bytes:
    dataset.save_as(out := BytesIO(), enforce_file_format=True)
    return out.getvalue()


def uncompressed(dataset, syntax, pixels):
    "The slice in a syntax without compression of pixels."
    meta, dataset = dataset.file_meta, pydicom.Dataset({e.tag: e for e in dataset})             # that knows nothing of the file's byte order
    dataset.file_meta, meta.TransferSyntaxUID = meta, syntax
    dataset.PixelData = pixels.astype('>u2' if syntax == ExplicitVRBigEndian else '<u2').tobytes()
    dataset['PixelData'].VR = 'OW'
    return written(dataset)


def by_gdcm(file, kind):
    "The slice in an encoding that GDCM writes."
    import gdcm
    with tempfile.TemporaryDirectory() as folder:
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(file)); reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, kind)))
        change.SetInput(reader.GetImage())
        if not change.Change(): raise RuntimeError(f'GDCM does not write {kind}')
        writer.SetFileName(str(Path(folder) / 'x.dcm')); writer.SetFile(reader.GetFile()); writer.SetImage(change.GetOutput()); writer.Write()
        return (Path(folder) / 'x.dcm').read_bytes()


def encodings(file) -> dict:  # name -> (bytes, pydicom's decoder)
    "One slice in every encoding."
    fresh, pixels = lambda: pydicom.dcmread(file), pydicom.dcmread(file).pixel_array
    found = {'RLE': (Path(file).read_bytes(), 'pylibjpeg'), "RLE, pydicom's own decoder": (Path(file).read_bytes(), 'pydicom')}
    for name, syntax in (('explicit', ExplicitVRLittleEndian), ('implicit', ImplicitVRLittleEndian), ('big endian', ExplicitVRBigEndian), ('deflated', DeflatedExplicitVRLittleEndian)):
        found[name] = (uncompressed(fresh(), syntax, pixels), '')
    for name, kind in BY_GDCM.items(): found[name.replace('_', ' ')] = (by_gdcm(file, kind), 'gdcm')
    d, grey = fresh(), np.clip(pixels / max(pixels.max(), 1) * 255, 0, 255).astype(np.uint8)
    d.BitsAllocated, d.BitsStored, d.HighBit = 8, 8, 7
    d.file_meta.TransferSyntaxUID, d.PixelData = JPEGBaseline8Bit, encapsulate([cv2.imencode('.jpg', grey, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()])
    d['PixelData'].VR = 'OB'
    return found | {'jpeg baseline, 8 bits': (written(d), 'gdcm')}


def theirs(data, plugin):
    dataset = pydicom.dcmread(BytesIO(data))
    if plugin: dataset.pixel_array_options(decoding_plugin=plugin)
    return dataset.pixel_array


def ours(data, plugin=None): return picture(parse(data))


def seconds(work, *args):
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def measure(slices, repeats):
    "name -> (ours, theirs): (repeats, slices) seconds. Raises AssertionError where the two differ."
    times = {name: (np.empty((repeats, len(slices))), np.empty((repeats, len(slices)))) for name in slices[0]}
    for name, both in times.items():
        for i, of in enumerate(slices):
            assert np.array_equal(ours(*of[name]), theirs(*of[name])), name                # and the other process is up
            for r in range(repeats):
                for k in (0, 1) if r % 2 else (1, 0): both[k][r, i] = seconds((ours, theirs)[k], *of[name])
    stop_apart()
    return times


def draw(times, path):
    "Milliseconds a slice, ours and theirs."
    with panels(path, height=3.4) as (ax,):
        for k, (label, colour) in enumerate((('mscan.pixels', 'tab:blue'), ('pydicom', 'tab:gray'))):
            ax.barh(np.arange(len(times)) + (k - .5) * .4, [1e3 * np.median(t[k]) for t in times.values()], .4, label=label, color=colour)
        ax.set_yticks(range(len(times)), list(times), fontsize=8); ax.invert_yaxis(); ax.set_xscale('log'); ax.set_xlabel('ms a slice, median'); ax.legend(fontsize=8)


def main(argv=None):
    p = parser('speed_decode', __doc__.split('\n')[0], 1)
    p.add_argument('--slices', type=int, default=12, help='of the study, evenly taken')
    p.add_argument('--repeats', type=int, default=15, help='of each slice in each encoding')
    args = p.parse_args(argv)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_study(phantom_study(args.seed, 0, args.size, prevalence=args.prevalence), folder)
        files = sorted(Path(folder).rglob('*.dcm'))
        slices = [encodings(files[int(i)]) for i in np.linspace(0, len(files) - 1, args.slices)]
        sizes = [picture(parse(s['RLE'][0])).size for s in slices]
    times = measure(slices, args.repeats)
    report = Report('speed_decode', args, f'{args.slices} slices of a phantom study, seed {args.seed}, size {args.size} ({np.mean(sizes):.0f} pixels a slice); {args.repeats} repetitions, least and largest over slices in place of an interval')
    for name, (here, there) in times.items():
        ratio = np.median(here / there, 0)                                                       # (slices,)
        limit = {'RLE': RLE_AT_MOST, "RLE, pydicom's own decoder": 1 / RLE_GAIN}.get(name)
        report.add(f'{name}: ms here / there', (float(np.median(ratio)), float(ratio.min()), float(ratio.max())), f'median <= {limit}' if limit else '', np.median(ratio) <= limit if limit else None, here_ms=1e3 * np.median(here), there_ms=1e3 * np.median(there))
        report.add(f'{name}: slices a second here', 1 / np.median(here)); report.add(f'{name}: slices a second there', 1 / np.median(there))
    draw(times, args.out.with_suffix('.png'))
    return report.finish()


if __name__ == '__main__': sys.exit(main())
