"""To and from a directory that `transformers` loads as `MiniMaxForCausalLM`: `python -m trainer.hf CHECKPOINT OUT`.

`transformers` rotates every dimension of a head and ignores a partial rotary dimension in this class. So the export
orders each head's query and key dimensions as [first half of the rotated, first half of the rest, second half of the
rotated, second half of the rest], which leaves their products as they are, and asks for "proportional" RoPE, whose
frequencies are 0 for the rest. That type takes its exponents over the whole head, hence theta^(N/R) for our theta.

With `--released` it writes the layout of the published MiniMax-Text-01 instead (`rotary_dim`, no reordering), for
vLLM's `MiniMaxText01ForCausalLM`; `transformers` would take it too, and rotate all of a head. Both can be read back.
"""

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dataprep.storage import UserError, read_json, write_json
from trainer.checkpoint import read_info, read_tensors
from trainer.config import ModelConfig
from trainer.model import Decoder, local_part

FILE_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
DECIDES = "hidden_act", "tie_word_embeddings", "layer_types", "attn_type_list", "postnorm", "shared_intermediate_size"
READ = ("hidden", "layers", "softmax_every", "heads", "kv_heads", "head_dim", "rotary_dim", "ffn", "experts", "top_k",
        "norm_eps")  # fmt: skip


def export(
    checkpoint: Path, out: Path, dtype: torch.dtype = torch.float32, released: bool = False,
    file_bytes: int = FILE_BYTES,
) -> None:  # fmt: skip
    """Write config.json and safetensors, none above `file_bytes`, for a checkpoint of this trainer. Needs no process
    group, and memory for the whole model."""
    info = read_info(checkpoint)
    config = ModelConfig(**info["config"]["model"])
    if released and config.heads & (config.heads - 1):
        raise UserError(
            f"the released layout needs a power of two heads, not {config.heads}: vLLM has other slopes there"
        )
    model = Decoder(config, info["vocabulary"], info["rope_base"])
    if info["config"]["dtype"] == "float64":
        model.double()
    weights = model.state_dict()
    with warnings.catch_warnings():  # it warns of what is asked for: to load in this process alone
        warnings.simplefilter("ignore", UserWarning)
        read_tensors(checkpoint, {"model": weights}, no_dist=True)
    tensors = {name: t.to(dtype) for name, t in to_hf(weights, config, released).items()}

    out.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if files[-1] and sum(t.nbytes for t in files[-1].values()) + tensor.nbytes > file_bytes:
            files.append({})
        files[-1][name] = tensor.contiguous()
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for name, part in zip(names, files, strict=True):
        save_file(part, out / name, metadata={"format": "pt"})
    index = {tensor: name for name, part in zip(names, files, strict=True) for tensor in part}
    size = sum(t.nbytes for t in tensors.values())
    write_json(str(out / INDEX), {"metadata": {"total_size": size}, "weight_map": index})
    write_json(
        str(out / "config.json"), hf_config(info, config, released) | {"dtype": str(dtype).removeprefix("torch.")}
    )  # last: it makes the directory a model


