"""prepare.py: the data set of well_i2v.py: simulated, downloaded, or your own fields in The Well's format.

Run         python data/well_i2v/prepare.py                                    # 20 runs on 32 x 96: 1 min
            python data/well_i2v/prepare.py --download --data_dir data/the_well          # 7 GB, resumable
            python data/well_i2v/prepare.py --nx 128 --t_cools 0.03 0.1 0.32 1 3.16 --train 8 --data_dir DIR
Writes      data_dir/data/{train,valid,test}/*.hdf5, with the attributes that the_well's WellDataset reads
Equations   d(rho, rho u, E)/dt = -div F - cooling: 2-D Euler, MUSCL, HLLC, by axis -> solve
"""
import argparse
import math
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))               # the root of the repository
import common  # noqa: E402
from common import UserError, at_least  # noqa: E402
from data.well_i2v.reader import BOUNDARIES, DATASET, SPLITS  # noqa: E402

SPACING = 1.597033                         # time between the published data set's 101 snapshots


# ---- The Well's format ----------------------------------------------------------------------------------

def put(group, name, data, time_varying=False, **attributes):
    stored = group.create_dataset(name, data=data)
    stored.attrs.update({"sample_varying": False, "time_varying": time_varying, **attributes})


def write_well_file(path, fields, boundaries=("OPEN", "OPEN"), scalars=None, vectors=None, times=None,
                    dataset="", spacing=1.0):
    """Writes an HDF5 file in The Well's format, atomically.

    fields: {name: T H W, or N T H W of N trajectories}. vectors: {name: ... H W 2}. boundaries: of H and W,
    PERIODIC, OPEN or WALL. scalars: {name: number}. times: T. ValueError for other boundaries or shapes.
    """
    if len(boundaries) != 2 or not {kind.upper() for kind in boundaries} <= set(BOUNDARIES):
        raise ValueError(f"boundaries must be two of {', '.join(BOUNDARIES)}, not {boundaries}")
    path, strings, scalars = Path(path), h5py.string_dtype(), scalars or {}
    groups, shape = [{}, {}, {}], ()               # groups by tensor order; N T H W
    for order, named in enumerate((fields, vectors or {})):
        for name, array in named.items():
            array = np.asarray(array, np.float32)
            array = array if array.ndim == 4 + order else array[None]
            shape = shape or array.shape[:4]
            if array.shape != shape + (2,) * order or len(shape) != 4:
                raise ValueError(f"{name} has shape {array.shape}, the first N T H W is {shape}")
            groups[order][name] = array
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".tmp_{path.name}")
    with h5py.File(part, "w") as file:
        file.attrs.update({
            "dataset_name": dataset or path.stem, "grid_type": "cartesian", "n_spatial_dims": 2,
            "n_trajectories": shape[0], "simulation_parameters": np.array(list(scalars), strings), **scalars})
        group = file.create_group("dimensions")
        group.attrs["spatial_dims"] = ["x", "y"]
        put(group, "time", np.float32(range(shape[1]) if times is None else times).reshape(shape[1]), True)
        for axis, kind, n in zip("xy", boundaries, shape[2:]):
            put(group, axis, np.float32((np.arange(n) + 0.5) * spacing))
            boundary = file.create_group(f"boundary_conditions/{axis}_{kind.lower()}")
            boundary.attrs.update({"associated_dims": [axis], "associated_fields": np.array([], strings),
                                   "bc_type": kind, "sample_varying": False, "time_varying": False})
            boundary["mask"] = np.isin(np.arange(n), (0, n - 1))
        group = file.create_group("scalars")
        group.attrs["field_names"] = np.array(list(scalars), strings)
        for name, value in scalars.items():
            put(group, name, np.float32(value))
        for order, named in enumerate(groups):
            group = file.create_group(f"t{order}_fields")
            group.attrs["field_names"] = np.array(list(named), strings)
            for name, array in named.items():
                put(group, name, array, True, sample_varying=True, dim_varying=[True, True])
    part.replace(path)


