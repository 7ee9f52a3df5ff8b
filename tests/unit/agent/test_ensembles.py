"""Ensembles without I/O: what is declared, whether models fit together, and what is told of those that don't."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import load_config
from agent.errors import ConfigError
from agent.protocol.manifest import Manifest, TensorSpec
from agent.serving.ensemble_config import EnsembleConfig, StepConfig, read_ensembles
from agent.serving.ensemble_fit import MisfitError, fit, problem_of
from agent.serving.ensemble_health import HOLD_S, EnsembleHealth
from agent.serving.ipc import Declare, ToWorker
from tests.serving_worker import described

PLATE = """
[[ensembles]]
name = "read-plate"
inputs = ["image"]
outputs = ["text", "sure"]

[[ensembles.steps]]
model = "finder"
inputs = { x = "image" }
outputs = { crop = "plate", score = "sure" }

[[ensembles.steps]]
name = "read"
model = "reader"
inputs = { x = "plate" }
outputs = { y = "text" }
"""


def read(text: str) -> tuple[EnsembleConfig, ...]:
    return read_ensembles(tomllib.loads(text)["ensembles"])


def test_a_declaration_is_read_and_survives_the_way_to_the_worker() -> None:
    (found,) = read(PLATE)
    assert found == EnsembleConfig(
        "read-plate",
        ("image",),
        ("text", "sure"),
        (
            StepConfig("finder", "finder", {"x": "image"}, {"crop": "plate", "score": "sure"}),
            StepConfig("read", "reader", {"x": "plate"}, {"y": "text"}),
        ),
    )
    assert found.models == ("finder", "reader")
    sent = msgspec.msgpack.encode(Declare((found,)))
    assert msgspec.msgpack.decode(sent, type=ToWorker) == Declare((found,))


def test_the_agents_file_and_variables_have_it(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'state_dir = "{tmp_path}"\ndevice_id = "cam"\n{PLATE}')
    assert load_config(path, {}).ensembles == read(PLATE)
    inline = '[{ name = "e", inputs = ["i"], outputs = ["o"], steps = [{ model = "m", inputs = { x = "i" }, outputs = { y = "o" } }] }]'  # noqa: E501
    (found,) = load_config(path, {"SHOAL_AGENT_ENSEMBLES": inline}).ensembles
    assert found.name == "e"
    with pytest.raises(ConfigError, match="ensembles: is no TOML array"):
        load_config(path, {"SHOAL_AGENT_ENSEMBLES": "[{"})


def test_the_example_in_the_documentation_is_one() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "operations.md").read_text()
    section = text.partition("## Ensembles")[2].partition("```toml\n")[2].partition("```")[0]
    (found,) = read(section)
    assert found.models == ("plate-finder", "plate-reader")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('name = "read-plate"', 'name = "read plate"', r"ensembles\[0\].name: 'read plate' is not 1 to 64 letters"),
        ('inputs = ["image"]', "", r"ensembles\[read-plate\].inputs: must be a list of tensors' names"),
        ('inputs = ["image"]', 'inputs = ["image", "image"]', "each once"),
        ('inputs = ["image"]', 'inputs = ["image", "mask"]', r"read-plate\].inputs: nothing uses 'mask'"),
        ('"text", "sure"', '"text"', r"steps\[finder\].outputs: nothing uses 'sure'; leave it out, or add it"),
        ('"text", "sure"', '"txt", "sure"', r"read-plate\].outputs: no step makes 'txt'.* image, plate, sure, text"),
        ('x = "plate"', 'x = "plat"', r"steps\[read\].inputs.x: no step makes 'plat'"),
        ('y = "text"', 'y = "plate"', r"steps\[read\].outputs.y: 'plate' is made by .*steps\[finder\].outputs already"),
        ('score = "sure"', 'score = "plate"', r"steps\[finder\].outputs: two become 'plate'"),
        ('{ x = "image" }', '{ x = "image", hint = "text" }', "each of finder, read waits for what another"),
        ('{ x = "plate" }', "{}", r"steps\[read\].inputs: must be a table of the ensemble's tensors by input"),
        ('{ x = "plate" }', "{ x = 1 }", "must be a table"),
        ('name = "read"', 'name = "finder"', "two are named 'finder'"),
        ('name = "read"', "nmae = 1", r"steps\[reader\].nmae: there is no such key"),
        ('model = "reader"', 'model = "read-plate"', r"steps\[read\].model: 'read-plate' is an ensemble"),
        ('model = "reader"', "", r"steps\[1\].model: '' is not 1 to 64"),
    ],
)
def test_what_is_wrong_is_named(before: str, after: str, said: str) -> None:
    assert before in PLATE
    with pytest.raises(ConfigError, match=said):
        read(PLATE.replace(before, after))


def test_an_ensemble_needs_steps_and_a_name_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"e\].steps: must be 1 to 32 tables"):
        read('[[ensembles]]\nname = "e"\ninputs = ["a"]\noutputs = ["b"]\n')
    with pytest.raises(ConfigError, match=r"ensembles\[read-plate\].name: there are two"):
        read(PLATE + PLATE)
    with pytest.raises(ConfigError, match="at most 16 tables"):
        read_ensembles([{}] * 17)


def finder(**changes: Any) -> Manifest:
    made = described(
        "finder",
        (TensorSpec("x", "uint8", (-1, 3, 64, 64)),),
        (TensorSpec("crop", "float32", (-1, 3, 16, -1)), TensorSpec("score", "float32", (-1, 1))),
    )
    return msgspec.structs.replace(made, **changes)


def reader(**changes: Any) -> Manifest:
    made = described("reader", (TensorSpec("x", "float32", (-1, 3, -1, 32)),), (TensorSpec("y", "string", (-1,)),))
    return msgspec.structs.replace(made, **changes)


def fitted(**members: Manifest) -> Any:
    return fit(read(PLATE)[0], {"finder": finder(), "reader": reader(), **members})


def test_what_an_ensemble_takes_and_gives_is_what_its_models_do() -> None:
    found = fitted(reader=reader(max_batch=4, labels=("a",)))
    assert found.inputs == (TensorSpec("image", "uint8", (-1, 3, 64, 64)),)
    assert found.outputs == (TensorSpec("text", "string", (-1,)), TensorSpec("sure", "float32", (-1, 1)))
    assert (found.max_batch, found.labels, found.platform) == (4, (), "ensemble")


def test_a_model_that_takes_one_row_at_a_time_takes_any_number_as_a_step() -> None:
    one = reader(inputs=(TensorSpec("x", "float32", (1, 3, 16, 32)),), outputs=(TensorSpec("y", "string", (1,)),))
    assert fitted(reader=one).outputs[0].shape == (-1,)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"finder": finder(inputs=(TensorSpec("image", "uint8", (-1,)),))}, r"finder@1 wants 'image': name the tensor"),
        ({"finder": finder(outputs=finder().outputs[1:])}, r"outputs.crop: finder@1 has none of that name, but score"),
        (
            {"reader": reader(inputs=(TensorSpec("x", "uint8", (-1, 3, 16, 32)),))},
            r"steps\[read\].inputs.x \(reader@1\): 'plate' is uint8 .* and float32 .*finder@1.*roll out versions",
        ),
        ({"reader": reader(inputs=(TensorSpec("x", "float32", (-1, 3, 32)),))}, r"\[-1, 3, 32\] there"),
        ({"reader": reader(inputs=(TensorSpec("x", "float32", (-1, 3, 24, 32)),))}, r"\[-1, 3, 24, 32\] there"),
    ],
)
def test_models_that_do_not_fit_together_are_named_with_the_remedy(members: dict[str, Manifest], said: str) -> None:
    with pytest.raises(MisfitError, match=said):
        fitted(**members)


def test_free_sizes_are_checked_when_they_are_known() -> None:
    (spec,) = reader().inputs
    assert problem_of(reader(), [(spec, "float32", (2, 3, 16, 32))]) is None
    assert "takes float32 [-1, 3, -1, 32], and is given float32 [2, 3, 16, 8]" in str(
        problem_of(reader(), [(spec, "float32", (2, 3, 16, 8))])
    )
    assert "is given float64" in str(problem_of(reader(), [(spec, "float64", (2, 3, 16, 32))]))


def test_rows_of_a_model_that_takes_one_at_a_time_must_be_as_many_in_each_input() -> None:
    specs = tuple(TensorSpec(name, "float32", (1, 2)) for name in "ab")
    one = described("m", specs, (TensorSpec("y", "float32", (1, 2)),))
    given = [(spec, "float32", (rows, 2)) for spec, rows in zip(specs, (2, 3), strict=True)]
    assert problem_of(one, given) == "its inputs have different numbers of rows: {'a': 2, 'b': 3}"


def test_what_holds_for_a_moment_is_no_problem_of_the_device() -> None:
    told: list[tuple[str, str | None]] = []
    health = EnsembleHealth(lambda name, why: told.append((name, why)))
    health.said({"a": "no finder"}, 0.0)
    health.tick(HOLD_S - 1)
    health.said({}, HOLD_S - 0.5)
    health.tick(HOLD_S)
    assert told == []
    health.said({"a": "no finder"}, 10.0)
    health.said({"a": "no reader"}, 10.0 + HOLD_S / 2)
    health.tick(10.0 + HOLD_S)
    health.tick(20.0 + HOLD_S)
    assert told == [("a", "no reader")]
    health.said({}, 30.0)
    assert told[1:] == [("a", None)]
