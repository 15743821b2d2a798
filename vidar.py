"""vidar.py: a video model that shows how a robot does a task, and the joint positions that its frames show.

Papers      Vidar (arXiv:2507.12898), stage 1 of Vidarc (arXiv:2512.17661), on Wan2.2-TI2V-5B
            (arXiv:2503.20314). Masks and random poses: AnyPos (arXiv:2507.12768).
Equations   Eq. 1  x_t = t x_1 + (1 - t) x_0, |v - (x_0 - x_1)|^2          -> add_noise, flow_loss
            with x_1 the data z, x_0 the noise eps and t rising towards the data. Wan's noise level falls:
            sigma = 1 - t, x = (1 - sigma) z + sigma eps, timestep 1000 sigma. The target eps - z is
            dx/dsigma, which is minus dx/dt.
            Eq. 4  Huber(a' - a) + lambda |m|_1                            -> IDM, idm_loss
            Eq. 7  |(1 + eta U) (v - (x_0 - x_1))|^2, U the IDM's mask     -> flow_loss, arm_to_latent
            The first latent frame is given: clean, timestep 0, no loss    -> add_noise, VideoModel
            UniPC of order 2 from noise to video                           -> generate
Run         python vidar.py                          # simulate, train, evaluate: 9 to 14 min on 2 CPU cores
            python vidar.py --sample --num_samples 3                              # or --eval
            torchrun --nproc_per_node=8 vidar.py --preset ti2v_5b --fsdp --stage idm --output_dir runs/idm
            torchrun --nproc_per_node=8 vidar.py --preset ti2v_5b --fsdp --idm runs/idm/final/idm.pt
            python vidar.py --preset ti2v_5b --global_batch 1 --batch_size 1 --max_steps 100     # one GPU
Data        data/vidar/: prepare.py simulates a robot or converts RoboTwin, LeRobot and ALOHA sets;
            episodes.py has the layout and reads it.
Shapes      B batch  T frames  F = (T - 1) / 4 + 1 latent frames  C latent channels  H W pixels  h w latent
            cells  N = F h/2 w/2 tokens  D width  L text tokens. Videos are B T 3 H W in [-1, 1], for metrics
            and the IDM in [0, 1]. Actions T 14 are what frame t shows: 0-5 left joints in radians, 6 left
            gripper (1 open), 7-12 right joints, 13 right gripper.
"""
import argparse
import functools
import json
import math
import os
import re
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import UserError, at_least, between, expand_to, from_uint8, to_uint8
from data.vidar import episodes as robot_data
from data.vidar.episodes import ACTION_DIM, FPS, idm_scores, resize, tasks, video_scores

SCRIPT = "vidar"
IDM_CHUNK = 32                           # frames that the IDM takes at a time in evaluation

# ---- presets and flags ----------------------------------------------------------------------------------

PRESETS = {
    # mask_weight: with .003 the mask would close after more steps than these; .06 passes only a few points.
    "tiny": dict(
        model="tiny", stage="all", data_dir="data/vidar/simulated", height=112, width=96, frames=33,
        prompt_views="none", windows=3, text_length=64, batch_size=2, global_batch=0, max_steps=1650, lr=3e-3,
        warmup_steps=50, ema_decay=.99, eta=3., shift=8.0, sample_shift=.25, num_inference_steps=2,
        guidance_scale=1., idm_steps=2000, idm_lr=3e-3, idm_batch_size=32, idm_frames=12, idm_generated=600,
        mask_weight=.01, cfg_drop=0., eval_every=500, save_every=500, eval_clips=24),
    # Table 5 of the paper. Any number of GPUs: gradients are accumulated to 128 samples.
    "ti2v_5b": dict(data_dir="data/robotwin", max_steps=14000, lr=2e-5, batch_size=8, warmup_steps=200,
                    weight_decay=.1, grad_checkpoint=True, save_every=500, eval_every=500),
}
TINY = {
    "transformer": {"num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 16, "out_channels": 16,
                    "text_dim": 32, "freq_dim": 64, "ffn_dim": 384, "num_layers": 4},
}
CODEC_RIDGE = 3e4                        # of the tiny codec: less leaves a faint pattern on the plain table
# These shape the weights or give them their meaning: a checkpoint's values hold.
MODEL_FLAGS = ("model", "stage", "text_length", "height", "width")
# The cache depends on these and on the data set's files.
CACHE_FLAGS = ("model", "weights_from", "random_init", "height", "width", "frames", "windows", "prompt_views",
               "text_length", "idm_frames")


def add_stage_flags(parser):
    """Flags that vidarc.py has as well."""
    add = parser.add_argument_group("data").add_argument
    add("--height", type=at_least(16), default=736, help="pixels of the mosaic, a multiple of 32")
    add("--width", type=at_least(16), default=640, help="pixels of the mosaic, a multiple of 32")
    add("--frames", type=at_least(5), default=81, help="frames of a window at 10 fps, 4k + 1")
    add("--windows", type=at_least(1), default=4, help="cached windows of each training episode")
    add("--prompt_views", choices=["rear", "front", "high", "none"], default="rear",
        help="head camera named in the prompt's prefix (none: no prefix)")
    add = parser.add_argument_group("model and loss").add_argument
    add("--model", choices=["ti2v_5b", "tiny"], default="ti2v_5b", help="tiny: the same classes, small")
    add("--weights_from", default="Wan-AI/Wan2.2-TI2V-5B-Diffusers", metavar="FOLDER|HUB_ID",
        help="diffusers folder, hub id, or folder with the official files")
    add("--vidar", metavar="FILE", help="vidar.pt or vidarc.pt: weights to start from instead of Wan's")
    add("--idm", metavar="FILE", help="idm.pt: a trained inverse dynamics model")
    add("--random_init", action="store_true", help="random weights in Wan's shape, to measure speed")
    add("--text_length", type=at_least(1), default=512, help="tokens of a prompt, padding included")
    add("--shift", type=at_least(1e-3, float), default=5.0, help="shift of training's noise levels")
    add("--cfg_drop", type=between(0, 1), default=.1, help="share of training samples with an empty prompt")
    add("--global_batch", type=at_least(0), default=128, help="samples per step, sets --grad_accum (0: no)")
    add("--cpu_offload", action="store_true", help="with --fsdp: keep weights and optimizer on the CPU")
    add = parser.add_argument_group("sampling and evaluation").add_argument
    add("--sample_shift", type=at_least(1e-3, float), default=5.0, help="shift of the sampler's noise levels")
    add("--eval_clips", type=at_least(0), default=0, help="held-out episodes of --eval (0: all)")
    add("--num_samples", type=at_least(1), default=3, help="videos to sample: 3 are best, median and worst")
    return parser


