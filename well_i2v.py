"""well_i2v.py: an image-to-video diffusion model, fine-tuned to forecast simulations of The Well.

Reference   LIX-shape-analysis/video_for_science: Wan2.2-I2V-A14B (arXiv:2503.20314) on The Well
            (arXiv:2412.00568). LoRA (arXiv:2106.09685) is trained on both experts, one after the other.
Equations   fields <-> [-1, 1] <-> video frames                            -> FieldMap, LearnedAdapter
            input = [x_s 16, mask 4, VAE(input frame, then grey) 16]       -> condition
            x_s = (1 - s) z + s eps; loss |v - (eps - z)|^2                -> add_noise, Expert
            s = shift u / (1 + (shift - 1) u); s >= 0.9: high-noise expert -> shift_sigma, draw_sigma
            dx/ds = v from s = 1 to 0, by UniPC                            -> integrate
            VRMSE = sqrt(mean (x - y)^2 / (var y + 1e-7)), over space      -> vrmse
Run         python well_i2v.py                       # simulate, train, evaluate: 6 to 9 min on 2 CPU cores
            torchrun --nproc_per_node=4 well_i2v.py --lora_rank 32
            python well_i2v.py --sample --num_samples 2                    # or --eval
            python well_i2v.py --mode unet --output_dir runs/unet          # baseline; also convlstm, adapter
            torchrun --nproc_per_node=4 well_i2v.py --preset i2v_a14b --data_dir data/the_well
Data        data/well_i2v/prepare.py simulates, downloads The Well, and writes your fields in its format.
Shapes      B batch  T frames  C fields  H W grid  H' W' video frame  F latent frames  h w latent grid
            L text tokens  D width  S samples. Fields are B T C H W in physical units, videos B T' 3 H' W' in
            [-1, 1], latents B 16 F h w. Mapped fields are B T C H W in about [-1, 1].
"""
import argparse
import contextlib
import functools
import gc
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import common
from common import UserError, at_least, expand_to
from data.well_i2v.reader import DATASET, PUBLISHED, list_windows, open_data, read_window
from data.well_i2v.unet import Conv, UNet

SCRIPT = "well_i2v"
BOUNDARY = 0.9                           # Wan2.2-I2V-A14B uses its high-noise expert from this sigma on
TRANSFORMERS = {"high": "transformer", "low": "transformer_2"}                 # names in diffusers' pipeline
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")       # Wan's names
FIRST_TARGET = 4                         # The Well rolls out from 4 frames: the first target is frame 4

# ---- presets and flags ----------------------------------------------------------------------------------

PRESETS = {
    # A single network call on pure noise predicts the mean, which VRMSE favors. The large shift therefore
    # spends most of the schedule at high noise.
    "tiny": dict(
        model="tiny", data_dir=f"data/{SCRIPT}/simulated", adapter="tile", frame_repeat=4, text_length=64,
        base_steps=660, base_lr=2e-3, max_steps=200, lr=1e-3, lora_targets=",".join(LORA_TARGETS),
        decoder_steps=560, adapter_lr=1e-3, shift=40.0, batch_size=4, warmup_steps=30, ema_decay=0.99,
        num_inference_steps=1, members=1, eval_clips=32, rollout_frames=30, sample_frames=16, eval_every=300,
        save_every=300),
    # The reference project's configuration: 20 epochs of 6,696 windows, batch 1 on each of 4 GPUs.
    "i2v_a14b": dict(data_dir="data/the_well", lr=1e-5, batch_size=1, max_steps=33480, grad_checkpoint=True,
                     save_every=500, eval_every=1000),
    # The reference project's older modes: a predictor of latents, and the adapter alone.
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
# Flags that define the weights or their meaning: a checkpoint's values cannot be overridden.
MODEL_FLAGS = ("model", "mode", "n_in", "n_out", "adapter", "video_size", "frame_repeat", "width",
               "lora_rank", "lora_targets", "text_length")


def build_parser():
    parser = common.Parser(SCRIPT, PRESETS, __doc__.split("\n")[0])
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default=DATASET, help="data set to read if data_dir or data_dir/datasets has several")
    add("--n_in", type=at_least(1), default=1, help="input frames; --mode convlstm takes 4k + 1")
    add("--n_out", type=at_least(1), default=8, help="frames per forecast")
    add = parser.add_argument_group("model").add_argument
    add("--mode", choices=["native", "convlstm", "adapter", "unet"], default="native",
        help="native: Wan's image-to-video diffusion; convlstm, adapter: older modes; unet: a baseline")
    add("--model", choices=["i2v_a14b", "tiny"], default="i2v_a14b", help="tiny: the same classes, smaller")
    add("--weights_from", default="Wan-AI/Wan2.2-I2V-A14B-Diffusers", metavar="FOLDER|HUB_ID",
        help="diffusers folder, hub id, or folder with the official files")
    add("--random_init", action="store_true", help="random weights of Wan's size, to measure speed")
    add("--adapter", choices=["learned", "tile"], default="learned",
        help="fields to 3 channels: learned layers, or three fields per panel of a larger frame")
    add("--video_size", default="", metavar="H,W", help="panel size, multiples of 16 (default: the grid)")
    add("--frame_repeat", type=at_least(1), default=1, help="video frames per time step; the VAE packs 4")
    add("--lora_rank", type=at_least(1), default=32, help="LoRA rank and alpha")
    add("--lora_targets", default="to_q,to_k,to_v,to_out.0", help="LoRA layers; or ffn.net.0.proj,ffn.net.2")
    add("--width", type=at_least(4), default=32, help="channels of adapter, decoder and --mode unet")
    add("--text_length", type=at_least(1), default=512, help="tokens per prompt, padding included")
    add = parser.add_argument_group("stages").add_argument
    add("--adapter_steps", type=at_least(0), default=2000, help="optimizer steps of the learned adapter")
    add("--adapter_lr", type=at_least(0, float), default=2e-4, help="lr of adapter and decoder (0: --lr)")
    add("--base_steps", type=at_least(0), default=0, help="optimizer steps of the tiny base model")
    add("--base_lr", type=at_least(0, float), default=1e-3, help="peak learning rate of the tiny base model")
    add("--decoder_steps", type=at_least(0), default=0, help="optimizer steps of the decoder (0: none)")
    add("--shift", type=at_least(1e-3, float), default=5.0, help="shift of Wan's noise schedule")
    add = parser.add_argument_group("sampling and evaluation").add_argument
    add("--num_inference_steps", type=at_least(1), default=30, help="sampler steps per forecast")
    add("--offload", action="store_true", help="keep the expert that is not in use on the CPU")
    add("--members", type=at_least(1), default=4, help="samples that --eval averages per forecast")
    add("--eval_clips", type=at_least(1), default=90, help="held-out windows to forecast, evenly spaced")
    add("--rollout_frames", type=at_least(0), default=97, help="frames of --eval's rollouts (0: none)")
    add("--num_samples", type=at_least(1), default=3, help="windows to sample (3: best, median and worst)")
    add("--sample_frames", type=at_least(1), default=24, help="frames per sample")
    return parser


