"""river_smoke.py: video prediction of smoke by flow matching on latents of a quantised autoencoder (RIVER).

Paper       Davtyan, Sameni, Favaro: Efficient Video Prediction via Sparsely Conditioned Flow Matching,
            ICCV 2023, arXiv:2211.14575. FSQ: arXiv:2309.15505. Fair CRPS: Ferro 2014, doi:10.1002/qj.2270.
Equations   z = encoder(x), x = decoder(nearest code of z)          -> Autoencoder, VQ, FSQ
            training algorithm, steps 1 and 2: load, encode         -> load_clips, encode_clips
            steps 3 to 9: tau, t, z_t, u_t, c, v_t, |v_t - u_t|^2   -> river_loss, probability_path
            v_t(z_t | z^{tau-1}, z^c, tau - c)                      -> VectorField
            inference, with a warm start z'_s ~ p_s(z | z^{T-1})    -> generate
            PSNR, SSIM, MSE, CRPS per horizon; FVD                  -> forecast_scores, fvd
Run         python river_smoke.py                            # simulate, train, evaluate: 4 to 7 min, 2 cores
            python river_smoke.py --sample --warm_start 0.2  # 15 s; trains first if there is no checkpoint
            torchrun --nproc_per_node=8 river_smoke.py --preset paper --output_dir runs/river_paper
Shapes      B batch  T frames  C latent channels  H W pixels  h w latent cells  N tokens  D width  m ensemble
            members. Videos are B T 3 H W in [-1, 1], latents B T C h w; t = 0 is noise, t = 1 is data.
"""
import argparse
import functools
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import common
from common import UserError, at_least, between, from_uint8

SCRIPT = "river_smoke"
SIZE = 64                       # height and width of a frame; latents have an eighth of it
SMOKE_LEVEL = 0.05              # a pixel is smoke if its brightest channel, in [0, 1], exceeds this
AUTOENCODER, FLOW, EVALUATE, SAMPLE, VALIDATE = range(1, 6)          # random streams, for seed_all

# ---- presets and flags ----------------------------------------------------------------------------------

PRESETS = {
    "tiny": dict(data_dir=f"data/{SCRIPT}/final_dataset", max_steps=750, lr=1e-3, warmup_steps=50,
                 ema_decay=0.99, eval_every=250, save_every=250),
    # The reference project's: VQ latents 8x8x256, sequences of 10, depth 4, one reference frame.
    "paper": dict(data_dir="final_dataset", quantizer="vq", latent_channels=256, ae_width=48, ae_lr=2e-4,
                  ae_steps=100_000, depth=4, heads=8, history=1, batch_size=32, max_steps=300_000, lr=1e-4,
                  warmup_steps=1000, weight_decay=5e-6, ema_decay=0.9999, eval_every=5000, save_every=5000,
                  log_every=100, eval_clips=256),
}
# Flags that define the model: on resume they must equal the checkpoint's.
MODEL_FLAGS = ("quantizer", "latent_channels", "codes", "ae_width", "ae_steps", "masked_finetune", "gan",
               "width", "depth", "heads", "history", "sigma", "num_observations")


def build_parser():
    parser = common.Parser(SCRIPT, PRESETS, __doc__.split("\n")[0], fsdp=False)
    add = parser.add_argument_group("autoencoder and vector field").add_argument
    add("--quantizer", choices=["fsq", "vq"], default="fsq", help="finite scalar or EMA codebook")
    add("--latent_channels", type=at_least(1), default=16, help="channels C of a latent")
    add("--codes", type=at_least(2), default=1024, help="vq: size of the codebook")
    add("--ae_width", type=at_least(8), default=32, help="channels at half resolution, a multiple of 8")
    add("--ae_steps", type=at_least(1), default=400, help="optimizer steps of the autoencoder")
    add("--ae_lr", type=at_least(0, float), default=2e-3, help="peak learning rate of the autoencoder")
    add("--masked_finetune", type=between(0, 1), default=0.25, help="final share of ae_steps: smoke weighs 5")
    add("--gan", type=at_least(0, float), default=0.0, help="PatchGAN loss weight in that share (0: none)")
    add("--autoencoder", metavar="FILE", help="autoencoder.safetensors to use instead of training")
    add("--num_observations", type=at_least(3), default=10, help="frames of a training sequence")
    add("--sigma", type=between(0, 1, True), default=0.0, help="sigma_min of the probability path")
    add("--width", type=at_least(1), default=256, help="width D of the vector field")
    add("--depth", type=at_least(0), default=1, help="layers before and after the two middle layers")
    add("--heads", type=at_least(1), default=4, help="attention heads")
    add("--history", type=at_least(1), default=3, help="reference frames z^{tau-1}, ... (paper: 1)")
    add = parser.add_argument_group("sampling and evaluation").add_argument
    add("--condition_frames", type=at_least(1), default=10, help="observed frames")
    add("--frames_to_generate", type=at_least(1), default=10, help="frames to predict after them")
    add("--num_inference_steps", type=at_least(1), default=4, help="network calls per frame")
    add("--solver", choices=["euler", "midpoint"], default="midpoint", help="ODE solver")
    add("--temperature", type=at_least(0, float), default=1.0, help="scale of the initial noise")
    add("--warm_start", type=between(0, 1, True), default=0.0, help="start time s, from the previous frame")
    add("--num_samples", type=at_least(1), default=8, help="ensemble members m")
    add("--eval_clips", type=at_least(1), default=24, help="maximum number of test clips to evaluate")
    add("--i3d", metavar="FILE", help="StyleGAN-V's i3d_torchscript.pt: also report FVD")
    return parser


