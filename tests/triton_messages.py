"""Triton's own message of a configuration, out of `tritonclient`, whose gRPC part asks for an older protobuf."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tritonclient.grpc.model_config_pb2 import ModelConfig

__all__ = ["ModelConfig"]
