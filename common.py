"""common.py: tensor utilities, file readers, checkpoints and run records shared by the scripts.

Flags        at_least between Parser parse_args auto_preset choose_device choose_dtype
Tensors      seed_all sample_global_batch expand_to to_uint8 from_uint8 EMA count_params
Processes    all_mean gather_rows barrier shutdown print_once announce simulate_missing_data
Metrics      mse psnr ssim fair_crps rank_histogram frechet_distance fvd
Files        read_text read_json read_image read_images find_files video_frames read_video write_video
             ColoredVideo apply_colormap error_picture picture_grid write_panels
Checkpoints  save_run load_run find_checkpoint save_checkpoint load_checkpoint save_weights load_weights
             save_pt gather_state restore_state install_sigterm_handler
Wan          load_wan official_names wan_encode wan_decode LinearCodec encode_text pad_text save_lora
Run records  UserError one_line_errors write_json Log horizon_means print_table report describe_data
             file_version cache_path wants_evaluation pick_cases show_results write_report_page
             loss_panel rank_panel plot_curves provenance dry_run_report

Shapes: B batch, T frames, C channels, H W pixels. A video is B T C H W (or T C H W) in [-1, 1] unless a name
says otherwise.
"""
import argparse
import contextlib
import hashlib
import html
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm


class UserError(Exception):
    """An error the user can fix. Its message is the one line that a script prints before exit code 2."""


def reason(error):
    """An exception's message on one line, at most 200 characters; the name of its class if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---- flags ----------------------------------------------------------------------------------------------

def at_least(low, kind=int):
    """An argparse type: at_least(1), at_least(0, float). NaN and infinity are refused."""
    def number(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be finite and at least {low}, not {text}")
        return value

    number.__name__ = kind.__name__              # argparse then says "invalid int value: 'many'"
    return number


def between(low, high, open_end=False):
    """An argparse type for a float in [low, high], or in [low, high) with open_end. NaN is refused."""
    bracket = ")" if open_end else "]"

    def number(text):
        value = float(text)
        if not low <= value <= high or open_end and value == high:
            raise argparse.ArgumentTypeError(f"must be in [{low}, {high}{bracket}, not {text}")
        return value

    number.__name__ = "float"
    return number


class Parser(argparse.ArgumentParser):
    """argparse's parser with the flags that all scripts share, defaults in --help, and errors as UserError.

    presets: {name: {flag: value}}, of which "tiny" is the first. fsdp: whether the script shards its model.
    """
    def __init__(self, script, presets, description, fsdp=True):
        super().__init__(prog=f"{script}.py", description=description, allow_abbrev=False,
                         epilog="A preset replaces these defaults; a run's args.json has all values.",
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.script = script
        self.presets = presets
        add = self.add_argument_group("run").add_argument
        add("--preset", choices=["auto", *presets], default="auto",
            help=f"auto: {list(presets)[1]} where CUDA, data and weights are available, otherwise tiny")
        add("--sample", action="store_true", help="write videos from the newest checkpoint")
        add("--eval", action="store_true", help="evaluate the newest checkpoint on held-out data")
        add("--dry_run", action="store_true", help="print parameters, FLOPs and memory, then exit")
        add("--data_dir", help="folder of the data set")
        add("--output_dir", default=f"runs/{script}", help="folder of the run")
        add("--resume", default="auto", metavar="auto|none|PATH",
            help="auto: newest checkpoint of output_dir; PATH: a run or a checkpoint")
        add("--seed", type=at_least(0), default=0, help="seed of weights, batches and samples")
        add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda, mps or cpu")
        add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
            help="auto: bfloat16 on CUDA and on CPUs with bf16 instructions, otherwise float32")
        add = self.add_argument_group("optimization").add_argument
        add("--max_steps", type=at_least(1), default=1000, help="optimizer steps, resumed ones included")
        add("--batch_size", type=at_least(1), default=16, help="samples per process and micro-step")
        add("--grad_accum", type=at_least(1), default=1, help="micro-steps per optimizer step")
        add("--lr", type=at_least(0, float), default=1e-4, help="peak learning rate")
        add("--warmup_steps", type=at_least(0), default=100, help="steps of linear warm-up before the cosine")
        add("--weight_decay", type=at_least(0, float), default=1e-2, help="weight decay of AdamW")
        add("--grad_clip", type=at_least(0, float), default=1.0, help="gradient norm limit (0: no clipping)")
        add("--ema_decay", type=between(0, 1, True), default=0.999, help="decay of the averaged weights")
        add = self.add_argument_group("hardware and records").add_argument
        add("--compile", action="store_true", help="torch.compile the model")
        if fsdp:
            add("--fsdp", action="store_true", help="shard weights and optimizer over torchrun's processes")
        add("--grad_checkpoint", action="store_true", help="recompute activations in the backward pass")
        add("--log_every", type=at_least(0), default=10, help="steps between rows of metrics.jsonl (0: none)")
        add("--eval_every", type=at_least(0), default=250, help="steps between validations (0: none)")
        add("--save_every", type=at_least(0), default=250, help="steps between checkpoints (0: last only)")
        add("--keep_last", type=at_least(0), default=3, help="checkpoints to keep (0: all)")
        add("--tensorboard", action="store_true", help="also write TensorBoard events")
        add("--wandb", metavar="PROJECT", help="also log to this Weights & Biases project")

    def error(self, message):
        raise UserError(f"{message}; {self.prog} --help lists the flags")


# A resumed run does not take these over from its checkpoint.
RUN_FLAGS = {"output_dir", "resume", "sample", "eval", "dry_run", "serve", "device", "dtype", "fsdp",
             "cpu_offload", "compile"}


def parse_args(parser, argv=None, locked=(), **paper_needs):
    """Flags by precedence: command line > checkpoint > preset > default.

    locked: flags that shape the weights or give them their meaning; a value on the command line must agree
    with the checkpoint's. paper_needs: arguments of auto_preset. --resume and --output_dir determine the
    checkpoint. --resume PATH without --output_dir continues in PATH's run.
    -> (args, Checkpoint or None, reason for the preset). UserError where flags contradict the checkpoint.
    """
    script, presets, unset = parser.script, parser.presets, object()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    parsed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset))))
    explicit = {name: value for name, value in parsed.items() if value is not unset}
    defaults = vars(parser.parse_args([]))
    values = {**defaults, **explicit}
    if values["resume"] not in ("auto", "none") and "output_dir" not in explicit:
        values["output_dir"] = explicit["output_dir"] = str(run_folder(values["resume"]))
    if values["preset"] == "auto":
        explicit.pop("preset", None)

    folder = Path(values["output_dir"]) / "ckpt"
    inference = values["sample"] or values["eval"]
    checkpoint = None
    if not values["dry_run"]:
        checkpoint = find_checkpoint(folder, script, values["resume"], train=not inference)
    saved = checkpoint.meta["args"] if checkpoint else {}
    for name in ("preset", *locked):
        if checkpoint and name in explicit and explicit[name] != saved.get(name, explicit[name]):
            raise UserError(f"--{name} {explicit[name]} does not fit {checkpoint.path}, trained with "
                            f"{saved[name]}: leave it out, or choose another --output_dir")
    if inference and not checkpoint and "output_dir" in explicit:
        raise UserError(f"no checkpoint in {folder}: train first with python {script}.py --output_dir "
                        f"{values['output_dir']}")

    preset, preset_reason = values["preset"], "from the command line"
    if checkpoint:
        preset, preset_reason = saved["preset"], "from the checkpoint"
    elif preset == "auto":
        preset, preset_reason = auto_preset(presets, values, **paper_needs)
    saved = {name: value for name, value in saved.items() if name in values and name not in RUN_FLAGS}
    original = {**defaults, **presets[preset]}
    merged = {**original, **saved, **explicit, "preset": preset}
    changed = {name: value for name, value in merged.items() if value != original[name]}
    return argparse.Namespace(**merged, changed=changed), checkpoint, preset_reason


def auto_preset(presets, flags, data="{data_dir}", get_data="", weights=None):
    """Resolves --preset auto: the paper's preset, which is the second one, where CUDA, its data and its
    weights are available; otherwise tiny.

    flags: {name: value} of the command line; data_dir None means the preset's. data: path that has to exist.
    weights: a file, a folder or a hub id, by default --weights_from. get_data: command that gets the data.
    -> (preset, reason)
    """
    paper = list(presets)[1]
    weights = weights or flags.get("weights_from")
    folder = data.format(data_dir=flags["data_dir"] or presets[paper]["data_dir"])
    missing = [] if torch.cuda.is_available() else ["a CUDA device"]
    if not Path(folder).exists():
        missing.append(f"{folder} ({get_data})")
    if weights and not flags.get("random_init"):
        from huggingface_hub.constants import HF_HUB_CACHE
        cached = Path(HF_HUB_CACHE, "models--" + str(weights).replace("/", "--"), "snapshots")
        if not Path(weights).expanduser().exists() and not cached.is_dir():
            missing.append(f"{weights} (hf download {weights})")
    if missing:
        return "tiny", f"{paper} needs {', '.join(missing)}"
    return paper, "CUDA, data and weights are available" if weights else "CUDA and data are available"


# ---- tensors --------------------------------------------------------------------------------------------

def seed_all(seed, *salt):
    """Seeds python's, numpy's and torch's global generators from integers, as in seed_all(seed, step, rank).

    Seeding again at every step makes all randomness (dropout too) a function of (seed, step, rank): a resumed
    run needs no generator state. Returns the mixed 63-bit seed, for torch.Generator().manual_seed().
    """
    low, high = np.random.SeedSequence([seed, *salt]).generate_state(2, np.uint32).tolist()
    random.seed(low)
    np.random.seed(low)
    mixed = low + ((high & 0x7FFFFFFF) << 32)
    torch.manual_seed(mixed)
    return mixed


def sample_global_batch(spec, seed, batch_size, rank=0, world=1, micro=0, grad_accum=1, device="cpu"):
    """Random values of a micro-batch: {name: ("randint", high) | ("rand",) | ("randn", *shape)} -> tensors.

    Values are drawn for the global batch of grad_accum x world x batch_size samples and then sliced, so that
    two processes with 8 samples each train on the same samples as one process with 16.
    """
    generator = torch.Generator(device).manual_seed(seed)
    global_batch = batch_size * world * grad_accum
    first = (micro * world + rank) * batch_size
    values = {}
    for name, (kind, *size) in spec.items():
        if kind == "randint":
            value = torch.randint(size[0], (global_batch,), generator=generator, device=device)
        else:
            value = getattr(torch, kind)(global_batch, *size, generator=generator, device=device)
        values[name] = value[first:first + batch_size]
    return values


def expand_to(t, x):
    """(B,) -> (B, 1, ..., 1) with as many dimensions as x, to broadcast a per-sample number over x."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def to_uint8(x):
    """[-1, 1] floats -> 0..255 uint8 of the same shape, rounded and clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(x):
    """0..255 uint8 -> [-1, 1] float32 of the same shape."""
    return x.float() / 127.5 - 1


class EMA:
    """Exponential moving average of parameters, which `with ema.applied():` swaps in for the parameters."""
    def __init__(self, params, decay):
        self.params = list(params)
        self.decay = decay
        self.reset()

    def reset(self):
        """Restarts from the current parameters. With decay 0 it shares their memory."""
        self.weights = [p.detach().clone() if self.decay else p.detach() for p in self.params]

    @torch.no_grad()
    def update(self, step):
        """Call it after optimizer step `step`, counted from 0. The decay is smaller in the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.weights, [p.detach() for p in self.params], 1 - decay)

    @torch.no_grad()
    def copy_to_params(self):
        for p, average in zip(self.params, self.weights):
            p.copy_(average)

    @contextlib.contextmanager
    def applied(self):
        trained = [p.detach().clone() for p in self.params]
        self.copy_to_params()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.params, trained):
                    p.copy_(value)


