"""vidarc.py: causal Vidar for closed-loop control: generate a chunk, act, replace it with observed frames.

Papers      Vidarc (arXiv:2512.17661), of which this is stage 2, on Vidar (arXiv:2507.12898); Self Forcing
            (arXiv:2506.08009); Wan2.2-TI2V-5B (arXiv:2503.20314).
Equations   Eq. 6  |v(x_t, t, c, x_prev) - (x_0 - x_1)|^2, x_prev clean  -> teacher_forced_loss, teacher_plan
            Eq. 7  |(1 + eta U) (v - (x_0 - x_1))|^2, eta 3               -> vidar.flow_loss
            x = (1 - sigma) z + sigma eps, sigma per latent frame         -> mix_noise; signs as in vidar.py
            self-forcing: loss after latents that the model generates     -> self_forced_loss
            KV cache, prefilled again with observed frames                -> KVCache, generate_latents, Policy
Run         python vidarc.py                         # 16 to 25 min on 2 CPU cores, with stage 1
            python vidarc.py --sample --num_samples 3                      # or --eval
            python vidarc.py --serve 8000                                  # actions over a websocket
            torchrun --nproc_per_node=8 vidarc.py --preset ti2v_5b --fsdp --data_dir data/robotwin
From Python policy = vidarc.load_policy("runs/vidarc"); actions = policy.act(frames, instruction, joints)
Shapes      B batch  T frames  F = (T - 1) / 4 + 1 latent frames  C latent channels  H W pixels  h w latent
            cells  S = h/2 w/2 tokens of a latent frame  N = F S  D width  L text tokens. Latents are
            B C F h w, videos B T 3 H W in [-1, 1] ([0, 1] for the IDM); actions n 14 are absolute joint
            positions. --chunk_size and --kv_cache_length count pixel frames, four to a latent frame.
"""
import argparse
import functools
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

import common
import vidar
from common import UserError, at_least, between, from_uint8
from data.vidar import episodes as robot_data
from data.vidar.server import make_server
from data.vidar.world import ArmWorld

SCRIPT = "vidarc"
FIRST_WORLD = 1_000_000                  # seed of the first world of --eval; seeds of training start at 0
HORIZON = 64                             # frames of an episode in a world, enough for a second attempt
MOVED_AT = 6                             # frame at which the block is displaced

# ---- presets and flags ----------------------------------------------------------------------------------

PRESETS = {
    "tiny": dict(
        {name: vidar.PRESETS["tiny"][name] for name in (
            "model", "data_dir", "height", "width", "frames", "prompt_views", "windows", "text_length",
            "idm_frames", "batch_size", "global_batch", "lr", "warmup_steps", "ema_decay", "shift",
            "cfg_drop", "eval_every", "save_every", "eval_clips")},
        vidar="runs/vidar/video/final/vidar.safetensors", idm="runs/vidar/final/idm.pt", max_steps=1150,
        sample_shift=8.0, num_inference_steps=1, guidance_scale=1., chunk_size=8, kv_cache_length=32,
        context_noise=.02, self_forcing=.1, self_forcing_after=850, worlds=48),
    "ti2v_5b": dict({**vidar.PRESETS["ti2v_5b"], "max_steps": 4000, "save_every": 250, "eval_every": 250},
                    vidar="checkpoints/vidar/vidar.pt", idm="checkpoints/vidar/idm.pt"),
}
MODEL_FLAGS = ("model", "text_length", "height", "width")        # a checkpoint fixes their values


def build_parser():
    parser = vidar.add_stage_flags(common.Parser(SCRIPT, PRESETS, __doc__.split("\n")[0]))
    add = parser.add_argument_group("stage 2").add_argument
    add("--eta", type=at_least(0, float), default=3., help="weight of the arms in the loss (Eq. 7)")
    add("--context_noise", type=between(0, 1), default=0., help="maximum noise of past latents (Eq. 6: 0)")
    add("--self_forcing", type=between(0, 1), default=.5, help="share of steps with self-forcing")
    add("--self_forcing_after", type=at_least(0), default=1000, help="first step with self-forcing")
    add("--rollout_denoise_steps", type=at_least(1), default=4, help="sampler steps of self-forcing")
    add("--num_inference_steps", type=at_least(1), default=10, help="sampler steps per chunk")
    add("--guidance_scale", type=at_least(0, float), default=3.0, help="classifier-free guidance (1: off)")
    add("--chunk_size", type=at_least(4), default=16, help="pixel frames between observations, 4k")
    add("--kv_cache_length", type=at_least(4), default=64, help="pixel frames in the KV cache, 4k")
    add("--worlds", type=at_least(0), default=48, help="worlds to evaluate in, for simulated data")
    add("--serve", type=at_least(1), metavar="PORT", help="serve the trained policy over a websocket")
    return parser


def parse_args(argv=None):
    """-> flags, checkpoint or None, reason for the preset."""
    get_data = "python data/vidar/prepare.py --from robotwin SRC data/robotwin"
    args, checkpoint, why_preset = common.parse_args(build_parser(), argv, MODEL_FLAGS, get_data=get_data)
    vidar.check_flags(args, [args.batch_size])
    for name in ("chunk_size", "kv_cache_length"):
        if getattr(args, name) % 4:
            raise UserError(f"--{name} must be a multiple of 4, not {getattr(args, name)}")
    window = 4 * (window_latents(args) - 1)
    if args.chunk_size > window:
        raise UserError(f"--chunk_size {args.chunk_size} does not fit in a window of {window} frames "
                        f"after the first: raise --kv_cache_length or --frames")
    if args.self_forcing and args.chunk_size < 8:
        raise UserError("--self_forcing generates a part of a chunk: raise --chunk_size to 8 or more, or set "
                        "--self_forcing 0")
    return args, checkpoint, why_preset


