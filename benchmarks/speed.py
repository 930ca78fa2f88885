"""How fast is it, and against what? All of it on the machine at hand, in one run.

    python benchmarks/speed.py                    the preset emoji on the CPU, about eight minutes on two cores
    python benchmarks/speed.py --preset thesis    the thesis's networks with random weights, on a CUDA GPU
    python benchmarks/speed.py --tiny             every path in seconds, with numbers that mean nothing

Results go to benchmarks/results/<machine>.json; nbs/lib/benchmarks draws them."""
import argparse, contextlib, copy, itertools, json, os, subprocess, sys, tempfile, time, unittest.mock
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '9')  # the profiler's own messages

import numpy as np
import torch

import baseline, costs, rival
from growth import growth, save_prepared
from measure import REPOSITORY, RESULTS, alternate, compare, machine, machine_name, matmul_rate, peak_memory
from t2i.convolution import weights_stay
from t2i.core import ASSETS, autocast, get_device, load_preset, load_weights, make_generators, randn, save_json, uses_bfloat16
from t2i.costs import stage_table
from t2i.data import Statistics
from t2i.decoder import DecoderTask, decode, guided_denoiser, make_decoder, make_diffusion
from t2i.experiments import draw_pairs
from t2i.metrics import evaluate
from t2i.pipeline import TextToImage
from t2i.sampling import SAMPLERS
from t2i.train import TrainConfig, _Run, make_config
from t2i.unet import UNet

try: import diffusers
except ImportError: diffusers = None

FACTS_NETWORK = dict(model_channels=64, channel_mult=(1, 2, 3, 4), num_res_blocks=2, attention_resolutions=(16, 8), num_head_channels=64, embedding_size=512)
FACTS = {'milliseconds': 185, 'matmul_milliseconds': 136}  # of the straightforward network below, float32, batch 8, where it was first measured


def network(preset, device):
    "The decoder of a preset, with its weights where they ship and random ones elsewhere."
    torch.manual_seed(0)
    with torch.device(device): model = make_decoder(preset)
    path = ASSETS/preset.get('weights', '')/'decoder.safetensors'
    if preset.get('weights') and path.exists(): model.load_state_dict(load_weights(path)[0])
    else:
        for layer in (m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv1d)) and not m.weight.any()): torch.nn.init.normal_(layer.weight, std=0.02)
    return model.eval()


@contextlib.contextmanager
def tf32(on: bool):
    "Products of float32 matrices on a GPU with 10 bits of mantissa, or with all."
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try: yield
    finally: torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def with_tf32(on, work):
    def run():
        with tf32(on): return work()
    return run


