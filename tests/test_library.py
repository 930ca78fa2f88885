"""Code of one's own on top of the package: parts put together by hand, own schedules, variants and loops, and what is handed over by mistake."""
import copy
import itertools
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from t2i.classifier import ClassifierTask, NoisyClassifier
from t2i.clip import CLIP
from t2i.clip_algebra import rank_of
from t2i.core import from_uint8, load_preset, load_weights, make_generators, rand, randn, save_json, save_weights, table_markdown, to_uint8
from t2i.data import Statistics, decodable, find_picture, load_emoji
from t2i.decoder import decode, make_decoder, make_diffusion
from t2i.diffusion import SCHEDULES, Diffusion
from t2i.experiments import VARIANTS, Pairs, draw_variant
from t2i.guidance import classifier_free, classifier_guidance, clip_guidance, dynamic_threshold, objective_guidance
from t2i.image_guidance import image_guidance
from t2i.metrics import clip_score, extract_features, frechet_distance, kernel_distance, precision_recall
from t2i.pipeline import TextToImage, draw_to_folder
from t2i.plots import as_pictures, image_grid, plot_bars, show_pairs, show_similarity
from t2i.sampling import SAMPLERS, sample
from t2i.unet import UNet

SIZE = 8


def same(a, b): return [p.tobytes() for p in a] == [p.tobytes() for p in b]


@pytest.fixture
def own_pipe(pipe): return copy.deepcopy(pipe)  # to be spoilt


def test_a_value_of_a_preset_that_is_set_is_the_value():
    preset = copy.deepcopy(load_preset('smoke'))
    preset.diffusion.target, preset.decoder.model_channels = 'eps', 64
    assert make_diffusion(preset).target == 'eps' and make_decoder(preset).model_channels == 64
    assert load_preset('smoke').diffusion.target != 'eps'
    preset.diffusion = {'target': 'x0'}
    assert preset.diffusion.target == 'x0'
    with pytest.raises(ValueError, match="'modl_channels'.*model_channels"): load_preset({'name': 'mine', 'decoder': {'modl_channels': 3}})
    assert make_decoder({k: dict(v) if isinstance(v, dict) else v for k, v in preset.items()}).model_channels == 64


def test_pictures_know_the_steps_that_were_set(own_pipe, tmp_path):
    draw_to_folder(own_pipe, ['a'], lambda: torch.zeros(1, own_pipe.decoder.embedding_size), tmp_path, 0)
    own_pipe.preset.sampling.steps += 1
    with pytest.raises(ValueError, match='other settings.*num_inference_steps'): draw_to_folder(own_pipe, ['a', 'b'], lambda: torch.zeros(2, own_pipe.decoder.embedding_size), tmp_path, 0)


def test_the_exposure_bias_that_was_set_is_the_one_that_draws(own_pipe):
    y = torch.ones(1, own_pipe.decoder.embedding_size)
    def drawn(**settings): return own_pipe(image_embeddings=y, generator=0, num_inference_steps=4, **settings)[0].tobytes()
    usual = drawn()
    own_pipe.preset.sampling.exposure_bias = 3.
    assert own_pipe.diffusion.exposure_bias == 3. and drawn() != usual and drawn() == drawn(exposure_bias=3.)


def test_a_preset_need_not_have_what_is_not_used(own_pipe):
    "No percentile where the threshold is static, no scale of image guidance where no image guides."
    own_pipe.preset.sampling.thresholding = 'static'
    for key in ('percentile', 'image_guidance_scale'): own_pipe.preset.sampling.pop(key, None)
    y = torch.ones(1, own_pipe.decoder.embedding_size)
    own_pipe(image_embeddings=y, generator=0)
    with pytest.raises(ValueError, match='image_guidance_scale'): own_pipe(image_embeddings=y, generator=0, base_image=Image.new('RGB', (8, 8)))


def test_shipped_weights_with_another_schedule():
    preset = copy.deepcopy(load_preset('emoji'))
    preset.diffusion.schedule = 'linear'
    with pytest.raises(ValueError, match="trained with the schedule 'cosine', and the preset's is 'linear'"): TextToImage.from_preset(preset, 'cpu')


def test_a_bar_within_a_cell_does_not_end_it():
    assert table_markdown(pd.DataFrame({'a': ['p(x | y)'], 'b': [1]})).splitlines()[-1] == r'| p(x \| y) | 1 |'


# -- hooks and samplers -----------------------------------------------------------------------------------------
def test_image_guidance_for_another_number_of_steps(pipe):
    z, y = torch.zeros(1, 3, pipe.decoder.image_size, pipe.decoder.image_size), torch.ones(1, pipe.decoder.embedding_size)
    def drawn(process): return decode(pipe.diffusion, pipe.decoder, y, 0, steps=5, hook=image_guidance(process, z, 0.1))
    with pytest.raises(ValueError, match=r'made for a process of \d+ steps, and 5 are taken.*respace\(5\)'): drawn(pipe.diffusion)
    drawn(pipe.diffusion.respace(5))


