"""well_i2v.py: an image-to-video diffusion model, fine-tuned to forecast simulations of The Well.

Reference   LIX-shape-analysis/video_for_science, on Wan2.2-I2V-A14B (arXiv:2503.20314) and The Well
            (arXiv:2412.00568), with LoRA (arXiv:2106.09685) on both experts, one after the other.
Equations   fields <-> [-1, 1] <-> video frames                            -> FieldMap, LearnedAdapter
            input = [x_s 16, mask 4, VAE(given frame, then grey) 16]       -> condition
            x_s = (1 - s) z + s eps; loss |v - (eps - z)|^2                -> add_noise, Expert
            s = shift u / (1 + (shift - 1) u); s >= 0.9: high-noise expert -> shift_sigma, draw_sigma
            dx/ds = v from s = 1 to 0, by UniPC                            -> integrate
            forecast = given fields + decoded change, repaired             -> Decoder
            VRMSE = sqrt(mean (x - y)^2 / (var y + 1e-7)), over space      -> vrmse
Run         python well_i2v.py                       # simulate, train, evaluate: MINUTES min on 2 CPU cores
            torchrun --nproc_per_node=4 well_i2v.py --lora_rank 32
            python well_i2v.py --sample --num_samples 2                    # or --eval
            python well_i2v.py --mode unet --output_dir runs/unet          # the rival; or convlstm, adapter
            torchrun --nproc_per_node=4 well_i2v.py --preset i2v_a14b --data_dir data/the_well
Data        data/well_i2v/prepare.py simulates, downloads The Well, and writes your own fields in its format.
Shapes      B batch  T frames  C fields  H W their grid, axes as in the file (here x periodic, y open)
            H' W' video  F latent frames  h w latent grid  L text tokens  D width  S ensemble members.
            Fields are B T C H W in physical units, videos B T' 3 H' W' in [-1, 1], latents B 16 F h w.
"""
import argparse
import functools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import UserError, at_least, expand_to

SCRIPT = "well_i2v"
DATASET = "turbulent_radiative_layer_2D"
BOUNDARY = 0.9                           # sigma from which on Wan2.2-I2V-A14B uses its high-noise expert
TRANSFORMERS = {"high": "transformer", "low": "transformer_2"}                 # names in diffusers' pipeline
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")       # Wan's names
FIRST_TARGET = 4                         # The Well's rollouts are given 4 frames: the first target is frame 4

# ---- presets and flags ----------------------------------------------------------------------------------

PRESETS = {
    "tiny": dict(
        model="tiny", data_dir=f"data/{SCRIPT}/simulated", adapter="tile", frame_repeat=4, augment=True,
        text_length=64, base_steps=900, base_lr=2e-3, max_steps=300, lr=1e-3, lora_rank=32,
        lora_targets=",".join(LORA_TARGETS), decoder_steps=300, shift=8.0, batch_size=4, warmup_steps=50,
        ema_decay=0.99, num_inference_steps=2, members=2, eval_windows=32, rollout_frames=30,
        sample_frames=16, eval_every=300, save_every=300),
    # The reference project's configuration: 20 epochs of 6,696 windows, batch 1 on each of 4 GPUs.
    "i2v_a14b": dict(data_dir="data/the_well", lr=1e-5, batch_size=1, max_steps=33480, grad_checkpoint=True,
                     save_every=500, eval_every=1000),
    # Its older modes: a predictor of latents, and the adapter alone.
    "convlstm": dict(data_dir="data/the_well", mode="convlstm", n_in=5, lr=1e-4, batch_size=1, grad_accum=4,
                     max_steps=20000, save_every=1000, eval_every=1000),
    "adapter": dict(data_dir="data/the_well", mode="adapter", lr=2e-4, batch_size=1, grad_accum=4,
                    max_steps=20000, save_every=1000, eval_every=1000),
}
TINY = {
    "transformer": {"num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 36, "out_channels": 16,
                    "text_dim": 32, "freq_dim": 64, "ffn_dim": 384, "num_layers": 4},
    "text_encoder": {"vocab_size": 259, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2,
                     "num_heads": 2},
}
# These shape the weights or give them their meaning: a checkpoint's values hold.
MODEL_FLAGS = ("model", "mode", "n_in", "n_out", "adapter", "video_size", "frame_repeat", "adapter_width",
               "lora_rank", "lora_targets", "decoder_steps", "unet_width", "text_length")


def build_parser():
    parser = common.Parser(SCRIPT, PRESETS, __doc__.split("\n")[0])
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default=DATASET, help="folder below data_dir/datasets, where there are several sets")
    add("--n_in", type=at_least(1), default=1, help="given frames; --mode convlstm takes 4k + 1")
    add("--n_out", type=at_least(1), default=8, help="frames of a forecast")
    add("--augment", action=argparse.BooleanOptionalAction, default=False,
        help="shift training windows along periodic axes at random; latents are then not kept in memory")
    add("--prompt", default="", help="text of all files, before their scalars (default: the set's name)")
    add = parser.add_argument_group("model").add_argument
    add("--mode", choices=["native", "convlstm", "adapter", "unet"], default="native",
        help="native: Wan's image-to-video diffusion; convlstm, adapter: older modes; unet: a baseline")
    add("--model", choices=["i2v_a14b", "tiny"], default="i2v_a14b", help="tiny: the same classes, small")
    add("--weights_from", default="Wan-AI/Wan2.2-I2V-A14B-Diffusers", metavar="FOLDER|HUB_ID",
        help="diffusers folder, hub id, or folder with the official files")
    add("--random_init", action="store_true", help="random weights in Wan's shape, to measure speed")
    add("--adapter", choices=["learned", "tile"], default="learned",
        help="fields to 3 channels: learned layers, or three fields per panel of a larger frame")
    add("--adapter_width", type=at_least(1), default=64, help="channels of the learned adapter")
    add("--video_size", default="", metavar="H,W", help="of a panel, in multiples of 16 (default: the grid)")
    add("--frame_repeat", type=at_least(1), default=1, help="video frames per frame; the VAE packs 4 in one")
    add("--lora_rank", type=at_least(1), default=32, help="rank and alpha of LoRA")
    add("--lora_targets", default="to_q,to_k,to_v,to_out.0", help="modules; also ffn.net.0.proj,ffn.net.2")
    add("--decoder_width", type=at_least(4), default=16, help="channels of the decoder that repairs forecasts")
    add("--unet_width", type=at_least(4), default=24, help="channels of --mode unet")
    add("--text_length", type=at_least(1), default=512, help="tokens of a prompt, padding included")
    add = parser.add_argument_group("stages and loss").add_argument
    add("--adapter_steps", type=at_least(0), default=2000, help="optimizer steps of the learned adapter")
    add("--adapter_lr", type=at_least(0, float), default=2e-4, help="peak learning rate of the adapter")
    add("--base_steps", type=at_least(0), default=0, help="optimizer steps of the tiny base")
    add("--base_lr", type=at_least(0, float), default=1e-3, help="peak learning rate of the tiny base")
    add("--decoder_steps", type=at_least(0), default=0, help="optimizer steps of the decoder (0: none)")
    add("--decoder_lr", type=at_least(0, float), default=2e-3, help="peak learning rate of the decoder")
    add("--recon_weight", type=at_least(0, float), default=0.5, help="weight of fields through adapter and VAE")
    add("--adapter_weight", type=at_least(0, float), default=0.1, help="weight of fields through the adapter")
    add("--shift", type=at_least(1e-3, float), default=5.0, help="shift of Wan's noise schedule")
    add = parser.add_argument_group("sampling and evaluation").add_argument
    add("--num_inference_steps", type=at_least(1), default=30, help="steps of the sampler")
    add("--offload", action="store_true", help="keep the expert that is not in use on the CPU")
    add("--members", type=at_least(1), default=4, help="samples of a forecast that --eval averages")
    add("--eval_windows", type=at_least(1), default=90, help="held-out windows to forecast, evenly chosen")
    add("--rollout_frames", type=at_least(0), default=97, help="frames of --eval's rollouts (0: none)")
    add("--num_samples", type=at_least(1), default=2, help="held-out trajectories to sample")
    add("--sample_frames", type=at_least(1), default=24, help="frames to sample")
    return parser


