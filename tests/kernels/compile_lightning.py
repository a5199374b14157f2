"""Compiles the lightning kernels for an H100 without having one, and prints what each needs."""

from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import lightning_attention as kernel

TYPES = {"state": "*fp32", "slopes": "*fp32", "table": "*i32", "scans": "*i32"}
DATA = ("a", "b", "c", "out", "raw", "left", "right")


def compiled(function, warps: int, stages: int = 3, **constants):
    names = function.arg_names
    types = {n: "constexpr" if n in constants else TYPES.get(n, "*bf16" if n in DATA else "i32") for n in names}
    aligned = [i for i, n in enumerate(names) if types[n].startswith("*") or n[-2:] in ("_t", "_h")]
    source = ASTSource(
        function,
        types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return build(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})


def main() -> None:
    for size in (64, 128):
        shape = {"N": size, "WIDTH": 64, "CHUNK": kernel.CHUNK}
        forward = {"SILU_A": True, "SILU_B": True, "SILU_C": True, "SILU_GRAD": False, "REVERSE": False}
        backward = {"SILU_A": True, "SILU_B": False, "SILU_C": True, "SILU_GRAD": True, "REVERSE": True}
        both = {"SILU_LEFT": True, "SILU_RIGHT": True}
        for name, made in {
            "attend": compiled(kernel._attend_kernel, 4, 2, **shape, **forward),
            "attend, reverse": compiled(kernel._attend_kernel, 4, 2, **shape, **backward),
            "local": compiled(kernel._local_kernel, 4, **shape, **both, REVERSE=False),
            "scan": compiled(kernel._scan_kernel, 4, TILE=kernel.SCAN_TILE, REVERSE=False),
        }.items():
            wgmma = made.asm["ptx"].count("wgmma.mma_async")
            print(f"N {size}: {name}: {made.metadata.shared} bytes of shared memory, {wgmma} wgmma", flush=True)


if __name__ == "__main__":
    main()
