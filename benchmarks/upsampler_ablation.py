"""What the embedding, the noise on the small pictures, and the decoder's redrawing of them are worth to the upsampler of the preset `emoji`: equal short trainings with and without.

The large pictures must have been drawn (`t2i train upsampler` does it); the decoder is the one that ships. One core of a laptop: about 45 minutes; a stopped run goes on.

python benchmarks/upsampler_ablation.py [--steps 400] [-n 200] → benchmarks/results/upsampler_ablation.json"""
import argparse, json, shutil
from pathlib import Path

import torch

from measure import RESULTS
from t2i.core import Preset, load_preset, load_weights, save_json
from t2i.data import draw_large
from t2i.metrics import extract_features, frechet_distance
from t2i.train import train
from t2i.upsampler import UpsamplerTask, make_upsampler
from upsampler import Judge, perceptual_distance, psnr

RUNS = Path('runs/upsampler_ablation')
VARIANTS = {'as the preset has it': {}, 'Gaussian noise only': {'redrawn': 0.}, 'no noise': {'redrawn': 0., 'max_noise': 0.}, 'no embedding': {'drop': 1.}}  # settings of [upsampler]


def trained(judge, changes, folder, steps):
    "The upsampler of the preset with other settings, after a short training."
    preset = load_preset('emoji')
    preset = Preset.nest({**preset, 'upsampler': {**preset.upsampler, **changes}})
    torch.manual_seed(0)
    task = UpsamplerTask(preset, 'runs/emoji/prepared', draw_large(), judge.pipe.decoder)
    path = train(task, {**preset.train.upsampler, 'steps': steps}, folder, device='cpu')
    model = make_upsampler(preset).eval()
    model.load_state_dict(load_weights(path)[0])
    return model


def measure(judge, n, blind, noise):
    "From real small pictures, and from drawn ones that are trusted (noise 0) or not."
    real = judge.real[:n]
    embeddings = {'real': judge.none(n) if blind else None, 'drawn': judge.none(n) if blind else judge.embeddings[:n]}
    large = judge.enlarge('upsampler', judge.small[:n], embeddings=embeddings['real'], noise=0.)
    def fid(noise): return frechet_distance(extract_features(judge.enlarge('upsampler', judge.drawn[:n], embeddings=embeddings['drawn'], noise=noise), device='cpu').pooled, judge.seen[:n])
    return {'psnr': psnr(large, real).mean().item(), 'perceptual': perceptual_distance(judge.network, large, real).mean().item(),
            'fid, real': frechet_distance(extract_features(large, device='cpu').pooled, judge.seen[:n]), 'fid, drawn, noise 0': fid(0.), f'fid, drawn, noise {noise}': fid(noise)}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--steps', type=int, default=400, help='of each training')
    parser.add_argument('-n', type=int, default=200, help='pictures')
    a = parser.parse_args()
    judge, path = Judge(a.n, a.n), RESULTS/'upsampler_ablation.json'
    results = {'steps': a.steps, 'n': a.n, 'decoder': judge.pipe.fingerprints()['decoder'], 'rows': {}}
    before = json.loads(path.read_text()) if path.exists() else {}
    if all(before.get(k) == v for k, v in results.items() if k != 'rows'): results['rows'] = before['rows']
    else: shutil.rmtree(RUNS, ignore_errors=True)  # of another length, or with another decoder
    for name, changes in VARIANTS.items():
        if name in results['rows']: continue
        judge.pipe.upsampler = trained(judge, changes, RUNS/name.replace(' ', '_'), a.steps)
        results['rows'][name] = measure(judge, a.n, changes.get('drop') == 1, judge.pipe.preset.upsampler.sampling.noise)
        save_json(path, results)
        print(name, results['rows'][name], flush=True)