def parse_args(argv=None):
    """-> flags, checkpoint or None, reason for the preset."""
    get_data = f"python data/{SCRIPT}/prepare.py --extract VIDEOS --data_dir final_dataset"
    args, checkpoint, preset_reason = common.parse_args(build_parser(), argv, MODEL_FLAGS, get_data=get_data)
    if args.width % args.heads:
        raise UserError(f"--width must be a multiple of --heads {args.heads}, not {args.width}")
    if args.ae_width % 8:
        raise UserError(f"--ae_width must be a multiple of 8, not {args.ae_width}")
    if args.i3d:                                 # report an unsuitable detector before training
        clips = torch.rand(3, args.condition_frames + args.frames_to_generate, 3, SIZE, SIZE)
        common.fvd(args.i3d, clips, clips)
    return args, checkpoint, preset_reason


# ---- model: autoencoder ---------------------------------------------------------------------------------

class ResBlock(nn.Sequential):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), the last convolution zero at initialisation."""
    def __init__(self, channels):
        super().__init__(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
                         nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
        nn.init.zeros_(self[-1].weight)

    def forward(self, x):
        return x + super().forward(x)


class FSQ(nn.Module):
    """Finite scalar quantisation: each channel is squashed to [-1, 1] and rounded to one of 8 values."""
    levels = 8

    def nearest(self, z):
        """The code nearest to a latent, in [-1, 1]."""
        radius = (self.levels - 1) / 2
        return ((z.clamp(-1, 1) + 1) * radius).round() / radius - 1

    def latent(self, z):
        """The encoder's output -> the latent on which the flow is trained."""
        return self.nearest(torch.tanh(z))

    def forward(self, z):
        """-> code with a straight-through gradient, commitment loss."""
        z = torch.tanh(z)
        return z + (self.nearest(z) - z).detach(), z.new_zeros(())


class VQ(nn.Module):
    """Vector quantisation: EMA codebook (van den Oord 2017, A.1), dead codes restart (2005.00341)."""
    decay = 0.99
    commitment = 0.25

    def __init__(self, channels, codes):
        super().__init__()
        self.register_buffer("codebook", torch.randn(codes, channels))
        self.register_buffer("sums", torch.zeros(codes, channels))
        self.register_buffer("counts", torch.zeros(codes))

    def index(self, vectors):
        """N C -> N. The squared distance without |vector|^2, which is the same for every code."""
        with torch.autocast(vectors.device.type, enabled=False):       # bf16 would select other codes
            return (self.codebook.pow(2).sum(1) - 2 * vectors @ self.codebook.T).argmin(1)

    def nearest(self, z):
        vectors = z.movedim(1, -1).flatten(0, -2).float()
        codes = self.codebook[self.index(vectors)]
        return codes.reshape(z.shape[0], *z.shape[2:], -1).movedim(-1, 1).to(z.dtype)

    def latent(self, z):
        return z                                 # the flow sees the encoder's output; decoding quantises

    def forward(self, z):
        if self.training:
            self.update(z.detach().movedim(1, -1).flatten(0, -2).float())
        code = self.nearest(z)
        return z + (code - z).detach(), self.commitment * F.mse_loss(z, code)

    @torch.no_grad()
    def update(self, vectors):
        if dist.is_initialized():                # with the vectors of all processes, the codebooks stay equal
            parts = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, vectors.contiguous())
            vectors = torch.cat(parts)
        index = self.index(vectors)
        count = torch.bincount(index, minlength=len(self.codebook)).to(vectors)
        self.counts.lerp_(count, 1 - self.decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, index, vectors), 1 - self.decay)
        dead = self.counts < 0.03                # fewer than about 3 hits in 100 batches; initially all codes
        replacement = torch.linspace(0, len(vectors) - 1, len(dead), device=vectors.device).long()
        self.sums[dead] = vectors[replacement][dead]
        self.counts[dead] = 1.0
        self.codebook.copy_(self.sums / self.counts[:, None])


