"""The agent's configuration: file, variables over it, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.config import PREFIX, Config, load_config, machine_id
from agent.errors import ConfigError
from agent.identity import Identity, identity_folder, save_identity

FILE = """
device_id = "camera-17"
state_dir = "/tmp/agent"
broker = "mqtts://broker.example:8883"
listen = "0.0.0.0:9000"
runtimes = ["onnx"]
log_level = "debug"
tags = { site = "plant7" }
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "agent.toml"
    path.write_text(text)
    return path


def test_a_file_with_everything(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, FILE), {}) == Config(
        device_id="camera-17",
        state_dir=Path("/tmp/agent"),
        broker="mqtts://broker.example:8883",
        listen="0.0.0.0:9000",
        tags={"site": "plant7"},
        runtimes=("onnx",),
        log_level="DEBUG",
    )


def test_variables_win_over_the_file(tmp_path: Path) -> None:
    variables = {"SHOAL_AGENT_BROKER": "mqtt://other:1883", "SHOAL_AGENT_TAGS": "line=3, site=plant8"}
    config = load_config(written(tmp_path, FILE), variables)
    assert config.broker == "mqtt://other:1883"
    assert config.tags == {"line": "3", "site": "plant8"}
    assert config.listen == "0.0.0.0:9000"


def test_bounds_of_the_disk(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, FILE + "disk_floor_mb = 10\n"), {"SHOAL_AGENT_STORE_KEEP_MB": "0.5"})
    assert (config.disk_floor_mb, config.store_keep_mb) == (10.0, 0.5)
    for wrong in ("-1", '"much"', "true", "inf", "nan"):
        with pytest.raises(ConfigError, match="store_keep_mb"):
            load_config(written(tmp_path, FILE + f"store_keep_mb = {wrong}\n"), {})


def test_grpc_is_off_and_on_loopback_unless_said(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, FILE), {}).grpc.addresses == []
    on = load_config(written(tmp_path, FILE), {"SHOAL_AGENT_GRPC": "{ serve = true }"})
    assert on.grpc.addresses == ["127.0.0.1:8471"]
    path = tmp_path / "grpc.sock"
    table = f'[grpc]\nserve = true\nlisten = "[::1]:9"\nunix_socket = "{path}"\n'
    assert load_config(written(tmp_path, FILE + table), {}).grpc.addresses == ["[::1]:9", f"unix:{path}"]


def test_how_long_an_inference_may_take(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, FILE), {}).hang_s == 120.0
    assert load_config(written(tmp_path, FILE + "hang_s = 0\n"), {"SHOAL_AGENT_HANG_S": "7.5"}).hang_s == 7.5
    for wrong in ("0.5", "-1", '"long"', "true", "inf", "nan"):
        with pytest.raises(ConfigError, match="hang_s"):
            load_config(written(tmp_path, FILE + f"hang_s = {wrong}\n"), {})


