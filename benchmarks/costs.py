"""What would a preset cost on the real data set? Arithmetic, not a measurement: images of a stage x epochs x operations an image, counted on the network itself, over what a device sustains.

How many images a study a stage trains on was counted in a run of the demo on phantom studies; the number of studies is that of the RSNA 2024 training set. Operations are counted by torch on one forward pass; a training step counts as three.
Memory is what autograd keeps for one image, measured on the CPU in float32 and halved for bf16 (but for YOLO, which trains in float32), times the batch, with weights, gradients and the two moments of AdamW.
`python -m benchmarks.costs` writes the tables between the markers of docs/costs.md, and what they come to, stage by stage, between those of README.md. Disk and main memory there are the arithmetic of docs/gpu-and-memory.md.
"""
import argparse
import sys
from pathlib import Path

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import mscan
from mscan.crops import AxialPointNet
from mscan.encoders import SliceEncoder
from mscan.keypoints import KeypointNet
from mscan.levels import LEVELS
from mscan.recesses import RecessNet
from mscan.yolo import build_yolo

from ._common import ROOT

sys.path.insert(0, str(ROOT / 'docs'))      # beside the pages
from parameters import between

STUDIES = 1975                       # of the competition's training set
SUSTAINED = {'T4 (fp16)': 15e12, 'A100 (bf16)': 90e12, 'H100 (bf16)': 180e12}   # a little under a third of the vendors' dense figures of 65, 312 and 989 / 2: an assumption, not a measurement
PER_STUDY = {'20_keypoints': 346 / 71, '22_sides foramina': 753 / 71, '22_sides recesses': 1014 / 71, '30_crops': 935 / 71, 'sagittal': 1017 / 71, 'axial': 1186 / 71, 'foramen': 2820 / 71, 'recess': 1998 / 71, '40_levels': 304 / 71}
CROPS = {'mscan': 5 + 15, 'bilateral': 5 + 2 * 15 + 2 * 15 + 2 * 15}     # crops a study of stage three, per view of it
MARKS = '<!-- costs -->', '<!-- /costs -->'


def counted(net, channels: int, size_px: int) -> tuple:
    "Operations (multiplications and additions) of one forward pass, and bytes that autograd keeps for one image."
    x, kept = torch.rand(1, channels, size_px, size_px), {}
    net.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(): net(x)
    net.train()
    for m in net.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm): m.eval()          # one image has no variance of its own
    known = {p.data_ptr() for p in net.parameters()}

    def keep(t):
        if t.data_ptr() not in known: kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): out = net(x)
    del out
    return counter.get_total_flops(), sum(kept.values())


def stages(preset: str) -> list:
    "(stage and network, network, channels, side, images a study, epochs, batch) of all that a preset trains."
    given = yaml.safe_load((Path(mscan.__file__).parent / 'presets' / f'{preset}.yaml').read_text())
    k, s, c, e, y = (given.get(n) or {} for n in ('20_keypoints', '22_sides', '30_crops', '31_encoders', '40_levels'))
    of = lambda d, n, default: d.get(n, default)
    rows = [('20_keypoints: U-Net', KeypointNet(of(k, 'encoder', 'resnet18'), width=of(k, 'width', 16)), 1, of(k, 'size_px', 192), PER_STUDY['20_keypoints'], of(k, 'epochs', 2), of(k, 'batch', 8))]
    if s.get('sides') != 'none':
        rows += [('22_sides: foramen U-Net', KeypointNet(of(s, 'encoder', 'resnet18'), width=of(s, 'width', 4)), 1, of(s, 'size_px', 96), PER_STUDY['22_sides foramina'], of(s, 'epochs', 2), of(s, 'batch', 8)),
                 ('22_sides: recesses', RecessNet(of(s, 'window_px', 64), of(s, 'recess_width', 8)), 1, of(s, 'window_px', 64), PER_STUDY['22_sides recesses'], of(s, 'recess_epochs', 4), of(s, 'recess_batch', 32))]
    rows.append(('30_crops: axial point', AxialPointNet(of(c, 'window_px', 96), of(c, 'width', 16)), 1, of(c, 'window_px', 96), PER_STUDY['30_crops'], of(c, 'epochs', 2), of(c, 'batch', 32)))
    for view in ('sagittal', 'axial', *(('foramen', 'recess') if e.get('sides') else ())):
        rows.append((f'31_encoders: {view}', SliceEncoder(of(e, 'backbone', 'tf_efficientnetv2_b0')), 1, of(e, 'size_px', 64), PER_STUDY[view], of(e, 'epochs', 1), of(e, 'batch', 32)))
    rows.append(('40_levels: YOLOv8n', build_yolo('yolov8n.yaml', list(LEVELS)), 3, of(y, 'size_px', 192), PER_STUDY['40_levels'], of(y, 'epochs', 2), of(y, 'batch', 8)))
    return rows


def features(preset: str) -> tuple:
    "The encoder, its side, and the images a study that stage three encodes once."
    given = yaml.safe_load((Path(mscan.__file__).parent / 'presets' / f'{preset}.yaml').read_text())
    e, g = given['31_encoders'], given['42_grading']
    return SliceEncoder(e['backbone']), e['size_px'], CROPS['bilateral' if g.get('model') == 'bilateral' else 'mscan'] * (1 + g.get('views', 0))


