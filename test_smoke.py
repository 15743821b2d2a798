"""test_smoke.py: tests of the six scripts, common.py and the prepare.py programs, on the CPU and offline.

    pytest test_smoke.py          # on all cores; about 5 minutes on 2

What every script has to do is written once and runs for each row of SCRIPTS. Then come the files as a whole,
common.py, and what each script alone has to show, against slow loops and closed forms.
"""
import argparse
import ast
import contextlib
import copy
import faulthandler
import fcntl
import functools
import gc
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import weakref
from argparse import Namespace
from pathlib import Path

HERE = Path(__file__).parent
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"      # torchrun lies beside python
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
               "PYTHONPATH": str(HERE), "PATH": PATH}

import h5py  # with all that follows, after the environment that it reads
import imageio.v3 as iio
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import common
import cosmos_lite as cosmos
import river_smoke as river
import sim_physics_heads as physics
import vidar
import vidarc
import well_i2v as well
from data.vidar import episodes as robot_data


def load_program(path):
    """A program in data/ as a module, which its own processes find by name."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


river_prepare = load_program(HERE / "data/river_smoke/prepare.py")
cosmos_prepare = load_program(HERE / "data/cosmos_lite/prepare.py")
reader = importlib.import_module("data.well_i2v.reader")
well_prepare = load_program(HERE / "data/well_i2v/prepare.py")
physics_prepare, physics_check, physics_clips = (
    load_program(HERE / f"data/sim_physics_heads/{name}.py") for name in ("prepare", "check", "clips"))
VAE21 = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
         "latents_mean": [.1, -.2, .3, .4], "latents_std": [.5, 2., 1., 3.]}
VAE22 = {**VAE21, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
         "scale_factor_spatial": 16}
TINY_WAN = {"vae": VAE22, "transformer": {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 32, "ffn_dim": 48, "num_layers": 2}, "text_encoder": {
    "vocab_size": 259, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}}

torch.set_num_threads(1)      # bits are compared across processes, and tiny tensors are fastest on one thread
torch.backends.mps.is_available = lambda: False                    # a Mac, too, is tested on its CPU


def edit(path, old, new):
    path.write_text(re.sub(old, new, path.read_text()))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def hdf5(data, change, split="train"):
    """Changes the first file of a split, as h5py opens it."""
    with h5py.File(sorted(data.rglob(f"{split}/*.hdf5"))[0], "r+") as file:
        change(file)


def robot(name, change):
    """Changes a file of an episode."""
    return lambda data, run: change(data / "episodes/ep_0003" / name)


# Flags of a run of a second, every stage of which takes 4 steps and saves after 2; a long warm-up keeps the
# learning rate independent of --max_steps.
TINY = ("--preset tiny --dtype float32 --batch_size 4 --max_steps 4 --lr 1 --warmup_steps 1000 --log_every 1 "
        "--eval_every 2 --save_every 2 --keep_last 0")
# tiny: a script's own such flags. stages: folders with a ckpt/, in order. reuse: takes the first stages of
# another run; where no flag does, they are copied. steps: the flag that counts the last stage's. dry_run:
# flags of a shorter one. pair: flags with which two processes equal one. offload: has --cpu_offload.
# headline: keys of eval.json. overfit: () -> losses on one batch. bad: (flags, what the one line must say,
# damage to the data and the run or None).
SCRIPTS = {
    "river_smoke": dict(
        tiny="--num_observations 6 --condition_frames 4 --frames_to_generate 3 --num_samples 2 "
             "--eval_clips 2 --ae_width 8 --latent_channels 4 --width 32 --heads 2 --depth 1 --ae_steps 4 "
             "--ae_lr 1",
        prepare=lambda: river_prepare.main(["--data_dir", river.PRESETS["tiny"]["data_dir"], "--clips", "8",
                                            "--frames", "14"]),
        stages=("autoencoder", "."), reuse="--autoencoder {run}/autoencoder/autoencoder.safetensors",
        headline=("results/psnr_ensemble_mean", "results/crps", "results/warm_0.2_crps",
                  "baselines/persistence/psnr", "baselines/persistence/crps"),
        overfit=lambda: overfit_river(), fsdp=False,
        bad=[
            ("", "no folder .*val.*prepare.py", lambda data, run: shutil.rmtree(data / "val")),
            ("", "is 48x32, expected 64x64", lambda data, run: iio.imwrite(
                data / "val/sim100001/0003.png", np.zeros((32, 48, 3), np.uint8))),
            ("--num_observations 15", "no clip of train has 15 consecutively", None),
            ("--latent_channels 8 --autoencoder {run}/autoencoder/autoencoder.safetensors", "not fit", None),
            ("--output_dir {run} --eval --width 64", "--width 64 does not fit .* trained with 32", None),
            ("--output_dir {run} --eval --i3d {data}/none.pt", "none.pt is not StyleGAN-V's", None),
            ("--resume {run}/ckpt/step_000004", "step_000004 is truncated", lambda data, run: cut(
                run / "ckpt/step_000004/model.safetensors")),
        ]),
    "cosmos_lite": dict(
        tiny="--T_in 6 --T_out 4 --context 4 --rollout 4 --latent_dim 8 --num_layers 1 --num_predict 8",
        prepare=lambda: cosmos_prepare.main(["--data_dir", cosmos.PRESETS["tiny"]["data_dir"], "--num_videos",
                                             "5", "--num_frames", "12"]),
        stages=(".",), reuse="", deterministic=True, fsdp=False, dry_run="--T_in 12 --T_out 4 --rollout 4",
        headline=("results/mse", "results/psnr", "results/ssim", "baselines/persistence/position_px",
                  "baselines/persistence/mse", "baselines/mean frame/mse", "baselines/constant velocity/mse"),
        overfit=lambda: overfit_cosmos(),
        bad=[
            ("", "no data set in .*prepare.py --data_dir", lambda data, run: shutil.rmtree(data)),
            ("", "cannot read .*npy and .json: 'float'", lambda data, run: edit(
                data / "split.json", "12", "12.0")),
            ("", "val.npy.* it is torch.uint8 .3, 3, 64, 64., not uint8 .24, 3", lambda data, run: np.save(
                data / "val.npy", np.zeros((3, 3, 64, 64), np.uint8))),
            ("--T_in 7 --T_out 7", "no video of test has 14 frames", None),
            ("--encoder dinov2_vits14", "cannot load --encoder dinov2_vits14 .*hf download", None),
            ("--perceptual_weight 1 --vgg_weights {data}/split.json", "cannot load --vgg_weights", None),
        ]),
    "sim_physics_heads": dict(
        tiny="--height 32 --width 32 --frames 5 --strides 1,2 --clips 2 --eval_clips 1 --head_width 8 "
             "--head_blocks 1 --cells 2 --text_length 16 --lora_rank 2 --lora_steps 4 --backbone_steps 4 "
             "--lora_lr 0 --backbone_lr 1 --num_inference_steps 2 --num_samples 1",
        prepare=lambda: physics_prepare.main(["--data_dir", physics.PRESETS["tiny"]["data_dir"], "--size",
                                              "32", "--frames", "12", "--takes", "1"]),
        stages=("backbone", "heads", "."), reuse="", steps="--lora_steps", fsdp=False,
        headline=("results/epe_moving", "results/abs_rel_moving", "results/sky_accuracy",
                  "baselines/mean depth, zero motion/abs_rel_moving", "baselines/persistence/epe_moving"),
        overfit=lambda: overfit_physics(),
        bad=[
            ("", "no folder .*data", lambda data, run: shutil.rmtree(data)),
            ("", "scene test_ball_ramp: .* lacks files in distance_to_camera",
             lambda data, run: shutil.rmtree(data / "test_ball_ramp/env_0/0/0/distance_to_camera")),
            ("--height 40", "multiples of 32, not 40", None),
            ("--stage lora", "--stage lora starts from trained heads", None),
            ("--heads {run}/heads/final/heads.safetensors", "--heads only initialises --stage lora", None),
            ("--stage lora --head_width 16 --heads {run}/heads/final/heads.safetensors",
             "heads.safetensors does not fit", None),
        ]),
    "well_i2v": dict(
        tiny="--adapter learned --adapter_steps 4 --width 8 --base_steps 4 --max_steps 8 --decoder_steps 4 "
             "--shift 9 --lora_rank 2 --base_lr .1 --adapter_lr 0 --num_inference_steps 2 --members 2 "
             "--eval_clips 4 --rollout_frames 12 --num_samples 1 --sample_frames 6 --frame_repeat 1",
        prepare=lambda: well_prepare.main(shlex.split(
            "--data_dir data/well_i2v/simulated --nx 16 --frames 16 --spacing .08 --train 1 --t_cools .1 1")),
        stages=("adapter", "base", "high", "low", "."), reuse="", steps="--decoder_steps",
        headline=("results/one_step", "results/all_steps", "results/rollout_6:12",
                  "baselines/persistence/one_step", "baselines/base without LoRA/one_step",
                  "baselines/single sample/all_steps", "baselines/reconstruction/one_step"),
        overfit=lambda: overfit_well(),
        bad=[
            ("", "no data set in .*prepare.py --download", lambda data, run: shutil.rmtree(data / "data")),
            ("", "hdf5 is not in The Well's 2-D format .*pressure", lambda data, run: hdf5(
                data, lambda file: file["t0_fields"].__delitem__("pressure"))),
            ("", "field density has shape .*, its attributes say", lambda data, run: hdf5(
                data, lambda file: file["dimensions"].__delitem__("x") or file["dimensions"].create_dataset(
                    "x", data=np.zeros(32)))),
            ("", "trajectory 0 has NaN or Inf at step [01]", lambda data, run: hdf5(
                data, lambda file: file["t0_fields/pressure"].__setitem__(..., np.nan))),
            ("--output_dir {run} --eval", "was trained on mass, .*, not on density", lambda data, run: edit(
                run / "adapter/adapter.json", "density", "mass")),
            ("--n_out 16", "has 16 steps, too few for a window of 17", None),
            ("--n_out 7", "--n_out 7, --frame_repeat 1: Wan's VAE takes 4k [+] 1 video frames", None),
            ("--video_size 20,48", "multiples of 16, not 20,48", None),
            ("--text_length 8", "--text_length 8: a prompt has as many tokens or more", None),
        ]),
    "vidar": dict(
        tiny="--height 48 --width 32 --frames 9 --text_length 16 --idm_steps 4 --idm_frames 4 "
             "--idm_batch_size 4 --idm_generated 2 --idm_lr 0 --num_inference_steps 2 --num_samples 1",
        prepare=lambda: robot_prepare.main(shlex.split(
            "--data_dir data/vidar/simulated --episodes 10 --poses 8 --frames 9 --size 48 32")),
        stages=("video", "."), reuse="", steps="--idm_steps",
        pair="--stage video",                    # batch norm is of a process's own batch
        headline=("results/psnr_arm_beyond_1s", "results/action_accuracy_generated",
                  "baselines/persistence/psnr_arm_beyond_1s", "baselines/codec/ssim_beyond_1s",
                  "baselines/persistence/action_l1_generated", "baselines/mean action/action_l1_real"),
        overfit=lambda: overfit(vidar_model(noise=.05), vidar_clip()),
        bad=[
            ("", "episode ep_0003 of .* has no file .*video.mp4", robot("video.mp4", Path.unlink)),
            ("", "actions are .9, 13., not .T, 14.", robot(
                "actions.npy", lambda path: np.save(path, np.load(path)[:, :13]))),
            ("", "action of frame 3 is NaN", robot("actions.npy", lambda path: np.save(
                path, np.where(np.arange(9)[:, None] == 3, np.nan, np.load(path))))),
            ("", "ep_0003/video.mp4 has 9 frames, but there are 8 actions", robot(
                "actions.npy", lambda path: np.save(path, np.load(path)[1:]))),
            ("", "mask.npz does not hold", robot("mask.npz", lambda path: path.write_bytes(b"none"))),
            ("", "manifest.json has 30 fps, not 10", lambda data, run: edit(
                data / "manifest.json", '"fps": 10', '"fps": 30')),
            ("", "no data set in .*python data/vidar/prepare.py", lambda data, run: shutil.rmtree(data)),
            ("--height 40", "--height 40 and --width 32 must be multiples of 16", None),
            ("--frames 10", "--frames must be 4k [+] 1, not 10", None),
            ("--global_batch 6", "--global_batch 6 is not a multiple of 4", None),
            ("--vidar {data}/w.pt", "cannot load Wan's transformer from .*w.pt .*norm9", lambda data, run:
                torch.save({**torch.load(run / "video/final/vidar.pt"), "blocks.0.norm9.bias": torch.ones(1)},
                           data / "w.pt")),
            ("--idm {data}/none.pt", "cannot read the IDM .*none.pt", None),
        ]),
    "vidarc": dict(
        tiny="--height 48 --width 32 --frames 9 --text_length 16 --num_inference_steps 2 "
             "--rollout_denoise_steps 2 --chunk_size 8 --kv_cache_length 8 --self_forcing 1 "
             "--self_forcing_after 2 --worlds 1 --num_samples 1",
        prepare=lambda: SCRIPTS["vidar"]["prepare"]() or launch("vidar", "", full=True),
        inputs="--vidar {run}/../vidar/video/final/vidar.safetensors --idm {run}/../vidar/final/idm.pt",
        stages=(".",), reuse="", offload=True,
        headline=("results/psnr_arm", "results/action_accuracy", "results/success_moved",
                  "results/seconds_first_action_p50", "results/seconds_bidirectional",
                  "baselines/generated past/psnr_arm_h01", "baselines/persistence/action_l1",
                  "baselines/open loop/success_moved"),
        overfit=lambda: overfit(vidarc_model("--eta 0", noise=.05), vidarc_clip()),
        bad=[
            ("--chunk_size 16", "--chunk_size 16 does not fit in a window of 8", None),
            ("--kv_cache_length 10", "--kv_cache_length must be a multiple of 4, not 10", None),
            ("--chunk_size 4", "--self_forcing generates a part .* or set --self_forcing 0", None),
            ("--vidar {data}/none.pt", "--vidar: no file .*none.pt.* python vidar.py", None),
            ("--idm {data}/w.pt", "w.pt does not fit this model: ", lambda data, run: torch.save(
                {"train_mean": torch.ones(7)}, data / "w.pt")),
            ("--serve 8000", "has no trained policy .*python vidarc.py --output_dir", None),
        ]),
}
vidarc.HORIZON, vidarc.MOVED_AT = 12, 4
vidar.TINY["transformer"].update(num_attention_heads=2, attention_head_dim=24, ffn_dim=144, num_layers=3)
well.PRESETS["tiny"]["batch_size"] = 3            # so that two processes do not share a batch of 4
well.TINY["transformer"].update(num_attention_heads=2, attention_head_dim=24, ffn_dim=144, num_layers=2)
physics.TINY["transformer"].update(num_attention_heads=2, attention_head_dim=16, ffn_dim=64, num_layers=2)
BAD_ANYWHERE = [
    ("--max_step 3", "unrecognized arguments: --max_step", None),                  # no abbreviations
    ("--eval", "no checkpoint in .*new", None),
    ("--output_dir {run} --resume none", "would overwrite", None),
]
BAD_FSDP = [("--fsdp", "torchrun", None)]
BAD = [pytest.param(script, *case, id=f"{script} {case[0]} {case[1]}") for script, row in SCRIPTS.items()
       for case in BAD_ANYWHERE + BAD_FSDP * row.get("fsdp", True) + row["bad"]]


# ---- running a script -----------------------------------------------------------------------------------

# New processes fork from a server that has imported what takes each new interpreter seconds.
multiprocessing.set_forkserver_preload([
    "test_smoke", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
    "matplotlib.pyplot", "diffusers.pipelines.wan.pipeline_wan_i2v", "peft"])


def launch(script, flags, full=False):
    """main() in this process, after the tiny flags. Without `full` it only trains, and what it would
    spawn is forked as below. -> exit code."""
    module, context = importlib.import_module(script), multiprocessing.get_context
    gc.freeze()                                  # of imported modules: well_i2v collects after each stage
    with pytest.MonkeyPatch.context() as patch:
        if not full:
            patch.setattr(multiprocessing, "get_context",
                          lambda kind=None: context("forkserver" if kind == "spawn" else kind))
            patch.setattr(module, "evaluate", lambda *a, **k: [])
            patch.setattr(module, "sample", lambda *a, **k: [])
        return module.main(shlex.split(f"{TINY} {SCRIPTS[script]['tiny']} {flags}"))


def tiny_args(script, flags=""):
    argv = shlex.split(f"{TINY} {SCRIPTS[script]['tiny']} --output_dir none {flags}")
    return importlib.import_module(script).parse_args(argv)[0]


river_args, cosmos_args, physics_args, vidar_args = (functools.partial(tiny_args, script) for script in (
    "river_smoke", "cosmos_lite", "sim_physics_heads", "vidar"))
vidarc_args = lambda flags="": tiny_args("vidarc", f"--random_init {flags}")


def randomized(model, std, seed=1):
    """All weights are random, also those that are zero at first."""
    torch.manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=std)
    return model


def process(work, log, env):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    faulthandler.enable(2)
    os.environ.update(env)
    sys.exit(work())


def start(script, flags, log, world=1, full=False):
    """launch() in `world` new processes, with what torchrun tells them; output to {log}0, {log}1, ..."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    work, ranks = functools.partial(launch, script, flags, full), []
    for rank in range(world):
        env = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": f"{world}",
               "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} if world > 1 else {}
        server = multiprocessing.get_context("forkserver")
        ranks.append(server.Process(target=process, args=(work, f"{log}{rank}", env)))
        ranks[-1].start()
    return ranks


def finish(ranks, seconds=120):
    """-> exit codes; None for a process that had to be ended."""
    for rank in ranks:
        rank.join(seconds)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def wait_for_step(run, step, ranks):
    """Until the run has a checkpoint of at least `step` steps."""
    while not (newest := common.latest_checkpoint(run / "ckpt")) or int(newest.name[5:]) < step:
        assert all(rank.is_alive() for rank in ranks), "it ended before"
        time.sleep(.002)


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """(name, make) -> a folder that make(folder) has filled, once for all of pytest-xdist's processes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def once(name, make):
        folder, complete = root / name, root / f"{name}.complete"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                complete.touch()
        return folder
    return once


@pytest.fixture(scope="session")
def trained(shared):
    """script -> a whole run of it in its default folders."""
    def make(script, root):
        with contextlib.chdir(root):
            assert SCRIPTS[script].get("prepare", int)() == 0
            with open("printed", "w") as file, contextlib.redirect_stdout(file):
                assert launch(script, "", full=True) == 0

    def trained(script):
        root = shared(script, functools.partial(make, script))
        run = root / "runs" / script
        data = root / json.loads((run / "args.json").read_text())["data_dir"]
        given, reuse = (SCRIPTS[script].get(name, "").format(run=run) for name in ("inputs", "reuse"))
        return Namespace(root=root, run=run, data=data, inputs=f"--data_dir {data} {given}", reuse=reuse)
    return trained


@pytest.fixture
def base(script, trained):
    return trained(script)


@pytest.fixture
def pair(tmp_path_factory):
    """(script, flags, full=False) -> 0: launch() in two processes."""
    def pair(script, flags, full=False):
        log = tmp_path_factory.mktemp("pair") / "log"
        codes = finish(start(script, flags, log, 2, full), 300)
        assert codes == [0, 0], "".join(Path(f"{log}{rank}").read_text() for rank in range(2))
        return 0
    return pair


@pytest.fixture(autouse=True)
def sigterm():
    """A run that ends in an error leaves its handler behind, which its own process would not outlive."""
    old = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, old)


@pytest.fixture
def shown(monkeypatch):
    """A stand-in for W&B's client -> the rows that it logs."""
    client, rows = Namespace(run=None, finish=lambda: None), []
    client.init = lambda project, name, config: setattr(client, "run", Namespace(name=name))
    client.log, client.Image = rows.append, lambda path: iio.imread(path).shape
    monkeypatch.setitem(sys.modules, "wandb", client)
    return rows


def begun(script, run, to):
    """A run that has the first stages of another one, where no flag takes them from there."""
    for stage in () if SCRIPTS[script]["reuse"] else SCRIPTS[script]["stages"][:-1]:
        shutil.copytree(run / stage, to / stage)
    return to


def exports(run):
    """Weights for use elsewhere, of all stages. (safetensors orders a file's metadata at random.)"""
    found = [path for path in run.rglob("*.safetensors") if "ckpt" not in path.parts]
    return flat({str(path.relative_to(run)): common.load_weights(path) for path in found})


def halfway(run, to):
    """A copy of a run as it stood after 2 steps of its last stage."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "ckpt/step_000004")
    return to


def the_error(capsys, script):
    """The one line on stderr besides progress bars."""
    pieces = [piece for piece in re.split(r"[\r\n]+", capsys.readouterr().err) if piece.strip()]
    lines = [piece for piece in pieces if not re.search(r"\[\d\d:\d\d", piece)]
    assert len(lines) == 1 and lines[0].startswith(f"{script}.py: error: "), pieces
    return lines[0]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flat(value, name=""):
    """Nested dicts and lists -> {path: leaf}."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, v in items for key, leaf in flat(v, f"{name}/{k}").items()}
    return {name[1:]: value}


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved(run, stage="."):
    """All that a stage's newest checkpoint holds, and its metrics without their times."""
    path = common.latest_checkpoint(run / stage / "ckpt")
    state, meta = common.load_checkpoint(path, json.loads((path / "meta.json").read_text())["script"])
    metrics = [row | {"seconds_per_step": None} for row in rows(run / stage)]
    return flat({"state": state, "step": meta["step"], "metrics": metrics})


def assert_same(a, b, tolerance=0.0):
    """Bit for bit, or numbers within a tolerance."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        if tolerance and (torch.is_tensor(value) or isinstance(value, float)):
            value, other = torch.as_tensor(value), torch.as_tensor(b[name])
            assert torch.allclose(value, other, tolerance, tolerance), name
        else:
            assert torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name], name


def minimize(loss_fn, params, lr, steps):
    """-> losses of Adam's steps."""
    optimizer, losses = torch.optim.Adam(params, lr=lr), []
    for _ in range(steps):
        losses.append(loss_fn())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return losses


# ---- what every script owes -----------------------------------------------------------------------------

def test_help_and_dry_run(script, base, monkeypatch, capsys):
    monkeypatch.chdir(base.root)                 # a run of another preset is no hindrance
    before = sorted(base.root.rglob("*"))
    main = importlib.import_module(script).main
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert "--data_dir" in out and "option_strings" not in out     # of a % that argparse formats
    for config in common.WAN.values():           # 30 or 40 blocks are counted as two are, only for longer
        monkeypatch.setitem(config["transformer"], "num_layers", 2)
    for preset in list(importlib.import_module(script).PRESETS)[:2]:
        assert main(["--preset", preset, "--dry_run", *shlex.split(SCRIPTS[script].get("dry_run", ""))]) == 0
        counts = re.findall(r"([\d,]+) parameters, ([\d,]+) trainable", capsys.readouterr().out)
        assert counts and all(len(count) >= len("100,000") for count, _ in counts)
    assert sorted(base.root.rglob("*")) == before


def test_every_number_has_a_bound(script):
    actions = importlib.import_module(script).build_parser()._actions
    for action in (action for action in actions if action.type is not None):
        assert action.type not in (int, float), action.dest
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            action.type("nan")


def test_one_batch_overfits(script):
    losses = SCRIPTS[script]["overfit"]()
    assert losses[-1] < losses[0] / 5


def test_run_on_disk(script, base):
    report = json.loads((base.run / "eval.json").read_text())
    assert set(report) == {"script", "preset", "data", "weights", "seconds", "headline", "results",
                           "baselines", "clips"}
    assert set(report["headline"]) == {"metric", "value", "baseline", "lower_is_better"}
    assert (report["script"], report["preset"]) == (script, "tiny")
    for key in ("headline/value", "headline/baseline", *SCRIPTS[script]["headline"]):
        assert np.isfinite(flat(report)[key])
    for stage in SCRIPTS[script]["stages"]:
        assert [row["step"] for row in rows(base.run / stage) if "loss" in row] == [1, 2, 3, 4]
        assert [row["step"] for row in rows(base.run / stage) if "val_loss" in row] == [2, 4]
    flags = json.loads((base.run / "args.json").read_text())
    assert flags["batch_size"] == 4 and flags["torch"] == torch.__version__ and "git" in flags
    assert iio.imread(base.run / "curves.png").std() > 0 and exports(base.run)
    assert {path.suffix for path in (base.run / "samples").iterdir()} >= {".mp4", ".png"}
    assert (base.root / "printed").read_text().startswith(f"{script}: preset tiny (from the command line)")
    links = re.findall(' (?:src|href)="(.*?)"', (base.run / "report.html").read_text())
    assert "curves.png" in links and all((base.run / link).is_file() for link in links)
    links = re.findall(' (?:src|href)="(.*?)"', (base.root / "runs/index.html").read_text())
    assert f"{script}/report.html" in links and all((base.root / "runs" / link).is_file() for link in links)


