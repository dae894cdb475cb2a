"""What `python -m benchmarks sass` reads from machine code is there, and the CUDA kernels keep its limits."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sass
from benchmarks.suites import OPS
from segops.backend import build_info

from ..targets import only_on_cpu

REPOSITORY = Path(__file__).parents[2]


def parse(lines):
    """The code of a kernel of these lines, labels or instructions at 0x0, 0x10 and so on."""
    listing, address = ".text._Z6kernelv:\n", 0
    for line in lines.strip().splitlines():
        is_label = line.endswith(":")
        listing += f"{line.strip()}\n" if is_label else f"        /*{address:04x}*/                   {line.strip()} ;\n"
        address += 0 if is_label else 16
    return sass.parse(listing)["_Z6kernelv"]


def found(code):
    """The addresses at which loops and innermost loops begin and end."""
    loops = sass.loops(code)
    return [[(code[first].address, code[last].address) for first, last in each] for each in (loops, sass.innermost(loops))]


NESTED = """
.L_x_0:
    MOV R0, RZ
.L_x_1:
    IADD3 R0, R0, 0x1, RZ
    @P0 BRA `(.L_x_1)
    @!P1 BRA P2, `(.L_x_2)
.L_x_3:
    IADD3 R0, R0, 0x1, RZ
    @P0 BRA `(.L_x_3)
.L_x_2:
    @P1 BRA `(.L_x_0)
    EXIT
"""
TRAP = """
    @P0 EXIT
    EXIT
.L_x_0:
    BRA `(.L_x_0)
    NOP
"""
# A shuffle of a warp whose threads have parted lies behind the end, and returns.
MOVED = """
.L_x_0:
    FADD R0, R0, R1
    BRA.DIV UR4, `(.L_x_1)
    SHFL.BFLY PT, R1, R0, 0x1, 0x1f
.L_x_2:
    @P0 BRA `(.L_x_0)
    EXIT
.L_x_1:
    WARPSYNC.COLLECTIVE R2, `(.L_x_3)
.L_x_3:
    SHFL.BFLY P0, R1, R0, R4, R5
    BRA `(.L_x_2)
"""
SWITCH = """
.L_x_0:
    BRX R2 -0x160                    (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)
.L_x_1:
    BRA `(.L_x_3)
.L_x_2:
    BRA `(.L_x_3)
.L_x_3:
    @P0 BRA `(.L_x_0)
    EXIT