class Bench:
    "The settings of a run, and its sections: each returns what is stored under its name."
    def __init__(self, preset, device, tiny=False, seconds=20.):
        self.preset, self.device, self.tiny, self.seconds = load_preset(preset), get_device(device), tiny, 0. if tiny else seconds
        self.gpu = self.device.type == 'cuda'
        self.drawn_with = self.preset if self.preset.get('weights') or tiny else load_preset('emoji')  # what needs a whole pipeline
        self.dtype = torch.bfloat16 if uses_bfloat16(self.device) else torch.float32
        self.batch, self.train_batch, self.steps = (2, 2, 2) if tiny else (64, 32, 4) if self.gpu else (8, make_config(self.preset.train.decoder, self.device).batch_size, min(20, self.preset.sampling.steps))
        self.model, self.diffusion = network(self.preset, self.device).to(memory_format=torch.channels_last), make_diffusion(self.preset)  # the weights as `TextToImage` holds them
        self.gflop = stage_table(self.model).GFLOP.sum()

    # -- sampling -----------------------------------------------------------------------------------------------
    def candidates(self) -> dict:
        "name → function that draws a batch in `self.steps` steps."
        s, y = self.preset.sampling, torch.randn(self.batch, self.preset.clip.embedding_size, generator=torch.Generator().manual_seed(1)).to(self.device)
        plain = baseline.Baseline(self.model).eval()
        def ours(model=self.model): return decode(self.diffusion, model, y, 0, s.sampler, self.steps, s.guidance_scale, s.thresholding, s.percentile)
        def theirs(): return baseline.sample(self.diffusion, plain, y, 0, self.steps, s.guidance_scale, s.thresholding, s.percentile)
        found = {'ours': ours, 'baseline': with_tf32(False, theirs)}
        if self.gpu:
            compiled = network(self.preset, self.device).to(memory_format=torch.channels_last)
            compiled.compile(mode='reduce-overhead')  # CUDA graphs
            found['ours, compiled'] = lambda: ours(compiled)
            found['baseline, TF32'] = with_tf32(True, theirs)
        if diffusers:
            unet, scheduler = rival.make_rival(self.preset.decoder, self.preset.data.image_size, diffusers).to(self.device), diffusers.DDIMScheduler(prediction_type='sample' if self.diffusion.target == 'x0' else {'eps': 'epsilon', 'v': 'v_prediction'}[self.diffusion.target])
            draw = lambda: rival.sample(unet, scheduler, self.batch, self.steps, s.guidance_scale, torch.Generator().manual_seed(0), self.device)
            found['diffusers'] = with_tf32(False, draw)
            if self.dtype == torch.bfloat16:
                def at_our_precision():
                    with autocast(self.device): return draw()
                found['diffusers, bfloat16'] = at_our_precision
        return found

    def sampling(self) -> dict:
        "Seconds of one step for one picture, and how many times faster ours is."
        times = alternate(self.candidates(), self.device, 3*self.seconds)
        s, rate = self.preset.sampling, matmul_rate(self.device, self.dtype, self.seconds/20)
        table = compare(times, 'ours', self.steps*self.batch)
        work = 2e9*self.gflop/min(table[name]['seconds'] for name in ('ours', 'ours, compiled') if name in table)  # both halves of the guidance
        found = {'batch': self.batch, 'steps': self.steps, 'default_steps': s.steps, 'precision': str(self.dtype).removeprefix('torch.'), 'gflop_of_a_pass': self.gflop,
                 'matmul_rate': rate, 'share_of_matmul_rate': work/rate, 'candidates': table}
        if diffusers: found['rival_flop_ratio'] = rival.gflop(self.preset.decoder, self.preset.data.image_size, diffusers)/self.gflop
        else: found['rival_missing'] = rival.MISSING
        return found

    def agreement(self) -> dict:
        "Ours and the baseline draw the same pictures: the largest and the mean difference of Algorithm 1 from the same noise, in grey levels."
        s, y = self.preset.sampling, torch.randn(2, self.preset.clip.embedding_size, generator=torch.Generator().manual_seed(2)).to(self.device)
        steps = 3 if self.tiny else 20
        ours = decode(self.diffusion, self.model, y, 0, 'ddpm', steps, s.guidance_scale, s.thresholding, s.percentile)
        theirs = baseline.sample(self.diffusion, baseline.Baseline(self.model).eval(), y, 0, steps, s.guidance_scale, s.thresholding, s.percentile)
        difference = 127.5*(ours - theirs).abs()
        return {'steps': steps, 'largest': difference.max().item(), 'mean': difference.mean().item()}

    # -- an honest baseline -------------------------------------------------------------------------------------
    def honesty(self) -> dict:
        "The baseline on the network that was measured before ours was written, in units of a matrix product of as many operations."
        torch.manual_seed(0)
        model = UNet(64, **(FACTS_NETWORK | (dict(channel_mult=(1, 1), num_res_blocks=1) if self.tiny else {}))).to(self.device).eval()
        gflop, plain, n = stage_table(model).GFLOP.sum(), baseline.Baseline(model).eval(), 1 if self.tiny else 8
        x, t, y = torch.randn(n, 3, 64, 64, device=self.device), torch.full((n,), 500, device=self.device), torch.randn(n, 512, device=self.device)
        a, b = (torch.randn(1024, 1024, device=self.device) for _ in range(2))
        products = max(1, round(n*gflop*1e9/(2*1024**3)))
        def product():
            for _ in range(products): a@b
        with torch.no_grad(), tf32(False), weights_stay():
            times = alternate({'ours': lambda: model(x, t, y), 'baseline': lambda: plain(x, t, y), 'matrix product': product}, self.device, self.seconds)
        table = compare(times, 'matrix product', n)
        expected, measured = FACTS['milliseconds']/FACTS['matmul_milliseconds'], table['baseline']['ratio']
        return {'parameters': sum(p.numel() for p in model.parameters()), 'gflop': gflop, 'batch': n, 'candidates': table, 'expected': expected,
                'measured': measured, 'difference': measured/expected - 1}

    # -- training -----------------------------------------------------------------------------------------------
    def training(self) -> dict:
        "Seconds of a training step for one picture, from prepared shards, and the share that waits for data."
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            for split in ('train', 'validation'): save_prepared(folder/split, 2, 4*self.train_batch, self.preset.clip.embedding_size, self.preset.data.image_size)
            Statistics.unit(self.preset.clip.embedding_size).save(folder/'statistics.safetensors')
            first = DecoderTask(self.preset, folder)
            def task():
                task = copy.copy(first)
                task.model = network(self.preset, self.device).train()
                return task
            config = dict(batch_size=self.train_batch, learning_rate=1e-4, clip_norm=1., ema=0.999, steps=10**6)
            def loop(name, **changes): return _Run(task(), TrainConfig(**(config | changes)), folder/name, 0, self.device, None, None, False)
            run, data = loop('ours'), task()
            run.model.train()
            data.gpu = run.gpu  # the noise of the baseline is drawn there, too
            plain, step = baseline.Training(baseline.Baseline(data.model).to(self.device), data.loss, 1e-4), itertools.count()
            def batch(i, n=self.train_batch):
                indices = torch.arange(i*n, (i + 1)*n) % len(data)
                return [b.to(self.device) for b in data.batch(indices, make_generators(i, n))]
            found = {'ours': run.train_step, 'baseline': with_tf32(False, lambda: plain(batch(next(step))))}
            if self.gpu:
                compiled = loop('compiled', compile=True)
                compiled.model.train()
                found |= {'ours, compiled': compiled.train_step, 'baseline, TF32': with_tf32(True, lambda: plain(batch(next(step))))}
            times = alternate(found, self.device, 3*self.seconds)
            table = compare(times, 'ours', self.train_batch)
            loading = alternate({'batch': lambda: run.draw_batch(next(step))}, self.device, self.seconds/20)['batch']
            data.gpu = False  # the two losses below need the same noise
            few = min(16, self.train_batch)  # the thesis's batch
            smaller = loop('memory', batch_size=few)
            smaller.model.train()
            smaller.train_step()  # the optimiser's state is allocated once
            with peak_memory(self.device) as memory: smaller.train_step()
            kept = 4*sum(p.nbytes for p in smaller.parameters)  # weights, two moments, average; gradients come and go with the step
            fastest = min(row['seconds'] for name, row in table.items() if name.startswith('ours'))*self.train_batch
            work, rate = 3e9*self.gflop, matmul_rate(self.device, self.dtype, self.seconds/20)
            return {'batch': self.train_batch, 'precision': str(self.dtype).removeprefix('torch.'), 'candidates': table, 'images_per_second': self.train_batch/fastest,
                    'data_share': sorted(loading)[len(loading)//2]/fastest, 'memory': {'batch': few, 'bytes_of_a_step': memory.bytes, 'bytes_kept': kept},
                    'matmul_rate': rate,
                    'share_of_matmul_rate': work*self.train_batch/fastest/rate, 'losses': self.losses(task, lambda i: batch(i, min(4, few)) if self.gpu else batch(i, few))}

    def losses(self, task, batch) -> dict:
        "The loss of both over the same steps from the same weights, data and noise, without dropout; the means of the last quarter."
        steps = 4 if self.tiny else 200
        ours, data = baseline.Training(self.still(task().model).to(self.device), task().loss), task()
        theirs = baseline.Training(self.still(baseline.Baseline(data.model)).to(self.device), data.loss)
        curves = {'ours': [], 'baseline': []}
        for i in range(steps):
            with autocast(self.device): curves['ours'].append(ours(batch(i)).item())
            with tf32(False): curves['baseline'].append(theirs(batch(i)).item())
        last = {k: sum(v[-max(1, steps//4):])/max(1, steps//4) for k, v in curves.items()}
        return {'steps': steps, **curves, 'difference': last['ours']/last['baseline'] - 1}

    @staticmethod
    def still(model):
        "A network whose dropout is off, in training mode all the same."
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout): layer.p = 0.
        return model

    def precision(self) -> dict:
        """Which precision is faster here: products, and a guided step for one picture. Where it is bfloat16: do its pictures differ less from float32's of the same noise
        than those of two seeds do? KID, and how many grey levels lie between."""
        types, used = {'float32': torch.float32, 'bfloat16': torch.bfloat16}, str(self.dtype).removeprefix('torch.')
        ours = self.candidates()['ours']
        def within(name, work):
            with unittest.mock.patch.dict(os.environ, T2I_PRECISION=name): return work()
        times = alternate({name: lambda name=name: within(name, ours) for name in types}, self.device, self.seconds)
        found = {'used': used, 'candidates': compare(times, used, self.steps*self.batch), 'matmul_rates': {name: matmul_rate(self.device, dtype, self.seconds/20) for name, dtype in types.items()}}
        if not (self.tiny or used == 'bfloat16'): return found | {'missing': "float32 is used here, so no picture is rounded"}
        pipe, n = TextToImage.from_preset(self.drawn_with, self.device), 16 if self.tiny else 500
        y = pipe.embed_captions(draw_pairs(n).captions)
        def draw(seed, name): return within(name, lambda: np.stack([np.asarray(picture) for picture in pipe(image_embeddings=y, generator=seed)]))
        exact, rounded, other = draw(0, 'float32'), draw(0, 'bfloat16'), draw(1, 'float32')
        kid = {name: evaluate(pictures, exact, device=self.device) for name, pictures in (('bfloat16, same noise', rounded), ('float32, other noise', other))}
        levels = np.bincount(np.abs(rounded.astype(int) - exact).ravel(), minlength=256)
        return found | {'pictures': n, 'kid': {k: [v['kid'], v['kid_std']] for k, v in kid.items()}, 'grey_level_differences': levels.tolist()}

    # -- the rest -----------------------------------------------------------------------------------------------
    def growth(self) -> dict:
        return growth(TextToImage.from_preset(self.drawn_with, self.device), self.tiny, self.seconds/10)

    def startup(self) -> dict:
        "Seconds of fresh processes: `import t2i`, and from nothing to the first picture of a preset."
        programs = {'import t2i': 'import t2i', 'first picture': f"import t2i; t2i.TextToImage.from_preset({self.drawn_with.name!r}, device={str(self.device)!r})('a red apple', generator=0)", 'python alone': ''}
        def run(code): return lambda: subprocess.run([sys.executable, '-c', code], check=True, cwd=REPOSITORY, capture_output=True)
        return compare(alternate({k: run(c) for k, c in programs.items()}, 'cpu', 0, 1 if self.tiny else 5, warm_up=False), 'first picture')

    def profile(self) -> dict:
        "One guided step and one training step: on paper, measured, the gap, and the operations that take the time."
        n, found = self.batch, {}
        x, t, y = torch.randn(2*n, 3, self.model.image_size, self.model.image_size, device=self.device), torch.full((2*n,), 500, device=self.device), torch.randn(2*n, self.model.embedding_size, device=self.device)
        def forward():
            with torch.no_grad(), autocast(self.device): return self.model(x, t, y)
        def step():
            with autocast(self.device): loss = trained(x[:m], t[:m], y[:m]).square().mean()
            loss.backward()
            trained.zero_grad()
        m, trained = self.train_batch, network(self.preset, self.device).train()
        m = min(m, 2*n)
        embedding = lambda: self.model.embed(t, y)
        with torch.no_grad(), weights_stay(): times = alternate({'forward': forward, 'embeddings': embedding}, self.device, self.seconds/4)
        times |= alternate({'training': step}, self.device, self.seconds/2)
        middle = {k: sorted(v)[len(v)//2] for k, v in times.items()}
        with weights_stay(): found['sampling step'] = costs.gap(self.model, 2*n, middle['forward'], self.device, self.dtype) | {'shares': costs.profiled(forward, self.device)}
        found['training step'] = costs.gap(self.model, m, middle['training'], self.device, self.dtype, training=True) | {'shares': costs.profiled(step, self.device)}
        found['embeddings_share'] = middle['embeddings']/middle['forward']
        return found

    def waits(self) -> dict:
        "How often the host waits for the device inside the loop of each sampler."
        s, steps = self.preset.sampling, 5
        y, found = torch.zeros(2, self.model.embedding_size, device=self.device), {}
        for name, sampler in SAMPLERS.items():
            d, generators = self.diffusion.respace(steps), make_generators(0, 2)
            denoiser = guided_denoiser(d, self.model, y, s.guidance_scale, s.thresholding, s.percentile)
            with torch.no_grad(), autocast(self.device):
                found[name] = costs.host_waits(sampler(denoiser, d, randn((3, self.model.image_size, self.model.image_size), generators, self.device), generators), self.device)
        return found


SECTIONS = ('startup', 'agreement', 'honesty', 'sampling', 'training', 'precision', 'profile', 'waits', 'growth')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', default=None, help="emoji, thesis, or the path of a preset; default: emoji, and smoke with --tiny")
    parser.add_argument('--device', default=None)
    parser.add_argument('--out', type=Path, default=None, help="default: benchmarks/results/<machine>.json")
    parser.add_argument('--tiny', action='store_true', help="every path in seconds, with numbers that mean nothing")
    parser.add_argument('--seconds', type=float, default=20., help="time for a comparison of two")
    parser.add_argument('--sections', nargs='+', choices=SECTIONS, default=SECTIONS, help="some only: the others stay as they are in the file")
    options = parser.parse_args()
    bench = Bench(options.preset or ('smoke' if options.tiny else 'emoji'), options.device, options.tiny, options.seconds)
    path = options.out or RESULTS/f'{machine_name(bench.device)}{"-tiny" if options.tiny else ""}.json'
    run(bench, path, options.sections)


def run(bench: Bench, path: Path, sections=SECTIONS):
    "Run the sections one after the other and store each as soon as it is there."
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in sections:
        start = time.perf_counter()
        section = getattr(bench, name)()
        part = results.setdefault(bench.preset.name, {})
        part[name] = section
        part.setdefault('machine', {})[name] = machine(bench.device) | {'seconds': time.perf_counter() - start}
        save_json(path, results)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return results


if __name__ == '__main__': main()