@pytest.mark.parametrize("script,stage,name", [
    ("vidar", "video", "vidar"), ("vidarc", ".", "vidarc"), ("sim_physics_heads", "heads", "heads")])
def test_exported_weights_are_the_ema(script, stage, name, trained):
    folder = trained(script).run / stage
    ema = common.load_weights(common.latest_checkpoint(folder / "ckpt") / "ema.safetensors")
    assert_same(common.load_weights(folder / f"final/{name}.safetensors"),
                {key.removeprefix("dit.").removeprefix("heads."): value for key, value in ema.items()})


def test_resume_equals_no_stop(script, base, tmp_path):
    """Each stage continues from its step 2, and writes its exports again."""
    run, stages = shutil.copytree(base.run, tmp_path / "run"), SCRIPTS[script]["stages"]
    for stage in stages:
        shutil.rmtree(run / stage / "ckpt/step_000004")
        for export in (*(run / stage).glob("*.safetensors"), *(run / stage / "final").rglob("*.*")):
            export.unlink()
    if SCRIPTS[script]["reuse"]:                 # with a checkpoint of the last stage, no other is trained
        shutil.rmtree(run / "ckpt")
    assert launch(script, f"{base.inputs} --output_dir {run}") == 0
    for stage in stages:
        assert_same(saved(run, stage), saved(base.run, stage))
    assert_same(exports(run), exports(base.run))


def test_sample_is_a_function_of_the_seed(script, base, tmp_path, monkeypatch):
    """All but --seed comes from the checkpoint, in the default folder or in that of --resume."""
    monkeypatch.chdir(shutil.copytree(base.root, tmp_path / "root"))
    run, new, samples = Path("runs") / script, Path("new"), []
    new.mkdir()
    shutil.copy(run / "eval.json", new)
    for seed, flags in ((0, []), (0, ["--resume", str(run), "--output_dir", "new"]), (1, [])):
        folder = (new if flags else run) / "samples"
        shutil.rmtree(folder, ignore_errors=True)
        assert importlib.import_module(script).main(["--sample", "--seed", str(seed), *flags]) == 0
        samples.append(files(folder))
    assert samples[0] and samples[0] == samples[1]
    alike = SCRIPTS[script].get("deterministic", False)    # a forecast without chance
    assert all((samples[0][name] == samples[2][name]) == alike for name in samples[0])


def test_sigterm_saves_and_stops(script, base, tmp_path, monkeypatch, capsys):
    run, row = begun(script, base.run, tmp_path / "run"), common.Log.row
    flags = f"{base.inputs} --output_dir {run} {base.reuse} --save_every 0"

    def terminated(log, step, **values):
        row(log, step, **values)
        if step == 2 and "loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(common.Log, "row", terminated)
        assert launch(script, flags) == 2
    assert "stopped by SIGTERM after step 3" in the_error(capsys, script)
    assert [path.name for path in common.checkpoints(run / "ckpt")] == ["step_000003"]
    assert launch(script, f"{base.inputs} --output_dir {run} --eval", full=True) == 0
    assert launch(script, flags) == 0
    assert_same(saved(run), saved(base.run))


def test_kills_lose_nothing(script, base, tmp_path):
    """SIGKILL at a random moment of a run that saves at every step."""
    run, flags = begun(script, base.run, tmp_path / "run"), f"{base.inputs} {base.reuse} --save_every 1"
    flags += f" --output_dir {run}"
    ranks = start(script, flags, tmp_path / "log")
    wait_for_step(run, 1, ranks)
    time.sleep(random.uniform(0, .03))
    ranks[0].kill()
    assert finish(ranks) == [-signal.SIGKILL]
    assert launch(script, flags) == 0
    assert_same(saved(run), saved(base.run))


def test_divergence_leaves_the_checkpoint_before(script, base, tmp_path, capsys):
    run = halfway(base.run, tmp_path / "run")
    before = files(run / "ckpt")
    assert launch(script, f"{base.inputs} --output_dir {run} --lr 1e35") == 2
    assert re.search("not finite at step 4: .*step_000002", the_error(capsys, script))
    assert files(run / "ckpt") == before


@pytest.mark.parametrize("script", [script for script, row in SCRIPTS.items()
                                    if len(row["stages"]) > 1 and not row["reuse"]])
def test_resume_into_another_folder(script, trained, tmp_path):
    """The first stages come along, and the run that is resumed stays as it is."""
    base = trained(script)
    run = halfway(base.run, tmp_path / "run")
    before = files(run)
    assert launch(script, f"{base.inputs} --resume {run} --output_dir {tmp_path}/new") == 0
    assert_same(exports(tmp_path / "new"), exports(base.run))
    assert files(run) == before


def test_sigterm_between_two_stages(trained, tmp_path, script="sim_physics_heads"):
    base, run = trained(script), tmp_path / "run"
    flags, first = f"{base.inputs} --output_dir {run}", SCRIPTS[script]["stages"][0]
    ranks = start(script, flags, tmp_path / "log")
    while not (run / first / "ckpt/step_000004/meta.json").exists():
        assert ranks[0].is_alive()
        time.sleep(.002)
    ranks[0].terminate()
    assert finish(ranks)[0] in (2, -signal.SIGTERM)
    assert not (run / "ckpt").exists() and launch(script, flags) == 0
    assert_same(saved(run), saved(base.run))


@pytest.mark.parametrize("script,flags,message,damage", BAD)
def test_bad_input(script, flags, message, damage, trained, tmp_path, capsys):
    """One line, before any work is done, and no file is changed."""
    base, new = trained(script), tmp_path / "new"
    data, run = base.data, base.run
    if damage:
        data, run = shutil.copytree(data, tmp_path / "data"), shutil.copytree(run, tmp_path / "run")
        damage(data, run)
    before, flags = (files(run), damage and files(data)), flags.format(data=data, run=run, new=new)
    assert launch(script, f"{base.inputs} --data_dir {data} --output_dir {new} {flags}", full=True) == 2
    assert re.search(message, the_error(capsys, script))
    assert (files(run), damage and files(data)) == before
    assert set(os.listdir(tmp_path)) <= {"data", "run", "new"}
    assert not new.exists() or os.listdir(new) == ["args.json"]


# ---- more than one process ------------------------------------------------------------------------------

@pytest.mark.parametrize("script,how", [
    (script, how) for script, row in SCRIPTS.items()
    for how in ("torchrun", "fsdp", "offload", "grad_accum")
    if how in ("torchrun", "grad_accum") or row.get(how, how == "fsdp")])
def test_equals_one_process_at_twice_the_batch(script, how, trained, shared, pair, tmp_path):
    """Two processes, sharded or not, and two micro-steps; one script also continues what the other saved."""
    row, base = SCRIPTS[script], trained(script)
    inputs = f"{base.inputs} {row.get('pair', '')} --eval_every 4"
    stages = (".",) if "pair" in row else row["stages"]
    alone = shared(f"{script}_doubled", lambda run: launch(
        script, f"{inputs} --output_dir {run} --batch_size 8"))
    pair_flags = {"fsdp": "--fsdp", "offload": "--fsdp --cpu_offload"}.get(how, "")
    if how == "torchrun":                        # two processes also fill an empty cache
        data = shutil.copytree(base.data, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
        inputs = inputs.replace(str(base.data), str(data))

    def train(run, flags=""):
        flags = f"{inputs} --output_dir {run} {flags}"
        if how == "grad_accum":
            assert launch(script, f"{flags} --grad_accum 2") == 0
        else:
            pair(script, f"{flags} {pair_flags}")

    run = tmp_path / "run"
    train(run)
    if row["reuse"]:                   # a quantiser turns a difference of 1e-7 into another code
        assert_same(saved(run, stages[0]), saved(alone, stages[0]), 1e-4)
        run, stages = tmp_path / "reused", (".",)
        train(run, row["reuse"].format(run=alone))
    for stage in stages:
        assert_same(saved(run, stage), saved(alone, stage), 1e-4)
    if how == "fsdp" and script == "vidar":
        there, back = halfway(run, tmp_path / "there"), halfway(alone, tmp_path / "back")
        assert launch(script, f"{inputs} --output_dir {there} --batch_size 8 --grad_accum 1") == 0
        train(back)
        for resumed in (there, back):
            assert_same(saved(resumed), saved(alone), 1e-4)


def test_two_processes_resume_and_run_as_typed(trained, pair, tmp_path, script="river_smoke"):
    """Bit for bit; then as torchrun starts it, with evaluation and samples."""
    base, run = trained(script), tmp_path / "run"
    pair(script, f"{base.inputs} --output_dir {run} {base.reuse}")
    again = halfway(run, tmp_path / "again")
    command = f"torchrun --standalone --nproc_per_node=2 {HERE / script}.py {TINY} {SCRIPTS[script]['tiny']}"
    command = shlex.split(f"{command} {base.inputs} --output_dir {again}")
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    assert_same(saved(again), saved(run))
    assert (again / "eval.json").exists() and any((again / "samples").iterdir())


@pytest.mark.parametrize("how,codes,message", [("terminate", [2, 2], "stopped by SIGTERM"),
                                               ("kill", [2, -9], "another process of this run died")])
def test_one_of_two_processes_ends(how, codes, message, trained, tmp_path, script="river_smoke"):
    """SIGTERM at one rank stops both after the same step; where one dies, the other ends with a message."""
    base, run = trained(script), tmp_path / "run"
    flags = f"{base.inputs} --output_dir {run} {base.reuse} --keep_last 2 --max_steps 100000"
    ranks = start(script, flags, tmp_path / "log", world=2)
    wait_for_step(run, 2, ranks)
    getattr(ranks[1], how)()
    assert finish(ranks, 20) == codes
    assert re.search(f"{script}.py: error .rank 0.: {message}", (tmp_path / "log0").read_text())
    assert common.find_checkpoint(run / "ckpt", script, "auto")


# ---- a device that is not there -------------------------------------------------------------------------

class PretendedGPU(TorchFunctionMode):
    """torch.device("cpu", 0) stands for a GPU: memory is marked where a call names this device or reads
    marked memory. What a GPU refuses fails: tensors of two devices in one call, .numpy(), float64 (MPS)."""
    device, calls = torch.device("cpu", 0), 0
    crossing = {"to", "copy_", "cpu", "__get__", "__set__", "_has_compatible_shallow_copy_type"}
    indexing = {"__getitem__", "__setitem__", "index_put_"}        # by the CPU's numbers

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__
        marked = lambda x: hasattr(x.untyped_storage(), "marked")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if marked(x)]
        if getattr(function, "__self__", None) is torch.Tensor.device:
            return self.device if there else function(*args)
        here = [x for x in tensors if not marked(x) and x.dim()]
        indexes = name in self.indexing and there and there[0] is args[0]
        assert name in self.crossing or indexes or not (there and here), f"{name} of two devices"
        assert not (there and name in ("numpy", "__array__")), f"{name} of a tensor on the device"
        result, onto = function(*args, **kwargs), bool(there)
        if name == "to":                         # another dtype, or the device of another tensor
            onto = marked(args[1] if torch.is_tensor(args[1:2] and args[1]) else args[0])
        for given in (*args, kwargs.get("device"), name):
            if isinstance(given, (torch.device, str)) and str(given) in ("cpu", "cpu:0"):
                onto = given == self.device

        def mark(x):
            if not isinstance(x, torch.Tensor) or marked(x) == onto:
                return x
            if any(x.data_ptr() == other.data_ptr() for other in tensors):
                x = x.clone()                    # .to() and .cpu() have left it where it was
            if onto:
                assert x.dtype != torch.float64, f"{name} makes float64"
                x.untyped_storage().marked = True
            return x

        self.calls += bool(there)
        return tree_map(mark, result)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(common, "choose_device", lambda name: PretendedGPU.device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)          # diffusers avoids float64
    with PretendedGPU() as gpu:
        with pytest.raises(AssertionError, match="of two devices"):
            torch.ones(2, device=gpu.device) + torch.ones(2)
        yield gpu


def test_sample_trains_first_on_a_device(script, base, gpu, tmp_path, shown, monkeypatch, capsys):
    """--sample without a checkpoint, in bfloat16: what would stop on a GPU stops here."""
    monkeypatch.chdir(tmp_path)
    flags = f"--sample --wandb project --dtype bfloat16 {base.inputs}"
    flags += " --guidance_scale 2" * hasattr(tiny_args(script), "guidance_scale")
    assert launch(script, flags, full=True) == 0
    assert re.search("no checkpoint in .*: training preset tiny first", capsys.readouterr().out)
    run = tmp_path / "runs" / script
    assert gpu.calls > 1000 and (run / "ckpt").exists() and (run / "eval.json").exists()
    curves = [row["step"] for row in shown if any(name.endswith("/loss") for name in row)]
    pictures = {f"samples/{path.stem}" for path in (run / "samples").glob("*.png")}
    assert curves[-4:] == [1, 2, 3, 4] and shown[-1].keys() > {"step", *pictures} and shown[-1]["step"] == 4


@pytest.mark.parametrize("script", ["cosmos_lite"])
def test_resume_on_a_device(script, base, gpu, tmp_path):
    assert launch(script, f"{base.inputs} --output_dir {halfway(base.run, tmp_path / 'run')}") == 0
    assert gpu.calls > 1000


# ---- the files as a whole -------------------------------------------------------------------------------

def printed_commands():
    """Commands in docstrings, README.md and docs/ -> [(launcher, script, its arguments)]."""
    texts = [importlib.import_module(script).__doc__ for script in SCRIPTS]
    texts += [path.read_text() for path in (HERE / "README.md", *HERE.glob("docs/*.md"))]
    commands = re.findall(r"(python|torchrun [^\n`]*?) (\w+)\.py([^\n`#(|&]*)", "\n".join(texts))
    assert {script for _, script, _ in commands} >= set(SCRIPTS)
    return [(launcher, script, shlex.split(flags)) for launcher, script, flags in commands
            if script in SCRIPTS]


def test_missing_tiny_data_are_simulated(script, tmp_path, monkeypatch):
    """Only in the default folder, by the script's prepare.py in a process of its own."""
    commands, module = [], importlib.import_module(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(list(map(str, command))) or
                        Namespace(returncode=2, stdout=""))
    for argv in (["--data_dir", "typo"], []):
        assert module.main(argv) == 2
    (program, *flags), = (command[1:] for command in commands if command[1].endswith("prepare.py"))
    assert Path(program).is_file() and flags == ["--data_dir", module.PRESETS["tiny"]["data_dir"]]


def test_printed_commands_are_valid(monkeypatch, tmp_path):
    """What docstrings, README and docs print has known flags with values that go together."""
    monkeypatch.chdir(tmp_path)
    for launcher, script, argv in printed_commands():
        ranks = [int(n) for n in re.findall(r"--n(?:proc_per_node|nodes)[= ](\d+)", launcher)]
        monkeypatch.setenv("WORLD_SIZE", f"{math.prod(ranks)}")
        try:
            importlib.import_module(script).parse_args(argv)
        except common.UserError as error:
            assert re.search("there is no file|no checkpoint (in|at)", str(error)), (script, argv, error)


def test_printed_commands_run_on_a_gpu_machine_without_data(monkeypatch, tmp_path):
    """--preset auto: CUDA alone does not make the paper's preset; CUDA, data and weights do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    automatic = [(script, argv) for launcher, script, argv in printed_commands()
                 if launcher == "python" and not {"--preset", "--resume", "--output_dir"} & set(argv)]
    assert len(automatic) > 6
    for script, argv in automatic:
        module = importlib.import_module(script)
        preset, reason = common.auto_preset(module.PRESETS, {"data_dir": None, "weights_from": "no/weights"})
        assert preset == "tiny" and "CUDA" not in reason and "hf download no/weights" in reason
        assert module.parse_args(argv)[0].preset == "tiny", argv
    (tmp_path / "final_dataset").mkdir()
    assert river.parse_args([])[0].preset == "paper"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert river.parse_args([])[0].preset == "tiny"


@pytest.mark.parametrize("module", [river, cosmos, physics, well, vidar])
def test_learning_rate(module):
    rate = [module.get_lr(step, 2., 10, 111) for step in range(111)]
    assert rate[:10] == pytest.approx([.2 * n for n in range(1, 11)]) and max(rate) == rate[9] == rate[10]
    assert rate[60] == pytest.approx(2 * .505) and rate[110] == pytest.approx(.02)
    assert rate[10:] == sorted(rate[10:], reverse=True)


def test_reproduction_names_what_there_is():
    """Each row of docs/reproduction.md: functions and flags of that script, tests of this file."""
    text = (HERE / "docs/reproduction.md").read_text()
    tests, rows = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.MULTILINE)), 0
    sources = {path.stem: path.read_text() for path in HERE.glob("*.py")}
    for name in sources.keys() & set(SCRIPTS):
        folder = "vidar" if name == "vidarc" else name
        sources[name] += "".join(path.read_text() for path in HERE.glob(f"data/{folder}/*.py"))
    for line in text.splitlines():
        if line.startswith(("## ", "### ")):
            own = [name for name in SCRIPTS if f"{name}.py" in line] or list(SCRIPTS)
        elif line.startswith("| ") and not line.startswith("| feature"):
            rows, (_, where, test, _) = rows + 1, line[1:-1].split("|")
            assert set(re.findall(r"`(test_\w+)", test)) <= tests, line
            assert "`test_" in test or "none" in test, line
            code = "\n".join(sources[name] for name in (*own, "common"))
            for function, flag in re.findall(r"`(?:common\.)?(\w+)\(\)`|`--(\w+)", where):
                assert (f"def {function}(" if function else f'"--{flag}"') in code, line
    assert rows > 50


def test_imports():
    """Every import is in requirements.txt. Scripts import common.py, vidarc.py also vidar.py."""
    known = set(re.findall(r"^(?:#   )?([\w-]+)", (HERE / "requirements.txt").read_text(), re.MULTILINE))
    for path in (*HERE.glob("*.py"), *HERE.glob("data/*/*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"data"}
        names -= {other.stem for other in path.parent.glob("*.py") if path.parent != HERE}
        ours = {name for name in names if (HERE / f"{name}.py").exists()}
        assert {{"PIL": "pillow", "yaml": "pyyaml"}.get(name, name) for name in names - ours} <= known, path
        allowed = {"common", "vidar"} if path.stem == "vidarc" else {"common"}
        assert path.stem == "test_smoke" or ours <= allowed, path


# ---- common.py ------------------------------------------------------------------------------------------

def test_randomness_is_a_function_of_the_seed():
    def numbers(*seed):
        return common.seed_all(*seed), random.random(), np.random.rand(), torch.rand(()).item()
    assert numbers(0, 1, 2) == numbers(0, 1, 2)
    assert not set(numbers(0, 1, 2)) & {*numbers(0, 2, 1), *numbers(1, 1, 2), *numbers(0, 1)}
    kinds = {"i": ("randint", 1000), "u": ("rand",), "n": ("randn", 3, 2)}
    whole = common.sample_global_batch(kinds, 7, 8)
    parts = [common.sample_global_batch(kinds, 7, 2, rank, 2, micro, grad_accum=2)
             for micro in (0, 1) for rank in (0, 1)]
    assert whole["n"].shape == (8, 3, 2)
    assert all(torch.equal(torch.cat([part[name] for part in parts]), whole[name]) for name in kinds)


def test_ema(tmp_path):
    """Training validates and ends with it."""
    layer = nn.Linear(2, 2)
    ema = common.EMA(layer.parameters(), .9)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    ema.update(1000)
    with contextlib.suppress(KeyError), ema.applied():
        assert torch.allclose(layer.weight, before + .1)
        raise KeyError                           # an error inside leaves the trained weights in place
    assert torch.equal(layer.weight, before + 1)
    layer = nn.Linear(1, 1, bias=False)
    stage = Namespace(name="decoder", module=layer, spec={}, loss=lambda net, _: (net.weight.sum(), {}),
                      validate=lambda net: {"weight": net.weight.item()})
    well.train(well_args("--output_dir", str(tmp_path)), CPU, stage, tmp_path, 3, .1, None)
    state = common.find_checkpoint(tmp_path / "ckpt", "well_i2v", "auto").state
    weight, ema = (state[name]["weight"].item() for name in ("model", "ema"))
    assert rows(tmp_path)[-1]["weight"] == layer.weight.item() == ema != weight


def test_metric_identities():
    x, y = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (common.mse(x, x) == 0).all() and (common.psnr(x, x) == 60).all()
    assert torch.allclose(common.ssim(x, x), torch.ones(4)) and (common.ssim(x, y) < .2).all()
    assert torch.allclose(common.psnr(x, x + .1), torch.full((4,), 20.), atol=1e-4)
    grey = torch.full((1, 3, 32, 32), .5)        # without structure, only the luminance term is left
    assert common.ssim(grey, grey / 2).item() == pytest.approx((.25 + 1e-4) / (.25 + .0625 + 1e-4), abs=1e-4)
    members, truth = x.double().flatten(1)[:3, :50], y.double().flatten()[:50]
    pairs = sum((members[i] - members[j]).abs() for i in range(3) for j in range(3)) / (3 * 2)
    assert torch.allclose(common.fair_crps(members, truth), (members - truth).abs().mean(0) - pairs / 2)
    assert torch.equal(common.fair_crps(members[:1], truth), (members[0] - truth).abs())


def test_frechet_distance():
    """Features with covariances I and R' diag(s^2) R, whose means are .5 apart in each of 4 numbers."""
    g = torch.Generator().manual_seed(0)
    a, rotation = torch.randn(50, 4, generator=g).double(), torch.randn(4, 4, generator=g).double()
    a = 7 * torch.linalg.qr(a - a.mean(0))[0]
    rotation, scale = torch.linalg.qr(rotation)[0], torch.tensor([1., 2., 3., 4.]).double()
    distance = common.frechet_distance(a, a * scale @ rotation + .5)
    assert distance == pytest.approx(4 * .5 ** 2 + (scale - 1).square().sum().item())


def test_pixel_values_and_horizons():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(common.from_uint8(levels)), levels)
    assert common.horizon_means([{"mse": torch.tensor([[1., 2.], [3., 4.]])}, {
        "mse": torch.tensor([[5., math.nan]])}]) == {"mse": 3., "mse_h01": 3., "mse_h02": 3.}


def test_checkpoint_folder(tmp_path, capsys, monkeypatch):
    folder, meta, find = tmp_path / "ckpt", {"script": "s", "args": {"a": 1}}, common.find_checkpoint
    state = {"model": {"w": torch.arange(3.)}, "optimizer": {"step": torch.tensor(1.), "lr": .5}, "none": {}}
    assert find(folder, "s", "auto") is None and find(folder, "s", "none") is None
    for step in (9, 10, 999_999, 1_000_000):
        common.save_checkpoint(folder, step, state, meta, keep_last=3)
    assert [path.name[5:] for path in common.checkpoints(folder)] == ["000010", "999999", "1000000"]
    path, read, its_meta = find(folder, "s", "auto")
    assert path.name == "step_1000000" and its_meta["step"] == 1_000_000 and its_meta["args"] == {"a": 1}
    assert_same(flat(read), flat(state))
    assert find(folder, "s", folder / "step_000010")[0].name == "step_000010"
    assert find(tmp_path / "other", "s", tmp_path)[0] == path      # a run's folder: its newest
    with pytest.raises(common.UserError, match="was written by s, not by another"):
        find(folder, "another", "auto")
    common.save_checkpoint(tmp_path / "other/ckpt", 1, state, meta)
    with pytest.raises(common.UserError, match="holds other checkpoints"):         # of another run
        find(tmp_path / "other/ckpt", "s", tmp_path, train=True)
    with monkeypatch.context() as patch, pytest.raises(common.UserError, match="last complete .*1000000"):
        patch.setattr(torch, "save", disk_full)
        common.save_checkpoint(folder, 1_000_001, state, meta)
    assert len(os.listdir(folder)) == 3
    (path / "model.safetensors").unlink()
    damaged = folder / "step_999999/optimizer.pt"
    damaged.write_bytes(b"?" * damaged.stat().st_size)
    assert find(folder, "s", "auto")[0].name == "step_000010" and "warning: " in capsys.readouterr().err
    common.save_checkpoint(folder, 999_999, state, meta, keep_last=0)  # a damaged one makes way
    assert find(folder, "s", "auto")[0].name == "step_999999"