def parse_args(argv=None):
    """-> flags, checkpoint or None, the reason for the preset."""
    args, checkpoint, why_preset = common.parse_args(
        build_parser(), argv, MODEL_FLAGS, get_data=f"python data/{SCRIPT}/prepare.py --download")
    for name, T in (("n_in", args.n_in), ("n_in + n_out", args.n_in + args.n_out)):
        if args.frame_repeat * (T - 1) % 4 and args.mode != "unet":
            raise UserError(f"{name} = {T} frames with --frame_repeat {args.frame_repeat} make "
                            f"{1 + args.frame_repeat * (T - 1)} video frames: Wan's VAE takes 4k + 1")
    if args.mode in ("native", "unet") and args.n_in != 1:
        raise UserError(f"--n_in {args.n_in}: --mode {args.mode} starts from one frame; convlstm from more")
    for target in args.lora_targets.split(","):
        if target not in LORA_TARGETS:
            raise UserError(f"--lora_targets {target}: choose from {','.join(LORA_TARGETS)}")
    if args.mode == "adapter" and args.adapter != "learned":
        raise UserError("--mode adapter trains the adapter: it needs --adapter learned")
    if (args.fsdp or args.compile) and args.mode != "native":
        raise UserError(f"--fsdp and --compile are for Wan's experts: --mode {args.mode} is small")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.fsdp and world == 1:
        raise UserError("--fsdp shards over processes: start it with torchrun --nproc_per_node=N")
    if args.preset == "tiny" and args.batch_size == PRESETS["tiny"]["batch_size"] and not checkpoint:
        args.batch_size = max(1, args.batch_size // world)       # processes on one machine share tiny's batch
    return args, checkpoint, why_preset


def video_size(args, grid):
    """--video_size, by default the fields' grid. UserError for what the VAE and the experts cannot take."""
    size = args.video_size.split(",") if args.video_size else grid
    if len(size) != 2 or not all(str(n).isdigit() and int(n) > 0 and int(n) % 16 == 0 for n in size):
        raise UserError(f"video frames must be multiples of 16, not {','.join(map(str, size))}: give "
                        f"--video_size H,W")
    return int(size[0]), int(size[1])


# ---- model: convolutions --------------------------------------------------------------------------------

class Conv(nn.Conv2d):
    """A 3x3 convolution that wraps around periodic axes and repeats the edge of others."""
    def __init__(self, c_in, c_out, periodic=(False, False)):
        super().__init__(c_in, c_out, 3)
        self.modes = ["circular" if axis else "replicate" for axis in periodic]

    def forward(self, x):
        x = F.pad(x, (0, 0, 1, 1), mode=self.modes[0])
        return super().forward(F.pad(x, (1, 1, 0, 0), mode=self.modes[1]))


class ConvBlock(nn.Module):
    def __init__(self, c_in, c_out, periodic):
        super().__init__()
        self.conv1, self.conv2 = Conv(c_in, c_out, periodic), Conv(c_out, c_out, periodic)
        self.norm = nn.GroupNorm(4, c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        return self.skip(x) + self.conv2(F.silu(self.norm(self.conv1(x))))


class UNet(nn.Module):
    """A plain residual U-Net, B c_in H W -> B c_out H W, zero at first. H and W: multiples of 2 ** levels."""
    def __init__(self, c_in, c_out, width, periodic, levels=3):
        super().__init__()
        widths = [width * 2 ** i for i in range(levels + 1)]
        self.first = Conv(c_in, width, periodic)
        self.down = nn.ModuleList(ConvBlock(a, b, periodic) for a, b in zip([width, *widths], widths[:-1]))
        self.middle = ConvBlock(widths[-2], widths[-1], periodic)
        self.up = nn.ModuleList(ConvBlock(a + b, b, periodic) for a, b in zip(widths[:0:-1], widths[-2::-1]))
        self.last = Conv(width, c_out, periodic)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x):
        skips, x = [], self.first(x)
        for block in self.down:
            skips.append(block(x))
            x = F.avg_pool2d(skips[-1], 2)
        x = self.middle(x)
        for block in self.up:
            x = F.interpolate(x, scale_factor=2)
            x = block(torch.cat([x, skips.pop()], dim=1))
        return self.last(F.silu(x))


# ---- model: fields <-> video ----------------------------------------------------------------------------

class FieldMap(nn.Module):
    """Fields in physical units <-> about [-1, 1]: affine after asinh((x - m) / (1.5 s)), with mean m and
    standard deviation s, per field, of the window's first frame.

    VRMSE divides by a frame's own deviation, and the radiative layer's pressure deviates by .01 at first and
    by .08 later, around a mean that drifts: on one scale for all frames most of them would be flat. The
    bounds are the training set's 0.1 and 99.9 percentiles with 15 % of room, because the VAE clamps at +-1.
    """
    def __init__(self, C):
        super().__init__()
        for name in ("scale", "mid", "half_range", "std"):
            self.register_buffer(name, torch.ones(C, 1, 1))

    def reference(self, first):
        """First frames B 1 C H W -> mean and 1.5 deviations B 1 C 1 1. A flat frame counts as 0.3 usual."""
        mean = first.mean((-2, -1), keepdim=True)
        return mean, 1.5 * (first.var((-2, -1), keepdim=True) + (0.3 * self.scale) ** 2).sqrt()

    @torch.no_grad()
    def fit(self, fields):
        """fields: B T C H W, windows of the training set."""
        self.mid.zero_()
        self.half_range.fill_(1)
        self.scale.copy_(fields.std((-2, -1)).flatten(0, 1).median(0).values.clamp(min=1e-12)[:, None, None])
        y = self.forward(fields, fields[:, :1]).transpose(0, 2).flatten(1)
        low, high = (torch.from_numpy(q).float() for q in np.quantile(y.numpy(), (0.001, 0.999), axis=1))
        self.mid.copy_(((low + high) / 2)[:, None, None])
        self.half_range.copy_(((high - low) / 2 * 1.15).clamp(min=1e-6)[:, None, None])
        self.std.copy_(y.std(1)[:, None, None] / self.half_range).clamp_(min=1e-3)

    def forward(self, x, first):
        """x: B T C H W, first: B 1 C H W, the first frames of these windows."""
        mean, deviation = self.reference(first)
        return (torch.asinh((x - mean) / deviation) - self.mid) / self.half_range

    def inverse(self, y, first):
        mean, deviation = self.reference(first)
        return mean + deviation * (y * self.half_range + self.mid).sinh()

    def error(self, y, target):
        """Mean squared error of mapped fields B T C H W, in units of each field's variance."""
        return ((y - target) / self.std).square().mean()


def resize(x, size):
    """B T C H W -> B T C *size, bicubic."""
    if x.shape[-2:] == tuple(size):
        return x
    y = F.interpolate(x.flatten(0, 1), size, mode="bicubic", antialias=True, align_corners=False)
    return y.unflatten(0, x.shape[:2])


class Adapter(nn.Module):
    """C mapped fields <-> 3 channels of a video, frame by frame. Subclasses have encode and decode.

    names: of the fields; grid: H, W; panel: H', W' of the video that 3 channels make; repeat: video frames
    per frame after the first, because the VAE packs 4 frames in one latent.
    """
    def __init__(self, names, grid, panel, repeat):
        super().__init__()
        self.names, self.grid, self.panel, self.repeat = list(names), tuple(grid), tuple(panel), repeat
        self.video_size = self.panel
        self.map = FieldMap(len(names))

    def fit(self, fields):
        """Statistics of training windows B T C H W."""
        self.map.fit(fields)

    def video_frames(self, T):
        return 1 + self.repeat * (T - 1)

    def to_video(self, fields):
        """Fields B T C H W of a window -> video B T' 3 H' W', in [-1, 1] except for outliers."""
        x = self.encode(self.map(fields, fields[:, :1]))
        return torch.cat([x[:, :1], x[:, 1:].repeat_interleave(self.repeat, dim=1)], dim=1)

    def to_mapped(self, video):
        """Video B T' 3 H' W' -> mapped fields B T C H W."""
        later = video[:, 1:]
        if self.repeat > 1 and later.shape[1]:
            later = later.unflatten(1, (-1, self.repeat)).mean(2)
        return self.decode(torch.cat([video[:, :1], later], dim=1))


class TileAdapter(Adapter):
    """Three fields per panel, panels side by side along the short axis; unused channels are 0."""
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.panels = math.ceil(len(self.names) / 3)
        self.axis = -2 if self.panel[0] <= self.panel[1] else -1
        size = list(self.panel)
        size[self.axis] *= self.panels
        self.video_size = tuple(size)

    def encode(self, y):
        y = F.pad(resize(y, self.panel), (0, 0, 0, 0, 0, 3 * self.panels - y.shape[2]))
        return torch.cat(y.split(3, dim=2), dim=self.axis)

    def decode(self, x):
        y = torch.cat(x.chunk(self.panels, dim=self.axis), dim=2)
        return resize(y[:, :, :len(self.names)], self.grid)


class LearnedAdapter(Adapter):
    """The reference project's channel adapter (C <-> 3) and spatial adapter (grid <-> video), learned.

    It starts as the 3 principal components of the mapped fields, and bicubic interpolation, with their
    least-squares inverse; convolutions beside them are 0 at first. There is no norm, because a GroupNorm over
    the frame would remove what the values mean.
    """
    def __init__(self, names, grid, panel, repeat, width):
        super().__init__(names, grid, panel, repeat)
        C = len(names)
        for name, shape in {"mix": (3, C), "shift": (3,), "unmix": (C, 3), "unshift": (C,)}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.encode_fields, self.encode_video = self.branch(C, 3, width), self.branch(3, 3, width // 2)
        self.decode_video, self.decode_fields = self.branch(3, 3, width // 2), self.branch(3, C, width)

    @staticmethod
    def branch(c_in, c_out, width):
        net = nn.Sequential(Conv(c_in, max(1, width)), nn.SiLU(), Conv(max(1, width), c_out))
        nn.init.zeros_(net[-1].weight)
        nn.init.zeros_(net[-1].bias)
        return net

    @torch.no_grad()
    def fit(self, fields):
        super().fit(fields)
        y = self.map(fields, fields[:, :1]).transpose(0, 2).flatten(1).T.double()        # n C
        mean, std = y.mean(0), y.std(0).clamp(min=1e-6)
        _, _, components = torch.linalg.svd((y - mean) / std, full_matrices=False)
        V = F.pad(components[:3], (0, 0, 0, max(0, 3 - len(components))))      # orthonormal rows
        u = (((y - mean) / std) @ V.T).numpy()
        low, high = (torch.from_numpy(q) for q in np.quantile(u, (0.001, 0.999), axis=0))
        mid, half_range = (low + high) / 2, ((high - low) / 2 * 1.15).clamp(min=1e-6)
        self.mix.copy_(V / std / half_range[:, None])
        self.shift.copy_(-(V @ (mean / std) + mid) / half_range)
        self.unmix.copy_(std[:, None] * V.T * half_range)
        self.unshift.copy_(mean + std * (V.T @ mid))

    def encode(self, y):
        framewise = lambda net, x: net(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        x = torch.einsum("dc,btchw->btdhw", self.mix, y) + self.shift[:, None, None]
        x = resize(x + framewise(self.encode_fields, y), self.panel)
        return x + framewise(self.encode_video, x)

    def decode(self, x):
        framewise = lambda net, x: net(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        x = resize(x + framewise(self.decode_video, x), self.grid)
        y = torch.einsum("cd,btdhw->btchw", self.unmix, x) + self.unshift[:, None, None]
        return y + framewise(self.decode_fields, x)


class Decoder(nn.Module):
    """The last part of the inverse adapter: repairs decoded forecasts with the help of the given frame.

    Adapter and VAE lose small scales, and a forecast's last frame is not its first: a small U-Net sees both,
    in mapped units, and adds to the forecast what the given frame still tells about it.
    """
    def __init__(self, C, width, periodic):
        super().__init__()
        self.net = UNet(2 * C + 1, C, width, periodic, levels=2)

    def forward(self, forecast, given):
        """forecast B T C H W, given B 1 C H W -> B T C H W."""
        B, T, C, H, W = forecast.shape
        lead = torch.linspace(0, 1, T, device=forecast.device).view(1, T, 1, 1, 1).expand(B, T, 1, H, W)
        x = torch.cat([forecast, given.expand_as(forecast), lead], dim=2)
        return forecast + self.net(x.flatten(0, 1)).unflatten(0, (B, T))


# ---- model: condition and experts -----------------------------------------------------------------------

def condition(vae, first, frames):
    """First video frame B 3 H' W' -> B 20 F h w: mask 4, latents 16, as WanImageToVideoPipeline's
    prepare_latents makes them, to the bit. The mask is 1 for the first latent frame; the latents are the
    VAE's of the frame followed by grey."""
    video = F.pad(first[:, :, None], (0, 0, 0, 0, 0, frames - 1))              # B 3 T' H' W'
    mode = vae.encode(video.to(vae.dtype)).latent_dist.mode().float()
    mean, std = common.latent_scale(vae, mode.device)
    z = (mode - mean) * (1 / std)                # a division would differ in the last bit
    mask = torch.zeros_like(z[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, z], dim=1)


def decode(vae, z):
    """common.wan_decode without its clamp to +-1, for training: beyond a clamp there is no gradient."""
    mean, std = common.latent_scale(vae, z.device)
    return vae.decode((z.float() * std + mean).to(vae.dtype)).sample.float().transpose(1, 2)


class Expert(nn.Module):
    """One of Wan's two transformers, as a velocity and, in training, as its flow-matching loss."""
    def __init__(self, transformer, autocast=None):
        super().__init__()
        self.transformer = transformer
        self.autocast = autocast or functools.partial(torch.autocast, "cpu", enabled=False)

    def velocity(self, x, cond, t, text):
        """x B 16 F h w, cond B 20 F h w, t B in 0..1000, text B L D -> B 16 F h w, fp32."""
        dtype = self.transformer.patch_embedding.weight.dtype
        with self.autocast():
            v = self.transformer(torch.cat([x, cond], 1).to(dtype), t, text.to(dtype), return_dict=False)[0]
        return v.float()

    def forward(self, z, cond, text, sigma, noise):
        """Latents z B 16 F h w, sigma B, noise as z -> loss over all latent frames, as Wan was trained."""
        v = self.velocity(add_noise(z, noise, sigma), cond, 1000 * sigma, text)
        return F.mse_loss(v, noise - z), {}


def load_part(args, part, device, side="high"):
    """A part of Wan: its pretrained weights, or random ones in its shape or in the tiny shape. In bf16,
    except for the VAE, which is fp32 in the official code, too."""
    tiny = args.model == "tiny"
    dtype = torch.float32 if tiny or part == "vae" else torch.bfloat16
    torch.manual_seed(side == "low")     # whatever --seed is: no checkpoint holds what is random and frozen
    return common.load_wan(args.weights_from, part=part, config=TINY if tiny else args.model, dtype=dtype,
                           device=device, random_init=args.random_init or tiny, expert=TRANSFORMERS[side])


def load_expert(args, side, device, autocast=None, lora=True):
    """An expert, "high" or "low", frozen under a LoRA in fp32: in bf16 most steps of a small learning rate
    round to nothing. Tiny experts start from the base, which all of `base` trains (lora=False)."""
    dit = load_part(args, "transformer", device, side)
    expert = Expert(dit, autocast)
    base = common.find_checkpoint(Path(args.output_dir, "base/ckpt"), SCRIPT, "auto")
    if args.model == "tiny" and base and lora:
        common.restore_state(expert, base.state["ema"], source=str(base.path))
    dit.requires_grad_(not lora)
    if lora:
        add_lora(dit, args)
    return expert


def add_lora(dit, args):
    from peft import LoraConfig
    dit.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank,
                               target_modules=args.lora_targets.split(",")))
    for p in dit.parameters():
        if p.requires_grad:
            p.data = p.data.float()


# ---- objective ------------------------------------------------------------------------------------------

def shift_sigma(u, shift):
    """Wan's schedule: u in [0, 1] -> sigma = shift u / (1 + (shift - 1) u), more of it at high noise."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma, shift):
    """Inverse of shift_sigma."""
    return sigma / (shift - (shift - 1) * sigma)


def draw_sigma(u, side, shift):
    """Uniform u B in [0, 1) -> sigma B of the schedule, in the part of an expert: "high", "low" or "base"."""
    edge = unshift_sigma(BOUNDARY, shift)
    low, high = {"high": (edge, 1), "low": (0, edge), "base": (0, 1)}[side]
    return shift_sigma(low + (high - low) * u, shift)


def add_noise(z, noise, sigma):
    """x_sigma = (1 - sigma) z + sigma eps; the velocity to learn is eps - z."""
    return torch.lerp(z, noise, expand_to(sigma, z))


class AdapterTraining(nn.Module):
    """Stage 0 and --mode adapter: fields through the adapter, and through adapter and VAE, and back."""
    def __init__(self, adapter, vae, args):
        super().__init__()
        self.adapter, self.args = adapter, args
        self.frozen = {"vae": vae}               # in a dict, so that it is neither wrapped nor saved

    def forward(self, fields):
        """The reference project's reconstruction and cycle losses, with gradient through the VAE, and what
        leaves [-1, 1], where the VAE clamps."""
        video, target = self.adapter.to_video(fields), self.adapter.map(fields, fields[:, :1])
        vae, error = self.frozen["vae"], self.adapter.map.error
        decoded = decode(vae, common.wan_encode(vae, video))
        terms = {"recon_loss": error(self.adapter.to_mapped(decoded), target),
                 "cycle_loss": error(self.adapter.to_mapped(video), target),
                 "range_loss": F.relu(video.abs() - 1).square().mean()}
        loss = (self.args.recon_weight * terms["recon_loss"] + terms["range_loss"]
                + self.args.adapter_weight * terms["cycle_loss"])
        return loss, terms


class DecoderTraining(nn.Module):
    """The decoder on the path of inference: what it makes of forecasts of training windows."""
    def __init__(self, decoder, std):
        super().__init__()
        self.decoder = decoder
        self.register_buffer("std", std, persistent=False)

    def forward(self, forecast, given, target):
        """Mapped fields -> mean over frames and fields of the root of the mean squared error, as VRMSE."""
        error = ((self.decoder(forecast, given) - target) / self.std).square().mean((-2, -1))
        return (error + 1e-6).sqrt().mean(), {}


class ConvLSTM(nn.Module):
    """The reference project's predictor, 645,777 parameters: latents B 16 F h w -> the next `steps` of them.

    Two cells over a 3x3 convolution; latent n + 1 = latent n + 0.1 (learned) times the head's output.
    """
    def __init__(self, z=16, hidden=64):
        super().__init__()
        self.inp = nn.Conv2d(z, hidden, 3, padding=1)
        self.cells = nn.ModuleList(nn.Conv2d(2 * hidden, 4 * hidden, 3, padding=1) for _ in range(2))
        self.head = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1), nn.GELU(),
                                  nn.Conv2d(hidden, z, 3, padding=1))
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, z, steps):
        state = [[torch.zeros_like(self.inp(z[:, :, 0]))] * 2 for _ in self.cells]
        out = []
        for n in range(z.shape[2] + steps - 1):
            last = z[:, :, n] if n < z.shape[2] else out[-1]
            y = self.inp(last)
            for k, cell in enumerate(self.cells):
                h, c = state[k]
                i, f, o, g = cell(torch.cat([y, h], dim=1)).chunk(4, dim=1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                y = o.sigmoid() * c.tanh()
                state[k] = [y, c]
            if n >= z.shape[2] - 1:
                out.append(last + self.scale * self.head(y))
        return torch.stack(out, dim=2)


class ConvLSTMTraining(nn.Module):
    """Losses of --mode convlstm: 2 on latents, 1 on fields decoded with gradient."""
    def __init__(self, net, adapter, vae, given):
        super().__init__()
        self.net, self.given = net, given
        self.frozen = {"vae": vae, "adapter": adapter}

    def forward(self, fields):
        vae, adapter = self.frozen["vae"], self.frozen["adapter"]
        with torch.no_grad():                    # a target that the loss can move collapses to a constant
            z = common.wan_encode(vae, adapter.to_video(fields))
        future = self.net(z[:, :, :self.given], z.shape[2] - self.given)
        y = adapter.to_mapped(decode(vae, torch.cat([z[:, :, :self.given], future], dim=2)))
        terms = {"latent_loss": F.mse_loss(future, z[:, :, self.given:]),
                 "physics_loss": adapter.map.error(y, adapter.map(fields, fields[:, :1]))}
        return 2 * terms["latent_loss"] + terms["physics_loss"], terms


class UNetTraining(nn.Module):
    """--mode unet: the change from each frame of a window to the next one, in the earlier frame's units."""
    def __init__(self, net, field_map):
        super().__init__()
        self.net = net
        self.frozen = {"map": field_map}

    def forward(self, fields):
        field_map = self.frozen["map"]
        now, after = fields[:, :-1].flatten(0, 1)[:, None], fields[:, 1:].flatten(0, 1)[:, None]
        x, target = field_map(now, now)[:, 0], field_map(after, now)[:, 0]
        error = ((x + self.net(x) - target) / field_map.std).square().mean((-2, -1))
        return (error + 1e-6).sqrt().mean(), {}


# ---- sampler and forecasts ------------------------------------------------------------------------------

def integrate(velocity, x, steps, shift):
    """From noise x at sigma 1 to data at sigma 0 in `steps` calls of velocity(x, t), on the time grid of
    WanImageToVideoPipeline, by its solver UniPC."""
    from diffusers import UniPCMultistepScheduler
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                        flow_shift=shift)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t.item()), t, x, return_dict=False)[0]
    return x


