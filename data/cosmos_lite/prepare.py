"""prepare.py: builds the data set of cosmos_lite.py from simulated physics or your own videos, at 64x64.

Run         python data/cosmos_lite/prepare.py                 # simulates 4 x 128 videos, next to this file
            python data/cosmos_lite/prepare.py --raw my_videos --data_dir data/split   # subfolders are kinds
Writes      {train,val,test}.npy, frames F 3 64 64 uint8 of all videos of a split, concatenated;
            split.json, {split: [[video, number of frames], ...]}; test_states.json, exact states of the test
            videos; dataset_stats.json; if simulated, raw/<kind>/<kind>_000.mp4 with states in .npz files
Restart     the same command resumes from <data_dir>.partial; other flags start over
"""
import argparse
import colorsys
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))                           # the root of the repository
import common  # noqa: E402
from common import UserError, at_least  # noqa: E402

SIZE = 64                            # height and width of a frame of the data set
SUBSTEPS = 4                         # simulated steps per frame

# The reference project's values: picture size in pixels; gravity in pixels per frame^2; factors of the speed
# at floor and ceiling, at walls, per frame, and horizontally at the floor; ranges of the initial x and y.
Physics = namedtuple("Physics", "size gravity restitution wall drag friction x y")
PHYSICS = {
    "bouncing": Physics(256, .5, .85, .85, 1, 1, (21, 235), (21, 128)),
    "pendulum": Physics(64, .5, 1, 1, .995, 1, (32, 32), (5, 5)),
    "falling": Physics(64, .4, .7, .7, .98, .9, (10, 54), (5, 21)),
    "projectile": Physics(64, .3, .7, .8, 1, 1, (5, 21), (59, 59))}


def simulate(kind, frames, seed):
    """Semi-implicit Euler -> exact state: "pos" T N 2 (x to the right, y down, in pixels), "radius",
    "square", "colour" in [0, 1], "kind", "size" of the picture; "pivot" and "length" of a pendulum."""
    rng = np.random.default_rng(seed)
    physics = PHYSICS[kind]
    n = {"bouncing": rng.integers(1, 6), "falling": rng.integers(1, 4)}.get(kind, 1)       # both draw
    radius = np.full(n, 16.) if kind == "bouncing" else rng.integers(3, 6, n).astype(float)
    state = {"kind": kind, "size": physics.size, "radius": radius, "square": np.zeros(n, bool)}
    vel = np.zeros((n, 2))
    if kind == "bouncing":
        vel = np.stack([rng.uniform(-2, 2, n), rng.uniform(-1, 1, n)], axis=1)
    elif kind == "falling":
        vel[:, 0] = rng.uniform(-1, 1, n)
        state["square"] = rng.random(n) < .5
    elif kind == "projectile":
        angle, speed = rng.uniform(math.pi / 6, math.pi / 3), rng.uniform(3, 5)
        radius[:] = 3
        vel = speed * np.array([[math.cos(angle), -math.sin(angle)]])
    else:
        radius[:] = 4
        length = state["length"] = rng.uniform(20, 35)
        pivot = state["pivot"] = np.array([32., 5.])
        theta, omega = rng.choice([-1, 1]) * rng.uniform(.3, math.pi / 3), 0.
    apart = False
    while not apart:                                               # redraw until no objects overlap
        pos = np.stack([rng.uniform(*physics.x, n), rng.uniform(*physics.y, n)], axis=1)
        gaps = np.linalg.norm(pos[:, None] - pos, axis=2) + 999 * np.eye(n)
        apart = (gaps - radius[:, None] - radius > 1).all()
    dt, path = 1 / SUBSTEPS, []
    for step in range(frames * SUBSTEPS):
        if kind == "pendulum":
            if step:
                omega = (omega - dt * physics.gravity / length * math.sin(theta)) * physics.drag ** dt
                theta += dt * omega
            pos = pivot + length * np.array([[math.sin(theta), math.cos(theta)]])
        elif step:
            vel[:, 1] += dt * physics.gravity
            vel *= physics.drag ** dt
            pos = pos + dt * vel
            if kind == "bouncing":
                collide(pos, vel, radius)
            bounce(pos, vel, radius, physics, at_rest=2 * dt * physics.gravity)
        if step % SUBSTEPS == 0:
            path.append(pos.copy())
    colours = []
    for hue in (rng.random() + np.arange(n) / n) % 1:              # distinct hues identify objects
        rgb = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(.75, 1), rng.uniform(.55, .9)))
        colours.append(rgb * min(1, .6 / (rgb @ [.2126, .7152, .0722])))           # dark enough on white
    return {**state, "pos": np.stack(path), "colour": np.stack(colours)}


