"""Passes with training data, on nets small enough for seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from converters.errors import ConversionError
from converters.steps.export import export_onnx
from converters.training.channels import analyse, count, kept, prepared, remove, without
from converters.training.compress import CompressionPlan, compress
from converters.training.data import Rows, deciding, hold_back, read_training, read_validation
from converters.training.distill import check_student
from converters.training.fit import Fitting, copied, error, fit, outputs
from converters.training.prune import Trained
from converters.training.quantize_aware import quantize_aware
from converters.training.refit import is_marked, refit, save_weights
from converters.training.sparsify import sparsify

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
QUICK = Fitting(epochs=4, rate=5e-3, batch=32)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, groups=channels), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(6, 32), nn.Linear(4, 32), nn.Linear(64, 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([torch.relu(self.left(a)), torch.relu(self.right(b))], 1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.last = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        q, k, v = self.qkv(x).reshape(rows, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, 5, 16))
        return self.last((x + self.down(torch.relu(self.up(x)))).mean(1))


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(), Residual(32), nn.Conv2d(32, 48, 3, 2, 1),
        nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 3),
    ).eval()  # fmt: skip


def images(count: int = 400, seed: int = 0) -> Rows:
    """The brightest of three channels."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 3, 8, 8)).astype(np.float32)
    y = rng.integers(0, 3, count)
    x[np.arange(count), y] += 0.7
    return Rows({"x": x}, y.astype(np.int64))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    made = conv_net()
    fit(made, images(), Fitting(epochs=6, rate=3e-3, batch=32))
    assert error(made, images(seed=9)) < 10
    return made


def trained(rows: Rows, how: Fitting = QUICK) -> Trained:
    return Trained(*hold_back(rows, 0), how)


def test_channels_are_truly_removed_and_the_answer_keeps_its_shape(net: nn.Module) -> None:
    rows = images()
    structure = analyse(net, rows)
    assert structure.left_alone == {"9": "it has few channels"}
    pruned = copied(net)
    left = remove(pruned, structure, dict.fromkeys(structure.groups, 0.5), rows)
    assert sorted(left.values()) == [16, 24]
    assert count(pruned, rows)[0] < 0.4 * count(net, rows)[0]
    assert [tuple(m.weight.shape) for m in pruned.modules() if isinstance(m, nn.Conv2d)] == [
        (16, 3, 3, 3), (16, 1, 3, 3), (16, 16, 1, 1), (24, 16, 3, 3),
    ]  # fmt: skip
    assert outputs(pruned, rows).shape == (400, 3)


def test_going_without_channels_is_like_removing_them_and_is_undone(net: nn.Module) -> None:
    rows = images(64)
    before = outputs(net, rows)
    structure = analyse(net, rows)
    for root in structure.groups:
        graph, importance = prepared(net, rows)
        with without(net, graph, root, 0.5, importance):
            blind = outputs(net, rows)
        removed = copied(net)
        remove(removed, structure, {root: 0.5}, rows)
        assert torch.allclose(blind, outputs(removed, rows), atol=1e-4), root
        assert not torch.allclose(blind, before, atol=1e-3)
        assert torch.equal(outputs(net, rows), before)


def test_work_is_what_the_layers_multiply() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.Flatten(), nn.Linear(16 * 64, 5)).eval()
    assert count(plain, images(4)) == (16 * 3 * 9 * 64 + 16 * 64 * 5, 16 * 27 + 16 + 16 * 64 * 5 + 5)


@pytest.mark.parametrize(
    ("channels", "ratio", "left"),
    [(64, 0.5, 32), (64, 0.99, 16), (64, 0.4, 32), (48, 0.99, 8), (10, 0.9, 4), (3, 0.9, 3), (64, 0, 64)],
)
def test_numbers_that_stay_suit_vectors(channels: int, ratio: float, left: int) -> None:
    assert kept(channels, ratio) == left


