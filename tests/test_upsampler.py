"""The 64→256 upsamplers: what a picture depends on, labels, and the training of our own."""
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import t2i
from shell import says, shell
from t2i.core import Preset, from_uint8, load_preset, load_weights, make_generators, save_weights
from t2i.data import EMOJI_SETS, PreparedDataset, Statistics, draw_large, fetch_npm, load_emoji
from t2i.decoder import training_draws
from t2i.diffusion import Diffusion, PerfectDenoiser
from t2i.pipeline import TextToImage, draw_to_folder
from t2i.train import train
from t2i.upsampler import UpsamplerTask, ZeroShot, choose_labels, condition, imagenet_names, make_upsampler, make_upsampler_diffusion, in_tiles, redraw, super_resolve, with_low_res


@pytest.fixture(scope='module')
def small():
    "`thesis` with an upsampler of the same structure for 8×8 → 32×32, two steps, and without the rest."
    network = dict(image_size=32, model_channels=32, channel_mult=[1, 1, 2], num_res_blocks=1, attention_resolutions=[8])
    thesis = load_preset('thesis')
    return Preset.nest(thesis | {'upsampler': thesis.upsampler | network | {'sampling': thesis.upsampler.sampling | {'steps': 2}}})


@pytest.fixture(scope='module')
def model(small):
    torch.manual_seed(0)
    model = make_upsampler(small).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.05)
    return model


def test_published_diffusion():
    diffusion = make_upsampler_diffusion('thesis')
    assert (diffusion.timesteps, diffusion.target) == (1000, 'eps')
    np.testing.assert_allclose(diffusion.betas[[0, -1]], [1e-4, 0.02])  # linear, as OpenAI trained it


@torch.no_grad()
def test_low_resolution_picture_is_enlarged_bilinearly_behind_the_latent():
    low_res, x_t = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 32, 32)
    seen = []
    class Network(torch.nn.Module):
        image_size = 32
        def forward(self, x, t, y): seen.append((x, t, y))
    with_low_res(Network(), low_res)(x_t, 't', y='y')
    x, *rest = seen[0]
    assert rest == ['t', 'y'] and torch.equal(x[:, :3], x_t)
    torch.testing.assert_close(x[:, 3:], F.interpolate(low_res, scale_factor=4, mode='bilinear'))


@pytest.mark.parametrize('sampler', ['ddpm', 'ddim', 'dpm_solver_pp'])
def test_a_picture_depends_on_its_own_noise_label_and_input_only(model, small, sampler):
    diffusion, low_res, labels = make_upsampler_diffusion(small), torch.rand(3, 3, 8, 8)*2 - 1, torch.tensor([5, 6, 7])
    def draw(low_res, labels, seeds, **options): return super_resolve(diffusion, model, low_res, labels, seeds, sampler, steps=3, **options)
    together = draw(low_res, labels, [1, 2, 3], batch_size=2)
    assert together.shape == (3, 3, 32, 32) and together.abs().max() <= 1
    for i in range(3): torch.testing.assert_close(draw(low_res[i:i + 1], labels[i:i + 1], [i + 1]), together[i:i + 1], atol=1/255, rtol=0)
    for changed in (draw(-low_res, labels, [1, 2, 3]), draw(low_res, labels + 1, [1, 2, 3]), draw(low_res, labels, [4, 5, 6])):
        assert ((changed - together).abs().flatten(1).max(1).values > 1e-3).all()


def test_training_mode_is_refused(model, small):
    with pytest.raises(ValueError, match='eval'): super_resolve(make_upsampler_diffusion(small), make_upsampler(small).train(), torch.zeros(1, 3, 8, 8), torch.tensor([0]))


def test_noise_needs_a_model_that_knows_it(model, small):
    with pytest.raises(ValueError, match='noise is 0.1'): super_resolve(make_upsampler_diffusion(small), model, torch.zeros(1, 3, 8, 8), torch.tensor([0]), noise=0.1)


def test_preset_without_upsampler():
    for make in (make_upsampler, make_upsampler_diffusion):
        with pytest.raises(ValueError, match=r"'smoke' has no upsampler.*\[upsampler\]"): make('smoke')


class ColourCLIP:
    "An invented CLIP that knows three words and looks at the mean colour."
    logit_scale = 100.
    def encode_images(self, images, normalize): return F.normalize(torch.as_tensor(images).float().mean((1, 2)), dim=1)
    def encode_captions(self, captions, normalize): return torch.stack([torch.tensor([float(w in c) for w in ('red', 'green', 'blue')]) for c in captions])


def test_zero_shot_labels():
    classify = ZeroShot(ColourCLIP(), ['green', 'blue', 'red'])
    x = torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8)*2 - 1  # a red, a green and a blue picture
    assert choose_labels('zero-shot', x, classify).tolist() == [2, 0, 1]
    torch.testing.assert_close(classify.probabilities(x).sum(1), torch.ones(3))


