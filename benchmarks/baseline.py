"""The straightforward implementation that ours is measured against, written as the released code goes about it.

float32, channels first, a forward pass for each half of the guidance, attention that writes down all its weights, tables that are fetched at every
use, an optimiser and an average that go from weight to weight. It runs the very layers of one of our networks, so the weights are the same and so
are the pictures."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

from t2i.core import make_generators, randn
from t2i.unet import Attention, ResBlock, timestep_embedding


def conv(layer, x): return F.conv2d(x, layer.weight, layer.bias, padding=layer.kernel_size[0]//2)

def norm(layer, x): return F.group_norm(x.float(), layer.num_groups, layer.weight, layer.bias, layer.eps).type(x.dtype)

def resample(block, x):
    if block.resample == 'up': return F.interpolate(x, scale_factor=2, mode='nearest')
    return F.avg_pool2d(x, 2) if block.resample == 'down' else x

def resblock(block, x, emb):
    h = F.silu(norm(block.in_layers[0], x))
    h = conv(block.in_layers[2], resample(block, h))
    scale, shift = block.emb_layers(emb)[..., None, None].chunk(2, 1)
    h = norm(block.out_layers[0], h)*(1 + scale) + shift
    h = conv(block.out_layers[3], block.out_layers[2](F.silu(h)))
    x = resample(block, x)
    return (x if isinstance(block.skip_connection, nn.Identity) else conv(block.skip_connection, x)) + h

def attention(block, x):
    n, c, *size = x.shape
    x = x.reshape(n, c, -1)
    q, k, v = block.qkv(norm(block.norm, x)).reshape(n*block.num_heads, -1, x.shape[2]).chunk(3, 1)
    scale = q.shape[1]**-0.25
    weights = torch.einsum('bct,bcs->bts', q*scale, k*scale).float().softmax(-1).type(q.dtype)
    h = torch.einsum('bts,bcs->bct', weights, v).reshape(n, c, -1)
    return (x + block.proj_out(h)).reshape(n, c, *size)

def stage(layers, x, emb):
    for layer in layers:
        if isinstance(layer, ResBlock): x = resblock(layer, x, emb)
        elif isinstance(layer, Attention): x = attention(layer, x)
        elif isinstance(layer, nn.SiLU): x = F.silu(x)
        else: x = conv(layer, x)
    return x


class Baseline(nn.Module):
    "A network (x [N, 3, H, W], t [N], y [N, E]) → [N, 6, H, W] of the weights of a `t2i.unet.UNet`, a copy."
    def __init__(self, model):
        super().__init__()
        self.unet = copy.deepcopy(model).to(memory_format=torch.contiguous_format)

    def forward(self, x, t, y, augmentation=None):
        model = self.unet
        emb = model.time_embed(timestep_embedding(t, model.model_channels)) + model.img_emb_proj(y)
        if augmentation is not None: emb = emb + model.augment_proj(augmentation)
        h, skips = F.pixel_unshuffle(x, model.pixel_unshuffle), []
        for layers in model.input_blocks:
            h = stage(layers, h, emb)
            skips.append(h)
        h = stage(model.middle_block, h, emb)
        for layers in model.output_blocks: h = stage(layers, torch.cat([h, skips.pop()], 1), emb)
        h = F.pixel_shuffle(conv(model.out[2], F.silu(norm(model.out[0], h))), model.pixel_unshuffle)
        if model.seams: h = h + F.pixel_shuffle(stage(model.seams, F.pixel_unshuffle(torch.cat([h, x], 1), model.seam_unshuffle), emb), model.seam_unshuffle)
        return h


def at(table, t, x): return table.to(x.device)[t].float()[:, None, None, None]


@torch.no_grad()
def sample(diffusion, model, y, generator, steps, scale, thresholding, percentile=99.5):
    "Algorithm 1 with `steps` of its timesteps: images [N, 3, H, W]."
    d, generators, unet = diffusion.respace(steps), make_generators(generator, len(y)), model.unet
    x = randn((3, unet.image_size, unet.image_size), generators, y.device)
    for step in range(steps - 1, -1, -1):
        t = torch.full((len(x),), step, device=x.device)
        original = d.timestep_map.to(x.device)[t]
        conditional, variance = model(x, original, y).chunk(2, 1)
        empty, _ = model(x, original, torch.zeros_like(y)).chunk(2, 1)
        output = empty + scale*(conditional - empty)
        a = at(d.alphas_cumprod, t, x)
        x_0 = {'eps': lambda: (x - (1 - a).sqrt()*output)/a.sqrt(), 'v': lambda: a.sqrt()*x - (1 - a).sqrt()*output, 'x0': lambda: output}[d.target]()
        if thresholding == 'static': x_0 = x_0.clamp(-1, 1)
        if thresholding == 'dynamic':
            s = torch.quantile(x_0.abs().flatten(1), percentile/100, dim=1).clamp(min=1)[:, None, None, None]
            x_0 = x_0.clamp(-s, s)/s
        x = at(d.posterior_mean_x_0, t, x)*x_0 + at(d.posterior_mean_x_t, t, x)*x
        if step > 0:
            v = (variance + 1)/2
            log_variance = v*at(d.log_betas, t, x) + (1 - v)*at(d.log_posterior_variance, t, x)
            x = x + (0.5*log_variance).exp()*randn(x.shape[1:], generators, x.device)
    return x.clamp(-1, 1)


class Training:
    "A training step: loss, gradient, clipping, Adam, moving average."
    def __init__(self, model, loss, learning_rate=1e-4, clip_norm=1., ema=0.999):
        self.model, self.loss, self.clip_norm, self.ema = model.train(), loss, clip_norm, ema
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, foreach=False, fused=False)
        self.average = [p.detach().clone() for p in model.parameters()]

    def __call__(self, batch) -> torch.Tensor:
        loss = self.loss(self.model, batch)['loss']
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        for mean, p in zip(self.average, self.model.parameters()): mean.mul_(self.ema).add_(p.detach(), alpha=1 - self.ema)
        return loss.detach()
