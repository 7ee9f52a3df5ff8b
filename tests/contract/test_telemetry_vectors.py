"""Telemetry as bytes: what older agents send is read for ever, and what is sent is read by older servers."""

from __future__ import annotations

import msgspec

from agent.protocol.codec import decode, encode
from agent.protocol.messages import HostWindow, ModelWindow, TelemetryBatch, TensorSketch
from agent.protocol.version import ProtocolRange

BEFORE_SIGNALS = bytes.fromhex(
    "87a870726f746f636f6c82a763757272656e7401a66f6c6465737401a873706f6f6c5f6964a573706f6f6ca873657175656e636507aa"
    "737461727465645f6174cb408f400000000000a8656e6465645f6174cb408f900000000000a66d6f64656c73918ba56d6f64656ca16d"
    "a776657273696f6ea131a6646967657374d9406161616161616161616161616161616161616161616161616161616161616161616161"
    "6161616161616161616161616161616161616161616161616161616161ad6465706c6f796d656e745f6964a164a870726f7669646572"
    "a3637075a8726571756573747303a66572726f727301a872656a656374656402a56974656d7304a76c6174656e6379820a020b01a963"
    "6f6e667573696f6e9193000105a4686f737485ab6370755f70657263656e74cb4029000000000000ae6d656d6f72795f757365645f6d"
    "62c0ac6167656e745f7273735f6d62c0ad74656d70657261747572655f63c0ac6469736b5f667265655f6d62c0"
)
NOW = bytes.fromhex(
    "87a870726f746f636f6c82a763757272656e7401a66f6c6465737401a873706f6f6c5f6964a573706f6f6ca873657175656e636507aa"
    "737461727465645f6174cb408f400000000000a8656e6465645f6174cb408f900000000000a66d6f64656c7391de0014a56d6f64656c"
    "a16da776657273696f6ea131a6646967657374d940616161616161616161616161616161616161616161616161616161616161616161"
    "61616161616161616161616161616161616161616161616161616161616161ad6465706c6f796d656e745f6964a164a870726f766964"
    "6572a3637075a8726571756573747303a66572726f727301a872656a656374656402a56974656d7304a76c6174656e6379820a020b01"
    "a9636f6e667573696f6e9193000105aa636f6e666964656e6365831f021001ff01a9707265646963746564820003ff01a6696e707574"
    "7381a17882a46d65616e83cd015a02d1fea6010001a9646576696174696f6e81cd040104a76f75747075747381a17982a46d65616e81"
    "cd019304a9646576696174696f6e80a76372617368657301a8736861646f77656402a8636f6d706172656403a9646973616772656564"
    "01a764726f7070656404a4686f737485ab6370755f70657263656e74cb4029000000000000ae6d656d6f72795f757365645f6d62c0ac"
    "6167656e745f7273735f6d62c0ad74656d70657261747572655f63c0ac6469736b5f667265655f6d62c0"
)
PLAIN = ModelWindow("m", "1", "a" * 64, "d", "cpu", 3, 1, 2, 4, {10: 2, 11: 1}, ((0, 1, 5),))
WHOLE = msgspec.structs.replace(
    PLAIN,
    confidence={31: 2, 16: 1, -1: 1},
    predicted={0: 3, -1: 1},
    inputs={"x": TensorSketch({346: 2, -346: 1, 0: 1}, {1025: 4})},
    outputs={"y": TensorSketch({403: 4})},
    crashes=1,
    shadowed=2,
    compared=3,
    disagreed=1,
    dropped=4,
)


def batch(window: ModelWindow) -> TelemetryBatch:
    return TelemetryBatch(ProtocolRange(1, 1), "spool", 7, 1000.0, 1010.0, (window,), HostWindow(cpu_percent=12.5))


def test_a_batch_from_before_there_were_signals_is_read() -> None:
    assert decode(BEFORE_SIGNALS, TelemetryBatch) == batch(PLAIN)


def test_a_batch_is_written_as_these_bytes_and_read_from_them() -> None:
    assert encode(batch(WHOLE)).hex() == NOW.hex()
    assert decode(NOW, TelemetryBatch) == batch(WHOLE)


def test_a_server_from_before_there_were_signals_reads_all_that_it_knows() -> None:
    """It ignores the names that it does not know: what was read of old bytes is a part of the new ones."""
    old, new = msgspec.msgpack.decode(BEFORE_SIGNALS), msgspec.msgpack.decode(NOW, strict=False)
    (was,), (window,) = old.pop("models"), new.pop("models")
    assert old == new
    assert was == {name: window[name] for name in was}
