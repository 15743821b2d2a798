"""test_smoke.py: the smoke test (in this file's name the word means a first test; only river_smoke.py's is a plume).

    pytest test_smoke.py          # CPU only, offline, @TESTMIN@ minutes on 2 cores

What every script owes is written once and runs for each row of SCRIPTS. Then come the files as a whole, common.py, and
what one script alone has to show, against slow loops and closed forms.
"""
import ast
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

HERE = Path(__file__).parent
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}     # before torch is imported

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import river_smoke as river

# Bits are compared across processes, which therefore need equal thread counts; tiny tensors are fastest on one.
torch.set_num_threads(1)


def unlist(data, pattern):
    """Removes frames whose name contains `pattern`, and their lines, from the training split."""
    listing = data / "train_files.txt"
    listing.write_text("".join(line + "\n" for line in listing.read_text().splitlines() if pattern not in line))
    for path in (data / "train").glob(f"*{pattern}*"):
        path.unlink()


def edit(path, function):
    path.write_text(function(path.read_text()))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


# tiny: flags of a run of a second, whose every stage takes 4 steps and saves after 2. stages: folders with a ckpt/, in
# order. reuse: takes the first stages from another run. double: twice the batch of tiny. overfit: () -> losses on one batch.
# bad: {what is wrong: (damage(data, run) or None, flags, what the one line must say)}.
SCRIPTS = {
    "river_smoke": dict(
        tiny="--preset tiny --dtype float32 --sim_clips 8 --sim_frames 14 --num_observations 6 --condition_frames 4 "
             "--frames_to_generate 3 --ae_width 8 --ae_depth 1 --latent_channels 4 --width 32 --heads 2 --depth 1 --mid_depth 1 "
             "--ae_steps 4 --max_steps 4 --batch_size 4 --ae_batch_size 4 --eval_clips 2 --num_samples 2 --log_every 1 "
             "--eval_every 2 --save_every 2 --keep_last 0 --warmup_steps 1000 --lr 1 --ae_lr 1",
        stages=("autoencoder", "."), double="--batch_size 8 --ae_batch_size 8",
        reuse="--autoencoder {run}/autoencoder/autoencoder.safetensors",
        headline=("results.psnr_ensemble_mean", "results.crps", "baselines.persistence.psnr", "baselines.persistence.mae"),
        overfit=lambda: overfit_river(),
        bad={
            "no split": (lambda data, run: shutil.rmtree(data / "val"), "", "no folder .*val"),
            "no list": (lambda data, run: (data / "train_files.txt").unlink(), "", "no list file .*train_files.txt"),
            "absent frame": (lambda data, run: edit(data / "train_files.txt", lambda text: text + "train/x_frame_0001.png 1\n"),
                             "", "names x_frame_0001.png"),
            "damaged picture": (lambda data, run: cut(next((data / "train").glob("*_0003.png"))), "", "cannot read image .*_0003"),
            "other size": (lambda data, run: iio.imwrite(next((data / "val").glob("*_0003.png")), np.zeros((32, 48, 3), np.uint8)),
                           "", "is 48x32, expected 64x64"),
            "short clip": (lambda data, run: unlist(data, "sim000003_frame_001"), "--num_observations 12", "sim000003 has 9 frames"),
            "empty split": (lambda data, run: unlist(data, "_frame_"), "", "split train is empty"),
            "warm start 1": (None, "--warm_start 1.0", "warm_start"),
            "warm start below 0": (None, "--warm_start -0.1", "warm_start"),
            "no steps": (None, "--steps 0", "--steps must be at least 1"),
            "window of 2": (None, "--num_observations 2", "at least 3"),
            "heads": (None, "--heads 3", "multiple of --heads"),
            "no autoencoder": (None, "--autoencoder {data}/none.safetensors", "none.safetensors"),
            "autoencoder of other shape": (None, "--autoencoder {run}/autoencoder/autoencoder.safetensors --latent_channels 8",
                                           "does not fit this model"),
            "width of another model": (None, "--output_dir {run} --eval --width 64", "--width 64 does not fit .*trained with 32"),
            "data there already": (None, "--extract {run}", "exists already"),
        }),
}
BAD_ANYWHERE = {
    "unknown flag": (None, "--warm_strat 0.2", "unrecognized arguments: --warm_strat"),
    "abbreviated flag": (None, "--max_step 3", "unrecognized arguments"),
    "not a number": (None, "--max_steps many", "invalid int value"),
    "no such preset": (None, "--preset huge", "invalid choice"),
    "nothing to sample": (None, "--sample", "no checkpoint in"),
    "nothing to measure": (None, "--eval", "no checkpoint in"),
    "nothing to resume": (None, "--resume {data}", "no checkpoint at"),
    "run would be overwritten": (None, "--output_dir {run} --resume none", "would overwrite"),
    "truncated checkpoint, named": (lambda data, run: cut(run / "ckpt/step_000004/model.safetensors"),
                                    "--resume {run}/ckpt/step_000004", "step_000004 is truncated .model.safetensors"),
    "another script's checkpoint": (
        lambda data, run: [edit(meta, lambda text: text.replace('"script": "', '"script": "not_')) for meta in run.glob("ckpt/*/meta.json")],
        "--output_dir {run} --eval", "was written by not_"),
    "sharding one process": (None, "--fsdp", "torchrun"),
}
BAD = [(script, name) for script, row in SCRIPTS.items() for name in BAD_ANYWHERE | row["bad"]]
each_script = pytest.mark.parametrize("script", SCRIPTS)


# ---- running a script -----------------------------------------------------------------------------------

