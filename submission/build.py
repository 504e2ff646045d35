"""Packs what goes to Kaggle: a data set (wheels, stage notebooks, the weights of a finished run) and two notebooks with their metadata.

    python -m submission.build --run_dir runs/mine --out dist_kaggle --user <your Kaggle name>

Nothing is uploaded. See README.md beside this file.
"""
import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import yaml

from mscan.kaggle import list_contents
from mscan.runs import MANIFEST, RunError, file_hash, read_manifest, resolve
from mscan.session import adopt
from mscan.submission import GRADING, member_runs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
COMPETITION = 'rsna-2024-lumbar-spine-degenerative-classification'
PYTHONS = '3.11,3.12'   # of the wheels that are compiled; Kaggle's image has been 3.11 and is 3.12
PLATFORMS = ('manylinux_2_28_x86_64', 'manylinux_2_17_x86_64', 'manylinux2014_x86_64')
DESCRIPTION = ('Wheels and weights of mscan, for a notebook without internet. mscan is Apache-2.0; ultralytics and ultralytics-thop are AGPL-3.0; '
               'the other wheels are under the licences that they carry. For research, not for diagnosis.')


def read_image(path=HERE / 'image.yaml') -> SimpleNamespace:
    "What the image is taken to hold, and what is brought: image {names: floor}, seen {names: version}, brought, unused."
    known = yaml.safe_load(path.read_text(encoding='utf-8'))
    return SimpleNamespace(image={n: v['floor'] for n, v in known['image'].items()}, seen={n: v['seen'] for n, v in known['image'].items()}, brought=known['brought'], unused=known['unused'])


def locked(
    names: list,  # packages
    lock=ROOT / 'requirements.lock',
) -> dict:        # name -> its lines, exact version and hashes
    "The lock's lines of some packages. Raises RunError for one that it lacks."
    entries = {re.match(r'[\w.-]+', e)[0]: e.rstrip().removesuffix('\\').rstrip() for e in re.split(r'\n(?=[A-Za-z0-9])', Path(lock).read_text(encoding='utf-8')) if not e.startswith('#')}
    missing = [n for n in names if n not in entries]
    if missing: raise RunError(f'requirements.lock has no {missing[0]}: correct submission/image.yaml, or add it to settings.ini and `make lock`')
    return {n: entries[n] for n in names}


def pip(*args):
    done = subprocess.run([sys.executable, '-m', 'pip', '--disable-pip-version-check', *map(str, args)], capture_output=True, text=True)
    if done.returncode: raise RunError(f'pip {args[0]} failed: {(done.stderr.strip() or done.stdout.strip())[-1500:]}')


def fetch_wheels(
    folder,        # gets the wheels
    names: list,   # of packages in the lock
    pythons: list, # such as '3.12'
):
    "Download wheels, each checked against the lock's hashes, and none that they depend on. Raises RunError where pip fails."
    with tempfile.TemporaryDirectory() as tmp:
        wanted = Path(tmp) / 'wanted.txt'
        wanted.write_text('\n'.join(locked(names).values()) + '\n')
        for version in pythons:
            pip('download', '--quiet', '--no-deps', '--require-hashes', '--only-binary=:all:', '--python-version', version, '--implementation', 'cp',
                *(x for p in PLATFORMS for x in ('--platform', p)), '--dest', folder, '--requirement', wanted)


def project_wheel(folder):
    "Build the project's own wheel, from a copy, so that no build folder is left behind."
    with tempfile.TemporaryDirectory() as tmp:
        for name in ('setup.py', 'settings.ini', 'README.md', 'LICENSE'): shutil.copy(ROOT / name, tmp)
        shutil.copytree(ROOT / 'mscan', Path(tmp) / 'mscan', ignore=shutil.ignore_patterns('__pycache__'))
        pip('wheel', '--quiet', '--no-deps', '--no-index', '--no-build-isolation', '--wheel-dir', folder, tmp)


TABLES = ('prior', 'conditional')   # products that are no networks, and that grading opens


def weight_products(manifest, kind='') -> list:
    "Names of a stage's products that grading opens: networks with their cards (of the encoders those of one kind), and the fallback's tables."
    paths = {p['path']: n for n, p in manifest.products.items()}
    nets = [p for p in paths if p.endswith('.safetensors') and (not p.startswith('encoder_') or p.startswith(f'encoder_{kind}'))]
    return [paths[p] for net in nets for p in (net, net.removesuffix('safetensors') + 'json')] + [n for n in manifest.products if n in TABLES]