def mix_seed(*numbers):
    """Integers -> one seed, without touching the global generators."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seeded_noise(like, seeds):
    """Normal noise in the shape of `like`: a sample's depends on its own seed, not on batch or device."""
    normal = lambda seed: torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed))
    return torch.stack([normal(seed) for seed in seeds]).to(like.device)


class Forecaster:
    """n_in given frames of fields -> the next n_out, by one of the modes: adapter, VAE and what predicts.

    model: what forecasts latents or fields: {"high", "low"} experts, a ConvLSTM, a UNet, or None, for which
    the forecast is persistence. decoder: Decoder or None.
    """
    def __init__(self, args, adapter, vae, model=None, decoder=None):
        self.args, self.adapter, self.vae, self.model, self.decoder = args, adapter, vae, model, decoder

    @torch.no_grad()
    def encode(self, fields):
        """Windows B T C H W -> latents B 16 F h w, condition B 20 F h w."""
        video = self.adapter.to_video(fields)
        return common.wan_encode(self.vae, video), condition(self.vae, video[:, 0], video.shape[1])

    def expert(self, t):
        """The expert for a time step, as WanImageToVideoPipeline chooses it. --offload swaps them."""
        side = "high" if t >= 1000 * BOUNDARY else "low"
        if self.args.offload:
            other = self.model["low" if side == "high" else "high"]
            device = self.adapter.map.mid.device
            if next(other.parameters()).device == device != torch.device("cpu"):
                other.to("cpu")
            self.model[side].to(device)
        return self.model[side]

    @torch.no_grad()
    def sample_latents(self, cond, noise, text):
        """cond B 20 F h w, noise B 16 F h w, text B L D -> latents B 16 F h w."""
        def velocity(x, t):
            return self.expert(t).velocity(x, cond, torch.full((len(x),), t, device=x.device), text)
        z = integrate(velocity, noise, self.args.num_inference_steps, self.args.shift)
        z[:, :, 0] = cond[:, 4:, 0]              # the given frame's own latents, which need no guess
        return z

    def decode(self, z):
        """Latents -> mapped fields of the n_out forecast frames, without the decoder."""
        return self.adapter.to_mapped(common.wan_decode(self.vae, z))[:, -self.args.n_out:]

    @torch.no_grad()
    def predict(self, history, text=None, seeds=None):
        """history B n_in C H W in physical units, text B L D, seeds B integers -> B n_out C H W."""
        args, first = self.args, history[:, :1]
        if args.mode == "unet":
            frames = [history[:, -1:]]
            for _ in range(args.n_out):
                x = self.adapter.map(frames[-1], frames[-1])
                y = x + self.model(x[:, 0])[:, None]
                frames.append(self.adapter.map.inverse(y, frames[-1]))
            return torch.cat(frames[1:], dim=1)
        window = torch.cat([history, history[:, -1:].expand(-1, args.n_out, -1, -1, -1)], dim=1)
        z, cond = self.encode(window)            # of persistence
        if args.mode == "convlstm":
            given = (self.adapter.video_frames(args.n_in) + 3) // 4
            z = torch.cat([z[:, :, :given], self.model(z[:, :, :given], z.shape[2] - given)], dim=2)
        if args.mode == "native":
            z = self.sample_latents(cond, seeded_noise(z, seeds), text)
        y = self.decode(z)
        if self.decoder is not None:
            y = self.decoder(y, self.adapter.map(history[:, -1:], first))
        return self.adapter.map.inverse(y, first)

    @torch.no_grad()
    def reconstruct(self, fields):
        """The n_out last frames of windows B T C H W through adapter and VAE: a bound without the decoder."""
        y = self.decode(common.wan_encode(self.vae, self.adapter.to_video(fields)))
        return self.adapter.map.inverse(y, fields[:, :1])


