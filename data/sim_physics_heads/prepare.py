"""prepare.py: simulates the data set of sim_physics_heads.py, or checks one that was rendered elsewhere.

Run         python data/sim_physics_heads/prepare.py                    # 389 recordings, next to this file
            python data/sim_physics_heads/prepare.py --size 480 --frames 131 --data_dir Sim_Physics
            python data/sim_physics_heads/prepare.py --check Sim_Physics    # exit code 2 with the fault
Writes      <scene>/env_<take>/0/0/{rgb/*.png, motion_vectors/*.npy, distance_to_camera/*.npy}, metadata.csv,
            as Replicator does: motion H W 4 float32, in pixels, previous minus current position; depth H W
            float32, metres along the ray, inf for sky. MuJoCo casts the rays on the CPU, without OpenGL.
Restart     the same command resumes from <data_dir>.partial; other flags start over
"""
import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["MUJOCO_GL"] = "disable"                    # loads no graphics library
import mujoco  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))               # the root of the repository
import common  # noqa: E402
from common import UserError, at_least  # noqa: E402

# Metres and seconds; x to the right, y away from the camera, z up.
EYE, TARGET, FIELD_OF_VIEW = np.array([0, -4.2, 1.3]), np.array([0, 0, 0.6]), math.radians(55)
STEPS_PER_FRAME = 8                                    # of 1/240 s
STATS = "dataset_stats.json"
BOUNCY, RIGID = [-4000, -10], [0.015, 1]               # MuJoCo's solref of a contact


def ball(x, y=0., z=0., v=0., r=0.3, **options):
    """A ball whose lowest point is at x y z, rolling along x."""
    return dict(at=(x, y, z + r), shapes=[("SPHERE", (r, 0, 0), (0, 0, 0))], velocity=(v, 0, 0, 0, v / r, 0),
                solref=BOUNCY, **options)


def box(x, y, z, half, **options):
    return dict(at=(x, y, z + half[2]), shapes=[("BOX", half, (0, 0, 0))], **options)


def wall(x, y, z, half, **options):
    return box(x, y, z, half, fixed=True, **options)


def duck(x, y, z, r=0.36, **options):
    parts = ((r, 0, 0), (0.6 * r, -0.35 * r, 1.05 * r), (0.22 * r, -r, r))         # body, head, beak
    shapes = [("SPHERE", (size, 0, 0), (dx, 0, dz)) for size, dx, dz in parts]
    return dict(at=(x, y, z + r), shapes=shapes, rgb=(1, 0.83, 0.1), **options)


def mug(x):
    shapes = [("CYLINDER", (0.3, 0.4, 0), (0, 0, 0.4)), ("BOX", (0.06, 0.07, 0.26), (0.62, 0, 0.4)),
              ("BOX", (0.2, 0.07, 0.06), (0.46, 0, 0.2)), ("BOX", (0.2, 0.07, 0.06), (0.46, 0, 0.6))]
    return dict(at=(x, 0, 0), shapes=shapes, fixed=True)


def basket(half, height):
    """A floor and four walls, of which the front wall is lower."""
    sides = [wall(x, 0, 0, (0.04, half, height / 2)) for x in (-half, half)]
    return [wall(0, 0, 0, (half, half, 0.03)), wall(0, -half, 0, (half, 0.04, height / 3)),
            wall(0, half, 0, (half, 0.04, height / 2)), *sides]


def dominoes(xs, lean=0., y=0.):
    """Dominoes at positions xs. The first domino is tilted by `lean` about its lower right edge and falls."""
    row = [box(x, y, 0, (0.09, 0.28, 0.52)) for x in xs]
    dx = 0.09 * (1 - math.cos(lean)) + 0.52 * math.sin(lean)
    row[0] |= dict(at=(xs[0] + dx, y, 0.09 * math.sin(lean) + 0.52 * math.cos(lean)), tilt=(0, lean, 0),
                   velocity=(0, 0, 0, 0, 4 * lean, 0))
    return row


