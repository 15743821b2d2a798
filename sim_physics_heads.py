"""sim_physics_heads.py: predicts motion and depth from the hidden states of a video diffusion model.

Reference   Windsao/Sim4VideoGen, on Wan2.2-TI2V-5B (arXiv:2503.20314). Stage 1 trains heads on the frozen
            backbone, stage 2 trains LoRA adapters of the backbone together with the heads.
Equations   x_s = (1 - s) z + s eps, frame 0 clean; v = eps - z     -> add_noise, PhysicsModel
            s = shift u / (1 + (shift - 1) u)                       -> shift_sigma; heads: density 3 (1 - s)^2
            hidden states of v = Wan(x_s, 1000 s, text)             -> run_backbone
            motion, log depth and sky of every frame                -> PhysicsHeads, QUANTITIES
            dx/ds = v from s = 1 to 0, by Euler                     -> generate
Run         python sim_physics_heads.py                      # simulate, train, evaluate: 5 to 7 min, 2 cores
            python sim_physics_heads.py --sample --num_samples 3                  # or --eval
            torchrun --nproc_per_node=8 sim_physics_heads.py --preset ti2v_5b --data_dir data/Sim_Physics
            torchrun --nproc_per_node=8 sim_physics_heads.py --preset ti2v_5b_lora --output_dir runs/lora
Data        data/sim_physics_heads/: prepare.py simulates, check.py checks the layout, clips.py cuts clips.
Shapes      B batch  T frames  F = (T - 1) / 4 + 1 latent frames  C latent channels  H W pixels  h w latent
            cells  N = F h/2 w/2 tokens  D width  L text tokens. Videos are B T 3 H W in [-1, 1]; motion is in
            pixels, previous minus current position, x to the right, y down; depth in metres along the ray.
"""
import argparse
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from tqdm import tqdm

import common
from common import UserError, apply_colormap, at_least, expand_to, from_uint8

SCRIPT = "sim_physics_heads"
MOVING = 0.5                             # pixels per frame: faster pixels count as moving
READ_SIGMA = 0.05                        # noise level at which the heads predict
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
NEGATIVE_PROMPT = ("vivid tones, overexposed, static, blurred details, subtitles, style, still picture, "
                   "grey, worst quality, JPEG artifacts, ugly, deformed, messy background, walking backwards")

# ---- presets and flags ----------------------------------------------------------------------------------

PRESETS = {
    "tiny": dict(
        model="tiny", stage="all", data_dir=f"data/{SCRIPT}/simulated", height=64, width=64, frames=17,
        strides="1,2", permute_colours=True, clips=5, text_length=64, taps="0,2", head_width=64,
        head_blocks=2, batch_size=8, max_steps=1100, lora_steps=150, backbone_steps=500, lr=6e-3,
        lora_lr=5e-4, backbone_lr=3e-3, warmup_steps=50, lora_rank=8, ema_decay=0.99, num_inference_steps=20,
        guidance_scale=1.0, eval_every=200, save_every=200),
    # The reference project's stage 1: 10 epochs of 2,100 clips, 8 clips per optimizer step.
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
    "text_encoder": {"vocab_size": 259, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2,
                     "num_layers": 2},
}
# These flags determine the architecture or what it computes: a checkpoint's values apply.
MODEL_FLAGS = ("model", "stage", "head_width", "head_blocks", "cells", "taps", "lora_rank", "text_length")
# The cache depends on these flags and on the data set's files.
CLIP_FLAGS = ("height", "width", "frames", "strides", "clips", "eval_clips")
CACHE_FLAGS = ("model", "weights_from", "random_init", "permute_colours", "cells", "text_length", *CLIP_FLAGS)


def build_parser():
    parser = common.Parser(SCRIPT, PRESETS, __doc__.split("\n")[0], fsdp=False)
    add = parser.add_argument_group("data").add_argument
    add("--height", type=at_least(32), default=480, help="pixels, a multiple of 32")
    add("--width", type=at_least(32), default=480, help="pixels, a multiple of 32")
    add("--frames", type=at_least(5), default=49, help="frames of a clip, 4k + 1")
    add("--strides", default="1,2", help="simulation steps between frames; training clips draw one at random")
    add("--clips", type=at_least(1), default=16, help="clips of each training recording to cache")
    add("--eval_clips", type=at_least(1), default=2, help="clips of each held-out recording to cache")
    add("--permute_colours", action=argparse.BooleanOptionalAction, default=False,
        help="permute the colour channels of training clips at random")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=["ti2v_5b", "tiny"], default="ti2v_5b", help="tiny: small Wan, linear codec")
    add("--weights_from", default="Wan-AI/Wan2.2-TI2V-5B-Diffusers", metavar="FOLDER|HUB_ID",
        help="diffusers folder, hub id, or folder with the official files")
    add("--random_init", action="store_true", help="random weights in Wan's architecture, to measure speed")
    add("--taps", default="", help="blocks whose outputs the heads read, such as 0,8,15,23 (empty: quarters)")
    add("--head_width", type=at_least(1), default=256, help="channels of the heads")
    add("--head_blocks", type=at_least(0), default=3, help="residual blocks of the heads")
    add("--cells", type=at_least(1), default=4, help="output rows and columns of the heads per latent cell")
    add("--text_length", type=at_least(1), default=512, help="tokens of a prompt, padding included")
    add = parser.add_argument_group("stages, loss and sampling").add_argument
    add("--stage", choices=["heads", "lora", "all"], default="heads",
        help="what to train; all: backbone (tiny only), heads, then lora")
    add("--heads", metavar="FILE", help="heads.safetensors of stage heads, to initialise stage lora")
    add("--lora_rank", type=at_least(1), default=32, help="rank and alpha of LoRA")
    add("--lora_steps", type=at_least(1), default=1000, help="optimizer steps of stage lora in --stage all")
    add("--lora_lr", type=at_least(0, float), default=0.0, help="peak lr of lora in --stage all (0: --lr)")
    add("--backbone_steps", type=at_least(0), default=0, help="optimizer steps of the tiny backbone")
    add("--backbone_lr", type=at_least(0, float), default=1e-3, help="peak learning rate of the backbone")
    add("--motion_weight", type=at_least(0, float), default=1.0, help="weight of the motion loss")
    add("--depth_weight", type=at_least(0, float), default=1.0, help="weight of the depth loss")
    add("--shift", type=at_least(1e-3, float), default=5.0, help="shift of Wan's noise schedule")
    add("--num_inference_steps", type=at_least(1), default=50, help="sampler steps per video")
    add("--guidance_scale", type=at_least(0, float), default=5.0, help="classifier-free guidance (1: none)")
    add("--num_samples", type=at_least(1), default=3, help="clips to sample (3: best, median and worst)")
    return parser


