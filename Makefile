.PHONY: format lint type quick test slow docs check

format:
	ruff format .
	ruff check --fix .

lint:
	ruff format --check .
	ruff check .

type:
	pyright

# Formulas, methods, engines and environments: a minute, without Ray.
quick:
	pytest -n 2 --dist loadfile tests/maths tests/method tests/engine tests/envs tests/data

test:
	pytest -n 2 --dist loadfile

docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

slow:
	@# As they stand: the files of one long test would else come last, alone.
	pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder

check: lint type test
