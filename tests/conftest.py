"""What several tests share."""
import json
import os
import subprocess
import sys
import threading

os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('OMP_NUM_THREADS', '1')  # pytest has several processes, and their threads would wait for one another
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')  # a process that computed on the CPU cannot train on a GPU too; some tests pretend to have some
os.environ.setdefault('T2I_PRECISION', 'float32')  # the same numbers on every machine; of bfloat16 is what asks for it

from pathlib import Path

import pytest
from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # its own lock is shared with forked processes, and one that is killed while it holds it would stop this one for ever
tqdm.monitor_interval = 0  # no thread may hold the lock while another forks


@pytest.fixture(scope='session')
def repository(): return Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def pipe():
    from t2i.pipeline import TextToImage
    return TextToImage.from_preset('smoke', device='cpu')


@pytest.fixture(scope='session')
def tiny_models(tmp_path_factory):
    "open_clip knows the tiny models of `stand_ins`."
    import open_clip
    from stand_ins import CLIPS, register_clips
    folder = tmp_path_factory.mktemp('configs')
    register_clips(folder)
    yield folder
    for name in CLIPS: open_clip.pretrained._PRETRAINED.pop(name)


@pytest.fixture
def ship(monkeypatch):
    "A function: the emoji in a folder take the place of those that ship, for this test, and nothing that is known of either is kept."
    from t2i import data
    def forget():
        for known in (data.keyword_concepts, data.emoji_names, data.emoji_pattern): known.cache_clear()
    def replace(folder):
        monkeypatch.setattr(data, 'SHARDS', folder)
        forget()
    yield replace
    forget()


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr('open_clip.download_pretrained', lambda *a, **k: (_ for _ in ()).throw(OSError('no network')))


@pytest.fixture(scope='session')
def small(tmp_path_factory):
    "The path of a small preset of the structure of `thesis`."
    from stand_ins import PRESET
    path = tmp_path_factory.mktemp('preset')/'small.toml'
    path.write_text(PRESET)
    return path


@pytest.fixture(scope='session')
def published(small, tmp_path_factory, tiny_models):
    "A folder with the authors' seven files and OpenAI's CLIP."
    from stand_ins import save_published
    folder = tmp_path_factory.mktemp('published')
    save_published(folder, small)
    return folder


@pytest.fixture(scope='session')
def fidelity():
    "torch-fidelity's own command line as a function: arguments → its numbers. It runs in a process of its own, in which `import t2i.metrics` has made our extractor known."
    code = 'import sys, t2i.metrics; from torch_fidelity.fidelity import main; sys.argv[0] = "fidelity"; main()'
    options = '--cpu --fid --isc --kid --prc --isc-splits 1 --no-cache --silent --json'.split()
    def run(*arguments):
        done = subprocess.run([sys.executable, '-c', code, *map(str, arguments), *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    return run