def test_given_labels():
    x = torch.zeros(3, 3, 8, 8)
    for label, labels in [(436, [436]*3), (np.int64(7), [7]*3), ([1, 2, 3], [1, 2, 3]), (torch.tensor([4, 5, 6]), [4, 5, 6])]:
        chosen = choose_labels(label, x, None)
        assert chosen.tolist() == labels and chosen.dtype == torch.int64
    for wrong in ('dog', -1, 1000, [1, 2], None, 1.5, True, ['dog']*3, [float('nan')]*3, [True]*3, torch.tensor(3.)):
        with pytest.raises(ValueError, match='0 to 999'): choose_labels(wrong, x, None)


def test_names_of_the_classes():
    names = imagenet_names()
    assert len(names) == 1000 and names[0] == 'tench' and names[436] == 'station wagon'


@pytest.fixture(scope='module')
def large(small):
    "`smoke` with a small upsampler."
    settings = small.upsampler | {'image_size': 128, 'channel_mult': [1]*4, 'attention_resolutions': []}
    return TextToImage.from_preset(Preset.nest(load_preset('smoke') | {'upsampler': settings}), 'cpu')


def test_pipeline_upsamples(large, pipe):
    "The 64×64 pictures are those of a pipeline without an upsampler; the enlarged ones are the same alone and together, and name their class."
    options = dict(generator=[1, 2], upsample=True, upsampler_label=[436, 948])
    together = large(['a red apple', 'a dog'], **options)
    assert [p.size for p in together] == [(128, 128)]*2 and [p.info['label'] for p in together] == ['station wagon', 'Granny Smith apple']
    alone, = large('a dog', generator=[2], upsample=True, upsampler_label=948)
    assert np.abs(np.asarray(alone, int) - np.asarray(together[1], int)).max() <= 2
    assert large('a dog', generator=1) == pipe('a dog', generator=1)


@pytest.mark.parametrize('given, sentence', [(dict(upsampler_label=1000), 'label is 1000'), (dict(upsampler_label=[1, 2, 3]), 'for each of the 2 pictures'), (dict(upsampler_noise=0.1), 'has not learned from noisy pictures'),
                                             *((dict(upsampler_noise=n), f'noise is {n}.*0 or more') for n in (math.nan, math.inf, -0.1))])
def test_what_the_upsampler_cannot_take_is_told_before_anything_is_drawn(large, monkeypatch, given, sentence, tmp_path):
    monkeypatch.setattr('t2i.pipeline.decode', None)
    with pytest.raises(ValueError, match=sentence): large(['a red apple', 'a dog'], upsample=True, **given)
    with pytest.raises(ValueError, match=sentence): draw_to_folder(large, ['a red apple', 'a dog'], None, tmp_path/'folder', 0, upsample=True, **given)
    assert not (tmp_path/'folder').exists()


def test_a_folder_takes_a_label_for_each_picture(large, tmp_path):
    captions, labels = ['a red apple', 'a dog', 'a cat', 'a car'], np.array([436, 948, 1, 2])
    y = large.embed_captions(captions)
    def draw(n, labels=labels): return draw_to_folder(large, captions[:n], lambda: y[:n], tmp_path, 0, upsample=True, upsampler_label=labels[:n], batch_size=2)
    assert [Image.open(p).info['label'] for p in draw(3)] == [imagenet_names()[k] for k in labels[:3]]
    assert len(draw(4)) == 4 and len(draw(2)) == 2  # it goes on, with more captions or fewer
    with pytest.raises(ValueError, match='labels.1 is 948 there and 7 now'): draw(4, [436, 7, 1, 2])


@pytest.mark.parametrize('asked, seen', [(None, {1}), (2, {2})])
def test_a_folder_is_enlarged_in_the_upsamplers_own_batches(large, tmp_path, monkeypatch, asked, seen):
    "The decoder draws eight at once, or as many as are asked for."
    sizes, enlarge, own = set(), super_resolve, large.preset.upsampler.sampling
    monkeypatch.setitem(own, 'batch_size', 1)
    monkeypatch.setattr('t2i.pipeline.super_resolve', lambda *args, **options: sizes.add(len(args[2])) or enlarge(*args, **options))
    draw_to_folder(large, ['a red apple']*2, lambda: large.embed_captions(['a red apple']*2), tmp_path, 0, upsample=True, upsampler_label=436, batch_size=asked)
    assert sizes == seen


def test_pipeline_upsamples_pictures(large):
    pictures = [Image.new('RGB', (64, 64), c) for c in ('red', 'blue')]
    by_clip = large.upsample(pictures, generator=1)
    assert [p.size for p in by_clip] == [(128, 128)]*2 and all(p.info['label'] in imagenet_names() for p in by_clip)
    assert large.upsample(pictures, 436, generator=1)[0].info['label'] == 'station wagon'
    with pytest.raises(ValueError, match='label is 1000'): large.upsample(pictures, 1000)


