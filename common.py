"""common.py: tensor utilities and run files shared by the scripts. Verified once, by test_smoke.py.

Tensors      seed_all draw expand_to to_uint8 from_uint8 resize_video timestep_embedding ema_update
             count_params all_mean
Metrics      mse psnr ssim fair_crps frechet_distance
Video        ffmpeg read_video write_video video_grid
Checkpoints  save_checkpoint load_checkpoint latest_checkpoint find_checkpoint gather_state restore_state
             save_weights load_weights
Run files    UserError one_line_errors write_json append_jsonl Log plot_curves provenance dry_run_report

Shapes: B batch, T frames, C channels, H W pixels. A video is B T C H W (or T C H W) in [-1, 1] unless a name
says otherwise.
Nothing here parses arguments, trains, samples or knows a model: that is what the scripts are for.
"""
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend. Its message is the one line that a script prints before exit code 2."""


# ---- tensors --------------------------------------------------------------------------------------------

def seed_all(seed, *salt):
    """Seeds python's, numpy's and torch's global generators from integers, as in seed_all(seed, step, rank).

    Seeding anew at every step makes all randomness (dropout too) a function of (seed, step, rank): a resumed
    run needs no generator state. Returns the mixed 63-bit seed, for torch.Generator().manual_seed().
    """
    low, high = np.random.SeedSequence([seed, *salt]).generate_state(2, np.uint32).tolist()
    random.seed(low)
    np.random.seed(low)
    mixed = low + ((high & 0x7FFFFFFF) << 32)
    torch.manual_seed(mixed)
    return mixed


def draw(kinds, seed, batch_size, rank=0, world=1, micro=0, grad_accum=1, device="cpu"):
    """Random numbers of a micro-batch: {name: ("randint", high) | ("rand",) | ("randn", *shape)} -> tensors.

    They are drawn for the whole step's batch (grad_accum x world x batch_size samples) and then sliced: two
    processes of 8 samples draw what one process of 16 draws, and a batch depends on the seed alone.
    """
    generator = torch.Generator(device).manual_seed(seed)
    everyone, first = batch_size * world * grad_accum, (micro * world + rank) * batch_size
    numbers = {}
    for name, (kind, *size) in kinds.items():
        if kind == "randint":
            value = torch.randint(size[0], (everyone,), generator=generator, device=device)
        else:
            value = getattr(torch, kind)(everyone, *size, generator=generator, device=device)
        numbers[name] = value[first:first + batch_size]
    return numbers


def expand_to(t, x):
    """(B,) -> (B, 1, ..., 1) with as many dimensions as x, to broadcast a per-sample number over x."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def to_uint8(x):
    """[-1, 1] floats -> 0..255 uint8 of the same shape, rounded and clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(x):
    """0..255 uint8 -> [-1, 1] float32 of the same shape."""
    return x.float() / 127.5 - 1


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


def timestep_embedding(t, dim, scale=1000.0, max_period=10000.0):
    """(B,) -> (B, dim): cos and sin of scale * t at dim / 2 geometric frequencies (Vaswani 2017, 3.5)."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = scale * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, in place, sharded or not; buffers are copied."""
    def local(tensors):
        return [t.to_local() if hasattr(t, "to_local") else t.detach() for t in tensors]
    torch._foreach_lerp_(local(ema.parameters()), local(model.parameters()), 1 - decay)
    for a, b in zip(ema.buffers(), model.buffers()):
        a.copy_(b)


def count_params(model, trainable_only=False):
    """Number of parameters of a module."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def all_mean(x):
    """Mean of a tensor or number over all processes, detached; the identity with one process."""
    x = torch.as_tensor(x, dtype=torch.float32).detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


# ---- metrics: float tensors in [0, 1], ... C H W -> ..., the mean over each image, never over images ------

def mse(a, b):
    """Mean squared error of each image, in float64."""
    return ((a.double() - b.double()) ** 2).mean(dim=(-3, -2, -1))


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


def fair_crps(members, truth, dim=0):
    """Continuous ranked probability score, elementwise: E|X - y| - E|X - X'| / 2, pairs over m (m - 1),
    so unbiased in the ensemble size (Ferro 2014). Members lie along `dim`; one's is its absolute error."""
    m = members.shape[dim]
    x = members.movedim(dim, 0).sort(dim=0).values
    rank = expand_to(2 * torch.arange(1, m + 1, device=x.device) - m - 1, x)   # sum |xi - xj| = 2 sum rank x
    return (x - truth).abs().mean(0) - (rank * x).sum(0) / max(1, m * (m - 1))


