.PHONY: format lint type test slow check

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

slow:
	pytest -m slow -n 2 --dist loadfile

check: lint type test
