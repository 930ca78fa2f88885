"""Make the outputs of executed notebooks fit to be committed: `python .ci/outputs.py nbs/05_experiments.ipynb …`

Progress bars, warnings and widgets without a kernel go; pictures keep 64 colours."""
import base64
import io
import sys

import nbformat
from PIL import Image


def smaller(png: str) -> str:
    "A base64 PNG → the same with a palette, if that is smaller."
    buffer = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB').quantize(64, kmeans=1, dither=Image.Dither.NONE).save(buffer, 'png', optimize=True)
    return min(base64.b64encode(buffer.getvalue()).decode(), png, key=len)


def coarser(jpeg: str) -> str:
    "A base64 JPEG → the same in middling quality, if that is smaller."
    buffer = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(jpeg))).save(buffer, 'jpeg', quality=55, optimize=True)
    return min(base64.b64encode(buffer.getvalue()).decode(), jpeg, key=len)


def fit(notebook):
    for cell in notebook.cells:
        if cell.cell_type != 'code': continue
        cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr' and 'application/vnd.jupyter.widget-view+json' not in o.get('data', {})]
        for output in cell.outputs:
            data = output.get('data', {})
            if 'image/png' in data:
                data['image/png'] = smaller(data['image/png'])
                data.pop('image/jpeg', None)
            elif 'image/jpeg' in data: data['image/jpeg'] = coarser(data['image/jpeg'])
    notebook.metadata.pop('widgets', None)
    return notebook


for path in sys.argv[1:]: nbformat.write(fit(nbformat.read(path, 4)), path)
