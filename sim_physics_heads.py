"""sim_physics_heads.py: a video model is taught to say where things move and how far away they are.

Idea        Heads read per-pixel motion and depth off the tokens of Wan2.2-TI2V-5B (arXiv:2503.20314), first
            with the backbone frozen, then with LoRA adapters that let what the heads know shape the model.
Equations   x_s = (1 - s) z + s eps, frame 0 clean; v = eps - z     -> add_noise, PhysicsModel
            s = shift u / (1 + (shift - 1) u)                       -> shift_sigma; heads: density 3 (1 - s)^2
            v = Wan(x_s, 1000 s, text), opened between its blocks   -> run_backbone
            dx/ds = v from s = 1 to 0, by Euler                     -> generate
            motion, standardised log depth, sky, all masked         -> PerFrameHeads, physics_loss
            p_{t-k} = p_t + mv_t(p_t) + mv_{t-1}(...) + ...         -> compose
Differs     from the document's code, Windsao/Sim4VideoGen, and why:
            - files are paired by step number; motion over a stride is composed, not taken from its last step
            - a frame's own targets train its own cells, from several blocks; the original's one layer (--head
              linear) reads the last block, and 49 frames of targets are shrunk to its 13 x 30 x 30
            - sky, first frames and occlusions are masked; the original teaches zeros or a million metres
            - scenes are held out, and the trivial answers and a random backbone stand beside every result
            - heads read a clean pass with the positive prompt, not the last pass of the guidance
            - latents and texts are cached, which saves an epoch's 2,100 passes of VAE and text encoder; what
              is trained is fp32, since bf16 rounds small steps away; metadata.csv lies beside the scenes
Run         python sim_physics_heads.py                       # scenes to evaluation: 5 to 9 min, 1.2 GB
            python sim_physics_heads.py --sample --num_samples 3                  # 11 s
            python sim_physics_heads.py --eval                # 22 s to 1 min
            python sim_physics_heads.py --check --data_dir data/sim_physics_heads
            torchrun --nproc_per_node=8 sim_physics_heads.py --preset ti2v_5b --data_dir data/Sim_Physics
            torchrun --nproc_per_node=8 sim_physics_heads.py --preset ti2v_5b_lora --output_dir runs/lora
            python sim_physics_heads.py --preset ti2v_5b_lora --dry_run
Shapes      B batch  T frames  F = (T - 1) / 4 + 1 latent frames  C latent channels  H W pixels  h w latent
            grid  N = F h/2 w/2 tokens  D width  L text tokens. Videos are B T 3 H W in [-1, 1]; motion is in
            pixels, x to the right, y down, from a pixel to where it was (Replicator's sign); depth in metres
            along the ray.
"""
import argparse
import colorsys
import contextlib
import copy
import csv
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common
from common import UserError, expand_to, from_uint8

SCRIPT = "sim_physics_heads"
OUTPUTS = 4                              # of heads per pixel: dx, dy, log depth, sky
MOTION_ROWS = 96                         # heads say motion in units of the picture's height / 96
FAR = 100.0                              # metres; from here on a pixel is sky
MOVING = 0.5                             # px per frame of the clip, from which on a pixel counts as moving
PROBE, SIGMAS = 0.05, (0.05, 0.3, 0.7)   # noise at which heads are read; at which they are measured
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
NEGATIVE = ("vivid tones, overexposed, static, blurred details, subtitles, style, artwork, painting, still "
            "picture, grey overall, worst quality, low quality, JPEG artifacts, ugly, incomplete, deformed, "
            "messy background, walking backwards")

# ---- args -----------------------------------------------------------------------------------------------

PRESETS = {
    "tiny": dict(
        model="tiny", stage="all", data_dir="data/sim_physics_heads", height=64, width=64, frames=17,
        strides="1,2", zoom=2.0, permute_colours=True, clips=32, target_height=32, text_length=64, cells=8,
        taps="0,2", head_width=64, head_blocks=2, batch_size=8, max_steps=1100, lora_steps=150,
        backbone_steps=500, lr=6e-3, lora_lr=5e-4, backbone_lr=3e-3, warmup_steps=50, lora_rank=8,
        ema_decay=0.99, beta2=.98, steps=20, cfg=1.0, controls=True, eval_every=200, save_every=200),
    # The document's stage 1: 10 epochs of 2,100 clips, accumulated over 8.
    "ti2v_5b": dict(stage="heads", data_dir="data/Sim_Physics", lr=1e-4, grad_accum=8, batch_size=1,
                    max_steps=2625, save_every=500, eval_every=500),
    # Its stage 2: LoRA of rank 32, from stage 1's heads.
    "ti2v_5b_lora": dict(stage="lora", data_dir="data/Sim_Physics",
                         heads=f"runs/{SCRIPT}/final/heads.safetensors", lr=1e-4, grad_accum=8, batch_size=1,
                         max_steps=1312, save_every=500, eval_every=500, grad_checkpoint=True),
}
TINY = {
    "transformer": {"num_attention_heads": 6, "attention_head_dim": 32, "in_channels": 48, "out_channels": 48,
                    "text_dim": 32, "freq_dim": 64, "ffn_dim": 384, "num_layers": 4},
    "text_encoder": {"vocab_size": 259, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2,
                     "num_heads": 2},
}
# What the weights mean: a checkpoint's own values hold. What the cache is made of: other values make it anew.
MODEL_FLAGS = ("model", "stage", "head", "head_width", "head_blocks", "cells", "taps", "lora_rank", "last_k",
               "text_length")
CACHE_FLAGS = ("model", "weights_from", "random_init", "height", "width", "frames", "strides", "clips",
               "eval_clips", "zoom", "permute_colours", "target_height", "text_length")
# What --preset auto looks for before it takes the second preset.
PAPER_NEEDS = dict(get_data="scenes of Isaac Sim's Replicator, or --data_dir FOLDER")


def build_parser():
    parser = Parser(prog=f"{SCRIPT}.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_shared_flags(parser, PRESETS)
    add = parser.add_argument_group("data").add_argument
    add("--check", action="store_true", help="look for faults in the data, print what is there, then exit")
    add("--height", type=int, default=480, help="pixels, a multiple of 32")
    add("--width", type=int, default=480, help="pixels, a multiple of 32")
    add("--frames", type=int, default=49, help="of a clip, 4k + 1")
    add("--strides", default="1,2", help="steps of the simulation from frame to frame; one is drawn per clip")
    add("--clips", type=int, default=16, help="cached clips of a training scene; their start and stride vary")
    add("--eval_clips", type=int, default=4, help="cached clips of a held-out scene")
    add("--zoom", type=float, default=1.5,
        help="two in three training clips show a part, enlarged up to so many times (1: none)")
    add("--permute_colours", action=argparse.BooleanOptionalAction, default=False,
        help="swap colour channels at random, clip by clip")
    add("--target_height", type=int, default=120, help="rows of the training targets")
    add("--fps", type=int, default=15, help="of the videos that are written")
    add("--sim_frames", type=int, default=0, help="frames of a simulated scene (0: 60 to 131, by scene)")
    add("--sim_recordings", type=int, default=3, help="of each simulated scene that moves")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=["ti2v_5b", "tiny"], default="ti2v_5b", help="tiny: the same classes, small")
    add("--weights_from", default="Wan-AI/Wan2.2-TI2V-5B-Diffusers", metavar="FOLDER|HUB_ID",
        help="diffusers folder, hub id, or folder with the official files")
    add("--random_init", action="store_true", help="Wan's shape with random weights, to measure speed")
    add("--head", choices=list(HEADS), default="frames", help="linear: the document's, from the last block")
    add("--head_width", type=int, default=256, help="channels of the head")
    add("--head_blocks", type=int, default=3, help="its residual blocks of 3x3x3 convolutions")
    add("--cells", type=int, default=8, help="rows and columns that a token predicts, even")
    add("--taps", default="", help="blocks after which heads read, as 0,8,15,23 (default: those quarters)")
    add("--text_length", type=int, default=512, help="tokens of a prompt, zeros included")
    add = parser.add_argument_group("stages").add_argument
    add("--stage", choices=["heads", "lora", "last_k", "full", "all"], default="heads",
        help="what is trained; all: backbone (tiny only), heads, then lora")
    add("--heads", metavar="FILE", help="heads.safetensors of stage 1, where later stages start")
    add("--lora_rank", type=int, default=32, help="rank and alpha, on attention and feed-forward")
    add("--last_k", type=int, default=1, help="blocks that --stage last_k trains")
    add("--lora_steps", type=int, default=0, help="of stage lora within --stage all (0: --max_steps)")
    add("--lora_lr", type=float, default=0.0, help="likewise (0: --lr)")
    add("--backbone_steps", type=int, default=0, help="of the tiny backbone's own training")
    add("--backbone_lr", type=float, default=1e-3, help="likewise")
    add("--controls", action=argparse.BooleanOptionalAction, default=False,
        help="within --stage all: also train heads on a random backbone")
    add = parser.add_argument_group("loss").add_argument
    add("--motion_weight", type=float, default=1.0, help="of the motion loss")
    add("--depth_weight", type=float, default=1.0, help="of the depth loss")
    add("--sky_weight", type=float, default=.1, help="of telling sky from what has a depth")
    add("--shift", type=float, default=5.0, help="of Wan's noise schedule")
    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=int, default=50, help="network calls of a sampled video, guidance not counted")
    add("--cfg", type=float, default=5.0, help="guidance (1: none)")
    add("--num_samples", type=int, default=3, help="held-out scenes to sample")
    return parser


def check_args(args):
    """One clear line for values that no run can mean."""
    check_numbers(args, least_1=("height", "width", "clips", "eval_clips", "target_height", "sim_recordings",
                                 "steps", "num_samples", "lora_rank", "last_k", "cells", "head_width",
                                 "text_length", "fps", "zoom"),
                  least_0=("lora_lr", "backbone_lr", "head_blocks", "lora_steps", "backbone_steps",
                           "sim_frames", "motion_weight", "depth_weight", "sky_weight"))
    if not args.shift > 0:
        raise UserError(f"--shift must be above 0, not {args.shift}")
    for name in ("height", "width"):
        if getattr(args, name) % 32:
            raise UserError(f"--{name} must be a multiple of 32, not {getattr(args, name)}")
    if args.frames < 5 or args.frames % 4 != 1:
        raise UserError(f"--frames must be 4k + 1, not {args.frames}: Wan's VAE packs fours after the first")
    if args.cells % 2:
        raise UserError(f"--cells must be even, not {args.cells}: a token is 2 x 2 latents")
    if args.height % args.target_height:
        raise UserError(f"--target_height {args.target_height} does not divide --height {args.height}")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", args.strides):
        raise UserError(f"--strides takes numbers such as 1,2,4, not {args.strides}")
    if not re.fullmatch(r"(\d+(,\d+)*)?", args.taps):
        raise UserError(f"--taps takes numbers of blocks such as 0,8,15,23, not {args.taps}")
    if args.fsdp and args.stage != "full":
        raise UserError(f"--fsdp is for --stage full: stage {args.stage} fits one GPU, and "
                        f"torchrun alone shares out its batch")
    if args.stage in ("lora", "last_k", "full") and not (args.heads or args.dry_run):
        raise UserError(f"--stage {args.stage} starts from stage 1's heads: first python {SCRIPT}.py --stage "
                        f"heads, then --heads FILE")


# ---- model: the backbone's own loop ---------------------------------------------------------------------