def build_parser():
    parser = add_stage_flags(common.Parser(SCRIPT, PRESETS, __doc__.split("\n")[0]))
    add = parser.add_argument_group("stage 1").add_argument
    add("--stage", choices=["video", "idm", "all"], default="video", help="what to train; all: video, idm")
    add("--eta", type=at_least(0, float), default=0., help="weight of the arms in the loss (Eq. 7)")
    add("--num_inference_steps", type=at_least(1), default=20, help="sampler steps per video")
    add("--guidance_scale", type=at_least(0, float), default=5.0, help="classifier-free guidance (1: none)")
    add("--idm_steps", type=at_least(1), default=60000, help="optimizer steps of the IDM; 10 % are warm-up")
    add("--idm_lr", type=at_least(0, float), default=5e-4, help="peak learning rate of the IDM (0: --lr)")
    add("--idm_batch_size", type=at_least(1), default=16, help="frames per process and micro-step of the IDM")
    add("--idm_frames", type=at_least(1), default=64, help="frames of each episode that the IDM learns from")
    add("--idm_generated", type=at_least(0), default=0,
        help="training windows, denoised by the video model, that the IDM learns from as well")
    add("--mask_weight", type=at_least(0, float), default=3e-3, help="lambda of Eq. 4")
    return parser


def parse_args(argv=None):
    """-> flags, checkpoint or None, the reason for the preset."""
    get_data = "python data/vidar/prepare.py --from robotwin SRC data/robotwin"
    args, checkpoint, why_preset = common.parse_args(build_parser(), argv, MODEL_FLAGS, get_data=get_data)
    check_flags(args)
    return args, checkpoint, why_preset


def check_flags(args):
    """Raises UserError for flags that do not fit together."""
    side = 2 * codec_side(args)                  # Wan's patch is 2 latent cells
    if args.height % side or args.width % side:
        raise UserError(f"--height {args.height} and --width {args.width} must be multiples of {side}")
    if args.frames % 4 != 1:
        raise UserError(f"--frames must be 4k + 1, not {args.frames}: Wan's VAE packs fours after the first")
    if args.fsdp and "WORLD_SIZE" not in os.environ:
        raise UserError("--fsdp shards over processes: start it with torchrun --nproc_per_node=N")
    if args.cpu_offload and not args.fsdp:
        raise UserError("--cpu_offload moves sharded weights: add --fsdp")
    if args.fsdp and getattr(args, "stage", None) == "all" and args.idm_generated:
        raise UserError("--idm_generated needs the whole model on each process: leave out --fsdp")
    if not (args.sample or args.eval or args.dry_run):
        accumulation(args, args.batch_size)


def accumulation(args, batch_size):
    """Micro-steps of an optimizer step of --global_batch samples; without it --grad_accum."""
    samples = batch_size * int(os.environ.get("WORLD_SIZE", 1))
    if args.global_batch % samples:
        raise UserError(f"--global_batch {args.global_batch} is not a multiple of {samples}, the samples of "
                        f"all processes: choose another --batch_size")
    return args.global_batch // samples or args.grad_accum


# ---- model: the video model -----------------------------------------------------------------------------

def add_noise(z, noise, sigma):
    """x = (1 - sigma) z + sigma eps, with latent frame 0, the given image, left clean.
    z, noise B C F h w, sigma B -> x, and sigma of every latent frame B F."""
    x = (1 - expand_to(sigma, z)) * z + expand_to(sigma, z) * noise
    levels = sigma[:, None].repeat(1, z.shape[2])
    levels[:, 0] = 0
    return torch.cat([z[:, :, :1], x[:, :, 1:]], dim=2), levels


def run_backbone(dit, x, t, text):
    """diffusers' own forward with a timestep per token: x B C F h w, t B F (0 to 1000), text B L D
    -> velocity B C F h w in float32."""
    t = t.repeat_interleave(x.shape[3] * x.shape[4] // 4, dim=1)
    dtype = dit.patch_embedding.weight.dtype
    return dit(x.to(dtype), t, text.to(dtype), return_dict=False)[0].float()


class VideoModel(nn.Module):
    """The transformer and its loss in one module, so that DDP and FSDP see one forward."""
    def __init__(self, dit, args):
        super().__init__()
        self.dit, self.eta = dit, args.eta

    def forward(self, batch, noise, sigma):
        """batch as of collate(), noise B C F h w, sigma B -> loss, {name: term to log}."""
        z = batch["latents"]
        x, levels = add_noise(z, noise, sigma)
        v = run_backbone(self.dit, x, 1000 * levels, batch["text"])
        arm = batch["arm"][:, :, 1:] if self.eta else None
        return flow_loss(v[:, :, 1:], (noise - z)[:, :, 1:], batch["valid"][:, 1:], arm, self.eta)


# ---- model: inverse dynamics ----------------------------------------------------------------------------
# Names and shapes are those of idm.pt: 456 tensors, 92,713,423 parameters. pool: "mean" over the picture, as
# upstream, or "flatten", with which a small network knows positions. mask_stride: of the mask network.
IDM_FULL = {"size": (518, 518), "mask_stride": 1, "mask_width": 64, "mask_levels": 5, "width": 64,
            "blocks": (3, 4, 6, 3), "pool": "mean"}
IDM_TINY = {"mask_stride": 4, "mask_width": 8, "mask_levels": 2, "width": 16, "blocks": (1, 1, 1),
            "pool": "flatten"}


def double_conv(c_in, c_out, c_mid=None):
    """(3x3 convolution, batch norm, ReLU) twice, with c_mid channels in between."""
    layers = []
    for a, b in ((c_in, c_mid or c_out), (c_mid or c_out, c_out)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Up(nn.Module):
    """Enlarges to the size of the skip connection, concatenates, double convolution."""
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
    """ReLU(shortcut + 1x1, 3x3 with the stride, 1x1 to 4 c), with batch norms; no ReLU after the first."""
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
    """B 3 H W -> B 14: a stem to 1/4 resolution, then stages of bottlenecks, each but the first of stride 2.
    With width 64 and blocks (3, 4, 6, 3) it has the shape of ResNet-50."""
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
        cells = 1 if pool == "mean" else math.prod(math.ceil(side / 2 ** (len(blocks) + 1)) for side in size)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1) if pool == "mean" else nn.Identity(), nn.Flatten())
        self.fc = nn.Linear(c_in * cells, ACTION_DIM)


