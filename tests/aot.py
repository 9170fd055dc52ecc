"""Compile every Triton kernel for real devices on a machine that has none; tell what comes of it.

    python tests/aot.py                             the table of all configurations on all targets
    python tests/aot.py --write kernels/README.md   put it between the marks in that file

A configuration is a set of tile and launch parameters that a launcher can choose, with the options
that need most registers. For each: shared memory, registers, spills, and whether the matrix
products became tensor-core instructions.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script it is run from tests/

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
    """Those of log_sum_loss, with the types of an autocast user's tensors; see configurations.

    All of them for fp32 tensors under bf16 autocast, which need most shared memory; for other types
    the largest and the most used.
    """
    from kernels import logsum_triton as logsum

    both = {"ALPHA": 4.0, "NORMALIZE": "both", "scale": None, "shift": None}
    affine = {"ALPHA": 2.5, "NORMALIZE": "student-affine"}
    found = []  # kernel, label, parameters, types, whether it multiplies
    for operand, of_rows, of_weight, sizes in (  # types of products, student and teacher, weight
        (torch.bfloat16, "fp32", "fp32", (16, 32, 64, 128, 256)),
        (torch.bfloat16, "bf16", "fp32", (32, 256)),
        (torch.float16, "fp16", "fp16", (32, 256)),
        (torch.float32, "fp32", "fp32", (32, 256)),
    ):
        name = logsum._TYPES[operand].name
        case = f"{name}, rows {of_rows}, weight {of_weight}"
        common = {"OPERAND": logsum._TYPES[operand], "SLICE": logsum.SLICE, "stride_wf": 1}
        common |= {"SHARE": logsum.SHARE, "SHARES": 4, "NEED_GRAD": True}
        types = {x: f"*{of_rows}" for x in ("student", "teacher", "d_student")}
        types |= {x: f"*{of_weight}" for x in ("weight", "d_weight")}
        types |= {"start": "i32", "tiles": "i32", "eps": "fp32", "norm_eps": "fp32"}
        for rows in sizes:
            label, few = f"{case}, {rows} rows", common | both
            for kernel in ("fused_forward", "shares", "gradients"):
                config = getattr(logsum, f"{kernel}_config")(rows, operand)
                if kernel == "fused_forward" or rows <= 64:
                    found.append((kernel, label, few | config, types))
        # many rows: weight and gradient have the type of the products, d_weight is added up in fp32
        many = common | logsum.tiled_config(8192, operand, kind) | {"SHARES": 0}
        types = types | {x: f"*{name}" for x in ("weight", "grad_y", "out")} | {"d_weight": "*fp32"}
        found.append(("gradients", f"{case}, many rows", many, types))
        few = common | logsum.tiled_config(2048, operand, kind) | both | {"STAGE": "gradient"}
        found.append(("sweep", f"{case}, gradient, 2,048 rows", few, types))
        if len(sizes) == 2:
            found.append(("sweep", f"{case}, gradient", many | both | {"STAGE": "gradient"}, types))
        else:
            linear = common | affine | {"stride_wi": 1} | logsum.fused_forward_config(32, operand)
            del linear["stride_wf"]
            found.append(("fused_forward", f"{case}, affine, nn.Linear's layout", linear, types))
            flags = many | affine | {"STAGE": "gradient", "SLICE": logsum.SLICE // 2}
            found.append(("sweep", f"{case}, gradient, affine", flags, types))
            for stage in ("moments", "loss"):
                flags = many | both | {"STAGE": stage}
                found.append(("sweep", f"{case}, {stage}", flags, types | {"out": "*fp32"}))
    found.append(("merge", "", {"ROWS": 128, **logsum.BLOCK}, types))
    found.append(("sums", "", {"ALPHA": 4.0, **logsum.BLOCK}, types))
    for kernel, label, parameters, types in found:
        function = getattr(logsum, f"{kernel}_kernel")
        names = (*function.arg_names, "num_warps", "num_stages")
        parameters = {name: value for name, value in parameters.items() if name in names}
        cores = parameters.get("OPERAND", logsum._TYPES[torch.float32]).name != "fp32"
        yield kernel, label, function, parameters, types, cores


def cka_configurations(kind: str):
    """Those of cka, alike for every kind of device; see configurations."""
    from kernels import cka_triton

    yield "sums", "", cka_triton.sums_kernel, cka_triton.SUMS, {}, False
    centre = {**cka_triton.CENTRE, "SHARES": cka_triton.SHARES}
    yield "centre", "", cka_triton.centre_kernel, centre, {}, False


def knn_configurations(kind: str):
    """Those of knn; see configurations."""
    from kernels import knn_triton

    types = {x: "*i32" for x in ("labels", "groups", "bits", "candidates", "listed")}
    types |= {"distances": "*fp64", "indices": "*i64"}
    for bound, label in ((True, "bound"), (False, "bits")):
        for columns in (16, 32, 64, 128, 1536):  # of a table
            parameters = {**knn_triton.screen_config(columns, kind), "BOUND": bound, "MASK": True}
            widest = columns - knn_triton.EXTRA
            yield (
                "screen",
                f"{label}, D {'<= ' if columns <= 128 else ''}{widest}",
                knn_triton.screen_kernel,
                parameters,
                types | {"out": "*fp32" if bound else "*i32"},
                True,
            )
    yield "list", "", knn_triton.list_kernel, knn_triton.list_config(8), types, False
    for k in (16, 32, 64):
        parameters = {**knn_triton.rescan_config(k), "COSINE": True}
        yield "rescan", f"k <= {k}", knn_triton.rescan_kernel, parameters, types, False


def configurations(target: str):
    """Yield (kernel, label, jitted function, parameters, argument types, needs tensor cores).

    Parameters are those that the launchers choose on that target, argument types only those that
    are not *fp32 or i32.
    """
    kind = {"gfx942": "hip", "sm_90": "hopper"}.get(target, "cuda")
    yield from logsum_configurations(kind)
    yield from cka_configurations(kind)
    yield from knn_configurations(kind)


def compiled(target: str, function, parameters: dict, types: dict) -> dict:
    """Compile one configuration for a target.

    -> shared memory in bytes, warps, registers, spills (bytes; on AMD registers) and code.
    """
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
                r"rows|height|inner|features|width|count|stride|chunk|k$|weight_programs", name
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
    counts = dict(re.findall(r"\.(\w+_count):\s+(\d+)", code))
    spills = int(counts["vgpr_spill_count"]) + int(counts["sgpr_spill_count"])
    return result | {"code": code, "registers": int(counts["vgpr_count"]), "spills": spills}


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
        "`python tests/aot.py --write kernels/README.md`. Each cell: shared memory in KiB / "
        "registers of a thread / spills; `tc` where the products are tensor-core instructions.",
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
        prog="python tests/aot.py", description=__doc__.splitlines()[0]
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
