"""`shoal trust`: who signs what devices may run. Private keys stay on the machine where these commands are run."""

from __future__ import annotations

import getpass
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from securesystemslib.signer import Key, Signer

from agent.protocol.bundle import BundleOrder
from agent.protocol.release import AGENT, ReleaseManifest
from fleet_server.cli.output import (
    Json,
    Output,
    OutputOption,
    YesOption,
    client,
    confirm,
    errors,
    fail,
    print_json,
    show_rows,
)
from fleet_server.clock import utc_now
from fleet_server.errors import FleetError
from fleet_server.sdk import Client
from fleet_server.trust import metadata as tuf
from fleet_server.trust.keys import PKCS11, open_signer
from fleet_server.trust.metadata import AnyMetadata
from fleet_server.trust.review import Change, check_delegated, check_targets, follow

trust = typer.Typer(no_args_is_help=True, help="Trust: who signs what devices may run (TUF); docs/security.md.")
ROOT_FILE = "root.json"
KeysOption = Annotated[
    list[str], typer.Option(help="Folder of your keys, or a PKCS#11 URI (pkcs11:token=…;id=%02?module-path=…); repeat.")
]
RootOption = Annotated[
    Path | None, typer.Option(help="The root that you trust. Default: root.json in the first folder of --keys.")
]
ThresholdOption = Annotated[int, typer.Option(help="How many of the keys must sign.", min=1, max=20)]


class Operator:
    """A person's keys, and the root that they trust.

    Args:
        where: folders and PKCS#11 URIs.
        root_file: of the trusted root; None for the one in the first folder.
    """

    def __init__(self, where: Sequence[str], root_file: Path | None = None) -> None:
        self.folders = [Path(one) for one in where if not one.startswith(PKCS11)]
        self.root_file = root_file or (self.folders[0] / ROOT_FILE if self.folders else None)
        self._where = list(where)

    def signers(self, role: str, *, make: bool = False) -> list[Signer]:
        """The keys for root, or for targets: the sub-folder of that name, or the token's key."""
        found = []
        for one in self._where:
            place = one if one.startswith(PKCS11) else str(Path(one) / role)
            if make or one.startswith(PKCS11) or Path(place).is_dir():
                found.append(open_signer(place, lambda: getpass.getpass("PIN of the token: ")))
        return found

    def trusted_root(self, api: Client) -> AnyMetadata:
        """The newest root of the server's that follows from the own one."""
        if self.root_file is None or not self.root_file.is_file():
            raise fail(
                f"there is no root that you trust at {self.root_file or '--root'}: `shoal trust init` keeps it with "
                "the keys; else name yours with --root",
                2,
            )
        own = self.root_file.read_bytes()
        newest = tuf.read(api.read("/trust/metadata/root.json")).signed.version
        first = tuf.read(own).signed.version
        chain = [api.read(f"/trust/metadata/{number}.root.json") for number in range(first + 1, newest + 1)]
        return follow(own, chain)

    def keep_root(self, api: Client) -> None:
        """Remember the newest root beside the keys."""
        body = api.read("/trust/metadata/root.json")
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ROOT_FILE).write_bytes(body)