class IDM(nn.Module):
    """Inverse dynamics: the joint positions that a frame shows. One is enough: every joint is in view."""
    def __init__(self, config=IDM_FULL):
        super().__init__()
        self.size, self.mask_stride = tuple(config["size"]), config["mask_stride"]
        self.model = nn.ModuleDict({
            "mask_model": UNet(config["mask_width"], config["mask_levels"]),
            "resnet_model": ResNet(config["width"], config["blocks"], config["pool"], config["size"])})
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
        """B 3 H W in [0, 1] -> the network's input size, with ImageNet's mean and std."""
        frames = resize(frames, self.size)
        mean = frames.new_tensor([.485, .456, .406]).view(3, 1, 1)
        std = frames.new_tensor([.229, .224, .225]).view(3, 1, 1)
        return ((frames - mean) / std).contiguous(memory_format=torch.channels_last)

    def forward(self, frames):
        """B 3 H W in [0, 1] -> actions B 14, and U, the soft mask B 1 h w in (0, 1) at the input size.

        The regressor sees what the mask lets through, the rest is 0. Straight-through: the mask is rounded to
        0 or 1, gradients pass as if it were not."""
        x = self.preprocess(frames)
        logits = self.model["mask_model"](resize(x, [side // self.mask_stride for side in self.size]))
        mask = resize((1 + torch.tanh(logits.float())) / 2, self.size)
        hard = (mask >= .5).to(mask.dtype)
        y = self.model["resnet_model"](x * (mask + (hard - mask).detach()))
        return y.float() * self.train_std + self.train_mean, mask


def idm_loss(prediction, target, mask, mask_weight):
    """Eq. 4: Huber loss of normalised actions B 14, and lambda times the mean of the soft mask B 1 h w."""
    return F.smooth_l1_loss(prediction.float(), target.float()) + mask_weight * mask.float().mean()


def arm_to_latent(mask, size):
    """Soft mask of every frame B T H W, T = 4k + 1 -> B 1 F h w on the latent grid, `size` = (h, w).

    Mean over a cell's pixels; latent 0 has frame 0, latent k the maximum over frames 4k - 3 to 4k."""
    mask = F.interpolate(mask, size, mode="area")
    later = mask[:, 1:].unflatten(1, (-1, 4)).amax(2)
    return torch.cat([mask[:, :1], later], dim=1)[:, None]


# ---- model: loading and export --------------------------------------------------------------------------

def codec_side(args):
    """Height and width of a latent cell in pixels."""
    return common.LinearCodec.side if args.model == "tiny" else 16


def idm_config(args):
    """Shape of the IDM: of idm.pt, or small for the tiny model."""
    return {**IDM_TINY, "size": (args.height, args.width)} if args.model == "tiny" else IDM_FULL


def load_part(args, part, device, source=None):
    """A part of Wan from `source` (default --weights_from): pretrained weights, or random ones in its shape
    or the tiny shape. Transformer and VAE are fp32, the text encoder of the 5B model is bf16."""
    tiny = args.model == "tiny"
    dtype = torch.bfloat16 if part == "text_encoder" else torch.float32
    torch.manual_seed(0)         # whatever --seed is: no checkpoint holds what is random and frozen
    return common.load_wan(source or args.weights_from, part=part, config=TINY if tiny else args.model,
                           dtype=dtype, device=device, random_init=not source and (args.random_init or tiny))


def load_codec(args, folder, device):
    """Wan's VAE in fp32, untiled; for the tiny model folder/codec.safetensors."""
    if args.model == "tiny":
        return common.LinearCodec(common.load_weights(Path(folder) / "codec.safetensors"), device)
    return load_part(args, "vae", device).requires_grad_(False)


def embed_words(prompt):
    """The tiny model's text encoder: a row of ones, then a fixed random vector for each word, L D. A trained
    projection in the transformer gives words a meaning. (A small random T5 embeds tasks that name another arm
    or block almost alike.)"""
    words, size = re.findall(r"\w+", prompt.lower()), TINY["transformer"]["text_dim"]
    generators = [torch.Generator().manual_seed(zlib.crc32(word.encode())) for word in words]
    return torch.stack([torch.ones(size), *(torch.randn(size, generator=g) for g in generators)])


def text_encoder(args, device):
    """-> function: prompt -> embeddings L D on the CPU."""
    if args.model == "tiny":
        return embed_words
    parts = [load_part(args, part, device) for part in ("tokenizer", "text_encoder")]
    return functools.cache(lambda prompt: common.encode_text(*parts, [prompt], args.text_length)[0].cpu())


def load_transformer(args, device):
    """The transformer to train, fp32: --vidar's weights, Wan's, or random ones."""
    dit = load_part(args, "transformer", "cpu" if args.vidar else device, args.vidar).to(device)
    if args.model == "tiny" and not args.vidar:
        init_small(dit)
    return keep_time_in_fp32(dit).requires_grad_(True)


def keep_time_in_fp32(dit):
    """The transformer, whose time embedding autocast leaves alone: bf16 would round timestep 987.3 to 988."""
    for kind in ("cpu", "cuda"):
        dit.condition_embedder.forward = torch.autocast(kind, enabled=False)(dit.condition_embedder.forward)
    return dit


@torch.no_grad()
def init_small(dit):
    """Initialises the tiny model: small blocks, and an output layer with which its velocity is the noise."""
    for name, p in dit.named_parameters():
        if name.endswith(("scale_shift_table", "embedding.bias", "proj_out.bias")):
            nn.init.zeros_(p)
        elif name.startswith("blocks.") and p.ndim == 2:
            nn.init.normal_(p, std=.5 / math.sqrt(p.shape[1]))
    patch = nn.init.orthogonal_(dit.patch_embedding.weight.flatten(1))             # D (C 2 2)
    dit.patch_embedding.weight.copy_(patch.view_as(dit.patch_embedding.weight))
    patch = patch.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1)                 # D (2 2 C), as the output
    output = dit.proj_out.weight
    identity = math.sqrt(patch.shape[1] / patch.shape[0]) * torch.eye(len(output), device=output.device)
    output += (identity - output @ patch) @ patch.T


def load_idm(path, config=IDM_FULL) -> IDM:
    """idm.pt, {"model_state_dict": ...} or a flat dict -> IDM in eval mode. UserError if it does not fit."""
    try:                                                     # mapped: two thirds of idm.pt are Adam's moments
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights = weights.get("model_state_dict", weights)
        weights = {name: value.clone() for name, value in weights.items()}
    except Exception as error:                               # zip, pickle and OS have their own errors
        raise UserError(f"cannot read the IDM {path}: {common.reason(error)}") from error
    return common.load_for_inference(IDM(config), weights, path)


def check_weights(args):
    """Raises UserError for files that cannot be read or do not fit, before hours of work."""
    if args.vidar:
        load_part(args, "transformer", "meta", args.vidar)
    if args.idm:
        load_idm(args.idm, idm_config(args))


def save_transformer(args, run, stem, net):
    """A trained model's transformer -> stem.safetensors under diffusers' names, stem.pt under the official
    ones; bf16 except for the tiny model. Call it on all ranks."""
    weights, _ = common.gather_state(net)
    if run.rank:
        return
    dtype = torch.float32 if args.model == "tiny" else torch.bfloat16
    weights = {name.removeprefix("dit."): value.to(dtype) for name, value in weights.items()}
    stem.parent.mkdir(exist_ok=True)
    common.save_pt(stem.with_suffix(".pt"), common.official_names(weights))
    common.save_weights(stem.with_suffix(".safetensors"), weights)


# ---- objective and sampler ------------------------------------------------------------------------------

def shift_sigma(u, shift):
    """Wan's schedule: u in [0, 1] -> sigma = shift u / (1 + (shift - 1) u), more of it at high noise."""
    return shift * u / (1 + (shift - 1) * u)


def flow_loss(v, target, valid, arm=None, eta=0.):
    """|(1 + eta U) (v - (eps - z))|^2, Eq. 7; with eta 0 Eq. 1. v, target B C F h w; valid B F bool: latent
    frames without padding; arm B 1 F h w: U -> loss, {"flow_loss": the unweighted one}.

    Mean over the valid frames of a clip, then over clips: two processes of 8 clips agree with one of 16. The
    weight is inside the norm: with eta 3 up to 16 on the arms."""
    error = (v.float() - target).square().mean(1)                              # B F h w
    known = valid[:, :, None, None].float().expand_as(error)
    count = known.flatten(1).sum(1).clamp(min=1)
    plain = ((error * known).flatten(1).sum(1) / count).mean()
    if not eta:
        return plain, {"flow_loss": plain.detach()}
    weighted = error * (1 + eta * arm[:, 0].float()) ** 2
    return ((weighted * known).flatten(1).sum(1) / count).mean(), {"flow_loss": plain.detach()}


def make_scheduler(args, steps, device):
    """UniPC on the official code's grid of noise levels: sigma .999 to 0, shifted."""
    from diffusers import UniPCMultistepScheduler
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                        flow_shift=args.sample_shift)
    scheduler.set_timesteps(sigmas=np.linspace(.999, 0, steps + 1)[:-1], device=device)
    return scheduler


def fixed_noise(z, seed):
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z.device)