def run_backbone(dit, x, t, text, taps, velocity=True, checkpointing=False):
    """WanTransformer3DModel.forward, opened: equal to it to the last bit, and it shows what lies between.

    x B C F h w latents, t B N a timestep per token (0 to 1000), text B L D. taps: numbers of blocks passed,
    0 is the patch embedding. Without `velocity` it ends at the last tap.
    -> velocity B C F h w or None, [B N D for each tap], time embedding B N D.
    """
    B, C, F_, h, w = x.shape
    pt, ph, pw = dit.config.patch_size
    dtype = dit.patch_embedding.weight.dtype
    x, text = x.to(dtype), text.to(dtype)
    rope = dit.rope(x)
    hidden = dit.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
    temb, modulation, text, _ = dit.condition_embedder(t.flatten(), text, None, timestep_seq_len=t.shape[1])
    modulation = modulation.unflatten(2, (6, -1))
    tapped = {0: hidden}
    for number, block in enumerate(dit.blocks if velocity else dit.blocks[:max(taps)], 1):
        if checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(block, hidden, text, modulation, rope, use_reentrant=False)
        else:
            hidden = block(hidden, text, modulation, rope)
        tapped[number] = hidden
    tapped = [tapped[number] for number in taps]
    if not velocity:
        return None, tapped, temb
    shift, scale = (dit.scale_shift_table.unsqueeze(0) + temb.unsqueeze(2)).chunk(2, dim=2)
    hidden = (dit.norm_out(hidden.float()) * (1 + scale.squeeze(2)) + shift.squeeze(2)).type_as(hidden)
    y = dit.proj_out(hidden).reshape(B, F_ // pt, h // ph, w // pw, pt, ph, pw, -1)
    y = y.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return y, tapped, temb


def add_noise(z, noise, sigma):
    """x_sigma = (1 - sigma) z + sigma eps, with latent frame 0, the image that is given, left clean.
    z, noise B C F h w, sigma B -> x, and sigma B F h/2 w/2 of every token."""
    s = expand_to(sigma, z).expand(-1, 1, z.shape[2], z.shape[3] // 2, z.shape[4] // 2).clone()
    s[:, :, 0] = 0
    x = (1 - expand_to(sigma, z)) * z + expand_to(sigma, z) * noise
    return torch.cat([z[:, :, :1], x[:, :, 1:]], dim=2), s[:, 0]


# ---- model: heads ---------------------------------------------------------------------------------------
# What a head says of each pixel: motion dx and dy in units of 1/96 of the picture's height, the standardised
# logarithm of depth, and the logit of there being a depth at all.

class LinearHead(nn.Module):
    """The document's head: LayerNorm, modulation by time, one Linear from the last block. 55,312 parameters
    for motion (4 channels, of which the annotator's two last mean nothing), 18,436 for depth, at D 3072."""
    def __init__(self, D, channels):
        super().__init__()
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Parameter(torch.zeros(1, 2, D))
        self.out = nn.Linear(D, channels * 4)
        nn.init.xavier_uniform_(self.out.weight, gain=.01)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden, temb):
        """B F h w D twice -> B channels F 2h 2w."""
        scale, shift = self.modulation[:, 0] + temb, self.modulation[:, 1] + temb
        y = self.out(self.norm(hidden) * (1 + scale) + shift)
        y = y.unflatten(-1, (2, 2, -1)).permute(0, 6, 1, 2, 4, 3, 5)           # B c F h 2 w 2
        return y.flatten(5, 6).flatten(3, 4)


class LinearHeads(nn.Module):
    """Both of the document's heads, spread over all frames and pixels as the causal VAE lays them out."""
    def __init__(self, D, taps, args):
        super().__init__()
        self.motion, self.depth = LinearHead(D, 4), LinearHead(D, 1)
        self.register_buffer("depth_scale", torch.tensor([0., 1.]))

    def forward(self, tapped, temb):
        motion, depth = self.motion(tapped[-1], temb), self.depth(tapped[-1], temb)
        y = torch.cat([motion[:, :2], depth, torch.full_like(depth, 9.)], dim=1)       # it knows no sky
        return torch.cat([y[:, :, :1], y[:, :, 1:].repeat_interleave(4, dim=2)], dim=2)


class PerFrameHeads(nn.Module):
    """Motion and depth of every frame, from several depths of the backbone.

    A token covers 4 frames (the first one 1) of 2 x 2 latents. Taps are normed, projected, summed, modulated
    by time, laid out as latents, mixed by 3x3x3 convolutions, then laid out as 4 frames x cells x cells.
    """
    def __init__(self, D, taps, args):
        super().__init__()
        width, self.cells = args.head_width, args.cells // 2
        self.register_buffer("depth_scale", torch.tensor([0., 1.]))            # mean and std of log depth
        self.norms = nn.ModuleList(nn.LayerNorm(D, eps=1e-6) for _ in taps)
        self.read = nn.ModuleList(nn.Linear(D, 4 * width) for _ in taps)
        self.time = nn.Linear(D, 8 * width)
        self.blocks = nn.ModuleList(ResBlock(width) for _ in range(args.head_blocks))
        self.norm = nn.GroupNorm(1, width)
        self.out = nn.Linear(width, 4 * (OUTPUTS + 1) * self.cells ** 2)
        for layer in (self.time, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tapped, temb):
        """[B F h w D], B F h w D -> B OUTPUTS T h*cells w*cells, T = 4 (F - 1) + 1 frames."""
        x = sum(read(norm(hidden)) for read, norm, hidden in zip(self.read, self.norms, tapped))
        scale, shift = self.time(F.silu(temb)).chunk(2, dim=-1)
        x = (x * (1 + scale) + shift).unflatten(-1, (2, 2, -1))                # B F h w 2 2 width
        x = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        for block in self.blocks:
            x = block(x)
        y = self.out(F.silu(self.norm(x)).movedim(1, -1))
        r = self.cells
        y = y.unflatten(-1, (4, OUTPUTS + 1, r, r)).permute(0, 5, 1, 4, 2, 6, 3, 7)    # B c F 4 2h r 2w r
        y = y.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, 3:]
        return torch.cat([y[:, :2] * y[:, 4:].sigmoid(), y[:, 2:4]], dim=1)    # shut where nothing moves


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), 3x3x3 over tokens; the second convolution zero at first."""
    def __init__(self, c):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, c) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv3d(c, c, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.convs[1].weight)

    def forward(self, x):
        y = x
        for norm, conv in zip(self.norms, self.convs):
            y = conv(F.silu(norm(y)))
        return x + y


HEADS = {"frames": PerFrameHeads, "linear": LinearHeads}


class PhysicsModel(nn.Module):
    """Backbone and heads in one module, so that DDP and FSDP see one forward."""
    def __init__(self, dit, heads, args, taps):
        super().__init__()
        self.dit, self.heads, self.args, self.taps = dit, heads, args, taps

    def forward(self, z, noise, sigma, text, target=None, velocity=True):
        """z, noise B C F h w, sigma B, text B L D. -> velocity or None, and what the heads say or None; with
        `target` (see physics_loss) -> loss, its parts. A backbone that is not trained sees no gradient."""
        x, token_sigma = add_noise(z, noise, sigma)
        trained = any(p.requires_grad for p in self.dit.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            v, tapped, temb = run_backbone(self.dit, x, 1000 * token_sigma.flatten(1), text, self.taps,
                                           velocity, self.args.grad_checkpoint)
        y = None
        if self.heads is not None:
            with torch.autocast("cpu" if z.is_meta else z.device.type, enabled=False):     # heads are fp32
                *tapped, temb = (t.float().unflatten(1, token_sigma.shape[1:]) for t in (*tapped, temb))
                y = self.heads(tapped, temb)
        if target is None:
            return v, y
        args, parts = self.args, {}
        if y is not None:
            parts |= physics_loss(y, target, self.heads.depth_scale, args.height / MOTION_ROWS)
        if v is not None:                        # frame 0 is given: it has no loss
            parts["flow_loss"] = F.mse_loss(v[:, :, 1:].float(), (noise - z)[:, :, 1:])
        weights = {"motion_loss": args.motion_weight, "depth_loss": args.depth_weight,
                   "sky_loss": args.sky_weight}
        loss = sum(weights.get(name, 1.) * value for name, value in parts.items())
        return loss, {name: value.detach() for name, value in parts.items()}


# ---- model: loading -------------------------------------------------------------------------------------

def wan_part(args, run, part, dtype=torch.float32):
    """A part of Wan: its pretrained weights, or random ones in its shape or in the tiny shape."""
    tiny, random = args.model == "tiny", args.random_init or args.model == "tiny"
    torch.manual_seed(0)         # whatever --seed is: no checkpoint holds what is random and frozen
    return common.load_wan(args.weights_from, part=part, config=TINY if tiny else args.model, dtype=dtype,
                           device=run.device, random_init=random)


def load_codec(args, run):
    if args.model == "tiny":
        tensors = common.load_weights(Path(args.data_dir) / "cache/codec.safetensors")
        return common.LinearCodec(tensors, run.device)
    vae = wan_part(args, run, "vae", torch.bfloat16).requires_grad_(False)
    vae.enable_tiling()                  # 49 frames of 480x480 at once would take 20 GB
    return vae


def text_encoder(args, run):
    """-> prompt -> L D, the same for the same prompt."""
    tokenizer = wan_part(args, run, "tokenizer")
    encoder = wan_part(args, run, "text_encoder", torch.float32 if args.model == "tiny" else torch.bfloat16)
    return lambda prompt: common.encode_text(tokenizer, encoder, [prompt], args.text_length)[0].cpu()


def trunk_dtype(args):
    """bf16 where the backbone is frozen; fp32 where most of it is trained, or where it is tiny."""
    return torch.float32 if args.model == "tiny" or args.stage == "full" else torch.bfloat16


def has_adapter(dit):
    return bool(getattr(dit, "peft_config", None))


def make_model(args, dit, stage):
    """PhysicsModel with what `stage` trains requiring grad, in fp32: at a learning rate of 1e-5 most steps of
    a bf16 weight round to none."""
    depth, D = len(dit.blocks), dit.config.num_attention_heads * dit.config.attention_head_dim
    taps = [int(n) for n in args.taps.split(",") if n] or sorted({depth * i // 4 for i in range(4)})
    taps = [depth] if args.head == "linear" else taps
    if max(taps) > depth:
        raise UserError(f"--taps {args.taps}: the backbone has {depth} blocks")
    heads = None if stage == "backbone" else HEADS[args.head](D, taps, args).to(dit.device)
    dit.requires_grad_(stage in ("backbone", "full"))
    if stage == "lora":
        from peft import LoraConfig
        if has_adapter(dit):
            dit.delete_adapters("default")
        dit.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=LORA_TARGETS))
    elif stage == "last_k":
        for block in dit.blocks[-args.last_k:]:
            block.requires_grad_(True)
    for p in dit.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return PhysicsModel(dit, heads, args, taps)


def export(args, run, model, stage, folder):
    """final/: heads.safetensors with heads.json, and what else the stage trained: the LoRA file that
    WanImageToVideoPipeline.load_lora_weights takes, or the trained backbone weights. Rank 0 writes."""
    weights, _ = common.gather_state(model, trained_only=True)
    if run.rank:
        return
    final = folder / "final"
    final.mkdir(exist_ok=True)
    own = lambda part: {name.removeprefix(part): v for name, v in weights.items() if name.startswith(part)}
    if heads := own("heads."):
        common.save_weights(final / "heads.safetensors", heads)
        common.write_json(final / "heads.json", {name: getattr(args, name) for name in (
            "head", "head_width", "head_blocks", "cells", "taps", "model")})
    if stage == "lora":
        common.save_lora(final, model.dit, own("dit."))
    elif backbone := own("dit."):
        common.save_weights(final / "backbone.safetensors", backbone)


# ---- objective and sampler ------------------------------------------------------------------------------

def speed(motion):
    """... 2 H W -> ... H W, the length. Tensor.norm over a dimension of 2 takes 20 times as long."""
    return torch.hypot(*motion.unbind(-3))


def masked_mean(x, mask):
    """Mean of x over what the mask shows, clip by clip, then over clips: two processes of 8 clips agree with
    one of 16. Where under half a per cent shows, a clip counts for less: its few pixels would weigh much."""
    count = mask.flatten(1).sum(1).clamp(min=mask[0].numel() / 200)
    return ((x * mask).flatten(1).sum(1) / count).mean()


def physics_loss(y, target, depth_scale, motion_unit):
    """y B OUTPUTS T h' w' against {"motion" B T 2 h w in px, "depth" B T h w in metres, masks B T h w of what
    is known, "motion_valid" and "depth_valid", and "moving", and "asked" B, whether sky is asked for}
    -> {"motion_loss", "depth_loss", "sky_loss"}, fp32.

    Half of the depth loss and most of the motion loss are on moving pixels: they are a few per cent, and a
    mean over the whole frame is won by a map of the background. What is not valid (sky, first frames,
    occlusions) teaches nothing.
    """
    y = to_size(y, target["depth"].shape[-2:])
    moving = target["moving"]
    error = y[:, :2] - target["motion"].movedim(1, 2) / motion_unit
    error = (error.square().sum(1) + .02 ** 2).sqrt() - .02                    # end-point error, smooth at 0
    valid = target["motion_valid"]
    motion = .75 * masked_mean(error, valid & moving) + .25 * masked_mean(error, valid & ~moving)
    valid, (mean, std) = target["depth_valid"], depth_scale
    off = torch.where(valid, y[:, 2] - (target["depth"].clamp(min=1e-3).log() - mean) / std, 0.)
    depth = (masked_mean(off.abs(), valid & moving) + masked_mean(off.abs(), valid)) / 2
    for step in (1, 2):                                                        # edges, at two scales
        for axis in (-1, -2):
            n = off.shape[axis] - step
            both = valid.narrow(axis, 0, n) & valid.narrow(axis, step, n)
            slope = off.narrow(axis, step, n) - off.narrow(axis, 0, n)
            depth = depth + masked_mean(slope.abs(), both) / 8
    sky = F.binary_cross_entropy_with_logits(y[:, 3], valid.float(), reduction="none")
    sky = masked_mean(sky, expand_to(target["asked"], sky).expand_as(sky))
    return {"motion_loss": motion, "depth_loss": depth, "sky_loss": sky}


def to_size(y, size):
    """Heads' output B c T h w at another size of picture."""
    if y.shape[-2:] == tuple(size):
        return y
    return F.interpolate(y, (y.shape[2], *size), mode="trilinear", align_corners=False)


def read_out(y, size, depth_scale):
    """Heads' output B OUTPUTS T h w -> motion B T 2 H W in px, depth B T H W in metres, sky B T H W bool."""
    y = to_size(y, size)
    depth = (y[:, 2].clamp(-8, 8) * depth_scale[1] + depth_scale[0]).exp()
    return y[:, :2].movedim(1, 2) * (size[0] / MOTION_ROWS), depth, y[:, 3] < 0


def shift_sigma(u, shift):
    """Wan's schedule: u in [0, 1] -> sigma = s u / (1 + (s - 1) u), more of it where there is much noise."""
    return shift * u / (1 + (shift - 1) * u)


def fixed_noise(z, seed):
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z.device)


