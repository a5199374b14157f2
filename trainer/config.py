"""The `train:` section of the configuration: model, optimiser, schedule, batch. Does not import torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dataprep.storage import fingerprint

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},  # the fields' defaults
    "small": {
        "hidden": 512, "layers": 16, "heads": 8, "kv_heads": 2, "head_dim": 64, "rotary_dim": 32,
        "ffn": 512, "experts": 8, "block": 128,
    },
    "h100": {
        "hidden": 1024, "layers": 16, "heads": 8, "kv_heads": 2, "head_dim": 128, "rotary_dim": 64,
        "ffn": 1024, "experts": 16, "block": 256,
    },
    "minimax-text-01": {
        "hidden": 6144, "layers": 80, "heads": 64, "kv_heads": 8, "head_dim": 128, "rotary_dim": 64,
        "ffn": 9216, "experts": 32, "block": 256,
    },
}  # fmt: skip


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """The decoder's sizes. The vocabulary comes from the shards, context and RoPE base from the stage."""

    preset: Literal["tiny", "small", "h100", "minimax-text-01"] = Field(
        default="tiny", description="sizes to start from"
    )
    hidden: int = Field(default=64, gt=0, description="width of the residual stream")
    layers: int = Field(default=8, gt=0, description="decoder layers")
    softmax_every: int = Field(
        default=8, gt=0, description="every n-th layer has softmax attention, the others lightning"
    )
    heads: int = Field(default=2, gt=0, description="query heads")
    kv_heads: int = Field(default=1, gt=0, description="key/value heads of the softmax layers")
    head_dim: int = Field(default=32, gt=0, description="size of one head")
    rotary_dim: int = Field(default=16, ge=0, description="dimensions of a head that RoPE rotates (softmax layers)")
    ffn: int = Field(default=64, gt=0, description="inner width of one expert")
    experts: int = Field(default=4, gt=0, description="experts per layer")
    top_k: int = Field(default=2, gt=0, description="experts that each token uses")
    routing_group: int = Field(
        default=1, gt=0, description="sequences in a row that share expert capacity and balance loss"
    )
    capacity: Literal["none", "group", "ep_group"] = Field(
        default="none",
        description="what shares an expert's capacity: none (no token is dropped), a routing group, or ep_group: all "
        "that expert-parallel groups hold at one time (the paper's global router; it depends on the mesh)",
    )
    capacity_factor: float = Field(
        default=1.25, gt=0, description="an expert's capacity, in units of its even share of the assignments"
    )
    aux_loss: float = Field(default=0.01, ge=0, description="weight of the experts' balance loss")
    block: int = Field(default=64, gt=0, description="tokens that lightning attention handles with one matrix product")
    norm_eps: float = Field(default=1e-5, gt=0, description="epsilon of the RMS norms")
    lightning_norm_eps: float = Field(default=1e-6, gt=0, description="epsilon of the norm inside lightning attention")

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        return PRESETS.get(values.get("preset", "tiny"), {}) | values if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim ({self.rotary_dim}) must be even and at most head_dim ({self.head_dim})")
        if self.top_k > self.experts:
            raise ValueError(f"top_k ({self.top_k}) must be at most experts ({self.experts})")
        return self

    def is_softmax(self, layer: int) -> bool:
        return (layer + 1) % self.softmax_every == 0


class Phase(Section):
    """A stretch of a stage's learning rate: from where the phase before it ended (at first: 0) to `lr`.

    It lasts `share` of the stage's planned tokens, or `tokens`; the one phase that says neither takes what is left.
    """

    share: float | None = Field(default=None, gt=0, le=1, description="share of the stage's planned tokens")
    tokens: int | None = Field(default=None, gt=0, description="tokens that the phase lasts")
    lr: float = Field(ge=0, description="learning rate at the end of the phase")
    shape: Literal["linear", "cosine", "exponential", "constant"] = Field(
        default="linear", description="the way there; constant: the rate is lr from the phase's first token on"
    )

    @model_validator(mode="after")
    def _one_length(self) -> "Phase":
        if self.share is not None and self.tokens is not None:
            raise ValueError(f"a phase has a share ({self.share:g}) or tokens ({self.tokens}), not both; drop one")
        return self


Schedule = tuple[Phase, ...]


class OptimizerConfig(Section):
    """AdamW. Norm weights do not decay."""

    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="decay of the two moments")
    eps: float = Field(default=1e-8, gt=0, description="epsilon of the update")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled weight decay of the matrices")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")


class ParallelConfig(Section):
    """How the processes share the work: their number is dp_replicate x dp_shard x cp."""

    dp_replicate: int = Field(default=1, gt=0, description="copies of the sharded model (HSDP)")
    dp_shard: int = Field(
        default=0, ge=0, description="data-parallel ranks that share out one model's weights (FSDP2); 0: all there are"
    )
    cp: int = Field(default=1, gt=0, description="ranks that share one sequence's tokens (context parallelism)")
    cp_attention: Literal["gather", "ring"] = Field(
        default="gather",
        description="how softmax layers see other ranks' keys: all gathered, or passed from rank to rank (less memory)",
    )
    ep: int = Field(
        default=1, gt=0, description="ranks, out of dp_shard x cp, that share out the experts (expert parallelism)"
    )


