# A fresh machine needs python3 (3.11 to 3.13), make and a package index that pip can reach. Each environment is made on
# first use and again when pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
CORE_VENV := .venv-core-$(notdir $(PYTHON))
AOT_VENV := .venv-aot
DOCS_VENV := .venv-docs
RUN := $(VENV)/bin/python
# A test file is one process's, as what its tests compile is shared; each process takes up to 3 GB.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: help demo evidence test test-core test-aot docs fetch format clean

help:
	@echo 'make demo       convert SmolLM2-135M to AllMem, distil it on real text, write a report (out/)'
	@echo 'make evidence   every mixer beside its control: recall from scratch, SmolLM2-135M distilled (hours, resumable)'
	@echo 'make test       format, lint and type checks, and all tests'
	@echo 'make test-core PYTHON=python3.12'
	@echo '                kernels, model and generation on another Python, in an environment of its own'
	@echo 'make test-aot   every kernel and a training step through the compilers of TPUs and of the H100, no device needed'
	@echo 'make docs       the pages of docs/, in site/'
	@echo 'make fetch      download the real model and texts, so that the tests that want them run'
	@echo 'make format     format the code and fix what lint can fix'
	@echo 'make clean      remove environments and caches; downloads (.cache/) and results (out/) stay'

demo: $(VENV)/demo.stamp
	$(RUN) -m train.experiments.demo

evidence: $(VENV)/demo.stamp
	$(RUN) -m train.experiments.recall_grid
	$(RUN) -m train.experiments.evidence

test: $(VENV)/dev.stamp
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) $(PYTEST)

test-core: $(CORE_VENV)/core.stamp
	$(CORE_VENV)/bin/python $(PYTEST) -m core

test-aot: $(AOT_VENV)/aot.stamp
	TRITON_INTERPRET=0 XLA_FLAGS= $(AOT_VENV)/bin/python $(PYTEST) --dist load tests/test_aot.py

docs: $(DOCS_VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --quiet

fetch: $(VENV)/demo.stamp
	$(RUN) -m train.fetch

format: $(VENV)/dev.stamp
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf .venv .venv-core-* .venv-docs site .pytest_cache .ruff_cache .mypy_cache .hypothesis dist build

$(VENV)/demo.stamp: pyproject.toml
	$(call install,$(VENV),train)

$(VENV)/dev.stamp: pyproject.toml
	$(call install,$(VENV),dev$(comma)train)
	touch $(VENV)/demo.stamp

# The pages need the sources alone, which are read and not imported.
$(DOCS_VENV)/docs.stamp: pyproject.toml
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	  | $(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement /dev/stdin
	touch $@

$(CORE_VENV)/core.stamp: pyproject.toml
	$(call install,$(CORE_VENV),test$(comma)train)

# The GPU's compiler without its libraries, which are 4 GB: two plug-ins of jax's own version, ptxas, and Triton.
$(AOT_VENV)/aot.stamp: pyproject.toml
	$(call install,$(AOT_VENV),test$(comma)train$(comma)tpu)
	version=$$($(AOT_VENV)/bin/python -c 'import importlib.metadata as m; print(m.version("jax"))') && \
	$(AOT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  "jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version" 'nvidia-cuda-nvcc>=13.4,<14' 'triton>=3.5,<4' \
	  "jax-triton$$($(AOT_VENV)/bin/python -c 'import sys; print(">=0.4.1,<0.5" if sys.version_info >= (3, 12) else ">=0.3.1,<0.4")')"
	touch $@

# $(call install,FOLDER,EXTRAS): an environment in FOLDER with this checkout and its EXTRAS; the target is its stamp.
comma := ,
define install
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit("Python 3.11 to 3.13 is needed, \
	and $(PYTHON) is %d.%d; name another: make $(MAKECMDGOALS) PYTHON=python3.12" % v)'
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$(2)]'
	touch $@
endef
