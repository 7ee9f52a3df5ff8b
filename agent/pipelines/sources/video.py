"""Frames of a camera, a stream or a file, as JPEG, by an ffmpeg process.

Nothing that is declared can become an option of ffmpeg: paths are absolute, URLs have a scheme, and both follow `-i`.
Which protocols ffmpeg may use at all is said to it, so no playlist leads it to files, or from a file to the network.
"""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from agent.pipelines.config import VideoSource
from agent.pipelines.content import identity
from agent.pipelines.frames import FrameError, FrameReader
from agent.pipelines.items import Answer, Item, Progress, SourceError

FRAME_LIMIT = 32 << 20
STALL_S = 30.0
LOOK_S = 2.0
PIECE = 1 << 18
KEY = "video"
ADDRESS = re.compile(r" @ 0x[0-9a-f]+\]")  # in memory: another one each time
PROTOCOLS = {
    "rtsp": "rtsp,rtp,srtp,udp,tcp,crypto",
    "rtsps": "rtsp,rtsps,rtp,srtp,udp,tcp,tls,crypto",
    "http": "http,tcp,httpproxy,crypto",
    "https": "https,tls,tcp,httpproxy,crypto",
}


def command(program: str, config: VideoSource, every_s: float) -> list[str]:
    """How ffmpeg is asked for the frames."""
    given, scheme = config.input, config.input.partition("://")[0].lower()
    if config.camera:
        source = ["-f", "v4l2", *(["-video_size", config.size] if config.size else []), "-i", given]
    elif scheme in PROTOCOLS:
        tcp = ["-rtsp_transport", "tcp"] if scheme.startswith("rtsp") else []
        source = ["-protocol_whitelist", PROTOCOLS[scheme], *tcp, "-i", given]
    else:
        source = ["-protocol_whitelist", "file", "-i", f"file:{given}"]
    # `fps` waits for the frame after; `select` gives a frame as soon as it may.
    thin = (
        f"select=isnan(prev_selected_t)+gte(t-prev_selected_t\\,{every_s:.6f})" if config.live else f"fps=1/{every_s}"
    )
    thinned = ["-vf", thin] if every_s else []
    start = [program, "-nostdin", "-hide_banner", "-loglevel", "error"]
    frames = ["-map", "0:v:0", *thinned, "-vsync", "passthrough", "-c:v", "mjpeg", "-q:v", str(config.quality)]
    return [*start, *source, *frames, "-f", "mpjpeg", "pipe:1"]