def test_a_device_without_an_id_keeps_the_one_it_gave_itself(tmp_path: Path) -> None:
    variables = {"SHOAL_AGENT_STATE_DIR": str(tmp_path / "state")}
    first = load_config(None, variables).device_id
    assert first.startswith("dev-")
    assert load_config(None, variables).device_id == first
    assert load_config(None, {"SHOAL_AGENT_STATE_DIR": str(tmp_path / "other")}).device_id != first


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('broker = "http://x"', "broker"),
        ('broker = "mqtt://"', "broker"),
        ('listen = "8470"', "listen"),
        ('broker = "mqtt://host:notaport"', "broker"),
        ('broker = "mqtt://host:99999"', "broker"),
        ('broker = "mqtt://[::1"', "broker"),
        ('broker = "mqtts://host:0"', "broker"),
        ('listen = "host:99999"', "listen"),
        ('listen = "host:²"', "listen"),
        ('listen = "[::1:80"', "listen"),
        ('listen = "[::1]"', "listen"),
        ('ca_file = "/nowhere/ca.pem"', "ca_file"),
        ('unix_socket = "/nowhere/agent.sock"', "unix_socket"),
        (f'unix_socket = "/tmp/{"s" * 120}"', "unix_socket"),
        ('grpc = "127.0.0.1:8471"', "grpc"),
        ('grpc = { serve = "yes" }', "grpc.serve"),
        ('grpc = { listen = "8471" }', "grpc.listen"),
        ('grpc = { unix_socket = "/nowhere/grpc.sock" }', "grpc.unix_socket"),
        ("grpc = { port = 8471 }", "grpc.port"),
        (f'tags = {{ site = "{"x" * 129}" }}', "tags"),
        ("state_dir = 3", "state_dir"),
        ('device_id = "camera\\n"', "device_id"),
        ("listen = 8470", "listen"),
        ('device_id = "has space"', "device_id"),
        ('device_id = "a/b"', "device_id"),
        ('device_id = "+"', "device_id"),
        ('tags = "site"', "tags"),
        ("tags = { line = 3 }", "tags"),
        ('runtimes = ["An Abacus"]', "runtimes"),
        ('log_level = "loud"', "log_level"),
        ('brokr = "mqtt://x"', "brokr"),
        ("this is not toml", "--config"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, line: str, named: str) -> None:
    variables = {} if line.startswith("device_id") else {"SHOAL_AGENT_DEVICE_ID": "d"}
    with pytest.raises(ConfigError, match=f"^{named}:"):
        load_config(written(tmp_path, line), variables)


def test_a_password_is_never_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as found:
        load_config(None, {"SHOAL_AGENT_DEVICE_ID": "d", "SHOAL_AGENT_BROKER": "http://user:secret@host"})
    assert "secret" not in str(found.value)
    assert "mqtts://host:port" in str(found.value)


@pytest.mark.parametrize("tags", ["site", "=plant7", "site=plant7,line"])
def test_a_tag_without_a_name_or_a_value_is_named(tags: str) -> None:
    with pytest.raises(ConfigError, match=r"^tags: .* is not name=value"):
        load_config(None, {"SHOAL_AGENT_DEVICE_ID": "d", "SHOAL_AGENT_TAGS": tags})


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_bytes(b'device_id = "\xff"')
    with pytest.raises(ConfigError, match=r"^--config: .* is not TOML"):
        load_config(path, {})


def test_a_state_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^state_dir: .*can't be written \(.*\): name a folder"):
        load_config(None, {"SHOAL_AGENT_STATE_DIR": str(tmp_path / "file" / "state")})


def test_an_id_that_a_power_cut_emptied_is_made_again(tmp_path: Path) -> None:
    variables = {"SHOAL_AGENT_STATE_DIR": str(tmp_path)}
    first = load_config(None, variables).device_id
    (tmp_path / "device-id").write_text("")
    again = load_config(None, variables).device_id
    assert again.startswith("dev-")
    assert (tmp_path / "device-id").read_text() == f"{again}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["device-id"]
    assert first.startswith("dev-")


@pytest.mark.parametrize(("text", "usable"), [("", False), ("uninitialized\n", False), ("0123456789abcdef" * 2, True)])
def test_images_ship_without_a_machine_id(tmp_path: Path, text: str, usable: bool) -> None:
    """Devices made of one image must not all get the id that an empty file would give."""
    path = tmp_path / "machine-id"
    assert machine_id(path) == ""
    path.write_text(text)
    assert bool(machine_id(path)) is usable


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--config: .*nowhere.toml"):
        load_config(tmp_path / "nowhere.toml", {})