def scene_bodies(u):
    """-> {scene: bodies}. u(low, high) draws a uniform random number."""
    y, v, r, slope = u(-0.25, 0.25), u(1.9, 2.9), u(0.22, 0.3), u(0.38, 0.5)
    late = ball(u(4.2, 5), 1.1, 0, -v, u(0.26, 0.36))          # crosses the background
    top = 1.15 * math.sin(slope)
    turned = dict(tilt=(u(0, 3), u(0, 3), 0), velocity=(0, 0, 0, u(-4, 4), u(-4, 4), 0))
    return {
        "ball_and_block_fall": [ball(u(-1.3, -0.7), y, u(1.6, 2.4)), ball(u(0.8, 1.3), 0.5, u(2.4, 3.2), r=r),
                                box(u(-0.2, 0.3), y, u(1.2, 1.8), (r, r, r), **turned)],
        "ball_collide": [ball(-2.3, y, 0, v, u(0.25, 0.4)), ball(2.2, y + u(-0.1, 0.1), 0, -u(1.9, 2.9))],
        "ball_hits_duck": [ball(-2.4, y, 0, 1.3 * v, 0.34), duck(u(0, 0.5), y, 0), late],
        "ball_hits_nothing": [ball(-2.4, y, 0, v, u(0.25, 0.4)), wall(u(-0.9, -0.4), 1, 0, (0.3, 0.3, 0.3)),
                              wall(u(0.5, 0.9), -0.9, 0, (0.2, 0.2, 0.2))],
        "ball_in_basket": [*basket(0.75, 0.6), *(ball(u(-0.3, 0.3), u(-0.2, 0.2), z, r=u(0.2, 0.27))
                                                 for z in (1.3, 2.4, 4))],
        "ball_ramp": [wall(-0.85, 0, top - 0.1, (1.2, 0.5, 0.05), tilt=(0, slope, 0)), late,
                      wall(-1.4, 0, 0, (0.1, 0.4, top / 2)),
                      ball(-1.5, y, top + 0.65 * math.tan(slope) + 0.06, r=r)],
        "ball_rolls_off": [wall(-1.1, 0, 0, (1.1, 0.6, 0.4)), ball(-1.9, y, 0.8, v, r)],
        "ball_rolls_on_glass": [wall(0, 0, 0.6, (1.9, 0.8, 0.03), rgb=(0.72, 0.9, 0.95)),
                                *(wall(x, 0, 0, (0.1, 0.1, 0.3)) for x in (-1.2, 1.2)),
                                ball(-1.8, y - 0.3, 0.66, 0.7 * v, r), ball(1.8, y + 0.4, 0.66, -0.8 * v, r)],
        "ball_train": [ball(-2.3, y, 0, v), ball(-5, y, 0, v), *(ball(x, y) for x in (-0.6, 0.01, 0.62))],
        "block_domino": [*dominoes(np.arange(-0.8, 1.4, u(0.48, 0.56)), y=y), box(
            -2.2, y, 0, (0.3, 0.3, 0.4), velocity=(2.2 * v, 0, 0, 0, 0, 0))],
        "domino_in_juice": [*dominoes(-1.2 + 0.52 * np.arange(4), u(0.3, 0.36)),
                            box(u(0.9, 1.4), y, 1.4, (0.09, 0.28, 0.52), **turned),
                            wall(0.1, 0, 0, (1.9, 0.9, 0.11), rgb=(1, 0.55, 0.1), solid=False)],
        "domino_with_space": [*dominoes((-1.6, -1.1, -0.6, u(0.75, 0.85), 1.3), u(0.26, 0.34)),
                              ball(-2.4, -1.3, 0, 0.7 * v, r)],
        "duck_and_domino": [*dominoes(-1.6 + u(0.5, 0.56) * np.arange(4), u(0.26, 0.34)),
                            duck(0.9, y, 0, 0.3), ball(3.4, 1.4, 0, -v)],
        "duck_falls_in_box": [*basket(0.85, 0.55), duck(-0.3, y, 1.5, 0.28, velocity=turned["velocity"]),
                              duck(0.3, y, 3.5, 0.28)],
        "duck_static": [duck(y, y, 0, u(0.4, 0.5), fixed=True, tilt=(0, 0, slope)),
                        wall(u(0.9, 1.3), 0.8, 0, (0.3, 0.3, 0.3))],
        "light_on_block": [wall(y, 0, 0, (u(0.4, 0.55), 0.45, u(0.4, 0.55)), tilt=(0, 0, slope)),
                           wall(1.3, 0.8, 0, (0.2, 0.2, 0.25))],
        "light_on_mug": [mug(y), wall(y, 0, 0, (1, 0.7, 0.01))],
        "light_on_mug_block": [mug(y - 0.7), wall(0.8, y, 0, (0.4, 0.4, u(0.3, 0.5)), tilt=(0, 0, slope))],
        "light_on_sculpture": [wall(y, 0, 0, (0.5, 0.5, 0.15)), wall(y, 0, 0.75, (0.5, 0.1, 0.06)),
                               wall(y, 0, 0.3, (0.16, 0.16, 0.4)), ball(y, 0, 1.1, r=r, fixed=True)],
        "roll_behind_box": [wall(u(-0.3, 0.3), -0.5, 0, (0.55, 0.2, 0.55)), ball(-2.6, y + 0.4, 0, v), late],
        "roll_front_box": [wall(u(-0.3, 0.3), 1.2, 0, (0.7, 0.3, 0.55)), ball(-2.2, y, 0, v), ball(
            3.4, -0.7, 0, -0.9 * v, r)]}


