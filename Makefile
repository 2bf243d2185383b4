# Everything runs in .venv, through its own python: scripts that pip installs name the directory
# they were made for, and break in one that moved.

SHELL := /bin/sh
VENV := .venv
PY := $(VENV)/bin/python
# XLA allocates its memory anew in every step; huge pages halve what that costs on a CPU.
RUN := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(PY)
# What trains one network, or times one, keeps its memory too.
TRAIN := . launch/malloc.env; $(PY)
PIP := $(PY) -m pip --quiet --disable-pip-version-check

# The interpreter of a new .venv, such as PYTHON=python3.12; empty: the first that
# will do.
PYTHON ?=

DEMO_MODEL := runs/demo/export/model.safetensors
DEMO_IMAGES := runs/demo/export/images

# Real data, which is not distributed; what is made of it.
SHARED := $(or $(UNIQ_JAX_SHARED),../shared)
TFDS := runs/tfds/prepared

CORE := $(VENV)/.installed-core
DEV := $(VENV)/.installed-dev
ACCELERATORS := $(VENV)/.installed-accelerators
PEERS := $(VENV)/.installed-peers

.PHONY: help demo demo-plan test lint format types docs accuracy accuracy-digits accuracy-cifar cifar cifar-networks meshes curriculum golden soak distributed exact exports bench accelerators compile-accelerators peers time-peers update-constraints clean
# The targets that follow another (demo after demo-plan) need their order under `make -j` too.
.NOTPARALLEL:

help: ## list the targets
	@awk -F ':[^#]*## ' '/^[a-z-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' Makefile

demo: demo-plan $(CORE) ## train, quantize, freeze and try a small network on the digits (2-bit, minutes on a CPU)
	@if [ -f runs/demo/result.json ]; then rm -rf runs/demo; fi
	@$(TRAIN) -m uniq_jax.main --config=configs/digits_w2a2.py --workdir=runs/demo
	@echo
	@echo "What the integer network sees in test images it was not trained on:"
	@echo "    $(PY) -m uniq_jax.predict --top=2 --benchmark $(DEMO_MODEL) $(DEMO_IMAGES)"
	@echo
	@$(RUN) -m uniq_jax.predict --top=2 --benchmark $(DEMO_MODEL) $(DEMO_IMAGES)

demo-plan:
	@echo "This trains a small network on the embedded digits, quantizes its weights and"
	@echo "activations to 2 bits, trains on, freezes it to an exact integer network, and writes the"
	@echo "results to runs/demo. At the end the integer network is tried on test images."
	@if [ -f runs/demo/result.json ]; then \
	    echo "runs/demo holds a finished run: it is removed, and training starts afresh."; \
	elif [ -d runs/demo ]; then \
	    echo "runs/demo holds an unfinished run: it is resumed."; \
	fi

test: $(DEV) lint types docs ## all checks: ruff, pyright, the docs and the tests that are not slow
	@$(RUN) -m pytest -q -n 2 -m "not slow" --durations=10

lint: $(DEV) ## ruff: rules and format
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check

format: $(DEV) ## ruff: mend what it can and format
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format

# Without the variable, pyright's wrapper asks the network for its latest version each time.
types: $(DEV) ## pyright
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright --pythonpath $(PY)

# Without the variable, the theme prints a notice about its successor each time. With --quiet, mkdocs
# would not count the warnings that --strict makes errors.
docs: $(DEV) ## build the documentation, site/index.html; notebooks and pictures are run anew
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

accuracy: $(DEV) ## the slow tests: whole trainings, minutes to hours
	@$(RUN) -m pytest -m slow --durations=10

DIGITS := $(foreach bits,2 1,$(foreach seed,0 1 2,digits_w$(bits)a$(bits)_s$(seed)))

accuracy-digits: $(CORE) ## the README's accuracies on digits: 2 and 1 bit, 3 seeds each; minutes
	@$(TRAIN) benchmarks/accuracy.py train $(DIGITS)
	@$(RUN) benchmarks/accuracy.py keep $(DIGITS:%=runs/results/%)
	@$(RUN) benchmarks/accuracy.py table

CIFAR := $(notdir $(wildcard results/cifar10_*))

accuracy-cifar: $(DEV) $(TFDS) ## the README's accuracies on CIFAR-10; hours each (needs UNIQ_JAX_SHARED)
	@mkdir -p runs/weights && cp -f $(SHARED)/data/weights/cifar10_*.npz runs/weights
	@$(TRAIN) benchmarks/accuracy.py train $(CIFAR)
	@$(RUN) benchmarks/accuracy.py keep $(CIFAR:%=runs/results/%)
	@$(RUN) benchmarks/accuracy.py table

$(TFDS): | $(DEV)
	@test -f $(SHARED)/data/prepare_tfds.py || { \
	    echo "no real data: $(SHARED)/data/prepare_tfds.py is missing; set UNIQ_JAX_SHARED"; exit 1; }
	@$(PY) $(SHARED)/data/prepare_tfds.py runs/tfds && touch $@

cifar: $(DEV) ## two epochs of CIFAR-10, killed and resumed (needs UNIQ_JAX_SHARED)
	@$(RUN) -m pytest -q -m slow tests/test_cifar10.py

cifar-networks: $(DEV) ## the README's CIFAR-10 ResNets, float and W8A8 (needs UNIQ_JAX_SHARED)
	@$(RUN) -m pytest -q tests/test_cifar10_networks.py

meshes: $(DEV) ## every method, and a model of others, trained on meshes of four CPU devices
	@$(RUN) -m pytest -q -m slow tests/test_train_mesh.py tests/test_outside_models.py

golden: $(DEV) ## networks of both originals, gradients and all (needs UNIQ_JAX_SHARED)
	@$(RUN) -m pytest -q tests/test_golden_networks.py

