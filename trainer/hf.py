"""Export to a directory that `transformers` loads as `MiniMaxForCausalLM`: `python -m trainer.hf CHECKPOINT OUT`.

`transformers` rotates every dimension of a head and ignores a partial rotary dimension in this class. So the export
orders each head's query and key dimensions as [first half of the rotated, first half of the rest, second half of the
rotated, second half of the rest], which leaves their products as they are, and asks for "proportional" RoPE, whose
frequencies are 0 for the rest. That type takes its exponents over the whole head, hence theta^(N/R) for our theta.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dataprep.storage import write_json
from trainer.checkpoint import read_info, read_tensors
from trainer.config import ModelConfig
from trainer.model import Decoder

FILE_BYTES = 4 << 30


def export(checkpoint: Path, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and safetensors for a checkpoint of this trainer. Needs no process group."""
    info = read_info(checkpoint)
    config = ModelConfig(**info["config"]["model"])
    model = Decoder(config, info["vocabulary"], info["rope_base"])
    if info["config"]["dtype"] == "float64":
        model.double()
    weights = model.state_dict()
    with warnings.catch_warnings():  # it warns of what is asked for: to load in this process alone
        warnings.simplefilter("ignore", UserWarning)
        read_tensors(checkpoint, {"model": weights}, no_dist=True)
    tensors = {name: t.to(dtype) for name, t in to_hf(weights, config).items()}

    out.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if files[-1] and sum(t.nbytes for t in files[-1].values()) + tensor.nbytes > FILE_BYTES:
            files.append({})
        files[-1][name] = tensor.contiguous()
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for name, part in zip(names, files, strict=True):
        save_file(part, out / name, metadata={"format": "pt"})
    index = {tensor: name for name, part in zip(names, files, strict=True) for tensor in part}
    size = sum(t.nbytes for t in tensors.values())
    write_json(str(out / "model.safetensors.index.json"), {"metadata": {"total_size": size}, "weight_map": index})
    write_json(str(out / "config.json"), hf_config(info, config, dtype))  # last: it makes the directory a model


def hf_config(info: dict[str, Any], config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What `MiniMaxConfig` needs to compute what our decoder computes."""
    scale = (2 * config.layers) ** 0.25
    factors = {f"{kind}_{factor}_factor": value for kind in ("full_attn", "linear_attn", "mlp")
               for factor, value in (("alpha", scale), ("beta", 1.0))}  # fmt: skip
    share = config.rotary_dim / config.head_dim
    return factors | {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": info["vocabulary"],
        "eos_token_id": info["eos"],
        "bos_token_id": None,
        "max_position_embeddings": info["context"],
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.top_k,
        "router_aux_loss_coef": config.aux_loss / config.top_k,
        "rms_norm_eps": config.norm_eps,
        "block_size": config.block,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention" if config.is_softmax(i) else "linear_attention" for i in range(config.layers)],
        "rope_parameters": {
            "rope_type": "proportional",
            "partial_rotary_factor": share,
            "rope_theta": info["rope_base"] ** (1 / share) if share else 1.0,
        },
    }


def to_hf(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights under the names, and in the layout, of a saved `MiniMaxForCausalLM`."""
    out: dict[str, Tensor] = {}
    for ours, tensor in weights.items():
        name = ours if ours.startswith("lm_head") else "model." + ours.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            out[name] = tensor.unflatten(0, (-1, config.head_dim))[:, head_order(config)].flatten(0, 1)
        elif name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(expert.chunk(2) for expert in tensor):
                out[name.replace("gate_up_proj", f"{e}.w1.weight")] = gate
                out[name.replace("gate_up_proj", f"{e}.w3.weight")] = up
        elif name.endswith("experts.down_proj"):
            for e, expert in enumerate(tensor):
                out[name.replace("down_proj", f"{e}.w2.weight")] = expert
        else:
            out[name] = tensor
    return out


def head_order(config: ModelConfig) -> list[int]:
    """The order of a head's query and key dimensions in the export."""
    half = config.rotary_dim // 2
    rest = (config.head_dim - config.rotary_dim) // 2
    starts = (0, half), (2 * half, rest), (half, half), (2 * half + rest, rest)
    return [i for start, length in starts for i in range(start, start + length)]


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