def gather_rows(tables):
    """{name: [row]} of each process -> the rows of all processes, on every process."""
    if not dist.is_initialized():
        return tables
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, tables)
    return {name: [row for part in gathered for row in part.get(name, [])]
            for name in dict.fromkeys(name for part in gathered for name in part)}


def count_params(model, trainable_only=False):
    """Number of parameters of a module."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def barrier():
    """Waits for all processes; does nothing in a run of one process."""
    if dist.is_initialized():
        dist.barrier()


def shutdown():
    """Waits for all processes and leaves their group."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def print_once(message):
    """Prints on rank 0 only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, flush=True)


def all_mean(x):
    """Mean of a tensor or number over all processes, detached; the identity with one process."""
    x = torch.as_tensor(x, dtype=torch.float32).detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


# ---- metrics: float tensors in [0, 1], ... C H W -> ..., the mean over each image, never over images ------

def mse(a, b):
    """Mean squared error of each image, of any dtype."""
    return ((a.float() - b.float()) ** 2).mean(dim=(-3, -2, -1))


def psnr(a, b):
    """Peak signal-to-noise ratio of each image in dB, capped at 60: equal images stay finite in a mean."""
    return -10 * torch.log10(mse(a, b).clamp(min=1e-6))


def ssim(a, b, chunk=256):
    """Structural similarity of each image (Wang 2004: Gaussian window of 11, sigma 1.5, K .01 .03, valid)."""
    a, b = torch.broadcast_tensors(a.float(), b.float())
    window = torch.exp(-(torch.arange(11.0) - 5) ** 2 / (2 * 1.5 ** 2))
    window = window / window.sum()

    def band(n):                         # the window as a matrix: 18 times faster than convolving one channel
        rows = [F.pad(window, (i, n - 11 - i)) for i in range(n - 10)]
        return torch.stack(rows).to(a.device)

    down, across = band(a.shape[-2]), band(a.shape[-1]).T
    values = []
    for x, y in zip(a.flatten(0, -4).split(chunk), b.flatten(0, -4).split(chunk)):
        products = torch.stack([x, y, x * x, y * y, x * y])            # 5 N C H W
        mx, my, xx, yy, xy = down @ products @ across
        value = (2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
        value = value / ((mx ** 2 + my ** 2 + 1e-4) * (xx - mx ** 2 + yy - my ** 2 + 9e-4))
        values.append(value.mean(dim=(1, 2, 3)))
    return torch.cat(values).reshape(a.shape[:-3])


def frechet_distance(a, b):
    """Frechet distance of the Gaussians fitted to features a, b: N D. float64, symmetric eigenproblems."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


@torch.no_grad()
def fvd(detector, predicted, truth, device="cpu"):
    """Frechet video distance of clips N T 3 H W in [-1, 1], with StyleGAN-V's TorchScript file of I3D.

    Biased upwards for few clips: compare equal N and T only. Raises UserError if the detector does not fit.
    """
    options = dict(rescale=False, resize=True, return_features=True)
    features = []
    try:
        model = torch.jit.load(detector, map_location=device).eval()
        for clips in (predicted, truth):
            parts = [model(part.to(device).transpose(1, 2), **options) for part in clips.split(8)]
            features.append(torch.cat(parts).float().cpu())
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--i3d {detector} is not StyleGAN-V's i3d_torchscript.pt, or does not take clips of "
                        f"{truth.shape[1]} frames: {reason(error)}") from error
    return frechet_distance(*features)


def rank_histogram(members, truth):
    """Members m N, truth N -> m + 1 counts: how often 0 to m members are below the truth. They are equal for
    a calibrated ensemble (Hamill 2001). Ties are split equally among the ranks that they span."""
    below, below_or_equal = (members < truth).sum(0), (members <= truth).sum(0)
    ranks = torch.arange(len(members) + 1, device=members.device)[:, None]
    spanned = (below <= ranks) & (ranks <= below_or_equal)
    return (spanned / (below_or_equal - below + 1)).sum(1).cpu()


def rank_panel(counts):
    """Counts of rank_histogram -> a panel for plot_curves."""
    m = len(counts) - 1
    return {"title": "rank of the truth in the ensemble", "xlabel": f"members below the truth, of {m}",
            "ylabel": "relative frequency (calibrated: 1)", "lines": {"calibrated": ([0, m], [1, 1])},
            "bars": (list(range(m + 1)), (counts / counts.mean()).tolist())}


def fair_crps(members, truth, dim=0):
    """Continuous ranked probability score, elementwise: E|X - y| - E|X - X'| / 2, pairs over m (m - 1),
    so unbiased in the ensemble size (Ferro 2014). Members lie along `dim`; for m = 1 it is |X - y|."""
    m = members.shape[dim]
    x = members.movedim(dim, 0).sort(dim=0).values
    rank = expand_to(2 * torch.arange(1, m + 1, device=x.device) - m - 1, x)   # sum |xi - xj| = 2 sum rank x
    return (x - truth).abs().mean(0) - (rank * x).sum(0) / max(1, m * (m - 1))


# ---- user files -----------------------------------------------------------------------------------------

VIDEO_SUFFIXES = tuple(
    ".mp4 .m4v .mov .qt .mkv .mk3d .webm .avi .divx .flv .f4v .wmv .asf .mpg .mpeg .mpe .m1v .m2v .mpv .vob "
    ".evo .vro .ts .mts .m2ts .m2t .trp .tp .tod .3gp .3g2 .mj2 .ogv .ogm .mxf .gxf .gif .apng .y4m .dv .dif "
    ".nut .ivf .obu .rm .rmvb .wtv .nuv .dav .ismv .insv .amv .mjpg .mjpeg .h264 .264 .h265 .265 .hevc "
    ".vc1".split())
IMAGE_SUFFIXES = tuple(
    ".png .apng .jpg .jpeg .jpe .jfif .jp2 .j2k .jpx .bmp .dib .gif .tif .tiff .webp .avif .tga .ppm .pgm "
    ".pbm .pnm .pfm .pcx .sgi .qoi".split())


