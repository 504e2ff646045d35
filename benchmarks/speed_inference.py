"""What does grading cost beside its networks? Whole studies, from files to rows, against the same networks on the same tensors that are already there; and the same answers one slice at a time.

The last is asked twice. In float32 a batch and a single picture part in the last bits; a point that moves by 1e-5 pixels moves some pixels of the 8-bit crops by one grey level, and that is seen in the third
or fourth digit of a probability. In float64 only a difference in what is done would be left.

Every call of a network is written down while studies are graded, with its input. The bare figure is the time that these calls take by themselves, in the same process, threads and batch sizes.
`--data_dir` holds test_images. Repetitions of both are interleaved, the median counts.
"""
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from mscan.folders import find_studies
from mscan.rsna import PROBS
from mscan.submission import load_members, predict_all, predict_found, run_manifests

from ._common import Report, parser

SHARE, NOT_MORE = .6, 1.1   # of the bare throughput; what is faster than its own networks has not been timed
SAME = 1e-6         # largest difference of a probability between a batch and one slice at a time, networks in float64


@contextmanager
def written_down():
    "Yields a list of (module, arguments, keyword arguments) of every outermost call of a module."
    calls, depth = [], [0]

    def before(module, args):
        if not depth[0]: calls.append((module, args))
        depth[0] += 1

    def after(module, args, result): depth[0] -= 1
    hooks = register_module_forward_pre_hook(before), register_module_forward_hook(after)
    try: yield calls
    finally:
        for h in hooks: h.remove()


@contextmanager
def forwards(modules: list, other):
    "Modules with another forward, which `other` makes of their own."
    own = [m.forward for m in modules]
    for m, f in zip(modules, own, strict=True): m.forward = other(f)
    try: yield
    finally:
        for m, f in zip(modules, own, strict=True): m.forward = f


def one_at_a_time(modules: list):
    "Modules that take a batch of pictures take its pictures one by one."
    def alone(forward):
        def run(x, *args): return forward(x, *args) if args or not torch.is_tensor(x) or len(x) < 2 else joined([forward(x[i:i + 1]) for i in range(len(x))])
        return run
    return forwards(modules, alone)


@contextmanager
def in_double(modules: list):
    "Modules compute in float64, and are asked and answer in float32."
    def double(forward):
        def run(x, *args): return cast(forward(x.double(), *args), torch.float32)
        return run
    for m in modules: m.double()
    try:
        with forwards(modules, double): yield
    finally:
        for m in modules: m.float()


def cast(answers, dtype):
    "Tensors, or tuples and dicts of them, in another precision."
    if torch.is_tensor(answers): return answers.to(dtype) if answers.is_floating_point() else answers
    if isinstance(answers, dict): return {k: cast(v, dtype) for k, v in answers.items()}
    return type(answers)(cast(v, dtype) for v in answers) if isinstance(answers, (tuple, list)) else answers


def joined(answers: list):
    "Answers of single pictures as that of a batch; YOLO's are a tuple or dict of tensors."
    first = answers[0]
    if torch.is_tensor(first): return torch.cat(answers)
    if isinstance(first, dict): return {k: joined([a[k] for a in answers]) for k in first}
    if isinstance(first, (tuple, list)): return type(first)(joined([a[k] for a in answers]) for k in range(len(first)))
    return first


def seconds_of(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(argv=None) -> int:
    p = parser('speed_inference', 'What does grading cost beside its networks?', 20)
    p.add_argument('--run_dir', type=Path, default=Path('runs/demo'), help='a finished run')
    p.add_argument('--data_dir', type=Path, default=Path('data/demo'), help='folder with test_images')
    p.add_argument('--device', default='auto')
    p.add_argument('--repeats', type=int, default=5)
    args = p.parse_args(argv)
    found, members = find_studies(args.data_dir, False), load_members(run_manifests(args.run_dir), args.device)
    studies = found.studies[:args.studies]
    grade = lambda s: predict_found(s, found.descriptions, members)
    whole = lambda: list(predict_all(studies, found.descriptions, members))
    with written_down() as calls: rows = pd.concat([grade(s) for s in studies], ignore_index=True)
    done = (lambda: None) if members[0].device.type == 'cpu' else torch.cuda.synchronize

    @torch.inference_mode()
    def bare():
        for module, inputs in calls: module(*inputs)
        done()
    bare()
    times = [(seconds_of(whole), seconds_of(bare)) for _ in range(args.repeats)]
    whole_s, bare_s = (float(np.median(t)) for t in zip(*times, strict=True))
    report = Report('speed_inference', args, f'phantom studies of {args.data_dir.name}, {len(studies)}; networks of {args.run_dir.name}; device {members[0].device}, {torch.get_num_threads()} threads; {args.repeats} repetitions')
    report.add('bare networks / whole, throughput of whole studies', bare_s / whole_s, f'{SHARE} to {NOT_MORE}', SHARE <= bare_s / whole_s <= NOT_MORE, ratios=[b / w for w, b in times])
    report.add('whole, s a study', whole_s / len(studies))
    report.add('bare networks, s a study', bare_s / len(studies), calls=len(calls))
    pictures = list({id(m): m for m, inputs in calls if len(inputs) == 1 and torch.is_tensor(inputs[0]) and inputs[0].dim() == 4}.values())
    grades = lambda rows: rows[list(PROBS)].to_numpy().argmax(1)
    apart = lambda a, b: np.abs(a[list(PROBS)].to_numpy() - b[list(PROBS)].to_numpy()).max()
    everything = lambda: pd.concat([grade(s) for s in studies], ignore_index=True)
    with one_at_a_time(pictures): alone = everything()
    with in_double(pictures):
        exact = everything()
        with one_at_a_time(pictures): exact_alone = everything()
    report.add('largest difference of a probability, one slice at a time, float64', apart(exact, exact_alone), f'<= {SAME}', apart(exact, exact_alone) <= SAME)
    report.add('the same in float32', apart(rows, alone))
    report.add('rows whose source or slices differ', int((rows[['source', 'slices']] != alone[['source', 'slices']]).any(axis=1).sum()), '0', rows[['source', 'slices']].equals(alone[['source', 'slices']]))
    report.add('rows whose likeliest grade differs', int((grades(rows) != grades(alone)).sum()), '0', (grades(rows) == grades(alone)).all())
    report.notes.append(f'{len(pictures)} networks asked for single pictures')
    return report.finish()


if __name__ == '__main__': sys.exit(main())
