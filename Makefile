# The front doors: `make demo`, `make test`, `make test-fast`, `make test-memory`, `make test-full`, `make zoo`, `make campaign`.
# The first use creates .venv and installs into it; a later one installs only if these two files have changed.
# PIP_FLAGS goes to pip: where the index would give torch's CUDA build (several GB), name that of the CPU build.

PYTHON ?= python3
PIP_FLAGS ?=
INSTALL = .venv/bin/python -m pip install -q $(PIP_FLAGS) -c constraints.txt
REQUIREMENTS = pyproject.toml constraints.txt

.PHONY: demo test test-fast test-memory test-full zoo campaign check clean

demo: .venv/demo.stamp
	rm -rf out/digits
	.venv/bin/pqk compress models/digits.toml --out out/digits

test: check
	PYTHONSAFEPATH=1 .venv/bin/pytest -q -n 2

# No compile, no interpreter, no subprocess, no lint: what a contributor runs between two edits.
test-fast: .venv/test.stamp
	PYTHONSAFEPATH=1 .venv/bin/pytest -q -n 2 -m "not full and not slow"

test-full: check test-memory .venv/zoo.stamp
	PYTHONSAFEPATH=1 .venv/bin/pytest -q -n 2 -m "full or not full" --summary out/test_full.json

# The suite under glibc's check of the heap: a library that writes over other memory ends the run, instead of going on
# with wrong numbers. Processes that tests start are under it, too.
HEAP_CHECK = LD_PRELOAD=libc_malloc_debug.so.0 GLIBC_TUNABLES=glibc.malloc.check=3

test-memory: .venv/test.stamp
ifneq ($(shell ldconfig -p 2>/dev/null | grep libc_malloc_debug.so.0),)
	PYTHONSAFEPATH=1 $(HEAP_CHECK) .venv/bin/pytest -q -n 2
else
	@echo "test-memory: left out; this C library has no libc_malloc_debug.so.0 (glibc has from 2.34 on)"
endif

# What becomes of every network that people have: tests/zoo/results.json, and the table made of it. Goes on where it was.
zoo: .venv/test.stamp .venv/zoo.stamp
	PYTHONSAFEPATH=1 .venv/bin/python tests/zoo/run_zoo.py
	PYTHONSAFEPATH=1 .venv/bin/python tests/tools/readme.py

# Compiles that are killed, run out of disk and so on, and 10,000 damaged files; half an hour on two quiet cores.
campaign: .venv/test.stamp
	.venv/bin/python tests/faults/interruptions.py --into tests/faults/results.json
	.venv/bin/python tests/faults/mutations.py --into tests/faults/results.json

# Lint and types. mypy resolves pqk.passes, pqk.kernels and pqk.models in an installed copy only, so it checks one.
check: .venv/test.stamp
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	rm -rf build .venv/typed
	.venv/bin/python -m pip install -q --no-deps --no-build-isolation --target .venv/typed .
	rm -rf build
	cd .venv/typed && ../bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p pqk

.venv/zoo.stamp: tests/zoo/requirements.txt | .venv/test.stamp
	.venv/bin/python -m pip install -q $(PIP_FLAGS) --no-deps --upgrade --target .venv/zoo -r $<
	touch $@

.venv/%.stamp: $(REQUIREMENTS) | .venv/bin/python
	$(INSTALL) -e '.[$*]'
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build out *.egg-info .mypy_cache .pytest_cache .ruff_cache
