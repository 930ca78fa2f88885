"""diffusers' UNet2DModel with the layout of one of our networks, and its DDIM scheduler, as its users run them."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

MISSING = "diffusers is not installed: pip install diffusers, and run again to compare with it"


class Seams(nn.Module):
    "Behind a UNet2DModel on unshuffled pixels: the layers of ours that mend the seams between blocks, put together from diffusers' own."
    def __init__(self, unet, settings: dict, diffusers):
        super().__init__()
        channels, width = unet.config.in_channels//settings['pixel_unshuffle']**2, settings['seam_channels']
        self.unet, self.config, self.block, self.fine = unet, unet.config, settings['pixel_unshuffle'], settings.get('seam_unshuffle', 1)
        self.first = nn.Conv2d(3*channels*self.fine**2, width, 3, padding=1)
        self.resnets = nn.ModuleList(diffusers.models.resnet.ResnetBlock2D(
            in_channels=width, out_channels=width, temb_channels=4*unet.config.block_out_channels[0], time_embedding_norm='scale_shift', eps=1e-5) for _ in range(settings.get('seam_blocks', 0)))
        self.last = nn.Conv2d(width, 2*channels*self.fine**2, 3, padding=1)

    def forward(self, x, t):
        output = self.unet(x, t)
        h = F.pixel_unshuffle(F.pixel_shuffle(torch.cat([output.sample, x], 1), self.block), self.fine)
        emb = self.unet.time_embedding(self.unet.time_proj(t.expand(len(x))).to(x.dtype))
        h = self.first(h)
        for resnet in self.resnets: h = resnet(h, emb)
        mended = F.pixel_shuffle(self.last(F.silu(h)), self.fine)
        output.sample = output.sample + F.pixel_unshuffle(mended, self.block)
        return output


def make_rival(settings: dict, image_size: int, diffusers):
    "A UNet2DModel with the channels, blocks and attention of a preset's `[decoder]`; on unshuffled pixels, with layers on the seams, where ours is."
    block, size = settings.get('pixel_unshuffle', 1), image_size//settings.get('pixel_unshuffle', 1)
    widths = [int(m*settings['model_channels']) for m in settings['channel_mult']]
    attends = [size//2**i in settings['attention_resolutions'] for i in range(len(widths))]
    unet = diffusers.UNet2DModel(
        sample_size=size, in_channels=3*block**2, out_channels=6*block**2, block_out_channels=widths, layers_per_block=settings['num_res_blocks'],
        down_block_types=['AttnDownBlock2D' if a else 'DownBlock2D' for a in attends], up_block_types=['AttnUpBlock2D' if a else 'UpBlock2D' for a in attends[::-1]],
        attention_head_dim=settings['num_head_channels'], downsample_type='resnet', upsample_type='resnet', resnet_time_scale_shift='scale_shift', norm_eps=1e-5)
    return (Seams(unet, settings, diffusers) if settings.get('seam_channels') else unet).eval()


def gflop(settings: dict, image_size: int, diffusers) -> float:
    "10⁹ operations of one pass for one image, counted without a device."
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        model = make_rival(settings, image_size, diffusers)
        model(torch.zeros(1, model.config.in_channels, model.config.sample_size, model.config.sample_size), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()/1e9


@torch.no_grad()
def sample(model, scheduler, n: int, steps: int, scale: float, generator, device):
    "Guided DDIM from noise, both halves of the guidance in one pass as diffusers' pipelines do; the model knows no condition, so the halves are alike."
    scheduler.set_timesteps(steps)
    x = torch.randn(n, model.config.in_channels, model.config.sample_size, model.config.sample_size, generator=generator).to(device)
    for t in scheduler.timesteps:
        output = model(torch.cat([x, x]), t).sample
        conditional, empty = output[:, :x.shape[1]].chunk(2)
        x = scheduler.step(empty + scale*(conditional - empty), t, x).prev_sample
    return x
