"""The ensembles of the inference worker: which versions of their models answer a request, and what the steps give.

Tensors go from step to step as arrays of this process. A step runs as soon as its inputs are there, in the queue of its
model, so that steps which need nothing of each other run at once, and requests for an ensemble share batches with those
for its models. A request takes one version of each model from its beginning to its end: what serves when it begins, or
what is tried beside that. Where one of them is taken out before its step, the request begins again. It knows no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from agent.runtimes.base import STRING, Array, Tensors
from agent.serving.bad_request import BadRequestError
from agent.serving.ensemble_config import EnsembleConfig, StepConfig
from agent.serving.ensemble_fit import Fitted, MisfitError, fit, problem_of
from agent.serving.models import LoadedModel, RetiredError, rows_of
from agent.serving.registry import Registry
from agent.serving.statistics import Statistics
from agent.serving.waiting import DeadlineError, QueueFullError

MOST_BEGINNINGS = 8
KEPT_FITS = 16  # combinations of versions whose fit is remembered


class UnservableError(Exception):
    """An ensemble can't be asked now.

    Attributes:
        passing: whether it may be if the client comes again without anybody doing anything.
    """

    def __init__(self, why: str, *, passing: bool) -> None:
        super().__init__(why)
        self.passing = passing


class StepError(Exception):
    """A step failed.

    Attributes:
        where: the step, with its model and version.
        model: that was asked.
        cause: what it raised.
    """

    def __init__(self, step: StepConfig, model: LoadedModel, cause: Exception) -> None:
        self.where = f"step {step.name!r} ({model.manifest.model}@{model.manifest.version})"
        super().__init__(f"{self.where}: {cause}")
        self.model = model
        self.cause = cause


@dataclass
class Asked:
    """One request for an ensemble.

    Attributes:
        inputs: by tensor, checked against what the ensemble takes.
        request_id: the client's; feedback for a step's model names it.
        priority: of every step.
        timeout_s: how long after its coming its last step may begin, in seconds; 0 for as long as it takes.
        came_at: by `time.perf_counter`.
    """

    inputs: Tensors
    request_id: str
    priority: int
    timeout_s: float
    came_at: float = field(default_factory=time.perf_counter)

    @property
    def rows(self) -> int:
        """How many it has."""
        return rows_of(self.inputs)

    def left_s(self) -> float:
        """How much longer a step may wait for its turn; 0 for as long as it takes.

        Raises:
            DeadlineError: not at all.
        """
        if not self.timeout_s:
            return 0.0
        left = self.came_at + self.timeout_s - time.perf_counter()
        if left <= 0:
            raise DeadlineError
        return left


@dataclass(frozen=True)
class Pinned:
    """One version of each model, which fit together.

    Attributes:
        members: by model's name.
        tried: those of them that are tried beside what serves.
        fitted: what the ensemble takes and gives with them.
    """

    members: Mapping[str, LoadedModel]
    tried: frozenset[str]
    fitted: Fitted


@dataclass(frozen=True)
class Answered:
    """What a request got.

    Attributes:
        outputs: by the ensemble's tensors, also those between steps.
        fitted: what the versions that answered take and give.
        then: gives copies to the versions that run beside what answered; to be called when the answer is on its way.
    """

    outputs: Tensors
    fitted: Fitted
    then: Callable[[], None]


class Ensemble:
    """One ensemble.

    Args:
        config: as declared.
        registry: what is loaded.
    """

    def __init__(self, config: EnsembleConfig, registry: Registry) -> None:
        self.config = config
        self.statistics = Statistics()
        self.idle = asyncio.Event()  # no request is on its way
        self.idle.set()
        self._running = 0
        self._registry = registry
        self._fits: dict[tuple[tuple[str, str, str], ...], Fitted | MisfitError] = {}

    def serving(self) -> Pinned:
        """What serves now.

        Raises:
            UnservableError: when a model is missing, or they don't fit together.
        """
        found = {name: self._registry.serving(name) for name in self.config.models}
        members = {name: model for name, model in found.items() if model is not None}
        missing = [name for name in found if name not in members]
        if missing:
            raise UnservableError(f"no version of {', '.join(missing)} is loaded here: roll one out", passing=True)
        try:
            return Pinned(members, frozenset(), self._fit(members))
        except MisfitError as error:
            raise UnservableError(str(error), passing=False) from None

    def taking(self, pinned: Pinned, request_id: str) -> Pinned:
        """The same with those versions that are tried and are to answer this request, where they fit."""
        members, tried = dict(pinned.members), set()
        for name in self.config.models:
            beside = self._registry.beside(name)
            if beside is not None and beside.answers(request_id):
                members[name] = beside.model
                tried.add(name)
        if not tried:
            return pinned
        try:
            fitted = self._fit(members)
        except MisfitError:
            fitted = None
        if fitted is None or fitted.inputs != pinned.fitted.inputs:  # the request was read by what serves
            for name in tried:
                members[name].recorder.rejected()
            return pinned
        return Pinned(members, frozenset(tried), fitted)

    async def infer(self, asked: Asked, read_by: Fitted) -> Answered:
        """One request.

        Args:
            asked: what is asked.
            read_by: what its inputs were checked against.

        Raises:
            StepError: when a step failed; a `QueueFullError` or `DeadlineError` of its model is its cause.
            UnservableError: when a model has gone, or versions change again and again.
            RetiredError: when versions changed meanwhile, and the new ones take something else: read the request anew.
        """
        self._running += 1
        self.idle.clear()
        try:
            return await self._answered(asked, read_by)
        finally:
            self._running -= 1
            if not self._running:
                self.idle.set()

    async def _answered(self, asked: Asked, read_by: Fitted) -> Answered:
        split = True
        for _ in range(MOST_BEGINNINGS):
            pinned = self.serving()
            if pinned.fitted.inputs != read_by.inputs:
                raise RetiredError
            if split:
                pinned = self.taking(pinned, asked.request_id)
            began = time.perf_counter()
            run = _Run(self.config, pinned, asked)
            try:
                tensors = await run.tensors()
            except RetiredError:
                continue
            except StepError as error:
                if error.model.manifest.model in pinned.tried:
                    split = False  # that counts as the version's own, and is no client's loss
                    continue
                self._count(asked, failed=True)
                raise
            self.statistics.ran(asked.rows, time.perf_counter() - began)
            self._count(asked, failed=False)
            return Answered(tensors, pinned.fitted, partial(self._copy, run, asked.request_id))
        raise UnservableError("its models are being exchanged", passing=True)

    def _fit(self, members: Mapping[str, LoadedModel]) -> Fitted:
        manifests = {name: one.manifest for name, one in members.items()}
        key = tuple((one.version, one.variant_id, one.digest) for one in manifests.values())
        known = self._fits.get(key)
        if known is None:
            if len(self._fits) >= KEPT_FITS:
                self._fits.clear()
            try:
                known = fit(self.config, manifests)
            except MisfitError as error:
                known = error
            self._fits[key] = known
        if isinstance(known, MisfitError):
            raise known
        return known

    def _count(self, asked: Asked, *, failed: bool) -> None:
        self.statistics.answered(0.0, time.perf_counter() - asked.came_at, asked.rows, failed=failed)

    def _copy(self, run: _Run, request_id: str) -> None:
        """Tell versions that run beside those which answered of what their models were asked."""
        for step, inputs, outputs in run.done:
            beside = self._registry.beside(step.model)
            if beside is not None and step.model not in run.pinned.tried:
                beside.served(inputs, outputs, rows_of(inputs), request_id)


class Ensembles:
    """All that are declared.

    Args:
        registry: what is loaded.
        expected: which models ought to be served; a model's name is the model's.
    """

    def __init__(self, registry: Registry, expected: Callable[[], frozenset[str]]) -> None:
        self._registry = registry
        self._expected = expected
        self._declared: dict[str, Ensemble] = {}

    def declare(self, configs: tuple[EnsembleConfig, ...]) -> None:
        """Have these, and no others."""
        self._declared = {one.name: Ensemble(one, self._registry) for one in configs}

    def get(self, name: str) -> Ensemble | None:
        """The one of a name; None where there is none, or a model has its name."""
        return None if self._is_model(name) else self._declared.get(name)

    def all(self) -> list[Ensemble]:
        """Those that a name leads to."""
        return [one for name, one in sorted(self._declared.items()) if not self._is_model(name)]

    async def finished(self) -> None:
        """Wait until no request is between two steps."""
        for one in self._declared.values():
            await one.idle.wait()

    def problems(self) -> dict[str, str]:
        """By name, what keeps one from being served; those that are served are not in it."""
        found = {name: self._problem(name, one) for name, one in self._declared.items()}
        return {name: why for name, why in found.items() if why}

    def _problem(self, name: str, ensemble: Ensemble) -> str:
        if self._is_model(name):
            return f"a model named {name} is served here, and answers in its place: give the ensemble another name"
        try:
            ensemble.serving()
        except UnservableError as error:
            return str(error)
        return ""

    def _is_model(self, name: str) -> bool:
        return self._registry.serving(name) is not None or name in self._expected()


class _Run:
    """One request on its way through the graph."""

    def __init__(self, config: EnsembleConfig, pinned: Pinned, asked: Asked) -> None:
        self.pinned = pinned
        self.done: list[tuple[StepConfig, Tensors, Tensors]] = []
        self._config = config
        self._asked = asked
        self._tensors = dict(asked.inputs)

    async def tensors(self) -> Tensors:
        """All tensors of the ensemble, when every step is done; when one fails, those that wait are given up."""
        waiting = list(self._config.steps)
        running: set[asyncio.Task[None]] = set()
        try:
            while waiting or running:
                ready = [step for step in waiting if self._tensors.keys() >= set(step.inputs.values())]
                waiting = [step for step in waiting if step not in ready]
                if len(ready) == 1 and not running:
                    await self._step(ready[0])
                    continue
                running |= {asyncio.create_task(self._step(step)) for step in ready}
                ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                running |= ended  # until it is known how they ended
                for task in ended:
                    task.result()
                running -= ended
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return self._tensors

    async def _step(self, step: StepConfig) -> None:
        model, asked = self.pinned.members[step.model], self._asked
        inputs = {name: self._tensors[tensor] for name, tensor in step.inputs.items()}
        try:
            self._check(step, model, inputs)
            outputs = await model.infer(inputs, asked.request_id, priority=asked.priority, timeout_s=asked.left_s())
        except RetiredError:
            raise
        except Exception as error:
            if isinstance(error, QueueFullError):
                model.recorder.rejected()
            raise StepError(step, model, error) from error
        self.done.append((step, inputs, outputs))
        self._tensors |= {tensor: outputs[name] for name, tensor in step.outputs.items()}

    def _check(self, step: StepConfig, model: LoadedModel, inputs: Tensors) -> None:
        """Free dimensions are known only now."""
        specs = {spec.name: spec for spec in model.manifest.inputs}
        given = [(specs[name], _dtype(array), array.shape) for name, array in inputs.items()]
        problem = problem_of(model.manifest, given)
        if problem is None:
            return
        if set(step.inputs.values()) <= set(self._config.inputs):
            raise BadRequestError(problem)
        raise ValueError(problem)


def _dtype(array: Array) -> str:
    return STRING if array.dtype.kind in "OU" else array.dtype.name
