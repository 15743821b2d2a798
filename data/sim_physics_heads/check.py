"""check.py: lists the recordings of a data set and checks that they are what sim_physics_heads.py expects.

Run         python data/sim_physics_heads/check.py FOLDER ...       # or prepare.py --check FOLDER ...
Reads       FOLDER/<scene>/env_0/0/0/rgb/step_0000.png                  or rgb_capture, .jpg
            FOLDER/<scene>/env_0/0/0/motion_vectors/step_0000.npy       H W 2 or 4, floats, in pixels
            FOLDER/<scene>/env_0/0/0/distance_to_camera/step_0000.npy   H W, floats, in metres
            FOLDER/metadata.csv                                         optional: video,prompt
Prints      counts, unpaired files, value ranges, NaN; how well each interpretation of the motion vectors
            (sign, unit, frame offset) warps a frame to the next. Exit code 2 and the fault's name if the
            vectors or depths have another meaning. --json FILE: also writes the list, for clips.py.
"""
import argparse
import csv
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))       # the root of the repository
import common  # noqa: E402
from common import UserError  # noqa: E402

FAR = 100                                              # metres; depths from here on are sky
KINDS = {"rgb": ("rgb", "rgb_capture"), "motion": ("motion_vectors",), "depth": ("distance_to_camera",)}
CHANNELS = {"motion": (2, 4), "depth": (1,)}
COLUMNS = {"video": ("video", "path", "folder", "file_name"), "prompt": ("prompt", "caption", "text")}


# ---- list -----------------------------------------------------------------------------------------------

def list_recordings(root):
    """-> {folder: {"rgb", "motion", "depth": {step: file}}} below root, following links. A file's step is the
    last number in its name. Files are paired by step, not by their order."""
    kinds = {alias: kind for kind, aliases in KINDS.items() for alias in aliases}
    recordings = {}
    for file in common.find_files(root, (".png", ".jpg", ".jpeg", ".npy"))[0]:
        numbers = re.findall(r"\d+", file.stem)
        if file.parent.name in kinds and numbers:
            files = recordings.setdefault(file.parent.parent, {kind: {} for kind in KINDS})
            first = files[kinds[file.parent.name]].setdefault(int(numbers[-1]), file)
            if first != file:
                raise UserError(f"{first} and {file.name} have the same step number")
    return recordings


def read_table(path):
    """metadata.csv -> {folder: prompt or None}. Column names are case-insensitive. Commas in the last column
    need no quotes."""
    text = common.read_text(path)
    delimiter = max(",;\t", key=text.split("\n")[0].count)
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(
            text.splitlines(), delimiter=delimiter, skipinitialspace=True, strict=True)]
    except csv.Error as error:                         # such as an unclosed quote
        raise UserError(f"{path} is not a CSV table: {error}") from error
    header = [cell.lower() for cell in rows[0]] if rows else []
    video, prompt = (next((i for i, cell in enumerate(header) if cell in aliases), None)
                     for aliases in COLUMNS.values())
    if video is None:
        raise UserError(f"{path} has no column video: its columns are {', '.join(header)}")
    if prompt is None:
        print(f"{path} has no column prompt, caption or text: prompts are made from folder names")
    prompts = {}
    for number, row in enumerate(rows[1:], 2):
        if not any(row):
            continue
        if prompt == len(header) - 1:
            row[prompt:] = [f"{delimiter} ".join(row[prompt:])]
        if len(row) > len(header) or len(row) <= video or not row[video]:
            raise UserError(f"{path}, line {number} does not fit the columns {', '.join(header)}: "
                            f"{delimiter.join(row)[:80]}")
        folder = path.parent / row[video]              # an absolute path replaces the parent
        folder = folder / "env_0/0/0" if (folder / "env_0/0/0").is_dir() else folder
        if not folder.is_dir():
            raise UserError(f"{path}, line {number}: there is no folder {folder}")
        prompts[folder] = row[prompt] if prompt is not None and prompt < len(row) else None
    return prompts


