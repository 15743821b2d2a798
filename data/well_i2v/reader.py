"""reader.py: reads The Well's 2-D data sets for well_i2v.py.

Layout      <set>/data/{train,valid,test}/*.hdf5; groups dimensions, boundary_conditions, scalars, t0_fields,
            t1_fields, t2_fields. Values equal those of WellDataset in the package the_well.
Shapes      T frames  C channels  H W grid. Windows are T C H W float32 in physical units.
"""
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch

import common
from common import UserError

DATASET = "turbulent_radiative_layer_2D"
SPLITS = ("train", "valid", "test")
BOUNDARIES = ("PERIODIC", "OPEN", "WALL")
# Ohana 2024, tables 2 and 3: VRMSE on the test split of turbulent_radiative_layer_2D, from 4 input frames.
PUBLISHED = {"FNO": {"one_step": 0.5001, "rollout_6:12": 1.79, "rollout_13:30": 3.54},
             "TFNO": {"one_step": 0.5016, "rollout_6:12": 6.01},               # 13:30: above 10
             "U-Net": {"one_step": 0.2418, "rollout_6:12": 0.66, "rollout_13:30": 1.04},
             "CNextU-Net": {"one_step": 0.1956, "rollout_6:12": 0.54, "rollout_13:30": 1.01}}


class WellFile(NamedTuple):
    """A file's metadata. Channels are t0 fields, then components of t1 and t2 fields, in the file's order."""
    path: Path
    dataset: str
    fields: list                                 # (group, name, components) of fields that vary in time
    names: list                                  # of the channels
    grid: tuple                                  # H, W
    periodic: tuple                              # a bool for each axis
    trajectories: int
    steps: int
    scalars: dict                                # name -> a number per trajectory
    left_out: list                               # fields and scalars that the model does not use


def strings(value):
    """A string attribute of HDF5, which may be stored as bytes or as an array -> list of str."""
    return [name.decode() if isinstance(name, bytes) else str(name) for name in np.ravel(value)]


def open_split(args, split):
    """-> [WellFile] of a split, by name. UserError if it has none, or if fields, grids or axes differ."""
    root = Path(args.data_dir)
    folders = [root, root / args.dataset, root / "datasets" / args.dataset]
    folder = next((folder / "data" / split for folder in folders if (folder / "data").is_dir()), None)
    if folder is None:
        raise UserError(f"no data set in {' or '.join(f'{folder}/data' for folder in folders)}: "
                        f"python data/well_i2v/prepare.py --download --data_dir {root}")
    paths, left_out = common.find_files(folder, (".hdf5", ".h5")) if folder.is_dir() else ([], None)
    if left_out:
        common.print_once(f"{folder}: left out {common.describe_left_out(left_out)}")
    if not paths:
        raise UserError(f"no .hdf5 files in {folder}: a set has data/train, data/valid and data/test")
    files = []
    for path in paths:
        try:
            with h5py.File(path) as file:
                files.append(read_metadata(path, file))
        except Exception as error:   # h5py raises KeyError, OSError, ValueError, ..., by what is damaged
            raise UserError(f"{path} is not in The Well's 2-D format ({common.reason(error)}): "
                            f"write_well_file of data/well_i2v/prepare.py writes it") from error
        layout, expected = ((file.names, file.grid, file.periodic) for file in (files[-1], files[0]))
        if layout != expected:
            raise UserError(f"{path} has fields, grid, periodic axes {layout}, {paths[0].name} {expected}")
    return files


def read_metadata(path, file):
    """An open h5py.File -> WellFile. ValueError where sizes contradict each other."""
    dims = strings(file["dimensions"].attrs["spatial_dims"])
    if len(dims) != 2:
        raise ValueError(f"{len(dims)} spatial axes")
    grid = tuple(file["dimensions"][dim].shape[-1] for dim in dims)
    trajectories, steps = int(np.ravel(file.attrs["n_trajectories"])[0]), file["dimensions/time"].shape[-1]
    fields, names, left_out, scalars = [], [], [], {}
    for order, components in enumerate(([""], dims, [a + b for a in dims for b in dims])):
        group = f"t{order}_fields"
        for name in strings(file[group].attrs["field_names"]) if group in file else ():
            attrs, shape = file[group][name].attrs, file[group][name].shape
            varying = [np.ravel(attrs["sample_varying"])[0], np.ravel(attrs["time_varying"])[0]]
            varying += list(attrs["dim_varying"])
            sizes = [n for n, used in zip((trajectories, steps, *grid), varying) if used] + [2] * order
            if shape != tuple(sizes):
                raise ValueError(f"field {name} has shape {shape}, its attributes say {tuple(sizes)}")
            if file[group][name].dtype.kind not in "fiub":
                raise ValueError(f"field {name} is {file[group][name].dtype}, not real numbers")
            if varying[1]:
                fields.append((group, name, len(components)))
                names += [f"{name}_{part}" if part else name for part in components]
            else:
                left_out.append(f"field {name}, which is constant in time")
    for name in strings(file["scalars"].attrs["field_names"]) if "scalars" in file else ():
        values = np.ravel(file["scalars"][name][()]).astype(float)
        if np.ravel(file["scalars"][name].attrs.get("time_varying", False))[0]:
            left_out.append(f"scalar {name}, which varies in time")
        elif len(values) not in (1, trajectories) or not np.isfinite(values).all():
            raise ValueError(f"scalar {name} is {values.tolist()}, for {trajectories} trajectories")
        else:
            scalars[name] = np.resize(values, trajectories).tolist()
    if not names:
        raise ValueError("no field varies in time")
    kinds = {dim: set() for dim in dims}
    for boundary in file.get("boundary_conditions", {}).values():
        for dim in strings(boundary.attrs["associated_dims"]):
            kinds[dim].update(kind.upper() for kind in strings(boundary.attrs["bc_type"]))
    if unknown := set().union(*kinds.values()) - set(BOUNDARIES):
        raise ValueError(f"boundary {', '.join(unknown)} is neither PERIODIC nor OPEN nor WALL")
    periodic = tuple(kinds[dim] == {"PERIODIC"} for dim in dims)
    dataset, = strings(file.attrs.get("dataset_name", path.stem))
    return WellFile(path, dataset, fields, names, grid, periodic, trajectories, steps, scalars, left_out)


