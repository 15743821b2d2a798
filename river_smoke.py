"""river_smoke.py: predicts how smoke moves, by flow matching on latents of a quantised autoencoder (RIVER).

Paper       Davtyan, Sameni, Favaro: Efficient Video Prediction via Sparsely Conditioned Flow Matching,
            ICCV 2023, arXiv:2211.14575. FSQ: arXiv:2309.15505. Fair CRPS: Ferro 2014, doi:10.1002/qj.2270.
Equations   z = encoder(x), x = decoder(nearest code of z)          -> Autoencoder, FSQ, VQ
            training algorithm, steps 1 and 2: load, encode         -> load_clips, encode_clips
            steps 3 to 9: tau, t, z_t, u_t, c, v_t, |v_t - u_t|^2   -> river_loss, probability_path
            v_t(z_t | z^{tau-1}, z^c, tau - c)                      -> VectorField
            inference, with a warm start z'_s ~ p_s(z | z^{T-1})    -> generate
            PSNR, MSE, SSIM, CRPS; FVD                  -> forecast_scores, distribution_distances
Differs     from the document and from Araachie/river, and why:
            - frames are encoded once and normalised; the original runs encoder and decoder at every step
            - u_t = z^tau - (1 - sigma) eps directly; the original's equal form divides by zero at t = 1,
              against which the document has sigma = 1e-7: here it is 0
            - tau may be the second frame, with a learned "no context": starts from one frame are trained
            - the distance is tau - c as in the paper; contexts stay within the distances that were trained
            - 10 frames are observed, as the document's inference has it; its configuration says 1
            - steps counts network calls (midpoint); the original's steps = 50 makes 196 calls of rk4
            - the smoke weight is measured in pixels; a threshold on latent norms is 1 everywhere
            - FVD only with its real detector (--i3d); beside it the CRPS, which an ensemble cannot cheat
            - tiny: FSQ (a better picture than VQ in the same seconds) and 3 reference frames
Run         python river_smoke.py                           # simulate, train, evaluate: 5 to 9 min, 1.2 GB
            python river_smoke.py --sample --warm_start 0.2 # 12 s; without a checkpoint trains tiny first
            python river_smoke.py --eval --solver ab2        # 1 min
            python river_smoke.py --max_steps 2000           # goes on from the newest checkpoint
            python river_smoke.py --extract my_videos --data_dir final_dataset      # videos -> 64x64 on black
            torchrun --nproc_per_node=8 river_smoke.py --preset paper --data_dir final_dataset
            python river_smoke.py --preset paper --dry_run
Shapes      B batch  T frames  C latent channels  H W pixels  h w latent grid (8 8)  N tokens  D width
            m members. Videos are B T 3 H W in [-1, 1], latents B T C h w; t = 0 is noise, t = 1 is data.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common
from common import UserError, expand_to, from_uint8

SCRIPT = "river_smoke"
SMOKE_LEVEL = 0.05                       # a pixel is smoke where its brightest channel, in [0, 1], is above
WARM_STARTS = (0.0, 0.1, 0.2, 0.3, 0.5)  # rows of the table that evaluation prints

# ---- args -----------------------------------------------------------------------------------------------

PRESETS = {
    "tiny": dict(data_dir="data/river_smoke/final_dataset", max_steps=1000, lr=1e-3, warmup_steps=50,
                 beta2=0.95, ema_decay=0.99),
    # The document's: VQ latents 8x8x256 of 1024 codes, sequences of 10, depth 4, 300k steps of 32.
    "paper": dict(data_dir="final_dataset", quantizer="vq", latent_channels=256, ae_width=48,
                  ae_steps=100_000, ae_batch_size=64, ae_lr=2e-4, depth=4, heads=8, history=1,
                  batch_size=32, max_steps=300_000, lr=1e-4, warmup_steps=1000, weight_decay=5e-6,
                  beta2=0.95, ema_decay=0.9999, eval_every=5000, save_every=5000, log_every=100,
                  eval_clips=256),
}
# What shapes the weights or gives them their meaning: a checkpoint's own values hold.
MODEL_FLAGS = ("quantizer", "latent_channels", "codes", "fsq_levels", "ae_width", "ae_depth", "width",
               "depth", "mid_depth", "heads", "history", "path", "sigma", "bridge_noise", "num_observations")


def build_parser():
    parser = Parser(prog=f"{SCRIPT}.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_shared_flags(parser, PRESETS)
    add = parser.add_argument_group("data").add_argument
    add("--num_observations", type=int, default=10, help="frames in a training sequence")
    add("--extract", metavar="VIDEOS", help="make data_dir from a folder (or one file) of videos, then exit")
    add("--sim_clips", type=int, default=256, help="tiny: training clips; val and test an eighth each")
    add("--sim_frames", type=int, default=36, help="tiny: frames in a simulated clip")
    add("--drop_short", action="store_true", help="leave out clips shorter than the window, do not stop")
    add = parser.add_argument_group("autoencoder").add_argument
    add("--quantizer", choices=["fsq", "vq"], default="fsq", help="finite scalar, or EMA codebook")
    add("--latent_channels", type=int, default=16, help="C of the 8x8xC latent")
    add("--codes", type=int, default=1024, help="vq: size of the codebook")
    add("--fsq_levels", type=int, default=8, help="fsq: levels of each channel")
    add("--ae_width", type=int, default=32, help="channels at 32x32; 3-fold at 16x16, 6-fold at 8x8")
    add("--ae_depth", type=int, default=2, help="residual blocks of the decoder at 8x8 and at 16x16")
    add("--ae_steps", type=int, default=400, help="steps of autoencoder training")
    add("--ae_batch_size", type=int, default=16, help="frames per process and step")
    add("--ae_lr", type=float, default=2e-3, help="peak learning rate of the autoencoder")
    add("--masked_finetune", type=float, default=0.25, help="last share of ae_steps: smoke pixels weigh 5")
    add("--gan", type=float, default=0.0, help="weight of a PatchGAN loss in that last share (0: none)")
    add("--autoencoder", metavar="FILE", help="use this autoencoder.safetensors instead of training one")
    add = parser.add_argument_group("flow matching").add_argument
    add("--path", choices=["river", "bridge"], default="river", help="from noise, or the frame before")
    add("--sigma", type=float, default=0.0, help="sigma_min; below 6e-8 it vanishes in fp32")
    add("--bridge_noise", type=float, default=0.5, help="bridge: standard deviation around the frame before")
    add("--smoke_weight", type=float, default=1.0, help="loss weight of cells with smoke (the document: 5)")
    add("--width", type=int, default=256, help="D of the vector field regressor")
    add("--depth", type=int, default=1, help="layers before the middle and, with skips, after it")
    add("--mid_depth", type=int, default=2, help="layers in the middle")
    add("--heads", type=int, default=4, help="attention heads")
    add("--history", type=int, default=3, help="reference frames z^{tau-1}, z^{tau-2}, ... (the document: 1)")
    add = parser.add_argument_group("sampling and evaluation").add_argument
    add("--condition_frames", type=int, default=10, help="observed frames to start from, 1 or more")
    add("--frames_to_generate", type=int, default=10, help="frames to predict after them")
    add("--steps", type=int, default=4, help="network calls per frame; a warm start takes its share off")
    add("--solver", choices=["euler", "midpoint", "ab2"], default="midpoint", help="ab2: Adams-Bashforth")
    add("--warm_start", type=float, default=0.0, help="s in [0, 1): start at t = s, near the frame before")
    add("--past_horizon", type=int, default=0, help="contexts from the last K frames (0: as trained)")
    add("--num_samples", type=int, default=8, help="members m of the ensemble")
    add("--eval_clips", type=int, default=24, help="held-out clips to evaluate, at most")
    add("--i3d", metavar="FILE", help="StyleGAN-V's i3d_torchscript.pt: report FVD with it")
    return parser


def check_args(args):
    """One clear line for values that no run can mean."""
    check_numbers(args, least_1=("steps", "ae_steps", "ae_batch_size", "history", "heads",
                                 "frames_to_generate", "condition_frames", "num_samples", "eval_clips",
                                 "sim_clips", "sim_frames", "width", "ae_width", "latent_channels", "codes"),
                  least_0=("ae_lr", "depth", "mid_depth", "ae_depth", "gan", "sigma", "bridge_noise",
                           "smoke_weight", "past_horizon"),
                  shares=("masked_finetune",))
    if not 0 <= args.warm_start < 1:
        raise UserError(f"--warm_start must be in [0, 1), not {args.warm_start}: 1 is the old frame itself")
    if args.num_observations < 3:
        raise UserError(f"--num_observations must be at least 3 (context, reference, target), "
                        f"not {args.num_observations}")
    if args.fsq_levels < 2:
        raise UserError(f"--fsq_levels must be at least 2, not {args.fsq_levels}")
    if args.width % args.heads:
        raise UserError(f"--width must be a multiple of --heads {args.heads}, not {args.width}")
    if args.ae_width % 8:
        raise UserError(f"--ae_width must be a multiple of 8, not {args.ae_width}")
    if args.i3d:                                 # one that cannot be read is noticed here, not hours later
        load_detector(args.i3d)


# ---- model: autoencoder ---------------------------------------------------------------------------------

class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), the last convolution zero at the start."""
    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class FSQ(nn.Module):
    """Finite scalar quantisation: every channel squashed to [-1, 1] and rounded to one of `levels` values."""
    def __init__(self, channels, levels):
        super().__init__()
        self.register_buffer("radius", torch.tensor((levels - 1) / 2))   # travels with the weights

    def nearest(self, z):
        return ((z.clamp(-1, 1) + 1) * self.radius).round() / self.radius - 1

    def latent(self, z):
        return self.nearest(torch.tanh(z))

    def forward(self, z):                # straight-through: the value of the code, the gradient of the squash
        z = torch.tanh(z)
        return z + (self.nearest(z) - z).detach(), z.new_zeros(())


