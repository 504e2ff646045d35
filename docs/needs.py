"""Writes the table of docs/gpu-and-memory.md that is arithmetic: what one training step of each network holds in memory, counted without computing it.

    python docs/needs.py            # rewrites the part between the markers

The networks are built with a preset's sizes and sent through one forward pass on torch's `meta` device, which knows shapes and no numbers. Counted are
weights, gradients and AdamW's two moments (16 bytes a parameter), and every tensor that autograd keeps for the backward pass, each once, in float32.
"""
from pathlib import Path
from types import SimpleNamespace

import torch

from mscan.crops import AxialPointNet
from mscan.encoders import SliceEncoder
from mscan.keypoints import KeypointNet
from mscan.runner import find_stages, plan, read_preset
from mscan.yolo import build_yolo

PAGE = Path(__file__).resolve().parent / 'gpu-and-memory.md'
BEGIN, END = '<!-- needs: written by docs/needs.py -->', '<!-- /needs -->'
PRESETS = ('demo', 'paper', 'rsna')


def kept(make, batch: int, side: int, channels: int=1) -> tuple:
    "Parameters, and bytes that autograd keeps of one forward pass of `batch` squares."
    net, found, alive = make().to('meta').train(), {}, []
    own = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}

    def pack(t):
        alive.append(t)                                     # else another tensor could take its place, and its name
        found[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): net(torch.empty(batch, channels, side, side, device='meta'))
    return sum(p.numel() for p in net.parameters()), sum(n for k, n in found.items() if k not in own)


def networks(preset: str) -> list:
    "(stage, what, make, batch, side, channels) of a preset's image networks."
    of = {stage: SimpleNamespace(**v) for stage, v in plan(find_stages(), read_preset(preset)).items()}
    k, s, c, e, y = (of[n] for n in ('20_keypoints', '22_sides', '30_crops', '31_encoders', '40_levels'))
    rows = [('20_keypoints', f'U-Net, {k.encoder}', lambda: KeypointNet(k.encoder, width=k.width), k.batch, k.size_px, 1)]
    if s.sides == 'network': rows.append(('22_sides', f'U-Net, {s.encoder}', lambda: KeypointNet(s.encoder, width=s.width), s.batch, s.size_px, 1))
    return [*rows, ('30_crops', 'axial point', lambda: AxialPointNet(c.window_px, c.width), c.batch, c.window_px, 1),
            ('31_encoders', e.backbone, lambda: SliceEncoder(e.backbone, conditions=len(e.conditions.split(','))), e.batch, e.size_px, 1),
            ('40_levels', y.model.removesuffix('.yaml'), lambda: build_yolo(y.model, range(5)).requires_grad_(True), y.batch, y.size_px, 3)]


def table() -> list:
    "Lines of markdown."
    lines = ['| preset | stage | network | batch x side | million parameters | weights, gradients, moments, MiB | kept for the backward pass, MiB |', '|---|---|---|---|---|---|---|']
    for preset in PRESETS:
        for stage, what, make, batch, side, channels in networks(preset):
            parameters, held = kept(make, batch, side, channels)
            lines.append(f'| {preset} | `{stage}` | {what} | {batch} x {side} px | {parameters / 1e6:.1f} | {16 * parameters / 2**20:,.0f} | {held / 2**20:,.0f} |')
    return lines


def current(text: str) -> str:
    "The page with its table as it should be."
    before, _, rest = text.partition(BEGIN)
    return '\n'.join([before + BEGIN, '', *table(), '']) + END + rest.partition(END)[2]


if __name__ == '__main__': PAGE.write_text(current(PAGE.read_text(encoding='utf-8')), encoding='utf-8')
