"""How near do training and answering come to the bare network? Each network of a preset, through the pipeline's own functions with augmentation and loading, against the same network on tensors that are already on the device.

Training: images a second of `mscan.training.fit` in epochs after the first, against forward, loss, backward and optimiser on one batch that is used again and again. Answering: the pipeline's function from uint8 pictures in memory to
numpy results, against the forward pass alone. Same batch sizes, same number format, same process; pictures are noise.
"""
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml

import mscan
from mscan.crops import AxialPointNet, WindowSet, point_loss
from mscan.encoders import CropSet, SliceEncoder, crop_loss, encode
from mscan.foramina import foramen_loss
from mscan.keypoints import CanvasSet, KeypointNet, heat_maps
from mscan.levels import LEVELS
from mscan.recesses import RecessNet, RecessSet, recess_loss
from mscan.training import fit, loaded, pick_device, pick_precision, seed_everything
from mscan.yolo import best_boxes, build_yolo

from ._common import Report, panels, parser

SHARE = .6           # of the bare throughput, of the paper's networks on a GPU
DEFAULTS = {'20_keypoints': dict(encoder='resnet18', width=16, size_px=192, batch=8), '30_crops': dict(window_px=96, width=16, batch=32), '22_sides': dict(window_px=64, recess_width=8, recess_batch=32),
            '31_encoders': dict(backbone='tf_efficientnetv2_b0', size_px=64, batch=32), '40_levels': dict(size_px=192)}   # only what a preset does not name


def pictures(n: int, size_px: int): return np.random.default_rng(0).integers(0, 256, (n, size_px, size_px), np.uint8)


def networks(preset: str, count: int) -> list:
    "(name, network, loss, training data, batch, answer) of each network of a preset; `answer(net, pictures, device)` is the pipeline's."
    given = yaml.safe_load((Path(mscan.__file__).parent / 'presets' / f'{preset}.yaml').read_text())
    of = {s: d | {k: v for k, v in (given.get(s) or {}).items() if k in d} for s, d in DEFAULTS.items()}
    rng, found = np.random.default_rng(0), []
    k = of['20_keypoints']
    canvases = CanvasSet([(pictures(count, k['size_px']), rng.uniform(0, k['size_px'], (count, len(LEVELS), 2)).astype(np.float32), np.full((count, len(LEVELS)), .9, np.float32), np.ones((count, len(LEVELS)), bool))], ('presence', 'asked'), True, rng)
    found.append(('keypoint U-Net', KeypointNet(k['encoder'], width=k['width']), foramen_loss(2., k['size_px']), canvases, k['batch'], heat_maps))
    c = of['30_crops']
    ask = lambda net, x, device: net(torch.from_numpy(x[:, None]).to(device).float() / 255).float().cpu().numpy()
    found.append(('axial point', AxialPointNet(c['window_px'], c['width']), point_loss, WindowSet(pictures(4 * count, c['window_px']), rng.uniform(-.1, .1, (4 * count, 2)), True), c['batch'], ask))
    s = of['22_sides']
    found.append(('recesses', RecessNet(s['window_px'], s['recess_width']), recess_loss, RecessSet(pictures(4 * count, s['window_px']), rng.uniform(-.1, .1, (4 * count, 2, 2)), True), s['recess_batch'], ask))
    e = of['31_encoders']
    crops = CropSet(pictures(4 * count, round(1.2 * e['size_px'])), rng.integers(0, 3, (4 * count, 1)), e['size_px'], True)
    found.append(('encoder', SliceEncoder(e['backbone']), crop_loss, crops, e['batch'], lambda net, x, device: encode(net, x, np.ones(len(x), bool), device, len(x))))
    found.append(('YOLO (answers)', build_yolo('yolov8n.yaml', list(LEVELS)), None, pictures(8, of['40_levels']['size_px']), 8, best_boxes))
    return found


def wait(device):
    if device.type == 'cuda': torch.cuda.synchronize(device)


def per_second(work, images: int, device, seconds: float) -> float:
    "Images a second of a function that is called until the time is up."
    for _ in range(2): work()
    wait(device)
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds: work(); n += 1
    wait(device)                                    # once: `fit` does not wait for every step either
    return n * images / (time.perf_counter() - start)