@torch.no_grad()
def generate(dit, z0, text, empty, args, seed):
    """From noise to latents with frame 0 given: z0 B C 1 h w, text and empty B L D -> B C F h w. Guidance
    compares with the empty prompt, as upstream does; --guidance_scale 1 leaves it out."""
    F_ = (args.frames - 1) // 4 + 1
    x = fixed_noise(z0.expand(-1, -1, F_, -1, -1), seed)
    scheduler = make_scheduler(args, args.num_inference_steps, x.device)
    for timestep in scheduler.timesteps:
        x = torch.cat([z0, x[:, :, 1:]], dim=2)
        t = torch.full((len(x), F_), timestep.item(), device=x.device, dtype=torch.float32)
        t[:, 0] = 0                              # the given frame is clean
        v = run_backbone(dit, x, t, text)
        if args.guidance_scale != 1:
            unguided = run_backbone(dit, x, t, empty)
            v = unguided + args.guidance_scale * (v - unguided)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return torch.cat([z0, x[:, :, 1:]], dim=2)


# ---- data set: cache ------------------------------------------------------------------------------------
# cache/<hash>/<split>_<number>.<kind>: safetensors, a file per episode, each written once and whole.
# "windows": latents C F h w, valid F (latent frames without padding), actions T 14, with --eta arm 1 F h w (U
# of Eq. 7) of each window; text L D, empty L D. "frames", for the IDM: frames 3 h w uint8, actions 14.

def cache_folder(args, splits):
    """Named by CACHE_FLAGS, files, and the IDM if it locates the arms; in the run if the set is read-only."""
    recipe = [json.dumps({name: getattr(args, name) for name in CACHE_FLAGS}), str(bool(args.eta)),
              f"{TINY}, ridge {CODEC_RIDGE}, words" if args.model == "tiny" else ""]     # codec and text
    episodes = [episode for part in splits.values() for episode in part]
    paths = [e.folder / name for e in episodes for name in ("video.mp4", "actions.npy", "mask.npz")]
    if args.eta and getattr(args, "stage", "") != "idm" and not all(e.has_mask for e in tasks(episodes)):
        if not args.idm:
            raise UserError("--eta weighs the arms: it needs mask.npz or --idm FILE; --eta 0 weighs none")
        paths.append(Path(args.idm))
    recipe += [common.file_version(path) for path in paths]
    recipe += [f"{episode.folder.name} {episode.instruction}" for episode in episodes]
    return common.cache_path(args, recipe)


class CacheWriter:
    """Makes the tensors of an episode; codec and text encoder are loaded at their first use."""
    def __init__(self, args, run, folder, idm):
        self.args, self.run, self.idm = args, run, idm
        self.vae = functools.cache(lambda: load_codec(args, folder, run.device))
        self.encode_prompt = functools.cache(lambda: text_encoder(args, run.device))

    def frames(self, split, number, episode, video, masks):
        """All frames of random poses, --idm_frames of a task."""
        count = len(video) if episode.random_poses else min(self.args.idm_frames, len(video))
        chosen = np.linspace(0, len(video) - 1, count).round().astype(int)
        return {"frames": resize(video[chosen], idm_config(self.args)["size"]),
                "actions": torch.from_numpy(episode.actions[chosen])}

    def windows(self, split, number, episode, video, masks):
        """At random starts for training, else the beginning."""
        starts, rows = [0], []
        if split == "train":
            room = max(0, len(video) - self.args.frames)
            starts = np.random.default_rng(number).integers(room + 1, size=self.args.windows)
        for chosen, valid in (robot_data.cut_window(episode, start, self.args.frames) for start in starts):
            z = common.wan_encode(self.vae(), from_uint8(video[chosen])[None].to(self.run.device))[0].cpu()
            rows.append({"latents": z if self.args.model == "tiny" else z.bfloat16(),
                         "valid": torch.cat([valid[:1], valid[1:].unflatten(0, (-1, 4)).all(1)]),
                         "actions": torch.from_numpy(episode.actions[chosen])})
            if self.args.eta:
                arm = masks[chosen].float() if masks is not None else predict_actions(
                    self.idm, video[chosen] / 255, self.run.device)[1][:, 0]
                rows[-1]["arm"] = arm_to_latent(arm[None], z.shape[-2:])[0].bfloat16()
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        prompt = robot_data.make_prompt(episode.instruction, self.args.prompt_views, episode.views)
        return {**tensors, "text": self.encode_prompt()(prompt), "empty": self.encode_prompt()("")}


