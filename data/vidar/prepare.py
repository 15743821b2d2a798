"""prepare.py: simulates the data set of vidar.py and vidarc.py, or converts it from other robot data.

Run         python data/vidar/prepare.py                       # simulates 650 tasks and 9000 random poses
            python data/vidar/prepare.py --from robotwin SRC [DST]             # .hdf5 files below SRC
            python data/vidar/prepare.py --from lerobot SRC [DST]              # SRC has meta/info.json
            python data/vidar/prepare.py --from hdf5 SRC [DST] --src_fps 50    # ALOHA, RDT
Writes      DST/episodes/ep_0001/{video.mp4, actions.npy, instruction.txt, mask.npz} and DST/manifest.json.
            video.mp4 is the mosaic of a fixed camera above two wrist cameras at 10 fps; actions.npy (T, 14)
            float32 are the joint positions that frame t shows: left arm 6 (radians), left gripper (1 open,
            0 closed), right arm 6, right gripper; mask.npz (simulated episodes) has arm masks, bits of T H W.
            "random_poses": true in a row of the manifest marks an episode without a task, which trains the
            inverse dynamics model alone. See docs/robots.md.
Restart     The same command continues from DST.partial after an interruption, another one starts over.
"""
import argparse
import itertools
import math
import os
import re
import shutil
import sys
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]                   # world.py and convert.py; common.py
import convert  # noqa: E402
from world import ACTION_DIM, RANDOM_POSES, VIEWS, ArmWorld, random_poses  # noqa: E402

import common  # noqa: E402
from common import UserError, at_least  # noqa: E402

FPS = 10
POSES_PER_EPISODE = 200
GRIPPERS = [6, 13]
HEAD_SIZE = (640, 480)                   # width and height of the fixed camera in a converted mosaic
WRIST_SIZE = (320, 240)                  # of each wrist camera below it
# Full chroma for the simulation: with half the chroma, a link of three pixels loses its color.
SIMULATED_VIDEO = ("-crf", "10", "-preset", "ultrafast", "-pix_fmt", "yuv444p")
CONVERTED_VIDEO = ("-crf", "16", "-preset", "veryfast", "-pix_fmt", "yuv420p")


# ---- simulation -----------------------------------------------------------------------------------------

def simulate_episode(settings, number):
    """Simulates an episode of the expert, or one of random poses if `number` is beyond those.

    In a third of the expert's episodes the block is moved and the expert plans again. Another third starts in
    a random pose with the gripper open or closed, as after a failure."""
    rng = np.random.default_rng((settings["seed"], number, 1))
    poses_before = POSES_PER_EPISODE * (number - settings["episodes"])
    random = poses_before >= 0
    frames = min(POSES_PER_EPISODE, settings["poses"] - poses_before) if random else settings["frames"]
    moved = int(rng.integers(3, max(frames, 8) // 2)) if number % 3 == 2 else None
    world = ArmWorld((settings["seed"], number), settings["size"], moved)
    if random:
        poses = [random_poses(rng, arm) for arm in (0, 1)]
    if number % 3 == 1:
        arm = slice(7 * world.active_arm, 7 * world.active_arm + 7)
        world.state[arm] = [*random_poses(rng, world.active_arm, 1)[0][:6], rng.choice([.2, 1])]
    images, masks, actions = [], [], []
    for t in range(frames):
        if random:
            world.set_random_pose(rng, poses)
        image, mask = world.render()
        images.append(image)
        masks.append(mask)
        actions.append(np.float32(world.state))
        if not random:
            if t in (0, moved):
                plan = iter(world.expert_actions(frames - t))
            world.step(next(plan))
    return {"video": np.stack(images), "actions": np.stack(actions), "masks": np.stack(masks),
            "instruction": RANDOM_POSES if random else world.instruction, "random_poses": random,
            "success": None if random else bool(world.success)}


def simulate(args):
    settings = {"episodes": args.episodes or 650, "poses": args.poses, "frames": args.frames,
                "size": args.size, "seed": args.seed}
    count = settings["episodes"] + math.ceil(args.poses / POSES_PER_EPISODE)
    data_dir = Path(args.data_dir or HERE / "simulated")
    if not is_done(data_dir, {"simulated": settings}):
        build(data_dir, {"simulated": settings}, partial(simulate_episode, settings), range(count))


# ---- conversion -----------------------------------------------------------------------------------------

def mosaic(head, left, right):
    """Images -> 720 640 3 uint8, stretched to 4:3. The head view replaces a missing wrist camera (None)."""
    def resize(image, size):                                       # anti-aliased, like mosaic() in server.py
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))

    wrists = [resize(head if image is None else image, WRIST_SIZE) for image in (left, right)]
    return np.concatenate([resize(head, HEAD_SIZE), np.concatenate(wrists, axis=1)])


def nearest_frames(length, fps):
    """-> indices of the source frames nearest to 0, 0.1, 0.2, ... seconds."""
    count = int((length - 1) * FPS / fps + 1e-6) + 1
    return np.floor(np.arange(count) * fps / FPS + .5).astype(int).clip(max=length - 1)


