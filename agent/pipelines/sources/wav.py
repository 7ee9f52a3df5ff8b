"""Windows of samples of a WAV file, or of a FIFO that one is written to, for nets of sound; states of such nets.

A FIFO may be written for ever: its header's length does not count. A file is read to its end once, also over restarts;
after a restart a state begins anew, as it is not kept.
"""

from __future__ import annotations

import contextlib
import stat
import time
import wave
from collections import deque
from collections.abc import Callable
from pathlib import Path

from agent.pipelines.client import ModelInfo, TensorInfo
from agent.pipelines.config import WavSource
from agent.pipelines.content import identity
from agent.pipelines.items import Answer, Item, Progress, SourceError
from agent.pipelines.windows import Array, Samples, ShapeError, Windows, constant, mono, request, window_shape, zeros

KEY = "wav"
LOOK_S = 2.0
MOST_CHANNELS = 64
PIECE_S = 0.1  # read at once


class Wav:
    """The source.

    Args:
        config: of it.
        describe: what the model says of itself; may raise that it is away.
        progress: of a file, which it was and where the next window begins; empty for none.
    """

    live = False

    def __init__(self, config: WavSource, describe: Callable[[], ModelInfo], progress: str) -> None:
        self._config, self._describe = config, describe
        self._path = Path(config.path)
        known, _, position = progress.rpartition(" ")
        self._done = (known, int(position) if position.isdigit() else 0)
        self._file: wave.Wave_read | None = None
        self._identity = ""
        self._ended = ""
        self._windows = Windows(config.window, config.hop)
        self._waiting: deque[tuple[int, Samples]] = deque()
        self._model: ModelInfo | None = None
        self._state: dict[str, Array] = {}

    def next(self, wait_s: float) -> Item | None:
        """The next window; a FIFO is waited for as long as it takes."""
        if self._file is None and not self._open(wait_s):
            return None
        model = self._model or self._describe()
        self._model = model
        until = time.monotonic() + wait_s
        while not self._waiting:
            if time.monotonic() > until:
                return None
            assert self._file is not None
            try:
                data = self._file.readframes(max(int(self._config.rate * PIECE_S), 1))
            except (wave.Error, EOFError, OSError) as error:
                self.close()
                raise SourceError(f"{self._path} is damaged: {error}") from None
            frame = self._file.getsampwidth() * self._file.getnchannels()
            whole = data[: len(data) - len(data) % frame]
            if not whole:
                self._end()
                return None
            samples = mono(whole, self._file.getsampwidth(), self._file.getnchannels())
            self._waiting.extend(self._windows.feed(samples))
        position, window = self._waiting.popleft()
        return self._item(position, window, model)

    def settled(self, item: Item, answer: Answer | None) -> None:
        """Carry the state on; a version that is another one begins anew."""
        if item.progress is not None:
            self._done = (self._identity, int(item.progress.state.rpartition(" ")[2]))
        if answer is None or self._model is None or answer.version != self._model.version:
            self._model, self._state = None, {}
            return
        for name, output in self._config.carry.items():
            if output not in answer.arrays:
                raise SourceError(f"carry.{name}: the model has no output {output!r}")
            self._state[name] = answer.arrays[output]

    def close(self) -> None:
        """Let go of the file, and of what was read ahead."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file, self._model, self._state = None, None, {}
        self._waiting.clear()

    def _open(self, wait_s: float) -> bool:
        try:
            found = self._path.stat()
        except OSError as error:
            raise SourceError(f"{self._path} can't be read: {error.strerror}; put a WAV file or a FIFO there") from None
        fifo = stat.S_ISFIFO(found.st_mode)
        if not fifo and not stat.S_ISREG(found.st_mode):
            raise SourceError(f"{self._path} is neither a file nor a FIFO (mkfifo)")
        self._identity = "" if fifo else identity(found)
        if self._identity and self._identity == self._ended:
            time.sleep(min(wait_s, LOOK_S))
            return False
        first = self._done[1] if self._identity and self._done[0] == self._identity else 0
        try:
            stream = self._path.open("rb")
        except OSError as error:
            raise SourceError(f"{self._path} can't be read: {error.strerror}") from None
        try:
            self._file = wave.open(stream, "rb")  # noqa: SIM115
            self._check(self._file)
        except (wave.Error, EOFError, OSError) as error:
            self.close()
            stream.close()
            raise SourceError(
                f"{self._path} is no WAV stream of plain samples (PCM): {str(error) or 'it ended'}"
            ) from None
        except SourceError:
            self.close()
            stream.close()
            raise
        self._windows = Windows(self._config.window, self._config.hop, first)
        return True

    def _check(self, file: wave.Wave_read) -> None:
        if file.getframerate() != self._config.rate:
            raise SourceError(
                f"{self._path} has {file.getframerate()} samples a second, not {self._config.rate}: set `rate`, or "
                "resample it (ffmpeg -ar)"
            )
        if file.getnchannels() > MOST_CHANNELS:
            raise SourceError(f"{self._path} has {file.getnchannels()} channels, and may have {MOST_CHANNELS}")
        if not 1 <= file.getsampwidth() <= 4:
            raise SourceError(f"{self._path} has samples of {8 * file.getsampwidth()} bits: write 16")

    def _end(self) -> None:
        """The file is read, or nobody writes to the FIFO any more."""
        self._ended = self._identity
        self.close()

    def _item(self, position: int, window: Samples, model: ModelInfo) -> Item:
        config = self._config
        try:
            info = _info(model, config.input, "input")
            tensors: dict[str, Array] = {config.input: window.reshape(window_shape(info, config.window, config.input))}
            for name in config.carry:
                tensors[name] = self._state.get(name, zeros(_info(model, name, "carry")))
            for name, value in config.constants.items():
                tensors[name] = constant(_info(model, name, "constants"), value, name)
        except (ShapeError, KeyError) as error:
            self.close()
            raise SourceError(str(error)) from None
        body, headers = request(tensors, {name: model.inputs[name].datatype for name in tensors})
        about = {"path": config.path, "sample": position, "position_s": round(position / config.rate, 6)}
        progress = Progress(KEY, f"{self._identity} {position + config.hop}") if self._identity else None
        name = f"{config.path}\n{self._identity}\n{position}" if self._identity else ""
        return Item(
            body, "application/octet-stream", about, headers, name=name, taken_at=time.time(), progress=progress
        )


def _info(model: ModelInfo, name: str, key: str) -> TensorInfo:
    if name not in model.inputs:
        raise ShapeError(f"{key}: the model has no input {name!r}, but {', '.join(model.inputs)}")
    return model.inputs[name]
