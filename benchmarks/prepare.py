"""Is `prepare` bounded by decoding? Its rate with an encoder that costs nothing, against Pillow alone on the same files with as many threads.

python benchmarks/prepare.py [pictures] → benchmarks/results/prepare.json"""
import io, os, statistics, sys, tarfile, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features

from measure import RESULTS, machine
from t2i.core import save_json
from t2i.data import prepare

CORES, ROUNDS = len(os.sched_getaffinity(0)), 7


class Stub:
    def encode_images(self, images): return torch.zeros(len(images), 512)
    def encode_captions(self, captions): return torch.zeros(len(captions), 512)


def jpegs(n, size, rng):
    for _ in range(n):  # with the detail of photographs: noise whose amplitude falls with the frequency
        octaves = [Image.fromarray(rng.integers(0, 256, (2**k, 2**k, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC) for k in range(2, 9)]
        picture = sum(np.asarray(octave, np.float32)/2**i for i, octave in enumerate(octaves, 1))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer := io.BytesIO(), 'JPEG', quality=90)
        yield buffer.getvalue()


def bare(data): return np.asarray(Image.open(io.BytesIO(data)).convert('RGB').resize((64, 64), Image.Resampling.BICUBIC, reducing_gap=3))


def write_tar(path, files):
    "What img2dataset writes for the JPEG files: each with its caption."
    with tarfile.open(path, 'w') as tar:
        for i, data in enumerate(files):
            for ending, content in (('jpg', data), ('txt', b'a picture')):
                info = tarfile.TarInfo(f'{path.stem}{i:04}.{ending}')
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def rates(files, folder):
    "Pictures per second of Pillow alone and of `prepare`, alternately."
    write_tar(folder/'00000.tar', files)
    prepare(Stub(), folder, folder/'warm', workers=CORES, progress=False)
    for i in range(ROUNDS):
        start = time.perf_counter()
        with ThreadPoolExecutor(CORES) as pool: list(pool.map(bare, files))
        middle = time.perf_counter()
        assert prepare(Stub(), folder, folder/f'out{i}', workers=CORES, progress=False)['prepared'] == len(files)
        yield len(files)/(middle - start), len(files)/(time.perf_counter() - middle)


if __name__ == '__main__':
    n, result = int(sys.argv[1]) if len(sys.argv) > 1 else 1000, {}
    for name, size in {'img2dataset, 256×256': (256, 256), 'img2dataset, 340×256': (340, 256), 'ImageNet, 500×375': (500, 375)}.items():
        with tempfile.TemporaryDirectory() as d: alone, ours = zip(*rates(list(jpegs(n, size, np.random.default_rng(0))), Path(d)))
        result[name] = {'pillow': statistics.median(alone), 'prepare': statistics.median(ours), 'ratios': (ratios := [o/a for a, o in zip(alone, ours)]), 'ratio': statistics.median(ratios)}
        print(name, result[name])
    save_json(RESULTS/'prepare.json', {'images_per_second': result, 'pictures': n, **machine(), 'libjpeg_turbo': features.version_feature('libjpeg_turbo')})