def test_a_guidance_of_ones_own(pipe):
    "It sees which pictures of the batch are drawn, and comes before the threshold."
    levels, parts = torch.tensor([-1., 0., 0.5, 3.]).reshape(4, 1, 1, 1), []
    def guide(denoiser, diffusion, part):
        parts.append((part.start, diffusion.timesteps))
        return lambda x_t, t: (levels[part].expand_as(x_t), denoiser(x_t, t)[1])
    drawn = pipe(image_embeddings=torch.zeros(4, pipe.decoder.embedding_size), generator=0, guide=guide, batch_size=3, num_inference_steps=2, sampler='ddim')
    assert parts == [(0, 2), (3, 2)]
    own = [np.asarray(p).mean() for p in drawn]
    assert own == sorted(own) and own[0] == 0 and own[3] == 255 and len(set(own)) == 4


def test_inpainting_keeps_what_is_known(pipe):
    "The pull on the image that the decoder sees, with a base image and a mask of its own for each picture of a batch of any size."
    size, rng = pipe.preset.data.image_size, np.random.default_rng(0)
    bases = [Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(3)]
    masks = rng.random((3, 1, size, size)) < 0.5
    draw = lambda mask, batch_size, **how: pipe('a', num_images_per_prompt=3, base_image=bases, mask=mask, generator=0, batch_size=batch_size, **how)
    for how in (dict(pull='x_0', image_guidance_scale=1., decay='constant'), dict(image_guidance_scale=0.02)):
        drawn = draw(masks, 3, **how)
        off = lambda others: np.abs(np.stack(others).astype(int) - np.stack(drawn)).max()
        assert off(draw(masks, 2, **how)) <= 1 and off(draw([Image.fromarray(m[0].astype(np.uint8)*255) for m in masks], 2, **how)) <= 1
        assert off(draw(masks[:1], 3, **how)) > 20
        kept = [np.abs(np.asarray(d).astype(int) - np.asarray(b))[m[0]].max() for d, b, m in zip(drawn, bases, masks)]
        assert (max(kept) <= 1) == ('pull' in how)
    assert not same(drawn, draw(masks, 3, image_guidance_scale=0.02, decay=torch.square))


def test_a_decoder_without_weights(pipe):
    class White(torch.nn.Module):
        embedding_size, in_channels, image_size = pipe.decoder.embedding_size, 3, pipe.decoder.image_size
        def forward(self, x, t, y): return torch.ones_like(x)
    preset = copy.deepcopy(pipe.preset)
    preset.diffusion.target = 'x0'
    drawn, = TextToImage(pipe.clip, torch.nn.Identity(), White(), pipe.statistics, preset)('a', generator=0)
    assert (np.asarray(drawn) == 255).all()


def test_other_default_types(pipe, tmp_path):
    folder = pipe.save_pretrained(tmp_path)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try: drawn = TextToImage.from_pretrained(folder, 'cpu')('a cat', generator=0)
        finally: torch.set_default_dtype(torch.float32)
        assert same(drawn, pipe('a cat', generator=0))


def test_a_folder_holds_the_pipeline_that_was_saved_last(own_pipe, tmp_path):
    folder = own_pipe.save_pretrained(tmp_path)
    alone = copy.deepcopy(own_pipe)
    alone.translator = None
    alone.save_pretrained(folder)
    assert not (folder/'translator.safetensors').exists()
    again = TextToImage.from_pretrained(folder, 'cpu')
    assert again.translator is None and same(again('a', translate=False, generator=0), alone('a', translate=False, generator=0))


def test_a_sampler_that_does_not_reach_the_end(monkeypatch):
    denoiser, diffusion, x = (lambda x_t, t: (0*x_t, 0*x_t)), Diffusion().respace(5), torch.zeros(1, 3, 2, 2)
    for some, words in ((2, 'at t = 3'), (0, 'without a step')):
        monkeypatch.setitem(SAMPLERS, 'mine', lambda *of, **options: itertools.islice(SAMPLERS['ddim'](*of, **options), some))
        with pytest.raises(ValueError, match=f"'mine' ended {words}"): sample('mine', denoiser, diffusion, x)


@pytest.mark.parametrize('result', [lambda x: x, lambda x: iter([x])])
def test_a_sampler_that_is_none(result, monkeypatch):
    monkeypatch.setitem(SAMPLERS, 'mine', lambda denoiser, diffusion, x_T, generators, **options: result(x_T))
    with pytest.raises(TypeError, match="'mine' gave a Tensor.*yields a Step"): sample('mine', None, Diffusion().respace(2), torch.zeros(1, 3, 2, 2))


