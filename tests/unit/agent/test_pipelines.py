"""Pipelines without I/O: what is declared, which answers are published, frames, windows, and the outbox's bounds."""

from __future__ import annotations

import re
import sqlite3
import struct
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.client.waiting import own_address
from agent.config import load_config
from agent.errors import ConfigError
from agent.pipelines.client import TensorInfo
from agent.pipelines.config import (
    FileSink,
    FolderSource,
    MqttSink,
    MqttSource,
    Only,
    PipelineConfig,
    VideoSource,
    WavSource,
    WebhookSink,
)
from agent.pipelines.content import content_type, refusal
from agent.pipelines.events import event, event_id, is_wanted
from agent.pipelines.frames import LONGEST_HEAD, FrameError, FrameReader
from agent.pipelines.health import SAY_S, Health
from agent.pipelines.ipc import Begin, Fine, Trouble
from agent.pipelines.items import Answer, Item, Progress
from agent.pipelines.outbox import Outbox
from agent.pipelines.reading import read_pipelines
from agent.pipelines.sinks.file import File
from agent.pipelines.sinks.sink import SinkError
from agent.pipelines.sources.video import command
from agent.pipelines.windows import ShapeError, Windows, constant, mono, window_shape, zeros

WHOLE = """
[[pipelines]]
name = "door"
model = "people"
every_s = 2
only = { labels = ["person"], score = 0.5 }
outbox_mb = 8
retry_s = 0.5
report_after_s = 30

[pipelines.source]
kind = "video"
input = "rtsp://user:pass@10.0.0.9/stream1"

[[pipelines.sinks]]
kind = "file"
path = "/var/log/door.jsonl"
max_mb = 2

[[pipelines.sinks]]
kind = "mqtt"
url = "mqtt://10.0.0.5:1883"
topic = "plant7/door"
away_s = 20

[[pipelines.sinks]]
kind = "webhook"
url = "https://ops.example/hook"
batch = 10
"""


def read(text: str) -> tuple[PipelineConfig, ...]:
    return read_pipelines(tomllib.loads(text)["pipelines"])


def test_a_declaration_is_read_and_survives_the_way_to_its_process() -> None:
    (found,) = read(WHOLE)
    assert found == PipelineConfig(
        "door",
        "people",
        VideoSource("rtsp://user:pass@10.0.0.9/stream1"),
        (
            FileSink("file", "/var/log/door.jsonl", max_mb=2.0),
            MqttSink("mqtt", "mqtt://10.0.0.5:1883", "plant7/door", away_s=20.0),
            WebhookSink("webhook", "https://ops.example/hook", batch=10),
        ),
        every_s=2.0,
        only=Only(("person",), 0.5),
        outbox_mb=8.0,
        retry_s=0.5,
        report_after_s=30.0,
    )
    order = Begin(found, "cam", "/tmp", "127.0.0.1:1", "", 1.0, "INFO")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(order), type=Begin) == order


def test_the_examples_of_the_documentation_are_read(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    examples = [one for one in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if "[pipelines.source]" in one]
    (tmp_path / "secret").write_text("whsec_")
    found = [
        one for text in examples for one in read(text.replace("/etc/shoal/webhook-secret", str(tmp_path / "secret")))
    ]
    assert [(one.name, type(one.source)) for one in found] == [("door", VideoSource), ("voice", WavSource)]


def sourced(source: str, sinks: str = '[{ kind = "file", path = "/a" }]', more: str = "") -> str:
    return f'pipelines = [{{ name = "p", model = "m", source = {source}, sinks = {sinks}{more} }}]'


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('{ kind = "folder", path = "/in" }', FolderSource("/in")),
        (
            '{ kind = "folder", path = "/in", then = "move:/out", order = "time" }',
            FolderSource("/in", "move", "/out", "time"),
        ),
        ('{ kind = "camera" }', VideoSource("/dev/video0", camera=True)),
        ('{ kind = "camera", size = "1280x720", quality = 5 }', VideoSource("/dev/video0", True, "1280x720", 5)),
        ('{ kind = "mqtt", url = "mqtts://b", topic = "a/+/b/#" }', MqttSource("mqtts://b", "a/+/b/#")),
        (
            '{ kind = "wav", path = "/run/mic", input = "x", window = 512, carry={s="sN"}, constants={sr=1} }',
            WavSource("/run/mic", "x", 512, 512, 16_000, {"s": "sN"}, {"sr": 1}),
        ),
    ],
)
def test_sources(source: str, found: object) -> None:
    assert read(sourced(source))[0].source == found