def costs(preset: str) -> list:
    "(stage and network, images, epochs, operations an image, operations in all, MiB of a training step or None) of all that a preset trains, and of the features of stage three."
    rows = []
    for name, net, channels, size_px, per_study, epochs, batch in stages(preset):
        flops, kept = counted(net, channels, size_px)
        held = batch * kept / (1 if name.startswith('40_levels') else 2)
        weights, images = sum(p.numel() for p in net.parameters()), STUDIES * per_study
        rows.append((name, images, epochs, flops, 3 * flops * images * epochs, (held + 16 * weights) / 2**20))
    net, size_px, per_study = features(preset)
    flops = counted(net, 1, size_px)[0]
    return [*rows, ('42_grading: features', STUDIES * per_study, 1, flops, flops * STUDIES * per_study, None)]


def hours(work: float) -> list:
    "What each device needs."
    return [f'{work / rate / 3600:.2f}' for rate in SUSTAINED.values()]


def table(preset: str, rows: list) -> list:
    "Lines of a Markdown table."
    lines = [f'| {preset} | images | epochs | GFLOP an image | PFLOP | ' + ' | '.join(f'h, {d}' for d in SUSTAINED) + ' | GPU MiB |', '|---' * (6 + len(SUSTAINED)) + '|']
    for name, images, epochs, flops, work, mib in rows:
        lines.append(f'| {name} | {images:,.0f} | {epochs} | {flops / 1e9:.2f} | {work / 1e15:.1f} | ' + ' | '.join(hours(work)) + f" | {'' if mib is None else f'{mib:,.0f}'} |")
    total = sum(r[4] for r in rows)
    return [*lines, f'| **together** | | | | {total / 1e15:.1f} | ' + ' | '.join(hours(total)) + ' |  |']


SLICES, CACHED_PX = 147218, (320, 640)      # of the training set; sides between which most slices lie
CROPS_A_STUDY, BORDER = 30, 1.35            # crops that stage 30 keeps of a study, and how much wider than the encoder's picture
NUMBERS = 512                               # of a crop, float32


def room(preset: str) -> dict:
    "stage -> (GB on disk, GB of main memory) for the training set, where they are counted."
    given = yaml.safe_load((Path(mscan.__file__).parent / 'presets' / f'{preset}.yaml').read_text())
    crops = STUDIES * CROPS_A_STUDY * (BORDER * given['30_crops']['size_px']) ** 2 / 1e9
    cache, kept = [SLICES * px ** 2 / 1e9 for px in CACHED_PX], STUDIES * features(preset)[2] * NUMBERS * 4 / 1e9
    return {'10_prepare': (f'{cache[0]:.0f} to {cache[1]:.0f}', ''), '30_crops': (f'{crops:.1f}', f'{2 * crops:.0f}'), '31_encoders': ('', f'{crops / 2:.1f}'), '42_grading': (f'{kept:.1f}', '')}


def by_stage(rows: dict) -> list:
    "Lines of README's table: what the presets of `rows` cost, stage by stage."
    devices = ' / '.join(d.split()[0] for d in SUSTAINED)
    lines = ['| stage | ' + ' | '.join(f'`{p}`: h on {devices} | GPU, GB | disk, GB | memory, GB' for p in rows) + ' |', '|---' * (1 + 4 * len(rows)) + '|']
    rooms = {p: room(p) for p in rows}
    for stage in sorted({'10_prepare', *(r[0].split(':')[0] for rs in rows.values() for r in rs)}):
        cells = []
        for p, rs in rows.items():
            mine = [r for r in rs if r[0].startswith(stage)]
            most = max((r[5] or 0 for r in mine), default=0)
            cells += [' / '.join(hours(sum(r[4] for r in mine))) if mine else '', f'{most * 2**20 / 1e9:.1f}' if most else '', *rooms[p].get(stage, ('', ''))]
        lines.append(f'| `{stage}` | ' + ' | '.join(cells) + ' |')
    return [*lines, '| together | ' + ' | '.join(f"{' / '.join(hours(sum(r[4] for r in rs)))} | | | " for rs in rows.values()) + '|']


def written(page: Path, lines: list):
    "Lines between the markers of a page."
    page.write_text(between(page.read_text(encoding='utf-8'), *MARKS, [*lines, '']), encoding='utf-8')


def main(argv=None) -> int:
    p = argparse.ArgumentParser(prog='python -m benchmarks.costs', description='What would a preset cost on the real data set?')
    p.add_argument('--presets', default='paper,rsna')
    args = p.parse_args(argv)
    rows = {preset: costs(preset) for preset in args.presets.split(',')}
    tables = [line for preset, r in rows.items() for line in ('', *table(preset, r))][1:]
    written(ROOT / 'docs' / 'costs.md', tables)
    written(ROOT / 'README.md', by_stage(rows))
    print('\n'.join([*tables, '', *by_stage(rows)]))
    return 0


if __name__ == '__main__': sys.exit(main())
