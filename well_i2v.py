"""well_i2v.py: Wan2.2-I2V-A14B, a model of videos, is taught to predict simulations of The Well.

Idea        One frame of a simulation (density, pressure, velocity) becomes a picture, Wan's frozen VAE and
            its two transformers with LoRA make the next frames, and the way back gives fields in physical
            units (Wan: arXiv:2503.20314; The Well: arXiv:2412.00568; LoRA: arXiv:2106.09685).
Equations   x_s = (1 - s) z + s eps; loss |v - (eps - z)|^2                 -> add_noise, NativeI2V.forward
            s = shift u / (1 + (shift - 1) u); s >= .9: high-noise expert   -> shift_sigma, whose_turn
            input = [x_s 16, mask 4, VAE(first frame, then grey) 16]        -> condition
            dx/ds = v from s = 1 to 0, UniPC or Euler                       -> integrate
            fields <-> [-1, 1] <-> 3 channels: learned, linear or tile      -> FieldMaps, Adapter
            VRMSE = sqrt(mean (x - y)^2 / (var y + 1e-7)), in space alone   -> vrmse
            d(rho, rho u, E)/dt = -div F - cooling (MUSCL, HLLC, Heun)      -> solve: the simulated twin
Differs     from the document's code, LIX-shape-analysis/video_for_science, and why:
            - the target is the velocity eps - z; the original's is eps, which Wan never predicted
            - latents are normalised; noise levels are drawn here, not read from a sampler's reversed table
            - both experts are trained, each on its own noise levels; the original trains one for all
            - processes average their gradients (the original calls past DDP), and what is trained is fp32
            - adapters learn through the VAE with gradient, then stand still: a target that can move collapses
            - field values survive the adapter: no GroupNorm over a frame, no clamp at raw bounds; frames are
              resized by a fixed matrix and its inverse, beside which the document's learned layers start at 0
            - VRMSE is The Well's, on its test split, all files evenly; texts are encoded once; t_cool is told
Run         python well_i2v.py                           # simulation to evaluation: 6 to 8 min, 1.2 GB
            torchrun --nproc_per_node=4 well_i2v.py --lora_rank 32       # by four on 2 cores: 8 to 12 min
            python well_i2v.py --sample --num_samples 2         # 11 s
            python well_i2v.py --eval --members 8               # 30 s to 1 min
            python well_i2v.py --mode convlstm --output_dir runs/convlstm        # the document's older modes
            python well_i2v.py --simulate --preset i2v_a14b --data_dir data/simulated   # 90 runs of 128 x 384
            python well_i2v.py --download --data_dir data/the_well               # 7 GB, from the hub
            torchrun --nproc_per_node=4 well_i2v.py --preset i2v_a14b --data_dir data/the_well
            python well_i2v.py --preset i2v_a14b --dry_run
Shapes      B batch  T frames  C fields  H W their grid, axes as in the file (here x periodic, y open)
            H' W' video  F latent frames  h w latent grid  L text tokens  D width  S samples of one forecast.
            Fields are B T C H W in physical units, videos B T' 3 H' W' in [-1, 1], latents B 16 F h w.
"""
import argparse
import contextlib
import copy
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import yaml
from tqdm import tqdm

import common
from common import UserError, expand_to

SCRIPT = "well_i2v"
DATASET = "turbulent_radiative_layer_2D"
SPLITS = ("train", "valid", "test")
T_COOLS = (.03, .06, .10, .18, .32, .56, 1.00, 1.78, 3.16)
SPACING = 1.597033                         # between the published set's 101 snapshots
BOUNDARY = 0.9                           # sigma from which on Wan2.2-I2V-A14B's high-noise expert is asked
DIT = {"high": "transformer", "low": "transformer_2"}                          # names in diffusers' pipeline
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")       # Wan's names
FIRST = 4                        # The Well's forecasts are given 4 frames: the first target is frame 4

# ---- args -----------------------------------------------------------------------------------------------

