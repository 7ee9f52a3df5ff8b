"""Parsers of what machines say of themselves, over texts of machines the project does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.hardware import measure, memory_mb, parse_cpuinfo, parse_nvidia_smi, parse_os_release
from agent.protocol.facts import AcceleratorFacts

XEON = """processor	: 0
vendor_id	: GenuineIntel
model		: 106
model name	: Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz
flags		: fpu sse sse4_2 avx avx2 fma f16c avx512f avx512bw avx512_vnni

processor	: 1
model name	: Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz
flags		: fpu sse sse4_2 avx avx2 fma f16c avx512f avx512bw avx512_vnni
"""
OLD_X86 = "model name\t: Intel(R) Celeron(R) CPU J1900\nflags\t\t: fpu sse sse4_2\n"
PI_5 = """processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU part	: 0xd0b

Revision	: c04170
Model		: Raspberry Pi 5 Model B Rev 1.0
"""
PI_4 = """processor	: 0
Features	: fp asimd evtstrm crc32 cpuid
CPU part	: 0xd08

Hardware	: BCM2835
Model		: Raspberry Pi 4 Model B Rev 1.4
"""
PI_2 = "model name\t: ARMv7 Processor rev 5 (v7l)\nFeatures\t: half thumb vfp edsp neon vfpv3\nHardware\t: BCM2835\n"


@pytest.mark.parametrize(
    ("text", "model", "has", "lacks"),
    [
        (XEON, "Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", {"avx2", "avx512_vnni"}, {"amx_int8", "fpu"}),
        (OLD_X86, "Intel(R) Celeron(R) CPU J1900", {"sse4_2"}, {"avx2"}),
        (PI_5, "Raspberry Pi 5 Model B Rev 1.0", {"asimd", "asimddp", "fphp"}, {"i8mm", "neon"}),
        (PI_4, "Raspberry Pi 4 Model B Rev 1.4", {"asimd"}, {"asimddp"}),
        (PI_2, "ARMv7 Processor rev 5 (v7l)", {"neon"}, {"asimd"}),
        ("", "", set(), {"avx2"}),
    ],
)
def test_cpu(text: str, model: str, has: set[str], lacks: set[str]) -> None:
    found, features = parse_cpuinfo(text)
    assert found == model
    assert has <= set(features)
    assert not lacks & set(features)


def test_memory_is_what_the_control_group_leaves() -> None:
    assert memory_mb(8 << 30, "max\n") == 8192
    assert memory_mb(8 << 30, "") == 8192
    assert memory_mb(8 << 30, f"{512 << 20}\n") == 512
    assert memory_mb(1 << 30, f"{8 << 30}") == 1024


def test_nvidia() -> None:
    text = "NVIDIA H100 80GB HBM3, 9.0, 81559, 550.54.15\nOrin (nvgpu), 8.7, [N/A], 540.3.0\nnonsense\n"
    assert parse_nvidia_smi(text) == (
        AcceleratorFacts("cuda", "NVIDIA H100 80GB HBM3", "9.0", 81559, "550.54.15"),
        AcceleratorFacts("cuda", "Orin (nvgpu)", "8.7", None, "540.3.0"),
    )
    assert parse_nvidia_smi("") == ()


def test_operating_system() -> None:
    assert parse_os_release('NAME="x"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n').endswith("(bookworm)")
    assert parse_os_release("") == ""


def test_this_machine(tmp_path: Path) -> None:
    facts = measure(tmp_path, tags={"site": "here"}, runtimes=("onnx",))
    assert facts.cpu_cores >= 1
    assert facts.memory_mb > 100
    assert [runtime.name for runtime in facts.runtimes] == ["onnx"]
    assert "cpu" in facts.runtimes[0].providers
    assert facts.tags == {"site": "here"}