def parse_args(argv=None):
    """-> flags, checkpoint or None, reason for the preset."""
    args, checkpoint, why_preset = common.parse_args(
        build_parser(), argv, MODEL_FLAGS, get_data=f"python data/{SCRIPT}/prepare.py --download")
    world = int(os.environ.get("WORLD_SIZE", 1))
    errors = {
        f"--n_in {args.n_in}, --n_out {args.n_out}, --frame_repeat {args.frame_repeat}: Wan's VAE takes 4k "
        f"+ 1 video frames": args.frame_repeat * (args.n_in - 1) % 4 or args.frame_repeat * args.n_out % 4,
        f"--n_in {args.n_in}: --mode {args.mode} takes one input frame; --mode convlstm takes more":
            args.mode in ("native", "unet") and args.n_in > 1,
        f"--lora_targets {args.lora_targets}: choose from {','.join(LORA_TARGETS)}":
            set(args.lora_targets.split(",")) - set(LORA_TARGETS),
        "--mode adapter trains the adapter: it needs --adapter learned":
            args.mode == "adapter" and args.adapter != "learned",
        f"--fsdp and --compile apply to Wan's experts, which --mode {args.mode} does not train":
            (args.fsdp or args.compile) and args.mode != "native",
        "--fsdp shards over processes: start it with torchrun --nproc_per_node=N": args.fsdp and world == 1}
    for message, is_error in errors.items():
        if is_error:
            raise UserError(message)
    if args.preset == "tiny" and args.batch_size == PRESETS["tiny"]["batch_size"] and not checkpoint:
        args.batch_size = max(1, args.batch_size // world)       # tiny's batch is split over the processes
    return args, checkpoint, why_preset


# ---- model: fields <-> video ----------------------------------------------------------------------------

class FieldMap(nn.Module):
    """Fields in physical units <-> mapped fields in about [-1, 1]: an affine map of asinh((x - m) / (1.5 s)),
    where m and s are each field's mean and standard deviation in the window's first frame.

    VRMSE divides by each frame's standard deviation. That of pressure grows from 0.01 to 0.08 while its mean
    drifts, so that a single scale would flatten most frames. The bounds are the training set's 0.1 and 99.9
    percentiles with a margin of 15 %, because the VAE clamps at +-1.
    """
    def __init__(self, C):
        super().__init__()
        for name in ("scale", "mid", "half_range", "std"):
            self.register_buffer(name, torch.ones(C, 1, 1))

    def reference(self, first):
        """First frames B 1 C H W -> mean and 1.5 std, B 1 C 1 1; the variance is offset for flat frames."""
        mean = first.mean((-2, -1), keepdim=True)
        return mean, 1.5 * (first.var((-2, -1), keepdim=True) + (0.3 * self.scale) ** 2).sqrt()

    @torch.no_grad()
    def fit(self, fields):
        """fields: windows of the training set, B T C H W."""
        self.mid.zero_()
        self.half_range.fill_(1)
        self.scale.copy_(fields.std((-2, -1)).flatten(0, 1).median(0).values.clamp(min=1e-12)[:, None, None])
        y = self(fields, fields[:, :1]).transpose(0, 2).flatten(1)             # C n
        low, high = torch.from_numpy(np.quantile(y.numpy(), (0.001, 0.999), axis=1)).float()[..., None, None]
        self.mid.copy_((low + high) / 2)
        self.half_range.copy_(((high - low) / 2 * 1.15).clamp(min=1e-6))
        self.std.copy_((y.std(1)[:, None, None] / self.half_range).clamp(min=1e-3))

    def forward(self, x, first):
        """x: windows B T C H W. first: their first frames B 1 C H W."""
        mean, deviation = self.reference(first)
        return (torch.asinh((x - mean) / deviation) - self.mid) / self.half_range

    def inverse(self, y, first):
        mean, deviation = self.reference(first)
        return mean + deviation * (y * self.half_range + self.mid).sinh()

    def error(self, y, target):
        """Mean squared error of mapped fields, in units of each field's variance."""
        return ((y - target) / self.std).square().mean()

    def relative_error(self, y, target):
        """Mean over samples, frames and fields of the root of error() over space, as in VRMSE."""
        return (((y - target) / self.std).square().mean((-2, -1)) + 1e-6).sqrt().mean()


def resize(x, size):
    """B T C H W -> B T C *size, bicubic."""
    if x.shape[-2:] == tuple(size):
        return x
    y = F.interpolate(x.flatten(0, 1), size, mode="bicubic", antialias=True, align_corners=False)
    return y.unflatten(0, x.shape[:2])


class TileAdapter(nn.Module):
    """C fields <-> a video of 3 channels, frame by frame: three fields per panel, panels tiled along the
    short axis. Unused channels are 0.

    names: field names. grid: H, W. panel: H', W' of a panel. repeat: video frames per time step after the
    first, because the VAE packs 4 frames into one latent frame.
    """
    def __init__(self, names, grid, panel, repeat, panels=None):
        super().__init__()
        self.names, self.grid, self.panel, self.repeat = list(names), tuple(grid), tuple(panel), repeat
        self.panels = panels or math.ceil(len(names) / 3)
        self.axis = -2 if panel[0] <= panel[1] else -1
        self.video_size = list(panel)
        self.video_size[self.axis] *= self.panels
        self.map = FieldMap(len(names))

    def fit(self, fields):
        """Fits the statistics of training windows B T C H W."""
        self.map.fit(fields)

    def video_frames(self, T):
        return 1 + self.repeat * (T - 1)

    def latent_frames(self, T):
        return (self.video_frames(T) + 3) // 4

    def encode(self, y):
        """Mapped fields -> B T 3 H' W'."""
        y = F.pad(resize(y, self.panel), (0, 0, 0, 0, 0, 3 * self.panels - y.shape[2]))
        return torch.cat(y.split(3, dim=2), dim=self.axis)

    def decode(self, x):
        """Inverse of encode."""
        y = torch.cat(x.chunk(self.panels, dim=self.axis), dim=2)
        return resize(y[:, :, :len(self.names)], self.grid)

    def to_video(self, fields):
        """A window of fields -> video B T' 3 H' W', in [-1, 1] except for outliers."""
        x = self.encode(self.map(fields, fields[:, :1]))
        return torch.cat([x[:, :1], x[:, 1:].repeat_interleave(self.repeat, dim=1)], dim=1)

    def to_mapped(self, video):
        """Video B T' 3 H' W' -> mapped fields."""
        later = video[:, 1:]
        if self.repeat > 1 and later.shape[1]:
            later = later.unflatten(1, (-1, self.repeat)).mean(2)
        return self.decode(torch.cat([video[:, :1], later], dim=1))


class LearnedAdapter(TileAdapter):
    """The reference project's channel adapter (C <-> 3) and spatial adapter (grid <-> video), learned.

    It is initialized to principal components of the mapped fields and bicubic interpolation, with
    convolution branches at zero. There is no GroupNorm, which would remove the level and scale of the fields.
    """
    def __init__(self, names, grid, panel, repeat, width):
        super().__init__(names, grid, panel, repeat, panels=1)
        C = len(names)
        self.mix, self.unmix = nn.Parameter(torch.zeros(3, C)), nn.Parameter(torch.zeros(C, 3))
        channels = {"encode_fields": (C, 3), "encode_video": (3, 3), "decode_video": (3, 3),
                    "decode_fields": (3, C)}
        self.branches = nn.ModuleDict({name: nn.Sequential(
            Conv(c_in, width), nn.SiLU(), Conv(width, c_out)) for name, (c_in, c_out) in channels.items()})
        for branch in self.branches.values():
            nn.init.zeros_(branch[2].weight)
            nn.init.zeros_(branch[2].bias)

    @torch.no_grad()
    def fit(self, fields):
        super().fit(fields)
        y = self.map(fields, fields[:, :1]).transpose(0, 2).flatten(1)         # C n
        _, components = torch.linalg.eigh(y @ y.T)
        V = F.pad(components.T.flip(0)[:3], (0, 0, 0, max(0, 3 - len(y))))     # orthonormal rows
        bounds = torch.from_numpy(np.quantile((V @ y).abs().numpy(), 0.998, axis=1)).float().clamp(min=1e-6)
        self.mix.copy_(V / bounds[:, None])
        self.unmix.copy_(V.T * bounds)

    def add_branch(self, name, y, x):
        return y + self.branches[name](x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def encode(self, y):
        x = self.add_branch("encode_fields", torch.einsum("dc,btchw->btdhw", self.mix, y), y)
        x = resize(x, self.panel)
        return self.add_branch("encode_video", x, x)

    def decode(self, x):
        x = resize(self.add_branch("decode_video", x, x), self.grid)
        return self.add_branch("decode_fields", torch.einsum("cd,btdhw->btchw", self.unmix, x), x)

    def forward(self, fields, vae):
        """The reference project's reconstruction loss (weight 0.5, backpropagated through the VAE) and cycle
        loss (0.1, adapter alone). The prediction loss does not train the adapter: it could lower that loss by
        collapsing the targets."""
        video, target = self.to_video(fields), self.map(fields, fields[:, :1])
        decoded = common.wan_decode(vae, common.wan_encode(vae, video))
        terms = {"recon_loss": self.map.error(self.to_mapped(decoded), target),
                 "cycle_loss": self.map.error(self.to_mapped(video), target),
                 "range_loss": F.relu(video.abs() - 1).square().mean()}        # the VAE clamps at +-1
        return 0.5 * terms["recon_loss"] + 0.1 * terms["cycle_loss"] + terms["range_loss"], terms


# ---- model: decoder and ConvLSTM ------------------------------------------------------------------------

class Decoder(UNet):
    """The last part of the inverse adapter, which repairs forecasts. It is trained on sampled forecasts.

    Adapter and VAE lose small scales, which the previous frame still has. A mean of both frames, with weights
    that depend on field and lead time, is corrected by a small U-Net that takes both as mapped fields, frame
    by frame, each from the previous repaired one. --mode unet, a baseline as in The Well, has no forecast.
    """
    def __init__(self, C, *arguments):
        super().__init__(2 * C + 1, C, *arguments)
        self.gate = nn.Parameter(torch.tensor([[-0.5], [0.1]]).repeat(1, C))

    def repair(self, forecast, previous, lead):
        """Decoded forecast (or None) and previous repaired frame, B C H W, lead time B -> B C H W."""
        forecast = previous if forecast is None else forecast
        lead = lead.float().view(-1, 1, 1, 1)
        weight = torch.sigmoid(self.gate[0, :, None, None] + self.gate[1, :, None, None] * lead)
        x = torch.cat([forecast, previous, (lead / 8).expand_as(forecast[:, :1])], dim=1)
        return previous + weight * (forecast - previous) + self.change(x)

    def forward(self, forecast, previous, lead, target, field_map):
        """Frames lead, lead + 1, ...: forecast (or None), target B T C H W, previous B C H W -> loss."""
        frames = []
        for t in range(target.shape[1]):
            previous = self.repair(None if forecast is None else forecast[:, t], previous, lead + t)
            frames.append(previous)
        return field_map.relative_error(torch.stack(frames, dim=1), target), {}


class ConvLSTM(nn.Module):
    """The reference project's predictor of latents, 645,777 parameters: a 3x3 convolution and two LSTM cells.
    Latent n + 1 is latent n plus the head's output times a learned scale, initially 0.1."""
    def __init__(self, z=16, hidden=64):
        super().__init__()
        self.inp = nn.Conv2d(z, hidden, 3, padding=1)
        self.cells = nn.ModuleList(nn.Conv2d(2 * hidden, 4 * hidden, 3, padding=1) for _ in range(2))
        self.head = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1), nn.GELU(),
                                  nn.Conv2d(hidden, z, 3, padding=1))
        self.scale = nn.Parameter(torch.tensor(0.1))

    def extend(self, z, observed):
        """z B 16 F h w -> its first `observed` frames and a forecast of the others, B 16 F h w."""
        state = [[torch.zeros_like(self.inp(z[:, :, 0]))] * 2 for _ in self.cells]
        frames = list(z[:, :, :observed].unbind(2))
        for n in range(z.shape[2] - 1):
            y = self.inp(frames[n])
            for k, cell in enumerate(self.cells):
                h, c = state[k]
                i, f, o, g = cell(torch.cat([y, h], dim=1)).chunk(4, dim=1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                y = o.sigmoid() * c.tanh()
                state[k] = [y, c]
            if n >= observed - 1:
                frames.append(frames[n] + self.scale * self.head(y))
        return torch.stack(frames, dim=2)

    def forward(self, fields, adapter, vae, observed):
        """2 x the loss of latents + the loss of mapped fields, backpropagated through the VAE's decoder."""
        with torch.no_grad():
            z = common.wan_encode(vae, adapter.to_video(fields))
        forecast = self.extend(z, observed)
        y, target = adapter.to_mapped(common.wan_decode(vae, forecast)), adapter.map(fields, fields[:, :1])
        terms = {"latent_loss": F.mse_loss(forecast[:, :, observed:], z[:, :, observed:]),
                 "physics_loss": adapter.map.error(y, target)}
        return 2 * terms["latent_loss"] + terms["physics_loss"], terms


# ---- model: condition and experts -----------------------------------------------------------------------

def condition(vae, first, frames):
    """First of `frames` video frames, B 3 H' W' -> mask 4 and latents 16, B 20 F h w, bit-identical to
    WanImageToVideoPipeline's prepare_latents. The mask is 1 for the first latent frame; the latents encode
    the frame followed by grey frames."""
    video = F.pad(first[:, :, None], (0, 0, 0, 0, 0, frames - 1))              # B 3 T' H' W'
    mode = vae.encode(video.to(vae.dtype)).latent_dist.mode().float()
    mean, std = common.latent_scale(vae, mode.device)
    z = (mode - mean) * (1 / std)                # division would change the last bit
    mask = torch.zeros_like(z[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, z], dim=1)


class Expert(nn.Module):
    """One of Wan's two transformers."""
    def __init__(self, transformer, autocast=contextlib.nullcontext):
        super().__init__()
        self.transformer, self.autocast = transformer, autocast

    def velocity(self, x, cond, t, text):
        """x B 16 F h w, cond B 20 F h w, t B in [0, 1000], text B L D -> B 16 F h w, fp32."""
        dtype = self.transformer.patch_embedding.weight.dtype
        with self.autocast():
            v = self.transformer(torch.cat([x, cond], 1).to(dtype), t, text.to(dtype), return_dict=False)[0]
        return v.float()

    def forward(self, z, cond, text, sigma, noise):
        """Latents z and noise B 16 F h w, sigma B -> loss over all latent frames, as in Wan's training."""
        v = self.velocity(add_noise(z, noise, sigma), cond, 1000 * sigma, text)
        return F.mse_loss(v, noise - z), {}


def load_part(args, part, device, side="high"):
    """A part of Wan, pretrained or random, or of the tiny model, random. Wan is in bf16, except for its VAE,
    which is in fp32 as in the official code; the tiny model is in fp32."""
    tiny = args.model == "tiny"
    dtype = torch.float32 if tiny or part == "vae" else torch.bfloat16
    torch.manual_seed(side == "low")     # not --seed: checkpoints omit random frozen weights
    return common.load_wan(args.weights_from, part=part, config=TINY if tiny else args.model, dtype=dtype,
                           device=device, random_init=args.random_init or tiny, expert=TRANSFORMERS[side])


def load_expert(args, stage, device, autocast=contextlib.nullcontext):
    """The expert "high" or "low", frozen, with LoRA weights in fp32: in bf16 most updates at a small learning
    rate round to zero. "base" is the model that both tiny experts start from; all its weights train."""
    side, tiny = "low" if stage == "low" else "high", args.model == "tiny"
    dit = load_part(args, "transformer", device, side)
    expert = Expert(dit, contextlib.nullcontext if tiny else autocast)
    if stage == "base":
        return expert.requires_grad_(True)
    if base := stage_weights(args, "base"):
        common.restore_state(expert, base, source="stage base")
    from peft import LoraConfig
    expert.requires_grad_(False).transformer.add_adapter(LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=args.lora_targets.split(",")))
    for p in expert.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return expert


