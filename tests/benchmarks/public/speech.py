"""Silero's voice activity detector with spoken prompts and music: is somebody speaking in this window?

Audio of 8 kHz in windows of 256 samples behind 32 of the window before, as the net wants it. A row's state is what the
net itself, as it came, had after all windows before: so each row stands alone.
"""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from tests.benchmarks.public.fetch import from_debian, from_index

NET = ("silero-vad==6.2.0", "8a31f1e58e73cdc20820d842f757e678e0ae1b0ee1cb7b8aa50f20f8fd7f7638")
SPEECH = ("asterisk-core-sounds-en-wav", "1.6.1-1", "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d")
MUSIC = ("asterisk-moh-opsound-wav", "2.03-1.1", "8f9d808a729d305c2d3343993f21ca5e6829e411682618dc8ea7aa8bc24a566c")
RATE, WINDOW, CONTEXT = 8000, 256, 32
AUDIBLE = 0.25  # of a prompt's loudest window: below it nobody speaks
Rows = dict[str, npt.NDArray[np.generic]]


def load_speech(cache: Path, *, calibration: int, evaluation: int) -> tuple[Path, Rows, Rows]:
    """The net, rows to calibrate on, and labelled rows of other files; half of each are speech (1), half music (0)."""
    net = from_index(cache, *NET, {"silero.onnx": "silero_vad/data/silero_vad.onnx"})["silero.onnx"]
    prompts = sorted((from_debian(cache, *SPEECH) / "usr/share/asterisk/sounds/en_US_f_Allison").glob("*.wav"))
    songs = sorted((from_debian(cache, *MUSIC) / "usr/share/asterisk/moh").glob("*.wav"))
    session = onnxruntime.InferenceSession(str(net), providers=["CPUExecutionProvider"])
    found = []
    for part, count in ((0, calibration), (1, evaluation)):
        spoken = _rows(session, prompts[part::2], count // 2, audible=AUDIBLE)
        played = _rows(session, songs[part::2], count // 2, audible=0.0)
        rows: Rows = {name: np.concatenate([spoken[name], played[name]]) for name in spoken}
        rows["y"] = np.repeat(np.array([1, 0]), (len(spoken["input"]), len(played["input"])))
        found.append(rows)
    del found[0]["y"]
    return net, found[0], found[1]


def _rows(session: onnxruntime.InferenceSession, files: list[Path], count: int, *, audible: float) -> Rows:
    inputs, states = [], []
    share = -(-count // len(files)) if audible == 0 else count
    for path in files:
        windows = _windows(path)
        loud = np.sqrt((windows[:, CONTEXT:] ** 2).mean(1))
        state, taken = np.zeros((2, 1, 128), np.float32), 0
        for window, energy in zip(windows, loud, strict=True):
            if energy >= audible * loud.max() and energy > 0:
                inputs.append(window)
                states.append(state)
                taken += 1
            if taken == share or len(inputs) == count:
                break
            feed = {"input": window[None], "state": state, "sr": np.array(RATE, np.int64)}
            state = session.run(None, feed)[1]
        if len(inputs) == count:
            break
    return {"input": np.stack(inputs), "state": np.stack(states), "sr": np.full(len(inputs), RATE, np.int64)}


def _windows(path: Path) -> npt.NDArray[np.float32]:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2), path
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), samples])
    count = len(samples) // WINDOW
    return np.stack([padded[start * WINDOW : start * WINDOW + CONTEXT + WINDOW] for start in range(count)])