FOLDER = '{ kind = "folder", path = "/in" }'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pipelines = 3", "at most 16 tables"),
        ("pipelines = [3]", r"pipelines\[0\]: must be a table"),
        ('pipelines = [{ name = "../x" }]', r"pipelines\[0\].name: '../x' is not 1 to 64"),
        ('pipelines = [{ name = "p" }]', r"pipelines\[p\].model"),
        (sourced('{ kind = "ftp" }'), "source.kind: 'ftp' is not one of folder, video, camera, mqtt, wav"),
        (sourced('{ kind = "folder", path = "in" }'), "source.path: 'in' is no absolute path"),
        (sourced('{ kind = "folder", path = "/in", then = "burn" }'), 'then: \'burn\' is not "keep", "delete"'),
        (sourced('{ kind = "folder", path = "/in", then = "move:/in" }'), "can't be moved to where they come from"),
        (sourced('{ kind = "folder", path = "/in", deep = true }'), "source.deep: there is no such key"),
        (sourced('{ kind = "video", input = "-vf" }'), "source.input: '-vf' is no absolute path"),
        (sourced('{ kind = "video", input = "concat:/etc/passwd" }'), "no absolute path"),
        (sourced('{ kind = "video", input = "file:///etc/passwd" }'), "rtsp:// or rtsps:// or http"),
        (sourced('{ kind = "video", input = "rtsp://u:secret@/x" }'), "source.input: this is no"),
        (sourced('{ kind = "camera", size = "big" }'), "size: 'big' is not like 1280x720"),
        (sourced('{ kind = "mqtt", url = "mqtt://b", topic = "a/#/b" }'), "is no topic filter"),
        (sourced('{ kind = "mqtt", url = "tcp://b", topic = "a" }'), "source.url: this is no mqtt://"),
        (sourced('{ kind = "wav", path = "/x" }'), "source.window: 0 is not a whole number"),
        (sourced('{ kind = "wav", path = "/x", window = 4, input = "a", carry = { a = "b" } }'), "'a' is given twice"),
        (sourced('{ kind = "wav", path = "/x", window = 4 }', more=", every_s = 1"), "every_s: .*hop"),
        (sourced(FOLDER, "[]"), "sinks: must be 1 to 8 tables"),
        (sourced(FOLDER, '[{ kind = "file", path = "/a" }, { kind = "file", path = "/b" }]'), "two are named 'file'"),
        (sourced(FOLDER, '[{ kind = "webhook", url = "http://ops.example/x" }]'), "insecure_plain_http"),
        (sourced(FOLDER, '[{ kind = "webhook", url = "https://u:p@ops.example/x" }]'), "use token_file"),
        (sourced(FOLDER, '[{ kind = "webhook", url = "https://o/x", token_file = "/absent" }]'), "can't be read"),
        (sourced(FOLDER, '[{ kind = "mqtt", url = "mqtt://b", topic = "a/+" }]'), "is no topic, such as"),
        (sourced(FOLDER, more=", every_s = -1"), "every_s: -1 is not a number from 0"),
        (sourced(FOLDER, more=", retry_s = 0"), "retry_s: 0 is not a number above 0"),
        (sourced(FOLDER, more=", report_after_s = -1"), "report_after_s: -1 is not a number from 0"),
        (sourced('{ kind = "mqtt", url = "mqtt://b", topic = "a", away_s = "x" }'), "away_s: 'x' is not a number"),
        (sourced(FOLDER, more=', only = { score = "high" }'), "only.score: must be a number"),
    ],
)
def test_what_can_not_be_is_refused_with_its_key(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(f'device_id = "cam"\nstate_dir = "{tmp_path}"\n{text}\n')
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(file, {})
    assert "secret" not in str(caught.value)


def test_names_and_files_are_one_pipelines_own(tmp_path: Path) -> None:
    one = tomllib.loads(sourced(FOLDER))["pipelines"][0]
    with pytest.raises(ConfigError, match="there are two of it"):
        read_pipelines([one, one])
    with pytest.raises(ConfigError, match="two sinks write to '/a'"):
        read_pipelines([one, {**one, "name": "q"}])
    variables = {"SHOAL_AGENT_STATE_DIR": str(tmp_path), "SHOAL_AGENT_DEVICE_ID": "cam"}
    given = {**variables, "SHOAL_AGENT_PIPELINES": sourced(FOLDER).removeprefix("pipelines = ")}
    assert load_config(None, given).pipelines[0].source == FolderSource("/in")
    with pytest.raises(ConfigError, match="port 0"):
        load_config(None, {**given, "SHOAL_AGENT_LISTEN": "127.0.0.1:0"})
    with pytest.raises(ConfigError, match="no TOML array"):
        load_config(None, {**variables, "SHOAL_AGENT_PIPELINES": "{"})


def output(name: str, data: Any) -> dict[str, Any]:
    return {"name": name, "datatype": "FP32", "shape": [], "data": data}


@pytest.mark.parametrize(
    ("only", "outputs", "wanted"),
    [
        (Only(), [], True),
        (Only(("cat",)), [output("labels", ["dog", "cat"])], True),
        (Only(("cat",)), [output("labels", ["dog"])], False),
        (Only(("cat",)), [output("labels", [])], False),
        (Only(("cat",), 0.5), [output("labels", ["dog", "cat"]), output("scores", [0.9, 0.4])], False),
        (Only(("cat",), 0.4), [output("labels", ["dog", "cat"]), output("scores", [0.9, 0.4])], True),
        (Only((), 0.5), [output("scores", [0.1, 0.5])], True),
        (Only((), 0.5), [output("scores", [[0.1], [0.4]])], False),
        (Only((), 0.5), [output("scores", [None])], False),
        (Only((), 0.5, "speech"), [output("scores", [0.1]), output("speech", [0.7])], True),
        (Only(("cat",), 0.5), [output("mask", [1])], True),  # the answer has no such outputs
        (Only(("cat",), 0.5), [output("labels", ["cat"]), output("scores", [[0.1, 0.2], [0.7, 0]])], True),
    ],
)
def test_which_answers_are_published(only: Only, outputs: list[dict[str, Any]], wanted: bool) -> None:
    assert is_wanted(only, outputs) is wanted


def test_an_event_has_the_same_id_whenever_the_same_item_is_taken() -> None:
    item = Item(b"", "image/jpeg", {"file": "a.jpg"}, name="a.jpg\n1:2:3", taken_at=1_700_000_000.1234)
    identity, body = event("cam", "door", item, Answer("people", "3", [output("scores", [1.0])]))
    told = msgspec.json.decode(body)
    assert told == {
        "specversion": "1.0",
        "id": identity,
        "source": "shoal/device/cam/pipelines/door",
        "type": "shoal.inference",
        "time": "2023-11-14T22:13:20.123Z",
        "datacontenttype": "application/json",
        "data": {
            "model": "people",
            "version": "3",
            "item": {"file": "a.jpg"},
            "outputs": [output("scores", [1.0])],
        },
    }
    assert event_id("cam", "door", item) == identity != event_id("cam", "gate", item)
    nameless = Item(b"", "image/jpeg", {})
    assert event_id("cam", "door", nameless) != event_id("cam", "door", nameless)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\xff\xd8\xff\xe0rest", "image/jpeg"),
        (b"\x89PNG\r\n\x1a\nrest", "image/png"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "image/webp"),
        (b"RIFF\0\0\0\0WAVEfmt ", ""),
        (b"BM\0\0", "image/bmp"),
        (b' \n{"inputs": []}', "application/json"),
        (b"", ""),
        (b"[1]", ""),
    ],
)
def test_what_bytes_are(data: bytes, kind: str) -> None:
    assert content_type(data) == kind
    assert bool(refusal(data)) is (kind == "")