class TrainConfig(Section):
    """Everything that decides what is trained, and how."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="the decoder")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW")
    batch_tokens: int = Field(default=4096, gt=0, description="tokens of one optimiser step over all workers")
    batch_marks: dict[int, int] = Field(
        default={}, description="tokens seen over all stages -> batch_tokens from there on (batch-size warm-up)"
    )
    micro_tokens: int = Field(default=32768, gt=0, description="most tokens of one forward pass on one worker")
    schedule: Schedule = Field(
        default=(Phase(share=0.1, lr=7e-3), Phase(share=0.9, lr=7e-4, shape="cosine")),
        description="learning rate over a stage, as phases; the default suits the preset tiny",
    )  # fmt: skip
    stages: dict[str, Schedule] = Field(default={}, description="schedules of single stages, where not the default")
    seed: int = Field(default=0, description="decides the initial weights")
    weights: str | None = Field(
        default=None, description="a directory of a MiniMax decoder (config.json, safetensors) to start from instead"
    )
    evaluate_tokens: int = Field(
        default=65536, ge=0, description="held-out tokens to evaluate on after each stage; 0: none"
    )
    evaluate_needles: int = Field(
        default=1, ge=0, description="needles and keys to look for at each length and depth, after each stage; 0: none"
    )
    max_skipped: int = Field(
        default=10, ge=0, description="steps of a stage that may be skipped for a loss or gradient that is not finite"
    )
    spike: float = Field(
        default=6.0,
        gt=0,
        description="deviations above the mean of 100 steps from which a loss is logged as a spike",
    )
    quarantined: Literal["stop", "mask"] = Field(
        default="stop", description="at sequences in quarantine (jobs/shards.py): stop, or go on, with them masked"
    )
    export: bool = Field(default=True, description="write the last stage's model for transformers")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="the processes' mesh")
    workers: int = Field(default=1, gt=0, description="training processes")
    cpus_per_worker: float = Field(
        default=0, ge=0, description="CPUs that Ray sets aside per worker; 0: it runs beside whatever else they do"
    )
    threads: int = Field(default=0, ge=0, description="torch threads per process; 0: torch's choice")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where to train")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        default="float32", description="of the computation; the weights stay float32, or float64 with float64"
    )
    checkpointing: Literal["none", "selective", "full"] = Field(
        default="none",
        description="activations of a layer to compute again in the backward pass: none, all but those of matrix "
        "products and attention, or all",
    )
    compile: bool = Field(default=False, description="compile every layer with torch.compile")
    peak_tflops: float | None = Field(
        default=None, gt=0, description="a device's peak, for the MFU; null: known for A100, H100, H200, B200"
    )
    checkpoint_steps: int = Field(default=100, gt=0, description="steps between two checkpoints")
    keep: int = Field(default=2, gt=0, description="checkpoints to keep while a stage runs")
    keep_every: int | None = Field(
        default=None, gt=0, description="milestones: checkpoints at multiples of this many steps are kept for ever"
    )

    @field_validator("schedule", "stages")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        for phases in value.values() if isinstance(value, dict) else [value]:
            rest = sum(p.share is None and p.tokens is None for p in phases)
            total = sum(p.share or 0 for p in phases)
            if not phases or rest > 1:
                raise ValueError(f"{rest or 'no'} phases without share or tokens: it may have one such")
            if total > 1 + 1e-6 or (all(p.share for p in phases) and total < 1 - 1e-6):
                raise ValueError(f"the shares of a schedule's phases are {total:g} together; they must make 1")
            starts = [0.0, *(p.lr for p in phases)]
            if any(p.shape == "exponential" and 0 in (a, p.lr) for a, p in zip(starts, phases, strict=False)):
                raise ValueError("an exponential phase cannot start or end at a learning rate of 0")
        return value

    @model_validator(mode="after")
    def _marks(self) -> "TrainConfig":
        if any(mark <= 0 or tokens <= 0 for mark, tokens in self.batch_marks.items()):
            raise ValueError(f"batch_marks is {self.batch_marks}: tokens seen and tokens of a batch must be above 0")
        if self.compile and self.device == "cuda" and self.dtype != "bfloat16":
            raise ValueError(
                f"compile on cuda needs dtype bfloat16, not {self.dtype}: its packed attention has no other"
            )
        if self.parallel.cp_attention == "ring" and self.device == "cuda" and self.dtype != "bfloat16":
            raise ValueError(f"parallel.cp_attention ring on cuda needs dtype bfloat16, not {self.dtype}")
        if self.keep_every and self.keep_every % self.checkpoint_steps:
            raise ValueError(
                f"keep_every is {self.keep_every}: no multiple of checkpoint_steps ({self.checkpoint_steps}), so "
                "none of its steps would be saved"
            )
        return self

    def identity(self, plan: str) -> str:
        """12 digits that name a training run; the same however often it is saved and on whatever workers it runs."""
        how = {
            "parallel", "workers", "cpus_per_worker", "threads", "device", "micro_tokens", "checkpoint_steps", "keep",
            "keep_every", "export", "compile", "checkpointing", "peak_tflops", "spike", "max_skipped",
            "evaluate_needles", "quarantined",
        }  # fmt: skip
        return fingerprint([self.model_dump(mode="json", exclude=how), plan])[:12]
