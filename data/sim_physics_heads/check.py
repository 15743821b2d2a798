"""check.py: checks recordings for sim_physics_heads.py, which runs it before it builds its cache.

Run         python data/sim_physics_heads/check.py FOLDER ...       # or prepare.py --check FOLDER ...
Prints      counts, files without partners, ranges, NaN; how well each reading of the motion vectors (sign,
            unit, frame offset) warps a frame to the next. Exit code 2, with the fault's name, where the
            vectors or depths are not as sim_physics_heads.py reads them.
"""
import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))       # the root of the repository
import common  # noqa: E402
from common import UserError  # noqa: E402

FAR = 100                                              # metres; as far as this is sky
KINDS = {"rgb": "rgb", "rgb_capture": "rgb", "motion_vectors": "motion", "distance_to_camera": "depth"}


def find_recordings(folders):
    """-> {folder of a recording: {"rgb", "motion", "depth": {step number: file}}}."""
    recordings = {}
    for folder in folders:
        for file in common.find_files(folder, (".png", ".jpg", ".jpeg", ".npy"))[0]:
            number = re.findall(r"\d+", file.stem)
            if file.parent.name in KINDS and number:
                files = recordings.setdefault(file.parent.parent, {kind: {} for kind in KINDS.values()})
                files[KINDS[file.parent.name]][int(number[-1])] = file
    return recordings


def load(file):
    """A .npy file as float32; an empty array is written for frames without one before."""
    try:
        return np.load(file).astype(np.float32)
    except Exception as error:                         # numpy raises its own, OSError, EOFError, ...
        raise UserError(f"cannot read {file}: {common.reason(error)}") from error


def evenly(items, count):
    return [items[i] for i in sorted(set(np.linspace(0, len(items) - 1, count).astype(int)))] if items else []


def describe(folder, files):
    """Prints what a recording's files hold, by eight of its steps. UserError where depth is not in metres."""
    steps = sorted(set.intersection(*map(set, files.values())))
    if not steps:
        raise UserError(f"{folder}: rgb, motion_vectors and distance_to_camera share no step")
    motion, depth = (np.concatenate([load(files[kind][step]).ravel() for step in evenly(steps, 8)])
                     for kind in ("motion", "depth"))
    metres = depth[np.isfinite(depth) & (depth > 0)]
    known = motion[np.isfinite(motion)]
    median = np.median(metres) if len(metres) else 0.0
    print(f"{folder}: {len(steps)} steps; files without partners: "
          + ", ".join(f"{len(paths) - len(steps)} {kind}" for kind, paths in files.items())
          + f"; motion {known.min(initial=0):.1f} to {known.max(initial=0):.1f}, "
          f"{1 - len(known) / max(1, len(motion)):.1%} NaN or Inf; depth {metres.min(initial=np.inf):.2f} to "
          f"{metres.max(initial=0):.2f}, median {median:.2f}, {np.isnan(depth).mean():.1%} NaN, "
          f"{np.isinf(depth).mean():.1%} Inf")
    if not 0.01 < median < FAR:
        unit = "millimetres" if median > 10 * FAR else "centimetres or millimetres"
        raise UserError(f"{folder}: the median of distance_to_camera is {median:.4g}; metres are expected"
                        + (f", these are probably {unit}" if median > FAR else ""))


def warp_errors(recordings, count=24):
    """Warps frame t-1 to frame t by each reading of the vectors, in the pairs with most motion, at pixels
    that move in some reading and differ from the recording's median picture: those of moving objects.
    -> {(sign, unit, offset of the motion file): mean difference, 0 to 255}, that without a warp, pixels."""
    ranked = []
    for files in recordings.values():
        usable = [t for t in sorted(files["rgb"]) if t - 1 in files["rgb"]
                  and all(t + offset in files["motion"] for offset in (-1, 0, 1))]
        speeds = [(np.nan_to_num(load(files["motion"][t])).__abs__().mean(), t) for t in evenly(usable, 12)]
        ranked += [(speed / rank, t, files) for rank, (speed, t) in enumerate(sorted(speeds)[::-1], 1)]
    errors, pixels = {}, 0
    for _, t, files in sorted(ranked, key=lambda row: -row[0])[:count]:
        rgb = {step: common.read_image(files["rgb"][step]).astype(np.float32)
               for step in [t, t - 1, *evenly(sorted(files["rgb"]), 9)]}
        vectors = {offset: np.nan_to_num(load(files["motion"][t + offset])) for offset in (-1, 0, 1)}
        if not all(array.size for array in vectors.values()):
            continue
        length = np.max([np.hypot(array[..., 0], array[..., 1]) for array in vectors.values()], axis=0)
        foreground = np.abs(rgb[t] - np.median(list(rgb.values()), axis=0)).mean(axis=-1) > 8
        y, x = np.nonzero((length > 0.1 * length.max()) & foreground)
        H, W = length.shape
        previous = torch.from_numpy(rgb[t - 1]).permute(2, 0, 1)[None]
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


def check(folders):
    """Prints what recordings hold and what their vectors mean. UserError names the fault."""
    recordings = find_recordings(folders)
    for folder, files in recordings.items():
        describe(folder, files)
    errors, pixels = warp_errors(recordings)
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
    if offset and error < 0.97 * errors[sign, unit, 0]:        # slow plain objects fit all offsets
        faults.append(f"they are shifted against rgb: the file of step t{offset:+d} belongs to frame t")
    if faults:
        raise UserError(f"motion_vectors are not as expected: {'; '.join(faults)}")
    print("motion is previous minus current position in pixels, in step with rgb; depth is in metres")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Checks recordings for sim_physics_heads.py.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders that hold recordings")
    args = parser.parse_args(argv)

    def run():
        check(args.folders)
    return common.one_line_errors("check.py", run)


if __name__ == "__main__":
    sys.exit(main())