def copy_weights(
    run_dir,      # a finished run, or a folder of folds
    folder,       # gets the same, with no more than grading needs
) -> int:         # bytes
    "Copy manifests, networks and the fallback's tables. Raises RunError for a stage that is not finished, a file that its manifest does not know so, weights in another form."
    run_dir, total = resolve(run_dir), 0
    for k, run in enumerate(member_runs(run_dir)):
        grader = read_manifest(run, '42_grading').dir / 'grader_0.json'
        kind = f"{json.loads(grader.read_text(encoding='utf-8'))['features']}_" if grader.exists() else ''     # the graders read the features of these encoders alone
        for stage in GRADING:
            manifest = read_manifest(run, stage)
            place = Path(folder) / run.relative_to(run_dir) / stage
            place.mkdir(parents=True)
            shutil.copy(manifest.dir / MANIFEST, place)
            folds = ['studies'] if stage == '10_prepare' and k == 0 and run != run_dir else []     # how many folds there are
            for name in weight_products(manifest, kind) + folds:
                source, product = manifest.path(name), manifest.products[name]
                if file_hash(source) != product['sha256']: raise RunError(f'{source} is not the file that {stage} wrote: its hash differs from the manifest; run that stage again')
                target = place / product['path']
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
                total += product['bytes']
    return total


def check_loads(run_dir):
    "Load every network of the copied run, as grading will. Raises what loading raises."
    from mscan.grading import load_models
    for run in member_runs(run_dir): load_models({s: read_manifest(run, s) for s in GRADING})


def copy_notebooks(folder):
    "The stage notebooks without outputs, for training."
    Path(folder).mkdir()
    for path in sorted((ROOT / 'nbs').glob('*.ipynb')):
        nb = json.loads(path.read_text(encoding='utf-8'))
        for c in nb['cells']:
            if c['cell_type'] == 'code': c.update(outputs=[], execution_count=None)
        (Path(folder) / path.name).write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')


def fill_template(
    name: str,     # inference.ipynb, training.ipynb
    folder,        # gets it
    **values,      # parameters with another value than the template's
):
    "A notebook from its template, with values in its parameters cell. Raises RunError for one that it does not declare."
    nb = json.loads((HERE / name).read_text(encoding='utf-8'))
    cell = next(c for c in nb['cells'] if 'parameters' in c['metadata'].get('tags', []))
    text = ''.join(cell['source'])
    for key, value in values.items():
        text, n = re.subn(rf"^({key} = )('[^']*'|[\w.]+)", lambda m: m[1] + repr(value), text, flags=re.M)      # noqa: B023
        if n != 1: raise RunError(f'{name} declares no parameter {key}')
    cell['source'] = text
    (Path(folder) / name).write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def write_metadata(path, **fields): Path(path).write_text(json.dumps(fields, indent=2) + '\n', encoding='utf-8')


def kernel(
    folder, user: str, title: str,
    code_file: str, dataset: str, competition: str,
    earlier=(),     # titles of kernels whose output it reads
):
    "kernel-metadata.json, the fields and spellings of Kaggle's client (docs/kernels_metadata.md): booleans are strings, the slug is the title with dashes."
    slug = lambda t: f"{user}/{t.lower().replace(' ', '-')}"
    write_metadata(Path(folder) / 'kernel-metadata.json', id=slug(title), title=title, code_file=code_file, language='python', kernel_type='notebook', is_private='true', enable_gpu='true', enable_tpu='false',
                   enable_internet='false', machine_shape='NvidiaTeslaT4', dataset_sources=[f'{user}/{dataset}'], competition_sources=[competition], kernel_sources=[slug(t) for t in earlier], model_sources=[])