@torch.no_grad()
def generate(dit, z0, text, negative, args, seed):
    """Euler's method from noise to the flow's end, frame 0 given. z0 B C 1 h w, text B L D -> B C F h w.
    Guidance compares with the negative prompt; --cfg 1 leaves it out."""
    F_ = (args.frames - 1) // 4 + 1
    noise = fixed_noise(z0.expand(-1, -1, F_, -1, -1), seed)
    x, levels = noise, shift_sigma(torch.linspace(1, 0, args.steps + 1), args.shift).tolist()
    for sigma, following in zip(levels, levels[1:]):
        x = torch.cat([z0, x[:, :, 1:]], dim=2)
        tokens = torch.full((len(x), F_, x.shape[3] // 2, x.shape[4] // 2), 1000 * sigma, device=x.device)
        tokens[:, 0] = 0
        velocity = lambda prompt: run_backbone(dit, x, tokens.flatten(1), prompt, ())[0].float()
        v = velocity(text)
        if args.cfg != 1:
            v = (away := velocity(negative)) + args.cfg * (v - away)
        x = x + (following - sigma) * v
    return torch.cat([z0, x[:, :, 1:]], dim=2)


# ---- data: files ----------------------------------------------------------------------------------------

FOLDERS = {"rgb": ("rgb", "rgb_capture"), "motion": ("motion_vectors",), "depth": ("distance_to_camera",)}
ENDINGS = {"rgb": (".png", ".jpg", ".jpeg"), "motion": (".npy",), "depth": (".npy",)}
DEPTH_SHARE, DEPTH_METRES = .05, .02       # how much a tracked point's distance may change in one step
UNITS = {"px": lambda W, H: (1, 1), "NDC": lambda W, H: (W / 2, H / 2), "UV": lambda W, H: (W, H)}
OFFSETS = (-2, -1, 0, 1, 2)
LEAST_MOVING = 200                         # pixels that the convention test needs


@dataclass
class Scene:
    """name: the scene folder's, shared by its recordings; steps: step numbers that all three folders have;
    spacing: the usual distance between steps; paths: {modality: {step: Path}}, unpaired files too; dropped:
    {modality: files without partners}."""
    name: str
    folder: Path
    prompt: str
    steps: list
    spacing: int
    paths: dict
    dropped: dict
    memo: dict = field(default_factory=dict)               # what was read: a scene's clips share its frames

    def once(self, key, work):
        if key not in self.memo:
            self.memo[key] = work()
        return self.memo[key]


# ---- data: finding scenes -------------------------------------------------------------------------------

def find_scenes(data_dir):
    """-> list of Scene, in metadata.csv's order. Without that file, all folders below data_dir that have the
    three subfolders, and the file is written. UserError for rows, folders or steps that are missing."""
    root = Path(data_dir)
    table = root / "metadata.csv"
    if table.is_file():
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        if rows and not rows[0].get("video"):
            raise UserError(f"{table} has no column video: it takes the columns video,prompt")
    else:
        rows = []
        for folder, below, _ in os.walk(root):
            if set(below) & {alias for aliases in FOLDERS.values() for alias in aliases}:
                rows.append({"video": Path(folder).relative_to(root).as_posix()})
                below.clear()
        rows.sort(key=lambda row: row["video"])
    if not rows:
        raise UserError(f"no scenes in {root}: folders such as test_ball_ramp/env_0/0/0 that hold rgb, "
                        "motion_vectors and distance_to_camera are needed")
    scenes = [open_scene(root, row) for row in rows]
    if not table.is_file():
        write_table(table, rows, scenes)
    return scenes


def write_table(table, rows, scenes):
    """metadata.csv; a folder that cannot be written to stays without."""
    part = table.with_name(f"metadata.{os.getpid()}.tmp")  # several processes may write it at once
    try:
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["video", "prompt"])
            writer.writerows([row["video"], scene.prompt] for row, scene in zip(rows, scenes))
        os.replace(part, table)
    except OSError as error:
        print(f"{table} is not written: {error}")


def open_scene(root, row):
    """A row of metadata.csv -> Scene: files paired by step number, never by their place in a sorted list."""
    folder = root / row["video"]           # an absolute path replaces root
    if not folder.is_dir():
        raise UserError(f"scene {scene_name(folder)}: metadata.csv names {folder}, which is no folder")
    if (folder / "env_0/0/0").is_dir():
        folder = folder / "env_0/0/0"
    name, paths = scene_name(folder), {}
    for modality, aliases in FOLDERS.items():
        found = [folder / alias for alias in aliases if (folder / alias).is_dir()]
        if not found:
            raise UserError(f"scene {name}: {folder} lacks the folder {aliases[0]}")
        paths[modality] = {}
        for path in sorted(found[0].iterdir()):
            numbers = re.findall(r"\d+", path.stem)
            if path.suffix.lower() in ENDINGS[modality] and numbers:
                other = paths[modality].setdefault(int(numbers[-1]), path)
                if other != path:
                    raise UserError(f"scene {name}: {other} and {path.name} are of the same step")
    steps = sorted(set.intersection(*map(set, paths.values())))
    if not steps:
        counts = ", ".join(f"{len(files)} {modality}" for modality, files in paths.items())
        raise UserError(f"scene {name}: the folders in {folder} share no step ({counts} files)")
    spacing = Counter(np.diff(steps).tolist()).most_common(1)[0][0] if len(steps) > 1 else 1
    prompt = row.get("prompt") or "A physics simulation of " + name.removeprefix("test_").replace("_", " ")
    return Scene(name, folder, prompt, steps, spacing, paths,
                 {modality: len(files) - len(steps) for modality, files in paths.items()})


def scene_name(folder):
    """.../test_ball_ramp/env_0/0/0 -> test_ball_ramp."""
    return [part for part in Path(os.path.abspath(folder)).parts
            if not re.fullmatch(r"\d+|env(_\d+)?|camera|cam_\d+", part)][-1]


# ---- data: reading clips --------------------------------------------------------------------------------

def load_array(scene, modality, step):
    """-> H W 2 (motion) or H W (depth) floats of any precision, mapped: pages are read when used. None for an
    empty file, which a renderer writes as long as there is no frame before. UserError names the file."""
    return scene.once((modality, step), lambda: map_array(scene.paths[modality][step], modality))


def map_array(path, modality):
    try:
        array = np.asarray(np.load(path, mmap_mode="r"))       # the plain class: indexing a memmap is slow
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if array.size == 0:
        return None
    good = array.ndim == 3 and array.shape[2] in (2, 4) if modality == "motion" else \
        array.ndim == 2 or array.ndim == 3 and array.shape[2] == 1
    if not good or array.dtype not in (np.float16, np.float32, np.float64):
        needs = "(H, W, 2 or 4)" if modality == "motion" else "(H, W)"
        raise UserError(f"{path} is {array.dtype} {array.shape}: floats of shape {needs} are needed")
    return array[..., :2] if modality == "motion" else array.reshape(array.shape[:2])


def open_rgb(scene, step):
    """-> PIL image in RGB."""
    path = scene.paths["rgb"][step]
    try:
        return scene.once(("rgb", step), lambda: Image.open(path).convert("RGB"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def part_box(size, height, width, zoom):
    """(W, H) of a picture -> left, top, width, height of its centred part with the target's aspect, and of
    that the part that zoom (see read_clip) means."""
    (W, H), (z, x, y) = size, zoom
    w, h = min(W, max(1, round(H * width / height))), min(H, max(1, round(W * height / width)))
    part_w, part_h = max(1, round(w / z)), max(1, round(h / z))
    return (W - w) // 2 + round(x * (w - part_w)), (H - h) // 2 + round(y * (h - part_h)), part_w, part_h


def clean_depth(depth):
    """Metres with sky (Inf, <= 0, >= FAR) set to FAR; NaN, not known, stays and agrees with nothing."""
    depth = np.asarray(depth, np.float32)
    return np.where((depth <= 0) | (depth >= FAR), np.float32(FAR), depth)


def interpolate(point, distance, motion, depth):
    """motion at points N 2 (x, y) whose distance was N metres one step later -> motion, distance, valid N.

    Bilinear among those of the four neighbours that lie on the same surface: where an object borders on
    another, the ordinary bilinear mixture of both motions belongs to neither. Same surface means a distance
    within 5 % + 2 cm of the point's (a point's own distance changes as it moves; at 60 frames/s and 4 m that
    allows for 13 m/s). No such neighbour, or less than a tenth of the weight: the point is occluded.
    """
    H, W = depth.shape
    corner = np.floor(point).astype(np.int64)
    part = (point - corner)[:, None]
    shift = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    weight = np.where(shift, part, 1 - part).prod(-1)
    x, y = np.clip(corner[:, None] + shift, 0, [W - 1, H - 1]).transpose(2, 0, 1)
    near = clean_depth(depth[y, x])
    weight = weight * (np.abs(near - distance[:, None]) < DEPTH_SHARE * distance[:, None] + DEPTH_METRES)
    vector = np.zeros((*near.shape, 2))
    if motion is not None:
        vector = np.asarray(motion[y, x], np.float64)
        weight = weight * np.isfinite(vector).all(-1)
    total = weight.sum(-1)
    weight = weight / np.maximum(total, 1e-9)[:, None]
    mean = (weight[..., None] * np.where(np.isfinite(vector), vector, 0)).sum(1)
    return mean, (weight * np.where(weight > 0, near, 0)).sum(-1), total > .1


def compose(motions, depths):
    """Chains single-step vectors over a stride: k motions (frames t, t-1, .. t-k+1) and k + 1 depths (frames
    t .. t-k), each H W .. -> motion H W 2 in native pixels, valid H W.

    Starting at pixel p, p moves by motion[t](p), then by motion[t-1] at its new place, and so on. A point is
    valid while it stays inside the image and every step finds its surface (see interpolate), so points that
    were hidden k frames ago are dropped.
    """
    H, W = depths[0].shape
    start = np.stack(np.meshgrid(np.arange(W), np.arange(H)), -1).astype(np.float32).reshape(-1, 2)
    point, distance = start.copy(), clean_depth(depths[0]).reshape(-1)
    valid, still = np.isfinite(distance), np.ones(len(start), bool)
    for motion, depth in zip([*motions, None], depths):
        # most pixels never move: those need no interpolation
        near = clean_depth(depth).reshape(-1)
        valid &= ~still | (np.abs(near - distance) < DEPTH_SHARE * distance + DEPTH_METRES)
        distance = np.where(still, near, distance)
        vector = np.zeros_like(point) if motion is None else motion.astype(np.float32).reshape(-1, 2)
        moved = np.flatnonzero(~still & valid)
        vector[moved], distance[moved], valid[moved] = interpolate(point[moved], distance[moved], motion,
                                                                   depth)
        dx, dy = vector.T                  # a reduction over an axis of two is slow
        valid &= np.isfinite(dx) & np.isfinite(dy)
        step = np.flatnonzero(valid & ((dx != 0) | (dy != 0)))
        point[step] += vector[step]
        still[step] = False
        inside = (point[step] >= 0) & (point[step] <= np.float32([W - 1, H - 1]))
        valid[step] = inside.all(-1)       # absurd vectors end here too
    motion = np.where(valid[:, None], point - start, 0)
    return motion.reshape(H, W, 2), valid.reshape(H, W)


def read_clip(scene, start, stride, frames, height, width, flip=False, zoom=(1., 0., 0.)):
    """Frames start, start + stride, ... of scene.steps, all modalities cropped and resized alike -> dict of
    video T 3 H W uint8, motion T 2 H W float32 (previous chosen frame minus this one, in pixels at H x W; 0
    where not valid), motion_valid T H W bool (never in frame 0), depth T H W float32 metres (FAR where not
    valid), depth_valid T H W bool. flip mirrors left and right. zoom (z, x, y) takes a part z times
    smaller, at the share x of what is left over to its sides and y above and below. UserError names the file.

    RGB is averaged, motion and depth are picked from the nearest pixel: their mean over a border is no
    surface. Vectors are chained at native resolution and then scaled.
    """
    last = start + stride * (frames - 1)
    if start < 0 or stride < 1 or frames < 1 or last >= len(scene.steps):
        raise UserError(f"scene {scene.name}: {frames} frames from {start} by {stride} do not fit into its "
                        f"{len(scene.steps)} steps")
    size = open_rgb(scene, scene.steps[start]).size
    left, top, w, h = part_box(size, height, width, zoom)
    rows = top + ((np.arange(height) + .5) * h / height).astype(int)
    columns = left + ((np.arange(width) + .5) * w / width).astype(int)
    pick = lambda array: array[np.ix_(rows, columns)]
    video = np.zeros((frames, height, width, 3), np.uint8)
    motion = np.zeros((frames, height, width, 2), np.float32)
    motion_valid = np.zeros((frames, height, width), bool)
    depth = np.full((frames, height, width), np.nan, np.float32)

    def check_size(modality, index, W, H):
        if (W, H) != size:
            raise UserError(f"{scene.paths[modality][scene.steps[index]]} is {W} x {H}, the frames of scene "
                            f"{scene.name} are {size[0]} x {size[1]}")

    def load(modality, index):
        array = load_array(scene, modality, scene.steps[index])
        if array is not None:
            check_size(modality, index, *array.shape[1::-1])
        return array

    for i, index in enumerate(range(start, last + 1, stride)):
        picture = open_rgb(scene, scene.steps[index])
        check_size("rgb", index, *picture.size)
        video[i] = picture.resize((width, height), Image.BICUBIC, (left, top, left + w, top + h))
        if (array := load("depth", index)) is not None:
            depth[i] = pick(array)
        chain = range(index, index - stride, -1)
        # a vector leads to the step before it: where that one is missing, the chain is broken
        if i and all(scene.steps[j] - scene.steps[j - 1] == scene.spacing for j in chain):
            motions = [load("motion", j) for j in chain]
            depths = [load("depth", j) for j in (*chain, index - stride)]
            if all(array is not None for array in (*motions, *depths)):
                vectors, valid = scene.once(("composed", index, stride), lambda: compose(motions, depths))
                motion[i], motion_valid[i] = pick(vectors), pick(valid)
    depth_valid = np.isfinite(depth) & (depth > 0) & (depth < FAR)
    motion *= np.float32([width / w, height / h])
    clip = {"video": video.transpose(0, 3, 1, 2), "motion": motion.transpose(0, 3, 1, 2),
            "motion_valid": motion_valid, "depth": np.where(depth_valid, depth, np.float32(FAR)),
            "depth_valid": depth_valid}
    if flip:
        clip = {name: value[..., ::-1] for name, value in clip.items()}
        clip["motion"] = clip["motion"] * np.float32([-1, 1])[:, None, None]
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in clip.items()}


# ---- data: checking what vectors mean -------------------------------------------------------------------

def sampled(items, count):
    """At most count of a list's items, evenly spread."""
    return [items[i] for i in sorted(set(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)))]


def bilinear(picture, x, y):
    """Picture H W 3 at N points; outside, the border is repeated."""
    H, W = picture.shape[:2]
    x, y = np.clip(x, 0, W - 1), np.clip(y, 0, H - 1)
    left, top = np.minimum(x.astype(int), W - 2), np.minimum(y.astype(int), H - 2)
    a, b = (x - left)[:, None], (y - top)[:, None]
    return (1 - b) * ((1 - a) * picture[top, left] + a * picture[top, left + 1]) + \
        b * ((1 - a) * picture[top + 1, left] + a * picture[top + 1, left + 1])


def busiest_pairs(scenes, pairs):
    """-> [(scene, step)] with the largest mean vectors, spread over the scenes; each with its neighbours in
    reach of OFFSETS. Looks at every 8th pixel of at most 24 files per scene."""
    ranked = []
    for scene in scenes:
        rgb, motion, gap = scene.paths["rgb"], scene.paths["motion"], scene.spacing
        usable = [t for t in scene.steps if t - gap in rgb and all(t + o * gap in motion for o in OFFSETS)]
        scores = []
        for t in sampled(usable, 24):
            array = load_array(scene, "motion", t)
            if array is not None:
                scores.append((float(np.nan_to_num(np.abs(array[::8, ::8]), posinf=0).mean()), t))
        # a scene's second-best pair competes at half its score, and so on: not all come from one scene
        ranked += [(score / (rank + 1), scene, t) for rank, (score, t) in enumerate(sorted(scores)[::-1])]
    ranked.sort(key=lambda entry: -entry[0])
    return [(scene, t) for _, scene, t in ranked[:pairs]]


def convention_test(scenes, pairs=20):
    """Which reading of the vectors explains the pictures? Warps rgb[t - 1] to t by sign x unit x vectors of
    file t + offset, at native resolution -> dict of table {(sign, unit, offset): mean |difference|, 0..255},
    unwarped (the same without warp), best (a key of table or None), moving (pixels compared), changed (those
    of them where the picture changes at all).

    All readings are compared at the same pixels: those that move by any of the five files (by more than a
    tenth of that pair's longest vector, whatever its unit) and differ from the scene's median picture, which
    are the moving objects in frame t. The rim that an object has just left must not count: no vector explains
    what was hidden, and on a plain background the file before seems to.
    """
    plates = {}
    keys = [(sign, unit, offset) for offset in OFFSETS for unit in UNITS for sign in (1, -1)]
    total, unwarped, moving, changed = dict.fromkeys(keys, 0.), 0., 0, 0
    for scene, t in busiest_pairs(scenes, pairs):
        if scene.folder not in plates:
            some = [np.asarray(open_rgb(scene, step)) for step in sampled(scene.steps, 9)]
            plates[scene.folder] = np.median(some, 0).astype(np.float32)
        vectors = [load_array(scene, "motion", t + offset * scene.spacing) for offset in OFFSETS]
        now, before = (np.asarray(open_rgb(scene, step), np.float32)
                       for step in (t, t - scene.spacing))
        if any(array is None or array.shape[:2] != now.shape[:2] for array in vectors):
            continue
        vectors = [np.where(np.isfinite(array), array, 0).astype(np.float32) for array in vectors]
        length = np.max([np.hypot(array[..., 0], array[..., 1]) for array in vectors], 0)
        seen = np.abs(now - plates[scene.folder]).mean(-1) > 8
        y, x = np.nonzero((length > .1 * length.max()) & seen)
        target = now[y, x]
        still = np.abs(before[y, x] - target).mean(1)
        unwarped, moving, changed = unwarped + still.sum(), moving + len(x), changed + (still > 8).sum()
        H, W = now.shape[:2]
        for sign, unit, offset in keys:
            dx, dy = (sign * vectors[OFFSETS.index(offset)][y, x] * UNITS[unit](W, H)).T
            warped = bilinear(before, x + dx, y + dy)
            total[sign, unit, offset] += float(np.abs(warped - target).mean(1).sum())
    table = {key: value / max(moving, 1) for key, value in total.items()}
    best = min(table, key=table.get) if changed >= LEAST_MOVING else None
    if best and .97 * table[best[0], best[1], 0] <= table[best]:
        best = (best[0], best[1], 0)       # a plain, slow object looks alike at all offsets
    return {"table": table, "unwarped": float(unwarped / max(moving, 1)), "best": best, "moving": moving,
            "changed": int(changed)}


def verdict(result):
    """What convention_test found -> None if the vectors are as read_clip takes them, else one line that names
    the fault."""
    if result["best"] is None:
        return (f"too few moving pixels ({result['changed']}, {LEAST_MOVING} are needed) to test the sign, "
                "unit and offset of motion_vectors")
    (sign, unit, offset), error = result["best"], result["table"][result["best"]]
    if error > .8 * result["unwarped"]:
        return (f"motion_vectors do not explain the pictures: the best reading leaves an error of "
                f"{error:.1f}, no motion at all {result['unwarped']:.1f}")
    faults = []
    if sign < 0:
        faults.append("motion_vectors point the other way: multiply by -1")
    if unit != "px":
        factors = {"NDC": "x by W/2 and y by H/2", "UV": "x by W and y by H"}[unit]
        faults.append(f"the unit of motion_vectors is {unit}, not pixels: multiply {factors}")
    if offset:
        faults.append(f"motion files are shifted by {offset:+d} frame{'s' * (abs(offset) > 1)} against rgb: "
                      f"the file of step t{offset:+d} belongs to frame t")
    return "; ".join(faults) or None


def describe_scene(scene):
    """Two lines on what a scene's files hold, by eight of its steps."""
    motion, depth = ([load_array(scene, modality, step) for step in sampled(scene.steps, 8)]
                     for modality in ("motion", "depth"))
    motion = [np.asarray(array, np.float32) for array in motion if array is not None]
    known = [np.isfinite(array).all(-1) for array in motion]
    vectors = [array[good] for array, good in zip(motion, known)]
    moving = [(np.hypot(*v.T) > .5).mean() if len(v) else 0 for v in vectors]
    bad = 1 - np.mean(np.concatenate([good.ravel() for good in known])) if known else 1
    low, high = (min(v.min(initial=0) for v in vectors), max(v.max(initial=0) for v in vectors)) \
        if vectors else (0, 0)
    depth = [np.asarray(array, np.float32).ravel() for array in depth if array is not None]
    depth = np.concatenate(depth) if depth else np.full(1, np.nan, np.float32)
    seen = depth[np.isfinite(depth) & (depth > 0) & (depth < FAR)]
    metres = f"{seen.min():.2f} to {seen.max():.2f} m" if len(seen) else "never valid"
    counts = ", ".join(f"{len(files)} {modality}" for modality, files in scene.paths.items())
    dropped = ", ".join(f"{n} {modality}" for modality, n in scene.dropped.items() if n) or "none"
    gaps, (W, H) = int((np.diff(scene.steps) != scene.spacing).sum()), open_rgb(scene, scene.steps[0]).size
    return (f"{scene.name}: {counts}; {len(scene.steps)} paired, {gaps} gaps, unpaired: {dropped}; "
            f"{W} x {H}\n  motion {low:.1f} to {high:.1f} px, {np.mean(moving or 0):.1%} of pixels move, "
            f"{bad:.1%} NaN or Inf; depth {metres}, {np.isnan(depth).mean():.1%} NaN, "
            f"{np.isinf(depth).mean():.1%} Inf, {1 - len(seen) / len(depth):.1%} not valid")


def check(data_dir):
    """Prints what the scenes hold and what their vectors mean. UserError with the verdict if they mean
    something else than read_clip assumes; a data set that hardly moves cannot fail."""
    scenes = find_scenes(data_dir)
    for scene in scenes:
        print(describe_scene(scene))
        own = verdict(convention_test([scene], 6)) if len(scenes) > 1 else None
        if own and not own.startswith("too few"):
            print(f"  suspicious: {own}")
    result = convention_test(scenes)
    print(f"error of warping frame t-1 to t on {result['moving']} moving pixels (0..255), without warp "
          f"{result['unwarped']:.2f}:")
    rows = sorted(result["table"], key=result["table"].get)[:5]
    for sign, unit, offset in rows if result["moving"] else []:
        print(f"  {'+-'[sign < 0]}mv, {unit}, offset {offset:+d}: {result['table'][sign, unit, offset]:.2f}")
    fault = verdict(result)
    print(f"verdict: {fault or 'motion vectors are previous minus current, in pixels, in step with rgb'}")
    if fault and result["best"] is not None:
        raise UserError(f"{data_dir}: {fault}")


# ---- data: simulated scenes, their bodies ---------------------------------------------------------------

# World: metres, x to the right, y up, z away from the camera; the ground is y = 0, one frame is 1/30 s.
FRAME, SUBSTEPS, GRAVITY, ASLEEP = 1 / 30, 8, 9.81, 9      # s, per frame, m/s2, stillness of a sleeping body
FRICTION, FLOOR = .45, 8.                # the ground is drawn for |z| < FLOOR; behind it is sky
EYE, TARGET, FIELD_OF_VIEW = np.array([0, 1.3, -4.2]), np.array([0, .6, 0]), math.radians(55)
SKY, GROUND = -2, -1                     # ids of pixels that show no body


def turn(axis_angle):
    """Axis times angle in radians -> the 3 3 rotation matrix."""
    angle = math.sqrt(axis_angle @ axis_angle)
    x, y, z = axis_angle / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def make_body(parts, at, velocity=(0, 0, 0), spin=(0, 0, 0), tilt=(0, 0, 0), fixed=False, bounce=.75):
    """parts: (is it a ball, its offset from the body's centre 3, half extents 3 or three times the radius,
    RGB 3) -> {"parts", "at" 3, "rotation" 3 3, "velocity" 3, "spin" 3, "fixed", "bounce"}."""
    vectors = {"at": at, "velocity": velocity, "spin": spin}
    vectors = {key: np.array(vector, float) for key, vector in vectors.items()}
    return {"parts": [(ball, np.array(offset, float), np.array(half, float), np.array(rgb))
                      for ball, offset, half, rgb in parts], "fixed": fixed, "bounce": bounce,
            "rotation": turn(np.array(tilt, float)), **vectors}


def still(body):
    return {**body, "fixed": True}


class Maker:
    """Makes bodies at x, y (of their lowest point), z. Colours and some sizes are drawn from `rng`."""
    def __init__(self, rng):
        self.rng, self.vary, self.hue = rng, rng.uniform, rng.random()

    def colour(self):
        self.hue = (self.hue + .382) % 1                   # golden section: neighbours differ much
        return colorsys.hsv_to_rgb(self.hue, self.vary(.6, .85), self.vary(.8, 1))

    def ball(self, x, y, z, speed=0., radius=None):
        """One with a speed (along x) rolls."""
        r = radius or self.vary(.28, .36)
        return make_body([(True, (0, 0, 0), (r, r, r), self.colour())], (x, y + r, z), (speed, 0, 0),
                         (0, 0, -speed / r), self.rng.normal(0, 1, 3))

    def block(self, x, y, z, half, rgb=None, **more):
        return make_body([(False, (0, 0, 0), half, rgb or self.colour())], (x, y + half[1], z), **more)

    def wall(self, x, y, z, half, **more):
        return self.block(x, y, z, half, fixed=True, **more)

    def duck(self, x, y, z, size=.36, **more):
        """Its centre of mass lies below the middle of its body, so that it rights itself."""
        yellow, orange = (1., .83, .1), (1., .4, .05)
        return make_body([(True, (0, .3 * size, 0), [size] * 3, yellow),
                          (True, (-.35 * size, 1.35 * size, 0), [.6 * size] * 3, yellow),
                          (True, (-1. * size, 1.3 * size, 0), [.22 * size] * 3, orange)],
                         (x, y + .7 * size, z), bounce=.5, **more)

    def dominoes(self, places, lean=0.):
        """Thin blocks at these x; the first is turned by `lean` on its lower right edge and falls."""
        half, row = np.array([.09, .52, .28]), []
        for number, x in enumerate(places):
            angle = 0 if number else lean
            centre = np.array([x + half[0], 0, 0]) + turn(np.array([0, 0, -angle])) @ (half * [-1, 1, 0])
            row.append(make_body([(False, (0, 0, 0), half, self.colour())], centre, tilt=(0, 0, -angle),
                                 spin=(0, 0, -4 * angle), bounce=.2))
        return row

    def basket(self, x, z, width, height):
        """A floor and four walls, the front one lower."""
        rgb, low = self.colour(), .6 * height
        sides = [((0, .03, 0), (width, .03, width)), ((0, low / 2, -width), (width, low / 2, .04)),
                 ((0, height / 2, width), (width, height / 2, .04))]
        sides += [((side * width, height / 2, 0), (.04, height / 2, width)) for side in (-1, 1)]
        return make_body([(False, offset, half, rgb) for offset, half in sides], (x, 0, z), fixed=True,
                         bounce=.3)

    def mug(self, x, z):
        """Two crossed boxes are round enough; three bars are the handle."""
        rgb, height = self.colour(), self.vary(.36, .44)
        boxes = [((0, height, 0), (.3, height, .22)), ((0, height, 0), (.22, height, .3)),
                 ((.62, height, 0), (.06, .2, .07))]
        boxes += [((.48, height + side, 0), (.2, .06, .07)) for side in (-.2, .2)]
        return make_body([(False, offset, half, rgb) for offset, half in boxes], (x, 0, z),
                         tilt=(0, self.vary(-.4, .4), 0), fixed=True)


def ball_scene(name, make, near, speed):
    """Bodies of the scenes whose balls roll, fall and collide. near: a place in z; speed: a ball's."""
    ball, wall, vary = make.ball, make.wall, make.vary
    match name:
        case "ball_and_block_fall":
            half = [vary(.22, .28)] * 3
            return [ball(vary(-1.2, -.8), vary(1.7, 2.2), near), ball(vary(.9, 1.2), vary(2.6, 3), .5),
                    make.block(vary(-.1, .2), vary(1.3, 1.7), near, half, tilt=make.rng.normal(0, 1, 3),
                               spin=make.rng.normal(0, 3, 3), velocity=(vary(-.4, .4), 0, 0))]
        case "ball_collide":
            return [ball(-2.3, 0, near, speed), ball(2.2, 0, near + vary(-.1, .1), -speed),
                    ball(-4.6, 0, 1., speed)]
        case "ball_hits_duck":
            return [ball(-2.3, 0, near, 1.3 * speed, .34), make.duck(.2, 0, near), ball(5, 0, 1.1, -speed)]
        case "ball_hits_nothing":
            return [ball(-2.4, 0, near, speed), wall(vary(-.9, -.4), 0, 1., [.3, .3, .3]),
                    wall(vary(.5, .9), 0, -.9, [.2, .2, .2])]
        case "ball_in_basket":
            return [make.basket(0, 0, .75, .6), *(
                ball(vary(-.3, .3), height, vary(-.2, .2), radius=vary(.22, .28))
                for height in (1.3, 2.6, 5., 9.))]
        case "ball_ramp":
            slope = vary(.4, .48)
            top = 1.15 * math.sin(slope)
            ramp = wall(-.85, top - .05, 0, [1.2, .05, .5], tilt=(0, 0, -slope))
            return [ramp, wall(-1.4, 0, 0, [.1, .5 * top, .4]), *(
                ball(x, top - math.tan(slope) * (x + .85) + .12, z, radius=.26)
                for x, z in ((-1.3, -.22 + near), (-1.8, .22 + near))), ball(4.6, 0, 1., -speed)]
        case "ball_rolls_off":
            height = vary(.35, .45)
            return [wall(-1.1, 0, 0, [1.1, height, .6]), ball(-1.9, 2 * height, near, speed)]
        case "ball_rolls_on_glass":
            return [wall(0, .6, 0, [1.9, .03, .8], rgb=(.72, .9, .95)), wall(-1.2, 0, 0, [.1, .3, .1]),
                    wall(1.2, 0, 0, [.1, .3, .1]), ball(-1.8, .66, -.35 + near, .6 * speed, .28),
                    ball(1.8, .66, .4 + near, -.7 * speed, .3)]
        case "ball_train":
            return [ball(x, 0, near, velocity, .3)
                    for x, velocity in ((-2.3, speed), (-6.4, speed), (-.6, 0), (.01, 0), (.62, 0))]
        case "roll_behind_box":
            return [wall(vary(-.2, .2), 0, -.5, [.55, .55, .2]), ball(-2.7, 0, .4 + near, speed),
                    ball(5., 0, 1.1, -speed)]
        case "roll_front_box":
            return [wall(vary(-.2, .2), 0, 1., [.7, .55, .3]), ball(-2.2, 0, .1 + near, .8 * speed),
                    ball(3.8, 0, -.6, -.9 * speed)]


def domino_scene(name, make, near, speed):
    """Bodies of the scenes whose dominoes or ducks fall."""
    dominoes, duck, ball, vary = make.dominoes, make.duck, make.ball, make.vary
    match name:
        case "block_domino":
            return [*dominoes(-.8 + .52 * np.arange(5)),
                    make.block(-2.2, 0, near, [.3, .4, .3], velocity=(1.6 * speed, 0, 0), bounce=.3)]
        case "domino_in_juice":
            row = dominoes(-1.2 + .52 * np.arange(4), vary(.3, .36))
            sinking = [make.block(x, y, near, [.09, .5, .26], tilt=make.rng.normal(0, .6, 3), bounce=.2)
                       for x, y in ((1.2, 1.4), (.9, 5.))]
            juice = make.wall(.1, 0, 0, [1.9, .11, .9], rgb=(1., .55, .1))
            return [*row, *sinking, {**juice, "liquid": True}]
        case "domino_with_space":
            places = np.array([-1.6, -1.1, -.6, vary(.75, .85), vary(1.25, 1.35)])
            return [*dominoes(places, vary(.26, .3)), ball(-2.4, 0, -1.3, .7 * speed, .26)]
        case "duck_and_domino":
            return [*dominoes(-1.6 + .55 * np.arange(4), vary(.26, .3)), duck(.85, 0, near, .3),
                    ball(3.2, 0, 1.4, -1.1 * speed)]
        case "duck_falls_in_box":
            return [make.basket(near, 0, .85, .55), *(
                duck(near + x, height, 0, .28, spin=make.rng.normal(0, 2, 3))
                for x, height in ((-.25, 1.8), (.25, 5.)))]


def still_scene(name, make, near, speed):
    """Bodies of the scenes where nothing moves but, in some, the light."""
    wall, vary = make.wall, make.vary
    match name:
        case "duck_static":
            return [still(make.duck(near, 0, near, vary(.42, .52), tilt=(0, vary(-.6, .6), 0))),
                    wall(vary(.9, 1.3), 0, .8, [.3, .3, .3])]
        case "light_on_block":
            return [wall(near, 0, 0, [vary(.4, .55), vary(.4, .55), .45], tilt=(0, vary(.3, 1.), 0)),
                    wall(1.3, 0, .8, [.2, .25, .2])]
        case "light_on_mug":
            return [make.mug(near, 0), wall(near, -.04, 0, [1., .05, .7])]
        case "light_on_mug_block":
            return [make.mug(-.7 + near, 0),
                    wall(.8, 0, near, [.4, vary(.3, .5), .4], tilt=(0, vary(.2, .9), 0))]
        case "light_on_sculpture":
            return [wall(near, 0, 0, [.5, .15, .5]), wall(near, .3, 0, [.16, .4, .16], tilt=(0, .6, 0)),
                    still(make.ball(near, 1.1, 0, radius=.28)),
                    wall(near, .75, 0, [.5, .06, .1], tilt=(0, vary(-.5, .5), .3))]


# name -> frames, whether a motion file without a picture trails, as in the real set, and what makes it
SCENES = {
    "test_ball_and_block_fall": (99, True, ball_scene), "test_ball_collide": (80, False, ball_scene),
    "test_ball_hits_duck": (80, False, ball_scene), "test_ball_hits_nothing": (60, False, ball_scene),
    "test_ball_in_basket": (60, True, ball_scene), "test_ball_ramp": (80, True, ball_scene),
    "test_ball_rolls_off": (60, False, ball_scene), "test_ball_rolls_on_glass": (80, False, ball_scene),
    "test_ball_train": (131, True, ball_scene), "test_block_domino": (60, False, domino_scene),
    "test_domino_in_juice": (60, False, domino_scene), "test_domino_with_space": (60, False, domino_scene),
    "test_duck_and_domino": (60, True, domino_scene), "test_duck_falls_in_box": (60, False, domino_scene),
    "test_duck_static": (60, False, still_scene), "test_light_on_block": (60, False, still_scene),
    "test_light_on_mug": (80, False, still_scene), "test_light_on_mug_block": (99, True, still_scene),
    "test_light_on_sculpture": (60, False, still_scene), "test_roll_behind_box": (99, False, ball_scene),
    "test_roll_front_box": (99, True, ball_scene),
}


def build(name, rng):
    """A scene's bodies at its start, and the drag (1/s) of what they move in."""
    make, (_, _, scene) = Maker(rng), SCENES[name]
    near, speed = make.vary(-.1, .1), make.vary(2.1, 2.5)
    return scene(name.removeprefix("test_"), make, near, speed), 1.5 if "juice" in name else 0.


# ---- data: simulated scenes, their physics --------------------------------------------------------------

def cross(a, b):
    """np.cross for two vectors of 3, without its overhead."""
    return np.array([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


def with_inertia(body):
    """Adds what the physics needs: inverse mass and inertia (0: it cannot be moved), a bounding radius, and
    the spheres that stand for its surface in contacts: a ball is one, a box has one in each corner."""
    spheres, radii, mass, inertia = [], [], 0., np.zeros(3)
    for ball, offset, half, _ in body["parts"]:
        small = half[0] if ball else .1 * half.min()
        corners = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
        places = offset[None] if ball else offset + corners * (half - small)
        spheres.extend(places)
        radii.extend([small] * len(places))
        weight = (4.19 if ball else 8) * half.prod()
        square = half ** 2 * (.2 if ball else 1 / 3) + offset ** 2
        mass, inertia = mass + weight, inertia + weight * (square.sum() - square)
    free = not body["fixed"]
    body.update(spheres=np.array(spheres), sphere_radii=np.array(radii), inverse_mass=free / mass,
                inverse_inertia=free / inertia, world_inverse_inertia=free * np.diag(1 / inertia),
                bounding_radius=max(np.linalg.norm(offset) + (half[0] if ball else np.linalg.norm(half))
                                    for ball, offset, half, _ in body["parts"]))
    return body


def touches(a, b):
    """Contacts of a's spheres with the boxes and balls of b (None: the ground) -> a list of (point 3,
    normal 3 away from b, depth)."""
    centres, radius, found = a["at"] + a["spheres"] @ a["rotation"].T, a["sphere_radii"], []
    if b is None:
        for k in np.flatnonzero(centres[:, 1] < radius):
            found.append((centres[k] - [0, radius[k], 0], np.array([0., 1, 0]), radius[k] - centres[k, 1]))
        return found
    for ball, offset, half, _ in b["parts"]:
        local = (centres - b["at"]) @ b["rotation"] - offset
        if ball:
            if not a["parts"][0][0]:
                continue                                   # found when a and b change places
            away, inner = local, half[0]
        else:
            away, inner = local - np.clip(local, -half, half), 0.
        gap = np.sqrt((away ** 2).sum(1)) - inner
        for k in np.flatnonzero(gap < radius):
            normal, distance = away[k], gap[k]
            if not normal.any():       # its centre is in the box: out at the nearest face
                face = np.argmin(half - np.abs(local[k]))
                normal, distance = np.zeros(3), np.abs(local[k][face]) - half[face]
                normal[face] = np.sign(local[k][face])
            normal = b["rotation"] @ (normal / np.linalg.norm(normal))
            found.append((centres[k] - radius[k] * normal, normal, radius[k] - distance))
    return found


def collide(a, b, point, normal, depth):
    """One contact: an impulse along the normal with restitution, Coulomb friction, and moving apart."""
    pair = [(body, sign, point - body["at"]) for body, sign in ((a, 1), (b, -1))
            if body and not body["fixed"]]
    speed = sum(sign * (body["velocity"] + cross(body["spin"], arm)) for body, sign, arm in pair)

    def inverse_effective_mass(direction):
        """Speed along a direction that one unit of impulse along it gives."""
        torques = [(body, cross(arm, direction)) for body, _, arm in pair]
        return sum(body["inverse_mass"] + torque @ body["world_inverse_inertia"] @ torque
                   for body, torque in torques)

    closing = speed @ normal
    if closing < 0:
        bounce = min(a["bounce"], b["bounce"] if b else 1) * (closing < -.4)      # slow things stay down
        push = -(1 + bounce) * closing / inverse_effective_mass(normal)
        slide = speed - closing * normal
        slip = math.sqrt(slide @ slide)
        impulse = push * normal
        if slip > 1e-6:
            slide /= slip
            impulse = impulse - min(FRICTION * push, slip / inverse_effective_mass(slide)) * slide
        for body, sign, arm in pair:
            body["velocity"] = body["velocity"] + sign * body["inverse_mass"] * impulse
            body["spin"] = body["spin"] + sign * body["world_inverse_inertia"] @ cross(arm, impulse)
    total = sum(body["inverse_mass"] for body, _, _ in pair)
    for body, sign, _ in pair:                             # a millimetre stays, so that contacts last
        body["at"] = body["at"] + sign * .3 * max(depth - .001, 0) * body["inverse_mass"] / total * normal


def advance(bodies, drag, dt):
    """One substep, in place. A body that is still for a while sleeps until a moving one touches it."""
    moving = [body for body in bodies if not body["fixed"] and body["still_for"] < ASLEEP]
    for body in moving:
        body["velocity"] = (body["velocity"] - [0, GRAVITY * dt, 0]) * math.exp(-drag * dt)
        body["spin"] = body["spin"] * math.exp(-drag * dt)
        body["at"] = body["at"] + dt * body["velocity"]
        body["rotation"] = turn(dt * body["spin"]) @ body["rotation"]
        body["world_inverse_inertia"] = body["rotation"] * body["inverse_inertia"] @ body["rotation"].T
        for contact in touches(body, None):
            collide(body, None, *contact)
    for a in bodies:
        for b in bodies:
            apart, near = a["at"] - b["at"], a["bounding_radius"] + b["bounding_radius"]
            if a is b or a["fixed"] or b.get("liquid") or apart @ apart > near ** 2:
                continue
            if a["still_for"] >= ASLEEP and (b["fixed"] or b["still_for"] >= ASLEEP):
                continue
            for contact in touches(a, b):
                for body in (a, b):
                    body["still_for"] = min(body["still_for"], ASLEEP - 1)
                collide(a, b, *contact)
    for body in moving:
        quiet = body["velocity"] @ body["velocity"] < .05 ** 2 and body["spin"] @ body["spin"] < .3 ** 2
        body["still_for"] = body["still_for"] + .25 if quiet else 0


def simulate(name, frames, seed):
    """A scene's exact state: {"centre" T n 3, "rotation" T n 3 3 of n bodies, "light" T 3 (unit vectors to
    the sun), "owner" m (each part's body), "ball" m, "offset" m 3, "half" m 3, "colour" m 3, "texture" m
    (seeds) of m parts}."""
    rng = np.random.default_rng([seed, list(SCENES).index(name)])
    bodies, drag = build(name, rng)
    for body in bodies:
        with_inertia(body)
        above = body["at"][1] > 1.05 * body["bounding_radius"]
        moves = body["velocity"].any() or body["spin"].any() or above or "ramp" in name
        body["still_for"] = 0 if moves else ASLEEP
    path = []
    for _ in range(frames):
        path.append(([body["at"] for body in bodies], [body["rotation"] for body in bodies]))
        for _ in range(SUBSTEPS):
            advance(bodies, drag, FRAME / SUBSTEPS)
    azimuth = rng.uniform(-.9, -.5) + (.035 * np.arange(frames) if "light" in name else np.zeros(frames))
    light = np.stack([np.sin(azimuth), np.full(frames, 1.1), -np.cos(azimuth)], 1)
    owner = [number for number, body in enumerate(bodies) for _ in body["parts"]]
    ball, offset, half, rgb = zip(*(part for body in bodies for part in body["parts"]))
    return {"centre": np.array([at for at, _ in path]), "rotation": np.array([turned for _, turned in path]),
            "light": light / np.linalg.norm(light, axis=1, keepdims=True), "owner": np.array(owner),
            "ball": np.array(ball), "offset": np.array(offset), "half": np.array(half),
            "colour": np.array(rgb), "texture": rng.integers(0, 2 ** 31, len(owner))}


# ---- data: simulated scenes, their pictures -------------------------------------------------------------

@cache
def camera(side):
    """-> rotation 3 3 (rows: right, down, ahead in the world), focal length in pixels, and the unit ray of
    each pixel's centre (side * side, 3)."""
    ahead = (TARGET - EYE) / np.linalg.norm(TARGET - EYE)
    right = np.array([ahead[2], 0, -ahead[0]]) / math.hypot(ahead[0], ahead[2])
    axes, focal = np.stack([right, -np.cross(ahead, right), ahead]), side / 2 / math.tan(FIELD_OF_VIEW / 2)
    v, u = np.mgrid[:side, :side].reshape(2, -1) + .5 - side / 2
    rays = np.stack([u / focal, v / focal, np.ones_like(u)], 1) @ axes
    return axes, focal, rays / np.linalg.norm(rays, axis=1, keepdims=True)


def project(points, side):
    """World points ... 3 -> pixel coordinates ... 2; whole numbers are pixel centres."""
    axes, focal, _ = camera(side)
    seen = (points - EYE) @ axes.T
    return focal * seen[..., :2] / seen[..., 2:] + (side - 1) / 2


def strike(world, t, part, origins, rays):
    """Length of each ray up to a part; inf where it misses. Origins or rays are N 3, the other may be 3."""
    body, half = world["owner"][part], world["half"][part]
    rotation, ball = world["rotation"][t, body], world["ball"][part]
    centre = world["centre"][t, body] + rotation @ world["offset"][part]
    to_centre = centre - origins
    along = to_centre @ rays if rays.ndim == 1 else rays @ to_centre
    length = np.full(len(along), np.inf)
    radius = half[0] if ball else np.linalg.norm(half)
    root = radius ** 2 - np.einsum("...i,...i", to_centre, to_centre) + along ** 2
    close = np.flatnonzero(root > 0)                       # rays that meet the sphere around the part
    if ball:
        near = along[close] - np.sqrt(root[close])
        far = near
    else:
        start = -(to_centre[close] if to_centre.ndim > 1 else to_centre) @ rotation
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = 1 / ((rays if rays.ndim == 1 else rays[close]) @ rotation)
            one, two = (-half - start) * inverse, (half - start) * inverse
        low, high = np.minimum(one, two).T, np.maximum(one, two).T
        near = np.maximum(np.maximum(low[0], low[1]), low[2])      # much faster than .max(1)
        far = np.minimum(np.minimum(high[0], high[1]), high[2])
    length[close] = np.where((near > 0) & (near <= far), near, np.inf)
    return length


def cast(world, t, rays):
    """Rays N 3 from the eye -> length N (inf: sky) and the part that each meets, N (or SKY, GROUND)."""
    with np.errstate(divide="ignore"):
        length = np.where(rays[:, 1] < 0, -EYE[1] / rays[:, 1], np.inf)
    length[~(np.abs(EYE[2] + length * rays[:, 2]) < FLOOR)] = np.inf
    part = np.where(np.isfinite(length), GROUND, SKY)
    for number in range(len(world["owner"])):
        reach = strike(world, t, number, EYE, rays)
        nearer = reach < length
        length[nearer], part[nearer] = reach[nearer], number
    return length, part


def surface(world, t, number, points):
    """Points N 3 on a part -> unit normals N 3 and RGB N 3. The texture is fixed to the body."""
    body, half = world["owner"][number], world["half"][number]
    rotation, rng = world["rotation"][t, body], np.random.default_rng(world["texture"][number])
    local = (points - world["centre"][t, body]) @ rotation - world["offset"][number]
    if world["ball"][number]:
        normal = local / half[0]
        wedge = np.floor(np.arctan2(local[:, 2], local[:, 0]) * 3 / np.pi + rng.random())
        second = (wedge + (local[:, 1] > 0)) % 2 > 0
    else:
        face = (np.abs(local) / half).argmax(1)
        normal = np.zeros_like(local)
        normal[np.arange(len(local)), face] = np.sign(local[np.arange(len(local)), face])
        squares = np.floor((local + half) / max(.1, half.max() / 2.5)) * (normal == 0)
        second = squares.sum(1) % 2 > 0
    colour = world["colour"][number]
    other = .5 + .5 * colour if world["ball"][number] else .72 * colour
    return normal @ rotation.T, np.where(second[:, None], other, colour)


def shade(world, t, rays):
    """Rays N 3 from the eye -> RGB N 3 in [0, 1]: textures, sunlight with shadows, and ambient light."""
    length, part = cast(world, t, rays)
    rgb = np.array([.45, .65, .95]) + np.clip(3 * rays[:, 1:2], 0, 1) * [-.15, -.12, -.05]    # the sky
    hit = np.flatnonzero(part != SKY)
    points = EYE + length[hit, None] * rays[hit]
    normal, colour = np.tile([0., 1, 0], (len(hit), 1)), np.empty((len(hit), 3))
    squares = np.floor(points[:, 0] * 1.5) + np.floor(points[:, 2] * 1.5)
    contrast = np.where(squares % 2 > 0, .07, -.07) * np.clip(1.4 - length[hit] / 9, 0, 1)    # fades far away
    colour[:] = (.66 + contrast)[:, None] * [1., .97, .9]
    for number in np.unique(part[hit][part[hit] >= 0]):
        own = part[hit] == number
        normal[own], colour[own] = surface(world, t, number, points[own])
    light = world["light"][t]
    lit = np.clip(normal @ light, 0, 1)
    facing = np.flatnonzero(lit > 0)
    starts = points[facing] + 1e-4 * normal[facing]
    for number in range(len(world["owner"])):
        lit[facing[np.isfinite(strike(world, t, number, starts, light))]] = 0
    rgb[hit] = colour * (.38 + .1 * normal[:, 1:2] + .72 * lit[:, None])
    return np.clip(rgb, 0, 1)


def render(world, t, side):
    """Frame t -> rgb (side side 3 uint8), motion (side side 4 float32), depth (side side float32), id (side
    side int: a body, GROUND or SKY).

    Depth is the ray's length in metres. Motion is in pixels, previous minus current position, on the current
    frame's grid: Replicator's convention; its channels 2 and 3 mean nothing there, and are 1 here.
    """
    fine = shade(world, t, camera(2 * side)[2]).reshape(side, 2, side, 2, 3).mean((1, 3))
    rays = camera(side)[2]
    depth, part = cast(world, t, rays)
    ids = np.where(part >= 0, world["owner"][np.maximum(part, 0)], part)
    motion = np.ones((side * side, 4), np.float32)
    motion[:, :2] = 0
    before = max(t - 1, 0)
    for body in np.unique(ids[ids >= 0]):
        own = ids == body
        points = EYE + depth[own, None] * rays[own]
        local = (points - world["centre"][t, body]) @ world["rotation"][t, body]
        earlier = world["centre"][before, body] + local @ world["rotation"][before, body].T
        motion[own, :2] = project(earlier, side) - project(points, side)
    return (np.round(255 * fine).astype(np.uint8), motion.reshape(side, side, 4),
            depth.astype(np.float32).reshape(side, side), ids.reshape(side, side))


def record(name, folder, frames, trailing, seed, side):
    """Simulates a scene and writes it in the document's layout."""
    world = simulate(name, frames + trailing, seed)
    for kind in ("rgb", "motion_vectors", "distance_to_camera"):
        (folder / kind).mkdir(parents=True)
    for t in range(frames + trailing):
        rgb, motion, depth, _ = render(world, t, side)
        # The first frame has none before it: its file is an empty array, as in the real set.
        np.save(folder / f"motion_vectors/step_{t:04d}.npy", motion if t else np.zeros(0, np.float32))
        if t < frames:
            Image.fromarray(rgb).save(folder / f"rgb/step_{t:04d}.png")
            np.save(folder / f"distance_to_camera/step_{t:04d}.npy", depth)


def simulate_scenes(root, side, seed=0, most=0, recordings=3, scenes=SCENES):
    """Writes the scenes under root, env_0, env_1, ... of each that moves: `recordings` with other bodies, at
    most `most` frames (0: all). Whole, or not at all. They may be there; UserError where others are."""
    root = Path(root)
    made_of = {"side": side, "seed": seed, "frames": most, "recordings": recordings, "scenes": list(scenes)}
    if root.exists():
        kept = root / "simulated.json"
        if not kept.is_file() or json.loads(kept.read_text()) != made_of:
            raise UserError(f"{root} holds other scenes: remove it, or name what you want with --data_dir")
        return
    work = root.with_name(root.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        jobs = []
        for name in scenes:
            frames, trailing, _ = SCENES[name]
            for take in range(1 if "static" in name or "light" in name else recordings):
                jobs.append(pool.submit(record, name, work / name / f"env_{take}/0/0",
                                        min(frames, most or frames), trailing, seed + take, side))
        for job in tqdm(jobs, "simulate", unit="recording"):
            job.result()
    common.write_json(work / "simulated.json", made_of)
    work.rename(root)


# ---- data: cache ----------------------------------------------------------------------------------------

def split_scenes(scenes):
    """Whole scenes only, with all their recordings: of seven in the order of names the 4th is for validation,
    the 6th for the test. Of the document's 21 a ramp, dominoes and an occluder are tested on."""
    names = sorted({scene.name for scene in scenes})
    if len(names) < 3:
        raise UserError(f"{len(names)} scenes cannot be split into train, val and test: three at least")
    place = {name: {3: "val", 5: "test"}.get(i % 7, "train") for i, name in enumerate(names)}
    if len(names) < 7:
        place |= {names[-2]: "val", names[-1]: "test"}
    return {part: [s for s in scenes if place[s.name] == part] for part in ("train", "val", "test")}


def choose_clips(scenes, part, args):
    """-> dicts of scene, start, stride, flip, zoom, angle, colours: random ones of the training scenes, plain
    and evenly spaced ones of the others. Scenes too short for --frames at any stride have none."""
    rng, clips, train = np.random.default_rng(0), [], part == "train"
    strides = sorted(int(k) for k in args.strides.split(","))
    for scene in scenes:
        fit = [k for k in strides if (args.frames - 1) * k < len(scene.steps)]
        if not fit:
            continue
        for i in range(args.clips if train else args.eval_clips):
            stride = int(rng.choice(fit)) if train else fit[len(fit) // 2]
            room = len(scene.steps) - (args.frames - 1) * stride
            start = int(rng.integers(room)) if train else (2 * i + 1) * room // (2 * args.eval_clips)
            near = train and args.zoom > 1 and i % 3 > 0
            clips.append({"scene": scene, "start": start, "stride": stride,
                          "flip": bool(train and rng.random() < .5),
                          "zoom": (rng.uniform(1, args.zoom), *rng.random(2)) if near else (1., 0., 0.),
                          "angle": rng.uniform(0, 2 * math.pi) if near else 0.,
                          "colours": rng.permutation(3) if train and args.permute_colours else np.arange(3)})
    return clips


def turned(clip, angle):
    """read_clip's dict turned about the middle; what comes from outside is not valid."""
    T, _, H, W = clip["video"].shape
    c, s = math.cos(angle), math.sin(angle)
    grid = F.affine_grid(torch.tensor([[[c, -s * H / W, 0], [s * W / H, c, 0]]]), (1, 3, H, W), False)
    grid = grid.expand(T, -1, -1, -1)
    pick = lambda x: F.grid_sample(x.float(), grid, mode="nearest", align_corners=False)
    video = F.grid_sample(clip["video"].float(), grid, padding_mode="border", align_corners=False)
    dx, dy = pick(clip["motion"]).unbind(1)
    masks = {name: pick(clip[name][:, None])[:, 0] > 0 for name in ("motion_valid", "depth_valid")}
    return {"video": video.round().to(torch.uint8), "depth": pick(clip["depth"][:, None])[:, 0],
            "motion": torch.stack([c * dx + s * dy, c * dy - s * dx], dim=1), **masks}


def read_augmented(clip, args):
    """A clip of choose_clips -> read_clip's dict. Two in three are for motion alone, which remains what is
    seen when a part is enlarged and turned; their depth would be another one."""
    record = read_clip(clip["scene"], clip["start"], clip["stride"], args.frames, args.height, args.width,
                       clip["flip"], clip["zoom"])
    record["video"] = record["video"][:, clip["colours"].tolist()]
    record = turned(record, clip["angle"]) if clip["angle"] else record
    record["asked"] = torch.tensor(clip["zoom"][0] == 1)
    record["depth_valid"] = record["depth_valid"] & record["asked"]
    return record


def read_clips(clips, part, args):
    """Clips of a scene, in a process of its own -> {name: numpy array, n ...}: the video, and the targets at
    their size, of held-out scenes at full size."""
    records = [read_augmented(clip, args) for clip in clips]
    stacked = {name: torch.stack([record[name] for record in records]).numpy() for name in records[0]}
    if part == "train":
        step = args.height // args.target_height
        for name in ("motion", "motion_valid", "depth", "depth_valid"):
            stacked[name] = np.ascontiguousarray(stacked[name][..., step // 2::step, step // 2::step])
        stacked["motion"] = stacked["motion"].astype(np.float16)
    return stacked


def read_ahead(jobs):
    """Yields read_clips(*job) as tensors, job by job, read by other processes and little more than one each
    ahead: a scene's clips take 1 GB at paper scale. Arrays travel, not tensors: those need /dev/shm."""
    own_share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers, waiting = min(max(1, own_share), 8), []
    take = lambda: {name: torch.from_numpy(array) for name, array in waiting.pop(0).result().items()}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"),
                             torch.set_num_threads, (1,)) as pool:         # forked, OpenMP would hang
        for job in jobs:
            waiting.append(pool.submit(read_clips, *job))
            if len(waiting) > workers:
                yield take()
        while waiting:
            yield take()


def build_cache(args, run):
    """Latents, text embeddings, targets of all clips, written once; then VAE and text encoder leave memory.

    cache/<part>_<number>_<scene>.safetensors: latents n C F h w, text L D, motion n T 2 h w, depth n T h w,
    their masks in --target_height rows; held-out scenes at full size, with the video n T 3 H W uint8.
    index.json, written last, holds what all of it was made of: another set or other flags make it anew.
    """
    folder = Path(args.data_dir) / "cache"
    scenes = find_scenes(args.data_dir)
    files = [path for scene in scenes for paths in scene.paths.values() for path in paths.values()]
    stats = [path.stat() for path in files]
    made_of = {"files": len(files), "bytes": sum(s.st_size for s in stats),
               "newest": max(s.st_mtime_ns for s in stats),
               "prompts": [[scene.name, scene.prompt] for scene in scenes],
               **{name: getattr(args, name) for name in CACHE_FLAGS}}
    index = folder / "index.json"
    if index.is_file() and json.loads(index.read_text())["made_of"] == made_of:
        return
    if run.rank == 0:
        tested = convention_test(scenes)
        problem = tested["best"] and verdict(tested)       # what hardly moves cannot fail
        if problem:
            raise UserError(f"{args.data_dir}: {problem}; python {SCRIPT}.py --check --data_dir "
                            f"{args.data_dir} shows the table")
    parts = split_scenes(scenes)
    clips = {part: choose_clips(own, part, args) for part, own in parts.items()}
    for part, own in clips.items():
        if not own:
            raise UserError(f"no scene of split {part} has {args.frames} frames at a stride of --strides "
                            f"{args.strides}")
    run.barrier()
    if run.rank == 0:                            # only now: the old one may have taken hours
        if index.is_file():
            print(f"{folder} was made of other data or flags: making it anew")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    run.barrier()
    if args.model == "tiny" and run.rank == 0:
        some = clips["train"][::max(1, len(clips["train"]) // 40)]
        videos = torch.stack([from_uint8(read_augmented(clip, args)["video"]) for clip in some])
        codec = common.LinearCodec.fit(videos, TINY["transformer"]["in_channels"])
        common.save_weights(folder / "codec.safetensors", codec.tensors)
    run.barrier()
    vae, encode_prompt = load_codec(args, run), text_encoder(args, run)
    shards = [(part, scene, [clip for clip in clips[part] if clip["scene"] is scene])
              for part, own in parts.items() for scene in own]
    shards = [(number, *shard) for number, shard in enumerate(shards) if shard[-1]][run.rank::run.world]
    records = read_ahead([(own, part, args) for _, part, _, own in shards])
    for (number, part, scene, _), tensors in zip(tqdm(shards, "cache", disable=run.rank > 0), records):
        video = tensors.pop("video") if part == "train" else tensors["video"]
        latents = [common.wan_encode(vae, from_uint8(v)[None].to(run.device)).cpu() for v in video]
        tensors["latents"] = torch.cat(latents).to(torch.float32 if args.model == "tiny" else torch.bfloat16)
        tensors["text"] = encode_prompt(scene.prompt)
        common.save_weights(folder / f"{part}_{number:03d}_{scene.name}.safetensors", tensors)
    run.barrier()
    if run.rank == 0:
        logs = []
        for file in sorted(folder.glob("train_*.safetensors")):
            t = common.load_weights(file)
            logs.append(t["depth"][t["depth_valid"]].float().log()[::7])
        logs = torch.cat(logs)
        common.write_json(index, {"made_of": made_of, "mean": logs.mean().item(), "std": logs.std().item(),
                                  "clips": {part: len(own) for part, own in clips.items()},
                                  "scenes": {part: sorted({s.name for s in own})
                                             for part, own in parts.items()}})
    run.barrier()


EVERYTHING = ("latents", "motion", "motion_valid", "depth", "depth_valid", "asked", "video")


class Clips:
    """A split of the cache, in memory: 2 GB at paper scale."""
    def __init__(self, args, part):
        folder = Path(args.data_dir) / "cache"
        self.index, self.length = json.loads((folder / "index.json").read_text()), args.text_length
        self.depth_scale = [self.index["mean"], self.index["std"]]
        shards = {path.stem.removeprefix(f"{part}_"): common.load_weights(path)
                  for path in sorted(folder.glob(f"{part}_*.safetensors"))}
        self.rows = [(name[4:], shard, i) for name, shard in shards.items()
                     for i in range(len(shard["latents"]))]
        self.plain = [i for i, (_, shard, row) in enumerate(self.rows) if shard["asked"][row]]

    def get(self, numbers, names, device):
        """-> {name: stacked rows}, and "text", padded with zeros as Wan was trained."""
        rows = [self.rows[i][1:] for i in numbers]
        batch = {name: torch.stack([shard[name][i] for shard, i in rows]).to(device) for name in names}
        for name in {"latents", "motion", "depth"} & batch.keys():
            batch[name] = batch[name].float()
        batch["text"] = common.pad_text([shard["text"] for shard, _ in rows], self.length).to(device)
        if "motion" in batch:
            batch["moving"] = batch["motion_valid"] & (speed(batch["motion"]) > MOVING)
        return batch

    def targets(self, numbers, device):
        """What PhysicsModel trains on (see physics_loss)."""
        return self.get(numbers, EVERYTHING[:-1], device)


# ---- evaluate and sample --------------------------------------------------------------------------------

def depth_scores(d, truth, mask):
    """d, truth T H W in metres, mask T H W: pixels that count -> {metric: mean over them} (Eigen 2014,
    and SILog as in KITTI)."""
    d, truth = d[mask].double(), truth[mask].double()
    e = d.log() - truth.log()
    worst = e.abs().exp()
    return {"abs_rel": ((d - truth).abs() / truth).mean(), "sq_rel": ((d - truth) ** 2 / truth).mean(),
            "rmse": (d - truth).square().mean().sqrt(), "rmse_log": e.square().mean().sqrt(),
            **{f"delta{n}": (worst < 1.25 ** n).double().mean() for n in (1, 2, 3)},
            "silog": 100 * (e.square().mean() - e.mean() ** 2).clamp(min=0).sqrt()}


def motion_scores(f, truth, mask):
    """f, truth T 2 H W in px -> end-point error; KITTI's outliers are off by 3 px and 5 % of the length."""
    error = speed(f - truth)[mask].double()
    length = speed(truth)[mask].double()
    return {"epe": error.mean(), "outliers_1px": (error > 1).double().mean(),
            "fl": ((error > 3) & (error > .05 * length)).double().mean()}


def clip_scores(motion, depth, sky, clip):
    """What a prediction is worth on one clip -> {metric: number}; NaN where nothing counts. Depth is scored
    where there is one, whatever the prediction takes for sky; that has a score of its own."""
    valid, moving = clip["depth_valid"], clip["moving"]
    scaled = depth * (clip["depth"][valid] / depth[valid]).median()
    score = lambda still, moved: {**depth_scores(depth, clip["depth"], still),
                                  **motion_scores(motion, clip["motion"], moved)}
    out = score(valid, clip["motion_valid"])
    out |= {f"{name}_moving": value for name, value in score(valid & moving, moving).items()}
    aligned = depth_scores(scaled, clip["depth"], valid)
    out |= {f"{name}_scaled": aligned[name] for name in ("abs_rel", "delta1")}
    return {k: float(v) for k, v in out.items()} | {"sky_accuracy": float((sky != valid).double().mean())}


def mean_scores(rows):
    return {name: float(np.nanmean([row[name] for row in rows])) if any(
        np.isfinite(row[name]) for row in rows) else math.nan for name in rows[0]}


@torch.no_grad()
def predict(model, batch, sigma, seed, args):
    """Heads' reading of clips whose latents are noised to `sigma` -> what read_out gives."""
    z = batch["latents"]
    _, y = model(z, fixed_noise(z, seed), torch.full((len(z),), sigma, device=z.device), batch["text"],
                 velocity=False)
    return read_out(y.float(), (args.height, args.width), model.heads.depth_scale)


def describe_data(args):
    simulated = (Path(args.data_dir) / "simulated.json").exists()
    return (f"{args.data_dir}{', SIMULATED by this script' if simulated else ''}, {args.height}x"
            f"{args.width}, {args.frames} frames")


def mean_depth_map(args, clips):
    """The mean depth of each pixel over clips -> H W, and the mean of all of them, where none is known."""
    total = torch.zeros(2, args.height, args.width)
    for i in range(0, len(clips.rows), 16):
        batch = clips.get(range(i, min(i + 16, len(clips.rows))), ("depth", "depth_valid"), "cpu")
        depth, valid = batch["depth"], batch["depth_valid"]
        sums = torch.stack([torch.where(valid, depth, 0.).sum((0, 1)), valid.float().sum((0, 1))])
        total += F.interpolate(sums[None], total.shape[1:], mode="nearest")[0]
    seen = total[1] > 0
    fallback = (total[0][seen].sum() / total[1][seen].sum()).item()
    return torch.where(seen, total[0] / total[1].clamp(min=1), fallback), fallback


def trivial_guesses(clip, mean_depth, fallback):
    """What needs no model -> {name: (motion T 2 H W, depth T H W, sky T H W)}."""
    zero, sky = torch.zeros_like(clip["motion"]), ~clip["depth_valid"][0]      # as in the frame that is given
    first = torch.where(clip["depth_valid"][0], clip["depth"][0], fallback)
    pairs = {"mean_depth_zero_motion": (zero, mean_depth), "copy": (clip["motion"][1].expand_as(zero), first)}
    return {name: (motion, depth.expand_as(clip["depth"]), sky.expand_as(clip["depth"]))
            for name, (motion, depth) in pairs.items()}


def evaluate(args, run, models, data):
    """Metrics on scenes that no training saw, at full resolution -> eval.json, curves.png. models: {name:
    model}, of which "model" is what the run is about; the others are controls. Processes share the clips."""
    began, clips, tables, flow = time.time(), data["test"], {}, {}
    usual = mean_depth_map(args, data["train"])
    for i in range(run.rank, len(clips.rows), run.world):
        batch = clips.get([i], EVERYTHING, run.device)
        clip, scene = {name: value[0].cpu() for name, value in batch.items()}, clips.rows[i][0]
        guesses = trivial_guesses(clip, *usual)
        for name, model in models.items():
            for sigma in SIGMAS if name == "model" else (PROBE,):
                with run.autocast():
                    guess = predict(model, batch, sigma, i, args)
                guesses[name if sigma == PROBE else f"{name}_sigma{sigma}"] = [x[0].cpu() for x in guess]
        for name, guess in guesses.items():
            tables.setdefault(name, []).append((scene, clip_scores(*guess, clip)))
        for name, value in flow_losses(models["model"], batch, i, run).items():
            flow.setdefault(name, []).append(value)
    tables, flow = (common.gather_rows(rows) for rows in (tables, flow))
    means = {name: mean_scores([row for _, row in rows]) for name, rows in tables.items()}
    for name, rows in tables.items():
        for scene in {scene for scene, _ in rows}:
            own = mean_scores([row for its, row in rows if its == scene])
            means[name][f"epe_moving_{scene.removeprefix('test_')}"] = own["epe_moving"]
    if run.rank == 0:
        flow = {f"flow_loss_{name}": float(np.mean(values)) for name, values in flow.items()}
        report(args, means, flow, clips.index["scenes"]["test"], time.time() - began)


def flow_losses(model, batch, seed, run):
    """The flow-matching loss of a clip at three noise levels, with the adapter and, where there is one,
    without: heads must not cost the model what it generates."""
    out, z = {}, batch["latents"]
    plain = {"adapter_off": model.dit.disable_adapters} if has_adapter(model.dit) else {}
    for name, switch in {"heldout": lambda: None, **plain}.items():
        switch()
        losses = []
        for sigma in SIGMAS:
            noise = fixed_noise(z, seed)
            with torch.no_grad(), run.autocast():
                v, _ = model(z, noise, torch.full((len(z),), sigma, device=z.device), batch["text"])
            losses.append(F.mse_loss(v[:, :, 1:].float(), (noise - z)[:, :, 1:]).item())
        out[name] = float(np.mean(losses))
    if plain:
        model.dit.enable_adapters()
    return out


def report(args, means, flow, scenes, seconds):
    """Writes eval.json, prints it as a table, draws curves.png."""
    own, base = means["model"], means["mean_depth_zero_motion"]
    noisy = {f"{key}_{name.removeprefix('model_')}": row[key] for name, row in means.items()
             if name.startswith("model_") for key in ("epe_moving", "abs_rel_moving", "abs_rel", "epe")}
    common.write_json(Path(args.output_dir) / "eval.json", {
        "script": SCRIPT, "preset": args.preset, "data": describe_data(args), "weights": args.weights,
        "seconds": seconds, "headline": {"metric": "epe_moving", "value": own["epe_moving"],
                                         "baseline": base["epe_moving"], "lower_is_better": True},
        "results": {**own, **noisy, **flow},
        "baselines": {name: row for name, row in means.items() if not name.startswith("model")}})
    shown = ("abs_rel", "abs_rel_moving", "delta1", "delta1_moving", "rmse", "silog", "epe", "epe_moving",
             "fl_moving")
    print(f"held-out scenes {', '.join(scenes)}, at {args.height}x{args.width}")
    print(f"{'':>24}" + "".join(f"{name:>16}" for name in shown))
    for name, row in means.items():
        print(f"{name:>24}" + "".join(f"{row[metric]:16.3f}" for metric in shown))
    print(f"on moving pixels: AbsRel {own['abs_rel_moving'] / base['abs_rel_moving']:.2f} x the mean-depth "
          f"map's, EPE {own['epe_moving'] / base['epe_moving']:.2f} x zero motion's")
    print("by scene, EPE on moving pixels against zero motion's: " + ", ".join(
        f"{name.removeprefix('epe_moving_')} {own[name]:.2f} / {base[name]:.2f}" for name in sorted(own)
        if name.startswith("epe_moving_")))
    print("flow loss on held-out scenes: " + ", ".join(
        f"{name.removeprefix('flow_loss_')} {value:.4f}" for name, value in flow.items()))
    keys = [key for part in ("motion_loss", "depth_loss", "flow_loss") for key in (part, f"val_{part}")]
    panels = [common.loss_panel(Path(args.output_dir) / stage, stage.replace(".", args.stage), keys)
              for stage in ("backbone", "heads", ".")]
    common.plot_curves(Path(args.output_dir) / "curves.png", [panel for panel in panels if panel["lines"]])


def motion_picture(motion, scale):
    """T 2 H W px (backward) -> T 3 H W in [-1, 1]: hue is where to, brightness how fast, up to `scale`."""
    import matplotlib.colors
    forward = -motion
    hue = torch.atan2(forward[:, 1], forward[:, 0]) / (2 * math.pi) % 1
    value = (speed(motion) / max(scale, 1e-6)).clamp(0, 1)
    hsv = torch.stack([hue, torch.ones_like(hue), value], dim=-1).numpy()
    return torch.from_numpy(matplotlib.colors.hsv_to_rgb(hsv)).movedim(-1, 1).float() * 2 - 1


def depth_picture(depth, low, high):
    """T H W metres -> T 3 H W in [-1, 1]: log depth from near (bright) to far (dark), sky white."""
    import matplotlib
    value = 1 - ((depth.clamp(1e-3, 1e6).log() - low) / max(high - low, 1e-6)).clamp(0, 1)
    rgb = torch.from_numpy(matplotlib.colormaps["magma"](value.numpy())[..., :3]).float()
    rgb[~torch.isfinite(depth)] = 1
    return rgb.movedim(-1, 1) * 2 - 1


def ranges(truth, motion):
    """Depth T H W in metres (sky inf) and motion T 2 H W -> what pictures are scaled by: a speed that one in
    500 pixels has, and the logarithms of near and far."""
    finite = truth[torch.isfinite(truth)].log()
    fastest = speed(motion).flatten().topk(max(1, motion[:, 0].numel() // 500)).values.min().item()
    return fastest, finite.quantile(.02).item(), finite.quantile(.98).item()


def sample(args, run, models, data):
    """Generates a video per chosen held-out scene from its first frame, and lets the heads read it: one clean
    pass, the final latents at sigma 0.05 with the positive prompt. Also reads the real clip. -> files."""
    if run.rank:
        return []
    model, clips = models["model"], data["test"]
    vae, encode_prompt = load_codec(args, run), text_encoder(args, run)
    folder, files = Path(args.output_dir) / "samples", []
    folder.mkdir(exist_ok=True)
    negative = common.pad_text([encode_prompt(NEGATIVE)], args.text_length).to(run.device)
    names = [name for name, _, _ in clips.rows]
    for stem in list(dict.fromkeys(names))[:args.num_samples]:
        index = names.index(stem)
        batch = clips.get([index], EVERYTHING, run.device)
        z0 = batch["latents"][:, :, :1]
        with run.autocast():
            z = generate(model.dit, z0, batch["text"], negative, args, args.seed + index)
            guesses = {"sampled": predict(model, {"latents": z, "text": batch["text"]}, PROBE, index, args),
                       "read": predict(model, batch, PROBE, index, args)}
        film = {"sampled": common.wan_decode(vae, z)[0].cpu(), "read": from_uint8(batch["video"][0]).cpu()}
        truth = torch.where(batch["depth_valid"][0], batch["depth"][0], math.inf).cpu()
        moved = batch["motion"][0].cpu() * batch["motion_valid"][0].cpu()[:, None]
        fastest, near, far = ranges(truth, moved)
        panels = {"truth": [film["read"], motion_picture(moved, fastest), depth_picture(truth, near, far)]}
        for name, guess in guesses.items():
            motion, depth, sky = (value[0].cpu() for value in guess)
            depth = depth.masked_fill(sky, math.inf)
            panels[name] = [film[name], motion_picture(motion, fastest), depth_picture(depth, near, far)]
            if name == "sampled":
                np.save(folder / f"{stem}_motion.npy", motion.movedim(1, -1).numpy())
                np.save(folder / f"{stem}_depth.npy", depth.numpy())
        files += [folder / f"{stem}_motion.npy", folder / f"{stem}_depth.npy"]
        files += [common.write_video(folder / f"{stem}_{name}.mp4", pages, args.fps)
                  for name, pages in zip(("video", "motion", "depth"), panels["sampled"])]
        panels = {name: torch.cat(pictures, 3) for name, pictures in panels.items()}
        grid = common.video_grid(panels, scale=max(1, 128 // args.height))
        files.append(common.write_video(folder / f"{stem}.mp4", grid, args.fps))
        some = grid[torch.linspace(1, args.frames - 1, 4).round().long()]          # 2 x 2 pages in a picture
        pages = torch.cat([torch.cat([*some[:2]], 2), torch.cat([*some[2:]], 2)], 1)
        files.append(common.write_video(folder / f"{stem}.png", pages[None]))
    return [str(file) for file in files]


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
    """FSDP2 with --fsdp, a block a unit; DDP under torchrun; otherwise the module itself."""
    if args.compile:
        for block in model.dit.blocks:
            block.compile()
    if args.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(run.device.type, (run.world,))
        policy = MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32)
        for block in model.dit.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # By default the root stays gathered until a backward: the step after a validation would compute with
        # the averages.
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

def draw_batch(args, run, clips, step, micro, share):
    """Clips, noise levels and noise of a micro-batch, a function of (seed, step) and of a sample's place in
    the whole batch. A share of the samples has sigma as Wan draws it, for the flow loss. The others are for
    the heads: half at the level where heads are read, half from the density 3 (1 - sigma)^2, since all noise
    holds no answer."""
    seed = common.seed_all(args.seed, 1, step)
    rows = clips.plain if share == 1 else range(len(clips.rows))       # videos are learned as they are
    kinds = {"clip": ("randint", len(rows)), "u": ("rand",), "noise": ("randint", 2 ** 62),
             "coin": ("rand",)}
    numbers = common.draw(kinds, seed, args.batch_size, run.rank, run.world, micro, args.grad_accum)
    wan, read = numbers["coin"] < share, numbers["coin"] > (1 + share) / 2
    sigma = torch.where(wan, shift_sigma(numbers["u"], args.shift), 1 - (1 - numbers["u"]) ** (1 / 3))
    sigma = torch.where(read, torch.tensor(PROBE), sigma)
    batch = clips.targets([rows[i] for i in numbers["clip"].tolist()], run.device)
    if share:
        for name in ("asked", "motion_valid", "depth_valid"):
            batch[name] = batch[name] & expand_to(~wan.to(run.device), batch[name])
    noise = torch.stack([torch.randn(batch["latents"].shape[1:], generator=torch.Generator().manual_seed(n))
                         for n in numbers["noise"].tolist()])
    return batch, noise.to(run.device), sigma.to(run.device)


def run_stage(args, run, data, stage, folder, dit, found=None, only=False, heads_from=None):
    """One stage of training, none where `found` has all steps or `only` it counts -> PhysicsModel with the
    averaged weights. stage: backbone (tiny only: nobody has pretrained weights of that size), heads (the
    backbone is frozen), lora, last_k, full. dit: the backbone, changed in place. heads_from: where to start.
    """
    clips, held = data["train"], data["val"]
    torch.manual_seed(args.seed)                 # equal initial weights on all ranks and after any restart
    model = make_model(args, dit, stage)
    if stage != "backbone":
        model.heads.depth_scale.copy_(torch.tensor(clips.depth_scale))
    if heads_from and not found:
        common.restore_state(model.heads, common.load_weights(heads_from), source=str(heads_from))
    steps, lr = args.max_steps, args.lr
    if stage == "backbone":
        steps, lr = args.backbone_steps, args.backbone_lr
    elif stage == "lora" and args.stage == "all":
        steps, lr = args.lora_steps or steps, args.lora_lr or lr
    share = {"backbone": 1., "heads": 0.}.get(stage, .5)

    def losses(model, step, micro):
        batch, noise, sigma = draw_batch(args, run, clips, step, micro, share)
        with run.autocast():
            return model(batch["latents"], noise, sigma, batch["text"], batch, velocity=share > 0)

    def validate(model):
        rows, totals = range(0, len(held.rows), args.batch_size), {}
        for i in rows:
            batch = held.targets(range(i, min(i + args.batch_size, len(held.rows))), run.device)
            z = batch["latents"]
            sigma = torch.full((len(z),), .5 if stage == "backbone" else PROBE, device=z.device)
            noise = torch.cat([fixed_noise(one[None], i + k) for k, one in enumerate(z)])
            with run.autocast():
                loss, parts = model(z, noise, sigma, batch["text"], batch, velocity=share > 0)
            for name, value in {"loss": loss, **parts}.items():
                totals[f"val_{name}"] = totals.get(f"val_{name}", 0) + value.item() / len(rows)
        return totals

    if found and (only or found[2]["step"] >= steps):
        common.restore_state(model, found[1]["ema"], source=str(found[0]), trained_only=True)
        return model.eval()
    fit(args, run, folder, model, losses, validate, found, steps, lr)
    export(args, run, model, stage, folder)
    if args.fsdp:                                # evaluation shares out clips: each process has a whole model
        weights, _ = common.gather_state(model, everywhere=True)
        model = make_model(args, wan_part(args, run, "transformer", trunk_dtype(args)), stage)
        common.restore_state(model, weights, source="this run")
    return model.eval()


def run_stages(args, run, data, found, only=False):
    """What --stage asks for, each stage going on from its own checkpoint -> {"model": PhysicsModel, and with
    --stage all also stage 1's "heads", and the control "random_backbone"}."""
    folder = Path(args.output_dir)
    if run.rank == 0 and not only:
        common.write_json(folder / "args.json", {**public_flags(args), **common.provenance()})

    def stage(name, place, dit, **options):
        before = common.find_checkpoint(folder / place / "ckpt", SCRIPT,
                                        "none" if args.resume == "none" else "auto")
        return run_stage(args, run, data, name, folder / place, dit, before, only and bool(before), **options)

    dit = wan_part(args, run, "transformer", trunk_dtype(args))
    untrained = copy.deepcopy(dit) if args.controls and args.stage == "all" else None
    if args.model == "tiny" and args.backbone_steps:
        dit = stage("backbone", "backbone", dit).dit
    if args.stage != "all":
        return {"model": run_stage(args, run, data, args.stage, folder, dit, found, only, args.heads)}
    models = {"heads": stage("heads", "heads", dit)}
    if args.controls:
        models["random_backbone"] = stage("heads", "heads_random", untrained)
    first = folder / "heads/final/heads.safetensors"
    tuned = run_stage(args, run, data, "lora", folder, copy.deepcopy(dit), found, only, first)
    return {"model": tuned, **models}


def prepare(args, run):
    """Scenes (simulated for the tiny preset's own folder) and their cache -> {part: Clips}."""
    if run.rank == 0 and args.preset == "tiny" and args.data_dir == PRESETS["tiny"]["data_dir"]:
        simulate_scenes(args.data_dir, args.height, 0, args.sim_frames, args.sim_recordings)
    run.barrier()
    build_cache(args, run)
    data = {part: Clips(args, part) for part in ("train", "val", "test")}
    if run.rank == 0:
        print(", ".join(f"{part}: {len(clips.rows)} clips of {len(clips.index['scenes'][part])} scenes"
                        for part, clips in data.items()))
    return data


def dry_run(args):
    """Prints what each stage costs, from the meta device: nothing is allocated, nothing is read."""
    world, B = int(os.environ.get("WORLD_SIZE", 1)), args.batch_size
    run = argparse.Namespace(device=torch.device("meta"))
    side = common.LinearCodec.side if args.model == "tiny" else 16
    for stage in ("heads", "lora") if args.stage == "all" else (args.stage,):
        own = argparse.Namespace(**{**vars(args), "random_init": True, "stage": stage})
        with torch.device("meta"):
            dit = wan_part(own, run, "transformer", trunk_dtype(own))
            model = make_model(own, dit, stage)
            F_, h, w = (args.frames - 1) // 4 + 1, args.height // side, args.width // side
            z, rows = torch.randn(B, dit.config.in_channels, F_, h, w), args.target_height
            mask = torch.ones(B, args.frames, rows, rows * args.width // args.height, dtype=torch.bool)
            batch = {"motion": torch.randn(B, args.frames, 2, *mask.shape[2:]), "moving": mask,
                     "depth": torch.randn(mask.shape), "motion_valid": mask, "depth_valid": mask,
                     "asked": mask[:, 0, 0, 0]}
            text = torch.randn(B, args.text_length, dit.config.text_dim)

            def loss():
                with torch.autocast("cpu", torch.bfloat16, enabled=args.model != "tiny"):
                    return model(z, z, torch.rand(B), text, batch, velocity=stage != "heads")[0]

            print(common.dry_run_report(f"stage {stage}", model, loss, B, F_ * h * w // 4, world,
                                        args.fsdp or stage == "full"))
    print(f"  heads {common.count_params(model.heads):,}; stage full needs --fsdp: weights, gradients and "
          f"moments are shared by the processes of torchrun ({world} here)")


# ---- main -----------------------------------------------------------------------------------------------

def work(args):
    folder = Path(args.output_dir)
    if args.check:
        return check(args.data_dir)
    only = args.sample or args.eval
    found = None if args.dry_run else common.find_checkpoint(
        folder / "ckpt", SCRIPT, args.resume, train=not only)
    if found:
        adopt(args, found[2]["args"], ("preset", *MODEL_FLAGS), str(found[0]))
    check_args(args)
    if args.dry_run:
        return dry_run(args)
    if args.heads and not found:
        common.load_weights(args.heads)          # one that cannot be read is noticed here, not hours later
    run = Run(args)
    args.weights = f"{args.weights_from}" + (" shape, RANDOM weights" if args.random_init else "")
    if args.model == "tiny":
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
                  + (", about 9 minutes on 2 cores" if args.preset == "tiny" else ""))
    if run.rank == 0:
        common.copy_stages(found, folder, ["backbone", "heads", "heads_random"])
    data = prepare(args, run)
    models = run_stages(args, run, data, found, only and bool(found))
    written = []
    if args.eval or not only:
        evaluate(args, run, models, data)
        written = [f"{folder}/eval.json", f"{folder}/curves.png"]
    if args.sample or not only:
        written += sample(args, run, models, data)
    if run.rank == 0:
        common.show_results(folder, written, args.tensorboard, args.wandb)
        print("wrote " + ", ".join(written))
    run.barrier()
    run.close()


def main(argv=None):
    return common.one_line_errors(f"{SCRIPT}.py", lambda: work(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