# -- frames


def framed(frames: list[bytes]) -> bytes:
    parts = [b"Content-type: image/jpeg\r\nContent-length: %d\r\n\r\n%b" % (len(one), one) for one in frames]
    return b"--ffmpeg\r\n" + b"\r\n--ffmpeg\r\n".join(parts)


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=6), st.lists(st.integers(1, 50), max_size=40))
def test_frames_come_whole_however_the_bytes_are_cut(frames: list[bytes], cuts: list[int]) -> None:
    reader, data, found = FrameReader(300), framed(frames), []
    for cut in [*cuts, len(data)]:
        piece, data = data[:cut], data[cut:]
        found += list(reader.feed(piece))
    assert found == frames


@given(
    st.lists(
        st.one_of(st.binary(max_size=200), st.sampled_from([b"\r\n\r\n", b"Content-length: ", b"9", b"-1", b"\r\n"]))
    )
)
def test_hostile_streams_end_in_an_error_or_in_bounded_memory(pieces: list[bytes]) -> None:
    reader = FrameReader(100)
    try:
        for piece in pieces:
            assert all(len(frame) <= 100 for frame in reader.feed(piece))
            assert len(reader._kept) <= LONGEST_HEAD + 200
    except FrameError:
        pass


@pytest.mark.parametrize(
    "data",
    [
        b"x" * LONGEST_HEAD,
        b"Content-type: image/jpeg\r\n\r\n",
        b"Content-length: 101\r\n\r\n",
        b"Content-length: 0\r\n\r\n",
        b"Content-length: -5\r\n\r\n",
        b"Content-length: 99999999999999999999\r\n\r\n",
        b"Content-length: \xb2\r\n\r\n",
        b"Content-length: 5\r\nContent-length: 6\r\n\r\n",
    ],
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        list(FrameReader(100).feed(data))


def test_nothing_declared_is_an_option_of_ffmpeg() -> None:
    camera = command("ffmpeg", VideoSource("/dev/video0", camera=True, size="640x480"), 0)
    assert camera[camera.index("-i") + 1] == "/dev/video0"
    assert camera[camera.index("-video_size") + 1] == "640x480"
    file = command("ffmpeg", VideoSource("/a:b/-x.mp4"), 0.5)
    assert file[file.index("-i") + 1] == "file:/a:b/-x.mp4"
    assert file[file.index("-protocol_whitelist") + 1] == "file"
    assert "fps=1/0.5" in file
    stream = command("ffmpeg", VideoSource("rtsp://10.0.0.9/s"), 2)
    assert "file" not in stream[stream.index("-protocol_whitelist") + 1].split(",")
    assert any(one.startswith("select=") for one in stream)


# -- samples


@settings(deadline=None)  # on a busy machine an example may wait
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 30), st.lists(st.integers(0, 20), max_size=12))
def test_windows_are_those_of_the_whole_stream(window: int, hop: int, first: int, sizes: list[int]) -> None:
    stream = np.arange(sum(sizes), dtype=np.float32)
    windows, found, position = Windows(window, hop, first), [], 0
    for size in sizes:
        found += list(windows.feed(stream[position : position + size]))
        position += size
        assert len(windows._kept) < window + hop + size
    expected = list(range(first, len(stream) - window + 1, hop))
    assert [start for start, _ in found] == expected
    for start, samples in found:
        np.testing.assert_array_equal(samples, stream[start : start + window])


