"""cosmos_lite.py: a small video world model that learns physics: encode, predict latents, decode.

Paper       A small world model in the sense of Cosmos (NVIDIA 2025, arXiv:2501.03575).
Equations   z_t = E(x_t), a latent for tau frames                         -> Encoder, Backbone
            z_{t+1} = z_t + f(h_t), h_t = GRU(z_t, h_{t-1}), or LSTM      -> RecurrentDynamics
            z_{t+1} = z_t + f(z_{<=t}), by causal attention               -> Transformer
            x_t = background - 2 D(z_t)                                   -> Decoder, VideoWorldModel
            reconstruction + one-step + rollout + perceptual + temporal   -> world_model_loss, rollout_plan
            MSE, PSNR, SSIM per horizon; positions of objects             -> evaluate, object_scores
Run         python cosmos_lite.py                         # simulate, train, evaluate: 4 to 8 min, 2 CPU cores
            python cosmos_lite.py --sample --num_predict 60 --video_idx 5              # 15 s
            python cosmos_lite.py --max_steps 4000        # resume and train longer
            torchrun --nproc_per_node=8 cosmos_lite.py --preset best --data_dir data/split
Data        data/cosmos_lite/prepare.py simulates videos or decodes your own; Clips documents the layout.
Shapes      B batch  T frames  D latent channels  H W pixels (64 64)  h w latent grid (16 16, 8 8, or 1 1
            for a vector)  n objects. Videos are B T 3 H W in [-1, 1], latents B T/tau D h w.
"""
import argparse
import functools
import itertools
import json
import math
import os
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
from common import UserError, at_least, between, expand_to, from_uint8

SCRIPT = "cosmos_lite"
SIZE = 64        # height and width; other sizes need --encoder cnn, --latent grid and prepare.py --raw
AUGMENTATION = {"flip": ("rand",), "contrast": ("rand",), "order": ("randint", 6)}     # per clip

# ---- presets and flags ----------------------------------------------------------------------------------

PRESETS = {
    "tiny": dict(data_dir=f"data/{SCRIPT}/dataset", latent_dim=48, max_steps=1500, batch_size=8, lr=3e-3,
                 warmup_steps=50, weight_decay=1e-3, ema_decay=0.99, perceptual_weight=0.0, brightness=0.0,
                 permute_colors=True, rollout=20, eval_every=300, save_every=300),
    # The reference project's options B (transformer) and A (one vector per frame), 100 epochs each.
    "best": dict(data_dir="data/split", encoder="dinov2_vits14", world_model="transformer", latent_dim=128,
                 num_layers=6, context=30, rollout=30, batch_size=8, max_steps=5100, weight_decay=1e-5,
                 eval_every=51),
    "quick": dict(data_dir="data/split", latent="vector", latent_dim=256, tau=1, context=30, rollout=30,
                  batch_size=4, max_steps=10_200, weight_decay=1e-5, perceptual_weight=0.0, eval_every=102),
}
# These flags determine the architecture or what it computes: a checkpoint's values apply.
MODEL_FLAGS = ("encoder", "world_model", "decoder", "latent", "latent_dim", "hidden_dim", "num_layers",
               "window", "tau", "context")


def build_parser():
    parser = common.Parser(SCRIPT, PRESETS, __doc__.split("\n")[0], fsdp=False)
    add = parser.add_argument_group("data").add_argument
    add("--T_in", type=at_least(1), default=30, help="observed frames")
    add("--T_out", type=at_least(1), default=30, help="frames to predict in training and evaluation")
    add("--stride", type=at_least(1), default=5, help="frames between two training clips of a video")
    add("--brightness", type=between(0, 1), default=0.2, help="largest relative change of contrast")
    add("--permute_colors", action="store_true", help="permute the colour channels of training clips")
    add = parser.add_argument_group("model").add_argument
    add("--encoder", choices=["cnn", *PRETRAINED], default="cnn", help="cnn, or a pretrained backbone")
    add("--encoder_weights", metavar="SOURCE", help="folder or hub id of pretrained encoder weights")
    add("--freeze_encoder", action="store_true", help="do not train the pretrained encoder")
    add("--world_model", choices=["gru", "lstm", "transformer"], default="gru", help="latent dynamics")
    add("--decoder", choices=["auto", "simple", "enhanced"], default="auto", help="auto: simple with cnn")
    add("--latent", choices=["grid", "vector"], default="grid", help="shape of a latent")
    add("--latent_dim", type=at_least(8), default=64, help="channels D of a latent")
    add("--hidden_dim", type=at_least(1), default=512, help="hidden size of GRU and LSTM on vectors")
    add("--num_layers", type=at_least(1), default=2, help="layers of the latent dynamics")
    add("--window", type=at_least(1), default=32, help="latents that the transformer attends to")
    add("--tau", type=at_least(1), default=2, help="frames per latent")
    add = parser.add_argument_group("loss").add_argument
    add("--context", type=at_least(1), default=10, help="maximum number of context frames")
    add("--rollout", type=at_least(1), default=16, help="frames of the longest training rollout")
    add("--recon_type", choices=["mse", "l1"], default="mse", help="pixel loss")
    add("--perceptual_weight", type=at_least(0, float), default=0.1, help="weight of the VGG16 loss (0: off)")
    add("--temporal_weight", type=at_least(0, float), default=0.01, help="weight of the motion loss")
    add("--vgg_weights", default="https://download.pytorch.org/models/vgg16-397923af.pth", help="URL or file")
    add = parser.add_argument_group("sampling and evaluation").add_argument
    add("--num_predict", type=at_least(1), default=30, help="frames of the rollout that --sample writes")
    add("--video_idx", type=at_least(-1), default=-1, help="test video of --sample (-1: best, median, worst)")
    add("--eval_clips", type=at_least(0), default=0, help="maximum number of test videos (0: all)")
    add("--best", action="store_true", help="use the weights of the lowest validation loss")
    return parser


