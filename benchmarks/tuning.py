"""Which sampling settings does the default preset's decoder like? Held-out pictures drawn from their embeddings, with one setting changed at a time.

python benchmarks/tuning.py [pictures, 96] → benchmarks/results/tuning.json; a stopped run goes on"""
import sys, time
from pathlib import Path

import pandas as pd

from judge import RUN, SEED, load_judge
from t2i.core import get_device, save_json
from t2i.experiments import draw_pairs, draw_variant
from t2i.judge import caption_ranks
from t2i.metrics import evaluate, extract_features
from t2i.pipeline import TextToImage

CHANGES = [{}, *({'guidance_scale': s} for s in (1., 2., 3., 6.)), *({'thresholding': t} for t in ('none', 'dynamic')),
           *({'num_inference_steps': n} for n in (10, 50)), {'sampler': 'ddim'}, {'sampler': 'ddpm', 'num_inference_steps': 50}]


if __name__ == '__main__':
    n, device = int(sys.argv[1]) if len(sys.argv) > 1 else 96, get_device(None)
    pipe, judge, pairs = TextToImage.from_preset('emoji', device), load_judge(device), draw_pairs(n, SEED)
    real, rows, usual = extract_features(pairs.images, device=device), [], dict(pipe.preset.sampling)
    for change in CHANGES:
        pipe.preset.sampling.thresholding = change.get('thresholding', usual['thresholding'])
        name = ', '.join(f'{k} = {v}' for k, v in change.items()) or 'as the preset has it'
        folder = RUN/f"tuning_{pipe.fingerprints()['decoder']}/{name.replace(' ', '')}"
        drawn = draw_variant('Image decoder only', pipe, pairs, SEED, folder, **{k: v for k, v in change.items() if k != 'thresholding'})
        ranks = caption_ranks(judge, drawn, pairs.captions)['rank']
        numbers = evaluate(drawn, real, device=device)
        rows.append({'setting': name, **{k: numbers[k] for k in ('fid', 'kid', 'kid_std', 'precision', 'recall')}, 'recall@1': (ranks < 1).mean(), 'recall@10': (ranks < 10).mean(), 'median rank': ranks.median()})
        print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)
    save_json(Path(__file__).parent/'results/tuning.json', {'settings': rows, 'usual': usual, 'pictures': n, 'seed': SEED, 'weights': pipe.fingerprints(), 'when': time.strftime('%Y-%m-%d')})