def rollout(model, history, steps, seeds, members=1, text=None):
    """Autoregression: a call sees the last frames, its own predictions among them. history B N C H W, seeds
    one per window, text B L D -> B S T C H W, T = steps, S = members."""
    B, N = history.shape[:2]
    frames = history.repeat_interleave(members, dim=0)
    text = None if text is None else text.repeat_interleave(members, dim=0)
    call = 0
    while frames.shape[1] < N + steps:
        noise_seeds = [mix_seed(seed, member, call) for seed in seeds for member in range(members)]
        frames = torch.cat([frames, model.predict(frames[:, -N:], text, noise_seeds)], dim=1)
        call += 1
    return frames[:, N:N + steps].unflatten(0, (B, members))


# ---- data set: The Well's format ------------------------------------------------------------------------

class WellFile(NamedTuple):
    """A file's metadata. Channels are t0 fields, t1 components, t2 components, in the file's order."""
    path: Path
    dataset: str
    fields: list                                 # (group, name, components) of fields that vary in time
    names: list                                  # of the channels
    grid: tuple                                  # H, W
    periodic: tuple                              # of these axes
    trajectories: int
    steps: int
    scalars: dict                                # name -> a number per trajectory
    left_out: list                               # fields and scalars that the model is not given


def text_of(value):
    """A string attribute of HDF5, which may be stored as bytes or as an array of one string."""
    value = np.ravel(value)[0]
    return value.decode() if isinstance(value, bytes) else str(value)


def names_of(value):
    return [text_of(name) for name in np.ravel(value)]


def set_folder(root, dataset):
    """The folder of a set, which has data/train: root, root/dataset or root/datasets/dataset."""
    for folder in (Path(root), Path(root, dataset), Path(root, "datasets", dataset)):
        if (folder / "data").is_dir():
            return folder
    raise UserError(f"no data set in {root} (looked for data/train, {dataset}/data and datasets/{dataset}/data): "
                    f"python data/{SCRIPT}/prepare.py --download {dataset} --data_dir {root}")


