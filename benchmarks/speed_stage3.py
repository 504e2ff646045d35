"""What is it worth that stage three never runs its encoders in an epoch? The same training twice: features computed once, and crops encoded anew in every batch.

Both forms are trained by `mscan.training.fit` with the same model, loss, batch size and validation in every epoch. The cached form pays for its features first: the plain view and `views - 1` augmented ones of every training crop,
the plain view of the others. An end-to-end epoch costs the same each time, so `--epochs` of them are measured and counted as twenty. Crops are noise of the asked size: time does not depend on what they show.
Third figure: an epoch of the cached form alone, a study, against a study of the form in which the paper's code was released: one study a batch, encoders and all.
"""
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mscan.crossattention import build_model
from mscan.encoders import SliceEncoder, augmented
from mscan.grading import StudySet, study_features, study_loss
from mscan.rsna import LEVELS
from mscan.training import fit, freeze, pick_device, seed_everything

from ._common import Report, panels, parser

EPOCHS, SLICES, MODEL_BATCH = 20, 3, 16
LIMITS = {4: 1 / 4, 1: 1 / 10}       # views -> largest share of the end-to-end time
FASTER = 500                         # an epoch alone against batches of one study, at the paper's crop size


def crops_of(studies: int, size_px: int, seed: int) -> list:
    "Crops of noise, as `mscan.crops.study_crops` gives them."
    rng, T = np.random.default_rng(seed), len(LEVELS)
    return [SimpleNamespace(sagittal=rng.integers(0, 256, (T, size_px, size_px), np.uint8), axial=rng.integers(0, 256, (1, T, SLICES, size_px, size_px), np.uint8),
                            sagittal_mask=np.ones(T, bool), axial_mask=np.ones((1, T, SLICES), bool)) for _ in range(studies)]


class CropStudies(Dataset):
    "Studies as crops, augmented anew each time."
    def __init__(self, crops: list, grades, augment: bool): self.crops, self.grades, self.augment, self.rng = crops, grades, augment, np.random.default_rng(0)

    def __len__(self): return len(self.crops)

    def __getitem__(self, i):
        c = self.crops[i]
        shown = [augmented(a, self.rng) if self.augment else a for a in (c.sagittal, c.axial[0])]
        return dict(sagittal=torch.from_numpy(shown[0]), axial=torch.from_numpy(shown[1]), sagittal_mask=torch.from_numpy(c.sagittal_mask), axial_mask=torch.from_numpy(c.axial_mask[0]), grade=torch.from_numpy(self.grades[i]))


class EndToEnd(nn.Module):
    "Frozen encoders and the multi-view model, from crops to logits."
    def __init__(self, encoders: dict, model: nn.Module):
        super().__init__()
        self.encoders, self.model = nn.ModuleDict({k: freeze(e) for k, e in encoders.items()}), model

    def features(self, view: str, crops):
        "(..., H, W) uint8 -> (..., D)"
        with torch.no_grad():
            x = crops.flatten(0, -3)[:, None].float() / 255
            if x.device.type == 'cpu': x = x.contiguous(memory_format=torch.channels_last)
            return self.encoders[view].features(x).unflatten(0, crops.shape[:-2])

    def forward(self, sagittal, axial, sagittal_mask, axial_mask): return self.model(self.features('sagittal', sagittal), self.features('axial', axial), sagittal_mask, axial_mask)


def timed(work):
    "Its result and seconds."
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


