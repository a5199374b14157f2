"""The `train:` section of the configuration: model, optimiser, schedule, batch. Does not import torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

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

    preset: Literal["tiny", "small", "h100", "minimax-text-01"] = Field("tiny", description="sizes to start from")
    hidden: int = Field(64, gt=0, description="width of the residual stream")
    layers: int = Field(8, gt=0, description="decoder layers")
    softmax_every: int = Field(8, gt=0, description="every n-th layer has softmax attention, the others lightning")
    heads: int = Field(2, gt=0, description="query heads")
    kv_heads: int = Field(1, gt=0, description="key/value heads of the softmax layers")
    head_dim: int = Field(32, gt=0, description="size of one head")
    rotary_dim: int = Field(16, ge=0, description="dimensions of a head that RoPE rotates (softmax layers)")
    ffn: int = Field(64, gt=0, description="inner width of one expert")
    experts: int = Field(4, gt=0, description="experts per layer")
    top_k: int = Field(2, gt=0, description="experts that each token uses")
    routing_group: int = Field(1, gt=0, description="sequences in a row that share expert capacity and balance loss")
    capacity: Literal["none", "group", "ep_group"] = Field(
        "none",
        description="what shares an expert's capacity: none (no token is dropped), a routing group, or ep_group: all "
        "that expert-parallel groups hold at one time (the paper's global router; it depends on the mesh)",
    )
    capacity_factor: float = Field(1.25, gt=0, description="an expert's capacity, in even shares of the assignments")
    aux_loss: float = Field(0.01, ge=0, description="weight of the experts' balance loss")
    block: int = Field(64, gt=0, description="tokens that lightning attention handles with one matrix product")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the RMS norms")
    lightning_norm_eps: float = Field(1e-6, gt=0, description="epsilon of the norm inside lightning attention")

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

    share: float | None = Field(None, gt=0, le=1, description="share of the stage's planned tokens")
    tokens: int | None = Field(None, gt=0, description="tokens that the phase lasts")
    lr: float = Field(ge=0, allow_inf_nan=False, description="learning rate at the end of the phase")
    shape: Literal["linear", "cosine", "exponential", "constant"] = Field(
        "linear", description="the way there; constant: the rate is lr from the phase's first token on"
    )

    @model_validator(mode="after")
    def _one_length(self) -> "Phase":
        if self.share is not None and self.tokens is not None:
            raise ValueError(f"a phase has a share ({self.share:g}) or tokens ({self.tokens}), not both; drop one")
        return self


Schedule = tuple[Phase, ...]


class OptimizerConfig(Section):
    """AdamW. Norm weights do not decay."""

    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of the two moments")
    eps: float = Field(1e-8, gt=0, description="epsilon of the update")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of the matrices")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")


class ParallelConfig(Section):
    """How the processes share the work: their number is dp_replicate x dp_shard x cp."""

    dp_replicate: int = Field(1, gt=0, description="copies of the sharded model (HSDP)")
    dp_shard: int = Field(0, ge=0, description="ranks that share out one model's weights (FSDP2); 0: all there are")
    cp: int = Field(1, gt=0, description="ranks that share one sequence's tokens (context parallelism)")
    cp_attention: Literal["gather", "ring"] = Field(
        "gather", description="how softmax layers see other ranks' keys: all gathered, or passed on (less memory)"
    )
    ep: int = Field(1, gt=0, description="ranks, out of dp_shard x cp, that share out the experts")
    etp: int = Field(1, gt=0, description="ranks that share out each expert's width; ep x etp out of dp_shard x cp")


class TrainConfig(Section):
    """Everything that decides what is trained, and how."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="the decoder")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW")
    batch_tokens: int = Field(4096, gt=0, description="tokens of one optimiser step over all workers")
    batch_marks: dict[PositiveInt, PositiveInt] = Field(
        {}, description="tokens seen over all stages -> batch_tokens from there on"
    )
    micro_tokens: int = Field(32768, gt=0, description="most tokens of one forward pass on one worker")
    schedule: Schedule = Field(
        (Phase(share=0.1, lr=7e-3), Phase(share=0.9, lr=7e-4, shape="cosine")),
        description="learning rate over a stage, as phases; the default suits the preset tiny",
    )
    stages: dict[str, Schedule] = Field({}, description="schedules of single stages, where not the default")
    seed: int = Field(0, description="decides the initial weights")
    weights: str | None = Field(None, description="directory of a MiniMax decoder to start from (docs/trainer.md)")
    shards: str | None = Field(None, description="root of packed shards, any URL (`python -m trainer`)")
    quarantined: Literal["stop", "mask"] = Field(
        "stop", description="at sequences in quarantine (jobs/shards.py): stop, or go on, with them masked"
    )
    evaluate_tokens: int = Field(65536, ge=0, description="held-out tokens to evaluate on after each stage; 0: none")
    evaluate_needles: int = Field(1, ge=0, description="needles and keys at each length and depth of an evaluation")
    max_skipped: int = Field(10, ge=0, description="most steps of a stage with a loss or gradient that is not finite")
    spike: float = Field(6.0, gt=0, description="a spike: a loss so many deviations above the mean of 100 steps")
    export: bool = Field(True, description="write the last stage's model for transformers")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="the processes' mesh")
    workers: int = Field(1, gt=0, description="training processes")
    cpus_per_worker: float = Field(0, ge=0, description="CPUs Ray sets aside per worker; 0: it shares what others use")
    threads: int = Field(0, ge=0, description="torch threads per process; 0: torch's choice")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where to train")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        "float32", description="of the computation; the weights stay float32, or float64 with float64"
    )
    checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations of a layer to compute again in the backward pass: none, all but those of matrix "
        "products and attention, or all but softmax attention's",
    )
    compile: bool = Field(False, description="compile every layer with torch.compile")
    peak_tflops: float | None = Field(
        None, gt=0, description="a device's peak, for the MFU; null: known for A100, H100, H200, B200"
    )
    checkpoint_steps: int = Field(100, gt=0, description="steps between two checkpoints")
    keep: int = Field(2, gt=0, description="checkpoints to keep while a stage runs")
    keep_every: int | None = Field(None, gt=0, description="milestones: multiples of so many steps are kept for ever")

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
    def _consistent(self) -> "TrainConfig":
        if self.compile and self.device == "cuda" and self.dtype != "bfloat16":
            raise ValueError(f"compile on cuda needs dtype bfloat16, not {self.dtype}: packed attention has no other")
        if self.parallel.cp_attention == "ring" and self.device == "cuda" and self.dtype != "bfloat16":
            raise ValueError(f"parallel.cp_attention ring on cuda needs dtype bfloat16, not {self.dtype}")
        if self.keep_every and self.keep_every % self.checkpoint_steps:
            raise ValueError(f"keep_every ({self.keep_every}) must be a multiple of checkpoint_steps")
        return self

    def identity(self, plan: str) -> str:
        """12 digits that name a training run; the same however often it is saved and on whatever workers it runs."""
        what = {"model", "optimizer", "batch_tokens", "batch_marks", "schedule", "stages", "seed", "weights", "dtype"}
        return fingerprint([self.model_dump(mode="json", include=what), plan])[:12]