curriculum: $(DEV) ## every method from float to 8, 4 and 2 bits, resumed; steps that freeze weights
	@$(RUN) -m pytest -q -m slow tests/test_train_handover.py tests/test_train_oscillation.py

soak: $(DEV) ## 30 random kills in one training, and other slow tests of stopping (CIFAR-10 with UNIQ_JAX_SHARED)
	@$(RUN) -m pytest -q -s -m slow tests/test_soak.py tests/test_train_stops.py \
	    tests/test_data_workers.py

distributed: $(DEV) ## two processes against one, and lost ones (needs UNIQ_JAX_SHARED)
	@$(RUN) -m pytest -q -m slow tests/test_distributed.py tests/test_train_processes.py

exports: $(DEV) ## exported ResNet-20s in OpenVINO and QONNX, code by code (needs UNIQ_JAX_SHARED)
	@$(RUN) -m pytest -q -m slow tests/test_deploy_exports_real.py

exact: $(DEV) $(TFDS) ## frozen networks against training, code by code: every method, width and network; hours (needs UNIQ_JAX_SHARED)
	@$(RUN) benchmarks/exact.py --data_dir=runs/tfds --jobs=2

bench: $(DEV) ## every figure that has a goal, beside it; ten minutes and more (photos need UNIQ_JAX_SHARED)
	@$(TRAIN) benchmarks/inference.py
	@$(TRAIN) benchmarks/train_step.py
	@$(TRAIN) benchmarks/quantizers.py
	@photos="$(SHARED)/data/imagenet_fullres"; \
	if [ -d "$$photos" ]; then \
	    $(RUN) benchmarks/input.py "$$photos" --results=benchmarks/results.json && echo && $(PY) benchmarks/table.py; \
	else \
	    echo "input_over_pillow: not measured, as there is no $$photos; set UNIQ_JAX_SHARED"; echo; \
	    $(PY) benchmarks/table.py --without input_over_pillow; \
	fi

# JAX would try to use the compilers' devices in every program of .venv.
accelerators: ## what steps read and write on a GPU and on TPUs, from programs compiled for them; needs neither
	@$(MAKE) --no-print-directory VENV=.venv-accelerators compile-accelerators

compile-accelerators: $(ACCELERATORS)
	@$(RUN) benchmarks/accelerators/compare.py

# PyTorch stays out of .venv.
peers: ## training steps beside those of Brevitas and qwix, in an environment of its own; minutes
	@$(MAKE) --no-print-directory VENV=.venv-peers time-peers

time-peers: $(PEERS)
	@$(TRAIN) benchmarks/peers/compare.py

update-constraints: $(DEV) ## resolve the newest dependencies anew and write constraints.txt
	@$(PIP) install --dry-run --ignore-installed --report $(VENV)/resolved.json -e '.[dev]'
	@$(PY) -c "$$WRITE_CONSTRAINTS"
	@echo "Wrote constraints.txt; now run: make test"

clean: ## remove .venv, caches and build products; runs/ stays
	rm -rf $(VENV) .venv-accelerators .venv-peers build dist site .hypothesis .pytest_cache .ruff_cache .jax_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CORE): pyproject.toml constraints.txt
	@$(MAKE_VENV)
	@echo "Installing uniq_jax into $(VENV); the first time takes minutes ..."
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt
	@$(MAKE_VENV)
	@echo "Installing uniq_jax and its development tools into $(VENV); the first time takes minutes ..."
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(CORE) $@

$(ACCELERATORS): pyproject.toml constraints.txt benchmarks/accelerators/constraints.txt
	@$(MAKE_VENV)
	@echo "Installing uniq_jax and compilers for GPUs and TPUs into $(VENV) ..."
	@$(PIP) install -c constraints.txt -c benchmarks/accelerators/constraints.txt -e '.[accelerators]'
	@touch $@

$(PEERS): pyproject.toml constraints.txt benchmarks/peers/constraints.txt
	@$(MAKE_VENV)
	@echo "Installing uniq_jax and what it is compared with into $(VENV), PyTorch among it ..."
	@$(PIP) install -c constraints.txt -c benchmarks/peers/constraints.txt -e '.[peers]'
	@touch $@

# Keeps a .venv that works; makes it anew where it is missing, half made, or its python is gone.
# A candidate must run to count: version managers put commands on the path that only print advice.
define MAKE_VENV
works='import sys; sys.exit(sys.version_info < (3, 11))'; \
if $(PY) -c "import pip; $$works" 2>/dev/null; then exit 0; fi; \
if [ -n '$(PYTHON)' ]; then set -- '$(PYTHON)'; \
else set -- python3.13 python3.12 python3.11 python3; fi; \
for candidate in "$$@"; do \
    if "$$candidate" -c "import ensurepip, venv; $$works" 2>/dev/null; then \
        echo "Making $(VENV) with $$candidate"; \
        exec "$$candidate" -m venv --clear $(VENV); \
    fi; \
done; \
echo "uniq_jax needs Python 3.11 or newer with its venv module (on Debian and Ubuntu the package" >&2; \
echo "python3-venv). Tried: $$*. Name another one: make PYTHON=/path/to/python3" >&2; \
exit 1
endef

define WRITE_CONSTRAINTS
import json, re
with open("$(VENV)/resolved.json", encoding="utf-8") as file:
    packages = [entry["metadata"] for entry in json.load(file)["install"]]
lines = {
    re.sub("[-_.]+", "-", package["name"]).lower() + "==" + package["version"] + "\n"
    for package in packages
    if package["name"] != "uniq_jax"
}
with open("constraints.txt", "w", encoding="utf-8") as file:
    file.writelines(sorted(lines))
endef
export WRITE_CONSTRAINTS