SCENES = list(scene_bodies(lambda low, high: low))


def build_model(name, rng):
    """A scene with random bodies and colours -> MuJoCo's model and state."""
    spec = mujoco.MjSpec()
    spec.option.timestep = 1 / 240
    spec.option.density = 300 if "juice" in name else 0        # of the medium, which causes drag
    spec.compiler.degree = False
    surface = dict(condim=6, friction=[0.6, 0.005, 0.003])     # sliding, torsional, rolling
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=[9, 9, 1], solref=BOUNCY,
                            rgba=[0.66, 0.64, 0.6, 1], **surface)
    velocities = []
    for body in scene_bodies(rng.uniform)[name]:
        node = spec.worldbody.add_body(pos=body["at"])
        node.alt.type = mujoco.mjtOrientation.mjORIENTATION_EULER
        node.alt.euler = body.get("tilt", (0, 0, 0))
        if not body.get("fixed"):
            node.add_freejoint()
            velocities += body.get("velocity", [0] * 6)
        solref, solid = body.get("solref", RIGID), int(body.get("solid", True))
        # MuJoCo uses the contact parameters of the geom with higher priority: movable blocks do not bounce.
        priority = int(solref is RIGID and not body.get("fixed"))
        for kind, size, offset in body["shapes"]:
            rgb = body.get("rgb", rng.uniform(0.2, 1, 3))
            node.add_geom(type=getattr(mujoco.mjtGeom, f"mjGEOM_{kind}"), size=size, pos=offset, density=400,
                          rgba=[*rgb, 1], solref=solref, priority=priority, contype=solid,
                          conaffinity=solid, **surface)
    model = spec.compile()
    data = mujoco.MjData(model)
    data.qvel[:] = velocities
    mujoco.mj_forward(model, data)
    return model, data


def camera_rays(size):
    """-> unit rays through the pixel centres N 3, projection of points N 3 to pixels N 2."""
    ahead = (TARGET - EYE) / np.linalg.norm(TARGET - EYE)
    axes = np.stack([[1, 0, 0], np.cross(ahead, [1, 0, 0]), ahead])            # right, down, ahead
    focal = size / 2 / math.tan(FIELD_OF_VIEW / 2)
    v, u = np.mgrid[:size, :size].reshape(2, -1) + 0.5 - size / 2
    rays = np.stack([u / focal, v / focal, np.ones_like(u)], axis=1) @ axes

    def project(points):
        camera = (points - EYE) @ axes.T
        return focal * camera[:, :2] / camera[:, 2:]

    return rays / np.linalg.norm(rays, axis=1, keepdims=True), project


def cast(model, data, origin, rays):
    """Casts unit rays N 3 from a point -> distance N (inf: sky), geom N (-1: sky, 0: ground), normal N 3."""
    n = len(rays)
    geom, distance, normal = np.zeros(n, np.int32), np.zeros(n), np.zeros(3 * n)
    mujoco.mj_multiRay(model, data, origin, rays.ravel(), None, True, -1, geom, distance, normal, n, 1e3)
    return np.where(geom < 0, np.inf, distance), geom, normal.reshape(n, 3)


def body_coordinates(data, geom, points):
    return np.einsum("nji,nj->ni", data.geom_xmat[geom].reshape(-1, 3, 3), points - data.geom_xpos[geom])


def shade(model, data, rays, sun):
    """RGB N 3 uint8 along rays from the eye: checkered bodies and ground, sunlight with shadows."""
    distance, geom, normal = cast(model, data, EYE, rays)
    rgb = np.array([0.45, 0.65, 0.95]) - np.clip(3 * rays[:, 2:], 0, 1) * [0.15, 0.12, 0.05]       # the sky
    hit = np.flatnonzero(geom >= 0)
    geom, points = geom[hit], EYE + distance[hit, None] * rays[hit]
    squares = body_coordinates(data, geom, points) * np.where(geom == 0, 1.5, 4)[:, None]
    dark = np.where(geom == 0, 0.15, 0.35) * (np.floor(squares + 1e-3).sum(axis=1) % 2)
    to_sun = sun - points
    length = np.linalg.norm(to_sun, axis=1)
    lit = cast(model, data, sun, -to_sun / length[:, None])[0] > length - 1e-3
    light = 0.4 + 0.7 * lit * np.clip((normal[hit] * to_sun).sum(axis=1) / length, 0, 1)
    rgb[hit] = model.geom_rgba[geom, :3] * ((1 - dark) * light)[:, None]
    return (255 * rgb.clip(0, 1)).round().astype(np.uint8)


