"""A model of a notebook: optimized on the fleet's terms, deployed, and asked."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from fleet_server.sdk import predicting
from fleet_server.sdk.client import Client, Json, segment
from fleet_server.sdk.deployment import Deployment, deploy
from fleet_server.sdk.display import table
from fleet_server.sdk.errors import BuildError, ConflictError, NetError, NotFoundError
from fleet_server.sdk.exporting import ExportFormat, export
from fleet_server.sdk.progress import Bars, bars

if TYPE_CHECKING:
    from fleet_server.sdk.learning import Chosen, LiveNet

FOR_ALL = "sdk-onnx-cpu"
BAD = frozenset({"refused", "failed", "cancelled"})


class Model:
    """A net that was compiled, or a model of the server.

    Attributes:
        name: on the server; empty until it was optimized.
        version: likewise.
        variants: what was built of it, as the API shows variants.
        answered: which devices answered how many rows of the last `predict`, as `device` and `rows`.
        chosen: the net that was pushed, with those it was chosen from; None where nothing was pushed from here.
    """

    def __init__(self, client: Client, live: LiveNet | None = None) -> None:
        self._client = client
        self._live = live
        self.name = self.version = ""
        self.variants: list[Json] = []
        self.answered: list[Json] = []
        self.chosen: Chosen | None = None
        self._inputs: list[Json] = []

    @classmethod
    def of_server(cls, client: Client, name: str, version: str | None) -> Self:
        """A version of the server's; the newest where none is named.

        Raises:
            NotFoundError: when there is none.
        """
        found = cls(client)
        said = version or client.get(f"/models/{segment(name)}")["latest_version"]
        found._take(client.get(f"/models/{segment(name)}/versions/{segment(said)}"))
        found.variants = list(client.items("/variants", version=found.reference))
        return found

    @property
    def reference(self) -> str:
        """`name@version`."""
        self._must_be_pushed()
        return f"{self.name}@{self.version}"

    def measured(self) -> list[Json]:
        """What was measured of each variant last, and where; asks the server.

        Returns:
            A row for each: `profile`, `precision`, `bytes`, `accuracy` (0 to 1), `latency_p50_ms` and
            `latency_p95_ms` of one row, `on` (`server`, or ids of devices).
        """
        self.variants = [self._client.get(f"/variants/{segment(one['id'])}") for one in self.variants]
        return [_row(one) for one in self.variants]

    def score(self) -> dict[str, float]:
        """`loss` by the criterion, and `accuracy` where targets are classes, of the net as it is here.

        Raises:
            NetError: where there is no live net, or no rows to evaluate on.
        """
        return self._net().score()

    def optimize(
        self,
        *,
        name: str,
        version: str | None = None,
        profiles: Sequence[str | Json] | None = None,
        prune: Literal["adaptive"] | float | None = None,
        distill: Any = None,
        quantize: bool | Literal["aware"] = True,
        epochs: float = 2.0,
        budget_points: float = 1.0,
        labels: Sequence[str] = (),
        seed: int = 0,
        progress: bool | None = None,
    ) -> Self:
        """Make the net small here, push it, and have the server build a variant for each profile; waits for them.

        Training passes run on this machine with the optimizer's class and settings and the criterion. Of the nets that
        came out whose error on the evaluation rows rose by no more than the budget the fastest is pushed, the smaller
        one where two are as fast, and the gate holds every variant against the accuracy of the net as it was.

        Args:
            name: of the model.
            version: of it; None: the next number.
            profiles: names of profiles, or new profiles as the API takes them; None: those that devices have, or
                one for every device with ONNX Runtime.
            prune: remove channels: `adaptive`, or the share of the work that is to be left.
            distill: a smaller torch.nn.Module that is to learn from the net.
            quantize: whether rows for integers are pushed, so that the server can try them; `aware`: nets are
                also fine-tuned for integers before.
            epochs: of each fine-tuning.
            budget_points: points that all of it may cost.
            labels: class names by index.
            seed: of every random choice.
            progress: whether bars are shown; None: where somebody can see them.

        Raises:
            NetError: when the net can't be exported or trained.
            BuildError: when a variant could not be built, or the gate refused it.
        """
        from fleet_server.sdk.learning import Compression

        live = self._net()
        _check_share(prune)
        names = self._profiles(profiles, quantize=bool(quantize))  # before hours of training
        wanted = Compression(prune, distill, quantize == "aware", epochs, budget_points, seed)
        with bars(shown=progress) as shown, tempfile.TemporaryDirectory(prefix="shoal-") as folder:
            self.chosen = live.compressed(wanted, Path(folder), lambda said: shown.tell("train and export", None, said))
            shown.tell("train and export", 1.0, self.chosen.name)
            self._push(live, name, version, labels, Path(folder), shown, quantize=bool(quantize), budget=budget_points)
            asked = self._client.post("/variants", {"version": self.reference, "profiles": names})
            for variants in self._client.wait_for_variants([one["id"] for one in asked]):
                self.variants = variants
                for one in variants:
                    job = one["job"] or {"progress": 1.0, "step": one["state"]}
                    shown.tell(f"build {one['profile']}", job["progress"], job["step"])
        bad = [one for one in self.variants if one["state"] in BAD]
        if bad:
            raise BuildError("; ".join(f"{one['profile']}: {one['state']}: {_reason(one)}" for one in bad))
        return self

    def deploy(
        self,
        target: str | None = None,
        *,
        fallback: str | None = None,
        prove: bool = True,
        strategy: Json | None = None,
        supersede: bool = False,
        wait: bool = True,
        progress: bool | None = None,
    ) -> Deployment:
        """Roll the version out to devices, and wait until they serve it.

        Args:
            target: devices in RSQL, such as `accelerator==cuda`; a word alone, such as `cpu`, names an execution
                provider; None: all devices.
            fallback: likewise, for when no device matches the target.
            prove: whether a device of each profile measures its variant first, where none has.
            strategy: stages and stop rules as the API takes them; None: all at once for fewer than ten devices, else
                the server's default.
            supersede: take over devices that another running rollout of the model has not settled.
            wait: until it stands still.
            progress: whether bars are shown; None: where somebody can see them.

        Raises:
            DeployError: when no device matches, a device's measurement did not pass, or the rollout did not succeed.
        """
        made = deploy(
            self._client,
            self.reference,
            target=target,
            fallback=fallback,
            prove=prove,
            strategy=strategy,
            supersede=supersede,
            progress=progress,
        )
        return made.wait(progress=progress) if wait else made

    def predict(self, inputs: Any, *, target: str | None = None, timeout_s: float = 60.0) -> Any:
        """Have the fleet's devices answer rows; any number, in their order.

        Args:
            inputs: a tensor or an array, or several by input name; the first axis counts rows.
            target: devices that may answer, in RSQL; None: all that serve it.
            timeout_s: of each request of at most 16 MiB.

        Returns:
            The output as what the rows were, a tensor or an array; outputs by name where there are several.

        Raises:
            NetError: when the rows do not fit the model.
            ApiError: when no device serves it, or none answered; the code says which.
        """
        self._must_be_pushed()

        def ask(body: bytes, header_length: int) -> tuple[bytes, int]:
            return self._client.infer(
                self.name, body, header_length, version=self.version, target=target, timeout_s=timeout_s
            )

        outputs, self.answered = predicting.predict(inputs, self._inputs, ask)
        return outputs

    def export(self, output: Path | str, kind: ExportFormat | str = "triton", *, profile: str | None = None) -> Path:
        """Write a variant as a model repository of Triton (`triton`), or for KServe (`kserve`); see `shoal export`.

        Raises:
            ExportError: when no variant fits, or something is there already.
        """
        self._must_be_pushed()
        return export(self._client, self.name, self.version, ExportFormat(kind), Path(output), profile=profile)

    def _net(self) -> LiveNet:
        if self._live is None:
            raise NetError(f"{self.name} is the server's: compile a net here to optimize or score it")
        return self._live

    def _must_be_pushed(self) -> None:
        if not self.version:
            raise NetError("the net is only here: call optimize(name=…) first")

    def _take(self, version: Json) -> None:
        self.name, self.version, self._inputs = version["model"], version["name"], version["inputs"]

    def _push(
        self,
        live: LiveNet,
        name: str,
        version: str | None,
        labels: Sequence[str],
        folder: Path,
        shown: Bars,
        *,
        quantize: bool,
        budget: float,
    ) -> None:
        from fleet_server.sdk.learning import CALIBRATION_ROWS, write_rows

        assert self.chosen is not None
        body: Json = {"name": version or self._next(name), "labels": list(labels), "gate": {}}
        shown.tell("push", None, "upload")
        body["sources"] = [{"format": "onnx", "digest": self._client.upload(self.chosen.onnx)}]
        if quantize and (live.train or live.evaluate) is not None:
            rows = live.train if live.train is not None else live.evaluate
            write_rows(rows, folder / "calibration.npz", targets=False, most=CALIBRATION_ROWS)
            body["calibration"] = self._client.upload(folder / "calibration.npz")
        if live.evaluate is not None:
            write_rows(live.evaluate, folder / "evaluation.npz", targets=True)
            body["evaluation"] = self._client.upload(folder / "evaluation.npz")
            if live.evaluate.classifies:
                lowest = live.score()["accuracy"] - budget / 100.0
                body["gate"]["min_accuracy"] = min(1.0, max(0.0, lowest))
        shown.tell("push", None, "the server checks the version")
        self._take(self._client.post(f"/models/{segment(name)}/versions", body, timeout_s=600))
        shown.tell("push", 1.0, self.reference)

    def _next(self, name: str) -> str:
        """The number after the highest of the versions."""
        try:
            known = [one["name"] for one in self._client.items(f"/models/{segment(name)}/versions")]
        except NotFoundError:
            known = []
        return str(1 + max((int(one) for one in known if one.isdecimal()), default=0))

    def _profiles(self, wanted: Sequence[str | Json] | None, *, quantize: bool) -> list[str]:
        if isinstance(wanted, (str, Mapping)):
            raise BuildError("profiles: give a list, such as profiles=['raspberry-pi-5']")
        if wanted is None:
            found = sorted({one["profile"] for one in self._client.items("/devices") if one["profile"]})
            if found:
                return found
            precisions = ["fp32", "int8"] if quantize else ["fp32"]
            wanted = [{"name": FOR_ALL, "match": {}, "runtime": "onnx", "precisions": precisions}]
        return [one if isinstance(one, str) else self._profile(one) for one in wanted]

    def _profile(self, wanted: Json) -> str:
        """Create a profile, or take the one of that name where it says the same."""
        if "name" not in wanted:
            raise BuildError("profiles: a new profile needs a name, such as {'name': 'gateway', 'runtime': 'onnx'}")
        name = str(wanted["name"])
        try:
            self._client.post("/profiles", wanted)
        except ConflictError as error:
            if error.code != "profile_exists":
                raise
            known = self._client.get(f"/profiles/{segment(name)}")["spec"]
            other = [key for key, value in wanted.items() if key in known and known[key] != value]
            if other:
                raise BuildError(
                    f"profiles: {name!r} is there already with another {', '.join(other)}: name it to use it as it is"
                ) from None
        return name

    def __repr__(self) -> str:
        if not self.version:
            return f"<Model of {type(self._net().net).__name__}, not pushed: call optimize(name=…)>"
        states = ", ".join(f"{one['profile']} {one['state']}" for one in self.variants) or "no variants"
        return f"<Model {self.reference}: {states}>"

    def _repr_html_(self) -> str:
        facts: dict[str, object] = {"model": self.reference if self.version else "not pushed"}
        if self.chosen is not None:
            facts["net"] = self.chosen.name
            facts["error, points"] = self.chosen.error
        return table("Model", facts, [{"state": one["state"], **_row(one)} for one in self.variants])


def _row(variant: Json) -> Json:
    measured = variant["measurements"] or {}
    return {
        "profile": variant["profile"],
        "precision": variant["precision"],
        "bytes": variant["size"],
        **{name: measured.get(name) for name in ("accuracy", "latency_p50_ms", "latency_p95_ms")},
        "on": (variant["gate"] or {}).get("measured_on"),
    }


def _check_share(prune: object) -> None:
    if prune is None or prune == "adaptive":
        return
    if isinstance(prune, bool) or not isinstance(prune, (int, float)) or not 0 < prune < 1:
        raise NetError(f"prune: {prune!r} is neither 'adaptive' nor the share of the work to be left, such as 0.5")


def _reason(one: Json) -> str:
    if one["failure"]:
        return str(one["failure"]["detail"])
    return "; ".join(check["detail"] for check in (one["gate"] or {"checks": []})["checks"] if not check["holds"])
