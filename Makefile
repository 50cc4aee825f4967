# make setup      the environment: .venv with the pinned dependencies; with GPU=1 also CUDA's libraries for an NVIDIA GPU
# make run        the main job on data that ship with scikit-learn: fine-tune lite0 on handwritten digits, evaluate, summarize
# make test       lint, types, and the fast tests
# make test-slow  the long checks
# make docs       the documentation as a site: site/index.html

PYTHON ?= python3
COMMA := ,
BIN := .venv/bin
EXTRAS := dev$(if $(GPU),$(COMMA)gpu)
READY := .venv/ready$(if $(GPU),-gpu)

.PHONY: setup run test test-slow docs
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d; name one by: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

run: setup
	$(BIN)/python train.py --config configs/lite0_digits.yaml

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m 'not slow' -n 2 --dist loadfile

test-slow: setup
	$(BIN)/pytest -m slow -n 2 --dist worksteal

docs: setup
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet
	@echo 'the documentation is in site/index.html'
