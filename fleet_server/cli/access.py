"""`shoal login`, `logout`, `whoami`, `fleet`, `user` and `token`."""

from __future__ import annotations

import getpass
import sys
from typing import Annotated, Any

import typer

from fleet_server.cli import credentials, oidc
from fleet_server.cli.credentials import Credentials
from fleet_server.cli.output import (
    Output,
    OutputOption,
    YesOption,
    client,
    confirm,
    errors,
    exit_codes,
    fail,
    show_object,
    show_rows,
)
from fleet_server.openid import ProviderError
from fleet_server.principals import Role
from fleet_server.sdk import Client, segment

fleet = typer.Typer(no_args_is_help=True, help="Fleets: tenants with devices, models and users of their own.")
user = typer.Typer(no_args_is_help=True, help="Users: people who log in, with a role in your fleet.")
token = typer.Typer(no_args_is_help=True, help="Service tokens: for programs, with a role in your fleet.")
NameArgument = Annotated[str, typer.Argument(help="Its name.")]
RoleOption = Annotated[Role, typer.Option(help="What they may do; each role may do what those before it may.")]
EveryFleet = Annotated[bool, typer.Option("--server-wide", help="For every fleet; server-wide admins alone may.")]


def login(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Your name. Default: asked for.")] = None,
    by_oidc: Annotated[bool, typer.Option("--oidc", help="In a browser, at the server's OpenID provider.")] = False,  # noqa: FBT002
) -> None:
    """Log in, and keep the session for the commands that follow.

    The password is asked for, or read from standard input. The session lies in ~/.config/shoal, readable by you alone.
    """
    if by_oidc:
        _log_in_there(context)
        return
    url = context.obj["url"]
    with exit_codes(), Client(url, ca_file=context.obj["ca_file"]) as api:
        made = api.post("/login", {"name": name or typer.prompt("Name", err=True), "password": _password("Password")})
    _keep(url, Credentials(made["token"]))
    roles = ", ".join(f"{role} in {one}" for one, role in made["roles"].items())
    errors.print(f"logged in as {made['name']} ({roles}) until {made['expires_at'][:16]}", markup=False)


def _log_in_there(context: typer.Context) -> None:
    url, ca_file = context.obj["url"], context.obj["ca_file"]
    with exit_codes(), Client(url, ca_file=ca_file) as api:
        offered = api.get("/login")["oidc"]
    if offered is None:
        raise fail("this server has no OpenID provider (SHOAL_OIDC_ISSUER): shoal login NAME", 2)
    try:
        made = oidc.log_in(offered["issuer"], offered["client_id"], _show_code)
    except ProviderError as error:
        raise fail(str(error), 3) from None
    with exit_codes(), Client(url, made.token, fleet=context.obj["fleet"], ca_file=ca_file) as api:
        me = api.get("/me")
    _keep(url, made)
    errors.print(f"logged in as {me['name']} ({me['role']} in {me['fleet']})", markup=False)


def _show_code(code: oidc.DeviceCode) -> None:
    errors.print(f"open {code.address}", markup=False, soft_wrap=True)
    errors.print(f"and confirm the code {code.user_code}; waiting …", markup=False)


def _keep(url: str, made: Credentials) -> None:
    try:
        credentials.keep(url, made)
    except OSError as error:
        raise fail(f"the session can't be kept ({error.strerror}): see XDG_CONFIG_HOME") from None


def _password(question: str, *, again: bool = False) -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    given = getpass.getpass(f"{question}: ")
    if again and getpass.getpass(f"{question}, again: ") != given:
        raise fail("the two are not the same", 2)
    return given


def logout(context: typer.Context) -> None:
    """End the session of `shoal login`, here and on the server.

    That of an OpenID provider is forgotten here, and can't be renewed any more.
    """
    url = context.obj["url"]
    kept = credentials.load(url)
    if kept is None:
        raise fail("you are not logged in there")
    credentials.keep(url, None)
    if kept.issuer is not None:
        try:
            oidc.revoke(kept)
        except ProviderError as error:
            raise fail(f"you are logged out here, and the provider was not told: {error}") from None
        return
    with exit_codes(), Client(url, kept.token, ca_file=context.obj["ca_file"]) as api:
        api.post("/logout")


