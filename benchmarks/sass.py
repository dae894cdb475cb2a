"""What nvcc made of the CUDA kernels, read from the machine code of the built library.

    python -m benchmarks sass -k sm_90  # without -k: of every architecture

A loop is the code from a backward branch's target to the branch, if the one leads to the other
without leaving it: not a trap that jumps to itself, nor what was moved behind the rest and returns.
It is innermost if it holds no other loop's branch. Its instructions are all but NOPs, branched over
or not. Its units of work are its global loads of the widest kind, of which one of 128 bits is a tap
of eight bfloat16 channels; without any, its loads from shared memory of the widest kind: in the
loss, one for each label pixel and class. In flight are its global loads before the first instruction that reads a register
which one of them wrote. Of several innermost loops the main one, which comes first, has the most
exponentials, then global loads, then instructions. Instructions per class are those per unit of all
innermost loops that have exponentials, added up: of a loss, both of its passes.

A 64-bit division is a call of nvcc's subroutine for quotients or remainders; a 32-bit one is the
reciprocal of an integer, also where that is the short way of a 64-bit one. Doubles and divisions
"in loops" are those in any loop. Local memory is the stack: spilled registers, and arrays with
computed indices. Static shared memory comes with the kilobyte that CUDA keeps from sm_90 on.
"""

import ctypes
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from segops.backend import build_info, library_path

from . import measure
from .report import write_csv

ARCHITECTURE = "sm_90"  # that the limits are for
# The largest values of columns, but for AT_LEAST the smallest, by what is searched for in the names
# of kernels. The last argument of a template is the type that numbers elements: `long` has 64 bits.
GENERAL = {
    "": {"local": 0, "doubles": 0},
    r"^(?!.*\blong>$)": {"divisions_64": 0},
}
# Every kernel has a line here. 64 registers let four blocks of 256 threads share a multiprocessor,
# 80 three, 128 two.
PAC = {"in_flight": 8, "loop_load": 128, "narrowest_store": 128}
LIMITS = {
    r"^argmax::best_kernel<": {"registers": 64},
    r"^argmax::best_kernel<.*\bint>$": {"per_unit": 12, "in_flight": 8},
    r"^argmax::upsample_kernel<": {"registers": 80},
    r"^argmax::upsample_kernel<.*\bint>$": {"registers": 64, "per_unit": 20, "in_flight": 4},
    r"^bal::(blur_x|blur_y|combine|normalise)_kernel<": {"registers": 64},
    r"^bal::blur_[xy]_kernel<int>$": {"in_flight": 4},
    r"^bal::cells_kernel<": {"registers": 80},
    r"^bal::cells_kernel<.*\bint>$": {"registers": 64, "per_class": 30},
    r"^bal::count_edges_kernel<": {"registers": 88},
    r"^bal::count_edges_kernel<.*\bint>$": {"registers": 64, "in_flight": 8},
    r"^bal::pixels_kernel<": {"registers": 64},
    r"^bal::pixels_kernel<.*\bint>$": {"in_flight": 8, "per_class": 50},
    r"^bal::scale_kernel<": {"registers": 64},
    r"^bal::scale_kernel<.*, [48]>$": {"widest_store": 128},
    r"^pac::gather_kernel<": {"registers": 64},
    r"^pac::gather_kernel<(__half|__nv_bfloat16), 8, .*\bint>$": {"per_unit": 36, "loop_load": 128, "narrowest_store": 128},
    r"^pac::gather_kernel<(__half|__nv_bfloat16), 8, true, int>$": PAC,
    r"^pac::scatter_kernel<": {"registers": 128},
    r"^pac::scatter_kernel<.*\bint>$": {"divisions_in_loops": 0},
    r"^pac::scatter_kernel<(__half|__nv_bfloat16), 8, .*\bint>$": {"per_unit": 40, "loop_load": 128, "narrowest_store": 128},
    r"^pac::scatter_kernel<(__half|__nv_bfloat16), 8, true, int>$": PAC,
    r"^pac::transpose_kernel<": {"registers": 64},
    r"^pag::(gather_kernel|scatter_windows)<": {"registers": 64},
    r"^pag::scatter_elements<": {"registers": 96},
    r"^pag::scatter_elements<.*\bint>$": {"registers": 64},
    r"^pag::(concat|sum)_kernel<": {"registers": 80},
    r"^pag::(concat|sum)_kernel<.*\bint>$": {"per_unit": 56, "in_flight": 4},
}
AT_LEAST = {"in_flight", "loop_load", "narrowest_store", "widest_store"}
COLUMNS = (  # of the tables; the other files have more
    "kernel arch registers shared local all_load_widths store_widths doubles doubles_in_loops divisions_64 divisions_32 divisions_in_loops "
    "loop instructions units per_unit per_class load_widths in_flight"
).split()