def test_samples_are_mono_from_minus_one_to_one() -> None:
    np.testing.assert_allclose(mono(struct.pack("<4h", -32768, 32767, 0, 16384), 2, 1), [-1, 1, 0, 0.5], atol=1e-4)
    np.testing.assert_allclose(mono(bytes([0, 128, 255]), 1, 1), [-1, 0, 1], atol=1e-2)
    np.testing.assert_allclose(mono(b"\x00\x00\x80\xff\xff\x7f", 3, 1), [-1, 1], atol=1e-6)
    np.testing.assert_allclose(mono(struct.pack("<2i", -(2**31), 2**30), 4, 1), [-1, 0.5])
    np.testing.assert_allclose(mono(struct.pack("<4h", 16384, 0, -16384, -16384), 2, 2), [0.25, -0.5])


def test_shapes_for_a_window() -> None:
    assert window_shape(TensorInfo("FP32", [-1, 512]), 512, "x") == [1, 512]
    assert window_shape(TensorInfo("FP32", [-1, 1, -1]), 512, "x") == [1, 1, 512]
    assert window_shape(TensorInfo("FP32", [512]), 512, "x") == [512]
    for wrong in (TensorInfo("FP32", [-1, 400]), TensorInfo("INT16", [-1, 512]), TensorInfo("FP32", [])):
        with pytest.raises(ShapeError, match="window"):
            window_shape(wrong, 512, "x")
    assert zeros(TensorInfo("FP32", [2, -1, 128])).shape == (2, 1, 128)
    assert constant(TensorInfo("INT64", []), 16000, "sr").shape == ()
    assert constant(TensorInfo("INT64", [-1]), 16000, "sr").tolist() == [16000]
    assert constant(TensorInfo("FP32", [-1, 2]), [1, 2, 3, 4], "c").tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ShapeError, match=r"constants\.c"):
        constant(TensorInfo("FP32", [3]), [1, 2], "c")


# -- outbox and file


def put(outbox: Outbox, *names: str) -> None:
    for name in names:
        outbox.put((name, b"x" * 10), None)


def ids(outbox: Outbox, sink: str, limit: int = 100) -> list[str]:
    return [one.id for one in outbox.due(sink, limit, 0)]


