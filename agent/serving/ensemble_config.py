"""`[[ensembles]]` of the agent's configuration: graphs of models that are asked as one, and their rules. Pure.

The parts are structs, as they are also what the inference worker is told. What needs the models' own tensors is checked
where they are known: `agent.serving.ensemble_fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from agent.errors import ConfigError
from agent.tables import Table

MOST_ENSEMBLES = 16
MOST_STEPS = 32
MOST_TENSORS = 64  # of one ensemble, or of one step
LONGEST_NAME = 200


class StepConfig(msgspec.Struct, frozen=True):
    """One model's part in an ensemble.

    Attributes:
        name: of the step, unlike any other's of its ensemble.
        model: that is asked.
        inputs: by input of the model, the ensemble's tensor that it is given.
        outputs: by output of the model, the ensemble's tensor that it becomes; outputs that are not named are dropped.
    """

    name: str
    model: str
    inputs: dict[str, str]
    outputs: dict[str, str]


class EnsembleConfig(msgspec.Struct, frozen=True):
    """One ensemble.

    Attributes:
        name: what it is asked by.
        inputs: its tensors that clients give.
        outputs: its tensors that clients get, in this order.
        steps: each can run when its inputs are there.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[StepConfig, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Those that it needs, each once."""
        return tuple(dict.fromkeys(step.model for step in self.steps))

    def place(self, step: StepConfig) -> str:
        """How errors name a step."""
        return f"ensembles[{self.name}].steps[{step.name}]"


def read_ensembles(values: Any) -> tuple[EnsembleConfig, ...]:
    """Read the array of tables.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    if not isinstance(values, list) or len(values) > MOST_ENSEMBLES:
        raise ConfigError(f"ensembles: must be at most {MOST_ENSEMBLES} tables, each begun by [[ensembles]]")
    found = tuple(_ensemble(number, one) for number, one in enumerate(values))
    names = [one.name for one in found]
    for one in found:
        if names.count(one.name) > 1:
            raise ConfigError(f"ensembles[{one.name}].name: there are two of it; give each its own")
        for step in one.steps:
            if step.model in names:
                raise ConfigError(
                    f"{one.place(step)}.model: {step.model!r} is an ensemble: name its steps here instead"
                )
    return found


def _ensemble(number: int, values: Any) -> EnsembleConfig:
    table = Table(f"ensembles[{number}]", values)
    name = table.identifier("name", "")
    table.name = f"ensembles[{name}]"
    inputs, outputs = _tensors(table, "inputs"), _tensors(table, "outputs")
    given = table.take("steps", [])
    if not isinstance(given, list) or not 0 < len(given) <= MOST_STEPS:
        raise ConfigError(f"{table.name}.steps: must be 1 to {MOST_STEPS} tables, each begun by [[ensembles.steps]]")
    steps = tuple(_step(Table(f"{table.name}.steps[{index}]", one), table.name) for index, one in enumerate(given))
    table.refuse_rest()
    found = EnsembleConfig(name, inputs, outputs, steps)
    for step in steps:
        if [one.name for one in steps].count(step.name) > 1:
            raise ConfigError(f"{table.name}.steps: two are named {step.name!r}; give them names of their own (name)")
    _check_tensors(found)
    _check_order(found)
    return found


def _step(table: Table, ensemble: str) -> StepConfig:
    model = table.identifier("model", "")
    name = table.identifier("name", model)
    table.name = f"{ensemble}.steps[{name}]"
    found = StepConfig(name, model, _mapping(table, "inputs", "x", "image"), _mapping(table, "outputs", "y", "scores"))
    table.refuse_rest()
    for tensor in (made := list(found.outputs.values())):
        if made.count(tensor) > 1:
            raise ConfigError(f"{table.name}.outputs: two become {tensor!r}; give each tensor a name of its own")
    return found


def _check_tensors(ensemble: EnsembleConfig) -> None:
    """Every tensor comes from one place, and goes somewhere."""
    place = f"ensembles[{ensemble.name}]"
    source = dict.fromkeys(ensemble.inputs, f"{place}.inputs")
    for step in ensemble.steps:
        for output, tensor in step.outputs.items():
            if tensor in source:
                raise ConfigError(
                    f"{ensemble.place(step)}.outputs.{output}: {tensor!r} is made by {source[tensor]} already; "
                    "name another tensor"
                )
        source |= dict.fromkeys(step.outputs.values(), f"{ensemble.place(step)}.outputs")
    wanted = [(tensor, f"{place}.outputs") for tensor in ensemble.outputs]
    for step in ensemble.steps:
        wanted += [(tensor, f"{ensemble.place(step)}.inputs.{name}") for name, tensor in step.inputs.items()]
    for tensor, where in wanted:
        if tensor not in source:
            raise ConfigError(f"{where}: no step makes {tensor!r}, and it is no input; there are {_listed(source)}")
    used = {tensor for tensor, _ in wanted}
    for tensor, where in source.items():
        if tensor not in used:
            raise ConfigError(f"{where}: nothing uses {tensor!r}; leave it out, or add it to {place}.outputs")


def _check_order(ensemble: EnsembleConfig) -> None:
    there, waiting = set(ensemble.inputs), list(ensemble.steps)
    while waiting:
        ready = [step for step in waiting if there.issuperset(step.inputs.values())]
        if not ready:
            names = ", ".join(step.name for step in waiting)
            place = f"ensembles[{ensemble.name}].steps"
            raise ConfigError(f"{place}: each of {names} waits for what another of them makes: break the cycle")
        there.update(*(step.outputs.values() for step in ready))
        waiting = [step for step in waiting if step not in ready]


def _tensors(table: Table, key: str) -> tuple[str, ...]:
    found = table.texts(key, MOST_TENSORS)
    if not found or not all(map(_fits, found)) or len(set(found)) < len(found):
        raise ConfigError(f"{table.name}.{key}: must be a list of tensors' names, each once, such as [{key[:-1]!r}]")
    return tuple(found)


def _mapping(table: Table, key: str, name: str, tensor: str) -> dict[str, str]:
    found = table.take(key, {})
    pairs = list(found.items()) if isinstance(found, dict) else []
    if not 0 < len(pairs) <= MOST_TENSORS or not all(isinstance(to, str) and _fits(to) for _, to in pairs):
        raise ConfigError(
            f"{table.name}.{key}: must be a table of the ensemble's tensors by {key[:-1]} of the model, such as "
            f'{{ {name} = "{tensor}" }}'
        )
    return {str(one): str(to) for one, to in pairs}


def _fits(name: str) -> bool:
    return 0 < len(name) <= LONGEST_NAME and name.isprintable()


def _listed(names: Sequence[str] | dict[str, str]) -> str:
    return ", ".join(sorted(names))[:500]
