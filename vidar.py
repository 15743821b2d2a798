"""vidar.py: a video model imagines how a robot does what it is told, a second model reads the joints off it.

Papers      Vidar (arXiv:2507.12898), stage 1 of Vidarc (arXiv:2512.17661); masks and random poses: AnyPos
            (arXiv:2507.12768); Wan2.2-TI2V-5B (arXiv:2503.20314).
Equations   Eq. 1  x_t = t x_1 + (1 - t) x_0,  |v - (x_0 - x_1)|^2         -> add_noise, flow_loss
            The document's x_1 is data z, its x_0 noise eps, its t runs to the data. Wan's clock runs the
            other way: sigma = 1 - t, x = (1 - sigma) z + sigma eps, the network is told 1000 sigma. The
            target eps - z is then dx/dsigma, and MINUS dx/dt: same numbers, and sampling goes down in sigma.
            Eq. 4  Huber(a' - a) + lambda |m|_1                            -> IDM, idm_loss
            Eq. 7  |(1 + eta U) (v - (x_0 - x_1))|^2, U the IDM's soft mask -> flow_loss, arm_to_latent
            first latent frame: clean, t = 0 for its tokens, no loss       -> add_noise, run_backbone
            UniPC of order 2 from noise to video, shift 5                  -> generate
Differs     from upstream's training and inference code, and why:
            - the clock is Wan's; upstream feeds t in [0, 1], which is reversed and unscaled
            - the image is given: upstream's stage 1 noises all frames, so it trains text to video
            - windows run at 10 fps; upstream spreads 81 indices over a whole episode, of any length
            - padding is out of the loss; gradients are reduced in fp32 and clipped; micro-batches differ
            - weights load strictly; upstream ignores every name that does not fit
            - a timestep per frame instead of per token: equal, with 460 times less to keep
Run         python vidar.py                                   # world, IDM, video model: 7 to 10 min, 2.0 GB
            python vidar.py --sample --num_samples 3              # 11 s
            python vidar.py --eval --candidates 4                 # 34 s to 1 min
            torchrun --nproc_per_node=2 vidar.py --preset 2xh200 --data_dir data/robotwin
            torchrun --nproc_per_node=8 vidar.py --preset 8xh100 --data_dir data/robotwin --stage idm
            torchrun --nproc_per_node=8 vidar.py --preset 8xh100 --data_dir data/robotwin --idm idm.pt --eta 3
            python vidar.py --preset debug --max_steps 100 --lora_rank 32
            python vidar.py --preset 8xh100 --dry_run
Shapes      B batch  T frames  F = (T - 1) / 4 + 1 latent frames  C latent channels  H W pixels  h w latent
            grid  N = F h/2 w/2 tokens  D width  L text tokens  K candidates. Videos are B T 3 H W in [-1, 1],
            for metrics and the IDM in [0, 1]; actions T 14 are absolute joint targets in radians.
"""
import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import h5py
import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common
from common import UserError, expand_to, from_uint8, to_uint8

SCRIPT = "vidar"
FPS = 10                                 # of windows, whatever the files have
ACTION_DIM = 14                          # 0-5 left joints, 6 left gripper, 7-12 right joints, 13 its gripper
GRIPPERS = (6, 13)
JOINT_TOLERANCE, GRIPPER_TOLERANCE = 0.05, 0.5      # radians and openings within which an action is right
IMAGENET_MEAN, IMAGENET_STD = (.485, .456, .406), (.229, .224, .225)
EFFECTIVE_BATCH = 128                    # the document's Table 5
IDM_CHUNK = 32                           # frames that the IDM reads at once
FIRST_WORLD = 1_000_000                  # seeds of the worlds that are acted in; training's begin at 0

# ---- args -----------------------------------------------------------------------------------------------

PAPER = dict(stage="video", data_dir="data/robotwin", max_steps=14000, lr=2e-5, warmup_steps=200,
             weight_decay=.1, grad_checkpoint=True, fsdp=True, save_every=500, eval_every=500)
PRESETS = {
    # lambda .06: with the document's .003 the mask closes later than two cores wait for. Few sampling steps:
    # a small model's mean of the futures is nearer to each than a sharp one of them.
    "tiny": dict(
        model="tiny", stage="all", data_dir="data/vidar", size="112,96", frames=33, prompt_views="none",
        windows=3, text_length=64, batch_size=2, any_batch=True, max_steps=1650, lr=3e-3, warmup_steps=50,
        weight_decay=.01, ema_decay=.99, beta2=.98, eta=3., shift=8.0, steps=2, cfg=1., idm_steps=1850,
        idm_lr=3e-3, idm_batch_size=32, idm_frames=12, idm_decoded=True, idm_jitter=0.,
        mask_steps="850,1100", mask_weight=.06, cfg_drop=0., eval_every=500, save_every=500, eval_clips=24,
        worlds=8),
    "2xh200": {**PAPER, "batch_size": 8, "grad_accum": 8},
    "8xh100": {**PAPER, "batch_size": 8, "grad_accum": 2},
    "64xh100": {**PAPER, "batch_size": 2, "grad_accum": 1},
    # The document's --debug: the same model on one GPU, to see that everything runs.
    "debug": {**PAPER, "fsdp": False, "batch_size": 1, "any_batch": True, "max_steps": 100, "ema_decay": 0.,
              "log_every": 1, "save_every": 0, "eval_every": 50},
}
MACHINES = {"2xh200": (2, 131.), "8xh100": (8, 74.5), "64xh100": (64, 74.5)}       # GPUs, GiB of each
TINY = {
    "transformer": {"num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 16, "out_channels": 16,
                    "text_dim": 32, "freq_dim": 64, "ffn_dim": 384, "num_layers": 4},
    "text_encoder": {"vocab_size": 259, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2,
                     "num_heads": 2},
}
# What the weights mean: a checkpoint's own values hold. What the cache is made of: other values make it anew.
MODEL_FLAGS = ("model", "stage", "lora_rank", "text_length", "size")
CACHE_FLAGS = ("model", "weights_from", "random_init", "size", "frames", "layout", "prompt_views", "windows",
               "text_length")
# What --preset auto looks for before it takes the second preset.
PAPER_NEEDS = dict(get_data="RoboTwin episodes, or --data_dir FOLDER")


def build_parser():
    parser = Parser(prog=f"{SCRIPT}.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_shared_flags(parser, PRESETS)
    add = parser.add_argument_group("data").add_argument
    add("--size", default="736,640", metavar="H,W", help="pixels of the mosaic, multiples of 32")
    add("--frames", type=int, default=81, help="of a window at 10 fps, 4k + 1")
    add("--layout", choices=list(LAYOUTS), default="480+240", help="rows of the head view and of the wrists'")
    add("--prompt_views", choices=["rear", "front", "high", "none"], default="rear",
        help="the head camera that the prompt's prefix names (none: no prefix)")
    add("--windows", type=int, default=4, help="cached windows of a training episode; their start varies")
    add("--sim_episodes", type=int, default=650, help="episodes of the simulated set")
    add("--sim_frames", type=int, default=37, help="frames of each")
    add("--sim_poses", type=int, default=9000, help="random poses beside them, for the IDM alone")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=["ti2v_5b", "tiny"], default="ti2v_5b", help="tiny: the same classes, small")
    add("--weights_from", default="Wan-AI/Wan2.2-TI2V-5B-Diffusers", metavar="FOLDER|HUB_ID",
        help="diffusers folder, hub id, or folder with the official files")
    add("--vidar", metavar="FILE", help="vidar.pt or vidarc.pt: weights to start from instead of Wan's")
    add("--idm", metavar="FILE", help="idm.pt, where --stage video is to have an IDM")
    add("--random_init", action="store_true", help="Wan's shape with random weights, to measure speed")
    add("--lora_rank", type=int, default=0, help="rank and alpha of adapters on a frozen DiT (0: train all)")
    add("--text_length", type=int, default=512, help="tokens of a prompt, zeros included")
    add = parser.add_argument_group("stages").add_argument
    add("--stage", choices=["idm", "video", "all"], default="video", help="what is trained; all: idm, video")
    add("--any_batch", action=argparse.BooleanOptionalAction, default=False,
        help=f"do not insist on {EFFECTIVE_BATCH} samples a step; --batch_size or --grad_accum imply it")
    add("--idm_steps", type=int, default=60000, help="of the IDM's training; a tenth is warm-up")
    add("--idm_lr", type=float, default=5e-4, help="likewise")
    add("--idm_batch_size", type=int, default=16, help="frames per process")
    add("--idm_frames", type=int, default=64, help="frames of a task's episode that it learns from")
    add("--idm_decoded", action=argparse.BooleanOptionalAction, default=False,
        help="it also learns from training episodes as the video codec shows them")
    add("--idm_jitter", type=float, default=.5, help="share of its pictures whose colours are changed")
    add("--mask_steps", default="0,0", metavar="A,B",
        help="of the IDM's training, in which its mask learns: open before A, still from B on (0: all)")
    add = parser.add_argument_group("loss").add_argument
    add("--eta", type=float, default=0., help="Eq. 7's weight of the arm; the document's 3 is for stage 2")
    add("--shift", type=float, default=5.0, help="of Wan's noise schedule")
    add("--cfg_drop", type=float, default=.1, help="share of samples without instruction")
    add("--mask_weight", type=float, default=3e-3, help="Eq. 4's lambda")
    add = parser.add_argument_group("sampling and evaluation").add_argument
    add("--steps", type=int, default=20, help="of UniPC; guidance doubles the network's calls")
    add("--cfg", type=float, default=5.0, help="guidance (1: none)")
    add("--candidates", type=int, default=1, help="videos of each, of which the most plausible is kept")
    add("--eval_clips", type=int, default=0, help="held-out episodes that --eval looks at (0: all)")
    add("--num_samples", type=int, default=3, help="held-out episodes to sample")
    add("--worlds", type=int, default=8, help="simulated worlds to act in, where the data are simulated")
    return parser


def video_size(args):
    H, W = map(int, args.size.split(","))
    return H, W


def check_args(args):
    """One clear line for values that no run can mean."""
    check_numbers(args, least_1=("windows", "text_length", "steps", "candidates", "num_samples",
                                 "sim_episodes", "sim_frames", "sim_poses", "idm_steps", "idm_batch_size",
                                 "idm_frames"),
                  least_0=("idm_lr", "eta", "lora_rank", "mask_weight", "worlds", "eval_clips"),
                  shares=("cfg_drop",))
    check_shape(args)
    if not re.fullmatch(r"\d+,\d+", args.mask_steps):
        raise UserError(f"--mask_steps takes A,B such as 1200,1360, not {args.mask_steps}")
    for name in ("vidar", "idm"):
        if getattr(args, name) and not Path(getattr(args, name)).is_file():
            raise UserError(f"--{name}: there is no file {getattr(args, name)}")
    if args.fsdp and args.lora_rank:
        raise UserError("--lora_rank trains on one GPU or under torchrun alone: leave --fsdp out")
    check_batch(args, lifted=args.stage == "idm")


def check_shape(args):
    """UserError for a --size or --frames that codec and patches do not divide."""
    side = 2 * codec_side(args)                                                       # Wan's patch is 2
    parts = args.size.split(",")
    if len(parts) != 2 or not all(part.isdigit() and int(part) and int(part) % side == 0 for part in parts):
        raise UserError(f"--size takes H,W in multiples of {side}, such as 736,640, not {args.size}")
    if args.frames < 5 or args.frames % 4 != 1:
        raise UserError(f"--frames must be 4k + 1, not {args.frames}: Wan's VAE packs fours after the first")


def check_batch(args, lifted=False):
    """UserError unless a step has the document's number of samples, or may have another."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    batch = args.batch_size * args.grad_accum * world
    lifted = lifted or args.any_batch or args.given & {"batch_size", "grad_accum"}
    if batch != EFFECTIVE_BATCH and not (lifted or args.dry_run or args.sample or args.eval):
        accum, rest = divmod(EFFECTIVE_BATCH, args.batch_size * world)
        advice = f"--grad_accum {accum} reaches it" if accum and not rest else "choose another --batch_size"
        raise UserError(f"preset {args.preset} is for {EFFECTIVE_BATCH} samples a step, {args.batch_size} x "
                        f"{args.grad_accum} x {world} processes make {batch}: {advice}, --any_batch lifts it")


# ---- model: the video model -----------------------------------------------------------------------------

def frame_block(block, hidden, text, modulation, rope):
    """WanTransformerBlock.forward with a modulation per frame, B F 6 D, that all tokens of a frame share.

    Equal to the block's own, which wants one per token: 9,660 of them are 0.7 GB in fp32, for each block."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
        block.scale_shift_table + modulation.float()).unsqueeze(3).unbind(2)            # B F 1 D each
    frames = lambda x: x.float().unflatten(1, (modulation.shape[1], -1))                # B F N/F D
    x = (frames(block.norm1(hidden.float())) * (1 + scale) + shift).flatten(1, 2).type_as(hidden)
    x = block.attn1(x, None, None, rope)
    hidden = (hidden.float() + (frames(x) * gate).flatten(1, 2)).type_as(hidden)
    hidden = hidden + block.attn2(block.norm2(hidden.float()).type_as(hidden), text, None, None)
    x = (frames(block.norm3(hidden.float())) * (1 + ffn_scale) + ffn_shift).flatten(1, 2).type_as(hidden)
    return (hidden.float() + (frames(block.ffn(x)) * ffn_gate).flatten(1, 2)).type_as(hidden)


