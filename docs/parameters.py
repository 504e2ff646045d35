"""Writes the tables of docs/presets.md: every parameter of every stage, from the notebooks' `parameters` cells and the presets' YAML.

    python docs/parameters.py            # rewrites the part between the markers
    python docs/parameters.py --check    # exit code 1 where the page is not current
"""
import io
import sys
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


def current(text: str) -> str:
    "The page with its tables as they should be."
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return '\n'.join([before + BEGIN, '', *tables()]) + END + after


if __name__ == '__main__':
    old = PAGE.read_text(encoding='utf-8')
    new = current(old)
    if '--check' in sys.argv: sys.exit(f'{PAGE.name} is not current: python docs/parameters.py' if new != old else 0)
    PAGE.write_text(new, encoding='utf-8')