def download(dataset, root):
    """Downloads a data set of The Well from the Hugging Face hub to root/datasets/, or resumes that."""
    from huggingface_hub import snapshot_download
    folder, repo = Path(root) / "datasets" / dataset, f"polymathic-ai/{dataset}"
    try:
        snapshot_download(repo, repo_type="dataset", local_dir=folder,
                          allow_patterns=["stats.yaml", *(f"data/{split}/*" for split in SPLITS)])
    except Exception as error:                     # of the hub, of httpx, or OSError
        raise UserError(f"cannot download https://huggingface.co/datasets/{repo} ({common.reason(error)}): "
                        f"try hf download {repo} --repo-type dataset --local-dir {folder}") from error
    print(f"wrote {folder}")


# ---- simulated radiative layer --------------------------------------------------------------------------
# A cooling layer between hot dilute and cold dense gas (Fielding 2020), in The Well's units: the box is 1
# wide and 3 high, P = 1, hot rho = T = 1. Initial profile and cooling curve are chosen here, with moments
# near the published ones. U: rho, rho u, rho v, E; W: rho, u, v, P; both 4 B nx ny.

GAMMA, T_COLD, T_HOT = 5 / 3, 0.01, 1.0

def to_primitive(U, out=None):
    """U -> W, with density and pressure clamped to at least 1e-3."""
    W = torch.empty_like(U) if out is None else out
    W[0] = U[0].clamp(min=1e-3)
    torch.div(U[1], W[0], out=W[1])
    torch.div(U[2], W[0], out=W[2])
    kinetic = torch.mul(U[1], W[1]).addcmul_(U[2], W[2]).mul_(.5)
    W[3] = (U[3] - kinetic).mul_(GAMMA - 1).clamp_(min=1e-3)
    return W


def to_conserved(W):
    """W -> U."""
    energy = W[3] / (GAMMA - 1) + .5 * W[0] * (W[1] ** 2 + W[2] ** 2)
    return torch.stack([W[0], W[0] * W[1], W[0] * W[2], energy])


def padded_primitive(U, axis, boundary):
    """U -> W with two ghost cells on each side of an axis: "periodic", "open" (zero gradient) or "reservoir":
    open below, and hot gas at rest with P = 1 above, which fixes the pressure and absorbs sound."""
    n, sizes = U.shape[axis], list(U.shape)
    sizes[axis] += 4
    W = U.new_empty(sizes)
    to_primitive(U, W.narrow(axis, 2, n))
    sources = (n, n + 1, 2, 3) if boundary == "periodic" else (2, 2, n + 1, n + 1)
    for ghost, source in zip((0, 1, n + 2, n + 3), sources):
        W.select(axis, ghost).copy_(W.select(axis, source))
    if boundary == "reservoir":
        top = W.narrow(axis, n + 2, 2)
        top[0], top[2], top[3] = 1., 0., 1.
    return W


def face_states(W, axis, ratio):
    """Padded W -> states left and right of each face half a step later, stacked: 2 4 B ... (MUSCL-Hancock
    with monotonized central slopes). ratio: dt / h. Density and pressure are at least half the minimum of
    the cell and its neighbors."""
    n, m = axis - 1, W.shape[axis] - 2
    slopes = W.diff(dim=axis)
    left, right = slopes.narrow(axis, 0, m), slopes.narrow(axis, 1, m)
    lower, upper = torch.maximum(left, right).clamp_(max=0), torch.minimum(left, right).clamp_(min=0)
    half = (left + right).mul_(.25).clamp_(lower, upper)
    cells = W.narrow(axis, 1, m)
    later = torch.addcmul(cells, cells[n], half, value=-ratio)                    # advection, and
    later[0].addcmul_(cells[0], half[n], value=-ratio)                            # compression
    later[3].addcmul_(cells[3], half[n], value=-ratio * GAMMA)
    later[n].addcdiv_(half[3], cells[0], value=-ratio)                            # pressure gradient
    minimum = torch.minimum(torch.minimum(W.narrow(axis, 0, m), W.narrow(axis, 2, m)), cells).mul_(.5)
    states = torch.stack([later + half, later.sub_(half)])
    for c in (0, 3):                             # unresolved cooling fronts could make them negative
        torch.maximum(states[:, c], minimum[c], out=states[:, c])
    return torch.stack([states[0].narrow(axis, 0, m - 1), states[1].narrow(axis, 1, m - 1)])