def test_pipeline_without_upsampler(pipe):
    for upsample in (lambda: pipe('a dog', upsample=True), lambda: pipe.upsample(Image.new('RGB', (64, 64)))):
        with pytest.raises(ValueError, match='its preset has no upsampler'): upsample()


# -- our own ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def own():
    "`emoji` with embeddings of 4 numbers, 16×16 pictures and 64×64 large ones, trained on crops of 32."
    emoji = load_preset('emoji')
    upsampler = emoji.upsampler | {'image_size': 64, 'crop': 32, 'channel_mult': [1], 'sampling': emoji.upsampler.sampling | {'steps': 2}}
    return Preset.nest(emoji | {'clip': emoji.clip | {'embedding_size': 4}, 'upsampler': upsampler})


@pytest.fixture(scope='module')
def own_model(own):
    torch.manual_seed(0)
    model = make_upsampler(own).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.1)
    return model


def test_own_upsampler_is_small_enough_to_ship(tmp_path):
    model = make_upsampler('emoji')
    assert save_weights(tmp_path/'w.safetensors', model.state_dict(), dtype=torch.float16).stat().st_size <= 3e6
    assert model(torch.zeros(1, 6, 256, 256), torch.tensor([9]), condition(torch.zeros(1, 512), torch.zeros(1))).shape == (1, 3, 256, 256)


@torch.no_grad()
def test_a_fresh_network_knows_the_mean_of_pictures_that_deviate_by_noise(own):
    "The perfect denoiser of Gaussians around the enlarged picture."
    diffusion, model, low_res = make_upsampler_diffusion(own), make_upsampler(own).eval(), torch.rand(1, 3, 16, 16)*2 - 1
    enlarged = F.interpolate(low_res, scale_factor=4, mode='bicubic')
    perfect, x_t = PerfectDenoiser(diffusion, enlarged, own.upsampler.residual), torch.randn(1, 3, 64, 64)
    for t in (torch.tensor([t]) for t in (0, 50, 500, 900)):
        x_0, _ = diffusion.denoiser(with_low_res(model, low_res, 'bicubic'), y=condition(torch.zeros(1, 4), torch.zeros(1)))(x_t, t)
        torch.testing.assert_close(x_0, perfect(x_t, t)[0], atol=1e-4, rtol=0)


def test_own_picture_depends_on_its_own_noise_embedding_input_and_level_only(own, own_model):
    diffusion, low_res, y = make_upsampler_diffusion(own), torch.rand(3, 3, 16, 16)*2 - 1, torch.randn(3, 4)
    def draw(low_res, y, seeds, noise=0.1, **options): return super_resolve(diffusion, own_model, low_res, y, seeds, 'dpm_solver_pp', 3, noise, **options)
    together = draw(low_res, y, [1, 2, 3], batch_size=2)
    assert together.shape == (3, 3, 64, 64) and together.abs().max() <= 1
    for i in range(3): torch.testing.assert_close(draw(low_res[i:i + 1], y[i:i + 1], [i + 1]), together[i:i + 1], atol=1/255, rtol=0)
    for changed in (draw(-low_res, y, [1, 2, 3]), draw(low_res, -y, [1, 2, 3]), draw(low_res, y, [4, 5, 6]), draw(low_res, y, [1, 2, 3], noise=0.)):
        assert ((changed - together).abs().flatten(1).max(1).values > 1e-3).all()


def save_pairs(folder, n=12):
    "Small pictures of noise and the same ones four times as large, in another order; pixels, not smoothed."
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.integers(0, 256, (n, 16, 16, 3), np.uint8))
    large = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    order = torch.arange(n - 1, -1, -1)
    for split in ('train', 'validation'):
        save_weights(folder/f'prepared/{split}/0.safetensors', {'images': small, 'image_embeddings': torch.randn(n, 4).half()}, {'keys': [f'k{i}' for i in range(n)]})
        save_weights(folder/f'large/{split}/0.safetensors', {'images': large[order]}, {'keys': [f'k{i}' for i in order.tolist()]})
    Statistics.unit(4).save(folder/'prepared/statistics.safetensors')
    return folder


@pytest.fixture(scope='module')
def pairs(tmp_path_factory): return save_pairs(tmp_path_factory.mktemp('pairs'))


def test_crops_show_the_same_part_of_the_same_picture(own, pairs):
    task = UpsamplerTask(own, pairs/'prepared', pairs/'large')
    clean = Preset.nest(own | {'upsampler': own.upsampler | {'max_noise': 0.}})
    task.settings = clean.upsampler
    x_0, low_res, y, level = task.examples(task.data, torch.arange(12), make_generators(0, 12))
    assert x_0.shape == (12, 3, 32, 32) and low_res.shape == (12, 3, 8, 8) and (level == 0).all()
    assert (F.avg_pool2d(x_0, 4) - low_res).abs().max() < 1e-5
    assert torch.equal(y, task.data[0].image_embeddings(torch.arange(11, -1, -1)))


