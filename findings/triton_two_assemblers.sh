#!/usr/bin/env bash
# Triton 3.9.0: the program `ptxas` in its own package cannot assemble the code that Triton writes for sm_90.
#
# Expected: whoever compiles a kernel ahead of time, to read its registers and spills without a GPU, takes the PTX from
# `triton.compile` and the `ptxas` that the wheel ships beside the compiler; for Hopper, `ptxas-blackwell` looks wrong.
# Observed: Triton 3.9 writes PTX 9.4 for sm_90 and assembles it with `ptxas-blackwell`. Its `ptxas` knows PTX up to 8.8,
# is only for GPUs older than sm_90, and refuses: "Unsupported .version 9.4". For sm_80 both work.
# `triton.backends.nvidia.compiler.get_ptxas(arch)` names the right one. Up to Triton 3.8, `ptxas` served sm_90 too.
#
# Output:
#   sm_80: ptxas 0, ptxas-blackwell 0 · sm_90: ptxas 255, ptxas-blackwell 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.9.0 numpy==2.2.6
cat > "$work/kernel.py" <<'PY'
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
signature = {"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}
source = ASTSource(fn=double, signature=signature, constexprs={"BLOCK": 128})
codes = {}
for arch in (80, 90):
    ptx = Path(sys.argv[1]) / f"{arch}.ptx"
    ptx.write_text(triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"])
    name = "sm_90a" if arch == 90 else f"sm_{arch}"
    for tool in ("ptxas", "ptxas-blackwell"):
        command = [tools / tool, f"-arch={name}", ptx, "-o", ptx.with_suffix(".cubin")]
        codes[arch, tool] = subprocess.run(command, capture_output=True).returncode
print(" · ".join(f"sm_{a}: " + ", ".join(f"{t} {codes[a, t]}" for t in ("ptxas", "ptxas-blackwell")) for a in (80, 90)))
assert codes[80, "ptxas"] == 0 and codes[90, "ptxas-blackwell"] == 0, codes
assert codes[90, "ptxas"] != 0, "Triton's ptxas assembles sm_90 now"
PY
TRITON_DEFAULT_FP_FUSION=1 TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/kernel.py" "$work"