# ---- objective ------------------------------------------------------------------------------------------

def shift_sigma(u, shift):
    """Wan's schedule: u in [0, 1] -> sigma = shift u / (1 + (shift - 1) u); shift > 1 favors high noise."""
    return shift * u / (1 + (shift - 1) * u)


def high_share(shift):
    """The share of the schedule in which sigma is at least BOUNDARY."""
    return 1 - BOUNDARY / (shift - (shift - 1) * BOUNDARY)


def draw_sigma(u, stage, shift):
    """Uniform u B in [0, 1) -> sigma B of the schedule, within the noise levels of the stage's expert."""
    edge = 1 - high_share(shift)
    low, high = {"high": (edge, 1), "low": (0, edge), "base": (0, 1)}[stage]
    return shift_sigma(low + (high - low) * u, shift)


def add_noise(z, noise, sigma):
    """x_sigma = (1 - sigma) z + sigma eps; the velocity to learn is eps - z."""
    return torch.lerp(z, noise, expand_to(sigma, z))


# ---- sampler and forecasts ------------------------------------------------------------------------------

def integrate(velocity, x, steps, shift):
    """Integrates from noise x at sigma 1 to data at sigma 0 in `steps` calls of velocity(x, t), with the time
    grid and the solver (UniPC) of WanImageToVideoPipeline."""
    from diffusers import UniPCMultistepScheduler
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                        flow_shift=shift)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t.item()), t, x, return_dict=False)[0]
    return x