def read_window(file, trajectory, start, length):
    """Frames start .. start + length - 1 of a trajectory -> T C H W float32, in physical units.

    UserError where the trajectory is too short, and for NaN or Inf, naming file, trajectory and step.
    """
    if start + length > file.steps:
        raise UserError(f"{file.path} has {file.steps} steps: a window of {length} from {start} does not fit")
    channels = []
    with h5py.File(file.path) as opened:
        for group, name, components in file.fields:
            stored = opened[group][name]
            index = (trajectory,) if np.ravel(stored.attrs["sample_varying"])[0] else ()
            values = np.asarray(stored[(*index, slice(start, start + length))], np.float32)
            sizes = [n if used else 1 for n, used in zip(file.grid, stored.attrs["dim_varying"])]
            values = values.reshape(length, *sizes, components)
            channels.append(np.broadcast_to(values, (length, *file.grid, components)))
    window = torch.from_numpy(np.concatenate(channels, -1)).permute(0, 3, 1, 2).contiguous()
    finite = window.isfinite().flatten(1).all(1)
    if not finite.all():
        raise UserError(f"{file.path}: trajectory {trajectory} has NaN or Inf at step "
                        f"{start + int(finite.int().argmin())}")
    return window


def list_windows(files, length, count=0):
    """-> [(index of the file, trajectory, start)] of windows of `length` steps: all, or `count`, the same
    number per file, evenly spaced over its trajectories and starts."""
    rows = []
    for i, file in enumerate(files):
        starts = range(file.steps - length + 1)
        if not starts:
            raise UserError(f"{file.path} has {file.steps} steps, too few for a window of {length}")
        windows = [(i, k, start) for k in range(file.trajectories) for start in starts]
        share = len(windows)
        if count:
            share = min(count // len(files) + (i < count % len(files)), len(windows))
        rows += [windows[(2 * j + 1) * len(windows) // (2 * share)] for j in range(share)]
    return rows


class Windows:
    """Windows of n_in + n_out frames of a split: all, or `count`, evenly spaced."""
    def __init__(self, args, split, count=0):
        self.files, self.args = open_split(args, split), args
        self.rows = list_windows(self.files, args.n_in + args.n_out, count)
        self.names, self.grid, self.periodic = self.files[0].names, self.files[0].grid, self.files[0].periodic
        self.texts = {}                          # prompt -> L D, set by encode_prompts

    def fields(self, numbers, shifts=None):
        """Windows by their numbers in rows -> B T C H W, rolled by `shifts`."""
        length = self.args.n_in + self.args.n_out
        rows = [self.rows[n] for n in numbers]
        windows = [read_window(self.files[i], trajectory, start, length) for i, trajectory, start in rows]
        return self.roll(torch.stack(windows), shifts)

    def roll(self, windows, shifts):
        """Rolls B T C H W along periodic axes by `shifts` B in [0, 1), fractions of the grid, or None."""
        if shifts is None:
            return windows
        rolled = []
        for window, shift in zip(windows, shifts.tolist()):
            for axis, periodic in enumerate(self.periodic):
                if periodic:                     # the factor decorrelates the two axes
                    window = window.roll(int(shift * 7919 ** axis % 1 * self.grid[axis]), 2 + axis)
            rolled.append(window)
        return torch.stack(rolled)

    def prompt(self, i, k):
        """Data set and scalars of trajectory k of file i, such as "shear flow, Reynolds 1e+05"."""
        scalars = [f"{name} {values[k]:g}" for name, values in self.files[i].scalars.items()]
        return ", ".join([self.files[i].dataset.replace("_", " "), *scalars])

    def text(self, rows, device):
        """[(file, trajectory, ...)] -> B L D, or None where no network reads text."""
        if not self.texts:
            return None
        texts = [self.texts[self.prompt(i, k)] for i, k, *_ in rows]
        return common.pad_text(texts, self.args.text_length).to(device)


def open_data(args):
    """-> {split: Windows}, 32 windows of "valid". UserError if fields or grids of the splits differ, or if
    those of the run's adapter are others."""
    data = {split: Windows(args, split, count) for split, count in zip(SPLITS, (0, 32, 0))}
    train = data["train"]
    for windows in data.values():
        if (windows.names, windows.grid) != (train.names, train.grid):
            raise UserError(f"{windows.files[0].path} differs from split train in fields or grid")
    adapter = Path(args.output_dir, "adapter/adapter.json")
    if adapter.is_file():
        names, grid = (common.read_json(adapter)[key] for key in ("names", "grid"))
        if names != train.names or tuple(grid) != train.grid:
            raise UserError(f"{args.output_dir} was trained on {', '.join(names)} on {tuple(grid)}, not on "
                            f"{', '.join(train.names)} on {train.grid}: choose another --output_dir")
    counts = [f"{split}: {len(windows.rows)} windows" for split, windows in data.items()]
    left_out = [f"left out: {name}" for name in train.files[0].left_out]
    common.print_once("; ".join([f"{', '.join(train.names)} on {train.grid}", *counts, *left_out]))
    return data
