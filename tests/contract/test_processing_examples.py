"""The examples of processing in the documentation are taken, and fit the nets that they are said to be for."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from agent.protocol.manifest import TensorSpec
from agent.protocol.processing_rules import check, read

GUIDE = Path(__file__).parents[2] / "docs" / "operations.md"


def test_examples_of_the_guide() -> None:
    found = re.findall(r"```yaml\n(# processing\.yaml.*?)```", GUIDE.read_text(), re.DOTALL)
    classifier, detector = (read(yaml.safe_load(text)) for text in found)
    image = TensorSpec("image", "float32", (-1, 3, 224, 224))
    check(classifier, [image], [TensorSpec("scores", "float32", (-1, 1000))], 1000)
    images = TensorSpec("images", "float32", (1, 3, 640, 640))
    check(detector, [images], [TensorSpec("output0", "float32", (1, 84, 8400))], 80)
