"""Names of the Open Inference Protocol: datatypes, as the local API, samples and pipelines name them, and a header.

Without numpy.
"""

from __future__ import annotations

# Of a request or an answer by HTTP whose body goes on with binary tensors: how many bytes of it are JSON.
HEADER_LENGTH = "Inference-Header-Content-Length"
HEADER_LENGTH_READ = HEADER_LENGTH.lower()  # its name among headers that were read
BYTES = "BYTES"  # strings, on the way each behind its length in four bytes
# What numpy calls each, little-endian; `BYTES` are of no fixed size, and not among them.
ARRAY_TYPES = {
    "BOOL": "|b1", "UINT8": "|u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "|i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
