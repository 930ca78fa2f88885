"""Write README.md, and the pictures in it, from nbs/index.ipynb: `python .ci/readme.py`."""
import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

REPOSITORY = Path(__file__).resolve().parents[1]
PICTURES = 'figures/index'


def from_top(source: str) -> str:
    "Links of a notebook in nbs/ as they are from the top of the repository."
    return re.sub(r'(\]\(|src=")(?!https?:|#)([^)"]+)', lambda m: m[1] + posixpath.normpath('nbs/' + m[2]), source)


def render(path: Path = REPOSITORY/'nbs/index.ipynb') -> tuple:
    "→ (Markdown, {path of a picture from the top of the repository: its bytes}). A cell tagged hide-input shows its output alone."
    notebook = nbformat.read(path, 4)
    notebook.metadata.language_info = {'name': 'python'}  # nbdev_clean removes it
    for cell in notebook.cells:
        if cell.cell_type == 'markdown':
            cell.source = from_top(cell.source)
            continue
        cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
        for output in cell.outputs:
            if 'text/markdown' in output.get('data', {}): output.data['text/markdown'] = from_top(output.data['text/markdown'])
    config = Config()
    config.ExtractOutputPreprocessor.output_filename_template = PICTURES + '/{cell_index}_{index}{extension}'
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = {'hide-input'}
    config.MarkdownExporter.preprocessors = ['nbconvert.preprocessors.TagRemovePreprocessor']
    text, resources = MarkdownExporter(config=config).from_notebook_node(notebook)
    text = '\n'.join(line.rstrip() for line in text.splitlines())
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', resources.get('outputs', {})


if __name__ == '__main__':
    text, pictures = render()
    for old in (REPOSITORY/PICTURES).glob('*'): old.unlink()
    for name, data in pictures.items():
        (REPOSITORY/name).parent.mkdir(parents=True, exist_ok=True)
        (REPOSITORY/name).write_bytes(data)
    (REPOSITORY/'README.md').write_text(text, encoding='utf-8')
