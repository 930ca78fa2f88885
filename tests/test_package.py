"""The wheel alone, beside its dependencies, is a working package."""
import os
import shutil
import subprocess
import sys
import zipfile

import pytest


def run(*command, cwd, **env):
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def wheel(repository, tmp_path_factory):
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')  # building leaves files in the source
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'NOTICE', 'README.md'): shutil.copy(repository/name, source)
    shutil.copytree(repository/'t2i', source/'t2i', ignore=shutil.ignore_patterns('__pycache__'))
    run('-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--quiet', '--wheel-dir', str(out), '.', cwd=source)
    return next(out.glob('t2i-*.whl'))


def test_wheel_has_code_presets_assets_and_licences(wheel, repository):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (repository/'t2i').rglob('*'):
        if path.is_file() and '__pycache__' not in path.parts and not path.name.startswith('.'):
            assert path.relative_to(repository).as_posix() in names
    for name in ('LICENSE', 'NOTICE'): assert any(n.endswith('/' + name) and '.dist-info/' in n for n in names)
    assert not [n for n in names if not n.startswith(('t2i/', 't2i-'))]


def test_wheel_works_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path/'site', tmp_path/'empty'
    empty.mkdir()
    run('-m', 'pip', 'install', '--no-deps', '--quiet', '--target', str(site), str(wheel), cwd=tmp_path)
    out = run('-c', '''
import t2i
from t2i.core import preset_names
from t2i.data import decode_image, load_emoji
from t2i.pipeline import TextToImage
print(t2i.__file__)
assert preset_names() == ['emoji', 'smoke', 'thesis']
assert decode_image(load_emoji('test').image[0]).size == (64, 64)
picture, = TextToImage.from_preset('smoke')('a red apple, noto style', generator=1)
assert picture.size == (64, 64)
''', cwd=empty, PYTHONPATH=str(site))
    assert out.strip() == str(site/'t2i/__init__.py')
    run('-m', 'typer', 't2i.cli', 'run', 'generate', 'a red apple', '--preset', 'smoke', '-n', '2', '--seed', '1', '--out', 'apples.png', cwd=empty, PYTHONPATH=str(site))
    assert [p.name for p in empty.iterdir()] == ['apples.png']
