# make demo    install, then run the main job on real captioned images (IMAGES=folder: on your own)
# make demo-train  train a small diffusion model on what the demo kept (minutes; STEPS=400)
# make test    install, then lint, types and tests (at most 8 minutes on 2 cores)
# make test-all  the long tests too: many kills, side environments
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-data
STEPS ?= 400
BIN = $(VENV)/bin
EXTRAS = test$(shell $(PYTHON) -c 'import sys; print(",img2dataset" if sys.version_info < (3, 13) else "")')

.PHONY: demo demo-train test test-all lint install clean
install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m demo.run --out $(OUT) $(if $(IMAGES),--images "$(IMAGES)")

demo-train: $(OUT)/shards/bundled/manifest.json
	$(BIN)/tastemaker train $(OUT)/shards/bundled --out $(OUT)/model --steps $(STEPS)

$(OUT)/shards/bundled/manifest.json:
	$(MAKE) demo

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# two files at a time; a file's tests share what they set up
test: lint
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile

test-all: lint
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) demo-data build *.egg-info
