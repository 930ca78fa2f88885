"""How many steps does a sampler need? FID, KID and CLIP score of pictures of held-out captions.

    python benchmarks/steps.py                                                on a CPU: up to 100 steps
    python benchmarks/steps.py --images 500 --steps 5 8 10 15 20 25 50 100 250 1000     on a CUDA GPU

Every row has the same captions and the same noise. Pictures stay in runs/steps, so a run that was stopped goes on; the table goes to
benchmarks/results/steps-<machine>.json after each row, and rows that it has of the same weights and pictures stay, so that more can be added."""
import argparse
import json
from pathlib import Path

import numpy as np

from measure import REPOSITORY, RESULTS, machine, machine_name
from t2i.core import save_json
from t2i.data import read_picture
from t2i.experiments import draw_pairs
from t2i.metrics import clip_score, evaluate, extract_features, real_vs_real
from t2i.pipeline import TextToImage, draw_to_folder
from t2i.sampling import SAMPLERS


def study(
    pipe,
    n: int,  # pictures in each row
    steps: list,
    samplers=tuple(SAMPLERS),
    folder: Path = REPOSITORY/'runs/steps',
    out: 'Path | None' = None,
    seed: int = 42,
    **settings,
) -> dict:
    "Under `rows` one for each sampler and number of steps: the metrics against the real pictures of the same captions."
    pairs = draw_pairs(2*n, seed)
    floor, pairs = real_vs_real(pairs.images, device=pipe.device), pairs.first(n)
    real, y = extract_features(pairs.images, device=pipe.device), pipe.embed_captions(pairs.captions)
    same = {'preset': pipe.preset.name, 'images': n, 'seed': seed, 'weights': pipe.fingerprints(), 'settings': {k: v for k, v in (pipe.preset.sampling | settings).items() if k not in ('sampler', 'steps', 'batch_size')}}
    found = {'machine': machine(pipe.device), **same, 'real against real': floor, 'rows': []}
    before = json.loads(out.read_text()) if out and out.exists() else {}
    if all(before.get(k) == v for k, v in json.loads(json.dumps(same)).items()): found['rows'] = before['rows']
    done = [(row['sampler'], row['num_inference_steps']) for row in found['rows']]
    for sampler, k in [(sampler, k) for k in sorted(steps) for sampler in samplers if (sampler, k) not in done]:
        row = dict(sampler=sampler, num_inference_steps=k)
        name = '_'.join(map(str, row.values()))
        paths = draw_to_folder(pipe, pairs.captions, lambda: y, folder/pipe.preset.name/f'{n}_{name}', seed, progress=True, **row, **settings)
        pictures = [read_picture(path) for path in paths]
        numbers = evaluate(pictures, real, device=pipe.device) | {'clip_score': float(np.mean(clip_score(pipe.clip, pictures, pairs.captions)))}
        found['rows'].append(row | {k: numbers[k] for k in ('fid', 'kid', 'kid_std', 'precision', 'recall', 'clip_score')})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in found['rows'][-1].items()}, flush=True)
        if out: save_json(out, found)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', default='emoji')
    parser.add_argument('--device', default=None)
    parser.add_argument('--images', type=int, default=100)
    parser.add_argument('--steps', type=int, nargs='+', default=[5, 8, 10, 15, 20, 25, 50, 100])
    parser.add_argument('--samplers', nargs='+', choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument('--batch-size', type=int, default=None)
    parser.add_argument('--folder', type=Path, default=REPOSITORY/'runs/steps')
    parser.add_argument('--out', type=Path, default=None)
    o = parser.parse_args()
    pipe = TextToImage.from_preset(o.preset, o.device)
    study(pipe, o.images, o.steps, o.samplers, o.folder, o.out or RESULTS/f'steps-{machine_name(pipe.device)}.json', batch_size=o.batch_size)


if __name__ == '__main__': main()
