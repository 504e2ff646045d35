"""Writes what pages take from elsewhere: every parameter of every stage into docs/presets.md (from the notebooks' `parameters` cells and the presets' YAML), and README's table of results into docs/model-card.md.

    python docs/parameters.py    # rewrites what stands between the markers
"""
import io
import tokenize
from pathlib import Path

from mscan.runner import find_stages, read_preset
from mscan.runs import find_nbs, notebook_cells

PAGE = Path(__file__).resolve().parent / 'presets.md'
BEGIN, END = '<!-- parameters: written by docs/parameters.py -->', '<!-- /parameters -->'
PRESETS = ('canal', 'demo', 'science', 'paper', 'rsna')   # smoke sets nothing: it is the defaults
PLACES = ('run_dir', 'data_dir')                          # set by the options of that name, in every stage alike


def meanings(notebook) -> dict:
    "The comment behind each parameter of a notebook."
    source = next(s for s, tags in notebook_cells(notebook) if 'parameters' in tags)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type in (tokenize.NAME, tokenize.COMMENT)]
    first = {}
    for t in tokens:
        if t.type == tokenize.NAME: first.setdefault(t.start[0], t.string)
    return {first[t.start[0]]: t.string.lstrip('# ') for t in tokens if t.type == tokenize.COMMENT and t.start[0] in first}


def shown(value) -> str:
    "A value as one writes it behind -p."
    text = str(value).lower() if isinstance(value, bool) else '""' if value == '' else f'{value:g}' if isinstance(value, float) else str(value)
    return f'`{text}`'


def in_presets(stage: str, name: str, default, presets: dict) -> str:
    "The presets that set a parameter to something else, equal values together."
    said = {}
    for preset, values in presets.items():
        value = values.get(stage, {}).get(name, values.get('all', {}).get(name, default))
        if value != default: said.setdefault(shown(value), []).append(preset)
    return '; '.join(f'{", ".join(who)}: {value}' for value, who in said.items())


def tables() -> list:
    "Lines of markdown, a table a stage."
    presets, lines = {p: read_preset(p) for p in PRESETS}, []
    for stage, declared in find_stages().items():
        means = meanings(find_nbs() / f'{stage}.ipynb')
        lines += [f'### {stage}', '', '| parameter | default | other values in presets | meaning |', '|---|---|---|---|']
        for name, default in declared.items():
            if name in PLACES: continue
            cells = (f'`{name}`', shown(default), in_presets(stage, name, default, presets), means.get(name, ''))
            lines.append('| ' + ' | '.join(c.replace('|', '\\|') for c in cells) + ' |')
        lines.append('')
    return lines


def between(text: str, begin: str, end: str, lines: list) -> str:
    "A text with other lines between two markers; raises ValueError where one is absent."
    if text.count(begin) != 1 or text.count(end) != 1: raise ValueError(f'there is no one place between {begin} and {end}')
    before, _, rest = text.partition(begin)
    return '\n'.join([before + begin, '', *lines]) + end + rest.partition(end)[2]


def readme_tables(marker: str) -> list:
    "Lines of README between two markers."
    readme = (PAGE.parents[1] / 'README.md').read_text(encoding='utf-8')
    return readme.split(f'<!-- {marker} -->')[1].split(f'<!-- /{marker} -->')[0].strip().split('\n')


def card(text: str) -> str:
    "The model card with the first table of README's proof."
    lines = readme_tables('proof')
    return between(text, COPIED, END_COPIED, [*lines[:lines.index('')], ''])


COPIED, END_COPIED = '<!-- copied from README by docs/parameters.py -->', '<!-- /copied -->'
WRITERS = {PAGE: lambda text: between(text, BEGIN, END, tables()), PAGE.with_name('model-card.md'): card}   # page -> what it should be


if __name__ == '__main__':
    stale = []
    for page, write in WRITERS.items():
        old = page.read_text(encoding='utf-8')
        if write(old) != old: stale.append(page.name); page.write_text(write(old), encoding='utf-8')
    print('\n'.join(f'rewritten: {name}' for name in stale) or 'all current')
