# Every target bootstraps what it needs: a virtual environment made by uv from pinned versions.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: quickstart test test-all gpu-test bench bench-gpu browser lint types constraints clean

quickstart: .venv/.ready
	$(BIN)/promptkd quickstart

test: .venv/.ready
	$(BIN)/pytest -q -m "not slow"

test-all: .venv/.ready
	$(BIN)/pytest -q

# On a machine with a GPU.
gpu-test: .venv/.ready
	$(BIN)/pytest -q -m gpu
	$(BIN)/pytest -q tests/test_kl.py tests/test_cosine.py tests/test_triton_kl.py

# Benchmarks: at most 20 minutes on CPUs, and 9 on a GPU. On a GPU box without network name a Python
# that has what they need, as in `make bench-gpu BENCH_PYTHON=python3`: see benchmarks/suite.py.
bench: .venv/.ready
	$(BIN)/python benchmarks/suite.py

bench-gpu: $(if $(BENCH_PYTHON),,.venv/.ready)
	$(or $(BENCH_PYTHON),$(BIN)/python) benchmarks/suite.py --gpu

# For the tests that look at pages: Debian's Chromium, where there is no browser of its kind.
browser:
	@for name in chromium chromium-browser google-chrome; do \
		command -v $$name && exit; \
	done; \
	as_root=$$(test $$(id -u) = 0 || echo sudo); \
	$$as_root apt-get -qq update && \
	$$as_root apt-get -qq install --no-install-recommends chromium

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready
	$(BIN)/mypy

# Ray and DeepSpeed start several Python processes: they start much faster from compiled bytecode.
.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode \
		--constraint constraints.txt --editable '.[dev]'
	touch $@

constraints: .venv/.ready
	$(BIN)/uv pip compile --quiet --no-header --no-annotate --no-emit-index-url --all-extras \
		--python-version 3.11 --upgrade pyproject.toml --output-file constraints.txt

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