# -- parts ----------------------------------------------------------------------------------------------------
def test_parts_of_other_sizes_are_refused(pipe):
    parts = dict(clip=pipe.clip, translator=pipe.translator, decoder=pipe.decoder, statistics=pipe.statistics, preset=pipe.preset)
    with pytest.raises(ValueError, match='different sizes.*statistics 7'): TextToImage(**parts | {'statistics': Statistics.unit(7)})


def test_networks_of_ones_own(pipe):
    "Any module will do, if it says what it reads and draws."
    parts = dict(clip=pipe.clip, decoder=pipe.decoder, statistics=pipe.statistics, preset=pipe.preset)
    with pytest.raises(TypeError, match='translator is a function.*torch.nn.Module'): TextToImage(translator=lambda y: y, **parts)
    with pytest.raises(TypeError, match='no attribute embedding_size and no in_channels and no image_size'): TextToImage(translator=None, **parts | {'decoder': torch.nn.Identity()})

    class Grey(torch.nn.Module):
        embedding_size, in_channels, image_size = pipe.decoder.embedding_size, 3, pipe.decoder.image_size
        def __init__(self):
            super().__init__()
            self.level = torch.nn.Parameter(torch.tensor(0.))
        def forward(self, x, t, y): return self.level.expand_as(x)
    with pytest.raises(TypeError, match='the upsampler has no attribute embedding_size and no num_classes and no image_size and no enlarge'): TextToImage(translator=None, upsampler=torch.nn.Identity(), **parts)
    preset = copy.deepcopy(pipe.preset)
    preset.diffusion.target = 'x0'
    drawn, = TextToImage(translator=torch.nn.Identity(), **parts | {'decoder': Grey(), 'preset': preset})('a', generator=0)
    assert (np.asarray(drawn) == 128).all()


def test_models_of_other_statistics_are_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    TextToImage.from_pretrained(tmp_path, device='cpu')
    other = Statistics.unit(pipe.decoder.embedding_size)
    other.image.mean += 1
    other.save(tmp_path/'statistics.safetensors')
    with pytest.raises(ValueError, match=r'translator.safetensors.*other statistics'): TextToImage.from_pretrained(tmp_path, device='cpu')


def test_an_upsampler_that_reads_no_embedding_fits_all_statistics(small, tmp_path):
    from t2i.pipeline import MODELS, load_model
    preset = load_preset(small)
    for name in ('upsampler', 'decoder'): save_weights(tmp_path/f'{name}.safetensors', MODELS[name](preset).state_dict(), {'statistics': 'others'})
    load_model('upsampler', preset, tmp_path/'upsampler.safetensors', Statistics.unit(32))
    with pytest.raises(ValueError, match='other statistics'): load_model('decoder', preset, tmp_path/'decoder.safetensors', Statistics.unit(32))


def test_a_pipeline_holds_no_file(pipe, tmp_path):
    "Windows replaces none that is mapped."
    pipe.save_pretrained(tmp_path)
    again = TextToImage.from_pretrained(tmp_path, device='cpu')
    assert str(tmp_path) not in Path('/proc/self/maps').read_text() and again.statistics.digest() == pipe.statistics.digest()


def test_a_pipeline_moves(own_pipe):
    expected = own_pipe('a', generator=0)
    assert own_pipe.to('cpu') is own_pipe and same(own_pipe('a', generator=0), expected)
    own_pipe.to('meta')
    parts = [own_pipe.translator, own_pipe.decoder, own_pipe.clip.model]
    assert {p.device.type for part in parts for p in part.parameters()} | {own_pipe.clip.mean.device.type, own_pipe.clip.std.device.type, own_pipe.device.type, own_pipe.clip.device.type} == {'meta'}
    with pytest.raises(ValueError, match='torch.float16.*take cpu'): own_pipe.to(torch.float16)