def window_latents(args):
    """Latent frames of the policy's window: limited by the window of training and by the cache."""
    return 1 + min(args.kv_cache_length, args.frames - 1) // 4


# ---- attention plans ------------------------------------------------------------------------------------
# A plan has an entry for each latent frame of a pass: the ranges ((start, end), ...) of latent frames that it
# attends to. Cached latent frames are counted first. Without a plan, attention is not restricted.

def causal_plan(count, past=0):
    """Each of `count` latent frames attends to `past` cached ones, the ones before it, and itself."""
    return tuple(((0, past + i + 1),) for i in range(count))


def teacher_plan(F_):
    """Clean latent frames 0 to F - 2, then noisy ones 1 to F - 1, in one pass. A noisy latent frame attends
    to the clean ones before it and to itself."""
    noisy = tuple(((0, i), (F_ - 2 + i, F_ - 1 + i)) for i in range(1, F_))
    return causal_plan(F_ - 1) + noisy


def attend(q, k, v, plan, S):
    """Attention with a plan: q B heads N d, k and v B heads N' d -> B heads N d. One call per latent frame
    needs no mask: all fused kernels work, and keys outside the ranges cost nothing."""
    if plan is None:
        return F.scaled_dot_product_attention(q, k, v)
    k_frames, v_frames = k.split(S, dim=2), v.split(S, dim=2)
    outputs = []
    for query, ranges in zip(q.split(S, dim=2), plan):
        keys = torch.cat([frame for start, end in ranges for frame in k_frames[start:end]], dim=2)
        values = torch.cat([frame for start, end in ranges for frame in v_frames[start:end]], dim=2)
        outputs.append(F.scaled_dot_product_attention(query, keys, values))
    return torch.cat(outputs, dim=2)


# ---- model ----------------------------------------------------------------------------------------------

@dataclass(eq=False)
class AttentionContext:
    """Arguments of self-attention in a forward pass. They replace the rotary tables, the only argument that
    WanTransformerBlock passes on unchanged. FSDP does not cast the fields, so the tables stay in fp32."""
    cos: torch.Tensor                    # 1 N 1 d
    sin: torch.Tensor
    plan: tuple | None
    frames: int                          # latent frames of this pass
    cache: "KVCache | None"