def launch(script, flags, full=False):
    """main() in this process, after the tiny flags; without `full` it only trains. -> exit code."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        if not full:
            patch.setattr(module, "evaluate", lambda *a, **k: None)
            patch.setattr(module, "sample", lambda *a, **k: [])
        return module.main(shlex.split(SCRIPTS[script]["tiny"]) + shlex.split(flags))


def process(script, flags, full, log, env):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.environ.update(env)
    sys.exit(launch(script, flags, full))


def start(script, flags, log, world=1, full=False):
    """launch() in new processes, as torchrun would. They fork from a server that has imported everything, which takes
    seconds in each new interpreter. Their output goes to {log}0, {log}1, ..."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_smoke"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
    ranks = [server.Process(target=process, args=(script, flags, full, f"{log}{rank}", where | {
        "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})) for rank in range(world)]
    for rank in ranks:
        rank.start()
    return ranks


def wait(ranks, seconds=60):
    """-> exit codes. Nothing outlives its test."""
    for rank in ranks:
        rank.join(seconds)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def wait_for_step(run, step, ranks):
    """Until the run has a checkpoint of at least `step` steps."""
    while not (newest := common.latest_checkpoint(run / "ckpt")) or int(newest.name[5:]) < step:
        assert all(rank.is_alive() for rank in ranks), "ended too early"
        time.sleep(.002)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """script -> a complete run of it in its default folders, made once: Namespace(root, data, run, printed)."""
    runs = {}

    def get(script):
        if script not in runs:
            root = tmp_path_factory.mktemp(script)
            with contextlib.chdir(root), open(root / "printed", "w") as file, contextlib.redirect_stdout(file):
                assert launch(script, "", full=True) == 0
            run = root / "runs" / script
            data = Path(json.loads((run / "args.json").read_text())["data_dir"])
            runs[script] = Namespace(root=root, run=run, data=root / data, printed=(root / "printed").read_text())
        return runs[script]
    return get


@pytest.fixture(autouse=True)
def sigterm():
    """A run that ends in an error leaves its handler, which its process would not outlive."""
    old = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, old)


def the_error(capsys, script):
    """The one line on stderr besides progress bars."""
    pieces = [piece for piece in re.split(r"[\r\n]+", capsys.readouterr().err) if piece.strip()]
    lines = [piece for piece in pieces if not re.search(r"\[\d\d:\d\d", piece)]
    assert len(lines) == 1 and lines[0].startswith(f"{script}.py: error: "), pieces
    return lines[0]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flat(value, name=""):
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, v in items for key, leaf in flat(v, f"{name}/{k}").items()}
    return {name: value}


def saved(run, stage="."):
    """Everything the newest checkpoint of a stage holds, and the rows of its metrics.jsonl without their times."""
    path = common.latest_checkpoint(run / stage / "ckpt")
    state, meta = common.load_checkpoint(path, json.loads((path / "meta.json").read_text())["script"])
    rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key != "seconds_per_step"} for row in rows]
    return flat({"state": state, "step": meta["step"], "rows": rows})


def assert_same(a, b, atol=0.0):
    """Bit for bit, or within atol."""
    assert a.keys() == b.keys()
    for name in a:
        if torch.is_tensor(a[name]) or isinstance(a[name], float) and atol:
            torch.testing.assert_close(torch.as_tensor(a[name]), torch.as_tensor(b[name]), rtol=atol, atol=atol, msg=lambda m: name + m)
        else:
            assert a[name] == b[name], name


# ---- what every script owes -----------------------------------------------------------------------------