def parse_args(argv=None):
    """-> flags, checkpoint or None, the reason for the preset."""
    args, checkpoint, why_preset = common.parse_args(
        build_parser(), argv, MODEL_FLAGS, data="{data_dir}/split.json", weights="facebook/dinov2-small",
        get_data=f"python data/{SCRIPT}/prepare.py --data_dir data/split")
    if args.T_in + args.T_out < 2 * args.tau:
        raise UserError(f"--T_in and --T_out are too short for two latents of --tau {args.tau} frames")
    if args.encoder == "cnn" and (args.encoder_weights or args.freeze_encoder):
        raise UserError("--encoder_weights and --freeze_encoder need a pretrained encoder, not --encoder cnn")
    return args, checkpoint, why_preset


# ---- model: encoder -------------------------------------------------------------------------------------

class ResBlock(nn.Module):
    """x + conv2(SiLU(conv1(norm(x)))), where conv2 is 1x1 and zero at initialisation."""
    def __init__(self, channels, kernel=3):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.conv1 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


def normalize(x):
    """Frames N 3 H W in [-1, 1] -> the same, normalised with ImageNet's mean and standard deviation."""
    mean, std = x.new_tensor([[.485, .456, .406], [.229, .224, .225]])[..., None, None]
    return ((x + 1) / 2 - mean) / std


# name -> hub id, model type, options of its configuration. Both types return 8x8 features: the third stage of
# a ResNet on 128x128 pixels, the last layer of DINOv2 on 112x112 pixels.
PRETRAINED = {
    f"resnet{depth}": (f"microsoft/resnet-{depth}", "resnet", dict(
        depths=[3, 4, blocks], hidden_sizes=[256, 512, 1024], out_features=["stage3"]))
    for depth, blocks in ((50, 6), (101, 23))}
for letter, name, width, depth in (("s", "small", 384, 12), ("b", "base", 768, 12), ("l", "large", 1024, 24),
                                   ("g", "giant", 1536, 40)):
    PRETRAINED[f"dinov2_vit{letter}14"] = f"facebook/dinov2-{name}", "dinov2", dict(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, image_size=518,
        patch_size=14, use_swiglu_ffn=letter == "g", out_features=[f"stage{depth}"])


class Backbone(nn.Module):
    """A pretrained encoder: frames B T 3 64 64 in [-1, 1] -> features B T C 8 8."""
    def __init__(self, args, load):
        super().__init__()
        from transformers import AutoBackbone, AutoConfig  # slow import
        repository, kind, options = PRETRAINED[args.encoder]
        config = AutoConfig.for_model(kind, **options)
        self.net = AutoBackbone.from_config(config)
        self.side, self.frozen = 128 if kind == "resnet" else 112, args.freeze_encoder
        if load:                         # AutoBackbone.from_pretrained asks the hub even for a folder
            source = args.encoder_weights or repository
            try:
                loader = type(self.net).from_pretrained
                self.net, info = loader(source, config=config, output_loading_info=True)
                assert not info["missing_keys"]
            except Exception as error:   # offline, not cached, damaged: transformers raises many types
                raise UserError(f"cannot load --encoder {args.encoder} from {source}: hf download "
                                f"{repository}, or --encoder_weights FOLDER") from error
        if kind == "dinov2":
            self.net.embeddings.mask_token.requires_grad_(False)       # unused outside of pretraining
        if self.frozen:
            self.net.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:                  # keeps the batch norms' running statistics fixed
            self.net.eval()
        return self

    def forward(self, frames):
        x = F.interpolate(normalize(frames.flatten(0, 1)), (self.side, self.side), mode="bilinear")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.net(x).feature_maps[-1].unflatten(0, frames.shape[:2])


class Encoder(nn.Module):
    """Frames and their differences from the background, both B T 3 64 64 -> latents B T/tau D h w.

    A cell encodes a 4x4 patch in tau frames and in the frame before them, so that latents hold velocities.
    Pretrained encoders have 8x8 patches with features. A vector comes from strided convolutions of the grid.
    """
    def __init__(self, args, load=False):
        super().__init__()
        D, self.tau = args.latent_dim, args.tau
        width = D if args.latent == "grid" else 128
        self.backbone = None if args.encoder == "cnn" else Backbone(args, load)
        self.patch = 8 if self.backbone else 4
        features = 3 * self.patch ** 2 + (self.backbone.net.channels[-1] if self.backbone else 0)
        side = SIZE // self.patch
        features = (self.tau + 1) * features
        self.project = nn.Sequential(nn.Conv2d(features, 128, 1), nn.SiLU(), nn.Conv2d(128, width, 1))
        self.position = nn.Parameter(0.02 * torch.randn(width, side, side))
        self.blocks = nn.Sequential(ResBlock(width), ResBlock(width))
        if args.latent == "vector":
            while side > 4:
                self.blocks.extend([nn.Conv2d(width, 2 * width, 4, 2, 1), ResBlock(2 * width)])
                width, side = 2 * width, side // 2
            self.blocks.append(nn.Conv2d(width, D, 4))

    def forward(self, frames, difference):
        x = F.pixel_unshuffle(difference, self.patch)                  # B T 3*patch^2 side side
        if self.backbone:
            x = torch.cat([x, self.backbone(frames)], dim=2)
        x = torch.cat([x[:, :1], x], dim=1).unfold(1, self.tau + 1, self.tau)      # B T/tau ... tau+1
        x = x.movedim(-1, 2).flatten(2, 3)
        z = self.project(x.flatten(0, 1).contiguous(memory_format=torch.channels_last)) + self.position
        return self.blocks(z).unflatten(0, x.shape[:2])