def test_crops_show_something(own, pairs):
    paper = torch.full((16, 16, 3), 255, dtype=torch.uint8)
    paper[:, 8:] = torch.randint(0, 256, (16, 8, 3), dtype=torch.uint8)
    columns = [UpsamplerTask.corner(paper, 4, g)[1] for g in make_generators(0, 50)]
    assert min(columns) > 4  # a column of it at least is drawn on
    assert UpsamplerTask.corner(paper[:, :8], 4, make_generators(0, 1)[0]).shape == (2,)  # nothing but paper: any part of it


def test_noise_on_the_small_pictures_is_as_strong_as_the_network_is_told(own, pairs):
    task = UpsamplerTask(own, pairs/'prepared', pairs/'large')
    x_0, low_res, _, level = task.examples(task.data, torch.arange(12).repeat(20), make_generators(0, 240))
    assert 0 <= level.min() and 0.9*own.upsampler.max_noise < level.max() <= own.upsampler.max_noise
    measured = (low_res - F.avg_pool2d(x_0, 4)).flatten(1).std(1)
    assert (measured/level)[level > 0.01].mean().item() == pytest.approx(1, abs=0.05)


class Grey(torch.nn.Module):
    "Sees grey in everything, and remembers what it saw."
    def __init__(self): super().__init__(); self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []
    def forward(self, x, t, y): self.seen.append((x, t)); return torch.zeros(len(x), 6, *x.shape[2:])


def test_the_decoder_redraws_small_pictures_and_the_network_is_told_how_wrong_they_are(own, pairs):
    always = Preset.nest(own | {'upsampler': own.upsampler | {'redrawn': 1.}, 'diffusion': {'target': 'x0'}})
    task = UpsamplerTask(always, pairs/'prepared', pairs/'large', Grey())
    x_0, low_res, _, level = task.examples(task.data, torch.arange(12), make_generators(0, 12))
    assert low_res.abs().max() < 1e-5 and len(task.decoder.seen) == 2
    small = from_uint8(task.data[0].images(torch.arange(11, -1, -1)))
    torch.testing.assert_close(level, small.square().mean((1, 2, 3)).sqrt())
    task.settings = Preset.nest({**own.upsampler, 'redrawn': 0.})
    _, noisy, _, level = task.examples(task.data, torch.arange(12), make_generators(0, 12))
    assert len(task.decoder.seen) == 2 and level.max() <= own.upsampler.max_noise


def test_the_decoder_redraws_as_it_draws(own, pairs):
    "A preset that expects errors tells it of them."
    def told(**sampling):
        preset = Preset.nest(own | {'upsampler': own.upsampler | {'redrawn': 1.}, 'diffusion': {'target': 'x0'}, 'sampling': own.sampling | sampling})
        task = UpsamplerTask(preset, pairs/'prepared', pairs/'large', Grey())
        task.examples(task.data, torch.arange(12), make_generators(0, 12))
        return torch.stack([t for _, t in task.decoder.seen])
    plain = told(exposure_bias=0.)
    assert torch.equal(told(exposure_bias=0.5), Diffusion(target='x0').expect_errors(0.5).told[plain]) and (told(exposure_bias=0.5) > plain).any()


def test_redrawing_goes_back_no_further_than_it_is_told():
    "A denoiser that knows the picture gives it back from anywhere; one that sees grey gives grey, and both see the latents of the right timesteps."
    diffusion, x_0, t, seen = Diffusion(target='x0'), torch.rand(2, 3, 4, 4)*2 - 1, torch.tensor([300, 700]), []
    noise = torch.randn_like(x_0)
    def knows(x_t, t): seen.append((x_t, t)); return x_0, None
    torch.testing.assert_close(redraw(diffusion, knows, x_0, t, noise, steps=3), x_0, atol=1e-4, rtol=0)
    assert [s[1].tolist() for s in seen] == [[300, 700], [200, 466], [100, 233]]
    for x_t, t in seen: torch.testing.assert_close(x_t, diffusion.q_sample(x_0, t, noise), atol=1e-4, rtol=0)


def test_dropped_embeddings_are_zero_and_the_level_stays(own, pairs):
    task, seen = UpsamplerTask(own, pairs/'prepared', pairs/'large'), []
    x_0, low_res, y, level = task.examples(task.data, torch.arange(4), make_generators(0, 4))
    t, noise, _ = training_draws(task.diffusion, x_0, 0., 0)
    def network(x, t, y): seen.append(y); return x[:, :3]
    task.loss(network, (x_0, low_res, y, level, t, noise, torch.tensor([True, False, True, False])))
    torch.testing.assert_close(seen[0], condition(y*torch.tensor([0, 1, 0, 1])[:, None], level))