def bare_training(net, loss, batch: dict, device, precision: str, seconds: float) -> float:
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batch, kind = {k: v.to(device) for k, v in batch.items()}, dict(bf16=torch.bfloat16, fp16=torch.float16).get(precision)
    net.train()

    def step():
        with torch.autocast(device.type, dtype=kind, enabled=kind is not None): num, den = loss(net, batch)
        (num / den).backward()
        optimizer.step(); optimizer.zero_grad()
    return per_second(step, len(next(iter(batch.values()))), device, seconds)


def train_share(net, loss, data, batch: int, device, precision: str, seconds: float, repeats: int) -> tuple:
    "Images a second through `fit` and bare, interleaved medians."
    loader, rates = loaded(data, batch, device, shuffle=True, drop_last=True), []
    for _ in range(repeats):
        table = fit(net, loss, loader, epochs=3, lr=1e-4, device=device, mixed_precision=precision, progress=False).table
        rates.append((table.items_per_second[1:].median(), bare_training(net, loss, next(iter(loader)), device, precision, seconds)))
    return tuple(np.median(r) for r in zip(*rates, strict=True))


def answer_share(net, answer, shown: np.ndarray, device, seconds: float, repeats: int) -> tuple:
    "Pictures a second through the pipeline's function and bare, interleaved medians."
    net.eval()
    x = torch.from_numpy(shown[:, None]).to(device).float() / 255
    if answer is best_boxes: x = x.expand(-1, 3, -1, -1).contiguous()
    x, rates = x.contiguous(memory_format=torch.channels_last), []
    forward = net.features if isinstance(net, SliceEncoder) else net
    with torch.no_grad():
        for _ in range(repeats): rates.append(tuple(per_second(work, len(shown), device, seconds) for work in (lambda: answer(net, shown, device), lambda: forward(x))))
    return tuple(np.median(r) for r in zip(*rates, strict=True))


def plot(file: Path, shares: dict):
    with panels(file, height=.4 * len(shares) + 1) as (ax,):
        ax.barh(list(shares), list(shares.values()), color=['tab:blue' if 'training' in n else 'tab:green' for n in shares]); ax.invert_yaxis()
        ax.axvline(SHARE, color='grey', ls=':'); ax.set(xlabel='share of the bare network\'s throughput', xlim=(0, 1.1))


def main(argv=None) -> int:
    p = parser('speed_networks', 'How near do training and answering come to the bare network?', 48)
    p.add_argument('--preset', default='demo', help='whose networks')
    p.add_argument('--device', default='auto')
    p.add_argument('--mixed_precision', default='auto', help='no, bf16, fp16 or auto')
    p.add_argument('--seconds', type=float, default=2., help='for each bare figure')
    p.add_argument('--repeats', type=int, default=3)
    args = p.parse_args(argv)
    device, shares = pick_device(args.device), {}
    precision = pick_precision(args.mixed_precision, device)
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    report = Report('speed_networks', args, f'noise at the sizes of preset {args.preset}; {where}, {precision}; medians of {args.repeats}')
    bound = device.type == 'cuda' and args.preset == 'paper'
    for name, net, loss, data, batch, answer in networks(args.preset, args.studies):
        seed_everything(0)
        net.to(device).to(memory_format=torch.channels_last)
        pairs = {f'{name}, training': train_share(net, loss, data, batch, device, precision, args.seconds, args.repeats)} if loss else {}
        shown = data if loss is None else data.images[:batch]
        if isinstance(net, SliceEncoder): shown = np.ascontiguousarray(shown[:, :data.size_px, :data.size_px])
        pairs[f'{name}, answers'.replace(' (answers), answers', ', answers')] = answer_share(net, answer, shown, device, args.seconds, args.repeats)
        for what, (ours, bare) in pairs.items():
            shares[what] = ours / bare
            report.add(f'{what}: share of bare', ours / bare, f'>= {SHARE}' if bound else '', ours / bare >= SHARE if bound else None, images_per_second=ours, bare=bare, batch=batch)
            report.notes.append(f'{what}: {ours:.0f} of {bare:.0f} images/s in batches of {len(shown)}')
    plot(args.out.with_suffix('.png'), shares)
    return report.finish()


if __name__ == '__main__': sys.exit(main())
