"""vidarc.py: Vidar made causal: it imagines a few frames, the robot acts, what it saw replaces them.

Papers      Vidarc (arXiv:2512.17661), of which this is stage 2, on Vidar (arXiv:2507.12898); Self Forcing
            (arXiv:2506.08009); Wan2.2-TI2V-5B (arXiv:2503.20314).
Equations   Eq. 6  |v(x_t, t, c, x_prev) - (x_0 - x_1)|^2, x_prev clean  -> teacher_forced_loss, teacher_plan
            Eq. 7  |(1 + eta U) (v - (x_0 - x_1))|^2, eta 3               -> vidar.flow_loss
            x = (1 - sigma) z + sigma eps, a level sigma for each chunk   -> noised; signs as in vidar.py
            self-forcing: behind its own imagined latents                 -> self_forced_loss
            KV cache, re-prefill with what was seen                       -> KVCache, generate_chunk, Policy
Chunks      Latent 0, the observed image, is a chunk, then every --chunk_latents k of them. All see their own
            chunk and the clean latents of earlier ones, in the parallel pass as behind a cache: 1e-6 apart.
            --chunk_size and --kv_cache_length count pixel frames, four to a latent.
Differs     from upstream's training and inference code, and why:
            - cached keys are of clean latents; upstream's trainer caches noised ones, as self-forcing
            - self-forcing imagines within one --chunk_size, since what was seen replaces it after that; the
              loss is of the next real latents. Upstream's whole rollout regresses to a blur
            - guidance has a cache for each branch (--cfg_cache separate); upstream's server shares one
            - the video codec is a stream: no call decodes or encodes a frame twice. Upstream's server encodes
              each chunk behind the very first observation
            - actions are shifted by what the IDM misreads now, where the joints are known (--no-calibrate)
Run         python vidarc.py               # 12 to 19 min, 2 GB, with stage 1; 6 to 9 where that is there
            python vidarc.py --sample --num_samples 3             # 14 s
            python vidarc.py --eval --execute 4                   # 2 to 4 min
            python vidarc.py --eta 0 --self_forcing 0 --chunk_latents 2 --output_dir runs/vidarc_ablation
            torchrun --nproc_per_node=2 vidarc.py --preset 2xh200 --data_dir data/robotwin
            torchrun --nproc_per_node=8 vidarc.py --preset 8xh100 --data_dir data/robotwin
            python vidarc.py --preset debug --random_init --idm idm.pt --data_dir data/robotwin
            python vidarc.py --preset 8xh100 --dry_run
Shapes      B batch  T frames  F = (T - 1) / 4 + 1 latents in time  C latent channels  H W pixels  h w latent
            grid  S = h/2 w/2 tokens of a latent  N = F S  D width  L text tokens. Latents are B C F h w,
            videos B T 3 H W in [-1, 1], for the IDM in [0, 1]; actions n 14 are absolute joint targets.
"""
import argparse
import contextlib
import functools
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import common
import vidar
from common import UserError, from_uint8

SCRIPT = "vidarc"
PUBLISHED = "3.03 s on one A100 (5B), 0.69 s on one H100 (Self Forcing, 1.3B)"

# ---- args -----------------------------------------------------------------------------------------------

PAPER = dict(data_dir="data/robotwin", vidar="checkpoints/vidar/vidar.pt", idm="checkpoints/vidar/idm.pt",
             max_steps=4000, lr=2e-5, warmup_steps=200, weight_decay=.1, grad_checkpoint=True, fsdp=True,
             save_every=250, eval_every=250)
PRESETS = {
    "tiny": dict(
        model="tiny", data_dir="data/vidar", vidar="runs/vidar/final/vidar.safetensors",
        idm="runs/vidar/idm/final/idm.pt", size="112,96", frames=33, prompt_views="none", windows=3,
        text_length=64, batch_size=2, any_batch=True, max_steps=1150, lr=3e-3, warmup_steps=50,
        weight_decay=.01, ema_decay=.99, beta2=.98, shift=8., steps=1, cfg=1., chunk_size=8,
        kv_cache_length=32, self_forcing=.1, self_forcing_after=850,
        context_noise=.02, cfg_drop=0., worlds=24, moved=6, eval_clips=24, latency_chunks=4,
        eval_every=500, save_every=500),
    "2xh200": {**PAPER, "batch_size": 8, "grad_accum": 8, "chunk_size": 8},
    "8xh100": {**PAPER, "batch_size": 8, "grad_accum": 2},
    "64xh100": {**PAPER, "batch_size": 2, "grad_accum": 1},
    # The document's --debug: the same model on one GPU, both losses, to see that everything runs.
    "debug": {**PAPER, "fsdp": False, "batch_size": 1, "any_batch": True, "max_steps": 100,
              "warmup_steps": 10, "self_forcing_after": 20, "ema_decay": 0., "log_every": 1, "save_every": 0,
              "eval_every": 50},
}
# What is timed of a tiny model: the document's windows and steps instead of its own fewer ones, and pictures
# in which the network's work is more than a call's overhead.
DOCUMENT = {"frames": 81, "chunk_size": 16, "kv_cache_length": 64, "steps": 10, "cfg": 3., "shift": 5.,
            "size": "224,192"}
MODEL_FLAGS = ("model", "text_length", "size", "chunk_latents")    # a checkpoint's own values hold
# What --preset auto looks for before it takes the second preset.
PAPER_NEEDS = dict(get_data="RoboTwin episodes, or --data_dir FOLDER")


def build_parser():
    parser = Parser(prog=f"{SCRIPT}.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_shared_flags(parser, PRESETS)
    add = parser.add_argument_group("data, as vidar.py's").add_argument
    add("--size", default="736,640", metavar="H,W", help="pixels of the mosaic, multiples of 32")
    add("--frames", type=int, default=81, help="of a training window at 10 fps, 4k + 1")
    add("--layout", choices=list(vidar.LAYOUTS), default="480+240", help="rows of head and wrist views")
    add("--prompt_views", choices=["rear", "front", "high", "none"], default="rear",
        help="the head camera that the prompt's prefix names (none: no prefix)")
    add("--windows", type=int, default=4, help="cached windows of a training episode; their start varies")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=["ti2v_5b", "tiny"], default="ti2v_5b", help="tiny: the same classes, small")
    add("--weights_from", default="Wan-AI/Wan2.2-TI2V-5B-Diffusers", metavar="FOLDER|HUB_ID",
        help="diffusers folder, hub id, or folder with the official files")
    add("--vidar", metavar="FILE", help="stage 1's weights, or vidarc.pt: where training begins")
    add("--idm", metavar="FILE", help="idm.pt")
    add("--stage1", default="", metavar="FLAGS", help="more flags of vidar.py, where it has to be run first")
    add("--random_init", action="store_true", help="Wan's shape with random weights, to measure speed")
    add("--text_length", type=int, default=512, help="tokens of a prompt, zeros included")
    add("--chunk_latents", type=int, default=1, help="latents that are denoised together and see each other")
    add("--attention", choices=["auto", "loop", "flex"], default="auto",
        help="of training; loop: a call for each chunk, flex: one compiled call (auto: flex with CUDA)")
    add = parser.add_argument_group("loss").add_argument
    add("--any_batch", action=argparse.BooleanOptionalAction, default=False,
        help=f"do not insist on {vidar.EFFECTIVE_BATCH} a step; implied by --batch_size, --grad_accum")
    add("--eta", type=float, default=3., help="Eq. 7's weight of the arm")
    add("--context_noise", type=float, default=.1, help="the clean past has noise up to this level")
    add("--self_forcing", type=float, default=.5, help="share of steps behind imagined latents")
    add("--self_forcing_after", type=int, default=1000, help="steps of teacher forcing before")
    add("--rollout_steps", type=int, default=4, help="Euler steps of a latent that training imagines")
    add("--shift", type=float, default=5.0, help="of Wan's noise schedule")
    add("--cfg_drop", type=float, default=.1, help="share of samples without instruction")
    add = parser.add_argument_group("closed loop and evaluation").add_argument
    add("--chunk_size", type=int, default=16, help="PIXEL frames between two observations")
    add("--kv_cache_length", type=int, default=64, help="PIXEL frames after the first that the cache holds")
    add("--steps", type=int, default=10, help="of the solver; guidance doubles the network's work")
    add("--solver", choices=["unipc", "euler"], default="unipc", help="UniPC is Wan's")
    add("--cfg", type=float, default=3.0, help="guidance (1: none)")
    add("--cfg_cache", choices=["separate", "shared"], default="separate",
        help="guidance's empty prompt has its own keys, or reads the instruction's, for half the memory")
    add("--calibrate", action=argparse.BooleanOptionalAction, default=True,
        help="shift actions by what the IDM misreads in the frame whose joints are known")
    add("--worlds", type=int, default=40, help="simulated worlds, where the data are simulated")
    add("--execute", type=int, default=0, metavar="FRAMES",
        help="actions that are carried out before the next look (0: --chunk_size)")
    add("--horizon", type=int, default=64, help="frames in a world, enough to try again")
    add("--moved", type=int, default=10, help="frame at which the block is moved, where it is")
    add("--eval_clips", type=int, default=0, help="held-out episodes that --eval looks at (0: all)")
    add("--latency_chunks", type=int, default=20, help="chunks that are timed, after three others (0: none)")
    add("--num_samples", type=int, default=3, help="worlds of which --sample writes a video")
    return parser


