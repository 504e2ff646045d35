"The same patient stored otherwise, from files to tables: equal pixels, places and labels. No training, a few seconds."
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from mscan.keypoints import KeypointNet, find_points
from mscan.images import Preprocess
from mscan.phantom import make_phantom
from mscan.prepare import load_study, prepare
from mscan.submission import read_normalised

PLACE, FACTS = ['ipp_x', 'ipp_y', 'ipp_z'], ['row_x', 'row_y', 'row_z', 'col_x', 'col_y', 'col_z', 'row_mm', 'column_mm']
HOWS = dict(columns=(1, 0), rows=(0, 1), both=(1, 1), numbers=(0, 0))


def store_again(file, out, number, columns, rows):
    "One DICOM file with columns or rows reversed, matching geometry, and another instance number."
    d = pydicom.dcmread(file)
    pixels, position, (down, across) = d.pixel_array, np.array(d.ImagePositionPatient, float), map(float, d.PixelSpacing)
    axes = np.array(d.ImageOrientationPatient, float).reshape(2, 3)
    if columns: position, pixels = position + (pixels.shape[1] - 1) * across * axes[0], pixels[:, ::-1]
    if rows: position, pixels = position + (pixels.shape[0] - 1) * down * axes[1], pixels[::-1]
    axes = axes * [[-1 if columns else 1], [-1 if rows else 1]]
    d.ImagePositionPatient, d.ImageOrientationPatient = ([f'{v:.10f}'[:16] for v in a.ravel()] for a in (position, axes))
    d.PixelData, d.InstanceNumber, d.file_meta.TransferSyntaxUID = np.ascontiguousarray(pixels).tobytes(), number, ExplicitVRLittleEndian
    d['PixelData'].is_undefined_length = False
    d.save_as(out / f'{number}.dcm', enforce_file_format=True)
    return pixels.shape


def restore_folder(old, new, columns, rows):
    "A competition folder whose every series is stored otherwise: numbers the other way, labels on the pixels of the new files."
    shutil.copytree(old, new, ignore=shutil.ignore_patterns('*.dcm'))
    points = pd.read_csv(old / 'train_label_coordinates.csv')
    for folder in sorted(old.glob('*_images/*/*')):
        numbers = sorted(int(p.stem) for p in folder.glob('*.dcm'))
        for a, b in zip(numbers, numbers[::-1], strict=True): shape = store_again(folder / f'{a}.dcm', new / folder.relative_to(old), b, columns, rows)
        mine = points.series_id == int(folder.name)
        if columns: points.loc[mine, 'x'] = shape[1] - 1 - points.x[mine]
        if rows: points.loc[mine, 'y'] = shape[0] - 1 - points.y[mine]
        points.loc[mine, 'instance_number'] = points.instance_number[mine].map(dict(zip(numbers, numbers[::-1], strict=True)))
    points.to_csv(new / 'train_label_coordinates.csv', index=False)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp('mirror')
    make_phantom(folder / 'data', studies=3, test_studies=1, seed=4, size='small', quirks='none', workers=1, progress=False)
    return SimpleNamespace(dir=folder, data=folder / 'data', tables=prepare(folder / 'data', folder / 'prepared', validation=.3, test=0, workers=1, progress=False))


@pytest.fixture(scope='module', params=list(HOWS))
def again(request, plain):
    columns, rows = HOWS[request.param]
    data = plain.dir / request.param
    restore_folder(plain.data, data, columns, rows)
    return SimpleNamespace(data=data, how=(bool(columns), bool(rows)), tables=prepare(data, plain.dir / f'prepared_{request.param}', validation=.3, test=0, workers=1, progress=False))


def test_the_cache_does_not_depend_on_storage(plain, again):
    a, b = plain.tables.slices, again.tables.slices
    assert not a[['x_reversed', 'y_reversed']].any(axis=None) and (b[['x_reversed', 'y_reversed']].to_numpy() == again.how).all()
    keys = ['study_id', 'series_id', 'view', 'slice_i', 'stack', 'rows', 'columns', 'offset']
    assert (a[keys] == b[keys]).all(axis=None) and np.abs(a[PLACE] - b[PLACE]).max(axis=None) < 1e-6 and np.abs(a[FACTS] - b[FACTS]).max(axis=None) < 1e-8
    assert (a.instance_number != b.instance_number).mean() > .8
    for study_id in plain.tables.studies.study_id: assert (np.load(plain.tables.dir / 'cache' / f'{study_id}.npy') == np.load(again.tables.dir / 'cache' / f'{study_id}.npy')).all()


def test_labels_land_on_the_same_anatomy(plain, again):
    a, b = (t.points.sort_values(['study_id', 'condition', 'level', 'series_id']).reset_index(drop=True) for t in (plain.tables, again.tables))
    assert len(a) == len(b) >= 60 and (a[['condition', 'level', 'series_id', 'slice_i']] == b[['condition', 'level', 'series_id', 'slice_i']]).all(axis=None)
    for c in ('x_px', 'y_px', 'x_mm', 'y_mm', 'z_mm'): assert np.abs(a[c] - b[c]).max() < 1e-6, c


def test_a_submitted_study_is_read_as_the_cache_holds_it(plain, again):
    study_id = plain.tables.studies.query('part == "submission"').study_id.iloc[0]
    cached = load_study(plain.tables, study_id)
    for data in (plain.data, again.data):
        read = read_normalised(data, study_id, None, .5, 99.5)
        for a, b in zip(read.series, cached.series, strict=True):
            assert a.series_id == b.series_id and np.abs(a.image_position - b.image_position).max() < 1e-6
            assert all((p == q).all() and p.flags.c_contiguous for p, q in zip(a.pixels, b.pixels, strict=True))


def test_a_random_network_finds_the_same_points(plain, again):
    import torch
    torch.manual_seed(0)
    net, study_id = KeypointNet('resnet18', width=4).eval(), plain.tables.studies.study_id[0]
    a, b = (find_points(net, load_study(t, study_id).of('sagittal_t2')[0], Preprocess(.8), 64, 4.5) for t in (plain.tables, again.tables))
    assert (a.slice_i == b.slice_i).all() and np.abs(a[['x_mm', 'y_mm', 'z_mm']] - b[['x_mm', 'y_mm', 'z_mm']]).max(axis=None) < 1e-3