def hf_config(info: dict[str, Any], config: ModelConfig, released: bool) -> dict[str, Any]:
    """What the other side needs to compute what our decoder computes.

    vLLM reads it through `transformers`' class too, which knows only its own `model_type` and fills in `layer_types`
    where it is missing: so both layouts say all that is not the rotation.
    """
    softmax, share = [config.is_softmax(i) for i in range(config.layers)], config.rotary_dim / config.head_dim
    if released:
        architecture, factor = "MiniMaxText01ForCausalLM", "layernorm_{}_{}"
        kinds = "full_attention", "linear_attention", "mlp"
        rope: dict[str, Any] = {"rotary_dim": config.rotary_dim, "rope_theta": info["rope_base"]}
    else:
        architecture, factor, kinds = "MiniMaxForCausalLM", "{}_{}_factor", ("full_attn", "linear_attn", "mlp")
        theta = info["rope_base"] ** (1 / share) if share else 1.0
        rope = {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": share, "rope_theta": theta}}
    factors = {
        factor.format(kind, name): value
        for name, value in {"alpha": (2 * config.layers) ** 0.25, "beta": 1.0}.items()
        for kind in kinds
    }
    return factors | rope | {
        "architectures": [architecture], "model_type": "minimax", "vocab_size": info["vocabulary"],
        "eos_token_id": info["eos"], "bos_token_id": None, "max_position_embeddings": info["context"],
        "num_hidden_layers": config.layers, "hidden_size": config.hidden, "hidden_act": "silu",
        "intermediate_size": config.ffn, "num_attention_heads": config.heads, "head_dim": config.head_dim,
        "num_key_value_heads": config.kv_heads, "num_local_experts": config.experts,
        "num_experts_per_tok": config.top_k, "router_aux_loss_coef": config.aux_loss / config.top_k,
        "rms_norm_eps": config.norm_eps, "tie_word_embeddings": False, "block_size": config.block, "postnorm": True,
        "layer_types": ["full_attention" if s else "linear_attention" for s in softmax],
        "attn_type_list": [int(s) for s in softmax], "shared_intermediate_size": 0,
    }  # fmt: skip


def read_config(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The decoder that a directory's config.json describes, and its `vocabulary`, `rope_base`, `eos`, `context` and
    `released` layout. Raises UserError where this decoder cannot compute what it says."""
    path = directory / "config.json"
    found = read_json(str(path))
    if not isinstance(found, dict):
        raise UserError(f"{directory} holds no config.json; give a directory as transformers saves it")
    try:
        released, rope = "rotary_dim" in found, found.get("rope_parameters") or {}
        softmax = found.get("attn_type_list") or [t == "full_attention" for t in found["layer_types"]]
        head_dim = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
        share = rope["partial_rotary_factor"] if rope.get("rope_type") == "proportional" else 1.0
        base = found["rope_theta"] if released else rope["rope_theta"] ** share
        config = ModelConfig(
            hidden=found["hidden_size"], layers=found["num_hidden_layers"], heads=found["num_attention_heads"],
            softmax_every=[*map(bool, softmax), True].index(True) + 1, kv_heads=found["num_key_value_heads"],
            head_dim=head_dim, rotary_dim=found["rotary_dim"] if released else round(share * head_dim),
            ffn=found["intermediate_size"], experts=found["num_local_experts"], top_k=found["num_experts_per_tok"],
            norm_eps=found["rms_norm_eps"],
        )  # fmt: skip
        about = {"vocabulary": found["vocab_size"], "rope_base": base, "eos": found.get("eos_token_id"),
                 "context": found["max_position_embeddings"]}  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not that of a MiniMax decoder: {error!r}") from error
    for key, mine in hf_config(about, config, released).items():
        factor = key.endswith(("_alpha", "_beta", "_factor"))
        theirs = found.get(key, 1.0 if factor else mine)
        if not (math.isclose(theirs, mine, rel_tol=1e-6) if factor else key not in DECIDES or theirs == mine):
            raise UserError(f"{path}: {key} is {theirs}, but this decoder computes with {mine}")
    return config, about | {"released": released}


@torch.no_grad()
def load(model: Decoder, directory: Path) -> None:
    """Read a directory's weights into a decoder, on any mesh. Raises UserError where the sizes differ."""
    config, about = read_config(directory)
    for key in READ:
        if (mine := getattr(model.config, key)) != (theirs := getattr(config, key)):
            raise UserError(f"train.model.{key} is {mine}, but {directory} has {theirs}")
    if (mine := len(model.embed_tokens.weight)) != about["vocabulary"]:
        raise UserError(f"the shards' vocabulary has {mine} entries, but that of {directory} {about['vocabulary']}")
    index = read_json(str(directory / INDEX)) or {"weight_map": {}}

    def get(name: str) -> Tensor:
        file = directory / index["weight_map"].get(name, "model.safetensors")
        with safe_open(file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor

    for ours, parameter in model.named_parameters():
        local, part = local_part(parameter)
        name = hf_name(ours)
        if ours.endswith("experts.gate_up_proj"):
            for expert, e in zip(local, range(part[0].start, part[0].stop), strict=True):
                both = [get(name.replace("gate_up_proj", f"{e}.{w}.weight")) for w in ("w1", "w3")]
                expert.copy_(torch.stack(both)[part[1:]])
        elif ours.endswith("experts.down_proj"):
            for expert, e in zip(local, range(part[0].start, part[0].stop), strict=True):
                expert.copy_(get(name.replace("down_proj", f"{e}.w2.weight"))[part[1:]])
        else:
            whole = get(name)
            if ours.endswith(("q_proj.weight", "k_proj.weight")) and not about["released"]:
                back = torch.tensor(head_order(config)).argsort()
                whole = whole.unflatten(0, (-1, config.head_dim))[:, back].flatten(0, 1)
            local.copy_(whole[part])


def hf_name(ours: str) -> str:
    return ours if ours.startswith("lm_head") else "model." + ours.replace(".mlp.", ".block_sparse_moe.")


def to_hf(weights: dict[str, Tensor], config: ModelConfig, released: bool) -> dict[str, Tensor]:
    """Our weights under the names, and in the layout, of a saved `MiniMaxForCausalLM`."""
    out: dict[str, Tensor] = {}
    for ours, tensor in weights.items():
        name = hf_name(ours)
        if name.endswith(("q_proj.weight", "k_proj.weight")) and not released:
            out[name] = tensor.unflatten(0, (-1, config.head_dim))[:, head_order(config)].flatten(0, 1)
        elif name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(tensor):
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
    checkpoint, out = (Path(word) for word in sys.argv[1:] if word != "--released")
    export(checkpoint, out, released="--released" in sys.argv)