class Autoencoder(nn.Module):
    """RGB frames <-> latents of an eighth of the size, which encode() and decode() normalise per channel."""
    def __init__(self, args):
        super().__init__()
        a, b, c, C = args.ae_width, 3 * args.ae_width, 6 * args.ae_width, args.latent_channels
        # Pixel shuffles keep the work at H/4 and H/8: convolutions at full resolution would take most of the
        # time. The encoder needs only one block per stage; the decoder has to reconstruct edges.
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), nn.Conv2d(48, b, 3, padding=1), ResBlock(b),
            nn.PixelUnshuffle(2), nn.Conv2d(4 * b, c, 1), ResBlock(c),
            nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, C, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(C, c, 3, padding=1), ResBlock(c), ResBlock(c),
            nn.Conv2d(c, 4 * b, 1), nn.PixelShuffle(2), ResBlock(b), ResBlock(b),
            nn.Conv2d(b, 4 * a, 1), nn.PixelShuffle(2), nn.GroupNorm(8, a), nn.SiLU(),
            nn.Conv2d(a, 12, 3, padding=1), nn.PixelShuffle(2))
        self.quantizer = FSQ() if args.quantizer == "fsq" else VQ(C, args.codes)
        self.register_buffer("mean", torch.zeros(C, 1, 1))
        self.register_buffer("std", torch.ones(C, 1, 1))

    def forward(self, x):
        """B 3 H W -> reconstruction of the same shape, commitment loss."""
        z, commitment = self.quantizer(self.encoder(x.contiguous(memory_format=torch.channels_last)))
        return self.decoder(z), commitment

    @torch.no_grad()
    def encode(self, x):
        """... 3 H W -> ... C h w."""
        parts = [self.quantizer.latent(self.encoder(part.contiguous(memory_format=torch.channels_last)))
                 for part in x.flatten(0, -4).split(128)]
        z = ((torch.cat(parts) - self.mean) / self.std).contiguous()
        return z.reshape(*x.shape[:-3], *z.shape[1:])

    @torch.no_grad()
    def decode(self, z):
        """... C h w -> ... 3 H W in [-1, 1], through the nearest code."""
        parts = [self.decoder(self.quantizer.nearest(part * self.std + self.mean))
                 for part in z.flatten(0, -4).split(128)]
        x = torch.cat(parts).clamp(-1, 1).contiguous()
        return x.reshape(*z.shape[:-3], *x.shape[1:])


class AutoencoderLoss(nn.Module):
    """Training loss of the autoencoder, and with --gan of a PatchGAN discriminator."""
    def __init__(self, args):
        super().__init__()
        self.autoencoder = Autoencoder(args)
        self.gan = args.gan
        if args.gan:
            self.discriminator = nn.Sequential(
                nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2),
                nn.Conv2d(64, 128, 4, 2, 1), nn.GroupNorm(8, 128), nn.LeakyReLU(0.2),
                nn.Conv2d(128, 256, 4, 2, 1), nn.GroupNorm(8, 256), nn.LeakyReLU(0.2), nn.Conv2d(256, 1, 1))

    def forward(self, x, masked):
        """x B 3 H W -> loss, {name: term}. masked: smoke weighs 5, and the GAN loss reaches the decoder."""
        y, commitment = self.autoencoder(x)
        smoke = (x.amax(dim=1, keepdim=True) + 1) / 2 > SMOKE_LEVEL
        weight = 1 + 4 * float(masked) * smoke
        weight = weight / weight.mean(dim=(1, 2, 3), keepdim=True)
        loss = (weight * ((y - x) ** 2 + 0.1 * (y - x).abs())).mean() + commitment
        if self.gan:
            # The discriminator's weights are detached in the decoder's loss, so that one backward pass serves
            # both.
            weights = {name: value.detach() for name, value in self.discriminator.named_parameters()}
            score = torch.func.functional_call(self.discriminator, weights, (y,)).mean()
            real, fake = self.discriminator(x), self.discriminator(y.detach())
            loss = loss - float(masked) * self.gan * score + F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        return loss, {"psnr": common.psnr((x + 1) / 2, (y.detach() + 1) / 2)}


# ---- model: vector field --------------------------------------------------------------------------------