class VQ(nn.Module):
    """Vector quantisation: EMA codebook (van den Oord 2017, A.1), dead codes restart (Jukebox 2005.00341)."""
    def __init__(self, channels, codes, decay=0.99, commitment=0.25):
        super().__init__()
        self.decay, self.commitment = decay, commitment
        self.register_buffer("codebook", torch.randn(codes, channels))
        self.register_buffer("sums", torch.zeros(codes, channels))
        self.register_buffer("counts", torch.zeros(codes))

    def index(self, flat):               # squared distance without |flat|^2, which is the same for every code
        return (self.codebook.pow(2).sum(1) - 2 * flat @ self.codebook.T).argmin(1)

    def nearest(self, z):
        code = self.codebook[self.index(z.movedim(1, -1).flatten(0, -2).float())]
        return code.reshape(z.shape[0], *z.shape[2:], -1).movedim(-1, 1).to(z.dtype)

    def latent(self, z):
        return z                         # the flow runs on the encoder's output; decoding quantises

    def forward(self, z):
        if self.training:
            self.update(z.detach().movedim(1, -1).flatten(0, -2).float())
        code = self.nearest(z)
        return z + (code - z).detach(), self.commitment * F.mse_loss(z, code)

    @torch.no_grad()
    def update(self, flat):
        if dist.is_initialized():        # every process sees all encoder outputs: all codebooks stay equal
            parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, flat.contiguous())
            flat = torch.cat(parts)
        index = self.index(flat)
        count = torch.bincount(index, minlength=len(self.codebook)).to(flat)
        self.counts.lerp_(count, 1 - self.decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, index, flat), 1 - self.decay)
        dead = self.counts < 0.03        # fewer than about 3 hits in the last hundred batches; at first, all
        fresh = torch.linspace(0, len(flat) - 1, len(dead), device=flat.device).long()
        self.sums[dead], self.counts[dead] = flat[fresh][dead], 1.0
        self.codebook.copy_(self.sums / self.counts[:, None])


class Autoencoder(nn.Module):
    """64x64 RGB <-> 8x8xC. encode() and decode() speak latents of mean 0 and variance 1 per channel."""
    def __init__(self, args):
        super().__init__()
        a, b, c, C = args.ae_width, 3 * args.ae_width, 6 * args.ae_width, args.latent_channels
        # Pixel shuffles keep the work at 16x16 and 8x8: full-resolution convolutions would take most of the
        # time. One block per stage suffices to encode; the decoder has to invent the edges.
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), nn.Conv2d(48, b, 3, padding=1), ResBlock(b),
            nn.PixelUnshuffle(2), nn.Conv2d(4 * b, c, 1), ResBlock(c),
            nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, C, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(C, c, 3, padding=1), *[ResBlock(c) for _ in range(args.ae_depth)],
            nn.Conv2d(c, 4 * b, 1), nn.PixelShuffle(2), *[ResBlock(b) for _ in range(args.ae_depth)],
            nn.Conv2d(b, 4 * a, 1), nn.PixelShuffle(2), nn.GroupNorm(8, a), nn.SiLU(),
            nn.Conv2d(a, 12, 3, padding=1), nn.PixelShuffle(2))
        self.quantizer = FSQ(C, args.fsq_levels) if args.quantizer == "fsq" else VQ(C, args.codes)
        self.register_buffer("mean", torch.zeros(C, 1, 1))
        self.register_buffer("std", torch.ones(C, 1, 1))

    def forward(self, x):
        """B 3 H W -> reconstruction of the same shape, commitment loss."""
        z, commitment = self.quantizer(self.encoder(x.contiguous(memory_format=torch.channels_last)))
        return self.decoder(z), commitment

    @torch.no_grad()
    def encode(self, x):
        """... 3 H W -> ... C h w."""
        z = [self.quantizer.latent(self.encoder(part.contiguous(memory_format=torch.channels_last)))
             for part in x.flatten(0, -4).split(128)]
        z = ((torch.cat(z) - self.mean) / self.std).contiguous()
        return z.reshape(*x.shape[:-3], *z.shape[1:])

    @torch.no_grad()
    def decode(self, z):
        """... C h w -> ... 3 H W, through the nearest code."""
        x = [self.decoder(self.quantizer.nearest(part * self.std + self.mean))
             for part in z.flatten(0, -4).split(128)]
        return torch.cat(x).clamp(-1, 1).contiguous().reshape(*z.shape[:-3], *x[0].shape[1:])


class AutoencoderLoss(nn.Module):
    """The autoencoder's training loss; with --gan also a PatchGAN discriminator, under the same optimiser."""
    def __init__(self, args):
        super().__init__()
        self.autoencoder, self.gan = Autoencoder(args), args.gan
        if args.gan:
            self.discriminator = nn.Sequential(
                nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(.2),
                nn.Conv2d(64, 128, 4, 2, 1), nn.GroupNorm(8, 128), nn.LeakyReLU(.2),
                nn.Conv2d(128, 256, 4, 2, 1), nn.GroupNorm(8, 256), nn.LeakyReLU(.2), nn.Conv2d(256, 1, 1))

    def forward(self, x, finetune):
        """x B 3 H W; finetune 0, or 1 in the last share of training, where smoke weighs 5 -> scalar loss."""
        y, commitment = self.autoencoder(x)
        weight = 1 + 4 * finetune * smoke_mask(x).float()
        weight = weight / weight.mean(dim=(1, 2, 3), keepdim=True)
        loss = (weight * ((y - x) ** 2 + .1 * (y - x).abs())).mean() + commitment
        if self.gan:
            # The discriminator learns from the start, the decoder listens to it in the last share. Where the
            # decoder asks for a high score its weights are detached, so that one backward serves both.
            frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
            score = torch.func.functional_call(self.discriminator, frozen, (y,)).mean()
            real, fake = self.discriminator(x), self.discriminator(y.detach())
            loss = loss - finetune * self.gan * score + F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        return loss


def smoke_mask(x):
    """... 3 H W in [-1, 1] -> ... 1 H W bool."""
    return (x.amax(dim=-3, keepdim=True) + 1) / 2 > SMOKE_LEVEL