def test_other_pictures_are_refused(own, pairs, tmp_path):
    save_weights(tmp_path/'train/0.safetensors', {'images': torch.zeros(1, 64, 64, 3, dtype=torch.uint8)}, {'keys': ['stranger']})
    with pytest.raises(ValueError, match="1 pictures .* are not in .* 'stranger'"): UpsamplerTask(own, pairs/'prepared', tmp_path)
    save_weights(tmp_path/'train/0.safetensors', {'images': torch.zeros(1, 32, 32, 3, dtype=torch.uint8)}, {'keys': ['k0']})
    with pytest.raises(ValueError, match='have 32 pixels a side, and the upsampler of the preset draws 64'): UpsamplerTask(own, pairs/'prepared', tmp_path)


def test_another_target_and_other_sizes_are_refused(own, pairs, tmp_path):
    for target in ('eps', 'v'):
        with pytest.raises(ValueError, match=f'target is {target}: set target = "x0"'): UpsamplerTask(Preset.nest(own | {'upsampler': own.upsampler | {'diffusion': own.upsampler.diffusion | {'target': target}}}), pairs/'prepared', pairs/'large')
    with pytest.raises(ValueError, match='have 16 pixels a side, those in .* 64, and crops 30: each'): UpsamplerTask(Preset.nest(own | {'upsampler': own.upsampler | {'crop': 30}}), pairs/'prepared', pairs/'large')
    for size in (24, 128):
        save_pairs(tmp_path/str(size))
        path = tmp_path/str(size)/'prepared/train/0.safetensors'
        tensors, metadata = load_weights(path, None)
        save_weights(path, tensors | {'images': torch.zeros(len(tensors['images']), size, size, 3, dtype=torch.uint8)}, metadata)
        with pytest.raises(ValueError, match=f'have {size} pixels a side, those in .* 64, and crops 32: each must be a whole number'): UpsamplerTask(own, tmp_path/str(size)/'prepared', tmp_path/str(size)/'large')


def test_pictures_whose_keys_are_not_their_own_are_refused(own, tmp_path):
    "As of two data sets that both count from 0."
    save_pairs(tmp_path)
    images = load_weights(tmp_path/'prepared/train/0.safetensors', None)[0]
    save_weights(tmp_path/'prepared/train/1.safetensors', {k: v[:2] for k, v in images.items()}, {'keys': ['k3', 'new']})
    with pytest.raises(ValueError, match='1 of the 14 pictures in .*prepared/train have a key that another one has'): UpsamplerTask(own, tmp_path/'prepared', tmp_path/'large')
    (tmp_path/'prepared/train/1.safetensors').unlink()
    save_weights(tmp_path/'large/train/1.safetensors', {'images': torch.zeros(1, 64, 64, 3, dtype=torch.uint8)}, {'keys': ['k3']})
    with pytest.raises(ValueError, match='1 of the 13 pictures in .*large/train have a key that another one has'): UpsamplerTask(own, tmp_path/'prepared', tmp_path/'large')


def test_own_upsampler_learns_and_goes_on(own, pairs, tmp_path):
    "Enlarged pixel by pixel is something that bicubic interpolation does not do."
    config = dict(batch_size=4, learning_rate=3e-3, validate_every=20, sample_every=20, log_every=20, decay='constant')
    def run(steps, out):
        torch.manual_seed(0)
        train(UpsamplerTask(own, pairs/'prepared', pairs/'large'), config | {'steps': steps}, tmp_path/out, device='cpu', progress=False)
        return PreparedWeights(tmp_path/out)
    class PreparedWeights:
        def __init__(self, folder): self.bytes, self.log = (folder/'weights.safetensors').read_bytes(), (folder/'log.csv').read_text().splitlines()
    whole = run(40, 'whole')
    first, last = (dict(zip(whole.log[0].split(','), line.split(','))) for line in (whole.log[1], whole.log[-1]))
    assert float(last['validation_squared']) < float(first['validation_squared']) < float(first['validation_enlarged'])
    run(20, 'parts')
    assert run(40, 'parts').bytes == whole.bytes
    assert (tmp_path/'whole/samples/0000040.png').exists()


@pytest.fixture
def npm_cache(tmp_path):
    "npm packages with one red and blue icon for each emoji that ships."
    table = load_emoji(columns=['key'])
    for package, (style, version) in EMOJI_SETS.items():
        folder = tmp_path/f"npm/{package.split('/')[-1]}-{version}"
        folder.mkdir(parents=True)
        names = [key.split('/', 1)[1] for key in table.key if key.startswith(f'{style}/')]
        icon = {'body': '<path fill="#f00" d="M0 0h8v16H0z"/><path fill="#00f" d="M8 0h8v16H8z"/>'}
        (folder/'icons.json').write_text(json.dumps({'width': 16, 'height': 16, 'icons': {name: icon for name in names}}))
    return tmp_path/'npm'