PRESETS = {
    # The base has seen three of the four cooling times; LoRA meets the fourth.
    "tiny": dict(
        model="tiny", data_dir="data/well_i2v", sim_side=32, sim_t_cools=".03,.10,.32,3.16", sim_train=3,
        adapter="tile", field_maps="window", frame_repeat=4, carry_detail=True, augment=2,
        text_length=64, adapter_steps=60, adapter_lr=2e-3, adapter_width=32,
        base_steps=1500, base_lr=2e-3, base_files=3, max_steps=800, lr=2e-3, lora_rank=32,
        lora_targets="to_q,to_k,to_v,to_out.0,ffn.net.0.proj,ffn.net.2", shift=3.0, batch_size=4,
        warmup_steps=50, ema_decay=.99, beta2=.98, steps=3, members=8, eval_clips=32, rollout_steps=30,
        sample_frames=16, eval_every=250, save_every=250),
    # The document's native configuration: 20 epochs of 6,696 windows, batch 1 on each of 4 GPUs.
    "i2v_a14b": dict(data_dir="data/the_well", lr=1e-5, lora_rank=32, batch_size=1, max_steps=33480,
                     scalar_token=False, grad_checkpoint=True, save_every=500, eval_every=1000),
    # Its older modes: a predictor on the latents, and the adapter alone.
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
# What the weights mean: a checkpoint's own values hold.
MODEL_FLAGS = ("model", "mode", "dataset", "n_in", "n_out", "adapter", "field_maps", "video_size",
               "frame_repeat", "carry_detail", "adapter_width", "experts", "lora_rank", "lora_targets",
               "scalar_token", "text_length", "joint")
# What --preset auto looks for before it takes the second preset.
PAPER_NEEDS = dict(get_data="python well_i2v.py --download")


def build_parser():
    parser = Parser(prog=f"{SCRIPT}.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_shared_flags(parser, PRESETS)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default=DATASET, help="a 2-D set of The Well")
    add("--download", action="store_true", help="fetch the set from the Hugging Face hub, then exit")
    add("--simulate", action="store_true", help="write a simulated set into --data_dir, then exit")
    add("--sim_side", type=int, default=128, help="cells of what is simulated, in x; in y 3 times as many")
    add("--sim_t_cools", default=",".join(map(str, T_COOLS)), help="cooling times, a file each")
    add("--sim_train", type=int, default=8, help="simulated training trajectories of a file; 1 to test on")
    add("--sim_frames", type=int, default=101, help="snapshots of a simulated trajectory")
    add("--sim_spacing", type=float, default=SPACING, help="time between them")
    add("--n_in", type=int, default=1, help="frames given; --mode convlstm takes 4k + 1")
    add("--n_out", type=int, default=8, help="frames forecast in a call")
    add("--window_count", type=int, default=0, help="training windows, evenly chosen (0: all)")
    add("--augment", type=int, default=1, help="versions of a window, rolled along periodic axes")
    add("--prompt", default="", help="text of all files (default: the set's name); their scalars follow it")
    add = parser.add_argument_group("model").add_argument
    add("--mode", choices=["native", "convlstm", "adapter", "oneshot"], default="native",
        help="native: Wan's diffusion from a frame; the others are the document's")
    add("--model", choices=["i2v_a14b", "tiny"], default="i2v_a14b", help="tiny: the same classes, small")
    add("--weights_from", default="Wan-AI/Wan2.2-I2V-A14B-Diffusers", metavar="FOLDER|HUB_ID",
        help="diffusers folder, hub id, or folder with the official files")
    add("--random_init", action="store_true", help="Wan's shape with random weights, to measure speed")
    add("--experts", choices=["both", "high", "low"], default="both",
        help="which get LoRA; low: that one is used alone, from persistence noised to .9")
    add("--lora_rank", type=int, default=32, help="rank and alpha")
    add("--lora_targets", default="to_q,to_k,to_v,to_out.0", help="also: ffn.net.0.proj,ffn.net.2")
    add("--scalar_token", action=argparse.BooleanOptionalAction, default=True,
        help="tell t_cool by a learned token too, which diffusers' pipeline does not know")
    add("--text_length", type=int, default=512, help="tokens of a prompt, zeros included")
    add = parser.add_argument_group("adapter").add_argument
    add("--adapter", choices=["learned", "linear", "tile"], default="learned",
        help="fields to 3 channels: the document's, its least-squares start, or 3 fields a panel")
    add("--adapter_from", metavar="FOLDER", help="of adapter.json and .safetensors, instead of stage 0")
    add("--adapter_width", type=int, default=64, help="channels of the learned one")
    add("--field_maps", default="linear",
        help="linear, asinh, log or window (in deviations of a window's first frame); density=log for one")
    add("--video_size", default="", metavar="H,W", help="of a panel (default: the grid's), multiples of 16")
    add("--frame_repeat", type=int, default=1, help="times that a frame is shown; the VAE packs 4 into one")
    add("--carry_detail", action=argparse.BooleanOptionalAction, default=False,
        help="add what adapter and VAE lose of the given frame to forecasts, weighted by least squares")
    add = parser.add_argument_group("stages").add_argument
    add("--adapter_steps", type=int, default=2000, help="of stage 0, the learned adapter")
    add("--adapter_lr", type=float, default=2e-4, help="likewise")
    add("--base_steps", type=int, default=0, help="of the tiny experts' own training")
    add("--base_lr", type=float, default=1e-3, help="likewise")
    add("--base_files", type=int, default=0, metavar="N",
        help="of which it sees the first so many only, so that LoRA meets new ones (0: all)")
    add("--joint", action="store_true", help="the learned adapter goes on learning with the predictor")
    add = parser.add_argument_group("loss").add_argument
    add("--recon_weight", type=float, default=.5, help="of fields through the VAE and back")
    add("--adapter_weight", type=float, default=.1, help="of fields through the adapter and back")
    add("--latent_weight", type=float, default=2.0, help="of latents (convlstm, oneshot)")
    add("--physics_weight", type=float, default=1.0, help="of decoded fields (convlstm, oneshot)")
    add("--shift", type=float, default=5.0, help="of Wan's noise schedule")
    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=int, default=30, help="network calls of a forecast, guidance not counted")
    add("--solver", choices=["unipc", "euler"], default="unipc", help="unipc: Wan's own")
    add("--cfg", type=float, default=1.0, help="guidance (1: none; physics has one answer)")
    add("--members", type=int, default=4, help="samples of a forecast that --eval averages")
    add("--eval_clips", type=int, default=90, help="held-out windows that are forecast, evenly chosen")
    add("--rollout_steps", type=int, default=97, help="longest autoregression of --eval (0: none)")
    add("--num_samples", type=int, default=2, help="held-out trajectories that --sample shows")
    add("--sample_frames", type=int, default=24, help="frames that it forecasts")
    add("--fps", type=int, default=8, help="of the videos that are written")
    return parser


def check_args(args):
    """One clear line for values that no run can mean."""
    check_numbers(args, least_1=("sim_side", "sim_frames", "n_in", "n_out", "augment", "lora_rank",
                                 "text_length", "adapter_width", "frame_repeat", "steps", "members",
                                 "eval_clips", "num_samples", "sample_frames", "sim_train", "fps"),
                  least_0=("adapter_lr", "base_lr", "adapter_steps", "base_steps", "base_files",
                           "rollout_steps", "window_count", "recon_weight", "adapter_weight", "latent_weight",
                           "physics_weight"))
    for name in ("shift", "sim_spacing"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name} must be above 0, not {getattr(args, name)}")
    if args.sim_side % 16:
        raise UserError(f"--sim_side must be a multiple of 16, not {args.sim_side}")
    number = r"(\d+\.?\d*|\.\d+)"
    if not re.fullmatch(f"{number}(,{number})*", args.sim_t_cools) or 0 in cooling_times(args):
        raise UserError(f"--sim_t_cools takes numbers above 0 such as .03,.32,3.16, not {args.sim_t_cools}")
    if args.video_size and not re.fullmatch(r"[1-9]\d*,[1-9]\d*", args.video_size):
        raise UserError(f"--video_size takes H,W such as 256,768, not {args.video_size}")
    if args.mode in ("native", "oneshot") and args.n_in != 1:
        raise UserError(f"--n_in {args.n_in}: --mode {args.mode} starts from one frame; convlstm from more")
    for name, T in (("n_in", args.n_in), ("n_in + n_out", args.n_in + args.n_out)):
        if (shown := 1 + args.frame_repeat * (T - 1)) % 4 != 1:
            raise UserError(f"{name} = {T} frames with --frame_repeat {args.frame_repeat} are {shown} of "
                            f"video: Wan's VAE takes 4k + 1")
    for target in args.lora_targets.split(","):
        if target not in LORA_TARGETS:
            raise UserError(f"--lora_targets {target}: no module of Wan's transformer is named so; it has "
                            f"{', '.join(LORA_TARGETS)}")
    if (args.mode == "adapter" or args.joint) and args.adapter != "learned":
        raise UserError(f"{'--joint' if args.joint else '--mode adapter'} trains the adapter: --adapter "
                        f"learned, not {args.adapter}")
    for name in ("fsdp", "compile"):
        if getattr(args, name) and args.mode in ("convlstm", "adapter"):
            raise UserError(f"--{name} is for Wan's experts: --mode {args.mode} is small, leave it out")
    if args.mode == "oneshot":
        args.experts = "low"             # no other is asked; DDP would wait for its gradients


def cooling_times(args):
    return [float(t) for t in args.sim_t_cools.split(",")]


# ---- model: fields <-> video ----------------------------------------------------------------------------

class FieldMaps(nn.Module):
    """Each field, in physical units, to about [-1, 1] and back: affine after x, asinh(x / s), log x or, kind
    window, asinh((x - m) / 1.5 s) with mean m and deviation s of the frame that the window starts from.

    VRMSE divides by a frame's own deviation, and the radiative layer's pressure deviates by .01 at first and
    by .08 later, around a mean that drifts: on one scale for all frames, a frame has few steps of its own.
    What is divided by the window's first frame has many, and that frame is known where a forecast begins.
    The bounds are the training set's 0.1 and 99.9 percentiles with 15 % of room, because the VAE cuts at +-1.
    Nothing is cut here: what lies beyond the bounds maps beyond +-1, and comes back.
    """
    def __init__(self, names, kinds):
        super().__init__()
        self.names, self.kinds = list(names), list(kinds)
        for name in ("scale", "centre", "reach", "spread"):
            self.register_buffer(name, torch.ones(len(self.names)))

    def fit(self, x):
        """x B T C H W, windows of the training set. UserError for a logarithm of what is not positive."""
        first = x[:, :1]
        for c, (name, kind) in enumerate(zip(self.names, self.kinds)):
            value = x[:, :, c].double()
            if kind == "log" and value.min() <= 0:
                raise UserError(f"--field_maps {name}=log: {name} falls to {value.min():.3g}; use asinh")
            size = value.std((-2, -1)).flatten() if kind == "window" else value.abs().flatten()
            self.scale[c] = size.median().clamp(min=1e-12)
            y = self.curve(value, c, first[:, :, c].double()).flatten()
            low, high = np.quantile(y.numpy(), (.001, .999))
            self.centre[c], self.reach[c] = (low + high) / 2, max((high - low) / 2 * 1.15, 1e-6)
            self.spread[c] = ((y - self.centre[c]) / self.reach[c]).std().clamp(min=1e-3)
        return self

    def window(self, first, c):
        """Mean and 1.5 deviations of first frames B 1 H W of a field; flat ones count as 0.3 of the usual."""
        mean = first.mean((-2, -1), keepdim=True)
        return mean, 1.5 * (first.var((-2, -1), keepdim=True) + (.3 * self.scale[c]) ** 2).sqrt()

    def curve(self, x, c, first):
        """A field B T H W and its first frame B 1 H W -> what the affine map is applied to."""
        if self.kinds[c] == "window":
            mean, deviation = self.window(first, c)
            return torch.asinh((x - mean) / deviation)
        if self.kinds[c] == "log":           # a prediction fed back can be 0, which has none
            return torch.log((x / self.scale[c]).clamp(min=1e-6))
        return torch.asinh(x / self.scale[c]) if self.kinds[c] == "asinh" else x

    def uncurve(self, y, c, first):
        """Inverse of curve."""
        if self.kinds[c] == "window":
            mean, deviation = self.window(first, c)
            return mean + deviation * y.sinh()
        if self.kinds[c] == "log":
            return self.scale[c] * y.exp()
        return self.scale[c] * y.sinh() if self.kinds[c] == "asinh" else y

    def forward(self, x, first):
        """Physical units B T C H W, and the first frame B 1 C H W of the window -> about [-1, 1]."""
        y = torch.stack([self.curve(x[:, :, c], c, first[:, :, c]) for c in range(len(self.names))], dim=2)
        return (y - self.centre[:, None, None]) / self.reach[:, None, None]

    def inverse(self, y, first):
        y = y * self.reach[:, None, None] + self.centre[:, None, None]
        return torch.stack([self.uncurve(y[:, :, c], c, first[:, :, c]) for c in range(len(self.names))], 2)

    def slope(self, x, name):
        """dx/dy of a field at x: what an error of 1 in the video means there in physical units."""
        c = self.names.index(name)
        curve = {"linear": 1., "asinh": torch.hypot(x, self.scale[c]), "log": x}[self.kinds[c]]
        return self.reach[c] * curve


def parse_maps(text, names):
    """--field_maps "log" for all fields, or "linear,density=log" -> a kind per field."""
    kinds = dict.fromkeys(names, "linear")
    for item in text.split(","):
        name, _, kind = item.rpartition("=")
        if kind not in ("linear", "asinh", "log", "window") or name and name not in names:
            raise UserError(f"--field_maps {text}: takes linear, asinh, log or window, or FIELD=KIND of the "
                            f"fields {', '.join(names)}")
        kinds.update({name: kind} if name else dict.fromkeys(names, kind))
    return list(kinds.values())


class Resize(nn.Module):
    """... H W -> ... H' W' by bicubic matrices, and back by their least-squares inverse: a picture that was
    enlarged comes back exactly."""
    def __init__(self, size, new):
        super().__init__()
        self.same = tuple(size) == tuple(new)
        for name, n, m in zip(("down", "across"), size, new):
            matrix = F.interpolate(torch.eye(n, dtype=torch.float64)[None, None], (m, n), mode="bicubic",
                                   antialias=m < n, align_corners=False)[0, 0]
            self.register_buffer(name, matrix.float(), persistent=False)
            self.register_buffer(f"{name}_inverse", torch.linalg.pinv(matrix).float(), persistent=False)

    def forward(self, x):
        return x if self.same else self.down @ x @ self.across.T

    def inverse(self, x):
        return x if self.same else self.down_inverse @ x @ self.across_inverse.T


def correction(c_in, c_out, width):
    """Three 3x3 convolutions whose last is zero: added to a linear map, they leave it at first. No norm: a
    GroupNorm over the frame would remove what the values mean (document's adapter)."""
    conv = lambda a, b: nn.Conv2d(a, b, 3, padding=1, padding_mode="replicate")
    net = nn.Sequential(conv(c_in, width), nn.SiLU(), conv(width, width), nn.SiLU(), conv(width, c_out))
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    return net


def framewise(net, x):
    return net(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Adapter(nn.Module):
    """C fields of a frame H W <-> 3 channels of a video H' W', frame after frame.

    linear   the 3 principal directions of the standardised fields; back by least squares: C > 3 loses some
    learned  the same maps, and convolutions at the fields' and at the video's size, zero at first
    tile     ceil(C / 3) panels of 3 fields, stacked on the short axis. Where density and pressure have maps
             for all frames, a channel that would stay empty carries the logarithm of the temperature P / rho:
             a linear map of rho up to 100 has no digits left for hot gas of 1. Other empty channels are 0.
    maps: a kind per field. video_size: of a panel (default: the fields' own). repeat: how often each frame
    after the first is shown, since the VAE packs 4 frames into one latent. ahead: frames that --carry_detail
    adds to.
    """
    def __init__(self, kind, names, size, maps, video_size=None, repeat=1, width=64, ahead=0):
        super().__init__()
        self.config = dict(kind=kind, names=list(names), size=list(size), maps=list(maps), repeat=repeat,
                           video_size=list(video_size or size), width=width, ahead=ahead)
        self.kind, self.names, self.repeat, self.C = kind, list(names), repeat, len(names)
        self.register_buffer("detail", torch.zeros(ahead, self.C))             # see Chain.with_detail
        height, across = panel = tuple(video_size or size)
        if height % 16 or across % 16:
            raise UserError(f"video frames must be multiples of 16, not {height}x{across}: name some with "
                            f"--video_size H,W")
        self.hot = (kind == "tile" and self.C % 3 > 0 and {"density", "pressure"} <= set(names)
                    and "window" not in maps)
        self.maps = FieldMaps(self.names + ["temperature"] * self.hot, list(maps) + ["log"] * self.hot)
        self.resize, self.panels, self.order = Resize(size, panel), 1, None
        if kind == "tile":
            first = ["density", "pressure", "temperature"] if self.hot else []
            self.order = [self.maps.names.index(n) for n in first + [n for n in names if n not in first]]
            self.panels = math.ceil(self.C / 3)
            self.axis = -2 if height <= across else -1
            return
        learned = kind == "learned"
        shapes = {"mix": (3, self.C), "shift": (3,), "unmix": (self.C, 3), "unshift": (self.C,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=learned))
        if learned:
            self.encode_fields, self.encode_video = correction(self.C, 3, width), correction(3, 3, width // 2)
            self.decode_video, self.decode_fields = correction(3, 3, width // 2), correction(3, self.C, width)

    @property
    def video_size(self):
        size = list(self.config["video_size"])
        if self.panels > 1:
            size[self.axis] *= self.panels
        return tuple(size)

    def frames(self, T):
        """How many frames of video T frames of fields make."""
        return 1 + self.repeat * (T - 1)

    @torch.no_grad()
    def fit(self, fields):
        """Statistics from training windows B T C H W, physical units (a few dozen will do)."""
        self.maps.fit(self.with_temperature(fields))
        if self.kind == "tile":
            return self
        y = self.maps(fields, fields[:, :1]).movedim(2, -1).flatten(0, -2).double()
        mean, std = y.mean(0), y.std(0).clamp(min=1e-6)
        _, vectors = torch.linalg.eigh(torch.cov(((y - mean) / std).T).reshape(self.C, self.C))
        V = F.pad(vectors.flip(1)[:, :3].T, (0, 0, 0, max(0, 3 - self.C)))     # orthonormal rows
        V = V * torch.where(V.sum(1) < 0, -1., 1.)[:, None]                    # eigenvectors have no sign
        u = (((y - mean) / std) @ V.T).numpy()
        low, high = (torch.from_numpy(q) for q in np.quantile(u, (.001, .999), axis=0))
        centre, half = (low + high) / 2, ((high - low) / 2 * 1.15).clamp(min=1e-6)
        self.mix.copy_(V / std / half[:, None])
        self.shift.copy_(-(V @ (mean / std) + centre) / half)
        self.unmix.copy_(std[:, None] * V.T * half)
        self.unshift.copy_(mean + std * (V.T @ centre))
        return self

    def with_temperature(self, fields):
        if not self.hot:
            return fields
        rho, P = (fields[:, :, self.names.index(n)].clamp(min=1e-6) for n in ("density", "pressure"))
        return torch.cat([fields, (P / rho)[:, :, None]], dim=2)

    def mapped(self, fields):
        fields = self.with_temperature(fields)
        return self.maps(fields, fields[:, :1])

    def to_video(self, fields):
        """Fields B T C H W in physical units, a window -> B T' 3 H' W', in [-1, 1] but for outliers."""
        y = self.mapped(fields)
        if self.kind == "tile":
            y = F.pad(y[:, :, self.order], (0, 0, 0, 0, 0, 3 * self.panels - len(self.order)))
            x = torch.cat(self.resize(y).split(3, dim=2), dim=self.axis)
        else:
            x = torch.einsum("dc,btchw->btdhw", self.mix, y) + self.shift[:, None, None]
            if self.kind == "learned":
                x = self.resize(x + framewise(self.encode_fields, y))
                x = x + framewise(self.encode_video, x)
            else:
                x = self.resize(x)
        return torch.cat([x[:, :1], x[:, 1:].repeat_interleave(self.repeat, dim=1)], dim=1)

    def to_mapped(self, video):
        """Video B T' 3 H' W' -> B T C H W, fields in the maps' units; a tile's temperature follows them."""
        later = video[:, 1:].unflatten(1, (-1, self.repeat)).mean(2) if video.shape[1] > 1 else video[:, 1:]
        x = torch.cat([video[:, :1], later], dim=1)
        if self.kind == "tile":
            x = self.resize.inverse(torch.cat(x.chunk(self.panels, dim=self.axis), dim=2))
            return x[:, :, [self.order.index(c) for c in range(len(self.order))]]
        if self.kind == "learned":
            x = x + framewise(self.decode_video, x)
        x = self.resize.inverse(x)
        y = torch.einsum("cd,btdhw->btchw", self.unmix, x) + self.unshift[:, None, None]
        return y + framewise(self.decode_fields, x) if self.kind == "learned" else y

    def to_fields(self, video, first):
        """Video B T' 3 H' W', first frame B C H W of the window -> fields B T C H W, physical units."""
        x = self.maps.inverse(self.to_mapped(video), self.with_temperature(first[:, None]))
        if self.hot:        # rho is there twice, also as P / T: the mean, weighted by how little each would
            d, p = (self.names.index(name) for name in ("density", "pressure"))    # be off for equal errors
            rho, P, T = x[:, :, d], x[:, :, p].clamp(min=1e-6), x[:, :, -1]
            own = self.maps.slope(rho, "density") ** 2
            other = (P / T) ** 2 * ((self.maps.slope(P, "pressure") / P) ** 2 + self.maps.reach[-1] ** 2)
            mean = (rho / own + P / T / other) / (1 / own + 1 / other)
            x = torch.cat([x[:, :, :d], mean[:, :, None], x[:, :, d + 1:self.C]], dim=2)
        return x

    def error(self, video, fields):
        """Mean squared error of the fields in a video, in units of each field's variance, both as mapped."""
        y = (self.to_mapped(video) - self.mapped(fields))[:, :, :self.C]
        return (y / self.maps.spread[:self.C, None, None]).square().mean()


def save_adapter(folder, adapter):
    """Writes adapter.json and adapter.safetensors."""
    common.write_json(Path(folder, "adapter.json"), adapter.config)
    common.save_weights(Path(folder, "adapter.safetensors"), adapter.state_dict())


def load_adapter(folder, **expected):
    """Reads what save_adapter wrote. UserError where it is absent or its config is not as `expected`."""
    path = Path(folder, "adapter.json")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the adapter {path}: {error}") from error
    for name, value in expected.items():
        if config.get(name) != value:
            raise UserError(f"{path} has {name} {config.get(name)}, this run {value}")
    adapter = Adapter(**config)
    weights = path.with_suffix(".safetensors")
    common.restore_state(adapter, common.load_weights(weights), source=str(weights))
    return adapter


# ---- model: condition and experts -----------------------------------------------------------------------

def masked(z):
    """Latents of the condition B 16 F h w -> B 20 F h w, with a mask that is 1 in the first latent frame."""
    mask = torch.zeros_like(z[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, z], dim=1)


def condition(vae, first, frames):
    """First video frame B 3 H W -> B 20 F h w: mask 4, latents 16, as WanImageToVideoPipeline's
    prepare_latents makes them, to the last bit. The mask is 1 for the first latent frame; the latents are the
    VAE's of the frame followed by grey."""
    video = F.pad(first[:, :, None], (0, 0, 0, 0, 0, frames - 1))              # B 3 T H W
    mode = vae.encode(video.to(vae.dtype)).latent_dist.mode().float()
    mean, std = common.latent_scale(vae, mode.device)
    z = (mode - mean) * (1 / std)                # so multiplied: a division differs in the last bit
    return masked(z)


def decode(vae, z):
    """common.wan_decode without its cut at +-1, for training: where it cuts there is no gradient. (The VAE's
    own cut stays; LinearCodec has none.)"""
    mean, std = common.latent_scale(vae, z.device)
    return vae.decode((z.float() * std + mean).to(vae.dtype)).sample.float().transpose(1, 2)


class ScalarToken(nn.Module):
    """Numbers of a simulation, as t_cool, to a text token in the place of the last padding token. Both are
    zero at first: an untrained token changes nothing. Positive numbers enter as logarithms."""
    def __init__(self, n, text_dim, width=128):
        super().__init__()
        for name in ("positive", "mean", "std"):
            self.register_buffer(name, torch.zeros(n) if name != "std" else torch.ones(n))
        self.net = nn.Sequential(nn.Linear(n, width), nn.SiLU(), nn.Linear(width, text_dim))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)

    @torch.no_grad()
    def fit(self, scalars):
        """scalars: N n of the training set."""
        scalars = scalars.to(self.mean.device)
        self.positive.copy_((scalars > 0).all(0))
        x = self.curve(scalars)
        self.mean.copy_(x.mean(0))
        self.std.copy_(x.std(0, correction=0).clamp(min=1e-6))
        return self

    def curve(self, x):
        return torch.where(self.positive > 0, x.clamp(min=1e-12).log(), x)

    def forward(self, text, scalars):
        """text B L D, scalars B n -> B L D."""
        token = self.net((self.curve(scalars.float()) - self.mean) / self.std)
        return torch.cat([text[:, :-1], text[:, -1:] + token[:, None].to(text.dtype)], dim=1)


class Expert(nn.Module):
    """One of Wan's two transformers with its own scalar token, the one place that autocast is for: fields,
    adapter and codec keep all their digits."""
    def __init__(self, transformer, scalars=0, autocast=contextlib.nullcontext):
        super().__init__()
        self.autocast = autocast
        self.transformer = transformer
        self.token = ScalarToken(scalars, transformer.config.text_dim) if scalars else None

    def forward(self, x, t, text, scalars=None):
        dtype = self.transformer.patch_embedding.weight.dtype
        if self.token is not None:
            text = self.token(text, scalars)
        with self.autocast():
            return self.transformer(x.to(dtype), t, text.to(dtype), return_dict=False)[0].float()


class Experts(nn.Module):
    """Wan's two transformers behind one forward: t >= 900 goes to `high`, less to `low`; a single one takes
    all. x B 36 F h w = [noisy 16, mask 4, condition 16], t B in 0..1000, text B L D, scalars B n -> velocity
    B 16 F h w, fp32. expert: "high" or "low" where the caller knows it, which saves the GPU a wait."""
    def __init__(self, high=None, low=None):
        super().__init__()
        self.high, self.low = high, low

    def forward(self, x, t, text, scalars=None, expert=None):
        if self.high is None or self.low is None:
            return (self.high or self.low)(x, t, text, scalars)
        if expert is None:
            high = t >= 1000 * BOUNDARY
            expert = "high" if high.all() else None if high.any() else "low"
        if expert:
            return getattr(self, expert)(x, t, text, scalars)
        v = torch.empty_like(x[:, :16], dtype=torch.float32)
        for net, rows in ((self.high, high), (self.low, ~high)):
            v[rows] = net(x[rows], t[rows], text[rows], None if scalars is None else scalars[rows])
        return v


def make_experts(args, load, train="lora", scalars=0, autocast=contextlib.nullcontext):
    """Experts with what is trained requiring grad, in fp32: most steps of 1e-5 round a bf16 weight to itself.

    load("transformer" | "transformer_2") -> WanTransformer3DModel. --experts low holds that one alone; high
    trains that one, and samples go on with the other as it is; "one" is the tiny base, a network for all
    noise levels. train: "lora", "full" (the base's own training) or "" (nothing).
    """
    from peft import LoraConfig
    experts = {}
    for name in ("low",) if args.experts in ("low", "one") else ("high", "low"):
        own = train if args.experts in ("both", "one", name) else ""
        dit = load(DIT[name]).requires_grad_(False)
        if own == "lora":
            if getattr(dit, "peft_config", None):
                dit.delete_adapters("default")
            dit.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank,
                                       target_modules=args.lora_targets.split(",")))
        elif own:
            dit.requires_grad_(True)
        if args.grad_checkpoint and own:
            dit.enable_gradient_checkpointing()
        for p in dit.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        experts[name] = Expert(dit, scalars, autocast)
        if scalars:
            experts[name].token.to(dit.patch_embedding.weight.device).requires_grad_(bool(own))
    return Experts(**experts)


# ---- model: loading -------------------------------------------------------------------------------------

def wan_part(args, run, part, dtype=torch.float32, expert="transformer"):
    """A part of Wan: its pretrained weights, or random ones in its shape or in the tiny shape."""
    tiny = args.model == "tiny"
    torch.manual_seed(expert == "transformer_2")     # whatever --seed is: no checkpoint holds what is frozen
    return common.load_wan(args.weights_from, part=part, config=TINY if tiny else args.model, dtype=dtype,
                           device=run.device, random_init=args.random_init or tiny, expert=expert)


def frozen_dtype(args):
    """What is frozen: bf16, and fp32 where it is tiny."""
    return torch.float32 if args.model == "tiny" else torch.bfloat16


# ---- objective ------------------------------------------------------------------------------------------

def shift_sigma(u, shift):
    """Wan's schedule: u in [0, 1] -> sigma = s u / (1 + (s - 1) u), more of it where there is much noise."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma, shift):
    """Inverse of shift_sigma."""
    return sigma / (shift - (shift - 1) * sigma)


def whose_turn(n, experts, shift):
    """The expert that step n trains, the same on every process: "high" or "low". With both, high has the
    share of uniform u that lies above the boundary (shift 3: 25 %, 5: 36 %), spread evenly. A whole step
    belongs to one, so that one network runs and not two on halves of a batch."""
    if experts != "both":
        return experts
    share = 1 - unshift_sigma(BOUNDARY, shift)
    return "high" if math.floor((n + 1) * share) > math.floor(n * share) else "low"


def draw_sigma(u, expert, shift):
    """Uniform u B in [0, 1) -> sigma B in the expert's part of the schedule."""
    edge = unshift_sigma(BOUNDARY, shift)
    low, high = {"high": (edge, 1.), "low": (0., edge), "one": (0., 1.)}[expert]
    return shift_sigma(low + (high - low) * u, shift)


def add_noise(z, noise, sigma):
    """x_sigma = (1 - sigma) z + sigma eps; the velocity to learn is eps - z."""
    return torch.lerp(z, noise, expand_to(sigma, z))


SIGMA_EDGES = (0., .3, .6, .9)


def loss_by_sigma(sigma, errors):
    """sigma, errors B -> {"loss_sigma_EDGE": errors B from this edge to the next, NaN for the others}."""
    return {f"loss_sigma_{a}": errors.where((sigma >= a) & (sigma < b), math.nan)
            for a, b in zip(SIGMA_EDGES, (*SIGMA_EDGES[1:], 1.1))}


# ---- sampler --------------------------------------------------------------------------------------------

def integrate(velocity, x, steps, shift, solver="unipc", start=1.):
    """From x at sigma `start` to sigma 0 in `steps` calls of velocity(x, sigma, t), sigma a number and t what
    the network is told. Both solvers use the grid of Wan's scheduler; unipc is diffusers' own, whose t are
    whole numbers as in its pipeline."""
    u = np.linspace(unshift_sigma(start, shift), 1 / 1000, steps + 1)[:-1]
    if solver == "euler":
        sigmas = [*shift_sigma(u, shift).tolist(), 0.]
        for sigma, following in zip(sigmas, sigmas[1:]):
            x = x + (following - sigma) * velocity(x, sigma, 1000 * sigma)
        return x
    from diffusers import UniPCMultistepScheduler
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                        flow_shift=shift)
    scheduler.set_timesteps(sigmas=u)
    for sigma, t in zip(scheduler.sigmas.tolist(), scheduler.timesteps):
        x = scheduler.step(velocity(x, sigma, t.item()), t, x, return_dict=False)[0]
    return x


