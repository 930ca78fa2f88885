"""Are the default preset's pictures worth looking at? Every judgement of nbs/lib/judge about n pictures of each variant.

t2i train clip --preset benchmarks/judge.toml --seed 1                (once: the judge, in runs/judge)
python benchmarks/judge.py [pictures of each variant, 1000]           → benchmarks/results/judge.json; a stopped run goes on"""
import json, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from measure import RESULTS
from t2i.clip import CLIP
from t2i.core import load_preset, save_json
from t2i.data import load_emoji
from t2i.experiments import REAL, VARIANTS, draw_pairs, draw_variant, measure
from t2i.judge import TEMPLATES, TrainingPictures, caption_ranks, compose, fid_error, part_scores
from t2i.metrics import extract_features
from t2i.pipeline import TextToImage
from t2i.plots import as_pictures

RUN = Path('runs/judge')
SEED = 42
TWINS = 'flat', 'fluent'  # Microsoft's drawings without gradients and with: what is held out of the one has mostly been seen in the other


def load_judge(device):
    weights = RUN/'clip/weights.safetensors'
    if not weights.exists(): sys.exit(f"there is no judge at {weights}: train it with `t2i train clip --preset benchmarks/judge.toml --seed 1`")
    return CLIP.load(load_preset(Path(__file__).parent/'judge.toml').clip, weights, device)


def judge_variant(judge, training, pictures, pairs, features):
    "A row of the table: what the judge finds, and what is nearest in training."
    ranks, near = caption_ranks(judge, pictures, pairs.captions), training.nearest(pictures)
    wanted = load_emoji('test').drop_duplicates('caption').set_index('caption').loc[pairs.captions]
    same, alone = np.array(near.concept) == np.array(wanted.concept), ~np.isin(wanted['style'], TWINS)
    return {'recall@1': (ranks['rank'] < 1).mean(), 'recall@10': (ranks['rank'] < 10).mean(), 'concept': ranks.concept.mean(), 'style': ranks['style'].mean(), 'recall@1, other styles': (ranks['rank'] < 1)[alone].mean(),
            'nearest in training is the concept': same.mean(), 'copies': near['copy'].mean(), 'fid_error': fid_error(extract_features(pictures, device=training.device).pooled, features)}


def goals(table):
    "What was aimed at: found / goal, as (value, bound)."
    full, decoder, none, real = (table.loc[name] for name in (*VARIANTS, REAL))
    return {
        "recall@1 of the image decoder only, as a share of real pictures'": (decoder['recall@1']/real['recall@1'], '≥ 0.85'),
        "recall@1 of the full pipeline, as a share of real pictures'": (full['recall@1']/real['recall@1'], '≥ 0.75'),
        "… without the styles flat and fluent": (full['recall@1, other styles']/real['recall@1, other styles'], '≥ 0.75'),
        "FID of the full pipeline / image decoder only": (full.fid/decoder.fid, '≤ 1.25'),
        "FID without the translator / full pipeline (the thesis: 1.9)": (none.fid/full.fid, '> 1'),
        "… its difference in standard errors": ((none.fid - full.fid)/np.hypot(none.fid_error, full.fid_error), '> 1'),
        "precision of the full pipeline, as a share of real against real's": (full.precision/real.precision, '≥ 0.7'),
        "recall of the full pipeline, as a share of real against real's": (full.recall/real.recall, '≥ 0.4'),
        "parts of composed captions that the judge prefers": (table.attrs['parts'], '> 0.5'),
    }


def what_embeddings_hold(judge, pipe, training, pairs, drawn) -> dict:
    "The recall@1 of the judge and of the pipeline's own CLIP, and the judge's where that CLIP finds the caption of the real picture and where it does not; also for the training pictures whose embeddings are nearest to the real ones'."
    def found(clip, pictures): return np.array(caption_ranks(clip, pictures, pairs.captions)['rank'] < 1)
    real = as_pictures(pairs.images)
    nearest = (pipe.clip.encode_images(real, normalize=True)@pipe.clip.encode_images(training.pictures, normalize=True).T).argmax(1)
    held, rows = found(pipe.clip, real), {REAL: real, 'Nearest training picture': [training.pictures[i] for i in nearest]} | drawn
    judged = {name: found(judge, pictures) for name, pictures in rows.items()}
    return {name: {'judge': by_judge.mean(), 'own CLIP': found(pipe.clip, rows[name]).mean()} | {f"judge, where own CLIP is {'right' if known else 'wrong'} about the real picture": by_judge[held == known].mean()
                   for known in np.unique(held)} for name, by_judge in judged.items()}


def judge_variants(pipe, judge, training, pairs, folder, progress=False) -> dict:
    "Every judgement about one picture of each variant for each pair; `folder` keeps the pictures."
    drawn = {variant: draw_variant(variant, pipe, pairs, SEED, folder, progress=progress) for variant in VARIANTS}
    real = extract_features(pairs.images, device=pipe.device).pooled
    others = np.random.default_rng(SEED).permutation(len(training.pictures))[:len(pairs)]  # there are only 1,000 held-out pictures: as many training pictures are mixed in, so that a half has as many as a row
    floor = np.concatenate([pairs.images, np.stack([np.asarray(training.pictures[i]) for i in others])])
    table = measure(drawn, pairs, floor, pipe.clip, device=pipe.device)
    table = table.join(pd.DataFrame({name: judge_variant(judge, training, pictures, pairs, real) for name, pictures in (drawn | {REAL: as_pictures(pairs.images)}).items()}).T)
    parts = part_scores(judge, TEMPLATES, pipe([compose(t)[0] for t in TEMPLATES], generator=0))
    table.attrs['parts'] = parts.right.mean()
    return {'pictures': len(pairs), 'seed': SEED, 'variants': json.loads(table.to_json(orient='index')), 'embeddings': what_embeddings_hold(judge, pipe, training, pairs, drawn),
            'goals': {k: {'found': float(f), 'goal': g} for k, (f, g) in goals(table).items()},
            'parts': parts.to_dict('records'), 'weights': pipe.fingerprints(), 'sampling': dict(pipe.preset.sampling), 'device': str(pipe.device), 'torch': torch.__version__, 'when': time.strftime('%Y-%m-%d')}


if __name__ == '__main__':
    n, pipe = int(sys.argv[1]) if len(sys.argv) > 1 else 1000, TextToImage.from_preset('emoji')
    folder = RUN/f"pictures_{pipe.fingerprints()['decoder']}"  # other weights, other pictures
    found = judge_variants(pipe, load_judge(pipe.device), TrainingPictures(pipe.device, cache='cache/training_features.safetensors'), draw_pairs(n, SEED), folder, progress=True)
    for name, goal in found['goals'].items(): print(f"{name:<75} {goal['found']:>8.3f}   goal {goal['goal']}")
    save_json(RESULTS/'judge.json', found)
