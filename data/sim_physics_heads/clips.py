"""clips.py: cuts recordings into the clips that sim_physics_heads.py trains and evaluates on.

Run         by sim_physics_heads.py, after check.py; --help lists the flags
Reads       the list of recordings that check.py --json writes
Writes      OUT/<split>_<number>_<scene>.safetensors: video T 3 H W uint8, and for each quantity in READERS
            <name> T c H W float16 and <name>_valid T H W, the mask of known values. Training clips have
            quantities of --rows rows. OUT/pixel_means.safetensors: means of the training clips;
            OUT/clips.json, written last: {file: {"scene", "prompt"}}
Restart     existing clips are not written again
"""
import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]       # check.py; common.py, at the root of the repository
import check  # noqa: E402

import common  # noqa: E402
from common import UserError  # noqa: E402

FAR = float(check.FAR)                                 # metres; depths from here on are sky


# ---- readers: recording, indices of the clip's frames, stride -> values T c H W, valid T H W --------------

load = lru_cache(maxsize=128)(check.load)


def load_depth(scene, index):
    """H W in metres, with sky (inf, at most 0, at least FAR) set to FAR. NaN marks unknown depth."""
    path = scene["files"]["depth"][str(scene["steps"][index])]
    depth = load(path, "depth", tuple(scene["size"]))[..., 0]
    return np.where((depth <= 0) | (depth >= FAR), np.float32(FAR), depth)


def read_depth(scene, frames, stride):
    depth = np.stack([load_depth(scene, index) for index in frames])
    return depth[:, None], depth < FAR                 # False for NaN


def read_sky(scene, frames, stride):
    depth = np.stack([load_depth(scene, index) for index in frames])
    return (depth >= FAR).astype(np.float32)[:, None], ~np.isnan(depth)


def read_motion(scene, frames, stride):
    """Composes single-step vectors over the stride. Invalid in frame 0 and across missing steps."""
    steps = scene["steps"]
    shape = tuple(scene["size"])
    motion = np.zeros((len(frames), 2, *shape), np.float32)
    valid = np.zeros((len(frames), *shape), bool)
    for i, index in enumerate(frames[1:], 1):
        chain = range(index, index - stride, -1)
        vectors = [load(scene["files"]["motion"][str(steps[j])], "motion", shape) for j in chain]
        # A vector points to the step before it. If that step is missing, the chain is broken.
        connected = all(steps[j] - steps[j - 1] == scene["spacing"] for j in chain)
        if connected and all(array.size for array in vectors):
            depths = [load_depth(scene, j) for j in (*chain, index - stride)]
            composed, valid[i] = compose([array[..., :2] for array in vectors], depths)
            motion[i] = composed.transpose(2, 0, 1)
    return motion, valid


def compose(motions, depths):
    """p_{t-k} = p_t + mv_t(p_t) + mv_{t-1}(p_{t-1}) + ...: chains the vectors of k steps.

    motions: k times H W 2 (frames t, t-1, .. t-k+1); depths: k + 1 times H W (frames t .. t-k)
    -> motion H W 2 in pixels, valid H W. Each pixel is tracked back by the vector at the nearest pixel.
    It is valid while it stays inside the picture and consecutive depths agree within 5 % + 2 cm. Occluded
    pixels are invalid.
    """
    H, W = depths[0].shape
    start = np.stack(np.meshgrid(np.arange(W), np.arange(H)), axis=-1).astype(np.float32)
    point, depth = start.copy(), depths[0]
    valid = ~np.isnan(depth)

    def nearest():
        x, y = np.rint(point).astype(int).transpose(2, 0, 1)
        return y.clip(0, H - 1), x.clip(0, W - 1)

    for motion, previous_depth in zip(motions, depths[1:]):
        vector = motion[nearest()]
        valid &= np.isfinite(vector).all(axis=-1)
        point += np.where(valid[..., None], vector, 0)
        valid &= ((point >= 0) & (point <= np.float32([W - 1, H - 1]))).all(axis=-1)
        valid &= np.abs(previous_depth[nearest()] - depth) < 0.05 * depth + 0.02           # False for NaN
        depth = previous_depth[nearest()]
    return np.where(valid[..., None], point - start, 0), valid


# name -> reader, factors of the values in mirrored clips, whether values scale with the picture size
READERS = {"motion": (read_motion, (-1, 1), True), "depth": (read_depth, (1,), False),
           "sky": (read_sky, (1,), False)}


# ---- clips ----------------------------------------------------------------------------------------------

def read_clip(scene, start, stride, frames, size, mirror=False, colours=(0, 1, 2)):
    """Frames start, start + stride, ... cropped to the aspect of `size` (height, width) and resized.

    -> {"video": T 3 H W uint8, "<quantity>": T c H W, "<quantity>_valid": T H W}. Pictures are resized with
    a bicubic filter, quantities by nearest neighbour, since means over an edge belong to no surface.
    """
    height, width = size
    frames = range(start, start + stride * frames, stride)
    H, W = scene["size"]
    pictures = [common.read_image(scene["files"]["rgb"][str(scene["steps"][index])], (H, W))
                for index in frames]
    h, w = min(H, round(W * height / width)), min(W, round(H * width / height))
    top, left = (H - h) // 2, (W - w) // 2
    video = [Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC,
                                             (left, top, left + w, top + h)) for picture in pictures]
    clip = {"video": np.stack(video).transpose(0, 3, 1, 2)[:, list(colours)]}
    rows = top + ((np.arange(height) + 0.5) * h / height).astype(int)
    columns = left + ((np.arange(width) + 0.5) * w / width).astype(int)
    for name, (reader, mirror_factors, in_pixels) in READERS.items():
        values, valid = reader(scene, frames, stride)
        values, valid = values[..., rows[:, None], columns], valid[..., rows[:, None], columns]
        if in_pixels:
            values = values * np.float32([width / w, height / h])[:, None, None]
        if mirror:
            values = values * np.float32(mirror_factors)[:, None, None]
        clip |= {name: values, f"{name}_valid": valid}
    if mirror:
        clip = {name: value[..., ::-1] for name, value in clip.items()}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in clip.items()}