def test_large_pictures_are_drawn_in_the_order_of_the_shards_and_once(npm_cache, tmp_path):
    pytest.importorskip('resvg_py')
    out = draw_large(tmp_path/'large', 32, npm_cache, limit=3, rows_per_shard=2, progress=False)
    for split in ('train', 'validation', 'test'):
        data = PreparedDataset(out/split)
        assert data.keys == list(load_emoji(split, ['key']).key[:3])
        images = data.images(torch.arange(3))
        assert images.shape == (3, 32, 32, 3)
        assert (images[:, :, :16] == torch.tensor([255, 0, 0])).all() and (images[:, :, 16:] == torch.tensor([0, 0, 255])).all()
    kept, lost = out/'train/00000.safetensors', out/'train/00001.safetensors'
    before = kept.stat().st_mtime_ns
    lost.unlink()
    draw_large(tmp_path/'large', 32, npm_cache, limit=3, rows_per_shard=2, progress=False)
    assert lost.exists() and kept.stat().st_mtime_ns == before
    draw_large(tmp_path/'large', 16, npm_cache, limit=4, rows_per_shard=2, progress=False)  # other pictures, of another size
    assert PreparedDataset(out/'train').images(torch.arange(4)).shape == (4, 16, 16, 3) and PreparedDataset(out/'train').keys == list(load_emoji('train', ['key']).key[:4])


def test_processes_may_fetch_a_package_at_once(tmp_path, monkeypatch):
    "With an npm that packs a file; what it leaves is the folder and nothing else."
    (tmp_path/'bin').mkdir()
    (tmp_path/'bin/npm').write_text("#!/bin/sh\nmkdir package && echo hello > package/icons.json && sleep 0.3 && tar czf p.tgz package && rm -r package && echo p.tgz\n")
    (tmp_path/'bin/npm').chmod(0o755)
    monkeypatch.setenv('PATH', f"{tmp_path/'bin'}:{os.environ['PATH']}")
    monkeypatch.delattr('tarfile.data_filter', raising=False)  # as in Python 3.11.2
    with ThreadPoolExecutor(3) as pool: folders = list(pool.map(lambda _: fetch_npm('@icons/some', '1.0', tmp_path/'cache'), range(3)))
    assert set(folders) == {tmp_path/'cache/some-1.0'} and (folders[0]/'icons.json').read_text() == 'hello\n' and os.listdir(tmp_path/'cache') == ['some-1.0']


def test_training_without_npm_or_larger_pictures_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PATH', str(tmp_path))
    for options, words in ([], ['npm', 'Node.js']), (['--prepared', str(tmp_path)], ['256 pixels', '--large']):
        says(shell('train', 'upsampler', '--preset', 'emoji', '--device', 'cpu', *options), *words)


def test_pipeline_with_our_own(own, tmp_path):
    "The embedding that the decoder drew from is the upsampler's; a label is refused; it is saved and loaded with the rest."
    settings = own.upsampler | {'image_size': 128, 'sampling': own.upsampler.sampling | {'noise': 0.2}}
    pipe = TextToImage.from_preset(Preset.nest(load_preset('smoke') | {'upsampler': settings}), 'cpu')
    for p in pipe.upsampler.parameters(): torch.nn.init.normal_(p, std=0.1)
    small, large = pipe('a dog', generator=1), pipe('a dog', generator=1, upsample=True)
    assert large[0].size == (128, 128) and not large[0].info
    shown = lambda **options: np.asarray(pipe.upsample(small, generator=1, **options)[0], int)
    y = pipe.embed_captions(['a dog'])
    assert np.abs(shown(image_embeddings=y) - shown()).max() > 0 and np.abs(shown(noise=0.) - shown()).max() > 0
    with pytest.raises(ValueError, match='without classes'): pipe.upsample(small, label=5)
    with pytest.raises(ValueError, match='1 image_embeddings were given for 2 pictures: give one for each'): pipe.upsample(small*2, image_embeddings=y)
    again = TextToImage.from_pretrained(pipe.save_pretrained(tmp_path), 'cpu')
    assert again('a dog', generator=1, upsample=True) == large


def test_tiles_meet_without_a_seam():
    "Whatever the size, each pixel is the mean of what the tiles over it say, and no tile is larger than it should be."
    for h, w in ((8, 8), (9, 8), (8, 30), (5, 21), (40, 3)):
        x, seen = torch.rand(3, h, w), []
        def enlarge(tiles): seen.append(tiles.shape); return tiles.repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(in_tiles(enlarge, x, 8, overlap=3), x.repeat_interleave(2, 1).repeat_interleave(2, 2))
        assert seen[0][2:] == (8, 8)
    brighter = in_tiles(lambda tiles: torch.arange(len(tiles)).float()[:, None, None, None].expand(-1, 3, 16, 16), torch.zeros(3, 8, 13), 8, overlap=3)
    row = brighter[0, 0]
    assert row[0] == 0 and row[-1] == 1 and (row.diff() >= 0).all() and row.diff().max() < 0.2  # one fades into the other