# ---- model: latent dynamics -----------------------------------------------------------------------------
# forward(z, state=None): latents B T D h w and the state before them -> predictions of the next latents,
# B T D h w, and the state after the last latent. A rollout feeds predictions back, one at a time.

class RecurrentDynamics(nn.Module):
    """Convolutional GRU or LSTM: 1x1 gates, a candidate with `kernel`, then residual blocks.
    With kernel 1 on a 1x1 grid it is an ordinary GRU or LSTM."""
    def __init__(self, kind, D, hidden, layers, kernel):
        super().__init__()
        self.lstm, self.hidden = kind == "lstm", hidden
        self.gates = nn.Conv2d(D + hidden, (3 if self.lstm else 2) * hidden, 1)
        self.candidate_z = nn.Conv2d(D, hidden, 1, bias=False)
        self.candidate_h = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2)
        self.blocks = nn.Sequential(*[ResBlock(hidden, kernel) for _ in range(layers)])
        self.out = nn.Conv2d(hidden, D, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, z, state=None):
        state = state or [z.new_zeros(len(z), self.hidden, *z.shape[3:])] * 2
        predictions = []
        for z_t in z.unbind(1):
            z_t = z_t.contiguous(memory_format=torch.channels_last)
            state = self.cell(z_t, *state)
            predictions.append(z_t + self.out(self.blocks(state[0])))
        return torch.stack(predictions, dim=1), state

    def cell(self, z, h, c):
        gates = torch.sigmoid(self.gates(torch.cat([z, h], dim=1)))
        if self.lstm:
            forget, update, output = gates.chunk(3, dim=1)
            c = forget * c + update * torch.tanh(self.candidate_z(z) + self.candidate_h(h))
            return output * torch.tanh(c), c
        reset, update = gates.chunk(2, dim=1)
        candidate = torch.tanh(self.candidate_z(z) + self.candidate_h(reset * h))
        return h + update * (candidate - h), c