def mix_seed(*numbers):
    """Integers -> one seed, without touching the global generators."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seeded_noise(like, seeds):
    """Normal noise in the shape of `like`: a sample's depends on its own seed, not on batch or device."""
    normal = lambda seed: torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed))
    return torch.stack([normal(seed) for seed in seeds]).to(like.device)


def rollout(model, history, steps, seeds, samples=1, **known):
    """Autoregression: a call sees the last N frames, its own predictions among them. history B N C H W in
    physical units, seeds one per window, known: text, scalars ... B -> B S T C H W, T = steps."""
    B, N = history.shape[:2]
    frames = history.repeat_interleave(samples, dim=0)
    known = {name: value.repeat_interleave(samples, dim=0) for name, value in known.items()}
    call = 0
    while frames.shape[1] < N + steps:
        own = [mix_seed(seed, member, call) for seed in seeds for member in range(samples)]
        frames = torch.cat([frames, model.predict(frames[:, -N:], seeds=own, **known)], dim=1)
        call += 1
    return frames[:, N:N + steps].unflatten(0, (B, samples))


# ---- the four modes: forward(batch) -> loss, parts; predict(history) -> fields --------------------------

class Chain(nn.Module):
    """Fields, adapter, frozen VAE and back: what the modes share. A batch has "fields" B T C H W, the first
    args.n_in of T = n_in + n_out frames given, and "text" B L D and "scalars" B n where there is a network
    that reads them."""
    fresh = False                                # whether this process trained it
    one_of_two = False                           # whether a micro-batch leaves trained parameters unused

    def __init__(self, adapter, vae, args):
        super().__init__()
        self.adapter, self.args = adapter, args
        self.frozen = {"vae": vae}               # in a dict: not a part of what is wrapped, trained and saved

    @property
    def vae(self):
        return self.frozen["vae"]

    @torch.no_grad()
    def latents(self, fields):
        """-> z0 B 16 F h w. Without gradient: a target that the prediction's loss can move goes constant."""
        return common.wan_encode(self.vae, self.adapter.to_video(fields))

    @torch.no_grad()
    def condition(self, first, T):
        """First frames B C H W of T -> B 20 F h w."""
        return condition(self.vae, self.adapter.to_video(first[:, None])[:, 0], self.adapter.frames(T))

    def persistence(self, history):
        return torch.cat([history, history[:, -1:].expand(-1, self.args.n_out, -1, -1, -1)], dim=1)

    @torch.no_grad()
    def through_vae(self, fields):
        """Fields B T C H W, T such that the video has 4k + 1 frames -> what adapter and VAE make of them."""
        video = self.adapter.to_video(fields)
        video = common.wan_decode(self.vae, common.wan_encode(self.vae, video))
        return self.adapter.to_fields(video, fields[:, 0])

    @torch.no_grad()
    def with_detail(self, out, given):
        """Adds to frames B n_out C H W what adapter and VAE lose of the last given one B C H W, weighted by
        how much of it is still there 1, 2, ... frames on (--carry_detail)."""
        if not len(self.adapter.detail):
            return out
        lost = given - self.through_vae(given[:, None])[:, 0]
        return out + self.adapter.detail[:, :, None, None] * lost[:, None]

    @torch.no_grad()
    def fit_detail(self, fields):
        """Those weights by least squares, from training windows B n_in + n_out C H W."""
        N = self.args.n_in
        lost, given = (fields - self.through_vae(fields))[:, N:], fields[:, N - 1]
        first = (given - self.through_vae(given[:, None])[:, 0])[:, None]
        size = first.square().sum((0, 3, 4)).clamp(min=1e-12)
        self.adapter.detail.copy_((lost * first).sum((0, 3, 4)) / size)

    @torch.no_grad()
    def to_fields(self, z, history):
        """Latents -> the n_out frames after the given ones B n_in C H W, physical units."""
        out = self.adapter.to_fields(common.wan_decode(self.vae, z), history[:, 0])[:, -self.args.n_out:]
        return self.with_detail(out, history[:, -1])

    @torch.no_grad()
    def round_trip(self, fields):
        """What adapter and VAE alone make of a window: the floor under every forecast."""
        out, N = self.through_vae(fields), self.args.n_in
        return torch.cat([out[:, :N], self.with_detail(out[:, N:], fields[:, N - 1])], dim=1)

    def adapter_losses(self, fields):
        """The document's cycle (adapter alone) and reconstruction (through the VAE, with gradient on the way
        there and back), and what the video has beyond +-1, which the VAE could not give back."""
        video = self.adapter.to_video(fields)
        out = decode(self.vae, common.wan_encode(self.vae, video))
        error = self.adapter.error
        return {"recon_loss": error(out, fields), "cycle_loss": error(video, fields),
                "range_loss": F.relu(video.abs() - 1).square().mean()}

    def total(self, parts):
        """Weights: the document's diffusion 1, reconstruction .5, cycle .1; its legacy mode's latent 2."""
        a = self.args
        weights = {"recon_loss": a.recon_weight, "cycle_loss": a.adapter_weight,
                   "latent_loss": a.latent_weight, "physics_loss": a.physics_weight}
        loss = sum(weights.get(name, 1.) * value for name, value in parts.items())
        return loss, {name: value.detach() for name, value in parts.items()}


class AdapterOnly(Chain):
    """--mode adapter, and stage 0 of the others: fields through the VAE and back. Predicts persistence."""
    def forward(self, batch):
        return self.total(self.adapter_losses(batch["fields"]))

    def predict(self, history, seeds=None, **known):
        return self.through_vae(self.persistence(history))[:, -self.args.n_out:]


class ConvLSTM(nn.Module):
    """The document's predictor, 645,777 parameters: latents B 16 F h w -> the next `steps` of them. Two
    cells over a 3x3 convolution; latent n + 1 = latent n + 0.1 (learned) times what the head says."""
    def __init__(self, z=16, hidden=64):
        super().__init__()
        self.inp = nn.Conv2d(z, hidden, 3, padding=1)
        self.cells = nn.ModuleList(nn.Conv2d(2 * hidden, 4 * hidden, 3, padding=1) for _ in range(2))
        self.head = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1), nn.GELU(),
                                  nn.Conv2d(hidden, z, 3, padding=1))
        self.scale = nn.Parameter(torch.tensor(.1))

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