def parse_args(argv=None):
    """-> flags, checkpoint or None, the reason for the preset."""
    get_data = "render scenes with Isaac Sim's Replicator, or name yours with --data_dir"
    args, checkpoint, why_preset = common.parse_args(build_parser(), argv, MODEL_FLAGS, get_data=get_data)
    if args.height % 32 or args.width % 32:
        raise UserError(f"--height and --width must be multiples of 32, not {args.height} and {args.width}")
    if args.frames % 4 != 1:
        raise UserError(f"--frames must be 4k + 1, not {args.frames}, for Wan's VAE")
    if args.height % target_size(args)[0]:
        raise UserError(f"--cells must divide a latent cell's 8 (tiny) or 16 pixels, not {args.cells}")
    for name, pattern in (("strides", r"[1-9]\d*(,[1-9]\d*)*"), ("taps", r"(\d+(,\d+)*)?")):
        if not re.fullmatch(pattern, getattr(args, name)):
            raise UserError(f"--{name} must be numbers such as 1,2,4, not {getattr(args, name)}")
    if args.stage == "lora" and not (args.heads or args.dry_run):
        raise UserError(f"--stage lora starts from trained heads: run python {SCRIPT}.py --stage heads, "
                        f"then pass --heads FILE")
    if args.heads and args.stage != "lora":
        raise UserError("--heads only initialises --stage lora: add --stage lora, or leave it out")
    return args, checkpoint, why_preset


# ---- model: backbone ------------------------------------------------------------------------------------

class EarlyExit(Exception):
    """Ends the backbone's forward after the last block that the heads read."""


def run_backbone(dit, x, t, text, taps=(), velocity=True):
    """diffusers' forward, with hooks that capture hidden states: x B C F h w latents, t B N timestep of each
    token (0 to 1000), text B L D. taps: block numbers from 1, 0 is the patch embedding. Without `velocity` it
    stops after the last tap. -> velocity B C F h w or None, [hidden states B N D], time embedding B N D."""
    captured = {}
    last = max(taps, default=0) or "time"        # the time embedding comes after the patch embedding

    def capture(name):
        def hook(module, inputs, output):
            captured[name] = output
            if name == last and not velocity:
                raise EarlyExit
        return hook

    modules = {0: dit.patch_embedding, "time": dit.condition_embedder}
    modules |= {n: dit.blocks[n - 1] for n in taps if n}
    hooks = [module.register_forward_hook(capture(name)) for name, module in modules.items()]
    dtype = dit.patch_embedding.weight.dtype
    try:
        v = dit(x.to(dtype), t, text.to(dtype), return_dict=False)[0]
    except EarlyExit:
        v = None
    finally:
        for hook in hooks:
            hook.remove()
    captured[0] = captured[0].flatten(2).transpose(1, 2)
    return v, [captured[n] for n in taps], captured["time"][0]


