"""Trainings in processes of their own, which tests can kill, and several of which can train together.

`python tests/runs.py` kills 20 trainings of one process and 20 of two at random moments, lets each go on, compares its final weights
with those of a run that nobody disturbed, and records the result in benchmarks/results/kills.json."""
import contextlib, multiprocessing, os, random, signal, socket, sys, tempfile, time
from pathlib import Path

import torch

from t2i.core import Preset, save_weights
from t2i.data import Statistics
from t2i.train import Log, train

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['torch._dynamo', 'torch.utils.tensorboard', 'accelerate', 'codecarbon', 't2i.decoder', 't2i.translator', 't2i.train'])
PRESET = Preset.nest(dict(
    name='toy', data=dict(image_size=16), clip=dict(embedding_size=8), diffusion=dict(target='v'),
    decoder=dict(pixel_unshuffle=4, model_channels=32, channel_mult=[1, 1], num_res_blocks=1, attention_resolutions=[2], num_head_channels=16, dropout=0., drop=0.2,
                 finish=dict(share=0.5, snr_range=(1, 1000), robust=True)),
    translator=dict(width=16, layers=2, expansion=2, dropout=0.),
    sampling=dict(sampler='ddim', steps=2, guidance_scale=3., image_guidance_scale=0.005, thresholding='dynamic', percentile=99.5, batch_size=4)))
CONFIG = dict(batch_size=8, learning_rate=1e-3, steps=20, ema=0.9, log_every=1, validate_every=10, sample_every=15, save_minutes=0.01)


def prepared(folder) -> Path:
    "Prepared shards of random pictures and embeddings."
    generator, folder = torch.Generator().manual_seed(0), Path(folder)/'prepared'
    for split, n in (('train', 40), ('validation', 6)):
        def normal(*shape): return torch.randn(n, *shape, generator=generator).half()
        save_weights(folder/split/'00000.safetensors', {
            'images': torch.randint(256, (n, 16, 16, 3), generator=generator, dtype=torch.uint8),
            'image_embeddings': normal(8), 'text_embeddings': normal(2, 8)}, {'keys': [f'{split}{i}' for i in range(n)]})
    Statistics.unit(8).save(folder/'statistics.safetensors')
    return folder


def train_decoder(out, config):
    from t2i.decoder import DecoderTask
    train(DecoderTask(PRESET, Path(out).parent/'prepared'), config, out, device='cpu', progress=False)


def work(rank: int, world: int, port: int, function, arguments):
    "One process of several, as `torchrun` would start it."
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # each starts from other random weights: the first one's must win
    if world > 1: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    function(*arguments)
    if world > 1: torch.distributed.destroy_process_group()


def launch(world: int, function, *arguments) -> list:
    "`world` processes that call the function together."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    processes = [CONTEXT.Process(target=work, args=(rank, world, port, function, arguments)) for rank in range(world)]
    for p in processes: p.start()
    return processes


def start(out, world=1, **config) -> list:
    "A training of the toy decoder in the folder `out`; the prepared shards lie beside it."
    return launch(world, train_decoder, out, CONFIG | config)


def finish(processes, timeout=400) -> list:
    "Wait → the exit codes."
    for p in processes: p.join(timeout)
    return [p.exitcode for p in processes]


def stop(processes, number=signal.SIGKILL) -> list:
    for p in processes:
        with contextlib.suppress(ProcessLookupError): os.kill(p.pid, number)  # it may be over
    return finish(processes)


def wait_for(out, step: int, processes, timeout=400):
    "Until the log of a run has reached a step."
    until = time.time() + timeout
    while time.time() < until:
        alive = any(p.is_alive() for p in processes)  # before the log is read: a run that is over has written it
        if any(int(r['step']) >= step for r in Log.read(Path(out)/'log.csv')): return
        if not alive: break
        time.sleep(0.01)
    raise AssertionError(f'{out} did not reach step {step}: exit codes {[p.exitcode for p in processes]}')


class TooLate(AssertionError): pass


def kill_and_resume(folder, world: int, name: str, moment, **config) -> Path:
    "Kill a run when `moment(out, processes)` returns, then let it end → the path of its weights."
    out = Path(folder)/name
    processes = start(out, world, **config)
    moment(out, processes)
    if stop(processes) != [-signal.SIGKILL]*world: raise TooLate(f'{out} was over before it was killed')
    assert finish(start(out, world, **config)) == [0]*world
    return out/'weights.safetensors'


def main(kills=20, seed=0, **config):
    import platform
    from t2i.core import save_json
    config, results, moments = {'steps': 100} | config, {}, random.Random(seed)
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            prepared(folder)
            for name in ('first', 'whole'):  # the first one also loads the libraries
                begun = time.time()
                assert finish(start(Path(folder)/name, world, **config)) == [0]*world
            duration, whole = time.time() - begun, (Path(folder)/'whole/weights.safetensors').read_bytes()
            tried = killed = equal = 0
            while killed < kills:
                tried += 1
                try: path = kill_and_resume(folder, world, f'killed{tried}', lambda *_: time.sleep(moments.uniform(0.1, 0.9)*duration), **config)
                except TooLate: continue
                killed, equal = killed + 1, equal + (path.read_bytes() == whole)
                print(f'{world} process(es): {equal} of {killed} bit-identical', flush=True)
            results[f'{world} process(es)'] = {'kills': killed, 'bit_identical': equal}
    save_json(Path(__file__).parents[1]/'benchmarks/results/kills.json', results | {'steps': config['steps'], 'torch': torch.__version__, 'processor': platform.machine()})


if __name__ == '__main__': main(*map(int, sys.argv[1:]))