def open_split(root, dataset, split):
    """-> [WellFile] of a split, by name. UserError if there is none, or if fields or grids differ."""
    folder = set_folder(root, dataset) / "data" / split
    paths, _ = common.find_files(folder, (".hdf5", ".h5")) if folder.is_dir() else ([], None)
    if not paths:
        raise UserError(f"no .hdf5 files in {folder}: a set has data/train, data/valid and data/test")
    files = [open_file(path) for path in paths]
    for file in files[1:]:
        for name in ("grid", "names", "periodic"):
            if getattr(file, name) != getattr(files[0], name):
                raise UserError(f"{file.path} has {name} {getattr(file, name)}, but {files[0].path.name} "
                                f"{getattr(files[0], name)}: a set has one {name}")
    return files


def open_file(path):
    """-> WellFile. UserError, naming the file, where it is not in The Well's format or not readable."""
    try:
        with h5py.File(path) as file:
            return read_metadata(Path(path), file)
    except UserError:
        raise
    except Exception as error:       # h5py raises KeyError, OSError, ValueError, ..., by what is damaged
        raise UserError(f"{path} is not in The Well's 2-D format ({common.reason(error)}): write_well_file of "
                        f"data/{SCRIPT}/prepare.py writes it") from error


def read_metadata(path, file):
    dims = names_of(file["dimensions"].attrs["spatial_dims"])
    if len(dims) != 2:
        raise UserError(f"{path} has {len(dims)} spatial axes: only 2-D sets can be used")
    grid = tuple(file["dimensions"][dim].shape[-1] for dim in dims)
    trajectories = int(np.ravel(file.attrs["n_trajectories"])[0])
    steps = file["dimensions/time"].shape[-1]
    fields, names, left_out = [], [], []
    for order, components in enumerate(([""], dims, [a + b for a in dims for b in dims])):
        group = f"t{order}_fields"
        for name in names_of(file[group].attrs["field_names"]) if group in file else ():
            stored = file[group][name]
            varying = [bool(np.ravel(stored.attrs[f"{axis}_varying"])[0]) for axis in ("sample", "time")]
            varying += [bool(axis) for axis in stored.attrs["dim_varying"]]
            sizes = [n for n, used in zip((trajectories, steps, *grid), varying) if used] + [2] * order
            if stored.shape != tuple(sizes):
                raise UserError(f"{path}: field {name} has shape {stored.shape}, but dimensions and attributes "
                                f"make it {tuple(sizes)}")
            if varying[1]:
                fields.append((group, name, len(components)))
                names += [f"{name}_{part}" if part else name for part in components]
            else:
                left_out.append(f"field {name}, which is constant in time")
    if not names:
        raise UserError(f"{path} has no field that varies in time")
    scalars = {}
    for name in names_of(file["scalars"].attrs["field_names"]) if "scalars" in file else ():
        stored = file["scalars"][name]
        if np.ravel(stored.attrs.get("time_varying", False))[0]:
            left_out.append(f"scalar {name}, which varies in time")
            continue
        values = np.ravel(stored[()]).astype(float)
        if len(values) not in (1, trajectories):
            raise UserError(f"{path}: scalar {name} has {len(values)} values for {trajectories} trajectories")
        scalars[name] = [float(f"{value:.6g}") for value in np.resize(values, trajectories)]
    kinds = {dim: set() for dim in dims}
    for boundary in file.get("boundary_conditions", {}).values():
        for dim in names_of(boundary.attrs["associated_dims"]):
            kinds[dim].add(text_of(boundary.attrs["bc_type"]).upper())
    periodic = tuple(kinds[dim] == {"PERIODIC"} for dim in dims)
    dataset = text_of(file.attrs.get("dataset_name", path.stem))
    return WellFile(path, dataset, fields, names, grid, periodic, trajectories, steps, scalars, left_out)


def read_window(file, trajectory, start, length):
    """Frames start .. start + length - 1 of a trajectory -> T C H W float32, in physical units.

    UserError where the trajectory is too short, and for NaN or Inf, naming file, trajectory and step.
    """
    if start + length > file.steps:
        raise UserError(f"{file.path} has {file.steps} steps: a window of {length} from {start} does not fit")
    channels = []
    with h5py.File(file.path) as opened:
        for group, name, components in file.fields:
            stored = opened[group][name]
            index = (trajectory,) if np.ravel(stored.attrs["sample_varying"])[0] else ()
            values = np.asarray(stored[(*index, slice(start, start + length))], np.float32)
            sizes = [n if used else 1 for n, used in zip(file.grid, stored.attrs["dim_varying"])]
            values = values.reshape(length, *sizes, components)
            channels.append(np.broadcast_to(values, (length, *file.grid, components)))
    window = torch.from_numpy(np.concatenate(channels, -1)).permute(0, 3, 1, 2).contiguous()
    finite = window.isfinite().flatten(1).all(1)
    if not finite.all():
        raise UserError(f"{file.path}: trajectory {trajectory} has NaN or Inf at step "
                        f"{start + int(finite.int().argmin())}")
    return window