def read_text(path) -> str:
    """A UTF-8 text file, with or without a byte order mark. Line ends become "\\n".

    Raises UserError for text in another encoding, naming the likely one, and where the file cannot be read.
    """
    try:
        raw = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    try:
        text = raw.decode("utf-8-sig")
        # Control characters are valid UTF-8, but come from UTF-16, from ISO-2022 or from a binary file.
        valid = not re.search(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]", text)
    except UnicodeDecodeError:
        valid = False
    if not valid:
        wide = raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw
        encoding = "UTF-16" if wide else "cp1252, latin-1 or GBK"
        raise UserError(f"{path} is not UTF-8 text (probably {encoding}): save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path):
    """Reads a JSON file. Raises UserError, naming the file, where it cannot be read."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {reason(error)}") from error


def read_image(path, size=None) -> np.ndarray:
    """An image file -> H W 3 uint8 (RGB), upright, alpha composited over black, 16 bits scaled to 8.

    Of an animation, reads the first frame. Raises UserError, naming the file, where it cannot be read, its
    size is not `size` (height, width), or float or 32-bit pixels are outside [0, 1] or 0 to 65535.
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
        if size and image.size[::-1] != tuple(size):
            raise ValueError(f"it is {image.width}x{image.height}, expected {size[1]}x{size[0]}")
        if image.mode[0] in "IF":                      # grey of 16 bits, of 32 bits, or floating-point
            grey = np.asarray(image)
            white = 1 if image.mode == "F" else 65535
            if not (0 <= grey.min() and grey.max() <= white):              # also false for NaN
                raise ValueError(f"its values {grey.min()} to {grey.max()} are outside 0 to {white}")
            if "transparency" in image.info:
                grey = np.where(grey == image.info["transparency"], 0, grey)
            grey = np.rint(grey * (255 / white)).astype(np.uint8)
            return np.stack([grey, grey, grey], axis=-1)
        if image.has_transparency_data:                # RGBa is premultiplied: composited over black
            image = image.convert("RGBA").convert("RGBa")
            return np.array(image)[..., :3].copy()
        return np.array(image.convert("RGB"))
    except Exception as error:                         # Pillow raises SyntaxError, struct.error, OSError, ...
        raise UserError(f"cannot read image {path}: {reason(error)}") from error


def find_files(root, suffixes, unique=True) -> tuple[list[Path], Counter]:
    """Sorted files below a folder that end in one of `suffixes`, in any case -> (files, left_out).

    Symbolic links are followed. With `unique`, a file that several links reach is listed once, by its real
    name if that is below root. Hidden files and folders, such as "._x.mp4" of macOS, are skipped. left_out
    counts the other files: {suffix: count}. Raises UserError where a folder cannot be read.
    """
    suffixes = {suffix.lower() for suffix in suffixes}
    files, left_out, visited = [], Counter(), set()
    pending, links = [Path(root)], []
    try:
        while pending or links:
            path = (pending or links).pop()            # links last, so that real names win
            folder = path.is_dir() or path == Path(root)
            target = os.path.realpath(path)
            if target in visited and (unique or folder):               # links may also form a loop
                continue
            if folder:
                visited.add(target)
                for entry in sorted(path.iterdir(), reverse=True):
                    if not entry.name.startswith("."):
                        (links if entry.is_symlink() else pending).append(entry)
            elif path.is_file() and path.suffix.lower() in suffixes:
                visited.add(target)
                files.append(path)
            else:
                left_out[path.suffix.lower() if path.exists() else "broken link"] += 1
    except OSError as error:
        raise UserError(f"cannot read folder {root}: {reason(error)}") from error
    return sorted(files), left_out


def describe_left_out(left_out) -> str:
    """find_files' left_out as a phrase, most frequent first: "12 .txt, 1 without ending"."""
    return ", ".join(f"{count} {ending or 'without ending'}" for ending, count in left_out.most_common())


def read_images(paths, size, description) -> np.ndarray:
    """Reads images of one size (height, width) in parallel -> N H W 3 uint8. UserError as in read_image."""
    with ThreadPoolExecutor() as pool:
        images = pool.map(lambda path: read_image(path, size), paths)
        return np.stack(list(tqdm(images, description, len(paths), leave=False)))


# ---- video files ----------------------------------------------------------------------------------------

def ffmpeg(arguments, data=None):
    """Runs imageio's ffmpeg with bytes on stdin -> stdout. Raises OSError with its last line of stderr."""
    from imageio.plugins.ffmpeg import get_exe
    result = subprocess.run([get_exe(), "-v", "error", *map(str, arguments)], input=data, capture_output=True)
    if result.returncode:
        raise OSError((result.stderr.decode(errors="replace").strip().splitlines() or ["ffmpeg failed"])[-1])
    return result.stdout


def video_frames(path, size=None, fps=None):
    """Yields every stored frame of a video file as H W 3 uint8 (RGB), with one frame in memory at a time.

    8 bits (HDR is not tone-mapped), upright, square pixels, alpha composited over black. size: the central
    square is cropped and resized to size x size by area averaging. fps: the video is resampled to this rate.
    Raises UserError, naming the file, where it cannot be decoded. If the file is damaged or cut, this happens
    after the last frame.
    """
    from imageio.plugins.ffmpeg import get_exe
    video = ["-i", f"file:{path}", "-map", "0:V:0", "-fps_mode", "passthrough"]        # V: no cover pictures
    filters = [f"fps={fps}"] if fps else []
    try:
        command = [get_exe(), "-hide_banner", "-nostdin", "-threads", "1"]
        probe = subprocess.run([*command, *video, "-frames:v", "1", "-f", "null", "-"], capture_output=True,
                               stdin=subprocess.DEVNULL).stderr.decode(errors="replace")
        vpx = re.search(r"Video: (vp8|vp9).*?alpha_mode +: 1", probe, re.S)
        if vpx:                                        # ffmpeg's native decoders ignore their alpha
            command += ["-c:v", {"vp8": "libvpx", "vp9": "libvpx-vp9"}[vpx[1]]]
        if vpx or re.search("wrapped_avframe, (yuva|ya|rgba|bgra|argb|abgr|gbrap|pal8|ayuv|vuya)", probe):
            filters.append("format=gbrap16,premultiply=inplace=1")         # in 8 bits, 255 would become 254
        if size:
            filters.append(f"crop='min(iw,ih/sar)':'min(ih,iw*sar)',scale={size}:{size}:flags=area")
        else:
            filters.append("scale='max(1,round(iw*sar))':ih")
        command += [*video, "-v", "level+warning", "-stats", "-vf", ",".join(filters), "-pix_fmt", "rgb24",
                    "-c:v", "ppm", "-f", "image2pipe", "-"]
        count, start = 0, 0
        with tempfile.TemporaryFile() as log, subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log) as process:
            try:
                while process.stdout.readline():       # a PPM: lines "P6", "width height", "255", then pixels
                    width, height = map(int, process.stdout.readline().split())
                    process.stdout.readline()
                    frame = np.empty((height, width, 3), np.uint8)
                    if process.stdout.readinto(frame.reshape(-1)) < frame.size:
                        break
                    # Broadcast streams may start mid-GOP: errors before the first key frame are not damage.
                    if count == 0 and re.search("Input #0, (mpegts|mpeg|mpegvideo|h264|hevc),", probe):
                        start = os.fstat(log.fileno()).st_size
                    count += 1
                    yield frame
                process.wait()
            finally:
                process.kill()                         # has an effect if the caller stops early
            log.seek(start)
            check_decoded(probe, log.read().decode(errors="replace"), count, process.returncode)
    except Exception as error:
        raise UserError(f"cannot read video {path}: {reason(error)}") from error


def check_decoded(probe, messages, count, returncode):
    """Raises OSError where a file, of which `count` frames were decoded, is damaged or cut.

    probe: ffmpeg's description of the file. messages: its output while decoding (-v level+warning -stats).
    """
    harmless = "monotonically increasing"              # equal time stamps do not matter here
    if "timestamp discontinuity" in messages:
        harmless += "|corrupt input packet"            # files joined end to end
    for line in messages.splitlines():
        serious = re.search(r"\[(error|fatal)\]|corrupt (decoded frame|input packet)", line)
        if "matches no streams" in line:
            raise OSError("it has no video")
        if serious and not re.search(harmless, line):
            text = re.sub(r"^(\[.*?\] ?)+", "", line)
            raise OSError(f"it is damaged or cut: {text}" if count else text)
    if returncode or not count:
        raise OSError("ffmpeg failed" if returncode else "it has no frames")
    # A cut between two packets shows only in the declared duration, which these formats state correctly.
    clock, source = r"(\d+):(\d+):([\d.]+)", probe.split("Stream mapping:")[0]
    declared = re.search("Input #0, (?:flv|matroska|mxf|avi).*?Duration: " + clock, source, re.S)
    decoded = re.findall("time=" + clock, messages)
    if declared and decoded and source.count("  Stream #0:") == 1:         # audio streams may be longer
        expected, seconds = (int(h) * 3600 + int(m) * 60 + float(s) for h, m, s in (
            declared.groups(), decoded[-1]))
        expected -= max(0, float(re.search(r"start: ([-\d.]+)|$", source)[1] or 0))
        if expected > seconds + 0.1 + 2 * seconds / count:
            raise OSError(f"it is cut: {seconds:.2f} of {expected:.2f} s can be decoded")


def read_video(path, side=None):
    """A video file -> T C H W uint8 (RGB); side: as video_frames' size.

    Raises UserError, naming the file, where it cannot be decoded, is damaged or is cut.
    """
    return torch.from_numpy(np.stack(list(video_frames(path, side)))).permute(0, 3, 1, 2)


