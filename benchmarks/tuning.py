"""Which sampling settings does the default preset's decoder like? Held-out pictures drawn from their embeddings, with one setting changed at a time.

python benchmarks/tuning.py [pictures, 96] → benchmarks/results/tuning.json; a stopped run goes on"""
import sys, time
from pathlib import Path

import pandas as pd

from judge import RUN, SEED, load_judge
from t2i.core import save_json
from t2i.experiments import draw_pairs, draw_variant
from t2i.judge import caption_ranks
from t2i.metrics import evaluate, extract_features
from t2i.pipeline import TextToImage

CHANGES = [{}, *({'guidance_scale': s} for s in (1., 2., 3., 6.)), *({'thresholding': t} for t in ('none', 'dynamic')),
           *({'num_inference_steps': n} for n in (10, 50)), {'sampler': 'ddim'}, {'sampler': 'ddpm', 'num_inference_steps': 50}]


def tune(pipe, judge, pairs, folder) -> dict:
    "A row of numbers for each change; `folder` keeps the pictures."
    real, rows, usual = extract_features(pairs.images, device=pipe.device), [], dict(pipe.preset.sampling)
    for change in CHANGES:
        pipe.preset.sampling.thresholding = change.get('thresholding', usual['thresholding'])
        name = ', '.join(f'{k} = {v}' for k, v in change.items()) or 'as the preset has it'
        drawn = draw_variant('Image decoder only', pipe, pairs, SEED, folder/name.replace(' ', ''), **{k: v for k, v in change.items() if k != 'thresholding'})
        ranks = caption_ranks(judge, drawn, pairs.captions)['rank']
        numbers = evaluate(drawn, real, device=pipe.device)
        rows.append({'setting': name, **{k: numbers[k] for k in ('fid', 'kid', 'kid_std', 'precision', 'recall')}, 'recall@1': (ranks < 1).mean(), 'recall@10': (ranks < 10).mean(), 'median rank': ranks.median()})
        print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)
    pipe.preset.sampling.thresholding = usual['thresholding']
    return {'settings': rows, 'usual': usual, 'pictures': len(pairs), 'seed': SEED, 'weights': pipe.fingerprints(), 'when': time.strftime('%Y-%m-%d')}


if __name__ == '__main__':
    n, pipe = int(sys.argv[1]) if len(sys.argv) > 1 else 96, TextToImage.from_preset('emoji')
    found = tune(pipe, load_judge(pipe.device), draw_pairs(n, SEED), RUN/f"tuning_{pipe.fingerprints()['decoder']}")
    save_json(Path(__file__).parent/'results/tuning.json', found)
