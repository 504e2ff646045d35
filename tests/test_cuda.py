"What runs on a GPU, without one: torch's fake tensors have a device and no numbers, so that whatever is made on the CPU and meets them fails."
import math
from contextlib import contextmanager, nullcontext
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mscan import crossattention, encoders
from mscan.attention import attention_weights, grad_cams
from mscan.bilateral import ROLES, Bilateral
from mscan.crops import AxialPointNet, point_loss
from mscan.crossattention import MODELS, PROBES, BiGRU, SliceLSTM, build_model, probe
from mscan.encoders import SliceEncoder, crop_loss, encode
from mscan.engines import shares
from mscan.foramina import foramen_loss
from mscan.grading import grade_features, study_loss
from mscan.keypoints import KeypointNet, heat_maps, keypoint_loss
from mscan.recesses import RecessNet, recess_loss
from mscan.sidegrading import VIEWS, grade_sides, side_loss
from mscan.submission import load_members
from mscan.yolo import best_boxes, build_yolo

B, T, S, D, PX = 2, 5, 3, 16, 64


class Copies(TorchDispatchMode):
    "Writes down what waits for the device: copies between it and the host, and numbers that are read back."
    def __init__(self): super().__init__(); self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        ends = [a.device.type for a in (*args, out) if isinstance(a, torch.Tensor)] if name in ('_to_copy', 'copy_') else []
        if len(set(ends)) > 1 or name in ('_local_scalar_dense', 'nonzero'): self.seen.append((name, *ends))
        return out


@contextmanager
def gpu(*nets):
    "Within, tensors are fake and the networks on a GPU that is none; numpy takes what is on the CPU and no bf16, as ever, and gets zeros."
    def numpy(x):
        assert x.device.type == 'cpu' and x.dtype != torch.bfloat16 and not x.requires_grad, f'numpy cannot take {x.dtype} on {x.device}'
        return np.zeros(tuple(x.shape), str(x.dtype).removeprefix('torch.'))

    def packed(e, lengths, batch_first, enforce_sorted):
        assert e.is_cuda and lengths.device.type == 'cpu', 'lengths are wanted on the CPU'
        return e
    with pytest.MonkeyPatch.context() as patch, torch.backends.cudnn.flags(enabled=False), FakeTensorMode(allow_non_fake_inputs=True), enable_python_dispatcher():   # recurrences in elementary steps
        patch.setattr(torch.Tensor, 'numpy', numpy)
        patch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)                    # else autocast does nothing
        patch.setattr(torch.cuda, 'is_bf16_supported', lambda: True)
        patch.setattr(nn.utils.rnn, 'pack_padded_sequence', packed)
        patch.setattr(torch.distributions.Distribution, '_validate_args', False)                               # it would look at numbers
        for net in nets: net.to('cuda')
        yield


def picture(size=PX): return torch.rand(B, 1, size, size, device='cuda')


def study():
    here = lambda *shape: torch.ones(shape, dtype=torch.bool, device='cuda')
    return dict(sagittal=torch.rand(B, T, D, device='cuda'), axial=torch.rand(B, T, S, D, device='cuda'), sagittal_mask=here(B, T), axial_mask=here(B, T, S), grade=torch.zeros(B, T, 1, dtype=torch.long, device='cuda'))


def sides():
    shape = lambda r: (B, T) if r == 'sagittal' else (B, T, S)
    return dict(features={r: torch.rand(*shape(r), D, device='cuda') for r in ROLES}, masks={r: torch.ones(shape(r), dtype=torch.bool, device='cuda') for r in ROLES}, grade=torch.zeros(B, T, 3, dtype=torch.long, device='cuda'))


def points(**more): return dict(image=picture(), points=torch.rand(B, T, 2, device='cuda')) | more


