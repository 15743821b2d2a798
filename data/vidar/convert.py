"""convert.py: readers of robot data for `prepare.py --from`: RoboTwin 2.0, LeRobot, ALOHA HDF5.

list_recordings(source_format, src, args) lists the episodes; open_recording(recording, args) opens cameras,
joint positions (T, n) and instruction of one of them, at its frame rate and size.

robotwin    joint_action/vector of the first layout of RoboTwin 2.0, state/* of XPolicyLab's. JPEGs have red
            and blue swapped unless they have the comment "XPL-RGB1" (RoboTwin pull request 500).
lerobot     observation.state of format versions 2.0, 2.1 and 3.0, in any codec that ffmpeg decodes.
hdf5        observations/qpos and observations/images/cam_*. The files have no frame rate: --src_fps.

These columns are the joint positions that frame t shows; `action` is the command for a later frame.
"""
import contextlib
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import imageio.v3 as iio
import numpy as np
from PIL import Image

import common
from common import UserError

ROBOTWIN_FPS = 250 / 15         # a frame per 15 physics steps of 1/250 s; rates stored in files are wrong
RGB_MARKER = b"XPL-RGB1"        # JPEG comment of RoboTwin images with red and blue in the usual order
CAMERA_WORDS = {"head": ("high", "head", "top", "front"), "left": ("left",), "right": ("right",)}


@dataclass
class Recording:
    """One episode of a source, not yet read."""
    source_format: str
    path: Path                                     # file with the joint positions
    name: str                                      # in messages and the manifest
    number: int                                    # index in the data set
    fps: float
    cameras: dict                                  # {"head", "left", "right": name}; wrists are optional
    length: int | None = None                      # LeRobot: frames
    instruction: str = ""                          # LeRobot
    videos: dict = field(default_factory=dict)     # LeRobot: {camera: (file, start in seconds or None)}


