"""Writes README's tables of results from what `make proof` left behind: scores (RUN/proof/table.md of mscan_evaluate), places (sides.json) and missing series (missing.json of the benchmarks). No figure is typed by hand.

    python docs/results.py --run_dir runs/demo    # then `make docs`, for the pages that copy from README
"""
import argparse
import json
from pathlib import Path

from parameters import between

ROOT = Path(__file__).resolve().parents[1]
MADE_BY = 'python docs/results.py: {} is absent; `make proof` makes it'


def sections(text: str) -> dict:
    "Heading -> rows of the table below it, each a list of cells."
    found, name = {}, ''
    for line in text.split('\n'):
        if line.startswith('#'): name = line.strip('# ')
        elif line.startswith('|') and not set(line) <= set('|-: '): found.setdefault(name, []).append([c.strip() for c in line.strip('|').split('|')])
    return found


def table(rows: list) -> list:
    "Lines of markdown; the first row is the head."
    head, *rest = rows
    line = lambda cells: '| ' + ' | '.join(cells) + ' |'
    return [line(head), '|' + '---|' * len(head), *map(line, rest)]


def scores(text: str) -> list:
    "The parts of the score, and every condition, side and level with its AUROC: the tables of `mscan_evaluate --markdown`."
    studies, found = text.split(' ', 1)[0], sections(text)
    only = lambda words: next(rows for name, rows in found.items() if name.startswith(words))
    parts, cells, areas = only('parts of the score'), only('weighted log loss'), {r[0]: r[-1] for r in only('labelled rows')}
    first = [[f'on {studies} held-out phantom studies', 'M-SCAN, both sides', 'prior', 'less the prior, paired'], *parts[1:]]
    second = [['weighted log loss / the prior\'s', *cells[0][1:], 'binary AUROC'], *([*r, areas[r[0]]] for r in cells[1:])]
    return [*table(first), '', *table(second)]


def figures(file: Path) -> dict:
    "Name -> figure of a benchmark's report."
    return {f['figure']: f for f in json.loads(file.read_text(encoding='utf-8'))['figures']}


def interval(figure: dict, digits: int, sign='') -> str:
    "A value with its 95 % interval."
    value, low, high = (f'{figure[k]:{sign}.{digits}f}' for k in ('value', 'low', 'high'))
    return f'{value} [{low}, {high}]'


def places(of: dict) -> list:
    "Where foramina and recesses are found, beside a fixed offset: of `benchmarks.sides`."
    slices = lambda way: f"{interval(of[f'foramen, {way}: within one slice'], 2)}; {interval(of[f'foramen, {way}: exact slice'], 2)}"
    middle = lambda what, way: interval(of[f'{what}, {way}: median in plane, mm'], 1)
    rows = [['', 'found', 'fixed offset from the canal point'], ['foramen: within one slice; exact slice', slices('network'), slices('offset')]]
    for name, what in (('foramen, in the slice, median mm', 'foramen'), ('recess, in the slice, median mm', 'recess'), ('the same where the canal point is 4 mm astray', 'recess, canal astray')):
        rows.append([name, middle(what, 'network'), middle(what, 'offset')])
    return table(rows)


WAYS = (('sagittal T1', 'no sagittal T1', 'other contrast', 'foramina'), ('axial T2', 'no axial T2', 'graded rows', 'recesses'),
        ('sagittal T2', 'no sagittal T2', 'prior: no level is found without it', ''), ('all but one of several axial series', 'one of several axial series', 'model', ''))
RUNGS = {'foramina': 'no sagittal T1, on T2 - graded rows in its place: foraminal', 'recesses': 'no axial T2, ladder - prior in its place: subarticular'}


def missing(of: dict) -> list:
    "What a missing series costs: of `benchmarks.missing`."
    rows = [['missing', 'score', 'less that of the whole study, paired', 'rung of the rows that it showed', 'that rung against the next one, on those rows']]
    for name, way, rung, part in WAYS:
        few = f" ({of[f'{way}: score']['studies']} studies)" if 'several' in way else ''
        rows.append([name + few, interval(of[f'{way}: score'], 2), interval(of[f'{way} - whole: score'], 3, '+'), rung, f'{part} {interval(of[RUNGS[part]], 2, "+")}' if part else ''])
    return table(rows)


def filled(text: str, run_dir: Path, benchmarks: Path) -> str:
    "README with the tables of a run; raises FileNotFoundError where one was not made."
    sources = dict(proof=(run_dir / 'proof/table.md', lambda f: scores(f.read_text(encoding='utf-8'))), places=(benchmarks / 'sides.json', lambda f: places(figures(f))), missing=(benchmarks / 'missing.json', lambda f: missing(figures(f))))
    for name, (file, lines) in sources.items():
        if not file.exists(): raise FileNotFoundError(MADE_BY.format(file.name))
        text = between(text, f'<!-- {name} -->', f'<!-- /{name} -->', [*lines(file), ''])
    return text


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--run_dir', type=Path, default=ROOT / 'runs/demo', help='of `make proof`')
    p.add_argument('--benchmarks', type=Path, default=ROOT / 'runs/benchmarks', help='where the benchmarks left their JSON')
    args = p.parse_args(argv)
    readme = ROOT / 'README.md'
    readme.write_text(filled(readme.read_text(encoding='utf-8'), args.run_dir, args.benchmarks), encoding='utf-8')


if __name__ == '__main__': main()