# ---- model: vector field --------------------------------------------------------------------------------

class Block(nn.Module):
    """Transformer layer whose norms time and distance modulate: one map for all layers and a table for each
    (adaLN-single, PixArt 2310.00426), zero at first, so that the layer starts as the identity."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.table = nn.Parameter(torch.zeros(6, 1, width))

    def forward(self, x, modulation):
        B, N, D = x.shape
        scale1, shift1, gate1, scale2, shift2, gate2 = (modulation + self.table).unbind(1)      # B 1 D
        y = torch.addcmul(shift1, F.layer_norm(x, (D,)), 1 + scale1)
        q, k, v = self.qkv(y).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = torch.addcmul(x, gate1, self.out(y))
        y = torch.addcmul(shift2, F.layer_norm(x, (D,)), 1 + scale2)
        return torch.addcmul(x, gate2, self.down(F.gelu(self.up(y), approximate="tanh")))


def timestep_embedding(t, dim, scale=1000.0, max_period=10000.0):
    """(B,) -> (B, dim): cos and sin of scale * t at dim / 2 geometric frequencies (Vaswani 2017, 3.5)."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = scale * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class VectorField(nn.Module):
    """v_t(z_t | z^{tau-1}, z^c, tau - c): frames stacked on one grid's channels, U-ViT skips (2209.12152)."""
    def __init__(self, args):
        super().__init__()
        C, D, frames = args.latent_channels, args.width, args.history + 1
        self.grad_checkpoint = args.grad_checkpoint
        self.absent = nn.Parameter(torch.zeros(frames, C, 1, 1))       # stands for a frame before the first
        # 3x3, not 1x1: advection is local, and a small network learns it much sooner from neighbouring cells.
        wide = (1 + frames) * C
        narrow = nn.Conv2d(wide, D, 1) if wide > D else nn.Identity()
        self.project_in = nn.Sequential(narrow, nn.Conv2d(min(wide, D), D, 3, padding=1))
        self.position = nn.Parameter(0.02 * torch.randn(D, 8, 8))
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.distance = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.in_blocks, self.mid_blocks, self.out_blocks = (
            nn.ModuleList(Block(D, args.heads) for _ in range(n))
            for n in (args.depth, args.mid_depth, args.depth))
        self.skips = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(args.depth))
        self.modulation, self.project_out = nn.Linear(D, 8 * D), nn.Conv2d(D, C, 3, padding=1)
        for layer in (self.modulation, self.project_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z_t, past, present, distance, t):
        """z_t B C h w; past B K+1 C h w: reference frames, newest first, then the context; present B K+1:
        which of these exist; distance B: tau - c, 0 without context; t B in [0, 1] -> velocity B C h w."""
        past = torch.where(present[:, :, None, None, None], past, self.absent)
        x = self.project_in(torch.cat([z_t[:, None], past], dim=1).flatten(1, 2)) + self.position
        x = x.flatten(2).transpose(1, 2)                               # B N D, a token per cell
        cond = F.silu(self.time(timestep_embedding(t, 256))
                      + self.distance(timestep_embedding(torch.log1p(distance.float()), 256, scale=100.0)))
        modulation, final = self.modulation(cond).unflatten(1, (8, 1, -1)).split((6, 2), dim=1)
        skips = []
        for block in self.in_blocks:
            x = self.run(block, x, modulation)
            skips.append(x)
        for block in self.mid_blocks:
            x = self.run(block, x, modulation)
        for block, skip in zip(self.out_blocks, self.skips):
            x = self.run(block, skip(torch.cat([x, skips.pop()], dim=-1)), modulation)
        scale, shift = final.unbind(1)
        x = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        return self.project_out(x.transpose(1, 2).unflatten(2, z_t.shape[2:]))

    def run(self, block, x, modulation):
        if self.grad_checkpoint and self.training:
            return checkpoint(block, x, modulation, use_reentrant=False)
        return block(x, modulation)


# ---- objective and sampler ------------------------------------------------------------------------------

def probability_path(z, previous, eps, t, args):
    """A point z_t of the path to z and its velocity u_t. z, previous, eps B C h w; t B.

    river:  z_t ~ N(t z, (1 - (1 - sigma) t)^2 I), a straight line from pure noise x_0 = eps
    bridge: the same line from x_0 = previous + bridge_noise * eps, a blurred guess (after 2410.03229)
    """
    t = expand_to(t, z)
    x0 = eps if args.path == "river" else previous + args.bridge_noise * eps
    return (1 - (1 - args.sigma) * t) * x0 + t * z, z - (1 - args.sigma) * x0


def river_loss(field, z, smoke, numbers, args):
    """Steps 3 to 9 of the training algorithm; steps 1 and 2, load and encode, were done once: z B T C h w.

    numbers: tau, t, c, uniform in [0, 1), B, and eps B C h w. smoke B T h w: cells that show smoke.
    -> scalar. Indices count from 0 here, from 1 in the paper.
    """
    B, T = z.shape[:2]
    row = torch.arange(B, device=z.device)
    # 3. target frame tau; frame 1 has no context
    tau = 1 + (numbers["tau"] * (T - 1)).long()
    # 4. t ~ U[0, 1);  5. noisy latent z_t ~ p_t(z | z^tau);  6. target vector u_t(z_t | z^tau)
    t = numbers["t"]
    z_t, u_t = probability_path(z[row, tau], z[row, tau - 1], numbers["eps"], t, args)
    # 7. context frame c <= tau - 2, beside the reference tau - 1 (and, with --history, the frames before it)
    c = (numbers["c"] * (tau - 1)).long()
    references = tau[:, None] - 1 - torch.arange(args.history, device=z.device)
    frames = torch.cat([references, c[:, None]], dim=1)
    present = torch.cat([references >= 0, tau[:, None] >= 2], dim=1)
    past = z[row[:, None], frames.clamp(min=0)]
    # 8. v_t(z_t | z^{tau-1}, z^c, tau - c)
    v_t = field(z_t, past, present, torch.where(tau >= 2, tau - c, 0), t)
    # 9. || v_t - u_t ||^2, of weight 1 on average in every sample
    weight = 1 + (args.smoke_weight - 1) * smoke[row, tau][:, None].float()
    weight = weight / weight.mean(dim=(2, 3), keepdim=True)
    return (weight * (v_t.float() - u_t) ** 2).mean()


def network_calls(args, warm_start):
    """Network calls per frame: a warm start at t = s leaves (1 - s) of the steps to do."""
    return max(1, round((1 - warm_start) * args.steps))


@torch.no_grad()
def generate(field, z, args, generator, warm_start=None):
    """Predicts args.frames_to_generate latents after the observed z: B T C h w -> B frames C h w.

    Each step draws one context, shared by both stages of a midpoint step: its order needs a fixed field.
    """
    s = args.warm_start if warm_start is None else warm_start
    calls = network_calls(args, s)
    intervals = math.ceil(calls / 2) if args.solver == "midpoint" else calls
    step, B, device = (1 - s) / intervals, len(z), z.device
    row, at = torch.arange(B, device=device), lambda t: torch.full((B,), t, device=device)
    for _ in range(args.frames_to_generate):
        L, old_v = z.shape[1], None
        eps = torch.randn(z[:, -1].shape, generator=generator, device=device)
        # z'_s ~ p_s(z | z^{T-1}): the path towards the frame before, left at t = s; x_0 itself where s = 0.
        x, _ = probability_path(z[:, -1], z[:, -1], eps, at(s), args)
        horizon = min(L, args.past_horizon or L, args.num_observations - 1)      # no further than was trained
        references = (L - 1 - torch.arange(args.history, device=device)).expand(B, -1)
        for i in range(intervals):
            c = L - horizon + (torch.rand(B, generator=generator, device=device) * (horizon - 1)).long()
            frames = torch.cat([references, c[:, None]], dim=1)
            present = torch.cat([references >= 0, (c < L - 1)[:, None]], dim=1)
            given = z[row[:, None], frames.clamp(min=0)], present, torch.where(c < L - 1, L - c, 0)
            t = s + i * step
            v = field(x, *given, at(t))
            if args.solver == "midpoint" and 2 * i + 1 < calls:        # an odd count ends on one Euler step
                v = field(x + step / 2 * v, *given, at(t + step / 2))
            elif args.solver == "ab2":
                v, old_v = v if old_v is None else 1.5 * v - 0.5 * old_v, v
            x = x + step * v
        z = torch.cat([z, x[:, None]], dim=1)
    return z[:, -args.frames_to_generate:]


