"The rows of the tables: the multi-view model's loss is one fraction however the studies are divided, and each row is trained as it says."
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from mscan.crossattention import build_model
from mscan.grading import StudySet, study_loss
from mscan.training import fit, seed_everything
from mscan.variants import VARIANTS, EndToEnd, FeatureBank, Variant, answer, encoder_answer, train_variant

D = 16


def studies(n=8, seed=0):
    "Features of n studies; severe ones together at the end and labels missing, so that a mean of means is wrong; one study lacks its axial view."
    rng = np.random.default_rng(seed)
    grades = np.sort(rng.integers(0, 3, (n, 5, 1)), 0)
    grades[1], grades[3, 2] = -1, -1
    rows = []
    for i in range(n):
        e_s, e_a = rng.normal(size=(1, 5, D)), rng.normal(size=(1, 1, 5, 3, D))
        rows.append((e_s.astype(np.float32), e_a.astype(np.float32), np.ones(5, bool), np.full((1, 5, 3), i != 2)))
    return rows, grades


def one_step(batch, accumulation=1):
    "Loss and gradient of one optimiser step over eight studies, without dropout."
    seed_everything(0)
    model, gradients = build_model('mscan', dim=D, dropout=0.), []
    plain = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        gradients.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g['params']]))
        return plain(self, *args, **kwargs)

    torch.optim.AdamW.step = step
    try: history = fit(model, study_loss(), DataLoader(StudySet(*studies()), batch), epochs=1, lr=1e-3, accumulation=accumulation, clip=None, device='cpu', progress=False)
    finally: torch.optim.AdamW.step = plain
    assert len(gradients) == 1
    return history.table.train_loss.iloc[0], gradients[0].detach().numpy()


def test_accumulation_of_4_times_2_is_a_batch_of_8():
    (loss, gradient), (again, parts) = one_step(8), one_step(2, 4)
    assert abs(loss - again) < 1e-6 and np.abs(gradient - parts).max() < 1e-6 < np.abs(gradient).max()


TWO = '''
import sys; sys.path.insert(0, {tests!r})
import numpy as np, torch
from test_variants import one_step
loss, gradient = one_step(4)
np.savez({out!r} + str(torch.distributed.get_rank()), loss=loss, gradient=gradient)
torch.distributed.destroy_process_group()
'''


