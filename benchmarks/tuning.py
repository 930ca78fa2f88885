"""Which sampling settings does the default preset's decoder like? Held-out pictures drawn from their embeddings, with one setting changed at a time.

python benchmarks/tuning.py [pictures, 192] → benchmarks/results/tuning.json; a stopped run goes on"""
import sys, time

import pandas as pd
from PIL import Image

from judge import RUN, SEED, load_judge
from measure import RESULTS
from t2i.core import save_json
from t2i.experiments import draw_pairs, draw_variant
from t2i.judge import caption_ranks
from t2i.metrics import evaluate, extract_features
from t2i.pipeline import TextToImage

CHANGES = [{}, *({'exposure_bias': b} for b in (0., 0.3, 0.9)), {'exposure_bias': 0., 'timesteps_for': 0.5}, {'timesteps_for': 0.}, *({'sampler': s} for s in ('sde_dpm_solver_pp', 'ddim')),
           *({'guidance_scale': s} for s in (2., 3., 6.)), *({'thresholding': t} for t in ('none', 'dynamic')), *({'num_inference_steps': n} for n in (5, 20)), {'colours': 16}]


def draw(pipe, pairs, folder, thresholding=None, timesteps_for=None, colours=None, **settings) -> list:
    "The pictures of one setting; `timesteps_for` is the exposure bias whose timesteps are visited, if not that which the network is told of."
    pipe.preset.sampling.thresholding = thresholding or pipe.preset.sampling.thresholding
    if colours: return [p.quantize(colours, dither=Image.Dither.NONE).convert('RGB') for p in draw(pipe, pairs, folder, **settings)]
    if timesteps_for is not None: settings['num_inference_steps'] = pipe.diffusion.expect_errors(timesteps_for).respace(pipe.preset.sampling.steps).timestep_map.tolist()
    return draw_variant('Image decoder only', pipe, pairs, SEED, folder, **settings)


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
    save_json(RESULTS/'tuning.json', found)
