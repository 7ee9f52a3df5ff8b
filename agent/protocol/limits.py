"""Bounds on everything that is decoded: all input is hostile until it is measured."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class WireLimits:
    """Bounds checked before a message is decoded, or right after, before it is acted on."""

    message_bytes: int = 1 * MIB
    chunk_bytes: int = 256 * KIB
    artifact_bytes: int = 4096 * MIB
    release_bytes: int = 2048 * MIB  # of a release of the agent, unpacked
    releases: int = 8  # deployments of releases that a device reports
    starts: int = 16  # of a release on trial
    confirm_s: float = 3600.0  # that a trial may take
    golden_bytes: int = 4 * MIB  # of a file of golden inputs
    trust_file_bytes: int = 5_000_000  # of one file of TUF metadata
    trust_piece_bytes: int = 256 * KIB
    deployments: int = 64
    encodings: int = 16  # of a deployment
    held: int = 256  # artifacts that a device says it has
    trials: int = 8
    sampling: int = 64  # models of which a device keeps samples
    sample_requests: int = 8
    samples: int = 1000  # that are kept of a model, and that an upload holds
    sampled_bytes: int = 256 * MIB  # of them together
    sample_bytes: int = 4 * MIB  # of one
    sample_days: float = 90.0
    sample_file_bytes: int = 64 * MIB  # of an upload
    sample_piece_bytes: int = 128 * KIB
    trial_candidates: int = 16
    command_s: float = 86_400.0  # that a command may take
    log_lines: int = 5000  # that a command asks for at first
    log_batch: int = 200  # lines in one answer
    models_per_batch: int = 64
    histogram_buckets: int = 512
    confusion_cells: int = 4096
    predicted_classes: int = 512
    sketched_tensors: int = 16  # of a model, of inputs and of outputs
    sketch_cells: int = 256  # of one histogram
    missing_ranges: int = 256
    windows: int = 32  # of a delivery policy, of each kind
    budgets: int = 8  # of a kind of link
    combined_chunks: int = 16  # in one repair
    rest_s: float = 3600.0
    tensors: int = 64
    tensor_rank: int = 16
    tensor_elements: int = 1 << 30
    example_elements: int = 1 << 28
    waiting_requests: int = 65_536  # for one model
    scheduling_ms: float = 600_000.0
    cores: int = 4096
    gpu_memory_mb: int = 1 << 20
    facts_entries: int = 256
    part_bytes: int = 960 * KIB  # of the body of a part of an inference request, and of its answer's
    hops: int = 16  # of a part
    peers: int = 32  # devices of a LAN that a device is told of
    name_chars: int = 128
    problems: int = 16
    csr_chars: int = 16 * KIB
    certificate_chars: int = 64 * KIB
    signature_bytes: int = 1024
    detail_chars: int = 2000
    sources: int = 16  # that a deployment names
    url_chars: int = 2048
    ticket_chars: int = 2048
    counter: int = 1 << 30  # what counts one at a time: sequences, revisions, attempts
    total: int = 1 << 53  # what adds up: bytes, requests
    shortest_interval_s: float = 0.1
    seconds: float = 1e9  # over thirty years
    unix_seconds: float = 253_402_300_799.0  # the last one of the year 9999, which certificates say for "never"


LIMITS = WireLimits()
