"""Build a GPU that computes nothing, for this environment's PyTorch (a CUDA 13 build of it; takes `cc` and `nm`).

    python dev/null_gpu/build.py FOLDER
    LD_PRELOAD=$PWD/FOLDER/null_gpu.so LD_LIBRARY_PATH=$PWD/FOLDER python ...

To PyTorch it is an H100 with as much memory as NULL_GPU_GIB says (141). Results are whatever was in memory, mostly
zeros; what is true on it are allocations, so peak memory, and whether the host's side of a program runs.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# The compiler's own, in the real runtime: they only note down what there is.
KEPT = {"__cudaPushCallConfiguration", "__cudaPopCallConfiguration", "__cudaInitModule"}


def package(name: str) -> Path:
    """The folder of an installed package."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{name} is not installed; pip install a CUDA build of torch==2.13.0, and nvidia-cuda-crt")
    return Path(found.submodule_search_locations[0])


def wanted_by(library: Path) -> set[str]:
    """Names that a library takes from others."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}


def build(output: Path, source: Path, names: set[str], *flags: str) -> None:
    """Compile `source`, with a function that returns 0 for each name that it lacks."""
    there = set(re.findall(r"^[a-z].*?\b(\w+)\(", source.read_text(), re.MULTILINE))
    rest = output.with_suffix(".c")
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names - there)))
    subprocess.run(
        ["cc", "-O2", "-w", "-shared", "-fPIC", *flags, "-o", str(output), str(source), str(rest), "-lpthread"],
        check=True,
    )


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    libraries = package("torch") / "lib"
    if not (libraries / "libtorch_cuda.so").exists():
        raise SystemExit("this environment's PyTorch has no CUDA; pip install a CUDA build of torch==2.13.0")
    called = set().union(*map(wanted_by, [*libraries.glob("lib*cuda*.so"), libraries / "libtorch_python.so"]))
    runtime = {name for name in called if re.match(r"cuda[A-Z]|__cuda|cublas", name)}
    runtime = {name for name in runtime - KEPT if "egister" not in name or not name.startswith("__")}
    headers = [path for path in package("nvidia").glob("*/include") if (path / "crt" / "host_defines.h").exists()]
    if not headers:
        raise SystemExit("CUDA's headers are not there; pip install 'nvidia-cuda-crt<13.1'")
    build(folder / "null_gpu.so", HERE / "runtime.c", runtime, f"-I{headers[0]}")
    driver = {name for name in wanted_by(libraries / "libcaffe2_nvrtc.so") if re.match(r"cu[A-Z]", name)}
    triton = package("triton") / "backends" / "nvidia" / "driver.c"
    driver |= set(re.findall(r"\b(cu[A-Z]\w+)\(", triton.read_text()))
    build(folder / "libcuda.so.1", HERE / "driver.c", driver, "-Wl,-soname,libcuda.so.1")


if __name__ == "__main__":
    main()