def write_video(path, x, fps=8, options=("-crf", "16", "-pix_fmt", "yuv420p")):
    """Writes x (T C H W, uint8 or floats in [-1, 1]) in the format of the suffix: .mp4 (H.264, with ffmpeg's
    options), .gif, or .png (the frames in a row). -> path"""
    frames = (x if x.dtype == torch.uint8 else to_uint8(x)).permute(0, 2, 3, 1).cpu().numpy()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        iio.imwrite(path, np.concatenate(list(frames), axis=1))
    elif path.suffix == ".gif":
        iio.imwrite(path, frames, duration=1000 / fps, loop=0)
    else:                                      # yuv420p, which every player opens, needs even sides
        odd = frames.shape[1] % 2, frames.shape[2] % 2
        frames = np.pad(frames, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{frames.shape[2]}x{frames.shape[1]}", "-r", fps]
        ffmpeg([*raw, "-i", "-", "-c:v", "libx264", *options, "-y", f"file:{path}"], frames.tobytes())
    return str(path)


class ColoredVideo(NamedTuple):
    """Values drawn in colours, as a video T 3 H W in [-1, 1], and their legend: a picture of the colours
    3 h w (a bar if w is 1) and the values at its lower and upper end."""
    video: torch.Tensor
    legend: torch.Tensor
    low: str
    high: str


def apply_colormap(values, low, high, unit, cmap="viridis", labels=None):
    """Values T H W -> ColoredVideo, from `low` to `high`. labels: texts for the two ends of the legend."""
    import matplotlib
    colours = torch.from_numpy(matplotlib.colormaps[cmap](np.arange(256))[:, :3]).float() * 2 - 1
    index = ((values.cpu() - low) / max(high - low, 1e-12)).clamp(0, 1).mul(255).round().long()
    low_label, high_label = labels or (f"{low:.3g}", f"{high:.3g}")
    legend = colours.flip(0).T[:, :, None]
    return ColoredVideo(colours[index].movedim(-1, 1), legend, low_label, f"{high_label} {unit}")


def error_picture(prediction, truth):
    """Videos T 3 H W in [-1, 1] -> ColoredVideo of |error|, for pixels in [0, 1], averaged over channels."""
    return apply_colormap((prediction - truth).abs().mean(1) / 2, 0.0, 0.5, "", "magma")


def picture_grid(rows, columns, scale=2, gap=4, forecast_from=None, legends=None):
    """Labelled pictures: {row name: [C H W in [-1, 1], ...]} and a name per column -> 3 H' W' uint8.

    Pictures are enlarged `scale` times by nearest-neighbour resampling. A red line is drawn before column
    `forecast_from`, the first one that is not observed. legends: {row name: ColoredVideo}.
    """
    from PIL import Image, ImageDraw, ImageFont
    legends = legends or {}
    H, W = (scale * side for side in next(iter(rows.values()))[0].shape[-2:])
    size = max(13, min(H, W) // 6)               # legible on a phone that shows seven columns
    font = ImageFont.load_default(size=size)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox
    left = 12 + int(max(measure((0, 0), name, font)[2] for name in rows))
    top = 6 + int(max(measure((0, 0), name, font)[3] for name in columns))
    legend_height = max(4, H - 2 * size - 8)     # between its two labels
    legend_widths = {name: 14 if x.legend.shape[-1] == 1 else legend_height for name, x in legends.items()}
    label_widths = [font.getlength(label) for x in legends.values() for label in (x.low, x.high)]
    right = 12 + int(max([*legend_widths.values(), *label_widths])) if legends else 0
    edge = left + len(columns) * (W + gap)
    page = Image.new("RGB", (edge - gap + right, top + len(rows) * (H + gap) - gap), "white")
    canvas = ImageDraw.Draw(page)

    def text(x, y, content, anchor="mm"):
        canvas.text((x, y), content, fill="black", font=font, anchor=anchor, align="center")

    def paste(picture, x, y, width, height):
        pixels = to_uint8(picture).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
        page.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (x, y))

    for i, name in enumerate(columns):
        text(left + i * (W + gap) + W // 2, top // 2, name)
    for j, (name, pictures) in enumerate(rows.items()):
        y = top + j * (H + gap)
        text(left // 2, y + H // 2, name)
        for i, picture in enumerate(pictures):
            paste(picture, left + i * (W + gap), y, W, H)
        if name in legends:
            paste(legends[name].legend, edge + 2, y + size + 4, legend_widths[name], legend_height)
            text(edge + 2, y, legends[name].high, "la")
            text(edge + 2, y + H, legends[name].low, "ld")
    if forecast_from:
        x = left + forecast_from * (W + gap) - gap // 2
        canvas.line((x, 0, x, page.height), fill="red", width=2)
    return torch.from_numpy(np.array(page)).permute(2, 0, 1)


def strip_frames(total, observed, columns):
    """Indices of the frames in a picture of at most `columns` columns: all frames, or the last observed one
    and evenly spaced ones from the first to the last forecast."""
    if total <= columns:
        return list(range(total))
    context = [observed - 1] if observed else []
    count = min(columns - len(context), total - observed)
    return context + np.linspace(observed, total - 1, count).round().astype(int).tolist()


def write_panels(stem, panels, observed=1, fps=8, scale=2, labels=None):
    """Videos of equal size and length, {quantity: {method: T C H W in [-1, 1] or ColoredVideo}}, the first
    `observed` frames of which are the context -> [stem.mp4, stem.png].

    The .mp4 has a row of videos for each quantity, the .png a row for each video and a column for each frame
    of strip_frames. labels: T names of frames (default: their horizons, ..., t-1, t, t+1, ...).
    """
    legends, rows, tiles = {}, {}, {}
    for quantity, methods in panels.items():
        for method, video in methods.items():
            name = f"{method}\n{quantity}".strip()
            if isinstance(video, ColoredVideo):
                legends[name], video = video, video.video
            rows[name] = tiles.setdefault(quantity, {})[method] = video
    T = len(video)
    labels = labels or [f"t{t:+}" if t else "t" for t in range(1 - observed, T - observed + 1)]
    frames = []
    for t, label in enumerate(labels):
        frames.append([picture_grid({f"{quantity}\n{label}".strip(): [video[t] for video in row.values()]},
                                    list(row), scale) for quantity, row in tiles.items()])
    width = max(grid.shape[-1] for frame in frames for grid in frame)            # the labels' widths differ
    frames = [torch.cat([F.pad(grid, (width - grid.shape[-1], 0), value=255) for grid in frame], dim=1)
              for frame in frames]
    times = strip_frames(T, observed, 7)
    strip = picture_grid({name: [video[t] for t in times] for name, video in rows.items()},
                         [labels[t] for t in times], scale, forecast_from=sum(t < observed for t in times),
                         legends=legends)
    return [write_video(f"{stem}.mp4", torch.stack(frames), fps), write_video(f"{stem}.png", strip[None])]


# ---- checkpoints ----------------------------------------------------------------------------------------
# ckpt/step_000500/ holds a file per entry of the state, and meta.json, written last, with every file's size.
# The folder is written under a temporary name and renamed when complete: a checkpoint is saved atomically.

def save_checkpoint(folder, step, state, meta, keep_last=3):
    """Writes folder/step_XXXXXX atomically, then removes all but the newest `keep_last` (0: none). On rank 0.

    state: {name: flat dict of tensors, saved as safetensors, or a value that torch.load(weights_only=True)
    reads}. meta: JSON-serializable; "step" and "files" are added. If writing fails, as on a full disk, the
    incomplete files are removed, and UserError names the newest complete checkpoint.
    """
    folder = Path(folder)
    final, tmp = folder / f"step_{step:06d}", folder / f".tmp_step_{step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".tmp_*"):                        # of an interrupted save or removal
            shutil.rmtree(stale)
        tmp.mkdir()
        for name, value in state.items():
            if value and all(torch.is_tensor(v) for v in value.values()):
                save_weights(tmp / f"{name}.safetensors", value)
            else:
                torch.save(value, tmp / f"{name}.pt")
        sizes = {file.name: file.stat().st_size for file in tmp.iterdir()}
        (tmp / "meta.json").write_text(json.dumps({**meta, "step": step, "files": sizes}, indent=1))
        for file in tmp.iterdir():
            with open(file) as handle:
                os.fsync(handle.fileno())
        if final.exists():                                         # a damaged checkpoint of this step
            final.rename(folder / f".tmp_damaged_{step:06d}")
        tmp.rename(final)
    except Exception as error:        # a full disk raises OSError, RuntimeError or SafetensorError
        shutil.rmtree(tmp, ignore_errors=True)
        last = latest_checkpoint(folder) or "none"
        raise UserError(f"could not save {final} ({reason(error)}); the last complete one is "
                        f"{last}") from error
    for old in checkpoints(folder)[:-keep_last] if keep_last else []:
        old = old.rename(folder / f".tmp_old_{old.name}")          # atomic, unlike rmtree
        shutil.rmtree(old)
    return final


class Checkpoint(NamedTuple):
    """A checkpoint that was read: its folder, {name: state} on the CPU, and {"script", "step", "args"}."""
    path: Path
    state: dict
    meta: dict


def checkpoints(folder):
    """Complete checkpoints of a folder, oldest first."""
    complete = [p.parent for p in Path(folder).glob("step_*/meta.json") if p.parent.name[5:].isdigit()]
    return sorted(complete, key=lambda path: int(path.name[5:]))


def latest_checkpoint(folder):
    """The complete checkpoint with the highest step, or None."""
    return (checkpoints(folder) or [None])[-1]


def load_checkpoint(path, script):
    """Reads what save_checkpoint wrote -> (state, meta), on the CPU.

    Raises UserError where it is missing, truncated, unreadable, or was written by another script.
    """
    path = Path(path)
    if not (path / "meta.json").is_file():
        raise UserError(f"no checkpoint at {path}: name a folder step_XXXXXX, or a run's folder")
    try:
        meta = json.loads((path / "meta.json").read_text())
        if meta["script"] != script:
            raise UserError(f"{path} was written by {meta['script']}, not by {script}")
        state = {}
        for name, size in meta["files"].items():
            if not (path / name).is_file() or (path / name).stat().st_size != size:
                raise UserError(f"checkpoint {path} is truncated ({name}): use an older one, --resume PATH")
            stem, kind = name.split(".")
            read = load_file if kind == "safetensors" else lambda file: torch.load(file, weights_only=True)
            state[stem] = read(path / name)
        return state, meta
    except UserError:
        raise
    except Exception as error:        # zip, json and safetensors raise their own types
        raise UserError(f"checkpoint {path} cannot be read ({reason(error)}): "
                        f"use an older one, --resume PATH") from error


def run_folder(path):
    """The run that --resume PATH names: PATH itself, or the run whose checkpoint it is."""
    return Path(path).parent.parent if Path(path).name.startswith("step_") else Path(path)


def find_checkpoint(folder, script, resume, train=False):
    """Resolves --resume auto|none|PATH for a ckpt folder -> Checkpoint, or None for a new run.

    auto: the newest readable checkpoint, with a warning where a newer one is damaged. none: UserError if the
    folder has checkpoints. PATH: that checkpoint, or the newest one of that run; with `train`, UserError if
    `folder` has later checkpoints or another run's, unless a run of the same --resume PATH saved them.
    """
    if resume == "none":
        if checkpoints(folder):
            raise UserError(f"{folder} holds checkpoints, which --resume none would overwrite: choose "
                            f"another --output_dir")
        return None
    if resume != "auto":
        path = latest_checkpoint(Path(resume) / "ckpt") or Path(resume)
        same_run = path.parent.resolve() == Path(folder).resolve()
        others = [other for other in checkpoints(folder)
                  if not same_run or int(other.name[5:]) > int(path.name[5:])]
        if train and others and path in checkpoints(path.parent):
            newest = find_checkpoint(folder, script, "auto")       # loads this one only: each may be large
            if newest.meta["args"].get("resume") == str(resume):
                return newest
            raise UserError(f"{folder} holds {'later' if same_run else 'other'} checkpoints, and resuming "
                            f"from {path} there would mix two runs: choose another --output_dir")
        return Checkpoint(path, *load_checkpoint(path, script))
    problem = None
    for path in reversed(checkpoints(folder)):
        try:
            checkpoint = Checkpoint(path, *load_checkpoint(path, script))
        except UserError as error:
            problem = problem or error
            continue
        if problem:
            print(f"warning: {problem}; resuming from {path}", file=sys.stderr)
        return checkpoint
    if problem:
        raise problem
    return None


def copy_stages(checkpoint, folder, stages):
    """Copies the first stages of a run that is resumed in another folder. Call it on rank 0."""
    for stage in stages:
        source, target = run_folder(checkpoint.path) / stage, Path(folder) / stage
        if source.is_dir() and not target.exists():
            partial = target.with_name(f".tmp_{stage}")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            partial.rename(target)


def save_weights(path, weights):
    """Writes {name: tensor} to a safetensors file, atomically."""
    path = Path(path)
    tmp = path.with_name(f".tmp_{path.name}")
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, tmp)
    tmp.replace(path)


def save_pt(path, value):
    """torch.save, written atomically."""
    tmp = path.with_name(f".tmp_{path.name}")
    torch.save(value, tmp)
    tmp.replace(path)


def load_weights(path):
    """Reads a safetensors file -> {name: tensor} on the CPU. UserError where it is absent or damaged."""
    try:
        return load_file(path)
    except Exception as error:        # SafetensorError, FileNotFoundError, ... without the path
        raise UserError(f"cannot read the weights {path}: {reason(error)}") from error


def gather_state(model, optimizer=None, everywhere=False, trained_only=False):
    """Full state of a plain, DDP or fully_shard model: ({name: tensor}, optimizer state or {}).

    Collective: call it on all ranks. The result is on the CPU of rank 0 and empty elsewhere, or with
    `everywhere` on each rank's device. trained_only omits frozen weights: an adapter without its base. The
    result does not depend on the number of processes, and its weights are copies.
    """
    from torch.distributed.checkpoint import state_dict as dcp
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=not everywhere,
                                   ignore_frozen_params=trained_only)
    weights = dcp.get_model_state_dict(model, options=options)
    weights = {name: value.clone() for name, value in weights.items()}
    return weights, dcp.get_optimizer_state_dict(model, optimizer, options=options) if optimizer else {}


def restore_state(model, weights, optimizer=None, optimizer_state=None, source="checkpoint",
                  trained_only=False):
    """Inverse of gather_state, on any number of processes. UserError, naming `source`, if shapes differ."""
    from torch.distributed.checkpoint import state_dict as dcp
    frozen = {name for name, p in model.named_parameters() if trained_only and not p.requires_grad}
    expected = {name.removeprefix("module."): tuple(v.shape) for name, v in model.state_dict().items()
                if name not in frozen}
    shapes = {name: tuple(v.shape) for name, v in weights.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise UserError(f"{source} does not fit this model: {name} is {shapes.get(name, 'absent')}, "
                            f"in the model {expected.get(name, 'absent')}")
    options = dcp.StateDictOptions(full_state_dict=True, strict=not trained_only,
                                   ignore_frozen_params=trained_only)
    dcp.set_model_state_dict(model, weights, options=options)
    if optimizer is not None:
        dcp.set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)


def load_for_inference(module, weights, source, device="cpu"):
    """The module with these weights, frozen, in eval mode. UserError, naming `source`, if they do not fit."""
    module = module.to(device).eval().requires_grad_(False)
    restore_state(module, weights, source=str(source))
    return module


def save_run(folder, script, step, model, optimizer, ema, args, keep_last=3, trained_only=False, **extra):
    """Saves folder/ckpt/step_XXXXXX: model, EMA weights, optimizer, flags and `extra` ({name: state dict}).

    Atomic. Call it on all ranks, with a plain, DDP or fully_shard model. trained_only omits frozen weights.
    """
    weights, moments = gather_state(model, optimizer, trained_only=trained_only)
    with ema.applied():
        ema_weights, _ = gather_state(model, trained_only=trained_only)
    if int(os.environ.get("RANK", 0)) == 0:
        state = {"model": weights, "ema": ema_weights, "optimizer": moments, **extra}
        save_checkpoint(Path(folder) / "ckpt", step, state, {"script": script, "args": vars(args)}, keep_last)
    barrier()


def load_run(checkpoint, model, optimizer, ema, trained_only=False):
    """Inverse of save_run, on any number of processes -> step to continue from, 0 without a checkpoint."""
    if checkpoint is None:
        return 0
    path, state, meta = checkpoint
    restore_state(model, state["ema"], source=str(path), trained_only=trained_only)
    ema.reset()
    restore_state(model, state["model"], optimizer, state["optimizer"], str(path), trained_only)
    return meta["step"]


def remove_sigterm_handler():
    """Restores the default handler: SIGTERM ends the process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def choose_device(name):
    """--device auto|cpu|cuda|mps -> torch.device of this process, by torchrun's LOCAL_RANK."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise UserError("--device cuda: no CUDA device was found; use --device cpu")
    if name == "auto":
        single = int(os.environ.get("WORLD_SIZE", 1)) == 1             # gloo does not support MPS
        name = "cuda" if cuda else "mps" if single and torch.backends.mps.is_available() else "cpu"
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def choose_dtype(name, device):
    """--dtype auto|float32|bfloat16 -> dtype of autocast; auto: bf16 on CUDA and on CPUs with bf16 units."""
    if name != "auto":
        return getattr(torch, name)
    cpu = torch.cpu.get_capabilities()
    fast = device.type == "cuda" or device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def simulate_missing_data(script, data_dir, default):
    """Runs data/<script>/prepare.py if data_dir is tiny's `default` and is missing. Call it on all ranks."""
    prepare = Path(__file__).resolve().parent / "data" / script / "prepare.py"
    if int(os.environ.get("RANK", 0)) == 0 and data_dir == default and not Path(data_dir).exists():
        result = subprocess.run([sys.executable, prepare, "--data_dir", data_dir])
        if result.returncode:
            raise UserError(f"{prepare} --data_dir {data_dir} failed with exit code {result.returncode}")
    barrier()


def announce(script, args, preset_reason, run, checkpoint):
    """Prints the first line of a run, and a notice if --sample or --eval have to train first."""
    resumed = f"; checkpoint {checkpoint.path}" if checkpoint else ""
    print_once(f"{script}: preset {args.preset} ({preset_reason}); data {args.data_dir}; {run.world} x "
               f"{run.device.type} {str(run.dtype).removeprefix('torch.')}{resumed}")
    if (args.sample or args.eval) and not checkpoint:
        print_once(f"no checkpoint in {args.output_dir}/ckpt: training preset {args.preset} first")


SIGTERMS = []                                    # received signals, which the next stage checks as well


def install_sigterm_handler():
    """Records SIGTERM instead of ending the process -> should_stop(): whether any process has received it.

    should_stop is collective and uses gloo, so that it does not synchronize with the GPU.
    """
    signal.signal(signal.SIGTERM, lambda *_: SIGTERMS.append(True))

    def should_stop():
        flag = torch.tensor(float(bool(SIGTERMS)))
        if dist.is_initialized():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    return should_stop


# ---- Wan ------------------------------------------------------------------------------------------------
# Unlisted values are the defaults of diffusers' classes, those of Wan2.1-14B: 40 layers, 40 heads of 128, ffn
# 13824, text 4096, patch 1 2 2; VAE of 16 channels, stride 4 8 8. The numbers are those of diffusers'
# scripts/convert_wan_to_diffusers.py; latent statistics are per channel.
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
            "num_heads": 64}
