"""HTTP of inference requests."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from agent.protocol.datatypes import HEADER_LENGTH
from fleet_server.db import Database
from fleet_server.domain.tensors import read_request
from fleet_server.errors import NotFoundError
from fleet_server.http import Db, FleetId, ModelName
from fleet_server.inferences import repository
from fleet_server.inferences.schemas import (
    DEFAULT_TIMEOUT_S,
    EXAMPLE,
    EXAMPLE_ANSWER,
    LONGEST_TIMEOUT_S,
    REQUEST_BYTES,
)
from fleet_server.inferences.service import Desk, Wanted
from fleet_server.openapi import problems
from fleet_server.routes import ApiRoute

router = APIRouter(tags=["inferences"], route_class=ApiRoute)
BINARY = "application/octet-stream"
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_OBJECT = {"type": "object"}


@router.post(
    "/models/{model}/infer",
    summary="Ask the devices that serve a model",
    response_class=Response,
    max_body_size=REQUEST_BYTES,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _OBJECT, "example": EXAMPLE}, BINARY: _BYTES},
        }
    },
    responses={
        **problems(
            "model_not_found", "bad_query", "no_device_serves", "rows_disagree", "wrong_input", "row_too_large",
            "answer_too_large", "device_failed", "deadline", "too_many_inferences",
        ),
        200: {
            "description": "The outputs, rows in the order of the request's",
            "content": {"application/json": {"schema": _OBJECT, "example": EXAMPLE_ANSWER}, BINARY: _BYTES},
        },
    },
)  # fmt: skip
async def infer_model(
    request: Request,
    database: Db,
    fleet_id: FleetId,
    model: ModelName,
    target: Annotated[
        str | None,
        Query(max_length=4096, description="Only devices it holds for, in RSQL; if absent, all."),
    ] = None,
    version: Annotated[
        str | None, Query(max_length=128, description="Only this version; if absent, what most of them serve.")
    ] = None,
    timeout_s: Annotated[
        float, Query(gt=0, le=LONGEST_TIMEOUT_S, description="How long it may take, in seconds.")
    ] = DEFAULT_TIMEOUT_S,
    header_length: Annotated[
        int | None,
        Header(alias=HEADER_LENGTH, ge=0, description="Length of the body's JSON, where binary tensors follow it."),
    ] = None,
) -> Response:
    """A request of the Open Inference Protocol v2; its first axes are rows, which devices that serve the model share.

    `parameters` of the answer say who answered how many rows, who was left out and why, and how many parts were sent
    once more. All rows are answered by one version. Tensors follow the JSON in binary form where they did in the
    request.
    """
    desk: Desk = request.app.state.inference_desk
    await run_in_threadpool(_require_model, database, fleet_id, model)
    with desk.seat():
        asked = read_request(await request.body(), header_length)
        wanted = Wanted(model, version, target, timeout_s)
        content, length = await run_in_threadpool(desk.infer, fleet_id, wanted, asked)
    if length is None:
        return Response(content, media_type="application/json")
    return Response(content, media_type=BINARY, headers={HEADER_LENGTH: str(length)})


def _require_model(database: Database, fleet_id: str, model: str) -> None:
    with database.read() as session:
        if not repository.has_model(session, fleet_id, model):
            raise NotFoundError("model", model, remedy="list them with `shoal model list`")
