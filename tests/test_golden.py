"""The networks against the released code: recorded outputs, and every key and shape of the published state dicts (tests/golden)."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from t2i.core import load_into, load_weights
from t2i.costs import stage_table
from t2i.decoder import make_decoder, make_diffusion
from t2i.translator import Translator, make_translator
from t2i.unet import UNet
from t2i.upsampler import make_upsampler

GOLDEN = Path(__file__).parent/'golden'
CLOSE = dict(atol=1e-4, rtol=0)


def recorded(name):
    with np.load(GOLDEN/f'{name}_io.npz') as arrays: return {k: torch.from_numpy(arrays[k]) for k in arrays.files}


def loaded(model, name):
    path = GOLDEN/f'{name}.safetensors'
    return load_into(model, load_weights(path)[0], path).eval()


def small_decoder(**kwargs):
    return UNet(16, model_channels=32, num_res_blocks=1, attention_resolutions=(8,), channel_mult=(1, 2), num_head_channels=32, embedding_size=16, **kwargs)


@torch.no_grad()
def test_decoder_outputs():
    io, model = recorded('decoder_small'), loaded(small_decoder(), 'decoder_small')
    torch.testing.assert_close(model(io['x'], io['t'], io['y']), io['out'], **CLOSE)
    torch.testing.assert_close(model(io['x'], io['t'], torch.zeros_like(io['y'])), io['out_null'], **CLOSE)
    assert (io['out'] - io['out_null']).abs().max() > 1e-3  # the condition matters, so the test above can fail


@torch.no_grad()
@pytest.mark.parametrize('reading', ['rescale_attention', 'other order of qkv'])
def test_decoder_outputs_tell_the_readings_apart(reading):
    "What the thesis's text says, or the other channel order, loads as strictly and draws something else."
    io, model = recorded('decoder_small'), loaded(small_decoder(rescale_attention=reading == 'rescale_attention'), 'decoder_small')
    if reading == 'other order of qkv':
        for name, p in model.named_parameters():
            if '.qkv.' in name: p.copy_(p.unflatten(0, (3, 2, -1)).transpose(0, 1).flatten(0, 2))
    assert (model(io['x'], io['t'], io['y']) - io['out']).abs().max() > 1e-3


@torch.no_grad()
def test_translator_outputs():
    io, model = recorded('translator_small'), loaded(Translator(16, width=24, layers=3, expansion=2), 'translator_small')
    torch.testing.assert_close(model(io['y']), io['out'], **CLOSE)


@pytest.mark.parametrize('name, make, parameters', [
    ('image_decoder', lambda: make_decoder('thesis'), 526_145_798),
    ('CLIP_translator', lambda: make_translator('thesis'), 32_060_416),
    ('upsampler', lambda: make_upsampler('thesis'), 311_795_910)])
def test_published_shapes(name, make, parameters):
    with torch.device('meta'): model = make()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == json.loads((GOLDEN/f'{name}.shapes.json').read_text())
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize('make, gflop', [(lambda: make_decoder('thesis'), 384.4), (lambda: make_upsampler('thesis'), 1263)])
def test_published_cost(make, gflop):
    with torch.device('meta'): model = make()
    assert stage_table(model).GFLOP.sum() == pytest.approx(gflop, rel=1e-3)


def test_thesis_diffusion():
    diffusion = make_diffusion('thesis')
    assert (diffusion.timesteps, diffusion.target) == (1000, 'eps')
    assert diffusion.vlb_weight*diffusion.timesteps == pytest.approx(1)


@torch.no_grad()
@pytest.mark.parametrize('factor', [1, 2, 4])
def test_batch_size_changes_no_output(factor):
    torch.manual_seed(0)
    model = UNet(16, model_channels=32, num_res_blocks=1, attention_resolutions=(4,), channel_mult=(1, 2), num_heads=1, embedding_size=8, pixel_unshuffle=factor).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.06)
    x, t, y = torch.randn(3, 3, 16, 16), torch.tensor([0, 500, 999]), torch.randn(3, 8)
    out = model(x, t, y)
    assert out.shape == (3, 6, 16, 16) and out.dtype == torch.float32
    for i in range(3): torch.testing.assert_close(out[i:i + 1], model(x[i:i + 1], t[i:i + 1], y[i:i + 1]), **CLOSE)