def hllc(states, n):
    """Fluxes through faces from face_states, along velocity component n (1 or 2): 4 B ... (Toro 2009, 10.4):
    F + s (U* - U) upwind of the contact wave, where s is the outer wave's speed, or 0 if supersonic."""
    t = 3 - n                                              # the transverse component
    rho, u, p = states[:, 0], states[:, n], states[:, 3]
    c = (p / rho).mul_(GAMMA).sqrt_()
    low, high = (u - c).amin(0), (u + c).amax(0)           # speeds of the outer waves
    d = torch.stack([low, high]).sub_(u).mul_(rho)         # mass flux through them
    q = torch.addcmul(p, d, u, value=-1)
    contact = (q[1] - q[0]).div_(d[0] - d[1])
    leftward = contact < 0
    upwind = torch.where(leftward, states[1], states[0])
    rho, u, v, p = upwind[0], upwind[n], upwind[t], upwind[3]
    d = torch.where(leftward, d[1], d[0])
    starred = d / (torch.where(leftward, high, low) - contact)                    # rho*
    s = torch.where(leftward, high.clamp_(min=0), low.clamp_(max=0))
    flux = torch.empty_like(upwind)
    mass = torch.addcmul(rho * u, s, starred - rho, out=flux[0])
    jump = (contact - u).mul_(starred).mul_(s)
    torch.addcmul(p, mass, u, out=flux[n]).add_(jump)
    torch.mul(mass, v, out=flux[t])
    specific = (p / rho).div_(GAMMA - 1).add_((u * u).addcmul_(v, v), alpha=.5)   # E / rho
    torch.mul(mass, specific, out=flux[3]).addcmul_(p, u).addcmul_(jump, contact + p / d)
    return flux


def sweep(U, axis, dt, h, boundary):
    """U after a time step dt of the fluxes along one axis."""
    W = padded_primitive(U, axis, boundary)
    return U.sub(hllc(face_states(W, axis, dt / h), axis - 1).diff(dim=axis), alpha=dt / h)


def cool(U, dt, t_cool):
    """Cools U over dt, in place, at constant density: T decays by exp(-w(T) dt / t_cool). w is a Gaussian in
    ln T around 0.1, and 0 in both phases. Exact for a w that is constant over the step."""
    W = to_primitive(U)
    T = W[3] / W[0]
    w = (T * 10).log_().square_().mul_(-1 / (2 * .3 ** 2)).exp_()
    w = w * ((T > 1.02 * T_COLD) & (T < .98 * T_HOT))
    cooled = torch.maximum(T * w.mul_(-dt / t_cool).exp_(), T.clamp(max=T_COLD))
    U[3] += W[0] * (cooled - T) / (GAMMA - 1)


def initial_state(nx, seeds):
    """-> U: 4 B nx 3nx, hot gas sliding over 100 times denser cold gas, with 8 random sine waves of v at the
    interface. The gas sinks at 0.004, about the growth rate of the cold layer, which stays in the box."""
    x, y = (torch.arange(nx) + .5) / nx - .5, (torch.arange(3 * nx) + .5) / nx - 1
    step, k, v = torch.tanh(y / .05), torch.arange(1, 9)[:, None], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        phase = 2 * math.pi * torch.rand(8, 1, generator=generator)
        amplitude = torch.randn(8, 1, generator=generator) / math.sqrt(8)
        waves = (amplitude * torch.sin(2 * math.pi * k * x + phase)).sum(0)
        v.append(.004 * waves[:, None] * torch.exp(-(y / .2) ** 2) - .004)
    v = torch.stack(v)
    rho, u = (1 + 99 * (1 - step) / 2).expand_as(v), (.05 * step).expand_as(v)
    return to_conserved(torch.stack([rho, u, v, torch.ones_like(v)]))