WAN = {
    "ti2v_5b": {
        "repo": "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "text_encoder": UMT5_XXL,
        "transformer": {"num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 48,
                        "out_channels": 48, "ffn_dim": 14336, "num_layers": 30},
        "vae": {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2,
                "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16, "latents_mean": [
                -.2289, -.0052, -.1323, -.2339, -.2799, .0174, .1838, .1557, -.1382, .0542, .2813, .0891,
                .1570, -.0098, .0375, -.1825, -.2246, -.1207, -.0698, .5109, .2665, -.2108, -.2158, .2502,
                -.2055, -.0322, .1109, .1567, -.0729, .0899, -.2799, -.1230, -.0313, -.1649, .0117, .0723,
                -.2839, -.2083, -.0520, .3748, .0152, .1957, .1433, -.2944, .3573, -.0548, -.1681, -.0667],
                "latents_std": [
                .4765, 1.0364, .4514, 1.1677, .5313, .4990, .4818, .5013, .8158, 1.0344, .5894, 1.0901,
                .6885, .6165, .8454, .4978, .5759, .3523, .7135, .6804, .5833, 1.4146, .8986, .5659,
                .7069, .5338, .4889, .4917, .4069, .4999, .6866, .4093, .5709, .6065, .6415, .4944,
                .5726, 1.2042, .5458, 1.6887, .3971, 1.0600, .3943, .5537, .5444, .4089, .7468, .7744]}},
    "i2v_a14b": {"repo": "Wan-AI/Wan2.2-I2V-A14B-Diffusers", "text_encoder": UMT5_XXL, "vae": {},
                 "transformer": {"in_channels": 36}}}       # 16 noisy + 4 mask + 16 condition; both experts


def load_wan(source, *, part, config="ti2v_5b", dtype=torch.float32, device="cpu", random_init=False,
             expert="transformer"):
    """Loads a part of Wan: "transformer" | "vae" | "text_encoder" (modules in eval mode) | "tokenizer".

    source: a diffusers folder, or a hub id that `hf download` put in the cache (nothing is downloaded here);
    a folder of the official files; or, for a transformer, one file of weights (vidar.pt), with official or
    diffusers' names. A diffusers folder or hub id uses its own config.
    config: a name in WAN, or a dict like its entries, for any size of the same classes.
    random_init: random weights in the shapes of `config`, created on `device` (or "meta") in dtype; `source`
    is not read. The tokenizer is then ByT5's, with a token per byte: vocab_size 259.
    expert: "transformer", or "transformer_2", A14B's low-noise expert (official low_noise_model/).
    dtype: as in diffusers, in bf16 a transformer's norms, time embedder and modulation stay fp32. FSDP2 needs
    one dtype for all trained parameters of a block, so a transformer that is fully trained is loaded in fp32.
    Frozen parameters may be mixed, as in a bf16 base under an fp32 LoRA.
    Raises UserError, with a one-line message, where files are missing or do not fit.
    """
    config = WAN[config] if isinstance(config, str) else config
    if random_init:
        from transformers import ByT5Tokenizer
        if part == "tokenizer":
            return ByT5Tokenizer(extra_ids=0)
        return build_wan(part, config[part], dtype, device)
    path, name = Path(source).expanduser(), expert if part == "transformer" else part
    hub = not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source))
    try:
        if not path.exists() and not hub:
            raise FileNotFoundError("there is no such file or folder")
        if part == "tokenizer":
            from transformers import AutoTokenizer
            official = path / "google" / "umt5-xxl"
            if official.is_dir():
                return AutoTokenizer.from_pretrained(official)
            return AutoTokenizer.from_pretrained(source if hub else path, subfolder="tokenizer",
                                                 local_files_only=True)
        if not hub and not (path / name).is_dir():
            return build_wan(part, config[part], dtype, device, read_official(path, part, expert, config))
        key = "dtype" if part == "text_encoder" else "torch_dtype"
        model, info = wan_class(part).from_pretrained(
            source if hub else path, subfolder=name, output_loading_info=True, local_files_only=True,
            **{key: dtype})
        if info["missing_keys"]:      # the libraries would warn and fill in random weights
            raise ValueError(f"its files lack {sorted(info['missing_keys'])[0]}")
        return model.to(device).eval()
    except Exception as error:        # each reader raises its own types
        target = source if hub else f"{config.get('repo')} --local-dir {source}"
        downloadable = hub or "repo" in config and path.suffix not in (".pt", ".pth", ".safetensors")
        raise UserError(f"cannot load Wan's {name} from {source} ({reason(error)})"
                        + (f": hf download {target}" if downloadable else "")) from error


def wan_class(part):
    """The class of a part, from diffusers or transformers."""
    import diffusers
    import transformers
    return {"transformer": diffusers.WanTransformer3DModel, "vae": diffusers.AutoencoderKLWan,
            "text_encoder": transformers.UMT5EncoderModel}[part]


def build_wan(part, config, dtype, device, weights=None):
    """A part from its config, with official (or diffusers') weights, which must fit, or with random ones."""
    from accelerate import init_empty_weights
    from transformers import UMT5Config
    model_class, default_dtype = wan_class(part), torch.get_default_dtype()
    arguments = {"config": UMT5Config(**config)} if part == "text_encoder" else config
    if weights is None:
        try:
            torch.set_default_dtype(dtype)
            with torch.device(device):
                model = model_class(**arguments)
        finally:
            torch.set_default_dtype(default_dtype)
    else:
        with init_empty_weights():                         # buffers stay real: no file has RoPE's
            model = model_class(**arguments)
        model.load_state_dict(diffusers_names(weights, part), assign=True)
        if torch.device(device).type == "meta":            # enough to know that the weights fit
            return model.to(device)
        if part == "text_encoder":
            model.tie_weights()
    fp32_modules = set(model_class._keep_in_fp32_modules or ()) if part == "transformer" else set()
    for name, p in model.named_parameters():
        p.data = p.data.to(device, torch.float32 if fp32_modules & set(name.split(".")) else dtype)
    return model.to(device).eval()


WEIGHTS = "diffusion_pytorch_model.safetensors"


