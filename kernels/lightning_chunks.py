"""Lightning attention over packed documents in plain PyTorch: what the CPU runs, and float64 anywhere.

`S_t = exp(-s) S_{t-1} + k_t v_t^T`, `o_t = q_t^T S_t` (arXiv 2501.08313, section 2.2.2; scale 1), S = 0 where a
document starts: masked matrix products within chunks of the stream, a scan over states between them.

Shape suffixes: T tokens, H heads, N head dimension, C chunks, B tokens per chunk (the block), G chunks of one scan
step, X = N * N entries of a state. A digit is a dimension of that size.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SCAN = 32  # chunks that the scan over states combines with one matrix product


@dataclass(frozen=True)
class Chunks:
    """Where documents lie in chunks, as masks: made once per batch, used by every layer.

    Chunks are cut from the stream, not from the documents, so that no token is padded however short the documents
    are; masks keep a chunk's documents apart. The stream's end is padded to a whole chunk (document -1).
    """

    same_CBB: Tensor  # query and key belong to one document; float32, for products with it are quicker than with bool
    inward_CB1: Tensor  # the token belongs to the document that the state coming into the chunk belongs to
    outward_CB1: Tensor  # ... to the one that the state leaving the chunk belongs to: its last
    last_C: Tensor  # that last document

    @classmethod
    def of(cls, document_T: Tensor, block: int, device: torch.device | str = "cpu") -> "Chunks":
        """document_T: the number (0 or more) of each token's document."""
        chunked = F.pad(document_T, (0, -len(document_T) % block), value=-1).view(-1, block)
        last = F.pad(chunked[:-1, -1], (0, 1), value=int(document_T[-1]))
        before = F.pad(last[:-1], (1, 0), value=-2)
        return cls(
            same_CBB=(chunked[:, :, None] == chunked[:, None, :]).to(device, torch.float32),
            inward_CB1=(chunked == before[:, None])[:, :, None].to(device),
            outward_CB1=(chunked == last[:, None])[:, :, None].to(device),
            last_C=last.to(device),
        )


@dataclass(frozen=True)
class Decay:
    """The powers of exp(-slope) that one layer's lightning attention needs."""

    inner_H1BB: Tensor  # from key j to query i, 0 where j > i
    query_H1B1: Tensor  # from the state before the chunk to query i
    key_H1B1: Tensor  # from key j to the state after the chunk
    chunk_HGG: Tensor  # from one chunk's state to a later one's, 0 where it is earlier
    slope_H: Tensor  # float64


def slopes(heads: int, layer: int, layers: int) -> Tensor:
    """Decay per token of each head in one layer (0-based, softmax layers counted), float64 (H)."""
    head = torch.arange(1, heads + 1, dtype=torch.float64)
    return 2.0 ** (-8.0 * head / heads) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)


@functools.cache
def decay(heads: int, layer: int, layers: int, block: int, device: torch.device, dtype: torch.dtype) -> Decay:
    """A layer's `Decay`, kept in float32 or better whatever the activations are."""
    s_H = slopes(heads, layer, layers)
    i_B1 = torch.arange(block, dtype=torch.float64)[:, None]
    g_G1 = torch.arange(SCAN + 1, dtype=torch.float64)[:, None]

    def power(n: Tensor) -> Tensor:
        powers = torch.exp(-s_H[:, None, None, None] * n.clamp(min=0))
        return powers.to(device, torch.promote_types(dtype, torch.float32))

    inner_H1BB, chunk_H1GG = power(i_B1 - i_B1.mT).tril(), power(block * (g_G1 - g_G1.mT)).tril()
    return Decay(inner_H1BB, power(i_B1 + 1), power(block - 1 - i_B1), chunk_H1GG[:, 0], s_H.to(device))


def lightning_attention(qkv_TH3N: Tensor, decay: Decay, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """(output (T, H, N), state after the last token (H, N, N)); q, k and v are the SiLU of what is given."""
    tokens, dtype, block = len(qkv_TH3N), qkv_TH3N.dtype, decay.inner_H1BB.shape[-1]
    qkv_HT3N = qkv_TH3N.transpose(0, 1)
    if tokens % block:
        qkv_HT3N = F.pad(qkv_HT3N, (0, 0, 0, -tokens % block))
    # One copy with heads outermost; no matrix product below then copies what it takes.
    qkv_HCB3N = F.silu(qkv_HT3N.contiguous()).unflatten(1, (-1, block))
    q_HCBN, k_HCBN, v_HCBN = qkv_HCB3N.chunk(3, dim=-1)

    score_HCBB = (q_HCBN @ k_HCBN.mT).mul_(decay.inner_H1BB).mul_(chunks.same_CBB)
    key_HCBN = (k_HCBN * (decay.key_H1B1 * chunks.outward_CB1)).to(dtype)
    query_HCBN = (q_HCBN * (decay.query_H1B1 * chunks.inward_CB1)).to(dtype)
    state_HCNN = scan((key_HCBN.mT @ v_HCBN)[:, :-1], decay, chunks.last_C)
    out_HCBN = score_HCBB @ v_HCBN + query_HCBN @ state_HCNN.to(dtype)
    final_HNN = state_after(state_HCNN[:, -1], k_HCBN[:, -1], v_HCBN[:, -1], decay, chunks, (tokens - 1) % block + 1)
    return out_HCBN.flatten(1, 2)[:, :tokens].transpose(0, 1), final_HNN


def scan(local_HCNN: Tensor, decay: Decay, last_C: Tensor) -> Tensor:
    """The state coming into every chunk, given what each but the last adds to it: SCAN chunks at a time."""
    heads, _, *size = local_HCNN.shape
    states_H1X = [local_HCNN.new_zeros(heads, 1, math.prod(size), dtype=decay.chunk_HGG.dtype)]
    for start in range(0, local_HCNN.shape[1], SCAN):
        # The state so far counts as one more chunk before. One reaches a later chunk's if both end in one document.
        local_HGX = torch.cat([states_H1X[-1][:, -1:], local_HCNN[:, start : start + SCAN].flatten(2)], dim=1)
        last_G = last_C[max(start - 1, 0) : start + local_HGX.shape[1] - 1]
        last_G = F.pad(last_G, (local_HGX.shape[1] - len(last_G), 0), value=-2)
        weight_HGG = decay.chunk_HGG[:, : len(last_G), : len(last_G)] * (last_G[:, None] == last_G)
        states_H1X.append(weight_HGG[:, 1:] @ local_HGX)
    return torch.cat(states_H1X, dim=1).unflatten(2, size)


def state_after(state_HNN: Tensor, k_HBN: Tensor, v_HBN: Tensor, decay: Decay, chunks: Chunks, rows: int) -> Tensor:
    """The state after the last chunk's `rows` tokens, given the one before and the chunk's keys and values."""
    key_HBN = k_HBN[:, :rows] * decay.key_H1B1[:, 0, -rows:] * chunks.outward_CB1[-1, :rows]
    goes_on = chunks.inward_CB1[-1, rows - 1]  # the document of the state before is the one the stream ends in
    return (
        key_HBN.mT @ v_HBN[:, :rows].to(key_HBN.dtype) + state_HNN * decay.query_H1B1[:, 0, rows - 1 : rows] * goes_on
    )