def collide(pos, vel, radius):
    """Elastic collisions between balls of equal mass, in place."""
    for i in range(len(pos)):
        for j in range(i):
            distance = np.linalg.norm(pos[i] - pos[j])
            normal = (pos[i] - pos[j]) / max(distance, 1e-9)
            overlap = radius[i] + radius[j] - distance
            closing = (vel[j] - vel[i]) @ normal
            if overlap > 0 and closing > 0:                        # exchange normal components
                vel[i] += closing * normal
                vel[j] -= closing * normal
                pos[i] += overlap / 2 * normal
                pos[j] -= overlap / 2 * normal


def bounce(pos, vel, radius, physics, at_rest):
    """Reflects objects at walls, ceiling and floor, in place. Below speed at_rest they stay on the floor."""
    low, high = radius, physics.size - radius
    for side, hit in ((low, pos[:, 0] < low), (high, pos[:, 0] > high)):
        pos[hit, 0] = 2 * side[hit] - pos[hit, 0]
        vel[hit, 0] *= -physics.wall
    hit = pos[:, 1] < low
    pos[hit, 1] = low[hit]
    vel[hit, 1] = np.abs(vel[hit, 1]) * physics.restitution
    hit = pos[:, 1] > high
    pos[hit, 1] = high[hit]
    fast = vel[hit, 1] > at_rest
    vel[hit, 0] *= np.where(fast, physics.friction, 1)
    vel[hit, 1] *= np.where(fast, -physics.restitution, 0)


def blend(window, coverage, colour):
    """Blends a colour into a window H W 3 of a picture, with opacity `coverage` H W."""
    change = 255 * np.asarray(colour) - window
    window[:] = np.round(window + np.clip(coverage, 0, 1)[..., None] * change)


def draw_object(picture, centre, radius, colour, square=False):
    """Draws a disc or a square with anti-aliased edges. Pixel i covers [i, i + 1)."""
    x0, y0 = np.clip(np.floor(centre - radius - 1), 0, len(picture)).astype(int)
    x1, y1 = np.clip(np.floor(centre + radius + 2), 0, len(picture)).astype(int)
    dx = np.abs(np.arange(x0, x1) + .5 - centre[0])
    dy = np.abs(np.arange(y0, y1) + .5 - centre[1])[:, None]
    blend(picture[y0:y1, x0:x1], radius + .5 - (np.maximum if square else np.hypot)(dx, dy), colour)


def render(state):
    """Renders a state of simulate() on white -> T H W 3 uint8."""
    pictures = np.full((len(state["pos"]), state["size"], state["size"], 3), 255, np.uint8)
    pixel = np.arange(state["size"]) + .5
    for t, (picture, pos) in enumerate(zip(pictures, state["pos"])):
        if state["kind"] == "pendulum":
            rod = pos[0] - state["pivot"]
            dx, dy = pixel - state["pivot"][0], pixel[:, None] - state["pivot"][1]
            along = np.clip((dx * rod[0] + dy * rod[1]) / (rod @ rod), 0, 1)
            blend(picture, 1 - np.hypot(dx - along * rod[0], dy - along * rod[1]), 200 / 255)
            draw_object(picture, state["pivot"], 2, 100 / 255)
        if state["kind"] == "projectile":
            for age in range(min(t, 5), 0, -1):                    # the trail fades with age
                trail = 1 - (1 - age / 6) * (1 - state["colour"][0])
                draw_object(picture, state["pos"][t - age, 0], 1.5, trail)
        for centre, radius, colour, square in zip(pos, state["radius"], state["colour"], state["square"]):
            draw_object(picture, centre, radius, colour, square)
    return pictures


