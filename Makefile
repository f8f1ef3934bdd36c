# A menu; the work is in tools/ and noxfile.py. Needs GNU make 3.81 and python3 3.11 or newer, nothing else.
.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs soak clean

RUN = @sh tools/python.sh -m

demo: ## show the main job on real sockets (under a minute)
	$(RUN) tools.demo

test: ## everything that must hold, on every Python found (15 minutes at most)
	$(RUN) tools.stages test

lint: ## ruff and the import contracts
	$(RUN) tools.stages lint

types: ## mypy --strict
	$(RUN) tools.stages types

docs: ## build docs/_build/html, warnings are errors
	$(RUN) tools.stages docs

soak: ## the tests with every repeated proof 20 times as long; SDLISTEN_ROUNDS=N for another number
	$(RUN) tools.stages soak

clean: ## remove what the other targets made
	rm -rf .venv .nox .coverage* .hypothesis .import_linter_cache .mypy_cache .ruff_cache build dist docs/_build
	find sdlisten tests tools integration bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

help:
	@echo 'make TARGET, where TARGET is one of'
	@sed -n 's/^\([a-z]*\): ## /  \1|/p' Makefile | awk -F'|' '{ printf "%-8s %s\n", $$1, $$2 }'
