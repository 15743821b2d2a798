"""prepare.py: creates the data set of river_smoke.py, clips of 64x64 smoke on black, simulated or from video.

Run         python data/river_smoke/prepare.py                    # simulates 320 clips, next to this file
            python data/river_smoke/prepare.py --extract VIDEOS --data_dir final_dataset    # static camera
Writes      final_dataset/{train,val,test}/<clip>/0001.png ... and final_dataset/dataset_stats.json
Restart     the same command continues an interrupted run from final_dataset.partial
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))                           # the root of the repository
import common  # noqa: E402
from common import UserError, at_least  # noqa: E402

SIZE = 64                            # height and width of a picture
HIDDEN_ROWS = 16                     # simulated above the picture, so that no ceiling flattens the plumes
HEIGHT = SIZE + HIDDEN_ROWS          # height of the simulation
WARMUP = 16                          # simulated frames before the first picture
SUBSTEPS = 2                         # solver steps per frame
DT = 1 / SUBSTEPS                    # solver step in frames
SPLITS = ("train", "val", "test")
STATS = "dataset_stats.json"


def open_partial(partial, recipe):
    """Opens the folder of an interrupted run of this recipe, or starts a new one -> its statistics."""
    stats = json.loads((partial / STATS).read_text()) if (partial / STATS).is_file() else {}
    if not stats and not list(partial.glob("[!.]*")):
        stats = recipe
        common.write_json(partial / STATS, stats)
    if any(stats.get(key) != value for key, value in recipe.items()):
        raise UserError(f"{partial} belongs to another command: run that one again, or remove the folder")
    for clip in partial.glob("*/*"):                               # back from the split, after a kill
        os.renames(clip, partial / "clips" / clip.name)
    return stats


def write_clip(partial, clip, pictures):
    """Writes partial/clips/<clip>/0001.png ..., atomically."""
    temporary = partial / "clips" / ".temporary"
    shutil.rmtree(temporary, ignore_errors=True)                   # of an interrupted run
    temporary.mkdir(parents=True)
    try:
        for number, picture in enumerate(pictures, 1):
            Image.fromarray(picture).save(temporary / f"{number:04d}.png", compress_level=1)
    except OSError as error:
        raise UserError(f"cannot write {temporary} ({error}): run the command again to continue") from error
    temporary.rename(partial / "clips" / clip)


def derivative(field, dim):
    return (torch.roll(field, -1, dim) - torch.roll(field, 1, dim)) / 2


class SmokeSolver:
    """2-D stable fluids (Stam 1999) with buoyancy, wind, gusts and vorticity confinement (Fedkiw 2001).

    Fields of n random scenes are n H W, parameters n 1 1. u (along x) and v (downwards): cells per frame."""

    def __init__(self, n, seed):
        self.generator = torch.Generator().manual_seed(seed)

        def uniform(low, high):                # the order of these calls defines the data of a seed
            return low + (high - low) * torch.rand(n, 1, 1, generator=self.generator)

        self.sources = []
        for probability in (1.0, 0.3):                             # 3 scenes in 10 have a second source
            self.sources.append(SimpleNamespace(
                x=uniform(.15, .85) * SIZE, y=HIDDEN_ROWS + uniform(.6, .92) * SIZE,
                radius=uniform(.035, .09) * SIZE, rate=uniform(.5, 1.3) * (uniform(0, 1) < probability),
                phase=uniform(0, 2 * torch.pi), frequency=uniform(.15, .6)))
        self.scene = SimpleNamespace(
            wind=uniform(-1.5, 1.5), gustiness=uniform(.1, .5), turbulence=uniform(.2, .8),
            confinement=uniform(.1, .35), buoyancy=uniform(.2, .45), fade=uniform(.965, .99),
            density=uniform(1.2, 2.6))
        self.tint = torch.stack([uniform(.80, 1.), uniform(.88, 1.), uniform(.96, 1.)], dim=-1)    # n 1 1 3
        self.y, self.x = torch.meshgrid(torch.arange(float(HEIGHT)), torch.arange(float(SIZE)), indexing="ij")
        rim = torch.stack([self.x, SIZE - 1 - self.x, self.y / 4, HEIGHT - 1 - self.y]) / (.05 * SIZE)
        self.inside = rim.amin(0).clamp(0, 1)                      # 0 at the boundary, which absorbs
        self.ky = 2 * torch.pi * torch.fft.fftfreq(HEIGHT)[:, None]
        self.kx = 2 * torch.pi * torch.fft.rfftfreq(SIZE)[None]

        self.smoke, self.heat, self.v = torch.zeros(3, n, HEIGHT, SIZE)
        self.u = self.scene.wind.expand(n, HEIGHT, SIZE)
        self.gust = torch.zeros(n, 1, 1)
        self.eddies = torch.zeros(n, 2, HEIGHT // 8, SIZE // 8)

    def emit(self, time):
        """Adds the smoke and the heat that the pulsing sources release in one step."""
        for source in self.sources:
            rate = source.rate * (.65 + .35 * torch.sin(source.frequency * time + source.phase))
            squared_distance = (self.x - source.x) ** 2 + (self.y - source.y) ** 2
            released = DT * rate * torch.exp(-squared_distance / source.radius ** 2)
            self.smoke = self.smoke + released
            self.heat = self.heat + released

    def accelerate(self):
        """Applies eddies within the smoke, vorticity confinement, buoyancy, and wind with gusts."""
        gust = torch.randn(self.gust.shape, generator=self.generator)
        self.gust = .97 * self.gust + .25 * self.scene.gustiness * gust
        self.eddies = .9 * self.eddies + .44 * torch.randn(self.eddies.shape, generator=self.generator)
        eddies = F.interpolate(self.eddies, (HEIGHT, SIZE), mode="bilinear")
        eddies = eddies * (DT * self.scene.turbulence * self.smoke.clamp(max=1))[:, None]
        curl = derivative(self.v, 2) - derivative(self.u, 1)
        slope_x = derivative(curl.abs(), 2)
        slope_y = derivative(curl.abs(), 1)
        spin = DT * self.scene.confinement * curl * torch.rsqrt(slope_x ** 2 + slope_y ** 2 + 1e-6)
        u = self.u + eddies[:, 0] + spin * slope_y
        v = self.v + eddies[:, 1] - spin * slope_x - DT * self.scene.buoyancy * self.heat.clamp(max=3)
        # The wind weakens towards the ground. Relaxation to it is stronger at the boundary, to absorb waves.
        relaxation = DT * (.05 + .5 * (1 - self.inside))
        wind = (self.scene.wind + self.gust) * (1 - .6 * self.y / HEIGHT)
        self.u = u + relaxation * (wind - u)
        self.v = v * (1 - relaxation)

    def project(self):
        """Removes the divergence of the velocity, in Fourier space."""
        u_hat = torch.fft.rfft2(self.u)
        v_hat = torch.fft.rfft2(self.v)
        divergence = (self.kx * u_hat + self.ky * v_hat) / (self.kx ** 2 + self.ky ** 2).clamp(min=1e-9)
        self.u = torch.fft.irfft2(u_hat - self.kx * divergence, (HEIGHT, SIZE))
        self.v = torch.fft.irfft2(v_hat - self.ky * divergence, (HEIGHT, SIZE))

    def advect(self):
        """Advects all fields (semi-Lagrangian). Smoke fades, and heat fades faster."""
        x = (self.x - DT * self.u + .5) * 2 / SIZE - 1             # departure points in [-1, 1]
        y = (self.y - DT * self.v + .5) * 2 / HEIGHT - 1
        fields = torch.stack([self.u, self.v, self.smoke, self.heat], dim=1)
        fields = F.grid_sample(fields, torch.stack([x, y], -1), padding_mode="border", align_corners=False)
        self.u, self.v, smoke, heat = fields.unbind(1)
        transmission = .5 + .5 * self.inside
        self.smoke = smoke * transmission * self.scene.fade ** DT
        self.heat = heat * transmission * (self.scene.fade - .03) ** DT

    def render(self):
        """-> pictures n 64 64 3 uint8. The background is exactly black."""
        smoke = self.smoke[:, HIDDEN_ROWS:]
        alpha = 1 - torch.exp(-self.scene.density * smoke)         # Beer-Lambert
        alpha = alpha * ((alpha - .08) / .12).clamp(0, 1)
        soft = F.avg_pool2d(smoke, 5, 1, 2)                        # light comes from the upper left
        light = (.85 + .9 * (soft - torch.roll(soft, (3, 3), (1, 2))) / (soft + .2)).clamp(.4, 1.1)
        return (((alpha * light)[..., None] * self.tint).clamp(0, 1) * 255).round().byte()


def simulate_smoke(n, frames, seed):
    """Plumes of n random scenes -> n frames 64 64 3 uint8 (numpy)."""
    solver = SmokeSolver(n, seed)
    pictures = []
    for step in range((WARMUP + frames) * SUBSTEPS):
        solver.emit(step * DT)
        solver.accelerate()
        solver.project()
        solver.advect()
        if step >= WARMUP * SUBSTEPS and step % SUBSTEPS == SUBSTEPS - 1:
            pictures.append(solver.render())
    return torch.stack(pictures, dim=1).numpy()


def simulate_clips(args, partial):
    """Simulates the missing clips, in batches of 32 with a seed each -> (stats, {clip: split})."""
    flags = {"clips": args.clips, "frames": args.frames, "seed": args.seed}
    stats = open_partial(partial, {"source": "SIMULATED 2-D stable fluids, not filmed", "flags": flags})
    split_of = {}
    for part, split in enumerate(SPLITS):
        count = args.clips if split == "train" else max(2, args.clips // 8)
        for first in tqdm(range(0, count, 32), f"simulate {split}", unit="batch"):
            clips = [f"sim{part}{index:05d}" for index in range(first, min(first + 32, count))]
            missing = [clip for clip in clips if not (partial / "clips" / clip).is_dir()]
            if missing:
                pictures = simulate_smoke(len(clips), args.frames, common.seed_all(args.seed, part, first))
            for clip in missing:
                write_clip(partial, clip, pictures[clips.index(clip)])
            split_of.update(dict.fromkeys(clips, split))
    return stats, split_of


def extract_smoke(frames):
    """Turns a list of 64 64 3 uint8 frames into smoke on black, in place -> reason to drop the clip, or None.

    The background is the median of up to 512 evenly spaced frames, alpha a smoothstep from .04 to .18 of the
    largest channel difference to it. A clip is dropped if smoke (brightest channel above .05) covers under
    1 % or over 90 % of all pixels or has a mean grey below .1, or if the variance of grey is below .001.
    """
    background = torch.from_numpy(np.stack(frames[::1 + len(frames) // 512])).median(dim=0).values / 255
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(frames), 64):                        # a long video's floats may not fit memory
        x = torch.from_numpy(np.stack(frames[start:start + 64])) / 255
        difference = (x - background).abs().amax(dim=-1, keepdim=True)
        ramp = ((difference - .04) / (.18 - .04)).clamp(0, 1)
        alpha = ramp * ramp * (3 - 2 * ramp)
        x = x * alpha * (alpha > .05)
        for frame, picture in zip(frames[start:start + 64], (x * 255).round().byte().numpy()):
            frame[:] = picture
        smoke = x.amax(dim=-1) > .05
        grey = x.mean(dim=-1).double()
        sums += torch.stack([smoke.sum(), (grey * smoke).sum(), grey.sum(), (grey ** 2).sum()])
    coverage, smoke_grey, grey, squared_grey = (sums / (len(frames) * SIZE * SIZE)).tolist()
    brightness = smoke_grey / max(coverage, 1e-9)
    variance = squared_grey - grey ** 2
    if not (.01 <= coverage <= .9 and brightness >= .1 and variance >= .001):
        return (f"smoke covers {coverage:.1%} of the pixels (1 to 90 %), its mean grey is {brightness:.2f} "
                f"(at least .1), the variance of grey is {variance:.4f} (at least .001)")


def extract_clips(args, partial):
    """Extracts the missing videos -> (stats, with the reason for each unused video, {clip: split})."""
    source = Path(args.extract)
    files = [source]
    if source.is_dir():
        files, left_out = common.find_files(source, common.VIDEO_SUFFIXES)
        if left_out:
            print(f"left out of {source}: {common.describe_left_out(left_out)}", file=sys.stderr)
    if not files or not os.path.exists(args.extract):
        raise UserError(f"no videos in {source}: --extract takes a video file or a folder of them")
    stats = open_partial(partial, {"source": f"extracted from {os.path.abspath(args.extract)}"})
    dropped = stats.setdefault("dropped", {})                      # not decoded again on a restart
    skipped = stats["skipped"] = {}
    root = source if source.is_dir() else source.parent
    videos = [os.path.relpath(file, root) for file in files]
    digests = {hashlib.sha256(os.fsencode(video)).hexdigest(): video for video in videos}
    clips = []
    for digest, video in tqdm(sorted(digests.items()), "extract", unit="video"):
        clip = re.sub(r"[^A-Za-z0-9._-]", "_", video)[-100:].lstrip(".")
        if clip != video:                                          # keeps "a b.mp4" and "a_b.mp4" apart
            clip = f"{clip}-{digest[:8]}"
        if video not in dropped and not (partial / "clips" / clip).is_dir():
            try:
                frames = list(common.video_frames(root / video, SIZE))
            except UserError as error:
                skipped[video] = str(error)
                continue
            reason = extract_smoke(frames)
            if reason:
                dropped[video] = reason
                common.write_json(partial / STATS, stats)
            else:
                write_clip(partial, clip, frames)
        if video not in dropped:
            clips.append(clip)
    for video, reason in {**dropped, **skipped}.items():
        print(f"no clip of {video}: {reason}", file=sys.stderr)
    tenth = max(1, round(len(clips) / 10)) if len(clips) > 2 else 0
    splits = ["val"] * tenth + ["test"] * tenth + ["train"] * len(clips)       # by the order of the hashes
    return stats, dict(zip(clips, splits))


def prepare(args):
    """Builds the data set in <data_dir>.partial and renames that folder when it is complete."""
    data_dir = Path(args.data_dir)
    partial = Path(f"{data_dir}.partial")
    if os.path.lexists(data_dir):
        raise UserError(f"{data_dir} exists: remove it, or choose another folder with --data_dir")
    make_clips = simulate_clips if args.extract is None else extract_clips
    stats, split_of = make_clips(args, partial)
    if not split_of:
        raise UserError(f"no usable video in {args.extract}: see the reasons above")
    for clip, split in split_of.items():
        os.renames(partial / "clips" / clip, partial / split / clip)
    shutil.rmtree(partial / "clips", ignore_errors=True)
    stats["clips"] = {split: len(list(partial.glob(f"{split}/*"))) for split in SPLITS}
    stats["frames"] = {split: len(list(partial.glob(f"{split}/*/*"))) for split in SPLITS}
    common.write_json(partial / STATS, stats)
    partial.rename(data_dir)
    print(f"wrote {data_dir}: clips {stats['clips']}, frames {stats['frames']}, "
          f"{len(stats.get('dropped', {}))} videos dropped, {len(stats.get('skipped', {}))} skipped")
    if not stats["clips"]["val"]:
        print("fewer than 3 clips: all are in train, but river_smoke.py needs val and test as well")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Create the data set of river_smoke.py.", allow_abbrev=False)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--simulate", action="store_true", help="simulate the clips; this is the default")
    mode.add_argument("--extract", metavar="VIDEOS", help="extract smoke from a video file or a folder")
    parser.add_argument("--data_dir", default=HERE / "final_dataset", help="output folder; it must not exist")
    parser.add_argument("--clips", type=at_least(1), default=256, help="training clips to simulate (256)")
    parser.add_argument("--frames", type=at_least(1), default=36, help="frames of a simulated clip (36)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the simulation (0)")
    parser.error = lambda message: common.Parser.error(parser, message)
    return common.one_line_errors("prepare.py", lambda: prepare(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