def split_scenes(names):
    """Holds out whole scenes with all their recordings -> {name: split}. Of every seven scenes in
    alphabetical order the 4th is for validation and the 6th for testing."""
    names = sorted(set(names))
    if len(names) < 3:
        raise UserError(f"{len(names)} scenes cannot be split into train, val and test: use at least 3")
    split_of = {name: {3: "val", 5: "test"}.get(i % 7, "train") for i, name in enumerate(names)}
    if len(names) < 7:
        split_of |= {names[-2]: "val", names[-1]: "test"}
    return split_of


def choose_clips(scenes, args):
    """-> {file name: (scene, start, stride, mirror, colours)}: random clips of training recordings, evenly
    spaced clips of held-out recordings, none of recordings that are too short for --frames at any stride."""
    rng = np.random.default_rng(0)
    split_of = split_scenes([scene["name"] for scene in scenes])
    strides = sorted(int(stride) for stride in args.strides.split(","))
    clips = {}
    for scene in scenes:
        split = split_of[scene["name"]]
        fitting = [stride for stride in strides if (args.frames - 1) * stride < len(scene["steps"])]
        for i in range((args.clips if split == "train" else args.eval_clips) if fitting else 0):
            stride, mirror, colours = fitting[-1], False, [0, 1, 2]
            room = len(scene["steps"]) - (args.frames - 1) * stride
            start = (2 * i + 1) * room // (2 * args.eval_clips)
            if split == "train":
                stride = int(rng.choice(fitting))
                start = int(rng.integers(len(scene["steps"]) - (args.frames - 1) * stride))
                mirror = bool(rng.random() < 0.5)
                colours = rng.permutation(3).tolist() if args.permute_colours else colours
            clips[f"{split}_{len(clips):05d}_{scene['name']}"] = scene, start, stride, mirror, colours
    for split in ("train", "val", "test"):
        if not any(name.startswith(split) for name in clips):
            raise UserError(f"no scene of split {split} has {args.frames} frames at any of --strides "
                            f"{args.strides}")
    return clips


def write_clip(args, job):
    name, (scene, start, stride, mirror, colours) = job
    path = Path(args.out, f"{name}.safetensors")
    if path.is_file():
        return
    clip = read_clip(scene, start, stride, args.frames, (args.height, args.width), mirror, colours)
    step = args.height // args.rows if name.startswith("train") else 1
    for quantity in READERS:
        clip[quantity] = clip[quantity][..., step // 2::step, step // 2::step].half()
        clip[f"{quantity}_valid"] = clip[f"{quantity}_valid"][..., step // 2::step, step // 2::step]
    common.save_weights(path, clip)


def pixel_means(folder):
    """Maps h w of the training clips: mean depth, mean log depth, share of sky. Pixels without valid depth
    get the mean over the others."""
    sums = torch.zeros(5, 1, 1)
    for path in sorted(folder.glob("train_*")):
        clip = common.load_weights(path)
        valid = clip["depth_valid"]
        depth = torch.where(valid, clip["depth"][:, 0].float(), 1.0)
        sky = clip["sky"][:, 0].float() * clip["sky_valid"]
        sums = sums + torch.stack([valid, depth * valid, depth.log(), sky, clip["sky_valid"]]).sum(1)
    means = sums[1:3] / sums[0]
    means = torch.where(sums[0] > 0, means, means.nanmean(dim=(1, 2), keepdim=True))
    return {"depth": means[0], "log_depth": means[1], "sky": sums[3] / sums[4].clamp(min=1)}


def cut(args):
    scenes = json.loads(Path(args.scenes).read_text())
    clips = choose_clips(scenes, args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        list(tqdm(pool.map(partial(write_clip, args), clips.items(), chunksize=8), "clips", len(clips)))
    common.save_weights(Path(args.out, "pixel_means.safetensors"), pixel_means(Path(args.out)))
    common.write_json(Path(args.out, "clips.json"), {
        f"{name}.safetensors": {"scene": scene["name"], "prompt": scene["prompt"]}
        for name, (scene, *_) in clips.items()})


def main(argv=None):
    parser = argparse.ArgumentParser(description="Cuts recordings into clips for sim_physics_heads.py.")
    add = parser.add_argument
    add("scenes", help="list of recordings, from check.py --json")
    add("out", help="folder to write")
    add("--height", type=int, default=64, help="height of the pictures in pixels (64)")
    add("--width", type=int, default=64, help="width of the pictures in pixels (64)")
    add("--rows", type=int, default=32, help="rows of training quantities, a divisor of --height (32)")
    add("--frames", type=int, default=17, help="frames of a clip (17)")
    add("--strides", default="1,2", help="steps between frames; training clips draw one at random (1,2)")
    add("--clips", type=int, default=16, help="clips of each training recording (16)")
    add("--eval_clips", type=int, default=2, help="clips of each held-out recording (2)")
    add("--permute_colours", type=int, default=0, help="1: permute the colour channels of training clips (0)")
    args = parser.parse_args(argv)

    def run():
        cut(args)
    return common.one_line_errors("clips.py", run)


if __name__ == "__main__":
    sys.exit(main())
