"""Compile every Triton kernel for real devices on a machine that has none, and tell what the compilers made of it.

    python -m kernels.aot                       the table of all configurations on all targets
    python -m kernels.aot --write kernels/README.md      put it between the marks in that file

A configuration is a set of tile and launch parameters that a launcher can choose, with the options that need most
registers. For each: shared memory, registers, spills, and whether the matrix products became tensor-core instructions.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

# name: (backend, architecture, lanes of a warp, bytes of shared memory that one program may use)
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_86": ("cuda", 86, 32, 99 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
TENSOR_CORES = re.compile(r"wgmma|mma\.sync|v_mfma")
BEGIN, END = "<!-- aot: begin -->", "<!-- aot: end -->"


def logsum_configurations(kind: str):
    """Those of log_sum_loss, with the types of an autocast user's tensors; see configurations."""
    from kernels import logsum_triton as logsum

    both = {"ALPHA": 4.0, "NORMALIZE": "both", "scale": None, "shift": None}
    affine = {"ALPHA": 2.5, "NORMALIZE": "student-affine", "NEED_GRAD": True}
    found = []  # kernel, label, parameters, types, whether it multiplies
    for operand, of_rows, of_weight in (  # types of products, of student and teacher, of weight
        ("bf16", "fp32", "fp32"),
        ("bf16", "bf16", "fp32"),
        ("fp16", "fp16", "fp16"),
        ("fp32", "fp32", "fp32"),
    ):
        case = f"{operand} of {of_rows} rows, {of_weight} weight"
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[operand]
        common = {"OPERAND": logsum._TYPES[dtype], "SLICE": logsum.SLICE}
        common |= {"SHARE": logsum.SHARE, "SHARES": 4, "NEED_GRAD": True, "stride_wf": 1}
        types = {x: f"*{of_rows}" for x in ("student", "teacher", "d_student")}
        types |= {x: f"*{of_weight}" for x in ("weight", "d_weight")}
        types |= {"start": "i32", "tiles": "i32", "eps": "fp32", "norm_eps": "fp32"}
        cores = operand != "fp32"
        for rows in (16, 32, 64, 128, 256):
            label, few = f"{case}, {rows} rows", common | both
            forward = few | logsum.fused_config(rows, dtype)
            found.append(("fused_forward", label, forward, types, cores))
            if rows <= 64:
                shares = few | logsum.shares_config(rows, dtype)
                gradients = few | logsum.gradients_config(rows, dtype)
                found.append(("shares", label, shares, types, cores))
                found.append(("gradients", label, gradients, types, cores))
        label = f"{case}, 32 rows, affine, alpha 2.5, nn.Linear's layout"
        linear = common | affine | {"stride_wi": 1} | logsum.fused_config(32, dtype)
        del linear["stride_wf"]
        found.append(("fused_forward", label, linear, types, cores))
        # many rows: weight and gradient have the type of the products, d_weight is added up in fp32
        many = common | logsum.tiled_config(dtype) | {"SHARES": 0}
        types = types | {x: f"*{operand}" for x in ("weight", "grad_y")} | {"d_weight": "*fp32"}
        found.append(("gradients", f"{case}, many rows", many, types, cores))
        for stage in ("moments", "loss", "gradient"):
            out = {"out": f"*{operand}"} if stage == "gradient" else {}
            for options in (both, affine):
                label = f"{case}, {stage}, {options['NORMALIZE']}"
                flags = many | options | {"STAGE": stage}
                found.append(("sweep", label, flags, types | out, cores))
    found.append(("merge", "", {"ROWS": 128, **logsum.BLOCK}, types, False))
    found.append(("sums", "", {"ALPHA": 4.0, **logsum.BLOCK}, types, False))
    for kernel, label, parameters, types, cores in found:
        function = getattr(logsum, f"{kernel}_kernel")
        names = (*function.arg_names, "num_warps", "num_stages")
        parameters = {name: value for name, value in parameters.items() if name in names}
        yield kernel, label, function, parameters, types, cores


def cka_configurations(kind: str):
    """Those of cka, alike for every kind of device; see configurations."""
    from kernels import cka_triton

    yield "centre", "", cka_triton.centre_kernel, cka_triton.CONFIG, {"mean": "*fp64"}, False