"""


@pytest.mark.parametrize(
    "code, loops, innermost",
    [
        (NESTED, [(0x00, 0x60), (0x10, 0x20), (0x40, 0x50)], [(0x10, 0x20), (0x40, 0x50)]),
        (TRAP, [], []),
        (MOVED, [(0x00, 0x30)], [(0x00, 0x30)]),
        (SWITCH, [(0x00, 0x30)], [(0x00, 0x30)]),
    ],
    ids=["nested", "trap", "moved", "switch"],
)
def test_loops(code, loops, innermost):
    assert found(parse(code)) == [loops, innermost]


LOAD = "LDG.E.128.CONSTANT R4, desc[UR6][R2.64]"
STORE = "desc[UR6][R12.64]"


@pytest.mark.parametrize(
    "in_flight, body",
    [
        (2, [LOAD, "LDG.E R9, desc[UR6][R10.64+0x10]", "FADD R0, R7, R1", "LDG.E R8, desc[UR6][R10.64]"]),
        (2, [LOAD, "FADD R0, R8, R3", "LDG.E R8, desc[UR6][R10.64]"]),  # 128 bits are R4 to R7
        (1, [LOAD, "LDG.E R9, desc[UR6][R6.64]"]),  # an address that was loaded
        (1, ["LDG.E R3, desc[UR6][R10.64]", "LDG.E R9, desc[UR6][R2.64]"]),  # its upper half
        (2, ["@P0 LDG.E.U16 R4, desc[UR6][R2.64]", "@!P1 LDG.E.U16 R5, desc[UR6][R2.64]", "PRMT R6, R4, R5, RZ"]),
        (2, [LOAD, "MOV R5, R8", "LDG.E R9, desc[UR6][R10.64]"]),  # written, not read
        (2, [LOAD, "MOV R8, UR5", "LDG.E R9, desc[UR5][R10.64]"]),  # other registers of these numbers
        (1, ["LDG.E R7, desc[UR6][R2.64]", f"STG.E.128 {STORE}, R4", "LDG.E R9, desc[UR6][R10.64]"]),
        (2, ["LDG.E R8, desc[UR6][R2.64]", f"STG.E.128 {STORE}, R4", "LDG.E R9, desc[UR6][R10.64]"]),
        (1, ["LDG.E.64 R4, desc[UR6][R2.64]", "DADD R6, R6, R4", "LDG.E R9, desc[UR6][R10.64]"]),
        (1, ["LDG.E R5, desc[UR6][R2.64]", "DADD R6, R6, R4", "LDG.E R9, desc[UR6][R10.64]"]),
        (1, ["LDG.E R9, desc[UR6][R10.64]", "FADD R0, -R9.reuse, |R1|", LOAD]),
        (2, ["LDGSTS.E.BYPASS.128 [R5], desc[UR6][R2.64]", "LDS R4, [R5]", LOAD]),  # writes no register
        (2, ["LDG.E.ENL2.256 R8, R4, desc[UR6][R2.64]", LOAD, "FADD R0, R11, R1", LOAD]),
    ],
)
def test_loads_in_flight(in_flight, body):
    assert sass.in_flight(parse("\n".join(body))) == in_flight


def test_figures_of_a_loop():
    body = """
        LDG.E.128.CONSTANT R4, desc[UR6][R2.64]
        LDG.E.128 R8, desc[UR6][R2.64+0x10]
        @P0 LDG.E.U8 R12, desc[UR6][R2.64]
        LDG.E.LTC128B R13, desc[UR6][R2.64]
        NOP
        FADD R0, R4, R1
    """
    figures = sass.loop_figures(parse(body))
    assert figures["loop"] == "0000-0050" and figures["load_widths"] == "2 x 128, 1 x 32, 1 x 8"
    assert [figures[key] for key in ("instructions", "units", "per_unit", "in_flight")] == [5, 2, 2.5, 4]
    assert figures["loop_load"] == 128
    shared = sass.loop_figures(parse("LDS.128 R4, [R1]\nLDS.128 R8, [R1+0x10]\nLDS R0, [R2]\nMUFU.EX2 R4, R4"))
    assert [shared[key] for key in ("units", "per_unit", "exponentials", "loop_load", "loads")] == [2, 2, 1, 128, 0]
    assert sass.loop_figures(parse("MUFU.EX2 R0, R0"))["per_unit"] is None


def test_figures_of_a_kernel():
    code = parse("""
        CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)
        CALL.REL.NOINC `($__internal_1_$__cuda_sm20_rem_u64)
        CALL.REL.NOINC `($__internal_2_$__cuda_sm20_div_rn_f64_full)
        DMUL R2, R2, R4
    .L_x_0:
        F2F.F64.F32 R2, R4
        MUFU.RCP64H R3, R3
        MUFU.RCP R4, R4
        I2F.U32.RP R6, R5
        I2F.RP R6, R5
        I2F.S64 R6, R8
        @P0 STG.E.128 desc[UR4][R2.64], R4
        STG.E.U8 desc[UR4][R2.64], RZ
        STL [R1], R4
        @P0 BRA `(.L_x_0)
        EXIT
    $_Z6kernelv$_Z6helperv:
    .L_x_1:
        DADD R2, R2, R4
        @P0 BRA `(.L_x_1)
        RET.REL.NODEC R8 `(_Z6kernelv)
    $__internal_0_$__cuda_sm20_div_s64:
        I2F.U64.RP R6, R4
        DADD R6, R6, R6
    """)
    assert sass.kernel_figures(code) == {
        "all_load_widths": "",
        "store_widths": "1 x 128, 1 x 8",
        "narrowest_store": 8,
        "widest_store": 128,
        "doubles": 4,
        "doubles_in_loops": 3,
        "divisions_64": 2,
        "divisions_32": 2,
        "divisions_in_loops": 2,
    }


def test_limits():
    row = {"main": True, "local": 0, "per_unit": 30.0, "in_flight": 8}
    rows = [
        {"kernel": "a::k<int>", **row},
        {"kernel": "a::k<long>", **row},
        {"kernel": "a::k<long>", **row, "main": False, "local": 9},
    ]
    general = {"": {"local": 0}}

    def broken(*rows, **limits):
        return list(sass.broken(rows, general, limits or {"k<": {"per_unit": 30, "in_flight": 8}}))

    assert broken(*rows) == []
    assert broken(*rows, k={"per_unit": 29}, a={}) == [
        f"a::k<{index}>: per_unit is 30.0, at most 29" for index in ("int", "long")
    ]
    assert broken(rows[0], int={"in_flight": 9}) == ["a::k<int>: in_flight is 8, at least 9"]
    assert broken({**rows[0], "local": 4}) == ["a::k<int>: local is 4, at most 0"]
    assert broken({**rows[0], "per_unit": None}) == ["a::k<int>: per_unit is None, at most 30"]
    assert broken(*rows, int={}) == ["a::k<long> has no limits"]
    assert broken(*rows, k={}, scatter={}) == ["no kernel is called scatter"]


KERNELS = """
namespace segops::op {
template <typename T, typename Index>
__global__ void spill(T* x, const Index* at, int n) {
  T values[32];
  for (int i = 0; i < 32; ++i) values[i] = x[i];
  for (int i = 0; i < n; ++i) x[i] = values[at[i]];
}
template __global__ void spill<float, int>(float*, const int*, int);

__global__ void total(const float* x, double* sum, int n) {
  double total = 0;
  for (int i = 0; i < n; ++i) total += x[i];
  *sum = total;
}

__global__ void divide(long long* x, long long by) {
  x[0] /= by;
  x[threadIdx.x + 1] %= by;
}

__global__ void load(const float4* x, float4* out, int n) {
  float4 total{};
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    float4 each[4];
    for (int k = 0; k < 4; ++k) each[k] = x[(4 * i + k) * 256 + threadIdx.x];
    for (int k = 0; k < 4; ++k) total.x += each[k].x, total.y += each[k].y, total.z += each[k].z, total.w += each[k].w;
  }
  out[threadIdx.x] = total;
}

// The threads may have parted before the shuffles.
__global__ void shuffle(float* x, const float* y, int n, int rows) {
  __shared__ float totals[256];
  for (int row = threadIdx.x / 32; row < rows; row += 8) {
    float total = 0;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < n; i += 32) total += x[i];
    if (total > 3) total += y[row];
    for (int k = 16; k > 0; k /= 2) total += __shfl_xor_sync(0xffffffff, total, k);
    totals[threadIdx.x] = total;
    x[row] = totals[threadIdx.x ^ 1];
  }
}
}  // namespace segops::op
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernels_that_nvcc_compiles(tmp_path):
    source, cubin = tmp_path / "kernels.cu", tmp_path / "kernels.cubin"
    source.write_text(KERNELS)
    subprocess.run(["nvcc", "-O3", "-std=c++17", "-arch=sm_90", "-cubin", source, "-o", cubin], check=True)
    rows = sass.rows(cubin)
    spill, total, divide, load, shuffle = (
        next(row for row in rows if row["kernel"] == f"op::{name}" and row["main"])
        for name in ("spill<float, int>", "total", "divide", "load", "shuffle")
    )
    assert {(row["op"], row["arch"]) for row in rows} == {("op", "sm_90")} and all(0 < row["registers"] < 256 for row in rows)
    assert [kernel["local"] for kernel in (spill, total, divide, load, shuffle)] == [128, 0, 0, 0, 0]
    assert total["doubles"] >= total["doubles_in_loops"] >= 1
    assert spill["doubles"] == divide["doubles"] == 0
    assert (divide["divisions_64"], divide["store_widths"], divide["narrowest_store"]) == (2, "2 x 64", 64)
    assert (load["load_widths"], load["units"], load["store_widths"]) == ("4 x 128", 4, "1 x 128")
    assert 1 < load["in_flight"] <= 4
    assert 5 <= load["per_unit"] <= 8 and load["per_unit"] == load["instructions"] / 4
    assert shuffle["shared"] >= 1024 and (shuffle["load_widths"], shuffle["units"]) == ("1 x 32", 1)
    assert [row["kernel"] for row in rows].count("op::shuffle") == 1

    table = sass.render({"compiler": "nvcc"}, rows, ["too much"]).splitlines()
    lines = [line.split(" | ") for line in table if line.startswith("| ")]
    assert table[0] == "compiler nvcc" and "## op" in table and "- too much" in table
    assert len(lines) == 1 + len(rows) and {len(line) for line in lines} == {len(sass.COLUMNS)}


def test_names():
    mangled = (
        "_ZN6segops6argmax47_GLOBAL__N__05247623_14_argmax_cuda_cu_7097e14211best_kernelI13__nv_bfloat16EEvNS_4ViewIKT_EEill"
    )
    assert sass.short_name(f"{mangled}Pil") == "argmax::best_kernel<__nv_bfloat16>"
    assert sass.short_name("_ZN6segops3bal12total_kernelEPKdlPf") == "bal::total_kernel"
    assert sass.short_name("_Z4copyIiLi4EEvPKT_PS0_") == "copy<int, 4>"


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"cuobjdump -xelf all .* failed: "):
        sass.rows(__file__)
    with pytest.raises(ValueError, match="-k must be an architecture, such as sm_90"):
        sass.rows(__file__, "sm_9.")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sass.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="there is no cuobjdump: neither on PATH"):
        sass.rows(__file__)


def test_mistakes_are_said_in_a_line():
    for arguments, said in ((["sass", "-k", "90"], "-k must be an architecture"), (["sass", "pac"], "OP must be one of")):
        done = subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("python -m benchmarks: ") and said in done.stderr
        assert done.stderr.count("\n") == 1


def test_built_kernels_keep_the_limits(tmp_path):
    built = build_info()["cuda"]
    if isinstance(built, str):
        pytest.skip(f"no CUDA library: {built}")
    if "9.0" not in built["architectures"]:
        pytest.skip(f"the CUDA library holds no code for {sass.ARCHITECTURE}, but for {', '.join(built['architectures'])}")
    sass.run(tmp_path, "test", sass.ARCHITECTURE)
    results = json.loads((tmp_path / "sass-test.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"sass-test.json", "sass-test.csv", "sass-test.md"}
    assert {row["op"] for row in results["rows"]} == {op for op in OPS if not only_on_cpu(op)}
    assert not results["broken"], "\n".join(results["broken"])
