"""Compiles every Triton kernel for an H100 without having one, and prints what each needs."""

from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import experts, gated_norm, permute, rotary
from kernels import lightning_attention as lightning

TYPES = {
    "*bf16": "a b c out raw left right x y gate grad dx d_gate gate_up d_gate_up q k q_out k_out",
    "*fp32": "state slopes weight sums dots cos sin",
    "*i32": "table scans",
    "*i64": "place order kind count before total",
    "fp32": "eps",
}
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names.split()}


def compiled(function, warps: int = 4, stages: int = 3, **constants):
    names = function.arg_names
    types = {n: "constexpr" if n in constants else TYPE_OF.get(n, "i32") for n in names}
    aligned = [i for i, n in enumerate(names) if types[n].startswith("*") or n[-2:] in ("_t", "_h") or n == "width"]
    source = ASTSource(
        function,
        types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return build(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})


def lightning_kernels():
    forward = {"SILU_A": True, "SILU_B": True, "SILU_C": True, "SILU_GRAD": False, "REVERSE": False}
    backward = {"SILU_A": True, "SILU_B": False, "SILU_C": True, "SILU_GRAD": True, "REVERSE": True}
    both = {"SILU_LEFT": True, "SILU_RIGHT": True}
    for size in (64, 128):
        shape = {"N": size, "WIDTH": 64, "CHUNK": lightning.CHUNK}
        yield f"attend {size}", compiled(lightning._attend_kernel, 4, 2, **shape, **forward)
        yield f"attend {size}, reverse", compiled(lightning._attend_kernel, 4, 2, **shape, **backward)
        yield f"local {size}", compiled(lightning._local_kernel, **shape, **both, REVERSE=False)
    yield "scan", compiled(lightning._scan_kernel, TILE=lightning.SCAN_TILE, REVERSE=False)


def layer_kernels():
    """At the sizes of the preset h100, and the norm also at those of minimax-text-01."""
    for width in (1024, 8192):
        block, warps = gated_norm.shape(width)
        yield f"norm {width}", compiled(gated_norm._forward_kernel, warps, BLOCK=block)
        yield f"norm {width}, reverse", compiled(gated_norm._backward_kernel, warps, BLOCK=block)
    for weighted in (False, True):
        sizes = {"WEIGHTED": weighted, "A": 2, "BLOCK": 1024}
        yield f"spread, weighted {weighted}", compiled(permute._spread_kernel, **sizes)
        yield f"combine, weighted {weighted}", compiled(permute._combine_kernel, **sizes)
    table = {"BLOCK": permute.COUNTED // 32, "COLUMNS": 32}
    yield "count", compiled(permute._count_kernel, **table)
    yield "place", compiled(permute._place_kernel, **table)
    yield "swiglu", compiled(experts._swiglu_kernel, BLOCK=experts.BLOCK)
    yield "swiglu, reverse", compiled(experts._swiglu_backward_kernel, BLOCK=experts.BLOCK)
    yield "clear", compiled(experts._clear_kernel, ROWS=experts.ROWS, BLOCK=128)
    turn = {"N": 128, "HALF": 32, "TURNED": 32, "REST": 64, "TOKENS": rotary.TOKENS}
    yield "rotate", compiled(rotary._rotate_kernel, **turn, BACK=True)


def main() -> None:
    for name, made in (*lightning_kernels(), *layer_kernels()):
        wgmma, wide = (made.asm["ptx"].count(word) for word in ("wgmma.mma_async", ".v4.b32"))
        print(f"{name}: shared memory {made.metadata.shared}, wgmma {wgmma}, 16-byte accesses {wide}", flush=True)


if __name__ == "__main__":
    main()