class ConvLSTMForecast(Chain):
    """--mode convlstm: 4k + 1 frames in, since the VAE drops others; the losses are the document's, with the
    physics decoded with gradient. A frozen adapter has no losses of its own."""
    def __init__(self, adapter, vae, args):
        super().__init__(adapter, vae, args)
        self.net = ConvLSTM(vae.config.z_dim)
        self.given = (adapter.frames(args.n_in) + 3) // 4                      # latent frames
        self.asked = (adapter.frames(args.n_in + args.n_out) + 3) // 4 - self.given

    def continued(self, z):
        z = z[:, :, :self.given]
        return torch.cat([z, self.net(z, self.asked)], dim=2)

    def forward(self, batch):
        fields, parts = batch["fields"], {}
        if any(p.requires_grad for p in self.adapter.parameters()):
            parts = self.adapter_losses(fields)
        z = batch["latents"] if "latents" in batch else self.latents(fields)
        guess = self.continued(z)
        parts["latent_loss"] = F.mse_loss(guess[:, :, self.given:], z[:, :, self.given:])
        if self.args.physics_weight:
            parts["physics_loss"] = self.adapter.error(decode(self.vae, guess), fields)
        return self.total(parts)

    @torch.no_grad()
    def predict(self, history, seeds=None, **known):
        return self.to_fields(self.continued(self.latents(history)), history)


class OneShot(Chain):
    """--mode oneshot: one call at t = 0 without noise. z_in are the latents of the given frame, held still;
    latent_pred = z_in - DiT(z_in). The low-noise expert alone."""
    def __init__(self, adapter, vae, experts, args):
        super().__init__(adapter, vae, args)
        self.experts = experts

    def guess(self, z_in, cond, text, scalars=None):
        t = torch.zeros(len(z_in), device=z_in.device)
        return z_in - self.experts(torch.cat([z_in, cond], dim=1), t, text, scalars, expert="low")

    def forward(self, batch):
        fields, text, scalars = batch["fields"], batch["text"], batch.get("scalars")
        z = batch["latents"] if "latents" in batch else self.latents(fields)
        z_in = self.latents(self.persistence(fields[:, :1]))
        guess = self.guess(z_in, self.condition(fields[:, 0], fields.shape[1]), text, scalars)
        parts = {"latent_loss": F.mse_loss(guess, z)}
        if self.args.physics_weight:
            parts["physics_loss"] = self.adapter.error(decode(self.vae, guess), fields)
        return self.total(parts)

    @torch.no_grad()
    def predict(self, history, text, scalars=None, seeds=None):
        video = self.persistence(history)
        cond = self.condition(history[:, 0], video.shape[1])
        z = self.guess(self.latents(video), cond, text, scalars)
        z[:, :, 0] = cond[:, 4:, 0]
        return self.to_fields(z, history)


class NativeI2V(Chain):
    """The default mode: from one frame, by Wan's own image-to-video diffusion."""
    def __init__(self, adapter, vae, experts, args, negative=None):
        """negative: the encoded empty text 1 L D, for guidance."""
        super().__init__(adapter, vae, args)
        self.experts, self.negative = experts, negative
        self.one_of_two = args.experts == "both"

    def forward(self, batch, sigma, noise, expert=None):
        """batch: cached "latents" B 16 F h w and "condition" B 20 F h w, or "fields": then the adapter, if it
        is trained, has its own losses beside (joint training). sigma B, noise B 16 F h w.
        parts: numbers, and "errors" B, one per sample."""
        if "latents" in batch:
            z, cond, parts = batch["latents"], batch["condition"], {}
        else:
            fields = batch["fields"]
            z, cond = self.latents(fields), self.condition(fields[:, 0], fields.shape[1])
            trained = any(p.requires_grad for p in self.adapter.parameters())
            parts = self.adapter_losses(fields) if trained else {}
        x = torch.cat([add_noise(z, noise, sigma), cond], dim=1)
        v = self.experts(x, 1000 * sigma, batch["text"], batch.get("scalars"), expert)
        errors = (v - (noise - z)).square().flatten(1).mean(1)                 # all latent frames, as in Wan
        loss, parts = self.total({"diffusion_loss": errors.mean(), **parts})
        return loss, {**parts, "errors": errors.detach()}

    @torch.no_grad()
    def sample_latents(self, cond, noise, text, scalars=None, still=None):
        """cond B 20 F h w, noise B 16 F h w -> z. still: where the low-noise expert is alone, the latents of
        the frame held still; it starts from them at sigma 0.9, which it knows, and not from pure noise."""
        args, start = self.args, 1.
        if self.experts.high is None:
            start, noise = BOUNDARY, torch.lerp(still, noise, BOUNDARY)

        def velocity(x, sigma, t):
            expert = "high" if t >= 1000 * BOUNDARY else "low"
            t, x = torch.full((len(x),), t, device=x.device), torch.cat([x, cond], dim=1)
            v = self.experts(x, t, text, scalars, expert)
            if args.cfg != 1:
                away = self.experts(x, t, self.negative.expand_as(text), scalars, expert)
                v = away + args.cfg * (v - away)
            return v

        return integrate(velocity, noise, args.steps, args.shift, args.solver, start)

    @torch.no_grad()
    def predict(self, history, text, scalars=None, seeds=None):
        """history B 1 C H W, text B L D, seeds B integers -> B n_out C H W, physical units."""
        video = self.persistence(history[:, -1:])
        cond = self.condition(video[:, 0], video.shape[1])
        still = self.latents(video) if self.experts.high is None else None
        noise = seeded_noise(cond[:, 4:], seeds)
        z = self.sample_latents(cond, noise, text, scalars, still)
        z[:, :, 0] = cond[:, 4:, 0]              # the given frame's own latents, which need no guess
        return self.to_fields(z, history)


# ---- data: The Well's files -----------------------------------------------------------------------------

@dataclass
class WellFile:
    """What a file of The Well says of itself. fields: (group, name, components) of those that change with
    time, in loading order; names: the channels' (t0, t1's components, t2's); shape: H, W; boundaries: of
    these axes, as ("PERIODIC",); scalars: numbers that do not change, {name: number}."""
    path: Path
    fields: list
    names: list
    shape: tuple
    boundaries: list
    trajectories: int
    steps: int
    scalars: dict


def set_folder(root, dataset):
    """The set's own folder, where root is that, the folder of the sets, or the one above it."""
    root = Path(root)
    for folder in (root / "datasets" / dataset, root / dataset, root):
        if (folder / "data").is_dir():
            return folder
    raise UserError(f"no {dataset} in {root} (looked for datasets/{dataset}/data): "
                    f"python {SCRIPT}.py --download --dataset {dataset} --data_dir {root}")


def open_set(root, dataset, split):
    """-> list of WellFile, by name. UserError for an empty split, and files that differ in fields or grid."""
    folder = set_folder(root, dataset) / "data" / split
    paths = sorted(p for p in folder.glob("*.h*5") if p.suffix in (".hdf5", ".h5"))
    if not paths:
        raise UserError(f"no .hdf5 files in {folder}: python {SCRIPT}.py --download --data_dir {root}")
    files = [open_file(path) for path in paths]
    first = files[0]
    for file in files[1:]:
        if file.shape != first.shape:
            raise UserError(f"{file.path} has the grid {file.shape}, but {first.path.name} {first.shape}: "
                            "a set has one grid")
        if file.names != first.names:
            raise UserError(f"{file.path} has the fields {', '.join(file.names)}, but {first.path.name} "
                            f"{', '.join(first.names)}: download that file again")
    return files


def open_file(path):
    """A file's metadata. UserError, naming the file, where a group or field is missing or a size is wrong."""
    try:
        with h5py.File(path) as file:
            return read_metadata(Path(path), file)
    except (KeyError, OSError) as error:           # h5py's words name the missing group, attribute or field
        reason = str(error.args[-1]).splitlines()[0]
        raise UserError(f"{path} is not as The Well publishes it ({reason}): download it again") from None


def read_metadata(path, file):
    dims = [str(dim) for dim in file["dimensions"].attrs["spatial_dims"]]
    if len(dims) != 2:
        raise UserError(f"{path} has {len(dims)} spatial axes: only The Well's 2-D sets can be used")
    shape = tuple(file["dimensions"][dim].shape[-1] for dim in dims)
    trajectories, steps = int(file.attrs["n_trajectories"]), file["dimensions/time"].shape[-1]
    fields, names = [], []
    for order in range(3):
        group = f"t{order}_fields"
        components = ([""], dims, [a + b for a in dims for b in dims])[order]
        for name in file[group].attrs["field_names"]:
            stored = file[group][name]
            varying = [stored.attrs[f"{what}_varying"] for what in ("sample", "time")]
            varying += list(stored.attrs["dim_varying"])
            sizes = [n for n, used in zip((trajectories, steps, *shape), varying) if used] + [2] * order
            if stored.shape != tuple(sizes):
                raise UserError(f"{path}: field {name} is {stored.shape}, but the file's dimensions make it "
                                f"{tuple(sizes)}: download the file again")
            if varying[1]:
                fields.append((group, str(name), len(components)))
                names += [f"{name}_{part}" if part else str(name) for part in components]
    boundaries = [tuple(sorted({str(b.attrs["bc_type"]).upper() for b in file["boundary_conditions"].values()
                                if dim in b.attrs["associated_dims"]})) or ("OPEN",) for dim in dims]
    scalars = {}
    for name in file["scalars"].attrs["field_names"]:
        value = np.ravel(file["scalars"][name][()])[0]
        scalars[str(name)] = float(f"{value:.6g}")                # .03 is .029999999 in float32
    return WellFile(path, fields, names, shape, boundaries, trajectories, steps, scalars)


def read_window(file, trajectory, start, length):
    """Frames start .. start + length - 1 of a trajectory -> T C H W float32 in physical units.

    UserError where the trajectory is too short, and for NaN or Inf, naming file, trajectory and step.
    """
    if start + length > file.steps:
        raise UserError(f"{file.path} has {file.steps} steps: a window of {length} from {start} does not fit")
    channels = []
    with h5py.File(file.path) as opened:
        for group, name, components in file.fields:
            stored = opened[group][name]
            index = (trajectory,) if stored.attrs["sample_varying"] else ()
            values = np.asarray(stored[*index, start:start + length], np.float32)
            sizes = [n if used else 1 for n, used in zip(file.shape, stored.attrs["dim_varying"])]
            values = values.reshape(length, *sizes, components)
            channels.append(np.broadcast_to(values, (length, *file.shape, components)))
    window = torch.from_numpy(np.concatenate(channels, -1)).permute(0, 3, 1, 2).contiguous()
    good = window.isfinite().flatten(1).all(1)
    if not good.all():
        raise UserError(f"{file.path}: trajectory {trajectory} has NaN or Inf at step "
                        f"{start + int(good.int().argmin())}: download the file again")
    return window


