"""vidar.py: video model of robot tasks, and inverse dynamics model that predicts joint positions from frames.

Papers      Vidar (arXiv:2507.12898), stage 1 of Vidarc (arXiv:2512.17661), on Wan2.2-TI2V-5B
            (arXiv:2503.20314). Masks and random poses follow AnyPos (arXiv:2507.12768).
Equations   Eq. 1  x_t = t x_1 + (1 - t) x_0, |v - (x_0 - x_1)|^2          -> add_noise, flow_loss
            with x_1 the data z, x_0 the noise eps and t rising towards the data. Wan's noise level falls:
            sigma = 1 - t, x = (1 - sigma) z + sigma eps, timestep 1000 sigma. The target eps - z is
            dx/dsigma, which is minus dx/dt.
            Eq. 4  Huber(a' - a) + lambda |m|_1                            -> IDM, idm_loss
            Eq. 7  |(1 + eta U) (v - (x_0 - x_1))|^2, U the IDM's mask     -> flow_loss, arm_to_latent
            First latent frame: condition, clean, timestep 0, without loss  -> add_noise, VideoModel
            UniPC of order 2 from noise to video                           -> generate
Run         python vidar.py                          # simulate, train, evaluate: 9 to 14 min on 2 CPU cores
            python vidar.py --sample --num_samples 3                              # or --eval
            torchrun --nproc_per_node=8 vidar.py --preset ti2v_5b --fsdp --stage idm --output_dir runs/idm
            torchrun --nproc_per_node=8 vidar.py --preset ti2v_5b --fsdp --idm runs/idm/final/idm.pt
            python vidar.py --preset ti2v_5b --global_batch 1 --batch_size 1 --max_steps 100     # one GPU
Data        data/vidar/: prepare.py simulates a robot or converts RoboTwin, LeRobot and ALOHA data sets;
            episodes.py documents the layout and reads it.
Shapes      B batch  T frames  F = (T - 1) / 4 + 1 latent frames  C latent channels  H W pixels  h w latent
            cells  N = F h/2 w/2 tokens  D width  L text tokens. Videos are B T 3 H W in [-1, 1], and
            in [0, 1] for metrics and the IDM. Actions T 14 are the positions that frame t shows: 0-5 left
            joints in radians, 6 left gripper (1 open), 7-12 right joints, 13 right gripper.
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
IDM_CHUNK = 32                           # batch size of the IDM in evaluation

# ---- presets and flags ----------------------------------------------------------------------------------

PRESETS = {
    # mask_weight: .003 needs more steps than these to close the mask; .06 leaves only isolated points open.
    "tiny": dict(
        model="tiny", stage="all", data_dir="data/vidar/simulated", height=112, width=96, frames=33,
        prompt_views="none", windows=3, text_length=64, batch_size=2, global_batch=0, max_steps=1650, lr=3e-3,
        warmup_steps=50, ema_decay=.99, eta=3., shift=8.0, sample_shift=.25, num_inference_steps=2,
        guidance_scale=1., idm_steps=2000, idm_lr=3e-3, idm_batch_size=32, idm_frames=12, idm_generated=600,
        mask_weight=.01, cfg_drop=0., eval_every=500, save_every=500, eval_clips=24),
    # Table 5 of the paper. On any number of GPUs, gradients are accumulated over 128 samples.
    "ti2v_5b": dict(data_dir="data/robotwin", max_steps=14000, lr=2e-5, batch_size=8, warmup_steps=200,
                    weight_decay=.1, grad_checkpoint=True, save_every=500, eval_every=500),
}
TINY = {"transformer": {"num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 16,
                        "out_channels": 16, "text_dim": 32, "freq_dim": 64, "ffn_dim": 384, "num_layers": 4}}
CODEC_RIDGE = 3e4                        # of the tiny codec: lower values leave a faint pattern on the table
# These determine the shape or the meaning of the weights: a checkpoint fixes their values.
MODEL_FLAGS = ("model", "stage", "text_length", "height", "width")
# The cache depends on these and on the data set's files.
CACHE_FLAGS = ("model", "weights_from", "random_init", "height", "width", "frames", "windows", "prompt_views",
               "text_length", "idm_frames")


def add_stage_flags(parser):
    """Flags that vidar.py and vidarc.py share."""
    add = parser.add_argument_group("data").add_argument
    add("--height", type=at_least(16), default=736, help="height of the mosaic in pixels, a multiple of 32")
    add("--width", type=at_least(16), default=640, help="width of the mosaic in pixels, a multiple of 32")
    add("--frames", type=at_least(5), default=81, help="frames per window at 10 fps, 4k + 1")
    add("--windows", type=at_least(1), default=4, help="cached windows per training episode")
    add("--prompt_views", choices=["rear", "front", "high", "none"], default="rear",
        help="head camera named in the prompt's prefix (none: no prefix)")
    add = parser.add_argument_group("model and loss").add_argument
    add("--model", choices=["ti2v_5b", "tiny"], default="ti2v_5b", help="tiny: the same classes, smaller")
    add("--weights_from", default="Wan-AI/Wan2.2-TI2V-5B-Diffusers", metavar="FOLDER|HUB_ID",
        help="diffusers folder, hub id, or folder with the official files")
    add("--vidar", metavar="FILE", help="vidar.pt or vidarc.pt: weights to start from instead of Wan's")
    add("--idm", metavar="FILE", help="idm.pt: a trained inverse dynamics model")
    add("--random_init", action="store_true", help="random weights of Wan's shapes, to measure speed")
    add("--text_length", type=at_least(1), default=512, help="tokens per prompt, padding included")
    add("--shift", type=at_least(1e-3, float), default=5.0, help="shift of the noise levels in training")
    add("--cfg_drop", type=between(0, 1), default=.1, help="share of training samples with an empty prompt")
    add("--global_batch", type=at_least(0), default=128, help="samples per step, sets --grad_accum (0: off)")
    add("--cpu_offload", action="store_true", help="with --fsdp: keep weights and optimizer on the CPU")
    add = parser.add_argument_group("sampling and evaluation").add_argument
    add("--sample_shift", type=at_least(1e-3, float), default=5.0, help="shift of the sampler's noise levels")
    add("--eval_clips", type=at_least(0), default=0, help="held-out episodes to evaluate (0: all)")
    add("--num_samples", type=at_least(1), default=3, help="videos to sample (3: best, median and worst)")
    return parser


def build_parser():
    parser = add_stage_flags(common.Parser(SCRIPT, PRESETS, __doc__.split("\n")[0]))
    add = parser.add_argument_group("stage 1").add_argument
    add("--stage", choices=["video", "idm", "all"], default="video", help="model to train; all: video, idm")
    add("--eta", type=at_least(0, float), default=0., help="weight of the arms in the loss (Eq. 7)")
    add("--num_inference_steps", type=at_least(1), default=20, help="sampler steps per video")
    add("--guidance_scale", type=at_least(0, float), default=5.0, help="classifier-free guidance (1: off)")
    add("--idm_steps", type=at_least(1), default=60000, help="optimizer steps of the IDM; 10 %% are warm-up")
    add("--idm_lr", type=at_least(0, float), default=5e-4, help="peak learning rate of the IDM (0: --lr)")
    add("--idm_batch_size", type=at_least(1), default=16, help="frames per process and micro-step of the IDM")
    add("--idm_frames", type=at_least(1), default=64, help="frames per episode on which the IDM is trained")
    add("--idm_generated", type=at_least(0), default=0,
        help="training windows, denoised by the video model, on which the IDM is also trained")
    add("--mask_weight", type=at_least(0, float), default=3e-3, help="weight of the mask in Eq. 4 (lambda)")
    return parser


def parse_args(argv=None):
    """-> flags, checkpoint or None, reason for the preset."""
    get_data = "python data/vidar/prepare.py --from robotwin SRC data/robotwin"
    args, checkpoint, why_preset = common.parse_args(build_parser(), argv, MODEL_FLAGS, get_data=get_data)
    check_flags(args, [stage.batch_size for stage in stage_plan(args)])
    return args, checkpoint, why_preset


def check_flags(args, batch_sizes):
    """Raises UserError for incompatible flags. batch_sizes: of the stages."""
    side = 2 * codec_side(args)                  # Wan's patches are 2 x 2 latent cells
    if args.height % side or args.width % side:
        raise UserError(f"--height {args.height} and --width {args.width} must be multiples of {side}")
    if args.frames % 4 != 1:
        raise UserError(f"--frames must be 4k + 1, not {args.frames}: Wan's VAE groups frames in fours")
    if args.fsdp and "WORLD_SIZE" not in os.environ:
        raise UserError("--fsdp shards over processes: start it with torchrun --nproc_per_node=N")
    if args.cpu_offload and not args.fsdp:
        raise UserError("--cpu_offload works on sharded weights only: add --fsdp")
    if args.fsdp and getattr(args, "stage", None) == "all" and args.idm_generated:
        raise UserError("--idm_generated needs the whole model on each process: leave out --fsdp")
    if not (args.sample or args.eval or args.dry_run):
        for batch_size in batch_sizes:
            accumulation(args, batch_size)


def accumulation(args, batch_size):
    """Micro-steps per optimizer step: for --global_batch samples, or --grad_accum without it."""
    samples = batch_size * int(os.environ.get("WORLD_SIZE", 1))
    if args.global_batch % samples:
        raise UserError(f"--global_batch {args.global_batch} is not a multiple of {samples}, the samples of "
                        f"all processes per micro-step: choose another batch size")
    return args.global_batch // samples or args.grad_accum


# ---- model: the video model -----------------------------------------------------------------------------

def add_noise(z, noise, sigma):
    """x = (1 - sigma) z + sigma eps. Latent frame 0, the conditioning image, stays clean.
    z, noise B C F h w, sigma B -> x, and sigma of every latent frame B F."""
    x = (1 - expand_to(sigma, z)) * z + expand_to(sigma, z) * noise
    levels = sigma[:, None].repeat(1, z.shape[2])
    levels[:, 0] = 0
    return torch.cat([z[:, :, :1], x[:, :, 1:]], dim=2), levels


def run_backbone(dit, x, t, text):
    """diffusers' forward pass with a timestep per token: x B C F h w, t B F (0 to 1000), text B L D
    -> velocity B C F h w in float32."""
    t = t.repeat_interleave(x.shape[3] * x.shape[4] // 4, dim=1)
    dtype = dit.patch_embedding.weight.dtype
    return dit(x.to(dtype), t, text.to(dtype), return_dict=False)[0].float()


class VideoModel(nn.Module):
    """The transformer and its loss in one module, so that DDP and FSDP wrap a single forward."""
    def __init__(self, dit, args):
        super().__init__()
        self.dit, self.eta = dit, args.eta

    def forward(self, batch, noise, sigma):
        """batch from collate(), noise B C F h w, sigma B -> loss, {name: term to log}."""
        z = batch["latents"]
        x, levels = add_noise(z, noise, sigma)
        v = run_backbone(self.dit, x, 1000 * levels, batch["text"])
        arm = batch["arm"][:, :, 1:] if self.eta else None
        return flow_loss(v[:, :, 1:], (noise - z)[:, :, 1:], batch["valid"][:, 1:], arm, self.eta)


# ---- model: inverse dynamics ----------------------------------------------------------------------------
# IDM_FULL has the names and shapes of idm.pt: 456 tensors, 92,713,423 parameters. pool: "mean" over pixels,
# as upstream, or "flatten", which suits a small network. mask_stride: downsampling before the mask network.
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
    """Upsamples to the size of the skip connection, concatenates both, applies a double convolution."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = double_conv(c_in, c_out, c_in // 2)

    def forward(self, x, skip):
        x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=True)
        return self.conv(torch.cat([x, skip], dim=1))