def test_adaptive_pruning_keeps_its_budget_and_is_deterministic(net: nn.Module) -> None:
    rows = images(600)
    plan = CompressionPlan(budget=2.0, how=QUICK)
    (one, *less), problems = compress(net, rows, plan, validation=images(300, seed=7))
    assert problems == []
    assert [other.name for other in less] in ([], ["pruned-less"])
    assert all(one.passes[0].bytes_after < other.passes[0].bytes_after for other in less)
    (record,) = one.passes
    assert (one.name, record.name) == ("pruned", "prune-adaptive")
    assert record.parameters["points_lost_on_deciding_rows"] <= 2.0
    assert record.parameters["work_left"] < 0.6
    assert record.bytes_after < record.bytes_before
    assert error(one.net, images(seed=9)) < error(net, images(seed=9)) + 5
    (again, *_), _ = compress(net, rows, plan, validation=images(300, seed=7))
    assert again.passes[0].parameters == record.parameters
    for mine, theirs in zip(one.net.parameters(), again.net.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_nets_learn_in_either_arithmetic_and_keep_their_layout(bfloat16: bool) -> None:
    made = conv_net()
    fit(made, images(), Fitting(epochs=6, rate=3e-3, batch=32, bfloat16=bfloat16))
    assert error(made, images(seed=9)) < 10
    assert all(one.is_contiguous() and one.dtype is torch.float32 for one in made.parameters())


def test_validation_rows_decide_and_leave_the_training_rows_whole(tmp_path: Path) -> None:
    rows = images(100)
    training, held_back = deciding(rows, None, 0)
    assert (training.count, held_back.count) == (80, 20)
    training, decides = deciding(rows, images(50, seed=3), 0)
    assert (training.count, decides.count) == (100, 50)
    labelled, plain, named = (tmp_path / name for name in ("labelled.npz", "plain.npz", "named.npz"))
    other = images(30, seed=4)
    np.savez(labelled, x=other.inputs["x"], y=other.targets)
    np.savez(plain, x=other.inputs["x"])
    np.savez(named, z=other.inputs["x"], y=other.targets)
    found = read_validation(labelled, rows)
    assert found is not None
    assert found.count == 30
    assert read_validation(plain, rows) is None
    assert read_validation(named, rows) is None
    assert read_validation(None, rows) is None


def test_a_fixed_share_of_the_work(net: nn.Module) -> None:
    (one,), _ = compress(net, images(), CompressionPlan(prune=0.5, how=QUICK))
    assert one.name == "pruned-0.5"
    assert 0.25 < float(one.passes[0].parameters["work_left"] or 0) <= 0.5


def test_pruned_weights_fit_a_fresh_net(net: nn.Module, tmp_path: Path) -> None:
    rows = images()
    pruned = copied(net)
    structure = analyse(pruned, rows)
    remove(pruned, structure, dict.fromkeys(structure.groups, 0.5), rows)
    save_weights(pruned, tmp_path / "w.safetensors")
    assert is_marked(tmp_path / "w.safetensors")
    fresh = conv_net()
    state = pruned.state_dict()
    refit(fresh, state)
    fresh.load_state_dict(state)
    assert torch.equal(outputs(fresh.eval(), rows), outputs(pruned, rows))


def test_zeros_stay_zeros(net: nn.Module) -> None:
    found: dict[str, object] = {}
    sparse = sparsify(net, 0.7, trained(images()), found)
    weights = [m.weight for m in sparse.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert abs(zeros - 0.7) < 0.01
    assert found["sparsity"] == round(zeros, 4)
    assert not [name for name, _ in sparse.named_buffers() if name.endswith("_mask")]


def test_quantization_aware_weights_lie_on_their_grid_and_export(net: nn.Module, tmp_path: Path) -> None:
    found: dict[str, object] = {}
    ready = quantize_aware(net, net, trained(images()), found)
    assert found["layers"] == 5
    for module in ready.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.detach()
            scale = weight.abs().amax(list(range(1, weight.ndim)), keepdim=True) / 127
            steps = weight / scale
            assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert error(ready, images(seed=9)) < error(net, images(seed=9)) + 5
    export_onnx(ready, [images(2).inputs["x"]], tmp_path / "m.onnx", ["x"])
    operators = {node.op_type for node in onnx.load(str(tmp_path / "m.onnx")).graph.node}
    assert not {one for one in operators if "Quantize" in one}


def test_a_student_learns_more_from_a_teacher_than_alone() -> None:
    """Few rows: the teacher knows what they do not say."""
    teacher = conv_net()
    fit(teacher, images(1500, seed=1), Fitting(epochs=4, rate=3e-3))
    few, test = images(20, seed=2), images(600, seed=3)
    gains = []
    for seed in range(3):
        torch.manual_seed(seed)
        alone = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
        taught = copied(alone)
        how = Fitting(epochs=100, rate=3e-3, batch=16, seed=seed)
        fit(alone, few, how)
        fit(taught, few, how, teacher=teacher)
        gains.append(error(alone, test) - error(taught, test))
    assert min(gains) > 0
    assert sum(gains) / 3 > 0.5


def test_a_student_that_does_not_fit_is_refused(net: nn.Module) -> None:
    with pytest.raises(ConversionError, match="answers with shape"):
        check_student(net, nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), images(4))
    with pytest.raises(ConversionError, match="does not run"):
        check_student(net, nn.Linear(7, 3), images(4))


def test_several_inputs_and_numbers_to_be_met() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((400, width)).astype(np.float32) for width in (6, 4))
    rows = Rows({"a": a, "b": b}, (a[:, :1] + b[:, :1] * 2).astype(np.float32))
    made = TwoInputs().eval()
    fit(made, rows, Fitting(epochs=20, rate=1e-2))
    assert error(made, rows) < 5
    (one,), problems = compress(made, rows, CompressionPlan(prune=0.5, how=QUICK))
    assert problems == []
    assert one.passes[0].parameters["parameters_after"] < one.passes[0].parameters["parameters_before"]
    assert error(one.net, rows) < 10


