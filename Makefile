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

BENCHMARKS ?= prevalence intersections difficulty views scanners shortcuts localiser

SPEED ?= speed_decode speed_prepare speed_networks speed_stage3 speed_inference speed_growth

SCIENCE ?= runs/science

KAGGLE_USER ?= your-kaggle-name

.PHONY: setup demo proof science kaggle test test-all benchmarks speed lessons results docs lock clean

setup: $(STAMP)

# Plain `python -m venv`: its pip is the one that tools which shell out to pip must find.
$(STAMP): requirements.lock settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --no-deps --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $(STAMP)

lock:
	$(BIN)/uv pip compile setup.py --extra dev --universal --generate-hashes --no-annotate --no-header \
	  -c constraints.txt --override overrides.txt -o requirements.lock

# The phantom is made once (a second call finds it complete), the run goes on where it stopped, the table is read from both.
demo: setup
	$(BIN)/mscan_phantom --out $(DATA) --studies 84 --test_studies 32 --seed 1
	$(BIN)/mscan_run --data_dir $(DATA) --run_dir $(RUN) --preset demo
	$(BIN)/mscan_evaluate --run_dir $(RUN) --train_csv $(DATA)/test_labels.csv --truth_csv $(DATA)/truth.csv --json $(RUN)/held_out.json
	$(BIN)/mscan_runreport --run_dir $(RUN)

# The demo's run on 104 phantom studies that nothing was chosen on: score per condition, level and side; places of foramina and recesses; what a missing series costs. 10 minutes beyond the demo.
proof: demo
	$(BIN)/mscan_phantom --out data/proof --studies 1 --test_studies 104 --seed 7
	$(BIN)/mscan_predict --run_dir $(RUN) --data_dir data/proof --out $(RUN)/proof
	$(BIN)/mscan_evaluate --train_csv data/proof/test_labels.csv --submission $(RUN)/proof/submission.csv --prior_csv $(RUN)/10_prepare/prior.csv --markdown $(RUN)/proof/table.md
	$(BIN)/python -m benchmarks.sides --run_dir $(RUN) --data_dir data/proof --studies 0
	$(BIN)/python -m benchmarks.missing --run_dir $(RUN) --data_dir data/proof

# The paper's tables on phantom studies: every row, on the same crops, with intervals; in the run's 50_evaluate/variants.md.
science: setup
	$(BIN)/mscan_phantom --out data/science --studies 600 --test_studies 0 --seed 5
	$(BIN)/mscan_run --data_dir data/science --run_dir $(SCIENCE) --preset science
	$(BIN)/mscan_evaluate --run_dir $(SCIENCE) --truth_csv data/science/truth.csv --json $(SCIENCE)/held_out.json
	$(BIN)/mscan_runreport --run_dir $(SCIENCE)

# A data set and notebooks for Kaggle, of a finished run; see submission/README.md. Nothing is uploaded.
kaggle: setup
	$(BIN)/python -m submission.build --run_dir $(RUN) --user $(KAGGLE_USER) --out dist_kaggle

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow" tests

test-all: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup tests

# Is the phantom worth learning from? About an hour; the last one needs the run of `make demo`. See benchmarks/README.md.
benchmarks: setup
	for b in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$b --check || exit 1; done

# How fast is it? For a machine with nothing else to do; the last two take the run of `make demo`. Tables, JSON and pictures lie in runs/benchmarks. See benchmarks/README.md.
speed: setup
	for b in $(SPEED); do $(BIN)/python -m benchmarks.$$b --check || exit 1; done

# Run the lessons of every notebook (or N=name) and store what they show; the run parts are left alone.
lessons: setup
	$(BIN)/python tests/lessons.py $(N)
	$(BIN)/nbdev_clean

# README's tables of results, from what `make proof` left, and the pages that copy from them.
results: setup
	$(BIN)/python docs/results.py --run_dir $(RUN)
	$(BIN)/python docs/parameters.py

# Rewrite what pages take from notebooks, presets and README.
docs: setup
	$(BIN)/python docs/parameters.py

clean:
	rm -rf $(RUN) $(DATA) build dist *.egg-info