def rotate(x, cos, sin):
    """Rotates pairs of channels of x B N heads d by the angles of the tables 1 N 1 d."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-b, a), dim=-1).flatten(-2) * sin


class CausalSelfAttention:
    """Processor of attn1. hidden B*F S D: latent frames are folded into the batch, so that the modulation is
    B*F 6 D instead of one per token; they are unfolded here. Keys are cached after rotation."""
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, attn, hidden, text, mask, context):
        S = hidden.shape[1]
        q, k, v = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(hidden)), attn.to_v(hidden)
        q, k, v = (x.reshape(-1, context.frames * S, attn.heads, context.cos.shape[-1]) for x in (q, k, v))
        q, k = (rotate(x, context.cos, context.sin).to(v.dtype) for x in (q, k))
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v, S)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), context.plan, S)
        out = out.transpose(1, 2).reshape(hidden.shape).type_as(hidden)
        return attn.to_out[1](attn.to_out[0](out))


class TextAttention:
    """Processor of attn2. text: embeddings B L D, or the output of CausalWan.text_kv."""
    def __init__(self, layer):
        self.layer = layer

    @staticmethod
    def keys_and_values(attn, text):
        """text B L D -> keys and values B heads L d."""
        k, v = attn.norm_k(attn.to_k(text)), attn.to_v(text)
        return [x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (k, v)]

    def __call__(self, attn, hidden, text, mask, rotary):
        k, v = text[self.layer] if isinstance(text, list) else self.keys_and_values(attn, text)
        q = attn.norm_q(attn.to_q(hidden)).view(len(k), -1, attn.heads, attn.inner_dim // attn.heads)
        out = F.scaled_dot_product_attention(q.transpose(1, 2).to(v.dtype), k.to(v.dtype), v)
        out = out.transpose(1, 2).reshape(hidden.shape).type_as(hidden)
        return attn.to_out[1](attn.to_out[0](out))


class CausalWan(WanTransformer3DModel):
    """WanTransformer3DModel, the same parameters under the same names, with a timestep and a position per
    latent frame, an attention plan, and a KV cache. Without plan and cache it is the model of stage 1."""
    @functools.wraps(WanTransformer3DModel.__init__)       # diffusers reads config names from the signature
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for layer, block in enumerate(self.blocks):
            block.attn1.set_processor(CausalSelfAttention(layer))
            block.attn2.set_processor(TextAttention(layer))

    @classmethod
    def of(cls, wan):
        """Converts a WanTransformer3DModel. The weights share memory."""
        with torch.device("meta"):
            model = cls.from_config(wan.config)
        model.load_state_dict(wan.state_dict(), assign=True)
        model.rope = wan.rope                              # the tables are not in the state dict
        return vidar.keep_time_in_fp32(model)

    def rotary_tables(self, positions, h, w):
        """Tables cos and sin, 1 N 1 d, for latent frames at `positions` (F,) with h x w tokens each."""
        tables = []
        for table in (self.rope.freqs_cos, self.rope.freqs_sin):
            t, y, x = table.split((self.rope.t_dim, self.rope.h_dim, self.rope.w_dim), dim=1)
            axes = t[positions][:, None, None], y[None, :h, None], x[None, None, :w]
            table = torch.cat([axis.expand(len(positions), h, w, -1) for axis in axes], dim=-1)
            tables.append(table.flatten(0, 2)[None, :, None])
        return tables

    @torch.no_grad()
    def text_kv(self, text):
        """text B L D -> [(keys, values) of each block], for many passes. FSDP models are not supported."""
        text = self.condition_embedder.text_embedder(text.to(self.patch_embedding.weight.dtype))
        return [TextAttention.keys_and_values(block.attn2, text) for block in self.blocks]

    def forward(self, x, t, text, plan=None, positions=None, cache=None):
        """x B C F h w, t B F (0 to 1000), text B L D or text_kv() -> velocity B C F h w in float32.
        positions: indices (F,) in time, by default those after the cache."""
        B, _, F_, h, w = x.shape
        _, ph, pw = self.config.patch_size
        dtype = self.patch_embedding.weight.dtype
        if positions is None:
            past = cache.frames if cache is not None else 0
            positions = torch.arange(past, past + F_, device=x.device)
        context = AttentionContext(*self.rotary_tables(positions, h // ph, w // pw), plan, F_, cache)
        hidden = self.patch_embedding(x.to(dtype)).flatten(3).permute(0, 2, 3, 1).flatten(0, 1)  # B*F S D
        has_kv = isinstance(text, list)
        embeddings = x.new_zeros(1, 1, self.config.text_dim) if has_kv else text
        temb, modulation, embedded, _ = self.condition_embedder(t.flatten(), embeddings.to(dtype), None)
        text, modulation = text if has_kv else embedded, modulation.unflatten(1, (6, -1))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(block, hidden, text, modulation, context)
            else:
                hidden = block(hidden, text, modulation, context)
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        hidden = self.proj_out((self.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden))
        y = hidden.view(B, F_, h // ph, w // pw, ph, pw, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return y.flatten(5, 6).flatten(3, 4).float()


# ---- KV cache -------------------------------------------------------------------------------------------

class KVCache:
    """Rotated keys and values of past latent frames: two buffers per block, B (capacity S) heads d.

    frames: number of latent frames in the cache. Without gradients, a pass writes its keys and values after
    these, where the next pass overwrites them; only append() adds them to the cache.
    """
    def __init__(self, capacity):
        self.capacity, self.frames, self.buffers = capacity, 0, {}

    def extend(self, layer, k, v, S):
        """Keys and values of a pass, B N heads d -> those in the cache, followed by these."""
        start, end = self.frames * S, self.frames * S + k.shape[1]
        if layer not in self.buffers:
            self.buffers[layer] = [k.new_empty(len(k), self.capacity * S, *k.shape[2:]) for _ in range(2)]
        if torch.is_grad_enabled():                        # autograd does not allow in-place writes
            return [torch.cat([buffer[:, :start], new], dim=1)
                    for buffer, new in zip(self.buffers[layer], (k, v))]
        for buffer, new in zip(self.buffers[layer], (k, v)):
            buffer[:, start:end] = new
        return [buffer[:, :end] for buffer in self.buffers[layer]]

    def require(self, count):
        """Raises UserError unless `count` more latent frames fit."""
        if self.frames + count > self.capacity:
            raise UserError(f"the KV cache holds {self.capacity} latent frames, not {self.frames + count}: "
                            f"raise --kv_cache_length to {4 * (self.frames + count - 1)}")

    @torch.no_grad()
    def append(self, model, z, text):
        """Adds clean latents B C n h w in one pass at timestep 0."""
        self.require(z.shape[2])
        model(z, z.new_zeros(len(z), z.shape[2]), text, causal_plan(z.shape[2], self.frames), cache=self)
        self.frames += z.shape[2]

    def pop(self, count):
        """Removes the last `count` latent frames: predicted ones, which observed ones replace."""
        self.frames -= count


# ---- sampler --------------------------------------------------------------------------------------------

def denoise(velocity, x, args, steps):
    """UniPC from noise to data. velocity: (x, timestep) -> like x."""
    scheduler = vidar.make_scheduler(args, steps, x.device)
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(x, timestep.item()), timestep, x, return_dict=False)[0]
    return x


def repeat_for_guidance(x, guidance):
    """B ... -> 2B ..., for the prompts and the empty prompts; unchanged without guidance."""
    return x if guidance == 1 else torch.cat([x, x])


@torch.no_grad()
def generate_latents(model, cache, noise, text, args, steps, guidance=1., keep_last=False):
    """Noise B C n h w -> yields the n latent frames that follow the cache, one by one, so that the first
    actions are available early.

    text: embeddings or text_kv() of the prompts, with guidance also of the empty ones (2B). A latent frame is
    written to the cache when the next one is requested, the last one only with keep_last, because observed
    frames replace them: pop the n - 1 others, then append the observed ones.
    """
    cache.require(noise.shape[2])

    def velocity(x, t):
        x = repeat_for_guidance(x, guidance)
        v = model(x, x.new_full((len(x), 1), t), text, cache=cache)
        if guidance == 1:
            return v
        v, unguided = v.chunk(2)
        return unguided + guidance * (v - unguided)

    for i in range(noise.shape[2]):
        z = denoise(velocity, noise[:, :, i:i + 1].float(), args, steps)
        yield z
        if keep_last or i + 1 < noise.shape[2]:
            cache.append(model, repeat_for_guidance(z, guidance), text)


# ---- video codec, as a stream ---------------------------------------------------------------------------
# The state is what a call needs of earlier frames: for Wan's VAE the last inputs of each causal convolution,
# for the linear codec the first frame, from which later latents are differences. A call does not modify its
# state, so an older state can be used again, which discards predicted frames.

def encode_next(vae, x, state=None):
    """The next frames B T 3 H W of a stream, T = 4n + 1 at its start (state None), then 4n -> normalised
    latents B C F h w, equal to those of common.wan_encode for the whole video, and the new state."""
    first = state is None
    if x.shape[1] % 4 != first:
        raise ValueError(f"a stream begins with 4n + 1 frames and continues with 4n, not {x.shape[1]}")
    if isinstance(vae, common.LinearCodec):
        whole = x if first else torch.cat([state, x], dim=1)
        return common.wan_encode(vae, whole)[:, :, 0 if first else 1:], whole[:, :1]
    state = list(state or [None] * vae._cached_conv_counts["encoder"])           # one per convolution
    x = patchify(x.transpose(1, 2).to(vae.dtype), vae.config.patch_size or 1)
    parts = [vae.encoder(part, feat_cache=state, feat_idx=[0])
             for part in x.split([1] * first + [4] * (x.shape[2] // 4), dim=2)]
    mean, std = common.latent_scale(vae, x.device)
    mode = vae.quant_conv(torch.cat(parts, dim=2)).chunk(2, dim=1)[0]
    return (mode.float() - mean) / std, state


def decode_next(vae, z, state=None):
    """The next latents B C F h w of a stream (state None: the first ones) -> float32 frames B T 3 H W in
    [-1, 1], equal to those of common.wan_decode for the whole video, and the new state."""
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
# batch    from vidar.collate(): latents B C F h w, text B L D, valid B F, arm B 1 F h w
# values   from draw_batch(): u B F-1 in [0, 1), the noise level of each latent frame before the shift; noise,
#          rollout_noise B C F h w; context B, in training; and, equal for all samples, use_self_forcing,
#          rollout_start and rollout_length in [0, 1)

def mix_noise(z, noise, sigma):
    """Noisy latents at levels sigma B F: z, noise B C F h w -> x B C F h w."""
    sigma = sigma[:, None, :, None, None]
    return (1 - sigma) * z + sigma * noise


class CausalModel(nn.Module):
    """The transformer and its losses in one module, so that DDP and FSDP wrap a single forward."""
    def __init__(self, dit, args):
        super().__init__()
        self.dit, self.args = dit, args

    def forward(self, batch, values):
        """-> loss, {name: term to log}; values["use_self_forcing"] selects the loss."""
        loss_fn = self.self_forced_loss if values["use_self_forcing"] else self.teacher_forced_loss
        return loss_fn(batch, values)

    def loss_at(self, v, batch, noise, frames):
        """Eq. 7 for the velocity of a slice of latent frames."""
        arm = batch["arm"][:, :, frames] if self.args.eta else None
        target = noise[:, :, frames] - batch["latents"][:, :, frames]
        return vidar.flow_loss(v, target, batch["valid"][:, frames], arm, self.args.eta)

    def teacher_forced_loss(self, batch, values):
        """Eq. 6 in one parallel pass: all latent frames but the first, each conditioned on its clean past."""
        z, noise = batch["latents"], values["noise"]
        F_ = z.shape[2]
        sigma = vidar.shift_sigma(values["u"], self.args.shift)
        past, level = z[:, :, :-1], torch.zeros_like(sigma)
        if "context" in values:                  # noise, as observed frames differ from training videos
            level = level + self.args.context_noise * values["context"][:, None]
            past = mix_noise(past, values["rollout_noise"][:, :, :-1], level)
        x = torch.cat([past, mix_noise(z[:, :, 1:], noise[:, :, 1:], sigma)], dim=2)
        t = torch.cat([1000 * level, 1000 * sigma], dim=1)
        positions = torch.arange(F_, device=z.device)
        positions = torch.cat([positions[:-1], positions[1:]])
        v = self.dit(x, t, batch["text"], teacher_plan(F_), positions)[:, :, F_ - 1:]
        return self.loss_at(v, batch, noise, slice(1, None))

    def self_forced_loss(self, batch, values):
        """Trains on the errors of the closed loop: after an observed past, 1 to n - 1 of the n latents
        of a chunk are generated without gradients; the loss is that of the next one."""
        z, text, args = batch["latents"], batch["text"], self.args
        chunk = args.chunk_size // 4
        start = 1 + chunk * int(values["rollout_start"] * ((z.shape[2] - 1) // chunk))
        target = start + 1 + int(values["rollout_length"] * (chunk - 1))
        cache = KVCache(target + 1)
        cache.append(self.dit, z[:, :, :start], text)
        list(generate_latents(self.dit, cache, values["rollout_noise"][:, :, start:target], text, args,
                              args.rollout_denoise_steps, keep_last=True))
        sigma = vidar.shift_sigma(values["u"][:, target - 1:target], args.shift)
        frames = slice(target, target + 1)
        x = mix_noise(z[:, :, frames], values["noise"][:, :, frames], sigma)
        v = self.dit(x, 1000 * sigma, text, cache=cache)
        return self.loss_at(v, batch, values["noise"], frames)


# ---- closed loop ----------------------------------------------------------------------------------------

class Policy:
    """The interface for a robot client: images and an instruction in, actions out. Call act() with the frames
    observed during the previous actions, at 10 fps and preferably a multiple of four."""
    def __init__(self, args, run, dit, idm, vae, encode_prompt):
        self.args, self.run, self.dit, self.idm, self.vae = args, run, dit, idm, vae
        self.encode_prompt = encode_prompt
        self.cache = KVCache(window_latents(args))
        self.reset()

    def reset(self, seed: int = 0):
        """Starts a new episode."""
        self.instruction, self.text = None, None
        self.encoder_state, self.decoder_state = None, None            # of the observed frames
        self.observed = []                                             # latest frames, for a new window
        self.num_observed_latents, self.cache.frames = 0, 0
        self.generator = torch.Generator().manual_seed(seed)

    def act(self, frames: np.ndarray, instruction: str, joints: np.ndarray | None = None) -> np.ndarray:
        """frames: all frames observed since the last call, at 10 fps: mosaics n H W 3 or one H W 3, uint8.
        joints (14,): the current joint positions, if known; actions are then corrected by the error of the
        IDM at the current frame -> actions (chunk_size, 14) float64, absolute joint positions in radians.

        A multiple of four frames continues the video. Any other number, such as one, starts a new window
        without the frames of earlier calls. Another instruction starts a new episode.
        Raises UserError for frames, joints or instructions of a wrong type or shape.
        """
        return np.concatenate(list(self.stream(frames, instruction, joints)))

    @torch.no_grad()
    def stream(self, frames, instruction, joints=None, latents=None, views=robot_data.VIEWS):
        """Like act(), but yields the actions (4, 14) of each latent frame as soon as it is denoised. The
        generated frames, 4 3 H W in [0, 1], are in `generated`. latents: how many (default: a chunk)."""
        frames, joints = self.check(frames, instruction, joints)
        count = latents or self.args.chunk_size // 4
        guidance = self.args.guidance_scale
        if instruction != self.instruction:
            self.reset(self.generator.initial_seed())
            self.instruction = instruction
            prompts = [robot_data.make_prompt(instruction, self.args.prompt_views, views), ""]
            text = [self.encode_prompt(prompt) for prompt in prompts[:1 if guidance == 1 else 2]]
            text = common.pad_text(text, self.args.text_length)
            with self.run.autocast():
                self.text = self.dit.text_kv(text.to(self.run.device))
        self.cache.pop(self.cache.frames - self.num_observed_latents)  # generated by the last call
        current = self.observe(frames, count)
        offset = 0.0 if joints is None else joints - self.predict_actions(current)[0]
        self.generated, decoder_state = [], self.decoder_state
        side = vidar.codec_side(self.args)
        noise = torch.randn(1, self.dit.config.in_channels, count, self.args.height // side,
                            self.args.width // side, generator=self.generator).to(self.run.device)
        latents = generate_latents(self.dit, self.cache, noise, self.text, self.args,
                                   self.args.num_inference_steps, guidance)
        for _ in range(count):
            with self.run.autocast():            # not around the yield, where it would affect the caller
                z = next(latents)
                video, decoder_state = decode_next(self.vae, z, decoder_state)
            self.generated.append((video[0].cpu() + 1) / 2)
            yield self.predict_actions(self.generated[-1]) + offset

    def check(self, frames, instruction, joints):
        """-> frames n H W 3, joints (14,) float64 or None. Raises UserError for other types and shapes."""
        size = (self.args.height, self.args.width, 3)
        frames = np.asarray(frames)
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.shape[1:] != size or not len(frames):
            raise UserError(f"frames are {frames.dtype} {frames.shape}, not uint8 (n, {size[0]}, {size[1]}, "
                            f"3): mosaics of the cameras at --height and --width")
        if not isinstance(instruction, str):
            raise UserError(f"the instruction is {type(instruction).__name__}, not str")
        if joints is None:
            return frames, None
        joints, count = np.asarray(joints), vidar.ACTION_DIM
        if joints.dtype.kind not in "iuf" or joints.shape != (count,) or not np.isfinite(joints).all():
            raise UserError(f"joints are {joints.shape} {joints.dtype}, not {count} finite numbers")
        return frames, joints.astype(np.float64)

    def observe(self, frames, count):
        """Adds observed frames to the cache, which keeps room for `count` latent frames -> the current frame,
        reconstructed by the codec, 1 3 H W in [0, 1]."""
        self.observed = [*self.observed, *frames][-4 * self.cache.capacity:]
        fits = self.num_observed_latents + len(frames) // 4 + count <= self.cache.capacity
        if self.encoder_state is None or len(frames) % 4 or not fits:
            # A new window of the last observed frames. After a gap, it starts within this call's frames.
            self.encoder_state, self.decoder_state, self.cache.frames = None, None, 0
            if len(frames) % 4:
                self.observed = list(frames)
            past = min((self.cache.capacity - 1 - count) // 2, (len(self.observed) - 1) // 4)
            frames = self.observed[-4 * past - 1:]
        video = from_uint8(torch.from_numpy(np.stack(frames)).movedim(-1, 1))[None].to(self.run.device)
        z, self.encoder_state = encode_next(self.vae, video, self.encoder_state)
        with self.run.autocast():
            self.cache.append(self.dit, repeat_for_guidance(z, self.args.guidance_scale), self.text)
        self.num_observed_latents = self.cache.frames
        video, self.decoder_state = decode_next(self.vae, z, self.decoder_state)
        return (video[0, -1:].cpu() + 1) / 2

    def predict_actions(self, frames):
        """n 3 H W in [0, 1] -> (n, 14) float64."""
        return vidar.predict_actions(self.idm, frames, self.run.device)[0].double().numpy()


def load_policy(folder: str, device: str = "auto") -> Policy:
    """The policy of a run, from args.json and final/ in its folder. Raises UserError if they are missing."""
    final = Path(folder) / "final"
    if not (final / "vidarc.safetensors").is_file():
        raise UserError(f"{folder} has no trained policy (final/vidarc.safetensors): train with python "
                        f"{SCRIPT}.py --output_dir {folder}")
    flags = common.read_json(Path(folder) / "args.json")   # flags that the run lacks get their defaults
    args = argparse.Namespace(**{**vars(build_parser().parse_args([])), **flags})
    args.device, args.fsdp = device, False
    args.vidar, args.random_init = str(final / "vidarc.safetensors"), False
    return make_policy(args, vidar.setup(args), load_dit(args), final)


def load_dit(args, device="cpu"):
    """CausalWan in fp32, with the weights of --vidar, or random ones with --random_init."""
    flags = argparse.Namespace(**{**vars(args), "vidar": None if args.random_init else args.vidar})
    return CausalWan.of(vidar.load_transformer(flags, device))


def make_policy(args, run, dit, final):
    """Policy of a transformer and of the IDM and the codec in the folder `final`."""
    dit = dit.to(run.device).eval().requires_grad_(False)
    idm = vidar.load_idm(final / "idm.pt", vidar.idm_config(args)).to(run.device)
    return Policy(args, run, dit, idm, vidar.load_codec(args, final, run.device),
                  vidar.text_encoder(args, run.device))


def run_episode(policy, seed, moved, closed, film=None):
    """Acts in a simulated world -> success, final distance of the block from the plate. closed: plan again
    from the observed frames after every chunk; otherwise one plan for a whole window, then no motion. moved:
    displace the block. film: closed loop only, a list for (observed, generated) frames 3 H W in [0, 1]."""
    args = policy.args
    world = ArmWorld(seed, (args.height, args.width), moved=MOVED_AT if moved else None)
    policy.reset(seed + args.seed)
    frames, step = [world.observe()], 0
    while step < HORIZON and not world.success:
        latents = None if closed else policy.cache.capacity - 1
        plan = list(policy.stream(np.stack(frames), world.instruction, world.state, latents))
        actions, generated, frames = np.concatenate(plan), torch.cat(policy.generated), []
        padding = 0 if closed else max(0, HORIZON - len(actions))
        for i, action in enumerate([*actions, *[actions[-1]] * padding]):
            world.step(action)
            step += 1
            if closed:                           # rendering costs more than the step
                frames.append(world.observe())
            if film is not None:
                film.append((torch.from_numpy(frames[-1]).movedim(-1, 0) / 255, generated[i]))
    return float(world.success), world.distance()


# ---- evaluate and sample --------------------------------------------------------------------------------

def forecast(policy, window, episode, seed, observed_past):
    """Predicts a held-out window: chunk by chunk after observed frames, or at once after the first frame
    -> frames T' 3 H W in [0, 1], actions (T' - 1, 14), seconds to the first action and for each chunk."""
    video, joints = window[0], window[1].double().numpy()
    frames = (video * 255).round().to(torch.uint8).movedim(1, -1).numpy()
    policy.reset(seed)
    chunk = policy.args.chunk_size
    generated, actions, seconds = [video[:1]], [], []
    latents = None if observed_past else policy.cache.capacity - 1
    for start in range(0, len(video) - chunk, chunk) if observed_past else [0]:
        began = time.perf_counter()
        observed = frames[max(0, start - chunk + 1):start + 1]
        for part in policy.stream(observed, episode.instruction, joints[start], latents, episode.views):
            actions.append(part)
            seconds.append(time.perf_counter() - began)
        generated += policy.generated
    step = chunk // 4
    return torch.cat(generated), np.concatenate(actions), seconds[::step], seconds[step - 1::step]


@torch.no_grad()
def time_bidirectional(policy):
    """Seconds of stage 1's bidirectional sampling of a window: all latent frames at once, in 20 steps."""
    args, side = policy.args, vidar.codec_side(policy.args)
    noise = torch.zeros(1, policy.dit.config.in_channels, policy.cache.capacity, args.height // side,
                        args.width // side, device=policy.run.device)

    def velocity(x, t):
        x = repeat_for_guidance(x, args.guidance_scale)
        return policy.dit(x, x.new_full((len(x), x.shape[2]), t), policy.text)[:1]

    began = time.perf_counter()
    with policy.run.autocast():
        denoise(velocity, noise, args, vidar.build_parser().get_default("num_inference_steps")).cpu()
    return time.perf_counter() - began


def world_count(args):
    """Number of simulated worlds to evaluate in: 0 unless the data set is simulated."""
    return args.worlds if "simulated" in robot_data.read_manifest(args.data_dir) else 0


def evaluate(args, run, policy, splits):
    """Evaluates held-out episodes, worlds in closed and open loop, and latency -> [eval.json, curves.png]."""
    began = time.time()
    videos, actions, worlds, clips, seconds = {}, {}, {}, {}, {"first_action": [], "chunk": []}
    episodes = list(enumerate(robot_data.tasks(splits["test"])[:args.eval_clips or None]))
    for number, episode in episodes[run.rank::run.world]:
        window = robot_data.load_window(episode, args.frames, (args.height, args.width))
        truth, target, valid, arm = window
        methods = {"persistence": (truth[:1].expand_as(truth), target[:1].expand_as(target)[1:].numpy())}
        for method, observed_past in (("model", True), ("generated past", False)):
            *methods[method], first_action, chunk = forecast(policy, window, episode, number, observed_past)
            if observed_past:
                seconds["first_action"] += first_action
                seconds["chunk"] += chunk
        for method, (video, predicted) in methods.items():
            T = len(video)
            scores = vidar.video_scores(video, truth[:T], None if arm is None else arm[:T], valid[:T])
            videos.setdefault(method, []).append(scores)
            if method == "model" and not world_count(args):
                clips[episode.folder.name] = scores.get("psnr_arm", scores["psnr"]).nanmean(1).tolist()
            pair = torch.from_numpy(predicted)[valid[1:T]], target[1:T].double()[valid[1:T]]
            actions.setdefault(method, []).append(pair)
    for number in range(run.rank, world_count(args), run.world):
        for closed in (True, False):
            row = {}
            for kind in ("static", "moved"):
                scores = run_episode(policy, FIRST_WORLD + number, kind == "moved", closed)
                row[f"success_{kind}"], row[f"distance_{kind}"] = scores
            worlds.setdefault("model" if closed else "open loop", []).append(row)
            if closed:
                clips[f"world_{number}"] = [row["success_moved"] - row["distance_moved"]]
    tables = [common.gather_rows(table) for table in (videos, actions, worlds, clips, seconds)]
    return [] if run.rank else report(args, policy, *tables, began)


def report(args, policy, videos, actions, worlds, clips, seconds, began):
    """Averages the scores of evaluate(), writes eval.json and curves.png, prints the table."""
    scores = {method: common.horizon_means(tables) for method, tables in videos.items()}
    for method, rows in actions.items():
        values = vidar.idm_scores(*(torch.cat(column) for column in zip(*rows)))
        scores[method].update({f"action_{name}": value for name, value in values.items()})
    for method, rows in worlds.items():
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        scores.setdefault(method, {}).update(means)
    results = scores.pop("model")
    results |= {f"seconds_{name}_p50": float(np.median(values)) for name, values in seconds.items()}
    results["seconds_bidirectional"] = time_bidirectional(policy)
    metric = "psnr_arm" if "psnr_arm" in results else "psnr"
    headline = ("success_moved", "open loop", False) if worlds else (metric, "persistence", False)
    columns = ["success_static", "success_moved", "distance_static", "distance_moved", "psnr_arm", "ssim",
               "action_r2"]
    print(", ".join(f"{name} {value:.3f}" for name, value in results.items() if name.startswith("seconds")))
    return common.report(SCRIPT, args, str(args.vidar), began, headline, results, scores,
                         [name for name in columns if name in results],
                         {name: score for name, (score,) in clips.items()},
                         [name for name in ("psnr_arm", "psnr") if name in results])


def sample(args, run, policy, splits):
    """Writes the best, median and worst world with a displaced block, or episode -> [samples/...]."""
    episodes, files = robot_data.tasks(splits["test"]), []
    worlds = [f"world_{n}" for n in range(world_count(args))]
    names = worlds or [episode.folder.name for episode in episodes]
    cases = common.pick_cases(args.output_dir, names, args.num_samples) if run.rank == 0 else {}
    for case, number in cases.items():
        if worlds:
            film = []
            run_episode(policy, FIRST_WORLD + number, True, True, film)
            observed, generated = (torch.stack(column) for column in zip(*film))
        else:
            window = robot_data.load_window(episodes[number], args.frames, (args.height, args.width))
            generated = forecast(policy, window, episodes[number], number + args.seed, True)[0][1:]
            observed = window[0][1:len(generated) + 1]
        rows = {"ground truth": observed * 2 - 1, "prediction": generated * 2 - 1}
        rows["error"] = common.error_picture(*rows.values())
        labels = [f"frame {n + 1}\nt+{n % args.chunk_size + 1}" for n in range(len(observed))]
        stem, scale = f"{args.output_dir}/samples/{case}_{names[number]}", max(1, 224 // args.height)
        files += common.write_panels(stem, {"": rows}, 0, vidar.FPS, scale, labels)
    return files


# ---- train ----------------------------------------------------------------------------------------------

def draw_batch(args, run, windows, step, micro, grad_accum):
    """-> batch, values for CausalModel.forward. The choice of the loss and the rollout's position are equal
    for all samples of a step: FSDP needs the same calls on all processes."""
    spec = {"window": ("randint", len(windows.rows)), "u": ("rand", (args.frames - 1) // 4),
            "context": ("rand",), "drop": ("rand",), "noise": ("randint", 2 ** 62),
            "rollout_noise": ("randint", 2 ** 62)}
    values, seed = vidar.sample_numbers(args, run, spec, 1, step, micro, grad_accum, args.batch_size)
    unconditional = (values["drop"] < args.cfg_drop).nonzero().flatten().tolist()
    batch = vidar.collate(windows, values["window"].tolist(), args, run.device, unconditional)
    for name in ("noise", "rollout_noise"):
        values[name] = vidar.noise_like(batch["latents"], values[name])
    uniform, start, length = torch.rand(3, generator=torch.Generator().manual_seed(seed + 1)).tolist()
    use_self_forcing = step >= args.self_forcing_after and uniform < args.self_forcing
    values |= {name: values[name].to(run.device) for name in ("u", "context")}
    return batch, {**values, "use_self_forcing": use_self_forcing,
                   "rollout_start": start, "rollout_length": length}


def train(args, run, checkpoint, splits):
    """Trains stage 2 from --vidar's weights, writes vidarc.pt and the files of load_policy() to final/."""
    folder = vidar.cache_folder(args, splits)
    idm = vidar.load_idm(args.idm, vidar.idm_config(args)).to(run.device)
    vidar.build_cache(args, run, splits, folder, ["windows"], idm)
    windows = {split: vidar.Cache(sorted(folder.glob(f"{split}_*.windows"))) for split in ("train", "val")}
    final = Path(args.output_dir, "final")
    if run.rank == 0:
        common.write_json(Path(args.output_dir, "args.json"), {**vars(args), **common.provenance()})
    model = CausalModel(load_dit(args, run.device).requires_grad_(True), args)

    def loss_fn(net, step, micro, grad_accum):
        return net(*draw_batch(args, run, windows["train"], step, micro, grad_accum))

    def val_fn(net):                             # teacher-forced, at u = 0.5
        indices = vidar.evenly_spaced(len(windows["val"].rows), 8)
        batch = vidar.collate(windows["val"], indices, args, run.device)
        u = torch.full((len(indices), batch["latents"].shape[2] - 1), .5, device=run.device)
        values = {"use_self_forcing": False, "u": u, "noise": vidar.noise_like(batch["latents"], indices)}
        return {"val_loss": net(batch, values)[1]["flow_loss"].item()}

    stage = argparse.Namespace(folder=".", steps=args.max_steps, lr=args.lr, warmup_steps=args.warmup_steps,
                               weight_decay=args.weight_decay, ema_decay=args.ema_decay,
                               batch_size=args.batch_size)
    finished = vidar.is_finished(stage, checkpoint) and (final / "vidarc.safetensors").is_file()
    if run.rank == 0 and not finished:           # --eval needs IDM and codec before the last step, too
        final.mkdir(exist_ok=True)
        shutil.copy(args.idm, final / "idm.pt")
        if args.model == "tiny":
            shutil.copy(folder / "codec.safetensors", final)
    net = vidar.train(args, run, SCRIPT, stage, model, loss_fn, val_fn, checkpoint)
    if not finished:
        vidar.save_transformer(args, run, final / SCRIPT, net)
    common.barrier()


def dry_run(args):
    """Prints parameters, FLOPs and memory of a teacher-forced step, on the meta device, and cache size."""
    flags = argparse.Namespace(**{**vars(args), "random_init": True})
    with torch.device("meta"):
        model = CausalModel(load_dit(flags, "meta"), args).train()
        if args.grad_checkpoint:
            model.dit.enable_gradient_checkpointing()
        config, batch = model.dit.config, vidar.example_batch(args, model.dit.config)
        z = batch["latents"]
        values = {"use_self_forcing": False, "noise": z, "u": torch.rand(len(z), z.shape[2] - 1)}

        def loss():
            with torch.autocast("cpu", torch.bfloat16, enabled=args.model != "tiny"):
                return model(batch, values)[0]

        tokens, world = z[0, 0].numel() // 4, int(os.environ.get("WORLD_SIZE", 1))
        print(common.dry_run_report("causal model", model, loss, len(z), 2 * tokens, world, args.fsdp))
    width = config.num_attention_heads * config.attention_head_dim
    frame = 2 * config.num_layers * width * (tokens // z.shape[2]) * (4 if args.model == "tiny" else 2)
    window = frame * window_latents(args) * (1 if args.guidance_scale == 1 else 2)
    print(f"  KV cache: {frame / 2 ** 20:.1f} MiB per latent frame, {window / 2 ** 30:.2f} GiB per window")


# ---- main -----------------------------------------------------------------------------------------------

def require_stage1(args):
    """Checks --vidar and --idm. Trains stage 1 with vidar.py if they are missing and of its tiny preset."""
    for name in ("vidar", "idm"):
        path = getattr(args, name)
        if not path or not Path(path).is_file():
            if path != PRESETS["tiny"][name] or args.model != "tiny":
                raise UserError(f"--{name}: no file {path}: hf download Xiang-cd/vidar --local-dir "
                                f"checkpoints/vidar, or train it with python vidar.py")
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise UserError("stage 1 trains in one process: run python vidar.py --preset tiny first")
            flags = ["--preset", "tiny", "--data_dir", args.data_dir, "--device", args.device,
                     "--dtype", args.dtype]
            print(f"no {path}: training stage 1: python vidar.py {' '.join(flags)}", flush=True)
            if vidar.main(flags):
                raise UserError("stage 1 failed")


def run_script(argv):
    args, checkpoint, why_preset = parse_args(argv)
    if args.dry_run:
        return dry_run(args)
    if args.serve:
        policy = load_policy(args.output_dir, args.device)
        print(f"serving {args.output_dir} on port {args.serve}", flush=True)
        with make_server(policy, args.serve) as server:
            return server.serve_forever()
    run, inference_only = vidar.setup(args), args.sample or args.eval
    common.announce(SCRIPT, args, why_preset, run, checkpoint)
    common.simulate_missing_data("vidar", args.data_dir, default=PRESETS["tiny"]["data_dir"])
    splits = robot_data.load_splits(args.data_dir)
    if not (inference_only and checkpoint):
        if not args.random_init:
            require_stage1(args)
            vidar.check_weights(args)
        train(args, run, checkpoint, splits)
    path = checkpoint.path if inference_only and checkpoint else common.latest_checkpoint(
        Path(args.output_dir, "ckpt"))
    dit = load_dit(argparse.Namespace(**{**vars(args), "random_init": True}))
    weights = {name.removeprefix("dit."): value
               for name, value in common.load_weights(path / "ema.safetensors").items()}
    dit = common.load_for_inference(dit, weights, path)
    policy = make_policy(args, run, dit, common.run_folder(path) / "final")
    files = evaluate(args, run, policy, splits) if common.wants_evaluation(args) else []
    if args.sample or not inference_only:
        files += sample(args, run, policy, splits)
    if run.rank == 0:
        common.show_results(args.output_dir, files, args.tensorboard, args.wandb)
    common.shutdown()


def main(argv=None):
    return common.one_line_errors(f"{SCRIPT}.py", lambda: run_script(argv))


if __name__ == "__main__":
    sys.exit(main())