def check_args(args):
    """One clear line for values that no run can mean."""
    check_numbers(args, least_1=("windows", "text_length", "steps", "rollout_steps", "chunk_latents",
                                 "worlds", "horizon", "moved", "num_samples"),
                  least_0=("eta", "eval_clips", "self_forcing_after", "latency_chunks"),
                  shares=("cfg_drop", "context_noise", "self_forcing"))
    vidar.check_shape(args)
    chunk = 4 * args.chunk_latents
    for name, frames in (("chunk_size", args.chunk_size), ("kv_cache_length", args.kv_cache_length),
                         ("frames", args.frames - 1)):
        if frames < chunk or frames % chunk:
            raise UserError(f"--{name} {getattr(args, name)} is not made of chunks of --chunk_latents "
                            f"{args.chunk_latents} ({chunk} frames): take another multiple of {chunk}"
                            + " and 1 more" * (name == "frames"))
    room = min(args.kv_cache_length, args.frames - 1)
    if args.chunk_size > room:
        raise UserError(f"--chunk_size {args.chunk_size} does not fit in a window of {room} frames after the "
                        "first: raise --kv_cache_length or --frames")
    if args.self_forcing and args.chunk_size < 2 * chunk:
        raise UserError(f"--self_forcing imagines a part of --chunk_size {args.chunk_size}: it has to hold "
                        f"two chunks of {chunk} frames or more; or --self_forcing 0")
    if args.execute % chunk or not 0 <= args.execute <= args.chunk_size:
        raise UserError(f"--execute {args.execute} must be a multiple of {chunk} up to --chunk_size "
                        f"{args.chunk_size}, or 0")
    vidar.check_batch(args)


# ---- who sees whom --------------------------------------------------------------------------------------
# A plan is a tuple of (start, end, spans): latents start .. end - 1 of a pass see the latents of `spans`,
# ((start, end), ...), which count the cached ones first. Every latent of the pass is in one row, in order.

def chunk_bounds(first, count, k):
    """Chunks of the latents first .. first + count - 1: [(start, end)], counted from `first`. UserError where
    one would be cut: its latents see each other, so they come together."""
    bounds, at = [], 0
    while at < count:
        bounds.append((at, at + (1 if first + at == 0 else k)))
        at = bounds[-1][1]
    if at != count or first and (first - 1) % k:
        raise UserError(f"latents {first} to {first + count - 1} are not whole chunks of {k} after latent 0: "
                        f"choose a --chunk_latents that divides --chunk_size / 4 and (--frames - 1) / 4")
    return bounds


def causal_plan(bounds, past=0):
    """Each chunk sees `past` cached latents, the chunks before it, and itself."""
    return tuple((start, end, ((0, past + end),)) for start, end in bounds)


def teacher_plan(bounds):
    """Clean latents, then noisy ones, in one pass. What nobody asks for is left out: the last chunk's clean
    latents, and latent 0's noisy ones."""
    at = bounds[-1][0] - 1                                 # noisy latent i is at this place + i
    noisy = [(at + start, at + end, ((0, start), (at + start, at + end))) for start, end in bounds[1:]]
    return causal_plan(bounds[:-1]) + tuple(noisy)