def whoami(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """Show as whom, in which fleet and with which role commands act."""
    with client(context) as api:
        show_object(api.get("/me"), output)


@fleet.command("list")
def list_fleets(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List fleets: all of them for a server-wide admin, else your own."""
    with client(context) as api:
        show_rows(
            api.items("/fleets"),
            output,
            [
                ("fleet", lambda row: row["id"]),
                ("approvals", lambda row: row["approvals"]),
                ("since", lambda row: row["created_at"][:10]),
            ],
            empty="there is no fleet",
        )


@fleet.command("create")
def create_fleet(context: typer.Context, name: NameArgument, output: OutputOption = Output.TABLE) -> None:
    """Create a fleet; only a server-wide admin may.

    Act in it with --fleet or SHOAL_FLEET. Example: shoal fleet create plant7
    """
    with client(context) as api:
        show_object(api.post("/fleets", {"id": name}), output)


@fleet.command("update")
def update_fleet(
    context: typer.Context,
    name: NameArgument,
    approvals: Annotated[int, typer.Option(help="How many others must approve a new rollout.", min=0, max=10)],
    output: OutputOption = Output.TABLE,
) -> None:
    """Change a fleet: how many others must approve a new rollout.

    Example: shoal fleet update default --approvals 1
    """
    with client(context) as api:
        show_object(api.patch(f"/fleets/{segment(name)}", {"approvals": approvals}), output)


@user.command("list")
def list_users(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List users of your fleet."""
    with client(context) as api:
        show_rows(
            api.items("/users"),
            output,
            [
                ("name", lambda row: row["name"]),
                ("role", lambda row: row["role"]),
                ("server-wide", lambda row: row["server_wide"]),
                ("since", lambda row: row["created_at"][:10]),
            ],
            empty="there is no user yet; create one with `shoal user create`",
        )


@user.command("create")
def create_user(
    context: typer.Context,
    name: NameArgument,
    role: RoleOption,
    server_wide: EveryFleet = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Create a user with a role in your fleet.

    The password is asked for, or read from standard input. Example: shoal user create ada --role releaser
    """
    body = {"name": name, "role": role.value, "server_wide": server_wide}
    with client(context) as api:
        show_object(api.post("/users", {**body, "password": _password("Their password", again=True)}), output)


@user.command("update")
def update_user(
    context: typer.Context,
    name: NameArgument,
    role: Annotated[Role | None, typer.Option(help="The new role in your fleet.")] = None,
    password: Annotated[bool, typer.Option("--password", help="Ask for a new password; ends their sessions.")] = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Change a user's role in your fleet, or password.

    Example: shoal user update ada --role operator
    """
    if role is None and not password:
        raise fail("give --role or --password", 2)
    body: dict[str, Any] = {"role": role.value} if role else {}
    if password:
        body["password"] = _password("Their new password", again=True)
    with client(context) as api:
        show_object(api.patch(f"/users/{segment(name)}", body), output)


@user.command("delete")
def delete_user(context: typer.Context, name: NameArgument, yes: YesOption = False) -> None:  # noqa: FBT002
    """Take a user's role in your fleet away, and with the last role the user."""
    confirm(f"delete user {name}?", yes=yes)
    with client(context) as api:
        api.delete(f"/users/{segment(name)}")


@token.command("list")
def list_tokens(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List service tokens of your fleet, ended ones too."""
    with client(context) as api:
        show_rows(
            api.items("/tokens"),
            output,
            [
                ("id", lambda row: row["id"]),
                ("name", lambda row: row["name"]),
                ("role", lambda row: row["role"]),
                ("until", lambda row: "revoked" if row["revoked_at"] else row["expires_at"][:10]),
                ("last used", lambda row: row["last_used_at"] and row["last_used_at"][:16]),
            ],
            empty="there is no token yet; create one with `shoal token create`",
        )


@token.command("create")
def create_token(
    context: typer.Context,
    name: NameArgument,
    role: RoleOption,
    days: Annotated[int, typer.Option(help="How long it holds, in days.", min=1, max=3650)] = 90,
    server_wide: EveryFleet = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Create a service token; its text is shown this once.

    Example: shoal token create ci --role operator --days 30
    """
    body = {"name": name, "role": role.value, "days": days, "server_wide": server_wide}
    with client(context) as api:
        show_object(api.post("/tokens", body), output)


@token.command("revoke")
def revoke_token(
    context: typer.Context,
    token_id: Annotated[str, typer.Argument(metavar="ID", help="The token's id.")],
    yes: YesOption = False,  # noqa: FBT002
) -> None:
    """End a service token: it holds no longer from the next request on."""
    confirm(f"revoke token {token_id}?", yes=yes)
    with client(context) as api:
        api.delete(f"/tokens/{segment(token_id)}")