def test_two_processes_of_4_are_a_batch_of_8(tmp_path):
    (tmp_path / 'two.py').write_text(TWO.format(tests=str(Path(__file__).parent), out=str(tmp_path / 'w')))
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    common = os.environ | dict(OMP_NUM_THREADS='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    processes = [subprocess.Popen([sys.executable, tmp_path / 'two.py'], env=common | dict(RANK=i, LOCAL_RANK=i), stderr=subprocess.PIPE, text=True) for i in '01']
    errors = [p.communicate(timeout=300)[1] for p in processes]
    assert all(p.returncode == 0 for p in processes), errors[0][-2000:] + errors[1][-2000:]
    loss, gradient = one_step(8)
    for rank in '01':
        other = np.load(tmp_path / f'w{rank}.npz')
        assert abs(loss - other['loss']) < 1e-6 and np.abs(gradient - other['gradient']).max() < 1e-6


class Known(FeatureBank):
    "A bank of made-up features, and a list of what was asked of it."
    def features(self, mode, j, kind, study_id):
        self.made.setdefault('asked', []).append((mode, j, kind, study_id))
        return self.crops[kind][study_id]


@pytest.fixture
def bank():
    rows, grades = studies(12)
    names = [f's{i}' for i in range(12)]
    crops = dict(zip(names, rows, strict=True))
    half = pd.Series([0, 1] * 4, index=names[:8])
    b = Known(dict(predicted=crops, labels=crops, **{'moved 0': crops}), dict(in_fold=['e'], half=['e0', 'e1'], oof=['e0', 'e1']), dict(in_fold=half * 0, half=half, oof=half), set(names[:8]))
    return b, dict(train=names[:8], validation=names[8:10]), dict(zip(names, grades, strict=True)), names[10:]


SETTINGS = dict(epochs=1, lr=1e-3, batch=4, weight_decay=.01, schedule='one_cycle', dropout=.1, progress=False)


@pytest.mark.parametrize('features, nets', [('in_fold', 1), ('half', 2), ('oof', 1)])
def test_a_training_study_is_encoded_by_the_encoder_that_has_not_seen_it(bank, features, nets):
    b, ids, grades, held = bank
    v = Variant(options=dict(dim=D), features=features)
    fits = train_variant(v, b, ids, grades, SETTINGS)
    asked = pd.DataFrame(b.made['asked'], columns=['mode', 'encoder', 'kind', 'study_id']).drop_duplicates()
    own = asked[asked.study_id.isin(ids['train'])].set_index('study_id').encoder
    assert len(fits) == nets and own.index.is_unique and own.sort_index().equals(b.groups[features].sort_index().rename('encoder').rename_axis('study_id'))
    b.made.clear()
    p = answer(v, fits, b, held[0])
    assert {a[1] for a in b.made['asked']} == set(range(len(b.encoders[features]))) and np.allclose(p.sum(-1), 1)     # a new study: all encoders


def test_each_row_trains_on_its_own_crops_and_answers_on_those_asked_for(bank):
    b, ids, grades, held = bank
    fits = train_variant(Variant(options=dict(dim=D), crops='labels'), b, ids, grades, SETTINGS)
    assert {a[2] for a in b.made['asked']} == {'labels'}
    b.made.clear()
    for tta, kind, kinds in ((False, 'predicted', {'predicted'}), (True, 'predicted', {'predicted', 'moved 0'}), (True, 'labels', {'labels'})):
        answer(Variant(options=dict(dim=D), tta=tta), fits, b, held[0], kind)
        assert {a[2] for a in b.made.pop('asked')} == kinds


def test_options_reach_the_model_and_the_loss(bank, monkeypatch):
    import mscan.variants
    b, ids, grades, _ = bank
    seen = []
    monkeypatch.setattr(mscan.variants, 'study_loss', lambda **k: seen.append(k) or study_loss(**k))
    for name, v in VARIANTS.items():
        if v.model in ('late_blend', 'encoders') or v.unfrozen: continue
        fits = train_variant(Variant(v.model, v.options | dict(dim=D), v.features, v.crops, v.training), b, ids, grades, SETTINGS)
        assert fits[0].net.config.items() >= v.options.items() and seen[-1] == {k: x for k, x in v.training.items() if k != 'view_dropout'}, name
    assert any('ordinal' in s for s in seen) and any('smoothing' in s for s in seen)


class Encoder(torch.nn.Module):
    "A stand-in for a slice encoder: the same logits for every crop; features are the crop's mean, through a BatchNorm."
    def __init__(self, graded, logits):
        super().__init__()
        self.graded, self.logits, self.norm = graded, torch.tensor(logits), torch.nn.BatchNorm1d(D)

    def forward(self, image): return self.logits.expand(len(image), -1, -1)
    def features(self, image): return self.norm(image.mean((1, 2, 3))[:, None] * torch.arange(1., D + 1))


def crops_of(sagittal=True, axial=True):
    from types import SimpleNamespace
    return SimpleNamespace(sagittal=np.zeros((5, 8, 8), np.uint8), sagittal_mask=np.full(5, sagittal), axial=np.zeros((2, 5, 3, 8, 8), np.uint8), axial_mask=np.full((2, 5, 3), axial))


def test_encoders_vote_on_the_conditions_they_grade_by_name():
    canal, left = 'spinal_canal_stenosis', 'left_subarticular_stenosis'
    severe, normal, moderate = [0., 0., 9.], [9., 0., 0.], [0., 9., 0.]
    encoders = dict(sagittal=Encoder([canal], [severe]), axial=Encoder([left, canal], [normal, moderate]))
    p = encoder_answer(encoders, crops_of(), (canal, left))
    assert p.shape == (5, 2, 3) and np.allclose(p.sum(-1), 1)
    assert (p[:, 1].argmax(-1) == 0).all() and np.allclose(p[:, 0, 1], p[:, 0, 2]) and (p[:, 0, 0] < .02).all()    # the canal: both views, undecided between them
    assert (encoder_answer(encoders, crops_of(sagittal=False), (left, canal))[:, 1].argmax(-1) == 1).all()
    assert np.allclose(encoder_answer(encoders, crops_of(axial=False), (canal, left))[:, 1], 1 / 3)
    with pytest.raises(ValueError, match='no encoder grades'): encoder_answer(encoders, crops_of(), ('right_subarticular_stenosis',))


def test_absent_crops_do_not_reach_an_unfrozen_encoder():
    "In training mode BatchNorm mixes the crops of a batch: what hides behind a mask must not be among them."
    torch.manual_seed(0)
    net = EndToEnd(dict(sagittal=Encoder([], [[0.]]), axial=Encoder([], [[0.]])), build_model('mscan', dim=D, dropout=0.)).train()
    sagittal, axial = torch.rand(2, 5, 8, 8), torch.rand(2, 5, 3, 8, 8)
    mask_s, mask_a = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 5, 3, dtype=torch.bool)
    mask_a[1] = False
    first = net(sagittal, axial, mask_s, mask_a)
    axial[1] = 100.
    assert torch.equal(first, net(sagittal, axial, mask_s, mask_a))
    assert not torch.allclose(first, net(sagittal, axial, mask_s, None))


def test_a_late_blend_is_the_geometric_mean_of_its_two_views(bank):
    b, ids, grades, held = bank
    fits = train_variant(Variant('late_blend', dict(dim=D)), b, ids, grades, SETTINGS)
    assert [f.name for f in fits] == ['sagittal_gru', 'axial_gru']
    both = answer(Variant('late_blend'), fits, b, held[0])
    one = np.stack([answer(Variant(f.name), [f], b, held[0]) for f in fits])
    mean = np.sqrt(one[0] * one[1])
    assert np.allclose(both, mean / mean.sum(-1, keepdims=True), atol=1e-6)