@pytest.mark.parametrize('size, overlap', [(16, 16), (8, 16), (4, 0), (1, 16)])
def test_tiles_smaller_than_their_overlap(size, overlap):
    x = torch.rand(3, 20, 17)
    torch.testing.assert_close(in_tiles(lambda tiles: tiles.repeat_interleave(2, 2).repeat_interleave(2, 3), x, size, overlap), x.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_tiles_do_not_depend_on_the_batch(own):
    "Each draws its own noise, also where the sampler needs some at every step."
    settings = own.upsampler | {'image_size': 128, 'sampling': own.upsampler.sampling | {'sampler': 'ddpm', 'steps': 3}}
    pipe = TextToImage.from_preset(Preset.nest(load_preset('smoke') | {'upsampler': settings}), 'cpu')
    for p in pipe.upsampler.parameters(): torch.nn.init.normal_(p, std=0.1)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 150, 3), np.uint8))
    alone, together = (np.asarray(pipe.upsample(picture, generator=1, batch_size=n)[0], int) for n in (1, 8))
    assert np.abs(alone - together).max() <= 1


def test_public_function():
    "One picture or several, of any size, PIL in and out."
    pictures = [Image.new('RGB', (64, 64), 'red'), Image.new('RGB', (100, 50), 'blue'), Image.new('RGB', (20, 40), 'green')]
    large = t2i.upsample(pictures, generator=1, noise=0., device='cpu')
    assert [p.size for p in large] == [(256, 256), (400, 200), (256, 256)]
    for picture, colour in zip(large, ([255, 0, 0], [0, 0, 255])): assert np.abs(np.asarray(picture, int) - colour).mean() < 8
    assert np.abs(np.asarray(t2i.upsample(pictures[0], generator=1, noise=0., device='cpu')[0], int) - np.asarray(large[0], int)).max() <= 2


def test_command_enlarges_where_the_preset_has_an_upsampler_of_its_own(tmp_path):
    for options, size in ([], 256), (['--no-upsample'], 64):
        result = shell('generate', 'a red apple', '--steps', 2, '--device', 'cpu', '--out', tmp_path/str(size), *options)
        assert result.exit_code == 0, result.output
        assert Image.open(tmp_path/str(size)/'00000.png').size == (size, size)


def test_a_tile_is_filled_up_with_paper():
    seen = []
    def enlarge(tiles): seen.append(tiles); return tiles
    in_tiles(enlarge, torch.zeros(3, 5, 21), 8)
    assert all((tile[:, 5:] == 1).all() and (tile[:, :5] == 0).all() for tile in seen[0])


def test_a_picture_is_enlarged_the_same_whichever_are_with_it():
    "By its own embedding and noise."
    emoji = load_preset('emoji')
    upsampler = emoji.upsampler | {'image_size': 128, 'crop': 32, 'channel_mult': [1], 'sampling': emoji.upsampler.sampling | {'steps': 2}}
    pipe = TextToImage.from_preset(Preset.nest(load_preset('smoke') | {'upsampler': upsampler}), 'cpu')
    for p in pipe.upsampler.parameters(): torch.nn.init.normal_(p, std=0.1)
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (n, n, 3), np.uint8)) for i, n in enumerate((64, 70, 64, 64))]
    together = pipe.upsample(pictures, generator=[1, 2, 3, 4], batch_size=2)
    for i, picture in enumerate(pictures):
        alone, = pipe.upsample(picture, generator=[i + 1])
        assert np.abs(np.asarray(alone, int) - np.asarray(together[i], int)).max() <= 1


def test_zero_shot_classification_has_the_scale_of_its_clip():
    clip = SimpleNamespace(logit_scale=10., encode_images=lambda images, normalize: torch.eye(3), encode_captions=lambda captions, normalize: torch.eye(3))
    torch.testing.assert_close(ZeroShot(clip, ['a', 'b', 'c']).probabilities(torch.zeros(3, 3, 8, 8)), (10*torch.eye(3)).softmax(1))


def test_crops_come_from_everywhere():
    x = torch.randint(0, 256, (6, 6, 3), dtype=torch.uint8)
    assert {tuple(UpsamplerTask.corner(x, 4, g).tolist()) for g in make_generators(0, 200)} == {(i, j) for i in range(3) for j in range(3)}


def test_an_upsampler_that_draws_no_numbers_is_told(large):
    broken = deepcopy(large)
    with torch.no_grad(): broken.upsampler.out[-1].weight.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='not a number'): broken.upsample(Image.new('RGB', (64, 64)))


