"""The upsampler of the preset `emoji`, judged on held-out emoji.

From the real 64×64 pictures: how near to the real 256×256 ones, in PSNR and in a perceptual distance. From pictures that the decoder drew: FID at 256 against the real ones. Against bicubic
and Lanczos, with and without embedding, and for several levels of noise on the small picture. One core of a laptop: about 15 minutes; a stopped run goes on.

python benchmarks/upsampler.py [-n 500] [--weights FOLDER] → benchmarks/results/upsampler.json and upsampler_worst.webp"""
import argparse, json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from measure import RESULTS
from t2i.core import from_uint8, save_json
from t2i.data import PreparedDataset, decode_image, draw_large, load_emoji, read_picture
from t2i.metrics import efficientnet_lite0, extract_features, frechet_distance
from t2i.pipeline import TextToImage, draw_to_folder
from t2i.plots import image_grid

LEVELS = (0., 0.1, 0.2, 0.35, 0.5)  # of errors in the small picture
FILTERS = {'bicubic': Image.Resampling.BICUBIC, 'Lanczos': Image.Resampling.LANCZOS}


def psnr(a, b):
    "Peak signal-to-noise ratio of each picture in dB; uint8 [N, H, W, 3]."
    return 10*np.log10(255**2/((a.astype(np.float32) - b)**2).mean((1, 2, 3)).clip(1e-3))


@torch.inference_mode()
def perceptual_distance(network, a, b, batch_size=16):
    """LPIPS (Zhang et al., 2018) without its learned weights: at each position of the network's five feature maps the squared distance of the
    unit-length feature vectors, averaged over positions and summed over maps → [N]."""
    def maps(x): return [f/f.norm(dim=1, keepdim=True).clamp(min=1e-6) for f in network.forward_intermediates(from_uint8(x), intermediates_only=True)]
    parts = [sum(((f - g)**2).sum(1).mean((1, 2)) for f, g in zip(maps(a[i:i + batch_size]), maps(b[i:i + batch_size]))) for i in range(0, len(a), batch_size)]
    return torch.cat(parts).numpy()


