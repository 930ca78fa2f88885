"""Make the outputs of executed notebooks fit to be committed: `python .ci/outputs.py nbs/05_experiments.ipynb …`

Progress bars, warnings and widgets without a kernel go; pictures keep 64 colours, or become JPEG where that is smaller."""
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


def coarser(picture: str, quality: int) -> str:
    "A base64 picture → a JPEG of this quality, if that is smaller."
    buffer = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).convert('RGB').save(buffer, 'jpeg', quality=quality, optimize=True)
    return min(base64.b64encode(buffer.getvalue()).decode(), picture, key=len)


def fit(notebook):
    for cell in notebook.cells:
        if cell.cell_type != 'code': continue
        cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr' and 'application/vnd.jupyter.widget-view+json' not in o.get('data', {})]
        for output in cell.outputs:
            data = output.get('data', {})
            if 'image/png' in data:
                drawn = data.pop('image/png')
                png, jpeg = smaller(drawn), coarser(drawn, 65)
                data.pop('image/jpeg', None)  # a PIL picture shows itself as both
                data |= {'image/jpeg': jpeg} if len(jpeg) < 0.9*len(png) else {'image/png': png}
            elif 'image/jpeg' in data: data['image/jpeg'] = coarser(data['image/jpeg'], 55)
    notebook.metadata.pop('widgets', None)
    return notebook


for path in sys.argv[1:]: nbformat.write(fit(nbformat.read(path, 4)), path)
