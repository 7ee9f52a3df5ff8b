"""HTTP of commands."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Request, status
from fastapi.responses import StreamingResponse

from agent.protocol.commands import CommandKind
from agent.protocol.limits import LIMITS
from fleet_server.commands import repository, service
from fleet_server.commands.schemas import CommandCreate, CommandLogLineView, CommandSpec, CommandView, LogLevel
from fleet_server.commands.streaming import Streams
from fleet_server.domain.commands import CommandState
from fleet_server.errors import InvalidError
from fleet_server.http import Actor, DeviceId, FleetId, ReadSession, WriteSession
from fleet_server.openapi import problems
from fleet_server.paging import PageRequest, page, paged
from fleet_server.preconditions import IfMatch
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Page

router = APIRouter(tags=["commands"], route_class=ApiRoute)
CommandPaging = Annotated[PageRequest, Depends(paged(repository.COMMANDS))]
LinePaging = Annotated[PageRequest, Depends(paged(repository.LINES))]
CommandId = Annotated[str, Path(description="The command's id.")]


@router.post(
    "/devices/{device_id}/commands",
    summary="Ask a device to do something",
    status_code=status.HTTP_201_CREATED,
    responses=problems("device_not_found", "agent_too_old", "command_not_allowed", "too_many_commands"),
)
def command_device(
    session: WriteSession, fleet_id: FleetId, actor: Actor, device_id: DeviceId, wanted: CommandSpec
) -> CommandView:
    """The device carries it out once at most, as soon as it is connected and before the time is over."""
    return service.command_view(service.command_device(session, fleet_id, device_id, wanted, actor=actor))


@router.post(
    "/commands",
    summary="Ask devices to do something",
    status_code=status.HTTP_201_CREATED,
    responses=problems("device_not_found", "bad_query", "no_device", "too_many_devices"),
)
def command_devices(session: WriteSession, fleet_id: FleetId, actor: Actor, wanted: CommandCreate) -> list[CommandView]:
    """A command for each device; of a device that can't, or may not, it is there and refused."""
    return [service.command_view(row) for row in service.command_devices(session, fleet_id, wanted, actor=actor)]


@router.get("/commands", summary="List commands")
def list_commands(
    session: ReadSession,
    fleet_id: FleetId,
    paging: CommandPaging,
    device: Annotated[str | None, Query(description="Only to this device.")] = None,
    kind: Annotated[CommandKind | None, Query(description="Only of this kind.")] = None,
    state: Annotated[CommandState | None, Query(description="Only those in this state.")] = None,
) -> Page[CommandView]:
    """Commands, newest first; those that are over are forgotten after SHOAL_COMMANDS_DAYS."""
    rows = repository.commands_page(session, fleet_id, paging, device=device, kind=kind, state=state)
    return page(rows, paging, service.command_view)


@router.get("/commands/{command_id}", summary="Show a command", responses=problems("command_not_found"))
def show_command(session: ReadSession, fleet_id: FleetId, command_id: CommandId) -> CommandView:
    """One command: where it is, and what came of it."""
    return service.command_view(service.get_command(session, fleet_id, command_id))


@router.post(
    "/commands/{command_id}/cancel",
    summary="Cancel a command",
    responses=problems("command_not_found", "command_over"),
)
def cancel_command(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, command_id: CommandId
) -> CommandView:
    """The device leaves it off, where that can be; what it has done stays."""
    row = service.get_command(session, fleet_id, command_id)
    unchanged.check(session, row, lambda: service.command_view(row))
    service.cancel(session, row, actor=actor)
    return service.command_view(row)


@router.get(
    "/commands/{command_id}/log-lines",
    summary="List the log lines of a command",
    responses=problems("command_not_found"),
)
def list_command_lines(
    session: ReadSession,
    fleet_id: FleetId,
    paging: LinePaging,
    command_id: CommandId,
    level: Annotated[LogLevel | None, Query(description="Only those of this level and above.")] = None,
) -> Page[CommandLogLineView]:
    """What came of a command `logs`, the oldest first; of very many lines the newest are kept."""
    row = service.get_command(session, fleet_id, command_id)
    found = repository.lines_page(session, row.id, paging, level=level)
    return page(found, paging, service.line_view)


@router.get(
    "/commands/{command_id}/logs",
    summary="Follow the log of a command",
    response_class=StreamingResponse,
    responses={
        **problems("command_not_found", "bad_event_id", "too_many_streams"),
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}},
              "description": "Events `line`, whose data is a log line as JSON and whose id is its sequence, and at the "
              "end one event `end`, whose data is the command"},
    },
)  # fmt: skip
def follow_command_log(
    request: Request,
    session: ReadSession,
    fleet_id: FleetId,
    command_id: CommandId,
    last_event_id: Annotated[
        str | None, Header(description="Id of the last event that you have: others follow.", max_length=20)
    ] = None,
) -> StreamingResponse:
    """Server-sent events, as they come, until the command is over; a client that was cut off goes on where it was."""
    row = service.get_command(session, fleet_id, command_id)
    after = _sequence(last_event_id)
    streams: Streams = request.app.state.log_streams
    return streams.answer(row.id, after)


def _sequence(last_event_id: str | None) -> int:
    given = last_event_id or "0"
    if not (given.isascii() and given.isdigit() and int(given) < LIMITS.total):
        raise InvalidError(
            "bad_event_id", "Last-Event-ID: it is no id of an event that came: leave it out", field="Last-Event-ID"
        )
    return int(given)
