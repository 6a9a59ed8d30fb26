# Every target does its own set-up, in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: chat chat-ktransformers setup-ktransformers test lint eval clean setup setup-dev

chat: setup  ## chat with the demo model; PROMPT="..." asks one question
	@$(BIN)/hybrimoe local_chat --demo $(if $(PROMPT),--prompt "$(PROMPT)")

chat-ktransformers: setup setup-ktransformers  ## the real ktransformers.local_chat with the demo model and our rules
	@$(BIN)/hybrimoe demo-model > /dev/null
	@.venv-ktransformers/bin/hybrimoe ktransformers_chat --demo $(if $(PROMPT),--greedy --prompt "$(PROMPT)")

test: lint  ## lint, type check and tests
	@$(BIN)/python -m pytest -q -n 2

lint: setup-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

setup:
	@$(PYTHON) scripts/setup_env.py

setup-ktransformers:
	@$(PYTHON) scripts/setup_ktransformers.py

setup-dev:
	@$(PYTHON) scripts/setup_env.py --dev

clean:
	rm -rf .venv build dist *.egg-info