class Block(nn.Module):
    """Transformer layer modulated by time and distance through adaLN-single (PixArt, 2310.00426): a shared
    projection and a table per layer, both zero at first, so that each layer starts as the identity."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.table = nn.Parameter(torch.zeros(6, 1, width))

    def forward(self, x, modulation):
        """x B N D; modulation B 6 1 D."""
        B, N, D = x.shape
        scale1, shift1, gate1, scale2, shift2, gate2 = (modulation + self.table).unbind(1)      # B 1 D
        y = torch.addcmul(shift1, F.layer_norm(x, (D,)), 1 + scale1)
        q, k, v = self.qkv(y).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = torch.addcmul(x, gate1, self.out(y))
        y = torch.addcmul(shift2, F.layer_norm(x, (D,)), 1 + scale2)
        return torch.addcmul(x, gate2, self.down(F.gelu(self.up(y), approximate="tanh")))


def timestep_embedding(t, dim, scale=1000.0, max_period=10000.0):
    """(B,) -> B dim: cos and sin of scale * t at dim / 2 geometric frequencies (Vaswani 2017, 3.5)."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = scale * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class VectorField(nn.Module):
    """v_t(z_t | z^{tau-1}, z^c, tau - c): frames are stacked along channels; U-ViT skips (2209.12152)."""
    def __init__(self, args):
        super().__init__()
        C, D = args.latent_channels, args.width
        # 3x3, not 1x1: advection is local, and a small network learns it much sooner from neighbouring cells.
        stacked = (args.history + 2) * C
        narrow = nn.Conv2d(stacked, D, 1) if stacked > D else nn.Identity()
        self.project_in = nn.Sequential(narrow, nn.Conv2d(min(stacked, D), D, 3, padding=1))
        self.position = nn.Parameter(0.02 * torch.randn(D, SIZE // 8, SIZE // 8))
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.distance = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.in_blocks = nn.ModuleList(Block(D, args.heads) for _ in range(args.depth))
        self.mid_blocks = nn.ModuleList(Block(D, args.heads) for _ in range(2))
        self.out_blocks = nn.ModuleList(Block(D, args.heads) for _ in range(args.depth))
        self.skips = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(args.depth))
        self.modulation = nn.Linear(D, 8 * D)
        self.project_out = nn.Conv2d(D, C, 3, padding=1)
        for p in (*self.modulation.parameters(), *self.project_out.parameters()):
            nn.init.zeros_(p)

    def forward(self, z_t, references, context, distance, t):
        """z_t B C h w; references B K C h w: the frames before the target, newest first; context B C h w: the
        frame `distance` (B) frames before the target; t B in [0, 1] -> velocity B C h w."""
        x = torch.cat([z_t[:, None], references, context[:, None]], dim=1).flatten(1, 2)
        x = self.project_in(x) + self.position
        x = x.flatten(2).transpose(1, 2)                               # B N D, a token per cell
        cond = F.silu(self.time(timestep_embedding(t, 256))
                      + self.distance(timestep_embedding(torch.log1p(distance.float()), 256, scale=100.0)))
        modulation, final = self.modulation(cond).unflatten(1, (8, 1, -1)).split((6, 2), dim=1)
        skips = []
        for block in self.in_blocks:
            x = block(x, modulation)
            skips.append(x)
        for block in self.mid_blocks:
            x = block(x, modulation)
        for block, merge in zip(self.out_blocks, self.skips):
            x = block(merge(torch.cat([x, skips.pop()], dim=-1)), modulation)
        scale, shift = final.unbind(1)
        x = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        return self.project_out(x.transpose(1, 2).unflatten(2, z_t.shape[2:]))


# ---- objective ------------------------------------------------------------------------------------------

def probability_path(z, eps, t, sigma):
    """A point z_t ~ N(t z, (1 - (1 - sigma) t)^2 I) of the path from noise to z, and its velocity u_t.

    z, eps B C h w; t B. The paper's u_t divides by 1 - (1 - sigma) t; this equal form is finite at t = 1.
    """
    t = common.expand_to(t, z)
    return (1 - (1 - sigma) * t) * eps + t * z, z - (1 - sigma) * eps


def reference_frames(z, tau, history):
    """z B T C h w, tau B -> B history C h w: frames tau - 1, tau - 2, ..., clamped to the first frame."""
    frames = tau[:, None] - 1 - torch.arange(history, device=z.device)
    return z[torch.arange(len(z), device=z.device)[:, None], frames.clamp(min=0)]


def river_loss(field, z, values, args):
    """Steps 3 to 9 of the training algorithm; steps 1 and 2, load and encode, were done once: z B T C h w.

    values: tau, t, c: B, uniform in [0, 1); eps: B C h w. Frames count from 0 here, from 1 in the paper.
    -> scalar loss, {name: term to log}. A loss in pixels needs another decode(): this one has no gradient.
    """
    B, T = z.shape[:2]
    batch = torch.arange(B, device=z.device)
    # 3. Target frame tau, from the second on (paper: third), so that one observed frame is enough to start.
    tau = 1 + (values["tau"] * (T - 1)).long()
    # 4. Time t ~ U[0, 1).
    t = values["t"]
    # 5. Noisy latent z_t ~ p_t(z | z^tau).  6. Target vector u_t(z_t | z^tau).
    z_t, u_t = probability_path(z[batch, tau], values["eps"], t, args.sigma)
    # 7. Context frame c, uniform up to tau - 2; the reference frame is tau - 1.
    c = (values["c"] * (tau - 1).clamp(min=1)).long()
    # 8. v_t(z_t | z^{tau-1}, z^c, tau - c).
    v_t = field(z_t, reference_frames(z, tau, args.history), z[batch, c], tau - c, t)
    # 9. || v_t - u_t ||^2.
    return F.mse_loss(v_t.float(), u_t), {}


# ---- sampler --------------------------------------------------------------------------------------------

def network_calls(args, warm_start):
    """Network calls per frame: a warm start at t = s needs a fraction 1 - s of them."""
    return max(1, round((1 - warm_start) * args.num_inference_steps))


@torch.no_grad()
def generate(field, z, args, generator, warm_start=None):
    """Predicts frames_to_generate latents after the observed ones: z B T C h w -> B frames C h w.

    Integrates dz/dt = v_t from t = s to 1, frame by frame. Each integration step samples a context frame.
    """
    s = args.warm_start if warm_start is None else warm_start
    calls = network_calls(args, s)
    B, batch = len(z), torch.arange(len(z), device=z.device)
    for _ in range(args.frames_to_generate):
        tau = torch.full((B,), z.shape[1], device=z.device)
        references = reference_frames(z, tau, args.history)
        max_distance = min(z.shape[1], args.num_observations - 1)             # at most that of training
        eps = args.temperature * torch.randn(z[:, -1].shape, generator=generator, device=z.device)
        # z'_s ~ p_s(z | z^{T-1}): the path towards the previous frame at t = s; pure noise for s = 0.
        x, _ = probability_path(z[:, -1], eps, torch.full((B,), s, device=z.device), args.sigma)
        call = 0
        while call < calls:
            u = torch.rand(B, generator=generator, device=z.device)
            c = tau - max_distance + (u * max(1, max_distance - 1)).long()
            conditions = references, z[batch, c], tau - c
            t = torch.full((B,), s + (1 - s) * call / calls, device=z.device)
            # Each call advances by (1 - s) / calls, so that a midpoint step of two calls is twice as long and
            # an odd number of calls ends on one Euler step.
            step = (1 - s) / calls
            v = field(x, *conditions, t)
            call += 1
            if args.solver == "midpoint" and call < calls:
                v = field(x + step * v, *conditions, t + step)
                call += 1
                step = 2 * step
            x = x + step * v
        z = torch.cat([z, x[:, None]], dim=1)
    return z[:, -args.frames_to_generate:]


def forecast(autoencoder, field, x, args, members, seed, warm_start=None):
    """x N P 3 H W in [-1, 1], the observed frames -> N m T 3 H W in [-1, 1]."""
    z = autoencoder.encode(x).repeat_interleave(members, dim=0)
    z = generate(field, z, args, torch.Generator(z.device).manual_seed(seed), warm_start)
    return autoencoder.decode(z).unflatten(0, (-1, members))


# ---- data -----------------------------------------------------------------------------------------------

def load_clips(root, split):
    """Reads the frames of a split, in one of two layouts:

        root/<split>/<clip>/0001.png              a folder per clip, as written by prepare.py
        root/<split>/<clip>_frame_0001.png        listed in root/<split>_files.txt, with optional labels
    -> frames F 3 H W uint8, clip after clip, and a list of (clip, index of its first frame, frame numbers).
    """
    folder, listing = Path(root, split), Path(root, f"{split}_files.txt")
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: create it with python data/{SCRIPT}/prepare.py --extract "
                        f"VIDEOS --data_dir {root}")
    if listing.is_file():
        name = r"^(?:.*[/\\])?(.*\d\.[a-zA-Z]\w*)(?:\s+\S+)*$"       # drops folders and labels
        lines = [line.strip() for line in common.read_text(listing).splitlines() if line.strip()]
        paths = [folder / re.sub(name, r"\1", line) for line in lines]
    else:
        paths, left_out = common.find_files(folder, common.IMAGE_SUFFIXES, unique=False)
        if left_out:
            common.print_once(f"{split}: left out {common.describe_left_out(left_out)}")
    clips = {}
    for path in paths:
        match = re.fullmatch(r"(.+?)(?:_frame_|[/_])?(\d+)\.\w+", os.path.relpath(path, folder))
        if not match:
            raise UserError(f"{path} is not named <clip>/<number>.png or <clip>_frame_<number>.png")
        first = clips.setdefault(match[1], {}).setdefault(int(match[2]), path)
        if first != path:
            raise UserError(f"{path} and {first} are the same frame of the same clip: remove one")
    if not clips:
        raise UserError(f"split {split} is empty: no images in {folder}")
    paths, videos = [], []
    for clip, files in sorted(clips.items()):
        numbers = sorted(files)
        videos.append((clip, len(paths), np.array(numbers)))
        paths += [files[number] for number in numbers]
    frames = common.read_images(paths, (SIZE, SIZE), f"read {split}")
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), videos