def seeded_noise(like, seeds):
    """Normal noise in the shape of `like`. Each sample's noise depends on its seed, a tuple of integers, and
    not on batch or device."""
    noise = []
    for seed in seeds:
        mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
        noise.append(torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(mixed)))
    return torch.stack(noise).to(like.device)


class Forecaster:
    """n_in frames -> the next n_out frames, by adapter, VAE and the networks {stage: module} of a mode."""
    def __init__(self, args, adapter, vae, networks):
        self.args, self.adapter, self.vae, self.networks = args, adapter, vae, networks
        self.device = adapter.map.mid.device

    @torch.no_grad()
    def encode(self, fields):
        """Windows B T C H W -> latents B 16 F h w, condition B 20 F h w."""
        video = self.adapter.to_video(fields)
        return common.wan_encode(self.vae, video), condition(self.vae, video[:, 0], video.shape[1])

    def decode(self, z):
        """Latents -> mapped fields of the last n_out frames, before repair."""
        return self.adapter.to_mapped(common.wan_decode(self.vae, z))[:, -self.args.n_out:]

    @torch.no_grad()
    def sample_latents(self, cond, noise, text):
        """cond B 20 F h w, noise B 16 F h w, text B L D -> latents B 16 F h w."""
        def velocity(x, t):                      # of the expert that WanImageToVideoPipeline selects
            side, other = ("high", "low") if t >= 1000 * BOUNDARY else ("low", "high")
            if self.args.offload:
                self.networks[other].to("cpu")
                self.networks[side].to(self.device)
            return self.networks[side].velocity(x, cond, torch.full((len(x),), t, device=x.device), text)

        z = integrate(velocity, noise, self.args.num_inference_steps, self.args.shift)
        z[:, :, 0] = cond[:, 4:, 0]              # the latents of the input frame are known
        return z

    def forecast_window(self, split, number):
        """Mapped forecast of a window before repair, n_out C H W, on the CPU; `number` seeds its noise."""
        fields, text = split.fields([number]), split.text([split.rows[number]], self.device)
        z, cond = self.encode(fields.to(self.device))
        noise = seeded_noise(z, [(self.args.seed, number)])
        return self.decode(self.sample_latents(cond, noise, text))[0].cpu()

    @torch.no_grad()
    def predict(self, history, text=None, seeds=None):
        """history B n_in C H W in physical units, text B L D, seeds B tuples -> B n_out C H W."""
        args, field_map, first = self.args, self.adapter.map, history[:, :1]
        z, cond = self.encode(torch.cat([history, history[:, -1:].expand(-1, args.n_out, -1, -1, -1)], 1))
        if args.mode == "convlstm":
            z = self.networks["convlstm"].extend(z, self.adapter.latent_frames(args.n_in))
        if args.mode == "native":
            z = self.sample_latents(cond, seeded_noise(z, seeds), text)
        y = self.decode(z)                       # persistence in --mode adapter
        if "decoder" in self.networks:
            frames = [field_map(history[:, -1:], first)[:, 0]]
            for t in range(args.n_out):
                forecast = None if args.mode == "unet" else y[:, t]
                lead = torch.full((len(y),), t + 1, device=self.device)
                frames.append(self.networks["decoder"].repair(forecast, frames[-1], lead))
            y = torch.stack(frames[1:], dim=1)
        return field_map.inverse(y, first)