LOADS, STORES = {"LDG", "LDGSTS", "LD"}, {"STG", "ST"}  # of global memory
BRANCHES = {"BRA", "BRX", "BRXU", "JMP", "JMX"}
DOUBLE = r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|\S+\.(F64|R\w+64H)\b"
DIVISION_64, DIVISION_32 = r"CALL\b.*_(div|rem)_[su]64\b", r"I2F(\.[US]32)?\.RP\b"
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(@!?\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;")


@dataclass
class Instruction:
    address: int
    predicate: str | None  # "@!P0"
    opcode: str  # "LDG.E.128"
    operands: str
    targets: tuple = ()  # of a branch: the places in the code that it may go to

    @property
    def name(self):
        return self.opcode.partition(".")[0]

    @property
    def bits(self):
        """How wide a load or store is."""
        width = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", self.opcode)
        return int(width[1]) if width else 32

    def matches(self, pattern):
        return re.match(pattern, f"{self.opcode} {self.operands}") is not None

    @property
    def goes_on(self):
        """Whether the next instruction may follow, as after `@P0 BRA label` or `BRA P0, label`."""
        conditional = self.predicate or (self.name == "BRA" and not self.operands.startswith("`"))
        return conditional or self.name not in BRANCHES | {"EXIT", "RET"}

    def loaded(self):
        """The registers that a load writes."""
        first = re.findall(r"\bR(\d+)", self.operands.partition("[")[0])
        return {int(each) + i for each in first for i in range(max(1, self.bits // 32 // len(first)))}

    def read(self):
        """The registers that are read, all of what is wider than one."""
        sources = re.sub(r"^[^[]*" if self.name in LOADS else r"^R\d+(, |$)", "", self.operands)
        value = max(1, self.bits // 32) if self.name in STORES | {"STS", "STL"} else 1 + self.matches(DOUBLE)
        found = set()
        for operand in sources.split(", "):
            size = 2 if ".64" in operand else 1 if "[" in operand else value
            found |= {int(each) + i for each in re.findall(r"\bR(\d+)", operand) for i in range(size)}
        return found


def parse(listing):
    """{mangled name: instructions} of what `nvdisasm -c` prints, without nvcc's subroutines."""
    kernels = {}
    names_and_code = re.split(r"^\.text\.(\S+):$", listing, flags=re.MULTILINE)[1:]
    for name, text in zip(names_and_code[::2], names_and_code[1::2], strict=True):
        code, places, is_ours = [], {}, True
        for line in text.splitlines():
            if label := re.match(r"(\S+):$", line):
                places[label[1]] = len(code)
                if label[1].startswith("$"):
                    is_ours = not label[1].startswith("$__internal_")
            elif is_ours and (found := INSTRUCTION.match(line)):
                code.append(Instruction(int(found[1], 16), *found.groups()[1:]))
        for branch in (each for each in code if each.name in BRANCHES):
            branch.targets = tuple(places[label] for label in re.findall(r"\.L_x_\d+", branch.operands))
        kernels[name] = code
    return kernels


def loops(code):
    """(first, last) of each loop: the places of its branch's target and of its branch."""

    def is_loop(first, last):
        seen, ahead = set(), [first]
        while ahead:
            place = ahead.pop()
            if first <= place <= last and place not in seen:
                seen.add(place)
                ahead += [*code[place].targets, *([place + 1] if code[place].goes_on else [])]
        return last in seen

    backward = {(first, last) for last, branch in enumerate(code) for first in branch.targets if first < last}
    return sorted(loop for loop in backward if is_loop(*loop))


def innermost(found):
    return [loop for loop in found if not any(loop[0] <= last <= loop[1] for first, last in found if (first, last) != loop)]


def in_flight(body):
    loads, loaded = 0, set()
    for instruction in body:
        if loaded & instruction.read():
            break
        if instruction.name in LOADS:
            loads += 1
            loaded |= instruction.loaded()
    return loads


def widths(accesses):
    """As "8 x 128, 1 x 32"."""
    counts = Counter(each.bits for each in accesses)
    return ", ".join(f"{count} x {bits}" for bits, count in sorted(counts.items(), reverse=True))


def count(instructions, pattern):
    return sum(each.matches(pattern) for each in instructions)


def loop_figures(body):
    loads = [each for each in body if each.name in LOADS]
    working = loads or [each for each in body if each.name == "LDS"]
    widest = max((each.bits for each in working), default=None)
    units = sum(each.bits == widest for each in working)
    instructions = sum(each.name != "NOP" for each in body)
    return {
        "loop": f"{body[0].address:04x}-{body[-1].address:04x}",
        "instructions": instructions,
        "units": units,
        "per_unit": round(instructions / units, 2) if units else None,
        "exponentials": count(body, r"MUFU\.EX2\b"),
        "loop_load": widest,
        "loads": len(loads),
        "load_widths": widths(loads),
        "in_flight": in_flight(body),
    }


def kernel_figures(code):
    inside = [code[place] for place in {place for first, last in loops(code) for place in range(first, last + 1)}]
    stores = [each for each in code if each.name in STORES]
    return {
        "all_load_widths": widths(each for each in code if each.name in LOADS),
        "store_widths": widths(stores),
        "narrowest_store": min((each.bits for each in stores), default=None),
        "widest_store": max((each.bits for each in stores), default=None),
        "doubles": count(code, DOUBLE),
        "doubles_in_loops": count(inside, DOUBLE),
        "divisions_64": count(code, DIVISION_64),
        "divisions_32": count(code, DIVISION_32),
        "divisions_in_loops": count(inside, f"{DIVISION_64}|{DIVISION_32}"),
    }


def run_tool(name, *arguments, folder=None):
    """What cuobjdump or nvdisasm prints: the one on PATH, else the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    brought = [str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")] if triton else []
    tool = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *brought]))
    if tool is None:
        raise FileNotFoundError(
            f"there is no {name}: neither on PATH, as CUDA's toolkit has it, nor in Triton (pip install triton)"
        )
    done = subprocess.run([tool, *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{name} {' '.join(map(str, arguments))} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def short_name(mangled):
    """Such as "pac::gather_kernel<float, 4>"."""
    demangle, free = ctypes.CDLL("libstdc++.so.6").__cxa_demangle, ctypes.CDLL(None).free
    demangle.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    memory = demangle(mangled.encode(), None, None, None)
    name = ctypes.string_at(memory).decode().replace("(anonymous namespace)::", "")
    free(memory)
    return re.match(r"(?:void )?(?:segops::)?([\w:]+(?:<.*>)?)\(", name)[1]


def kernels(cubin):
    """(its figures, those of its innermost loops) for each kernel of a file of machine code."""
    usage = re.findall(r"Function (\S+):\n(.+)", run_tool("cuobjdump", "-res-usage", cubin))
    used = {name: {key: int(size) for key, size in re.findall(r"(\S+):(\d+)", line)} for name, line in usage}
    for name, code in parse(run_tool("nvdisasm", "-c", cubin)).items():
        kernel = short_name(name)
        figures = {
            "op": kernel.partition("::")[0],
            "kernel": kernel,
            "arch": cubin.suffixes[-2].strip("."),
            "registers": used[name]["REG"],
            "shared": used[name]["SHARED"],
            "local": used[name]["STACK"] + used[name]["LOCAL"],
            "constant": sum(size for key, size in used[name].items() if key.startswith("CONSTANT")),
            **kernel_figures(code),
        }
        bodies = [loop_figures(code[first : last + 1]) for first, last in innermost(loops(code))]
        per_class = [body["per_unit"] for body in bodies if body["exponentials"]]
        figures["per_class"] = round(sum(per_class), 2) if per_class else None
        yield figures, sorted(bodies, key=lambda body: (-body["exponentials"], -body["loads"], -body["instructions"]))


def rows(library, architecture="all"):
    """A dictionary for each innermost loop of each kernel, and for each kernel without a loop."""
    if not re.fullmatch(r"all|sm_\d+[af]?", architecture):
        raise ValueError(f"-k must be an architecture, such as {ARCHITECTURE}; got {architecture!r}")
    with tempfile.TemporaryDirectory() as folder:
        run_tool("cuobjdump", "-xelf", architecture, Path(library).resolve(), folder=folder)
        found = [each for cubin in Path(folder).glob("*.cubin") for each in kernels(cubin)]
    if not found:
        raise ValueError(f"{library} has no machine code for {architecture}")
    found.sort(key=lambda each: (each[0]["kernel"], each[0]["arch"]))
    return [{**figures, "main": i == 0, **body} for figures, bodies in found for i, body in enumerate(bodies or [{}])]


def broken(rows, general=GENERAL, limits=LIMITS):
    """Says which limits the rows do not keep, and which kernels and limits go without each other."""
    rows = [row for row in rows if row["main"]]
    for pattern, columns in [*general.items(), *limits.items()]:
        matching = [row for row in rows if re.search(pattern, row["kernel"])]
        if not matching:
            yield f"no kernel is called {pattern}"
        for row in matching:
            for column, limit in columns.items():
                value, is_least = row.get(column), column in AT_LEAST
                if value is None or (value < limit if is_least else value > limit):
                    yield f"{row['kernel']}: {column} is {value}, at {'least' if is_least else 'most'} {limit}"
    named = "|".join(limits)
    yield from (f"{row['kernel']} has no limits" for row in rows if not re.search(named, row["kernel"]))


def render(environment, rows, verdict):
    """A Markdown table for each op, a line for each innermost loop; what is beyond the limits."""
    lines = [", ".join(f"{key} {value}" for key, value in environment.items())]
    for op, of_op in itertools.groupby(rows, lambda row: row["op"]):
        lines += ["", f"## {op}", "", f"| {' | '.join(COLUMNS).replace('_', ' ')} |", "|" + "---|" * len(COLUMNS)]
        for row in of_op:
            cells = ("" if row.get(column) is None else str(row[column]) for column in COLUMNS)
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"## Beyond the limits of {ARCHITECTURE}", "", *(f"- {line}" for line in verdict or ["nothing"])]
    return "\n".join(lines)


def run(folder, name, architecture="all"):
    """Reads the built library; writes sass-NAME.json, .csv, .md to the folder, returns the tables."""
    try:
        library = library_path("cuda")
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error
    found, built, here = rows(library, architecture), build_info()["cuda"], measure.environment(measure.DEVICE)
    environment = {
        **built,
        "architectures": " ".join(built["architectures"]),
        "nvdisasm": run_tool("nvdisasm", "--version").strip().splitlines()[-1],
        **{key: here[key] for key in ("torch", "segops", "commit")},
    }
    judged = [row for row in found if row["arch"] == ARCHITECTURE]
    verdict = list(broken(judged)) if judged else ["not read"]
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"sass-{name}"
    results = {"environment": environment, "rows": found, "broken": verdict}
    (folder / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    write_csv(found, folder / f"{stem}.csv")
    tables = render(environment, found, verdict)
    (folder / f"{stem}.md").write_text(tables + "\n")
    return tables
