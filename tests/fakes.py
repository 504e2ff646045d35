"Networks that have learned nothing round true points: what a run hands to report and SR, in memory and in seconds. Not a test."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pydicom
import torch

from mscan.bilateral import Bilateral
from mscan.crossattention import build_model
from mscan.encoders import SliceEncoder
from mscan.foramina import offset_foramina
from mscan.geometry import plane_distances, plane_of
from mscan.images import Preprocess
from mscan.metrics import prior_table
from mscan.recesses import offset_recesses
from mscan.rsna import CONDITIONS, LEVELS, read_train
from mscan.sidecrops import OWN_CONTRAST
from mscan.sides import RECESS_COLUMNS, Sides

XYZ = ['x_mm', 'y_mm', 'z_mm']


def fake_models(data, bilateral=True, seeds=2):
    "What `mscan.grading.load_models` gives, for a phantom folder."
    truth = pd.read_csv(data / 'truth.csv', dtype={'study_id': str})
    truth = truth[truth.condition == CONDITIONS[0]].set_index(['study_id', 'level'])

    def find_points(series):
        xyz = truth.loc[series.study_id].loc[list(LEVELS), XYZ]
        i = plane_distances(series, xyz.to_numpy(float)).argmin(0)
        xy = np.stack([plane_of(series, k).to_pixel(p) for k, p in zip(i, xyz.to_numpy(float), strict=True)])
        return xyz.reset_index().assign(slice_i=i, x_px=xy[:, 0], y_px=xy[:, 1], confidence=.9, flag='')

    def find_boxes(series, points): return points.assign(series_id=series.series_id, width_mm=30., source='yolo')[['series_id', 'slice_i', 'level', 'x_px', 'y_px', 'width_mm', 'confidence', 'source']]
    torch.manual_seed(0)
    encoder = SliceEncoder('test_efficientnet', dim=16).eval().requires_grad_(False)
    nets = [(Bilateral(dim=16) if bilateral else build_model('mscan', dim=16)).eval() for _ in range(seeds)]
    sides = Sides(offset_foramina, lambda study, chosen, xyz: offset_recesses(study, chosen, xyz)[RECESS_COLUMNS]) if bilateral else None
    return SimpleNamespace(sides=sides, find_points=find_points, find_boxes=find_boxes, centre_net=None, window_px=96, prepare=Preprocess(), encoders=[dict.fromkeys(('sagittal', 'axial', 'foramen', 'recess') if bilateral else ('sagittal', 'axial'), encoder)],
                           nets=[nets], low=.5, high=99.5, rule='plane', passes=1, size_px=64, conditions=list(CONDITIONS) if bilateral else [CONDITIONS[0]], view_dropout=.1, device='cpu', prior=prior_table(read_train(data / 'train.csv')), conditional=None, contrasts=OWN_CONTRAST,
                           card=dict(architecture=dict(name='bilateral' if bilateral else 'mscan')))


def complete(folder, **more):
    "Write into every file of a study's folder what the competition's headers lack."
    for n, file in enumerate(sorted(folder.glob('*/*.dcm'))):
        d = pydicom.dcmread(file)
        d.SOPClassUID, d.SOPInstanceUID = '1.2.840.10008.5.1.4.1.1.4', f'{folder.name}.7.{n + 1}'
        d.file_meta.MediaStorageSOPClassUID, d.file_meta.MediaStorageSOPInstanceUID = d.SOPClassUID, d.SOPInstanceUID
        for name, value in (dict(PatientName='Secret^Person', PatientBirthDate='19570401', PatientSex='O', AccessionNumber='A77', StudyID='S88', StudyDate='20211213', StudyTime='101500') | more).items(): setattr(d, name, value)
        d.save_as(file)
