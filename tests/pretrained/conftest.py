"""Tests of pretrained models run only where they are asked for by name: `pytest -m pretrained`."""


def pytest_collection_modifyitems(config, items):
    if "pretrained" in config.getoption("markexpr"):
        return
    deselected = [item for item in items if item.get_closest_marker("pretrained")]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
