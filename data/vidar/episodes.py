"""episodes.py: reads and checks the data sets of vidar.py and vidarc.py.

Run         python data/vidar/episodes.py DATA       # checks a data set and prints a summary
Layout      DATA/manifest.json                      {"fps": 10, "episodes": [{"id": "ep_0001", ...}, ...]}
            DATA/episodes/ep_0001/video.mp4         T frames: the mosaic of the cameras at 10 fps
            DATA/episodes/ep_0001/actions.npy       (T, 14): the joint positions that frame t shows
            DATA/episodes/ep_0001/instruction.txt   UTF-8
            DATA/episodes/ep_0001/mask.npz          optional: arm masks, bits of T H W
            In a row of the manifest, "random_poses": true marks an episode without a task, and "views" names
            the cameras of the mosaic.
"""
import argparse
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))       # the root of the repository
import common  # noqa: E402
from common import UserError  # noqa: E402
from data.vidar.world import ACTION_DIM, BLOCK_COLORS, VIEWS  # noqa: E402

FPS = 10
TASK = re.compile("using (left|right) arm, put the (red|blue) block on the plate[.]")       # of world.py


@dataclass
class Episode:
    """An episode of a data set. random_poses: the episode shows no task, only poses for the inverse dynamics
    model. views: cameras of the mosaic."""
    folder: Path
    actions: np.ndarray                          # (T, 14) float32
    instruction: str
    random_poses: bool
    views: tuple

    @property
    def has_mask(self) -> bool:
        return (self.folder / "mask.npz").is_file()