def add_noise(z, noise, sigma):
    """x_sigma = (1 - sigma) z + sigma eps. Latent frame 0, the conditioning image, stays clean.
    z, noise B C F h w, sigma B -> x, and sigma of each token B F h/2 w/2."""
    s = expand_to(sigma, z).expand(-1, 1, z.shape[2], z.shape[3] // 2, z.shape[4] // 2).clone()
    s[:, :, 0] = 0
    x = (1 - expand_to(sigma, z)) * z + expand_to(sigma, z) * noise
    return torch.cat([z[:, :, :1], x[:, :, 1:]], dim=2), s[:, 0]


# ---- model: heads ---------------------------------------------------------------------------------------

class ResBlock(nn.Module):
    """x + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))), 3x3x3, with conv2 zero at initialisation."""
    def __init__(self, channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(1, channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(1, channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class PhysicsHeads(nn.Module):
    """Predicts all channels of QUANTITIES in every frame from hidden states after several blocks.

    A token covers 4 frames (in latent frame 0, a single one) of 2 x 2 latents. Hidden states are normalised,
    projected, summed, modulated by the time embedding, rearranged to the latent grid, processed by 3x3x3
    convolutions and rearranged to 4 frames x cells x cells. The last layer predicts a residual to `mean`,
    which holds the training set's mean maps of log depth and sky: a static background has residual 0.
    """
    def __init__(self, D, num_taps, args):
        super().__init__()
        width = args.head_width
        self.cells = args.cells
        self.channels = [quantity.channels for quantity in QUANTITIES.values()]
        self.register_buffer("mean", torch.zeros(sum(self.channels), 1, *target_size(args)))
        self.norms = nn.ModuleList(nn.LayerNorm(D, eps=1e-6) for _ in range(num_taps))
        self.project_in = nn.ModuleList(nn.Linear(D, 4 * width) for _ in range(num_taps))
        self.time = nn.Linear(D, 8 * width)
        self.blocks = nn.ModuleList(ResBlock(width) for _ in range(args.head_blocks))
        self.norm = nn.GroupNorm(1, width)
        self.project_out = nn.Linear(width, 4 * sum(self.channels) * self.cells ** 2)
        for layer in (self.time, self.project_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden, time_embedding):
        """[B F h/2 w/2 D], B F h/2 w/2 D -> {quantity: B channels T h*cells w*cells}, T = 4 (F - 1) + 1."""
        x = sum(project(norm(state)) for project, norm, state in zip(self.project_in, self.norms, hidden))
        scale, shift = self.time(F.silu(time_embedding)).chunk(2, dim=-1)
        x = (x * (1 + scale) + shift).unflatten(-1, (2, 2, -1))                # B F h/2 w/2 2 2 width
        x = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)         # B width F h w
        for block in self.blocks:
            x = block(x)
        y = self.project_out(F.silu(self.norm(x)).movedim(1, -1))
        y = y.unflatten(-1, (4, -1, self.cells, self.cells))
        y = y.permute(0, 5, 1, 4, 2, 6, 3, 7)                                  # B c F 4 h cells w cells
        y = y.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, 3:]
        return dict(zip(QUANTITIES, (y + self.mean).split(self.channels, dim=1)))


def target_size(args):
    """Rows and columns of the heads' output, the resolution of cached training targets."""
    side = common.LinearCodec.side if args.model == "tiny" else 16             # pixels per latent cell
    return args.height // side * args.cells, args.width // side * args.cells


class PhysicsModel(nn.Module):
    """Backbone and heads in a single module with a single forward, for DDP. heads: None in stage backbone."""
    def __init__(self, dit, heads, args, taps):
        super().__init__()
        self.dit, self.heads, self.args, self.taps = dit, heads, args, taps

    def forward(self, z, noise, sigma, text, batch=None, velocity=True):
        """z, noise B C F h w, sigma B, text B L D -> velocity or None, heads' output or None; with `batch`,
        the targets of Clips.get -> loss, {name: term to log}."""
        x, token_sigma = add_noise(z, noise, sigma)
        trained = any(p.requires_grad for p in self.dit.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            t = 1000 * token_sigma.flatten(1)
            v, hidden, time_embedding = run_backbone(self.dit, x, t, text, self.taps, velocity)
        outputs = None
        if self.heads is not None:
            with torch.autocast("cpu" if z.is_meta else z.device.type, enabled=False):     # heads are fp32
                hidden, time_embedding = tree_map(
                    lambda state: state.float().unflatten(1, token_sigma.shape[1:]), (hidden, time_embedding))
                outputs = self.heads(hidden, time_embedding)
        if batch is None:
            return v, outputs
        terms, loss = {}, 0
        for name, y in resize_outputs(outputs or {}, batch["moving"].shape[-2:]).items():
            quantity = QUANTITIES[name]
            terms[f"{name}_loss"] = quantity.loss(y, batch, self.args)
            loss = loss + getattr(self.args, f"{name}_weight", quantity.weight) * terms[f"{name}_loss"]
        if v is not None:                        # latent frame 0 is given and has no loss
            terms["flow_loss"] = F.mse_loss(v[:, :, 1:].float(), (noise - z)[:, :, 1:])
            loss = loss + terms["flow_loss"]
        return loss, {name: value.detach() for name, value in terms.items()}


# ---- model: loading -------------------------------------------------------------------------------------

def load_part(args, part, device):
    """A part of Wan with pretrained weights, or with random weights at full or tiny size. Weights are bf16,
    except for the VAE's, which are fp32 as in the official code, and those of the tiny model."""
    tiny = args.model == "tiny"
    dtype = torch.float32 if tiny or part == "vae" else torch.bfloat16
    torch.manual_seed(0)         # not --seed: checkpoints do not contain frozen random weights
    return common.load_wan(args.weights_from, part=part, config=TINY if tiny else args.model, dtype=dtype,
                           device=device, random_init=args.random_init or tiny)


def load_codec(args, folder, device):
    """Wan's VAE, or for the tiny model the codec in folder/codec.safetensors."""
    if args.model == "tiny":
        return common.LinearCodec(common.load_weights(Path(folder) / "codec.safetensors"), device)
    return load_part(args, "vae", device).requires_grad_(False)


def text_encoder(args, device):
    """-> a function that maps a prompt to embeddings L D on the CPU."""
    parts = [load_part(args, part, device) for part in ("tokenizer", "text_encoder")]
    return lambda prompt: common.encode_text(*parts, [prompt], args.text_length)[0].cpu()


def build_model(args, stage, dit):
    """PhysicsModel on the backbone `dit`, which is modified in place. Parameters that `stage` (backbone,
    heads, lora) trains require grad and are fp32: in bf16, updates of a small learning rate round to 0."""
    depth = len(dit.blocks)
    D = dit.config.num_attention_heads * dit.config.attention_head_dim
    taps = [int(n) for n in args.taps.split(",") if n] or sorted({depth * i // 4 for i in range(4)})
    if max(taps) > depth:
        raise UserError(f"--taps {args.taps}: the backbone has {depth} blocks")
    heads = None if stage == "backbone" else PhysicsHeads(D, len(taps), args).to(dit.device)
    dit.requires_grad_(stage == "backbone")
    if stage == "lora":
        from peft import LoraConfig
        dit.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=LORA_TARGETS))
    for p in dit.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return PhysicsModel(dit, heads, args, taps)


def load_model(folder: str, device: str = "cpu") -> PhysicsModel:
    """The model of a run's newest checkpoint, with EMA weights, in eval mode."""
    args, checkpoint, _ = parse_args(["--eval", "--output_dir", str(folder)])
    return load_trained(args, checkpoint, torch.device(device))


@torch.no_grad()
def predict_video(model: PhysicsModel, video: torch.Tensor, prompt: str) -> dict[str, torch.Tensor]:
    """video T 3 H W uint8, of the size and length of training -> {"motion": T 2 H W in pixels, "depth":
    T 1 H W in metres, "sky": T 1 H W, 1 for sky, where depth is meaningless}."""
    args, device = model.args, model.dit.device
    z = common.wan_encode(load_codec(args, args.output_dir, device), from_uint8(video)[None].to(device))
    text = common.pad_text([text_encoder(args, device)(prompt)], args.text_length).to(device)
    return {name: values[0] for name, values in predict(model, z, text).items()}


# ---- objective: quantities ------------------------------------------------------------------------------

def speed(motion):
    """Length of vectors, ... 2 H W -> ... H W. Tensor.norm over a dimension of 2 is 20 times slower."""
    return torch.hypot(*motion.unbind(-3))


def masked_mean(x, mask):
    """Mean of x over the mask, per clip, then over clips: two processes of 8 clips agree with one of 16.
    Clips whose mask covers less than 0.5 % count less, so that single pixels do not dominate."""
    count = mask.flatten(1).sum(1).clamp(min=mask[0].numel() / 200)
    return ((x * mask).flatten(1).sum(1) / count).mean()


def clip_means(x, mask):
    """N T H W -> N, the mean of each clip over the mask, NaN where the mask is empty."""
    return (x * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)


def motion_loss(y, batch, args):
    """y B 3 T h w: dx, dy and a gate logit -> scalar. The vector is trained on moving pixels, the gate on
    all: the background would dominate a mean over the frame. Errors are in pixels of a frame of 96 rows."""
    moving, valid = batch["moving"], batch["motion_valid"]
    error = (y[:, :2] - batch["motion"].movedim(1, 2)) * 96 / args.height
    error = (error.square().sum(1) + 0.02 ** 2).sqrt() - 0.02                  # end-point error, smooth at 0
    gate = F.binary_cross_entropy_with_logits(y[:, 2], moving.float(), reduction="none")
    return 0.75 * masked_mean(error, moving) + masked_mean(gate, valid)


def motion_decode(y):
    """B 3 T H W -> B T 2 H W in pixels. The gate is half open at a probability of motion of a third."""
    return (y[:, :2] * torch.sigmoid(3 * y[:, 2:] + 2)).movedim(1, 2)


def motion_scores(prediction, clip):
    """End-point error of clips N T 2 H W, over all pixels and over moving pixels."""
    error = speed(prediction["motion"] - clip["motion"])
    return {"epe": clip_means(error, clip["motion_valid"]), "epe_moving": clip_means(error, clip["moving"])}


def motion_picture(values, truth):
    """T 2 H W -> common.ColoredVideo: hue is the direction, brightness the speed, scaled by the truth."""
    import matplotlib.colors
    fastest = speed(truth["motion"]).flatten().quantile(0.998).clamp(min=0.1)

    def colours(dx, dy):
        hue = torch.atan2(dy, dx) / (2 * math.pi) % 1
        hsv = torch.stack([hue, torch.ones_like(hue), torch.hypot(dx, dy).clamp(0, 1)], dim=-1).numpy()
        return torch.from_numpy(matplotlib.colors.hsv_to_rgb(hsv)).movedim(-1, -3).float() * 2 - 1

    dx, dy = (-values["motion"] / fastest).unbind(1)                           # vectors point backwards
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    wheel = torch.where(torch.hypot(x, y) <= 1, colours(x, y), 1.0)
    return common.ColoredVideo(colours(dx, dy), wheel, "px/frame", f"{fastest:.2g}")


def depth_loss(y, batch, args):
    """y B 1 T h w: log depth -> scalar. Half is on moving pixels; gradients at two scales sharpen edges."""
    valid = batch["depth_valid"]
    error = torch.where(valid, y[:, 0] - batch["depth"][:, :, 0].clamp(min=1e-3).log(), 0.0)
    loss = masked_mean(error.abs(), valid & batch["moving"]) + masked_mean(error.abs(), valid)
    for step in (1, 2):
        right = error[..., step:] - error[..., :-step], valid[..., step:] & valid[..., :-step]
        down = error[..., step:, :] - error[..., :-step, :], valid[..., step:, :] & valid[..., :-step, :]
        for gradient, mask in (right, down):
            loss = loss + masked_mean(gradient.abs(), mask) / 4
    return loss


def depth_decode(y):
    return y.clamp(-8, 8).exp().movedim(1, 2)


def depth_scores(prediction, clip):
    """Depth N T 1 H W in metres: mean |error| / truth, share within a factor of 1.25, RMSE (Eigen 2014).
    The predicted sky is scored by sky_scores."""
    predicted, truth = prediction["depth"][:, :, 0], clip["depth"][:, :, 0].clamp(min=1e-3)
    valid, moving = clip["depth_valid"], clip["depth_valid"] & clip["moving"]
    relative = (predicted - truth).abs() / truth
    within = (torch.maximum(predicted / truth, truth / predicted) < 1.25).float()
    return {"abs_rel": clip_means(relative, valid), "abs_rel_moving": clip_means(relative, moving),
            "delta1": clip_means(within, valid), "delta1_moving": clip_means(within, moving),
            "rmse": clip_means((predicted - truth).square(), valid).sqrt()}


def depth_picture(values, truth):
    """T 1 H W -> common.ColoredVideo on a logarithmic scale: near is bright, far is dark, sky is white."""
    known = truth["depth"][truth["sky"] == 0].log()
    near, far = known.quantile(0.02).item(), known.quantile(0.98).item()
    labels = f"{math.exp(far):.2g}", f"{math.exp(near):.2g}"
    picture = apply_colormap(-values["depth"][:, 0].clamp(min=1e-3).log(), -far, -near, "m", "magma", labels)
    picture.video.masked_fill_(values["sky"] > 0, 1)
    return picture


def sky_loss(y, batch, args):
    """y B 1 T h w: sky logit -> scalar."""
    loss = F.binary_cross_entropy_with_logits(y[:, 0], batch["sky"][:, :, 0], reduction="none")
    return masked_mean(loss, batch["sky_valid"])


def sky_decode(y):
    return (y > 0).float().movedim(1, 2)


def sky_scores(prediction, clip):
    correct = (prediction["sky"] == clip["sky"]).float()[:, :, 0]
    return {"sky_accuracy": clip_means(correct, clip["sky_valid"])}


class Quantity(NamedTuple):
    """A quantity that the heads predict in every pixel. Its reader, in READERS of clips.py, fills the entries
    "<name>" B T c H W and "<name>_valid" B T H W of batches."""
    channels: int                                # of the heads' output
    loss: Callable                               # output B channels T h w, batch, flags -> scalar
    decode: Callable                             # output at full resolution -> values B T c H W
    scores: Callable                             # {name: values}, batch -> {metric: B}
    picture: Callable = None                     # values and truth {name: T c H W} -> common.ColoredVideo
    weight: float = 1.0                          # of the loss, without a flag --<name>_weight


QUANTITIES = {
    "motion": Quantity(3, motion_loss, motion_decode, motion_scores, motion_picture),
    "depth": Quantity(1, depth_loss, depth_decode, depth_scores, depth_picture),
    "sky": Quantity(1, sky_loss, sky_decode, sky_scores, weight=0.1),
}


def resize_outputs(outputs, size):
    """Resizes the heads' output to (height, width)."""
    return {name: y if y.shape[-2:] == tuple(size) else F.interpolate(
        y, (y.shape[2], *size), mode="trilinear", align_corners=False) for name, y in outputs.items()}


# ---- sampler --------------------------------------------------------------------------------------------

def shift_sigma(u, shift):
    """Wan's schedule: u in [0, 1] -> sigma = shift u / (1 + (shift - 1) u), denser at high noise levels."""
    return shift * u / (1 + (shift - 1) * u)


def fixed_noise(z, seed):
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z.device)


@torch.no_grad()
def generate(dit, z0, text, negative, args, seed):
    """Euler's method from noise to data, frame 0 given: z0 B C 1 h w, text B L D -> B C F h w."""
    length = (args.frames - 1) // 4 + 1
    x = fixed_noise(z0.expand(-1, -1, length, -1, -1), seed)
    sigmas = shift_sigma(torch.linspace(1, 0, args.num_inference_steps + 1), args.shift).tolist()
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        x = torch.cat([z0, x[:, :, 1:]], dim=2)
        t = torch.full((len(x), length, x.shape[3] // 2, x.shape[4] // 2), 1000 * sigma, device=x.device)
        t[:, 0] = 0                              # the given frame is clean
        v = run_backbone(dit, x, t.flatten(1), text)[0].float()
        if args.guidance_scale != 1:
            unguided = run_backbone(dit, x, t.flatten(1), negative)[0].float()
            v = unguided + args.guidance_scale * (v - unguided)
        x = x + (next_sigma - sigma) * v
    return torch.cat([z0, x[:, :, 1:]], dim=2)


@torch.no_grad()
def predict(model, z, text, seed=0):
    """One backbone pass on a video's latents B C F h w, text B L D -> {quantity: values B T c H W}."""
    sigma = torch.full((len(z),), READ_SIGMA, device=z.device)
    outputs = model(z, fixed_noise(z, seed), sigma, text, velocity=False)[1]
    outputs = resize_outputs(outputs, (model.args.height, model.args.width))
    return {name: QUANTITIES[name].decode(y) for name, y in outputs.items()}


# ---- data set -------------------------------------------------------------------------------------------

def run_program(name, *arguments):
    """Runs a program of data/sim_physics_heads. Raises UserError with its message if it fails."""
    program = Path(__file__).resolve().parent / "data" / SCRIPT / name
    result = subprocess.run([sys.executable, program, *map(str, arguments)], capture_output=True, text=True)
    if result.returncode:
        message = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(message.removeprefix(f"{name}: error: "))
    for line in re.findall(".*(?:left out|prompts).*", result.stdout):
        print(line)


def cache_folder(args):
    """cache/<hash of files, clips.py, CACHE_FLAGS> in the data set, or in the run if that is read-only."""
    root = Path(args.data_dir)
    if not root.is_dir():
        raise UserError(f"no folder {root}: data/{SCRIPT}/check.py has the layout, prepare.py simulates data")
    program = Path(__file__).resolve().parent / "data" / SCRIPT / "clips.py"
    recipe = [common.read_text(program), json.dumps({name: getattr(args, name) for name in CACHE_FLAGS})]
    for path in common.find_files(root, (".png", ".jpg", ".jpeg", ".npy", ".csv"))[0]:
        recipe.append(f"{path.relative_to(root)} {common.file_version(path)}")
    return common.cache_path(args, recipe)


def build_cache(args, run):
    """Checks the data set, cuts clips, adds latents C F h w and text L D -> folder. Resumable."""
    folder = cache_folder(args)
    if (folder / "complete").is_file():
        return folder
    if run.rank == 0 and not (folder / "clips.json").is_file():
        print(f"checking {args.data_dir} and cutting it into clips")
        with tempfile.TemporaryDirectory() as temporary:
            scenes = Path(temporary, "scenes.json")
            run_program("check.py", args.data_dir, "--json", scenes)
            flags = [f"--{name}={getattr(args, name)}" for name in CLIP_FLAGS]
            run_program("clips.py", scenes, folder, f"--rows={target_size(args)[0]}",
                        f"--permute_colours={int(args.permute_colours)}", *flags)
    common.barrier()
    files = sorted(json.loads((folder / "clips.json").read_text()).items())
    if run.rank == 0 and args.model == "tiny" and not (folder / "codec.safetensors").is_file():
        train = [name for name, _ in files if name.startswith("train")]
        videos = [common.load_weights(folder / name)["video"] for name in train[::len(train) // 40 + 1]]
        codec = common.LinearCodec.fit(from_uint8(torch.stack(videos)), TINY["transformer"]["in_channels"])
        common.save_weights(folder / "codec.safetensors", codec.tensors)
    common.barrier()
    codec = load_codec(args, folder, run.device)
    encode_prompt = functools.cache(text_encoder(args, run.device))
    for name, clip in tqdm(files[run.rank::run.world], "encode", unit="clip", disable=run.rank > 0):
        tensors = common.load_weights(folder / name)
        if "latents" in tensors:
            continue
        with torch.no_grad():
            z = common.wan_encode(codec, from_uint8(tensors["video"])[None].to(run.device))[0].cpu()
        tensors["latents"] = z if args.model == "tiny" else z.bfloat16()
        tensors["text"] = encode_prompt(clip["prompt"])
        if name.startswith("train"):
            del tensors["video"]
        common.save_weights(folder / name, tensors)
    common.barrier()
    if run.rank == 0:
        (folder / "complete").touch()
    return folder


class Clips:
    """A split of the cache, in memory: 2 GB at paper scale."""
    def __init__(self, folder, split, args):
        paths = sorted(folder.glob(f"{split}_*"))
        self.clips = [common.load_weights(path) for path in paths]
        self.names = [path.stem for path in paths]
        self.text_length = args.text_length

    def get(self, numbers, device):
        """Stacks the tensors of clips `numbers`, pads text with zeros, adds the mask "moving" B T H W."""
        clips = [self.clips[i] for i in numbers]
        batch = {}
        for name in clips[0].keys() - {"text"}:
            dtype = torch.float32 if clips[0][name].is_floating_point() else clips[0][name].dtype
            batch[name] = torch.stack([clip[name].to(dtype) for clip in clips]).to(device)
        batch["text"] = common.pad_text([clip["text"] for clip in clips], self.text_length).to(device)
        batch["moving"] = batch["motion_valid"] & (speed(batch["motion"]) > MOVING)
        return batch


# ---- evaluate and sample --------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(args, run, model, clips, means):
    """Scores held-out scenes at full resolution -> [eval.json, curves.png]. means: the training set's."""
    began = time.time()
    mean_depth = F.interpolate(means["depth"][None, None], (args.height, args.width)).to(run.device)[None]
    tables = {}                                  # method -> [{metric: 1}], a row for each clip
    for i in tqdm(range(len(clips.clips)), "evaluate", unit="clip"):
        clip = clips.get([i], run.device)
        # Persistence repeats the quantities of the given first frame, and the motion of the first step.
        first = {name: clip[name][:, :1].expand_as(clip[name]) for name in QUANTITIES}
        first["motion"] = clip["motion"][:, 1:2].expand_as(clip["motion"])
        first["depth"] = torch.where(clip["depth_valid"][:, :1, None], first["depth"], mean_depth)
        trivial = {"motion": torch.zeros_like(first["motion"]), "depth": mean_depth.expand_as(first["depth"])}
        predictions = {"mean depth, zero motion": {**first, **trivial}, "persistence": first}
        with run.autocast():
            predictions["model"] = predict(model, clip["latents"], clip["text"], seed=i)
        for method, values in predictions.items():
            scores = {}
            for quantity in QUANTITIES.values():
                scores |= quantity.scores(values, clip)
            tables.setdefault(method, []).append(scores)
    averages = {method: {name: torch.cat([row[name] for row in rows]).nanmean().item() for name in rows[0]}
                for method, rows in tables.items()}
    results = averages.pop("model")
    columns = "epe", "epe_moving", "abs_rel", "abs_rel_moving", "delta1_moving", "sky_accuracy"
    errors = {name: row["epe_moving"].item() for name, row in zip(clips.names, tables["model"])}
    return common.report(SCRIPT, args, None, began, ("epe_moving", "mean depth, zero motion", True), results,
                         averages, columns, errors, stages=[folder for _, folder, _, _ in stage_plan(args)])


@torch.no_grad()
def sample(args, run, model, clips, cache):
    """Samples videos from first frames of held-out clips, with the heads' predictions -> [samples/...]."""
    codec, encode_prompt = load_codec(args, cache, run.device), text_encoder(args, run.device)
    negative = common.pad_text([encode_prompt(NEGATIVE_PROMPT)], args.text_length).to(run.device)
    files = []
    for case, index in common.pick_cases(args.output_dir, clips.names, args.num_samples).items():
        clip = clips.get([index], run.device)
        seed = args.seed + index
        with run.autocast():
            z = generate(model.dit, clip["latents"][:, :, :1], clip["text"], negative, args, seed)
            real = predict(model, clip["latents"], clip["text"], index)        # as in evaluate
            sampled = predict(model, z, clip["text"], seed)
        truth, real, sampled = ({name: values[name][0].float().cpu() for name in QUANTITIES}
                                for values in (clip, real, sampled))
        panels = {"video": {"ground truth": from_uint8(clip["video"][0]).cpu(),
                            "sample": common.wan_decode(codec, z)[0].cpu()}}
        stem = Path(args.output_dir, "samples", f"{case}_{clips.names[index]}")
        for name, quantity in QUANTITIES.items():
            if quantity.picture:
                methods = {"ground truth": truth, "prediction": real, "from sample": sampled}
                panels[name] = {method: quantity.picture(values, truth) for method, values in methods.items()}
        files += common.write_panels(stem, panels, 1, 15, max(1, 128 // args.height))
        for name in QUANTITIES:
            np.save(f"{stem}_{name}.npy", sampled[name].numpy())
            files.append(f"{stem}_{name}.npy")
    return files


# ---- set-up and parallel wrap ---------------------------------------------------------------------------

def setup(args):
    """Initialises torch.distributed, device and precision -> rank, world, device, dtype, autocast."""
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
    if args.grad_checkpoint:
        model.dit.enable_gradient_checkpointing()
    if args.compile:
        for block in model.dit.blocks:           # excludes hooks, which differ between calls
            block.forward = torch.compile(block.forward)
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


STAGES = ("backbone", "heads", "lora")


def train(args, run, stage, folder, model, spec, loss_fn, val_fn, steps, lr, checkpoint):
    """Trains the parameters of `model` that require grad up to `steps`, from `checkpoint`. <folder>/ckpt then
    has the last step, and `model` the EMA weights. spec: random values of a sample, for sample_global_batch.
    loss_fn(model, values, step) -> loss, {name: term to log}. val_fn(model) -> {name: number}."""
    net = wrap(model, args, run)
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    ema = common.EMA(params, args.ema_decay)
    start = common.load_run(checkpoint, net, optimizer, ema, trained_only=True)
    log = common.open_log(SCRIPT, folder.relative_to(args.output_dir), args, start, steps)
    should_stop = common.install_sigterm_handler()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, lr, args.warmup_steps, steps)
        net.train()
        seed = common.seed_all(args.seed, STAGES.index(stage), step)
        for micro in range(args.grad_accum):     # gradients are all-reduced at the last micro-step
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
            common.save_run(folder, SCRIPT, completed, net, optimizer, ema, args, args.keep_last, True)
        if stop:
            raise UserError(f"stopped by SIGTERM after step {completed} (saved): the same command resumes")
        if args.eval_every and (completed % args.eval_every == 0 or completed == steps):
            with ema.applied(), torch.no_grad(), run.autocast():
                log.row(completed, **val_fn(net.eval()))
            log.restart_clock()
    common.remove_sigterm_handler()
    log.bar.close()
    ema.copy_to_params()


def draw_sigma(stage, values, shift):
    """Noise levels B, and a mask of the samples that train the heads. backbone: Wan's distribution. heads:
    half at READ_SIGMA, half with density 3 (1 - sigma)^2, which avoids pure noise. lora: half as for the
    backbone, without the heads' loss, half as for the heads."""
    share = {"backbone": 1.0, "heads": 0.0, "lora": 0.5}[stage]
    kind, u = values["kind"], values["u"]
    for_heads = kind >= share
    sigma = torch.where(kind > (1 + share) / 2, torch.full_like(u, READ_SIGMA), 1 - (1 - u) ** (1 / 3))
    return torch.where(for_heads, sigma, shift_sigma(u, shift)), for_heads


def train_stage(args, run, stage, folder, model, clips, checkpoint, steps, lr):
    """Trains a stage; `model` then has the EMA weights. Exports them to folder/final: the backbone, or the
    heads and the LoRA file that diffusers' pipelines load."""
    spec = {"clip": ("randint", len(clips["train"].clips)), "u": ("rand",), "kind": ("rand",),
            "noise": ("randn", *clips["train"].clips[0]["latents"].shape)}
    velocity = stage != "heads"

    def loss_fn(model, values, step):
        batch = clips["train"].get(values["clip"].tolist(), run.device)
        sigma, for_heads = draw_sigma(stage, values, args.shift)
        for name, mask in batch.items():
            if mask.dtype == torch.bool:
                batch[name] = mask & expand_to(for_heads, mask)
        return model(batch["latents"], values["noise"], sigma, batch["text"], batch, velocity)

    val_numbers = range(0, len(clips["val"].clips), math.ceil(len(clips["val"].clips) / 8))

    def val_fn(model):                           # every validation has the same clips, noise level and noise
        batch = clips["val"].get(val_numbers, run.device)
        z = batch["latents"]
        sigma = torch.full((len(z),), READ_SIGMA if stage == "heads" else 0.5, device=z.device)
        loss, terms = model(z, fixed_noise(z, 0), sigma, batch["text"], batch, velocity)
        return {f"val_{name}": value.item() for name, value in {"loss": loss, **terms}.items()}

    train(args, run, stage, folder, model, spec, loss_fn, val_fn, steps, lr, checkpoint)
    name, module = ("backbone", model.dit) if stage == "backbone" else ("heads", model.heads)
    final = folder / "final"
    trained = not checkpoint or checkpoint.meta["step"] < steps
    if run.rank == 0 and (trained or not (final / f"{name}.safetensors").is_file()):
        final.mkdir(exist_ok=True)
        common.save_weights(final / f"{name}.safetensors", module.state_dict())
        if stage == "lora":
            common.save_lora(final, model.dit)


def stage_plan(args):
    """-> [(stage, folder in output_dir, steps, peak learning rate)]."""
    if args.stage != "all":
        return [(args.stage, ".", args.max_steps, args.lr)]
    plan = [("backbone", "backbone", args.backbone_steps, args.backbone_lr)] if args.backbone_steps else []
    return [*plan, ("heads", "heads", args.max_steps, args.lr),
            ("lora", ".", args.lora_steps, args.lora_lr or args.lr)]


def train_stages(args, run, checkpoint, cache):
    """Trains the stages of stage_plan, resuming each -> the newest checkpoint."""
    folder = Path(args.output_dir)
    if run.rank == 0:
        common.write_json(folder / "args.json", {**vars(args), **common.provenance()})
    means = common.load_weights(cache / "pixel_means.safetensors")
    clips = {split: Clips(cache, split, args) for split in ("train", "val")}
    dit = load_part(args, "transformer", run.device)
    heads = common.load_weights(args.heads) if args.heads else None
    for stage, name, steps, lr in stage_plan(args):
        resume = "none" if args.resume == "none" else "auto"
        newest = checkpoint if name == "." else common.find_checkpoint(folder / name / "ckpt", SCRIPT, resume)
        torch.manual_seed(args.seed)             # equal initial weights on all processes and after a restart
        model = build_model(args, stage, dit)
        if stage == "heads":                     # starts with little motion and the mean depth and sky
            model.heads.mean[2] = -3.0
            model.heads.mean[3] = means["log_depth"]
            model.heads.mean[4] = torch.logit(means["sky"], eps=0.01)
        if stage == "lora":
            common.restore_state(model.heads, heads, source=args.heads or "stage heads")
        if run.rank == 0 and args.model == "tiny":         # load_model() needs it before the last step, too
            shutil.copy(cache / "codec.safetensors", folder)
        train_stage(args, run, stage, folder / name, model, clips, newest, steps, lr)
        if stage == "heads":
            heads = model.heads.state_dict()
    return common.find_checkpoint(folder / "ckpt", SCRIPT, "auto")


# ---- main -----------------------------------------------------------------------------------------------

def load_trained(args, checkpoint, device):
    """Loads a checkpoint's EMA weights -> PhysicsModel, frozen, in eval mode."""
    path, state, _ = checkpoint
    dit = load_part(args, "transformer", device)
    backbone = common.run_folder(path) / "backbone/final/backbone.safetensors"
    if backbone.is_file():
        common.restore_state(dit, common.load_weights(backbone), source=str(backbone))
    model = build_model(args, "heads" if args.stage == "heads" else "lora", dit)
    common.restore_state(model, state["ema"], source=str(path), trained_only=True)
    return model.eval().requires_grad_(False)


def dry_run(args):
    """Prints parameters, FLOPs and memory of each stage, on the meta device and without data."""
    B = args.batch_size
    latents = (args.frames - 1) // 4 + 1, *(size // args.cells for size in target_size(args))
    flags = argparse.Namespace(**{**vars(args), "random_init": True})
    for stage in ("heads", "lora") if args.stage == "all" else (args.stage,):
        with torch.device("meta"):
            model = build_model(flags, stage, load_part(flags, "transformer", "meta"))
            z = torch.randn(B, model.dit.config.in_channels, *latents)
            text = torch.randn(B, args.text_length, model.dit.config.text_dim)
            batch = {"moving": torch.ones(B, args.frames, *target_size(args), dtype=torch.bool)}
            for name, quantity in QUANTITIES.items():
                outputs = torch.ones(B, quantity.channels, *batch["moving"].shape[1:])
                batch |= {name: quantity.decode(outputs), f"{name}_valid": batch["moving"]}
            if args.grad_checkpoint:
                model.dit.enable_gradient_checkpointing()

            def loss():
                with torch.autocast("cpu", torch.bfloat16, enabled=args.model != "tiny"):
                    return model(z, z, torch.rand(B), text, batch, velocity=stage != "heads")[0]

            world = int(os.environ.get("WORLD_SIZE", 1))
            print(common.dry_run_report(f"stage {stage}", model, loss, B, math.prod(latents) // 4, world))


def run_script(argv):
    args, checkpoint, why_preset = parse_args(argv)
    if args.dry_run:
        return dry_run(args)
    if args.heads:
        common.load_weights(args.heads)          # fails early if the file cannot be read
    run = setup(args)
    inference_only = args.sample or args.eval
    common.announce(SCRIPT, args, why_preset, run, checkpoint)
    common.simulate_missing_data(SCRIPT, args.data_dir, default=PRESETS["tiny"]["data_dir"])
    if run.rank == 0 and checkpoint:
        common.copy_stages(checkpoint, args.output_dir, ["backbone", "heads"])
    cache = build_cache(args, run)
    if not (inference_only and checkpoint):
        checkpoint = train_stages(args, run, checkpoint, cache)
    if run.rank == 0:
        model = load_trained(args, checkpoint, run.device)
        clips = Clips(cache, "test", args)
        means = common.load_weights(cache / "pixel_means.safetensors")
        files = evaluate(args, run, model, clips, means) if common.wants_evaluation(args) else []
        if args.sample or not inference_only:
            files += sample(args, run, model, clips, cache)
        common.show_results(args.output_dir, files, args.tensorboard, args.wandb)
    common.shutdown()


def main(argv=None):
    return common.one_line_errors(f"{SCRIPT}.py", lambda: run_script(argv))


if __name__ == "__main__":
    sys.exit(main())