def test_results_wait_in_order_for_each_sink_alone(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o.db", ["a", "b"], 1000)
    put(outbox, "1", "2", "3")
    outbox.confirm("a", [one.number for one in outbox.due("a", 2, 0)])
    assert (ids(outbox, "a"), ids(outbox, "b")) == (["3"], ["1", "2", "3"])
    outbox.put(None, Progress("file", "done"))
    outbox.close()

    again = Outbox(tmp_path / "o.db", ["a", "c"], 1000)  # b is not declared any more
    assert (ids(again, "a"), ids(again, "c")) == (["3"], [])
    assert again.progress() == {"file": "done"}
    again.forget(["file"])
    again.confirm("a", [one.number for one in again.due("a", 9, 0)])
    assert again.progress() == {}
    again.close()
    with sqlite3.connect(tmp_path / "o.db") as database:
        assert database.execute("SELECT COUNT(*) FROM events").fetchone() == (0,)
    database.close()


def test_the_oldest_go_when_it_is_full_and_are_counted(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o.db", ["a", "b"], 30)
    put(outbox, "1", "2", "3")
    outbox.confirm("a", [one.number for one in outbox.due("a", 1, 0)])
    put(outbox, "4", "5")
    assert (ids(outbox, "a"), ids(outbox, "b")) == (["3", "4", "5"], ["3", "4", "5"])
    assert (outbox.take_dropped(), outbox.take_dropped()) == (2, 0)
    for sink in "ab":  # what is taken makes room again
        outbox.confirm(sink, [one.number for one in outbox.due(sink, 9, 0)])
    put(outbox, "6", "7", "8")
    assert (ids(outbox, "a"), outbox.take_dropped()) == (["6", "7", "8"], 0)
    outbox.close()


def lines(path: Path) -> list[str]:
    return [msgspec.json.decode(line)["id"] for line in path.read_bytes().splitlines()]


def test_a_file_has_each_result_once_and_no_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    outbox = Outbox(tmp_path / "o.db", ["a"], 1 << 20)
    for number in range(5):
        outbox.put((str(number), msgspec.json.encode({"id": str(number)})), None)
    events = outbox.due("a", 9, 0)
    sink = File(FileSink("a", str(path)))
    sink.send(events[:3])
    sink.close()  # as by a kill: nothing was confirmed, and a line is torn
    with path.open("ab") as file:
        file.write(b'{"id": "3"')
    again = File(FileSink("a", str(path)))
    again.send(events)
    assert lines(path) == ["0", "1", "2", "3", "4"]
    path.rename(tmp_path / "moved")  # as logrotate does
    outbox.put(("5", b'{"id":"5"}'), None)
    again.send(outbox.due("a", 9, 0)[5:])
    assert lines(path) == ["5"]
    again.close()
    outbox.close()


def test_files_are_rotated_and_a_folder_that_is_absent_is_said(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    outbox = Outbox(tmp_path / "o.db", ["a"], 1 << 20)
    for number in range(9):
        outbox.put((str(number), msgspec.json.encode({"id": str(number)})), None)
    sink = File(FileSink("a", str(path), max_mb=25 / 2**20, keep=2))
    for one in outbox.due("a", 9, 0):
        sink.send([one])
    assert [lines(tmp_path / name) for name in ("out.jsonl", "out.jsonl.1", "out.jsonl.2")] == [
        ["8"],
        ["6", "7"],
        ["4", "5"],
    ]
    assert not (tmp_path / "out.jsonl.3").exists()
    sink.close()
    with pytest.raises(SinkError, match="make its folder"):
        File(FileSink("a", str(tmp_path / "absent" / "x"))).send(outbox.due("a", 1, 0))
    outbox.close()


def test_trouble_is_said_when_it_begins_and_when_it_ends() -> None:
    said: list[object] = []
    now = [0.0]
    health = Health(said.append, 2.0, lambda: now[0])
    for _ in range(3):  # what is over at once is nobody's trouble
        health.trouble("failed", "model", "busy")
        health.fine("failed", "model")
    assert said == []
    for _ in range(9):
        health.trouble("failed", "source", "no camera")
        now[0] += 1
    health.fine("failed", "source")
    health.fine("failed", "source")
    assert said == [Trouble("failed", "source", "no camera"), Fine("failed", "source")]
    said.clear()
    for _ in range(3):  # the first at once, the others within the minute
        health.trouble("refused", "", "no image", ongoing=False)
    assert said == [Trouble("refused", "", "no image", 1, ongoing=False)]
    now[0] += SAY_S
    health.tick("refused", "", "no image")
    health.tick("refused", "", "no image")
    assert said[1:] == [Trouble("refused", "", "no image", 2, ongoing=False)]


@pytest.mark.parametrize(
    ("listen", "found"),
    [("127.0.0.1:8470", ("127.0.0.1", 8470)), ("0.0.0.0:1", ("127.0.0.1", 1)), ("[::]:2", ("::1", 2))],
)
def test_where_the_api_is(listen: str, found: tuple[str, int]) -> None:
    assert own_address(listen) == found
