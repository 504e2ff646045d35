# Two commands matter: `make demo` and `make test`. Both set up what they need first; setting up twice costs nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := 0.13.9
STAMP  := $(VENV)/.ready
RUN    ?= runs/demo
DATA   ?= data/demo
export YOLO_OFFLINE = 1
export YOLO_AUTOINSTALL = 0

.PHONY: setup demo test test-all lessons lock clean

setup: $(STAMP)

# Plain `python -m venv`: its pip is the one that tools which shell out to pip must find.
$(STAMP): requirements.lock settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --no-deps -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $(STAMP)

lock:
	$(BIN)/uv pip compile setup.py --extra dev --universal --generate-hashes --no-annotate --no-header \
	  -c constraints.txt --override overrides.txt -o requirements.lock