# ---- data -----------------------------------------------------------------------------------------------

def load_clips(root, split):
    """Reads final_dataset/<split>: <video>_frame_0001.png as named in <split>_files.txt (a frame per line:
    "name", "name label" or "split/name label"), or a folder of frames per video. Errors name what to mend.

    -> frames F 3 64 64 uint8, video after video, and a list of (video, its first row, its frame numbers).
    """
    import imageio.v3 as iio
    folder, listing, found = Path(root) / split, Path(root) / f"{split}_files.txt", {}
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: make it with python {SCRIPT}.py --extract VIDEOS --data_dir "
                        f"{root}, or run python {SCRIPT}.py --preset tiny")
    if listing.is_file():
        present = set(os.listdir(folder))
        for name in (Path(line.split()[0]).name for line in listing.read_text().splitlines() if line.strip()):
            match = re.fullmatch(r"(.+)_frame_(\d+)\.\w+", name)
            if not match or name not in present:
                raise UserError(f"{listing} names {name}, which is not " +
                                (f"in {folder}" if match else "<video>_frame_<number>.png"))
            found.setdefault(match[1], {})[int(match[2])] = folder / name
    else:
        if any(folder.glob("*.png")):
            raise UserError(f"no list file {listing}: a flat folder needs one, a frame's name on every line")
        for path in folder.glob("*/*.png"):
            found.setdefault(path.parent.name, {})[int(re.sub(r"\D", "", path.stem) or 0)] = path
    if not found:
        raise UserError(f"split {split} is empty: no frames in {folder}")

    def read(path):
        try:
            frame = iio.imread(path, mode="RGB")
        except Exception as error:       # pillow raises many kinds; the user needs the file's name
            raise UserError(f"cannot read image {path}: {common.reason(error)}") from error
        if frame.shape != (64, 64, 3):
            raise UserError(f"image {path} is {frame.shape[1]}x{frame.shape[0]}, expected 64x64")
        return frame

    paths, videos = [], []
    for name in sorted(found):
        videos.append((name, len(paths), np.array(sorted(found[name]))))
        paths += [found[name][number] for number in videos[-1][2]]
    with ThreadPoolExecutor() as pool:
        frames = np.stack(list(tqdm(pool.map(read, paths), f"read {split}", len(paths), leave=False)))
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), videos


def window_starts(videos, length, drop_short=False):
    """Rows at which `length` consecutive frames of one video begin, the last such row included.

    -> (starts N, windows lost to missing frames, short clips dropped). A shorter clip is a UserError unless
    drop_short; so is a split without any window.
    """
    starts, lost, short = [], 0, 0
    for name, first, numbers in videos:
        if len(numbers) < length:
            short += 1
            if not drop_short:
                raise UserError(f"clip {name} has {len(numbers)} frames, fewer than the window of {length}: "
                                f"ask for fewer frames, or leave such clips out with --drop_short")
            continue
        whole = numbers[length - 1:] - numbers[:len(numbers) - length + 1] == length - 1
        starts += (first + np.flatnonzero(whole)).tolist()
        lost += numbers[-1] - numbers[0] + 2 - length - whole.sum()
    if not starts:
        raise UserError(f"no clip has {length} consecutive frames")
    return torch.tensor(starts), int(lost), short


def write_dataset(root, clips, stats):
    """Writes an iterable of (split, video, frames T 64 64 3 uint8) as a flat final_dataset; whole, or not."""
    import imageio.v3 as iio
    root, tmp = Path(root), Path(f"{root}.tmp")
    if root.exists():
        raise UserError(f"{root} exists already: choose another --data_dir, or remove it")
    shutil.rmtree(tmp, ignore_errors=True)                             # of a killed run
    lists = {split: [] for split in ("train", "val", "test")}
    try:
        for split in lists:
            (tmp / split).mkdir(parents=True)
        for split, video, frames in clips:
            for number, frame in enumerate(frames, 1):
                name = f"{video}_frame_{number:04d}.png"
                iio.imwrite(tmp / split / name, frame, compress_level=1)
                lists[split].append(f"{split}/{name} 1\n")
        if not any(lists.values()):
            raise UserError("no smoke found: no clip passed the filters of --extract")
        for split, lines in lists.items():
            (tmp / f"{split}_files.txt").write_text("".join(lines))
        stats |= {split: len(lines) for split, lines in lists.items()}
        common.write_json(tmp / "dataset_stats.json", stats)
        tmp.rename(root)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def resize_video(x, size):
    """... C H W floats -> ... C size size: anti-aliased bicubic, centre crop; stays in the input's range."""
    H, W = x.shape[-2:]
    new = max(size, round(H * size / min(H, W))), max(size, round(W * size / min(H, W)))
    flat = x.reshape(-1, *x.shape[-3:])
    if new != (H, W):
        low, high = flat.amin(), flat.amax()
        flat = F.interpolate(flat, new, mode="bicubic", antialias=True, align_corners=False).clamp(low, high)
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    return flat[..., top:top + size, left:left + size].reshape(*x.shape[:-2], size, size)


def extract_clips(source, stats):
    """Raw videos -> clips of 64x64 smoke on black, split 80/10/10 by video; yields what write_dataset takes.

    The background is the median over the clip; alpha is a smoothstep of the largest channel difference from
    .04 to .18, softened by 3x3. Whole clips are dropped where smoke covers under 1 % or over 90 % of the
    pixels, is darker than .1 or varies less than .001: dropping single frames tears holes into motion.
    """
    files = [source] if source.is_file() else [p for p in sorted(source.rglob("*")) if p.suffix.lower() in
                                               (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".gif")]
    if not files:
        raise UserError(f"no videos in {source}: --extract takes a video file or a folder of them")
    order = sorted(files, key=lambda path: hashlib.sha256(path.stem.encode()).digest())
    tenth = max(1, round(len(files) / 10)) if len(files) > 2 else 0
    split_of = dict.fromkeys(files, "train") | dict.fromkeys(order[:tenth], "val")
    split_of |= dict.fromkeys(order[tenth:2 * tenth], "test")
    for path in tqdm(files, "extract"):
        x = common.read_video(path).float() / 255
        difference = (x - x.median(dim=0).values).abs().amax(dim=1, keepdim=True)
        ramp = ((difference - .04) / (.18 - .04)).clamp(0, 1)
        alpha = F.avg_pool2d(ramp * ramp * (3 - 2 * ramp), 3, 1, 1, count_include_pad=False)
        x = resize_video(x * alpha * (alpha > .05), 64)
        smoke, grey = x.amax(1) > SMOKE_LEVEL, x.mean(1)
        kept = .01 <= smoke.float().mean() <= .9 and grey[smoke].mean() >= .1 and grey.var() >= .001
        stats["clips_kept" if kept else "clips_dropped"] += 1
        if kept:
            yield split_of[path], path.stem, (x * 255).round().byte().permute(0, 2, 3, 1).numpy()


def simulate(args):
    """Writes the simulated twin of the data to data_dir, once: another --seed trains on the same clips.
    UserError where clips are there that other flags made, or that were not simulated."""
    root, listing = Path(args.data_dir), Path(args.data_dir, "train_files.txt")
    if not root.exists():
        return write_dataset(root, simulated_clips(args.sim_clips, args.sim_frames, args.seed), {
            "source": "SIMULATED by river_smoke.py, 2-D stable fluids, not filmed", "seed": args.seed})
    last = re.search(r"/sim0(\d+)_frame_(\d+)\.png 1\n$", listing.read_text() if listing.is_file() else "")
    if not last:
        raise UserError(f"{root} holds other clips: remove it, or name what you want with --data_dir")
    for name, made in ("sim_clips", int(last[1]) + 1), ("sim_frames", int(last[2])):
        if getattr(args, name) != made:
            raise UserError(f"{root} was made with --{name} {made}, not {getattr(args, name)}: leave that "
                            f"flag out, or remove the folder")