def read_official(path, part, expert, config):
    """A file of weights, or a part's files in an official folder -> {name: tensor} without prefixes."""
    files = [path]
    if path.is_dir() and part == "transformer":
        noise = path / ("low_noise_model" if expert == "transformer_2" else "high_noise_model")
        path = noise if noise.is_dir() or expert == "transformer_2" else path
        files, index = [path / WEIGHTS], path / f"{WEIGHTS}.index.json"
        if index.is_file():
            shards = json.loads(index.read_text())["weight_map"].values()
            files = [path / shard for shard in sorted(set(shards))]
    elif path.is_dir():
        vae = f"Wan2.{2 if config.get('vae', {}).get('is_residual') else 1}_VAE.pth"
        files = [path / (vae if part == "vae" else "models_t5_umt5-xxl-enc-bf16.pth")]
    weights = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")
        weights.update(load_file(file) if file.suffix == ".safetensors" else
                       torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    for key in ("model", "state_dict", "generator_ema", "generator"):
        weights = weights[key] if isinstance(weights.get(key), dict) else weights
    return {re.sub(r"^((model|module|_orig_mod)\.)+", "", name): value for name, value in weights.items()}


T5_NAMES = {"token_embedding": "shared", "blocks.": "encoder.block.", "norm1": "layer.0.layer_norm",
            "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
            "attn.": "layer.0.SelfAttention.", "norm2": "layer.1.layer_norm",
            "ffn.gate.0": "layer.1.DenseReluDense.wi_0", "ffn.fc1": "layer.1.DenseReluDense.wi_1",
            "ffn.fc2": "layer.1.DenseReluDense.wo"}
VAE_NAMES = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
             "shortcut": "conv_shortcut"}


def diffusers_names(weights, part):
    """Official names -> diffusers' (UMT5: transformers'), by diffusers' own converters where it has them."""
    from diffusers.loaders import single_file_utils as utils
    if part == "transformer":         # only once: the converter swaps norm2 and norm3
        official = any(".self_attn." in name for name in weights)
        return utils.convert_wan_transformer_to_diffusers(weights) if official else weights
    if part == "text_encoder":
        named = {}
        for name, value in weights.items():
            name = re.sub(r"^norm\b", "encoder.final_layer_norm", name)
            for old, new in T5_NAMES.items():
                name = name.replace(old, new)
            named[name] = value
        return {**named, "encoder.embed_tokens.weight": named["shared.weight"]}

    def nested(match):                # blocks of the Wan2.2 VAE, which diffusers 0.42's converter lacks
        side, block, i, layer, suffix = match.groups()
        if layer in VAE_NAMES:
            return f"{side}_blocks.{block}.resnets.{i}.{VAE_NAMES[layer]}.{suffix}"
        return f"{side}_blocks.{block}.{side}sampler.{layer}.{suffix}"

    pattern = r"(down|up)samples\.(\d+)\.\1samples\.(\d+)\.(.+)\.(\w+)"
    return utils.convert_wan_vae_to_diffusers({re.sub(pattern, nested, k): v for k, v in weights.items()})


OFFICIAL_NAMES = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1", "proj_out": "head.head", "attn1": "self_attn",
    "attn2": "cross_attn", ".to_out.0": ".o", ".to_q": ".q", ".to_k": ".k", ".to_v": ".v",
    ".norm2.": ".norm3.", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}


def official_names(weights):
    """diffusers' names of a transformer's weights -> official ones: the inverse of diffusers_names."""
    named = {}
    for name, value in weights.items():
        for old, new in OFFICIAL_NAMES.items():
            name = name.replace(old, new)
        name = "head.modulation" if name == "scale_shift_table" else name
        named[name.replace("scale_shift_table", "modulation")] = value
    return named


def latent_scale(vae, device):
    """(mean, std) of the VAE's latents, each 1 C 1 1 1 and float32."""
    return [torch.tensor(value, device=device).view(1, -1, 1, 1, 1)
            for value in (vae.config.latents_mean, vae.config.latents_std)]


def wan_encode(vae, x):
    """Video B T C H W in [-1, 1], T = 4k + 1 -> float32 latents B C F h w, (mode - mean) / std per channel.

    Differentiable. Raises ValueError for another T, whose last frames the VAE would drop silently.
    """
    if x.shape[1] % 4 != 1:
        raise ValueError(f"Wan's VAE takes 4k + 1 frames, not {x.shape[1]}")
    mean, std = latent_scale(vae, x.device)
    mode = vae.encode(x.transpose(1, 2).to(getattr(vae, "dtype", x.dtype))).latent_dist.mode()
    return (mode.float() - mean) / std


def wan_decode(vae, z):
    """Inverse of wan_encode: latents B C F h w -> float32 video B T C H W, clamped to [-1, 1]."""
    mean, std = latent_scale(vae, z.device)
    x = vae.decode((z.float() * std + mean).to(getattr(vae, "dtype", z.dtype))).sample
    return x.float().clamp(-1, 1).transpose(1, 2)


class LinearCodec:
    """AutoencoderKLWan's interface at a size that has no pretrained weights: linear, causal, 8 times smaller
    in space, 4 in time.

    encode: principal components of 8x8 patches in the first frame; in later frames, of 4x8x8 patches minus
    the first frame's patch, so that a static scene has zero latents and a model need not learn to copy.
    decode: each patch from the latents of 3x3 cells, by ridge regression. Patches decoded from their own cell
    alone would have visible edges; the neighbours' latents tell how the picture continues.
    """
    side, dtype = 8, torch.float32

    def __init__(self, tensors, device="cpu"):
        """tensors: mean p, first z p and later z 4p, whose rows are orthonormal, first_scale, later_scale z,
        first_decoder p 9z, later_decoder 4p 18z, of patches of p = 3 * 8 * 8 numbers."""
        self.tensors = {name: value.to(device) for name, value in tensors.items()}
        z_dim = len(tensors["first"])
        self.config = SimpleNamespace(latents_mean=[0.] * z_dim, latents_std=[1.] * z_dim, z_dim=z_dim)

    @classmethod
    @torch.no_grad()
    def fit(cls, videos, z_dim, flatness=.5, ridge=100):
        """videos B T C H W in [-1, 1]. A latent's std is proportional to its component's ** (1 - flatness).
        At 1 all are equal, and a model spends its capacity on detail; at 0 little noise already hides detail.
        ridge: number of virtual patches in the decoders' regression to which the 3x3 cells add nothing."""
        rows = lambda part: part.movedim(1, -1).flatten(0, -2)                   # n p
        first, later = cls.patches(videos.transpose(1, 2))
        codec = cls({"mean": rows(first).mean(0), "first": torch.zeros(z_dim, first.shape[1])})

        def fit_components(name, part):          # z_dim principal components of rows n p, not centred
            values, vectors = torch.linalg.eigh((part.T @ part / len(part)).double())
            std = values.flip(0)[:z_dim].clamp(min=1e-12).sqrt().float()
            scale = std ** flatness
            codec.tensors |= {name: vectors.T.flip(0)[:z_dim].float(),
                              f"{name}_scale": scale * (std / scale).square().mean().sqrt()}

        fit_components("first", rows(first) - codec.tensors["mean"])
        fit_components("later", rows(later - codec.static_patches(codec.project("first", first), later)))
        codec.fit_decoders(videos, ridge)
        return codec

    def fit_decoders(self, videos, ridge):
        """Initialises the decoders with the components in the middle cell, and adds a regression of the
        residuals on all cells. Mirrored videos double the training data."""
        rows = lambda part: part.movedim(1, -1).flatten(0, -2)                   # n p
        for name in ("first", "later"):
            basis = (self.tensors[name] * self.tensors[f"{name}_scale"][:, None]).T           # p z
            self.tensors[f"{name}_decoder"] = F.pad(basis, [4 * basis.shape[1]] * 2)          # cell 4 of 9
        static = self.tensors["first_decoder"].repeat(4, 1)
        self.tensors["later_decoder"] = torch.cat([self.tensors["later_decoder"], static], dim=1)
        sums = {"first": [0, 0, 0], "later": [0, 0, 0]}
        for video in (*videos.split(1), *videos.flip(-1).split(1)):
            z = self.encode(video.transpose(1, 2)).latent_dist.mode()
            residuals = self.patches(video.transpose(1, 2) - self.decode(z).sample)
            for name, part in zip(sums, residuals):
                context = rows(self.context(name, z))
                sums[name][0] += (context.T @ context).double()
                sums[name][1] += (context.T @ rows(part)).double()
                sums[name][2] += len(context)
        for name, (gram, cross, count) in sums.items():
            gram.diagonal().add_(ridge / count * gram.diagonal().mean())
            self.tensors[f"{name}_decoder"] += torch.linalg.solve(gram, cross).T.float()

    @classmethod
    def patches(cls, x):
        """B C T H W -> first frame's B p 1 h w and the others' B 4p F-1 h w."""
        parts = []
        for part, length in ((x[:, :, :1], 1), (x[:, :, 1:], 4)):
            part = part.unflatten(2, (-1, length)).unflatten(4, (-1, cls.side)).unflatten(6, (-1, cls.side))
            parts.append(part.permute(0, 3, 1, 5, 7, 2, 4, 6).flatten(1, 4))   # B (t C y x) F h w
        return parts

    def project(self, name, part):
        """B p F h w -> B z F h w."""
        rows = self.tensors[name] / self.tensors[f"{name}_scale"][:, None]
        part = part - expand_to(self.tensors["mean"], part[0]) if name == "first" else part
        return torch.einsum("dp,bpfhw->bdfhw", rows, part)

    def static_patches(self, z, like):
        """The first frame's latents B z 1 h w -> patches that repeat it in later frames, shaped as `like`."""
        rows = self.tensors["first"] * self.tensors["first_scale"][:, None]
        part = torch.einsum("dp,bdfhw->bpfhw", rows, z)
        part = part + expand_to(self.tensors["mean"], part[0])
        return part.repeat(1, 4, 1, 1, 1).expand_as(like)

    def context(self, name, z):
        """Latents B z F h w -> inputs of the decoder of the first frame (B 9z 1 h w) or of others (B 18z F-1
        h w): 3x3 cells, zero-padded, of the frame itself and, for later frames, of the first frame."""
        h, w = z.shape[-2:]
        padded = F.pad(z, (1, 1, 1, 1))
        cells = torch.cat([padded[..., y:y + h, x:x + w] for y in range(3) for x in range(3)], dim=1)
        first, later = cells[:, :, :1], cells[:, :, 1:]
        return first if name == "first" else torch.cat([later, first.expand_as(later)], dim=1)

    def encode(self, x):
        first, later = self.patches(x)
        z = self.project("first", first)
        if later.shape[2]:
            z = torch.cat([z, self.project("later", later - self.static_patches(z, later))], dim=2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z))

    def decode(self, z):
        if "first_decoder" not in self.tensors:
            raise UserError("the codec is of an earlier version: remove its cache folder and run again")
        x = []
        for name, length in (("first", 1), ("later", 4)):
            mean = self.tensors["mean"].repeat(length)[:, None, None]
            for cells in self.context(name, z).unbind(2):      # one at a time: streaming gives equal bits
                part = torch.einsum("pk,bkhw->bphw", self.tensors[f"{name}_decoder"], cells) + mean
                x.append(F.pixel_shuffle(part, self.side).unflatten(1, (length, 3)).transpose(1, 2))
        return SimpleNamespace(sample=torch.cat(x, dim=2))


