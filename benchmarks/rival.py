"""diffusers' UNet2DModel with the layout of one of our networks, and its DDIM scheduler, as its users run them."""
import torch

MISSING = "diffusers is not installed: pip install diffusers, and run again to compare with it"


def make_rival(settings: dict, image_size: int, diffusers):
    "A UNet2DModel with the channels, blocks and attention of a preset's `[decoder]`; on unshuffled pixels where ours is."
    block, size = settings.get('pixel_unshuffle', 1), image_size//settings.get('pixel_unshuffle', 1)
    widths = [int(m*settings['model_channels']) for m in settings['channel_mult']]
    attends = [size//2**i in settings['attention_resolutions'] for i in range(len(widths))]
    return diffusers.UNet2DModel(
        sample_size=size, in_channels=3*block**2, out_channels=6*block**2, block_out_channels=widths, layers_per_block=settings['num_res_blocks'],
        down_block_types=['AttnDownBlock2D' if a else 'DownBlock2D' for a in attends], up_block_types=['AttnUpBlock2D' if a else 'UpBlock2D' for a in attends[::-1]],
        attention_head_dim=settings['num_head_channels'], downsample_type='resnet', upsample_type='resnet', resnet_time_scale_shift='scale_shift', norm_eps=1e-5).eval()


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