def simulated_clips(train_clips, frames, seed):
    """Yields what write_dataset takes, in batches of 32 with a seed each."""
    counts = {"train": train_clips, "val": max(2, train_clips // 8), "test": max(2, train_clips // 8)}
    with tqdm(total=sum(counts.values()), desc="simulate", unit="clip") as bar:
        for part, (split, count) in enumerate(counts.items()):
            for first in range(0, count, 32):
                clips = simulate_smoke(min(32, count - first), frames, common.seed_all(seed, part, first))
                yield from ((split, f"sim{part}{first + i:05d}", clip) for i, clip in enumerate(clips))
                bar.update(len(clips))


def simulate_smoke(n, frames, seed, W=64, substeps=2, warmup=16):
    """Plumes by 2-D stable fluids (Stam 1999), buoyancy, wind, gusts, vorticity confinement (Fedkiw 2001).

    -> n frames 64 64 3 uint8 on exact black. A frame is one time unit, velocities are cells per unit. A fifth
    of the domain lies hidden above the picture: plumes leave it instead of flattening at a ceiling.
    """
    draw = torch.Generator().manual_seed(seed)
    noise = lambda *shape: torch.randn(n, *shape, generator=draw)
    uniform = lambda low, high: low + (high - low) * torch.rand(n, 1, 1, generator=draw)
    top, dt = W // 4, 1 / substeps
    H = W + top
    y, x = torch.meshgrid(torch.arange(H).float(), torch.arange(W).float(), indexing="ij")
    ky, kx = 2 * math.pi * torch.fft.fftfreq(H)[:, None], 2 * math.pi * torch.fft.rfftfreq(W)[None]
    k2 = (kx ** 2 + ky ** 2).clamp(min=1e-9)
    inside = torch.stack([x / (.05 * W), (W - 1 - x) / (.05 * W), y / (.8 * top), (H - 1 - y) / (.05 * W)])
    inside = inside.amin(0).clamp(0, 1)                                # 0 at the rim, where a sponge absorbs
    sources = [dict(x=uniform(.15, .85) * W, y=top + uniform(.6, .92) * W, radius=uniform(.035, .09) * W,
                    rate=uniform(.5, 1.3) * (uniform(0, 1) < chance), phase=uniform(0, 2 * math.pi),
                    pulse=uniform(.15, .6)) for chance in (1.0, 0.3)]
    wind, gustiness, turbulence = uniform(-1.5, 1.5), uniform(.1, .5), uniform(.2, .8)
    swirl, buoyancy, fade, gain = uniform(.1, .35), uniform(.2, .45), uniform(.965, .99), uniform(1.2, 2.6)
    tint = torch.stack([uniform(.80, 1.), uniform(.88, 1.), uniform(.96, 1.)], dim=-1)     # n 1 1 3, greys
    smoke, heat, v = torch.zeros(3, n, H, W)
    u, gust, eddies = wind.expand(n, H, W), torch.zeros(n, 1, 1), torch.zeros(n, 2, H // 8, W // 8)
    d_dx = lambda f: (torch.roll(f, -1, 2) - torch.roll(f, 1, 2)) / 2
    d_dy = lambda f: (torch.roll(f, -1, 1) - torch.roll(f, 1, 1)) / 2
    pictures = []
    for step in range((warmup + frames) * substeps):
        gust = .97 * gust + .25 * gustiness * noise(1, 1)
        eddies = .9 * eddies + .44 * noise(*eddies.shape[1:])
        for s in sources:
            puff = s["rate"] * (.65 + .35 * torch.sin(s["pulse"] * step * dt + s["phase"]))
            blob = dt * puff * torch.exp(-((x - s["x"]) ** 2 + (y - s["y"]) ** 2) / s["radius"] ** 2)
            smoke, heat = smoke + blob, heat + blob
        push = F.interpolate(eddies, (H, W), mode="bilinear")
        push = push * (dt * turbulence * smoke.clamp(max=1))[:, None]
        curl = d_dx(v) - d_dy(u)                                       # confinement feeds existing vortices
        nx, ny = d_dx(curl.abs()), d_dy(curl.abs())
        strength = dt * swirl * curl * torch.rsqrt(nx ** 2 + ny ** 2 + 1e-6)
        u = u + push[:, 0] + strength * ny
        v = v + push[:, 1] - strength * nx - dt * buoyancy * heat.clamp(max=3)         # rows grow downwards
        relax = dt * (.05 + .5 * (1 - inside))
        u, v = u + relax * ((wind + gust) * (1 - .6 * y / H) - u), v * (1 - relax)
        u_hat, v_hat = torch.fft.rfft2(u), torch.fft.rfft2(v)          # projection: no divergence
        divergence = (kx * u_hat + ky * v_hat) / k2
        u = torch.fft.irfft2(u_hat - kx * divergence, (H, W))
        v = torch.fft.irfft2(v_hat - ky * divergence, (H, W))
        departure = torch.stack([(x - dt * u + .5) * 2 / W - 1, (y - dt * v + .5) * 2 / H - 1], dim=-1)
        u, v, smoke, heat = F.grid_sample(torch.stack([u, v, smoke, heat], dim=1), departure,
                                          padding_mode="border", align_corners=False).unbind(1)
        kept = .5 + .5 * inside
        smoke, heat = smoke * kept * fade ** dt, heat * kept * (fade - .03) ** dt
        if step % substeps == substeps - 1 and step >= warmup * substeps:
            view = F.adaptive_avg_pool2d(smoke[:, top:], 64)
            alpha = 1 - torch.exp(-gain * view)                        # Beer-Lambert, cut like a matte
            alpha = alpha * ((alpha - .08) / .12).clamp(0, 1)
            soft = F.avg_pool2d(view, 5, 1, 2)                         # light from the upper left
            light = (.85 + .9 * (soft - torch.roll(soft, (3, 3), (1, 2))) / (soft + .2)).clamp(.4, 1.1)
            pictures.append((((alpha * light)[..., None] * tint).clamp(0, 1) * 255).round().byte())
    return torch.stack(pictures, dim=1).numpy()


@torch.no_grad()
def encode_clips(autoencoder, frames, device):
    """frames F 3 64 64 uint8 -> latents F C 8 8 float16 and smoke cells F 8 8 bool, kept on the device: the
    document's 128,680 frames take 270 MB at 16 channels."""
    z, smoke = [], []
    for part in tqdm(frames.split(256), "encode", unit="x256"):
        x = from_uint8(part.to(device))
        z.append(autoencoder.encode(x).half())
        smoke.append(F.max_pool2d(smoke_mask(x).float(), 8)[:, 0].bool())
    return torch.cat(z), torch.cat(smoke)


# ---- evaluate and sample --------------------------------------------------------------------------------

def forecast_scores(members, truth):
    """members W m T 3 H W, truth W T 3 H W in [0, 1] -> {metric: W T}.

    psnr, mse, mae average over the members; ssim and what follows judge the first as "a sample". mass_error:
    relative error of the amount of smoke. mask_iou: overlap of the smoke masks. centroid_px: distance of the
    luminance centroids, NaN without smoke.
    """
    m, one, mean = members.shape[1], members[:, 0], members.mean(1)
    mask, true_mask = one.amax(2) > SMOKE_LEVEL, truth.amax(2) > SMOKE_LEVEL
    union = (mask | true_mask).sum((-2, -1))
    mass, true_mass = one.mean(2).sum((-2, -1)), truth.mean(2).sum((-2, -1))
    return {"psnr": common.psnr(members, truth[:, None]).mean(1),
            "psnr_ensemble_mean": common.psnr(mean, truth),
            "mse": common.mse(members, truth[:, None]).mean(1),
            "ssim": common.ssim(one, truth),
            "mae": (members - truth[:, None]).abs().mean(dim=(1, 3, 4, 5)),
            "crps": common.fair_crps(members, truth, dim=1).mean(dim=(2, 3, 4)),
            "ensemble_mse": common.mse(mean, truth),
            "ensemble_variance": members.var(1, correction=min(1, m - 1)).mean(dim=(2, 3, 4)) * (m + 1) / m,
            "mass_error": (mass - true_mass).abs() / true_mass.clamp(min=1),
            "mask_iou": torch.where(union > 0, (mask & true_mask).sum((-2, -1)) / union.clamp(min=1), 1.0),
            "centroid_px": (centroid(one.mean(2)) - centroid(truth.mean(2))).norm(dim=-1)}


def centroid(grey):
    """... H W -> ... 2: centroid of the luminance (row, column) in pixels, NaN where there is none."""
    axis, mass = torch.arange(grey.shape[-1], device=grey.device), grey.sum((-2, -1))
    moments = torch.stack([(grey.sum(-1) * axis).sum(-1), (grey.sum(-2) * axis).sum(-1)], dim=-1)
    return moments / torch.where(mass > 1, mass, torch.nan)[..., None]


def average(tables):
    """A list of {metric: W T} -> {metric: mean, metric_h01: its mean at horizon 1, ..., spread_skill}."""
    mean = {name: torch.cat([table[name].cpu() for table in tables]).nanmean(0) for name in tables[0]}
    ratio = mean.pop("ensemble_variance").mean() / mean.pop("ensemble_mse").mean().clamp(min=1e-12)
    flat = {"spread_skill": ratio.sqrt().item()}
    for name, values in mean.items():
        flat[name] = values.nanmean().item()
        flat |= {f"{name}_h{h:02d}": value.item() for h, value in enumerate(values, 1)}
    return flat


def random_3d_features(clips):
    """N T 3 H W in [0, 1] -> N D: means, deviations and mean changes of a fixed random 3-D convolution net.
    They see texture and motion but no meaning: what is computed from them is not FVD and not called so."""
    generator = torch.Generator().manual_seed(0)
    features, x = [], clips.transpose(1, 2) * 2 - 1
    for c_in, c_out in ((3, 24), (24, 48), (48, 64)):
        kernel = F.normalize(torch.randn(c_out, c_in * 27, generator=generator)).view(c_out, c_in, 3, 3, 3)
        x = F.leaky_relu(F.conv3d(x, kernel.to(x), stride=(1, 2, 2), padding=1), .1)
        features += [x.mean((2, 3, 4)), x.std((2, 3, 4)), x.diff(dim=2).abs().mean((2, 3, 4))]
    return torch.cat(features, dim=1)


def frechet_distance(a, b):
    """Frechet distance of the Gaussians fitted to features a, b: N D. Float64, symmetric eigenproblems."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def load_detector(path, device="cpu"):
    """StyleGAN-V's I3D for FVD, a TorchScript file. UserError where it is absent or something else."""
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--i3d {path} cannot be read as TorchScript: it takes StyleGAN-V's "
                        f"i3d_torchscript.pt") from error


def distribution_distances(fake, real, args, device):
    """{"frd_rand3d_N.._T..": ...}, and FVD with the real detector. fake, real: N T 3 H W in [0, 1].

    The Frechet distance is biased upwards with few clips: compare only what has the same N and T.
    """
    if len(real) < 2:                    # one clip has no covariance
        return {}
    size = f"N{len(real)}_T{real.shape[1]}"
    features = torch.stack([torch.cat([random_3d_features(p) for p in x.split(8)]) for x in (fake, real)])
    features = (features - features[1].mean(0)) / (features[1].std(0) + 1e-6)
    basis = torch.linalg.svd(features[1], full_matrices=False).Vh[:32].T
    distances = {f"frd_rand3d_{size}": frechet_distance(*(features @ basis))}
    if args.i3d:
        detector = load_detector(args.i3d, device)
        options = dict(rescale=False, resize=True, return_features=True)
        logits = [torch.cat([detector((p.to(device) * 2 - 1).transpose(1, 2), **options).float().cpu()
                             for p in x.split(8)]) for x in (fake, real)]
        distances[f"fvd_i3d_{size}"] = frechet_distance(*logits)
    return distances


def held_out_windows(args):
    """The first window of observed + predicted frames in each test video: N T 3 H W uint8."""
    frames, videos = load_clips(args.data_dir, "test")
    length = args.condition_frames + args.frames_to_generate
    starts, _, _ = window_starts(videos, length, args.drop_short)
    video = torch.bucketize(starts, torch.tensor([row for _, row, _ in videos]), right=True)
    first = [int(starts[video == v][0]) for v in video.unique()]
    return torch.stack([frames[s:s + length] for s in first[:args.eval_clips]])


def predict(autoencoder, field, x, args, members, seed, warm_start=None):
    """x N P 3 H W in [-1, 1], the observed frames -> N m T 3 H W in [-1, 1]."""
    z = autoencoder.encode(x).repeat_interleave(members, dim=0)
    z = generate(field, z, args, torch.Generator(z.device).manual_seed(seed), warm_start)
    return autoencoder.decode(z).unflatten(0, (-1, members))


@torch.no_grad()
def evaluate(args, run, autoencoder, field, windows):
    """Forecasts the held-out windows N T 3 H W, writes eval.json and curves.png and prints the tables.

    All ranks share the windows, in groups of four that carry their own noise: the figures do not depend on
    the number of processes. The table of warm starts uses the first four windows.
    """
    began, P, m, parts = time.time(), args.condition_frames, args.num_samples, []
    groups = range(0, len(windows), 4)[run.rank::run.world]
    for first in tqdm(groups, "evaluate", disable=run.rank > 0, unit="x4 clips"):
        x = from_uint8(windows[first:first + 4].to(run.device))
        seed, video = common.seed_all(args.seed, 3, first), (x + 1) / 2
        truth, last = video[:, P:], video[:, P - 1:P]
        members = (predict(autoencoder, field, x[:, :P], args, m, seed) + 1) / 2
        ceiling = (autoencoder.decode(autoencoder.encode(x[:, P:])) + 1) / 2
        forecasts = {"model": members, "persistence": last.expand_as(truth)[:, None],
                     "black": torch.zeros_like(truth)[:, None], "autoencoder": ceiling[:, None]}
        scores, seconds = {name: forecast_scores(f, truth) for name, f in forecasts.items()}, {}
        for s in WARM_STARTS if first == 0 else ():
            start = time.time()
            warm = (predict(autoencoder, field, x[:, :P], args, m, seed, warm_start=s) + 1) / 2
            seconds[s], scores[s] = time.time() - start, forecast_scores(warm, truth)
        parts.append((first, scores, seconds, torch.cat([video[:, :P], members[:, 0]], 1).cpu()))
    if run.world > 1:
        everyone = [None] * run.world
        dist.all_gather_object(everyone, parts)
        parts = sorted(sum(everyone, []), key=lambda part: part[0])
    if run.rank > 0:
        return
    table = {name: average([part[1][name] for part in parts if name in part[1]]) for name in parts[0][1]}
    results, baselines = table.pop("model"), {name: table[name] for name in table if isinstance(name, str)}
    for s in WARM_STARTS:
        results[f"warm_{s}_calls"] = network_calls(args, s) * args.frames_to_generate
        results[f"warm_{s}_seconds"] = sum(part[2].get(s, 0) for part in parts)
        for key in ("psnr_ensemble_mean", "crps", "spread_skill"):
            results[f"warm_{s}_{key}"] = table[s][key]
    films = torch.cat([part[3] for part in parts])
    results |= distribution_distances(films, windows.float() / 255, args, run.device)
    report = {"script": SCRIPT, "preset": args.preset, "data": describe_data(args.data_dir),
              "weights": args.weights, "seconds": time.time() - began,
              "headline": {"metric": "crps", "value": results["crps"], "lower_is_better": True,
                           "baseline": baselines["persistence"]["mae"]},
              "results": results, "baselines": baselines}
    common.write_json(Path(args.output_dir) / "eval.json", report)
    show_report(report, args)


def show_report(report, args):
    """Prints PSNR per horizon and the table of warm starts; draws curves.png."""
    r, b, T = report["results"], report["baselines"], args.frames_to_generate
    series = lambda table, key: (list(range(1, T + 1)), [table[f"{key}_h{h:02d}"] for h in range(1, T + 1)])
    psnr = {"ensemble mean": series(r, "psnr_ensemble_mean"), "single sample": series(r, "psnr"),
            **{name: series(table, "psnr") for name, table in b.items()}}
    print(f"PSNR in dB, {args.condition_frames} frames observed, {args.num_samples} members")
    for name, (_, values) in psnr.items():
        print(f"{name:>15}" + "".join(f"{v:7.2f}" for v in values) + f"  mean {np.mean(values):.2f}")
    mae = b["persistence"]["mae"]
    print(f"CRPS {r['crps']:.4f}, {r['crps'] / mae:.3f} x persistence MAE; spread/skill "
          f"{r['spread_skill']:.2f}; mask IoU of a sample {r['mask_iou']:.3f}, of persistence "
          f"{b['persistence']['mask_iou']:.3f}")
    print("   warm start s  calls  seconds  PSNR of mean    CRPS  spread/skill")
    for s in WARM_STARTS:
        calls, seconds, quality, crps, spread = (r[f"warm_{s}_{key}"] for key in (
            "calls", "seconds", "psnr_ensemble_mean", "crps", "spread_skill"))
        print(f"{s:15.1f}{calls:7d}{seconds:9.2f}{quality:14.2f}{crps:8.4f}{spread:14.2f}")
    folder = Path(args.output_dir)
    panels = [common.loss_panel(folder / "autoencoder", "autoencoder"),
              common.loss_panel(folder, "flow matching")]
    errors = {"CRPS": series(r, "crps"), "persistence MAE": series(b["persistence"], "mae"),
              "black MAE": series(b["black"], "mae")}
    panels += [dict(title="PSNR", xlabel="horizon (frames)", ylabel="dB", lines=psnr),
               dict(title="error", xlabel="horizon (frames)", ylabel="in [0, 1]", lines=errors)]
    common.plot_curves(Path(args.output_dir) / "curves.png", panels)


def sample(args, run, autoencoder, field, windows, count=3):
    """Writes samples/clip_*.{mp4,gif,png} of the windows that move most: truth, forecast, error, ..."""
    if run.rank > 0:
        return []
    P, m = args.condition_frames, max(3, args.num_samples)
    chosen = windows.float().diff(dim=1).abs().mean(dim=(1, 2, 3, 4)).argsort(descending=True)[:count]
    x, written, began = from_uint8(windows[chosen].to(run.device)), [], time.time()
    members = predict(autoencoder, field, x[:, :P], args, m, common.seed_all(args.seed, 4))
    print(f"{len(x)} clips x {m} members x {args.frames_to_generate} frames in {time.time() - began:.1f} s: "
          f"{network_calls(args, args.warm_start)} network calls a frame, warm start {args.warm_start}")
    for i, number in enumerate(chosen.tolist()):
        lead = x[i, max(0, P - 2):P]             # two observed frames, so that the eye has a start
        films = {"truth": x[i, P:], "prediction": members[i, 0], "error": members[i, 0],
                 "member 2": members[i, 1], "member 3": members[i, 2]}
        films = {name: torch.cat([lead, film]) for name, film in films.items()}
        films["error"] = (films["prediction"] - films["truth"]).abs() - 1
        stem = Path(args.output_dir) / "samples" / f"clip_{number:03d}"
        strip = {name: torch.cat(list(film), dim=-1)[None] for name, film in films.items()}
        written += [common.write_video(f"{stem}.png", common.video_grid(strip))]
        grid = common.video_grid(films, scale=3, columns=True)
        written += [common.write_video(f"{stem}{suffix}", grid, fps=6) for suffix in (".mp4", ".gif")]
    return written


def autoencoder_report(args, autoencoder, frames, folder):
    """What the autoencoder can show, on held-out frames F 3 64 64 uint8: report.json, reconstruction.png."""
    x = from_uint8(frames)
    z = autoencoder.encode(x)
    y = autoencoder.decode(z)
    psnr, ssim = (metric((x + 1) / 2, (y + 1) / 2).mean().item() for metric in (common.psnr, common.ssim))
    codes = autoencoder.quantizer.nearest(z * autoencoder.std + autoencoder.mean)
    if args.quantizer == "vq":                   # share of the codes in use; with FSQ, of a channel's levels
        usage = len(codes.movedim(1, -1).flatten(0, -2).unique(dim=0)) / args.codes
    else:
        usage = np.mean([len(channel.unique()) for channel in codes.movedim(1, 0)]) / args.fsq_levels
    report = {"frames": len(x), "psnr": psnr, "ssim": ssim, "latent_mean": z.mean().item(),
              "latent_std": z.std().item(), "code_usage": float(usage)}
    common.write_json(folder / "report.json", report)
    print("autoencoder on held-out frames: " + ", ".join(f"{k} {v:.3g}" for k, v in report.items()))
    some = x.mean(dim=(1, 2, 3)).argsort(descending=True)[:len(x) // 2:max(1, len(x) // 24)]
    rows = {"truth": x[some], "decoded": y[some], "error": (x[some] - y[some]).abs() - 1}
    strip = common.video_grid({name: torch.cat(list(v), dim=-1)[None] for name, v in rows.items()}, scale=1)
    common.write_video(folder / "reconstruction.png", strip)


# ---- shared:flags (identical in all scripts, checked by test_smoke.py) ----------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; {self.prog} --help lists the flags")


def add_shared_flags(parser, presets):
    add = parser.add_argument_group("run").add_argument
    add("--preset", choices=["auto", *presets], default="auto", help=f"auto: {list(presets)[1]} with CUDA")
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
    args = argparse.Namespace(why_preset="as asked")
    if preset == "auto":
        preset = list(PRESETS)[1] if torch.cuda.is_available() else "tiny"
        args.why_preset = "no CUDA here" if preset == "tiny" else "CUDA is present"
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
    """FSDP2 with --fsdp (every block a unit of its own), DDP under torchrun, otherwise the module itself."""
    if args.compile:
        model.compile()
    if args.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh(run.device.type, (run.world,))
        for block in [m for m in model.modules() if isinstance(m, (Block, ResBlock))]:
            fully_shard(block, mesh=mesh)
        # else the root stays gathered until a backward, and a step after validation has the averages
        return fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if run.world > 1:
        ids = [run.device] if run.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, forward_sync_buffers=False)
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

def train_autoencoder(args, run, data):
    """Stage 2 of the document: the autoencoder, frozen afterwards. Trains what is missing, measures its
    latents, reports on held-out frames and exports autoencoder/autoencoder.safetensors."""
    folder = Path(args.output_dir) / "autoencoder"
    few = lambda x, n: x[torch.linspace(0, len(x) - 1, min(n, len(x))).long()].to(run.device)
    frames, held = data["train"][0].to(run.device), few(data["val"][0], 256)
    kinds = {"frame": ("randint", len(frames)), "flip": ("randint", 2)}

    def losses(model, step, micro):
        seed = common.seed_all(args.seed, 1, step)
        numbers = common.draw(kinds, seed, args.ae_batch_size, run.rank, run.world, micro, args.grad_accum,
                              run.device)
        x = from_uint8(frames[numbers["frame"]])
        x = torch.where(expand_to(numbers["flip"], x) > 0, x.flip(-1), x)
        with run.autocast():
            return model(x, float(step >= (1 - args.masked_finetune) * args.ae_steps)), {}

    def validate(model):
        with run.autocast():
            return {"val_loss": model(from_uint8(few(held, 64)), 0.0).item()}

    found = common.find_checkpoint(folder / "ckpt", SCRIPT, "none" if args.resume == "none" else "auto")
    torch.manual_seed(args.seed)                 # equal initial weights on all ranks and after any restart
    model = AutoencoderLoss(args).to(run.device)
    fit(args, run, folder, model, losses, validate, found, args.ae_steps, args.ae_lr)
    averaged, _ = common.gather_state(model, everywhere=True)
    weights = {name.removeprefix("autoencoder."): value for name, value in averaged.items()
               if name.startswith("autoencoder.")}
    autoencoder = frozen(Autoencoder(args), weights, run, "this run")
    z = autoencoder.encode(from_uint8(few(frames, 2048)))
    autoencoder.mean.copy_(z.mean(dim=(0, 2, 3))[:, None, None])
    autoencoder.std.copy_(z.std(dim=(0, 2, 3))[:, None, None].clamp(min=1e-4))
    if run.rank == 0:
        autoencoder_report(args, autoencoder, held, folder)
        common.save_weights(folder / "autoencoder.safetensors", autoencoder.state_dict())
    return autoencoder


def frozen(module, weights, run, source):
    """A module with these weights on the run's device, for inference; `source` is named where they differ."""
    module = module.to(run.device).eval().requires_grad_(False)
    common.restore_state(module, weights, source=source)
    return module


def train_flow(args, run, data, autoencoder, found):
    """Stage 3 of the document: the vector field, on latents that were encoded once. -> the averaged field."""
    folder, T, latents, starts = Path(args.output_dir), args.num_observations, {}, {}
    for split, (frames, videos) in data.items():
        rows, lost, short = window_starts(videos, T, args.drop_short)
        views = [frames, frames.flip(-1)] if split == "train" else [frames]    # a clip is mirrored as a whole
        z, smoke = zip(*(encode_clips(autoencoder, view, run.device) for view in views))
        latents[split], starts[split] = (torch.stack(z), torch.stack(smoke)), rows.to(run.device)
        if run.rank == 0:
            print(f"{split}: {len(frames)} frames, {len(videos)} clips, {len(rows)} windows of {T}; {lost} "
                  f"windows lost to missing frames, {short} short clips dropped")
    offsets = torch.arange(T, device=run.device)

    def loss_on(split, model, seed, batch_size, **place):
        z, smoke = latents[split]
        kinds = {"window": ("randint", len(starts[split])), "view": ("randint", len(z)), "tau": ("rand",),
                 "t": ("rand",), "c": ("rand",), "eps": ("randn", *z.shape[2:])}
        numbers = common.draw(kinds, seed, batch_size, device=run.device, **place)
        window = numbers["view"][:, None], starts[split][numbers["window"]][:, None] + offsets
        with run.autocast():
            return river_loss(model, z[window].float(), smoke[window], numbers, args)

    def losses(model, step, micro):
        place = dict(rank=run.rank, world=run.world, micro=micro, grad_accum=args.grad_accum)
        return loss_on("train", model, common.seed_all(args.seed, 2, step), args.batch_size, **place), {}

    def validate(model):                         # the same windows, times and noises each time
        return {"val_loss": loss_on("val", model, common.seed_all(args.seed, 5), 128).item()}

    torch.manual_seed(args.seed)
    field = VectorField(args).to(run.device)
    fit(args, run, folder, field, losses, validate, found, args.max_steps, args.lr,
        autoencoder=autoencoder.state_dict())
    averaged, _ = common.gather_state(field, everywhere=True)
    if run.rank == 0:
        common.save_weights(folder / "vector_field.safetensors", averaged)
    return frozen(VectorField(args), averaged, run, "this run")


def prepare(args, run):
    """Clips (simulated ones in the tiny preset's own folder) -> the held-out windows."""
    if run.rank == 0 and "data_dir" not in args.given and args.data_dir == PRESETS["tiny"]["data_dir"]:
        simulate(args)
    run.barrier()
    return held_out_windows(args)


def train(args, run, found):
    """Stages 2 and 3 of the document, each from where it stands -> autoencoder and vector field."""
    if run.rank == 0:
        common.write_json(Path(args.output_dir) / "args.json", {**public_flags(args), **common.provenance()})
    data = {split: load_clips(args.data_dir, split) for split in ("train", "val")}
    for split in data:                           # too short a clip should show now, not after a stage
        window_starts(data[split][1], args.num_observations, args.drop_short)
    exported = Path(args.autoencoder or Path(args.output_dir) / "autoencoder/autoencoder.safetensors")
    if found:                                    # a checkpoint holds the autoencoder whose latents it speaks
        autoencoder = frozen(Autoencoder(args), found[1]["autoencoder"], run, found[0])
    elif args.autoencoder or exported.is_file() and args.resume != "none":
        autoencoder = frozen(Autoencoder(args), common.load_weights(exported), run, exported)
    else:
        autoencoder = train_autoencoder(args, run, data)
    return autoencoder, train_flow(args, run, data, autoencoder, found)


def dry_run(args):
    """Prints what both models cost, from the meta device: nothing is allocated, nothing is read."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    B, T, C = args.batch_size * args.grad_accum, args.num_observations, args.latent_channels
    with torch.device("meta"):
        field, autoencoder = VectorField(args), AutoencoderLoss(args).eval()
        numbers = {name: torch.rand(B) for name in ("tau", "t", "c")} | {"eps": torch.randn(B, C, 8, 8)}
        z, smoke = torch.randn(B, T, C, 8, 8), torch.zeros(B, T, 8, 8, dtype=torch.bool)
        x = torch.randn(args.ae_batch_size * args.grad_accum, 3, 64, 64)
        for name, model, loss, samples in (
                ("vector field", field, lambda: river_loss(field, z, smoke, numbers, args), B),
                ("autoencoder", autoencoder, lambda: autoencoder(x, 1.0), len(x))):
            print(common.dry_run_report(name, model, loss, samples, 64, world, args.fsdp))


# ---- main -----------------------------------------------------------------------------------------------

def describe_data(root):
    """Where the clips come from, as their dataset_stats.json says."""
    stats = Path(root) / "dataset_stats.json"
    stats = json.loads(stats.read_text()) if stats.is_file() else {}
    return f"{root} ({stats.get('source', 'frames as found')})"


def work(args):
    if args.extract:
        stats = {"source": f"extracted from {args.extract}", "clips_kept": 0, "clips_dropped": 0}
        write_dataset(args.data_dir, extract_clips(Path(args.extract), stats), stats)
        return print(f"wrote {args.data_dir}: {stats['clips_kept']} clips, {stats['clips_dropped']} dropped")
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
    args.weights = "trained from scratch"
    if run.rank == 0:
        there = "" if Path(args.data_dir).exists() else " (not there yet)"
        going_on = f", going on from {found[0]}" if found else ""
        print(f"{SCRIPT}: preset {args.preset} ({args.why_preset}), data {args.data_dir}{there}, weights "
              f"{args.weights}{going_on}, {run.world} x {run.device.type} {str(run.dtype)[6:]}")
    if only and not found:
        if "output_dir" in args.given:
            raise UserError(f"no checkpoint in {folder}/ckpt: first python {SCRIPT}.py --output_dir {folder}")
        if run.rank == 0:
            print(f"no checkpoint in {folder}/ckpt: training preset {args.preset} first"
                  + (", about 9 minutes on 2 cores" if args.preset == "tiny" else ""))
    windows = prepare(args, run)
    if only and found:
        autoencoder = frozen(Autoencoder(args), found[1]["autoencoder"], run, found[0])
        field = frozen(VectorField(args), found[1]["ema"], run, found[0])
    else:
        autoencoder, field = train(args, run, found)
    written = []
    if args.eval or not only:
        evaluate(args, run, autoencoder, field, windows)
        written = [f"{folder}/eval.json", f"{folder}/curves.png"]
    if args.sample or not only:
        written += sample(args, run, autoencoder, field, windows)
    if run.rank == 0:
        common.show_results(folder, written, args.tensorboard, args.wandb)
        print("wrote " + ", ".join(written))
    run.barrier()
    run.close()


def main(argv=None):
    return common.one_line_errors(f"{SCRIPT}.py", lambda: work(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
