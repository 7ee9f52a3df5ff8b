"""What clients ask of an ensemble, as of any model: metadata, readiness, statistics, inference."""

from __future__ import annotations

from typing import Any

from agent.serving.bad_request import BadRequestError
from agent.serving.descriptions import configuration, metadata
from agent.serving.ensemble_config import EnsembleConfig
from agent.serving.ensemble_fit import VERSION
from agent.serving.ensembles import Asked, Ensemble, Ensembles, StepError, UnservableError
from agent.serving.exchange import Answer, Request, absent_answer, again_answer, error_answer, json_answer
from agent.serving.heads import Heads
from agent.serving.images import is_image
from agent.serving.inferring import failed_answer, read_tensors, tensors_answer
from agent.serving.models import RetiredError
from agent.serving.shared_memory import Regions

ANY_VERSION = -1  # of a step's model, as Triton says it


class EnsembleRoutes:
    """The routes.

    Args:
        ensembles: that are declared.
        regions: of shared memory, which requests may name.
    """

    def __init__(self, ensembles: Ensembles, regions: Regions) -> None:
        self._ensembles = ensembles
        self._regions = regions
        self._heads = Heads()

    async def answer(self, request: Request, ensemble: Ensemble, version: str | None, rest: list[str]) -> Answer:
        """What is asked of one.

        Args:
            request: as it came.
            ensemble: that its path names.
            version: likewise; None for any.
            rest: of the path.

        Raises:
            RetiredError: when what serves takes something else now: ask again.
        """
        name = ensemble.config.name
        if version not in {None, VERSION}:
            return absent_answer(f"{name} in version {version}", [one.config.name for one in self._ensembles.all()])
        try:
            if [request.method, *rest] == ["POST", "infer"]:
                return await self._infer(request, ensemble)
            return _said(request, ensemble, rest)
        except UnservableError as error:
            said = f"ensemble {name!r} can't be served: {error}"
            return again_answer(503, said) if error.passing else error_answer(503, said)

    def entries(self) -> list[dict[str, str]]:
        """Of the repository's index."""
        why = self._ensembles.problems()
        return [_entry(one.config.name, why.get(one.config.name, "")) for one in self._ensembles.all()]

    def statistics(self) -> list[dict[str, Any]]:
        """`$model_stat` objects of all."""
        return [one.statistics.said(one.config.name, VERSION) for one in self._ensembles.all()]

    def changed(self, name: str, change: str) -> Answer | None:
        """The answer to a client that would load or unload one; None where there is none of that name."""
        ensemble = self._ensembles.get(name)
        if ensemble is None:
            return None
        if change == "unload":
            return error_answer(403, f"ensemble {name!r} is declared in the agent's configuration: take it out there")
        try:
            ensemble.serving()
        except UnservableError as error:
            return error_answer(503, f"ensemble {name!r} can't be served: {error}")
        return Answer(200)

    async def _infer(self, request: Request, ensemble: Ensemble) -> Answer:
        fitted = ensemble.serving().fitted
        if is_image(request.headers.get("content-type", "")):
            return error_answer(415, f"{fitted.model!r} is an ensemble, which takes tensors alone: decode the image")
        try:
            wanted = read_tensors(request, fitted, self._regions, self._heads)
        except BadRequestError as error:
            return error_answer(error.status, str(error), error.field)
        asked = Asked(wanted.inputs, wanted.request_id, wanted.priority, wanted.timeout_s)
        try:
            answered = await ensemble.infer(asked, fitted)
            answer = tensors_answer(wanted, answered.outputs, answered.fitted, self._regions)
        except StepError as error:
            return failed_answer(error.cause, wanted.timeout_s, error.where)
        except (RetiredError, UnservableError):
            raise
        except Exception as error:  # noqa: BLE001 (an output that can't be said: the client is told)
            return failed_answer(error, wanted.timeout_s)
        answer.then = answered.then
        return answer


def _said(request: Request, ensemble: Ensemble, rest: list[str]) -> Answer:
    """What one is and did.

    Raises:
        UnservableError: when that is not known now.
    """
    config = ensemble.config
    match [request.method, *rest]:
        case ["GET"]:
            return json_answer(metadata(ensemble.serving().fitted) | _described(ensemble))
        case ["GET", "ready"]:
            ensemble.serving()
            return json_answer({"name": config.name, "ready": True})
        case ["GET", "config"]:
            return json_answer(configuration(ensemble.serving().fitted) | _scheduling(config))
        case ["GET", "stats"]:
            return json_answer({"model_stats": [ensemble.statistics.said(config.name, VERSION)]})
        case ["POST", "feedback"]:
            models = ", ".join(config.models)
            return error_answer(405, f"{config.name!r} is an ensemble: send feedback to a model of it: {models}")
    return error_answer(405, f"{request.method} {request.path[:200]!r} is not offered")


def _described(ensemble: Ensemble) -> dict[str, Any]:
    """Which versions its steps ask now."""
    members = ensemble.serving().members
    versions = {step.name: members[step.model].manifest for step in ensemble.config.steps}
    return {"parameters": {"steps": [f"{step}: {one.model}@{one.version}" for step, one in versions.items()]}}


def _scheduling(config: EnsembleConfig) -> dict[str, Any]:
    steps = [
        {
            "model_name": step.model,
            "model_version": ANY_VERSION,
            "input_map": step.inputs,
            "output_map": step.outputs,
        }
        for step in config.steps
    ]
    return {"ensemble_scheduling": {"step": steps}}


def _entry(name: str, why: str) -> dict[str, str]:
    state = "UNAVAILABLE" if why else "READY"
    return {"name": name, "version": VERSION, "state": state, "reason": why}
