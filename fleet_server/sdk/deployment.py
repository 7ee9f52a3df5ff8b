"""A deployment: devices that move, or moved, to a version."""

from __future__ import annotations

from typing import Any, Self

from fleet_server.sdk.client import Client, Json, segment
from fleet_server.sdk.display import table
from fleet_server.sdk.errors import ApiError, DeployError
from fleet_server.sdk.progress import bars

SUCCEEDED = "succeeded"
MATCHED_BY = ("=", "<", ">")
BARE_LIMIT = 10  # devices that are moved all at once where no strategy is given


class Deployment:
    """A rollout of a version that was made by `Model.deploy`.

    Attributes:
        id: of the rollout.
        query: the devices' that it is for, in RSQL; None for all.
    """

    def __init__(self, client: Client, rollout: Json, query: str | None) -> None:
        self._client = client
        self._rollout = rollout
        self.id: str = rollout["id"]
        self.query = query

    @property
    def status(self) -> str:
        """What state it is in now, such as `running` or `succeeded`; asks the server."""
        self.refresh()
        return str(self._rollout["state"])

    @property
    def devices(self) -> list[Json]:
        """The deployments of its devices, as the API shows them."""
        return list(self._client.items(f"/rollouts/{segment(self.id)}/deployments"))

    def refresh(self) -> Self:
        """Ask the server how it stands."""
        self._rollout = self._client.get(f"/rollouts/{segment(self.id)}")
        return self

    def wait(self, *, progress: bool | None = None) -> Self:
        """Wait until it stands still.

        Args:
            progress: whether bars are shown; None: where somebody can see them.

        Raises:
            DeployError: when it did not succeed, with the last judgement's reason.
        """
        self._follow(progress=progress)
        if self._rollout["state"] != SUCCEEDED:
            raise DeployError(self._why())
        return self

    def revert(self, *, progress: bool | None = None) -> Self:
        """Take devices back to what they ran before, and wait until they are.

        Raises:
            DeployError: when they could not be taken back.
            ConflictError: when it was reverted before.
        """
        self._rollout = self._client.post(f"/rollouts/{segment(self.id)}/abort", {"revert": True})
        self._follow(progress=progress)
        if self._rollout["state"] != "reverted":
            raise DeployError(self._why())
        return self

    def _follow(self, *, progress: bool | None) -> None:
        with bars(shown=progress) as shown:
            for one in self._client.watch_rollout(self.id):
                self._rollout = one
                counts = one["counts"]
                settled = counts["active"] + counts["failed"] + counts["superseded"]
                shown.tell("deploy", settled / max(1, counts["total"]), one["state"])
                if one["state"] == "awaiting_approval":
                    needed = one["approvals_needed"]
                    raise DeployError(
                        f"it waits for {needed} approval(s) of others: `shoal rollout approve {self.id}`, then wait()"
                    )

    def _why(self) -> str:
        last = self._rollout["verdicts"][-1]["reason"] if self._rollout["verdicts"] else "nothing was judged"
        failed = [one for one in self.devices if one.get("failure")]
        said = "; ".join(f"{one['device_id']}: {one['failure']['detail']}" for one in failed[:3])
        state = self._rollout["state"]
        return (
            f"the rollout is {state}: {last}" + (f" ({said})" if said else "") + f"; see `shoal rollout show {self.id}`"
        )

    def __repr__(self) -> str:
        one, counts = self._rollout, self._rollout["counts"]
        return (
            f"<Deployment of {one['model']}@{one['version']}: {one['state']}, "
            f"{counts['active']} of {counts['total']} devices>"
        )

    def _repr_html_(self) -> str:
        one, counts = self._rollout, self._rollout["counts"]
        facts = {
            "version": f"{one['model']}@{one['version']}",
            "state": one["state"],
            "devices": f"{counts['active']} of {counts['total']} serve it, {counts['failed']} failed",
            "for": self.query or "all devices",
            "rollout": self.id,
        }
        rows: list[dict[str, object]] = []
        try:
            rows = [{"device": each["device_id"], "phase": each["phase"]} for each in self.devices[:20]]
        except ApiError:  # it is shown as it was known
            rows = []
        return table("Deployment", facts, rows)


def deploy(
    client: Client,
    reference: str,
    *,
    target: str | None,
    fallback: str | None,
    prove: bool,
    strategy: Json | None,
    supersede: bool,
    progress: bool | None,
) -> Deployment:
    """Choose devices, have them prove what they would get, and roll it out; see `Model.deploy`."""
    query, devices = _chosen(client, as_query(target), as_query(fallback))
    if prove:
        _prove(client, reference, devices, progress=progress)
    body: dict[str, Any] = {
        "version": reference,
        "target": {"query": query} if query else {"all": True},
        "allow_unproven": not prove,
        "on_busy": "supersede" if supersede else "refuse",
    }
    if strategy is not None:
        body["strategy"] = strategy
    elif len(devices) < BARE_LIMIT:
        body["strategy"] = {"stages": [{"percent": 100}]}
    return Deployment(client, client.post("/rollouts", body), query)


def as_query(text: str | None) -> str | None:
    """A target in RSQL: a word alone names an execution provider that a device must have."""
    if text is None or any(sign in text for sign in MATCHED_BY):
        return text
    if not text.isidentifier():
        raise DeployError(f"target: {text!r} is neither a query such as accelerator==cuda nor a provider such as cpu")
    return f"provider=={text}"


def _chosen(client: Client, target: str | None, fallback: str | None) -> tuple[str | None, list[Json]]:
    """The query that some device matches, and those devices."""
    found = list(client.items("/devices", query=target))
    if found:
        return target, found
    if fallback is not None:
        found = list(client.items("/devices", query=fallback))
        if found:
            return fallback, found
    known = list(client.items("/devices"))
    kinds = sorted({one["kind"] for each in known for one in each["facts"].get("accelerators", ())})
    said = f"no device matches {target or 'all'!r}" + (f", nor the fallback {fallback!r}" if fallback else "")
    have = f"the fleet has {len(known)} devices, with accelerators {kinds or 'none'}"
    raise DeployError(f"{said}: {have}; see `shoal device list`")


def _prove(client: Client, reference: str, devices: list[Json], *, progress: bool | None) -> None:
    """Have a device of each profile measure its variant, where none has yet.

    Raises:
        DeployError: when a gate run does not pass.
    """
    wanted = {one["profile"] for one in devices}
    for variant in client.items("/variants", version=reference):
        profile = variant["profile"]
        if profile not in wanted or variant["proven"] or variant["state"] != "ready":
            continue
        online = [one["id"] for one in devices if one["profile"] == profile and one["online"]]
        if not online:
            remedy = "start one, or deploy(prove=False)"
            raise DeployError(f"no device of the profile {profile!r} is online to prove the variant: {remedy}")
        asked = client.post("/gate-runs", {"version": reference, "profile": profile, "devices": online[:1]})
        with bars(shown=progress) as shown:
            for run in client.watch_gate_run(asked["id"]):
                done = sum(len(one["results"]) for one in run["trials"])
                shown.tell(f"prove on {online[0]}", done / max(1, run["candidates"]), run["state"])
        if run["state"] != "passed":
            checks = [one["detail"] for one in (run["verdict"] or {"checks": []})["checks"] if not one["holds"]]
            why = "; ".join(checks) or run["detail"]
            raise DeployError(f"{online[0]} measured the variant for {profile!r}, which did not pass: {why}")