def frechet_distance(a, b):
    """Frechet distance of the Gaussians fitted to features a, b: N D. Float64, symmetric eigenproblems."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


# ---- video files ----------------------------------------------------------------------------------------

def ffmpeg(arguments, data=None):
    """Runs the ffmpeg that imageio brings, on bytes -> bytes. OSError with its last words where it fails."""
    from imageio.plugins.ffmpeg import get_exe
    done = subprocess.run([get_exe(), "-v", "error", *map(str, arguments)], input=data, capture_output=True)
    if done.returncode:
        raise OSError((done.stderr.decode(errors="replace").strip().splitlines() or ["ffmpeg failed"])[-1])
    return done.stdout


def read_video(path, side=None):
    """A video file -> T C H W uint8 (RGB). Raises UserError, naming the file, where it cannot be decoded.

    side: ffmpeg crops the centre and averages areas to side x side, which is anti-aliased and costs little.
    """
    import imageio.v3 as iio
    try:
        if side:
            scale = f"crop='min(iw,ih)':'min(iw,ih)',scale={side}:{side}:flags=area"
            rgb = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
            raw = ffmpeg(["-threads", 1, "-i", path, "-vf", scale, *rgb])
            frames = np.frombuffer(bytearray(raw), np.uint8).reshape(-1, side, side, 3)
        else:
            frames = np.stack([np.asarray(frame)[..., :3] for frame in iio.imiter(path)])
        if not len(frames):
            raise OSError("it has no frames")
        return torch.from_numpy(frames).permute(0, 3, 1, 2)
    except Exception as error:                 # every backend has its own; the user needs the file's name
        raise UserError(f"cannot read video {path}: {str(error).splitlines()[0][:100]}") from error


def write_video(path, x, fps=8, options=("-crf", "16", "-pix_fmt", "yuv420p")):
    """Writes x (T C H W, uint8 or [-1, 1]) by suffix: .mp4 (H.264, with ffmpeg's options), .gif, .png (the
    frames in a row). -> path."""
    import imageio.v3 as iio
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
        ffmpeg([*raw, "-i", "-", "-c:v", "libx264", *options, "-y", path], frames.tobytes())
    return str(path)


def video_grid(videos, scale=2, gap=4, columns=False):
    """Labelled videos in one picture per frame: {"truth": T C H W in [-1, 1], ...} -> T 3 H' W' uint8.

    One below the other with names on the left, or with columns=True side by side with names on top. Enlarged
    `scale` times without smoothing: a pixel stays a pixel.
    """
    from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.load_default(size=13)
    tiles = [to_uint8(v).expand(-1, 3, -1, -1).repeat_interleave(scale, -1).repeat_interleave(scale, -2).cpu()
             for v in videos.values()]
    T, _, H, W = tiles[0].shape
    left = 0 if columns else 12 + int(max(font.getlength(name) for name in videos))
    top = 20 if columns else 0
    corners = [(top, i * (W + gap)) if columns else (i * (H + gap), left) for i in range(len(tiles))]
    page = Image.new("RGB", (corners[-1][1] + W, corners[-1][0] + H), "gainsboro")
    for name, (y, x) in zip(videos, corners):
        middle = (x + W // 2, top // 2) if columns else (left // 2, y + H // 2)
        ImageDraw.Draw(page).text(middle, name, fill="black", font=font, anchor="mm")
    grid = torch.from_numpy(np.array(page)).permute(2, 0, 1).repeat(T, 1, 1, 1)
    for tile, (y, x) in zip(tiles, corners):
        grid[:, :, y:y + H, x:x + W] = tile
    return grid


# ---- checkpoints ----------------------------------------------------------------------------------------
# ckpt/step_000500/ holds a file per entry of the state, and meta.json, written last, with every file's size.
# The folder is written under another name and renamed when complete: a checkpoint is there whole, or not.

def save_checkpoint(folder, step, state, meta, keep_last=3):
    """Writes folder/step_XXXXXX atomically, then removes all but the newest `keep_last` (0: none). On rank 0.

    state: {name: flat dict of tensors, saved as safetensors, or what torch.load(weights_only=True) reads}.
    meta: JSON-able; "step" and "files" are added. Where the disk is full, raises UserError naming the newest
    complete checkpoint, having removed what it wrote and left older checkpoints alone.
    """
    folder = Path(folder)
    final, tmp = folder / f"step_{step:06d}", folder / f".tmp_step_{step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".tmp_*"):                        # of a killed save or a killed removal
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
        if final.exists():                                         # only a damaged one can be in the way
            final.rename(folder / f".tmp_damaged_{step:06d}")
        tmp.rename(final)
    except Exception as error:        # a full disk is OSError, RuntimeError or SafetensorError, by who wrote
        shutil.rmtree(tmp, ignore_errors=True)
        last = latest_checkpoint(folder) or "none"
        reason = str(error).splitlines()[0]
        raise UserError(f"could not save {final} ({reason}); the last complete one is {last}") from error
    for old in checkpoints(folder)[:-keep_last] if keep_last else []:
        old = old.rename(folder / f".tmp_old_{old.name}")          # first: a kill leaves no half of it
        shutil.rmtree(old)
    return final


def checkpoints(folder):
    """Complete checkpoints of a folder, oldest first."""
    found = [p.parent for p in Path(folder).glob("step_*/meta.json") if p.parent.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


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
    except Exception as error:        # a damaged zip, json or safetensors raise their own; the answer is one
        raise UserError(f"checkpoint {path} cannot be read ({str(error).splitlines()[0][:100]}): "
                        f"use an older one, --resume PATH") from error


def find_checkpoint(folder, script, resume):
    """What --resume auto|none|PATH means for a ckpt folder: -> (path, state, meta), or None to start anew.

    auto: the newest that can be read, with a warning where a newer one cannot. none: UserError if there are
    any. PATH: that checkpoint, or the newest of that run's folder.
    """
    if resume == "none":
        if checkpoints(folder):
            raise UserError(f"{folder} holds checkpoints, which --resume none would overwrite: choose "
                            f"another --output_dir")
        return None
    if resume != "auto":
        path = latest_checkpoint(Path(resume) / "ckpt") or Path(resume)
        return path, *load_checkpoint(path, script)
    problem = None
    for path in reversed(checkpoints(folder)):
        try:
            found = path, *load_checkpoint(path, script)
        except UserError as error:
            problem = problem or error
            continue
        if problem:
            print(f"warning: {problem}; going on from {path}", file=sys.stderr)
        return found
    if problem:
        raise problem
    return None


def save_weights(path, weights):
    """Exports {name: tensor} as one safetensors file; whole, or not there."""
    path = Path(path)
    tmp = path.with_name(f".tmp_{path.name}")
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, tmp)
    tmp.replace(path)


def load_weights(path):
    """Reads a safetensors file -> {name: tensor} on the CPU. UserError where it is absent or damaged."""
    try:
        return load_file(path)
    except Exception as error:        # SafetensorError, FileNotFoundError, ...: the user needs the name
        raise UserError(f"cannot read the weights {path}: {str(error).splitlines()[0][:100]}") from error


def gather_state(model, optimizer=None, everywhere=False):
    """Full state of a plain, DDP or fully_shard model: ({name: tensor}, optimizer state or {}).

    Collective: call it on all ranks. On the CPU of rank 0 and empty elsewhere, or with `everywhere` on each
    rank's device. The result holds no trace of how many processes trained.
    """
    from torch.distributed.checkpoint import state_dict as dcp
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=not everywhere)
    weights = dcp.get_model_state_dict(model, options=options)
    return weights, dcp.get_optimizer_state_dict(model, optimizer, options=options) if optimizer else {}


def restore_state(model, weights, optimizer=None, optimizer_state=None, source="checkpoint"):
    """Inverse of gather_state, on any number of processes. UserError, naming `source`, where they differ."""
    from torch.distributed.checkpoint import state_dict as dcp
    own = {name.removeprefix("module."): tuple(v.shape) for name, v in model.state_dict().items()}
    theirs = {name: tuple(v.shape) for name, v in weights.items()}
    for name in sorted(own.keys() | theirs.keys()):
        if own.get(name) != theirs.get(name):
            raise UserError(f"{source} does not fit this model: {name} is {theirs.get(name, 'absent')}, "
                            f"in the model {own.get(name, 'absent')}")
    options = dcp.StateDictOptions(full_state_dict=True, strict=True)
    dcp.set_model_state_dict(model, weights, options=options)
    if optimizer is not None:
        dcp.set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)


# ---- run files ------------------------------------------------------------------------------------------

def one_line_errors(script, work):
    """Calls work() -> exit code. What a user can mend (UserError, a full disk) becomes one line and 2; so
    does the death of another process under torchrun, where an orderly exit would wait for the dead."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    try:
        work()
        return 0
    except (UserError, OSError) as error:
        message = str(error)
    except RuntimeError as error:
        if world == 1 or not re.search("gloo|nccl|peer|connection|timed out|socket", str(error), re.I):
            raise
        message = f"another process of this run died, so this one stops: {str(error).splitlines()[0][:150]}"
    except KeyboardInterrupt:
        message = "interrupted"
    for bar in list(getattr(tqdm, "_instances", ())):          # else the line would follow a bar
        bar.close()
    rank = f" (rank {os.environ['RANK']})" if world > 1 else ""
    print(f"{script}: error{rank}: {message}", file=sys.stderr, flush=True)
    if world > 1:
        os._exit(2)
    return 2


