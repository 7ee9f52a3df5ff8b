"""What this machine is: measured, not configured. Parsers are pure; runtimes are not imported here."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from agent import __version__, runtime_registry
from agent.protocol.facts import FEATURES, AcceleratorFacts, DeviceFacts, RuntimeFacts

CPU_FEATURES = frozenset(
    [
        "sse4_2",
        "avx",
        "avx2",
        "avx512f",
        "avx512bw",
        "avx512_vnni",
        "avx_vnni",
        "amx_int8",
        "amx_bf16",
        "avx512_bf16",
        "f16c",
        "fma",
        "neon",
        "asimd",
        "asimddp",
        "asimdhp",
        "fphp",
        "i8mm",
        "bf16",
        "sve",
        "sve2",
        "sme",
    ]
)
_PROBE_S = 60.0


def measure(state_dir: Path, *, tags: Mapping[str, str], runtimes: tuple[str, ...] = ()) -> DeviceFacts:
    """The facts of this machine.

    Args:
        state_dir: whose free disk counts.
        tags: what the configuration says of the device.
        runtimes: the only ones to report; empty for all.
    """
    cpu_model, features = parse_cpuinfo(_read("/proc/cpuinfo"))
    return DeviceFacts(
        agent_version=__version__,
        os=parse_os_release(_read("/etc/os-release")) or platform.platform(),
        kernel=platform.release(),
        arch=platform.machine(),
        cpu_model=cpu_model or _read("/proc/device-tree/model").strip("\0 \n") or platform.processor(),
        cpu_cores=len(os.sched_getaffinity(0)),
        cpu_features=features,
        memory_mb=memory_mb(
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _read("/sys/fs/cgroup/memory.max")
        ),
        disk_free_mb=shutil.disk_usage(state_dir).free >> 20,
        accelerators=(*_nvidia(), *_edge_tpus()),
        runtimes=_runtimes(runtimes),
        tags=dict(tags),
        features=FEATURES,
    )


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Model and inference-relevant features in the text of /proc/cpuinfo, of x86 or ARM."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    words = set((fields.get("flags", "") + " " + fields.get("features", "")).lower().split())
    model = fields.get("model name") or fields.get("model") or fields.get("hardware") or ""
    return model, tuple(sorted(words & CPU_FEATURES))


def parse_os_release(text: str) -> str:
    """The pretty name in the text of /etc/os-release; empty when there is none."""
    for line in text.splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip().strip('"')
    return ""


def memory_mb(physical: int, cgroup: str) -> int:
    """Memory in MiB that this process may use: physical, or what its control group allows."""
    limit = int(cgroup) if cgroup.strip().isdigit() else physical
    return min(physical, limit) >> 20


def parse_nvidia_smi(text: str) -> tuple[AcceleratorFacts, ...]:
    """GPUs in the CSV of `nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version`."""
    found = []
    for line in text.strip().splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4:
            memory = int(float(parts[2])) if parts[2].replace(".", "", 1).isdigit() else None
            found.append(AcceleratorFacts("cuda", parts[0], parts[1] or None, memory, parts[3] or None))
    return tuple(found)


def _nvidia() -> tuple[AcceleratorFacts, ...]:
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return parse_nvidia_smi(done.stdout)
    except (OSError, subprocess.SubprocessError):
        tegra = _read("/proc/device-tree/compatible")
        return (AcceleratorFacts("cuda", "NVIDIA Tegra"),) if "nvidia,tegra" in tegra else ()


def _edge_tpus() -> tuple[AcceleratorFacts, ...]:
    """Coral devices: /dev/apex_* on PCIe, or one of two USB ids (before and after its firmware is loaded)."""
    found = [AcceleratorFacts("edgetpu", f"Coral {path.name}") for path in sorted(Path("/dev").glob("apex_*"))]
    for device in sorted(Path("/sys/bus/usb/devices").glob("*/idVendor")):
        ids = (_read(str(device)).strip(), _read(str(device.parent / "idProduct")).strip())
        if ids in {("1a6e", "089a"), ("18d1", "9302")}:
            found.append(AcceleratorFacts("edgetpu", "Coral USB"))
    return tuple(found)


def _runtimes(only: tuple[str, ...]) -> tuple[RuntimeFacts, ...]:
    found = []
    for one in runtime_registry.installed():
        if only and one.name not in only:
            continue
        match one.name:
            case "onnx":
                providers = _onnx_providers() or None
            case "litert":
                providers = ("xnnpack",)
            case "torch":
                providers = _torch_providers() or None
            case _:
                providers = runtime_registry.asked_providers(one)
        if providers is not None:
            found.append(RuntimeFacts(one.name, one.package, one.version, providers))
    return tuple(found)


def _onnx_providers() -> tuple[str, ...]:
    """Asked of a short-lived process: the supervisor must not carry the runtime's memory."""
    code = "import onnxruntime; print(*onnxruntime.get_available_providers())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_PROBE_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(name.removesuffix("ExecutionProvider").lower() for name in done.stdout.split())


def _torch_providers() -> tuple[str, ...]:
    """What the installed build may run on: to import it, in whatever process, takes seconds."""
    spec = importlib.util.find_spec("torch")
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    for folder in folders:
        return ("cpu", "cuda") if (Path(folder) / "lib" / "libtorch_cuda.so").exists() else ("cpu",)
    return ()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