def rollout(model, history, steps, seeds, members=1, text=None):
    """Autoregressive forecast: each call takes the last N frames, predictions included. history B N C H W,
    seeds: a tuple per window, text B L D -> B S T C H W, T = steps, S = members."""
    B, N = history.shape[:2]
    frames = history.repeat_interleave(members, dim=0)
    text = None if text is None else text.repeat_interleave(members, dim=0)
    call = 0
    while frames.shape[1] < N + steps:
        noise_seeds = [(*seed, member, call) for seed in seeds for member in range(members)]
        frames = torch.cat([frames, model.predict(frames[:, -N:], text, noise_seeds)], dim=1)
        call += 1
    return frames[:, N:N + steps].unflatten(0, (B, members))


# ---- data set -------------------------------------------------------------------------------------------

def encode_prompts(args, run, data):
    """Encodes the prompts of all splits, for --mode native. The encoder (11 GB) is freed afterwards."""
    parts = [load_part(args, part, run.device) for part in ("tokenizer", "text_encoder")]
    prompts = sorted({windows.prompt(i, k) for windows in data.values()
                      for i, file in enumerate(windows.files) for k in range(file.trajectories)})
    texts = [text.cpu() for text in common.encode_text(*parts, prompts, args.text_length)]
    if max(map(len, texts)) >= args.text_length:
        raise UserError(f"--text_length {args.text_length}: a prompt has as many tokens or more")
    for windows in data.values():
        windows.texts = dict(zip(prompts, texts))


# ---- evaluate and sample --------------------------------------------------------------------------------

def vrmse(prediction, truth):
    """... C H W in physical units -> ... C, as the_well.benchmark.metrics.VRMSE: over the spatial axes, with
    the unbiased variance and 1e-7 under the root. The spatial mean of n cells scores sqrt((n - 1) / n)."""
    error = (prediction - truth).square().mean((-2, -1))
    return (error / (truth.std((-2, -1)) ** 2 + 1e-7)).sqrt()


@torch.no_grad()
def forecast_scores(args, run, model, test, starts, steps):
    """Forecasts of `steps` frames from starts [(file, trajectory, first target)] -> {method: VRMSE N T C} on
    all ranks, which divide the starts. "model" is the mean of --members samples."""
    tables, past = {}, max(args.n_in, 2)
    members = args.members if args.mode == "native" else 1
    share = list(range(run.rank, len(starts), run.world))
    for k in range(0, len(share), 8):
        numbers = share[k:k + 8]
        batch = [starts[n] for n in numbers]
        frames = torch.stack([read_window(test.files[i], trajectory, first - past, past + steps)
                              for i, trajectory, first in batch]).to(run.device)
        history, truth = frames[:, past - args.n_in:past], frames[:, past:]
        forecast = functools.partial(rollout, model, history, steps, [(args.seed, n) for n in numbers],
                                     members, test.text(batch, run.device))
        samples = forecast()
        last, change = frames[:, past - 1:past], frames[:, past - 1:past] - frames[:, past - 2:past - 1]
        lead = torch.arange(1, steps + 1, device=run.device).view(-1, 1, 1, 1)
        methods = {"model": samples.mean(1), "persistence": last.expand_as(truth),
                   "spatial mean": truth.mean((-2, -1), keepdim=True).expand_as(truth),
                   "linear extrapolation": last + lead * change}
        if members > 1:
            methods["single sample"] = samples[:, 0]
        if args.mode == "native":
            experts = [model.networks[side].transformer for side in TRANSFORMERS]
            for dit in experts:
                dit.disable_adapters()
            methods["base without LoRA"] = forecast().mean(1)
            for dit in experts:
                dit.enable_adapters()
        if steps == args.n_out:                  # the truth through adapter and VAE
            window = frames[:, past - args.n_in:]
            y = model.decode(model.encode(window)[0])
            methods["reconstruction"] = model.adapter.map.inverse(y, window[:, :1])
        for name, prediction in methods.items():
            tables.setdefault(name, []).extend(zip(numbers, vrmse(prediction, truth).cpu()))
    return {name: torch.stack([row for _, row in sorted(rows, key=lambda row: row[0])])
            for name, rows in common.gather_rows(tables).items()}


def summarize(short, long, names):
    """VRMSE of windows N T C and of rollouts N T' C (or None) -> {metric: number}. "6:12" means steps 6
    to 12, counted from 1."""
    metrics = {"one_step": short[:, 0].mean().item(), "all_steps": short.mean().item(),
               **common.horizon_means([{"vrmse": short.mean(2)}])}
    metrics |= {f"one_step_{name}": short[:, 0, c].mean().item() for c, name in enumerate(names)}
    if long is not None:
        metrics |= common.horizon_means([{"rollout_vrmse": long.mean(2)}])
        metrics |= {f"rollout_{first}:{last}": long[:, first - 1:last].mean().item()
                    for first, last in ((6, 12), (13, 30)) if long.shape[1] >= last}
    return metrics


def held_out_windows(args, test):
    """-> {name: (file, trajectory, first target)} of --eval_clips windows."""
    past = max(args.n_in, 2)                     # linear extrapolation needs two frames
    return {f"{test.files[i].path.stem}_{k}_{start + past}": (i, k, start + past)
            for i, k, start in list_windows(test.files, past + args.n_out, args.eval_clips)}


