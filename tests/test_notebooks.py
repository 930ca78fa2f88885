"""Notebooks are the source: clean, in step with t2i/ and README.md, and free of what belongs to one machine."""
import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from t2i.benchmarks import RESULTS, speed_markdown
from t2i.core import EXHIBITS, exhibit_path, table_markdown

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (REPOSITORY/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
CHAPTERS = [p for p in NOTEBOOKS if re.match(r'0[1-9]_', p.name)]
# a module imports from rows above its own only
LAYERS = [['core', 'readers', 'convolution', 'colours'], ['data'], ['plots', 'train', 'metrics', 'diffusion', 'benchmarks'], ['clip'], ['guidance', 'sampling', 'image_guidance', 'judge'], ['unet', 'composed'],
          ['diagrams', 'checkpoints', 'costs'], ['decoder', 'translator', 'classifier'], ['upsampler'], ['pipeline'], ['experiments', 'clip_algebra', 'own_data'], ['cli']]

def name(path): return str(path.relative_to(REPOSITORY))
def read(path): return json.loads(path.read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def remade(tmp_path_factory):
    "A copy of the repository in which nbdev cleaned the notebooks and exported the modules again."
    copy = tmp_path_factory.mktemp('copy')
    for file in ('settings.ini', 'pyproject.toml'): shutil.copy(REPOSITORY/file, copy)
    shutil.copytree(REPOSITORY/'nbs', copy/'nbs', ignore=shutil.ignore_patterns('.*', 'figures'))
    shutil.copytree(REPOSITORY/'t2i', copy/'t2i', ignore=shutil.ignore_patterns('__pycache__', 'assets'))
    code = 'from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()'
    done = subprocess.run([sys.executable, '-c', code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy


def test_modules_are_what_the_notebooks_export(remade):
    here, there = ({p.name: p.read_text(encoding='utf-8') for p in (top/'t2i').glob('*.py')} for top in (REPOSITORY, remade))
    assert sorted(here) == sorted(there)
    assert not [k for k in here if here[k] != there[k]], 'run nbdev_export'


def test_notebooks_are_clean(remade):
    assert not [name(p) for p in NOTEBOOKS if p.read_bytes() != (remade/name(p)).read_bytes()], 'run nbdev_clean'


@pytest.mark.parametrize('path', CHAPTERS, ids=name)
def test_chapters_have_one_cell_of_parameters(path):
    tagged = [c for c in read(path)['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    tree = ast.parse(''.join(tagged[0]['source']))
    assert all(isinstance(s, ast.Assign) for s in tree.body), 'papermill needs plain assignments'
    assert {'preset', 'seed', 'device', 'out_dir'} <= {t.id for s in tree.body for t in s.targets}


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_notebooks_run_anywhere(path):
    notebook = read(path)
    assert notebook['metadata']['kernelspec']['name'] == 'python3'
    local = re.compile(r'(?<![\w.])/(?:home|root|work|tmp|Users|content|mnt|opt|usr)/[\w.]')
    for cell in notebook['cells']:
        texts = [''.join(cell['source'])]
        for output in cell.get('outputs', []):
            assert output['output_type'] != 'error', ''.join(cell['source'])
            texts += [''.join(v) for k, v in [('', output.get('text', '')), *output.get('data', {}).items()] if not k.startswith('image')]
        for text in texts: assert not local.search(text), local.search(text)
        assert not re.search(r'\binteract\(', texts[0]), "interact_manual instead: what interact draws at once makes papermill send to the kernel, and now and then it then waits for ever"


def test_notebooks_and_figures_stay_small():
    assert sum(p.stat().st_size for p in NOTEBOOKS + list((REPOSITORY/'figures').glob('*/*')) if 'smoke' not in p.parts) < 6e6


def exhibits_named_by(path):
    "The thesis's numbers that occur as strings in the cells that save figures or tables."
    sources = [''.join(c['source']) for c in read(path)['cells'] if c['cell_type'] == 'code']
    trees = [ast.parse(s) for s in sources if 'save_figure(' in s or 'save_table(' in s]
    return {n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in EXHIBITS}


def test_every_figure_and_table_of_the_thesis_has_one_owner_and_a_file():
    owners = {number: [p.stem for p in CHAPTERS if number in exhibits_named_by(p)] for number in EXHIBITS}
    assert len(EXHIBITS) == 29
    assert not [number for number, found in owners.items() if not found], 'no notebook saves these'
    assert not {number: found for number, found in owners.items() if found != [EXHIBITS[number].notebook]}
    paths = {n: [exhibit_path(n, 'emoji', suffix=s) for s in e.suffixes] for n, e in EXHIBITS.items()}
    assert not [n for n, files in paths.items() if not all(p.is_file() for p in files)], 'these have no file: run the notebook that makes them'
    for number, (path, *_) in paths.items():
        if path.suffix != '.png': continue
        texts = Image.open(path).text
        assert texts['Title'].startswith(f'Figure {number}: ') and texts['Source'] == f'nbs/{EXHIBITS[number].notebook}.ipynb'
        assert texts['Description'] and json.loads(texts['Comment'])['preset'] == 'emoji'


def test_imports_go_one_way():
    level = {module: i for i, row in enumerate(LAYERS) for module in row}
    for path in (REPOSITORY/'t2i').glob('*.py'):
        if path.stem.startswith('_'): continue
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.ImportFrom): continue
            module = node.module if node.level else (node.module.split('.')[1] if node.module.startswith('t2i.') else None)
            if module: assert level[module] < level[path.stem], f'{path.stem} imports {module}'


def test_readme_is_the_index():
    spec = importlib.util.spec_from_file_location('readme', REPOSITORY/'.ci/readme.py')
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    text, pictures = readme.render()
    assert (REPOSITORY/'README.md').read_text(encoding='utf-8') == text, 'run python .ci/readme.py'
    assert {name(p): p.read_bytes() for p in (REPOSITORY/readme.PICTURES).glob('*')} == pictures, 'run python .ci/readme.py'
    assert speed_markdown() in text and table_markdown(pd.read_csv(RESULTS/'table_5_1.csv', dtype=str, keep_default_na=False)) in text, 'run papermill nbs/index.ipynb'
    links = {m for m in re.findall(r'\]\(([^)#]+)\)', text) if not m.startswith('http')}
    assert not [link for link in links if not (REPOSITORY/link).exists()]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_links_lead_to_files(path):
    "From where a notebook is, and from figures/, where papermill puts what it makes of a chapter. (JupyterLab opens no folder.)"
    text = '\n'.join(''.join(c['source']) for c in read(path)['cells'] if c['cell_type'] == 'markdown')
    links = {m for m in re.findall(r'\]\(([^)#]+)', text) if not m.startswith('http')}
    assert not [link for link in links for place in [path.parent] + [REPOSITORY/'figures']*(path in CHAPTERS) if not (place/link).is_file()]
