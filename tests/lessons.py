"Run the lessons of notebooks and store what they show: `python tests/lessons.py [name ...]`. Run parts (`#| eval: false`) are left alone. Not a test."
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NBS = Path(__file__).resolve().parents[1] / 'nbs'
os.environ.setdefault('OMP_NUM_THREADS', '1')

for path in [NBS / f'{n}.ipynb' for n in sys.argv[1:]] or sorted(NBS.glob('*.ipynb')):
    notebook = nbformat.read(path, as_version=4)
    lessons = nbformat.from_dict(dict(notebook))
    lessons.cells = [c for c in notebook.cells if c.cell_type == 'code' and not re.search(r'^#\|\s*eval:\s*false', c.source, re.M)]   # shared with `notebook`
    NotebookClient(lessons, timeout=600, kernel_name='python3', resources=dict(metadata=dict(path=str(NBS)))).execute()
    for cell in notebook.cells:
        if cell.cell_type != 'code': continue
        cell.execution_count, cell.outputs = None, [o for o in cell.outputs if not (o.output_type == 'stream' and o.name == 'stderr') and 'application/vnd.jupyter.widget-view+json' not in o.get('data', {})]   # a widget without its state is an error message
        cell.metadata.pop('execution', None)
        for o in cell.outputs:
            if 'execution_count' in o: o.execution_count = None
    nbformat.write(notebook, path)
    print('lessons stored:', path.name)