class Forms:
    "The two forms on the same studies."
    def __init__(self, backbone: str, size_px: int, studies: int, batch: int, device, seed: int=0):
        self.batch, self.device, self.crops = batch, device, crops_of(studies, size_px, seed)
        self.grades, held = np.random.default_rng(seed).integers(0, 3, (studies, len(LEVELS), 1)), max(1, studies // 6)
        self.part = dict(train=slice(0, studies - held), validation=slice(studies - held, studies))
        seed_everything(seed)
        self.encoders = {v: freeze(SliceEncoder(backbone)).to(device).to(memory_format=torch.channels_last) for v in ('sagittal', 'axial')}

    def model(self, dropout=.1):
        seed_everything(1)
        return build_model('mscan', conditions=1, dropout=dropout)

    def fit(self, model, sets: dict, epochs: int, batch=None):
        batch = batch or self.batch
        return fit(model, study_loss(), DataLoader(sets['train'], batch, shuffle=True), DataLoader(sets['validation'], batch) if 'validation' in sets else None, epochs=epochs, lr=1e-4, schedule='constant', device=self.device, seed=2, progress=False)

    def features(self, views: int) -> dict:
        "Features of all studies: `views` of those to train on, the plain one of the others."
        one = lambda c, more, k: (*study_features(c, self.encoders, self.device, more, k), c.sagittal_mask, c.axial_mask)
        return {p: [one(c, views - 1 if p == 'train' else 0, k) for k, c in enumerate(self.crops[s])] for p, s in self.part.items()}

    def cached(self, views: int, epochs: int=EPOCHS, **options):
        found = self.features(views)
        return self.fit(self.model(**options), {p: StudySet(f, self.grades[self.part[p]], p == 'train') for p, f in found.items()}, epochs)

    def whole(self, epochs: int, augment: bool=True, batch=None, **options):
        sets = {p: CropStudies(self.crops[s], self.grades[s], augment and p == 'train') for p, s in self.part.items()}
        return self.fit(EndToEnd(self.encoders, self.model(**options)), sets, epochs, batch)


def measure(forms: Forms, epochs: int, repeats: int) -> dict:
    "Seconds of each form, medians of interleaved repetitions."
    forms.whole(1)                                                                                          # warm
    features = forms.features(1)['train']
    many = StudySet((features * 64)[:64], np.resize(forms.grades, (64, *forms.grades.shape[1:])), True)
    rows = []
    for _ in range(repeats):
        row = {f'cached, {v} view{"s" * (v > 1)}': timed(lambda v=v: forms.cached(v))[1] for v in LIMITS}
        row['end to end'] = timed(lambda: forms.whole(epochs))[1] * EPOCHS / epochs
        row['epoch alone, a study'] = forms.fit(forms.model(), dict(train=many), 3, MODEL_BATCH).table.seconds.median() / len(many)
        row['batches of one, a study'] = timed(lambda: forms.fit(EndToEnd(forms.encoders, forms.model()), dict(train=CropStudies(forms.crops[forms.part['train']], forms.grades[forms.part['train']], True)), 1, 1))[1] / len(features)
        rows.append(row)
    return {k: float(np.median([r[k] for r in rows])) for k in rows[0]}


def plot(file: Path, found: dict):
    with panels(file, len(found), 4.6, 2.8) as axes:
        for ax, (name, s) in zip(axes, found.items(), strict=True):
            names = ['end to end', *(k for k in s if k.startswith('cached'))]
            ax.barh(names, [s[k] for k in names], color=['tab:grey', *['tab:blue'] * len(LIMITS)]); ax.invert_yaxis()
            for y, k in enumerate(names): ax.text(s[k], y, f' {s[k] / s["end to end"]:.2f}', va='center')
            ax.set(title=name, xlabel=f'seconds for {EPOCHS} epochs, features included'); ax.margins(x=.15)


def main(argv=None) -> int:
    p = parser('speed_stage3', 'What is it worth that stage three never runs its encoders in an epoch?', 12)
    p.add_argument('--paper_studies', type=int, default=6, help="studies at the paper's crop size, which takes longer; 0: left out")
    p.add_argument('--batch', type=int, default=4, help='of both forms')
    p.add_argument('--epochs', type=int, default=1, help=f'of the end-to-end form, counted as {EPOCHS}')
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--device', default='auto')
    args = p.parse_args(argv)
    device, found = pick_device(args.device), {}
    report = Report('speed_stage3', args, f'noise of the right shape; device {device}, {torch.get_num_threads()} threads; medians of {args.repeats}')
    sizes = {'demo: test_efficientnet, 64 px': ('test_efficientnet', 64, args.studies)} | ({'paper: efficientnetv2_rw_t, 384 px': ('efficientnetv2_rw_t', 384, args.paper_studies)} if args.paper_studies else {})
    for name, (backbone, size_px, studies) in sizes.items():
        forms = Forms(backbone, size_px, studies, args.batch, device)
        found[name] = s = measure(forms, args.epochs, args.repeats if name.startswith('demo') else 1)
        held = name.startswith('paper')
        for v, limit in LIMITS.items():
            share = s[f'cached, {v} view{"s" * (v > 1)}'] / s['end to end']
            report.add(f'{name}: {EPOCHS} epochs with features of {v} view{"s" * (v > 1)} / end to end', share, f'<= {limit:.2f}' if held else '', share <= limit if held else None)
        gain = s['batches of one, a study'] / s['epoch alone, a study']
        report.add(f'{name}: batches of one / epoch alone, a study', gain, f'>= {FASTER}' if held else '', gain >= FASTER if held else None, seconds=s)
        report.add(f'{name}: epoch alone, ms a study', 1000 * s['epoch alone, a study'])
    forms = Forms('test_efficientnet', 64, 6, 3, device)
    apart = np.abs(forms.cached(1, 3, dropout=0.).table[['train_loss', 'validation_loss']] - forms.whole(3, False, dropout=0.).table[['train_loss', 'validation_loss']]).to_numpy().max()
    report.add('largest difference of a loss, same crops, three epochs', apart, '<= 1e-5', apart <= 1e-5)
    plot(args.out.with_suffix('.png'), found)
    return report.finish()


if __name__ == '__main__': sys.exit(main())