def run_backbone(dit, x, t, text, checkpointing=False):
    """WanTransformer3DModel.forward with a timestep per frame. x B C F h w latents, t B F (0 to 1000), text
    B L D -> velocity B C F h w. Time is embedded in fp32: bf16 would round 987.3 to 988."""
    B, C, F_, h, w = x.shape
    pt, ph, pw = dit.config.patch_size
    rope = dit.rope(x)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        text = text.to(dit.condition_embedder.text_embedder.linear_1.weight.dtype)
        temb, modulation, text, _ = dit.condition_embedder(t.flatten(), text, None, timestep_seq_len=F_)
    hidden = dit.patch_embedding(x.to(dit.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
    hidden, text, modulation = hidden.contiguous(), text.type_as(hidden), modulation.unflatten(2, (6, -1))
    for block in dit.blocks:
        if checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(block, hidden, text, modulation, rope, use_reentrant=False)
        else:
            hidden = block(hidden, text, modulation, rope)
    shift, scale = (dit.scale_shift_table + temb.float().unsqueeze(2)).unsqueeze(3).unbind(2)
    x = dit.norm_out(hidden.float()).unflatten(1, (F_, -1)) * (1 + scale) + shift
    y = dit.proj_out(x.flatten(1, 2).type_as(hidden))
    y = y.reshape(B, F_ // pt, h // ph, w // pw, pt, ph, pw, -1)
    return y.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def add_noise(z, noise, sigma):
    """x_sigma = (1 - sigma) z + sigma eps, with latent frame 0, the image that is given, left clean.
    z, noise B C F h w, sigma B -> x, and sigma B F of every frame."""
    x = (1 - expand_to(sigma, z)) * z + expand_to(sigma, z) * noise
    frames = sigma[:, None].repeat(1, z.shape[2])
    frames[:, 0] = 0
    return torch.cat([z[:, :, :1], x[:, :, 1:]], dim=2), frames


class VideoModel(nn.Module):
    """The DiT and its loss in one module, so that DDP and FSDP see one forward."""
    def __init__(self, dit, args):
        super().__init__()
        self.dit, self.eta, self.checkpointing = dit, args.eta, args.grad_checkpoint
        for block in dit.blocks:
            block.forward = MethodType(frame_block, block)

    def forward(self, batch, noise, sigma):
        """batch: of Windows.get; noise B C F h w, sigma B -> loss, its parts."""
        z = batch["latents"]
        x, frames = add_noise(z, noise, sigma)
        v = run_backbone(self.dit, x, 1000 * frames, batch["text"], self.checkpointing)
        arm = batch["arm"][:, :, 1:] if self.eta else None
        return flow_loss(v[:, :, 1:], (noise - z)[:, :, 1:], batch["valid"][:, 1:], arm, self.eta)


# ---- model: inverse dynamics ----------------------------------------------------------------------------
# Names and shapes are those of idm.pt: 456 tensors, 92,713,423 parameters. `pool` is upstream's mean over the
# picture, which finds positions by depth at 518 pixels, or "flatten", which lets a small network keep them.
IDM_FULL = {"size": (518, 518), "mask_width": 64, "mask_levels": 5, "width": 64, "blocks": (3, 4, 6, 3),
            "pool": "mean"}
IDM_TINY = {"size": (112, 96), "mask_width": 4, "mask_levels": 3, "width": 16, "blocks": (1, 1, 1),
            "pool": "flatten"}


def double_conv(c_in, c_out, c_mid=None):
    """(3x3 convolution, batch norm, ReLU) twice, by way of c_mid channels."""
    layers = []
    for a, b in ((c_in, c_mid or c_out), (c_mid or c_out, c_out)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Up(nn.Module):
    """To the skip's size, beside the skip, double convolution.

    The size is read off each skip. Upstream keeps that of its first input, and then fails on any other."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = double_conv(c_in, c_out, c_in // 2)

    def forward(self, x, skip):
        x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=True)
        return self.conv(torch.cat([x, skip], dim=1))


class UNet(nn.Module):
    """B 3 H W -> B 1 H W logits. Channels double from `width` at each of `levels` halvings but the last."""
    def __init__(self, width, levels):
        super().__init__()
        c = [width * 2 ** min(i, levels - 1) for i in range(levels + 1)]
        self.in_conv = double_conv(3, width)
        self.downs = nn.Sequential(*(nn.Sequential(nn.MaxPool2d(2), double_conv(a, b))
                                     for a, b in zip(c, c[1:])))
        self.ups = nn.Sequential(*(Up(2 * a, max(a // 2, width)) for a in reversed(c[:-1])))
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        skips = [self.in_conv(x)]
        for down in self.downs:
            skips.append(down(skips[-1]))
        x = skips.pop()
        for up in self.ups:
            x = up(x, skips.pop())
        return self.out(x)


class Bottleneck(nn.Module):
    """ReLU(shortcut + 1x1, 3x3 with the stride, 1x1 to 4 c), each with batch norm; as in upstream, no ReLU
    after the first."""
    def __init__(self, c_in, c, stride):
        super().__init__()
        self.residual_function = nn.Sequential(
            nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c),
            nn.Conv2d(c, c, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True),
            nn.Conv2d(c, 4 * c, 1, bias=False), nn.BatchNorm2d(4 * c))
        self.shortcut = nn.Sequential()
        if c_in != 4 * c:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, 4 * c, 1, stride, bias=False),
                                          nn.BatchNorm2d(4 * c))

    def forward(self, x):
        return F.relu(self.residual_function(x) + self.shortcut(x))


class ResNet(nn.Sequential):
    """B 3 H W -> B ACTION_DIM. A stem of 1/4 resolution, then stages of bottlenecks that halve it but the
    first. With width 64 and blocks (3, 4, 6, 3) the shape of ResNet-50."""
    def __init__(self, width, blocks, pool, size):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width),
                                   nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))
        c_in = width
        for stage, count in enumerate(blocks):
            layers, c = [], width * 2 ** stage
            for i in range(count):
                layers.append(Bottleneck(c_in, c, 2 if stage and not i else 1))
                c_in = 4 * c
            self.add_module(f"conv{stage + 2}_x", nn.Sequential(*layers))
        cells = math.prod(math.ceil(side / 2 ** (len(blocks) + 1)) for side in size)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1) if pool == "mean" else nn.Identity(), nn.Flatten())
        self.fc = nn.Linear(c_in * (1 if pool == "mean" else cells), ACTION_DIM)


class MaskedResNet(nn.Module):
    """The regressor sees only what the mask lets through: the rest is 0, ImageNet's mean colour."""
    def __init__(self, config):
        super().__init__()
        self.mask_model = UNet(config["mask_width"], config["mask_levels"])
        self.resnet_model = ResNet(config["width"], config["blocks"], config["pool"], config["size"])


def at_size(frames, size):
    """n 3 H W -> n 3 h w, anti-aliased."""
    if frames.shape[-2:] == size:
        return frames
    return F.interpolate(frames, size, mode="bilinear", antialias=True, align_corners=False)


class IDM(nn.Module):
    """Which joint targets a picture shows, and where in it the arm is. One frame suffices: targets are
    absolute, and every joint is in view."""
    def __init__(self, config=IDM_FULL):
        super().__init__()
        self.size = tuple(config["size"])
        self.model = MaskedResNet(config)
        self.register_buffer("train_mean", torch.zeros(ACTION_DIM))
        self.register_buffer("train_std", torch.ones(ACTION_DIM))
        self.to(memory_format=torch.channels_last)                   # 1.6 times as fast on a CPU

    def set_statistics(self, actions):
        """actions: N 14, of the training episodes. A joint that never moves has a std of 0.01."""
        self.train_mean.copy_(actions.mean(0))
        self.train_std.copy_(actions.std(0).clamp(min=.01))

    def normalize(self, actions):
        return (actions - self.train_mean) / self.train_std

    def preprocess(self, frames):
        """B 3 H W in [0, 1] -> the network's input size, aspect not kept, in ImageNet's mean and std."""
        frames = at_size(frames, self.size)
        mean, std = (expand_to(frames.new_tensor(v), frames[0])[None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        return ((frames - mean) / std).contiguous(memory_format=torch.channels_last)

    def soft_mask(self, x):
        return (1 + torch.tanh(self.model.mask_model(x))) / 2

    def forward(self, frames, mask=None):
        """B 3 H W in [0, 1] -> actions B 14 in radians, soft mask B 1 h w in (0, 1) at the input size.

        Straight through: the picture is cut by the mask rounded to 0 or 1, gradients pass as if unrounded.
        mask: another one to cut by, instead of the network's own."""
        x = self.preprocess(frames)
        mask = self.soft_mask(x) if mask is None else mask
        hard = (mask >= .5).to(mask.dtype)
        y = self.model.resnet_model(x * (mask + (hard - mask).detach()))
        return y.float() * self.train_std + self.train_mean, mask

    @torch.no_grad()
    def arm(self, frames):
        """B 3 H W in [0, 1] -> soft mask B 1 h w: U of Eq. 7. In eval mode, as batch norm is."""
        return self.soft_mask(self.preprocess(frames))


def idm_loss(prediction, target, mask, lam):
    """Eq. 4: Huber of the normalised actions B 14, and lambda times the mean of the soft mask B 1 h w."""
    return F.smooth_l1_loss(prediction.float(), target.float()) + lam * mask.float().mean()


def r_squared(prediction, target):
    """N 14 twice -> 14: 1 where a joint is told exactly, 0 for its mean."""
    residual = (prediction - target).double().square().sum(0)
    return 1 - residual / (target - target.mean(0)).double().square().sum(0)


def idm_scores(prediction, target, mask=None, truth=None):
    """Actions N 14 in radians; soft masks N 1 h w and bool truth N H W, where there is one -> {name: number}.

    accuracy: the share of frames in which all joints are within 0.05 rad and both grippers within 0.5."""
    error = (prediction - target).abs()
    tolerance = torch.full((ACTION_DIM,), JOINT_TOLERANCE)
    tolerance[list(GRIPPERS)] = GRIPPER_TOLERANCE
    r2 = r_squared(prediction, target)
    scores = {"r2": r2.mean().item(), "r2_worst": r2.min().item(), "l1": error.mean().item(),
              "accuracy": (error < tolerance).all(1).float().mean().item()}
    if mask is not None:
        scores["mask_area"] = mask.mean().item()
    if truth is not None:
        seen = F.interpolate(mask, truth.shape[-2:], mode="bilinear", align_corners=False)[:, 0] >= .5
        scores["mask_iou"] = ((seen & truth).sum() / (seen | truth).sum()).item()
    return scores


def colour_jitter(frames, u, progress=0.):
    """Changes brightness, contrast, saturation and hue of frames B 3 H W in [0, 1] by u B 4 in [0, 1).

    The ranges are upstream's and widen with progress, 0 to 1. Hue is a turn around the grey axis of RGB,
    which for such angles is near HSV's and has no branches."""
    first = torch.tensor([[.8, 1.2], [.7, 1.3], [.5, 1.5], [-.05, .05]])
    last = torch.tensor([[.4, 1.6], [.7, 1.7], [.5, 2.], [-.1, .1]])
    low, high = torch.lerp(first, last, float(progress)).to(u).T
    brightness, contrast, saturation, hue = (low + (high - low) * u).T[..., None, None, None]
    weights = frames.new_tensor([.299, .587, .114]).view(1, 3, 1, 1)
    x = (frames * brightness).clamp(0, 1)
    level = (x * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    x = (level + (x - level) * contrast).clamp(0, 1)
    luma = (x * weights).sum(1, keepdim=True)
    x = (luma + (x - luma) * saturation).clamp(0, 1)
    grey, across = x.mean(1, keepdim=True), (x.roll(1, 1) - x.roll(-1, 1)) / math.sqrt(3)
    angle = 2 * math.pi * hue
    return (grey + (x - grey) * angle.cos() + across * angle.sin()).clamp(0, 1)


def arm_to_latent(mask, size):
    """Soft mask of every frame B T H W, T = 4k + 1 -> B 1 F h w on the latent grid, `size` = (h, w).

    Mean over a cell's pixels; latent 0 shows frame 0, latent k the largest of frames 4k - 3 to 4k."""
    mask = F.interpolate(mask, size, mode="area")
    later = mask[:, 1:].unflatten(1, (-1, 4)).amax(2)
    return torch.cat([mask[:, :1], later], dim=1)[:, None]


# ---- model: the IDM's weights ----------------------------------------------------------------------------

def load_idm(path, config=IDM_FULL):
    """idm.pt, its dict {"model_state_dict", ...} or a flat one, or .safetensors -> an IDM in eval mode.

    UserError, one line, where the file cannot be read or its names and shapes are not this config's."""
    if Path(path).suffix == ".safetensors":
        weights = common.load_weights(path)
    else:
        try:                                             # mapped: two thirds of idm.pt are Adam's moments
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            weights = weights.get("model_state_dict", weights)
        except Exception as error:                       # zip, pickle and OS raise their own
            raise UserError(f"cannot read the IDM {path}: {common.reason(error)}") from error
    model = IDM(config)
    actions = tuple(weights.get("train_mean", torch.zeros(ACTION_DIM)).shape)
    if actions != (ACTION_DIM,):
        raise UserError(f"the IDM {path} tells {math.prod(actions)} actions, not {ACTION_DIM}: take the one "
                        f"for two arms of 6 joints and a gripper")
    check_fit(path, model, weights)
    model.load_state_dict(weights)
    return model.eval()


def save_idm(path, weights, step):
    """Writes weights {name: tensor} whole or not at all: .safetensors, or a .pt that upstream loads."""
    path = Path(path)
    if path.suffix == ".safetensors":
        common.save_weights(path, weights)
        return
    save_pt(path, {"model_state_dict": weights, "step": step})


def save_pt(path, value):
    """torch.save, whole or not at all."""
    tmp = path.with_name(f".tmp_{path.name}")
    torch.save(value, tmp)
    tmp.replace(path)


# ---- model: loading -------------------------------------------------------------------------------------

def wan_part(args, run, part, dtype=torch.float32):
    """A part of Wan: its pretrained weights, or random ones in its shape or in the tiny shape."""
    tiny, random = args.model == "tiny", args.random_init or args.model == "tiny"
    torch.manual_seed(0)         # whatever --seed is: no checkpoint holds what is random and frozen
    return common.load_wan(args.weights_from, part=part, config=TINY if tiny else args.model, dtype=dtype,
                           device=run.device, random_init=random)


def idm_config(args):
    return {**IDM_TINY, "size": video_size(args)} if args.model == "tiny" else IDM_FULL


def codec_side(args):
    """Pixels that a latent cell is high and wide."""
    return common.LinearCodec.side if args.model == "tiny" else 16


def load_codec(args, run):
    if args.model == "tiny":
        tensors = common.load_weights(Path(args.data_dir) / "codec/codec.safetensors")
        return common.LinearCodec(tensors, run.device)
    vae = wan_part(args, run, "vae", torch.bfloat16).requires_grad_(False)
    vae.enable_tiling()                  # 81 frames of 736x640 at once would not fit
    return vae


def text_encoder(args, run):
    """-> prompt -> L D, the same for the same prompt."""
    tokenizer = wan_part(args, run, "tokenizer")
    encoder = wan_part(args, run, "text_encoder", torch.float32 if args.model == "tiny" else torch.bfloat16)
    return lambda prompt: common.encode_text(tokenizer, encoder, [prompt], args.text_length)[0].cpu()


def official_names(weights):
    """diffusers' names -> official ones, the exact inverse of common.diffusers_names: it is looked up in what
    that function makes of the official names, so the two cannot disagree."""
    stems = {"condition_embedder.text_embedder.linear_1": "text_embedding.0", "proj_out": "head.head",
             "condition_embedder.text_embedder.linear_2": "text_embedding.2", "attn1": "self_attn",
             "condition_embedder.time_embedder.linear_1": "time_embedding.0", "attn2": "cross_attn",
             "condition_embedder.time_embedder.linear_2": "time_embedding.2", "to_out.0": "o", "to_q": "q",
             "condition_embedder.time_proj": "time_projection.1", "norm2": "norm3", "to_k": "k", "to_v": "v",
             "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
    guesses = []
    for name in weights:
        for theirs, official in stems.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.)", rf"\g<1>{official}", name)
        guesses.append({"scale_shift_table": "head.modulation"}.get(
            name, name.replace("scale_shift_table", "modulation")))
    official = common.diffusers_names({name: name for name in guesses}, "transformer")
    return {official[name]: value for name, value in weights.items()}


def check_fit(path, model, weights, names=None):
    """UserError in one line unless {name: tensor} has the model's names and shapes: up to three of what is
    missing, foreign and of another shape. names: what the file calls them."""
    own, theirs = ({name: tuple(getattr(value, "shape", ())) for name, value in part.items()}
                   for part in (model.state_dict(), weights))
    called = lambda name: (names or {}).get(name, name)
    faults = {"missing": sorted(own.keys() - theirs.keys()),
              "foreign": sorted(called(name) for name in theirs.keys() - own.keys()),
              "of another shape": [f"{called(name)} {theirs[name]}, not {own[name]}" for name in sorted(own)
                                   if theirs.get(name, own[name]) != own[name]]}
    listed = [f"{kind}: {', '.join(found[:3])}" + f" and {len(found) - 3} more" * (len(found) > 3)
              for kind, found in faults.items() if found]
    if listed:
        raise UserError(f"{path} is not for this model: {'; '.join(listed)}")


def read_vidar(path, model):
    """vidar.pt, vidarc.pt or a .safetensors, official or diffusers' names, fitted to the transformer `model`
    -> {diffusers' name: tensor}, whether something that wrapped them was taken off. UserError where a name or
    a shape does not fit, which upstream's strict=False ignores."""
    path = Path(path)
    try:
        weights = common.read_official(path, "transformer", None, {})
        bare = path.suffix == ".safetensors" or weights.keys() <= torch.load(
            path, map_location="cpu", weights_only=True, mmap=True).keys()
    except Exception as error:           # zip, pickle, safetensors and OS raise their own
        raise UserError(f"cannot read the weights {path}: {common.reason(error)}") from error
    file_names = common.diffusers_names({name: name for name in weights}, "transformer")
    named = {name: weights[original] for name, original in file_names.items()}
    check_fit(path, model, named, file_names)
    return named, not bare


def check_vidar(args):
    """UserError unless --vidar's file fits the model, which is made on the meta device: to be known before
    the cache, which takes hours, and not after it."""
    shape = argparse.Namespace(**{**vars(args), "random_init": True})
    dit = wan_part(shape, argparse.Namespace(device=torch.device("meta")), "transformer")
    if read_vidar(args.vidar, dit)[1]:
        print(f"{args.vidar}: its weights lie in a dictionary or under a prefix, which is taken off")


def start_small(dit):
    """A start for weights that no one has trained: small blocks on a stream that begins as the patches do, so
    that noise, which the velocity contains, passes from the first step on. Saves half of the steps."""
    for name, p in dit.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.zeros_(p)
        elif name.startswith("blocks.") and p.ndim == 2:
            nn.init.normal_(p, std=.5 / math.sqrt(p.shape[1]))


def make_video_model(args, run):
    """VideoModel with what is trained requiring grad, in fp32: at a learning rate of 2e-5 most steps of a
    bf16 weight round to none. Beside adapters the model is frozen, and bf16 as it was published."""
    frozen = args.lora_rank and args.model != "tiny"
    dit = wan_part(args, run, "transformer", torch.bfloat16 if frozen else torch.float32)
    if args.vidar:
        dit.load_state_dict(read_vidar(args.vidar, dit)[0])
    elif args.model == "tiny":
        start_small(dit)
    dit.requires_grad_(not args.lora_rank)
    if args.lora_rank:
        from peft import LoraConfig
        torch.manual_seed(args.seed)             # equal initial weights on all ranks and after any restart
        dit.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=LORA_TARGETS))
        for p in dit.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
    return VideoModel(dit, args)


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def save_transformer(args, stem, weights):
    """{diffusers' name: tensor} -> stem.safetensors with these names, stem.pt with the official ones; bf16 at
    paper scale."""
    dtype = torch.float32 if args.model == "tiny" else torch.bfloat16
    weights = {name: value.to(dtype) for name, value in weights.items()}
    common.save_weights(stem.with_suffix(".safetensors"), weights)
    save_pt(stem.with_suffix(".pt"), official_names(weights))


def export(args, run, model, stage, folder):
    """final/: idm.pt; or vidar.pt in official names, which upstream's generate.py takes, and
    vidar.safetensors in diffusers', bf16 at paper scale; of adapters the LoRA file. Rank 0 writes."""
    weights, _ = common.gather_state(model, trained_only=True)
    if run.rank:
        return
    final = folder / "final"
    final.mkdir(exist_ok=True)
    if stage == "idm":
        return save_idm(final / "idm.pt", weights, args.idm_steps)
    weights = {name.removeprefix("dit."): value for name, value in weights.items()}
    if args.lora_rank:
        common.save_lora(final, model.dit, weights)
    else:
        save_transformer(args, final / SCRIPT, weights)


# ---- objective and sampler ------------------------------------------------------------------------------

def shift_sigma(u, shift):
    """Wan's schedule: u in [0, 1] -> sigma = s u / (1 + (s - 1) u), more of it where there is much noise."""
    return shift * u / (1 + (shift - 1) * u)


def flow_loss(v, target, valid, arm=None, eta=0.):
    """|(1 + eta U) (v - (eps - z))|^2, Eq. 7; with eta 0 Eq. 1. v, target B C F h w; valid B F bool: latent
    frames without padding; arm B 1 F h w: U -> loss, {the unweighted one}, fp32.

    Mean over what is left of a clip, then over clips: two processes of 8 clips agree with one of 16. The
    weight is inside the norm: with eta 3 up to 16 on the arm."""
    error = (v.float() - target).square().mean(1)                              # B F h w
    known = valid[:, :, None, None].float().expand_as(error)
    mean = lambda e: ((e * known).flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)).mean()
    plain = mean(error)
    loss = mean(error * (1 + eta * arm[:, 0].float()) ** 2) if eta else plain
    return loss, {"flow_loss": plain.detach()}


@torch.no_grad()
def generate(dit, z0, text, empty, args, seeds):
    """UniPC (diffusers' scheduler) from noise to videos, frame 0 given. z0 1 C 1 h w, text and empty 1 L D,
    seeds K -> K C F h w. Guidance compares with the empty prompt, as upstream; --cfg 1 leaves it out."""
    from diffusers import UniPCMultistepScheduler
    K, F_ = len(seeds), (args.frames - 1) // 4 + 1
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                        flow_shift=args.shift)
    scheduler.set_timesteps(args.steps, device=z0.device)
    x = torch.cat([fixed_noise(z0.expand(-1, -1, F_, -1, -1), seed) for seed in seeds])
    z0 = z0.expand(K, -1, -1, -1, -1)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        x = torch.cat([z0, x[:, :, 1:]], dim=2)
        frames = (1000 * sigma).to(x.device).repeat(K, F_)         # t is the same, cut to an integer
        frames[:, 0] = 0
        velocity = lambda prompt: run_backbone(dit, x, frames, prompt.expand(K, -1, -1)).float()
        v = velocity(text)
        if args.cfg != 1:
            v = (away := velocity(empty)) + args.cfg * (v - away)
        x = scheduler.step(v, t, x, return_dict=False)[0]
    return torch.cat([z0, x[:, :, 1:]], dim=2)


def fixed_noise(z, seed):
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z.device)


def implausibility(actions, masks, state, low, high):
    """K candidates' actions T 14 and soft masks T 1 h w, as the IDM reads them off; joints now, and the ends
    of their range, 14 each -> K numbers, lower is better: the test-time scaling of --candidates.

    Mean of four ratios to the candidates' mean: distance of the first generated frame's joints from the
    joints now, mean second difference of the actions, excess over the range, change of the arm's area."""
    area = masks.flatten(2).mean(2)
    faults = torch.stack([
        (actions[:, 1] - state).abs().mean(1), actions.diff(n=2, dim=1).abs().mean((1, 2)),
        ((actions - high).clamp(min=0) + (low - actions).clamp(min=0)).mean((1, 2)),
        area.diff(dim=1).abs().mean(1)])
    return (faults / faults.mean(1, keepdim=True).clamp(min=1e-9)).mean(0)


# ---- data: a simulated robot ----------------------------------------------------------------------------
# Two planar arms of six joints with a gripper each, over a table with two blocks and a plate. A point is a
# complex number x + iy, y away from the robot; the table is seen from above. A joint's angle is relative to
# the link before, the first one's to +y, so that a mirrored pose has all joints' signs changed.

LINKS = np.array([.24, .21, .19, .17, .15, .13])
HAND = .09                                          # from the last link's end to between the fingers
BASES = (-.48 - .72j, .48 - .72j)
FOLDED = np.array([1.2, -.6, -.8, -.7, -.2, .3])    # of the left arm; IK stays as near to it as it can
REST = np.concatenate([FOLDED, [1.], -FOLDED, [1.]])
SPEED = np.tile([*[.09] * 6, .25], 2)               # the expert's most, radians or gripper share per frame
RATE = 1.25 * SPEED                                 # the robot's: what is further off is not reached in time
GRIPS, OPENS = .55, .7                              # a gripper holds below the one, lets go above the other
GRASP, PLATE, BLOCK = .22, .15, .085                # radii of a grasp and of the plate; a block's half side
BLOCKS = {"red": (205, 40, 40), "blue": (40, 80, 215)}
PAINT = (((75, 25, 120), (215, 165, 245), (145, 70, 205)), ((0, 80, 85), (150, 230, 220), (20, 160, 155)))
FINGERS = (25, 25, 30)
PLAY = "be in random poses."                      # the instruction of episodes for the IDM alone
VIEWS = ("fixed rear", "movable left arm", "movable right arm")


def chain(pose, arm):
    """Joint angles and gripper (7,) of an arm -> ends of its links (7,), the point between its fingers, the
    direction that they point in, a unit number."""
    ahead = 1j * np.exp(1j * np.cumsum(pose[:6]))
    ends = BASES[arm] + np.concatenate([[0], np.cumsum(LINKS * ahead)])
    return ends, ends[-1] + HAND * ahead[-1], ahead[-1]


def reach(pose, arm, goal):
    """Inverse kinematics -> pose (7,) whose hand is at `goal`, else as near to the folded one as can be:
    damped least squares, with the pull to the folded pose in the Jacobian's null space."""
    pose = pose.copy()
    for _ in range(40):
        ends, hand, _ = chain(pose, arm)
        lever, miss = 1j * (hand - ends[:6]), goal - hand
        jacobian = np.stack([lever.real, lever.imag])
        free = .3 * (REST[7 * arm:7 * arm + 6] - pose[:6])
        miss = np.array([miss.real, miss.imag]) - jacobian @ free
        step = free + jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-3 * np.eye(2), miss)
        pose[:6] += np.clip(step, -.2, .2)
    return pose


def places(rng, arms):
    """Random points on the table, one within reach of each arm named."""
    while True:
        points = [complex((2 * arm - 1) * rng.uniform(0, .75), rng.uniform(-.35, .4)) for arm in arms]
        if all(.45 < abs(point - BASES[arm]) < 1 for point, arm in zip(points, arms)):
            return points


def reached(rng, arm, count=25):
    """Poses of an arm whose hand is somewhere on the table."""
    rest = REST[7 * arm:7 * arm + 7]
    return [reach(rest, arm, places(rng, [arm])[0]) for _ in range(count)]


def path(start, waypoints, n):
    """(14,) and a list of (14,) -> n targets (n, 14): straight from one to the next, as fast as SPEED allows.
    Where one stands says how it goes on: a plan made on the way is the rest of the old one."""
    rows = []
    for target in waypoints:
        steps = math.ceil(np.abs((target - start) / SPEED).max() - 1e-6)
        rows += list(np.linspace(start, target, steps + 1)[1:])
        start = target
    return np.array((rows + [start] * n)[:n])


def camera(shapes, size, centre, ahead, width):
    """One view from above -> picture H W 3 float32, share of arm in each pixel H W. It shows `width` of the
    table around `centre`, direction `ahead` up. shapes: (p, q, radius, colour, is_arm), in drawing order: a
    capsule from p to q, or a square where q is None. Edges are anti-aliased by the distance to them."""
    (H, W), scale = size, size[1] / width
    turn = scale * 1j / complex(ahead)                                # table -> pixels, y up
    pixels = np.complex64((np.arange(W) + .5 - W / 2) + 1j * (H / 2 - np.arange(H) - .5)[:, None])
    picture = np.full((H, W, 3), 200, np.float32)
    arm = np.zeros((H, W), np.float32)
    for p, q, radius, colour, is_arm in shapes:
        a, b = (p - centre) * turn, ((p if q is None else q) - centre) * turn
        margin = scale * radius * (1.5 if q is None else 1) + 1
        left, right = min(a.real, b.real) - margin + W / 2, max(a.real, b.real) + margin + W / 2
        top, low = H / 2 - max(a.imag, b.imag) - margin, H / 2 - min(a.imag, b.imag) + margin
        if right < 0 or left > W or low < 0 or top > H:
            continue
        part = slice(max(0, int(top)), int(low) + 1), slice(max(0, int(left)), int(right) + 1)
        near = pixels[part] - complex(a)
        if q is None:
            near *= complex(scale / turn)
            distance = np.maximum(abs(near.real), abs(near.imag))
        else:
            along = complex(b - a) or 1
            share = edge((near * (1 / along)).real, 0)        # of the way from p to q
            distance = abs(near - share * complex(b - a))
        cover = edge(float(scale * radius) + .5 - distance, 0)
        picture[part] += cover[..., None] * (np.float32(colour) - picture[part])
        if is_arm:
            arm[part] = np.maximum(arm[part], cover)
    return picture, arm


def edge(x, low):
    """Clipped to low..1, in a fifth of np.clip's time on so few numbers."""
    return np.minimum(np.maximum(x, low), 1)


class ArmWorld:
    """The robot, its table and a task: grip the named block with the named arm, put it on the plate.

    state (14,) are the joints and grippers that observe() shows; step() moves them towards absolute targets.
    moved: after so many steps the block is put elsewhere, .35 to .6 from its first place. Neither place is
    where the hand rests: a hand that closes without going there grips nothing.
    copy.deepcopy gives a world to plan in.
    """

    def __init__(self, seed, size=(112, 96), moved=None):
        rng = np.random.default_rng(seed)
        self.size, self.moved, self.time, self.success = size, moved, 0, False
        self.arm = int(rng.integers(2))
        names = [str(name) for name in rng.choice(list(BLOCKS), 2, replace=False)]
        self.colours = [BLOCKS[name] for name in names]
        self.text = f"using {('left', 'right')[self.arm]} arm, put the {names[0]} block on the plate."
        self.rest = REST + rng.normal(0, .03, ACTION_DIM)
        self.state = self.rest + rng.normal(0, .05, ACTION_DIM)
        self.rest[[6, 13]] = self.state[[6, 13]] = 1
        self.held, self.grip = [None, None], [0j, 0j]      # of each arm: number of a block, where it holds it
        self.plate = complex(*rng.normal(0, .03, 2))                       # in the middle: both arms reach it
        hand = chain(self.rest[7 * self.arm:7 * self.arm + 7], self.arm)[1]
        while True:
            block, self.shifted, other = points = places(rng, [self.arm, self.arm, int(rng.integers(2))])
            apart = min(abs(p - q) for p, q in itertools.combinations([self.plate, *points], 2))
            from_hand = min(abs(block - hand), abs(self.shifted - hand))
            if apart >= .27 and .35 <= abs(block - self.shifted) <= .6 and from_hand >= .25:
                break
        self.blocks = [block, other]

    def distance(self):
        """From the task's block to the middle of the plate."""
        return abs(self.blocks[0] - self.plate)

    def move_block(self, offset):
        """Displaces the task's block, out of the gripper that holds it."""
        self.blocks[0] += offset
        self.held = [None if number == 0 else number for number in self.held]

    def step(self, action):
        """One frame towards absolute targets (14,) -> whether the block has been put on the plate by now."""
        before = self.state
        self.state = self.state + np.clip(action - self.state, -RATE, RATE)
        self.state[[6, 13]] = self.state[[6, 13]].clip(0, 1)
        self.time += 1
        if self.time == self.moved:
            self.move_block(self.shifted - self.blocks[0])
        for arm in (0, 1):
            pose = self.state[7 * arm:7 * arm + 7]
            opening, (_, hand, ahead) = pose[6], chain(pose, arm)
            away = [(block - hand) / ahead for block in self.blocks]
            nearest = int(np.argmin(np.abs(away)))
            if opening > OPENS:
                self.held[arm] = None
            elif before[7 * arm + 6] >= GRIPS > opening and abs(away[nearest]) < GRASP:
                self.held[arm], self.grip[arm] = nearest, away[nearest]
            if self.held[arm] is not None:
                self.grip[arm] *= .5                               # fingers centre what they hold
                self.blocks[self.held[arm]] = hand + self.grip[arm] * ahead
        self.success |= self.distance() < PLATE and 0 not in self.held
        return self.success

    def expert(self, n):
        """n targets (n, 14) from here on: what is left of reach, close, carry, open, retreat, and stay."""
        own = slice(7 * self.arm, 7 * self.arm + 7)
        block, plate = (reach(self.state[own], self.arm, goal) for goal in (self.blocks[0], self.plate))

        def target(pose, opening):
            full = self.rest.copy()
            full[own] = [*pose[:6], opening]
            return full

        plan = [target(self.rest[own], 1)]
        holding, away = self.held[self.arm] == 0, self.distance() > PLATE
        if holding or away:
            plan = [target(plate, 1), *plan]
        if away or holding and self.distance() > .05:
            plan = [target(plate, .2), *plan]
        if away and not holding:
            plan = [target(block, .2), *plan]
            if abs(chain(self.state[own], self.arm)[1] - self.blocks[0]) > .05:
                plan = [target(block, 1), *plan]
        return path(self.state, plan, n)

    def pose(self, rng, reached):
        """Puts both arms in random poses, on the way from rest or a reached pose to another, and now and then
        the block between fingers: poses an expert never takes, which an inverse dynamics model meets all the
        same (AnyPos, arXiv:2507.12768). reached: a list of poses for each arm."""
        for arm in (0, 1):
            own = slice(7 * arm, 7 * arm + 7)
            a, b = (REST[own] if rng.random() < .35 else reached[arm][rng.integers(len(reached[arm]))]
                    for _ in range(2))
            self.state[own] = a + rng.random() * (b - a) + rng.normal(0, .2, 7)
            self.state[7 * arm + 6] = rng.random()
        if rng.random() < .3:
            arm = rng.integers(2)
            self.blocks[0] = chain(self.state[7 * arm:7 * arm + 7], arm)[1]

    def render(self):
        """-> mosaic H W 3 uint8 and H W bool, where it shows arm: the fixed camera's view above the views of
        the hands' cameras, which turn with them."""
        shapes = [(self.plate, self.plate, PLATE, (110, 110, 118), False),
                  (self.plate, self.plate, PLATE - .035, (250, 250, 250), False)]
        shapes += [(block, None, BLOCK, colour, False) for block, colour in zip(self.blocks, self.colours)]
        hands = []
        for arm in (0, 1):
            pose = self.state[7 * arm:7 * arm + 7]
            ends, hand, ahead = chain(pose, arm)
            for j, (p, q) in enumerate(zip(ends[:-1], ends[1:])):
                shapes.append((p, q, .07 - .005 * j, PAINT[arm][j % 3], True))
            across = 1j * (.045 + .07 * pose[6]) * ahead    # open fingers reach a block .2 to .24 away
            shapes += [(ends[-1] - across, ends[-1] + across, .022, FINGERS, True)]
            shapes += [(ends[-1] + side, ends[-1] + side + 1.5 * HAND * ahead, .022, FINGERS, True)
                       for side in (-across, across)]
            hands.append((hand, ahead))
        H, W = self.size
        top = round(H * 2 / 3)
        head = camera(shapes, (top, W), -.07j, 1j, 2.)
        # From behind the hand, so that four links are in view: the hand alone tells a joint or two.
        wrists = [camera(shapes, (H - top, W // 2), hand - .24 * ahead, ahead, .9) for hand, ahead in hands]
        picture, arm = (np.concatenate([head[i], np.concatenate([w[i] for w in wrists], axis=1)])
                        for i in (0, 1))
        return picture.round().astype(np.uint8), arm >= .5

    def observe(self):
        return self.render()[0]


# ---- data: simulated episodes ---------------------------------------------------------------------------

POSES = 200                                        # random ones of an episode that shows them


def simulate(root, episodes, poses, frames, size, seed):
    """Writes episodes of the simulated robot in the document's layout, and after them `poses` random poses,
    POSES to an episode: whole, or not at all. They may be there; UserError where others are. In a third of
    the episodes the block is moved on the way, and the expert turns to where it is then; in another third it
    begins anywhere, its gripper open or closed: what has failed is tried again.

    root/episodes/ep_0001/{video.mp4, actions.npy (T, 14) float32, the joint state that frame t shows,
    instruction.txt, mask.npz (bits of arm T H W)}, root/manifest.json
    """
    root = Path(root)
    made_of = {"episodes": episodes, "poses": poses, "frames": frames, "size": list(size), "seed": seed}
    if root.exists():
        kept = root / "manifest.json"
        there = json.loads(kept.read_text()) if kept.is_file() else {}
        if not isinstance(there, dict) or there.get("simulated") != made_of:
            raise UserError(f"{root} holds other episodes: remove it, or name what you want with --data_dir")
        return
    work = root.with_name(root.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    jobs = [(work, i, i >= episodes, made_of) for i in range(episodes + math.ceil(poses / POSES))]
    rows = list(tqdm(read_ahead(record, jobs), "simulate", len(jobs), unit="episode"))
    common.write_json(work / "manifest.json", {"fps": FPS, "action_dim": ACTION_DIM, "simulated": made_of,
                                               "episodes": rows})
    work.rename(root)


def record(root, number, random, made_of):
    """Writes an episode of the expert, or of random poses -> its row of the manifest."""
    seed, size, frames = made_of["seed"], made_of["size"], POSES if random else made_of["frames"]
    rng = np.random.default_rng((seed, number, 1))
    moved = int(rng.integers(3, frames // 2)) if number % 3 == 2 else None
    world = ArmWorld((seed, number), size, moved)
    poses, shown = [reached(rng, arm) for arm in (0, 1)] if random else None, []
    if number % 3 == 1:
        own = slice(7 * world.arm, 7 * world.arm + 7)
        world.state[own] = [*reached(rng, world.arm, 1)[0][:6], rng.choice([.2, 1])]
    for t in range(frames):
        if random:
            world.pose(rng, poses)
        shown.append((*world.render(), np.float32(world.state)))
        if not random:
            if t in (0, moved):
                plan = iter(world.expert(frames - t))
            world.step(next(plan))
    video, masks, actions = (np.stack(column) for column in zip(*shown))
    folder = root / f"episodes/ep_{number + 1:04d}"
    # Whole chroma: at half its resolution a link of three pixels loses its colour.
    common.write_video(folder / "video.mp4", torch.from_numpy(video).permute(0, 3, 1, 2), FPS,
                       ("-crf", "10", "-preset", "ultrafast", "-pix_fmt", "yuv444p"))
    np.save(folder / "actions.npy", actions)
    np.savez_compressed(folder / "mask.npz", bits=np.packbits(masks), shape=masks.shape)
    (folder / "instruction.txt").write_text((PLAY if random else world.text) + "\n")
    paths = {f"{kind}_path": f"episodes/{folder.name}/{name}" for kind, name in FILES.items()}
    return {"id": folder.name, **paths, "num_frames": frames,
            "success": None if random else bool(world.success)}


# ---- data: episodes on disk -----------------------------------------------------------------------------

FILES = {"video": "video.mp4", "actions": "actions.npy", "instruction": "instruction.txt", "mask": "mask.npz"}
CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
LAYOUTS = {"480+240": 480, "360+360": 360}     # the fixed camera's of 720 rows


@dataclass
class Episode:
    """video: the file that holds the frames, for source "hdf5" all else too. frames: of that file, at its own
    fps. views: what the mosaic shows, as VIEWS."""
    id: str
    video: Path
    actions: np.ndarray                            # (T, 14) float32
    instruction: str
    fps: float
    frames: int
    mask: Path | None = None
    source: str = "video"
    success: bool | None = None
    views: tuple = VIEWS

    def length(self, fps=FPS):
        """Frames at another rate."""
        return int((self.frames - 1) * fps / self.fps + 1e-6) + 1


def find_episodes(data_dir):
    """-> [Episode] of manifest.json ({"episodes": [...]} or a bare list); without one, of the folders that
    hold an actions.npy and of hdf5/*.hdf5. UserError, naming the file, for what is missing or malformed."""
    root = Path(data_dir)
    manifest, fps = root / "manifest.json", None
    if manifest.is_file():
        try:
            rows = json.loads(manifest.read_text())
            if isinstance(rows, dict):
                rows, fps = rows["episodes"], rows.get("fps")
            rows = [{**row, "id": str(row["id"])} for row in rows]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f'{manifest} must hold "episodes", a list in which each has an "id"') from error
    else:
        folders = sorted(path.parent for path in root.rglob("actions.npy"))
        rows = [{"id": folder.name, "folder": folder} for folder in folders]
    found = [open_files(root, row, fps) for row in rows]
    if not manifest.is_file():
        found += [open_hdf5(path) for path in sorted(root.glob("hdf5/*.hdf5"))]
    if not found:
        raise UserError(f"no episodes in {root}: it takes episodes/ep_0001/ with video.mp4, actions.npy and "
                        "instruction.txt, or hdf5/episode_000000.hdf5")
    return found


def open_files(root, row, fps):
    """A row of the manifest, or a folder found -> Episode. fps: of the manifest, else the video's own."""
    folder = row.get("folder", root / "episodes" / row["id"])
    paths = {kind: root / row.get(f"{kind}_path", folder / name) for kind, name in FILES.items()}
    for kind in ("video", "actions", "instruction"):
        if not paths[kind].is_file():
            raise UserError(f"episode {row['id']} of {root} has no file {paths[kind]}")
    try:
        actions = np.load(paths["actions"])
    except (ValueError, OSError) as error:
        raise UserError(f"{paths['actions']} cannot be read: {common.reason(error)}") from error
    try:
        fps = row.get("fps") or fps or iio.immeta(paths["video"], plugin="FFMPEG")["fps"]
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"cannot read video {paths['video']}, or it names no fps") from error
    return Episode(row["id"], paths["video"], checked_actions(actions, paths["actions"]),
                   paths["instruction"].read_text().strip(), fps, len(actions),
                   paths["mask"] if paths["mask"].is_file() else None, "video", row.get("success"))


def open_hdf5(path):
    """A file of the fork's set -> Episode: observations/images/cam_* or observations/unified_image, each
    T H W 3 uint8, action (T, 14), attributes instruction and fps."""
    try:
        with h5py.File(path) as file:
            images, text, fps = cameras(file), file.attrs["instruction"], float(file.attrs["fps"])
            actions = checked_actions(file["action"][:], path)
            views = tuple(view for camera, view in zip(CAMERAS, VIEWS) if camera in images) or VIEWS
    except (KeyError, OSError) as error:           # h5py's words name the missing group, attribute or field
        raise UserError(f"{path} cannot be read: {common.reason(error)}") from error
    return Episode(path.stem, path, actions, str(text).strip(), fps, len(actions), source="hdf5", views=views)


def cameras(file):
    """An open HDF5 file -> {name: dataset T H W 3}: the cameras', from which any layout can be made, or the
    mosaic that the fork made of them, where there are none."""
    group = file["observations"]
    found = {name: group["images"][name] for name in CAMERAS if name in group.get("images", {})}
    if CAMERAS[0] not in found:
        found = {"unified_image": group["unified_image"]}
    for name, images in found.items():
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise UserError(f"{file.filename}: {name} is {images.dtype} {images.shape}, not uint8 T H W 3")
    return found


def checked_actions(actions, path):
    """-> float32. UserError unless it is (T, 14) and finite."""
    if actions.ndim != 2 or actions.shape[1] != ACTION_DIM or not len(actions):
        raise UserError(f"{path}: actions are {actions.shape}, not (T, {ACTION_DIM})")
    if not np.isfinite(actions).all():
        raise UserError(f"{path}: action of frame {np.isfinite(actions).all(1).argmin()} is NaN or infinite")
    return actions.astype(np.float32)


def resize(video, size):
    """T H W 3 uint8 -> T size 3: anti-aliased; it stretches, as 720 rows to 736 in the official set."""
    if video.shape[1:3] == tuple(size):
        return video
    x = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2)
    return F.interpolate(x, tuple(size), mode="bicubic", antialias=True).permute(0, 2, 3, 1).numpy()


def mosaic(head, left=None, right=None, layout="480+240"):
    """Three cameras' T H W 3 uint8 -> T 720 640 3: the fixed one above the wrists'. A wrist's camera that
    does not exist shows what the fixed one sees, as in the fork."""
    rows = LAYOUTS[layout]
    wrists = [resize(head if view is None else view, (720 - rows, 320)) for view in (left, right)]
    return np.concatenate([resize(head, (rows, 640)), np.concatenate(wrists, axis=2)], axis=1)


def read_frames(episode, wanted, layout):
    """Frames of an episode's file, by their ascending numbers -> mosaics T H W 3 uint8."""
    with h5py.File(episode.video) if episode.source == "hdf5" else contextlib.nullcontext() as file:
        if file:
            views = cameras(file)
        else:
            views = {"unified_image": common.read_video(episode.video).permute(0, 2, 3, 1).numpy()}
        for name, frames in views.items():
            if len(frames) != episode.frames:
                raise UserError(f"{episode.video} has {len(frames)} frames, its actions are {episode.frames}")
            views[name] = frames[wanted[0]:wanted[-1] + 1][wanted - wanted[0]]
    return views["unified_image"] if "unified_image" in views else mosaic(*map(views.get, CAMERAS), layout)


def read_window(episode, start, frames, size, layout="480+240", fps=FPS):
    """`frames` frames from frame `start` on, both counted at `fps`, whatever the file's own rate -> dict of
    video T H W 3 uint8, actions (T, 14) float32, valid (T,) bool, mask T H W bool (arm) or None. Past the end
    the last frame repeats and is not valid. UserError names a file that cannot be read."""
    clock = start + np.arange(frames)
    valid = clock < episode.length(fps)
    nearest = np.floor(np.minimum(clock, episode.length(fps) - 1) * episode.fps / fps + .5).astype(int)
    nearest = nearest.clip(max=episode.frames - 1)
    mask = None
    if episode.mask:
        packed = np.load(episode.mask)
        bits = np.unpackbits(packed["bits"], count=packed["shape"].prod()).reshape(packed["shape"])[nearest]
        mask = resize(np.repeat(bits[..., None] * np.uint8(255), 3, axis=3), size)[..., 0] >= 128
    video = resize(read_frames(episode, nearest, layout), size)
    return {"video": video, "actions": episode.actions[nearest], "valid": valid, "mask": mask}


def split_episodes(episodes):
    """-> {"train", "val", "test"}: of ten the 6th and the 10th are held out, of fewer middle and last."""
    if len(episodes) < 3:
        raise UserError(f"{len(episodes)} episodes cannot be split into train, val and test: three at least")
    turn = min(10, len(episodes))
    place = {turn // 2: "val", turn - 1: "test"}
    return {part: [e for i, e in enumerate(episodes) if place.get(i % turn, "train") == part]
            for part in ("train", "val", "test")}


def load_parts(data_dir):
    """-> {part: [Episode]}, of which some have a task, and random poses come first."""
    episodes = find_episodes(data_dir)
    parts = split_episodes([e for e in episodes if e.instruction == PLAY] + tasks(episodes))
    for part, own in parts.items():
        if not tasks(own):
            raise UserError(f"{data_dir}: no episode of split {part} has a task")
    return parts


def prompt(instruction, views=VIEWS, robot="aloha"):
    """A task's text with the three clauses that the published weights were trained with: style and cameras,
    robot, task. A text that has them stays as it is."""
    task = instruction.strip()
    if "performing the following task:" in task:
        return task
    named = [f"a {view} camera" for view in views]
    count = ("one view", "two views", "three views")[len(views) - 1]
    listed = ", and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    return (f"The whole scene is in a realistic, industrial art style with {count}: {listed}. "
            f"The {robot} robot is currently performing the following task: {task[:1].lower()}{task[1:]}")


# ---- cache ----------------------------------------------------------------------------------------------

def tasks(episodes):
    """Those with an instruction that says what will be seen."""
    return [episode for episode in episodes if episode.instruction != PLAY]


def full_prompt(text, args, views=VIEWS):
    """What the text encoder is given of an instruction: --prompt_views names the fixed camera."""
    return text if args.prompt_views == "none" else prompt(text, (f"fixed {args.prompt_views}", *views[1:]))


def choose_starts(number, episode, part, args):
    """First frames (at 10 fps) of an episode's windows: random ones for training, else its beginning."""
    if part != "train":
        return [0]
    room = max(0, episode.length() - args.frames)
    return np.random.default_rng(number).integers(room + 1, size=args.windows)


def read_ahead(read, jobs):
    """Yields read(*job), job by job, read by other processes and little more than one each ahead. Arrays
    travel, not tensors: those need /dev/shm."""
    own_share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers, waiting = min(max(1, own_share), 8), []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"),
                             torch.set_num_threads, (1,)) as pool:         # forked, OpenMP would hang
        for job in jobs:
            waiting.append(pool.submit(read, *job))
            if len(waiting) > workers:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()


def read_windows(episode, starts, args):
    """An episode's windows, as read_window's. Its file is decoded once, from the first to the last's end."""
    first, T = int(min(starts)), args.frames
    span = read_window(episode, first, int(max(starts)) - first + T, video_size(args), args.layout)
    return [{name: value if value is None else value[start - first:start - first + T]
             for name, value in span.items()} for start in starts]


def idm_count(episode, args):
    """How many frames of an episode the IDM sees: of random poses, which are there for it, all."""
    return episode.length() if episode.instruction == PLAY else min(args.idm_frames, episode.length())


def idm_pictures(episode, args, size):
    """Frames of an episode, evenly spaced -> n 3 h w uint8 at the IDM's size, actions n 14."""
    window = read_window(episode, 0, episode.length(), video_size(args), args.layout)
    keep = np.linspace(0, episode.length() - 1, idm_count(episode, args)).round().astype(int)
    frames = torch.from_numpy(window["video"][keep]).movedim(-1, 1)
    return at_size(frames, size).numpy(), window["actions"][keep]


def start_cache(run, parts, folder, flags):
    """Whether what folder/index.json describes was made of other episodes or flags -> None, or what it is
    made of now and an empty folder beside, to be filled: the old one stays until finish_cache."""
    files = [[episode.id, episode.instruction, zlib.crc32(episode.actions.tobytes()),
              *((path.stat().st_size, path.stat().st_mtime_ns)
                for path in (episode.video, episode.mask) if path)]
             for part in parts.values() for episode in part]
    made_of = json.loads(json.dumps({"episodes": files, **flags}))
    index, new = folder / "index.json", folder.with_name(f"{folder.name}.tmp")
    if index.is_file() and json.loads(index.read_text())["made_of"] == made_of:
        return None
    run.barrier()
    if run.rank == 0:
        if index.is_file():
            print(f"{folder} was made of other data or flags: making it anew")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    run.barrier()
    return made_of, new


def finish_cache(run, folder, made_of, new):
    """The filled folder `new` takes the old one's place."""
    run.barrier()
    if run.rank == 0:
        common.write_json(new / "index.json", {"made_of": made_of})
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    run.barrier()


def fit_codec(args, run, parts):
    """The tiny preset's codec, fitted once to training episodes: codec/codec.safetensors."""
    folder = Path(args.data_dir) / "codec"
    flags = {"channels": TINY["transformer"]["in_channels"], "size": args.size, "layout": args.layout,
             "frames": args.frames}
    if args.model == "tiny" and (started := start_cache(run, parts, folder, flags)):
        made_of, new = started
        if run.rank == 0:
            some = tasks(parts["train"])[::max(1, len(parts["train"]) // 40)]
            videos = np.stack([read_windows(episode, [0], args)[0]["video"] for episode in some])
            codec = common.LinearCodec.fit(from_uint8(torch.from_numpy(videos).movedim(-1, 2)),
                                           flags["channels"])
            common.save_weights(new / "codec.safetensors", codec.tensors)
        finish_cache(run, folder, made_of, new)


def decoded_frames(window, vae, run, size):
    """What the codec makes of a window -> its valid frames n 3 h w uint8 at the IDM's size,
    actions n 14."""
    video = from_uint8(torch.from_numpy(window["video"]).movedim(-1, 1))[None].to(run.device)
    frames = common.wan_decode(vae, common.wan_encode(vae, video))[0].cpu()[window["valid"]]
    return to_uint8(at_size(frames, size)).numpy(), window["actions"][window["valid"]]


def build_frames(args, run, parts):
    """Frames for the IDM, written once: idm_cache/<part>.npy n 3 h w uint8, <part>_actions.npy n 14; with
    --idm_decoded every fourth task's are there for training a second time, as the codec shows them.
    -> {part: (frames, memory-mapped; actions)}."""
    folder, size = Path(args.data_dir) / "idm_cache", idm_config(args)["size"]
    names = ("size", "layout", "idm_frames", "idm_decoded", "frames")
    flags = {name: getattr(args, name) for name in names} | {"idm_size": size}
    if started := start_cache(run, parts, folder, flags):
        made_of, new = started
        for part, episodes in parts.items() if run.rank == 0 else ():
            again = tasks(episodes)[::4] if part == "train" and args.idm_decoded else []
            frames = sum(idm_count(episode, args) for episode in episodes)
            frames += sum(min(args.frames, episode.length()) for episode in again)
            file = np.lib.format.open_memmap(new / f"{part}.npy", "w+", np.uint8, (frames, 3, *size))
            real = read_ahead(idm_pictures, [(episode, args, size) for episode in episodes])
            vae = again and load_codec(args, run)
            shown = (decoded_frames(window, vae, run, size)
                     for window, in read_ahead(read_windows, [(episode, [0], args) for episode in again]))
            count, actions = len(episodes) + len(again), []
            for some, own in tqdm(itertools.chain(real, shown), f"frames, {part}", count):
                at = sum(map(len, actions))
                file[at:at + len(some)] = some
                actions.append(own)
            np.save(new / f"{part}_actions.npy", np.concatenate(actions))
        finish_cache(run, folder, made_of, new)
    return {part: (np.load(folder / f"{part}.npy", mmap_mode="r"),
                   torch.from_numpy(np.load(folder / f"{part}_actions.npy"))) for part in parts}


def arm_of(window, idm, device):
    """U of every frame of a window -> T h w: the truth of mask.npz where it is, else the IDM's soft mask."""
    if window["mask"] is not None:
        return torch.from_numpy(window["mask"]).float()
    if idm is None:
        raise UserError("--eta needs to know where the arm is: --idm FILE, or mask.npz in each episode")
    frames = torch.from_numpy(window["video"]).movedim(-1, 1) / 255
    return torch.cat([idm.arm(some.to(device)).float().cpu() for some in frames.split(IDM_CHUNK)])[:, 0]


def masks_known(parts):
    """Whether no IDM has to say where the arm is: all tasks have a mask.npz."""
    return all(episode.mask for episodes in parts.values() for episode in tasks(episodes))


def build_cache(args, run, parts, idm):
    """Latents, text embeddings and arm masks of all windows, written once; then VAE and text encoder leave
    memory. cache/<part>_<number>.safetensors holds an episode: latents n C F h w, valid n F: latent frames
    without padding, text L D, with an IDM, all masks or --eta also arm n 1 F h w."""
    folder = Path(args.data_dir) / "cache"
    flags = {name: getattr(args, name) for name in CACHE_FLAGS}
    known = masks_known(parts)
    arms = args.eta or idm is not None or known
    if arms:                                     # an IDM is known by what its weights sum to
        flags["arm"] = None if known or idm is None else sum(
            p.abs().sum().item() for p in idm.parameters())
    started = start_cache(run, parts, folder, flags)
    if not started:
        return
    made_of, new = started
    vae, encode_prompt = load_codec(args, run), text_encoder(args, run)
    if run.rank == 0:
        common.save_weights(new / "empty.safetensors", {"text": encode_prompt("")})
    jobs = [(part, number, episode, choose_starts(number, episode, part, args))
            for part, episodes in parts.items() for number, episode in enumerate(tasks(episodes))]
    jobs = jobs[run.rank::run.world]
    read = read_ahead(read_windows, [(episode, starts, args) for _, _, episode, starts in jobs])
    dtype = torch.float32 if args.model == "tiny" else torch.bfloat16
    for (part, number, episode, _), windows in zip(tqdm(jobs, "cache", disable=run.rank > 0), read):
        tensors = {"latents": [], "valid": [], "arm": []}
        for window in windows:
            video = from_uint8(torch.from_numpy(window["video"]).movedim(-1, 1))[None].to(run.device)
            tensors["latents"].append(common.wan_encode(vae, video)[0].to(dtype).cpu())
            valid = torch.from_numpy(window["valid"])
            tensors["valid"].append(torch.cat([valid[:1], valid[1:].unflatten(0, (-1, 4)).all(1)]))
            if arms:
                arm = arm_of(window, idm, run.device)
                tensors["arm"].append(arm_to_latent(arm[None], tensors["latents"][-1].shape[-2:])[0].half())
        tensors = {name: torch.stack(values) for name, values in tensors.items() if values}
        text = full_prompt(episode.instruction, args, episode.views)
        common.save_weights(new / f"{part}_{number:05d}.safetensors",
                            {**tensors, "text": encode_prompt(text)})
    finish_cache(run, folder, made_of, new)


class Windows:
    """A split of the cache, read from disk as asked: of a thousand episodes it is 14 GB at paper scale."""
    def __init__(self, args, part, episodes):
        folder = Path(args.data_dir) / "cache"
        self.length, self.empty = args.text_length, common.load_weights(folder / "empty.safetensors")["text"]
        self.names = ("latents", "valid", "arm") if args.eta else ("latents", "valid")
        self.rows = []
        for number, _ in enumerate(tasks(episodes)):
            path = folder / f"{part}_{number:05d}.safetensors"
            with safe_open(path, "pt") as file:
                self.rows += [(path, i) for i in range(len(file.get_tensor("valid")))]

    def get(self, numbers, device, silent=()):
        """-> {name: stacked rows}, and "text", padded with zeros as Wan was trained; of those in `silent`
        (places in the batch) the empty prompt's."""
        batch, texts = {name: [] for name in self.names}, []
        for place, number in enumerate(numbers):
            path, i = self.rows[number]
            with safe_open(path, "pt") as file:
                for name in self.names:
                    batch[name].append(file.get_slice(name)[i])
                texts.append(self.empty if place in silent else file.get_tensor("text"))
        batch = {name: torch.stack(values).to(device) for name, values in batch.items()}
        batch["latents"] = batch["latents"].float()
        return {**batch, "text": common.pad_text(texts, self.length).to(device)}


# ---- evaluate and sample --------------------------------------------------------------------------------

@torch.no_grad()
def read_off(idm, video, device):
    """What the IDM sees in frames n 3 H W in [0, 1] -> actions n 14, soft masks n 1 h w, on the CPU."""
    parts = [idm(some.to(device)) for some in video.split(IDM_CHUNK)]
    return tuple(torch.cat([part[i].float().cpu() for part in parts]) for i in (0, 1))


def to_size(mask, size):
    """Soft masks n 1 h w -> n H W bool at the size of a picture."""
    return F.interpolate(mask, size, mode="bilinear", align_corners=False)[:, 0] >= .5


def region_psnr(video, truth, region):
    """T 3 H W in [0, 1] twice, region T H W bool -> T dB, capped at 60; NaN where the region is empty."""
    error = ((video - truth).double().square().mean(1) * region).flatten(1).sum(1) / region.flatten(1).sum(1)
    return -10 * torch.log10(error.clamp(min=1e-6))


def video_scores(video, truth, arm, valid):
    """T 3 H W in [0, 1] twice, arm T H W bool or None, valid T bool: frames without padding -> {metric:
    mean over frames}, for each second and for all beyond the first (of shorter clips the second half)."""
    rows = {"psnr": common.psnr(video, truth), "ssim": common.ssim(video, truth)}
    if arm is not None:
        rows |= {"psnr_arm": region_psnr(video, truth, arm),
                 "psnr_background": region_psnr(video, truth, ~arm)}
    first, out = min(FPS, (len(video) - 1) // 2), {}
    for name, row in rows.items():
        row = torch.where(valid, row, math.nan)
        out[f"{name}_beyond_1s"] = row[1 + first:].nanmean().item()
        for second, some in enumerate(row[1:].split(FPS), 1):
            out[f"{name}_second_{second}"] = some.nanmean().item()
    return out


def mean_scores(rows):
    return {name: float(np.nanmean([row[name] for row in rows])) if any(
        np.isfinite(row[name]) for row in rows) else math.nan for name in rows[0]}


def imagine(args, run, models, vae, clips, z0, text, state, seed):
    """K candidate videos from a first latent 1 C 1 h w, a text 1 L D and, to rank them, the joints now (14,)
    -> K T 3 H W in [0, 1] with [(actions T 14, masks T 1 h w)] or [], best first."""
    empty = common.pad_text([clips.empty], args.text_length).to(run.device)
    with run.autocast():
        seeds = [seed + 7919 * k for k in range(args.candidates)]
        z = generate(models["model"].dit, z0, text, empty, args, seeds)
    videos = (torch.cat([common.wan_decode(vae, one[None]) for one in z]).cpu() + 1) / 2
    if models["idm"] is None:
        return videos, []
    read = [read_off(models["idm"], video, run.device) for video in videos]
    actions, masks = (torch.stack([part[i] for part in read]) for i in (0, 1))
    mean, std = models["idm"].train_mean.cpu(), models["idm"].train_std.cpu()
    order = implausibility(actions, masks, state, mean - 3 * std, mean + 3 * std).argsort().tolist()
    return videos[order], [read[k] for k in order]


def act(args, run, models, vae, clips, encode_prompt, seed):
    """One simulated world, three ways -> {name: {"open_loop_success", "open_loop_distance"}}: actions that
    the IDM reads off a video imagined from the first view, the expert's, none."""
    size, scores = video_size(args), {}
    world = ArmWorld(seed, size)
    first = from_uint8(torch.from_numpy(world.observe()).movedim(-1, 0))[None, None].to(run.device)
    text = common.pad_text([encode_prompt(full_prompt(world.text, args))], args.text_length).to(run.device)
    state = torch.from_numpy(world.state).float()
    _, read = imagine(args, run, models, vae, clips, common.wan_encode(vae, first), text, state, seed)
    plans = {"model": read[0][0][1:].double().numpy(), "expert": world.expert(args.frames - 1),
             "do_nothing": np.repeat(world.state[None], args.frames - 1, 0)}
    for name, plan in plans.items():
        world = ArmWorld(seed, size)
        success = [world.step(action) for action in plan][-1]
        scores[name] = {"open_loop_success": float(success), "open_loop_distance": world.distance()}
    return scores


def score_episode(args, run, models, vae, clips, number, episode):
    """One held-out episode -> {table: {metric: number}}, {name: (actions read off, true ones)}."""
    window = read_windows(episode, [0], args)[0]
    truth, valid = torch.from_numpy(window["video"]).movedim(-1, 1) / 255, torch.from_numpy(window["valid"])
    actions, tables, pairs = torch.from_numpy(window["actions"]), {}, {}
    arm = None if window["mask"] is None else torch.from_numpy(window["mask"])
    if models["idm"] is not None:
        read, mask = read_off(models["idm"], truth, run.device)
        scores = idm_scores(read, actions, mask, arm)
        tables["mask"] = {name: value for name, value in scores.items() if name.startswith("mask")}
        pairs["real"] = read[valid], actions[valid]
        pairs["mean"] = models["idm"].train_mean.cpu().expand_as(actions)[valid], actions[valid]
        arm = to_size(mask, truth.shape[-2:]) if arm is None else arm
    if models["model"] is not None and number < len(clips.rows):
        batch = clips.get([number], run.device)
        z = batch["latents"]
        videos, read = imagine(args, run, models, vae, clips, z[:, :, :1], batch["text"], actions[0], number)
        decoded = (common.wan_decode(vae, z)[0].cpu() + 1) / 2
        guesses = {"persistence": truth[:1].expand_as(truth), "codec": decoded}
        guesses |= {f"candidate_{k}": video for k, video in enumerate(videos)}
        tables |= {name: video_scores(video, truth, arm, valid) for name, video in guesses.items()}
        pairs["do_nothing"] = actions[:1].expand_as(actions)[valid][1:], actions[valid][1:]
        if read:
            pairs["generated"] = read[0][0][valid][1:], actions[valid][1:]
    return tables, pairs


def evaluate(args, run, models, parts, data):
    """Metrics on episodes that no training saw -> eval.json, curves.png. models: {"model": VideoModel or
    None, "idm": IDM or None}. Processes share episodes and worlds."""
    began, tables, pairs, clips, vae = time.time(), {}, {}, data and data["test"], None
    if models["model"] is not None:
        vae, encode_prompt = load_codec(args, run), text_encoder(args, run)
    most, own = args.eval_clips or None, tasks(parts["test"])
    everyone = list(enumerate(own + [e for e in parts["test"] if e.instruction == PLAY]))
    everyone = everyone[:len(own)][:most] + everyone[len(own):][:most]
    for number, episode in everyone[run.rank::run.world]:
        scores, read = score_episode(args, run, models, vae, clips, number, episode)
        for name, row in scores.items():
            tables.setdefault(name, []).append(row)
        for name, pair in read.items():
            pairs.setdefault(name, []).append(pair)
    if is_simulated(args) and models["model"] is not None and models["idm"] is not None:
        for k in range(run.rank, args.worlds, run.world):
            for name, row in act(args, run, models, vae, clips, encode_prompt, FIRST_WORLD + k).items():
                tables.setdefault(f"world_{name}", []).append(row)
    tables, pairs = (common.gather_rows(rows) for rows in (tables, pairs))
    means = {name: mean_scores(rows) for name, rows in tables.items()}
    for name, rows in pairs.items():
        scores = idm_scores(*(torch.cat(column) for column in zip(*rows)))
        means[name] = {f"action_{metric}": value for metric, value in scores.items()}
    if run.rank == 0:
        report(args, means, len(everyone), time.time() - began)


def report(args, means, episodes, seconds):
    """Writes eval.json, prints it as a table, draws curves.png."""
    row = lambda name: means.get(name, {})
    results = {**row("candidate_0"), **row("world_model"), **row("mask"),
               **{f"{metric}_{name}": value for name in ("real", "generated")
                  for metric, value in row(name).items()}}
    baselines = {name: {**row(name), **row(f"world_{name}")}
                 for name in ("persistence", "codec", "mean", "do_nothing", "expert")}
    baselines = {name: scores for name, scores in baselines.items() if scores}
    metrics = "psnr_arm_beyond_1s", "psnr_beyond_1s", "action_l1_real"
    metric = next(name for name in metrics if name in results)
    baseline = row("persistence").get(metric, row("mean").get("action_l1"))
    candidates = [name for name in means if name.startswith("candidate_")]
    if len(candidates) > 1:
        values = [means[name][metric] for name in candidates]
        results |= {f"{metric}_candidates_{i}": value for i, value in enumerate(values)}
    common.write_json(Path(args.output_dir) / "eval.json", {
        "script": SCRIPT, "preset": args.preset, "data": describe_data(args), "weights": args.weights,
        "seconds": seconds, "headline": {"metric": metric, "value": results[metric], "baseline": baseline,
                                         "lower_is_better": metric == "action_l1_real"},
        "results": results, "baselines": baselines})
    print(f"{episodes} held-out episodes; dB and SSIM beyond the first second")
    shown = [name for name in results if name.endswith("_beyond_1s")]
    print(f"{'':>14}" + "".join(f"{name.removesuffix('_beyond_1s'):>17}" for name in shown))
    for name in ("candidate_0", "persistence", "codec") if shown else ():
        print(f"{name.replace('candidate_0', 'model'):>14}"
              + "".join(f"{means[name][key]:17.3f}" for key in shown))
    for name in ("real", "mean", "generated", "do_nothing"):
        if row(name):
            print(f"actions, {name}: " + ", ".join(f"{key.removeprefix('action_')} {value:.3f}"
                                                   for key, value in row(name).items()))
    for name in ("model", "expert", "do_nothing"):
        if world := row(f"world_{name}"):
            print(f"in {args.worlds} worlds, {name}: success {world['open_loop_success']:.0%}, block "
                  f"{world['open_loop_distance']:.2f} from the plate")
    panels = []
    for stage in ("idm", "."):
        panel = common.loss_panel(Path(args.output_dir) / stage, stage.replace(".", args.stage),
                                  ("loss", "val_loss", "flow_loss", "val_l1"))
        panels += [panel] if panel["lines"] else []
    common.plot_curves(Path(args.output_dir) / "curves.png", panels)


def outlined(video, mask):
    """T 3 H W in [0, 1] with the outline of T H W bool drawn around it, in green -> in [-1, 1]."""
    mask = mask.float()[:, None]
    edge = F.max_pool2d(mask, 3, 1, 1) > mask
    return torch.where(edge, torch.tensor([.1, 1., .3])[:, None, None], video) * 2 - 1


def write_panels(stem, panels, count):
    """{name: video T 3 H W in [-1, 1]}, one above the other -> stem.mp4, and stem.png: `count` frames."""
    T, _, H, _ = next(iter(panels.values())).shape
    some, scale = torch.linspace(0, T - 1, count).round().long(), max(1, 224 // H)
    strip = {name: torch.cat([*video[some]], -1)[None] for name, video in panels.items()}
    return [common.write_video(Path(f"{stem}.mp4"), common.video_grid(panels, scale=scale), FPS),
            common.write_video(Path(f"{stem}.png"), common.video_grid(strip, scale=scale))]


def sample(args, run, models, parts, data):
    """Imagines held-out episodes from their first frame: truth over prediction, with the arm's outline (of
    mask.npz, of the IDM) -> files."""
    if run.rank or models["model"] is None:
        return []
    vae, folder, files = load_codec(args, run), Path(args.output_dir) / "samples", []
    folder.mkdir(exist_ok=True)
    for number, episode in enumerate(tasks(parts["test"])[:args.num_samples]):
        window, batch = read_windows(episode, [0], args)[0], data["test"].get([number], run.device)
        state = torch.from_numpy(window["actions"][0])
        videos, read = imagine(args, run, models, vae, data["test"], batch["latents"][:, :, :1],
                               batch["text"], state, args.seed + number)
        truth = torch.from_numpy(window["video"]).movedim(-1, 1) / 255
        panels = {"truth": truth * 2 - 1, "prediction": videos[0] * 2 - 1}
        if window["mask"] is not None:
            panels["truth"] = outlined(truth, torch.from_numpy(window["mask"]))
        if read:
            panels["prediction"] = outlined(videos[0], to_size(read[0][1], truth.shape[-2:]))
            np.save(folder / f"{episode.id}_actions.npy", read[0][0].numpy())
        files.append(common.write_video(folder / f"{episode.id}_prediction.mp4", videos[0] * 2 - 1, FPS))
        files += write_panels(folder / episode.id, panels, 6)
    return files


# ---- shared:flags (identical in all scripts, checked by test_smoke.py) ----------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; {self.prog} --help lists the flags")


def add_shared_flags(parser, presets):
    add = parser.add_argument_group("run").add_argument
    add("--preset", choices=["auto", *presets], default="auto", help="auto: the second one where possible")
    add("--sample", action="store_true", help="write videos from the newest checkpoint")
    add("--eval", action="store_true", help="measure the newest checkpoint on held-out data")
    add("--dry_run", action="store_true", help="print parameters, FLOPs and memory, then exit")
    add("--data_dir", help="where the data lies")
    add("--output_dir", default=f"runs/{SCRIPT}", help="where the run is written")
    add("--resume", default="auto", metavar="auto|none|PATH",
        help="auto: output_dir's newest; PATH: of a run or checkpoint, which output_dir follows if not given")
    add("--seed", type=int, default=0, help="all randomness is a function of (seed, step)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda, mps, cpu")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bf16 if in hardware")
    add = parser.add_argument_group("optimisation").add_argument
    add("--max_steps", type=int, default=1000, help="optimiser steps in total, resumed ones included")
    add("--batch_size", type=int, default=16, help="samples per process and micro-step")
    add("--grad_accum", type=int, default=1, help="micro-steps per optimiser step")
    add("--lr", type=float, default=1e-4, help="peak learning rate")
    add("--warmup_steps", type=int, default=100, help="steps of linear warm-up; cosine decay follows")
    add("--weight_decay", type=float, default=1e-2, help="AdamW's")
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm (0: no clipping)")
    add("--beta2", type=float, default=0.999, help="AdamW's")
    add("--ema_decay", type=float, default=0.999, help="of the weights that sampling uses (0: no averaging)")
    add = parser.add_argument_group("machine and records").add_argument
    add("--compile", action="store_true", help="torch.compile the model")
    add("--fsdp", action="store_true", help="shard weights and optimiser over torchrun's processes")
    add("--grad_checkpoint", action="store_true", help="recompute activations: less memory, more time")
    add("--log_every", type=int, default=10, help="steps between rows of metrics.jsonl (0: none)")
    add("--eval_every", type=int, default=250, help="steps between validations (0: none)")
    add("--save_every", type=int, default=250, help="steps between checkpoints (0: only the last)")
    add("--keep_last", type=int, default=3, help="checkpoints to keep (0: all)")
    add("--tensorboard", action="store_true", help="also write TensorBoard events")
    add("--wandb", metavar="PROJECT", help="also log to this Weights & Biases project")


def parse_args(argv=None):
    """Command line over preset over default. args.given: the flags that the command line names."""
    parser, unset = build_parser(), object()
    preset = parser.parse_args(argv).preset
    args = argparse.Namespace(why_preset="from the command line")
    if preset == "auto":
        preset, args.why_preset = common.auto_preset(PRESETS, vars(parser.parse_args(argv)), **PAPER_NEEDS)
    flags = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    args.given = {name for name, value in vars(parser.parse_args(argv, flags)).items() if value is not unset}
    parser.set_defaults(**PRESETS[preset])
    parser.parse_args(argv, args).preset = preset
    if args.resume not in ("auto", "none") and "output_dir" not in args.given:
        args.output_dir = str(common.run_folder(args.resume))
    return args


def check_numbers(args, least_1=(), least_0=(), shares=()):
    """UserError, one line, for a value of the shared flags and of those named that no run can mean. NaN is
    neither at least 1, nor at least 0, nor a share, which is in [0, 1]."""
    for name in ("batch_size", "grad_accum", "max_steps", *least_1):
        if not getattr(args, name) >= 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("seed", "lr", "warmup_steps", "weight_decay", "grad_clip", "log_every", "eval_every",
                 "save_every", "keep_last", *least_0):
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name} must not be negative, but is {getattr(args, name)}")
    for name in ("ema_decay", "beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name} must be in [0, 1), not {getattr(args, name)}")
    for name in shares:
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} must be in [0, 1], not {getattr(args, name)}")


def adopt(args, saved, locked, source):
    """A checkpoint's own flags fill in what the command line leaves unsaid; `locked` ones must agree."""
    own = {"output_dir", "resume", "sample", "eval", "dry_run", "device", "dtype", "fsdp", "compile"}
    for name, value in saved.items():
        if name in args.given & set(locked) and getattr(args, name) != value:
            raise UserError(f"--{name} {getattr(args, name)} does not fit {source}, trained with {value}: "
                            f"leave it out, or start anew in another --output_dir")
        if name not in args.given | own and hasattr(args, name):
            setattr(args, name, value)
            args.why_preset = "from the checkpoint" if name == "preset" else args.why_preset


def public_flags(args):
    """The flags as JSON: what args.json and checkpoints keep."""
    return {name: value for name, value in vars(args).items() if name not in ("given", "why_preset")}
# end shared:flags


# ---- shared:dist (identical in all scripts, checked by test_smoke.py) -----------------------------------

class Run:
    """Where this process stands: rank, world, device, autocast dtype, whether SIGTERM asked it to stop."""
    def __init__(self, args):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        kind, cuda = args.device, torch.cuda.is_available()
        if kind == "auto":
            alone = self.world == 1              # gloo, which joins processes without CUDA, has no MPS
            kind = "cuda" if cuda else "mps" if alone and torch.backends.mps.is_available() else "cpu"
        if kind == "cuda" and not cuda:
            raise UserError("--device cuda: there is no CUDA device here; use --device cpu")
        if args.fsdp and self.world == 1:
            raise UserError("--fsdp shards over processes: start it with torchrun --nproc_per_node=N")
        self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        units = torch.cpu.get_capabilities()     # without hardware for it, bf16 is 3 to 4 times slower
        fast = kind == "cuda" or kind == "cpu" and (units.get("avx512_bf16") or units.get("amx_bf16"))
        auto = torch.bfloat16 if fast else torch.float32
        self.dtype = auto if args.dtype == "auto" else getattr(torch, args.dtype)
        self.stop = False

    def heed_sigterm(self, heed):
        """In the training loop SIGTERM is noted until the step is saved; elsewhere it ends the process."""
        signal.signal(signal.SIGTERM, (lambda *_: setattr(self, "stop", True)) if heed else signal.SIG_DFL)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def stopping(self):
        """Whether any process was asked to stop: a CPU all-reduce, for which no GPU has to be waited for."""
        flag = torch.tensor(float(self.stop))
        if self.world > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def close(self):
        if self.world > 1:
            dist.destroy_process_group()


def get_lr(step, peak, warmup, total):
    """Learning rate of a step, counted from 0: linear warm-up, then cosine decay to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
# end shared:dist


# ---- parallel wrap --------------------------------------------------------------------------------------

def wrap(model, args, run):
    """FSDP2 with --fsdp, a block a unit; DDP under torchrun, and for the IDM; otherwise the module itself.

    Weights, gradients and moments are fp32, blocks compute in bf16. Inputs are not cast by FSDP: timesteps
    and rope's tables have to stay fp32. The root is resharded after forward as the blocks are: by default it
    stays gathered until a backward, and the step after a validation would compute with the averages."""
    blocks = model.dit.blocks if isinstance(model, VideoModel) else []
    if args.compile:
        for block in blocks:
            block.compile()
    if args.fsdp and blocks:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(run.device.type, (run.world,))
        policy = MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
                           reshard_after_forward=True)
    if run.world > 1:
        ids = [run.device] if run.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, forward_sync_buffers=False,
                                                   find_unused_parameters=isinstance(model, IDM))
    return model


# ---- shared:fit (identical in all scripts, checked by test_smoke.py) ------------------------------------

def fill_moments(optimizer):
    """Gives AdamW the moments that it makes at a parameter's first gradient. A checkpoint from before that
    gradient would lack them, and torch's loader would then count the parameter one step too far."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                                      "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def fit(args, run, folder, model, losses, validate, found, steps, lr, trained_only=True, **more):
    """Trains what requires grad of `model` to `steps`, on from checkpoint `found`; then it has the averages.

    losses(model, step, micro) -> loss of a micro-batch and parts of it: {name: a number or one per sample},
    whose means since the last row, without NaN, go to metrics.jsonl. validate(model) -> {name: number}.
    Checkpoints hold what is trained (a LoRA's 1 GB, not its model's 29), without trained_only what is frozen
    too, and `more`, {name: state dict}. Call it on all ranks.
    """
    model = wrap(model, args, run)
    trained = [p for p in model.parameters() if p.requires_grad]
    keep = (lambda p: p.detach().clone()) if args.ema_decay else (lambda p: p.detach())
    averages = [keep(p) for p in trained]
    optimizer = torch.optim.AdamW(trained, lr, betas=(.9, args.beta2), weight_decay=args.weight_decay,
                                  fused=True)
    fill_moments(optimizer)
    start = 0
    if found:
        path, state, saved = found
        common.restore_state(model, state["ema"], source=str(path), trained_only=trained_only)
        averages = [keep(p) for p in trained]
        common.restore_state(model, state["model"], optimizer, state["optimizer"], str(path), trained_only)
        start = saved["step"]
    name = SCRIPT if folder == Path(args.output_dir) else f"{SCRIPT} {folder.name}"
    log = common.Log(folder, name, start, steps, run.rank, args.tensorboard, args.wandb, public_flags(args))
    run.barrier()                                # rank 0 has removed what lies beyond `start`
    clock, logged, sums = time.time(), start, {}
    run.heed_sigterm(True)
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, lr, args.warmup_steps, steps)
        model.train()
        for micro in range(args.grad_accum):     # processes average their gradients at the last one only
            hold = micro < args.grad_accum - 1 and hasattr(model, "no_sync")
            with model.no_sync() if hold else contextlib.nullcontext():
                loss, parts = losses(model, step, micro)
                (loss / args.grad_accum).backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                sum_and_count = torch.stack([value.nansum(), (~value.isnan()).sum()])
                sums[name] = sums.get(name, 0) + sum_and_count
        norm = nn.utils.clip_grad_norm_(trained, args.grad_clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        done, stop = step + 1, run.stopping()
        logging = args.log_every and done % args.log_every == 0
        saving = stop or done == steps or args.save_every and done % args.save_every == 0
        # All processes see the same norm, so they stop together. CUDA looks only where it has to wait anyway.
        if (logging or saving or run.device.type != "cuda") and not torch.isfinite(norm):
            last = common.latest_checkpoint(folder / "ckpt")
            raise UserError(f"loss or gradient is not finite at step {done}: the last good checkpoint is "
                            f"{last or 'none'}; go on from there with a lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(args.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averages, [p.detach() for p in trained], 1 - decay)
        if logging:
            means = {name: common.all_mean(pair).tolist() for name, pair in sums.items()}
            log.row(done, **{name: total / count for name, (total, count) in means.items() if count},
                    lr=optimizer.param_groups[0]["lr"], grad_norm=norm.item(),
                    seconds_per_step=(time.time() - clock) / (done - logged))
            clock, logged, sums = time.time(), done, {}
        log.bar.update()
        if saving:                               # before validation: what fails there loses nothing
            weights, moments = common.gather_state(model, optimizer, trained_only=trained_only)
            with common.swapped(trained, averages):
                averaged, _ = common.gather_state(model, trained_only=trained_only)
            if run.rank == 0:
                state = {"model": weights, "ema": averaged, "optimizer": moments, **more}
                common.save_checkpoint(folder / "ckpt", done, state,
                                       {"script": SCRIPT, "args": public_flags(args)}, args.keep_last)
            run.barrier()
        if stop:
            raise UserError(f"stopped by SIGTERM after step {done}, which is saved: the same command goes on")
        if args.eval_every and (done % args.eval_every == 0 or done == steps):
            with common.swapped(trained, averages), torch.no_grad():
                model.eval()
                log.row(done, **validate(model))
            clock = time.time()
    run.heed_sigterm(False)
    log.bar.close()
    with torch.no_grad():
        for p, average in zip(trained, averages):
            p.copy_(average)
# end shared:fit


# ---- train ----------------------------------------------------------------------------------------------

def draw_batch(args, run, clips, step, micro):
    """Windows, noise levels and noise of a micro-batch, a function of (seed, step) and of a sample's place in
    the whole batch; some of the samples have the empty prompt."""
    seed = common.seed_all(args.seed, 1, step)
    kinds = {"window": ("randint", len(clips.rows)), "u": ("rand",), "noise": ("randint", 2 ** 62),
             "drop": ("rand",)}
    numbers = common.draw(kinds, seed, args.batch_size, run.rank, run.world, micro, args.grad_accum)
    silent = (numbers["drop"] < args.cfg_drop).nonzero().flatten().tolist()
    batch = clips.get(numbers["window"].tolist(), run.device, silent)
    noise = torch.cat([fixed_noise(batch["latents"][:1], n) for n in numbers["noise"].tolist()])
    return batch, noise, shift_sigma(numbers["u"], args.shift).to(run.device)


def video_stage(args, run, data):
    """-> VideoModel, and what fit needs of it: losses, validate."""
    held = data["val"]

    def losses(model, step, micro):
        batch = draw_batch(args, run, data["train"], step, micro)
        with run.autocast():
            return model(*batch)

    def validate(model):
        values = []
        for i in range(len(held.rows)):
            batch = held.get([i], run.device)
            noise = fixed_noise(batch["latents"], i)
            with run.autocast():
                loss, _ = model(batch, noise, torch.full((1,), .5, device=run.device))
            values.append(loss.item())
        return {"val_loss": float(np.mean(values))}

    return make_video_model(args, run), losses, validate


def same_statistics(idm, run):
    """Batch norm's means and variances of all processes are rank 0's, which a checkpoint has."""
    for buffer in idm.buffers() if run.world > 1 else ():
        dist.broadcast(buffer, 0)


def idm_stage(args, run, frames):
    """-> IDM with the statistics of the training actions, and what fit needs of it.

    Outside --mask_steps the regressor learns alone, which is four times as fast: first on whole pictures, at
    last on what a mask leaves that stays as it is. Colours are changed in half of the pictures of real
    robots, more and more as training goes on.
    """
    torch.manual_seed(args.seed)
    model = IDM(idm_config(args))
    nn.init.constant_(model.model.mask_model.out.bias, .3)   # open: a closed mask gives itself no gradient
    pictures, actions = frames["train"]
    model.set_statistics(actions)
    first, last = map(int, args.mask_steps.split(","))
    take = lambda file, numbers: torch.tensor(file[numbers]).to(run.device) / 255

    def cut_by(own, x, step):
        """The masks of pictures in which the mask does not learn; None where it does."""
        if step < first:
            return torch.ones(len(x), 1, 1, 1, device=run.device)
        if not last or step < last:
            return None
        if step == last:
            same_statistics(own, run)
        own.model.mask_model.eval()
        return (own.arm(x) >= .5).float()

    def losses(model, step, micro):
        kinds = {"frame": ("randint", len(actions)), "coin": ("rand",), "colour": ("rand", 4)}
        seed = common.seed_all(args.seed, 2, step)
        numbers = common.draw(kinds, seed, args.batch_size, run.rank, run.world, micro, args.grad_accum)
        if first <= step < last:                 # a picture costs four times as much, and a mask wants steps
            numbers = {name: value[:math.ceil(len(value) / 4)] for name, value in numbers.items()}
        x, jitter = take(pictures, numbers["frame"].numpy()), numbers["coin"] < args.idm_jitter
        if jitter.any():
            colour = numbers["colour"][jitter].to(run.device)
            x[jitter] = colour_jitter(x[jitter], colour, step / args.max_steps)
        own = model.module if hasattr(model, "module") else model
        target = actions[numbers["frame"]].to(run.device)
        with run.autocast():
            y, mask = model(x, cut_by(own, x, step))
        loss = idm_loss(own.normalize(y), own.normalize(target), mask, args.mask_weight)
        return loss, {"mask_area": mask.detach().mean()}

    def validate(model):
        own = model.module if hasattr(model, "module") else model
        same_statistics(own, run)
        held, truth = frames["val"]
        some = np.linspace(0, len(held) - 1, min(len(held), 1000)).round().astype(int)
        truth = truth[some]
        with run.autocast():
            read = [own(take(held, some[i:i + IDM_CHUNK])) for i in range(0, len(some), IDM_CHUNK)]
        read, mask = (torch.cat([part[i].cpu() for part in read]) for i in (0, 1))
        normal = [own.normalize(actions.to(run.device)) for actions in (read, truth)]
        scores = {"loss": idm_loss(*normal, mask, args.mask_weight).item(), **idm_scores(read, truth, mask)}
        return {f"val_{name}": value for name, value in scores.items()}

    return model.to(run.device), losses, validate


def run_stage(args, run, stage, folder, data, found=None, only=False):
    """One stage of training, none where `found` has all steps or `only` it counts -> VideoModel or IDM with
    the weights that are exported. data: {part: Windows}, of the IDM {part: (frames, actions)}."""
    if stage == "idm":                           # without averages: batch norm's statistics are not averaged
        args = argparse.Namespace(**{**vars(args), "lr": args.idm_lr, "max_steps": args.idm_steps,
                                     "batch_size": args.idm_batch_size, "warmup_steps": args.idm_steps // 10,
                                     "grad_accum": 1, "weight_decay": 1e-2, "ema_decay": 0., "fsdp": False})
    model, losses, validate = (idm_stage if stage == "idm" else video_stage)(args, run, data)
    if found and (only or found[2]["step"] >= args.max_steps):
        common.restore_state(model, found[1]["ema"], source=str(found[0]), trained_only=True)
        return model.eval()
    fit(args, run, folder, model, losses, validate, found, args.max_steps, args.lr)
    if stage == "idm":
        same_statistics(model, run)
    export(args, run, model, stage, folder)
    if args.fsdp:                                # for evaluation each process has a whole model
        weights, _ = common.gather_state(model, everywhere=True)
        model = make_video_model(args, run)
        common.restore_state(model, weights, source="this run")
    return model.eval()


def find_idm(args):
    """The checkpoint from which the IDM's training goes on, beside stage 1's own."""
    folder = Path(args.output_dir) / "idm/ckpt"
    return common.find_checkpoint(folder, SCRIPT, "none" if args.resume == "none" else "auto")


class IDMBeside:
    """The IDM's stage in another process, with half of the cores and its words in idm/log.txt. In a thousand
    small calls one core waits for the other: side by side, two small networks train in two thirds of the time
    that they need one after the other."""
    def __init__(self, args, parts):
        self.log, self.threads = Path(args.output_dir) / "idm/log.txt", torch.get_num_threads()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        half = max(1, self.threads // 2)
        self.process = multiprocessing.get_context("spawn").Process(
            target=self.work, args=(args, parts, half), daemon=True)
        print(f"the IDM trains beside the video model: {self.log}", flush=True)
        self.process.start()
        torch.set_num_threads(half)

    @staticmethod
    def work(args, parts, threads):
        folder, parent = Path(args.output_dir) / "idm", multiprocessing.parent_process()
        with open(folder / "log.txt", "w") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()     # die with it
        torch.set_num_threads(threads)
        run = Run(args)
        sys.exit(common.one_line_errors(f"{SCRIPT}.py", lambda: run_stage(
            args, run, "idm", folder, build_frames(args, run, parts), find_idm(args))))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()                 # it saves its step
        self.process.join()
        torch.set_num_threads(self.threads)

    def wait(self, args):
        """-> the IDM. UserError with the process's last error where it failed."""
        self.process.join()
        if self.process.exitcode:
            last = re.findall(".*error.*", self.log.read_text(), re.I)[-1:] or ["killed"]   # W&B says more
            raise UserError(f"the IDM beside it was not trained, the same command goes on: {last[0][-200:]}")
        return load_idm(self.log.parent / "final/idm.pt", idm_config(args))


def run_stages(args, run, parts, found, only=False):
    """What --stage asks for, each stage going on from its own checkpoint
    -> {"model": VideoModel or None, "idm": IDM or None}, {part: Windows} or None."""
    folder = Path(args.output_dir)
    if run.rank == 0 and not only:
        common.write_json(folder / "args.json", {**public_flags(args), **common.provenance()})
        if args.vidar and args.stage != "idm":
            check_vidar(args)
    fit_codec(args, run, parts)
    idm = load_idm(args.idm, idm_config(args)).to(run.device) if args.idm else None
    if args.stage == "idm":
        idm = run_stage(args, run, "idm", folder, build_frames(args, run, parts), found, only)
        return {"model": None, "idm": idm}, None
    aside = False
    if args.stage == "all" and idm is None:
        frames, before = build_frames(args, run, parts), find_idm(args)
        done = before and (only or before[2]["step"] >= args.idm_steps)
        needed = args.eta and not masks_known(parts)
        aside = not (done or needed) and run.device.type == "cpu" and run.world == 1
        if not aside:
            idm = run_stage(args, run, "idm", folder / "idm", frames, before, only and bool(before))
    build_cache(args, run, parts, idm)
    data = {part: Windows(args, part, episodes) for part, episodes in parts.items()}
    if run.rank == 0:
        print(", ".join(f"{part}: {len(clips.rows)} windows of {len(tasks(parts[part]))} episodes"
                        for part, clips in data.items()))
    with IDMBeside(args, parts) if aside else contextlib.nullcontext() as beside:
        model = run_stage(args, run, "video", folder, data, found, only)
        idm = beside.wait(args) if beside else idm
    return {"model": model, "idm": idm}, data


def prepare(args, run):
    """Episodes (simulated for the tiny preset's own folder) -> {part: [Episode]}."""
    if run.rank == 0 and args.preset == "tiny" and args.data_dir == PRESETS["tiny"]["data_dir"]:
        simulate(args.data_dir, args.sim_episodes, args.sim_poses, args.sim_frames, video_size(args), 0)
    run.barrier()
    return load_parts(args.data_dir)


def dry_run(args):
    """Prints what stage 1 costs, from the meta device: nothing is allocated, nothing is read."""
    from torch.utils.flop_counter import FlopCounterMode
    run, B = argparse.Namespace(device=torch.device("meta")), args.batch_size
    own = argparse.Namespace(**{**vars(args), "random_init": True, "vidar": None})
    gpus, _ = MACHINES.get(args.preset, (1, 0))
    world = int(os.environ.get("WORLD_SIZE", gpus))
    side = codec_side(args)
    with torch.device("meta"):
        model = make_video_model(own, run)
        config, (H, W) = model.dit.config, video_size(args)
        z = torch.randn(B, config.in_channels, (args.frames - 1) // 4 + 1, H // side, W // side)
        batch = {"latents": z, "valid": torch.ones(B, z.shape[2], dtype=torch.bool), "arm": z[:, :1],
                 "text": torch.randn(B, args.text_length, config.text_dim)}
        sigma = torch.rand(B)

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=args.model != "tiny"):
            return model(batch, z, sigma)[0]

    tokens = z[0, 0].numel() // 4
    with FlopCounterMode(display=False) as counter:        # sees what the report's own counter sees
        print(common.dry_run_report("stage 1", model, loss, B, tokens, world, args.fsdp))
    flops = counter.get_total_flops() / B
    print(f"  {flops / 1e12:.3g} TFLOP per sample; GiB per GPU, and time at 40 % of an H100's or H200's 989 "
          f"TFLOP/s:")
    P, D = common.count_params(model), config.num_attention_heads * config.attention_head_dim
    for preset, (gpus, room) in MACHINES.items() if args.model != "tiny" else ():
        micro = PRESETS[preset]["batch_size"]
        states, ema = 16 * P / gpus / 2 ** 30, 4 * P / gpus / 2 ** 30
        inputs, block = 2 * micro * config.num_layers * tokens * D / 2 ** 30, 2.7 / 2 * micro * tokens / 9660
        seconds = EFFECTIVE_BATCH * flops / gpus / (.4 * 989e12)
        print(f"    {preset:>8}: weights, gradients, moments {states:5.1f} + EMA {ema:4.1f} + block inputs "
              f"{inputs:4.1f} + a block's own {block:4.1f} = {states + ema + inputs + block:5.1f} of {room}; "
              f"{seconds:6.1f} s a step of {EFFECTIVE_BATCH}, {seconds * args.max_steps / 3600:.1f} h in all")


# ---- main -----------------------------------------------------------------------------------------------

def is_simulated(args):
    manifest = Path(args.data_dir) / "manifest.json"
    return manifest.is_file() and "simulated" in json.loads(manifest.read_text())


def describe_data(args):
    simulated = ", SIMULATED by this script" if is_simulated(args) else ""
    return f"{args.data_dir}{simulated}, {args.size.replace(',', 'x')}, {args.frames} frames at {FPS} fps"


def work(args):
    folder = Path(args.output_dir)
    only = args.sample or args.eval
    found = None if args.dry_run else common.find_checkpoint(
        folder / "ckpt", SCRIPT, args.resume, train=not only)
    if found:
        adopt(args, found[2]["args"], ("preset", *MODEL_FLAGS), str(found[0]))
    check_args(args)
    if args.dry_run:
        return dry_run(args)
    run = Run(args)
    args.weights = args.vidar or args.weights_from + " shape, RANDOM weights" * args.random_init
    if args.model == "tiny" and not args.vidar:
        args.weights = "tiny ones that the run trains, on a LINEAR codec instead of a VAE"
    if run.rank == 0:
        there = "" if Path(args.data_dir).exists() else " (not there yet)"
        going_on = f", going on from {found[0]}" if found else ""
        print(f"{SCRIPT}: preset {args.preset} ({args.why_preset}), data {args.data_dir}{there}, weights "
              f"{args.weights}, stage {args.stage}{going_on}, {run.world} x {run.device.type} "
              f"{str(run.dtype)[6:]}")
    if only and not found:
        if "output_dir" in args.given:
            raise UserError(f"no checkpoint in {folder}/ckpt: first python {SCRIPT}.py --output_dir {folder}")
        if run.rank == 0:
            print(f"no checkpoint in {folder}/ckpt: training preset {args.preset} first"
                  + (", about 10 minutes on 2 cores" if args.preset == "tiny" else ""))
    if run.rank == 0:
        common.copy_stages(found, folder, ["idm"])
    parts = prepare(args, run)
    models, data = run_stages(args, run, parts, found, only and bool(found))
    written = []
    if args.eval or not only:
        evaluate(args, run, models, parts, data)
        written = [f"{folder}/eval.json", f"{folder}/curves.png"]
    if args.sample or not only:
        written += sample(args, run, models, parts, data)
    if run.rank == 0:
        common.show_results(folder, written, args.tensorboard, args.wandb)
        print("wrote " + ", ".join(written))
    run.barrier()
    run.close()


def main(argv=None):
    return common.one_line_errors(f"{SCRIPT}.py", lambda: work(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