def test_command_never_takes_the_place_of_what_it_enlarges(tmp_path, monkeypatch):
    picture = tmp_path/'a.png'
    Image.new('RGB', (64, 64), 'red').save(picture)
    before = picture.read_bytes()
    for out in (tmp_path, tmp_path/'sub/..'):
        (tmp_path/'sub').mkdir(exist_ok=True)
        says(shell('upsample', picture, '--out', out), 'would take the place of', 'a.png')
    assert picture.read_bytes() == before


def test_command_enlarges_the_pictures_of_a_folder(tmp_path):
    (tmp_path/'small').mkdir()
    for name in ('b.png', 'a.jpg', '.hidden.png', 'notes.txt'): Image.new('RGB', (64, 64), 'red').save(tmp_path/'small'/name, 'PNG')
    done = shell('upsample', tmp_path/'small', '--out', tmp_path/'large', '--device', 'cpu')
    assert done.exit_code == 0 and sorted(p.name for p in (tmp_path/'large').iterdir()) == ['a.png', 'b.png'], done.output
    says(shell('upsample', tmp_path/'small', '--out', tmp_path/'small'), 'would take the place of', 'b.png')
    (tmp_path/'small/c.png').write_text('none')
    says(shell('upsample', tmp_path/'small', '--out', tmp_path/'others'), 'c.png is damaged')
    assert not (tmp_path/'others').exists()  # before the first is enlarged


def test_command_goes_on_enlarging_where_it_was_stopped(tmp_path, monkeypatch):
    for name, colour in (('a', 'red'), ('b', 'green'), ('c', 'blue')): Image.new('RGB', (64, 64), colour).save(tmp_path/f'{name}.png')
    def enlarge(*options): return shell('upsample', *(tmp_path/f'{name}.png' for name in 'abc'), '--out', tmp_path/'large', '--batch-size', 1, *options)
    ours, calls = TextToImage.upsample, []
    def stopped(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 3: raise KeyboardInterrupt
        return ours(self, *args, **kwargs)
    monkeypatch.setattr(TextToImage, 'upsample', stopped)
    assert 'the same command goes on' in enlarge().output
    assert sorted(p.name for p in (tmp_path/'large').iterdir()) == ['a.png', 'b.png']
    assert enlarge().exit_code == 0 and len(calls) == 4
    assert enlarge().exit_code == 0 and len(calls) == 4  # nothing is left to do
    says(enlarge('--seed', 1), 'would take the place of', 'a.png')
    says(enlarge('--noise', 0.1), 'would take the place of', 'a.png')
    Image.new('RGB', (64, 64)).save(tmp_path/'b.png')
    says(enlarge(), 'would take the place of', 'b.png')
    assert len(calls) == 4


def test_command_takes_no_image_guidance_into_a_folder(tmp_path):
    says(shell('generate', 'a red apple', '--preset', 'smoke', '--out', tmp_path/'folder', '--image-guidance-scale', '0.3'), '--image-guidance-scale')
    assert not (tmp_path/'folder').exists()


def test_the_network_is_given_the_small_picture_enlarged_as_its_preset_says(own):
    model, low_res, seen = make_upsampler(own).eval(), torch.rand(1, 3, 16, 16)*2 - 1, []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, 3:]))
    super_resolve(make_upsampler_diffusion(own), model, low_res, torch.zeros(1, 4), 0, 'ddim', 1)
    torch.testing.assert_close(seen[0], F.interpolate(low_res, scale_factor=4, mode=own.upsampler.enlarge))


@torch.no_grad()
def test_the_network_is_given_numbers_near_one(own):
    model, seen, a = make_upsampler(own).eval(), [], make_upsampler_diffusion(own).alphas_cumprod[0]
    model.input_blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x_t = (torch.randn(1, 3, 64, 64)*(a*own.upsampler.residual**2 + 1 - a)**0.5).float()  # a latent of the enlarged picture's errors
    model(torch.cat([x_t, torch.zeros_like(x_t)], 1), torch.tensor([0]), condition(torch.zeros(1, 4), torch.zeros(1)))
    assert 0.8 < seen[0][:, :seen[0].shape[1]//2].std() < 1.2


@torch.no_grad()
def test_held_out_pictures_keep_their_embeddings(own, pairs):
    task, seen = UpsamplerTask(Preset.nest(own | {'upsampler': own.upsampler | {'drop': 1.}}), pairs/'prepared', pairs/'large'), []
    task.model.register_forward_pre_hook(lambda _, given, named: seen.append(named['y']), with_kwargs=True)
    task.validate(task.model.eval())
    assert seen[0][:, :4].any(1).all()


def test_an_upsampler_moves_with_its_pipeline():
    assert {p.device.type for p in TextToImage.from_preset('emoji', 'cpu').to('meta').upsampler.parameters()} == {'meta'}