@torch.no_grad()
def solve(U, h, t_end, snapshots, t_cools=None, boundaries=("periodic", "reservoir"), cfl=.8):
    """U: 4 B nx ny, cells of side h -> W at equal intervals from 0 to t_end: B snapshots 4 nx ny.

    The order of the axes alternates (Strang splitting, second order). Trajectories share time steps.
    t_cools: one per trajectory, or None for no cooling. UserError if the solution diverges.
    """
    if t_cools is not None:
        t_cools = torch.tensor(t_cools, dtype=U.dtype, device=U.device).view(-1, 1, 1)
    W, t, steps = to_primitive(U), 0., 0
    frames = [W.cpu()]
    for k in range(1, snapshots):
        t_next = k * t_end / (snapshots - 1)
        while t < t_next:
            c = (W[3] / W[0]).mul_(GAMMA).sqrt_()
            max_speed = W[1:3].abs().amax(0).add_(c).amax().item()
            if not max_speed < 30:                         # also NaN; the sound speed of hot gas is 1.3
                raise UserError(f"the simulation diverged at t = {t:.3f}: choose another --seed or grid")
            dt = cfl * h / max_speed
            dt, t = (t_next - t, t_next) if t + 1.001 * dt >= t_next else (dt, t + dt)
            for axis in ((2, 3), (3, 2))[steps % 2]:
                U = sweep(U, axis, dt, h, boundaries[axis - 2])
            if t_cools is not None:
                cool(U, dt, t_cools)
            W, steps = to_primitive(U), steps + 1
        frames.append(W.cpu())
    return torch.stack(frames).permute(2, 0, 1, 3, 4)


def simulate_group(folder, args, numbers):
    """Simulates and writes all trajectories of args.t_cools[number] for each of `numbers`."""
    torch.set_num_threads(1)                       # a process per group
    counts, t_end = [args.train, 1, 1], args.spacing * (args.frames - 1)
    seeds = [seed for number in numbers for seed in np.random.SeedSequence(
        [args.seed, number]).generate_state(sum(counts), np.uint32).tolist()]
    t_cools = [args.t_cools[number] for number in numbers for _ in range(sum(counts))]
    W = solve(initial_state(args.nx, seeds), 1 / args.nx, t_end, args.frames, t_cools)
    for number, trajectories in zip(numbers, W.split(sum(counts))):
        t_cool = args.t_cools[number]
        for split, part in zip(SPLITS, trajectories.split(counts)):
            write_well_file(
                folder / f"data/{split}/radiative_layer_tcool_{t_cool:.2f}.hdf5",
                {"density": part[:, :, 0], "pressure": part[:, :, 3]}, ("PERIODIC", "OPEN"),
                {"tcool": t_cool}, {"velocity": part[:, :, 1:3].movedim(2, -1)},
                np.linspace(0, t_end, args.frames), "simulated_radiative_layer", 1 / args.nx)


def simulate(args):
    """Writes args.data_dir, which must be new. Two cooling times share a process and its time steps."""
    folder, part = Path(args.data_dir), Path(f"{args.data_dir}.partial")
    if args.nx % 16:
        raise UserError(f"--nx must be a multiple of 16, not {args.nx}")
    if folder.exists():
        raise UserError(f"{folder} exists: remove it, or choose another --data_dir")
    shutil.rmtree(part, ignore_errors=True)        # left by an interrupted call
    groups = np.array_split(range(len(args.t_cools)), math.ceil(len(args.t_cools) / 2))
    with ProcessPoolExecutor(min(os.cpu_count(), len(groups))) as pool:
        jobs = [pool.submit(simulate_group, part, args, group.tolist()) for group in groups]
        for job in tqdm(jobs, "simulate", unit="group"):
            job.result()
    common.write_json(part / "dataset_stats.json", {"source": "simulated", **vars(args)})
    part.rename(folder)
    print(f"wrote {folder}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Makes the data set of well_i2v.py.", allow_abbrev=False)
    add = parser.add_argument
    add("--download", nargs="?", const=DATASET, metavar="SET", help=f"get a 2-D set of The Well ({DATASET})")
    add("--data_dir", default=str(HERE / "simulated"), help="folder to write")
    add("--nx", type=at_least(16), default=32, help="cells in x, a multiple of 16; 3 times as many in y (32)")
    add("--t_cools", type=at_least(1e-6, float), nargs="+", default=[0.03, 0.10, 0.32, 3.16],
        help="cooling times, each a file per split (0.03 0.10 0.32 3.16)")
    add("--train", type=at_least(1), default=3, help="training runs per cooling time, plus 2 held out (3)")
    add("--frames", type=at_least(2), default=101, help="snapshots per run (101)")
    add("--spacing", type=at_least(1e-3, float), default=SPACING, help=f"time between snapshots ({SPACING})")
    add("--seed", type=at_least(0), default=0, help="seed of the initial states (0)")
    args = parser.parse_args(argv)
    work = lambda: download(args.download, args.data_dir) if args.download else simulate(args)
    return common.one_line_errors("prepare.py", work)


if __name__ == "__main__":
    sys.exit(main())