def test_an_enrolled_device_needs_no_more_than_its_state_folder(tmp_path: Path) -> None:
    identity = Identity("cam-9", "key", "a" * 64, certificate="c", ca="r", broker="mqtts://fleet.example:8883")
    save_identity(identity_folder(tmp_path), identity)
    where = {"SHOAL_AGENT_STATE_DIR": str(tmp_path)}
    found = load_config(None, where)
    assert (found.device_id, found.broker) == ("cam-9", "mqtts://fleet.example:8883")
    other = load_config(None, {**where, "SHOAL_AGENT_BROKER": "mqtt://10.0.0.5:1883"})
    assert other.broker == "mqtt://10.0.0.5:1883"
    with pytest.raises(ConfigError, match="cam-9"):
        load_config(None, {**where, "SHOAL_AGENT_DEVICE_ID": "cam-8"})
    with pytest.raises(ConfigError, match="pkcs11"):
        load_config(None, {**where, "SHOAL_AGENT_KEY": "key.pem"})
    with pytest.raises(ConfigError, match="go together"):
        load_config(None, {**where, "SHOAL_AGENT_CERT_FILE": str(tmp_path)})


def test_trust(tmp_path: Path) -> None:
    def config(**values: str) -> Config:
        given = {"state_dir": str(tmp_path), "device_id": "d", **values}
        return load_config(None, {PREFIX + key.upper(): value for key, value in given.items()})

    (tmp_path / "root.json").write_text("{}")
    assert config(expired_grace_s="86400").expired_grace_s == 86_400
    assert config(root_file=str(tmp_path / "root.json")).root_file
    assert config().broker_is_local
    assert config(broker="mqtt://localhost:1883").broker_is_local
    assert not config(broker="mqtts://broker.example:8883").broker_is_local
    for key, value in (("expired_grace_s", "-1"), ("expired_grace_s", "2592001"), ("expired_grace_s", "nan")):
        with pytest.raises(ConfigError, match=key):
            config(**{key: value})
    with pytest.raises(ConfigError, match="root_file"):
        config(root_file=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("peers = 3", "peers"),
        ("[peers]\nserve = 1", "peers.serve"),
        ("[peers]\nat = ['nowhere']", "peers.at"),
        ("[peers]\nat = ['a:1', 2]", "peers.at"),
        ("[peers]\nlisten = '0.0.0.0:99999'", "peers.listen"),
        ("[peers]\nrate_mb_s = 0", "peers.rate_mb_s"),
        ("[peers]\nserver = true", "peers.server"),
        ("[sources]\nmirrors = ['https://mirror.example/']", "sources.mirrors"),
        ("[sources]\nmirrors = ['http://mirror.example/{digest}']", "sources.mirrors"),
        ("[sources]\norder = ['pigeon']", "sources.order"),
        ("[sources]\norder = ['usb', 'usb']", "sources.order"),
        ("[bundles]\nfolder = 'media'", "bundles.folder"),
        ("[bundles]\nname = '../x'", "bundles.name"),
        ("[bundles]\ndays = -1", "bundles.days"),
    ],
)
def test_other_sources_are_checked_by_name(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'state_dir = "{tmp_path}"\n{text}\n')
    with pytest.raises(ConfigError, match=f"^{key}: "):
        load_config(path, {})


def test_other_sources_from_a_file_and_from_variables(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(
        f'state_dir = "{tmp_path}"\n[sources]\norder = ["usb", "https"]\nmirrors = ["https://m.example/a/{{digest}}"]\n'
        '[peers]\nat = ["[fd00::1]:8472"]\nserve = true\n[bundles]\nfolder = "/media"\noffline = true\ndays = 30\n'
    )
    found = load_config(path, {"SHOAL_AGENT_PEERS": '{ at = ["10.0.0.7:1"], mdns = true }'}).sources
    assert [one.value for one in found.order] == ["usb", "https", "mqtt"], "MQTT is always there"
    assert (found.peers, found.mdns, found.serve) == (("10.0.0.7:1",), True, False)
    assert (found.folder, found.offline, found.days, found.bundle) == ("/media", True, 30.0, "default")
    with pytest.raises(ConfigError, match="inline table"):
        load_config(path, {"SHOAL_AGENT_PEERS": "serve"})