@each_script
def test_help(script, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main(["--help"])
    assert ended.value.code == 0
    assert "--data_dir" in capsys.readouterr().out


@each_script
def test_one_batch_overfits(script):
    losses = SCRIPTS[script]["overfit"]()
    assert losses[-1] < 0.2 * losses[0]


@each_script
def test_run_on_disk(script, trained):
    base, row = trained(script), SCRIPTS[script]
    report = json.loads((base.run / "eval.json").read_text())
    assert set(report) == {"script", "preset", "data", "weights", "seconds", "headline", "results", "baselines"}
    assert report["script"] == script and report["preset"] == "tiny" and report["seconds"] > 0
    assert set(report["headline"]) == {"metric", "value", "baseline", "lower_is_better"}
    assert np.isfinite([report["headline"]["value"], report["headline"]["baseline"]]).all()
    leaves = flat(report)
    for key in row["headline"]:
        assert np.isfinite(leaves["/" + key.replace(".", "/")])
    assert {type(v) for k, v in leaves.items() if k.startswith(("/results", "/baselines"))} <= {int, float, type(None)}
    for stage in row["stages"]:
        rows = [json.loads(line) for line in (base.run / stage / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4] and [r["step"] for r in rows if "val_loss" in r] == [2, 4]
    flags = json.loads((base.run / "args.json").read_text())
    assert flags["batch_size"] == 4 and flags["torch"] == torch.__version__ and flags["python"]
    assert iio.imread(base.run / "curves.png").std() > 0
    assert {path.suffix for path in (base.run / "samples").iterdir()} >= {".mp4", ".png"}
    assert base.printed.startswith(f"{script}: preset tiny (as asked), data ")


@each_script
def test_resume_equals_no_stop(script, trained, tmp_path):
    base, stages = trained(script), SCRIPTS[script]["stages"]
    for i, stage in enumerate(stages):
        run = tmp_path / str(i)
        shutil.copytree(base.run, run)
        shutil.rmtree(run / stage / "ckpt/step_000004")            # as though the run had ended at step 2 of this stage
        for later in stages[i + 1:]:
            shutil.rmtree(run / later / "ckpt")
        for export in run.rglob("*.safetensors"):
            if "ckpt" not in export.parts:
                export.unlink()
        assert launch(script, f"--data_dir {base.data} --output_dir {run}") == 0
        for checked in stages[i:]:
            assert_same(saved(run, checked), saved(base.run, checked))
        assert {path: content for path, content in files(run).items() if path.endswith(".safetensors")} == {
            path: content for path, content in files(base.run).items() if path.endswith(".safetensors")}


@each_script
def test_sample_is_a_function_of_the_seed(script, trained, tmp_path, monkeypatch, capsys):
    """As typed, `python <script>.py --sample`: every other flag comes from the checkpoint in the default folder."""
    shutil.copytree(trained(script).root, tmp_path / "root")
    monkeypatch.chdir(tmp_path / "root")
    folder, made = Path("runs") / script / "samples", []
    for seed in (0, 0, 1):
        shutil.rmtree(folder)
        assert importlib.import_module(script).main(["--sample", "--seed", str(seed)]) == 0
        made.append(files(folder))
    assert made[0] == made[1] and made[0].keys() == made[2].keys()
    assert all(made[0][name] != made[2][name] for name in made[0])
    assert "training" not in capsys.readouterr().out


@each_script
def test_sample_without_checkpoint_trains_first(script, trained, tmp_path, monkeypatch, capsys):
    base = trained(script)
    monkeypatch.chdir(tmp_path)
    assert launch(script, f"--sample --data_dir {base.data} {SCRIPTS[script]['reuse'].format(run=base.run)}", full=True) == 0
    assert re.search("no checkpoint in .*: training preset tiny first, about .* minutes", capsys.readouterr().out)
    run = tmp_path / "runs" / script
    assert any((run / "samples").iterdir()) and not (run / "eval.json").exists()


@each_script
@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_dry_run(script, preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(script).main(["--preset", preset, "--dry_run"]) == 0
    counts = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) parameters", capsys.readouterr().out)]
    assert counts and min(counts) > 100_000 and not any(tmp_path.iterdir())


@each_script
def test_sigterm_saves_and_stops(script, trained, tmp_path, monkeypatch, capsys):
    base, row = trained(script), common.Log.row
    flags = f"--data_dir {base.data} --output_dir {tmp_path / 'run'} {SCRIPTS[script]['reuse'].format(run=base.run)} --save_every 0"

    def terminated(log, step, **values):
        row(log, step, **values)
        if step == 2 and "loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(common.Log, "row", terminated)
        assert launch(script, flags) == 2
    assert "stopped by SIGTERM after step 3, which is saved" in the_error(capsys, script)
    assert [path.name for path in common.checkpoints(tmp_path / "run/ckpt")] == ["step_000003"]
    assert launch(script, flags) == 0
    assert_same(saved(tmp_path / "run"), saved(base.run))


@each_script
def test_kills_lose_nothing(script, trained, tmp_path):
    """SIGKILL at three random moments of a run that saves at every step."""
    base = trained(script)
    flags = f"--data_dir {base.data} {SCRIPTS[script]['reuse'].format(run=base.run)} --eval_every 0 --save_every 1 --keep_last 2 --max_steps 40"
    run, step = tmp_path / "killed", 0
    for _ in range(3):
        ranks = start(script, f"{flags} --output_dir {run}", tmp_path / "log")
        wait_for_step(run, step + random.randint(1, 5), ranks)
        time.sleep(random.uniform(0, .03))
        ranks[0].kill()
        assert wait(ranks) == [-signal.SIGKILL]
        step = int(common.latest_checkpoint(run / "ckpt").name[5:])
    assert launch(script, f"{flags} --output_dir {run}") == 0
    assert launch(script, f"{flags} --output_dir {tmp_path / 'whole'}") == 0
    assert_same(saved(run), saved(tmp_path / "whole"))
    assert sorted(os.listdir(run / "ckpt")) == ["step_000039", "step_000040"]


@each_script
def test_full_disk_leaves_the_checkpoint_before(script, trained, tmp_path, capsys):
    base, run = trained(script), tmp_path / "run"
    shutil.copytree(base.run, run)
    shutil.rmtree(run / "ckpt/step_000004")
    before, (_, most) = files(run / "ckpt"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))      # a larger file fails to be written, half-way
    try:
        assert launch(script, f"--data_dir {base.data} --output_dir {run}") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert re.search("could not save .*the newest complete checkpoint is .*step_000002", the_error(capsys, script))
    assert files(run / "ckpt") == before


@each_script
def test_divergence_names_the_last_good_checkpoint(script, trained, tmp_path, capsys):
    base, run = trained(script), tmp_path / "run"
    shutil.copytree(base.run, run)
    shutil.rmtree(run / "ckpt/step_000004")
    before = files(run / "ckpt")
    assert launch(script, f"--data_dir {base.data} --output_dir {run} --lr 1e35") == 2
    assert re.search("not finite at step 4: the last good checkpoint is .*step_000002", the_error(capsys, script))
    assert files(run / "ckpt") == before


@each_script
def test_truncated_newest_checkpoint(script, trained, tmp_path, capsys):
    base, run = trained(script), tmp_path / "run"
    shutil.copytree(base.run, run)
    cut(run / "ckpt/step_000004/optimizer.pt")
    assert launch(script, f"--data_dir {base.data} --output_dir {run}") == 0
    assert re.search("warning: .*step_000004 is truncated.*going on from .*step_000002", capsys.readouterr().err)
    assert_same(saved(run), saved(base.run))
    for path in run.glob("ckpt/*/meta.json"):
        cut(path)
    assert launch(script, f"--data_dir {base.data} --output_dir {run}") == 2
    assert "cannot be read" in the_error(capsys, script)


@pytest.mark.parametrize("script,name", BAD)
def test_bad_input(script, name, trained, tmp_path, capsys):
    base, row = trained(script), SCRIPTS[script]
    damage, flags, message = (BAD_ANYWHERE | row["bad"])[name]
    data, run, new = tmp_path / "data", tmp_path / "run", tmp_path / "new"
    shutil.copytree(base.data, data)
    shutil.copytree(base.run, run)
    if damage:
        damage(data, run)
    before = files(data), files(run)
    assert launch(script, f"--data_dir {data} --output_dir {new} " + flags.format(data=data, run=run)) == 2
    assert re.search(message, the_error(capsys, script))
    assert (files(data), files(run)) == before
    assert not new.exists() or set(files(new)) <= {"args.json"}


# ---- two processes --------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def alone(trained, tmp_path_factory):
    """script -> folder of a run of one process at twice the batch, which two processes have to equal."""
    runs = {}

    def get(script):
        if script not in runs:
            runs[script] = tmp_path_factory.mktemp(script) / "alone"
            flags = f"--data_dir {trained(script).data} --output_dir {runs[script]} {SCRIPTS[script]['double']}"
            assert launch(script, flags) == 0
        return runs[script]
    return get


def resumed_from_2(run, to):
    shutil.copytree(run, to)
    shutil.rmtree(to / "ckpt/step_000004")
    return to


@each_script
def test_two_processes_equal_one(script, trained, alone, tmp_path):
    """Under torchrun, as typed; then stopped after 2 steps and resumed: by two processes bit for bit, by one closely."""
    row, data, run = SCRIPTS[script], trained(script).data, tmp_path / "run"
    done = subprocess.run(["torchrun", "--nproc_per_node=2", "--master_port=0", HERE / f"{script}.py", *shlex.split(row["tiny"]),
                           "--data_dir", data, "--output_dir", run, "--sample"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stage in row["stages"]:
        assert_same(saved(run, stage), saved(alone(script), stage), atol=1e-4)
    two, one = resumed_from_2(run, tmp_path / "two"), resumed_from_2(run, tmp_path / "one")
    assert wait(start(script, f"--data_dir {data} --output_dir {two}", tmp_path / "log", world=2)) == [0, 0]
    assert_same(saved(two), saved(run))
    assert launch(script, f"--data_dir {data} --output_dir {one} {row['double']}") == 0
    assert_same(saved(one), saved(alone(script)), atol=1e-4)


@each_script
def test_sharded_equals_one(script, trained, alone, tmp_path):
    """fully_shard on two processes, from the start and on from what one process saved."""
    row, data, run = SCRIPTS[script], trained(script).data, tmp_path / "run"
    assert wait(start(script, f"--data_dir {data} --output_dir {run} --fsdp", tmp_path / "log", world=2)) == [0, 0]
    for stage in row["stages"]:
        assert_same(saved(run, stage), saved(alone(script), stage), atol=1e-4)
    run = resumed_from_2(alone(script), tmp_path / "resumed")
    assert wait(start(script, f"--data_dir {data} --output_dir {run} --fsdp", tmp_path / "log", world=2)) == [0, 0]
    assert_same(saved(run), saved(alone(script)), atol=1e-4)


@each_script
def test_accumulation_equals_one(script, trained, alone, tmp_path):
    assert launch(script, f"--data_dir {trained(script).data} --output_dir {tmp_path} --grad_accum 2") == 0
    for stage in SCRIPTS[script]["stages"]:
        assert_same(saved(tmp_path, stage), saved(alone(script), stage), atol=1e-4)


@each_script
@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_one_of_two_processes_ends(script, how, trained, tmp_path):
    """SIGTERM at one rank stops both after the same step; where one dies, the other says so and ends."""
    base, run = trained(script), tmp_path / "run"
    ranks = start(script, f"--data_dir {base.data} --output_dir {run} {SCRIPTS[script]['reuse'].format(run=base.run)} "
                          f"--max_steps 100000 --eval_every 0 --keep_last 2", tmp_path / "log", world=2)
    wait_for_step(run, 2, ranks)
    getattr(ranks[1], how)()
    assert wait(ranks, 20) == ([2, 2] if how == "terminate" else [2, -signal.SIGKILL])
    said = (tmp_path / "log0").read_text()
    assert f"{script}.py: error (rank 0): " in said
    assert ("stopped by SIGTERM" if how == "terminate" else "another process of this run died") in said
    assert common.find_checkpoint(run / "ckpt", script, "auto")


# ---- the files as a whole -------------------------------------------------------------------------------

def test_shared_blocks_are_identical():
    blocks = {}
    for script in SCRIPTS:
        found = re.findall(r"# ---- shared:(\w+) .*?\n(.*?)# end shared:\1\n", (HERE / f"{script}.py").read_text(), re.DOTALL)
        assert {name for name, _ in found} >= {"flags", "dist"}
        for name, text in found:
            assert blocks.setdefault(name, text) == text, f"shared:{name} of {script}.py differs"


def test_printed_commands_parse():
    texts = [importlib.import_module(script).__doc__ for script in SCRIPTS]
    texts += [path.read_text() for path in HERE.glob("README.md")]
    commands = re.findall(r"(?:python|torchrun [^\n`]*?) (\w+)\.py([^\n`#(|&]*)", "\n".join(texts))
    assert {script for script, _ in commands} >= set(SCRIPTS)
    for script, flags in commands:
        importlib.import_module(script).parse_args(shlex.split(flags))         # UserError where it does not parse


def test_imports():
    """Everything imported is pinned; scripts import common and no other script, but for vidarc's vidar."""
    requirements = (HERE / "requirements.txt").read_text()
    pinned = [line for line in requirements.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+(\[\w+\])?==[\w.]+", line) for line in pinned)
    known = {re.match(r"[\w-]+", line)[0] for line in pinned} | set(re.findall(r"^#   (\w+) ", requirements, re.MULTILINE))
    for path in HERE.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names = {name.split(".")[0] for name in names} - sys.stdlib_module_names
        ours = {name for name in names if (HERE / f"{name}.py").exists()}
        assert {{"PIL": "pillow"}.get(name, name) for name in names - ours} <= known, path
        assert path.name == "test_smoke.py" or ours <= ({"common", "vidar"} if path.name == "vidarc.py" else {"common"}), path


def test_importing_runs_nothing(tmp_path):
    code = f"import sys, {', '.join(SCRIPTS)}; assert 'torchvision' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not any(tmp_path.iterdir())


# ---- common.py ------------------------------------------------------------------------------------------

def test_randomness_is_a_function_of_the_seed():
    def numbers(*seed):
        return common.seed_all(*seed), random.random(), np.random.rand(), torch.rand(()).item()
    assert numbers(0, 1, 2) == numbers(0, 1, 2)
    assert not set(numbers(0, 1, 2)) & (set(numbers(0, 2, 1)) | set(numbers(1, 1, 2)) | set(numbers(0, 1)))
    kinds = {"i": ("randint", 1000), "u": ("rand",), "n": ("randn", 3, 2)}
    whole = common.draw(kinds, 7, 8)
    parts = [common.draw(kinds, 7, 2, rank=rank, world=2, micro=micro, grad_accum=2) for micro in (0, 1) for rank in (0, 1)]
    assert whole["n"].shape == (8, 3, 2) and all(torch.equal(torch.cat([p[k] for p in parts]), whole[k]) for k in kinds)


def test_tensor_helpers():
    assert common.expand_to(torch.ones(3), torch.ones(3, 2, 4, 4)).shape == (3, 1, 1, 1)
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(common.from_uint8(levels)), levels) and common.to_uint8(torch.tensor([-9., 9.])).tolist() == [0, 255]
    t = torch.tensor([0., .25])
    assert torch.allclose(common.timestep_embedding(t, 4), torch.tensor(
        [[1., 1, 0, 0], [np.cos(250), np.cos(2.5), np.sin(250), np.sin(2.5)]], dtype=torch.float32), atol=1e-4)
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = .9 * a.weight.detach() + .1 * b.weight.detach()
    common.ema_update(a, b, .9)
    assert torch.allclose(a.weight, expected) and common.count_params(a) == 6
    assert common.count_params(a.requires_grad_(False), trainable_only=True) == 0
    assert common.all_mean(3.0) == 3


def test_metric_identities():
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(4, 3, 32, 32, generator=g), torch.rand(4, 3, 32, 32, generator=g)
    assert (common.mse(x, x) == 0).all() and (common.psnr(x, x) == 60).all() and torch.allclose(common.ssim(x, x), torch.ones(4))
    assert torch.allclose(common.psnr(x, x + .1), torch.full((4,), 20.).double(), atol=1e-4)
    assert torch.allclose(common.mse(x, y)[2], ((x[2] - y[2]) ** 2).mean().double()) and (common.ssim(x, y) < .2).all()
    flat_image = torch.ones(1, 3, 32, 32)                          # without structure only the luminance term is left
    assert common.ssim(.5 * flat_image, .25 * flat_image).item() == pytest.approx((2 * .125 + 1e-4) / (.25 + .0625 + 1e-4), abs=1e-4)
    members, truth = torch.randn(5, 7, generator=g).double(), torch.randn(7, generator=g).double()
    pairs = sum((members[i] - members[j]).abs() for i in range(5) for j in range(5)) / (5 * 4)
    assert torch.allclose(common.fair_crps(members, truth), (members - truth).abs().mean(0) - pairs / 2)
    assert torch.allclose(common.fair_crps(members.T, truth, dim=1), common.fair_crps(members, truth))
    assert torch.equal(common.fair_crps(members[:1], truth), (members[0] - truth).abs())
    assert (common.fair_crps(truth.expand(3, 7), truth) == 0).all()


def test_frechet_distance_of_known_gaussians():
    def cloud(mean, root, seed):
        """Points whose sample mean and covariance are exactly `mean` and root root^T."""
        x = torch.randn(50, 3, generator=torch.Generator().manual_seed(seed)).double()
        x = x - x.mean(0)
        return mean + x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T @ root.T
    zero, shift, eye = torch.zeros(3).double(), torch.tensor([1., 2, 2]).double(), torch.eye(3).double()
    a, b = torch.tensor([1., 4, 9]).double(), torch.tensor([4., 1, 16]).double()
    diagonal = common.frechet_distance(cloud(zero, a.sqrt().diag(), 1), cloud(shift, b.sqrt().diag(), 2))
    assert diagonal == pytest.approx(9 + ((a.sqrt() - b.sqrt()) ** 2).sum().item())
    root = torch.tensor([[1., 0, 0], [2, 1, 0], [1, -1, 3]]).double()
    product = a.diag() @ root @ root.T                             # not symmetric: neither covariance commutes with the other
    expected = a.sum() + (root @ root.T).trace() - 2 * torch.linalg.eigvals(product).real.sqrt().sum()
    assert common.frechet_distance(cloud(zero, a.sqrt().diag(), 3), cloud(zero, root, 4)) == pytest.approx(expected.item())
    assert common.frechet_distance(cloud(shift, eye, 1), cloud(shift, eye, 5)) == pytest.approx(0, abs=1e-6)


def test_video_files(tmp_path):
    t, y, x = torch.meshgrid(torch.arange(6.), torch.arange(47.), torch.arange(63.), indexing="ij")
    video = torch.stack([torch.sin(x / 9 + t), torch.cos(y / 7 - t), torch.sin((x + y) / 11)], dim=1)
    mp4 = common.read_video(common.write_video(tmp_path / "a.mp4", video))
    assert mp4.shape == (6, 3, 48, 64) and mp4.dtype == torch.uint8                # padded to even sides
    assert (mp4[..., :47, :63].float() - common.to_uint8(video).float()).abs().mean() < 4
    gif = common.read_video(common.write_video(tmp_path / "a.gif", video))
    assert gif.shape == video.shape and (gif.float() - common.to_uint8(video).float()).abs().mean() < 12
    strip = torch.from_numpy(iio.imread(common.write_video(tmp_path / "new/a.png", video))).permute(2, 0, 1)
    assert torch.equal(strip, torch.cat(list(common.to_uint8(video)), dim=-1))
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(common.UserError, match="cannot read video .*b.mp4"):
        common.read_video(tmp_path / "b.mp4")
    small = common.resize_video(video, 32)
    assert small.shape == (6, 3, 32, 32) and small.amin() >= video.amin() and small.amax() <= video.amax()
    assert torch.equal(common.resize_video(video[..., :47], 47), video[..., :47])
    centre = F.interpolate(video[..., 8:55], (32, 32), mode="area")                # the middle 47 x 47
    assert (small - centre).abs().mean() < .05
    grid = common.video_grid({"truth": video, "prediction": video[:, :1]}, scale=2, gap=4)
    assert grid.shape[:3] == (6, 3, 2 * 94 + 4) and torch.equal(grid[0, :, :94:2, -126::2], common.to_uint8(video)[0])
    assert common.video_grid({"a": video, "b": video}, scale=1, columns=True).shape == (6, 3, 20 + 47, 2 * 63 + 4)


def test_checkpoint_folder(tmp_path, capsys):
    folder, meta = tmp_path / "ckpt", {"script": "s", "args": {"a": 1}}
    state = {"model": {"w": torch.arange(3.)}, "optimizer": {"state": {"w": {"step": torch.tensor(1.)}}, "lr": .5}, "none": {}}
    assert common.find_checkpoint(folder, "s", "auto") is None and common.find_checkpoint(folder, "s", "none") is None
    for step in (9, 10, 100, 1_000_000):
        common.save_checkpoint(folder, step, state, meta, keep_last=3)
    assert [path.name for path in common.checkpoints(folder)] == ["step_000010", "step_000100", "step_1000000"]
    path, read, its_meta = common.find_checkpoint(folder, "s", "auto")
    assert path.name == "step_1000000" and its_meta["step"] == 1_000_000 and its_meta["args"] == {"a": 1}
    assert_same(flat(read), flat(state))
    assert common.find_checkpoint(folder, "s", folder / "step_000010")[0].name == "step_000010"
    assert common.find_checkpoint(tmp_path / "other", "s", tmp_path)[0].name == "step_1000000"     # a run's folder: its newest
    (path / "model.safetensors").unlink()
    (folder / "step_000100/optimizer.pt").write_bytes(b"?" * (folder / "step_000100/optimizer.pt").stat().st_size)
    assert common.find_checkpoint(folder, "s", "auto")[0].name == "step_000010" and "warning: " in capsys.readouterr().err
    common.save_checkpoint(folder, 100, state, meta, keep_last=0)                  # a damaged one makes way
    assert common.find_checkpoint(folder, "s", "auto")[0].name == "step_000100" and len(common.checkpoints(folder)) == 3


def test_a_kill_at_any_moment_of_a_save(tmp_path, monkeypatch):
    """Ends save_checkpoint at its first file operation, at its second, ..., as a kill would: nothing is caught or tidied."""
    class Killed(BaseException):
        pass
    places = [(common, "save_file"), (common.torch, "save"), (common.os, "fsync"), (common.shutil, "rmtree"),
              (Path, "mkdir"), (Path, "rename"), (Path, "write_text")]
    for deadline in range(100):
        folder, left = tmp_path / str(deadline), [deadline]
        for step in (1, 2):
            common.save_checkpoint(folder, step, {"a": {"w": torch.ones(2)}, "b": {"n": step}}, {"script": "s"}, keep_last=2)
        with monkeypatch.context() as patch:
            for owner, name in places:
                def stop(*args, real=getattr(owner, name), **kwargs):
                    if not left[0]:
                        raise Killed
                    left[0] -= 1
                    return real(*args, **kwargs)
                patch.setattr(owner, name, stop)
            try:
                common.save_checkpoint(folder, 3, {"a": {"w": torch.ones(2)}, "b": {"n": 3}}, {"script": "s"}, keep_last=2)
            except Killed:
                pass
        for path in common.checkpoints(folder):
            assert common.load_checkpoint(path, "s")[0]["b"]["n"] == int(path.name[5:])
        assert {path.name for path in common.checkpoints(folder)} >= {"step_000002"}
        common.save_checkpoint(folder, 4, {"a": {}}, {"script": "s"}, keep_last=1)
        assert os.listdir(folder) == ["step_000004"]               # and the next save clears up
        if left[0]:
            break
    assert 8 < deadline < 99


def test_run_files(tmp_path, monkeypatch):
    common.write_json(tmp_path / "a/b.json", {"x": float("nan"), "y": {"z": float("inf"), "v": 1.5}, "s": "NaN"})
    assert json.loads((tmp_path / "a/b.json").read_text()) == {"x": None, "y": {"z": None, "v": 1.5}, "s": "NaN"}
    for step in range(1, 6):
        common.append_jsonl(tmp_path / "metrics.jsonl", {"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')                              # a line that a kill cut off
    log = common.Log(tmp_path, "flow", 3, 9)
    log.row(4, loss=.5)
    log.bar.close()
    assert [json.loads(line) for line in open(tmp_path / "metrics.jsonl")] == [*({"step": i} for i in (1, 2, 3)), {"step": 4, "loss": .5}]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(common.UserError, match="pip install wandb"):
        common.Log(tmp_path, "flow", 3, 9, wandb="project")
    weights = {"a": torch.arange(3.)}
    common.save_weights(tmp_path / "w.safetensors", weights)
    assert_same(common.load_weights(tmp_path / "w.safetensors"), weights)
    cut(tmp_path / "w.safetensors")
    with pytest.raises(common.UserError, match="w.safetensors"):
        common.load_weights(tmp_path / "w.safetensors")


# ---- river_smoke.py -------------------------------------------------------------------------------------

def river_args(*flags):
    return river.parse_args([*shlex.split(SCRIPTS["river_smoke"]["tiny"]), *map(str, flags)])


def overfit_river():
    args, g = river_args(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    field = river.VectorField(args)
    optimizer, losses = torch.optim.Adam(field.parameters(), lr=3e-3), []
    z, smoke = torch.randn(4, 6, 4, 8, 8, generator=g), torch.zeros(4, 6, 8, 8)
    numbers = common.draw({"tau": ("rand",), "t": ("rand",), "c": ("rand",), "eps": ("randn", 4, 8, 8)}, 0, 4)
    for _ in range(150):
        loss = river.river_loss(field, z, smoke, numbers, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("sigma", [0, .1])
@pytest.mark.parametrize("path", ["river", "bridge"])
def test_probability_path(path, sigma):
    args, h = Namespace(path=path, sigma=sigma, bridge_noise=.5), 1e-3
    z, previous, eps = torch.randn(3, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    at = lambda t: river.probability_path(z, previous, eps, torch.full((5,), t).double(), args)
    x0 = eps if path == "river" else previous + .5 * eps
    assert torch.allclose(at(0)[0], x0) and torch.allclose(at(1)[0], z + sigma * x0)
    for t in (.1, .5, .999):
        assert torch.allclose(at(t)[1], (at(t + h)[0] - at(t - h)[0]) / (2 * h))


class Field:
    """Stands for the network: notes its arguments, answers velocity(x, t)."""
    def __init__(self, velocity):
        self.velocity, self.calls = velocity, []

    def __call__(self, z_t, past, present, distance, t):
        self.calls.append(Namespace(x=z_t, past=past, present=present, distance=distance, t=t))
        return self.velocity(z_t, common.expand_to(t, z_t))


@pytest.mark.parametrize("path", ["river", "bridge"])
def test_river_loss_equals_the_paper(path):
    """Steps 3 to 9 written sample by sample with the paper's indices: frames x^1..x^n, tau in 2..n, c in 1..tau-2."""
    args = river_args("--path", path, "--sigma", .1, "--smoke_weight", 5, "--history", 2)
    B, n, g = 300, 6, torch.Generator().manual_seed(0)
    z, smoke = torch.randn(B, n, 2, 4, 4, generator=g).double(), torch.rand(B, n, 4, 4, generator=g) < .3
    numbers = {name: torch.rand(B, generator=g).double() for name in ("tau", "t", "c")} | {"eps": torch.randn(B, 2, 4, 4, generator=g).double()}
    field, losses, seen, velocities = Field(lambda x, t: x.sin() + t), [], set(), []
    loss = river.river_loss(field, z, smoke, numbers, args)
    call, = field.calls
    for b in range(B):
        frame = lambda i: z[b, i - 1]
        tau = 2 + int(numbers["tau"][b] * (n - 1))
        c = 1 + int(numbers["c"][b] * (tau - 2))
        t, eps = numbers["t"][b], numbers["eps"][b]
        x0 = eps if path == "river" else frame(tau - 1) + .5 * eps
        z_t, u_t = (1 - .9 * t) * x0 + t * frame(tau), frame(tau) - .9 * x0
        assert torch.allclose(call.x[b], z_t) and call.t[b] == t
        assert torch.equal(call.past[b, 0], frame(tau - 1))
        assert call.present[b].tolist() == [True, tau >= 3, tau >= 3]              # z^{tau-1}, z^{tau-2}, z^c
        if tau >= 3:
            assert c <= tau - 2 and call.distance[b] == tau - c
            assert torch.equal(call.past[b, 1], frame(tau - 2)) and torch.equal(call.past[b, 2], frame(c))
        else:
            assert call.distance[b] == 0
        seen.add((tau, c))
        weight = 1 + 4 * smoke[b, tau - 1].double()
        losses.append((weight / weight.mean() * (z_t.sin() + t - u_t) ** 2).mean())
        velocities.append(u_t)
    assert seen == {(2, 1), *((tau, c) for tau in range(3, n + 1) for c in range(1, tau - 1))}
    assert torch.allclose(loss, torch.stack(losses).mean())
    constant = river.river_loss(Field(lambda x, t: torch.stack(velocities) + 1), z, smoke, numbers, args)
    assert constant.item() == pytest.approx(1)                     # the smoke weight shifts attention, not the scale


def test_the_field_ignores_absent_frames():
    torch.manual_seed(0)
    field = river.VectorField(river_args("--history", 2))
    for p in field.parameters():
        nn.init.normal_(p, std=.2)
    z, past, other = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 4, 8, 8), torch.randn(2, 3, 4, 8, 8)
    for i in range(3):
        mixed, present = past.clone(), torch.ones(2, 3).bool()
        mixed[:, i] = other[:, i]
        call = lambda p: field(z, p, present, torch.tensor([0, 3]), torch.tensor([.1, .7]))
        assert not torch.allclose(call(mixed), call(past))
        present[:, i] = False
        assert torch.equal(call(mixed), call(past))


def forecast(velocity, observed, *flags, seed=3):
    """generate() with a stub field -> latents, the calls, the noise of its first frame."""
    args, field = river_args(*flags), Field(velocity)
    z = river.generate(field, observed, args, torch.Generator().manual_seed(seed))
    return z, field.calls, torch.randn(observed[:, -1].shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("solver", ["euler", "midpoint", "ab2"])
def test_solvers_reach_closed_forms(solver):
    observed, target = torch.randn(2, 3, 4, 2, 2, 2).double().unbind(0)
    target = target[:, 0]
    for warm in (0, .2, .5):
        flags = ["--solver", solver, "--warm_start", warm, "--frames_to_generate", 1]
        for steps in (1, 2, 5):
            z, calls, eps = forecast(lambda x, t: (target - x) / (1 - t), observed, *flags, "--steps", steps)
            start = (1 - warm) * eps + warm * observed[:, -1]      # z'_s ~ p_s(z | z^{T-1})
            assert torch.allclose(calls[0].x, start) and torch.allclose(calls[0].t, torch.tensor(float(warm)))
            assert torch.allclose(z[:, 0], target, atol=1e-5)
            z, _, _ = forecast(lambda x, t: target, observed, *flags, "--steps", steps)
            assert torch.allclose(z[:, 0], start + (1 - warm) * target)
        # dx/dt = x grows by e^(1-s). The error of a first-order solver halves with the step, of a second-order one quarters.
        errors = [(forecast(lambda x, t: x, observed, *flags, "--steps", n)[0][:, 0] - start * np.exp(1 - warm)).abs().mean()
                  for n in (40, 80)]
        assert errors[0] / errors[1] == pytest.approx(2 if solver == "euler" else 4, rel=.1)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "ab2"])
def test_network_calls(solver):
    expected = {0: [1, 2, 3, 4, 5, 6], .2: [1, 2, 2, 3, 4, 5], .5: [1, 1, 2, 2, 2, 3], .9: [1, 1, 1, 1, 1, 1]}
    for warm, counts in expected.items():
        for steps, count in enumerate(counts, 1):
            args = river_args("--solver", solver, "--steps", steps)
            z, calls, _ = forecast(lambda x, t: x, torch.zeros(2, 3, 4, 2, 2), "--solver", solver, "--steps", steps, "--warm_start", warm)
            assert river.network_calls(args, warm) == count and len(calls) == 3 * count and z.shape == (2, 3, 4, 2, 2)
            times = [call.t[0].item() for call in calls[:count]]
            assert times == sorted(times) and times[0] == pytest.approx(warm) and times[-1] < 1


def test_contexts_stay_within_reach():
    """Frame i holds the number i, so that a context tells which frame it is; 8 frames observed, distances up to 5 trained."""
    observed = torch.arange(8.).view(1, 8, 1, 1, 1).expand(200, 8, 4, 2, 2)
    for horizon, distances in ((0, {2, 3, 4, 5}), (3, {2, 3}), (2, {2}), (7, {2, 3, 4, 5})):
        _, calls, _ = forecast(lambda x, t: 0 * x, observed, "--past_horizon", horizon, "--frames_to_generate", 1, "--steps", 1, "--history", 2)
        call, = calls
        assert call.present.all() and set(call.distance.tolist()) == distances
        assert torch.equal(call.past[:, 2, 0, 0, 0], 8. - call.distance)
        assert (call.past[:, 0] == 7).all() and (call.past[:, 1] == 6).all()
    z, calls, _ = forecast(lambda x, t: 0 * x, observed[:, :1], "--steps", 2, "--solver", "euler", "--history", 2)
    assert z.shape[1] == 3 and [call.present[0].tolist() for call in calls[:4]] == 2 * [[True, False, False]] + 2 * [[True, True, True]]
    assert (calls[0].distance == 0).all() and torch.equal(calls[0].x, calls[1].x) and (calls[2].distance == 2).all()
    assert all(len({tuple(call.distance.tolist()) for call in forecast(
        lambda x, t: 0 * x, observed, "--steps", 2, "--frames_to_generate", 1)[1]}) == 1 for _ in range(1))    # one context per step


def test_windows():
    videos = [("a", 0, np.arange(1, 6)), ("b", 5, np.array([1, 2, 3, 5, 6, 7, 8])), ("c", 12, np.arange(2))]
    starts, lost, short = river.window_starts(videos, 3, drop_short=True)
    assert starts.tolist() == [0, 1, 2, 5, 8, 9] and (lost, short) == (3, 1)       # b without a gap would have 6
    with pytest.raises(common.UserError, match="clip c has 2 frames"):
        river.window_starts(videos, 3)
    with pytest.raises(common.UserError, match="no clip has 6 consecutive"):
        river.window_starts(videos, 6, drop_short=True)


def test_data_layouts(trained, tmp_path):
    data = trained("river_smoke").data
    frames, videos = river.load_clips(data, "train")
    assert frames.shape == (8 * 14, 3, 64, 64) and [first for _, first, _ in videos] == list(range(0, 112, 14))
    assert np.array_equal(frames[15].permute(1, 2, 0), iio.imread(data / "train/sim000001_frame_0002.png"))
    for path in (data / "train").iterdir():
        video, number = path.stem.split("_frame_")
        (tmp_path / "train" / video).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "train" / video / f"{int(number):05d}.png")
    again, folders = river.load_clips(tmp_path, "train")
    assert torch.equal(frames, again) and str(videos) == str(folders)


def test_clips_are_mirrored_whole_and_latents_normalised(trained, tmp_path, monkeypatch):
    base, windows, real = trained("river_smoke"), [], river.river_loss
    monkeypatch.setattr(river, "river_loss", lambda field, z, *rest: windows.append(z) or real(field, z, *rest))
    reuse = SCRIPTS["river_smoke"]["reuse"].format(run=base.run)
    assert launch("river_smoke", f"--data_dir {base.data} --output_dir {tmp_path} {reuse} --batch_size 16 --eval_every 0") == 0
    autoencoder = river.Autoencoder(river_args())
    autoencoder.load_state_dict(common.load_weights(base.run / "autoencoder/autoencoder.safetensors"))
    x = common.from_uint8(river.load_clips(base.data, "train")[0])
    z = autoencoder.eval().encode(x).unflatten(0, (8, 14))
    assert z.mean((0, 1, 3, 4)).abs().max() < 1e-3 and (z.std((0, 1, 3, 4)) - 1).abs().max() < 1e-3
    views = torch.stack([z, autoencoder.encode(x.flip(-1)).unflatten(0, (8, 14))]).unfold(2, 6, 1).movedim(-1, 3)
    errors = [(views - window).abs().amax((3, 4, 5, 6)) for window in torch.cat(windows)]          # view, clip, start
    assert len(errors) == 64 and max(error.min() for error in errors) < 1e-2
    assert {int(error.flatten(1).amin(1).argmin()) for error in errors} == {0, 1}


def test_fsq_and_vq(trained, tmp_path):
    torch.manual_seed(0)
    for flags in ((), ("--quantizer", "vq", "--codes", 16)):
        quantizer = river.Autoencoder(river_args(*flags)).quantizer.eval()
        z = torch.randn(4, 4, 8, 8, requires_grad=True)
        code = quantizer.nearest(quantizer.latent(z))
        assert torch.allclose(quantizer.nearest(code), code, atol=1e-6)
        value, commitment = quantizer(z)
        assert torch.allclose(value, code, atol=1e-6)
        value.sum().backward()
        assert (z.grad > 0).all() and torch.isfinite(commitment)
    centres = 5 + torch.randn(16, 4)                               # far from the initial codes: without restarts all but few stay dead
    clusters = lambda: (centres[torch.arange(256) % 16] + .01 * torch.randn(256, 4)).T.reshape(1, 4, 16, 16)
    quantizer.train()
    for _ in range(60):
        quantizer(clusters())
    assert quantizer.usage(clusters()) >= .75 and F.mse_loss(quantizer.nearest(z := clusters()), z) < .3
    base = trained("river_smoke")
    for i, flags in enumerate(("--quantizer vq --codes 16 --dtype bfloat16 --grad_checkpoint", "--path bridge --smoke_weight 5 --grad_clip 0")):
        assert launch("river_smoke", f"--data_dir {base.data} --output_dir {tmp_path / str(i)} {flags}") == 0
        assert all(value.isfinite().all() for stage in ("autoencoder", ".") for value in saved(tmp_path / str(i), stage).values()
                   if torch.is_tensor(value))


def test_gan(trained, tmp_path):
    """The discriminator learns at once; the decoder does not hear it before the last share of training, and then does."""
    def weights(name, flags):
        run = tmp_path / name
        assert launch("river_smoke", f"--data_dir {trained('river_smoke').data} --output_dir {run} --ae_steps 2 --max_steps 1 "
                                     f"--save_every 1 --grad_clip 0 {flags}") == 0
        return [common.load_checkpoint(path, "river_smoke/autoencoder")[0]["model"] for path in common.checkpoints(run / "autoencoder/ckpt")]
    off, late, heard = weights("off", "--masked_finetune 0"), weights("late", "--gan .1 --masked_finetune 0"), weights("heard", "--gan .1 --masked_finetune 1")
    plain = weights("plain", "--masked_finetune 1")
    discriminator = [name for name in late[0] if name.startswith("discriminator")]
    assert len(discriminator) > 6 and all(not torch.equal(late[0][name], late[1][name]) for name in discriminator)
    assert all(torch.allclose(late[1][name], off[1][name], atol=1e-6) for name in off[1])
    decoder = [name for name in off[0] if name.startswith("autoencoder.decoder") and name.endswith("weight")]
    assert decoder and all(not torch.allclose(heard[1][name], plain[1][name], atol=1e-5) for name in decoder)


def test_simulated_smoke():
    a, b, c = (river.simulate_smoke(2, 6, seed) for seed in (1, 1, 2))
    assert a.shape == (2, 6, 64, 64, 3) and a.dtype == np.uint8 and np.array_equal(a, b) and not np.array_equal(a, c)
    for clip in (*a, *c):
        assert (clip == 0).mean() > .3 and clip.max() > 60 and clip[-1].mean() > .5
        assert np.abs(np.diff(clip.astype(float), axis=0)).mean(axis=(1, 2, 3)).min() > .1


def test_extract(tmp_path, capsys):
    """A soft white blob drifts over a static texture; in a third video nothing moves."""
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(96.), torch.arange(128.), indexing="ij")
    for name, brightness in (("one", 235.), ("two", 200.), ("none", 0.)):
        texture = F.interpolate(torch.rand(1, 3, 12, 16, generator=g) * 120 + 20, (96, 128), mode="bilinear")
        alpha = torch.stack([torch.exp(-((x - 4 - 8 * k) ** 2 + (y - 48) ** 2) / 150) for k in range(16)])[:, None]
        alpha = alpha * (brightness > 0)
        common.write_video(tmp_path / f"videos/{name}.mp4", (texture * (1 - alpha) + brightness * alpha).byte())
    flags = f"--extract {tmp_path / 'videos'} --data_dir {tmp_path / 'set'}"
    assert launch("river_smoke", flags) == 0
    assert "2 clips kept, 1 dropped" in capsys.readouterr().out
    listed = [line for split in ("train", "val", "test") for line in (tmp_path / f"set/{split}_files.txt").read_text().splitlines()]
    assert sorted(listed) == sorted(f"{path.parent.name}/{path.name} 1" for path in (tmp_path / "set").glob("*/*.png"))
    assert {re.sub("_frame.*", "", Path(line).name) for line in listed} == {"one", "two"} and len(listed) == 32
    for path in (tmp_path / "set").glob("*/*_frame_0009.png"):     # the blob stands at x = 68 of 128: column 35 of 64
        grey = iio.imread(path).astype(float).mean(-1)
        assert grey.shape == (64, 64) and grey.max() > 90 and (grey == 0).mean() > .6
        assert np.average(np.arange(64), weights=grey.sum(0)) == pytest.approx((68.5 * 64 / 96) - 11 - .5, abs=1.5)
        assert np.average(np.arange(64), weights=grey.sum(1)) == pytest.approx(31.8, abs=1.5)
    before = files(tmp_path / "set")
    assert launch("river_smoke", flags) == 2
    assert "exists already" in the_error(capsys, "river_smoke") and files(tmp_path / "set") == before


class Detector(nn.Module):
    """Has the call of StyleGAN-V's I3D."""
    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = False):
        assert resize and return_features and not rescale
        return x.mean(dim=[2, 3]).flatten(1)[:, :8]


def test_evaluation(trained, tmp_path):
    """Two processes measure what one does, FVD is reported with the detector and only then."""
    base, made = trained("river_smoke"), []
    shutil.copytree(base.data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/test")                          # more clips to test on: groups for both processes
    shutil.copytree(base.data / "train", tmp_path / "data/test")
    shutil.copy(base.data / "train_files.txt", tmp_path / "data/test_files.txt")
    torch.jit.script(Detector()).save(tmp_path / "i3d.pt")
    for world in (1, 2):
        run = tmp_path / str(world)
        shutil.copytree(base.run, run)
        ranks = start("river_smoke", f"--eval --data_dir {tmp_path / 'data'} --output_dir {run} --eval_clips 8 "
                                     f"--i3d {tmp_path / 'i3d.pt'}", tmp_path / "log", world, full=True)
        assert wait(ranks) == [0] * world
        report = json.loads((run / "eval.json").read_text())
        made.append({key: value for key, value in flat(report).items() if "seconds" not in key})
    assert made[0].keys() == made[1].keys() and "/results/fvd_i3d_N8_T7" in made[0]
    for key, value in made[0].items():
        assert made[1][key] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value)
    assert "fvd" not in (base.run / "eval.json").read_text()


def test_forecast_scores():
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 4, 3, 64, 64, generator=g)
    perfect = river.forecast_scores(truth[:, None].expand(-1, 3, -1, -1, -1, -1), truth)
    ideal = dict.fromkeys(perfect, 0.) | {"psnr": 60., "psnr_ensemble_mean": 60., "ssim": 1., "mask_iou": 1.}
    for name, values in perfect.items():
        assert values.shape == (2, 4) and torch.allclose(values.double(), torch.full((2, 4), ideal[name]).double(), atol=1e-5), name
    noisy = (truth[:, None] + .1 * torch.randn(2, 6, 4, 3, 64, 64, generator=g)).clone()
    scores = river.forecast_scores(noisy, truth)
    assert (scores["psnr_ensemble_mean"] > scores["psnr"] + 5).all() and (scores["crps"] < scores["mae"]).all()
    assert torch.allclose(scores["ensemble_variance"].sqrt().float(), torch.tensor(.1 * (7 / 6) ** .5), atol=1e-3)
    shifted = river.forecast_scores(torch.roll(truth, 0, -1)[:, None] * .5, truth)
    assert torch.allclose(shifted["mass_error"], torch.tensor(.5), atol=1e-5) and (shifted["crps"] == shifted["mae"]).all()
    blob = torch.zeros(1, 1, 3, 64, 64)
    blob[..., 20:30, 20:30] = 1
    moved = river.forecast_scores(torch.roll(blob, (3, 4), (-2, -1))[:, None], blob)
    assert moved["centroid_px"].item() == pytest.approx(5) and moved["mask_iou"].item() == pytest.approx(42 / 158)