def window_starts(videos, length, split):
    """Indices at which windows of `length` consecutive frames begin: [N int64] per clip that has any."""
    starts, short = [], []
    for clip, first, numbers in videos:
        steps = numbers[length - 1:] - numbers[:max(0, len(numbers) - length + 1)]
        if (steps == length - 1).any():
            starts.append(torch.from_numpy(first + np.flatnonzero(steps == length - 1)))
        else:
            short.append(clip)
    if not starts:
        raise UserError(f"no clip of {split} has {length} consecutively numbered frames: use longer clips or "
                        f"lower --num_observations, --condition_frames or --frames_to_generate")
    skipped = f", {len(short)} clips without a window: {', '.join(short[:5])}" if short else ""
    common.print_once(f"{split}: {len(videos)} clips, {sum(map(len, starts))} windows{skipped}")
    return starts


def held_out_windows(args):
    """The first window of observed and predicted frames in each test clip: N T 3 H W uint8."""
    frames, videos = load_clips(args.data_dir, "test")
    length = args.condition_frames + args.frames_to_generate
    starts = [clip[0] for clip in window_starts(videos, length, "test")]
    return torch.stack([frames[start:start + length] for start in starts[:args.eval_clips]])


def encode_clips(autoencoder, views, device):
    """views V F 3 H W uint8 -> latents V F C h w float16 on the device: 8.5 GB for V F C = 2 130,000 256."""
    z = [autoencoder.encode(from_uint8(part.to(device))).half() for view in views for part in view.split(256)]
    return torch.cat(z).unflatten(0, (len(views), -1))


# ---- evaluate and sample --------------------------------------------------------------------------------

