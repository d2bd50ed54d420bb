# Everything needs only make and a Python 3.10 to 3.12: the first target that needs it sets up .venv, once.
#
#   make demo        train a small Llama on real text over 4 ranks and compare it with one device
#   make test        all tests that this machine can run
#   make test-oldest those about transformers once more, with the oldest release that is supported
#   make lint types  ruff and clang-format; mypy
#   make csrc-check  compile csrc with warnings as errors; registers, spills and serialisation of every kernel (nvcc)
#   make csrc-test   csrc/tests by ctest          (nvcc, cmake, ninja and a Hopper GPU)
#   make gpu-test    tests on an NVIDIA GPU       (in place, with the machine's python3, if its torch sees the GPU)
#   make gpu-memcheck  a few of them under compute-sanitizer
#   make gpu-bench   benchmarks on an NVIDIA GPU  (likewise); BENCH_ARGS=--quick for a look
#   make clean       remove what was built or measured; .venv stays
#
# Settings: TORCH='torch==2.12.0' chooses another torch, EXTRAS=test,demo other optional parts, JOBS=1 the number of
# test processes, PYTEST_ARGS='-k ring' goes to pytest. Where pip would fetch a CUDA build of torch that nobody needs,
# point PIP_INDEX_URL at a CPU one. SEQPAR_ATTN_CUDA=1 compiles the CUDA library at once; without it nothing waits for
# nvcc, and the library is compiled when the backend is asked for by name.

VENV ?= .venv
EXTRAS ?= test,demo,lint
JOBS ?= 3
PYTEST_ARGS ?=
BENCH_ARGS ?=
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
HAS_GPU := $(shell command -v nvidia-smi 2>/dev/null)
TORCH ?= $(if $(HAS_GPU),torch,torch==2.13.0)
# Without a GPU Triton's interpreter stands in for it: 3.6.0 is the version measured on GPUs, and it needs this numpy.
# Installed last and by themselves, because a CUDA build of torch asks for the Triton of its own version.
PINS := $(if $(HAS_GPU)$(filter-out Linux,$(shell uname -s)),,triton==3.6.0 'numpy<2.4')

export SEQPAR_ATTN_CUDA ?= 0

OLDEST := transformers==5.17.0

SEES_GPU := import sys, torch; sys.exit(not torch.cuda.is_available())

.PHONY: demo test test-oldest lint types csrc-check csrc-test gpu-test gpu-memcheck gpu-sanitize gpu-bench clean venv

venv: $(STAMP)

$(STAMP): Makefile pyproject.toml setup.py
	@for python in python3.12 python3.11 python3.10 python3 python; do
	    # A name on the path need not run (version managers leave such stubs), so ask each what it is.
	    if $$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
	        found=$$python; break
	    fi
	done
	if [ ! -x $(PY) ]; then
	    [ -n "$${found:-}" ] || { echo "expected a Python 3.10, 3.11 or 3.12 on the path, found none" >&2; exit 1; }
	    $$found -m venv $(VENV)
	fi
	$(PY) -m pip install --quiet '$(TORCH)'
	$(PY) -m pip install --quiet -e '.[$(EXTRAS)]' pytest-xdist
	if [ -n "$(PINS)" ]; then $(PY) -m pip install --quiet $(PINS); fi
	touch $@

demo: $(STAMP)
	@$(PY) examples/train_text.py --out out/demo

test: $(STAMP)
	@$(PY) -m pytest -n $(JOBS) $(PYTEST_ARGS)

# Beside the environment's own, the newest; with what it needs, but no torch.
$(VENV)/$(OLDEST)/.installed: $(STAMP)
	@$(PY) -m pip install --quiet --upgrade --target $(@D) $(OLDEST)
	touch $@

test-oldest: $(VENV)/$(OLDEST)/.installed
	@export PYTHONPATH=$(abspath $(VENV)/$(OLDEST))
	$(PY) -c 'import transformers; print("transformers", transformers.__version__)'
	$(PY) -m pytest -n $(JOBS) -q tests/test_transformers.py tests/test_generation.py tests/test_verify.py $(PYTEST_ARGS)

lint: $(STAMP)
	@$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) csrc/common/generate_wgmma.py --check
	$(PY) csrc/sm90/generate_instances.py --check
	sources=$$(if [ -d csrc ]; then find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.h'; fi)
	if [ -n "$$sources" ]; then $(VENV)/bin/clang-format --dry-run -Werror $$sources; fi

types: $(STAMP)
	@$(PY) -m mypy seqpar_attn

# Status 77: there is no nvcc, which it has said.
csrc-check: $(STAMP)
	@$(PY) csrc/check_build.py || [ $$? -eq 77 ]

csrc-test:
	@cmake -S . -B build/csrc-test -G Ninja -DSEQPAR_ATTN_TESTS=ON -DSEQPAR_ATTN_ARCHS=90a >/dev/null
	cmake --build build/csrc-test
	ctest --test-dir build/csrc-test --output-on-failure

# The python3 of a GPU machine is used as it is, with nothing installed, if its torch sees the GPU.
define gpu_python
if python3 -c '$(SEES_GPU)' 2>/dev/null; then python=python3; else $(MAKE) venv; python=$(PY); fi
$$python -c '$(SEES_GPU)' || { echo "expected an NVIDIA GPU that torch sees, found none" >&2; exit 1; }
export PYTHONPATH=$(CURDIR)
# The library of csrc is compiled once, where there is nvcc and a GPU that it serves; without it its tests are skipped.
$$python -c 'from seqpar_attn import kernels; x = kernels.get("cuda"); x.prepare(); print("csrc:", x.unavailable() or "ready")'
endef

gpu-test:
	@$(gpu_python)
	$$python -m pytest tests -m gpu -q $(PYTEST_ARGS)

# Without torch's caching allocator every tensor has its own bounds.
gpu-memcheck:
	@$(gpu_python)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
	    $$python -m pytest tests/test_attention_gpu.py -m gpu -q -k 'small_odd or one_token' $(PYTEST_ARGS)

# Every kernel of csrc under every tool, side by side; what they say is in out/sanitize. racecheck needs a library in
# which every lane arrives at barriers itself (csrc/common/barrier.cuh).
gpu-sanitize:
	@$(gpu_python)
	mkdir -p out/sanitize
	cmake -S . -B build/racecheck -G Ninja -DSEQPAR_ATTN_ARCHS=90a -DCMAKE_CUDA_FLAGS=-DSEQPAR_ATTN_RACECHECK >/dev/null
	cmake --build build/racecheck >/dev/null
	race=$$(find $$PWD/build/racecheck -name 'libseqpar_attn.so')
	export PYTORCH_NO_CUDA_MEMORY_CACHING=1
	pids=()
	for what in memcheck:forward memcheck:backward racecheck:small initcheck:small synccheck:small; do
	    if [ $${what%:*} = racecheck ]; then library=$$race; else library=$${SEQPAR_ATTN_LIBRARY:-}; fi
	    SEQPAR_ATTN_LIBRARY=$$library compute-sanitizer --tool $${what%:*} --error-exitcode 9 $$python tests/sanitize.py $${what#*:} \
	        > out/sanitize/$${what/:/-}.log 2>&1 & pids+=($$!)
	done
	failed=0
	for pid in $${pids[@]}; do wait $$pid || failed=1; done
	tail -n 1 out/sanitize/*.log
	exit $$failed

gpu-bench:
	@$(gpu_python)
	$$python benchmarks/run.py --out out/bench $(BENCH_ARGS)

clean:
	@rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
