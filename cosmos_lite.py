"""cosmos_lite.py: a light world model that learns physics from video: encode, predict latents, decode.

Idea        A small world model in the sense of Cosmos (NVIDIA 2025, arXiv:2501.03575): an encoder, recurrent
            or causal dynamics of its latents, a decoder, trained on free-running rollouts.
Equations   z_t = E(x_t), a latent for tau frames          -> GridEncoder, CNNEncoder, PretrainedEncoder
            z_{t+1} = z_t + f(h_t), h_t = GRU(z_t, h_{t-1}), or LSTM    -> GridDynamics, VectorDynamics
            the same with attention over z_{<=t}           -> Transformer
            x_t = background - 2 D(z_t)                    -> GridDecoder, CNNDecoder
            reconstruction + one step + rollout + perceptual + temporal -> WorldModelLoss, curriculum
            its videos and their physics                   -> simulate, collide, render
            MSE, PSNR, SSIM; what a forecast does to the objects   -> frame_scores, physics
Differs     from the document and chenli-git/cosmo_video_world_model, and why:
            - the latent is a 16x16 grid: a pooled vector forgets where things are (--latent vector keeps it)
            - a latent stands for two frames: half the steps, and it shows how fast things move
            - the network predicts the difference to the background, which is 97 % of the pixels
            - reconstruction and one-step losses beside the rollout, which grows during training
            - motion is compared with the target's; the original's temporal loss rewards standing still
            - group norm, no dropout inside rollouts, the last latent of the context is not fed twice
            - the transformer is causal and keeps keys and values; the original starts over at each frame
            - contacts are simulated in substeps, without random kicks, and edges are drawn soft
            - the split is a list, by kind, and not copies of videos: a second split would mix old with new
            - steps, not epochs: a video of 60 frames is one clip of 30 + 30, not the document's 5
Run         python cosmos_lite.py                               # videos to evaluation: 4 to 10 min, 2 GB
            python cosmos_lite.py --sample --num_predict 60 --video_idx 5                # 8 s
            python cosmos_lite.py --eval                        # 17 s to 1 min
            python cosmos_lite.py --generate --data_dir data --num_videos 128     # data/raw/<kind>/*.mp4
            python cosmos_lite.py --preset quick --data_dir data                  # the document's option A
            torchrun --nproc_per_node=8 cosmos_lite.py --preset best --data_dir data         # its option B
            python cosmos_lite.py --preset best --dry_run
Shapes      B batch  T frames  D latent channels  H W pixels (64 64)  h w latent grid (16 16, 8 8, or 1 1
            for a vector)  n objects. Videos are B T 3 H W in [-1, 1], latents B T/tau D h w.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import re
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

SCRIPT = "cosmos_lite"
SIZE, FPS = 64, 30                       # pixels of a side that the model sees; frames per second
KINDS = ("bouncing", "pendulum", "falling", "projectile")
PARTS = ("train", "val", "test")
HORIZONS = (1, 5, 10, 20, 30)            # frames ahead that tables show

# ---- args -----------------------------------------------------------------------------------------------

PRESETS = {
    "tiny": dict(data_dir="data/cosmos_lite", latent_dim=48, max_steps=1750, batch_size=8, lr=2e-3,
                 warmup_steps=50, beta2=0.98, weight_decay=1e-3, ema_decay=0.99, no_perceptual=True,
                 brightness=0.0, permute_colours=True, rollout=20, eval_every=350, save_every=350),
    # The document's option B: pretrained encoder, transformer, perceptual loss; 100 epochs of 409 clips.
    "best": dict(data_dir="data", encoder="dinov2_vits14", world_model="transformer", latent_dim=128,
                 num_layers=6, context=30, rollout=30, batch_size=8, max_steps=5100, weight_decay=1e-5,
                 eval_every=51),
    # The document's option A: its convolutional encoder, a vector per frame, GRU, no perceptual loss.
    "quick": dict(data_dir="data", latent="vector", tau=1, context=30, rollout=30, batch_size=4,
                  max_steps=10_200, weight_decay=1e-5, no_perceptual=True, eval_every=102),
}
# What shapes the weights or gives them their meaning: a checkpoint's own values hold.
MODEL_FLAGS = ("encoder", "world_model", "decoder", "latent", "latent_dim", "hidden_dim", "num_layers",
               "window", "tau", "context", "T_in")
# What --preset auto looks for before it takes the second preset.
PAPER_NEEDS = dict(data="{data_dir}/raw", get_data="python cosmos_lite.py --generate --data_dir data",
                   weights="facebook/dinov2-small")


def build_parser():
    parser = Parser(prog=f"{SCRIPT}.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_shared_flags(parser, PRESETS)
    add = parser.add_argument_group("data").add_argument
    add("--generate", action="store_true", help="simulate videos into data_dir/raw, split them, then exit")
    add("--num_videos", type=int, default=128, help="simulated videos of each of the four kinds")
    add("--num_frames", type=int, default=60, help="frames of a simulated video")
    add("--data_seed", type=int, default=0, help="of the simulation")
    add("--split", default="80/10/10", help="shares of train, val and test; made once, then kept")
    add("--T_in", type=int, default=30, help="frames given")
    add("--T_out", type=int, default=30, help="frames to predict")
    add("--stride", type=int, default=5, help="frames from one clip of T_in + T_out to the next in a video")
    add("--brightness", type=float, default=.2, help="contrast to the background varies by this share")
    add("--permute_colours", action=argparse.BooleanOptionalAction, default=False,
        help="swap colour channels at random, clip by clip")
    add = parser.add_argument_group("model").add_argument
    add("--encoder", choices=["cnn", *PRETRAINED], default="cnn", help="pretrained ones come from the hub")
    add("--encoder_weights", metavar="FOLDER", help="read the pretrained encoder from this folder")
    add("--freeze_encoder", action="store_true", help="do not train the pretrained encoder")
    add("--random_init", action="store_true", help="that encoder with random weights, to measure speed")
    add("--world_model", choices=["gru", "lstm", "transformer"], default="gru", help="latent dynamics")
    add("--decoder", choices=["auto", "simple", "enhanced"], default="auto", help="enhanced: with attention")
    add("--latent", choices=["grid", "vector"], default="grid", help="of a frame: cells, or one vector")
    add("--latent_dim", type=int, default=0, help="D (0: 64 per cell, 256 for a vector)")
    add("--hidden_dim", type=int, default=512, help="width of the vector's GRU or LSTM")
    add("--num_layers", type=int, default=0, help="of the dynamics (0: 2; a vector's transformer 9)")
    add("--window", type=int, default=32, help="latents that the transformer looks back on")
    add("--tau", type=int, default=2, help="frames per latent")
    add = parser.add_argument_group("loss").add_argument
    add("--context", type=int, default=10, help="longest context in training, and what a forecast reads")
    add("--rollout", type=int, default=16, help="frames of a free rollout at the end of its curriculum")
    add("--foreground", type=float, default=4.0, help="extra weight of what is not background, at first")
    add("--foreground_end", type=float, default=0.0, help="the same at the end; above 0 objects fade less")
    add("--recon_type", choices=["mse", "l1"], default="mse", help="pixel loss")
    add("--recon_weight", type=float, default=1.0, help="of the pixel losses")
    add("--perceptual_weight", type=float, default=.1, help="of VGG16's features")
    add("--temporal_weight", type=float, default=.01, help="of motion against the target's motion")
    add("--no_perceptual", action="store_true", help="without the perceptual loss, for CPUs")
    add("--vgg_weights", default="https://download.pytorch.org/models/vgg16-397923af.pth", help="URL or file")
    add = parser.add_argument_group("sampling and evaluation").add_argument
    add("--num_predict", type=int, default=30, help="frames of the rollout demo, up to 300")
    add("--video_idx", type=int, default=-1, help="test video of the demo (-1: one of each kind)")
    add("--eval_clips", type=int, default=0, help="held-out clips to evaluate, at most (0: all)")
    add("--best", action="store_true", help="use the weights of the lowest validation loss, not the last")
    return parser


def check_args(args):
    """One clear line for values that no run can mean."""
    check_numbers(args, least_1=("T_in", "T_out", "stride", "tau", "context", "rollout", "window",
                                 "num_videos", "num_frames", "hidden_dim"),
                  least_0=("data_seed", "latent_dim", "num_layers", "eval_clips", "brightness", "foreground",
                           "foreground_end", "recon_weight", "perceptual_weight", "temporal_weight"))
    if not 1 <= args.num_predict <= 300:
        raise UserError(f"--num_predict must be from 1 to 300, not {args.num_predict}")
    if args.video_idx < -1:
        raise UserError(f"--video_idx must be a test video's number or -1, not {args.video_idx}")
    shares(args.split)
    if args.latent_dim % 8:
        raise UserError(f"--latent_dim must be a multiple of 8, not {args.latent_dim}")
    if args.world_model == "transformer" and args.latent_dim % heads(args.latent_dim):
        raise UserError(f"--world_model transformer has {heads(args.latent_dim)} heads, which do not divide "
                        f"--latent_dim {args.latent_dim}: take a multiple of 32")
    if args.T_in + args.T_out < 2 * args.tau:
        raise UserError(f"--T_in {args.T_in} and --T_out {args.T_out} leave no room for two latents of --tau "
                        f"{args.tau} frames")
    for name in ("encoder_weights", "freeze_encoder", "random_init"):
        if getattr(args, name) and args.encoder == "cnn":
            raise UserError(f"--{name} is for pretrained encoders, not for --encoder cnn")
    if args.best and not args.eval_every:
        raise UserError("--best needs validations, which --eval_every 0 leaves out")


# ---- model: encoders ------------------------------------------------------------------------------------

class ResBlock(nn.Module):
    """x + conv1(SiLU(conv3(norm(x)))), the last convolution zero at the start."""
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class GridEncoder(nn.Module):
    """B T 3 H W -> B T/tau D 16 16: a 4x4 patch of tau frames and of the one before them becomes a cell, so
    that a single latent shows what moves and how fast."""
    def __init__(self, D, tau):
        super().__init__()
        self.tau = tau
        self.patch = nn.Sequential(nn.Conv2d(48 * (tau + 1), 128, 1), nn.SiLU(), nn.Conv2d(128, D, 1))
        self.position = nn.Parameter(0.02 * torch.randn(D, 16, 16))
        self.blocks = nn.Sequential(ResBlock(D), ResBlock(D))

    def forward(self, x):
        x = F.pixel_unshuffle(x, 4)
        x = torch.cat([x[:, :1], x], dim=1).unfold(1, self.tau + 1, self.tau)      # B T/tau 48 16 16 tau+1
        x = x.movedim(-1, 2).flatten(2, 3)
        z = self.patch(x.flatten(0, 1).contiguous(memory_format=torch.channels_last)) + self.position
        return self.blocks(z).unflatten(0, x.shape[:2])


class PostBlock(nn.Module):
    """ReLU(x + norm(conv(ReLU(norm(conv(x)))))), the document's residual block."""
    def __init__(self, c):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(8, c), nn.ReLU(),
                                  nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(8, c))

    def forward(self, x):
        return F.relu(x + self.body(x))