class Judge:
    def __init__(self, n, n_ablation, weights=None):
        self.n, self.n_ablation, self.path = n, n_ablation, RESULTS/'upsampler.json'
        self.pipe = TextToImage.from_preset('emoji', 'cpu', weights)
        draw_large()
        table = load_emoji('test')[:n]
        self.keys, self.captions, self.small = list(table.key), list(table.caption), [decode_image(i) for i in table['image']]
        large = PreparedDataset('cache/emoji_256/test')
        assert large.keys[:n] == self.keys
        self.real, self.network, self.seen = large.images(torch.arange(n)).numpy(), efficientnet_lite0().eval(), extract_features(large.images(torch.arange(n)), device='cpu').pooled
        self.embeddings = self.pipe.embed_captions(self.captions)
        s = self.pipe.preset.upsampler.sampling
        self.results = {'n': n, 'n_ablation': n_ablation, 'sampler': s.sampler, 'steps': s.steps, 'noise': s.noise, 'fingerprints': self.pipe.fingerprints(),
                        'parameters': sum(p.numel() for p in self.pipe.upsampler.parameters())}
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        same = all(before.get(k) == v for k, v in self.results.items())
        self.results |= {k: before[k] if same else {} for k in ('real', 'drawn')} | ({k: before[k] for k in ('worst', 'better_than_bicubic') if k in before} if same else {})

    @cached_property
    def drawn(self):
        "The decoder's pictures for the captions of the held-out ones."
        folder = Path(f"runs/upsampler_samples_{self.pipe.fingerprints()['decoder']}")
        return [read_picture(p) for p in draw_to_folder(self.pipe, self.captions, lambda: self.embeddings, folder, 0, progress=True)]

    def enlarge(self, method, pictures, embeddings=None, noise=None):
        "uint8 [N, 256, 256, 3]; `embeddings` None: of the pictures."
        if method in FILTERS: return np.stack([np.asarray(p.resize((256, 256), FILTERS[method])) for p in pictures])
        return np.stack([np.asarray(p) for p in self.pipe.upsample(pictures, image_embeddings=embeddings, noise=noise, generator=0, progress=True)])

    def write(self, kind, name, row):
        self.results[kind][name] = row
        save_json(self.path, self.results)
        print(kind, name, row, flush=True)

    def judge_real(self, name, n, method='upsampler', **settings):
        if name in self.results['real'] and 'worst' in self.results: return
        large = self.enlarge(method, self.small[:n], **settings)
        db, distance = psnr(large, self.real[:n]), perceptual_distance(self.network, large, self.real[:n])
        self.write('real', name, {'n': n, 'psnr': db.mean().item(), 'perceptual': distance.mean().item(), 'fid': frechet_distance(extract_features(large, device='cpu').pooled, self.seen[:n])})
        return large, db, distance

    def judge_drawn(self, name, n, method='upsampler', **settings):
        if name in self.results['drawn']: return
        large = self.enlarge(method, self.drawn[:n], **settings)
        self.write('drawn', name, {'n': n, 'fid': frechet_distance(extract_features(large, device='cpu').pooled, self.seen[:n])})

    def none(self, n): return torch.zeros(n, self.pipe.preset.clip.embedding_size)

    def run(self):
        n, few = self.n, self.n_ablation
        bicubic = [self.judge_real(name, n, name) for name in FILTERS][0]
        ours = self.judge_real('upsampler', n, noise=0.)
        if ours: self.worst(bicubic, ours)
        for name in FILTERS: self.judge_drawn(name, n, name)
        self.judge_drawn('upsampler', n, embeddings=self.embeddings)

        for name in FILTERS: self.judge_real(f'{name}, few', few, name)
        for level in LEVELS: self.judge_real(f'noise {level}', few, noise=level)
        self.judge_real('without embedding', few, embeddings=self.none(few), noise=0.)

        for name in FILTERS: self.judge_drawn(f'{name}, few', few, name)
        for level in LEVELS: self.judge_drawn(f'noise {level}', few, embeddings=self.embeddings[:few], noise=level)
        self.judge_drawn('without embedding', few, embeddings=self.none(few))
        self.judge_drawn("the drawn picture's embedding", few)

        settings = self.pipe.preset.upsampler.sampling
        for settings.steps in (2, 4):
            self.judge_real(f'{settings.steps} steps', few, noise=0.)
            self.judge_drawn(f'{settings.steps} steps', few, embeddings=self.embeddings[:few])

    def worst(self, bicubic, ours, k=10):
        "The pictures that come out least like the real ones, in the perceptual distance."
        order = np.argsort(-ours[2])[:k]
        self.results['worst'] = [{'key': self.keys[i], 'psnr': ours[1][i].item(), 'perceptual': ours[2][i].item(), 'bicubic_psnr': bicubic[1][i].item(), 'bicubic_perceptual': bicubic[2][i].item()} for i in order]
        self.results['better_than_bicubic'] = {'psnr': (ours[1] > bicubic[1]).mean().item(), 'perceptual': (ours[2] < bicubic[2]).mean().item()}
        rows = [Image.fromarray(large[i]).resize((128, 128), Image.Resampling.LANCZOS) for large in (bicubic[0], ours[0], self.real) for i in order]
        image_grid(rows, columns=k).save(RESULTS/'upsampler_worst.webp', quality=85, method=6)
        save_json(self.path, self.results)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('-n', type=int, default=500, help='pictures')
    parser.add_argument('--ablation', type=int, default=100, help='pictures of each row of the ablations')
    parser.add_argument('--weights', type=Path, help='folder of weights other than those that ship')
    a = parser.parse_args()
    Judge(a.n, min(a.ablation, a.n), a.weights).run()