class UNet(nn.Module):
    """B 3 H W -> logits B 1 H W. Channels double from `width` at each of `levels` halvings but the last."""
    def __init__(self, width, levels):
        super().__init__()
        channels = [width * 2 ** min(i, levels - 1) for i in range(levels + 1)]
        self.in_conv = double_conv(3, width)
        self.downs = nn.Sequential(*(nn.Sequential(nn.MaxPool2d(2), double_conv(a, b))
                                     for a, b in zip(channels, channels[1:])))
        self.ups = nn.Sequential(*(Up(2 * a, max(a // 2, width)) for a in reversed(channels[:-1])))
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
    """ReLU(shortcut + 1x1, 3x3 with the stride, 1x1 to 4 c), batch norm after each, ReLU after the 3x3."""
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
    """B 3 H W -> B 14: a stem to 1/4 resolution, then stages of bottlenecks; all but the first have stride 2.
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
    """Inverse dynamics model: joint positions from a single frame, in which every joint is visible."""
    def __init__(self, config=IDM_FULL):
        super().__init__()
        self.size, self.mask_stride = tuple(config["size"]), config["mask_stride"]
        self.model = nn.ModuleDict({
            "mask_model": UNet(config["mask_width"], config["mask_levels"]),
            "resnet_model": ResNet(config["width"], config["blocks"], config["pool"], config["size"])})
        self.register_buffer("train_mean", torch.zeros(ACTION_DIM))
        self.register_buffer("train_std", torch.ones(ACTION_DIM))
        self.to(memory_format=torch.channels_last)                   # 1.6 times faster on a CPU

    def set_statistics(self, actions):
        """actions: N 14, of the training episodes. The std is at least 0.01, for joints that never move."""
        self.train_mean.copy_(actions.mean(0))
        self.train_std.copy_(actions.std(0).clamp(min=.01))

    def normalize(self, actions):
        return (actions - self.train_mean) / self.train_std

    def preprocess(self, frames):
        """B 3 H W in [0, 1] -> resized to the input size, normalised by ImageNet's mean and std."""
        frames = resize(frames, self.size)
        mean = frames.new_tensor([.485, .456, .406]).view(3, 1, 1)
        std = frames.new_tensor([.229, .224, .225]).view(3, 1, 1)
        return ((frames - mean) / std).contiguous(memory_format=torch.channels_last)

    def forward(self, frames):
        """B 3 H W in [0, 1] -> actions B 14, and U, the soft mask B 1 h w in (0, 1) at the input size.

        The mask multiplies the regressor's input. It is rounded to 0 or 1 by a straight-through estimator,
        whose gradient ignores the rounding."""
        x = self.preprocess(frames)
        logits = self.model["mask_model"](resize(x, [side // self.mask_stride for side in self.size]))
        mask = resize((1 + torch.tanh(logits.float())) / 2, self.size)
        hard = (mask >= .5).to(mask.dtype)
        y = self.model["resnet_model"](x * (mask + (hard - mask).detach()))
        return y.float() * self.train_std + self.train_mean, mask


def idm_loss(prediction, target, mask, mask_weight):
    """Eq. 4: Huber loss of normalised actions B 14, plus lambda times the mean of the soft mask B 1 h w."""
    return F.smooth_l1_loss(prediction.float(), target.float()) + mask_weight * mask.float().mean()


def arm_to_latent(mask, size):
    """Soft masks of all frames, B T H W, T = 4k + 1 -> B 1 F h w on the latent grid, `size` = (h, w).

    Mean over the pixels of a cell. Latent frame 0 has frame 0, k the maximum of frames 4k - 3 to 4k."""
    mask = F.interpolate(mask, size, mode="area")
    later = mask[:, 1:].unflatten(1, (-1, 4)).amax(2)
    return torch.cat([mask[:, :1], later], dim=1)[:, None]


# ---- model: loading and export --------------------------------------------------------------------------

def codec_side(args):
    """Height and width of a latent cell, in pixels."""
    return common.LinearCodec.side if args.model == "tiny" else 16


def idm_config(args):
    """Configuration of the IDM: that of idm.pt, or a small one for the tiny model."""
    return {**IDM_TINY, "size": (args.height, args.width)} if args.model == "tiny" else IDM_FULL


def load_part(args, part, device, source=None):
    """A part of Wan from `source` (default --weights_from): pretrained weights, or random ones of the same
    or the tiny shapes. The transformer and the VAE are in fp32, the text encoder is in bf16."""
    tiny = args.model == "tiny"
    dtype = torch.bfloat16 if part == "text_encoder" else torch.float32
    torch.manual_seed(0)         # not --seed: checkpoints do not hold frozen random weights
    return common.load_wan(source or args.weights_from, part=part, config=TINY if tiny else args.model,
                           dtype=dtype, device=device, random_init=not source and (args.random_init or tiny))


def load_codec(args, folder, device):
    """Wan's VAE in fp32, without tiling; the linear codec of folder/codec.safetensors for the tiny model."""
    if args.model == "tiny":
        return common.LinearCodec(common.load_weights(Path(folder) / "codec.safetensors"), device)
    return load_part(args, "vae", device).requires_grad_(False)


def embed_words(prompt):
    """The tiny model's text encoder: a row of ones, then a fixed random vector for each word, L D. (A small
    random T5 gives almost equal embeddings to tasks that differ in the arm or the block.)"""
    words, size = re.findall(r"\w+", prompt.lower()), TINY["transformer"]["text_dim"]
    generators = [torch.Generator().manual_seed(zlib.crc32(word.encode())) for word in words]
    return torch.stack([torch.ones(size), *(torch.randn(size, generator=g) for g in generators)])


def text_encoder(args, device):
    """-> a function of a prompt that returns embeddings L D on the CPU."""
    if args.model == "tiny":
        return embed_words
    parts = [load_part(args, part, device) for part in ("tokenizer", "text_encoder")]
    return functools.cache(lambda prompt: common.encode_text(*parts, [prompt], args.text_length)[0].cpu())


def load_transformer(args, device):
    """The transformer to train, in fp32: weights of --vidar, of Wan, or random ones."""
    dit = load_part(args, "transformer", "cpu" if args.vidar else device, args.vidar).to(device)
    if args.model == "tiny" and not args.vidar:
        init_small(dit)
    return keep_time_in_fp32(dit).requires_grad_(True)


def keep_time_in_fp32(dit):
    """Disables autocast in the time embedding (bf16 rounds timestep 987.3 to 988) -> the transformer."""
    for kind in ("cpu", "cuda"):
        dit.condition_embedder.forward = torch.autocast(kind, enabled=False)(dit.condition_embedder.forward)
    return dit


@torch.no_grad()
def init_small(dit):
    """Initialises the tiny model: small blocks, and an initial velocity close to the noisy latents."""
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
    try:                                                     # mmap: two thirds of idm.pt are Adam's moments
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights = weights.get("model_state_dict", weights)
        weights = {name: value.clone() for name, value in weights.items()}
    except Exception as error:                               # zip, pickle and OS errors
        raise UserError(f"cannot read the IDM {path}: {common.reason(error)}") from error
    return common.load_for_inference(IDM(config), weights, path)


def check_weights(args):
    """Raises UserError, before any long work, for weights that cannot be read or do not fit."""
    if args.vidar:
        load_part(args, "transformer", "meta", args.vidar)
    if args.idm:
        load_idm(args.idm, idm_config(args))


def save_transformer(args, run, stem, net):
    """Writes a trained model's transformer to stem.safetensors with diffusers' names and to stem.pt with the
    official ones, in bf16 except for the tiny model. Call it on all ranks."""
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
    """Wan's schedule: u in [0, 1] -> sigma = shift u / (1 + (shift - 1) u), denser at high noise."""
    return shift * u / (1 + (shift - 1) * u)


def flow_loss(v, target, valid, arm=None, eta=0.):
    """|(1 + eta U) (v - (eps - z))|^2, Eq. 7; Eq. 1 with eta 0. v, target B C F h w; valid B F bool: latent
    frames without padding; arm B 1 F h w: U -> loss, {"flow_loss": the unweighted loss}.

    Mean over the valid frames of a clip, then over clips, so that two processes of 8 clips equal one of 16.
    The weight is inside the norm: eta 3 multiplies the loss on the arms by up to 16."""
    error = (v.float() - target).square().mean(1)                              # B F h w
    mask = valid[:, :, None, None].float().expand_as(error)
    count = mask.flatten(1).sum(1).clamp(min=1)
    plain = ((error * mask).flatten(1).sum(1) / count).mean()
    if not eta:
        return plain, {"flow_loss": plain.detach()}
    weighted = error * (1 + eta * arm[:, 0].float()) ** 2
    return ((weighted * mask).flatten(1).sum(1) / count).mean(), {"flow_loss": plain.detach()}


def make_scheduler(args, steps, device):
    """UniPC on the official code's noise levels: evenly spaced from .999 to 0, then shifted."""
    from diffusers import UniPCMultistepScheduler
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                        flow_shift=args.sample_shift)
    scheduler.set_timesteps(sigmas=np.linspace(.999, 0, steps + 1)[:-1], device=device)
    return scheduler


def fixed_noise(z, seed):
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z.device)


@torch.no_grad()
def generate(dit, z0, text, empty, args, seed):
    """Samples latents that follow latent frame z0, B C 1 h w; text and empty B L D -> B C F h w. The negative
    prompt of guidance is the empty one, as upstream; --guidance_scale 1 skips it."""
    F_ = (args.frames - 1) // 4 + 1
    x = fixed_noise(z0.expand(-1, -1, F_, -1, -1), seed)
    scheduler = make_scheduler(args, args.num_inference_steps, x.device)
    for timestep in scheduler.timesteps:
        x = torch.cat([z0, x[:, :, 1:]], dim=2)
        t = torch.full((len(x), F_), timestep.item(), device=x.device, dtype=torch.float32)
        t[:, 0] = 0                              # the conditioning frame is clean
        v = run_backbone(dit, x, t, text)
        if args.guidance_scale != 1:
            unguided = run_backbone(dit, x, t, empty)
            v = unguided + args.guidance_scale * (v - unguided)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return torch.cat([z0, x[:, :, 1:]], dim=2)


# ---- data set: cache ------------------------------------------------------------------------------------
# cache/<hash>/<split>_<number>.<kind>: safetensors, one file per episode, written atomically.
# "windows", per window: latents C F h w, valid F (latent frames without padding), actions T 14, with --eta
# arm 1 F h w (U of Eq. 7); text L D, empty L D. "frames", for the IDM, per frame: 3 h w uint8, actions 14.

def cache_folder(args, splits):
    """Folder named by a hash of CACHE_FLAGS, the data files, and the IDM where it provides the arm masks."""
    recipe = [json.dumps({name: getattr(args, name) for name in CACHE_FLAGS}), str(bool(args.eta)),
              f"{TINY}, ridge {CODEC_RIDGE}, words" if args.model == "tiny" else ""]     # codec and text
    episodes = [episode for part in splits.values() for episode in part]
    paths = [e.folder / name for e in episodes for name in ("video.mp4", "actions.npy", "mask.npz")]
    if args.eta and getattr(args, "stage", "") != "idm" and not all(e.has_mask for e in tasks(episodes)):
        if not args.idm:
            raise UserError("--eta weights the arms: it needs mask.npz or --idm FILE; --eta 0 turns it off")
        paths.append(Path(args.idm))
    recipe += [common.file_version(path) for path in paths]
    recipe += [f"{episode.folder.name} {episode.instruction}" for episode in episodes]
    return common.cache_path(args, recipe)


class CacheWriter:
    """Makes the tensors of an episode. Codec and text encoder are loaded at first use."""
    def __init__(self, args, run, folder, idm):
        self.args, self.run, self.idm = args, run, idm
        self.vae = functools.cache(lambda: load_codec(args, folder, run.device))
        self.encode_prompt = functools.cache(lambda: text_encoder(args, run.device))

    def frames(self, split, number, episode, video, masks):
        """Tensors of kind "frames": all frames of random poses, --idm_frames of a task."""
        count = len(video) if episode.random_poses else min(self.args.idm_frames, len(video))
        indices = np.linspace(0, len(video) - 1, count).round().astype(int)
        return {"frames": resize(video[indices], idm_config(self.args)["size"]),
                "actions": torch.from_numpy(episode.actions[indices])}

    def windows(self, split, number, episode, video, masks):
        """Tensors of kind "windows": random windows for training, otherwise the first one."""
        starts, rows = [0], []
        if split == "train":
            last_start = max(0, len(video) - self.args.frames)
            starts = np.random.default_rng(number).integers(last_start + 1, size=self.args.windows)
        for indices, valid in (robot_data.cut_window(episode, start, self.args.frames) for start in starts):
            z = common.wan_encode(self.vae(), from_uint8(video[indices])[None].to(self.run.device))[0].cpu()
            rows.append({"latents": z if self.args.model == "tiny" else z.bfloat16(),
                         "valid": torch.cat([valid[:1], valid[1:].unflatten(0, (-1, 4)).all(1)]),
                         "actions": torch.from_numpy(episode.actions[indices])})
            if self.args.eta:
                arm = masks[indices].float() if masks is not None else predict_actions(
                    self.idm, video[indices] / 255, self.run.device)[1][:, 0]
                rows[-1]["arm"] = arm_to_latent(arm[None], z.shape[-2:])[0].bfloat16()
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        prompt = robot_data.make_prompt(episode.instruction, self.args.prompt_views, episode.views)
        return {**tensors, "text": self.encode_prompt()(prompt), "empty": self.encode_prompt()("")}


@torch.no_grad()
def build_cache(args, run, splits, folder, kinds, idm=None):
    """Writes the missing cache files of `kinds`. Call it on all ranks. It continues an interrupted call."""
    size = args.height, args.width
    folder.mkdir(parents=True, exist_ok=True)
    if run.rank == 0 and args.model == "tiny" and not (folder / "codec.safetensors").is_file():
        episodes = tasks(splits["train"])        # the tiny model's codec is fitted to about 40 of these
        videos = [robot_data.read_episode(episode, size)[0][robot_data.cut_window(episode, 0, args.frames)[0]]
                  for episode in episodes[::max(1, len(episodes) // 40)]]
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
        for i in range(0, len(jobs), 8):                     # in groups of 8, since videos are large
            videos = pool.map(lambda job: robot_data.read_episode(job[2], size), jobs[i:i + 8])
            for (*job, paths), video in zip(jobs[i:i + 8], videos):
                for path in paths:
                    make = getattr(writer, path.suffix[1:])
                    common.save_weights(path, make(*job, *video))
                bar.update()
    common.barrier()


class Cache:
    """Windows or frames of a split. Files are memory-mapped: a thousand episodes take 14 GB."""
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
    """Windows -> batch {"latents", "valid", "actions", "arm" if cached, "text": B L D}. The text is padded
    with zeros, as in Wan's training. unconditional: rows of the batch that get the empty prompt."""
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
    """Evaluates on held-out episodes -> [eval.json, curves.png]. model or idm may be None."""
    began, videos, actions, clips = time.time(), {}, {}, {"name": []}
    if model is not None:
        vae, encode_prompt = load_codec(args, folder, run.device), text_encoder(args, run.device)
    count = len(tasks(splits["test"]))           # episodes of random poses follow
    limit = args.eval_clips or count
    held_out = splits["test"][:min(count, limit)] + splits["test"][count:count + limit]
    for number, episode in list(enumerate(held_out))[run.rank::run.world]:
        truth, target, valid, arm = robot_data.load_window(episode, args.frames, (args.height, args.width))
        predictions = {}                         # (method, source of the frames): actions, valid
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
                if task:                         # the same first frame with the other instruction
                    video = sample_video(args, run, model, vae, encode_prompt, truth[0], task, number)
                    task_actions = predict_actions(idm, video, run.device)[0]
                    for row in (frames["model"], predicted, episode), (video, task_actions, task):
                        for name, value in robot_data.follows_instruction(*row).items():
                            clips.setdefault(name, []).append(value)
        for key, (predicted, mask) in predictions.items():
            actions.setdefault(key, []).append((predicted[mask], target[mask]))
    videos, actions, clips = (common.gather_rows(table) for table in (videos, actions, clips))
    return [] if run.rank else report(args, videos, actions, clips, began)


def report(args, videos, actions, clips, began):
    """Averages the scores of evaluate(), writes eval.json and curves.png, prints the table."""
    scores = {}
    for method, tables in videos.items():
        scores[method] = common.horizon_means(tables)
        for name, value in tables[0].items():    # for short windows: the second half
            later = torch.cat([table[name] for table in tables])[:, min(FPS, value.shape[1] // 2):]
            scores[method][f"{name}_beyond_1s"] = later.nanmean().item()
    for (method, source), rows in actions.items():
        values = idm_scores(*(torch.cat(column) for column in zip(*rows)))
        scores.setdefault(method, {}).update({f"action_{name}_{source}": x for name, x in values.items()})
    names, ranking = clips.pop("name"), {}
    for name, values in clips.items():           # over both instructions: .5 if the model ignores them
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
    """Writes videos of held-out episodes, masked by the IDM as well, and actions -> [samples/...]."""
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
    """Joins torchrun's process group, chooses device and dtype -> rank, world, device, dtype, autocast."""
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
    """Applies --grad_checkpoint and --compile, then FSDP2 per block with --fsdp, or DDP under torchrun. The
    IDM, which has no transformer, uses DDP with --fsdp too.

    Weights, gradients and moments are in fp32, blocks compute in bf16. FSDP does not cast inputs: timesteps
    and rotary tables stay in fp32. The root is resharded after forward like the blocks: by default it stays
    gathered until a backward pass, and the step after a validation would use the EMA weights."""
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
    """Learning rate at a step, counted from 0: linear warm-up, then cosine decay to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(args, run, script, stage, model, loss_fn, val_fn, checkpoint):
    """Trains the parameters of `model` that require gradients up to stage.steps, resuming from `checkpoint`
    -> the wrapped model, with the EMA weights. The last step is saved in ckpt/ of the stage's folder.
    loss_fn(model, step, micro, grad_accum) -> loss, {name: term to log}. val_fn(model) -> {name: number}."""
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
        for micro in range(grad_accum):          # gradients are averaged at the last micro-step only
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
        completed = step + 1
        stop = should_stop()
        save = stop or completed == stage.steps or args.save_every and completed % args.save_every == 0
        if (save or args.log_every and completed % args.log_every == 0) and not norm.isfinite():
            raise UserError(f"loss or gradient is not finite at step {completed}: resume from "
                            f"{common.latest_checkpoint(folder / 'ckpt') or 'the start'} with a lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        log.step(completed, lr=optimizer.param_groups[0]["lr"], grad_norm=norm)
        if save:                                 # before validation, so that an error there loses nothing
            common.save_run(folder, script, completed, net, optimizer, ema, args, args.keep_last)
        if stop:
            raise UserError(f"stopped by SIGTERM after step {completed} (saved): the same command resumes")
        if args.eval_every and (completed % args.eval_every == 0 or completed == stage.steps):
            with ema.applied(), torch.no_grad(), run.autocast():
                log.row(completed, **val_fn(net.eval()))
            log.restart_clock()
    common.remove_sigterm_handler()
    log.bar.close()
    ema.copy_to_params()
    return net


def sample_numbers(args, run, spec, salt, step, micro, grad_accum, batch_size):
    """Random values of a micro-batch, which depend on (seed, salt, step) and on a sample's position in the
    global batch only -> {name: tensor on the CPU}, seed of the step."""
    seed = common.seed_all(args.seed, salt, step)
    return common.sample_global_batch(spec, seed, batch_size, run.rank, run.world, micro, grad_accum), seed


def noise_like(z, seeds):
    """Standard normal noise of the shape of z, B C F h w; each sample has a seed."""
    return torch.cat([fixed_noise(z[:1], int(seed)) for seed in seeds])


def is_finished(stage, checkpoint):
    """Whether a checkpoint is at the last step of its stage."""
    return checkpoint is not None and checkpoint.meta["step"] >= stage.steps


def evenly_spaced(count, limit):
    """Up to `limit` evenly spaced indices below `count`."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int).tolist()


def train_video(args, run, stage, windows, checkpoint):
    """Trains stage "video", writes final/vidar.pt and .safetensors -> VideoModel with the EMA weights."""
    spec = {"window": ("randint", len(windows["train"].rows)), "u": ("rand",), "drop": ("rand",),
            "noise": ("randint", 2 ** 62)}
    model = VideoModel(load_transformer(args, run.device), args)

    def loss_fn(net, step, micro, grad_accum):
        values, _ = sample_numbers(args, run, spec, 1, step, micro, grad_accum, args.batch_size)
        unconditional = (values["drop"] < args.cfg_drop).nonzero().flatten().tolist()
        batch = collate(windows["train"], values["window"].tolist(), args, run.device, unconditional)
        sigma = shift_sigma(values["u"], args.shift).to(run.device)
        return net(batch, noise_like(batch["latents"], values["noise"]), sigma)

    def val_fn(net):                             # fixed windows and noise, sigma 0.5
        indices = evenly_spaced(len(windows["val"].rows), 8)
        batch = collate(windows["val"], indices, args, run.device)
        noise = noise_like(batch["latents"], indices)
        sigma = torch.full((len(indices),), .5, device=run.device)
        return {"val_loss": net(batch, noise, sigma)[1]["flow_loss"].item()}

    net = train(args, run, SCRIPT, stage, model, loss_fn, val_fn, checkpoint)
    stem = Path(args.output_dir, stage.folder, "final/vidar")
    if not is_finished(stage, checkpoint) or not stem.with_suffix(".safetensors").is_file():
        save_transformer(args, run, stem, net)
    return model


@torch.no_grad()
def write_generated_frames(args, run, model, folder, windows, path):
    """Writes a file of kind "frames" with training windows that the video model denoises in one step from a
    random noise level: frames as blurred as its samples, but with known joint positions."""
    vae, rng = load_codec(args, folder, run.device), np.random.default_rng(0)
    frames, actions = [], []
    for number in evenly_spaced(len(windows.rows), args.idm_generated):
        batch = collate(windows, [number], args, run.device)
        z = batch["latents"]
        sigma = torch.full((1,), max(0., 1.6 * rng.random() - .6), device=z.device)     # 0: codec only
        x, levels = add_noise(z, fixed_noise(z, number), sigma)
        with run.autocast():
            v = run_backbone(model.dit, x, 1000 * levels, batch["text"])
        video = common.wan_decode(vae, x - expand_to(levels[:, None], x) * v)[0].cpu()
        for t in range(1 + number % 4, args.frames, 4):      # one frame of each later latent frame
            if batch["valid"][0, (t + 3) // 4]:
                frames.append(to_uint8(resize(video[t:t + 1], idm_config(args)["size"])))
                actions.append(batch["actions"][0, t:t + 1].cpu())
    common.save_weights(path, {"frames": torch.cat(frames), "actions": torch.cat(actions)})


def train_idm(args, run, stage, frames, statistics, checkpoint):
    """Trains stage "idm", writes final/idm.pt. frames: {"train", "val": Cache}. statistics: actions N 14."""
    torch.manual_seed(args.seed)                 # equal weights on all processes
    model = IDM(idm_config(args))
    nn.init.constant_(model.model["mask_model"].out.bias, .3)   # open: a closed mask gets no gradient
    model.set_statistics(statistics)
    model.to(run.device)
    spec = {"frame": ("randint", len(frames["train"].rows))}

    def load_batch(split, numbers):
        columns = frames[split].get(numbers)
        x, actions = (torch.stack(columns[name]).to(run.device) for name in ("frames", "actions"))
        return x / 255, actions

    def loss_fn(net, step, micro, grad_accum):
        values, _ = sample_numbers(args, run, spec, 2, step, micro, grad_accum, stage.batch_size)
        x, actions = load_batch("train", values["frame"].tolist())
        prediction, mask = net(x)
        loss = idm_loss(model.normalize(prediction), model.normalize(actions), mask, args.mask_weight)
        return loss, {"mask_area": mask.detach().mean()}

    def val_fn(net):
        x, actions = load_batch("val", evenly_spaced(len(frames["val"].rows), 128))
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
    """-> the stages to train. The IDM has no EMA, which would not match its batch norm statistics."""
    video = argparse.Namespace(
        name="video", folder="video" if args.stage == "all" else ".", steps=args.max_steps, lr=args.lr,
        warmup_steps=args.warmup_steps, weight_decay=args.weight_decay, ema_decay=args.ema_decay,
        batch_size=args.batch_size, kind="windows")
    idm = argparse.Namespace(
        name="idm", folder=".", steps=args.idm_steps, lr=args.idm_lr or args.lr, weight_decay=1e-2,
        warmup_steps=args.idm_steps // 10, ema_decay=0., batch_size=args.idm_batch_size, kind="frames")
    return {"video": [video], "idm": [idm], "all": [video, idm]}[args.stage]


def train_stages(args, run, checkpoint, splits, folder):
    """Trains the stages of stage_plan(), resuming each."""
    if run.rank == 0:
        common.write_json(Path(args.output_dir, "args.json"), {**vars(args), **common.provenance()})
    idm = load_idm(args.idm, idm_config(args)).to(run.device) if args.idm else None
    plan, generated = stage_plan(args), Path(args.output_dir, "video/final/generated_frames.safetensors")
    build_cache(args, run, splits, folder, [stage.kind for stage in plan], idm)
    if run.rank == 0 and args.model == "tiny":   # --eval needs it before the last step, too
        shutil.copy(folder / "codec.safetensors", args.output_dir)
    for stage in plan:
        paths = {split: sorted(folder.glob(f"{split}_*.{stage.kind}")) for split in ("train", "val")}
        if stage.name == "idm" and generated.is_file():
            paths["train"].append(generated)
        caches = {split: Cache(paths[split]) for split in paths}
        resumed = checkpoint
        if stage.folder != ".":
            resume = "none" if args.resume == "none" else "auto"
            resumed = common.find_checkpoint(Path(args.output_dir, stage.folder, "ckpt"), SCRIPT, resume)
        if stage.name == "idm":
            actions = np.concatenate([episode.actions for episode in splits["train"]])
            train_idm(args, run, stage, caches, torch.from_numpy(actions), resumed)
            continue
        model = train_video(args, run, stage, caches, resumed).eval()
        if run.rank == 0 and len(plan) > 1 and args.idm_generated and not generated.is_file():
            write_generated_frames(args, run, model, folder, caches["train"], generated)
        common.barrier()


# ---- main -----------------------------------------------------------------------------------------------

def load_models(args, device, checkpoint=None):
    """-> VideoModel or None, IDM or None: EMA weights of `checkpoint` or of the run's newest checkpoints."""
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
    """A batch of the shapes that the flags determine, on the default device."""
    B, side = args.batch_size, codec_side(args)
    size = (args.frames - 1) // 4 + 1, args.height // side, args.width // side
    z = torch.randn(B, config.in_channels, *size)
    return {"latents": z, "valid": torch.ones(B, z.shape[2], dtype=torch.bool), "arm": z[:, :1],
            "text": torch.randn(B, args.text_length, config.text_dim)}


def dry_run(args):
    """Prints parameters, FLOPs and memory of a training step of the video model, on the meta device."""
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
        common.barrier()
    models = load_models(args, run.device, checkpoint if inference_only else None)
    source = common.run_folder(checkpoint.path) if inference_only and checkpoint else args.output_dir
    files = evaluate(args, run, *models, splits, source) if common.wants_evaluation(args) else []
    if args.sample or not inference_only:
        files += sample(args, run, *models, splits, source)
    if run.rank == 0:
        common.show_results(args.output_dir, files, args.tensorboard, args.wandb)
    common.shutdown()


def main(argv=None):
    return common.one_line_errors(f"{SCRIPT}.py", lambda: run_script(argv))


if __name__ == "__main__":
    sys.exit(main())