class CNNEncoder(nn.Module):
    """The document's encoder: B T 3 64 64 -> B T/tau D 1 1, a vector per frame (or for tau of them).

    Its global average pooling would forget positions. Here each channel is averaged under one of 16 cosine
    patterns of the 4x4 map instead: no parameter more, and what is where can be read from the vector.
    """
    def __init__(self, D, tau):
        super().__init__()
        layers, self.tau = [], tau
        for c_in, c, kernel in ((3, 64, 7), (64, 128, 3), (128, 256, 3), (256, 512, 3)):
            layers += [nn.Conv2d(c_in, c, kernel, 2, kernel // 2), nn.GroupNorm(8, c), nn.ReLU(),
                       PostBlock(c)]
        self.body, self.project = nn.Sequential(*layers), nn.Linear(512 * tau, D)
        wave = torch.cos(math.pi * torch.arange(4)[:, None] * (torch.arange(4) + .5) / 4)
        patterns = torch.einsum("iy,jx->ijyx", wave, wave).flatten(0, 1)
        self.register_buffer("patterns", patterns.repeat(32, 1, 1), persistent=False)

    def forward(self, x):
        pooled = (self.body(x.flatten(0, 1)) * self.patterns).mean(dim=(2, 3))
        return self.project(pooled.view(len(x), -1, 512 * self.tau))[..., None, None]


class ImageNet(nn.Module):
    """Frames in [-1, 1], ... 3 H W, as networks take them that were trained on ImageNet."""
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([.485, .456, .406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([.229, .224, .225]).view(3, 1, 1), persistent=False)

    def forward(self, x):
        return ((x + 1) / 2 - self.mean) / self.std


# name -> hub id, transformers class and configuration, width of its features, width of its pooled output
PRETRAINED = {
    "resnet50": ("microsoft/resnet-50", "ResNet", dict(depths=[3, 4, 6, 3]), 512, 2048),
    "resnet101": ("microsoft/resnet-101", "ResNet", dict(depths=[3, 4, 23, 3]), 512, 2048),
    **{f"dinov2_vit{letter}14": (f"facebook/dinov2-{name}", "Dinov2", dict(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, image_size=518,
        patch_size=14, use_swiglu_ffn=letter == "g"), width, width)
       for letter, name, width, layers in (("s", "small", 384, 12), ("b", "base", 768, 12),
                                           ("l", "large", 1024, 24), ("g", "giant", 1536, 40))}}


class PretrainedEncoder(nn.Module):
    """ResNet's second stage (512 channels, 8x8 of 64 pixels) or DINOv2's patches (8x8 of 112 pixels) and the
    8x8 patch itself, since semantic features blur positions, projected to the latent's width. As a vector:
    the pooled features through the document's two-layer projection."""
    def __init__(self, args, D, load):
        super().__init__()
        import transformers
        name, family, config, features, pooled = PRETRAINED[args.encoder]
        cls = getattr(transformers, f"{family}Model")
        if load:
            try:
                self.backbone = cls.from_pretrained(args.encoder_weights or name)
            except Exception as error:   # offline, no cache, damaged files: transformers has many kinds
                raise UserError(f"no weights for --encoder {args.encoder}: {args.encoder_weights or name} is "
                                f"not here and cannot be fetched; run once online, give --encoder_weights "
                                f"FOLDER, or take --random_init to measure speed") from error
        else:
            self.backbone = cls(getattr(transformers, f"{family}Config")(**config))
        self.grid, self.frozen, self.tau, self.side = args.latent == "grid", args.freeze_encoder, args.tau, 64
        if family == "Dinov2":
            self.side = 112              # 8 patches of 14
            self.backbone.embeddings.mask_token.requires_grad_(False)   # used in pretraining only
        elif self.grid:
            self.backbone.encoder.stages = self.backbone.encoder.stages[:2]
        if self.frozen:
            self.backbone.requires_grad_(False)
        if self.grid:
            self.project, self.block = nn.Conv2d(self.tau * (features + 192), D, 1), ResBlock(D)
        else:
            self.project = nn.Sequential(nn.Linear(self.tau * pooled, 512), nn.ReLU(), nn.Linear(512, D))
        self.normalise = ImageNet()

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:                  # its batch statistics must not drift
            self.backbone.eval()
        return self

    def forward(self, x, pictures):
        """x: differences to the background, pictures: the frames themselves in [-1, 1]; both B T 3 H W."""
        y = self.normalise(pictures.flatten(0, 1))
        if self.side != SIZE:
            y = F.interpolate(y, (self.side, self.side), mode="bilinear", align_corners=False)
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            out = self.backbone(y)
        if not self.grid:
            pooled = out.pooler_output.reshape(len(x), x.shape[1] // self.tau, -1)
            return self.project(pooled)[..., None, None]
        y = out.last_hidden_state
        if y.ndim == 3:                  # tokens: the class token, then 8x8 patches
            y = y[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        y = torch.cat([y.unflatten(0, x.shape[:2]), F.pixel_unshuffle(x, 8)], dim=2)
        y = y.unflatten(1, (-1, self.tau)).flatten(2, 3)
        return self.block(self.project(y.flatten(0, 1))).unflatten(0, y.shape[:2])


# ---- model: latent dynamics -----------------------------------------------------------------------------
# forward(z, state=None): latents B T D h w, what was seen before -> the prediction of each one's successor,
# B T D h w, and the state after the last. A rollout feeds predictions back, one at a time.

class VectorDynamics(nn.Module):
    """The document's GRU or LSTM on vectors, with its head; here the head predicts the change."""
    def __init__(self, kind, D, hidden, layers):
        super().__init__()
        self.rnn = getattr(nn, kind.upper())(D, hidden, layers, batch_first=True)
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, D))

    def forward(self, z, state=None):
        h, state = self.rnn(z.flatten(2), state)
        return z + self.head(h)[..., None, None], state


class GridDynamics(nn.Module):
    """GRU or LSTM whose maps are convolutions: gates 1x1, candidate 3x3, then residual blocks."""
    def __init__(self, kind, D, layers):
        super().__init__()
        self.lstm = kind == "lstm"
        self.gates = nn.Conv2d(2 * D, (3 if self.lstm else 2) * D, 1)
        self.candidate = nn.Conv2d(2 * D, D, 3, padding=1)
        self.blocks = nn.Sequential(*[ResBlock(D) for _ in range(layers)])
        self.out = nn.Conv2d(D, D, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, z, state=None):
        if state is None:
            state = (torch.zeros_like(z[:, 0], memory_format=torch.channels_last),) * (2 if self.lstm else 1)
        predictions = []
        for z_t in z.unbind(1):
            state = self.cell(z_t.contiguous(memory_format=torch.channels_last), *state)
            predictions.append(z_t + self.out(self.blocks(state[0])))
        if len(predictions) == 1:        # a view: a rollout's maps stay channels last
            return predictions[0][:, None], state
        return torch.stack(predictions, dim=1), state

    def cell(self, z, h, c=None):
        both = torch.cat([z, h], dim=1)
        gates = torch.sigmoid(self.gates(both))
        if self.lstm:
            keep, write, show = gates.chunk(3, dim=1)
            c = keep * c + write * torch.tanh(self.candidate(both))
            return show * torch.tanh(c), c
        reset, update = gates.chunk(2, dim=1)
        fresh = torch.tanh(self.candidate(torch.cat([z, reset * h], dim=1)))
        return h + update * (fresh - h),


def heads(D):
    """Attention heads of a latent of width D."""
    return max(1, D // 32)


class CausalBlock(nn.Module):
    """Attention of each cell over its own past (a learned bias per head and distance), then a convolution
    over space. On a 1x1 grid both are the layers of an ordinary causal transformer."""
    def __init__(self, D, window, grid):
        super().__init__()
        self.heads, self.window = heads(D), window
        self.norm1, self.norm2 = nn.GroupNorm(1, D), nn.GroupNorm(1, D)
        self.qkv, self.out = nn.Conv2d(D, 3 * D, 1), nn.Conv2d(D, D, 1)
        self.bias = nn.Parameter(torch.zeros(self.heads, window))
        wide, kernel = (2 * D, 3) if grid else (4 * D, 1)
        self.up, self.down = nn.Conv2d(D, wide, kernel, padding=kernel // 2), nn.Conv2d(wide, D, 1)
        for layer in (self.out, self.down):
            nn.init.zeros_(layer.weight)

    def forward(self, x, past=None):
        """x B T D h w; past: keys and values of earlier frames, each B hw heads T' D/heads -> x, past."""
        B, T, D, h, w = x.shape
        y = self.qkv(self.norm1(x.flatten(0, 1))).view(B, T, 3, self.heads, D // self.heads, h * w)
        q, k, v = y.permute(2, 0, 5, 3, 1, 4).contiguous()         # else the matrix products run one by one
        if past is not None:
            k, v = torch.cat([past[0], k], dim=3), torch.cat([past[1], v], dim=3)
        age = torch.arange(k.shape[3] - T, k.shape[3], device=x.device)[:, None] - torch.arange(
            k.shape[3], device=x.device)
        unseen = (age < 0) | (age >= self.window)
        bias = self.bias[:, age.clamp(0, self.window - 1)].masked_fill(unseen, -math.inf)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))    # B hw heads T D/heads
        y = y.permute(0, 3, 2, 4, 1).reshape(B * T, D, h, w)
        x = x.flatten(0, 1) + self.out(y)
        x = x + self.down(F.silu(self.up(self.norm2(x))))
        return x.unflatten(0, (B, T)), (k, v)


class Transformer(nn.Module):
    """Causal blocks over the latents of all frames at once, or of one more with the keys and values kept."""
    def __init__(self, D, layers, window, grid):
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(CausalBlock(D, window, grid) for _ in range(layers))
        self.norm, self.out = nn.GroupNorm(1, D), nn.Conv2d(D, D, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, z, state=None):
        x, kept = z, []
        for block, past in zip(self.blocks, state or [None] * len(self.blocks)):
            x, past = block(x, past)
            kept.append(past)
        return z + self.out(self.norm(x.flatten(0, 1))).view_as(z), kept

    def cut(self, state, length):
        """The state as it was after `length` frames, and no longer than a block can see."""
        return [tuple(t[..., max(0, length - self.window + 1):length, :] for t in past) for past in state]


# ---- model: decoders ------------------------------------------------------------------------------------

class SelfAttention(nn.Module):
    """The document's attention over the cells of a map: one head, narrow keys, weight 0 at the start."""
    def __init__(self, c):
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(c, c // 8, 1), nn.Conv2d(c, c // 8, 1), nn.Conv2d(c, c, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        q, k, v = (layer(x).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.gamma * y.transpose(1, 2).view_as(x)


class CNNDecoder(nn.Module):
    """The document's decoders of a vector, simple or enhanced, without the tanh: N D 1 1 -> N 3tau 64 64."""
    def __init__(self, D, tau, enhanced):
        super().__init__()
        first = [nn.Linear(D, 512), nn.ReLU(), nn.Linear(512, 8192)] if enhanced else [nn.Linear(D, 8192)]
        layers = [nn.Flatten(), *first, nn.Unflatten(1, (512, 4, 4))]
        for c_in, c, attention in ((512, 256, enhanced), (256, 128, enhanced), (128, 64, False)):
            layers += [nn.ConvTranspose2d(c_in, c, 4, 2, 1), nn.GroupNorm(8, c), nn.ReLU(),
                       *[PostBlock(c) for _ in range(2 if enhanced else 1)]]
            layers += [SelfAttention(c)] if attention else []          # at 8x8 and 16x16
        last = nn.Conv2d(32, 3 * tau, 3, padding=1) if enhanced else nn.ConvTranspose2d(64, 3 * tau, 4, 2, 1)
        tail = [nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.GroupNorm(8, 32), nn.ReLU()] if enhanced else []
        self.body = nn.Sequential(*layers, *tail, last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, z):
        return self.body(z)


class GridDecoder(nn.Module):
    """N D h w, a 16x16 or 8x8 grid -> N 3tau 64 64. Enhanced: with attention at 8x8 and at 16x16."""
    def __init__(self, D, tau, side, enhanced):
        super().__init__()
        self.side, self.enhanced = side, enhanced
        if enhanced:
            self.low, self.high = (nn.Sequential(ResBlock(D), SelfAttention(D)) for _ in range(2))
        self.up = nn.Sequential(nn.Conv2d(D, 4 * D, 1), nn.PixelShuffle(2)) if side == 8 or enhanced else None
        self.block, self.norm = ResBlock(D), nn.GroupNorm(1, D)
        self.wide, self.last = nn.Conv2d(D, 128, 1), nn.Conv2d(128, 48 * tau, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, z):
        z = z.contiguous(memory_format=torch.channels_last)            # 1.4 times faster on CPUs
        if self.enhanced:
            low = self.low(z if self.side == 8 else F.avg_pool2d(z, 2))
            z = self.high(self.up(low) + (0 if self.side == 8 else z))
        elif self.up is not None:
            z = self.up(z)
        return F.pixel_shuffle(self.last(F.silu(self.wide(self.norm(self.block(z))))), 4)


# ---- model: the whole -----------------------------------------------------------------------------------

class VideoWorldModel(nn.Module):
    """Frames in, the frames that follow out. `load`: fetch a pretrained encoder's weights."""
    def __init__(self, args, load=False):
        super().__init__()
        grid, pretrained = args.latent == "grid", args.encoder != "cnn"
        D = args.latent_dim or (64 if grid else 256)
        layers = args.num_layers or (9 if not grid and args.world_model == "transformer" else 2)
        self.tau, self.pretrained, self.grad_checkpoint = args.tau, pretrained, args.grad_checkpoint
        self.context = max(1, args.context // args.tau)    # latents
        self.encoder = (PretrainedEncoder(args, D, load) if pretrained else
                        GridEncoder(D, args.tau) if grid else CNNEncoder(D, args.tau))
        if args.world_model == "transformer":
            self.dynamics = Transformer(D, layers, args.window, grid)
        elif grid:
            self.dynamics = GridDynamics(args.world_model, D, layers)
        else:
            self.dynamics = VectorDynamics(args.world_model, D, args.hidden_dim, layers)
        enhanced = args.decoder == "enhanced" or args.decoder == "auto" and pretrained
        self.decoder = (GridDecoder(D, args.tau, 8 if pretrained else 16, enhanced) if grid else
                        CNNDecoder(D, args.tau, enhanced))
        self.register_buffer("background", torch.ones(3, SIZE, SIZE))  # of the training videos

    def encode(self, x):
        """B T 3 H W, T a multiple of tau -> B T/tau D h w."""
        ink = (self.background - x) / 2
        return self.encoder(ink, x) if self.pretrained else self.encoder(ink)

    def decode(self, z):
        """B t D h w -> B t*tau 3 H W. An untrained decoder shows the background."""
        ink = self.decoder(z.flatten(0, 1)).reshape(len(z), -1, 3, SIZE, SIZE)
        return self.background - 2 * ink

    def rollout(self, z, state, n):
        """z B 1 D h w, the first prediction, and the state that it came from -> n predictions B n D h w."""
        out = [z]
        for _ in range(n - 1):
            z, state = self.step(z, state)
            out.append(z)
        return torch.cat(out, dim=1)

    def step(self, z, state):
        if self.grad_checkpoint and self.training:
            return checkpoint(self.dynamics, z, state, use_reentrant=False)
        z, state = self.dynamics(z, state)
        if isinstance(self.dynamics, Transformer):
            state = self.dynamics.cut(state, state[0][0].shape[3])
        return z, state

    def forward(self, context_frames, num_predictions=30):
        """context_frames B T 3 H W in [-1, 1] -> predicted frames B n 3 H W, their latents B n/tau D h w, and
        the context's latents. Of the context, the last frames are read, as many as in training at most."""
        T = context_frames.shape[1]
        x = context_frames[:, -min(self.context, max(1, T // self.tau)) * self.tau:]
        if T < self.tau:                 # a frame alone: seen as at rest
            x = torch.cat([x[:, :1].expand(-1, self.tau - T, -1, -1, -1), x], dim=1)
        z = self.encode(x)
        p, state = self.dynamics(z)
        latents = self.rollout(p[:, -1:], state, -(-num_predictions // self.tau))
        return self.decode(latents)[:, :num_predictions].clamp(-1, 1), latents, z


# ---- objective ------------------------------------------------------------------------------------------

class VGGFeatures(nn.Module):
    """VGG16's relu1_2, relu2_2, relu3_3, relu4_3 (Simonyan 2014), for the perceptual loss (Johnson 2016)."""
    TAPS = (3, 8, 15, 22)

    def __init__(self):
        super().__init__()
        layers, c = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512):
            layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            c = width or c
        self.features, self.normalise = nn.Sequential(*layers), ImageNet()

    def forward(self, x):
        """N 3 H W in [-1, 1] -> four feature maps."""
        x, taps = self.normalise(x), []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.TAPS:
                taps.append(x)
        return taps


def load_vgg(args, device):
    """The perceptual network, frozen, or None where it is off or its weights cannot be had: -> (net, why)."""
    if args.no_perceptual:
        return None, "off (--no_perceptual)"
    if Path(args.vgg_weights).is_file():
        try:
            weights = torch.load(args.vgg_weights, map_location="cpu", weights_only=True)
        except Exception as error:       # damaged zips and foreign pickles raise their own
            raise UserError(f"--vgg_weights {args.vgg_weights} cannot be read: it takes torchvision's "
                            f"vgg16-397923af.pth") from error
    elif not args.vgg_weights.startswith("http"):
        raise UserError(f"--vgg_weights {args.vgg_weights}: no such file; --no_perceptual goes on without")
    else:
        try:
            weights = torch.hub.load_state_dict_from_url(args.vgg_weights, map_location="cpu",
                                                         weights_only=True, check_hash=True)
        except OSError as error:         # offline
            return None, f"OFF: its weights {args.vgg_weights} cannot be fetched ({error})"
    vgg = VGGFeatures()
    weights = {name: value for name, value in weights.items() if name in vgg.state_dict()}
    common.restore_state(vgg, weights, source=args.vgg_weights)
    return vgg.to(device).eval().requires_grad_(False), f"VGG16 of {args.vgg_weights}"


def pixel_loss(y, x, background, args, foreground):
    """Mean error of predicted y against x, B T 3 H W; pixels that differ from the background weigh
    1 + foreground, or 3 % of ink would hardly count beside 97 % of background."""
    error = (y - x).abs() if args.recon_type == "l1" else (y - x) ** 2
    ink = ((x - background).abs() > .2).any(dim=2, keepdim=True)
    return ((1 + foreground * ink) * error).mean()


class WorldModelLoss(nn.Module):
    """The training loss of a world model."""
    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args

    def forward(self, x, plan=None, vgg=None):
        """x B (c+k)tau 3 H W: c latents of context, then k that a free rollout has to meet. Latent last-1 is
        reconstructed, and predicted in one step; of the rollout the latents `shown` are decoded.
        plan: what curriculum() returns. -> loss, {name: its detached parts}. Without a plan: the T_out frames
        that the model predicts to follow x, so that a sharded model too is only called as a whole."""
        model, args, tau = self.model, self.args, self.model.tau
        if plan is None:
            return model(x, args.T_out)[0]
        c, k, last, shown, foreground = plan
        parallel = isinstance(model.dynamics, Transformer)
        z = model.encode(x if parallel else x[:, :c * tau])            # a transformer learns all at once
        p, state = model.dynamics(z)
        if parallel:
            state = model.dynamics.cut(state, c)
        rolled = model.rollout(p[:, c - 1:c], state, k)[:, shown]
        one_step = p[:, last - 2:last - 1] if last > 1 else z[:, :0]   # nothing comes before the first
        latents = [z[:, last - 1:last], one_step, rolled]
        y = model.decode(torch.cat(latents, dim=1)).float()
        y = y.split([tau * part.shape[1] for part in latents], dim=1)
        now = x[:, (last - 1) * tau:last * tau]
        future = x.unflatten(1, (-1, tau))[:, c:][:, shown].flatten(1, 2)
        weigh = lambda y, x: pixel_loss(y, x, model.background, args, foreground)
        parts = {"recon_loss": weigh(y[0], now), "rollout_loss": weigh(y[2], future)}
        if last > 1:
            parts["one_step_loss"] = weigh(y[1], now)
        loss = args.recon_weight * sum(parts.values())
        if future.shape[1] > 1:
            parts["temporal_loss"] = (y[2].diff(dim=1) - future.diff(dim=1)).abs().mean()
            loss = loss + args.temporal_weight * parts["temporal_loss"]
        if vgg is not None:
            with torch.no_grad():
                truth = vgg(future.flatten(0, 1))
            features = zip(vgg(y[2].flatten(0, 1)), truth)
            parts["perceptual_loss"] = sum(F.mse_loss(a, b) for a, b in features) / len(truth)
            loss = loss + args.perceptual_weight * parts["perceptual_loss"]
        return loss, {name: value.detach() for name, value in parts.items()}


def curriculum(args, step):
    """What all processes share at a step, in latents: context length c, rollout length k, `last` and `shown`
    (see WorldModelLoss), and the foreground's weight. Call it after seed_all."""
    progress, latents = step / args.max_steps, lambda frames: max(1, frames // args.tau)
    clip = (args.T_in + args.T_out) // args.tau
    longest = min(latents(min(args.context, args.T_in)), clip - 1)
    most = min(latents(min(args.rollout, args.T_out)), clip - longest)
    c = np.random.randint(min(latents(4), longest), longest + 1)       # one fixed length would fail at others
    k = round(1 + (most - 1) * min(1, progress / .6))
    first = np.random.randint(0, k)
    few = max(2, 3 // args.tau)                            # to decode all would cost more than it adds
    shown = sorted({*range(min(few, k)), *range(first, min(first + few, k))})
    last = c if args.world_model != "transformer" else np.random.randint(c, c + k + 1)
    fade = max(0, 1 - 1.1 * progress)
    return c, k, last, shown, args.foreground_end + (args.foreground - args.foreground_end) * fade


# ---- data: videos ---------------------------------------------------------------------------------------

def find_videos(root):
    folder = Path(root) / "raw"
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                   if path.suffix.lower() in (".mp4", ".avi", ".mov") and ".tmp." not in path.name)
    if not found:
        raise UserError(f"no videos in {folder}: put .mp4 files there, or make some with python {SCRIPT}.py "
                        f"--generate --data_dir {root}")
    return found


def shares(split):
    """--split -> the shares of train, val and test, which sum to 1."""
    if not re.fullmatch(r"\d+(\.\d+)?(/\d+(\.\d+)?){2}", split) or not re.search("[1-9]", split):
        raise UserError(f"--split takes three shares such as 80/10/10, not {split}")
    parts = [float(share) for share in split.split("/")]
    return [part / sum(parts) for part in parts]


def split_videos(names, split, seed=42):
    """names -> {"train", "val", "test"}: disjoint, stratified by folder, in the document's totals (512 ->
    409, 51, 52). A function of the sorted names. UserError for shares that leave one of them empty."""
    train, val, _ = shares(split)
    rng, place = np.random.default_rng(seed), {}
    for kind in sorted({os.path.dirname(name) for name in names}):
        own = [name for name in sorted(names) if os.path.dirname(name) == kind]
        for i, j in enumerate(rng.permutation(len(own))):  # evenly spread over [0, 1) within each kind
            place[own[j]] = (i + .5) / len(own), kind
    order = sorted(place, key=place.get)
    a = int(len(order) * train + 1e-9)
    b = a + int(len(order) * val + 1e-9)
    parts = dict(zip(PARTS, (sorted(order[:a]), sorted(order[a:b]), sorted(order[b:]))))
    for part, own in parts.items():
        if not own:
            raise UserError(f"{len(names)} videos leave none for {part}: give more videos or another --split")
    return parts


def make_split(args):
    """split.json: {"shares", "train", "val", "test"}, names of videos. Made once, whatever --seed says, and
    anew only for another --split: else what was trained on would be tested on."""
    file, names = Path(args.data_dir) / "split.json", find_videos(args.data_dir)
    split = json.loads(file.read_text()) if file.is_file() else {"shares": None}
    if split["shares"] is None or "split" in args.given and split["shares"] != args.split:
        split = {"shares": args.split, **split_videos(names, args.split)}
        common.write_json(file, split)
    unused = set(names).difference(*(split[part] for part in PARTS))
    if unused:
        print(f"{len(unused)} videos of {args.data_dir}/raw are in no split and not used: remove {file} to "
              f"split anew")
    return split


def build_cache(args):
    """raw/ -> split.json -> cache/: a video is decoded once, to SIZE x SIZE uint8, and when it changes."""
    split, folder = make_split(args), Path(args.data_dir) / "cache"
    paths = {name: Path(args.data_dir) / "raw" / name for part in PARTS for name in split[part]}
    files = {name: path.stat() if path.is_file() else None for name, path in paths.items()}
    made_of = [SIZE, split, [[name, file.st_size if file else 0, file.st_mtime_ns if file else 0]
                             for name, file in files.items()]]
    index = folder / "index.json"
    if index.is_file() and json.loads(index.read_text())["made_of"] == made_of:
        return
    index.unlink(missing_ok=True)
    with ThreadPoolExecutor() as pool:
        films = pool.map(decode, paths.values())
        films = dict(zip(paths, tqdm(films, "decode", len(paths), unit="video")))
    record = {"made_of": made_of,
              "skipped": [[name, film] for name, film in films.items() if isinstance(film, str)]}
    none = np.zeros((0, 3, SIZE, SIZE), np.uint8)
    folder.mkdir(exist_ok=True)
    for part in PARTS:
        own = {name: films[name] for name in split[part] if not isinstance(films[name], str)}
        record[part] = [[name, len(film)] for name, film in own.items()]
        np.save(folder / f"{part}.npy", np.concatenate([none, *own.values()]))
    common.write_json(index, record)


def decode(path):
    """-> T 3 SIZE SIZE uint8, or the reason why not."""
    try:
        return np.ascontiguousarray(common.read_video(path, SIZE))
    except (UserError, OSError) as error:
        return str(error)


def load_split(args, part):
    """What build_cache wrote of a split: frames F 3 H W uint8, a memory map; names, first rows and lengths
    of its videos; usable: indices of those long enough; starts: first rows of all their clips; skipped: why
    videos are left out."""
    folder = Path(args.data_dir) / "cache"
    record = json.loads((folder / "index.json").read_text())
    frames = torch.from_numpy(np.load(folder / f"{part}.npy", mmap_mode="c"))
    names, length = [name for name, _ in record[part]], [frames for _, frames in record[part]]
    first, T = np.cumsum([0, *length]).tolist(), args.T_in + args.T_out
    usable = [v for v, n in enumerate(length) if n >= T]
    starts = [first[v] + s for v in usable for s in range(0, length[v] - T + 1, args.stride)]
    short = [f"{name} has {n} frames, fewer than {T}" for name, n in zip(names, length) if n < T]
    skipped = short + [reason for name, reason in record["skipped"] if name in record["made_of"][1][part]]
    least = args.batch_size * args.grad_accum * int(os.environ.get("WORLD_SIZE", 1)) if part == "train" else 1
    if len(starts) < least:
        why = f"; skipped {len(skipped)} videos: {'; '.join(skipped[:3])}" if skipped else ""
        raise UserError(f"split {part} has {len(starts)} clips of {T} frames, a batch needs {least}: give "
                        f"more videos, another --split or a smaller --batch_size{why}")
    return argparse.Namespace(frames=frames, names=names, first=first, length=length, usable=usable,
                              starts=torch.tensor(starts), skipped=skipped)


def held_out_clips(data, args):
    """The first clip of each video that is long enough: N T 3 H W uint8."""
    rows = torch.tensor(data.first)[data.usable][:, None] + torch.arange(args.T_in + args.T_out)
    return data.frames[rows]


def load_state(args, name):
    """The exact state beside a simulated video, or None."""
    path = (Path(args.data_dir) / "raw" / name).with_suffix(".npz")
    return dict(np.load(path)) if path.is_file() else None


def augment(x, numbers, background, args):
    """x B T 3 H W: mirrored, contrast and colours changed, each alike in all frames of a clip."""
    x = torch.where(expand_to(numbers["flip"], x) > 0, x.flip(-1), x)
    if args.brightness:
        factor = expand_to(1 + args.brightness * (2 * numbers["contrast"] - 1), x)
        x = (background + factor * (x - background)).clamp(-1, 1)
    if args.permute_colours:
        order = torch.tensor(list(itertools.permutations(range(3))), device=x.device)[numbers["order"]]
        x = x.gather(2, order[:, None, :, None, None].expand_as(x))
    return x


# ---- data: simulated videos -----------------------------------------------------------------------------

def simulate(kind, frames, seed):
    """One video's physics -> its exact state: {"size", "g", "pos" and "vel" T N 2 (x to the right, y down, in
    pixels and pixels per frame), "radius" N, "ground" N (lowest y a centre reaches), "colour" N 3, ...}.

    Semi-implicit Euler in four substeps a frame. Constants are those of the document's project.
    """
    rng, dt = np.random.default_rng(seed), 1 / 4
    size = 256 if kind == "bouncing" else 64
    g, bounce, wall, drag, friction = {
        "bouncing": (.5, .85, .85, 1, 1), "pendulum": (.5, 1, 1, .995, 1),
        "falling": (.4, .7, .7, .98, .9), "projectile": (.3, .7, .8, 1, 1)}[kind]
    n = {"bouncing": rng.integers(1, 6), "falling": rng.integers(1, 4)}.get(kind, 1)
    radius = np.full(n, 16.) if kind == "bouncing" else rng.integers(3, 6, n).astype(float)
    extra, square = {}, np.zeros(n, bool)
    if kind == "bouncing":
        area, vel = ((21, 235), (21, 128)), np.stack([rng.uniform(-2, 2, n), rng.uniform(-1, 1, n)], 1)
    elif kind == "falling":
        area, vel = ((10, 54), (5, 21)), np.stack([rng.uniform(-1, 1, n), np.zeros(n)], 1)
        square = rng.random(n) < .5
    elif kind == "projectile":
        radius[:] = 3
        angle, speed = rng.uniform(math.pi / 6, math.pi / 3), rng.uniform(3, 5)
        area, vel = ((5, 21), (59, 59)), speed * np.array([[math.cos(angle), -math.sin(angle)]])
    else:
        radius[:] = 4
        length, theta, omega = rng.uniform(20, 35), rng.choice([-1, 1]) * rng.uniform(.3, math.pi / 3), 0.
        extra = {"pivot": np.array([32., 5.]), "length": length}
        area, vel = ((32, 32), (5, 5)), np.zeros((1, 2))
    while True:                          # spawn anew until none overlap
        pos = np.stack([rng.uniform(*area[0], n), rng.uniform(*area[1], n)], 1)
        gap = np.linalg.norm(pos[:, None] - pos, axis=2) - radius[:, None] - radius
        if (gap[~np.eye(n, dtype=bool)] > 1).all():
            break
    ground = np.full(n, 5 + extra["length"]) if kind == "pendulum" else size - radius
    path = []
    for step in range(frames * 4):
        if kind == "pendulum":
            if step:
                omega = (omega - dt * g / length * math.sin(theta)) * drag ** dt
                theta += dt * omega
            pos = extra["pivot"] + length * np.array([[math.sin(theta), math.cos(theta)]])
            vel = length * omega * np.array([[math.cos(theta), -math.sin(theta)]])
        elif step:
            vel[:, 1] += dt * g
            vel *= drag ** dt
            pos = pos + dt * vel
            collide(pos, vel, radius, kind == "bouncing", size, bounce, wall, friction, 2 * g * dt)
        if step % 4 == 0:
            path.append((pos.copy(), vel.copy()))
    hue = (rng.random() + np.arange(n) / n) % 1            # far apart: objects are told apart by them
    return {"kind": kind, "size": size, "g": g, "pos": np.stack([p for p, _ in path]),
            "vel": np.stack([v for _, v in path]), "radius": radius, "ground": ground, "square": square,
            "colour": np.stack([colour(h, rng.uniform(.75, 1), rng.uniform(.55, .9)) for h in hue]), **extra}


def collide(pos, vel, radius, elastic, size, bounce, wall, friction, rest):
    """Bounces at walls, floor and ceiling; with `elastic`, between equal masses too. In place."""
    for i in range(len(pos) if elastic else 0):
        for j in range(i):
            normal = pos[i] - pos[j]
            distance = np.linalg.norm(normal)
            normal, overlap = normal / max(distance, 1e-9), radius[i] + radius[j] - distance
            closing = (vel[j] - vel[i]) @ normal
            if overlap > 0 and closing > 0:                # the normal components change places
                vel[i] += closing * normal
                vel[j] -= closing * normal
                pos[i] += overlap / 2 * normal
                pos[j] -= overlap / 2 * normal
    low, high = radius, size - radius
    for side, hit in ((low, pos[:, 0] < low), (high, pos[:, 0] > high)):
        pos[hit, 0] = 2 * side[hit] - pos[hit, 0]
        vel[hit, 0] *= -wall
    hit = pos[:, 1] < low
    pos[hit, 1], vel[hit, 1] = low[hit], np.abs(vel[hit, 1]) * bounce
    hit = pos[:, 1] > high
    pos[hit, 1] = high[hit]
    vel[hit, 0] *= np.where(vel[hit, 1] > rest, friction, 1)
    vel[hit, 1] *= np.where(vel[hit, 1] > rest, -bounce, 0)


def colour(hue, saturation, value):
    """An RGB colour in [0, 1] that can be seen on white: its luminance is at most 0.6."""
    import colorsys
    rgb = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    return rgb * min(1, .6 / (rgb @ [.2126, .7152, .0722]))


def render(state, frames=slice(None)):
    """A state as simulate() makes it -> T H W 3 uint8 on white, edges softened over a pixel."""
    size, times = int(state["size"]), range(len(state["pos"]))[frames]
    film = np.full((len(times), size, size, 3), 255, np.uint8)
    centre = np.arange(size) + .5                          # pixel i covers [i, i + 1)

    def disc(frame, at, radius, colour, square=False):
        """Blends a disc or a square into a frame, in the window that it touches."""
        (x0, y0), (x1, y1) = (np.clip(np.floor(at + reach), 0, size).astype(int)
                              for reach in (-radius - 1, radius + 2))
        dx, dy = np.abs(centre[x0:x1] - at[0]), np.abs(centre[y0:y1] - at[1])[:, None]
        distance = np.maximum(dx, dy) if square else np.sqrt(dx ** 2 + dy ** 2)
        blend(frame[y0:y1, x0:x1], radius + .5 - distance, colour)

    def blend(window, coverage, colour):
        change = 255 * np.asarray(colour) - window
        window[:] = np.round(window + np.clip(coverage, 0, 1)[..., None] * change)

    for frame, t in zip(film, times):
        pos = state["pos"][t]
        if state["kind"] == "pendulum":
            rod = pos[0] - state["pivot"]
            dx, dy = centre - state["pivot"][0], centre[:, None] - state["pivot"][1]
            along = np.clip((dx * rod[0] + dy * rod[1]) / (rod @ rod), 0, 1)
            blend(frame, 1 - np.sqrt((dx - along * rod[0]) ** 2 + (dy - along * rod[1]) ** 2), 200 / 255)
            disc(frame, state["pivot"], 2, 100 / 255)
        if state["kind"] == "projectile":
            for age in range(min(t, 5), 0, -1):            # the trail pales with age
                disc(frame, state["pos"][t - age, 0], 1.5, 1 - (1 - age / 6) * (1 - state["colour"][0]))
        for at, radius, colour, square in zip(pos, state["radius"], state["colour"], state["square"]):
            disc(frame, at, radius, colour, square)
    return film


def generate_videos(args):
    """Writes data_dir/raw/<kind>/<kind>_000.mp4, and .npz with the exact state; each whole, or not there. A
    video is a function of (data_seed, kind, number). What a killed call left undone, the next one does."""
    root = Path(args.data_dir) / "raw"
    record = root / "generated.json"
    flags = {"num_videos": args.num_videos, "num_frames": args.num_frames, "data_seed": args.data_seed}
    if record.is_file():
        made = json.loads(record.read_text())
        for name, value in flags.items():
            if made[name] != value:
                raise UserError(f"{root} was made with --{name} {made[name]}, not {value}: choose another "
                                f"--data_dir, or remove it")
        if made["complete"]:
            return
    elif root.exists() and any(root.iterdir()):
        raise UserError(f"{root} holds other files: choose another --data_dir for simulated videos")
    common.write_json(record, {"complete": False, **flags})

    def make(job):
        kind, number = job
        stem = root / KINDS[kind] / f"{KINDS[kind]}_{number:03d}"
        if Path(f"{stem}.mp4").exists():
            return
        state = simulate(KINDS[kind], args.num_frames, [args.data_seed, kind, number])
        # Full chroma: subsampled, the colours of small things would be off by more than a prediction is.
        common.write_video(f"{stem}.tmp.mp4", torch.from_numpy(render(state)).permute(0, 3, 1, 2), FPS,
                           ("-crf", "8", "-pix_fmt", "yuv444p", "-preset", "ultrafast"))
        np.savez(f"{stem}.tmp.npz", **state)
        os.replace(f"{stem}.tmp.npz", f"{stem}.npz")
        os.replace(f"{stem}.tmp.mp4", f"{stem}.mp4")

    jobs = [(kind, number) for kind in range(len(KINDS)) for number in range(args.num_videos)]
    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(make, jobs), "simulate", len(jobs), unit="video"))
    common.write_json(record, {"complete": True, **flags})


# ---- evaluate and sample --------------------------------------------------------------------------------

def moments(amount):
    """... H W -> ... 2: the sums of amount times x and of amount times y, in pixels."""
    axis = torch.arange(SIZE) + .5
    return torch.stack([(amount.sum(-2) * axis).sum(-1), (amount.sum(-1) * axis).sum(-1)], dim=-1)


def locate(x, colours):
    """Finds objects by their colours. x T 3 H W in [0, 1] on white, colours n 3 -> centres T n 2 in pixels
    (x, y), their ink T n in pixels, and the index of each pixel's object, T H W (n: none of them).

    A pixel belongs to the colour that explains its ink best; grey, of strings and pivots, competes. A centre
    is weighted towards the strongest ink, since trails and blur are pale; ink under 15 % does not count.
    """
    ink, own = 1 - x, 1 - torch.as_tensor(colours).float()
    shades = torch.cat([own, torch.ones(1, 3)])
    projection = torch.einsum("tchw,nc->tnhw", ink, shades / shades.pow(2).sum(1, keepdim=True))
    amount = projection.clamp(0, 1)
    square = shades.pow(2).sum(1)[:, None, None]           # |ink - a c|^2 without |ink|^2, the same for all
    owner = (amount * square * (amount - 2 * projection)).argmin(1)
    mine = amount[:, :-1] * (owner[:, None] == torch.arange(len(own))[:, None, None])
    strong = (mine - mine.amax((-1, -2), keepdim=True).clamp(min=.3) / 2).clamp(min=0).square()
    centre = moments(strong) / strong.sum((-1, -2)).clamp(min=1e-6)[..., None]
    return centre, (mine - .15).clamp(min=0).sum((-1, -2)), owner


def count_blobs(x):
    """T 3 H W in [0, 1] on white -> T: connected areas of strong ink."""
    mask = ((1 - x).amax(1) > .4).float()
    place = torch.arange(1., SIZE * SIZE + 1).view(1, SIZE, SIZE)
    label = place * mask
    for _ in range(SIZE):                # the largest index of an area spreads over it
        wider = F.max_pool2d(label[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(wider, label):
            break
        label = wider
    return ((label == place) & (mask > 0)).sum((1, 2))


def physics(x, seen, state, T_in):
    """What a forecast x T 3 H W in [0, 1] does to the objects of a simulated clip, of whose true frames
    `seen` = (*locate(), count_blobs()) was read -> {metric: T}.

    position_px: distance to the exact state of the objects found. lost: share of objects with under a quarter
    of their ink. gained: blobs of ink too many. energy: kinetic and potential, of the truth; energy_error:
    the forecast's difference to it, both read from frames. overlap: 1 where two balls intersect.
    """
    scale, T = SIZE / float(state["size"]), len(x)
    centre, mass, _ = locate(x, state["colour"])
    true_centre, there, _, blobs = seen
    exact = torch.from_numpy(state["pos"][T_in:T_in + T] * scale).float()
    visible = there > 1
    found = visible & (mass > .25 * there)
    distance = torch.where(found, (centre - exact).norm(dim=-1), torch.nan)
    g, ground = float(state["g"]) * scale, torch.from_numpy(state["ground"] * scale).float()

    def energy(at):                      # per unit of mass, of the objects found; velocities by differences
        at = torch.where(found[..., None], at, torch.nan)
        v = (at[2:] - at[:-2]) / 2
        e = v.pow(2).sum(-1) / 2 + g * (ground - at[1:-1, :, 1])
        return F.pad(e.nanmean(1), (1, 1), value=torch.nan)

    radius = torch.from_numpy(state["radius"] * scale).float()
    gap = (centre[:, :, None] - centre[:, None]).norm(dim=-1) - radius[:, None] - radius
    pairs = torch.ones(len(radius), len(radius)).triu(1).bool() & found[:, :, None] & found[:, None]
    return {"position_px": distance.nanmean(1), "lost": (visible & ~found).float().sum(1) / len(radius),
            "gained": (count_blobs(x) - blobs).clamp(min=0).float(), "energy": energy(true_centre),
            "energy_error": (energy(centre) - energy(true_centre)).abs(),
            **({"overlap": ((gap < -1) & pairs).flatten(1).any(1).float()}
               if str(state["kind"]) == "bouncing" else {})}


def linear_motion(last, previous, state, T):
    """The baseline that moves each object on as it moved between two frames, 3 H W in [0, 1] -> T 3 H W."""
    pair = torch.stack([previous, last])
    colours = state["colour"] if state else (pair.amin((-1, -2)).mean(0, keepdim=True)).clamp(max=.9)
    centre, mass, owner = locate(pair, colours)
    velocity = torch.where((mass > 1).all(0)[:, None], centre[1] - centre[0], 0.)
    steps, ink = torch.arange(1, T + 1), (1 - last).expand(T, -1, -1, -1)
    out = (owner[1] == len(velocity)) * ink                # what belongs to no object stays
    for i, v in enumerate(velocity):
        move = torch.eye(2, 3).repeat(T, 1, 1)
        move[:, :, 2] = -2 * steps[:, None] * v / SIZE
        grid = F.affine_grid(move, [T, 3, SIZE, SIZE], align_corners=False)
        out = out + F.grid_sample((owner[1] == i) * ink, grid, align_corners=False)
    return 1 - out.clamp(0, 1)


def frame_scores(x, truth):
    """x, truth N T 3 H W in [0, 1] -> {metric: N T}. mse: on the scale 0 to 255, of rounded pixels. com_px:
    distance of the centres of all ink. ink and ink_true: amount of ink, pale ink left out."""
    ink = [(1 - v).clamp(min=0).sum(2).sub(.15).clamp(min=0) for v in (x, truth)]
    centres = [(moments(amount) + 1e-3 * SIZE / 2) / (amount.sum((-1, -2))[..., None] + 1e-3)
               for amount in ink]                          # where all ink is gone, the picture's centre
    return {"mse": common.mse((x * 255).round(), (truth * 255).round()), "psnr": common.psnr(x, truth),
            "ssim": common.ssim(x, truth), "com_px": (centres[0] - centres[1]).norm(dim=-1),
            "ink": ink[0].sum((-1, -2)), "ink_true": ink[1].sum((-1, -2))}


def summarise(tables, kinds):
    """A list, clip by clip, of {metric: T} -> {metric: its mean, metric_h01: at horizon 1, metric_bouncing:
    over the clips of a kind, ...} and {metric: T}, the means over clips."""
    names = dict.fromkeys(name for table in tables for name in table)
    mean, flat = {}, {}
    for name in names:
        rows = torch.stack([table[name].double() for table in tables if name in table])
        mean[name] = rows.nanmean(0)
        for kind in dict.fromkeys(kinds) if name in ("mse", "psnr", "ssim", "position_px") else ():
            own = [table[name].double() for table, k in zip(tables, kinds) if k == kind and name in table]
            flat |= {f"{name}_{kind}": torch.stack(own).nanmean().item()} if own and kind else {}
    mean["ink_ratio"] = mean.pop("ink") / mean.pop("ink_true").clamp(min=1e-6)
    if "energy" in mean:                 # of sums: at rest there is hardly energy to divide by
        mean["energy_drift"] = mean.pop("energy_error") / mean.pop("energy").clamp(min=1e-6)
    for name, values in mean.items():
        flat[name] = values.nanmean().item()
        flat |= {f"{name}_h{h:02d}": values[h - 1].item() for h in HORIZONS if h <= len(values)}
    return flat, mean


@torch.no_grad()
def evaluate(args, run, model, data):
    """Forecasts the first clip of every test video, writes eval.json and curves.png, prints the tables."""
    if run.rank > 0:
        return
    began, test, T_in, T_out = time.time(), data["test"], args.T_in, args.T_out
    clips = held_out_clips(test, args)[:args.eval_clips or None]
    states = [load_state(args, test.names[v]) for v in test.usable[:len(clips)]]
    kinds = [os.path.dirname(test.names[v]) for v in test.usable[:len(clips)]]
    mean_frame = data["train"].frames[::10].float().mean(0) / 255
    scores = {name: [] for name in ("model", "copy_last", "mean_frame", "linear_motion", "codec")}
    for first in tqdm(range(0, len(clips), 16), "evaluate", unit="x16 clips"):
        x = clips[first:first + 16].float() / 255
        with run.autocast():
            forecast = model((x[:, :T_in] * 2 - 1).to(run.device), T_out)[0]
        forecast = common.to_uint8(forecast).cpu().float() / 255
        for i, (clip, y) in enumerate(zip(x, forecast)):
            truth, state = clip[T_in:], states[first + i]
            previous = clip[max(0, T_in - 2)]
            others = {"model": y, "copy_last": clip[T_in - 1:T_in].expand_as(truth),
                      "mean_frame": mean_frame.expand_as(truth),
                      "linear_motion": linear_motion(clip[T_in - 1], previous, state, T_out)}
            if state:                    # what the video file itself has lost against the exact picture
                exact = torch.from_numpy(render(state, slice(T_in, T_in + T_out))).permute(0, 3, 1, 2)
                others["codec"] = F.adaptive_avg_pool2d(exact.float(), SIZE).round() / 255
                seen = *locate(truth, state["colour"]), count_blobs(truth)
            for name, z in others.items():
                table = {key: value[0] for key, value in frame_scores(z[None], truth[None]).items()}
                if state and name in ("model", "copy_last", "linear_motion"):
                    table |= physics(z, seen, state, T_in)
                scores[name].append(table)
    tables = {name: summarise(rows, kinds) for name, rows in scores.items() if rows}
    baselines = {name: flat for name, (flat, _) in tables.items()}
    results = baselines.pop("model")
    results["ms_per_frame"] = 1000 * rollout_seconds(model, clips[:1], args, run) / T_out
    best = min(("copy_last", "mean_frame"), key=lambda name: baselines[name]["mse"])
    report = {"script": SCRIPT, "preset": args.preset, "data": describe_data(args, states),
              "weights": args.weights, "seconds": time.time() - began,
              "headline": {"metric": "mse", "value": results["mse"], "baseline": baselines[best]["mse"],
                           "lower_is_better": True}, "results": results, "baselines": baselines}
    common.write_json(Path(args.output_dir) / "eval.json", report)
    show_report(report, {name: mean for name, (_, mean) in tables.items()}, best, args)


def rollout_seconds(model, clip, args, run):
    """Seconds to predict T_out frames of one video, encoding and decoding included; the best of five."""
    x, times = from_uint8(clip[:, :args.T_in].to(run.device)), []
    for _ in range(5):
        start = time.time()
        with run.autocast():
            model(x, args.T_out)[0].cpu()
        times.append(time.time() - start)
    return min(times)


def show_report(report, curves, best, args):
    """Prints errors per horizon and the physics, draws curves.png."""
    r, tables = report["results"], {"model": report["results"], **report["baselines"]}
    shown = [h for h in HORIZONS if h <= args.T_out]
    print(f"MSE (0 to 255) after {args.T_in} frames\n{'horizon':>15}" + "".join(f"{h:8d}" for h in shown)
          + "    mean    PSNR    SSIM")
    for name, t in tables.items():
        print(f"{name:>15}" + "".join(f"{t[f'mse_h{h:02d}']:8.1f}" for h in shown)
              + f"{t['mse']:8.1f}{t['psnr']:8.2f}{t['ssim']:8.3f}")
    print(f"{r['mse'] / max(tables[best]['mse'], 1e-9):.3f} x {best}, the better trivial baseline; by kind: "
          + ", ".join(f"{key[4:]} {value:.0f} ({tables[best][key]:.0f})" for key, value in r.items()
                      if key.startswith("mse_") and not key[-2:].isdigit()))
    for name, what in (("com_px", "centre of all ink off by, px"), ("ink_ratio", "ink, of the true amount"),
                       ("position_px", "objects off by, px"), ("lost", "objects lost, share"),
                       ("gained", "blobs gained"), ("energy_drift", "energy off by, share"),
                       ("overlap", "frames with overlapping balls")):
        if name in r:
            rows = [key + "".join(f" {tables[key][f'{name}_h{h:02d}']:.2f}" for h in shown)
                    for key in ("model", "copy_last", "linear_motion")]
            print(f"{what:>32}: " + "; ".join(rows))
    print(f"{r['ms_per_frame']:.2f} ms per predicted frame")
    panels = [common.loss_panel(Path(args.output_dir), "training loss",
                                ("loss", "recon_loss", "one_step_loss", "rollout_loss"))]
    for name, label in (("mse", "MSE (0 to 255)"), ("com_px", "centre of ink off by, px"),
                        ("ink_ratio", "ink, of the true amount")):
        lines = {key: (list(range(1, args.T_out + 1)), curve[name].tolist()) for key, curve in curves.items()
                 if key in ("model", "copy_last", "linear_motion") or name == "mse"}
        panels.append(dict(title=label, xlabel="horizon (frames)", ylabel=label, lines=lines))
    common.plot_curves(Path(args.output_dir) / "curves.png", panels)


@torch.no_grad()
def sample(args, run, model, data):
    """The rollout demo: for --video_idx, or one test video of each kind, samples/rollout_video_<i>.mp4,
    rollout_grid_<i>.png and, where the exact state is known, rollout_positions_<i>.png."""
    if run.rank > 0:
        return []
    test, written, n = data["test"], [], args.num_predict
    kinds = [os.path.dirname(test.names[v]) for v in test.usable]
    chosen = sorted({kinds.index(kind) for kind in kinds})[:4] if args.video_idx < 0 else [args.video_idx]
    for i in chosen:
        v = test.usable[i]
        film = test.frames[test.first[v]:test.first[v] + test.length[v]]
        context, truth = film[:args.T_in], film[args.T_in:args.T_in + n]
        with run.autocast():
            y = model(from_uint8(context[None].to(run.device)), n)[0][0]
        y = common.to_uint8(y).cpu()
        blank = torch.full((n - len(truth), 3, SIZE, SIZE), 200, dtype=torch.uint8)    # beyond the video
        error = 255 - (y[:len(truth)].int() - truth.int()).abs().byte()
        films = {"truth": torch.cat([truth, blank]), "prediction": y, "error": torch.cat([error, blank])}
        texts = [f"MSE {e:.0f}" for e in common.mse(y[:len(truth)].float(), truth.float())]
        texts += ["no truth"] * len(blank)
        stem = f"{args.output_dir}/samples/rollout"
        written += [demo_video(f"{stem}_video_{i}.mp4", context, films, texts),
                    demo_grid(f"{stem}_grid_{i}.png", films, texts)]
        state = load_state(args, test.names[v])
        if state:
            written.append(demo_positions(f"{stem}_positions_{i}.png", y.float() / 255, state, args))
    return written


def captioned(picture, texts, left=0):
    """A picture 3 H W uint8 with texts in a strip below it, evenly spaced from column `left` on."""
    from PIL import Image, ImageDraw, ImageFont
    image = Image.fromarray(F.pad(picture, (0, 0, 0, 22), value=220).permute(1, 2, 0).numpy())
    for i, text in enumerate(texts):
        middle = left + (i + .5) * (image.width - left) / len(texts), image.height - 11
        ImageDraw.Draw(image).text(middle, text, "black", ImageFont.load_default(size=13), anchor="mm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def demo_video(path, context, films, texts):
    """Truth, prediction and error (T 3 H W uint8) side by side, the context first; below, frame and error."""
    before = {"truth": context, "prediction": context, "error": torch.full_like(context, 255)}
    films = {name: from_uint8(torch.cat([before[name], film])) for name, film in films.items()}
    texts = ["context"] * len(context) + [f"{k} ahead, {text}" for k, text in enumerate(texts, 1)]
    pages = [captioned(page, [f"frame {t}  {text}"]) for t, (page, text) in enumerate(
        zip(common.video_grid(films, scale=4, columns=True), texts), 1)]
    return common.write_video(path, torch.stack(pages), FPS // 2)


def demo_grid(path, films, texts):
    """Ten frames of truth over ten of the prediction, and below how far ahead they are and their errors."""
    times = np.unique(np.linspace(0, len(texts) - 1, 10).round().astype(int)).tolist()
    rows = {name: from_uint8(torch.cat(list(films[name][times]), dim=-1))[None]
            for name in ("truth", "prediction")}
    grid = common.video_grid(rows)[0]
    texts = [f"+{t + 1}  {texts[t]}" for t in times]
    return common.write_video(path, captioned(grid, texts, grid.shape[-1] - 2 * SIZE * len(times))[None])


def demo_positions(path, y, state, args):
    """Positions that were read from the predicted frames (dots) on the true paths (lines)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    centre, mass, _ = locate(y, state["colour"])
    exact = state["pos"][args.T_in - 1:args.T_in + len(y)] * SIZE / float(state["size"])
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for i, colour in enumerate(state["colour"]):
        seen = (mass[:, i] > .25 * mass[0, i].clamp(min=1)).numpy()
        at, t = centre[:, i].numpy(), np.arange(1, len(y) + 1)
        axes[0].plot(exact[:, i, 0], exact[:, i, 1], color=colour)
        axes[0].plot(at[seen, 0], at[seen, 1], ".", color=colour)
        for axis, k in ((axes[1], 0), (axes[2], 1)):
            axis.plot(np.arange(len(exact)), exact[:, i, k], color=colour)
            axis.plot(t[seen], at[seen, k], ".", color=colour)
    axes[0].set(xlim=(0, SIZE), ylim=(SIZE, 0), aspect="equal", title="line: true, dots: predicted")
    axes[1].set(xlabel="frames ahead", ylabel="x, px", ylim=(0, SIZE))
    axes[2].set(xlabel="frames ahead", ylabel="y, px", ylim=(SIZE, 0))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


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

def wrap(loss, args, run):
    """FSDP2 with --fsdp (layers of a pretrained encoder are units of their own), DDP under torchrun,
    otherwise the module itself."""
    if args.compile:                     # the parts: a rollout's loop around them changes its length
        for part in (loss.model.encoder, loss.model.dynamics, loss.model.decoder):
            part.compile()
    if args.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh(run.device.type, (run.world,))
        for layer in [m for m in loss.modules() if type(m).__name__ in ("Dinov2Layer", "ResNetStage")]:
            fully_shard(layer, mesh=mesh)
        # else the root stays gathered until a backward, and a step after validation has the averages
        return fully_shard(loss, mesh=mesh, reshard_after_forward=True)
    if run.world > 1:
        ids = [run.device] if run.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(loss, device_ids=ids, forward_sync_buffers=False)
    return loss


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

def strip(weights):
    """The loss module's weights as the model names them."""
    return {name.removeprefix("model."): value for name, value in weights.items()}


def prepare(args, run):
    """Videos (simulated for the tiny preset's own folder), split and cache -> {part: load_split}."""
    if run.rank == 0:
        if "data_dir" not in args.given and args.data_dir == PRESETS["tiny"]["data_dir"]:
            generate_videos(args)
        build_cache(args)
    run.barrier()
    data = {part: load_split(args, part) for part in PARTS}
    for part, clips in data.items() if run.rank == 0 else ():
        print(f"{part}: {len(clips.usable)} videos, {len(clips.starts)} clips" + (
            f"; skipped {len(clips.skipped)} videos: {'; '.join(clips.skipped)}" if clips.skipped else ""))
    count = len(data["test"].usable)
    if args.video_idx >= count:
        raise UserError(f"--video_idx {args.video_idx}: the test split has the videos 0 to {count - 1}")
    return data


def train(args, run, found, data, vgg):
    """-> the averaged model, trained as far as --max_steps says."""
    folder = Path(args.output_dir)
    if run.rank == 0:
        common.write_json(folder / "args.json", {**public_flags(args), **common.provenance()})
    data, held = data["train"], held_out_clips(data["val"], args)[:64]
    torch.manual_seed(args.seed)                 # equal initial weights on all ranks and after any restart
    model = VideoWorldModel(args, load=not found and not args.random_init).to(run.device)
    some = data.frames[torch.linspace(0, len(data.frames) - 1, min(999, len(data.frames))).long()]
    model.background.copy_(from_uint8(some.median(dim=0).values))
    background = model.background.clone()
    frames = data.frames.to(run.device)
    kinds = {"clip": ("randint", len(data.starts)), "shift": ("rand",), "flip": ("randint", 2),
             "contrast": ("rand",), "order": ("randint", 6)}

    def losses(model, step, micro):
        seed = common.seed_all(args.seed, 1, step)
        plan = curriculum(args, step)
        numbers = common.draw(kinds, seed, args.batch_size, run.rank, run.world, micro, args.grad_accum)
        length = (plan[0] + plan[1]) * args.tau  # a part of a clip, anywhere in it
        shift = (numbers["shift"] * (args.T_in + args.T_out - length + 1)).long()
        rows = (data.starts[numbers["clip"]] + shift)[:, None] + torch.arange(length)
        x = from_uint8(frames[rows.to(frames.device)])
        numbers = {name: value.to(run.device) for name, value in numbers.items()}
        with run.autocast():
            return model(augment(x, numbers, background, args), plan, vgg)

    def validate(model):
        """Free rollouts; the weights with the least error so far go to best/."""
        nonlocal best
        errors = []
        for part in held.split(16):
            x = part.to(run.device)
            with run.autocast():
                y = common.to_uint8(model(from_uint8(x[:, :args.T_in])))
            errors.append(common.mse(y, x[:, args.T_in:]))
        mean = torch.cat(errors).mean(0)
        value = float(mean.mean())
        if value < best:                         # on all processes alike: each has seen all of `held`
            best, averaged = value, strip(common.gather_state(model)[0])
            if run.rank == 0:
                (folder / "best").mkdir(exist_ok=True)
                common.save_weights(folder / "best/world_model.safetensors", averaged)
        return {"val_loss": value,
                **{f"val_mse_h{h:02d}": float(mean[h - 1]) for h in HORIZONS if h <= args.T_out}}

    own = folder / "metrics.jsonl"               # none where the run goes on in another folder
    rows = own.read_text().splitlines() if found and own.is_file() else []
    rows = [row for row in map(json.loads, rows) if row["step"] <= found[2]["step"]]
    best = min((row["val_loss"] for row in rows if row.get("val_loss") is not None), default=math.inf)
    loss = WorldModelLoss(model, args)
    fit(args, run, folder, loss, losses, validate, found, args.max_steps, args.lr, trained_only=False)
    averaged = strip(common.gather_state(loss, everywhere=True)[0])
    if run.rank == 0:
        common.save_weights(folder / "world_model.safetensors", averaged)
    return frozen(args, averaged, run, "this run")


def frozen(args, weights, run, source):
    """A model with these weights on the run's device, for inference; `source` is named where they differ."""
    model = VideoWorldModel(args).to(run.device).eval().requires_grad_(False)
    common.restore_state(model, weights, source=str(source))
    return model


def load_model(folder, device="cpu"):
    """A trained run's model: load_model("runs/cosmos_lite")(context_frames, num_predictions=30)."""
    args = argparse.Namespace(**json.loads((Path(folder) / "args.json").read_text()))
    run = argparse.Namespace(device=torch.device(device))
    path = Path(folder) / "world_model.safetensors"
    return frozen(args, common.load_weights(path), run, path)


def dry_run(args):
    """Prints what the model costs, from the meta device: nothing is allocated, nothing is read."""
    world, B = int(os.environ.get("WORLD_SIZE", 1)), args.batch_size * args.grad_accum
    c = max(1, min(args.context, args.T_in) // args.tau)   # the longest
    _, k, last, shown, foreground = curriculum(args, args.max_steps)
    with torch.device("meta"):
        model = WorldModelLoss(VideoWorldModel(args), args)
        x = torch.randn(B, (c + k) * args.tau, 3, SIZE, SIZE)
        cells = model.model.encode(x[:1, :args.tau]).shape[-2:].numel()
        print(common.dry_run_report("world model, at the longest rollout", model,
                                    lambda: model(x, (c, k, max(c, last), shown, foreground))[0], B,
                                    (c + k) * cells, world, args.fsdp))
    print("  " + ", ".join(f"{name} {common.count_params(getattr(model.model, name)):,}"
                           for name in ("encoder", "dynamics", "decoder")))


# ---- main -----------------------------------------------------------------------------------------------

def describe_data(args, states):
    simulated = sum(state is not None for state in states)
    return f"{args.data_dir} ({simulated} of {len(states)} test videos are SIMULATED by {SCRIPT}.py)"


def work(args):
    folder = Path(args.output_dir)
    if args.generate:
        check_args(args)
        generate_videos(args)
        build_cache(args)
        split = json.loads((Path(args.data_dir) / "split.json").read_text())
        counts = {part: len(split[part]) for part in PARTS}
        return print(f"{args.data_dir}: {counts}; now python {SCRIPT}.py --data_dir {args.data_dir}")
    only = args.sample or args.eval
    found = None if args.dry_run else common.find_checkpoint(
        folder / "ckpt", SCRIPT, args.resume, train=not only)
    if found:
        adopt(args, found[2]["args"], ("preset", *MODEL_FLAGS), str(found[0]))
    check_args(args)
    args.no_perceptual &= "vgg_weights" not in args.given              # who names them wants the loss
    if args.dry_run:
        return dry_run(args)
    run = Run(args)
    args.weights = "trained from scratch" if args.encoder == "cnn" else (
        f"{args.encoder} with " + ("RANDOM weights" if args.random_init else "pretrained weights"))
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
                  + (", about 10 minutes on 2 cores" if args.preset == "tiny" else ""))
    if only and found:
        data = prepare(args, run)
        model = frozen(args, strip(found[1]["ema"]), run, found[0])
    else:
        vgg, why = load_vgg(args, run.device)    # a file that cannot be read is noticed before the videos
        if run.rank == 0:
            print(f"perceptual loss {why}")
        data = prepare(args, run)
        model = train(args, run, found, data, vgg)
    if args.best:
        path = folder / "best/world_model.safetensors"
        model = frozen(args, common.load_weights(path), run, path)
    written = []
    if args.eval or not only:
        evaluate(args, run, model, data)
        written = [f"{folder}/eval.json", f"{folder}/curves.png"]
    if args.sample or not only:
        written += sample(args, run, model, data)
    if run.rank == 0:
        common.show_results(folder, written, args.tensorboard, args.wandb)
        print("wrote " + ", ".join(written))
    run.barrier()
    run.close()


def main(argv=None):
    return common.one_line_errors(f"{SCRIPT}.py", lambda: work(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