def test_a_clip_keeps_its_normalisation(tiny_models, tmp_path):
    import open_clip
    name = 't2i-tiny-quickgelu'
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    clip = CLIP(model, open_clip.get_tokenizer(name), model.visual.image_size, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), device='cpu', name=name)
    clip.save(tmp_path/'clip.safetensors')
    again = CLIP.pretrained(name, device='cpu', folder=tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    torch.testing.assert_close(again.encode_images(images), clip.encode_images(images))


def test_networks_in_training_mode_are_refused(own_pipe):
    own_pipe.translator.train()
    with pytest.raises(ValueError, match='translator is in training mode'): own_pipe('a')
    own_pipe.embed_captions(['a'], translate=False)
    own_pipe.translator.eval()
    picture = own_pipe('a')[0]
    own_pipe.clip.model.train()
    for call in (lambda: own_pipe('a'), lambda: own_pipe.embed_images(picture)):
        with pytest.raises(ValueError, match='CLIP is in training mode'): call()


def test_a_network_is_told_one_thing_as_y():
    with pytest.raises(ValueError, match='embedding_size and num_classes'): UNet(8, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_heads=1, embedding_size=4, num_classes=3)


# -- drawing --------------------------------------------------------------------------------------------------
def test_latents_of_ones_own(pipe):
    expected = pipe('a', num_images_per_prompt=3, generator=5)
    x_T = randn((3, *[pipe.decoder.image_size]*2), make_generators(5, 3))
    for latents, seed in ((x_T, 5), (x_T.double(), 6)): assert same(pipe('a', num_images_per_prompt=3, generator=seed, latents=latents, sampler='ddim', batch_size=2), pipe('a', num_images_per_prompt=3, generator=5, sampler='ddim'))
    assert not same(pipe('a', num_images_per_prompt=3, generator=5, latents=x_T.flip(0), sampler='ddim'), pipe('a', num_images_per_prompt=3, generator=5, sampler='ddim'))
    assert same(expected, pipe('a', num_images_per_prompt=3, generator=5))
    for wrong in (x_T[0], x_T.numpy(), x_T.long(), x_T*float('nan'), x_T[:2]):
        with pytest.raises(ValueError, match=re.escape(f'[3, 3, {pipe.decoder.image_size}')): pipe('a', num_images_per_prompt=3, latents=wrong)


def test_weights_that_are_no_numbers_are_told(own_pipe):
    with torch.no_grad(): next(own_pipe.decoder.parameters()).fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='not a number'): own_pipe('a')


def test_another_default_precision_draws_the_same(pipe):
    expected, numbers = pipe('a', generator=0), (randn((2,), make_generators(0, 2)), rand(make_generators(0, 2)))
    torch.set_default_dtype(torch.float64)
    try:
        assert same(pipe('a', generator=0), expected)
        for now, before in zip((randn((2,), make_generators(0, 2)), rand(make_generators(0, 2))), numbers): assert torch.equal(now, before) and now.dtype == before.dtype
    finally: torch.set_default_dtype(torch.float32)


def test_a_second_condition_is_told_with_and_without_the_first():
    diffusion, seen = Diffusion(target='eps'), []
    def network(x, t, y, size):
        seen.append(size)
        return torch.cat([y[:, :1, None, None] + size[:, None, None, None] + 0*x, torch.zeros_like(x)], 1)
    x, t, y, size = torch.zeros(2, 3, 4, 4), torch.full((2,), 500), torch.ones(2, 5), torch.tensor([1., 2.])
    x_0, _ = classifier_free(diffusion, network, y, 3., size=size)(x, t)
    assert torch.equal(seen[0], torch.tensor([1., 2., 1., 2.]))
    expected, _ = diffusion.interpret(torch.cat([(3 + size)[:, None, None, None].expand_as(x), torch.zeros_like(x)], 1), x, t)  # size + 3·(1 − 0)
    torch.testing.assert_close(x_0, expected)
    network.training, network.in_channels, network.image_size, network.parameters = False, 3, 4, lambda: iter([torch.zeros(1)])
    assert decode(diffusion, network, y, 0, steps=2, size=size).shape == (2, 3, 4, 4) and len(seen) == 3


def test_guidance_inside_of_inference_mode():
    diffusion, denoiser, log_prob = Diffusion(), lambda x, t: (x, torch.zeros_like(x)), lambda x, t: -x.square().sum((1, 2, 3))
    x, t, wanted = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([500]), torch.tensor([1., 0., 0.])
    for guide in (lambda wanted: classifier_guidance(denoiser, diffusion, log_prob, 1.), lambda wanted: clip_guidance(denoiser, diffusion, lambda x: x.mean((2, 3)), wanted, 1.)):
        expected = guide(wanted)(x, t)[0]
        assert not torch.equal(expected, x)
        with torch.inference_mode(): torch.testing.assert_close(guide(wanted.clone())(x.clone(), t)[0], expected)


