"""The run's tokeniser as evaluation needs it: ids of a text, and how many bytes of text each token stands for."""

import json
from typing import Any

import numpy as np

from dataprep.storage import is_local, join, read_bytes, read_json

FILE = "vocabulary.json"  # in `latest/`: path and fingerprint of the tokeniser that the shards were packed with


class Vocabulary:
    """token_bytes: int64 by id; control tokens stand for no text."""

    def __init__(self, data: bytes, sentencepiece: bool, size: int):
        self.token_bytes = np.zeros(size, np.int64)
        if sentencepiece:
            from sentencepiece import SentencePieceProcessor

            model: Any = SentencePieceProcessor(model_proto=data)
            pieces = {i: model.IdToPiece(i) for i in range(model.GetPieceSize())}
            control = {i for i in pieces if model.IsControl(i) or model.IsUnknown(i)}
            self._encode = lambda text: model.Encode(text, out_type=int)
        else:
            from tokenizers import Tokenizer

            model = Tokenizer.from_str(data.decode())
            pieces = {i: piece for piece, i in model.get_vocab().items()}
            control = {i for i, token in model.get_added_tokens_decoder().items() if token.special}
            self._encode = lambda text: model.encode(text, add_special_tokens=False).ids
        byte_level = not sentencepiece and '"ByteLevel"' in json.dumps(json.loads(data).get("decoder"))
        for token, piece in pieces.items():
            if token not in control and token < size:
                self.token_bytes[token] = len(piece) if byte_level else text_bytes(piece)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encode(text), np.int64)


def text_bytes(piece: str) -> int:
    """Bytes of text of a SentencePiece token: `▁` is a space, <0x41> a byte."""
    if len(piece) == 6 and piece.startswith("<0x"):
        return 1
    return len(piece.replace("▁", " ").encode())


def load(root: str, fingerprint: str, size: int) -> Vocabulary | None:
    """The tokeniser with this fingerprint; None where the root does not say which that was, or it is gone."""
    entry = read_json(join(root, "latest", FILE), path=str, tokenizer=str)
    if entry is None or entry["tokenizer"] != fingerprint:
        return None
    path = entry["path"]
    if is_local(path) and not path.startswith("/"):
        path = join(root, path)
    try:
        return Vocabulary(read_bytes(path), path.endswith(".model"), size)
    except FileNotFoundError:
        return None