def forecast_scores(members, truth):
    """members W m T 3 H W, truth W T 3 H W in [-1, 1] -> {metric: W T}, of pixels in [0, 1].

    psnr, mse and ssim are averaged over members; psnr_ensemble_mean scores the ensemble mean. ensemble_mse is
    the squared error of that mean, ensemble_variance the members' variance, corrected for m.
    """
    members, truth = (members + 1) / 2, (truth + 1) / 2
    m = members.shape[1]
    mean = members.mean(1)
    variance = members.var(1, correction=min(1, m - 1)).mean(dim=(2, 3, 4)) * (m + 1) / m
    return {"psnr": common.psnr(members, truth[:, None]).mean(1),
            "psnr_ensemble_mean": common.psnr(mean, truth),
            "mse": common.mse(members, truth[:, None]).mean(1),
            "ssim": common.ssim(members, truth[:, None]).mean(1),
            "crps": common.fair_crps(members, truth, dim=1).mean(dim=(2, 3, 4)),
            "ensemble_mse": common.mse(mean, truth),
            "ensemble_variance": variance}


def smoke_ranks(members, truth):
    """-> common.rank_histogram of brightness, over pixels where the truth or any member shows smoke."""
    brightness = (torch.cat([truth[:, None], members], dim=1).amax(3) + 1) / 2           # W m+1 T H W
    smoke = brightness.movedim(1, 0)[:, (brightness > SMOKE_LEVEL).any(1)]
    return common.rank_histogram(smoke[1:], smoke[0])


def average_scores(tables):
    """Means over clips, in total and per horizon, and spread/skill, which is 1 for a calibrated ensemble."""
    scores = common.horizon_means(tables)
    ratio = scores["ensemble_variance"] / max(scores["ensemble_mse"], 1e-12)
    return {**scores, "spread_skill": math.sqrt(ratio)}


@torch.no_grad()
def evaluate(args, device, autoencoder, field, windows):
    """Forecasts the test windows N T 3 H W uint8 and prints tables -> [eval.json, curves.png]."""
    began, P = time.time(), args.condition_frames
    tables, warm_tables, predicted, ranks = {}, {}, [], 0        # tables: method -> [{metric: W T}]
    for first in tqdm(range(0, len(windows), 4), "evaluate", unit="x4 clips"):
        x = from_uint8(windows[first:first + 4].to(device))
        seed = common.seed_all(args.seed, EVALUATE, first)
        # The first four windows show what a warm start saves and costs.
        for s in sorted({0.0, 0.2, 0.5, args.warm_start}) if first == 0 else [args.warm_start]:
            clock = time.time()
            members = forecast(autoencoder, field, x[:, :P], args, args.num_samples, seed, warm_start=s).cpu()
            if first == 0:
                warm_tables[s] = {"seconds": time.time() - clock, "calls": network_calls(args, s),
                                  **average_scores([forecast_scores(members, x[:, P:].cpu())])}
            if s == args.warm_start:
                ensemble = members.to(device)
        ranks = ranks + smoke_ranks(ensemble, x[:, P:])
        predicted.append(torch.cat([x[:, :P], ensemble[:, 0]], dim=1).cpu())
        methods = {"model": ensemble, "persistence": x[:, None, P - 1:P].expand_as(x[:, None, P:]),
                   "black frame": torch.full_like(x[:, None, P:], -1),
                   "reconstruction bound": autoencoder.decode(autoencoder.encode(x[:, P:]))[:, None]}
        for name, members in methods.items():
            tables.setdefault(name, []).append(forecast_scores(members, x[:, P:]))
    baselines = {name: average_scores(parts) for name, parts in tables.items()}
    results = baselines.pop("model")
    columns = "calls", "seconds", "psnr_ensemble_mean", "crps", "spread_skill"
    common.print_table({f"warm start {s}": scores for s, scores in warm_tables.items()}, columns)
    for s, scores in warm_tables.items():
        results |= {f"warm_{s}_{name}": scores[name] for name in columns}
    if args.i3d and len(windows) > 1:            # one clip has no covariance
        clips = torch.cat(predicted), from_uint8(windows)
        results[f"fvd_N{len(windows)}_T{windows.shape[1]}"] = common.fvd(args.i3d, *clips, device)
    columns = "psnr_ensemble_mean", "psnr", "ssim", "mse", "crps", "spread_skill"
    errors = torch.cat([scores["crps"] for scores in tables["model"]]).mean(1).tolist()
    return common.report(SCRIPT, args, "trained from scratch", began, ("crps", "persistence", True), results,
                         baselines, columns, {f"clip_{i:03d}": score for i, score in enumerate(errors)},
                         ("psnr_ensemble_mean", "crps"), ("autoencoder", "."), [common.rank_panel(ranks)])