# -- a process of one's own -------------------------------------------------------------------------------------
@pytest.mark.parametrize('betas', [lambda n: torch.linspace(0, 0.1, n), lambda n: torch.full((n//2,), 0.1), lambda n: torch.full((n,), 1.)])
def test_a_schedule_that_is_none(betas, monkeypatch):
    monkeypatch.setitem(SCHEDULES, 'own', betas)
    with pytest.raises(ValueError, match="'own' does not return β"): Diffusion(timesteps=100, schedule='own')


def test_a_schedule_of_ones_own(monkeypatch):
    monkeypatch.setitem(SCHEDULES, 'own', lambda n: np.linspace(1e-4, 1, n))  # of zero terminal signal-to-noise ratio
    diffusion = Diffusion(timesteps=100, schedule='own', target='v')
    assert diffusion.alphas_cumprod[-1] == 0
    x, t = torch.zeros(2, 3, 4, 4), torch.tensor([99, 99])
    assert all(v.isfinite().all() for v in diffusion.interpret(torch.cat([x, x], 1), torch.randn(2, 3, 4, 4), t))
    with pytest.raises(ValueError, match="'v' or 'x0'"): Diffusion(timesteps=100, schedule='own', target='eps')


def test_bytes_are_no_pictures_for_the_process():
    diffusion, images = Diffusion(), torch.randint(256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    with pytest.raises(ValueError, match='uint8.*from_uint8'): diffusion.q_sample(images, torch.tensor([1, 2]), torch.randn(2, 3, SIZE, SIZE))


@pytest.mark.parametrize('shape', [(1, 6, SIZE, SIZE), (2, 6, SIZE, 1), (2, 5, SIZE, SIZE)])
def test_answers_of_another_shape(shape):
    with pytest.raises(ValueError, match='the network returned'): Diffusion().training_losses(lambda x, t: torch.zeros(shape), torch.zeros(2, 3, SIZE, SIZE), torch.tensor([1, 2]), torch.zeros(2, 3, SIZE, SIZE))


@pytest.mark.parametrize('images', [np.zeros((1, 4, 4, 3)), np.zeros((1, 3, 4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8)])
def test_what_are_no_bytes_of_pictures(images):
    with pytest.raises(ValueError, match=r'uint8 \[N, H, W, 3\]'): from_uint8(images)


def test_bytes_are_not_made_of_bytes():
    with pytest.raises(ValueError, match='uint8.*floats'): to_uint8(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


# -- many pictures, and numbers of them -------------------------------------------------------------------------
def test_a_variant_of_ones_own_is_drawn_again_when_it_changes(pipe, tmp_path, monkeypatch):
    pairs, share = Pairs(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8), ['a', 'b', 'apple']), [1.]
    monkeypatch.setitem(VARIANTS, 'own', lambda pipe, pairs: share[0]*pipe.embed_captions(pairs.captions) + (1 - share[0])*pipe.embed_images(pairs.images))
    def drawn(n, name='own'): return draw_variant(name, pipe, pairs.first(n), folder=tmp_path, seed=3)
    first = drawn(2)
    assert same(first, pipe(pairs.captions[:2], generator=3)) and same(drawn(3)[:2], first)
    share[0] = 1 - 1e-4  # as much as rounding could be
    assert same(drawn(2), first)
    share[0] = 0.
    with pytest.raises(ValueError, match='other settings'): drawn(2)
    drawn(2, 'No CLIP translator')
    monkeypatch.setitem(VARIANTS, 'No CLIP translator', lambda pipe, pairs: pipe.embed_images(pairs.images))
    with pytest.raises(ValueError, match='other settings'): drawn(2, 'No CLIP translator')
    with pytest.raises(ValueError, match="no variant 'mine'"): drawn(2, 'mine')


def test_captions_of_a_table(pipe, tmp_path):
    captions = pd.Series(['a', 'b', 'c'], index=[7, 8, 9])
    paths = draw_to_folder(pipe, captions, lambda: pipe.embed_captions(captions), tmp_path/'a', 1)
    assert len(paths) == 3 and all(p.is_file() for p in paths)
    assert len(draw_to_folder(pipe, 'a dog', lambda: pipe.embed_captions('a dog'), tmp_path/'b', 1)) == 1
    with pytest.raises(ValueError, match='3 embeddings for 2 captions'): draw_to_folder(pipe, ['a', 'b'], lambda: pipe.embed_captions(captions), tmp_path/'c', 1)
    with pytest.raises(ValueError, match='captions hold 3'): draw_to_folder(pipe, ['a', 3], lambda: None, tmp_path/'d', 1)
    with pytest.raises(ValueError, match='the seed is None'): draw_to_folder(pipe, ['a'], lambda: pipe.embed_captions(['a']), tmp_path/'d', None)
    assert not (tmp_path/'d').exists()


def test_queries_that_are_no_numbers_come_last():
    queries, candidates = torch.full((3, 8), float('nan')), torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert rank_of(queries, candidates, torch.arange(3)).tolist() == [50]*3
    assert rank_of(candidates[:3], candidates, torch.arange(3)).tolist() == [1]*3


@pytest.mark.parametrize('distance', [frechet_distance, kernel_distance, precision_recall])
def test_features_that_do_not_belong_together(distance):
    a = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    distance(a, a + 1)
    for wrong, words in ((a[:, :5], r'\[20, 6\] and \[20, 5\]'), (a.numpy(), 'ndarray'), (a*float('nan'), 'not finite')):
        with pytest.raises(ValueError, match=words): distance(a, wrong)


@pytest.mark.parametrize('distance', [frechet_distance, kernel_distance, precision_recall])
def test_features_of_other_kinds(distance):
    a, b = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = distance(a.float(), b.float())
    for kind in (a.half(), b.half()), (a, b), (a.float().requires_grad_(), b.float()), (a.double(), b), (a, b.double()): assert distance(*kind) == pytest.approx(expected, rel=1e-4)


def test_score_of_one_picture(pipe):
    picture, = pipe('a', generator=0)
    assert clip_score(pipe.clip, picture, 'a') == clip_score(pipe.clip, [picture], ['a'])


def test_a_decoder_of_pictures_without_captions_draws_from_pictures(own_pipe, tmp_path):
    own_pipe.statistics.text, own_pipe.translator = None, None
    picture = own_pipe(image_embeddings=torch.zeros(1, 32), num_inference_steps=2, generator=0)[0]
    again = TextToImage.from_pretrained(own_pipe.save_pretrained(tmp_path/'variations'))
    assert again.translator is None and same(again(images=[picture], num_inference_steps=2, generator=0), own_pipe(images=[picture], num_inference_steps=2, generator=0))
    assert 'translator' not in again.to('cpu').fingerprints()
    for translate in (True, False):
        with pytest.raises(ValueError, match='pictures without captions'): again('a cat', translate=translate)


def test_a_translator_that_is_missing_is_missed(own_pipe, tmp_path):
    alone = copy.deepcopy(own_pipe)
    alone.translator = None
    with pytest.raises(ValueError, match='no translator: draw with translate=False'): alone('a cat')
    assert alone('a cat', translate=False)
    with pytest.raises(ValueError, match='embed_captions'): draw_to_folder(own_pipe, ['a'], lambda: 1/0, tmp_path/'x', 1, translate=False)
    assert not (tmp_path/'x').exists()
    folder = own_pipe.save_pretrained(tmp_path/'whole')
    (folder/'translator.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='translator.safetensors'): TextToImage.from_pretrained(folder)


# -- arrays, numbers and files as other programs make them --------------------------------------------------------
def test_arrays_that_are_views(pipe):
    "Such as OpenCV's pictures with their colours in the order of RGB."
    rng = np.random.default_rng(0)
    bgr = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    assert torch.equal(from_uint8(bgr[..., ::-1]), from_uint8(bgr[..., ::-1].copy()))
    assert torch.equal(pipe.embed_images(bgr[..., ::-1]), pipe.embed_images(bgr[..., ::-1].copy()))
    assert torch.equal(extract_features(bgr[..., ::-1], device='cpu').pooled, extract_features(bgr[..., ::-1].copy(), device='cpu').pooled)
    y, mask = rng.standard_normal((2, 32)), rng.random((64, 64))
    draw = lambda y, mask: pipe(image_embeddings=y, mask=mask, base_image=Image.fromarray(bgr[0]), image_guidance_scale=0.01, generator=0)
    assert same(draw(y[::-1], mask[::-1]), draw(y[::-1].copy(), mask[::-1].copy()))
    bgr.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for function in (from_uint8, pipe.embed_images, lambda x: extract_features(x, device='cpu')): function(bgr)


def test_one_array_is_one_picture():
    array = np.random.default_rng(0).integers(0, 256, (20, 10, 3), np.uint8)
    for one in (array, torch.as_tensor(array)):
        picture, = as_pictures(one)
        assert picture.size == (10, 20) and (np.asarray(picture) == array).all()
    assert len(as_pictures([array]*3)) == len(as_pictures(np.stack([array]*3))) == len(as_pictures(torch.zeros(3, 3, 8, 8))) == 3


def test_a_mask_painted_on_nothing(pipe):
    "White where it guides, transparent and black elsewhere."
    base, painted, grey = Image.new('RGB', (64, 64), 'red'), Image.new('RGBA', (64, 64), (0, 0, 0, 0)), Image.new('L', (64, 64))
    painted.paste((255, 255, 255, 255), (0, 0, 32, 32)); grey.paste(255, (0, 0, 32, 32))
    draw = lambda mask: pipe('a', base_image=base, mask=mask, image_guidance_scale=0.05, generator=1)
    assert same(draw(painted), draw(grey))


def test_a_mask_of_16_bits_is_scaled(pipe):
    mask, base = Image.fromarray(np.full((64, 64), 40_000, np.uint16)), Image.new('RGB', (64, 64), 'red')
    draw = lambda mask: pipe('a', base_image=base, mask=mask, image_guidance_scale=0.05, generator=1)
    assert same(draw(mask), draw(np.full((64, 64), round(40_000/257)/255, np.float32))) and not same(draw(mask), draw(None))


@pytest.mark.parametrize('batch_size', [-1, 0, 2.5, '2'])
def test_batches_that_are_none(own_pipe, batch_size):
    own_pipe._check_upsampler = own_pipe._check_upsampling = lambda *_: None
    for draw in (lambda **o: own_pipe('a', **o), lambda **o: own_pipe.upsample(Image.new('RGB', (64, 64)), **o)):
        with pytest.raises(ValueError, match=f'batch_size is {batch_size!r}'): draw(batch_size=batch_size)


def test_translate_is_of_captions_only(pipe):
    for given in (dict(images=Image.new('RGB', (64, 64))), dict(image_embeddings=torch.zeros(1, 32))):
        with pytest.raises(ValueError, match='translate would change nothing without captions'): pipe(**given, translate=False)
    assert pipe('a', translate=False, generator=0)


def test_a_process_of_numpy_numbers_is_written(tmp_path):
    path = save_weights(tmp_path/'x.safetensors', {'x': torch.zeros(1)}, Diffusion(timesteps=np.int64(10)).learned)
    assert load_weights(path)[1]['timesteps'] == 10


def test_a_picture_file_is_read_whole_or_not_at_all(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    picture.save(tmp_path/'whole.png')
    assert find_picture(tmp_path/'whole.png').tobytes() == picture.tobytes()
    (tmp_path/'half.png').write_bytes((tmp_path/'whole.png').read_bytes()[:3000])
    (tmp_path/'text.png').write_text('no picture')
    for name in ('half.png', 'text.png'):
        with pytest.raises(ValueError, match=f'{name} is damaged, or no picture'): find_picture(tmp_path/name)


def test_a_configuration_that_was_changed_by_hand(pipe, tmp_path):
    folder = pipe.save_pretrained(tmp_path/'saved')
    config = json.loads((folder/'config.json').read_text())
    for wrong in ({'nonsense': 1}, {'model_channels': '32'}):
        (folder/'config.json').write_text(json.dumps(config | {'decoder': config['decoder'] | wrong}))
        with pytest.raises(ValueError, match=f"config.json cannot be used: .*{next(iter(wrong))}"): TextToImage.from_pretrained(folder)


def test_a_classifier_of_another_process_or_none(pipe, tmp_path):
    preset = copy.deepcopy(load_preset('smoke'))
    with pytest.raises(FileNotFoundError, match='classifier.safetensors'): NoisyClassifier.from_preset(preset, 'cpu', tmp_path)
    model, path = NoisyClassifier.from_preset(preset, 'cpu'), tmp_path/'classifier.safetensors'
    save_weights(path, model.state_dict(), {'classes': model.classes, 'schedule': preset.diffusion.schedule, 'timesteps': preset.diffusion.timesteps})
    NoisyClassifier.from_preset(preset, 'cpu', tmp_path)
    other = copy.deepcopy(preset)
    other.diffusion.schedule = 'linear'
    with pytest.raises(ValueError, match='schedule'): NoisyClassifier.from_preset(other, 'cpu', tmp_path)
    save_weights(path, model.state_dict(), {})
    with pytest.raises(ValueError, match='does not say what its classes are'): NoisyClassifier.from_preset(preset, 'cpu', tmp_path)


def test_noisy_pictures_keep_their_answers():
    task, which = ClassifierTask('smoke'), torch.arange(700, 764)
    _, t, group, style = task.batch(which, make_generators(0, 64))
    table = decodable(load_emoji('train')).iloc[which]
    assert [task.classes['group'][k] for k in group] == list(table.group) and [task.classes['style'][k] for k in style] == list(table['style'])
    assert t.max() > 900


def test_a_classifier_is_validated_on_held_out_pictures_with_the_same_noise():
    task = ClassifierTask('smoke')
    images, labels = task.held_out
    task.training, task.held_out = None, (images[:4], {q: a[:4] for q, a in labels.items()})
    assert task.validate(task.model.eval()) == task.validate(task.model)


def test_counters_of_a_network_stay_whole_numbers(tmp_path):
    path = save_weights(tmp_path/'x.safetensors', {'n': torch.tensor(2049)}, dtype=torch.float16)
    assert load_weights(path)[0]['n'].item() == 2049


def test_pictures_of_a_prompt_come_together(pipe, monkeypatch):
    seen = []
    monkeypatch.setattr('t2i.pipeline.decode', lambda process, decoder, y, *_, **__: seen.append(y) or torch.zeros(len(y), 3, 64, 64))
    pipe(image_embeddings=torch.tensor([[1.], [2.]]).expand(2, 32), num_images_per_prompt=2, generator=0)
    assert seen[0][:, 0].tolist() == [1, 1, 2, 2]


def test_pictures_of_another_process_are_refused(pipe, tmp_path):
    own = copy.deepcopy(pipe)
    draw_to_folder(own, ['a'], lambda: torch.zeros(1, 32), tmp_path, 0, num_inference_steps=1)
    own.preset.diffusion.schedule = 'linear'
    with pytest.raises(ValueError, match='diffusion.schedule'): draw_to_folder(own, ['a', 'b'], lambda: torch.zeros(2, 32), tmp_path, 0, num_inference_steps=1)


def test_columns_of_numbers_are_aligned_to_the_right():
    assert table_markdown(pd.DataFrame({'a': ['x'], 'b': [1]}), right=True).splitlines()[1] == '| --- | --: |'


def test_numbers_of_a_heat_map_stand_in_their_cells():
    texts = {t.get_text(): t.get_position() for t in show_similarity([[0., 1.], [2., 3.]]).axes[0].texts}
    assert texts['1.00'] == (1, 0) and texts['2.00'] == (0, 1)


def test_bars_tell_three_digits():
    for value, text in ((1.234, '1.23'), (65.94, '65.9'), (124., '124')): assert [t.get_text() for t in plot_bars({'a': value}).axes[0].texts] == [text]


def test_a_bar_with_an_error_shows_it_beside_one_without():
    assert any(type(c).__name__ == 'ErrorbarContainer' for c in plot_bars({'a': (1., 0.1), 'b': 2.}).axes[0].containers)


def test_pictures_a_little_too_narrow_for_a_grid_are_enlarged():
    assert image_grid([Image.new('RGB', (100, 100))]).size == (208, 208)


def test_the_left_of_a_pair_is_on_the_left():
    shown = show_pairs([Image.new('RGB', (8, 8), 'red')], [Image.new('RGB', (8, 8), 'blue')]).axes[0].images[0].get_array()
    assert tuple(shown[0, 0][:3]) == (255, 0, 0) and tuple(shown[0, -1][:3]) == (0, 0, 255)


def test_half_written_pictures_of_others_stay(pipe, tmp_path):
    for name in ('.00001.png.ab.png', '.00002.png.ab.png', '.1x.png'): (tmp_path/name).touch()
    draw_to_folder(pipe, ['a', 'b'], lambda: torch.zeros(2, 32), tmp_path, 0, num_inference_steps=1)
    assert sorted(p.name for p in tmp_path.glob('.*')) == ['.00002.png.ab.png', '.1x.png']


def test_a_device_that_is_not_there_is_told_by_the_library_too():
    for device in ('mps', 'abacus'):
        with pytest.raises(ValueError, match=f"{device}.*take cpu"): TextToImage.from_preset('smoke', device)


def test_one_damaged_picture_among_others_is_told():
    x_T = torch.zeros(2, 1, 2, 2)
    def denoiser(x, t): return torch.where(torch.arange(2)[:, None, None, None] == 1, torch.nan, x), x
    with pytest.raises(FloatingPointError): sample('ddim', denoiser, Diffusion().respace(2), x_T)


def test_noise_has_the_precision_of_the_pictures():
    x_T = torch.zeros(1, 1, 2, 2, dtype=torch.float16)
    for name in ('ddpm', 'sde_dpm_solver_pp'):
        assert all(s.x.dtype == x_T.dtype for s in SAMPLERS[name](lambda x, t: (x, x), Diffusion().respace(3), x_T, make_generators(0, 1))), name


def test_a_percentile_above_a_hundred_is_refused():
    for percentile in (0, 100.5, float('nan')):
        with pytest.raises(ValueError, match='use a number above 0, up to 100'): dynamic_threshold(None, percentile)


def test_objectives_and_classifiers_are_told_timesteps_of_the_full_process():
    d, told = Diffusion().respace(10), []
    def says(x, t):
        told.append(t.tolist())
        return x.flatten(1).sum(1)
    for guidance in (objective_guidance, classifier_guidance): guidance(lambda x, t: (x, x), d, says, 1.)(torch.zeros(1, 1, 2, 2), torch.tensor([4]))
    assert told == [[499], [499]]


def test_files_can_be_read_by_others(tmp_path):
    before = os.umask(0o022)
    try: save_json(tmp_path/'a.json', {})
    finally: os.umask(before)
    assert (tmp_path/'a.json').stat().st_mode & 0o777 == 0o644  # not the 600 of a temporary file
