"""How time and memory grow: sampling with the batch and with the number of pictures, preparing with the shards, a training's start with the data."""
import io, tempfile, time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from measure import alternate, fitted_exponent, peak_memory
from prepare import Stub, write_tar
from t2i.core import save_weights
from t2i.data import PreparedDataset, prepare
from t2i.decoder import decode
from t2i.pipeline import draw_to_folder
from t2i.train import batch_indices


def _series(what: str, sizes, measure) -> dict:
    "Seconds and bytes at each size, with the exponents that fit: 1 is proportional, 0 flat."
    points = [measure(n) for n in sizes]
    seconds, memory = ([max(p[k], floor) for p in points] for k, floor in (('seconds', 1e-6), ('bytes', 1)))
    return {'what': what, 'sizes': list(sizes), 'seconds': seconds, 'bytes': memory, 'exponent_seconds': fitted_exponent(sizes, seconds),
            'slope_bytes': float(np.polyfit(sizes, memory, 1)[0])}


def _timed(work, device) -> dict:
    with peak_memory(device) as memory:
        start = time.perf_counter()
        work()
    return {'seconds': time.perf_counter() - start, 'bytes': memory.bytes}


def sampling_by_batch(pipe, sizes, steps, seconds) -> dict:
    s = pipe.preset.sampling
    def measure(n):
        y = torch.zeros(n, pipe.preset.clip.embedding_size)
        draw = lambda: decode(pipe.diffusion, pipe.decoder, y, 0, s.sampler, steps, s.guidance_scale, s.thresholding)
        times = alternate({'draw': draw}, pipe.device, seconds, rounds=2)['draw']
        return {'seconds': min(times), 'bytes': _timed(draw, pipe.device)['bytes']}
    return _series('sampling, pictures in a batch', sizes, measure)


def sampling_by_number(pipe, sizes, steps, batch_size) -> dict:
    def measure(n):
        y = torch.zeros(n, pipe.preset.clip.embedding_size)
        with tempfile.TemporaryDirectory() as folder:
            return _timed(lambda: draw_to_folder(pipe, ['']*n, lambda: y, folder, 0, batch_size=batch_size, num_inference_steps=steps), pipe.device)
    measure(batch_size)  # what is allocated once
    return {**_series(f'sampling, pictures streamed to disk in batches of {batch_size}', sizes, measure), 'bytes_per_picture': 3*pipe.preset.data.image_size**2}


def upsampling_by_number(pipe, sizes) -> dict:
    "As many 64×64 pictures enlarged in one call; what grows is the list of results."
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    measure = lambda n: _timed(lambda: pipe.upsample([picture]*n, generator=0), pipe.device)
    measure(pipe.preset.upsampler.sampling.batch_size)  # what is allocated once
    return {**_series('upsampling, pictures in a call', sizes, measure), 'bytes_per_picture': 3*pipe.upsampler.image_size**2}


def _raw_shards(folder: Path, n: int, pictures: int):
    rng = np.random.default_rng(0)
    def jpeg():
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)).save(buffer := io.BytesIO(), 'JPEG')
        return buffer.getvalue()
    for shard in range(n): write_tar(folder/f'{shard:05}.tar', (jpeg() for _ in range(pictures)))


def prepare_by_shards(sizes, pictures) -> dict:
    def measure(n):
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder)/'raw'
            raw.mkdir()
            _raw_shards(raw, n, pictures)
            return _timed(lambda: prepare(Stub(), raw, Path(folder)/'out', progress=False), 'cpu')
    measure(1)
    return {**_series(f'preparing, shards of {pictures} pictures', sizes, measure), 'bytes_per_shard': pictures*(3*64**2 + 2*2*512)}


def save_prepared(folder: Path, shards: int, pictures: int, embedding_size: int, image_size: int = 64):
    "Prepared shards of noise."
    folder.mkdir(parents=True)
    for i in range(shards):
        g = torch.Generator().manual_seed(i)
        save_weights(folder/f'{i:05}.safetensors', {'images': torch.randint(256, (pictures, image_size, image_size, 3), generator=g, dtype=torch.uint8),
                     'image_embeddings': torch.randn(pictures, embedding_size, generator=g).half()}, {'keys': [f'{i}-{j}' for j in range(pictures)]})


def training_start(sizes) -> dict:
    "From nothing to the first batch of a training."
    def measure(n):
        with tempfile.TemporaryDirectory() as folder:
            save_prepared(Path(folder)/'train', n, 2, 8, 8)
            def start():
                data = PreparedDataset(Path(folder)/'train')
                indices = batch_indices(len(data), 16, 0, 0)
                data.images(indices), data.image_embeddings(indices)
            return _timed(start, 'cpu')
    measure(1)
    found = _series('start of a training, prepared shards', sizes, measure)
    return {**found, 'seconds_more': found['seconds'][-1] - found['seconds'][0]}


def growth(pipe, tiny: bool, seconds: float) -> dict:
    steps = 1 if tiny else 2
    return {'sampling_by_batch': sampling_by_batch(pipe, (1, 2, 4) if tiny else (1, 2, 4, 8, 16, 32), steps, seconds),
            'sampling_by_number': sampling_by_number(pipe, (4, 8, 16) if tiny else (8, 16, 32, 64), steps, 4 if tiny else 8),
            **({'upsampling_by_number': upsampling_by_number(pipe, (4, 8) if tiny else (8, 16, 32, 64))} if pipe.upsampler else {}),
            'prepare_by_shards': prepare_by_shards((1, 2, 4) if tiny else (1, 2, 4, 8, 16), 8 if tiny else 100),
            'training_start': training_start((2, 20) if tiny else (10, 100, 1000))}