def test_heads_are_left_alone_and_the_rest_is_pruned() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 5, 16)).astype(np.float32)
    rows = Rows({"x": x}, x[:, 0, :3].argmax(1).astype(np.int64))
    structure = analyse(Attention().eval(), rows)
    assert "up" in structure.groups
    assert "qkv" in structure.left_alone
    wide = nn.Sequential(nn.Flatten(), nn.Linear(80, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    assert analyse(wide, rows).left_alone == {"3": "they are the net's answer"}


def test_a_net_that_can_not_be_pruned_says_so_and_the_rest_goes_on() -> None:
    tiny = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    nets, problems = compress(tiny, images(), CompressionPlan(how=QUICK, quantize_aware=True))
    assert [one.name for one in nets] == ["whole-qat"]
    assert len(problems) == 1
    assert "no channel of this net can be removed" in problems[0]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros((30, 2))}, "no targets `y`"),
        ({"x": np.zeros((30, 2)), "y": np.zeros(29, int)}, "as many rows"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(3, int)}, "at least 20"),
        ({"x": np.full((30, 2), np.nan), "y": np.zeros(30, int)}, "'x' holds NaN"),
        ({"x": np.zeros((30, 2)), "y": np.full(30, -1)}, "not negative"),
        ({"x": np.zeros((30, 2)), "y": np.array(["a"] * 30)}, "integers or floats"),
    ],
)
def test_training_rows_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(ConversionError, match=said):
        read_training(tmp_path / "t.npz")
    whole = (tmp_path / "t.npz").read_bytes()
    for content in (b"nothing", whole[: len(whole) // 2]):
        (tmp_path / "no.npz").write_bytes(content)
        with pytest.raises(ConversionError, match="not a readable"):
            read_training(tmp_path / "no.npz")