class CausalBlock(nn.Module):
    """Causal attention over time within each cell (learned bias per head and distance), then a convolution.
    On a 1x1 grid with kernel 1 this is an ordinary causal transformer block."""
    def __init__(self, D, window, kernel):
        super().__init__()
        self.heads = math.gcd(D, max(1, D // 32))                   # divides D
        self.window = window
        width = 2 * D if kernel > 1 else 4 * D
        self.norm1, self.norm2 = nn.GroupNorm(1, D), nn.GroupNorm(1, D)
        self.qkv, self.out = nn.Conv2d(D, 3 * D, 1), nn.Conv2d(D, D, 1)
        self.bias = nn.Parameter(torch.zeros(self.heads, window))
        self.up = nn.Conv2d(D, width, kernel, padding=kernel // 2)
        self.down = nn.Conv2d(width, D, 1)
        for layer in (self.out, self.down):
            nn.init.zeros_(layer.weight)

    def forward(self, x, past=None):
        """x B T D h w; past: cached keys and values, each B hw heads T' D/heads -> x, new past."""
        B, T, D, h, w = x.shape
        y = self.qkv(self.norm1(x.flatten(0, 1))).view(B, T, 3, self.heads, D // self.heads, h * w)
        q, k, v = y.permute(2, 0, 5, 3, 1, 4).contiguous()         # else matmuls are not batched
        if past is not None:
            k = torch.cat([past[0], k], dim=3)
            v = torch.cat([past[1], v], dim=3)
        length = k.shape[3]
        position = torch.arange(length, device=x.device)
        age = position[length - T:, None] - position
        bias = self.bias[:, age.clamp(0, self.window - 1)]
        bias = bias.masked_fill((age < 0) | (age >= self.window), -math.inf)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))    # B hw heads T D/heads
        y = y.permute(0, 3, 2, 4, 1).reshape(B * T, D, h, w)
        x = x.flatten(0, 1) + self.out(y)
        x = x + self.down(F.silu(self.up(self.norm2(x))))
        first = max(0, length - self.window + 1)                   # the next latent attends from here
        return x.unflatten(0, (B, T)), (k[..., first:, :], v[..., first:, :])


class Transformer(nn.Module):
    """Causal blocks; `state` is the cache of keys and values of previous latents, per block."""
    def __init__(self, D, layers, window, kernel):
        super().__init__()
        self.blocks = nn.ModuleList(CausalBlock(D, window, kernel) for _ in range(layers))
        self.norm = nn.GroupNorm(1, D)
        self.out = nn.Conv2d(D, D, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, z, state=None):
        x, cache = z, []
        for block, past in zip(self.blocks, state or [None] * len(self.blocks)):
            x, past = block(x, past)
            cache.append(past)
        return z + self.out(self.norm(x.flatten(0, 1))).view_as(z), cache


# ---- model: decoder and world model ---------------------------------------------------------------------

class SelfAttention(nn.Module):
    """Single-head self-attention over the cells of a map, with a residual weight of 0 at initialisation."""
    def __init__(self, channels):
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 1, batch_first=True)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        y = x.flatten(2).transpose(1, 2)
        return x + self.gamma * self.attention(y, y, y, need_weights=False)[0].transpose(1, 2).view_as(x)


class Decoder(nn.Sequential):
    """Latents N D h w -> N 3*tau 64 64. Enhanced: more blocks, and attention at 8x8 and 16x16."""
    def __init__(self, args):
        width = args.latent_dim
        enhanced = args.decoder == "enhanced" or args.decoder == "auto" and args.encoder != "cnn"
        layers = []
        if args.latent == "vector":      # to a grid of 8x8
            layers += [nn.ConvTranspose2d(width, 512, 4), ResBlock(512), nn.Conv2d(512, 4 * 128, 1),
                       nn.PixelShuffle(2), ResBlock(128)]
            width = 128
        if args.latent == "vector" or args.encoder != "cnn":
            layers += [ResBlock(width), SelfAttention(width)] if enhanced else []
            layers += [nn.Conv2d(width, 4 * width, 1), nn.PixelShuffle(2)]
        layers += [ResBlock(width), SelfAttention(width)] if enhanced else []
        to_pixels = nn.Conv2d(128, 48 * args.tau, 1)
        nn.init.zeros_(to_pixels.weight)
        nn.init.zeros_(to_pixels.bias)
        super().__init__(*layers, ResBlock(width), nn.GroupNorm(1, width), nn.Conv2d(width, 128, 1),
                         nn.SiLU(), to_pixels, nn.PixelShuffle(4))


class VideoWorldModel(nn.Module):
    """Predicts the frames that follow context frames. load: load the pretrained encoder's weights."""
    def __init__(self, args, load: bool = False):
        super().__init__()
        D, self.tau = args.latent_dim, args.tau
        kernel, hidden = (3, D) if args.latent == "grid" else (1, args.hidden_dim)
        self.context = max(1, args.context // args.tau)                # latents
        self.encoder = Encoder(args, load)
        if args.world_model == "transformer":
            self.dynamics = Transformer(D, args.num_layers, args.window, kernel)
        else:
            self.dynamics = RecurrentDynamics(args.world_model, D, hidden, args.num_layers, kernel)
        self.decoder = Decoder(args)
        self.register_buffer("background", torch.ones(3, SIZE, SIZE))  # median of the training frames

    def encode(self, x):
        """B T 3 H W, T a multiple of tau -> B T/tau D h w."""
        return self.encoder(x, (self.background - x) / 2)

    def decode(self, z):
        """B t D h w -> B t*tau 3 H W. An untrained decoder shows the background."""
        z_flat = z.flatten(0, 1).contiguous(memory_format=torch.channels_last)     # 1.4x faster on CPU
        return self.background - 2 * self.decoder(z_flat).reshape(len(z), -1, 3, SIZE, SIZE)

    def rollout(self, z, state, n):
        """z B 1 D h w, a predicted latent, and the state after its context -> n predictions B n D h w."""
        latents = [z]
        for _ in range(n - 1):
            z, state = self.dynamics(z, state)
            latents.append(z)
        return torch.cat(latents, dim=1)

    def forward(self, context_frames: torch.Tensor, num_predictions: int = 30, objective=None
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """context_frames B T 3 64 64 in [-1, 1] -> the n frames that follow, B n 3 64 64, their latents
        B ceil(n/tau) D h w, and the latents of the context, at most as many as in training. With
        `objective` it returns objective(model, frames), since DDP only synchronises calls of forward."""
        if objective:
            return objective(self, context_frames)
        T = context_frames.shape[1]
        x = context_frames[:, -min(self.context, max(1, T // self.tau)) * self.tau:]
        if T < self.tau:                 # repeat the first frame
            x = torch.cat([x[:, :1].expand(-1, self.tau - T, -1, -1, -1), x], dim=1)
        context_latents = self.encode(x)
        predictions, state = self.dynamics(context_latents)
        latents = self.rollout(predictions[:, -1:], state, math.ceil(num_predictions / self.tau))
        return self.decode(latents)[:, :num_predictions].clamp(-1, 1), latents, context_latents


# ---- objective ------------------------------------------------------------------------------------------

class VGGFeatures(nn.Sequential):
    """VGG16's relu1_2, relu2_2, relu3_3, relu4_3 (Simonyan 2014), for the perceptual loss (Johnson 2016)."""
    def __init__(self):
        layers, channels = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            channels = width or channels
        super().__init__(*layers)

    def forward(self, x):
        maps = [normalize(x)]
        for layer in self:
            maps.append(layer(maps[-1]))
        return [maps[i + 1] for i in (3, 8, 15, 22)]


def load_vgg(args, device):
    """The frozen VGG16 of the perceptual loss; None where --perceptual_weight is 0."""
    if not args.perceptual_weight:
        return None
    vgg = VGGFeatures()
    is_file = Path(args.vgg_weights).is_file()
    load = torch.load if is_file else functools.partial(torch.hub.load_state_dict_from_url, check_hash=True)
    try:
        weights = load(args.vgg_weights, map_location="cpu", weights_only=True)
        weights = {name: weights[f"features.{name}"] for name in vgg.state_dict()}
    except Exception as error:           # no network, no such file, damaged, or no VGG16
        raise UserError(f"cannot load --vgg_weights {args.vgg_weights} ({common.reason(error)}): pass "
                        f"torchvision's vgg16-397923af.pth, or --perceptual_weight 0") from error
    return common.load_for_inference(vgg, weights, args.vgg_weights, device)


def rollout_plan(args, step):
    """The plan that all clips of a step share: numbers of context and rollout latents, rollout latents to
    decode, foreground weight. Context lengths vary: a model trained on a single length fails at others."""
    rng = np.random.default_rng([args.seed, step])
    progress, clip = step / args.max_steps, (args.T_in + args.T_out) // args.tau
    longest = min(max(1, min(args.context, args.T_in) // args.tau), clip - 1)
    context = int(rng.integers(min(max(1, 4 // args.tau), longest), longest + 1))
    final = min(max(1, min(args.rollout, args.T_out) // args.tau), clip - longest)
    rollout = round(1 + (final - 1) * min(1, progress / 0.6))
    count = max(2, 3 // args.tau)        # decode the first `count` latents and a random run of `count`
    first = int(rng.integers(rollout))
    decoded = sorted({*range(min(count, rollout)), *range(first, min(first + count, rollout))})
    weight = 4 * max(0, 1 - 1.1 * progress)        # decays to a plain pixel loss
    return argparse.Namespace(context=context, rollout=rollout, decoded=decoded, foreground=weight)


def pixel_loss(prediction, target, background, recon_type, foreground):
    """Mean error of frames B T 3 H W. Foreground pixels, about 3 %, have weight 1 + foreground."""
    error = (prediction - target).abs() if recon_type == "l1" else (prediction - target) ** 2
    mask = ((target - background).abs() > 0.2).any(dim=2, keepdim=True)
    return ((1 + foreground * mask) * error).mean()


def world_model_loss(model, x, plan, args, vgg=None):
    """x B T 3 H W: frames of plan.context latents, then of plan.rollout latents. The last context latent is
    reconstructed, and predicted from the latents before it; a rollout predicts the rest. -> loss, terms."""
    tau, observed = model.tau, plan.context * model.tau
    z = model.encode(x[:, :observed])
    p, state = model.dynamics(z)
    rollout = model.rollout(p[:, -1:], state, plan.rollout)[:, plan.decoded]
    latents = [z[:, -1:], p[:, -2:-1], rollout]                    # p[:, -2:-1] is empty for one latent
    frames = model.decode(torch.cat(latents, dim=1)).float()
    reconstruction, one_step, future = frames.split([part.shape[1] * tau for part in latents], dim=1)
    last = x[:, observed - tau:observed]
    target = x[:, observed:].unflatten(1, (-1, tau))[:, plan.decoded].flatten(1, 2)

    options = dict(background=model.background, recon_type=args.recon_type, foreground=plan.foreground)
    error = functools.partial(pixel_loss, **options)
    terms = {"recon_loss": error(reconstruction, last), "rollout_loss": error(future, target)}
    if plan.context > 1:
        terms["one_step_loss"] = error(one_step, last)
    loss = sum(terms.values())
    if target.shape[1] > 1:              # the reference project's |motion| term rewards frozen videos
        terms["temporal_loss"] = (future.diff(dim=1) - target.diff(dim=1)).abs().mean()
        loss = loss + args.temporal_weight * terms["temporal_loss"]
    if vgg is not None:
        with torch.no_grad():
            features = vgg(target.flatten(0, 1))
        pairs = zip(vgg(future.flatten(0, 1)), features)
        terms["perceptual_loss"] = sum(F.mse_loss(a, b) for a, b in pairs) / len(features)
        loss = loss + args.perceptual_weight * terms["perceptual_loss"]
    return loss, terms


# ---- data -----------------------------------------------------------------------------------------------

class Clips:
    """Clips of T frames, `stride` frames apart, from a split that data/cosmos_lite/prepare.py wrote:

        root/<split>.npy        uint8 frames F 3 64 64 of all its videos, concatenated
        root/split.json         {split: [[video, number of frames], ...]}; a video is <kind>/<name>.mp4

    videos: [(name, first frame, number of frames)] of at least T frames; starts: first frames of the clips.
    """
    def __init__(self, root, split, T, stride=5):
        root, self.T = Path(root), T
        if not (root / "split.json").is_file():
            raise UserError(f"no data set in {root}: run python data/{SCRIPT}/prepare.py --data_dir {root}")
        try:
            listed = common.read_json(root / "split.json")[split]
            self.frames = torch.from_numpy(np.load(root / f"{split}.npy", mmap_mode="c"))
            expected = (sum(len(range(n)) for _, n in listed), 3, SIZE, SIZE)   # range() refuses floats
            if self.frames.dtype != torch.uint8 or self.frames.shape != expected:
                raise ValueError(f"it is {self.frames.dtype} {(*self.frames.shape,)}, not uint8 {expected}")
            states = root / "test_states.json"
            self.states = common.read_json(states) if states.is_file() else {}
        except Exception as error:       # damaged files raise ValueError, KeyError, EOFError, ...
            raise UserError(f"cannot read {root}/{split}.npy and .json: {common.reason(error)}") from error
        first = np.cumsum([0, *(length for _, length in listed)]).tolist()
        self.videos = [(name, start, length) for (name, length), start in zip(listed, first) if length >= T]
        if not self.videos:
            raise UserError(f"no video of {split} has {T} frames: lower --T_in or --T_out")
        self.starts = torch.cat([torch.arange(start, start + length - T + 1, stride)
                                 for _, start, length in self.videos])
        common.print_once(f"{split}: {len(self.videos)} videos, {len(self.starts)} clips of {T} frames, "
                          f"{len(listed) - len(self.videos)} shorter videos left out")

    def first_clips(self, count=None):
        """The first clip of each video: N T 3 H W uint8."""
        starts = torch.tensor([start for _, start, _ in self.videos[:count]])
        return self.frames[starts[:, None] + torch.arange(self.T)]


def create_data_loader(video_dir: str, T_in: int = 30, T_out: int = 30, batch_size: int = 4,
                       shuffle: bool = True, augment: bool = False) -> torch.utils.data.DataLoader:
    """Batches of (context B T_in 3 64 64, target B T_out 3 64 64) in [-1, 1]. video_dir: data_dir/split."""
    clips = Clips(Path(video_dir).parent, Path(video_dir).name, T_in + T_out)

    def collate(starts):
        x = from_uint8(clips.frames[torch.stack(starts)[:, None] + torch.arange(clips.T)])
        if augment:
            values = common.sample_global_batch(AUGMENTATION, int(torch.randint(2 ** 62, ())), len(x))
            x = augment_clips(x, values, torch.ones(3, 1, 1), brightness=0.2)
        return x[:, :T_in], x[:, T_in:]

    return torch.utils.data.DataLoader(clips.starts, batch_size, shuffle=shuffle, collate_fn=collate)


def augment_clips(x, values, background, brightness, permute_colors=False):
    """Flips, contrast changes and channel permutations, equal in all frames of a clip. x B T 3 H W."""
    x = torch.where(expand_to(values["flip"] < 0.5, x), x.flip(-1), x)
    if brightness:
        factor = expand_to(1 + brightness * (2 * values["contrast"] - 1), x)
        x = (background + factor * (x - background)).clamp(-1, 1)
    if permute_colors:
        orders = torch.tensor(list(itertools.permutations(range(3))), device=x.device)[values["order"]]
        x = x.gather(2, orders[:, None, :, None, None].expand_as(x))
    return x


# ---- evaluate and sample --------------------------------------------------------------------------------

def locate(foreground, colours):
    """Locates objects of colours n 3 in foreground = |x - background|, T 3 H W in [0, 1] -> centres T n 2 in
    pixels, visible areas T n, object index of each pixel T H W (n: none). A pixel is assigned to the colour
    that fits best, n being the grey of a pendulum's rod. Pale pixels (trails, blur) have less weight."""
    shades = torch.cat([1 - colours, torch.ones(1, 3)])
    squares = shades.pow(2).sum(1)
    projection = torch.einsum("tchw,nc->tnhw", foreground, shades / squares[:, None])
    amount = projection.clamp(0, 1)
    index = (squares[:, None, None] * amount * (amount - 2 * projection)).argmin(1)    # least squared error
    coverage = amount[:, :-1] * (index[:, None] == torch.arange(len(colours))[:, None, None])
    weight = (coverage - coverage.amax((-1, -2), keepdim=True).clamp(min=0.3) / 2).clamp(min=0).square()
    axis = torch.arange(SIZE) + 0.5
    moments = torch.stack([(weight.sum(-2) * axis).sum(-1), (weight.sum(-1) * axis).sum(-1)], dim=-1)
    centres = moments / weight.sum((-1, -2)).clamp(min=1e-6)[..., None]
    return centres, (coverage - 0.15).clamp(min=0).sum((-1, -2)), index


def constant_velocity(pair, background, colours, T):
    """Extrapolates each object's motion between a pair of frames, 2 3 H W in [0, 1] -> T 3 H W."""
    difference = pair - background
    centres, area, index = locate(difference.abs(), colours)
    velocity = torch.where((area > 1).all(0)[:, None], centres[1] - centres[0], 0.)
    velocity = F.pad(velocity, (0, 0, 0, 1))                           # other pixels do not move
    frames, steps = background.expand(T, -1, -1, -1), torch.arange(1, T + 1).view(-1, 1, 1, 1)
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, 3, SIZE, SIZE], align_corners=False)
    for i, v in enumerate(velocity):
        layer = ((index[1] == i) * difference[1]).expand(T, -1, -1, -1)
        frames = frames + F.grid_sample(layer, grid - 2 / SIZE * v * steps, align_corners=False)
    return frames.clamp(0, 1)


def object_scores(x, truth, state, T_in):
    """A forecast T 3 H W in [0, 1] against the exact state of its video -> {metric: T}, NaN without objects:
    mean position error of detected objects; share of visible objects with under a quarter of their area."""
    T = len(x)
    if state is None:
        return dict.fromkeys(("position_px", "missed"), torch.full((T,), math.nan))
    centres, area, _ = locate(1 - x, torch.tensor(state["colour"]))
    _, true_area, _ = locate(1 - truth, torch.tensor(state["colour"]))
    visible = true_area > 1
    detected = visible & (area > 0.25 * true_area)
    distance = (centres - torch.tensor(state["pos"])[T_in:T_in + T]).norm(dim=-1)
    return {"position_px": torch.where(detected, distance, math.nan).nanmean(1),
            "missed": torch.where(visible, (~detected).float(), math.nan).nanmean(1)}


def average_scores(tables, kinds):
    """Tables [{metric: n T}] and kinds of clips -> overall means, per horizon and per kind (falling/mse)."""
    scores = common.horizon_means(tables)
    for kind in dict.fromkeys(kinds):
        members = common.horizon_means([table for table, k in zip(tables, kinds) if k == kind])
        scores |= {f"{kind}/{metric}": members[metric] for metric in tables[0]}
    return scores


@torch.no_grad()
def evaluate(args, run, model, test):
    """Forecasts the first clip of each test video and prints tables -> [eval.json, curves.png]."""
    began, T_in, T_out = time.time(), args.T_in, args.T_out
    clips = test.first_clips(args.eval_clips or None)
    names = [name for name, _, _ in test.videos[:len(clips)]]
    kinds = [os.path.dirname(name) or "videos" for name in names]
    background = (model.background.cpu() + 1) / 2
    train_frames = Clips(args.data_dir, "train", 1).frames
    mean_frame = train_frames[::math.ceil(len(train_frames) / 4096)].float().mean(0) / 255
    tables = {}                                  # method -> [{metric: 1 T}], a table for each clip
    for clip, name in zip(tqdm(clips, "evaluate", unit="clip"), names):
        observed, truth = (clip / 255).split([T_in, T_out])
        state = test.states.get(name)
        colours = torch.tensor(state["colour"] if state else [[0., 0., 0.]])       # black: a single object
        with run.autocast():
            forecast = model((2 * observed[None] - 1).to(run.device), T_out)[0][0]
        pair = observed[[max(0, T_in - 2), T_in - 1]]
        methods = {"model": common.to_uint8(forecast).cpu() / 255,
                   "persistence": observed[-1:].expand_as(truth),
                   "mean frame": mean_frame.expand_as(truth),
                   "constant velocity": constant_velocity(pair, background, colours, T_out)}
        for method, frames in methods.items():
            scores = {"mse": common.mse((frames * 255).round(), (truth * 255).round()),    # 0 to 255
                      "psnr": common.psnr(frames, truth), "ssim": common.ssim(frames, truth)}
            scores |= object_scores(frames, truth, state, T_in)
            tables.setdefault(method, []).append({metric: row[None] for metric, row in scores.items()})
    methods = {method: average_scores(rows, kinds) for method, rows in tables.items()}
    horizons = [h for h in (1, 5, 10, 20, 30) if h <= T_out]
    if test.states:
        common.print_table(methods, [f"{key}_h{h:02d}" for key in ("position_px", "missed")
                                     for h in horizons])
    common.print_table(methods, [f"{kind}/mse" for kind in dict.fromkeys(kinds)])
    results = methods.pop("model")               # baselines remain
    weights = "trained from scratch" if args.encoder == "cnn" else f"encoder pretrained: {args.encoder}"
    columns = [*(f"mse_h{h:02d}" for h in horizons), "mse", "psnr", "ssim"]
    errors = {name: scores["mse"].mean().item() for name, scores in zip(names, tables["model"])}
    return common.report(SCRIPT, args, weights, began, ("mse", "mean frame", True), results, methods,
                         columns, errors, ("mse", "position_px") if test.states else ("mse",))


@torch.no_grad()
def sample(args, run, model, test):
    """Rolls out --num_predict frames of --video_idx, or of the best, median and worst test video of eval.json
    -> [samples/<case>_<video>.*]."""
    names, files = [name for name, _, _ in test.videos], []
    cases = {"video": args.video_idx} if args.video_idx >= 0 else common.pick_cases(args.output_dir, names)
    for case, i in cases.items():
        _, first, length = test.videos[i]
        x = from_uint8(test.frames[first:first + length])
        truth = x[args.T_in:args.T_in + args.num_predict]
        with run.autocast():
            frames = model(x[None, :args.T_in].to(run.device), args.num_predict)[0][0].float().cpu()
        unknown = torch.full((args.num_predict - len(truth), 3, SIZE, SIZE), 0.5)      # past the video's end
        truth = torch.cat([x[args.T_in - 1:args.T_in], truth, unknown])
        prediction = torch.cat([truth[:1], frames])
        error = common.error_picture(prediction, truth)
        error.video[len(truth) - len(unknown):] = 0.5
        mse = common.mse(prediction * 127.5, truth * 127.5)[:len(truth) - len(unknown)]
        labels = ["t"] + [f"t+{n}\nMSE {e:.0f}" for n, e in enumerate(mse[1:].tolist(), 1)]
        labels += [f"t+{n}" for n in range(len(labels), len(truth))]
        rows = {"ground truth": truth, "prediction": prediction, "error": error}
        stem = f"{args.output_dir}/samples/{case}_{os.path.splitext(names[i])[0].replace('/', '_')}"
        files += common.write_panels(stem, {"": rows}, fps=15, labels=labels)
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
    for module in model.modules():
        if args.grad_checkpoint and isinstance(module, (CausalBlock, ResBlock)):
            module.forward = functools.partial(recompute, module.forward, use_reentrant=False)
        if args.compile and isinstance(module, (Encoder, RecurrentDynamics, Transformer, Decoder)):
            module.compile()             # not the whole model: rollout lengths change
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


def train(args, run, model, spec, loss_fn, val_fn, checkpoint):
    """Trains `model` up to --max_steps from `checkpoint`, and saves the last step in <output_dir>/ckpt.

    spec: random values of a sample, for common.sample_global_batch. loss_fn(model, values, step) -> loss,
    {name: term to log}. val_fn(model) -> {name: number}.
    """
    folder = Path(args.output_dir)
    net = wrap(model, args, run)
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay,
                                  fused=True)
    ema = common.EMA(params, args.ema_decay)
    start = common.load_run(checkpoint, net, optimizer, ema)
    log = common.open_log(SCRIPT, ".", args, start, args.max_steps)
    should_stop = common.install_sigterm_handler()
    for step in range(start, args.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, args.lr, args.warmup_steps, args.max_steps)
        net.train()
        seed = common.seed_all(args.seed, 1, step)
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
        save = stop or completed == args.max_steps or args.save_every and completed % args.save_every == 0
        if (save or args.log_every and completed % args.log_every == 0) and not norm.isfinite():
            raise UserError(f"loss or gradient is not finite at step {completed}: resume from "
                            f"{common.latest_checkpoint(folder / 'ckpt') or 'the start'} with a lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        log.step(completed, lr=optimizer.param_groups[0]["lr"], grad_norm=norm)
        if save:                                 # before validation, so that an error there loses nothing
            common.save_run(folder, SCRIPT, completed, net, optimizer, ema, args, args.keep_last)
        if stop:
            raise UserError(f"stopped by SIGTERM after step {completed} (saved): the same command resumes")
        if args.eval_every and (completed % args.eval_every == 0 or completed == args.max_steps):
            with ema.applied(), torch.no_grad(), run.autocast():
                log.row(completed, **val_fn(net.eval()))
            log.restart_clock()
    common.remove_sigterm_handler()
    log.bar.close()


def train_world_model(args, run, vgg, checkpoint):
    """Trains the world model -> newest checkpoint. Exports the last EMA weights, and the best to best/."""
    folder = Path(args.output_dir)
    if run.rank == 0:
        common.write_json(folder / "args.json", {**vars(args), **common.provenance()})
    clips = Clips(args.data_dir, "train", args.T_in + args.T_out, args.stride)
    val_clips = Clips(args.data_dir, "val", args.T_in + args.T_out).first_clips(64)
    spec = {"clip": ("randint", len(clips.starts)), "shift": ("rand",), **AUGMENTATION}
    torch.manual_seed(args.seed)                 # equal initial weights on all processes
    model = VideoWorldModel(args, load=not checkpoint).to(run.device)
    subset = torch.linspace(0, len(clips.frames) - 1, min(999, len(clips.frames))).long()
    model.background.copy_(from_uint8(clips.frames[subset].median(dim=0).values))

    def loss_fn(net, values, step):
        plan = rollout_plan(args, step)
        length = (plan.context + plan.rollout) * args.tau
        shift = (values["shift"] * (clips.T - length + 1)).long()      # a random part of the clip
        rows = (clips.starts[values["clip"].cpu()] + shift.cpu())[:, None] + torch.arange(length)
        x = from_uint8(clips.frames[rows].to(run.device))
        x = augment_clips(x, values, model.background, args.brightness, args.permute_colors)
        return net(x, objective=functools.partial(world_model_loss, plan=plan, args=args, vgg=vgg))

    def val_fn(net):
        """MSE of forecasts, 0 to 255. Saves the EMA weights in best/ when it is the lowest so far."""
        errors = []
        for x in val_clips.split(16):
            forecast = model(from_uint8(x[:, :args.T_in].to(run.device)), args.T_out)[0]
            errors.append(common.mse(common.to_uint8(forecast).cpu(), x[:, args.T_in:]))
        error = torch.cat(errors).mean(0).tolist()
        score = sum(error) / len(error)
        if run.rank == 0:                        # metrics.jsonl is written by rank 0
            rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
            if score < min((row["val_loss"] for row in rows if row.get("val_loss")), default=math.inf):
                (folder / "best").mkdir(exist_ok=True)
                common.save_weights(folder / "best/world_model.safetensors", model.state_dict())
        return {"val_loss": score, "val_mse_h01": error[0]}

    train(args, run, model, spec, loss_fn, val_fn, checkpoint)
    checkpoint = common.find_checkpoint(folder / "ckpt", SCRIPT, "auto")
    if run.rank == 0:
        common.save_weights(folder / "world_model.safetensors", checkpoint.state["ema"])
    return checkpoint


# ---- main -----------------------------------------------------------------------------------------------

def load_model(folder: str, device: str = "cpu", best: bool = False) -> VideoWorldModel:
    """Loads a run's model in eval mode, with the last weights or those of the lowest validation loss."""
    args = argparse.Namespace(**common.read_json(Path(folder, "args.json")))
    path = Path(folder, "best" if best else "", "world_model.safetensors")
    return common.load_for_inference(VideoWorldModel(args), common.load_weights(path), path, device)


def dry_run(args):
    """Prints parameters, FLOPs and memory at the longest rollout, on the meta device."""
    B, plan = args.batch_size, rollout_plan(args, args.max_steps)
    with torch.device("meta"):
        model = VideoWorldModel(args)
        x = torch.randn(B, (plan.context + plan.rollout) * args.tau, 3, SIZE, SIZE)
        tokens = (plan.context + plan.rollout) * model.encode(x[:1, :args.tau]).shape[-2:].numel()
        print(common.dry_run_report("world model", model, lambda: world_model_loss(model, x, plan, args)[0],
                                    B, tokens, int(os.environ.get("WORLD_SIZE", 1))))


def run_script(argv):
    args, checkpoint, why_preset = parse_args(argv)
    if args.dry_run:
        return dry_run(args)
    run = setup(args)
    inference_only = args.sample or args.eval
    common.announce(SCRIPT, args, why_preset, run, checkpoint)
    training = not (inference_only and checkpoint)
    vgg = load_vgg(args, run.device) if training else None         # missing weights fail early
    common.simulate_missing_data(SCRIPT, args.data_dir, default=PRESETS["tiny"]["data_dir"])
    test = Clips(args.data_dir, "test", args.T_in + args.T_out)    # before training: errors show early
    if args.video_idx >= len(test.videos):
        raise UserError(f"--video_idx {args.video_idx}: the test videos are 0 to {len(test.videos) - 1}")
    if training:
        checkpoint = train_world_model(args, run, vgg, checkpoint)
    if run.rank == 0:
        path, state, _ = checkpoint
        model = common.load_for_inference(VideoWorldModel(args), state["ema"], path, run.device)
        if args.best:
            model = load_model(args.output_dir, run.device, best=True)
        files = evaluate(args, run, model, test) if common.wants_evaluation(args) else []
        if args.sample or not inference_only:
            files += sample(args, run, model, test)
        common.show_results(args.output_dir, files, args.tensorboard, args.wandb)
    common.shutdown()


def main(argv=None):
    return common.one_line_errors(f"{SCRIPT}.py", lambda: run_script(argv))


if __name__ == "__main__":
    sys.exit(main())