CASES = {   # network, its loss, a batch on the device
    'keypoints': lambda: (KeypointNet('resnet18', width=2), keypoint_loss(1.5, PX), lambda: points(state=torch.ones(B, T, dtype=torch.long, device='cuda'))),
    'foramina': lambda: (KeypointNet('resnet18', width=2), foramen_loss(1.5, PX), lambda: points(presence=torch.rand(B, T, device='cuda'), asked=torch.ones(B, T, dtype=torch.bool, device='cuda'))),
    'axial point': lambda: (AxialPointNet(PX, 4), point_loss, lambda: dict(image=picture(), offset=torch.rand(B, 2, device='cuda'))),
    'recesses': lambda: (RecessNet(PX, 4), recess_loss, lambda: dict(image=picture(), offset=torch.rand(B, 2, 2, device='cuda'))),
    'encoder': lambda: (SliceEncoder('test_efficientnet', D), crop_loss, lambda: dict(image=picture(), grade=torch.zeros(B, 1, dtype=torch.long, device='cuda'))),
    **{name: lambda name=name: (build_model(name, dim=D), study_loss(), study) for name in MODELS},
    'mixup, smoothing, order': lambda: (build_model('mscan', dim=D, residual=True, embeddings=True, heads=2), study_loss(.4, .1, .1), study),
    'bilateral': lambda: (Bilateral(D), side_loss(), sides),
    'bilateral, mixup': lambda: (Bilateral(D), side_loss(mixup=.4), sides),
}
PICTURES = ('keypoints', 'foramina', 'axial point', 'recesses', 'encoder')


@pytest.mark.parametrize('name', CASES)
def test_a_loss_on_the_device_stays_there(name):
    "In training and not, in all precisions; a network of pictures does not wait for its loss, so that the next kernels are on their way."
    model, loss, batch = CASES[name]()
    with gpu(model):
        for precision, training in product((None, torch.bfloat16, torch.float16), (True, False)):
            made = batch()
            with Copies() as copies, torch.autocast('cuda', dtype=precision, enabled=precision is not None): num, den = loss(model.train(training), made)
            assert num.device.type == den.device.type == 'cuda' and num.dim() == den.dim() == 0 and num.dtype == torch.float32
            if name in PICTURES: assert not copies.seen, copies.seen


@pytest.mark.parametrize('precision', [torch.bfloat16, torch.float16])
def test_recurrences_compute_in_full_precision(precision):
    "cuDNN's autocast knows fp16 alone; without fp16's scaler small gradients would be lost in it."
    gru, lstm, linear, under = BiGRU(D), SliceLSTM(D), nn.Linear(D, D), []
    for net in (gru.gru, lstm.lstm): net.register_forward_pre_hook(lambda *_: under.append(torch.is_autocast_enabled('cuda')))
    with gpu(gru, lstm, linear), torch.autocast('cuda', dtype=precision):
        e, slices, present = torch.rand(B, T, D, device='cuda'), torch.rand(B, T, S, D, device='cuda'), torch.ones(B, T, S, dtype=torch.bool, device='cuda')
        for kind in (torch.float32, precision): assert gru(e.to(kind)).dtype == lstm(slices.to(kind), present).dtype == torch.float32
        assert linear(e).dtype == precision and under == [False] * 4, under


def features(bilateral):
    "Features of a study, plain view, as arrays: what `grade_features` or `grade_sides` is given."
    rng = np.random.default_rng(0)
    draw, mask = lambda *s: rng.random((*s, D), np.float32), lambda *s: np.ones(s, bool)
    if not bilateral: return draw(T), draw(2, T, S), mask(T), mask(2, T, S)
    shapes = dict(sagittal=(T,), axial=(2, 2, T, S), foramen=(2, T, S), recess=(2, 2, T, S))
    return {v: draw(1, *shapes[v]) for v in VIEWS}, {v: mask(*shapes[v]) for v in VIEWS}


def test_answers_come_back_to_the_host():
    pictures, unet, encoder, yolo, readers, both = np.zeros((3, PX, PX), np.uint8), KeypointNet('resnet18', width=2), SliceEncoder('test_efficientnet', D), build_yolo('yolov8n.yaml', list('abcde')), [build_model(m, dim=D) for m in MODELS], Bilateral(D)
    with gpu(unet, encoder, yolo, both, *readers):
        heat, none = heat_maps(unet, pictures, 'cuda', batch=2)
        assert heat.shape == (3, 5, PX, PX) and none.shape == (3, 5)
        assert encode(encoder, pictures, np.ones(3, bool), 'cuda').shape == (3, D)
        yolo.model[-1].stride = (8., 16., 32.)                                                                 # read as numbers
        p, boxes = best_boxes(yolo, pictures, 'cuda', batch=2)
        assert p.shape == (3, 5) and boxes.shape == (3, 5, 4)
        for net in readers: assert grade_features(net, *features(False), 'cuda').shape == (T, 1, 3)
        assert grade_sides(both, *features(True), 'cuda').shape == (T, 5, 3)