@torch.no_grad()
def encode_text(tokenizer, encoder, prompts, length=512):
    """Prompts -> list of embeddings L D, as in WanPipeline but without padding, which pad_text adds."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean
    texts = []
    for prompt in prompts:            # one at a time: 512 tokens keep a GPU busy
        tokens = tokenizer([prompt_clean(prompt)], padding="max_length", max_length=length, truncation=True,
                           return_tensors="pt").to(encoder.device)
        embedding = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
        texts.append(embedding[:int(tokens.attention_mask.sum())].clone())
    return texts


def pad_text(texts, length=512):
    """List of L D -> B length D, zero-padded. Wan has no text mask: it attends to the zeros as well."""
    return torch.stack([F.pad(text, (0, 0, 0, length - len(text))) for text in texts])


def save_lora(folder, transformer, weights=None):
    """Writes folder/pytorch_lora_weights.safetensors, which diffusers' pipeline.load_lora_weights takes.

    weights: the full state, from gather_state(), where the transformer is sharded. One folder per expert:
    load_lora_weights(folder, load_into_transformer_2=True). -> path.
    """
    from diffusers.loaders import WanLoraLoaderMixin  # the pipeline's base, without its warnings
    from peft import get_peft_model_state_dict
    tmp, path = Path(folder, ".tmp_lora.safetensors"), Path(folder, "pytorch_lora_weights.safetensors")
    WanLoraLoaderMixin.save_lora_weights(
        folder, get_peft_model_state_dict(transformer, weights), weight_name=tmp.name,
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict())     # rank, alpha
    return tmp.replace(path)


# ---- run files ------------------------------------------------------------------------------------------

def one_line_errors(script, work):
    """Calls work() -> exit code. Errors that the user can fix (UserError, a full disk, too little memory)
    and the death of another process become one line and 2. os._exit does not wait for other ranks."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    SIGTERMS.clear()
    try:
        work()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:                      # as in `script --dry_run | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except UserError as error:
        message = str(error)
    except OSError as error:                     # h5py's messages have several lines
        message = reason(error)
    except (MemoryError, RuntimeError) as error:
        if re.search("out of memory|t allocate memory|Unable to allocate", str(error)):
            message = f"out of memory (a smaller --batch_size needs less): {reason(error)}"
        elif world > 1 and re.search("gloo|nccl|peer|connection|timed out|socket", str(error), re.I):
            message = f"another process of this run died, so this one stops: {reason(error)}"
        else:
            raise
    except KeyboardInterrupt:
        message = "interrupted"
    for bar in list(getattr(tqdm, "_instances", ())):          # or the message would continue its line
        bar.close()
    rank = f" (rank {os.environ['RANK']})" if world > 1 else ""
    print(f"{script}: error{rank}: {message}", file=sys.stderr, flush=True)
    if world > 1:
        os._exit(2)
    return 2


def finite(value):
    """Replaces NaN and infinity, which JSON lacks, by None (null) in nested dicts and lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    """Writes finite(value) to a JSON file, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".tmp_{path.name}")
    tmp.write_text(json.dumps(finite(value), indent=1, allow_nan=False) + "\n")
    tmp.replace(path)


def append_jsonl(path, row):
    """Appends finite(row) as a line of JSON, in a single write, so that a kill leaves no partial line."""
    with open(path, "a") as file:
        file.write(json.dumps(finite(row), allow_nan=False) + "\n")


def open_trackers(folder, tensorboard=False, wandb=None, config=None, purge_step=None):
    """-> functions (step, {name: number, or the Path of a .png}) that log to TensorBoard files in `folder`
    and to the W&B run named after it, which is started unless it is already this process's current run.

    purge_step: TensorBoard discards events that an earlier process logged from this step on. UserError where
    a package is missing.
    """
    trackers = []
    try:
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(folder, purge_step=purge_step)

            def log_events(step, values):
                for name, value in values.items():
                    if isinstance(value, Path):
                        writer.add_image(name, iio.imread(value), step, dataformats="HWC")
                    else:
                        writer.add_scalar(name, value, step)
                writer.flush()
            trackers.append(log_events)
        if wandb:
            import wandb as client
            if client.run is None or client.run.name != str(folder):       # each stage is a separate run
                client.finish()
                client.init(project=wandb, name=str(folder), config=config)
            trackers.append(lambda step, values: client.log({"step": step, **{
                name: client.Image(str(value)) if isinstance(value, Path) else value
                for name, value in values.items()}}))
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install {error.name}") from error
    return trackers


def show_results(folder, written, tensorboard=False, wandb=None):
    """Prints the files that evaluation and sampling have `written`, and logs eval.json's results and every
    .png to the trackers, at the step of the newest checkpoint. Call it on rank 0.

    The W&B run is that of this process's training; --sample or --eval alone start another one.
    """
    folder, newest, values = Path(folder), latest_checkpoint(Path(folder) / "ckpt"), {}
    for path in map(Path, written) if tensorboard or wandb else ():
        if path.suffix == ".png":
            values[str(path.relative_to(folder).with_suffix(""))] = path
        elif path.name == "eval.json":
            results = json.loads(path.read_text())["results"]
            values |= {f"eval/{name}": value for name, value in results.items() if value is not None}
    for track in open_trackers(folder, tensorboard, wandb):
        track(int(newest.name[5:]) if newest else 0, values)
    if (folder / "args.json").is_file():
        write_report_page(folder)
    print("wrote " + ", ".join(written))


class Log:
    """A stage's records on rank 0: progress bar, folder/metrics.jsonl, and on request TensorBoard and W&B.

    Creating it removes rows after step `start`, also from TensorBoard: the resumed run writes them again.
    """

    def __init__(self, folder, name, start, total, rank=0, tensorboard=False, wandb=None, config=None,
                 log_every=10):
        self.path, self.name, self.rank = Path(folder) / "metrics.jsonl", name, rank
        self.log_every = log_every
        self.totals = {}                         # name -> sum and count since the last row
        self.clock = time.time()
        self.steps_since_row = 0
        self.bar = tqdm(total=total, initial=start, desc=name, unit="step", disable=rank > 0, mininterval=1)
        if rank > 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        rows = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
        tmp = self.path.with_name(f".tmp_{self.path.name}")
        tmp.write_text("".join(row + "\n" for row in rows))
        tmp.replace(self.path)
        self.trackers = open_trackers(folder, tensorboard, wandb, config, purge_step=start + 1)

    def add(self, **terms):
        """Accumulates a micro-step's loss and terms: scalars, or a value per sample, where NaN is ignored."""
        for name, value in terms.items():
            value = torch.as_tensor(value, dtype=torch.float32).detach()
            total = torch.stack([value.nansum(), (~value.isnan()).sum()])
            self.totals[name] = self.totals.get(name, 0) + total

    def step(self, step, **values):
        """Ends a step; every log_every steps writes `values` and means of the terms. Call it on all ranks."""
        self.bar.update()
        self.steps_since_row += 1
        if not self.log_every or step % self.log_every:
            return
        for name, total in self.totals.items():
            total, count = all_mean(total).tolist()
            if count:
                values[name] = total / count
        values["seconds_per_step"] = (time.time() - self.clock) / self.steps_since_row
        self.row(step, **{name: float(value) for name, value in values.items()})
        self.totals = {}
        self.restart_clock()

    def restart_clock(self):
        """Excludes the time until now, such as that of a validation, from seconds_per_step."""
        self.clock = time.time()
        self.steps_since_row = 0

    def row(self, step, **values):
        if self.rank == 0:
            append_jsonl(self.path, {"step": step, **values})
            for track in self.trackers:
                track(step, {f"{self.name}/{key}": value for key, value in values.items()})
            losses = {key: f"{value:.4g}" for key, value in values.items() if key in ("loss", "val_loss")}
            self.bar.set_postfix(losses, refresh=False)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem }}