def sample(args, device, autoencoder, field, windows):
    """Forecasts the best, median and worst test window of eval.json -> [samples/<case>_clip_*.{mp4,png}]."""
    P, files = args.condition_frames, []
    names = [f"clip_{i:03d}" for i in range(len(windows))]
    cases = common.pick_cases(args.output_dir, names)
    x = from_uint8(windows[list(cases.values())].to(device))
    seed = common.seed_all(args.seed, SAMPLE)
    forecasts = forecast(autoencoder, field, x[:, :P], args, min(3, args.num_samples), seed)
    for (case, number), clip, members in zip(cases.items(), x, forecasts):
        truth = clip[P - 1:]                     # the pictures begin with the last observed frame
        samples = {f"sample {k}": torch.cat([truth[:1], member]) for k, member in enumerate(members, 1)}
        reconstruction = autoencoder.decode(autoencoder.encode(truth))
        videos = {"ground truth": truth, "reconstruction": reconstruction, **samples}
        videos["error,\nsample 1"] = common.error_picture(samples["sample 1"], truth)
        files += common.write_panels(f"{args.output_dir}/samples/{case}_{names[number]}", {"": videos})
    return files


# ---- set-up and parallel wrap ---------------------------------------------------------------------------

def setup(args):
    """Joins torchrun's processes and selects device and precision -> rank, world, device, dtype, autocast."""
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
    """Gradient checkpointing and torch.compile on request; DDP under torchrun."""
    for module in model.modules():
        if args.grad_checkpoint and isinstance(module, (Block, ResBlock)):
            module.forward = functools.partial(recompute, module.forward, use_reentrant=False)
    if args.compile:
        model.compile()
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


def train(args, run, stage, stream, model, spec, loss_fn, val_fn, steps, lr, checkpoint, **extra):
    """Trains `model` up to `steps`, resuming from `checkpoint`; saves into <output_dir>/<stage>/ckpt.

    spec: random values of a sample, for common.sample_global_batch. loss_fn(model, values, step) -> loss,
    {name: term to log}. val_fn(model) -> {name: number}. extra: {name: state dict}, saved as well.
    """
    folder = Path(args.output_dir, stage)
    net = wrap(model, args, run)
    params = list(net.parameters())
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    ema = common.EMA(params, args.ema_decay)
    start = common.load_run(checkpoint, net, optimizer, ema)
    log = common.open_log(SCRIPT, stage, args, start, steps)
    should_stop = common.install_sigterm_handler()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group.update(lr=get_lr(step, lr, args.warmup_steps, steps), weight_decay=args.weight_decay)
        net.train()
        seed = common.seed_all(args.seed, stream, step)
        for micro in range(args.grad_accum):     # processes average gradients at the last micro-step only
            values = common.sample_global_batch(spec, seed, args.batch_size, run.rank, run.world, micro,
                                                args.grad_accum, run.device)
            net.require_backward_grad_sync = micro == args.grad_accum - 1          # read by DDP
            with run.autocast():
                loss, terms = loss_fn(net, values, step)
            (loss / args.grad_accum).backward()
            log.add(loss=loss, **terms)
        norm = nn.utils.clip_grad_norm_(params, args.grad_clip or math.inf)
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
        if save:                                 # before validation, so that an error there loses nothing
            common.save_run(folder, SCRIPT, completed, net, optimizer, ema, args, args.keep_last, **extra)
        if args.eval_every and (completed % args.eval_every == 0 or completed == steps):
            with ema.applied(), torch.no_grad(), run.autocast():
                log.row(completed, **val_fn(net.eval()))
            log.restart_clock()
        if stop:
            raise UserError(f"stopped by SIGTERM after step {completed} (saved): the same command resumes")
    common.remove_sigterm_handler()
    log.bar.close()


def train_autoencoder(args, run, frames, val_frames):
    """Trains the autoencoder on frames F 3 H W uint8 -> autoencoder/autoencoder.safetensors."""
    folder = Path(args.output_dir) / "autoencoder"
    frames = frames.to(run.device)
    x_val = from_uint8(val_frames[::math.ceil(len(val_frames) / 64)].to(run.device))
    spec = {"frame": ("randint", len(frames)), "flip": ("randint", 2)}

    def loss_fn(model, values, step):
        x = from_uint8(frames[values["frame"]])
        x = torch.where(common.expand_to(values["flip"], x) > 0, x.flip(-1), x)
        return model(x, masked=step >= (1 - args.masked_finetune) * args.ae_steps)

    def val_fn(model):
        loss, terms = model(x_val, masked=False)
        return {"val_loss": loss.item(), "val_psnr": terms["psnr"].mean().item()}

    checkpoint = common.find_checkpoint(folder / "ckpt", SCRIPT, "none" if args.resume == "none" else "auto")
    torch.manual_seed(args.seed)                 # equal initial weights on all processes
    model = AutoencoderLoss(args).to(run.device)
    train(args, run, "autoencoder", AUTOENCODER, model, spec, loss_fn, val_fn, args.ae_steps, args.ae_lr,
          checkpoint)
    if run.rank == 0:                            # normalise latents to the mean and variance of the noise
        path, state, _ = common.find_checkpoint(folder / "ckpt", SCRIPT, "auto")
        model = common.load_for_inference(AutoencoderLoss(args), state["ema"], path, run.device)
        autoencoder = model.autoencoder
        subset = torch.linspace(0, len(frames) - 1, min(2048, len(frames))).long()
        z = autoencoder.encode(from_uint8(frames[subset]))
        autoencoder.mean.copy_(z.mean(dim=(0, 2, 3))[:, None, None])
        autoencoder.std.copy_(z.std(dim=(0, 2, 3))[:, None, None].clamp(min=1e-4))
        common.save_weights(folder / "autoencoder.safetensors", autoencoder.state_dict())
    common.barrier()


