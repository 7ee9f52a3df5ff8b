"""Errors of the wire: stable codes that both sides, the REST API and the docs share."""

from __future__ import annotations

from enum import StrEnum


class WireErrorCode(StrEnum):
    """Why a message was refused or a deployment failed; stable, safe to match on."""

    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    PROTOCOL_MISMATCH = "protocol_mismatch"
    UNKNOWN_MESSAGE = "unknown_message"
    WRONG_DEVICE = "wrong_device"
    DIGEST_MISMATCH = "digest_mismatch"
    UNTRUSTED = "untrusted"
    UNSIGNED = "unsigned"
    METADATA_EXPIRED = "metadata_expired"
    NO_TRUSTED_ROOT = "no_trusted_root"
    DISK_FULL = "disk_full"
    STORE_ERROR = "store_error"
    RUNTIME_MISSING = "runtime_missing"
    PROVIDER_UNAVAILABLE = "provider_unavailable"
    PRECISION_UNSUPPORTED = "precision_unsupported"
    LOAD_FAILED = "load_failed"
    WARMUP_FAILED = "warmup_failed"
    GOLDEN_MISMATCH = "golden_mismatch"
    MEMORY_SHORT = "memory_short"
    WORKER_CRASHED = "worker_crashed"
    PROBATION_FAILED = "probation_failed"
    DOWNLOAD_STALLED = "download_stalled"
    MEASURING_FAILED = "measuring_failed"
    RENEWAL_REFUSED = "renewal_refused"
    RELEASE_UNFIT = "release_unfit"
    RELEASE_FAILED = "release_failed"
    INTERNAL = "internal"


class WireError(Exception):
    """A message, or what it asked for, was refused.

    Attributes:
        code: the stable reason.
        detail: a sentence for people: what was wrong and what would mend it.
    """

    def __init__(self, code: WireErrorCode, detail: str) -> None:
        super().__init__(f"{code.value}: {detail}")
        self.code = code
        self.detail = detail