def write_frames(path, frames):
    """Writes frames 64 64 3 uint8 as the bytes of T 3 64 64, atomically."""
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "wb") as file:
        for frame in frames:
            file.write(frame.transpose(2, 0, 1).tobytes())
    temporary.rename(path)


def simulate_video(number, kind, args, partial):
    """-> name of the video, (file of its 64x64 frames, number of frames, exact state)."""
    video = f"{kind}/{kind}_{number:03d}.mp4"
    path, frames = partial / "raw" / video, partial / "frames" / Path(video).stem
    if not frames.exists():
        state = simulate(kind, args.num_frames, [args.seed, list(PHYSICS).index(kind), number])
        pictures = render(state)
        # yuv444p, because chroma subsampling would distort the colours of small objects.
        options = ("-crf", "8", "-pix_fmt", "yuv444p", "-preset", "ultrafast")
        common.write_video(path, torch.from_numpy(pictures).permute(0, 3, 1, 2), 30, options)
        np.savez(path.with_suffix(".npz"), **state)
        k = state["size"] // SIZE
        small = sum(pictures[:, i::k, j::k].astype(np.float32) for i, j in np.ndindex(k, k)) / k ** 2
        write_frames(frames, small.round().astype(np.uint8))
    return video, (frames, args.num_frames, read_state(path.with_suffix(".npz"), args.num_frames))


def decode_video(path, args, partial):
    """-> name of the video, and the tuple of simulate_video or the reason why the video is skipped."""
    video = path.relative_to(args.raw).as_posix()
    version = f"{video} {path.stat().st_size} {path.stat().st_mtime_ns}"     # changed files: decoded again
    frames = partial / "frames" / hashlib.sha256(os.fsencode(version)).hexdigest()
    try:
        if not frames.exists():
            write_frames(frames, common.video_frames(path, SIZE))
    except UserError as error:
        return video, str(error)
    length = frames.stat().st_size // (3 * SIZE * SIZE)
    if length < args.min_frames:
        return video, f"{length} frames, fewer than --min_frames {args.min_frames}"
    return video, (frames, length, read_state(path.with_suffix(".npz"), length))


def make_videos(args, partial):
    """Simulates or decodes the videos missing in `partial` -> {video: result of the function for it}."""
    make, jobs = simulate_video, list(itertools.product(range(args.num_videos), PHYSICS))
    if args.raw:
        files, left_out = common.find_files(args.raw, common.VIDEO_SUFFIXES)
        left_out.pop(".npz", None)                                 # read_state checks these
        if left_out:
            print(f"left out of {args.raw}: {common.describe_left_out(left_out)}", file=sys.stderr)
        make, jobs = decode_video, [(path,) for path in files]
    with ThreadPoolExecutor() as pool:
        return dict(tqdm(pool.map(lambda job: make(*job, args, partial), jobs), "videos", len(jobs)))


def read_state(path, frames):
    """The state next to a video of `frames` frames, in pixels of 64x64; None without a valid state file."""
    try:
        with np.load(path) as file:
            pos, colour, size = file["pos"], file["colour"], float(file["size"])
        valid = len(colour) > 0 and pos.shape == (frames, len(colour), 2) and colour.shape[1:] == (3,)
        valid = valid and np.isfinite(pos).all() and 0 < size < math.inf and (abs(colour - .5) <= .5).all()
        return {"pos": (pos * SIZE / size).round(3).tolist(), "colour": colour.tolist()} if valid else None
    except Exception:                                              # damaged files raise any type
        return None


