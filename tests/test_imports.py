"""The architecture's rules about imports: they go one way, and importing the package is cheap and never fails."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = "seqpar_attn"
ROOT = Path(__file__).parent.parent / PACKAGE
MODULES = {
    ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def room(module):
    """``seqpar_attn.comm.p2p`` -> ``comm``; the package's own ``__init__`` -> ````."""
    return module.split(".")[1] if "." in module else ""


@cache
def imports(module):
    """Every module that ``module`` imports, anywhere in it: absolute names, of the package's own the full ones."""
    path = MODULES[module]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # "from . import x" names the module x if there is one, else something inside the package.
            found |= {f"{name}.{a.name}" if f"{name}.{a.name}" in MODULES else name for a in node.names}
    return frozenset(found)


def rooms_used(module):
    return {room(name) for name in imports(module) if name.split(".")[0] == PACKAGE}


def modules_of(*rooms):
    return sorted(m for m in MODULES if room(m) in rooms)


def test_the_reader_of_imports_reads_them():
    assert "seqpar_attn.mask" in imports("seqpar_attn.layout")
    assert "seqpar_attn.mask" in imports("seqpar_attn.kernels.base")  # two dots
    assert "seqpar_attn.testing.errors" in imports("seqpar_attn.testing")  # one dot in a package
    assert "torch" in imports("seqpar_attn.layout")


@pytest.mark.parametrize("module", modules_of("mask", "schedule", "planner"))
def test_mask_schedule_and_planner_need_only_the_standard_library(module):
    # A picture of a sweep is drawn where matplotlib is there.
    optional = {"matplotlib"} if module == "seqpar_attn.planner.report" else set()
    outside = {name.split(".")[0] for name in imports(module)} - {*sys.stdlib_module_names, PACKAGE, *optional}
    assert not outside
    assert rooms_used(module) <= {"mask", room(module), *({"schedule"} if room(module) == "planner" else ())}


@pytest.mark.parametrize(
    ("rooms", "forbidden"),
    [
        (("kernels",), {"comm", "schedule", "layout", "batch", "autograd", "api"}),
        (("comm",), {"kernels", "schedule", "mask", "autograd", "api", "loss"}),
        (("layout", "batch"), {"kernels", "comm", "schedule", "autograd", "api", "loss", "memory"}),
        (("heads",), {"kernels", "schedule", "mask", "passes", "plan", "autograd", "api", "loss", "memory"}),
        (("comm", "layout", "batch", "passes", "plan", "autograd", "memory"), {"heads", "ulysses"}),
        (("loss",), {"schedule", "layout", "batch", "passes", "plan", "autograd", "api", "mask"}),
        (("kernels", "comm", "schedule", "layout", "batch", "passes", "plan", "autograd", "api"), {"loss"}),
        (("autograd", "ulysses"), {"api", "loss", "memory"}),
        (("decode",), {"schedule", "batch", "passes", "plan", "autograd", "api", "loss", "memory"}),
        (("memory",), {"kernels", "comm", "schedule", "mask", "layout", "batch", "autograd", "api", "loss"}),
        (tuple({room(m) for m in MODULES} - {"", "__main__", "planner"}), {"planner"}),
        (("kept",), {room(m) for m in MODULES} - {"kept"}),
        (("intercept",), {room(m) for m in MODULES} - {"intercept"}),
    ],
    ids=lambda value: ("+".join(value) if len(value) < 12 else "all others") if isinstance(value, tuple) else "",
)
def test_rooms_do_not_know_what_is_not_theirs(rooms, forbidden):
    for module in modules_of(*rooms):
        assert not rooms_used(module) & forbidden, module


@pytest.mark.parametrize(("leaf", "allowed"), [("integrations", [PACKAGE]), ("testing", [])])
def test_nothing_imports(leaf, allowed):
    """But for the package itself, which hands out ``verify`` to who asks."""
    assert [m for m in MODULES if room(m) != leaf and leaf in rooms_used(m)] == allowed


def test_the_package_loads_verify_only_when_asked():
    code = (
        "import sys, seqpar_attn; before = 'seqpar_attn.integrations' in sys.modules;"
        "print(before, seqpar_attn.verify.__module__, 'transformers' in sys.modules, hasattr(seqpar_attn, 'nothing'))"
    )
    assert run(code) == "False seqpar_attn.integrations.verify False False"


def test_rooms_form_no_cycle():
    uses = {}
    for module in MODULES:
        uses.setdefault(room(module), set()).update(rooms_used(module) - {room(module)})
    done = set()
    while len(done) < len(uses):
        free = {r for r in uses if r not in done and uses[r] <= done}
        assert free, f"these rooms import each other in a circle: {sorted(set(uses) - done)}"
        done |= free


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


OPTIONAL = ("triton", "transformers", "flash_attn", "accelerate", "datasets", "tqdm")


def test_importing_the_package_loads_nothing_optional_and_no_cuda():
    code = (
        "import sys, torch; before = set(sys.modules); import seqpar_attn;"
        f"print(sorted(m for m in {OPTIONAL!r} if m in sys.modules and m not in before), torch.cuda.is_initialized())"
    )
    assert run(code) == "[] False"


def test_the_package_imports_where_nothing_optional_is_installed():
    blocked = "".join(f"sys.modules[{name!r}] = None;" for name in OPTIONAL)
    assert run(f"import sys; {blocked} import seqpar_attn; print(seqpar_attn.__name__)") == PACKAGE