def read_manifest(data_dir) -> dict:
    """Reads manifest.json; a list is read as {"episodes": list}. UserError if it is missing or malformed."""
    path = Path(data_dir) / "manifest.json"
    if not path.is_file():
        raise UserError(f"no data set in {data_dir}: run python data/vidar/prepare.py to make or convert one")
    manifest = common.read_json(path)
    try:
        manifest = manifest if isinstance(manifest, dict) else {"episodes": manifest}
        ids = [str(row["id"]) for row in manifest["episodes"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path} must hold "episodes", a list of objects with an "id"') from error
    if manifest.get("fps", FPS) != FPS:
        raise UserError(f"{path} has {manifest['fps']} fps, not {FPS}: convert it with data/vidar/prepare.py")
    if len(set(ids)) < len(ids):
        raise UserError(f"{path} names an episode twice")
    return manifest


def open_episode(data_dir, row) -> Episode:
    """A row of the manifest -> Episode. UserError, naming the file, for missing or malformed files."""
    folder = Path(data_dir) / "episodes" / str(row["id"])
    for name in ("video.mp4", "actions.npy", "instruction.txt"):
        if not (folder / name).is_file():
            raise UserError(f"episode {row['id']} of {data_dir} has no file {folder / name}")
    try:
        actions = np.load(folder / "actions.npy").astype(np.float32, casting="same_kind")
    except Exception as error:                   # numpy raises ValueError, OSError, EOFError, ...
        raise UserError(f"{folder}/actions.npy cannot be read: {common.reason(error)}") from error
    if actions.ndim != 2 or actions.shape[1] != ACTION_DIM or not len(actions):
        raise UserError(f"{folder}/actions.npy: actions are {actions.shape}, not (T, {ACTION_DIM})")
    if not np.isfinite(actions).all():
        frame = np.isfinite(actions).all(1).argmin()
        raise UserError(f"{folder}/actions.npy: action of frame {frame} is NaN or infinite")
    instruction = common.read_text(folder / "instruction.txt").strip()
    views, random_poses = row.get("views") or list(VIEWS), row.get("random_poses") or False
    valid = isinstance(views, list) and len(views) <= len(VIEWS) and all(isinstance(v, str) for v in views)
    if not valid or not isinstance(random_poses, bool):
        raise UserError(f"episode {row['id']} of {data_dir}: in manifest.json, views is a list of up to "
                        f"{len(VIEWS)} names and random_poses is true or false")
    return Episode(folder, actions, instruction, random_poses, tuple(views))


def load_splits(data_dir) -> dict[str, list[Episode]]:
    """-> {"train", "val", "test": episodes}, tasks before random poses. Of ten episodes of a kind,
    the 6th is for validation and the 10th for testing; of fewer than ten, the middle and the last one."""
    episodes = [open_episode(data_dir, row) for row in read_manifest(data_dir)["episodes"]]
    splits = {"train": [], "val": [], "test": []}
    for random_poses in (False, True):
        chosen = [episode for episode in episodes if episode.random_poses == random_poses]
        if not random_poses and len(chosen) < 3:
            raise UserError(f"{data_dir}: {len(chosen)} episodes with a task cannot be split into train, val "
                            f"and test")
        period = min(10, len(chosen))
        held_out = {period - 1: "test", period // 2: "val"} if period > 2 else {}
        for i, episode in enumerate(chosen):
            splits[held_out.get(i % period, "train")].append(episode)
    return splits


def tasks(episodes) -> list[Episode]:
    """The episodes that show a task."""
    return [episode for episode in episodes if not episode.random_poses]


def read_episode(episode, size):
    """-> frames T 3 H W uint8, resized to `size` (H, W), and arm masks T H W bool or None. UserError if
    the video cannot be read or does not match the actions."""
    frames = common.read_video(episode.folder / "video.mp4")
    if len(frames) != len(episode.actions):
        raise UserError(f"{episode.folder}/video.mp4 has {len(frames)} frames, but there are "
                        f"{len(episode.actions)} actions")
    if frames.shape[-2:] != tuple(size):         # stretched, like 720 to 736 rows in the official data
        frames = F.interpolate(frames, tuple(size), mode="bicubic", antialias=True)
    if not episode.has_mask:
        return frames, None
    try:
        packed = np.load(episode.folder / "mask.npz")
        masks = np.unpackbits(packed["bits"], count=packed["shape"].prod())
        masks = masks.reshape(len(frames), *packed["shape"][1:3])
    except Exception as error:                   # KeyError, BadZipFile, ...
        raise UserError(f"{episode.folder}/mask.npz does not hold bits and shape of {len(frames)} masks: "
                        f"{common.reason(error)}") from error
    return frames, resize(torch.from_numpy(masks)[:, None].float(), size)[:, 0] >= .5


def resize(images, size):
    """n C H W -> n C h w, anti-aliased; the aspect ratio may change."""
    if images.shape[-2:] == tuple(size):
        return images
    return F.interpolate(images, tuple(size), mode="bilinear", antialias=True)


def cut_window(episode, start, length):
    """-> frame indices of a window, and valid, bool: the last frame pads a window beyond the end."""
    indices = start + np.arange(length)
    return indices.clip(max=len(episode.actions) - 1), torch.from_numpy(indices < len(episode.actions))


def load_window(episode, frames, size):
    """The first window of an episode -> video T 3 H W in [0, 1], actions T 14, valid T bool, arm masks T H W
    bool or None."""
    indices, valid = cut_window(episode, 0, frames)
    video, masks = read_episode(episode, size)
    actions = torch.from_numpy(episode.actions[indices])
    return video[indices] / 255, actions, valid, None if masks is None else masks[indices]


def make_prompt(instruction, head_view, views=VIEWS) -> str:
    """The prompt of the text encoder: upstream's description of style, cameras and robot, followed by the
    instruction. head_view: "rear", "front", "high", or "none" for the instruction alone. An instruction that
    already has the description is not changed."""
    task = instruction.strip()
    if head_view == "none" or "performing the following task:" in task:
        return task
    cameras = [f"a {view} camera" for view in (f"fixed {head_view}", *views[1:])]
    listed = ", and ".join([", ".join(cameras[:-1]), cameras[-1]] if len(cameras) > 1 else cameras)
    count = ("one view", "two views", "three views")[len(cameras) - 1]
    if head_view != "front":                     # upstream keeps the case with its front camera
        task = task[:1].lower() + task[1:]
    return (f"The whole scene is in a realistic, industrial art style with {count}: {listed}. "
            f"The aloha robot is currently performing the following task: {task}")


def idm_scores(prediction, target):
    """Actions N 14 -> {"r2": mean over the joints that move, "r2_worst", "l1", "accuracy": share of frames in
    which all joints are within 0.05 rad and both grippers within 0.5}."""
    error = (prediction - target).abs()
    tolerance = torch.full((ACTION_DIM,), .05)
    tolerance[[6, 13]] = .5                      # grippers
    residual = (prediction - target).double().square().sum(0)
    variation = (target - target.mean(0)).double().square().sum(0)
    moving = variation > 1e-6 * len(target)      # R2 is undefined for joints at rest
    r2 = 1 - (residual / variation)[moving]
    worst = r2.min().item() if len(r2) else math.nan
    return {"r2": r2.mean().item(), "r2_worst": worst, "l1": error.mean().item(),
            "accuracy": (error < tolerance).all(1).float().mean().item()}


def video_scores(video, truth, arm, valid):
    """T 3 H W in [0, 1] twice, arm T H W bool or None, valid T bool -> {metric: 1 T-1}, of the frames after
    the first; NaN for padding."""
    scores = {"psnr": common.psnr(video, truth), "ssim": common.ssim(video, truth)}
    if arm is not None:
        error = ((video - truth).square().mean(1) * arm).flatten(1).sum(1) / arm.flatten(1).sum(1)
        scores["psnr_arm"] = -10 * torch.log10(error.clamp(min=1e-6))
    return {name: torch.where(valid, value, math.nan)[None, 1:].float() for name, value in scores.items()}


def other_task(episode):
    """A simulated Episode with the other arm and block in its instruction; None for other data."""
    other = {"left": "right", "right": "left", "red": "blue", "blue": "red"}
    if not TASK.fullmatch(episode.instruction):
        return None
    return replace(episode, instruction=re.sub("|".join(other), lambda match: other[match[0]],
                                               episode.instruction))


def block_displacement(video, color):
    """Displacement in pixels of a block's centre in the upper view of a mosaic, from the first frame that
    shows the block to the last one. video T 3 H W in [0, 1]."""
    view = 255 * video[:, :, :video.shape[2] * 2 // 3] - torch.tensor(color).view(3, 1, 1)
    t, y, x = (view.abs().amax(1) < 70).nonzero().float().unbind(1)
    centres = [torch.stack([x[t == frame].mean(), y[t == frame].mean()]) for frame in t.unique()]
    return (centres[-1] - centres[0]).norm().item() if centres else 0.0


def follows_instruction(video, actions, episode):
    """Whether the arm and the block of the instruction of a simulated task move more than the other ones.
    video T 3 H W in [0, 1], its actions T 14 -> {"follows_arm", "follows_block"}: 0 or 1."""
    side, color = TASK.fullmatch(episode.instruction).groups()
    rotation = (actions.amax(0) - actions.amin(0)).unflatten(0, (2, 7))[:, :6].sum(1)         # left, right
    moved = {name: block_displacement(video, rgb) for name, rgb in BLOCK_COLORS.items()}
    return {"follows_arm": float(rotation.argmax() == ("left", "right").index(side)),
            "follows_block": float(max(moved, key=moved.get) == color)}


def check(argv):
    parser = argparse.ArgumentParser(prog="episodes.py", description=__doc__.split("\n")[0])
    parser.add_argument("data", metavar="DATA", help="folder of the data set")
    splits = load_splits(parser.parse_args(argv).data)
    for split, episodes in splits.items():
        actions = np.concatenate([episode.actions for episode in episodes])
        print(f"{split}: {len(episodes)} episodes, {len(tasks(episodes))} with a task, {len(actions)} frames")
        for episode in episodes:
            read_episode(episode, (32, 32))
        for joint, (low, high) in enumerate(zip(actions.min(0), actions.max(0))):
            print(f"    action {joint:2}: {low:8.3f} to {high:8.3f}")


def main(argv=None):
    return common.one_line_errors("episodes.py", lambda: check(argv))


if __name__ == "__main__":
    sys.exit(main())