@functools.cache
def block_mask(plan, count, S, device):
    """FlexAttention's BlockMask of a plan over `count` latents of S tokens; made once for each shape."""
    seen = torch.zeros(count, count, dtype=torch.bool, device=device)
    for start, end, spans in plan:
        for left, right in spans:
            seen[start:end, left:right] = True
    rule = lambda batch, head, query, key: seen[query // S, key // S]
    return create_block_mask(rule, None, None, count * S, count * S, device=device)


compiled_flex = torch.compile(flex_attention, dynamic=False)       # at its first call


def attend(q, k, v, plan, S, backend):
    """Attention by a plan. q B heads N d, k and v B heads N' d -> B heads N d.

    "loop" calls plain attention for each row: without a mask every fused kernel will do, and what a row does
    not see costs nothing. "flex" is one call, for passes without a cache.
    """
    if backend == "flex":
        mask = block_mask(plan, q.shape[2] // S, S, q.device)
        return (compiled_flex if q.is_cuda else flex_attention)(q, k, v, block_mask=mask)
    pieces = k.split(S, dim=2), v.split(S, dim=2)      # not slices: each one's gradient would fill a whole k

    def see(spans):
        if spans == ((0, len(pieces[0])),):
            return k, v
        if k.is_meta:                                  # --dry_run counts: sizes matter alone, and cat is slow
            count = S * sum(right - left for left, right in spans)
            return k[:, :, :count], v[:, :, :count]
        return [torch.cat([one for left, right in spans for one in x[left:right]], dim=2) for x in pieces]

    queries = q.split([(end - start) * S for start, end, _ in plan], dim=2)
    rows = [F.scaled_dot_product_attention(row, *see(spans)) for row, (_, _, spans) in zip(queries, plan)]
    return torch.cat(rows, dim=2) if len(rows) > 1 else rows[0]


# ---- model ----------------------------------------------------------------------------------------------

@dataclass(eq=False)
class Pass:
    """What the blocks' attention must know of one forward pass. It travels in the place of the rotary tables,
    the only argument that WanTransformerBlock hands on untouched; FSDP does not look into it, so that the
    tables stay float32."""
    cos: torch.Tensor                    # 1 N 1 d
    sin: torch.Tensor
    plan: tuple
    frames: int                          # latents in this pass
    cache: "KVCache | None"
    backend: str


def rotate(x, cos, sin):
    """Turns neighbouring pairs of x's channels, B N heads d, by the angles of the tables, 1 N 1 d."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-b, a), dim=-1).flatten(-2) * sin


class CausalSelfAttention:
    """attn1's processor. hidden B*F S D: latents are folded into the batch, so that their time modulation is
    B*F 6 D and not one for every token; here they are unfolded. Keys are cached rotated."""
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, attn, hidden, text, mask, here):
        S = hidden.shape[1]
        q, k, v = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(hidden)), attn.to_v(hidden)
        q, k, v = (x.reshape(-1, here.frames * S, attn.heads, here.cos.shape[-1]) for x in (q, k, v))
        q, k = (rotate(x, here.cos, here.sin).to(v.dtype) for x in (q, k))
        if here.cache is not None:
            k, v = here.cache.extend(self.layer, k, v, S)
        out = attend(*(x.transpose(1, 2) for x in (q, k, v)), here.plan, S, here.backend)
        out = out.transpose(1, 2).reshape(hidden.shape).type_as(hidden)
        return attn.to_out[1](attn.to_out[0](out))


class TextAttention:
    """attn2's processor. text: B L D, or what CausalWan.text_keys made of it."""
    def __init__(self, layer):
        self.layer = layer

    @staticmethod
    def keys(attn, text):
        """text B L D -> keys and values B heads L d."""
        split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return split(attn.norm_k(attn.to_k(text))), split(attn.to_v(text))

    def __call__(self, attn, hidden, text, mask, rotary):
        k, v = text[self.layer] if isinstance(text, list) else self.keys(attn, text)
        q = attn.norm_q(attn.to_q(hidden)).view(len(k), -1, attn.heads, attn.inner_dim // attn.heads)
        out = F.scaled_dot_product_attention(q.transpose(1, 2).to(v.dtype), k.to(v.dtype), v)
        out = out.transpose(1, 2).reshape(hidden.shape).type_as(hidden)
        return attn.to_out[1](attn.to_out[0](out))


class CausalWan(WanTransformer3DModel):
    """WanTransformer3DModel, the same parameters under the same names, with a timestep and a position for
    each latent, a plan of who sees whom, and a KV cache. Without these two, all see all: stage 1's model."""
    @functools.wraps(WanTransformer3DModel.__init__)       # diffusers reads config names off the signature
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for layer, block in enumerate(self.blocks):
            block.attn1.set_processor(CausalSelfAttention(layer))
            block.attn2.set_processor(TextAttention(layer))

    @classmethod
    def of(cls, wan):
        """A WanTransformer3DModel as common.load_wan gives it -> this class with the same memory."""
        with torch.device("meta"):
            model = cls.from_config(wan.config)
        model.load_state_dict(wan.state_dict(), assign=True)
        model.rope = wan.rope                              # its tables are in no state
        return model.train(wan.training)

    def rope_at(self, positions, h, w):
        """Tables cos and sin, 1 N 1 d, for latents at `positions` (F,) in time and h x w tokens each."""
        tables = []
        for table in (self.rope.freqs_cos, self.rope.freqs_sin):
            t, y, x = table.split((self.rope.t_dim, self.rope.h_dim, self.rope.w_dim), dim=1)
            axes = t[positions][:, None, None], y[None, :h, None], x[None, None, :w]
            table = torch.cat([axis.expand(len(positions), h, w, -1) for axis in axes], dim=-1)
            tables.append(table.flatten(0, 2)[None, :, None])
        return tables

    @torch.no_grad()
    def text_keys(self, text):
        """Text B L D -> [(keys, values) of each block], for many passes. Not of a sharded model."""
        text = self.condition_embedder.text_embedder(text.to(self.patch_embedding.weight.dtype))
        return [TextAttention.keys(block.attn2, text) for block in self.blocks]

    def forward(self, x, t, text, plan=None, positions=None, cache=None, skip=0, backend="loop"):
        """x B C F h w, t B F (0 to 1000), text B L D or text_keys -> velocity B C F-skip h w, float32: not of
        the first `skip` latents. positions: (F,) in time; by default they go on from the cache's."""
        B, _, frames, h, w = x.shape
        _, ph, pw = self.config.patch_size
        past, dtype = cache.frames if cache is not None else 0, self.patch_embedding.weight.dtype
        if plan is None:
            plan = causal_plan([(0, frames)], past)
        if positions is None:
            positions = torch.arange(past, past + frames, device=x.device)
        here = Pass(*self.rope_at(positions, h // ph, w // pw), plan, frames, cache, backend)
        hidden = self.patch_embedding(x.to(dtype)).flatten(3).permute(0, 2, 3, 1).flatten(0, 1)  # B*F S D
        ready = isinstance(text, list)
        words = x.new_zeros(1, 1, self.config.text_dim) if ready else text
        temb, modulation, embedded, _ = self.condition_embedder(t.flatten(), words.to(dtype), None)
        text, modulation = text if ready else embedded, modulation.unflatten(1, (6, -1))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(block, hidden, text, modulation, here)
            else:
                hidden = block(hidden, text, modulation, here)
        hidden, temb = (y.unflatten(0, (B, frames))[:, skip:].flatten(0, 1) for y in (hidden, temb))
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        hidden = self.proj_out((self.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden))
        y = hidden.view(B, frames - skip, h // ph, w // pw, ph, pw, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return y.flatten(5, 6).flatten(3, 4).float()


# ---- KV cache -------------------------------------------------------------------------------------------

class KVCache:
    """Rotated keys and values of the latents so far: for each layer two buffers, B (capacity S) heads d,
    made at the first use and kept.

    capacity: latents. trained: latents of the training window, beyond which no position has been learned.
    branches: 2 gives guidance's negative branch its own keys, with its text behind them; 1 lets it read the
    positive one's, for half the memory and writing (the official server's way; not quite the same).
    frames: how many latents it holds. Without gradients a pass writes its keys behind these, where the next
    pass overwrites them; only append counts them.
    """
    def __init__(self, capacity, trained=None, branches=1):
        self.capacity, self.trained, self.branches = capacity, trained, branches
        self.frames, self.buffers = 0, {}

    def full(self, count):
        """Why `count` more latents do not fit, in a sentence, or None."""
        end = self.frames + count
        if self.trained and end > self.trained:
            return (f"latent {end - 1} lies beyond the {self.trained} of the training window: restart from "
                    f"the last real frames, or train with --frames {4 * end - 3}")
        if end > self.capacity:
            return (f"the KV cache holds {self.capacity} latents and {end} are asked for: raise "
                    f"--kv_cache_length to {4 * (end - 1)}")
        return None

    def extend(self, layer, k, v, S):
        """A pass's keys and values B N heads d -> those of the cache, and after them these."""
        start, end = self.frames * S, self.frames * S + k.shape[1]
        if layer not in self.buffers:
            self.buffers[layer] = [k.new_empty(len(k), self.capacity * S, *k.shape[2:]) for _ in "kv"]
        buffers = self.buffers[layer]
        if torch.is_grad_enabled() or len(k) != len(buffers[0]):       # autograd wants no writing in place,
            times = len(k) // len(buffers[0])                          # a shared cache serves both branches
            return [torch.cat([buffer[:, :start].repeat(times, 1, 1, 1), new], dim=1)
                    for buffer, new in zip(buffers, (k, v))]
        for buffer, new in zip(buffers, (k, v)):
            buffer[:, start:end] = new
        return [buffer[:, :end] for buffer in buffers]

    @torch.no_grad()
    def append(self, model, z, text, negative, k):
        """Writes clean latents B C n h w in one pass at t = 0. UserError where they do not fit."""
        if reason := self.full(z.shape[2]):
            raise UserError(reason)
        plan = causal_plan(chunk_bounds(self.frames, z.shape[2], k), self.frames)
        if self.branches == 2:
            z, text = torch.cat([z, z]), stack_text(text, negative)
        model(z, z.new_zeros(len(z), z.shape[2]), text, plan=plan, cache=self)
        self.frames += z.shape[2]

    def pop(self, count):
        """Forgets the last `count` latents, which were imagined before the real ones came."""
        self.frames -= count


def stack_text(text, negative):
    """Two texts of B, embeddings or text_keys, -> one of 2B."""
    if isinstance(text, list):
        return [tuple(map(torch.cat, zip(one, other))) for one, other in zip(text, negative)]
    return torch.cat([text, negative])


# ---- sampler --------------------------------------------------------------------------------------------

def solve(velocity, x, steps, shift, solver):
    """From noise to the flow's end. velocity: (x, timestep) -> like x. solver: "unipc" (Wan's) or "euler"."""
    if solver == "euler":
        levels = vidar.shift_sigma(torch.linspace(1, 0, steps + 1), shift).tolist()
        for sigma, following in zip(levels, levels[1:]):
            x = x + (following - sigma) * velocity(x, 1000 * sigma)
        return x
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                        flow_shift=shift)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t.item()), t, x, return_dict=False)[0]
    return x


@torch.no_grad()
def generate_chunk(model, cache, noise, text, negative, k, steps, cfg, shift, solver="unipc",
                   keep_last=False, timed=lambda name: contextlib.nullcontext()):
    """Noise B C n h w -> the n latents after the cache's, k at a time, yielded one by one, so that the first
    action can leave early.

    text, negative: B L D or text_keys. A cache of 2 branches needs guidance, cfg other than 1. Latents are
    written to the cache when the next ones are asked for; the last k only with keep_last, because what
    really happened takes their place: pop the n - k others, then append the real ones.
    """
    if reason := cache.full(noise.shape[2]):
        raise UserError(reason)
    words = text if cfg == 1 else stack_text(text, negative)

    def velocity(x, t):
        if cfg == 1:
            return model(x, x.new_full((len(x), x.shape[2]), t), words, cache=cache)
        v = model(torch.cat([x, x]), x.new_full((2 * len(x), x.shape[2]), t), words, cache=cache)
        return v[len(x):] + cfg * (v[:len(x)] - v[len(x):])

    for start, end in chunk_bounds(cache.frames, noise.shape[2], k):
        with timed("denoise"):
            z = solve(velocity, noise[:, :, start:end].float(), steps, shift, solver)
        yield from z.split(1, dim=2)
        if keep_last or end < noise.shape[2]:
            with timed("cache write"):
                cache.append(model, z, text, negative, k)


# ---- video codec, as a stream ---------------------------------------------------------------------------
# What a call needs of those before it is its state: for Wan's VAE the last inputs of each causal convolution,
# for the linear codec the first frame, of which later latents are differences. No call changes a state, so an
# older one may be used again: that takes imagined frames back.

def encode_next(vae, x, state=None):
    """The next frames B T 3 H W of a stream, T = 4n + 1 at its beginning (state None), later 4n -> normalised
    latents B C F h w as common.wan_encode's of the whole, and the new state."""
    first = state is None
    if x.shape[1] % 4 != first:
        raise ValueError(f"a stream begins with 4n + 1 frames and goes on with 4n, not {x.shape[1]}")
    if isinstance(vae, common.LinearCodec):
        whole = x if first else torch.cat([state, x], dim=1)
        return common.wan_encode(vae, whole)[:, :, 0 if first else 1:], whole[:, :1]
    state = list(state or [None] * vae._cached_conv_counts["encoder"])           # one for each convolution
    x = patchify(x.transpose(1, 2).to(vae.dtype), vae.config.patch_size or 1)
    parts = [vae.encoder(part, feat_cache=state, feat_idx=[0])
             for part in x.split([1] * first + [4] * (x.shape[2] // 4), dim=2)]
    mean, std = common.latent_scale(vae, x.device)
    mode = vae.quant_conv(torch.cat(parts, dim=2)).chunk(2, dim=1)[0]
    return (mode.float() - mean) / std, state


def decode_next(vae, z, state=None):
    """The next latents B C F h w of a stream (state None: its first) -> float32 frames B T 3 H W in [-1, 1]
    as common.wan_decode's of the whole, and the new state."""
    first = state is None
    if isinstance(vae, common.LinearCodec):
        whole = z if first else torch.cat([state, z], dim=2)
        return common.wan_decode(vae, whole)[:, 0 if first else 1:], whole[:, :, :1]
    state = list(state or [None] * vae._cached_conv_counts["decoder"])
    mean, std = common.latent_scale(vae, z.device)
    z = vae.post_quant_conv((z.float() * std + mean).to(vae.dtype))
    parts = [vae.decoder(part, feat_cache=state, feat_idx=[0], first_chunk=first and i == 0)
             for i, part in enumerate(z.split(1, dim=2))]
    x = unpatchify(torch.cat(parts, dim=2), vae.config.patch_size or 1)
    return x.float().clamp(-1, 1).transpose(1, 2), state


# ---- objective ------------------------------------------------------------------------------------------
# batch    latents B C F h w, text B L D, valid B F bool (False: the episode is over), arm B 1 F h w: U
# numbers  drawn outside, so that all ranks make the same calls: u B (F-1)/k, a chunk's level, and context B,
#          the past's, in [0, 1); noise, past_noise, rollout B C F h w; selves, start, rolled: one for all

def noised(z, noise, sigma):
    """x_sigma of latents B C F h w at levels B F."""
    sigma = sigma[:, None, :, None, None]
    return (1 - sigma) * z + sigma * noise


class CausalModel(nn.Module):
    """The DiT and its losses in one module, so that DDP and FSDP see one forward."""
    def __init__(self, dit, args):
        super().__init__()
        self.dit, self.args = dit, args
        if args.grad_checkpoint:
            dit.enable_gradient_checkpointing()
        flex = args.attention == "flex" or args.attention == "auto" and next(dit.parameters()).is_cuda
        self.backend = "flex" if flex else "loop"

    def forward(self, batch, numbers):
        """-> loss, its parts. numbers["selves"]: which of the two losses."""
        return (self.self_forced_loss if numbers["selves"] else self.teacher_forced_loss)(batch, numbers)

    def loss_at(self, v, batch, noise, at):
        """Eq. 7 for the velocity of the latents at the slice `at`."""
        z, arm = batch["latents"][:, :, at], batch.get("arm")
        arm = None if arm is None else arm[:, :, at]
        return vidar.flow_loss(v, noise[:, :, at] - z, batch["valid"][:, at], arm, self.args.eta)

    def teacher_forced_loss(self, batch, numbers):
        """All latents but the first, each chunk behind the clean past, in one parallel pass. The past has
        noise up to the level --context_noise, and its timestep says so."""
        z, k = batch["latents"], self.args.chunk_latents
        bounds = chunk_bounds(0, z.shape[2], k)
        clean = bounds[-1][0]
        level = (self.args.context_noise * numbers["context"])[:, None].expand(-1, clean)
        sigma = vidar.shift_sigma(numbers["u"], self.args.shift).repeat_interleave(k, dim=1)
        x = torch.cat([noised(z[:, :, :clean], numbers["past_noise"][:, :, :clean], level),
                       noised(z[:, :, 1:], numbers["noise"][:, :, 1:], sigma)], dim=2)
        place = torch.arange(z.shape[2], device=z.device)
        v = self.dit(x, 1000 * torch.cat([level, sigma], dim=1), batch["text"], plan=teacher_plan(bounds),
                     positions=torch.cat([place[:clean], place[1:]]), skip=clean, backend=self.backend)
        return self.loss_at(v, batch, numbers["noise"], slice(1, None))

    def self_forced_loss(self, batch, numbers):
        """The closed loop's own mistakes: a real past, then latents that the model imagined, then the loss of
        the next k real ones behind these. Between two observations lie --chunk_size frames; in one such
        stretch all chunks but 1 to the last are imagined, without gradients, in a few Euler steps."""
        z, text, k, shift = batch["latents"], batch["text"], self.args.chunk_latents, self.args.shift
        ahead = self.args.chunk_size // 4
        start = 1 + ahead * int(numbers["start"] * ((z.shape[2] - 1) // ahead))
        first = start + k * (1 + int(numbers["rolled"] * (ahead // k - 1)))
        cache, at = KVCache(first + k), slice(first, first + k)
        cache.append(self.dit, z[:, :, :start], text, None, k)
        list(generate_chunk(self.dit, cache, numbers["rollout"][:, :, start:first], text, None, k,
                            self.args.rollout_steps, 1, shift, "euler", keep_last=True))
        sigma = vidar.shift_sigma(numbers["u"][:, (first - 1) // k], shift)[:, None].expand(-1, k)
        x = noised(z[:, :, at], numbers["noise"][:, :, at], sigma)
        v = self.dit(x, 1000 * sigma, text, cache=cache)
        return self.loss_at(v, batch, numbers["noise"], at)


# ---- weights and data: stage 1's ------------------------------------------------------------------------

def need_stage1(args, run, names):
    """Where --vidar or --idm are not there: runs vidar.py's tiny preset if they are that one's own files."""
    missing = [name for name in names if not Path(getattr(args, name) or "").is_file()]
    own = {name: PRESETS["tiny"][name] for name in ("vidar", "idm")}
    if not missing:
        return
    if any(getattr(args, name) != own[name] for name in missing) or args.model != "tiny":
        name = missing[0]
        raise UserError(f"--{name}: there is no file {getattr(args, name)}: get it as README says, train it "
                        "with python vidar.py, or measure speed with --random_init")
    flags = ["--preset", "tiny", *args.stage1.split()]
    flags += ["--data_dir", args.data_dir] if "data_dir" in args.given else []
    if run.rank == 0:
        print(f"no {own[missing[0]]}: first stage 1, about 10 minutes on 2 cores: python vidar.py "
              f"{' '.join(flags)}", flush=True)
    if run.world > 1:
        raise UserError("stage 1 is missing, and one process trains it: first python vidar.py --preset tiny")
    if vidar.main(flags):
        raise UserError("stage 1 failed, as said above")


def prepare(args, run, found):
    """-> {part: [Episode]}, {part: Windows}, the IDM. Stage 1 leaves simulated episodes where it has to be
    run first. A checkpoint that was found stands for --vidar."""
    if not args.random_init:
        need_stage1(args, run, ["idm"] if found else ["vidar", "idm"])
        if not found and run.rank == 0:
            vidar.check_vidar(args)              # before the cache, which takes hours
    idm = vidar.load_idm(args.idm, vidar.idm_config(args)).to(run.device) if args.idm else None
    parts = vidar.load_parts(args.data_dir)
    vidar.fit_codec(args, run, parts)
    vidar.build_cache(args, run, parts, idm)
    data = {part: vidar.Windows(args, part, own) for part, own in parts.items()}
    if run.rank == 0:
        print(", ".join(f"{part}: {len(clips.rows)} windows" for part, clips in data.items()))
    return parts, data, idm


def make_model(args, run, begin=True):
    """CausalModel in fp32: at a learning rate of 2e-5 most steps of a bf16 weight round to none. begin: with
    stage 1's weights, unless a checkpoint's follow."""
    dit = CausalWan.of(vidar.wan_part(args, run, "transformer"))
    if begin and not args.random_init:
        weights, _ = vidar.read_vidar(args.vidar, dit)
        dit.load_state_dict(weights)
    return CausalModel(dit, args)


def export(args, run, model, folder):
    """final/: vidarc.pt in official names, which upstream's generate_causal.py takes, and vidarc.safetensors
    in diffusers'; bf16 at paper scale. Rank 0 writes."""
    weights, _ = common.gather_state(model, trained_only=True)
    if run.rank:
        return
    (folder / "final").mkdir(exist_ok=True)
    weights = {name.removeprefix("dit."): value for name, value in weights.items()}
    vidar.save_transformer(args, folder / "final" / SCRIPT, weights)


# ---- closed loop ----------------------------------------------------------------------------------------

class Policy:
    """What a robot's client or RoboTwin's evaluation calls: pictures and an instruction in, actions out.

        policy.reset()
        frames = [first]                                   # mosaics H W 3 uint8; vidar.mosaic makes them
        while not done:
            actions = policy.act(np.stack(frames), instruction, joints)         # (chunk_size, 14) radians
            frames = [execute(action) for action in actions]

    Some of the actions will do, in fours. joints (14,): the present ones, to calibrate the IDM; or None.
    """
    def __init__(self, args, run, dit, idm, vae, encode_prompt, empty):
        self.args, self.device, self.autocast = args, run.device, run.autocast
        self.dit, self.idm, self.vae, self.encode_prompt, self.empty = dit, idm, vae, encode_prompt, empty
        self.window = 1 + min(args.kv_cache_length, args.frames - 1) // 4             # latents
        self.seconds, self.told = {}, False
        self.cache = KVCache(self.window, (args.frames - 1) // 4 + 1,
                             2 if args.cfg != 1 and args.cfg_cache == "separate" else 1)
        self.reset()

    def reset(self, seed=0):
        """A new episode."""
        self.cache.frames, self.encoded, self.decoded, self.text, self.last = 0, None, None, None, None
        self.seen, self.real, self.generator = [], 0, torch.Generator().manual_seed(seed)

    @contextlib.contextmanager
    def timed(self, name):
        """A part of a chunk, in autocast: its time goes to seconds[name]. Around a whole generator, autocast
        would stay on for the caller."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        with self.autocast():
            yield
        wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def act(self, frames, instruction, joints=None):
        """-> actions (chunk_size, 14) float64, once all of them are there."""
        return np.concatenate(list(self.stream(frames, instruction, joints)))

    @torch.no_grad()
    def stream(self, frames, instruction, joints=None, latents=None):
        """frames n H W 3 uint8: what was seen since the last call, the first picture or some of those that
        actions led to. Yields actions (4, 14) of each latent, as soon as it is denoised; the frames it has
        imagined, 4 3 H W in [0, 1], lie in `imagined`."""
        self.check(frames)
        self.imagined, count = [], latents or self.args.chunk_size // 4
        if self.text != instruction:
            if self.text is not None:
                raise UserError("another instruction in one episode: call reset() first")
            with self.timed("text"):
                self.text, words = instruction, [self.encode_prompt(instruction), self.empty]
                self.words = [self.dit.text_keys(common.pad_text([w], self.args.text_length).to(self.device))
                              for w in words]
        self.cache.pop(self.cache.frames - self.real)          # imagined; the caller may not have waited
        self.observe(frames, count)
        self.real = self.cache.frames
        shift = 0
        if self.args.calibrate and joints is not None:
            with self.timed("idm"):
                shift = joints - self.read(self.last[-1:])[0]
        noise = torch.randn(self.latent_shape(count), generator=self.generator)
        decoded = self.decoded
        for z in generate_chunk(self.dit, self.cache, noise.to(self.device), *self.words,
                                self.args.chunk_latents, self.args.steps, self.args.cfg, self.args.shift,
                                self.args.solver, timed=self.timed):
            with self.timed("decode"):
                video, decoded = decode_next(self.vae, z, decoded)
                self.imagined.append((video[0].cpu() + 1) / 2)
            with self.timed("idm"):
                actions = self.read(self.imagined[-1])
            yield actions + shift

    def latent_shape(self, count):
        """Of `count` latents: 1 C F h w."""
        cell = vidar.codec_side(self.args)
        return 1, self.dit.config.in_channels, count, *(side // cell for side in vidar.video_size(self.args))

    def check(self, frames):
        wanted = (*vidar.video_size(self.args), 3)
        if getattr(frames, "dtype", None) != np.uint8 or frames.ndim != 4 or frames.shape[1:] != wanted:
            kind = f"{getattr(frames, 'dtype', type(frames).__name__)} {getattr(frames, 'shape', '')}"
            raise UserError(f"an observation is {kind}, not uint8 n {wanted}: the mosaic of three cameras "
                            "that vidar.mosaic makes, at --size")
        if len(frames) != 1 and (not self.seen or len(frames) % 4):
            raise UserError(f"{len(frames)} frames since the last call: it takes one at first, then fours")

    def observe(self, frames, ahead):
        """What was seen goes into the cache, where room for `ahead` latents has to stay."""
        self.seen = [*self.seen, *frames][-4 * self.window:]
        video = from_uint8(torch.from_numpy(np.stack(frames)).movedim(-1, 1))[None]
        more = len(frames) // 4 if self.encoded is not None else 1
        if reason := self.cache.full(more + ahead) if self.encoded is not None else None:
            if not self.told:
                print(f"{reason}: the window begins anew with the last real frames")
            self.told, self.cache.frames, self.encoded, self.decoded = True, 0, None, None
            keep = (self.window - 1 - ahead) // 2 // self.args.chunk_latents * self.args.chunk_latents
            keep = min(keep, (len(self.seen) - 1) // 4)
            video = from_uint8(torch.from_numpy(np.stack(self.seen[-4 * keep - 1:])).movedim(-1, 1))[None]
        with self.timed("encode"):
            z, self.encoded = encode_next(self.vae, video.to(self.device), self.encoded)
        with self.timed("prefill"):
            self.cache.append(self.dit, z, *self.words, self.args.chunk_latents)
        with self.timed("decode"):           # the decoder goes on from real latents, not from imagined ones
            video, self.decoded = decode_next(self.vae, z, self.decoded)
        self.last = (video[0].cpu() + 1) / 2

    def recompute(self, z):
        """Seconds of a chunk after the latents z, if no keys were kept."""
        began, args, count = time.perf_counter(), self.args, self.args.chunk_size // 4
        cache = KVCache(z.shape[2] + count, None, self.cache.branches)
        noise = torch.zeros_like(z[:, :, :1]).repeat(1, 1, count, 1, 1)
        with torch.no_grad(), self.autocast():
            cache.append(self.dit, z, *self.words, args.chunk_latents)
            list(generate_chunk(self.dit, cache, noise, *self.words, args.chunk_latents, args.steps, args.cfg,
                                args.shift, args.solver))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def bidirectional(self):
        """Seconds that stage 1's sampler needs for all frames of a window, with vidar.py's steps."""
        steps, words = vidar.build_parser().get_default("steps"), stack_text(*self.words)

        def velocity(x, t):
            x = torch.cat([x, x])
            return self.dit(x, x.new_full((len(x), x.shape[2]), t), words)[:1]

        x = torch.zeros(self.latent_shape(self.window), device=self.device)
        with torch.no_grad(), self.timed("bidirectional"):
            solve(velocity, x, steps, self.args.shift, "unipc")
        return self.seconds["bidirectional"][-1]

    def read(self, frames):
        return vidar.read_off(self.idm, frames, self.device)[0].double().numpy()


def perform(policy, args, seed, moved, closed, film=None):
    """One simulated world -> success, final distance of the block from the plate. Closed loop: a new plan
    from what is seen after every --execute frames; else one plan for a whole window, then rest.
    film: a list that takes (what is seen, what was imagined) for each frame, H W 3 uint8."""
    world = vidar.ArmWorld(seed, vidar.video_size(args), moved=moved)
    policy.reset(seed)
    frames, latents = [world.observe()], None if closed else policy.window - 1
    text, plan, done = vidar.full_prompt(world.text, args), [], 0
    while done < args.horizon and not world.success:
        if closed or not done:
            plan = list(np.concatenate(list(policy.stream(np.stack(frames), text, world.state, latents))))
            imagined = common.to_uint8(torch.cat(policy.imagined) * 2 - 1).movedim(1, -1).numpy()
            frames = []
        for action, picture in zip(plan[:closed and args.execute or None], imagined):
            world.step(action)
            done += 1
            if closed or film is not None:       # a picture costs more than the step
                frames.append(world.observe())
            if film is not None:
                film.append((frames[-1], picture))
        if not closed:
            while done < args.horizon and not world.step(plan[-1]):
                done += 1
            break
    return float(world.success), world.distance()


# ---- evaluate and sample --------------------------------------------------------------------------------

def chunk_scores(video, truth, arm, known, chunk):
    """T 3 H W in [0, 1] twice, arm T H W bool or None, known T bool -> PSNR of all frames but the first, and
    of each chunk of them; likewise of the arm."""
    rows, scores = {"psnr": common.psnr(video, truth)}, {}
    if arm is not None:
        rows["psnr_arm"] = vidar.region_psnr(video, truth, arm)
    for name, row in rows.items():
        row = torch.where(known, row, math.nan)[1:]
        scores[name] = row.nanmean().item()
        for i, part in enumerate(row.split(chunk), 1):
            scores[f"{name}_chunk_{i}"] = part.nanmean().item()
    return scores


def drift(args, policy, number, episode):
    """A held-out episode, chunk after chunk of its first window, behind what was seen and behind what was
    imagined -> {"reprefill" and "imagination": {metric of a chunk: number}}, {name: (actions, true ones)}."""
    window = vidar.read_windows(episode, [0], args)[0]
    truth, chunk = torch.from_numpy(window["video"]).movedim(-1, 1) / 255, args.chunk_size
    text, tables, pairs = vidar.full_prompt(episode.instruction, args, episode.views), {}, {}
    arm = window["mask"] if window["mask"] is None else torch.from_numpy(window["mask"])
    actions = window["actions"].astype(np.float64)
    goal, known = torch.from_numpy(actions[1:]), torch.from_numpy(window["valid"])
    for name in ("reprefill", "imagination"):
        policy.reset(number)
        videos, read = [truth[:1]], []
        starts = range(0, args.frames - chunk, chunk) if name == "reprefill" else [0]
        for at in starts:
            seen = window["video"][max(0, at - chunk + 1):at + 1]
            latents = None if name == "reprefill" else policy.window - 1
            read += policy.stream(seen, text, actions[at], latents)
            videos += policy.imagined
        video, T = torch.cat(videos), 1 + sum(map(len, read))
        tables[name] = chunk_scores(video, truth[:T], None if arm is None else arm[:T], known[:T], chunk)
        pairs[name] = torch.from_numpy(np.concatenate(read))[known[1:T]], goal[:T - 1][known[1:T]]
    still = truth[:1].expand_as(truth)
    tables["do_nothing"] = chunk_scores(still, truth, arm, known, chunk)
    pairs["do_nothing"] = torch.from_numpy(actions[:1]).expand_as(goal)[known[1:]], goal[known[1:]]
    return tables, pairs


def timing_flags(args):
    return argparse.Namespace(**{**vars(args), **(DOCUMENT if args.model == "tiny" else {})})


def latency(args, policy):
    """Times the policy on grey pictures -> {part of a chunk: {"p50", "p95"} in seconds}, and seconds of each
    chunk in turn: {"KV cache": [...], "recomputed": [...]}, where the latter keeps no keys between chunks.

    Part "bidirectional" is stage 1's sampler: all of a window at once, in its 20 steps with guidance."""
    H, W = vidar.video_size(args)
    policy.told = True
    rows, curves = [], {"KV cache": [], "recomputed": []}
    frames = np.full((1, H, W, 3), 128, np.uint8)
    for i in range(3 + args.latency_chunks):
        policy.seconds, began = {}, time.perf_counter()
        for number, _ in enumerate(policy.stream(frames, "latency", np.zeros(vidar.ACTION_DIM))):
            if not number:
                first = time.perf_counter() - began
        rows.append({**{name: sum(values) for name, values in policy.seconds.items() if name != "text"},
                     "first action": first, "chunk": time.perf_counter() - began})
        curves["KV cache"].append(rows[-1]["chunk"])
        past = torch.zeros(policy.latent_shape(1 + i * args.chunk_size // 4), device=policy.device)
        curves["recomputed"].append(policy.recompute(past))
        frames = np.full((args.chunk_size, H, W, 3), 128, np.uint8)
    columns = {name: [row.get(name, 0.) for row in rows[3:]] for name in rows[-1]}
    columns["bidirectional"] = [policy.bidirectional()]
    table = {name: {"p50": float(np.median(values)), "p95": float(np.quantile(values, .95))}
             for name, values in columns.items()}
    return table, curves


def evaluate(args, run, model, idm, parts, data):
    """Closed against open loop in simulated worlds, drift on held-out episodes, latency -> eval.json,
    curves.png. Processes share worlds and episodes; rank 0 has latency to itself."""
    began, tables, pairs = time.time(), {}, {}
    policy = make_policy(args, run, model, idm, data)
    episodes = list(enumerate(vidar.tasks(parts["test"])[:args.eval_clips or None]))
    for number, episode in episodes[run.rank::run.world]:
        scores, read = drift(args, policy, number, episode)
        for name, row in scores.items():
            tables.setdefault(name, []).append(row)
        for name, pair in read.items():
            pairs.setdefault(name, []).append(pair)
    for number in range(run.rank, args.worlds, run.world) if vidar.is_simulated(args) else ():
        for moved in (None, args.moved):
            for closed in (True, False):
                success, distance = perform(policy, args, vidar.FIRST_WORLD + number, moved, closed)
                name = f"{'moved' if moved else 'static'}_{'closed' if closed else 'open'}_loop"
                tables.setdefault(name, []).append({"success": success, "distance": distance})
    tables, pairs = (common.gather_rows(rows) for rows in (tables, pairs))
    means = {name: vidar.mean_scores(rows) for name, rows in tables.items()}
    for name, rows in pairs.items():
        scores = vidar.idm_scores(*(torch.cat(column) for column in zip(*rows)))
        means[name] |= {f"action_{metric}": value for metric, value in scores.items()}
    if run.rank == 0:
        timed = timing_flags(args)
        policy = Policy(timed, run, policy.dit, idm, policy.vae, policy.encode_prompt, policy.empty)
        seconds = latency(timed, policy) if args.latency_chunks else None
        report(args, means, seconds, len(episodes), time.time() - began)


def report(args, means, seconds, episodes, took):
    """Writes eval.json, prints it, draws curves.png."""
    worlds = {name: row for name, row in means.items() if name.endswith("_loop")}
    flat = lambda name: {f"{metric}_{name}": value for metric, value in means.get(name, {}).items()}
    results = {**means["reprefill"], **flat("static_closed_loop"), **flat("moved_closed_loop")}
    baselines = {name: means[name] for name in ("imagination", "do_nothing")}
    metric = "psnr_arm" if "psnr_arm" in results else "psnr"
    baseline = means["do_nothing"][metric]
    if worlds:
        metric, baseline = "success_moved_closed_loop", means["moved_open_loop"]["success"]
        baselines["open_loop"] = {**flat("static_open_loop"), **flat("moved_open_loop")}
    table, curves = seconds or ({}, {})
    results |= {f"seconds_{name.replace(' ', '_')}_{q}": value for name, row in table.items()
                for q, value in row.items()}
    common.write_json(Path(args.output_dir) / "eval.json", {
        "script": SCRIPT, "preset": args.preset, "data": vidar.describe_data(args), "weights": args.weights,
        "seconds": took, "headline": {"metric": metric, "value": results[metric], "baseline": baseline,
                                      "lower_is_better": False},
        "results": results, "baselines": baselines})
    print(f"{episodes} held-out episodes, chunks of {args.chunk_size} frames")
    for name in ("reprefill", "imagination", "do_nothing"):
        print(f"{name:>12}: " + ", ".join(f"{key} {value:.3f}" for key, value in means[name].items()
                                          if "chunk" not in key))
    for name, row in worlds.items():
        print(f"{args.worlds} worlds, {name.replace('_', ' ')}: success {row['success']:.0%}, block "
              f"{row['distance']:.2f} from the plate")
    if table:
        timed = timing_flags(args)
        print(f"a chunk of {timed.chunk_size} frames, {timed.size.replace(',', 'x')}, {timed.steps} steps "
              f"(published: {PUBLISHED})")
    for name, row in table.items():
        print(f"{name:>13}: p50 {1000 * row['p50']:8.1f} ms, p95 {1000 * row['p95']:8.1f} ms")
    draw_curves(args, means, curves)


def draw_curves(args, means, curves):
    """curves.png: losses, quality from chunk to chunk, latency from chunk to chunk."""
    panels = [common.loss_panel(Path(args.output_dir), "stage 2")]
    metric = "psnr_arm_chunk_" if "psnr_arm" in means["reprefill"] else "psnr_chunk_"
    lines = {}
    for name in ("reprefill", "imagination"):
        values = [value for key, value in means[name].items() if key.startswith(metric)]
        lines[name] = (list(range(1, len(values) + 1)), values)
    panels.append({"title": "drift", "xlabel": "chunk", "ylabel": metric.removesuffix("_chunk_") + " (dB)",
                   "lines": lines})
    if curves:
        panels.append({"title": "latency", "xlabel": "chunk", "ylabel": "seconds", "lines": {
            name: (list(range(1, len(values) + 1)), values) for name, values in curves.items()}})
    common.plot_curves(Path(args.output_dir) / "curves.png", panels)


def make_policy(args, run, model, idm, data):
    return Policy(args, run, model.dit.eval(), idm, vidar.load_codec(args, run),
                  vidar.text_encoder(args, run), data["test"].empty)


def sample(args, run, model, idm, parts, data):
    """Closed loops in simulated worlds in which the block is moved: what was seen over what was imagined; of
    real data held-out episodes, each chunk imagined from what was seen -> files."""
    if run.rank:
        return []
    policy, folder, files = make_policy(args, run, model, idm, data), Path(args.output_dir) / "samples", []
    folder.mkdir(exist_ok=True)
    for number in range(args.num_samples):
        if vidar.is_simulated(args):
            film, name = [], f"world_{number}"
            perform(policy, args, vidar.FIRST_WORLD + args.seed + number, args.moved, True, film)
            seen, imagined = (np.stack(column) for column in zip(*film))
        else:
            episode = vidar.tasks(parts["test"])[number % len(vidar.tasks(parts["test"]))]
            window, name = vidar.read_windows(episode, [0], args)[0], episode.id
            policy.reset(args.seed)
            seen, text, imagined = window["video"][1:], vidar.full_prompt(episode.instruction, args), []
            for at in range(0, args.frames - args.chunk_size, args.chunk_size):
                list(policy.stream(window["video"][max(0, at - args.chunk_size + 1):at + 1], text))
                imagined += [common.to_uint8(part * 2 - 1).movedim(1, -1).numpy() for part in policy.imagined]
            imagined = np.concatenate(imagined)
            seen = seen[:len(imagined)]
        panels = {label: from_uint8(torch.from_numpy(video).movedim(-1, 1))
                  for label, video in (("seen", seen), ("imagined", imagined))}
        files += vidar.write_panels(folder / name, panels, 7)
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

    Weights, gradients and moments are fp32, blocks compute in bf16. Inputs are not cast by FSDP: timesteps
    and rope's tables have to stay fp32. The root is resharded after forward as the blocks are: by default it
    stays gathered until a backward, and the step after a validation would compute with the averages."""
    if args.compile:
        for block in model.dit.blocks:
            block.compile()
    if args.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(run.device.type, (run.world,))
        policy = MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        for block in model.dit.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
                           reshard_after_forward=True)
    if run.world > 1:
        ids = [run.device] if run.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)
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
    """Windows, levels and noise of a micro-batch, a function of (seed, step) and of a sample's place in the
    whole batch. Which loss, and where it begins, is the same for all of a step: FSDP needs equal calls."""
    seed = common.seed_all(args.seed, 1, step)
    kinds = {"window": ("randint", len(clips.rows)), "drop": ("rand",), "context": ("rand",),
             "u": ("rand", (args.frames - 1) // 4 // args.chunk_latents),
             **{name: ("randint", 2 ** 62) for name in ("noise", "past_noise", "rollout")}}
    numbers = common.draw(kinds, seed, args.batch_size, run.rank, run.world, micro, args.grad_accum)
    silent = (numbers["drop"] < args.cfg_drop).nonzero().flatten().tolist()
    batch = clips.get(numbers["window"].tolist(), run.device, silent)
    one = batch["latents"][:1]
    for name in ("noise", "past_noise", "rollout"):
        numbers[name] = torch.cat([vidar.fixed_noise(one, n) for n in numbers[name].tolist()])
    coin, start, rolled = torch.rand(3, generator=torch.Generator().manual_seed(seed + 1)).tolist()
    numbers = {name: value.to(run.device) for name, value in numbers.items()}
    selves = step >= args.self_forcing_after and coin < args.self_forcing
    return batch, {**numbers, "selves": selves, "start": start, "rolled": rolled}


def validate(args, run, model, clips):
    """Teacher-forced loss of held-out windows at level u = 0.5, with a clean past -> {"val_loss": number}."""
    values = []
    for i in range(len(clips.rows)):
        batch = clips.get([i], run.device)
        noise = vidar.fixed_noise(batch["latents"], i)
        u = torch.full((1, (args.frames - 1) // 4 // args.chunk_latents), .5, device=run.device)
        numbers = {"selves": False, "u": u, "context": u[:, 0] * 0, "noise": noise, "past_noise": noise}
        with run.autocast():
            values.append(model(batch, numbers)[1]["flow_loss"].item())
    return {"val_loss": float(np.mean(values))}


def train(args, run, model, data, found):
    """-> CausalModel with the averaged weights, which are exported; whole on each process."""
    folder = Path(args.output_dir)

    def losses(model, step, micro):
        batch = draw_batch(args, run, data["train"], step, micro)
        with run.autocast():
            return model(*batch)

    fit(args, run, folder, model, losses, lambda model: validate(args, run, model, data["val"]), found,
        args.max_steps, args.lr)
    export(args, run, model, folder)
    if args.fsdp:                                # for evaluation each process has a whole model
        weights, _ = common.gather_state(model, everywhere=True)
        model = make_model(args, run, begin=False)
        common.restore_state(model, weights, source="this run")
    return model


def dry_run(args):
    """Prints what stage 2 costs, from the meta device: nothing is allocated, nothing is read."""
    run, B = argparse.Namespace(device=torch.device("meta")), args.batch_size
    own = argparse.Namespace(**{**vars(args), "random_init": True, "attention": "loop"})
    gpus, _ = vidar.MACHINES.get(args.preset, (1, 0))
    world = int(os.environ.get("WORLD_SIZE", gpus))
    side = vidar.codec_side(args)
    with torch.device("meta"):
        model = make_model(own, run)
        config, (H, W) = model.dit.config, vidar.video_size(args)
        z = torch.randn(B, config.in_channels, (args.frames - 1) // 4 + 1, H // side, W // side)
        batch = {"latents": z, "valid": torch.ones(B, z.shape[2], dtype=torch.bool), "arm": z[:, :1],
                 "text": torch.randn(B, args.text_length, config.text_dim)}
        numbers = {"selves": False, "noise": z, "past_noise": z, "context": torch.rand(B),
                   "u": torch.rand(B, (args.frames - 1) // 4 // args.chunk_latents)}

        def loss():
            with torch.autocast("cpu", torch.bfloat16, enabled=args.model != "tiny"):
                return model(batch, numbers)[0]

        tokens = z[0, 0].numel() // 4
        print(common.dry_run_report("stage 2, teacher-forced", model, loss, B, 2 * tokens, world, args.fsdp))
    latents, D = 1 + args.kv_cache_length // 4, config.num_attention_heads * config.attention_head_dim
    bytes_ = 2 * config.num_layers * D * (4 if args.model == "tiny" else 2) * tokens // z.shape[2]
    branches = 2 if args.cfg != 1 and args.cfg_cache == "separate" else 1
    print(f"  KV cache: {bytes_ / 2 ** 20:.1f} MiB a latent, {branches} x {latents} latents "
          f"{branches * latents * bytes_ / 2 ** 30:.2f} GiB; in self-forcing up to {B * z.shape[2]} latents, "
          f"{B * z.shape[2] * bytes_ / 2 ** 30:.2f} GiB")


# ---- main -----------------------------------------------------------------------------------------------

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
    args.weights = f"{args.weights_from} shape, RANDOM weights" if args.random_init else str(args.vidar)
    if args.model == "tiny":
        args.weights = "tiny ones that the runs train, on a LINEAR codec instead of a VAE"
    if run.rank == 0:
        there = "" if Path(args.data_dir).exists() else " (not there yet)"
        going_on = f", going on from {found[0]}" if found else ""
        print(f"{SCRIPT}: preset {args.preset} ({args.why_preset}), data {args.data_dir}{there}, weights "
              f"{args.weights}{going_on}, {run.world} x {run.device.type} {str(run.dtype)[6:]}", flush=True)
    if only and not found:
        if "output_dir" in args.given:
            raise UserError(f"no checkpoint in {folder}/ckpt: first python {SCRIPT}.py --output_dir {folder}")
        if run.rank == 0:
            print(f"no checkpoint in {folder}/ckpt: training preset {args.preset} first"
                  + (", about 9 minutes on 2 cores" if args.preset == "tiny" else ""))
    parts, data, idm = prepare(args, run, found)
    if run.rank == 0 and not (only and found):
        common.write_json(folder / "args.json", {**public_flags(args), **common.provenance()})
    model = make_model(args, run, begin=not found).to(run.device)
    if found and (only or found[2]["step"] >= args.max_steps):
        common.restore_state(model, found[1]["ema"], source=str(found[0]), trained_only=True)
    else:
        model = train(args, run, model, data, found)
    written = []
    if args.eval or not only:
        evaluate(args, run, model, idm, parts, data)
        written = [f"{folder}/eval.json", f"{folder}/curves.png"]
    if args.sample or not only:
        written += sample(args, run, model, idm, parts, data)
    if run.rank == 0:
        common.show_results(folder, written, args.tensorboard, args.wandb)
        print("wrote " + ", ".join(written))
    run.barrier()
    run.close()


def main(argv=None):
    return common.one_line_errors(f"{SCRIPT}.py", lambda: work(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