def list_windows(files, length, count=0):
    """-> [(index of the file, trajectory, start)] of windows of `length` steps: all, or `count` of them, of
    each file equally many and those evenly over its trajectories and starts."""
    rows = []
    for i, file in enumerate(files):
        if file.steps < length:
            raise UserError(f"{file.path} has {file.steps} steps, too few for a window of {length}")
        windows = [(i, k, start) for k in range(file.trajectories) for start in range(file.steps - length + 1)]
        share = len(windows)
        if count:
            share = min(count // len(files) + (i < count % len(files)), len(windows))
        rows += [windows[(2 * j + 1) * len(windows) // (2 * share)] for j in range(share)]
    return rows


class Windows:
    """Windows of n_in + n_out frames of a split: all of them, or `count`, evenly chosen."""
    def __init__(self, args, split, count=0):
        self.files = open_split(args.data_dir, args.dataset, split)
        self.length = args.n_in + args.n_out
        self.rows = list_windows(self.files, self.length, count)
        self.names, self.grid, self.periodic = self.files[0][3:6]
        self.text_length = args.text_length
        words = (args.prompt or self.files[0].dataset.replace("_", " ")).strip()
        self.prompts = [[", ".join([words, *(f"{name} {values[k]:g}" for name, values in file.scalars.items())])
                         for k in range(file.trajectories)] for file in self.files]
        self.texts = {}                          # prompt -> L D, of encode_prompts

    def fields(self, numbers, shifts=None):
        """Windows -> B T C H W. shifts: B in [0, 1), by which periodic axes are rolled."""
        windows = []
        for b, n in enumerate(numbers):
            i, trajectory, start = self.rows[n]
            window = read_window(self.files[i], trajectory, start, self.length)
            for axis, periodic in enumerate(self.periodic if shifts is not None else ()):
                if periodic:                     # a few cells further for the second axis
                    share = shifts[b].item() * 7919 ** axis % 1
                    window = window.roll(int(share * self.grid[axis]), 2 + axis)
            windows.append(window)
        return torch.stack(windows)

    def calibration(self):
        """Fields of about 40 windows, evenly chosen, for statistics."""
        return self.fields(range(0, len(self.rows), max(1, len(self.rows) // 40)))

    def text(self, places, device):
        """[(file, trajectory)] -> B L D, or None where no network reads text."""
        texts = [self.texts.get(self.prompts[i][k]) for i, k in places]
        return None if texts[0] is None else common.pad_text(texts, self.text_length).to(device)


def encode_prompts(args, run, data):
    """Gives each split the texts of its prompts. The encoder, which has 11 GB, is loaded and dropped."""
    tokenizer = load_part(args, "tokenizer", run.device)
    encoder = load_part(args, "text_encoder", run.device)
    prompts = sorted({prompt for split in data.values() for file in split.prompts for prompt in file})
    texts = [text.cpu() for text in common.encode_text(tokenizer, encoder, prompts, args.text_length)]
    for split in data.values():
        split.texts = dict(zip(prompts, texts))


def open_data(args):
    """-> {split: Windows}. UserError where splits do not fit together."""
    data = {"train": Windows(args, "train"), "valid": Windows(args, "valid", 32), "test": Windows(args, "test")}
    train = data["train"]
    for split in ("valid", "test"):
        if (data[split].names, data[split].grid) != (train.names, train.grid):
            raise UserError(f"{data[split].files[0].path} has other fields or another grid than split train")
    counts = [f"{split}: {len(windows.rows)} windows" for split, windows in data.items()]
    common.print_once(f"{', '.join(train.names)} on {train.grid[0]} x {train.grid[1]}; {', '.join(counts)}")
    for left_out in train.files[0].left_out:
        common.print_once(f"left out: {left_out}")
    return data


# ---- evaluate and sample --------------------------------------------------------------------------------

# Ohana 2024, tables 2 and 3: VRMSE on the test split of turbulent_radiative_layer_2D, from 4 given frames.
PUBLISHED = {"FNO": {"one_step": 0.5001, "rollout_6:12": 1.79, "rollout_13:30": 3.54},
             "TFNO": {"one_step": 0.5016, "rollout_6:12": 6.01},               # 13:30: above 10
             "U-Net": {"one_step": 0.2418, "rollout_6:12": 0.66, "rollout_13:30": 1.04},
             "CNextU-Net": {"one_step": 0.1956, "rollout_6:12": 0.54, "rollout_13:30": 1.01}}


def vrmse(prediction, truth):
    """... C H W in physical units -> ... C, as the_well.benchmark.metrics.VRMSE: over the spatial axes, with
    the unbiased variance and 1e-7 under the root. The truth's spatial mean scores sqrt((n - 1) / n)."""
    error = (prediction - truth).square().mean((-2, -1))
    return (error / (truth.std((-2, -1)) ** 2 + 1e-7)).sqrt()


def baselines(past, truth):
    """Forecasts without a model: {name: B T C H W}. past: B P C H W, frames up to the given one."""
    lead = torch.arange(1, truth.shape[1] + 1, device=truth.device).view(-1, 1, 1, 1)
    last = past[:, -1:]
    return {"persistence": last.expand_as(truth),
            "spatial mean": truth.mean((-2, -1), keepdim=True).expand_as(truth),
            "linear extrapolation": last + lead * (last - past[:, -2:-1])}


class lora_disabled:
    """Within it the experts are the base."""
    def __init__(self, model):
        experts = model.model.values() if isinstance(model.model, dict) else ()
        self.tuned = [expert.transformer for expert in experts if getattr(expert.transformer, "peft_config", 0)]

    def __enter__(self):
        for dit in self.tuned:
            dit.disable_adapters()

    def __exit__(self, *error):
        for dit in self.tuned:
            dit.enable_adapters()


@torch.no_grad()
def forecast_scores(args, run, model, test, starts, steps):
    """Forecasts of `steps` frames from starts [(file, trajectory, first target)] -> {method: VRMSE N T C}, on
    all ranks, each of which makes a share. "model" is the mean of --members samples."""
    tables, past = {}, max(args.n_in, 2)         # linear extrapolation needs two frames
    members = args.members if args.mode == "native" else 1
    share = list(range(run.rank, len(starts), run.world))
    for k in range(0, len(share), 8):
        numbers = share[k:k + 8]
        frames = torch.stack([read_window(test.files[i], trajectory, first - past, past + steps)
                              for i, trajectory, first in (starts[n] for n in numbers)]).to(run.device)
        history, truth = frames[:, past - args.n_in:past], frames[:, past:]
        text = test.text([starts[n][:2] for n in numbers], run.device)
        seeds = [mix_seed(args.seed, 2, n) for n in numbers]
        samples = rollout(model, history, steps, seeds, members, text)
        methods = {"model": samples.mean(1), **baselines(frames[:, :past], truth)}
        if members > 1:
            methods["single sample"] = samples[:, 0]
        if args.mode == "native":
            with lora_disabled(model):
                methods["base without LoRA"] = rollout(model, history, steps, seeds, members, text).mean(1)
        if steps == args.n_out and args.mode != "unet":
            methods["reconstruction"] = model.reconstruct(frames[:, past - args.n_in:])
        for name, prediction in methods.items():
            tables.setdefault(name, []).extend(zip(numbers, vrmse(prediction, truth).cpu()))
    return {name: torch.stack([row for _, row in sorted(rows, key=lambda row: row[0])])
            for name, rows in common.gather_rows(tables).items()}


def summarize(short, long, names):
    """VRMSE of windows N T C and of rollouts N T' C (or None) -> {metric: number}. "6:12" is steps 6 to 12,
    counted from 1."""
    metrics = {"one_step": short[:, 0].mean().item(), "all_steps": short.mean().item()}
    for c, name in enumerate(names):
        metrics[f"one_step_{name}"] = short[:, 0, c].mean().item()
    metrics |= common.horizon_means([{"vrmse": short.mean(2)}])
    for first, last in ((6, 12), (13, 30)):
        if long is not None and long.shape[1] >= last:
            metrics[f"rollout_{first}:{last}"] = long[:, first - 1:last].mean().item()
    if long is not None:
        metrics |= {f"rollout_vrmse_h{t:02d}": value.item() for t, value in enumerate(long.mean((0, 2)), 1)}
    return metrics


def evaluate(args, run, model, test):
    """VRMSE of windows and rollouts of the test split -> [eval.json, curves.png] on rank 0."""
    began, past = time.time(), max(args.n_in, 2)
    starts = [(i, k, start + past) for i, k, start in list_windows(
        test.files, past + args.n_out, args.eval_windows)]
    short = forecast_scores(args, run, model, test, starts, args.n_out)
    first = max(FIRST_TARGET, args.n_in)
    steps = min(args.rollout_frames, min(file.steps for file in test.files) - first)
    starts = [(i, k, first) for i, file in enumerate(test.files) for k in range(file.trajectories)]
    long = forecast_scores(args, run, model, test, starts, steps) if steps > 0 else {}
    if run.rank:
        return []
    rows = {name: summarize(table, long.get(name), test.names) for name, table in short.items()}
    results = rows.pop("model")
    columns = ["one_step", "all_steps", "rollout_6:12", "rollout_13:30"]
    columns += [f"one_step_{name}" for name in test.names]
    print(f"VRMSE, mean over fields: held-out windows (all_steps: 1 to {args.n_out}) and rollouts whose first "
          f"target is frame {first}")
    weights = "tiny, trained by this run" if args.model == "tiny" else args.weights_from
    stages = [name for _, name, _, _ in stage_plan(args)]
    files = common.report(SCRIPT, args, weights, began, ("one_step", "persistence", True), results, rows,
                          columns, ("vrmse", "rollout_vrmse"), stages)
    if test.files[0].dataset == DATASET:
        common.print_table({f"{name}, published": row for name, row in PUBLISHED.items()}, columns[:4])
        print("published: from 4 given frames, on the test split of the 128 x 384 data set")
    return files


def picture(values, truth, name):
    """T H W -> T 3 H W in [-1, 1], on a colour scale from the truth: symmetric for components of vectors."""
    import matplotlib
    low, high = np.percentile(truth.numpy(), [0.1, 99.9])
    if name.endswith(("_x", "_y")):
        low, high = -max(-low, high), max(-low, high)
    colours = matplotlib.colormaps["PuOr_r" if low == -high else "viridis"]
    rgb = colours(((values.numpy() - low) / max(high - low, 1e-12)).clip(0, 1))[..., :3]
    return torch.from_numpy(rgb).movedim(-1, 1).float() * 2 - 1


@torch.no_grad()
def sample(args, run, model, test):
    """Forecasts of held-out trajectories from their middle, where the flow has developed, one sample each,
    field by field below the truth -> [samples/...]."""
    files = []
    places = [(i, k) for i, file in enumerate(test.files) for k in range(file.trajectories)]
    count = min(args.num_samples, len(places))
    for i, k in [places[(2 * j + 1) * len(places) // (2 * count)] for j in range(count)]:
        first = max(args.n_in, test.files[i].steps // 2)
        steps = min(args.sample_frames, test.files[i].steps - first)
        frames = read_window(test.files[i], k, first - args.n_in, args.n_in + steps).to(run.device)
        seeds = [mix_seed(args.seed, 3, i, k)]
        forecast = rollout(model, frames[None, :args.n_in], steps, seeds, 1, test.text([(i, k)], run.device))
        forecast = torch.cat([frames[:args.n_in], forecast[0, 0]]).cpu()
        stem, truth = Path(args.output_dir, "samples", f"{test.files[i].path.stem}_{k}"), frames.cpu()
        panels = {}
        for c, name in enumerate(test.names):
            panels |= {name: picture(truth[:, c], truth[:, c], name),
                       f"{name}, forecast": picture(forecast[:, c], truth[:, c], name)}
        labels = ["given"] * args.n_in + [f"t+{t}" for t in range(1, steps + 1)]
        scale = max(1, round(200 / truth.shape[-1]))
        files += common.write_panels(stem, panels, labels, args.n_in, 8, scale, columns=6)
        np.save(f"{stem}.npy", forecast[args.n_in:].numpy())     # physical units, T C H W
        files.append(f"{stem}.npy")
    return files


# ---- set-up and parallel wrap ---------------------------------------------------------------------------

def setup(args):
    """Joins torchrun's processes and chooses device and precision -> rank, world, device, dtype, autocast."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = common.choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    dtype = common.choose_dtype(args.dtype, device)
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    return argparse.Namespace(rank=rank, world=world, device=device, dtype=dtype, autocast=autocast)


def wrap(model, args, run):
    """FSDP2 with --fsdp, a block a unit, for the experts; otherwise DDP under torchrun."""
    if isinstance(model, Expert):
        if args.grad_checkpoint:
            model.transformer.enable_gradient_checkpointing()
        if args.compile:
            for block in model.transformer.blocks:
                block.compile()
        if args.fsdp:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
            mesh = init_device_mesh(run.device.type, (run.world,))
            policy = MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32)
            for block in model.transformer.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            # By default the root stays gathered until a backward: a step after a validation would then
            # compute with the EMA weights.
            return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if run.world == 1:
        return model
    ids = [run.device] if run.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, forward_sync_buffers=False)


# ---- train ----------------------------------------------------------------------------------------------

def get_lr(step, peak, warmup, total):
    """Learning rate of a step, counted from 0: linear warm-up, then cosine decay to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


STAGES = ("adapter", "base", "high", "low", "decoder", "convlstm", "unet")


def train(args, run, stage, folder, model, spec, loss_fn, val_fn, steps, lr, checkpoint):
    """Trains what requires grad of `model` up to `steps`, resuming from `checkpoint`; <folder>/ckpt then has
    the last step, and `model` the EMA weights. spec: random values of a sample, for sample_global_batch.
    loss_fn(model, values) -> loss, {name: term to log}. val_fn(model) -> {name: number}."""
    net = wrap(model, args, run)
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)
    ema = common.EMA(params, args.ema_decay)
    start = common.load_run(checkpoint, net, optimizer, ema, trained_only=True)
    log = common.open_log(SCRIPT, folder.relative_to(args.output_dir), args, start, steps)
    common.barrier()                             # rank 0 has removed rows beyond `start`
    should_stop = common.install_sigterm_handler()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, lr, args.warmup_steps, steps)
        net.train()
        seed = common.seed_all(args.seed, STAGES.index(stage), step)
        for micro in range(args.grad_accum):     # processes average gradients at the last micro-step only
            values = common.sample_global_batch(spec, seed, args.batch_size, run.rank, run.world, micro,
                                                args.grad_accum, run.device)
            net.require_backward_grad_sync = micro == args.grad_accum - 1          # read by DDP
            loss, terms = loss_fn(net, values)
            (loss / args.grad_accum).backward()
            log.add(loss=loss, **terms)
        norm = nn.utils.clip_grad_norm_(params, args.grad_clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        done = step + 1
        stop = should_stop()
        save = stop or done == steps or args.save_every and done % args.save_every == 0
        if (save or args.log_every and done % args.log_every == 0) and not norm.isfinite():
            raise UserError(f"loss or gradient is not finite at step {done}: resume from "
                            f"{common.latest_checkpoint(folder / 'ckpt') or 'the start'} with a lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        log.step(done, lr=optimizer.param_groups[0]["lr"], grad_norm=norm)
        if save:                                 # before validation, so that an error there loses nothing
            common.save_run(folder, SCRIPT, done, net, optimizer, ema, args, args.keep_last, True)
        if stop:
            raise UserError(f"stopped by SIGTERM after step {done}, which is saved: the same command resumes")
        if args.eval_every and (done % args.eval_every == 0 or done == steps):
            with ema.applied(), torch.no_grad():
                log.row(done, **val_fn(net.eval()))
            log.restart_clock()
    common.remove_sigterm_handler()
    log.bar.close()
    ema.copy_to_params()


# ---- stages ---------------------------------------------------------------------------------------------

def stage_plan(args):
    """-> [(stage, its folder in output_dir, steps, peak learning rate)]; the last one's folder is the run.
    --max_steps are LoRA's: each expert's share is that of its noise levels in Wan's schedule."""
    if args.mode in ("adapter", "unet"):
        return [(args.mode, ".", args.max_steps, args.lr)]
    learned = args.adapter == "learned" and args.adapter_steps > 0
    plan = [("adapter", "adapter", args.adapter_steps, args.adapter_lr)] if learned else []
    if args.mode == "convlstm":
        return [*plan, ("convlstm", ".", args.max_steps, args.lr)]
    if args.model == "tiny" and args.base_steps:
        plan.append(("base", "base", args.base_steps, args.base_lr))
    high = min(max(1, round(args.max_steps * (1 - unshift_sigma(BOUNDARY, args.shift)))), args.max_steps - 1)
    plan += [("high", "high", max(1, high), args.lr), ("low", "low", max(1, args.max_steps - high), args.lr)]
    if args.decoder_steps:
        plan.append(("decoder", "decoder", args.decoder_steps, args.decoder_lr))
    stage, _, steps, lr = plan[-1]
    return [*plan[:-1], (stage, ".", steps, lr)]


def make_adapter(args, names, grid):
    panel = video_size(args, grid) if args.mode != "unet" else grid
    if args.adapter == "tile":
        return TileAdapter(names, grid, panel, args.frame_repeat)
    return LearnedAdapter(names, grid, panel, args.frame_repeat, args.adapter_width)


def fit_adapter(args, run, train_set):
    """Writes adapter/: the adapter before training, fitted to a few dozen windows, and for tiny runs a linear
    codec in place of the VAE, fitted to the same."""
    folder = Path(args.output_dir, "adapter")
    if run.rank == 0 and not (folder / "adapter.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        adapter, fields = make_adapter(args, train_set.names, train_set.grid), train_set.calibration()
        adapter.fit(fields)
        common.save_weights(folder / "adapter.safetensors", adapter.state_dict())
        if args.model == "tiny" and args.mode != "unet":
            with torch.no_grad():
                codec = common.LinearCodec.fit(adapter.to_video(fields), TINY["transformer"]["out_channels"])
            common.save_weights(folder / "codec.safetensors", codec.tensors)
        common.write_json(folder / "adapter.json", {          # last: the folder is complete
            "names": train_set.names, "grid": train_set.grid, "periodic": train_set.periodic})
    common.barrier()


def load_adapter(args, device):
    """-> the adapter as trained so far, frozen, its VAE, and which axes are periodic."""
    folder = Path(args.output_dir, "adapter")
    meta = json.loads(common.read_text(folder / "adapter.json"))
    adapter = make_adapter(args, meta["names"], meta["grid"])
    weights = common.load_weights(folder / "adapter.safetensors")
    adapter = common.load_for_inference(adapter, weights, folder / "adapter.safetensors", device)
    trained = stage_checkpoint(args, "adapter")
    if trained:
        weights = {name.removeprefix("adapter."): value for name, value in trained.state["ema"].items()}
        common.restore_state(adapter, weights, source=str(trained.path))
    if args.mode == "unet":
        vae = None
    elif args.model == "tiny":
        vae = common.LinearCodec(common.load_weights(folder / "codec.safetensors"), device)
    else:
        vae = load_part(args, "vae", device).requires_grad_(False)
    return adapter, vae, meta["periodic"]


def stage_checkpoint(args, stage):
    """The newest Checkpoint of a stage of this run, or None."""
    for name, folder, _, _ in stage_plan(args):
        if name == stage:
            return common.find_checkpoint(Path(args.output_dir, folder, "ckpt"), SCRIPT, "auto")


def load_stage(args, stage, module):
    """`module` with the EMA weights of a stage."""
    checkpoint = stage_checkpoint(args, stage)
    common.restore_state(module, checkpoint.state["ema"], source=str(checkpoint.path), trained_only=True)
    return module.eval().requires_grad_(False)


def load_forecaster(args, run, decoder=True):
    """-> the Forecaster that the stages of a run made. decoder: False for the one before that stage."""
    adapter, vae, periodic = load_adapter(args, run.device)
    C = len(adapter.names)
    if args.mode == "unet":
        net = UNet(C, C, args.unet_width, periodic).to(run.device)
        return Forecaster(args, adapter, vae, load_stage(args, "unet", UNetTraining(net, adapter.map)).net)
    if args.mode == "convlstm":
        net = ConvLSTM(vae.config.z_dim).to(run.device)
        return Forecaster(args, adapter, vae, load_stage(args, "convlstm", ConvLSTMTraining(
            net, adapter, vae, 0)).net)
    if args.mode == "adapter":
        return Forecaster(args, adapter, vae)
    experts = {}
    for side in TRANSFORMERS:
        device = torch.device("cpu") if args.offload else run.device
        experts[side] = load_stage(args, side, load_expert(args, side, device, run.autocast))
    net = None
    if decoder and args.decoder_steps:
        net = Decoder(C, args.decoder_width, periodic).to(run.device)
        net = load_stage(args, "decoder", DecoderTraining(net, adapter.map.std)).decoder
    return Forecaster(args, adapter, vae, experts, net)


def load_model(folder: str, device: str = "cpu") -> Forecaster:
    """The Forecaster of a finished run: predict(history, text) is in physical units."""
    args, _, _ = parse_args(["--eval", "--output_dir", str(folder), "--device", device, "--dtype", "float32"])
    return load_forecaster(args, setup(args))


@torch.no_grad()
def predict_fields(model: Forecaster, history: torch.Tensor, prompt: str, seed: int = 0) -> torch.Tensor:
    """history n_in C H W in physical units, channels as in the training set, prompt such as "turbulent
    radiative layer 2D, tcool 0.1" -> the next frames n_out C H W."""
    args, device, text = model.args, model.adapter.map.mid.device, None
    if args.mode == "native":
        parts = [load_part(args, part, device) for part in ("tokenizer", "text_encoder")]
        text = common.pad_text(common.encode_text(*parts, [prompt], args.text_length), args.text_length)
    return model.predict(history[None].to(device), text, [seed])[0]


class Stage:
    """What a stage trains, and its inputs: `inputs` turns windows and random values into the arguments of
    `module`, in training and in validation."""
    def __init__(self, args, run, name, data):
        self.args, self.run, self.name, self.data = args, run, name, data
        self.spec = {"window": ("randint", len(data["train"].rows)), "shift": ("rand",)}
        self.latents = {}                        # of windows, where they are not augmented
        adapter, vae, periodic = load_adapter(args, run.device)
        C = len(adapter.names)
        if name == "adapter":
            self.module = AdapterTraining(adapter.requires_grad_(True), vae, args)
        elif name == "convlstm":
            net, given = ConvLSTM(vae.config.z_dim).to(run.device), (adapter.video_frames(args.n_in) + 3) // 4
            self.module = ConvLSTMTraining(net, adapter, vae, given)
        elif name == "unet":
            net = UNet(C, C, args.unet_width, periodic)
            self.module = UNetTraining(net.to(run.device), adapter.map)
        else:
            shape = latent_shape(args, adapter.video_size)
            self.spec |= {"u": ("rand",), "noise": ("randn", *shape)}
            self.forecaster = Forecaster(args, adapter, vae)
            if name == "decoder":
                self.forecaster = load_forecaster(args, run, decoder=False)
                net = Decoder(C, args.decoder_width, periodic).to(run.device)
                self.module = DecoderTraining(net, adapter.map.std)
            else:
                side = "low" if name == "low" else "high"
                self.module = load_expert(args, side, run.device, run.autocast, lora=name != "base")

    def encode(self, split, numbers, shifts):
        """Latents and condition of windows, which stay in memory where nothing is random about them."""
        if shifts is not None:
            return self.forecaster.encode(split.fields(numbers, shifts).to(self.run.device))
        for n in numbers:
            if (id(split), n) not in self.latents:
                z, cond = self.forecaster.encode(split.fields([n]).to(self.run.device))
                self.latents[id(split), n] = z[0].cpu(), cond[0].cpu()
        pairs = [self.latents[id(split), n] for n in numbers]
        return [torch.stack(tensors).to(self.run.device) for tensors in zip(*pairs)]

    def inputs(self, split, numbers, values, shifts=None):
        args, device = self.args, self.run.device
        if self.name in ("adapter", "convlstm", "unet"):
            return (split.fields(numbers, shifts).to(device),)
        text = split.text([split.rows[n][:2] for n in numbers], device)
        if self.name != "decoder":
            z, cond = self.encode(split, numbers, shifts)
            return z, cond, text, draw_sigma(values["u"], self.name, args.shift), values["noise"]
        fields, model = split.fields(numbers, shifts).to(device), self.forecaster
        _, cond = model.encode(fields)
        y = model.decode(model.sample_latents(cond, values["noise"], text))
        mapped = model.adapter.map(fields, fields[:, :1])
        return y, mapped[:, args.n_in - 1:args.n_in], mapped[:, -args.n_out:]

    def loss(self, net, values):
        shifts = values["shift"] if self.args.augment else None
        return net(*self.inputs(self.data["train"], values["window"].tolist(), values, shifts))

    def validate(self, net):
        """The same windows, noise levels and noise at every validation."""
        valid, size, terms = self.data["valid"], self.args.batch_size, {}
        for first in range(0, len(valid.rows), size):
            numbers = range(first, min(first + size, len(valid.rows)))
            values = common.sample_global_batch(self.spec, first, len(numbers), device=self.run.device)
            loss, more = net(*self.inputs(valid, numbers, values))
            for term, value in {"loss": loss, **more}.items():
                terms[term] = terms.get(term, 0) + value.item() * len(numbers) / len(valid.rows)
        return {f"val_{term}": value for term, value in terms.items()}


def latent_shape(args, size):
    """Latents of a window of video frames H', W': 16 F h w."""
    frames = 1 + args.frame_repeat * (args.n_in + args.n_out - 1)
    channels = TINY["transformer"]["out_channels"] if args.model == "tiny" else 16
    return channels, (frames + 3) // 4, size[0] // 8, size[1] // 8


def export(args, stage, module, final):
    """final/: files for use elsewhere. high/ and low/ hold the LoRA files that diffusers' pipelines load."""
    final.mkdir(parents=True, exist_ok=True)
    if stage in TRANSFORMERS:
        (final / stage).mkdir(exist_ok=True)
        common.save_lora(final / stage, module.transformer)
    elif stage == "base":
        module.transformer.save_pretrained(final / "base")
    else:
        common.save_weights(final / f"{stage}.safetensors", module.state_dict())


def train_stages(args, run, data, checkpoint):
    """Trains the stages of the plan that are not complete, one after the other: one network at a time."""
    if run.rank == 0:
        common.write_json(Path(args.output_dir, "args.json"), {**vars(args), **common.provenance()})
    fit_adapter(args, run, data["train"])
    for name, folder, steps, lr in stage_plan(args):
        resume = "none" if args.resume == "none" else "auto"
        folder = Path(args.output_dir, folder)
        found = checkpoint if folder == Path(args.output_dir) else common.find_checkpoint(
            folder / "ckpt", SCRIPT, resume)
        if found and found.meta["step"] >= steps:
            continue
        torch.manual_seed(args.seed)             # equal initial weights on all processes and after a restart
        stage = Stage(args, run, name, data)
        train(args, run, name, folder, stage.module, stage.spec, stage.loss, stage.validate, steps, lr, found)
        if run.rank == 0 and not args.fsdp:
            export(args, name, stage.module, Path(args.output_dir, "final"))
        del stage


# ---- main -----------------------------------------------------------------------------------------------

def dry_run(args):
    """Prints parameters, FLOPs and memory of each stage, on the meta device: no data, no allocation. The
    fields are those of the radiative layer, 32 x 96 for tiny."""
    B, tiny, world = args.batch_size, args.model == "tiny", int(os.environ.get("WORLD_SIZE", 1))
    names, grid = ["density", "pressure", "velocity_x", "velocity_y"], (32, 96) if tiny else (128, 384)
    flags = argparse.Namespace(**{**vars(args), "random_init": True, "output_dir": os.devnull})
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=not tiny)
    with torch.device("meta"):
        adapter = make_adapter(args, names, grid)
        fields, shape = torch.randn(B, args.n_in + args.n_out, 4, *grid), latent_shape(args, adapter.video_size)
        z = torch.randn(B, *shape)
        for stage, _, _, _ in stage_plan(args):
            tokens = 0
            if stage in ("high", "low", "base"):
                model = load_expert(flags, "high", "meta", autocast, lora=stage != "base")
                if args.grad_checkpoint:
                    model.transformer.enable_gradient_checkpointing()
                cond = torch.randn(B, shape[0] + 4, *shape[1:])
                text = torch.randn(B, args.text_length, model.transformer.config.text_dim)
                inputs, tokens = (z, cond, text, torch.rand(B), z), math.prod(shape[1:]) // 4
            elif stage == "adapter":
                model, inputs = adapter, (fields,)
                model.forward = lambda x: (adapter.map.error(adapter.to_mapped(adapter.to_video(x)), x), {})
            elif stage == "convlstm":
                model, inputs = ConvLSTM(), (z[:, :, :2], shape[1] - 2)
            elif stage == "unet":
                model, inputs = UNetTraining(UNet(4, 4, args.unet_width, (True, False)), adapter.map), (fields,)
            else:
                model = DecoderTraining(Decoder(4, args.decoder_width, (True, False)), adapter.map.std)
                inputs = (fields[:, 1:], fields[:, :1], fields[:, 1:])

            def loss():
                output = model(*inputs)
                return output[0] if isinstance(output, tuple) else output.sum()

            print(common.dry_run_report(f"stage {stage}", model, loss, B, tokens, world,
                                        args.fsdp and tokens > 0))
    if args.model != "tiny":
        print("  beside it the VAE: 0.5 GB in fp32, without its activations")


def run_script(argv):
    args, checkpoint, why_preset = parse_args(argv)
    if args.dry_run:
        return dry_run(args)
    run = setup(args)
    inference_only = args.sample or args.eval
    common.announce(SCRIPT, args, why_preset, run, checkpoint)
    common.simulate_missing_data(SCRIPT, args.data_dir, default=PRESETS["tiny"]["data_dir"])
    data = open_data(args)
    if args.mode == "native":
        encode_prompts(args, run, data)
    if run.rank == 0 and checkpoint:
        common.copy_stages(checkpoint, args.output_dir, ["adapter", "base", "high", "low"])
    common.barrier()
    if not (inference_only and checkpoint):
        train_stages(args, run, data, checkpoint)
    model = load_forecaster(args, run)
    files = evaluate(args, run, model, data["test"]) if args.eval or not inference_only else []
    if run.rank == 0:
        if args.sample or not inference_only:
            files += sample(args, run, model, data["test"])
        common.show_results(args.output_dir, files, args.tensorboard, args.wandb)
        print("wrote " + ", ".join(files))
    common.shutdown()


def main(argv=None):
    return common.one_line_errors(f"{SCRIPT}.py", lambda: run_script(argv))


if __name__ == "__main__":
    sys.exit(main())
