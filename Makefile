# Ballast. On a fresh Debian 12 with git, make and Debian's Python, `make demo` and `make test` do everything.

# Debian's own: the guest's libraries come from its packages and are built for no other Python.
PYTHON := /usr/bin/python3
PYTEST := .venv/bin/python -m pytest
VENV   := .venv/.complete
DEBS   := dist/.complete
# The same as another version, for trying upgrades and downgrades.
NEXT   := dist/next/.complete

.PHONY: help deps venv lint packages test test-unit test-kernel test-vm demo faults crash balloon-faults balloon-trials balloon-rounds balloon-killed dimms backups backup-trials idle bench clean

help: ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

deps: ## install what is missing on this machine (as root; otherwise print the line to run)
	@tools/deps

venv: $(VENV) ## the development environment, in .venv

lint: $(VENV) ## format, lint, types, imports, spelling, shell scripts, units
	$(PYTEST) tests/unit/test_style.py -q

packages: $(DEBS) ## Debian packages, into dist/

test: $(VENV) $(DEBS) $(NEXT) ## all three rooms of tests, and lint
	$(PYTEST)

test-unit: $(VENV) ## no root, seconds
	$(PYTEST) tests/unit

test-kernel: $(VENV) ## as root: real freezes, on loop devices
	$(PYTEST) tests/kernel

test-vm: $(VENV) $(DEBS) $(NEXT) ## in guests under QEMU, with the packages installed
	$(PYTEST) tests/vm

demo: $(VENV) $(DEBS) ## a guest, live: pressure, memory added and given back, a consistent snapshot
	.venv/bin/python -m tests.lab.demo

# May be interrupted: it goes on where it was, as long as the commit is the same. SEED and COUNT may be given.
faults: $(VENV) $(DEBS) $(NEXT) ## a thousand things that go wrong while a guest is frozen; results in faults.jsonl
	.venv/bin/python -m tests.vm.faults --results faults.jsonl --seed $(or $(SEED),1) --count $(or $(COUNT),1000)

# May be interrupted as well.
crash: $(VENV) $(DEBS) ## a hundred snapshots of databases at work, looked at in fresh guests; results in crash.jsonl
	.venv/bin/python -m tests.vm.crash --results crash.jsonl --seed $(or $(SEED),1) --count $(or $(COUNT),100)

balloon-faults: $(VENV) $(DEBS) ## everything that may come between a chunk's answer and its hole, 200 times each
	.venv/bin/python -m tests.vm.balloon_faults

balloon-trials: $(VENV) $(DEBS) ## the balloon pinned, lied about and needed back, ten times each
	.venv/bin/python -m tests.vm.balloon_trials

# May be interrupted: rounds in the file of results are not run again.
balloon-rounds: $(VENV) $(DEBS) ## 1000 times in and out, with compaction, offlining and load; hours
	.venv/bin/python -m tests.vm.balloon_rounds --results dist/balloon-rounds.jsonl

balloon-killed: $(VENV) $(DEBS) ## 16 GiB in the balloon, and its holder killed: needs 20 GiB
	.venv/bin/python -m tests.vm.balloon_killed

dimms: $(VENV) $(DEBS) ## a hundred DIMMs that come, are used and go, in a guest
	.venv/bin/python -m tests.vm.dimms

backups: $(VENV) $(DEBS) ## four backups of databases at work, by QMP and by libvirt: restored, compared, booted
	.venv/bin/python -m tests.vm.backups
	.venv/bin/python -m tests.vm.backups --libvirt

backup-trials: $(VENV) $(DEBS) ## 40 backups' frozen windows; then tools killed 50 times, targets full and stalled
	.venv/bin/python -m tests.vm.backup_trials windows --count 40
	.venv/bin/python -m tests.vm.backup_trials killed --count 50
	.venv/bin/python -m tests.vm.backup_trials full
	.venv/bin/python -m tests.vm.backup_trials stalled

idle: $(VENV) $(DEBS) ## ten minutes of nothing in a guest of each Debian: wake-ups, CPU and memory of each process
	.venv/bin/python -m tests.vm.idle --suite trixie
	.venv/bin/python -m tests.vm.idle --suite bookworm

# The memory benchmarks may be interrupted, too.
bench: $(VENV) $(DEBS) ## freezes beside qemu-ga, memory beside virtio-balloon, virtio-mem and udev; into docs/benchmarks.md
	.venv/bin/python -m tests.vm.bench --document docs/benchmarks.md
	.venv/bin/python -m tests.vm.bench_memory --document docs/benchmarks.md
	.venv/bin/python -m tests.vm.bench_idle --document docs/benchmarks.md

clean: ## remove what make has built; guests' images stay in the cache
	rm -rf .venv dist agent/*.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find agent tests -name __pycache__ -prune -exec rm -rf {} +

# pip gets what pyproject.toml names; the guest's libraries are the system's.
$(VENV): pyproject.toml | deps
	$(PYTHON) -m venv --system-site-packages .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[host,dev]'
	touch $@

SOURCES := $(shell find agent units packaging docs/man -type f -not -name '*.pyc' -not -path '*.egg-info/*')

$(DEBS): $(SOURCES) | deps
	packaging/build
	touch $@

$(NEXT): $(SOURCES) | deps
	packaging/build dist/next +next
	touch $@
