"""The SDK from a live net to devices and back, on a server and an agent that it starts itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from fleet_server.sdk import (
    ApiError,
    AsyncModel,
    AsyncShoal,
    BuildError,
    DeployError,
    LocalError,
    Model,
    NetError,
    NotFoundError,
    Shoal,
)

PROFILE = {"name": "here", "match": {}, "runtime": "onnx", "precisions": ["fp32"]}


def rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of noise, of which one of three channels is brighter."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (count,), generator=random)
    x = torch.randn(count, 3, 12, 12, generator=random)
    x[torch.arange(count), y] += 0.7
    return x, y


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def shoal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shoal]:
    with Shoal.local(tmp_path_factory.mktemp("local") / "fleet") as found:
        yield found


@pytest.fixture(scope="module")
def compiled(shoal: Shoal) -> Model:
    net, (x, y) = make_net(), rows(600, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32, shuffle=True)
    for _ in range(3):
        for images, labels in batches:
            optimizer.zero_grad()
            criterion(net(images), labels).backward()
            optimizer.step()
    return shoal.compile(net, optimizer, criterion, example_inputs=x[:2], train=batches, evaluate=rows(200, 2))


def test_from_a_net_to_a_device_and_back(shoal: Shoal, compiled: Model) -> None:
    whole = compiled.score()
    assert whole["accuracy"] > 0.9
    assert "not pushed" in repr(compiled)
    with pytest.raises(NetError, match="optimize"):
        compiled.predict(torch.zeros(1, 3, 12, 12))
    model = compiled.optimize(name="net", profiles=[PROFILE], prune=0.5, budget_points=5, epochs=2)
    assert model is compiled
    assert model.reference == "net@1"
    assert model.chosen is not None
    assert {one["net"] for one in model.chosen.tried} == {"whole", "pruned-0.5"}
    assert "here ready" in repr(model)
    assert "<td>here</td>" in model._repr_html_()
    version = shoal.client.get("/models/net/versions/1")
    assert version["gate"]["min_accuracy"] == pytest.approx(whole["accuracy"] - 0.05)
    deployment = model.deploy("accelerator==cuda", fallback="cpu")
    assert deployment.query == "provider==cpu"
    assert deployment.status == "succeeded"
    assert "succeeded, 1 of 1 devices" in repr(deployment)
    assert "agent-1" in deployment._repr_html_()
    assert "agent-1" in shoal._repr_html_()
    images, labels = rows(300, 3)
    outputs = model.predict(images)
    assert isinstance(outputs, torch.Tensor)
    assert model.answered == [{"device": "agent-1", "rows": 300}]
    assert (outputs.argmax(1) == labels).double().mean() > 0.85
    assert (shoal.model("net").predict(images.numpy()) == outputs.numpy()).all(), "an array gives an array"
    with pytest.raises(ApiError) as refused:
        model.predict(images, target="arch==none")
    assert refused.value.code == "no_device_serves"
    (measured,) = model.measured()
    assert measured["on"] == "agent-1", "deploy had the device prove it"
    assert shoal.devices("version==net@1")
    again = shoal.model("net")
    assert again.reference == "net@1"
    assert deployment.revert().status == "reverted"


def test_the_next_version_has_the_next_number_and_the_async_twin_does_the_same(shoal: Shoal, compiled: Model) -> None:
    async def build() -> AsyncModel:
        return await AsyncModel(compiled).optimize(name="net", profiles=["plain"], quantize=False)

    shoal.client.post("/profiles", {**PROFILE, "name": "plain"})
    found = asyncio.run(build())
    assert repr(found) == "<AsyncModel net@2: plain ready>"

    async def ask() -> tuple[str, str, list[str]]:
        token = shoal.client.post("/tokens", {"name": "twin", "role": "releaser"})["token"]
        async with AsyncShoal(shoal.url, token) as twin:
            assert [one["id"] for one in await twin.devices("provider==cpu")] == ["agent-1"]
            model = await twin.model("net", "1")
            deployment = await model.deploy("cpu")
            served = await deployment.status()
            images, labels = rows(100, 4)
            outputs = await model.predict(images)
            assert (outputs.argmax(1) == labels).double().mean() > 0.85
            shown = [repr(one) for one in (twin, model, deployment) if "<table>" in one._repr_html_()]
            return served, await (await deployment.revert()).status(), shown

    served, after, shown = asyncio.run(ask())
    assert (served, after) == ("succeeded", "reverted")
    assert [one.split()[0] for one in shown] == ["<AsyncShoal", "<AsyncModel", "<AsyncDeployment"]


def test_a_target_that_no_device_matches_names_what_there_is(shoal: Shoal) -> None:
    with pytest.raises(DeployError, match=r"'accelerator==cuda', nor the fallback 'arch==none': the fleet has 1 dev"):
        shoal.model("net").deploy("accelerator==cuda", fallback="arch==none")


def test_a_profile_of_the_same_name_that_says_otherwise_is_refused(shoal: Shoal, compiled: Model) -> None:
    other = {**PROFILE, "name": "differs"}
    shoal.client.post("/profiles", other)
    with pytest.raises(BuildError, match="another precisions"):
        compiled.optimize(name="net", profiles=[{**other, "precisions": ["int8"]}])


def test_a_model_that_is_not_there(shoal: Shoal) -> None:
    with pytest.raises(NotFoundError):
        shoal.model("absent")


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "server").write_text("a file where a folder has to be")
    with pytest.raises(LocalError, match=r"the server does not start: [\s\S]*its log is"), Shoal.local(tmp_path):
        pass


class Branches(nn.Module):
    """A net that torch.export can't follow: what it does depends on numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x


def test_a_net_that_cannot_be_exported(shoal: Shoal) -> None:
    model = shoal.compile(Branches(), example_inputs=torch.ones(2, 4))
    with pytest.raises(NetError, match="can't be exported"):
        model.optimize(name="branches")
    with pytest.raises(NotFoundError):
        shoal.model("branches")