def train_flow(args, run, data, autoencoder, checkpoint):
    """Trains the vector field on latents that are encoded once. data: {split: (frames, window starts)}."""
    latents, starts, specs = {}, {}, {}
    for split, (frames, split_starts) in data.items():
        views = [frames, frames.flip(-1)] if split == "train" else [frames]        # mirrors whole clips
        latents[split] = encode_clips(autoencoder, views, run.device)
        starts[split] = split_starts.to(run.device)
        specs[split] = {"window": ("randint", len(split_starts)), "view": ("randint", len(views)),
                        "tau": ("rand",), "t": ("rand",), "c": ("rand",),
                        "eps": ("randn", *latents[split].shape[2:])}

    def loss_fn(model, values, step, split="train"):
        offsets = torch.arange(args.num_observations, device=run.device)
        window = starts[split][values["window"], None] + offsets
        return river_loss(model, latents[split][values["view"][:, None], window].float(), values, args)

    def val_fn(model):                           # the same windows, times and noise at every validation
        seed = common.seed_all(args.seed, VALIDATE)
        values = common.sample_global_batch(specs["val"], seed, 128, device=run.device)
        return {"val_loss": loss_fn(model, values, 0, "val")[0].item()}

    torch.manual_seed(args.seed)
    field = VectorField(args).to(run.device)
    train(args, run, ".", FLOW, field, specs["train"], loss_fn, val_fn, args.max_steps, args.lr, checkpoint,
          autoencoder=autoencoder.state_dict())


def train_stages(args, run, checkpoint):
    """Trains the missing stages -> the newest checkpoint, with autoencoder and vector field."""
    folder = Path(args.output_dir)
    if run.rank == 0:
        common.write_json(folder / "args.json", {**vars(args), **common.provenance()})
    data = {}
    for split in ("train", "val"):
        frames, videos = load_clips(args.data_dir, split)
        data[split] = frames, torch.cat(window_starts(videos, args.num_observations, split))
    if checkpoint:                               # holds the autoencoder of its latents
        autoencoder, _ = load_models(args, checkpoint, run.device)
    else:
        path = Path(args.autoencoder or folder / "autoencoder/autoencoder.safetensors")
        if not args.autoencoder and (args.resume == "none" or not path.is_file()):
            train_autoencoder(args, run, data["train"][0], data["val"][0])
        weights = common.load_weights(path)
        autoencoder = common.load_for_inference(Autoencoder(args), weights, path, run.device)
    train_flow(args, run, data, autoencoder, checkpoint)
    checkpoint = common.find_checkpoint(folder / "ckpt", SCRIPT, "auto") or checkpoint
    if run.rank == 0:
        common.save_weights(folder / "vector_field.safetensors", checkpoint.state["ema"])
    return checkpoint


# ---- main -----------------------------------------------------------------------------------------------

def load_models(args, checkpoint, device="cpu") -> tuple[Autoencoder, VectorField]:
    """-> autoencoder and vector field (EMA weights) of a checkpoint."""
    path, state, _ = checkpoint
    return (common.load_for_inference(Autoencoder(args), state["autoencoder"], path, device),
            common.load_for_inference(VectorField(args), state["ema"], path, device))


def dry_run(args):
    """Prints parameters, FLOPs and memory of the vector field, on the meta device, without data."""
    B, C, cells = args.batch_size, args.latent_channels, SIZE // 8
    with torch.device("meta"):
        field = VectorField(args)
        values = dict.fromkeys(("tau", "t", "c"), torch.rand(B)) | {"eps": torch.randn(B, C, cells, cells)}
        z = torch.randn(B, args.num_observations, C, cells, cells)
        print(common.dry_run_report("vector field", field, lambda: river_loss(field, z, values, args)[0], B,
                                    cells * cells, int(os.environ.get("WORLD_SIZE", 1))))


def run_script(argv):
    args, checkpoint, preset_reason = parse_args(argv)
    if args.dry_run:
        return dry_run(args)
    run = setup(args)
    inference_only = args.sample or args.eval
    common.announce(SCRIPT, args, preset_reason, run, checkpoint)
    common.simulate_missing_data(SCRIPT, args.data_dir, default=PRESETS["tiny"]["data_dir"])
    windows = held_out_windows(args)             # an error in the test split should show before training
    if not (inference_only and checkpoint):
        checkpoint = train_stages(args, run, checkpoint)
    common.shutdown()                            # only rank 0 evaluates
    if run.rank == 0:
        models = load_models(args, checkpoint, run.device)
        files = evaluate(args, run.device, *models, windows) if common.wants_evaluation(args) else []
        if args.sample or not inference_only:
            files += sample(args, run.device, *models, windows)
        common.show_results(args.output_dir, files, args.tensorboard, args.wandb)


def main(argv=None):
    return common.one_line_errors(f"{SCRIPT}.py", lambda: run_script(argv))


if __name__ == "__main__":
    sys.exit(main())
