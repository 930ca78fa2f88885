"""Which sampling settings does the default preset's decoder like? Held-out pictures drawn from their embeddings, with one setting changed at a time.

python benchmarks/tuning.py [pictures, 192] → benchmarks/results/tuning.json; a stopped run goes on"""
import sys, time
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from judge import RUN, SEED, load_judge
from t2i.core import save_json
from t2i.experiments import draw_pairs, draw_variant
from t2i.judge import caption_ranks
from t2i.metrics import evaluate, extract_features
from t2i.pipeline import TextToImage

CHANGES = [{}, *({'guidance_scale': s} for s in (1., 1.5, 2., 3., 4., 6.)), *({'thresholding': t} for t in ('none', 'dynamic')), *({'num_inference_steps': n} for n in (5, 20)),
           *({'sampler': s, 'num_inference_steps': n} for s, n in (('dpm_solver_pp', 10), ('dpm_solver_pp', 20), ('ddim', 20), ('ddpm', 50))), {'best_of': 4}]


def draw(pipe, pairs, folder, thresholding=None, best_of=1, **settings) -> list:
    "The pictures of one setting; of several candidates those whose embeddings are most like the ones that they were drawn from."
    pipe.preset.sampling.thresholding = thresholding or pipe.preset.sampling.thresholding
    candidates = [draw_variant('Image decoder only', pipe, pairs, SEED + i, folder, **settings) for i in range(best_of)]
    wanted = pipe.embed_images(pairs.images)
    likeness = torch.stack([F.cosine_similarity(pipe.embed_images(c), wanted) for c in candidates])
    return [candidates[k][i] for i, k in enumerate(likeness.argmax(0).tolist())]


def tune(pipe, judge, pairs, folder) -> dict:
    "A row of numbers for each change; `folder` keeps the pictures."
    real, rows, usual = extract_features(pairs.images, device=pipe.device), [], dict(pipe.preset.sampling)
    for change in CHANGES:
        name = ', '.join(f'{k} = {v}' for k, v in change.items()) or 'as the preset has it'
        drawn = draw(pipe, pairs, folder/name.replace(' ', ''), **change)
        pipe.preset.sampling.thresholding = usual['thresholding']
        ranks = caption_ranks(judge, drawn, pairs.captions)['rank']
        numbers = evaluate(drawn, real, device=pipe.device)
        rows.append({'setting': name, **{k: numbers[k] for k in ('fid', 'kid', 'kid_std', 'precision', 'recall')}, 'recall@1': (ranks < 1).mean(), 'recall@10': (ranks < 10).mean(), 'median rank': ranks.median()})
        print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)
    return {'settings': rows, 'usual': usual, 'pictures': len(pairs), 'seed': SEED, 'weights': pipe.fingerprints(), 'when': time.strftime('%Y-%m-%d')}


if __name__ == '__main__':
    n, pipe = int(sys.argv[1]) if len(sys.argv) > 1 else 192, TextToImage.from_preset('emoji')
    found = tune(pipe, load_judge(pipe.device), draw_pairs(n, SEED), RUN/f"tuning_{pipe.fingerprints()['decoder']}")
    save_json(Path(__file__).parent/'results/tuning.json', found)