class Video:
    """The source.

    Args:
        config: of it.
        every_s: a frame in so many seconds; 0 for all. Of a file, seconds of the video.
        progress: of a file, which it was and how many of its frames are done with; empty for none.
    """

    def __init__(self, config: VideoSource, every_s: float, progress: str) -> None:
        self._config, self._every_s = config, every_s
        known, _, frames = progress.rpartition(" ")
        self._done = (known, int(frames) if frames.isdigit() else 0)
        self._stream: _Stream | None = None
        self._identity = ""
        self._ended = ""  # the file that was read to its end
        self._look_at = 0.0

    @property
    def live(self) -> bool:
        """Whether only the newest frame counts."""
        return self._config.live

    def next(self, wait_s: float) -> Item | None:
        """The next frame; the newest, of what is live."""
        if self._stream is None and not self._open(wait_s):
            return None
        assert self._stream is not None
        try:
            found = self._stream.take(wait_s, STALL_S + self._every_s)
        except SourceError:
            self.close()
            raise
        if found is None and self._stream.ended:
            why = self._stream.why
            self.close()
            if self.live or why:
                raise SourceError(f"{self._config.input} ended{why}")
            self._ended = self._identity
        return self._item(*found) if found is not None else None

    def settled(self, item: Item, answer: Answer | None) -> None:  # noqa: ARG002
        """So far it needs not be read again."""
        if item.progress is not None:
            self._done = (self._identity, int(item.progress.state.rpartition(" ")[2]))

    def close(self) -> None:
        """End ffmpeg."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self, wait_s: float) -> bool:
        program = shutil.which("ffmpeg")
        if program is None:
            raise SourceError("ffmpeg is not installed, by which videos and cameras are read: apt-get install ffmpeg")
        first = 0
        if not self.live:
            self._identity = _identity(Path(self._config.input))
            if self._identity == self._ended:
                time.sleep(min(wait_s, LOOK_S))
                return False
            first = self._done[1] if self._done[0] == self._identity else 0
        elif self._config.camera and not Path(self._config.input).exists():
            raise SourceError(f"there is no camera {self._config.input}: connect it, or name another `device`")
        self._stream = _Stream(command(program, self._config, self._every_s), first, newest=self.live)
        return True

    def _item(self, number: int, frame: bytes, at: float) -> Item:
        about: dict[str, object] = {"input": _without_user(self._config.input), "frame": number}
        if self.live:
            return Item(frame, "image/jpeg", about, taken_at=at)
        if self._every_s:
            about["position_s"] = round(number * self._every_s, 6)
        name = f"{self._config.input}\n{self._identity}\n{number}"
        progress = Progress(KEY, f"{self._identity} {number + 1}")
        return Item(frame, "image/jpeg", about, name=name, taken_at=at, progress=progress)


class _Stream:
    """A running ffmpeg, and the thread that reads it.

    Args:
        arguments: its command line.
        first: number of the first frame that is wanted.
        newest: of frames that nobody took, only the newest stays; else ffmpeg waits.
    """

    def __init__(self, arguments: list[str], first: int, *, newest: bool) -> None:
        self._arguments, self._first, self._newest = arguments, first, newest
        self._frames: queue.Queue[tuple[int, bytes, float]] = queue.Queue(1 if newest else 2)
        self._said: collections.deque[str] = collections.deque(maxlen=5)
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._finished = threading.Event()
        self._last = time.monotonic()
        self.why = ""
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether no more frames come."""
        return self._finished.is_set() and self._frames.empty()

    def take(self, wait_s: float, stall_s: float) -> tuple[int, bytes, float] | None:
        """Number, bytes and time of a frame.

        Raises:
            SourceError: when none has come for too long.
        """
        until = time.monotonic() + wait_s
        while not self.ended:
            with contextlib.suppress(queue.Empty):
                return self._frames.get(timeout=min(max(until - time.monotonic(), 0.001), 0.2))
            now = time.monotonic()
            if self._newest and now - self._last > stall_s:
                raise SourceError(f"no frame has come for {stall_s:.0f} s")
            if now >= until:
                break
        return None

    def close(self) -> None:
        """End it."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
        self._finished.wait(5)

    def _read(self) -> None:
        """The thread: ffmpeg is started by it, as it ends with the thread that started it."""
        try:
            own = [sys.executable, "-m", "agent.parent", str(os.getpid()), *self._arguments]
            self._process = subprocess.Popen(
                own, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
            )
            with self._process:
                threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
                try:
                    self._take_in(self._process)
                except FrameError as error:
                    self.why = f": {error}"
                finally:
                    if self.why or self._closed:
                        self._process.kill()
                status = self._process.wait()
                if status and not self._closed and not self.why:
                    self.why = f" with {status}: {' '.join(self._said) or 'ffmpeg said nothing'}"
        except OSError as error:
            self.why = f": ffmpeg can't be started: {error.strerror}"
        finally:
            self._finished.set()

    def _take_in(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        reader, number = FrameReader(FRAME_LIMIT), 0
        while not self._closed and (data := process.stdout.read(PIECE)):
            for frame in reader.feed(data):
                if number >= self._first:
                    self._put((number, frame, time.time()))
                self._last = time.monotonic()
                number += 1

    def _put(self, frame: tuple[int, bytes, float]) -> None:
        while not self._closed:
            try:
                self._frames.put(frame, timeout=0.001 if self._newest else 0.2)
            except queue.Full:
                if self._newest:
                    with contextlib.suppress(queue.Empty):
                        self._frames.get_nowait()
                continue
            return

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """What it says on standard error; the last lines stay."""
        assert process.stderr is not None
        while line := process.stderr.readline(1000):
            self._said.append(ADDRESS.sub("]", line.decode(errors="replace").strip()))


def _identity(path: Path) -> str:
    try:
        return identity(path.stat())
    except OSError as error:
        raise SourceError(f"the video {path} can't be read: {error.strerror}; put it there, or name another") from None


def _without_user(url: str) -> str:
    """A URL as results may show it."""
    scheme, sign, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{sign}{authority.rpartition('@')[2]}{slash}{path.partition('?')[0]}" if sign else url
