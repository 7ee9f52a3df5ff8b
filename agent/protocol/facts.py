"""Facts: what an agent measured of its hardware and runtimes. Profiles are matched over them."""

from __future__ import annotations

import msgspec


class AcceleratorFacts(msgspec.Struct, frozen=True):
    """One GPU, NPU or TPU.

    Attributes:
        kind: `cuda`, `edgetpu`, `openvino`, `coreml`, …
        name: as the driver names it.
        compute_capability: CUDA's, such as `8.7`; None elsewhere.
        memory_mb: its own memory in MiB; None when shared or unknown.
        driver: the driver's version, when known.
    """

    kind: str
    name: str
    compute_capability: str | None = None
    memory_mb: int | None = None
    driver: str | None = None


class RuntimeFacts(msgspec.Struct, frozen=True):
    """One inference runtime that imports on the device.

    Attributes:
        name: `onnx`, `litert`, or that of a runtime that a package brings: the names manifests use.
        package: the distribution that provides it, such as `onnxruntime`.
        version: that distribution's version.
        providers: execution providers or delegates it says it has. A claim: what ran is in `ServingReport`.
    """

    name: str
    package: str
    version: str
    providers: tuple[str, ...] = ()


class LinkFacts(msgspec.Struct, frozen=True):
    """The device's way to the server.

    Attributes:
        type: `ethernet`, `wifi`, `cellular` or `unknown`.
        metered: whether it costs by the byte.
        interface: its name, such as `wwan0`; empty when the configuration says the type, or none has a default route.
    """

    type: str = "unknown"
    metered: bool = False
    interface: str = ""


class AgentFacts(msgspec.Struct, frozen=True):
    """The agent itself, as releases of it are concerned.

    Attributes:
        platform: such as `linux-x86_64-glibc-cp311`: where a release must run.
        self_update: `on`; `off`: its owner does not allow it; `unavailable`: it was not started by its launcher; empty
            of an agent from before there were releases.
        release: the digest of the release that runs; empty for what is installed.
        launcher: the number of its launcher.
        installed: the version that is installed on the device.
    """

    platform: str = ""
    self_update: str = ""
    release: str = ""
    launcher: int = 0
    installed: str = ""


FEATURES = ("commands", "exposure", "samples")  # of this agent


class DeviceFacts(msgspec.Struct, frozen=True):
    """Everything measured of a device.

    Attributes:
        agent_version: the agent's own version.
        os: such as `Debian GNU/Linux 12 (bookworm)`.
        kernel: such as `6.1.0-18-amd64`.
        arch: `x86_64`, `aarch64`, `armv7l`, …
        cpu_model: as the kernel names it.
        cpu_cores: cores this process may use.
        cpu_features: those that matter for inference, such as `avx2`, `avx512_vnni`, `neon`, `asimddp`.
        memory_mb: physical memory in MiB.
        disk_free_mb: free on the agent's state directory, in MiB, when measured.
        accelerators: GPUs and others.
        runtimes: inference runtimes.
        tags: what the device's own configuration says of it, such as `{"site": "plant7"}`.
        link: its way to the server, as it is now.
        features: what the agent can do that not every one could: `commands`, `exposure`, `infer`, `samples`.
        inference_address: `host:port` at which other devices of its LAN reach its inference API; empty for none.
        agent: the agent itself.
        balancing_address: `host:port` at which it answers requests in the place of devices of its LAN; empty for none.
        balancing_lan: name of its LAN, as its owner has it, or empty: who names the same one is told of it.
        commands: by the name of each command that the agent knows, whether the device's owner allows it.
    """

    agent_version: str
    os: str
    kernel: str
    arch: str
    cpu_model: str
    cpu_cores: int
    cpu_features: tuple[str, ...]
    memory_mb: int
    disk_free_mb: int
    accelerators: tuple[AcceleratorFacts, ...] = ()
    runtimes: tuple[RuntimeFacts, ...] = ()
    tags: dict[str, str] = {}
    link: LinkFacts = LinkFacts()
    features: tuple[str, ...] = ()
    commands: dict[str, bool] = {}
    inference_address: str = ""
    agent: AgentFacts = AgentFacts()
    balancing_address: str = ""
    balancing_lan: str = ""