def build_dataset(folder, run_dirs: list, user: str, name: str, pythons: list, wheels=None, check=True):
    "The data set's folder. Without a run it serves for training only."
    folder, known = Path(folder), read_image()
    (folder / 'wheels').mkdir(parents=True)
    if wheels: [shutil.copy(w, folder / 'wheels') for w in sorted(Path(wheels).glob('*.whl'))]
    else: fetch_wheels(folder / 'wheels', known.brought, pythons)
    project_wheel(folder / 'wheels')
    copy_notebooks(folder / 'nbs')
    if run_dirs:
        with tempfile.TemporaryDirectory() as tmp:
            run_dir = run_dirs[0]
            if len(run_dirs) > 1: adopt(run_dir := Path(tmp) / 'run', run_dirs)        # outputs of several sessions
            copy_weights(run_dir, folder / 'run')
        if check: check_loads(folder / 'run')
    install = sorted({'=='.join(w.name.split('-')[:2]) for w in (folder / 'wheels').glob('*.whl')})
    if len({i.split('==')[0] for i in install}) != len(install): raise RunError(f'two versions of one package: {install}')
    list_contents(folder, install=install, image=known.image)
    write_metadata(folder / 'dataset-metadata.json', title=name.replace('-', ' '), id=f'{user}/{name}', subtitle='Wheels and weights of mscan for offline notebooks', description=DESCRIPTION, licenses=[dict(name='other')])


def build(args):
    "Everything, into an empty folder that replaces the old one at the end."
    out = Path(args.out)
    if out.exists() and not (out / 'dataset' / 'dataset-metadata.json').exists(): raise RunError(f'{out} is there and was not made by this command: name another folder')
    fresh = out.with_name(out.name + '.partial')
    shutil.rmtree(fresh, ignore_errors=True)
    build_dataset(fresh / 'dataset', args.run_dir, args.user, args.name, args.python.split(','), args.wheels)
    title = args.name.replace('-', ' ')
    if args.run_dir:
        (fresh / 'inference').mkdir()
        fill_template('inference.ipynb', fresh / 'inference', budget_hours=args.budget_hours)
        kernel(fresh / 'inference', args.user, f'{title} inference', 'inference.ipynb', args.name, args.competition)
    for k in range(1, args.sessions + 1):
        place = fresh / f'training-{k}'
        place.mkdir()
        fill_template('training.ipynb', place, preset=args.preset, settings=args.settings)
        kernel(place, args.user, f'{title} training {k}', 'training.ipynb', args.name, args.competition, [f'{title} training {j}' for j in range(1, k)])
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    return out


def parser():
    p = argparse.ArgumentParser(prog='python -m submission.build', description='Pack a data set and notebooks for Kaggle; nothing is uploaded.')
    p.add_argument('--run_dir', action='append', default=[], help='a finished run or a folder of folds; repeated: outputs of training sessions that make up one run; none: for training only')
    p.add_argument('--out', default='dist_kaggle', help='folder, replaced if this command made it (default: dist_kaggle)')
    p.add_argument('--user', default='your-kaggle-name', help='your Kaggle name, as in the address of your profile')
    p.add_argument('--name', default='mscan-lumbar', help='of the data set, and first words of the notebooks (default: mscan-lumbar)')
    p.add_argument('--competition', default=COMPETITION, help=f'its short name (default: {COMPETITION})')
    p.add_argument('--budget_hours', type=float, default=8.5, help='of the inference notebook (default: 8.5 of the 9 hours that the competition allows)')
    p.add_argument('--sessions', type=int, default=3, help='training notebooks to prepare, each reading the output of those before it (default: 3)')
    p.add_argument('--preset', default='paper', help='of the training notebooks (default: paper)')
    p.add_argument('--settings', default='', help="further settings of the training notebooks, as in 'pretrained none; 20_keypoints.epochs 3'")
    p.add_argument('--python', default=PYTHONS, help=f'versions of Python for which compiled wheels are brought (default: {PYTHONS})')
    p.add_argument('--wheels', help='folder of wheels already fetched, instead of downloading them')
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    if not re.fullmatch('[a-z0-9-]{6,40}', args.name): sys.exit(f'--name {args.name}: 6 to 40 small letters, digits and dashes, as Kaggle takes them')
    try: out = build(args)
    except (ValueError, OSError) as e: sys.exit(f'submission.build: {e}')
    size = sum(p.stat().st_size for p in (out / 'dataset').rglob('*') if p.is_file())
    print(f"{out}: data set of {size / 1e6:.1f} MB, notebooks {', '.join(sorted(p.parent.name for p in out.glob('*/kernel-metadata.json')))}")
    print('\n'.join(['Next (needs your account and `pip install kaggle`):', f'  kaggle datasets create -p {out}/dataset --dir-mode zip --keep-tabular', *([f'  kaggle kernels push -p {out}/inference'] if args.run_dir else [f'  kaggle kernels push -p {out}/training-1'])]))


if __name__ == '__main__': main()