def test_a_kill_at_any_moment_of_a_save(tmp_path):
    """Ends save_checkpoint before its first file operation, its second, ...; nothing is caught or tidied."""
    class Killed(BaseException):
        pass

    operations = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}

    def hook(event, _):
        nonlocal left
        if left is not None and event in operations:
            left -= 1
            if left < 0:
                raise Killed

    def save(folder, step, keep_last=2):
        state = {"a": {"w": torch.ones(2)}, "b": {"n": step}}
        common.save_checkpoint(folder, step, state, {"script": "s"}, keep_last)

    left = None
    sys.addaudithook(hook)                                         # it stays, asleep while left is None
    for moment in itertools.count():
        folder, killed = tmp_path / str(moment), True
        save(folder, 1), save(folder, 2)
        left = moment
        with contextlib.suppress(Killed):
            save(folder, 3)
            killed = False
        left = None
        complete = common.checkpoints(folder)
        assert [path.name[5:] for path in complete][-2:] in (["000001", "000002"], ["000002", "000003"])
        for path in complete:
            assert common.load_checkpoint(path, "s")[0]["b"]["n"] == int(path.name[5:])
        save(folder, 4, keep_last=1)
        assert os.listdir(folder) == ["step_000004"]               # the next save clears up
        if not killed:
            break
    assert moment > 12


def test_flags_by_precedence(trained, tmp_path, monkeypatch):
    """Command line > checkpoint > preset > default; flags of the machine are not taken from a checkpoint."""
    run = trained("river_smoke").run
    args, checkpoint, reason = river.parse_args(["--output_dir", str(run), "--lr", "3", "--device", "cpu"])
    assert (args.lr, args.width, args.ema_decay, args.seed) == (3, 32, .99, 0)
    assert (args.dtype, reason) == ("auto", "from the checkpoint") and checkpoint.meta["step"] == 4
    monkeypatch.chdir(tmp_path)
    args, checkpoint, _ = river.parse_args(["--resume", str(run / "ckpt/step_000002"), "--sample"])
    assert args.output_dir == str(run) and checkpoint.meta["step"] == 2
    args, checkpoint, reason = river.parse_args(["--preset", "paper"])
    assert (args.width, args.heads, checkpoint, reason) == (256, 8, None, "from the command line")


def test_tensorboard(tmp_path):
    """Every row is shown; a resumed run replaces the steps that it repeats."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, factor in ((0, 1.), (2, 10.)):
        log = common.Log(tmp_path, "run", start, 3, tensorboard=True, log_every=1)
        for step in range(start + 1, 4):
            log.add(loss=factor * step)
            log.step(step)
        time.sleep(1)                            # event files are ordered by the second
    scalars = events.EventAccumulator(str(tmp_path))
    scalars.Reload()
    assert [(event.step, event.value) for event in scalars.Scalars("run/loss")] == [(1, 1), (2, 2), (3, 30)]


# ---- common.py: files of users --------------------------------------------------------------------------

H264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p"]
# The top is opaque blue; below, the left is white with alpha 128 and the right is red with alpha 0.
SMOKE = np.zeros((48, 64, 4), np.uint8)
SMOKE[:12], SMOKE[12:, :32], SMOKE[12:, 32:] = (0, 0, 255, 255), (255, 255, 255, 128), (255, 0, 0, 0)
SMOKE_POINTS = {(4, 4): (0, 0, 255), (30, 16): (128, 128, 128), (30, 50): (0, 0, 0)}


def encode(path, *options, frames=None):
    """Writes a small video: frames T H W 4 (RGBA), or 2 seconds of ffmpeg's test picture."""
    inputs, data = ["-f", "lavfi", "-i", "testsrc2=s=96x64:r=10:d=2"], None
    if frames is not None:
        inputs, data = shlex.split("-f rawvideo -pix_fmt rgba -s 64x48 -r 10 -i -"), frames.tobytes()
    common.ffmpeg(["-y", *inputs, *options, "-threads", 1, f"file:{path}"], data)
    return path


def one_line(read, path, *words):
    with pytest.raises(common.UserError) as error:
        read(path)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and all(word in message for word in (str(path), *words)), message


@pytest.mark.parametrize("raw, encoding", [
    (b"a\r\nb\xc3\xa9\n", None), (b"\xef\xbb\xbfa\rb\xc3\xa9\r", None), ("拿起杯子".encode("gbk"), "GBK"),
    *[("lift 下\n".encode(name), "UTF-16") for name in ("utf-16", "utf-16-be", "utf-32")],
    ("Jürgen’s cup".encode("cp1252"), "cp1252"), ("漢".encode("iso2022_jp"), "probably")])
def test_text(tmp_path, raw, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    if encoding is None:
        assert common.read_text(path) == "a\nbé\n"
    else:
        one_line(common.read_text, path, encoding, "save it as UTF-8")
    one_line(common.read_text, tmp_path, "directory")


def test_find_files(tmp_path):
    """Links are followed, also in a loop; a file is listed once, by its real name."""
    root = tmp_path / "root"
    for name in ("a/1.PNG", "b/2.png", "b/.hidden.png", "b/notes.txt", "../far/3.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name, target in (("0.png", "a/1.PNG"), ("a/loop", root), ("far", "../far"), ("gone.png", "nowhere")):
        (root / name).symlink_to(target)
    found, left_out = common.find_files(root, [".png"])
    names = [str(path.relative_to(root)) for path in found]
    assert names == ["a/1.PNG", "b/2.png", "far/3.png"] and left_out == {".txt": 1, "broken link": 1}
    assert root / "0.png" in common.find_files(root, [".png"], unique=False)[0]
    one_line(lambda path: common.find_files(path, [".png"]), tmp_path / "none", "cannot read folder")


def test_images(tmp_path):
    """Alpha over black, orientation, 16 bits; whatever cannot be read is one line."""
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[0x112] = 6                                    # to be turned by 90 degrees clockwise
    Image.fromarray(SMOKE).save(path, exif=exif)
    pixels = np.rot90(common.read_image(path))
    assert all(tuple(pixels[point]) == value for point, value in SMOKE_POINTS.items())
    Image.fromarray(np.array([[0, 64 * 257, 65535]], "<u2")).save(path)
    assert common.read_image(path).tolist() == [[[0] * 3, [64] * 3, [255] * 3]]
    for suffix in ("png", "jpg"):
        path = tmp_path / f"noise.{suffix}"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:-1500])
        one_line(common.read_image, path, "cannot read image")


