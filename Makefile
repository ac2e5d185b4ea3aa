# make demo    install, then run the main job on real captioned images (IMAGES=folder: on your own)
# make demo-train  train a small diffusion model on emoji, and draw with it (minutes; IMAGES=folder: on your own)
# make test    install, then lint, types and tests (at most 8 minutes on 2 cores)
# make test-all  the long tests too: many kills, side environments
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-data
STEPS ?= 4000
TRAIN ?= demo-data-train$(if $(IMAGES),-own)
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

demo-train: $(VENV)/installed
ifndef IMAGES
	$(BIN)/python -m demo.emoji $(TRAIN)/emoji
endif
	$(BIN)/tastemaker train $(or $(IMAGES),$(TRAIN)/emoji) --out $(TRAIN)/model --preset tiny --steps $(STEPS) \
	  $(if $(IMAGES),,--prompts demo/emoji.txt)
ifndef IMAGES
	$(BIN)/tastemaker sample $(TRAIN)/model --prompts demo/emoji.txt --seed 0 --batch 10 --grid --out $(TRAIN)/drawn
endif

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
	rm -rf $(VENV) demo-data demo-data-train build *.egg-info