def find_scenes(root):
    """-> list of {"name", "folder", "prompt", "files", "steps" (those with all kinds of files), "size" H W of
    pictures, "spacing" of steps}."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no folder {root}")
    recordings = list_recordings(root)
    prompts = dict.fromkeys(recordings)
    if (root / "metadata.csv").is_file():
        prompts = read_table(root / "metadata.csv")
        for folder in prompts.keys() - recordings.keys():          # outside root
            recordings[folder] = next(iter(list_recordings(folder).values()), {})
        unlisted = sorted(str(folder) for folder in recordings.keys() - prompts.keys())
        if unlisted:
            print(f"left out, not in {root / 'metadata.csv'}: {', '.join(unlisted)}")
    scenes = []
    for folder, prompt in prompts.items():
        files = recordings[folder]
        name = [part for part in Path(os.path.abspath(folder)).parts
                if not re.fullmatch(r"\d+|env(_\d+)?|camera|cam_\d+", part)][-1]
        for kind, aliases in KINDS.items():
            if not files.get(kind):
                raise UserError(f"scene {name}: {folder} lacks files in {aliases[0]}")
        steps = sorted(set.intersection(*map(set, files.values())))
        if not steps:
            counts = ", ".join(f"{len(paths)} {kind}" for kind, paths in files.items())
            raise UserError(f"scene {name}: the files in {folder} have no step in common ({counts} files)")
        gaps = [after - before for before, after in zip(steps, steps[1:])]
        prompt = prompt or "A physics simulation of " + name.removeprefix("test_").replace("_", " ")
        size = common.read_image(files["rgb"][steps[0]]).shape[:2]
        scenes.append({"name": name, "folder": str(folder), "prompt": prompt, "files": files, "steps": steps,
                       "size": size, "spacing": max(gaps, key=gaps.count, default=1)})
    if not scenes:
        raise UserError(f"no scenes in {root}: expected folders such as test_ball_ramp/env_0/0/0 with rgb, "
                        f"motion_vectors and distance_to_camera")
    return scenes


# ---- check ----------------------------------------------------------------------------------------------

def load(file, kind, size):
    """Reads a .npy file as float32 H W c. An empty motion file, of a first frame, gives shape (0, 0, 2)."""
    try:
        array = np.load(file)
    except Exception as error:                         # numpy raises ValueError, OSError, EOFError, ...
        raise UserError(f"{file} cannot be read: {common.reason(error)}") from error
    shape = array.shape + (1,) * (array.ndim == 2)
    if kind == "motion" and not array.size:
        return np.zeros((0, 0, 2), np.float32)
    if len(shape) != 3 or shape[2] not in CHANNELS[kind] or array.dtype.kind != "f":
        raise UserError(f"{file} is {array.dtype} {array.shape}: expected floats of shape (H, W, "
                        f"{' or '.join(map(str, CHANNELS[kind]))})")
    if shape[:2] != tuple(size):
        raise UserError(f"{file} is {shape[1]} x {shape[0]}, the pictures are {size[1]} x {size[0]}")
    return array.reshape(shape).astype(np.float32)


def evenly(items, count):
    return [items[i] for i in sorted(set(np.linspace(0, len(items) - 1, count).astype(int)))] if items else []


def describe(scene):
    """Prints statistics of eight steps of a recording. Raises UserError if depth is not in metres."""
    files = scene["files"]
    steps = scene["steps"]
    folder = scene["folder"]
    motion, depth = (
        np.concatenate([load(files[kind][step], kind, scene["size"]).ravel() for step in evenly(steps, 8)])
        for kind in ("motion", "depth"))
    known = motion[np.isfinite(motion)]
    metres = depth[np.isfinite(depth) & (depth > 0)]
    median = np.median(metres) if len(metres) else 0.0
    print(f"{folder}: {len(steps)} steps, spacing {scene['spacing']}; unpaired files: "
          + ", ".join(f"{len(paths) - len(steps)} {kind}" for kind, paths in files.items())
          + f"\n  motion {known.min(initial=0):.1f} to {known.max(initial=0):.1f}, "
          f"{1 - len(known) / max(1, len(motion)):.1%} NaN or Inf; depth {metres.min(initial=np.inf):.2f} to "
          f"{metres.max(initial=0):.2f}, median {median:.2f}, {np.isnan(depth).mean():.1%} NaN, "
          f"{np.isinf(depth).mean():.1%} Inf")
    if not 0.01 < median < FAR:
        unit = "millimetres" if median > 10 * FAR else "centimetres or millimetres"
        raise UserError(f"{folder}: the median of distance_to_camera is {median:.4g}; expected metres"
                        + (f", these are probably {unit}" if median > FAR else ""))


def warp_errors(scenes, count=24):
    """Warps frame t-1 to frame t with each interpretation of the vectors, in the pairs with most motion, at
    pixels that move and that differ from the recording's median picture: those of moving objects. -> mean
    differences, 0 to 255, {(sign, unit, offset of the motion file) or "no motion": number}, pixels."""
    ranked = []
    for scene in scenes:
        rgb, motion, spacing = scene["files"]["rgb"], scene["files"]["motion"], scene["spacing"]
        usable = [t for t in sorted(rgb) if t - spacing in rgb
                  and all(t + offset * spacing in motion for offset in (-1, 0, 1))]
        speeds = []
        for t in evenly(usable, 12):
            vectors = load(motion[t], "motion", scene["size"])
            speeds.append((np.abs(vectors[np.isfinite(vectors)]).mean() if vectors.size else 0.0, t))
        # The n-th fastest pair of a recording ranks by speed / n, to mix recordings.
        ranked += [(speed / rank, t, scene) for rank, (speed, t) in enumerate(sorted(speeds)[::-1], 1)]
    errors, pixels = {}, 0
    for _, t, scene in sorted(ranked, key=lambda row: -row[0])[:count]:
        files, spacing = scene["files"], scene["spacing"]
        rgb = {step: common.read_image(files["rgb"][step], scene["size"]).astype(np.float32)
               for step in [t, t - spacing, *evenly(sorted(files["rgb"]), 9)]}
        vectors = {offset: np.nan_to_num(load(files["motion"][t + offset * spacing], "motion", scene["size"]))
                   for offset in (-1, 0, 1)}
        if not all(array.size for array in vectors.values()):
            continue
        length = np.max([np.hypot(array[..., 0], array[..., 1]) for array in vectors.values()], axis=0)
        foreground = np.abs(rgb[t] - np.median(list(rgb.values()), axis=0)).mean(axis=-1) > 8
        y, x = np.nonzero((length > 0.1 * length.max()) & foreground)
        H, W = length.shape
        previous = torch.from_numpy(rgb[t - spacing]).permute(2, 0, 1)[None]
        readings = {"no motion": np.zeros((len(x), 2))}
        for offset, array in vectors.items():
            for unit, scale in {"pixels": (1, 1), "NDC": (W / 2, H / 2), "UV": (W, H)}.items():
                readings[1, unit, offset] = array[y, x, :2] * scale
                readings[-1, unit, offset] = array[y, x, :2] * scale * -1
        for key, step in readings.items():
            grid = torch.from_numpy((np.stack([x, y], 1) + step + 0.5) * 2 / [W, H] - 1)[None, None].float()
            warped = F.grid_sample(previous, grid, padding_mode="border", align_corners=False)[0, :, 0].T
            errors[key] = errors.get(key, 0) + np.abs(warped.numpy() - rgb[t][y, x]).sum() / 3
        pixels += len(x)
    return {key: error / max(1, pixels) for key, error in errors.items()}, pixels


def check(folders, json_file=None):
    """Prints statistics of recordings and checks their vectors. Raises UserError with the fault."""
    scenes = [scene for folder in folders for scene in find_scenes(folder)]
    for scene in scenes:
        describe(scene)
    check_vectors(scenes)
    if json_file:
        Path(json_file).write_text(json.dumps(scenes, default=str))


def check_vectors(scenes):
    """Prints which interpretation of the vectors explains the pictures. UserError if it is unexpected."""
    errors, pixels = warp_errors(scenes)
    if pixels < 200:
        return print(f"{pixels} moving pixels are too few to test sign, unit and offset of motion_vectors")
    unwarped = errors.pop("no motion")
    print(f"frame t-1 warped to frame t, mean error of {pixels} moving pixels; without a warp {unwarped:.2f}")
    for sign, unit, offset in sorted(errors, key=errors.get)[:5]:
        print(f"  {'+-'[sign < 0]} motion in {unit}, file of t{offset:+d}: {errors[sign, unit, offset]:.2f}")
    sign, unit, offset = min(errors, key=errors.get)
    error, faults = errors[sign, unit, offset], []
    if error > 0.8 * unwarped:
        faults.append("they do not explain the pictures")
    if sign < 0:
        faults.append("they point the other way: multiply by -1")
    if unit != "pixels":
        faults.append(f"their unit is {unit}, not pixels")
    if offset and error < 0.97 * errors[sign, unit, 0]:        # slow objects fit all offsets
        faults.append(f"they are shifted against rgb: the file of step t{offset:+d} belongs to frame t")
    if faults:
        raise UserError(f"motion_vectors are not as expected: {'; '.join(faults)}")
    print("motion is previous minus current position in pixels, in step with rgb; depth is in metres")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Checks recordings for sim_physics_heads.py.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders that hold recordings")
    parser.add_argument("--json", metavar="FILE", help="also write the list of recordings")
    args = parser.parse_args(argv)

    def run():
        check(args.folders, args.json)
    return common.one_line_errors("check.py", run)


if __name__ == "__main__":
    sys.exit(main())
