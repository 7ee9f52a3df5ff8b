"""Dashboard and alerts ask for what server and agents really export: metrics, their labels, and the labels' values."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from agent.protocol.codec import encode
from agent.protocol.messages import Presence
from agent.protocol.topics import DeviceTopic, device_topic
from fleet_server.gateway.inbox import Message
from tests import promtool
from tests.fleet import wait_until, write_classifier
from tests.integration.test_agent_metrics import infer, manifest, text
from tests.rest import fill, serving
from tests.serving_worker import serve, start_worker

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "shoal.json"
PROMETHEUS = ROOT / "deploy" / "prometheus"
SELECTOR = re.compile(r"\b((?:shoal|process)_[a-z0-9_]+|up)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPED = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
SCRAPED = {"job", "instance"}  # what Prometheus adds


@dataclass
class Exported:
    """What one name has: the labels of its samples, and their values."""

    labels: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """What a real server and a real agent say, by the names that Prometheus keeps it under."""
    return _read(_server(tmp_path_factory.mktemp("server")), _agent(tmp_path_factory.mktemp("agent")))


def _server(folder: Path) -> str:
    with serving(folder, None) as app:
        fill(app.state.database, 4)
        topic = device_topic("dev-1", DeviceTopic.PRESENCE)
        app.state.gateway._inbox.put(Message(topic, encode(Presence(online=True, boot_id="b"))))
        client = TestClient(app, base_url="http://localhost", client=("127.0.0.1", 5))
        assert client.get("/healthz").status_code == 200
        return wait_until(
            "a message", lambda: said if 'kind="presence"' in (said := client.get("/metrics").text) else None
        )


def _agent(folder: Path) -> str:
    write_classifier(folder / "model")
    worker = start_worker()
    try:
        serve(worker.channel, manifest("a", "1"), folder / "model")
        infer(worker.url, 1)
        return text(worker.channel, worker.url)
    finally:
        worker.channel.close()
        worker.process.wait(20)


def _read(*texts: str) -> dict[str, Exported]:
    found: dict[str, Exported] = defaultdict(Exported)
    found["up"] = Exported()
    for family in (one for said in texts for one in text_string_to_metric_families(said)):
        for sample in family.samples:
            for name, value in sample.labels.items():
                found[sample.name].labels[name].add(value)
            found[sample.name]  # without labels too
    return dict(found)


def _dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def _queries() -> list[tuple[str, str]]:
    board = [
        (f"panel {panel['title']}", target["expr"])
        for panel in _dashboard()["panels"]
        for target in panel.get("targets", ())
    ]
    rules = [
        (f"alert {rule['alert']}", rule["expr"])
        for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
        for rule in group["rules"]
    ]
    return [*board, *rules]


@pytest.mark.parametrize(("where", "query"), _queries())
def test_what_is_asked_for_is_exported(exported: dict[str, Exported], where: str, query: str) -> None:
    selectors = SELECTOR.findall(query)
    assert selectors, "it asks for something"
    known: set[str] = set(SCRAPED) | {"le"}
    for name, matchers in selectors:
        assert name in exported, f"{where}: nobody exports {name}"
        has = exported[name].labels
        known |= set(has)
        for label, operator, value in MATCHER.findall(matchers):
            assert label in {*has, *SCRAPED}, f"{where}: {name} has no label {label}"
            if label in has and not value.startswith("$") and label != "code":
                wanted = set(value.split("|")) if operator in {"=~", "!~"} else {value}
                assert wanted <= has[label], f"{where}: {label} of {name} is never one of {wanted - has[label]}"
    for group in GROUPED.findall(query):
        asked = {one.strip() for one in group.split(",")}
        assert asked <= known, f"{where}: none of what is asked for has {asked - known}"


def test_every_panel_is_whole() -> None:
    panels = _dashboard()["panels"]
    ids = [one["id"] for one in panels]
    assert len(ids) == len(set(ids))
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["targets"]
            labels = {label for one in panel["targets"] for label in re.findall(r"{{(\w+)}}", one["legendFormat"])}
            grouped = {
                label.strip()
                for one in panel["targets"]
                for group in GROUPED.findall(one["expr"])
                for label in group.split(",")
            }
            assert labels <= grouped | SCRAPED, panel["title"]


def test_commands_of_alerts_and_the_configuration_name_what_there_is() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert [(PROMETHEUS / one).is_file() for one in config["rule_files"]] == [True]
    jobs = {one["job_name"] for one in config["scrape_configs"]}
    asked = {value for _, query in _queries() for label, _, value in MATCHER.findall(query) if label == "job"}
    assert asked <= jobs


@pytest.mark.skipif(not promtool.FOUND, reason="promtool is not installed (apt-get install prometheus)")
def test_promtool_takes_configuration_and_rules() -> None:
    promtool.check_config(PROMETHEUS / "prometheus.yml")


@pytest.mark.skipif(not promtool.FOUND, reason="promtool is not installed (apt-get install prometheus)")
@pytest.mark.parametrize(("where", "query"), _queries())
def test_promtool_takes_every_query(tmp_path: Path, where: str, query: str) -> None:
    """As a rule that records it; Grafana fills its variables in first."""
    filled = query.replace("$fleet", ".*")
    rule = {"groups": [{"name": where, "rules": [{"record": "test:query", "expr": filled}]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rule))
    promtool.check_rules(tmp_path / "rules.yml")


def test_the_device_that_is_scraped_is_an_agent() -> None:
    """The example's second address is the local API's default."""
    from agent.config import Config

    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    targets = {one["job_name"]: one["static_configs"][0]["targets"] for one in config["scrape_configs"]}
    assert targets["shoal-agent"] == [Config.listen]
    assert httpx.URL(f"http://{targets['shoal-server'][0]}").port == 7470
