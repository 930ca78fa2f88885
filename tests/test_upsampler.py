"""The 64→256 upsampler: the published names and shapes, what a picture depends on, and its labels."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from t2i.core import Preset, load_preset, make_generators
from t2i.pipeline import TextToImage
from t2i.upsampler import ZeroShot, choose_labels, imagenet_names, make_upsampler, make_upsampler_diffusion, upsample, with_low_res

GOLDEN = Path(__file__).parent/'golden'


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


def test_published_shapes():
    with torch.device('meta'): model = make_upsampler('thesis')
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == json.loads((GOLDEN/'upsampler.shapes.json').read_text())
    assert sum(p.numel() for p in model.parameters()) == 311_795_910


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
    def draw(low_res, labels, seeds, **options): return upsample(diffusion, model, low_res, labels, seeds, sampler, steps=3, **options)
    together = draw(low_res, labels, [1, 2, 3], batch_size=2)
    assert together.shape == (3, 3, 32, 32) and together.abs().max() <= 1
    for i in range(3): torch.testing.assert_close(draw(low_res[i:i + 1], labels[i:i + 1], [i + 1]), together[i:i + 1], atol=1/255, rtol=0)
    for changed in (draw(-low_res, labels, [1, 2, 3]), draw(low_res, labels + 1, [1, 2, 3]), draw(low_res, labels, [4, 5, 6])):
        assert ((changed - together).abs().flatten(1).max(1).values > 1e-3).all()


def test_training_mode_is_refused(model, small):
    with pytest.raises(ValueError, match='eval'): upsample(make_upsampler_diffusion(small), make_upsampler(small).train(), torch.zeros(1, 3, 8, 8), torch.tensor([0]))


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
    for label, labels in [(436, [436]*3), ([1, 2, 3], [1, 2, 3]), (torch.tensor([4, 5, 6]), [4, 5, 6])]:
        chosen = choose_labels(label, x, None)
        assert chosen.tolist() == labels and chosen.dtype == torch.int64
    for wrong in ('dog', -1, 1000, [1, 2], None, 1.5):
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


def test_pipeline_upsamples_pictures(large):
    pictures = [Image.new('RGB', (64, 64), c) for c in ('red', 'blue')]
    by_clip = large.upsample(pictures, generator=1)
    assert [p.size for p in by_clip] == [(128, 128)]*2 and all(p.info['label'] in imagenet_names() for p in by_clip)
    assert large.upsample(pictures, 436, generator=1)[0].info['label'] == 'station wagon'
    with pytest.raises(ValueError, match='label is 1000'): large.upsample(pictures, 1000)


def test_pipeline_without_upsampler(pipe):
    for upsample in (lambda: pipe('a dog', upsample=True), lambda: pipe.upsample(Image.new('RGB', (64, 64)))):
        with pytest.raises(ValueError, match='its preset has no upsampler'): upsample()