def convert_episode(args, recording):
    """Raises UserError, naming the recording, for invalid joint positions, images or instructions."""
    name = recording.name
    with convert.readable(name), convert.open_recording(recording, args) as (cameras, actions, text):
        if actions.shape[1] != ACTION_DIM:
            raise UserError(f"{name}: joint positions have width {actions.shape[1]}, not 14: left arm 6, "
                            "gripper, right arm 6, gripper. --actions NAME,NAME joins other columns")
        finite = np.isfinite(actions.astype(np.float32)).all(axis=1)
        if not finite.all():
            raise UserError(f"{name}: joint positions of frame {finite.argmin()} are NaN or infinite")
        lengths = {"joint positions": len(actions), **{view: len(camera) for view, camera in cameras.items()}}
        if min(lengths.values()) < 2 or len(set(lengths.values())) > 1:
            raise UserError(f"{name}: the numbers of frames differ or are below 2: {lengths}")
        text = RANDOM_POSES if args.random_poses else " ".join((args.instruction or text).split())
        if not text:
            raise UserError(f"{name} has no instruction: --instruction TEXT sets it")
        indices = nearest_frames(len(actions), recording.fps)
        views = [cameras[view].frames(indices) if view in cameras else itertools.repeat(None, len(indices))
                 for view in ("head", "left", "right")]
        # zip_longest reads all videos to the end, where their number of frames is checked.
        video = np.stack([mosaic(*images) for images in itertools.zip_longest(*views)])
    if args.swap_rb:
        video = video[..., ::-1].copy()
    actions = actions[indices].astype(np.float32)
    if args.gripper_scale:
        closed, opened = args.gripper_scale
        actions[:, GRIPPERS] = (actions[:, GRIPPERS] - closed) / (opened - closed)
    rear = recording.source_format == "robotwin" and re.search(r"(^|/)hd_", str(recording.path.absolute()))
    wrists = [words for view, words in zip(("left", "right"), VIEWS[1:]) if view in cameras]
    return {"video": video, "actions": actions, "instruction": text, "random_poses": args.random_poses,
            "success": None, "source": name, "views": ["fixed rear" if rear else "fixed front", *wrists]}


def convert_all(args):
    """Converts the recordings in args.src and prints the range of each joint."""
    options = {name: getattr(args, name) for name in (
        "source_format", "episodes", "src_fps", "cameras", "actions", "instruction", "swap_rb",
        "gripper_scale", "random_poses")}
    src = Path(args.src)
    data_dir = Path(args.data_dir or HERE / args.source_format)
    recipe = {"converted": {"src": str(src.absolute()), **options}}
    if is_done(data_dir, recipe):
        return
    if not src.exists():
        raise UserError(f"there is no file or folder {src}")
    recordings = convert.list_recordings(args.source_format, src, args)[:args.episodes]
    for recording in recordings:
        if not recording.fps:
            raise UserError(f"{recording.name} has no frame rate: --src_fps FPS sets it (50 for ALOHA)")
        if not FPS <= recording.fps <= 1000:
            raise UserError(f"{recording.name} has {recording.fps:g} fps, but 10 to 1000 can be converted. "
                            "--src_fps FPS replaces a wrong rate")
    if not recordings:
        raise UserError(f"{src} has no episodes")
    build(data_dir, recipe, partial(convert_episode, args), recordings)
    files = sorted(data_dir.glob("episodes/*/actions.npy"))
    actions = np.concatenate([np.load(path) for path in files])
    for side, columns in (("left", slice(0, 7)), ("right", slice(7, 14))):
        limits = zip(actions[:, columns].min(axis=0), actions[:, columns].max(axis=0))
        ranges = [f"{low:.2f}..{high:.2f}" for low, high in limits]
        print(f"{side:5} arm {' '.join(ranges[:6])}  gripper {ranges[6]}")
    if actions[:, GRIPPERS].min() < -.1 or actions[:, GRIPPERS].max() > 1.1:
        print("note: grippers are not in [0, 1]: set --gripper_scale CLOSED OPEN to their values in SRC")


# ---- the data set on disk -------------------------------------------------------------------------------

def is_done(data_dir, recipe):
    """Whether data_dir is a complete data set of this recipe. UserError if it has other contents."""
    manifest = data_dir / "manifest.json"
    if manifest.is_file():
        contents = common.read_json(manifest)
        if isinstance(contents, dict) and all(contents.get(key) == value for key, value in recipe.items()):
            print(f"{data_dir} is already complete")
            return True
    if os.path.lexists(data_dir) and not (data_dir.is_dir() and not any(data_dir.iterdir())):
        raise UserError(f"{data_dir} exists with other contents: remove it, or choose another folder with "
                        "--data_dir")
    return False