def write_json(path, value):
    """Writes a JSON file whole or not at all; numbers that do not exist (NaN) become null, which JSON has."""
    def finite(v):
        if isinstance(v, dict):
            return {k: finite(x) for k, x in v.items()}
        return None if isinstance(v, float) and not math.isfinite(v) else v
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".tmp_{path.name}")
    tmp.write_text(json.dumps(finite(value), indent=1, allow_nan=False) + "\n")
    tmp.replace(path)


def append_jsonl(path, row):
    """Appends one JSON object as one line, in one write, so that a kill leaves whole lines."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


class Log:
    """A stage's records on rank 0: progress bar, folder/metrics.jsonl, and on request TensorBoard and W&B.

    Opening it removes rows beyond step `start`: the resumed run writes them again.
    """

    def __init__(self, folder, name, start, total, rank=0, tensorboard=False, wandb=None, config=None):
        self.path, self.name, self.rank, self.sinks = Path(folder) / "metrics.jsonl", name, rank, []
        self.bar = tqdm(total=total, initial=start, desc=name, unit="step", disable=rank > 0, mininterval=1)
        if rank > 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = [line for line in rows if line.endswith("}") and json.loads(line)["step"] <= start]
        self.path.write_text("".join(line + "\n" for line in kept))
        try:
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(folder)
                self.sinks.append(lambda step, row: [writer.add_scalar(k, v, step) for k, v in row.items()])
            if wandb:
                import wandb as client
                client.run or client.init(project=wandb, name=str(folder), config=config)  # one a run
                self.sinks.append(lambda step, row: client.log({"step": step, **row}))
        except ImportError as error:
            raise UserError(f"{error.name} is not installed: pip install {error.name}") from error

    def row(self, step, **values):
        if self.rank == 0:
            append_jsonl(self.path, {"step": step, **values})
            for sink in self.sinks:
                sink(step, {f"{self.name}/{key}": value for key, value in values.items()})
            shown = {key: f"{value:.4g}" for key, value in values.items() if key in ("loss", "val_loss")}
            self.bar.set_postfix(shown, refresh=False)


def plot_curves(path, panels):
    """A picture with a panel per entry: [{"title", "xlabel", "ylabel", "lines": {name: (xs, ys)}, "log"}]."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels):
        for name, (xs, ys) in panel["lines"].items():
            axis.plot(xs, ys, label=name, marker="." if len(xs) < 40 else None)
        axis.set(title=panel["title"], xlabel=panel["xlabel"], ylabel=panel["ylabel"],
                 yscale="log" if panel.get("log") else "linear")
        axis.grid(alpha=.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def provenance():
    """{"python", "torch", "git", "command"} of this run, for args.json."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here)
    return {"python": sys.version.split()[0], "torch": torch.__version__, "git": git.stdout.strip() or None,
            "command": " ".join(sys.argv)}


def dry_run_report(name, model, loss, samples, tokens, world=1, sharded=False):
    """Text on one training step of a model on the meta device: parameters, tokens, FLOPs, bytes per device.

    loss: () -> scalar for `samples` samples. FLOPs are torch's count over forward and backward, activations
    what autograd keeps. Weights, gradients and AdamW's moments are divided by `world` when sharded.
    """
    from torch.utils.flop_counter import FlopCounterMode
    saved = {}

    def keep(tensor):                                              # kept alive, so that no id is used twice
        if not isinstance(tensor, torch.nn.Parameter):
            saved[id(tensor)] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
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