def list_windows(files, length, count=0):
    """-> [(index of the file, trajectory, start)] of windows of `length` steps inside a trajectory: all, or
    `count` of them, of each file equally many and those evenly over its trajectories and starts."""
    for file in files:
        if file.steps < length:
            raise UserError(f"{file.path} has {file.steps} steps, too few for a window of {length}")
    all_of = [[(i, k, start) for k in range(file.trajectories) for start in range(file.steps - length + 1)]
              for i, file in enumerate(files)]
    if not count:
        return sum(all_of, [])
    chosen = []
    for i, candidates in enumerate(all_of):
        share = min(count // len(files) + (i < count % len(files)), len(candidates))
        chosen += [candidates[(2 * j + 1) * len(candidates) // (2 * share)] for j in range(share)]
    return chosen


def compute_stats(files):
    """-> {"mean", "std", "rms", and of one-step differences "mean_delta", ...: {field: number or list}} as in
    The Well's stats.yaml: over every trajectory, step and cell, std of the population, in float64."""
    sums = {"": [0, 0., 0.], "_delta": [0, 0., 0.]}            # count, sum, sum of squares
    for file in files:
        for trajectory in range(file.trajectories):
            frames = read_window(file, trajectory, 0, file.steps).double()
            for suffix, x in (("", frames), ("_delta", frames.diff(dim=0))):
                sums[suffix][0] += x[:, 0].numel()
                sums[suffix][1] += x.sum((0, 2, 3))
                sums[suffix][2] += x.square().sum((0, 2, 3))
    stats = {}
    for suffix, (count, total, squares) in sums.items():
        mean, square = total / count, squares / count
        values = {"mean": mean, "std": (square - mean ** 2).clamp(min=0).sqrt(), "rms": square.sqrt()}
        for key, value in values.items():
            parts = iter(value.tolist())
            lists = {name: [next(parts) for _ in range(n)] for _, name, n in files[0].fields}
            stats[key + suffix] = {name: v if len(v) > 1 else v[0] for name, v in lists.items()}
    return stats


def train_mean(root, dataset):
    """-> C, each field's mean over the train split, of stats.yaml. Where it is missing, computed and said."""
    files, path = open_set(root, dataset, "train"), set_folder(root, dataset) / "stats.yaml"
    if path.is_file():
        stats = yaml.safe_load(path.read_text())
    else:
        print(f"{path} is missing: computing it from the {len(files)} files of the train split")
        stats = compute_stats(files)
    try:
        means = [np.ravel(stats["mean"][name]) for _, name, _ in files[0].fields]
    except (KeyError, TypeError):
        raise UserError(f"{path} lacks the mean of a field of {files[0].path.name}: remove it, and it is "
                        f"computed") from None
    return torch.tensor(np.concatenate(means), dtype=torch.float32)


# ---- data: download -------------------------------------------------------------------------------------

def download(dataset, root):
    """Fetches a set of The Well from the Hugging Face hub into root/datasets/ -> its folder. What is there is
    kept, a broken transfer goes on. UserError without a network, or for a set that there is not."""
    from huggingface_hub import snapshot_download
    folder, repo = Path(root) / "datasets" / dataset, f"polymathic-ai/{dataset}"
    try:
        snapshot_download(repo, repo_type="dataset", local_dir=folder,
                          allow_patterns=["stats.yaml", *(f"data/{split}/*" for split in SPLITS)])
    except Exception as error:                     # the hub's own, httpx's or OSError, by what failed
        raise UserError(f"cannot download https://huggingface.co/datasets/{repo} ({common.reason(error)}): "
                        f"where there is a network, hf download {repo} --repo-type dataset --local-dir "
                        f"{folder}") from error
    return folder


# ---- data: the simulated twin ---------------------------------------------------------------------------
# 2-D Euler with a cooling layer between hot dilute and cold dense gas (Fielding 2020), in The Well's units:
# the box is 1 wide and 3 high, P = 1, hot rho = T = 1. Initial profile and cooling curve are this script's
# choice, set so that the moments are near the published ones. Conserved U: rho, rho u, rho v, E; primitive W:
# rho, u, v, P; both 4 B nx ny, so that a component is contiguous.

GAMMA = 5 / 3
T_COLD, T_HOT = .01, 1.
PUBLISHED_MOMENTS = {"density": (34.847, 44.284, 12.029), "pressure": (.94475, .06097, .035378),
                     "velocity_x": (.0061707, .041764, .016923), "velocity_y": (-.024651, .040095, .019896)}


def to_primitive(U, out=None):
    """U -> W, with floors of 1e-3 under density and pressure."""
    W = torch.empty_like(U) if out is None else out
    W[0] = U[0].clamp(min=1e-3)
    torch.div(U[1], W[0], out=W[1])
    torch.div(U[2], W[0], out=W[2])
    kinetic = torch.mul(U[1], W[1]).addcmul_(U[2], W[2]).mul_(.5)
    W[3] = (U[3] - kinetic).mul_(GAMMA - 1).clamp_(min=1e-3)
    return W


def to_conserved(W):
    """W -> U."""
    energy = W[3] / (GAMMA - 1) + .5 * W[0] * (W[1] ** 2 + W[2] ** 2)
    return torch.stack([W[0], W[0] * W[1], W[0] * W[2], energy])


def padded_primitive(U, axis, boundary):
    """U -> W with two ghost cells on each side of an axis: "periodic", "open" (zero gradient) or "reservoir".

    A reservoir is open below, and above it has hot gas with P = 1 and v = 0: without it the box loses its
    pressure to cooling, and with the velocity copied instead, sound is reflected and P is 1, not .95.
    """
    n, sizes = U.shape[axis], list(U.shape)
    sizes[axis] += 4
    W = U.new_empty(sizes)
    to_primitive(U, W.narrow(axis, 2, n))
    periodic = boundary == "periodic"
    for ghost, source in ((0, n), (1, n + 1), (n + 2, 2), (n + 3, 3)):
        source = source if periodic else 2 if ghost < 2 else n + 1
        W.select(axis, ghost).copy_(W.select(axis, source))
    if boundary == "reservoir":
        top = W.narrow(axis, n + 2, 2)
        top[0], top[2], top[3] = 1., 0., 1.
    return W


def face_states(W, axis, ratio):
    """Padded W -> states left and right of each face half a step later, stacked: 2 4 B ... (MUSCL-Hancock).

    ratio: dt / h. Half of a cell's monotonised-central slope is (a + b) / 4 of the differences a, b to both
    neighbours, between 0 and the smaller of the two, and 0 where their signs differ. Density and pressure
    stay above half the least of the cell and its neighbours.
    """
    n, m = axis - 1, W.shape[axis] - 2
    d = W.diff(dim=axis)
    a, b = d.narrow(axis, 0, m), d.narrow(axis, 1, m)
    lower, upper = torch.maximum(a, b).clamp_(max=0), torch.minimum(a, b).clamp_(min=0)
    half = (a + b).mul_(.25).clamp_(lower, upper)
    cells = W.narrow(axis, 1, m)
    later = torch.addcmul(cells, cells[n], half, value=-ratio)                    # advection, and
    later[0].addcmul_(cells[0], half[n], value=-ratio)                            # compression
    later[3].addcmul_(cells[3], half[n], value=-ratio * GAMMA)
    later[n].addcdiv_(half[3], cells[0], value=-ratio)                            # pressure gradient
    least = torch.minimum(torch.minimum(W.narrow(axis, 0, m), W.narrow(axis, 2, m)), cells).mul_(.5)
    states = torch.stack([later + half, later.sub_(half)])
    for c in (0, 3):                             # else unresolved cooling fronts make them negative at times
        torch.maximum(states[:, c], least[c], out=states[:, c])
    return torch.stack([states[0].narrow(axis, 0, m - 1), states[1].narrow(axis, 1, m - 1)])


def hllc(states, n):
    """Fluxes through faces from face_states, along velocity component n (1 or 2): 4 B ... (Toro 2009, 10.4).

    On the upwind side of the contact wave, F + s (U* - U); s is 0 where the outer wave goes that way too.
    """
    t = 3 - n                                              # the transverse component
    rho, u, p = states[:, 0], states[:, n], states[:, 3]
    c = (p / rho).mul_(GAMMA).sqrt_()
    low, high = (u - c).amin(0), (u + c).amax(0)           # speeds of the outer waves
    d = torch.stack([low, high]).sub_(u).mul_(rho)         # mass flux through them
    q = torch.addcmul(p, d, u, value=-1)
    contact = (q[1] - q[0]).div_(d[0] - d[1])
    leftward = contact < 0
    upwind = torch.where(leftward, states[1], states[0])
    rho, u, v, p = upwind[0], upwind[n], upwind[t], upwind[3]
    d = torch.where(leftward, d[1], d[0])
    starred = d / (torch.where(leftward, high, low) - contact)                    # rho*
    s = torch.where(leftward, high.clamp_(min=0), low.clamp_(max=0))
    flux = torch.empty_like(upwind)
    mass = torch.addcmul(rho * u, s, starred - rho, out=flux[0])
    jump = (contact - u).mul_(starred).mul_(s)
    torch.addcmul(p, mass, u, out=flux[n]).add_(jump)
    torch.mul(mass, v, out=flux[t])
    specific = (p / rho).div_(GAMMA - 1).add_((u * u).addcmul_(v, v), alpha=.5)   # E / rho
    torch.mul(mass, specific, out=flux[3]).addcmul_(p, u).addcmul_(jump, contact + p / d)
    return flux


def sweep(U, axis, dt, h, boundary):
    """U after dt of the fluxes along one axis."""
    W = padded_primitive(U, axis, boundary)
    return U.sub(hllc(face_states(W, axis, dt / h), axis - 1).diff(dim=axis), alpha=dt / h)


def cool(U, dt, t_cool):
    """Radiative loss over dt, at constant density, in place: T falls as exp(-dt / t_cool w(T)), not below the
    cold gas's. w is a Gaussian in ln T around .1, and 0 in both phases. Exact for w held over the step."""
    W = to_primitive(U)
    T = W[3] / W[0]
    w = (T * 10).log_().square_().mul_(-1 / (2 * .3 ** 2)).exp_()
    w = w * ((T > 1.02 * T_COLD) & (T < .98 * T_HOT))
    cooled = torch.maximum(T * w.mul_(-dt / t_cool).exp_(), T.clamp(max=T_COLD))
    U[3] += W[0] * (cooled - T) / (GAMMA - 1)


def initial_state(nx, seeds):
    """-> U: 4 B nx 3nx, hot gas sliding over 100 times denser cold gas, with 8 sine waves of v at the
    interface, whose amplitudes and phases each trajectory's seed draws. All sinks at .004, about as fast as
    the cold layer grows: at rest it would fill the box, and its mean density be 42 and not 35."""
    x, y = (torch.arange(nx) + .5) / nx - .5, (torch.arange(3 * nx) + .5) / nx - 1
    step, k, v = torch.tanh(y / .05), torch.arange(1, 9)[:, None], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        phase = 2 * math.pi * torch.rand(8, 1, generator=generator)
        amplitude = torch.randn(8, 1, generator=generator) / math.sqrt(8)
        waves = (amplitude * torch.sin(2 * math.pi * k * x + phase)).sum(0)
        v.append(.004 * waves[:, None] * torch.exp(-(y / .2) ** 2) - .004)
    v = torch.stack(v)
    rho, u = (1 + 99 * (1 - step) / 2).expand_as(v), (.05 * step).expand_as(v)
    return to_conserved(torch.stack([rho, u, v, torch.ones_like(v)]))


@torch.no_grad()
def solve(U, h, t_end, snapshots, t_cools=None, boundaries=("periodic", "reservoir"), cfl=.8):
    """U: 4 B nx ny of cells of side h -> W at 0 .. t_end: B snapshots 4 nx ny, on the CPU.

    The axes take turns in going first (Strang), which is second order and lets cfl be up to 1. Trajectories
    take the same step: their fastest sound is the hot gas's anyway, and snapshots fall together. Without
    t_cools (one per trajectory) nothing cools. UserError where the solution is lost.
    """
    if t_cools is not None:
        t_cools = torch.tensor(t_cools, dtype=U.dtype, device=U.device).view(-1, 1, 1)
    W, t, steps = to_primitive(U), 0., 0
    frames = [W.cpu()]
    for k in range(1, snapshots):
        due = k * t_end / (snapshots - 1)
        while t < due:
            c = (W[3] / W[0]).mul_(GAMMA).sqrt_()
            fastest = W[1:3].abs().amax(0).add_(c).amax().item()
            if not fastest < 30:                           # NaN too; the hot gas's sound has 1.3
                raise UserError(f"the simulation diverged at t = {t:.3f}: choose another --seed or grid")
            dt = cfl * h / fastest
            dt, t = (due - t, due) if t + 1.001 * dt >= due else (dt, t + dt)
            for axis in ((2, 3), (3, 2))[steps % 2]:
                U = sweep(U, axis, dt, h, boundaries[axis - 2])
            if t_cools is not None:
                cool(U, dt, t_cools)
            W, steps = to_primitive(U), steps + 1
        frames.append(W.cpu())
    return torch.stack(frames).permute(2, 0, 1, 3, 4)


def write_file(path, W, t_cool, times):
    """W: B T 4 nx ny -> a file as The Well publishes this set, written beside and renamed."""
    B, T, _, nx, ny = W.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".tmp_{path.name}")
    texts = h5py.string_dtype()

    def put(group, name, data, time_varying=False, **attributes):
        stored = group.create_dataset(name, data=data)
        stored.attrs.update({"sample_varying": False, "time_varying": time_varying, **attributes})

    with h5py.File(part, "w") as file:
        file.attrs.update({"dataset_name": DATASET, "grid_type": "cartesian", "n_spatial_dims": 2,
                           "n_trajectories": B, "simulation_parameters": ["tcool"], "tcool": t_cool})
        group = file.create_group("dimensions")
        group.attrs["spatial_dims"] = ["x", "y"]
        put(group, "time", np.float32(times), time_varying=True)
        put(group, "x", np.float32((np.arange(nx) + .5) / nx - .5))
        put(group, "y", np.float32((np.arange(ny) + .5) / nx - 1))
        for name, kind, n in (("x_periodic", "PERIODIC", nx), ("y_open", "OPEN", ny)):
            group = file.create_group(f"boundary_conditions/{name}")
            group.attrs.update({"associated_dims": [name[0]], "associated_fields": np.array([], texts),
                                "bc_type": kind, "sample_varying": False, "time_varying": False})
            group["mask"] = np.isin(np.arange(n), (0, n - 1))
        group = file.create_group("scalars")
        group.attrs["field_names"] = ["tcool"]
        put(group, "tcool", np.float32(t_cool))
        varying = {"sample_varying": True, "time_varying": True, "dim_varying": [True, True]}
        fields = ({"density": W[:, :, 0], "pressure": W[:, :, 3]},
                  {"velocity": W[:, :, 1:3].movedim(2, -1)}, {})
        for order, named in enumerate(fields):
            group = file.create_group(f"t{order}_fields")
            group.attrs["field_names"] = np.array(list(named), texts)
            for name, data in named.items():
                put(group, name, data.float().numpy(), **varying)
    part.replace(path)


def simulate_files(folder, made_of, number, device="cpu"):
    """Simulates the trajectories of t_cool `number`, all splits at once, and writes a file for each split."""
    if device == "cpu":
        torch.set_num_threads(1)                   # a process per core; a fork cannot use OpenMP's threads
    t_cool, counts, nx = made_of["t_cools"][number], made_of["trajectories"], made_of["nx"]
    paths = [folder / f"data/{split}/turbulent_radiative_layer_tcool_{t_cool:.2f}.hdf5" for split in SPLITS]
    if all(path.is_file() for path in paths):
        return
    total = sum(counts)
    seeds = np.random.SeedSequence([made_of["seed"], number]).generate_state(total, np.uint32).tolist()
    U = initial_state(nx, seeds).to(device)
    W = solve(U, 1 / nx, made_of["t_end"], made_of["snapshots"], [t_cool] * total)
    times = np.linspace(0, made_of["t_end"], made_of["snapshots"])
    for path, part in zip(paths, W.split(counts)):
        write_file(path, part, t_cool, times)


def simulate(root, nx, t_cools, trajectories, t_end, snapshots, seed=0, device="cpu", processes=None):
    """Writes the set, simulated on nx x 3 nx cells, under root/datasets/. On the CPU, a process per t_cool.

    trajectories: of train, valid and test, for every t_cool. The files that are there already are kept, so an
    interrupted call goes on; UserError where they were made otherwise.
    """
    folder = Path(root) / "datasets" / DATASET
    made_of = {"nx": nx, "t_cools": list(t_cools), "trajectories": list(trajectories), "t_end": t_end,
               "snapshots": snapshots, "seed": seed}
    kept = folder / "simulated.json"
    if folder.exists() and (not kept.is_file() or json.loads(kept.read_text()) != made_of):
        raise UserError(f"{folder} holds another set: remove it, or name what you want with --data_dir")
    if (folder / "stats.yaml").is_file():          # written last: the set is complete
        return
    common.write_json(kept, made_of)
    numbers = range(len(t_cools))
    if device == "cpu":
        workers = min(processes or os.cpu_count(), len(t_cools))
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
            jobs = [pool.submit(simulate_files, folder, made_of, number) for number in numbers]
            for job in tqdm(jobs, "simulate", unit="t_cool"):
                job.result()
    else:
        for number in tqdm(numbers, "simulate", unit="t_cool"):
            simulate_files(folder, made_of, number, device)
    files = open_set(root, DATASET, "train")
    stats = compute_stats(files)
    print_moments(files[0].names, stats)
    part = folder / ".tmp_stats.yaml"
    part.write_text(yaml.safe_dump(stats))
    part.replace(folder / "stats.yaml")


def print_moments(names, stats):
    """The simulated train split's moments beside the published 128 x 384 set's."""
    kinds = ("mean", "std", "std_delta")
    columns = [np.concatenate([np.ravel(v) for v in stats[kind].values()]) for kind in kinds]
    for name, *values in zip(names, *columns):
        both = [f"{key} {v:.4g} (published {p:.4g})" for key, v, p in
                zip(("mean", "std", "one-step change"), values, PUBLISHED_MOMENTS[name])]
        print(f"simulated {name}: " + ", ".join(both))


# ---- data: windows and their cache ----------------------------------------------------------------------

def encode_prompts(args, run, data):
    """Gives the Windows of each split the texts of their files -> the empty text 1 L D, for guidance. The
    encoder, which is 11 GB, is loaded and dropped."""
    words = (args.prompt or args.dataset.replace("_", " ")).strip()
    prompts = {split: [", ".join([words, *(f"{name} {value:g}" for name, value in file.scalars.items())])
                       for file in data[split].files] for split in SPLITS}
    tokenizer = wan_part(args, run, "tokenizer")
    encoder = wan_part(args, run, "text_encoder", frozen_dtype(args))
    unique = sorted({"", *sum(prompts.values(), [])})
    texts = [text.cpu() for text in common.encode_text(tokenizer, encoder, unique, args.text_length)]
    longest = max(len(text) for text in texts)
    if longest >= args.text_length:      # the last token is the scalars'
        raise UserError(f"--text_length {args.text_length}: a prompt has {longest} tokens or more; raise it")
    texts = dict(zip(unique, texts))
    for split, own in prompts.items():
        data[split].texts = [texts[prompt] for prompt in own]
    return common.pad_text([texts[""]], args.text_length).to(run.device)


class Windows:
    """The windows of n_in + n_out frames of a split: all of them, or `count`, evenly. Number n is window n %
    len(rows), in version n // len(rows): later versions are rolled along periodic axes, where no place is
    special."""
    def __init__(self, args, split, count=0, versions=1):
        self.files, self.length = open_set(args.data_dir, args.dataset, split), args.n_in + args.n_out
        self.rows, self.versions = list_windows(self.files, self.length, count), versions
        self.names, self.shape, self.text_length = self.files[0].names, self.files[0].shape, args.text_length
        self.scalars = torch.tensor([list(file.scalars.values()) for file in self.files])
        self.counts = [sum(i == k for i, _, _ in self.rows) for k in range(len(self.files))]     # by file
        self.texts = self.shards = None

    def __len__(self):
        return len(self.rows) * self.versions

    def fields(self, numbers):
        """-> B T C H W, physical units."""
        return torch.stack([self.read(number) for number in numbers])

    def some(self):
        """-> fields of about 40 windows, evenly chosen, for statistics."""
        return self.fields(range(0, len(self.rows), max(1, len(self.rows) // 40)))

    def read(self, number):
        i, trajectory, start = self.rows[number % len(self.rows)]
        window = read_window(self.files[i], trajectory, start, self.length)
        if number >= len(self.rows):
            for axis, kinds in enumerate(self.files[i].boundaries):
                if kinds == ("PERIODIC",):
                    window = window.roll(mix_seed(number, axis) % self.shape[axis], 2 + axis)
        return window

    def known(self, files, device):
        """What the model is told of windows of these files: text B L D, scalars B n."""
        known = {"text": common.pad_text([self.texts[i] for i in files], self.text_length).to(device)}
        if self.scalars.shape[1]:
            known["scalars"] = self.scalars[files].to(device)
        return known

    def batch(self, numbers, device, cached=False):
        """-> what the modes' forward takes: cached latents and condition, or fields."""
        files = [self.rows[number % len(self.rows)][0] for number in numbers]
        batch = self.known(files, device) if self.texts else {}
        if not cached:
            return batch | {"fields": self.fields(numbers).to(device)}
        for name in ("latents", "condition"):
            rows = [self.shards[i][name][self.place(number)] for i, number in zip(files, numbers)]
            batch[name] = torch.stack(rows).float().to(device)
        return batch | {"condition": masked(batch["condition"])}

    def numbers_of(self, i):
        """A file's windows in the order of its shard."""
        return [n for n in range(len(self)) if self.rows[n % len(self.rows)][0] == i]

    def place(self, number):
        """Row of a window in its file's shard: files' windows are consecutive in `rows`."""
        version, row = divmod(number, len(self.rows))
        i = self.rows[row][0]
        return version * self.counts[i] + row - sum(self.counts[:i])


def build_cache(args, run, chain, data):
    """Latents and conditions of all training and validation windows: encoded once, and read into memory.

    data_dir/cache/<split>_<file>.safetensors: latents n 16 F h w, condition n 16 F h w without its mask.
    index.json, written last, holds what they were made of: another adapter, VAE or set makes them anew.
    """
    folder = Path(args.data_dir) / "cache"
    splits = {split: data[split] for split in ("train", "valid")}
    stats = [file.path.stat() for windows in splits.values() for file in windows.files]
    made_of = {"bytes": sum(s.st_size for s in stats), "newest": max(s.st_mtime_ns for s in stats),
               "windows": {split: [len(windows), windows.length] for split, windows in splits.items()},
               "adapter": digest(chain.adapter.state_dict(), chain.adapter.config),
               "vae": digest(getattr(chain.vae, "tensors", {}), [args.weights_from, args.random_init])}
    index = folder / "index.json"
    fresh = index.is_file() and json.loads(index.read_text())["made_of"] == made_of
    run.barrier()                                # all have looked before rank 0 removes
    if not fresh:
        if run.rank == 0:
            if index.is_file():
                print(f"{folder} was made of other data or another adapter: making it anew")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        run.barrier()
        shards = [(split, i) for split, windows in splits.items() for i in range(len(windows.files))]
        for split, i in tqdm(shards[run.rank::run.world], "cache", disable=run.rank > 0):
            rows = {"latents": [], "condition": []}
            numbers = splits[split].numbers_of(i)
            for k in range(0, len(numbers), args.batch_size):
                fields = splits[split].fields(numbers[k:k + args.batch_size]).to(run.device)
                rows["latents"].append(chain.latents(fields))
                rows["condition"].append(chain.condition(fields[:, 0], fields.shape[1])[:, 4:])
            common.save_weights(folder / f"{split}_{i:03d}.safetensors",
                                {name: torch.cat(part).to(frozen_dtype(args)) for name, part in rows.items()})
        run.barrier()
        if run.rank == 0:
            common.write_json(index, {"made_of": made_of})
    for split, windows in splits.items():
        windows.shards = [common.load_weights(folder / f"{split}_{i:03d}.safetensors")
                          for i in range(len(windows.files))]
    run.barrier()


def digest(tensors, config):
    """A name for weights and what they mean."""
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        total.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


# ---- metrics --------------------------------------------------------------------------------------------

# Ohana 2024, tables 2 and 3 (turbulent_radiative_layer_2D): VRMSE on the real test split, 4 given frames.
PUBLISHED = {"FNO": {"one_step": .5001, "6:12": 1.79, "13:30": 3.54},
             "TFNO": {"one_step": .5016, "6:12": 6.01, "13:30": math.inf},          # published as > 10
             "U-Net": {"one_step": .2418, "6:12": .66, "13:30": 1.04},
             "CNextU-Net": {"one_step": .1956, "6:12": .54, "13:30": 1.01}}


def vrmse(pred, truth):
    """... C H W in physical units -> ... C, as the_well.benchmark.metrics.VRMSE: over the spatial axes alone,
    with the unbiased variance and 1e-7 under the root. The truth's spatial mean scores sqrt((n - 1) / n)."""
    error = (pred - truth).square().mean((-2, -1))
    return (error / (truth.std((-2, -1)) ** 2 + 1e-7)).sqrt()


def rollout_table(scores):
    """VRMSE of forecasts, ... K C -> {row: float}, means over steps and all else; rows beyond K are left out.

    "6:12" is steps 6 to 12 counted from 1, "[6:12]" the slice: the benchmark says only 6:12.
    """
    per_step = scores.movedim(-2, 0).flatten(1).mean(1)
    K = len(per_step)
    rows = {"one_step": (0, 1), "8_steps": (0, 8), "6:12": (5, 12), "[6:12]": (6, 12), "13:30": (12, 30),
            "[13:30]": (13, 30), "rollout": (0, K)}
    return {name: per_step[a:b].mean().item() for name, (a, b) in rows.items() if b <= K}


def baselines(past, truth, train_mean):
    """Forecasts without a model: {name: K C H W}. past: P C H W, the frames up to the start (the last is what
    a model is given); truth: K C H W; train_mean: C. spatial_mean is the truth's own, which VRMSE calls 1."""
    k = torch.arange(1, len(truth) + 1).view(-1, 1, 1, 1)
    change = past[-1] - past[-2] if len(past) > 1 else torch.zeros_like(past[-1])
    return {"persistence": past[-1].expand_as(truth),
            "spatial_mean": truth.mean((-2, -1), keepdim=True).expand_as(truth),
            "train_mean": train_mean.view(1, -1, 1, 1).expand_as(truth),
            "linear": past[-1] + k * change}


def physics_checks(pred, truth, names, axis=-2):
    """-> {check: relative error, T}, 0 for equal ones. axis: a periodic one, of the spectra.

    mass_by_temperature: sum over phases of |difference|, over all mass (T = P / rho in < .02 < .1 < .5 <).
    kinetic_energy: |difference| / truth's. spectrum: mean over wave numbers and fields of |difference| over
    the larger power, in 0 .. 1, so that the smallest scales count, which a blurred forecast lacks.
    """
    def power(x):                                          # T C K, mean over the other axis
        waves = torch.fft.rfft(x, dim=axis, norm="forward").abs().square()
        return waves.mean(-3 - axis)[..., 1:]

    def of(x, name):
        return x[:, names.index(name)]

    a, b = power(pred), power(truth)
    checks = {"spectrum": ((a - b).abs() / torch.maximum(a, b).clamp(min=1e-20)).mean((1, 2))}
    if {"density", "pressure", "velocity_x", "velocity_y"} <= set(names):
        mass, energy = [], []
        for x in (pred, truth):
            rho = of(x, "density")
            bins = torch.bucketize(of(x, "pressure") / rho.clamp(min=1e-6), torch.tensor([.02, .1, .5]))
            mass.append(torch.stack([(rho * (bins == i)).sum((1, 2)) for i in range(4)], 1))
            energy.append((rho * (of(x, "velocity_x") ** 2 + of(x, "velocity_y") ** 2)).mean((1, 2)) / 2)
        checks["mass_by_temperature"] = (mass[0] - mass[1]).abs().sum(1) / mass[1].sum(1)
        checks["kinetic_energy"] = (energy[0] - energy[1]).abs() / energy[1].clamp(min=1e-12)
    return checks


# ---- pictures -------------------------------------------------------------------------------------------

def field_video(truth, prediction, names, scale=None):
    """T C H W twice -> T 3 H' W' uint8: a row per field, truth | prediction | bar | error | bar.

    scale: pixels per cell, by default to a picture about 384 wide. Ranges are the truth's over all frames, so
    a colour is one value in the whole video; those of components and errors are symmetric around 0.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.load_default(size=13)
    T, C, H, W = truth.shape
    scale = scale or max(1, round(384 / W))
    h, w, bar, left, top, gap = H * scale, W * scale, 74, 90, 24, 8
    page = Image.new("RGB", (left + 3 * w + 2 * gap + 2 * bar, top + C * (h + gap)), "white")
    pen = ImageDraw.Draw(page)
    corners = [left, left + w + gap, left + 2 * (w + gap) + bar]
    for title, x in zip(("truth", "prediction", "error (prediction - truth)"), corners):
        pen.text((x + w // 2, top // 2), title, fill="black", font=font, anchor="mm")

    def draw_bar(x, y, low, high, colours):
        ramp = colours.flip(0)[torch.linspace(0, 255, h).long()][:, None].repeat(1, 12, 1)
        page.paste(Image.fromarray(ramp.numpy()), (x, y))
        for share in (0, .5, 1):
            at, value = (x + 16, y + 6 + (h - 12) * (1 - share)), low + share * (high - low)
            pen.text(at, f"{value:.3g}", fill="black", font=font, anchor="lm")

    tiles = []                                             # y, x, T H W, its range and colours
    for c, name in enumerate(names):
        y, error = top + c * (h + gap), prediction[:, c] - truth[:, c]
        low, high = np.percentile(truth[:, c].numpy(), [.1, 99.9])
        shown = (low, high, "viridis")
        if name.endswith(("_x", "_y")):
            shown = (-max(-low, high), max(-low, high), "PuOr_r")
        size = max(float(np.percentile(error.abs().numpy(), 99.5)), 1e-6)
        pen.text((left - 6, y + h // 2), name.replace("_", "\n"), fill="black", font=font, anchor="rm")
        for x, values, (a, b, colours) in zip(corners, (truth[:, c], prediction[:, c], error),
                                              (shown, shown, (-size, size, "RdBu_r"))):
            colours = matplotlib.colormaps[colours](np.arange(256), bytes=True)[:, :3]
            colours = torch.from_numpy(colours.copy())
            tiles.append((y, x, values, a, b, colours))
            if x != corners[0]:
                draw_bar(x + w + 4, y, a, b, colours)
    video = torch.from_numpy(np.array(page)).permute(2, 0, 1).repeat(T, 1, 1, 1)
    for y, x, values, a, b, colours in tiles:
        index = ((values - a) / max(b - a, 1e-12) * 255).nan_to_num().round().clamp(0, 255).long()
        tile = colours[index].permute(0, 3, 1, 2).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        video[:, :, y:y + h, x:x + w] = tile
    return video


# ---- evaluate and sample --------------------------------------------------------------------------------

@contextlib.contextmanager
def lora_off(model):
    """Within it the model is its base: no LoRA, nor a token that was trained with it."""
    nets = [net for net in (model.experts.high, model.experts.low) if net is not None]
    tuned = [net for net in nets if getattr(net.transformer, "peft_config", None)]
    tokens = [(net, net.token) for net in tuned
              if net.token is not None and net.token.net[0].weight.requires_grad]
    for net in tuned:
        net.transformer.disable_adapters()
    for net, _ in tokens:
        net.token = None
    yield
    for net in tuned:
        net.transformer.enable_adapters()
    for net, token in tokens:
        net.token = token


def describe_data(args):
    simulated = (set_folder(args.data_dir, args.dataset) / "simulated.json").exists()
    return f"{args.data_dir}: {args.dataset}{', SIMULATED by this script' if simulated else ''}"


@torch.no_grad()
def measure(args, run, model, data, places, steps):
    """Forecasts of `steps` frames from places [(file, trajectory, first target)], and what they are held
    against -> {name: VRMSE N T C} on all ranks, each of which makes its share. "model" is the mean of
    --members samples, "single" the first; "spread" and "crps" are in units of the truth's deviation too."""
    test, tables = data["test"], {}
    past = max(args.n_in, 2)                     # the extrapolation looks at two frames
    members = args.members if args.mode == "native" else 1
    lora = args.mode in ("native", "oneshot")
    mine = list(range(run.rank, len(places), run.world))
    for k in range(0, len(mine), args.batch_size):
        own = mine[k:k + args.batch_size]
        frames = torch.stack([read_window(test.files[i], trajectory, first - past, past + steps)
                              for i, trajectory, first in (places[n] for n in own)]).to(run.device)
        history, truth = frames[:, past - args.n_in:past], frames[:, past:]
        known = test.known([places[n][0] for n in own], run.device) if test.texts else {}
        seeds = [mix_seed(args.seed, 2, n) for n in own]
        ask = lambda: rollout(model, history, steps, seeds, members, **known)
        samples = ask()
        guesses = {"model": samples.mean(1), "single": samples[:, 0]}
        if lora:
            with lora_off(model):
                guesses["base_alone"] = ask().mean(1)
        if steps == args.n_out:
            guesses["round_trip"] = model.round_trip(frames[:, past - args.n_in:])[:, args.n_in:]
        guesses, samples = {name: value.cpu() for name, value in guesses.items()}, samples.cpu()
        for b, n in enumerate(own):
            window, target = frames[b].cpu(), truth[b].cpu()
            guess = {name: value[b] for name, value in guesses.items()}
            guess |= baselines(window[:past], target, data["train_mean"])
            rows = {name: vrmse(value, target) for name, value in guess.items()}
            deviation = target.std((-2, -1)) + 1e-7
            rows["crps"] = common.fair_crps(samples[b], target).mean((-2, -1)) / deviation
            if members > 1:
                rows["spread"] = samples[b].var(0).mean((-2, -1)).sqrt() / deviation
            for name in ("model", "single", "base_alone", "persistence") if steps == args.n_out else ():
                checks = physics_checks(guess[name], target, test.names) if name in guess else {}
                rows |= {f"{name}/{key}": value for key, value in checks.items()}
            for name, row in rows.items():
                tables.setdefault(name, []).append((n, row.float()))
    return {name: torch.stack([row for _, row in sorted(rows, key=lambda pair: pair[0])])
            for name, rows in common.gather_rows(tables).items()}


def scores(short, long, names):
    """VRMSE of windows N T C and of rollouts N T' C (or None) -> {metric: number}."""
    out = {"one_step": short[:, 0].mean(), "all_steps": short.mean(), "one_step_median": short[:, 0].median()}
    out |= {f"one_step_{name}": short[:, 0, c].mean() for c, name in enumerate(names)}
    out |= {f"all_steps_{name}": short[..., c].mean() for c, name in enumerate(names)}
    out |= {f"step_{k + 1}": short[:, k].mean() for k in range(short.shape[1])}
    out = {name: value.item() for name, value in out.items()}
    table = rollout_table(long) if long is not None else {}
    return out | {f"rollout_{key.removeprefix('rollout')}".rstrip("_"): value for key, value in table.items()}


def evaluate(args, run, model, data):
    """Forecasts of windows and whole trajectories of the test split -> eval.json, curves.png, a table."""
    began, test = time.time(), data["test"]
    past, first = max(args.n_in, 2), max(FIRST, args.n_in)
    windows = [(i, k, start + past) for i, k, start in list_windows(
        test.files, past + args.n_out, args.eval_clips)]
    short = measure(args, run, model, data, windows, args.n_out)
    steps = min(args.rollout_steps, test.files[0].steps - first)
    places = [(i, k, first) for i, file in enumerate(test.files) for k in range(file.trajectories)]
    long = measure(args, run, model, data, places, steps) if steps > 0 else {}
    if run.rank == 0:
        print(f"VRMSE on {len(windows)} held-out windows (all_steps: mean over 1 to {args.n_out}) and, "
              f"rollout, on {len(places)} trajectories, the first target being frame {first}")
        report(args, short, long, test.names, time.time() - began)
        draw_curves(args, short, long)


def report(args, short, long, names, seconds):
    """Writes eval.json, prints it as a table beside the published rows. short, long: of measure."""
    rows = {name: scores(value, long.get(name), names) for name, value in short.items()
            if "/" not in name and name not in ("crps", "spread")}
    physics = {name: {} for name in rows}
    for name in [name for name in short if "/" in name]:
        whose, check = name.split("/")
        physics[whose][check] = short[name].mean().item()
    extra = {f"single_{key}": rows["single"][key] for key in ("one_step", "all_steps")}
    for name in [name for name in ("crps", "spread") if name in short]:
        extra[f"{name}_one_step"] = short[name][:, 0].mean().item()
        extra[f"{name}_all_steps"] = short[name].mean().item()
    data = describe_data(args)
    common.write_json(Path(args.output_dir) / "eval.json", {
        "script": SCRIPT, "preset": args.preset, "data": data, "weights": args.weights, "seconds": seconds,
        "headline": {"metric": "one_step", "value": rows["model"]["one_step"],
                     "baseline": rows["persistence"]["one_step"], "lower_is_better": True},
        "results": {**rows["model"], **extra, **physics["model"]},
        "baselines": {name: row | physics[name] for name, row in rows.items()
                      if name not in ("model", "single")}})
    columns = ["one_step", "all_steps", "rollout_6:12", "rollout_13:30"]
    columns += [f"one_step_{name}" for name in names]
    print(f"{'':>22}" + "".join(f"{key.removeprefix('one_step_'):>15}" for key in columns))
    for name, row in rows.items():
        print(f"{name:>22}" + "".join(f"{row[key]:15.3f}" if key in row else f"{'':>15}" for key in columns))
    if args.dataset == DATASET:
        for name, row in PUBLISHED.items():
            cells = "".join(f"{row.get(key.removeprefix('rollout_'), ''):>15}" for key in columns[:4])
            print(f"{name + ', published':>22}{cells}")
        other = "NOT the test set of the rows above: " if "SIMULATED" in data else ""
        print(f"published: on The Well's test split, from 4 frames instead of {args.n_in}. {other}only on "
              f"the real data do they share one.")


def draw_curves(args, short, long):
    """curves.png: losses of the stages, error over the steps of windows and of rollouts."""
    keys = ("loss", "val_loss", "loss_sigma_0.9", "loss_sigma_0.0")
    panels = [common.loss_panel(Path(args.output_dir) / stage, stage.replace(".", args.mode), keys)
              for stage in ("adapter", "base", ".")]
    for title, tables in (("windows", short), ("rollouts", long)):
        shown = ("model", "single", "base_alone", "persistence", "train_mean", "round_trip")
        lines = {name: (range(1, 1 + tables[name].shape[1]), tables[name].mean((0, 2)).tolist())
                 for name in shown if name in tables}
        panels.append({"title": title, "xlabel": "frames ahead", "ylabel": "VRMSE", "lines": lines})
    common.plot_curves(Path(args.output_dir) / "curves.png", [panel for panel in panels if panel["lines"]])


@torch.no_grad()
def sample(args, run, model, data):
    """Forecasts of held-out trajectories from their middle, where the flow has developed, one sample of each,
    field by field beside the truth -> files."""
    if run.rank:
        return []
    test, folder, files = data["test"], Path(args.output_dir) / "samples", []
    folder.mkdir(exist_ok=True)
    places = [(i, k) for i, file in enumerate(test.files) for k in range(file.trajectories)]
    count = min(args.num_samples, len(places))
    for i, k in [places[(2 * j + 1) * len(places) // (2 * count)] for j in range(count)]:
        first = max(args.n_in, test.files[i].steps // 2)
        steps = min(args.sample_frames, test.files[i].steps - first)
        frames = read_window(test.files[i], k, first - args.n_in, args.n_in + steps).to(run.device)
        known = test.known([i], run.device) if test.texts else {}
        seeds = [mix_seed(args.seed, 3, i, k)]
        forecast = rollout(model, frames[None, :args.n_in], steps, seeds, **known)[0, 0]
        stem = folder / f"{test.files[i].path.stem}_{k}"
        truth, forecast = frames[args.n_in:].cpu(), forecast.cpu()
        np.save(f"{stem}.npy", forecast.numpy())                 # physical units, T C H W
        film = field_video(truth, forecast, test.names)
        some = film[torch.linspace(0, steps - 1, min(3, steps)).round().long()]
        files += [f"{stem}.npy", common.write_video(f"{stem}.mp4", film, args.fps),
                  common.write_video(f"{stem}.png", torch.cat([*some], 1)[None])]
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
    """FSDP2 with --fsdp, a block a unit; DDP under torchrun; otherwise the module itself.

    A step runs one expert, so DDP is told to look for parameters without gradient: then an expert that no
    process asked keeps grad None, and AdamW leaves its moments alone. The same one is asked on all processes,
    so FSDP's gathers meet; each expert is a unit, so only the one that runs is gathered.
    """
    experts = list(model.experts.children()) if hasattr(model, "experts") else []
    if args.compile:
        for block in (block for net in experts for block in net.transformer.blocks):
            block.compile()
    if args.fsdp and experts:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(run.device.type, (run.world,))
        policy = MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32)
        for net in experts:
            for block in net.transformer.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(net.transformer, mesh=mesh, mp_policy=policy)
        # By default the root stays gathered until a backward: the step after a validation would compute with
        # the averages.
        return fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if run.world > 1:
        ids = [run.device] if run.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, forward_sync_buffers=False,
                                                   find_unused_parameters=model.one_of_two)
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

def diffusion_losses(args, run, windows, shape, experts, files=0):
    """-> losses(model, step, micro) of NativeI2V. A whole step belongs to one expert: n micro-steps, or n
    processes, give the gradient of one batch n times as large. What is drawn is a function of (seed, step)
    and of a sample's place in the whole batch. files: only windows of the first so many (0: of all)."""
    choice = sum((windows.numbers_of(i) for i in range(files or len(windows.files))), [])

    def losses(model, step, micro):
        expert, seed = whose_turn(step, experts, args.shift), common.seed_all(args.seed, 1, step)
        kinds = {"window": ("randint", len(choice)), "u": ("rand",), "noise": ("randint", 2 ** 62)}
        numbers = common.draw(kinds, seed, args.batch_size, run.rank, run.world, micro, args.grad_accum)
        chosen = [choice[n] for n in numbers["window"].tolist()]
        batch = windows.batch(chosen, run.device, cached=windows.shards is not None)
        sigma = draw_sigma(numbers["u"], expert, args.shift).to(run.device)
        like = torch.empty(args.batch_size, *shape, device=run.device)
        noise = seeded_noise(like, numbers["noise"].tolist())
        loss, parts = model(batch, sigma, noise, expert)
        return loss, parts | loss_by_sigma(sigma, parts.pop("errors"))
    return losses


def diffusion_validation(args, run, windows, shape):
    """-> validate(model): the loss on validation windows at three noise levels."""
    def validate(model):
        sigmas, totals = (.3, .7, .95) if args.experts != "low" else (.3, .7), {}
        for k in range(0, len(windows), args.batch_size):
            numbers = range(k, min(k + args.batch_size, len(windows)))
            batch = windows.batch(numbers, run.device, cached=windows.shards is not None)
            noise = seeded_noise(torch.empty(len(numbers), *shape, device=run.device), numbers)
            for sigma in sigmas:
                _, parts = model(batch, torch.full((len(numbers),), sigma, device=run.device), noise,
                                 "high" if sigma >= BOUNDARY else "low")
                errors = parts["errors"].sum().item() / len(windows)
                totals[f"val_loss_{sigma}"] = totals.get(f"val_loss_{sigma}", 0) + errors
        return {"val_loss": sum(totals.values()) / len(sigmas), **totals}
    return validate


def plain_losses(args, run, windows):
    """-> losses(model, step, micro) of the modes without noise."""
    def losses(model, step, micro):
        seed = common.seed_all(args.seed, 1, step)
        numbers = common.draw({"window": ("randint", len(windows))}, seed, args.batch_size, run.rank,
                              run.world, micro, args.grad_accum)
        return model(windows.batch(numbers["window"].tolist(), run.device))
    return losses


def plain_validation(args, run, windows):
    def validate(model):
        totals = {}
        for k in range(0, len(windows), args.batch_size):
            numbers = range(k, min(k + args.batch_size, len(windows)))
            loss, parts = model(windows.batch(numbers, run.device))
            for name, value in {"loss": loss, **parts}.items():
                share = value.item() * len(numbers) / len(windows)
                totals[f"val_{name}"] = totals.get(f"val_{name}", 0) + share
        return totals
    return validate


def run_stage(args, run, folder, make, losses, validate, found, steps, lr, only):
    """One stage, none where `found` has all steps or `only` it counts. make() -> the model before training;
    -> the same with averaged weights, whole on each process."""
    torch.manual_seed(args.seed)                 # equal initial weights on all ranks and after any restart
    model = make()
    if found and (only or found[2]["step"] >= steps):
        common.restore_state(model, found[1]["ema"], source=str(found[0]), trained_only=True)
        return model.eval()
    fit(args, run, folder, model, losses, validate, found, steps, lr)
    if args.fsdp and hasattr(model, "experts"):  # evaluation shares out windows: each needs a whole model
        weights, _ = common.gather_state(model, everywhere=True, trained_only=True)
        del model
        model = make()
        common.restore_state(model, weights, source="this run", trained_only=True)
    model.fresh = True
    return model.eval()


# ---- stages ---------------------------------------------------------------------------------------------

def start_adapter(args, run, data, folder):
    """The adapter and its VAE before stage 0: as an earlier run or --adapter_from left them, or fitted to a
    few dozen training windows. Tiny runs have a linear codec for a VAE, fitted to the same. -> both"""
    train, kept = data["train"], folder / "adapter.safetensors"
    place = folder if kept.is_file() else Path(args.adapter_from) if args.adapter_from else None
    size = [int(n) for n in args.video_size.split(",")] if args.video_size else list(train.shape)
    some = train.some()
    wanted = dict(kind=args.adapter, names=train.names, size=list(train.shape), repeat=args.frame_repeat,
                  maps=parse_maps(args.field_maps, train.names), width=args.adapter_width,
                  ahead=args.n_out if args.carry_detail else 0, video_size=size)
    if place:
        adapter = load_adapter(place, **wanted)
    else:
        torch.manual_seed(args.seed)
        adapter = Adapter(**wanted)
        adapter.fit(some[:, ::4])
    if args.model != "tiny":
        vae = wan_part(args, run, "vae", torch.bfloat16).requires_grad_(False)
    elif place and (place / "codec.safetensors").is_file():
        vae = common.LinearCodec(common.load_weights(place / "codec.safetensors"), run.device)
    else:
        with torch.no_grad():
            vae = common.LinearCodec.fit(adapter.to_video(some), TINY["transformer"]["out_channels"])
        vae = common.LinearCodec(vae.tensors, run.device)
    return adapter.to(run.device), vae


def print_floor(args, run, adapter, vae, windows):
    """What adapter and VAE alone lose of validation windows, the floor under every forecast."""
    chain, errors = Chain(adapter, vae, args), []
    for number in range(0, len(windows.rows), max(1, len(windows.rows) // 16)):
        fields = windows.fields([number]).to(run.device)
        errors.append(vrmse(chain.round_trip(fields), fields)[0, args.n_in:].mean(0))
    errors = torch.stack(errors).mean(0).tolist()
    print("round trip through adapter and VAE, validation VRMSE: " + ", ".join(
        f"{name} {error:.3f}" for name, error in zip(windows.names, errors))
        + f", mean {sum(errors) / len(errors):.3f}: the floor of this run")


def adapter_stage(args, run, data, stage, plain):
    """Stage 0: an adapter that stands still in what follows, and its VAE, both kept in adapter/. -> both"""
    folder = Path(args.output_dir) / "adapter"
    adapter, vae = start_adapter(args, run, data, folder)
    fresh = not (folder / "adapter.safetensors").is_file()
    if args.mode != "adapter" and args.adapter == "learned" and args.adapter_steps and not args.adapter_from:
        make = lambda: AdapterOnly(copy.deepcopy(adapter).requires_grad_(True), vae, args)
        trained = stage("adapter", make, *plain, args.adapter_steps, args.adapter_lr)
        adapter, fresh = trained.adapter, fresh or trained.fresh
    adapter.requires_grad_(False)
    if args.carry_detail and not adapter.detail.any():
        Chain(adapter, vae, args).fit_detail(data["train"].some().to(run.device))
    if run.rank == 0 and fresh:
        folder.mkdir(exist_ok=True)
        if args.model == "tiny":
            common.save_weights(folder / "codec.safetensors", vae.tensors)
        save_adapter(folder, adapter)
    if run.rank == 0:
        print_floor(args, run, adapter, vae, data["valid"])
    return adapter, vae


def run_stages(args, run, data, found, only=False):
    """Stage 0: the learned adapter. Then the base of tiny experts (nobody has weights of that size), then
    --mode's own training, each going on from its own checkpoint. -> the mode's model"""
    folder = Path(args.output_dir)
    if run.rank == 0 and not only:
        common.write_json(folder / "args.json", {**public_flags(args), **common.provenance()})

    def stage(place, make, losses, validate, steps, lr):
        before = found if place == "." else common.find_checkpoint(
            folder / place / "ckpt", SCRIPT, "none" if args.resume == "none" else "auto")
        return run_stage(args, run, folder / place, make, losses, validate, before, steps, lr,
                         only and bool(before))

    plain = plain_losses(args, run, data["train"]), plain_validation(args, run, data["valid"])
    empty = encode_prompts(args, run, data) if args.mode in ("native", "oneshot") else None
    adapter, vae = adapter_stage(args, run, data, stage, plain)

    def own_adapter(trained):                    # a copy: FSDP shards what it is given in place
        return copy.deepcopy(adapter).requires_grad_(trained and args.adapter == "learned")

    if args.mode in ("adapter", "convlstm"):
        make = {"adapter": lambda: AdapterOnly(own_adapter(True), vae, args),
                "convlstm": lambda: ConvLSTMForecast(own_adapter(args.joint), vae, args).to(run.device)}
        model = stage(".", make[args.mode], *plain, args.max_steps, args.lr)
    else:
        model = run_experts(args, run, data, stage, own_adapter, vae, empty)
    if run.rank == 0 and (model.fresh or not (folder / "final/adapter.safetensors").is_file()):
        export(args, model, folder / "final")
    return model


def run_experts(args, run, data, stage, own_adapter, vae, empty):
    """The stages of the modes that Wan's experts work in. empty: the text of nothing 1 L D. -> NativeI2V or
    OneShot"""
    train, valid = data["train"], data["valid"]
    shape = latent_shape(args, own_adapter(False))
    scalars = train.scalars.shape[1] if args.scalar_token else 0
    load = lambda name: wan_part(args, run, "transformer", frozen_dtype(args), name)
    tokens = {}

    def experts(args, train_what):
        made = make_experts(args, load, train_what, scalars, run.autocast)
        for side, net in made.named_children():
            if scalars and side in tokens:       # the base's own, which stands still like the rest of it
                net.token.load_state_dict(tokens[side])
                net.token.requires_grad_(False)
            elif scalars:
                net.token.fit(train.scalars)
            net.to(run.device)
        return made

    if args.model == "tiny" and args.base_steps or args.mode == "native" and not args.joint:
        build_cache(args, run, Chain(own_adapter(False), vae, args), data)
    if args.model == "tiny" and args.base_steps:     # one network, from which both experts start
        own = argparse.Namespace(**{**vars(args), "experts": "one", "joint": False})
        make = lambda: NativeI2V(own_adapter(False), vae, experts(own, "full"), own)
        base = stage("base", make, diffusion_losses(own, run, train, shape, "one", args.base_files),
                     diffusion_validation(own, run, valid, shape), args.base_steps, args.base_lr)
        net, final = base.experts.low, Path(args.output_dir) / "base/final"
        if run.rank == 0 and (base.fresh or not final.exists()):
            net.transformer.save_pretrained(final)
        tokens = dict.fromkeys(DIT, net.token.state_dict()) if net.token else {}
        load = lambda name: copy.deepcopy(net.transformer)
    elif args.model == "tiny" and run.rank == 0:
        print("--base_steps 0: LoRA on experts of RANDOM weights")
    if args.mode == "oneshot":
        make = lambda: OneShot(own_adapter(args.joint), vae, experts(args, "lora"), args)
        return stage(".", make, plain_losses(args, run, train), plain_validation(args, run, valid),
                     args.max_steps, args.lr)
    make = lambda: NativeI2V(own_adapter(args.joint), vae, experts(args, "lora"), args, empty)
    if args.joint:
        train.shards = valid.shards = None
    return stage(".", make, diffusion_losses(args, run, train, shape, args.experts),
                 diffusion_validation(args, run, valid, shape), args.max_steps, args.lr)


def latent_shape(args, adapter):
    """16 F h w of a window."""
    side = common.LinearCodec.side
    height, width = adapter.video_size
    return 16, (adapter.frames(args.n_in + args.n_out) + 3) // 4, height // side, width // side


def export(args, model, final):
    """final/: the adapter; high/ and low/, the LoRA files for WanImageToVideoPipeline.load_lora_weights (low:
    with load_into_transformer_2=True) and the scalar tokens; or the ConvLSTM. Rank 0 writes."""
    final.mkdir(exist_ok=True)
    if args.mode == "convlstm":
        common.save_weights(final / "convlstm.safetensors", model.net.state_dict())
    for side, net in model.experts.named_children() if hasattr(model, "experts") else ():
        if getattr(net.transformer, "peft_config", None):
            common.save_lora(final / side, net.transformer)
            if net.token is not None:
                common.save_weights(final / side / "scalar_token.safetensors", net.token.state_dict())
    save_adapter(final, model.adapter)           # last: where it is, the rest is


def simulate_set(args, run):
    """The simulated twin of the radiative layer, where --data_dir says."""
    simulate(args.data_dir, args.sim_side, cooling_times(args), (args.sim_train, 1, 1),
             args.sim_spacing * (args.sim_frames - 1), args.sim_frames, device=run.device.type)


def prepare(args, run):
    """Opens the set, which is simulated first for the tiny preset's own folder. -> {split: Windows}"""
    if run.rank == 0 and args.preset == "tiny" and args.data_dir == PRESETS["tiny"]["data_dir"]:
        simulate_set(args, run)
    run.barrier()
    data = {"train": Windows(args, "train", args.window_count, args.augment),
            "valid": Windows(args, "valid", 32), "test": Windows(args, "test")}
    for split in ("valid", "test"):
        if data[split].names != data["train"].names or data[split].shape != data["train"].shape:
            raise UserError(f"{data[split].files[0].path} has other fields or another grid than split train")
    data["train_mean"] = train_mean(args.data_dir, args.dataset)
    if run.rank == 0:
        H, W = data["train"].shape
        counts = [f"{split}: {len(data[split])} windows of {sum(f.trajectories for f in data[split].files)} "
                  f"trajectories" for split in SPLITS]
        print(f"{', '.join(data['train'].names)} on {H} x {W}; {', '.join(counts)}")
    return data


def dry_run(args):
    """Prints what each stage costs, from the meta device: nothing is read, next to nothing allocated."""
    world, B, tiny = int(os.environ.get("WORLD_SIZE", 1)), args.batch_size, args.model == "tiny"
    names, T = ["density", "pressure", "velocity_x", "velocity_y"], args.n_in + args.n_out
    size = tuple(int(n) for n in args.video_size.split(",")) if args.video_size else None
    adapter = Adapter(args.adapter, names, (args.sim_side, 3 * args.sim_side), ["linear"] * 4, size,
                      args.frame_repeat, args.adapter_width).to("meta")
    fields = torch.randn(B, T, 4, args.sim_side, 3 * args.sim_side, device="meta")
    shape = latent_shape(args, adapter)
    if args.adapter == "learned":
        print(common.dry_run_report("adapter (without the VAE behind it)", adapter,
                                    lambda: adapter.error(adapter.to_video(fields), fields), B, 0, world))
    z = torch.randn(B, *shape, device="meta")
    if args.mode == "convlstm":
        net = ConvLSTM().to("meta")
        loss = lambda: net(z[:, :, :2], shape[1] - 2).sum()
        print(common.dry_run_report("ConvLSTM", net, loss, B, 0, world))
    if args.mode in ("convlstm", "adapter"):
        return
    run = argparse.Namespace(device=torch.device("meta"), autocast=lambda: torch.autocast(
        "cpu", torch.bfloat16, enabled=not tiny))
    args.random_init = True
    with torch.device("meta"):
        load = lambda name: wan_part(args, run, "transformer", frozen_dtype(args), name)
        for stage in ("full", "lora") if tiny else ("lora",):
            experts = make_experts(args, load, stage, int(args.scalar_token), run.autocast)
            model = NativeI2V(nn.Identity(), None, experts, args)
            batch = {"latents": z, "condition": torch.randn(B, 20, *shape[1:]), "scalars": torch.ones(B, 1),
                     "text": torch.randn(B, args.text_length, experts.low.transformer.config.text_dim)}
            label = {"full": "base", "lora": f"LoRA, rank {args.lora_rank}, experts {args.experts}"}[stage]
            side = "high" if args.experts == "high" else "low"
            loss = lambda: model(batch, torch.full((B,), .5), z, side)[0]
            print(common.dry_run_report(label, model, loss, B, math.prod(shape[1:]) // 4, world, args.fsdp))
    one = experts.low.transformer
    lora = sum(p.numel() for name, p in one.named_parameters() if "lora_" in name)
    print(f"  an expert has {common.count_params(one) - lora:,} parameters and {lora:,} of LoRA; one runs in "
          f"a step. The VAE beside them: 0.25 GB. Activations: "
          + ("with --grad_checkpoint" if args.grad_checkpoint else "all are kept"))


# ---- main -----------------------------------------------------------------------------------------------

def work(args):
    folder = Path(args.output_dir)
    if args.download:
        return print(f"wrote {download(args.dataset, args.data_dir)}")
    only = args.sample or args.eval
    found = None if args.dry_run or args.simulate else common.find_checkpoint(
        folder / "ckpt", SCRIPT, args.resume, train=not only)
    if found:
        adopt(args, found[2]["args"], ("preset", *MODEL_FLAGS), str(found[0]))
    check_args(args)
    if args.dry_run:
        return dry_run(args)
    run = Run(args)
    if args.simulate:
        simulate_set(args, run)
        return print(f"wrote {set_folder(args.data_dir, args.dataset)}")
    if args.preset == "tiny" and not found and "batch_size" not in args.given and run.world > 1:
        args.batch_size = max(1, args.batch_size // run.world)   # processes on one laptop share its batch
    args.weights = args.weights_from + (" shape, RANDOM weights" if args.random_init else "")
    if args.model == "tiny":
        args.weights = "tiny experts that the run trains (there are none to download), LINEAR codec as VAE"
    if run.rank == 0:
        there = "" if Path(args.data_dir).exists() else " (not there yet)"
        going_on = f", going on from {found[0]}" if found else ""
        print(f"{SCRIPT}: preset {args.preset} ({args.why_preset}), data {args.data_dir}{there}, weights "
              f"{args.weights}, mode {args.mode}{going_on}, {run.world} x {run.device.type} "
              f"{str(run.dtype)[6:]}, batch {args.batch_size}")
    if only and not found:
        if "output_dir" in args.given:
            raise UserError(f"no checkpoint in {folder}/ckpt: first python {SCRIPT}.py --output_dir {folder}")
        if run.rank == 0:
            print(f"no checkpoint in {folder}/ckpt: training preset {args.preset} first"
                  + (", about 8 minutes on 2 cores" if args.preset == "tiny" else ""))
    if run.rank == 0:
        common.copy_stages(found, folder, ["adapter", "base"])
    data = prepare(args, run)
    model = run_stages(args, run, data, found, only and bool(found))
    written = [f"{folder}/final/"]
    if args.eval or not only:
        evaluate(args, run, model, data)
        written += [f"{folder}/eval.json", f"{folder}/curves.png"]
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
