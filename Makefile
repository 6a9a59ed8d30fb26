# Every target does its own set-up, in .venv.
PYTHON ?= python3
BIN := .venv/bin
# What depends on other libraries' versions. The long tests of our own arithmetic run in `make test` alone.
OLDEST := tests/hosts tests/families tests/decode tests/operators tests/compute tests/weights tests/device tests/engine tests/eval tests/lever --ignore tests/hosts/ktransformers --ignore tests/eval/gpu_check --ignore tests/eval/test_resume.py -m "not slow"

# Interpreters for `make test-pythons`, names or paths.
PYTHONS ?= python3.10 python3.12

.DEFAULT_GOAL := help
.PHONY: help oracle chat chat-ktransformers test gpu-check-dry gpu-bundle test-ktransformers test-wheel test-pythons lint fuzz load eval figures peers peers-server clean setup setup-dev setup-oldest test-oldest setup-ray test-ray setup-ktransformers setup-ktransformers-dev

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*##  */\1 /p' $(MAKEFILE_LIST) | while read -r name about; do printf '%-19s %s\n' "$$name" "$$about"; done

# Handed over in the environment, unexpanded: a prompt may hold what make or the shell would take for its own.
unexport PROMPT
chat chat-ktransformers: export ASKED = $(value PROMPT)

chat: setup  ## chat with the demo model; PROMPT="..." asks one question
	@$(BIN)/hybrimoe local_chat --demo $${ASKED:+"--prompt=$$ASKED"}

chat-ktransformers: setup setup-ktransformers  ## the real ktransformers.local_chat with the demo model and our rules
	@$(BIN)/hybrimoe demo_model > /dev/null
	@.venv-ktransformers/bin/hybrimoe ktransformers_chat --demo $${ASKED:+--greedy "--prompt=$$ASKED"}

test: lint  ## lint, type check and tests
	@$(BIN)/python -m pytest -q -n 2

test-ktransformers: setup-dev setup-ktransformers-dev  ## tests of the classic host, in its own environment and against ours
	@$(BIN)/hybrimoe demo_model > /dev/null
	@.venv-ktransformers/bin/python -m pytest -q tests/hosts/ktransformers
	@$(BIN)/python -m pytest -q tests/hosts/ktransformers/test_against_default.py

test-ray: setup-ray  ## two replicas on a Ray cluster of this machine, one killed; 1 minute
	@.venv-ray/bin/python -m pytest -q -W ignore tests/serve/scaling/test_ray_cluster.py

test-oldest: setup-oldest  ## what depends on other libraries, with the oldest that are allowed
	@.venv-oldest/bin/python -m pytest -q -n 2 $(OLDEST)

test-wheel: setup-dev  ## install the wheel in a clean environment, run a chat and the examples
	@$(BIN)/python scripts/try_wheel.py

oracle: setup-dev  ## against llama.cpp's converter, vocabularies and templates; after peers, itself
	@HYBRIMOE_LLAMA_CPP=$$($(BIN)/python scripts/llama_cpp_source.py) $(BIN)/python -m pytest -q -n 2 tests/oracle

test-pythons: setup-dev  ## the same for other interpreters, PYTHONS="..."; may load CUDA, 3 GB each
	@$(BIN)/python scripts/try_wheel.py --tests --python $(PYTHONS)

eval: setup-dev  ## every question at its quick size, one HTML report in out/
	@$(BIN)/python -m eval.all --quick --out out

gpu-check-dry: setup-dev  ## the GPU check's every stage, emulated at a tiny size
	@$(BIN)/python -m eval.gpu_check --emulated --fresh --out out/gpu_check

gpu-bundle: setup  ## what a GPU machine without a network needs, in build/gpu-bundle
	@$(BIN)/python scripts/gpu_bundle.py

figures: setup-dev  ## the figures of docs/benchmarks.md from the committed CSVs
	@$(BIN)/python -m eval.figures

peers: setup-dev  ## llama.cpp and ik_llama.cpp for comparisons; compiles for up to half an hour
	@$(BIN)/pip install -q --no-deps diskcache==5.6.3 llama-cpp-python==0.3.36
	@$(BIN)/python scripts/setup_ik.py

peers-server: setup-dev  ## llama.cpp's own server, for eval.serving; compiles for 10 minutes
	@$(BIN)/python -m pip install -q cmake==4.4.5
	@PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python scripts/llama_server.py

fuzz: setup-dev  ## damaged files of every kind, for hours; CASES=... GGUF files
	@$(BIN)/python -m tests.fuzz --cases $(or $(CASES),20000)

load: setup-dev  ## the server's load test for longer, REQUESTS=...
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.serve.load --requests $(or $(REQUESTS),20000)

lint: setup-dev  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

setup:  ## an environment to run in, .venv
	@$(PYTHON) scripts/setup_env.py

setup-ktransformers:  ## an environment for the classic host, .venv-ktransformers
	@$(PYTHON) scripts/setup_ktransformers.py

setup-ktransformers-dev:
	@$(PYTHON) scripts/setup_ktransformers.py --dev

setup-dev:  ## .venv with what tests and lint need
	@$(PYTHON) scripts/setup_env.py --dev

setup-ray: setup-dev
	@$(BIN)/python scripts/setup_ray.py

setup-oldest:
	@$(PYTHON) scripts/setup_env.py --oldest

clean:  ## remove environments and builds; says what stays in the cache folder
	rm -rf .venv .venv-oldest .venv-ray .venv-ktransformers .venv-ik build dist *.egg-info hybrimoe_plugin/policy/cache/*.so hybrimoe_plugin/compute/cpu/native/*.so
	@$(PYTHON) -m hybrimoe_plugin cache
	@echo "These files stay. With no environment left, remove them by: $(PYTHON) -m hybrimoe_plugin cache clear"