img, video {{ max-width: 100%; height: auto }} h1, figcaption {{ overflow-wrap: anywhere }}
pre, .wide {{ overflow-x: auto }} table {{ border-collapse: collapse }}
td, th {{ padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #8886 }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def html_table(header, rows):
    """Header cells as plain text, rows of cells as HTML -> HTML."""
    rows = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    return f'<div class="wide"><table><tr>{header}</tr><tr>{"</tr><tr>".join(rows)}</tr></table></div>'


def format_headline(folder):
    """"mse 355.3; mean frame 558.3; lower is better", of a run's eval.json."""
    if not (folder / "eval.json").is_file():
        return "not evaluated yet"
    results = read_json(folder / "eval.json")
    metric, value, baseline, lower = results["headline"].values()
    names = [name for name, scores in results["baselines"].items() if scores.get(metric) == baseline]
    number = "{:.4g}".format
    return (f"{metric} {'-' if value is None else number(value)}; {(names or ['baseline'])[0]} "
            f"{'-' if baseline is None else number(baseline)}; {'lower' if lower else 'higher'} is better")


def write_report_page(folder):
    """Writes <folder>/report.html: a run's results, curves, videos, flags and commands, with relative links.
    If the parent folder is named runs, updates its index.html, too."""
    folder = Path(folder).absolute()
    args = read_json(folder / "args.json")
    parts = [f"<p><b>{html.escape(format_headline(folder))}</b></p>"]
    if (folder / "eval.json").is_file():
        results = read_json(folder / "eval.json")
        methods = {"model": results["results"], **results["baselines"]}
        rows = [[html.escape(metric), *("-" if scores.get(metric) is None else f"{scores[metric]:.4g}"
                                        for scores in methods.values())] for metric in results["results"]]
        means = [row for row in rows if not re.search(r"_h\d+$", row[0])]           # over all horizons
        parts += [f"<p>Data: {html.escape(results['data'])}. Weights: {html.escape(results['weights'])}.</p>",
                  html_table(["metric", *methods], means)]
        if len(means) < len(rows):
            table = html_table(["metric", *methods], rows)
            parts.append(f"<details><summary>every horizon</summary>{table}</details>")
    for path in [folder / "curves.png", *sorted((folder / "samples").glob("*"))]:
        name = path.relative_to(folder).as_posix()
        link, label = urllib.parse.quote(name), html.escape(name)
        if path.suffix == ".mp4":
            parts.append(f'<figure><video controls loop muted playsinline src="{link}" aria-label="{label}">'
                         f'</video><figcaption>{label}</figcaption></figure>')
        elif path.suffix == ".png" and path.is_file():
            parts.append(f'<figure><img src="{link}" alt="{label}"><figcaption>{label}</figcaption></figure>')
    command = html.escape(args["command"])
    changed = [[f"--{name}", html.escape(str(value))] for name, value in args.get("changed", {}).items()]
    parts += [f"<h2>Commands</h2><p>This run, and the same trained longer:</p><pre>{command}\n{command} "
              f"--max_steps {2 * args['max_steps']}</pre>", html_table(["flag", "value"], changed),
              f"<p>Preset {args['preset']}, torch {args['torch']}, commit {args['git']}</p>"]
    page = PAGE.format(title=html.escape(folder.name), body="\n".join(parts))
    (folder / "report.html").write_text(page, encoding="utf-8")
    if folder.parent.name == "runs":
        write_index_page(folder.parent)


def write_index_page(root):
    """Writes <root>/index.html: runs with headline, preset, date and a picture, the newest first."""
    rows = []
    pages = [page for page in root.glob("*/report.html") if (page.parent / "args.json").is_file()]
    for page in sorted(pages, key=os.path.getmtime, reverse=True):
        name, link = html.escape(page.parent.name), urllib.parse.quote(page.parent.name)
        preset = read_json(page.parent / "args.json")["preset"]
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(page.stat().st_mtime))
        pictures = [f'<img src="{link}/samples/{urllib.parse.quote(path.name)}" alt="{name}" width="320">'
                    for path in sorted((page.parent / "samples").glob("*.png"))[:1]]
        rows.append([f'<a href="{link}/report.html">{name}</a>', html.escape(format_headline(page.parent)),
                     preset, date, *pictures])
    table = html_table(["run", "headline", "preset", "date", "sample"], rows)
    (root / "index.html").write_text(PAGE.format(title="Runs", body=table), encoding="utf-8")


def open_log(script, stage, args, start, total):
    """The Log of a stage ("." for the run itself), with the trackers that the flags ask for."""
    if start >= total:
        print_once(f"trained for {start} of {total} steps: raise --max_steps, or use a new --output_dir")
    return Log(Path(args.output_dir, stage), f"{script} {stage}".strip(" ."), start, total,
               int(os.environ.get("RANK", 0)), args.tensorboard, args.wandb, vars(args), args.log_every)


def horizon_means(tables):
    """A list of {metric: N T}, T horizons -> {metric: mean, metric_h01: at horizon 1, ...}, NaN ignored."""
    means = {}
    for name in tables[0]:
        values = torch.cat([table[name].cpu() for table in tables])
        means[name] = values.nanmean().item()
        means |= {f"{name}_h{h:02d}": value.item() for h, value in enumerate(values.nanmean(0), 1)}
    return means


def print_table(rows, columns):
    """Prints {row name: {column: number}}, with a dash for missing values."""
    margin = max(map(len, rows)) + 2
    widths = [max(10, len(name) + 2) for name in columns]
    print(" " * margin + "".join(f"{name:>{width}}" for name, width in zip(columns, widths)))
    for row, values in rows.items():
        cells = [f"{values[name]:.4g}" if values.get(name) is not None else "-" for name in columns]
        print(f"{row:<{margin}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))


def wants_evaluation(args):
    """Whether to evaluate: after training, with --eval, or with --sample where eval.json is missing or older
    than the newest checkpoint."""
    scores, newest = Path(args.output_dir, "eval.json"), latest_checkpoint(Path(args.output_dir, "ckpt"))
    stale = not scores.is_file() or newest and newest.stat().st_mtime > scores.stat().st_mtime
    return bool(not args.sample or args.eval or stale)


def pick_cases(folder, names, count=3):
    """Picks held-out clips by their scores in folder/eval.json -> {"best": i, "median": j, "worst": k}, which
    are indices into `names`, the clips' names. A `count` other than 3 picks further evenly spaced ranks."""
    scores = read_json(Path(folder, "eval.json")).get("clips", {})
    order = [names.index(name) for name in scores if name in names]              # the best comes first
    if not order:
        raise UserError(f"{folder}/eval.json has no scores of these clips: --eval computes them")
    last = len(order) - 1
    titles = {last // 2: "median", last: "worst", 0: "best"}
    ranks = [int(rank) for rank in np.linspace(0, last, count)]
    return {titles.get(rank, f"rank_{rank + 1}"): order[rank] for rank in ranks}


def report(script, args, weights, began, headline, results, baselines, columns, clips, curves=(),
           stages=(".",), panels=()):
    """Writes eval.json and curves.png, and prints a table with a row per method and `columns` of metrics.

    weights: origin of the weights, None for --weights_from or the tiny model. headline: (metric, name of its
    baseline, whether lower is better). results: {metric: number}; baselines: {name: {metric: number}}.
    clips: {name: headline metric, or a score of equal direction} of the held-out clips. curves: metrics with
    values per horizon (horizon_means). stages: folders whose losses are drawn. panels: further panels
    for plot_curves. began: time.time() at the start. -> the two files.
    """
    folder = Path(args.output_dir)
    weights = weights or ("tiny, trained by this run" if args.model == "tiny" else args.weights_from)
    metric, baseline, lower = headline
    clips = sorted(((name, score) for name, score in clips.items() if math.isfinite(score)),
                   key=lambda clip: clip[1], reverse=not lower)
    write_json(folder / "eval.json", {
        "script": script, "preset": args.preset, "data": describe_data(args.data_dir), "weights": weights,
        "seconds": time.time() - began, "headline": {"metric": metric, "value": results[metric],
                                                     "baseline": baselines[baseline][metric],
                                                     "lower_is_better": lower},
        "results": results, "baselines": baselines, "clips": dict(clips)})
    methods = {"model": results, **baselines}
    print_table(methods, columns)
    losses = [loss_panel(folder / stage, "loss" if stage == "." else f"loss, {stage}") for stage in stages]
    panels = [*(panel for panel in losses if panel["lines"]), *panels]       # none for reused stages
    for name in curves:
        lines = {}
        for method, values in methods.items():
            points = [value for key, value in values.items() if re.fullmatch(rf"{name}_h\d+", key)]
            lines |= {method: (list(range(1, len(points) + 1)), points)} if points else {}
        panels.append({"title": name, "xlabel": "horizon (frames)", "ylabel": name, "lines": lines})
    plot_curves(folder / "curves.png", panels)
    return [f"{folder}/eval.json", f"{folder}/curves.png"]


def file_version(path):
    """Size and modification time of a file, as text that changes with it; "" where there is no file."""
    if not path.is_file():
        return ""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def cache_path(args, recipe):
    """Folder of a cache that depends on the lines of `recipe`: in the data set, or in the run where the data
    set is read-only."""
    root = args.data_dir if os.access(args.data_dir, os.W_OK) else args.output_dir
    return Path(root, "cache", hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16])


def describe_data(root):
    """The data set's folder and its source, which prepare.py writes into dataset_stats.json."""
    try:
        source = read_json(Path(root) / "dataset_stats.json")["source"]
    except (UserError, TypeError, KeyError):     # no such file, or not from prepare.py
        source = "source not recorded"
    return f"{root} ({source})"


def loss_panel(folder, title, keys=("loss", "val_loss")):
    """Columns of folder/metrics.jsonl -> a panel for plot_curves; columns without values are omitted."""
    path = Path(folder) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    lines = {key: tuple(zip(*points)) for key in keys
             if (points := [(row["step"], row[key]) for row in rows if row.get(key) is not None])}
    return {"title": title, "xlabel": "step", "ylabel": "loss", "log": True, "lines": lines}


def plot_curves(path, panels):
    """Draws a panel per entry of [{"title", "xlabel", "ylabel", "lines": {name: (xs, ys)}, "log",
    "bars": (xs, heights)}] side by side."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels):
        if "bars" in panel:
            axis.bar(*panel["bars"], color="0.8", edgecolor="0.4")
        for name, (xs, ys) in panel["lines"].items():
            axis.plot(xs, ys, label=name, marker="." if len(xs) < 40 else None)
        axis.set(title=panel["title"], xlabel=panel["xlabel"], ylabel=panel["ylabel"],
                 yscale="log" if panel.get("log") else "linear")
        axis.grid(alpha=.3)
        if panel["lines"]:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def provenance():
    """{"python", "torch", "git", "command"} of this run, for args.json. "git" may be None."""
    root = Path(__file__).parent
    # Without git, the shell fails, where a list of arguments would raise FileNotFoundError.
    git = subprocess.run("git rev-parse HEAD", shell=True, capture_output=True, text=True, cwd=root)
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = f"torchrun --nproc_per_node={processes}" if processes else "python"
    return {"python": sys.version.split()[0], "torch": torch.__version__, "git": git.stdout.strip() or None,
            "command": f"{launcher} {shlex.join(sys.argv)}"}


def dry_run_report(name, model, loss, samples, tokens, world=1, sharded=False):
    """Text on one training step of a model on the meta device: parameters, tokens, FLOPs, bytes per device.

    loss: () -> scalar for `samples` samples. FLOPs are torch's count over forward and backward, activations
    what autograd saves. Weights, gradients and AdamW's moments are divided by `world` when sharded.
    """
    from torch.utils.flop_counter import FlopCounterMode
    saved = {}

    def save_tensor(tensor):                                       # stays alive, so that ids are unique
        if not isinstance(tensor, torch.nn.Parameter):
            saved[id(tensor)] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(save_tensor, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        loss().backward()
    share = world if sharded else 1
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / share
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / share
    sizes = {"weights": weights, "gradients": trained, "optimizer": 2 * trained,
             "activations": sum(t.numel() * t.element_size() for t in saved.values())}
    sizes["total"] = sum(sizes.values())
    return (f"{name}: {count_params(model):,} parameters, {count_params(model, True):,} trainable, "
            f"{tokens} tokens per sample\n"
            f"  {counter.get_total_flops():.3e} FLOPs per step and process of {samples} samples, "
            f"{world} process(es){', sharded' if sharded else ''}\n"
            f"  GB per device: " + ", ".join(f"{k} {v / 1e9:.3f}" for k, v in sizes.items()))