def evaluate(args, run, model, test):
    """VRMSE of windows and rollouts of the test split -> [eval.json, curves.png] on rank 0."""
    began, first = time.time(), max(FIRST_TARGET, args.n_in)
    windows = held_out_windows(args, test)
    short = forecast_scores(args, run, model, test, list(windows.values()), args.n_out)
    starts = [(i, k, first) for i, file in enumerate(test.files) for k in range(file.trajectories)]
    steps = min(args.rollout_frames, min(file.steps for file in test.files) - first)
    long = forecast_scores(args, run, model, test, starts, steps) if steps > 0 else {}
    if run.rank:
        return []
    rows = {name: summarize(table, long.get(name), test.names) for name, table in short.items()}
    columns = ["one_step", "all_steps", "rollout_6:12", "rollout_13:30"]
    print(f"VRMSE of held-out windows (all_steps: 1 to {args.n_out}) and of rollouts from frame {first - 1}")
    clips = dict(zip(windows, short["model"][:, 0].mean(1).tolist()))
    files = common.report(
        SCRIPT, args, None, began, ("one_step", "persistence", True), rows.pop("model"), rows,
        columns + [f"one_step_{name}" for name in test.names], clips, ("vrmse", "rollout_vrmse"),
        [folder for _, folder, _, _ in stage_plan(args)])
    if test.files[0].dataset == DATASET:
        common.print_table({f"{name}, published": row for name, row in PUBLISHED.items()}, columns)
        print("published: from 4 input frames, on the test split of the 128 x 384 data set")
    return files


def pictures(forecast, truth):
    """A field, T H W -> {row: ColoredVideo}. The color range is that of the truth, symmetric if it has both
    signs; that of errors is half as wide. Values are in the data set's units, which it does not name."""
    low, high = (float(np.percentile(truth.numpy(), percent)) for percent in (0.1, 99.9))
    cmap = "viridis"
    if low < 0 < high:
        low, high, cmap = -max(-low, high), max(-low, high), "RdBu_r"
    return {"ground truth": common.apply_colormap(truth, low, high, "", cmap),
            "prediction": common.apply_colormap(forecast, low, high, "", cmap),
            "error": common.apply_colormap((forecast - truth).abs(), 0.0, (high - low) / 2, "", "magma")}


@torch.no_grad()
def sample(args, run, model, test):
    """One sample of the best, median and worst held-out window -> [samples/<case>_<window>.*]."""
    files, windows = [], held_out_windows(args, test)
    for case, number in common.pick_cases(args.output_dir, list(windows), args.num_samples).items():
        name, (i, k, first) = list(windows.items())[number]
        steps = min(args.sample_frames, test.files[i].steps - first)
        truth = read_window(test.files[i], k, first - args.n_in, args.n_in + steps)
        history = truth[None, :args.n_in].to(run.device)
        forecast = rollout(model, history, steps, [(args.seed, number)], 1, test.text([(i, k)], run.device))
        forecast = torch.cat([history[0], forecast[0, 0]]).cpu()
        panels = {field: pictures(forecast[:, c], truth[:, c]) for c, field in enumerate(test.names)}
        stem = Path(args.output_dir, "samples", f"{case}_{name}")
        files += common.write_panels(stem, panels, args.n_in, 8, max(1, round(192 / truth.shape[-1])))
        np.save(f"{stem}.npy", forecast[args.n_in:].numpy())     # physical units, T C H W
        files.append(f"{stem}.npy")
    return files


# ---- set-up and parallel wrap ---------------------------------------------------------------------------

def setup(args):
    """Initializes the process group, chooses device and dtype -> rank, world, device, dtype, autocast."""
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


def wrap(module, args, run):
    """FSDP2 for the experts with --fsdp, one unit per block; otherwise DDP under torchrun."""
    blocks = module.transformer.blocks if isinstance(module, Expert) else []
    if blocks and args.grad_checkpoint:
        module.transformer.enable_gradient_checkpointing()
    if blocks and args.compile:
        for block in blocks:
            block.compile()
    if blocks and args.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        shard = functools.partial(
            fully_shard, mesh=init_device_mesh(run.device.type, (run.world,)), reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32))
        for block in blocks:
            shard(block)
        return shard(module)                     # reshards, so that no EMA weights remain after validation
    if run.world == 1:
        return module
    ids = [run.device] if run.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=ids, forward_sync_buffers=False)


# ---- train ----------------------------------------------------------------------------------------------

def get_lr(step, peak, warmup, total):
    """Learning rate of a step, counted from 0: linear warm-up, then cosine decay to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


STAGES = ("adapter", "base", "high", "low", "decoder", "convlstm")


def train(args, run, stage, folder, steps, lr, checkpoint):
    """Trains the unfrozen parameters of a Stage's module up to `steps`, resuming from `checkpoint`. The last
    step is then saved in <folder>/ckpt, and the module has the EMA weights."""
    net = wrap(stage.module, args, run)
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)
    ema = common.EMA(params, args.ema_decay)
    start = common.load_run(checkpoint, net, optimizer, ema, trained_only=True)
    log = common.open_log(SCRIPT, folder.relative_to(args.output_dir), args, start, steps)
    should_stop = common.install_sigterm_handler()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, lr, args.warmup_steps, steps)
        net.train()
        seed = common.seed_all(args.seed, STAGES.index(stage.name), step)
        for micro in range(args.grad_accum):     # processes average gradients at the last micro-step only
            values = common.sample_global_batch(stage.spec, seed, args.batch_size, run.rank, run.world, micro,
                                                args.grad_accum, run.device)
            net.require_backward_grad_sync = micro == args.grad_accum - 1          # read by DDP
            loss, terms = stage.loss(net, values)
            (loss / args.grad_accum).backward()
            log.add(loss=loss, **terms)
        norm = nn.utils.clip_grad_norm_(params, args.grad_clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        completed = step + 1
        stop = should_stop()
        save = stop or completed == steps or args.save_every and completed % args.save_every == 0
        if (save or args.log_every and completed % args.log_every == 0) and not norm.isfinite():
            raise UserError(f"loss or gradient is not finite at step {completed}: resume from "
                            f"{common.latest_checkpoint(folder / 'ckpt') or 'the start'} with a lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        log.step(completed, lr=optimizer.param_groups[0]["lr"], grad_norm=norm)
        if save:                                 # before validation, whose errors then lose no training
            common.save_run(folder, SCRIPT, completed, net, optimizer, ema, args, args.keep_last, True)
        if stop:
            raise UserError(f"stopped by SIGTERM after step {completed} (saved): the same command resumes")
        if args.eval_every and (completed % args.eval_every == 0 or completed == steps):
            with ema.applied(), torch.no_grad():
                log.row(completed, **stage.validate(net.eval()))
            log.restart_clock()
    common.remove_sigterm_handler()
    log.bar.close()
    ema.copy_to_params()


# ---- stages ---------------------------------------------------------------------------------------------

def stage_plan(args):
    """-> [(stage, folder in output_dir, steps, peak learning rate)]; the last stage's folder is output_dir.
    In --mode native --max_steps is divided between the experts by their shares of Wan's noise schedule."""
    high = round(args.max_steps * high_share(args.shift))
    steps = {"adapter": args.adapter_steps, "base": args.base_steps, "high": max(1, high),
             "low": max(1, args.max_steps - high), "decoder": args.decoder_steps}
    rates = {"base": args.base_lr, "adapter": args.adapter_lr or args.lr,
             "decoder": args.adapter_lr or args.lr}
    stages = ["adapter"] if args.adapter == "learned" and args.mode in ("native", "convlstm") else []
    if args.mode == "native":
        stages += ["base"] if args.model == "tiny" else []
        stages += ["high", "low", "decoder"]
    else:
        stages.append("decoder" if args.mode == "unet" else args.mode)
        steps[stages[-1]], rates[stages[-1]] = args.max_steps, args.lr
    stages = [stage for stage in stages if steps[stage]]
    return [(stage, "." if stage == stages[-1] else stage, steps[stage], rates.get(stage, args.lr))
            for stage in stages]