def test_what_a_reader_is_asked_of_its_attention_stays_on_the_device(monkeypatch):
    "Without the gradient itself: its engine wants a GPU."
    monkeypatch.setattr(torch.autograd, 'grad', lambda score, maps, **options: [torch.zeros_like(m) for m in maps])
    net, own = build_model('mscan', dim=D).eval(), {v: SliceEncoder('test_efficientnet', D).requires_grad_(False).eval() for v in ('sagittal', 'axial')}
    crops = SimpleNamespace(sagittal=np.zeros((T, PX, PX), np.uint8), sagittal_mask=np.ones(T, bool), axial=np.zeros((1, T, S, PX, PX), np.uint8), axial_mask=np.ones((1, T, S), bool))
    with gpu(net, *own.values()):
        batch = study()
        for kind in PROBES:
            with probe(net, kind): assert net(*(batch[k] for k in ('sagittal', 'axial', 'sagittal_mask', 'axial_mask'))).is_cuda
        grad_cams(crops, [own], [[net]], ['spinal_canal_stenosis'], 'cuda')
        e_s, e_a, *masks = features(False)
        found = attention_weights([[net]], [(e_s[None], e_a[None], *masks)], 'cuda')
        assert set(found) == {'axial_to_sagittal', 'sagittal_to_axial'} and found['axial_to_sagittal'].shape == (T, T)


def weights_as_a_table(logits, grade, weights=(1, 2, 4), sample_weight=None):
    table = torch.tensor(weights, dtype=torch.float32, device=logits.device)
    return nn.functional.cross_entropy(logits.float().flatten(0, -2), grade.flatten(), reduction='none').sum(), table[grade].sum()


def on_the_host(make): return lambda *a, device=None, **k: make(*a, **k)


MUTANTS = {   # what is done wrong, and the test that fails
    'a grid made on the CPU': ((torch, 'arange', on_the_host(torch.arange)), lambda patch: test_a_loss_on_the_device_stays_there('keypoints')),
    'an identity made on the CPU': ((torch, 'eye', on_the_host(torch.eye)), test_what_a_reader_is_asked_of_its_attention_stays_on_the_device),
    'studies mixed in an order of the CPU': ((torch, 'lerp', lambda a, b, share: a * (1 - share.cpu()) + b * share), lambda patch: test_a_loss_on_the_device_stays_there('bilateral, mixup')),
    'a table of weights copied for every loss': ((encoders, 'weighted_ce', weights_as_a_table), lambda patch: test_a_loss_on_the_device_stays_there('encoder')),
    'answers left on the device': ((torch.Tensor, 'cpu', lambda x: x), lambda patch: test_answers_come_back_to_the_host()),
    'recurrences under autocast': ((crossattention, 'full_precision', lambda x: nullcontext()), lambda patch: test_recurrences_compute_in_full_precision(torch.bfloat16)),
}


@pytest.mark.parametrize('name', MUTANTS)
def test_mutants_are_found(monkeypatch, name):
    wrong, check = MUTANTS[name]
    monkeypatch.setattr(*wrong)
    with pytest.raises((RuntimeError, AssertionError)) as found: check(monkeypatch)
    assert any(w in str(found.value) for w in ('device', 'numpy cannot take', 'lengths are wanted', '_to_copy', '[True, True')), found.value


def test_pictures_in_batches_are_answered_as_those_of_one():
    pictures, unet, yolo = np.random.default_rng(0).integers(0, 256, (5, PX, PX), np.uint8), KeypointNet('resnet18', width=2), build_yolo('yolov8n.yaml', list('abcde'))
    for ask in (lambda batch: heat_maps(unet, pictures, batch=batch), lambda batch: best_boxes(yolo, pictures, batch=batch)):
        for whole, parts in zip(ask(32), ask(2), strict=True): assert whole.shape == parts.shape and np.allclose(whole, parts, atol=1e-4)


def test_a_device_that_cannot_compute_is_told_before_the_first_study():
    with pytest.raises((RuntimeError, NotImplementedError)): load_members([], 'meta')
    assert load_members([], 'cpu') == []


@pytest.mark.parametrize('gpus', [1, 2, 3])
def test_workers_that_share_a_gpu_of_a_cluster_fit_on_it(gpus):
    "Ray counts in ten thousandths; a share that is rounded up would leave the last worker without a place."
    ray = SimpleNamespace(cluster_resources=lambda: dict(CPU=16., GPU=float(gpus)))
    for workers in range(1, 17):
        count, room = shares(ray, workers, 1, True)
        assert count == workers and 0 < round(1e4 * room['num_gpus']) * math.ceil(workers / gpus) <= 1e4
    assert shares(ray, 0, 2, False) == (8, dict(num_cpus=2, num_gpus=0))