def knn_configurations(kind: str):
    """Those of knn; see configurations."""
    from kernels import knn_triton

    types = {x: "*i64" for x in ("order", "query_groups", "base_groups", "groups", "indices")}
    types |= {
        "sets": "*i32",
        "spans": "*i32",
        "redo": "*i8",
        "units": "*fp64",
        "distances": "*fp64",
    }
    for k, label in ((8, "k <= 8"), (24, "k <= 24"), (64, "k > 24")):
        for width in (16, 32, 64, 1536):
            yield (
                "screen",
                f"{label}, D {'> 64' if width > 64 else f'<= {width}'}",
                knn_triton.screen_kernel,
                {**knn_triton.screen_config(k, width, kind), "MASK": True},
                types,
                True,
            )
    rows = {
        "ROWS": knn_triton.screen_config(64, 64, kind)["ROWS"],
        "MASK": True,
        "COSINE": True,
    }
    for k in (8, 24, 56, 64):
        rescan = {**rows, **knn_triton.rescan_config(k)}
        yield "rescan", f"k <= {k}", knn_triton.rescan_kernel, rescan, types, False
    for k in (16, 32, 64):
        yield (
            "redo",
            f"k <= {k}",
            knn_triton.redo_kernel,
            {**rows, **knn_triton.redo_config(k)},
            types,
            False,
        )


def configurations(target: str):
    """Yield (kernel, label, jitted function, parameters, argument types, whether it must use tensor cores).

    Parameters are those that the launchers choose on that target, argument types only those that are not *fp32 or i32.
    """
    kind = {"gfx942": "hip", "sm_90": "hopper"}.get(target, "cuda")
    yield from logsum_configurations(kind)
    yield from cka_configurations(kind)
    yield from knn_configurations(kind)


def compiled(target: str, function, parameters: dict, types: dict) -> dict:
    """Compile one configuration for a target -> shared (bytes), registers, spills (bytes; registers on AMD), code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, architecture, lanes, _ = TARGETS[target]
    options = {
        name: value
        for name, value in parameters.items()
        if name.startswith("num_") or name == "maxnreg"
    }
    constants = {name: value for name, value in parameters.items() if name not in options}
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        else:
            whole = re.match(
                r"rows|inner|features|width|count|stride|chunk|queries|k$|weight_programs", name
            )
            signature[name] = "*fp32" if not whole else "i32"
        if name.startswith("stride") and name[-1] in "kn" and name != "stride_wk":
            signature[name], constants = (
                "constexpr",
                constants | {name: 1},
            )  # contiguous, as the launcher will see it
        elif (
            signature[name].startswith("*")
            or name.startswith("stride")
            or name in ("inner", "features")
        ):
            attributes[(place,)] = [["tt.divisibility", 16]]
    named = {(function.arg_names.index(name),): value for name, value in constants.items()}
    kernel = triton.compile(
        ASTSource(function, signature, named, attributes),
        target=GPUTarget(backend, architecture, lanes),
        options=options,
    )
    result = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    if backend == "cuda":
        return result | {"code": kernel.asm["ptx"]} | _cubin_usage(kernel.asm["cubin"])
    code = kernel.asm["amdgcn"]
    number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", code)[1])  # noqa: E731
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return result | {"code": code, "registers": number("vgpr_count"), "spills": spills}


def _cubin_usage(cubin: bytes) -> dict:
    """Registers and local memory of a compiled kernel by cuobjdump, which comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", output.stdout))
    return {"registers": int(usage["REG"]), "spills": int(usage["STACK"]) + int(usage["LOCAL"])}


def table() -> str:
    """Markdown: a row for each configuration, a column for each target."""
    import triton

    lines = [
        f"Triton {triton.__version__}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}, "
        "`python -m kernels.aot --write kernels/README.md`. Each cell: shared memory in KiB / registers of "
        "a thread / spills; `tc` where the products are tensor-core instructions.",
        "",
        f"| kernel | configuration | {' | '.join(TARGETS)} |",
        f"|---|---|{'---|' * len(TARGETS)}",
    ]
    for rows in zip(*(configurations(target) for target in TARGETS), strict=True):
        cells = []
        for target, (_, _, function, parameters, types, _) in zip(TARGETS, rows, strict=True):
            made = compiled(target, function, parameters, types)
            cells.append(
                f"{made['shared'] / 1024:.0f} / {made['registers']} / {made['spills']}"
                f"{' tc' if TENSOR_CORES.search(made['code']) else ''}"
            )
        lines.append(f"| {rows[0][0]} | {rows[0][1]} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.aot", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="Markdown file whose marked part the table replaces",
    )
    args = parser.parse_args()
    text = table()
    if args.write is None:
        print(text)
        return 0
    before, _, rest = args.write.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    args.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