@contextlib.contextmanager
def readable(path):
    """Converts errors of other libraries to a UserError that names the file."""
    try:
        yield
    except (KeyError, OSError, RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {common.reason(error)}") from error


def list_recordings(source_format, src, args) -> list[Recording]:
    """-> the recordings below src. Raises UserError if there are none or if a camera is missing."""
    if source_format == "lerobot":
        return list_lerobot(src, args)
    return list_hdf5(source_format, src, args)


@contextlib.contextmanager
def open_recording(recording, args):
    """-> {"head", "left", "right": Images or Video}, joint positions (T, n), instruction."""
    if recording.source_format == "lerobot":
        yield read_lerobot(recording, args.actions)
    else:
        reader = read_robotwin if recording.source_format == "robotwin" else read_hdf5
        with h5py.File(recording.path) as file:
            yield reader(recording, file, args.actions)


# ---- images ---------------------------------------------------------------------------------------------

def choose_cameras(available, args, source):
    """-> {"head", "left", "right": camera name}, from --cameras or by the words in the available names."""
    def find(view):
        for word in CAMERA_WORDS[view]:
            matches = [name for name in available if word in name]
            if view == "head":
                matches = [name for name in matches if "left" not in name and "right" not in name]
            if len(matches) == 1:
                return matches[0]

    chosen = dict(zip(CAMERA_WORDS, args.cameras or map(find, CAMERA_WORDS)))
    for view, name in list(chosen.items()):
        if name == "none" and view != "head":
            del chosen[view]
        elif name not in available:
            raise UserError(
                f"{source} has no {view} camera{f' {name}' if args.cameras else ''}; its cameras are: "
                f"{', '.join(available)}. Set --cameras HEAD LEFT RIGHT, with none for a missing wrist")
    return chosen


@dataclass
class Images:
    """Encoded images (a sequence of bytes), or T H W 3 uint8. robotwin: red and blue may be swapped."""
    rows: object
    path: Path
    robotwin: bool = False

    def __len__(self):
        return len(self.rows)

    def frames(self, indices):
        """Yields H W 3 uint8, RGB."""
        for index in indices:
            with readable(f"{self.path}, frame {index}"):
                row = self.rows[index]
                if getattr(row, "ndim", 0) > 1:
                    image = row
                else:
                    with Image.open(io.BytesIO(np.asarray(row).tobytes())) as file:
                        marked = file.info.get("comment") == RGB_MARKER
                        image = np.asarray(file.convert("RGB"))
                    if self.robotwin and not marked:
                        image = image[..., ::-1]
                if image.dtype != np.uint8 or image.shape[2:] != (3,):
                    raise ValueError(f"image is {image.dtype} {image.shape}, not uint8 (H, W, 3)")
            yield image


@dataclass
class Video:
    """`length` frames of a video file, from `start` seconds. With start None, the whole file."""
    path: Path
    start: float | None
    length: int

    def __len__(self):
        return self.length

    def frames(self, indices):
        """Yields frames at ascending indices, H W 3 uint8, RGB, then checks the number of frames."""
        frames = common.video_frames(self.path)
        if self.start is not None:
            limit = ["-fps_mode", "passthrough", "-frames:v", str(self.length)]
            frames = iio.imiter(self.path, plugin="FFMPEG", output_params=limit,
                                input_params=["-ss", str(self.start)])
        selected = set(indices.tolist())
        count = 0
        with readable(self.path):
            for count, frame in enumerate(frames, 1):
                if count - 1 in selected:
                    yield frame
        if count != self.length:
            raise UserError(f"{self.path} has {count} frames from {self.start or 0:.2f} s, not {self.length}")


# ---- RoboTwin and ALOHA: HDF5 ---------------------------------------------------------------------------

def list_hdf5(source_format, src, args):
    """Recordings of an .hdf5 file or of all files below a folder, in the order of their numbers."""
    files = common.find_files(src, [".hdf5", ".h5"])[0] if src.is_dir() else [src]
    if not files:
        raise UserError(f"{src} holds no .hdf5 files")

    def number(path):
        return int((re.findall(r"\d+", path.stem) or [0])[-1])

    recordings = []
    for path in sorted(files, key=lambda path: (path.parent, number(path), path)):
        with readable(path), h5py.File(path) as file:
            if source_format == "hdf5":
                fps = args.src_fps or float(np.ravel(file.attrs.get("fps", 0))[0])
                available = list(file["observations/images"])
            elif "joint_action" in file or "state" in file:
                fps = args.src_fps or ROBOTWIN_FPS
                available = list(file["observation" if "joint_action" in file else "vision"])
            else:
                raise UserError(f"{path} is not a RoboTwin 2.0 file: it has neither joint_action nor state")
            cameras = choose_cameras(available, args, path)
        recordings.append(Recording(source_format, path, str(path), number(path), fps, cameras))
    return recordings


def join_columns(columns):
    """Arrays (T,) or (T, n) -> (T, sum of n)."""
    columns = [np.asarray(column).astype(np.float64, casting="same_kind") for column in columns]
    return np.concatenate([column.reshape(len(column), -1) for column in columns], axis=1)


def choose_text(texts, number=0):
    """Instruction `number` of several, modulo their count; "" if there are none."""
    texts = [texts] if isinstance(texts, str) else texts
    return texts[number % len(texts)] if texts else ""


def read_robotwin(recording, file, columns):
    """First layout: joint_action/vector, ../instructions/episode0.json. XPolicyLab: state, instructions."""
    if "joint_action" in file:
        columns = columns or "joint_action/vector"
        pattern = "observation/{}/rgb"
        text_file = recording.path.parents[1] / "instructions" / f"{recording.path.stem}.json"
        texts = common.read_json(text_file)["seen"] if text_file.is_file() else []
    else:
        sides = [f"state/{side}_{part}_joint_states" for side in ("left", "right") for part in ("arm", "ee")]
        columns = columns or ",".join(sides)
        pattern = "vision/{}/colors"
        texts = json.loads(np.ravel(file["instructions"][()])[0]) if "instructions" in file else []
    cameras = {view: Images(file[pattern.format(name)], recording.path, robotwin=True)
               for view, name in recording.cameras.items()}
    actions = join_columns([file[name][()] for name in columns.split(",")])
    return cameras, actions, choose_text(texts, recording.number)


def read_hdf5(recording, file, columns):
    """The instruction is an attribute, or is in a JSON file in the same folder, as in RDT's data."""
    text = np.ravel(file.attrs.get("instruction", ""))[0]
    text = text.decode() if isinstance(text, bytes) else text
    text_file = recording.path.with_name("expanded_instruction_gpt-4-turbo.json")
    if not text and text_file.is_file():
        text = choose_text(common.read_json(text_file)["instruction"])
    cameras = {view: Images(file[f"observations/images/{name}"], recording.path)
               for view, name in recording.cameras.items()}
    columns = columns or "observations/qpos"
    return cameras, join_columns([file[name][()] for name in columns.split(",")]), str(text)


# ---- LeRobot --------------------------------------------------------------------------------------------

def import_parquet():
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading LeRobot data needs pyarrow: pip install pyarrow") from error
    return pyarrow.parquet


def list_lerobot(src, args):
    """Recordings of a data set, at the path templates of meta/info.json."""
    import_parquet()
    path = src / "meta/info.json"
    if not path.is_file():
        raise UserError(f"{src} has no meta/info.json: SRC must be the root of a LeRobot data set")
    with readable(path):
        info = common.read_json(path)
        version = info["codebase_version"]
        features = info["features"]
        fps = args.src_fps or float(info.get("fps") or 0)
        images = [name for name, feature in features.items() if feature["dtype"] in ("image", "video")
                  and not (feature.get("info") or {}).get("video.is_depth_map")]
    if version not in ("v2.0", "v2.1", "v3.0"):
        raise UserError(f"{src} has LeRobot's format version {version}; v2.0, v2.1 and v3.0 can be read")
    cameras = choose_cameras(images, args, src)
    if re.search("right.*left", str(features.get("observation.state"))):
        print("note: the right arm is named first, but the columns keep their order: in openpi's data sets "
              "with such names, the left arm comes first.")
    with readable(src / "meta"):
        return [lerobot_recording(src, info, row, cameras, fps) for row in lerobot_episodes(src, version)]


def lerobot_episodes(src, version):
    """Rows of meta/episodes.jsonl, or of meta/episodes/*/*.parquet without the large statistics."""
    if version != "v3.0":
        text = common.read_text(src / "meta/episodes.jsonl")
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    rows = []
    for path in sorted((src / "meta/episodes").rglob("*.parquet")):
        columns = [name for name in import_parquet().read_schema(path).names if not name.startswith("stats/")]
        rows += import_parquet().read_table(path, columns=columns, use_threads=False).to_pylist()
    return rows


def lerobot_recording(src, info, row, cameras, fps):
    """A row of the episodes -> Recording. In version 3.0, each camera has a file index and a start time."""
    number = row["episode_index"]
    fields = {"episode_index": number, "episode_chunk": number // info.get("chunks_size", 1000),
              "chunk_index": row.get("data/chunk_index"), "file_index": row.get("data/file_index")}
    path = src / info["data_path"].format(**fields)
    recording = Recording("lerobot", path, f"{src} (episode {number})", number, fps, cameras,
                          row["length"], choose_text(row.get("tasks")))
    for camera in cameras.values():
        if info["features"][camera]["dtype"] == "video":
            start = None
            if "data/file_index" in row:
                fields["chunk_index"] = row[f"videos/{camera}/chunk_index"]
                fields["file_index"] = row[f"videos/{camera}/file_index"]
                # Half a frame earlier, since timestamps are rounded; --src_fps does not change them.
                start = max(0, row[f"videos/{camera}/from_timestamp"] - .5 / info["fps"])
            recording.videos[camera] = src / info["video_path"].format(video_key=camera, **fields), start
    return recording


def read_lerobot(recording, columns):
    """Frames are in videos, or in the table as struct{bytes, path} columns."""
    columns = (columns or "observation.state").split(",")
    images = [name for name in recording.cameras.values() if name not in recording.videos]
    table = import_parquet().read_table(
        recording.path, columns=list({"frame_index", *columns, *images}), use_threads=False,
        filters=[("episode_index", "==", recording.number)]).sort_by("frame_index")
    cameras = {}
    for view, name in recording.cameras.items():
        if name in recording.videos:
            cameras[view] = Video(*recording.videos[name], recording.length)
        else:
            cameras[view] = Images([image["bytes"] for image in table[name].to_pylist()], recording.path)
    return cameras, join_columns([table[name].to_pylist() for name in columns]), recording.instruction