@torch.no_grad()
def build_cache(args, run, splits, folder, kinds, idm=None):
    """Writes what is missing of `kinds`. Call it on all ranks. An interrupted call continues."""
    size = args.height, args.width
    folder.mkdir(parents=True, exist_ok=True)
    if run.rank == 0 and args.model == "tiny" and not (folder / "codec.safetensors").is_file():
        chosen = tasks(splits["train"])          # the tiny model's codec is fitted to 40 of these
        videos = [robot_data.read_episode(episode, size)[0][robot_data.cut_window(episode, 0, args.frames)[0]]
                  for episode in chosen[::max(1, len(chosen) // 40)]]
        z_dim = TINY["transformer"]["in_channels"]
        codec = common.LinearCodec.fit(from_uint8(torch.stack(videos)), z_dim, ridge=CODEC_RIDGE)
        common.save_weights(folder / "codec.safetensors", codec.tensors)
    common.barrier()
    writer, jobs = CacheWriter(args, run, folder, idm), []
    for split, episodes in splits.items():
        for number, episode in enumerate(episodes):
            paths = [folder / f"{split}_{number:05d}.{kind}" for kind in kinds
                     if kind == "frames" or not episode.random_poses]
            paths = [path for path in paths if not path.is_file()]
            jobs += [(split, number, episode, paths)] if paths else []
    jobs = jobs[run.rank::run.world]
    with ThreadPoolExecutor(4) as pool, tqdm(total=len(jobs), desc="cache", disable=not jobs) as bar:
        for i in range(0, len(jobs), 8):                     # a few at a time: videos are large
            videos = pool.map(lambda job: robot_data.read_episode(job[2], size), jobs[i:i + 8])
            for (*job, paths), video in zip(jobs[i:i + 8], videos):
                for path in paths:
                    make = getattr(writer, path.suffix[1:])
                    common.save_weights(path, make(*job, *video))
                bar.update()
    common.barrier()


class Cache:
    """Windows or frames of a split. Files are mapped, not read: a thousand episodes take 14 GB."""
    def __init__(self, paths):
        files = [common.load_weights(path) for path in paths]
        self.rows = [(file, i) for file in files for i in range(len(file["actions"]))]

    def get(self, numbers):
        """-> {name: [tensor of each row]}."""
        columns = {}
        for file, i in (self.rows[number] for number in numbers):
            for name, value in file.items():
                columns.setdefault(name, []).append(value if name in ("text", "empty") else value[i])
        return columns


def collate(windows, numbers, args, device, unconditional=()):
    """Windows -> batch {"latents", "valid", "actions", "arm" if cached: stacked, "text": B L D}, with text
    padded by zeros as in Wan's training. unconditional: rows of the batch with an empty prompt."""
    columns = windows.get(numbers)
    empty = columns.pop("empty")
    texts = [empty[row] if row in unconditional else text for row, text in enumerate(columns["text"])]
    columns["text"] = list(common.pad_text(texts, args.text_length))
    batch = {name: torch.stack(values).to(device) for name, values in columns.items()}
    return {**batch, "latents": batch["latents"].float()}


# ---- evaluate and sample --------------------------------------------------------------------------------

@torch.no_grad()
def predict_actions(idm, frames, device):
    """frames n 3 H W in [0, 1] -> actions n 14, soft masks n 1 h w, on the CPU."""
    parts = [idm(part.to(device)) for part in frames.split(IDM_CHUNK)]
    return [torch.cat([part[i].float().cpu() for part in parts]) for i in (0, 1)]


@torch.no_grad()
def sample_video(args, run, model, vae, encode_prompt, first, episode, seed):
    """first 3 H W in [0, 1] -> T 3 H W in [0, 1], on the CPU."""
    prompts = robot_data.make_prompt(episode.instruction, args.prompt_views, episode.views), ""
    text, empty = (common.pad_text([encode_prompt(prompt)], args.text_length).to(run.device)
                   for prompt in prompts)
    z0 = common.wan_encode(vae, first[None, None].to(run.device) * 2 - 1)
    with run.autocast():
        z = generate(model.dit, z0, text, empty, args, seed)
    return (common.wan_decode(vae, z)[0].cpu() + 1) / 2


@torch.no_grad()
def evaluate(args, run, model, idm, splits, folder):
    """Scores on held-out episodes -> [eval.json, curves.png]. model or idm may be None."""
    began, videos, actions, clips = time.time(), {}, {}, {"name": []}
    if model is not None:
        vae, encode_prompt = load_codec(args, folder, run.device), text_encoder(args, run.device)
    count = len(tasks(splits["test"]))           # random poses follow
    limit = args.eval_clips or count
    held_out = splits["test"][:min(count, limit)] + splits["test"][count:count + limit]
    for number, episode in list(enumerate(held_out))[run.rank::run.world]:
        truth, target, valid, arm = robot_data.load_window(episode, args.frames, (args.height, args.width))
        predictions = {}                         # (method, what it is predicted from): actions, valid
        if idm is not None:
            predicted, mask = predict_actions(idm, truth, run.device)
            predictions["model", "real"] = predicted, valid
            predictions["mean action", "real"] = idm.train_mean.cpu().expand_as(target), valid
            arm = resize(mask, truth.shape[-2:])[:, 0] >= .5 if arm is None else arm
        if model is not None and not episode.random_poses:
            later = valid & (torch.arange(len(valid)) > 0)
            z = common.wan_encode(vae, truth[None].to(run.device) * 2 - 1)
            frames = {"model": sample_video(args, run, model, vae, encode_prompt, truth[0], episode, number),
                      "persistence": truth[:1].expand_as(truth),
                      "codec": (common.wan_decode(vae, z)[0].cpu() + 1) / 2}
            for method, video in frames.items():
                videos.setdefault(method, []).append(video_scores(video, truth, arm, valid))
            clips["name"].append(episode.folder.name)
            predictions["persistence", "generated"] = target[:1].expand_as(target), later
            if idm is not None:
                predicted, _ = predict_actions(idm, frames["model"], run.device)
                predictions["model", "generated"] = predicted, later
                task = robot_data.other_task(episode)
                if task:                         # the same first frame with both instructions
                    other = sample_video(args, run, model, vae, encode_prompt, truth[0], task, number)
                    others = predict_actions(idm, other, run.device)[0]
                    for row in (frames["model"], predicted, episode), (other, others, task):
                        for name, value in robot_data.follows_instruction(*row).items():
                            clips.setdefault(name, []).append(value)
        for key, (predicted, known) in predictions.items():
            actions.setdefault(key, []).append((predicted[known], target[known]))
    videos, actions, clips = (common.gather_rows(table) for table in (videos, actions, clips))
    return [] if run.rank else report(args, videos, actions, clips, began)


def report(args, videos, actions, clips, began):
    """Means, eval.json, curves.png and the printed table of what evaluate() collected."""
    scores = {}
    for method, tables in videos.items():
        scores[method] = common.horizon_means(tables)
        for name, value in tables[0].items():    # of short windows the second half
            later = torch.cat([table[name] for table in tables])[:, min(FPS, value.shape[1] // 2):]
            scores[method][f"{name}_beyond_1s"] = later.nanmean().item()
    for (method, source), rows in actions.items():
        values = idm_scores(*(torch.cat(column) for column in zip(*rows)))
        scores.setdefault(method, {}).update({f"action_{name}_{source}": x for name, x in values.items()})
    names, ranking = clips.pop("name"), {}
    for name, values in clips.items():           # of both instructions: .5 for a model that ignores them
        scores["model"][name] = float(np.mean(values))
        scores.setdefault("chance", {})[name] = .5
    results = scores.pop("model")
    headline = "action_l1_real", "mean action", True
    if "psnr_beyond_1s" in results:
        metric = "psnr_arm" if "psnr_arm" in results else "psnr"
        headline = f"{metric}_beyond_1s", "persistence", False
        for name, table in zip(names, videos["model"]):
            ranking[name] = table[metric][0, min(FPS, (args.frames - 1) // 2):].nanmean().item()
    columns = ["psnr_arm_beyond_1s", "psnr_beyond_1s", "ssim_beyond_1s", "action_r2_real",
               "action_r2_worst_real", "action_l1_real", "action_r2_generated", "follows_arm",
               "follows_block"]
    return common.report(SCRIPT, args, args.vidar, began, headline, results, scores,
                         [name for name in columns if name in results], ranking,
                         [name for name in ("psnr_arm", "psnr") if name in results],
                         [stage.folder for stage in stage_plan(args)])


def sample(args, run, model, idm, splits, folder):
    """Videos of held-out episodes, what the IDM's mask lets through, predicted actions -> [samples/...]."""
    if run.rank or model is None:
        return []
    vae, encode_prompt, files = load_codec(args, folder, run.device), text_encoder(args, run.device), []
    episodes = {episode.folder.name: episode for episode in tasks(splits["test"])}
    for case, number in common.pick_cases(args.output_dir, list(episodes), args.num_samples).items():
        name, episode = list(episodes.items())[number]
        truth = robot_data.load_window(episode, args.frames, (args.height, args.width))[0]
        video = sample_video(args, run, model, vae, encode_prompt, truth[0], episode, args.seed + number)
        panels = {"ground truth": truth * 2 - 1, "prediction": video * 2 - 1}
        panels["error"] = common.error_picture(*panels.values())
        stem = Path(args.output_dir, "samples", f"{case}_{name}")
        files.append(common.write_video(f"{stem}_sampled.mp4", panels["prediction"], FPS))
        if idm is not None:
            actions, mask = predict_actions(idm, video, run.device)
            panels["seen by\nthe IDM"] = video * (resize(mask, video.shape[-2:]) >= .5) * 2 - 1
            np.save(f"{stem}_actions.npy", actions.numpy())
            files.append(f"{stem}_actions.npy")
        files += common.write_panels(stem, {"": panels}, 1, FPS, max(1, 224 // args.height))
    return files


# ---- set-up and parallel wrap ---------------------------------------------------------------------------

def setup(args):
    """Joins torchrun's processes and chooses device and precision -> rank, world, device, dtype, autocast."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = common.choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1 or args.fsdp:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    dtype = common.choose_dtype(args.dtype, device)
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    return argparse.Namespace(rank=rank, world=world, device=device, dtype=dtype, autocast=autocast)


def wrap(model, args, run):
    """Gradient checkpointing and torch.compile on request; FSDP2 with --fsdp, a block a unit; DDP under
    torchrun and for the IDM, which has no transformer.

    Weights, gradients and moments are fp32, blocks compute in bf16. FSDP casts no inputs: timesteps and
    rotary tables stay fp32. The root is resharded after forward like the blocks: by default it stays gathered
    until a backward, and the step after a validation would compute with the EMA weights."""
    dit = getattr(model, "dit", None)
    if dit is not None and args.grad_checkpoint:
        dit.enable_gradient_checkpointing()
    if dit is not None and args.compile:
        for block in dit.blocks:
            block.compile()
    if dit is not None and args.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
        options = {"mesh": init_device_mesh(run.device.type, (run.world,)), "reshard_after_forward": True}
        if args.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=run.device.type == "cuda")
        policy = MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        for block in dit.blocks:
            fully_shard(block, mp_policy=policy, **options)
        return fully_shard(model, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
    if run.world == 1:
        return model
    ids = [run.device] if run.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


# ---- train ----------------------------------------------------------------------------------------------

def get_lr(step, peak, warmup, total):
    """Learning rate of a step, counted from 0: linear warm-up, then cosine decay to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(args, run, script, stage, model, loss_fn, val_fn, checkpoint):
    """Trains what requires grad of `model` up to stage.steps, resuming from `checkpoint`; the stage's folder
    then has the last step in ckpt/, and the model the EMA weights. loss_fn(model, step, micro, grad_accum) ->
    loss, {name: term to log}. val_fn(model) -> {name: number}. -> the wrapped model."""
    folder = Path(args.output_dir, stage.folder)
    grad_accum = accumulation(args, stage.batch_size)
    net = wrap(model, args, run)
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, stage.lr, betas=(0.9, 0.98 if args.model == "tiny" else 0.999),
                                  weight_decay=stage.weight_decay, fused=True)
    ema = common.EMA(params, stage.ema_decay)
    start = common.load_run(checkpoint, net, optimizer, ema)
    log = common.open_log(script, stage.folder, args, start, stage.steps)
    should_stop = common.install_sigterm_handler()
    for step in range(start, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, stage.lr, stage.warmup_steps, stage.steps)
        net.train()
        for micro in range(grad_accum):          # processes average gradients at the last micro-step only
            synchronize = micro == grad_accum - 1
            if hasattr(net, "set_requires_gradient_sync"):
                net.set_requires_gradient_sync(synchronize)          # FSDP2
            net.require_backward_grad_sync = synchronize             # DDP
            with run.autocast():
                loss, terms = loss_fn(net, step, micro, grad_accum)
            (loss / grad_accum).backward()
            log.add(loss=loss, **terms)
        norm = nn.utils.clip_grad_norm_(params, args.grad_clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        done = step + 1
        stop = should_stop()
        save = stop or done == stage.steps or args.save_every and done % args.save_every == 0
        if (save or args.log_every and done % args.log_every == 0) and not norm.isfinite():
            raise UserError(f"loss or gradient is not finite at step {done}: resume from "
                            f"{common.latest_checkpoint(folder / 'ckpt') or 'the start'} with a lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        log.step(done, lr=optimizer.param_groups[0]["lr"], grad_norm=norm)
        if save:                                 # before validation, so that an error there loses nothing
            common.save_run(folder, script, done, net, optimizer, ema, args, args.keep_last)
        if stop:
            raise UserError(f"stopped by SIGTERM after step {done}, which is saved: the same command resumes")
        if args.eval_every and (done % args.eval_every == 0 or done == stage.steps):
            with ema.applied(), torch.no_grad(), run.autocast():
                log.row(done, **val_fn(net.eval()))
            log.restart_clock()
    common.remove_sigterm_handler()
    log.bar.close()
    ema.copy_to_params()
    return net


def sample_numbers(args, run, spec, salt, step, micro, grad_accum, batch_size):
    """Random values of a micro-batch, a function of (seed, salt, step) and of a sample's position in the
    global batch -> {name: tensor on the CPU}, the step's seed."""
    seed = common.seed_all(args.seed, salt, step)
    return common.sample_global_batch(spec, seed, batch_size, run.rank, run.world, micro, grad_accum), seed


def noise_like(z, seeds):
    """A standard normal tensor like each sample of z, B C F h w, by its own seed."""
    return torch.cat([fixed_noise(z[:1], int(seed)) for seed in seeds])


def is_finished(stage, checkpoint):
    """Whether all steps of a stage were done before this call."""
    return checkpoint is not None and checkpoint.meta["step"] >= stage.steps


def spread(count, limit):
    """Up to `limit` numbers below `count`, evenly spaced."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int).tolist()


def train_video(args, run, stage, windows, checkpoint):
    """Stage "video" -> VideoModel with the EMA weights; final/ then has vidar.pt and vidar.safetensors."""
    spec = {"window": ("randint", len(windows["train"].rows)), "u": ("rand",), "drop": ("rand",),
            "noise": ("randint", 2 ** 62)}
    model = VideoModel(load_transformer(args, run.device), args)

    def loss_fn(net, step, micro, grad_accum):
        values, _ = sample_numbers(args, run, spec, 1, step, micro, grad_accum, args.batch_size)
        unconditional = (values["drop"] < args.cfg_drop).nonzero().flatten().tolist()
        batch = collate(windows["train"], values["window"].tolist(), args, run.device, unconditional)
        sigma = shift_sigma(values["u"], args.shift).to(run.device)
        return net(batch, noise_like(batch["latents"], values["noise"]), sigma)

    def val_fn(net):                             # the same windows and noise at every validation, sigma 0.5
        chosen = spread(len(windows["val"].rows), 8)
        batch = collate(windows["val"], chosen, args, run.device)
        noise, sigma = noise_like(batch["latents"], chosen), torch.full((len(chosen),), .5, device=run.device)
        return {"val_loss": net(batch, noise, sigma)[1]["flow_loss"].item()}

    net = train(args, run, SCRIPT, stage, model, loss_fn, val_fn, checkpoint)
    stem = Path(args.output_dir, stage.folder, "final/vidar")
    if not is_finished(stage, checkpoint) or not stem.with_suffix(".safetensors").is_file():
        save_transformer(args, run, stem, net)
    return model


@torch.no_grad()
def write_generated_frames(args, run, model, folder, windows, path):
    """Writes a file like those of kind "frames": training windows that the video model denoised in one step
    from a random level. They are as blurred as its samples, but their joint positions are known."""
    vae, rng = load_codec(args, folder, run.device), np.random.default_rng(0)
    frames, actions = [], []
    for number in spread(len(windows.rows), args.idm_generated):
        batch = collate(windows, [number], args, run.device)
        z = batch["latents"]
        sigma = torch.full((1,), max(0., 1.6 * rng.random() - .6), device=z.device)     # often 0: codec only
        x, levels = add_noise(z, fixed_noise(z, number), sigma)
        with run.autocast():
            v = run_backbone(model.dit, x, 1000 * levels, batch["text"])
        video = common.wan_decode(vae, x - expand_to(levels[:, None], x) * v)[0].cpu()
        for t in range(1 + number % 4, args.frames, 4):      # one of the four frames of each latent frame
            if batch["valid"][0, (t + 3) // 4]:
                frames.append(to_uint8(resize(video[t:t + 1], idm_config(args)["size"])))
                actions.append(batch["actions"][0, t:t + 1].cpu())
    common.save_weights(path, {"frames": torch.cat(frames), "actions": torch.cat(actions)})


def train_idm(args, run, stage, frames, statistics, checkpoint):
    """Stage "idm"; final/ then has idm.pt. frames: {"train", "val": Cache}. statistics: actions N 14."""
    torch.manual_seed(args.seed)                 # equal initial weights on all processes and after a restart
    model = IDM(idm_config(args))
    nn.init.constant_(model.model["mask_model"].out.bias, .3)   # open: a closed mask gives itself no gradient
    model.set_statistics(statistics)
    model.to(run.device)
    spec = {"frame": ("randint", len(frames["train"].rows))}

    def get(split, numbers):
        columns = frames[split].get(numbers)
        x, actions = (torch.stack(columns[name]).to(run.device) for name in ("frames", "actions"))
        return x / 255, actions

    def loss_fn(net, step, micro, grad_accum):
        values, _ = sample_numbers(args, run, spec, 2, step, micro, grad_accum, stage.batch_size)
        x, actions = get("train", values["frame"].tolist())
        prediction, mask = net(x)
        loss = idm_loss(model.normalize(prediction), model.normalize(actions), mask, args.mask_weight)
        return loss, {"mask_area": mask.detach().mean()}

    def val_fn(net):
        x, actions = get("val", spread(len(frames["val"].rows), 128))
        prediction, mask = model(x)
        loss = idm_loss(model.normalize(prediction), model.normalize(actions), mask, args.mask_weight)
        scores = {"loss": loss, "mask_area": mask.mean(), **idm_scores(prediction.cpu(), actions.cpu())}
        return {f"val_{name}": float(value) for name, value in scores.items()}

    train(args, run, SCRIPT, stage, model, loss_fn, val_fn, checkpoint)
    if run.rank == 0:
        final = Path(args.output_dir, stage.folder, "final")
        final.mkdir(exist_ok=True)
        common.save_pt(final / "idm.pt", {"model_state_dict": model.state_dict(), "step": stage.steps})


def stage_plan(args):
    """-> the stages to train. The IDM has no EMA: batch norm's statistics cannot be averaged."""
    video = argparse.Namespace(
        name="video", folder="video" if args.stage == "all" else ".", steps=args.max_steps, lr=args.lr,
        warmup_steps=args.warmup_steps, weight_decay=args.weight_decay, ema_decay=args.ema_decay,
        batch_size=args.batch_size, kind="windows")
    idm = argparse.Namespace(
        name="idm", folder=".", steps=args.idm_steps, lr=args.idm_lr or args.lr, weight_decay=1e-2,
        warmup_steps=args.idm_steps // 10, ema_decay=0., batch_size=args.idm_batch_size, kind="frames")
    return {"video": [video], "idm": [idm], "all": [video, idm]}[args.stage]


def train_stages(args, run, checkpoint, splits, folder):
    """Trains what is missing of the stages."""
    if run.rank == 0:
        common.write_json(Path(args.output_dir, "args.json"), {**vars(args), **common.provenance()})
    idm = load_idm(args.idm, idm_config(args)).to(run.device) if args.idm else None
    plan, generated = stage_plan(args), Path(args.output_dir, "video/final/generated_frames.safetensors")
    build_cache(args, run, splits, folder, [stage.kind for stage in plan], idm)
    for stage in plan:
        paths = {split: sorted(folder.glob(f"{split}_*.{stage.kind}")) for split in ("train", "val")}
        if stage.name == "idm" and generated.is_file():
            paths["train"].append(generated)
        caches = {split: Cache(paths[split]) for split in paths}
        found = checkpoint
        if stage.folder != ".":
            resume = "none" if args.resume == "none" else "auto"
            found = common.find_checkpoint(Path(args.output_dir, stage.folder, "ckpt"), SCRIPT, resume)
        if stage.name == "idm":
            actions = np.concatenate([episode.actions for episode in splits["train"]])
            train_idm(args, run, stage, caches, torch.from_numpy(actions), found)
            continue
        model = train_video(args, run, stage, caches, found).eval()
        if run.rank == 0 and len(plan) > 1 and args.idm_generated and not generated.is_file():
            write_generated_frames(args, run, model, folder, caches["train"], generated)
        common.barrier()


# ---- main -----------------------------------------------------------------------------------------------

def load_models(args, device, checkpoint=None):
    """-> VideoModel and IDM, or None, of a run's newest checkpoints or of `checkpoint`, with EMA weights."""
    models = {"video": None, "idm": load_idm(args.idm, idm_config(args)).to(device) if args.idm else None}
    for stage in stage_plan(args):
        path = checkpoint.path if checkpoint and stage.folder == "." else common.latest_checkpoint(
            Path(args.output_dir, stage.folder, "ckpt"))
        model = IDM(idm_config(args))
        if stage.name == "video":
            model = VideoModel(load_transformer(args, device), args)
        weights = common.load_weights(path / "ema.safetensors")
        models[stage.name] = common.load_for_inference(model, weights, path, device)
    return models["video"], models["idm"]


def example_batch(args, config):
    """A batch in the shapes that the flags ask for, on the default device."""
    B, side = args.batch_size, codec_side(args)
    size = (args.frames - 1) // 4 + 1, args.height // side, args.width // side
    z = torch.randn(B, config.in_channels, *size)
    return {"latents": z, "valid": torch.ones(B, z.shape[2], dtype=torch.bool), "arm": z[:, :1],
            "text": torch.randn(B, args.text_length, config.text_dim)}


def dry_run(args):
    """Prints parameters, FLOPs and memory of the video model's step on the meta device."""
    flags = argparse.Namespace(**{**vars(args), "random_init": True, "vidar": None})
    with torch.device("meta"):
        model = VideoModel(load_transformer(flags, "meta"), args).train()
        if args.grad_checkpoint:
            model.dit.enable_gradient_checkpointing()
        batch = example_batch(args, model.dit.config)
        z = batch["latents"]

        def loss():
            with torch.autocast("cpu", torch.bfloat16, enabled=args.model != "tiny"):
                return model(batch, z, torch.rand(len(z)))[0]

        tokens, world = z[0, 0].numel() // 4, int(os.environ.get("WORLD_SIZE", 1))
        print(common.dry_run_report("video model", model, loss, len(z), tokens, world, args.fsdp))


def run_script(argv):
    args, checkpoint, why_preset = parse_args(argv)
    if args.dry_run:
        return dry_run(args)
    run, inference_only = setup(args), args.sample or args.eval
    common.announce(SCRIPT, args, why_preset, run, checkpoint)
    check_weights(args)
    common.simulate_missing_data(SCRIPT, args.data_dir, default=PRESETS["tiny"]["data_dir"])
    if run.rank == 0 and checkpoint:
        common.copy_stages(checkpoint, args.output_dir, ["video"])
    splits = robot_data.load_splits(args.data_dir)
    folder = cache_folder(args, splits)
    if not (inference_only and checkpoint):
        train_stages(args, run, checkpoint, splits, folder)
        if run.rank == 0 and args.model == "tiny":
            shutil.copy(folder / "codec.safetensors", args.output_dir)
        common.barrier()
    models = load_models(args, run.device, checkpoint if inference_only else None)
    files = evaluate(args, run, *models, splits, args.output_dir) if common.wants_evaluation(args) else []
    if args.sample or not inference_only:
        files += sample(args, run, *models, splits, args.output_dir)
    if run.rank == 0:
        common.show_results(args.output_dir, files, args.tensorboard, args.wandb)
    common.shutdown()


def main(argv=None):
    return common.one_line_errors(f"{SCRIPT}.py", lambda: run_script(argv))


if __name__ == "__main__":
    sys.exit(main())
