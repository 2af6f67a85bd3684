.PHONY: format lint type quick test slow docs check

format:
	ruff format .
	ruff check --fix .

lint:
	ruff format --check .
	ruff check .

type:
	pyright

test:
	pytest -n 2 --dist loadfile

docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

slow:
	pytest -m slow -n 2 --dist loadfile

check: lint type test