def split_videos(videos):
    """Names -> {split: names}: 80/10/10, stratified by folder, deterministic (512: 409, 51, 52)."""
    rng, position = np.random.default_rng(42), {}
    for kind in sorted({os.path.dirname(video) for video in videos}):
        members = [video for video in sorted(videos) if os.path.dirname(video) == kind]
        for i, j in enumerate(rng.permutation(len(members))):      # evenly spread over [0, 1) within a kind
            position[members[j]] = (i + .5) / len(members), kind
    order, val = sorted(position, key=position.get), max(1, len(position) // 10)
    train = min(len(order) * 8 // 10, len(order) - val - 1)
    if train < 1:
        raise UserError(f"{len(order)} videos cannot be split into train, val and test: use more")
    splits = {"train": order[:train], "val": order[train:train + val], "test": order[train + val:]}
    return {split: sorted(names) for split, names in splits.items()}


def prepare(args):
    """Builds the data set in <data_dir>.partial and renames that folder when it is complete."""
    partial = Path(f"{args.data_dir}.partial")
    if os.path.lexists(args.data_dir):
        raise UserError(f"{args.data_dir} exists: remove it, or choose another folder with --data_dir")
    source = f"videos of {os.path.abspath(args.raw)}" if args.raw else "SIMULATED physics, not filmed"
    stats = {"source": source, "flags": [args.num_videos, args.num_frames, args.seed]}
    record = partial / "dataset_stats.json"
    if not record.is_file() or json.loads(record.read_text()) != stats:
        shutil.rmtree(partial, ignore_errors=True)
        common.write_json(record, stats)
    (partial / "frames").mkdir(exist_ok=True)
    videos = make_videos(args, partial)
    skipped = {video: value for video, value in videos.items() if isinstance(value, str)}
    for video, reason in skipped.items():
        print(f"left out {video}: {reason}", file=sys.stderr)
        del videos[video]
    if not videos:
        raise UserError(f"no videos in {args.raw} can be used")
    split = {}
    for part, names in split_videos(videos).items():
        split[part] = [[video, videos[video][1]] for video in names]
        shape = (sum(length for _, length in split[part]), 3, SIZE, SIZE)
        array = np.lib.format.open_memmap(partial / f"{part}.npy", "w+", np.uint8, shape)
        first = 0
        for file, length, _ in map(videos.get, names):
            array[first:first + length] = np.fromfile(file, np.uint8).reshape(-1, *shape[1:])
            first += length
        array.flush()
    states = {video: videos[video][2] for video, _ in split["test"] if videos[video][2]}
    common.write_json(partial / "split.json", split)
    common.write_json(partial / "test_states.json", states)
    shutil.rmtree(partial / "frames")
    stats["videos"] = {part: len(names) for part, names in split.items()}
    stats["skipped"] = skipped
    common.write_json(record, stats)
    partial.rename(args.data_dir)
    print(f"wrote {args.data_dir}: videos {stats['videos']}, {len(skipped)} left out")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Builds the data set of cosmos_lite.py.", allow_abbrev=False)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--simulate", action="store_true", help="simulate the videos; this is the default")
    mode.add_argument("--raw", metavar="FOLDER", help="use the videos in this folder and its subfolders")
    add = parser.add_argument
    add("--data_dir", default=HERE / "dataset", help="folder to write; it must be new")
    add("--num_videos", type=at_least(1), default=128, help="simulated videos of each kind (128)")
    add("--num_frames", type=at_least(1), default=60, help="frames of a simulated video (60)")
    add("--seed", type=at_least(0), default=0, help="seed of the simulation (0)")
    add("--min_frames", type=at_least(1), default=60, help="leave out shorter videos of FOLDER (60)")
    args = parser.parse_args(argv)
    return common.one_line_errors("prepare.py", lambda: prepare(args))


if __name__ == "__main__":
    sys.exit(main())