@pytest.mark.parametrize("name, options", [
    ("a.mov", ["-c:v", "qtrle"]), ("lr:1e-4 [100%].mkv", ["-c:v", "ffv1", "-pix_fmt", "yuva420p"]),
    ("a.webm", ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p"])])
def test_videos_of_users(tmp_path, name, options):
    """Alpha over black, pixels that are not square, rotation, names with ffmpeg's special signs."""
    frames = np.stack([SMOKE] * 3)
    video = common.read_video(encode(tmp_path / name, *options, frames=frames))
    assert video.dtype == torch.uint8 and video.shape == (3, 3, 48, 64)
    for (y, x), value in SMOKE_POINTS.items():
        assert video[2, :, y, x].tolist() == pytest.approx(value, abs=4)
    wide = encode(tmp_path / "wide.mp4", *H264, "-vf", "setsar=4/3", frames=frames)
    assert common.read_video(wide).shape == (3, 3, 48, 85)
    assert common.read_video(wide, 16).shape == (3, 3, 16, 16)
    common.ffmpeg(["-display_rotation", 90, "-i", wide, "-c", "copy", tmp_path / "turned.mp4"])
    assert common.read_video(tmp_path / "turned.mp4").shape == (3, 3, 64, 36)


@pytest.mark.parametrize("name, options", [
    ("a.mp4", H264), ("a.mkv", H264), ("a.webm", ["-c:v", "libvpx"]), ("a.gif", [])])
def test_video_damaged_or_cut(tmp_path, name, options):
    path = encode(tmp_path / name, *options)
    raw = path.read_bytes()
    first, last = len(raw) // 2, len(raw) * 6 // 10
    assert len(common.read_video(path)) == 20
    for damaged in (raw[:first] + np.random.default_rng(0).bytes(last - first) + raw[last:], raw[:first]):
        path.write_bytes(damaged)
        one_line(common.read_video, path, "cannot read video")


# ---- common.py: Wan --------------------------------------------------------------------------------------

def tiny_wan(part, config=None, **more):
    torch.manual_seed(0)
    return common.load_wan(None, part=part, config=config or TINY_WAN, random_init=True, **more)


def velocity(transformer, seed=1):
    g = torch.Generator().manual_seed(seed)
    channels, D = transformer.config.in_channels, transformer.config.text_dim
    x, text = torch.randn(2, channels, 2, 4, 4, generator=g), torch.randn(2, 8, D, generator=g)
    with torch.no_grad():
        return transformer(x, torch.rand(2, generator=g) * 1000, text).sample


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pipeline(transformer, transformer_2=None, vae=None, shift=5.):
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                        flow_shift=shift)
    pipe = WanImageToVideoPipeline(
        None, None, vae or tiny_wan("vae"), scheduler, transformer=transformer, transformer_2=transformer_2,
        boundary_ratio=well.BOUNDARY, expand_timesteps=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Official names, written here independently of the converters.

def renamed(weights, table):
    named = {}
    for key, value in weights.items():
        for new, old in table:
            key = re.sub(new, old, key)
        named[key] = value.clone()
    return named


def official_transformer(weights):
    return renamed(weights, [
        (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
        (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
        (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
        (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
        (r"condition_embedder\.time_proj", "time_projection.1"), (r"attn1\.", "self_attn."),
        (r"attn2\.", "cross_attn."), (r"to_out\.0", "o"), (r"to_([qkv])", r"\1"),
        (r"ffn\.net\.0\.proj", "ffn.0"), (r"ffn\.net\.2", "ffn.2"), ("proj_out", "head.head"),
        (r"\.norm2\.", ".norm3."), ("^scale_shift_table", "head.modulation"),
        ("scale_shift_table", "modulation")])


def official_vae(weights, nested):
    last = {"down": 2, "up": 3}                  # resnets before a sampler
    table = [("^quant_conv", "conv1"), ("^post_quant_conv", "conv2"), (r"conv_in\.", "conv1."),
             (r"norm_out\.", "head.0."), (r"conv_out\.", "head.2."),
             (r"mid_block\.attentions\.0", "middle.1"),
             (r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}")]
    for new, old in (("norm1", "residual.0"), ("conv1", "residual.2"), ("norm2", "residual.3"),
                     ("conv2", "residual.6"), ("conv_shortcut", "shortcut")):
        table.append((rf"(middle\.[02]|_blocks)(.*)\.{new}\.(\w+)$", rf"\1\2.{old}.\3"))
    if nested:
        table += [(r"(down|up)_blocks\.(\d)\.resnets", r"\1samples.\2.\1samples"),
                  (r"(down|up)_blocks\.(\d)\.\1sampler",
                   lambda m: f"{m[1]}samples.{m[2]}.{m[1]}samples.{last[m[1]]}")]
    else:
        table += [("down_blocks", "downsamples"),
                  (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}"),
                  (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}")]
    return renamed(weights, table)


def official_t5(weights):
    weights = {name: value for name, value in weights.items() if name != "encoder.embed_tokens.weight"}
    return renamed(weights, [
        (r"^shared\.", "token_embedding."), (r"encoder\.final_layer_norm", "norm"),
        (r"encoder\.block\.", "blocks."),
        (r"layer\.0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
        (r"layer\.0\.SelfAttention", "attn"), (r"layer\.0\.layer_norm", "norm1"),
        (r"layer\.1\.layer_norm", "norm2"), (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"),
        (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"), (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2")])


@pytest.mark.parametrize("name,part,count", [
    ("ti2v_5b", "transformer", 4_999_787_712), ("ti2v_5b", "vae", 704_688_668),
    ("ti2v_5b", "text_encoder", 5_680_910_336), ("i2v_a14b", "transformer", 14_288_901_184),
    ("i2v_a14b", "vae", 126_892_531)])
def test_wan_at_full_size(name, part, count):
    """The published sizes, and every official name of the VAEs."""
    model = common.load_wan(None, part=part, config=name, random_init=True, device="meta")
    assert common.count_params(model) == count
    if part == "vae":
        assert len(model.config.latents_mean) == len(model.config.latents_std) == model.config.z_dim
        weights = model.state_dict()
        official = official_vae(weights, nested=name == "ti2v_5b")
        assert common.diffusers_names(official, "vae").keys() == weights.keys()


@pytest.mark.parametrize("config,stride", [(VAE21, 8), (VAE22, 16)])
def test_wan_latents(config, stride):
    vae = tiny_wan("vae", {"vae": config})
    x = torch.rand(1, 5, 3, 32, 32) * 2 - 1
    z = common.wan_encode(vae, x)
    assert z.shape == (1, 4, 2, 32 // stride, 32 // stride) and z.dtype == torch.float32
    raw = vae.encode(x.permute(0, 2, 1, 3, 4)).latent_dist.mode()
    for c in range(4):
        expected = (raw[:, c] - vae.config.latents_mean[c]) / vae.config.latents_std[c]
        torch.testing.assert_close(z[:, c], expected)
    y = common.wan_decode(vae, z)
    assert y.shape == x.shape and y.abs().max() <= 1
    torch.testing.assert_close(y, vae.decode(raw).sample.permute(0, 2, 1, 3, 4), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="4k [+] 1"):
        common.wan_encode(vae, x[:, :4])


def test_linear_codec():
    """Exact where as many components as rows are kept; causal, as Wan's VAE is; a still video is zeros."""
    x = torch.rand(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = torch.cat([x, x.flip(-1)])               # the decoder is fitted to mirror images too
    codec = common.LinearCodec.fit(x, 16)                          # there are 16 patches of each kind
    z = common.wan_encode(codec, x)
    assert z.shape == (4, 16, 2, 2, 2) and (common.wan_decode(codec, z) - x).abs().max() < 1e-3
    later = torch.cat([x[:, :1], x[:, 1:].flip(1)], dim=1)
    assert torch.equal(common.wan_encode(codec, later)[:, :, 0], z[:, :, 0])
    still = common.wan_encode(codec, x[:, :1].expand_as(x))
    assert still[:, :, 1].abs().max() < 1e-3 and torch.equal(still[:, :, 0], z[:, :, 0])
    assert torch.allclose(z.square().mean((0, 1, 3, 4)), torch.ones(2), rtol=.01)
    video = common.wan_decode(codec, torch.cat([z, z[:, :, 1:]], dim=2))   # in chunks, to the last bit
    assert torch.equal(video[:, :5], common.wan_decode(codec, z)) and torch.equal(video[:, 5:], video[:, 1:5])


def test_linear_codec_has_no_block_edges():
    """Where latents are fewer than pixels, the error beside the edges of patches is that inside them."""
    x = F.interpolate(torch.randn(16, 15, 6, 6, generator=torch.Generator().manual_seed(0)), (64, 64),
                      mode="bicubic").unflatten(1, (5, 3)).tanh()
    codec = common.LinearCodec.fit(x, 8)
    error = (common.wan_decode(codec, common.wan_encode(codec, x)) - x).square().mean((0, 1, 2))
    edges = torch.arange(64) % codec.side
    edges = ((edges == 0) | (edges == codec.side - 1))[8:-8]
    inner = error[8:-8, 8:-8]                    # at the border of the picture there is no neighbour
    assert inner[edges].mean() < 1.2 * inner[~edges].mean() and error.mean() < .3 * x.var()


def test_official_wan_transformers(tmp_path):
    """A folder of shards for each expert; a shard that is missing; weights that do not fit."""
    model = tiny_wan("transformer")
    low = common.load_wan(None, part="transformer", config=TINY_WAN, random_init=True)
    load = functools.partial(common.load_wan, part="transformer", config=TINY_WAN)
    for folder, expert in (("high_noise_model", model), ("low_noise_model", low)):
        weights, index = official_transformer(expert.state_dict()), {}
        (tmp_path / folder).mkdir()
        for file, names in (("a-00001-of-00002.safetensors", list(weights)[:9]),
                            ("a-00002-of-00002.safetensors", list(weights)[9:])):
            common.save_weights(tmp_path / folder / file, {name: weights[name] for name in names})
            index |= dict.fromkeys(names, file)
        common.write_json(tmp_path / folder / "diffusion_pytorch_model.safetensors.index.json",
                          {"weight_map": index})
    assert torch.equal(velocity(model), velocity(load(tmp_path)))
    assert same_weights(low, load(tmp_path, expert="transformer_2")) and not same_weights(model, low)
    (tmp_path / "high_noise_model" / file).unlink()
    one_line(load, tmp_path, file, "missing")
    torch.save(weights, tmp_path / "vidar.pt")
    one_line(functools.partial(load, config={"transformer": {**TINY_WAN["transformer"], "num_layers": 3}}),
             tmp_path / "vidar.pt", "blocks.2")


def test_official_wan_files(tmp_path):
    for config, file in ((VAE21, "Wan2.1_VAE.pth"), (VAE22, "Wan2.2_VAE.pth")):
        vae = tiny_wan("vae", {"vae": config})
        torch.save(official_vae(vae.state_dict(), nested="2.2" in file), tmp_path / file)
        assert same_weights(vae, common.load_wan(tmp_path, part="vae", config={"vae": config}))
    encoder = tiny_wan("text_encoder")
    torch.save(official_t5(encoder.state_dict()), tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    loaded = common.load_wan(tmp_path, part="text_encoder", config={"text_encoder": TINY_WAN["text_encoder"]})
    assert same_weights(encoder, loaded) and loaded.shared.weight is loaded.encoder.embed_tokens.weight
    tiny_wan("tokenizer").save_pretrained(tmp_path / "google/umt5-xxl")
    assert common.load_wan(tmp_path, part="tokenizer")("ab").input_ids == [100, 101, 1]


@pytest.mark.parametrize("part,gone", [("transformer", "proj_out.bias"), ("vae", "quant_conv.bias"),
                                       ("text_encoder", "encoder.final_layer_norm.weight")])
def test_wan_from_a_diffusers_folder(tmp_path, part, gone):
    """Whole; in bf16; with a tensor missing; not there."""
    tiny_wan(part).save_pretrained(tmp_path / part)
    load = functools.partial(common.load_wan, part=part)
    assert same_weights(tiny_wan(part), load(str(tmp_path)))
    loaded, drawn = load(tmp_path, dtype=torch.bfloat16), tiny_wan(part, dtype=torch.bfloat16)
    kinds = [{name: value.dtype for name, value in model.state_dict().items()} for model in (loaded, drawn)]
    assert loaded.dtype == torch.bfloat16 and not loaded.training and kinds[0] == kinds[1]
    file = next((tmp_path / part).glob("*.safetensors"))
    weights = common.load_weights(file)
    del weights[gone]
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    one_line(load, tmp_path, gone)
    one_line(load, tmp_path / "none", "hf download Wan-AI/Wan2.2-TI2V-5B-Diffusers --local-dir")


def test_wan_text():
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    tokenizer, encoder = tiny_wan("tokenizer"), tiny_wan("text_encoder")
    prompts = ["a  cat &amp; ", "", "x" * 50]
    texts = common.encode_text(tokenizer, encoder, prompts, length=32)
    assert [len(text) for text in texts] == [8, 1, 32]     # "a cat &" and its end; the end; cut off
    own = WanPipeline(tokenizer, encoder, tiny_wan("vae"), FlowMatchEulerDiscreteScheduler())
    expected = own._get_t5_prompt_embeds(prompts, max_sequence_length=32)
    torch.testing.assert_close(common.pad_text(texts, 32), expected, atol=1e-5, rtol=1e-5)


# ---- common.py: pictures and ensembles ------------------------------------------------------------------

def test_samples_are_the_best_median_and_worst_clip(tmp_path):
    scores = {"a": .3, "b": .1, "c": math.nan, "d": .5, "e": .2, "f": .4}
    args = Namespace(output_dir=tmp_path, preset="tiny", data_dir=tmp_path)
    for lower in (True, False):
        common.report("script", args, "none", 0, ("psnr", "none", lower), {"psnr": 1, "psnr_h01": 1},
                      {"none": {"psnr": 2}}, ["psnr"], scores, ["psnr"])
        cases = common.pick_cases(tmp_path, list("fabcde"))
        best, worst = ("b", "d") if lower else ("d", "b")
        chosen = {case: "fabcde"[i] for case, i in cases.items()}
        assert chosen == {"best": best, "median": "a", "worst": worst}
        assert list(common.pick_cases(tmp_path, list("abcdef"), 5)) == ["best", "rank_2", "median", "rank_4",
                                                                         "worst"]
    assert common.pick_cases(tmp_path, ["x", "e"]) == {"best": 1}
    with pytest.raises(common.UserError, match="no scores of these clips"):
        common.pick_cases(tmp_path, ["x"])
    args.sample, args.eval = True, False
    assert not common.wants_evaluation(args)
    newer = common.save_checkpoint(tmp_path / "ckpt", 1, {}, {})
    os.utime(newer, (time.time() + 9, time.time() + 9))
    assert common.wants_evaluation(args)


def test_pictures_begin_at_the_first_horizon(tmp_path, monkeypatch):
    grids, grid = [], common.picture_grid
    monkeypatch.setattr(common, "picture_grid", lambda rows, *a, **k: grids.append((rows, *a, k)) or grid(
        rows, *a, **k))
    video = torch.rand(34, 3, 16, 16) * 2 - 1
    values = common.apply_colormap(torch.linspace(0, 4, 34).view(-1, 1, 1).expand(-1, 16, 16), 0., 4., "m")
    ends = common.to_uint8(values.video[[0, -1], :, 0, 0])
    assert ends.tolist() == [[68, 1, 84], [253, 231, 37]] and (values.low, values.high) == ("0", "4 m")
    stem = tmp_path / "clip"
    written = common.write_panels(stem, {"depth": {"ground truth": video, "prediction": values}}, observed=4)
    assert written == [f"{stem}.mp4", f"{stem}.png"] and common.read_video(written[0]).shape[0] == 34
    rows, columns, _, settings = grids[-1]
    assert columns == ["t", "t+1", "t+7", "t+13", "t+18", "t+24", "t+30"] and settings["forecast_from"] == 1
    assert list(rows) == ["ground truth\ndepth", "prediction\ndepth"]
    assert list(settings["legends"]) == ["prediction\ndepth"]
    assert torch.equal(rows["ground truth\ndepth"][1], video[4])
    for total, observed, columns in itertools.product((5, 12, 40), (0, 1, 4), (3, 7)):
        frames = common.strip_frames(total, observed, columns)
        assert {observed, total - 1} <= set(frames) and frames == sorted(set(frames))
        assert len(frames) <= columns


def test_rank_histogram():
    members = torch.tensor([[1., 2, 2, 3], [2, 2, 2, 3], [3, 2, 3, 3]])
    counts = common.rank_histogram(members, torch.tensor([2.5, 9, 2, 0]))          # ranks 2, 3, 0 to 2, 0
    torch.testing.assert_close(counts, torch.tensor([4 / 3, 1 / 3, 4 / 3, 1]))
    generator = torch.Generator().manual_seed(0)
    calibrated = common.rank_histogram(torch.randn(4, 50_000, generator=generator),
                                       torch.randn(50_000, generator=generator))
    assert ((calibrated / 10_000 - 1).abs() < .03).all()
    bars = common.rank_panel(counts)["bars"]
    assert bars[0] == [0, 1, 2, 3] and sum(bars[1]) == pytest.approx(4)


# ---- river_smoke.py -------------------------------------------------------------------------------------

def overfit_river():
    args = river_args()
    torch.manual_seed(0)
    field, z = river.VectorField(args), torch.randn(4, 6, 4, 8, 8)
    spec = {"tau": ("rand",), "t": ("rand",), "c": ("rand",), "eps": ("randn", 4, 8, 8)}
    values = common.sample_global_batch(spec, 0, 4)
    return minimize(lambda: river.river_loss(field, z, values, args)[0], field.parameters(), 3e-3, 150)


class Field:
    """A stub of the network: records its inputs and returns velocity(x, t)."""
    def __init__(self, velocity):
        self.velocity = velocity
        self.calls = []

    def __call__(self, z_t, references, context, distance, t):
        self.calls.append(Namespace(x=z_t, references=references, context=context, distance=distance, t=t))
        return self.velocity(z_t, common.expand_to(t, z_t))


def test_river_loss_equals_the_paper():
    """Steps 3 to 9, one sample at a time, in the paper's indices: frames 1..n, c in 1..tau-2."""
    args = river_args("--sigma .1 --history 2")
    B, n, g = 300, 6, torch.Generator().manual_seed(0)
    z = torch.randn(B, n, 2, 4, 4, generator=g).double()
    values = {name: torch.rand(B, generator=g).double() for name in ("tau", "t", "c")}
    values["eps"] = torch.randn(B, 2, 4, 4, generator=g).double()
    field, losses, seen = Field(lambda x, t: x.sin() + t), [], set()
    loss, terms = river.river_loss(field, z, values, args)
    call, = field.calls
    for b in range(B):
        t, eps = values["t"][b], values["eps"][b]
        frame = dict(enumerate(z[b], 1))
        tau = 2 + int(values["tau"][b] * (n - 1))
        c = 1 + int(values["c"][b] * (tau - 2)) if tau > 2 else 1
        z_t, u_t = (1 - .9 * t) * eps + t * frame[tau], frame[tau] - .9 * eps
        assert torch.allclose(call.x[b], z_t) and call.t[b] == t and call.distance[b] == tau - c
        assert torch.equal(call.references[b], torch.stack([frame[tau - 1], frame[max(1, tau - 2)]]))
        assert torch.equal(call.context[b], frame[c])
        losses.append(((z_t.sin() + t - u_t) ** 2).mean())
        seen.add((tau, c))
    assert seen == {(2, 1), *((tau, c) for tau in range(3, n + 1) for c in range(1, tau - 1))}
    assert torch.allclose(loss, torch.stack(losses).mean()) and terms == {}


def test_the_field_depends_on_all_its_inputs():
    field = randomized(river.VectorField(river_args("--history 2")), .2)
    inputs = [torch.randn(2, 4, 8, 8), torch.randn(2, 2, 4, 8, 8), torch.randn(2, 4, 8, 8),
              torch.tensor([2, 3]), torch.tensor([.1, .7])]
    v = field(*inputs)
    for i, x in enumerate(inputs):
        changed = [*inputs[:i], x + 1, *inputs[i + 1:]]
        assert not torch.allclose(field(*changed), v, atol=1e-3)


def forecast(velocity, observed, flags):
    """generate() with a stub of the network -> latents, its calls, the noise of the first frame."""
    field = Field(velocity)
    z = river.generate(field, observed, river_args(flags), torch.Generator().manual_seed(3))
    return z, field.calls, torch.randn(observed[:, -1].shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_solvers_reach_closed_forms(solver):
    observed, target = torch.randn(2, 2, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    target = target[:, 0]
    for warm in (0, .2, .5):
        flags = f"--solver {solver} --warm_start {warm} --frames_to_generate 1 --num_inference_steps"
        for steps in (1, 2, 5):
            z, calls, eps = forecast(lambda x, t: (target - x) / (1 - t), observed, f"{flags} {steps}")
            first = (1 - warm) * eps + warm * observed[:, -1]      # z'_s ~ p_s(z | z^{T-1})
            assert torch.allclose(calls[0].x, first) and torch.allclose(calls[0].t, torch.tensor(float(warm)))
            assert torch.allclose(z[:, 0], target, atol=1e-5)
            count = max(1, round((1 - warm) * steps))
            assert len(calls) == count == river.network_calls(river_args(f"{flags} {steps}"), warm)
        # dx/dt = x grows by e^{1-s}. Half the step halves a first-order error, quarters a second-order one.
        coarse, fine = (forecast(lambda x, t: x, observed, f"{flags} {steps}")[0][:, 0] for steps in (40, 80))
        coarse, fine = ((x - first * math.exp(1 - warm)).norm() for x in (coarse, fine))
        assert coarse / fine == pytest.approx(2 if solver == "euler" else 4, rel=.1)


def test_contexts_stay_within_trained_distances():
    """Frame i is filled with i. Of 8 observed frames, distances up to 5 were trained."""
    def still(x, t):
        return 0 * x

    observed = torch.arange(8.).view(1, 8, 1, 1, 1).expand(200, 8, 4, 2, 2)
    flags = "--frames_to_generate 1 --num_inference_steps 2 --history 2"
    _, (call, second), _ = forecast(still, observed, flags)
    assert set(call.distance.tolist()) == {2, 3, 4, 5}
    assert torch.equal(call.context[:, 0, 0, 0], 8. - call.distance)
    assert (call.references[:, 0] == 7).all() and (call.references[:, 1] == 6).all()
    assert torch.equal(second.context, call.context)     # both stages of a midpoint step have one context
    _, calls, _ = forecast(still, observed[:, 2:3], "--num_inference_steps 1 --history 2")   # from one frame
    assert [set(call.distance.tolist()) for call in calls] == [{1}, {2}, {2, 3}]


def test_data_layouts(trained, tmp_path):
    """A folder per clip, or a flat folder with a list file, whose names may have spaces, dots and folders."""
    data, lines = trained("river_smoke").data, []
    frames, videos = river.load_clips(data, "train")
    assert [first for _, first, _ in videos] == list(range(0, len(frames), 14))
    assert np.array_equal(frames[15].permute(1, 2, 0), iio.imread(data / "train/sim000001/0002.png"))
    (tmp_path / "train").mkdir()
    for path in (data / "train").glob("*/*.png"):
        name = f"day 1.b {path.parent.name}_frame_{path.stem}.png"
        shutil.copy(path, tmp_path / "train" / name)
        lines.append(f"C:\\set\\train\\{name} 0.5 1")
    (tmp_path / "train_files.txt").write_text("\r\n".join(lines), encoding="utf-8-sig")
    assert torch.equal(frames, river.load_clips(tmp_path, "train")[0])
    videos = [("a", 0, np.arange(1, 6)), ("b", 5, np.array([1, 2, 3, 5, 6, 7, 8])), ("c", 12, np.arange(2))]
    assert [clip.tolist() for clip in river.window_starts(videos, 3, "train")] == [[0, 1, 2], [5, 8, 9]]


@pytest.mark.parametrize("flags", ["", "--quantizer vq --codes 16"])
def test_quantizers(flags):
    """The nearest code, with a straight-through gradient; a codebook moves to where the latents are."""
    torch.manual_seed(0)
    quantizer, z = river.Autoencoder(river_args(flags)).quantizer, torch.randn(4, 4, 8, 8, requires_grad=True)
    for _ in range(61 if flags else 0):
        quantizer(z.detach() + 5)
    assert not flags or (quantizer.nearest(z + 5) - z - 5).square().mean() < .7 * z.var()
    code, (value, _) = quantizer.eval().nearest(quantizer.latent(z)), quantizer(z)
    value.sum().backward()
    assert torch.allclose(value, code, atol=1e-6) and torch.allclose(quantizer.nearest(code), code, atol=1e-6)
    assert (z.grad > 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_autoencoder_loss(masked):
    """Smoke weighs 5 in the masked share; only there does the decoder learn from the discriminator."""
    torch.manual_seed(0)
    model, x = river.AutoencoderLoss(river_args("--gan .1")), torch.rand(2, 3, 64, 64) * 2 - 1
    x[..., :32] = -1                             # half without smoke
    y, _ = model.autoencoder(x)
    error = ((y - x) ** 2 + .1 * (y - x).abs()).mean(dim=1)
    real, fake, score = model.discriminator(x), model.discriminator(y), model.discriminator(y).mean()
    expected = error.mean()
    if masked:
        expected = (error[..., :32].mean() + 5 * error[..., 32:].mean()) / 6 - .1 * score
    loss, _ = model(x, masked)
    assert loss.item() == pytest.approx(
        (expected + F.relu(1 - real).mean() + F.relu(1 + fake).mean()).item(), rel=1e-4)
    last = model.autoencoder.decoder[-2].weight
    ours, theirs = (torch.autograd.grad(value, last, retain_graph=True)[0] for value in (loss, expected))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_load_models(trained):
    """As README shows: flags and checkpoint of a run, its models, a forecast. Latents are normalised; the
    second view of the training set is the mirrored one, frame by frame."""
    base = trained("river_smoke")
    args, checkpoint, _ = river.parse_args(["--sample", "--output_dir", str(base.run)])
    autoencoder, field = river.load_models(args, checkpoint)
    pixels = river.load_clips(base.data, "train")[0]
    frames = common.from_uint8(pixels)
    z = autoencoder.encode(frames)
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-3
    plain, mirrored = river.encode_clips(autoencoder, [pixels, pixels.flip(-1)], "cpu").float()
    assert torch.allclose(plain, z, atol=.01)
    assert torch.allclose(mirrored, autoencoder.encode(frames.flip(-1)), atol=.01)
    members = river.forecast(autoencoder, field, frames[None, :4], args, members=2, seed=0)
    assert members.shape == (1, 2, 3, 3, 64, 64) and members.abs().max() <= 1
    assert torch.equal(members, river.forecast(autoencoder, field, frames[None, :4], args, 2, seed=0))


def test_forecast_scores():
    g = torch.Generator().manual_seed(0)
    truth = 2 * torch.rand(2, 4, 3, 64, 64, generator=g) - 1
    perfect = river.forecast_scores(truth[:, None].expand(-1, 3, -1, -1, -1, -1), truth)
    ideal = dict.fromkeys(perfect, 0.) | {"psnr": 60., "psnr_ensemble_mean": 60., "ssim": 1.}
    for name, values in perfect.items():
        assert torch.allclose(values, torch.full((2, 4), ideal[name]).to(values), atol=1e-5), name
    noisy = truth[:, None] + .2 * torch.randn(2, 6, 4, 3, 64, 64, generator=g)     # in [0, 1], sigma .1
    scores = river.forecast_scores(noisy, truth)
    assert (scores["psnr_ensemble_mean"] > scores["psnr"] + 5).all()
    assert torch.allclose(scores["ensemble_variance"].float(), torch.tensor(.01 * 7 / 6), rtol=.02)
    calibrated = river.forecast_scores(noisy[:, 1:], noisy[:, 0])      # the truth is one more such member
    assert river.average_scores([calibrated])["spread_skill"] == pytest.approx(1, rel=.02)


# ---- data/river_smoke/prepare.py ------------------------------------------------------------------------

def disk_full(*args, **options):
    raise OSError(28, "No space left on device")


def test_extract(tmp_path, capsys):
    """A soft blob drifts over a texture. Videos of equal names stay apart, bad ones are named."""
    y, x = torch.meshgrid(torch.arange(96.), torch.arange(128.), indexing="ij")
    blob = torch.stack([torch.exp(-((x - 4 - 8 * k) ** 2 + (y - 48) ** 2) / 150) for k in range(16)])[:, None]
    texture = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    texture = F.interpolate(20 + 120 * texture, (96, 128))
    for name in ("a b", "a_b", "x/дым", "y/дым"):
        common.write_video(tmp_path / f"in/{name}.mp4", (texture * (1 - blob) + 235 * blob).byte())
    common.write_video(tmp_path / "in/none.mp4", texture.expand(16, -1, -1, -1).byte())
    (tmp_path / "in/cut.mp4").write_bytes((tmp_path / "in/a b.mp4").read_bytes()[:2000])
    assert river_prepare.main(["--extract", str(tmp_path / "in"), "--data_dir", str(tmp_path / "set")]) == 0
    err = capsys.readouterr().err
    assert "no clip of none.mp4: smoke covers 0.0%" in err and "of cut.mp4: cannot" in err
    paths = list((tmp_path / "set").glob("*/*/0009.png"))
    assert len(paths) == 4
    for path in paths:                                             # scaled by 64 / 96, 11 columns cropped
        grey = iio.imread(path).astype(float).mean(-1)
        assert grey.shape == (64, 64) and grey.max() > 90 and (grey == 0).mean() > .82
        for axis, centre in ((0, 68.5 * 64 / 96 - 11.5), (1, 48.5 * 64 / 96 - .5)):
            assert abs(np.average(np.arange(64), weights=grey.sum(axis)) - centre) < 1.5


# ---- cosmos_lite.py -------------------------------------------------------------------------------------

def cosmos_model(flags="", noise=.05):
    return randomized(cosmos.VideoWorldModel(cosmos_args(flags)).eval(), noise)


def cosmos_plan(context, rollout, decoded, foreground=0.):
    return Namespace(context=context, rollout=rollout, decoded=decoded, foreground=foreground)


def projectile(frames, size=64):
    """A simulated video, frames 3 size size in [0, 1], and the states of its objects."""
    state = cosmos_prepare.simulate("projectile", frames, [0, 0])
    x = torch.from_numpy(cosmos_prepare.render(state)).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(x, size) / 255, state


def overfit_cosmos():
    args = cosmos_args("--latent_dim 16")
    torch.manual_seed(0)
    model, x = cosmos.VideoWorldModel(args), 2 * projectile(8)[0][None] - 1
    plan = cosmos_plan(2, 2, [0, 1], 1.)
    return minimize(lambda: cosmos.world_model_loss(model, x, plan, args)[0], model.parameters(), 5e-3, 150)


@pytest.mark.parametrize("flags", [
    "--world_model gru --decoder simple", "--world_model lstm --decoder enhanced --tau 1",
    "--world_model transformer --latent vector --decoder enhanced --hidden_dim 16"])
def test_kinds_of_model(flags):
    """All predict, learn in every weight, and start as the background."""
    args, x = cosmos_args(f"{flags} --latent_dim 32"), torch.rand(2, 8, 3, 64, 64) * 2 - 1
    frames, latents, context = cosmos.VideoWorldModel(args)(x[:, :4], num_predictions=5)
    assert frames.shape == (2, 5, 3, 64, 64) and torch.equal(frames, torch.ones_like(frames))
    assert latents.shape[:2] == (2, -(-5 // args.tau)) and context.shape[1] == 4 // args.tau
    model, count = cosmos_model(f"{flags} --latent_dim 32").train(), 4 // args.tau
    cosmos.world_model_loss(model, x, cosmos_plan(count, count, [0, 1], 1.), args)[0].backward()
    for name, p in model.named_parameters():
        # The key's bias in an attention is without effect.
        assert "in_proj_bias" in name or p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("flags", ["--world_model gru", "--world_model lstm", "--world_model transformer",
                                   "--latent vector --world_model transformer"])
def test_dynamics_one_at_a_time_equal_all_at_once(flags):
    """What is cached is all that matters; the future is not seen, nor what left the window."""
    model = cosmos_model(f"{flags} --window 3 --latent_dim 16 --hidden_dim 16 --num_layers 2", .2).dynamics
    side = 1 if "vector" in flags else 4
    z = torch.randn(2, 7, 16, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, state, steps = model(z)[0], None, []
        for t in range(7):
            p, state = model(z[:, t:t + 1], state)
            steps.append(p)
        assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-4)
        later = torch.cat([z[:, :5], 0 * z[:, 5:]], dim=1)
        assert torch.allclose(model(later)[0][:, :5], whole[:, :5], atol=1e-5)
        first = torch.cat([0 * z[:, :1], z[:, 1:]], dim=1)         # two layers of window 3 look back four
        seen = (model(first)[0] - whole).abs().amax((0, 2, 3, 4)) > 1e-5
    assert seen.tolist() == [True] * 5 + ["transformer" not in flags] * 2


def test_world_model_loss(tmp_path):
    """Each term against its definition; a frozen prediction of something that moves is not consistent."""
    flags, g = "--latent_dim 16 --perceptual_weight .1", torch.Generator().manual_seed(0)
    args, model, background = cosmos_args(flags), cosmos_model(flags), torch.ones(3, 64, 64)
    torch.manual_seed(0)
    vgg = cosmos.VGGFeatures()
    torch.save({f"features.{name}": value for name, value in vgg.state_dict().items()}, tmp_path / "vgg.pth")
    args.vgg_weights = str(tmp_path / "vgg.pth")
    x = torch.rand(2, 8, 3, 64, 64, generator=g) * 2 - 1
    with torch.no_grad():
        loss, terms = cosmos.world_model_loss(model, x, cosmos_plan(2, 2, [1], 3.), args,
                                              cosmos.load_vgg(args, "cpu"))
        z = model.encode(x[:, :4])
        p, state = model.dynamics(z)
        y, target = model.decode(model.rollout(p[:, 1:], state, 2)[:, 1:]), x[:, 6:]
        pixels = functools.partial(cosmos.pixel_loss, background=background, recon_type="mse",
                                   foreground=3.)
        pairs = zip(vgg(y.flatten(0, 1)), vgg(target.flatten(0, 1)))
        expected = {"recon_loss": pixels(model.decode(z[:, 1:]), x[:, 2:4]),
                    "one_step_loss": pixels(model.decode(p[:, :1]), x[:, 2:4]),
                    "rollout_loss": pixels(y, target),
                    "temporal_loss": (y.diff(dim=1) - target.diff(dim=1)).abs().mean(),
                    "perceptual_loss": sum(F.mse_loss(a, b) for a, b in pairs) / 4}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4), name
    weights = {"temporal_loss": .01, "perceptual_loss": .1}
    whole = sum(weights.get(name, 1) * value for name, value in expected.items())
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    half = torch.ones(1, 1, 3, 64, 64)
    half[..., :32] = 0                   # foreground in one half: weight 4 there, 1 elsewhere
    assert cosmos.pixel_loss(half + 1, half, background, "mse", 3.).item() == pytest.approx(2.5)
    assert cosmos.pixel_loss(half + 2, half, background, "l1", 0.).item() == pytest.approx(2)


def test_constant_velocity_and_object_scores():
    """Two squares that move uniformly are predicted; positions of simulated objects are found."""
    def square(x, y, colour, frame):
        frame[:, y:y + 6, x:x + 6] = torch.tensor(colour)[:, None, None]
        return frame
    red, blue, white = [.8, .1, .1], [.1, .1, .8], torch.ones(3, 64, 64)
    frames = torch.stack([square(40 + 4 * t, 30, blue, square(10 + t, 10 + 2 * t, red, white.clone()))
                          for t in range(5)])
    y = cosmos.constant_velocity(frames[:2], white, torch.tensor([red, blue]), 3)
    assert torch.allclose(y, frames[2:], atol=1e-3)
    x, state = projectile(30)
    scaled = {"pos": (state["pos"] * 64 / state["size"]).tolist(), "colour": state["colour"].tolist()}
    perfect = cosmos.object_scores(x[10:], x[10:], scaled, 10)
    assert perfect["position_px"].mean() < .6 and perfect["missed"].max() == 0
    gone = cosmos.object_scores(torch.ones_like(x[10:]), x[10:], scaled, 10)
    assert gone["missed"].min() == 1 and gone["position_px"].isnan().all()


def test_augmentation_is_alike_in_all_frames():
    g = torch.Generator().manual_seed(0)
    x, background = torch.rand(6, 4, 3, 64, 64, generator=g) * .4 + .3, torch.ones(3, 64, 64)
    values = {"flip": torch.tensor([.9, .1] * 3), "contrast": torch.rand(6, generator=g),
              "order": torch.arange(6)}
    y = cosmos.augment_clips(x, values, background, .5, True)
    for b, order in enumerate(itertools.permutations(range(3))):
        factor = 1 + .5 * (2 * values["contrast"][b] - 1)
        expected = x[b].flip(-1) if b % 2 else x[b]
        assert torch.allclose(y[b], (1 + factor * (expected - 1)).clamp(-1, 1)[:, order], atol=1e-6)


def test_use_from_python(trained):
    """The reference project's calls; best=True gives the weights of the lowest validation loss."""
    base = trained("cosmos_lite")
    context, target = next(iter(cosmos.create_data_loader(f"{base.data}/test", 6, 4, 2, shuffle=False)))
    frames = torch.from_numpy(np.load(base.data / "test.npy")[12:22])
    assert torch.equal(common.to_uint8(torch.cat([context[1], target[1]])), frames)
    frames, latents, context_latents = cosmos.load_model(base.run)(context[1:], num_predictions=30)
    assert frames.shape == (1, 30, 3, 64, 64) and latents.shape[1] == 15 and frames.abs().max() <= 1
    losses = {row["step"]: row["val_loss"] for row in rows(base.run) if "val_loss" in row}
    step = min(losses, key=losses.get)
    state, _ = common.load_checkpoint(base.run / f"ckpt/step_{step:06d}", "cosmos_lite")
    assert_same(dict(cosmos.load_model(base.run, best=True).state_dict()), state["ema"])


# ---- data/cosmos_lite/prepare.py ------------------------------------------------------------------------

def test_simulated_motion(monkeypatch):
    """Ballistic flight, energy of an undamped pendulum, an elastic collision, a reflection at the floor."""
    flight = cosmos_prepare.simulate("projectile", 7, [0, 0])["pos"][:, 0]
    gravity = cosmos_prepare.PHYSICS["projectile"].gravity
    assert np.allclose(np.diff(flight, n=2, axis=0), [0, gravity])
    physics_of = cosmos_prepare.PHYSICS["pendulum"]
    monkeypatch.setitem(cosmos_prepare.PHYSICS, "pendulum", physics_of._replace(drag=1))
    state = cosmos_prepare.simulate("pendulum", 200, [0, 0])
    pos, length = state["pos"][:, 0], state["length"]
    assert np.allclose(np.linalg.norm(pos - state["pivot"], axis=1), length)
    speed = np.linalg.norm(pos[2:] - pos[:-2], axis=1) / 2
    energy = speed ** 2 / 2 + physics_of.gravity * (state["pivot"][1] + length - pos[1:-1, 1])
    assert energy.max() < 1.06 * energy.min() and np.ptp(pos[:, 0]) > 5
    pos, vel, radius = np.array([[0., 0.], [3., 4.]]), np.array([[2., 1.], [-1., 0.]]), np.array([3., 3.])
    before = vel.copy()
    cosmos_prepare.collide(pos, vel, radius)
    assert np.allclose(vel.sum(0), before.sum(0)) and np.isclose((vel ** 2).sum(), (before ** 2).sum())
    assert (vel[1] - vel[0]) @ [3, 4] > 0 and np.isclose(np.linalg.norm(pos[1] - pos[0]), 6)
    pos, vel, floor = np.array([[30., 62.]]), np.array([[1., 2.]]), cosmos_prepare.PHYSICS["falling"]
    cosmos_prepare.bounce(pos, vel, np.array([4.]), floor, at_rest=.2)
    assert pos.tolist() == [[30, 60]] and np.allclose(vel, [[floor.friction, -2 * floor.restitution]])


# ---- sim_physics_heads.py -------------------------------------------------------------------------------

def physics_model(flags="", stage="heads", noise=0.):
    """PhysicsModel on a random tiny backbone; noise: of all weights, of which some are zero at the start."""
    args = physics_args(flags)
    dit = physics.load_part(args, "transformer", "cpu")
    torch.manual_seed(0)
    model = physics.build_model(args, stage, dit)
    return randomized(model, noise) if noise else model, args


def clip_tensors(B=2, T=5, side=32, seed=0):
    """Random inputs of PhysicsModel, and a batch of targets without holes."""
    g = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(2, B, 48, (T - 1) // 4 + 1, side // 8, side // 8, generator=g)
    smooth = F.interpolate(torch.randn(B * T, 3, 4, 4, generator=g), (side, side), mode="bicubic")
    smooth = smooth.unflatten(0, (B, T))
    known = torch.ones(B, T, side, side, dtype=torch.bool)
    batch = {"motion": smooth[:, :, :2], "depth": (1 + smooth[:, :, 2:] / 3).exp(),
             "sky": torch.zeros(B, T, 1, side, side), "moving": physics.speed(smooth[:, :, :2]) > .5,
             "motion_valid": known, "depth_valid": known.clone(), "sky_valid": known.clone()}
    return z, noise, torch.randn(B, 16, 32, generator=g), batch


def overfit_physics():
    model, args = physics_model("--head_width 32 --head_blocks 2 --cells 8")
    z, noise, text, batch = clip_tensors()
    sigma = torch.full((2,), physics.READ_SIGMA)
    return minimize(lambda: model(z, noise, sigma, text, batch, velocity=False)[0],
                    model.heads.parameters(), 3e-3, 100)


def test_hidden_states_and_early_exit():
    """Hooks leave diffusers' forward as it is, to the last bit, and end it after the last tap."""
    model, args = physics_model(noise=.05)
    z, noise, text, _ = clip_tensors()
    x, sigma = physics.add_noise(z, noise, torch.tensor([.3, .8]))
    t, outputs = 1000 * sigma.flatten(1), []
    for block in model.dit.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    expected = model.dit(x, t, text).sample
    taps = [model.dit.patch_embedding(x).flatten(2).transpose(1, 2), outputs[0], outputs[-1]]
    v, hidden, time = physics.run_backbone(model.dit, x, t, text, [0, 1, len(model.dit.blocks)])
    assert torch.equal(v, expected) and all(map(torch.equal, hidden, taps)) and v.std() > 0
    outputs.clear()
    v, early, same = physics.run_backbone(model.dit, x, t, text, [0, 1], velocity=False)
    assert v is None and len(outputs) == 1 and torch.equal(same, time)
    assert all(map(torch.equal, early, hidden))


def test_the_given_frame_stays_clean():
    z, noise, text, batch = clip_tensors(T=9)
    x, sigma = physics.add_noise(z, noise, torch.tensor([.3, .8]))
    assert torch.equal(x[:, :, 0], z[:, :, 0]) and not sigma[:, 0].any() and (sigma[1, 1:] == .8).all()
    assert torch.allclose(x[1, :, 1:], .2 * z[1, :, 1:] + .8 * noise[1, :, 1:], atol=1e-5)
    model, args = physics_model("--frames 9", "backbone", noise=.05)
    v = model.dit(x, 1000 * sigma.flatten(1), text).sample
    loss, _ = model(z, noise, torch.tensor([.3, .8]), text, batch)
    assert torch.allclose(loss, F.mse_loss(v[:, :, 1:], (noise - z)[:, :, 1:]))


def test_physics_losses_and_scores():
    """The truth costs nothing and scores best; what is not known teaches nothing."""
    _, _, _, batch = clip_tensors()
    args, gate = Namespace(height=96), torch.where(batch["moving"], 20., -20.)[:, None]
    truth = {"motion": torch.cat([batch["motion"].movedim(1, 2), gate], dim=1),
             "depth": batch["depth"].movedim(1, 2).log(), "sky": torch.full_like(gate, -20)}
    hole = torch.ones_like(batch["moving"])
    hole[:, :, 8:20, 5:17] = False
    masked = {key: mask & hole if mask.dtype == torch.bool else mask for key, mask in batch.items()}
    for name, quantity in physics.QUANTITIES.items():
        assert quantity.loss(truth[name], batch, args).abs() < 1e-5
        y = (truth[name] + .1).requires_grad_()
        quantity.loss(y, masked, args).backward()
        assert not y.grad[:, :, :, 8:20, 5:17].any() and y.grad.any()
    off = truth["motion"] + torch.tensor([1., 0, 0]).view(3, 1, 1, 1)
    expected = .75 * (math.sqrt(1 + .02 ** 2) - .02)               # one unit on what moves
    assert physics.motion_loss(off, batch, args).item() == pytest.approx(expected, rel=1e-4)
    assert physics.depth_loss(truth["depth"] + 1, batch, args).item() == pytest.approx(2, rel=1e-4)
    values = {name: quantity.decode(truth[name]) for name, quantity in physics.QUANTITIES.items()}
    assert torch.allclose(values["depth"], batch["depth"], rtol=1e-4)
    assert torch.allclose(values["motion"], batch["motion"] * batch["moving"][:, :, None], atol=1e-6)
    values |= {"motion": batch["motion"] + 3, "depth": 2 * batch["depth"]}
    scores = {name: value for quantity in physics.QUANTITIES.values()
              for name, value in quantity.scores(values, batch).items()}
    assert torch.allclose(scores["epe"], torch.tensor(math.sqrt(18))) and scores["epe"].shape == (2,)
    assert torch.allclose(scores["abs_rel"], torch.ones(2)) and not scores["delta1"].any()
    assert torch.equal(scores["sky_accuracy"], torch.ones(2))


@pytest.mark.parametrize("stage", ["backbone", "heads", "lora"])
def test_what_a_stage_trains(stage):
    model, args = physics_model("", stage)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pattern = {"backbone": r"dit\.", "heads": r"heads\.", "lora": r"heads\.|dit\..*\.lora_[AB]\."}[stage]
    assert set(named) == {name for name, _ in model.named_parameters() if re.match(pattern, name)}
    z, noise, text, batch = clip_tensors()
    for p in named.values():                     # off their zeros, so that all of them matter
        nn.init.normal_(p, std=.05)
    model(z, noise, torch.tensor([.2, .6]), text, batch, velocity=stage != "heads")[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in named.values())
    kind = torch.linspace(0, .999, 100)
    sigma, for_heads = physics.draw_sigma(stage, {"kind": kind, "u": torch.full((100,), .5)}, 5.)
    assert for_heads.float().mean() == {"backbone": 0, "heads": 1, "lora": .5}[stage]


def test_trained_weights_load_elsewhere(trained):
    """The LoRA file into diffusers' pipeline; the run's folder by load_model; a video by predict_video."""
    run = trained("sim_physics_heads").run
    pipe = pipeline(physics_model()[0].dit)
    common.restore_state(pipe.transformer, common.load_weights(run / "backbone/final/backbone.safetensors"))
    plain = velocity(pipe.transformer)
    pipe.load_lora_weights(run / "final")
    model = physics.load_model(str(run))
    assert not torch.equal(velocity(pipe.transformer), plain)
    torch.testing.assert_close(velocity(pipe.transformer), velocity(model.dit))
    assert_same(common.load_weights(run / "final/heads.safetensors"), dict(model.heads.state_dict()))
    with contextlib.chdir(run.parent.parent):
        values = physics.predict_video(model, torch.zeros(5, 3, 32, 32, dtype=torch.uint8), "a ball rolls")
    assert values["motion"].shape == (5, 2, 32, 32) and values["depth"].shape == (5, 1, 32, 32)


def test_cache_follows_its_data_and_flags(trained, tmp_path):
    data = shutil.copytree(trained("sim_physics_heads").data, tmp_path / "data", copy_function=shutil.copy2)
    folder = lambda flags="": physics.cache_folder(physics_args(f"--data_dir {data} {flags}"))
    old = folder()
    assert (old / "complete").is_file() and folder("--seed 3 --lr 5 --batch_size 3") == old
    assert folder("--clips 1") != old
    path = data / "test_ball_ramp/env_0/0/0/distance_to_camera/step_0003.npy"
    np.save(path, np.load(path) + 1)
    assert folder() != old


@pytest.mark.parametrize("scale", [1, 3])
def test_generated_from_a_known_velocity(scale, monkeypatch):
    """The flow to a known latent is a straight line: Euler ends on it, whatever the schedule's steps."""
    args = physics_args(f"--num_inference_steps 4 --guidance_scale {scale} --frames 9 --shift 5")
    target, z0 = torch.randn(1, 48, 3, 4, 4), torch.randn(1, 48, 1, 4, 4)
    noise, calls = physics.fixed_noise(target, 7), []

    def field(dit, x, t, text):
        calls.append((x, t))
        return noise - target - (0 if text == "prompt" else 2 / 3 * noise), [], None
    monkeypatch.setattr(physics, "run_backbone", field)
    z = physics.generate(None, z0, "prompt", "negative", args, 7)
    end = target[:, :, 1:] if scale == 1 else target[:, :, 1:] - 4 / 3 * noise[:, :, 1:]
    assert torch.equal(z[:, :, :1], z0) and torch.allclose(z[:, :, 1:], end, atol=1e-5)
    for (x, t), u in zip(calls[::len(calls) // 4], (1, .75, .5, .25)):
        assert torch.equal(x[:, :, :1], z0) and t.shape == (1, 3 * 4) and not t[:, :4].any()
        assert torch.allclose(t[:, 4:], torch.tensor(1000 * 5 * u / (1 + 4 * u)))


# ---- data/vidar: vidar data -----------------------------------------------------------------------------

robot_prepare = load_program(HERE / "data/vidar/prepare.py")
robot_world = sys.modules["world"]


def expert_succeeds(seed, replan_every, moved=None, frames=64, noise=0.):
    """Whether an expert that plans again every `replan_every` frames puts the block on the plate."""
    world, rng = robot_world.ArmWorld(seed, moved=moved), np.random.default_rng(seed)
    for t in range(frames):
        if t % replan_every == 0:
            plan = copy.deepcopy(world).expert_actions(frames)
        before = world.state
        world.step(plan[t % replan_every] + noise * rng.normal(size=14))
        assert noise or np.allclose(world.state, plan[t % replan_every])       # the plan is feasible, and
        assert (np.abs(world.state - before) <= robot_world.MAX_SPEED + 1e-9).all()   # the speed is limited
    return world.success


def test_arm_world_needs_the_loop():
    """A moved block defeats an open-loop plan, not a closed loop; an IDM's noise defeats neither."""
    def rate(**options):
        return np.mean([expert_succeeds(seed, **options) for seed in range(8)])

    assert rate(replan_every=40, frames=40) == rate(replan_every=8, moved=6) == 1
    assert rate(replan_every=64, moved=6) < .2 and rate(replan_every=40, frames=40, noise=.05) > .8


def test_arm_world_kinematics_and_views():
    """Inverse kinematics reaches points on the table. Each joint is visible to the fixed camera, and three
    links to the wrist camera of their arm."""
    world, rng = robot_world.ArmWorld(1), np.random.default_rng(0)
    image, mask = world.render()
    assert image.shape == (112, 96, 3) and image.dtype == np.uint8 and .05 < mask.mean() < .4
    for arm in (0, 1):
        goal, start = robot_world.random_points(rng, [arm])[0], robot_world.START[7 * arm:7 * arm + 7]
        pose = robot_world.inverse_kinematics(start, arm, goal)
        assert abs(robot_world.forward_kinematics(pose, arm)[1] - goal) < .01
        wrist = image[75:, 48 * arm:48 * arm + 48].astype(int)
        links = [(np.abs(wrist - color) < 20).all(-1).sum() for color in robot_world.ARM_COLORS[arm]]
        assert min(links) > 3, (arm, links)
    for joint in range(14):
        other = copy.deepcopy(world)
        other.state[joint] -= .3 if joint in (6, 13) else .1
        changed = (np.abs(other.observe().astype(int) - image) > 40).any(-1)[:75]
        assert changed.sum() > 3 and (mask | other.render()[1])[:75][changed].mean() > .6, joint


def test_robot_data_simulated(tmp_path):
    """Frame t shows actions[t], and mask t the arms in it."""
    root, size = tmp_path / "set", (96, 80)
    flags = "--episodes 3 --poses 5 --frames 13 --size 96 80 --seed 6 --data_dir"
    assert robot_prepare.main([*flags.split(), str(root)]) == 0
    manifest = json.loads((root / "manifest.json").read_text())
    assert (manifest["fps"], manifest["action_dim"], len(manifest["episodes"])) == (10, 14, 4)
    for number, row in enumerate(manifest["episodes"]):
        video = common.read_video(root / row["video_path"])
        actions, packed = np.load(root / row["actions_path"]), np.load(root / row["mask_path"])
        masks = np.unpackbits(packed["bits"], count=packed["shape"].prod()).reshape(packed["shape"])
        world = robot_world.ArmWorld((6, number), size)
        expected = world.instruction if number < 3 else robot_world.RANDOM_POSES
        assert (root / row["instruction_path"]).read_text() == f"{expected}\n"
        assert row["random_poses"] == (number == 3) and row["num_frames"] == (5 if number == 3 else 13)
        assert actions.shape == (len(video), 14) == (row["num_frames"], 14) and actions.dtype == np.float32
        for t in (0, len(video) - 1):
            world.state = actions[t].astype(float)
            image, mask = world.render()
            assert np.abs(video[t].permute(1, 2, 0).numpy().astype(int) - image)[mask].mean() < 8
            assert (masks[t] == mask).all()


def camera_frames(camera, frames=25, episode=0):
    """Frame t of camera i is (200 - 40 episode, 10 t, 20 + 50 i), which also shows the order of channels."""
    colors = [[200 - 40 * episode, 10 * t, 20 + 50 * camera] for t in range(frames)]
    return np.uint8(colors)[:, None, None].repeat(48, 1).repeat(64, 2)


def joint_positions(shift=0, frames=25, width=14, episode=0):
    return np.arange(shift, shift + frames)[:, None] * .01 + np.arange(width) * .1 + episode


def jpegs(frames, marked=True):
    """As RoboTwin stores them: NUL-padded rows, with red and blue exchanged unless marked."""
    options = {"extension": ".jpg", "quality": 95, "comment": b"XPL-RGB1" if marked else b""}
    frames = frames if marked else frames[..., ::-1]
    return np.array([iio.imwrite("<bytes>", frame, **options) for frame in frames], "S")


def robot_source(kind, root):
    """Writes an HDF5 file, or a LeRobot data set. `action` is one frame ahead of the joint positions."""
    if kind.startswith("v"):
        return lerobot_source(kind, root)
    texts = ["Pick up the cup.", "Lift the cup."]
    (root / "data").mkdir(parents=True)
    with h5py.File(root / "data/episode11.hdf5", "w") as file:
        if kind == "legacy":
            images, names = "observation/{}_camera/rgb", ("head", "left", "right")
            file["joint_action/vector"] = joint_positions()
            common.write_json(root / "instructions/episode11.json", {"seen": texts, "unseen": ["No."]})
        elif kind == "xpolicylab":
            images, names = "vision/{}/colors", ("cam_head", "cam_left_wrist", "cam_right_wrist")
            for side, first in (("left", 0), ("right", 7)):
                file[f"state/{side}_arm_joint_states"] = joint_positions()[:, first:first + 6]
                file[f"state/{side}_ee_joint_states"] = joint_positions()[:, first + 6]
            file["instructions"] = json.dumps(texts)
        else:
            images, names = "observations/images/{}", ("cam_high", "cam_left_wrist", "cam_right_wrist")
            file["observations/qpos"], file["action"] = joint_positions(), joint_positions(1)
            file.attrs.update(instruction=texts[1], fps=50)
        for i, name in enumerate(names):
            frames = camera_frames(i)
            file[images.format(name)] = frames if kind == "aloha" else jpegs(frames, kind == "xpolicylab")
    return root


def lerobot_source(kind, root):
    """Episodes of 25 and 20 frames at 50 fps. v2.1: the head camera's images are in the tables. v3.0: its
    videos are in one file, those of the wrists in two."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    head, *wrists = [f"observation.images.cam_{name}" for name in ("high", "left_wrist", "right_wrist")]
    data_path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video_path = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    if kind == "v3.0":
        data_path = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        video_path = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    features = {name: {"dtype": "video"} for name in wrists} | {
        head: {"dtype": "video" if kind == "v3.0" else "image"},
        f"{head}_depth": {"dtype": "video", "info": {"video.is_depth_map": True}},
        "action": {"dtype": "float32"}, "observation.state": {"dtype": "float32"}}
    common.write_json(root / "meta/info.json", {"codebase_version": kind, "fps": 50, "features": features,
                                                "data_path": data_path, "video_path": video_path})

    def write_table(path, columns):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if "frame_index" in columns:             # the order of rows means nothing
            columns = {name: values[::-1] for name, values in columns.items()}
        parquet.write_table(pyarrow.table(columns), root / path)

    def write_camera(camera, episode, frames):
        path = video_path.format(video_key=camera, chunk_index=0, episode_chunk=0, file_index=episode,
                                 episode_index=episode)
        common.write_video(root / path, torch.from_numpy(frames).movedim(-1, 1), 50,
                           ("-g", "2", "-crf", "12", "-pix_fmt", "yuv420p"))

    tables, rows = [], []
    for k, length in enumerate((25, 20)):
        tables.append({"frame_index": list(range(length)), "episode_index": [k] * length,
                       "observation.state": joint_positions(0, length, episode=k).tolist()})
        rows.append({"episode_index": k, "tasks": [f"Task {k}."], "length": length})
        for i, camera in enumerate(wrists, 1):
            write_camera(camera, k, camera_frames(i, length, k))
    if kind == "v3.0":
        write_camera(head, 0, np.concatenate([camera_frames(0, 25), camera_frames(0, 20, 1)]))
        write_table("data/chunk-000/file-000.parquet", {key: tables[0][key] + tables[1][key]
                                                        for key in tables[0]})
        for k, row in enumerate(rows):
            row |= {"data/chunk_index": 0, "data/file_index": 0}
            for camera in (head, *wrists):
                row |= {f"videos/{camera}/chunk_index": 0,
                        f"videos/{camera}/file_index": 0 if camera == head else k,
                        f"videos/{camera}/from_timestamp": k * .5 if camera == head else 0.}
        write_table("meta/episodes/chunk-000/file-000.parquet", {key: [row[key] for row in rows]
                                                                 for key in rows[0]})
    else:
        for k, columns in enumerate(tables):
            pictures = jpegs(camera_frames(0, len(columns["frame_index"]), k)).tolist()
            columns[head] = [{"bytes": picture, "path": None} for picture in pictures]
            write_table(data_path.format(episode_chunk=0, episode_index=k), columns)
        (root / "meta/episodes.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def robot_sources(tmp_path_factory):
    """A function of a kind of source -> its folder, written once."""
    return functools.cache(lambda kind: robot_source(kind, tmp_path_factory.mktemp("robot") / "src"))


ROBOT_FORMATS = {"legacy": "robotwin", "xpolicylab": "robotwin", "aloha": "hdf5", "v2.1": "lerobot",
                 "v3.0": "lerobot"}


@pytest.mark.parametrize("kind", ROBOT_FORMATS)
def test_robot_data_converted(kind, robot_sources, tmp_path):
    """Frames nearest to each tenth of a second, of the right camera and color, with the joints they show."""
    src, to = robot_sources(kind), tmp_path / "set"
    flags = {"v3.0": ["--src_fps", "16.67"], "xpolicylab": [
        "--cameras", "cam_head", "cam_left_wrist", "cam_right_wrist"]}.get(kind, [])
    assert robot_prepare.main(["--from", ROBOT_FORMATS[kind], str(src), str(to), *flags]) == 0
    rows = json.loads((to / "manifest.json").read_text())["episodes"]
    assert len(rows) == (2 if kind.startswith("v") else 1)
    for k, row in enumerate(rows):
        times = [0, 5, 10, 15, 20][:5 - k]
        if ROBOT_FORMATS[kind] == "robotwin" or kind == "v3.0":        # 16.67 fps
            times = [0, 2, 3, 5, 7, 8, 10, 12, 13, 15, 17, 18, 20, 22, 23][:15 - 3 * k]
        video = common.read_video(to / row["video_path"]).float()
        assert video.shape == (len(times), 3, 720, 640) and row["num_frames"] == len(times)
        corners = (60, 420, 60, 580), (520, 680, 40, 280), (520, 680, 360, 600)
        for i, (top, bottom, left, right) in enumerate(corners):
            shown = video[:, :, top:bottom, left:right].mean((2, 3)).numpy()
            error = shown - [[200 - 40 * k, 10 * t, 20 + 50 * i] for t in times]
            assert (np.abs(error + 2) < [8, 4.9, 8]).all(), (i, shown)         # ffmpeg rounds down, twice
        actions = np.load(to / row["actions_path"])
        assert np.array_equal(actions, joint_positions(episode=k)[times].astype(np.float32))
        text = f"Task {k}." if kind.startswith("v") else "Lift the cup."
        assert (to / row["instruction_path"]).read_text() == f"{text}\n"
        assert row["views"] == ["fixed front", *robot_world.VIEWS[1:]] and row["random_poses"] is False


def replace_dataset(name, value=None):
    """Removes a dataset of the HDF5 source, or replaces it by a value or a function of it."""
    def change(file):
        new = value(file[name][()]) if callable(value) else value
        del file[name]
        if new is not None:
            file[name] = new
    return lambda root: hdf5(root, change, "data")


def shorten_left_video(root):
    """The first episode's left camera shows the second episode, which has fewer frames."""
    first, second = sorted(path for path in root.rglob("*.mp4") if "left" in str(path))
    shutil.copy(second, first)


LEFT, VECTOR = "observation/left_camera/rgb", "joint_action/vector"
ROBOT_ERRORS = [
    ("legacy", replace_dataset("observation/left_camera"), "has no left camera; its cameras are"),
    ("legacy", replace_dataset(LEFT, lambda rows: rows[:-1]), "frames differ.* 24"),
    ("legacy", replace_dataset(LEFT, lambda rows: np.array([row[:99] for row in rows])), "frame 0 cannot be"),
    ("legacy", replace_dataset(VECTOR, lambda rows: np.where(np.arange(25)[:, None] == 3, 1e39, rows)),
     "of frame 3 are NaN"),
    ("legacy", replace_dataset(VECTOR, joint_positions(width=16)), "width 16, not 14"),
    ("legacy", lambda root: cut(root / "data/episode11.hdf5"), "11.hdf5 cannot be read: .*truncated"),
    ("legacy", lambda root: (root.parent / "set/thesis").mkdir(parents=True), "exists with other"),
    ("aloha", lambda root: hdf5(root, lambda file: file.attrs.__delitem__("fps"), "data"), "no frame rate"),
    ("v2.1", lambda root: edit(root / "meta/info.json", "v2.1", "v1.6"), "version v1.6; v2.0, v2.1 and v3.0"),
    ("v2.1", shorten_left_video, "episode_000000.mp4 has 20 frames from 0.00 s, not 25"),
    ("v3.0", shorten_left_video, "file-000.mp4 has 20 frames from 0.00 s, not 25"),
]


@pytest.mark.parametrize("kind, change, message", ROBOT_ERRORS)
def test_robot_data_errors(kind, change, message, robot_sources, tmp_path, capsys):
    """One line that names the file and what to do. Nothing is left where the data set would be."""
    src, to = shutil.copytree(robot_sources(kind), tmp_path / "src"), tmp_path / "set"
    change(src)
    before = files(to)
    assert robot_prepare.main(["--from", ROBOT_FORMATS[kind], str(src), str(to)]) == 2
    assert re.search(message, the_error(capsys, "prepare"))
    assert files(to) == before and not (to / "manifest.json").exists()


def test_robot_data_deploy_adapter(monkeypatch):
    """docs/robots.md: every observed frame is sent once, in order; a reset begins a new connection."""
    code = max(re.findall(r"```python\n(.*?)```", (HERE / "docs/robots.md").read_text(), re.DOTALL), key=len)
    addresses, sent, taken = [], [], []

    def connect(*address):
        addresses.append(address)
        return Namespace(infer=lambda request: sent.append(request) or {"actions": np.ones((4, 14))})

    def observation():
        views = {f"{name}_camera": {"rgb": np.full((24, 32, 3), len(taken), np.uint8)}
                 for name in ("head", "left", "right", "front")}
        return {"observation": views, "joint_action": {"vector": np.full(14, len(taken))}}

    client = Namespace(WebsocketClientPolicy=connect)
    monkeypatch.setitem(sys.modules, "openpi_client", Namespace(websocket_client_policy=client))
    monkeypatch.setitem(sys.modules, "openpi_client.websocket_client_policy", client)
    exec(code, adapter := {})
    task = Namespace(get_instruction=lambda: "Lift.", take_action=taken.append, get_obs=observation)
    model = adapter["get_model"]({"host": "robot", "port": 8000})
    for call in range(3):
        if call == 2:
            adapter["reset_model"](model)
        adapter["eval"](task, model, observation())
    assert addresses == [("robot", 8000)] * 2 and len(taken) == 12 and taken[0].shape == (14,)
    times = [request["images"]["cam_high"][:, 0, 0, 0].tolist() for request in sent]
    assert times == [[0], [1, 2, 3, 4], [8]] and sent[1]["prompt"] == "Lift."
    assert sent[1]["images"]["cam_left_wrist"].shape == (4, 3, 24, 32)
    assert sent[1]["state"].tolist() == [4.] * 14


# ---- data/sim_physics_heads -----------------------------------------------------------------------------

@pytest.fixture
def recordings(shared, tmp_path):
    """Two scenes with much motion."""
    def make(root):
        for number, name in enumerate(("ball_collide", "ball_and_block_fall")):
            folder = root / f"test_{name}/env_0/0/0"
            folder.parent.mkdir(parents=True)
            physics_prepare.record((name, folder, 30, 64, [number]))
    return shutil.copytree(shared("recordings", make), tmp_path / "set")


def listed(root):
    """check.py's list, as clips.py reads it."""
    return json.loads(json.dumps(physics_check.find_scenes(root), default=str))


@pytest.mark.parametrize("program,flags", [
    (river_prepare, "--clips 3 --frames 2"), (cosmos_prepare, "--num_videos 2 --num_frames 4"),
    (physics_prepare, "--frames 3 --size 16 --takes 1"), (well_prepare, "--nx 16 --frames 2 --t_cools 1"),
    (robot_prepare, "--episodes 2 --poses 2 --frames 8 --size 48 32")],
    ids=["river", "cosmos", "physics", "well", "robot"])
def test_an_interrupted_simulation_continues(program, flags, tmp_path, monkeypatch, capsys):
    """A function of the seed, whole or absent, never overwritten."""
    command = [*flags.split(), "--data_dir"]
    assert program.main([*command, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", disk_full)
        assert program.main([*command, str(tmp_path / "set")]) == 2 and not (tmp_path / "set").exists()
    assert program.main([*command, str(tmp_path / "set")]) == 0 and not (tmp_path / "set.partial").exists()
    same = lambda folder: {name: data for name, data in files(folder).items()
                           if not name.endswith((".npz", "stats.json"))}
    assert same(tmp_path / "set") == same(tmp_path / "whole")
    assert program.main([*command, str(tmp_path / "set"), "--seed", "1"]) == 2
    assert re.search("set exists.*: remove it", capsys.readouterr().err)


@pytest.mark.parametrize("name,seed", [("ball_collide", 0), ("ball_and_block_fall", 1)])
@pytest.mark.parametrize("stride", [1, 3])
def test_motion_and_depth_are_exact(recordings, name, seed, stride):
    """Against the poses that MuJoCo had `stride` frames before: where each point was, and how far away."""
    rays, project = physics_prepare.camera_rays(64)
    scene, = (scene for scene in listed(recordings) if scene["name"] == f"test_{name}")
    model, data = physics_prepare.build_model(name, np.random.default_rng([seed]))
    motion, valid = physics_clips.read_motion(scene, range(0, 30, stride), stride)
    poses, errors, distances, known = [], [], [], []
    for t in range(30):
        poses.append((data.geom_xpos.copy(), data.geom_xmat.reshape(-1, 3, 3).copy()))
        if t and t % stride == 0:
            depth, geom, _ = physics_prepare.cast(model, data, physics_prepare.EYE, rays)
            hit = np.flatnonzero(geom > 0)
            points = physics_prepare.EYE + depth[hit, None] * rays[hit]
            position, rotation = poses[t - stride]
            local = physics_prepare.body_coordinates(data, geom[hit], points)
            before = position[geom[hit]] + np.einsum("nij,nj->ni", rotation[geom[hit]], local)
            truth, found = project(before) - project(points), motion[t // stride].reshape(2, -1).T[hit]
            known.append(valid[t // stride].ravel()[hit])
            moving = known[-1] & (np.abs(truth).max(1) > .5)
            errors.append(np.linalg.norm(found - truth, axis=1)[moving])
            x, y = np.rint(np.stack([hit % 64, hit // 64]) + found.T).astype(int).clip(0, 63)
            earlier = physics_clips.load_depth(scene, t - stride)[y, x]
            distances.append(np.abs(earlier - np.linalg.norm(before - physics_prepare.EYE, axis=1))[moving])
        physics_prepare.mujoco.mj_step(model, data, nstep=8)
    errors, distances = np.concatenate(errors), np.concatenate(distances)
    assert len(errors) > 200 and errors.mean() < .1 and np.concatenate(known).mean() > .7
    assert np.median(distances) < .03 and distances.mean() < .06


@pytest.mark.parametrize("kind,change,shift,message", [
    ("motion_vectors", lambda a: a, 0, None), ("motion_vectors", lambda a: -a, 0, "multiply by -1"),
    ("motion_vectors", lambda a: a / 32, 0, "their unit is NDC"),
    ("motion_vectors", lambda a: a, 1, "file of step t[+]1"),
    ("motion_vectors", lambda a: a[..., :3], 0, "floats of shape .H, W, 2 or 4."),
    ("distance_to_camera", lambda a: 1000 * a, 0, "millimetres")])
def test_check_names_the_fault(recordings, capsys, kind, change, shift, message):
    for folder in recordings.glob(f"*/env_0/0/0/{kind}"):
        paths = sorted(folder.iterdir())
        arrays = [np.load(path) for path in paths]
        for i, path in enumerate(paths):
            array = arrays[max(i - shift, 0)]
            np.save(path, change(array) if array.size else array)
    assert physics_check.main([str(recordings)]) == (2 if message else 0)
    printed = capsys.readouterr().err
    assert re.search(message, printed) if message else not printed


def test_table_of_scenes(recordings):
    """Columns by name in any case, commas without quotes; an error for Excel's UTF-16."""
    table, text = recordings / "metadata.csv", "n,VIDEO,Caption\n1,test_ball_collide/env_0/0/0,a, b\n"
    table.write_text(text)
    assert [scene["prompt"] for scene in physics_check.find_scenes(recordings)] == ["a, b"]
    table.write_text(text + '2,test_ball_collide/env_0/0/0,"c\n')
    one_line(lambda path: physics_check.find_scenes(recordings), table, "is not a CSV table")
    table.write_text(text, encoding="utf-16")
    one_line(lambda path: physics_check.find_scenes(recordings), table, "UTF-16", "save it as UTF-8")


def test_clips_are_cut_from_files_of_equal_steps(recordings):
    shutil.rmtree(recordings / "test_ball_collide")
    folder = recordings / "test_ball_and_block_fall/env_0/0/0"
    read = lambda size, **more: physics_clips.read_clip(*listed(recordings), 2, 2, 4, size, **more)
    full, half, wide = read((64, 64)), read((32, 32)), read((32, 64))              # wide: the middle rows
    assert full["motion"].abs().max() > 1 and not full["motion_valid"][0].any()
    assert torch.equal(half["motion"] * 2, full["motion"][..., 1::2, 1::2])
    assert torch.equal(half["depth"], full["depth"][..., 1::2, 1::2])
    assert all(torch.equal(wide[name], full[name][..., 16:48, :]) for name in full)
    mirrored = read((64, 64), mirror=True)["motion"]
    assert torch.equal(mirrored, full["motion"].flip(-1) * torch.tensor([-1., 1]).view(2, 1, 1))
    # An empty or a missing file breaks only the chains through it.
    np.save(folder / "motion_vectors/step_0005.npy", np.zeros((0, 4), np.float32))
    (folder / "rgb/step_0008.png").unlink()
    physics_clips.load.cache_clear()
    valid = physics_clips.read_motion(*listed(recordings), range(11), 1)[1].any((1, 2))
    assert valid.tolist() == [i not in (0, 5, 8) for i in range(11)]
    np.save(folder / "bad.npy", np.zeros((9, 9, 4), np.float32))
    one_line(lambda path: physics_check.load(path, "motion", (64, 64)), folder / "bad.npy", "9 x 9, the")


def test_split_and_clips():
    """Scenes are held out whole; clips stay within them; training's may be mirrored or recoloured."""
    scenes = [{"name": f"{i:02d}", "steps": list(range(9 + 3 * i))} for i in range(21)]
    args = Namespace(frames=9, strides="3,1", clips=40, eval_clips=5, permute_colours=1)
    clips = physics_clips.choose_clips(scenes, args)
    splits = [{name[-2:] for name in clips if name.startswith(split)} for split in ("train", "val", "test")]
    assert list(map(len, splits)) == [15, 3, 3] and len(set.union(*splits)) == 21
    for name, (scene, start, stride, mirror, colours) in clips.items():
        assert 0 <= start and start + 8 * stride < len(scene["steps"]) and sorted(colours) == [0, 1, 2]
        assert name.startswith("train") or not mirror and colours == [0, 1, 2]


# ---- well_i2v.py ----------------------------------------------------------------------------------------

NAMES = ["density", "pressure", "velocity_x", "velocity_y"]
WELL_WAN = {**well.TINY, "vae": {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_dim": 16,
                                 "temperal_downsample": [False, True, True]}}


def well_args(*flags):
    return well.parse_args(["--preset", "tiny", "--lora_rank", "4", "--frame_repeat", "1", *flags])[0]


def well_fields(B=2, T=9, C=4, seed=0):
    """Smooth fields B T C 16 32 with a contrast of 100 in the first, as in the radiative layer."""
    coarse = torch.randn(B * T, C, 4, 6, generator=torch.Generator().manual_seed(seed))
    x = F.interpolate(coarse, (16, 32), mode="bicubic").unflatten(0, (B, T))
    x[:, :, 0] = 1 + 99 * torch.sigmoid(3 * x[:, :, 0])
    x[:, :, 1:2] = 1 + .05 * x[:, :, 1:2]
    return x


def well_adapter(C=4, panel=(16, 32), repeat=1):
    adapter = well.TileAdapter((NAMES + ["e", "f", "g"])[:C], (16, 32), panel, repeat)
    adapter.fit(well_fields(C=C))
    return adapter


def well_vae():
    return tiny_wan("vae", WELL_WAN).requires_grad_(False)


ONE_STEP = "--adapter_steps 1 --base_steps 1 --max_steps 2 --decoder_steps 0 --eval_every 0"


def well_native(args):
    """A Forecaster with two random experts whose LoRA is not zero."""
    experts = {side: well.load_expert(args, side, "cpu") for side in well.TRANSFORMERS}
    torch.manual_seed(3)
    for expert in experts.values():
        for name, p in expert.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=.05)
    return well.Forecaster(args, well_adapter(), well_vae(), experts)


def overfit_well():
    expert = well.load_expert(well_args(), "base", "cpu")
    z, noise = torch.randn(2, 4, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    cond, text = F.pad(z, (0, 0, 0, 0, 0, 0, 0, 4)), torch.randn(4, 8, 32)
    sigma = torch.tensor([.2, .4, .6, .8])
    return minimize(lambda: expert(z, cond, text, sigma, noise)[0], expert.parameters(), 5e-3, 120)


@pytest.mark.parametrize("C, repeat", [(1, 1), (3, 4), (4, 1), (7, 4)])
def test_well_tiles_give_every_field_back(C, repeat, monkeypatch):
    x, adapter = well_fields(C=C), well_adapter(C=C, repeat=repeat)
    video = adapter.to_video(x)
    assert video.shape == (2, 1 + 8 * repeat, 3, -(-C // 3) * 16, 32) and video.abs().max() < 1.5
    assert tuple(adapter.video_size) == tuple(video.shape[-2:])
    if repeat == 4:                              # of repeated frames the mean counts
        video[:, 1::4] += .5
        video[:, 2::4] -= .5
    back = adapter.map.inverse(adapter.to_mapped(video), x[:, :1])
    error = (back - x).flatten(3).abs().amax((0, 1, 3)) / x.flatten(3).std(dim=(0, 1, 3))
    assert error.max() < 2e-5
    monkeypatch.setattr(common, "wan_decode", lambda vae, z: z)
    model = well.Forecaster(well_args(), adapter, None, {})
    assert torch.equal(model.decode(video), adapter.to_mapped(video)[:, 1:])


def test_well_maps_are_relative_to_the_given_frame():
    """A window 100 times fainter gives the same video, up to what a flat frame counts as."""
    adapter, x = well_adapter(), well_fields()
    mean = x[:, :1].mean((-2, -1), keepdim=True)
    loud, louder = mean + 50 * (x - mean), mean + 5000 * (x - mean)
    assert torch.allclose(adapter.to_video(loud), adapter.to_video(louder), atol=2e-3)
    flat = mean.expand_as(x)
    assert torch.allclose(adapter.map.inverse(adapter.map(flat, flat[:, :1]), flat[:, :1]), flat, rtol=1e-5)


def test_well_learned_adapter_starts_as_least_squares_and_all_of_it_learns():
    """Four fields of which the fourth is a sum of others fit into three channels, also enlarged."""
    x = well_fields()
    x[:, :, 3] = x[:, :, 2]
    for panel in ((16, 32), (32, 64)):
        adapter = well.LearnedAdapter(NAMES, (16, 32), panel, 1, 8)
        adapter.fit(x)
        video, target = adapter.to_video(x), adapter.map(x, x[:, :1])
        assert video.shape[-2:] == panel and video.abs().max() < 1.6
        error = adapter.map.error(adapter.to_mapped(video), target).item()
        assert error < (1e-8 if panel == (16, 32) else 1e-3)
    loss, terms = adapter(x[:1, :5], well_vae())
    expected = .5 * terms["recon_loss"] + .1 * terms["cycle_loss"] + terms["range_loss"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, p in adapter.named_parameters():
        if ".0." not in name:                    # before a layer of zeros nothing arrives at first
            assert p.grad.abs().max() > 0, name


def test_well_vrmse_is_the_wells():
    """In space alone, with the unbiased variance: The Well's formula in numpy, and its closed forms."""
    x, y = well_fields(), well_fields(seed=1)
    a, b = x.numpy().astype(np.float64), y.numpy().astype(np.float64)
    expected = np.sqrt(((a - b) ** 2).mean((-2, -1)) / (b.std((-2, -1), ddof=1) ** 2 + 1e-7))
    assert np.allclose(well.vrmse(x, y), expected, rtol=1e-5)
    assert (well.vrmse(y, y) == 0).all()
    mean = y.mean((-2, -1), keepdim=True).expand_as(y)
    assert well.vrmse(mean, y)[:, :, 0] == pytest.approx(np.sqrt(511 / 512), abs=1e-5)
    steps = torch.arange(1., 31).view(1, 30, 1) + torch.tensor([-1., 0, 0, 1])     # step k has about k
    scores = well.summarize(steps[:, :8], steps, NAMES)
    names = "one_step", "one_step_velocity_y", "all_steps", "rollout_6:12", "rollout_13:30"
    assert [scores[name] for name in names] == [1, 2, 4.5, 9, 21.5]


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_well_condition_is_the_pipelines_to_the_bit(frames):
    vae, first = well_vae(), torch.rand(1, 3, 16, 32) * 2 - 1
    pipe = pipeline(well.load_part(well_args(), "transformer", "cpu"), None, vae)
    _, theirs = pipe.prepare_latents(first, 1, 16, 16, 32, frames, torch.float32, "cpu")
    assert torch.equal(well.condition(vae, first, frames), theirs)


@pytest.mark.parametrize("steps", [1, 6])
def test_well_sampling_and_exports_are_the_pipelines(steps, tmp_path):
    """The same latents from diffusers' pipeline, also with the exported LoRA files of both experts in it."""
    args = well_args("--num_inference_steps", f"{steps}", "--shift", "3", "--offload")
    model = well_native(args)
    text, first = torch.randn(1, 8, 32), torch.rand(1, 3, 16, 32) * 2 - 1
    cond, noise = well.condition(model.vae, first, 9), torch.randn(1, 16, 3, 2, 4)
    ours = model.sample_latents(cond, noise, text)
    for side in ("high", "low"):
        common.save_lora(tmp_path / side, model.networks[side].transformer)
        model.networks[side].transformer.disable_adapters()
    base = model.sample_latents(cond, noise, text)
    pipe = pipeline(*(well.load_part(args, "transformer", "cpu", side) for side in ("high", "low")),
                    model.vae, 3.)

    def theirs():
        z = pipe(image=first, prompt_embeds=text, negative_prompt_embeds=text, height=16, width=32,
                 num_frames=9, num_inference_steps=steps, guidance_scale=1., latents=noise,
                 output_type="latent").frames
        return torch.cat([cond[:, 4:, :1], z[:, :, 1:]], dim=2)    # ours has the given frame's own latents

    assert torch.allclose(theirs(), base, atol=1e-5) and not torch.allclose(base, ours, atol=1e-3)
    pipe.load_lora_weights(tmp_path / "high")
    pipe.load_lora_weights(tmp_path / "low", load_into_transformer_2=True)
    assert torch.allclose(theirs(), ours, atol=1e-5)


def test_well_diffusion_target_is_the_velocity():
    """eps - z has no loss, its negative four times its own square, eps alone that of z."""
    z, noise = torch.randn(2, 2, 16, 3, 4, 4)
    cond, sigma, calls = torch.randn(2, 20, 3, 4, 4), torch.tensor([.3, .95]), []

    def loss_of(answer):
        def oracle(x, t, text, return_dict):
            calls.append((x, t))
            return (answer,)
        oracle.patch_embedding = nn.Linear(1, 1)
        return well.Expert(oracle)(z, cond, torch.zeros(2, 8, 32), sigma, noise)[0]

    velocity = noise - z
    for answer, loss in ((velocity, 0 * z), (-velocity, 4 * velocity ** 2), (noise, z ** 2)):
        assert torch.allclose(loss_of(answer), loss.mean())
    share = sigma.view(2, 1, 1, 1, 1)
    assert torch.allclose(calls[0][0], torch.cat([(1 - share) * z + share * noise, cond], dim=1), atol=1e-6)
    assert torch.equal(calls[0][1], 1000 * sigma)


def test_well_noise_levels():
    u = torch.arange(1000) / 1000
    for shift, share in ((1., .1), (3., .25), (5., 5 / 14)):
        assert well.high_share(shift) == pytest.approx(share)
        assert well.draw_sigma(u, "high", shift).min() >= .9 - 1e-6
        assert well.draw_sigma(u, "low", shift).max() <= .9 + 1e-6
        assert (well.draw_sigma(u, "base", shift) >= .9).float().mean() == pytest.approx(share, abs=.002)
    plan = well.stage_plan(well_args("--shift", "5", "--max_steps", "1400"))
    assert [steps for stage, _, steps, _ in plan if stage in well.TRANSFORMERS] == [500, 900]


def test_well_real_shape_has_the_papers_counts():
    args = well.parse_args(["--preset", "i2v_a14b", "--random_init", "--output_dir", "none"])[0]
    with torch.device("meta"):
        expert = well.load_expert(args, "high", "meta")
        assert expert.transformer.blocks[0].attn1.to_q.scaling == {"default": 1}       # alpha is the rank
        total, trained = common.count_params(expert), common.count_params(expert, True)
        assert trained == 104_857_600 and total - trained == 14_288_901_184
        net = well.ConvLSTM()
    assert common.count_params(net) == 645_777


def test_well_convlstm_losses():
    """True latents have no latent loss, and as physics loss what the codec loses; others 2 x the error."""
    x, adapter, net = well_fields(T=13), well_adapter(), well.ConvLSTM()
    codec = common.LinearCodec.fit(adapter.to_video(well_fields(4)), 16)
    z = common.wan_encode(codec, adapter.to_video(x))
    assert torch.equal(net.extend(z, 2)[:, :, :2], z[:, :, :2]) and net.extend(z, 2).shape == z.shape
    other = torch.cat([z[:, :, :1] + 1, z[:, :, 1:]], dim=2)       # its state remembers the first frame
    assert not torch.allclose(net.extend(other, 2)[:, :, 2], net.extend(z, 2)[:, :, 2], atol=1e-5)
    for off in (0., .5):
        forecast = torch.cat([z[:, :, :2], z[:, :, 2:] + off], dim=2)
        net.extend = lambda z, given: forecast
        loss, terms = net(x, adapter, codec, 2)
        y = adapter.to_mapped(common.wan_decode(codec, forecast))
        assert torch.allclose(terms["latent_loss"], torch.tensor(off ** 2), atol=1e-6)
        torch.testing.assert_close(loss - 2 * terms["latent_loss"],
                                   adapter.map.error(y, adapter.map(x, x[:, :1])))


def test_well_decoder_starts_as_a_mean_and_respects_the_symmetry():
    """Rolled along a periodic axis, in steps of its patches, it gives the rolled result; each frame follows
    the repaired one before. In training it is given what predict() gives it, at the same lead."""
    net = well.Decoder(4, 8, (True, False), contextlib.nullcontext)
    y, before, lead = torch.randn(2, 4, 16, 32), torch.randn(2, 4, 16, 32), torch.tensor([5, 5])
    assert torch.allclose(net.repair(y, before, lead), (y + before) / 2, atol=1e-6)    # sigmoid(0)
    assert torch.equal(net.repair(None, before, lead), before)
    nn.init.normal_(net.last.weight, std=.1)
    once, rolled = net.repair(y, before, lead), net.repair(y.roll(8, -2), before.roll(8, -2), lead)
    torch.testing.assert_close(rolled, once.roll(8, -2), rtol=1e-4, atol=1e-4)
    twice = net.repair(before, once, lead + 1)
    args, adapter, x, calls = well_args(), well_adapter(), well_fields(), []
    targets = torch.stack([once, twice], dim=1)
    assert net(torch.stack([y, before], dim=1), before, lead, targets, adapter.map)[0] < 2e-3
    mapped = adapter.map(x, x[:, :1])            # a forecast that is the truth
    net.repair = lambda *inputs: calls.append(inputs) or inputs[0]
    model = well.Forecaster(args, adapter, None, {"decoder": net})
    model.encode, model.decode = lambda fields: (fields, None), lambda z: mapped[:, 1:]
    model.sample_latents = lambda cond, noise, text: noise
    torch.testing.assert_close(model.predict(x[:, :1], None, [(0,), (1,)]), x[:, 1:], rtol=1e-4, atol=1e-4)
    before, leads = (torch.stack(values, dim=1) for values in list(zip(*calls))[1:])
    assert torch.allclose(before, mapped[:, :8], atol=1e-5) and torch.equal(leads[0], torch.arange(1, 9))
    split = Namespace(fields=lambda numbers, shifts: x.roll(shifts, -1),
                      roll=lambda windows, shifts: windows.roll(shifts, -1))
    stage = Namespace(args=args, run=CPU, name="decoder", model=model, context=(),
                      forecast=lambda split, number: mapped[number, 1:])
    batch = well.Stage.inputs(stage, split, [0, 1], {"u": torch.tensor([0., .99])}, 5)
    for i, first in enumerate((1, 6)):
        frames = mapped.roll(5, -1)[i, first - 1:first + 3]
        torch.testing.assert_close([value[i] for value in batch],
                                   [frames[1:], frames[0], torch.tensor(first), frames[1:]])


def test_well_rollout_feeds_back_the_last_frames(monkeypatch):
    """Fields that grow steadily, each trajectory at its own rate, which the text tells: the error of each
    method is known. One member is ahead and one behind by a step after each call."""
    growth, on, calls = torch.rand(4, 16, 32), [True], []

    def frames(file, trajectory, first, length):
        return (1 + trajectory) * torch.arange(first, first + length).view(-1, 1, 1, 1) * growth

    def predict(history, text, seeds):
        calls.extend(seeds)
        off = torch.tensor([1 - 2 * member + 3 * (not on[-1]) for *_, member, call in seeds])
        steps = (torch.arange(1, 9) + off[:, None]) * text[:, None]
        return history[:, -1:] + common.expand_to(steps, history) * growth

    monkeypatch.setattr(well, "read_window", frames)
    dit = Namespace(disable_adapters=lambda: on.append(False), enable_adapters=lambda: on.append(True))
    model = Namespace(predict=predict, networks=dict.fromkeys(well.TRANSFORMERS, Namespace(transformer=dit)))
    test = Namespace(files=[None], text=lambda starts, device: torch.tensor([1 + k for _, k, _ in starts]))
    starts = [(0, 0, 4), (0, 1, 5), (0, 2, 7)]
    tables = well.forecast_scores(well_args("--members", "2"), CPU, model, test, starts, 12)
    steps, call = torch.arange(1, 13), torch.tensor([1] * 8 + [2] * 4)
    truth = torch.stack([frames(*start, 12) for start in starts])
    for name, off in {"model": 0 * steps, "linear extrapolation": 0 * steps, "persistence": -steps,
                      "single sample": call, "base without LoRA": 3 * call}.items():
        error = common.expand_to(torch.tensor([1, 2, 3])[:, None] * off, truth) * growth
        torch.testing.assert_close(tables[name], well.vrmse(truth + error, truth), rtol=1e-3, atol=1e-3)
    assert len(set(calls)) == 3 * 2 * 2          # each window, member and call draws its own noise


@pytest.mark.parametrize("flags", ["--mode convlstm --n_in 5", "--mode adapter", "--mode unet --adapter tile",
                                   "--adapter tile --decoder_steps 0 --offload --max_steps 2"])
def test_well_other_modes_run(flags, trained, tmp_path):
    data = trained("well_i2v").data
    assert launch("well_i2v", f"--data_dir {data} --output_dir {tmp_path}/run {flags}", full=True) == 0
    report = json.loads((tmp_path / "run/eval.json").read_text())
    assert np.isfinite(report["headline"]["value"]) and "reconstruction" in report["baselines"]


def test_well_python_interface(trained, pair, tmp_path):
    """Forecasts; evaluation by two processes; final/high and final/low in diffusers' pipeline."""
    base = trained("well_i2v")
    model = well.load_model(base.run)
    history = reader.Windows(well_args("--data_dir", str(base.data)), "test").fields([3])[0, :1]
    forecast = well.predict_fields(model, history, "simulated radiative layer, tcool 0.1")
    assert forecast.shape == (8, 4, 16, 48) and forecast.isfinite().all()
    run = tmp_path / "run"
    pair("well_i2v", f"{base.inputs} --resume {base.run} --output_dir {run} --eval", full=True)
    for part in ("results", "baselines", "clips"):
        one, two = (json.loads((folder / "eval.json").read_text())[part] for folder in (base.run, run))
        assert_same(flat(one), flat(two), 1e-4)
    weights = common.find_checkpoint(base.run / "base/ckpt", "well_i2v", "auto").state["ema"]
    pipe = pipeline(*(common.load_for_inference(well.load_expert(well_args(), "base", "cpu"), weights,
                                                "base").transformer for _ in ("high", "low")))
    plain = velocity(pipe.transformer)
    pipe.load_lora_weights(base.run / "final/high")
    pipe.load_lora_weights(base.run / "final/low", load_into_transformer_2=True)
    for side, dit in (("high", pipe.transformer), ("low", pipe.transformer_2)):
        assert not torch.allclose(velocity(dit), plain)
        assert torch.allclose(velocity(dit), velocity(model.networks[side].transformer), atol=1e-5)


# ---- well_i2v.py: data ----

@pytest.mark.parametrize("axis", (2, 3))
def test_well_sound_wave(axis):
    """It returns to where it was after one period, with an error that falls faster than the size of cells."""
    errors = []
    for n in (32, 64):
        x = 2 * math.pi * (torch.arange(n, dtype=torch.float64) + .5) / n
        wave, c = 1e-3 * torch.sin(x), math.sqrt(5 / 3)
        W = torch.stack([1 + wave, c * wave, 0 * wave, 1 + 5 / 3 * wave])[:, None, :, None]
        W = W.expand(-1, 1, -1, 4)
        W = W if axis == 2 else W[[0, 2, 1, 3]].mT         # u and v exchange their places
        U, sides = well_prepare.to_conserved(W), ("periodic", "periodic")
        after = well_prepare.solve(U, 1 / n, 1 / c, 2, boundaries=sides)[0, -1]
        errors.append((after - W[:, 0]).abs().max().item() / 1e-3)
    assert errors[1] < .02 and errors[1] < .45 * errors[0]


def test_well_conservation_in_a_periodic_box():
    """Mass, momentum and energy stay; a state moved across the boundary gives the moved result."""
    W = torch.rand(4, 1, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + .5
    after, moved = (well_prepare.solve(well_prepare.to_conserved(state), 1 / 16, .5, 2, boundaries=(
        "periodic", "periodic"))[0, -1] for state in (W, W.roll((5, 7), (2, 3))))
    assert (after - W[:, 0]).abs().max() > .05
    torch.testing.assert_close(well_prepare.to_conserved(after[:, None]).sum((1, 2, 3)),
                               well_prepare.to_conserved(W).sum((1, 2, 3)), rtol=0, atol=1e-10)
    torch.testing.assert_close(moved, after.roll((5, 7), (1, 2)))


def test_well_cooling_is_the_exact_exponential():
    T = torch.tensor([.1, .1 * math.exp(.3), .005, .0101, .985, .0103], dtype=torch.float64)
    W = torch.stack([torch.full_like(T, 2.), .1 + 0 * T, 0 * T, 2 * T]).view(4, 1, 6, 1)
    U = well_prepare.to_conserved(W)
    well_prepare.cool(U, .05, torch.tensor(.1, dtype=torch.float64).view(1, 1, 1))
    got = well_prepare.to_primitive(U)
    after = (got[3] / got[0]).flatten()
    assert after[0].item() == pytest.approx(.1 * math.exp(-.5), rel=1e-12)
    assert after[1].item() == pytest.approx(T[1].item() * math.exp(-.5 * math.exp(-.5)), rel=1e-12)
    torch.testing.assert_close(after[2:5], T[2:5])                                # both phases keep theirs
    assert well_prepare.T_COLD <= after[5].item() < .0103 and torch.allclose(got[:3], W[:3])


def write_well(path, scalars, steps):
    """A file of another set, of 3 trajectories -> its arrays. Field a varies in all, b in time and along x, k
    along x; D is a tensor. scalars: (name, shape, whether it varies in time)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, arrays = np.random.default_rng(0), {}
    fields = {"t0_fields/a": ((3, steps, 16, 32), True, True, (True, True)),
              "t0_fields/k": ((16,), False, False, (True, False)),
              "t1_fields/b": ((steps, 16, 2), False, True, (True, False)),
              "t2_fields/D": ((3, steps, 16, 32, 2, 2), True, True, (True, True))}
    with h5py.File(path, "w") as f:
        f.attrs.update({"n_trajectories": 3, "dataset_name": b"some_set"})
        for name, n in (("time", steps), ("x", 16), ("y", 32)):
            f[f"dimensions/{name}"] = np.arange(float(n))
        f["dimensions"].attrs["spatial_dims"] = ["x", "y"]
        for axis, kind in (("x", "WALL"), ("y", "PERIODIC")):
            f.create_group(f"boundary_conditions/{axis}").attrs.update(associated_dims=[axis], bc_type=kind)
        f.create_group("scalars").attrs["field_names"] = [name for name, *_ in scalars]
        for name, shape, time in scalars:
            arrays[name] = f[f"scalars/{name}"] = rng.random(shape)
            f[f"scalars/{name}"].attrs["time_varying"] = time
        for order, names in enumerate(("ak", "b", "D")):
            f.create_group(f"t{order}_fields").attrs["field_names"] = list(names)
        for name, (shape, sample, time, axes) in fields.items():
            arrays[name[-1]] = f[name] = rng.random(shape, np.float32)
            f[name].attrs.update(sample_varying=sample, time_varying=time, dim_varying=axes)
    return arrays


def test_well_other_2d_sets(tmp_path):
    """Fields of all orders; files of unequal lengths and scalars, which prompts name; periodic axes roll."""
    scalars = ("nu", (), False), ("Re", (3,), False), ("drive", (20,), True)
    arrays = write_well(tmp_path / "data/train/a.hdf5", scalars, steps=20)
    write_well(tmp_path / "data/train/c.hdf5", (), steps=9)
    windows = reader.Windows(well_args("--data_dir", str(tmp_path)), "train")
    file = windows.files[0]
    assert file.names == ["a", "b_x", "b_y", "D_xx", "D_xy", "D_yx", "D_yy"] and len(file.left_out) == 2
    assert (file.grid, file.periodic, file.dataset) == ((16, 32), (False, True), "some_set")
    assert file.scalars == {"nu": [arrays["nu"]] * 3, "Re": arrays["Re"].tolist()}
    window = reader.read_window(file, 2, 1, 3).numpy()
    assert window.shape == (3, 7, 16, 32) and np.array_equal(window[:, 0], arrays["a"][2, 1:4])
    assert np.array_equal(window[:, 4], arrays["D"][2, 1:4, ..., 0, 1])
    assert np.array_equal(window[1, 2, :, 7], arrays["b"][2, :, 1])
    assert len(windows.rows) == 3 * 12 + 3 and max(start for *_, start in windows.rows) == 11
    assert windows.prompt(0, 1) == f"some set, nu {arrays['nu']:g}, Re {arrays['Re'][1]:g}"
    assert windows.prompt(1, 0) == "some set"
    assert [i for i, *_ in reader.list_windows(windows.files, 9, 4)] == [0, 0, 1, 1]
    rolled = windows.fields([0], torch.tensor([.25]))
    assert torch.equal(rolled, windows.fields([0]).roll(int(.25 * 7919 % 1 * 32), -1))       # y is periodic
    windows.texts = {windows.prompt(i, k): torch.full((1, 2), 10. * i + k) for i in (0, 1) for k in range(3)}
    assert windows.text([(0, 2, 5), (1, 1, 0)], "cpu")[:, 0, 0].tolist() == [2, 12]


def test_well_own_fields(tmp_path):
    """write_well_file: what README shows. Two fields on 32 x 32 train, are evaluated and sampled."""
    rng = np.random.default_rng(0)
    for split in reader.SPLITS:
        u = np.cumsum(rng.random((12, 32, 32)), axis=0)
        well_prepare.write_well_file(tmp_path / f"data/{split}/run.hdf5", {"u": u, "h": u ** 2},
                                     ("PERIODIC", "PERIODIC"), {"nu": .1}, dataset="my_set")
    with pytest.raises(ValueError, match="boundaries must be two of PERIODIC, OPEN, WALL"):
        well_prepare.write_well_file(tmp_path / "other/run.hdf5", {"u": u}, ("OPEN", "SLIP"))
    assert not (tmp_path / "other").exists()
    flags = f"--data_dir {tmp_path} --output_dir {tmp_path}/run --adapter tile --rollout_frames 0 {ONE_STEP}"
    assert launch("well_i2v", flags, full=True) == 0
    results = json.loads((tmp_path / "run/eval.json").read_text())["results"]
    assert np.isfinite(results["one_step_u"]) and np.isfinite(results["one_step_h"])


def test_well_trains_one_expert_at_a_time(trained, tmp_path, monkeypatch):
    """The expert of a stage is freed before the next one is loaded, without waiting for the collector."""
    experts, alive, load_expert = [], [], well.load_expert

    def load_and_count(*arguments):
        alive.append(sum(expert() is not None for expert in experts))
        experts.append(weakref.ref(expert := load_expert(*arguments)))
        return expert

    monkeypatch.setattr(well, "load_expert", load_and_count)
    gc.disable()
    try:
        assert launch("well_i2v", f"{trained('well_i2v').inputs} --output_dir {tmp_path}/run {ONE_STEP}") == 0
    finally:
        gc.enable()
    assert alive[:3] == [0, 0, 0]                          # stages base, high and low


def test_well_simulated_files_suit_the_wells_reader(trained):
    """What the_well 1.2's WellDataset takes from a file: names, attributes, axes."""
    with h5py.File(next(trained("well_i2v").data.rglob("train/*.hdf5"))) as file:
        assert (file.attrs["grid_type"], file.attrs["n_spatial_dims"]) == ("cartesian", 2)
        assert [len(file["dimensions"][name]) for name in ("time", "x", "y")] == [16, 16, 48]
        assert list(file["scalars"].attrs["field_names"]) == ["tcool"] and file["scalars/tcool"].shape == ()
        for order, names in enumerate((["density", "pressure"], ["velocity"], [])):
            assert list(file[f"t{order}_fields"].attrs["field_names"]) == names
            for field in (file[f"t{order}_fields"][name] for name in names):
                assert field.shape == (1, 16, 16, 48, *[2] * order) and field.dtype == np.float32
                assert field.attrs["sample_varying"] and field.attrs["time_varying"]
        edges = {(*bc.attrs["associated_dims"], bc.attrs["bc_type"], bc["mask"][()].sum())
                 for bc in file["boundary_conditions"].values()}
        assert edges == {("x", "PERIODIC", 2), ("y", "OPEN", 2)}
    args = well_args("--data_dir", str(trained("well_i2v").data))
    first, *others = (reader.Windows(args, split).fields([0])[0, 0] for split in reader.SPLITS)
    density, pressure, u, v = first
    assert torch.allclose(pressure, torch.ones(())) and density[:, 0].min() > 99 > 2 > density[:, -1].max()
    assert torch.allclose(u[:, -1], torch.tensor(.05), atol=.001) and (v[:, -1] < 0).all()
    assert not any(torch.equal(first, other) for other in others)


def test_well_download(tmp_path, capsys):
    """HF_HUB_OFFLINE: there is no network."""
    assert well_prepare.main(["--download", "--data_dir", str(tmp_path)]) == 2
    address = "https://huggingface.co/datasets/polymathic-ai/turbulent_radiative_layer_2D"
    assert f"cannot download {address}" in the_error(capsys, "prepare")


# ---- vidar.py -------------------------------------------------------------------------------------------

CPU = Namespace(rank=0, world=1, device=torch.device("cpu"), autocast=contextlib.nullcontext)


def vidar_model(flags="", noise=.2):
    args = vidar_args(flags)
    return randomized(vidar.VideoModel(vidar.load_transformer(args, "cpu"), args), noise)


def vidar_clip(B=2):
    """A batch as of vidar.collate, noise and noise levels."""
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, B, vidar.TINY["transformer"]["in_channels"], 3, 6, 4, generator=g)
    batch = {"latents": z, "valid": torch.ones(B, 3, dtype=torch.bool), "arm": torch.zeros(B, 1, 3, 6, 4),
             "text": torch.randn(B, 16, 32, generator=g)}
    return batch, noise, torch.rand(B, generator=g)


def overfit(model, inputs):
    return minimize(lambda: model(*inputs)[0], model.parameters(), 1e-2, 80)


def test_vidar_loss():
    """The first latent frame and padding have none; Eq. 7's weight is inside the norm: 16 with eta 3."""
    model, (batch, noise, sigma) = vidar_model("--eta 0"), vidar_clip()
    x, levels = vidar.add_noise(batch["latents"], noise, sigma)
    assert torch.equal(x[:, :, 0], batch["latents"][:, :, 0]) and not levels[:, 0].any()
    assert torch.equal(levels[:, 1:], sigma[:, None].expand(-1, 2))
    loss, _ = model(batch, noise, sigma)
    tokens = (1000 * levels).repeat_interleave(6, 1)               # a timestep per token, as in diffusers
    v, target = model.dit(x, tokens, batch["text"]).sample, noise - batch["latents"]
    assert torch.allclose(loss, F.mse_loss(v[:, :, 1:], target[:, :, 1:]))
    other = noise.clone()
    other[:, :, 0] = 9
    assert torch.equal(model(batch, other, sigma)[0], loss)
    batch["arm"][:, :, :2] = 1
    errors = (v - target).square().mean((0, 1, 3, 4))
    model.eta = 3.
    weighted, terms = model(batch, noise, sigma)
    assert torch.allclose(weighted, (16 * errors[1] + errors[2]) / 2) and terms["flow_loss"] == loss
    batch["valid"][:, 2] = False
    padded, terms = model(batch, noise, sigma)
    assert torch.allclose(padded, 16 * errors[1]) and torch.allclose(terms["flow_loss"], errors[1])
    batch["valid"][:] = False
    assert model(batch, noise, sigma)[0] == 0


def test_vidar_oracle_velocity_leads_to_the_data(monkeypatch):
    """With v = eps - z UniPC ends at z. Timesteps are the scheduler's integers on the official grid, guidance
    compares with the empty prompt, and with the opposite sign the sampler does not arrive."""
    args = vidar_args("--num_inference_steps 6 --guidance_scale 3 --sample_shift 5")
    batch, calls = vidar_clip(1)[0], []
    z, text = batch["latents"], batch["text"]

    def sample(sign):
        def oracle(dit, x, t, text):
            calls.append((x.clone(), t.clone(), text))
            return sign * (x - z) / (t / 1000).clamp(min=1e-9)[:, None, :, None, None]
        monkeypatch.setattr(vidar, "run_backbone", oracle)
        return vidar.generate(None, z[:, :, :1], text, torch.zeros_like(text), args, 5)

    assert not torch.allclose(sample(-1), z, atol=.5)
    calls.clear()
    assert torch.allclose(sample(1), z, atol=.02)
    assert all(torch.equal(x[:, :, 0], z[:, :, 0]) for x, *_ in calls)
    u = torch.linspace(.999, 0, 7)[:-1].repeat_interleave(2)         # text and empty prompt by turns
    timesteps = torch.stack([t[0] for _, t, _ in calls])
    assert not timesteps[:, 0].any() and torch.equal(timesteps[:, 1], timesteps[:, 1].floor())
    assert torch.allclose(timesteps[:, 1], 1000 * vidar.shift_sigma(u, 5), atol=1)
    assert calls[0][2].any() and not calls[1][2].any()


def test_vidar_weights_keep_official_names(tmp_path):
    """vidar.pt has official names and loads strictly, as does the file in diffusers' names."""
    model, stem = vidar_model(), tmp_path / "final/vidar"
    vidar.save_transformer(vidar_args(), CPU, stem, model)
    weights = torch.load(f"{stem}.pt", weights_only=True)
    assert_same(weights, official_transformer(model.dit.state_dict()))
    torch.save({"model": {f"module.{name}": value for name, value in weights.items()}}, f"{stem}_trainer.pt")
    for file in (f"{stem}.pt", f"{stem}.safetensors", f"{stem}_trainer.pt"):
        loaded = vidar.load_transformer(vidar_args(f"--vidar {file}"), "cpu")
        assert_same(loaded.state_dict(), model.dit.state_dict())
    del weights["head.head.bias"]
    torch.save(weights, f"{stem}.pt")
    with pytest.raises(common.UserError, match="proj_out.bias"):
        vidar.check_weights(vidar_args(f"--vidar {stem}.pt"))


def test_vidar_idm_has_upstreams_names_and_shapes():
    """Some of the 456 tensors of idm.pt."""
    with torch.device("meta"):
        model = vidar.IDM(vidar.IDM_FULL)
        actions, mask = model(torch.rand(2, 3, 736, 640))
    shapes = {name.removeprefix("model."): tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes.items() >= {
        "train_mean": (14,), "mask_model.in_conv.4.running_var": (64,), "resnet_model.fc.weight": (14, 2048),
        "mask_model.ups.3.conv.3.weight": (64, 128, 3, 3), "mask_model.out.weight": (1, 64, 1, 1),
        "resnet_model.conv2_x.0.shortcut.0.weight": (256, 64, 1, 1)}.items()
    assert len(shapes) == 456 and common.count_params(model) == 92_713_423
    assert actions.shape == (2, 14) and mask.shape == (2, 1, 518, 518)


def small_idm(bias, size=(112, 96)):
    """With a mask that is open for bias 1, closed for -1."""
    model = vidar.IDM({**vidar.IDM_TINY, "size": size}).eval()
    nn.init.constant_(model.model["resnet_model"].conv1[1].bias, .1)         # else all of black is 0
    nn.init.zeros_(model.model["mask_model"].out.weight)
    nn.init.constant_(model.model["mask_model"].out.bias, bias)
    return model


def test_vidar_idm_sees_only_what_its_mask_lets_through():
    """A closed mask hides the picture, an open one changes nothing; both let gradients through."""
    a, b = torch.rand(2, 2, 3, 112, 96)
    closed, opened = small_idm(-1.), small_idm(1.)
    assert torch.equal(closed(a)[0], closed(b)[0]) and torch.equal(closed(a)[0][0], closed(a)[0][1])
    torch.testing.assert_close(opened(a)[0], opened.model["resnet_model"](opened.preprocess(a)))
    assert not torch.allclose(opened(a)[0], opened(b)[0])
    torch.testing.assert_close(opened(a)[1], torch.full((2, 1, 112, 96), 1 / (1 + torch.e ** -2)))
    for model in (closed, opened):
        model(a)[0].sum().backward()
        assert model.model["mask_model"].out.bias.grad.abs() > 0
    grey = closed.preprocess(torch.full((1, 3, 720, 640), .5))[0, :, 111, 95]
    torch.testing.assert_close(grey, torch.tensor([.015 / .229, .044 / .224, .094 / .225]))


def test_vidar_idm_loss_and_scores():
    target, mask = torch.zeros(3, 14), torch.rand(3, 1, 8, 8)
    for error, huber in ((.5, .125), (3., 2.5)):
        torch.testing.assert_close(vidar.idm_loss(target + error, target, mask, .1), huber + .1 * mask.mean())
    truth = torch.randn(50, 14) * (torch.arange(14) != 3)          # joint 3 is at rest
    assert vidar.idm_scores(truth, truth) == {"r2": 1, "r2_worst": 1, "l1": 0, "accuracy": 1}
    assert abs(vidar.idm_scores(truth.mean(0).expand(50, 14), truth)["r2"]) < 1e-6
    for joint, error, correct in ((3, .04, 1), (3, .06, 0), (6, .4, 1), (13, .6, 0)):
        moved = truth + error * (torch.arange(14) == joint)
        assert vidar.idm_scores(moved, truth)["accuracy"] == correct
    mask = torch.rand(1, 9, 16, 24)
    latent = vidar.arm_to_latent(mask, (2, 3))[0, 0]
    for f, y, x in itertools.product(range(3), range(2), range(3)):
        cell = mask[0, max(0, 4 * f - 3):4 * f + 1, 8 * y:8 * y + 8, 8 * x:8 * x + 8]
        assert latent[f, y, x].item() == pytest.approx(cell.mean((1, 2)).max().item(), abs=1e-6)


def test_vidar_scores_of_videos():
    """The arm is 20 dB off; the given first frame and padding do not count."""
    g = torch.Generator().manual_seed(0)
    truth, arm = torch.rand(9, 3, 16, 16, generator=g), torch.zeros(9, 16, 16, dtype=torch.bool)
    arm[:, 4:8, 4:8] = True
    wrong = truth.clone()
    wrong[:, :, 4:8, 4:8] += .1
    wrong[0] = wrong[7:] = 0
    perfect, scores = (vidar.video_scores(x, truth, arm, torch.arange(9) < 7) for x in (truth, wrong))
    assert {name: value.nanmean().item() for name, value in perfect.items()} == pytest.approx(
        {"psnr": 60, "ssim": 1, "psnr_arm": 60})
    assert scores["psnr_arm"].shape == (1, 8) and scores["psnr_arm"].isnan().sum() == 2
    assert scores["psnr_arm"].nanmean() == pytest.approx(20, abs=1e-3)


def test_vidar_stages_alone(trained, tmp_path):
    """--stage idm; --stage video, where U of Eq. 7 is an IDM's for data without masks."""
    base, data = trained("vidar"), shutil.copytree(trained("vidar").data, tmp_path / "data")
    for path in data.rglob("mask.npz"):
        path.unlink()
    flags = f"--data_dir {data} --max_steps 1 --output_dir {tmp_path}"
    assert launch("vidar", f"{flags}/idm --stage idm --idm_steps 1", full=True) == 0
    report = json.loads((tmp_path / "idm/eval.json").read_text())
    assert report["headline"]["metric"] == "action_l1_real"
    assert launch("vidar", f"{flags}/video --stage video --eta 3 --idm {base.run}/final/idm.pt") == 0
    row = rows(tmp_path / "video")[0]
    assert row["loss"] > 1.1 * row["flow_loss"]


def test_vidar_batches(trained, tmp_path):
    """Of windows longer than an episode the end is padding; an empty prompt is one token; other data or flags
    make another cache."""
    data = shutil.copytree(trained("vidar").data, tmp_path / "data")
    args = vidar_args(f"--eta 0 --frames 13 --data_dir {data}")
    splits = robot_data.load_splits(data)
    folder = vidar.cache_folder(args, splits)
    vidar.build_cache(args, CPU, splits, folder, ["windows"])
    windows = vidar.Cache(sorted(folder.glob("train_*.windows")))
    batch = vidar.collate(windows, [0, 1], args, "cpu", unconditional=[1])
    assert batch["valid"].tolist() == [[True, True, True, False]] * 2 and "arm" not in batch
    words = batch["text"].any(2).sum(1).tolist()           # a row of ones, then ten words
    assert words == [11, 1]
    assert torch.equal(batch["actions"][0, 9:], batch["actions"][0, 8:9].expand(4, 14))
    for flags in ("--frames 9", "--height 64", "--windows 2", "--prompt_views rear", "--eta 3", "--lr 9"):
        other = vidar.cache_folder(vidar_args(f"--eta 0 --frames 13 --data_dir {data} {flags}"), splits)
        assert (other == folder) == (flags == "--lr 9"), flags
    path = splits["train"][0].folder / "actions.npy"
    np.save(path, np.load(path) + 1)
    assert vidar.cache_folder(args, splits) != folder


def test_vidar_episodes(trained, monkeypatch):
    """Splits, windows beyond the end, prompts; of two processes each evaluates every second episode."""
    splits = robot_data.load_splits(trained("vidar").data)
    names = {split: [episode.folder.name for episode in episodes] for split, episodes in splits.items()}
    assert (len(names["train"]), names["val"], names["test"]) == (9, ["ep_0006"], ["ep_0010"])
    assert [episode.random_poses for episode in splits["train"]] == [False] * 8 + [True]
    numbers, valid = robot_data.cut_window(splits["val"][0], 5, 6)
    assert numbers.tolist() == [5, 6, 7, 8, 8, 8] and valid.tolist() == [True] * 4 + [False] * 2
    frames, masks = robot_data.read_episode(splits["val"][0], (24, 16))
    assert frames.shape == (9, 3, 24, 16) and masks.shape == (9, 24, 16) and 0 < masks.float().mean() < 1
    text = robot_data.make_prompt("Pick it up.", "rear")
    assert text == robot_data.make_prompt(text, "rear") and "three views: a fixed rear camera" in text
    assert text.endswith("The aloha robot is currently performing the following task: pick it up.")
    assert robot_data.make_prompt(" Pick it up.", "none") == "Pick it up."
    read, load_window = [], robot_data.load_window
    monkeypatch.setattr(robot_data, "load_window", lambda episode, *more: read.append(
        episode.folder.name) or load_window(episode, *more))
    run = Namespace(rank=1, world=2, device="cpu")
    vidar.evaluate(vidar_args(), run, None, small_idm(1.), {"test": splits["train"][:4]}, None)
    assert read == ["ep_0002", "ep_0004"]


def test_vidar_words_have_embeddings_of_their_own():
    red, blue, none = map(vidar.embed_words, ("the red block.", "the blue block.", ""))
    assert (red == blue).all(1).tolist() == [True, True, False, True] and none.tolist() == red[:1].tolist()


def test_vidar_following_an_instruction():
    """The expert of a simulated world follows its instruction and not the other one."""
    world = robot_world.ArmWorld(3, (112, 96))
    frames, states = [world.observe()], [world.state]
    for action in world.expert_actions(30):
        world.step(action)
        frames.append(world.observe())
        states.append(world.state)
    video = torch.from_numpy(np.stack(frames)).movedim(-1, 1) / 255
    states = torch.from_numpy(np.stack(states))
    task = robot_data.Episode(Path(), states.numpy(), world.instruction, False, ())
    other = robot_data.other_task(task)
    assert {"left", "right", "red", "blue"} <= set(f"{task.instruction} {other.instruction}".split())
    for episode, follows in ((task, 1), (other, 0)):
        scores = robot_data.follows_instruction(video, states, episode)
        assert scores == {"follows_arm": follows, "follows_block": follows}
    task.instruction = "put the left cup away."
    assert robot_data.other_task(task) is None


# ---- vidarc.py ------------------------------------------------------------------------------------------

def vidarc_model(flags="", noise=.2):
    args = vidarc_args(flags)
    model = vidarc.CausalModel(vidarc.load_dit(args), args)
    if args.grad_checkpoint:
        model.dit.enable_gradient_checkpointing()
    return randomized(model, noise)


def vidarc_clip(latents=3):
    """A batch as of vidar.collate, and values as of vidarc.draw_batch."""
    g, C = torch.Generator().manual_seed(0), vidar.TINY["transformer"]["in_channels"]
    z, noise, rollout = torch.randn(3, 2, C, latents, 6, 4, generator=g)
    batch = {"latents": z, "valid": torch.ones(2, latents, dtype=torch.bool),
             "arm": torch.rand(2, 1, latents, 6, 4, generator=g), "text": torch.randn(2, 16, 32, generator=g)}
    values = {"use_self_forcing": False, "rollout_start": .7, "rollout_length": .99, "noise": noise,
              "rollout_noise": rollout, "u": torch.rand(2, latents - 1, generator=g)}
    return batch, values


LONG = "--frames 33 --chunk_size 16 --kv_cache_length 32"           # 9 latent frames, of which chunks have 4


def near(a, b, tolerance=1e-4):
    return b.std() > .1 and (a - b).abs().max() < tolerance * max(1, b.abs().max())


def filled_cache(dit, z, text):
    cache = vidarc.KVCache(9)
    cache.append(dit, z, text)
    return cache


def cached_keys(cache):
    """Keys and values of the latent frames that a cache holds, of 6 tokens each."""
    return torch.stack([x[:, :6 * cache.frames] for pair in cache.buffers.values() for x in pair])


@torch.no_grad()
def test_vidarc_without_a_plan_equals_diffusers():
    """WanTransformer3DModel with a timestep per token, given text or keys and values of text."""
    dit, (batch, _) = vidarc_model().dit, vidarc_clip()
    stock = vidar.load_transformer(vidar_args(), "cpu")
    stock.load_state_dict(dit.state_dict())
    z, text, t = batch["latents"], batch["text"], torch.tensor([[0., 987.3, 500.], [0., 20., 999.]])
    expected = stock(z, t.repeat_interleave(6, 1), text).sample
    assert near(dit(z, t, text), expected) and near(dit(z, t, dit.text_kv(text)), expected)
    assert not near(dit(z, t, text, vidarc.causal_plan(3)), expected, .01)


@torch.no_grad()
def test_vidarc_parallel_pass_equals_cached_loop(monkeypatch):
    """Teacher forcing in one pass is a loop over latent frames behind a cache, with Eq. 7's weight by hand;
    later latent frames change nothing, to the last bit."""
    model, (batch, values) = vidarc_model(f"{LONG} --self_forcing 0"), vidarc_clip(9)
    batch["valid"][1, 5:] = False
    z, text, noise, dit, calls = batch["latents"], batch["text"], values["noise"], model.dit, []
    forward = dit.forward
    monkeypatch.setattr(dit, "forward", lambda *a, **more: calls.append((a, more)) or forward(*a, **more))
    loss, _ = model(batch, values)
    (x, t, _, plan, positions), _ = calls[0]
    v = forward(x, t, text, plan, positions)[:, :, 8:]
    cache, steps = vidarc.KVCache(9), []
    for i in range(9):
        if i:
            sigma = vidar.shift_sigma(values["u"][:, i - 1:i], model.args.shift)
            noisy = torch.lerp(z[:, :, i:i + 1], noise[:, :, i:i + 1], sigma.view(2, 1, 1, 1, 1))
            steps.append(dit(noisy, 1000 * sigma, text, cache=cache))
        cache.append(dit, z[:, :, i:i + 1], text)
    steps = torch.cat(steps, dim=2)
    assert near(v, steps)
    error = (1 + 3 * batch["arm"][:, :, 1:]) * (steps - (noise - z)[:, :, 1:])
    mean = (error[0].square().mean() + error[1, :, :4].square().mean()) / 2        # half of one is padding
    torch.testing.assert_close(loss, mean, rtol=1e-4, atol=0)
    changed = []
    for position in (3, 8 + 4):                                # clean latent frame 3, noisy latent frame 5
        moved = x.clone()
        moved[:, :, position] += 3
        difference = (forward(moved, t, text, plan, positions)[:, :, 8:] - v).abs().amax((0, 1, 3, 4))
        changed.append((difference > 0).tolist())
    assert changed == [[latent >= 4 for latent in range(1, 9)], [latent == 5 for latent in range(1, 9)]]


@torch.no_grad()
def test_vidarc_cache():
    """Popped predictions leave no trace, a restarted window equals a new cache, positions are relative; what
    does not fit is an error."""
    dit, (batch, _) = vidarc_model().dit, vidarc_clip(9)
    z, text = batch["latents"], batch["text"]
    cache, whole = filled_cache(dit, z[:, :, :5], text), cached_keys(filled_cache(dit, z, text))
    cache.append(dit, 9 + z[:, :, :4], text)
    assert not near(cached_keys(cache), whole)
    cache.pop(4)
    cache.append(dit, z[:, :, 5:], text)
    assert cache.frames == 9 and near(cached_keys(cache), whole)
    cache.frames = 0
    cache.append(dit, z[:, :, 4:], text)
    assert torch.equal(cached_keys(cache), cached_keys(filled_cache(dit, z[:, :, 4:], text)))
    cache.capacity = 7
    for action in (lambda: cache.append(dit, z[:, :, 5:], text), lambda: next(vidarc.generate_latents(
            dit, cache, z[:, :, 5:], text, vidarc_args(), 1))):
        with pytest.raises(common.UserError, match="holds 7 latent frames, not 9: .*--kv_cache_length to 32"):
            action()


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1., 3.])
def test_vidarc_guidance(guidance):
    """Away from the empty prompt, which has keys and values of its own. One step, from sigma .999 to 0."""
    dit, (batch, values) = vidarc_model().dit, vidarc_clip(9)
    z, text, noise = batch["latents"][:1, :, :5], batch["text"][:1], values["noise"][:1, :, :1]
    prompts = torch.cat([text, -text][:1 if guidance == 1 else 2])
    v, unguided = (dit(noise, torch.full((1, 1), 999.), prompt, cache=filled_cache(dit, z, prompt))
                   for prompt in (text, -text))
    cache = filled_cache(dit, vidarc.repeat_for_guidance(z, guidance), prompts)
    generated = next(vidarc.generate_latents(dit, cache, noise, prompts, vidarc_args("--sample_shift 1"), 1,
                                             guidance))
    assert near(generated, noise - .999 * (unguided + guidance * (v - unguided)), 1e-3)
    assert not near(v, unguided, .01)


def test_vidarc_generated_latents_come_one_by_one():
    """An oracle's velocity leads to the data; the last latent frame of a chunk is not cached."""
    dit, (batch, values) = vidarc_model().dit, vidarc_clip(9)
    text, z, noise, timesteps = batch["text"], batch["latents"][:, :, :4], values["noise"][:, :, :4], []

    def oracle(x, t, text, plan=None, cache=None):
        if t.any():
            timesteps.append(t[0, 0].item())
            return (noise - z)[:, :, cache.frames - 5:cache.frames - 4]

    args = vidarc_args("--sample_shift 5")
    for keep in (False, True):
        cache = filled_cache(dit, z[:, :, [0, 1, 2, 3, 3]], text)
        latents = vidarc.generate_latents(oracle, cache, noise, text, args, 4, keep_last=keep)
        first, frames = next(latents), cache.frames
        assert near(torch.cat([first, *latents], 2), z, .01)
        assert (first.shape[2], frames, cache.frames) == (1, 5, 9 if keep else 8)
    u = torch.linspace(.999, 0, 5)[:-1]
    assert timesteps[:4] == pytest.approx((1000 * vidar.shift_sigma(u, 5)).tolist(), abs=1)


@torch.no_grad()
def test_vidarc_video_streams_equal_the_whole():
    """To the last digit; a state is not used up, so that predicted frames can be taken back."""
    x = torch.rand(2, 17, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    to_digit = lambda a, b: near(a, b, 1e-5)
    for vae, same in ((tiny_wan("vae"), to_digit), (common.LinearCodec.fit(x, 8), torch.equal)):
        z, parts, videos, state, shown = common.wan_encode(vae, x), [], [], None, None
        for frames in x.split([1, 4, 8, 4], dim=1):
            vidarc.encode_next(vae, 0 * frames, state)
            latents, state = vidarc.encode_next(vae, frames, state)
            vidarc.decode_next(vae, 9 * latents, shown)
            video, shown = vidarc.decode_next(vae, latents, shown)
            parts, videos = [*parts, latents], [*videos, video]
        assert same(torch.cat(parts, 2), z)
        assert same(torch.cat(videos, 1), common.wan_decode(vae, z))
        with pytest.raises(ValueError, match="not 3$"):
            vidarc.encode_next(vae, x[:, :3], state)


def test_vidarc_self_forcing():
    """Latent frames 0 to 4 are observed, 5 to 7 generated, without gradients, 8 has the loss: by hand."""
    model, (batch, values) = vidarc_model(LONG), vidarc_clip(9)
    z, text = batch["latents"].requires_grad_(), batch["text"]
    rollout = values["rollout_noise"].requires_grad_()
    values["use_self_forcing"], args, weights = True, model.args, list(model.parameters())
    loss, _ = model(batch, values)
    *grads, none = torch.autograd.grad(loss, [z, *weights, rollout], allow_unused=True)
    assert none is None and (grads[0].abs().amax((0, 1, 3, 4)) > 0).tolist() == [False] * 8 + [True]
    with torch.no_grad():
        cache = filled_cache(model.dit, z[:, :, :5], text)
        for i in (5, 6, 7):
            velocity = lambda x, t: model.dit(x, torch.full((2, 1), float(t)), text, cache=cache)
            cache.append(model.dit, vidarc.denoise(velocity, rollout[:, :, i:i + 1], args, 2), text)
    sigma, noise = vidar.shift_sigma(values["u"][:, 7:], args.shift), values["noise"][:, :, 8:]
    v = model.dit(torch.lerp(z[:, :, 8:], noise, sigma.view(2, 1, 1, 1, 1)), 1000 * sigma, text, cache=cache)
    expected = ((1 + 3 * batch["arm"][:, :, 8:]) * (v - noise + z[:, :, 8:])).square().mean()
    torch.testing.assert_close(loss, expected)
    for one, other in zip(grads, torch.autograd.grad(expected, [z, *weights])):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    with torch.no_grad():
        value = lambda **changes: model({**batch, **changes}, values)[0]
        marks = torch.eye(9)[:, :, None, None]
        assert [bool(value(latents=z + mark) != loss) for mark in marks] == [True] * 5 + [False] * 3 + [True]
        for start, length, target in ((0, 0, 2), (0, .999, 4), (.5, 0, 6), (.999, .999, 8)):
            values |= {"rollout_start": start, "rollout_length": length}
            valid = [torch.arange(9).expand(2, 9) == latent for latent in (target, target - 1)]
            assert value(valid=valid[0]) > 0 == value(valid=valid[1])


@pytest.mark.parametrize("use_self_forcing", [False, True])
def test_vidarc_checkpointed_gradient(use_self_forcing):
    batch, values = vidarc_clip(9)
    values["use_self_forcing"] = use_self_forcing
    plain, checkpointed = (torch.autograd.grad(model(batch, values)[0], list(model.parameters()))
                           for model in (vidarc_model(LONG), vidarc_model(f"{LONG} --grad_checkpoint")))
    assert all(torch.allclose(a, b, 1e-4, 1e-5 * a.abs().max()) and a.any()
               for a, b in zip(plain, checkpointed))


def test_vidarc_ranks_draw_alike(monkeypatch):
    """Which loss and where it begins are equal on all processes, and vary from step to step."""
    args, choices = vidarc_args("--self_forcing .5"), []
    monkeypatch.setattr(vidar, "collate", lambda windows, rows, *_: {
        "latents": torch.zeros(len(rows), 16, 3, 6, 4)})
    for step in range(40):
        first, second = (vidarc.draw_batch(args, Namespace(rank=rank, world=2, device="cpu"), Namespace(
            rows=range(50)), step, 0, 1)[1] for rank in (0, 1))
        chosen, same = ([values[name] for name in ("use_self_forcing", "rollout_start", "rollout_length")]
                        for values in (first, second))
        assert chosen == same and not torch.equal(first["u"], second["u"])
        choices.append(chosen)
    use_self_forcing, starts, lengths = np.array(choices, float).T
    assert not use_self_forcing[:args.self_forcing_after].any() and .25 < use_self_forcing[2:].mean() < .75
    assert starts.std() > .2 < lengths.std()


# ---- vidarc.py: the closed loop -------------------------------------------------------------------------

def vidarc_policy(codec="linear", flags=""):
    """With random weights; an IDM that looks at everything. codec "wan": in the shape of Wan's VAE."""
    args, width = vidarc_args(f"--frames 25 --kv_cache_length 24 {flags}"), 32 if codec == "linear" else 16
    dit, size = vidarc_model().dit, (48, 32)
    vae = common.LinearCodec.fit(torch.rand(2, 9, 3, 48, 32) * 2 - 1, 16)
    if codec == "wan":
        args.model, args.height, args.width, vae = "ti2v_5b", 64, 64, tiny_wan("vae")
        dit, size = vidarc.CausalWan.of(tiny_wan("transformer")), (64, 64)
    torch.manual_seed(0)
    encode = lambda prompt: torch.randn(16, width, generator=torch.Generator().manual_seed(len(prompt)))
    return vidarc.Policy(args, CPU, dit, small_idm(1., size), vae, encode)


def observed_frames(policy, count=41):
    shape = count, policy.args.height, policy.args.width, 3
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@torch.no_grad()
@pytest.mark.parametrize("codec", ["linear", "wan"])
def test_vidarc_policy_stands_on_observed_frames(codec):
    """Cached keys are those of the observed frames, whatever was predicted. Beyond the window, or after a gap
    of frames, a new window begins with the last of them."""
    policy = vidarc_policy(codec)
    frames, at = observed_frames(policy), 0
    for end, first in ((1, 0), (9, 0), (17, 0), (25, 16), (33, 16), (34, 33), (38, 33)):
        assert policy.act(frames[at:end], "go").shape == (8, 14)
        video = common.from_uint8(torch.from_numpy(frames[first:end]).movedim(-1, 1))[None]
        z = common.wan_encode(policy.vae, video)
        fresh = filled_cache(policy.dit, z, policy.text)
        assert policy.num_observed_latents == z.shape[2] == policy.cache.frames - 1
        tokens = z.shape[2] * z[0, 0, 0].numel() // 4
        for expected, cached in zip(fresh.buffers.values(), policy.cache.buffers.values()):
            for a, b in zip(expected, cached):
                torch.testing.assert_close(a[:, :tokens], b[:, :tokens], rtol=0,
                                           atol=1e-4 * a[:, :tokens].abs().max().item())
        at = end


@torch.no_grad()
def test_vidarc_policy():
    """The seed makes the actions, joints correct them; a caller who leaves after the first loses nothing;
    autocast ends with each part; another instruction is a new episode."""
    policy = vidarc_policy()
    frames = observed_frames(policy, 9)

    def episode(*ends, seed=0, joints=None):
        policy.reset(seed)
        return [policy.act(frames[a:b], "go", joints) for a, b in itertools.pairwise((0, *ends))]

    one, two, after = *episode(1, 9), episode(1, 5)[1]
    assert all(map(np.array_equal, episode(1, 9), (one, two)))
    assert one.std(0).min() > 0 and not np.allclose(one, episode(1, seed=1)[0])
    offset = episode(1, joints=np.linspace(-1, 1, 14))[0] - one
    assert np.allclose(offset, offset[:1]) and not np.allclose(offset, 0)
    policy.reset()
    stream = policy.stream(frames[0], "go")                                # one H W 3 is a frame, too
    first = next(stream)
    assert len(policy.generated) == 1 and np.array_equal(np.concatenate([first, *stream]), one)
    policy.reset()
    next(policy.stream(frames[:1], "go"))
    assert np.array_equal(policy.act(frames[1:5], "go"), after)
    policy.act(frames[1:5], "stop")
    assert policy.num_observed_latents == 1 and policy.instruction == "stop"
    policy.run = Namespace(**{**vars(CPU), "autocast": lambda: torch.autocast("cpu", torch.bfloat16)})
    next(policy.stream(frames[:1], "go"))
    assert not torch.is_autocast_enabled("cpu")


def test_vidarc_load_policy(trained, tmp_path):
    """The folder of a run is enough, also one of an earlier version that lacks a flag, and gives the EMA
    weights that training evaluated."""
    run = trained("vidarc").run
    shutil.copytree(run / "final", tmp_path / "final")
    flags = common.read_json(run / "args.json")
    del flags["sample_shift"]
    common.write_json(tmp_path / "args.json", flags)
    policy = vidarc.load_policy(str(tmp_path), "cpu")
    actions = policy.act(observed_frames(policy, 1), "using left arm, put the red block on the plate.")
    assert actions.shape == (8, 14) and np.isfinite(actions).all()
    ema = common.load_weights(run / "ckpt/step_000004/ema.safetensors")
    assert_same({f"dit.{name}": value for name, value in policy.dit.state_dict().items()}, ema)


def test_vidarc_serve():
    """openpi's protocol: actions equal policy.act() in process, also for three cameras; an error says what is
    wrong and leaves no trace; a new connection is a new episode."""
    msgpack, client = (pytest.importorskip(name) for name in ("msgpack", "websockets.sync.client"))
    server = importlib.import_module("data.vidar.server")
    policy, alone = vidarc_policy(), vidarc_policy()
    frames = observed_frames(policy, 9)
    cameras = np.random.default_rng(1).integers(0, 256, (3, 60, 80, 3), np.uint8)
    views = {name: np.moveaxis(image, -1, 0) for name, image in zip(server.CAMERAS, cameras)}
    mosaic = server.mosaic(*cameras)
    assert mosaic.shape == (720, 640, 3)
    requests = [({"mosaic": frames[:1]}, frames[:1]), ({"mosaic": frames[1:9]}, frames[1:9]),
                (views, server.resize_images(mosaic[None], (48, 32)))]
    expected = [alone.act(observed, "go", np.zeros(14)) for _, observed in requests]
    pack = functools.partial(msgpack.packb, default=server.pack_array)
    unpack = functools.partial(msgpack.unpackb, object_hook=server.unpack_array)
    good = {"images": {"mosaic": frames[1:5]}, "state": np.zeros(14), "prompt": "go"}
    errors = [(b"\xc1", r"^\w+: "), ("text", "binary message"), (pack({"prompt": "go"}), "no .images"),
              (pack({**good, "images": {"cam_high": np.zeros((4, 8), np.uint8)}}), "cam_high"),
              (pack({**good, "images": {"mosaic": frames / 255}}), "float64"),
              (pack({**good, "state": np.full(14, np.nan)}), "float64, not 14 finite"),
              (pack({**good, "prompt": 3}), "int"),
              (pack({**good, "state": np.zeros(7)}), "joints are .7,."),
              (pack({**good, "state": ["a"] * 14}), "<U1, not 14")]
    with server.make_server(policy, 0, "127.0.0.1") as running:
        address = f"127.0.0.1:{running.socket.getsockname()[1]}"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        with urllib.request.urlopen(f"http://{address}/healthz") as response:
            assert (response.status, response.read()) == (200, b"OK\n")
        for _ in range(2):
            with client.connect(f"ws://{address}", compression=None, max_size=None) as connection:
                assert unpack(connection.recv())["chunk_size"] == 8
                for (images, _), actions in zip(requests, expected):
                    connection.send(pack({"images": images, "state": np.zeros(14), "prompt": "go"}))
                    assert np.array_equal(unpack(connection.recv())["actions"], actions)
                    for bad, message in errors:
                        connection.send(bad)
                        assert re.search(message, connection.recv()), message
        running.shutdown()


class ExpertPolicy:
    """Plans as the expert would, and generates what is then seen if the block is not moved."""
    def __init__(self, args, monkeypatch):
        self.args, self.cache = args, Namespace(capacity=11)
        arm_world = vidarc.ArmWorld
        monkeypatch.setattr(vidarc, "ArmWorld", lambda *a, **more: setattr(
            self, "world", arm_world(*a, **more)) or self.world)

    def reset(self, seed):
        self.generated = []

    def stream(self, frames, instruction, state, latents=None):
        world, self.generated = copy.deepcopy(self.world), []
        assert instruction == world.instruction and np.array_equal(state, world.state)
        assert np.array_equal(frames[-1], world.observe())
        world.moved = None
        for part in np.split(world.expert_actions(4 * (latents or 2)), latents or 2):
            images = []
            for action in part:
                world.step(action)
                images.append(world.observe())
            self.generated.append(torch.from_numpy(np.stack(images)).movedim(-1, 1) / 255)
            yield part


def test_vidarc_closed_loop(monkeypatch):
    """A new plan after 8 frames finds a block that was moved; a single plan does not."""
    monkeypatch.setattr(vidarc, "HORIZON", 64)
    monkeypatch.setattr(vidarc, "MOVED_AT", 10)
    policy = ExpertPolicy(vidarc_args("--frames 41 --kv_cache_length 40"), monkeypatch)
    success = lambda moved, closed: np.mean([vidarc.run_episode(policy, seed, moved, closed)[0]
                                             for seed in range(4)])
    assert success(True, True) == success(False, False) == 1 and success(True, False) < .3
    film = []
    vidarc.run_episode(policy, 0, False, True, film)
    assert len(film) % 8 == 0 and all(torch.equal(observed, generated) for observed, generated in film)