def record(job):
    """Simulates a recording and writes its folder atomically."""
    name, folder, frames, size, seed = job
    model, data = build_model(name, np.random.default_rng(seed))
    rays, project = camera_rays(size)
    fine_rays, _ = camera_rays(2 * size)               # four per pixel of the picture
    temporary = folder.with_name(".temporary")
    shutil.rmtree(temporary, ignore_errors=True)       # from a killed run
    for kind in ("rgb", "motion_vectors", "distance_to_camera"):
        (temporary / kind).mkdir(parents=True)
    poses = None                                       # of the previous frame: positions, rotations
    for t in range(frames):
        angle = 4 * t / frames - 2.6 if "light" in name else -2.2
        sun = 100 * np.array([0.6 * math.cos(angle), 0.6 * math.sin(angle) - 0.2, 0.8])
        picture = shade(model, data, fine_rays, sun).reshape(2 * size, 2 * size, 3)
        Image.fromarray(picture).reduce(2).save(temporary / f"rgb/step_{t:04d}.png")
        depth, geom, _ = cast(model, data, EYE, rays)
        motion = np.zeros((size * size, 4), np.float32)
        if poses:
            hit = np.flatnonzero(geom > 0)             # bodies, not the ground
            points = EYE + depth[hit, None] * rays[hit]
            local = body_coordinates(data, geom[hit], points)
            previous = poses[0][geom[hit]] + np.einsum("nij,nj->ni", poses[1][geom[hit]], local)
            motion[hit, :2] = project(previous) - project(points)
        # As in Replicator's data sets, the first motion file is empty.
        motion = motion.reshape(size, size, 4) if poses else np.zeros(0, np.float32)
        np.save(temporary / f"motion_vectors/step_{t:04d}.npy", motion)
        depth = depth.reshape(size, size).astype(np.float32)
        np.save(temporary / f"distance_to_camera/step_{t:04d}.npy", depth)
        poses = data.geom_xpos.copy(), data.geom_xmat.reshape(-1, 3, 3).copy()
        mujoco.mj_step(model, data, nstep=STEPS_PER_FRAME)
    temporary.rename(folder)


def simulate(args):
    """Builds the data set in <data_dir>.partial and renames that folder when it is complete."""
    data_dir = Path(args.data_dir)
    partial = Path(f"{data_dir}.partial")
    if os.path.lexists(data_dir):
        raise UserError(f"{data_dir} exists: remove it, or choose another folder with --data_dir")
    flags = {"size": args.size, "frames": args.frames, "takes": args.takes, "seed": args.seed}
    stats = {"source": "SIMULATED by MuJoCo, not filmed", "flags": flags}
    if not (partial / STATS).is_file() or json.loads((partial / STATS).read_text()) != stats:
        shutil.rmtree(partial, ignore_errors=True)
        common.write_json(partial / STATS, stats)
    jobs = []
    table = ["video,prompt"]
    for number, name in enumerate(SCENES):
        for take in range(1 if "static" in name or "light" in name else args.takes):
            folder = partial / f"test_{name}/env_{take}/0/0"
            table.append(f"test_{name}/env_{take}/0/0,A physics simulation of {name.replace('_', ' ')}")
            if not folder.is_dir():                    # from an interrupted run
                jobs.append((name, folder, args.frames, args.size, [args.seed, number, take]))
    try:
        with ProcessPoolExecutor() as pool:
            list(tqdm(pool.map(record, jobs), "simulate", len(jobs), unit="recording"))
    except OSError as error:
        raise UserError(f"cannot write {partial} ({error}): the same command resumes") from error
    (partial / "metadata.csv").write_text("\n".join(table) + "\n")
    partial.rename(data_dir)
    print(f"wrote {data_dir}: {len(table) - 1} recordings of {len(SCENES)} scenes, {args.frames} frames each")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Makes or checks the data set of sim_physics_heads.py.",
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--check", nargs="+", metavar="FOLDER", help="check recordings below these folders")
    add("--data_dir", default=str(HERE / "simulated"), help="folder to write; it must be new")
    add("--size", type=at_least(16), default=64, help="height and width of a picture (64)")
    add("--frames", type=at_least(2), default=50, help="frames of a recording (50)")
    add("--takes", type=at_least(1), default=24, help="recordings of each scene that moves (24)")
    add("--seed", type=at_least(0), default=0, help="seed of the bodies (0)")
    args = parser.parse_args(argv)
    if args.check:
        return subprocess.run([sys.executable, HERE / "check.py", *args.check]).returncode

    def run():
        simulate(args)
    return common.one_line_errors("prepare.py", run)


if __name__ == "__main__":
    sys.exit(main())