@trust.command("status")
def status(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """Show roles, their keys and expiry, and what waits for signatures."""
    with client(context) as api:
        found = api.get("/trust")
        if output is Output.JSON:
            print_json(found)
            return
        show_rows(
            found["roles"],
            output,
            [
                ("role", lambda row: row["role"]),
                ("version", lambda row: row["version"]),
                ("signed by", lambda row: f"{row['threshold']} of {_short(row['keys'])}"),
                ("keys are", lambda row: "on the server" if row["online"] else "elsewhere"),
                ("expires", lambda row: row["expires_at"][:10]),
            ],
            empty="there is no repository yet",
        )
        for one in found["waiting"]:
            errors.print(
                f"waits: {one['role']}, {len(one['signed_by'])} of {one['threshold']} signatures, "
                f"{len(one['manifests'])} manifests; sign with `shoal trust sign`"
            )


@trust.command("root")
def root(context: typer.Context) -> None:
    """Print the root metadata, for `root_file` in the agents' configuration.

    Example: shoal trust root > root.json
    """
    with client(context) as api:
        typer.echo(api.read("/trust/metadata/root.json").decode())


@trust.command("init")
def init(
    context: typer.Context,
    keys: KeysOption,
    threshold: ThresholdOption = 1,
    yes: YesOption = False,  # noqa: FBT002
) -> None:
    """Take root and targets keys off the server: make them here, and sign.

    A folder gets a key for root and one for targets, in sub-folders; a PKCS#11 key is for both. The server keeps the
    keys of snapshot and timestamp, and throws its own others away.

    Example: shoal trust init --keys /media/alice --keys /media/bob --threshold 2
    """
    operator = Operator(keys)
    with client(context) as api, _clear_errors():
        if threshold > len(keys):
            raise fail(f"--threshold: {len(keys)} keys can't give {threshold} signatures", 2)
        current = tuf.read(api.read("/trust/metadata/root.json"))
        roots, targets = operator.signers("root", make=True), operator.signers("targets", make=True)
        made = {"root": [one.public_key for one in roots], "targets": [one.public_key for one in targets]}
        thresholds = dict.fromkeys(made, threshold)
        _show_keys(current, made, thresholds)
        confirm("Let devices trust only what these keys have signed?", yes=yes)
        _hand_in_root(api, tuf.next_root(current, made, thresholds, utc_now()), roots)
        operator.keep_root(api)
        _sign_waiting(api, operator, yes=True)
        errors.print(
            "done. Give devices this root (`shoal trust root`), and keep the keys where no network reaches them"
        )


@trust.command("sign")
def sign(
    context: typer.Context,
    keys: KeysOption,
    root: RootOption = None,
    yes: YesOption = False,  # noqa: FBT002
) -> None:
    """Show what waits for your signature, ask, sign it here, and hand it in.

    Example: shoal trust sign --keys /media/alice
    """
    operator = Operator(keys, root)
    with client(context) as api, _clear_errors():
        _sign_waiting_root(api, operator, yes=yes)
        if not _sign_waiting(api, operator, yes=yes):
            errors.print("nothing waits for these keys")
        operator.keep_root(api)


@trust.command("rotate")
def rotate(
    context: typer.Context,
    role: Annotated[str, typer.Argument(help="root, targets, snapshot or timestamp.")],
    keys: Annotated[list[str], typer.Option(help="The present root keys, where they are not on the server.")] = [],  # noqa: B006
    new_keys: Annotated[
        list[str], typer.Option(help="Folders or PKCS#11 URIs of the new keys of root or targets.")
    ] = [],  # noqa: B006
    threshold: ThresholdOption = 1,
    root: RootOption = None,
    yes: YesOption = False,  # noqa: FBT002
) -> None:
    """Replace the keys of a role that are old, lost or stolen.

    The server makes the new key of a role that it signs for itself; those of others are named with --new-keys.

    Example: shoal trust rotate timestamp --keys /media/alice --keys /media/bob
    """
    if role not in tuf.TOP_ROLES:
        raise fail(f"ROLE: {role!r} is not {', '.join(tuf.TOP_ROLES)}", 2)
    operator, successor = Operator(keys, root), Operator(new_keys)
    with client(context) as api, _clear_errors():
        current = operator.trusted_root(api) if keys or root else tuf.read(api.read("/trust/metadata/root.json"))
        if new_keys:
            fresh = successor.signers(role, make=True)
            public = [one.public_key for one in fresh]
        else:
            answer = api.post("/trust/keys", {"role": role})
            fresh, public = [], [Key.from_dict(answer["id"], answer["key"])]
        if threshold > len(public):
            raise fail(f"--threshold: {len(public)} keys can't give {threshold} signatures", 2)
        _show_keys(current, {role: public}, {role: threshold})
        confirm(f"Replace the keys of {role}?", yes=yes)
        proposed = tuf.next_root(current, {role: public}, {role: threshold}, utc_now())
        _hand_in_root(api, proposed, [*operator.signers("root"), *(fresh if role == "root" else [])])
        for one in (operator, successor):
            one.keep_root(api)
        if role == "targets" and new_keys:
            _sign_waiting(api, successor, yes=True)


def _hand_in_root(api: Client, proposed: AnyMetadata, signers: Sequence[Signer]) -> None:
    tuf.sign(proposed, signers)
    answer = api.post("/trust/signatures", {"role": "root", "body": proposed.to_bytes().decode()})
    version = proposed.signed.version
    if answer["published"]:
        errors.print(f"root version {version} is published")
    else:
        errors.print(f"root version {version} waits for more signatures: `shoal trust sign` with the other root keys")


def _sign_waiting_root(api: Client, operator: Operator, *, yes: bool) -> None:
    """Add a signature to a root that waits, or renew one that expires soon."""
    signers = operator.signers("root")
    current = operator.trusted_root(api)
    waiting = next((one for one in api.get("/trust")["waiting"] if one["role"] == "root"), None)
    held = {one.public_key.keyid for one in signers}
    if waiting is not None and held & set(waiting["keys"]) - set(waiting["signed_by"]):
        proposed = tuf.read(waiting["body"].encode())
        changed = {
            role: tuf.keys_of(proposed, role)
            for role in tuf.TOP_ROLES
            if proposed.signed.roles[role] != current.signed.roles[role]
        }
        _show_keys(current, changed, {role: proposed.signed.roles[role].threshold for role in changed})
        confirm(f"Sign root version {proposed.signed.version}?", yes=yes)
        _hand_in_root(api, proposed, signers)
    elif waiting is None and held & set(current.signed.roles["root"].keyids) and _expires_soon(current):
        confirm(f"The root expires on {current.signed.expires:%Y-%m-%d}. Renew it, with the same keys?", yes=yes)
        _hand_in_root(api, tuf.next_root(current, {}, {}, utc_now()), signers)


def _expires_soon(root: AnyMetadata) -> bool:
    return tuf.is_due("root", root, utc_now())


def _sign_waiting(api: Client, operator: Operator, *, yes: bool) -> int:
    """Review, show and sign what waits for these keys; returns how much that was."""
    signers = operator.signers("targets")
    held = {one.public_key.keyid for one in signers}
    root = operator.trusted_root(api)
    found = api.get("/trust")
    mine = [
        one for one in found["waiting"] if one["role"] != "root" and held & set(one["keys"]) - set(one["signed_by"])
    ]
    if not mine:
        return 0
    rows = [row for one in mine for row in _reviewed(api, root, found, one)]
    show_rows(rows, Output.TABLE, COLUMNS, empty="no manifest changes: only expiry dates and delegations")
    confirm(f"Sign {', '.join(one['role'] for one in mine)}?", yes=yes)
    for one in mine:
        proposed = tuf.read(one["body"].encode())
        tuf.sign(proposed, [signer for signer in signers if signer.public_key.keyid in one["keys"]])
        answer = api.post("/trust/signatures", {"role": one["role"], "body": proposed.to_bytes().decode()})
        errors.print(f"{one['role']}: {'published' if answer['published'] else 'waits for more signatures'}")
    return len(mine)


def _reviewed(api: Client, root: AnyMetadata, found: Json, one: Json) -> list[Json]:
    """The rows to show of a proposal, once it holds nothing that is not shown."""
    proposed = tuf.read(one["body"].encode())
    if one["role"] == "targets":
        check_targets(root, proposed)
        return []
    shown = {row["path"]: row["manifest"].encode() for row in one["manifests"] if row["manifest"] is not None}
    published = _published(api, root, found, one["role"])
    return [_row(change) for change in check_delegated(one["role"], published, proposed, shown)]


def _published(api: Client, root: AnyMetadata, found: Json, role: str) -> AnyMetadata | None:
    """A delegated role as it is published, where that verifies from the trusted root."""
    version = next((row["version"] for row in found["roles"] if row["role"] == role), None)
    if version is None:
        return None
    body = tuf.read(api.read(f"/trust/metadata/{version}.{role}.json"))
    targets = tuf.read(api.read("/trust/metadata/targets.json"))
    verified = tuf.enough(root, "targets", targets) and tuf.enough(targets, role, body)
    return body if verified else None


def _row(change: Change) -> Json:
    manifest = change.manifest
    if manifest is None:
        return {"version": change.path, "change": change.change}
    if isinstance(manifest, ReleaseManifest):
        use = f"agent release for {manifest.info.platform}"
        release = {"version": f"{AGENT}@{manifest.info.version}", "change": change.change, "use": use}
        return {**release, "digest": manifest.digest[:16]}
    if isinstance(manifest, BundleOrder):
        use = f"to serve without a server: {', '.join(manifest.targets)}"
        return {"version": f"order {manifest.name}, {manifest.serial}", "change": change.change, "use": use}
    use = "to measure" if change.path.startswith("trials/") else "to serve"
    return {
        "version": f"{manifest.model}@{manifest.version}",
        "change": change.change,
        "use": use,
        "profile": manifest.profile,
        "precision": manifest.precision.value,
        "digest": manifest.digest[:16],
    }


COLUMNS = [
    ("version", lambda row: row["version"]),
    ("change", lambda row: row["change"]),
    ("use", lambda row: row.get("use")),
    ("profile", lambda row: row.get("profile")),
    ("precision", lambda row: row.get("precision")),
    ("digest", lambda row: row.get("digest")),
]


def _show_keys(current: AnyMetadata, keys: dict[str, list[Key]], thresholds: dict[str, int]) -> None:
    rows = [
        {
            "role": role,
            "now": f"{current.signed.roles[role].threshold} of {_short(current.signed.roles[role].keyids)}",
            "then": f"{thresholds[role]} of {_short([key.keyid for key in given])}",
        }
        for role, given in keys.items()
    ]
    columns: list[Any] = [(name, lambda row, name=name: row[name]) for name in ("role", "now", "then")]
    show_rows(rows, Output.TABLE, columns, empty="no key changes")


def _short(keyids: Sequence[str]) -> str:
    return ", ".join(one[:8] for one in keyids)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What the review or a key refuses, as a sentence and exit code 1."""
    try:
        yield
    except FleetError as error:
        raise fail(error.detail) from None