def write_episode(folder, make_episode, number, source):
    """Makes and writes an episode. Its row of the manifest, rows/<number>.json, is written last."""
    episode = make_episode(source)
    name = f"ep_{number + 1:04d}"
    path = folder / "episodes" / name
    shutil.rmtree(path, ignore_errors=True)                        # from a killed run
    path.mkdir(parents=True)
    masks = episode.get("masks")
    options = CONVERTED_VIDEO if masks is None else SIMULATED_VIDEO
    video = torch.from_numpy(episode["video"]).permute(0, 3, 1, 2)
    common.write_video(path / "video.mp4", video, FPS, options)
    np.save(path / "actions.npy", episode["actions"])
    (path / "instruction.txt").write_text(episode["instruction"] + "\n", encoding="utf-8")
    files = {"video_path": "video.mp4", "actions_path": "actions.npy", "instruction_path": "instruction.txt"}
    if masks is not None:
        np.savez_compressed(path / "mask.npz", bits=np.packbits(masks), shape=masks.shape)
        files["mask_path"] = "mask.npz"
    paths = {key: f"episodes/{name}/{file}" for key, file in files.items()}
    metadata = {key: episode[key] for key in ("success", "random_poses", "source", "views") if key in episode}
    common.write_json(folder / f"rows/{number}.json",
                      {"id": name, **paths, "num_frames": len(episode["actions"]), **metadata})


def build(data_dir, recipe, make_episode, sources):
    """Writes an episode per source into <data_dir>.partial and renames that folder when it is complete."""
    folder = Path(f"{data_dir}.partial")
    recipe_file = folder / "recipe.json"
    if not recipe_file.is_file() or common.read_json(recipe_file) != recipe:
        shutil.rmtree(folder, ignore_errors=True)
        common.write_json(recipe_file, recipe)
    missing = [number for number in range(len(sources)) if not (folder / f"rows/{number}.json").is_file()]
    write = partial(write_episode, folder, make_episode)
    try:
        with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            episodes = pool.map(write, missing, [sources[number] for number in missing])
            list(tqdm(episodes, "episodes", len(missing), unit="episode"))
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error}): the same command continues") from error
    except BrokenExecutor as error:
        raise UserError("a process was killed, possibly out of memory: the same command continues") from error
    rows = [common.read_json(folder / f"rows/{number}.json") for number in range(len(sources))]
    manifest = {"fps": FPS, "action_dim": ACTION_DIM, **recipe, "episodes": rows}
    common.write_json(folder / "manifest.json", manifest)
    shutil.rmtree(folder / "rows")
    recipe_file.unlink()
    folder.rename(data_dir)
    print(f"wrote {data_dir}: {len(rows)} episodes, {sum(row['num_frames'] for row in rows)} frames")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Makes the data set of vidar.py and vidarc.py.",
                                     allow_abbrev=False)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--simulate", action="store_true", help="simulate episodes (default)")
    mode.add_argument("--from", dest="source_format", choices=["robotwin", "lerobot", "hdf5"],
                      help="convert SRC: RoboTwin 2.0, a LeRobot data set, or ALOHA HDF5")
    add = parser.add_argument
    add("src", nargs="?", metavar="SRC", help="file or folder to convert")
    add("data_dir", nargs="?", metavar="DST", help="folder to write, new or empty")
    add("--data_dir", dest="folder", metavar="DST", help="same as DST")
    add("--episodes", type=at_least(1), help="tasks to simulate (650), or most episodes to convert (all)")
    add("--seed", type=at_least(0), default=0, help="seed of the simulation (0)")
    add = parser.add_argument_group("simulation").add_argument
    add("--poses", type=at_least(0), default=9000, help="random poses for the inverse dynamics model (9000)")
    add("--frames", type=at_least(8), default=37, help="frames per task (37)")
    add("--size", type=at_least(32), nargs=2, default=[112, 96], metavar=("H", "W"), help="pixels (112 96)")
    add = parser.add_argument_group("conversion").add_argument
    add("--src_fps", type=at_least(FPS, float), help="frame rate of SRC, if it is missing or wrong there")
    add("--cameras", nargs=3, metavar=("HEAD", "LEFT", "RIGHT"),
        help="names of the cameras; none for a missing wrist camera")
    add("--actions", metavar="NAME,NAME", help="columns with the joint positions that a frame shows")
    add("--instruction", help="instruction of all episodes")
    add("--swap_rb", action="store_true", help="swap red and blue")
    add("--gripper_scale", type=float, nargs=2, metavar=("CLOSED", "OPEN"),
        help="values of a closed and an open gripper in SRC, mapped to 0 and 1")
    add("--random_poses", action="store_true", help="mark all episodes as random poses without a task")
    parser.error = lambda message: common.Parser.error(parser, message)

    def run():
        args = parser.parse_intermixed_args(argv)
        args.data_dir = args.folder or args.data_dir
        if any(side % 16 for side in args.size):
            raise UserError(f"--size {args.size[0]} {args.size[1]}: both must be multiples of 16")
        if args.gripper_scale and args.gripper_scale[0] == args.gripper_scale[1]:
            raise UserError("--gripper_scale: CLOSED and OPEN are equal")
        if bool(args.src) != bool(args.source_format):
            raise UserError("--from robotwin|lerobot|hdf5 SRC [DST]: both the format and SRC are required")
        if args.source_format:
            convert_all(args)
        else:
            simulate(args)
    return common.one_line_errors("prepare.py", run)


if __name__ == "__main__":
    sys.exit(main())
