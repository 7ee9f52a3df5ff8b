"""Equal lists of numbers in a TFLite file, written once.

Weights quantized per channel have a zero point of eight bytes a channel, all of them zero: 3 % of an int8 MobileNetV2.
A file of flatbuffers may refer to one list from many places, and whoever reads it can't tell.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from converters.step import Context, Parameter

ALIGNED = 16  # the schema's `force_align` of what buffers hold


def share_vectors(
    source: Path, target: Path, _context: Context, _parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Write the file anew with equal lists shared; one whose weights lie behind the flatbuffer stays as it is."""
    import numpy as np
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(source))
    if any(buffer.offset > 1 for buffer in model.buffers):
        shutil.copyfile(source, target)
        return
    for buffer in model.buffers:
        if buffer.data is not None:
            buffer.data = np.frombuffer(buffer.data, np.uint8)
    builder = _sharing_builder()
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    target.write_bytes(builder.Output())
    found["shared"] = builder.shared


def _sharing_builder() -> Any:
    import flatbuffers
    import numpy as np

    class SharingBuilder(flatbuffers.Builder):  # type: ignore[misc]
        """Refers to a list that it has written already instead of writing it again."""

        def __init__(self) -> None:
            super().__init__(1024)
            self.shared = 0
            self._written: dict[tuple[str, bytes], int] = {}

        def CreateNumpyVector(self, x: Any) -> int:  # noqa: N802 (the library's name)
            key = (x.dtype.str, x.tobytes())
            if key in self._written:
                self.shared += 1
                return self._written[key]
            if x.dtype == np.uint8:
                self.Prep(ALIGNED, x.size)
            self._written[key] = super().CreateNumpyVector(x)
            return self._written[key]

    return SharingBuilder()