def make_adapter(args, names, grid):
    """The adapter before fit(). UserError for video sizes that VAE and experts cannot take."""
    panel = args.video_size.split(",") if args.video_size else grid
    if len(panel) != 2 or not all(str(n).isdigit() and int(n) > 0 and int(n) % 16 == 0 for n in panel):
        raise UserError(f"video frames must be multiples of 16, not {','.join(map(str, panel))}: give "
                        f"--video_size H,W")
    panel = int(panel[0]), int(panel[1])
    if args.adapter == "tile":
        return TileAdapter(names, grid, panel, args.frame_repeat)
    return LearnedAdapter(names, grid, panel, args.frame_repeat, args.width)


def fit_adapter(args, train_set):
    """Writes adapter/: the adapter before training and, for tiny runs, a linear codec that replaces the VAE,
    both fitted to 40 to 79 windows (fewer if the training set has fewer)."""
    folder = Path(args.output_dir, "adapter")
    if (folder / "adapter.safetensors").is_file():
        return
    torch.manual_seed(args.seed)
    adapter = make_adapter(args, train_set.names, train_set.grid)
    fields = train_set.fields(range(0, len(train_set.rows), max(1, len(train_set.rows) // 40)))
    adapter.fit(fields)
    common.write_json(folder / "adapter.json", {
        "names": train_set.names, "grid": train_set.grid, "periodic": train_set.periodic})
    if args.model == "tiny":
        with torch.no_grad():
            codec = common.LinearCodec.fit(adapter.to_video(fields), TINY["transformer"]["out_channels"])
        common.save_weights(folder / "codec.safetensors", codec.tensors)
    common.save_weights(folder / "adapter.safetensors", adapter.state_dict())      # last: folder is complete


def stage_weights(args, stage, checkpoint=None):
    """EMA weights of a stage's newest checkpoint, or for the last stage of `checkpoint`; None without any."""
    folder = {name: folder for name, folder, *_ in stage_plan(args)}.get(stage)
    if folder != "." or checkpoint is None:
        checkpoint = folder and common.find_checkpoint(Path(args.output_dir, folder, "ckpt"), SCRIPT, "auto")
    return checkpoint.state["ema"] if checkpoint else None


def load_adapter(args, device, checkpoint=None):
    """-> the adapter as trained so far, its VAE, both frozen, and which axes are periodic."""
    folder = Path(args.output_dir, "adapter")
    meta = common.read_json(folder / "adapter.json")
    adapter = make_adapter(args, meta["names"], meta["grid"])
    state = stage_weights(args, "adapter", checkpoint) or common.load_weights(folder / "adapter.safetensors")
    adapter = common.load_for_inference(adapter, state, folder, device)
    if args.model == "tiny":
        vae = common.LinearCodec(common.load_weights(folder / "codec.safetensors"), device)
    else:
        vae = load_part(args, "vae", device).requires_grad_(False)
    return adapter, vae, meta["periodic"]


def make_network(args, run, stage, adapter, vae, periodic):
    """-> the network that a stage trains, untrained, and further arguments of its forward."""
    C = len(adapter.names)
    if stage == "adapter":
        return adapter.requires_grad_(True), (vae,)
    if stage == "convlstm":
        return ConvLSTM(vae.config.z_dim).to(run.device), (adapter, vae, adapter.latent_frames(args.n_in))
    if stage == "decoder":
        return Decoder(C, args.width, periodic, run.autocast).to(run.device), (adapter.map,)
    return load_expert(args, stage, run.device, run.autocast), ()


def load_forecaster(args, run, before=None, checkpoint=None):
    """-> Forecaster of a run's stages, or of those before `before`. checkpoint: as in stage_weights."""
    parts, networks = load_adapter(args, run.device, checkpoint), {}
    for stage, *_ in stage_plan(args):
        if stage == before:
            break
        if stage not in ("adapter", "base"):
            networks[stage], _ = make_network(args, run, stage, *parts)
            common.restore_state(networks[stage], stage_weights(args, stage, checkpoint),
                                 source=f"stage {stage}", trained_only=True)
            networks[stage].eval().requires_grad_(False).to("cpu" if args.offload else run.device)
    return Forecaster(args, *parts[:2], networks)


def load_model(folder: str, device: str = "cpu") -> Forecaster:
    """The Forecaster of a finished run, with EMA weights."""
    args, _, _ = parse_args(["--eval", "--output_dir", str(folder), "--device", device])
    return load_forecaster(args, setup(args))


@torch.no_grad()
def predict_fields(model: Forecaster, history: torch.Tensor, prompt: str, seed: int = 0) -> torch.Tensor:
    """history n_in C H W in physical units, channels as in the training set, prompt such as "turbulent
    radiative layer 2D, tcool 0.1" -> the next frames n_out C H W."""
    args = model.args
    parts = [load_part(args, part, model.device) for part in ("tokenizer", "text_encoder")]
    text = common.pad_text(common.encode_text(*parts, [prompt], args.text_length), args.text_length)
    return model.predict(history[None].to(model.device), text, [(seed,)])[0]


class Stage:
    """The network that a stage trains, and its inputs, made of windows and random values."""
    def __init__(self, args, run, name, data):
        self.args, self.run, self.name, self.data = args, run, name, data
        adapter, vae, periodic = load_adapter(args, run.device)
        self.module, self.context = make_network(args, run, name, adapter, vae, periodic)
        self.model = Forecaster(args, adapter, vae, {})
        if name == "decoder":
            self.model = load_forecaster(args, run, before=name)
        self.forecast = functools.lru_cache(2048)(self.model.forecast_window)  # earlier stages are frozen
        self.spec = {"window": ("randint", len(data["train"].rows)), "shift": ("rand",), "u": ("rand",),
                     "noise": ("randn", *latent_shape(args, adapter))}

    def inputs(self, split, numbers, values, shifts=None):
        """-> arguments of the module's forward."""
        model, n_out = self.model, self.args.n_out
        fields = split.fields(numbers, shifts).to(self.run.device)
        if self.name in ("adapter", "convlstm"):
            return fields, *self.context
        if self.name != "decoder":
            text = split.text([split.rows[n] for n in numbers], self.run.device)
            sigma = draw_sigma(values["u"], self.name, self.args.shift)
            return *model.encode(fields), text, sigma, values["noise"]
        mapped, y = model.adapter.map(fields, fields[:, :1])[:, -n_out - 1:], None
        if self.args.mode == "native":
            y = split.roll(torch.stack([self.forecast(split, n) for n in numbers]), shifts).to(model.device)
        # The decoder unrolls up to three frames, one pass each, from a random true frame.
        unroll = min(3, n_out)
        lead = 1 + (values["u"] * (n_out - unroll + 1)).long().clamp(max=n_out - unroll)
        steps = lead[:, None] + torch.arange(unroll, device=lead.device)
        take = lambda x, index: torch.take_along_dim(x, expand_to(index, x), 1)
        return (y if y is None else take(y, steps - 1), take(mapped, lead[:, None] - 1)[:, 0], lead,
                take(mapped, steps), *self.context)

    def loss(self, net, values):
        return net(*self.inputs(self.data["train"], values["window"].tolist(), values, values["shift"]))

    def validate(self, net):
        """Mean loss and its terms, for the same windows, noise levels and noise at every call."""
        valid, means = self.data["valid"], {}
        random_values = common.sample_global_batch(self.spec, 0, len(valid.rows), device=self.run.device)
        for numbers in torch.arange(len(valid.rows)).split(self.args.batch_size):
            values = {name: value[numbers[0]:numbers[-1] + 1] for name, value in random_values.items()}
            loss, terms = net(*self.inputs(valid, numbers.tolist(), values))
            for name, value in {"loss": loss, **terms}.items():
                means[name] = means.get(name, 0) + value.item() * len(numbers) / len(valid.rows)
        return {f"val_{name}": value for name, value in means.items()}


def latent_shape(args, adapter):
    """Shape of the latents of a window: 16, F, h, w."""
    height, width = adapter.video_size
    return 16, adapter.latent_frames(args.n_in + args.n_out), height // 8, width // 8


def train_stages(args, run, data, checkpoint):
    """Trains the incomplete stages in order, with one trained network in memory at a time."""
    root, resume = Path(args.output_dir), "none" if args.resume == "none" else "auto"
    if run.rank == 0:
        common.write_json(root / "args.json", {**vars(args), **common.provenance()})
        fit_adapter(args, data["train"])
    common.barrier()
    for name, folder, steps, lr in stage_plan(args):
        stage_checkpoint = checkpoint
        if folder != ".":
            stage_checkpoint = common.find_checkpoint(root / folder / "ckpt", SCRIPT, resume)
        complete = stage_checkpoint and stage_checkpoint.meta["step"] >= steps
        if complete and (name not in TRANSFORMERS or any((root / "final" / name).glob("*.safetensors"))):
            continue
        torch.manual_seed(args.seed)             # equal initial weights on all processes and after a restart
        stage = Stage(args, run, name, data)
        train(args, run, stage, root / folder, steps, lr, stage_checkpoint)
        weights, _ = common.gather_state(stage.module, trained_only=True)
        if run.rank == 0 and name in TRANSFORMERS:           # files that diffusers' pipelines load
            common.save_lora(root / "final" / name, stage.module.transformer, {
                key.removeprefix("transformer."): value for key, value in weights.items()})
        del stage
        gc.collect()                             # expert and peft refer to each other


# ---- main -----------------------------------------------------------------------------------------------

def dry_run(args):
    """Prints parameters, FLOPs and memory of each stage for four fields on 128 x 384 (tiny: 32 x 96), on the
    meta device: no data, no allocation."""
    B, tiny, world = args.batch_size, args.model == "tiny", int(os.environ.get("WORLD_SIZE", 1))
    args = argparse.Namespace(**{**vars(args), "random_init": True, "output_dir": os.devnull})
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=not tiny)
    run = argparse.Namespace(device="meta", autocast=autocast)
    with torch.device("meta"):
        grid = (32, 96) if tiny else (128, 384)
        adapter = make_adapter(args, ["density", "pressure", "velocity_x", "velocity_y"], grid)
        vae = None if tiny else load_part(args, "vae", "meta").requires_grad_(False)
        fields, shape = torch.randn(B, args.n_in + args.n_out, 4, *grid), latent_shape(args, adapter)
        for stage, *_ in stage_plan(args):
            if tiny and stage in ("adapter", "convlstm"):
                print(f"stage {stage}: no estimate, since tiny's codec is fitted to data")
                continue
            module, context = make_network(args, run, stage, adapter, vae, (True, False))
            inputs, tokens = (fields, *context), 0
            if stage == "decoder":
                inputs = fields[:, 1:3], fields[:, 0], torch.ones(B), fields[:, 1:3], *context
            if isinstance(module, Expert):
                tokens, z = math.prod(shape[1:]) // 4, torch.randn(B, *shape)
                text = torch.randn(B, args.text_length, module.transformer.config.text_dim)
                inputs = z, torch.randn(B, shape[0] + 4, *shape[1:]), text, torch.rand(B), z
                if args.grad_checkpoint:
                    module.transformer.enable_gradient_checkpointing()
            parts = nn.ModuleList([module, *(part for part in context if isinstance(part, nn.Module))])
            print(common.dry_run_report(f"stage {stage}", parts, lambda: module(*inputs)[0], B, tokens, world,
                                        args.fsdp and tokens > 0))


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
    model = load_forecaster(args, run, checkpoint=checkpoint if inference_only else None)
    files = evaluate(args, run, model, data["test"]) if common.wants_evaluation(args) else []
    if run.rank == 0:
        if args.sample or not inference_only:
            files += sample(args, run, model, data["test"])
        common.show_results(args.output_dir, files, args.tensorboard, args.wandb)
    common.shutdown()


def main(argv=None):
    return common.one_line_errors(f"{SCRIPT}.py", lambda: run_script(argv))


if __name__ == "__main__":
    sys.exit(main())
