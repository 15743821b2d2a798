"""server.py: serves a policy of vidarc.py over a websocket, in the protocol of openpi's clients.

Run         python vidarc.py --serve 8000
Protocol    Binary msgpack messages, in which an array is a map with byte-string keys. The server first sends
            metadata, then answers each observation with {"actions": (n, 14), ...}. Errors are text messages;
            the connection stays open. GET /healthz answers OK. A new connection starts a new episode.
Observation {"images": {"cam_high", "cam_left_wrist", "cam_right_wrist": [n] 3 H W or [n] H W 3 uint8},
            "prompt": text, "state": (14,) current joint positions (optional), "reset": true for a new episode
            (optional)}. n frames since the last request, at 10 fps. A "mosaic" can replace the cameras.
"""
import functools
import threading
import time

import numpy as np
import torch
import torch.nn.functional as F

import common
from common import UserError

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")


def mosaic(head, left=None, right=None):
    """Camera images H W 3 uint8 -> 720 640 3 uint8: the head camera above the wrist cameras. The head image
    replaces that of a missing wrist camera."""
    views = []
    for view, size in ((head, (480, 640)), (left, (240, 320)), (right, (240, 320))):
        view = np.array(head if view is None else view)              # a copy: received arrays are read-only
        views.append(resize_images(view[None], size)[0])
    return np.concatenate([views[0], np.concatenate(views[1:], axis=1)])


def resize_images(images, size):
    """n H W 3 uint8 -> n h w 3 uint8 of `size` (h, w), anti-aliased."""
    if images.shape[1:3] == tuple(size):
        return images
    images = torch.from_numpy(np.array(images)).movedim(-1, 1)
    return F.interpolate(images, tuple(size), mode="bicubic", antialias=True).movedim(1, -1).numpy()


def pack_array(value):
    """NumPy arrays and scalars -> maps, for msgpack.packb(default=...)."""
    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype.kind in "VOc":
        raise TypeError(f"{type(value).__name__} cannot be sent")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def unpack_array(value):
    """Inverse of pack_array, for msgpack.unpackb(object_hook=...). It never unpickles."""
    if b"__ndarray__" in value:
        return np.ndarray(value[b"shape"], np.dtype(value[b"dtype"]), value[b"data"])
    if b"__npgeneric__" in value:
        return np.dtype(value[b"dtype"]).type(value[b"data"])
    return value


def read_frames(observation, size):
    """An observation -> mosaics n H W 3 uint8 of `size`. Raises UserError for a malformed one."""
    images = observation.get("images") if isinstance(observation, dict) else None
    if not isinstance(images, dict) or not {"cam_high", "mosaic"} & images.keys():
        raise UserError('the observation has no "images" with "cam_high" (or "mosaic")')
    videos = {}
    for name in ["mosaic"] if "mosaic" in images else [name for name in CAMERAS if name in images]:
        video = np.asarray(images[name])
        video = video[None] if video.ndim == 3 else video
        if video.ndim == 4 and video.shape[1] == 3 != video.shape[-1]:
            video = np.moveaxis(video, 1, -1)
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not video.size:
            raise UserError(f"image {name} is {video.dtype} {video.shape}, not uint8 with 3 channels")
        videos[name] = video
    counts = {len(video) for video in videos.values()}
    if len(counts) > 1:
        raise UserError(f"the cameras have different numbers of frames: {sorted(counts)}")
    if "mosaic" not in videos:
        rows = zip(*(videos.get(name, videos["cam_high"]) for name in CAMERAS))
        videos["mosaic"] = np.stack([mosaic(*row) for row in rows])
    return resize_images(videos["mosaic"], size)


def make_server(policy, port, host="0.0.0.0"):
    """A websocket server that answers with policy.act(). serve_forever() runs it, with a thread per
    connection. Port 0 takes a free port, which socket.getsockname() returns."""
    try:
        import msgpack
        from websockets.sync.server import serve
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install {error.name}") from error
    pack = functools.partial(msgpack.packb, default=pack_array)
    size = policy.args.height, policy.args.width
    lock, episode = threading.Lock(), {"connection": None}

    def answer(connection, message):
        if isinstance(message, str):
            raise UserError("an observation must be a binary message of msgpack")
        observation = msgpack.unpackb(message, object_hook=unpack_array)
        frames = read_frames(observation, size)
        if episode["connection"] is not connection or observation.get("reset"):
            policy.reset()
            episode["connection"] = connection
        began = time.monotonic()
        actions = policy.act(frames, observation.get("prompt", ""), observation.get("state"))
        return {"actions": actions, "server_timing": {"infer_ms": 1000 * (time.monotonic() - began)}}

    def handle(connection):
        connection.send(pack({"script": "vidarc", "action_dim": 14, "fps": 10, "image_size": list(size),
                              "chunk_size": policy.args.chunk_size}))
        for message in connection:
            with lock:                           # the policy handles one request at a time
                try:
                    reply = pack(answer(connection, message))
                except Exception as error:       # no request may stop the server
                    reply = f"{type(error).__name__}: {common.reason(error)}"
            connection.send(reply)

    def healthz(connection, request):
        return connection.respond(200, "OK\n") if request.path == "/healthz" else None

    return serve(handle, host, port, compression=None, max_size=None, process_request=healthz)
